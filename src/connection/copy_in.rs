//! COPY of typed rows into a table, in the binary format.

use std::fmt;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};

use bytes::{BufMut, BytesMut};
use futures_core::Stream;
use postgres_types::Type;
use tokio_postgres::Column;

use super::connection::Connection;
use super::core::Use;
use crate::error::{CopyCause, Error};
use crate::record::{self, Misfit, Record};
use crate::statements::Statement;

/// Manual, COPY, "Binary Format": the signature, no flags, no header extension.
const HEADER: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";

/// What stands for the number of fields behind the last row.
pub(super) const TRAILER: i16 = -1;

/// Sent when a chunk has as much: large enough that a message costs little, small enough that what is in flight does.
const CHUNK: usize = 64 * 1024;

/// So that the row that fills a chunk seldom makes it grow.
const SLACK: usize = 4 * 1024;

/// The name of a table, with or without a schema. Made from a string or from a pair of them.
///
/// Names are quoted, so they are taken as they are written: `Items` is not `items`. A string is split at its first dot,
/// if it has one; for names with dots in them use the pair.
///
/// ```
/// use pg_session::TableName;
///
/// assert_eq!(TableName::from("items").to_string(), r#""items""#);
/// assert_eq!(TableName::from("shop.items").to_string(), r#""shop"."items""#);
/// assert_eq!(TableName::from(("my.shop", "the \"items\"")).to_string(), r#""my.shop"."the ""items""""#);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TableName {
    schema: Option<Box<str>>,
    name: Box<str>,
}

impl From<&str> for TableName {
    fn from(name: &str) -> Self {
        match name.split_once('.') {
            Some(pair) => pair.into(),
            None => Self { schema: None, name: name.into() },
        }
    }
}

impl From<(&str, &str)> for TableName {
    /// The schema, and the table in it.
    fn from((schema, name): (&str, &str)) -> Self {
        Self { schema: Some(schema.into()), name: name.into() }
    }
}

impl fmt::Display for TableName {
    /// Quoted, as SQL wants it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(schema) = &self.schema {
            write!(f, "{}.", quoted(schema))?;
        }
        f.write_str(&quoted(&self.name))
    }
}

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

pub(super) fn list<S: AsRef<str>>(columns: &[S]) -> String {
    columns.iter().map(|name| quoted(name.as_ref())).collect::<Vec<_>>().join(", ")
}

/// How far a COPY into the server has come. See [`CopyRowsIn::progress`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CopyProgress {
    /// How many rows were sent; at the end, how many were stored.
    pub rows: u64,
    /// How many bytes of data were sent.
    pub bytes: u64,
}

/// A COPY of rows into a table, not begun yet. See [`Connection::copy_rows_in`].
#[must_use = "nothing is stored before rows are sent"]
pub struct CopyRowsIn<'a> {
    connection: &'a Connection,
    table: TableName,
    columns: Vec<String>,
    progress: Option<Box<dyn FnMut(CopyProgress) + Send + 'a>>,
}

impl<'a> CopyRowsIn<'a> {
    pub(super) fn new(connection: &'a Connection, table: TableName, columns: &[&str]) -> Self {
        let columns = columns.iter().map(|&name| name.to_owned()).collect();
        Self { connection, table, columns, progress: None }
    }

    /// Calls `progress` after each chunk sent (of about 64 KiB, so not for each row) and once more at the end, when all
    /// rows are stored. Default: nobody is told.
    pub fn progress(mut self, progress: impl FnMut(CopyProgress) + Send + 'a) -> Self {
        self.progress = Some(Box::new(progress));
        self
    }

    /// Stores all rows of an iterator, or none, and returns how many.
    ///
    /// The iterator is asked for more only as fast as the server takes it.
    ///
    /// # Errors
    ///
    /// [`Error::Copy`] for a row that cannot be encoded, has another number of fields than there are columns, or is
    /// refused by the server; otherwise as [`Connection::query`]. After an error nothing is stored.
    ///
    /// # Cancel safety
    ///
    /// Dropped, nothing is stored, unless the last row had been sent: then all are or none. See [`Connection`].
    pub async fn send<R: Record>(self, rows: impl IntoIterator<Item = R>) -> Result<u64, Error> {
        self.run(Iter(rows.into_iter())).await
    }

