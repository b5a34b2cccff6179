//! One transaction from BEGIN to its known outcome.

mod begin;
mod commit;
mod outcome;
mod run;
#[allow(clippy::module_inception, reason = "the noun that the others are about")]
mod transaction;

pub(crate) use run::{Run, Step, held};
#[cfg(any(feature = "axum", feature = "actix-web"))]
pub(crate) use transaction::Hooks;
pub use transaction::Transaction;
