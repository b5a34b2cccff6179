//! Moves money between accounts from many tasks at once, and proves that not a cent was lost or made.
//!
//! ```sh
//! cargo run --release --example quickstart --features testing -- --help
//! ```
//!
//! Every transfer reads two balances and writes back what it worked out from them: code that loses money at any
//! isolation level but SERIALIZABLE, and fails now and then at that one. The crate runs it again until it succeeds,
//! so the code has no word about that.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::io::{IsTerminal, Write, stderr};
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

use pg_session::testing::{PgServer, PgServerError};
use pg_session::{Connection, Error, RetryPolicy, SessionConfig, SessionManager, TransactionOptions};
use tokio::task::JoinSet;

const HELP: &str = "\
Moves money between accounts under SERIALIZABLE, and checks that not a cent is lost.

Uses the database in DATABASE_URL if that is set (tables pg_session_quickstart_*), else a throw-away server.

  --transfers N   how many transfers to try        [default: 50000]
  --tasks N       tasks that make them             [default: 32]
  --accounts N    accounts they are made between   [default: 500]
  --max-size N    connections in the pool          [default: 10]
  --help          show this";

// Half-empty pages keep the changed rows near the old ones and out of the index. An entry made in an index page is in
// conflict with everyone who found a row by that page.
const CREATE_TABLES: &str = "
    DROP TABLE IF EXISTS pg_session_quickstart_accounts, pg_session_quickstart_transfers;
    CREATE TABLE pg_session_quickstart_accounts (
        id bigint PRIMARY KEY,
        cents bigint NOT NULL CHECK (cents >= 0)
    ) WITH (fillfactor = 50);
    CREATE TABLE pg_session_quickstart_transfers (
        id bigint PRIMARY KEY,
        debtor bigint NOT NULL,
        creditor bigint NOT NULL,
        cents bigint NOT NULL
    )";

const DROP_TABLES: &str = "DROP TABLE pg_session_quickstart_accounts, pg_session_quickstart_transfers";

/// What every account holds at first. Transfers are of up to half of it, so that some are refused.
const OPENING_CENTS: i64 = 10_000;

