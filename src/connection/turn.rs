//! One request at a time's worth of care: taking a turn, and the statements that begin and end transactions.

use std::pin::pin;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll, Waker};

use tokio::time::timeout;
use tokio_postgres::Client;
use tokio_postgres::error::{Severity, SqlState};

use super::link::{Flow, PANICKED, STALLED};
use super::{Connection, link, reset};
use crate::config::Reset;
use crate::connect::TransactionStatus;
use crate::error::{DriverError, Error, ServerError};
use crate::options::BeginKind;

/// A prepared statement that was abandoned costs the server memory for as long as the connection lives.
const LEAK_LIMIT: u32 = 20;

/// One request under way. Dropped before its end, it leaves the connection unsettled.
#[derive(Debug)]
pub(crate) struct Turn<'a> {
    connection: &'a Connection,
    preparing: bool,
    streaming: bool,
    done: bool,
}

impl Turn<'_> {
    /// The request has had its answer.
    #[inline]
    pub(crate) fn finish(mut self) {
        self.conclude();
    }

    /// As [`finish`](Self::finish), for those that hold a turn in a struct.
    #[inline]
    pub(crate) fn conclude(&mut self) {
        if std::mem::replace(&mut self.done, true) {
            return;
        }
        let link = &self.connection.link;
        let mut flow = link.flow();
        flow.live -= 1;
        flow.streaming &= !self.streaming;
        if flow.settling {
            drop(flow);
            link.changed();
        }
    }

    pub(super) fn is_over(&self) -> bool {
        self.done
    }

    pub(crate) fn set_preparing(&mut self, preparing: bool) {
        self.preparing = preparing;
    }

    /// From here on the driver reads no other answer until this one is read to its end.
    pub(crate) fn set_streaming(&mut self) {
        self.streaming = true;
        self.connection.link.flow().streaming = true;
    }

    #[cold]
    fn abandon(&mut self) {
        let link = &self.connection.link;
        let mut flow = link.flow();
        flow.live -= 1;
        flow.abandoned = true;
        flow.streaming &= !self.streaming;
        flow.leaked_statements += u32::from(self.preparing);
        if std::thread::panicking() {
            // A panic in a parameter's `ToSql` leaves half a message in the driver's buffer.
            flow.broken.get_or_insert(PANICKED);
            drop(flow);
        } else {
            link.start_settling(flow, &self.connection.client);
        }
        link.changed();
    }
}

impl Drop for Turn<'_> {
    #[inline]
    fn drop(&mut self) {
        if !self.done {
            self.abandon();
        }
    }
}

/// What becomes of a connection when its session ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Clean,
    Repair,
    Close(&'static str),
}

