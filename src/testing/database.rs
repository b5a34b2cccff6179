//! A database of one test's own, and templates to clone it from.

use std::{
    env,
    error::Error,
    fmt,
    hash::{DefaultHasher, Hash, Hasher},
    process,
    sync::{
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use postgres_protocol::escape::{escape_identifier, escape_literal};
use tokio_postgres::{Client, NoTls, error::SqlState};

use super::{PgServer, PgServerError};
use crate::config::SessionConfig;
use crate::manager::SessionManager;

/// How long dropping a [`TestDatabase`] may hold up the test.
const DROP_LIMIT: Duration = Duration::from_secs(5);

/// How long to wait for sessions to leave a template; the server waits 5 s at each try, too.
const IN_USE_LIMIT: Duration = Duration::from_secs(30);

/// A fresh database for one test, dropped with this value.
///
/// Dropping it ends the sessions that are still in it. That happens in a thread of its own, needs no runtime,
/// and holds up the caller for 5 s at most. A database can be kept for a closer look: [`keep`](Self::keep)
/// keeps it, and with `PG_SESSION_KEEP_DATABASES=1` in the environment each test that panics keeps its own.
/// (A database on a [`PgServer`] goes with its server all the same.)
///
/// The connections made here do not use TLS.
pub struct TestDatabase {
    admin_url: String,
    name: String,
    url: String,
    config: SessionConfig,
    dropped_with_self: bool,
}

impl TestDatabase {
    /// Creates an empty database.
    ///
    /// # Errors
    ///
    /// [`PgServerError::Database`] if the server cannot be reached or refuses.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: a database whose creation nobody waits for is dropped again.
    pub async fn create(server: &PgServer) -> Result<Self, PgServerError> {
        Self::create_at(&server.url()).await
    }

    /// Creates an empty database on any server, such as one that CI runs beside the tests.
    ///
    /// `url` is a URL or key/value string of any database of that server, for a role that may create
    /// databases, such as both [`SessionConfig`] and [`tokio_postgres::Config`] read.
    ///
    /// # Errors
    ///
    /// - [`PgServerError::Url`] if the URL makes no sense or asks for TLS.
    /// - [`PgServerError::Database`] if the server cannot be reached or refuses.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: a database whose creation nobody waits for is dropped again.
    pub async fn create_at(url: &str) -> Result<Self, PgServerError> {
        Self::create_from(url.to_owned(), None).await
    }

    /// Creates a database as a copy of a template.
    ///
    /// # Errors
    ///
    /// [`PgServerError::Database`] if the server cannot be reached or refuses.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: a database whose creation nobody waits for is dropped again.
    pub async fn from_template(template: &Template) -> Result<Self, PgServerError> {
        Self::create_from(template.admin_url.clone(), Some(template.database.clone())).await
    }

    async fn create_from(admin_url: String, template: Option<String>) -> Result<Self, PgServerError> {
        let name = unique_name();
        let url = with_database(&admin_url, &name);
        let config = url.parse::<SessionConfig>().and_then(|config| config.validate().map(|()| config));
        let config = config.map_err(|source| PgServerError::Url { source })?;
        // Cancel safety: the statement goes on after its future is dropped, so the task that waits for its
        // end must go on, too; then it drops the database that nobody took.
        let creation = tokio::spawn(async move {
            let client = connect(&admin_url).await?;
            let mut statement = format!("CREATE DATABASE {}", escape_identifier(&name));
            if let Some(template) = template {
                statement.push_str(" TEMPLATE ");
                statement.push_str(&escape_identifier(&template));
            }
            execute_unused(&client, &statement)
                .await
                .map_err(PgServerError::database("create a test database"))?;
            Ok(Self { admin_url, name, url, config, dropped_with_self: true })
        });
        match creation.await {
            Ok(result) => result,
            Err(error) => Err(PgServerError::io("create a test database")(error.into())),
        }
    }

    /// The URL of this database, with the role and the parameters of the server's URL.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The name of this database, unique to this test.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The configuration for sessions in this database, with the defaults of [`SessionConfig`].
    #[must_use]
    pub fn config(&self) -> SessionConfig {
        self.config.clone()
    }

    /// A manager of its own for sessions in this database, with the defaults of [`SessionConfig`]; for others,
    /// give [`SessionManager::new`] a changed [`config`](Self::config).
    ///
    /// Sessions that are still open when the database is dropped are ended by the server.
    #[must_use]
    pub fn sessions(&self) -> SessionManager {
        // Invariant: the configuration was found valid when the database was created.
        SessionManager::new(self.config()).expect("a valid configuration")
    }

    /// Keeps the database when this value is dropped, and prints its URL, without a password, to standard
    /// error.
    pub fn keep(&mut self) {
        self.dropped_with_self = false;
        eprintln!("pg-session: keeping test database {} ({})", self.name, without_password(&self.url));
    }

    /// Drops the database now, with the result told; sessions that are still in it are ended.
    ///
    /// # Errors
    ///
    /// [`PgServerError::Database`] if the server cannot be reached or refuses.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: if the future is dropped before its end, dropping goes on in the background as for any
    /// other test database.
    pub async fn drop_now(mut self) -> Result<(), PgServerError> {
        let result = drop_database(&self.admin_url, &self.name).await;
        self.dropped_with_self = false;
        result.map_err(PgServerError::database("drop a test database"))
    }
}

impl fmt::Debug for TestDatabase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the URLs: they may hold a password.
        f.debug_struct("TestDatabase").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Drop for TestDatabase {
    fn drop(&mut self) {
        if thread::panicking() && env::var_os("PG_SESSION_KEEP_DATABASES").is_some_and(|value| value == "1") {
            self.keep();
        }
        if !self.dropped_with_self {
            return;
        }
        let (done, dropped) = mpsc::channel();
        let (admin_url, name) = (self.admin_url.clone(), self.name.clone());
        // A thread with a runtime of its own: the caller's may be absent, ending, or one that must not be
        // blocked.
        let spawned = thread::Builder::new().name("pg-session-drop".to_owned()).spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let result = runtime.map(|runtime| runtime.block_on(drop_database(&admin_url, &name)));
            // The caller may have stopped waiting.
            let _ = done.send(result);
        });
        if spawned.is_err() {
            return;
        }
        // A server that has gone took the database with it; only one that refuses is worth a word.
        if let Ok(Ok(Err(error))) = dropped.recv_timeout(DROP_LIMIT) {
            if let Some(refusal) = error.as_db_error() {
                eprintln!("pg-session: could not drop test database {}: {refusal}", self.name);
            }
        }
    }
}

