//! One request under way: it is asked for, given to the driver, and answered or abandoned.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};

use super::connection::Connection;
use super::core::{Answer, Core, Enqueued, Refusal, Use};
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
    /// How many errors the server had sent before that.
    errors: u32,
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
                self.drain_if(true);
            }
            answer
        };
        match answer {
            Answer::Granted if shell.wire.is_ended_by_sql() => {
                // What follows would run on its own.
                self.new_request().finish();
                Err(self.ended_by_sql())
            }
            Answer::Granted => Ok(Some(self.new_request())),
            Answer::Wait => Ok(None),
            Answer::Refused(Refusal::StreamOpen) => Err(Error::StreamOpen),
            Answer::Refused(Refusal::Busy) => Err(Error::Busy),
            Answer::Refused(Refusal::Lost(reason)) => {
                Err(if shell.wire.is_ended_by_sql() { Error::TransactionEnded } else { shell.lost(reason) })
            }
        }
    }

    #[inline]
    fn new_request(&self) -> Request<'_> {
        Request { connection: self, number: None, errors: self.wire().errors(), done: false }
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
    /// BEGIN was refused, or the transaction has ended, before the driver got it.
    NoTransaction,
}

impl<'a> Request<'a> {
    /// Whether the server has sent an error since the driver got it.
    pub(super) fn is_refused(&self) -> bool {
        self.connection.wire().errors() != self.errors
    }

    /// What became of a request of which the driver said that all was well before it had seen the end: behind COPY's data
    /// the server commits what is not part of a transaction, and that may fail; or the end never came.
    pub(super) fn afterthought(&self, outside: bool) -> Result<(), Error> {
        let shell = &self.connection.shell;
        let answered = self.number.is_none_or(|number| shell.wire.answered() >= number);
        match shell.wire.error_since(self.errors) {
            Some(e) if !e.is_fatal() => Err(Error::Aborted(Box::new((*e).clone()))),
            None if answered => Ok(()),
            _ => Err(shell.over(outside)),
        }
    }

