//! How a connection is made, the frames that pass on it, and how a running statement is cancelled over the same path.

mod dial;
mod exchange;
mod faults;
mod flight;
mod frames;
mod incoming;
mod ledger;
mod named;
mod outgoing;
mod owed;
mod place;
mod stream;
mod wire;

pub(crate) use dial::{Route, dial};
pub(crate) use faults::Fault;
pub(crate) use flight::{Kind, Rows, Step};
#[cfg(feature = "testing")]
pub(crate) use frames::extent;
pub(crate) use place::{Place, Places};
pub(crate) use stream::Observed;
pub(crate) use wire::{Begin, BlockFacts, TransactionStatus, Wire};
