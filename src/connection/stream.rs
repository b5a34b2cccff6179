//! Results that are read, or data that is sent, piece by piece.

use std::fmt;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures_core::Stream;
use futures_sink::Sink;
use tokio_postgres::{CopyInSink, CopyOutStream, Row};

use super::connection::Connection;
use super::request::Request;
use crate::error::Error;

/// A request whose answer is read piece by piece. The driver says that it is over, or failed, before all of it has come.
struct Piecewise<'a> {
    connection: &'a Connection,
    request: Request<'a>,
    /// What is left to wait for, and what is to be said then.
    end: Option<Pin<Box<dyn Future<Output = ()> + Send + 'a>>>,
    failure: Option<tokio_postgres::Error>,
}

impl<'a> Piecewise<'a> {
    fn new(connection: &'a Connection, request: Request<'a>) -> Self {
        Self { connection, request, end: None, failure: None }
    }

    fn is_over(&self) -> bool {
        self.request.is_over()
    }

    /// Whether the driver is done with it.
    fn is_ending(&self) -> bool {
        self.end.is_some()
    }

    /// The driver is done with it, or has failed.
    fn begin_end(&mut self, failure: Option<tokio_postgres::Error>) {
        self.failure = failure;
        self.end = Some(Box::pin(self.request.answer()));
    }

    /// Waits for its end, and says whether all was well.
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        if let Some(end) = &mut self.end {
            ready!(end.as_mut().poll(cx));
            self.end = None;
        }
        let outside = self.connection.is_outside();
        self.request.conclude();
        Poll::Ready(match self.failure.take() {
            Some(e) => Err(self.connection.shell.explain(e, outside)),
            None => self.request.afterthought(outside),
        })
    }
}

/// The rows of a statement, as they come. See [`Connection::query_stream`].
///
/// A [`Stream`]; [`next`](Self::next) saves the import of an extension trait.
pub struct RowStream<'a> {
    rows: Pin<Box<tokio_postgres::RowStream>>,
    work: Piecewise<'a>,
}

impl<'a> RowStream<'a> {
    pub(super) fn new(
        connection: &'a Connection,
        rows: tokio_postgres::RowStream,
        request: Request<'a>,
    ) -> Self {
        Self { rows: Box::pin(rows), work: Piecewise::new(connection, request) }
    }

    /// The next row, or `None` after the last.
    ///
    /// # Errors
    ///
    /// As [`Connection::query`].
    ///
    /// # Cancel safety
    ///
    /// No row is lost if this future is dropped.
    pub async fn next(&mut self) -> Option<Result<Row, Error>> {
        poll_fn(|cx| Pin::new(&mut *self).poll_next(cx)).await
    }
}

impl Stream for RowStream<'_> {
    type Item = Result<Row, Error>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        poll_piece(&mut this.work, cx, |cx| this.rows.as_mut().poll_next(cx))
    }
}

/// The next piece of an answer, or its end.
fn poll_piece<T>(
    work: &mut Piecewise<'_>,
    cx: &mut Context<'_>,
    next: impl FnOnce(&mut Context<'_>) -> Poll<Option<Result<T, tokio_postgres::Error>>>,
) -> Poll<Option<Result<T, Error>>> {
    if work.is_over() {
        return Poll::Ready(None); // the driver goes on to say that its connection is closed
    }
    if !work.is_ending() {
        match ready!(next(cx)) {
            Some(Ok(item)) => return Poll::Ready(Some(Ok(item))),
            Some(Err(e)) => work.begin_end(Some(e)),
            None => work.begin_end(None),
        }
    }
    match ready!(work.poll_end(cx)) {
        Ok(()) => Poll::Ready(None),
        Err(e) => Poll::Ready(Some(Err(e))),
    }
}

/// What `COPY … TO STDOUT` yields. See [`Connection::copy_out`].
pub struct CopyOut<'a> {
    data: Pin<Box<CopyOutStream>>,
    work: Piecewise<'a>,
}

impl<'a> CopyOut<'a> {
    pub(super) fn new(connection: &'a Connection, data: CopyOutStream, request: Request<'a>) -> Self {
        Self { data: Box::pin(data), work: Piecewise::new(connection, request) }
    }

