//! Odd input in odd places, each followed by ordinary work.
#![cfg(feature = "testing")]

mod common;

use std::time::{Duration, Instant};

use common::{Database, within};
use pg_session::{Error, Session, TransactionOptions};

async fn fine(session: &mut Session) {
    let tx = session.begin().await.unwrap();
    assert_eq!(tx.query_one("SELECT 7", &[]).await.unwrap().get::<_, i32>(0), 7);
    tx.commit().await.unwrap();
    let results = session.batch().push("SELECT 1", ()).push("SELECT 2", ()).run().await.unwrap();
    assert_eq!(results[1].rows()[0].get::<_, i32>(0), 2);
}

#[tokio::test]
async fn odd_input_is_refused_and_the_session_goes_on() {
    within(async {
        let db = Database::new().await;
        db.run("CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE none ()").await;
        let sessions = db.single();
        let mut session = sessions.acquire().await.unwrap();
        println!("nul {:?}", session.execute("SELECT '\0'", &[]).await);
        println!("nul batch {:?}", session.batch().push("SELECT '\0'", ()).run().await.map(drop));
        println!("nul many {:?}", session.execute_many("SELECT '\0'", [(), ()]).await);
        println!("nul copy {:?}", session.copy_in("COPY t FROM STDIN --\0").await.map(drop));
        println!("nul table {:?}", session.copy_rows_in("t\0", &["id"]).send([(1,)]).await);
        fine(&mut session).await;
        for value in ["a\0b", ""] {
            let options = TransactionOptions::new().local_setting("app.x", value.to_owned());
            let told = session.transaction_with(options, async |tx| tx.execute("SELECT 1", &[]).await).await;
            println!("setting {told:?}");
        }
        let options = TransactionOptions::new().local_setting("work_mem", "nonsense");
        let told = session
            .transaction_with(options.clone(), async |tx| {
                let _ = tx.execute("SELECT 1", &[]).await;
                let _ = tx.execute("INSERT INTO t VALUES (99)", &[]).await;
                Ok::<_, Error>(())
            })
            .await;
        println!("setting {told:?}");
        println!(
            "setting {:?}",
            session.batch_with(options.clone()).push("INSERT INTO t VALUES (98)", ()).run().await.map(drop)
        );
        assert_eq!(db.number("SELECT count(*) FROM t").await, 0);
        fine(&mut session).await;
        println!("empty {:?}", session.execute("", &[]).await);
        println!(
            "empty batch {:?}",
            session.batch().push("", ()).push("SELECT 1", ()).push(" ; ", ()).run().await.map(|r| r.len())
        );
        println!("empty many {:?}", session.execute_many("", [(), (), ()]).await);
        println!("two {:?}", session.execute("SELECT 1; SELECT 2", &[]).await);
        println!(
            "two batch {:?}",
            session.batch().push("SELECT 1", ()).push("SELECT 1; SELECT 2", ()).run().await.map(drop)
        );
        fine(&mut session).await;
        println!("commit many {:?}", session.execute_many("COMMIT", [(), ()]).await);
        drop(session);
        let mut session = sessions.acquire().await.unwrap();
        println!("chain many {:?}", session.execute_many("ROLLBACK AND CHAIN", [(), ()]).await);
        drop(session);
        let mut session = sessions.acquire().await.unwrap();
        println!(
            "commit batch {:?}",
            session
                .batch()
                .push("INSERT INTO t VALUES (1)", ())
                .push("COMMIT AND CHAIN", ())
                .run()
                .await
                .map(drop)
        );
        drop(session);
        let mut session = sessions.acquire().await.unwrap();
        fine(&mut session).await;
        println!(
            "many select {:?}",
            session.execute_many("SELECT generate_series(1, $1)", (1..100).map(|n| (n,))).await
        );
        println!("params {:?}", session.batch().push("SELECT 1", (1,)).run().await.map(drop));
        let stored = session.copy_rows_in("none", &[]).send([(), ()]).await;
        println!("no columns {stored:?}");
        fine(&mut session).await;
    })
    .await;
}

