//! The statement cache: bounded, closed on the server, and healed when the schema changes under it.
#![cfg(feature = "testing")]

mod common;

use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

use common::{Database, within};
use pg_session::{Error, Executor, SessionManager};

const PREPARED: &str = "SELECT count(*) FROM pg_prepared_statements WHERE NOT from_sql";

#[tokio::test]
async fn a_text_is_prepared_once() {
    let db = Database::new().await;
    let session = db.sessions().acquire().await.unwrap();
    for n in 0..5i32 {
        let row = session.query_one("SELECT $1::int + 1", &[&n]).await.unwrap();
        assert_eq!(row.get::<_, i32>(0), n + 1);
    }
    assert_eq!(session.cached_statements(), 1);
    let sql = "SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE 'SELECT $1%'";
    assert_eq!(session.query_one(sql, &[]).await.unwrap().get::<_, i64>(0), 1);
}

#[tokio::test]
async fn the_least_recently_used_is_closed_on_the_server() {
    let db = Database::new().await;
    let sessions = SessionManager::new(db.config().statement_cache_capacity(5)).unwrap();
    let session = sessions.acquire().await.unwrap();
    session.query_one(PREPARED, &[]).await.unwrap();
    for n in 0..50 {
        session.query_one(PREPARED, &[]).await.unwrap(); // used all the time, so it stays
        session.query(&format!("SELECT {n}"), &[]).await.unwrap();
    }
    assert_eq!(session.cached_statements(), 5);
    assert_eq!(session.query_one(PREPARED, &[]).await.unwrap().get::<_, i64>(0), 5);
}

#[tokio::test]
async fn a_failed_statement_is_not_kept() {
    let db = Database::new().await;
    let session = db.sessions().acquire().await.unwrap();
    for _ in 0..3 {
        let error = session.query("SELECT * FROM not_there_yet", &[]).await.unwrap_err();
        assert_eq!(error.code().unwrap().code(), "42P01");
    }
    assert_eq!(session.cached_statements(), 0);
    db.run("CREATE TABLE not_there_yet (a int)").await;
    session.query("SELECT * FROM not_there_yet", &[]).await.unwrap();
}

#[tokio::test]
async fn a_change_of_schema_is_healed_outside_a_transaction() {
    let db = Database::new().await;
    db.run("CREATE TABLE t (a int); INSERT INTO t VALUES (1)").await;
    let session = db.sessions().acquire().await.unwrap();
    assert_eq!(session.query_one("SELECT * FROM t", &[]).await.unwrap().len(), 1);
    db.run("ALTER TABLE t ADD COLUMN b int").await;
    assert_eq!(session.query_one("SELECT * FROM t", &[]).await.unwrap().len(), 2);
    db.run("ALTER TABLE t ADD COLUMN c int").await;
    let mut rows = session.query_stream("SELECT * FROM t", &[]).await.unwrap();
    // The stream had begun before the server could say so: the error comes out of it, and the next one heals.
    let first = rows.next().await.unwrap();
    drop(rows);
    if let Err(e) = first {
        assert_eq!(e.code().unwrap().code(), "0A000");
    }
    assert_eq!(session.query_one("SELECT * FROM t", &[]).await.unwrap().len(), 3);
}

#[tokio::test]
async fn a_change_of_schema_inside_a_transaction_is_healed_by_running_it_again() {
    let db = Database::new().await;
    db.run("CREATE TABLE t (a int); INSERT INTO t VALUES (1)").await;
    let mut session = db.sessions().acquire().await.unwrap();
    session.query_one("SELECT * FROM t", &[]).await.unwrap();
    db.run("ALTER TABLE t ADD COLUMN b int").await;
    let runs = AtomicU32::new(0);
    let columns = session
        .transaction(async |tx| {
            runs.fetch_add(1, SeqCst);
            Ok::<_, Error>(tx.query_one("SELECT * FROM t", &[]).await?.len())
        })
        .await
        .unwrap();
    assert_eq!((columns, runs.load(SeqCst)), (2, 2));
}

#[tokio::test]
async fn a_change_of_schema_inside_a_raw_transaction_is_told() {
    let db = Database::new().await;
    db.run("CREATE TABLE t (a int); INSERT INTO t VALUES (1)").await;
    let session = db.sessions().acquire().await.unwrap();
    session.query_one("SELECT * FROM t", &[]).await.unwrap();
    db.run("ALTER TABLE t ADD COLUMN b int").await;
    session.batch_execute("BEGIN").await.unwrap();
    // SQL began it, so SQL has to run it again.
    let error = session.query_one("SELECT * FROM t", &[]).await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "0A000");
    session.batch_execute("ROLLBACK").await.unwrap();
    assert_eq!(session.query_one("SELECT * FROM t", &[]).await.unwrap().len(), 2);
}

