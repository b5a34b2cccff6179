//! The relay: a thread that listens on a port of its own and serves every client, and what its clients share.

use std::{
    collections::HashMap,
    net::Ipv4Addr,
    sync::{Arc, Mutex, mpsc as sync_mpsc},
    thread,
    time::Duration,
};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};
use tokio::{
    net::TcpListener,
    sync::{Mutex as AsyncMutex, Notify, mpsc, oneshot},
    task::JoinSet,
    time::timeout,
};
use tokio_postgres::config::SslMode;

use super::{
    Faults, SandboxError,
    backend::{Backend, LogInError, Parameters},
    client,
    frames::error_field,
    sql::Level,
};
use crate::config::SessionConfig;
use crate::lock::lock;

/// How long dropping the relay may hold up the test.
const DROP_LIMIT: Duration = Duration::from_secs(5);

/// How long finishing waits for transactions that are being given up in the background.
const FINISH_GRACE: Duration = Duration::from_secs(2);

/// How long bringing the outer transaction to its end may take.
const END_LIMIT: Duration = Duration::from_secs(4);

const URL_PART: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// What a relay does with its clients.
#[derive(Clone, Debug)]
pub(super) enum Mode {
    /// Each has a connection to the server of its own.
    Proxy,
    /// All share one, which is in a transaction of this isolation level; they wait for each other this long.
    Sandbox { level: Level, wait_limit: Duration },
}

/// A relay at work. Dropped, it ends.
pub(super) struct Relay {
    config: SessionConfig,
    url: String,
    faults: Faults,
    /// Closed to end the relay; sent on to have it say how it ended.
    orders: Option<mpsc::UnboundedSender<Verdict>>,
    ended: Mutex<sync_mpsc::Receiver<()>>,
}

type Verdict = oneshot::Sender<Result<(), SandboxError>>;

impl Relay {
    pub(super) async fn start(config: SessionConfig, mode: Mode) -> Result<Self, SandboxError> {
        let faults = Faults::default();
        let (orders, to_do) = mpsc::unbounded_channel();
        let (ready, started) = oneshot::channel();
        let (has_ended, ended) = sync_mpsc::channel();
        let target = config.postgres.clone();
        let work = {
            let (mode, faults, limit) = (mode.clone(), faults.clone(), config.connect_timeout);
            move || {
                match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                    Ok(runtime) => runtime.block_on(work(target, limit, mode, faults, ready, to_do)),
                    Err(error) => {
                        // The caller may have stopped waiting.
                        let _ = ready.send(Err(SandboxError::io("start a runtime")(error)));
                    }
                }
                let _ = has_ended.send(());
            }
        };
        // A thread with a runtime of its own: clients come from any number of runtimes, and dropping waits for it.
        let thread = thread::Builder::new().name("pg-session-relay".to_owned());
        thread.spawn(work).map_err(SandboxError::io("start a thread"))?;
        let Started { port, login } = started.await.map_err(|_| SandboxError::Stopped)??;

        let mut postgres = tokio_postgres::Config::new();
        postgres.host("127.0.0.1").port(port).ssl_mode(SslMode::Disable);
        let mut url = format!("127.0.0.1:{port}");
        let given = config.postgres.clone();
        let user = login.as_ref().map(|login| login.user.as_str()).or(given.get_user());
        if let Some(user) = user {
            postgres.user(user);
            let mut who = encode(user.as_bytes());
            // A sandbox asks for none.
            if let (Some(password), Mode::Proxy) = (given.get_password(), &mode) {
                postgres.password(password);
                who = format!("{who}:{}", encode(password));
            }
            url = format!("{who}@{url}");
        }
        url = format!("postgres://{url}");
        if let Some(database) = login.as_ref().map(|login| login.database.as_str()).or(given.get_dbname()) {
            postgres.dbname(database);
            url = format!("{url}/{}", encode(database.as_bytes()));
        }
        let mut mark = '?';
        if let Some(name) = given.get_application_name() {
            postgres.application_name(name);
            url = format!("{url}{mark}application_name={}", encode(name.as_bytes()));
            mark = '&';
        }
        if let Some(options) = given.get_options() {
            postgres.options(options);
            url = format!("{url}{mark}options={}", encode(options.as_bytes()));
        }
        let mut config = config.check_after_idle(Duration::ZERO);
        config.postgres = postgres;
        Ok(Self { config, url, faults, orders: Some(orders), ended: Mutex::new(ended) })
    }

    pub(super) fn url(&self) -> String {
        self.url.clone()
    }

    pub(super) fn config(&self) -> SessionConfig {
        self.config.clone()
    }

    pub(super) fn faults(&self) -> Faults {
        self.faults.clone()
    }

    /// Ends it, and tells how the outer transaction stood.
    pub(super) async fn finish(self) -> Result<(), SandboxError> {
        let (verdict, told) = oneshot::channel();
        let sent = self.orders.as_ref().map(|orders| orders.send(verdict));
        match sent {
            Some(Ok(())) => told.await.unwrap_or(Err(SandboxError::Stopped)),
            _ => Err(SandboxError::Stopped),
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        drop(self.orders.take());
        let _ = lock(&self.ended).recv_timeout(DROP_LIMIT);
    }
}

