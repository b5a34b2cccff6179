//! What an error looks like over HTTP: a status and an RFC 9457 body, by one table that can be changed.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use crate::error::{AcquirePhase, Error};
use crate::observe;

/// A problem as an HTTP API reports it: `application/problem+json` (RFC 9457).
///
/// With the features `axum` and `actix-web` a handler's error type: `?` turns an [`Error`] into one by the
/// [default table](Problems), and a service makes its own with [`new`](Self::new). Other frameworks send
/// [`status`](Self::status), [`retry_after`](Self::retry_after) and [`body`](Self::body).
///
/// ```
/// use pg_session::Problem;
///
/// let problem = Problem::new(404, "item_not_found").detail("no item has this id");
/// assert_eq!(
///     problem.body(),
///     r#"{"title":"Not Found","status":404,"detail":"no item has this id","code":"item_not_found"}"#
/// );
/// ```
///
/// The body of what is made from an [`Error`] carries no SQL, no parameter, no row data and no name of a host, table or
/// constraint: the cause goes to the log, where the request's span tells which request it was. `Debug` shows the cause
/// as [it shows itself](Error#what-quotes-data), without row data too.
#[derive(Clone, Debug)]
#[must_use]
pub struct Problem {
    status: u16,
    code: Cow<'static, str>,
    detail: Option<Cow<'static, str>>,
    retry_after: Option<Duration>,
    cause: Option<Arc<Error>>,
    /// Nothing was changed since a table made it from its cause.
    by_table: bool,
}

impl Problem {
    /// The media type of [`body`](Self::body).
    pub const CONTENT_TYPE: &'static str = "application/problem+json";

    /// A problem of the service's own. The code is for programs: it should stay the same for ever.
    ///
    /// A status that is no error, below 400 or above 599, becomes 500.
    pub fn new(status: u16, code: impl Into<Cow<'static, str>>) -> Self {
        let status = if (400..600).contains(&status) { status } else { 500 };
        Self { status, code: code.into(), detail: None, retry_after: None, cause: None, by_table: false }
    }

    /// A sentence for people. It goes to the client: put nothing in it that the client must not know.
    pub fn detail(mut self, detail: impl Into<Cow<'static, str>>) -> Self {
        self.detail = Some(detail.into());
        self.by_table = false;
        self
    }

    /// The HTTP status.
    #[must_use]
    pub fn status(&self) -> u16 {
        self.status
    }

    /// The code for programs, such as `unique_violation`; see [`Problems`].
    #[must_use]
    pub fn code(&self) -> &str {
        &self.code
    }

    /// The value of the `Retry-After` header, in whole seconds, if the same request may well succeed later.
    #[must_use]
    pub fn retry_after(&self) -> Option<u64> {
        self.retry_after.map(|after| after.as_secs().saturating_add(u64::from(after.subsec_nanos() > 0)))
    }

    /// The error it was made from.
    #[must_use]
    pub fn cause(&self) -> Option<&Error> {
        self.cause.as_deref()
    }

    /// The JSON body.
    #[must_use]
    pub fn body(&self) -> String {
        #[derive(Serialize)]
        struct Body<'a> {
            #[serde(skip_serializing_if = "Option::is_none")]
            title: Option<&'static str>,
            status: u16,
            #[serde(skip_serializing_if = "Option::is_none")]
            detail: Option<&'a str>,
            code: &'a str,
        }
        let body = Body {
            title: title(self.status),
            status: self.status,
            detail: self.detail.as_deref(),
            code: &self.code,
        };
        // Cannot fail: strings and a number, written to memory.
        serde_json::to_string(&body).unwrap_or_default()
    }

    /// Tells the log the cause, which the client is not told: at level error for status 500, warn for 503 and 504, else
    /// debug. The adapters do so; for those who send problems in another way.
    ///
    /// The cause as this crate words it, with SQLSTATE, constraint and the server's routine. The server's message may
    /// quote values, so it is not there: who wants it in a log takes it from [`cause`](Self::cause).
    pub fn log(&self) {
        if let Some(cause) = self.cause() {
            self.log_as_made_from(cause);
        }
    }

    pub(crate) fn log_as_made_from(&self, cause: &Error) {
        observe::problem(
            self.status,
            &self.code,
            &cause.in_our_words(),
            cause.code().map(|state| state.code()),
            cause.constraint(),
            cause.routine(),
        );
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        Problems::new().problem(error)
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.status, self.code)?;
        self.detail.as_ref().map_or(Ok(()), |detail| write!(f, ": {detail}"))
    }
}

