//! A storm: units of work under cancelled statements, terminated backends, cut connections, short statement time-outs
//! and callers that leave, all at once. At the end every unit's report is compared with what is stored, over a
//! connection of the judge's own: a unit that was told as done is there, one that was told as rolled back is not, and
//! none is there by halves or twice.
//!
//! A short one in the suite; `scripts/storm` goes on to a million units.
#![cfg(feature = "testing")]

mod common;

use std::collections::{BTreeMap, HashMap};
use std::env;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use common::middle::{At, Direction, Middle, Then};
use common::{Database, connect, polls, until_returned};
use pg_session::{Error, SessionConfig, SessionManager, TransactionOptions};

/// Units at once.
const TASKS: usize = 24;

/// Units between two looks at what is stored.
const ROUND: i64 = 20_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Unit {
    Closure,
    Savepoint,
    /// Its savepoint fails and is forgiven.
    Undone,
    /// Serializable, and for a tenant.
    Strict,
    /// May take longer than its statement time-out.
    Sleepy,
    Batch,
    BatchInside,
    Many,
    ByHand,
    RolledBack,
    Execute,
}

const UNITS: [Unit; 11] = [
    Unit::Closure,
    Unit::Savepoint,
    Unit::Undone,
    Unit::Strict,
    Unit::Sleepy,
    Unit::Batch,
    Unit::BatchInside,
    Unit::Many,
    Unit::ByHand,
    Unit::RolledBack,
    Unit::Execute,
];

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Told {
    Done,
    RolledBack,
    Unknown,
    /// It did not wait.
    Left,
}

const INSERT: &str = "INSERT INTO units (id, part) VALUES ($1, $2)";
const COUNT: &str = "UPDATE counters SET n = n + 1 WHERE id = $1";

impl Unit {
    /// How many parts it has, numbered from 1.
    fn parts(self) -> i32 {
        match self {
            Self::Savepoint | Self::Many => 3,
            Self::RolledBack => 0,
            _ => 2,
        }
    }

    async fn perform(self, sessions: &SessionManager, id: i64, nap: f64) -> Result<(), Error> {
        let counter = id % 40;
        match self {
            Self::Closure => {
                sessions
                    .transaction(async |tx| {
                        tx.execute(INSERT, &[&id, &1i32]).await?;
                        tx.execute(COUNT, &[&counter]).await?;
                        tx.execute(INSERT, &[&id, &2i32]).await.map(drop)
                    })
                    .await
            }
            Self::Savepoint => {
                sessions
                    .transaction(async |tx| {
                        tx.savepoint(async |sp| sp.execute(INSERT, &[&id, &1i32]).await.map(drop)).await?;
                        tx.execute(INSERT, &[&id, &2i32]).await?;
                        tx.savepoint(async |sp| sp.execute(INSERT, &[&id, &3i32]).await.map(drop)).await
                    })
                    .await
            }
            Self::Undone => {
                sessions
                    .transaction(async |tx| {
                        tx.execute(INSERT, &[&id, &1i32]).await?;
                        let undone: Result<(), Error> = tx
                            .savepoint(async |sp| {
                                sp.execute(INSERT, &[&id, &99i32]).await?;
                                sp.execute("SELECT 1/$1::int", &[&0i32]).await.map(drop)
                            })
                            .await;
                        assert!(undone.is_err());
                        tx.execute(INSERT, &[&id, &2i32]).await.map(drop)
                    })
                    .await
            }
            Self::Strict => {
                let options = TransactionOptions::serializable().local_setting("app.tenant", id.to_string());
                sessions
                    .transaction_with(options, async |tx| {
                        tx.execute(INSERT, &[&id, &1i32]).await?;
                        tx.query_one("SELECT n FROM counters WHERE id = $1", &[&counter]).await?;
                        tx.execute(COUNT, &[&counter]).await?;
                        tx.execute(INSERT, &[&id, &2i32]).await.map(drop)
                    })
                    .await
            }
            Self::Sleepy => {
                let options = TransactionOptions::new().local_setting("statement_timeout", "8");
                sessions
                    .transaction_with(options, async |tx| {
                        tx.execute(INSERT, &[&id, &1i32]).await?;
                        tx.execute("SELECT pg_sleep($1)", &[&nap]).await?;
                        tx.execute(INSERT, &[&id, &2i32]).await.map(drop)
                    })
                    .await
            }
            Self::Batch => {
                sessions.batch().push(INSERT, (id, 1i32)).push(INSERT, (id, 2i32)).run().await.map(drop)
            }
            Self::BatchInside => {
                sessions
                    .transaction(async |tx| {
                        tx.batch().push(INSERT, (id, 1i32)).push(INSERT, (id, 2i32)).run().await.map(drop)
                    })
                    .await
            }
            Self::Many => {
                let rows = (1..=3i32).map(|part| (id, part));
                sessions.acquire().await?.execute_many(INSERT, rows).await.map(drop)
            }
            Self::ByHand | Self::RolledBack => {
                let mut session = sessions.acquire().await?;
                let tx = session.begin().await?;
                tx.execute(INSERT, &[&id, &1i32]).await?;
                tx.execute(INSERT, &[&id, &2i32]).await?;
                if self == Self::ByHand {
                    return tx.commit().await;
                }
                tx.rollback().await;
                Ok(())
            }
            Self::Execute => {
                let both = "INSERT INTO units (id, part) VALUES ($1, 1), ($1, 2)";
                sessions.acquire().await?.execute(both, &[&id]).await.map(drop)
            }
        }
    }
}

