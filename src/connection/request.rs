//! One request under way: it is asked for, given to the driver, and answered or abandoned.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;

use super::connection::Connection;
use super::core::{Answer, Core, Refusal, Use};
use super::drain;
use super::shell::PANICKED;
use crate::connect::Fault;
use crate::error::Error;

/// A request that was granted. Dropped before its [end](Self::finish), it is abandoned: what it sent is cancelled and
/// drained, and a transaction that it belongs to must not be committed.
#[derive(Debug)]
pub(crate) struct Request<'a> {
    connection: &'a Connection,
    /// Its number, once the driver has it.
    number: Option<u64>,
    done: bool,
}

/// What the driver's future said at its first poll.
pub(super) type First<T> = Poll<Result<T, tokio_postgres::Error>>;

impl Connection {
    /// Asks for a request, and waits until the connection is settled if need be.
    pub(super) async fn request(&self, what: Use) -> Result<Request<'_>, Error> {
        loop {
            if let Some(request) = self.request_now(what)? {
                return Ok(request);
            }
            self.shell.until(Core::is_settled).await;
        }
    }

    /// Asks for a request, if it can be had now.
    #[inline]
    pub(super) fn request_now(&self, what: Use) -> Result<Option<Request<'_>>, Error> {
        let shell = &self.shell;
        let answer = {
            let mut core = shell.core();
            let answer = core.ask(what, shell.wire.sent());
            if answer == Answer::Wait && core.take_in() {
                drop(core);
                drain::start(shell, &self.client);
            }
            answer
        };
        match answer {
            Answer::Granted if shell.wire.is_ended_by_sql() => {
                // What follows would run on its own.
                let mut request = Request { connection: self, number: None, done: false };
                request.conclude();
                Err(self.ended_by_sql())
            }
            Answer::Granted => Ok(Some(Request { connection: self, number: None, done: false })),
            Answer::Wait => Ok(None),
            Answer::Refused(Refusal::StreamOpen) => Err(Error::StreamOpen),
            Answer::Refused(Refusal::Busy) => Err(Error::Busy),
            Answer::Refused(Refusal::Lost(reason)) => {
                Err(if shell.wire.is_ended_by_sql() { Error::TransactionEnded } else { shell.lost(reason) })
            }
        }
    }

    /// SQL has ended the transaction under way, or begun another: nobody must use the connection any more.
    pub(crate) fn ended_by_sql(&self) -> Error {
        self.shell.cut("SQL in a transaction ended it");
        Error::TransactionEnded
    }
}

/// Why there is no answer.
#[derive(Debug)]
pub(super) enum Failure {
    /// What the driver said.
    Driver(tokio_postgres::Error),
    /// The connection was lost before the driver got it.
    Lost(&'static str),
}

impl<'a> Request<'a> {
    /// The rest of its answer, to be waited for.
    pub(super) fn answer(&self) -> impl Future<Output = ()> + Send + use<'a> {
        let (number, wire) = (self.number, &self.connection.shell.wire);
        async move {
            if let Some(number) = number {
                wire.until_answered(number).await;
            }
        }
    }

