//! Several statements in one flight, under one Sync: the server reads over the rest when one fails.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::future::poll_fn;
use std::pin::{Pin, pin};

use bytes::{Buf, BytesMut};
use futures_core::Stream;
use postgres_types::{IsNull, ToSql, Type, to_sql_checked};
use tokio_postgres::Row;

use super::connection::Connection;
use super::core::{Core, Use};
use super::request::{Failure, Request};
use crate::error::{BatchCause, BatchPart, Error};
use crate::record::{self, Misfit, Record};
use crate::statements::{Statement, Traits};

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

/// No message of PostgreSQL's is larger.
const MESSAGE_MAX: usize = 0x3fff_ffff;

/// A statement with its parameters, as they go over the wire.
pub(crate) struct Bound {
    statement: Statement,
    parameters: BytesMut,
}

impl Bound {
    pub(super) fn new(statement: Statement, parameters: BytesMut) -> Result<Self, Error> {
        // The driver would refuse to send it, and those it belongs together with are sent already then.
        if parameters.len() > MESSAGE_MAX {
            return Err(Error::config("the parameters of a statement are too long for one message"));
        }
        Ok(Self { statement, parameters })
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

/// What a statement is answered with, until it fails.
pub(super) struct Reply {
    pub(super) result: BatchResult,
    pub(super) failed: Option<tokio_postgres::Error>,
}

impl Connection {
    /// Prepares what is not at hand, all of it in one flight, and encodes the parameters. Also tells what the statements
    /// have in common.
    pub(crate) async fn bind<'s>(
        &self,
        statements: impl Iterator<Item = (&'s str, &'s (dyn Record + Send + Sync))> + Clone,
    ) -> Result<(Vec<Bound>, Traits), Error> {
        let mut all = Vec::with_capacity(statements.size_hint().0);
        let mut common = Traits::default();
        // Kept here: the cache may be smaller than the batch.
        let mut prepared: Option<HashMap<&str, Statement>> = None;
        for (index, (sql, record)) in statements.clone().enumerate() {
            let statement = match (&prepared, self.at_hand(sql)?) {
                (_, Some(statement)) => statement,
                (None, None) => {
                    let missing = Box::pin(self.prepare_missing(statements.clone())).await?;
                    let missing = prepared.insert(missing);
                    self.one_of(missing, sql, index).await?
                }
                (Some(missing), None) => self.one_of(missing, sql, index).await?,
            };
            if statement.traits().copy {
                return Err(Error::config("a batch cannot run COPY: see copy_rows_in and copy_rows_out"));
            }
            common.controls |= statement.traits().controls;
            let mut parameters = BytesMut::with_capacity(USUAL);
            record::encode(statement.params(), &mut parameters, record)
                .map_err(|misfit| misplaced(BatchPart::statement(index), statement.params(), misfit))?;
            all.push(Bound::new(statement, parameters)?);
        }
        Ok((all, common))
    }

    /// A statement that was prepared with others; or else now, since it was forgotten meanwhile.
    async fn one_of(
        &self,
        prepared: &HashMap<&str, Statement>,
        sql: &str,
        index: usize,
    ) -> Result<Statement, Error> {
        match prepared.get(sql) {
            Some(statement) => Ok(statement.clone()),
            None => Box::pin(self.prepare(sql)).await.map_err(|e| self.place(e, BatchPart::statement(index))),
        }
    }

    /// A refusal, with the part of the batch that it is about; unless it was BEGIN, or what else went ahead.
    fn place(&self, error: Error, part: BatchPart) -> Error {
        if self.wire().is_lead_refused() { error } else { error.in_batch(part) }
    }

    async fn prepare_missing<'s>(
        &self,
        statements: impl Iterator<Item = (&'s str, &'s (dyn Record + Send + Sync))>,
    ) -> Result<HashMap<&'s str, Statement>, Error> {
        let mut missing: Vec<(usize, &str)> = Vec::new();
        let mut seen = HashSet::new();
        for (index, (sql, _)) in statements.enumerate() {
            if self.at_hand(sql)?.is_none() && seen.insert(sql) {
                missing.push((index, sql));
            }
        }
        let texts: Vec<&str> = missing.iter().map(|(_, sql)| *sql).collect();
        let mut request = self.request(Use::Shared).await?;
        let prepared = match self.prepare_all(&mut request, &texts, true).await {
            Ok(prepared) => prepared,
            Err(failure) => return Err(request.failed(failure).await),
        };
        request.finish();
        let mut statements = HashMap::with_capacity(missing.len());
        for ((index, sql), result) in missing.into_iter().zip(prepared) {
            match result {
                Ok(statement) => _ = statements.insert(sql, statement),
                Err(e) => return Err(self.place(self.explain(e), BatchPart::statement(index))),
            }
        }
        Ok(statements)
    }

    /// Sends all of them at its first poll, under one Sync, and COMMIT behind them if asked for. Inside a transaction only,
    /// which the first that fails aborts.
    ///
    /// Right behind another statement of the transaction each has a Sync of its own; there is no COMMIT then.
    pub(crate) async fn run_group(
        &self,
        statements: &[Bound],
        commit: bool,
    ) -> Result<Vec<BatchResult>, Error> {
        let mut request = match self.request(Use::Group).await {
            Err(Error::Busy) if !commit => self.request(Use::Shared).await?,
            granted => granted?,
        };
        let mut calls: Vec<_> = statements.iter().map(|bound| Box::pin(self.reply(bound))).collect();
        let mut early: Vec<Option<Reply>> = calls.iter().map(|_| None).collect();
        let count = u32::try_from(statements.len()).unwrap_or(u32::MAX);
        let group = |core: &mut Core| {
            if (count > 1 || commit) && core.is_next(self.wire().sent()) {
                self.wire().group(count, commit);
            }
            if commit {
                core.ending();
            }
        };
        if let Err(failure) = request.send_all(&mut calls, &mut early, group).await {
            return Err(request.failed(failure).await);
        }
        if !commit {
            // All of them are sent: others may come behind.
            self.shell.core().share();
        }
        let mut results = Vec::with_capacity(calls.len());
        for (index, (call, early)) in calls.into_iter().zip(early).enumerate() {
            let reply = match early {
                Some(early) => early,
                None => call.await,
            };
            match reply.failed {
                // What ended the connection behind the answer to COMMIT changes nothing.
                Some(_) if self.wire().is_committed() => results.push(reply.result),
                Some(e) => {
                    return Err(self.group_failed(request, e, BatchPart::statement(index), statements).await);
                }
                None => results.push(reply.result),
            }
        }
        request.finish();
        Ok(results)
    }

    async fn group_failed(
        &self,
        request: Request<'_>,
        error: tokio_postgres::Error,
        part: BatchPart,
        statements: &[Bound],
    ) -> Error {
        request.answer().await;
        self.forget_if_stale(&error, |cache| {
            for bound in statements {
                cache.forget(&bound.statement);
            }
        });
        let commit = self.wire().is_commit_refused();
        let error = request.failed(Failure::Driver(error)).await;
        // It was COMMIT that failed, and the driver's last request got to hear it.
        if commit { error } else { self.place(error, part) }
    }

    async fn reply(&self, bound: &Bound) -> Reply {
        let mut result = BatchResult { rows: Vec::new(), affected: 0 };
        let parameters = Fields::of(&bound.parameters);
        let mut stream = match self.client.query_raw(bound.statement.inner(), parameters).await {
            Ok(stream) => pin!(stream),
            Err(e) => return Reply { result, failed: Some(e) },
        };
        let mut failed = None;
        while let Some(row) = poll_fn(|cx| stream.as_mut().poll_next(cx)).await {
            match row {
                Ok(row) => result.rows.push(row),
                Err(e) => {
                    failed = Some(e);
                    break;
                }
            }
        }
        result.affected = stream.rows_affected().unwrap_or(0);
        Reply { result, failed }
    }

    /// Gives the driver one more statement, with `before` to say what travels along.
    pub(super) async fn run_bound(
        &self,
        request: &mut Request<'_>,
        bound: &Bound,
        before: impl FnMut(&mut Core),
    ) -> Result<Reply, Failure> {
        let mut calls: [Pin<Box<_>>; 1] = [Box::pin(self.reply(bound))];
        let mut early = [None];
        request.send_all(&mut calls, &mut early, before).await?;
        let [call] = calls;
        let [early] = early;
        Ok(match early {
            Some(early) => early,
            None => call.await,
        })
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