impl std::error::Error for Problem {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.cause.as_deref().map(|e| e as _)
    }
}

/// The table from [`Error`] to [`Problem`].
///
/// | what failed | status | code | `Retry-After` |
/// |---|---|---|---|
/// | unique key (23505) | 409 | `unique_violation` | |
/// | foreign key (23503, 23001) | 409 | `foreign_key_violation` | |
/// | exclusion constraint (23P01) | 409 | `exclusion_violation` | |
/// | NOT NULL (23502) | 422 | `not_null_violation` | |
/// | CHECK (23514, 44000) | 422 | `check_violation` | |
/// | a value that does not fit (class 22) | 422 | `data_exception` | |
/// | conflicts with other transactions until the attempts were used up (40001, 40P01) | 503 | `contention` | 1 s |
/// | `lock_timeout` or NOWAIT (55P03) | 503 | `lock_not_available` | 1 s |
/// | no session became free, or too many waited | 503 | `pool_exhausted` | 1 s |
/// | the session manager is closed | 503 | `shutting_down` | 1 s |
/// | no connection, or it was lost; the server is starting, stopping, full or a standby (classes 08, 53, 57P01–57P05, 25006) | 503 | `database_unavailable` | 1 s |
/// | a deadline, `statement_timeout` and the like (57014, 25P03, 25P04) | 504 | `timeout` | |
/// | a commit that was not answered: it may have happened (40003, 08007) | 500 | `commit_unknown` | never |
/// | the connection was lost with a statement outside a transaction under way: it may have happened | 500 | `outcome_unknown` | never |
/// | `query_one` found no row | 404 | `not_found` | |
/// | anything else | 500 | `internal` | |
///
/// A service changes a line where it disagrees, and gives its constraints names that its clients understand. As a layer
/// (axum) or middleware (actix-web) around the routes it applies to what handlers return as [`Error`] or [`Problem`], and to
/// what [request transactions](crate#features) fail with:
///
/// ```
/// use pg_session::Problems;
///
/// let problems = Problems::new()
///     .status("check_violation", 400)              // by code
///     .status("42501", 403)                        // by SQLSTATE
///     .constraint("users_email_key", 409, "email_taken");
/// ```
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct Problems {
    changes: Arc<Changes>,
}

#[derive(Clone, Debug, Default)]
struct Changes {
    status: HashMap<Cow<'static, str>, u16>,
    constraints: HashMap<Cow<'static, str>, (u16, Cow<'static, str>)>,
    retry_after: Option<Duration>,
}

/// When a client may come again, where the table says that it may.
const RETRY_AFTER: Duration = Duration::from_secs(1);

impl Problems {
    /// The table as it stands above.
    pub fn new() -> Self {
        Self::default()
    }

    /// Answers with this status where the table has this code, or where the server gave this SQLSTATE, which counts for
    /// more. A status that is no error, below 400 or above 599, becomes 500.
    pub fn status(mut self, code: impl Into<Cow<'static, str>>, status: u16) -> Self {
        Arc::make_mut(&mut self.changes).status.insert(code.into(), status);
        self
    }

    /// Answers with this status and code where a constraint of this name was violated.
    pub fn constraint(
        mut self,
        name: impl Into<Cow<'static, str>>,
        status: u16,
        code: impl Into<Cow<'static, str>>,
    ) -> Self {
        Arc::make_mut(&mut self.changes).constraints.insert(name.into(), (status, code.into()));
        self
    }

