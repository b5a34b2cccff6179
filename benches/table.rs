//! What the crate does in its several forms, beside the bare driver and the bare pool: a table and plots.
//!
//! `cargo bench --bench table`; with `-- --only read,update` only some of it, with `-- --test` one tiny round. The server
//! is that of `DATABASE_URL`, or else a throw-away one. Beside other libraries: `scripts/peers`.
//!
//! What one operation takes: `taskset -c 1 cargo bench --bench table -- --tasks 1 --only acquire,read,update`. Without
//! `taskset` (Linux) the system moves client and server between processors, and waking one that sleeps takes longer than
//! the query: the same operation takes 25 µs in one round and 100 µs in the next.

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
