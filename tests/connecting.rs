//! Connections on their way in and out: who waits for them, how many there are, and which host they go to.
#![cfg(feature = "testing")]

mod common;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use common::{Database, LIMIT, within};
use pg_session::testing::PgServer;
use pg_session::{SessionConfig, SessionManager};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

const SHORT: Duration = Duration::from_millis(50);

/// Stands between the crate and the server, and holds connections up where a test wants it.
struct Gate {
    address: SocketAddr,
    accepted: Arc<AtomicUsize>,
    /// Clients that have hung up.
    left: Arc<AtomicUsize>,
    /// New connections get on to the server.
    way_in: watch::Sender<bool>,
    /// Connections with a number below this do not, whatever is said above.
    stuck: watch::Sender<usize>,
    /// Clients that have hung up are seen off: the server is told, and the client sees its end.
    way_out: watch::Sender<bool>,
    /// Connections with a number below this pass nothing on any more.
    silenced: watch::Sender<usize>,
}

impl Gate {
    async fn open() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let gate = Self {
            address: listener.local_addr().unwrap(),
            accepted: Arc::default(),
            left: Arc::default(),
            way_in: watch::Sender::new(true),
            stuck: watch::Sender::new(0),
            way_out: watch::Sender::new(true),
            silenced: watch::Sender::new(0),
        };
        let (accepted, left) = (Arc::clone(&gate.accepted), Arc::clone(&gate.left));
        let (way_in, way_out) = (gate.way_in.subscribe(), gate.way_out.subscribe());
        let (stuck, silenced) = (gate.stuck.subscribe(), gate.silenced.subscribe());
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let number = accepted.fetch_add(1, SeqCst);
                let (left, mut silenced) = (Arc::clone(&left), silenced.clone());
                let stuck = stuck.clone();
                let (mut way_in, mut way_out) = (way_in.clone(), way_out.clone());
                tokio::spawn(async move {
                    let _ = way_in.wait_for(|open| *open).await;
                    if number < *stuck.borrow() {
                        std::future::pending::<()>().await;
                    }
                    let server = TcpStream::connect(("127.0.0.1", PgServer::shared().unwrap().port())).await;
                    let mut server = server.unwrap();
                    let mut client = client;
                    let silence = async { silenced.wait_for(|below| number < *below).await.map(drop) };
                    let silent = tokio::select! {
                        () = relay(&mut client, &mut server) => false,
                        _ = silence => true,
                    };
                    if silent {
                        std::future::pending::<()>().await;
                    }
                    left.fetch_add(1, SeqCst);
                    let _ = way_out.wait_for(|open| *open).await;
                });
            }
        });
        gate
    }

    fn config(&self, db: &Database, name: &str) -> SessionConfig {
        let url = format!("postgres://postgres@{}/{}", self.address, db.database.name());
        url.parse::<SessionConfig>().unwrap().application_name(name)
    }
}

/// Until the client hangs up.
async fn relay(client: &mut TcpStream, server: &mut TcpStream) {
    let (mut there, mut back) = ([0; 65536], [0; 65536]);
    loop {
        tokio::select! {
            n = client.read(&mut there) => match n {
                Ok(n @ 1..) => server.write_all(&there[..n]).await.unwrap(),
                _ => return,
            },
            n = server.read(&mut back) => match n {
                Ok(n @ 1..) => client.write_all(&back[..n]).await.unwrap(),
                _ => return,
            },
        }
    }
}

async fn backends(db: &Database, name: &str) -> i64 {
    db.number(&format!("SELECT count(*) FROM pg_stat_activity WHERE application_name = '{name}'")).await
}

