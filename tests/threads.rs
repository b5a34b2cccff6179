//! One connection used by many at once.
#![cfg(feature = "testing")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use common::{Database, polls};
use pg_session::{Error, Session, Statement};

/// Random statements on one connection by several threads, each checking its own answers; some are given up.
fn storm(seconds: u64, capacity: usize, give_up: bool) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let (db, session) = runtime.block_on(async {
        let db = Database::new().await;
        let config = db.config().max_size(1).statement_cache_capacity(capacity);
        let sessions = pg_session::SessionManager::new(config).unwrap();
        let session = sessions.acquire().await.unwrap();
        (db, Arc::new(session))
    });
    let stop = Arc::new(AtomicBool::new(false));
    let done = Arc::new(AtomicU64::new(0));
    let handle = runtime.handle().clone();
    let threads: Vec<_> = (0..4u64)
        .map(|n| {
            let (session, stop, done, handle): (Arc<Session>, _, _, _) =
                (session.clone(), stop.clone(), done.clone(), handle.clone());
            std::thread::spawn(move || {
                let mut random = fastrand::Rng::with_seed(n);
                let mut kept: Vec<Statement> = Vec::new();
                while !stop.load(SeqCst) {
                    handle.block_on(async {
                        let k = random.i32(0..30);
                        let text = format!("SELECT $1::int + {k}, repeat('x', {})", random.i32(0..3000));
                        let v = random.i32(0..1000);
                        match random.u32(0..if give_up { 6 } else { 5 }) {
                            0 | 1 => {
                                let row = session.query_one(&text, &[&v]).await.unwrap();
                                assert_eq!(row.get::<_, i32>(0), v + k);
                            }
                            2 => {
                                let e = session.query("SELECT 1 / ($1::int - $1)", &[&v]).await.unwrap_err();
                                assert_eq!(e.code().unwrap().code(), "22012");
                            }
                            3 => {
                                let statement = session.prepare(&text).await.unwrap();
                                let row = session.query_one(&statement, &[&v]).await.unwrap();
                                assert_eq!(row.get::<_, i32>(0), v + k);
                                kept.push(statement);
                                if kept.len() > 5 {
                                    kept.clear();
                                }
                            }
                            4 => {
                                let e = session.batch_execute("SELECT 1; SELECT x").await.unwrap_err();
                                assert_eq!(e.code().unwrap().code(), "42703");
                            }
                            _ => {
                                let n = random.usize(1..4);
                                drop(polls(session.query("SELECT pg_sleep(0.05)", &[]), n).await);
                            }
                        }
                        done.fetch_add(1, SeqCst);
                    });
                }
            })
        })
        .collect();
    let started = Instant::now();
    let mut before = 0;
    while started.elapsed() < Duration::from_secs(seconds) {
        std::thread::sleep(Duration::from_secs(2));
        let now = done.load(SeqCst);
        println!("{now} done");
        assert_ne!(now, before, "it stands still");
        before = now;
    }
    stop.store(true, SeqCst);
    for thread in threads {
        thread.join().unwrap();
    }
    let pid = session.process_id();
    let kept = runtime.block_on(async {
        let n: i64 =
            session.query_one("SELECT count(*) FROM pg_prepared_statements", &[]).await.unwrap().get(0);
        println!("{n} statements on the server, {} in the cache, pid {pid}", session.cached_statements());
        n
    });
    assert!(kept < 40 + capacity as i64, "{kept}");
    drop(session);
    drop(db);
}

#[test]
fn threads_that_share_a_connection_get_their_own_answers() {
    storm(6, 1, false);
}

#[test]
fn threads_that_share_a_connection_get_their_own_answers_when_some_give_up() {
    storm(6, 3, true);
}

