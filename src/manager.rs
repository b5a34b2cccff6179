//! The one long-lived value: owns the pool, lends sessions.

use std::fmt;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{
    AtomicBool, AtomicUsize,
    Ordering::{Relaxed, SeqCst},
};
use std::task::Poll;
use std::time::{Duration, Instant};

use deadpool::Runtime;
use deadpool::managed::{Object, Pool, PoolConfig, PoolError, QueueMode, Timeouts};
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};
use tracing::Instrument;

use crate::config::SessionConfig;
use crate::connection::{ConnectionManager, Counted, watch};
use crate::error::{AcquireError, AcquirePhase, ConnectError, Error};
use crate::maintenance::Maintenance;
use crate::observe;
use crate::options::TransactionOptions;
use crate::session::Session;
use crate::status::Status;
use crate::transaction::{Run, Step, Transaction, held};

/// Owns a pool of connections and lends them as [`Session`]s. Make one per database and clone it freely: clones share
/// the pool.
///
/// Nothing is opened before the first session is asked for.
///
/// ```no_run
/// use pg_session::{Error, SessionManager};
///
/// # async fn f() -> Result<(), Error> {
/// let sessions = SessionManager::from_env()?;
/// let session = sessions.acquire().await?;
/// let row = session.query_one("SELECT name FROM users WHERE id = $1", &[&1i64]).await?;
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct SessionManager {
    inner: Arc<Inner>,
}

/// One limit is set around all of it, since every limit is a timer.
const NO_LIMITS: Timeouts = Timeouts { wait: None, create: None, recycle: None };

struct Inner {
    pool: Pool<ConnectionManager>,
    config: Arc<SessionConfig>,
    waiting: AtomicUsize,
    maintenance: Maintenance,
    door: Door,
}

impl Inner {
    /// Nothing is lent any more, and nothing is left at work.
    fn shut(&self) {
        self.pool.close();
        self.pool.manager().close();
        self.maintenance.stop();
    }
}

/// Lets callers in until closing begins; those who are in by then are served.
#[derive(Debug, Default)]
struct Door {
    closed: AtomicBool,
    inside: AtomicUsize,
    left: Notify,
}

impl Door {
    /// Lets a caller in, until the guest is dropped.
    fn enter(&self) -> Option<Guest<'_>> {
        self.inside.fetch_add(1, SeqCst);
        let guest = Guest(self);
        // Counted first: who closes the door either sees the guest or is seen.
        (!self.closed.load(SeqCst)).then_some(guest)
    }

    /// Waits until nobody is inside.
    async fn empty(&self) {
        loop {
            let mut left = pin!(self.left.notified());
            left.as_mut().enable();
            if self.inside.load(SeqCst) == 0 {
                return;
            }
            left.await;
        }
    }
}

struct Guest<'a>(&'a Door);

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        if self.0.inside.fetch_sub(1, SeqCst) == 1 && self.0.closed.load(SeqCst) {
            self.0.left.notify_waiters();
        }
    }
}

/// Shuts the pool down when it is dropped: closing that is given up has closed it all the same.
struct Shut<'a>(&'a Inner);

impl Drop for Shut<'_> {
    fn drop(&mut self) {
        self.0.shut();
    }
}

/// Makes a [`SessionManager`] from a configuration; from [`SessionManager::builder`].
#[derive(Debug)]
#[must_use = "a builder does nothing until `build` is called"]
pub struct SessionManagerBuilder {
    config: SessionConfig,
    runtime: Option<Handle>,
}

impl SessionManagerBuilder {
    /// Where connections are made, driven and repaired. Default: the runtime in which [`build`](Self::build) is called,
    /// else the one in which a connection is first needed.
    ///
    /// Sessions may be used on any runtime, and a connection does not end with the one that happened to need it first:
    /// that is what makes one manager fit for actix-web, whose workers have a runtime each. Should the runtime be shut
    /// down, its connections end, and new ones are made where they are needed; also if it is blocked, or not driven at
    /// all, for over a second.
    pub fn runtime(mut self, runtime: Handle) -> Self {
        self.runtime = Some(runtime);
        self
    }

