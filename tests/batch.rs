//! Statements that are sent together: in order, all or nothing, and an error that says which.
#![cfg(feature = "testing")]

mod common;

use std::time::Duration;

use common::proxy::{AtCommit, Proxy};
use common::{Database, polls, until_returned, within};
use pg_session::testing::Sandbox;
use pg_session::{Error, RetryClass, RetryPolicy, SessionManager, TransactionOptions, tokio_postgres};
use tokio_postgres::types::{IsNull, ToSql, Type, private::BytesMut, to_sql_checked};

const INSERT: &str = "INSERT INTO t (id, a) VALUES ($1, $2)";
const ADD: &str = "UPDATE t SET a = a + $2 WHERE id = $1 RETURNING a";
const SUM: &str = "SELECT coalesce(sum(a), 0)::int8 FROM t";

/// Who waits for a row that somebody else has changed.
const WAITING: &str =
    "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()";

async fn table() -> (Database, SessionManager) {
    let db = Database::new().await;
    db.run("CREATE TABLE t (id int PRIMARY KEY, a int NOT NULL CONSTRAINT small CHECK (a < 1000))").await;
    db.run("INSERT INTO t VALUES (1, 10), (2, 20)").await;
    let sessions = db.single();
    (db, sessions)
}

/// The source of an error, and its sources, as a log would have it.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(e) = source {
        text = format!("{text}: {e}");
        source = e.source();
    }
    text
}

