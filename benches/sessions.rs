//! What each operation takes: this crate beside the bare driver and deadpool-postgres, in one group each.
//!
//! `taskset -c 1 cargo bench --all-features --bench sessions`; about `taskset`, see `benches/ratios.rs`. Criterion measures
//! one after the other, so to compare on a machine that is not quiet, use that one too.

mod contenders;

use std::hint::black_box;
use std::time::{Duration, Instant};

use contenders::{Deadpool, Ours, Raw, database, deadpool, runtime, sessions};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, criterion_group, criterion_main};
use tokio::runtime::Runtime;

fn measure<T>(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    runtime: &Runtime,
    mut operation: impl AsyncFnMut() -> T,
) {
    group.bench_function(name, |bencher| {
        bencher.iter_custom(|times| {
            // Entered once for all iterations, so that entering is not measured.
            runtime.block_on(async {
                let started = Instant::now();
                for _ in 0..times {
                    drop(black_box(operation().await));
                }
                started.elapsed()
            })
        });
    });
}

fn all(criterion: &mut Criterion) {
    let runtime = runtime();
    let database = runtime.block_on(database());
    let url = database.url();
    let _inside = runtime.enter();
    let (deadpool, sessions) = (deadpool(url), sessions(url));

    let mut group = criterion.benchmark_group("acquire and release");
    measure(&mut group, "pg-session", &runtime, async || sessions.acquire().await);
    measure(&mut group, "deadpool-postgres", &runtime, async || deadpool.get().await);
    group.finish();

    let mut raw = runtime.block_on(Raw::new(url));
    let mut pooled = runtime.block_on(Deadpool::new(&deadpool));
    let mut ours = runtime.block_on(Ours::new(&sessions));

    let mut group = criterion.benchmark_group("query_one by primary key, prepared");
    measure(&mut group, "tokio-postgres", &runtime, async || raw.select().await);
    measure(&mut group, "pg-session", &runtime, async || ours.select().await);
    measure(&mut group, "deadpool-postgres", &runtime, async || pooled.select().await);
    group.finish();

    let mut group = criterion.benchmark_group("query_one by primary key, new text");
    measure(&mut group, "tokio-postgres", &runtime, async || raw.select_fresh().await);
    measure(&mut group, "pg-session", &runtime, async || ours.select_fresh().await);
    measure(&mut group, "deadpool-postgres", &runtime, async || pooled.select_fresh().await);
    group.finish();

    for updates in [1, 5] {
        let mut group = criterion.benchmark_group(format!("transaction of {updates}"));
        measure(&mut group, "tokio-postgres", &runtime, async || raw.transaction(updates).await);
        measure(&mut group, "pg-session", &runtime, async || ours.transaction(updates).await);
        measure(&mut group, "deadpool-postgres", &runtime, async || pooled.transaction(updates).await);
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(50)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(4));
    targets = all
}
criterion_main!(benches);