/// What becomes of one transfer that is not made. The database's errors come in through `From`.
#[derive(Debug, thiserror::Error)]
enum TransferError {
    #[error("the account does not hold that much")]
    Overdraft,
    #[error(transparent)]
    Database(#[from] Error),
}

/// What somebody wants to be moved.
struct Order {
    id: i64,
    debtor: i64,
    creditor: i64,
    cents: i64,
}

impl Order {
    fn random(id: i64, accounts: i64) -> Self {
        let debtor = fastrand::i64(1..=accounts);
        // One of the others.
        let creditor = 1 + (debtor - 1 + fastrand::i64(1..accounts)) % accounts;
        Self { id, debtor, creditor, cents: fastrand::i64(1..=OPENING_CENTS / 2) }
    }
}

/// One transfer, in a transaction of its own: made in full or not at all.
async fn transfer(
    sessions: &SessionManager,
    options: TransactionOptions,
    order: &Order,
    attempts: &AtomicU32,
) -> Result<(), TransferError> {
    sessions
        .transaction_with(options, async |tx| {
            attempts.store(tx.attempt(), Relaxed);
            // Both are sent at once: two answers for one round trip, in which BEGIN travels as well.
            let (debtor, creditor) =
                tokio::try_join!(balance(tx, order.debtor), balance(tx, order.creditor))?;
            if debtor < order.cents {
                return Err(TransferError::Overdraft); // rolls back
            }
            let mut changes =
                [(order.debtor, debtor - order.cents), (order.creditor, creditor + order.cents)];
            // In the order of their numbers: two transfers in opposite directions then queue up, where they would
            // deadlock otherwise. (That would be retried too, but the server takes a second to notice.)
            changes.sort_unstable();
            for (account, cents) in changes {
                set_balance(tx, account, cents).await?;
            }
            record(tx, order).await?;
            Ok(())
        })
        .await
}

// Each takes a `&Connection`, which a session and a transaction both are.

async fn balance(db: &Connection, account: i64) -> Result<i64, Error> {
    let row =
        db.query_one("SELECT cents FROM pg_session_quickstart_accounts WHERE id = $1", &[&account]).await?;
    Ok(row.get(0))
}

async fn set_balance(db: &Connection, account: i64, cents: i64) -> Result<(), Error> {
    db.execute("UPDATE pg_session_quickstart_accounts SET cents = $2 WHERE id = $1", &[&account, &cents])
        .await?;
    Ok(())
}

async fn record(db: &Connection, order: &Order) -> Result<(), Error> {
    let Order { id, debtor, creditor, cents } = order;
    db.execute(
        "INSERT INTO pg_session_quickstart_transfers (id, debtor, creditor, cents) VALUES ($1, $2, $3, $4)",
        &[id, debtor, creditor, cents],
    )
    .await?;
    Ok(())
}

async fn open_accounts(db: &Connection, accounts: i64) -> Result<(), Error> {
    db.batch_execute(CREATE_TABLES).await?;
    db.execute(
        "INSERT INTO pg_session_quickstart_accounts (id, cents) SELECT id, $2 FROM generate_series(1::bigint, $1) AS id",
        &[&accounts, &OPENING_CENTS],
    )
    .await?;
    Ok(())
}

/// What the tables say.
struct Books {
    total_cents: i64,
    logged: Vec<i64>,
    /// How many accounts do not hold what they began with and the log adds up to.
    off_balance: i64,
}

async fn read_books(db: &Connection) -> Result<Books, Error> {
    const TOTAL: &str = "SELECT sum(cents)::bigint FROM pg_session_quickstart_accounts";
    const LOGGED: &str = "SELECT id FROM pg_session_quickstart_transfers ORDER BY id";
    const OFF_BALANCE: &str = "
        SELECT count(*)
        FROM pg_session_quickstart_accounts AS a
        LEFT JOIN (
            SELECT account, sum(cents) AS cents
            FROM (
                SELECT creditor AS account, cents FROM pg_session_quickstart_transfers
                UNION ALL
                SELECT debtor, -cents FROM pg_session_quickstart_transfers
            ) AS entries
            GROUP BY account
        ) AS moved ON moved.account = a.id
        WHERE a.cents <> $1::bigint + coalesce(moved.cents, 0)";
    let (total, logged, off_balance) = tokio::try_join!(
        db.query_one(TOTAL, &[]),
        db.query(LOGGED, &[]),
        db.query_one(OFF_BALANCE, &[&OPENING_CENTS]),
    )?;
    Ok(Books {
        total_cents: total.get(0),
        logged: logged.iter().map(|row| row.get(0)).collect(),
        off_balance: off_balance.get(0),
    })
}

/// What became of the transfers, as their callers were told.
#[derive(Default)]
struct Tally {
    committed: Vec<i64>,
    refused: usize,
    failed: BTreeMap<String, usize>,
    /// How many transfers took how many attempts.
    attempts: BTreeMap<u32, usize>,
    latencies: Vec<Duration>,
}

impl Tally {
    fn count(&mut self, id: i64, result: Result<(), TransferError>, attempts: u32, latency: Duration) {
        match result {
            Ok(()) => self.committed.push(id),
            Err(TransferError::Overdraft) => self.refused += 1,
            Err(TransferError::Database(e)) => *self.failed.entry(kind(&e)).or_default() += 1,
        }
        *self.attempts.entry(attempts).or_default() += 1;
        self.latencies.push(latency);
    }

    fn add(&mut self, other: Self) {
        self.committed.extend(other.committed);
        self.refused += other.refused;
        self.latencies.extend(other.latencies);
        for (kind, n) in other.failed {
            *self.failed.entry(kind).or_default() += n;
        }
        for (attempts, n) in other.attempts {
            *self.attempts.entry(attempts).or_default() += n;
        }
    }

    fn retries(&self) -> usize {
        self.attempts.iter().map(|(attempts, n)| attempts.saturating_sub(1) as usize * n).sum()
    }

    fn retried(&self) -> usize {
        self.attempts.iter().filter(|(attempts, _)| **attempts > 1).map(|(_, n)| n).sum()
    }