#[tokio::test]
async fn a_stale_statement_whose_failure_nobody_read_is_healed_too() {
    let db = Database::new().await;
    db.run("CREATE TABLE t (a int); INSERT INTO t VALUES (1)").await;
    let mut session = db.sessions().acquire().await.unwrap();
    session.query_one("SELECT * FROM t", &[]).await.unwrap();
    // Also so that BEGIN need not be awaited, and the statement is sent when it is first polled.
    session.transaction(async |tx| tx.query_one("SELECT 1", &[]).await).await.unwrap();
    db.run("ALTER TABLE t ADD COLUMN b int").await;
    let runs = AtomicU32::new(0);
    session
        .transaction(async |tx| {
            runs.fetch_add(1, SeqCst);
            let mut unread = Box::pin(tx.query_one("SELECT * FROM t", &[]));
            std::future::poll_fn(|cx| {
                assert!(unread.as_mut().poll(cx).is_pending());
                std::task::Poll::Ready(())
            })
            .await;
            let other = tx.query_one("SELECT 1", &[]).await;
            if other.is_ok() {
                return unread.await;
            }
            drop(unread);
            other
        })
        .await
        .unwrap();
    assert_eq!(runs.load(SeqCst), 2);
}

#[tokio::test]
async fn statements_that_were_deallocated_are_prepared_again() {
    let db = Database::new().await;
    let mut session = db.sessions().acquire().await.unwrap();
    for sql in ["DEALLOCATE ALL", "DISCARD ALL"] {
        session.query_one("SELECT 1", &[]).await.unwrap();
        session.batch_execute(sql).await.unwrap();
        session.query_one("SELECT 1", &[]).await.unwrap();
        session.query_one("SELECT 1", &[]).await.unwrap();
        if sql == "DEALLOCATE ALL" {
            session.batch_execute(sql).await.unwrap();
            session.transaction(async |tx| tx.query_one("SELECT 1", &[]).await).await.unwrap();
        }
    }
}

/// Drops what is prepared where no command's tag tells of it.
const DROP_UNSEEN: &str = "DO $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$";

#[tokio::test]
async fn begin_is_parsed_once_on_each_connection() {
    let db = Database::new().await;
    let sessions = db.single();
    let own = "SELECT count(*), min(extract(epoch FROM prepare_time)::text) FROM pg_prepared_statements \
               WHERE name LIKE 'pgs:%'";
    let mut seen = Vec::new();
    for _ in 0..3 {
        sessions.transaction(async |tx| tx.execute("SELECT 1", &[]).await).await.unwrap();
        sessions.batch().push("SELECT 1", ()).run().await.unwrap();
        let row = sessions.acquire().await.unwrap().query_one(own, &[]).await.unwrap();
        seen.push((row.get::<_, i64>(0), row.get::<_, String>(1)));
    }
    assert_eq!(seen[0].0, 1);
    assert!(seen.iter().all(|one| *one == seen[0]), "{seen:?}");
}

#[tokio::test]
async fn a_transaction_begins_though_what_is_prepared_was_dropped_unseen() {
    let db = Database::new().await;
    db.run("CREATE TABLE t (n int)").await;
    let sessions = db.single();
    let run = async || {
        sessions.transaction(async |tx| tx.execute("INSERT INTO t VALUES (1)", &[]).await.map(drop)).await
    };
    run().await.unwrap();
    sessions.acquire().await.unwrap().execute(DROP_UNSEEN, &[]).await.unwrap();
    run().await.unwrap();
    assert_eq!(db.number("SELECT count(*) FROM t").await, 2);
}

#[tokio::test]
async fn a_transaction_commits_though_it_dropped_what_is_prepared_unseen() {
    let db = Database::new().await;
    db.run("CREATE TABLE t (n int)").await;
    let sessions = db.single();
    for expected in 1..=2 {
        let attempts = AtomicU32::new(0);
        sessions
            .transaction(async |tx| {
                attempts.fetch_add(1, SeqCst);
                tx.batch_execute("INSERT INTO t VALUES (1)").await?;
                tx.batch_execute(DROP_UNSEEN).await
            })
            .await
            .unwrap();
        assert_eq!(db.number("SELECT count(*) FROM t").await, expected);
        assert_eq!(attempts.into_inner(), 1);
    }
}

#[tokio::test]
async fn a_batch_whose_begin_was_dropped_unseen_does_nothing_and_the_next_is_good() {
    let db = Database::new().await;
    db.run("CREATE TABLE t (n int)").await;
    let sessions = db.single();
    let run = async || sessions.batch().push("INSERT INTO t VALUES (1)", ()).run().await;
    run().await.unwrap();
    let session = sessions.acquire().await.unwrap();
    session.execute(DROP_UNSEEN, &[]).await.unwrap();
    drop(session);
    let told = run().await;
    let stored = 1 + i64::from(told.is_ok());
    assert_eq!(db.number("SELECT count(*) FROM t").await, stored, "{told:?}");
    run().await.unwrap();
    assert_eq!(db.number("SELECT count(*) FROM t").await, stored + 1);
}

