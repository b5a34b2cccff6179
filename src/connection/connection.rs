//! One server connection: what it consists of, its statements, how transactions use it, and how it comes to rest.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use deadpool_postgres::ClientWrapper;
use tokio::runtime::Handle;
use tokio::time::timeout;
use tokio_postgres::error::SqlState;

use super::core::{Block, Core, Use, Verdict};
use super::pooled::Registration;
use super::request::{Failure, Request};
use super::shell::{CLOSED, PANICKED, STALLED, STOPPED, Shell};
use super::{drain, reset};
use crate::config::Reset;
use crate::connect::{BlockFacts, Fault, Step, TransactionStatus, Wire};
use crate::error::Error;
use crate::statements::{Source, Statement, Statements, ToStatement, Traits};

/// One server connection on loan: what [`Session`](crate::Session) and [`Transaction`](crate::Transaction) dereference
/// to, and so the type that a function takes when it does not care which of them it gets.
///
/// ```no_run
/// use pg_session::{Connection, Error};
///
/// async fn name_of(db: &Connection, id: i64) -> Result<Option<String>, Error> {
///     let row = db.query_opt("SELECT name FROM users WHERE id = $1", &[&id]).await?;
///     Ok(row.map(|row| row.get(0)))
/// }
/// # async fn f(sessions: pg_session::SessionManager) -> Result<(), Error> {
/// let mut session = sessions.acquire().await?;
/// name_of(&session, 1).await?;
/// session.transaction(async |tx| name_of(tx, 2).await).await?;
/// # Ok(()) }
/// ```
///
/// The verbs are the driver's. Where they take SQL text, it is prepared the first time this connection sees it (one
/// round trip more) and kept in a bounded cache. They take `&self`: several may run at once, as under `try_join!`, and
/// are then pipelined. While one prepares its statement the others wait, and so they do until a transaction's BEGIN, which
/// travels with its first statement, is confirmed.
/// Row streams, COPY and `execute_many` need the connection for themselves.
///
/// # Cancel safety
///
/// The same for every verb. A future that was never polled has sent nothing. Dropped later, its statement is cancelled
/// on the server in the background, within [`cleanup_timeout`](crate::SessionConfig::cleanup_timeout), and the next
/// statement on this connection waits for that; whether it took effect is unknown outside a transaction. A transaction
/// that it was part of is never committed, whatever it did: it fails with
/// [`Error::StatementAbandoned`]; inside a savepoint, until that is rolled back. A cancel request
/// stops whatever the server's session runs, so none is sent while another statement of this connection is still waited
/// for.
pub struct Connection {
    pub(crate) client: Arc<ClientWrapper>,
    pub(crate) shell: Arc<Shell>,
    pub(super) watches_client: bool,
    pub(crate) expires: Option<Instant>,
    /// When it was last given back.
    pub(crate) idle_since: Instant,
    pub(super) registration: Registration,
}

impl Connection {
    #[inline]
    pub(crate) fn wire(&self) -> &Wire {
        &self.shell.wire
    }

    /// The process id of the server's backend, as in `pg_stat_activity`.
    #[must_use]
    pub fn process_id(&self) -> i32 {
        self.wire().process_id()
    }

    /// How many prepared statements the cache holds.
    #[must_use]
    pub fn cached_statements(&self) -> usize {
        self.shell.statements().len()
    }

    /// Whether no transaction of ours is open. One that SQL began may have been ended by the very statement that was lost.
    pub(super) fn is_outside(&self) -> bool {
        self.shell.core().block() == Block::None
    }

    /// Whether no transaction is open, neither one of ours nor one that SQL began.
    pub(super) fn is_outside_of_block(&self) -> bool {
        self.shell.core().block() == Block::None && self.wire().status() == TransactionStatus::Idle
    }

    /// Where its I/O lives.
    pub(crate) fn runtime(&self) -> Handle {
        self.shell.runtime.clone()
    }

    /// It goes back to the pool.
    pub(crate) fn rest(&mut self, now: Instant) {
        self.idle_since = now;
    }

    /// Which pool it belongs to.
    pub(crate) fn pool_id(&self) -> usize {
        self.registration.pool_id()
    }

    pub(crate) fn forget_statements(&self) {
        self.shell.statements().clear();
        self.client.clear_type_cache();
    }

    pub(super) fn explain(&self, error: tokio_postgres::Error) -> Error {
        self.shell.explain(error, self.is_outside())
    }

