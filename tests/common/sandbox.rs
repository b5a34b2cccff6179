//! What the tests of the sandbox share: its tables, and short ways to ask.

use pg_session::testing::Sandbox;
use pg_session::tokio_postgres::{self, Client, SimpleQueryMessage};
use pg_session::{Error, Session, SessionManager};

use super::{Database, within};

pub async fn database() -> Database {
    let database = Database::new().await;
    database
        .run(
            "CREATE TABLE t (id bigint PRIMARY KEY, n bigint NOT NULL DEFAULT 0);
             CREATE TABLE parent (id bigint PRIMARY KEY);
             CREATE TABLE child (
                 late bigint CONSTRAINT late_fk REFERENCES parent DEFERRABLE INITIALLY DEFERRED,
                 soon bigint CONSTRAINT soon_fk REFERENCES parent DEFERRABLE INITIALLY IMMEDIATE)",
        )
        .await;
    database
}

pub async fn sandbox(database: &Database) -> Sandbox {
    within(Sandbox::start(database.database.url())).await.expect("a sandbox")
}

pub async fn insert(sessions: &SessionManager, id: i64) -> Result<(), Error> {
    sessions
        .transaction(async |tx| {
            tx.execute("INSERT INTO t (id) VALUES ($1)", &[&id]).await?;
            Ok(())
        })
        .await
}

pub async fn count(sessions: &SessionManager) -> i64 {
    let session = sessions.acquire().await.expect("a session");
    session.query_one("SELECT count(*) FROM t", &[]).await.expect("a count").get(0)
}

/// What is in the table for everybody else.
pub async fn outside(database: &Database) -> i64 {
    database.number("SELECT count(*) FROM t").await
}

pub fn code(error: &tokio_postgres::Error) -> &str {
    error.code().unwrap_or_else(|| panic!("{error}")).code()
}

pub async fn text(session: &Session, sql: &str) -> String {
    session.query_one(sql, &[]).await.expect(sql).get(0)
}

/// The tags and first columns of a simple query's answer.
pub async fn simple(client: &Client, sql: &str) -> Vec<String> {
    let messages = client.simple_query(sql).await.expect(sql);
    let values = messages.into_iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap_or("NULL").to_owned()),
        SimpleQueryMessage::CommandComplete(n) => Some(format!("({n})")),
        _ => None,
    });
    values.collect()
}
