//! Where connections live: on a runtime of the manager's own choice, whichever runtime they are used on.
#![cfg(feature = "testing")]

mod common;

use std::thread;

use common::{Database, until_returned, within};
use pg_session::{Error, SessionManager};
use tokio::runtime::{Builder, Runtime};

/// A runtime on a thread of its own, as an actix worker has one; shut down before this returns.
fn on_a_worker<T: Send>(work: impl AsyncFnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let worker = scope.spawn(|| runtime().block_on(async { within(work()).await }));
        worker.join().expect("no panic")
    })
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().expect("a runtime")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_connection_outlives_the_worker_that_needed_it_first() {
    let database = Database::new().await;
    let sessions = database.single();

    let first = on_a_worker(async || {
        let session = sessions.acquire().await.expect("a session");
        session.query_one("SELECT 1", &[]).await.expect("a row");
        session.process_id()
    });
    until_returned(&sessions).await;
    let second = on_a_worker(async || {
        let session = sessions.acquire().await.expect("a session");
        session.query_one("SELECT 1", &[]).await.expect("a row");
        session.process_id()
    });

    assert_eq!(first, second);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_a_worker_left_running_is_repaired_after_its_end() {
    let database = Database::new().await;
    let sessions = database.single();

    let pid = on_a_worker(async || {
        let mut session = sessions.acquire().await.expect("a session");
        let tx = session.begin().await.expect("a transaction");
        tx.execute("CREATE TABLE left_over ()", &[]).await.expect("a table");
        let pid = tx.process_id();
        common::polls(tx.execute("SELECT pg_sleep(60)", &[]), 1).await;
        pid
    });

    until_returned(&sessions).await;
    let session = sessions.acquire().await.expect("a session");
    assert_eq!(session.process_id(), pid, "repaired, not replaced");
    assert_eq!(database.number("SELECT count(*) FROM pg_class WHERE relname = 'left_over'").await, 0);
}

#[test]
fn a_manager_made_outside_of_any_runtime_works_on_all_of_them() {
    let watcher = runtime();
    let database = watcher.block_on(Database::new());
    let sessions = database.single();

    for _ in 0..2 {
        // Here the connection ends with the runtime, and the next one gets a new one.
        let one: i32 = on_a_worker(async || {
            let session = sessions.acquire().await.expect("a session");
            session.query_one("SELECT 1", &[]).await.expect("a row").get(0)
        });
        assert_eq!(one, 1);
    }
}

#[test]
fn a_manager_outlives_the_runtime_that_it_was_made_on() {
    let watcher = runtime();
    let database = watcher.block_on(Database::new());
    let sessions: SessionManager = on_a_worker(async || {
        let sessions = database.sessions();
        sessions.ping().await.expect("a server");
        sessions
    });

    let result: Result<i32, Error> = on_a_worker(async || {
        sessions.transaction(async |tx| Ok(tx.query_one("SELECT 1", &[]).await?.get(0))).await
    });

    assert_eq!(result.expect("a row"), 1);
}

#[test]
fn connections_live_on_the_runtime_that_was_chosen() {
    let home = Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let database = home.block_on(Database::new());
    let builder = SessionManager::builder(database.config().max_size(1)).runtime(home.handle().clone());
    let sessions = builder.build().expect("a configuration");

    let pids: Vec<i32> = (0..2)
        .map(|_| on_a_worker(async || sessions.acquire().await.expect("a session").process_id()))
        .collect();

    assert_eq!(pids[0], pids[1]);
}

#[tokio::test]
async fn a_runtime_that_is_blocked_keeps_nobody_from_connecting() {
    let database = Database::new().await;
    let sessions = database.sessions();

    // Blocks this runtime's only thread, on which the manager was made.
    let one: i32 = on_a_worker(async || {
        let session = sessions.acquire().await.expect("a session");
        session.query_one("SELECT 1", &[]).await.expect("a row").get(0)
    });

    assert_eq!(one, 1);
}
