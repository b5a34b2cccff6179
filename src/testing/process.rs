//! Child processes with a limit in time, and the watchdog that cleans up when nobody else can.

use std::{
    io::{self, Read},
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

/// Sends a signal by its name, such as `INT`, to a child that has not been reaped (so its id is still its own).
pub(super) fn signal(child: &Child, name: &str) -> io::Result<()> {
    // The shell's `kill`, because the standard library can send nothing but SIGKILL.
    let pid = child.id().to_string();
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", r#"kill -s "$1" "$2""#, "sh", name, &pid]);
    output(&mut shell, Duration::from_secs(10)).map(drop)
}

/// Stops the cluster and removes its directory when this process has ended without doing so itself.
///
/// A shell reads from a pipe that only this process holds open. However this process ends, by a signal, by `exit`
/// with the server in a `static`, or by SIGKILL, the kernel closes the pipe and the shell goes to work.
#[derive(Debug)]
pub(super) struct Watchdog {
    child: Child,
    pipe: Option<ChildStdin>,
}

const WATCHDOG: &str = r#"
trap '' HUP INT TERM
while read -r _; do :; done
pause() { sleep 0.05 || sleep 1; }
# More than one round, since initdb or a server that is just starting may still be writing.
for round in 1 2 3 4 5; do
    [ -d "$1" ] || exit 0
    if read -r pid <"$2" && kill -s QUIT "$pid"; then
        waited=0
        # The file too: where nobody reaps orphans, the process id stays.
        while [ -e "$2" ] && kill -s 0 "$pid"; do
            waited=$((waited + 1))
            if [ "$waited" -gt 200 ]; then kill -s KILL "$pid"; break; fi
            pause
        done
    fi
    rm -rf -- "$1"
    pause
done
"#;

impl Watchdog {
    /// Watches over `directory` and the server that writes its process id to `pid_file`.
    pub(super) fn start(directory: &Path, pid_file: &Path) -> io::Result<Self> {
        let mut child = Command::new("/bin/sh")
            .args(["-c", WATCHDOG, "pg-session-watchdog"])
            .args([directory, pid_file])
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
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.pipe = None;
        // With the directory gone it ends at once; with a directory that resisted, it tries again.
        let _ = wait(&mut self.child, Duration::from_secs(15));
    }
}
