//! Transactions: what is committed, what is not, and what is said about it.
#![cfg(feature = "testing")]

mod common;

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use common::{Database, until_returned, within};
use futures_util::FutureExt;
use pg_session::{Error, IsolationLevel, RetryPolicy, TransactionOptions};

#[tokio::test]
async fn ok_commits_and_err_rolls_back() {
    let db = Database::new().await;
    db.run("CREATE TABLE t (a int)").await;
    let mut session = db.sessions().acquire().await.unwrap();
    let value = session
        .transaction(async |tx| {
            tx.execute("INSERT INTO t VALUES ($1)", &[&1]).await?;
            Ok::<_, Error>(42)
        })
        .await
        .unwrap();
    assert_eq!(value, 42);
    #[derive(Debug)]
    enum Own {
        Mine,
        Theirs(Error),
    }
    impl From<Error> for Own {
        fn from(e: Error) -> Self {
            Self::Theirs(e)
        }
    }
    let failed = session
        .transaction(async |tx| {
            tx.execute("INSERT INTO t VALUES ($1)", &[&2]).await?;
            Err::<(), _>(Own::Mine)
        })
        .await;
    match failed {
        Err(Own::Mine) => {}
        Err(Own::Theirs(e)) => panic!("{e}"),
        Ok(()) => panic!("committed"),
    }
    assert_eq!(db.number("SELECT count(*) FROM t").await, 1);
    db.until_quiet().await;
}

#[tokio::test]
async fn a_swallowed_statement_error_fails_the_commit_with_its_cause() {
    let db = Database::new().await;
    db.run("CREATE TABLE t (a int PRIMARY KEY)").await;
    let mut session = db.sessions().acquire().await.unwrap();
    let result = session
        .transaction(async |tx| {
            tx.execute("INSERT INTO t VALUES (1)", &[]).await?;
            let _ = tx.execute("INSERT INTO t VALUES (1)", &[]).await;
            Ok::<_, Error>(())
        })
        .await;
    let error = result.unwrap_err();
    assert!(matches!(error, Error::Aborted(_)), "{error:?}");
    assert!(error.is_unique_violation());
    assert_eq!(error.constraint(), Some("t_pkey"));
    assert_eq!(db.number("SELECT count(*) FROM t").await, 0);
    session.execute("INSERT INTO t VALUES (2)", &[]).await.unwrap();
}

#[tokio::test]
async fn a_statement_after_a_failed_one_names_the_first_cause() {
    let db = Database::new().await;
    let mut session = db.sessions().acquire().await.unwrap();
    session
        .transaction(async |tx| {
            let first = tx.execute("SELECT 1/0", &[]).await.unwrap_err();
            assert_eq!(first.code().unwrap().code(), "22012");
            let second = tx.execute("SELECT 1", &[]).await.unwrap_err();
            assert_eq!(second.code().unwrap().code(), "22012", "{second:?}");
            Ok::<_, Error>(())
        })
        .await
        .unwrap_err();
}

#[tokio::test]
async fn a_transaction_whose_only_statement_was_never_sent_has_nothing_to_commit() {
    let db = Database::new().await;
    let mut session = db.sessions().acquire().await.unwrap();
    session.transaction(async |tx| tx.query("SELECT $1::int", &[&1]).await).await.unwrap();
    // It would fail, if it were sent.
    let options = TransactionOptions::new().local_setting("no_such_setting", "1");
    session
        .transaction_with(options, async |tx| {
            let never_sent = tx.query("SELECT $1::int", &[&"text"]).await.unwrap_err();
            assert!(never_sent.code().is_none());
            Ok::<_, Error>(())
        })
        .await
        .unwrap();
    assert_eq!(session.query_one("SELECT 1", &[]).await.unwrap().get::<_, i32>(0), 1);
}