    /// The latency that this part of the transfers did not exceed. `latencies` must be sorted.
    fn percentile(&self, part: f64) -> Duration {
        let last = self.latencies.len().saturating_sub(1);
        self.latencies.get((last as f64 * part).round() as usize).copied().unwrap_or_default()
    }
}

/// A word for an error, so that errors can be counted.
fn kind(error: &Error) -> String {
    let what = match error {
        Error::RetriesExhausted { .. } => "retries exhausted",
        Error::CommitUnknown(_) => "commit unknown",
        Error::ConnectionLost(_) => "connection lost",
        Error::Connect(_) => "could not connect",
        Error::Acquire(_) => "no session free",
        Error::Aborted(_) | Error::Database(_) => "refused by the server",
        _ => "other",
    };
    match error.code() {
        Some(code) => format!("{what} ({})", code.code()),
        None => what.to_owned(),
    }
}

/// Makes all transfers, and returns what became of them and how long it took.
async fn run_transfers(sessions: &SessionManager, args: &Args) -> Result<(Tally, Duration), Failure> {
    let retry = RetryPolicy::default().max_attempts(100).max_elapsed(Duration::from_secs(120));
    // The server would read a table as small as this from end to end, even for one account; every transfer would then
    // have read what any other changes.
    let options = TransactionOptions::serializable()
        .local_setting("enable_seqscan", "off")
        .retry(retry)
        .name("transfer");
    let (transfers, accounts) = (args.transfers, args.accounts);
    let next = Arc::new(AtomicI64::new(1));
    let started = Instant::now();

    let mut tasks = JoinSet::new();
    for _ in 0..args.tasks {
        let (sessions, options, next) = (sessions.clone(), options.clone(), Arc::clone(&next));
        tasks.spawn(async move {
            let mut tally = Tally::default();
            loop {
                let id = next.fetch_add(1, Relaxed);
                if id > transfers {
                    return tally;
                }
                let order = Order::random(id, accounts);
                let attempts = AtomicU32::new(0);
                let began = Instant::now();
                let result = transfer(&sessions, options.clone(), &order, &attempts).await;
                tally.count(id, result, attempts.into_inner(), began.elapsed());
            }
        });
    }

    let mut tally = Tally::default();
    let mut progress = Progress::new(transfers);
    let mut tick = tokio::time::interval(Duration::from_millis(100));
    loop {
        tokio::select! {
            finished = tasks.join_next() => match finished {
                Some(task) => tally.add(task?),
                None => break,
            },
            _ = tick.tick() => progress.show(next.load(Relaxed) - 1, started.elapsed()),
        }
    }
    progress.show(transfers, started.elapsed());
    progress.end();
    tally.latencies.sort_unstable();
    tally.committed.sort_unstable();
    Ok((tally, started.elapsed()))
}

/// One line that is rewritten on a terminal; elsewhere a line at every tenth of the way.
struct Progress {
    total: i64,
    terminal: bool,
    shown: i64,
}

impl Progress {
    fn new(total: i64) -> Self {
        Self { total, terminal: stderr().is_terminal(), shown: 0 }
    }

    fn show(&mut self, begun: i64, elapsed: Duration) {
        let begun = begun.clamp(0, self.total);
        let step = begun * if self.terminal { 100 } else { 10 } / self.total;
        if step == self.shown {
            return;
        }
        self.shown = step;
        let rate = begun as f64 / elapsed.as_secs_f64();
        let line = format!(
            "{:3} %  {begun} of {} transfers, {rate:.0} per second",
            begun * 100 / self.total,
            self.total
        );
        // Nothing depends on whether anybody sees it.
        let _ = if self.terminal { write!(stderr(), "\r{line}\x1b[K") } else { writeln!(stderr(), "{line}") };
    }

    fn end(&self) {
        if self.terminal {
            let _ = writeln!(stderr());
        }
    }
}

fn print_table(tally: &Tally, elapsed: Duration, before: &Books, after: &Books) {
    let line = |name: &str, value: &dyn Display| println!("  {name:<26}{value:>14}");
    let ms = |latency: Duration| format!("{:.2} ms", latency.as_secs_f64() * 1e3);
    let money = |cents: i64| format!("{}.{:02}", cents / 100, cents % 100);

    println!("\ntransfers");
    line("committed", &tally.committed.len());
    line("refused (overdraft)", &tally.refused);
    for (kind, n) in &tally.failed {
        line(&format!("failed: {kind}"), n);
    }
    let all = tally.latencies.len().max(1);
    println!("attempts");
    for (attempts, n) in &tally.attempts {
        line(&format!("done at attempt {attempts}"), n);
    }
    line("transfers retried", &format!("{:.1} %", tally.retried() as f64 * 100.0 / all as f64));
    line("attempts beyond the first", &tally.retries());
    println!("speed");
    line("transfers per second", &format!("{:.0}", all as f64 / elapsed.as_secs_f64()));
    for (name, part) in [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0)] {
        line(&format!("latency {name}"), &ms(tally.percentile(part)));
    }
    println!("books");
    line("sum of balances before", &money(before.total_cents));
    line("sum of balances after", &money(after.total_cents));
    line("rows in the log", &after.logged.len());
    line("accounts off balance", &after.off_balance);
}

