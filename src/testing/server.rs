//! A PostgreSQL server of the test process's own, from `initdb` to the removal of its last file.

use std::{
    collections::HashMap,
    env,
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    net::{Ipv4Addr, TcpListener},
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, chown},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, OnceLock, PoisonError},
    thread,
    time::{Duration, Instant},
};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use tempfile::TempDir;
use tokio::sync::OnceCell;

use super::{
    PgServerError,
    binaries::Binaries,
    process::{self, POLL, Watchdog},
};

const INIT_LIMIT: Duration = Duration::from_secs(60);
const START_LIMIT: Duration = Duration::from_secs(30);
const STOP_LIMIT: Duration = Duration::from_secs(30);

/// How often a start is tried when another process took the port first.
const PORT_ATTEMPTS: u32 = 5;

/// The longest path of a Unix socket, on the strictest system (macOS: 104 bytes with the closing zero).
const SOCKET_PATH_MAX: usize = 103;

const DEFAULT_SETTINGS: [(&str, &str); 6] = [
    // The data need not outlive a crash of the machine.
    ("fsync", "off"),
    ("synchronous_commit", "off"),
    ("full_page_writes", "off"),
    // Many tests in parallel, each with a pool.
    ("max_connections", "300"),
    ("logging_collector", "off"),
    ("log_destination", "stderr"),
];

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
/// dropping it: after `exit`, with the server in a `static`, by Ctrl-C, even by SIGKILL.
///
/// All calls block, and can be used from synchronous and from async code; in async code they hold up the
/// thread, [`start`](Self::start) for about a second.
#[derive(Debug)]
pub struct PgServer {
    // Invariant: in this order, since fields are dropped in order: the watchdog finds the directory already
    // gone.
    directory: TempDir,
    watchdog: Watchdog,
    account: Option<Account>,
    binaries: Binaries,
    port: u16,
    postmaster: Option<Child>,
    templates: Mutex<HashMap<String, TemplateCell>>,
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
    /// A test runner that gives each test a process of its own (cargo-nextest) starts a server for each.
    ///
    /// # Errors
    ///
    /// The error of the first call, which is not tried again. See [`PgServerBuilder::start`].
    pub fn shared() -> Result<&'static Self, &'static PgServerError> {
        static SHARED: OnceLock<Result<PgServer, PgServerError>> = OnceLock::new();
        SHARED.get_or_init(Self::start).as_ref()
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
        format!("postgres://postgres@{host}:{}/{}", self.port, utf8_percent_encode(database, URL_PART))
    }

    /// The port, for TCP on 127.0.0.1 and in the name of the Unix socket. It stays the same over restarts.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The directory of the Unix socket.
    #[must_use]
    pub fn socket_dir(&self) -> &Path {
        self.directory.path()
    }

    /// The cluster's data directory.
    #[must_use]
    pub fn data_dir(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    /// The major version, such as 17.
    #[must_use]
    pub fn version(&self) -> u32 {
        self.binaries.version
    }

    /// What the server has logged so far, over all its restarts; empty if the log cannot be read.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read(self.log_path()).map(|log| String::from_utf8_lossy(&log).into_owned()).unwrap_or_default()
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
        if self.postmaster.is_some() {
            return Ok(());
        }
        self.launch(|server| {
            // The port is fixed, so the only hope is that its new owner lets go of it.
            thread::sleep(Duration::from_millis(100));
            Ok(server.port)
        })
    }

    /// Where the template of this name is, or will be.
    pub(super) fn template_cell(&self, name: &str) -> TemplateCell {
        // A panic elsewhere cannot have left the map half changed.
        let mut templates = self.templates.lock().unwrap_or_else(PoisonError::into_inner);
        templates.entry(name.to_owned()).or_default().clone()
    }

    fn new(builder: &PgServerBuilder) -> Result<Self, PgServerError> {
        let binaries = Binaries::find(builder.bin_dir.as_deref())?;
        let directory = temporary_directory()?;
        let account = Account::to_run_as(directory.path())?;
        let watchdog = Watchdog::start(directory.path())
            .map_err(PgServerError::io("start /bin/sh to watch over the server"))?;
        Ok(Self {
            directory,
            watchdog,
            account,
            binaries,
            port: 0,
            postmaster: None,
            templates: Mutex::default(),
        })
    }