/// Statements dropped in other threads while batches are under way; results and errors are where they belong.
#[test]
fn batches_beside_closing_statements_get_their_own_results() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let db = Database::new().await;
        db.run("CREATE TABLE t (id int PRIMARY KEY)").await;
        let config = db.config().max_size(1).statement_cache_capacity(1);
        let sessions = pg_session::SessionManager::new(config).unwrap();
        let mut session = sessions.acquire().await.unwrap();
        let started = Instant::now();
        let mut random = fastrand::Rng::with_seed(7);
        let mut expected = 0i64;
        let mut rounds = 0;
        while started.elapsed() < Duration::from_secs(8) {
            let mut kept: Vec<Vec<Statement>> = vec![Vec::new(), Vec::new()];
            for n in 0..12 {
                kept[n % 2].push(session.prepare(&format!("SELECT {rounds} + {n}")).await.unwrap());
            }
            let dropper = {
                let us = random.u64(0..3000);
                std::thread::spawn(move || {
                    std::thread::sleep(Duration::from_micros(us));
                    for list in kept {
                        for statement in list {
                            drop(statement);
                            std::thread::yield_now();
                        }
                    }
                })
            };
            let count = random.i32(2..10);
            let bad = random.bool().then(|| random.i32(0..count));
            rounds += 1;
            let mut batch = session.batch();
            for n in 0..count {
                if bad == Some(n) {
                    batch.push("SELECT 'x', 1 / ($1::int - $1)", (n,));
                } else if n % 3 == 0 {
                    batch.push("INSERT INTO t VALUES ($1)", (rounds * 100 + n,));
                } else {
                    batch.push(format!("SELECT repeat('x', {}), $1::int", random.i32(0..9000)), (n,));
                }
            }
            let result = tokio::time::timeout(Duration::from_secs(10), batch.run()).await.expect("in time");
            match (result, bad) {
                (Ok(results), None) => {
                    assert_eq!(results.len(), count as usize);
                    for (n, result) in results.iter().enumerate() {
                        assert_eq!(result.rows_affected(), 1);
                        if n % 3 == 0 {
                            expected += 1;
                            assert!(result.rows().is_empty());
                        } else {
                            assert_eq!(result.rows()[0].get::<_, i32>(1), n as i32);
                        }
                    }
                }
                (Err(Error::Batch(e)), Some(n)) => assert_eq!(e.position(), n as u64 + 1),
                other => panic!("{other:?} {bad:?}"),
            }
            drop(batch);
            session.query("SELECT 1", &[]).await.unwrap(); // see the test below
            let many = session
                .execute_many(
                    "INSERT INTO t VALUES ($1)",
                    (0..random.i32(1..30)).map(|n| (-(rounds * 100 + n),)),
                )
                .await
                .unwrap();
            expected += many as i64;
            dropper.join().unwrap();
            assert_eq!(session.query_one("SELECT 5", &[]).await.unwrap().get::<_, i32>(0), 5);
        }
        println!("{rounds} rounds");
        assert_eq!(db.number("SELECT count(*) FROM t").await, expected);
    });
}

/// InTransaction: "The session is inside a transaction that raw SQL began". Nobody did; and there is no proxy here.
#[test]
fn a_transaction_can_begin_at_once_after_one_that_was_told_to_be_committed() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let db = Database::new().await;
        db.run("CREATE TABLE t (id int)").await;
        let sessions = db.single();
        let mut session = sessions.acquire().await.unwrap();
        let (mut refused, mut rounds) = (0, 0);
        let started = Instant::now();
        while started.elapsed() < Duration::from_secs(8) {
            rounds += 1;
            let sql = format!("INSERT INTO t VALUES ($1 + {rounds})");
            session.batch().push(sql, (1,)).run().await.unwrap();
            match session.transaction(async |tx| tx.execute("INSERT INTO t VALUES (1)", &[]).await).await {
                Ok(1) => {}
                Err(Error::InTransaction) => refused += 1,
                other => panic!("{other:?}"),
            }
        }
        println!("{refused} of {rounds} refused");
        assert_eq!(refused, 0);
    });
}
