//! What a closure may capture, in each of the three places that take one.

use std::rc::Rc;
use std::sync::Arc;

use pg_session::{Error, Session, SessionManager, Transaction, TransactionOptions};

struct Account {
    id: i64,
    name: String,
}

async fn references(
    session: &mut Session,
    sessions: &SessionManager,
    account: &Account,
) -> Result<u64, Error> {
    let local = account.name.to_uppercase();
    let rename = async |tx: &mut Transaction<'_>| {
        tx.execute("UPDATE accounts SET name = $2 WHERE id = $1", &[&account.id, &local]).await
    };
    session.transaction(rename).await?;
    session.transaction(async |tx| tx.execute("DELETE FROM a WHERE name = $1", &[&local]).await).await?;
    session
        .transaction_with(TransactionOptions::serializable(), async |tx| {
            tx.execute("DELETE FROM a WHERE name = $1", &[&account.name]).await
        })
        .await?;
    sessions
        .transaction_with(TransactionOptions::new(), async |tx| {
            tx.execute("DELETE FROM a WHERE name = $1", &[&local]).await
        })
        .await?;
    sessions.transaction(async |tx| tx.execute("DELETE FROM a WHERE id = $1", &[&account.id]).await).await
}

async fn owned(
    session: &mut Session,
    sessions: &SessionManager,
    name: String,
    shared: Arc<Account>,
) -> Result<(), Error> {
    let (copy, again) = (name.clone(), Arc::clone(&shared));
    session
        .transaction(async move |tx| {
            tx.execute("UPDATE a SET name = $2 WHERE id = $1", &[&again.id, &copy]).await?;
            drop(copy); // its own: the next attempt gets another
            Ok::<_, Error>(())
        })
        .await?;
    let (copy, again) = (name.clone(), Arc::clone(&shared));
    session
        .transaction_with(TransactionOptions::new().read_only(), async move |tx| {
            tx.query_opt("SELECT FROM a WHERE id = $1 AND name = $2", &[&again.id, &copy]).await
        })
        .await?;
    sessions
        .transaction(async move |tx| tx.execute("INSERT INTO a VALUES ($1, $2)", &[&shared.id, &name]).await)
        .await?;
    Ok(())
}

async fn not_send(session: &mut Session, sessions: &SessionManager, id: Rc<i64>) -> Result<(), Error> {
    session.transaction(async |tx| tx.execute("DELETE FROM a WHERE id = $1", &[&*id]).await).await?;
    let mine = Rc::clone(&id);
    session
        .transaction(async move |tx| {
            tx.execute("DELETE FROM a WHERE id = $1", &[&*mine]).await?;
            Ok::<_, Error>(mine)
        })
        .await?;
    sessions.transaction(async |tx| tx.execute("DELETE FROM a WHERE id = $1", &[&*id]).await).await?;
    Ok(())
}

/// A result that borrows from what was captured.
async fn borrowed_result<'a>(sessions: &SessionManager, name: &'a str) -> Result<&'a str, Error> {
    sessions
        .transaction(async |tx| {
            tx.execute("INSERT INTO a VALUES ($1)", &[&name]).await?;
            Ok(name)
        })
        .await
}

async fn one_closure_for_several_transactions(session: &mut Session, ids: &[i64]) -> Result<(), Error> {
    let work = async |tx: &mut Transaction<'_>| {
        for id in ids {
            tx.execute("DELETE FROM a WHERE id = $1", &[id]).await?;
        }
        Ok::<_, Error>(())
    };
    session.transaction(work).await?;
    session.transaction_with(TransactionOptions::repeatable_read(), work).await
}

fn main() {
    let _ = (references, owned, not_send, borrowed_result, one_closure_for_several_transactions);
}
