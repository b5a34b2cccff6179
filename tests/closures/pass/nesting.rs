//! Savepoints in savepoints, and statements side by side.

use pg_session::{Connection, Error, Row, Session, SessionManager};

async fn two_levels(session: &mut Session, name: &str) -> Result<i64, Error> {
    let mut tried = 0;
    tried += session
        .transaction(async |tx| {
            tx.execute("INSERT INTO a VALUES ($1)", &[&name]).await?;
            let inner = tx
                .savepoint(async |sp| {
                    sp.execute("INSERT INTO b VALUES ($1)", &[&name]).await?;
                    sp.savepoint(async |deeper| deeper.execute("INSERT INTO c VALUES ($1)", &[&name]).await)
                        .await
                })
                .await;
            tx.execute("INSERT INTO d VALUES ($1)", &[&inner.is_ok()]).await?;
            Ok::<_, Error>(1)
        })
        .await?;
    Ok(tried)
}

/// A savepoint runs once, so it may change what is outside it.
async fn savepoint_with_state(sessions: &SessionManager) -> Result<Vec<i64>, Error> {
    sessions
        .transaction(async |tx| {
            let mut ids = Vec::new();
            for n in 0..3i64 {
                tx.savepoint(async |sp| {
                    let row = sp.query_one("INSERT INTO a VALUES ($1) RETURNING id", &[&n]).await?;
                    ids.push(row.get(0));
                    Ok::<_, Error>(())
                })
                .await?;
            }
            Ok(ids)
        })
        .await
}

async fn cents(db: &Connection, id: i64) -> Result<Row, Error> {
    db.query_one("SELECT cents FROM a WHERE id = $1", &[&id]).await
}

async fn side_by_side(session: &mut Session, from: i64, to: i64) -> Result<i64, Error> {
    session
        .transaction(async |tx| {
            let (a, b) = tokio::try_join!(
                // In blocks, since the macro drops temporaries such as `&[&from]` before it awaits.
                async { tx.query_one("SELECT cents FROM a WHERE id = $1", &[&from]).await },
                cents(tx, to),
            )?;
            tx.savepoint(async |sp| {
                tokio::try_join!(sp.execute("DELETE FROM b", &[]), sp.execute("DELETE FROM c", &[]))?;
                Ok::<_, Error>(())
            })
            .await?;
            Ok(a.get::<_, i64>(0) + b.get::<_, i64>(0))
        })
        .await
}

/// What a transaction is used for by hand.
async fn by_hand(session: &mut Session) -> Result<(), Error> {
    let mut tx = session.begin().await?;
    tx.savepoint(async |sp| sp.execute("DELETE FROM a", &[]).await).await?;
    tx.commit().await?;
    let tx = session.begin().await?;
    tx.rollback().await;
    session.execute("DELETE FROM a", &[]).await?;
    Ok(())
}

fn main() {
    let _ = (two_levels, savepoint_with_state, side_by_side, by_hand);
}
