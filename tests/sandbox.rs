//! A sandbox: what its sessions see of each other, that a server would have answered the same, and that nothing is left.
#![cfg(feature = "testing")]

mod common;

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::{Database, connect, polls, until_returned, within};
use futures_util::{SinkExt, StreamExt};
use pg_session::testing::{Sandbox, SandboxError};
use pg_session::tokio_postgres::{Client, SimpleQueryMessage, error::SqlState};
use pg_session::{Error, IsolationLevel, Session, SessionManager, TransactionOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

async fn database() -> Database {
    let database = Database::new().await;
    database
        .run(
            "CREATE TABLE t (id bigint PRIMARY KEY, n bigint NOT NULL DEFAULT 0);
             CREATE TABLE parent (id bigint PRIMARY KEY);
             CREATE TABLE child (
                 late bigint CONSTRAINT late_fk REFERENCES parent DEFERRABLE INITIALLY DEFERRED,
                 soon bigint CONSTRAINT soon_fk REFERENCES parent DEFERRABLE INITIALLY IMMEDIATE)",
        )
        .await;
    database
}

async fn sandbox(database: &Database) -> Sandbox {
    within(Sandbox::start(database.database.url())).await.expect("a sandbox")
}

async fn insert(sessions: &SessionManager, id: i64) -> Result<(), Error> {
    sessions
        .transaction(async |tx| {
            tx.execute("INSERT INTO t (id) VALUES ($1)", &[&id]).await?;
            Ok(())
        })
        .await
}

async fn count(sessions: &SessionManager) -> i64 {
    let session = sessions.acquire().await.expect("a session");
    session.query_one("SELECT count(*) FROM t", &[]).await.expect("a count").get(0)
}

/// What is in the table for everybody else.
async fn outside(database: &Database) -> i64 {
    database.number("SELECT count(*) FROM t").await
}

fn code(error: &tokio_postgres::Error) -> &str {
    error.code().unwrap_or_else(|| panic!("{error}")).code()
}

async fn text(session: &Session, sql: &str) -> String {
    session.query_one(sql, &[]).await.expect(sql).get(0)
}

/// The tags and first columns of a simple query's answer.
async fn simple(client: &Client, sql: &str) -> Vec<String> {
    let messages = client.simple_query(sql).await.expect(sql);
    let values = messages.into_iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap_or("NULL").to_owned()),
        SimpleQueryMessage::CommandComplete(n) => Some(format!("({n})")),
        _ => None,
    });
    values.collect()
}

// ---- the end

#[tokio::test]
async fn everything_is_gone_after_finish() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let sessions = sandbox.sessions();
    within(insert(&sessions, 1)).await.unwrap();
    sessions.acquire().await.unwrap().execute("INSERT INTO t (id) VALUES (2)", &[]).await.unwrap();
    assert_eq!(count(&sessions).await, 2);
    assert_eq!(outside(&database).await, 0);
    within(sandbox.finish()).await.unwrap();
    assert_eq!(outside(&database).await, 0);
    database.run("INSERT INTO t (id) VALUES (1)").await; // and no lock is held
    assert!(sessions.acquire().await.is_err());
}

#[tokio::test]
async fn everything_is_gone_after_drop_in_the_middle_of_a_transaction() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let sessions = sandbox.sessions();
    let mut session = sessions.acquire().await.unwrap();
    let tx = session.begin().await.unwrap();
    tx.execute("INSERT INTO t (id) VALUES (1)", &[]).await.unwrap();
    let pid: i32 = tx.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    drop(sandbox);
    // At once: dropping has waited for it.
    assert_eq!(database.number(&format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {pid}")).await, 0);
    database.run("SET lock_timeout = '1ms'; INSERT INTO t (id) VALUES (1)").await;
    assert_eq!(outside(&database).await, 1);
}

#[tokio::test]
async fn everything_is_gone_after_a_panic() {
    let database = database().await;
    let url = database.database.url().to_owned();
    let panicked = tokio::task::spawn_blocking(move || {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let sandbox = Sandbox::start(&url).await.unwrap();
            insert(&sandbox.sessions(), 1).await.unwrap();
            std::panic::resume_unwind(Box::new("on purpose"));
        });
    });
    assert!(within(panicked).await.is_err());
    database.run("SET lock_timeout = '1ms'; INSERT INTO t (id) VALUES (1)").await;
}

#[tokio::test]
async fn dropping_it_needs_no_runtime_and_ends_what_runs() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let client = connect(&sandbox.url()).await;
    let pid: i32 = client.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    let sleep = tokio::spawn(async move { client.batch_execute("SELECT pg_sleep(100)").await });
    database.until_sleeping(pid).await;
    let begin = Instant::now();
    std::thread::spawn(move || drop(sandbox)).join().unwrap();
    assert!(begin.elapsed() < Duration::from_secs(4), "{:?}", begin.elapsed());
    assert!(within(sleep).await.unwrap().is_err());
    database.until(&format!("NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = {pid})")).await;
}

#[tokio::test]
async fn finishing_complains_of_a_transaction_left_open() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let sessions = sandbox.sessions();
    let mut session = sessions.acquire().await.unwrap();
    let tx = session.begin().await.unwrap();
    tx.execute("INSERT INTO t (id) VALUES (1)", &[]).await.unwrap();
    let error = within(sandbox.finish()).await.unwrap_err();
    assert!(matches!(error, SandboxError::InTransaction { sessions: 1 }), "{error}");
    database.run("SET lock_timeout = '1ms'; INSERT INTO t (id) VALUES (1)").await;
}

