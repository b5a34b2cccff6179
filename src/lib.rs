//! PostgreSQL sessions and transactions for async Rust: honest commits, clean sessions, safe retries, few round trips.
//!
//! A [`SessionManager`] owns a pool of connections and lends them as [`Session`]s. A unit of work is an async closure
//! run by [`Session::transaction`]: committed on `Ok`, rolled back on `Err`, run again after a serialization failure or
//! deadlock.
//!
//! ```no_run
//! use pg_session::{Error, SessionManager};
//!
//! # async fn f() -> Result<(), Error> {
//! let sessions = SessionManager::from_env()?; // DATABASE_URL or PG*; opens nothing yet
//! let mut session = sessions.acquire().await?; // dropping it gives it back
//!
//! let row = session.query_one("SELECT name FROM users WHERE id = $1", &[&7i64]).await?;
//! let name: String = row.get(0);
//!
//! let (from, to, cents) = (1i64, 2i64, 500i64);
//! session
//!     .transaction(async |tx| {
//!         tx.execute("UPDATE accounts SET cents = cents - $2 WHERE id = $1", &[&from, &cents]).await?;
//!         tx.execute("UPDATE accounts SET cents = cents + $2 WHERE id = $1", &[&to, &cents]).await?;
//!         Ok::<_, Error>(())
//!     })
//!     .await?;
//! # Ok(()) }
//! ```
//!
//! | you want | use |
//! |---|---|
//! | a pool from `DATABASE_URL` | [`SessionManager::from_env`] |
//! | settings of your own | [`SessionConfig`], [`SessionManager::new`] |
//! | a session for a while | [`SessionManager::acquire`] |
//! | rows, one row, perhaps a row, a count | [`query`](Connection::query), [`query_one`](Connection::query_one), [`query_opt`](Connection::query_opt), [`execute`](Connection::execute) |
//! | rows as they come | [`query_stream`](Connection::query_stream) |
//! | several statements in one round trip; a transaction in one round trip | [`Session::batch`], [`Transaction::batch`], [`SessionManager::batch`] |
//! | one statement for many rows | [`Session::execute_many`], [`Transaction::execute_many`] |
//! | many rows stored, or read, with COPY | [`copy_rows_in`](Connection::copy_rows_in), [`copy_rows_out`](Connection::copy_rows_out), [`copy_query_out`](Connection::copy_query_out) |
//! | COPY of text, CSV or a file | [`copy_in`](Connection::copy_in), [`copy_out`](Connection::copy_out) |
//! | a unit of work | [`Session::transaction`], [`SessionManager::transaction`] |
//! | an isolation level, read-only, settings for row-level security, a deadline | [`TransactionOptions`] with [`transaction_with`](Session::transaction_with) |
//! | part of it undone | [`Transaction::savepoint`] |
//! | something done once it is committed | [`Transaction::on_commit`] |
//! | BEGIN and COMMIT by hand | [`Session::begin`] |
//! | other retries, or none | [`RetryPolicy`], [`RetryClass`] |
//! | to know what failed | [`Error`] and its questions, such as [`is_unique_violation`](Error::is_unique_violation) |
//! | a function that takes a session or a transaction | `&`[`Connection`], or [`Executor`] |
//! | the driver's client | [`Session::client`] |
//! | numbers, an end in good order | [`SessionManager::status`], [`SessionManager::close`] |
//! | a transaction for each HTTP request | `RequestTransactions` (feature `axum` or `actix-web`) |
//! | an HTTP status for an error | `Problem`, `Problems` (feature `problem`) |
//! | a server and a database for tests | `testing::PgServer` and `testing::TestDatabase` (feature `testing`) |
//! | a test that rolls back everything the code under test commits | `testing::Sandbox` |
//! | failures on purpose, to test retries | `testing::FaultProxy`, `testing::Faults` |
//!
//! # What it does not do
//!
//! It builds no SQL, maps no objects and runs no migrations. It cannot do TLS yet, and refuses `sslmode=require` and
//! stronger rather than connect without. It does not resolve an [unknown commit](Error::CommitUnknown) by itself. It
//! keeps no statement for a pooler in transaction mode that cannot: connect to PostgreSQL, or to such a pooler in
//! session mode.
//!
//! # Features
//!
//! | feature | what it adds | extra dependencies | default |
//! |---|---|---|---|
//! | `axum` | extractors, responses and layers for axum 0.8 | `axum-core`, `http`, `http-body`, `tower-layer`, `tower-service`, and those of `problem` | no |
//! | `actix-web` | the same for actix-web 4 | `actix-web`, and those of `problem` | no |
//! | `problem` | `Problem` and `Problems` alone: from an error to an HTTP status and body, for any framework | `serde`, `serde_json` | no |
//! | `testing` | a throw-away server, a database or a sandbox for each test, fault injection (Unix) | `rustix`, `tempfile` | no |
//!
//! # Versions
//!
//! PostgreSQL 14 to 18. Rust 1.85 or later. The driver is [`tokio_postgres`], re-exported; its `with-…` features for
//! types such as `uuid` or `chrono` are chosen by depending on it.
//!
//! # Logging
//!
//! Spans and events go to `tracing` under the target `pg_session`, without SQL, without parameters and without the
//! server's messages, [which may quote values](Error#what-quotes-data):
//!
//! | span | level | fields |
//! |---|---|---|
//! | `pg_session.acquire` | debug | – |
//! | `pg_session.transaction` | info | `name`, `isolation_level`, `attempts`, `outcome` (`committed`, `rolled_back`, `unknown`) |
//!
//! The driver itself logs SQL *and parameters* through the `log` crate at level debug: keep `tokio_postgres` at info.

