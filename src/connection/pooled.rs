//! What deadpool calls to make a connection, and to look at one before it is lent again.

use std::cell::Cell;
use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::task::{Poll, ready};
use std::time::{Duration, Instant};

use deadpool::managed::{Manager, Metrics, RecycleError, RecycleResult};
use deadpool_postgres::ClientWrapper;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::arrivals::{Arrivals, Attempt, HOME_LIMIT, Made, Started};
use super::connection::Connection;
use super::register::Register;
use super::reset;
use super::shell::Shell;
use crate::config::SessionConfig;
use crate::connect::{Place, dial};
use crate::error::{ConnectCause, ConnectError, DriverError};
use crate::lock::lock;
use crate::retry::jitter;

/// How long an idle connection may take to show a sign of life. One that takes longer stands for all that were idle for
/// as long as it was: what lets go of idle connections, or a server that is gone, spares none of them.
const CHECK_TIMEOUT: Duration = Duration::from_secs(1);
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
    arrivals: Arc<Arrivals>,
    /// The connects under way. They end with the pool, not with who asked for them.
    tasks: Mutex<JoinSet<()>>,
    /// Connections that have been idle since then, or for longer, are dead.
    dead_since: Mutex<Option<Instant>>,
}

impl ConnectionManager {
    pub(crate) fn new(config: Arc<SessionConfig>, home: Option<Handle>) -> Self {
        Self {
            register: Arc::new(Register::new(&config)),
            config,
            home,
            connecting: AtomicUsize::new(0),
            arrivals: Arc::default(),
            tasks: Mutex::default(),
            dead_since: Mutex::default(),
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

    /// How many connections are ready that nobody was there for.
    pub(crate) fn ready(&self) -> usize {
        self.arrivals.ready()
    }

    /// Keeps only those of them that are still good.
    pub(crate) fn retain_ready(&self, keep: impl Fn(&Connection) -> bool) {
        self.arrivals.retain_ready(keep);
    }

    /// Ends the connects under way, and the connections that nobody was there for; none is made from now on.
    pub(crate) fn close(&self) {
        self.arrivals.close();
        lock(&self.tasks).abort_all();
    }

    /// The last failure to connect, unless a connection was made since.
    pub(crate) fn last_error(&self) -> Option<Arc<ConnectError>> {
        self.arrivals.last_error()
    }

    async fn connect_patiently(&self) -> Made {
        let (_connecting, _) = Counted::new(&self.connecting);
        PLACED.set(true);
        let mut pause = CONNECT_PAUSE;
        loop {
            match self.connect().await {
                // A server that is starting (57P03) or full (53300) is worth waiting for; the acquire has a limit.
                Err(e) if e.code().is_some_and(|code| matches!(code.code(), "57P03" | "53300")) => {
                    sleep(pause / 2 + jitter(pause / 2)).await;
                    pause = (pause * 2).min(CONNECT_PAUSE_MAX);
                }
                made => return made,
            }
        }
    }

    /// Waits for a connect that another caller has left behind, or has one made at home, so that it does not die with
    /// the runtime of whoever happened to need it first; or here, if home is gone or does not answer.
    async fn connect(&self) -> Made {
        let here = Handle::current();
        for runtime in [self.home.as_ref().unwrap_or(&here), &here] {
            let (mut arrival, wanted) = self.arrivals.expect_one();
            let stands_still = async {
                if !wanted {
                    // Nobody knows how the other one fares.
                    sleep(HOME_LIMIT).await;
                }
                let attempt = Attempt::new(&self.arrivals, self.register.places.take().await);
                self.start(attempt, runtime).stands_still().await
            };
            let made = tokio::select! {
                made = arrival.made() => made,
                attempt = stands_still => {
                    self.start(attempt, &here);
                    arrival.made().await
                }
            };
            if let Some(made) = made {
                return made;
            }
        }
        let cause = ConnectCause::Refused("the pool is closed, or the runtime is shutting down".into());
        Err(Arc::new(ConnectError { target: self.config.targets(), phase: "starting", cause }))
    }

    /// Starts a task that makes a connection for whoever waits first once it is there.
    fn start(&self, attempt: Attempt, runtime: &Handle) -> Started {
        let (config, register) = (Arc::clone(&self.config), Arc::clone(&self.register));
        // If it does not even begin, its place must not be lost either.
        attempt.place.limit(config.connect_timeout.saturating_add(config.cleanup_timeout));
        let attempt = Arc::new(Mutex::new(Some(attempt)));
        let (begins, begun) = oneshot::channel();
        let started = Started { begun, attempt: Arc::clone(&attempt) };
        let connect = async move {
            let attempt = lock(&attempt).take();
            drop(begins);
            if let Some(attempt) = attempt {
                let made = connect(config, register, &attempt.place).await;
                attempt.end(made.map_err(Arc::new));
            }
        };
        let mut tasks = lock(&self.tasks);
        while tasks.try_join_next().is_some() {}
        if self.arrivals.is_closed() {
            drop(tasks);
            drop(lock(&started.attempt).take());
        } else {
            tasks.spawn_on(connect, runtime);
        }
        started
    }

    /// Whether a connection may be lent that was made or given back a while ago.
    async fn check(&self, connection: &Connection) -> Result<(), &'static str> {
        if !connection.is_usable() {
            return Err("closed");
        }
        let now = Instant::now();
        let since = connection.idle_since;
        let idle = now.saturating_duration_since(since);
        if connection.is_expired(now) || self.config.idle_timeout.is_some_and(|limit| idle > limit) {
            return Err("expired");
        }
        if idle <= self.config.check_after_idle {
            return Ok(());
        }
        if lock(&self.dead_since).is_some_and(|dead| since <= dead) {
            return Err("idle for as long as one that was dead");
        }
        PLACED.set(true);
        match Box::pin(timeout(CHECK_TIMEOUT, connection.client.check_connection())).await {
            Ok(answer) => answer.map_err(|_| "dead"),
            Err(_) => {
                let mut dead = lock(&self.dead_since);
                *dead = dead.max(Some(since));
                Err("silent")
            }
        }
    }
}

async fn connect(
    config: Arc<SessionConfig>,
    register: Arc<Register>,
    place: &Arc<Place>,
) -> Result<Connection, ConnectError> {
    let dialled = dial(&config, place).await?;
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
    let left = config.connect_timeout.saturating_sub(dialled.started.elapsed());
    let set_up = timeout(left, reset::set_up(&client)).await;
    let failed = |cause| ConnectError { target, phase: "setting up the session", cause };
    let watches_client = match set_up {
        Ok(Ok(watches)) => watches,
        Ok(Err(e)) => return Err(failed(ConnectCause::Driver(DriverError(e)))),
        Err(_) => return Err(failed(ConnectCause::TimedOut(config.connect_timeout))),
    };
    let shell = Arc::new(Shell::new(dialled.wire, Arc::clone(&config), dialled.route, driver, runtime));
    place.stay();
    let now = Instant::now();
    // One that would end after the end of time does not end.
    let expires = config.max_lifetime.and_then(|life| Some(now.checked_add(life)? - jitter(life / 10)));
    Ok(Connection {
        client,
        watches_client,
        expires,
        idle_since: now,
        registration: register.add(&shell, place.number()),
        shell,
    })
}

impl Manager for ConnectionManager {
    /// Boxed: the pool moves it a dozen times each time it is lent.
    type Type = Box<Connection>;
    type Error = Arc<ConnectError>;

