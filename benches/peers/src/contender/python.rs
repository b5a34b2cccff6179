//! asyncpg and SQLAlchemy's async engine on it, where Python has them: `python/peers.py` does the work in a process.

use std::path::Path;

use tokio::process::Command;

use crate::kit::Failure;
use crate::kit::contender::{Contender, Running, Turn, Way};
use crate::kit::load::Sample;
use crate::kit::work::{ACCOUNTS, CONNECTIONS, ITEMS, READ, TELLERS, TPC_B, UPDATE, Work};

pub struct Python {
    library: &'static str,
}

impl Python {
    /// Those of the two that can be imported.
    pub async fn find() -> Vec<Self> {
        let mut found = Vec::new();
        for (library, modules) in [("asyncpg", "asyncpg"), ("sqlalchemy", "asyncpg, sqlalchemy.ext.asyncio")]
        {
            let mut command = Command::new("python3");
            let imported = super::psql::output(command.args(["-c", &format!("import {modules}")])).await;
            if imported.is_ok() {
                found.push(Self { library });
            }
        }
        found
    }
}

impl Contender for Python {
    fn name(&self) -> &'static str {
        self.library
    }

    fn ways(&self, work: Work) -> Vec<Way> {
        match work {
            Work::Read | Work::Update | Work::TpcB => vec![Way::yardstick("Python")],
            Work::Acquire | Work::Insert | Work::Counter => Vec::new(),
        }
    }

    fn run<'a>(&'a self, turn: &'a Turn) -> Running<'a> {
        Box::pin(self.measure(turn))
    }
}

impl Python {
    async fn measure(&self, turn: &Turn) -> Result<Sample, Failure> {
        let load = &turn.load;
        let work = match turn.work {
            Work::Read => "read",
            Work::Update => "update",
            _ => "tpcb",
        };
        let mut command = Command::new("python3");
        command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("python/peers.py"));
        command.args([self.library, work, &load.tasks.to_string(), &CONNECTIONS.to_string()]);
        command.args([load.warm_up.as_secs_f64().to_string(), load.time.as_secs_f64().to_string()]);
        command.args([ITEMS, TELLERS * turn.scale, ACCOUNTS * turn.scale, turn.scale].map(|n| n.to_string()));
        // Not among the arguments, which everybody can see.
        command.env("PEERS_URL", turn.target.url());
        let statements: &[&str] = if work == "tpcb" { &TPC_B } else { &[READ, UPDATE] };
        command.args(statements);
        let output = super::psql::output(&mut command).await?;
        let mut numbers = output.split_whitespace().map(str::parse::<f64>);
        let mut next = || numbers.next().ok_or("too few numbers from Python");
        let (done, rate) = (next()??, next()??);
        let latencies: Result<Vec<f64>, _> = numbers.collect();
        let mut sample = Sample::outer(done as u64, rate);
        sample.latencies = latencies?;
        Ok(sample)
    }
}
