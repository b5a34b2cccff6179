//! Cancels from outside at every moment, and what is handed on.
#![cfg(feature = "testing")]
#![allow(clippy::mem_forget, reason = "what is leaked is what is tested")]

mod common;

use std::future::Future;
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::assassin::Assassin;
use common::residue::assert_pristine;
use common::table::Table;
use common::wrongs::Wrongs;
use common::{Database, leaked, polls, until_returned, within};
use pg_session::{Error, RetryPolicy, Session, SessionManager, TransactionOptions};

/// What is stored of ten ids from this one on.
async fn ten_from(table: &Table, base: i32) -> Vec<i32> {
    let sql = "SELECT id - $1 FROM t WHERE id BETWEEN $1 AND $1 + 9 ORDER BY id";
    let rows = table.db.watcher.query(sql, &[&base]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

/// How often which was told.
#[derive(Debug, Default)]
struct Told {
    ok: u32,
    failed: u32,
    unknown: u32,
}

impl Told {
    fn count<T>(&mut self, told: &Result<T, Error>) {
        match told {
            Ok(_) => self.ok += 1,
            Err(e) if e.is_outcome_unknown() => self.unknown += 1,
            Err(_) => self.failed += 1,
        }
    }

    /// Something went well, or nothing was tested.
    fn assert_some(&self) {
        println!("{self:?}");
        assert!(self.ok > 0, "{self:?}");
    }
}

/// What was told Ok is stored, and what was told to be undone is not; whatever was cancelled.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancels_from_outside_never_mix_up_savepoints() {
    let table = Table::new().await;
    let mut session = table.session().await;
    let _assassin = Assassin::of(&table.db, session.process_id(), 3, 900).await;
    let (mut all, mut wrongs) = (Told::default(), Wrongs::default());
    let started = Instant::now();
    for base in (0..).step_by(10).take_while(|_| started.elapsed() < Duration::from_secs(12)) {
        const INSERT: &str = "INSERT INTO t VALUES ($1 + $2::int)";
        let options = TransactionOptions::new().retry(RetryPolicy::never());
        let told = session
            .transaction_with(options, async |tx| {
                tx.execute(INSERT, &[&base, &0]).await?;
                let one = tx.savepoint(async |sp| sp.execute(INSERT, &[&base, &1]).await).await;
                let two = tx.savepoint(async |sp| sp.execute(INSERT, &[&base, &2]).await).await;
                let three = tx
                    .savepoint(async |sp| {
                        sp.execute(INSERT, &[&base, &3]).await?;
                        sp.savepoint(async |sp| sp.execute(INSERT, &[&base, &4]).await).await
                    })
                    .await;
                Ok::<_, Error>([one.is_ok(), two.is_ok(), three.is_ok()])
            })
            .await;
        all.count(&told);
        let rows = ten_from(&table, base).await;
        let right = match &told {
            Ok([one, two, three]) => {
                let with = [(true, 0), (*one, 1), (*two, 2), (*three, 3), (*three, 4)];
                rows == with.iter().filter(|(stored, _)| *stored).map(|(_, n)| *n).collect::<Vec<_>>()
            }
            Err(e) => e.is_outcome_unknown() || rows.is_empty(),
        };
        wrongs.check(right, format_args!("{told:?}: {rows:?}"));
    }
    all.assert_some();
}

/// What a borrower does with a session.
#[derive(Clone, Copy, Debug)]
enum Use {
    Dirt,
    SlowLock,
    DirtInATransaction,
    RawCopyInATransaction,
    RawRows,
    RawBeside,
    Many,
    ForgottenStream,
    ForgottenCopyIn,
    ForgottenTransaction,
    /// The driver sends CopyFail and a Sync more.
    RawCopyRefused,
    Batch,
    RawCopyOut,
    DirtInASavepoint,
}

const USES: [Use; 14] = [
    Use::Dirt,
    Use::SlowLock,
    Use::DirtInATransaction,
    Use::RawCopyInATransaction,
    Use::RawRows,
    Use::RawBeside,
    Use::Many,
    Use::ForgottenStream,
    Use::ForgottenCopyIn,
    Use::ForgottenTransaction,
    Use::RawCopyRefused,
    Use::Batch,
    Use::RawCopyOut,
    Use::DirtInASavepoint,
];

/// Where a use is cut off: after so many polls, and dropped or leaked.
#[derive(Clone, Copy, Debug)]
struct Cut {
    polls: usize,
    leaks: bool,
}

impl Cut {
    async fn off<F: Future>(self, work: F) {
        if self.leaks {
            leaked(work, self.polls).await;
        } else {
            polls(work, self.polls).await;
        }
    }
}

impl Use {
    async fn cut_off(self, session: &mut Session, dirt: &str, cut: Cut) {
        match self {
            Self::Dirt => cut.off(session.batch_execute(dirt)).await,
            Self::SlowLock => {
                cut.off(session.query("SELECT pg_sleep(0.5), pg_advisory_lock(8)", &[])).await;
            }
            Self::DirtInATransaction => {
                let work = session.transaction(async |tx| {
                    tx.batch_execute(dirt).await?;
                    tx.execute("SELECT pg_sleep(0.01)", &[]).await
                });
                cut.off(work).await;
            }
            Self::RawCopyInATransaction => {
                let work = async {
                    let client = session.client().await.unwrap();
                    let tx = client.transaction().await.unwrap();
                    tx.batch_execute("SET work_mem = '9MB'; INSERT INTO t VALUES (1)").await.unwrap();
                    let sink: tokio_postgres::CopyInSink<Bytes> =
                        tx.copy_in("COPY t FROM STDIN").await.unwrap();
                    std::mem::forget(tx);
                    drop(sink);
                };
                cut.off(work).await;
            }
            Self::RawRows => {
                let work = async {
                    let client = session.client().await.unwrap();
                    client.batch_execute("BEGIN").await.unwrap();
                    let sql = "SELECT generate_series(1, 100000)";
                    std::mem::forget(client.query_raw::<_, i32, _>(sql, []).await.unwrap());
                };
                cut.off(work).await;
            }
            Self::RawBeside => {
                let work = async {
                    let client = session.client().await.unwrap();
                    let sleep = client.query("SELECT pg_sleep(0.1)", &[]);
                    let _ = tokio::join!(client.batch_execute(dirt), sleep);
                };
                cut.off(work).await;
            }
            Self::Many => {
                let rows = (0..20_000i32).map(|n| (n,));
                cut.off(session.execute_many("INSERT INTO t VALUES ($1)", rows)).await;
            }
            Self::ForgottenStream => {
                let work = async {
                    let sql = "SELECT generate_series(1, 200000)";
                    let mut rows = session.query_stream(sql, &[]).await.unwrap();
                    rows.next().await.unwrap().unwrap();
                    std::mem::forget(rows);
                };
                cut.off(work).await;
            }
            Self::ForgottenCopyIn => {
                let work = async { std::mem::forget(session.copy_in("COPY t FROM STDIN").await.unwrap()) };
                cut.off(work).await;
            }
            Self::ForgottenTransaction => {
                let work = async {
                    let tx = session.begin().await.unwrap();
                    tx.batch_execute(dirt).await.unwrap();
                    std::mem::forget(tx);
                };
                cut.off(work).await;
            }
            Self::RawCopyRefused => {
                let work = async {
                    let client = session.client().await.unwrap();
                    drop(client.copy_in::<_, Bytes>("COPY pg_class FROM STDIN").await);
                };
                cut.off(work).await;
            }
            Self::Batch => {
                let mut batch = session.batch();
                batch.push("SELECT pg_sleep(0.02)", ()).push("INSERT INTO t VALUES (2)", ());
                cut.off(batch.run()).await;
            }
            Self::RawCopyOut => {
                let work = async {
                    let client = session.client().await.unwrap();
                    let sql = "COPY (SELECT generate_series(1, 300000)) TO STDOUT";
                    std::mem::forget(client.copy_out(sql).await);
                };
                cut.off(work).await;
            }
            Self::DirtInASavepoint => {
                let work = async {
                    let mut tx = session.begin().await.unwrap();
                    tx.savepoint(async |sp| {
                        sp.batch_execute(dirt).await?;
                        sp.execute("SELECT pg_sleep(0.01)", &[]).await
                    })
                    .await
                };
                cut.off(work).await;
            }
        }
    }
}

/// Whatever is done with the session, dropped at any poll, the next borrower finds nothing of it, and soon.
#[tokio::test]
async fn the_next_borrower_finds_nothing_whatever_was_dropped_at_whatever_poll() {
    let table = Table::of("id int").await;
    // Roles are the whole server's.
    let role = format!("role_of_{}", table.db.database.name());
    table.db.run(&format!("CREATE ROLE {role}")).await;
    let dirt = format!(
        "SET ROLE {role}; SET work_mem = '8MB'; CREATE TEMP TABLE x (a int); SELECT pg_advisory_lock(7); \
         LISTEN q; PREPARE pp AS SELECT 1; DECLARE c CURSOR WITH HOLD FOR SELECT 1"
    );
    let mut random = fastrand::Rng::with_seed(11);
    let (mut rounds, mut slowest) = (0, (Duration::ZERO, String::new()));
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(20) {
        rounds += 1;
        let what = USES[random.usize(..USES.len())];
        let cut = Cut { polls: random.usize(1..9), leaks: random.u32(0..4) == 0 };
        let after = format!("{what:?}, {cut:?}");
        let mut session = table.session().await;
        within(what.cut_off(&mut session, &dirt, cut)).await;
        let returned = Instant::now();
        drop(session);
        until_returned(&table.sessions).await;
        slowest = slowest.max((returned.elapsed(), after.clone()));
        // Cleaning up may take 2 s, and connecting comes on top.
        assert!(returned.elapsed() < Duration::from_secs(10), "{:?} for {after}", returned.elapsed());
        let next = within(table.sessions.acquire()).await.unwrap_or_else(|e| panic!("after {after}: {e}"));
        within(assert_pristine(&next, &after)).await;
    }
    println!("{rounds} rounds, the slowest {slowest:?}");
}

/// Cancels that hit BEGIN: nothing of a transaction runs without it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancels_from_outside_never_make_a_statement_run_without_its_transaction() {
    let table = Table::new().await;
    let mut session = table.session().await;
    let _assassin = Assassin::of(&table.db, session.process_id(), 5, 200).await;
    let (mut all, mut wrongs) = (Told::default(), Wrongs::default());
    let started = Instant::now();
    for base in (0..).step_by(10).take_while(|_| started.elapsed() < Duration::from_secs(15)) {
        let options = TransactionOptions::serializable().retry(RetryPolicy::never());
        let told = session
            .transaction_with(options, async |tx| {
                let one = tx.execute("INSERT INTO t VALUES ($1)", &[&base]).await.is_ok();
                let two = tx.execute("INSERT INTO t VALUES ($1 + 1)", &[&base]).await.is_ok();
                Ok::<_, Error>((one, two))
            })
            .await;
        all.count(&told);
        let rows = ten_from(&table, base).await;
        let right = match &told {
            Ok(both) => *both == (true, true) && rows == [0, 1],
            Err(e) => e.is_outcome_unknown() || rows.is_empty(),
        };
        wrongs.check(right, format_args!("{told:?}: {rows:?}"));
    }
    all.assert_some();
}

