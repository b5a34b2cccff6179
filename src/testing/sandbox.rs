//! A database as a test finds it, shared by all of its sessions and as it was afterwards.

use std::{io, time::Duration};

use tokio_postgres::{IsolationLevel, error::SqlState};

use super::{
    Faults,
    relay::{Mode, Relay},
};
use crate::config::SessionConfig;
use crate::error::Error;
use crate::manager::SessionManager;

/// One outer transaction that all sessions of a test share and that is rolled back at its end.
///
/// A test hands [`sessions`](Self::sessions) to the code under test, which uses them as it does in production: it takes
/// sessions from a pool, commits, rolls back, retries. All of it happens in one transaction of one real connection,
/// where a `COMMIT` is the release of a savepoint: it is seen by every later session of the same sandbox, and by nobody
/// else, ever. So tests need no database of their own, no cleaning up and no order, and run in parallel.
///
/// ```
/// use pg_session::testing::{PgServer, Sandbox, TestDatabase};
/// use pg_session::tokio_postgres::error::SqlState;
/// use pg_session::{Error, SessionManager};
///
/// /// The code under test.
/// async fn sign_up(sessions: &SessionManager, name: &str) -> Result<(), Error> {
///     sessions
///         .transaction(async |tx| {
///             tx.execute("INSERT INTO users (name) VALUES ($1)", &[&name]).await?;
///             Ok(())
///         })
///         .await
/// }
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
/// # let database = TestDatabase::create(PgServer::shared()?).await?;
/// # let (client, connection) = pg_session::tokio_postgres::connect(database.url(), pg_session::tokio_postgres::NoTls).await?;
/// # tokio::spawn(connection);
/// # client.batch_execute("CREATE TABLE users (name text PRIMARY KEY)").await?;
/// // One database for all tests, migrated once; a sandbox for each.
/// let sandbox = Sandbox::start(database.url()).await?;
/// let sessions = sandbox.sessions();
/// sign_up(&sessions, "ann").await?;
///
/// // Do retries work? The next commit fails as if another transaction had been in the way.
/// let faults = sandbox.faults();
/// faults.reset();
/// faults.fail_commit(1, SqlState::T_R_SERIALIZATION_FAILURE);
/// sign_up(&sessions, "bob").await?;
/// assert_eq!((faults.begins(), faults.commits()), (2, 2));
///
/// let row = sessions.acquire().await?.query_one("SELECT count(*) FROM users", &[]).await?;
/// assert_eq!(row.get::<_, i64>(0), 2);
/// sandbox.finish().await?; // rolls back, and complains of what was left open
/// # Ok(())
/// # }
/// ```
///
/// # How it works
///
/// It is a relay on a free port of 127.0.0.1 that speaks PostgreSQL's protocol, so whatever speaks that can use
/// [`url`](Self::url); there is no password and no TLS. It works on a thread of its own: any number of runtimes may use
/// it. A transaction of a client is a savepoint, and so is each request outside of one, so that an error ends nothing
/// but itself. Deferred constraints are checked where COMMIT would check them, READ ONLY is enforced, and settings made
/// with `SET LOCAL` end with their transaction.
///
/// While a session is in a transaction (from its first statement on), others wait, as long as the
/// [`wait_limit`](SandboxBuilder::wait_limit): a test must not hold a transaction open while it calls code that needs
/// another session.
///
/// # What is different from a database of one's own
///
/// - There are no concurrent transactions: they run one after the other, and none fails by another. For conflicts,
///   plan them: [`faults`](Self::faults). For locks, use a [`TestDatabase`](super::TestDatabase).
/// - `now()` stands still; use `clock_timestamp()` where time must pass.
/// - Notifications are never delivered, since nothing is committed.
/// - Session settings, roles, temporary tables and advisory locks are shared by all sessions of the sandbox.
/// - Temporary tables made with `ON COMMIT DROP` stay until they are dropped, or their session is reset.
/// - Sequences are not rolled back.
/// - What refuses to run in a transaction block cannot run: `VACUUM`, `CREATE DATABASE`, `CREATE INDEX CONCURRENTLY`,
///   `COMMIT` in a procedure.
/// - Rows that others commit after the sandbox has begun are not seen, unless its
///   [`isolation_level`](SandboxBuilder::isolation_level) is READ COMMITTED.
/// - Locks are held until the sandbox ends: two that write the same unique key or row, or take the same advisory lock,
///   wait for each other.
/// - `AND CHAIN`, two-phase commit and `DEALLOCATE ALL` are refused with SQLSTATE 0A000, and so is a prepared
///   SET TRANSACTION with a level: BEGIN can have one.
/// - `default_transaction_isolation` and the like have no effect, nor have start-up options of clients. Role and
///   options are those of the URL the sandbox was started with.
/// - `set_config(name, …, true)` ends with its transaction if `true` stands in the text, and a string or a parameter of a
///   prepared statement as its name; with anything else there, it lives on.
pub struct Sandbox {
    relay: Relay,
    sessions: SessionManager,
}

impl Sandbox {
    /// Opens a sandbox in the database of this URL, with the defaults of the [builder](Self::builder).
    ///
    /// # Errors
    ///
    /// See [`SandboxBuilder::start`].
    ///
    /// # Cancel safety
    ///
    /// See [`SandboxBuilder::start`].
    pub async fn start(url: &str) -> Result<Self, SandboxError> {
        Self::builder(url).start().await
    }

