//! Every public future, dropped after 0, 1, 2, … polls until it completes: no transaction stays open, no place in the
//! pool is lost, nothing goes on running, and the next borrower is served.
#![cfg(feature = "testing")]

mod common;

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use bytes::Bytes;
use common::{Database, polls, within};
use pg_session::{Error, RetryPolicy, Session, SessionManager, TransactionOptions};

/// Enough for the longest of these futures on a busy machine; each case ends when its future completes.
const MOST_POLLS: usize = 200;

async fn database() -> Database {
    let db = Database::new().await;
    db.run("CREATE TABLE t (id serial PRIMARY KEY, a int); INSERT INTO t (a) SELECT 0 FROM generate_series(1, 100)").await;
    db
}

/// After a drop: the next borrower is served at once, on a connection that is at rest, and the server is quiet.
async fn assert_whole(db: &Database, sessions: &SessionManager, after: usize) {
    let session = within(sessions.acquire()).await.unwrap_or_else(|e| panic!("after {after} polls: {e}"));
    session.execute("VACUUM pg_language", &[]).await.unwrap_or_else(|e| panic!("after {after} polls: {e}"));
    drop(session);
    db.until_quiet().await;
    until_whole(sessions).await;
    let advisory = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' \
                    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
    assert_eq!(db.number(advisory).await, 0, "after {after} polls");
}

/// Drops the future that `make` makes of a session after each number of polls; the session is dropped right after.
macro_rules! dropped_at_every_poll {
    ($db:ident, $sessions:ident, |$session:ident| $work:expr) => {{
        let mut completed = false;
        for left in 0..MOST_POLLS {
            #[allow(unused_mut)]
            let mut $session: Session = within($sessions.acquire()).await.unwrap();
            let result = within(polls($work, left)).await;
            drop($session);
            assert_whole(&$db, &$sessions, left).await;
            if let Some(result) = result {
                result.unwrap();
                completed = true;
                break;
            }
        }
        assert!(completed, "never completed");
    }};
}

#[tokio::test]
async fn acquire_gives_up_its_place() {
    let db = database().await;
    let mut completed = false;
    for left in 0..MOST_POLLS {
        let sessions = db.single(); // so that a connection has to be made each time
        let result = within(polls(sessions.acquire(), left)).await;
        completed = result.is_some();
        drop(result);
        assert_whole(&db, &sessions, left).await;
        if completed {
            break;
        }
    }
    assert!(completed);
}

#[tokio::test]
async fn a_waiter_that_gives_up_takes_nothing() {
    let db = database().await;
    let sessions = db.single();
    let held = sessions.acquire().await.unwrap();
    for _ in 0..5 {
        assert!(polls(sessions.acquire(), 1).await.is_none());
    }
    // One that was served in the moment it gives up.
    let mut waiter = Box::pin(sessions.acquire());
    std::future::poll_fn(|cx| {
        assert!(waiter.as_mut().poll(cx).is_pending());
        std::task::Poll::Ready(())
    })
    .await;
    drop(held);
    drop(waiter);
    assert_whole(&db, &sessions, 1).await;
}

#[tokio::test]
async fn statements() {
    let db = database().await;
    let sessions = db.single();
    dropped_at_every_poll!(db, sessions, |s| s.query("SELECT a, pg_sleep(0.002) FROM t WHERE id = 1", &[]));
    dropped_at_every_poll!(db, sessions, |s| s.query_one("SELECT 1", &[]));
    dropped_at_every_poll!(db, sessions, |s| s.query_opt("SELECT 1", &[]));
    dropped_at_every_poll!(db, sessions, |s| s.execute("UPDATE t SET a = a + 1 WHERE id = 1", &[]));
    dropped_at_every_poll!(db, sessions, |s| s
        .batch_execute("SELECT pg_sleep(0.002); SELECT pg_advisory_lock(1)"));
    dropped_at_every_poll!(db, sessions, |s| s.prepare("SELECT 2 AS never_seen_before"));
}

