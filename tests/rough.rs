//! COPY and execute_many given up or failing half-way, managers closed under load, connects that fail.
#![cfg(feature = "testing")]
mod common;

use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

use common::{Database, polls, until_returned, within};
use futures_util::{FutureExt, SinkExt};
use pg_session::{Error, SessionConfig, SessionManager, TransactionOptions};

type Bytes = Vec<u8>;

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn rows(n: i32) -> impl Iterator<Item = (i32, String)> + Clone {
    (0..n).map(|i| (i, "x".repeat(100)))
}

/// stream.rs: "Dropped unfinished, the COPY fails on the server and stores nothing"; typed: "Dropped, nothing is stored,
/// unless the last row had been sent: then all are or none"; transaction: never committed.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_in_dropped_at_any_poll_stores_all_or_nothing() {
    let db = Database::new().await;
    db.run("CREATE TABLE t (id int, x text)").await;
    let sessions = db.single();
    const N: i32 = 3000;
    let mut seen = [0; 3];
    for (round, n) in (0..90).enumerate() {
        db.run("TRUNCATE t").await;
        let in_tx = round % 2 == 0;
        let mut session = within(sessions.acquire()).await.unwrap();
        let mut told = "dropped".to_owned();
        if in_tx {
            let tx = session.begin().await.unwrap();
            let done = polls(tx.copy_rows_in("t", &["id", "x"]).send(rows(N)), n / 2).await;
            let fine = matches!(done, Some(Ok(_)));
            let polled = n / 2 > 0;
            let committed = within(tx.commit()).await;
            told = format!("{done:?} {committed:?}");
            if fine {
                assert!(committed.is_ok());
            } else if committed.is_ok() {
                assert!(!polled || db.number("SELECT count(*) FROM t").await == 0, "{told}");
            }
            let count = db.number("SELECT count(*) FROM t").await;
            assert_eq!(count, if fine && committed.is_ok() { i64::from(N) } else { 0 }, "{n} {told}");
        } else {
            let done = polls(session.copy_rows_in("t", &["id", "x"]).send(rows(N)), n / 2).await;
            if let Some(r) = &done {
                r.as_ref().unwrap();
                told = "done".into();
            }
        }
        // the next verb works on the same session
        let one: i32 = within(session.query_one("SELECT 1", &[])).await.unwrap().get(0);
        assert_eq!(one, 1);
        drop(session);
        within(until_returned(&sessions)).await;
        let count = db.number("SELECT count(*) FROM t").await;
        assert!(count == 0 || count == i64::from(N), "{n} {in_tx} {told}: {count}");
        if told == "done" {
            assert_eq!(count, i64::from(N));
        }
        seen[if told == "dropped" {
            0
        } else if count == 0 {
            1
        } else {
            2
        }] += 1;
    }
    println!("copy in: {seen:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_raw_copy_dropped_or_misused_at_any_point_leaves_a_good_session() {
    let db = Database::new().await;
    db.run("CREATE TABLE t (id int)").await;
    let sessions = db.single();
    let pid = sessions.acquire().await.unwrap().process_id();
    for n in 0..40 {
        for how in 0..6 {
            db.run("TRUNCATE t").await;
            let session = within(sessions.acquire()).await.unwrap();
            let work = async {
                match how {
                    0 => {
                        let mut c = session.copy_in("COPY t FROM STDIN").await?;
                        for i in 0..5 {
                            c.send(format!("{i}\n").into()).await?;
                            tokio::task::yield_now().await;
                        }
                        drop(c);
                        Ok(0)
                    }
                    1 => {
                        let mut c = session.copy_in("COPY t FROM STDIN").await?;
                        c.send("1\nx\n".into()).await?;
                        for _ in 0..20 {
                            c.send("2\n".into()).await?;
                            tokio::time::sleep(Duration::from_micros(100)).await;
                        }
                        c.finish().await
                    }
                    2 => {
                        let mut c = session.copy_in("COPY t FROM STDIN").await?;
                        c.send("1\n2\n".into()).await?;
                        // as a sink, closed twice
                        SinkExt::close(&mut c).await?;
                        SinkExt::close(&mut c).await?;
                        c.finish().await
                    }
                    3 => {
                        let mut c =
                            session.copy_out("COPY (SELECT generate_series(1, 30000)) TO STDOUT").await?;
                        let mut k = 0;
                        while let Some(p) = c.next().await {
                            p?;
                            k += 1;
                            if k == 50 {
                                break;
                            }
                        }
                        Ok(0)
                    }
                    4 => {
                        let mut c = session
                            .copy_out("COPY (SELECT 1/(100-g) FROM generate_series(1, 200) g) TO STDOUT")
                            .await?;
                        while let Some(p) = c.next().await {
                            p?;
                        }
                        Ok(0)
                    }
                    _ => {
                        let mut c = session
                            .copy_query_out("SELECT g, g::text FROM generate_series(1, 3000) g")
                            .await?;
                        let mut k = 0;
                        while let Some(p) = c.next().await {
                            let _: i32 = p?.get(0);
                            k += 1;
                        }
                        assert_eq!(k, 3000);
                        Ok(k)
                    }
                }
            };
            let r: Option<Result<u64, Error>> = polls(work, n).await;
            if n == 39 {
                println!("{how}: {r:?}");
            }
            let one = within(session.query_one("SELECT 1", &[])).await;
            assert!(one.is_ok(), "{how} {n} {r:?}: {one:?}");
            let count = db.number("SELECT count(*) FROM t").await;
            match (&r, how) {
                (Some(Ok(_)), 2) => assert_eq!(count, 2),
                (Some(_), 2) | (_, 0 | 1) => assert_eq!(count, 0, "{how} {n} {r:?}"),
                _ => {}
            }
            drop(session);
        }
    }
    within(until_returned(&sessions)).await;
    println!("same connection: {}", sessions.acquire().await.unwrap().process_id() == pid);
}

