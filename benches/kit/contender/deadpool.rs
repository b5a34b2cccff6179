//! deadpool-postgres as its documentation writes it, and with its statement cache.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use deadpool_postgres::{Manager, ManagerConfig, Object, Pool, RecyclingMethod};
use tokio_postgres::error::SqlState;
use tokio_postgres::{IsolationLevel, NoTls};

use super::{ACQUIRES, Contender, Running, Turn, Way};
use crate::kit::Failure;
use crate::kit::load::Sample;
use crate::kit::server::Target;
use crate::kit::work::{
    CONNECTIONS, COUNTER_READ, COUNTER_WRITE, INSERT, READ, TPC_B, Transfer, UPDATE, Work, entries,
    random_item,
};

pub struct Deadpool;

impl Contender for Deadpool {
    fn name(&self) -> &'static str {
        "deadpool-postgres"
    }

    fn ways(&self, work: Work) -> Vec<Way> {
        match work {
            Work::Acquire => vec![Way::peer("get")],
            Work::Read | Work::Update | Work::TpcB => vec![Way::peer("plain"), Way::peer("prepare_cached")],
            Work::Insert => vec![Way::peer("loop, prepare_cached")],
            Work::Counter => vec![Way::peer("prepare_cached, immediate retry")],
        }
    }

    fn run<'a>(&'a self, turn: &'a Turn) -> Running<'a> {
        Box::pin(run(turn))
    }
}

pub fn pool(target: &Target) -> Result<Pool, Failure> {
    let manager = ManagerConfig { recycling_method: RecyclingMethod::Fast };
    let manager = Manager::from_config(target.url().parse()?, NoTls, manager);
    Ok(Pool::builder(manager).max_size(CONNECTIONS).build()?)
}

pub async fn read_cached(client: &Object) -> Result<(), Failure> {
    let read = client.prepare_cached(READ).await?;
    client.query_one(&read, &[&random_item()]).await?.try_get::<_, i64>(0)?;
    Ok(())
}

pub async fn update_cached(client: &mut Object) -> Result<(), Failure> {
    let tx = client.transaction().await?;
    let update = tx.prepare_cached(UPDATE).await?;
    tx.execute(&update, &[&1i64, &random_item()]).await?;
    Ok(tx.commit().await?)
}

async fn run(turn: &Turn) -> Result<Sample, Failure> {
    let pool = pool(&turn.target)?;
    let (load, scale, rows) = (&turn.load, turn.scale, turn.rows);
    match (turn.work, turn.way) {
        (Work::Acquire, "get") => {
            let sample = load.run(pool, |pool| async move {
                for _ in 0..ACQUIRES {
                    drop(pool.get().await?);
                }
                Ok(())
            });
            Ok(sample.await?.times(ACQUIRES))
        }
        (Work::Read, "plain") => {
            let sample = load.run(pool, |pool| async move {
                let client = pool.get().await?;
                client.query_one(READ, &[&random_item()]).await?.try_get::<_, i64>(0)?;
                Ok(())
            });
            sample.await
        }
        (Work::Read, "prepare_cached") => {
            load.run(pool, |pool| async move { read_cached(&pool.get().await?).await }).await
        }
        (Work::Update, "plain") => {
            let sample = load.run(pool, |pool| async move {
                let mut client = pool.get().await?;
                let tx = client.transaction().await?;
                tx.execute(UPDATE, &[&1i64, &random_item()]).await?;
                tx.commit().await?;
                Ok(())
            });
            sample.await
        }
        (Work::Update, "prepare_cached") => {
            load.run(pool, |pool| async move { update_cached(&mut pool.get().await?).await }).await
        }
        (Work::TpcB, "plain") => {
            let sample = load.run(pool, move |pool| async move {
                let Transfer { aid, tid, bid, delta } = Transfer::random(scale);
                let mut client = pool.get().await?;
                let tx = client.transaction().await?;
                tx.execute(TPC_B[0], &[&delta, &aid]).await?;
                tx.query_one(TPC_B[1], &[&aid]).await?.try_get::<_, i32>(0)?;
                tx.execute(TPC_B[2], &[&delta, &tid]).await?;
                tx.execute(TPC_B[3], &[&delta, &bid]).await?;
                tx.execute(TPC_B[4], &[&tid, &bid, &aid, &delta]).await?;
                tx.commit().await?;
                Ok(())
            });
            sample.await
        }
        (Work::TpcB, "prepare_cached") => {
            let sample = load.run(pool, move |pool| async move {
                let Transfer { aid, tid, bid, delta } = Transfer::random(scale);
                let mut client = pool.get().await?;
                let tx = client.transaction().await?;
                tx.execute(&tx.prepare_cached(TPC_B[0]).await?, &[&delta, &aid]).await?;
                let row = tx.query_one(&tx.prepare_cached(TPC_B[1]).await?, &[&aid]).await?;
                row.try_get::<_, i32>(0)?;
                tx.execute(&tx.prepare_cached(TPC_B[2]).await?, &[&delta, &tid]).await?;
                tx.execute(&tx.prepare_cached(TPC_B[3]).await?, &[&delta, &bid]).await?;
                tx.execute(&tx.prepare_cached(TPC_B[4]).await?, &[&tid, &bid, &aid, &delta]).await?;
                tx.commit().await?;
                Ok(())
            });
            sample.await
        }
        (Work::Insert, "loop, prepare_cached") => {
            let sample = load.run(pool, move |pool| async move {
                let mut client = pool.get().await?;
                let tx = client.transaction().await?;
                let insert = tx.prepare_cached(INSERT).await?;
                for entry in entries(rows) {
                    tx.execute(&insert, &[&entry.id, &entry.name, &entry.cents]).await?;
                }
                tx.commit().await?;
                Ok(())
            });
            sample.await
        }
        (Work::Counter, "prepare_cached, immediate retry") => {
            let attempts = Arc::new(AtomicU64::new(0));
            let sample = load.run((pool, attempts.clone()), |(pool, attempts)| async move {
                let mut client = pool.get().await?;
                loop {
                    attempts.fetch_add(1, Relaxed);
                    match increment(&mut client).await {
                        Err(e) if e.code() == Some(&SqlState::T_R_SERIALIZATION_FAILURE) => {}
                        result => return Ok(result?),
                    }
                }
            });
            Ok(sample.await?.tried(attempts.load(Relaxed)))
        }
        _ => Err(turn.unknown()),
    }
}

async fn increment(client: &mut Object) -> Result<(), tokio_postgres::Error> {
    let tx = client.build_transaction().isolation_level(IsolationLevel::Serializable).start().await?;
    let read = tx.prepare_cached(COUNTER_READ).await?;
    let n: i64 = tx.query_one(&read, &[]).await?.try_get(0)?;
    let write = tx.prepare_cached(COUNTER_WRITE).await?;
    tx.execute(&write, &[&(n + 1)]).await?;
    tx.commit().await
}