    /// One round trip, which does nothing.
    pub(crate) async fn ping(&self) -> Result<(), Error> {
        let mut request = self.request(Use::Shared).await?;
        let call = std::pin::pin!(self.client.check_connection());
        let result = request.send(call, |_| ()).await;
        request.end(result).await
    }

    /// The raw client, once nothing is under way. Whatever it is used for, the connection counts as dirty.
    pub(crate) async fn lend_client(&mut self) -> Result<&mut tokio_postgres::Client, Error> {
        self.claim().await?;
        self.request(Use::Group).await?.finish();
        self.shell.core().lend();
        self.wire().set_raw(true);
        self.shell.mark_dirty();
        match Arc::get_mut(&mut self.client) {
            Some(client) => Ok(client),
            // Only what drains or prepares has another handle, and it lets go before a request is granted.
            None => Err(self.shell.lost("its client is still in use")),
        }
    }
}

/// Statements.
impl Connection {
    /// The statement for `sql`, if it is at hand.
    #[inline]
    pub(super) fn at_hand<S>(&self, sql: &S) -> Result<Option<Statement>, Error>
    where
        S: ToStatement + ?Sized,
    {
        let statement = match sql.source() {
            Source::Prepared(statement) if statement.connection() != self.shell.number => {
                return Err(Error::config(
                    "the statement was prepared on another connection; pass SQL text, which is prepared where it runs",
                ));
            }
            Source::Prepared(statement) => statement.clone(),
            Source::Text(text) => match self.shell.statements().get(text) {
                Some(statement) => statement.clone(),
                None => return Ok(None),
            },
        };
        self.note_traits(statement.traits());
        Ok(Some(statement))
    }

    #[inline]
    pub(super) fn note_traits(&self, traits: Traits) {
        if traits.leaves_state {
            self.shell.mark_dirty();
        }
        if traits.chains {
            self.wire().note_chain();
        }
    }

    /// Prepares `sql` for a request, and keeps it in the cache if asked to. It is done on the connection's own runtime, and
    /// goes on if nobody waits: what was prepared in vain is in the cache for the next one.
    pub(super) async fn prepare_for(
        &self,
        request: &mut Request<'_>,
        sql: &str,
        keep: bool,
    ) -> Result<Statement, Failure> {
        self.prepare_all(request, &[sql], keep)
            .await?
            .pop()
            .map_or(Err(Failure::Lost(STOPPED)), |statement| statement.map_err(Failure::Driver))
    }

    /// The same for several texts in one flight.
    pub(super) async fn prepare_all(
        &self,
        request: &mut Request<'_>,
        texts: &[&str],
        keep: bool,
    ) -> Result<Vec<Result<Statement, tokio_postgres::Error>>, Failure> {
        request.begin_preparing().await?;
        let (shell, client) = (Arc::clone(&self.shell), Arc::clone(&self.client));
        let preparing = Preparing(Arc::clone(&shell));
        let texts: Vec<String> = texts.iter().map(|text| (*text).to_owned()).collect();
        let work = async move {
            let calls = texts.iter().map(|text| client.prepare(text));
            let results = super::group::together(calls).await;
            let mut statements = Vec::with_capacity(results.len());
            for (text, result) in texts.iter().zip(results) {
                statements.push(result.map(|inner| {
                    let statement = Statement::new(inner, shell.number, Traits::of(text));
                    if keep {
                        // Dropped when the cache is unlocked again.
                        let evicted = shell.statements().insert(text, statement.clone());
                        drop(evicted);
                    }
                    statement
                }));
            }
            if statements.iter().any(Result::is_err) {
                // An error is told before its ReadyForQuery, which says how the session stands.
                shell.wire.until_answered(shell.wire.sent()).await;
            }
            drop(client);
            drop(preparing);
            statements
        };
        let statements = self.shell.runtime.spawn(work).await.map_err(|_| Failure::Lost(STOPPED))?;
        for statement in statements.iter().flatten() {
            self.note_traits(statement.traits());
        }
        if statements.iter().any(|result| result.as_ref().is_err_and(is_forgotten)) {
            // The driver keeps statements of its own for looking up types, and cannot be told that they are gone.
            self.shell.retire();
        }
        Ok(statements)
    }

    /// Prepares a statement, or takes it from the cache. Seldom needed, since every verb does so; the statement is
    /// good on this connection only.
    ///
    /// # Errors
    ///
    /// As [`query`](Self::query).
    pub async fn prepare(&self, sql: &str) -> Result<Statement, Error> {
        if let Some(statement) = self.at_hand(sql)? {
            return Ok(statement);
        }
        let mut request = self.request(Use::Shared).await?;
        let statement = self.prepare_for(&mut request, sql, true).await;
        request.end(statement).await
    }

