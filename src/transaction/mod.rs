//! One transaction from BEGIN to its known outcome.

mod begin;
mod commit;
mod outcome;
mod run;
#[allow(clippy::module_inception, reason = "the noun that the others are about")]
mod transaction;

pub(crate) use run::{Run, Step, held};
#[allow(unused_imports, reason = "only the adapters name it")]
pub(crate) use transaction::Hooks;
pub use transaction::Transaction;
