//! How a transaction ends: COMMIT read for what it really did, and ROLLBACK that never hides another error.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

use tokio::time::error::Elapsed;
use tokio::time::timeout;
use tokio_postgres::error::Severity;

use super::{Role, Transaction};
use crate::connect::TransactionStatus;
use crate::error::{CommitUnknown, DriverError, Error, ServerError};
use crate::observe;

impl Transaction<'_> {
    /// Sends COMMIT and reads its outcome off the wire. On an error the transaction may still be open: see
    /// [`roll_back_now`](Self::roll_back_now).
    pub(super) async fn commit_now(&mut self) -> Result<(), Error> {
        let concluded = self.concluded().take();
        let outcome = match concluded {
            Some(outcome) => outcome,
            None => self.commit_alone().await,
        };
        self.done |= outcome.is_ok();
        outcome
    }

    async fn commit_alone(&self) -> Result<(), Error> {
        let connection = &*self.connection;
        connection.link.settled().await?;
        if !connection.has_begun() {
            connection.end_transaction();
            return Ok(());
        }
        self.check()?;
        let written = connection.wire().written();
        let limit = connection.link.config().commit_timeout;
        let answer = timeout(limit, connection.control("COMMIT", true)).await;
        self.read_outcome(answer, written)
    }

    /// Sends `flight`, which is all sent when it has been polled once, and COMMIT right behind it. Its turn was taken
    /// before, so BEGIN is on its way and has been accepted here before.
    ///
    /// Once COMMIT is sent its outcome is kept for [`commit_now`](Self::commit_now), which must be called next whatever
    /// is returned here: that knows best what went wrong.
    pub(crate) async fn conclude<T>(
        &self,
        flight: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        self.check()?;
        let connection = &*self.connection;
        let wire = connection.wire();
        let mut flight = pin!(flight);
        let early = match poll_fn(|cx| Poll::Ready(flight.as_mut().poll(cx))).await {
            Poll::Ready(Err(e)) => return Err(e), // it could not be sent
            Poll::Ready(value) => Some(value),
            Poll::Pending => None,
        };
        let written = wire.written();
        let mut commit = pin!(connection.control("COMMIT", true));
        let refused = poll_fn(|cx| Poll::Ready(commit.as_mut().poll(cx))).await;
        let value = match early {
            Some(value) => value,
            None => flight.await,
        };
        let answer = match refused {
            Poll::Ready(answer) => Ok(answer),
            Poll::Pending => timeout(connection.link.config().commit_timeout, commit).await,
        };
        // The server works in order: one that said good-bye before it had answered every statement never came to COMMIT.
        let lost = matches!(value, Err(Error::ConnectionLost(_))) && wire.fatal().is_some();
        let outcome = match value {
            Err(e) if lost => {
                connection.end_transaction();
                Err(e)
            }
            value => match (self.read_outcome(answer, written), value) {
                (Ok(()), Ok(value)) => {
                    *self.concluded() = Some(Ok(()));
                    return Ok(value);
                }
                // The statement's own error says more; or its answer could not be read, though it took effect.
                (Err(Error::Aborted(_)) | Ok(()), Err(e)) => Err(e),
                (Err(e), _) => Err(e),
            },
        };
        *self.concluded() = Some(outcome);
        Err(Error::TransactionEnded)
    }

    /// Whether COMMIT may be sent.
    fn check(&self) -> Result<(), Error> {
        let connection = &*self.connection;
        let wire = connection.wire();
        // The server would answer COMMIT with ROLLBACK: the first error says why.
        if let Some(first) = wire.first_error(0) {
            return Err(connection.broken_by(&first));
        }
        let Role::Outermost { begins, commits } = self.role else { return Err(self.ended()) };
        let begun = wire.begins().wrapping_sub(begins);
        let over = begun == 1 && wire.status() == TransactionStatus::Idle;
        if begun > 1 || over || wire.commits() != commits {
            return Err(self.ended());
        }
        if connection.client.is_closed() {
            return Err(connection.link.lost("the connection was closed before COMMIT was sent"));
        }
        Ok(())
    }

    /// What became of a COMMIT that was sent when so many bytes had been `written`.
    fn read_outcome(
        &self,
        answer: Result<Result<(), tokio_postgres::Error>, Elapsed>,
        written: u64,
    ) -> Result<(), Error> {
        let connection = &*self.connection;
        let wire = connection.wire();
        let Role::Outermost { begins, commits } = self.role else { return Err(self.ended()) };
        let error = match answer {
            Ok(Ok(())) => {
                let confirmed = wire.commits().wrapping_sub(commits);
                let begun = wire.begins().wrapping_sub(begins);
                return match (confirmed, begun) {
                    // Outside a block COMMIT is no error: SQL has ended the transaction, and what followed was on its own.
                    (1, 1) if wire.committed_block() => {
                        connection.end_transaction();
                        Ok(())
                    }
                    // The tag was ROLLBACK: an error came that nobody had waited for.
                    (0, 1) => match wire.first_error(0) {
                        Some(first) => {
                            connection.end_transaction();
                            Err(connection.broken_by(&first))
                        }
                        None => Err(self.ended()),
                    },
                    _ => Err(self.ended()),
                };
            }
            Ok(Err(e)) => e,
            Err(_) => return Err(self.unknown("COMMIT was not answered within the commit timeout", None)),
        };
        if let Some(server) = error.as_db_error() {
            let fatal = matches!(server.parsed_severity(), Some(Severity::Fatal | Severity::Panic));
            // Servers that speak the protocol and are not PostgreSQL say so themselves when they cannot tell.
            if fatal || matches!(server.code().code(), "40003" | "08007") {
                return Err(self.unknown("the server ended the session over COMMIT", wire.fatal()));
            }
            if wire.status() == TransactionStatus::Idle {
                // Over. Otherwise it was not COMMIT that failed but something sent ahead of it.
                connection.end_transaction();
            }
            return Err(Error::Database(DriverError(error)));
        }
        if wire.written() == written {
            return Err(connection.link.lost("the connection was closed before COMMIT was sent"));
        }
        Err(self.unknown("the connection was closed before COMMIT was answered", wire.fatal()))
    }

    fn unknown(&self, reason: &'static str, server: Option<Arc<ServerError>>) -> Error {
        self.connection.link.poison(reason);
        self.connection.end_transaction();
        let error = Error::CommitUnknown(Box::new(CommitUnknown { reason, server }));
        observe::commit_unknown(&error);
        error
    }

    fn ended(&self) -> Error {
        self.connection.link.poison("SQL in a transaction ended it");
        self.connection.end_transaction();
        Error::TransactionEnded
    }

    /// Commits if `result` is good, rolls back otherwise; the error of a COMMIT that went out with it comes first.
    pub(crate) async fn end_with<T>(&mut self, result: Result<T, Error>) -> Result<T, Error> {
        let refused = self.refused();
        match (refused, result) {
            (None, Ok(value)) => self.commit_or_roll_back().await.map(|()| value),
            (Some(e), _) | (None, Err(e)) => {
                self.roll_back_now().await;
                Err(e)
            }
        }
    }

    /// Why a COMMIT that went out with statements did not commit.
    pub(super) fn refused(&self) -> Option<Error> {
        let mut concluded = self.concluded();
        match concluded.take() {
            Some(Err(e)) => Some(e),
            other => {
                *concluded = other;
                None
            }
        }
    }

    /// Ends what is open. A failure closes the connection, which has the same effect.
    pub(super) async fn roll_back_now(&mut self) {
        let connection = &*self.connection;
        let link = &connection.link;
        if connection.has_begun() && link.settled().await.is_ok() {
            connection.drop_pending();
            let answer = timeout(link.config().cleanup_timeout, connection.control("ROLLBACK", false)).await;
            if !matches!(answer, Ok(Ok(()))) || connection.wire().status() != TransactionStatus::Idle {
                link.poison("ROLLBACK failed");
            }
        }
        connection.end_transaction();
        self.done = true;
    }
}
