//! One PostgreSQL cluster and its postmaster, from `initdb` to the removal of the last file.

use std::{
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
    thread,
    time::{Duration, Instant},
};

use tempfile::TempDir;

use super::{
    PgServerError,
    binaries::Binaries,
    process::{self, POLL, Watchdog},
    run::Run,
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

/// Where a server is, for whoever wants to talk to it.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) directory: PathBuf,
    pub(super) port: u16,
    pub(super) version: u32,
}

impl Place {
    pub(super) fn data(&self) -> PathBuf {
        self.directory.join("data")
    }

    pub(super) fn log(&self) -> PathBuf {
        self.directory.join("log")
    }
}

/// A cluster that goes with this value: the postmaster is stopped, the directory removed.
#[derive(Debug)]
pub(super) struct Cluster {
    // Invariant: in this order, since fields are dropped in order: the watchdog finds the directory already
    // gone.
    directory: TempDir,
    watchdog: Watchdog,
    account: Option<Account>,
    binaries: Binaries,
    place: Place,
    postmaster: Option<Child>,
}

impl Cluster {
    /// Finds the programs and makes the directory, watched over; with `run`, the watchdog cleans up after that
    /// run, too.
    pub(super) fn new(bin_dir: Option<&Path>, run: Option<&Run>) -> Result<Self, PgServerError> {
        let binaries = Binaries::find(bin_dir)?;
        let directory = temporary_directory()?;
        let account = Account::to_run_as(directory.path())?;
        let watchdog = Watchdog::start(directory.path(), run)
            .map_err(PgServerError::io("start /bin/sh to watch over the server"))?;
        let place = Place { directory: directory.path().to_owned(), port: 0, version: binaries.version };
        Ok(Self { directory, watchdog, account, binaries, place, postmaster: None })
    }

    /// Makes the cluster, with these settings over the defaults, and starts it.
    pub(super) fn start(&mut self, settings: &[(String, String)]) -> Result<(), PgServerError> {
        let defaults = DEFAULT_SETTINGS.map(|(name, value)| (name.to_owned(), value.to_owned()));
        self.init(&[&defaults[..], settings].concat())?;
        self.place.port = free_port()?;
        self.launch(|_| free_port())
    }

    /// Starts the postmaster on the port it had. Does nothing if it is running.
    pub(super) fn start_again(&mut self) -> Result<(), PgServerError> {
        if self.postmaster.is_some() {
            return Ok(());
        }
        self.launch(|port| {
            // The port is fixed, so the only hope is that its new owner lets go of it.
            thread::sleep(Duration::from_millis(100));
            Ok(port)
        })
    }

    pub(super) fn place(&self) -> &Place {
        &self.place
    }

    /// Leaves the running server to the watchdog, which ends it with the run.
    pub(super) fn leave_to_run(&mut self) -> Place {
        self.watchdog.leave_to_run();
        self.directory.disable_cleanup(true);
        self.postmaster = None;
        self.place.clone()
    }

    fn init(&self, settings: &[(String, String)]) -> Result<(), PgServerError> {
        let output_path = self.place.directory.join("initdb.log");
        let mut initdb = self.command(&self.binaries.initdb());
        initdb
            .args(["--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-locale"])
            .args(["--no-sync", "--no-instructions"])
            .arg("--pgdata")
            .arg(self.place.data());
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
            .open(self.place.data().join("postgresql.conf"))
            .and_then(|mut file| file.write_all(lines.as_bytes()))
            .map_err(PgServerError::io("write postgresql.conf"))
    }

    /// Starts the postmaster and waits until it accepts sessions; `other_port` is asked when the port is
    /// taken.
    fn launch(
        &mut self,
        other_port: impl Fn(u16) -> Result<u16, PgServerError>,
    ) -> Result<(), PgServerError> {
        let mut attempt = 1;
        loop {
            match self.launch_once() {
                Err(PgServerError::StartFailed { log, .. })
                    if attempt < PORT_ATTEMPTS && log.contains(PORT_TAKEN) =>
                {
                    attempt += 1;
                    self.place.port = other_port(self.place.port)?;
                }
                result => return result,
            }
        }
    }

    fn launch_once(&mut self) -> Result<(), PgServerError> {
        let mut sockets = OsString::from("unix_socket_directories=\"");
        sockets.push(&self.place.directory);
        sockets.push("\"");
        let mut postgres = self.command(&self.binaries.postgres());
        // On the command line, where neither a setting nor ALTER SYSTEM can change what this struct relies
        // on.
        postgres
            .arg("-D")
            .arg(self.place.data())
            .args(["-c", "listen_addresses=127.0.0.1", "-c", &format!("port={}", self.place.port), "-c"])
            .arg(sockets);
        let mut child = self.spawn(&mut postgres, &self.place.log())?;
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
        Err(PgServerError::StartFailed { reason, log: tail(&self.place.log()) })
    }

    /// Whether the postmaster has said in its lock file that it accepts sessions.
    fn is_ready(&self, postmaster: &Child) -> bool {
        // PostgreSQL's pidfile.h: line 1 is the process id (a crashed server leaves its file), line 8 the
        // status.
        let Ok(lock) = fs::read_to_string(self.place.data().join("postmaster.pid")) else { return false };
        let mut lines = lock.lines();
        lines.next() == Some(&postmaster.id().to_string()) && lines.nth(6).map(str::trim) == Some("ready")
    }

    /// Sends the signal that asks for a shutdown, waits until the server has gone, and kills it if it has
    /// not.
    pub(super) fn end(&mut self, signal: &str) -> Result<(), PgServerError> {
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
            .current_dir(&self.place.directory)
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

impl Drop for Cluster {
    fn drop(&mut self) {
        // An immediate shutdown: there is nothing to save. What fails here is left to the watchdog.
        let _ = self.end("QUIT");
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
