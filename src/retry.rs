//! Whether to run a transaction again, and how long to wait first: pure data and a pure function, no clock.

use std::time::Duration;

/// The kinds of failure after which a whole transaction may be run again.
///
/// | SQLSTATE | class | by default | why |
/// |---|---|---|---|
/// | `40001` serialization_failure | [`Serialization`](Self::Serialization) | retried | the manual asks for it (chapter 13.5) |
/// | `40P01` deadlock_detected | [`Deadlock`](Self::Deadlock) | retried | "advisable" there |
/// | `0A000` from `RevalidateCachedQuery`, `26000` | [`StaleStatement`](Self::StaleStatement) | retried | a cached statement outlived a change of schema; it is prepared afresh |
/// | `55P03` lock_not_available | [`LockNotAvailable`](Self::LockNotAvailable) | not retried | `NOWAIT` and `lock_timeout` are often meant as an answer |
/// | `23505`, `23P01` | [`KeyConflict`](Self::KeyConflict) | not retried | can be a lasting error; useful where keys are chosen by reading first |
/// | `57P01`, `57P02`, `57P03`, class `08` but for `08P01`, whatever else the server ends a session with, a closed connection | [`ConnectionLost`](Self::ConnectionLost) | not retried | safe in the database before COMMIT, but the closure's other effects are run twice |
/// | `25006` read_only_sql_transaction | [`ReadOnlyServer`](Self::ReadOnlyServer) | not retried | after a failover, on a fresh connection |
/// | `40003`, `08007`, and no answer to COMMIT | – | never | may have been committed |
/// | `25P02` | – | never by itself | only a symptom; the first error decides |
/// | everything else | – | never | would fail again |
///
/// What decides is the phase as much as the code: once COMMIT was sent, only an answer of severity ERROR means that
/// the transaction was rolled back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RetryClass {
    /// `40001`.
    Serialization,
    /// `40P01`.
    Deadlock,
    /// `0A000` "cached plan must not change result type", and `26000` "prepared statement does not exist".
    StaleStatement,
    /// `55P03`.
    LockNotAvailable,
    /// `23505` and `23P01`.
    KeyConflict,
    /// The connection was lost before COMMIT was sent. Needs a fresh connection, so only
    /// [`SessionManager::transaction`](crate::SessionManager::transaction) can retry it.
    ConnectionLost,
    /// `25006`. Needs a fresh connection, as above.
    ReadOnlyServer,
}

/// The table above, as the code reads it.
const TABLE: &[(&str, RetryClass)] = &[
    ("40001", RetryClass::Serialization),
    ("40P01", RetryClass::Deadlock),
    ("26000", RetryClass::StaleStatement),
    ("55P03", RetryClass::LockNotAvailable),
    ("23505", RetryClass::KeyConflict),
    ("23P01", RetryClass::KeyConflict),
    ("57P01", RetryClass::ConnectionLost),
    ("57P02", RetryClass::ConnectionLost),
    ("57P03", RetryClass::ConnectionLost),
    ("08000", RetryClass::ConnectionLost),
    ("08001", RetryClass::ConnectionLost),
    ("08003", RetryClass::ConnectionLost),
    ("08004", RetryClass::ConnectionLost),
    ("08006", RetryClass::ConnectionLost),
    ("25006", RetryClass::ReadOnlyServer),
];

impl RetryClass {
    /// The class of a SQLSTATE, or `None` if it is never retried.
    ///
    /// `0A000` is not here: only together with the routine that raised it does it mean a stale statement.
    #[must_use]
    pub fn of(code: &str) -> Option<Self> {
        TABLE.iter().find(|(c, _)| *c == code).map(|(_, class)| *class)
    }

    fn bit(self) -> u8 {
        1 << self as u8
    }

    /// Whether the connection it happened on cannot be used for the next attempt.
    pub(crate) fn needs_fresh_connection(self) -> bool {
        matches!(self, Self::ConnectionLost | Self::ReadOnlyServer)
    }
}

/// How often, after what, and with which pauses a transaction is run again.
///
/// | setting | default | why |
/// |---|---|---|
/// | [`max_attempts`](Self::max_attempts) | 10 | counts the first; three are too few under real contention |
/// | [`base_delay`](Self::base_delay) | 5 ms | doubles with each attempt |
/// | [`max_delay`](Self::max_delay) | 1 s | |
/// | [`max_elapsed`](Self::max_elapsed) | 30 s | no attempt begins later than this after the first |
///
/// The pause is drawn evenly from zero to the bound ("full jitter"), so that colliding transactions do not collide
/// again in step.
///
/// ```
/// use pg_session::{RetryClass, RetryPolicy};
/// use std::time::Duration;
///
/// let policy = RetryPolicy::default().max_attempts(3).base_delay(Duration::from_millis(10));
/// let bound = |attempt| policy.delay_bound(attempt, Duration::ZERO, RetryClass::Deadlock);
/// assert_eq!(bound(1), Some(Duration::from_millis(10)));
/// assert_eq!(bound(2), Some(Duration::from_millis(20)));
/// assert_eq!(bound(3), None); // the third attempt was the last
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    max_attempts: u32,
    base_delay: Duration,
    max_delay: Duration,
    max_elapsed: Duration,
    classes: u8,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            max_attempts: 10,
            base_delay: Duration::from_millis(5),
            max_delay: Duration::from_secs(1),
            max_elapsed: Duration::from_secs(30),
            classes: RetryClass::Serialization.bit()
                | RetryClass::Deadlock.bit()
                | RetryClass::StaleStatement.bit(),
        }
    }
}

