//! A sandbox: what its sessions see of each other, and that nothing of it is left.

mod common;

use std::time::Duration;

use common::{Database, within};
use pg_session::testing::Sandbox;
use pg_session::{Error, SessionManager};

async fn count(sessions: &SessionManager) -> i64 {
    let session = sessions.acquire().await.expect("a session");
    session.query_one("SELECT count(*) FROM t", &[]).await.expect("a count").get(0)
}

#[tokio::test]
async fn smoke() {
    within(async {
        let database = Database::new().await;
        database.run("CREATE TABLE t (id bigint PRIMARY KEY)").await;
        let sandbox = Sandbox::start(database.database.url()).await.expect("a sandbox");
        let sessions = sandbox.sessions();
        let mut session = sessions.acquire().await.expect("a session");
        session
            .transaction(async |tx| {
                tx.execute("INSERT INTO t VALUES (1)", &[]).await?;
                Ok::<_, Error>(())
            })
            .await
            .expect("committed");
        drop(session);
        assert_eq!(count(&sessions).await, 1);
        assert_eq!(database.number("SELECT count(*) FROM t").await, 0);
        sandbox.finish().await.expect("in order");
        let _ = Duration::ZERO;
    })
    .await;
}
