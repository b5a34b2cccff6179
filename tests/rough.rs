//! COPY and execute_many given up or failing half-way, managers closed under load, connects that fail.
#![cfg(feature = "testing")]

mod common;

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use common::frames::message;
use common::table::Table;
use common::{ms, polls, until, within};
use futures_util::{FutureExt, SinkExt};
use pg_session::{Error, Session, SessionConfig, SessionManager, Transaction, TransactionOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

const INSERT: &str = "INSERT INTO t VALUES ($1, $2)";

fn rows(n: i32) -> impl Iterator<Item = (i32, String)> + Clone {
    (0..n).map(|i| (i, "x".repeat(100)))
}

/// Rows until one that cannot be made.
fn panics_at(at: i32, n: i32) -> impl Iterator<Item = (i32, String)> + Clone {
    (0..n).map(move |i| {
        assert!(i != at, "on purpose");
        (i, "x".repeat(200))
    })
}

/// What comes next on the same session works.
async fn assert_usable(session: &Session, after: &str) {
    let one = within(session.query_one("SELECT 1", &[])).await.unwrap_or_else(|e| panic!("{after}: {e:?}"));
    assert_eq!(one.get::<_, i32>(0), 1, "{after}");
}

/// copy_rows_in: "Dropped, nothing is stored, unless the last row had been sent: then all are or none"; in a transaction
/// it is not committed without.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_in_dropped_at_any_poll_stores_all_or_nothing() {
    const N: i32 = 3000;
    let table = Table::of("id int, x text").await;
    let all = i64::from(N);
    for n in 0..45 {
        for inside in [true, false] {
            let after = format!("{n} polls, inside a transaction: {inside}");
            table.empty().await;
            let mut session = within(table.session()).await;
            let done = if inside {
                let tx = session.begin().await.unwrap();
                let sent = polls(tx.copy_rows_in("t", &["id", "x"]).send(rows(N)), n).await;
                let done = matches!(sent, Some(Ok(_)));
                let committed = within(tx.commit()).await;
                assert!(committed.is_ok() || !done, "{after}: {sent:?}, {committed:?}");
                let stored = table.rows().await;
                assert_eq!(stored, if done { all } else { 0 }, "{after}: {sent:?}, {committed:?}");
                done
            } else {
                let sent = polls(session.copy_rows_in("t", &["id", "x"]).send(rows(N)), n).await;
                sent.map(Result::unwrap).is_some()
            };
            assert_usable(&session, &after).await;
            let stored = table.rows_after(session).await;
            assert!(stored == all || stored == 0 && !done, "{after}: {stored} stored");
        }
    }
}

/// What is done with a COPY.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Copy {
    InDropped,
    InRefused,
    InClosedTwice,
    OutDropped,
    OutFails,
    RowsOut,
}

