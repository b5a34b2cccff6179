//! A PostgreSQL server as tests see it: where it is, and how to stop and restart one of their own.

use std::{
    collections::HashMap,
    fs,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock},
};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use tokio::sync::OnceCell;

use super::{
    PgServerError,
    cluster::{Cluster, Place},
    run::Run,
};
use crate::lock::lock;

/// Everything but RFC 3986's unreserved characters.
const URL_PART: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// A throw-away PostgreSQL server.
///
/// Its programs are looked for in the builder's [`bin_dir`](PgServerBuilder::bin_dir), else in the directory
/// that `PG_SESSION_PG_BIN` names, else in `PATH`, in `pg_config --bindir`, and where Debian, Red Hat,
/// Homebrew and Postgres.app put them; PostgreSQL 14 or newer is needed. As root, the server runs as user
/// `postgres`, else as `nobody`, who must be able to read the programs.
///
/// The cluster lies in a directory of its own under the temporary directory (under `/tmp` where that path is
/// too long for a Unix socket), has the superuser `postgres`, UTF-8 and the `C` locale, and listens on a free
/// port of 127.0.0.1 and on a Unix socket in that directory. It asks for no password: any user of this
/// machine can connect. Durability is off (`fsync`, `synchronous_commit`, `full_page_writes`), since nothing
/// in it needs to survive, and `max_connections` is 300.
///
/// Dropping the server stops it and removes its directory. A watchdog does so when this process ends without
/// dropping it: after `exit`, with the server in a `static`, by Ctrl-C, even by SIGKILL. The
/// [shared](Self::shared) server of a cargo-nextest run ends with the run.
///
/// All calls block, and can be used from synchronous and from async code; in async code they hold up the
/// thread, [`start`](Self::start) for about a second.
#[derive(Debug)]
pub struct PgServer {
    place: Place,
    owner: Owner,
    templates: Mutex<HashMap<String, TemplateCell>>,
}

/// Who ends the server.
#[derive(Debug)]
enum Owner {
    /// This value.
    Own(Cluster),
    /// The run's watchdog. Invariant: such a server is only ever lent as `&`, by [`PgServer::shared`], so
    /// nothing that stops or restarts it can be called.
    Run,
}

/// The name of a template's database, once it is prepared.
pub(super) type TemplateCell = Arc<OnceCell<String>>;

impl PgServer {
    /// Starts a server with the default settings.
    ///
    /// # Errors
    ///
    /// See [`PgServerBuilder::start`].
    pub fn start() -> Result<Self, PgServerError> {
        Self::builder().start()
    }

    /// A builder, for a server with other settings or of other programs.
    pub fn builder() -> PgServerBuilder {
        PgServerBuilder::default()
    }

    /// The server that all tests of this process share, started by the first call.
    ///
    /// cargo-nextest gives each test a process of its own. There, all test processes of the run share one
    /// server: the first starts it, the others find it, and it is stopped and removed when nextest ends, in
    /// whatever way. That one server then runs the tests of *all* the binaries of the run: what belongs to the
    /// whole server, such as roles and settings by `ALTER SYSTEM`, is theirs together, and `max_connections` is for
    /// all.
    ///
    /// It is so for processes that nextest itself has started. A process under a wrapper script, a target
    /// runner or a debugger, or one that a test starts, gets a server of its own, which ends with it.
    ///
    /// # Errors
    ///
    /// The error of the first call, which is not tried again in this process. See [`PgServerBuilder::start`];
    /// also [`PgServerError::Io`] if the file by which the processes of a run meet, in the temporary directory,
    /// could not be made or locked, or a server that another process starts was not up within 120 s.
    pub fn shared() -> Result<&'static Self, &'static PgServerError> {
        static SHARED: OnceLock<Result<PgServer, PgServerError>> = OnceLock::new();
        let server = || match Run::of_this_process() {
            Some(run) => run.server(),
            None => Self::start(),
        };
        SHARED.get_or_init(server).as_ref()
    }

    /// The URL of the database `postgres` over TCP: `postgres://postgres@127.0.0.1:PORT/postgres`.
    #[must_use]
    pub fn url(&self) -> String {
        self.url_for("postgres")
    }

    /// The URL of a database over TCP; its name is percent-encoded.
    #[must_use]
    pub fn url_for(&self, database: &str) -> String {
        self.url_at("127.0.0.1", database)
    }

    /// The URL of a database over the Unix socket; the socket's directory stands percent-encoded as the host.
    #[must_use]
    pub fn socket_url_for(&self, database: &str) -> String {
        let directory = self.socket_dir().as_os_str().as_bytes();
        self.url_at(&percent_encoding::percent_encode(directory, URL_PART).to_string(), database)
    }

    fn url_at(&self, host: &str, database: &str) -> String {
        format!("postgres://postgres@{host}:{}/{}", self.place.port, utf8_percent_encode(database, URL_PART))
    }

