//! A table of numbers and a pool of one connection: what most tests of what is told and what is stored need.

use pg_session::{Session, SessionManager};

use super::{Database, until_returned};

pub struct Table {
    pub db: Database,
    /// With one connection, so that what one borrower leaves behind would meet the next.
    pub sessions: SessionManager,
}

impl Table {
    /// `t (id int PRIMARY KEY)`, empty.
    pub async fn new() -> Self {
        Self::of("id int PRIMARY KEY").await
    }

    /// `t` of these columns, empty.
    pub async fn of(columns: &str) -> Self {
        let db = Database::new().await;
        db.run(&format!("CREATE TABLE t ({columns})")).await;
        let sessions = db.single();
        Self { db, sessions }
    }

    pub async fn session(&self) -> Session {
        self.sessions.acquire().await.expect("a session")
    }

    /// How many rows everybody else sees.
    pub async fn rows(&self) -> i64 {
        self.db.number("SELECT count(*) FROM t").await
    }

    /// The same once the session is back, and what was left behind in it has ended.
    pub async fn rows_after(&self, session: Session) -> i64 {
        drop(session);
        until_returned(&self.sessions).await;
        self.rows().await
    }

    pub async fn empty(&self) {
        self.db.run("TRUNCATE t").await;
    }
}
