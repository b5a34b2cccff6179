//! One transaction for one request: begun at first use, ended by what the response says.

use std::fmt;
use std::future::Future;
use std::ops::Deref;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use pin_project_lite::pin_project;
use tokio::runtime::Handle;
use tokio::time::{Sleep, sleep};
use tracing::Instrument;

use crate::error::Error;
use crate::lock::lock;
use crate::manager::SessionManager;
use crate::observe::{self, Outcome};
use crate::options::TransactionOptions;
use crate::transaction::{Hooks, Transaction};

/// A transaction for each request that wants one: a layer for axum's routers, a middleware for actix-web's apps, and the
/// same in both.
///
/// A handler, or a middleware further in, asks for the transaction by taking a [`Tx`] as an argument. It is begun when
/// its first statement is run; a request that does not ask costs nothing. When the handler has returned, and before the
/// first byte of the response is sent, it is ended:
///
/// | how the request ended | the transaction |
/// |---|---|
/// | a response with a status below 400 | committed; should that fail, the failure is the response |
/// | status 400 or above, or [`Tx::set_rollback_only`] | rolled back |
/// | a panic, or the request was dropped because its client is gone | rolled back, and what still runs is cancelled |
/// | the [deadline](TransactionOptions::deadline) of its options passed | so too; the response is 504 |
///
/// So a client that reads 201 can rely on it, and a body that is streamed afterwards holds no transaction: take a
/// [`Session`](crate::Session) of its own for that.
///
/// A handler is never run twice: where conflicts are likely, as under SERIALIZABLE, use
/// [`SessionManager::transaction`] in the handler instead, which is retried.
///
/// # Options by route
///
/// One such layer around everything and another around a route, of the same manager, make one transaction: the one
/// further in chooses its options, as long as it has not begun.
#[derive(Clone, Debug)]
#[must_use]
pub struct RequestTransactions {
    sessions: SessionManager,
    options: Option<Arc<TransactionOptions>>,
    hooks_after_response: bool,
}

impl RequestTransactions {
    /// Transactions on sessions of this manager, with its [default options](crate::SessionConfig::transactions).
    pub fn new(sessions: SessionManager) -> Self {
        Self { sessions, options: None, hooks_after_response: false }
    }

    /// The options: isolation level, access mode, local settings, and a deadline, which counts from the arrival of the
    /// request. A retry policy has no effect.
    pub fn options(mut self, options: TransactionOptions) -> Self {
        self.options = Some(Arc::new(options));
        self
    }

    /// Runs [`on_commit`](Transaction::on_commit) hooks in the background once the response has been sent, instead of
    /// before.
    ///
    /// The client does not wait for them then, and nobody does: they are lost if the process ends first. Where that
    /// matters, write what is to be done to a table in the same transaction.
    pub fn hooks_after_response(mut self) -> Self {
        self.hooks_after_response = true;
        self
    }

    /// The scope of a request that comes in with this transaction, if an outer layer has made one.
    pub(crate) fn enter(&self, outer: Option<&RequestTransaction>) -> Result<Scope, Error> {
        let (transaction, outermost) = match outer {
            Some(outer) if outer.is_of(&self.sessions) => {
                if let Some(options) = &self.options {
                    outer.choose(options)?;
                }
                (outer.clone(), false)
            }
            _ => (RequestTransaction::new(self.sessions.clone(), self.options.clone()), true),
        };
        let options = self.options.as_deref().unwrap_or(&self.sessions.config().transactions);
        let hooks_after_response = self.hooks_after_response;
        Ok(Scope { transaction, outermost, deadline: options.deadline, hooks_after_response })
    }
}

/// What travels with a request: its transaction, once it has one.
#[derive(Clone)]
pub(crate) struct RequestTransaction {
    shared: Arc<Shared>,
}

struct Shared {
    sessions: SessionManager,
    state: Mutex<State>,
    /// Held while a session is acquired, so that two who ask at once get the same transaction.
    beginning: tokio::sync::Mutex<()>,
}