#[tokio::test]
async fn a_connect_goes_on_without_its_caller_and_the_next_one_gets_it() {
    let db = Database::new().await;
    let gate = Gate::open().await;
    gate.way_in.send_replace(false);
    let config = gate.config(&db, "patient").max_size(2).acquire_timeout(Duration::from_millis(10));
    let sessions = SessionManager::new(config).unwrap();
    // Every caller is limited to less than a connect takes.
    for _ in 0..20 {
        assert!(within(sessions.acquire()).await.unwrap_err().is_timeout());
    }
    assert!(gate.accepted.load(SeqCst) <= 2, "{} dialled", gate.accepted.load(SeqCst));
    assert_eq!(sessions.status().connecting, 0, "no caller is left");
    gate.way_in.send_replace(true);
    db.until(
        "EXISTS (SELECT FROM pg_stat_activity WHERE application_name = 'patient' AND state = 'idle' \
                 AND query <> '')",
    )
    .await;
    within(async {
        while sessions.status().idle == 0 {
            tokio::task::yield_now().await
        }
    })
    .await;
    // It is had at the first poll, since it is ready.
    common::polls(sessions.acquire(), 1).await.expect("a connection was ready").unwrap();
    let held = within(async {
        loop {
            if let (Ok(a), Ok(b)) = tokio::join!(sessions.acquire(), sessions.acquire()) {
                break (a, b);
            }
        }
    })
    .await;
    assert!(gate.accepted.load(SeqCst) <= 2, "{} dialled", gate.accepted.load(SeqCst));
    assert_eq!(sessions.status().size, 2);
    drop(held);
}

#[tokio::test]
async fn a_connect_that_is_stuck_does_not_keep_others_from_connecting() {
    let db = Database::new().await;
    let gate = Gate::open().await;
    gate.way_in.send_replace(false);
    let config = gate.config(&db, "stuck").max_size(2).connect_timeout(2 * LIMIT);
    let config = config.acquire_timeout(Duration::from_millis(100));
    let sessions = SessionManager::new(config).unwrap();
    assert!(within(sessions.acquire()).await.unwrap_err().is_timeout());
    // Only the first stays where it is.
    gate.stuck.send_replace(gate.accepted.load(SeqCst));
    gate.way_in.send_replace(true);
    within(async { while sessions.acquire().await.is_err() {} }).await;
}

#[tokio::test]
async fn a_connection_that_nobody_came_for_ends_with_the_pool() {
    let db = Database::new().await;
    let config = db.config().application_name("orphan").max_size(1);
    for close in [true, false] {
        let sessions = SessionManager::new(config.clone()).unwrap();
        assert!(common::polls(sessions.acquire(), 1).await.is_none());
        within(async {
            while sessions.status().idle == 0 {
                tokio::task::yield_now().await
            }
        })
        .await;
        if close {
            assert_eq!(within(sessions.close()).await, 0);
            assert_eq!(sessions.status().idle, 0);
        }
        drop(sessions);
        db.until("NOT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = 'orphan')").await;
    }
    // Nor does it grow older than another would.
    let config = config.idle_timeout(Duration::from_millis(20));
    let sessions = SessionManager::new(config).unwrap();
    assert!(common::polls(sessions.acquire(), 1).await.is_none());
    within(async {
        while sessions.status().idle == 0 {
            tokio::task::yield_now().await
        }
    })
    .await;
    within(async {
        while sessions.status().idle > 0 {
            tokio::task::yield_now().await
        }
    })
    .await;
}

#[tokio::test]
async fn closing_does_not_wait_for_a_connect_that_nobody_waits_for() {
    let db = Database::new().await;
    let gate = Gate::open().await;
    gate.way_in.send_replace(false);
    let sessions = SessionManager::new(gate.config(&db, "unwanted")).unwrap();
    let mut acquire = Box::pin(sessions.acquire());
    tokio::select! {
        _ = &mut acquire => panic!("the way in is closed"),
        () = async { while gate.accepted.load(SeqCst) == 0 { tokio::task::yield_now().await } } => {}
    }
    drop(acquire);
    gate.way_out.send_replace(true);
    let closed = tokio::time::timeout(Duration::from_secs(5), sessions.close()).await;
    assert_eq!(closed.expect("it ended the connect"), 0);
}

