//! The places of a pool: one for each connection that the server has of it, on its way in and out included.
//!
//! A place goes with the socket and comes back when the server has closed its end: only then is its backend gone.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::time::timeout_at;

use crate::lock::lock;

/// The places that are taken, by number; with the time from which one counts as free even if nobody gave it back, as on
/// a runtime that stands still.
type Taken = HashMap<u64, Option<Instant>>;

#[derive(Debug)]
pub(crate) struct Places {
    number: usize,
    taken: Mutex<Taken>,
    next: AtomicU64,
    changed: Notify,
}

impl Places {
    pub(crate) fn new(number: usize) -> Arc<Self> {
        Arc::new(Self { number, taken: Mutex::default(), next: AtomicU64::new(0), changed: Notify::new() })
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        // Invariant: nothing panics while it is held, so a poisoned one is still consistent.
        lock(&self.taken)
    }

    /// Takes a place as soon as one is free.
    pub(crate) async fn take(self: &Arc<Self>) -> Arc<Place> {
        self.until(|taken| {
            (taken.len() < self.number).then(|| {
                let number = self.next.fetch_add(1, Relaxed);
                taken.insert(number, None);
                Arc::new(Place { places: Arc::clone(self), number })
            })
        })
        .await
    }

    /// Waits until none is taken, and `also` is so.
    pub(crate) async fn empty(&self, also: impl Fn() -> bool) {
        self.until(|taken| (taken.is_empty() && also()).then_some(())).await;
    }

    /// Waits until this one is free.
    pub(crate) async fn freed(&self, number: u64) {
        self.until(|taken| (!taken.contains_key(&number)).then_some(())).await;
    }

    /// Lets a place, if it is still taken, count for so long at most.
    pub(crate) fn limit(&self, number: u64, limit: Duration) {
        if let Some(until) = self.taken().get_mut(&number) {
            *until = Instant::now().checked_add(limit);
        }
        self.changed.notify_waiters();
    }

    async fn until<T>(&self, mut ready: impl FnMut(&mut Taken) -> Option<T>) -> T {
        loop {
            let mut changed = pin!(self.changed.notified());
            changed.as_mut().enable();
            let next = {
                let mut taken = self.taken();
                let now = Instant::now();
                taken.retain(|_, until| until.is_none_or(|at| at > now));
                if let Some(ready) = ready(&mut taken) {
                    return ready;
                }
                taken.values().flatten().min().copied()
            };
            match next {
                // Either way it is looked at again.
                Some(at) => drop(timeout_at(at.into(), changed).await),
                None => changed.await,
            }
        }
    }
}

/// A place that is taken until this is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    places: Arc<Places>,
    number: u64,
}

impl Place {
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// Counts for so long at most, from now.
    pub(crate) fn limit(&self, limit: Duration) {
        self.places.limit(self.number, limit);
    }

    /// Counts for as long as it lives.
    pub(crate) fn stay(&self) {
        self.places.taken().insert(self.number, None);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.taken().remove(&self.number);
        self.places.changed.notify_waiters();
    }
}