#[tokio::test]
async fn finishing_waits_for_a_transaction_that_is_being_given_up() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let sessions = sandbox.sessions();
    let mut session = sessions.acquire().await.unwrap();
    let tx = session.begin().await.unwrap();
    tx.execute("INSERT INTO t (id) VALUES (1)", &[]).await.unwrap();
    drop(tx);
    drop(session);
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn a_lost_backend_is_told_to_every_client_and_by_finish() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let (one, two) = (connect(&sandbox.url()).await, connect(&sandbox.url()).await);
    let pid: i32 = one.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    database.run(&format!("SELECT pg_terminate_backend({pid})")).await;
    database.until(&format!("NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = {pid})")).await;
    assert!(within(one.batch_execute("SELECT 1")).await.is_err());
    let error = within(two.batch_execute("SELECT 1")).await.unwrap_err();
    let error = error.as_db_error().expect("said by the sandbox");
    assert!(error.message().contains("terminating connection"), "{error}");
    let error = within(sandbox.finish()).await.unwrap_err();
    assert!(matches!(&error, SandboxError::Broken(why) if why.contains("terminating connection")), "{error}");
}

// ---- sessions among themselves

#[tokio::test]
async fn two_sandboxes_on_one_database_never_see_each_other() {
    let database = database().await;
    let (a, b) = (sandbox(&database).await, sandbox(&database).await);
    for (sandbox, ids) in [(&a, [1, 2, 3]), (&b, [4, 5, 6])] {
        for id in ids {
            insert(&sandbox.sessions(), id).await.unwrap();
        }
    }
    for sandbox in [a, b] {
        assert_eq!(count(&sandbox.sessions()).await, 3);
        within(sandbox.finish()).await.unwrap();
    }
    assert_eq!(outside(&database).await, 0);
}

