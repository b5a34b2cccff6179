//! pg-session beside its peers in one run: by turns, in changing order, everybody checked. `scripts/peers` starts it.

mod contender;
#[path = "../../kit/mod.rs"]
mod kit;
mod targets;

use std::path::Path;
use std::process::ExitCode;

use contender::bb8::Bb8;
use contender::diesel_async::DieselAsync;
use contender::pgbench::Pgbench;
use contender::psql::Psql;
use contender::python::Python;
use contender::sea_orm::SeaOrm;
use contender::sqlx::Sqlx;
use kit::Failure;
use kit::contender::{Contender, bare::TokioPostgres, deadpool::Deadpool, ours::PgSession};
use tokio::runtime::Runtime;

fn main() -> ExitCode {
    kit::main("peers", Runtime::new(), run())
}

async fn run() -> Result<(), Failure> {
    let (contenders, absent) = contenders().await;
    let program = std::env::current_exe()?;
    let target = program.parent().and_then(Path::parent).ok_or("the program lies in no target directory")?;
    let directory = target.join("bench/peers");
    let mut report = kit::measure(directory, "pg-session beside its peers", &absent, &contenders).await?;
    let targets = targets::table(report.sections());
    println!("\n## Targets\n\n{targets}");
    report.text(&targets);
    report.finish()
}

/// Everybody who is there, and a word about who is not.
async fn contenders() -> (Vec<Box<dyn Contender>>, String) {
    let mut contenders: Vec<Box<dyn Contender>> = vec![
        Box::new(PgSession),
        Box::new(TokioPostgres),
        Box::new(Deadpool),
        Box::new(Bb8),
        Box::new(Sqlx),
        Box::new(DieselAsync),
        Box::new(SeaOrm),
    ];
    let mut absent = Vec::new();
    match Pgbench::find() {
        Some(pgbench) => contenders.push(Box::new(pgbench)),
        None => absent.push("pgbench"),
    }
    match Psql::find() {
        Some(psql) => contenders.push(Box::new(psql)),
        None => absent.push("psql"),
    }
    let python = Python::find().await;
    if python.is_empty() {
        absent.push("Python's asyncpg (benches/peers/python/requirements.txt)");
    }
    contenders.extend(python.into_iter().map(|python| Box::new(python) as Box<dyn Contender>));
    let note = if absent.is_empty() {
        String::new()
    } else {
        format!(" Not here, so skipped: {}.", absent.join(", "))
    };
    (contenders, note)
}