    /// The port, for TCP on 127.0.0.1 and in the name of the Unix socket. It stays the same over restarts.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.place.port
    }

    /// The directory of the Unix socket.
    #[must_use]
    pub fn socket_dir(&self) -> &Path {
        &self.place.directory
    }

    /// The cluster's data directory.
    #[must_use]
    pub fn data_dir(&self) -> PathBuf {
        self.place.data()
    }

    /// The major version, such as 17.
    #[must_use]
    pub fn version(&self) -> u32 {
        self.place.version
    }

    /// What the server has logged so far, over all its restarts; empty if the log cannot be read.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read(self.place.log()).map(|log| String::from_utf8_lossy(&log).into_owned()).unwrap_or_default()
    }

    /// Stops the server, as dropping it does, but by a fast shutdown (sessions are ended, a checkpoint is
    /// written) and with the result told; then removes its directory.
    ///
    /// # Errors
    ///
    /// [`PgServerError::Io`] if the server was still running after 30 s, or did not end well.
    pub fn stop(mut self) -> Result<(), PgServerError> {
        self.end("INT")
    }

    /// Stops the server by a fast shutdown, and starts it again on the same port with the same data.
    ///
    /// # Errors
    ///
    /// Those of [`stop`](Self::stop) and of [`start_again`](Self::start_again).
    pub fn restart(&mut self) -> Result<(), PgServerError> {
        self.end("INT")?;
        self.start_again()
    }

    /// Makes the server go at once, as if it had crashed: an immediate shutdown, after which a start
    /// recovers. Its directory stays until the server is dropped. Does nothing if it is not running.
    ///
    /// # Errors
    ///
    /// [`PgServerError::Io`] if the server was still running after 30 s.
    pub fn kill(&mut self) -> Result<(), PgServerError> {
        self.end("QUIT")
    }

    /// Starts the server after [`kill`](Self::kill), on the same port with the same data.
    /// Does nothing if it is running.
    ///
    /// # Errors
    ///
    /// [`PgServerError::StartFailed`] if it ended, or was not ready within 30 s, also when another process
    /// had taken the port meanwhile and kept it.
    pub fn start_again(&mut self) -> Result<(), PgServerError> {
        match &mut self.owner {
            Owner::Own(cluster) => cluster.start_again(),
            Owner::Run => Ok(()),
        }
    }

    /// Where the template of this name is, or will be.
    pub(super) fn template_cell(&self, name: &str) -> TemplateCell {
        // A panic elsewhere cannot have left the map half changed.
        let mut templates = lock(&self.templates);
        templates.entry(name.to_owned()).or_default().clone()
    }

    /// Whether other processes use it, too.
    pub(super) fn is_of_a_run(&self) -> bool {
        matches!(self.owner, Owner::Run)
    }

    pub(super) fn of_a_run(place: Place) -> Self {
        Self { place, owner: Owner::Run, templates: Mutex::default() }
    }

    fn end(&mut self, signal: &str) -> Result<(), PgServerError> {
        match &mut self.owner {
            Owner::Own(cluster) => cluster.end(signal),
            Owner::Run => Ok(()),
        }
    }
}

/// Settings for a [`PgServer`]; from [`PgServer::builder`].
#[derive(Debug, Clone, Default)]
#[must_use]
pub struct PgServerBuilder {
    bin_dir: Option<PathBuf>,
    settings: Vec<(String, String)>,
}

impl PgServerBuilder {
    /// The directory of `initdb` and `postgres`, instead of looking for them.
    pub fn bin_dir(mut self, path: impl Into<PathBuf>) -> Self {
        self.bin_dir = Some(path.into());
        self
    }

    /// A setting of postgresql.conf, such as `("log_statement", "all")`; the value is quoted as it needs.
    ///
    /// The last of several for the same name counts, also over the defaults that [`PgServer`] tells. `port`,
    /// `listen_addresses` and `unix_socket_directories` stay the server's own.
    pub fn setting(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.settings.push((name.into(), value.into()));
        self
    }

    /// Makes the cluster and starts the server; blocks until it accepts sessions, normally for about a
    /// second, 60 s for `initdb` and 30 s for the start at most.
    ///
    /// # Errors
    ///
    /// - [`NotFound`](PgServerError::NotFound), [`TooOld`](PgServerError::TooOld): no programs that will do.
    ///   A
    ///   directory named by `bin_dir` or `PG_SESSION_PG_BIN` must hold them: no other place is tried then.
    /// - [`RootWithoutUser`](PgServerError::RootWithoutUser): no user to run the server as.
    /// - [`InitFailed`](PgServerError::InitFailed), [`StartFailed`](PgServerError::StartFailed): what the
    ///   programs
    ///   said; a setting that the server does not accept shows here.
    /// - [`Io`](PgServerError::Io): the temporary directory or a process could not be made.
    pub fn start(self) -> Result<PgServer, PgServerError> {
        let mut cluster = Cluster::new(self.bin_dir.as_deref(), None)?;
        cluster.start(&self.settings)?;
        let place = cluster.place().clone();
        Ok(PgServer { place, owner: Owner::Own(cluster), templates: Mutex::default() })
    }
}