#[tokio::test]
async fn a_commit_is_seen_by_later_sessions_and_a_rollback_undoes_it() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let sessions = sandbox.sessions();
    insert(&sessions, 1).await.unwrap();
    let given_up: Result<(), Error> = sessions
        .transaction(async |tx| {
            tx.execute("INSERT INTO t (id) VALUES (2)", &[]).await?;
            let seen: i64 = tx.query_one("SELECT count(*) FROM t", &[]).await?.get(0);
            assert_eq!(seen, 2);
            Err(Error::StreamOpen)
        })
        .await;
    assert!(matches!(given_up, Err(Error::StreamOpen)));
    let plain = connect(&sandbox.url()).await;
    assert_eq!(simple(&plain, "SELECT id FROM t").await, ["1", "(1)"]);
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn savepoints_nest_and_a_violation_is_caught_in_one() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let sessions = sandbox.sessions();
    sessions
        .transaction(async |tx| {
            tx.execute("INSERT INTO t (id) VALUES (1)", &[]).await?;
            let twice = tx
                .savepoint(async |sp| {
                    sp.execute("INSERT INTO t (id) VALUES (2)", &[]).await?;
                    sp.savepoint(async |sp| {
                        sp.execute("INSERT INTO t (id) VALUES (3)", &[]).await?;
                        Ok::<_, Error>(())
                    })
                    .await?;
                    sp.execute("INSERT INTO t (id) VALUES (1)", &[]).await?;
                    Ok::<_, Error>(())
                })
                .await;
            assert!(twice.unwrap_err().is_unique_violation());
            tx.execute("INSERT INTO t (id) VALUES (4)", &[]).await?;
            Ok::<_, Error>(())
        })
        .await
        .unwrap();
    let plain = connect(&sandbox.url()).await;
    assert_eq!(simple(&plain, "SELECT id FROM t ORDER BY 1").await, ["1", "4", "(2)"]);
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn an_error_ends_nothing_but_its_own_transaction() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let sessions = sandbox.sessions();
    insert(&sessions, 1).await.unwrap();
    let session = sessions.acquire().await.unwrap();
    let error = session.execute("INSERT INTO t (id) VALUES (1)", &[]).await.unwrap_err();
    assert!(error.is_unique_violation(), "{error}");
    let error = session.query("SELECT nonsense", &[]).await.unwrap_err();
    assert_eq!(error.code(), Some(&SqlState::UNDEFINED_COLUMN));
    let error =
        session.batch_execute("INSERT INTO t (id) VALUES (2); SELECT 1/0; SELECT 1").await.unwrap_err();
    assert_eq!(error.code(), Some(&SqlState::DIVISION_BY_ZERO));
    assert_eq!(text(&session, "SELECT count(*)::text FROM t").await, "1");
    drop(session);
    let swallowed = sessions
        .transaction(async |tx| {
            tx.execute("INSERT INTO t (id) VALUES (2)", &[]).await?;
            let _ = tx.execute("INSERT INTO t (id) VALUES (1)", &[]).await;
            Ok::<_, Error>(())
        })
        .await;
    assert!(matches!(swallowed, Err(Error::Aborted(_))), "{swallowed:?}");
    assert_eq!(count(&sessions).await, 1);
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn hooks_run_after_a_commit_and_not_after_a_rollback() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let sessions = sandbox.sessions();
    let ran = Arc::new(AtomicUsize::new(0));
    for commits in [true, false] {
        let ran = Arc::clone(&ran);
        let _: Result<(), Error> = sessions
            .transaction(async move |tx| {
                tx.execute("SELECT 1", &[]).await?;
                tx.on_commit(move || async move {
                    ran.fetch_add(1, SeqCst);
                });
                if commits { Ok(()) } else { Err(Error::StreamOpen) }
            })
            .await;
    }
    assert_eq!(ran.load(SeqCst), 1);
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn many_tasks_use_its_sessions_at_once() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let sessions = SessionManager::new(sandbox.config().max_size(8)).unwrap();
    insert(&sessions, 1).await.unwrap();
    let tasks: Vec<_> = (0..32)
        .map(|_| {
            let sessions = sessions.clone();
            tokio::spawn(async move {
                for _ in 0..4 {
                    sessions
                        .transaction(async |tx| {
                            let n: i64 = tx.query_one("SELECT n FROM t WHERE id = 1", &[]).await?.get(0);
                            tx.execute("UPDATE t SET n = $1 WHERE id = 1", &[&(n + 1)]).await?;
                            Ok::<_, Error>(())
                        })
                        .await?;
                    // And outside of any, at the same time.
                    sessions.acquire().await?.query("SELECT n FROM t", &[]).await?;
                }
                Ok::<_, Error>(())
            })
        })
        .collect();
    for task in tasks {
        within(task).await.unwrap().unwrap();
    }
    let session = sessions.acquire().await.unwrap();
    assert_eq!(text(&session, "SELECT n::text FROM t").await, "128");
    drop(session);
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn waiting_past_the_limit_is_an_error_that_says_why() {
    let database = database().await;
    let limit = Duration::from_millis(50);
    let sandbox = Sandbox::builder(database.database.url()).wait_limit(limit).start().await.unwrap();
    let sessions = sandbox.sessions();
    let mut holder = sessions.acquire().await.unwrap();
    let tx = holder.begin().await.unwrap();
    tx.execute("INSERT INTO t (id) VALUES (1)", &[]).await.unwrap();

    // Acquiring is not what waits.
    let session = within(sessions.acquire()).await.unwrap();
    let error = within(session.query("SELECT 1", &[])).await.unwrap_err();
    assert_eq!(error.code(), Some(&SqlState::LOCK_NOT_AVAILABLE));
    assert!(error.to_string().contains("another of its sessions is in a transaction"), "{error}");
    let error = within(session.batch_execute("SELECT 1")).await.unwrap_err();
    assert_eq!(error.code(), Some(&SqlState::LOCK_NOT_AVAILABLE));
    drop(session);
    let error = within(insert(&sessions, 2)).await.unwrap_err();
    assert_eq!(error.code(), Some(&SqlState::LOCK_NOT_AVAILABLE));

    tx.commit().await.unwrap();
    drop(holder);
    // What came after the refused BEGIN was refused with it, and did not run by itself.
    assert_eq!(count(&sessions).await, 1);
    insert(&sessions, 2).await.unwrap();
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn a_statement_sent_along_with_a_begin_that_must_wait_never_runs_outside() {
    let database = database().await;
    let limit = Duration::from_millis(50);
    let sandbox = Sandbox::builder(database.database.url()).wait_limit(limit).start().await.unwrap();
    let holder = connect(&sandbox.url()).await;
    holder.batch_execute("BEGIN; INSERT INTO t (id) VALUES (1)").await.unwrap();
    let other = connect(&sandbox.url()).await;
    let (begin, first, second) = within(async {
        tokio::join!(
            other.batch_execute("BEGIN"),
            other.batch_execute("INSERT INTO t (id) VALUES (2)"),
            other.batch_execute("INSERT INTO t (id) VALUES (3)"),
        )
    })
    .await;
    begin.unwrap();
    assert_eq!(code(&first.unwrap_err()), "55P03");
    assert_eq!(code(&second.unwrap_err()), "25P02");
    holder.batch_execute("COMMIT").await.unwrap();
    let error = other.batch_execute("INSERT INTO t (id) VALUES (4)").await.unwrap_err();
    assert_eq!(code(&error), "25P02");
    other.batch_execute("COMMIT").await.unwrap();
    assert_eq!(simple(&other, "SELECT id FROM t").await, ["1", "(1)"]);
    within(sandbox.finish()).await.unwrap();
}

// ---- constraints, modes, settings

#[tokio::test]
async fn a_deferred_constraint_fails_at_commit_with_its_name() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let sessions = sandbox.sessions();
    for _ in 0..2 {
        // Deferred again after it was checked.
        let error = sessions
            .transaction(async |tx| {
                tx.execute("INSERT INTO child (late) VALUES (7)", &[]).await?;
                tx.execute("INSERT INTO t (id) VALUES (1)", &[]).await?;
                Ok::<_, Error>(())
            })
            .await
            .unwrap_err();
        assert!(error.is_foreign_key_violation(), "{error}");
        assert_eq!(error.constraint(), Some("late_fk"));
        assert_eq!(count(&sessions).await, 0);
        sessions
            .transaction(async |tx| {
                tx.execute("INSERT INTO child (late) VALUES (1)", &[]).await?;
                tx.execute("INSERT INTO parent VALUES (1)", &[]).await?;
                tx.execute("DELETE FROM child", &[]).await?;
                tx.execute("DELETE FROM parent", &[]).await?;
                Ok::<_, Error>(())
            })
            .await
            .unwrap();
    }
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn a_deferred_constraint_fails_a_statement_outside_of_a_transaction() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let session = sandbox.sessions().acquire().await.unwrap();
    let error = session.execute("INSERT INTO child (late) VALUES (7)", &[]).await.unwrap_err();
    assert_eq!(error.constraint(), Some("late_fk"));
    let error = session.batch_execute("INSERT INTO child (late) VALUES (7)").await.unwrap_err();
    assert_eq!(error.constraint(), Some("late_fk"));
    assert_eq!(text(&session, "SELECT count(*)::text FROM child").await, "0");
    drop(session);
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn an_immediate_constraint_is_immediate_again_after_it_was_deferred() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let sessions = sandbox.sessions();
    for _ in 0..2 {
        sessions
            .transaction(async |tx| {
                let early = tx
                    .savepoint(async |sp| {
                        sp.execute("INSERT INTO child (soon) VALUES (1)", &[]).await?;
                        Ok::<_, Error>(())
                    })
                    .await;
                assert_eq!(early.unwrap_err().constraint(), Some("soon_fk"));
                tx.batch_execute("SET CONSTRAINTS ALL DEFERRED").await?;
                tx.execute("INSERT INTO child (soon) VALUES (1)", &[]).await?;
                tx.batch_execute("INSERT INTO parent VALUES (1); DELETE FROM child; DELETE FROM parent")
                    .await?;
                Ok::<_, Error>(())
            })
            .await
            .unwrap();
    }
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn a_serializable_transaction_is_one() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let mut session = sandbox.sessions().acquire().await.unwrap();
    let options = TransactionOptions::serializable().deferrable();
    let level = session
        .transaction_with(options, async |tx| {
            Ok::<_, Error>(tx.query_one("SHOW transaction_isolation", &[]).await?.get::<_, String>(0))
        })
        .await
        .unwrap();
    assert_eq!(level, "serializable");
    drop(session);
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn a_level_stronger_than_the_sandboxs_is_refused() {
    let database = database().await;
    let builder = Sandbox::builder(database.database.url());
    let sandbox = builder.isolation_level(IsolationLevel::ReadCommitted).start().await.unwrap();
    let mut session = sandbox.sessions().acquire().await.unwrap();
    for options in [TransactionOptions::serializable(), TransactionOptions::repeatable_read()] {
        let result = session.transaction_with(options, async |tx| {
            tx.execute("INSERT INTO t (id) VALUES (1)", &[]).await?;
            Ok::<_, Error>(())
        });
        let error = result.await.unwrap_err();
        assert_eq!(error.code(), Some(&SqlState::FEATURE_NOT_SUPPORTED), "{error}");
        let hint = error.db_error().and_then(|e| e.hint()).unwrap_or_default();
        assert!(hint.contains("isolation_level"), "{hint}");
    }
    let level = session
        .transaction_with(TransactionOptions::read_committed(), async |tx| {
            tx.batch_execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED").await?;
            Ok::<_, Error>(tx.query_one("SHOW transaction_isolation", &[]).await?.get::<_, String>(0))
        })
        .await
        .unwrap();
    assert_eq!(level, "read committed");
    drop(session);
    assert_eq!(count(&sandbox.sessions()).await, 0);
    // What others commit is seen at this level.
    database.run("INSERT INTO t (id) VALUES (1)").await;
    assert_eq!(count(&sandbox.sessions()).await, 1);
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn read_only_refuses_writes_and_ends_with_its_transaction() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let mut session = sandbox.sessions().acquire().await.unwrap();
    for commits in [true, false] {
        let read_only = TransactionOptions::new().read_only();
        let result: Result<(), Error> = session
            .transaction_with(read_only.clone(), async |tx| {
                tx.query("SELECT * FROM t", &[]).await?;
                if commits { Ok(()) } else { Err(Error::StreamOpen) }
            })
            .await;
        assert_eq!(result.is_ok(), commits);
        session.execute("INSERT INTO t (id) VALUES (1)", &[]).await.unwrap();
        let result = session.transaction_with(read_only, async |tx| {
            tx.execute("DELETE FROM t", &[]).await?;
            Ok::<_, Error>(())
        });
        let error = result.await.unwrap_err();
        assert_eq!(error.code(), Some(&SqlState::READ_ONLY_SQL_TRANSACTION), "{error}");
        session.execute("DELETE FROM t", &[]).await.unwrap();
    }
    drop(session);
    let plain = connect(&sandbox.url()).await;
    plain.batch_execute("BEGIN; SET TRANSACTION READ ONLY; SELECT 1; COMMIT").await.unwrap();
    let error =
        plain.batch_execute("BEGIN; SELECT 1; SET TRANSACTION READ ONLY; DELETE FROM t").await.unwrap_err();
    assert_eq!(code(&error), "25006");
    plain.batch_execute("ROLLBACK; DELETE FROM t").await.unwrap();
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn local_settings_end_with_their_transaction() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let sessions = sandbox.sessions();
    let mut session = sessions.acquire().await.unwrap();
    let mut seen = Vec::new();
    for options in [
        TransactionOptions::new()
            .local_setting("app.tenant", "O'Neil")
            .local_setting("search_path", "a, public"),
        TransactionOptions::new(),
    ] {
        let pair = session
            .transaction_with(options, async |tx| {
                let tenant = "SELECT coalesce(current_setting('app.tenant', true), '')";
                let tenant: String = tx.query_one(tenant, &[]).await?.get(0);
                let path: String = tx.query_one("SHOW search_path", &[]).await?.get(0);
                Ok::<_, Error>((tenant, path))
            })
            .await
            .unwrap();
        seen.push(pair);
    }
    let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
    assert_eq!(seen, [pair("O'Neil", "a, public"), pair("", "\"$user\", public")]);

    // By SET LOCAL, and by a prepared statement with the value as a parameter.
    for _ in 0..2 {
        session
            .transaction(async |tx| {
                tx.batch_execute("SET LOCAL app.a = 'x'; SET LOCAL TIME ZONE 'Asia/Tokyo'").await?;
                tx.query("SELECT set_config('app.b', $1, true)", &[&"y"]).await?;
                Ok::<_, Error>(())
            })
            .await
            .unwrap();
        let left = "SELECT current_setting('app.a', true) || current_setting('app.b', true)";
        assert_eq!(text(&session, left).await, "");
        assert_ne!(text(&session, "SHOW timezone").await, "Asia/Tokyo");
    }
    // A setting of the session stays, and one of the transaction does not hide it afterwards.
    session.batch_execute("SET app.a = 'session'").await.unwrap();
    session
        .transaction(async |tx| {
            tx.batch_execute("SET LOCAL app.a = 'local'").await?;
            Ok::<_, Error>(())
        })
        .await
        .unwrap();
    assert_eq!(text(&session, "SHOW app.a").await, "session");
    drop(session);
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn a_returned_session_is_reset() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let sessions = sandbox.sessions();
    let session = sessions.acquire().await.unwrap();
    session.batch_execute("SET app.a = 'left behind'; CREATE TEMP TABLE left_behind ()").await.unwrap();
    drop(session);
    until_returned(&sessions).await;
    let session = sessions.acquire().await.unwrap();
    assert_eq!(text(&session, "SELECT coalesce(current_setting('app.a', true), '')").await, "");
    assert_eq!(text(&session, "SELECT coalesce(to_regclass('left_behind')::text, 'none')").await, "none");
    drop(session);
    assert_eq!(sessions.status().size, 1, "it was not replaced");
    within(sandbox.finish()).await.unwrap();
}

// ---- what is given up

#[tokio::test]
async fn a_task_dropped_anywhere_leaves_nothing() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let sessions = SessionManager::new(sandbox.config().max_size(1)).unwrap();
    let mut completed = false;
    for left in 0..200 {
        let work = sessions.transaction(async |tx| {
            tx.execute("INSERT INTO t (id) VALUES (1)", &[]).await?;
            tx.savepoint(async |sp| {
                sp.execute("INSERT INTO t (id) VALUES (2)", &[]).await?;
                Ok::<_, Error>(())
            })
            .await?;
            tx.query("SELECT * FROM t", &[]).await?;
            Err::<(), _>(Error::StreamOpen)
        });
        completed = within(polls(work, left)).await.is_some();
        assert_eq!(within(count(&sessions)).await, 0, "after {left} polls");
        if completed {
            break;
        }
    }
    assert!(completed);
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn a_client_that_vanishes_in_a_transaction_is_rolled_back_and_what_it_ran_is_cancelled() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let other = connect(&sandbox.url()).await;
    let (client, connection) = tokio_postgres::connect(&sandbox.url(), tokio_postgres::NoTls).await.unwrap();
    let driver = tokio::spawn(connection);
    client.batch_execute("BEGIN; INSERT INTO t (id) VALUES (1)").await.unwrap();
    let pid: i32 = client.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    let sleep = tokio::spawn(async move { client.batch_execute("SELECT pg_sleep(100)").await });
    database.until_sleeping(pid).await;
    driver.abort();
    let begin = Instant::now();
    assert_eq!(within(simple(&other, "SELECT id FROM t")).await, ["(0)"]);
    assert!(begin.elapsed() < Duration::from_secs(5));
    assert!(within(sleep).await.unwrap().is_err());
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn a_client_that_vanishes_in_a_copy_leaves_nothing() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let other = connect(&sandbox.url()).await;
    for statement in ["COPY t FROM STDIN", "COPY t (id, n) FROM STDIN"] {
        let (client, connection) =
            tokio_postgres::connect(&sandbox.url(), tokio_postgres::NoTls).await.unwrap();
        let driver = tokio::spawn(connection);
        let sink = client.copy_in::<_, Bytes>(statement).await.unwrap();
        let mut sink = Box::pin(sink);
        sink.send(Bytes::from_static(b"1\t1\n")).await.unwrap();
        driver.abort();
        assert_eq!(within(simple(&other, "SELECT id FROM t")).await, ["(0)"]);
    }
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn cancelling_hits_nobody_else() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let sessions = SessionManager::new(sandbox.config().max_size(4)).unwrap();
    let sleepers = async {
        for i in 0..60u64 {
            let session = sessions.acquire().await.unwrap();
            let sleep = session.query("SELECT pg_sleep(100)", &[]);
            // Now while it waits for its turn, now while it runs, now just as it begins.
            let _ = tokio::time::timeout(Duration::from_micros(i * 150), sleep).await;
            drop(session);
        }
    };
    let workers = futures_util::future::join_all((0..3).map(|_| async {
        let client = connect(&sandbox.url()).await;
        for i in 0..100i32 {
            let row = client.query_one("SELECT $1 + 1", &[&i]).await.expect("not cancelled");
            assert_eq!(row.get::<_, i32>(0), i + 1);
        }
    }));
    within(async { tokio::join!(sleepers, workers) }).await;
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn a_cancel_request_for_one_that_waits_takes_it_out_of_the_queue() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let holder = connect(&sandbox.url()).await;
    holder.batch_execute("BEGIN; INSERT INTO t (id) VALUES (1)").await.unwrap();
    let other = connect(&sandbox.url()).await;
    let token = other.cancel_token();
    let mut waiting = pin!(other.batch_execute("SELECT 1"));
    // Cancels that come too early concern nothing.
    let error = within(async {
        loop {
            tokio::select! {
                result = &mut waiting => return result.unwrap_err(),
                () = async { token.cancel_query(tokio_postgres::NoTls).await.unwrap() } => {}
            }
        }
    })
    .await;
    assert_eq!(code(&error), "57014");
    holder.batch_execute("COMMIT").await.unwrap();
    assert_eq!(simple(&other, "SELECT id FROM t").await, ["1", "(1)"]);
    // And for one that does nothing, it does nothing.
    token.cancel_query(tokio_postgres::NoTls).await.unwrap();
    other.batch_execute("SELECT 1").await.unwrap();
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn a_row_stream_dropped_early_leaves_the_session_usable() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let session = sandbox.sessions().acquire().await.unwrap();
    for _ in 0..3 {
        let rows =
            session.query_stream("SELECT n, repeat('x', 1000) FROM generate_series(1, 1000000) n", &[]);
        let mut rows = pin!(rows.await.unwrap());
        let first: i32 = rows.next().await.unwrap().unwrap().get(0);
        assert_eq!(first, 1);
    }
    assert_eq!(within(text(&session, "SELECT 'well'")).await, "well");
    drop(session);
    within(sandbox.finish()).await.unwrap();
}

