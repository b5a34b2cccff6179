//! What a connection shares with its settling task: who may use it now, and how it is brought to rest.
//!
//! The driver sends a request at the first poll of its future and then forgets nobody: if the future is dropped, the
//! statement runs on and the next one waits behind it. So every request is made under a [`Turn`](super::Turn). A turn
//! that is dropped before its end makes the connection *unsettled*: a background task drains it, cancelling on the
//! server what nobody waits for, and rolls back if a transaction was given up. Until it is done nobody else gets a
//! turn, because a cancel request names the backend and would hit whatever runs there.

use std::pin::pin;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use deadpool_postgres::ClientWrapper;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::timeout;
use tokio_postgres::Client;

use crate::config::SessionConfig;
use crate::connect::{Route, TransactionStatus, Wire};
use crate::error::Error;
use crate::observe;
use crate::options::BeginKind;

/// A statement nobody waits for any more often has its answer on the way; cancelling costs a connection.
const GRACE: Duration = Duration::from_millis(2);
/// Several statements may have been abandoned, one behind the other: each is cancelled in its turn.
const CANCEL_AGAIN: Duration = Duration::from_millis(20);

pub(super) const PANICKED: &str = "a panic unwound through it";
pub(super) const STALLED: &str = "it could not be brought to rest in time";
const STOPPED: &str = "its runtime was shut down";
const CLOSED: &str = "the connection was closed";

/// One connection as everyone who deals with it sees it; the client itself belongs to the
/// [`Connection`](super::Connection).
#[derive(Debug)]
pub(crate) struct Link {
    pub(super) wire: Arc<Wire>,
    pub(super) config: Arc<SessionConfig>,
    pub(super) route: Route,
    /// The task that drives the connection.
    pub(super) driver: AbortHandle,
    /// Where the connection's I/O lives; settling must live there too.
    pub(super) runtime: Handle,
    /// Set when the session ran something that leaves state behind.
    pub(super) dirty: AtomicBool,
    flow: Mutex<Flow>,
    changed: Notify,
}

#[derive(Debug, Default)]
pub(super) struct Flow {
    /// Requests whose callers wait for them.
    pub(super) live: u32,
    /// The settling task is at work.
    pub(super) settling: bool,
    /// Requests were dropped since the settling task last drained.
    pub(super) abandoned: bool,
    /// A COMMIT is under way, or was when its future was dropped: it must not be cancelled.
    pub(super) committing: bool,
    /// A transaction was given up: roll back once drained.
    pub(super) give_up: bool,
    /// The number of the BEGIN that is being awaited on its own; 0 if none is.
    pub(super) confirming: u64,
    /// How many were.
    pub(super) confirmations: u64,
    /// What the server said to such a BEGIN, for the next who takes a turn.
    pub(super) refused: Option<tokio_postgres::Error>,
    /// A row stream or COPY is open; the driver answers nothing else until it is read.
    pub(super) streaming: bool,
    /// The raw client was handed out: what it has under way is unknown.
    pub(super) lent: bool,
    /// Statements that were being prepared when their future was dropped: the server keeps them.
    pub(super) leaked_statements: u32,
    /// Why the connection must not be used again.
    pub(super) broken: Option<&'static str>,
    /// SQL that goes to the server ahead of the next statement, in the same flight.
    pub(super) pending: String,
    /// The kind of BEGIN that `pending` starts with.
    pub(super) begin: Option<BeginKind>,
    /// The kinds of BEGIN this server has accepted on this connection, as a set of bits.
    pub(super) confirmed: u64,
    /// A savepoint was dropped in the middle: once drained, forget the errors since this mark.
    pub(super) cure: Option<usize>,
    /// Something was begun on the server that must be committed or rolled back.
    pub(super) begun: bool,
}

impl Flow {
    /// Whether requests may be made.
    pub(super) fn is_open(&self) -> bool {
        !self.settling && self.confirming == 0
    }
}

impl Link {
    pub(super) fn new(
        wire: Arc<Wire>,
        config: Arc<SessionConfig>,
        route: Route,
        driver: AbortHandle,
        runtime: Handle,
    ) -> Self {
        Self {
            wire,
            config,
            route,
            driver,
            runtime,
            dirty: AtomicBool::new(false),
            flow: Mutex::default(),
            changed: Notify::new(),
        }
    }

    pub(crate) fn config(&self) -> &SessionConfig {
        &self.config
    }

