//! What performs the rules of a connection: the core under a lock, and everything that it decides about.

use std::fmt;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::timeout;
use tokio_postgres::error::{DbError, Severity, SqlState};

use super::core::Core;
use crate::config::SessionConfig;
use crate::connect::{BlockFacts, Fault, Route, Step, Wire};
use crate::error::{DriverError, Error, ServerError};
use crate::lock::lock;
use crate::statements::Statements;

pub(super) const PANICKED: &str = "a panic unwound through it";
pub(super) const STALLED: &str = "it could not be brought to rest in time";
pub(super) const STOPPED: &str = "its runtime was shut down";
pub(super) const CLOSED: &str = "the connection was closed";
const ENDED: &str = "the server ended the session";

/// One connection as everyone who deals with it sees it; the client itself belongs to the
/// [`Connection`](super::Connection).
pub(crate) struct Shell {
    pub(crate) wire: Arc<Wire>,
    pub(super) config: Arc<SessionConfig>,
    pub(super) route: Route,
    /// The task that drives the connection.
    pub(super) driver: AbortHandle,
    /// Where the connection's I/O lives; draining must live there too.
    pub(super) runtime: Handle,
    /// No other connection of this process has this number.
    pub(super) number: u64,
    /// Set when the session ran something that leaves state behind.
    pub(super) dirty: AtomicBool,
    retired: AtomicBool,
    savepoints: AtomicU32,
    core: Mutex<Core>,
    statements: Mutex<Statements>,
    /// Who wants to know what became of a COMMIT whose caller has left.
    aftermath: Mutex<Option<Aftermath>>,
    /// Steps that belong behind requests which the driver has not sent yet.
    later: Mutex<Vec<Step>>,
    changed: Notify,
}

/// What is to be done once it is known what became of a COMMIT.
pub(crate) type Aftermath = Box<dyn FnOnce(&BlockFacts) + Send>;

impl fmt::Debug for Shell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shell").field("number", &self.number).finish_non_exhaustive()
    }
}

