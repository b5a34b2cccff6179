//! A sandbox: what its sessions see of each other, that it keeps transactions as a server does, and that nothing is left.
#![cfg(feature = "testing")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use common::sandbox::{code, count, database, insert, outside, sandbox, simple, text};
use common::{connect, until_returned, within};
use pg_session::testing::{Sandbox, SandboxError};
use pg_session::tokio_postgres::error::SqlState;
use pg_session::{Error, IsolationLevel, SessionManager, TransactionOptions};

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
    database.until_ended(pid).await;
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
    database.until_ended(pid).await;
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