enum State {
    /// With options of its own, or the manager's.
    Unused(Option<Arc<TransactionOptions>>),
    Begun(Arc<Inner>),
    Over,
}

struct Inner {
    transaction: Transaction<'static>,
    span: tracing::Span,
    rollback_only: AtomicBool,
    nested: AtomicBool,
}

impl RequestTransaction {
    fn new(sessions: SessionManager, options: Option<Arc<TransactionOptions>>) -> Self {
        let state = Mutex::new(State::Unused(options));
        Self { shared: Arc::new(Shared { sessions, state, beginning: tokio::sync::Mutex::default() }) }
    }

    /// Whether it is one of this manager, or of a clone.
    fn is_of(&self, sessions: &SessionManager) -> bool {
        std::ptr::eq(self.shared.sessions.config(), sessions.config())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it is held.
        lock(&self.shared.state)
    }

    /// Chooses the options, before it begins.
    fn choose(&self, options: &Arc<TransactionOptions>) -> Result<(), Error> {
        match &mut *self.state() {
            State::Unused(chosen) => {
                *chosen = Some(Arc::clone(options));
                Ok(())
            }
            State::Begun(_) => Err(Error::config(
                "the request's transaction was begun further out, before the options of this route were known",
            )),
            State::Over => Err(Self::over()),
        }
    }

    fn over() -> Error {
        Error::config("the request's transaction has ended: it cannot be taken up again after its handler")
    }

    /// What an extractor says where no layer has provided for a transaction.
    pub(crate) fn missing() -> Error {
        Error::config("no RequestTransactions around this route, so there is no transaction for Tx")
    }

    /// The transaction, begun now if it was not.
    pub(crate) async fn tx(&self) -> Result<Tx, Error> {
        let _first = self.shared.beginning.lock().await;
        let options = match &*self.state() {
            State::Unused(options) => options.clone(),
            State::Begun(inner) => return Ok(Tx { inner: Arc::clone(inner) }),
            State::Over => return Err(Self::over()),
        };
        let sessions = &self.shared.sessions;
        let options = options.as_deref().unwrap_or(&sessions.config().transactions);
        let span = observe::transaction(options.name.as_deref(), options.level());
        let transaction = sessions.begin_with(options.clone()).await?;
        let inner = Inner { transaction, span, rollback_only: false.into(), nested: false.into() };
        let inner = Arc::new(inner);
        let mut state = self.state();
        if let State::Over = *state {
            return Err(Self::over());
        }
        *state = State::Begun(Arc::clone(&inner));
        Ok(Tx { inner })
    }
}

/// The transaction of a request, as an argument of handlers and middlewares; see [`RequestTransactions`].
///
/// All that a request takes are the same transaction: a middleware can hold one while the handler uses another. Has every
/// verb of [`Transaction`], to which it dereferences; passes as a `&`[`Connection`](crate::Connection).
///
/// It must not outlive the handler, in a task or a streamed body say: the transaction could not be ended then. Should it,
/// the transaction is rolled back, its connection closed, and the response is a 500 that the log explains.
///
/// Taking one takes a session from the pool, before the request's body is read. Where bodies come slowly, take a
/// [`LazySession`](crate::LazySession) instead and begin a transaction once the body is there.
#[derive(Clone)]
pub struct Tx {
    inner: Arc<Inner>,
}

