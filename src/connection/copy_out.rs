//! COPY of typed rows out of a table or a query, in the binary format.

use std::fmt;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures_core::Stream;
use postgres_types::{FromSql, WrongType};
use tokio_postgres::Column;

use super::connection::Connection;
use super::copy_in::TRAILER;
use super::stream::CopyOut;
use crate::error::{CopyCause, Error};
use crate::statements::Statement;

/// Manual, COPY, "Binary Format": the signature, then the flags, then how long the rest of the header is.
const SIGNATURE: &[u8] = b"PGCOPY\n\xff\r\n\0";
const FLAGS: usize = 4;

/// The rows of a COPY, as they come. See [`Connection::copy_rows_out`].
///
/// A [`Stream`]; [`next`](Self::next) saves the import of an extension trait.
pub struct CopyRowsOut<'a> {
    data: CopyOut<'a>,
    described: Statement,
    /// How many rows came.
    rows: u64,
    begun: bool,
    ended: bool,
    failed: bool,
}

impl<'a> CopyRowsOut<'a> {
    pub(super) async fn start(connection: &'a Connection, query: &str) -> Result<Self, Error> {
        let described = connection.describe(query).await?;
        // On a line of its own, lest a comment at the end of the query hide the parenthesis.
        let data = connection.copy_out(&format!("COPY ({query}\n) TO STDOUT (FORMAT binary)")).await?;
        Ok(Self { data, described, rows: 0, begun: false, ended: false, failed: false })
    }

    /// The columns, with their types.
    #[must_use]
    pub fn columns(&self) -> &[Column] {
        self.described.columns()
    }

    /// The next row, or `None` after the last.
    ///
    /// # Errors
    ///
    /// As [`Connection::query`], and [`Error::Copy`] for data that cannot be read.
    ///
    /// # Cancel safety
    ///
    /// No row is lost if this future is dropped.
    pub async fn next(&mut self) -> Option<Result<CopiedRow, Error>> {
        poll_fn(|cx| Pin::new(&mut *self).poll_next(cx)).await
    }

    /// The row in a message, or `None` if there is only the header or the trailer in it. One message is at most one
    /// row (manual, chapter 54.2.6).
    fn row(&mut self, data: Bytes) -> Option<Result<CopiedRow, &'static str>> {
        let mut rest = Cursor { data: &data, at: 0 };
        if !std::mem::replace(&mut self.begun, true) && rest.header().is_none() {
            return Some(Err("the header is not that of the binary format"));
        }
        if rest.at == data.len() {
            return None;
        }
        let fields = rest.i16();
        if fields == Some(TRAILER) {
            self.ended = true;
            return None;
        }
        let expected = self.columns().len();
        if fields.and_then(|fields| usize::try_from(fields).ok()) != Some(expected) {
            return Some(Err("it has another number of fields than columns were described"));
        }
        let starts: Option<_> = (0..expected).map(|_| rest.field()).collect();
        match starts {
            Some(fields) => {
                self.rows += 1;
                Some(Ok(CopiedRow { described: self.described.clone(), data, fields, number: self.rows }))
            }
            None => Some(Err("it is cut short")),
        }
    }
}

impl Stream for CopyRowsOut<'_> {
    type Item = Result<CopiedRow, Error>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if this.failed {
            return Poll::Ready(None); // the driver would fail again and again
        }
        loop {
            let item = match ready!(Pin::new(&mut this.data).poll_next(cx)) {
                None if this.ended => return Poll::Ready(None),
                None => Err("the data ended without a trailer"),
                Some(Err(e)) => {
                    this.failed = true;
                    return Poll::Ready(Some(Err(e)));
                }
                Some(Ok(data)) => match this.row(data) {
                    Some(row) => row,
                    None => continue,
                },
            };
            this.failed = item.is_err();
            let number = this.rows + 1;
            let error = |reason| Error::copy(number, None, CopyCause::Malformed(reason));
            return Poll::Ready(Some(item.map_err(error)));
        }
    }
}