/// batch.rs: "Once some rows were sent, any error aborts the transaction"; "all rows or none".
#[tokio::test(flavor = "multi_thread")]
async fn an_iterator_that_panics_in_execute_many_stores_nothing() {
    let db = Database::new().await;
    db.run("CREATE TABLE t (id int, x text)").await;
    let sessions = db.single();
    for at in [0, 1, 500, 1400, 2999, 3000] {
        for how in 0..5 {
            let mut session = within(sessions.acquire()).await.unwrap();
            let it = (0..3001).map(move |i| {
                assert!(i != at, "on purpose");
                (i, "x".repeat(200))
            });
            const SQL: &str = "INSERT INTO t VALUES ($1, $2)";
            let told = match how {
                0 => format!(
                    "{:?}",
                    AssertUnwindSafe(session.execute_many(SQL, it)).catch_unwind().await.is_err()
                ),
                1 => {
                    let r: Result<Result<(), Error>, _> = AssertUnwindSafe(session.transaction(async |tx| {
                        tx.execute_many(SQL, it.clone()).await?;
                        Ok(())
                    }))
                    .catch_unwind()
                    .await;
                    format!("{:?}", r.is_err())
                }
                2 => {
                    // caught inside: the closure goes on and says Ok
                    let r: Result<(), Error> = within(session.transaction(async |tx| {
                        let c = AssertUnwindSafe(tx.execute_many(SQL, it.clone())).catch_unwind().await;
                        assert!(c.is_err());
                        Ok(())
                    }))
                    .await;
                    format!("{r:?}")
                }
                3 => {
                    let r: Result<(), Error> = within(session.transaction(async |tx| {
                        tx.execute("INSERT INTO t VALUES (-1, '')", &[]).await?;
                        let c = AssertUnwindSafe(tx.copy_rows_in("t", &["id", "x"]).send(it.clone()))
                            .catch_unwind()
                            .await;
                        assert!(c.is_err());
                        Ok(())
                    }))
                    .await;
                    format!("{r:?}")
                }
                _ => {
                    // caught inside a savepoint
                    let r: Result<(), Error> = within(session.transaction(async |tx| {
                        let c =
                            AssertUnwindSafe(tx.savepoint(async |sp| sp.execute_many(SQL, it.clone()).await))
                                .catch_unwind()
                                .await;
                        assert!(c.is_err());
                        tx.execute("SELECT 1", &[]).await?;
                        Ok(())
                    }))
                    .await;
                    format!("{r:?}")
                }
            };
            let count = db.number("SELECT count(*) FROM t").await;
            println!("panic at {at}, how {how}: {told}; {count} stored");
            if how != 3 {
                assert_eq!(count, 0);
            }
            db.run("TRUNCATE t").await;
            let again = within(session.query_one("SELECT 1", &[])).await;
            if let Err(e) = &again {
                assert!(e.is_connection_lost(), "{e:?}");
            }
            drop(session);
            let s = within(sessions.acquire()).await.unwrap();
            within(s.query_one("SELECT 1", &[])).await.unwrap();
            drop(s);
        }
    }
}

