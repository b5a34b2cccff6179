//! A connection on loan: it goes back clean, or not at all.

use std::fmt;
use std::ops::Deref;
use std::time::Instant;

use deadpool::managed::Object;
use tracing::Instrument;

use crate::connection::{Connection, ConnectionManager, Verdict};
use crate::error::Error;
use crate::observe;
use crate::options::TransactionOptions;
use crate::transaction::{Run, Step, Transaction};

/// A session with the server, lent by a [`SessionManager`](crate::SessionManager) until it is dropped.
///
/// Has every verb of [`Connection`], to which it dereferences. It starts as a new session would: no transaction, no
/// setting, temporary table, lock or cursor of whoever had the connection before.
///
/// # What dropping it does
///
/// | its state | what happens |
/// |---|---|
/// | idle and clean | back to the pool at once, without a round trip |
/// | in a transaction, aborted or not | rolled back first |
/// | a statement still running that nobody waits for | cancelled and drained first |
/// | dirty: `SET`, `LISTEN`, temporary tables, session locks, `batch_execute`, the raw client … | reset first |
/// | a panic unwinds through it, or it cannot be repaired in time | closed |
///
/// What no reset undoes is left: the seed of `random()`, loaded libraries, and what `lastval` and `currval` return after
/// an INSERT took a number from a sequence in a session that was otherwise clean.
///
/// The repair runs in the background, within [`cleanup_timeout`](crate::SessionConfig::cleanup_timeout), while the place
/// in the pool counts as taken.
pub struct Session {
    /// `None` only while being dropped.
    object: Option<Object<ConnectionManager>>,
}

impl Session {
    pub(crate) fn new(object: Object<ConnectionManager>) -> Self {
        Self { object: Some(object) }
    }

    #[inline]
    fn connection(&self) -> &Connection {
        // Invariant: taken only in `drop`.
        self.object.as_ref().expect("a session has its connection until it is dropped")
    }

    /// Runs a unit of work: BEGIN, the closure, COMMIT; with the [default
    /// options](crate::SessionConfig::transactions).
    ///
    /// On `Ok` it is committed, on `Err` rolled back and the closure's error returned. After a serialization failure or
    /// deadlock, wherever it shows up and whatever the closure made of it, the closure is run again in a new
    /// transaction, up to [the policy's](crate::RetryPolicy) limits. That is why it must be `Clone`: each attempt gets
    /// a fresh copy of what it captured, and a closure that captures `&mut` state, which would carry over from a
    /// failed attempt into the next, does not compile. Anything else it does outside the database is done again.
    ///
    /// ```no_run
    /// # async fn f(session: &mut pg_session::Session, from: i64, to: i64, cents: i64) -> Result<(), pg_session::Error> {
    /// session.transaction(async |tx| {
    ///     tx.execute("UPDATE accounts SET cents = cents - $2 WHERE id = $1", &[&from, &cents]).await?;
    ///     tx.execute("UPDATE accounts SET cents = cents + $2 WHERE id = $1", &[&to, &cents]).await?;
    ///     Ok(())
    /// }).await
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// What the closure fails with. By `E: From<Error>` also: [`Error::Aborted`] if it returned `Ok` although a
    /// statement had failed; [`Error::Database`] if COMMIT was refused, as by a deferred constraint;
    /// [`Error::RetriesExhausted`]; [`Error::DeadlineExceeded`]; [`Error::CommitUnknown`];
    /// [`Error::TransactionEnded`]; [`Error::ConnectionLost`].
    ///
    /// # Cancel safety
    ///
    /// Dropped before COMMIT was sent, the transaction is rolled back and what it runs is cancelled. Dropped while
    /// COMMIT is under way, it is committed or rolled back, and nobody is told which.
    pub async fn transaction<T, E, F>(&mut self, f: F) -> Result<T, E>
    where
        F: AsyncFnOnce(&mut Transaction<'_>) -> Result<T, E> + Clone,
        E: From<Error>,
    {
        self.run(&self.connection().shell.config().transactions, f).await
    }

    /// As [`transaction`](Self::transaction), with options of its own.
    ///
    /// # Errors
    ///
    /// As [`transaction`](Self::transaction), and [`Error::Config`] for an option that cannot be used.
    ///
    /// # Cancel safety
    ///
    /// As [`transaction`](Self::transaction).
    pub async fn transaction_with<T, E, F>(&mut self, options: TransactionOptions, f: F) -> Result<T, E>
    where
        F: AsyncFnOnce(&mut Transaction<'_>) -> Result<T, E> + Clone,
        E: From<Error>,
    {
        self.run(&options, f).await
    }

    pub(crate) async fn run<T, E, F>(&self, options: &TransactionOptions, f: F) -> Result<T, E>
    where
        F: AsyncFnOnce(&mut Transaction<'_>) -> Result<T, E> + Clone,
        E: From<Error>,
    {
        let mut run = Run::new(options);
        let span = run.span();
        let step = run.on(self.connection(), false, f).instrument(span).await;
        run.run_hooks(true).await;
        match step {
            Step::Done(result) => result,
            // Only a caller that may move is asked to.
            Step::Release(_) => Err(self.connection().shell.lost("the connection was given up").into()),
        }
    }

    /// Begins a transaction that is ended by hand: [`commit`](Transaction::commit) or
    /// [`rollback`](Transaction::rollback). It is never retried. Dropped instead, it is rolled back.
    ///
    /// # Errors
    ///
    /// [`Error::InTransaction`] if raw SQL has begun one; [`Error::ConnectionLost`]; [`Error::Config`].
    ///
    /// # Cancel safety
    ///
    /// Nothing is sent before the first statement.
    pub async fn begin(&mut self) -> Result<Transaction<'_>, Error> {
        let options = self.connection().shell.config().transactions.clone();
        self.begin_with(options).await
    }

    /// As [`begin`](Self::begin), with options of its own. A retry policy and a deadline have no effect.
    ///
    /// # Errors
    ///
    /// As [`begin`](Self::begin).
    ///
    /// # Cancel safety
    ///
    /// As [`begin`](Self::begin).
    pub async fn begin_with(&mut self, options: TransactionOptions) -> Result<Transaction<'_>, Error> {
        let connection = self.connection();
        connection.claim().await?;
        Transaction::begin(connection, &options)
    }

    /// The driver's own client, for libraries that want it. Waits until nothing is under way on this session.
    ///
    /// What it is used for is not seen, so the session counts as dirty when it returns: it is rolled back and reset. Its
    /// transactions have none of the safety of [`transaction`](Self::transaction). The next statement of this session first
    /// drains what it has under way (one round trip more).
    ///
    /// Its `cancel_token()` knows no address, since the connection was dialled here: `cancel_query` fails, and
    /// `cancel_query_raw` over a socket of one's own works.
    ///
    /// # Errors
    ///
    /// [`Error::ConnectionLost`].
    ///
    /// # Cancel safety
    ///
    /// Nothing is lost.
    pub async fn client(&mut self) -> Result<&mut tokio_postgres::Client, Error> {
        // Invariant: taken only in `drop`.
        self.object.as_mut().expect("a session has its connection until it is dropped").lend_client().await
    }
}

impl Deref for Session {
    type Target = Connection;