/// A place in a message.
struct Cursor<'a> {
    data: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn bytes(&mut self, length: usize) -> Option<&'a [u8]> {
        let bytes = self.data.get(self.at..self.at.checked_add(length)?)?;
        self.at += length;
        Some(bytes)
    }

    fn i16(&mut self) -> Option<i16> {
        self.bytes(2)?.try_into().ok().map(i16::from_be_bytes)
    }

    fn i32(&mut self) -> Option<i32> {
        self.bytes(4)?.try_into().ok().map(i32::from_be_bytes)
    }

    fn header(&mut self) -> Option<()> {
        if self.bytes(SIGNATURE.len())? != SIGNATURE {
            return None;
        }
        self.bytes(FLAGS)?;
        let extension = usize::try_from(self.i32()?).ok()?;
        self.bytes(extension).map(drop)
    }

    fn field(&mut self) -> Option<Field> {
        match self.i32()? {
            -1 => Some(Field { start: self.at, length: None }),
            length => {
                let length = usize::try_from(length).ok()?;
                let start = self.at;
                self.bytes(length)?;
                Some(Field { start, length: Some(length) })
            }
        }
    }
}

/// Where a field is in its message; one that is NULL has no length.
#[derive(Clone, Copy)]
struct Field {
    start: usize,
    length: Option<usize>,
}

/// A row that COPY yielded. See [`Connection::copy_rows_out`].
#[derive(Clone)]
pub struct CopiedRow {
    described: Statement,
    data: Bytes,
    fields: Box<[Field]>,
    number: u64,
}

impl CopiedRow {
    /// The value of a column, by its place (from 0) or its name.
    ///
    /// # Panics
    ///
    /// If there is no such column, or its value is no `T`, as NULL is not unless `T` is an [`Option`].
    #[must_use]
    #[track_caller]
    pub fn get<'r, T: FromSql<'r>>(&'r self, column: impl ColumnIndex) -> T {
        match self.try_get(column) {
            Ok(value) => value,
            Err(e) => match std::error::Error::source(&e) {
                Some(cause) => panic!("{e}: {cause}"),
                None => panic!("{e}"),
            },
        }
    }

    /// As [`get`](Self::get), without the panic.
    ///
    /// # Errors
    ///
    /// [`Error::Copy`] if there is no such column, or its value is no `T`.
    pub fn try_get<'r, T: FromSql<'r>>(&'r self, column: impl ColumnIndex) -> Result<T, Error> {
        let columns = self.columns();
        let Some(place) = column.place(columns) else {
            return Err(Error::copy(self.number, None, CopyCause::NoColumn(column.to_string().into())));
        };
        let (column, field) = (&columns[place], self.fields[place]);
        let value = if T::accepts(column.type_()) {
            match field.length {
                Some(length) => T::from_sql(column.type_(), &self.data[field.start..field.start + length]),
                None => T::from_sql_null(column.type_()),
            }
        } else {
            Err(WrongType::new::<T>(column.type_().clone()).into())
        };
        value.map_err(|e| Error::copy(self.number, Some(column.name().into()), CopyCause::Value(e)))
    }

    /// The columns, with their types.
    #[must_use]
    pub fn columns(&self) -> &[Column] {
        self.described.columns()
    }
}

/// Says which column of a [`CopiedRow`]: its place (from 0), or its name.
pub trait ColumnIndex: fmt::Display + sealed::Sealed {
    #[doc(hidden)]
    fn place(&self, columns: &[Column]) -> Option<usize>;
}

mod sealed {
    #[allow(unnameable_types, reason = "that is what seals it")]
    pub trait Sealed {}
    impl Sealed for usize {}
    impl Sealed for &str {}
}

impl ColumnIndex for usize {
    fn place(&self, columns: &[Column]) -> Option<usize> {
        (*self < columns.len()).then_some(*self)
    }
}

impl ColumnIndex for &str {
    fn place(&self, columns: &[Column]) -> Option<usize> {
        columns.iter().position(|column| column.name() == *self)
    }
}

impl fmt::Debug for CopyRowsOut<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CopyRowsOut").field("rows", &self.rows).finish_non_exhaustive()
    }
}

impl fmt::Debug for CopiedRow {
    /// Without its values.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CopiedRow")
            .field("number", &self.number)
            .field("columns", &self.columns())
            .finish_non_exhaustive()
    }
}
