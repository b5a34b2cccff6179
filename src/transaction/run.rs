//! The attempts of one transaction: run the closure, commit, and decide at the wire whether to do it again.

use std::time::{Duration, Instant};

use tokio::time::{sleep, timeout};

use super::transaction::{CommitWent, Hooks, Transaction};
use crate::connect::{Fault, TransactionStatus};
use crate::connection::Connection;
use crate::error::Error;
use crate::observe::{self, Outcome};
use crate::options::TransactionOptions;
use crate::retry::{RetryClass, jitter};

/// A pause of up to about a round trip is not worth giving the session back for.
const WORTH_HOLDING: Duration = Duration::from_millis(1);

tokio::task_local! {
    /// The pool whose sessions the transactions around the running code hold, and how many.
    static HELD: (usize, usize);
}

/// How many sessions of this pool the running code holds in transactions around it.
pub(crate) fn held(pool: usize) -> usize {
    HELD.try_with(|(p, n)| if *p == pool { *n } else { 0 }).unwrap_or(0)
}

/// One transaction with all its attempts, whichever connections they run on.
pub(crate) struct Run<'o> {
    options: &'o TransactionOptions,
    /// What is to be run now that it is committed.
    hooks: Option<Hooks>,
    /// The sessions that are held while it runs.
    holding: (usize, usize),
    started: Instant,
    attempts: u32,
    /// How often no connection could be made for an attempt.
    unconnected: u32,
    span: tracing::Span,
}

/// What to do after the attempts on one connection.
pub(crate) enum Step<T, E> {
    Done(Result<T, E>),
    /// Give the session back, wait, and go on with another.
    Release(Duration),
}

impl<'o> Run<'o> {
    pub(crate) fn new(options: &'o TransactionOptions) -> Self {
        let span = observe::transaction(options.name.as_deref(), options.level());
        Self {
            options,
            hooks: None,
            holding: (0, 0),
            started: Instant::now(),
            attempts: 0,
            unconnected: 0,
            span,
        }
    }

    pub(crate) fn span(&self) -> tracing::Span {
        self.span.clone()
    }

    /// Runs what was registered to be run after the commit. The session may be back by then, or still be held by whoever
    /// called.
    pub(crate) async fn run_hooks(&mut self, session_is_held: bool) {
        let Some(hooks) = self.hooks.take() else { return };
        if session_is_held {
            HELD.scope(self.holding, hooks.run()).await;
        } else {
            hooks.run().await;
        }
    }

    /// What is left of the deadline.
    pub(crate) fn left(&self) -> Option<Duration> {
        self.options.deadline.map(|deadline| deadline.saturating_sub(self.started.elapsed()))
    }

    pub(crate) fn too_late(&self) -> Error {
        observe::transaction_ended(&self.span, self.attempts, Outcome::RolledBack);
        let after = self.options.deadline.unwrap_or_default();
        Error::DeadlineExceeded { after, attempts: self.attempts }
    }

    /// The pause after no connection could be made, if lost connections are retried: a server that ended one may take
    /// a while to be back. Counts as an attempt.
    pub(crate) fn after_connect_error(&mut self) -> Option<Duration> {
        self.unconnected += 1;
        let delay = self.delay(RetryClass::ConnectionLost)?;
        self.left().is_none_or(|left| left > delay).then_some(delay)
    }

    fn delay(&self, class: RetryClass) -> Option<Duration> {
        let attempts = self.attempts + self.unconnected;
        self.options.retry.delay_bound(attempts, self.started.elapsed(), class).map(jitter)
    }

