// A statement that is meant to be in the savepoint would be undone with it, or not.

use pg_session::{Error, Session};

async fn f(session: &mut Session) -> Result<(), Error> {
    session
        .transaction(async |tx| {
            tx.savepoint(async |_sp| {
                tx.execute("DELETE FROM a", &[]).await?;
                Ok::<_, Error>(())
            })
            .await
        })
        .await
}

fn main() {}
