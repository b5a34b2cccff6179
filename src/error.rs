//! What can go wrong, and what may be done about it.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio_postgres::error::{DbError, SqlState};

use crate::retry::RetryClass;
use crate::status::Status;

/// Everything a session, a transaction or the pool can fail with.
///
/// Two machine words, so that it travels cheaply in every `Result`. Ask it questions rather than taking it apart:
/// [`code`](Self::code), [`constraint`](Self::constraint), [`is_unique_violation`](Self::is_unique_violation) and
/// their like look through every variant, so they answer the same whether an error came from a statement, from COMMIT
/// or at the end of ten attempts. Messages are lower-case and never repeat their [source](std::error::Error::source).
///
/// # What quotes data
///
/// `Display` is the server's own message where the server refused something, and the server may quote values of the
/// statement in it: ``invalid input syntax for type uuid: "…"``. So may a [source](std::error::Error::source) that is
/// not this crate's: what a value's conversion failed with. DETAIL, HINT and CONTEXT, which quote whole rows, are in
/// [`db_error`](Self::db_error) alone.
///
/// `Debug`, and so what `unwrap` and a handler's log print, shows none of that: SQLSTATE, severity, the names of
/// constraint, table and column, and the server's routine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting, URL or option that cannot be used. Nothing was sent anywhere.
    #[error("invalid configuration: {0}")]
    Config(Box<str>),

    /// No connection could be made.
    #[error(transparent)]
    Connect(Arc<ConnectError>),

    /// No session could be lent in time.
    #[error(transparent)]
    Acquire(Box<AcquireError>),

    /// The server or the driver refused a statement; the session is still usable.
    #[error(transparent)]
    Database(DriverError),

    /// A COPY failed at one row; nothing is stored, and the session is still usable.
    #[error(transparent)]
    Copy(Box<CopyError>),

    /// One statement of a [`Batch`](crate::Batch), or one row of `execute_many`, was refused. The session is still usable.
    #[error(transparent)]
    Batch(Box<BatchError>),

    /// The connection is gone. A transaction that was open is rolled back. A statement that was sent outside of one may
    /// have taken effect: [`is_outcome_unknown`](Self::is_outcome_unknown) says so.
    #[error(transparent)]
    ConnectionLost(Box<ConnectionLost>),

    /// The transaction was rolled back because a statement in it failed earlier; the source is that first failure.
    ///
    /// The answer to a swallowed statement error: PostgreSQL turns the COMMIT of an aborted transaction into a
    /// ROLLBACK and reports success.
    #[error("the transaction is aborted by an earlier error")]
    Aborted(#[source] Box<ServerError>),

    /// A statement inside the transaction was dropped before it was answered, so nobody knows what it did, and the
    /// transaction was rolled back. Inside a savepoint that holds until the savepoint is rolled back.
    #[error(
        "a statement of the transaction was dropped before it was answered; the transaction is rolled back"
    )]
    StatementAbandoned,

    /// [`query_one`](crate::Connection::query_one) found no row.
    #[error("the query returned no row where one was expected")]
    NoRow,

    /// [`query_one`](crate::Connection::query_one) or [`query_opt`](crate::Connection::query_opt) found more than one
    /// row. The statement has run to its end.
    #[error("the query returned more than one row")]
    TooManyRows,

    /// SQL inside the transaction ended it or began another (`COMMIT`, `ROLLBACK`, `BEGIN`, `… AND CHAIN`), so what
    /// it did is not one unit of work. Whether it was committed is up to that SQL. The connection is closed.
    #[error("SQL inside the transaction ended it or began another one; the connection was closed")]
    TransactionEnded,

    /// The session is inside a transaction that raw SQL began (`BEGIN` by [`batch_execute`]), so another cannot be begun.
    ///
    /// [`batch_execute`]: crate::Connection::batch_execute
    #[error("the session is inside a transaction that SQL began; end that one first")]
    InTransaction,

    /// COMMIT was sent and its answer never came: the transaction is either committed or rolled back. Never retried.
    #[error(transparent)]
    CommitUnknown(Box<CommitUnknown>),

    /// The transaction was attempted as often, or for as long, as its policy allows; the source is the last failure.
    #[error("the transaction failed in all of its {attempts} attempts")]
    RetriesExhausted {
        /// How many times the closure ran, the first run included.
        attempts: u32,
        /// What the last attempt failed with.
        source: Box<Self>,
    },

    /// The transaction's [deadline](crate::TransactionOptions::deadline) passed. It was rolled back.
    #[error("the transaction did not finish within its deadline of {after:?} ({attempts} attempts begun)")]
    DeadlineExceeded {
        /// The deadline that was set.
        after: Duration,
        /// How many attempts had begun.
        attempts: u32,
    },

    /// A row stream or COPY is still open on this session; read it to its end or drop it before the next statement.
    #[error("a row stream or COPY is still open on this session; read it to its end or drop it first")]
    StreamOpen,

    /// Something needs the session for itself (a row stream, COPY, `execute_many`) while another statement is under
    /// way, or a statement was asked for while `execute_many` is at work. Wait for the other one first.
    #[error("the session is busy with another statement; wait for it first")]
    Busy,

    /// Another handle of this request's transaction is in a savepoint.
    #[error("another handle of this request's transaction is in a savepoint; nest them, or let it end first")]
    SavepointOpen,
}

