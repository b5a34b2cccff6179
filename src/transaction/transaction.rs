//! A transaction as its users have it: savepoints, hooks, and what becomes of it when it is dropped.

use std::fmt;
use std::future::Future;
use std::ops::Deref;
use std::panic::AssertUnwindSafe;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard};
use std::task::Poll;

use super::begin;
use super::outcome::{Answer, Outcome, after_commit};
use crate::connect::Step;
use crate::connection::Connection;
use crate::error::Error;
use crate::lock::lock;
use crate::observe;
use crate::options::TransactionOptions;

type Hook = Box<dyn FnOnce() -> Pin<Box<dyn Future<Output = ()> + Send>> + Send>;

/// How a transaction has its connection.
enum Loan<'a> {
    /// From whoever called.
    Borrowed(&'a Connection),
    /// With the session that it came in, which goes back when the transaction is dropped.
    Owned(Box<dyn Deref<Target = Connection> + Send + Sync>),
}

impl Deref for Loan<'_> {
    type Target = Connection;

    #[inline]
    fn deref(&self) -> &Connection {
        match self {
            Self::Borrowed(connection) => connection,
            Self::Owned(session) => session,
        }
    }
}

/// A transaction, or a [savepoint](Self::savepoint) in one.
///
/// Has every verb of [`Connection`], to which it dereferences. The closure forms
/// ([`Session::transaction`](crate::Session::transaction)) commit on `Ok`, roll back on `Err`, and run the closure again
/// after a serialization failure or deadlock; one from [`Session::begin`](crate::Session::begin) is ended by hand with
/// [`commit`](Self::commit) or [`rollback`](Self::rollback). Dropped before its end, it is rolled back in the
/// background, and what still runs for it is cancelled.
///
/// BEGIN is sent together with the first statement. A transaction without a statement sends nothing at all.
pub struct Transaction<'a> {
    connection: Loan<'a>,
    hooks: Mutex<Vec<Hook>>,
    role: Role,
    pub(super) attempt: u32,
    commit_went: AtomicU8,
    /// What failed of the statements that it went along with, until the outcome is asked for.
    refusal: Mutex<Option<Error>>,
    /// Where its outcome is written, if whoever runs it leaves before it is known.
    pub(super) span: Option<tracing::Span>,
    pub(super) done: bool,
}

#[derive(Clone, Copy, Debug)]
enum Role {
    /// The block itself.
    Outermost,
    /// The savepoint with this number, set when the transaction had so many faults.
    Savepoint { number: u32, mark: usize },
}

/// Whether COMMIT went out together with statements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum CommitWent {
    No,
    Along,
    /// It did, and was not answered in time.
    TooLong,
}

impl<'a> Transaction<'a> {
    pub(crate) fn begin(connection: &'a Connection, options: &TransactionOptions) -> Result<Self, Error> {
        Self::begin_on(Loan::Borrowed(connection), options)
    }

    /// One that keeps its session for as long as it lives.
    pub(crate) fn begin_owned<S>(session: S, options: &TransactionOptions) -> Result<Self, Error>
    where
        S: Deref<Target = Connection> + Send + Sync + 'static,
    {
        Self::begin_on(Loan::Owned(Box::new(session)), options)
    }

    fn begin_on(connection: Loan<'a>, options: &TransactionOptions) -> Result<Self, Error> {
        options.validate()?;
        connection.begin(begin::steps(options), false)?;
        Ok(Self {
            connection,
            hooks: Mutex::default(),
            role: Role::Outermost,
            attempt: 1,
            commit_went: AtomicU8::new(CommitWent::No as u8),
            refusal: Mutex::default(),
            span: None,
            done: false,
        })
    }

    #[inline]
    pub(super) fn connection(&self) -> &Connection {
        &self.connection
    }

    pub(super) fn commit_went(&self) -> CommitWent {
        match self.commit_went.load(Relaxed) {
            0 => CommitWent::No,
            1 => CommitWent::Along,
            _ => CommitWent::TooLong,
        }
    }

    pub(super) fn set_commit_went(&self, went: CommitWent) {
        self.commit_went.store(went as u8, Relaxed);
    }

    pub(super) fn set_refusal(&self, error: Error) {
        *lock(&self.refusal) = Some(error);
    }