impl Shell {
    pub(super) fn new(
        wire: Arc<Wire>,
        config: Arc<SessionConfig>,
        route: Route,
        driver: AbortHandle,
        runtime: Handle,
    ) -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let statements = Mutex::new(Statements::new(config.statement_cache_capacity));
        Self {
            wire,
            config,
            route,
            driver,
            runtime,
            number: NUMBER.fetch_add(1, Relaxed),
            dirty: AtomicBool::new(false),
            retired: AtomicBool::new(false),
            savepoints: AtomicU32::new(0),
            core: Mutex::new(Core::new()),
            statements,
            aftermath: Mutex::default(),
            later: Mutex::default(),
            changed: Notify::new(),
        }
    }

    pub(crate) fn config(&self) -> &SessionConfig {
        &self.config
    }

    #[inline]
    pub(super) fn core(&self) -> MutexGuard<'_, Core> {
        // Invariant: no method of the core panics half-way. A parameter's `ToSql` may panic while it is held, which
        // changes nothing in it.
        lock(&self.core)
    }

    #[inline]
    pub(super) fn statements(&self) -> MutexGuard<'_, Statements> {
        // Invariant: the cache does not panic half-way.
        lock(&self.statements)
    }

    /// Tells everybody who waits for the core to look at it again.
    pub(super) fn changed(&self) {
        self.changed.notify_waiters();
    }

    /// Waits for `ready`, which becomes true by a change of the core.
    pub(super) async fn until(&self, ready: impl Fn(&Core) -> bool) {
        // Most often it is so: then there is no need to be told.
        if ready(&self.core()) {
            return;
        }
        loop {
            let mut changed = pin!(self.changed.notified());
            changed.as_mut().enable();
            if ready(&self.core()) {
                return;
            }
            changed.await;
        }
    }

    /// Waits until nothing is being drained.
    pub(crate) async fn settled(&self) -> Result<(), Error> {
        self.until(Core::is_settled).await;
        let lost = self.core().lost();
        lost.map_or(Ok(()), |reason| Err(self.lost(reason)))
    }

    #[inline]
    pub(super) fn mark_dirty(&self) {
        self.dirty.store(true, Relaxed);
    }

    pub(crate) fn lost(&self, reason: &'static str) -> Error {
        Error::lost(reason, self.wire.fatal())
    }

    /// Takes back what was to travel with the next request; whether BEGIN was among it. Not if the driver has a request that
    /// it has not sent yet: without its BEGIN that would run on its own.
    pub(super) fn take_back(&self, core: &mut Core) -> bool {
        self.later().clear();
        core.no_later();
        !core.has_unsent(self.wire.sent()) && self.wire.take_back()
    }

    fn later(&self) -> MutexGuard<'_, Vec<Step>> {
        lock(&self.later)
    }

    /// The number of a new savepoint. Never used twice: one that could not be set must not be taken for another.
    pub(crate) fn new_savepoint(&self) -> u32 {
        self.savepoints.fetch_add(1, Relaxed).wrapping_add(1)
    }

    /// Has a step travel with the next request that is made.
    pub(crate) fn lead(&self, step: Step) {
        let mut core = self.core();
        if core.lead_later(self.wire.sent()) {
            self.later().push(step);
        } else {
            self.wire.lead(step);
        }
    }

    /// Takes back the step that was given last, if it is this one and no request can have taken it.
    pub(crate) fn retract(&self, step: &Step) -> bool {
        let mut core = self.core();
        if core.has_later() {
            let mut later = self.later();
            let last = later.last() == Some(step);
            if last {
                later.pop();
            }
            if later.is_empty() {
                core.no_later();
            }
            return last;
        }
        !core.has_unsent(self.wire.sent()) && self.wire.retract(step)
    }

    /// Puts the steps that waited before the next request, if everything else is sent.
    pub(super) fn lead_now(&self, core: &mut Core) {
        if core.has_later() && !core.has_unsent(self.wire.sent()) {
            core.no_later();
            for step in self.later().drain(..) {
                self.wire.lead(step);
            }
        }
    }

    /// Never lend or use this connection again.
    pub(crate) fn lose(&self, reason: &'static str) {
        self.core().lose(reason);
        self.changed();
    }

    pub(super) async fn cancel(&self) -> std::io::Result<()> {
        self.route.cancel(&self.config.postgres, &self.wire).await
    }

    /// Stops what runs on the server, unless it is a COMMIT, and then the driver. The server would otherwise run on until
    /// it has something to say to a client that is not there.
    pub(super) async fn cancel_and_hang_up(&self, cancel: bool) {
        if cancel && !self.wire.is_closed() {
            let _ = timeout(self.config.cleanup_timeout, self.cancel()).await;
        }
        self.driver.abort();
    }

    /// Closes the connection under whoever uses it.
    pub(crate) fn cut(self: &Arc<Self>, reason: &'static str) {
        let cancel = {
            let mut core = self.core();
            let ending = core.is_ending();
            core.lose(reason);
            !ending
        };
        self.changed();
        let shell = Arc::clone(self);
        self.runtime.spawn(async move { shell.cancel_and_hang_up(cancel).await });
    }

    /// The connection has ended. `outside` if it took a statement along that was sent outside a transaction.
    pub(super) fn over(&self, outside: bool) -> Error {
        let fatal = self.wire.fatal();
        let reason = if fatal.is_some() { ENDED } else { CLOSED };
        self.lose(reason);
        if outside { Error::unanswered(reason, fatal) } else { Error::lost(reason, fatal) }
    }

    /// The driver's error in this crate's terms. `outside` if it is about a statement outside a transaction that was sent.
    pub(crate) fn explain(&self, error: tokio_postgres::Error, outside: bool) -> Error {
        if error.is_closed() {
            return self.over(outside);
        }
        let Some(server) = error.as_db_error() else { return Error::Database(DriverError(error)) };
        if is_fatal(server) {
            return self.over(outside);
        }
        // Only a symptom.
        if *server.code() == SqlState::IN_FAILED_SQL_TRANSACTION {
            if let Some(first) = self.wire.fault(0) {
                return self.broken_by(&first);
            }
        }
        Error::Database(DriverError(error))
    }

    /// The error of a transaction that must not be committed.
    pub(crate) fn broken_by(&self, fault: &Fault) -> Error {
        match fault {
            Fault::Server(first) if first.is_fatal() => self.lost(ENDED),
            Fault::Server(first) => Error::Aborted(Box::new((**first).clone())),
            Fault::Abandoned => Error::StatementAbandoned,
            Fault::Halfway => Error::Aborted(Box::new(ServerError {
                fatal: false,
                code: SqlState::DATA_EXCEPTION,
                message: "execute_many ended before all of its rows were sent".into(),
                constraint: None,
                routine: None,
            })),
        }
    }

    fn aftermath(&self) -> MutexGuard<'_, Option<Aftermath>> {
        lock(&self.aftermath)
    }

    /// Has this done once it is known what became of the COMMIT that is under way.
    pub(super) fn set_aftermath(&self, aftermath: Aftermath) {
        *self.aftermath() = Some(aftermath);
    }

    /// Nothing more will be known of the transaction that was given up: its record is over. What is returned tells.
    pub(super) fn conclude_aftermath(&self) -> impl FnOnce() + Send + use<> {
        let told = self.aftermath().take().map(|aftermath| {
            let facts = self.wire.facts();
            self.wire.stop_recording();
            move || aftermath(&facts)
        });
        move || {
            if let Some(tell) = told {
                tell();
            }
        }
    }

    /// Its session may go on, and nobody gets it after that.
    pub(super) fn retire(&self) {
        self.retired.store(true, Relaxed);
    }

    pub(super) fn is_retired(&self) -> bool {
        self.retired.load(Relaxed)
    }
}

/// Whether the server ends the session with it.
pub(super) fn is_fatal(error: &DbError) -> bool {
    matches!(error.parsed_severity(), Some(Severity::Fatal | Severity::Panic))
}
