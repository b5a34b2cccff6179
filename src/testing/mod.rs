//! A throw-away PostgreSQL server and throw-away databases for tests.
//!
//! [`PgServer`] finds the server programs of the machine (PostgreSQL 14 or newer), makes a cluster in a
//! temporary directory, starts it, and leaves nothing behind. [`TestDatabase`] is a database of one test's
//! own, empty or cloned from a [`Template`] that was prepared once. Unix only.
//!
//! | you want | take |
//! |---|---|
//! | an empty database | [`TestDatabase::create`] on [`PgServer::shared`] |
//! | one with your schema and data in it | [`TestDatabase::from_template`], of [`Template::prepare`] |
//! | one on a server that is there already | [`TestDatabase::create_at`] |
//! | sessions in it | [`TestDatabase::sessions`], or a manager of its [`config`](TestDatabase::config) |
//! | to stop, kill or restart the server, or settings of its own | [`PgServer::start`], [`PgServer::builder`] |
//!
//! The shared server and the templates are made once in a process, and under cargo-nextest, which gives each test
//! a process of its own, once in a run: see [`PgServer::shared`] and [`Template::prepare`].
//!
//! ```
//! use pg_session::testing::{PgServer, Template, TestDatabase};
//! use pg_session::tokio_postgres::{self, NoTls};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
//! let server = PgServer::shared()?;
//! let template = Template::prepare(server, "app", async |url| {
//!     let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
//!     tokio::spawn(connection);
//!     client.batch_execute("CREATE TABLE users (id bigint PRIMARY KEY, name text NOT NULL)").await?;
//!     Ok(())
//! })
//! .await?;
//!
//! let database = TestDatabase::from_template(&template).await?;
//! assert!(database.url().starts_with("postgres://postgres@127.0.0.1:"));
//! # Ok(())
//! # }
//! ```
//!
//! Two relays stand between a test and a database:
//!
//! - [`Sandbox`]: all sessions of a test share one transaction that is rolled back at its end, while the code under test
//!   commits and rolls back as it likes. One migrated database serves all tests, in parallel.
//! - [`FaultProxy`]: passes everything on.
//!
//! In both, [`Faults`] makes statements and commits fail, answers get lost and acquires take long, and counts attempts.

mod backend;
mod batch;
mod binaries;
mod block;
mod client;
mod cluster;
mod control;
mod database;
mod error;
mod faults;
mod frames;
mod prepared;
mod process;
mod relay;
mod run;
mod sandbox;
mod server;
mod simple;
mod sql;

pub use database::{Template, TestDatabase};
pub use error::PgServerError;
pub use faults::{FaultProxy, Faults};
pub use sandbox::{Sandbox, SandboxBuilder, SandboxError};
pub use server::{PgServer, PgServerBuilder};
