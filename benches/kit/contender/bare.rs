//! tokio-postgres without a pool: statements prepared by hand, clients handed out one at a time.

use std::pin::pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::future::try_join_all;
use futures_util::try_join;
use tokio::sync::Semaphore;
use tokio_postgres::binary_copy::BinaryCopyInWriter;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, IsolationLevel, Statement};

use super::{Contender, Running, Turn, Way};
use crate::kit::Failure;
use crate::kit::load::Sample;
use crate::kit::server::Target;
use crate::kit::work::{CONNECTIONS, Transfer, Work, entries, random_item};

pub struct TokioPostgres;

impl Contender for TokioPostgres {
    fn name(&self) -> &'static str {
        "tokio-postgres"
    }

    fn ways(&self, work: Work) -> Vec<Way> {
        match work {
            // It has no pool.
            Work::Acquire => Vec::new(),
            Work::Read => vec![Way::peer("prepared"), Way::yardstick("shared, pipelined")],
            Work::Update => {
                vec![Way::peer("prepared"), Way::yardstick("pipelined by hand"), Way::yardstick("no BEGIN")]
            }
            Work::TpcB => vec![Way::peer("prepared"), Way::yardstick("pipelined by hand")],
            Work::Insert => {
                vec![Way::peer("loop"), Way::yardstick("pipelined by hand"), Way::peer("COPY, binary")]
            }
            Work::Counter => vec![Way::peer("immediate retry")],
        }
    }

    fn run<'a>(&'a self, turn: &'a Turn) -> Running<'a> {
        Box::pin(run(turn))
    }
}

/// A client with the statements of its work.
pub struct Prepared {
    client: Client,
    statements: Vec<Statement>,
}

impl Prepared {
    pub async fn connect(target: &Target, work: Work) -> Result<Self, Failure> {
        let client = target.connect().await?;
        let mut statements = Vec::new();
        for sql in work.statements() {
            statements.push(client.prepare(sql).await?);
        }
        Ok(Self { client, statements })
    }

    pub async fn read(&self) -> Result<(), Failure> {
        self.client.query_one(&self.statements[0], &[&random_item()]).await?.try_get::<_, i64>(0)?;
        Ok(())
    }

    pub async fn update(&mut self) -> Result<(), Failure> {
        let tx = self.client.transaction().await?;
        tx.execute(&self.statements[0], &[&1i64, &random_item()]).await?;
        Ok(tx.commit().await?)
    }

    /// Sent in this order, and answered in one flight. A COMMIT that became ROLLBACK goes unseen, unless a statement
    /// failed.
    pub async fn update_pipelined(&self) -> Result<(), Failure> {
        let parameters: [&(dyn ToSql + Sync); 2] = [&1i64, &random_item()];
        try_join!(
            self.client.batch_execute("BEGIN"),
            self.client.execute(&self.statements[0], &parameters),
            self.client.batch_execute("COMMIT"),
        )?;
        Ok(())
    }
}

/// Clients that wait to be handed out.
#[derive(Clone)]
struct Clients {
    free: Arc<Semaphore>,
    idle: Arc<Mutex<Vec<Prepared>>>,
}

impl Clients {
    async fn connect(turn: &Turn) -> Result<Self, Failure> {
        let mut idle = Vec::new();
        for _ in 0..CONNECTIONS {
            idle.push(Prepared::connect(&turn.target, turn.work).await?);
        }
        Ok(Self { free: Arc::new(Semaphore::new(idle.len())), idle: Arc::new(Mutex::new(idle)) })
    }

    /// A failure ends the run, so a client that was taken for what fails need not come back.
    async fn take(&self) -> Result<Prepared, Failure> {
        self.free.acquire().await?.forget();
        let client = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        Ok(client.ok_or("more permits than clients")?)
    }

    fn give(&self, client: Prepared) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(client);
        self.free.add_permits(1);
    }
}