#[tokio::test]
async fn a_deferred_constraint_fails_the_commit() {
    let db = Database::new().await;
    db.run(
        "CREATE TABLE p (id int PRIMARY KEY);
         CREATE TABLE c (p int REFERENCES p DEFERRABLE INITIALLY DEFERRED)",
    )
    .await;
    let mut session = db.sessions().acquire().await.unwrap();
    let pid = session.process_id();
    let error =
        session.transaction(async |tx| tx.execute("INSERT INTO c VALUES (7)", &[]).await).await.unwrap_err();
    assert!(error.is_foreign_key_violation(), "{error:?}");
    assert_eq!(error.constraint(), Some("c_p_fkey"));
    assert_eq!(db.number("SELECT count(*) FROM c").await, 0);
    session.transaction(async |tx| tx.execute("INSERT INTO p VALUES (7)", &[]).await).await.unwrap();
    assert_eq!(session.process_id(), pid);
}

#[tokio::test]
async fn a_row_stream_dropped_before_its_late_error_does_not_commit() {
    let db = Database::new().await;
    db.run("CREATE TABLE t (a int)").await;
    let mut session = db.sessions().acquire().await.unwrap();
    let error = within(session.transaction(async |tx| {
        tx.execute("INSERT INTO t VALUES (1)", &[]).await?;
        let mut rows = tx.query_stream("SELECT 1/(5000 - n) FROM generate_series(1, 5000) n", &[]).await?;
        rows.next().await.unwrap()?;
        drop(rows);
        Ok::<_, Error>(())
    }))
    .await
    .unwrap_err();
    assert!(matches!(error, Error::StatementAbandoned), "{error:?}");
    assert_eq!(db.number("SELECT count(*) FROM t").await, 0);
}

#[tokio::test]
async fn options_are_in_force_and_gone_for_the_next() {
    let db = Database::new().await;
    let sessions = db.single();
    let options = TransactionOptions::serializable()
        .read_only()
        .deferrable()
        .local_setting("app.tenant", r"O'Neil\ ; DROP TABLE x")
        .local_setting("search_path", "pg_catalog, public");
    let show = "SELECT current_setting('transaction_isolation'), current_setting('transaction_read_only'), \
                current_setting('transaction_deferrable'), current_setting('app.tenant', true), \
                current_setting('search_path')";
    let read = |row: pg_session::Row| -> [Option<String>; 5] { std::array::from_fn(|i| row.get(i)) };
    let inside = sessions.transaction_with(options, async |tx| tx.query_one(show, &[]).await).await.unwrap();
    assert_eq!(
        read(inside).map(Option::unwrap),
        ["serializable", "on", "on", r"O'Neil\ ; DROP TABLE x", "pg_catalog, public"]
    );
    let after = sessions.transaction(async |tx| tx.query_one(show, &[]).await).await.unwrap();
    let after = read(after).map(Option::unwrap_or_default);
    assert_eq!(after, ["read committed", "off", "off", "", "\"$user\", public"]);
}

#[tokio::test]
async fn a_write_in_a_read_only_transaction_is_refused() {
    let db = Database::new().await;
    db.run("CREATE TABLE t (a int)").await;
    let error = db
        .sessions()
        .transaction_with(TransactionOptions::new().read_only(), async |tx| {
            tx.execute("INSERT INTO t VALUES (1)", &[]).await
        })
        .await
        .unwrap_err();
    assert_eq!(error.code().unwrap().code(), "25006");
}

#[tokio::test]
async fn an_unknown_setting_fails_the_first_statement_and_every_other() {
    let db = Database::new().await;
    let mut session = db.single().acquire().await.unwrap();
    for _ in 0..2 {
        let options = TransactionOptions::new().local_setting("no_such_setting", "1");
        let error = session
            .transaction_with(options, async |tx| {
                let first = tx.execute("SELECT 1", &[]).await.unwrap_err();
                assert_eq!(first.code().unwrap().code(), "42704", "{first:?}");
                tx.execute("SELECT 1", &[]).await
            })
            .await
            .unwrap_err();
        assert_eq!(error.code().unwrap().code(), "42704", "{error:?}");
    }
    let refused = session
        .transaction_with(TransactionOptions::new().local_setting("a b", "1"), async |tx| {
            tx.execute("SELECT 1", &[]).await
        })
        .await;
    assert!(matches!(refused, Err(Error::Config(_))));
    session.execute("SELECT 1", &[]).await.unwrap();
}