// ---- the protocol

#[tokio::test]
async fn copy_goes_both_ways() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let client = connect(&sandbox.url()).await;
    const ROWS: usize = 200_000;
    for _ in 0..2 {
        let mut sink = pin!(client.copy_in::<_, Bytes>("COPY t (id) FROM STDIN").await.unwrap());
        for chunk in (0..ROWS).collect::<Vec<_>>().chunks(1000) {
            let lines: String = chunk.iter().map(|id| format!("{id}\n")).collect();
            within(sink.send(lines.into())).await.unwrap();
        }
        assert_eq!(within(sink.finish()).await.unwrap(), ROWS as u64);
        let mut out = pin!(client.copy_out("COPY (SELECT id FROM t ORDER BY id) TO STDOUT").await.unwrap());
        let mut bytes = 0;
        while let Some(chunk) = within(out.next()).await {
            bytes += chunk.unwrap().len();
        }
        assert_eq!(bytes, (0..ROWS).map(|id| id.to_string().len() + 1).sum::<usize>());
        client.batch_execute("TRUNCATE t").await.unwrap();
    }
    // One that fails in its middle, one that fails at its start, and one that is given up.
    let mut sink = pin!(client.copy_in::<_, Bytes>("COPY t (id) FROM STDIN").await.unwrap());
    sink.send(Bytes::from_static(b"not a number\n")).await.unwrap();
    assert_eq!(code(&within(sink.finish()).await.unwrap_err()), "22P02");
    // The driver loses step over it, as it does with a server; the crate's own session knows.
    let sessions = sandbox.sessions();
    let session = sessions.acquire().await.unwrap();
    let error = session.copy_in("COPY missing FROM STDIN").await.err().unwrap();
    assert_eq!(error.code(), Some(&SqlState::UNDEFINED_TABLE));
    drop(session);
    assert_eq!(within(count(&sessions)).await, 0);
    let mut given_up = Box::pin(client.copy_in::<_, Bytes>("COPY t (id) FROM STDIN").await.unwrap());
    given_up.send(Bytes::from_static(b"1\n")).await.unwrap();
    drop(given_up);
    assert_eq!(within(simple(&client, "SELECT id FROM t")).await, ["(0)"]);
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let client = connect(&sandbox.url()).await;
    let statement = client.prepare("SELECT $1::int4, repeat('x', 10000)").await.unwrap();
    let answers = (0..500i32).map(|i| {
        let (client, statement) = (&client, &statement);
        async move { client.query_one(statement, &[&i]).await.map(|row| row.get::<_, i32>(0)) }
    });
    let answers = within(futures_util::future::try_join_all(answers)).await.unwrap();
    assert_eq!(answers, (0..500).collect::<Vec<_>>());
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn a_simple_query_of_many_statements_is_what_it_is_on_a_server() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let own = self::database().await;
    let (server, virtual_) = (connect(own.database.url()).await, connect(&sandbox.url()).await);
    for sql in [
        "",
        ";",
        "SELECT 1; SELECT ';'; SELECT $$;$$",
        "INSERT INTO t (id) VALUES (1), (2); SELECT count(*) FROM t",
        "INSERT INTO t (id) VALUES (9); SELECT 1/0; SELECT 1",
        "SELECT count(*) FROM t",
        "BEGIN; INSERT INTO t (id) VALUES (3); COMMIT; SELECT count(*) FROM t",
        "BEGIN; DELETE FROM t; SELECT count(*) FROM t; ROLLBACK; SELECT count(*) FROM t",
        "INSERT INTO t (id) VALUES (4); BEGIN; SELECT count(*) FROM t; ROLLBACK; SELECT count(*) FROM t",
        "START TRANSACTION; SAVEPOINT a; DELETE FROM t; ROLLBACK TO a; RELEASE a; COMMIT AND NO CHAIN",
        "BEGIN; SELECT 1/0; COMMIT",
        "SELECT 1",
        "COMMIT",
        "SELECT count(*) FROM t",
        "BEGIN",
        "SELECT nonsense",
        "BEGIN",
        "ROLLBACK",
        "BEGIN; SELECT 1/0",
        "COMMIT",
        "BEGIN",
        "BEGIN",
        "END",
        "ROLLBACK",
        "INSERT INTO t (id) VALUES (5); COMMIT; SELECT 1/0",
        "INSERT INTO t (id) VALUES (6); ROLLBACK; SELECT count(*) FROM t",
        "SAVEPOINT a",
        "SELECT 1; SAVEPOINT a",
        "BEGIN; SAVEPOINT a; SELECT 1/0",
        "ROLLBACK TO a; SELECT 1",
        "ABORT WORK",
        "BEGIN READ ONLY; DELETE FROM t",
        "END",
        "BEGIN; DECLARE c CURSOR FOR SELECT id FROM t; COMMIT",
        "BEGIN; DECLARE c CURSOR FOR SELECT id FROM t ORDER BY id; FETCH c; COMMIT",
        "FETCH c",
        "DECLARE h CURSOR WITH HOLD FOR SELECT id FROM t ORDER BY id",
        "FETCH h",
        "CLOSE h",
        "SET TRANSACTION READ ONLY; SELECT 1",
        "CREATE FUNCTION f() RETURNS bigint LANGUAGE sql BEGIN ATOMIC SELECT 1; SELECT count(*) FROM t; END; SELECT f()",
        "SELECT 1; nonsense",
        "BEGIN nonsense",
        "/* a; */ SELECT 1 -- b;\n; SELECT E'\\';'",
        "SELECT count(*) FROM t",
    ] {
        let mut answers = Vec::new();
        for client in [&server, &virtual_] {
            let answer = match within(client.simple_query(sql)).await {
                Ok(messages) => messages
                    .iter()
                    .map(|message| match message {
                        SimpleQueryMessage::Row(row) => row.get(0).unwrap_or("NULL").to_owned(),
                        SimpleQueryMessage::CommandComplete(n) => format!("({n})"),
                        _ => "columns".to_owned(),
                    })
                    .collect(),
                Err(error) => vec![format!("{} {}", code(&error), error.as_db_error().unwrap().message())],
            };
            // Whether it is in a transaction shows in whether savepoints can be had.
            let inside = client.simple_query("SAVEPOINT probe; RELEASE probe").await.map(drop);
            answers.push((answer, inside.map_err(|error| code(&error).to_owned())));
        }
        assert_eq!(answers[0], answers[1], "{sql}");
    }
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn statements_of_the_same_name_are_not_mixed_up_and_go_with_their_session() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let mut left = Vec::new();
    for round in 0..3 {
        let clients = [connect(&sandbox.url()).await, connect(&sandbox.url()).await];
        for (i, client) in clients.iter().enumerate() {
            let statement = client.prepare(&format!("SELECT {i}")).await.unwrap();
            let row = client.query_one(&statement, &[]).await.unwrap();
            assert_eq!(row.get::<_, i32>(0) as usize, i);
            left.push(statement); // so that it is never closed
        }
        drop(clients);
        let watcher = connect(&sandbox.url()).await;
        let sql = "SELECT count(*) FROM pg_prepared_statements WHERE NOT from_sql";
        within(async {
            while simple(&watcher, sql).await[0] != "0" {
                tokio::task::yield_now().await;
            }
        })
        .await;
        assert!(round < 3);
    }
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn portals_are_read_in_parts() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let mut client = connect(&sandbox.url()).await;
    let tx = client.transaction().await.unwrap();
    let portal = tx.bind("SELECT * FROM generate_series(1, 5)", &[]).await.unwrap();
    for expected in [&[1, 2][..], &[3, 4], &[5]] {
        let rows = tx.query_portal(&portal, 2).await.unwrap();
        assert_eq!(rows.iter().map(|row| row.get::<_, i32>(0)).collect::<Vec<_>>(), expected);
    }
    tx.commit().await.unwrap();
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn a_role_with_few_rights_and_a_role_for_one_transaction_do() {
    let database = database().await;
    let role = format!("role_of_{}", database.database.name());
    database
        .run(&format!(
            "CREATE ROLE {role} LOGIN; GRANT ALL ON ALL TABLES IN SCHEMA public TO {role};
             CREATE SCHEMA hidden; CREATE TABLE hidden.t (id int UNIQUE DEFERRABLE);"
        ))
        .await;
    // Its sessions are not the superuser's, to whom all is allowed.
    let limited =
        Sandbox::start(&database.database.url().replace("postgres@", &format!("{role}@"))).await.unwrap();
    insert(&limited.sessions(), 1).await.unwrap();
    within(limited.finish()).await.unwrap();

    let sandbox = sandbox(&database).await;
    let client = connect(&sandbox.url()).await;
    client
        .batch_execute(&format!("BEGIN; SET LOCAL ROLE {role}; INSERT INTO t (id) VALUES (1); COMMIT"))
        .await
        .unwrap();
    assert_eq!(simple(&client, "SELECT current_user").await, ["postgres", "(1)"]);
    // Constraints are as they were, also where that role cannot look.
    client.batch_execute("BEGIN; INSERT INTO hidden.t VALUES (1)").await.unwrap();
    let error = client.batch_execute("INSERT INTO hidden.t VALUES (1)").await.unwrap_err();
    assert_eq!(code(&error), "23505");
    client.batch_execute("ROLLBACK").await.unwrap();
    within(sandbox.finish()).await.unwrap();
    database.run(&format!("DROP OWNED BY {role}; DROP ROLE {role}")).await;
}