impl Copy {
    async fn perform(self, session: &Session) -> Result<u64, Error> {
        match self {
            Self::InDropped => {
                let mut copy = session.copy_in("COPY t FROM STDIN").await?;
                for i in 0..5 {
                    copy.send(format!("{i}\n").into()).await?;
                    tokio::task::yield_now().await;
                }
                Ok(0)
            }
            Self::InRefused => {
                let mut copy = session.copy_in("COPY t FROM STDIN").await?;
                copy.send("1\nx\n".into()).await?;
                for _ in 0..20 {
                    copy.send("2\n".into()).await?;
                    // So that the refusal comes between any two of them.
                    tokio::time::sleep(Duration::from_micros(100)).await;
                }
                copy.finish().await
            }
            Self::InClosedTwice => {
                let mut copy = session.copy_in("COPY t FROM STDIN").await?;
                copy.send("1\n2\n".into()).await?;
                SinkExt::close(&mut copy).await?;
                SinkExt::close(&mut copy).await?;
                copy.finish().await
            }
            Self::OutDropped => {
                let mut data = session.copy_out("COPY (SELECT generate_series(1, 30000)) TO STDOUT").await?;
                for _ in 0..50 {
                    data.next().await.expect("more")?;
                }
                Ok(0)
            }
            Self::OutFails => {
                let sql = "COPY (SELECT 1/(100-g) FROM generate_series(1, 200) g) TO STDOUT";
                let mut data = session.copy_out(sql).await?;
                while let Some(data) = data.next().await {
                    data?;
                }
                Ok(0)
            }
            Self::RowsOut => {
                let sql = "SELECT g, g::text FROM generate_series(1, 3000) g";
                let mut rows = session.copy_query_out(sql).await?;
                let mut n = 0;
                while let Some(row) = rows.next().await {
                    let _: i32 = row?.get(0);
                    n += 1;
                }
                Ok(n)
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_raw_copy_dropped_or_misused_at_any_point_leaves_a_good_session() {
    let table = Table::of("id int").await;
    let copies = [
        Copy::InDropped,
        Copy::InRefused,
        Copy::InClosedTwice,
        Copy::OutDropped,
        Copy::OutFails,
        Copy::RowsOut,
    ];
    for n in 0..40 {
        for copy in copies {
            table.empty().await;
            let session = within(table.session()).await;
            let told = polls(copy.perform(&session), n).await;
            let after = format!("{copy:?}, {n} polls, {told:?}");
            assert_usable(&session, &after).await;
            let stored = table.rows().await;
            match (&told, copy) {
                (Some(Ok(n)), Copy::InClosedTwice) => assert_eq!((stored, *n), (2, 2), "{after}"),
                // Whether it was stored is not known to whoever gave it up.
                (None, Copy::InClosedTwice) => assert!(stored == 0 || stored == 2, "{after}: {stored}"),
                (Some(Ok(n)), Copy::RowsOut) => assert_eq!(*n, 3000, "{after}"),
                (Some(Ok(_)), Copy::InRefused | Copy::OutFails) => panic!("{after}"),
                _ => assert_eq!(stored, 0, "{after}"),
            }
        }
    }
}

/// Where rows come from an iterator that panics, and where the panic is caught.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Caught {
    OutsideOfASession,
    OutsideOfATransaction,
    Inside,
    /// Of a COPY, after a statement that was good.
    InsideCopy,
    OutsideOfASavepoint,
}

/// execute_many: "Once some rows were sent, any error aborts the transaction"; "all rows or none".
#[tokio::test(flavor = "multi_thread")]
async fn an_iterator_that_panics_in_execute_many_stores_nothing() {
    let table = Table::of("id int, x text").await;
    let ways = [
        Caught::OutsideOfASession,
        Caught::OutsideOfATransaction,
        Caught::Inside,
        Caught::InsideCopy,
        Caught::OutsideOfASavepoint,
    ];
    for at in [0, 1, 500, 1400, 2999, 3000] {
        for caught in ways {
            let mut session = within(table.session()).await;
            let it = panics_at(at, 3001);
            // `None`: the panic came out of it.
            let told: Option<Result<(), Error>> = match caught {
                Caught::OutsideOfASession => {
                    let work = AssertUnwindSafe(session.execute_many(INSERT, it));
                    within(work.catch_unwind()).await.ok().map(|told| told.map(drop))
                }
                Caught::OutsideOfATransaction => {
                    let work =
                        session.transaction(async |tx| tx.execute_many(INSERT, it.clone()).await.map(drop));
                    within(AssertUnwindSafe(work).catch_unwind()).await.ok()
                }
                _ => {
                    let work = session.transaction(async |tx| {
                        let it = it.clone();
                        let panicked = match caught {
                            Caught::InsideCopy => {
                                tx.execute("INSERT INTO t VALUES (-1, '')", &[]).await?;
                                panics(tx.copy_rows_in("t", &["id", "x"]).send(it)).await
                            }
                            Caught::OutsideOfASavepoint => {
                                panics(tx.savepoint(async |sp| sp.execute_many(INSERT, it.clone()).await))
                                    .await
                            }
                            _ => panics(tx.execute_many(INSERT, it)).await,
                        };
                        assert!(panicked);
                        if caught == Caught::OutsideOfASavepoint {
                            tx.execute("SELECT 1", &[]).await?;
                        }
                        Ok(())
                    });
                    Some(within(work).await)
                }
            };
            let after = format!("panic at {at}, caught {caught:?}, told {told:?}");
            let outside = matches!(caught, Caught::OutsideOfASession | Caught::OutsideOfATransaction);
            assert_eq!(told.is_none(), outside, "{after}");
            let kept = i64::from(caught == Caught::InsideCopy && matches!(told, Some(Ok(()))));
            assert_eq!(table.rows().await, kept, "{after}");
            table.empty().await;
            if let Err(e) = within(session.query_one("SELECT 1", &[])).await {
                assert!(e.is_connection_lost(), "{after}: {e:?}");
            }
            drop(session);
            assert_usable(&within(table.session()).await, &after).await;
        }
    }
}

async fn panics<T>(work: impl Future<Output = T>) -> bool {
    AssertUnwindSafe(work).catch_unwind().await.is_err()
}

/// The results of tasks, which do not hang.
async fn join<T>(tasks: Vec<JoinHandle<T>>) -> Vec<T> {
    let mut results = Vec::new();
    for task in tasks {
        results.push(within(task).await.unwrap());
    }
    results
}

/// SessionManager::close: "Callers who wait for a session already, and units of work under way, are still served".
#[tokio::test(flavor = "multi_thread")]
async fn closing_serves_units_of_work_and_waiters_then_nobody() {
    const TASKS: usize = 8;
    let table = Table::of("id int").await;
    let db = &table.db;
    for drop_manager in [false, true] {
        table.empty().await;
        let config = db.config().max_size(2).shutdown_timeout(Duration::from_secs(20));
        let sessions = SessionManager::new(config).unwrap();
        // Moved to a thread of its own, on another runtime, where it goes on once the manager is being closed.
        let tx = sessions.begin().await.unwrap();
        tx.execute("INSERT INTO t VALUES (100)", &[]).await.unwrap();
        let held = sessions.acquire().await.unwrap();
        let (closing, is_closing) = oneshot::channel::<()>();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                is_closing.await.unwrap();
                tx.execute("INSERT INTO t VALUES (101)", &[]).await?;
                tx.commit().await
            })
        });
        let work = async |sessions: SessionManager, id: i32| {
            sessions
                .transaction(async |tx| {
                    tx.execute("INSERT INTO t VALUES ($1)", &[&id]).await?;
                    tx.execute("SELECT pg_sleep(0.05)", &[]).await?;
                    if tx.attempt() < 3 {
                        tx.batch_execute("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$").await?;
                    }
                    Ok::<_, Error>(())
                })
                .await
        };
        let tasks = (0..TASKS as i32).map(|id| tokio::spawn(work(sessions.clone(), id))).collect();
        // All wait; then the first is at work.
        until(|| sessions.status().waiting == TASKS).await;
        drop(held);
        until(|| sessions.status().waiting < TASKS).await;
        if drop_manager {
            drop(sessions);
            closing.send(()).unwrap();
        } else {
            let (cut, _) =
                within(async { tokio::join!(biased; sessions.close(), async { closing.send(()) }) }).await;
            assert_eq!(cut, 0);
        }
        let told = join(tasks).await;
        assert!(told.iter().all(Result::is_ok), "{told:?}");
        let by_thread = thread.join().unwrap();
        assert!(by_thread.is_ok(), "{by_thread:?}");
        assert_eq!(table.rows().await, TASKS as i64 + 2);
    }
    db.until_alone().await;
}

