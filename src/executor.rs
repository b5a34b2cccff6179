//! Anything statements can be run on.

use std::future::Future;

use postgres_types::ToSql;
use tokio_postgres::Row;

use crate::connection::{Connection, RowStream};
use crate::error::Error;
use crate::session::Session;
use crate::statements::ToStatement;
use crate::transaction::Transaction;

/// Anything statements can be run on: a [`Session`], a [`Transaction`], a [`Connection`], and references to them.
///
/// For functions that are generic over it. Where a reference is enough, `&Connection` as the parameter does the same
/// without generics.
///
/// ```no_run
/// use pg_session::{Error, Executor};
///
/// async fn count(db: impl Executor) -> Result<i64, Error> {
///     Ok(db.query_one("SELECT count(*) FROM users", &[]).await?.get(0))
/// }
/// # async fn f(session: &pg_session::Session) -> Result<i64, Error> { count(session).await }
/// ```
pub trait Executor: Sync {
    /// The connection to run them on.
    fn connection(&self) -> &Connection;

    /// As [`Connection::query`].
    fn query<S>(
        &self,
        sql: &S,
        params: &[&(dyn ToSql + Sync)],
    ) -> impl Future<Output = Result<Vec<Row>, Error>> + Send
    where
        S: ToStatement + ?Sized,
    {
        self.connection().query(sql, params)
    }

    /// As [`Connection::query_one`].
    fn query_one<S>(
        &self,
        sql: &S,
        params: &[&(dyn ToSql + Sync)],
    ) -> impl Future<Output = Result<Row, Error>> + Send
    where
        S: ToStatement + ?Sized,
    {
        self.connection().query_one(sql, params)
    }

    /// As [`Connection::query_opt`].
    fn query_opt<S>(
        &self,
        sql: &S,
        params: &[&(dyn ToSql + Sync)],
    ) -> impl Future<Output = Result<Option<Row>, Error>> + Send
    where
        S: ToStatement + ?Sized,
    {
        self.connection().query_opt(sql, params)
    }

    /// As [`Connection::execute`].
    fn execute<S>(
        &self,
        sql: &S,
        params: &[&(dyn ToSql + Sync)],
    ) -> impl Future<Output = Result<u64, Error>> + Send
    where
        S: ToStatement + ?Sized,
    {
        self.connection().execute(sql, params)
    }

    /// As [`Connection::batch_execute`].
    fn batch_execute(&self, sql: &str) -> impl Future<Output = Result<(), Error>> + Send {
        self.connection().batch_execute(sql)
    }

    /// As [`Connection::query_stream`].
    fn query_stream<S>(
        &self,
        sql: &S,
        params: &[&(dyn ToSql + Sync)],
    ) -> impl Future<Output = Result<RowStream<'_>, Error>> + Send
    where
        S: ToStatement + ?Sized,
    {
        self.connection().query_stream(sql, params)
    }
}

impl Executor for Connection {
    fn connection(&self) -> &Connection {
        self
    }
}

impl Executor for Session {
    fn connection(&self) -> &Connection {
        self
    }
}

impl Executor for Transaction<'_> {
    fn connection(&self) -> &Connection {
        self
    }
}

impl<T: Executor + ?Sized> Executor for &T {
    fn connection(&self) -> &Connection {
        (**self).connection()
    }
}

impl<T: Executor + ?Sized> Executor for &mut T {
    fn connection(&self) -> &Connection {
        (**self).connection()
    }
}