#[tokio::test]
async fn sql_that_ends_the_transaction_is_an_error_and_costs_the_connection() {
    let db = Database::new().await;
    db.run("CREATE TABLE t (a int)").await;
    for sql in ["COMMIT", "ROLLBACK", "COMMIT; BEGIN", "ROLLBACK; BEGIN", "COMMIT AND CHAIN"] {
        let sessions = db.single();
        let mut session = sessions.acquire().await.unwrap();
        let pid = session.process_id();
        let result = session
            .transaction(async |tx| {
                tx.execute("INSERT INTO t VALUES (1)", &[]).await?;
                tx.batch_execute(sql).await?;
                tx.execute("INSERT INTO t VALUES (2)", &[]).await
            })
            .await;
        assert!(matches!(result, Err(Error::TransactionEnded)), "{sql}: {result:?}");
        drop(session);
        let next = sessions.acquire().await.unwrap();
        assert_ne!(next.process_id(), pid, "{sql}");
    }
    let mut session = db.single().acquire().await.unwrap();
    let result = session
        .transaction(async |tx| {
            tx.execute("INSERT INTO t VALUES (3)", &[]).await?;
            tx.batch_execute("BEGIN").await
        })
        .await;
    assert!(matches!(result, Err(Error::TransactionEnded)), "{result:?}");
    assert_eq!(db.number("SELECT count(*) FROM t WHERE a = 3").await, 0);
}

#[tokio::test]
async fn a_transaction_inside_a_raw_begin_is_refused() {
    let db = Database::new().await;
    let mut session = db.single().acquire().await.unwrap();
    session.batch_execute("BEGIN").await.unwrap();
    let result = session.transaction(async |tx| tx.execute("SELECT 1", &[]).await).await;
    assert!(matches!(result, Err(Error::InTransaction)), "{result:?}");
    session.batch_execute("ROLLBACK").await.unwrap();
    session.transaction(async |tx| tx.execute("SELECT 1", &[]).await).await.unwrap();
}

#[tokio::test]
async fn a_panic_rolls_back_closes_the_connection_and_goes_on() {
    let db = Database::new().await;
    db.run("CREATE TABLE t (a int)").await;
    let sessions = db.single();
    let pid = sessions.acquire().await.unwrap().process_id();
    let task = tokio::spawn({
        let sessions = sessions.clone();
        async move {
            sessions
                .transaction(async |tx| {
                    tx.execute("INSERT INTO t VALUES (1)", &[]).await?;
                    if true {
                        panic!("at the disco");
                    }
                    Ok::<_, Error>(())
                })
                .await
        }
    });
    assert!(task.await.unwrap_err().is_panic());
    let next = within(sessions.acquire()).await.unwrap();
    assert_ne!(next.process_id(), pid);
    db.until_quiet().await;
    assert_eq!(db.number("SELECT count(*) FROM t").await, 0);
}

#[tokio::test]
async fn a_panic_in_a_parameter_closes_the_connection() {
    #[derive(Debug)]
    struct Bomb;
    impl postgres_types::ToSql for Bomb {
        fn to_sql(
            &self,
            _: &postgres_types::Type,
            _: &mut bytes::BytesMut,
        ) -> Result<postgres_types::IsNull, Box<dyn std::error::Error + Sync + Send>> {
            panic!("boom")
        }
        fn accepts(_: &postgres_types::Type) -> bool {
            true
        }
        postgres_types::to_sql_checked!();
    }
    let db = Database::new().await;
    let sessions = db.single();
    let pid = sessions.acquire().await.unwrap().process_id();
    let task = tokio::spawn({
        let sessions = sessions.clone();
        async move { sessions.acquire().await?.execute("SELECT $1::int", &[&Bomb]).await }
    });
    assert!(task.await.unwrap_err().is_panic());
    let next = within(sessions.acquire()).await.unwrap();
    assert_ne!(next.process_id(), pid);
    next.execute("SELECT 1", &[]).await.unwrap();
    // Caught on the way, it leaves a session behind that nobody can use.
    let caught = AssertUnwindSafe(next.execute("SELECT $1::int", &[&Bomb])).catch_unwind().await;
    assert!(caught.is_err());
    assert!(next.execute("SELECT 1", &[]).await.unwrap_err().is_connection_lost());
}

