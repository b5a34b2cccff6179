//! A test server that starts anywhere and leaves nothing behind, and databases of a test's own on it.

#![cfg(all(feature = "testing", unix))]

use std::{
    env,
    error::Error,
    fs,
    future::Future,
    io::{BufRead, BufReader},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use pg_session::{
    SessionManager,
    testing::{PgServer, PgServerError, Template, TestDatabase},
    tokio_postgres::{self, Client, NoTls},
};

type Result<T = (), E = Box<dyn Error + Send + Sync>> = std::result::Result<T, E>;

// A server and its directory

#[tokio::test]
async fn a_server_answers_over_tcp_and_over_its_socket() -> Result {
    let server = PgServer::shared()?;
    for url in [server.url(), server.socket_url_for("postgres")] {
        let client = connect(&url).await?;
        let row = client.query_one("SELECT current_database(), current_user::text, version()", &[]).await?;
        let (database, user, version): (&str, &str, &str) = (row.get(0), row.get(1), row.get(2));
        assert_eq!((database, user), ("postgres", "postgres"));
        assert!(version.starts_with(&format!("PostgreSQL {}", server.version())), "{version}");
    }
    assert!(server.log().contains("ready to accept connections"), "{}", server.log());
    Ok(())
}

#[tokio::test]
async fn durability_is_off_and_there_is_room_for_many_pools() -> Result {
    let client = connect(&PgServer::shared()?.url()).await?;
    for (name, expected) in [
        ("fsync", "off"),
        ("synchronous_commit", "off"),
        ("full_page_writes", "off"),
        ("max_connections", "300"),
    ] {
        assert_eq!(setting(&client, name).await?, expected, "{name}");
    }
    Ok(())
}

#[tokio::test]
async fn settings_reach_the_server_as_they_are_and_a_stop_removes_everything() -> Result {
    let awkward = r"it's a \ 'test'";
    let server = PgServer::builder()
        .setting("cluster_name", awkward)
        .setting("max_connections", "20")
        .setting("port", "1")
        .start()?;
    let client = connect(&server.url()).await?;
    assert_eq!(setting(&client, "cluster_name").await?, awkward);
    assert_eq!(setting(&client, "max_connections").await?, "20");

    let left = Left::by(&server);
    server.stop()?;
    left.assert_gone_now();
    Ok(())
}

#[test]
fn a_dropped_server_leaves_no_process_no_directory_and_no_port() -> Result {
    let server = PgServer::start()?;
    let left = Left::by(&server);
    assert!(!left.processes().is_empty(), "the check must see a server that runs");
    drop(server);
    left.assert_gone_now();
    Ok(())
}

#[tokio::test]
async fn a_restart_keeps_the_port_and_the_data_also_after_a_crash() -> Result {
    let mut server = PgServer::start()?;
    let port = server.port();
    let client = connect(&server.url()).await?;
    client.batch_execute("CREATE TABLE kept (id int); INSERT INTO kept VALUES (1); CHECKPOINT").await?;

    server.restart()?;
    assert_eq!(server.port(), port);
    assert!(client.batch_execute("SELECT 1").await.is_err(), "a restart ends the sessions");

    server.kill()?;
    assert!(connect(&server.url()).await.is_err(), "a killed server takes no sessions");
    server.kill()?;
    server.start_again()?;
    server.start_again()?;
    let client = connect(&server.url()).await?;
    let row = client.query_one("SELECT count(*) FROM kept", &[]).await?;
    assert_eq!((server.port(), row.get::<_, i64>(0)), (port, 1));
    Ok(())
}

#[test]
fn a_setting_that_the_server_refuses_shows_in_the_error() {
    let error = PgServer::builder().setting("no_such_setting", "1").start().unwrap_err();
    assert!(matches!(error, PgServerError::StartFailed { .. }), "{error:?}");
    assert!(error.to_string().contains("no_such_setting"), "{error}");
}

// The end of the test process, however it comes

#[test]
fn a_test_that_panics_leaves_nothing_behind() -> Result {
    let mut child = TestProcess::start("panic")?;
    let left = child.left()?;
    assert!(!child.process.wait()?.success());
    left.assert_gone_soon();
    Ok(())
}

#[test]
fn a_process_that_exits_with_its_server_in_a_static_leaves_nothing_behind() -> Result {
    let mut child = TestProcess::start("exit")?;
    let left = child.left()?;
    assert!(child.process.wait()?.success());
    left.assert_gone_soon();
    Ok(())
}

#[test]
fn an_interrupted_process_leaves_nothing_behind() -> Result {
    let mut child = TestProcess::start("wait")?;
    let left = child.left()?;
    child.signal("INT")?;
    // Whoever starts the suite in the background may have it ignore SIGINT.
    child.signal("TERM")?;
    assert!(!child.process.wait()?.success());
    left.assert_gone_soon();
    Ok(())
}

#[test]
fn a_killed_process_leaves_nothing_behind() -> Result {
    let mut child = TestProcess::start("wait")?;
    let left = child.left()?;
    child.process.kill()?;
    child.process.wait()?;
    left.assert_gone_soon();
    Ok(())
}

#[test]
fn a_process_killed_during_initdb_leaves_nothing_behind() -> Result {
    // For whichever user the server's programs are run as.
    let scratch = tempfile::tempdir()?;
    fs::set_permissions(scratch.path(), fs::Permissions::from_mode(0o777))?;
    let runs = scratch.path().join("runs");
    let bin =
        fake_programs("postgres (PostgreSQL) 17.5", &format!("touch {}; exec sleep 5", runs.display()))?;
    let mut child = TestProcess::start_with("initdb", bin.path())?;
    let directory = child.temporary.path().to_owned();
    let made = || fs::read_dir(&directory).is_ok_and(|mut entries| entries.next().is_some());
    // Not just its directory: the watchdog is started in between.
    eventually("initdb runs", || runs.exists());
    assert!(made(), "the server's directory");
    child.process.kill()?;
    child.process.wait()?;
    eventually("the server's directory is removed", || !made());
    Ok(())
}

/// What the child processes of the tests above run; nothing in the test run itself.
#[test]
fn child_process_helper() -> Result {
    static SERVER: OnceLock<PgServer> = OnceLock::new();
    let Ok(role) = env::var("PG_SESSION_TEST_CHILD") else { return Ok(()) };
    let server = PgServer::start()?;
    println!("\nSERVER {} {}", server.socket_dir().display(), server.port());
    match &*role {
        "panic" => panic!("as this test wants it, with the server on {}", server.port()),
        "exit" => {
            SERVER.get_or_init(|| server);
            std::process::exit(0);
        }
        _ => loop {
            thread::park();
        },
    }
}

// Finding the programs

#[test]
fn an_empty_directory_named_explicitly_is_an_error_that_tells_how_to_get_postgresql() -> Result {
    let empty = tempfile::tempdir()?;
    let error = PgServer::builder().bin_dir(empty.path()).start().unwrap_err();
    assert!(matches!(error, PgServerError::NotFound { .. }), "{error:?}");
    let message = error.to_string();
    for part in [&empty.path().display().to_string(), "apt-get", "dnf", "brew", "PG_SESSION_PG_BIN"] {
        assert!(message.contains(part), "{part} is missing in: {message}");
    }
    Ok(())
}

#[test]
fn an_empty_directory_named_in_the_environment_is_an_error_too() -> Result {
    let empty = tempfile::tempdir()?;
    let mut child = TestProcess::start_with("wait", empty.path())?;
    assert!(child.left().is_err(), "no other place may be tried");
    assert!(!child.process.wait()?.success());
    Ok(())
}

#[test]
fn programs_older_than_postgresql_14_are_refused() -> Result {
    let bin = fake_programs("postgres (PostgreSQL) 13.9 (Debian 13.9-1)", "exit 1")?;
    let error = PgServer::builder().bin_dir(bin.path()).start().unwrap_err();
    assert!(matches!(&error, PgServerError::TooOld { found, .. } if found == "13.9"), "{error:?}");
    assert!(error.to_string().contains(bin.path().to_str().unwrap()), "{error}");
    Ok(())
}

#[test]
fn a_failing_initdb_has_its_say() -> Result {
    let bin = fake_programs("postgres (PostgreSQL) 17.5", "echo 'initdb: error: no room' >&2; exit 1")?;
    let error = PgServer::builder().bin_dir(bin.path()).start().unwrap_err();
    assert!(matches!(error, PgServerError::InitFailed { .. }), "{error:?}");
    assert!(error.to_string().contains("initdb: error: no room"), "{error}");
    Ok(())
}

// Databases and templates

#[tokio::test]
async fn a_database_is_empty_and_its_own_and_gone_after_the_test() -> Result {
    let server = PgServer::shared()?;
    let (one, other) = (TestDatabase::create(server).await?, TestDatabase::create(server).await?);
    connect(one.url()).await?.batch_execute("CREATE TABLE t ()").await?;
    let in_other = connect(other.url()).await?;
    in_other.batch_execute("CREATE TABLE t ()").await?;

    let names = [one.name().to_owned(), other.name().to_owned()];
    drop(one);
    assert!(!exists(server, &names[0]).await?);
    // Its session is still open: it must not be in the way.
    other.drop_now().await?;
    assert!(!exists(server, &names[1]).await?);
    Ok(())
}

#[tokio::test]
async fn a_database_can_be_made_on_any_server_by_url_or_by_key_and_value() -> Result {
    let server = PgServer::shared()?;
    let by_url = format!("{}?application_name=a&dbname=postgres&connect_timeout=9", server.url());
    let by_keys =
        format!("host=127.0.0.1 port={} user=postgres dbname=postgres application_name=a", server.port());
    for admin in [by_url, by_keys, server.socket_url_for("postgres")] {
        let database = TestDatabase::create_at(&admin).await?;
        let row = connect(database.url()).await?.query_one("SELECT current_database()", &[]).await?;
        assert_eq!(row.get::<_, &str>(0), database.name());
        assert_eq!(database.url().contains("application_name=a"), admin.contains("application_name=a"));
        let row = database.sessions().acquire().await?.query_one("SELECT current_database()", &[]).await?;
        assert_eq!(row.get::<_, &str>(0), database.name());
    }
    Ok(())
}

#[tokio::test]
async fn a_url_that_no_session_can_use_is_refused_at_once() -> Result {
    let server = PgServer::shared()?;
    for (parameter, says) in [("sslmode=require", "TLS"), ("colour=red", "colour")] {
        let error = TestDatabase::create_at(&format!("{}?{parameter}", server.url())).await.unwrap_err();
        assert!(
            matches!(&error, PgServerError::Url { source } if source.to_string().contains(says)),
            "{error:?}"
        );
    }
    Ok(())
}

#[tokio::test]
async fn a_database_is_dropped_also_while_a_manager_holds_sessions_in_it() -> Result {
    let server = PgServer::shared()?;
    let database = TestDatabase::create(server).await?;
    let sessions = SessionManager::new(database.config().max_size(2))?;
    let lent = sessions.acquire().await?;
    drop(sessions.acquire().await?);
    assert_eq!(sessions.status().size, 2);
    let name = database.name().to_owned();
    database.drop_now().await?;
    assert!(!exists(server, &name).await?);
    assert!(lent.query_one("SELECT 1", &[]).await.is_err());
    Ok(())
}

#[tokio::test]
async fn a_kept_database_stays() -> Result {
    let server = PgServer::shared()?;
    let mut database = TestDatabase::create(server).await?;
    database.keep();
    let name = database.name().to_owned();
    drop(database);
    assert!(exists(server, &name).await?);
    Ok(())
}

#[tokio::test]
async fn a_database_of_a_server_that_is_gone_is_dropped_without_delay() -> Result {
    let mut server = PgServer::start()?;
    let database = TestDatabase::create(&server).await?;
    server.kill()?;
    let begin = Instant::now();
    drop(database);
    assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_nobody_waits_for_is_dropped() -> Result {
    // A server of its own, so that its log tells of no other test's databases.
    let server = PgServer::builder().setting("log_statement", "ddl").start()?;
    let mut creation = Box::pin(TestDatabase::create(&server));
    let first_poll = tokio::time::timeout(Duration::ZERO, &mut creation).await;
    assert!(first_poll.is_err(), "creating a database takes longer than one poll");
    drop(creation);

    eventually("the database is created", || server.log().contains("CREATE DATABASE"));
    eventually("the database is dropped", || server.log().contains("DROP DATABASE"));
    let client = connect(&server.url()).await?;
    let count = "SELECT count(*) FROM pg_database WHERE datname LIKE 'pg_session_%'";
    let deadline = Instant::now() + Duration::from_secs(10);
    while client.query_one(count, &[]).await?.get::<_, i64>(0) > 0 {
        assert!(Instant::now() < deadline, "{}", server.log());
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_template_is_prepared_once_for_all_who_race_for_it_and_cloned_in_parallel() -> Result {
    static PREPARED: AtomicU32 = AtomicU32::new(0);
    let server = PgServer::shared()?;
    let tests: Vec<_> = (0..8)
        .map(|number: i32| {
            tokio::spawn(async move {
                let template = Template::prepare(server, "raced for", async |url| {
                    PREPARED.fetch_add(1, Ordering::SeqCst);
                    let client = connect(url).await?;
                    client.batch_execute("CREATE TABLE t (id int); INSERT INTO t VALUES (-1)").await?;
                    // Not closed: preparing must not depend on it.
                    tokio::spawn(async move {
                        let _held = client;
                        std::future::pending::<()>().await;
                    });
                    Ok(())
                })
                .await?;
                let database = TestDatabase::from_template(&template).await?;
                let client = connect(database.url()).await?;
                client.execute("INSERT INTO t VALUES ($1)", &[&number]).await?;
                let row = client.query_one("SELECT sum(id), count(*) FROM t", &[]).await?;
                assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (i64::from(number) - 1, 2));
                Result::<String>::Ok(database.name().to_owned())
            })
        })
        .collect();
    let mut names = Vec::new();
    for test in tests {
        names.push(test.await??);
    }
    names.sort();
    names.dedup();
    assert_eq!((names.len(), PREPARED.load(Ordering::SeqCst)), (8, 1));
    Ok(())
}

#[tokio::test]
async fn a_preparation_that_fails_is_told_and_may_be_tried_again() -> Result {
    let server = PgServer::shared()?;
    let mut half_made = String::new();
    let slot = std::sync::Mutex::new(&mut half_made);
    let failed = Template::prepare(server, "at the second try", async |url| {
        **slot.lock().unwrap() = url.rsplit('/').next().unwrap().to_owned();
        connect(url).await?.batch_execute("CREATE TABLE oops (").await?;
        Ok(())
    });
    let error = failed.await.unwrap_err();
    assert!(
        matches!(&error, PgServerError::Template { name, .. } if name == "at the second try"),
        "{error:?}"
    );
    let source = error.source().and_then(|source| source.downcast_ref::<tokio_postgres::Error>());
    assert!(source.and_then(tokio_postgres::Error::as_db_error).is_some(), "{error:?}");
    assert!(!exists(server, &half_made).await?);

    let template = Template::prepare(server, "at the second try", async |_| Ok(())).await?;
    TestDatabase::from_template(&template).await?;
    Ok(())
}

#[tokio::test]
async fn database_names_are_quoted_in_urls() -> Result {
    let server = PgServer::shared()?;
    let name = "naïve \"name\" 100% / a?b#c@d:e'f\\g";
    let client = connect(&server.url()).await?;
    client.batch_execute(&format!("CREATE DATABASE \"{}\"", name.replace('"', "\"\""))).await?;
    for url in [server.url_for(name), server.socket_url_for(name)] {
        let row = connect(&url).await?.query_one("SELECT current_database()", &[]).await?;
        assert_eq!(row.get::<_, &str>(0), name, "{url}");
    }
    Ok(())
}

#[test]
fn values_can_be_shared_between_threads_and_hide_passwords() {
    fn shareable<T: Send + Sync + 'static>() {}
    shareable::<PgServer>();
    shareable::<PgServerError>();
    shareable::<Template>();
    shareable::<TestDatabase>();
}

// What the tests stand on

/// A process of this test binary that starts a server and meets its end.
struct TestProcess {
    process: Child,
    temporary: tempfile::TempDir,
}

impl TestProcess {
    fn start(role: &str) -> Result<Self> {
        Self::start_with(role, Path::new(""))
    }

    fn start_with(role: &str, bin_dir: &Path) -> Result<Self> {
        // Readable for the user that runs the server where the tests are run by root.
        let temporary = tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o755)).tempdir()?;
        let mut command = Command::new(env::current_exe()?);
        command
            .args(["--exact", "child_process_helper", "--nocapture"])
            .env("PG_SESSION_TEST_CHILD", role)
            .env("TMPDIR", temporary.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        if !bin_dir.as_os_str().is_empty() {
            command.env("PG_SESSION_PG_BIN", bin_dir);
        }
        Ok(Self { process: command.spawn()?, temporary })
    }

    /// What the server that this process has started must not leave behind.
    fn left(&mut self) -> Result<Left> {
        let output = BufReader::new(self.process.stdout.take().ok_or("already read")?);
        for line in output.lines() {
            let line = line?;
            if let Some((directory, port)) =
                line.strip_prefix("SERVER ").and_then(|rest| rest.rsplit_once(' '))
            {
                let left = Left { directory: directory.into(), port: port.parse()? };
                assert!(left.directory.starts_with(self.temporary.path()), "{line}");
                return Ok(left);
            }
        }
        Err("the process ended before its server was up".into())
    }

    fn signal(&self, name: &str) -> Result {
        let pid = self.process.id().to_string();
        Command::new("/bin/sh").args(["-c", r#"kill -s "$1" "$2""#, "sh", name, &pid]).status()?;
        Ok(())
    }
}

impl Drop for TestProcess {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What a server may leave behind.
struct Left {
    directory: PathBuf,
    port: u16,
}

impl Left {
    fn by(server: &PgServer) -> Self {
        Self { directory: server.socket_dir().to_owned(), port: server.port() }
    }

    /// The processes that name the server's directory: postmaster, watchdog, initdb.
    fn processes(&self) -> Vec<String> {
        let output = Command::new("ps").args(["-A", "-o", "args="]).output().expect("ps runs");
        let directory = self.directory.to_str().expect("temporary directories are UTF-8");
        String::from_utf8_lossy(&output.stdout)
            .lines()
            .filter(|line| line.contains(directory))
            .map(str::to_owned)
            .collect()
    }

    fn port_is_open(&self) -> bool {
        std::net::TcpStream::connect(("127.0.0.1", self.port)).is_ok()
    }

    fn is_gone(&self) -> bool {
        !self.directory.exists() && !self.port_is_open() && self.processes().is_empty()
    }

    fn assert_gone_now(&self) {
        assert_eq!(self.processes(), Vec::<String>::new());
        assert!(!self.directory.exists(), "{}", self.directory.display());
        assert!(!self.port_is_open(), "{}", self.port);
    }

    fn assert_gone_soon(&self) {
        eventually(&format!("{} is gone", self.directory.display()), || self.is_gone());
    }
}

/// Waits for what nothing announces; ten seconds are far more than it takes.
fn eventually(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < deadline, "still not true after 10 s: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// A directory with a `postgres` that prints `version` and an `initdb` that runs `script`.
fn fake_programs(version: &str, script: &str) -> Result<tempfile::TempDir> {
    let all = fs::Permissions::from_mode(0o755);
    let bin = tempfile::Builder::new().permissions(all.clone()).tempdir()?;
    for (program, script) in [("postgres", &*format!("echo '{version}'")), ("initdb", script)] {
        let path = bin.path().join(program);
        fs::write(&path, format!("#!/bin/sh\n{script}\n"))?;
        fs::set_permissions(path, all.clone())?;
    }
    Ok(bin)
}

async fn connect(url: &str) -> Result<Client, tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

async fn setting(client: &Client, name: &str) -> Result<String, tokio_postgres::Error> {
    Ok(client.query_one("SELECT current_setting($1)", &[&name]).await?.get(0))
}

async fn exists(server: &PgServer, name: &str) -> Result<bool> {
    let client = connect(&server.url()).await?;
    let row =
        client.query_one("SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)", &[&name]).await?;
    Ok(row.get(0))
}

/// The futures can be awaited in `tokio::spawn`.
#[allow(dead_code)]
fn futures_are_send(server: &'static PgServer) {
    fn send(_: impl Future + Send) {}
    send(TestDatabase::create(server));
    send(Template::prepare(server, "any", async |_: &str| Ok(())));
}
