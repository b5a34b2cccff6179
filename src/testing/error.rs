//! What can go wrong with a test server or a test database.

use std::{error::Error, io, path::PathBuf};

/// Why a [`PgServer`](super::PgServer) or a [`TestDatabase`](super::TestDatabase) could not do what was
/// asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PgServerError {
    /// No place that was looked at holds both `initdb` and `postgres`.
    #[error(
        "no PostgreSQL server programs (initdb and postgres) found, looked at: {}; install them with \
         `apt-get install postgresql` (Debian, Ubuntu), `dnf install postgresql-server` (Fedora) or \
         `brew install postgresql@18` (macOS), or name their directory in PG_SESSION_PG_BIN",
        places.join(", ")
    )]
    NotFound {
        /// The directories, patterns and commands that were tried, in order.
        places: Vec<String>,
    },

    /// The server programs that were found or named are older than PostgreSQL 14.
    #[error("PostgreSQL {found} in {} is too old: 14 or newer is needed", path.display())]
    TooOld {
        /// The version, as `postgres --version` tells it.
        found: String,
        /// The directory of the programs.
        path: PathBuf,
    },

    /// PostgreSQL refuses to run as root, and neither user `postgres` nor `nobody` exists to run it instead.
    #[error("PostgreSQL refuses to run as root, and /etc/passwd has no user postgres or nobody to run it as")]
    RootWithoutUser,

    /// `initdb` could not make the cluster.
    #[error("initdb failed: {message}")]
    InitFailed {
        /// What `initdb` said.
        message: String,
    },

    /// The server ended while it was starting, or did not become ready in time.
    #[error("the server did not start ({reason}), its log ends with:\n{log}")]
    StartFailed {
        /// What was seen: its exit status, or the time that was given.
        reason: String,
        /// The last lines of the server's log.
        log: String,
    },

    /// The operating system refused something.
    #[error("could not {doing}")]
    Io {
        /// What was being done.
        doing: String,
        /// Why it failed.
        source: io::Error,
    },

    /// The URL makes no sense to [`SessionConfig`](crate::SessionConfig).
    #[error("could not use the server's URL")]
    Url {
        /// Why, without any password.
        source: crate::error::Error,
    },

    /// The server could not be reached, or refused a statement.
    #[error("could not {doing}")]
    Database {
        /// What was being done.
        doing: &'static str,
        /// Why it failed.
        source: tokio_postgres::Error,
    },

    /// The closure given to [`Template::prepare`](super::Template::prepare) failed.
    #[error("could not prepare the template {name:?}")]
    Template {
        /// The template's name.
        name: String,
        /// The closure's error.
        source: Box<dyn Error + Send + Sync>,
    },
}

impl PgServerError {
    /// For `map_err`: an I/O error, with what was being done.
    pub(super) fn io(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let doing = doing.into();
        move |source| Self::Io { doing, source }
    }

    /// For `map_err`: an error of the database, with what was being done.
    pub(super) fn database(doing: &'static str) -> impl FnOnce(tokio_postgres::Error) -> Self {
        move |source| Self::Database { doing, source }
    }
}
