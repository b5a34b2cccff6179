//! What `scripts/instructions` runs under valgrind: N prepared `query_one` on one connection, by the bare driver, by a
//! session or by deadpool-postgres. The server is another process, named by `DATABASE_URL`; with `serve` this program is that process.

mod contenders;

use std::io::Read;
use std::process::ExitCode;
use std::time::Duration;

use contenders::{Deadpool, Ours, Raw, database, deadpool, runtime, sessions};
use pg_session::testing::PgServer;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (who, times) = match arguments[..] {
        ["serve"] => return serve(),
        [who @ ("raw" | "session" | "deadpool"), times] => (who, times.parse::<u64>()),
        _ => ("", "".parse()),
    };
    let Ok(times) = times else {
        eprintln!("usage: instructions serve | (raw|session|deadpool) N");
        return ExitCode::from(2);
    };
    runtime().block_on(async {
        // Every service has some timer, and the runtime does more at every turn for the first one. The pool has one for
        // its upkeep; the driver alone would be measured in a runtime that nobody has.
        tokio::spawn(tokio::time::sleep(Duration::from_secs(24 * 3600)));
        let database = database().await;
        let url = database.url();
        match who {
            "raw" => {
                let mut raw = Raw::new(url).await;
                for _ in 0..times {
                    raw.select().await;
                }
            }
            "deadpool" => {
                let mut pooled = Deadpool::new(&deadpool(url)).await;
                for _ in 0..times {
                    pooled.select().await;
                }
            }
            _ => {
                let mut ours = Ours::new(&sessions(url)).await;
                for _ in 0..times {
                    ours.select().await;
                }
            }
        }
    });
    ExitCode::SUCCESS
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
