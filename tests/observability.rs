//! The names of spans, fields and events are API; and nothing secret is in any of them.
#![cfg(feature = "testing")]

mod common;

use std::time::Duration;

use common::Database;
use common::log::Log;
use pg_session::{Error, RetryPolicy, SessionManager, TransactionOptions};

#[tokio::test]
async fn transactions_and_acquires_have_spans_with_stable_names() {
    let (log, _guard) = Log::keep();
    let db = Database::new().await;
    let config = db.config().max_size(1).acquire_timeout(Duration::from_millis(20));
    let sessions = SessionManager::new(config).unwrap();
    drop(common::opened(&sessions).await);
    let secret = "hunter2";
    let options = TransactionOptions::serializable()
        .name("pay")
        .local_setting("app.token", secret)
        .retry(RetryPolicy::default().base_delay(Duration::ZERO));
    sessions
        .transaction_with(options.clone(), async |tx| {
            tx.query_one("SELECT $1::text", &[&secret]).await?;
            if tx.attempt() == 1 {
                tx.batch_execute("DO $$ BEGIN RAISE SQLSTATE '40001' USING MESSAGE = 'hunter2'; END $$")
                    .await?;
            }
            Ok::<_, Error>(())
        })
        .await
        .unwrap();
    assert!(log.has(&["span pg_session.acquire"]));
    assert!(log.has(&["span pg_session.transaction", "name=\"pay\"", "isolation_level=\"SERIALIZABLE\""]));
    assert!(log.has(&["record pg_session.transaction", "attempts=2"]), "{:#?}", log.lines());
    assert!(log.has(&["record pg_session.transaction", "outcome=\"committed\""]));
    assert!(log.has(&["event pg_session DEBUG", "attempt=1", "sqlstate=\"40001\"", "delay_ms=0"]));
    let failed: Result<(), Error> = sessions
        .transaction_with(options, async |tx| Err(tx.execute("SELECT 1/0", &[]).await.unwrap_err()))
        .await;
    failed.unwrap_err();
    assert!(log.has(&["record pg_session.transaction", "outcome=\"rolled_back\""]));
    let session = sessions.acquire().await.unwrap();
    assert!(log.has(&["span pg_session.acquire"]));
    sessions.acquire().await.unwrap_err();
    assert!(log.has(&["event pg_session WARN", "no session could be lent", "max_size 1"]));
    session.batch_execute("SET app.token = 'hunter2'").await.unwrap();
    drop(session);
    common::until_returned(&sessions).await;
    assert!(log.has(&["event pg_session DEBUG", "being repaired"]));
    for line in log.lines() {
        assert!(!line.contains(secret), "{line}");
    }
}

#[tokio::test]
async fn debug_output_shows_no_secret() {
    // Without one of its own, this thread could register the call sites as uninteresting to all.
    let _log = Log::keep();
    let db = Database::new().await;
    let config = db.config().password("hunter2");
    let sessions = SessionManager::new(config).unwrap();
    let mut session = sessions.acquire().await.unwrap();
    session.query_one("SELECT $1::text, 'hunter2'", &[&"hunter2"]).await.unwrap();
    for text in [format!("{sessions:?}"), format!("{session:?}"), format!("{:?}", sessions.config())] {
        assert!(!text.contains("hunter2"), "{text}");
    }
    let tx = session.begin().await.unwrap();
    assert!(!format!("{tx:?}").contains("hunter2"));
}

#[cfg(feature = "problem")]
#[tokio::test]
async fn what_a_client_is_not_told_is_in_the_log() {
    use pg_session::{Problem, Problems};

    let (log, _guard) = Log::keep();
    let db = Database::new().await;
    db.run("CREATE TABLE t (a int PRIMARY KEY)").await;
    let session = db.sessions().acquire().await.unwrap();
    session.execute("INSERT INTO t VALUES (1)", &[]).await.unwrap();
    let conflict = Problem::from(session.execute("INSERT INTO t VALUES (1)", &[]).await.unwrap_err());
    conflict.log();
    assert!(log.has(&["event pg_session DEBUG", "status=409", "code=\"unique_violation\"", "t_pkey"]));
    let broken = session.execute("SELECT 1 FROM nowhere", &[]).await.unwrap_err();
    Problems::new().problem(broken).log();
    assert!(log.has(&["event pg_session ERROR", "status=500", "42P01", "routine=\"parserOpenTable\""]));
    let busy = db.sessions();
    busy.close().await;
    Problem::from(busy.acquire().await.unwrap_err()).log();
    assert!(log.has(&["event pg_session WARN", "status=503", "the session manager is closed"]));
    // A problem of the service's own has no cause.
    let before = log.lines().len();
    Problem::new(404, "not_here").log();
    assert_eq!(log.lines().len(), before);
}
