//! One statement for many rows of parameters: window by window, each of them one flight.

use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;

use bytes::BytesMut;
use tokio_postgres::Statement;
use tokio_postgres::error::SqlState;

use super::flight::{Request, misplaced};
use super::{Connection, Turn};
use crate::connect::Ahead;
use crate::error::{BatchPart, Error, ServerError};
use crate::record::{self, Record};
use crate::statements::is_copy;

/// A window is sent when it has so many bytes: enough that the pause between two of them, a round trip, is small
/// beside the work; little enough that what is in flight costs no memory to speak of.
const WINDOW: usize = 128 * 1024;

/// Rows on their way to one statement. While it lives, no other statement of the connection can be sent.
pub(crate) struct Many<'c, 's, I> {
    connection: &'c Connection,
    turn: Option<Turn<'c>>,
    sql: &'s str,
    statement: Statement,
    rows: I,
    /// The next row, if there is one.
    next: Option<BytesMut>,
    /// How many rows were taken from the iterator.
    taken: u64,
    /// How many are in windows.
    placed: u64,
    /// What the first window has to begin with.
    pending: String,
    /// Whether the server knows the statement under the name that is used here.
    parsed: bool,
    /// Some of the rows may have been stored, and others not.
    halfway: bool,
}

/// What is sent in one go: all its rows but the last, and the driver's own request for that one.
pub(crate) struct Window {
    ahead: Ahead,
    last: Request,
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
        if is_copy(sql) {
            return Err(Error::config("execute_many cannot run COPY: see copy_rows_in"));
        }
        let statement = match connection.at_hand(sql) {
            Some(statement) => statement,
            None => connection.prepare(sql).await?,
        };
        let mut many = Self {
            connection,
            turn: None,
            sql,
            statement,
            rows,
            next: Some(BytesMut::new()),
            taken: 0,
            placed: 0,
            pending: String::new(),
            parsed: false,
            halfway: false,
        };
        many.advance()?;
        if many.next.is_none() {
            return Ok(None);
        }
        let (turn, pending) = connection.turn_alone().await?;
        (many.turn, many.pending) = (Some(turn), pending);
        Ok(Some(many))
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
        let mut ahead = Ahead::default();
        if !self.pending.is_empty() {
            ahead
                .query(&std::mem::take(&mut self.pending))
                .map_err(|_| Error::config("SQL with a zero byte"))?;
        }
        let before = self.placed;
        let mut spare = BytesMut::new();
        while let Some(row) = self.next.replace(spare) {
            self.advance()?;
            self.placed += 1;
            if self.next.is_none() || ahead.len() + row.len() >= WINDOW {
                let last = Request::new(self.statement.clone(), row);
                return Ok(Some(Window { ahead, last, before }));
            }
            if !std::mem::replace(&mut self.parsed, true) {
                ahead.parse(self.sql, self.statement.params()).map_err(too_long)?;
            }
            ahead.run(&row).map_err(too_long)?;
            spare = row;
        }
        Ok(None)
    }

    /// Runs all windows but the last. Returns that one, and how many rows the others touched.
    pub(crate) async fn all_but_last(&mut self) -> Result<(Option<Window>, u64), Error> {
        let mut affected = 0;
        let mut window = self.window()?;
        while self.next.is_some() {
            let Some(full) = window else { break };
            self.halfway = true;
            let mut flight = pin!(self.connection.fly_window(full));
            let early = poll_fn(|cx| Poll::Ready(flight.as_mut().poll(cx))).await;
            // The next is made ready while the server is at work on this one.
            let next = self.window();
            affected += match early {
                Poll::Ready(answer) => answer,
                Poll::Pending => flight.await,
            }?;
            window = next?;
        }
        Ok((window, affected))
    }

    /// The end of it, whatever `result` is.
    pub(crate) fn finish(mut self, result: Result<u64, Error>) -> Result<u64, Error> {
        self.halfway &= result.is_err();
        if let Some(turn) = self.turn.take() {
            turn.finish();
        }
        result
    }
}

impl<I> Drop for Many<'_, '_, I> {
    fn drop(&mut self) {
        if self.halfway {
            // The server may not know that anything is wrong, and would commit the rows that it has.
            self.connection.wire().note(ServerError {
                fatal: false,
                code: SqlState::DATA_EXCEPTION,
                message: "execute_many ended before all of its rows were sent".into(),
                constraint: None,
                routine: None,
            });
        }
    }
}

impl Connection {
    /// Sends a window at its first poll. Under an exclusive turn.
    pub(crate) async fn fly_window(&self, window: Window) -> Result<u64, Error> {
        let wire = self.wire();
        let ahead = window.ahead.requests();
        wire.send_ahead(window.ahead);
        match self.answer(&window.last).await {
            Ok(last) => {
                let answered = wire.answered();
                if answered.requests != ahead {
                    const REASON: &str = "its answers were out of step";
                    self.link.poison(REASON);
                    return Err(self.link.lost(REASON));
                }
                Ok(answered.rows + last.rows_affected())
            }
            Err(e) => {
                wire.recovered().await;
                let row = window.before + u64::from(wire.answered().requests) + 1;
                Err(self.explain(e).in_batch(BatchPart::Row(row)))
            }
        }
    }
}

fn too_long(_: std::io::Error) -> Error {
    Error::config("a row of execute_many is too long for one message")
}
