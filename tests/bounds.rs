//! Sizes and bounds.
#![cfg(feature = "testing")]
#![allow(clippy::type_complexity, reason = "a list of futures of many kinds")]
#![allow(clippy::mem_forget, reason = "what is leaked is what is tested")]

mod common;

use std::future::Future;
use std::time::{Duration, Instant};

use common::{Database, within};
use pg_session::{Error, SessionManager};

/// No proxy: the ReadyForQuery behind COMMIT is in the next piece of the server's output when its buffer of 8 KiB ends
/// between the two.
#[tokio::test]
async fn a_transaction_can_begin_at_once_after_a_batch_whatever_the_size_of_its_answer() {
    within(async {
        let db = Database::new().await;
        let sessions = db.single();
        let mut session = sessions.acquire().await.unwrap();
        let mut refused = Vec::new();
        for size in 7900..8192 {
            // New to the connection each time, so that its Parse opens the transaction.
            let sql = format!("SELECT repeat('x', $1), {size}");
            session.batch().push(sql, (size,)).run().await.unwrap();
            match session.begin().await {
                Ok(tx) => tx.rollback().await,
                Err(Error::InTransaction) => refused.push(size),
                Err(e) => panic!("{e:?}"),
            }
            session.query("SELECT 1", &[]).await.unwrap();
        }
        assert!(refused.is_empty(), "refused after answers of {refused:?} bytes");
    })
    .await;
}

/// Huge parameters and results in one batch.
#[tokio::test]
async fn huge_parameters_and_results_in_one_batch_do_not_stall() {
    within(async {
        let db = Database::new().await;
        let sessions = db.single();
        let mut session = sessions.acquire().await.unwrap();
        let big = "y".repeat(12_000_000);
        let started = Instant::now();
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
        println!("{:?}", started.elapsed());
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

/// A statement that is leaked does not stop a statement that is given up from being cancelled: with the session gone.
#[tokio::test]
async fn a_session_is_back_within_its_bound_whatever_was_leaked() {
    within(async {
        let db = Database::new().await;
        let sessions =
            SessionManager::new(db.config().max_size(1).cleanup_timeout(Duration::from_millis(500))).unwrap();
        let session = sessions.acquire().await.unwrap();
        let mut futures: Vec<std::pin::Pin<Box<dyn Future<Output = Result<Vec<_>, Error>>>>> = Vec::new();
        for _ in 0..5 {
            futures.push(Box::pin(session.query("SELECT pg_sleep(20)", &[])));
        }
        for future in &mut futures {
            std::future::poll_fn(|cx| {
                let _ = future.as_mut().poll(cx);
                std::task::Poll::Ready(())
            })
            .await;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        for future in &mut futures {
            std::future::poll_fn(|cx| {
                let _ = future.as_mut().poll(cx);
                std::task::Poll::Ready(())
            })
            .await;
        }
        std::mem::forget(futures);
        drop(session);
        let started = Instant::now();
        let session = sessions.acquire().await.unwrap();
        session.query("SELECT 1", &[]).await.unwrap();
        println!("{:?}", started.elapsed());
        assert!(started.elapsed() < Duration::from_millis(1500));
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
               FOR i IN 1..100 LOOP BEGIN PERFORM pg_sleep(10); EXCEPTION WHEN query_canceled THEN NULL; END; END LOOP;
             END $$",
        )
        .await;
        let sessions =
            SessionManager::new(db.config().max_size(1).cleanup_timeout(Duration::from_millis(500))).unwrap();
        let session = sessions.acquire().await.unwrap();
        let gone = tokio::time::timeout(Duration::from_millis(100), session.query("SELECT stubborn()", &[])).await;
        assert!(gone.is_err());
        let started = Instant::now();
        let next = session.query("SELECT 1", &[]).await;
        println!("{:?} {:?}", started.elapsed(), next.map(drop));
        assert!(started.elapsed() < Duration::from_millis(900));
        drop(session);
        let started = Instant::now();
        let session = sessions.acquire().await.unwrap();
        session.query("SELECT 1", &[]).await.unwrap();
        println!("{:?}", started.elapsed());
        assert!(started.elapsed() < Duration::from_millis(2500));
    })
    .await;
}

/// A COPY that is refused at its start leaves the session in step.
#[tokio::test]
async fn a_session_goes_on_after_a_copy_that_is_refused_at_its_start() {
    within(async {
        let db = Database::new().await;
        db.run("CREATE TABLE t (id int PRIMARY KEY); CREATE VIEW v AS SELECT 1 AS id").await;
        let sessions = db.single();
        let mut session = sessions.acquire().await.unwrap();
        session.prepare("INSERT INTO t VALUES (1)").await.unwrap();
        for n in 0..200 {
            let e = session.copy_in("COPY t (none) FROM STDIN").await.map(drop).unwrap_err();
            assert!(e.code().is_some(), "{e:?}");
            match n % 4 {
                0 => assert_eq!(session.query_one("SELECT 3", &[]).await.unwrap().get::<_, i32>(0), 3),
                1 => {
                    let tx = session.begin().await.unwrap();
                    drop(common::polls(tx.execute("INSERT INTO t VALUES (1)", &[]), 1).await);
                    drop(tx);
                }
                2 => {
                    let e = session.query("SELECT 1/0", &[]).await.unwrap_err();
                    assert_eq!(e.code().unwrap().code(), "22012");
                }
                _ => {
                    let (a, b) = tokio::join!(
                        session.query_one("SELECT 3", &[]),
                        common::polls(session.query("SELECT pg_sleep(0.1)", &[]), 1)
                    );
                    assert_eq!(a.unwrap().get::<_, i32>(0), 3);
                    drop(b);
                }
            }
        }
        drop(session);
        common::until_returned(&sessions).await;
        assert_eq!(db.number("SELECT count(*) FROM t").await, 0);
    })
    .await;
}