#[tokio::test]
async fn the_closures_error_comes_before_a_failed_rollback() {
    let db = Database::new().await;
    let sessions = db.single();
    let mut session = sessions.acquire().await.unwrap();
    let pid = session.process_id();
    let result = session
        .transaction(async |tx| {
            tx.execute("SELECT 1", &[]).await?;
            db.run(&format!("SELECT pg_terminate_backend({pid})")).await;
            db.until_ended(pid).await;
            Err::<(), _>(Own("mine".into()))
        })
        .await;
    assert_eq!(result.unwrap_err().0, "mine");
    drop(session);
    within(sessions.acquire()).await.unwrap().execute("SELECT 1", &[]).await.unwrap();
}

#[derive(Debug)]
struct Own(String);

impl From<Error> for Own {
    fn from(e: Error) -> Self {
        Self(e.to_string())
    }
}

#[tokio::test]
async fn statements_may_be_joined_inside_one_transaction() {
    let db = Database::new().await;
    db.run("CREATE TABLE t (a int)").await;
    let sum = db
        .sessions()
        .transaction(async |tx| {
            let (a, b, c) = tokio::try_join!(
                tx.query_one("SELECT 1", &[]),
                tx.execute("INSERT INTO t VALUES (1)", &[]),
                tx.query_one("SELECT 3", &[]),
            )?;
            Ok::<_, Error>(a.get::<_, i32>(0) + b as i32 + c.get::<_, i32>(0))
        })
        .await
        .unwrap();
    assert_eq!(sum, 5);
    assert_eq!(db.number("SELECT count(*) FROM t").await, 1);
}

#[tokio::test]
async fn a_transaction_by_hand_is_committed_rolled_back_or_dropped() {
    let db = Database::new().await;
    db.run("CREATE TABLE t (a int)").await;
    let mut session = db.single().acquire().await.unwrap();
    let tx = session.begin().await.unwrap();
    tx.execute("INSERT INTO t VALUES (1)", &[]).await.unwrap();
    tx.commit().await.unwrap();
    let tx = session.begin_with(TransactionOptions::repeatable_read()).await.unwrap();
    tx.execute("INSERT INTO t VALUES (2)", &[]).await.unwrap();
    tx.rollback().await;
    let tx = session.begin().await.unwrap();
    tx.execute("INSERT INTO t VALUES (3)", &[]).await.unwrap();
    drop(tx);
    session.execute("INSERT INTO t VALUES (4)", &[]).await.unwrap();
    let tx = session.begin().await.unwrap();
    tx.execute("INSERT INTO t VALUES (5)", &[]).await.unwrap();
    tx.execute("SELECT 1/0", &[]).await.unwrap_err();
    let error = tx.commit().await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "22012");
    assert_eq!(db.number("SELECT sum(a) FROM t").await, 5);
    db.until_quiet().await;
}

#[tokio::test]
async fn hooks_run_once_in_order_after_the_commit_and_only_then() {
    let db = Database::new().await;
    db.run("CREATE TABLE t (a int)").await;
    let log = Arc::new(std::sync::Mutex::new(Vec::new()));
    let runs = Arc::new(AtomicUsize::new(0));
    let note = |what: &'static str| {
        let log = Arc::clone(&log);
        move || async move { log.lock().unwrap().push(what) }
    };
    let sessions = db.sessions();
    let mut session = sessions.acquire().await.unwrap();
    session
        .transaction(async |tx| {
            let run = runs.fetch_add(1, SeqCst);
            tx.execute("INSERT INTO t VALUES (1)", &[]).await?;
            tx.on_commit(note("first"));
            let undone = tx
                .savepoint(async |sp| {
                    sp.on_commit(note("undone"));
                    sp.execute("SELECT 1/0", &[]).await
                })
                .await;
            assert!(undone.is_err());
            tx.savepoint(async |sp| {
                sp.on_commit(note("inner"));
                Ok::<_, Error>(())
            })
            .await?;
            tx.on_commit(|| async { panic!("in a hook") });
            tx.on_commit(note("last"));
            assert!(log.lock().unwrap().is_empty());
            if run == 0 {
                tx.batch_execute("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$").await?;
            }
            Ok::<_, Error>(())
        })
        .await
        .unwrap();
    assert_eq!(runs.load(SeqCst), 2);
    assert_eq!(*log.lock().unwrap(), ["first", "inner", "last"]);
    sessions
        .transaction(async |tx| {
            tx.on_commit(note("never"));
            tx.execute("SELECT 1", &[]).await?;
            Err::<(), _>(Own("no".into()))
        })
        .await
        .unwrap_err();
    assert_eq!(log.lock().unwrap().len(), 3);
}

