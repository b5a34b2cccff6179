//! One connection used by many at once.
#![cfg(feature = "testing")]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::table::Table;
use common::{Database, polls, within};
use pg_session::{Error, Session, SessionManager, Statement};
use tokio::runtime::Handle;

/// How long each of these goes on.
const WHILE: Duration = Duration::from_secs(6);

fn single(db: &Database, cached_statements: usize) -> SessionManager {
    SessionManager::new(db.config().max_size(1).statement_cache_capacity(cached_statements)).unwrap()
}

/// One of many: a random statement, whose answer it checks; some are given up.
async fn one_of_many(
    session: &Session,
    random: &mut fastrand::Rng,
    kept: &mut Vec<Statement>,
    give_up: bool,
) {
    let added = random.i32(0..30);
    let sql = format!("SELECT $1::int + {added}, repeat('x', {})", random.i32(0..3000));
    let given = random.i32(0..1000);
    match random.u32(0..if give_up { 6 } else { 5 }) {
        0 | 1 => {
            let row = session.query_one(&sql, &[&given]).await.unwrap();
            assert_eq!(row.get::<_, i32>(0), given + added);
        }
        2 => {
            let e = session.query("SELECT 1 / ($1::int - $1)", &[&given]).await.unwrap_err();
            assert_eq!(e.code().unwrap().code(), "22012");
        }
        3 => {
            let statement = session.prepare(&sql).await.unwrap();
            let row = session.query_one(&statement, &[&given]).await.unwrap();
            assert_eq!(row.get::<_, i32>(0), given + added);
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
            let times = random.usize(1..4);
            drop(polls(session.query("SELECT pg_sleep(0.05)", &[]), times).await);
        }
    }
}

/// Four threads on one connection; none of them may stand still.
async fn assert_own_answers(cached_statements: usize, give_up: bool) {
    let db = Database::new().await;
    let session = Arc::new(single(&db, cached_statements).acquire().await.unwrap());
    let runtime = Handle::current();
    let threads = (0..4).map(|n| {
        let (session, runtime) = (Arc::clone(&session), runtime.clone());
        // Not tasks: as many threads as there are at once, and the runtime's own besides.
        tokio::task::spawn_blocking(move || {
            let (mut random, mut kept) = (fastrand::Rng::with_seed(n), Vec::new());
            let started = Instant::now();
            while started.elapsed() < WHILE {
                runtime.block_on(within(one_of_many(&session, &mut random, &mut kept, give_up)));
            }
        })
    });
    for thread in threads.collect::<Vec<_>>() {
        thread.await.unwrap();
    }
    let count = "SELECT count(*) FROM pg_prepared_statements";
    let left: i64 = within(session.query_one(count, &[])).await.unwrap().get(0);
    assert!(left < 40 + cached_statements as i64, "{left} statements are left on the server");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn threads_that_share_a_connection_get_their_own_answers() {
    assert_own_answers(1, false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn threads_that_share_a_connection_get_their_own_answers_when_some_give_up() {
    assert_own_answers(3, true).await;
}

/// Statements dropped in other threads while batches are under way; results and errors are where they belong.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batches_beside_closing_statements_get_their_own_results() {
    let table = Table::new().await;
    let mut session = single(&table.db, 1).acquire().await.unwrap();
    let mut random = fastrand::Rng::with_seed(7);
    let (mut stored, mut rounds) = (0i64, 0);
    let started = Instant::now();
    while started.elapsed() < WHILE {
        let mut kept: Vec<Vec<Statement>> = vec![Vec::new(), Vec::new()];
        for n in 0..12 {
            kept[n % 2].push(within(session.prepare(&format!("SELECT {rounds} + {n}"))).await.unwrap());
        }
        let dropper = std::thread::spawn({
            // A random moment of what follows.
            let pause = Duration::from_micros(random.u64(0..3000));
            move || {
                std::thread::sleep(pause);
                for statement in kept.into_iter().flatten() {
                    drop(statement);
                    std::thread::yield_now();
                }
            }
        });
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
        match (within(batch.run()).await, bad) {
            (Ok(results), None) => {
                assert_eq!(results.len(), count as usize);
                for (n, result) in results.iter().enumerate() {
                    assert_eq!(result.rows_affected(), 1);
                    if n % 3 == 0 {
                        stored += 1;
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
        within(session.query("SELECT 1", &[])).await.unwrap();
        let rows = (0..random.i32(1..30)).map(|n| (-(rounds * 100 + n),));
        stored += within(session.execute_many("INSERT INTO t VALUES ($1)", rows)).await.unwrap() as i64;
        dropper.join().unwrap();
        let five = within(session.query_one("SELECT 5", &[])).await.unwrap();
        assert_eq!(five.get::<_, i32>(0), 5);
    }
    println!("{rounds} rounds");
    assert_eq!(table.rows().await, stored);
}

/// InTransaction: "The session is inside a transaction that raw SQL began". Nobody did; and there is no proxy here.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_can_begin_at_once_after_one_that_was_told_to_be_committed() {
    let table = Table::of("id int").await;
    let mut session = table.session().await;
    let (mut refused, mut rounds) = (0, 0);
    let started = Instant::now();
    while started.elapsed() < WHILE {
        rounds += 1;
        let sql = format!("INSERT INTO t VALUES ($1 + {rounds})");
        within(session.batch().push(sql, (1,)).run()).await.unwrap();
        let work = session.transaction(async |tx| tx.execute("INSERT INTO t VALUES (1)", &[]).await);
        match within(work).await {
            Ok(1) => {}
            Err(Error::InTransaction) => refused += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(refused, 0, "of {rounds}");
}
