//! The verbs: what a session, and a transaction, can run.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::{Arc, OnceLock};
use std::task::{Poll, ready};

use bytes::Bytes;
use futures_core::Stream;
use postgres_types::ToSql;
use tokio_postgres::Row;

use super::connection::Connection;
use super::copy_in::{self, CopyRowsIn, TableName};
use super::copy_out::CopyRowsOut;
use super::core::{Core, Use};
use super::request::{Failure, Request};
use super::stream::{CopyIn, CopyOut, RowStream};
use crate::connect::Kind;
use crate::error::Error;
use crate::statements::{Source, Statement, ToStatement, Traits};

/// The driver's rows of a statement under way.
type Rows = tokio_postgres::RowStream;

/// Gives every row to `take`, up to the end of the answer.
#[inline]
async fn drain(mut rows: Pin<&mut Rows>, mut take: impl FnMut(Row)) -> Result<(), tokio_postgres::Error> {
    poll_fn(|cx| {
        loop {
            match ready!(rows.as_mut().poll_next(cx)) {
                Some(Ok(row)) => take(row),
                Some(Err(e)) => return Poll::Ready(Err(e)),
                None => return Poll::Ready(Ok(())),
            }
        }
    })
    .await
}

/// COPY from or to the client has verbs of its own. By any other the server would wait for data, or do all of it and be told
/// off.
#[inline]
fn refuse_copy(traits: Traits) -> Result<(), Error> {
    if traits.copy_in || traits.copy_out { Err(copy_refused()) } else { Ok(()) }
}

#[cold]
fn copy_refused() -> Error {
    Error::config(
        "COPY from or to the client needs a verb of its own: copy_in, copy_out, copy_rows_in, copy_rows_out",
    )
}

/// Sends a statement, and gives its rows and the request. Should it turn out to be stale before it was run, and outside a
/// transaction, it is prepared afresh and sent once more.
///
/// A macro, and what is seldom needed is boxed, so that the common case is one small future deep.
macro_rules! start {
    ($self:ident, $what:expr, $sql:ident, $params:ident) => {{
        let mut request = match $self.request_now($what)? {
            Some(request) => request,
            None => Box::pin($self.request($what)).await?,
        };
        let statement = match $self.at_hand($sql) {
            Ok(Some(statement)) => Ok(statement),
            Ok(None) => Box::pin($self.prepare_source(&mut request, $sql)).await,
            Err(e) => {
                request.finish();
                return Err(e);
            }
        };
        let statement = match statement {
            Ok(statement) => statement,
            Err(failure) => return Err(Box::pin(request.failed(failure)).await),
        };
        if let Err(e) = refuse_copy(statement.traits()) {
            request.finish();
            return Err(e);
        }
        let mut call = pin!($self.client.query_raw(statement.inner(), $params.iter().copied()));
        let answer = match poll_fn(|cx| request.poll_sent(cx, call.as_mut(), |_| ())).await {
            Ok(answer) => answer.map_err(Failure::Driver),
            Err(why) => match Box::pin(request.turn(why)).await {
                Ok(()) => Box::pin(request.send(call, |_| ())).await,
                Err(failure) => Err(failure),
            },
        };
        match answer {
            Ok(rows) => (rows, request),
            Err(failure) => Box::pin($self.start_again(request, failure, $sql, $params)).await?,
        }
    }};
}

