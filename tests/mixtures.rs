//! Savepoints, batches, panics and given-up statements, mixed.
#![cfg(feature = "testing")]

mod common;

use common::table::Table;
use common::{leaked, polls, within};
use pg_session::{Error, RetryPolicy, TransactionOptions};

/// TransactionOptions: local settings and isolation hold for every statement of the transaction.
#[tokio::test]
async fn no_statement_of_a_transaction_runs_without_its_isolation_level_and_settings() {
    within(async {
        let table = Table::new().await;
        let mut session = table.session().await;
        let options = TransactionOptions::serializable().retry(RetryPolicy::never());
        let options = options.local_setting("app.tenant", "7");
        let told = session
            .transaction_with(options, async |tx| {
                let _ = tx.batch_execute("nonsense").await;
                let sql = "SELECT current_setting('transaction_isolation'), \
                                  current_setting('app.tenant', true)";
                if let Ok(row) = tx.query_one(sql, &[]).await {
                    let seen: (String, Option<String>) = (row.get(0), row.get(1));
                    assert_eq!(seen, ("serializable".into(), Some("7".into())));
                }
                Ok::<_, Error>(())
            })
            .await;
        assert!(told.is_err());
    })
    .await;
}

/// Error::Database: "The server or the driver refused a statement".
#[tokio::test]
async fn the_first_text_of_a_transaction_is_refused_with_the_servers_own_error() {
    within(async {
        let table = Table::new().await;
        let mut session = table.session().await;
        let tx = session.begin().await.unwrap();
        let e = tx.batch_execute("SELEC 1").await.unwrap_err();
        assert!(e.db_error().is_some(), "{e:?}: {e}");
    })
    .await;
}

/// Savepoint given up by a leaked statement: "on `Err` everything since its beginning is undone".
#[tokio::test]
async fn a_savepoint_that_fails_undoes_a_statement_that_was_leaked_in_it() {
    within(async {
        let table = Table::new().await;
        let mut session = table.session().await;
        session.prepare("INSERT INTO t VALUES (1)").await.unwrap();
        let mut tx = session.begin().await.unwrap();
        tx.execute("INSERT INTO t VALUES (0)", &[]).await.unwrap();
        let undone: Result<(), Error> = tx
            .savepoint(async |sp| {
                assert!(leaked(sp.execute("INSERT INTO t VALUES (1)", &[]), 1).await.is_none());
                Err(Error::NoRow)
            })
            .await;
        assert!(undone.is_err());
        let told = tx.commit().await;
        let stored = table.rows_after(session).await;
        assert_eq!(stored, i64::from(told.is_ok()), "the row before the savepoint; commit told {told:?}");
    })
    .await;
}

/// A savepoint against something that is ready, as people write it.
#[tokio::test]
async fn a_savepoint_in_a_select_that_somebody_else_won_is_undone() {
    within(async {
        let table = Table::new().await;
        let mut session = table.session().await;
        session.prepare("INSERT INTO t VALUES (1)").await.unwrap();
        let told = session
            .transaction(async |tx| {
                tx.execute("INSERT INTO t VALUES (0)", &[]).await?;
                let savepoint = tx.savepoint(async |sp| sp.execute("INSERT INTO t VALUES (1)", &[]).await);
                tokio::select! {
                    biased;
                    told = savepoint => unreachable!("{told:?}"),
                    () = std::future::ready(()) => {}
                }
                Ok::<_, Error>(())
            })
            .await;
        let stored = table.rows_after(session).await;
        assert_eq!(stored, i64::from(told.is_ok()), "the row before the savepoint; told {told:?}");
    })
    .await;
}

/// `select!` against something that is ready, then rollback().
#[tokio::test]
async fn rollback_after_a_select_that_somebody_else_won_undoes_everything() {
    within(async {
        let table = Table::new().await;
        let mut session = table.session().await;
        session.prepare("INSERT INTO t VALUES (1)").await.unwrap();
        let tx = session.begin().await.unwrap();
        tokio::select! {
            biased;
            told = tx.execute("INSERT INTO t VALUES (1)", &[]) => unreachable!("{told:?}"),
            () = std::future::ready(()) => {}
        }
        tx.rollback().await;
        assert_eq!(table.rows_after(session).await, 0);
    })
    .await;
}

/// The same for commit, drop and the closure form.
#[tokio::test]
async fn a_statement_given_up_before_it_was_written_is_never_stored_by_commit_or_drop() {
    within(async {
        let table = Table::new().await;
        for how in 0..3 {
            let mut session = table.session().await;
            session.prepare("INSERT INTO t VALUES (1)").await.unwrap();
            match how {
                0 => {
                    let tx = session.begin().await.unwrap();
                    assert!(polls(tx.execute("INSERT INTO t VALUES (1)", &[]), 1).await.is_none());
                    let told = tx.commit().await;
                    assert!(matches!(told, Err(Error::StatementAbandoned)), "{told:?}");
                }
                1 => {
                    let tx = session.begin().await.unwrap();
                    assert!(polls(tx.execute("INSERT INTO t VALUES (1)", &[]), 1).await.is_none());
                    drop(tx);
                }
                _ => {
                    let told: Result<(), Error> = session
                        .transaction(async |tx| {
                            assert!(polls(tx.execute("INSERT INTO t VALUES (1)", &[]), 1).await.is_none());
                            Err(Error::NoRow)
                        })
                        .await;
                    assert!(told.is_err());
                }
            }
            assert_eq!(table.rows_after(session).await, 0, "{how}");
        }
    })
    .await;
}

/// A manager's transaction that ends in a rollback by hand after a first text that the server refuses.
#[tokio::test]
async fn a_batch_beside_a_first_statement_that_fails_is_rolled_back() {
    within(async {
        let table = Table::new().await;
        let mut session = table.session().await;
        session.prepare("INSERT INTO t VALUES (1)").await.unwrap();
        let told = session
            .transaction(async |tx| {
                let (a, b) =
                    tokio::join!(tx.batch_execute("nonsense"), tx.execute("INSERT INTO t VALUES (1)", &[]));
                a.and(b.map(drop))
            })
            .await;
        let stored = table.rows_after(session).await;
        assert_eq!(stored, 0, "told {told:?}");
    })
    .await;
}

/// A try_join! without anything swallowed: the error of the text ends the closure at once.
#[tokio::test]
async fn a_try_join_with_a_first_text_that_fails_is_rolled_back() {
    within(async {
        let table = Table::new().await;
        let mut session = table.session().await;
        session.prepare("INSERT INTO t VALUES (1)").await.unwrap();
        let told = session
            .transaction(async |tx| {
                tokio::try_join!(tx.batch_execute("nonsense"), tx.execute("INSERT INTO t VALUES (1)", &[]))?;
                Ok::<_, Error>(())
            })
            .await;
        let stored = table.rows_after(session).await;
        assert_eq!(stored, 0, "told {told:?}");
    })
    .await;
}