impl Error {
    pub(crate) fn config(message: impl Into<Box<str>>) -> Self {
        Self::Config(message.into())
    }

    pub(crate) fn copy(row: u64, column: Option<Box<str>>, cause: CopyCause) -> Self {
        Self::Copy(Box::new(CopyError { row, column, cause }))
    }

    pub(crate) fn batch(part: BatchPart, cause: BatchCause) -> Self {
        Self::Batch(Box::new(BatchError { part, cause }))
    }

    /// A refusal, with the part of a batch that it is about.
    pub(crate) fn in_batch(self, part: BatchPart) -> Self {
        match self {
            Self::Database(e) => Self::batch(part, BatchCause::Refused(e)),
            other => other,
        }
    }

    pub(crate) fn lost(reason: &'static str, fatal: Option<Arc<ServerError>>) -> Self {
        Self::ConnectionLost(Box::new(ConnectionLost { reason, fatal, unanswered: false }))
    }

    /// As [`lost`](Self::lost), with a statement under way that may have taken effect.
    pub(crate) fn unanswered(reason: &'static str, fatal: Option<Arc<ServerError>>) -> Self {
        Self::ConnectionLost(Box::new(ConnectionLost { reason, fatal, unanswered: true }))
    }

    /// The SQLSTATE the server gave, whichever variant carries it.
    #[must_use]
    pub fn code(&self) -> Option<&SqlState> {
        match self {
            Self::Connect(e) => e.code(),
            Self::Acquire(e) => e.last_connect_error.as_ref().and_then(|e| e.code()),
            Self::Database(e) => e.0.code(),
            Self::Copy(e) => e.server().and_then(|e| e.0.code()),
            Self::Batch(e) => e.refused().and_then(|e| e.0.code()),
            Self::ConnectionLost(e) => e.fatal.as_ref().map(|e| e.code()),
            Self::Aborted(e) => Some(e.code()),
            Self::CommitUnknown(e) => e.code(),
            Self::RetriesExhausted { source, .. } => source.code(),
            _ => None,
        }
    }

    /// The name of the violated constraint, for SQLSTATE class 23.
    #[must_use]
    pub fn constraint(&self) -> Option<&str> {
        match self {
            Self::Database(_) | Self::Copy(_) | Self::Batch(_) => {
                self.db_error().and_then(DbError::constraint)
            }
            Self::Aborted(e) => e.constraint(),
            Self::RetriesExhausted { source, .. } => source.constraint(),
            _ => None,
        }
    }

    /// The server's own error in the driver's type, if a statement or COMMIT was answered with one.
    ///
    /// It carries DETAIL and HINT, which quote row data: mind where it is shown.
    #[must_use]
    pub fn db_error(&self) -> Option<&DbError> {
        match self {
            Self::Database(e) => e.0.as_db_error(),
            Self::Copy(e) => e.server().and_then(|e| e.0.as_db_error()),
            Self::Batch(e) => e.refused().and_then(|e| e.0.as_db_error()),
            Self::RetriesExhausted { source, .. } => source.db_error(),
            _ => None,
        }
    }

