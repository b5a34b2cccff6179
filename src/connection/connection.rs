//! One server connection: what it consists of, and how it is closed.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use deadpool_postgres::ClientWrapper;
use tokio::runtime::Handle;

use super::core::Block;
use super::drain;
use super::register::Registration;
use super::shell::Shell;
use crate::connect::{TransactionStatus, Wire};
use crate::error::Error;

/// One server connection on loan: what [`Session`](crate::Session) and [`Transaction`](crate::Transaction) dereference
/// to, and so the type that a function takes when it does not care which of them it gets.
///
/// ```no_run
/// use pg_session::{Connection, Error};
///
/// async fn name_of(db: &Connection, id: i64) -> Result<Option<String>, Error> {
///     let row = db.query_opt("SELECT name FROM users WHERE id = $1", &[&id]).await?;
///     Ok(row.map(|row| row.get(0)))
/// }
/// # async fn f(sessions: pg_session::SessionManager) -> Result<(), Error> {
/// let mut session = sessions.acquire().await?;
/// name_of(&session, 1).await?;
/// session.transaction(async |tx| name_of(tx, 2).await).await?;
/// # Ok(()) }
/// ```
///
/// The verbs are the driver's. Where they take SQL text, it is prepared the first time this connection sees it (one
/// round trip more) and kept in a bounded cache. They take `&self`: several may run at once, as under `try_join!`, and
/// are then pipelined. While one prepares its statement the others wait, and so they do until a transaction's BEGIN, which
/// travels with its first statement, is confirmed.
/// Row streams, COPY and `execute_many` need the connection for themselves.
///
/// # Cancel safety
///
/// The same for every verb. A future that was never polled has sent nothing. Dropped later, its statement is cancelled
/// on the server in the background, within [`cleanup_timeout`](crate::SessionConfig::cleanup_timeout), and the next
/// statement on this connection waits for that; whether it took effect is unknown outside a transaction. A transaction
/// that it was part of is never committed, whatever it did: it fails with
/// [`Error::StatementAbandoned`]; inside a savepoint, until that is rolled back. A cancel request
/// stops whatever the server's session runs, so none is sent while another statement of this connection is still waited
/// for.
pub struct Connection {
    pub(crate) client: Arc<ClientWrapper>,
    pub(crate) shell: Arc<Shell>,
    pub(super) watches_client: bool,
    pub(crate) expires: Option<Instant>,
    /// When it was last given back.
    pub(crate) idle_since: Instant,
    pub(super) registration: Registration,
}

impl Connection {
    #[inline]
    pub(crate) fn wire(&self) -> &Wire {
        &self.shell.wire
    }

    /// The process id of the server's backend, as in `pg_stat_activity`.
    #[must_use]
    pub fn process_id(&self) -> i32 {
        self.wire().process_id()
    }

    /// How many prepared statements the cache holds.
    #[must_use]
    pub fn cached_statements(&self) -> usize {
        self.shell.statements().len()
    }

    /// Whether no transaction of ours is open. One that SQL began may have been ended by the very statement that was lost.
    pub(super) fn is_outside(&self) -> bool {
        self.shell.core().block() == Block::None
    }

    /// Whether no transaction is open, neither one of ours nor one that SQL began.
    pub(super) fn is_outside_of_block(&self) -> bool {
        self.shell.core().block() == Block::None && self.wire().status() == TransactionStatus::Idle
    }

    /// Where its I/O lives.
    pub(crate) fn runtime(&self) -> Handle {
        self.shell.runtime.clone()
    }

    /// It goes back to the pool.
    pub(crate) fn rest(&mut self, now: Instant) {
        self.idle_since = now;
    }

    /// Which pool it belongs to.
    pub(crate) fn pool_id(&self) -> usize {
        self.registration.pool_id()
    }

    pub(crate) fn forget_statements(&self) {
        self.shell.statements().clear();
        self.client.clear_type_cache();
    }

    pub(super) fn explain(&self, error: tokio_postgres::Error) -> Error {
        self.shell.explain(error, self.is_outside())
    }

    /// Starts to drain, if the core has said so.
    pub(super) fn drain_if(&self, start: bool) {
        if start {
            drain::start(&self.shell, &self.client);
        }
    }

    /// Whether something may be running on the server that should be stopped before the connection is closed.
    pub(super) fn is_left_running(&self) -> bool {
        let core = self.shell.core();
        let busy = !core.is_free() || core.is_raw() || self.wire().answered() < self.wire().sent();
        busy && !core.is_ending()
    }

    /// Closes it for good; first stops what may be running on the server.
    pub(crate) fn close(self, reason: &'static str) {
        let cancel = self.is_left_running();
        self.shell.lose(reason);
        if cancel {
            let shell = Arc::clone(&self.shell);
            let client = self.client;
            shell.runtime.clone().spawn(async move {
                shell.cancel_and_hang_up(true).await;
                drop(client);
            });
        }
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("process_id", &self.process_id())
            .field("status", &self.wire().status())
            .field("cached_statements", &self.cached_statements())
            .finish_non_exhaustive()
    }
}