/// One unit, by a caller who may leave.
async fn one(unit: Unit, sessions: &SessionManager, id: i64, rng: &mut fastrand::Rng) -> Told {
    let nap = rng.f64() * 0.011;
    let work = unit.perform(sessions, id, nap);
    let told = match rng.u32(..10) {
        0 => polls(work, rng.usize(..25)).await,
        1 => tokio::time::timeout(Duration::from_micros(rng.u64(..8_000)), work).await.ok(),
        // Nobody waits for ever; that is the time-out of a service.
        _ => tokio::time::timeout(Duration::from_secs(20), work).await.ok(),
    };
    match told {
        None => Told::Left,
        Some(Ok(())) => Told::Done,
        Some(Err(e)) if e.is_outcome_unknown() || matches!(e, Error::TransactionEnded) => Told::Unknown,
        Some(Err(_)) => Told::RolledBack,
    }
}

async fn sleep(rng: &mut fastrand::Rng, most: u64) {
    tokio::time::sleep(Duration::from_micros(rng.u64(..most))).await;
}

/// Cancels and terminates whatever is at work, until it is to stop.
async fn shoot(
    judge: tokio_postgres::Client,
    function: &str,
    pause: u64,
    stop: &AtomicBool,
    seed: u64,
) -> i64 {
    let mut rng = fastrand::Rng::with_seed(seed);
    let sql = format!(
        "SELECT count({function}(pid)) FROM (SELECT pid FROM pg_stat_activity WHERE state <> 'idle' AND \
         application_name = 'storm' AND datname = current_database() ORDER BY random() LIMIT 1) s"
    );
    let mut shots = 0;
    while !stop.load(SeqCst) {
        shots += judge.query_one(&sql, &[]).await.expect("shot").get::<_, i64>(0);
        sleep(&mut rng, pause).await;
    }
    shots
}