async fn run(turn: &Turn) -> Result<Sample, Failure> {
    let (load, scale, rows) = (&turn.load, turn.scale, turn.rows);
    let clients = Clients::connect(turn).await?;
    match (turn.work, turn.way) {
        (Work::Read, "prepared") => {
            let sample = load.run(clients, |clients| async move {
                let prepared = clients.take().await?;
                prepared.read().await?;
                clients.give(prepared);
                Ok(())
            });
            sample.await
        }
        (Work::Read, "shared, pipelined") => {
            // No pool can do this: all tasks use all clients at once.
            let mut shared = Vec::new();
            for _ in 0..CONNECTIONS {
                shared.push(clients.take().await?);
            }
            let state = (Arc::new(shared), Arc::new(AtomicUsize::new(0)));
            let sample = load.run(state, |(shared, next)| async move {
                shared[next.fetch_add(1, Relaxed) % shared.len()].read().await
            });
            sample.await
        }
        (Work::Update, "prepared") => {
            let sample = load.run(clients, |clients| async move {
                let mut prepared = clients.take().await?;
                prepared.update().await?;
                clients.give(prepared);
                Ok(())
            });
            sample.await
        }
        (Work::Update, "pipelined by hand") => {
            let sample = load.run(clients, |clients| async move {
                let prepared = clients.take().await?;
                prepared.update_pipelined().await?;
                clients.give(prepared);
                Ok(())
            });
            sample.await
        }
        (Work::Update, "no BEGIN") => {
            let sample = load.run(clients, |clients| async move {
                let prepared = clients.take().await?;
                prepared.client.execute(&prepared.statements[0], &[&1i64, &random_item()]).await?;
                clients.give(prepared);
                Ok(())
            });
            sample.await
        }
        (Work::TpcB, "prepared") => {
            let sample = load.run(clients, move |clients| async move {
                let mut prepared = clients.take().await?;
                let Transfer { aid, tid, bid, delta } = Transfer::random(scale);
                let statements = &prepared.statements;
                let tx = prepared.client.transaction().await?;
                tx.execute(&statements[0], &[&delta, &aid]).await?;
                tx.query_one(&statements[1], &[&aid]).await?.try_get::<_, i32>(0)?;
                tx.execute(&statements[2], &[&delta, &tid]).await?;
                tx.execute(&statements[3], &[&delta, &bid]).await?;
                tx.execute(&statements[4], &[&tid, &bid, &aid, &delta]).await?;
                tx.commit().await?;
                clients.give(prepared);
                Ok(())
            });
            sample.await
        }
        (Work::TpcB, "pipelined by hand") => {
            let sample = load.run(clients, move |clients| async move {
                let prepared = clients.take().await?;
                let Prepared { client, statements } = &prepared;
                let Transfer { aid, tid, bid, delta } = Transfer::random(scale);
                let parameters: [&[&(dyn ToSql + Sync)]; 5] =
                    [&[&delta, &aid], &[&aid], &[&delta, &tid], &[&delta, &bid], &[&tid, &bid, &aid, &delta]];
                let (_, _, row, ..) = try_join!(
                    client.batch_execute("BEGIN"),
                    client.execute(&statements[0], parameters[0]),
                    client.query_one(&statements[1], parameters[1]),
                    client.execute(&statements[2], parameters[2]),
                    client.execute(&statements[3], parameters[3]),
                    client.execute(&statements[4], parameters[4]),
                    client.batch_execute("COMMIT"),
                )?;
                row.try_get::<_, i32>(0)?;
                clients.give(prepared);
                Ok(())
            });
            sample.await
        }
        (Work::Insert, "loop") => {
            let sample = load.run(clients, move |clients| async move {
                let mut prepared = clients.take().await?;
                let tx = prepared.client.transaction().await?;
                for entry in entries(rows) {
                    tx.execute(&prepared.statements[0], &[&entry.id, &entry.name, &entry.cents]).await?;
                }
                tx.commit().await?;
                clients.give(prepared);
                Ok(())
            });
            sample.await
        }
        (Work::Insert, "pipelined by hand") => {
            let sample = load.run(clients, move |clients| async move {
                let mut prepared = clients.take().await?;
                let tx = prepared.client.transaction().await?;
                let statement = &prepared.statements[0];
                let inserts = entries(rows).map(|entry| {
                    let tx = &tx;
                    async move { tx.execute(statement, &[&entry.id, &entry.name, &entry.cents]).await }
                });
                try_join_all(inserts).await?;
                tx.commit().await?;
                clients.give(prepared);
                Ok(())
            });
            sample.await
        }
        (Work::Insert, "COPY, binary") => {
            let sample = load.run(clients, move |clients| async move {
                let prepared = clients.take().await?;
                let sink = prepared
                    .client
                    .copy_in("COPY entries (id, name, cents) FROM STDIN (FORMAT binary)")
                    .await?;
                let mut writer = pin!(BinaryCopyInWriter::new(sink, &[Type::INT8, Type::TEXT, Type::INT8]));
                for entry in entries(rows) {
                    writer.as_mut().write(&[&entry.id, &entry.name, &entry.cents]).await?;
                }
                writer.finish().await?;
                clients.give(prepared);
                Ok(())
            });
            sample.await
        }
        (Work::Counter, "immediate retry") => {
            let attempts = Arc::new(AtomicU64::new(0));
            let state = (clients, attempts.clone());
            let sample = load.run(state, |(clients, attempts)| async move {
                let mut prepared = clients.take().await?;
                loop {
                    attempts.fetch_add(1, Relaxed);
                    match increment(&mut prepared).await {
                        Err(e) if e.code() == Some(&SqlState::T_R_SERIALIZATION_FAILURE) => {}
                        result => break result?,
                    }
                }
                clients.give(prepared);
                Ok(())
            });
            Ok(sample.await?.tried(attempts.load(Relaxed)))
        }
        _ => Err(turn.unknown()),
    }
}

async fn increment(prepared: &mut Prepared) -> Result<(), tokio_postgres::Error> {
    let level = IsolationLevel::Serializable;
    let tx = prepared.client.build_transaction().isolation_level(level).start().await?;
    let n: i64 = tx.query_one(&prepared.statements[0], &[]).await?.try_get(0)?;
    tx.execute(&prepared.statements[1], &[&(n + 1)]).await?;
    tx.commit().await
}
