//! SeaORM, on sqlx: its raw statements, since building them anew each time costs more; `insert_many` for many rows.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use sea_orm::{
    ConnectOptions, ConnectionTrait, Database, DatabaseConnection, DbBackend, DbErr, EntityTrait,
    IsolationLevel, RuntimeErr, Set, Statement, TransactionTrait, Value,
};

use crate::kit::Failure;
use crate::kit::contender::{Contender, Running, Turn, Way};
use crate::kit::load::Sample;
use crate::kit::work::{
    CONNECTIONS, COUNTER_READ, COUNTER_WRITE, INSERT, READ, TPC_B, Transfer, UPDATE, Work, entries,
    random_item,
};

mod entry {
    //! The entity of `entries`.

    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "entries")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: i64,
        pub name: String,
        pub cents: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub struct SeaOrm;

impl Contender for SeaOrm {
    fn name(&self) -> &'static str {
        "sea-orm"
    }

    fn ways(&self, work: Work) -> Vec<Way> {
        match work {
            // Its connections are acquired by its calls only.
            Work::Acquire => Vec::new(),
            Work::Read | Work::Update | Work::TpcB => vec![Way::peer("raw SQL")],
            Work::Insert => vec![Way::peer("loop"), Way::peer("insert_many")],
            Work::Counter => vec![Way::peer("immediate retry")],
        }
    }

    fn run<'a>(&'a self, turn: &'a Turn) -> Running<'a> {
        Box::pin(run(turn))
    }
}

fn statement<const N: usize>(sql: &str, values: [Value; N]) -> Statement {
    Statement::from_sql_and_values(DbBackend::Postgres, sql, values)
}

async fn run(turn: &Turn) -> Result<Sample, Failure> {
    let mut options = ConnectOptions::new(turn.target.url());
    options.max_connections(CONNECTIONS as u32).test_before_acquire(false).sqlx_logging(false);
    let db = Database::connect(options).await?;
    let (load, scale, rows) = (&turn.load, turn.scale, turn.rows);
    let sample = match (turn.work, turn.way) {
        (Work::Read, "raw SQL") => {
            let sample = load.run(db.clone(), |db| async move {
                let row = db.query_one_raw(statement(READ, [random_item().into()])).await?;
                row.ok_or("no row")?.try_get_by_index::<i64>(0)?;
                Ok(())
            });
            sample.await?
        }
        (Work::Update, "raw SQL") => {
            let sample = load.run(db.clone(), |db| async move {
                let tx = db.begin().await?;
                tx.execute_raw(statement(UPDATE, [1i64.into(), random_item().into()])).await?;
                tx.commit().await?;
                Ok(())
            });
            sample.await?
        }
        (Work::TpcB, "raw SQL") => {
            let sample = load.run(db.clone(), move |db| async move {
                let Transfer { aid, tid, bid, delta } = Transfer::random(scale);
                let tx = db.begin().await?;
                tx.execute_raw(statement(TPC_B[0], [delta.into(), aid.into()])).await?;
                let row = tx.query_one_raw(statement(TPC_B[1], [aid.into()])).await?;
                row.ok_or("no row")?.try_get_by_index::<i32>(0)?;
                tx.execute_raw(statement(TPC_B[2], [delta.into(), tid.into()])).await?;
                tx.execute_raw(statement(TPC_B[3], [delta.into(), bid.into()])).await?;
                let values = [tid.into(), bid.into(), aid.into(), delta.into()];
                tx.execute_raw(statement(TPC_B[4], values)).await?;
                tx.commit().await?;
                Ok(())
            });
            sample.await?
        }
        (Work::Insert, "loop") => {
            let sample = load.run(db.clone(), move |db| async move {
                let tx = db.begin().await?;
                for entry in entries(rows) {
                    let values = [entry.id.into(), entry.name.into(), entry.cents.into()];
                    tx.execute_raw(statement(INSERT, values)).await?;
                }
                tx.commit().await?;
                Ok(())
            });
            sample.await?
        }
        (Work::Insert, "insert_many") => {
            let sample = load.run(db.clone(), move |db| async move {
                let models: Vec<_> = entries(rows)
                    .map(|row| entry::ActiveModel {
                        id: Set(row.id),
                        name: Set(row.name),
                        cents: Set(row.cents),
                    })
                    .collect();
                entry::Entity::insert_many(models).exec_without_returning(&db).await?;
                Ok(())
            });
            sample.await?
        }
        (Work::Counter, "immediate retry") => {
            let attempts = Arc::new(AtomicU64::new(0));
            let sample = load.run((db.clone(), attempts.clone()), |(db, attempts)| async move {
                loop {
                    attempts.fetch_add(1, Relaxed);
                    match increment(&db).await {
                        Err(e) if is_serialization_failure(&e) => {}
                        result => return Ok(result?),
                    }
                }
            });
            sample.await?.tried(attempts.load(Relaxed))
        }
        _ => return Err(turn.unknown()),
    };
    db.close().await?;
    Ok(sample)
}

async fn increment(db: &DatabaseConnection) -> Result<(), DbErr> {
    let tx = db.begin_with_config(Some(IsolationLevel::Serializable), None).await?;
    let row = tx.query_one_raw(statement(COUNTER_READ, [])).await?;
    let n: i64 = row.ok_or(DbErr::RecordNotFound("the counter".into()))?.try_get_by_index(0)?;
    tx.execute_raw(statement(COUNTER_WRITE, [(n + 1).into()])).await?;
    tx.commit().await
}

fn is_serialization_failure(error: &DbErr) -> bool {
    let (DbErr::Exec(RuntimeErr::SqlxError(cause))
    | DbErr::Query(RuntimeErr::SqlxError(cause))
    | DbErr::Conn(RuntimeErr::SqlxError(cause))) = error
    else {
        return false;
    };
    cause.as_database_error().is_some_and(|e| e.code().as_deref() == Some("40001"))
}