/// A close that runs out of time: work is cut; nobody is told what is not so.
#[tokio::test(flavor = "multi_thread")]
async fn a_close_that_cuts_tells_the_truth() {
    let table = Table::of("id int").await;
    let db = &table.db;
    for round in 0..12u64 {
        table.empty().await;
        let config = db.config().max_size(4).shutdown_timeout(ms(5 + 2 * round));
        let sessions = SessionManager::new(config).unwrap();
        let done = Arc::new(AtomicUsize::new(0));
        let work = async |sessions: SessionManager, id: i32, done: Arc<AtomicUsize>| {
            let told = sessions
                .transaction(async |tx| {
                    tx.execute("INSERT INTO t VALUES ($1)", &[&id]).await?;
                    tx.execute("SELECT pg_sleep($1)", &[&(f64::from(id % 4) * 0.01)]).await?;
                    Ok::<_, Error>(())
                })
                .await;
            done.fetch_add(1, SeqCst);
            (id, told)
        };
        let tasks = (0..12).map(|id| tokio::spawn(work(sessions.clone(), id, Arc::clone(&done)))).collect();
        // While connections are made; with all at work; after some were done.
        match round % 4 {
            0 => until(|| sessions.status().connecting > 0 || done.load(SeqCst) > 0).await,
            1 => until(|| sessions.status().in_use == 4 || done.load(SeqCst) > 0).await,
            some => until(|| done.load(SeqCst) as u64 >= some).await,
        }
        let started = Instant::now();
        within(sessions.close()).await;
        let told = join(tasks).await;
        // Cutting what is left takes cancelling it first, 2 s at most.
        assert!(started.elapsed() < Duration::from_secs(8), "{:?}", started.elapsed());
        db.until_alone().await;
        for (id, told) in &told {
            let stored = db.number(&format!("SELECT count(*) FROM t WHERE id = {id}")).await;
            match told {
                Ok(()) => assert_eq!(stored, 1),
                Err(Error::CommitUnknown(_)) => {}
                Err(e) => assert_eq!(stored, 0, "{e:?}"),
            }
        }
    }
}

