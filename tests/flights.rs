//! The round trips of each operation, counted on the wire: the table in the README is a contract.
#![cfg(feature = "testing")]

mod common;

use common::proxy::Proxy;
use common::{Database, within};
use pg_session::{Error, RetryPolicy, Session, SessionManager, TransactionOptions};
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

/// A database behind a proxy that counts, and a manager with one connection to it.
async fn counted() -> (Database, Proxy, SessionManager) {
    let db = Database::new().await;
    db.run(
        "CREATE TABLE t (id int PRIMARY KEY, a int); INSERT INTO t SELECT n, 0 FROM generate_series(1, 10) n",
    )
    .await;
    let proxy = Proxy::start().await;
    let config = proxy.config(&db);
    let sessions = SessionManager::new(config.max_size(1)).unwrap();
    (db, proxy, sessions)
}

const READ: &str = "SELECT a FROM t WHERE id = $1";
const WRITE: &str = "UPDATE t SET a = a + 1 WHERE id = $1";

/// Prepares the statements, and has the server accept every BEGIN that is used.
async fn warm(session: &mut Session, options: &[TransactionOptions]) {
    session.query_one(READ, &[&1]).await.unwrap();
    session.execute(WRITE, &[&1]).await.unwrap();
    for options in options {
        session.transaction_with(options.clone(), async |tx| tx.query_one(READ, &[&1]).await).await.unwrap();
    }
}

macro_rules! flights {
    ($proxy:expr, $work:expr) => {{
        let before = $proxy.flights();
        let result = within($work).await;
        ($proxy.flights() - before, result)
    }};
}

#[tokio::test]
async fn a_cached_statement_takes_one_and_a_new_one_two() {
    let (_db, proxy, sessions) = counted().await;
    let session = sessions.acquire().await.unwrap();
    assert_eq!(flights!(proxy, session.query_one(READ, &[&1])).0, 2, "first use");
    assert_eq!(flights!(proxy, session.query_one(READ, &[&2])).0, 1, "query_one");
    assert_eq!(flights!(proxy, session.query(READ, &[&2])).0, 1, "query");
    assert_eq!(flights!(proxy, session.query_opt(READ, &[&99])).0, 1, "query_opt");
    assert_eq!(flights!(proxy, session.execute(READ, &[&2])).0, 1, "execute");
    assert_eq!(flights!(proxy, session.prepare(READ)).0, 0, "prepare from the cache");
    assert_eq!(flights!(proxy, session.batch_execute("SELECT 1; SELECT 2")).0, 1, "batch_execute");
    let (n, rows) = flights!(proxy, async {
        let mut rows = session.query_stream(READ, &[&1]).await?;
        while let Some(row) = rows.next().await {
            row?;
        }
        Ok::<_, Error>(())
    });
    rows.unwrap();
    assert_eq!(n, 1, "query_stream");
    let (n, _) = flights!(proxy, async {
        tokio::try_join!(session.query(READ, &[&1]), session.query(READ, &[&2]), session.query(READ, &[&3]))
    });
    assert_eq!(n, 1, "three joined");
}

#[tokio::test]
async fn lending_and_returning_a_clean_session_takes_none() {
    let (_db, proxy, sessions) = counted().await;
    warm(&mut sessions.acquire().await.unwrap(), &[]).await;
    let (n, _) = flights!(proxy, async {
        for _ in 0..10 {
            drop(sessions.acquire().await.unwrap());
        }
    });
    assert_eq!(n, 0);
}

#[tokio::test]
async fn a_session_idle_for_longer_is_checked_by_one() {
    let (_db, proxy, _) = counted().await;
    let config = proxy.config(&_db);
    let sessions =
        SessionManager::new(config.max_size(1).check_after_idle(std::time::Duration::ZERO)).unwrap();
    drop(sessions.acquire().await.unwrap());
    assert_eq!(flights!(proxy, sessions.acquire()).0, 1);
}

