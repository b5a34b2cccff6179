//! What is to go wrong in a test, and when; and the proxy that makes it so on connections of their own.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio_postgres::error::SqlState;

use super::{
    SandboxError,
    relay::{Mode, Relay},
};
use crate::config::SessionConfig;
use crate::lock::lock;
use crate::manager::SessionManager;

/// Makes statements, commits and acquires go wrong, and counts them; of a [`Sandbox`](super::Sandbox) or a
/// [`FaultProxy`].
///
/// Clones share the plan. Numbers count from the call on: 1 is the next one, and 0 is taken as 1. Each fault happens
/// once. Those of one kind can be planned together: `fail_commit(1, …)` and `fail_commit(2, …)` fail the next two.
///
/// # What counts
///
/// | counter | counts |
/// |---|---|
/// | [`statements`](Self::statements) | each statement: one that the extended protocol executes (`query`, `execute`, `COPY` …), each of a [batch](crate::Batch), and each of a simple query (`batch_execute`) |
/// | [`begins`](Self::begins) | BEGIN and START TRANSACTION: the attempts at a transaction |
/// | [`commits`](Self::commits) | COMMIT and END that came from a client, whatever became of them |
/// | [`acquires`](Self::acquires) | the start-up of a connection, and the sign of life that a pool asks of an idle one |
///
/// Not statements are transaction control (BEGIN, COMMIT, ROLLBACK, savepoints, SET TRANSACTION), the local settings of
/// [`TransactionOptions`](crate::TransactionOptions), preparing, what `pg-session` sends to set up and reset a session,
/// and what the driver sends to look up types. The rows of `execute_many` count as one statement as far as they are sent
/// together, some thousands at a time. All of it is seen in both of the protocols, simple and extended; in the latter, what
/// the server skips since a statement under the same Sync has failed does not count.
///
/// A transaction's BEGIN travels with its first statement, so one that runs none is not counted.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    plan: Arc<Mutex<Plan>>,
}

#[derive(Debug, Default)]
struct Plan {
    statements: u64,
    begins: u64,
    commits: u64,
    acquires: u64,
    /// By the number of the statement.
    at_statement: BTreeMap<u64, SqlState>,
    /// By the number of the COMMIT.
    at_commit: BTreeMap<u64, AtCommit>,
    slow: (u32, Duration),
}

/// What becomes of a COMMIT.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum AtCommit {
    Fail(SqlState),
    LoseAnswer,
    CutBefore,
}

impl Faults {
    /// The `n`-th statement from now fails with this SQLSTATE instead of being run.
    ///
    /// The error is a real one of the server's, so a transaction is really aborted by it, and what comes behind it under
    /// the same Sync, as in a batch, is skipped. Its message is "injected by a test".
    pub fn fail_statement(&self, n: u32, state: SqlState) {
        let mut plan = lock(&self.plan);
        let number = plan.statements + u64::from(n.max(1));
        plan.at_statement.insert(number, state);
    }

    /// The `n`-th COMMIT from now fails with this SQLSTATE, and the transaction is rolled back: as a serialization
    /// failure (`40001`) or a deferred constraint (`23505`) makes it.
    pub fn fail_commit(&self, n: u32, state: SqlState) {
        self.at_commit(n, AtCommit::Fail(state));
    }

    /// The `n`-th COMMIT from now is carried out, and the connection ends before the answer: to the client, the outcome
    /// is [unknown](crate::Error::CommitUnknown).
    pub fn lose_commit_answer(&self, n: u32) {
        self.at_commit(n, AtCommit::LoseAnswer);
    }

    /// The connection ends before the server sees the `n`-th COMMIT from now: the transaction is rolled back, and to the
    /// client the outcome is [unknown](crate::Error::CommitUnknown) all the same.
    pub fn cut_before_commit(&self, n: u32) {
        self.at_commit(n, AtCommit::CutBefore);
    }

    fn at_commit(&self, n: u32, what: AtCommit) {
        let mut plan = lock(&self.plan);
        let number = plan.commits + u64::from(n.max(1));
        plan.at_commit.insert(number, what);
    }

    /// Each of the next `n` acquires takes this much longer.
    ///
    /// A pool that made its connections itself long ago asks them nothing when they are lent: the configurations handed
    /// out beside these faults have [`check_after_idle`](SessionConfig::check_after_idle) at zero, so that every acquire
    /// is seen.
    pub fn slow_acquire(&self, n: u32, delay: Duration) {
        lock(&self.plan).slow = (n, delay);
    }

    /// How many statements came, those that failed included.
    #[must_use]
    pub fn statements(&self) -> u64 {
        lock(&self.plan).statements
    }

    /// How many transactions were begun: the attempts.
    #[must_use]
    pub fn begins(&self) -> u64 {
        lock(&self.plan).begins
    }