    /// Whether a statement failed because it was prepared before the schema changed or the cache was emptied behind our
    /// back. Those that `forget` removes will be prepared afresh then.
    pub(super) fn forget_if_stale(
        &self,
        error: &tokio_postgres::Error,
        forget: impl FnOnce(&mut Statements),
    ) -> bool {
        let stale = error.as_db_error().is_some_and(|e| {
            is_forgotten(error)
                || *e.code() == SqlState::FEATURE_NOT_SUPPORTED && e.routine() == Some("RevalidateCachedQuery")
                // "cache lookup failed for type 16385": it was dropped, and perhaps made anew.
                || *e.code() == SqlState::INTERNAL_ERROR && e.message().contains("type")
        });
        if stale {
            forget(&mut self.shell.statements());
            self.client.clear_type_cache();
        }
        stale
    }
}

/// Whether the server no longer has a prepared statement.
fn is_forgotten(error: &tokio_postgres::Error) -> bool {
    error.code() == Some(&SqlState::INVALID_SQL_STATEMENT_NAME)
}

/// Statements are being prepared, until this is dropped.
struct Preparing(Arc<Shell>);

impl Drop for Preparing {
    fn drop(&mut self) {
        self.0.core().prepared(self.0.wire.sent());
        self.0.changed();
    }
}

/// What transactions need.
impl Connection {
    /// Whoever calls has the connection for itself: nobody can be waiting for what is under way.
    pub(crate) async fn claim(&self) -> Result<(), Error> {
        self.claim_now();
        self.shell.settled().await
    }

    /// As [`claim`](Self::claim), and does not wait for what is drained.
    pub(crate) fn claim_now(&self) {
        let start = {
            let mut core = self.shell.core();
            if !matches!(core.block(), Block::None | Block::Ending) {
                self.shell.take_back(&mut core);
                self.wire().stop_recording();
            }
            core.claim()
        };
        self.drain_if(start);
    }

    /// Nobody can be waiting for what is still under way: its futures were leaked, and with them what they did.
    pub(crate) async fn disown(&self) -> Result<(), Error> {
        let start = {
            let mut core = self.shell.core();
            if core.is_live() {
                self.wire().note(Fault::Abandoned);
            }
            core.disown()
        };
        self.drain_if(start);
        self.shell.settled().await
    }

    /// Starts a transaction: nothing is sent yet. `again` ends the attempt before it in the same flight.
    pub(crate) fn begin(&self, steps: impl IntoIterator<Item = Step>, again: bool) -> Result<(), Error> {
        if !again && self.wire().status() != TransactionStatus::Idle {
            return Err(Error::InTransaction);
        }
        self.wire().take_back();
        if again && self.wire().status() != TransactionStatus::Idle {
            self.wire().lead(Step::RollBack);
        }
        for step in steps {
            self.wire().lead(step);
        }
        self.wire().record();
        self.shell.core().begin();
        Ok(())
    }

    /// Whether anything of the transaction may have reached the server.
    pub(crate) fn has_begun(&self) -> bool {
        let core = self.shell.core();
        // What waits is that of a request which the driver has not sent yet, if there is one.
        let sent = !self.wire().holds_begin() || core.has_unsent(self.wire().sent());
        sent && !matches!(core.block(), Block::None | Block::Planned)
    }

    /// Sends COMMIT or ROLLBACK, with what is still to go ahead of it, and waits for the answer. What became of it is on
    /// record; the driver's error too is returned, if it came to that.
    pub(crate) async fn end_block(&self, end: Step) -> Option<tokio_postgres::Error> {
        let mut request = self.request_now(Use::Group).ok()??;
        {
            let mut core = self.shell.core();
            core.ending();
            self.shell.lead_now(&mut core);
        }
        // Nobody has a request but this one.
        self.wire().end(end);
        let call = std::pin::pin!(self.client.batch_execute(""));
        let result = request.send(call, |_| ()).await;
        if result.is_err() {
            request.answer().await;
        }
        request.finish();
        match result {
            Err(Failure::Driver(e)) => Some(e),
            Ok(()) | Err(Failure::Lost(_) | Failure::NoTransaction) => None,
        }
    }

    /// What is still to travel with the next statement is not needed for what ends the transaction.
    pub(crate) fn drop_steps(&self) {
        self.shell.take_back(&mut self.shell.core());
    }

    /// The transaction has come to its end, whichever.
    pub(crate) fn end_transaction(&self) {
        let mut core = self.shell.core();
        self.shell.take_back(&mut core);
        self.wire().stop_recording();
        core.end();
    }

