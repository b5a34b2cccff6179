//! Units of work that are known before they begin: several statements, or one for many rows, in one flight.

use std::borrow::Cow;
use std::fmt;

use crate::connection::{BatchResult, Connection, Many};
use crate::error::Error;
use crate::manager::SessionManager;
use crate::options::TransactionOptions;
use crate::record::Record;
use crate::session::Session;
use crate::transaction::Transaction;

/// Statements that are sent together and cost one round trip, however many they are.
///
/// On a [transaction](Transaction::batch) they run inside it. On a [session](Session::batch) or on the
/// [manager](SessionManager::batch) they are a transaction of their own, and BEGIN and COMMIT travel along: all of
/// them take effect, or none, in one round trip. It is as honest about its outcome, and retried after a serialization
/// failure or deadlock, as [`Session::transaction`] is.
///
/// ```no_run
/// # async fn f(sessions: &pg_session::SessionManager, from: i64, to: i64, cents: i64) -> Result<(), pg_session::Error> {
/// let results = sessions
///     .batch()
///     .push("UPDATE accounts SET cents = cents - $2 WHERE id = $1", (from, cents))
///     .push("UPDATE accounts SET cents = cents + $2 WHERE id = $1 RETURNING cents", (to, cents))
///     .run()
///     .await?;
/// let balance: i64 = results[1].rows()[0].get(0);
/// # Ok(()) }
/// ```
///
/// For one statement and many rows there is [`execute_many`](Session::execute_many), which does not hold them all.
#[must_use = "a batch does nothing until it is run"]
pub struct Batch<'a> {
    target: Target<'a>,
    statements: Vec<Queued<'a>>,
}

struct Queued<'a> {
    sql: Cow<'a, str>,
    parameters: Box<dyn Record + Send + Sync + 'a>,
}

enum Target<'a> {
    Transaction(&'a Connection),
    Session(&'a mut Session, Option<TransactionOptions>),
    Manager(&'a SessionManager, Option<TransactionOptions>),
}

impl<'a> Batch<'a> {
    fn new(target: Target<'a>) -> Self {
        Self { target, statements: Vec::new() }
    }

    /// Adds a statement. Its parameters are a tuple, `()` for none, or any other [`Record`]; they are kept until the
    /// batch is dropped, so what they borrow must live as long.
    pub fn push(
        &mut self,
        sql: impl Into<Cow<'a, str>>,
        parameters: impl Record + Send + Sync + 'a,
    ) -> &mut Self {
        self.statements.push(Queued { sql: sql.into(), parameters: Box::new(parameters) });
        self
    }

    /// How many statements there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.statements.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.statements.is_empty()
    }

    /// Sends all of them, and returns their results in order. Without statements nothing is sent.
    ///
    /// One round trip more if this connection has not yet prepared some of the texts. With a [deadline](TransactionOptions::deadline), COMMIT is sent when the statements are answered: one
    /// round trip more as well, since a COMMIT under way cannot be given up.
    ///
    /// All results are in memory when this returns. It can be run again, and then does all of it again.
    ///
    /// # Errors
    ///
    /// [`Error::Batch`] names the first statement that is refused, or whose parameters do not fit; in the latter case
    /// nothing was sent. In a transaction, that is aborted by a refusal as by that of any statement; a batch of its own
    /// is rolled back. Otherwise as [`Connection::query`] and, without a transaction around it,
    /// [`Session::transaction`].
    ///
    /// # Cancel safety
    ///
    /// In a transaction, as every verb: see [`Connection`]. A batch of its own is not cancelled once it is sent, because
    /// COMMIT is on its way: the server carries it out or not, and nobody is told which.
    pub async fn run(&mut self) -> Result<Vec<BatchResult>, Error> {
        let statements = &self.statements[..];
        if statements.is_empty() {
            return Ok(Vec::new());
        }
        match &mut self.target {
            Target::Transaction(connection) => {
                let (bound, _) = connection.bind(pairs(statements)).await?;
                connection.run_group(&bound, false).await
            }
            Target::Session(session, options) => {
                let options = options.as_ref().unwrap_or(&session.shell.config().transactions);
                session.run(options, async |tx| run_alone(tx, statements, options).await).await
            }
            Target::Manager(manager, options) => {
                let options = options.as_ref().unwrap_or(&manager.config().transactions);
                manager.run(options, async |tx| run_alone(tx, statements, options).await).await
            }
        }
    }
}

fn pairs<'s>(
    statements: &'s [Queued<'_>],
) -> impl Iterator<Item = (&'s str, &'s (dyn Record + Send + Sync))> + Clone {
    statements.iter().map(|queued| (&*queued.sql, &*queued.parameters))
}

