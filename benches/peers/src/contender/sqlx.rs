//! sqlx: its pool without a test at each acquire, statements kept prepared as by default.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;

use crate::kit::Failure;
use crate::kit::contender::{ACQUIRES, Contender, Running, Turn, Way};
use crate::kit::load::Sample;
use crate::kit::work::{
    CONNECTIONS, COUNTER_READ, COUNTER_WRITE, INSERT, READ, TPC_B, Transfer, UPDATE, Work, entries,
    random_item,
};

/// As its FAQ ("How can I bind an array to a VALUES() clause?") says.
const UNNEST: &str =
    "INSERT INTO entries (id, name, cents) SELECT * FROM UNNEST($1::bigint[], $2::text[], $3::bigint[])";

pub struct Sqlx;

impl Contender for Sqlx {
    fn name(&self) -> &'static str {
        "sqlx"
    }

    fn ways(&self, work: Work) -> Vec<Way> {
        match work {
            Work::Acquire => vec![Way::peer("acquire")],
            Work::Read => vec![Way::peer("query")],
            Work::Update | Work::TpcB => vec![Way::peer("begin, commit")],
            Work::Insert => vec![Way::peer("loop"), Way::peer("UNNEST"), Way::peer("COPY, text")],
            Work::Counter => vec![Way::peer("immediate retry")],
        }
    }

    fn run<'a>(&'a self, turn: &'a Turn) -> Running<'a> {
        Box::pin(run(turn))
    }
}

async fn run(turn: &Turn) -> Result<Sample, Failure> {
    let options = PgPoolOptions::new().max_connections(CONNECTIONS as u32).test_before_acquire(false);
    let pool = options.connect(&turn.target.url()).await?;
    let (load, scale, rows) = (&turn.load, turn.scale, turn.rows);
    let sample = match (turn.work, turn.way) {
        (Work::Acquire, "acquire") => {
            let sample = load.run(pool.clone(), |pool| async move {
                for _ in 0..ACQUIRES {
                    drop(pool.acquire().await?);
                }
                Ok(())
            });
            sample.await?.times(ACQUIRES)
        }
        (Work::Read, "query") => {
            let sample = load.run(pool.clone(), |pool| async move {
                let _: i64 = sqlx::query_scalar(READ).bind(random_item()).fetch_one(&pool).await?;
                Ok(())
            });
            sample.await?
        }
        (Work::Update, "begin, commit") => {
            let sample = load.run(pool.clone(), |pool| async move {
                let mut tx = pool.begin().await?;
                sqlx::query(UPDATE).bind(1i64).bind(random_item()).execute(&mut *tx).await?;
                tx.commit().await?;
                Ok(())
            });
            sample.await?
        }
        (Work::TpcB, "begin, commit") => {
            let sample = load.run(pool.clone(), move |pool| async move {
                let Transfer { aid, tid, bid, delta } = Transfer::random(scale);
                let mut tx = pool.begin().await?;
                sqlx::query(TPC_B[0]).bind(delta).bind(aid).execute(&mut *tx).await?;
                let _: i32 = sqlx::query_scalar(TPC_B[1]).bind(aid).fetch_one(&mut *tx).await?;
                sqlx::query(TPC_B[2]).bind(delta).bind(tid).execute(&mut *tx).await?;
                sqlx::query(TPC_B[3]).bind(delta).bind(bid).execute(&mut *tx).await?;
                let insert = sqlx::query(TPC_B[4]).bind(tid).bind(bid).bind(aid).bind(delta);
                insert.execute(&mut *tx).await?;
                tx.commit().await?;
                Ok(())
            });
            sample.await?
        }
        (Work::Insert, "loop") => {
            let sample = load.run(pool.clone(), move |pool| async move {
                let mut tx = pool.begin().await?;
                for entry in entries(rows) {
                    let insert = sqlx::query(INSERT).bind(entry.id).bind(entry.name).bind(entry.cents);
                    insert.execute(&mut *tx).await?;
                }
                tx.commit().await?;
                Ok(())
            });
            sample.await?
        }
        (Work::Insert, "UNNEST") => {
            let sample = load.run(pool.clone(), move |pool| async move {
                let (mut ids, mut names, mut cents) = (Vec::new(), Vec::new(), Vec::new());
                for entry in entries(rows) {
                    ids.push(entry.id);
                    names.push(entry.name);
                    cents.push(entry.cents);
                }
                sqlx::query(UNNEST).bind(ids).bind(names).bind(cents).execute(&pool).await?;
                Ok(())
            });
            sample.await?
        }
        (Work::Insert, "COPY, text") => {
            let sample = load.run(pool.clone(), move |pool| async move {
                let mut text = String::new();
                for entry in entries(rows) {
                    // Nothing in the names needs an escape.
                    writeln!(text, "{}\t{}\t{}", entry.id, entry.name, entry.cents)?;
                }
                let mut connection = pool.acquire().await?;
                let mut copy = connection.copy_in_raw("COPY entries (id, name, cents) FROM STDIN").await?;
                copy.send(text.as_bytes()).await?;
                copy.finish().await?;
                Ok(())
            });
            sample.await?
        }
        (Work::Counter, "immediate retry") => {
            let attempts = Arc::new(AtomicU64::new(0));
            let sample = load.run((pool.clone(), attempts.clone()), |(pool, attempts)| async move {
                loop {
                    attempts.fetch_add(1, Relaxed);
                    match increment(&pool).await {
                        Err(e)
                            if e.as_database_error()
                                .is_some_and(|e| e.code().as_deref() == Some("40001")) => {}
                        result => return Ok(result?),
                    }
                }
            });
            sample.await?.tried(attempts.load(Relaxed))
        }
        _ => return Err(turn.unknown()),
    };
    pool.close().await;
    Ok(sample)
}

async fn increment(pool: &PgPool) -> Result<(), sqlx::Error> {
    let mut tx = pool.begin_with("BEGIN ISOLATION LEVEL SERIALIZABLE").await?;
    let n: i64 = sqlx::query_scalar(COUNTER_READ).fetch_one(&mut *tx).await?;
    sqlx::query(COUNTER_WRITE).bind(n + 1).execute(&mut *tx).await?;
    tx.commit().await
}