    #[inline]
    fn deref(&self) -> &Connection {
        let connection = self.connection();
        if connection.wire().is_recording() {
            // While a transaction of this session lives, nobody gets here: it was leaked.
            connection.claim_now();
        }
        connection
    }
}

/// A session that a transaction keeps, whose own use of it is no sign that it was leaked.
pub(crate) struct Kept(Session);

impl Session {
    pub(crate) fn kept(self) -> Kept {
        Kept(self)
    }
}

impl Deref for Kept {
    type Target = Connection;

    #[inline]
    fn deref(&self) -> &Connection {
        self.0.connection()
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("connection", self.connection()).finish()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let Some(object) = self.object.take() else { return };
        let now = Instant::now();
        let verdict = match object.verdict() {
            Verdict::Clean | Verdict::Repair if object.is_expired(now) => {
                Verdict::Close("its lifetime is over")
            }
            verdict => verdict,
        };
        let custody = Custody { object: Some(object) };
        match verdict {
            Verdict::Clean => custody.give_back(now),
            Verdict::Close(reason) => custody.close(reason),
            Verdict::Repair => {
                observe::connection_repairing();
                let runtime = custody.connection().runtime();
                // Dropped unfinished, as when the runtime is shut down, the custody closes the connection at once.
                runtime.spawn(async move {
                    match custody.connection().repair().await {
                        Ok(()) => custody.give_back(Instant::now()),
                        Err(reason) => custody.close(reason),
                    }
                });
            }
        }
    }
}

/// A connection that is neither lent nor back: only one that is given back explicitly is ever lent again.
struct Custody {
    object: Option<Object<ConnectionManager>>,
}

impl Custody {
    fn connection(&self) -> &Connection {
        // Invariant: taken only by the methods that consume the custody.
        self.object.as_ref().expect("a custody has its connection until its end")
    }

    fn give_back(mut self, now: Instant) {
        if let Some(mut object) = self.object.take() {
            object.rest(now);
            drop(object);
        }
    }

    /// Closes the connection; its place counts as taken until the server is done with it.
    fn close(mut self, reason: &'static str) {
        observe::connection_closed(reason);
        let runtime = self.connection().runtime();
        runtime.spawn(async move {
            self.connection().close_and_wait(reason).await;
            drop(self.object.take().map(Object::take));
        });
    }
}

impl Drop for Custody {
    fn drop(&mut self) {
        if let Some(object) = self.object.take() {
            Object::take(object).close("it was cut short");
        }
    }
}
