//! Deadlines, and connections that the server ends while a unit of work is under way.
#![cfg(feature = "testing")]
mod common;

use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::{Duration, Instant};

use common::middle::{At, Direction, Middle, Then};
use common::{Database, within};
use pg_session::{Error, RetryClass, RetryPolicy, SessionManager, TransactionOptions};

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn all() -> RetryPolicy {
    use RetryClass::*;
    [Serialization, Deadlock, StaleStatement, LockNotAvailable, KeyConflict, ConnectionLost, ReadOnlyServer]
        .into_iter()
        .fold(RetryPolicy::default(), RetryPolicy::retry_on)
        .base_delay(ms(1))
        .max_attempts(3)
}

/// options.rs: "How long the whole transaction may take: all attempts, the pauses between them …"
#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_bounds_a_rollback_that_is_not_answered() {
    let db = Database::new().await;
    let mut middle = Middle::start().await;
    let url = middle.url(db.database.name());
    let config: pg_session::SessionConfig = url.parse().unwrap();
    let sessions = SessionManager::new(config.cleanup_timeout(ms(5000)).max_size(1)).unwrap();
    let mut session = sessions.acquire().await.unwrap();
    session.execute("SELECT 1", &[]).await.unwrap();
    middle.arm(Direction::ToServer, At::Like(Box::new(|_, body| body.starts_with(b"ROLLBACK"))));
    let started = Instant::now();
    let run = session.transaction_with(TransactionOptions::new().deadline(ms(300)), async |tx| {
        tx.execute("SELECT 1", &[]).await?;
        Err::<(), _>(Error::NoRow)
    });
    let stall = async { middle.stop().await.then(Then::Stall) };
    let (result, ()) = within(async { tokio::join!(run, stall) }).await;
    println!("rollback: {result:?} after {:?}", started.elapsed());
    assert!(started.elapsed() < ms(1500), "{:?}", started.elapsed());
}

/// The same, while an earlier statement of the session is drained.
#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_bounds_waiting_for_what_was_abandoned_before() {
    let db = Database::new().await;
    let mut middle = Middle::start().await;
    let url = middle.url(db.database.name());
    let config: pg_session::SessionConfig = url.parse().unwrap();
    let sessions = SessionManager::new(config.cleanup_timeout(ms(5000)).max_size(1)).unwrap();
    let mut session = sessions.acquire().await.unwrap();
    session.execute("SELECT 1", &[]).await.unwrap();
    middle.arm(Direction::ToServer, At::Before(0));
    let stall = async { middle.stop().await.then(Then::Stall) };
    {
        let query = async {
            let _ = session.execute("SELECT 1", &[]).await;
        };
        tokio::select! { () = query => {}, () = async { stall.await; tokio::time::sleep(ms(50)).await } => {} }
    }
    let started = Instant::now();
    let result = within(session.transaction_with(TransactionOptions::new().deadline(ms(300)), async |tx| {
        tx.execute("SELECT 1", &[]).await
    }))
    .await;
    println!("claim: {result:?} after {:?}", started.elapsed());
    assert!(started.elapsed() < ms(1500), "{:?}", started.elapsed());
}

/// README: "the connection, before COMMIT was sent | ConnectionLost | only if asked, by SessionManager::transaction".
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_ended_by_the_idle_in_transaction_timeout_is_retried_if_asked() {
    let db = Database::new().await;
    let sessions = db.sessions();
    let n = AtomicU32::new(0);
    let options =
        TransactionOptions::new().retry(all()).local_setting("idle_in_transaction_session_timeout", "100ms");
    for wait in [true, false] {
        n.store(0, SeqCst);
        let result: Result<(), Error> = within(sessions.transaction_with(options.clone(), async |tx| {
            tx.execute("SELECT 1", &[]).await?;
            if n.fetch_add(1, SeqCst) == 0 {
                tokio::time::sleep(ms(400)).await;
            }
            if wait {
                tx.execute("SELECT 1", &[]).await?;
            }
            Ok(())
        }))
        .await;
        println!("idle in transaction: {result:?} {} runs", n.load(SeqCst));
        if let Err(e) = &result {
            println!("   {e}");
        }
    }
    // by hand
    let tx = sessions.begin_with(options).await.unwrap();
    tx.execute("SELECT 1", &[]).await.unwrap();
    tokio::time::sleep(ms(400)).await;
    let r = within(tx.commit()).await;
    println!("begin/commit: {r:?}");
    assert!(matches!(r, Err(Error::ConnectionLost(_))), "{r:?}");
    assert!(n.load(SeqCst) == 2, "{}", n.load(SeqCst));
}
