//! The register of all connections of a pool that are open, lent or not.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::shell::Shell;
use crate::config::SessionConfig;
use crate::connect::Places;
use crate::lock::lock;

/// Every open connection of a pool, lent or not: what closing has to wait for, and may have to cut; and the places that
/// they take, with those that are on their way in or out.
#[derive(Debug)]
pub(crate) struct Register {
    open: Mutex<HashMap<u64, Arc<Shell>>>,
    pub(super) places: Arc<Places>,
    /// How long a connection that is given up may take to be gone: to be cancelled, and then to be closed.
    end_limit: Duration,
}

impl Register {
    pub(super) fn new(config: &SessionConfig) -> Self {
        Self {
            open: Mutex::default(),
            places: Places::new(config.max_size),
            end_limit: config.cleanup_timeout.saturating_mul(2),
        }
    }

    pub(super) fn add(self: &Arc<Self>, shell: &Arc<Shell>, place: u64) -> Registration {
        lock(&self.open).insert(place, Arc::clone(shell));
        Registration { register: Arc::clone(self), place }
    }

    /// A number that no other living pool has.
    pub(crate) fn id(self: &Arc<Self>) -> usize {
        Arc::as_ptr(self) as usize
    }

    /// Waits until none is open, and the server is done with all of them.
    pub(crate) async fn empty(&self) {
        self.places.empty(|| lock(&self.open).is_empty()).await;
    }

    /// Cuts all that are open; returns how many.
    pub(crate) fn cut(&self, reason: &'static str) -> usize {
        let open = lock(&self.open);
        for shell in open.values() {
            shell.cut(reason);
        }
        open.len()
    }
}

/// A connection's entry in the register, for as long as the connection lives.
#[derive(Debug)]
pub(crate) struct Registration {
    register: Arc<Register>,
    place: u64,
}

impl Registration {
    pub(super) fn pool_id(&self) -> usize {
        self.register.id()
    }

    /// The connection is given up: its place is free in a while, whatever becomes of it.
    pub(super) fn limit_place(&self) {
        self.register.places.limit(self.place, self.register.end_limit);
    }

    pub(super) async fn place_freed(&self) {
        self.register.places.freed(self.place).await;
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        lock(&self.register.open).remove(&self.place);
        self.limit_place();
    }
}
