//! The pool: who gets a session, who waits, what is said when there is none, and what happens when the server goes.
#![cfg(feature = "testing")]

mod common;

use std::future::Future;
use std::net::TcpListener;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::task::Poll;
use std::time::Duration;

use common::proxy::Proxy;
use common::{Database, until_returned, within};
use pg_session::testing::PgServer;
use pg_session::{AcquirePhase, Error, RetryPolicy, SessionConfig, SessionManager, TransactionOptions};

const SHORT: Duration = Duration::from_millis(50);

fn phase(error: &Error) -> AcquirePhase {
    match error {
        Error::Acquire(e) => e.phase(),
        e => panic!("{e:?}"),
    }
}

/// Polls once.
async fn start<F: Future>(future: &mut Pin<Box<F>>) {
    std::future::poll_fn(|cx| {
        assert!(future.as_mut().poll(cx).is_pending());
        Poll::Ready(())
    })
    .await;
}

#[tokio::test]
async fn nothing_is_opened_before_it_is_needed() {
    let sessions = SessionManager::new("postgres://nobody@127.0.0.1:1/nowhere".parse().unwrap()).unwrap();
    assert_eq!(sessions.status().size, 0);
    assert!(matches!(sessions.acquire().await, Err(Error::Connect(_))));
}

#[tokio::test]
async fn an_exhausted_pool_says_so_with_its_numbers() {
    let db = Database::new().await;
    let config = db.config().max_size(2).acquire_timeout(SHORT);
    let sessions = SessionManager::new(config).unwrap();
    let held = (common::opened(&sessions).await, common::opened(&sessions).await);
    let error = sessions.acquire().await.unwrap_err();
    assert_eq!(phase(&error), AcquirePhase::Waiting);
    assert!(error.is_timeout() && !error.is_closed());
    let message = error.to_string();
    for part in ["no session became free within", "max_size 2", "open 2", "idle 0", "in use 2"] {
        assert!(message.contains(part), "{message}");
    }
    drop(held);
    sessions.acquire().await.unwrap();
}

#[tokio::test]
async fn a_session_that_comes_back_goes_to_who_waits_in_order_of_arrival() {
    let db = Database::new().await;
    let sessions = db.single();
    let held = sessions.acquire().await.unwrap();
    let order = Arc::new(std::sync::Mutex::new(Vec::new()));
    let mut waiters = Vec::new();
    for n in 0..1000 {
        let (sessions, order) = (sessions.clone(), Arc::clone(&order));
        let mut waiter = Box::pin(async move {
            let session = sessions.acquire().await.unwrap();
            order.lock().unwrap().push(n);
            drop(session);
        });
        start(&mut waiter).await;
        waiters.push(waiter);
    }
    assert_eq!(sessions.status().waiting, 1000);
    drop(held);
    let tasks: Vec<_> = waiters.into_iter().rev().map(tokio::spawn).collect();
    for task in tasks {
        within(task).await.unwrap();
    }
    let order = order.lock().unwrap();
    assert!(order.iter().copied().eq(0..1000), "{:?}", &order[..20]);
}

#[tokio::test]
async fn a_waiter_that_timed_out_takes_no_place() {
    let db = Database::new().await;
    let sessions = SessionManager::new(db.config().max_size(1).acquire_timeout(SHORT)).unwrap();
    let held = common::opened(&sessions).await;
    for _ in 0..3 {
        sessions.acquire().await.unwrap_err();
    }
    drop(held);
    for _ in 0..3 {
        sessions.acquire().await.unwrap().execute("SELECT 1", &[]).await.unwrap();
    }
    assert_eq!(sessions.status().size, 1);
}