/// A database on a [`PgServer`] that is prepared once, for tests to clone.
///
/// Cloning copies files on the server, which takes some tens of milliseconds, however long the preparation
/// took. Clones of this value stand for the same database, which goes with its server.
#[derive(Debug, Clone)]
pub struct Template {
    admin_url: String,
    database: String,
}

impl Template {
    /// The template of this name on this server; the first caller prepares it.
    ///
    /// `prepare` gets the URL of an empty database and fills it, by migrations say. Callers that come while
    /// it runs wait for it, and their own closures are not run. When it has ended, sessions still in the
    /// template are ended, and no more are let in.
    ///
    /// On the [shared](PgServer::shared) server of a cargo-nextest run, it is prepared once for each test
    /// binary: of all processes that run tests of the same binary, one prepares it and the others wait. If that
    /// process ends before the template is finished, however it ends, the next one starts afresh. Test binaries
    /// have no template in common, even of the same name.
    ///
    /// # Errors
    ///
    /// - [`PgServerError::Template`]: `prepare` failed. The half-made database is dropped, and the next
    ///   caller may
    ///   try again.
    /// - [`PgServerError::Database`]: the server cannot be reached or refuses.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: if the future is dropped while `prepare` runs, the half-made database is dropped, and the
    /// next caller, in this process or another, starts afresh.
    pub async fn prepare<F>(server: &PgServer, name: &str, prepare: F) -> Result<Self, PgServerError>
    where
        F: AsyncFnOnce(&str) -> Result<(), Box<dyn Error + Send + Sync>>,
    {
        let admin_url = server.url();
        let cell = server.template_cell(name);
        let prepared = cell.get_or_try_init(|| async {
            if server.is_of_a_run() {
                return once_for_this_binary(server, name, prepare).await;
            }
            let mut database = filled(server, name, prepare).await?;
            database.dropped_with_self = false;
            Ok(database.name().to_owned())
        });
        let database = prepared.await?.clone();
        Ok(Self { admin_url, database })
    }
}

/// A new database that is prepared and closed.
async fn filled<F>(server: &PgServer, name: &str, prepare: F) -> Result<TestDatabase, PgServerError>
where
    F: AsyncFnOnce(&str) -> Result<(), Box<dyn Error + Send + Sync>>,
{
    let database = TestDatabase::create(server).await?;
    prepare(database.url())
        .await
        .map_err(|source| PgServerError::Template { name: name.to_owned(), source })?;
    close(&database.admin_url, database.name()).await.map_err(PgServerError::database("close a template"))?;
    Ok(database)
}