/// README "Bounded waits": "a connect that stalls after TCP hangs"; the error names the phase.
#[tokio::test(flavor = "multi_thread")]
async fn connects_that_fail_half_way_are_told_and_leave_room() {
    let authenticated = message(b'R', &[0; 4]);
    let keys = message(b'K', &[0, 0, 0, 1, 0, 0, 0, 1]);
    let ready = message(b'Z', b"I");
    let version = message(b'S', b"server_version\x0015.1\0");
    let password = message(b'R', &[0, 0, 0, 3]);
    let refused = message(b'E', b"SFATAL\0VFATAL\0C28000\0Mnope\0\0");
    let endless = |length: u32| [&b"R"[..], &length.to_be_bytes(), &[0; 4]].concat();
    // What the server answers; nothing: it closes.
    let answers: [(&str, Option<Vec<u8>>); 10] = [
        ("silence", Some(vec![])),
        ("the end", None),
        ("garbage", Some(b"HTTP/1.1 400 Bad Request\r\n\r\nhello hello hello".to_vec())),
        ("authenticated, then silence", Some(authenticated.clone())),
        ("ready, no parameters", Some([&authenticated[..], &keys, &ready].concat())),
        ("password", Some(password)),
        ("refused", Some(refused)),
        ("ready, then silence", Some([&authenticated[..], &version, &keys, &ready].concat())),
        ("a huge frame", Some(endless(0x7fff_ffff))),
        ("a negative frame", Some(endless(u32::MAX))),
    ];
    for (what, answer) in answers {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let answer = answer.clone();
                tokio::spawn(async move {
                    let _ = stream.read(&mut [0; 1024]).await;
                    let Some(answer) = answer else { return };
                    let _ = stream.write_all(&answer).await;
                    let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
                });
            }
        });
        let config: SessionConfig = format!("postgres://u:hunter2@127.0.0.1:{port}/d").parse().unwrap();
        let config = config.max_size(1).connect_timeout(ms(300)).acquire_timeout(ms(2000));
        let sessions = SessionManager::new(config.cleanup_timeout(ms(200))).unwrap();
        for _ in 0..2 {
            let started = Instant::now();
            let e = within(sessions.acquire()).await.map(drop).unwrap_err();
            // A machine may be busy; nothing here would end by itself.
            assert!(started.elapsed() < Duration::from_secs(5), "{what}: {:?}", started.elapsed());
            assert!(matches!(e, Error::Connect(_)), "{what}: {e:?}");
            assert!(!format!("{e:?} {e}").contains("hunter2"), "{what}: {e:?}");
        }
        let status = sessions.status();
        assert_eq!((status.in_use, status.size), (0, 0), "{what}: {status:?}");
        assert_eq!(within(sessions.close()).await, 0, "{what}");
        server.abort();
    }
}

/// What the first statement of a transaction is.
#[derive(Clone, Copy, Debug)]
enum First {
    Execute,
    Text,
    Batch,
    Many,
    Rows,
    Copy,
    Stream,
    Savepoint,
    TwoAtOnce,
}

