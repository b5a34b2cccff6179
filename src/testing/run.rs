//! The server that all test processes of a cargo-nextest run share: how they find it, and that it ends with the run.

use std::{
    env,
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileExt, MetadataExt},
        net::UnixStream,
        process::parent_id,
    },
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    fs::{FlockOperation, Mode, OFlags},
    io::Errno,
};

use super::{
    PgServer, PgServerError,
    cluster::{Cluster, Place},
    process::{self, POLL},
};

/// How long to wait for the process that starts the server; its own limits are 60 s for `initdb` and 30 s for
/// the start.
const MEETING_LIMIT: Duration = Duration::from_secs(120);

/// A run of cargo-nextest, seen from one of its test processes.
#[derive(Debug)]
pub(super) struct Run {
    nextest: u32,
    file: PathBuf,
}

impl Run {
    /// The run that this process belongs to, if nextest itself has started it.
    pub(super) fn of_this_process() -> Option<Self> {
        // Nextest's book, "Environment variables": a UUID, the same for all of the run.
        let id = env::var("NEXTEST_RUN_ID").ok()?;
        if id.is_empty() || id.len() > 64 || !id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
            return None;
        }
        // The server is to end with the run, so its parent must be nextest: not a wrapper that ends with this
        // process, and not the init that adopts it when nextest was killed, whose end nobody would live to see.
        let nextest = parent_id();
        if !process::name(nextest)?.contains("nextest") {
            return None;
        }
        // A workspace may hold several versions of this crate, which need not agree on what follows.
        let name = format!("pg-session-run-{id}-{nextest}-{}", env!("CARGO_PKG_VERSION"));
        Some(Self { nextest, file: env::temp_dir().join(name) })
    }

    /// The process whose end is the run's.
    pub(super) fn nextest(&self) -> u32 {
        self.nextest
    }

    /// The file by which the run's processes find their server. Its name cannot be guessed beforehand.
    pub(super) fn file(&self) -> &Path {
        &self.file
    }

    /// The run's server, started if there is none.
    pub(super) fn server(&self) -> Result<PgServer, PgServerError> {
        // Declared before the meeting, so dropped after it: the watchdog is there until the file is gone.
        let mut cluster: Option<Cluster> = None;
        let mut meeting = loop {
            // Only a process with a watchdog makes the file, so that there is one to remove it with the run.
            match Meeting::enter(&self.file, cluster.is_some()) {
                Ok(Some(meeting)) => break meeting,
                Ok(None) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound && cluster.is_none() => {
                    cluster = Some(Cluster::new(None, Some(self))?);
                }
                Err(error) => {
                    let doing = format!("meet the other test processes at {}", self.file.display());
                    return Err(PgServerError::io(doing)(error));
                }
            }
        };
        // The watchdog may have come and gone: what is made now would stay.
        if parent_id() != self.nextest {
            return PgServer::start();
        }
        if let Some(place) = meeting.place() {
            meeting.goes_on = true;
            return Ok(PgServer::of_a_run(place));
        }
        let cluster = match &mut cluster {
            Some(cluster) => cluster,
            none => none.insert(Cluster::new(None, Some(self))?),
        };
        cluster.start(&[])?;
        // In this order, lest the others be sent to a server that ends with this process.
        let place = cluster.leave_to_run();
        meeting.tell(&place).map_err(PgServerError::io(format!("write {}", self.file.display())))?;
        meeting.goes_on = true;
        Ok(PgServer::of_a_run(place))
    }
}

/// The file of a run, locked by this process; the kernel unlocks it when the process ends.
///
/// It is empty until a server is up, and is removed when this value is dropped, unless that
/// [`goes_on`](Self::goes_on).
struct Meeting<'a> {
    path: &'a Path,
    file: File,
    goes_on: bool,
}

impl<'a> Meeting<'a> {
    /// Waits for the lock; `None` if the file was removed meanwhile.
    fn enter(path: &'a Path, create: bool) -> io::Result<Option<Self>> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let create = if create { OFlags::CREATE } else { OFlags::empty() };
        let file = File::from(rustix::fs::open(path, flags | create, Mode::RUSR | Mode::WUSR)?);
        let deadline = Instant::now() + MEETING_LIMIT;
        loop {
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(Errno::WOULDBLOCK) if Instant::now() < deadline => thread::sleep(POLL),
                Err(Errno::WOULDBLOCK) => return Err(io::ErrorKind::TimedOut.into()),
                Err(error) => return Err(error.into()),
            }
        }
        let locked = file.metadata()?;
        let is_current = fs::metadata(path)
            .is_ok_and(|current| (current.dev(), current.ino()) == (locked.dev(), locked.ino()));
        // Lazily: a meeting that is dropped takes the current file with it.
        Ok(is_current.then(|| Self { path, file, goes_on: false }))
    }

    /// Where the run's server is, if there is one and it lives.
    fn place(&mut self) -> Option<Place> {
        let mut text = Vec::new();
        self.file.read_to_end(&mut text).ok()?;
        // A process killed while it wrote has left no last newline.
        let mut lines = text.strip_suffix(b"\n")?.splitn(3, |byte| *byte == b'\n');
        let mut number = || std::str::from_utf8(lines.next()?).ok()?.parse::<u32>().ok();
        let (version, port) = (number()?, u16::try_from(number()?).ok()?);
        let directory = PathBuf::from(OsStr::from_bytes(lines.next()?));
        // Only that very server listens in that directory; a port could be another's by now.
        UnixStream::connect(directory.join(format!(".s.PGSQL.{port}"))).ok()?;
        Some(Place { directory, port, version })
    }

    fn tell(&self, place: &Place) -> io::Result<()> {
        let mut text = format!("{}\n{}\n", place.version, place.port).into_bytes();
        text.extend_from_slice(place.directory.as_os_str().as_bytes());
        text.push(b'\n');
        self.file.set_len(0)?;
        self.file.write_all_at(&text, 0)
    }
}

impl Drop for Meeting<'_> {
    fn drop(&mut self) {
        if !self.goes_on {
            let _ = fs::remove_file(self.path);
        }
    }
}
