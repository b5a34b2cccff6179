//! Child processes with a limit in time, and the watchdog that cleans up when nobody else can.

use std::{
    io::{self, Read, Write},
    os::unix::process::CommandExt,
    path::Path,
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

/// How often a condition is looked at that nothing announces.
pub(super) const POLL: Duration = Duration::from_millis(5);

/// Waits until `child` has ended; `None` if it is still running after `limit`.
pub(super) fn wait(child: &mut Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let deadline = Instant::now() + limit;
    loop {
        let status = child.try_wait()?;
        if status.is_some() || Instant::now() >= deadline {
            return Ok(status);
        }
        thread::sleep(POLL);
    }
}

/// Runs a program that prints little, and gives back what it printed; it is killed after `limit`.
pub(super) fn output(command: &mut Command, limit: Duration) -> io::Result<String> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    match wait(&mut child, limit)? {
        Some(status) if status.success() => {
            let mut printed = String::new();
            if let Some(mut stdout) = child.stdout.take() {
                stdout.read_to_string(&mut printed)?;
            }
            Ok(printed)
        }
        Some(status) => Err(io::Error::other(status.to_string())),
        None => {
            kill(&mut child)?;
            Err(io::ErrorKind::TimedOut.into())
        }
    }
}

/// Kills a child that does not listen, and reaps it.
pub(super) fn kill(child: &mut Child) -> io::Result<()> {
    child.kill()?;
    child.wait().map(drop)
}

/// Sends a signal by its name, such as `INT`, to a child that has not been reaped (so its id is still its
/// own).
pub(super) fn signal(child: &Child, name: &str) -> io::Result<()> {
    // The shell's `kill`, because the standard library can send nothing but SIGKILL.
    let pid = child.id().to_string();
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", r#"kill -s "$1" "$2""#, "sh", name, &pid]);
    output(&mut shell, Duration::from_secs(10)).map(drop)
}

/// Ends the server and removes its directory when this process has ended without doing so itself.
///
/// A shell reads from a pipe that only this process holds open. However this process ends, by a signal, by
/// `exit` with the server in a `static`, or by SIGKILL, the kernel closes the pipe and the shell goes to
/// work.
#[derive(Debug)]
pub(super) struct Watchdog {
    child: Child,
    pipe: Option<ChildStdin>,
}

/// Its argument is the directory; each line it reads is a signal, the process to end by it, and a file in the
/// directory that the process removes when it ends; or empty.
const WATCHDOG: &str = r#"
trap '' HUP INT TERM
while read -r line; do last=$line; done
set -- "$1" $last
pause() { sleep 0.05 || sleep 1; }
if [ $# = 4 ] && kill -s "$2" "$3"; then
    waited=0
    # The file too: where orphans are reaped late or never, their ids stay.
    while [ -e "$1/$4" ] && kill -s 0 "$3"; do
        waited=$((waited + 1))
        if [ "$waited" -gt 200 ]; then kill -s KILL "$3"; break; fi
        pause
    done
fi
# Again, should a process still have been writing.
for round in 1 2 3 4 5; do
    rm -rf -- "$1"
    pause
    [ -d "$1" ] || exit 0
done
"#;

impl Watchdog {
    pub(super) fn start(directory: &Path) -> io::Result<Self> {
        let mut child = Command::new("/bin/sh")
            .args(["-c", WATCHDOG, "pg-session-watchdog"])
            .arg(directory)
            .current_dir("/")
            // Its own group: Ctrl-C must end the test process, not its watchdog.
            .process_group(0)
            .stdin(Stdio::piped())
            // Inherited output would keep a pipeline behind the tests waiting for the watchdog.
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let pipe = child.stdin.take();
        Ok(Self { child, pipe })
    }

    /// From now on, `process` is to be ended by this signal before the directory goes; it removes `file` at
    /// its end.
    pub(super) fn watch(&self, process: &Child, signal: &str, file: &str) {
        self.tell(&format!("{signal} {} {file}\n", process.id()));
    }

    /// The process has been reaped: its id may be another's from now on.
    pub(super) fn forget(&self) {
        self.tell("\n");
    }

    fn tell(&self, line: &str) {
        if let Some(mut pipe) = self.pipe.as_ref() {
            // Fails only if somebody has killed the watchdog, and then nobody is left to be told.
            let _ = pipe.write_all(line.as_bytes());
        }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.pipe = None;
        // With the directory gone it ends at once; with a directory that resisted, it tries again.
        let _ = wait(&mut self.child, Duration::from_secs(15));
    }
}