    /// Attempts the transaction on `connection`, again and again as the policy says. `may_move` if the caller can go
    /// on with another connection.
    pub(crate) async fn on<T, E, F>(&mut self, connection: &Connection, may_move: bool, f: F) -> Step<T, E>
    where
        F: AsyncFnOnce(&mut Transaction<'_>) -> Result<T, E> + Clone,
        E: From<Error>,
    {
        let settled = match self.left() {
            None => connection.claim().await,
            Some(left) => match timeout(left, connection.claim()).await {
                Ok(settled) => settled,
                Err(_) => return Step::Done(Err(self.too_late().into())),
            },
        };
        if let Err(e) = settled {
            return Step::Done(Err(e.into()));
        }
        let mut tx = match Transaction::begin(connection, self.options) {
            Ok(tx) => tx,
            Err(e) => return Step::Done(Err(e.into())),
        };
        tx.attempt = self.attempts + 1;
        tx.span = Some(self.span.clone());
        let pool = connection.pool_id();
        self.holding = (pool, held(pool) + 1);
        loop {
            self.attempts += 1;
            let attempt = HELD.scope(self.holding, (f.clone())(&mut tx));
            let result = match self.left() {
                None => attempt.await,
                Some(left) => match timeout(left, attempt).await {
                    Ok(result) => result,
                    // Dropping `tx` rolls back in the background; the deadline waits for nobody.
                    Err(_) if connection.wire().is_ended_by_sql() => {
                        return Step::Done(Err(connection.ended_by_sql().into()));
                    }
                    Err(_) => {
                        tx.span = None;
                        return Step::Done(Err(self.too_late().into()));
                    }
                },
            };
            let failed = match result {
                Err(users) if tx.commit_went() == CommitWent::No => {
                    let (class, own) = why(&tx).await;
                    Failed { class, own, users: Some(users) }
                }
                result => match Self::finish(&mut tx, result).await {
                    Ok(value) => {
                        observe::transaction_ended(&self.span, self.attempts, Outcome::Committed);
                        self.hooks = tx.take_hooks();
                        return Step::Done(Ok(value));
                    }
                    Err(failed) => failed,
                },
            };
            let delay = match self.delay_after(&failed, may_move) {
                Ok(delay) => delay,
                Err(exhausted) => {
                    roll_back(self.left(), &mut tx).await;
                    let unknown = failed.own.as_ref().is_some_and(Error::is_commit_unknown);
                    let outcome = if unknown { Outcome::Unknown } else { Outcome::RolledBack };
                    observe::transaction_ended(&self.span, self.attempts, outcome);
                    return Step::Done(Err(failed.into_error(exhausted)));
                }
            };
            if self.left().is_some_and(|left| left <= delay) {
                roll_back(self.left(), &mut tx).await;
                return Step::Done(Err(self.too_late().into()));
            }
            let class = failed.class.unwrap_or(RetryClass::Serialization);
            let code = failed.own.as_ref().and_then(Error::code).map(|code| code.code());
            observe::retrying(self.attempts, code, delay);
            if class == RetryClass::StaleStatement {
                connection.forget_statements();
            }
            if class.needs_fresh_connection() {
                connection.shell.lose("the transaction is retried on another connection");
                tx.span = None;
                return Step::Release(delay);
            }
            if may_move && delay > WORTH_HOLDING {
                tx.span = None;
                return Step::Release(delay);
            }
            // An aborted transaction holds no locks; one that is still open must not hold its own through the pause.
            if connection.wire().status() == TransactionStatus::Open {
                tx.roll_back_now().await;
            }
            sleep(delay).await;
            if let Err(e) = tx.restart(self.options) {
                return Step::Done(Err(e.into()));
            }
        }
    }

    /// Commits what returned a value; or asks what became of work that COMMIT went along with.
    async fn finish<T, E>(tx: &mut Transaction<'_>, result: Result<T, E>) -> Result<T, Failed<E>>
    where
        E: From<Error>,
    {
        match (tx.commit_now().await, result) {
            (Ok(()), Ok(value)) => Ok(value),
            // What it returned could not be read, though it took effect.
            (Ok(()), Err(users)) => Err(Failed { class: None, own: None, users: Some(users) }),
            (Err(own), _) => Err(Failed { class: class_of_error(&own, tx), own: Some(own), users: None }),
        }
    }

    /// The pause before the next attempt; or an error if there is none, with the number of attempts if it is only
    /// because the policy's limits are reached.
    fn delay_after<E>(&self, failed: &Failed<E>, may_move: bool) -> Result<Duration, Option<u32>> {
        let policy = &self.options.retry;
        let class = failed
            .class
            .filter(|class| policy.retries(*class) && (may_move || !class.needs_fresh_connection()))
            .ok_or(None)?;
        self.delay(class).ok_or(Some(self.attempts))
    }
}

/// Rolls back; what is not done when the deadline comes is done in the background.
async fn roll_back(left: Option<Duration>, tx: &mut Transaction<'_>) {
    match left {
        None => tx.roll_back_now().await,
        Some(left) => _ = timeout(left, tx.roll_back_now()).await,
    }
}

/// An attempt that failed: as the wire has it, and as the closure does.
struct Failed<E> {
    class: Option<RetryClass>,
    /// `None` if nothing failed in the database.
    own: Option<Error>,
    users: Option<E>,
}

impl<E: From<Error>> Failed<E> {
    /// The user's own error comes first, unless it was retried in vain.
    fn into_error(self, exhausted: Option<u32>) -> E {
        match (exhausted, self.own, self.users) {
            (Some(attempts), Some(own), _) => {
                Error::RetriesExhausted { attempts, source: Box::new(own) }.into()
            }
            (_, _, Some(users)) => users,
            (_, own, None) => own.unwrap_or(Error::TransactionEnded).into(),
        }
    }
}

/// What broke the transaction, asked at the wire: whatever the closure made of it, it is there. Nothing, if the closure
/// had a reason of its own.
async fn why(tx: &Transaction<'_>) -> (Option<RetryClass>, Option<Error>) {
    let connection = tx.connection();
    let settled = connection.disown().await;
    let wire = connection.wire();
    let facts = wire.facts();
    if facts.ended_by_sql {
        // Some of it may be committed: never again.
        return (None, Some(connection.ended_by_sql()));
    }
    if let Some(fault) = facts.fault.or_else(|| wire.forgiven().map(Fault::Server)) {
        return (class_of_fault(&fault), Some(connection.shell.broken_by(&fault)));
    }
    let lost =
        settled.err().or_else(|| facts.over.then(|| connection.shell.lost("the connection was closed")));
    (lost.is_some().then_some(RetryClass::ConnectionLost), lost)
}

fn class_of_fault(fault: &Fault) -> Option<RetryClass> {
    match fault {
        // Whatever it was ended for, as for being idle in a transaction: the connection is lost.
        Fault::Server(error) if error.is_fatal() => Some(RetryClass::ConnectionLost),
        Fault::Server(error) => error.retry_class(),
        Fault::Abandoned | Fault::Halfway => None,
    }
}

fn class_of_error(error: &Error, tx: &Transaction<'_>) -> Option<RetryClass> {
    match error {
        Error::Aborted(first) => first.retry_class(),
        Error::Database(_) => error.code().and_then(|code| RetryClass::of(code.code())),
        // Lost before COMMIT was sent; or COMMIT went along with it, and was not reached.
        Error::ConnectionLost(_) | Error::Batch(_) => match tx.connection().wire().fault(0) {
            Some(fault) => class_of_fault(&fault),
            None => matches!(error, Error::ConnectionLost(_)).then_some(RetryClass::ConnectionLost),
        },
        _ => None,
    }
}
