//! One server and one template for all test processes of a cargo-nextest run, and nothing left when it ends.
//!
//! Nextest itself is not needed: a process of this binary under its name stands in for it.

#![cfg(all(feature = "testing", unix))]

use std::{
    cell::RefCell,
    collections::{HashMap, HashSet, VecDeque},
    env,
    error::Error,
    fs,
    io::{self, BufRead, BufReader, Write},
    os::unix::{
        fs::{PermissionsExt, symlink},
        net::UnixStream,
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio, id},
    sync::{
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use pg_session::{
    testing::{PgServer, PgServerError, Template, TestDatabase},
    tokio_postgres::{self, Client, NoTls},
};

type Result<T = (), E = Box<dyn Error + Send + Sync>> = std::result::Result<T, E>;

/// No test may hang: whatever is waited for comes within this.
const LIMIT: Duration = Duration::from_secs(30);

// One server

#[test]
fn all_processes_of_a_run_share_a_server_that_outlives_whoever_started_it_and_ends_with_the_run() -> Result {
    let mut run = Run::start()?;
    let names = ["a", "b", "c", "d"];
    for name in names {
        run.test(name, "ask")?;
    }
    let servers = names.iter().map(|name| run.hear(name)).collect::<Result<HashSet<_>>>()?;
    assert_eq!(servers.len(), 1, "{servers:?}");
    run.wait_for_tests()?;

    run.test("later", "ask")?;
    assert!(servers.contains(&run.hear("later")?));
    run.wait_for_tests()?;
    // Those who came too late to start it have cleaned up.
    assert_eq!(run.directories()?.len(), 1);
    eventually("one watchdog is left", || run.processes("pg-session-watchdog") == 1);

    run.end()
}

#[test]
fn a_killed_nextest_takes_the_server_along_even_if_its_tests_go_on() -> Result {
    let mut run = Run::start()?;
    for name in ["a", "b"] {
        run.test(name, "hold")?;
        run.hear(name)?;
    }
    run.nextest.kill()?;
    run.nextest.wait()?;
    for name in ["a", "b"] {
        assert_eq!(run.hear(name)?, "saw the server go");
    }
    run.assert_nothing_left();
    Ok(())
}

#[test]
fn an_interrupted_nextest_takes_the_server_along() -> Result {
    let mut run = Run::start()?;
    run.test("a", "hold")?;
    run.hear("a")?;
    // The second, since whoever starts the suite in the background may have it ignore the first.
    signal("INT", run.nextest.id())?;
    signal("TERM", run.nextest.id())?;
    run.nextest.wait()?;
    run.assert_nothing_left();
    Ok(())
}

#[test]
fn a_test_killed_after_it_started_the_server_costs_the_others_nothing() -> Result {
    let mut run = Run::start()?;
    run.test("starter", "hold")?;
    let server = run.hear("starter")?;
    run.kill("starter")?;
    run.test("other", "ask")?;
    assert_eq!(run.hear("other")?, server);
    run.end()
}

#[test]
fn a_test_killed_during_initdb_leaves_the_start_to_the_next() -> Result {
    let scratch = scratch()?;
    let bin = programs_that_first("exec sleep 60", scratch.path())?;
    let mut run = Run::start_with(Some(&bin))?;
    run.test("starter", "hold")?;
    eventually("initdb runs", || scratch.path().join("ran").exists());
    run.test("next", "ask")?;
    run.kill("starter")?;
    run.hear("next")?;
    eventually("the killed one's directory is removed", || run.directories().unwrap().len() == 1);
    run.end()
}

#[test]
fn a_start_that_fails_is_tried_once_more_by_those_who_waited_for_it() -> Result {
    let scratch = scratch()?;
    let all_ask = scratch.path().join("all_ask");
    let fault = format!("until [ -e '{}' ]; do sleep 0.1 || sleep 1; done; exit 1", all_ask.display());
    let bin = programs_that_first(&fault, scratch.path())?;
    let mut run = Run::start_with(Some(&bin))?;
    let names = ["a", "b", "c", "later"];
    for name in &names[..3] {
        run.test(name, "ask aloud")?;
    }
    for name in &names[..3] {
        assert_eq!(run.hear(name)?, "asking");
    }
    fs::write(all_ask, "")?;
    run.wait_for_tests()?;
    run.test("later", "ask")?;
    let mut heard = names.iter().map(|name| run.hear(name)).collect::<Result<Vec<_>>>()?;
    heard.retain(|text| !text.starts_with("initdb failed"));
    assert_eq!((heard.len(), heard.iter().collect::<HashSet<_>>().len()), (3, 1), "{heard:?}");
    run.end()
}

#[test]
fn nextest_killed_during_initdb_leaves_nothing_behind() -> Result {
    let scratch = scratch()?;
    let bin = programs_that_first("exec sleep 60", scratch.path())?;
    let mut run = Run::start_with(Some(&bin))?;
    run.test("starter", "hold")?;
    eventually("initdb runs", || scratch.path().join("ran").exists());
    run.test("next", "ask")?;
    run.kill("starter")?;
    run.nextest.kill()?;
    run.nextest.wait()?;
    run.assert_nothing_left();
    Ok(())
}

#[test]
fn programs_that_fail_are_told_to_every_test_and_leave_nothing_behind() -> Result {
    let scratch = scratch()?;
    let bin = programs(
        scratch.path(),
        "echo 'initdb: error: no room' >&2; exit 1",
        "echo 'postgres (PostgreSQL) 17.5'",
    )?;
    let mut run = Run::start_with(Some(&bin))?;
    for name in ["a", "b"] {
        run.test(name, "ask")?;
    }
    for name in ["a", "b"] {
        assert!(run.hear(name)?.contains("initdb: error: no room"));
    }
    run.wait_for_tests()?;
    // While nextest still runs: a run whose tests all fail must not fill the machine.
    run.assert_nothing_left();
    run.end()
}

#[test]
fn a_server_that_crashed_is_replaced_for_the_tests_to_come() -> Result {
    let mut run = Run::start()?;
    run.test("before", "ask")?;
    let server = run.hear("before")?;
    run.wait_for_tests()?;
    let lock = fs::read_to_string(socket(&server).with_file_name("data").join("postmaster.pid"))?;
    signal("KILL", lock.lines().next().ok_or("no process id")?.parse()?)?;
    eventually("it is gone", || UnixStream::connect(socket(&server)).is_err());

    run.test("after", "ask")?;
    assert_ne!(run.hear("after")?, server);
    run.end()
}

#[test]
fn processes_that_nextest_has_not_started_have_servers_of_their_own() -> Result {
    let mut run = Run::start()?;
    run.test("of the run", "nest")?;
    let (outer, inner) = (run.hear("of the run")?, run.hear("inside")?);
    assert_ne!(outer, inner);
    run.wait_for_tests()?;
    eventually("the inner one ends with its process", || run.directories().unwrap().len() == 1);
    run.end()
}

#[test]
fn an_orphan_of_a_killed_nextest_waits_for_no_other_parents_end() -> Result {
    let mut run = Run::start()?;
    run.test("orphan", "ask late")?;
    assert_eq!(run.hear("orphan")?, "ready");
    run.nextest.kill()?;
    run.nextest.wait()?;
    run.hear("orphan")?;
    run.assert_nothing_left();
    Ok(())
}

// One template

#[test]
fn a_template_is_prepared_once_for_all_processes_of_a_test_binary() -> Result {
    let mut run = Run::start()?;
    let names = ["a", "b", "c", "d"];
    for name in names {
        run.test(name, "prepare")?;
    }
    for name in names {
        assert_eq!(run.hear(name)?, "found what was prepared");
    }
    run.test("later", "prepare")?;
    assert_eq!(run.hear("later")?, "found what was prepared");
    assert_eq!(run.preparations(), 1);

    let other_binary = run.scratch.path().join("other_binary");
    fs::copy(env::current_exe()?, &other_binary)?;
    run.test_of(&other_binary, "other", "prepare")?;
    assert_eq!(run.hear("other")?, "found what was prepared");
    assert_eq!(run.preparations(), 2);
    run.end()
}

#[tokio::test]
async fn a_test_killed_while_it_prepares_a_template_leaves_it_to_the_next() -> Result {
    let mut run = Run::start()?;
    run.test("watched", "ask")?;
    let watcher = connect_at(&run.hear("watched")?).await?;
    run.test("first", "prepare and hang")?;
    assert_eq!(run.hear("first")?, "preparing");
    run.test("second", "prepare")?;
    until(&watcher, "EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted)").await?;
    assert_eq!(run.preparations(), 1);

    run.kill("first")?;
    assert_eq!(run.hear("second")?, "found what was prepared");
    assert_eq!(run.preparations(), 2);
    run.test("third", "prepare")?;
    assert_eq!(run.hear("third")?, "found what was prepared");
    assert_eq!(run.preparations(), 2);
    run.end()
}

#[tokio::test]
async fn a_preparation_that_fails_or_is_given_up_is_left_to_the_next_and_leaves_no_database() -> Result {
    let mut run = Run::start()?;
    run.test("first", "prepare and fail")?;
    assert_eq!(run.hear("first")?, "could not prepare the template \"app\"");
    run.test("second", "prepare and give up")?;
    assert_eq!(run.hear("second")?, "given up");
    run.test("third", "prepare")?;
    assert_eq!(run.hear("third")?, "found what was prepared");
    assert_eq!(run.preparations(), 3);

    run.test("watched", "ask")?;
    let watcher = connect_at(&run.hear("watched")?).await?;
    until(&watcher, "(SELECT count(*) FROM pg_database WHERE datname LIKE 'pg_session%') = 1").await?;
    run.end()
}

// What the tests stand on

/// A run of tests under a stand-in for nextest.
struct Run {
    nextest: Child,
    /// The temporary directory of its tests, in which nothing may be left.
    temporary: tempfile::TempDir,
    scratch: tempfile::TempDir,
    heard: RefCell<HashMap<String, VecDeque<String>>>,
    lines: mpsc::Receiver<String>,
}

impl Run {
    fn start() -> Result<Self> {
        Self::start_with(None)
    }

    fn start_with(bin_dir: Option<&Path>) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(1);
        let run_id = format!("simulated-{}-{}", id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let (temporary, scratch) = (scratch()?, scratch()?);
        // It is told by its name.
        let program = scratch.path().join("cargo-nextest");
        symlink(env::current_exe()?, &program)?;
        let mut command = Command::new(program);
        command
            .args(["--exact", "stand_in_for_nextest", "--nocapture"])
            .env("PG_SESSION_TEST_ROLE", "nextest")
            .env("PG_SESSION_TEST_COUNT", scratch.path().join("preparations"))
            .env("NEXTEST_RUN_ID", run_id)
            .env("TMPDIR", temporary.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        if let Some(bin_dir) = bin_dir {
            command.env("PG_SESSION_PG_BIN", bin_dir);
        }
        let mut nextest = command.spawn()?;
        let output = BufReader::new(nextest.stdout.take().ok_or("no output")?);
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            output.lines().map_while(io::Result::ok).try_for_each(|line| sender.send(line))
        });
        Ok(Self { nextest, temporary, scratch, heard: RefCell::default(), lines })
    }

    /// Starts a process for a test, as nextest does.
    fn test(&mut self, name: &str, role: &str) -> Result {
        self.test_of(&env::current_exe()?, name, role)
    }

    fn test_of(&mut self, binary: &Path, name: &str, role: &str) -> Result {
        self.tell(&format!("start\t{name}\t{role}\t{}", binary.display()))
    }

    /// Kills a test, as nextest does one that takes too long.
    fn kill(&mut self, name: &str) -> Result {
        self.tell(&format!("kill\t{name}"))?;
        assert_eq!(self.hear("nextest")?, format!("killed {name}"));
        Ok(())
    }

    /// Waits until all tests have ended, while nextest goes on.
    fn wait_for_tests(&mut self) -> Result {
        self.tell("wait")?;
        assert_eq!(self.hear("nextest")?, "all have ended");
        Ok(())
    }

    /// The run ends well, and then nothing of it is left.
    fn end(mut self) -> Result {
        drop(self.nextest.stdin.take());
        assert!(self.nextest.wait()?.success());
        self.assert_nothing_left();
        Ok(())
    }

    fn tell(&mut self, line: &str) -> Result {
        Ok(writeln!(self.nextest.stdin.as_mut().ok_or("it has ended")?, "{line}")?)
    }

    /// What this test says next.
    fn hear(&self, name: &str) -> Result<String> {
        let mut heard = self.heard.borrow_mut();
        loop {
            if let Some(text) = heard.get_mut(name).and_then(VecDeque::pop_front) {
                return Ok(text);
            }
            let line =
                self.lines.recv_timeout(LIMIT).map_err(|error| format!("{name} says nothing: {error}"))?;
            // In front of the first tab: nothing, or what the libtest of another process has begun to say.
            if let Some((name, text)) = line.split_once('\t').and_then(|(_, line)| line.split_once('\t')) {
                heard.entry(name.to_owned()).or_default().push_back(text.to_owned());
            }
        }
    }

    /// How often a test has prepared the template.
    fn preparations(&self) -> usize {
        fs::read(self.scratch.path().join("preparations")).map_or(0, |bytes| bytes.len())
    }

    /// The directories of servers.
    fn directories(&self) -> Result<Vec<PathBuf>> {
        let entries = fs::read_dir(self.temporary.path())?.collect::<io::Result<Vec<_>>>()?;
        Ok(entries.into_iter().map(|entry| entry.path()).filter(|path| path.is_dir()).collect())
    }

    fn assert_nothing_left(&self) {
        eventually("nothing is left of the run", || {
            let files = fs::read_dir(self.temporary.path()).expect("the directory is there").count();
            files == 0 && self.processes("") == 0
        });
    }

    /// How many processes have in their arguments the run's temporary directory, as postmasters, watchdogs and
    /// initdb do, and this.
    fn processes(&self, word: &str) -> usize {
        // Wide enough for a watchdog, whose script comes first.
        let output = Command::new("ps").args(["-A", "-ww", "-o", "args="]).output().expect("ps runs");
        let directory = self.temporary.path().to_str().expect("temporary directories are UTF-8");
        let output = String::from_utf8_lossy(&output.stdout);
        // Some show a script's newlines as they are: then a process is more than one line, the last of which counts.
        output.lines().filter(|line| line.contains(directory) && line.contains(word)).count()
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        let _ = self.nextest.kill();
        let _ = self.nextest.wait();
    }
}

/// What stands in for nextest: it starts each test in a process and a process group of its own. Nothing in the
/// test run itself.
#[test]
fn stand_in_for_nextest() -> Result {
    if env::var("PG_SESSION_TEST_ROLE").as_deref() != Ok("nextest") {
        return Ok(());
    }
    let mut tests = HashMap::new();
    for line in io::stdin().lines() {
        match line?.split('\t').collect::<Vec<_>>()[..] {
            ["start", name, role, binary] => {
                let mut command = Command::new(binary);
                command
                    .args(["--exact", "test_of_a_run", "--nocapture"])
                    .env("PG_SESSION_TEST_ROLE", role)
                    .env("PG_SESSION_TEST_NAME", name)
                    .process_group(0)
                    // Tells of the end of this process.
                    .stdin(Stdio::piped());
                tests.insert(name.to_owned(), command.spawn()?);
            }
            ["kill", name] => {
                let mut test = tests.remove(name).ok_or("no such test")?;
                let group = format!("-{}", test.id());
                Command::new("/bin/sh").args(["-c", r#"kill -s KILL -- "$1""#, "sh", &group]).status()?;
                test.wait()?;
                say("nextest", &format!("killed {name}"));
            }
            ["wait"] => {
                for (_, mut test) in tests.drain() {
                    test.wait()?;
                }
                say("nextest", "all have ended");
            }
            ref other => return Err(format!("what is {other:?}?").into()),
        }
    }
    for test in tests.values_mut() {
        test.wait()?;
    }
    Ok(())
}

/// What the test processes of a simulated run do. Nothing in the test run itself.
#[test]
fn test_of_a_run() -> Result {
    let (Ok(role), Ok(name)) = (env::var("PG_SESSION_TEST_ROLE"), env::var("PG_SESSION_TEST_NAME")) else {
        return Ok(());
    };
    if role == "ask late" {
        say(&name, "ready");
        io::copy(&mut io::stdin(), &mut io::sink())?;
    }
    if role == "ask aloud" {
        say(&name, "asking");
    }
    let server = match PgServer::shared() {
        Ok(server) => server,
        Err(error) => {
            say(&name, &error.to_string().replace('\n', " "));
            return Ok(());
        }
    };
    let place = format!("{} {}", server.socket_dir().display(), server.port());
    let runtime = runtime()?;
    match &*role {
        "ask" | "ask late" | "ask aloud" => {
            runtime.block_on(connect(&server.url()))?;
            say(&name, &place);
        }
        "hold" => {
            say(&name, &place);
            io::copy(&mut io::stdin(), &mut io::sink())?;
            eventually("the server goes", || !server.socket_dir().exists());
            say(&name, "saw the server go");
        }
        "nest" => {
            say(&name, &place);
            let mut inner = Command::new(env::current_exe()?);
            inner.args(["--exact", "test_of_a_run", "--nocapture"]);
            inner.env("PG_SESSION_TEST_ROLE", "ask").env("PG_SESSION_TEST_NAME", "inside").status()?;
        }
        _ => say(&name, &runtime.block_on(prepare(server, &role, &name))?),
    }
    Ok(())
}

async fn prepare(server: &PgServer, role: &str, name: &str) -> Result<String> {
    let prepared = Template::prepare(server, "app", async |url| {
        let mut count =
            fs::File::options().create(true).append(true).open(env::var("PG_SESSION_TEST_COUNT")?)?;
        count.write_all(b".")?;
        let client = connect(url).await?;
        client.batch_execute("CREATE TABLE prepared (id int); INSERT INTO prepared VALUES (1)").await?;
        match role {
            "prepare and fail" => Err("as this test wants it".into()),
            "prepare and hang" => {
                say(name, "preparing");
                // Until it is killed, or the test that has started all this fails.
                io::copy(&mut io::stdin(), &mut io::sink())?;
                Err("nextest has ended".into())
            }
            "prepare and give up" => std::future::pending().await,
            _ => Ok(()),
        }
    });
    if role == "prepare and give up" {
        let mut prepared = Box::pin(prepared);
        let count = PathBuf::from(env::var("PG_SESSION_TEST_COUNT")?);
        let before = fs::metadata(&count)?.len();
        while fs::metadata(&count)?.len() == before {
            let _ = tokio::time::timeout(Duration::from_millis(1), &mut prepared).await;
        }
        return Ok("given up".to_owned());
    }
    let template = match prepared.await {
        Err(error @ PgServerError::Template { .. }) => return Ok(error.to_string()),
        result => result?,
    };
    let database = TestDatabase::from_template(&template).await?;
    let rows: i64 =
        connect(database.url()).await?.query_one("SELECT count(*) FROM prepared", &[]).await?.get(0);
    assert_eq!(rows, 1);
    Ok("found what was prepared".to_owned())
}

/// Tells the test at the other end of standard output.
fn say(name: &str, text: &str) {
    println!("\t{name}\t{text}");
}

/// A directory that the user who runs the server can write in, too.
fn scratch() -> Result<tempfile::TempDir> {
    let scratch = tempfile::tempdir()?;
    fs::set_permissions(scratch.path(), fs::Permissions::from_mode(0o777))?;
    Ok(scratch)
}

fn programs(scratch: &Path, initdb: &str, postgres: &str) -> Result<PathBuf> {
    let bin = scratch.join("bin");
    fs::create_dir(&bin)?;
    for (program, script) in [("initdb", initdb), ("postgres", postgres)] {
        let path = bin.join(program);
        fs::write(&path, format!("#!/bin/sh\n{script}\n"))?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    }
    Ok(bin)
}

/// The programs of this machine, but for an `initdb` that does this when it is first run, and makes a directory
/// to say so.
fn programs_that_first(fault: &str, scratch: &Path) -> Result<PathBuf> {
    let real = runtime()?.block_on(async {
        let client = connect(&PgServer::shared()?.url()).await?;
        let row = client.query_one("SELECT setting FROM pg_config WHERE name = 'BINDIR'", &[]).await?;
        Ok::<String, Box<dyn Error + Send + Sync>>(row.get(0))
    })?;
    let ran = scratch.join("ran");
    programs(
        scratch,
        &format!("if mkdir '{}' 2>/dev/null; then {fault}; fi\nexec '{real}/initdb' \"$@\"", ran.display()),
        &format!("exec '{real}/postgres' \"$@\""),
    )
}

fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

async fn connect(url: &str) -> Result<Client, tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// The socket's path, from what a test says of its server.
fn socket(server: &str) -> PathBuf {
    let (directory, port) = server.rsplit_once(' ').expect("a directory and a port");
    Path::new(directory).join(format!(".s.PGSQL.{port}"))
}

async fn connect_at(server: &str) -> Result<Client> {
    let (directory, port) = server.rsplit_once(' ').ok_or("a directory and a port")?;
    Ok(connect(&format!("host='{directory}' port={port} user=postgres dbname=postgres")).await?)
}

/// Waits until a condition in SQL is true.
async fn until(client: &Client, condition: &str) -> Result {
    let deadline = Instant::now() + LIMIT;
    while !client.query_one(&format!("SELECT {condition}"), &[]).await?.get::<_, bool>(0) {
        assert!(Instant::now() < deadline, "still not true: {condition}");
        tokio::task::yield_now().await;
    }
    Ok(())
}

/// Waits for what nothing announces.
fn eventually(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !holds() {
        assert!(Instant::now() < deadline, "still not true: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

fn signal(name: &str, pid: u32) -> Result {
    let kill = r#"kill -s "$1" "$2""#;
    Command::new("/bin/sh").args(["-c", kill, "sh", name, &pid.to_string()]).status()?;
    Ok(())
}