/// A client that speaks the protocol by hand, where the driver would choose for itself.
struct Raw(tokio::net::TcpStream);

impl Raw {
    async fn connect(sandbox: &Sandbox, database: &Database) -> Self {
        let url = sandbox.url();
        let address = url.split(['@', '/']).nth(3).expect("an address");
        let mut stream = tokio::net::TcpStream::connect(address).await.expect("a socket");
        let parameters = format!("user\0postgres\0database\0{}\0\0", database.database.name());
        let length = i32::try_from(parameters.len() + 8).expect("short");
        stream
            .write_all(&[&length.to_be_bytes(), &196_608i32.to_be_bytes(), parameters.as_bytes()].concat())
            .await
            .unwrap();
        let mut raw = Self(stream);
        raw.until(b'Z').await;
        raw
    }

    async fn send(&mut self, messages: &[(u8, &[u8])]) {
        for (tag, body) in messages {
            let length = i32::try_from(body.len() + 4).expect("short");
            self.0.write_all(&[&[*tag][..], &length.to_be_bytes(), body].concat()).await.unwrap();
        }
    }

    /// The tags and bodies up to one of this tag.
    async fn until(&mut self, last: u8) -> Vec<(u8, Vec<u8>)> {
        let mut frames = Vec::new();
        within(async {
            while frames.last().is_none_or(|(tag, _)| *tag != last) {
                let tag = self.0.read_u8().await.expect("an answer");
                let length = self.0.read_i32().await.expect("a length");
                let mut body = vec![0; usize::try_from(length).expect("a length") - 4];
                self.0.read_exact(&mut body).await.expect("a body");
                frames.push((tag, body));
            }
        })
        .await;
        frames
    }
}