    /// Stores all rows of a stream, or none, and returns how many.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send).
    ///
    /// # Cancel safety
    ///
    /// As [`send`](Self::send).
    pub async fn send_stream<R: Record>(self, rows: impl Stream<Item = R>) -> Result<u64, Error> {
        self.run(Sure(pin!(rows))).await
    }

    /// As [`send_stream`](Self::send_stream), from a stream that may fail: then nothing is stored, and its error comes
    /// back.
    ///
    /// # Errors
    ///
    /// The stream's first error; otherwise as [`send`](Self::send).
    ///
    /// # Cancel safety
    ///
    /// As [`send`](Self::send).
    pub async fn try_send_stream<R, E>(self, rows: impl Stream<Item = Result<R, E>>) -> Result<u64, E>
    where
        R: Record,
        E: From<Error>,
    {
        self.run(rows).await
    }

    async fn run<R, E>(mut self, rows: impl Stream<Item = Result<R, E>>) -> Result<u64, E>
    where
        R: Record,
        E: From<Error>,
    {
        let connection = self.connection;
        if self.columns.is_empty() {
            self.columns = connection.writable_columns(&self.table).await?;
        }
        let list = list(&self.columns);
        let described = connection.describe(&format!("SELECT {list} FROM {}", self.table)).await?;
        let columns = described.columns();
        let types: Vec<Type> = columns.iter().map(|column| column.type_().clone()).collect();
        // A table without columns has rows all the same, and an empty list is no SQL.
        let list = if columns.is_empty() { list } else { format!(" ({list})") };
        let mut copy =
            connection.copy_in(&format!("COPY {}{list} FROM STDIN (FORMAT binary)", self.table)).await?;

        let mut rows = pin!(rows);
        let mut sent = CopyProgress { rows: 0, bytes: 0 };
        let mut chunk = BytesMut::with_capacity(CHUNK + SLACK);
        chunk.put_slice(HEADER);
        let mut refused = false;
        while let Some(row) = poll_fn(|cx| rows.as_mut().poll_next(cx)).await {
            sent.rows += 1;
            // An error in here drops the COPY, which fails it on the server.
            record::encode(&types, &mut chunk, &row?)
                .map_err(|misfit| misplaced(sent.rows, columns, misfit))?;
            if chunk.len() >= CHUNK {
                sent.bytes += chunk.len() as u64;
                let full = std::mem::replace(&mut chunk, BytesMut::with_capacity(CHUNK + SLACK));
                copy.send(full.freeze()).await?;
                self.tell(sent);
                refused = copy.is_refused();
                if refused {
                    break; // the server only reads over the rest
                }
            }
        }
        // After a refusal no valid number of fields, so that a part of the rows cannot be taken for all of them.
        chunk.put_i16(if refused { TRAILER - 1 } else { TRAILER });
        sent.bytes += chunk.len() as u64;
        copy.send(chunk.freeze()).await?;
        sent.rows = copy.finish().await.map_err(|e| self.place(e))?;
        self.tell(sent);
        Ok(sent.rows)
    }

    fn tell(&mut self, sent: CopyProgress) {
        if let Some(progress) = &mut self.progress {
            progress(sent);
        }
    }

    /// The server's error with the row and column it is about, where the server says so.
    fn place(&self, error: Error) -> Error {
        let Error::Database(error) = error else { return error };
        let Some((row, rest)) = error.0.as_db_error().and_then(|e| line(e.where_()?, &self.table.name))
        else {
            return Error::Database(error);
        };
        let named = |name: &&String| {
            rest.strip_prefix(name.as_str())
                .is_some_and(|rest| rest.is_empty() || rest.starts_with([':', '\n']))
        };
        let column = self.columns.iter().find(named).map(String::as_str);
        let column = column.or(error.0.as_db_error().and_then(|e| e.column())).map(Into::into);
        Error::copy(row, column, CopyCause::Server(error))
    }
}

