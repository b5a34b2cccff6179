//! The same few operations by this crate, by the bare driver, and by deadpool-postgres as its users write them.
#![allow(dead_code, reason = "every bench uses a part of it")]
#![allow(clippy::expect_used, reason = "a benchmark that fails has nothing to report")]

use deadpool_postgres::{Manager, Object, Pool};
use pg_session::testing::{PgServer, TestDatabase};
use pg_session::{Error, Session, SessionManager};
use tokio::runtime::Runtime;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, NoTls, Statement};

pub(crate) const SELECT: &str = "SELECT n FROM pg_session_bench WHERE id = $1";
pub(crate) const UPDATE: &str = "UPDATE pg_session_bench SET n = n + 1 WHERE id = $1";

/// How many rows the table has.
const ROWS: i64 = 1000;

/// One thread for all: the driver's task, the measured code and nothing else, so no time goes into waking threads.
pub(crate) fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

/// A database of the run's own, on the server of `DATABASE_URL` or on a throw-away one. It is dropped at the end.
pub(crate) async fn database() -> TestDatabase {
    let database = match std::env::var("DATABASE_URL") {
        Ok(url) if !url.is_empty() => TestDatabase::create_at(&url).await,
        _ => TestDatabase::create(PgServer::shared().expect("a server")).await,
    };
    let database = database.expect("a database");
    connect(database.url())
        .await
        .batch_execute(&format!(
            "CREATE TABLE pg_session_bench (id bigint PRIMARY KEY, n bigint NOT NULL) WITH (fillfactor = 20);
            INSERT INTO pg_session_bench SELECT id, 0 FROM generate_series(1, {ROWS}) AS id;
            ANALYZE pg_session_bench"
        ))
        .await
        .expect("a table");
    database
}

async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.expect("a connection");
    tokio::spawn(connection);
    client
}

/// Numbers from 1 to `ROWS`, in turn.
#[derive(Default)]
struct Ids(i64);

impl Ids {
    fn next(&mut self) -> i64 {
        self.0 = self.0 % ROWS + 1;
        self.0
    }
}

/// SQL that no cache has seen.
#[derive(Default)]
struct Fresh(u64);

impl Fresh {
    fn next(&mut self) -> String {
        self.0 += 1;
        format!("{SELECT} /* {} */", self.0)
    }
}

/// The bare driver, with statements prepared by hand.
pub(crate) struct Raw {
    client: Client,
    select: Statement,
    update: Statement,
    ids: Ids,
    fresh: Fresh,
}

impl Raw {
    pub(crate) async fn new(url: &str) -> Self {
        let client = connect(url).await;
        let select = client.prepare(SELECT).await.expect("a statement");
        let update = client.prepare(UPDATE).await.expect("a statement");
        Self { client, select, update, ids: Ids::default(), fresh: Fresh::default() }
    }

    pub(crate) async fn select(&mut self) -> i64 {
        let id = self.ids.next();
        self.client.query_one(&self.select, &[&id]).await.expect("a row").get(0)
    }

    pub(crate) async fn select_fresh(&mut self) -> i64 {
        let (id, sql) = (self.ids.next(), self.fresh.next());
        self.client.query_one(&sql, &[&id]).await.expect("a row").get(0)
    }

    pub(crate) async fn transaction(&mut self, updates: usize) {
        let tx = self.client.transaction().await.expect("a transaction");
        for _ in 0..updates {
            tx.execute(&self.update, &[&self.ids.next()]).await.expect("an update");
        }
        tx.commit().await.expect("a commit");
    }

    /// The same in one flight, as an expert writes it who has no doubt about the outcome.
    pub(crate) async fn pipelined(&mut self) {
        let id = self.ids.next();
        let parameters: [&(dyn ToSql + Sync); 1] = [&id];
        let (.., committed) = tokio::join!(
            self.client.batch_execute("BEGIN"),
            self.client.execute(&self.update, &parameters),
            self.client.batch_execute("COMMIT"),
        );
        committed.expect("a commit");
    }
}

pub(crate) fn deadpool(url: &str) -> Pool {
    let config = url.parse().expect("a URL");
    Pool::builder(Manager::new(config, NoTls)).max_size(2).build().expect("a pool")
}

/// deadpool-postgres, with its statement cache.
pub(crate) struct Deadpool {
    client: Object,
    ids: Ids,
    fresh: Fresh,
}

impl Deadpool {
    pub(crate) async fn new(pool: &Pool) -> Self {
        let client = pool.get().await.expect("a client");
        Self { client, ids: Ids::default(), fresh: Fresh::default() }
    }

    pub(crate) async fn select(&mut self) -> i64 {
        let id = self.ids.next();
        let select = self.client.prepare_cached(SELECT).await.expect("a statement");
        self.client.query_one(&select, &[&id]).await.expect("a row").get(0)
    }

    pub(crate) async fn select_fresh(&mut self) -> i64 {
        let (id, sql) = (self.ids.next(), self.fresh.next());
        self.client.query_one(&sql, &[&id]).await.expect("a row").get(0)
    }

    pub(crate) async fn transaction(&mut self, updates: usize) {
        let tx = self.client.transaction().await.expect("a transaction");
        for _ in 0..updates {
            let update = tx.prepare_cached(UPDATE).await.expect("a statement");
            tx.execute(&update, &[&self.ids.next()]).await.expect("an update");
        }
        tx.commit().await.expect("a commit");
    }
}

pub(crate) fn sessions(url: &str) -> SessionManager {
    let config: pg_session::SessionConfig = url.parse().expect("a URL");
    SessionManager::new(config.max_size(2)).expect("a manager")
}

/// This crate.
pub(crate) struct Ours {
    session: Session,
    ids: Ids,
    fresh: Fresh,
}

impl Ours {
    pub(crate) async fn new(sessions: &SessionManager) -> Self {
        let session = sessions.acquire().await.expect("a session");
        Self { session, ids: Ids::default(), fresh: Fresh::default() }
    }

    pub(crate) async fn select(&mut self) -> i64 {
        let id = self.ids.next();
        self.session.query_one(SELECT, &[&id]).await.expect("a row").get(0)
    }

    pub(crate) async fn select_fresh(&mut self) -> i64 {
        let (id, sql) = (self.ids.next(), self.fresh.next());
        self.session.query_one(&sql, &[&id]).await.expect("a row").get(0)
    }

    pub(crate) async fn transaction(&mut self, updates: usize) {
        let first = self.ids.next();
        let work = async |tx: &mut pg_session::Transaction<'_>| {
            for i in 0..updates as i64 {
                tx.execute(UPDATE, &[&((first + i) % ROWS + 1)]).await?;
            }
            Ok::<_, Error>(())
        };
        self.session.transaction(work).await.expect("a commit");
    }

    pub(crate) async fn batch(&mut self) {
        let id = self.ids.next();
        self.session.batch().push(UPDATE, (id,)).run().await.expect("a commit");
    }
}
