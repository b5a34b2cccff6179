//! The return rule: whatever a session left behind, the next borrower finds nothing of it; and a connection is kept
//! where the rule says so.
#![cfg(feature = "testing")]

mod common;

use std::time::Duration;

use common::residue::assert_pristine;
use common::{Database, within};
use pg_session::{Error, Reset, Session, SessionManager};

async fn borrow(sessions: &SessionManager) -> Session {
    within(sessions.acquire()).await.unwrap()
}

#[tokio::test]
async fn nothing_is_inherited_from_sql() {
    let db = Database::new().await;
    db.run("CREATE TABLE t (a int); CREATE SEQUENCE s; CREATE ROLE heir_of_nothing").await;
    let by_batch = [
        "BEGIN",
        "BEGIN; SELECT 1/0",
        "BEGIN; INSERT INTO t VALUES (1)",
        "SET app.trace = 'x'",
        "SET search_path = pg_catalog",
        "SET statement_timeout = '10s'",
        "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE READ ONLY",
        "SET ROLE heir_of_nothing",
        "SET SESSION AUTHORIZATION heir_of_nothing",
        "CREATE TEMP TABLE left_behind (a int)",
        "SELECT pg_advisory_lock(1); SELECT pg_advisory_lock_shared(2)",
        "LISTEN jobs",
        "PREPARE \"left 'behind\" AS SELECT 1; PREPARE another AS SELECT 2",
        "BEGIN; DECLARE c CURSOR WITH HOLD FOR SELECT 1; COMMIT",
        "SELECT nextval('s')",
        "BEGIN; SET LOCAL app.trace = 'x'; SELECT pg_advisory_lock(3)",
    ];
    let sessions = db.single();
    for sql in by_batch {
        let session = borrow(&sessions).await;
        let pid = session.process_id();
        let _ = session.batch_execute(sql).await;
        drop(session);
        let next = borrow(&sessions).await;
        assert_eq!(next.process_id(), pid, "kept after {sql}");
        assert_pristine(&next, sql).await;
    }
    assert_eq!(db.number("SELECT count(*) FROM t").await, 0);
    // The same by prepared statements, where only the text tells.
    for sql in [
        "BEGIN",
        "SET app.trace = 'x'",
        "SELECT set_config('app.trace', 'x', false)",
        "SET ROLE heir_of_nothing",
        "CREATE TEMP TABLE left_behind (a int)",
        "SELECT pg_advisory_lock(1)",
        "SELECT pg_try_advisory_lock(4)",
        "LISTEN jobs",
        "PREPARE left_behind AS SELECT 1",
        "SELECT nextval('s')",
        "DO $$ BEGIN PERFORM pg_advisory_lock(5); END $$",
    ] {
        for run in ["first", "from the cache"] {
            let session = borrow(&sessions).await;
            let pid = session.process_id();
            session.execute(sql, &[]).await.unwrap();
            drop(session);
            let next = borrow(&sessions).await;
            assert_eq!(next.process_id(), pid, "kept after {sql}");
            assert_pristine(&next, &format!("{sql} ({run})")).await;
        }
    }
    db.run("DROP ROLE heir_of_nothing").await;
}

#[tokio::test]
async fn the_raw_client_leaves_nothing_behind() {
    let db = Database::new().await;
    let sessions = db.single();
    let mut session = borrow(&sessions).await;
    let pid = session.process_id();
    let client = session.client().await.unwrap();
    let tx = client.transaction().await.unwrap();
    tx.batch_execute("SET app.trace = 'x'").await.unwrap();
    #[expect(clippy::mem_forget, reason = "the driver would roll back; this leaves the transaction open")]
    std::mem::forget(tx);
    drop(session);
    let mut session = borrow(&sessions).await;
    assert_eq!(session.process_id(), pid);
    assert_pristine(&session, "a raw transaction").await;
    // A statement that is still running when the session goes.
    let client = session.client().await.unwrap();
    let sleep = common::polls(client.batch_execute("SELECT pg_sleep(600)"), 1);
    assert!(sleep.await.is_none());
    db.until(&format!("EXISTS ({})", Database::BUSY)).await;
    drop(session);
    let next = borrow(&sessions).await;
    assert_eq!(next.process_id(), pid);
    assert_pristine(&next, "a raw statement").await;
}

