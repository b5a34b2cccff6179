//! What the tests share: a server for each test binary, a database for each test, and ways to wait that are not sleep.
#![allow(
    dead_code,
    unused_imports,
    unreachable_pub,
    missing_docs,
    reason = "every test binary uses a part of it"
)]

pub mod assassin;
pub mod frames;
pub mod gate;
pub mod log;
pub mod middle;
pub mod polls;
pub mod proxy;
pub mod raw;
pub mod residue;
pub mod sandbox;
pub mod table;
pub mod wrongs;

use std::future::Future;
use std::time::{Duration, Instant};

use pg_session::testing::{PgServer, TestDatabase};
use pg_session::{Session, SessionConfig, SessionManager};

pub use polls::{leaked, polls};

/// No test may hang: everything is done within this.
pub const LIMIT: Duration = Duration::from_secs(30);

/// A database of the test's own, and a plain connection to watch it with.
pub struct Database {
    pub database: TestDatabase,
    pub watcher: tokio_postgres::Client,
}

impl Database {
    pub async fn new() -> Self {
        let server = PgServer::shared().expect("a server");
        let database = TestDatabase::create(server).await.expect("a database");
        let watcher = connect(database.url()).await;
        Self { database, watcher }
    }

    pub fn config(&self) -> SessionConfig {
        self.database.url().parse().expect("a URL")
    }

    pub fn sessions(&self) -> SessionManager {
        SessionManager::new(self.config()).expect("a configuration")
    }

    /// A manager with one connection, so that the next borrower gets the one that was just returned.
    pub fn single(&self) -> SessionManager {
        SessionManager::new(self.config().max_size(1)).expect("a configuration")
    }

    pub async fn run(&self, sql: &str) {
        self.watcher.batch_execute(sql).await.expect(sql);
    }

    pub async fn number(&self, sql: &str) -> i64 {
        self.watcher.query_one(sql, &[]).await.expect(sql).get(0)
    }

    /// Waits until a query on the watcher's connection says so.
    pub async fn until(&self, condition: &str) {
        let sql = format!("SELECT ({condition})::bool");
        let started = Instant::now();
        loop {
            let row = self.watcher.query_one(&sql, &[]).await.expect(condition);
            if row.get::<_, Option<bool>>(0) == Some(true) {
                return;
            }
            assert!(started.elapsed() < LIMIT, "never became true: {condition}");
            tokio::task::yield_now().await;
        }
    }

    /// Waits until this backend is inside `pg_sleep`.
    pub async fn until_sleeping(&self, pid: i32) {
        let sleeping = "pid = %1 AND wait_event = 'PgSleep'".replace("%1", &pid.to_string());
        self.until(&format!("EXISTS (SELECT FROM pg_stat_activity WHERE {sleeping})")).await;
    }

    /// Waits until somebody waits for an advisory lock of this database.
    pub async fn until_blocked(&self) {
        self.until(
            "EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted \
             AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))",
        )
        .await;
    }

    /// Waits until this backend is no more.
    pub async fn until_ended(&self, pid: i32) {
        self.until(&format!("NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = {pid})")).await;
    }

    /// Waits until no session of this database but the watcher's is in a transaction or runs anything.
    pub async fn until_quiet(&self) {
        self.until(&format!("NOT EXISTS ({})", Self::BUSY)).await;
    }

    /// Waits until nobody but the watcher is connected to this database.
    pub async fn until_alone(&self) {
        self.until(
            "NOT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() \
             AND pid <> pg_backend_pid())",
        )
        .await;
    }

    pub const BUSY: &str = "SELECT FROM pg_stat_activity WHERE datname = current_database() \
        AND pid <> pg_backend_pid() AND backend_type = 'client backend' AND state <> 'idle'";
}

pub fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// A session, however slowly it is opened: for those whose acquire timeout is short because something else is to run
/// into it. What is being opened goes on meanwhile.
pub async fn opened(sessions: &SessionManager) -> Session {
    within(async {
        loop {
            match sessions.acquire().await {
                Err(e) if e.is_timeout() => {}
                result => return result.unwrap(),
            }
        }
    })
    .await
}

/// Waits until every session is back in the pool, repaired where it has to be.
pub async fn until_returned(sessions: &SessionManager) {
    until(|| {
        let status = sessions.status();
        (status.in_use, status.waiting, status.connecting) == (0, 0, 0)
    })
    .await;
}

/// Waits until it is so; for what neither the server nor a future tells.
pub async fn until(mut so: impl FnMut() -> bool) {
    within(async {
        while !so() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

pub async fn connect(url: &str) -> tokio_postgres::Client {
    let (client, connection) =
        tokio_postgres::connect(url, tokio_postgres::NoTls).await.expect("a connection");
    tokio::spawn(connection);
    client
}

/// Fails the test rather than let it hang.
pub async fn within<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(LIMIT, future).await.expect("done in time")
}