fn position(error: &Error) -> u64 {
    match error {
        Error::Batch(e) => e.position(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn results_come_in_the_order_of_the_statements() {
    let (db, sessions) = table().await;
    let name = String::from("tea");
    let results = within(
        sessions
            .batch()
            .push(ADD, (1, 5))
            .push("SELECT id, $1 || '!' FROM t ORDER BY id", (&name,))
            .push("DELETE FROM t WHERE id = $1", (99,))
            .push("DELETE FROM t", ())
            .run(),
    )
    .await
    .unwrap();
    assert_eq!(results.len(), 4);
    assert_eq!((results[0].rows()[0].get::<_, i32>(0), results[0].rows_affected()), (15, 1));
    let ids: Vec<(i32, &str)> = results[1].rows().iter().map(|row| (row.get(0), row.get(1))).collect();
    assert_eq!(ids, [(1, "tea!"), (2, "tea!")]);
    assert_eq!((results[2].rows_affected(), results[3].rows_affected()), (0, 2));
    assert_eq!(db.number("SELECT count(*) FROM t").await, 0);
}

#[tokio::test]
async fn statements_may_be_pushed_in_a_loop_and_run_again() {
    let (db, sessions) = table().await;
    let mut session = sessions.acquire().await.unwrap();
    let mut batch = session.batch();
    for id in 1..=2 {
        batch.push("UPDATE t SET a = a + $2 WHERE id = $1".to_owned(), (id, id * 100));
    }
    assert_eq!(batch.len(), 2);
    within(batch.run()).await.unwrap();
    within(batch.run()).await.unwrap();
    assert_eq!(db.number(SUM).await, 30 + 600);
}

#[tokio::test]
async fn an_empty_batch_sends_nothing() {
    let (_db, sessions) = table().await;
    let results = sessions.batch().run().await.unwrap();
    assert!(results.is_empty());
    assert_eq!(sessions.status().size, 0, "not even a connection");
}

#[tokio::test]
async fn an_error_names_the_statement_and_nothing_is_stored() {
    let (db, sessions) = table().await;
    let mut session = sessions.acquire().await.unwrap();
    // Cold, and from the cache.
    for _ in 0..2 {
        let result = within(
            session
                .batch()
                .push(ADD, (1, 1))
                .push(INSERT, (3, 1))
                .push(INSERT, (1, 1))
                .push(ADD, (2, 1))
                .run(),
        )
        .await;
        let error = result.unwrap_err();
        assert_eq!(position(&error), 3);
        assert!(error.is_unique_violation());
        assert_eq!(error.constraint(), Some("t_pkey"));
        assert!(error.db_error().is_some());
        assert_eq!(
            chain(&error),
            "statement 3 of the batch was refused: duplicate key value violates unique constraint \"t_pkey\" (SQLSTATE 23505)"
        );
        assert_eq!(db.number(SUM).await, 30);
        session.query_one("SELECT 1", &[]).await.unwrap();
    }
    // One that cannot be prepared.
    let error = within(session.batch().push(ADD, (1, 1)).push("SELEC 1", ()).run()).await.unwrap_err();
    assert_eq!((position(&error), error.code().unwrap().code()), (2, "42601"));
    let error = within(session.batch().push("SELEC 2", ()).push("SELECT x", ()).run()).await.unwrap_err();
    assert_eq!((position(&error), error.code().unwrap().code()), (1, "42601"));
    assert_eq!(db.number(SUM).await, 30);
    let error = within(session.batch().push("COPY t TO STDOUT", ()).run()).await.unwrap_err();
    assert!(matches!(error, Error::Config(_)), "{error:?}");
}

#[tokio::test]
async fn parameters_that_do_not_fit_are_named_before_anything_is_sent() {
    let (db, sessions) = table().await;
    let mut session = sessions.acquire().await.unwrap();
    session
        .transaction(async |tx| {
            let error = tx.batch().push(ADD, (1, 1)).push(ADD, (1, "two")).run().await.unwrap_err();
            assert_eq!(position(&error), 2);
            assert!(matches!(&error, Error::Batch(e) if e.parameter() == Some(2)));
            assert!(error.code().is_none());
            let text = chain(&error);
            assert!(
                text.starts_with("statement 2 of the batch: parameter $2 could not be converted: "),
                "{text}"
            );
            let error = tx.batch().push(ADD, (1,)).run().await.unwrap_err();
            assert_eq!(chain(&error), "statement 1 of the batch has 1 parameters where its SQL has 2");
            // Nothing has happened, so the transaction is good.
            tx.execute("INSERT INTO t VALUES (3, 0)", &[]).await
        })
        .await
        .unwrap();
    assert_eq!(db.number("SELECT count(*) FROM t").await, 3);
}

#[tokio::test]
async fn inside_a_transaction_it_is_a_part_of_it() {
    let (db, sessions) = table().await;
    let mut session = sessions.acquire().await.unwrap();
    let result = within(session.transaction(async |tx| {
        tx.batch().push(ADD, (1, 1)).push(ADD, (2, 1)).run().await?;
        tx.execute("UPDATE t SET a = 0 WHERE id = 1", &[]).await?;
        Err::<(), _>(Error::StreamOpen)
    }));
    result.await.unwrap_err();
    assert_eq!(db.number(SUM).await, 30, "rolled back");

    // A refusal aborts it; the first is told, not those that follow from it.
    let result = within(session.transaction(async |tx| {
        let error =
            tx.batch().push(ADD, (1, 1)).push(ADD, (1, 5000)).push(ADD, (2, 1)).run().await.unwrap_err();
        assert_eq!((position(&error), error.constraint()), (2, Some("small")));
        Ok::<_, Error>(())
    }));
    let error = result.await.unwrap_err();
    assert!(matches!(error, Error::Aborted(_)) && error.is_check_violation(), "{error:?}");
    assert_eq!(db.number(SUM).await, 30);

    // In a savepoint it is undone.
    within(session.transaction(async |tx| {
        let undone =
            tx.savepoint(async |sp| sp.batch().push(ADD, (1, 1)).push(ADD, (2, 5000)).run().await).await;
        assert!(undone.unwrap_err().is_check_violation());
        tx.batch().push(ADD, (2, 1)).run().await
    }))
    .await
    .unwrap();
    assert_eq!(db.number(SUM).await, 31);
}

#[tokio::test]
async fn a_deferred_constraint_fails_its_commit() {
    let (db, sessions) = table().await;
    db.run("CREATE TABLE d (id int CONSTRAINT later REFERENCES t DEFERRABLE INITIALLY DEFERRED)").await;
    let mut session = sessions.acquire().await.unwrap();
    for _ in 0..2 {
        let result =
            within(session.batch().push(ADD, (1, 1)).push("INSERT INTO d VALUES ($1)", (9,)).run()).await;
        let error = result.unwrap_err();
        assert!(matches!(error, Error::Database(_)), "of no single statement: {error:?}");
        assert_eq!(error.constraint(), Some("later"));
        assert_eq!(db.number(SUM).await, 30);
    }
}

#[tokio::test]
async fn options_are_in_force() {
    let (_db, sessions) = table().await;
    let options = TransactionOptions::serializable().read_only().local_setting("app.tenant", "acme");
    for _ in 0..2 {
        let results = within(
            sessions
                .batch_with(options.clone())
                .push("SELECT current_setting('transaction_isolation'), current_setting('app.tenant')", ())
                .push("SHOW transaction_read_only", ())
                .run(),
        )
        .await
        .unwrap();
        let row = &results[0].rows()[0];
        assert_eq!((row.get(0), row.get(1)), ("serializable", "acme"));
        assert_eq!(results[1].rows()[0].get::<_, &str>(0), "on");
    }
    // Refused by the prelude: no statement of the batch is to blame.
    let bad = TransactionOptions::new().local_setting("work_mem", "lots");
    for _ in 0..2 {
        let error = within(sessions.batch_with(bad.clone()).push(ADD, (1, 1)).run()).await.unwrap_err();
        assert!(!matches!(error, Error::Batch(_)), "{error:?}");
        assert_eq!(error.code().map(|code| code.code()), Some("22023"), "{error:?}");
    }
}

#[tokio::test]
async fn a_serialization_failure_is_retried() {
    let (db, sessions) = table().await;
    let retry = RetryPolicy::default().base_delay(Duration::from_millis(1));
    let options = TransactionOptions::repeatable_read();
    // Warm, so that all of it is one flight.
    let warm = sessions.batch_with(options.clone()).push(ADD, (1, 0)).push(ADD, (2, 0)).run().await;
    warm.unwrap();
    for (retry, expected) in [(retry, Ok(())), (RetryPolicy::never(), Err(2))] {
        let before = db.number(SUM).await;
        let mut holder = common::connect(db.database.url()).await;
        let lock = holder.transaction().await.unwrap();
        lock.execute("UPDATE t SET a = a + 1 WHERE id = 2", &[]).await.unwrap();
        let sessions = sessions.clone();
        let options = options.clone().retry(retry);
        let batch = tokio::spawn(async move {
            sessions.batch_with(options).push(ADD, (1, 10)).push(ADD, (2, 10)).run().await
        });
        db.until(&format!("EXISTS ({WAITING})")).await;
        lock.commit().await.unwrap();
        match (within(batch).await.unwrap(), expected) {
            (Ok(_), Ok(())) => assert_eq!(db.number(SUM).await, before + 21),
            (Err(error), Err(statement)) => {
                assert!(error.is_serialization_failure());
                assert_eq!(position(&error), statement);
                assert_eq!(db.number(SUM).await, before + 1);
            }
            (result, _) => panic!("{result:?}"),
        }
    }
}

#[tokio::test]
async fn a_lost_answer_to_its_commit_is_unknown_and_never_retried() {
    for (what, stored) in [(AtCommit::CutBefore, 0), (AtCommit::CutAfter, 7), (AtCommit::Swallow, 7)] {
        let (db, _) = table().await;
        let proxy = Proxy::start().await;
        let config = proxy.config(&db);
        let config = config.max_size(1).commit_timeout(Duration::from_millis(if what == AtCommit::Swallow {
            200
        } else {
            10_000
        }));
        let sessions = SessionManager::new(config).unwrap();
        sessions.batch().push(ADD, (1, 0)).run().await.unwrap();
        proxy.at_commit(what);
        let retry = RetryPolicy::default().retry_on(RetryClass::ConnectionLost);
        let options = TransactionOptions::new().retry(retry);
        let batch = async { sessions.batch_with(options).push(ADD, (1, 7)).run().await };
        let error = within(tokio::time::timeout(Duration::from_secs(5), batch)).await;
        let error = error.expect("in time").unwrap_err();
        assert!(matches!(error, Error::CommitUnknown(_)), "{what:?}: {error:?}");
        assert_eq!(db.number(SUM).await, 30 + stored, "{what:?}");
    }
}

#[tokio::test]
async fn a_session_ended_by_the_server_before_commit_is_lost_and_may_be_retried() {
    let (db, sessions) = table().await;
    sessions.batch().push(ADD, (1, 0)).run().await.unwrap();
    for (retry, moves) in
        [(RetryPolicy::never(), false), (RetryPolicy::default().retry_on(RetryClass::ConnectionLost), true)]
    {
        let before = db.number(SUM).await;
        let mut holder = common::connect(db.database.url()).await;
        let lock = holder.transaction().await.unwrap();
        lock.execute("UPDATE t SET a = a + 1 WHERE id = 1", &[]).await.unwrap();
        let (manager, options) = (sessions.clone(), TransactionOptions::new().retry(retry));
        let batch = tokio::spawn(async move { manager.batch_with(options).push(ADD, (1, 5)).run().await });
        db.until(&format!("EXISTS ({WAITING})")).await;
        let pid: i32 = db.watcher.query_one(WAITING, &[]).await.unwrap().get(0);
        db.run(&format!("SELECT pg_terminate_backend({pid})")).await;
        db.until_ended(pid).await;
        if moves {
            db.until(&format!("EXISTS ({WAITING})")).await;
        }
        lock.commit().await.unwrap();
        let result = within(batch).await.unwrap();
        if moves {
            result.unwrap();
        } else {
            assert!(result.unwrap_err().is_connection_lost());
        }
        assert_eq!(db.number(SUM).await, before + 1 + if moves { 5 } else { 0 });
    }
}

#[tokio::test]
async fn dropped_at_any_poll_it_is_stored_whole_or_not_at_all() {
    let (db, sessions) = table().await;
    for warm in [false, true] {
        for left in 0.. {
            let before = db.number(SUM).await;
            let mut session = within(sessions.acquire()).await.unwrap();
            if !warm {
                session.batch_execute("SELECT 1").await.unwrap();
            }
            let done = {
                let mut batch = session.batch();
                batch.push(ADD, (1, 1)).push(ADD, (2, 1));
                within(polls(batch.run(), left)).await
            };
            drop(session);
            until_returned(&sessions).await;
            let stored = db.number(SUM).await - before;
            assert!([0, 2].contains(&stored), "after {left} polls: {stored}");
            // Whoever has it next finds nothing.
            sessions.acquire().await.unwrap().execute("VACUUM pg_language", &[]).await.unwrap();
            if let Some(result) = done {
                result.unwrap();
                assert_eq!(stored, 2);
                break;
            }
        }
    }
}

#[tokio::test]
async fn dropped_inside_a_transaction_it_takes_that_along() {
    let (db, sessions) = table().await;
    let mut session = sessions.acquire().await.unwrap();
    let result = within(session.transaction(async |tx| {
        let mut batch = tx.batch();
        batch.push(ADD, (1, 1)).push("SELECT pg_sleep(60)", ()).push(ADD, (2, 1));
        let pid = tx.process_id();
        tokio::select! {
            result = batch.run() => panic!("{result:?}"),
            () = db.until_sleeping(pid) => {}
        }
        Ok::<_, Error>(())
    }));
    let error = result.await.unwrap_err();
    assert!(matches!(error, Error::StatementAbandoned), "{error:?}");
    assert_eq!(db.number(SUM).await, 30);
}

#[tokio::test]
async fn the_deadline_ends_it_without_a_doubt() {
    let (db, sessions) = table().await;
    let options = TransactionOptions::new().deadline(Duration::from_millis(100));
    let batch = async {
        sessions.batch_with(options.clone()).push(ADD, (1, 1)).push("SELECT pg_sleep(60)", ()).run().await
    };
    let error = within(batch).await.unwrap_err();
    assert!(matches!(error, Error::DeadlineExceeded { .. }), "{error:?}");
    until_returned(&sessions).await;
    assert_eq!(db.number(SUM).await, 30);
    within(sessions.batch_with(options).push(ADD, (1, 1)).run()).await.unwrap();
    assert_eq!(db.number(SUM).await, 31);
}

#[tokio::test]
async fn sql_that_ends_the_transaction_is_an_error() {
    for end in ["COMMIT", "ROLLBACK", "COMMIT AND CHAIN", "PREPARE TRANSACTION 'x'"] {
        let (db, sessions) = table().await;
        for _ in 0..2 {
            let mut batch = sessions.batch();
            let error =
                within(batch.push(ADD, (1, 1)).push(end, ()).push(ADD, (2, 1)).run()).await.unwrap_err();
            let refused = end.starts_with("PREPARE"); // max_prepared_transactions is 0
            let expected = matches!(&error, Error::TransactionEnded) || refused && position(&error) == 2;
            assert!(expected, "{end}: {error:?}");
        }
        until_returned(&sessions).await;
        db.until_quiet().await;
    }
}

#[tokio::test]
async fn what_it_leaves_in_the_session_is_reset() {
    let (_db, sessions) = table().await;
    sessions.batch().push("SET app.trace = 'x'", ()).run().await.unwrap();
    until_returned(&sessions).await;
    let session = sessions.acquire().await.unwrap();
    let row =
        session.query_one("SELECT coalesce(current_setting('app.trace', true), '')", &[]).await.unwrap();
    assert_eq!(row.get::<_, &str>(0), "");
}

/// A parameter whose conversion panics.
#[derive(Debug)]
struct Bomb;

impl ToSql for Bomb {
    fn to_sql(&self, _: &Type, _: &mut BytesMut) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        panic!("boom")
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    to_sql_checked!();
}

#[tokio::test]
async fn a_panic_in_a_parameter_stores_nothing() {
    let (db, sessions) = table().await;
    let manager = sessions.clone();
    let task =
        tokio::spawn(async move { manager.batch().push(ADD, (1, 1)).push(ADD, (2, Bomb)).run().await });
    assert!(within(task).await.unwrap_err().is_panic());
    within(sessions.batch().push(ADD, (1, 1)).run()).await.unwrap();
    assert_eq!(db.number(SUM).await, 31);
}

#[tokio::test]
async fn a_cache_smaller_than_the_batch_does() {
    let (db, _) = table().await;
    let sessions = SessionManager::new(db.config().max_size(1).statement_cache_capacity(1)).unwrap();
    for _ in 0..3 {
        let mut batch = sessions.batch();
        for n in 0..5 {
            batch.push(format!("UPDATE t SET a = a + $1 + {n} WHERE id = 1"), (1,));
        }
        within(batch.run()).await.unwrap();
    }
    assert_eq!(db.number(SUM).await, 30 + 3 * (5 + 10));
}

#[tokio::test]
async fn a_statement_that_went_stale_is_prepared_again() {
    let (db, sessions) = table().await;
    let read = "SELECT * FROM t WHERE id = $1";
    sessions.batch().push(read, (1,)).push(ADD, (1, 1)).run().await.unwrap();
    db.run("ALTER TABLE t ADD b int").await;
    let retry = RetryPolicy::default().base_delay(Duration::from_millis(1));
    let mut batch = sessions.batch_with(TransactionOptions::new().retry(retry));
    let results = within(batch.push(read, (1,)).push(ADD, (1, 1)).run()).await.unwrap();
    assert_eq!(results[0].rows()[0].len(), 3);
    assert_eq!(db.number(SUM).await, 32);
}

#[tokio::test]
async fn it_works_in_a_sandbox() {
    let (db, _) = table().await;
    let sandbox = Sandbox::start(db.database.url()).await.unwrap();
    let sessions = sandbox.sessions();
    let results = within(sessions.batch().push(ADD, (1, 1)).push(INSERT, (3, 3)).run()).await.unwrap();
    assert_eq!(results[0].rows()[0].get::<_, i32>(0), 11);
    let error = within(sessions.batch().push(ADD, (1, 1)).push(INSERT, (3, 3)).run()).await.unwrap_err();
    assert_eq!((position(&error), error.is_unique_violation()), (2, true));
    let row = sessions.acquire().await.unwrap().query_one(SUM, &[]).await.unwrap();
    assert_eq!(row.get::<_, i64>(0), 34);
    sandbox.finish().await.unwrap();
    assert_eq!(db.number(SUM).await, 30);
}
