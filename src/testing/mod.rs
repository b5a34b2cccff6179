//! A throw-away PostgreSQL server and throw-away databases for tests.
//!
//! [`PgServer`] finds the server programs of the machine (PostgreSQL 14 or newer), makes a cluster in a
//! temporary directory, starts it, and leaves nothing behind. [`TestDatabase`] is a database of one test's
//! own, empty or cloned from a [`Template`] that was prepared once. Unix only.
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
mod database;
mod error;
mod faults;
mod frames;
mod process;
mod relay;
mod sandbox;
mod server;
mod sql;

pub use database::{Template, TestDatabase};
pub use error::PgServerError;
pub use faults::{FaultProxy, Faults};
pub use sandbox::{Sandbox, SandboxBuilder, SandboxError};
pub use server::{PgServer, PgServerBuilder};