#[tokio::test]
async fn streams_and_copies() {
    let db = database().await;
    let sessions = db.single();
    dropped_at_every_poll!(db, sessions, |s| async {
        let mut rows = s.query_stream("SELECT repeat('x', 1000) FROM generate_series(1, 300)", &[]).await?;
        while let Some(row) = rows.next().await {
            row?;
        }
        Ok::<_, Error>(())
    });
    dropped_at_every_poll!(db, sessions, |s| async {
        let mut copy = s.copy_in("COPY t (a) FROM STDIN").await?;
        for _ in 0..5 {
            copy.send(Bytes::from_static(b"1\n2\n3\n")).await?;
        }
        copy.finish().await
    });
    dropped_at_every_poll!(db, sessions, |s| async {
        let mut copy =
            s.copy_out("COPY (SELECT repeat('x', 1000) FROM generate_series(1, 300)) TO STDOUT").await?;
        while let Some(data) = copy.next().await {
            data?;
        }
        Ok::<_, Error>(())
    });
}

#[tokio::test]
async fn transactions() {
    let db = database().await;
    let sessions = db.single();
    dropped_at_every_poll!(db, sessions, |s| s.transaction(async |tx| {
        tx.execute("UPDATE t SET a = a + 1 WHERE id = 1", &[]).await?;
        tx.execute("SELECT pg_sleep(0.002)", &[]).await?;
        tx.execute("UPDATE t SET a = a + 1 WHERE id = 2", &[]).await
    }));
    dropped_at_every_poll!(db, sessions, |s| s.transaction(async |tx| {
        tx.savepoint(async |sp| {
            sp.execute("UPDATE t SET a = a + 1 WHERE id = 1", &[]).await?;
            sp.savepoint(async |sp| sp.execute("UPDATE t SET a = a + 1 WHERE id = 2", &[]).await).await
        })
        .await?;
        let undone = tx.savepoint(async |sp| sp.execute("SELECT 1/0", &[]).await).await;
        assert!(undone.is_err());
        tx.execute("UPDATE t SET a = a + 1 WHERE id = 3", &[]).await
    }));
    dropped_at_every_poll!(db, sessions, |s| s.transaction(async |tx| {
        tokio::try_join!(
            tx.execute("UPDATE t SET a = a + 1 WHERE id = 1", &[]),
            tx.execute("SELECT pg_sleep(0.002)", &[]),
            tx.execute("UPDATE t SET a = a + 1 WHERE id = 2", &[]),
        )
    }));
    dropped_at_every_poll!(db, sessions, |s| async {
        let failed: Result<(), _> = s
            .transaction(async |tx| {
                tx.execute("UPDATE t SET a = a + 1 WHERE id = 1", &[]).await?;
                Err(tx.execute("SELECT 1/0", &[]).await.unwrap_err())
            })
            .await;
        assert!(failed.is_err());
        Ok::<_, Error>(())
    });
}

#[tokio::test]
async fn transactions_by_hand() {
    let db = database().await;
    let sessions = db.single();
    dropped_at_every_poll!(db, sessions, |s| async {
        let tx = s.begin().await?;
        tx.execute("UPDATE t SET a = a + 1 WHERE id = 1", &[]).await?;
        tx.commit().await
    });
    dropped_at_every_poll!(db, sessions, |s| async {
        let tx = s.begin_with(TransactionOptions::serializable()).await?;
        tx.execute("UPDATE t SET a = a + 1 WHERE id = 1", &[]).await?;
        tx.rollback().await;
        Ok::<_, Error>(())
    });
    dropped_at_every_poll!(db, sessions, |s| async {
        s.client().await?;
        Ok::<_, Error>(())
    });
}

#[tokio::test]
async fn transactions_of_the_manager_with_retries() {
    let db = database().await;
    let sessions = db.single();
    let policy = RetryPolicy::default().max_attempts(3).base_delay(Duration::from_millis(4));
    let mut completed = false;
    for left in 0..MOST_POLLS {
        let options = TransactionOptions::new().retry(policy.clone());
        let work = sessions.transaction_with(options, async |tx| {
            tx.execute("UPDATE t SET a = a + 1 WHERE id = 1", &[]).await?;
            if tx.attempt() < 3 {
                tx.batch_execute("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$").await?;
            }
            Ok::<_, Error>(())
        });
        let result = within(polls(work, left)).await;
        assert_whole(&db, &sessions, left).await;
        if let Some(result) = result {
            result.unwrap();
            completed = true;
            break;
        }
    }
    assert!(completed);
    for left in 0..MOST_POLLS {
        if within(polls(sessions.ping(), left)).await.is_some() {
            break;
        }
        assert_whole(&db, &sessions, left).await;
    }
}