impl First {
    async fn run(self, tx: &mut Transaction<'_>) -> Result<(), Error> {
        const ONE: &str = "INSERT INTO t VALUES (1)";
        const TWO: &str = "INSERT INTO t VALUES (2)";
        match self {
            Self::Execute => tx.execute(ONE, &[]).await.map(drop),
            Self::Text => tx.batch_execute(ONE).await,
            Self::Batch => tx.batch().push(ONE, ()).push(TWO, ()).run().await.map(drop),
            Self::Many => tx.execute_many("INSERT INTO t VALUES ($1)", [(1,), (2,)]).await.map(drop),
            Self::Rows => tx.copy_rows_in("t", &[]).send([(1,), (2,)]).await.map(drop),
            Self::Copy => {
                let mut copy = tx.copy_in("COPY t FROM STDIN").await?;
                copy.send("1\n".into()).await?;
                copy.finish().await.map(drop)
            }
            Self::Stream => {
                let mut rows = tx.query_stream("INSERT INTO t VALUES (1) RETURNING id", &[]).await?;
                while let Some(row) = rows.next().await {
                    row?;
                }
                Ok(())
            }
            Self::Savepoint => tx.savepoint(async |sp| sp.execute(ONE, &[]).await).await.map(drop),
            Self::TwoAtOnce => {
                let (one, two) = tokio::join!(tx.execute(ONE, &[]), tx.batch_execute(TWO));
                one.and(two)
            }
        }
    }
}

/// local_setting: "An unknown parameter or bad value makes the first statement, which is not run, fail with
/// Error::Database".
#[tokio::test(flavor = "multi_thread")]
async fn a_bad_local_setting_fails_the_first_statement_whatever_it_is() {
    let table = Table::of("id int").await;
    let bad = TransactionOptions::new().local_setting("work_mem", "nonsense");
    let check = async |what: &str, told: Result<(), Error>| {
        assert!(matches!(told, Err(Error::Database(_))), "{what}: {told:?}");
        assert_eq!(table.rows().await, 0, "{what}");
    };
    let firsts = [
        First::Execute,
        First::Text,
        First::Batch,
        First::Many,
        First::Rows,
        First::Copy,
        First::Stream,
        First::Savepoint,
        First::TwoAtOnce,
    ];
    for first in firsts {
        let mut session = within(table.session()).await;
        let told = within(session.transaction_with(bad.clone(), async |tx| first.run(tx).await)).await;
        check(&format!("{first:?}"), told).await;
    }
    // The same where the transaction is the batch's own.
    let mut session = within(table.session()).await;
    let mut batch = session.batch_with(bad.clone());
    batch.push("INSERT INTO t VALUES (1)", ()).push("INSERT INTO t VALUES (2)", ());
    check("batch", within(batch.run()).await.map(drop)).await;
    let sessions = SessionManager::new(table.db.config().transactions(bad)).unwrap();
    let mut session = within(sessions.acquire()).await.unwrap();
    let many = within(session.execute_many("INSERT INTO t VALUES ($1)", [(1,), (2,)])).await;
    check("execute_many", many.map(drop)).await;
}

/// README: "a panic rolls back and closes the connection"; Error::StatementAbandoned: "the transaction was rolled back".
#[tokio::test(flavor = "multi_thread")]
async fn what_is_told_rolled_back_after_a_panic_holds_no_lock() {
    let table = Table::of("id int, x text").await;
    for (copy, by_hand) in [(false, false), (true, false), (true, true)] {
        let mut session = within(table.session()).await;
        let pid = session.process_id();
        let body = async |tx: &mut Transaction<'_>| {
            tx.execute("INSERT INTO t VALUES (-1, '')", &[]).await?;
            let it = panics_at(1400, 3000);
            let panicked = if copy {
                panics(tx.copy_rows_in("t", &["id", "x"]).send(it)).await
            } else {
                panics(tx.execute_many(INSERT, it)).await
            };
            assert!(panicked);
            Ok::<_, Error>(())
        };
        let told = if by_hand {
            let mut tx = session.begin().await.unwrap();
            body(&mut tx).await.unwrap();
            within(tx.commit()).await
        } else {
            within(session.transaction(body)).await
        };
        // The second where the server has answered by then that the COPY failed.
        assert!(matches!(told, Err(Error::StatementAbandoned | Error::Aborted(_))), "{told:?}");
        // With the session still held: nothing of it waits for the session to go back.
        let locks = format!("SELECT FROM pg_locks WHERE pid = {pid} AND relation = 't'::regclass");
        table.db.until(&format!("NOT EXISTS ({locks})")).await;
        assert_eq!(table.rows_after(session).await, 0);
    }
}
