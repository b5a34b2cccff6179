//! Locking where nothing panics half-way.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks. Whoever uses this states that what the mutex holds is whole at every moment at which its holder could panic: then
/// a poisoned one is as good as any.
#[inline]
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
