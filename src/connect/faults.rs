//! The errors of the transaction under way, and the one that ended the connection.

use std::sync::Arc;

use tokio_postgres::error::SqlState;

use crate::error::ServerError;
use crate::retry::RetryClass;

/// Enough errors to name a cause; a transaction can fail in a loop of savepoints for as long as it likes.
const LIMIT: usize = 16;

/// Why a transaction must not be committed.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    /// The server refused a statement.
    Server(Arc<ServerError>),
    /// A statement was dropped before it was answered.
    Abandoned,
    /// Some rows of `execute_many` may have been stored, and others were never sent.
    Halfway,
}

#[derive(Debug, Default)]
pub(super) struct Faults {
    faults: Vec<Fault>,
    /// Those that a savepoint was rolled back for, which does not help.
    forgiven: Vec<Arc<ServerError>>,
    pub(super) last: Option<Arc<ServerError>>,
    pub(super) fatal: Option<Arc<ServerError>>,
}

impl Faults {
    /// A transaction begins.
    pub(super) fn clear(&mut self) {
        self.faults.clear();
        self.forgiven.clear();
    }

    /// How many there are.
    pub(super) fn mark(&self) -> usize {
        self.faults.len()
    }

    /// The first since `mark`.
    pub(super) fn since(&self, mark: usize) -> Option<Fault> {
        self.faults.get(mark).cloned()
    }

    pub(super) fn forgiven(&self) -> Option<Arc<ServerError>> {
        self.forgiven.first().cloned()
    }

    pub(super) fn note(&mut self, fault: Fault) {
        if self.faults.len() < LIMIT {
            self.faults.push(fault);
        }
    }

    /// The server has sent an error; whether it is a fault of the transaction, if one is recorded. 25P02 is only the symptom
    /// of one.
    pub(super) fn on_error(&mut self, error: &Arc<ServerError>, recording: bool) -> bool {
        self.last = Some(Arc::clone(error));
        if error.fatal {
            self.fatal.get_or_insert_with(|| Arc::clone(error));
        }
        let counts = recording && error.code != SqlState::IN_FAILED_SQL_TRANSACTION;
        if counts {
            self.note(Fault::Server(Arc::clone(error)));
        }
        counts
    }

    /// Those since `mark` are undone.
    pub(super) fn forgive(&mut self, mark: usize) {
        let from = mark.min(self.faults.len());
        let faults = self.faults.split_off(from);
        self.remember(faults);
    }

    /// Those of the server's are undone.
    pub(super) fn forgive_the_servers(&mut self) {
        let (server, ours) = self.faults.drain(..).partition(|fault| matches!(fault, Fault::Server(_)));
        self.faults = ours;
        self.remember(server);
    }

    fn remember(&mut self, faults: Vec<Fault>) {
        for fault in faults {
            if let Fault::Server(e) = fault {
                if outlives_savepoints(&e) && self.forgiven.len() < LIMIT {
                    self.forgiven.push(e);
                }
            }
        }
    }
}

/// Whether the whole transaction has to be run again for it: after a serialization failure or deadlock, and with what was
/// prepared before the schema changed or is gone.
fn outlives_savepoints(error: &ServerError) -> bool {
    error.code.code().starts_with("40") || error.retry_class() == Some(RetryClass::StaleStatement)
}

/// Reads the fields that are kept (manual, chapter 54.8).
pub(super) fn parse_error(mut body: &[u8]) -> ServerError {
    let mut error = ServerError {
        fatal: false,
        code: SqlState::INTERNAL_ERROR,
        message: "".into(),
        constraint: None,
        routine: None,
    };
    while let [kind, rest @ ..] = body {
        if *kind == 0 {
            break;
        }
        let end = rest.iter().position(|b| *b == 0).unwrap_or(rest.len());
        let value = String::from_utf8_lossy(&rest[..end]);
        match kind {
            b'V' => error.fatal = matches!(&*value, "FATAL" | "PANIC"),
            b'C' => error.code = SqlState::from_code(&value),
            b'M' => error.message = value.into(),
            b'n' => error.constraint = Some(value.into()),
            b'R' => error.routine = Some(value.into()),
            _ => {}
        }
        body = rest.get(end + 1..).unwrap_or_default();
    }
    error
}
