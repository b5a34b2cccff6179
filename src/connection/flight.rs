//! Several statements in one flight: all sent before the first is answered.

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::task::Poll;

use bytes::{Buf, BytesMut};
use futures_core::Stream;
use postgres_types::{IsNull, ToSql, Type, to_sql_checked};
use tokio_postgres::{Row, Statement};

use super::{Connection, Turn};
use crate::connect::Ahead;
use crate::error::{BatchCause, BatchPart, Error};
use crate::record::{self, Misfit, Record};
use crate::statements::is_copy;

/// What one statement of a [`Batch`](crate::Batch) did.
#[derive(Debug)]
pub struct BatchResult {
    rows: Vec<Row>,
    affected: u64,
}

impl BatchResult {
    /// The rows it returned.
    #[must_use]
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// The same, to keep.
    #[must_use]
    pub fn into_rows(self) -> Vec<Row> {
        self.rows
    }

    /// How many rows it touched, or returned if it is a query.
    #[must_use]
    pub fn rows_affected(&self) -> u64 {
        self.affected
    }
}

/// Room for the parameters of most statements.
const USUAL: usize = 64;

/// A statement with its parameters, as they go over the wire.
pub(crate) struct Request {
    statement: Statement,
    parameters: BytesMut,
}

impl Request {
    pub(super) fn new(statement: Statement, parameters: BytesMut) -> Self {
        Self { statement, parameters }
    }
}

/// A parameter that is encoded already.
struct Encoded<'a>(Option<&'a [u8]>);

impl fmt::Debug for Encoded<'_> {
    /// Not its value: the driver writes parameters to the log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Encoded")
    }
}

impl ToSql for Encoded<'_> {
    fn to_sql(
        &self,
        _: &Type,
        out: &mut BytesMut,
    ) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        let Some(bytes) = self.0 else { return Ok(IsNull::Yes) };
        out.extend_from_slice(bytes);
        Ok(IsNull::No)
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    to_sql_checked!();
}

/// Takes apart what [`record::encode`] has put together.
struct Fields<'a> {
    left: usize,
    record: &'a [u8],
}

impl<'a> Fields<'a> {
    fn of(mut record: &'a [u8]) -> Self {
        let left = record.get_u16().into();
        Self { left, record }
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Encoded<'a>;

    fn next(&mut self) -> Option<Encoded<'a>> {
        self.left = self.left.checked_sub(1)?;
        let Ok(length) = usize::try_from(self.record.get_i32()) else { return Some(Encoded(None)) };
        let (field, rest) = self.record.split_at(length);
        self.record = rest;
        Some(Encoded(Some(field)))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Fields<'_> {}

/// Polls each once, in order, so that the driver sends them in one piece; then waits for all of them.
async fn together<F: Future>(futures: impl Iterator<Item = F>) -> Vec<F::Output> {
    let mut waiting: Vec<_> = futures.map(|future| (Box::pin(future), None)).collect();
    poll_fn(|cx| {
        for (future, output) in &mut waiting {
            if let Poll::Ready(early) = future.as_mut().poll(cx) {
                *output = Some(early);
            }
        }
        Poll::Ready(())
    })
    .await;
    let mut outputs = Vec::with_capacity(waiting.len());
    for (future, output) in waiting {
        outputs.push(match output {
            Some(early) => early,
            None => future.await,
        });
    }
    outputs
}

impl Connection {
    /// Prepares what is not at hand, all of it in one flight, and encodes the parameters.
    pub(crate) async fn requests<'s>(
        &self,
        statements: impl Iterator<Item = (&'s str, &'s (dyn Record + Send + Sync))> + Clone,
    ) -> Result<Vec<Request>, Error> {
        let mut requests = Vec::with_capacity(statements.size_hint().0);
        let mut prepared = false;
        for (index, (sql, record)) in statements.clone().enumerate() {
            if is_copy(sql) {
                return Err(Error::config("a batch cannot run COPY: see copy_rows_in and copy_rows_out"));
            }
            let mut statement = self.at_hand(sql);
            if statement.is_none() && !std::mem::replace(&mut prepared, true) {
                Box::pin(self.prepare_missing(statements.clone())).await?;
                statement = self.at_hand(sql);
            }
            let statement = match statement {
                Some(statement) => statement,
                // The cache is smaller than the batch.
                None => {
                    Box::pin(self.prepare(sql)).await.map_err(|e| e.in_batch(BatchPart::statement(index)))?
                }
            };
            let mut parameters = BytesMut::with_capacity(USUAL);
            record::encode(statement.params(), &mut parameters, record)
                .map_err(|misfit| misplaced(BatchPart::statement(index), statement.params(), misfit))?;
            requests.push(Request::new(statement, parameters));
        }
        Ok(requests)
    }

    async fn prepare_missing<'s>(
        &self,
        statements: impl Iterator<Item = (&'s str, &'s (dyn Record + Send + Sync))>,
    ) -> Result<(), Error> {
        let mut missing: Vec<(usize, &str)> = Vec::new();
        for (index, (sql, _)) in statements.enumerate() {
            if self.at_hand(sql).is_none() && missing.iter().all(|(_, text)| *text != sql) {
                missing.push((index, sql));
            }
        }
        let mut turn = self.turn().await?;
        turn.set_preparing(true);
        let prepared = together(missing.iter().map(|(_, sql)| self.client.prepare(sql))).await;
        turn.set_preparing(false);
        let mut failed = None;
        for (&(index, sql), result) in missing.iter().zip(prepared) {
            match result {
                Ok(statement) => _ = self.keep(sql, statement),
                Err(e) => failed = failed.or(Some((index, e))),
            }
        }
        if failed.is_some() {
            self.wire().recovered().await;
        }
        turn.finish();
        match failed {
            Some((index, e)) => Err(self.explain(e).in_batch(BatchPart::statement(index))),
            None => Ok(()),
        }
    }