    /// Checks the configuration and makes the manager. Opens no connection.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] for settings that cannot work together.
    pub fn build(self) -> Result<SessionManager, Error> {
        self.config.validate()?;
        let config = Arc::new(self.config);
        let home = self.runtime.or_else(|| Handle::try_current().ok());
        // The connection used last is lent first, so that those not needed grow old and are closed.
        let pool = Pool::builder(ConnectionManager::new(Arc::clone(&config), home))
            .config(PoolConfig {
                max_size: config.max_size,
                timeouts: Timeouts::default(),
                queue_mode: QueueMode::Lifo,
            })
            .runtime(Runtime::Tokio1)
            .build()
            .map_err(|e| Error::config(e.to_string()))?;
        let (maintenance, door) = (Maintenance::default(), Door::default());
        let inner = Inner { pool, config, waiting: AtomicUsize::new(0), maintenance, door };
        Ok(SessionManager { inner: Arc::new(inner) })
    }
}

impl SessionManager {
    /// Makes a manager from a configuration. Opens no connection.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] for settings that cannot work together.
    pub fn new(config: SessionConfig) -> Result<Self, Error> {
        Self::builder(config).build()
    }

    /// Makes a manager from `DATABASE_URL` or the `PG*` variables: see [`SessionConfig::from_env`].
    ///
    /// # Errors
    ///
    /// [`Error::Config`] if a variable cannot be used.
    pub fn from_env() -> Result<Self, Error> {
        Self::new(SessionConfig::from_env()?)
    }

    /// Begins to make a manager.
    pub fn builder(config: SessionConfig) -> SessionManagerBuilder {
        SessionManagerBuilder { config, runtime: None }
    }

    /// The configuration it was made with.
    #[must_use]
    pub fn config(&self) -> &SessionConfig {
        &self.inner.config
    }

    /// Lends a session; dropping it gives it back.
    ///
    /// Takes one that is free, or opens a connection if there is room, or waits in turn until one comes back. One that
    /// was idle for over a second is asked for a sign of life first, and replaced if it gives none.
    ///
    /// # Errors
    ///
    /// [`Error::Acquire`] if that takes longer than [`acquire_timeout`](SessionConfig::acquire_timeout), if too many
    /// wait already, or if the manager is closed; [`Error::Connect`] if a connection is needed and cannot be made (a
    /// server that is starting or full is tried again until time is up).
    ///
    /// # Cancel safety
    ///
    /// Dropped, it takes nothing: the place in the queue is given up. A connection that is being made is made all the
    /// same, and is there for the next caller.
    #[doc(alias = "get")]
    #[doc(alias = "checkout")]
    pub async fn acquire(&self) -> Result<Session, Error> {
        let _guest = self.enter()?;
        self.acquire_within(self.inner.config.acquire_timeout).await
    }