#[tokio::test]
async fn a_transaction_takes_one_more_than_its_statements() {
    let (_db, proxy, sessions) = counted().await;
    let all = TransactionOptions::serializable()
        .read_write()
        .deferrable()
        .local_setting("app.tenant", "acme")
        .local_setting("lock_timeout", "5s");
    let mut session = sessions.acquire().await.unwrap();
    warm(&mut session, &[TransactionOptions::new(), all.clone()]).await;
    for options in [TransactionOptions::new(), all] {
        for statements in [1, 2, 5] {
            let (n, result) = flights!(
                proxy,
                session.transaction_with(options.clone(), async |tx| {
                    for id in 1..=statements {
                        tx.execute(WRITE, &[&id]).await?;
                    }
                    Ok::<_, Error>(())
                })
            );
            result.unwrap();
            assert_eq!(n, statements as usize + 1, "{options:?}");
        }
    }
    let (n, _) = flights!(proxy, session.transaction(async |tx| Ok::<_, Error>(tx.attempt())));
    assert_eq!(n, 0, "no statement, nothing to commit");
    let (n, _) = flights!(
        proxy,
        session.transaction(async |tx| {
            tokio::try_join!(tx.execute(WRITE, &[&1]), tx.execute(WRITE, &[&2]), tx.execute(WRITE, &[&3]))
        })
    );
    // Until BEGIN is confirmed nothing is sent that would run without it.
    assert_eq!(n, 3, "the first of three joined, the others, and COMMIT");
}

#[tokio::test]
async fn a_batch_takes_one_with_its_begin_and_commit() {
    let (_db, proxy, sessions) = counted().await;
    let mut session = sessions.acquire().await.unwrap();
    warm(&mut session, &[TransactionOptions::new()]).await;
    for statements in [1, 5] {
        let (n, result) = flights!(proxy, async {
            let mut batch = session.batch();
            for id in 1..=statements {
                batch.push(WRITE, (id,));
            }
            batch.push(READ, (1,)).run().await
        });
        result.unwrap();
        assert_eq!(n, 1, "of its own");
        let (n, result) = flights!(
            proxy,
            session.transaction(async |tx| {
                let mut batch = tx.batch();
                for id in 1..=statements {
                    batch.push(WRITE, (id,));
                }
                batch.run().await
            })
        );
        result.unwrap();
        assert_eq!(n, 1 + 1, "in a transaction, and COMMIT");
    }
    drop(session);
    let (n, result) =
        flights!(proxy, async { sessions.batch().push(WRITE, (1,)).push(READ, (1,)).run().await });
    result.unwrap();
    assert_eq!(n, 1, "by the manager");
    let options = TransactionOptions::new().deadline(std::time::Duration::from_secs(20));
    let (n, result) = flights!(proxy, async { sessions.batch_with(options).push(WRITE, (1,)).run().await });
    result.unwrap();
    assert_eq!(n, 2, "with a deadline COMMIT is held back");
    let fresh = ["SELECT 1", "SELECT 2", "SELECT 3"];
    let (n, result) = flights!(proxy, async {
        let mut batch = sessions.batch();
        for sql in fresh {
            batch.push(sql, ());
        }
        batch.run().await
    });
    result.unwrap();
    assert_eq!(n, 2, "whatever has to be prepared is prepared together");
}

#[tokio::test]
async fn execute_many_takes_one_for_each_window() {
    let (db, proxy, sessions) = counted().await;
    let mut session = sessions.acquire().await.unwrap();
    warm(&mut session, &[TransactionOptions::new()]).await;
    let ids = || (1..=100).map(|n| (n % 10 + 1,));
    let (n, result) = flights!(proxy, session.execute_many(WRITE, ids()));
    result.unwrap();
    assert_eq!(n, 1, "with BEGIN and COMMIT");
    let (n, result) = flights!(proxy, session.transaction(async |tx| tx.execute_many(WRITE, ids()).await));
    result.unwrap();
    assert_eq!(n, 1 + 1, "in a transaction, and COMMIT");
    assert_eq!(db.number("SELECT sum(a)::int8 FROM t").await, 200 + 1);
    let (n, result) = flights!(proxy, async {
        let rows = (0..10_000).map(|n| (n % 10 + 1,));
        session.transaction(async |tx| tx.execute_many(WRITE, rows.clone()).await).await
    });
    result.unwrap();
    // Some 40 bytes a row, 128 KiB a window.
    assert!((3..=6).contains(&n), "{n}");
}