    pub(super) fn take_refusal(&self) -> Option<Error> {
        lock(&self.refusal).take()
    }

    /// Begins again after a failed attempt; the ROLLBACK of the old one rides along.
    pub(super) fn restart(&mut self, options: &TransactionOptions) -> Result<(), Error> {
        self.hooks().clear();
        self.attempt += 1;
        self.set_commit_went(CommitWent::No);
        self.done = false;
        self.connection.begin(begin::steps(options), true)
    }

    fn hooks(&self) -> MutexGuard<'_, Vec<Hook>> {
        lock(&self.hooks)
    }

    /// Which run of the closure this is; the first is 1.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// Runs `f` after the outermost transaction is committed: once, in the order of registration, before the call that
    /// commits returns.
    ///
    /// Dropped unrun if the savepoint it was registered in is rolled back, if this attempt is not the one that commits,
    /// or if the commit's outcome is unknown. A panic in it is logged and changes nothing: the transaction is committed.
    ///
    /// # Cancel safety
    ///
    /// If the future that commits is dropped while COMMIT is under way, they are run in the background once it is known that
    /// it was committed. If it is dropped while hooks run, the rest of them are not run.
    pub fn on_commit<F, Fut>(&self, f: F)
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        let hook: Hook = Box::new(move || Box::pin(f()));
        self.hooks().push(hook);
    }

    /// Runs `f` in a savepoint: on `Ok` it is released, on `Err` everything since its beginning is undone and the
    /// transaction goes on.
    ///
    /// It is run once. A serialization failure or deadlock cannot be cured by rolling back to a savepoint, so only the
    /// outermost closure is ever retried; should `f` fail with one, let it pass. Setting, releasing and rolling back
    /// to a savepoint cost no round trip: they travel with the next statement.
    ///
    /// ```no_run
    /// # async fn f(session: &mut pg_session::Session) -> Result<(), pg_session::Error> {
    /// session.transaction(async |tx| {
    ///     let inserted = tx.savepoint(async |sp| {
    ///         sp.execute("INSERT INTO tags (name) VALUES ($1)", &[&"blue"]).await
    ///     }).await;
    ///     match inserted {
    ///         Err(e) if e.is_unique_violation() => Ok(()), // it is there: fine, and the transaction is still good
    ///         other => other.map(drop),
    ///     }
    /// }).await
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// What `f` fails with; [`Error::Aborted`] if `f` returned `Ok` although a statement in it had failed.
    ///
    /// # Cancel safety
    ///
    /// Dropped, everything since its beginning is undone, and the transaction can go on.
    pub async fn savepoint<T, E, F>(&mut self, f: F) -> Result<T, E>
    where
        F: AsyncFnOnce(&mut Transaction<'_>) -> Result<T, E>,
        E: From<Error>,
    {
        self.nest(f).await
    }

    /// [`savepoint`](Self::savepoint), for those who make sure in another way that there is one at a time.
    pub(crate) async fn nest<T, E, F>(&self, f: F) -> Result<T, E>
    where
        F: AsyncFnOnce(&mut Transaction<'_>) -> Result<T, E>,
        E: From<Error>,
    {
        let connection = &*self.connection;
        let number = connection.shell.new_savepoint();
        connection.shell.settled().await?;
        let mark = connection.wire().mark();
        connection.shell.lead(Step::Savepoint(number));
        let mut inner = Transaction {
            connection: Loan::Borrowed(connection),
            hooks: Mutex::default(),
            role: Role::Savepoint { number, mark },
            attempt: self.attempt,
            commit_went: AtomicU8::new(CommitWent::No as u8),
            refusal: Mutex::default(),
            span: None,
            done: false,
        };
        let result = f(&mut inner).await;
        // What was left behind may still fail: wait for what there is to know.
        let settled = connection.shell.settled().await;
        let value = match result {
            Ok(value) => value,
            Err(e) => {
                inner.undo();
                return Err(e);
            }
        };
        settled?;
        if let Some(fault) = connection.wire().fault(mark) {
            inner.undo();
            return Err(connection.shell.broken_by(&fault).into());
        }
        if connection.wire().is_ended_by_sql() {
            return Err(connection.ended_by_sql().into());
        }
        inner.release();
        let hooks = std::mem::take(&mut *inner.hooks());
        drop(inner);
        self.hooks().extend(hooks);
        Ok(value)
    }

    fn release(&mut self) {
        if let Role::Savepoint { number, .. } = self.role {
            self.done = true;
            if !self.connection.shell.retract(&Step::Savepoint(number)) {
                self.connection.shell.lead(Step::Release(number));
            }
        }
    }

    fn undo(&mut self) {
        if let Role::Savepoint { number, mark } = self.role {
            self.done = true;
            if self.connection.wire().is_start_refused() {
                return; // it was never set, and what was refused is not undone
            }
            let shell = &self.connection.shell;
            if !shell.retract(&Step::Savepoint(number)) {
                shell.lead(Step::RollBackTo(number));
                shell.lead(Step::Release(number));
            }
            self.connection.forgive(mark);
        }
    }

    /// Commits, for a transaction from [`Session::begin`](crate::Session::begin).
    ///
    /// # Errors
    ///
    /// [`Error::Aborted`] if a statement failed; [`Error::Database`] if the commit did, as with a deferred constraint
    /// or a serialization failure; [`Error::CommitUnknown`] if its answer was lost; [`Error::TransactionEnded`].
    /// Whatever it is but `CommitUnknown`, the transaction is rolled back.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe once polled: the transaction is then committed or rolled back, and nobody is told which.
    pub async fn commit(mut self) -> Result<(), Error> {
        self.commit_or_roll_back().await?;
        let hooks = self.take_hooks();
        // A session of its own is back before they run: they may want one.
        drop(self);
        if let Some(hooks) = hooks {
            hooks.run().await;
        }
        Ok(())
    }

    /// Commits; if that fails, sees to it that nothing is left open.
    pub(crate) async fn commit_or_roll_back(&mut self) -> Result<(), Error> {
        let result = self.commit_now().await;
        if result.is_err() {
            self.roll_back_now().await;
        }
        result
    }

    /// What is to be run now that it is committed, if anything.
    pub(crate) fn take_hooks(&self) -> Option<Hooks> {
        let hooks = std::mem::take(&mut *self.hooks());
        if hooks.is_empty() { None } else { Some(Hooks(hooks)) }
    }

    /// Rolls back, for a transaction from [`Session::begin`](crate::Session::begin).
    ///
    /// Returns when the server has done so. There is nothing to be done about a failure: the connection is closed then,
    /// which rolls back as well.
    ///
    /// # Cancel safety
    ///
    /// Dropped, it is rolled back all the same.
    pub async fn rollback(mut self) {
        self.roll_back_now().await;
    }
}

/// What was registered to be run after a commit.
pub(crate) struct Hooks(Vec<Hook>);

impl Hooks {
    /// Runs them one after the other. A panic in one must not take the result of a committed transaction with it.
    pub(crate) async fn run(self) {
        for hook in self.0 {
            let panicked = match std::panic::catch_unwind(AssertUnwindSafe(hook)) {
                Ok(future) => {
                    let mut future = pin!(future);
                    std::future::poll_fn(|cx| {
                        match std::panic::catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(cx))) {
                            Ok(Poll::Pending) => Poll::Pending,
                            Ok(Poll::Ready(())) => Poll::Ready(false),
                            Err(_) => Poll::Ready(true),
                        }
                    })
                    .await
                }
                Err(_) => true,
            };
            if panicked {
                observe::hook_panicked();
            }
        }
    }
}

impl Deref for Transaction<'_> {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.connection
    }
}

impl Drop for Transaction<'_> {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        match self.role {
            Role::Outermost => {
                let (hooks, span, attempt) = (self.take_hooks(), self.span.take(), self.attempt);
                let runtime = self.connection.runtime();
                self.connection.give_up_transaction(move |facts| {
                    let outcome = after_commit(facts, Answer::Came);
                    if let Some(span) = span {
                        observe::transaction_ended(&span, attempt, outcome.into());
                    }
                    if let (Outcome::Committed, Some(hooks)) = (outcome, hooks) {
                        runtime.spawn(hooks.run());
                    }
                });
            }
            Role::Savepoint { .. } => self.undo(),
        }
    }
}

impl fmt::Debug for Transaction<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transaction")
            .field("connection", &**self)
            .field("role", &self.role)
            .field("attempt", &self.attempt)
            .finish_non_exhaustive()
    }
}