    /// How long clients are asked to wait, where they are asked to come again. Sent in whole seconds, rounded up.
    /// Default 1 s.
    pub fn retry_after(mut self, after: Duration) -> Self {
        Arc::make_mut(&mut self.changes).retry_after = Some(after);
        self
    }

    /// The problem that stands for this error.
    pub fn problem(&self, error: impl Into<Arc<Error>>) -> Problem {
        let cause = error.into();
        let mut problem = self.describe(&cause);
        problem.cause = Some(cause);
        problem.by_table = true;
        problem
    }

    /// The problem without its cause, for those who only have a reference to it.
    pub(crate) fn describe(&self, error: &Error) -> Problem {
        let Changes { status, constraints, retry_after } = &*self.changes;
        let line = Line::of(error);
        let sqlstate = error.code().map(|state| state.code());
        let mut problem = match error.constraint().and_then(|name| constraints.get(name)) {
            Some((status, code)) => Problem::new(*status, code.clone()),
            None => {
                let changed = sqlstate.and_then(|state| status.get(state)).or(status.get(line.code));
                Problem::new(changed.copied().unwrap_or(line.status), line.code)
            }
        };
        problem.detail = Some(line.detail.into());
        if line.again {
            problem.retry_after = Some(retry_after.unwrap_or(RETRY_AFTER));
        }
        problem
    }

    /// What this table makes of a problem that another has made; one of the service's own stays as it is.
    pub fn apply(&self, problem: Problem) -> Problem {
        match &problem.cause {
            Some(cause) if problem.by_table => self.problem(Arc::clone(cause)),
            _ => problem,
        }
    }
}

/// One line of the table.
struct Line {
    status: u16,
    code: &'static str,
    detail: &'static str,
    /// Whether the same request may well succeed later.
    again: bool,
}

impl Line {
    const fn refused(status: u16, code: &'static str, detail: &'static str) -> Self {
        Self { status, code, detail, again: false }
    }

    const fn busy(code: &'static str, detail: &'static str) -> Self {
        Self { status: 503, code, detail, again: true }
    }

    fn of(error: &Error) -> Self {
        if let Error::RetriesExhausted { source, .. } = error {
            return Self::of(source);
        }
        const UNAVAILABLE: Line = Line::busy("database_unavailable", "the database cannot be reached now");
        const INTERNAL: Line = Line::refused(500, "internal", "something went wrong on the server");
        const TIMEOUT: Line = Line::refused(504, "timeout", "the request took too long and was given up");
        match error {
            Error::CommitUnknown(_) => return Self::COMMIT_UNKNOWN,
            // Repeated, it could happen twice.
            e if e.is_outcome_unknown() => return Self { code: "outcome_unknown", ..Self::COMMIT_UNKNOWN },
            Error::NoRow => return Self::refused(404, "not_found", "there is no such thing"),
            Error::DeadlineExceeded { .. } => return TIMEOUT,
            Error::Acquire(e) => match e.phase() {
                AcquirePhase::Closed => return Self::busy("shutting_down", "the service is shutting down"),
                // Nobody else can end it.
                AcquirePhase::SelfDeadlock => return INTERNAL,
                AcquirePhase::Connecting => return UNAVAILABLE,
                AcquirePhase::Waiting | AcquirePhase::TooManyWaiters => {
                    return Self::busy("pool_exhausted", "the service is busy");
                }
            },
            _ => {}
        }
        let Some(state) = error.code() else {
            let unreachable = matches!(error, Error::Connect(_)) || error.is_connection_lost();
            return if unreachable { UNAVAILABLE } else { INTERNAL };
        };
        match state.code() {
            "23505" => Self::refused(409, "unique_violation", "it exists already"),
            "23503" | "23001" => Self::refused(
                409,
                "foreign_key_violation",
                "it refers to something that does not exist, or is still referred to",
            ),
            "23P01" => Self::refused(409, "exclusion_violation", "it overlaps with something that exists"),
            "23502" => Self::refused(422, "not_null_violation", "a value is missing"),
            "23514" | "44000" => Self::refused(422, "check_violation", "a value is not allowed"),
            state if state.starts_with("22") => {
                Self::refused(422, "data_exception", "a value has the wrong form or size")
            }
            "40001" | "40P01" => Self::busy("contention", "too many requests changed the same data at once"),
            "55P03" => Self::busy("lock_not_available", "the data is in use by another request"),
            "57014" | "25P03" | "25P04" => TIMEOUT,
            "40003" | "08007" => Self::COMMIT_UNKNOWN,
            "25006" | "57P01" | "57P02" | "57P03" | "57P04" | "57P05" => UNAVAILABLE,
            state if state.starts_with("08") || state.starts_with("53") => UNAVAILABLE,
            _ if matches!(error, Error::Connect(_)) || error.is_connection_lost() => UNAVAILABLE,
            _ => INTERNAL,
        }
    }

