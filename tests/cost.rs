//! What the crate adds to the driver's own allocations. Instructions are counted by `scripts/instructions --check`.
#![cfg(feature = "testing")]

mod common;

use allocation_counter::measure;
use common::{Database, LIMIT, connect, within};
use pg_session::{Error, Transaction};
use tokio::runtime::Runtime;

const SELECT: &str = "SELECT n FROM t WHERE id = $1";
const UPDATE: &str = "UPDATE t SET n = n + 1 WHERE id = $1";

/// Enough that what happens now and then, such as a new buffer for what is read, makes no difference of one.
const TIMES: u64 = 1000;

/// One thread for all, since only its allocations are counted: the driver's task as well as the measured code.
fn with_database(test: impl FnOnce(&Runtime, &Database)) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let database = runtime.block_on(within(async {
        let database = Database::new().await;
        database.run("CREATE TABLE t (id bigint PRIMARY KEY, n bigint); INSERT INTO t VALUES (1, 0)").await;
        database
    }));
    test(&runtime, &database);
    runtime.block_on(async { drop(database) });
    runtime.shutdown_timeout(LIMIT);
}

/// How often `operation` allocates, once everything is warm.
fn allocations(runtime: &Runtime, mut operation: impl AsyncFnMut()) -> u64 {
    let mut repeat = |times: u64| {
        runtime.block_on(within(async {
            for _ in 0..times {
                operation().await;
            }
        }));
    };
    repeat(TIMES / 10);
    (measure(|| repeat(TIMES)).count_total + TIMES / 2) / TIMES
}

#[test]
fn a_lent_session_allocates_nothing() {
    with_database(|runtime, database| {
        let sessions = database.sessions();
        let ours = allocations(runtime, async || drop(sessions.acquire().await.unwrap()));
        assert_eq!(ours, 0);
    });
}

#[test]
fn a_cached_query_allocates_as_often_as_the_drivers_own_with_a_prepared_statement() {
    with_database(|runtime, database| {
        let (client, select) = runtime.block_on(within(async {
            let client = connect(database.database.url()).await;
            let select = client.prepare(SELECT).await.unwrap();
            (client, select)
        }));
        let session = runtime.block_on(within(database.sessions().acquire())).unwrap();
        let raw = allocations(runtime, async || drop(client.query_one(&select, &[&1i64]).await.unwrap()));
        let ours = allocations(runtime, async || drop(session.query_one(SELECT, &[&1i64]).await.unwrap()));
        assert!(raw > 0, "the driver's allocations are counted");
        assert_eq!(ours, raw);
    });
}

#[test]
fn a_transaction_allocates_no_more_often_than_the_drivers_own() {
    with_database(|runtime, database| {
        let (mut client, update) = runtime.block_on(within(async {
            let client = connect(database.database.url()).await;
            let update = client.prepare(UPDATE).await.unwrap();
            (client, update)
        }));
        let mut session = runtime.block_on(within(database.sessions().acquire())).unwrap();
        let raw = allocations(runtime, async || {
            let tx = client.transaction().await.unwrap();
            tx.execute(&update, &[&1i64]).await.unwrap();
            tx.commit().await.unwrap();
        });
        let work = async |tx: &mut Transaction<'_>| tx.execute(UPDATE, &[&1i64]).await;
        let ours = allocations(runtime, async || {
            let updated: Result<u64, Error> = session.transaction(work).await;
            assert_eq!(updated.unwrap(), 1);
        });
        assert!(ours <= raw, "{ours} allocations, {raw} of the driver");
    });
}