impl Tx {
    /// Runs `f` in a savepoint, as [`Transaction::savepoint`] does.
    ///
    /// # Errors
    ///
    /// As [`Transaction::savepoint`], and [`Error::SavepointOpen`] if another `Tx` of this request is in one: they can
    /// only be nested, by `savepoint` on what the closure gets.
    ///
    /// # Cancel safety
    ///
    /// As [`Transaction::savepoint`].
    pub async fn savepoint<T, E, F>(&mut self, f: F) -> Result<T, E>
    where
        F: AsyncFnOnce(&mut Transaction<'_>) -> Result<T, E>,
        E: From<Error>,
    {
        if self.inner.nested.swap(true, SeqCst) {
            return Err(Error::SavepointOpen.into());
        }
        let _nested = Nested(&self.inner.nested);
        self.inner.transaction.nest(f).await
    }

    /// Rolls the transaction back at the end of the request, whatever the response's status.
    pub fn set_rollback_only(&self) {
        self.inner.rollback_only.store(true, SeqCst);
    }
}

struct Nested<'a>(&'a AtomicBool);

impl Drop for Nested<'_> {
    fn drop(&mut self) {
        self.0.store(false, SeqCst);
    }
}

impl Deref for Tx {
    type Target = Transaction<'static>;

    fn deref(&self) -> &Transaction<'static> {
        &self.inner.transaction
    }
}

impl fmt::Debug for Tx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tx").field("transaction", &**self).finish_non_exhaustive()
    }
}

/// A request on its way through a [`RequestTransactions`]. Dropped before its end, it ends the transaction.
pub(crate) struct Scope {
    transaction: RequestTransaction,
    /// Whether the transaction ends with this scope.
    outermost: bool,
    deadline: Option<Duration>,
    hooks_after_response: bool,
}

/// What came of the request.
pub(crate) enum Ended<R, E> {
    /// A response, and the hooks that are to be run after it.
    Response(R, Option<AfterResponse>),
    /// The service's own error.
    Failed(E),
}

impl Scope {
    pub(crate) fn transaction(&self) -> &RequestTransaction {
        &self.transaction
    }

    /// Runs the rest of the request, and ends the transaction as its response says.
    pub(crate) fn run<F, R, E>(self, rest: F, status: fn(&R) -> u16) -> Scoped<F, R, E>
    where
        F: Future<Output = Result<R, E>>,
    {
        let deadline = self.deadline.map(|after| (after, Box::pin(sleep(after))));
        Scoped { rest: Some(rest), status, scope: Some(self), deadline, result: None, ending: None }
    }

    /// Whether there is nothing to be ended here; then it is too late to begin.
    fn is_over(&self) -> bool {
        if !self.outermost {
            return true;
        }
        let mut state = self.transaction.state();
        let unused = !matches!(*state, State::Begun(_));
        if unused {
            *state = State::Over;
        }
        unused
    }

    async fn end_with(mut self, success: bool) -> Result<Option<AfterResponse>, Error> {
        if success {
            return self.commit().await;
        }
        self.roll_back().await;
        Ok(None)
    }

    async fn give_up(mut self, after: Duration) -> Result<Option<AfterResponse>, Error> {
        self.roll_back().await;
        Err(Error::DeadlineExceeded { after, attempts: 1 })
    }

    async fn commit(&mut self) -> Result<Option<AfterResponse>, Error> {
        let Some(inner) = self.end()? else { return Ok(None) };
        let Inner { mut transaction, span, rollback_only, .. } = inner;
        if rollback_only.into_inner() {
            transaction.rollback().await;
            observe::transaction_ended(&span, 1, Outcome::RolledBack);
            return Ok(None);
        }
        let committed = transaction.commit_or_roll_back().await;
        let outcome = match &committed {
            Ok(()) => Outcome::Committed,
            Err(e) if e.is_commit_unknown() => Outcome::Unknown,
            Err(_) => Outcome::RolledBack,
        };
        observe::transaction_ended(&span, 1, outcome);
        committed?;
        let hooks = transaction.take_hooks();
        drop(transaction); // the session goes back first: hooks may take their time, or need one
        match hooks {
            Some(hooks) if self.hooks_after_response => return Ok(Some(AfterResponse::new(hooks))),
            Some(hooks) => hooks.run().await,
            None => {}
        }
        Ok(None)
    }