impl Connection {
    /// The driver tells of a failure before the statement was bound, so it has done nothing yet.
    #[cold]
    async fn start_again<'a, S>(
        &'a self,
        mut request: Request<'a>,
        failure: Failure,
        sql: &S,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<(Rows, Request<'a>), Error>
    where
        S: ToStatement + ?Sized,
    {
        request.answer().await;
        let stale = match (&failure, sql.source()) {
            (Failure::Driver(e), Source::Text(text)) => self.forget_if_stale(e, |cache| cache.remove(text)),
            _ => false,
        };
        if !stale || !self.is_outside_of_block() {
            return Err(request.failed(failure).await);
        }
        request.begin_again();
        let statement = match self.prepare_source(&mut request, sql).await {
            Ok(statement) => statement,
            Err(failure) => return Err(request.failed(failure).await),
        };
        let call = pin!(self.client.query_raw(statement.inner(), params.iter().copied()));
        match request.send(call, |_| ()).await {
            Ok(rows) => Ok((rows, request)),
            Err(failure) => Err(request.failed(failure).await),
        }
    }

    async fn prepare_source<S>(&self, request: &mut Request<'_>, sql: &S) -> Result<Statement, Failure>
    where
        S: ToStatement + ?Sized,
    {
        match sql.source() {
            Source::Prepared(statement) => Ok(statement.clone()),
            Source::Text(text) => self.prepare_for(request, text, true).await,
        }
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

    /// Runs a statement and collects its rows. One round trip from the cache.
    ///
    /// # Errors
    ///
    /// [`Error::Database`] if the server or the driver refuses it (wrong SQL, wrong number or types of parameters);
    /// [`Error::Config`] for COPY from or to the client, which has verbs of its own;
    /// [`Error::Aborted`] if an earlier statement of the transaction failed; [`Error::ConnectionLost`];
    /// [`Error::StreamOpen`]; [`Error::Busy`].
    pub async fn query<S>(&self, sql: &S, params: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>, Error>
    where
        S: ToStatement + ?Sized,
    {
        let (rows, request) = start!(self, Use::Shared, sql, params);
        let mut rows = pin!(rows);
        let mut all = Vec::new();
        match drain(rows.as_mut(), |row| all.push(row)).await {
            Ok(()) => request.finish(),
            Err(e) => return Err(Box::pin(request.failed(Failure::Driver(e))).await),
        }
        Ok(all)
    }

    /// Runs a statement that returns exactly one row.
    ///
    /// # Errors
    ///
    /// As [`query`](Self::query), and [`Error::NoRow`] or [`Error::TooManyRows`]. The statement runs to its end even so,
    /// and a transaction goes on.
    pub async fn query_one<S>(&self, sql: &S, params: &[&(dyn ToSql + Sync)]) -> Result<Row, Error>
    where
        S: ToStatement + ?Sized,
    {
        self.query_opt(sql, params).await?.ok_or(Error::NoRow)
    }

    /// Runs a statement that returns at most one row.
    ///
    /// # Errors
    ///
    /// As [`query`](Self::query), and [`Error::TooManyRows`]. The statement runs to its end even so, and a transaction
    /// goes on.
    pub async fn query_opt<S>(&self, sql: &S, params: &[&(dyn ToSql + Sync)]) -> Result<Option<Row>, Error>
    where
        S: ToStatement + ?Sized,
    {
        let (rows, request) = start!(self, Use::Shared, sql, params);
        let mut rows = pin!(rows);
        let (mut first, mut more) = (None, false);
        let take = |row| {
            more = first.is_some();
            first.get_or_insert(row);
        };
        match drain(rows.as_mut(), take).await {
            Ok(()) => request.finish(),
            Err(e) => return Err(Box::pin(request.failed(Failure::Driver(e))).await),
        }
        if more { Err(Error::TooManyRows) } else { Ok(first) }
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
        let (rows, request) = start!(self, Use::Shared, sql, params);
        let mut rows = pin!(rows);
        match drain(rows.as_mut(), drop).await {
            Ok(()) => request.finish(),
            Err(e) => return Err(Box::pin(request.failed(Failure::Driver(e))).await),
        }
        Ok(rows.rows_affected().unwrap_or(0))
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
        let traits = Traits::of(sql);
        refuse_copy(traits)?;
        let mut request = self.request(Use::Shared).await?;
        self.shell.mark_dirty();
        self.note_traits(traits);
        // What is still to go ahead of it goes into its text.
        let lead = OnceLock::new();
        let call = pin!(async {
            match lead.get() {
                Some(lead) => self.client.batch_execute(&format!("{lead}{sql}")).await,
                None => self.client.batch_execute(sql).await,
            }
        });
        let before = |core: &mut Core| {
            // Behind a request that the driver has not sent yet, it goes with that one.
            let text =
                if core.is_next(self.wire().sent()) { self.wire().lead_in_text() } else { String::new() };
            if !text.is_empty() {
                _ = lead.set(text);
            }
        };
        let result = request.send(call, before).await;
        request.end(result).await
    }

    /// Runs a statement and reads its rows as they come, with bounded memory. It needs the connection for itself: until
    /// the stream is read to its end or dropped, other statements on this connection fail with [`Error::StreamOpen`].
    ///
    /// Dropped before its end was read, the rest is cancelled on the server, and a transaction it belongs to can no longer
    /// be committed: for the first few rows of many, use LIMIT.
    ///
    /// # Errors
    ///
    /// As [`query`](Self::query), and [`Error::Busy`] beside another statement; an error in the middle comes out of the
    /// stream.
    pub async fn query_stream<S>(
        &self,
        sql: &S,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<RowStream<'_>, Error>
    where
        S: ToStatement + ?Sized,
    {
        let (rows, request) = start!(self, Use::Stream, sql, params);
        Ok(RowStream::new(self, rows, request))
    }

    /// A request and the statement for a COPY.
    async fn start_copy<S>(
        &self,
        sql: &S,
        fits: impl FnOnce(Traits) -> bool,
        wanted: &'static str,
    ) -> Result<(Statement, Request<'_>), Error>
    where
        S: ToStatement + ?Sized,
    {
        let traits = match sql.source() {
            Source::Text(text) => Traits::of(text),
            Source::Prepared(statement) => statement.traits(),
        };
        if !fits(traits) {
            return Err(Error::config(wanted));
        }
        let at_hand = self.at_hand(sql)?;
        let mut request = self.request(Use::Stream).await?;
        let statement = match at_hand {
            Some(statement) => statement,
            None => match self.prepare_source(&mut request, sql).await {
                Ok(statement) => statement,
                Err(failure) => return Err(request.failed(failure).await),
            },
        };
        Ok((statement, request))
    }

    /// Starts `COPY … FROM STDIN`. Data goes in through the returned sink; nothing is stored unless it is
    /// [finished](CopyIn::finish).
    ///
    /// # Errors
    ///
    /// As [`query_stream`](Self::query_stream), and [`Error::Config`] for what is no such COPY.
    pub async fn copy_in<S>(&self, sql: &S) -> Result<CopyIn<'_>, Error>
    where
        S: ToStatement + ?Sized,
    {
        let (statement, mut request) = self
            .start_copy(sql, |traits| traits.copy_in, "copy_in needs a COPY … FROM STDIN statement")
            .await?;
        let call = pin!(self.client.copy_in::<_, Bytes>(statement.inner()));
        match request.send(call, |_| self.wire().expect(Kind::CopyIn)).await {
            Ok(sink) => Ok(CopyIn::new(self, sink, request)),
            Err(failure) => Err(self.copy_failed(request, failure, sql).await),
        }
    }

    /// Starts `COPY … TO STDOUT` and streams what it yields.
    ///
    /// # Errors
    ///
    /// As [`query_stream`](Self::query_stream), and [`Error::Config`] for what is no such COPY; an error in the middle
    /// comes out of the stream.
    pub async fn copy_out<S>(&self, sql: &S) -> Result<CopyOut<'_>, Error>
    where
        S: ToStatement + ?Sized,
    {
        let (statement, mut request) = self
            .start_copy(sql, |traits| traits.copy_out, "copy_out needs a COPY … TO STDOUT statement")
            .await?;
        let call = pin!(self.client.copy_out(statement.inner()));
        match request.send(call, |_| self.wire().expect(Kind::CopyOut)).await {
            Ok(data) => Ok(CopyOut::new(self, data, request)),
            Err(failure) => Err(self.copy_failed(request, failure, sql).await),
        }
    }

    /// A COPY is never stale but for a statement that was dropped behind our back: then the next one works.
    async fn copy_failed<S>(&self, request: Request<'_>, failure: Failure, sql: &S) -> Error
    where
        S: ToStatement + ?Sized,
    {
        if let (Failure::Driver(e), Source::Text(text)) = (&failure, sql.source()) {
            self.forget_if_stale(e, |cache| cache.remove(text));
        }
        request.failed(failure).await
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
}
