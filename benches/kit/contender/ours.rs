//! This crate, in its forms.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use pg_session::{
    Batch, Error, RetryPolicy, Session, SessionConfig, SessionManager, Transaction, TransactionOptions,
};

use super::{ACQUIRES, Contender, Running, Turn, Way};
use crate::kit::Failure;
use crate::kit::load::Sample;
use crate::kit::server::Target;
use crate::kit::work::{
    CONNECTIONS, COUNTER_READ, COUNTER_WRITE, INSERT, READ, TPC_B, Transfer, UPDATE, Work, entries,
    random_item,
};

pub struct PgSession;

impl Contender for PgSession {
    fn name(&self) -> &'static str {
        "pg-session"
    }

    fn ways(&self, work: Work) -> Vec<Way> {
        match work {
            Work::Acquire => vec![Way::ours("acquire")],
            Work::Read => vec![Way::ours("query_one")],
            Work::Update => {
                vec![Way::ours("closure"), Way::ours("batch, one flight"), Way::yardstick("no BEGIN")]
            }
            Work::TpcB => vec![Way::ours("closure"), Way::ours("batch, one flight")],
            Work::Insert => vec![Way::ours("loop"), Way::ours("execute_many"), Way::ours("COPY")],
            Work::Counter => vec![Way::ours("closure")],
        }
    }

    fn run<'a>(&'a self, turn: &'a Turn) -> Running<'a> {
        Box::pin(run(turn))
    }
}

pub fn sessions(target: &Target) -> Result<SessionManager, Failure> {
    let config: SessionConfig = target.url().parse()?;
    Ok(SessionManager::new(config.max_size(CONNECTIONS))?)
}

pub async fn read(session: &Session) -> Result<(), Failure> {
    session.query_one(READ, &[&random_item()]).await?.try_get::<_, i64>(0)?;
    Ok(())
}

/// In a closure.
pub async fn update(tx: &mut Transaction<'_>) -> Result<(), Error> {
    tx.execute(UPDATE, &[&1i64, &random_item()]).await?;
    Ok(())
}

/// In one flight.
pub async fn update_batch(mut batch: Batch<'_>) -> Result<(), Failure> {
    let results = batch.push(UPDATE, (1i64, random_item())).run().await?;
    if results[0].rows_affected() == 1 { Ok(()) } else { Err("no such item".into()) }
}

async fn run(turn: &Turn) -> Result<Sample, Failure> {
    let sessions = sessions(&turn.target)?;
    let (load, scale, rows) = (&turn.load, turn.scale, turn.rows);
    let sample = match (turn.work, turn.way) {
        (Work::Acquire, "acquire") => {
            let sample = load.run(sessions.clone(), |sessions| async move {
                for _ in 0..ACQUIRES {
                    drop(sessions.acquire().await?);
                }
                Ok(())
            });
            sample.await?.times(ACQUIRES)
        }
        (Work::Read, "query_one") => {
            let sample =
                load.run(sessions.clone(), |sessions| async move { read(&sessions.acquire().await?).await });
            sample.await?
        }
        (Work::Update, "closure") => {
            let sample =
                load.run(sessions.clone(), |sessions| async move { Ok(sessions.transaction(update).await?) });
            sample.await?
        }
        (Work::Update, "batch, one flight") => {
            let sample =
                load.run(sessions.clone(), |sessions| async move { update_batch(sessions.batch()).await });
            sample.await?
        }
        (Work::Update, "no BEGIN") => {
            let sample = load.run(sessions.clone(), |sessions| async move {
                let session = sessions.acquire().await?;
                session.execute(UPDATE, &[&1i64, &random_item()]).await?;
                Ok(())
            });
            sample.await?
        }
        (Work::TpcB, "closure") => {
            let sample = load.run(sessions.clone(), move |sessions| async move {
                let Transfer { aid, tid, bid, delta } = Transfer::random(scale);
                let work = async |tx: &mut Transaction<'_>| {
                    tx.execute(TPC_B[0], &[&delta, &aid]).await?;
                    tx.query_one(TPC_B[1], &[&aid]).await?.get::<_, i32>(0);
                    tx.execute(TPC_B[2], &[&delta, &tid]).await?;
                    tx.execute(TPC_B[3], &[&delta, &bid]).await?;
                    tx.execute(TPC_B[4], &[&tid, &bid, &aid, &delta]).await?;
                    Ok::<_, Error>(())
                };
                Ok(sessions.transaction(work).await?)
            });
            sample.await?
        }
        (Work::TpcB, "batch, one flight") => {
            let sample = load.run(sessions.clone(), move |sessions| async move {
                let Transfer { aid, tid, bid, delta } = Transfer::random(scale);
                let results = sessions
                    .batch()
                    .push(TPC_B[0], (delta, aid))
                    .push(TPC_B[1], (aid,))
                    .push(TPC_B[2], (delta, tid))
                    .push(TPC_B[3], (delta, bid))
                    .push(TPC_B[4], (tid, bid, aid, delta))
                    .run()
                    .await?;
                results[1].rows()[0].try_get::<_, i32>(0)?;
                Ok(())
            });
            sample.await?
        }
        (Work::Insert, "loop") => {
            let sample = load.run(sessions.clone(), move |sessions| async move {
                let work = async |tx: &mut Transaction<'_>| {
                    for entry in entries(rows) {
                        tx.execute(INSERT, &[&entry.id, &entry.name, &entry.cents]).await?;
                    }
                    Ok::<_, Error>(())
                };
                Ok(sessions.transaction(work).await?)
            });
            sample.await?
        }
        (Work::Insert, "execute_many") => {
            let sample = load.run(sessions.clone(), move |sessions| async move {
                let rows = entries(rows).map(|entry| (entry.id, entry.name, entry.cents));
                sessions.acquire().await?.execute_many(INSERT, rows).await?;
                Ok(())
            });
            sample.await?
        }
        (Work::Insert, "COPY") => {
            let sample = load.run(sessions.clone(), move |sessions| async move {
                let session = sessions.acquire().await?;
                let rows = entries(rows).map(|entry| (entry.id, entry.name, entry.cents));
                session.copy_rows_in("entries", &["id", "name", "cents"]).send(rows).await?;
                Ok(())
            });
            sample.await?
        }
        (Work::Counter, "closure") => {
            let attempts = Arc::new(AtomicU64::new(0));
            // Everybody tries until it is done.
            let retry = RetryPolicy::default().max_attempts(u32::MAX).max_elapsed(Duration::from_secs(3600));
            let options = TransactionOptions::serializable().retry(retry);
            let state = (sessions.clone(), options, attempts.clone());
            let sample = load.run(state, |(sessions, options, attempts)| async move {
                let work = async |tx: &mut Transaction<'_>| {
                    attempts.fetch_add(1, Relaxed);
                    let n: i64 = tx.query_one(COUNTER_READ, &[]).await?.get(0);
                    tx.execute(COUNTER_WRITE, &[&(n + 1)]).await?;
                    Ok::<_, Error>(())
                };
                Ok(sessions.transaction_with(options, work).await?)
            });
            sample.await?.tried(attempts.load(Relaxed))
        }
        _ => return Err(turn.unknown()),
    };
    sessions.close().await;
    Ok(sample)
}