#[tokio::test]
async fn isolation_levels_are_what_they_say() {
    let db = Database::new().await;
    for (level, name) in [
        (IsolationLevel::ReadUncommitted, "read uncommitted"),
        (IsolationLevel::ReadCommitted, "read committed"),
        (IsolationLevel::RepeatableRead, "repeatable read"),
        (IsolationLevel::Serializable, "serializable"),
    ] {
        let options = TransactionOptions::new().isolation_level(level).retry(RetryPolicy::never());
        let row = db
            .sessions()
            .transaction_with(options, async |tx| tx.query_one("SHOW transaction_isolation", &[]).await)
            .await
            .unwrap();
        assert_eq!(row.get::<_, &str>(0), name);
    }
}

#[tokio::test]
async fn a_transaction_that_has_its_session_with_it_gives_it_back_at_its_end() {
    let database = Database::new().await;
    database.run("CREATE TABLE t (n int)").await;
    let sessions = database.single();

    let tx = within(sessions.begin()).await.unwrap();
    tx.execute("INSERT INTO t VALUES (1)", &[]).await.unwrap();
    assert_eq!(sessions.status().in_use, 1);
    tx.commit().await.unwrap();
    assert_eq!(sessions.status().in_use, 0);

    // Kept in a task, and dropped in the middle.
    let mut tx = within(sessions.begin()).await.unwrap();
    tokio::spawn(async move {
        tx.savepoint(async |sp| sp.execute("INSERT INTO t VALUES (2)", &[]).await).await.unwrap();
    })
    .await
    .unwrap();
    until_returned(&sessions).await;

    let session = within(sessions.acquire()).await.unwrap();
    let count: i64 = session.query_one("SELECT sum(n) FROM t", &[]).await.unwrap().get(0);
    assert_eq!(count, 1);
}

#[tokio::test]
async fn a_first_statement_that_cannot_be_sent_does_not_take_begin_with_it() {
    let db = Database::new().await;
    db.run("CREATE TABLE t (a int)").await;
    let mut session = db.single().acquire().await.unwrap();
    let insert = "INSERT INTO t VALUES ($1)";
    // Warm: BEGIN then goes ahead of the next request, and nothing has to be prepared.
    session.transaction(async |tx| tx.execute(insert, &[&0]).await).await.unwrap();
    for way in ["statement", "savepoint", "many", "batch", "nothing"] {
        for commit in [false, true] {
            let before = db.number("SELECT count(*) FROM t").await;
            let result = session
                .transaction(async |tx| {
                    tx.execute(insert, &[&"one"]).await.unwrap_err();
                    match way {
                        "statement" => _ = tx.execute(insert, &[&1]).await?,
                        "savepoint" => {
                            tx.savepoint(async |sp| sp.execute(insert, &[&"two"]).await).await.unwrap_err();
                            tx.savepoint(async |sp| sp.execute(insert, &[&1]).await).await?;
                        }
                        "many" => _ = tx.execute_many(insert, [(1,)]).await?,
                        "batch" => _ = tx.batch().push(insert, (1,)).run().await?,
                        _ => {}
                    }
                    if commit { Ok(()) } else { Err(Error::StreamOpen) }
                })
                .await;
            assert_eq!(result.is_ok(), commit, "{way}: {result:?}");
            let stored = db.number("SELECT count(*) FROM t").await - before;
            assert_eq!(stored, i64::from(commit && way != "nothing"), "{way}, {commit}");
            session.query_one("SELECT 1", &[]).await.unwrap();
        }
    }
}