/// manager.rs close(): "Callers who wait for a session already, and units of work under way, are still served".
#[tokio::test(flavor = "multi_thread")]
async fn closing_serves_units_of_work_and_waiters_then_nobody() {
    let db = Database::new().await;
    db.run("CREATE TABLE t (id int)").await;
    for drop_manager in [false, true] {
        db.run("TRUNCATE t").await;
        let sessions = SessionManager::new(db.config().max_size(2).shutdown_timeout(ms(5000))).unwrap();
        let mut tasks = Vec::new();
        for i in 0..8 {
            let s = sessions.clone();
            tasks.push(tokio::spawn(async move {
                s.transaction(async |tx| {
                    tx.execute("INSERT INTO t VALUES ($1)", &[&i]).await?;
                    tx.execute("SELECT pg_sleep(0.05)", &[]).await?;
                    if tx.attempt() < 3 {
                        tx.batch_execute("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$").await?;
                    }
                    Ok::<_, Error>(())
                })
                .await
            }));
        }
        // a Transaction<'static> moved to a thread of its own, on another runtime
        let tx = sessions.begin().await.unwrap();
        tx.execute("INSERT INTO t VALUES (100)", &[]).await.unwrap();
        let thread = std::thread::spawn(move || {
            let rt = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            rt.block_on(async move {
                tokio::time::sleep(ms(200)).await;
                tx.execute("INSERT INTO t VALUES (101)", &[]).await?;
                tx.commit().await
            })
        });
        tokio::time::sleep(ms(60)).await;
        let cut = if drop_manager {
            drop(sessions);
            0
        } else {
            within(sessions.close()).await
        };
        let mut told = Vec::new();
        for task in tasks {
            told.push(within(task).await.unwrap());
        }
        let owned = thread.join().unwrap();
        let count = db.number("SELECT count(*) FROM t").await;
        println!(
            "drop {drop_manager}: cut {cut}, {} ok, owned {owned:?}, {count} stored",
            told.iter().filter(|r| r.is_ok()).count()
        );
        assert!(told.iter().all(Result::is_ok), "{told:?}");
        assert!(owned.is_ok());
        assert_eq!(count, 10);
    }
    db.until_quiet().await;
    db.until("(SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()) = 0").await;
}

/// A close that runs out of time: work is cut; nobody is told what is not so.
#[tokio::test(flavor = "multi_thread")]
async fn a_close_that_cuts_tells_the_truth() {
    let db = Database::new().await;
    db.run("CREATE TABLE t (id int)").await;
    for round in 0..12u64 {
        db.run("TRUNCATE t").await;
        let sessions = SessionManager::new(db.config().max_size(4).shutdown_timeout(ms(20 + round))).unwrap();
        let mut tasks = Vec::new();
        for i in 0..12 {
            let s = sessions.clone();
            tasks.push(tokio::spawn(async move {
                (
                    i,
                    s.transaction(async |tx| {
                        tx.execute("INSERT INTO t VALUES ($1)", &[&i]).await?;
                        tx.execute("SELECT pg_sleep($1)", &[&(f64::from(i % 4) * 0.01)]).await?;
                        Ok::<_, Error>(())
                    })
                    .await,
                )
            }));
        }
        tokio::time::sleep(ms(5)).await;
        let started = Instant::now();
        let cut = within(sessions.close()).await;
        let mut told = Vec::new();
        for task in tasks {
            told.push(within(task).await.unwrap());
        }
        assert!(started.elapsed() < ms(3000), "{:?}", started.elapsed());
        db.until("(SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()) = 0").await;
        for (i, r) in &told {
            let stored = db.number(&format!("SELECT count(*) FROM t WHERE id = {i}")).await;
            match r {
                Ok(()) => assert_eq!(stored, 1),
                Err(Error::CommitUnknown(_)) => {}
                Err(e) => assert_eq!(stored, 0, "{e:?}"),
            }
        }
        if round == 11 {
            println!("cut {cut}: {told:?}");
        }
    }
}

