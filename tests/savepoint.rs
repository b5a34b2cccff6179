//! Savepoints: what an inner failure undoes, and what it does not.
#![cfg(feature = "testing")]

mod common;

use common::{Database, within};
use pg_session::{Error, RetryPolicy, Transaction, TransactionOptions};

async fn database() -> Database {
    let db = Database::new().await;
    db.run("CREATE TABLE t (a int PRIMARY KEY)").await;
    db
}

async fn put(tx: &Transaction<'_>, a: i32) -> Result<u64, Error> {
    tx.execute("INSERT INTO t VALUES ($1)", &[&a]).await
}

impl Database {
    async fn stored(&self) -> Vec<i32> {
        let rows = self.watcher.query("SELECT a FROM t ORDER BY a", &[]).await.unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    }
}

#[tokio::test]
async fn an_inner_failure_that_is_handled_undoes_the_inner_part_only() {
    let db = database().await;
    let mut session = db.sessions().acquire().await.unwrap();
    session
        .transaction(async |tx| {
            put(tx, 1).await?;
            let inner = tx
                .savepoint(async |sp| {
                    put(sp, 2).await?;
                    put(sp, 1).await
                })
                .await;
            assert!(inner.unwrap_err().is_unique_violation());
            put(tx, 3).await
        })
        .await
        .unwrap();
    assert_eq!(db.stored().await, [1, 3]);
}

#[tokio::test]
async fn an_inner_failure_that_is_not_handled_undoes_everything() {
    let db = database().await;
    let mut session = db.sessions().acquire().await.unwrap();
    let error = session
        .transaction(async |tx| {
            put(tx, 1).await?;
            tx.savepoint(async |sp| put(sp, 1).await).await
        })
        .await
        .unwrap_err();
    assert!(error.is_unique_violation());
    assert!(db.stored().await.is_empty());
}

#[tokio::test]
async fn savepoints_nest_and_follow_one_another() {
    let db = database().await;
    let mut session = db.sessions().acquire().await.unwrap();
    session
        .transaction(async |tx| {
            for round in 0..3 {
                let base = round * 10;
                tx.savepoint(async |a| {
                    put(a, base + 1).await?;
                    a.savepoint(async |b| {
                        put(b, base + 2).await?;
                        let inner: Result<(), Error> = b
                            .savepoint(async |c| {
                                put(c, base + 3).await?;
                                Err(c.execute("SELECT 1/0", &[]).await.unwrap_err())
                            })
                            .await;
                        inner.unwrap_err();
                        put(b, base + 4).await
                    })
                    .await
                })
                .await?;
                // Undone although everything in it succeeded.
                let undone: Result<(), Own> = tx
                    .savepoint(async |a| {
                        put(a, base + 5).await?;
                        a.savepoint(async |b| put(b, base + 6).await).await?;
                        Err(Own)
                    })
                    .await;
                undone.unwrap_err();
            }
            Ok::<_, Error>(())
        })
        .await
        .unwrap();
    assert_eq!(db.stored().await, [1, 2, 4, 11, 12, 14, 21, 22, 24]);
}

#[derive(Debug)]
struct Own;

impl From<Error> for Own {
    fn from(_: Error) -> Self {
        Self
    }
}

#[tokio::test]
async fn ok_over_a_failed_statement_is_an_error_and_undone() {
    let db = database().await;
    let mut session = db.sessions().acquire().await.unwrap();
    session
        .transaction(async |tx| {
            put(tx, 1).await?;
            let inner = tx
                .savepoint(async |sp| {
                    put(sp, 2).await?;
                    let _ = put(sp, 1).await;
                    Ok::<_, Error>(())
                })
                .await
                .unwrap_err();
            assert!(matches!(inner, Error::Aborted(_)) && inner.is_unique_violation(), "{inner:?}");
            put(tx, 3).await
        })
        .await
        .unwrap();
    assert_eq!(db.stored().await, [1, 3]);
}

#[tokio::test]
async fn empty_savepoints_cost_nothing_and_do_no_harm() {
    let db = database().await;
    let mut session = db.sessions().acquire().await.unwrap();
    session
        .transaction(async |tx| {
            tx.savepoint(async |sp| sp.savepoint(async |_| Ok::<_, Error>(())).await).await?;
            let failed: Result<(), Own> = tx.savepoint(async |_| Err(Own)).await;
            failed.unwrap_err();
            put(tx, 1).await?;
            let failed: Result<(), Own> = tx.savepoint(async |_| Err(Own)).await;
            failed.unwrap_err();
            tx.savepoint(async |sp| put(sp, 2).await).await?;
            tx.savepoint(async |_| Ok::<_, Error>(())).await
        })
        .await
        .unwrap();
    assert_eq!(db.stored().await, [1, 2]);
    // The server has not been left with any.
    let left = session.transaction(async |tx| tx.batch_execute("RELEASE pgs_1").await).await.unwrap_err();
    assert_eq!(left.code().unwrap().code(), "3B001");
}

#[tokio::test]
async fn many_savepoints_do_not_pile_up() {
    let db = database().await;
    let mut session = db.sessions().acquire().await.unwrap();
    within(session.transaction(async |tx| {
        put(tx, 0).await?;
        for n in 1..200 {
            let result = tx.savepoint(async |sp| put(sp, n % 2).await).await;
            assert_eq!(result.is_ok(), n == 1);
        }
        // With one left open, this would release it.
        let error = tx
            .savepoint(async |sp| sp.batch_execute("RELEASE pgs_1; RELEASE pgs_1").await)
            .await
            .unwrap_err();
        assert_eq!(error.code().unwrap().code(), "3B001");
        Err::<(), _>(error)
    }))
    .await
    .unwrap_err();
}

#[tokio::test]
async fn an_error_in_a_savepoint_does_not_fail_the_commit_later() {
    let db = database().await;
    let mut session = db.sessions().acquire().await.unwrap();
    session
        .transaction_with(TransactionOptions::new().retry(RetryPolicy::never()), async |tx| {
            put(tx, 1).await?;
            // Even a serialization failure, if PostgreSQL is content in the end.
            let raise = "DO $$ BEGIN RAISE SQLSTATE '40001'; END $$";
            tx.savepoint(async |sp| sp.batch_execute(raise).await).await.unwrap_err();
            Ok::<_, Error>(())
        })
        .await
        .unwrap();
    assert_eq!(db.stored().await, [1]);
}

#[tokio::test]
async fn a_savepoint_at_the_very_beginning_brings_begin_along() {
    let db = database().await;
    let mut session = db.sessions().acquire().await.unwrap();
    session.transaction(async |tx| tx.savepoint(async |sp| put(sp, 1).await).await).await.unwrap();
    let tx_fails: Result<u64, Error> = session
        .transaction(async |tx| {
            tx.savepoint(async |sp| put(sp, 1).await).await.unwrap_err();
            put(tx, 2).await
        })
        .await;
    tx_fails.unwrap();
    assert_eq!(db.stored().await, [1, 2]);
}
