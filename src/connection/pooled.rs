//! What deadpool calls to make a connection and to look at one before it is lent again; and the register of all that
//! are open.

use std::cell::Cell;
use std::collections::HashMap;
use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, ready};
use std::time::{Duration, Instant};

use deadpool::managed::{Manager, Metrics, RecycleError, RecycleResult};
use deadpool_postgres::ClientWrapper;
use tokio::runtime::Handle;
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::connection::Connection;
use super::reset;
use super::shell::Shell;
use crate::config::SessionConfig;
use crate::connect::dial;
use crate::error::{ConnectCause, ConnectError, DriverError};
use crate::retry::jitter;

/// How long an idle connection may take to show a sign of life.
const CHECK_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a runtime of one thread may be busy, or left alone, before connections are made elsewhere.
const HOME_LIMIT: Duration = Duration::from_secs(1);
/// The first pause after a server that is starting or full; it doubles up to the second.
const CONNECT_PAUSE: Duration = Duration::from_millis(20);
const CONNECT_PAUSE_MAX: Duration = Duration::from_millis(500);

thread_local! {
    /// Whether whoever asks the pool right now has got a place in it, and waits for the connection only.
    static PLACED: Cell<bool> = const { Cell::new(false) };
}

/// Asks the pool once, and notes whether it has granted a place.
pub(crate) fn watch<T>(placed: &AtomicBool, ask: impl FnOnce() -> T) -> T {
    PLACED.set(false);
    let answer = ask();
    if PLACED.take() {
        placed.store(true, Relaxed);
    }
    answer
}

/// Makes connections for one pool.
#[derive(Debug)]
pub(crate) struct ConnectionManager {
    config: Arc<SessionConfig>,
    register: Arc<Register>,
    /// Where connections are made and driven, unless it is gone.
    home: Option<Handle>,
    connecting: AtomicUsize,
    last_error: Mutex<Option<Arc<ConnectError>>>,
}

impl ConnectionManager {
    pub(crate) fn new(config: Arc<SessionConfig>, home: Option<Handle>) -> Self {
        Self {
            config,
            register: Arc::default(),
            home,
            connecting: AtomicUsize::new(0),
            last_error: Mutex::default(),
        }
    }

    pub(crate) fn register(&self) -> &Arc<Register> {
        &self.register
    }

    /// Where what is done for the pool itself should run.
    pub(crate) fn home(&self) -> Handle {
        self.home.clone().unwrap_or_else(Handle::current)
    }

    /// How many callers are connecting right now.
    pub(crate) fn connecting(&self) -> usize {
        self.connecting.load(Relaxed)
    }

    /// The last failure to connect, unless a connection was made since.
    pub(crate) fn last_error(&self) -> Option<Arc<ConnectError>> {
        self.last_error_slot().clone()
    }

    fn last_error_slot(&self) -> MutexGuard<'_, Option<Arc<ConnectError>>> {
        self.last_error.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn connect_patiently(&self) -> Result<Connection, Arc<ConnectError>> {
        let (_connecting, _) = Counted::new(&self.connecting);
        PLACED.set(true);
        let mut pause = CONNECT_PAUSE;
        loop {
            match self.connect().await {
                Ok(connection) => {
                    *self.last_error_slot() = None;
                    return Ok(connection);
                }
                Err(e) => {
                    // A server that is starting (57P03) or full (53300) is worth waiting for; the acquire has a limit.
                    let busy = e.code().is_some_and(|code| matches!(code.code(), "57P03" | "53300"));
                    let e = Arc::new(e);
                    *self.last_error_slot() = Some(Arc::clone(&e));
                    if !busy {
                        return Err(e);
                    }
                    tokio::time::sleep(pause / 2 + jitter(pause / 2)).await;
                    pause = (pause * 2).min(CONNECT_PAUSE_MAX);
                }
            }
        }
    }

    /// Makes a connection at home, so that it does not die with the runtime of whoever happened to need it first; or
    /// here, if home is gone or does not answer.
    async fn connect(&self) -> Result<Connection, ConnectError> {
        if let Some(home) = &self.home {
            let (task, begun) = self.connect_on(home);
            if timeout(HOME_LIMIT, begun).await.is_ok() {
                if let Some(result) = outcome(task).await {
                    return result;
                }
            }
        }
        let (task, _) = self.connect_on(&Handle::current());
        outcome(task).await.unwrap_or_else(|| {
            let cause = ConnectCause::Refused("the runtime is shutting down".into());
            Err(ConnectError { target: self.config.targets(), phase: "starting", cause })
        })
    }

    /// Starts a task that makes a connection, and is aborted with the set; also returns what ends when it is polled.
    fn connect_on(
        &self,
        runtime: &Handle,
    ) -> (JoinSet<Result<Connection, ConnectError>>, oneshot::Receiver<()>) {
        let (config, register) = (Arc::clone(&self.config), Arc::clone(&self.register));
        let (begins, begun) = oneshot::channel();
        let mut task = JoinSet::new();
        let connect = async move {
            drop(begins);
            connect(config, register).await
        };
        task.spawn_on(connect, runtime);
        (task, begun)
    }
}