/// What is wrong with a row before it is sent.
fn misplaced(row: u64, columns: &[Column], misfit: Misfit) -> Error {
    match misfit {
        Misfit::Value(field, cause) => {
            let column = columns.get(field).map(|column| column.name().into());
            Error::copy(row, column, CopyCause::Value(cause))
        }
        Misfit::Count(fields) => {
            Error::copy(row, None, CopyCause::FieldCount { fields, columns: columns.len() })
        }
    }
}

/// An iterator as a stream that is always ready and never fails.
struct Iter<I>(I);

impl<I> Unpin for Iter<I> {}

impl<I: Iterator> Stream for Iter<I> {
    type Item = Result<I::Item, Error>;

    fn poll_next(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Poll::Ready(self.get_mut().0.next().map(Ok))
    }
}

/// A stream that never fails.
struct Sure<'s, S>(Pin<&'s mut S>);

impl<S: Stream> Stream for Sure<'_, S> {
    type Item = Result<S::Item, Error>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.get_mut().0.as_mut().poll_next(cx).map(|row| row.map(Ok))
    }
}

/// The number in `COPY items, line 17, column price`, and the text behind the word that follows. The words are in the
/// server's language, the order is the same.
fn line<'a>(context: &'a str, table: &str) -> Option<(u64, &'a str)> {
    let rest = context
        .lines()
        .find_map(|line| line.strip_prefix("COPY ")?.strip_prefix(table)?.strip_prefix(", "))?;
    let digits = rest.find(|c: char| c.is_ascii_digit())?;
    let rest = &rest[digits..];
    let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    let (number, rest) = rest.split_at(end);
    let column = rest.strip_prefix(", ").and_then(|rest| rest.split_once(' ')).map_or("", |(_, name)| name);
    Some((number.parse().ok()?, column))
}

impl fmt::Debug for CopyRowsIn<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CopyRowsIn")
            .field("table", &self.table)
            .field("columns", &self.columns)
            .finish_non_exhaustive()
    }
}

impl Connection {
    /// The columns that a row can be given for: all but generated ones.
    async fn writable_columns(&self, table: &TableName) -> Result<Vec<String>, Error> {
        const SQL: &str = "SELECT attname::text FROM pg_catalog.pg_attribute \
            WHERE attrelid = $1::text::pg_catalog.regclass AND attnum > 0 AND NOT attisdropped AND attgenerated = '' \
            ORDER BY attnum";
        let rows = self.query(SQL, &[&table.to_string()]).await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    /// The columns of a query that is not run, which asks for no privilege.
    ///
    /// Never from the cache: nobody would notice that a column has another type by now, and values of a type of the
    /// same length would be stored as what they are not.
    pub(super) async fn describe(&self, sql: &str) -> Result<Statement, Error> {
        let mut request = self.request(Use::Shared).await?;
        let statement = self.prepare_for(&mut request, sql, false).await;
        request.end(statement).await
    }
}

#[cfg(test)]
mod tests {
    use super::line;

    #[test]
    fn the_row_is_read_from_the_servers_context() {
        assert_eq!(line("COPY items, line 17", "items"), Some((17, "")));
        assert_eq!(line("COPY items, line 17, column a b: \"x\"", "items"), Some((17, "a b: \"x\"")));
        assert_eq!(line("COPY items, Zeile 17, Spalte a", "items"), Some((17, "a")));
        assert_eq!(line("PL/pgSQL function f() line 3 at RAISE\nCOPY a, 1, line 2", "a, 1"), Some((2, "")));
        assert_eq!(line("PL/pgSQL function f() line 3 at RAISE", "items"), None);
        assert_eq!(line("COPY items", "items"), None);
    }
}