#[tokio::test]
async fn one_waiter_too_many_is_turned_away_at_once() {
    let db = Database::new().await;
    let sessions = SessionManager::new(db.config().max_size(1).max_waiting(2)).unwrap();
    let held = sessions.acquire().await.unwrap();
    let mut waiters: Vec<_> = (0..2).map(|_| Box::pin(sessions.acquire())).collect();
    for waiter in &mut waiters {
        start(waiter).await;
    }
    let error = sessions.acquire().await.unwrap_err();
    assert_eq!(phase(&error), AcquirePhase::TooManyWaiters);
    assert!(!error.is_timeout());
    drop(waiters.pop());
    let mut another = Box::pin(sessions.acquire());
    start(&mut another).await;
    drop(held);
    drop(within(waiters.pop().unwrap()).await.unwrap());
    within(another).await.unwrap();
}

#[tokio::test]
async fn a_task_that_waits_for_itself_is_told() {
    let db = Database::new().await;
    let sessions = db.single();
    let inner = sessions.clone();
    let result = within(sessions.transaction(async |tx| {
        tx.execute("SELECT 1", &[]).await?;
        inner.acquire().await.map(drop)
    }))
    .await;
    let error = result.unwrap_err();
    assert_eq!(phase(&error), AcquirePhase::SelfDeadlock, "{error}");
    assert!(error.to_string().contains("max_size"), "{error}");
    // With room for two it is not a deadlock; and another pool is another matter.
    let two = SessionManager::new(db.config().max_size(2)).unwrap();
    two.transaction(async |_| two.acquire().await.map(drop)).await.unwrap();
    sessions.transaction(async |_| two.acquire().await.map(drop)).await.unwrap();
}

#[tokio::test]
async fn a_server_that_refuses_is_named_with_the_reason() {
    let db = Database::new().await;
    let server = PgServer::shared().unwrap();
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let nowhere = format!("postgres://postgres@127.0.0.1:{free}/x");
    let missing = server.url_for("no such database");
    let role = db.database.url().replace("postgres@", "no_such_role@");
    for (url, code, says) in [
        (nowhere.as_str(), None, "opening the socket"),
        (&missing, Some("3D000"), "no such database"),
        (&role, Some("28000"), "no_such_role"),
        ("postgres://postgres@/x?host=/no/such/directory", None, "/no/such/directory"),
    ] {
        let sessions = SessionManager::new(url.parse().unwrap()).unwrap();
        let error = sessions.acquire().await.unwrap_err();
        let Error::Connect(connect) = &error else { panic!("{error:?}") };
        assert_eq!(connect.code().map(|c| c.code()), code, "{error}");
        assert!(error.to_string().contains(says), "{error}");
        assert_eq!(sessions.status().size, 0);
        // The pool remembers.
        let again = sessions.acquire().await.unwrap_err();
        assert_eq!(again.to_string(), error.to_string());
    }
}

#[tokio::test]
async fn a_wrong_password_is_told_and_not_shown() {
    let mut server = PgServer::start().unwrap();
    let hba = server.data_dir().join("pg_hba.conf");
    let admin = common::connect(&server.url()).await;
    admin.batch_execute("CREATE ROLE app LOGIN PASSWORD 'right'").await.unwrap();
    std::fs::write(
        &hba,
        "host all app 127.0.0.1/32 scram-sha-256\nhost all all 127.0.0.1/32 trust\nlocal all all trust\n",
    )
    .unwrap();
    admin.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    let url = |password: &str| format!("postgres://app:{password}@127.0.0.1:{}/postgres", server.port());
    let wrong = SessionManager::new(url("hunter2").parse().unwrap()).unwrap();
    let error = loop {
        // Until the new rules are in force.
        if let Err(e) = wrong.acquire().await {
            break e;
        }
    };
    assert_eq!(error.code().unwrap().code(), "28P01");
    for text in [format!("{error}"), format!("{error:?}"), format!("{wrong:?}")] {
        assert!(!text.contains("hunter2"), "{text}");
    }
    let right = SessionManager::new(url("right").parse().unwrap()).unwrap();
    right.ping().await.unwrap();
    drop(admin);
    server.kill().unwrap();
}

