//! Results that are read, or data that is sent, piece by piece.

use std::fmt;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures_core::Stream;
use futures_sink::Sink;
use tokio_postgres::{CopyInSink, CopyOutStream, Row};

use super::{Connection, Turn};
use crate::error::Error;

/// The rows of a statement, as they come. See [`Connection::query_stream`].
///
/// A [`Stream`]; [`next`](Self::next) saves the import of an extension trait.
pub struct RowStream<'a> {
    connection: &'a Connection,
    rows: Pin<Box<tokio_postgres::RowStream>>,
    turn: Turn<'a>,
}

impl<'a> RowStream<'a> {
    pub(super) fn new(connection: &'a Connection, rows: tokio_postgres::RowStream, turn: Turn<'a>) -> Self {
        Self { connection, rows: Box::pin(rows), turn }
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
        if this.turn.is_over() {
            return Poll::Ready(None); // the driver goes on to say that its connection is closed
        }
        let item = ready!(this.rows.as_mut().poll_next(cx));
        if !matches!(item, Some(Ok(_))) {
            this.turn.conclude();
        }
        Poll::Ready(item.map(|row| row.map_err(|e| this.connection.explain(e))))
    }
}

/// What `COPY … TO STDOUT` yields. See [`Connection::copy_out`].
pub struct CopyOut<'a> {
    connection: &'a Connection,
    data: Pin<Box<CopyOutStream>>,
    turn: Turn<'a>,
}

impl<'a> CopyOut<'a> {
    pub(super) fn new(connection: &'a Connection, data: CopyOutStream, turn: Turn<'a>) -> Self {
        Self { connection, data: Box::pin(data), turn }
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
        if this.turn.is_over() {
            return Poll::Ready(None); // the driver goes on to say that its connection is closed
        }
        let item = ready!(this.data.as_mut().poll_next(cx));
        if !matches!(item, Some(Ok(_))) {
            this.turn.conclude();
        }
        Poll::Ready(item.map(|data| data.map_err(|e| this.connection.explain(e))))
    }
}

/// The way in of `COPY … FROM STDIN`. See [`Connection::copy_in`].
///
/// A [`Sink`]; [`send`](Self::send) saves the import of an extension trait. Dropped unfinished, the COPY fails on the
/// server and stores nothing.
pub struct CopyIn<'a> {
    connection: &'a Connection,
    sink: Pin<Box<CopyInSink<Bytes>>>,
    turn: Turn<'a>,
}

impl<'a> CopyIn<'a> {
    pub(super) fn new(connection: &'a Connection, sink: CopyInSink<Bytes>, turn: Turn<'a>) -> Self {
        Self { connection, sink: Box::pin(sink), turn }
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

    /// Ends the COPY and returns how many rows it stored.
    ///
    /// # Errors
    ///
    /// As [`Connection::query`].
    ///
    /// # Cancel safety
    ///
    /// Dropped, the COPY was carried out or not.
    pub async fn finish(mut self) -> Result<u64, Error> {
        let result = poll_fn(|cx| self.sink.as_mut().poll_finish(cx)).await;
        if result.is_err() {
            self.connection.check_step().await;
        }
        self.turn.conclude();
        result.map_err(|e| self.connection.explain(e))
    }
}

impl Sink<Bytes> for CopyIn<'_> {
    type Error = Error;

    fn poll_ready(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let this = self.get_mut();
        this.sink.as_mut().poll_ready(cx).map_err(|e| this.connection.explain(e))
    }

    fn start_send(self: Pin<&mut Self>, data: Bytes) -> Result<(), Error> {
        let this = self.get_mut();
        this.sink.as_mut().start_send(data).map_err(|e| this.connection.explain(e))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let this = self.get_mut();
        this.sink.as_mut().poll_flush(cx).map_err(|e| this.connection.explain(e))
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let this = self.get_mut();
        let result = ready!(this.sink.as_mut().poll_close(cx));
        if result.is_ok() {
            this.turn.conclude(); // after an error, dropping the turn settles the connection
        }
        Poll::Ready(result.map_err(|e| this.connection.explain(e)))
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
