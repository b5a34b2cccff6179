//! PostgreSQL sessions and transactions for async Rust: honest commits, clean sessions, safe retries, few round trips.

#![cfg_attr(docsrs, feature(doc_cfg))]
#![warn(clippy::unwrap_used)]

mod config;
mod connect;
mod connection;
mod error;
mod executor;
mod maintenance;
mod manager;
mod observe;
mod options;
mod retry;
mod session;
mod statements;
mod status;
mod transaction;

pub use config::{Reset, SessionConfig, TargetSessionAttrs};
pub use connection::{Connection, CopyIn, CopyOut, RowStream};
pub use error::{
    AcquireError, AcquirePhase, CommitUnknown, ConnectError, ConnectionLost, DriverError, Error, ServerError,
};
pub use executor::Executor;
pub use manager::{SessionManager, SessionManagerBuilder};
pub use options::TransactionOptions;
pub use retry::{RetryClass, RetryPolicy};
pub use session::Session;
pub use statements::{Source, ToStatement};
pub use status::Status;
pub use tokio_postgres;
pub use tokio_postgres::{IsolationLevel, Row, Statement};
pub use transaction::Transaction;

#[cfg(all(feature = "testing", unix))]
#[cfg_attr(docsrs, doc(cfg(feature = "testing")))]
pub mod testing;
