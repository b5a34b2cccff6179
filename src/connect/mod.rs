//! How a connection is made, and how a running statement is cancelled over the same path.

mod ahead;
mod dial;
mod place;
mod wire;

pub(crate) use ahead::Ahead;
pub(crate) use dial::{Route, dial};
pub(crate) use place::{Place, Places};
pub(crate) use wire::{Observed, TransactionStatus, Wire};