impl std::fmt::Debug for Relay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Not the URL: it may hold a password.
        f.debug_struct("Relay").field("config", &self.config).field("faults", &self.faults).finish()
    }
}

fn encode(part: &[u8]) -> String {
    percent_encode(part, URL_PART).to_string()
}

/// What its maker learns when the relay is ready.
struct Started {
    port: u16,
    login: Option<Login>,
}

/// Who a sandbox is to the server, and where.
#[derive(Clone, Debug)]
pub(super) struct Login {
    pub(super) user: String,
    pub(super) database: String,
}

/// What all clients of one relay share.
pub(super) struct Shared {
    pub(super) faults: Faults,
    pub(super) target: tokio_postgres::Config,
    pub(super) sandbox: Option<Common>,
}

/// What the clients of a sandbox share.
pub(super) struct Common {
    /// The one connection. Held by a client for a transaction, or for one batch outside of any.
    pub(super) backend: Arc<AsyncMutex<Backend>>,
    pub(super) login: Login,
    pub(super) level: Level,
    pub(super) wait_limit: Duration,
    pub(super) parameters: Parameters,
    pub(super) process_id: [u8; 4],
    /// The sessions by their secret keys.
    pub(super) sessions: Mutex<HashMap<i32, Entry>>,
    /// Prepared statements whose sessions are gone.
    pub(super) orphans: Mutex<Vec<Vec<u8>>>,
    /// Why nothing can be done any more.
    pub(super) broken: Mutex<Option<String>>,
    /// A session has left its transaction, or has gone.
    pub(super) changed: Notify,
}

/// A session as others see it.
pub(super) struct Entry {
    /// Cancel requests for it; answered when they are dealt with.
    pub(super) cancels: mpsc::UnboundedSender<oneshot::Sender<()>>,
    pub(super) in_transaction: bool,
}

impl Common {
    /// Logs in and begins the outer transaction.
    async fn begin(
        target: &tokio_postgres::Config,
        limit: Duration,
        level: Level,
        wait_limit: Duration,
    ) -> Result<Self, SandboxError> {
        // Should this process be killed, the backend is not to run on; not every platform can look.
        const WATCH: &str = "SET client_connection_check_interval = '1s'";
        const WHO: &str = "SET idle_in_transaction_session_timeout = 0;\
                           SELECT session_user, pg_catalog.current_database()";
        let begin = async {
            let mut backend = Backend::log_in(target).await.map_err(|error| match error {
                LogInError::Io(source) => SandboxError::io("connect to the server")(source),
                LogInError::Driver(source) => SandboxError::LogIn(source),
            })?;
            // On its own: the isolation level must be set before anything else in a transaction.
            let begin = format!("BEGIN ISOLATION LEVEL {} READ WRITE", level.name());
            let mut row = Vec::new();
            for sql in [WATCH, WHO, &begin] {
                let outcome =
                    backend.run(sql).await.map_err(SandboxError::io("begin the outer transaction"))?;
                if outcome.failed && sql != WATCH {
                    return Err(SandboxError::refused(&outcome.error));
                }
                row.extend(outcome.row);
            }
            let [Some(user), Some(database)] = &row[..] else { return Err(SandboxError::Stopped) };
            let login = Login { user: user.clone(), database: database.clone() };
            Ok((backend, login))
        };
        let (backend, login) = timeout(limit, begin).await.unwrap_or_else(|_| {
            Err(SandboxError::io("connect to the server")(std::io::ErrorKind::TimedOut.into()))
        })?;
        Ok(Self {
            login,
            level,
            wait_limit,
            parameters: backend.parameters(),
            process_id: backend.process_id(),
            backend: Arc::new(AsyncMutex::new(backend)),
            sessions: Mutex::default(),
            orphans: Mutex::default(),
            broken: Mutex::default(),
            changed: Notify::new(),
        })
    }

