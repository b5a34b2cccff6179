//! What can be chosen for one transaction, and the BEGIN it makes.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use tokio_postgres::IsolationLevel;

use crate::error::Error;
use crate::retry::RetryPolicy;

/// The options of a transaction. What is not chosen is the server's default.
///
/// ```
/// use pg_session::TransactionOptions;
/// use std::time::Duration;
///
/// let report = TransactionOptions::serializable()
///     .read_only()
///     .deferrable()
///     .local_setting("app.tenant", "acme")
///     .deadline(Duration::from_secs(5))
///     .name("monthly report");
/// ```
///
/// All of it travels in one message with BEGIN, which itself travels with the first statement: no option costs a round
/// trip.
#[derive(Clone, Default)]
pub struct TransactionOptions {
    isolation_level: Option<IsolationLevel>,
    read_only: Option<bool>,
    deferrable: Option<bool>,
    local_settings: Vec<(Cow<'static, str>, Cow<'static, str>)>,
    pub(crate) deadline: Option<Duration>,
    pub(crate) retry: RetryPolicy,
    pub(crate) name: Option<Cow<'static, str>>,
}

impl TransactionOptions {
    /// All defaults.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Isolation level SERIALIZABLE: as if transactions ran one after the other (manual, chapter 13.2.3).
    #[must_use]
    pub fn serializable() -> Self {
        Self::new().isolation_level(IsolationLevel::Serializable)
    }

    /// Isolation level REPEATABLE READ: one snapshot for the whole transaction (manual, chapter 13.2.2).
    #[must_use]
    pub fn repeatable_read() -> Self {
        Self::new().isolation_level(IsolationLevel::RepeatableRead)
    }

    /// Isolation level READ COMMITTED: a snapshot for each statement (manual, chapter 13.2.1).
    #[must_use]
    pub fn read_committed() -> Self {
        Self::new().isolation_level(IsolationLevel::ReadCommitted)
    }

    /// Sets the isolation level. Default: the server's `default_transaction_isolation`.
    #[must_use]
    pub fn isolation_level(mut self, level: IsolationLevel) -> Self {
        self.isolation_level = Some(level);
        self
    }

    /// READ ONLY: a write fails with SQLSTATE 25006.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.read_only = Some(true);
        self
    }

    /// READ WRITE, where the server's default is READ ONLY.
    #[must_use]
    pub fn read_write(mut self) -> Self {
        self.read_only = Some(false);
        self
    }

    /// DEFERRABLE: with SERIALIZABLE and READ ONLY, the first query waits for a snapshot with which the transaction
    /// can never fail nor make others fail. Without effect otherwise.
    #[must_use]
    pub fn deferrable(mut self) -> Self {
        self.deferrable = Some(true);
        self
    }

    /// Sets a parameter for this transaction only, as `SET LOCAL` does; `app.tenant` and the like for row-level
    /// security. The value is sent as a parameter, or quoted. Applied again in every attempt.
    ///
    /// The name is one or more identifiers of letters, digits and `_`, separated by dots; another makes the
    /// transaction fail with [`Error::Config`] before anything is sent. An unknown parameter or bad value makes the
    /// first statement, which is not run, fail with [`Error::Database`].
    ///
    /// It is made by a query (`set_config`), which `SET LOCAL` is not. So under REPEATABLE READ and SERIALIZABLE the
    /// snapshot is taken before the first statement, also before a LOCK TABLE that waits; SET TRANSACTION ISOLATION LEVEL comes
    /// too late (25001); and a DEFERRABLE transaction waits for its snapshot before the setting counts.
    #[must_use]
    pub fn local_setting(
        mut self,
        name: impl Into<Cow<'static, str>>,
        value: impl Into<Cow<'static, str>>,
    ) -> Self {
        self.local_settings.push((name.into(), value.into()));
        self
    }

    /// How long the whole transaction may take: all attempts, the pauses between them and, by
    /// [`SessionManager::transaction`](crate::SessionManager::transaction), waiting for a session. Default: no limit.
    ///
    /// A COMMIT that was sent is not cut off by it; see [`commit_timeout`](crate::SessionConfig::commit_timeout).
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// When to run the closure again. Default: [`RetryPolicy::default`].
    #[must_use]
    pub fn retry(mut self, policy: RetryPolicy) -> Self {
        self.retry = policy;
        self
    }

    /// A name for spans and logs. Keep to few different ones, and put nothing secret in it.
    #[must_use]
    pub fn name(mut self, name: impl Into<Cow<'static, str>>) -> Self {
        self.name = Some(name.into());
        self
    }

    pub(crate) fn validate(&self) -> Result<(), Error> {
        for (name, value) in &self.local_settings {
            let identifier = |part: &str| {
                part.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
                    && part.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
            };
            if !name.split('.').all(identifier) {
                return Err(Error::config(format!("{name:?} is not the name of a setting")));
            }
            if value.contains('\0') {
                return Err(Error::config(format!("the value of {name:?} has a NUL character")));
            }
        }
        Ok(())
    }

    /// BEGIN with its modes, and the local settings.
    pub(crate) fn begin(&self) -> Cow<'static, str> {
        let modes = [
            self.isolation_level.map(level_clause),
            self.read_only.map(|only| if only { " READ ONLY" } else { " READ WRITE" }),
            self.deferrable.and_then(|deferrable| deferrable.then_some(" DEFERRABLE")),
        ];
        let modes = modes.into_iter().flatten().collect::<String>();
        if modes.is_empty() { "BEGIN".into() } else { format!("BEGIN{modes}").into() }
    }

    /// The settings that are made for the transaction only.
    pub(crate) fn local_settings(&self) -> &[(Cow<'static, str>, Cow<'static, str>)] {
        &self.local_settings
    }

    pub(crate) fn level(&self) -> &'static str {
        self.isolation_level.map_or("default", level_name)
    }
}