    async fn roll_back(&mut self) {
        // Whoever kept it: the response says already that the request failed.
        if let Ok(Some(Inner { transaction, span, .. })) = self.end() {
            transaction.rollback().await;
            observe::transaction_ended(&span, 1, Outcome::RolledBack);
        }
    }

    /// Takes the transaction out of the request, if it ends here.
    fn end(&mut self) -> Result<Option<Inner>, Error> {
        if !std::mem::take(&mut self.outermost) {
            return Ok(None);
        }
        let state = std::mem::replace(&mut *self.transaction.state(), State::Over);
        let State::Begun(inner) = state else { return Ok(None) };
        Arc::try_unwrap(inner).map(Some).map_err(|kept| {
            const KEPT: &str = "a Tx outlived the handler of its request";
            kept.transaction.shell.cut(KEPT);
            observe::transaction_ended(&kept.span, 1, Outcome::RolledBack);
            Error::config(
                "a Tx outlived the handler of its request, in a task or a body: it was rolled back; \
                 use a session of its own there",
            )
        })
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        // The request was dropped, or a panic unwinds: dropping the transaction rolls it back.
        if let Ok(Some(inner)) = self.end() {
            observe::transaction_ended(&inner.span, 1, Outcome::RolledBack);
        }
    }
}

pin_project! {
    /// A request within its scope. A request that does not use its transaction is polled straight through.
    pub(crate) struct Scoped<F, R, E> {
        // Dropped before the scope: what it runs is cancelled, then the transaction rolled back.
        #[pin]
        rest: Option<F>,
        status: fn(&R) -> u16,
        scope: Option<Scope>,
        deadline: Option<(Duration, Pin<Box<Sleep>>)>,
        result: Option<Result<R, E>>,
        ending: Option<Pin<Box<dyn Future<Output = Result<Option<AfterResponse>, Error>> + Send>>>,
    }
}

impl<F, R, E> Future for Scoped<F, R, E>
where
    F: Future<Output = Result<R, E>>,
{
    type Output = Result<Ended<R, E>, Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        if let Some(rest) = this.rest.as_mut().as_pin_mut() {
            let result = match (rest.poll(cx), &mut this.deadline) {
                (Poll::Ready(result), _) => Some(result),
                (Poll::Pending, None) => return Poll::Pending,
                (Poll::Pending, Some((_, deadline))) => {
                    ready!(deadline.as_mut().poll(cx));
                    None
                }
            };
            this.rest.set(None);
            *this.ending = match (this.scope.take(), &result, &this.deadline) {
                (Some(scope), Some(_), _) if scope.is_over() => None,
                (Some(scope), Some(result), _) => {
                    let success = result.as_ref().is_ok_and(|response| (this.status)(response) < 400);
                    Some(Box::pin(scope.end_with(success)))
                }
                (Some(scope), None, Some((after, _))) => Some(Box::pin(scope.give_up(*after))),
                _ => None,
            };
            *this.result = result;
        }
        let hooks = match &mut this.ending {
            Some(ending) => ready!(ending.as_mut().poll(cx))?,
            None => None,
        };
        match this.result.take() {
            Some(Ok(response)) => Poll::Ready(Ok(Ended::Response(response, hooks))),
            Some(Err(e)) => Poll::Ready(Ok(Ended::Failed(e))),
            // It is polled again after its end.
            None => Poll::Pending,
        }
    }
}

/// Hooks that run once this is dropped, along with the body of the response.
pub(crate) struct AfterResponse {
    hooks: Option<Hooks>,
    runtime: Handle,
    span: tracing::Span,
}

impl AfterResponse {
    fn new(hooks: Hooks) -> Self {
        Self { hooks: Some(hooks), runtime: Handle::current(), span: tracing::Span::current() }
    }
}

impl Drop for AfterResponse {
    fn drop(&mut self) {
        if let Some(hooks) = self.hooks.take() {
            self.runtime.spawn(hooks.run().instrument(self.span.clone()));
        }
    }
}
