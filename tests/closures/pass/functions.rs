//! Plain functions as the unit of work, and users' own wrappers around a transaction.

use pg_session::{Error, Session, SessionManager, Transaction, TransactionOptions};

async fn cleanup(tx: &mut Transaction<'_>) -> Result<u64, Error> {
    tx.execute("DELETE FROM a", &[]).await
}

async fn by_name(session: &mut Session, sessions: &SessionManager) -> Result<(), Error> {
    session.transaction(cleanup).await?;
    session.transaction_with(TransactionOptions::serializable(), cleanup).await?;
    sessions.transaction(cleanup).await?;
    sessions.transaction_with(TransactionOptions::serializable(), cleanup).await?;
    session.transaction(async |tx| cleanup(tx).await).await?;
    session.transaction(async |tx| tx.savepoint(cleanup).await).await?;
    Ok(())
}

async fn audited<T, E, F>(sessions: &SessionManager, who: &str, f: F) -> Result<T, E>
where
    F: AsyncFnOnce(&mut Transaction<'_>) -> Result<T, E> + Clone,
    E: From<Error>,
{
    sessions
        .transaction(async |tx| {
            tx.execute("INSERT INTO audit (who) VALUES ($1)", &[&who]).await?;
            (f.clone())(tx).await
        })
        .await
}

async fn passed_on<T, E, F>(session: &mut Session, f: F) -> Result<T, E>
where
    F: AsyncFnOnce(&mut Transaction<'_>) -> Result<T, E> + Clone,
    E: From<Error>,
{
    session.transaction_with(TransactionOptions::serializable(), f).await
}

async fn through_wrappers(session: &mut Session, sessions: &SessionManager, id: i64) -> Result<(), Error> {
    audited(sessions, "me", cleanup).await?;
    audited(sessions, "me", async |tx| tx.execute("DELETE FROM a WHERE id = $1", &[&id]).await).await?;
    passed_on(session, cleanup).await?;
    passed_on(session, async |tx| tx.execute("DELETE FROM a WHERE id = $1", &[&id]).await).await?;
    Ok(())
}

fn main() {
    let _ = (by_name, through_wrappers);
}
