//! Deadlines, and connections that the server ends while a unit of work is under way.
#![cfg(feature = "testing")]

mod common;

use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::{Duration, Instant};

use common::middle::{At, Direction, Middle, Then};
use common::{Database, ms, within};
use pg_session::{Error, RetryClass, RetryPolicy, Session, SessionManager, TransactionOptions};

/// Far above the deadline, for a busy machine, and far below `CLEANUP`.
const SOON: Duration = Duration::from_millis(2500);

/// What it would take without the deadline.
const CLEANUP: Duration = Duration::from_secs(10);

fn short() -> TransactionOptions {
    TransactionOptions::new().deadline(ms(300))
}

/// A session by way of the middle that has been at work before.
async fn session(middle: &Middle, db: &Database) -> (SessionManager, Session) {
    let config = middle.config(db).cleanup_timeout(CLEANUP).max_size(1);
    let sessions = SessionManager::new(config).unwrap();
    let session = sessions.acquire().await.unwrap();
    session.execute("SELECT 1", &[]).await.unwrap();
    (sessions, session)
}

/// TransactionOptions::deadline: "How long the whole transaction may take: all attempts, the pauses between them …"
#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_bounds_a_rollback_that_is_not_answered() {
    let db = Database::new().await;
    let mut middle = Middle::start().await;
    let (_sessions, mut session) = session(&middle, &db).await;
    middle.arm(Direction::ToServer, At::Like(Box::new(|_, body| body.starts_with(b"\0ROLLBACK\0"))));
    let started = Instant::now();
    let run = session.transaction_with(short(), async |tx| {
        tx.execute("SELECT 1", &[]).await?;
        Err::<(), _>(Error::NoRow)
    });
    let stall = async { middle.stop().await.then(Then::Stall) };
    let (told, ()) = within(async { tokio::join!(run, stall) }).await;
    let took = started.elapsed();
    // The closure's own error first, whatever became of the rollback.
    assert!(matches!(told, Err(Error::NoRow)), "{told:?}");
    assert!(took < SOON, "{took:?}");
}

/// The same, while an earlier statement of the session is drained.
#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_bounds_waiting_for_what_was_abandoned_before() {
    let db = Database::new().await;
    let mut middle = Middle::start().await;
    let (_sessions, mut session) = session(&middle, &db).await;
    middle.arm(Direction::ToServer, At::Before(0));
    tokio::select! {
        told = session.execute("SELECT 1", &[]) => panic!("answered: {told:?}"),
        stop = middle.stop() => stop.then(Then::Stall),
    }
    let started = Instant::now();
    let told = within(session.transaction_with(short(), async |tx| tx.execute("SELECT 1", &[]).await)).await;
    let took = started.elapsed();
    assert!(matches!(told, Err(Error::DeadlineExceeded { .. })), "{told:?}");
    assert!(took < SOON, "{took:?}");
}

/// README: "the connection, before COMMIT was sent | ConnectionLost | only if asked, by SessionManager::transaction".
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_ended_by_the_idle_in_transaction_timeout_is_retried_if_asked() {
    let db = Database::new().await;
    let sessions = db.sessions();
    let policy =
        RetryPolicy::default().retry_on(RetryClass::ConnectionLost).base_delay(ms(1)).max_attempts(3);
    let options =
        TransactionOptions::new().retry(policy).local_setting("idle_in_transaction_session_timeout", "100ms");
    // Whether a statement finds out or COMMIT does.
    for statement in [true, false] {
        let runs = AtomicU32::new(0);
        let told: Result<(), Error> = within(sessions.transaction_with(options.clone(), async |tx| {
            tx.execute("SELECT 1", &[]).await?;
            if runs.fetch_add(1, SeqCst) == 0 {
                db.until_ended(tx.process_id()).await;
            }
            if statement {
                tx.execute("SELECT 1", &[]).await?;
            }
            Ok(())
        }))
        .await;
        assert!(told.is_ok() && runs.load(SeqCst) == 2, "{statement}: {told:?}");
    }
    // By hand there is nobody to run it again.
    let tx = sessions.begin_with(options).await.unwrap();
    tx.execute("SELECT 1", &[]).await.unwrap();
    db.until_ended(tx.process_id()).await;
    let told = within(tx.commit()).await;
    assert!(matches!(told, Err(Error::ConnectionLost(_))), "{told:?}");
}