    fn enter(&self) -> Result<Guest<'_>, Error> {
        self.inner.door.enter().ok_or_else(|| self.refused(AcquirePhase::Closed, Duration::ZERO))
    }

    /// For a caller who is inside.
    async fn acquire_within(&self, limit: Duration) -> Result<Session, Error> {
        let Inner { pool, config, waiting, .. } = &*self.inner;
        let span = observe::acquire();
        if held(pool.manager().register().id()) >= config.max_size {
            return Err(self.refused(AcquirePhase::SelfDeadlock, Duration::ZERO));
        }
        let placed = AtomicBool::new(false);
        let mut get = pin!(pool.timeout_get(&NO_LIMITS));
        let mut get = poll_fn(|cx| span.in_scope(|| watch(&placed, || get.as_mut().poll(cx))));
        // What is free is had at the first poll: then no clock is read, and no timer set.
        let first = poll_fn(|cx| Poll::Ready(pin!(&mut get).poll(cx))).await;
        let (got, waited) = match first {
            Poll::Ready(got) => (got, Duration::ZERO),
            Poll::Pending => {
                let started = Instant::now();
                let waiter = (!placed.load(Relaxed)).then(|| Counted::new(waiting));
                if waiter.is_none() {
                    // The connection may come without this caller.
                    self.inner.maintenance.ensure_running(pool, config);
                }
                if let (Some((_, before)), Some(limit)) = (&waiter, config.max_waiting) {
                    if *before >= limit {
                        return Err(self.refused(AcquirePhase::TooManyWaiters, Duration::ZERO));
                    }
                }
                match timeout(limit, &mut get).await {
                    Ok(got) => (got, started.elapsed()),
                    Err(_) if placed.load(Relaxed) => {
                        return Err(self.refused(AcquirePhase::Connecting, started.elapsed()));
                    }
                    Err(_) => return Err(self.refused(AcquirePhase::Waiting, started.elapsed())),
                }
            }
        };
        let object = got.map_err(|e| self.not_lent(e, waited))?;
        if Object::metrics(&object).recycle_count == 0 {
            self.inner.maintenance.ensure_running(pool, config);
        }
        Ok(Session::new(object))
    }

    fn not_lent(&self, error: PoolError<Arc<ConnectError>>, waited: Duration) -> Error {
        match error {
            // Cut short, it may have failed with nothing to say.
            PoolError::Backend(e) if !self.inner.pool.is_closed() => Error::Connect(e),
            PoolError::Closed | PoolError::Backend(_) => self.refused(AcquirePhase::Closed, waited),
            _ => self.refused(AcquirePhase::Waiting, waited),
        }
    }

    fn refused(&self, phase: AcquirePhase, waited: Duration) -> Error {
        let phase = if self.inner.pool.is_closed() { AcquirePhase::Closed } else { phase };
        let last_connect_error = self.inner.pool.manager().last_error();
        let error = Error::Acquire(Box::new(AcquireError {
            phase,
            waited,
            status: self.status(),
            last_connect_error,
        }));
        if phase != AcquirePhase::Closed {
            observe::acquire_failed(&error);
        }
        error
    }

    /// Runs a unit of work on a session of its own; see [`Session::transaction`].
    ///
    /// More than that one can do: a pause between attempts holds no session, and with
    /// [`RetryClass::ConnectionLost`](crate::RetryClass::ConnectionLost) a connection lost before COMMIT was sent is
    /// replaced, and one that cannot be made is tried again.
    ///
    /// # Errors
    ///
    /// As [`Session::transaction`] and [`acquire`](Self::acquire).
    ///
    /// # Cancel safety
    ///
    /// As [`Session::transaction`].
    pub async fn transaction<T, E, F>(&self, f: F) -> Result<T, E>
    where
        F: AsyncFnOnce(&mut Transaction<'_>) -> Result<T, E> + Clone,
        E: From<Error>,
    {
        self.run(&self.inner.config.transactions, f).await
    }

    /// As [`transaction`](Self::transaction), with options of its own.
    ///
    /// # Errors
    ///
    /// As [`transaction`](Self::transaction), and [`Error::Config`] for an option that cannot be used.
    ///
    /// # Cancel safety
    ///
    /// As [`transaction`](Self::transaction).
    pub async fn transaction_with<T, E, F>(&self, options: TransactionOptions, f: F) -> Result<T, E>
    where
        F: AsyncFnOnce(&mut Transaction<'_>) -> Result<T, E> + Clone,
        E: From<Error>,
    {
        self.run(&options, f).await
    }

    pub(crate) async fn run<T, E, F>(&self, options: &TransactionOptions, f: F) -> Result<T, E>
    where
        F: AsyncFnOnce(&mut Transaction<'_>) -> Result<T, E> + Clone,
        E: From<Error>,
    {
        let mut run = Run::new(options);
        let span = run.span();
        // To its end, pauses included: closing waits for it.
        let _guest = self.enter()?;
        let attempts = async {
            loop {
                let limit = self.inner.config.acquire_timeout;
                let limit = run.left().map_or(limit, |left| left.min(limit));
                let session = match self.acquire_within(limit).await {
                    Err(Error::Acquire(_)) if run.left() == Some(Duration::ZERO) => {
                        return Err(run.too_late().into());
                    }
                    Err(e @ Error::Connect(_)) => match run.after_connect_error() {
                        Some(delay) => {
                            sleep(delay).await;
                            continue;
                        }
                        None => return Err(e.into()),
                    },
                    acquired => acquired?,
                };
                match run.on(&session, true, f.clone()).await {
                    Step::Done(result) => {
                        // It is back before they run: they may want one.
                        drop(session);
                        run.run_hooks(false).await;
                        return result;
                    }
                    Step::Release(delay) => {
                        drop(session);
                        sleep(delay).await;
                    }
                }
            }
        };
        attempts.instrument(span).await
    }

    /// Acquires a session and begins a transaction on it that is ended by hand, with the [default
    /// options](crate::SessionConfig::transactions). The session goes back with the transaction.
    ///
    /// It borrows nothing, so it can be kept in a struct or passed on. It is never retried: where that matters, and
    /// wherever a closure will do, use [`transaction`](Self::transaction).
    ///
    /// # Errors
    ///
    /// As [`acquire`](Self::acquire).
    ///
    /// # Cancel safety
    ///
    /// As [`acquire`](Self::acquire); nothing is sent before the first statement.
    pub async fn begin(&self) -> Result<Transaction<'static>, Error> {
        self.begin_with(self.inner.config.transactions.clone()).await
    }

    /// As [`begin`](Self::begin), with options of its own. A retry policy and a deadline have no effect.
    ///
    /// # Errors
    ///
    /// As [`acquire`](Self::acquire), and [`Error::Config`] for an option that cannot be used.
    ///
    /// # Cancel safety
    ///
    /// As [`begin`](Self::begin).
    pub async fn begin_with(&self, options: TransactionOptions) -> Result<Transaction<'static>, Error> {
        Transaction::begin_owned(self.acquire().await?.kept(), &options)
    }

    /// Makes sure that the database can be reached: one round trip on a session.
    ///
    /// # Errors
    ///
    /// As [`acquire`](Self::acquire), and [`Error::ConnectionLost`].
    ///
    /// # Cancel safety
    ///
    /// Nothing is lost.
    pub async fn ping(&self) -> Result<(), Error> {
        let session = self.acquire().await?;
        session.ping().await
    }

    /// The pool's numbers.
    #[must_use]
    pub fn status(&self) -> Status {
        let pool = self.inner.pool.status();
        let manager = self.inner.pool.manager();
        let (connecting, ready) = (manager.connecting(), manager.ready());
        Status {
            max_size: pool.max_size,
            size: pool.size + ready,
            idle: pool.available + ready,
            in_use: pool.size.saturating_sub(pool.available),
            connecting,
            waiting: pool.waiting.saturating_sub(connecting),
        }
    }

    /// Closes the pool: newcomers are turned away. Callers who wait for a session already, and units of work under way,
    /// are still served; then idle connections are closed, and lent ones as they come back.
    ///
    /// Waits for all of that, and for the server to be done with the connections, up to
    /// [`shutdown_timeout`](SessionConfig::shutdown_timeout); then turns away who still waits, cancels what is running
    /// and closes connections under their borrowers. Returns how many had to be cut. May be called more than once.
    ///
    /// # Cancel safety
    ///
    /// Dropped, the pool is closed, callers who still wait are turned away, and lent sessions are left alone.
    pub async fn close(&self) -> usize {
        let inner = &*self.inner;
        inner.door.closed.store(true, SeqCst);
        let shut = Shut(inner);
        let register = inner.pool.manager().register();
        let drained = async move {
            inner.door.empty().await;
            drop(shut);
            register.empty().await;
        };
        match timeout(inner.config.shutdown_timeout, drained).await {
            Ok(()) => 0,
            Err(_) => register.cut("the session manager was closed"),
        }
    }

    /// Whether [`close`](Self::close) was called.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.inner.door.closed.load(Relaxed)
    }
}

impl fmt::Debug for SessionManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SessionManager")
            .field("config", &self.inner.config)
            .field("status", &self.status())
            .finish()
    }
}