#[tokio::test]
async fn a_server_that_accepts_and_stays_silent_is_given_up() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("postgres://postgres@{}/x", silent.local_addr().unwrap());
    let config: SessionConfig = url.parse().unwrap();
    let sessions = SessionManager::new(config.clone().connect_timeout(SHORT)).unwrap();
    let error = within(sessions.acquire()).await.unwrap_err();
    assert!(matches!(error, Error::Connect(_)) && error.is_timeout(), "{error:?}");
    assert!(error.to_string().contains("start-up and authentication"), "{error}");
    // The acquire's own limit names the phase.
    let sessions = SessionManager::new(config.acquire_timeout(SHORT)).unwrap();
    let error = within(sessions.acquire()).await.unwrap_err();
    assert_eq!(phase(&error), AcquirePhase::Connecting);
    assert_eq!(sessions.status().connecting, 0);
}

#[tokio::test]
async fn unix_sockets_and_several_hosts_work() {
    let db = Database::new().await;
    let server = PgServer::shared().unwrap();
    let socket = SessionManager::new(server.socket_url_for(db.database.name()).parse().unwrap()).unwrap();
    let address =
        socket.acquire().await.unwrap().query_one("SELECT inet_server_addr() IS NULL", &[]).await.unwrap();
    assert!(address.get::<_, bool>(0));
    // Cancelling over the socket, too.
    let session = socket.acquire().await.unwrap();
    let pid = session.process_id();
    {
        let mut sleep = std::pin::pin!(session.execute("SELECT pg_sleep(600)", &[]));
        tokio::select! { _ = &mut sleep => panic!("slept"), () = db.until_sleeping(pid) => {} }
    }
    within(session.execute("SELECT 1", &[])).await.unwrap();
    let url = format!("postgres://postgres@127.0.0.1:1,127.0.0.1:{}/{}", server.port(), db.database.name());
    SessionManager::new(url.parse().unwrap()).unwrap().ping().await.unwrap();
    let standby = format!("{}?target_session_attrs=standby", db.database.url());
    let error = SessionManager::new(standby.parse().unwrap()).unwrap().ping().await.unwrap_err();
    assert!(error.to_string().contains("not a standby"), "{error}");
    for wanted in ["primary", "read-write", "prefer-standby", "any"] {
        let url = format!("{}?target_session_attrs={wanted}", db.database.url());
        SessionManager::new(url.parse().unwrap()).unwrap().ping().await.unwrap();
    }
}

#[tokio::test]
async fn a_backend_terminated_while_idle_is_replaced_unnoticed() {
    let db = Database::new().await;
    let sessions = SessionManager::new(db.config().max_size(3)).unwrap();
    let held: Vec<_> = [
        sessions.acquire().await.unwrap(),
        sessions.acquire().await.unwrap(),
        sessions.acquire().await.unwrap(),
    ]
    .into();
    let pids: Vec<i32> = held.iter().map(|s| s.process_id()).collect();
    drop(held);
    for pid in &pids {
        db.run(&format!("SELECT pg_terminate_backend({pid})")).await;
        db.until_ended(*pid).await;
    }
    for _ in 0..3 {
        sessions.acquire().await.unwrap().execute("SELECT 1", &[]).await.unwrap();
    }
}

#[tokio::test]
async fn a_backend_terminated_in_use_costs_that_statement_only() {
    let db = Database::new().await;
    let sessions = db.single();
    let terminate = async |pid: i32| {
        db.run(&format!("SELECT pg_terminate_backend({pid})")).await;
        db.until_ended(pid).await;
    };
    // Between two statements.
    let session = sessions.acquire().await.unwrap();
    terminate(session.process_id()).await;
    let error = within(session.execute("SELECT 1", &[])).await.unwrap_err();
    assert!(error.is_connection_lost(), "{error:?}");
    assert_eq!(error.code().unwrap().code(), "57P01");
    drop(session);
    // In the middle of one.
    let session = sessions.acquire().await.unwrap();
    let pid = session.process_id();
    let (result, ()) = within(async {
        tokio::join!(session.execute("SELECT pg_sleep(600)", &[]), async {
            db.until_sleeping(pid).await;
            terminate(pid).await;
        })
    })
    .await;
    assert!(result.unwrap_err().is_connection_lost());
    drop(session);
    // Between two statements of a transaction, and before its COMMIT.
    for before_commit in [false, true] {
        let error = within(sessions.transaction(async |tx| {
            tx.execute("SELECT 1", &[]).await?;
            terminate(tx.process_id()).await;
            if before_commit { Ok(0) } else { tx.execute("SELECT 1", &[]).await }
        }))
        .await
        .unwrap_err();
        // A COMMIT that the dead server may have seen, or may not, is unknown; most often it is known not to be sent.
        assert!(error.is_connection_lost() || before_commit && error.is_commit_unknown(), "{error:?}");
    }
    sessions.ping().await.unwrap();
    until_returned(&sessions).await;
}