    const COMMIT_UNKNOWN: Self = Self::refused(
        500,
        "commit_unknown",
        "the request may or may not have taken effect; look before repeating it",
    );
}

/// RFC 9457 asks for the status's own phrase where there is no `type` (RFC 9110, chapter 15).
fn title(status: u16) -> Option<&'static str> {
    Some(match status {
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        409 => "Conflict",
        410 => "Gone",
        412 => "Precondition Failed",
        413 => "Content Too Large",
        415 => "Unsupported Media Type",
        422 => "Unprocessable Content",
        423 => "Locked",
        425 => "Too Early",
        428 => "Precondition Required",
        429 => "Too Many Requests",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{AcquireError, CommitUnknown, ServerError};
    use crate::status::Status;
    use tokio_postgres::error::SqlState;

    fn server(code: &str) -> ServerError {
        ServerError {
            fatal: false,
            code: SqlState::from_code(code),
            message: "secret \"message\" of db.example.com".into(),
            constraint: Some("users_email_key".into()),
            routine: None,
        }
    }

    fn aborted(code: &str) -> Error {
        Error::Aborted(Box::new(server(code)))
    }

    fn fatal(code: &str) -> Option<Arc<ServerError>> {
        Some(Arc::new(ServerError { fatal: true, ..server(code) }))
    }

    fn acquire(phase: AcquirePhase) -> Error {
        let status = Status { max_size: 8, size: 8, idle: 0, in_use: 8, connecting: 0, waiting: 3 };
        Error::Acquire(Box::new(AcquireError {
            phase,
            waited: Duration::from_secs(1),
            status,
            last_connect_error: None,
        }))
    }

    #[test]
    fn every_line_of_the_table_is_as_documented() {
        let unknown = || Error::CommitUnknown(Box::new(CommitUnknown { reason: "cut", server: None }));
        let after_retries = |error| Error::RetriesExhausted { attempts: 10, source: Box::new(error) };
        let exhausted = |code| after_retries(aborted(code));
        let late = Error::DeadlineExceeded { after: Duration::from_secs(1), attempts: 1 };
        let cases = [
            (aborted("23505"), 409, "unique_violation", None),
            (aborted("23503"), 409, "foreign_key_violation", None),
            (aborted("23001"), 409, "foreign_key_violation", None),
            (aborted("23P01"), 409, "exclusion_violation", None),
            (aborted("23502"), 422, "not_null_violation", None),
            (aborted("23514"), 422, "check_violation", None),
            (aborted("22003"), 422, "data_exception", None),
            (aborted("22P02"), 422, "data_exception", None),
            (exhausted("40001"), 503, "contention", Some(1)),
            (aborted("40P01"), 503, "contention", Some(1)),
            (aborted("55P03"), 503, "lock_not_available", Some(1)),
            (acquire(AcquirePhase::Waiting), 503, "pool_exhausted", Some(1)),
            (acquire(AcquirePhase::TooManyWaiters), 503, "pool_exhausted", Some(1)),
            (acquire(AcquirePhase::Connecting), 503, "database_unavailable", Some(1)),
            (acquire(AcquirePhase::Closed), 503, "shutting_down", Some(1)),
            (acquire(AcquirePhase::SelfDeadlock), 500, "internal", None),
            (Error::lost("gone", None), 503, "database_unavailable", Some(1)),
            (aborted("53300"), 503, "database_unavailable", Some(1)),
            (aborted("25006"), 503, "database_unavailable", Some(1)),
            (aborted("57P01"), 503, "database_unavailable", Some(1)),
            (late, 504, "timeout", None),
            (aborted("57014"), 504, "timeout", None),
            (aborted("25P04"), 504, "timeout", None),
            (unknown(), 500, "commit_unknown", None),
            (aborted("40003"), 500, "commit_unknown", None),
            (aborted("42P01"), 500, "internal", None),
            (aborted("42501"), 500, "internal", None),
            (Error::unanswered("gone", None), 500, "outcome_unknown", None),
            (Error::unanswered("gone", fatal("57P01")), 500, "outcome_unknown", None),
            (Error::unanswered("gone", fatal("08006")), 500, "outcome_unknown", None),
            (Error::lost("gone", fatal("57P01")), 503, "database_unavailable", Some(1)),
            (after_retries(Error::unanswered("gone", None)), 500, "outcome_unknown", None),
            (after_retries(unknown()), 500, "commit_unknown", None),
            (Error::NoRow, 404, "not_found", None),
            (after_retries(Error::NoRow), 404, "not_found", None),
            (Error::TooManyRows, 500, "internal", None),
            (Error::Busy, 500, "internal", None),
            (Error::StatementAbandoned, 500, "internal", None),
            (Error::StreamOpen, 500, "internal", None),
            (Error::config("x"), 500, "internal", None),
        ];
        for (error, status, code, retry_after) in cases {
            let shown = format!("{error:?}");
            let problem = Problem::from(error);
            assert_eq!((problem.status(), problem.code()), (status, code), "{shown}");
            assert_eq!(problem.retry_after(), retry_after, "{shown}");
            assert!(problem.cause().is_some());
        }
    }

    #[test]
    fn a_body_tells_nothing_of_the_inside() {
        let body = Problem::from(aborted("23505")).body();
        assert_eq!(
            body,
            r#"{"title":"Conflict","status":409,"detail":"it exists already","code":"unique_violation"}"#
        );
    }

    #[test]
    fn a_line_can_be_changed_by_code_by_sqlstate_and_by_constraint() {
        let problems =
            Problems::new().status("unique_violation", 400).retry_after(Duration::from_millis(1500));
        let problem = problems.problem(aborted("23505"));
        assert_eq!((problem.status(), problem.code()), (400, "unique_violation"));
        assert_eq!(problems.problem(aborted("40001")).retry_after(), Some(2));

        let problems = problems.status("23505", 422);
        assert_eq!(problems.problem(aborted("23505")).status(), 422);

        let problems = problems.constraint("users_email_key", 409, "email_taken");
        let problem = problems.problem(aborted("23505"));
        assert_eq!((problem.status(), problem.code()), (409, "email_taken"));

        let problem = problems.apply(Problem::from(aborted("23505")));
        assert_eq!((problem.status(), problem.code()), (409, "email_taken"));
        let own = problems.apply(Problem::from(aborted("23505")).detail("pick another"));
        assert_eq!((own.status(), own.code()), (409, "unique_violation"));
    }

    #[test]
    fn a_status_that_is_no_error_becomes_one() {
        for status in [0, 200, 399, 600, u16::MAX] {
            assert_eq!(Problem::new(status, "x").status(), 500);
            assert_eq!(Problems::new().status("23505", status).problem(aborted("23505")).status(), 500);
        }
        assert_eq!(Problem::new(499, "x").status(), 499);
    }

    #[test]
    fn text_is_escaped() {
        let problem = Problem::new(418, "tea\"pot").detail("a\nb");
        assert_eq!(problem.body(), r#"{"status":418,"detail":"a\nb","code":"tea\"pot"}"#);
    }
}
