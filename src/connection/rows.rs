//! One statement for many rows of parameters: window by window, each of them one flight.

use std::future::poll_fn;
use std::task::Poll;

use bytes::BytesMut;

use super::connection::Connection;
use super::core::{Core, Use};
use super::group::{Bound, misplaced};
use super::request::{Failure, Request};
use crate::connect::{Fault, Rows};
use crate::error::{BatchPart, Error};
use crate::record::{self, Record};
use crate::statements::Statement;

/// A window is sent when it has so many bytes: enough that the pause between two of them, a round trip, is small
/// beside the work; little enough that what is in flight costs no memory to speak of.
const WINDOW: usize = 128 * 1024;

/// Rows on their way to one statement. While it lives, no other statement of the connection can be sent.
pub(crate) struct Many<'c, 's, I> {
    connection: &'c Connection,
    request: Option<Request<'c>>,
    sql: &'s str,
    statement: Statement,
    rows: I,
    /// The next row, if there is one.
    next: Option<BytesMut>,
    /// How many rows were taken from the iterator.
    taken: u64,
    /// How many are in windows.
    placed: u64,
    /// Whether the server knows the statement under the name that is used here.
    parsed: bool,
    /// Some of the rows may have been stored, and others not.
    halfway: bool,
}

/// What is sent in one go: all its rows but the last, and the driver's own request for that one.
struct Window {
    rows: Rows,
    last: Bound,
    /// How many rows came before it.
    before: u64,
}

impl<'c, 's, R, I> Many<'c, 's, I>
where
    R: Record,
    I: Iterator<Item = R>,
{
    /// Nothing, if there are no rows.
    pub(crate) async fn new(
        connection: &'c Connection,
        sql: &'s str,
        rows: I,
    ) -> Result<Option<Self>, Error> {
        let statement = match connection.at_hand(sql)? {
            Some(statement) => statement,
            None => connection.prepare(sql).await?,
        };
        if statement.traits().copy {
            return Err(Error::config("execute_many cannot run COPY: see copy_rows_in"));
        }
        let mut many = Self {
            connection,
            request: None,
            sql,
            statement,
            rows,
            next: Some(BytesMut::new()),
            taken: 0,
            placed: 0,
            parsed: false,
            halfway: false,
        };
        many.advance()?;
        if many.next.is_none() {
            return Ok(None);
        }
        many.request = Some(connection.request(Use::Group).await?);
        Ok(Some(many))
    }

    /// Whether COMMIT may go along: what controls transactions itself must be watched from statement to statement.
    pub(crate) fn may_commit(&self) -> bool {
        !self.statement.traits().controls
    }

    /// Encodes the next row, in the place of the one before.
    fn advance(&mut self) -> Result<(), Error> {
        let (Some(row), Some(mut out)) = (self.rows.next(), self.next.take()) else { return Ok(()) };
        self.taken += 1;
        out.clear();
        let types = self.statement.params();
        record::encode(types, &mut out, &row)
            .map_err(|misfit| misplaced(BatchPart::Row(self.taken), types, misfit))?;
        self.next = Some(out);
        Ok(())
    }

    /// The next window; nothing if no rows are left.
    fn window(&mut self) -> Result<Option<Window>, Error> {
        let mut rows = Rows::default();
        let before = self.placed;
        let mut spare = BytesMut::new();
        while let Some(row) = self.next.replace(spare) {
            self.advance()?;
            self.placed += 1;
            if self.next.is_none() || rows.len() + row.len() >= WINDOW {
                let last = Bound::new(self.statement.clone(), row)?;
                return Ok(Some(Window { rows, last, before }));
            }
            if !std::mem::replace(&mut self.parsed, true) {
                rows.parse(self.sql, self.statement.params()).map_err(too_long)?;
            }
            rows.run(&row).map_err(too_long)?;
            spare = row;
        }
        Ok(None)
    }

    /// Runs all windows, with COMMIT behind the last of them if asked for. Returns how many rows were touched.
    pub(crate) async fn run(&mut self, commit: bool) -> Result<u64, Error> {
        let mut affected = 0;
        let mut window = self.window()?;
        while let Some(full) = window {
            let last = self.next.is_none();
            self.halfway |= !last;
            let Some(mut request) = self.request.take() else { break };
            let (connection, statement) = (self.connection, self.statement.clone());
            let mut flight = Box::pin(async move {
                let result = connection.fly(&mut request, full, commit && last, &statement).await;
                (result, request)
            });
            let early = poll_fn(|cx| Poll::Ready(flight.as_mut().poll(cx))).await;
            // The next is made ready while the server is at work on this one.
            let next = if last { Ok(None) } else { self.window() };
            let (result, request) = match early {
                Poll::Ready(done) => done,
                Poll::Pending => flight.await,
            };
            self.request = Some(request);
            match result {
                Ok(touched) => affected += touched,
                Err(WindowFailure { failure, row }) => {
                    let Some(request) = self.request.take() else { break };
                    // It was BEGIN or COMMIT that failed, and the driver's request got to hear it.
                    let ours = connection.wire().is_commit_refused() || connection.wire().is_lead_refused();
                    let error = request.failed(failure).await;
                    return Err(if ours { error } else { error.in_batch(BatchPart::Row(row)) });
                }
            }
            window = next?;
        }
        self.halfway = false;
        if let Some(request) = self.request.take() {
            request.finish();
        }
        Ok(affected)
    }
}

impl<I> Drop for Many<'_, '_, I> {
    fn drop(&mut self) {
        if self.halfway {
            // The server may not know that anything is wrong, and would commit the rows that it has.
            self.connection.wire().note(Fault::Halfway);
        }
        // Nothing of it is under way when an iterator or a value fails.
        if let Some(request) = self.request.take() {
            request.finish();
        }
    }
}

/// A window that failed, and which row it was.
struct WindowFailure {
    failure: Failure,
    row: u64,
}

impl Connection {
    /// Sends a window, and waits until it is answered.
    async fn fly(
        &self,
        request: &mut Request<'_>,
        window: Window,
        commit: bool,
        statement: &Statement,
    ) -> Result<u64, WindowFailure> {
        let wire = self.wire();
        let ahead = window.rows.count();
        let mut rows = Some(window.rows);
        let send = |core: &mut Core| {
            if let Some(rows) = rows.take() {
                wire.rows_ahead(rows, commit);
            }
            if commit {
                core.ending();
            }
        };
        let failed = |failure| {
            let row = window.before + u64::from(wire.rowed().count) + 1;
            WindowFailure { failure, row }
        };
        let reply = self.run_bound(request, &window.last, send).await.map_err(failed)?;
        match reply.failed {
            Some(e) if !wire.is_committed() => {
                request.answer().await;
                self.forget_if_stale(&e, |cache| cache.forget(statement));
                Err(failed(Failure::Driver(e)))
            }
            _ if wire.rowed().count != ahead => {
                const REASON: &str = "its answers were out of step";
                self.shell.cut(REASON);
                Err(failed(Failure::Lost(REASON)))
            }
            _ => Ok(wire.rowed().affected + reply.result.rows_affected()),
        }
    }
}

fn too_long(_: std::io::Error) -> Error {
    Error::config("a row of execute_many is too long for one message")
}