/// Everything that is wrong; nothing, if all is well.
fn audit(args: &Args, tally: &Tally, before: &Books, after: &Books) -> Vec<String> {
    let mut wrong = Vec::new();
    if before.total_cents != args.accounts * OPENING_CENTS {
        wrong.push("the accounts did not begin with what they should hold".to_owned());
    }
    match after.total_cents - before.total_cents {
        0 => {}
        lost @ ..0 => wrong.push(format!("{} cents are lost", -lost)),
        made => wrong.push(format!("{made} cents came out of nowhere")),
    }
    if after.logged != tally.committed {
        let (rows, committed) = (after.logged.len(), tally.committed.len());
        wrong.push(format!("the log's {rows} rows are not the {committed} transfers reported as committed"));
    }
    if after.off_balance != 0 {
        wrong.push(format!("{} accounts do not hold what the log adds up to", after.off_balance));
    }
    let failed: usize = tally.failed.values().sum();
    if failed != 0 {
        wrong.push(format!("{failed} transfers failed that were neither made nor refused"));
    }
    if tally.latencies.len() as i64 != args.transfers {
        wrong.push(format!("{} transfers were tried instead of {}", tally.latencies.len(), args.transfers));
    }
    wrong
}

/// What ends the example early.
type Failure = Box<dyn std::error::Error + Send + Sync>;

/// The configuration, and the server behind it if it is our own; that one lives as long as this value.
fn find_database() -> Result<(SessionConfig, Option<PgServer>), Failure> {
    if std::env::var_os("DATABASE_URL").is_some_and(|url| !url.is_empty()) {
        return Ok((SessionConfig::from_env()?, None));
    }
    let server = PgServer::start().map_err(|e: PgServerError| format!("no DATABASE_URL, and {e}"))?;
    Ok((server.url().parse()?, Some(server)))
}

/// Runs the whole show; returns what is wrong with its outcome.
async fn run(args: &Args) -> Result<Vec<String>, Failure> {
    let (config, server) = find_database()?;
    let sessions = SessionManager::new(config.max_size(args.max_size))?;

    let session = sessions.acquire().await?;
    let version: String = session.query_one("SHOW server_version", &[]).await?.get(0);
    let whose = if server.is_some() { "a throw-away server of this run's own" } else { "from DATABASE_URL" };
    println!("PostgreSQL {version}, {whose}");
    println!(
        "{} transfers between {} accounts by {} tasks on {} connections",
        args.transfers, args.accounts, args.tasks, args.max_size
    );
    open_accounts(&session, args.accounts).await?;
    let before = read_books(&session).await?;
    // Dropping a session gives it back.
    drop(session);

    let (tally, elapsed) = run_transfers(&sessions, args).await?;

    let session = sessions.acquire().await?;
    let after = read_books(&session).await?;
    session.batch_execute(DROP_TABLES).await?;
    drop(session);
    sessions.close().await;

    print_table(&tally, elapsed, &before, &after);
    Ok(audit(args, &tally, &before, &after))
}

#[tokio::main]
async fn main() -> ExitCode {
    let args = match Args::parse(std::env::args().skip(1)) {
        Ok(Some(args)) => args,
        Ok(None) => {
            println!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Err(why) => {
            eprintln!("quickstart: {why} (see --help)");
            return ExitCode::from(2);
        }
    };
    match run(&args).await {
        Ok(wrong) if wrong.is_empty() => {
            println!("\nnot a cent lost");
            ExitCode::SUCCESS
        }
        Ok(wrong) => {
            wrong.iter().for_each(|why| eprintln!("quickstart: {why}"));
            ExitCode::FAILURE
        }
        Err(e) => {
            eprintln!("quickstart: {}", with_causes(&*e));
            ExitCode::FAILURE
        }
    }
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |e| e.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

struct Args {
    transfers: i64,
    tasks: usize,
    accounts: i64,
    max_size: usize,
}

impl Args {
    /// `None` if help is asked for.
    fn parse(mut words: impl Iterator<Item = String>) -> Result<Option<Self>, String> {
        let mut args = Self { transfers: 50_000, tasks: 32, accounts: 500, max_size: 10 };
        while let Some(name) = words.next() {
            let mut value = || words.next().ok_or(format!("{name} wants a number"));
            match name.as_str() {
                "--transfers" => args.transfers = number(&name, &value()?, 1)?,
                "--tasks" => args.tasks = number(&name, &value()?, 1)?,
                "--accounts" => args.accounts = number(&name, &value()?, 2)?,
                "--max-size" => args.max_size = number(&name, &value()?, 1)?,
                "--help" | "-h" => return Ok(None),
                _ => return Err(format!("unknown argument {name}")),
            }
        }
        Ok(Some(args))
    }
}

fn number<N: FromStr + PartialOrd + Display>(name: &str, value: &str, least: N) -> Result<N, String> {
    let number = value.parse().ok().filter(|number| *number >= least);
    number.ok_or(format!("{name} wants a number of at least {least}, not {value}"))
}