fn level_name(level: IsolationLevel) -> &'static str {
    // Behind the words that begin the clause.
    &level_clause(level)[" ISOLATION LEVEL ".len()..]
}

fn level_clause(level: IsolationLevel) -> &'static str {
    match level {
        IsolationLevel::ReadUncommitted => " ISOLATION LEVEL READ UNCOMMITTED",
        IsolationLevel::RepeatableRead => " ISOLATION LEVEL REPEATABLE READ",
        IsolationLevel::Serializable => " ISOLATION LEVEL SERIALIZABLE",
        // The driver's enum may grow; PostgreSQL has these four.
        _ => " ISOLATION LEVEL READ COMMITTED",
    }
}

impl fmt::Debug for TransactionOptions {
    /// Shows the names of local settings, not their values.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TransactionOptions")
            .field("isolation_level", &self.level())
            .field("read_only", &self.read_only)
            .field("deferrable", &self.deferrable)
            .field("local_settings", &self.local_settings.iter().map(|(name, _)| name).collect::<Vec<_>>())
            .field("deadline", &self.deadline)
            .field("retry", &self.retry)
            .field("name", &self.name)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn begin_says_what_was_chosen_and_nothing_else() {
        assert_eq!(TransactionOptions::new().begin(), "BEGIN");
        assert_eq!(TransactionOptions::new().read_write().begin(), "BEGIN READ WRITE");
        assert_eq!(
            TransactionOptions::serializable().read_only().deferrable().begin(),
            "BEGIN ISOLATION LEVEL SERIALIZABLE READ ONLY DEFERRABLE"
        );
        assert_eq!(TransactionOptions::repeatable_read().level(), "REPEATABLE READ");
    }

    #[test]
    fn names_that_are_not_settings_are_refused() {
        for name in ["", "a b", "a;b", "a.", ".a", "a'b", "1a", "a.1", "é"] {
            assert!(TransactionOptions::new().local_setting(name, "x").validate().is_err(), "{name:?}");
        }
        for name in ["search_path", "app.tenant", "_a.b_1"] {
            assert!(TransactionOptions::new().local_setting(name, "x").validate().is_ok(), "{name:?}");
        }
        assert!(TransactionOptions::new().local_setting("a.b", "\0").validate().is_err());
    }

    #[test]
    fn debug_hides_the_values_of_settings() {
        let options = TransactionOptions::new().local_setting("app.token", "hunter2");
        assert!(!format!("{options:?}").contains("hunter2"));
    }
}
