//! Cancels from outside at every moment, and what is handed on.
#![cfg(feature = "testing")]
#![allow(clippy::mem_forget, reason = "what is leaked is what is tested")]

mod common;

use std::time::{Duration, Instant};

use common::{Database, polls, within};
use pg_session::{Error, RetryPolicy, TransactionOptions};

/// What was told Ok is stored, and what was told to be undone is not; whatever was cancelled.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancels_from_outside_never_mix_up_savepoints() {
    let db = Database::new().await;
    db.run("CREATE TABLE t (id int PRIMARY KEY)").await;
    let sessions = db.single();
    let mut session = sessions.acquire().await.unwrap();
    let pid = session.process_id();
    let killer = common::connect(db.database.url()).await;
    let killing = tokio::spawn(async move {
        let mut random = fastrand::Rng::with_seed(3);
        loop {
            killer.execute("SELECT pg_cancel_backend($1)", &[&pid]).await.unwrap();
            tokio::time::sleep(Duration::from_micros(random.u64(0..900))).await;
        }
    });
    let started = Instant::now();
    let (mut committed, mut failed, mut wrong) = (0, 0, Vec::new());
    let mut base = 0;
    while started.elapsed() < Duration::from_secs(12) {
        base += 10;
        let options = TransactionOptions::new().retry(RetryPolicy::never());
        let told = session
            .transaction_with(options, async |tx| {
                tx.execute("INSERT INTO t VALUES ($1)", &[&base]).await?;
                let one = tx
                    .savepoint(async |sp| sp.execute("INSERT INTO t VALUES ($1 + 1)", &[&base]).await)
                    .await;
                let two = tx
                    .savepoint(async |sp| sp.execute("INSERT INTO t VALUES ($1 + 2)", &[&base]).await)
                    .await;
                let three = tx
                    .savepoint(async |sp| {
                        sp.execute("INSERT INTO t VALUES ($1 + 3)", &[&base]).await?;
                        sp.savepoint(async |sp| sp.execute("INSERT INTO t VALUES ($1 + 4)", &[&base]).await)
                            .await
                    })
                    .await;
                Ok::<_, Error>((one, two, three))
            })
            .await;
        let rows: Vec<i32> = loop {
            if let Ok(rows) = db
                .watcher
                .query("SELECT id - $1 FROM t WHERE id BETWEEN $1 AND $1 + 9 ORDER BY id", &[&base])
                .await
            {
                break rows.iter().map(|row| row.get(0)).collect();
            }
        };
        let expected: Vec<i32> = match &told {
            Ok((one, two, three)) => {
                committed += 1;
                let mut rows = vec![0];
                rows.extend(one.is_ok().then_some(1));
                rows.extend(two.is_ok().then_some(2));
                rows.extend(three.is_ok().then_some(3));
                rows.extend(three.is_ok().then_some(4));
                rows
            }
            Err(e) => {
                failed += 1;
                if e.is_outcome_unknown() {
                    continue;
                }
                Vec::new()
            }
        };
        if rows != expected {
            wrong.push(format!("{told:?}: {rows:?}"));
        }
    }
    killing.abort();
    println!("{committed} committed, {failed} failed, {} wrong", wrong.len());
    assert!(wrong.is_empty(), "{}", wrong[..wrong.len().min(3)].join("\n"));
}

