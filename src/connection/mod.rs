//! One server connection: the rules, what performs them, and the verbs.

mod arrivals;
mod block;
#[allow(clippy::module_inception, reason = "the noun that the others are about")]
mod connection;
mod copy_in;
mod copy_out;
mod core;
mod drain;
mod group;
mod pooled;
mod prepare;
mod register;
mod repair;
mod request;
mod reset;
mod rows;
mod shell;
mod stream;
mod verbs;

pub use connection::Connection;
pub use copy_in::{CopyProgress, CopyRowsIn, TableName};
pub use copy_out::{ColumnIndex, CopiedRow, CopyRowsOut};
pub(crate) use core::Verdict;
pub use group::BatchResult;
pub(crate) use pooled::{ConnectionManager, Counted, watch};
pub(crate) use rows::Many;
pub use stream::{CopyIn, CopyOut, RowStream};
