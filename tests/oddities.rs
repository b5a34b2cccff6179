//! Odd input in odd places, each followed by ordinary work.
#![cfg(feature = "testing")]

mod common;

use std::time::{Duration, Instant};

use common::table::Table;
use common::{polls, within};
use futures_util::SinkExt;
use pg_session::{Error, Session, TransactionOptions};

/// Ordinary work.
async fn assert_fine(session: &mut Session) {
    let tx = session.begin().await.unwrap();
    assert_eq!(tx.query_one("SELECT 7", &[]).await.unwrap().get::<_, i32>(0), 7);
    tx.commit().await.unwrap();
    let results = session.batch().push("SELECT 1", ()).push("SELECT 2", ()).run().await.unwrap();
    assert_eq!(results[1].rows()[0].get::<_, i32>(0), 2);
}

fn position(told: Result<impl Sized, Error>) -> u64 {
    match told.map(drop) {
        Err(Error::Batch(e)) => e.position(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn odd_input_is_refused_and_the_session_goes_on() {
    within(async {
        let table = Table::new().await;
        table.db.run("CREATE TABLE none ()").await;
        let mut session = table.session().await;

        // NUL, which the protocol has no place for.
        assert!(session.execute("SELECT '\0'", &[]).await.is_err());
        assert_eq!(position(session.batch().push("SELECT '\0'", ()).run().await), 1);
        assert!(session.execute_many("SELECT '\0'", [(), ()]).await.is_err());
        assert!(session.copy_in("COPY t FROM STDIN --\0").await.is_err());
        assert!(session.copy_rows_in("t\0", &["id"]).send([(1,)]).await.is_err());
        assert_fine(&mut session).await;

        // Settings.
        for (value, fine) in [("a\0b", false), ("", true)] {
            let options = TransactionOptions::new().local_setting("app.x", value.to_owned());
            let told = session.transaction_with(options, async |tx| tx.execute("SELECT 1", &[]).await).await;
            assert_eq!(told.is_ok(), fine, "{told:?}");
        }
        let options = TransactionOptions::new().local_setting("work_mem", "nonsense");
        let told = session
            .transaction_with(options.clone(), async |tx| {
                let _ = tx.execute("SELECT 1", &[]).await;
                let _ = tx.execute("INSERT INTO t VALUES (99)", &[]).await;
                Ok::<_, Error>(())
            })
            .await;
        assert!(matches!(told, Err(Error::Aborted(_))), "{told:?}");
        let told = session.batch_with(options).push("INSERT INTO t VALUES (98)", ()).run().await;
        assert!(matches!(told, Err(Error::Database(_))), "{told:?}");
        assert_eq!(table.rows().await, 0);
        assert_fine(&mut session).await;

        // No statement, and two.
        assert_eq!(session.execute("", &[]).await.unwrap(), 0);
        let results = session.batch().push("", ()).push("SELECT 1", ()).push(" ; ", ()).run().await;
        assert_eq!(results.unwrap().len(), 3);
        assert_eq!(session.execute_many("", [(), (), ()]).await.unwrap(), 0);
        assert!(session.execute("SELECT 1; SELECT 2", &[]).await.is_err());
        let two = session.batch().push("SELECT 1", ()).push("SELECT 1; SELECT 2", ()).run().await;
        assert_eq!(position(two), 2);
        assert_fine(&mut session).await;

        // Ends of transactions where none may be: the next borrower's session is as good as new.
        for sql in ["COMMIT", "ROLLBACK AND CHAIN"] {
            let told = session.execute_many(sql, [(), ()]).await;
            assert!(matches!(told, Err(Error::TransactionEnded)), "{sql}: {told:?}");
            drop(session);
            session = table.session().await;
        }
        let mut batch = session.batch();
        let told = batch.push("INSERT INTO t VALUES (1)", ()).push("COMMIT AND CHAIN", ()).run().await;
        assert!(matches!(told, Err(Error::TransactionEnded)), "{told:?}");
        drop(batch);
        drop(session);
        let mut session = table.session().await;
        assert_fine(&mut session).await;

        // Rows where none are expected, parameters where none are wanted, no columns.
        let selected = session.execute_many("SELECT generate_series(1, $1)", (1..100).map(|n| (n,))).await;
        assert_eq!(selected.unwrap(), (1..100).sum::<u64>());
        assert_eq!(position(session.batch().push("SELECT 1", (1,)).run().await), 1);
        assert_eq!(session.copy_rows_in("none", &[]).send([(), ()]).await.unwrap(), 2);
        assert_fine(&mut session).await;
    })
    .await;
}

/// InTransaction: "The session is inside a transaction that raw SQL began". Here nobody did, and there is no proxy.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_can_begin_at_once_after_a_batch_with_answers_of_any_size() {
    let table = Table::new().await;
    let mut session = table.session().await;
    let mut random = fastrand::Rng::with_seed(13);
    for round in 0..1500 {
        // From 1 to 5 buffers of the server's; new to the connection each time.
        let size = random.i32(8_000..41_000);
        let sql = format!("SELECT repeat('x', $1), {round}");
        within(session.batch().push(sql, (size,)).run()).await.unwrap();
        let begun = within(session.begin()).await;
        begun.unwrap_or_else(|e| panic!("after an answer of {size} bytes: {e:?}")).rollback().await;
        within(session.query("SELECT 1", &[])).await.unwrap();
    }
}

/// A session that had a COPY refused, with statements prepared, so that they are sent as soon as they are polled.
async fn after_a_refused_copy(table: &Table, statements: &[&str]) -> Session {
    const REFUSED: &str = "COPY t (none) FROM STDIN";
    let session = table.session().await;
    for sql in statements.iter().chain([&REFUSED]) {
        session.prepare(sql).await.unwrap();
    }
    let e = session.copy_in(REFUSED).await.map(drop).unwrap_err();
    assert_eq!(e.code().unwrap().code(), "42703");
    session
}

/// Connection, "Cancel safety": "Dropped later, its statement is cancelled on the server in the background, within
/// cleanup_timeout, and the next statement on this connection waits for that".
#[tokio::test]
async fn a_statement_that_is_dropped_after_a_copy_was_refused_is_cancelled() {
    const SLEEP: &str = "SELECT pg_sleep(600)";
    within(async {
        let table = Table::new().await;
        let session = after_a_refused_copy(&table, &[SLEEP]).await;
        tokio::select! {
            told = session.query(SLEEP, &[]) => panic!("{told:?}"),
            () = table.db.until_sleeping(session.process_id()) => {}
        }
        let started = Instant::now();
        let next = session.query_one("SELECT 1", &[]).await;
        assert!(next.is_ok(), "{next:?}");
        assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    })
    .await;
}

/// Connection, "Cancel safety": "A cancel request stops whatever the server's session runs, so none is sent while
/// another statement of this connection is still waited for."
#[tokio::test]
async fn a_statement_that_is_waited_for_is_not_cancelled_for_another_after_a_copy_was_refused() {
    // Long enough for a cancel request that should not be to arrive.
    const WAITED: &str = "SELECT 1 FROM pg_sleep(0.5)";
    within(async {
        let table = Table::new().await;
        let session = after_a_refused_copy(&table, &[WAITED, "SELECT 2"]).await;
        let (waited, _) =
            tokio::join!(session.query_one(WAITED, &[]), polls(session.query("SELECT 2", &[]), 1));
        assert!(waited.is_ok(), "{waited:?}");
    })
    .await;
}

/// A sink may be closed as often as one likes.
#[tokio::test]
async fn a_closed_copy_is_told_as_before_when_it_is_closed_again() {
    within(async {
        let table = Table::new().await;
        let session = table.session().await;
        let mut copy = session.copy_in("COPY t FROM STDIN").await.unwrap();
        copy.send("1\n".into()).await.unwrap();
        SinkExt::close(&mut copy).await.unwrap();
        SinkExt::close(&mut copy).await.unwrap();
        drop(copy);
        assert_eq!(session.query_one("SELECT 7", &[]).await.unwrap().get::<_, i32>(0), 7);
        assert_eq!(table.rows().await, 1);
    })
    .await;
}