/// Whatever is done with the session, dropped at any poll, the next borrower finds nothing of it, and soon.
#[tokio::test]
async fn the_next_borrower_finds_nothing_whatever_was_dropped_at_whatever_poll() {
    let db = Database::new().await;
    db.run(
        "CREATE TABLE t (id int); CREATE ROLE test_role_%"
            .replace('%', &std::process::id().to_string())
            .as_str(),
    )
    .await;
    let role = format!("SET ROLE test_role_{}", std::process::id());
    let sessions = db.single();
    let mut random = fastrand::Rng::with_seed(11);
    let started = Instant::now();
    let mut n = 0;
    let mut slowest = Duration::ZERO;
    while started.elapsed() < Duration::from_secs(20) {
        n += 1;
        let mut session = within(sessions.acquire()).await.unwrap();
        let row = session
            .query_one(
                "SELECT current_user = session_user, current_setting('work_mem'), to_regclass('pg_temp.x') IS NULL, \
                 (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()), \
                 (SELECT count(*) FROM pg_cursors WHERE name <> ''), (SELECT count(*) FROM pg_listening_channels()), \
                 (SELECT count(*) FROM pg_prepared_statements WHERE from_sql), \
                 statement_timestamp() - now() < '20ms'::interval",
                &[],
            )
            .await
            .unwrap();
        assert!(row.get::<_, bool>(0) && row.get::<_, &str>(1) == "4MB" && row.get::<_, bool>(2), "{n}");
        assert_eq!([3, 4, 5, 6].map(|i| row.get::<_, i64>(i)), [0; 4], "{n}");
        assert!(row.get::<_, bool>(7), "in a transaction: {n}");
        let what = random.u32(0..14);
        let at = random.usize(1..9);
        let forget = random.u32(0..4) == 0;
        macro_rules! cut {
            ($future:expr) => {{
                let mut future = Box::pin($future);
                let mut left = at;
                std::future::poll_fn(|cx| {
                    left -= 1;
                    match std::future::Future::poll(future.as_mut(), cx) {
                        std::task::Poll::Ready(_) => std::task::Poll::Ready(()),
                        _ if left == 0 => std::task::Poll::Ready(()),
                        _ => std::task::Poll::Pending,
                    }
                })
                .await;
                if forget {
                    std::mem::forget(future);
                }
            }};
        }
        let dirt = format!(
            "{role}; SET work_mem = '8MB'; CREATE TEMP TABLE x (a int); SELECT pg_advisory_lock(7); LISTEN q; \
             PREPARE pp AS SELECT 1; DECLARE c CURSOR WITH HOLD FOR SELECT 1"
        );
        match what {
            0 => cut!(session.batch_execute(&dirt)),
            1 => cut!(session.query("SELECT pg_sleep(0.5), pg_advisory_lock(8)", &[])),
            2 => cut!(session.transaction(async |tx| {
                tx.batch_execute(&dirt).await?;
                tx.execute("SELECT pg_sleep(0.01)", &[]).await
            })),
            3 => cut!(async {
                let client = session.client().await.unwrap();
                let tx = client.transaction().await.unwrap();
                tx.batch_execute("SET work_mem = '9MB'; INSERT INTO t VALUES (1)").await.unwrap();
                let sink: tokio_postgres::CopyInSink<bytes::Bytes> =
                    tx.copy_in("COPY t FROM STDIN").await.unwrap();
                std::mem::forget(tx);
                drop(sink);
            }),
            4 => cut!(async {
                let client = session.client().await.unwrap();
                client.batch_execute("BEGIN").await.unwrap();
                let rows =
                    client.query_raw::<_, i32, _>("SELECT generate_series(1, 100000)", []).await.unwrap();
                std::mem::forget(rows);
            }),
            5 => cut!(async {
                let client = session.client().await.unwrap();
                let _ = tokio::join!(client.batch_execute(&dirt), client.query("SELECT pg_sleep(0.1)", &[]));
            }),
            6 => cut!(session.execute_many("INSERT INTO t VALUES ($1)", (0..20_000i32).map(|n| (n,)))),
            7 => cut!(async {
                let mut rows = session.query_stream("SELECT generate_series(1, 200000)", &[]).await.unwrap();
                rows.next().await.unwrap().unwrap();
                std::mem::forget(rows);
            }),
            8 => cut!(async {
                let copy = session.copy_in("COPY t FROM STDIN").await.unwrap();
                std::mem::forget(copy);
            }),
            9 => cut!(async {
                let tx = session.begin().await.unwrap();
                tx.batch_execute(&dirt).await.unwrap();
                std::mem::forget(tx);
            }),
            10 => cut!(async {
                let client = session.client().await.unwrap();
                // Refused at once: the driver sends CopyFail and a Sync more.
                let refused = client.copy_in::<_, bytes::Bytes>("COPY pg_class FROM STDIN").await;
                drop(refused);
            }),
            11 => cut!(async {
                let mut batch = session.batch();
                batch.push("SELECT pg_sleep(0.02)", ()).push("INSERT INTO t VALUES (2)", ()).run().await
            }),
            12 => cut!(async {
                let client = session.client().await.unwrap();
                std::mem::forget(client.copy_out("COPY (SELECT generate_series(1, 300000)) TO STDOUT").await);
            }),
            _ => cut!(async {
                let mut tx = session.begin().await.unwrap();
                tx.savepoint(async |sp| {
                    sp.batch_execute(&dirt).await?;
                    sp.execute("SELECT pg_sleep(0.01)", &[]).await
                })
                .await
            }),
        }
        let returned = Instant::now();
        drop(session);
        common::until_returned(&sessions).await;
        if returned.elapsed() > slowest {
            slowest = returned.elapsed();
            println!("{slowest:?} for {what}, {at} polls, forgotten {forget}");
        }
        assert!(returned.elapsed() < Duration::from_millis(4500), "{:?} for {what}", returned.elapsed());
    }
    println!("{n} rounds, slowest {slowest:?}");
    drop(polls(async {}, 1));
}