    /// The routine of the server that refused, which tells apart what shares a SQLSTATE.
    #[cfg(feature = "problem")]
    pub(crate) fn routine(&self) -> Option<&str> {
        match self {
            Self::Aborted(e) => e.routine.as_deref(),
            Self::RetriesExhausted { source, .. } => source.routine(),
            _ => self.db_error().and_then(DbError::routine),
        }
    }

    /// What happened, for the log: without the server's words, which may quote values, and without addresses.
    #[cfg(feature = "problem")]
    pub(crate) fn in_our_words(&self) -> impl fmt::Display + '_ {
        InOurWords(self)
    }

    fn is(&self, state: &SqlState) -> bool {
        self.code() == Some(state)
    }

    /// SQLSTATE 23505: a row with this key exists.
    #[must_use]
    pub fn is_unique_violation(&self) -> bool {
        self.is(&SqlState::UNIQUE_VIOLATION)
    }

    /// SQLSTATE 23503: a referenced row is missing, or a row is still referenced.
    #[must_use]
    pub fn is_foreign_key_violation(&self) -> bool {
        self.is(&SqlState::FOREIGN_KEY_VIOLATION)
    }

    /// SQLSTATE 23514: a CHECK constraint refused the row.
    #[must_use]
    pub fn is_check_violation(&self) -> bool {
        self.is(&SqlState::CHECK_VIOLATION)
    }

    /// SQLSTATE 23502: a NULL where none may be.
    #[must_use]
    pub fn is_not_null_violation(&self) -> bool {
        self.is(&SqlState::NOT_NULL_VIOLATION)
    }

    /// SQLSTATE 40001: concurrent transactions could not be put in an order.
    #[must_use]
    pub fn is_serialization_failure(&self) -> bool {
        self.is(&SqlState::T_R_SERIALIZATION_FAILURE)
    }

    /// SQLSTATE 40P01: the server broke a deadlock by ending this transaction.
    #[must_use]
    pub fn is_deadlock(&self) -> bool {
        self.is(&SqlState::T_R_DEADLOCK_DETECTED)
    }

    /// Whether running the whole transaction again is what PostgreSQL advises: 40001 and 40P01, not answered by an
    /// [unknown commit](Self::CommitUnknown).
    ///
    /// ```
    /// # fn f(error: pg_session::Error) {
    /// if error.is_retryable() {
    ///     // all attempts of the policy were used up: ask the client to come back later
    /// }
    /// # }
    /// ```
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        !matches!(self, Self::CommitUnknown(_))
            && self.code().is_some_and(|code| {
                matches!(RetryClass::of(code.code()), Some(RetryClass::Serialization | RetryClass::Deadlock))
            })
    }

    /// Whether a limit on time was reached: waiting for a session, connecting, or a transaction's deadline.
    #[must_use]
    pub fn is_timeout(&self) -> bool {
        match self {
            Self::Acquire(e) => !matches!(e.phase, AcquirePhase::Closed | AcquirePhase::TooManyWaiters),
            Self::Connect(e) => matches!(e.cause, ConnectCause::TimedOut(_)),
            Self::DeadlineExceeded { .. } => true,
            _ => false,
        }
    }

    /// Whether the pool was closed with [`SessionManager::close`](crate::SessionManager::close).
    #[must_use]
    pub fn is_closed(&self) -> bool {
        matches!(self, Self::Acquire(e) if e.phase == AcquirePhase::Closed)
    }

    /// Whether the connection was lost before the work was done.
    #[must_use]
    pub fn is_connection_lost(&self) -> bool {
        match self {
            Self::ConnectionLost(_) => true,
            Self::RetriesExhausted { source, .. } => source.is_connection_lost(),
            _ => false,
        }
    }

    /// Whether nobody knows if the work took effect: [`CommitUnknown`](Self::CommitUnknown), or a connection that was lost
    /// while a statement outside a transaction was under way. Doing it again may do it twice.
    #[must_use]
    pub fn is_outcome_unknown(&self) -> bool {
        match self {
            Self::CommitUnknown(_) => true,
            Self::ConnectionLost(e) => e.unanswered,
            Self::RetriesExhausted { source, .. } => source.is_outcome_unknown(),
            _ => false,
        }
    }

    /// Whether COMMIT was sent and not answered, so that the transaction may or may not have been committed.
    #[must_use]
    pub fn is_commit_unknown(&self) -> bool {
        matches!(self, Self::CommitUnknown(_))
    }
}