    /// The transaction was dropped in the middle: roll it back in the background. If its COMMIT is under way, that is seen
    /// to its end, and `aftermath` told of it.
    pub(crate) fn give_up_transaction(&self, aftermath: impl FnOnce(&BlockFacts) + Send + 'static) {
        // A COMMIT that is under way is seen to its end all the same.
        if std::thread::panicking() && !self.shell.core().is_ending() {
            if self.has_begun() {
                self.shell.cut(PANICKED);
            }
            self.shell.take_back(&mut self.shell.core());
            return;
        }
        let start = {
            let mut core = self.shell.core();
            let nothing_sent = self.shell.take_back(&mut core);
            let start = core.give_up(nothing_sent);
            if core.is_ending() && !core.is_settled() {
                self.shell.set_aftermath(Box::new(aftermath));
            } else {
                let facts = self.wire().facts();
                self.wire().stop_recording();
                drop(core);
                aftermath(&facts);
            }
            start
        };
        self.drain_if(start);
    }

    /// Forgets the faults since `mark`, which ROLLBACK TO SAVEPOINT undoes; those still to come too.
    pub(crate) fn forgive(&self, mark: usize) {
        let mut core = self.shell.core();
        core.forgive_later(mark);
        self.wire().forgive(mark);
    }
}

/// How it comes to rest.
impl Connection {
    /// Starts to drain, if the core has said so.
    pub(super) fn drain_if(&self, start: bool) {
        if start {
            drain::start(&self.shell, &self.client);
        }
    }

    /// What to do with the connection now that its session ends.
    pub(crate) fn verdict(&self) -> Verdict {
        if std::thread::panicking() && !self.shell.core().is_ending() {
            return Verdict::Close(PANICKED);
        }
        let wire = self.wire();
        if self.client.is_closed() || wire.is_over() {
            return Verdict::Close(CLOSED);
        }
        if wire.discards() > 0 || self.shell.is_retired() {
            // The driver keeps statements of its own for looking up types, and cannot be told that they are gone.
            return Verdict::Close("its prepared statements were discarded");
        }
        self.shell.core().verdict(self.is_at_rest(), self.wants_reset())
    }

    /// Whether the server owes nothing, and is in no transaction.
    fn is_at_rest(&self) -> bool {
        let wire = self.wire();
        wire.status() == TransactionStatus::Idle && wire.answered() >= wire.sent()
    }

    fn wants_reset(&self) -> bool {
        match self.shell.config.reset {
            Reset::WhenDirty => self.shell.dirty.load(Relaxed),
            Reset::Always => true,
            Reset::Never => false,
        }
    }

    /// Brings a returned connection back to the state it had when it was made, within the clean-up timeout.
    pub(crate) async fn repair(&self) -> Result<(), &'static str> {
        let shell = &self.shell;
        let start = {
            let mut core = shell.core();
            shell.take_back(&mut core);
            if !core.is_ending() {
                shell.wire.stop_recording();
            }
            core.reclaim(self.is_at_rest())
        };
        self.drain_if(start);
        shell.until(Core::is_settled).await;
        if let Some(reason) = shell.core().lost() {
            return Err(reason);
        }
        if self.wants_reset() {
            match timeout(shell.config.cleanup_timeout, reset::reset(&self.client, self.watches_client)).await
            {
                Ok(done) => done.map_err(|_| "it could not be reset")?,
                Err(_) => return Err(STALLED),
            }
        }
        if shell.wire.status() != TransactionStatus::Idle {
            return Err("it stayed in a transaction after ROLLBACK");
        }
        shell.dirty.store(false, Relaxed);
        shell.wire.forget_chains();
        Ok(())
    }

    /// Whether something may be running on the server that should be stopped before the connection is closed.
    pub(super) fn is_left_running(&self) -> bool {
        let core = self.shell.core();
        let busy = !core.is_free() || core.is_raw() || self.wire().answered() < self.wire().sent();
        busy && !core.is_ending()
    }

    /// Closes it for good; first stops what may be running on the server.
    pub(crate) fn close(self, reason: &'static str) {
        let cancel = self.is_left_running();
        self.shell.lose(reason);
        if cancel {
            let shell = Arc::clone(&self.shell);
            let client = self.client;
            shell.runtime.clone().spawn(async move {
                shell.cancel_and_hang_up(true).await;
                drop(client);
            });
        }
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("process_id", &self.process_id())
            .field("status", &self.wire().status())
            .field("cached_statements", &self.cached_statements())
            .finish_non_exhaustive()
    }
}