/// All statements of a transaction; with its COMMIT, unless that must be held back.
async fn run_alone(
    tx: &Transaction<'_>,
    statements: &[Queued<'_>],
    options: &TransactionOptions,
) -> Result<Vec<BatchResult>, Error> {
    let (bound, traits) = tx.bind(pairs(statements)).await?;
    // A COMMIT that is under way cannot be given up; and SQL that controls transactions must be watched from statement
    // to statement.
    if options.deadline.is_some() || traits.controls {
        tx.run_group(&bound, false).await
    } else {
        tx.commit_with(tx.run_group(&bound, true)).await
    }
}

impl SessionManager {
    /// Statements that are sent together, as a transaction of their own, on a session of their own, with the [default
    /// options](crate::SessionConfig::transactions). See [`Batch`].
    pub fn batch(&self) -> Batch<'_> {
        Batch::new(Target::Manager(self, None))
    }

    /// As [`batch`](Self::batch), with options of its own.
    pub fn batch_with(&self, options: TransactionOptions) -> Batch<'_> {
        Batch::new(Target::Manager(self, Some(options)))
    }
}

impl Session {
    /// Statements that are sent together, as a transaction of their own, with the [default
    /// options](crate::SessionConfig::transactions). See [`Batch`].
    pub fn batch(&mut self) -> Batch<'_> {
        Batch::new(Target::Session(self, None))
    }

    /// As [`batch`](Self::batch), with options of its own.
    pub fn batch_with(&mut self, options: TransactionOptions) -> Batch<'_> {
        Batch::new(Target::Session(self, Some(options)))
    }

    /// Runs one statement for many rows of parameters, as a transaction of its own: all rows or none. Returns how many
    /// rows it touched in all.
    ///
    /// Rows are taken from the iterator as the server gets through them, and sent in windows of some 128 KiB; at most
    /// two are in memory. A single window costs one round trip, BEGIN and COMMIT included. For rows that are only
    /// stored, [`copy_rows_in`](Connection::copy_rows_in) is faster still.
    ///
    /// ```no_run
    /// # async fn f(session: &mut pg_session::Session) -> Result<(), pg_session::Error> {
    /// let prices = (0..10_000i64).map(|id| (id, id * 100));
    /// let touched = session.execute_many("UPDATE items SET price_cents = $2 WHERE id = $1", prices).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// It is never retried, because the iterator is used up, and has no deadline; where that matters, call [the
    /// transaction's](Transaction::execute_many) inside [`transaction`](Self::transaction).
    ///
    /// # Errors
    ///
    /// [`Error::Batch`] names the first row that does not fit or is refused. Otherwise as
    /// [`transaction`](Self::transaction). [`Error::Config`] for COPY.
    ///
    /// # Cancel safety
    ///
    /// Dropped before the last window is sent, nothing is stored. Later, all of it is or nothing, and nobody is told
    /// which.
    pub async fn execute_many<R: Record>(
        &mut self,
        sql: &str,
        rows: impl IntoIterator<Item = R>,
    ) -> Result<u64, Error> {
        let mut tx = self.begin().await?;
        let touched = run_many(&tx, sql, rows.into_iter(), true).await;
        tx.end_with(touched).await
    }
}

/// All rows, in their windows; with the transaction's COMMIT behind the last of them, if it is to `conclude` it.
async fn run_many<R: Record>(
    tx: &Transaction<'_>,
    sql: &str,
    rows: impl Iterator<Item = R>,
    conclude: bool,
) -> Result<u64, Error> {
    let Some(mut many) = Many::new(tx, sql, rows).await? else { return Ok(0) };
    if conclude && many.may_commit() { tx.commit_with(many.run(true)).await } else { many.run(false).await }
}

impl Transaction<'_> {
    /// Statements that are sent together, inside this transaction. See [`Batch`].
    pub fn batch(&self) -> Batch<'_> {
        Batch::new(Target::Transaction(self))
    }

    /// Runs one statement for many rows of parameters, inside this transaction; see [`Session::execute_many`]. Returns
    /// how many rows it touched in all.
    ///
    /// Other statements of this transaction fail with [`Error::Busy`] meanwhile; and so does this beside one that is under
    /// way.
    ///
    /// # Errors
    ///
    /// [`Error::Batch`] names the first row that does not fit or is refused. Once some rows were sent, any error aborts
    /// the transaction, even one that the server knows nothing of; put it in a [`savepoint`](Self::savepoint) to go on
    /// after it. Otherwise as [`Connection::query`]. [`Error::Config`] for COPY.
    ///
    /// # Cancel safety
    ///
    /// Dropped once some rows were sent, the transaction is aborted.
    pub async fn execute_many<R: Record>(
        &self,
        sql: &str,
        rows: impl IntoIterator<Item = R>,
    ) -> Result<u64, Error> {
        run_many(self, sql, rows.into_iter(), false).await
    }
}

impl fmt::Debug for Batch<'_> {
    /// Without parameters, which are nobody's business in a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let statements: Vec<&str> = self.statements.iter().map(|queued| &*queued.sql).collect();
        f.debug_struct("Batch").field("statements", &statements).finish_non_exhaustive()
    }
}
