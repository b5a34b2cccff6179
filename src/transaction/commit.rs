//! How a transaction ends: sends COMMIT or ROLLBACK, and turns the [outcome](super::outcome) into what its caller is told.

use std::pin::pin;
use std::sync::Arc;

use tokio::time::timeout;
use tokio_postgres::error::SqlState;

use super::outcome::{Answer, Cause, Next, Outcome, after_commit, before_commit, is_closed};
use super::transaction::{CommitWent, Transaction};
use crate::connect::Step;
use crate::error::{CommitUnknown, DriverError, Error, ServerError};
use crate::observe;

impl Transaction<'_> {
    /// Commits and tells the outcome. On an error the transaction may still be open: see
    /// [`roll_back_now`](Self::roll_back_now).
    pub(super) async fn commit_now(&mut self) -> Result<(), Error> {
        let result = self.commit_once().await;
        self.done |= result.is_ok();
        result
    }

    async fn commit_once(&self) -> Result<(), Error> {
        let connection = self.connection();
        let answer = match self.commit_went() {
            CommitWent::No => None,
            CommitWent::Along => Some(Answer::Came),
            CommitWent::TooLong => Some(Answer::TimedOut),
        };
        if let Some(answer) = answer {
            let told = self.tell(after_commit(&connection.wire().facts(), answer), None);
            return match (told, self.take_refusal()) {
                (Err(e @ (Error::CommitUnknown(_) | Error::TransactionEnded)), _) => Err(e),
                // The statement's own error says which one it was.
                (Err(_), Some(refusal)) => Err(refusal),
                (told, _) => told,
            };
        }
        if let Err(lost) = connection.disown().await {
            // What is on record says more.
            let facts = connection.wire().facts();
            return match before_commit(&facts, connection.has_begun()) {
                Next::Over(outcome) => self.tell(outcome, None),
                Next::Nothing | Next::Commit => Err(lost),
            };
        }
        match before_commit(&connection.wire().facts(), connection.has_begun()) {
            Next::Nothing => {
                connection.end_transaction();
                return Ok(());
            }
            Next::Over(outcome) => return self.tell(outcome, None),
            Next::Commit => {}
        }
        let limit = connection.shell.config().commit_timeout;
        // In its place, it is not moved about.
        let end = pin!(connection.end_block(Step::Commit));
        let (answer, error) = match timeout(limit, end).await {
            Ok(Some(e)) if e.code().is_some_and(|code| matches!(code.code(), "40003" | "08007")) => {
                (Answer::CannotTell, Some(e))
            }
            Ok(error) => (Answer::Came, error),
            Err(_) => (Answer::TimedOut, None),
        };
        self.tell(after_commit(&connection.wire().facts(), answer), error)
    }

    /// Runs `flight`, under whose Sync COMMIT travels. What [`commit_now`](Self::commit_now) says is the outcome; it must
    /// be called next, whatever is returned here.
    pub(crate) async fn commit_with<T>(
        &self,
        flight: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let connection = self.connection();
        self.set_commit_went(CommitWent::Along);
        let limit = connection.shell.config().commit_timeout;
        tokio::select! {
            biased;
            result = flight => result.map_err(|e| {
                self.set_refusal(e);
                Error::TransactionEnded
            }),
            () = connection.wire().until_commit_is_next(limit) => {
                self.set_commit_went(CommitWent::TooLong);
                Err(connection.shell.lost("COMMIT was not answered in time"))
            }
        }
    }

    /// What the caller is told of an outcome, and what becomes of the connection.
    fn tell(&self, outcome: Outcome, error: Option<tokio_postgres::Error>) -> Result<(), Error> {
        let connection = self.connection();
        let facts = connection.wire().facts();
        let told = match outcome {
            Outcome::Committed => Ok(()),
            Outcome::EndedBySql => Err(connection.ended_by_sql()),
            Outcome::Unknown(reason) => Err(self.unknown(reason, facts.fatal.clone())),
            Outcome::RolledBack(Cause::Lost(reason)) => Err(connection.shell.lost(reason)),
            Outcome::RolledBack(Cause::Refused) => Err(match error {
                Some(e) => Error::Database(DriverError(e)),
                None => self.aborted(),
            }),
            Outcome::RolledBack(Cause::Fault) => Err(match error {
                // It was refused, in whatever words; 25P02 is only a symptom.
                Some(e) if e.code().is_some_and(|code| *code != SqlState::IN_FAILED_SQL_TRANSACTION) => {
                    Error::Database(DriverError(e))
                }
                _ => self.aborted(),
            }),
        };
        // Otherwise something is still open.
        if told.is_ok() || is_closed(&facts) && !matches!(outcome, Outcome::RolledBack(Cause::Fault)) {
            connection.end_transaction();
        }
        told
    }

    /// The error of the fault on record.
    fn aborted(&self) -> Error {
        let connection = self.connection();
        match connection.wire().fault(0) {
            Some(fault) => connection.shell.broken_by(&fault),
            // The server has one that is not on record: 25P02 raised by SQL, or more faults than are kept.
            None => Error::Aborted(Box::new(ServerError {
                fatal: false,
                code: SqlState::IN_FAILED_SQL_TRANSACTION,
                message: "COMMIT was answered with ROLLBACK".into(),
                constraint: None,
                routine: None,
            })),
        }
    }

    fn unknown(&self, reason: &'static str, server: Option<Arc<ServerError>>) -> Error {
        self.connection().shell.cut(reason);
        let error = Error::CommitUnknown(Box::new(CommitUnknown { reason, server }));
        observe::commit_unknown(&error);
        error
    }

    /// Commits if `result` is good, rolls back otherwise. Where COMMIT went out with the work, its outcome comes first.
    pub(crate) async fn end_with<T>(&mut self, result: Result<T, Error>) -> Result<T, Error> {
        match self.outcome_of(result).await {
            Ok(value) => Ok(value),
            Err(e) => {
                self.roll_back_now().await;
                Err(e)
            }
        }
    }

    /// What became of work that returned `result`.
    pub(super) async fn outcome_of<T>(&mut self, result: Result<T, Error>) -> Result<T, Error> {
        if self.commit_went() != CommitWent::No {
            return self.commit_now().await.and(result);
        }
        let value = result?;
        self.commit_now().await.map(|()| value)
    }

    /// Ends what is open. A failure closes the connection, which has the same effect.
    pub(super) async fn roll_back_now(&mut self) {
        let connection = self.connection();
        let shell = &connection.shell;
        if connection.wire().is_ended_by_sql() {
            connection.ended_by_sql();
        } else if connection.disown().await.is_ok() && connection.has_begun() {
            connection.drop_steps();
            // COMMIT may have ended it.
            if !is_closed(&connection.wire().facts()) {
                let limit = shell.config().cleanup_timeout;
                let answer = timeout(limit, connection.end_block(Step::RollBack)).await;
                if answer.is_err() || !is_closed(&connection.wire().facts()) {
                    shell.cut("ROLLBACK failed");
                }
            }
        }
        connection.end_transaction();
        self.done = true;
    }
}
