//! What the crate does in its several forms, beside the bare driver and the bare pool: a table and plots.
//!
//! `cargo bench --bench table`; with `-- --only read,update` only some of it, with `-- --test` one tiny round. The server
//! is that of `DATABASE_URL`, or else a throw-away one. Beside other libraries: `scripts/peers`.

mod kit;

use std::path::Path;
use std::process::ExitCode;

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
            eprintln!("table: {}", chain(e.as_ref()));
            ExitCode::FAILURE
        }
    }
}

async fn run() -> Result<(), Failure> {
    let plan = Plan::from_arguments(&NAMES, std::env::args().skip(1))?;
    let sections = Section::all(&plan);
    let server = Server::find().await?;
    let description = format!("{} {}", server.describe().await?, plan.describe());
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("bench");
    let mut report = Report::new(directory, "pg-session beside the bare driver", &description)?;
    let tpc_b = sections.iter().any(|section| section.work == Work::TpcB);
    Work::create_tables(&server.client, plan.scale, tpc_b).await?;
    let contenders: [Box<dyn Contender>; 3] =
        [Box::new(PgSession), Box::new(TokioPostgres), Box::new(Deadpool)];
    for section in sections {
        report.add(rounds::run(section, &contenders, &server, &plan).await)?;
    }
    report.finish()
}
