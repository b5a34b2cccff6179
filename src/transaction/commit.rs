//! How a transaction ends: COMMIT read for what it really did, and ROLLBACK that never hides another error.

use std::sync::Arc;

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
        let connection = &*self.connection;
        let link = &connection.link;
        let wire = connection.wire();
        link.settled().await?;
        if !connection.has_begun() {
            connection.end_transaction();
            self.done = true;
            return Ok(());
        }
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
            return Err(link.lost("the connection was closed before COMMIT was sent"));
        }
        let written = wire.written();
        let answer = timeout(link.config().commit_timeout, connection.control("COMMIT", true)).await;
        let error = match answer {
            Ok(Ok(())) => {
                let confirmed = wire.commits().wrapping_sub(commits);
                let begun = wire.begins().wrapping_sub(begins);
                return match (confirmed, begun) {
                    (1, 1) => {
                        connection.end_transaction();
                        self.done = true;
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
            return Err(link.lost("the connection was closed before COMMIT was sent"));
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
