//! The names of everything we emit, and the only place that emits.
//!
//! | span | fields |
//! |---|---|
//! | `pg_session.acquire` (debug) | – |
//! | `pg_session.transaction` (info) | `name`, `isolation_level`, `attempts`, `outcome` |
//!
//! | event | level | fields |
//! |---|---|---|
//! | a session could not be lent | warn | `error` |
//! | an attempt failed and is repeated | debug | `attempt`, `sqlstate`, `delay_ms` |
//! | a commit's outcome is unknown | error | `error` |
//! | a returned connection was closed instead of kept | debug | `reason` |
//! | a returned connection needed repair | debug | – |
//! | a cancel request failed | debug | `error` |
//! | an `on_commit` hook panicked | error | – |
//! | an error became an HTTP response | error (500), warn (503, 504), debug | `status`, `code`, `error`, `sqlstate`, `constraint`, `routine` |
//!
//! No SQL, no parameter, no setting's value, no address and no message of the server's, which may quote values, is in any
//! of them: `error` is worded here. All have the target `pg_session`. The driver logs SQL *and parameters* through the
//! `log` crate at debug level under `tokio_postgres`: keep that filtered.

use std::fmt;
use std::time::Duration;

use tracing::level_filters::LevelFilter;
use tracing::{Span, debug, debug_span, error, field, info_span, warn};

const TARGET: &str = "pg_session";

/// How a transaction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Committed,
    RolledBack,
    Unknown,
}

pub(crate) fn acquire() -> Span {
    // Cheaper than the macro where somebody turned on tracing's feature `log`: it would make a span for log records.
    if LevelFilter::current() < LevelFilter::DEBUG {
        return Span::none();
    }
    debug_span!(target: TARGET, "pg_session.acquire")
}

pub(crate) fn acquire_failed(e: &dyn fmt::Display) {
    warn!(target: TARGET, error = %e, "no session could be lent");
}

pub(crate) fn transaction(name: Option<&str>, isolation_level: &'static str) -> Span {
    info_span!(
        target: TARGET,
        "pg_session.transaction",
        name = name,
        isolation_level,
        attempts = field::Empty,
        outcome = field::Empty
    )
}

pub(crate) fn transaction_ended(span: &Span, attempts: u32, outcome: Outcome) {
    span.record("attempts", attempts);
    let outcome = match outcome {
        Outcome::Committed => "committed",
        Outcome::RolledBack => "rolled_back",
        Outcome::Unknown => "unknown",
    };
    span.record("outcome", outcome);
}

pub(crate) fn retrying(attempt: u32, sqlstate: Option<&str>, delay: Duration) {
    let delay_ms = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
    debug!(target: TARGET, attempt, sqlstate, delay_ms, "the transaction is run again");
}

pub(crate) fn commit_unknown(e: &dyn fmt::Display) {
    error!(target: TARGET, error = %e, "the outcome of a commit is unknown");
}

pub(crate) fn connection_closed(reason: &str) {
    debug!(target: TARGET, reason, "a returned connection was closed");
}

pub(crate) fn connection_repairing() {
    debug!(target: TARGET, "a returned connection is being repaired");
}

pub(crate) fn cancel_failed(e: &std::io::Error) {
    debug!(target: TARGET, error = %e, "a cancel request failed");
}

pub(crate) fn hook_panicked() {
    error!(target: TARGET, "an on_commit hook panicked; the transaction is committed");
}

#[cfg(feature = "problem")]
pub(crate) fn problem(
    status: u16,
    code: &str,
    error: &dyn fmt::Display,
    sqlstate: Option<&str>,
    constraint: Option<&str>,
    routine: Option<&str>,
) {
    const MESSAGE: &str = "an error became an HTTP response";
    match status {
        503 | 504 => warn!(target: TARGET, status, code, %error, sqlstate, constraint, routine, "{MESSAGE}"),
        500.. => error!(target: TARGET, status, code, %error, sqlstate, constraint, routine, "{MESSAGE}"),
        _ => debug!(target: TARGET, status, code, %error, sqlstate, constraint, routine, "{MESSAGE}"),
    }
}
