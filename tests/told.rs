//! What callers are told, beside what is stored, in places that are easily forgotten.
#![cfg(feature = "testing")]
#![allow(clippy::mem_forget, reason = "what is leaked is what is tested")]

mod common;

use std::os::unix::fs::PermissionsExt;

use bytes::Bytes;
use common::proxy::{AtCommit, Proxy};
use common::table::Table;
use common::{leaked, polls, until_returned, within};
use futures_util::SinkExt;
use pg_session::{Error, SessionManager};

/// Transaction: "Dropped before its end, it is rolled back"; rollback(): "Returns when the server has done so."
#[tokio::test]
async fn rollback_undoes_a_statement_that_was_given_up_just_before() {
    within(async {
        let table = Table::new().await;
        let mut session = table.session().await;
        session.prepare("INSERT INTO t VALUES (1)").await.unwrap();
        let tx = session.begin().await.unwrap();
        assert!(polls(tx.execute("INSERT INTO t VALUES (1)", &[]), 1).await.is_none());
        tx.rollback().await;
        assert_eq!(table.rows_after(session).await, 0);
    })
    .await;
}

#[tokio::test]
async fn rollback_undoes_a_statement_whose_future_was_leaked() {
    within(async {
        let table = Table::new().await;
        let mut session = table.session().await;
        session.prepare("INSERT INTO t VALUES (1)").await.unwrap();
        let tx = session.begin().await.unwrap();
        assert!(leaked(tx.execute("INSERT INTO t VALUES (1)", &[]), 1).await.is_none());
        tx.rollback().await;
        assert_eq!(table.rows_after(session).await, 0);
    })
    .await;
}

/// What is told Ok outside a transaction is stored.
#[tokio::test]
async fn a_statement_of_the_session_is_not_part_of_a_transaction_that_was_leaked() {
    within(async {
        let table = Table::new().await;
        let mut session = table.session().await;
        std::mem::forget(session.begin().await.unwrap());
        let told = session.execute("INSERT INTO t VALUES (1)", &[]).await;
        let stored = table.rows_after(session).await;
        assert!(told.is_err() || stored == 1, "told {told:?}, stored {stored}");
    })
    .await;
}

/// copy_in: "[`Error::Config`] for text that is no COPY" … FROM STDIN; an error means that nothing is stored
/// (Error::Copy: "nothing is stored").
#[tokio::test]
async fn a_copy_that_fails_has_stored_nothing() {
    within(async {
        let table = Table::new().await;
        let file = std::env::temp_dir().join(format!("test_copy_{}", std::process::id()));
        std::fs::write(&file, "1\n2\n").unwrap();
        // The server may run as somebody else.
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
        let session = table.session().await;
        let sql = format!("COPY t FROM '{}'", file.display());
        let told = session.copy_in(&sql).await.map(drop);
        let stored = table.rows().await;
        let in_by_out = format!("COPY t FROM '{}' WHERE id > 100", file.display());
        let told_by_out = session.copy_out(&in_by_out).await.map(drop);
        drop(session);
        std::fs::remove_file(&file).unwrap();
        assert!(told.is_ok() || stored == 0, "told {told:?}, stored {stored}");
        assert!(told_by_out.is_err(), "it gave nothing out");
    })
    .await;
}

/// Error::ConnectionLost: "A transaction that was open is rolled back."
#[tokio::test]
async fn a_lost_answer_to_a_commit_of_the_users_own_is_an_unknown_outcome() {
    within(async {
        let table = Table::new().await;
        let proxy = Proxy::start().await;
        let sessions = SessionManager::new(proxy.config(&table.db).max_size(1)).unwrap();
        let session = sessions.acquire().await.unwrap();
        session.batch_execute("BEGIN").await.unwrap();
        session.execute("INSERT INTO t VALUES (1)", &[]).await.unwrap();
        proxy.at_commit(AtCommit::CutAfter);
        let told = session.batch_execute("COMMIT").await;
        let stored = table.rows_after(session).await;
        let unknown = told.as_ref().is_err_and(Error::is_outcome_unknown);
        assert!(unknown || stored == 0, "told {told:?}, stored {stored}");
    })
    .await;
}

/// A sink that was closed has been told Ok.
#[tokio::test]
async fn a_copy_that_was_closed_can_be_finished() {
    within(async {
        let table = Table::new().await;
        let session = table.session().await;
        let mut copy = session.copy_in("COPY t FROM STDIN").await.unwrap();
        copy.send(Bytes::from_static(b"1\n")).await.unwrap();
        SinkExt::close(&mut copy).await.unwrap();
        let told = copy.finish().await;
        let stored = table.rows().await;
        assert!(told.is_ok(), "told {told:?}, stored {stored}");
    })
    .await;
}

/// Batch::run: "One round trip more if this connection has not yet prepared some of the texts."
#[tokio::test]
async fn a_batch_of_more_texts_than_the_cache_holds_costs_two_round_trips() {
    within(async {
        let table = Table::new().await;
        let proxy = Proxy::start().await;
        let sessions = SessionManager::new(proxy.config(&table.db).max_size(1)).unwrap();
        let mut session = sessions.acquire().await.unwrap();
        session.execute("SELECT 1", &[]).await.unwrap();
        let before = proxy.flights();
        let texts: Vec<String> = (0..101).map(|n| format!("SELECT {n}")).collect();
        let mut batch = session.batch();
        for text in &texts {
            batch.push(text, ());
        }
        batch.run().await.unwrap();
        let flights = proxy.flights() - before;
        // Nobody waits for what is closed because the cache is full; it may count as well.
        assert!(flights <= 4, "{flights} round trips");
    })
    .await;
}

/// Session: "It starts as a new session would: no … setting … of whoever had the connection before."
#[tokio::test]
async fn a_setting_made_by_a_name_in_unicode_escapes_of_another_kind_is_reset() {
    within(async {
        let table = Table::new().await;
        let session = table.session().await;
        let sql = r#"SELECT U&"set!005fconfig" UESCAPE '!' ('application_name', 'evil', false)"#;
        assert!(session.query(sql, &[]).await.is_ok(), "the server knows such names");
        drop(session);
        until_returned(&table.sessions).await;
        let session = table.session().await;
        let name: String = session.query_one("SHOW application_name", &[]).await.unwrap().get(0);
        assert_ne!(name, "evil");
    })
    .await;
}