/// Cuts connections, and refuses requests, at random places.
async fn cut(mut middle: Middle, stop: Arc<AtomicBool>, seed: u64) -> i64 {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut cuts = 0;
    while !stop.load(SeqCst) {
        let direction = [Direction::ToServer, Direction::ToClient][rng.usize(..2)];
        let (at, then) = match rng.u32(..3) {
            0 => (At::Before(rng.usize(..60)), Then::Refuse),
            1 => (At::Byte(rng.usize(..6_000)), Then::Fin),
            _ => (At::Byte(rng.usize(..6_000)), Then::Rst),
        };
        let direction = if then == Then::Refuse { Direction::ToServer } else { direction };
        middle.arm(direction, at);
        if let Ok(reached) = tokio::time::timeout(Duration::from_millis(200), middle.stop()).await {
            reached.then(then);
            cuts += 1;
        }
        sleep(&mut rng, 6_000).await;
    }
    middle.disarm();
    cuts
}

struct Storm {
    db: Database,
    managers: Vec<SessionManager>,
    /// What was told, in all.
    counts: BTreeMap<(Unit, Told), usize>,
    wrongs: Vec<String>,
}

impl Storm {
    /// Compares what was told with what is stored, and empties the table.
    async fn judge(&mut self, told: HashMap<i64, (Unit, Told)>) {
        let astray = "bool_or(strict AND (level <> 'serializable' OR tenant IS DISTINCT FROM id::text))";
        self.db.run("UPDATE units SET strict = true WHERE id IN (SELECT id FROM strict)").await;
        let sql = format!("SELECT id, array_agg(part ORDER BY part), {astray} FROM units GROUP BY id");
        let rows = self.db.watcher.query(&sql, &[]).await.expect("rows");
        let mut stored: HashMap<i64, (Vec<i32>, bool)> =
            rows.iter().map(|row| (row.get(0), (row.get(1), row.get(2)))).collect();
        for (id, (unit, told)) in told {
            let (parts, astray) = stored.remove(&id).unwrap_or_default();
            let all = parts == (1..=unit.parts()).collect::<Vec<_>>();
            let right = match told {
                Told::Done => all,
                Told::RolledBack => parts.is_empty(),
                Told::Unknown | Told::Left => all || parts.is_empty(),
            };
            if !right || astray {
                self.wrongs.push(format!("{unit:?} {id}: told {told:?}, stored {parts:?}, astray: {astray}"));
            }
            *self.counts.entry((unit, told)).or_default() += 1;
        }
        self.wrongs.extend(stored.into_keys().map(|id| format!("{id} is stored, and nobody did it")));
        self.db.run("TRUNCATE units, strict").await;
    }