    /// Has SQL sent ahead of the next request. Nothing may be under way.
    pub(super) fn send_sql_ahead(&self, sql: &str) -> io::Result<()> {
        let mut ahead = Ahead::default();
        ahead.query(sql)?;
        self.wire().send_ahead(ahead);
        Ok(())
    }

    /// Sends all of them at its first poll. Inside a transaction only, which the first that fails aborts. If there is
    /// SQL to go ahead of them, the turn must be [exclusive](Self::turn_alone).
    pub(crate) async fn fly(
        &self,
        turn: Turn<'_>,
        sql_ahead: &str,
        requests: &[Request],
    ) -> Result<Vec<BatchResult>, Error> {
        if !sql_ahead.is_empty() {
            self.send_sql_ahead(sql_ahead).map_err(|_| Error::config("SQL with a zero byte"))?;
        }
        let answers = match requests {
            [only] => vec![self.answer(only).await],
            _ => together(requests.iter().map(|request| self.answer(request))).await,
        };
        let mut results = Vec::with_capacity(answers.len());
        for (index, answer) in answers.into_iter().enumerate() {
            match answer {
                Ok(result) => results.push(result),
                Err(e) => {
                    self.wire().recovered().await;
                    turn.finish();
                    return Err(self.explain(e).in_batch(BatchPart::statement(index)));
                }
            }
        }
        turn.finish();
        Ok(results)
    }

    pub(super) async fn answer(&self, request: &Request) -> Result<BatchResult, tokio_postgres::Error> {
        let parameters = Fields::of(&request.parameters);
        let mut stream = pin!(self.client.query_raw(&request.statement, parameters).await?);
        let mut rows = Vec::new();
        while let Some(row) = poll_fn(|cx| stream.as_mut().poll_next(cx)).await {
            rows.push(row?);
        }
        Ok(BatchResult { rows, affected: stream.rows_affected().unwrap_or(0) })
    }
}

/// What is wrong with parameters before they are sent.
pub(super) fn misplaced(part: BatchPart, types: &[Type], misfit: Misfit) -> Error {
    let cause = match misfit {
        Misfit::Value(field, cause) => BatchCause::Value { parameter: field + 1, cause },
        Misfit::Count(given) => BatchCause::ParameterCount { given, wanted: types.len() },
    };
    Error::batch(part, cause)
}
