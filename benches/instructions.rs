//! What `scripts/instructions` runs under valgrind: one operation, N times, on one connection of one of the kit's
//! contenders. The server is another process, named by `DATABASE_URL`; with `serve` this program is that process.

mod kit;

use std::env;
use std::io::Read;
use std::process::ExitCode;
use std::time::Duration;

use kit::Failure;
use kit::contender::{bare::Prepared, deadpool, ours};
use kit::server::{Server, Target};
use kit::work::Work;
use tokio::runtime;

const USAGE: &str = "arguments: serve | (raw|session|deadpool) (acquire|query|transaction|batch) N";

fn main() -> ExitCode {
    // One thread for all: what is counted, the driver's task, and nothing else.
    kit::main("instructions", runtime::Builder::new_current_thread().enable_all().build(), run())
}

async fn run() -> Result<(), Failure> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["serve"] => serve().await,
        [who, what, times] => operate(who, what, times.parse()?).await,
        _ => Err(USAGE.into()),
    }
}

/// Prints the URL of a database with the kit's tables; it lives until standard input ends.
async fn serve() -> Result<(), Failure> {
    let server = Server::find().await?;
    Work::create_tables(&server.client, 1, false).await?;
    println!("{}", server.direct.url());
    // An error ends it as well.
    let _ = std::io::stdin().read(&mut [0]);
    Ok(())
}

/// The bare driver has nothing to acquire, and deadpool-postgres no batch.
async fn operate(who: &str, what: &str, times: u64) -> Result<(), Failure> {
    // Every service has some timer, and the runtime does more at every turn for the first one. The pool has one for
    // its upkeep; the driver alone would be measured in a runtime that nobody has.
    tokio::spawn(tokio::time::sleep(Duration::from_secs(24 * 3600)));
    let target = Target::at(&env::var("DATABASE_URL")?)?;
    match (who, what) {
        ("session", "acquire") => {
            let sessions = ours::sessions(&target)?;
            repeat(times, async || Ok(sessions.acquire().await.map(drop)?)).await
        }
        ("deadpool", "acquire") => {
            let pool = deadpool::pool(&target)?;
            repeat(times, async || Ok(pool.get().await.map(drop)?)).await
        }
        ("raw", "query") => {
            let client = Prepared::connect(&target, Work::Read).await?;
            repeat(times, async || client.read().await).await
        }
        ("session", "query") => {
            let session = ours::sessions(&target)?.acquire().await?;
            repeat(times, async || ours::read(&session).await).await
        }
        ("deadpool", "query") => {
            let client = deadpool::pool(&target)?.get().await?;
            repeat(times, async || deadpool::read_cached(&client).await).await
        }
        ("raw", "transaction") => {
            let mut client = Prepared::connect(&target, Work::Update).await?;
            repeat(times, async || client.update().await).await
        }
        ("session", "transaction") => {
            let mut session = ours::sessions(&target)?.acquire().await?;
            repeat(times, async || Ok(session.transaction(ours::update).await?)).await
        }
        ("deadpool", "transaction") => {
            let mut client = deadpool::pool(&target)?.get().await?;
            repeat(times, async || deadpool::update_cached(&mut client).await).await
        }
        ("raw", "batch") => {
            let client = Prepared::connect(&target, Work::Update).await?;
            repeat(times, async || client.update_pipelined().await).await
        }
        ("session", "batch") => {
            let mut session = ours::sessions(&target)?.acquire().await?;
            repeat(times, async || ours::update_batch(session.batch()).await).await
        }
        _ => Err(USAGE.into()),
    }
}

async fn repeat(times: u64, mut operation: impl AsyncFnMut() -> Result<(), Failure>) -> Result<(), Failure> {
    for _ in 0..times {
        operation().await?;
    }
    Ok(())
}
