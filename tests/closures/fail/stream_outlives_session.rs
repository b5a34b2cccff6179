// The next borrower would find it open.

use pg_session::{Error, SessionManager};

async fn f(sessions: SessionManager) -> Result<(), Error> {
    let session = sessions.acquire().await?;
    let mut rows = session.query_stream("SELECT 1", &[]).await?;
    drop(session);
    while rows.next().await.is_some() {}
    Ok(())
}

fn main() {}
