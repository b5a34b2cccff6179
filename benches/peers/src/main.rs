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
use kit::arguments::Plan;
use kit::contender::{Contender, bare::TokioPostgres, deadpool::Deadpool, ours::PgSession};
use kit::report::Report;
use kit::section::{NAMES, Section};
use kit::server::Server;
use kit::work::Work;
use kit::{Failure, chain, rounds};

fn main() -> ExitCode {
    let run = || tokio::runtime::Runtime::new()?.block_on(run());
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("peers: {}", chain(e.as_ref()));
            ExitCode::FAILURE
        }
    }
}

async fn run() -> Result<(), Failure> {
    let plan = Plan::from_arguments(&NAMES, std::env::args().skip(1))?;
    let sections = Section::all(&plan);
    let server = Server::find().await?;
    let (contenders, absent) = contenders().await;
    let description = format!("{} {}{absent}", server.describe().await?, plan.describe());
    let program = std::env::current_exe()?;
    let target = program.parent().and_then(Path::parent).ok_or("the program lies in no target directory")?;
    let mut report = Report::new(target.join("bench/peers"), "pg-session beside its peers", &description)?;
    let tpc_b = sections.iter().any(|section| section.work == Work::TpcB);
    Work::create_tables(&server.client, plan.scale, tpc_b).await?;
    for section in sections {
        report.add(rounds::run(section, &contenders, &server, &plan).await)?;
    }
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