#[tokio::test]
async fn discarded_statements_cost_the_connection() {
    let db = Database::new().await;
    let sessions = db.single();
    for sql in ["DISCARD ALL", "DEALLOCATE ALL"] {
        let session = borrow(&sessions).await;
        let pid = session.process_id();
        session.query_one("SELECT 1", &[]).await.unwrap();
        session.batch_execute(sql).await.unwrap();
        // The cache heals.
        session.query_one("SELECT 1", &[]).await.unwrap();
        drop(session);
        assert_ne!(borrow(&sessions).await.process_id(), pid, "{sql}");
    }
}

#[tokio::test]
async fn a_running_statement_is_cancelled_and_the_connection_kept() {
    let db = Database::new().await;
    let sessions = db.single();
    let session = borrow(&sessions).await;
    let pid = session.process_id();
    {
        let mut sleep = std::pin::pin!(session.execute("SELECT pg_sleep(600)", &[]));
        tokio::select! {
            _ = &mut sleep => panic!("slept"),
            () = db.until_sleeping(pid) => {}
        }
    }
    drop(session);
    let next = borrow(&sessions).await;
    assert_eq!(next.process_id(), pid);
    assert_pristine(&next, "a cancelled statement").await;
}

#[tokio::test]
async fn a_connection_that_does_not_come_to_rest_is_closed() {
    let db = Database::new().await;
    // A statement that ignores cancel requests for a while.
    db.run(
        "CREATE FUNCTION stubborn() RETURNS void LANGUAGE plpgsql AS $$
         DECLARE until timestamptz := clock_timestamp() + interval '5 s';
         BEGIN
           WHILE clock_timestamp() < until LOOP
             BEGIN PERFORM pg_sleep(1); EXCEPTION WHEN query_canceled THEN NULL; END;
           END LOOP;
         END $$",
    )
    .await;
    let config = db.config().max_size(1).cleanup_timeout(Duration::from_millis(200));
    let sessions = SessionManager::new(config).unwrap();
    let session = borrow(&sessions).await;
    let pid = session.process_id();
    {
        let mut call = std::pin::pin!(session.execute("SELECT stubborn()", &[]));
        tokio::select! {
            _ = &mut call => panic!("done"),
            () = db.until_sleeping(pid) => {}
        }
    }
    drop(session);
    let next = borrow(&sessions).await;
    assert_ne!(next.process_id(), pid);
    assert_eq!(sessions.status().size, 1);
}

#[tokio::test]
async fn clean_sessions_are_back_at_once() {
    let db = Database::new().await;
    db.run("CREATE TABLE t (a int)").await;
    let sessions = db.single();
    for _ in 0..3 {
        let mut session = borrow(&sessions).await;
        session.execute("INSERT INTO t VALUES (1)", &[]).await.unwrap();
        session.query("SELECT * FROM t", &[]).await.unwrap();
        session.transaction(async |tx| tx.execute("DELETE FROM t", &[]).await).await.unwrap();
        assert!(session.execute("SELECT 1/0", &[]).await.is_err());
        let failed: Result<(), Error> =
            session.transaction(async |tx| Err(tx.execute("no", &[]).await.unwrap_err())).await;
        failed.unwrap_err();
        drop(session);
        assert_eq!((sessions.status().idle, sessions.status().in_use), (1, 0));
    }
}

#[tokio::test]
async fn a_session_dropped_by_a_panic_is_closed() {
    let db = Database::new().await;
    let sessions = db.single();
    let pid = borrow(&sessions).await.process_id();
    let task = tokio::spawn({
        let sessions = sessions.clone();
        async move {
            let _session = sessions.acquire().await.unwrap();
            panic!("with a session in hand");
        }
    });
    assert!(task.await.unwrap_err().is_panic());
    assert_ne!(borrow(&sessions).await.process_id(), pid);
    assert_eq!(sessions.status().size, 1);
}