    pub(crate) fn config_handle(&self) -> Arc<SessionConfig> {
        Arc::clone(&self.config)
    }

    #[inline]
    pub(super) fn flow(&self) -> MutexGuard<'_, Flow> {
        // Invariant: nothing panics while it is held, so a poisoned one is still consistent.
        self.flow.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn changed(&self) {
        self.changed.notify_waiters();
    }

    /// Waits for `ready`, which becomes true by a change of the flow.
    pub(super) async fn until(&self, ready: impl Fn(&Flow) -> bool) {
        // Most often it is so: then there is no need to be told.
        if ready(&self.flow()) {
            return;
        }
        loop {
            let mut changed = pin!(self.changed.notified());
            changed.as_mut().enable();
            if ready(&self.flow()) {
                return;
            }
            changed.await;
        }
    }

    /// Waits until nothing is being settled or confirmed.
    pub(crate) async fn settled(&self) -> Result<(), Error> {
        self.until(Flow::is_open).await;
        let broken = self.flow().broken;
        broken.map_or(Ok(()), |reason| Err(self.lost(reason)))
    }

    pub(crate) fn lost(&self, reason: &'static str) -> Error {
        Error::lost(reason, self.wire.fatal())
    }

    /// Never lend or use this connection again.
    pub(crate) fn poison(&self, reason: &'static str) {
        self.flow().broken.get_or_insert(reason);
        self.changed();
    }

    /// Stops what runs on the server, and then the driver. The server would otherwise run on until it has something
    /// to say to a client that is not there.
    pub(super) async fn cancel_and_hang_up(&self) {
        if !self.flow().committing {
            let _ = timeout(self.config.cleanup_timeout, self.cancel()).await;
        }
        self.driver.abort();
    }

    /// Closes the connection under whoever uses it.
    pub(crate) fn cut(self: &Arc<Self>, reason: &'static str) {
        self.poison(reason);
        let link = Arc::clone(self);
        self.runtime.spawn(async move { link.cancel_and_hang_up().await });
    }

    async fn cancel(&self) -> std::io::Result<()> {
        self.route.cancel(&self.config.postgres, &self.wire).await
    }

    /// Starts the settling task, if it is not at work already. The flow is unlocked first: a runtime that was shut down
    /// drops the task right here.
    pub(super) fn start_settling(
        self: &Arc<Self>,
        mut flow: MutexGuard<'_, Flow>,
        client: &Arc<ClientWrapper>,
    ) {
        if flow.broken.is_some() || std::mem::replace(&mut flow.settling, true) {
            return;
        }
        drop(flow);
        let guard = Settling { link: Arc::clone(self), done: false };
        self.runtime.spawn(settle(guard, Arc::clone(client)));
    }

    /// Drains the connection; cancels what runs if it does not end by itself at once and nobody waits for it.
    pub(super) async fn quiesce(&self, client: &Client) -> Result<(), &'static str> {
        let mut fence = pin!(fence(client));
        if let Ok(result) = timeout(GRACE, &mut fence).await {
            return result;
        }
        // Someone may still wait for a request sent beside the abandoned one: no cancel may hit that.
        tokio::select! {
            result = &mut fence => return result,
            () = self.until(|flow| flow.live == 0) => {}
        }
        if self.flow().committing {
            return fence.await;
        }
        loop {
            if let Err(e) = self.cancel().await {
                observe::cancel_failed(&e);
            }
            if let Ok(result) = timeout(CANCEL_AGAIN, &mut fence).await {
                result?;
                break;
            }
        }
        // The signal was sent before the cancel socket closed; this round trip takes it if it came late.
        self::fence(client).await
    }

    /// Awaits a BEGIN on its own, the first time its kind is used on this connection: a standby refuses READ WRITE and
    /// SERIALIZABLE, a pooler may refuse BEGIN, and a statement sent along would then run outside of it.
    ///
    /// In a task, so that it goes on even if whoever took the turn is not polled for a while. It is sent right here.
    pub(super) fn start_confirming(
        self: &Arc<Self>,
        mut flow: MutexGuard<'_, Flow>,
        client: &Arc<ClientWrapper>,
        sql: String,
        kind: BeginKind,
    ) {
        flow.confirmations += 1;
        flow.confirming = flow.confirmations;
        let guard = Confirming { link: Arc::clone(self), number: flow.confirming };
        let client = Arc::clone(client);
        let mut begin = Box::pin(async move { (client.batch_execute(&sql).await, client, sql) });
        let early = begin.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        drop(flow);
        self.runtime.spawn(async move {
            let (result, client, sql) = match early {
                Poll::Ready(answer) => answer,
                Poll::Pending => begin.await,
            };
            if result.is_err() {
                guard.link.wire.recovered().await;
            }
            drop(client);
            guard.conclude(result, sql, kind);
        });
    }

    pub(super) async fn roll_back(&self, client: &Client) -> Result<(), &'static str> {
        if self.wire.status() == TransactionStatus::Idle {
            return Ok(());
        }
        client.batch_execute("ROLLBACK").await.map_err(|_| "ROLLBACK failed")
    }
}

