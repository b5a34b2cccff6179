//! What is said, and done, when something ends badly: a sink that failed, a panic beside COMMIT, a bare 25P02.
#![cfg(feature = "testing")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::{Duration, Instant};

use common::gate::Gate;
use common::proxy::Proxy;
use common::table::Table;
use common::{Database, ms, until, until_returned, within};
use futures_util::SinkExt;
use pg_session::{Error, RetryClass, RetryPolicy, SessionManager, TransactionOptions};
use tokio::sync::oneshot;

/// CopyIn: a [`Sink`] that failed does not say afterwards that all is well.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_failed_is_not_closed_well_the_second_time() {
    let table = Table::of("id int").await;
    let session = table.session().await;
    let mut copy = session.copy_in("COPY t FROM STDIN").await.unwrap();
    copy.send("1\nx\n".into()).await.unwrap();
    let first = SinkExt::close(&mut copy).await;
    let second = SinkExt::close(&mut copy).await;
    let third = copy.finish().await;
    assert!(first.is_err() && second.is_err() && third.is_err(), "{first:?} {second:?} {third:?}");
    assert_eq!(table.rows().await, 0);
}

/// How a future that commits comes to its end before COMMIT is answered.
#[derive(Clone, Copy, Debug)]
enum Left {
    Dropped,
    /// By somebody who panics right after.
    DroppedBeforeAPanic,
    /// By a panic of what is polled beside it, as that unwinds.
    Unwound,
}

/// on_commit: "If the future that commits is dropped while COMMIT is under way, they are run in the background once it
/// is known that it was committed."
#[tokio::test(flavor = "multi_thread")]
async fn hooks_run_when_a_panic_beside_a_commit_drops_it() {
    let table = Table::of("id int").await;
    let gate = Gate::at_commits(&table.db).await;
    for left in [Left::Dropped, Left::DroppedBeforeAPanic, Left::Unwound] {
        table.empty().await;
        gate.close().await;
        let (leave, told_to_leave) = oneshot::channel::<()>();
        let ran = Arc::new(AtomicU32::new(0));
        let task = tokio::spawn({
            let (sessions, ran) = (table.sessions.clone(), Arc::clone(&ran));
            async move {
                let work = sessions.transaction(async |tx| {
                    tx.execute("INSERT INTO t VALUES (1)", &[]).await?;
                    let ran = Arc::clone(&ran);
                    tx.on_commit(async move || {
                        ran.fetch_add(1, SeqCst);
                    });
                    Ok::<_, Error>(())
                });
                let leaving = async { told_to_leave.await.unwrap() };
                match left {
                    Left::Unwound => {
                        tokio::join!(work, async {
                            leaving.await;
                            panic!("on purpose");
                        });
                    }
                    left => tokio::select! {
                        told = work => panic!("COMMIT was answered: {told:?}"),
                        () = leaving => assert!(matches!(left, Left::Dropped), "on purpose"),
                    },
                }
            }
        });
        gate.until_reached().await;
        leave.send(()).unwrap();
        assert_eq!(within(task).await.is_err(), !matches!(left, Left::Dropped), "{left:?}");
        assert_eq!(ran.load(SeqCst), 0, "{left:?}: before it is known");
        gate.open().await;
        until(|| ran.load(SeqCst) > 0).await;
        until_returned(&table.sessions).await;
        assert_eq!((ran.load(SeqCst), table.rows().await), (1, 1), "{left:?}");
    }
}

/// What keeps a transaction until its deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wait {
    ForASession,
    ForAConnection,
    BetweenAttempts,
    InTheClosure,
}

/// Whatever a transaction waits for, it says so in time, and the pool is whole.
#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_bounds_every_wait_of_the_manager() {
    let db = Database::new().await;
    let proxy = Proxy::start().await;
    // Each longer than the bound below, so that it is the deadline that ends the wait.
    let config = proxy.config(&db).max_size(1).connect_timeout(ms(5000)).cleanup_timeout(ms(300));
    let sessions = SessionManager::new(config).unwrap();
    for wait in [Wait::ForASession, Wait::ForAConnection, Wait::BetweenAttempts, Wait::InTheClosure] {
        let held = sessions.acquire().await.unwrap();
        let held = (wait == Wait::ForASession).then_some(held);
        if wait == Wait::ForAConnection {
            proxy.be_silent(true);
            proxy.cut_all();
            db.until_alone().await;
        }
        let started = Instant::now();
        let policy = RetryPolicy::default().retry_on(RetryClass::ConnectionLost).max_attempts(50);
        let options = TransactionOptions::new().deadline(ms(250)).retry(policy.base_delay(ms(100)));
        let told: Result<(), Error> = within(sessions.transaction_with(options, async |tx| {
            tx.execute("SELECT 1", &[]).await?;
            if wait == Wait::BetweenAttempts {
                tx.batch_execute("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$").await?;
            }
            if wait == Wait::InTheClosure {
                std::future::pending::<()>().await;
            }
            Ok(())
        }))
        .await;
        let took = started.elapsed();
        assert!(matches!(told, Err(Error::DeadlineExceeded { .. })), "{wait:?}: {told:?}");
        assert!(took < Duration::from_secs(2), "{wait:?}: {took:?}");
        drop(held);
        if wait == Wait::ForAConnection {
            proxy.be_silent(false);
            proxy.cut_all(); // those that were met with silence
        }
        until_returned(&sessions).await;
        // One may hear of an attempt to connect that was cut.
        within(async { while sessions.ping().await.is_err() {} }).await;
    }
}

/// RetryClass: "25P02 | – | never by itself"; ConnectionLost: "The connection is gone."
#[tokio::test(flavor = "multi_thread")]
async fn a_25p02_of_a_remote_server_is_no_lost_connection() {
    const REMOTE: &str =
        "DO $$ BEGIN RAISE SQLSTATE '25P02' USING MESSAGE = 'the remote transaction is aborted'; END $$";
    let db = Database::new().await;
    let mut session = db.single().acquire().await.unwrap();
    let told: Result<(), Error> = within(session.transaction(async |tx| {
        let _ = tx.batch_execute(REMOTE).await;
        Ok(())
    }))
    .await;
    let next = session.execute("SELECT 1", &[]).await;
    assert!(matches!(told, Err(Error::Aborted(_))), "{told:?}");
    assert!(next.is_ok(), "{next:?}");
}