/// Cancels that hit BEGIN: nothing of a transaction runs without it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancels_from_outside_never_make_a_statement_run_without_its_transaction() {
    let db = Database::new().await;
    db.run("CREATE TABLE t (id int PRIMARY KEY)").await;
    let sessions = db.single();
    let mut session = sessions.acquire().await.unwrap();
    let pid = session.process_id();
    let killer = common::connect(db.database.url()).await;
    let killing = tokio::spawn(async move {
        let mut random = fastrand::Rng::with_seed(5);
        loop {
            killer.execute("SELECT pg_cancel_backend($1)", &[&pid]).await.unwrap();
            tokio::time::sleep(Duration::from_micros(random.u64(0..200))).await;
        }
    });
    let started = Instant::now();
    let (mut committed, mut failed, mut wrong) = (0, 0, Vec::new());
    let mut base = 0;
    while started.elapsed() < Duration::from_secs(15) {
        base += 10;
        let options = TransactionOptions::serializable().retry(RetryPolicy::never());
        let told = session
            .transaction_with(options, async |tx| {
                let one = tx.execute("INSERT INTO t VALUES ($1)", &[&base]).await.is_ok();
                let two = tx.execute("INSERT INTO t VALUES ($1 + 1)", &[&base]).await.is_ok();
                Ok::<_, Error>((one, two))
            })
            .await;
        let rows: Vec<i32> = db
            .watcher
            .query("SELECT id - $1 FROM t WHERE id BETWEEN $1 AND $1 + 9 ORDER BY id", &[&base])
            .await
            .unwrap()
            .iter()
            .map(|row| row.get(0))
            .collect();
        let right = match &told {
            Ok(both) => {
                committed += 1;
                *both == (true, true) && rows == [0, 1]
            }
            Err(e) => {
                failed += 1;
                e.is_outcome_unknown() || rows.is_empty()
            }
        };
        if !right {
            wrong.push(format!("{told:?}: {rows:?}"));
        }
    }
    killing.abort();
    println!("{committed} committed, {failed} failed, {} wrong", wrong.len());
    assert!(wrong.is_empty(), "{}", wrong[..wrong.len().min(3)].join("\n"));
}

/// All or nothing, and as told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batches_and_execute_many_are_stored_as_told_whatever_is_cancelled_or_terminated() {
    let db = Database::new().await;
    db.run("CREATE TABLE t (id int, n int)").await;
    let sessions =
        pg_session::SessionManager::new(db.config().max_size(1).application_name("victim")).unwrap();
    let killer = common::connect(db.database.url()).await;
    let killing = tokio::spawn(async move {
        let mut random = fastrand::Rng::with_seed(9);
        loop {
            let how = if random.u32(0..12) == 0 { "pg_terminate_backend" } else { "pg_cancel_backend" };
            let sql = format!("SELECT {how}(pid) FROM pg_stat_activity WHERE application_name = 'victim'");
            killer.execute(&sql, &[]).await.unwrap();
            tokio::time::sleep(Duration::from_micros(random.u64(0..4000))).await;
        }
    });
    let started = Instant::now();
    let (mut ok, mut err, mut unknown, mut wrong) = (0, 0, 0, Vec::new());
    let mut id = 0i32;
    while started.elapsed() < Duration::from_secs(12) {
        id += 1;
        let (told, count): (Result<u64, Error>, u64) = match id % 3 {
            0 => {
                let mut batch = sessions.batch();
                for n in 0..5 {
                    batch.push("INSERT INTO t VALUES ($1, $2)", (id, n));
                }
                (batch.run().await.map(|r| r.len() as u64), 5)
            }
            1 => match sessions.acquire().await {
                Ok(mut s) => {
                    let rows = (0..9000i32).map(|n| (id, n));
                    (s.execute_many("INSERT INTO t VALUES ($1, $2)", rows).await, 9000)
                }
                Err(e) => (Err(e), 9000),
            },
            _ => {
                let done = sessions
                    .transaction(async |tx| {
                        tx.savepoint(async |sp| {
                            sp.batch()
                                .push("INSERT INTO t VALUES ($1, 0)", (id,))
                                .push("SELECT 1", ())
                                .run()
                                .await
                        })
                        .await?;
                        tx.execute_many("INSERT INTO t VALUES ($1, $2)", (1..50).map(|n| (id, n))).await
                    })
                    .await;
                (done.map(|n| n + 1), 50)
            }
        };
        common::until_returned(&sessions).await;
        let stored = db
            .watcher
            .query_one("SELECT count(*), count(DISTINCT n) FROM t WHERE id = $1", &[&id])
            .await
            .unwrap();
        let (stored, distinct): (i64, i64) = (stored.get(0), stored.get(1));
        let right = match &told {
            Ok(n) => {
                ok += 1;
                *n == count && stored as u64 == count
            }
            Err(e) if e.is_outcome_unknown() => {
                unknown += 1;
                stored == 0 || stored as u64 == count
            }
            Err(_) => {
                err += 1;
                stored == 0
            }
        };
        if !right || distinct != stored {
            wrong.push(format!("{}: {told:?}: {stored} of {count}, {distinct} distinct", id % 3));
        }
    }
    killing.abort();
    println!("{ok} ok, {err} failed, {unknown} unknown, {} wrong", wrong.len());
    assert!(wrong.is_empty(), "{}", wrong[..wrong.len().min(3)].join("\n"));
}