    /// A builder, for a sandbox with settings of its own.
    pub fn builder(url: &str) -> SandboxBuilder {
        SandboxBuilder {
            url: url.to_owned(),
            level: IsolationLevel::Serializable,
            wait_limit: Duration::from_secs(10),
        }
    }

    /// A URL for clients: `postgres://USER@127.0.0.1:PORT/DATABASE`.
    #[must_use]
    pub fn url(&self) -> String {
        self.relay.url()
    }

    /// A configuration for session managers; that of the database's URL, with the address of the sandbox.
    ///
    /// [`check_after_idle`](SessionConfig::check_after_idle) is zero, so that every acquire is
    /// [counted](Faults::acquires).
    #[must_use]
    pub fn config(&self) -> SessionConfig {
        self.relay.config()
    }

    /// A session manager of the sandbox, with [`config`](Self::config); clones of one that is made at the start.
    #[must_use]
    pub fn sessions(&self) -> SessionManager {
        self.sessions.clone()
    }

    /// What is to go wrong, and counters.
    #[must_use]
    pub fn faults(&self) -> Faults {
        self.relay.faults()
    }

    /// Rolls everything back, and complains of what a test should not leave behind.
    ///
    /// Dropping the sandbox rolls back as well, also while panicking, and complains of nothing. Its sessions end.
    /// Deferred constraints need no check here: every commit has made it.
    ///
    /// # Errors
    ///
    /// - [`InTransaction`](SandboxError::InTransaction): sessions were in a transaction still, after 2 s of waiting for
    ///   those that are being given up in the background.
    /// - [`Broken`](SandboxError::Broken): the outer transaction had ended, or its connection was lost.
    ///
    /// # Cancel safety
    ///
    /// Dropped, it rolls back all the same.
    pub async fn finish(self) -> Result<(), SandboxError> {
        self.relay.finish().await
    }
}

impl std::fmt::Debug for Sandbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sandbox").field("relay", &self.relay).finish_non_exhaustive()
    }
}

/// The settings of a [`Sandbox`].
#[derive(Clone)]
#[must_use = "a builder does nothing until `start` is called"]
pub struct SandboxBuilder {
    url: String,
    level: IsolationLevel,
    wait_limit: Duration,
}

impl SandboxBuilder {
    /// The isolation level of the outer transaction. Default SERIALIZABLE, so that every level a transaction may ask for
    /// is granted.
    ///
    /// A transaction that asks for a stronger one is refused (SQLSTATE 0A000). At READ COMMITTED, rows are seen that
    /// others commit while the sandbox is open, and it cannot fail by them.
    pub fn isolation_level(mut self, level: IsolationLevel) -> Self {
        self.level = level;
        self
    }

    /// How long a session waits while another is in a transaction, before its statement fails with SQLSTATE 55P03.
    /// Default 10 s: below the acquire timeout, and above what a transaction of a test takes.
    pub fn wait_limit(mut self, limit: Duration) -> Self {
        self.wait_limit = limit;
        self
    }

    /// Opens the sandbox: connects to the server and begins the outer transaction.
    ///
    /// # Errors
    ///
    /// - [`SandboxError::Config`]: the URL makes no sense, or asks for TLS.
    /// - [`SandboxError::LogIn`], [`SandboxError::Refused`]: the server refuses.
    /// - [`SandboxError::Io`]: the server cannot be reached, or no port or thread can be had.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: a sandbox nobody waits for is rolled back.
    pub async fn start(self) -> Result<Sandbox, SandboxError> {
        let config: SessionConfig = self.url.parse().map_err(SandboxError::Config)?;
        config.validate().map_err(SandboxError::Config)?;
        let mode = Mode::Sandbox { level: self.level.into(), wait_limit: self.wait_limit };
        let relay = Relay::start(config, mode).await?;
        let sessions = SessionManager::new(relay.config()).map_err(SandboxError::Config)?;
        Ok(Sandbox { relay, sessions })
    }
}

impl std::fmt::Debug for SandboxBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Not the URL: it may hold a password.
        f.debug_struct("SandboxBuilder")
            .field("level", &self.level)
            .field("wait_limit", &self.wait_limit)
            .finish_non_exhaustive()
    }
}

/// What can go wrong with a [`Sandbox`] or a [`FaultProxy`](super::FaultProxy) as a whole.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SandboxError {
    /// The URL cannot be used.
    #[error("the URL cannot be used")]
    Config(#[source] Error),

    /// The operating system refused something, or the server cannot be reached.
    #[error("could not {doing}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// Why it failed.
        source: io::Error,
    },

    /// The server did not let it in.
    #[error("could not log in to the server")]
    LogIn(#[source] tokio_postgres::Error),

    /// The server refused to begin the outer transaction.
    #[error("the server refused: {message} (SQLSTATE {})", code.code())]
    Refused {
        /// The SQLSTATE.
        code: SqlState,
        /// The server's message.
        message: String,
    },

    /// Sessions were inside a transaction when the sandbox was finished. It was rolled back.
    #[error(
        "{sessions} session(s) of the sandbox were still in a transaction: commit it, roll it back or drop it"
    )]
    InTransaction {
        /// How many.
        sessions: usize,
    },

    /// The outer transaction has ended, or its connection is lost; whatever was done since failed.
    #[error("the sandbox is broken: {0}")]
    Broken(String),

    /// The relay's thread has ended before its time.
    #[error("the relay has stopped")]
    Stopped,
}

impl SandboxError {
    /// For `map_err`: an I/O error, with what was being done.
    pub(super) fn io(doing: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Io { doing, source }
    }
}