    pub(super) fn in_transaction(&self) -> usize {
        lock(&self.sessions).values().filter(|entry| entry.in_transaction).count()
    }

    /// Waits a while for transactions that are being given up; returns how many are open still.
    async fn left_open(&self) -> usize {
        let none = async {
            loop {
                let mut changed = std::pin::pin!(self.changed.notified());
                changed.as_mut().enable();
                if self.in_transaction() == 0 {
                    return;
                }
                changed.await;
            }
        };
        let _ = timeout(FINISH_GRACE, none).await;
        self.in_transaction()
    }

    /// Rolls the outer transaction back, and says how it stood. The clients are gone.
    async fn end(&self, open: usize) -> Result<(), SandboxError> {
        let broken = |why: String| SandboxError::Broken(why);
        let mut backend = self.backend.lock().await;
        let end = async {
            backend.settle().await?;
            // Which rolls back.
            backend.part().await
        };
        let ended =
            timeout(END_LIMIT, end).await.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()));
        if let Some(why) = lock(&self.broken).clone() {
            return Err(broken(why));
        }
        match ended {
            Err(error) => Err(broken(backend.why_gone(&error))),
            Ok(()) if open > 0 => Err(SandboxError::InTransaction { sessions: open }),
            Ok(()) => Ok(()),
        }
    }
}

async fn work(
    target: tokio_postgres::Config,
    limit: Duration,
    mode: Mode,
    faults: Faults,
    ready: oneshot::Sender<Result<Started, SandboxError>>,
    mut to_do: mpsc::UnboundedReceiver<Verdict>,
) {
    let prepare = async {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await;
        let listener = listener.map_err(SandboxError::io("listen on 127.0.0.1"))?;
        let port = listener.local_addr().map_err(SandboxError::io("listen on 127.0.0.1"))?.port();
        let sandbox = match mode {
            Mode::Proxy => None,
            Mode::Sandbox { level, wait_limit } => {
                Some(Common::begin(&target, limit, level, wait_limit).await?)
            }
        };
        Ok((listener, port, Arc::new(Shared { faults, target, sandbox })))
    };
    let (listener, port, shared) = match prepare.await {
        Ok(prepared) => prepared,
        Err(error) => {
            let _ = ready.send(Err(error));
            return;
        }
    };
    let login = shared.sandbox.as_ref().map(|common| common.login.clone());
    // Should nobody wait for it any more, the orders are closed.
    let _ = ready.send(Ok(Started { port, login }));

    let mut clients = JoinSet::new();
    let verdict = loop {
        tokio::select! {
            accepted = listener.accept() => {
                match accepted {
                    Ok((stream, _)) => drop(clients.spawn(client::serve(stream, Arc::clone(&shared)))),
                    // Too many open files, say: it would go round and round.
                    Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                }
            }
            Some(_) = clients.join_next() => {}
            order = to_do.recv() => break order,
        }
    };
    drop(listener);
    let result = match &shared.sandbox {
        None => Ok(()),
        Some(common) => {
            let open = if verdict.is_some() { common.left_open().await } else { 0 };
            clients.shutdown().await;
            common.end(open).await
        }
    };
    if let Some(verdict) = verdict {
        // Whoever asked may have stopped waiting.
        let _ = verdict.send(result);
    }
}

impl SandboxError {
    /// From the server's ErrorResponse.
    fn refused(frame: &[u8]) -> Self {
        let field = |field| error_field(frame.get(5..).unwrap_or_default(), field).unwrap_or_default();
        Self::Refused { code: tokio_postgres::error::SqlState::from_code(&field(b'C')), message: field(b'M') }
    }
}
