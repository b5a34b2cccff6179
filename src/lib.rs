//! PostgreSQL sessions and transactions for async Rust: honest commits, clean sessions, safe retries, few round trips.

#![cfg_attr(docsrs, feature(doc_cfg))]

pub use tokio_postgres;

#[cfg(all(feature = "testing", unix))]
#[cfg_attr(docsrs, doc(cfg(feature = "testing")))]
pub mod testing;
