//! Work under fire: backends are terminated and the server restarted in the middle of it, and every unit of work is
//! accounted for. What was reported as committed is there, once; what was reported as failed is not.
#![cfg(feature = "testing")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering::SeqCst};

use common::{Database, until_returned, within};
use pg_session::testing::PgServer;
use pg_session::{Error, RetryClass, RetryPolicy, SessionConfig, SessionManager, TransactionOptions};

#[derive(Debug, PartialEq)]
enum Told {
    Committed,
    Failed,
    Unknown,
}

/// Eight tasks store numbers, each in a transaction of three statements, until `stop`; returns what they were told.
async fn work(
    sessions: &SessionManager,
    policy: RetryPolicy,
    stop: &Arc<AtomicBool>,
    next: &Arc<AtomicI64>,
) -> BTreeMap<i64, Told> {
    let tasks: Vec<_> = (0..8)
        .map(|_| {
            let (sessions, policy, next, stop) =
                (sessions.clone(), policy.clone(), Arc::clone(next), Arc::clone(stop));
            tokio::spawn(async move {
                let mut told = Vec::new();
                while !stop.load(SeqCst) {
                    let n = next.fetch_add(1, SeqCst);
                    let options = TransactionOptions::new().retry(policy.clone());
                    let result = sessions
                        .transaction_with(options, async |tx| {
                            tx.execute("INSERT INTO tokens VALUES ($1)", &[&n]).await?;
                            tx.savepoint(async |sp| {
                                sp.execute("INSERT INTO others VALUES ($1)", &[&n]).await
                            })
                            .await?;
                            tx.query_one("SELECT 1", &[]).await
                        })
                        .await;
                    told.push(match result {
                        Ok(_) => (n, Told::Committed),
                        Err(e) if e.is_commit_unknown() => (n, Told::Unknown),
                        Err(e) => {
                            let lost =
                                e.is_connection_lost() || matches!(e, Error::Connect(_) | Error::Acquire(_));
                            assert!(lost, "{e:?}");
                            (n, Told::Failed)
                        }
                    });
                }
                told
            })
        })
        .collect();
    let mut all = BTreeMap::new();
    for task in tasks {
        all.extend(within(task).await.unwrap());
    }
    all
}

fn check(told: &BTreeMap<i64, Told>, tokens: &[i64], others: &[i64]) {
    assert_eq!(tokens, others, "half a unit of work");
    let stored: BTreeSet<i64> = tokens.iter().copied().collect();
    assert_eq!(stored.len(), tokens.len(), "something was done twice");
    for (n, told) in told {
        match told {
            Told::Committed => assert!(stored.contains(n), "{n} was reported as committed and is lost"),
            Told::Failed => assert!(!stored.contains(n), "{n} was reported as failed and is there"),
            Told::Unknown => {}
        }
    }
}

async fn numbers(client: &tokio_postgres::Client, table: &str) -> Vec<i64> {
    let rows = client.query(&format!("SELECT n FROM {table} ORDER BY n"), &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

const TABLES: &str = "CREATE TABLE tokens (n bigint); CREATE TABLE others (n bigint)";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn terminated_backends_lose_and_double_nothing() {
    let db = Database::new().await;
    db.run(TABLES).await;
    let sessions = SessionManager::new(db.config().max_size(6).application_name("target")).unwrap();
    for policy in [RetryPolicy::default(), RetryPolicy::default().retry_on(RetryClass::ConnectionLost)] {
        db.run("TRUNCATE tokens, others").await;
        let (stop, next) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicI64::new(0)));
        let fire = async {
            let mut shots = 0;
            while shots < 150 {
                let kill = "SELECT count(pg_terminate_backend(pid)) FROM (SELECT pid FROM pg_stat_activity \
                            WHERE application_name = 'target' AND state <> 'idle' ORDER BY random() LIMIT 1) s";
                shots += db.number(kill).await;
                tokio::task::yield_now().await;
            }
            stop.store(true, SeqCst);
        };
        let (told, ()) = tokio::join!(work(&sessions, policy.clone(), &stop, &next), fire);
        until_returned(&sessions).await;
        db.until_quiet().await;
        check(&told, &numbers(&db.watcher, "tokens").await, &numbers(&db.watcher, "others").await);
        let failed = told.values().filter(|t| **t == Told::Failed).count();
        if policy.retries(RetryClass::ConnectionLost) {
            assert!(failed <= 5, "{failed} were not retried");
        } else {
            assert!(failed > 10, "the fire hit nothing");
        }
        assert!(told.values().filter(|t| **t == Told::Committed).count() > 50);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_server_loses_and_doubles_nothing() {
    let server = PgServer::start().unwrap();
    let url = server.url();
    common::connect(&url).await.batch_execute(TABLES).await.unwrap();
    let config: SessionConfig = url.parse().unwrap();
    let sessions = SessionManager::new(config.max_size(6)).unwrap();
    let (stop, next) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicI64::new(0)));
    let restarts = tokio::task::spawn_blocking({
        let (stop, next) = (Arc::clone(&stop), Arc::clone(&next));
        let mut server = server;
        move || {
            for restart in 1..=4 {
                // In the middle of work.
                let enough = next.load(SeqCst) + 100;
                while next.load(SeqCst) < enough {
                    std::thread::yield_now();
                }
                if restart < 4 {
                    server.restart().unwrap();
                }
            }
            stop.store(true, SeqCst);
            server
        }
    });
    let policy = RetryPolicy::default().retry_on(RetryClass::ConnectionLost);
    let told = within(work(&sessions, policy, &stop, &next)).await;
    let server = within(restarts).await.unwrap();
    within(sessions.ping()).await.unwrap();
    let client = common::connect(&server.url()).await;
    check(&told, &numbers(&client, "tokens").await, &numbers(&client, "others").await);
    assert!(told.values().filter(|t| **t == Told::Committed).count() > 50);
    drop(client);
}

#[tokio::test]
async fn a_stream_cut_in_the_middle_ends_with_one_error() {
    let db = Database::new().await;
    for copy in [false, true] {
        let sessions = db.single();
        let session = sessions.acquire().await.unwrap();
        let cut = format!("SELECT pg_terminate_backend({})", session.process_id());
        // More than sockets hold, so the server is still at it.
        let many = "SELECT repeat('x', 1000) FROM generate_series(1, 100000)";
        let mut errors = 0;
        within(async {
            if copy {
                let mut data = session.copy_out(&format!("COPY ({many}) TO STDOUT")).await.unwrap();
                data.next().await.unwrap().unwrap();
                db.run(&cut).await;
                while let (0..=1, Some(data)) = (errors, data.next().await) {
                    errors += u32::from(data.is_err());
                }
            } else {
                let mut rows = session.query_stream(many, &[]).await.unwrap();
                rows.next().await.unwrap().unwrap();
                db.run(&cut).await;
                while let (0..=1, Some(row)) = (errors, rows.next().await) {
                    errors += u32::from(row.is_err());
                }
            }
        })
        .await;
        assert_eq!(errors, 1);
    }
}