#[tokio::test]
async fn a_commit_is_all_or_nothing_at_every_poll() {
    let db = database().await;
    let sessions = db.single();
    let mut done = 0;
    for left in 0..MOST_POLLS {
        let mut session = within(sessions.acquire()).await.unwrap();
        let before = db.number("SELECT sum(a) FROM t").await;
        let work = session.transaction(async |tx| {
            tx.execute("UPDATE t SET a = a + 1 WHERE id = 1", &[]).await?;
            tx.execute("UPDATE t SET a = a + 1 WHERE id = 2", &[]).await
        });
        let result = within(polls(work, left)).await;
        drop(session);
        assert_whole(&db, &sessions, left).await;
        let gained = db.number("SELECT sum(a) FROM t").await - before;
        assert!(gained == 0 || gained == 2, "after {left} polls: {gained}");
        if result.is_some() {
            assert_eq!(gained, 2);
            done += 1;
            break;
        }
    }
    assert_eq!(done, 1);
}

#[tokio::test]
async fn closing_can_be_dropped() {
    let db = database().await;
    let sessions = db.single();
    let session = sessions.acquire().await.unwrap();
    for left in [0, 1, 1] {
        assert!(polls(sessions.close(), left).await.is_none());
    }
    session.execute("SELECT 1", &[]).await.unwrap();
    drop(session);
    assert_eq!(within(sessions.close()).await, 0);
}

#[tokio::test]
async fn a_held_session_goes_on_after_a_dropped_statement() {
    let db = database().await;
    let session = db.single().acquire().await.unwrap();
    let pid = session.process_id();
    {
        let mut sleep = pin!(session.execute("SELECT pg_sleep(600)", &[]));
        tokio::select! {
            _ = &mut sleep => panic!("slept"),
            () = db.until_sleeping(pid) => {}
        }
    }
    // Cancelled although nobody uses the session.
    db.until_quiet().await;
    assert_eq!(within(session.query_one("SELECT 7", &[])).await.unwrap().get::<_, i32>(0), 7);
    assert_eq!(session.process_id(), pid);
}

#[tokio::test]
async fn a_transaction_goes_on_after_a_statement_dropped_in_a_savepoint() {
    let db = database().await;
    let sessions = db.single();
    let db = &db;
    within(sessions.transaction(async |tx| {
        tx.execute("UPDATE t SET a = 5 WHERE id = 1", &[]).await?;
        let pid = tx.process_id();
        let gave_up = tx
            .savepoint(async |sp| {
                sp.execute("UPDATE t SET a = 6 WHERE id = 1", &[]).await?;
                tokio::select! {
                    slept = sp.execute("SELECT pg_sleep(600)", &[]) => slept.map(|_| true),
                    () = db.until_sleeping(pid) => Ok(false),
                }
            })
            .await;
        // Nobody knows what the statement did, so the savepoint cannot be kept.
        assert!(matches!(gave_up, Err(Error::StatementAbandoned)), "{gave_up:?}");
        // A savepoint that is itself dropped in the middle.
        {
            let mut savepoint = pin!(tx.savepoint(async |sp| {
                sp.execute("UPDATE t SET a = 7 WHERE id = 1", &[]).await?;
                sp.execute("SELECT pg_sleep(600)", &[]).await
            }));
            tokio::select! {
                _ = &mut savepoint => panic!("slept"),
                () = db.until_sleeping(pid) => {}
            }
        }
        tx.execute("UPDATE t SET a = a + 10 WHERE id = 1", &[]).await
    }))
    .await
    .unwrap();
    assert_eq!(db.number("SELECT a::bigint FROM t WHERE id = 1").await, 15);
}

#[tokio::test]
async fn a_statement_beside_a_dropped_one_is_not_hit() {
    let db = database().await;
    let session = db.single().acquire().await.unwrap();
    let pid = session.process_id();
    for sql in ["SELECT 1, pg_sleep(0.02)", "SELECT 2, pg_sleep(600)"] {
        session.prepare(sql).await.unwrap();
    }
    for _ in 0..20 {
        // At rest, so that the two are sent in the order in which they are polled.
        within(session.query_one("SELECT 0", &[])).await.unwrap();
        let kept = session.query_one("SELECT 1, pg_sleep(0.02)", &[]);
        let dropped = async {
            let mut dropped = pin!(session.query_one("SELECT 2, pg_sleep(600)", &[]));
            tokio::select! {
                _ = &mut dropped => panic!("slept"),
                () = db.until_sleeping(pid) => {}
            }
        };
        let (kept, ()) = within(async { tokio::join!(biased; kept, dropped) }).await;
        assert_eq!(kept.unwrap().get::<_, i32>(0), 1);
    }
    within(session.query_one("SELECT 3", &[])).await.unwrap();
}

