//! What `scripts/instructions` runs under valgrind: N times one operation by the bare driver, by this crate or by
//! deadpool-postgres. The server is another process, named by `DATABASE_URL`; with `serve` this program is that process.

mod contenders;

use std::hint::black_box;
use std::io::Read;
use std::process::ExitCode;
use std::time::Duration;

use contenders::{Deadpool, Ours, Raw, database, deadpool, runtime, sessions};
use pg_session::testing::PgServer;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (who, what, times) = match arguments[..] {
        ["serve"] => return serve(),
        [who, what, times] => (who, what, times.parse::<u64>()),
        _ => ("", "", "".parse()),
    };
    let known = match times {
        Ok(times) => runtime().block_on(run(who, what, times)),
        Err(_) => false,
    };
    if known {
        return ExitCode::SUCCESS;
    }
    eprintln!("usage: instructions serve | (raw|session|deadpool) (acquire|query|transaction|batch) N");
    ExitCode::from(2)
}

/// Whether there is such an operation; the bare driver has nothing to acquire, and deadpool-postgres no batch.
async fn run(who: &str, what: &str, times: u64) -> bool {
    // Every service has some timer, and the runtime does more at every turn for the first one. The pool has one for
    // its upkeep; the driver alone would be measured in a runtime that nobody has.
    tokio::spawn(tokio::time::sleep(Duration::from_secs(24 * 3600)));
    let database = database().await;
    let url = database.url();
    match (who, what) {
        ("session", "acquire") => {
            let sessions = sessions(url);
            repeat(times, async || drop(black_box(sessions.acquire().await.expect("a session")))).await;
        }
        ("deadpool", "acquire") => {
            let pool = deadpool(url);
            repeat(times, async || drop(black_box(pool.get().await.expect("a client")))).await;
        }
        ("raw", "query") => {
            let mut raw = Raw::new(url).await;
            repeat(times, async || _ = black_box(raw.select().await)).await;
        }
        ("session", "query") => {
            let mut ours = Ours::new(&sessions(url)).await;
            repeat(times, async || _ = black_box(ours.select().await)).await;
        }
        ("deadpool", "query") => {
            let mut pooled = Deadpool::new(&deadpool(url)).await;
            repeat(times, async || _ = black_box(pooled.select().await)).await;
        }
        ("raw", "transaction") => {
            let mut raw = Raw::new(url).await;
            repeat(times, async || raw.transaction(1).await).await;
        }
        ("session", "transaction") => {
            let mut ours = Ours::new(&sessions(url)).await;
            repeat(times, async || ours.transaction(1).await).await;
        }
        ("raw", "batch") => {
            let mut raw = Raw::new(url).await;
            repeat(times, async || raw.pipelined().await).await;
        }
        ("session", "batch") => {
            let mut ours = Ours::new(&sessions(url)).await;
            repeat(times, async || ours.batch().await).await;
        }
        ("deadpool", "transaction") => {
            let mut pooled = Deadpool::new(&deadpool(url)).await;
            repeat(times, async || pooled.transaction(1).await).await;
        }
        _ => return false,
    }
    true
}

async fn repeat(times: u64, mut operation: impl AsyncFnMut()) {
    for _ in 0..times {
        operation().await;
    }
}

/// Prints the URL of a server that lives until standard input ends.
fn serve() -> ExitCode {
    match PgServer::start() {
        Ok(server) => {
            println!("{}", server.url());
            // An error ends it as well.
            let _ = std::io::stdin().read(&mut [0]);
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("instructions: {e}");
            ExitCode::FAILURE
        }
    }
}