/// What came of a connect; nothing if its runtime was shut down.
async fn outcome(
    mut task: JoinSet<Result<Connection, ConnectError>>,
) -> Option<Result<Connection, ConnectError>> {
    match task.join_next().await? {
        Ok(result) => Some(result),
        Err(e) if e.is_panic() => std::panic::resume_unwind(e.into_panic()),
        Err(_) => None,
    }
}

async fn connect(config: Arc<SessionConfig>, register: Arc<Register>) -> Result<Connection, ConnectError> {
    let started = Instant::now();
    let dialled = dial(&config).await?;
    let target = dialled.route.to_string();
    let runtime = Handle::current();
    let mut connection = dialled.connection;
    // Notices and notifications have no reader; the driver's own loop would log notices.
    let task = runtime.spawn(poll_fn(move |cx| {
        while let Some(Ok(_)) = ready!(connection.poll_message(cx)) {}
        Poll::Ready(())
    }));
    let driver = task.abort_handle();
    let client = Arc::new(ClientWrapper::new(dialled.client, task));
    let left = config.connect_timeout.saturating_sub(started.elapsed());
    let set_up = timeout(left, reset::set_up(&client)).await;
    let failed = |cause| ConnectError { target, phase: "setting up the session", cause };
    let watches_client = match set_up {
        Ok(Ok(watches)) => watches,
        Ok(Err(e)) => return Err(failed(ConnectCause::Driver(DriverError(e)))),
        Err(_) => return Err(failed(ConnectCause::TimedOut(config.connect_timeout))),
    };
    let shell = Arc::new(Shell::new(dialled.wire, Arc::clone(&config), dialled.route, driver, runtime));
    let now = Instant::now();
    Ok(Connection {
        client,
        watches_client,
        expires: config.max_lifetime.map(|life| now + life - jitter(life / 10)),
        idle_since: now,
        registration: register.add(&shell),
        shell,
    })
}

impl Manager for ConnectionManager {
    /// Boxed: the pool moves it a dozen times each time it is lent.
    type Type = Box<Connection>;
    type Error = Arc<ConnectError>;

    async fn create(&self) -> Result<Box<Connection>, Self::Error> {
        // Boxed: it is large and seldom needed, and every acquire would carry it along, several times over.
        Box::pin(self.connect_patiently()).await.map(Box::new)
    }

    async fn recycle(&self, connection: &mut Box<Connection>, _: &Metrics) -> RecycleResult<Self::Error> {
        if !connection.is_usable() {
            return Err(RecycleError::message("closed"));
        }
        let now = Instant::now();
        let idle = now.saturating_duration_since(connection.idle_since);
        if connection.is_expired(now) || self.config.idle_timeout.is_some_and(|limit| idle > limit) {
            return Err(RecycleError::message("expired"));
        }
        if idle > self.config.check_after_idle {
            PLACED.set(true);
            match Box::pin(timeout(CHECK_TIMEOUT, connection.client.check_connection())).await {
                Ok(Ok(())) => {}
                _ => return Err(RecycleError::message("dead")),
            }
        }
        Ok(())
    }
}

impl Connection {
    fn is_usable(&self) -> bool {
        self.shell.core().lost().is_none() && !self.client.is_closed() && !self.wire().is_over()
    }

    pub(crate) fn is_expired(&self, now: Instant) -> bool {
        self.expires.is_some_and(|at| at <= now)
    }
}

/// One more in a number, for as long as it lives.
pub(crate) struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    /// Counts one more; also returns how many there were before.
    pub(crate) fn new(number: &'a AtomicUsize) -> (Self, usize) {
        let before = number.fetch_add(1, Relaxed);
        (Self(number), before)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// Every open connection of a pool, lent or not: what closing has to wait for, and may have to cut.
#[derive(Debug, Default)]
pub(crate) struct Register {
    open: Mutex<HashMap<u64, Arc<Shell>>>,
    next: AtomicU64,
    emptied: Notify,
}

impl Register {
    fn open(&self) -> MutexGuard<'_, HashMap<u64, Arc<Shell>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(self: &Arc<Self>, shell: &Arc<Shell>) -> Registration {
        let id = self.next.fetch_add(1, Relaxed);
        self.open().insert(id, Arc::clone(shell));
        Registration { register: Arc::clone(self), id }
    }

    /// A number that no other living pool has.
    pub(crate) fn id(self: &Arc<Self>) -> usize {
        Arc::as_ptr(self) as usize
    }

    /// Waits until none is open.
    pub(crate) async fn empty(&self) {
        loop {
            let mut emptied = std::pin::pin!(self.emptied.notified());
            emptied.as_mut().enable();
            if self.open().is_empty() {
                return;
            }
            emptied.await;
        }
    }

    /// Cuts all that are open; returns how many.
    pub(crate) fn cut(&self, reason: &'static str) -> usize {
        let open = self.open();
        for shell in open.values() {
            shell.cut(reason);
        }
        open.len()
    }
}

/// A connection's entry in the register, for as long as the connection lives.
#[derive(Debug)]
pub(crate) struct Registration {
    register: Arc<Register>,
    id: u64,
}

impl Registration {
    pub(super) fn pool_id(&self) -> usize {
        self.register.id()
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let mut open = self.register.open();
        open.remove(&self.id);
        if open.is_empty() {
            drop(open);
            self.register.emptied.notify_waiters();
        }
    }
}