/// The confirming task's hold on the link; breaks the connection if dropped before its end, as [`Settling`] does.
struct Confirming {
    link: Arc<Link>,
    number: u64,
}

impl Confirming {
    fn conclude(self, result: Result<(), tokio_postgres::Error>, sql: String, kind: BeginKind) {
        let mut flow = self.link.flow();
        if result.is_ok() {
            flow.confirmed |= kind.bit();
        }
        if flow.confirming == self.number {
            flow.confirming = 0;
            if let Err(e) = result {
                // The next statement has to fail as well, and never to run outside.
                flow.pending = sql;
                flow.begin = Some(kind);
                flow.begun = self.link.wire.status() != TransactionStatus::Idle;
                flow.refused = Some(e);
            }
        }
    }
}

impl Drop for Confirming {
    fn drop(&mut self) {
        let mut flow = self.link.flow();
        if flow.confirming == self.number {
            flow.confirming = 0;
            flow.broken.get_or_insert(STOPPED);
        }
        drop(flow);
        self.link.changed();
    }
}

/// Waits until everything sent before is answered, and makes sure that driver and server still agree on which answer
/// belongs to which request.
///
/// They may not after a COPY into the server that failed at its start: the driver then sends one Sync more than the
/// server swallows, and from there on every answer would go to the request before its own. An empty query is answered
/// by more than ReadyForQuery alone, so a stray one is told apart (manual, chapter 54.2.6).
pub(super) async fn fence(client: &Client) -> Result<(), &'static str> {
    match client.simple_query("").await {
        Ok(answer) if answer.is_empty() => Err("its answers were out of step"),
        Ok(_) => Ok(()),
        // A cancel request that came late; an answer of its own all the same.
        Err(e) if e.as_db_error().is_some() => Ok(()),
        Err(_) => Err(CLOSED),
    }
}

/// The settling task's hold on the link. Dropped before its end (its runtime is shut down), it breaks the connection
/// rather than leave everyone waiting.
struct Settling {
    link: Arc<Link>,
    done: bool,
}

impl Drop for Settling {
    fn drop(&mut self) {
        let mut flow = self.link.flow();
        if !self.done {
            flow.broken.get_or_insert(STOPPED);
        }
        flow.settling = false;
        drop(flow);
        self.link.changed();
    }
}

async fn settle(mut guard: Settling, client: Arc<ClientWrapper>) {
    let link = &guard.link;
    loop {
        let give_up = {
            let mut flow = link.flow();
            flow.abandoned = false;
            std::mem::take(&mut flow.give_up)
        };
        let mut rest = pin!(async {
            link.quiesce(&client).await?;
            if give_up { link.roll_back(&client).await } else { Ok(()) }
        });
        // While others wait for answers of their own, the clock does not run.
        let result = tokio::select! {
            result = &mut rest => Some(result),
            () = link.until(|flow| flow.live == 0) => timeout(link.config.cleanup_timeout, rest).await.ok(),
        };
        let mut flow = link.flow();
        match result {
            Some(Ok(())) => {}
            Some(Err(reason)) => flow.broken = flow.broken.or(Some(reason)),
            None => flow.broken = flow.broken.or(Some(STALLED)),
        }
        if flow.broken.is_some() {
            link.driver.abort();
            break;
        }
        if let Some(mark) = flow.cure.take() {
            link.wire.cure(mark);
        }
        if !(flow.abandoned || flow.give_up) {
            flow.committing = false;
            break;
        }
    }
    // Before anyone is told: whoever waits may want the client to itself.
    drop(client);
    guard.done = true;
}