    /// The next piece of data, or `None` after the last.
    ///
    /// # Errors
    ///
    /// As [`Connection::query`].
    ///
    /// # Cancel safety
    ///
    /// No data is lost if this future is dropped.
    pub async fn next(&mut self) -> Option<Result<Bytes, Error>> {
        poll_fn(|cx| Pin::new(&mut *self).poll_next(cx)).await
    }
}

impl Stream for CopyOut<'_> {
    type Item = Result<Bytes, Error>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        poll_piece(&mut this.work, cx, |cx| this.data.as_mut().poll_next(cx))
    }
}

/// The way in of `COPY … FROM STDIN`. See [`Connection::copy_in`].
///
/// A [`Sink`]; [`send`](Self::send) saves the import of an extension trait. Dropped unfinished, the COPY fails on the
/// server and stores nothing; a transaction that it is part of can no longer be committed.
pub struct CopyIn<'a> {
    sink: Pin<Box<CopyInSink<Bytes>>>,
    work: Piecewise<'a>,
    /// How many rows were stored, once it was closed.
    rows: Option<u64>,
}

impl<'a> CopyIn<'a> {
    pub(super) fn new(connection: &'a Connection, sink: CopyInSink<Bytes>, request: Request<'a>) -> Self {
        Self { sink: Box::pin(sink), work: Piecewise::new(connection, request), rows: None }
    }

    /// Sends a piece of data, waiting while the server cannot keep up.
    ///
    /// # Errors
    ///
    /// [`Error::ConnectionLost`]. What the server dislikes about the data is told by [`finish`](Self::finish).
    ///
    /// # Cancel safety
    ///
    /// Dropped, the piece was sent or not; do not finish the COPY then.
    pub async fn send(&mut self, data: Bytes) -> Result<(), Error> {
        poll_fn(|cx| Pin::new(&mut *self).poll_ready(cx)).await?;
        Pin::new(&mut *self).start_send(data)
    }

    /// Whether the server has refused it, and reads over the rest.
    pub(super) fn is_refused(&self) -> bool {
        self.work.request.is_refused()
    }

    /// Ends the COPY and returns how many rows it stored.
    ///
    /// # Errors
    ///
    /// As [`Connection::query`]; outside a transaction also [`Error::Aborted`] if its implicit commit fails, as by a
    /// deferred constraint.
    ///
    /// # Cancel safety
    ///
    /// Dropped, the COPY was carried out or not.
    pub async fn finish(mut self) -> Result<u64, Error> {
        poll_fn(|cx| Pin::new(&mut self).poll_close(cx)).await?;
        self.rows.ok_or_else(|| self.work.request.why_over())
    }
}

impl Sink<Bytes> for CopyIn<'_> {
    type Error = Error;

    fn poll_ready(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let this = self.get_mut();
        this.sink.as_mut().poll_ready(cx).map_err(|e| this.work.connection.explain(e))
    }

    fn start_send(self: Pin<&mut Self>, data: Bytes) -> Result<(), Error> {
        let this = self.get_mut();
        this.sink.as_mut().start_send(data).map_err(|e| this.work.connection.explain(e))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let this = self.get_mut();
        this.sink.as_mut().poll_flush(cx).map_err(|e| this.work.connection.explain(e))
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let this = self.get_mut();
        if this.work.is_over() {
            return Poll::Ready(if this.rows.is_some() { Ok(()) } else { Err(this.work.request.why_over()) });
        }
        if !this.work.is_ending() {
            match ready!(this.sink.as_mut().poll_finish(cx)) {
                Ok(rows) => {
                    this.rows = Some(rows);
                    this.work.begin_end(None);
                }
                Err(e) => this.work.begin_end(Some(e)),
            }
        }
        let ended = ready!(this.work.poll_end(cx));
        if ended.is_err() {
            this.rows = None;
        }
        Poll::Ready(ended)
    }
}

macro_rules! opaque_debug {
    ($($name:ident),*) => {$(
        impl fmt::Debug for $name<'_> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($name)).finish_non_exhaustive()
            }
        }
    )*};
}
opaque_debug!(RowStream, CopyOut, CopyIn);
