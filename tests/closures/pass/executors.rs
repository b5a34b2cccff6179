//! Functions that do not care what they are given: a session, a transaction, a savepoint, or a connection.

use pg_session::{Connection, Error, Executor, Session, SessionManager};

async fn by_reference(db: &impl Executor, id: i64) -> Result<i64, Error> {
    Ok(db.query_one("SELECT n FROM a WHERE id = $1", &[&id]).await?.get(0))
}

async fn by_value(db: impl Executor, id: i64) -> Result<i64, Error> {
    Ok(db.query_one("SELECT n FROM a WHERE id = $1", &[&id]).await?.get(0))
}

async fn by_connection(db: &Connection, id: i64) -> Result<i64, Error> {
    Ok(db.query_one("SELECT n FROM a WHERE id = $1", &[&id]).await?.get(0))
}

struct Repository<E> {
    db: E,
}

impl<E: Executor> Repository<E> {
    async fn count(&self) -> Result<i64, Error> {
        Ok(self.db.query_one("SELECT count(*) FROM a", &[]).await?.get(0))
    }
}

async fn with_a_session(session: &mut Session) -> Result<(), Error> {
    by_reference(session, 1).await?;
    by_reference(&session, 1).await?;
    by_value(&*session, 1).await?;
    by_value(&mut *session, 1).await?;
    by_connection(session, 1).await?;
    Repository { db: &*session }.count().await?;
    Ok(())
}

async fn with_a_transaction(session: &mut Session) -> Result<(), Error> {
    session
        .transaction(async |tx| {
            by_reference(tx, 1).await?;
            by_reference(&tx, 1).await?;
            by_value(&*tx, 1).await?;
            by_value(&mut *tx, 1).await?;
            by_connection(tx, 1).await?;
            Repository { db: &*tx }.count().await?;
            tx.savepoint(async |sp| {
                by_reference(sp, 1).await?;
                by_value(&*sp, 1).await?;
                by_connection(sp, 1).await?;
                Repository { db: &*sp }.count().await
            })
            .await?;
            by_value(tx, 1).await
        })
        .await?;
    Ok(())
}

fn spawned(sessions: SessionManager) {
    tokio::spawn(async move {
        let mut session = sessions.acquire().await?;
        by_reference(&session, 1).await?;
        by_value(&session, 1).await?;
        by_connection(&session, 1).await?;
        session.transaction(async |tx| by_reference(tx, 1).await).await?;
        session.transaction(async |tx| by_value(tx, 1).await).await?;
        session.transaction(async |tx| by_connection(tx, 1).await).await?;
        session.transaction(async |tx| Repository { db: &*tx }.count().await).await?;
        by_value(session, 1).await
    });
}

fn main() {
    let _ = (with_a_session, with_a_transaction, spawned);
}