    fn report(&self) {
        for unit in UNITS {
            let of = |told| self.counts.get(&(unit, told)).copied().unwrap_or_default();
            println!(
                "{unit:?}: {} done, {} rolled back, {} unknown, {} left",
                of(Told::Done),
                of(Told::RolledBack),
                of(Told::Unknown),
                of(Told::Left)
            );
        }
        println!("{} units, {} wrong", self.counts.values().sum::<usize>(), self.wrongs.len());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_unit_of_a_storm_is_there_or_not_as_its_caller_was_told() {
    let number = |name: &str| env::var(name).ok().map(|value| value.parse::<u64>().expect("a number"));
    let units = number("STORM_UNITS").unwrap_or(25_000) as i64;
    let seed = number("STORM_SEED").unwrap_or(1);
    println!("{units} units, seed {seed}");
    let started = Instant::now();
    let db = Database::new().await;
    db.run(
        "CREATE UNLOGGED TABLE units (id bigint, part int, strict bool NOT NULL DEFAULT false,
             level text DEFAULT current_setting('transaction_isolation'),
             tenant text DEFAULT current_setting('app.tenant', true));
         CREATE INDEX ON units (id);
         CREATE UNLOGGED TABLE strict (id bigint);
         CREATE UNLOGGED TABLE counters (id bigint PRIMARY KEY, n bigint);
         INSERT INTO counters SELECT n, 0 FROM generate_series(0, 39) n",
    )
    .await;
    let middle = Middle::start().await;
    let manager = |url: &str, size: usize| {
        let config: SessionConfig = url.parse().expect("a URL");
        let config = config.max_size(size).application_name("storm").acquire_timeout(Duration::from_secs(15));
        SessionManager::new(config).expect("a configuration")
    };
    let hasty = format!("{}?options=-c%20statement_timeout%3D8", db.database.url());
    let managers =
        vec![manager(db.database.url(), 6), manager(&middle.url(db.database.name()), 4), manager(&hasty, 4)];
    let stop = Arc::new(AtomicBool::new(false));
    let mut saboteurs = Vec::new();
    for (function, pause, salt) in [("pg_cancel_backend", 6_000, 1), ("pg_terminate_backend", 60_000, 2)] {
        let (judge, stop) = (connect(db.database.url()).await, Arc::clone(&stop));
        saboteurs
            .push(tokio::spawn(async move { shoot(judge, function, pause, &stop, seed ^ salt << 40).await }));
    }
    saboteurs.push(tokio::spawn(cut(middle, Arc::clone(&stop), seed ^ 3 << 40)));
    let mut storm = Storm { db, managers, counts: BTreeMap::new(), wrongs: Vec::new() };
    let (next, late) = (Arc::new(AtomicI64::new(0)), Arc::new(AtomicUsize::new(0)));
    let mut begun = 0;
    while begun < units && storm.wrongs.len() < 100 {
        begun = (begun + ROUND).min(units);
        let tasks: Vec<_> = (0..TASKS)
            .map(|task| {
                let sessions = storm.managers[task % storm.managers.len()].clone();
                let (next, late) = (Arc::clone(&next), Arc::clone(&late));
                let mut rng = fastrand::Rng::with_seed(seed ^ (begun as u64) << 8 ^ task as u64);
                tokio::spawn(async move {
                    let mut told = Vec::new();
                    loop {
                        let id = next.fetch_add(1, SeqCst);
                        if id >= begun {
                            return told;
                        }
                        let unit = UNITS[rng.usize(..UNITS.len())];
                        let started = Instant::now();
                        told.push((id, (unit, one(unit, &sessions, id, &mut rng).await)));
                        late.fetch_add(usize::from(started.elapsed() > Duration::from_secs(15)), SeqCst);
                    }
                })
            })
            .collect();
        let mut told = HashMap::new();
        for task in tasks {
            told.extend(task.await.expect("no unit panics"));
        }
        next.store(begun, SeqCst);
        for sessions in &storm.managers {
            until_returned(sessions).await;
        }
        let busy = "SELECT FROM pg_stat_activity WHERE application_name = 'storm' AND state <> 'idle' \
                    AND datname = current_database()";
        storm.db.until(&format!("NOT EXISTS ({busy})")).await;
        let strict: Vec<i64> =
            told.iter().filter(|(_, (unit, _))| *unit == Unit::Strict).map(|(id, _)| *id).collect();
        let sql = "INSERT INTO strict SELECT unnest($1::bigint[])";
        storm.db.watcher.execute(sql, &[&strict]).await.expect("stored");
        storm.judge(told).await;
    }
    stop.store(true, SeqCst);
    let mut shots = Vec::new();
    for saboteur in saboteurs {
        shots.push(saboteur.await.expect("no saboteur panics"));
    }
    storm.report();
    let [cancels, kills, cuts] = shots[..] else { unreachable!() };
    println!("{cancels} cancelled, {kills} terminated, {cuts} cut or refused; {:?}", started.elapsed());
    assert!(storm.wrongs.is_empty(), "seed {seed}, wrong:\n{}", storm.wrongs.join("\n"));
    assert_eq!(late.load(SeqCst), 0, "units that took longer than 15 s");
    assert!(cancels > 20 && kills > 5 && cuts > 5, "hardly a storm");
    let done = |told| storm.counts.iter().filter(|((_, t), _)| *t == told).map(|(_, n)| n).sum::<usize>();
    assert!(done(Told::Done) > units as usize / 3, "hardly anything was done");
}