    /// What a COPY has failed for that was told of it before.
    pub(super) fn why_over(&self) -> Error {
        match self.connection.wire().error_since(self.errors) {
            Some(e) => Error::Aborted(Box::new((*e).clone())),
            None => self.connection.shell.lost("the COPY has failed before"),
        }
    }

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
            match poll_fn(|cx| self.poll_sent(cx, call.as_mut(), &mut before)).await {
                Ok(answer) => return answer.map_err(Failure::Driver),
                Err(why) => Box::pin(self.turn(why)).await?,
            }
        }
    }

    /// It is answered, and is to be given to the driver once more.
    pub(super) fn begin_again(&mut self) {
        self.number = None;
    }

    /// Polls the driver's future; the first time only if a request may be given to the driver now.
    #[inline]
    pub(super) fn poll_sent<T, F>(
        &mut self,
        cx: &mut Context<'_>,
        mut call: Pin<&mut F>,
        before: impl FnOnce(&mut Core),
    ) -> Poll<Result<Result<T, tokio_postgres::Error>, Enqueued>>
    where
        F: Future<Output = Result<T, tokio_postgres::Error>>,
    {
        if self.number.is_some() {
            return call.poll(cx).map(Ok);
        }
        let first = self.enqueue(|core| {
            before(core);
            call.as_mut().poll(cx)
        });
        match first {
            Ok(first) => first.map(Ok),
            Err(why) => Poll::Ready(Err(why)),
        }
    }

    /// Polls the driver's future for the first time, if a request may be given to the driver now.
    #[inline]
    fn enqueue<T>(&mut self, first: impl FnOnce(&mut Core) -> First<T>) -> Result<First<T>, Enqueued> {
        let wire = self.connection.wire();
        let mut core = self.connection.shell.core();
        let number = match core.enqueue(|| wire.begin(), wire.sent()) {
            Enqueued::Now(number) => number,
            why => return Err(why),
        };
        self.errors = wire.errors();
        let first = first(&mut core);
        if matches!(&first, Poll::Ready(Err(e)) if e.as_db_error().is_none()) {
            // It could not be encoded, or the connection is closed: the driver has sent nothing. What waits is for another.
            core.not_enqueued();
            wire.expect_nothing();
        } else {
            self.number = Some(number);
        }
        Ok(first)
    }

    /// Statements are going to be prepared for it: waits until that may begin.
    pub(super) async fn begin_preparing(&self) -> Result<(), Failure> {
        loop {
            let shell = &self.connection.shell;
            let number = {
                let mut core = shell.core();
                shell.lead_now(&mut core);
                if core.prepare() {
                    return Ok(());
                }
                core.last()
            };
            shell.until(|core| core.lost().is_some() || core.is_settled() && !core.is_preparing()).await;
            shell.wire.until_sent(number).await;
            if let Some(reason) = shell.core().lost() {
                return Err(Failure::Lost(reason));
            }
        }
    }

    /// Waits while others are preparing statements or draining, or until BEGIN is answered.
    pub(super) async fn turn(&self, why: Enqueued) -> Result<(), Failure> {
        let shell = &self.connection.shell;
        match why {
            Enqueued::Never => return Err(Failure::NoTransaction),
            Enqueued::AfterBegin(number) => {
                if !shell.wire.until_begun(number).await {
                    return Err(Failure::NoTransaction);
                }
            }
            Enqueued::AfterSent(number) => shell.wire.until_sent(number).await,
            Enqueued::WithSteps => {
                shell.lead_now(&mut shell.core());
                return Ok(());
            }
            Enqueued::Now(_) | Enqueued::Later => {}
        }
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
        let wire = self.connection.wire();
        loop {
            let sent = poll_fn(|cx| {
                let mut core = self.connection.shell.core();
                // Asked once: those that follow go with the first, or BEGIN is confirmed.
                let first = match core.enqueue(|| wire.begin(), wire.sent()) {
                    Enqueued::Now(number) => number,
                    why => return Poll::Ready(Err(why)),
                };
                before(&mut core);
                for ((index, call), answer) in (0..).zip(calls.iter_mut()).zip(answers.iter_mut()) {
                    if index > 0 {
                        core.enqueue_behind();
                    }
                    self.number = Some(first + index);
                    if let Poll::Ready(early) = call.as_mut().poll(cx) {
                        *answer = Some(early);
                    }
                }
                Poll::Ready(Ok(()))
            })
            .await;
            match sent {
                Ok(()) => return Ok(()),
                Err(why) => self.turn(why).await?,
            }
        }
    }

    /// Its result is known; the rest of its answer is waited for if it failed.
    pub(super) async fn end<T>(self, result: Result<T, Failure>) -> Result<T, Error> {
        match result {
            Ok(value) => {
                self.finish();
                Ok(value)
            }
            Err(failure) => Err(self.failed(failure).await),
        }
    }

    /// The driver has said that it failed, which it does before the answer is complete: waits for that.
    pub(super) async fn failed(mut self, failure: Failure) -> Error {
        let outside = self.number.is_some() && self.connection.is_outside();
        self.answer().await;
        self.conclude();
        match failure {
            Failure::Driver(error) => self.connection.shell.explain(error, outside),
            Failure::Lost(reason) => self.connection.shell.lost(reason),
            Failure::NoTransaction if self.connection.wire().is_ended_by_sql() => {
                self.connection.ended_by_sql()
            }
            Failure::NoTransaction => match self.connection.wire().fault(0) {
                Some(fault) => self.connection.shell.broken_by(&fault),
                None => self.connection.shell.lost("BEGIN was refused"),
            },
        }
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
        if std::thread::panicking() && !shell.core().is_ending() {
            // A panic in a parameter's `ToSql` leaves half a message in the driver's buffer. Nobody may wait for what is open.
            shell.cut(PANICKED);
            return;
        }
        let start = shell.core().abandon(self.number);
        self.connection.drain_if(start);
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
