//! What is to travel with the next request, while the driver has requests that it has not sent yet.
#![cfg(feature = "testing")]

mod common;

use common::table::Table;
use common::{polls, within};
use pg_session::Error;

/// Connection: "several may run at once, as under `try_join!`, and are then pipelined in the order in which they were
/// first polled".
#[tokio::test]
async fn two_texts_at_once_at_the_beginning_of_a_transaction_are_both_in_it() {
    within(async {
        let table = Table::new().await;
        let mut session = table.session().await;
        let told = session
            .transaction(async |tx| {
                tokio::try_join!(
                    tx.batch_execute("INSERT INTO t VALUES (1)"),
                    tx.batch_execute("INSERT INTO t VALUES (2)"),
                )?;
                Ok::<_, Error>(())
            })
            .await;
        let stored = table.rows_after(session).await;
        assert!(told.is_ok() && stored == 2, "told {told:?}, stored {stored}");
    })
    .await;
}

#[tokio::test]
async fn a_statement_and_a_text_at_once_at_the_beginning_of_a_transaction_are_both_in_it() {
    within(async {
        let table = Table::new().await;
        let mut session = table.session().await;
        session.query("SELECT 1", &[]).await.unwrap();
        let told = session
            .transaction(async |tx| {
                let (one, two) =
                    tokio::join!(tx.query("SELECT 1", &[]), tx.batch_execute("INSERT INTO t VALUES (2)"));
                one?;
                two?;
                Ok::<_, Error>(())
            })
            .await;
        let stored = table.rows_after(session).await;
        assert!(told.is_ok() && stored == 1, "told {told:?}, stored {stored}");
    })
    .await;
}

/// Transaction::savepoint: "on `Err` everything since its beginning is undone and the transaction goes on."
#[tokio::test]
async fn a_savepoint_that_fails_undoes_all_texts_that_ran_at_once_in_it() {
    within(async {
        let table = Table::new().await;
        let mut session = table.session().await;
        let told = session
            .transaction(async |tx| {
                tx.execute("INSERT INTO t VALUES (0)", &[]).await?;
                let undone: Result<(), Error> = tx
                    .savepoint(async |sp| {
                        tokio::try_join!(
                            sp.batch_execute("INSERT INTO t VALUES (1)"),
                            sp.batch_execute("INSERT INTO t VALUES (2)"),
                        )?;
                        Err(Error::NoRow)
                    })
                    .await;
                assert!(matches!(undone, Err(Error::NoRow)), "{undone:?}");
                Ok::<_, Error>(())
            })
            .await;
        let stored = table.rows_after(session).await;
        assert!(told.is_ok() && stored == 1, "told {told:?}, stored {stored}");
    })
    .await;
}

/// Drops a savepoint after each number of polls, one that is not the first thing of its transaction or one that is.
async fn assert_dropped_savepoint_is_undone(first: bool) {
    within(async {
        let table = Table::new().await;
        for n in 1..3usize {
            let mut session = table.session().await;
            session.prepare("INSERT INTO t VALUES (1)").await.unwrap();
            let mut tx = session.begin().await.unwrap();
            if !first {
                tx.execute("SELECT 1", &[]).await.unwrap();
            }
            let savepoint = tx.savepoint(async |sp| {
                sp.execute("INSERT INTO t VALUES (1)", &[]).await?;
                std::future::pending::<()>().await;
                Ok::<_, Error>(())
            });
            assert!(polls(savepoint, n).await.is_none());
            let told = tx.commit().await;
            let stored = table.rows_after(session).await;
            assert_eq!(stored, 0, "dropped after {n} polls; commit told {told:?}");
        }
    })
    .await;
}

/// Transaction::savepoint: "Dropped, everything since its beginning is undone, and the transaction can go on."
#[tokio::test]
async fn a_savepoint_that_is_dropped_after_any_number_of_polls_is_undone() {
    assert_dropped_savepoint_is_undone(false).await;
}

#[tokio::test]
async fn a_savepoint_that_begins_a_transaction_and_is_dropped_after_any_number_of_polls_is_undone() {
    assert_dropped_savepoint_is_undone(true).await;
}

/// A statement that is given up inside the savepoint, and the savepoint fails with that.
#[tokio::test]
async fn a_savepoint_that_fails_over_a_statement_given_up_at_once_is_undone() {
    within(async {
        let table = Table::new().await;
        for n in 1..6usize {
            table.empty().await;
            let mut session = table.session().await;
            session.prepare("INSERT INTO t VALUES (1)").await.unwrap();
            let mut tx = session.begin().await.unwrap();
            tx.execute("SELECT 1", &[]).await.unwrap();
            let undone = tx
                .savepoint(async |sp| match polls(sp.execute("INSERT INTO t VALUES (1)", &[]), n).await {
                    Some(done) => done.and(Err::<(), _>(Error::NoRow)),
                    None => Err(Error::StatementAbandoned),
                })
                .await;
            assert!(undone.is_err());
            let told = tx.commit().await;
            let stored = table.rows_after(session).await;
            assert_eq!(stored, 0, "given up after {n} polls; commit told {told:?}");
        }
    })
    .await;
}
