//! The moment a connection comes to rest, seen from another thread: whoever is granted it finds nothing left over from
//! before. They ask over and over rather than wait to be told, since the window is as long as a few instructions.
#![cfg(feature = "testing")]

mod common;

use common::{Database, polls, within};

/// More show it more often; with a pause of 0.3 ms in the window, two of three did.
const ROUNDS: u32 = 1000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_raw_client_is_nobody_elses_once_it_is_lent() {
    within(async {
        let db = Database::new().await;
        let sessions = db.single();
        for _ in 0..ROUNDS {
            let mut session = sessions.acquire().await.unwrap();
            let _ = polls(session.query("SELECT 1", &[]), 1).await;
            loop {
                if let Some(client) = polls(session.client(), 1).await {
                    client.expect("the client to itself");
                    break;
                }
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_keeps_its_begin_and_its_record() {
    within(async {
        let db = Database::new().await;
        let sessions = db.single();
        let mut session = sessions.acquire().await.unwrap();
        for _ in 0..ROUNDS {
            let _ = polls(session.query("SELECT 1", &[]), 1).await;
            let tx = loop {
                if let Some(tx) = polls(session.begin(), 1).await {
                    break tx.expect("a transaction");
                }
            };
            tx.query("SELECT 2", &[]).await.expect("BEGIN was sent");
            tx.rollback().await;
        }
    })
    .await;
}
