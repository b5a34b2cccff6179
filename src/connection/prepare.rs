//! The statements of a connection: at hand, prepared, or stale.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;

use tokio_postgres::error::SqlState;

use super::connection::Connection;
use super::core::Use;
use super::request::{Failure, Request};
use super::shell::{STOPPED, Shell};
use crate::error::Error;
use crate::statements::{Source, Statement, Statements, ToStatement, Traits};

impl Connection {
    /// The statement for `sql`, if it is at hand.
    #[inline]
    pub(super) fn at_hand<S>(&self, sql: &S) -> Result<Option<Statement>, Error>
    where
        S: ToStatement + ?Sized,
    {
        let statement = match sql.source() {
            Source::Prepared(statement) if statement.connection() != self.shell.number => {
                return Err(Error::config(
                    "the statement was prepared on another connection; pass SQL text, which is prepared where it runs",
                ));
            }
            Source::Prepared(statement) => statement.clone(),
            Source::Text(text) => match self.shell.statements().get(text) {
                Some(statement) => statement.clone(),
                None => return Ok(None),
            },
        };
        self.note_traits(statement.traits());
        Ok(Some(statement))
    }

    #[inline]
    pub(super) fn note_traits(&self, traits: Traits) {
        if traits.leaves_state {
            self.shell.mark_dirty();
        }
        if traits.chains {
            self.wire().note_chain();
        }
    }

    /// Prepares `sql` for a request, and keeps it in the cache if asked to. It is done on the connection's own runtime, and
    /// goes on if nobody waits: what was prepared in vain is in the cache for the next one.
    pub(super) async fn prepare_for(
        &self,
        request: &mut Request<'_>,
        sql: &str,
        keep: bool,
    ) -> Result<Statement, Failure> {
        self.prepare_all(request, &[sql], keep)
            .await?
            .pop()
            .map_or(Err(Failure::Lost(STOPPED)), |statement| statement.map_err(Failure::Driver))
    }

    /// The same for several texts in one flight.
    pub(super) async fn prepare_all(
        &self,
        request: &mut Request<'_>,
        texts: &[&str],
        keep: bool,
    ) -> Result<Vec<Result<Statement, tokio_postgres::Error>>, Failure> {
        request.begin_preparing().await?;
        let (shell, client) = (Arc::clone(&self.shell), Arc::clone(&self.client));
        let preparing = Preparing(Arc::clone(&shell));
        let texts: Vec<String> = texts.iter().map(|text| (*text).to_owned()).collect();
        let work = async move {
            let calls = texts.iter().map(|text| client.prepare(text));
            let results = together(calls).await;
            let mut statements = Vec::with_capacity(results.len());
            for (text, result) in texts.iter().zip(results) {
                statements.push(result.map(|inner| {
                    let statement = Statement::new(inner, shell.number, Traits::of(text));
                    if keep {
                        // Dropped when the cache is unlocked again.
                        let evicted = shell.statements().insert(text, statement.clone());
                        drop(evicted);
                    }
                    statement
                }));
            }
            if statements.iter().any(Result::is_err) {
                // An error is told before its ReadyForQuery, which says how the session stands.
                shell.wire.until_answered(shell.wire.sent()).await;
            }
            drop(client);
            drop(preparing);
            statements
        };
        let statements = self.shell.runtime.spawn(work).await.map_err(|_| Failure::Lost(STOPPED))?;
        for statement in statements.iter().flatten() {
            self.note_traits(statement.traits());
        }
        if statements.iter().any(|result| result.as_ref().is_err_and(is_forgotten)) {
            // The driver keeps statements of its own for looking up types, and cannot be told that they are gone.
            self.shell.retire();
        }
        Ok(statements)
    }

    /// Prepares a statement, or takes it from the cache. Seldom needed, since every verb does so; the statement is
    /// good on this connection only.
    ///
    /// # Errors
    ///
    /// As [`query`](Self::query).
    pub async fn prepare(&self, sql: &str) -> Result<Statement, Error> {
        if let Some(statement) = self.at_hand(sql)? {
            return Ok(statement);
        }
        let mut request = self.request(Use::Shared).await?;
        let statement = self.prepare_for(&mut request, sql, true).await;
        request.end(statement).await
    }

    /// Whether a statement failed because it was prepared before the schema changed or the cache was emptied behind our
    /// back. Those that `forget` removes will be prepared afresh then.
    pub(super) fn forget_if_stale(
        &self,
        error: &tokio_postgres::Error,
        forget: impl FnOnce(&mut Statements),
    ) -> bool {
        let stale = error.as_db_error().is_some_and(|e| {
            is_forgotten(error)
                || *e.code() == SqlState::FEATURE_NOT_SUPPORTED && e.routine() == Some("RevalidateCachedQuery")
                // "cache lookup failed for type 16385": it was dropped, and perhaps made anew.
                || *e.code() == SqlState::INTERNAL_ERROR && e.message().contains("type")
        });
        if stale {
            forget(&mut self.shell.statements());
            self.client.clear_type_cache();
        }
        stale
    }
}

/// Whether the server no longer has a prepared statement.
fn is_forgotten(error: &tokio_postgres::Error) -> bool {
    error.code() == Some(&SqlState::INVALID_SQL_STATEMENT_NAME)
}

/// Statements are being prepared, until this is dropped.
struct Preparing(Arc<Shell>);

impl Drop for Preparing {
    fn drop(&mut self) {
        self.0.core().prepared(self.0.wire.sent());
        self.0.changed();
    }
}

/// Polls each once, in order, so that the driver sends them in one piece; then waits for all of them.
async fn together<F: Future>(futures: impl Iterator<Item = F>) -> Vec<F::Output> {
    let mut waiting: Vec<_> = futures.map(Box::pin).collect();
    let mut early: Vec<_> = waiting.iter().map(|_| None).collect();
    poll_fn(|cx| {
        for (future, output) in waiting.iter_mut().zip(&mut early) {
            if let Poll::Ready(ready) = future.as_mut().poll(cx) {
                *output = Some(ready);
            }
        }
        Poll::Ready(())
    })
    .await;
    let mut outputs = Vec::with_capacity(waiting.len());
    for (future, early) in waiting.into_iter().zip(early) {
        outputs.push(match early {
            Some(early) => early,
            None => future.await,
        });
    }
    outputs
}