    fn init(&self, settings: &[(String, String)]) -> Result<(), PgServerError> {
        let output_path = self.directory.path().join("initdb.log");
        let mut initdb = self.command(&self.binaries.initdb());
        initdb
            .args(["--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-locale"])
            .args(["--no-sync", "--no-instructions"])
            .arg("--pgdata")
            .arg(self.data_dir());
        let mut child = self.spawn(&mut initdb, &output_path)?;
        // So asked, it ends the server it is running, which would else leave shared memory behind.
        self.watchdog.watch(&child, "TERM", "data");
        let status = process::wait(&mut child, INIT_LIMIT).map_err(PgServerError::io("wait for initdb"))?;
        self.watchdog.forget();
        match status {
            Some(status) if status.success() => {}
            Some(status) => {
                let message = format!("{status}: {}", tail(&output_path));
                return Err(PgServerError::InitFailed { message });
            }
            None => {
                // Killed, or it would go on writing into a directory that is being removed.
                process::kill(&mut child).map_err(PgServerError::io("kill initdb"))?;
                let message = format!("not done after {} s: {}", INIT_LIMIT.as_secs(), tail(&output_path));
                return Err(PgServerError::InitFailed { message });
            }
        }

        let lines: String = settings.iter().map(|(name, value)| setting_line(name, value)).collect();
        OpenOptions::new()
            .append(true)
            .open(self.data_dir().join("postgresql.conf"))
            .and_then(|mut file| file.write_all(lines.as_bytes()))
            .map_err(PgServerError::io("write postgresql.conf"))
    }

    /// Starts the postmaster and waits until it accepts sessions; `other_port` is asked when the port is
    /// taken.
    fn launch(
        &mut self,
        other_port: impl Fn(&Self) -> Result<u16, PgServerError>,
    ) -> Result<(), PgServerError> {
        let mut attempt = 1;
        loop {
            match self.launch_once() {
                Err(PgServerError::StartFailed { log, .. })
                    if attempt < PORT_ATTEMPTS && log.contains(PORT_TAKEN) =>
                {
                    attempt += 1;
                    self.port = other_port(self)?;
                }
                result => return result,
            }
        }
    }

    fn launch_once(&mut self) -> Result<(), PgServerError> {
        let mut sockets = OsString::from("unix_socket_directories=\"");
        sockets.push(self.socket_dir());
        sockets.push("\"");
        let mut postgres = self.command(&self.binaries.postgres());
        // On the command line, where neither a setting nor ALTER SYSTEM can change what this struct relies
        // on.
        postgres
            .arg("-D")
            .arg(self.data_dir())
            .args(["-c", "listen_addresses=127.0.0.1", "-c", &format!("port={}", self.port), "-c"])
            .arg(sockets);
        let mut child = self.spawn(&mut postgres, &self.log_path())?;
        self.watchdog.watch(&child, "QUIT", "data/postmaster.pid");

        let deadline = Instant::now() + START_LIMIT;
        let reason = loop {
            match child.try_wait().map_err(PgServerError::io("wait for the server"))? {
                Some(status) => break status.to_string(),
                None if self.is_ready(&child) => {
                    self.postmaster = Some(child);
                    return Ok(());
                }
                None if Instant::now() > deadline => {
                    process::kill(&mut child).map_err(PgServerError::io("kill the server"))?;
                    break format!("not ready after {} s", START_LIMIT.as_secs());
                }
                None => thread::sleep(POLL),
            }
        };
        self.watchdog.forget();
        Err(PgServerError::StartFailed { reason, log: tail(&self.log_path()) })
    }

    /// Whether the postmaster has said in its lock file that it accepts sessions.
    fn is_ready(&self, postmaster: &Child) -> bool {
        // PostgreSQL's pidfile.h: line 1 is the process id (a crashed server leaves its file), line 8 the
        // status.
        let Ok(lock) = fs::read_to_string(self.data_dir().join("postmaster.pid")) else { return false };
        let mut lines = lock.lines();
        lines.next() == Some(&postmaster.id().to_string()) && lines.nth(6).map(str::trim) == Some("ready")
    }