/// README "Bounded waits": "a connect that stalls after TCP hangs"; the error names the phase.
#[tokio::test(flavor = "multi_thread")]
async fn connects_that_fail_half_way_are_told_and_leave_room() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let db = Database::new().await;
    let real = db.config();
    drop(real);
    let replies: Vec<(&str, Vec<u8>)> = vec![
        ("silent", vec![]),
        ("closed", b"CLOSE".to_vec()),
        ("garbage", b"HTTP/1.1 400 Bad Request\r\n\r\nhello hello hello".to_vec()),
        ("auth then silence", b"R\0\0\0\x08\0\0\0\0".to_vec()),
        ("auth ok, ready, no parameters", b"R\0\0\0\x08\0\0\0\0K\0\0\0\x0c\0\0\0\x01\0\0\0\x01Z\0\0\0\x05I".to_vec()),
        ("password", b"R\0\0\0\x08\0\0\0\x03".to_vec()),
        ("error", b"E\0\0\0\x20SFATAL\0VFATAL\0C28000\0Mnope\0\0\0\0".to_vec()),
        ("ready 15, then silence", b"R\0\0\0\x08\0\0\0\0S\0\0\0\x18server_version\x0015.1\0K\0\0\0\x0c\0\0\0\x01\0\0\0\x01Z\0\0\0\x05I".to_vec()),
        ("huge frame", b"R\x7f\xff\xff\xff\0\0\0\0".to_vec()),
        ("negative frame", b"R\xff\xff\xff\xff\0\0\0\0".to_vec()),
    ];
    for (what, reply) in replies {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let task = tokio::spawn(async move {
            while let Ok((mut s, _)) = listener.accept().await {
                let reply = reply.clone();
                tokio::spawn(async move {
                    let mut b = [0; 1024];
                    let _ = s.read(&mut b).await;
                    if reply == b"CLOSE" {
                        return;
                    }
                    let _ = s.write_all(&reply).await;
                    let _ = tokio::io::copy(&mut s, &mut tokio::io::sink()).await;
                });
            }
        });
        let config: SessionConfig = format!("postgres://u:hunter2@127.0.0.1:{port}/d").parse().unwrap();
        let sessions = SessionManager::new(
            config.max_size(1).connect_timeout(ms(300)).acquire_timeout(ms(2000)).cleanup_timeout(ms(200)),
        )
        .unwrap();
        for _ in 0..2 {
            let started = Instant::now();
            let r = within(sessions.acquire()).await;
            let e = r.map(drop).unwrap_err();
            println!(
                "{what}: {e} | {:?} | source {:?} after {:?}",
                e,
                std::error::Error::source(&e).map(ToString::to_string),
                started.elapsed()
            );
            assert!(started.elapsed() < ms(2500), "{what}");
            assert!(!format!("{e:?} {e}").contains("hunter2"));
        }
        let status = sessions.status();
        assert_eq!((status.in_use, status.size), (0, 0), "{what} {status:?}");
        assert_eq!(within(sessions.close()).await, 0);
        task.abort();
    }
}

