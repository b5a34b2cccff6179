//! Sizes and bounds.
#![cfg(feature = "testing")]

mod common;

use std::time::{Duration, Instant};

use common::table::Table;
use common::{Database, leaked, polls, until, within};
use futures_util::future::join_all;
use pg_session::{Error, Session, SessionManager};

/// No proxy: the ReadyForQuery behind COMMIT is in the next piece of the server's output when its buffer of 8 KiB ends
/// between the two.
#[tokio::test]
async fn a_transaction_can_begin_at_once_after_a_batch_whatever_the_size_of_its_answer() {
    within(async {
        let table = Table::new().await;
        let mut session = table.session().await;
        for size in 7900..8192 {
            // New to the connection each time, so that its Parse opens the transaction.
            let sql = format!("SELECT repeat('x', $1), {size}");
            session.batch().push(sql, (size,)).run().await.unwrap();
            let begun = session.begin().await;
            begun.unwrap_or_else(|e| panic!("after an answer of {size} bytes: {e:?}")).rollback().await;
            session.query("SELECT 1", &[]).await.unwrap();
        }
    })
    .await;
}

/// Huge parameters and results in one batch.
#[tokio::test]
async fn huge_parameters_and_results_in_one_batch_do_not_stall() {
    within(async {
        let table = Table::new().await;
        let mut session = table.session().await;
        let big = "y".repeat(12_000_000);
        let results = session
            .batch()
            .push("SELECT $1::text", (big.clone(),))
            .push("SELECT $1::text || 'a'", (big.clone(),))
            .push("SELECT length($1::text)", (big.clone(),))
            .run()
            .await
            .unwrap();
        assert_eq!(results[1].rows()[0].get::<_, &str>(0).len(), big.len() + 1);
        assert_eq!(results[2].rows()[0].get::<_, i32>(0), 12_000_000);
        let e = session
            .batch()
            .push("SELECT $1::text", (big.clone(),))
            .push("SELECT 1 / ($1::int - 5)", (5,))
            .push("SELECT length($1::text)", (big.clone(),))
            .run()
            .await
            .unwrap_err();
        let Error::Batch(e) = e else { panic!("{e:?}") };
        assert_eq!(e.position(), 2);
        let many =
            session.execute_many("SELECT length($1::text)", (0..12).map(|_| (&big[..3_000_000],))).await;
        assert_eq!(many.unwrap(), 12);
    })
    .await;
}

/// One connection, and cleaning up that takes no longer than this; what follows must not take much longer.
const CLEANUP: Duration = Duration::from_millis(500);

/// Between `CLEANUP`, with room for a busy machine, and what it would take without.
const SOON: Duration = Duration::from_secs(4);

fn bounded(db: &Database) -> SessionManager {
    SessionManager::new(db.config().max_size(1).cleanup_timeout(CLEANUP)).unwrap()
}

/// Acquires a session that is of use, soon.
async fn assert_served_soon(sessions: &SessionManager) -> Session {
    let started = Instant::now();
    let session = sessions.acquire().await.unwrap();
    session.query("SELECT 1", &[]).await.unwrap();
    assert!(started.elapsed() < SOON, "{:?}", started.elapsed());
    session
}

/// A statement that is leaked does not stop a statement that is given up from being cancelled: with the session gone.
#[tokio::test]
async fn a_session_is_back_within_its_bound_whatever_was_leaked() {
    const SLEEP: &str = "SELECT pg_sleep(600)";
    within(async {
        let db = Database::new().await;
        let sessions = bounded(&db);
        for run in [false, true] {
            let session = sessions.acquire().await.unwrap();
            if run {
                session.prepare(SLEEP).await.unwrap();
            }
            let mut queries = Box::pin(join_all((0..5).map(|_| session.query(SLEEP, &[]))));
            assert!(polls(&mut queries, 1).await.is_none());
            if run {
                db.until_sleeping(session.process_id()).await;
            } else {
                // They are not sent before they are polled again.
                until(|| session.cached_statements() > 0).await;
            }
            assert!(leaked(queries, 1).await.is_none());
            drop(session);
            drop(assert_served_soon(&sessions).await);
        }
    })
    .await;
}

/// cleanup_timeout: "How long cancelling, draining and rolling back may take before the connection is closed instead".
/// A deadline is not kept waiting by anything.
#[tokio::test]
async fn statements_that_will_not_be_cancelled_cost_no_more_than_the_cleanup_timeout() {
    within(async {
        let db = Database::new().await;
        db.run(
            "CREATE FUNCTION stubborn() RETURNS void LANGUAGE plpgsql AS $$ BEGIN
                 FOR i IN 1..100 LOOP
                     BEGIN PERFORM pg_sleep(10); EXCEPTION WHEN query_canceled THEN NULL; END;
                 END LOOP;
             END $$",
        )
        .await;
        let sessions = bounded(&db);
        let session = sessions.acquire().await.unwrap();
        tokio::select! {
            told = session.query("SELECT stubborn()", &[]) => panic!("{told:?}"),
            () = db.until_sleeping(session.process_id()) => {}
        }
        let started = Instant::now();
        let next = session.query("SELECT 1", &[]).await;
        assert!(started.elapsed() < SOON, "{:?}: {next:?}", started.elapsed());
        drop(session);
        assert_served_soon(&sessions).await;
    })
    .await;
}

/// A COPY that is refused at its start leaves the session in step.
#[tokio::test]
async fn a_session_goes_on_after_a_copy_that_is_refused_at_its_start() {
    within(async {
        let table = Table::new().await;
        let mut session = table.session().await;
        session.prepare("INSERT INTO t VALUES (1)").await.unwrap();
        for n in 0..200 {
            let e = session.copy_in("COPY t (none) FROM STDIN").await.map(drop).unwrap_err();
            assert!(e.code().is_some(), "{e:?}");
            match n % 4 {
                0 => assert_eq!(session.query_one("SELECT 3", &[]).await.unwrap().get::<_, i32>(0), 3),
                1 => {
                    let tx = session.begin().await.unwrap();
                    drop(polls(tx.execute("INSERT INTO t VALUES (1)", &[]), 1).await);
                    drop(tx);
                }
                2 => {
                    let e = session.query("SELECT 1/0", &[]).await.unwrap_err();
                    assert_eq!(e.code().unwrap().code(), "22012");
                }
                _ => {
                    let (three, _) = tokio::join!(
                        session.query_one("SELECT 3", &[]),
                        polls(session.query("SELECT pg_sleep(0.1)", &[]), 1)
                    );
                    assert_eq!(three.unwrap().get::<_, i32>(0), 3);
                }
            }
        }
        assert_eq!(table.rows_after(session).await, 0);
    })
    .await;
}