    /// How many COMMITs came, whatever became of them.
    #[must_use]
    pub fn commits(&self) -> u64 {
        lock(&self.plan).commits
    }

    /// How many connections were made or asked for a sign of life.
    #[must_use]
    pub fn acquires(&self) -> u64 {
        lock(&self.plan).acquires
    }

    /// Forgets all faults still to come, and counts from zero again.
    pub fn reset(&self) {
        *lock(&self.plan) = Plan::default();
    }

    /// A statement has come; the SQLSTATE it is to fail with.
    pub(super) fn on_statement(&self) -> Option<SqlState> {
        let mut plan = lock(&self.plan);
        plan.statements += 1;
        let number = plan.statements;
        plan.at_statement.remove(&number)
    }

    pub(super) fn on_begin(&self) {
        lock(&self.plan).begins += 1;
    }

    pub(super) fn on_commit(&self) -> Option<AtCommit> {
        let mut plan = lock(&self.plan);
        plan.commits += 1;
        let number = plan.commits;
        plan.at_commit.remove(&number)
    }

    /// An acquire has come; how long it is to take longer.
    pub(super) fn on_acquire(&self) -> Option<Duration> {
        let mut plan = lock(&self.plan);
        plan.acquires += 1;
        let (left, delay) = plan.slow;
        plan.slow.0 = left.checked_sub(1)?;
        Some(delay)
    }
}

/// A proxy before a server, for tests of what a service does when statements, commits and connections fail.
///
/// Each connection to it has its own connection to the server, whose answers are passed on as they come; what goes wrong
/// is told by its [`faults`](Self::faults). Transactions are real ones and really committed, so use a database of the
/// test's own. To have everything undone as well, use the faults of a [`Sandbox`](super::Sandbox).
///
/// ```
/// use pg_session::tokio_postgres::error::SqlState;
/// use pg_session::testing::{FaultProxy, PgServer, TestDatabase};
/// use pg_session::Error;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
/// let database = TestDatabase::create(PgServer::shared()?).await?;
/// let proxy = FaultProxy::start(database.url()).await?;
/// let sessions = proxy.sessions();
/// sessions.acquire().await?.batch_execute("CREATE TABLE orders (id bigint PRIMARY KEY)").await?;
///
/// let faults = proxy.faults();
/// faults.reset(); // counts from here
/// faults.fail_statement(1, SqlState::T_R_SERIALIZATION_FAILURE);
/// faults.fail_commit(1, SqlState::T_R_DEADLOCK_DETECTED);
/// sessions
///     .transaction(async |tx| {
///         tx.execute("INSERT INTO orders VALUES (1)", &[]).await?;
///         Ok::<_, Error>(())
///     })
///     .await?;
/// assert_eq!(faults.begins(), 3); // the first failed in its statement, the second at COMMIT
///
/// faults.lose_commit_answer(1);
/// let lost = sessions.transaction(async |tx| {
///     tx.execute("INSERT INTO orders VALUES (2)", &[]).await?;
///     Ok::<_, Error>(())
/// });
/// assert!(lost.await.unwrap_err().is_commit_unknown()); // and never retried
/// # Ok(())
/// # }
/// ```
///
/// It listens on a free port of 127.0.0.1 and works on a thread of its own, so any number of runtimes may use it. It
/// speaks no TLS, neither with its clients nor with the server. Dropping it ends all of its connections.
#[derive(Debug)]
pub struct FaultProxy {
    relay: Relay,
    sessions: SessionManager,
}

impl FaultProxy {
    /// Starts a proxy before the server of this URL. Nothing is connected to yet.
    ///
    /// # Errors
    ///
    /// [`SandboxError::Config`] if the URL makes no sense; [`SandboxError::Io`] if no port or thread can be had.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: a proxy nobody waits for ends.
    pub async fn start(url: &str) -> Result<Self, SandboxError> {
        let config: SessionConfig = url.parse().map_err(SandboxError::Config)?;
        let relay = Relay::start(config, Mode::Proxy).await?;
        let sessions = SessionManager::new(relay.config()).map_err(SandboxError::Config)?;
        Ok(Self { relay, sessions })
    }

    /// The URL of the database by way of the proxy, with user, password and options as they were given.
    #[must_use]
    pub fn url(&self) -> String {
        self.relay.url()
    }

    /// The configuration that was given, by way of the proxy.
    ///
    /// [`check_after_idle`](SessionConfig::check_after_idle) is zero, so that every acquire is
    /// [counted](Faults::acquires).
    #[must_use]
    pub fn config(&self) -> SessionConfig {
        self.relay.config()
    }

    /// A session manager by way of the proxy, with [`config`](Self::config); clones of one that is made at the start.
    #[must_use]
    pub fn sessions(&self) -> SessionManager {
        self.sessions.clone()
    }

    /// What is to go wrong.
    #[must_use]
    pub fn faults(&self) -> Faults {
        self.relay.faults()
    }
}