#[tokio::test]
async fn the_first_begin_of_its_kind_takes_none_more() {
    let (_db, proxy, sessions) = counted().await;
    let mut session = sessions.acquire().await.unwrap();
    session.query_one(READ, &[&1]).await.unwrap();
    for _ in 0..3 {
        let (n, result) = flights!(
            proxy,
            session.transaction_with(TransactionOptions::serializable(), async |tx| {
                tx.query_one(READ, &[&1]).await
            })
        );
        result.unwrap();
        assert_eq!(n, 2);
    }
}

#[tokio::test]
async fn a_savepoint_takes_none() {
    let (_db, proxy, sessions) = counted().await;
    let mut session = sessions.acquire().await.unwrap();
    warm(&mut session, &[TransactionOptions::new()]).await;
    let (n, result) = flights!(
        proxy,
        session.transaction(async |tx| {
            tx.execute(WRITE, &[&1]).await?;
            tx.savepoint(async |sp| {
                sp.execute(WRITE, &[&2]).await?;
                sp.savepoint(async |sp| sp.execute(WRITE, &[&3]).await).await
            })
            .await?;
            let undone = tx.savepoint(async |sp| sp.execute("SELECT 1/0", &[]).await).await;
            undone.unwrap_err();
            tx.execute(WRITE, &[&4]).await
        })
    );
    result.unwrap();
    // Four updates and COMMIT; the failing statement fails when it is prepared or when it runs: one or two.
    assert_eq!(n, 4 + 2 + 1);
}

#[tokio::test]
async fn a_retry_takes_none() {
    let (_db, proxy, sessions) = counted().await;
    let options =
        TransactionOptions::new().retry(RetryPolicy::default().base_delay(std::time::Duration::ZERO));
    let mut session = sessions.acquire().await.unwrap();
    warm(&mut session, std::slice::from_ref(&options)).await;
    let fail = "SELECT pg_session_fail($1)";
    _db.run(
        "CREATE FUNCTION pg_session_fail(fail bool) RETURNS void LANGUAGE plpgsql AS
         $$ BEGIN IF fail THEN RAISE SQLSTATE '40001'; END IF; END $$",
    )
    .await;
    session.execute(fail, &[&false]).await.unwrap();
    let failures = AtomicU32::new(3);
    let (n, result) = flights!(
        proxy,
        session.transaction_with(options, async |tx| {
            tx.execute(WRITE, &[&1]).await?;
            let left = failures.load(SeqCst);
            failures.store(left.saturating_sub(1), SeqCst);
            tx.execute(fail, &[&(left > 0)]).await
        })
    );
    result.unwrap();
    assert_eq!(n, 4 * 2 + 1, "two statements in each of four attempts, and one COMMIT");
}

#[tokio::test]
async fn a_commit_that_rolled_back_is_told_without_another() {
    let (db, proxy, sessions) = counted().await;
    db.run("CREATE TABLE d (id int REFERENCES t DEFERRABLE INITIALLY DEFERRED)").await;
    let mut session = sessions.acquire().await.unwrap();
    warm(&mut session, &[TransactionOptions::new()]).await;
    session.prepare("INSERT INTO d VALUES ($1)").await.unwrap();
    let (n, result) = flights!(
        proxy,
        session.transaction(async |tx| tx.execute("INSERT INTO d VALUES ($1)", &[&99]).await)
    );
    assert!(result.unwrap_err().is_foreign_key_violation());
    assert_eq!(n, 2);
}

#[tokio::test]
async fn a_dirty_session_is_reset_by_one() {
    let (_db, proxy, sessions) = counted().await;
    let session = sessions.acquire().await.unwrap();
    session.batch_execute("SET app.trace = 'x'").await.unwrap();
    let before = proxy.flights();
    drop(session);
    drop(within(sessions.acquire()).await.unwrap());
    assert_eq!(proxy.flights() - before, 1);
}
