//! Retries: what is run again, how often, and what can never be.
#![cfg(feature = "testing")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::Duration;

use common::proxy::{AtCommit, Proxy};
use common::{Database, within};
use pg_session::testing::PgServer;
use pg_session::{Error, RetryClass, RetryPolicy, SessionManager, TransactionOptions};
use tokio::sync::{Barrier, Notify};

fn fast() -> RetryPolicy {
    RetryPolicy::default().base_delay(Duration::from_millis(1)).max_delay(Duration::from_millis(5))
}

/// An application's error that hides what it came from.
#[derive(Debug)]
struct Opaque;

impl From<Error> for Opaque {
    fn from(_: Error) -> Self {
        Self
    }
}

/// Raises this SQLSTATE.
fn raise(code: &str) -> String {
    format!("DO $$ BEGIN RAISE SQLSTATE '{code}' USING MESSAGE = 'raised'; END $$")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn write_skew_is_retried_until_both_succeed() {
    let db = Database::new().await;
    db.run("CREATE TABLE doctors (name text PRIMARY KEY, on_call bool)").await;
    for wrap in [false, true] {
        db.run("TRUNCATE doctors; INSERT INTO doctors VALUES ('a', true), ('b', true)").await;
        let sessions = db.sessions();
        let both_read = Arc::new(Barrier::new(2));
        let runs = Arc::new(AtomicU32::new(0));
        let leave = |name: &'static str| {
            let (sessions, both_read, runs) = (sessions.clone(), Arc::clone(&both_read), Arc::clone(&runs));
            tokio::spawn(async move {
                let options = TransactionOptions::serializable().retry(fast());
                sessions
                    .transaction_with(options, async |tx| {
                        runs.fetch_add(1, SeqCst);
                        let row = tx.query_one("SELECT count(*) FROM doctors WHERE on_call", &[]).await?;
                        if tx.attempt() == 1 {
                            both_read.wait().await;
                        }
                        if row.get::<_, i64>(0) > 1 {
                            let sql = "UPDATE doctors SET on_call = false WHERE name = $1";
                            let result = tx.execute(sql, &[&name]).await;
                            if wrap {
                                result.map_err(|_| Opaque)?;
                            } else {
                                let _ = result; // swallowed
                            }
                        }
                        Ok::<_, Opaque>(())
                    })
                    .await
            })
        };
        let (a, b) = tokio::join!(leave("a"), leave("b"));
        a.unwrap().unwrap();
        b.unwrap().unwrap();
        assert_eq!(runs.load(SeqCst), 3, "one of them ran twice");
        assert_eq!(db.number("SELECT count(*) FROM doctors WHERE on_call").await, 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deadlock_is_retried_until_both_succeed() {
    let db = Database::new().await;
    db.run("CREATE TABLE t (id int PRIMARY KEY, a int); INSERT INTO t VALUES (1, 0), (2, 0)").await;
    let sessions = db.sessions();
    let both_locked = Arc::new(Barrier::new(2));
    let runs = Arc::new(AtomicU32::new(0));
    let one_done = Arc::new(Notify::new());
    let update = |first: i32, second: i32| {
        let (sessions, both_locked, runs) = (sessions.clone(), Arc::clone(&both_locked), Arc::clone(&runs));
        let one_done = Arc::clone(&one_done);
        tokio::spawn(async move {
            let options = TransactionOptions::new().retry(fast()).local_setting("deadlock_timeout", "10ms");
            sessions
                .transaction_with(options, async |tx| {
                    runs.fetch_add(1, SeqCst);
                    if tx.attempt() > 1 {
                        // Else it might take its row again before the other one, set free, is awake: a new deadlock.
                        one_done.notified().await;
                    }
                    tx.execute("UPDATE t SET a = a + 1 WHERE id = $1", &[&first]).await?;
                    if tx.attempt() == 1 {
                        both_locked.wait().await;
                    }
                    tx.execute("UPDATE t SET a = a + 1 WHERE id = $1", &[&second]).await
                })
                .await?;
            one_done.notify_one();
            Ok::<_, Error>(())
        })
    };
    let (a, b) = tokio::join!(update(1, 2), update(2, 1));
    a.unwrap().unwrap();
    b.unwrap().unwrap();
    assert_eq!(runs.load(SeqCst), 3);
    assert_eq!(db.number("SELECT sum(a) FROM t").await, 4);
}

#[tokio::test]
async fn a_serialization_failure_of_commit_itself_is_retried() {
    let db = Database::new().await;
    // Raises when the transaction commits, twice.
    db.run(
        "CREATE TABLE t (a int); CREATE SEQUENCE s;
         CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN IF nextval('s') < 3 THEN RAISE SQLSTATE '40001'; END IF; RETURN NULL; END $$;
         CREATE CONSTRAINT TRIGGER c AFTER INSERT ON t DEFERRABLE INITIALLY DEFERRED
         FOR EACH ROW EXECUTE FUNCTION f()",
    )
    .await;
    let mut session = db.sessions().acquire().await.unwrap();
    let runs = AtomicU32::new(0);
    session
        .transaction_with(TransactionOptions::new().retry(fast()), async |tx| {
            runs.fetch_add(1, SeqCst);
            tx.execute("INSERT INTO t VALUES (1)", &[]).await
        })
        .await
        .unwrap();
    assert_eq!(runs.load(SeqCst), 3);
    assert_eq!(db.number("SELECT count(*) FROM t").await, 1);
}

#[tokio::test]
async fn each_code_is_retried_as_the_table_says() {
    let db = Database::new().await;
    let mut session = db.sessions().acquire().await.unwrap();
    let policy = fast().max_attempts(3);
    for (code, class) in [
        ("40001", None),
        ("40P01", None),
        ("55P03", Some(RetryClass::LockNotAvailable)),
        ("23505", Some(RetryClass::KeyConflict)),
        ("23P01", Some(RetryClass::KeyConflict)),
    ] {
        let sql = raise(code);
        let count = async |session: &mut pg_session::Session, policy: RetryPolicy| {
            let runs = AtomicU32::new(0);
            let options = TransactionOptions::new().retry(policy);
            let error = session
                .transaction_with(options, async |tx| {
                    runs.fetch_add(1, SeqCst);
                    tx.batch_execute(&sql).await
                })
                .await
                .unwrap_err();
            assert_eq!(error.code().unwrap().code(), code);
            (runs.load(SeqCst), matches!(error, Error::RetriesExhausted { attempts: 3, .. }))
        };
        if let Some(class) = class {
            assert_eq!(count(&mut session, policy.clone()).await, (1, false), "{code} by default");
            assert_eq!(
                count(&mut session, policy.clone().retry_on(class)).await,
                (3, true),
                "{code} if asked"
            );
        } else {
            assert_eq!(count(&mut session, policy.clone()).await, (3, true), "{code} by default");
            let none = policy.clone().no_retry_on(RetryClass::of(code).unwrap());
            assert_eq!(count(&mut session, none).await, (1, false), "{code} if not asked");
            assert_eq!(count(&mut session, RetryPolicy::never()).await, (1, false), "{code} never");
        }
    }
    for code in ["22012", "42601", "23503", "57014", "25006", "40003", "P0001", "26001", "53100"] {
        let runs = AtomicU32::new(0);
        let sql = raise(code);
        let error = session
            .transaction_with(TransactionOptions::new().retry(policy.clone()), async |tx| {
                runs.fetch_add(1, SeqCst);
                tx.batch_execute(&sql).await
            })
            .await
            .unwrap_err();
        assert_eq!(runs.load(SeqCst), 1, "{code}");
        assert!(matches!(error, Error::Database(_)), "{code}: {error:?}");
    }
}

#[tokio::test]
async fn the_users_error_is_returned_when_it_is_not_retried() {
    let db = Database::new().await;
    let mut session = db.sessions().acquire().await.unwrap();
    let sql = raise("40001");
    let options = TransactionOptions::new().retry(RetryPolicy::never());
    let error: Result<(), Opaque> =
        session.transaction_with(options, async |tx| Ok(tx.batch_execute(&sql).await?)).await;
    assert!(matches!(error, Err(Opaque)));
}

#[tokio::test]
async fn joined_statements_cannot_hide_the_root_cause() {
    let db = Database::new().await;
    let mut session = db.sessions().acquire().await.unwrap();
    let runs = AtomicU32::new(0);
    let fail = raise("40001");
    session
        .transaction_with(TransactionOptions::new().retry(fast()), async |tx| {
            let run = runs.fetch_add(1, SeqCst);
            tx.execute("SELECT 1", &[]).await?;
            if run < 2 {
                // The second is polled first once both are answered, so that its 25P02 is what the join reports, and
                // the first's future is dropped unread.
                let root = tx.batch_execute(&fail);
                let symptom = tx.execute("SELECT 1", &[]);
                let (mut root, mut symptom) = (Box::pin(root), Box::pin(symptom));
                std::future::poll_fn(|cx| {
                    assert!(root.as_mut().poll(cx).is_pending());
                    std::task::Poll::Ready(())
                })
                .await;
                let error = symptom.as_mut().await.unwrap_err();
                assert!(error.is_serialization_failure(), "{error:?}");
                drop(root);
                return Err(Opaque);
            }
            Ok(())
        })
        .await
        .unwrap();
    assert_eq!(runs.load(SeqCst), 3);
}

#[tokio::test]
async fn try_join_is_retried_whichever_failed_first() {
    let db = Database::new().await;
    let mut session = db.sessions().acquire().await.unwrap();
    let runs = AtomicU32::new(0);
    let fail = raise("40001");
    session
        .transaction_with(TransactionOptions::new().retry(fast()), async |tx| {
            let run = runs.fetch_add(1, SeqCst);
            let first = async { if run < 3 { tx.batch_execute(&fail).await } else { Ok(()) } };
            tokio::try_join!(first, tx.execute("SELECT pg_sleep(0.001)", &[]), tx.execute("SELECT 2", &[]))?;
            Ok::<_, Opaque>(())
        })
        .await
        .unwrap();
    assert_eq!(runs.load(SeqCst), 4);
}

#[tokio::test]
async fn a_serialization_failure_inside_a_savepoint_runs_the_outermost_again() {
    let db = Database::new().await;
    let mut session = db.sessions().acquire().await.unwrap();
    let (outer, inner) = (AtomicU32::new(0), AtomicU32::new(0));
    let fail = raise("40001");
    session
        .transaction_with(TransactionOptions::new().retry(fast()), async |tx| {
            let run = outer.fetch_add(1, SeqCst);
            tx.savepoint(async |sp| {
                inner.fetch_add(1, SeqCst);
                if run == 0 { sp.batch_execute(&fail).await.map_err(Opaque::from) } else { Ok(()) }
            })
            .await
        })
        .await
        .unwrap();
    assert_eq!((outer.load(SeqCst), inner.load(SeqCst)), (2, 2));
}

#[tokio::test]
async fn attempts_and_time_are_limited() {
    let db = Database::new().await;
    let sessions = db.single();
    let sql = raise("40001");
    let slow = RetryPolicy::default()
        .max_attempts(1000)
        .base_delay(Duration::from_secs(600))
        .max_delay(Duration::from_secs(600));
    let short = slow.clone().base_delay(Duration::from_millis(1)).max_elapsed(Duration::from_millis(50));
    let error = sessions
        .transaction_with(TransactionOptions::new().retry(short), async |tx| tx.batch_execute(&sql).await)
        .await
        .unwrap_err();
    assert!(matches!(error, Error::RetriesExhausted { attempts: 2.., .. }), "{error:?}");
    let options = TransactionOptions::new().retry(slow.max_elapsed(Duration::from_secs(3600)));
    let error = within(sessions.transaction_with(options.deadline(Duration::from_millis(50)), async |tx| {
        tx.batch_execute(&sql).await
    }))
    .await
    .unwrap_err();
    assert!(matches!(error, Error::DeadlineExceeded { attempts: 1, .. }), "{error:?}");
    assert!(error.is_timeout());
    db.until_quiet().await;
}

#[tokio::test]
async fn a_deadline_cuts_the_closure_and_frees_the_server() {
    let db = Database::new().await;
    db.run("CREATE TABLE t (a int)").await;
    let sessions = db.single();
    let options = TransactionOptions::new().deadline(Duration::from_millis(50));
    let error = within(sessions.transaction_with(options, async |tx| {
        tx.execute("INSERT INTO t VALUES (1)", &[]).await?;
        tx.execute("SELECT pg_sleep(600)", &[]).await
    }))
    .await
    .unwrap_err();
    assert!(matches!(error, Error::DeadlineExceeded { attempts: 1, .. }), "{error:?}");
    let session = within(sessions.acquire()).await.unwrap();
    session.execute("SELECT 1", &[]).await.unwrap();
    db.until_quiet().await;
    assert_eq!(db.number("SELECT count(*) FROM t").await, 0);
}

#[tokio::test]
async fn no_session_is_held_through_a_long_pause() {
    let db = Database::new().await;
    let sessions = db.single();
    let sql = raise("40001");
    let policy = RetryPolicy::default()
        .base_delay(Duration::from_secs(3600))
        .max_delay(Duration::from_secs(3600))
        .max_elapsed(Duration::from_secs(7200));
    let task = tokio::spawn({
        let sessions = sessions.clone();
        async move {
            let options = TransactionOptions::new().retry(policy);
            sessions.transaction_with(options, async |tx| tx.batch_execute(&sql).await).await
        }
    });
    // The only session is to be had while the transaction waits to be run again.
    db.until("EXISTS (SELECT FROM pg_stat_activity WHERE query LIKE '%RAISE SQLSTATE%' AND pid <> pg_backend_pid())")
        .await;
    let session = within(sessions.acquire()).await.unwrap();
    session.execute("SELECT 1", &[]).await.unwrap();
    task.abort();
}

#[tokio::test]
async fn a_connection_lost_before_commit_is_replaced_if_asked() {
    let db = Database::new().await;
    db.run("CREATE TABLE t (a int)").await;
    let sessions = db.single();
    let attempt = async |policy: RetryPolicy| {
        let runs = AtomicU32::new(0);
        let result = sessions
            .transaction_with(TransactionOptions::new().retry(policy), async |tx| {
                let run = runs.fetch_add(1, SeqCst);
                tx.execute("INSERT INTO t VALUES (1)", &[]).await?;
                if run == 0 {
                    db.run(&format!("SELECT pg_terminate_backend({})", tx.process_id())).await;
                }
                tx.execute("INSERT INTO t VALUES (2)", &[]).await
            })
            .await;
        (runs.load(SeqCst), result)
    };
    let (runs, result) = attempt(fast()).await;
    assert_eq!(runs, 1);
    let error = result.unwrap_err();
    assert!(error.is_connection_lost(), "{error:?}");
    assert_eq!(error.code().unwrap().code(), "57P01");
    let (runs, result) = attempt(fast().retry_on(RetryClass::ConnectionLost)).await;
    assert_eq!((runs, result.unwrap()), (2, 1));
    assert_eq!(db.number("SELECT count(*) FROM t").await, 2);
}

#[tokio::test]
async fn a_server_that_is_away_for_a_moment_is_waited_for_if_asked() {
    let mut server = PgServer::start().unwrap();
    let sessions = SessionManager::new(server.url().parse().unwrap()).unwrap();
    server.kill().unwrap();
    let once = TransactionOptions::new().retry(fast());
    let error =
        sessions.transaction_with(once, async |tx| tx.execute("SELECT 1", &[]).await).await.unwrap_err();
    assert!(matches!(error, Error::Connect(_)), "{error:?}");
    let patient = fast().max_attempts(3).retry_on(RetryClass::ConnectionLost);
    let options = TransactionOptions::new().retry(patient.clone());
    let error =
        sessions.transaction_with(options, async |tx| tx.execute("SELECT 1", &[]).await).await.unwrap_err();
    assert!(matches!(error, Error::Connect(_)), "{error:?}");
    let options = TransactionOptions::new().retry(patient.max_attempts(100_000));
    let (result, server) = within(async {
        let work = sessions.transaction_with(options, async |tx| {
            tx.execute("SELECT 1", &[]).await?;
            Ok::<_, Error>(tx.attempt())
        });
        let start = tokio::task::spawn_blocking(move || {
            server.start_again().unwrap();
            server
        });
        tokio::join!(work, start)
    })
    .await;
    assert_eq!(result.unwrap(), 1, "the closure ran once");
    drop(server);
}

/// A manager whose connections pass a proxy.
async fn proxied(db: &Database) -> (Proxy, SessionManager) {
    let proxy = Proxy::start().await;
    let config = proxy.config(db);
    let config = config.max_size(1).commit_timeout(Duration::from_millis(200));
    (proxy, SessionManager::new(config).unwrap())
}

#[tokio::test]
async fn an_unanswered_commit_is_unknown_and_never_run_again() {
    let db = Database::new().await;
    db.run("CREATE TABLE t (a int)").await;
    let policy = fast().retry_on(RetryClass::ConnectionLost);
    for (what, committed) in [(AtCommit::CutBefore, 0), (AtCommit::CutAfter, 1), (AtCommit::Swallow, 1)] {
        db.run("TRUNCATE t").await;
        let (proxy, sessions) = proxied(&db).await;
        proxy.at_commit(what);
        let runs = AtomicU32::new(0);
        let error =
            within(sessions.transaction_with(TransactionOptions::new().retry(policy.clone()), async |tx| {
                runs.fetch_add(1, SeqCst);
                tx.execute("INSERT INTO t VALUES (1)", &[]).await
            }))
            .await
            .unwrap_err();
        assert!(error.is_commit_unknown(), "{what:?}: {error:?}");
        assert!(!error.is_retryable());
        assert_eq!(runs.load(SeqCst), 1, "{what:?}");
        db.until(&format!("(SELECT count(*) FROM t) = {committed}")).await;
        // The pool is whole.
        proxy.at_commit(AtCommit::Pass);
        sessions
            .transaction_with(TransactionOptions::new().retry(policy.clone()), async |tx| {
                tx.execute("SELECT 1", &[]).await
            })
            .await
            .unwrap();
    }
}

#[tokio::test]
async fn a_fatal_answer_to_commit_is_unknown() {
    let db = Database::new().await;
    db.run(
        "CREATE TABLE t (a int);
         CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS
         $$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END $$;
         CREATE CONSTRAINT TRIGGER c AFTER INSERT ON t DEFERRABLE INITIALLY DEFERRED
         FOR EACH ROW EXECUTE FUNCTION f()",
    )
    .await;
    let sessions = db.single();
    let runs = AtomicU32::new(0);
    let policy = fast().retry_on(RetryClass::ConnectionLost);
    let error = sessions
        .transaction_with(TransactionOptions::new().retry(policy), async |tx| {
            runs.fetch_add(1, SeqCst);
            tx.execute("INSERT INTO t VALUES (1)", &[]).await
        })
        .await
        .unwrap_err();
    assert!(error.is_commit_unknown(), "{error:?}");
    assert_eq!(error.code().unwrap().code(), "57P01");
    assert_eq!(runs.load(SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_of_conflicts_loses_nothing() {
    let db = Database::new().await;
    db.run("CREATE TABLE t (a int); INSERT INTO t VALUES (0)").await;
    let sessions = SessionManager::new(db.config().max_size(8)).unwrap();
    let policy = RetryPolicy::default().max_attempts(200);
    let tasks: Vec<_> = (0..8)
        .map(|_| {
            let (sessions, policy) = (sessions.clone(), policy.clone());
            tokio::spawn(async move {
                for _ in 0..25 {
                    let options = TransactionOptions::serializable().retry(policy.clone());
                    sessions
                        .transaction_with(options, async |tx| {
                            let a: i32 = tx.query_one("SELECT a FROM t", &[]).await?.get(0);
                            tx.execute("UPDATE t SET a = $1", &[&(a + 1)]).await
                        })
                        .await
                        .unwrap();
                }
            })
        })
        .collect();
    for task in tasks {
        within(task).await.unwrap();
    }
    assert_eq!(db.number("SELECT a::bigint FROM t").await, 200);
}