#[tokio::test]
async fn a_server_that_is_gone_and_comes_back_is_used_again() {
    let mut server = PgServer::start().unwrap();
    let config: SessionConfig = server.url().parse().unwrap();
    let sessions = SessionManager::new(config.max_size(4)).unwrap();
    let held = [sessions.acquire().await.unwrap(), sessions.acquire().await.unwrap()];
    drop(held);
    server.kill().unwrap();
    // This thread was blocked by that, and nobody has noticed yet: at most the two that were idle are lent once more.
    for _ in 0..2 {
        if let Ok(session) = within(sessions.acquire()).await {
            assert!(session.execute("SELECT 1", &[]).await.unwrap_err().is_connection_lost());
        }
    }
    for _ in 0..5 {
        let error = within(sessions.acquire()).await.unwrap_err();
        assert!(matches!(error, Error::Connect(_)), "{error:?}");
    }
    assert_eq!(sessions.status().size, 0);
    server.start_again().unwrap();
    for _ in 0..5 {
        within(sessions.acquire()).await.unwrap().execute("SELECT 1", &[]).await.unwrap();
    }
}

#[tokio::test]
async fn a_full_server_is_tried_again_until_there_is_room() {
    let server = PgServer::builder()
        .setting("max_connections", "5")
        .setting("superuser_reserved_connections", "0")
        .start()
        .unwrap();
    let mut hog = Vec::new();
    for _ in 0..5 {
        hog.push(common::connect(&server.url()).await);
    }
    let config: SessionConfig = server.url().parse().unwrap();
    let sessions = SessionManager::new(config.acquire_timeout(Duration::from_secs(1))).unwrap();
    let error = within(sessions.acquire()).await.unwrap_err();
    assert_eq!(phase(&error), AcquirePhase::Connecting);
    assert_eq!(error.code().unwrap().code(), "53300", "{error}");
    let sessions = SessionManager::new(sessions.config().clone().acquire_timeout(common::LIMIT)).unwrap();
    let mut waiting = Box::pin(sessions.acquire());
    start(&mut waiting).await;
    drop(hog);
    within(waiting).await.unwrap().execute("SELECT 1", &[]).await.unwrap();
}

#[tokio::test]
async fn connections_grow_old_and_idle_ones_are_closed() {
    let db = Database::new().await;
    let sessions = SessionManager::new(db.config().max_size(1).max_lifetime(Duration::ZERO)).unwrap();
    let pid = sessions.acquire().await.unwrap().process_id();
    assert_ne!(sessions.acquire().await.unwrap().process_id(), pid);
    let config = db.config().idle_timeout(Duration::from_millis(20)).application_name("idle");
    let sessions = SessionManager::new(config).unwrap();
    drop(sessions.acquire().await.unwrap());
    db.until("NOT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = 'idle')").await;
    assert_eq!(sessions.status().size, 0);
}