#[tokio::test]
async fn a_statement_that_stays_stale_is_tried_once_more_and_no_more() {
    let db = Database::new().await;
    let session = db.sessions().acquire().await.unwrap();
    let error = within(session.execute("EXECUTE no_such_statement", &[])).await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "26000");
    session.execute("SELECT 1", &[]).await.unwrap();
}

#[tokio::test]
async fn an_enum_that_is_made_anew_is_seen() {
    let db = Database::new().await;
    db.run("CREATE TYPE mood AS ENUM ('good'); CREATE TABLE t (m mood); INSERT INTO t VALUES ('good')").await;
    let session = db.sessions().acquire().await.unwrap();
    session.query_one("SELECT m FROM t", &[]).await.unwrap();
    db.run("DROP TABLE t; DROP TYPE mood; CREATE TYPE mood AS ENUM ('bad'); CREATE TABLE t (m mood); INSERT INTO t VALUES ('bad')").await;
    let row = session.query_one("SELECT m FROM t", &[]).await.unwrap();
    assert_eq!(row.columns()[0].type_().name(), "mood");
}

#[tokio::test]
async fn prepared_statements_can_be_used_where_text_can() {
    let db = Database::new().await;
    let mut session = db.sessions().acquire().await.unwrap();
    let statement = session.prepare("SELECT $1::int").await.unwrap();
    assert_eq!(session.query_one(&statement, &[&7]).await.unwrap().get::<_, i32>(0), 7);
    let text = String::from("SELECT $1::int");
    session.query_one(&text, &[&7]).await.unwrap();
    let inside = session.transaction(async |tx| tx.query_one(&statement, &[&8]).await).await.unwrap();
    assert_eq!(inside.get::<_, i32>(0), 8);
}

#[tokio::test]
async fn abandoned_preparations_do_not_pile_up_on_the_server() {
    let db = Database::new().await;
    let sessions = SessionManager::new(db.config().max_size(1).statement_cache_capacity(5)).unwrap();
    let first = sessions.acquire().await.unwrap().process_id();
    for n in 0..100 {
        let session = within(sessions.acquire()).await.unwrap();
        assert!(common::polls(session.prepare(&format!("SELECT {n}")), 1).await.is_none());
        drop(session);
        let session = within(sessions.acquire()).await.unwrap();
        let prepared: i64 = session.query_one(PREPARED, &[]).await.unwrap().get(0);
        assert!(prepared <= 7, "{prepared}");
    }
    assert_eq!(sessions.acquire().await.unwrap().process_id(), first);
}

#[tokio::test]
async fn functions_may_be_generic_over_what_they_run_on() {
    async fn one(db: impl Executor) -> Result<i32, Error> {
        Ok(db.query_one("SELECT 1", &[]).await?.get(0))
    }
    async fn two(db: &impl Executor) -> Result<i32, Error> {
        db.execute("SELECT 2", &[]).await?;
        db.batch_execute("SELECT 2").await?;
        assert_eq!(db.query("SELECT 2", &[]).await?.len(), 1);
        let mut rows = db.query_stream("SELECT 2", &[]).await?;
        let row = rows.next().await.unwrap()?;
        assert!(rows.next().await.is_none());
        drop(rows);
        assert!(db.query_opt("SELECT 2 WHERE false", &[]).await?.is_none());
        Ok(row.get(0))
    }
    let db = Database::new().await;
    let mut session = db.sessions().acquire().await.unwrap();
    assert_eq!(one(&session).await.unwrap() + two(&session).await.unwrap(), 3);
    let sum = session
        .transaction(async |tx| {
            let sum = one(&*tx).await? + two(tx).await?;
            tx.savepoint(async |sp| Ok::<_, Error>(sum + one(&*sp).await? + two(sp).await?)).await
        })
        .await
        .unwrap();
    assert_eq!(sum, 6);
}

#[tokio::test]
async fn a_statement_outside_a_transaction_is_done_only_once_it_is_committed() {
    let db = Database::new().await;
    db.run("CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (a int REFERENCES a DEFERRABLE INITIALLY DEFERRED)")
        .await;
    let session = db.sessions().acquire().await.unwrap();
    // The server says INSERT 0 1, and checks the constraint as it commits.
    let sql = "INSERT INTO b VALUES (1)";
    for _ in 0..2 {
        assert!(session.execute(sql, &[]).await.unwrap_err().is_foreign_key_violation());
        assert!(session.query(sql, &[]).await.unwrap_err().is_foreign_key_violation());
    }
    let sql = "INSERT INTO b VALUES (1) RETURNING a";
    assert!(session.query_one(sql, &[]).await.unwrap_err().is_foreign_key_violation());
    assert!(session.query_opt(sql, &[]).await.unwrap_err().is_foreign_key_violation());
    assert_eq!(db.number("SELECT count(*) FROM b").await, 0);
}