/// No proxy. InTransaction: "The session is inside a transaction that raw SQL began".
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_can_begin_at_once_after_a_batch_with_answers_of_any_size() {
    let db = Database::new().await;
    let sessions = db.single();
    let mut session = sessions.acquire().await.unwrap();
    let started = Instant::now();
    let (mut refused, mut rounds) = (0, 0u64);
    while started.elapsed() < Duration::from_secs(2) {
        rounds += 1;
        // From 1 to 5 buffers of the server's; new to the connection each time.
        let size = fastrand::i32(8_000..41_000);
        session.batch().push(format!("SELECT repeat('x', $1), {rounds}"), (size,)).run().await.unwrap();
        match session.begin().await {
            Ok(tx) => tx.rollback().await,
            Err(Error::InTransaction) => refused += 1,
            Err(e) => panic!("{e:?}"),
        }
        session.query("SELECT 1", &[]).await.unwrap();
    }
    println!("{refused} of {rounds} refused");
    assert_eq!(refused, 0);
}

/// Connection, "Cancel safety": "Dropped later, its statement is cancelled on the server in the background, within
/// cleanup_timeout, and the next statement on this connection waits for that".
#[tokio::test]
async fn a_statement_that_is_dropped_after_a_copy_was_refused_is_cancelled() {
    within(async {
        let db = Database::new().await;
        db.run("CREATE TABLE t (id int PRIMARY KEY)").await;
        let sessions = db.single();
        let session = sessions.acquire().await.unwrap();
        session.prepare("SELECT pg_sleep(30)").await.unwrap();
        session.prepare("COPY t (none) FROM STDIN").await.unwrap();
        let e = session.copy_in("COPY t (none) FROM STDIN").await.map(drop).unwrap_err();
        assert_eq!(e.code().unwrap().code(), "42703");
        let late =
            tokio::time::timeout(Duration::from_millis(200), session.query("SELECT pg_sleep(30)", &[])).await;
        assert!(late.is_err());
        let started = Instant::now();
        let next = session.query_one("SELECT 1", &[]).await;
        println!("{:?} {:?}", started.elapsed(), next.as_ref().map(|_| ()));
        assert!(next.is_ok(), "{next:?}");
    })
    .await;
}

/// Connection, "Cancel safety": "A cancel request stops whatever the server's session runs, so none is sent while another
/// statement of this connection is still waited for."
#[tokio::test]
async fn a_statement_that_is_waited_for_is_not_cancelled_for_another_after_a_copy_was_refused() {
    within(async {
        let db = Database::new().await;
        db.run("CREATE TABLE t (id int PRIMARY KEY)").await;
        let sessions = db.single();
        let session = sessions.acquire().await.unwrap();
        session.prepare("SELECT 1 FROM pg_sleep(0.5)").await.unwrap();
        session.prepare("SELECT 2").await.unwrap();
        session.prepare("COPY t (none) FROM STDIN").await.unwrap();
        let e = session.copy_in("COPY t (none) FROM STDIN").await.map(drop).unwrap_err();
        assert_eq!(e.code().unwrap().code(), "42703");
        let (waited, _) = tokio::join!(
            session.query_one("SELECT 1 FROM pg_sleep(0.5)", &[]),
            common::polls(session.query("SELECT 2", &[]), 1)
        );
        assert!(waited.is_ok(), "{waited:?}");
    })
    .await;
}

/// The same inside a savepoint, as the refusal of a COPY is usually met: only the first statement behind it is hit.
#[tokio::test]
async fn a_closed_copy_is_told_as_before_when_it_is_closed_again() {
    use futures_util::SinkExt;
    within(async {
        let db = Database::new().await;
        db.run("CREATE TABLE t (id int PRIMARY KEY)").await;
        let sessions = db.single();
        let session = sessions.acquire().await.unwrap();
        let mut copy = session.copy_in("COPY t FROM STDIN").await.unwrap();
        copy.send("1\n".into()).await.unwrap();
        SinkExt::close(&mut copy).await.unwrap();
        SinkExt::close(&mut copy).await.unwrap();
        drop(copy);
        assert_eq!(session.query_one("SELECT 7", &[]).await.unwrap().get::<_, i32>(0), 7);
    })
    .await;
}
