//! bb8-postgres as its documentation writes it; it has no statement cache.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use bb8::Pool;
use bb8_postgres::PostgresConnectionManager;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, IsolationLevel, NoTls};

use crate::kit::Failure;
use crate::kit::contender::{ACQUIRES, Contender, Running, Turn, Way};
use crate::kit::load::Sample;
use crate::kit::work::{
    CONNECTIONS, COUNTER_READ, COUNTER_WRITE, INSERT, READ, TPC_B, Transfer, UPDATE, Work, entries,
    random_item,
};

pub struct Bb8;

impl Contender for Bb8 {
    fn name(&self) -> &'static str {
        "bb8-postgres"
    }

    fn ways(&self, work: Work) -> Vec<Way> {
        match work {
            Work::Acquire => vec![Way::peer("get")],
            Work::Read | Work::Update | Work::TpcB => vec![Way::peer("plain")],
            Work::Insert => vec![Way::peer("loop, prepared")],
            Work::Counter => vec![Way::peer("plain, immediate retry")],
        }
    }

    fn run<'a>(&'a self, turn: &'a Turn) -> Running<'a> {
        Box::pin(run(turn))
    }
}

async fn run(turn: &Turn) -> Result<Sample, Failure> {
    let manager = PostgresConnectionManager::new(turn.target.url().parse()?, NoTls);
    let pool = Pool::builder().max_size(CONNECTIONS as u32).test_on_check_out(false).build(manager).await?;
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
        (Work::Insert, "loop, prepared") => {
            let sample = load.run(pool, move |pool| async move {
                let mut client = pool.get().await?;
                let tx = client.transaction().await?;
                let insert = tx.prepare(INSERT).await?;
                for entry in entries(rows) {
                    tx.execute(&insert, &[&entry.id, &entry.name, &entry.cents]).await?;
                }
                tx.commit().await?;
                Ok(())
            });
            sample.await
        }
        (Work::Counter, "plain, immediate retry") => {
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

async fn increment(client: &mut Client) -> Result<(), tokio_postgres::Error> {
    let tx = client.build_transaction().isolation_level(IsolationLevel::Serializable).start().await?;
    let n: i64 = tx.query_one(COUNTER_READ, &[]).await?.try_get(0)?;
    tx.execute(COUNTER_WRITE, &[&(n + 1)]).await?;
    tx.commit().await
}