#[tokio::test]
async fn closing_waits_for_sessions_and_turns_newcomers_away() {
    let db = Database::new().await;
    let sessions = SessionManager::new(db.config().max_size(2).application_name("closing")).unwrap();
    drop((sessions.acquire().await.unwrap(), sessions.acquire().await.unwrap()));
    let held = sessions.acquire().await.unwrap();
    let other = sessions.acquire().await.unwrap();
    let mut closing = Box::pin(sessions.close());
    start(&mut closing).await;
    let late = sessions.acquire().await.unwrap_err();
    assert!(late.is_closed() && sessions.is_closed());
    assert_eq!(late.to_string(), "the session manager is closed");
    // Those who have one finish their work, dirty or not.
    held.execute("SELECT 1", &[]).await.unwrap();
    other.batch_execute("BEGIN").await.unwrap();
    drop(held);
    start(&mut closing).await;
    drop(other);
    assert_eq!(within(closing).await, 0);
    db.until("NOT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = 'closing')").await;
    assert_eq!(within(sessions.close()).await, 0);
}

#[tokio::test]
async fn callers_who_wait_when_closing_begins_are_still_served() {
    let db = Database::new().await;
    let sessions = db.single();
    let held = sessions.acquire().await.unwrap();
    let mut waiters: Vec<_> = (0..3).map(|_| Box::pin(sessions.acquire())).collect();
    for waiter in &mut waiters {
        start(waiter).await;
    }
    let mut closing = Box::pin(sessions.close());
    start(&mut closing).await;
    assert!(sessions.acquire().await.unwrap_err().is_closed(), "a newcomer");
    drop(held);
    for waiter in waiters {
        let session = within(waiter).await.unwrap();
        session.execute("SELECT 1", &[]).await.unwrap();
        start(&mut closing).await;
    }
    assert_eq!(within(closing).await, 0);
}

#[tokio::test]
async fn callers_who_still_wait_when_the_time_for_closing_is_up_are_turned_away() {
    let db = Database::new().await;
    let sessions = SessionManager::new(db.config().max_size(1).shutdown_timeout(SHORT)).unwrap();
    let held = sessions.acquire().await.unwrap();
    let mut waiter = Box::pin(sessions.acquire());
    start(&mut waiter).await;
    assert_eq!(within(sessions.close()).await, 1);
    assert!(within(waiter).await.unwrap_err().is_closed());
    drop(held);
    // So are they if closing is given up, as it closes the pool all the same.
    let sessions = db.single();
    let held = sessions.acquire().await.unwrap();
    let mut waiter = Box::pin(sessions.acquire());
    start(&mut waiter).await;
    let mut closing = Box::pin(sessions.close());
    start(&mut closing).await;
    drop(closing);
    assert!(within(waiter).await.unwrap_err().is_closed());
    held.execute("SELECT 1", &[]).await.unwrap();
}

