//! This crate against the bare driver on a machine that is never quiet: contenders take turns in short rounds, so that
//! whatever else goes on hits all of them alike, and are compared within each round.
//!
//! `taskset -c 1 cargo bench --all-features --bench ratios`; with `--test`, one short round to see that it works. Without
//! `taskset` (Linux) the system moves client and server between processors, and waking one that sleeps takes longer than
//! the query: the same operation takes 25 µs in one round and 100 µs in the next.

mod contenders;

use std::hint::black_box;
use std::time::Instant;

use contenders::{Deadpool, Ours, Raw, database, deadpool, runtime, sessions};

/// How many rounds there are, and how many operations each contender does in a round.
#[derive(Clone, Copy)]
struct Plan {
    rounds: usize,
    operations: u32,
}

const NAMES: [&str; 3] = ["tokio-postgres", "pg-session", "deadpool-postgres"];

fn main() {
    let test = std::env::args().any(|argument| argument == "--test");
    let plan = if test { Plan { rounds: 1, operations: 10 } } else { Plan { rounds: 31, operations: 1000 } };
    runtime().block_on(async {
        let database = database().await;
        let (deadpool, sessions) = (deadpool(database.url()), sessions(database.url()));
        let mut raw = Raw::new(database.url()).await;
        let mut ours = Ours::new(&sessions).await;
        let mut pooled = Deadpool::new(&deadpool).await;

        println!("{} rounds of {} operations each", plan.rounds, plan.operations);
        let acquire = compare(plan, async |contender: usize| match contender {
            0 => drop(black_box(deadpool.get().await.expect("a client"))),
            _ => drop(black_box(sessions.acquire().await.expect("a session"))),
        });
        print("acquire and release", ["deadpool-postgres", "pg-session"], &acquire.await);
        let query = compare(plan, async |contender| match contender {
            0 => _ = black_box(raw.select().await),
            1 => _ = black_box(ours.select().await),
            _ => _ = black_box(pooled.select().await),
        });
        print("query_one by primary key, prepared", NAMES, &query.await);
        let transaction = compare(plan, async |contender| match contender {
            0 => raw.transaction(1).await,
            1 => ours.transaction(1).await,
            _ => pooled.transaction(1).await,
        });
        print("transaction of one update", NAMES, &transaction.await);
    });
}

/// Each contender's microseconds per operation, round by round.
async fn compare<const N: usize>(plan: Plan, mut operation: impl AsyncFnMut(usize)) -> [Vec<f64>; N] {
    // Statements are prepared, caches warm.
    for contender in 0..N {
        for _ in 0..plan.operations / 4 {
            operation(contender).await;
        }
    }
    let mut times = [const { Vec::new() }; N];
    for round in 0..plan.rounds {
        for turn in 0..N {
            // Nobody always comes first.
            let contender = (round + turn) % N;
            let started = Instant::now();
            for _ in 0..plan.operations {
                operation(contender).await;
            }
            times[contender].push(started.elapsed().as_secs_f64() * 1e6 / f64::from(plan.operations));
        }
    }
    times
}

/// Each beside the first.
fn print<const N: usize>(title: &str, names: [&str; N], times: &[Vec<f64>; N]) {
    println!("\n{title:<36}{:>12}{:>12}{:>22}", "median", "to first", "quarters of rounds");
    for (name, own) in names.iter().zip(times) {
        let ratios: Vec<f64> = own.iter().zip(&times[0]).map(|(own, first)| own / first).collect();
        let spread = format!("{:.3} – {:.3}", part(&ratios, 0.25), part(&ratios, 0.75));
        println!("  {name:<34}{:>9.2} µs{:>12.3}{spread:>22}", part(own, 0.5), part(&ratios, 0.5));
    }
}

/// What this part of the values does not exceed.
fn part(values: &[f64], part: f64) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * part).round() as usize]
}