#[tokio::test]
async fn a_timeout_around_a_transaction_can_be_tight() {
    let db = database().await;
    let sessions = db.single();
    for n in 0..500u64 {
        let work = sessions.transaction(async |tx| {
            tx.execute("UPDATE t SET a = a + 1 WHERE id = 1", &[]).await?;
            tx.execute("SELECT pg_sleep(0.001)", &[]).await
        });
        let _ = tokio::time::timeout(Duration::from_micros(n * 7), work).await;
        let session = within(sessions.acquire()).await.unwrap();
        session.query_one("SELECT 1", &[]).await.unwrap();
    }
    assert_whole(&db, &sessions, 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_cancelled_statements_leave_their_neighbours_alone() {
    let db = Arc::new(database().await);
    let sessions = db.single();
    let cancelled: Vec<_> = (0..100)
        .map(|_| {
            let (db, sessions) = (Arc::clone(&db), sessions.clone());
            tokio::spawn(async move {
                let session = sessions.acquire().await.unwrap();
                let pid = session.process_id();
                tokio::select! {
                    _ = session.execute("SELECT pg_sleep(600)", &[]) => panic!("slept"),
                    () = db.until_sleeping(pid) => {}
                }
            })
        })
        .collect();
    let neighbours: Vec<_> = (0..100)
        .map(|_| {
            let sessions = sessions.clone();
            tokio::spawn(async move {
                let session = sessions.acquire().await.unwrap();
                session.query_one("SELECT pg_sleep(0.001)", &[]).await.expect("nobody cancelled this one");
            })
        })
        .collect();
    for task in cancelled.into_iter().chain(neighbours) {
        within(task).await.unwrap();
    }
    until_whole(&sessions).await;
}

async fn until_whole(sessions: &SessionManager) {
    common::until_returned(sessions).await;
    assert_eq!(sessions.status().size, 1);
}

/// A storm of transactions under random time-outs: none of those that are waited for may see another's cancel request.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_cancel_request_hits_a_neighbour() {
    const TRANSACTIONS: u64 = 5_000;
    let db = database().await;
    let sessions = SessionManager::new(db.config().max_size(6)).unwrap();
    let next = Arc::new(AtomicU64::new(0));
    let (done, given_up) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let tasks: Vec<_> = (0..12)
        .map(|_| {
            let (sessions, next, done, given_up) =
                (sessions.clone(), next.clone(), done.clone(), given_up.clone());
            tokio::spawn(async move {
                while next.fetch_add(1, SeqCst) < TRANSACTIONS {
                    let id = fastrand::i32(1..=100);
                    let nap = fastrand::f64() * 0.004;
                    let work = sessions.transaction(async |tx| {
                        tx.execute("UPDATE t SET a = a + 1 WHERE id = $1", &[&id]).await?;
                        tx.execute("SELECT pg_sleep($1)", &[&nap]).await?;
                        tx.query_one("SELECT a FROM t WHERE id = $1", &[&id]).await
                    });
                    if fastrand::bool() {
                        let limit = Duration::from_micros(fastrand::u64(0..6000));
                        match tokio::time::timeout(limit, work).await {
                            Ok(result) => drop(result.expect("not cancelled: it was waited for to its end")),
                            Err(_) => drop(given_up.fetch_add(1, SeqCst)),
                        }
                    } else {
                        work.await.expect("not cancelled: nobody gave it up");
                        done.fetch_add(1, SeqCst);
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        tokio::time::timeout(Duration::from_secs(120), task).await.unwrap().unwrap();
    }
    assert!(given_up.load(SeqCst) > 500 && done.load(SeqCst) > 500);
    db.until_quiet().await;
    common::until_returned(&sessions).await;
    assert!(sessions.status().size <= 6);
}