    /// Sends the signal that asks for a shutdown, waits until the server has gone, and kills it if it has
    /// not.
    fn end(&mut self, signal: &str) -> Result<(), PgServerError> {
        let Some(mut child) = self.postmaster.take() else { return Ok(()) };
        let ended = process::signal(&child, signal).and_then(|()| process::wait(&mut child, STOP_LIMIT));
        if !matches!(ended, Ok(Some(_))) {
            // It may be gone already; what matters is that it is afterwards.
            let _ = process::kill(&mut child);
        }
        self.watchdog.forget();
        let error = match ended {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(status)) => io::Error::other(status.to_string()),
            Ok(None) => io::ErrorKind::TimedOut.into(),
            Err(error) => error,
        };
        Err(PgServerError::io("stop the server")(error))
    }

    fn log_path(&self) -> PathBuf {
        self.directory.path().join("log")
    }

    /// A server program, to be run as the right user, away from the terminal and from this process's PG
    /// variables.
    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        for (name, _) in env::vars_os().filter(|(name, _)| name.as_bytes().starts_with(b"PG")) {
            command.env_remove(name);
        }
        command
            // For messages that can be recognized; macOS's server needs it to be set at all.
            .env("LC_ALL", "C")
            .current_dir(self.directory.path())
            .stdin(Stdio::null())
            // Its own group: Ctrl-C must not stop the server under tests that are still cleaning up.
            .process_group(0);
        if let Some(account) = &self.account {
            command.uid(account.uid).gid(account.gid);
        }
        command
    }

    fn spawn(&self, command: &mut Command, output: &Path) -> Result<Child, PgServerError> {
        let file = OpenOptions::new().create(true).append(true).open(output);
        let file = file.and_then(|file| Ok((file.try_clone()?, file)));
        let (stdout, stderr): (File, File) =
            file.map_err(PgServerError::io(format!("write {}", output.display())))?;
        command.stdout(stdout).stderr(stderr).spawn().map_err(|source| {
            let program = Path::new(command.get_program()).display();
            let doing = match &self.account {
                Some(account) if source.kind() == io::ErrorKind::PermissionDenied => {
                    let user = account.name;
                    format!(
                        "run {program} as user {user}, who must be able to read it and enter its directories"
                    )
                }
                _ => format!("run {program}"),
            };
            PgServerError::Io { doing, source }
        })
    }
}

impl Drop for PgServer {
    fn drop(&mut self) {
        // An immediate shutdown: there is nothing to save. What fails here is left to the watchdog.
        let _ = self.end("QUIT");
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
        let mut server = PgServer::new(&self)?;
        let defaults = DEFAULT_SETTINGS.map(|(name, value)| (name.to_owned(), value.to_owned()));
        server.init(&[&defaults[..], &self.settings].concat())?;
        server.port = free_port()?;
        server.launch(|_| free_port())?;
        Ok(server)
    }
}

/// Said, among other things, by a server that found its port taken.
const PORT_TAKEN: &str = "could not create any TCP/IP sockets";

/// A port that was free a moment ago.
fn free_port() -> Result<u16, PgServerError> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .and_then(|listener| listener.local_addr())
        .map(|address| address.port())
        .map_err(PgServerError::io("find a free port on 127.0.0.1"))
}

fn temporary_directory() -> Result<TempDir, PgServerError> {
    const LONGEST_NAME: &str = "/pg-session-123456/.s.PGSQL.65535";
    let mut parent = env::temp_dir();
    if parent.as_os_str().len() + LONGEST_NAME.len() > SOCKET_PATH_MAX {
        parent = PathBuf::from("/tmp");
    }
    let directory = tempfile::Builder::new().prefix("pg-session-").rand_bytes(6).tempdir_in(&parent);
    directory.map_err(PgServerError::io(format!("make a directory in {}", parent.display())))
}

/// The user that runs the server where this process is root.
#[derive(Debug)]
struct Account {
    name: &'static str,
    uid: u32,
    gid: u32,
}

impl Account {
    /// Whom to run as, if not as this process: then `directory`, which must be new, is given to that user.
    fn to_run_as(directory: &Path) -> Result<Option<Self>, PgServerError> {
        let metadata = fs::metadata(directory);
        // A new directory belongs to whoever made it.
        if metadata.map_err(PgServerError::io("read the temporary directory's owner"))?.uid() != 0 {
            return Ok(None);
        }
        let users = fs::read_to_string("/etc/passwd").map_err(PgServerError::io("read /etc/passwd"))?;
        let account = ["postgres", "nobody"].into_iter().find_map(|name| Self::of(name, &users));
        let account = account.ok_or(PgServerError::RootWithoutUser)?;
        chown(directory, Some(account.uid), Some(account.gid))
            .map_err(PgServerError::io(format!("give the temporary directory to user {}", account.name)))?;
        Ok(Some(account))
    }

    /// Reads an account from lines of `name:password:uid:gid:…`.
    fn of(name: &'static str, users: &str) -> Option<Self> {
        let mut fields = users.lines().map(|line| line.split(':')).find_map(|mut fields| {
            // Past the name, the password.
            (fields.next() == Some(name)).then(|| fields.skip(1))
        })?;
        let uid = fields.next()?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        Some(Self { name, uid, gid })
    }
}

/// A line of postgresql.conf. The manual's "Setting Parameters": quotes are doubled, backslashes escape.
fn setting_line(name: &str, value: &str) -> String {
    let value = value.replace('\\', r"\\").replace('\'', "''").replace('\n', r"\n");
    format!("{name} = '{value}'\n")
}

/// The last lines of a log, for an error message.
fn tail(path: &Path) -> String {
    let log = fs::read(path).unwrap_or_default();
    let log = String::from_utf8_lossy(&log);
    let lines: Vec<&str> = log.trim_end().lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}