#[tokio::test]
async fn a_unit_of_work_that_pauses_before_its_next_attempt_when_closing_begins_is_finished() {
    let db = Database::new().await;
    let sessions = db.single();
    let policy = RetryPolicy::default().base_delay(Duration::from_millis(200));
    let options = TransactionOptions::new().retry(policy);
    let attempts = AtomicUsize::new(0);
    let work = sessions.transaction_with(options, async |tx| {
        if attempts.fetch_add(1, SeqCst) == 0 {
            tx.batch_execute("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$").await?;
        }
        tx.execute("SELECT 1", &[]).await
    });
    let close = async {
        while attempts.load(SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        until_returned(&sessions).await;
        sessions.close().await
    };
    let (work, cut) = within(async { tokio::join!(work, close) }).await;
    assert_eq!((work.unwrap(), cut), (1, 0));
}

#[tokio::test]
async fn managers_exchanged_under_load_lose_no_request() {
    let db = Database::new().await;
    let current = std::sync::RwLock::new(SessionManager::new(db.config().max_size(2)).unwrap());
    let clients = async {
        let work = (0..16).map(|_| async {
            for _ in 0..20 {
                // Taken and polled at once, so it waits before its manager is closed.
                let sessions = current.read().unwrap().clone();
                sessions.acquire().await.unwrap().execute("SELECT 1", &[]).await.unwrap();
            }
        });
        futures_util::future::join_all(work).await;
    };
    let exchange = async {
        loop {
            let new = SessionManager::new(db.config().max_size(2)).unwrap();
            let old = std::mem::replace(&mut *current.write().unwrap(), new);
            tokio::task::yield_now().await;
            assert_eq!(old.close().await, 0);
        }
    };
    within(async {
        tokio::select! { () = clients => {}, () = exchange => {} }
    })
    .await;
}

#[test]
fn nothing_lives_on_when_a_manager_is_closed_and_dropped() {
    for close in [true, false] {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let shared = PgServer::shared().unwrap().url();
        runtime.block_on(async {
            let sessions = SessionManager::new(shared.parse().unwrap()).unwrap();
            sessions.ping().await.unwrap();
            if close {
                sessions.close().await;
            }
            drop(sessions);
            let alone = async {
                while tokio::runtime::Handle::current().metrics().num_alive_tasks() > 0 {
                    tokio::task::yield_now().await;
                }
            };
            tokio::time::timeout(Duration::from_secs(5), alone).await.expect("no task is left");
        });
    }
}

#[tokio::test]
async fn closing_cuts_what_does_not_come_back() {
    let db = Database::new().await;
    let config = db.config().shutdown_timeout(SHORT).application_name("cut");
    let sessions = SessionManager::new(config).unwrap();
    let idle_in_transaction = sessions.acquire().await.unwrap();
    idle_in_transaction.batch_execute("BEGIN").await.unwrap();
    let running = tokio::spawn({
        let session = sessions.acquire().await.unwrap();
        async move { session.execute("SELECT pg_sleep(600)", &[]).await }
    });
    db.until(
        "EXISTS (SELECT FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND application_name = 'cut')",
    )
    .await;
    assert_eq!(within(sessions.close()).await, 2);
    let error = within(running).await.unwrap().unwrap_err();
    // Cancelled first, then cut: either may be what the borrower hears.
    assert!(error.is_connection_lost() || error.code().unwrap().code() == "57014", "{error:?}");
    let error = idle_in_transaction.execute("SELECT 1", &[]).await.unwrap_err();
    assert!(error.is_connection_lost(), "{error:?}");
    db.until("NOT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = 'cut')").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn never_more_connections_than_allowed() {
    let db = Database::new().await;
    let sessions = SessionManager::new(db.config().max_size(4).application_name("many")).unwrap();
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let tasks: Vec<_> = (0..64)
        .map(|n| {
            let (sessions, now, most) = (sessions.clone(), now.clone(), most.clone());
            tokio::spawn(async move {
                for _ in 0..20 {
                    let session = sessions.acquire().await.unwrap();
                    most.fetch_max(now.fetch_add(1, SeqCst) + 1, SeqCst);
                    if n % 8 == 0 {
                        session.batch_execute("BEGIN; SELECT 1").await.unwrap();
                    } else {
                        session.query_one("SELECT 1", &[]).await.unwrap();
                    }
                    now.fetch_sub(1, SeqCst);
                }
            })
        })
        .collect();
    for task in tasks {
        within(task).await.unwrap();
    }
    assert!(most.load(SeqCst) <= 4);
    until_returned(&sessions).await;
    assert!(sessions.status().size <= 4);
    assert!(db.number("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'many'").await <= 4);
}

#[tokio::test]
async fn a_network_that_breaks_is_survived() {
    let db = Database::new().await;
    let proxy = Proxy::start().await;
    let config = proxy.config(&db);
    let sessions = SessionManager::new(config.max_size(2).connect_timeout(SHORT)).unwrap();
    let session = sessions.acquire().await.unwrap();
    let sleep = session.execute("SELECT pg_sleep(600)", &[]);
    let (result, ()) = within(async {
        tokio::join!(sleep, async {
            db.until_sleeping(session.process_id()).await;
            proxy.cut_all();
        })
    })
    .await;
    assert!(result.unwrap_err().is_connection_lost());
    drop(session);
    // The backend whose client is gone ends as well, within the second that it looks every so often.
    db.until_quiet().await;
    proxy.be_silent(true);
    assert!(within(sessions.acquire()).await.unwrap_err().is_timeout());
    proxy.be_silent(false);
    within(sessions.acquire()).await.unwrap().execute("SELECT 1", &[]).await.unwrap();
}
