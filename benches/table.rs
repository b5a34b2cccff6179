//! What the crate does in its several forms, beside the bare driver and the bare pool: a table and plots.
//!
//! `cargo bench --bench table`; with `-- --only read,update` only some of it, with `-- --test` one tiny round. The server
//! is that of `DATABASE_URL`, or else a throw-away one. Beside other libraries: `scripts/peers`.

mod kit;

use std::path::Path;
use std::process::ExitCode;

use kit::Failure;
use kit::contender::{Contender, bare::TokioPostgres, deadpool::Deadpool, ours::PgSession};
use tokio::runtime::Runtime;

fn main() -> ExitCode {
    kit::main("table", Runtime::new(), run())
}

async fn run() -> Result<(), Failure> {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("bench");
    let contenders: [Box<dyn Contender>; 3] =
        [Box::new(PgSession), Box::new(TokioPostgres), Box::new(Deadpool)];
    kit::measure(directory, "pg-session beside the bare driver", "", &contenders).await?.finish()
}
