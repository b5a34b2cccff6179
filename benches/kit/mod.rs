//! What the benches share: the work, who does it, the load, the rounds and the report.
#![allow(dead_code, reason = "each program uses a part of it")]
#![allow(missing_docs, unreachable_pub, reason = "it is part of programs, not of the crate")]

pub mod arguments;
pub mod contender;
pub mod load;
pub mod plot;
pub mod proxy;
pub mod report;
pub mod rounds;
pub mod section;
pub mod server;
pub mod work;

use std::error::Error;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use arguments::Plan;
use contender::Contender;
use report::Report;
use section::{NAMES, Section};
use server::Server;
use tokio::runtime::Runtime;
use work::Work;

pub type Failure = Box<dyn Error + Send + Sync>;

/// What each program's `main` does.
pub fn main(
    program: &str,
    runtime: io::Result<Runtime>,
    run: impl Future<Output = Result<(), Failure>>,
) -> ExitCode {
    match runtime.map_err(Failure::from).and_then(|runtime| runtime.block_on(run)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{program}: {}", chain(e.as_ref()));
            ExitCode::FAILURE
        }
    }
}

/// Measures everything that the program's arguments ask for. `note` goes behind the description.
pub async fn measure(
    directory: PathBuf,
    title: &str,
    note: &str,
    contenders: &[Box<dyn Contender>],
) -> Result<Report, Failure> {
    let plan = Plan::from_arguments(&NAMES, std::env::args().skip(1))?;
    let sections = Section::all(&plan);
    let server = Server::find().await?;
    let description = format!("{} {}{note}", server.describe().await?, plan.describe());
    let mut report = Report::new(directory, title, &description)?;
    let tpc_b = sections.iter().any(|section| section.work == Work::TpcB);
    Work::create_tables(&server.client, plan.scale, tpc_b).await?;
    for section in sections {
        report.add(rounds::run(section, contenders, &server, &plan).await)?;
    }
    Ok(report)
}

/// An error with its causes: the drivers' errors alone say little more than "db error".
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}