/// An error and what lies behind it, on one line and in words of this crate's or the driver's own.
#[cfg(feature = "problem")]
struct InOurWords<'a>(&'a Error);

#[cfg(feature = "problem")]
impl fmt::Display for InOurWords<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Error::Database(e) => e.in_our_words(f),
            Error::Connect(e) => e.in_our_words(f),
            Error::Acquire(e) => {
                e.fmt(f)?;
                e.last_connect_error.as_ref().map_or(Ok(()), |e| {
                    f.write_str(": ")?;
                    e.in_our_words(f)
                })
            }
            Error::RetriesExhausted { source, .. } => write!(f, "{}: {}", self.0, InOurWords(source)),
            // Names, numbers and reasons; what the server or a value's conversion said is only their source.
            other => other.fmt(f),
        }
    }
}

/// The driver's own error, worded so that message and source do not say the same thing twice.
///
/// The driver says "db error" and leaves the rest to its source. Here the message is the server's, with the SQLSTATE
/// and without DETAIL and HINT, which quote row data; [`inner`](Self::inner) has them. Only a cause that is not the
/// server's (a value that could not be encoded, say) remains as the source.
///
/// The message may quote values; `Debug` shows [what cannot](Error#what-quotes-data).
pub struct DriverError(pub(crate) tokio_postgres::Error);

impl DriverError {
    /// The driver's error itself. Its `Debug` shows all that the server said, row data included.
    #[must_use]
    pub fn inner(&self) -> &tokio_postgres::Error {
        &self.0
    }

    #[cfg(feature = "problem")]
    fn in_our_words(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_db_error() {
            Some(_) => f.write_str("the server refused it"),
            None => write!(f, "{}", self.0),
        }
    }
}

impl fmt::Debug for DriverError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(e) = self.0.as_db_error() else {
            let mut debug = f.debug_tuple("DriverError");
            debug.field(&format_args!("{}", self.0));
            // Any other cause may be a value's own, and quote it.
            let cause = std::error::Error::source(&self.0).and_then(|e| e.downcast_ref::<io::Error>());
            if let Some(cause) = cause {
                debug.field(&cause.kind());
            }
            return debug.finish();
        };
        let mut debug = f.debug_struct("DriverError");
        debug.field("severity", &format_args!("{}", e.severity())).field("code", &e.code().code());
        let names = [
            ("constraint", e.constraint()),
            ("table", e.table()),
            ("column", e.column()),
            ("routine", e.routine()),
        ];
        for (name, value) in names {
            if let Some(value) = value {
                debug.field(name, &value);
            }
        }
        debug.finish()
    }
}

impl fmt::Display for DriverError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_db_error() {
            Some(e) => write!(f, "{} (SQLSTATE {})", e.message(), e.code().code()),
            None => match unconverted(&self.0.to_string()) {
                // What is wrong with it is the source.
                Some(number) => write!(f, "parameter ${number} could not be converted"),
                None => self.0.fmt(f),
            },
        }
    }
}

/// The number, as in SQL, of the parameter that the driver says it cannot convert; it counts from 0, and has no other way
/// to tell.
fn unconverted(message: &str) -> Option<usize> {
    let rest = message.strip_prefix("error serializing parameter ")?;
    let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    rest[..digits].parse::<usize>().ok()?.checked_add(1)
}

impl std::error::Error for DriverError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self.0.as_db_error() {
            Some(_) => None,
            None => std::error::Error::source(&self.0),
        }
    }
}

/// Which row of a COPY is wrong, and what with it.
///
/// The cause, if it is another's, is the [source](std::error::Error::source): the server's error, or what a value's
/// conversion failed with.
#[derive(Debug)]
pub struct CopyError {
    row: u64,
    column: Option<Box<str>>,
    cause: CopyCause,
}

