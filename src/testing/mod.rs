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

mod binaries;
mod database;
mod error;
mod process;
mod server;

pub use database::{Template, TestDatabase};
pub use error::PgServerError;
pub use server::{PgServer, PgServerBuilder};
