//! diesel-async with deadpool: its query builder, whose statements are prepared once for each type.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use diesel::prelude::*;
use diesel::result::{DatabaseErrorKind, Error};
use diesel_async::pooled_connection::deadpool::{Object, Pool};
use diesel_async::pooled_connection::{AsyncDieselConnectionManager, ManagerConfig, RecyclingMethod};
use diesel_async::{AsyncConnection, AsyncPgConnection, RunQueryDsl};

use crate::kit::Failure;
use crate::kit::contender::{ACQUIRES, Contender, Running, Turn, Way};
use crate::kit::load::Sample;
use crate::kit::work::{CONNECTIONS, Transfer, Work, entries, random_item};

diesel::table! { items (id) { id -> Integer, n -> BigInt, } }
diesel::table! { counter (id) { id -> Integer, n -> BigInt, } }
diesel::table! {
    #[sql_name = "entries"]
    entries_table (id) { id -> BigInt, name -> Text, cents -> BigInt, }
}
diesel::table! { pgbench_accounts (aid) { aid -> Integer, abalance -> Integer, } }
diesel::table! { pgbench_tellers (tid) { tid -> Integer, tbalance -> Integer, } }
diesel::table! { pgbench_branches (bid) { bid -> Integer, bbalance -> Integer, } }
diesel::table! {
    pgbench_history (tid) {
        tid -> Integer, bid -> Integer, aid -> Integer, delta -> Integer, mtime -> Timestamp,
    }
}

pub struct DieselAsync;

impl Contender for DieselAsync {
    fn name(&self) -> &'static str {
        "diesel-async"
    }

    fn ways(&self, work: Work) -> Vec<Way> {
        match work {
            Work::Acquire => vec![Way::peer("get")],
            Work::Read => vec![Way::peer("query builder")],
            Work::Update | Work::TpcB => vec![Way::peer("transaction")],
            Work::Insert => vec![Way::peer("loop"), Way::peer("values of a Vec")],
            Work::Counter => vec![Way::peer("immediate retry")],
        }
    }

    fn run<'a>(&'a self, turn: &'a Turn) -> Running<'a> {
        Box::pin(run(turn))
    }
}

#[derive(Insertable)]
#[diesel(table_name = entries_table)]
struct NewEntry {
    id: i64,
    name: String,
    cents: i64,
}

fn new_entries(rows: usize) -> impl Iterator<Item = NewEntry> {
    entries(rows).map(|entry| NewEntry { id: entry.id, name: entry.name, cents: entry.cents })
}

async fn run(turn: &Turn) -> Result<Sample, Failure> {
    let mut config = ManagerConfig::default();
    config.recycling_method = RecyclingMethod::Fast;
    let manager =
        AsyncDieselConnectionManager::<AsyncPgConnection>::new_with_config(turn.target.url(), config);
    let pool = Pool::builder(manager).max_size(CONNECTIONS).build()?;
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
        (Work::Read, "query builder") => {
            let sample = load.run(pool, |pool| async move {
                let mut connection = pool.get().await?;
                let read = items::table.find(random_item()).select(items::n);
                read.get_result::<i64>(&mut connection).await?;
                Ok(())
            });
            sample.await
        }
        (Work::Update, "transaction") => {
            let sample = load.run(pool, |pool| async move {
                let mut connection = pool.get().await?;
                let work = async |connection: &mut Object<AsyncPgConnection>| {
                    let update = diesel::update(items::table.find(random_item()));
                    update.set(items::n.eq(items::n + 1)).execute(connection).await?;
                    Ok::<_, Error>(())
                };
                Ok(connection.transaction(work).await?)
            });
            sample.await
        }
        (Work::TpcB, "transaction") => {
            let sample = load.run(pool, move |pool| async move {
                let mut connection = pool.get().await?;
                let transfer = Transfer::random(scale);
                Ok(connection.transaction(async |connection| tpc_b(connection, transfer).await).await?)
            });
            sample.await
        }
        (Work::Insert, "loop") => {
            let sample = load.run(pool, move |pool| async move {
                let mut connection = pool.get().await?;
                let work = async |connection: &mut Object<AsyncPgConnection>| {
                    for entry in new_entries(rows) {
                        diesel::insert_into(entries_table::table).values(entry).execute(connection).await?;
                    }
                    Ok::<_, Error>(())
                };
                Ok(connection.transaction(work).await?)
            });
            sample.await
        }
        (Work::Insert, "values of a Vec") => {
            let sample = load.run(pool, move |pool| async move {
                let mut connection = pool.get().await?;
                let entries: Vec<NewEntry> = new_entries(rows).collect();
                diesel::insert_into(entries_table::table).values(entries).execute(&mut connection).await?;
                Ok(())
            });
            sample.await
        }
        (Work::Counter, "immediate retry") => {
            let attempts = Arc::new(AtomicU64::new(0));
            let sample = load.run((pool, attempts.clone()), |(pool, attempts)| async move {
                let mut connection = pool.get().await?;
                loop {
                    attempts.fetch_add(1, Relaxed);
                    let transaction = connection.build_transaction().serializable();
                    match { transaction }.run(async |connection| increment(connection).await).await {
                        Err(Error::DatabaseError(DatabaseErrorKind::SerializationFailure, _)) => {}
                        result => return Ok(result?),
                    }
                }
            });
            Ok(sample.await?.tried(AtomicU64::load(&attempts, Relaxed)))
        }
        _ => Err(turn.unknown()),
    }
}

async fn tpc_b(connection: &mut AsyncPgConnection, transfer: Transfer) -> Result<(), Error> {
    use pgbench_accounts::dsl as a;
    use pgbench_branches::dsl as b;
    use pgbench_history::dsl as h;
    use pgbench_tellers::dsl as t;

    let Transfer { aid, tid, bid, delta } = transfer;
    let account = a::pgbench_accounts.find(aid);
    diesel::update(account).set(a::abalance.eq(a::abalance + delta)).execute(connection).await?;
    account.select(a::abalance).get_result::<i32>(connection).await?;
    let teller = diesel::update(t::pgbench_tellers.find(tid));
    teller.set(t::tbalance.eq(t::tbalance + delta)).execute(connection).await?;
    let branch = diesel::update(b::pgbench_branches.find(bid));
    branch.set(b::bbalance.eq(b::bbalance + delta)).execute(connection).await?;
    let history =
        (h::tid.eq(tid), h::bid.eq(bid), h::aid.eq(aid), h::delta.eq(delta), h::mtime.eq(diesel::dsl::now));
    diesel::insert_into(h::pgbench_history).values(history).execute(connection).await?;
    Ok(())
}

async fn increment(connection: &mut AsyncPgConnection) -> Result<(), Error> {
    let n = counter::table.find(1).select(counter::n).get_result::<i64>(connection).await?;
    diesel::update(counter::table.find(1)).set(counter::n.eq(n + 1)).execute(connection).await?;
    Ok(())
}
