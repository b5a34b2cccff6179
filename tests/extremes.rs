//! Settings at the ends of their range: used as they are, or refused with a word; never a panic, and nothing is
//! allocated by their size.
#![cfg(feature = "testing")]

mod common;

use std::time::Duration;

use common::{Database, within};
use pg_session::{Error, RetryPolicy, SessionConfig, SessionManager, TransactionOptions};

const MAX: Duration = Duration::MAX;

#[tokio::test]
async fn no_duration_is_too_long() {
    let db = Database::new().await;
    let base = || db.config().max_size(1);
    let configs: [(&str, SessionConfig); 8] = [
        ("acquire_timeout", base().acquire_timeout(MAX)),
        ("connect_timeout", base().connect_timeout(MAX)),
        ("max_lifetime", base().max_lifetime(MAX)),
        ("idle_timeout", base().idle_timeout(MAX)),
        ("check_after_idle", base().check_after_idle(MAX)),
        ("cleanup_timeout", base().cleanup_timeout(MAX)),
        ("commit_timeout", base().commit_timeout(MAX)),
        ("shutdown_timeout", base().shutdown_timeout(MAX)),
    ];
    for (name, config) in configs {
        let sessions = SessionManager::new(config).expect(name);
        let held = within(sessions.acquire()).await.expect(name);
        let waiter = tokio::spawn({
            let sessions = sessions.clone();
            async move { sessions.acquire().await.map(drop) }
        });
        // Something to clean up.
        held.batch_execute("BEGIN").await.expect(name);
        common::polls(held.execute("SELECT pg_sleep(600)", &[]), 1).await;
        drop(held);
        within(waiter).await.unwrap().expect(name);
        within(sessions.transaction(async |tx| tx.execute("SELECT 1", &[]).await)).await.expect(name);
        // Closed by its borrower, and made anew.
        drop(within(sessions.acquire()).await.expect(name));
        assert_eq!(within(sessions.close()).await, 0, "{name}");
    }
}

#[tokio::test]
async fn no_time_that_a_transaction_may_take_is_too_long() {
    let db = Database::new().await;
    let sessions = db.single();
    let policy = RetryPolicy::default().base_delay(Duration::ZERO).max_delay(MAX).max_elapsed(MAX);
    let options = TransactionOptions::new().deadline(MAX).retry(policy);
    let mut runs = 0;
    let count = std::sync::atomic::AtomicUsize::new(0);
    within(sessions.transaction_with(options, async |tx| {
        if count.fetch_add(1, std::sync::atomic::Ordering::SeqCst) == 0 {
            tx.batch_execute("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$").await?;
        }
        tx.execute("SELECT 1", &[]).await
    }))
    .await
    .unwrap();
    runs += count.load(std::sync::atomic::Ordering::SeqCst);
    assert_eq!(runs, 2);
}

#[tokio::test]
async fn a_number_that_makes_no_sense_is_refused_and_the_limit_named() {
    let base = SessionConfig::new;
    for (config, says) in [
        (base().max_size(usize::MAX), ["max_size", "262143"]),
        (base().max_size(i32::MAX as usize), ["max_size", "262143"]),
        (base().max_size(0), ["max_size", "1"]),
        (base().statement_cache_capacity(usize::MAX), ["statement_cache_capacity", "10000"]),
        (base().statement_cache_capacity(1_000_000), ["statement_cache_capacity", "10000"]),
        (base().statement_cache_capacity(0), ["statement_cache_capacity", "1"]),
    ] {
        let Err(Error::Config(why)) = SessionManager::new(config) else { panic!("{says:?}") };
        assert!(says.iter().all(|part| why.contains(part)), "{why}");
    }
    let sessions = SessionManager::new(base().max_size(262_143).statement_cache_capacity(10_000));
    sessions.expect("the most that makes sense");
}

#[cfg(feature = "problem")]
#[test]
fn clients_may_be_asked_to_wait_for_ever() {
    let problems = pg_session::Problems::new().retry_after(MAX);
    let sessions = SessionManager::new(SessionConfig::new()).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(sessions.close());
    let error = runtime.block_on(sessions.acquire()).unwrap_err();
    assert_eq!(problems.problem(error).retry_after(), Some(u64::MAX));
}
