// Its rows would come after COMMIT.

use pg_session::{Error, Session};

async fn f(session: &mut Session) -> Result<(), Error> {
    let mut rows = session.transaction(async |tx| tx.query_stream("SELECT 1", &[]).await).await?;
    while rows.next().await.is_some() {}
    Ok(())
}

fn main() {}