pub(crate) enum CopyCause {
    Server(DriverError),
    Value(Box<dyn std::error::Error + Sync + Send>),
    FieldCount { fields: usize, columns: usize },
    NoColumn(Box<str>),
    Malformed(&'static str),
}

impl fmt::Debug for CopyCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Server(e) => fmt::Debug::fmt(e, f),
            // Its own words may quote the value.
            Self::Value(_) => f.debug_tuple("Value").finish_non_exhaustive(),
            Self::FieldCount { fields, columns } => {
                f.debug_struct("FieldCount").field("fields", fields).field("columns", columns).finish()
            }
            Self::NoColumn(column) => f.debug_tuple("NoColumn").field(column).finish(),
            Self::Malformed(reason) => f.debug_tuple("Malformed").field(reason).finish(),
        }
    }
}

impl CopyError {
    /// The number of the row; the first is 1.
    #[must_use]
    pub fn row(&self) -> u64 {
        self.row
    }

    /// The name of the column, if it is one column that is wrong.
    #[must_use]
    pub fn column(&self) -> Option<&str> {
        self.column.as_deref()
    }

    fn server(&self) -> Option<&DriverError> {
        match &self.cause {
            CopyCause::Server(e) => Some(e),
            _ => None,
        }
    }
}

impl fmt::Display for CopyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "row {} of the COPY", self.row)?;
        if let Some(column) = &self.column {
            write!(f, ", column {column:?},")?;
        }
        match &self.cause {
            CopyCause::Server(_) => write!(f, " was refused"),
            CopyCause::Value(_) => write!(f, " could not be converted"),
            CopyCause::FieldCount { fields, columns } => {
                write!(f, " does not fit: the number of its fields is {fields}, of the columns {columns}")
            }
            CopyCause::NoColumn(column) => write!(f, " has no column {column:?}"),
            CopyCause::Malformed(reason) => write!(f, " cannot be read: {reason}"),
        }
    }
}

impl std::error::Error for CopyError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.cause {
            CopyCause::Server(e) => Some(e),
            CopyCause::Value(e) => Some(&**e),
            CopyCause::FieldCount { .. } | CopyCause::NoColumn(_) | CopyCause::Malformed(_) => None,
        }
    }
}

/// Which statement of a [`Batch`](crate::Batch), or which row of `execute_many`, is wrong, and what with it.
///
/// The cause, if it is another's, is the [source](std::error::Error::source): the server's error, or what a value's
/// conversion failed with.
#[derive(Debug)]
pub struct BatchError {
    part: BatchPart,
    cause: BatchCause,
}

/// The number of a statement, or of a row; the first is 1.
#[derive(Clone, Copy, Debug)]
pub(crate) enum BatchPart {
    Statement(u64),
    Row(u64),
}

impl BatchPart {
    /// The statement with this index; the first is 0.
    pub(crate) fn statement(index: usize) -> Self {
        Self::Statement(index as u64 + 1)
    }
}

pub(crate) enum BatchCause {
    Refused(DriverError),
    /// The first parameter is 1, as in SQL.
    Value {
        parameter: usize,
        cause: Box<dyn std::error::Error + Sync + Send>,
    },
    ParameterCount {
        given: usize,
        wanted: usize,
    },
}

impl fmt::Debug for BatchCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(e) => fmt::Debug::fmt(e, f),
            // Its own words may quote the value.
            Self::Value { parameter, .. } => {
                f.debug_struct("Value").field("parameter", parameter).finish_non_exhaustive()
            }
            Self::ParameterCount { given, wanted } => {
                f.debug_struct("ParameterCount").field("given", given).field("wanted", wanted).finish()
            }
        }
    }
}

impl BatchError {
    /// The number of the statement or row, in the order in which they were given; the first is 1.
    #[must_use]
    pub fn position(&self) -> u64 {
        match self.part {
            BatchPart::Statement(number) | BatchPart::Row(number) => number,
        }
    }

    /// The number of the parameter, if it is one that could not be converted; `$1` is 1.
    #[must_use]
    pub fn parameter(&self) -> Option<usize> {
        match self.cause {
            BatchCause::Value { parameter, .. } => Some(parameter),
            _ => None,
        }
    }

    fn refused(&self) -> Option<&DriverError> {
        match &self.cause {
            BatchCause::Refused(e) => Some(e),
            _ => None,
        }
    }
}