#[tokio::test]
async fn without_a_runtime_a_dirty_session_is_closed() {
    let db = Database::new().await;
    let sessions = db.single();
    // A runtime of its own makes the connection and is gone when the session returns.
    let session = std::thread::spawn({
        let sessions = sessions.clone();
        move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let session = sessions.acquire().await.unwrap();
                session.batch_execute("BEGIN; SELECT pg_advisory_lock(9)").await.unwrap();
                session
            })
        }
    })
    .join()
    .unwrap();
    let pid = session.process_id();
    std::thread::spawn(move || drop(session)).join().unwrap();
    let next = borrow(&sessions).await;
    assert_ne!(next.process_id(), pid);
    assert_pristine(&next, "a runtime's end").await;
    db.until_ended(pid).await;
}

#[tokio::test]
async fn a_statement_dropped_after_its_runtime_breaks_the_connection_and_nothing_else() {
    let db = Database::new().await;
    for begin in [false, true] {
        let sessions = db.single();
        let ended = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let session = Box::leak(Box::new(runtime.block_on(sessions.acquire()).unwrap()));
            let mut work: std::pin::Pin<Box<dyn Future<Output = ()>>> = Box::pin(async move {
                if begin {
                    let tx = session.begin().await.unwrap();
                    let _ = tx.execute("SELECT pg_sleep(600)", &[]).await;
                } else {
                    let _ = session.execute("SELECT pg_sleep(600)", &[]).await;
                }
            });
            runtime.block_on(std::future::poll_fn(|cx| {
                assert!(work.as_mut().poll(cx).is_pending());
                std::task::Poll::Ready(())
            }));
            drop(runtime);
            drop(work);
        });
        within(tokio::task::spawn_blocking(move || ended.join().unwrap())).await.unwrap();
    }
    db.until_quiet().await;
}

#[tokio::test]
async fn the_reset_policy_is_obeyed() {
    let db = Database::new().await;
    // Hidden in a function, where no text tells.
    db.run("CREATE FUNCTION hide() RETURNS text LANGUAGE sql AS $$ SELECT set_config('app.trace', 'x', false) $$").await;
    let left = "SELECT coalesce(current_setting('app.trace', true), '')";
    for (policy, expected) in [(Reset::Always, ""), (Reset::Never, "x")] {
        let sessions = SessionManager::new(db.config().max_size(1).reset(policy)).unwrap();
        borrow(&sessions).await.execute("SELECT hide()", &[]).await.unwrap();
        let next = borrow(&sessions).await;
        assert_eq!(next.query_one(left, &[]).await.unwrap().get::<_, &str>(0), expected, "{policy:?}");
    }
    // Even then no transaction is handed on.
    let sessions = SessionManager::new(db.config().max_size(1).reset(Reset::Never)).unwrap();
    borrow(&sessions).await.batch_execute("BEGIN").await.unwrap();
    let mut next = borrow(&sessions).await;
    next.transaction(async |tx| tx.execute("SELECT 1", &[]).await).await.unwrap();
}

#[tokio::test]
async fn the_statement_cache_outlives_a_reset() {
    let db = Database::new().await;
    let sessions = db.single();
    let session = borrow(&sessions).await;
    session.query_one("SELECT 1", &[]).await.unwrap();
    session.batch_execute("SET app.trace = 'x'").await.unwrap();
    drop(session);
    let session = borrow(&sessions).await;
    assert_eq!(session.cached_statements(), 1);
    session.query_one("SELECT 1", &[]).await.unwrap();
    let prepared = "SELECT count(*) FROM pg_prepared_statements WHERE statement = 'SELECT 1'";
    assert_eq!(session.query_one(prepared, &[]).await.unwrap().get::<_, i64>(0), 1);
}
