//! One server connection: its client, its statement cache, and the verbs.

mod copy_in;
mod copy_out;
mod link;
mod pooled;
mod reset;
mod stream;
mod turn;

use std::fmt;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use deadpool_postgres::ClientWrapper;
use postgres_types::ToSql;
use tokio::runtime::Handle;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Row, Statement};

pub use copy_in::{CopyProgress, CopyRow, CopyRowsIn, FieldWriter, TableName};
pub use copy_out::{ColumnIndex, CopiedRow, CopyRowsOut};
pub(crate) use link::Link;
pub(crate) use pooled::{ConnectionManager, Counted, Registration, watch};
pub use stream::{CopyIn, CopyOut, RowStream};
pub(crate) use turn::{Turn, Verdict};

use crate::connect::{TransactionStatus, Wire};
use crate::error::Error;
use crate::statements::{Source, Statements, ToStatement, is_copy};

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
/// are then pipelined in the order in which they were first polled.
///
/// # Cancel safety
///
/// The same for every verb. A future that was never polled has sent nothing. Dropped later, its statement is cancelled
/// on the server in the background, within [`cleanup_timeout`](crate::SessionConfig::cleanup_timeout), and the next
/// statement on this connection waits for that; whether it took effect is unknown outside a transaction. Inside one the
/// transaction is aborted, as by any failed statement. A cancel request stops whatever the server's session runs, so
/// none is sent while another statement of this connection is still waited for.
pub struct Connection {
    pub(crate) client: Arc<ClientWrapper>,
    pub(crate) link: Arc<Link>,
    statements: Mutex<Statements>,
    watches_client: bool,
    pub(crate) expires: Option<Instant>,
    /// When it was last given back.
    pub(crate) idle_since: Instant,
    registration: Registration,
}

impl Connection {
    pub(crate) fn wire(&self) -> &Wire {
        &self.link.wire
    }

    #[inline]
    fn statements(&self) -> MutexGuard<'_, Statements> {
        // Invariant: the cache does not panic half-way.
        self.statements.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The process id of the server's backend, as in `pg_stat_activity`.
    #[must_use]
    pub fn process_id(&self) -> i32 {
        self.wire().process_id()
    }

    /// How many prepared statements the cache holds.
    #[must_use]
    pub fn cached_statements(&self) -> usize {
        self.statements().len()
    }

    /// Whether no transaction is open, neither one of ours nor one that SQL began.
    fn is_outside(&self) -> bool {
        !self.has_begun() && self.wire().status() == TransactionStatus::Idle
    }

    /// Where its I/O lives.
    pub(crate) fn runtime(&self) -> Handle {
        self.link.runtime.clone()
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
        self.statements().clear();
    }

    pub(crate) fn mark_dirty(&self) {
        self.link.dirty.store(true, Relaxed);
    }

    /// The raw client, once nothing is under way. Whatever it is used for, the connection counts as dirty.
    pub(crate) async fn lend_client(&mut self) -> Result<&mut tokio_postgres::Client, Error> {
        // A turn settles, and sends what is pending.
        self.turn().await?.finish();
        self.link.flow().lent = true;
        self.mark_dirty();
        match Arc::get_mut(&mut self.client) {
            Some(client) => Ok(client),
            // Only a settling task has another handle, and it lets go before the turn above is granted.
            None => Err(self.link.lost("its client is still in use")),
        }
    }

    /// The statement for `sql`, if it is at hand.
    #[inline]
    fn at_hand<S>(&self, sql: &S) -> Option<Statement>
    where
        S: ToStatement + ?Sized,
    {
        let cached = match sql.source() {
            Source::Prepared(statement) => return Some(statement.clone()),
            Source::Text(text) => self.statements().get(text)?,
        };
        if cached.leaves_state {
            self.mark_dirty();
        }
        Some(cached.statement)
    }