fn tags(frames: &[(u8, Vec<u8>)]) -> String {
    frames.iter().map(|(tag, _)| char::from(*tag)).collect()
}

#[tokio::test]
async fn clients_may_choose_the_same_names() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let mut clients = [Raw::connect(&sandbox, &database).await, Raw::connect(&sandbox, &database).await];
    for (client, sql) in clients.iter_mut().zip(["x\0SELECT 'one'\0\0\0", "x\0SELECT 'two'\0\0\0"]) {
        client.send(&[(b'P', sql.as_bytes()), (b'D', b"Sx\0"), (b'S', b"")]).await;
        assert_eq!(tags(&client.until(b'Z').await), "1tTZ");
    }
    for (client, value) in clients.iter_mut().zip([b"one", b"two"]) {
        for _ in 0..2 {
            client
                .send(&[
                    (b'B', b"p\0x\0\0\0\0\0\0\0"),
                    (b'H', b""),
                    (b'E', b"p\0\0\0\0\0"),
                    (b'C', b"Pp\0"),
                    (b'S', b""),
                ])
                .await;
            let answer = client.until(b'Z').await;
            assert_eq!(tags(&answer), "2DC3Z");
            assert!(answer[1].1.ends_with(value));
        }
    }
    // An error skips what follows, up to Sync; and what is refused here does, too.
    let client = &mut clients[0];
    for sql in [&b"\0nonsense\0\0\0"[..], b"\0COMMIT\0\0\0"] {
        let bind = &b"\0x\0\0\0\0\0\0\0"[..];
        client.send(&[(b'B', bind), (b'P', sql), (b'B', bind), (b'E', b"\0\0\0\0\0"), (b'S', b"")]).await;
        assert_eq!(tags(&client.until(b'Z').await), "2EZ");
    }
    client.send(&[(b'C', b"Sx\0"), (b'S', b"")]).await;
    assert_eq!(tags(&client.until(b'Z').await), "3Z");
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn a_sync_before_the_data_of_a_copy_is_ignored_whenever_it_comes() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let mut client = Raw::connect(&sandbox, &database).await;
    let start: &[(u8, &[u8])] =
        &[(b'P', b"\0COPY t (id) FROM STDIN\0\0\0"), (b'B', b"\0\0\0\0\0\0\0\0"), (b'E', b"\0\0\0\0\0")];
    let data: &[(u8, &[u8])] = &[(b'd', b"1\n"), (b'c', b""), (b'S', b"")];
    let sync: &[(u8, &[u8])] = &[(b'S', b""), (b'H', b"")];
    for early in [true, false] {
        client.send(start).await;
        if early {
            client.send(&sync[..1]).await;
        } else {
            client.send(&sync[1..]).await;
        }
        assert_eq!(tags(&client.until(b'G').await), "12G");
        if !early {
            client.send(sync).await;
        }
        client.send(data).await;
        assert_eq!(tags(&client.until(b'Z').await), "CZ");
        client.send(&[(b'Q', b"DELETE FROM t\0")]).await;
        assert_eq!(client.until(b'Z').await[0].1, b"DELETE 1\0");
    }
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn what_would_reach_the_outer_transaction_is_refused() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let client = connect(&sandbox.url()).await;
    client.batch_execute("INSERT INTO t (id) VALUES (1)").await.unwrap();
    for sql in
        ["BEGIN", "COMMIT", "/**/ ROLLBACK", "START TRANSACTION", "END", "PREPARE TRANSACTION 'x'", "ABORT"]
    {
        let error = client.prepare(sql).await.unwrap_err();
        assert_eq!(code(&error), "0A000", "{sql}");
    }
    for sql in [
        "BEGIN; COMMIT AND CHAIN",
        "BEGIN; ROLLBACK AND CHAIN",
        "BEGIN; PREPARE TRANSACTION 'x'",
        "COMMIT PREPARED 'x'",
        "DEALLOCATE ALL",
        "COMMIT nonsense",
    ] {
        let error = client.batch_execute(sql).await.unwrap_err();
        assert_eq!(code(&error), "0A000", "{sql}");
        client.batch_execute("ROLLBACK").await.unwrap();
    }
    let error = client.batch_execute("DO 'BEGIN COMMIT; END'").await.unwrap_err();
    assert_eq!(code(&error), "2D000");
    assert_eq!(simple(&client, "SELECT id FROM t").await, ["1", "(1)"]);
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn a_client_of_another_role_or_database_is_not_let_in() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let url = sandbox.url();
    for wrong in [url.replace("postgres@", "someone@"), url.replace(database.database.name(), "postgres")] {
        let error = tokio_postgres::connect(&wrong, tokio_postgres::NoTls).await.err().unwrap();
        assert_eq!(code(&error), "28000", "{error}");
    }
    let client = connect(&url).await;
    assert_eq!(simple(&client, "SHOW server_encoding").await, ["UTF8", "(0)"]);
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn a_sandbox_that_cannot_be_opened_says_why() {
    let database = database().await;
    let url = database.database.url();
    let error = Sandbox::start("mysql://x").await.unwrap_err();
    assert!(matches!(error, SandboxError::Config(_)), "{error}");
    let error = Sandbox::start(&url.replace(database.database.name(), "missing")).await.unwrap_err();
    assert!(matches!(&error, SandboxError::LogIn(e) if code(e) == "3D000"), "{error}");
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = Sandbox::start(&format!("postgres://postgres@{nobody}/x")).await.unwrap_err();
    assert!(matches!(error, SandboxError::Io { .. }), "{error}");
}