/// The name of the database that one of all the processes of this test binary has filled.
///
/// It gets that name when it is finished, so one that is half made is never taken for it. The server ends the
/// lock with the session of whoever holds it, and so with its process.
async fn once_for_this_binary<F>(server: &PgServer, name: &str, prepare: F) -> Result<String, PgServerError>
where
    F: AsyncFnOnce(&str) -> Result<(), Box<dyn Error + Send + Sync>>,
{
    let binary = env::current_exe().map_err(PgServerError::io("find the path of this test binary"))?;
    let mut hasher = DefaultHasher::new();
    (binary, name).hash(&mut hasher);
    let key = hasher.finish();
    let finished = format!("pg_session_template_{key:016x}");

    let doing = "share a template with other test processes";
    let client = connect(&server.url()).await?;
    let lock = format!("SELECT pg_advisory_lock({})", key as i64);
    client.batch_execute(&lock).await.map_err(PgServerError::database(doing))?;
    let result = async {
        let found = client.query_opt("SELECT FROM pg_database WHERE datname = $1", &[&finished]).await;
        if found.map_err(PgServerError::database(doing))?.is_some() {
            return Ok(());
        }
        let mut database = filled(server, name, prepare).await?;
        let rename = format!(
            "ALTER DATABASE {} RENAME TO {}",
            escape_identifier(database.name()),
            escape_identifier(&finished)
        );
        execute_unused(&client, &rename).await.map_err(PgServerError::database(doing))?;
        database.dropped_with_self = false;
        Ok(())
    };
    let result = result.await;
    // Not left to the connection's end: who blocks this runtime next would keep the others waiting. If it
    // fails, the session is gone, and the lock with it.
    let _ = client.batch_execute("SELECT pg_advisory_unlock_all()").await;
    result.map(|()| finished)
}

/// Executes what needs a database without sessions, again and again while those that are ending are in it.
async fn execute_unused(client: &Client, statement: &str) -> Result<(), tokio_postgres::Error> {
    let deadline = Instant::now() + IN_USE_LIMIT;
    loop {
        match client.batch_execute(statement).await {
            Err(error) if error.code() == Some(&SqlState::OBJECT_IN_USE) && Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            result => return result,
        }
    }
}

/// Ends the sessions in a database and lets no more in, since a database with sessions cannot be cloned.
async fn close(admin_url: &str, name: &str) -> Result<(), tokio_postgres::Error> {
    let statements = format!(
        "ALTER DATABASE {} ALLOW_CONNECTIONS false; \
         SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = {}",
        escape_identifier(name),
        escape_literal(name)
    );
    let client = open(admin_url).await?;
    client.batch_execute(&statements).await
}

async fn drop_database(admin_url: &str, name: &str) -> Result<(), tokio_postgres::Error> {
    let statement = format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", escape_identifier(name));
    let client = open(admin_url).await?;
    client.batch_execute(&statement).await
}

async fn connect(url: &str) -> Result<Client, PgServerError> {
    open(url).await.map_err(PgServerError::database("connect to the server"))
}

async fn open(url: &str) -> Result<Client, tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    // Ends with the client, which also hears of its errors.
    tokio::spawn(connection);
    Ok(client)
}

/// A name that no other test has, in this process or in another that uses the same server; letters, digits
/// and `_`.
fn unique_name() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(1);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("pg_session_{}_{count}_{:08x}", process::id(), fastrand::u32(..))
}

/// The same server by the same role, but another database, whose name needs no quoting (see [`unique_name`]).
fn with_database(url: &str, name: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else {
        // The last of several counts.
        return format!("{url} dbname={name}");
    };
    // As the driver reads it: credentials up to the first @, which may hold any other character.
    let host_at = rest.find('@').map_or(0, |at| at + 1);
    let (credentials, rest) = rest.split_at(host_at);
    let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
    let host = place.split('/').next().unwrap_or_default();
    let query: Vec<&str> =
        query.split('&').filter(|pair| !pair.is_empty() && !pair.starts_with("dbname=")).collect();
    let mark = if query.is_empty() { "" } else { "?" };
    format!("{scheme}://{credentials}{host}/{name}{mark}{}", query.join("&"))
}

/// A URL fit for a log.
fn without_password(url: &str) -> String {
    let parts = url.split_once("://").and_then(|(scheme, rest)| Some((scheme, rest.split_once('@')?)));
    match parts {
        Some((scheme, (credentials, rest))) if !rest.contains("password=") => {
            let user = credentials.split(':').next().unwrap_or_default();
            format!("{scheme}://{user}@{rest}")
        }
        _ => "its URL is not shown, it may hold a password".to_owned(),
    }
}