#[tokio::test]
async fn a_caller_whose_connect_is_cut_by_closing_is_turned_away() {
    let db = Database::new().await;
    let gate = Gate::open().await;
    gate.way_in.send_replace(false);
    let config = gate.config(&db, "late").shutdown_timeout(SHORT).cleanup_timeout(SHORT);
    let sessions = SessionManager::new(config).unwrap();
    let acquire = async {
        let error = sessions.acquire().await.unwrap_err();
        assert!(error.is_closed(), "{error:?}");
    };
    let close = async {
        while gate.accepted.load(SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(sessions.close().await, 0);
    };
    within(async { tokio::join!(acquire, close) }).await;
    assert_eq!(gate.accepted.load(SeqCst), 1, "none is made for a pool that is closed");
}

#[tokio::test]
async fn a_place_is_taken_until_the_server_is_done_with_the_connection() {
    let db = Database::new().await;
    let gate = Gate::open().await;
    // Each connection is closed as it comes back.
    let config = gate.config(&db, "places").max_size(2).max_lifetime(Duration::ZERO).cleanup_timeout(LIMIT);
    let sessions = SessionManager::new(config).unwrap();
    gate.way_out.send_replace(false);
    drop((sessions.acquire().await.unwrap(), sessions.acquire().await.unwrap()));
    within(async {
        while gate.left.load(SeqCst) < 2 {
            tokio::task::yield_now().await
        }
    })
    .await;
    let mut next = Box::pin(sessions.acquire());
    tokio::select! {
        _ = &mut next => panic!("two connections are still open on the server"),
        () = async {
            for _ in 0..50 {
                assert_eq!(backends(&db, "places").await, 2);
            }
        } => {}
    }
    assert_eq!(gate.accepted.load(SeqCst), 2);
    assert_eq!(sessions.status().in_use, 2, "their places count as taken");
    gate.way_out.send_replace(true);
    drop(within(next).await.unwrap());
}

#[tokio::test]
async fn a_server_that_is_never_done_with_a_connection_takes_its_place_for_a_bounded_time() {
    let db = Database::new().await;
    let gate = Gate::open().await;
    let config = gate.config(&db, "stuck").max_size(1).max_lifetime(Duration::ZERO).cleanup_timeout(SHORT);
    let sessions = SessionManager::new(config).unwrap();
    gate.way_out.send_replace(false);
    for _ in 0..3 {
        drop(within(sessions.acquire()).await.unwrap());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_server_never_sees_more_connections_than_allowed() {
    let db = Database::new().await;
    let config = db.config().application_name("allowed").max_size(2).max_lifetime(Duration::ZERO);
    let sessions = SessionManager::new(config).unwrap();
    let tasks: Vec<_> = (0..16)
        .map(|n| {
            let sessions = sessions.clone();
            tokio::spawn(async move {
                for i in 0..10 {
                    if (n + i) % 4 == 0 {
                        common::polls(sessions.acquire(), 2).await;
                    }
                    let session = sessions.acquire().await.unwrap();
                    // Some are left in the middle of something.
                    common::polls(session.execute("SELECT pg_sleep(0.001)", &[]), 1 + (n + i) % 3).await;
                }
            })
        })
        .collect();
    let work = async {
        for task in tasks {
            within(task).await.unwrap();
        }
    };
    let watch = async {
        loop {
            let seen = backends(&db, "allowed").await;
            assert!(seen <= 2, "{seen} connections");
        }
    };
    tokio::select! { () = work => {}, () = watch => {} }
}

#[tokio::test]
async fn a_host_that_accepts_and_stays_silent_is_passed_over() {
    let db = Database::new().await;
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!(
        "postgres://postgres@{},127.0.0.1:{}/{}",
        silent.local_addr().unwrap(),
        PgServer::shared().unwrap().port(),
        db.database.name()
    );
    let config: SessionConfig = url.parse().unwrap();
    let sessions = SessionManager::new(config.connect_timeout(Duration::from_secs(1))).unwrap();
    within(sessions.ping()).await.unwrap();
}

#[tokio::test]
async fn idle_connections_that_went_dead_do_not_keep_an_acquire_waiting() {
    let db = Database::new().await;
    let gate = Gate::open().await;
    let config = gate
        .config(&db, "dead")
        .max_size(8)
        .check_after_idle(Duration::ZERO)
        .cleanup_timeout(SHORT)
        .acquire_timeout(Duration::from_secs(4));
    let sessions = SessionManager::new(config).unwrap();
    let mut held = Vec::new();
    for _ in 0..8 {
        held.push(sessions.acquire().await.unwrap());
    }
    drop(held);
    gate.silenced.send_replace(gate.accepted.load(SeqCst));
    let session = sessions.acquire().await.unwrap();
    session.execute("SELECT 1", &[]).await.unwrap();
}