#![cfg_attr(docsrs, feature(doc_cfg))]
#![warn(clippy::unwrap_used)]

#[cfg(feature = "actix-web")]
#[cfg_attr(docsrs, doc(cfg(feature = "actix-web")))]
pub mod actix_web;
#[cfg(feature = "axum")]
#[cfg_attr(docsrs, doc(cfg(feature = "axum")))]
pub mod axum;
mod batch;
mod config;
mod connect;
mod connection;
mod error;
mod executor;
#[cfg(all(any(doc, doctest), feature = "axum", feature = "actix-web", feature = "testing"))]
#[cfg_attr(docsrs, doc(cfg(doc)))]
pub mod guide;
#[cfg(any(feature = "axum", feature = "actix-web"))]
mod health;
#[cfg(any(feature = "axum", feature = "actix-web"))]
mod lazy_session;
mod lock;
mod maintenance;
mod manager;
mod observe;
mod options;
#[cfg(feature = "problem")]
mod problem;
mod record;
#[cfg(any(feature = "axum", feature = "actix-web"))]
mod request;
mod retry;
mod session;
mod sql;
mod statements;
mod status;
mod transaction;

pub use batch::Batch;
pub use config::{Reset, SessionConfig, TargetSessionAttrs};
pub use connection::{
    BatchResult, ColumnIndex, Connection, CopiedRow, CopyIn, CopyOut, CopyProgress, CopyRowsIn, CopyRowsOut,
    RowStream, TableName,
};
pub use error::{
    AcquireError, AcquirePhase, BatchError, CommitUnknown, ConnectError, ConnectionLost, CopyError,
    DriverError, Error, ServerError,
};
pub use executor::Executor;
#[cfg(any(feature = "axum", feature = "actix-web"))]
#[cfg_attr(docsrs, doc(cfg(any(feature = "axum", feature = "actix-web"))))]
pub use lazy_session::LazySession;
pub use manager::{SessionManager, SessionManagerBuilder};
pub use options::TransactionOptions;
#[cfg(feature = "problem")]
#[cfg_attr(docsrs, doc(cfg(feature = "problem")))]
pub use problem::{Problem, Problems};
pub use record::{FieldWriter, Record};
#[cfg(any(feature = "axum", feature = "actix-web"))]
#[cfg_attr(docsrs, doc(cfg(any(feature = "axum", feature = "actix-web"))))]
pub use request::{RequestTransactions, Tx};
pub use retry::{RetryClass, RetryPolicy};
pub use session::Session;
pub use statements::{Source, Statement, ToStatement};
pub use status::Status;
pub use tokio_postgres;
pub use tokio_postgres::{IsolationLevel, Row};
pub use transaction::Transaction;

#[cfg(all(feature = "testing", unix))]
#[cfg_attr(docsrs, doc(cfg(feature = "testing")))]
pub mod testing;

/// Compiles the README's example.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