/// README: "no row data and no value of a statement in Debug".
#[tokio::test(flavor = "multi_thread")]
async fn debug_shows_no_value() {
    let db = Database::new().await;
    db.run("CREATE TABLE t (id int PRIMARY KEY, x text CHECK (x <> 'hunter2bad'), j jsonb); INSERT INTO t VALUES (7, 'hunter2')").await;
    let sessions = db.sessions();
    let mut session = sessions.acquire().await.unwrap();
    let mut all: Vec<(String, String)> = Vec::new();
    let mut note = |what: &str, d: String| all.push((what.into(), d));
    note(
        "unique",
        format!("{:?}", session.execute("INSERT INTO t VALUES (7, 'hunter2')", &[]).await.unwrap_err()),
    );
    note(
        "check",
        format!("{:?}", session.execute("INSERT INTO t VALUES (8, $1)", &[&"hunter2bad"]).await.unwrap_err()),
    );
    note("syntax", format!("{:?}", session.query("SELECT 'hunter2'::uuid", &[]).await.unwrap_err()));
    note("cast", format!("{:?}", session.query("SELECT ($1::text)::int", &[&"hunter2"]).await.unwrap_err()));
    note("raise", format!("{:?}", session.batch_execute("DO $$ BEGIN RAISE 'hunter2' USING DETAIL='hunter2', HINT='hunter2', TABLE='t', ROUTINE='x'; END $$").await.map_err(|e| e.to_string())));
    let mut batch = session.batch();
    batch.push("INSERT INTO t VALUES (7, $1)", ("hunter2",));
    note("batch", format!("{batch:?}"));
    note("batch error", format!("{:?}", batch.run().await.unwrap_err()));
    drop(batch);
    let mut batch = session.batch();
    batch.push("SELECT x FROM t", ());
    let results = batch.run().await.unwrap();
    note("batch result", format!("{results:?}"));
    drop(batch);
    note(
        "many",
        format!(
            "{:?}",
            session
                .execute_many("INSERT INTO t VALUES ($1, $2)", [(1, "a"), (7, "hunter2")])
                .await
                .unwrap_err()
        ),
    );
    note(
        "copy",
        format!("{:?}", session.copy_rows_in("t", &["id", "x"]).send([(9, "hunter2bad")]).await.unwrap_err()),
    );
    note(
        "copy misfit",
        format!("{:?}", session.copy_rows_in("t", &["id", "x"]).send([(9, "hunter2\0")]).await.unwrap_err()),
    );
    let mut out = session.copy_rows_out("t", &["x"]).await.unwrap();
    let row = out.next().await.unwrap().unwrap();
    note("copied row", format!("{row:?}"));
    note("copied row err", format!("{:?}", row.try_get::<i32>(0)));
    note("copy out", format!("{out:?}"));
    drop(out);
    note("stream", format!("{:?}", session.query_stream("SELECT x FROM t", &[]).await.unwrap()));
    let r: Result<(), Error> = session
        .transaction(async |tx| {
            let _ = tx.execute("INSERT INTO t VALUES (7, 'hunter2')", &[]).await;
            Ok(())
        })
        .await;
    note("aborted", format!("{:?}", r.unwrap_err()));
    let o = TransactionOptions::new().local_setting("app.x", "hunter2");
    note("options", format!("{o:?}"));
    let tx = session.begin_with(o).await.unwrap();
    note("tx", format!("{tx:?}"));
    drop(tx);
    let statement = session.prepare("SELECT 'hunter2', $1::int").await.unwrap();
    note("statement", format!("{statement:?}"));
    note("session", format!("{session:?} {sessions:?}"));
    let p = pg_session::Problem::from(
        session.execute("INSERT INTO t VALUES (7, 'hunter2')", &[]).await.unwrap_err(),
    );
    note("problem", format!("{p:?} {}", String::from_utf8_lossy(p.body().as_ref())));
    let e = session.execute("SELECT $1::int", &[&"hunter2"]).await.unwrap_err();
    note("wrong type", format!("{e:?}"));
    let leaks: Vec<_> = all.iter().filter(|(w, d)| w != "raise" && d.contains("hunter2")).collect();
    for (w, d) in &all {
        println!("{w}: {}", d.chars().take(300).collect::<String>());
    }
    assert!(leaks.is_empty(), "{leaks:#?}");
}