/// All or nothing, and as told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batches_and_execute_many_are_stored_as_told_whatever_is_cancelled_or_terminated() {
    let db = Database::new().await;
    db.run("CREATE TABLE t (id int, n int)").await;
    let sessions = SessionManager::new(db.config().max_size(1).application_name("victim")).unwrap();
    let _assassin = Assassin::start(&db, 9, 4000, |random| {
        let how = if random.u32(0..12) == 0 { "pg_terminate_backend" } else { "pg_cancel_backend" };
        format!("SELECT {how}(pid) FROM pg_stat_activity WHERE application_name = 'victim'")
    })
    .await;
    let (mut all, mut wrongs) = (Told::default(), Wrongs::default());
    let started = Instant::now();
    for id in (1i32..).take_while(|_| started.elapsed() < Duration::from_secs(12)) {
        let (told, count): (Result<u64, Error>, u64) = match id % 3 {
            0 => {
                let mut batch = sessions.batch();
                for n in 0..5 {
                    batch.push("INSERT INTO t VALUES ($1, $2)", (id, n));
                }
                (batch.run().await.map(|results| results.len() as u64), 5)
            }
            1 => match sessions.acquire().await {
                Ok(mut session) => {
                    let rows = (0..9000i32).map(|n| (id, n));
                    (session.execute_many("INSERT INTO t VALUES ($1, $2)", rows).await, 9000)
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
        all.count(&told);
        until_returned(&sessions).await;
        let sql = "SELECT count(*), count(DISTINCT n) FROM t WHERE id = $1";
        let stored = db.watcher.query_one(sql, &[&id]).await.unwrap();
        let (stored, distinct): (i64, i64) = (stored.get(0), stored.get(1));
        let right = match &told {
            Ok(n) => *n == count && stored as u64 == count,
            Err(e) if e.is_outcome_unknown() => stored == 0 || stored as u64 == count,
            Err(_) => stored == 0,
        };
        let what = ["batch", "execute_many", "inside"][id as usize % 3];
        let how_many = format!("{stored} of {count}, {distinct} distinct");
        wrongs.check(right && distinct == stored, format_args!("{what}: {told:?}: {how_many}"));
    }
    all.assert_some();
}
