//! What travels ahead of a simple query when the server refuses the text as a whole.
#![cfg(feature = "testing")]

mod common;

use common::table::Table;
use common::within;
use pg_session::Error;

const GARBAGE: &str = "this is no SQL";

/// Error::Aborted: "The transaction was rolled back because a statement in it failed earlier".
#[tokio::test]
async fn what_runs_after_a_first_text_that_does_not_parse_is_rolled_back_with_its_transaction() {
    within(async {
        let table = Table::new().await;
        let mut session = table.session().await;
        let told = session
            .transaction(async |tx| {
                assert!(tx.batch_execute(GARBAGE).await.is_err());
                let _ = tx.execute("INSERT INTO t VALUES (1)", &[]).await;
                Ok::<_, Error>(())
            })
            .await;
        assert!(told.is_err());
        assert_eq!(table.rows_after(session).await, 0, "told {told:?}");
    })
    .await;
}

#[tokio::test]
async fn what_runs_beside_a_first_text_that_does_not_parse_is_rolled_back_with_its_transaction() {
    within(async {
        let table = Table::new().await;
        let mut session = table.session().await;
        let told = session
            .transaction(async |tx| {
                tokio::try_join!(tx.batch_execute(GARBAGE), tx.batch_execute("INSERT INTO t VALUES (1)"))?;
                Ok::<_, Error>(())
            })
            .await;
        assert!(told.is_err());
        assert_eq!(table.rows_after(session).await, 0, "told {told:?}");
    })
    .await;
}

/// The same with `begin`, whose user rolls back by hand.
#[tokio::test]
async fn rollback_undoes_everything_that_its_transaction_ran() {
    within(async {
        let table = Table::new().await;
        let mut session = table.session().await;
        let tx = session.begin().await.unwrap();
        let _ = tx.batch_execute(GARBAGE).await;
        let _ = tx.execute("INSERT INTO t VALUES (1)", &[]).await;
        tx.rollback().await;
        assert_eq!(table.rows_after(session).await, 0);
    })
    .await;
}

/// Transaction::savepoint: "on `Ok` it is released, on `Err` everything since its beginning is undone and the
/// transaction goes on."
#[tokio::test]
async fn a_savepoint_that_was_released_is_not_undone_by_the_failure_of_the_next_one() {
    within(async {
        let table = Table::new().await;
        let mut session = table.session().await;
        let told = session
            .transaction(async |tx| {
                tx.execute("INSERT INTO t VALUES (1)", &[]).await?;
                tx.savepoint(async |sp| sp.execute("INSERT INTO t VALUES (2)", &[]).await).await?;
                assert!(tx.savepoint(async |sp| sp.batch_execute(GARBAGE).await).await.is_err());
                Ok::<_, Error>(())
            })
            .await;
        let stored = table.rows_after(session).await;
        assert!(
            told.is_err() && stored == 0 || told.is_ok() && stored == 2,
            "told {told:?}, stored {stored}"
        );
    })
    .await;
}

#[tokio::test]
async fn a_transaction_goes_on_after_a_savepoint_whose_text_does_not_parse() {
    within(async {
        let table = Table::new().await;
        let mut session = table.session().await;
        let told = session
            .transaction(async |tx| {
                tx.execute("INSERT INTO t VALUES (1)", &[]).await?;
                assert!(tx.savepoint(async |sp| sp.batch_execute(GARBAGE).await).await.is_err());
                tx.execute("INSERT INTO t VALUES (2)", &[]).await?;
                Ok::<_, Error>(())
            })
            .await;
        let stored = table.rows_after(session).await;
        assert!(told.is_ok() && stored == 2, "told {told:?}, stored {stored}");
    })
    .await;
}

#[tokio::test]
async fn a_transaction_that_begins_with_a_savepoint_whose_text_does_not_parse_stays_a_transaction() {
    within(async {
        let table = Table::new().await;
        let mut session = table.session().await;
        let told = session
            .transaction(async |tx| {
                assert!(tx.savepoint(async |sp| sp.batch_execute(GARBAGE).await).await.is_err());
                // Run or refused, as long as it is both of them.
                let _ = tx.execute("INSERT INTO t VALUES (2)", &[]).await;
                let _ = tx.execute("INSERT INTO t VALUES (3)", &[]).await;
                Ok::<_, Error>(())
            })
            .await;
        let stored = table.rows_after(session).await;
        assert!(
            told.is_err() && stored == 0 || told.is_ok() && stored == 2,
            "told {told:?}, stored {stored}"
        );
    })
    .await;
}

/// Error::Database: "The server or the driver refused a statement; the session is still usable."
#[tokio::test]
async fn a_text_that_the_driver_refuses_does_not_cost_the_connection() {
    within(async {
        let table = Table::new().await;
        let mut session = table.session().await;
        session.query("SELECT 1", &[]).await.unwrap();
        let mut tx = session.begin().await.unwrap();
        let refused = tx.savepoint(async |sp| sp.batch_execute("SELECT '\0'").await).await;
        assert!(refused.is_err());
        let next = tx.execute("INSERT INTO t VALUES (1)", &[]).await;
        assert!(next.is_ok(), "{next:?}");
        tx.commit().await.unwrap();
    })
    .await;
}