    /// The statement for `sql`, prepared now.
    async fn prepare_now<S>(&self, turn: &mut Turn<'_>, sql: &S) -> Result<Statement, tokio_postgres::Error>
    where
        S: ToStatement + ?Sized,
    {
        let text = match sql.source() {
            Source::Prepared(statement) => return Ok(statement.clone()),
            Source::Text(text) => text,
        };
        turn.set_preparing(true);
        let statement = self.client.prepare(text).await?;
        turn.set_preparing(false);
        let cached = self.statements().insert(text, statement);
        if cached.leaves_state {
            self.mark_dirty();
        }
        Ok(cached.statement)
    }

    /// Whether a statement failed because it was prepared before the schema changed or the cache was emptied behind
    /// our back. Then it has had no effect, and is forgotten so that it will be prepared afresh.
    fn is_stale<S>(&self, error: &tokio_postgres::Error, sql: &S) -> bool
    where
        S: ToStatement + ?Sized,
    {
        let Source::Text(text) = sql.source() else { return false };
        let stale = error.as_db_error().is_some_and(|e| {
            *e.code() == SqlState::INVALID_SQL_STATEMENT_NAME
                || *e.code() == SqlState::FEATURE_NOT_SUPPORTED
                    && e.routine() == Some("RevalidateCachedQuery")
        });
        if stale {
            self.statements().remove(text);
        }
        stale
    }
}

/// Runs `$call` with the prepared statement, under a turn; once more with a fresh one if it was stale and no
/// transaction was aborted by that.
///
/// A macro, since `$call` borrows the statement for its future; and what seldom waits is asked before it is awaited,
/// so that the common case is one future deep.
macro_rules! with_statement {
    ($self:ident, $sql:ident, |$statement:ident, $turn:ident| $call:expr) => {{
        let mut $turn = match $self.turn_now()? {
            Some(turn) => turn,
            None => Box::pin($self.turn()).await?,
        };
        let mut healed = false;
        loop {
            let prepared = match $self.at_hand($sql) {
                Some(statement) => Ok(statement),
                None => Box::pin($self.prepare_now(&mut $turn, $sql)).await,
            };
            let result = match prepared {
                Ok(ref $statement) => $call.await,
                Err(e) => Err(e),
            };
            match result {
                Ok(value) => break Ok((value, $turn)),
                Err(e) => {
                    $self.wire().recovered().await;
                    if $self.is_stale(&e, $sql) && !healed && $self.is_outside() {
                        healed = true;
                        continue;
                    }
                    $turn.finish();
                    break Err($self.explain(e));
                }
            }
        }
    }};
}

impl Connection {
    /// Runs a statement and collects its rows. One round trip from the cache.
    ///
    /// # Errors
    ///
    /// [`Error::Database`] if the server or the driver refuses it (wrong SQL, wrong number or types of parameters);
    /// [`Error::Aborted`] if an earlier statement of the transaction failed; [`Error::ConnectionLost`];
    /// [`Error::StreamOpen`].
    pub async fn query<S>(&self, sql: &S, params: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>, Error>
    where
        S: ToStatement + ?Sized,
    {
        let (rows, turn) =
            with_statement!(self, sql, |statement, turn| self.client.query(statement, params))?;
        turn.finish();
        Ok(rows)
    }

    /// Runs a statement that returns exactly one row.
    ///
    /// # Errors
    ///
    /// As [`query`](Self::query), and [`Error::Database`] if there is no row or more than one.
    pub async fn query_one<S>(&self, sql: &S, params: &[&(dyn ToSql + Sync)]) -> Result<Row, Error>
    where
        S: ToStatement + ?Sized,
    {
        let (row, turn) =
            with_statement!(self, sql, |statement, turn| self.client.query_one(statement, params))?;
        turn.finish();
        Ok(row)
    }

    /// Runs a statement that returns at most one row.
    ///
    /// # Errors
    ///
    /// As [`query`](Self::query), and [`Error::Database`] if there is more than one row.
    pub async fn query_opt<S>(&self, sql: &S, params: &[&(dyn ToSql + Sync)]) -> Result<Option<Row>, Error>
    where
        S: ToStatement + ?Sized,
    {
        let (row, turn) =
            with_statement!(self, sql, |statement, turn| self.client.query_opt(statement, params))?;
        turn.finish();
        Ok(row)
    }

    /// Runs a statement and returns how many rows it touched.
    ///
    /// # Errors
    ///
    /// As [`query`](Self::query).
    pub async fn execute<S>(&self, sql: &S, params: &[&(dyn ToSql + Sync)]) -> Result<u64, Error>
    where
        S: ToStatement + ?Sized,
    {
        let (rows, turn) =
            with_statement!(self, sql, |statement, turn| self.client.execute(statement, params))?;
        turn.finish();
        Ok(rows)
    }

    /// Runs any SQL text, several statements included, without parameters, in one round trip.
    ///
    /// Outside a transaction the text is one implicit transaction, unless it says otherwise. The connection counts as
    /// dirty afterwards: it is reset before the next session gets it. Never build the text from what users entered.
    ///
    /// # Errors
    ///
    /// As [`query`](Self::query).
    pub async fn batch_execute(&self, sql: &str) -> Result<(), Error> {
        let turn = self.turn().await?;
        self.mark_dirty();
        let result = self.client.batch_execute(sql).await;
        if result.is_err() {
            self.wire().recovered().await; // the text may have begun a transaction before it failed
        }
        turn.finish();
        result.map_err(|e| self.explain(e))
    }

    /// Prepares a statement, or takes it from the cache. Seldom needed, since every verb does so; the statement is
    /// good on this connection only.
    ///
    /// # Errors
    ///
    /// As [`query`](Self::query).
    pub async fn prepare(&self, sql: &str) -> Result<Statement, Error> {
        let mut turn = self.turn().await?;
        let result = match self.at_hand(sql) {
            Some(statement) => Ok(statement),
            None => self.prepare_now(&mut turn, sql).await,
        };
        if result.is_err() {
            self.wire().recovered().await;
        }
        turn.finish();
        result.map_err(|e| self.explain(e))
    }

    /// Runs a statement and reads its rows as they come, with bounded memory. Until the stream is read to its end or
    /// dropped, other statements on this connection fail with [`Error::StreamOpen`]; dropped early, the rest is
    /// cancelled on the server.
    ///
    /// # Errors
    ///
    /// As [`query`](Self::query); an error in the middle comes out of the stream.
    pub async fn query_stream<S>(
        &self,
        sql: &S,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<RowStream<'_>, Error>
    where
        S: ToStatement + ?Sized,
    {
        let (rows, turn) = with_statement!(self, sql, |statement, turn| {
            turn.set_streaming();
            self.client.query_raw(statement, params.iter().copied())
        })?;
        Ok(RowStream::new(self, rows, turn))
    }

    /// Starts `COPY … FROM STDIN`. Data goes in through the returned sink; nothing is stored unless it is
    /// [finished](CopyIn::finish).
    ///
    /// # Errors
    ///
    /// As [`query`](Self::query), and [`Error::Config`] for text that is no COPY.
    pub async fn copy_in<S>(&self, sql: &S) -> Result<CopyIn<'_>, Error>
    where
        S: ToStatement + ?Sized,
    {
        if matches!(sql.source(), Source::Text(text) if !is_copy(text)) {
            return Err(Error::config("copy_in needs a COPY … FROM STDIN statement"));
        }
        let (sink, turn) = with_statement!(self, sql, |statement, turn| {
            turn.set_streaming();
            async {
                let result = self.client.copy_in::<_, Bytes>(statement).await;
                if result.is_err() {
                    self.check_step().await;
                }
                result
            }
        })?;
        Ok(CopyIn::new(self, sink, turn))
    }

    /// Stores rows in a table with COPY: the fastest way in for more than a few. All of them are stored, or none.
    ///
    /// The types of the columns are taken from the table, each time (one round trip). No `columns` at all mean all that
    /// can be written, in the order of the table, identity columns included and generated ones not (one more).
    ///
    /// ```no_run
    /// # async fn f(db: &pg_session::Connection) -> Result<(), pg_session::Error> {
    /// let rows = [("tea", Some(350i64)), ("air", None)];
    /// let stored = db
    ///     .copy_rows_in("shop.items", &["name", "price_cents"])
    ///     .progress(|sent| println!("{} rows, {} bytes", sent.rows, sent.bytes))
    ///     .send(rows)
    ///     .await?;
    /// assert_eq!(stored, 2);
    /// # Ok(()) }
    /// ```
    pub fn copy_rows_in(&self, table: impl Into<TableName>, columns: &[&str]) -> CopyRowsIn<'_> {
        CopyRowsIn::new(self, table.into(), columns)
    }

    /// Reads rows of a table with COPY, as they come and with bounded memory. No `columns` at all mean all of them. In
    /// the table's own order, which is none; [`copy_query_out`](Self::copy_query_out) takes an ORDER BY.
    ///
    /// Until the stream is read to its end or dropped, other statements on this connection fail with
    /// [`Error::StreamOpen`]; dropped early, the rest is cancelled on the server.
    ///
    /// ```no_run
    /// # async fn f(db: &pg_session::Connection) -> Result<(), pg_session::Error> {
    /// let mut items = db.copy_rows_out("shop.items", &["name", "price_cents"]).await?;
    /// while let Some(item) = items.next().await {
    ///     let item = item?;
    ///     let (name, cents): (&str, Option<i64>) = (item.get("name"), item.get(1));
    ///     println!("{name}: {cents:?}");
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`query`](Self::query); an error in the middle comes out of the stream.
    pub async fn copy_rows_out(
        &self,
        table: impl Into<TableName>,
        columns: &[&str],
    ) -> Result<CopyRowsOut<'_>, Error> {
        let list = if columns.is_empty() { "*".to_owned() } else { copy_in::list(columns) };
        let query = format!("SELECT {list} FROM {}", table.into());
        CopyRowsOut::start(self, &query).await
    }

    /// As [`copy_rows_out`](Self::copy_rows_out), the rows of a query. It becomes a part of a COPY statement, which
    /// takes no parameters, and no semicolon inside. Never build the text from what users entered.
    ///
    /// # Errors
    ///
    /// As [`query`](Self::query); an error in the middle comes out of the stream.
    pub async fn copy_query_out(&self, query: &str) -> Result<CopyRowsOut<'_>, Error> {
        CopyRowsOut::start(self, query).await
    }

    /// Starts `COPY … TO STDOUT` and streams what it yields.
    ///
    /// # Errors
    ///
    /// As [`query`](Self::query); an error in the middle comes out of the stream.
    pub async fn copy_out<S>(&self, sql: &S) -> Result<CopyOut<'_>, Error>
    where
        S: ToStatement + ?Sized,
    {
        let (stream, turn) = with_statement!(self, sql, |statement, turn| {
            turn.set_streaming();
            self.client.copy_out(statement)
        })?;
        Ok(CopyOut::new(self, stream, turn))
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