impl RetryPolicy {
    /// A policy under which every transaction runs once.
    #[must_use]
    pub fn never() -> Self {
        Self { max_attempts: 1, ..Self::default() }
    }

    /// The most times the closure is run, the first included. `0` is taken as `1`. Default 10.
    #[must_use]
    pub fn max_attempts(mut self, attempts: u32) -> Self {
        self.max_attempts = attempts.max(1);
        self
    }

    /// The bound of the first pause; it doubles with each attempt. Default 5 ms.
    #[must_use]
    pub fn base_delay(mut self, delay: Duration) -> Self {
        self.base_delay = delay;
        self
    }

    /// The bound no pause exceeds. Default 1 s.
    #[must_use]
    pub fn max_delay(mut self, delay: Duration) -> Self {
        self.max_delay = delay;
        self
    }

    /// No further attempt begins later than this after the first began. Default 30 s.
    #[must_use]
    pub fn max_elapsed(mut self, elapsed: Duration) -> Self {
        self.max_elapsed = elapsed;
        self
    }

    /// Also retries this class.
    #[must_use]
    pub fn retry_on(mut self, class: RetryClass) -> Self {
        self.classes |= class.bit();
        self
    }

    /// Does not retry this class.
    #[must_use]
    pub fn no_retry_on(mut self, class: RetryClass) -> Self {
        self.classes &= !class.bit();
        self
    }

    /// Whether this policy retries the class at all.
    #[must_use]
    pub fn retries(&self, class: RetryClass) -> bool {
        self.max_attempts > 1 && self.classes & class.bit() != 0
    }

    /// After attempt number `attempt` (the first is 1) failed with `class`, `elapsed` after the first began: the
    /// upper bound of the pause before the next one, or `None` if there is to be none.
    #[must_use]
    pub fn delay_bound(&self, attempt: u32, elapsed: Duration, class: RetryClass) -> Option<Duration> {
        if !self.retries(class) || attempt >= self.max_attempts || elapsed >= self.max_elapsed {
            return None;
        }
        if class == RetryClass::StaleStatement {
            return Some(Duration::ZERO); // nobody to make way for
        }
        let doubled = self.base_delay.saturating_mul(1u32 << (attempt.saturating_sub(1)).min(20));
        let left = self.max_elapsed - elapsed;
        Some(doubled.min(self.max_delay).min(left))
    }
}

/// A pause drawn evenly from zero to `bound`.
pub(crate) fn jitter(bound: Duration) -> Duration {
    bound.mul_f64(fastrand::f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn the_bound_doubles_up_to_the_limit() {
        let policy = RetryPolicy::default().max_attempts(100).max_delay(MS * 100);
        let bounds: Vec<_> =
            (1..8).map(|n| policy.delay_bound(n, Duration::ZERO, RetryClass::Serialization)).collect();
        assert_eq!(bounds, [5, 10, 20, 40, 80, 100, 100].map(|n| Some(MS * n)));
        assert_eq!(policy.delay_bound(99, Duration::ZERO, RetryClass::Serialization), Some(MS * 100));
    }

    #[test]
    fn neither_attempts_nor_time_are_exceeded() {
        let policy = RetryPolicy::default().max_attempts(3).max_elapsed(MS * 50);
        assert!(policy.delay_bound(2, MS * 49, RetryClass::Deadlock).is_some());
        assert_eq!(policy.delay_bound(2, MS * 49, RetryClass::Deadlock), Some(MS));
        assert_eq!(policy.delay_bound(3, MS, RetryClass::Deadlock), None);
        assert_eq!(policy.delay_bound(1, MS * 50, RetryClass::Deadlock), None);
        assert_eq!(RetryPolicy::never().delay_bound(1, MS, RetryClass::Deadlock), None);
        assert_eq!(RetryPolicy::default().max_attempts(0), RetryPolicy::never());
    }

    #[test]
    fn only_chosen_classes_are_retried() {
        let policy = RetryPolicy::default();
        for (code, class) in TABLE {
            let default = matches!(*code, "40001" | "40P01" | "26000");
            assert_eq!(policy.retries(*class), default, "{code}");
            assert!(policy.clone().retry_on(*class).retries(*class));
            assert!(!policy.clone().no_retry_on(*class).retries(*class));
        }
        for never in ["25P02", "40003", "08007", "57014", "42601", "22012", "25P03", "0A000", "53100"] {
            assert_eq!(RetryClass::of(never), None, "{never}");
        }
    }

    #[test]
    fn jitter_stays_within_the_bound_and_varies() {
        let drawn: Vec<_> = (0..200).map(|_| jitter(MS * 100)).collect();
        assert!(drawn.iter().all(|d| *d <= MS * 100));
        assert!(drawn.iter().any(|d| *d < MS * 30) && drawn.iter().any(|d| *d > MS * 70));
    }
}
