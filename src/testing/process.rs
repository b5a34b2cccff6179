//! Child processes with a limit in time, and the watchdog that cleans up when nobody else can.

use std::{
    fs,
    io::{self, Read, Write},
    os::unix::process::CommandExt,
    path::Path,
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use super::run::Run;

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

/// The name of the program that a process runs, of which some systems keep 15 bytes only; `None` if there is no
/// such process.
pub(super) fn name(pid: u32) -> Option<String> {
    // Not `ps` where it can be done without: small images have none.
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok().or_else(|| {
        let mut ps = Command::new("ps");
        output(ps.args(["-o", "comm=", "-p", &pid.to_string()]), Duration::from_secs(10)).ok()
    })?;
    // Some tell its whole path.
    name.trim_end().rsplit('/').next().map(str::to_owned)
}

/// Ends the server and removes its directory when this process has ended without doing so itself, or with the
/// run of tests.
///
/// A shell reads from a pipe that only this process holds open. However this process ends, by a signal, by
/// `exit` with the server in a `static`, or by SIGKILL, the kernel closes the pipe and the shell goes to
/// work. For a server that is left to the run, it looks five times a second whether nextest still runs: no
/// other process has a pipe whose end would tell.
#[derive(Debug)]
pub(super) struct Watchdog {
    /// `None` once it stays behind.
    child: Option<Child>,
    pipe: Option<ChildStdin>,
}

/// Its arguments are the directory and, in a run of nextest, nextest's process id and the run's file. Each line
/// it reads is a signal, the process to end by it, and a file in the directory that the process removes when it
/// ends; or empty; or `run`, which leaves the server to the run; or `alone`, when the run's file is another's.
const WATCHDOG: &str = r#"
trap '' HUP INT TERM
directory=$1 nextest=$2 file=$3 signal= process= mark= process_born=
pause() { sleep 0.05 || sleep 1; }

# Sets `born` to when the process began, which tells it from a later one of the same id. Empty if it has ended.
look() {
    born=
    if [ -e /proc/self/stat ]; then
        { IFS= read -r stat <"/proc/$1/stat"; } 2>/dev/null || return 0
        # proc_pid_stat(5): behind the name in parentheses, the state is field 3, the start is field 22.
        set -- ${stat##*) }
        case $1 in [ZXx]) ;; *) born=${20} ;; esac
    else
        set -- $(ps -o stat= -o lstart= -p "$1")
        case $1 in Z* | '') ;; *) shift; born=$* ;; esac
    fi
}
run_goes_on() { look "$nextest"; [ -n "$born" ] && [ "$born" = "$run_born" ]; }
watch_run() { while run_goes_on; do sleep 0.2 || sleep 1; done; }

look "$nextest"
run_born=$born
while read -r word number name; do
    case $word in
        run) watch_run; break ;;
        alone) file= ;;
        *) signal=$word process=$number mark=$name; look "$process"; process_born=$born ;;
    esac
done

look "$process"
if [ -n "$signal" ] && [ "$born" = "$process_born" ] && kill -s "$signal" "$process"; then
    waited=0
    # The file too: where orphans are reaped late or never, their ids stay.
    while [ -e "$directory/$mark" ] && kill -s 0 "$process"; do
        waited=$((waited + 1))
        if [ "$waited" -gt 200 ]; then kill -s KILL "$process"; break; fi
        pause
    done
fi
# Again, should a process still have been writing.
for round in 1 2 3 4 5; do
    [ -d "$directory" ] || break
    rm -rf -- "$directory"
    pause
done

# The others of the run may go on without this process; the file is theirs until they end.
[ -z "$file" ] || [ ! -e "$file" ] || watch_run
[ -z "$file" ] || rm -f -- "$file"
"#;

impl Watchdog {
    pub(super) fn start(directory: &Path, run: Option<&Run>) -> io::Result<Self> {
        let mut shell = Command::new("/bin/sh");
        shell.args(["-c", WATCHDOG, "pg-session-watchdog"]).arg(directory);
        if let Some(run) = run {
            shell.arg(run.nextest().to_string()).arg(run.file());
        }
        let mut child = shell
            .current_dir("/")
            // Its own group: Ctrl-C must end the test process, not its watchdog.
            .process_group(0)
            .stdin(Stdio::piped())
            // Inherited output would keep a pipeline behind the tests waiting for the watchdog.
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let pipe = child.stdin.take();
        Ok(Self { child: Some(child), pipe })
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

    /// From now on, what it watches ends with the run and no more with this process.
    pub(super) fn leave_to_run(&mut self) {
        self.tell("run\n");
        self.child = None;
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
        let Some(mut child) = self.child.take() else { return };
        self.tell("alone\n");
        self.pipe = None;
        // With the directory gone it ends at once; with a directory that resisted, it tries again.
        let _ = wait(&mut child, Duration::from_secs(15));
    }
}