    async fn create(&self) -> Result<Box<Connection>, Self::Error> {
        loop {
            match self.arrivals.take_ready() {
                Some(connection) if self.check(&connection).await.is_ok() => return Ok(Box::new(connection)),
                Some(_) => {}
                // Boxed: it is large and seldom needed, and every acquire would carry it along, several times over.
                None => return Box::pin(self.connect_patiently()).await.map(Box::new),
            }
        }
    }

    async fn recycle(&self, connection: &mut Box<Connection>, _: &Metrics) -> RecycleResult<Self::Error> {
        self.check(connection).await.map_err(RecycleError::message)
    }
}

impl Connection {
    fn is_usable(&self) -> bool {
        self.shell.core().lost().is_none() && !self.client.is_closed() && !self.wire().is_over()
    }

    pub(crate) fn is_expired(&self, now: Instant) -> bool {
        self.expires.is_some_and(|at| at <= now)
    }

    /// Ends it as [`close`](Self::close) does, and returns when the server is done with it, or has had its time.
    pub(crate) async fn close_and_wait(&self, reason: &'static str) {
        let cancel = self.is_left_running();
        self.shell.lose(reason);
        self.registration.limit_place();
        self.shell.cancel_and_hang_up(cancel).await;
        self.registration.place_freed().await;
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
