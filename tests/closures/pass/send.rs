//! Futures that must be `Send`: spawned, in handlers, in traits of services, boxed.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use pg_session::{Error, Session, SessionManager, TransactionOptions};

fn assert_send<F: Future + Send>(future: F) -> F {
    future
}

fn spawned_with_references_to_its_own_locals(sessions: SessionManager) {
    tokio::spawn(async move {
        let (name, ids) = (String::from("x"), vec![1i64, 2]);
        let mut session = sessions.acquire().await?;
        session.transaction(async |tx| tx.execute("DELETE FROM a WHERE name = $1", &[&name]).await).await?;
        session
            .transaction_with(TransactionOptions::serializable(), async |tx| {
                for id in &ids {
                    tx.execute("DELETE FROM a WHERE id = $1", &[id]).await?;
                    tx.savepoint(async |sp| sp.execute("DELETE FROM b WHERE id = $1", &[id]).await).await?;
                }
                Ok::<_, Error>(())
            })
            .await?;
        sessions.transaction(async |tx| tx.execute("DELETE FROM a WHERE name = $1", &[&name]).await).await
    });
}

fn spawned_with_shared_state(sessions: SessionManager, state: Arc<Vec<String>>) {
    tokio::spawn(async move {
        let mine = Arc::clone(&state);
        sessions
            .transaction(async move |tx| {
                for name in mine.iter() {
                    tx.execute("DELETE FROM a WHERE name = $1", &[name]).await?;
                }
                Ok::<_, Error>(())
            })
            .await?;
        sessions.transaction(async |tx| tx.execute("DELETE FROM a WHERE name = $1", &[&state[0]]).await).await
    });
}

fn asserted<'a>(session: &'a mut Session, sessions: &'a SessionManager, name: &'a str) {
    let work = assert_send(async move {
        session.transaction(async |tx| tx.execute("DELETE FROM a WHERE name = $1", &[&name]).await).await?;
        session
            .transaction(async |tx| {
                tokio::try_join!(
                    async { tx.execute("DELETE FROM a WHERE name = $1", &[&name]).await },
                    async { tx.execute("DELETE FROM b WHERE name = $1", &[&name]).await },
                )
            })
            .await?;
        let tx = session.begin().await?;
        tx.execute("DELETE FROM a WHERE name = $1", &[&name]).await?;
        tx.commit().await?;
        sessions.transaction(async |tx| tx.execute("DELETE FROM a WHERE name = $1", &[&name]).await).await
    });
    drop(work);
}

trait Accounts {
    fn rename(&self, id: i64, name: &str) -> impl Future<Output = Result<u64, Error>> + Send;
}

struct InDatabase {
    sessions: SessionManager,
}

impl Accounts for InDatabase {
    async fn rename(&self, id: i64, name: &str) -> Result<u64, Error> {
        let mut session = self.sessions.acquire().await?;
        session
            .transaction(async |tx| tx.execute("UPDATE a SET name = $2 WHERE id = $1", &[&id, &name]).await)
            .await?;
        self.sessions
            .transaction(async |tx| tx.execute("UPDATE a SET name = $2 WHERE id = $1", &[&id, &name]).await)
            .await
    }
}

/// What async-trait makes of a method.
fn boxed<'a>(
    sessions: &'a SessionManager,
    name: &'a str,
) -> Pin<Box<dyn Future<Output = Result<u64, Error>> + Send + 'a>> {
    Box::pin(async move {
        sessions.transaction(async |tx| tx.execute("DELETE FROM a WHERE name = $1", &[&name]).await).await
    })
}

/// A service of any kind, as frameworks call it.
fn generic<S: Accounts + Send + Sync + 'static>(service: Arc<S>) {
    tokio::spawn(async move { service.rename(1, "x").await });
}

fn main() {
    let _ = (spawned_with_references_to_its_own_locals, spawned_with_shared_state, asserted, boxed);
    let _ = generic::<InDatabase>;
}