impl Connection {
    fn new_turn(&self) -> Turn<'_> {
        Turn { connection: self, preparing: false, streaming: false, done: false }
    }

    /// Takes a turn: waits until the connection is settled, and hands the driver whatever is pending, so that it
    /// travels with the request that follows.
    pub(crate) async fn turn(&self) -> Result<Turn<'_>, Error> {
        loop {
            if let Some(turn) = self.turn_now()? {
                return Ok(turn);
            }
            self.link.until(Flow::is_open).await;
        }
    }

    /// Takes a turn if it can be had now.
    #[inline]
    pub(super) fn turn_now(&self) -> Result<Option<Turn<'_>>, Error> {
        let mut flow = self.link.flow();
        if let Some(reason) = flow.broken {
            drop(flow);
            return Err(self.link.lost(reason));
        }
        if !flow.is_open() {
            return Ok(None);
        }
        if flow.streaming {
            return Err(Error::StreamOpen);
        }
        if let Some(refused) = flow.refused.take() {
            drop(flow);
            return Err(self.explain(refused));
        }
        if !flow.pending.is_empty() {
            let begin = flow.begin.take();
            flow.begun |= begin.is_some();
            if let Some(kind) = begin.filter(|kind| flow.confirmed & kind.bit() == 0) {
                let sql = std::mem::take(&mut flow.pending);
                self.link.start_confirming(flow, &self.client, sql, kind);
                return Ok(None);
            }
            // Under the lock, so that no other request can reach the driver in between. Ahead of the request that follows
            // it is none of the driver's, which saves a good part of what a transaction costs; but only where nothing is
            // under way.
            let alone = flow.live == 0 && !flow.lent && !self.link.wire.has_ahead();
            let result = if alone && self.send_sql_ahead(&flow.pending).is_ok() {
                Ok(())
            } else {
                enqueue(&self.client, &flow.pending)
            };
            flow.pending.clear();
            if let Err(e) = result {
                drop(flow);
                return Err(self.explain(e));
            }
        }
        flow.live += 1;
        drop(flow);
        Ok(Some(self.new_turn()))
    }

    /// Takes a turn for requests of our own making: nobody else has one, or gets one before its end, and nothing that
    /// was sent before is still unanswered. Also returns what is pending, which those requests must begin with.
    pub(crate) async fn turn_alone(&self) -> Result<(Turn<'_>, String), Error> {
        loop {
            let known = {
                let mut flow = self.link.flow();
                if let Some(reason) = flow.broken {
                    drop(flow);
                    return Err(self.link.lost(reason));
                }
                // What is under way may send more, as when it was preparing; and it may not be polled for a while.
                if flow.streaming || flow.live > 0 {
                    return Err(Error::StreamOpen);
                }
                // What waits to go ahead goes with the next request, but only as one piece.
                if flow.lent || self.link.wire.has_ahead() {
                    break;
                }
                let known = flow.begin.is_none_or(|kind| flow.confirmed & kind.bit() != 0);
                if flow.is_open() && flow.refused.is_none() && known {
                    flow.begun |= flow.begin.take().is_some();
                    flow.live += 1;
                    let pending = std::mem::take(&mut flow.pending);
                    drop(flow);
                    let mut turn = self.new_turn();
                    turn.set_streaming();
                    return Ok((turn, pending));
                }
                known && flow.refused.is_none()
            };
            if known {
                self.link.until(Flow::is_open).await;
            } else {
                // Has the BEGIN confirmed, or says why not.
                self.turn().await?.finish();
            }
        }
        // Once this is answered, whatever the raw client was used for is over, and what waited is sent.
        let mut turn = self.turn().await?;
        turn.set_streaming();
        if let Err(reason) = link::fence(&self.client).await {
            self.link.poison(reason);
            return Err(self.link.lost(reason));
        }
        Ok((turn, String::new()))
    }

    /// After a COPY that failed: makes sure that the driver still knows which answer is whose, or ends the connection.
    pub(super) async fn check_step(&self) {
        if let Err(reason) = link::fence(&self.client).await {
            self.link.poison(reason);
        }
    }

    /// The driver's error in this crate's terms.
    pub(crate) fn explain(&self, error: tokio_postgres::Error) -> Error {
        let link = &self.link;
        if error.is_closed() {
            return link.lost("the connection was closed");
        }
        let Some(server) = error.as_db_error() else {
            return Error::Database(DriverError(error));
        };
        if matches!(server.parsed_severity(), Some(Severity::Fatal | Severity::Panic)) {
            const ENDED: &str = "the server ended the session";
            link.poison(ENDED);
            return link.lost(ENDED);
        }
        if *server.code() == SqlState::IN_FAILED_SQL_TRANSACTION {
            if let Some(first) = link.wire.first_error(0) {
                return self.broken_by(&first);
            }
        }
        Error::Database(DriverError(error))
    }

    /// The error of a transaction that `first` broke.
    pub(crate) fn broken_by(&self, first: &ServerError) -> Error {
        if first.is_fatal() {
            self.link.lost("the server ended the session")
        } else {
            Error::Aborted(Box::new(first.clone()))
        }
    }

    /// Starts a transaction: nothing is sent yet. `again` ends the attempt before it in the same message.
    pub(crate) fn begin_with(&self, kind: BeginKind, sql: &str, again: bool) -> Result<(), Error> {
        let mut flow = self.link.flow();
        if !again {
            if self.link.wire.status() != TransactionStatus::Idle {
                return Err(Error::InTransaction);
            }
            flow.begun = false;
        }
        flow.pending.clear();
        flow.refused = None;
        if flow.begun {
            flow.pending.push_str("ROLLBACK;");
        }
        flow.pending.push_str(sql);
        flow.begin = Some(kind);
        self.link.wire.record();
        Ok(())
    }

    /// Puts SQL ahead of the next statement.
    pub(crate) fn queue(&self, sql: &str) {
        self.link.flow().pending.push_str(sql);
    }

    /// Takes back what was queued last, unless it has been sent.
    pub(crate) fn retract(&self, sql: &str) -> bool {
        let mut flow = self.link.flow();
        let unsent = flow.pending.ends_with(sql);
        if unsent {
            let length = flow.pending.len() - sql.len();
            flow.pending.truncate(length);
        }
        unsent
    }

    /// Forgets the errors since `mark`, which ROLLBACK TO SAVEPOINT undoes; those still to come too.
    pub(crate) fn cure(&self, mark: usize) {
        let mut flow = self.link.flow();
        if flow.settling {
            flow.cure = Some(flow.cure.map_or(mark, |earlier| earlier.min(mark)));
        }
        self.wire().cure(mark);
    }

    pub(crate) fn drop_pending(&self) {
        self.link.flow().pending.clear();
    }

    /// Whether anything of the transaction has reached the server.
    pub(crate) fn has_begun(&self) -> bool {
        self.link.flow().begun
    }

    /// Sends what is pending and `sql` as one message, and waits for the answer. `commit` protects it from being
    /// cancelled. Nothing else may be under way.
    pub(crate) async fn control(&self, sql: &str, commit: bool) -> Result<(), tokio_postgres::Error> {
        let mut message = {
            let mut flow = self.link.flow();
            flow.live += 1;
            flow.committing = commit;
            flow.begin = None;
            let mut message = std::mem::take(&mut flow.pending);
            message.push_str(sql);
            message
        };
        let turn = self.new_turn();
        let result = self.client.batch_execute(&message).await;
        if result.is_err() {
            self.wire().recovered().await;
        }
        message.clear();
        let mut flow = self.link.flow();
        flow.committing = false;
        flow.pending = message; // empty, but room for the next transaction's
        drop(flow);
        turn.finish();
        result
    }

    /// The transaction has come to its end, whichever.
    pub(crate) fn end_transaction(&self) {
        let mut flow = self.link.flow();
        flow.pending.clear();
        flow.begin = None;
        flow.begun = false;
        flow.refused = None;
        self.link.wire.stop_recording();
    }

    /// The transaction was dropped in the middle: roll it back in the background.
    pub(crate) fn give_up_transaction(&self) {
        let mut flow = self.link.flow();
        flow.pending.clear();
        flow.begin = None;
        flow.cure = None;
        flow.refused = None;
        flow.confirming = 0; // the settling task drains it
        self.link.wire.stop_recording();
        if std::mem::take(&mut flow.begun) {
            if std::thread::panicking() {
                flow.broken.get_or_insert(PANICKED);
            } else {
                flow.give_up = true;
                self.link.start_settling(flow, &self.client);
            }
        }
    }

    /// What to do with the connection now that its session ends.
    pub(crate) fn verdict(&self) -> Verdict {
        let flow = self.link.flow();
        if std::thread::panicking() {
            return Verdict::Close(PANICKED);
        }
        if let Some(reason) = flow.broken {
            return Verdict::Close(reason);
        }
        if self.client.is_closed() {
            return Verdict::Close("the connection was closed");
        }
        if flow.leaked_statements >= LEAK_LIMIT {
            return Verdict::Close("too many prepared statements were abandoned on it");
        }
        if self.link.wire.discards() > 0 {
            // The driver keeps statements of its own for looking up types, and cannot be told that they are gone.
            return Verdict::Close("its prepared statements were discarded");
        }
        let idle = self.link.wire.status() == TransactionStatus::Idle;
        if !flow.is_open() || flow.lent || self.wants_reset() || !idle {
            Verdict::Repair
        } else {
            Verdict::Clean
        }
    }

    fn wants_reset(&self) -> bool {
        match self.link.config.reset {
            Reset::WhenDirty => self.link.dirty.load(Relaxed),
            Reset::Always => true,
            Reset::Never => false,
        }
    }

    /// Brings a returned connection back to the state it had when it was made, within the clean-up timeout.
    pub(crate) async fn repair(&self) -> Result<(), &'static str> {
        let link = &self.link;
        link.until(Flow::is_open).await;
        if let Some(reason) = link.flow().broken {
            return Err(reason);
        }
        match timeout(link.config.cleanup_timeout, self.restore()).await {
            Ok(Ok(())) if link.wire.status() == TransactionStatus::Idle => Ok(()),
            Ok(Ok(())) => Err("it stayed in a transaction after ROLLBACK"),
            Ok(Err(reason)) => Err(reason),
            Err(_) => Err(STALLED),
        }
    }

    async fn restore(&self) -> Result<(), &'static str> {
        let link = &self.link;
        if link.flow().lent {
            link.quiesce(&self.client).await?;
        }
        link.roll_back(&self.client).await?;
        if self.wants_reset() {
            let done = reset::reset(&self.client, self.watches_client).await;
            done.map_err(|_| "it could not be reset")?;
        }
        link.dirty.store(false, Relaxed);
        link.flow().lent = false;
        Ok(())
    }

    /// Closes it for good; first stops what may be running on the server.
    pub(crate) fn close(self, reason: &'static str) {
        self.link.poison(reason);
        let busy = {
            let flow = self.link.flow();
            flow.live > 0 || !flow.is_open() || flow.abandoned || flow.lent
        };
        if busy {
            let runtime = self.runtime();
            runtime.spawn(async move { self.link.cancel_and_hang_up().await });
        }
    }
}

/// Hands a simple query to the driver and does not wait for the answer: the driver enqueues at the first poll and
/// discards the answer of a dropped future.
fn enqueue(client: &Client, sql: &str) -> Result<(), tokio_postgres::Error> {
    match pin!(client.batch_execute(sql)).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(Err(e)) => Err(e),
        Poll::Ready(Ok(())) | Poll::Pending => Ok(()),
    }
}