    /// Gives the driver the request: its future is polled for the first time, which sends it. `before` says what is to
    /// travel along. Nobody else's request can come in between.
    #[inline]
    pub(super) async fn send<T, F>(
        &mut self,
        mut call: Pin<&mut F>,
        mut before: impl FnMut(&mut Core),
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, tokio_postgres::Error>>,
    {
        loop {
            let first = poll_fn(|cx| {
                Poll::Ready(self.enqueue(|core| {
                    before(core);
                    call.as_mut().poll(cx)
                }))
            })
            .await;
            match first {
                Some(Poll::Pending) => return call.await.map_err(Failure::Driver),
                Some(Poll::Ready(answer)) => return answer.map_err(Failure::Driver),
                None => Box::pin(self.turn()).await?,
            }
        }
    }

    /// Polls the driver's future for the first time, if a request may be given to the driver now.
    #[inline]
    fn enqueue<T>(&mut self, first: impl FnOnce(&mut Core) -> First<T>) -> Option<First<T>> {
        let mut core = self.connection.shell.core();
        let number = core.enqueue()?;
        let first = first(&mut core);
        if matches!(&first, Poll::Ready(Err(e)) if e.as_db_error().is_none()) {
            // It could not be encoded, or the connection is closed: the driver has sent nothing.
            core.not_enqueued();
        } else {
            self.number = Some(number);
        }
        Some(first)
    }

    /// Statements are going to be prepared for it: waits until that may begin.
    pub(super) async fn begin_preparing(&self) -> Result<(), Failure> {
        loop {
            if self.connection.shell.core().prepare() {
                return Ok(());
            }
            let shell = &self.connection.shell;
            shell.until(|core| core.is_settled()).await;
            if let Some(reason) = shell.core().lost() {
                return Err(Failure::Lost(reason));
            }
        }
    }

    /// Waits while others are preparing statements or draining.
    async fn turn(&self) -> Result<(), Failure> {
        let shell = &self.connection.shell;
        shell.until(|core| core.may_enqueue() || core.lost().is_some()).await;
        let lost = shell.core().lost();
        lost.map_or(Ok(()), |reason| Err(Failure::Lost(reason)))
    }

    /// Gives the driver several requests at once: nobody else's can come in between. What is answered at once is put into
    /// `answers`.
    pub(super) async fn send_all<F: Future>(
        &mut self,
        calls: &mut [Pin<Box<F>>],
        answers: &mut [Option<F::Output>],
        mut before: impl FnMut(&mut Core),
    ) -> Result<(), Failure> {
        loop {
            let sent = poll_fn(|cx| {
                let mut core = self.connection.shell.core();
                if !core.may_enqueue() {
                    return Poll::Ready(false);
                }
                before(&mut core);
                for (call, answer) in calls.iter_mut().zip(answers.iter_mut()) {
                    self.number = core.enqueue();
                    if let Poll::Ready(early) = call.as_mut().poll(cx) {
                        *answer = Some(early);
                    }
                }
                Poll::Ready(true)
            })
            .await;
            if sent {
                return Ok(());
            }
            self.turn().await?;
        }
    }

    /// The driver has said that it failed, which it does before the answer is complete: waits for that.
    pub(super) async fn failed(mut self, failure: Failure) -> Error {
        let outside = self.number.is_some() && self.connection.is_outside_of_block();
        self.answered().await;
        self.conclude();
        match failure {
            Failure::Driver(error) => self.connection.shell.explain(error, outside),
            Failure::Lost(reason) => self.connection.shell.lost(reason),
        }
    }

    /// Waits until its answer is complete.
    pub(super) async fn answered(&self) {
        self.answer().await;
    }

    /// Its answer is complete.
    #[inline]
    pub(crate) fn finish(mut self) {
        self.conclude();
    }

    /// As [`finish`](Self::finish), for those that hold it in a struct.
    #[inline]
    pub(crate) fn conclude(&mut self) {
        if std::mem::replace(&mut self.done, true) {
            return;
        }
        let shell = &self.connection.shell;
        let mut core = shell.core();
        core.finish();
        if !core.is_free() {
            drop(core);
            shell.changed();
        }
    }

    pub(super) fn is_over(&self) -> bool {
        self.done
    }

    #[cold]
    fn abandon(&mut self) {
        let shell = &self.connection.shell;
        // Whatever it did or did not do, nobody knows.
        shell.wire.note(Fault::Abandoned);
        if std::thread::panicking() {
            // A panic in a parameter's `ToSql` leaves half a message in the driver's buffer.
            shell.lose(PANICKED);
            return;
        }
        let start = shell.core().abandon(self.number);
        if start {
            drain::start(shell, &self.connection.client);
        }
        shell.changed();
    }
}

impl Drop for Request<'_> {
    #[inline]
    fn drop(&mut self) {
        if !self.done {
            self.abandon();
        }
    }
}
