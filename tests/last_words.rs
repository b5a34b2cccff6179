//! What is said, and done, when something ends badly: a sink that failed, a panic beside COMMIT, a bare 25P02.
#![cfg(feature = "testing")]
mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::{Duration, Instant};

use common::{Database, until_returned, within};
use futures_util::SinkExt;
use pg_session::{Error, RetryClass, RetryPolicy, SessionManager, TransactionOptions};

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// CopyIn: a [`Sink`] that failed does not say afterwards that all is well.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_failed_is_not_closed_well_the_second_time() {
    let db = Database::new().await;
    db.run("CREATE TABLE t (id int)").await;
    let session = db.sessions().acquire().await.unwrap();
    let mut c = session.copy_in("COPY t FROM STDIN").await.unwrap();
    c.send("1\nx\n".into()).await.unwrap();
    let first = SinkExt::close(&mut c).await;
    let second = SinkExt::close(&mut c).await;
    let third = c.finish().await;
    println!("{first:?} {second:?} {third:?}");
    if let Err(e) = &third {
        println!("{e}");
    }
    let n = db.number("SELECT count(*) FROM t").await;
    assert!(first.is_err() && second.is_err(), "told {second:?}, stored {n}");
}

/// on_commit: "If the future that commits is dropped while COMMIT is under way, they are run in the background once it is
/// known that it was committed."
#[tokio::test(flavor = "multi_thread")]
async fn hooks_run_when_a_panic_beside_a_commit_drops_it() {
    let db = Database::new().await;
    db.run("CREATE TABLE t (id int);
        CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.4); RETURN NULL; END $$;
        CREATE CONSTRAINT TRIGGER c AFTER INSERT ON t DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION slow()").await;
    for panics in [false, true] {
        db.run("TRUNCATE t").await;
        let sessions = db.sessions();
        let ran = Arc::new(AtomicU32::new(0));
        let task = tokio::spawn({
            let (sessions, ran) = (sessions.clone(), ran.clone());
            async move {
                let work = sessions.transaction(async |tx| {
                    tx.execute("INSERT INTO t VALUES (1)", &[]).await?;
                    let ran = ran.clone();
                    tx.on_commit(async move || {
                        ran.fetch_add(1, SeqCst);
                    });
                    Ok::<_, Error>(())
                });
                tokio::select! { r = work => r.unwrap(), () = tokio::time::sleep(ms(150)) => if panics { panic!("on purpose") } }
            }
        });
        let _ = task.await;
        within(until_returned(&sessions)).await;
        tokio::time::sleep(ms(1500)).await;
        let n = db.number("SELECT count(*) FROM t").await;
        println!("panics {panics}: stored {n}, hooks {}", ran.load(SeqCst));
        if !panics {
            assert_eq!(i64::from(ran.load(SeqCst)), n);
        }
    }
    // A panic in a future polled beside it, so that the commit is dropped by unwinding.
    db.run("TRUNCATE t").await;
    let sessions = db.sessions();
    let ran = Arc::new(AtomicU32::new(0));
    let task = tokio::spawn({
        let (sessions, ran) = (sessions.clone(), ran.clone());
        async move {
            let work = sessions.transaction(async |tx| {
                tx.execute("INSERT INTO t VALUES (1)", &[]).await?;
                let ran = ran.clone();
                tx.on_commit(async move || {
                    ran.fetch_add(1, SeqCst);
                });
                Ok::<_, Error>(())
            });
            let boom = async {
                tokio::time::sleep(ms(150)).await;
                panic!("on purpose")
            };
            let _: (Result<(), Error>, ()) = tokio::join!(work, boom);
        }
    });
    let _ = task.await;
    within(until_returned(&sessions)).await;
    tokio::time::sleep(ms(1500)).await;
    let n = db.number("SELECT count(*) FROM t").await;
    println!("unwound: stored {n}, hooks {}", ran.load(SeqCst));
    assert_eq!(i64::from(ran.load(SeqCst)), n, "committed, and its hooks never ran");
}

/// Deadline of a transaction that waits for a session that will not come: says so, in time, and the pool is whole.
#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_bounds_every_wait_of_the_manager() {
    let db = Database::new().await;
    let proxy = common::proxy::Proxy::start().await;
    let config: pg_session::SessionConfig = proxy.url(db.database.name()).parse().unwrap();
    let sessions =
        SessionManager::new(config.max_size(1).cleanup_timeout(ms(300)).connect_timeout(ms(1000))).unwrap();
    for stage in 0..4 {
        proxy.be_silent(false);
        let held = (stage == 0).then_some(sessions.acquire());
        let held = match held {
            Some(h) => Some(h.await.unwrap()),
            None => None,
        };
        if stage == 1 {
            drop(sessions.acquire().await.unwrap());
            proxy.be_silent(true);
            proxy.cut_all();
            tokio::time::sleep(ms(30)).await;
        }
        let started = Instant::now();
        let options = TransactionOptions::new().deadline(ms(250)).retry(
            RetryPolicy::default().retry_on(RetryClass::ConnectionLost).base_delay(ms(100)).max_attempts(50),
        );
        let r: Result<(), Error> = within(sessions.transaction_with(options, async |tx| {
            tx.execute("SELECT 1", &[]).await?;
            if stage == 2 {
                tx.batch_execute("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$").await?;
            }
            if stage == 3 {
                std::future::pending::<()>().await;
            }
            Ok(())
        }))
        .await;
        println!("{stage}: {r:?} after {:?}", started.elapsed());
        assert!(matches!(r, Err(Error::DeadlineExceeded { .. })), "{stage} {r:?}");
        assert!(started.elapsed() < ms(600), "{stage} {:?}", started.elapsed());
        drop(held);
        proxy.be_silent(false);
        tokio::time::sleep(ms(1100)).await;
        within(until_returned(&sessions)).await;
        within(sessions.ping()).await.unwrap();
    }
}

/// RetryClass: "25P02 | – | never by itself"; ConnectionLost: "The connection is gone."
#[tokio::test(flavor = "multi_thread")]
async fn a_25p02_of_a_remote_server_is_no_lost_connection() {
    let db = Database::new().await;
    let mut session = db.single().acquire().await.unwrap();
    let r: Result<(), Error> = within(session.transaction(async |tx| {
        let _ = tx.batch_execute("DO $$ BEGIN RAISE SQLSTATE '25P02' USING MESSAGE = 'the remote transaction is aborted'; END $$").await;
        Ok(())
    })).await;
    let next = session.execute("SELECT 1", &[]).await;
    println!("{r:?}; next on the same session: {next:?}");
    assert!(!matches!(r, Err(Error::ConnectionLost(_))), "{r:?}, and the same session goes on: {next:?}");
}
