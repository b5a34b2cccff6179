// It would look as if it ran outside.

use pg_session::{Error, Session};

async fn f(session: &mut Session) -> Result<u64, Error> {
    session.transaction(async |_tx| session.execute("DELETE FROM a", &[]).await).await
}

fn main() {}