#[tokio::test]
async fn a_server_that_asks_for_a_password_gets_it_and_the_sandbox_asks_for_none() {
    use pg_session::testing::PgServer;
    let server = PgServer::builder().setting("password_encryption", "scram-sha-256").start().unwrap();
    let admin = connect(&server.url()).await;
    admin.batch_execute("ALTER ROLE postgres PASSWORD 'p@ss:word'").await.unwrap();
    std::fs::write(server.data_dir().join("pg_hba.conf"), "host all all 127.0.0.1/32 scram-sha-256\n")
        .unwrap();
    admin.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    let url = server.url();
    within(async {
        // Until the new rules are in force.
        while tokio_postgres::connect(&url, tokio_postgres::NoTls).await.is_ok() {}
    })
    .await;
    let error = Sandbox::start(&url).await.unwrap_err();
    assert!(matches!(error, SandboxError::LogIn(_)), "{error}");
    let url = url.replace("postgres@", "postgres:p%40ss%3Aword@");
    let sandbox = Sandbox::start(&url).await.unwrap();
    assert!(!format!("{sandbox:?} {:?} {}", Sandbox::builder(&url), sandbox.url()).contains("word"));
    let session = sandbox.sessions().acquire().await.unwrap();
    assert_eq!(text(&session, "SELECT 'in'").await, "in");
    drop(session);
    let proxy = pg_session::testing::FaultProxy::start(&url).await.unwrap();
    assert!(!format!("{proxy:?}").contains("word"));
    let client = connect(&proxy.url()).await;
    assert_eq!(simple(&client, "SELECT 'in'").await, ["in", "(1)"]);
    within(sandbox.finish()).await.unwrap();
}