impl fmt::Display for BatchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.part {
            BatchPart::Statement(number) => write!(f, "statement {number} of the batch")?,
            BatchPart::Row(number) => write!(f, "row {number} of execute_many")?,
        }
        match &self.cause {
            BatchCause::Refused(_) => write!(f, " was refused"),
            BatchCause::Value { parameter, .. } => {
                write!(f, ": parameter ${parameter} could not be converted")
            }
            BatchCause::ParameterCount { given, wanted } => {
                write!(f, " has {given} parameters where its SQL has {wanted}")
            }
        }
    }
}

impl std::error::Error for BatchError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.cause {
            BatchCause::Refused(e) => Some(e),
            BatchCause::Value { cause, .. } => Some(&**cause),
            BatchCause::ParameterCount { .. } => None,
        }
    }
}

/// An error as the server sent it, read off the wire.
///
/// The driver hands an error only to the future that waits for it; this one is there even if that future was dropped,
/// as by `try_join!`, so the first cause of an aborted transaction is never lost.
///
/// The message may quote values; `Debug` shows [what cannot](Error#what-quotes-data).
#[derive(Clone)]
pub struct ServerError {
    pub(crate) fatal: bool,
    pub(crate) code: SqlState,
    pub(crate) message: Box<str>,
    pub(crate) constraint: Option<Box<str>>,
    pub(crate) routine: Option<Box<str>>,
}

impl ServerError {
    /// What may be done about it by running the transaction again.
    pub(crate) fn retry_class(&self) -> Option<RetryClass> {
        match self.code.code() {
            "0A000" if self.routine.as_deref() == Some("RevalidateCachedQuery") => {
                Some(RetryClass::StaleStatement)
            }
            code => RetryClass::of(code),
        }
    }

    /// The SQLSTATE.
    #[must_use]
    pub fn code(&self) -> &SqlState {
        &self.code
    }

    /// The server's primary message; it may quote values of the statement.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The constraint it is about, if any.
    #[must_use]
    pub fn constraint(&self) -> Option<&str> {
        self.constraint.as_deref()
    }

    /// Whether the server ended the connection with it (severity FATAL or PANIC).
    #[must_use]
    pub fn is_fatal(&self) -> bool {
        self.fatal
    }
}

impl fmt::Debug for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("ServerError");
        debug.field("fatal", &self.fatal).field("code", &self.code.code());
        for (name, value) in [("constraint", &self.constraint), ("routine", &self.routine)] {
            if let Some(value) = value {
                debug.field(name, value);
            }
        }
        debug.finish()
    }
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (SQLSTATE {})", self.message, self.code.code())
    }
}

impl std::error::Error for ServerError {}

/// Why a connection that was in use is gone.
#[derive(Debug)]
pub struct ConnectionLost {
    pub(crate) reason: &'static str,
    pub(crate) fatal: Option<Arc<ServerError>>,
    /// A statement outside a transaction may have been carried out.
    pub(crate) unanswered: bool,
}

impl ConnectionLost {
    /// The FATAL error the server sent before it closed the connection, if it did.
    #[must_use]
    pub fn fatal(&self) -> Option<&ServerError> {
        self.fatal.as_deref()
    }
}

impl fmt::Display for ConnectionLost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the connection to the server is lost: {}", self.reason)?;
        if self.unanswered {
            f.write_str("; whether the statement under way took effect is unknown")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConnectionLost {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.fatal.as_ref().map(|e| &**e as _)
    }
}

/// Why nobody knows whether a transaction was committed.
#[derive(Debug)]
pub struct CommitUnknown {
    pub(crate) reason: &'static str,
    pub(crate) server: Option<Arc<ServerError>>,
}

impl CommitUnknown {
    /// The SQLSTATE of the server's last word, if it had one.
    #[must_use]
    pub fn code(&self) -> Option<&SqlState> {
        self.server.as_ref().map(|e| e.code())
    }
}

impl fmt::Display for CommitUnknown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the outcome of the commit is unknown: {}", self.reason)
    }
}

impl std::error::Error for CommitUnknown {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.server.as_ref().map(|e| &**e as _)
    }
}

/// Why no connection could be made.
#[derive(Debug)]
pub struct ConnectError {
    pub(crate) target: String,
    pub(crate) phase: &'static str,
    pub(crate) cause: ConnectCause,
}

#[derive(Debug)]
pub(crate) enum ConnectCause {
    Io(io::Error),
    Driver(DriverError),
    TimedOut(Duration),
    Refused(String),
}