/// options.rs: "An unknown parameter or bad value makes the first statement, which is not run, fail with Error::Database"
#[tokio::test(flavor = "multi_thread")]
async fn a_bad_local_setting_fails_the_first_statement_whatever_it_is() {
    let db = Database::new().await;
    db.run("CREATE TABLE t (id int)").await;
    let sessions = db.single();
    let o = || TransactionOptions::new().local_setting("work_mem", "nonsense");
    for how in 0..9 {
        let mut session = within(sessions.acquire()).await.unwrap();
        let r: Result<(), Error> = within(session.transaction_with(o(), async |tx| {
            match how {
                0 => tx.execute("INSERT INTO t VALUES (1)", &[]).await.map(drop),
                1 => tx.batch_execute("INSERT INTO t VALUES (1)").await,
                2 => tx
                    .batch()
                    .push("INSERT INTO t VALUES (1)", ())
                    .push("INSERT INTO t VALUES (2)", ())
                    .run()
                    .await
                    .map(drop),
                3 => tx.execute_many("INSERT INTO t VALUES ($1)", [(1,), (2,)]).await.map(drop),
                4 => tx.copy_rows_in("t", &[]).send([(1,), (2,)]).await.map(drop),
                5 => {
                    let mut c = tx.copy_in("COPY t FROM STDIN").await?;
                    c.send("1\n".into()).await?;
                    c.finish().await.map(drop)
                }
                6 => {
                    let mut s = tx.query_stream("INSERT INTO t VALUES (1) RETURNING id", &[]).await?;
                    while let Some(r) = s.next().await {
                        r?;
                    }
                    Ok(())
                }
                7 => {
                    tx.savepoint(async |sp| sp.execute("INSERT INTO t VALUES (1)", &[]).await).await.map(drop)
                }
                _ => {
                    let (a, b) = tokio::join!(
                        tx.execute("INSERT INTO t VALUES (1)", &[]),
                        tx.batch_execute("INSERT INTO t VALUES (2)")
                    );
                    a?;
                    b
                }
            }
        }))
        .await;
        let n = db.number("SELECT count(*) FROM t").await;
        println!("{how}: {r:?} {n}");
        assert_eq!(n, 0);
        assert!(matches!(r, Err(Error::Database(_))), "{how}: {r:?}");
    }
    for how in 0..2 {
        let mut session = within(sessions.acquire()).await.unwrap();
        let r = match how {
            0 => within(
                session
                    .batch_with(o())
                    .push("INSERT INTO t VALUES (1)", ())
                    .push("INSERT INTO t VALUES (2)", ())
                    .run(),
            )
            .await
            .map(drop),
            _ => within(sessions_many(&db, o())).await,
        };
        println!("own {how}: {r:?}");
        assert!(matches!(r, Err(Error::Database(_))), "{how}: {r:?}");
        assert_eq!(db.number("SELECT count(*) FROM t").await, 0);
    }
}

async fn sessions_many(db: &Database, o: TransactionOptions) -> Result<(), Error> {
    let sessions = SessionManager::new(db.config().transactions(o)).unwrap();
    let mut s = sessions.acquire().await?;
    s.execute_many("INSERT INTO t VALUES ($1)", [(1,), (2,)]).await.map(drop)
}

#[allow(dead_code)]
type Unused = Bytes;

/// README: "a panic rolls back and closes the connection"; Error::StatementAbandoned: "the transaction was rolled back".
#[tokio::test(flavor = "multi_thread")]
async fn what_is_told_rolled_back_after_a_panic_holds_no_lock() {
    let db = Database::new().await;
    db.run("CREATE TABLE t (id int, x text)").await;
    let sessions = db.single();
    for how in 0..3 {
        let mut session = within(sessions.acquire()).await.unwrap();
        let pid = session.process_id();
        let it = (0..3000).map(|i| {
            assert!(i != 1400, "on purpose");
            (i, "x".repeat(200))
        });
        let body = async |tx: &mut pg_session::Transaction<'_>| {
            tx.execute("INSERT INTO t VALUES (-1, '')", &[]).await?;
            let caught = match how {
                0 => AssertUnwindSafe(tx.execute_many("INSERT INTO t VALUES ($1, $2)", it.clone()))
                    .catch_unwind()
                    .await
                    .is_err(),
                _ => AssertUnwindSafe(tx.copy_rows_in("t", &["id", "x"]).send(it.clone()))
                    .catch_unwind()
                    .await
                    .is_err(),
            };
            assert!(caught);
            Ok::<_, Error>(())
        };
        let told = if how == 2 {
            let mut tx = session.begin().await.unwrap();
            body(&mut tx).await.unwrap();
            within(tx.commit()).await
        } else {
            within(session.transaction(body)).await
        };
        tokio::time::sleep(ms(3000)).await;
        let row = db.watcher.query_one("SELECT count(*), max(state), (SELECT count(*) FROM pg_locks WHERE pid = $1 AND relation = 't'::regclass) FROM pg_stat_activity WHERE pid = $1", &[&pid]).await.unwrap();
        println!(
            "{how}: told {told:?}; 3 s later the backend: {} {:?}, {} locks",
            row.get::<_, i64>(0),
            row.get::<_, Option<String>>(1),
            row.get::<_, i64>(2)
        );
        assert_eq!(row.get::<_, i64>(2), 0, "told {told:?}, and its transaction is still open");
        drop(session);
    }
}