impl ConnectError {
    /// The address that was tried last: host and port, or the path of a socket. Never a user or a password.
    #[must_use]
    pub fn target(&self) -> &str {
        &self.target
    }

    /// The step that failed: resolving the name, opening the socket, start-up and authentication, or checking the
    /// server.
    #[must_use]
    pub fn phase(&self) -> &str {
        self.phase
    }

    /// The SQLSTATE, if the server refused: `28P01` for a wrong password, `3D000` for a missing database, `57P03`
    /// while it starts, `53300` when it is full.
    #[must_use]
    pub fn code(&self) -> Option<&SqlState> {
        match &self.cause {
            ConnectCause::Driver(e) => e.0.code(),
            _ => None,
        }
    }

    #[cfg(feature = "problem")]
    fn in_our_words(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "could not connect ({}): ", self.phase)?;
        match &self.cause {
            ConnectCause::Io(e) => write!(f, "{e}"),
            ConnectCause::Driver(e) => e.in_our_words(f),
            ConnectCause::TimedOut(after) => write!(f, "no answer within {after:?}"),
            ConnectCause::Refused(why) => f.write_str(why),
        }
    }
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "could not connect to {} ({})", self.target, self.phase)?;
        match &self.cause {
            ConnectCause::Io(_) => Ok(()),
            ConnectCause::Driver(e) => write!(f, ": {e}"),
            ConnectCause::TimedOut(after) => write!(f, ": no answer within {after:?}"),
            ConnectCause::Refused(why) => write!(f, ": {why}"),
        }
    }
}

impl std::error::Error for ConnectError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.cause {
            ConnectCause::Io(e) => Some(e),
            ConnectCause::Driver(e) => std::error::Error::source(e),
            ConnectCause::TimedOut(_) | ConnectCause::Refused(_) => None,
        }
    }
}

/// Why no session was lent: the phase it was in, how long it took, the pool's numbers, and the last trouble in
/// connecting.
#[derive(Debug)]
pub struct AcquireError {
    pub(crate) phase: AcquirePhase,
    pub(crate) waited: Duration,
    pub(crate) status: Status,
    pub(crate) last_connect_error: Option<Arc<ConnectError>>,
}

/// What an [`acquire`](crate::SessionManager::acquire) was doing when it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AcquirePhase {
    /// Every session was lent out, and none came back in time.
    Waiting,
    /// A place was free, and the connection for it was not ready in time.
    Connecting,
    /// As many callers as [`max_waiting`](crate::SessionConfig::max_waiting) allows were waiting already.
    TooManyWaiters,
    /// This task holds every session of the pool itself, so waiting could never end.
    SelfDeadlock,
    /// The pool is closed.
    Closed,
}

impl AcquireError {
    /// What it was doing.
    #[must_use]
    pub fn phase(&self) -> AcquirePhase {
        self.phase
    }

    /// How long it had waited.
    #[must_use]
    pub fn waited(&self) -> Duration {
        self.waited
    }

    /// The pool's numbers at that moment.
    #[must_use]
    pub fn status(&self) -> Status {
        self.status
    }

    /// The last failure to connect that this pool saw, if it has not connected since.
    #[must_use]
    pub fn last_connect_error(&self) -> Option<&ConnectError> {
        self.last_connect_error.as_deref()
    }
}

impl fmt::Display for AcquireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = &self.status;
        match self.phase {
            AcquirePhase::Waiting => write!(f, "no session became free within {:?}", self.waited)?,
            AcquirePhase::Connecting => write!(f, "no connection was ready within {:?}", self.waited)?,
            AcquirePhase::TooManyWaiters => f.write_str("too many callers are waiting for a session")?,
            AcquirePhase::SelfDeadlock => f.write_str(
                "this task holds every session of the pool itself: use the session it has, or a larger max_size",
            )?,
            AcquirePhase::Closed => return f.write_str("the session manager is closed"),
        }
        write!(
            f,
            " (max_size {}, open {}, idle {}, in use {}, waiting {})",
            s.max_size, s.size, s.idle, s.in_use, s.waiting
        )
    }
}

impl std::error::Error for AcquireError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.last_connect_error.as_ref().map(|e| &**e as _)
    }
}
