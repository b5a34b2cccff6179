//! Every fault at every message: for each kind of operation, a man in the middle stops at each message in either
//! direction and does each kind of harm there. Whatever the caller is told must be what is stored; nothing may hang,
//! panic or stay open; and the same pool must serve a clean session afterwards.
//!
//! The suite does all of them in a fixed order, and some at random places inside messages. `scripts/faults` goes on with
//! those.
#![cfg(feature = "testing")]

mod common;

use std::collections::BTreeMap;
use std::env;
use std::fmt;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::middle::{At, Direction, Middle, Then};
use common::{Database, connect};
use futures_util::FutureExt;
use pg_session::{Error, RetryClass, RetryPolicy, SessionManager, TransactionOptions};
use tokio::time::{sleep_until, timeout};

/// Runs at once, each with a connection of its own.
const WORKERS: usize = 12;

/// What a caller who does not wait for ever gives an operation whose answer is stalled.
const PATIENCE: Duration = Duration::from_millis(700);

/// The crate's own limits in these tests.
const SHORT: Duration = Duration::from_millis(250);

/// No operation may take longer; a great deal for a busy machine.
const BOUND: Duration = Duration::from_secs(4);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Operation {
    Query,
    FirstQuery,
    Execute,
    QueryStream,
    CopyIn,
    CopyRowsIn,
    CopyOut,
    Closure,
    FirstClosure,
    RetriedClosure,
    Batch,
    RetriedBatch,
    BatchInside,
    ExecuteMany,
    ExecuteManyInside,
    CommitByHand,
    RollBackByHand,
    ReleaseDirty,
    Cancel,
}

const OPERATIONS: [Operation; 19] = [
    Operation::Query,
    Operation::FirstQuery,
    Operation::Execute,
    Operation::QueryStream,
    Operation::CopyIn,
    Operation::CopyRowsIn,
    Operation::CopyOut,
    Operation::Closure,
    Operation::FirstClosure,
    Operation::RetriedClosure,
    Operation::Batch,
    Operation::RetriedBatch,
    Operation::BatchInside,
    Operation::ExecuteMany,
    Operation::ExecuteManyInside,
    Operation::CommitByHand,
    Operation::RollBackByHand,
    Operation::ReleaseDirty,
    Operation::Cancel,
];

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Action {
    Fin,
    Rst,
    Stall,
    /// The server refuses this message.
    Error,
    CancelBackend,
    Terminate,
    /// The good-bye arrives, the end of the connection does not.
    TerminateWithoutFin,
    DropCaller,
}

const ACTIONS: [Action; 8] = [
    Action::Fin,
    Action::Rst,
    Action::Stall,
    Action::Error,
    Action::CancelBackend,
    Action::Terminate,
    Action::TerminateWithoutFin,
    Action::DropCaller,
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Before(usize),
    After(usize),
    Byte(usize),
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Before(n) => write!(f, "before message {n}"),
            Self::After(n) => write!(f, "after message {n}"),
            Self::Byte(n) => write!(f, "at byte {n}"),
        }
    }
}

#[derive(Clone, Copy)]
struct Case {
    operation: Operation,
    direction: Direction,
    place: Place,
    action: Action,
}

impl fmt::Debug for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { operation, direction, place, action } = self;
        write!(f, "{operation:?}, {direction:?}, {place:?}, {action:?}")
    }
}

/// What the caller knows afterwards.
#[derive(Debug)]
enum Told {
    Done,
    Refused(#[expect(dead_code, reason = "shown by Debug")] Error),
    Unknown(#[expect(dead_code, reason = "shown by Debug")] Error),
    /// It did not wait.
    Left,
    Hung,
    Panicked,
}

impl Operation {
    /// How many rows it stores, numbered from 1.
    fn rows(self) -> i32 {
        match self {
            Self::QueryStream | Self::CopyOut => 3,
            Self::ExecuteMany | Self::ExecuteManyInside => 6,
            _ => 2,
        }
    }

    /// Whatever it is told, nothing may be stored.
    fn stores_nothing(self) -> bool {
        matches!(self, Self::RollBackByHand | Self::ReleaseDirty)
    }

    /// It stops waiting by itself.
    fn leaves(self) -> bool {
        matches!(self, Self::Cancel)
    }

    async fn perform(self, sessions: &SessionManager, key: i64, judge: &Judge) -> Result<(), Error> {
        const ONE: &str = "INSERT INTO stored VALUES ($1, 1)";
        const TWO: &str = "INSERT INTO stored VALUES ($1, 2)";
        const BOTH: &str = "INSERT INTO stored VALUES ($1, 1), ($1, 2) RETURNING part";
        const PADDED: &str = "INSERT INTO stored VALUES ($1, $2, length($3::text))";
        let padded = || {
            let pad = "x".repeat(60_000); // two rows are a window
            (1..=6).map(move |part: i32| (key, part, pad.clone()))
        };
        // Runs again on another connection after one was lost: whatever happens, it is done once at most.
        let retried = || {
            let policy = RetryPolicy::default().retry_on(RetryClass::ConnectionLost);
            TransactionOptions::new().retry(policy.max_attempts(3).base_delay(Duration::from_millis(1)))
        };
        match self {
            Self::RetriedClosure => {
                return sessions
                    .transaction_with(retried(), async |tx| {
                        tx.execute(ONE, &[&key]).await?;
                        tx.execute(TWO, &[&key]).await.map(drop)
                    })
                    .await;
            }
            Self::RetriedBatch => {
                let mut batch = sessions.batch_with(retried());
                return batch.push(ONE, (key,)).push(TWO, (key,)).run().await.map(drop);
            }
            _ => {}
        }
        let mut session = sessions.acquire().await?;
        match self {
            Self::RetriedClosure | Self::RetriedBatch => unreachable!("done above"),
            Self::Query => session.query(BOTH, &[&key]).await.map(drop),
            Self::FirstQuery => session.query(&format!("{BOTH} /* {key} */"), &[&key]).await.map(drop),
            Self::Execute => session.execute(BOTH, &[&key]).await.map(drop),
            Self::QueryStream => {
                let sql = "INSERT INTO stored SELECT $1, n FROM generate_series(1, 3) n \
                           RETURNING repeat('x', 3000)";
                let mut rows = session.query_stream(sql, &[&key]).await?;
                while let Some(row) = rows.next().await {
                    row?;
                }
                Ok(())
            }
            Self::CopyIn => {
                let mut copy = session.copy_in("COPY stored (key, part) FROM STDIN").await?;
                for part in 1..=2 {
                    copy.send(Bytes::from(format!("{key}\t{part}\n"))).await?;
                }
                copy.finish().await.map(drop)
            }
            Self::CopyRowsIn => {
                let rows = [(key, 1i32), (key, 2)];
                session.copy_rows_in("stored", &["key", "part"]).send(rows).await.map(drop)
            }
            Self::CopyOut => {
                let sql = format!(
                    "COPY (INSERT INTO stored SELECT {key}, n FROM generate_series(1, 3) n \
                     RETURNING repeat('x', 3000)) TO STDOUT"
                );
                let mut data = session.copy_out(&sql).await?;
                while let Some(data) = data.next().await {
                    data?;
                }
                Ok(())
            }
            Self::Closure => {
                session
                    .transaction(async |tx| {
                        tx.execute(ONE, &[&key]).await?;
                        tx.savepoint(async |sp| sp.execute(TWO, &[&key]).await.map(drop)).await
                    })
                    .await
            }
            Self::FirstClosure => {
                let [one, two] = [ONE, TWO].map(|sql| format!("{sql} /* {key} */"));
                session
                    .transaction(async |tx| {
                        tx.execute(&one, &[&key]).await?;
                        tx.savepoint(async |sp| sp.execute(&two, &[&key]).await.map(drop)).await
                    })
                    .await
            }
            Self::Batch => session.batch().push(ONE, (key,)).push(TWO, (key,)).run().await.map(drop),
            Self::BatchInside => {
                session
                    .transaction(async |tx| {
                        tx.batch().push(ONE, (key,)).push(TWO, (key,)).run().await.map(drop)
                    })
                    .await
            }
            Self::ExecuteMany => session.execute_many(PADDED, padded()).await.map(drop),
            Self::ExecuteManyInside => {
                session.transaction(async |tx| tx.execute_many(PADDED, padded()).await.map(drop)).await
            }
            Self::CommitByHand => {
                let tx = session.begin().await?;
                tx.execute(ONE, &[&key]).await?;
                tx.execute(TWO, &[&key]).await?;
                tx.commit().await
            }
            Self::RollBackByHand => {
                let tx = session.begin().await?;
                tx.execute(ONE, &[&key]).await?;
                tx.execute(TWO, &[&key]).await?;
                tx.rollback().await;
                Ok(())
            }
            Self::ReleaseDirty => {
                session.execute("SET lock_timeout = 5000", &[]).await?;
                session.batch_execute(&format!("BEGIN; INSERT INTO stored VALUES ({key}, 1)")).await
            }
            Self::Cancel => {
                let pid = session.process_id();
                let sql = "INSERT INTO stored SELECT $1, n FROM generate_series(1, 2) n, pg_sleep(1.5)";
                let params: [&(dyn postgres_types::ToSql + Sync); 1] = [&key];
                tokio::select! {
                    told = session.execute(sql, &params) => told.map(drop),
                    () = judge.until_sleeping(pid) => Ok(()),
                }
            }
        }
    }
}

/// Looks at the server without the man in the middle.
struct Judge {
    client: tokio_postgres::Client,
    application: String,
}

impl Judge {
    async fn says(&self, condition: &str) -> bool {
        self.client.query_one(&format!("SELECT {condition}"), &[]).await.expect(condition).get(0)
    }

    /// Asks again and again; `false` if it never becomes true.
    async fn until(&self, condition: &str) -> bool {
        let started = Instant::now();
        while !self.says(condition).await {
            if started.elapsed() > Duration::from_secs(8) {
                return false;
            }
            // So that a dozen judges leave the machine to what they judge.
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        true
    }

    async fn until_sleeping(&self, pid: i32) {
        let sleeping =
            format!("EXISTS (SELECT FROM pg_stat_activity WHERE pid = {pid} AND wait_event = 'PgSleep')");
        self.until(&sleeping).await;
    }

    async fn terminate(&self, pid: i32) {
        self.client.query_one(&format!("SELECT pg_terminate_backend({pid})"), &[]).await.expect("asked");
        self.until(&format!("NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = {pid})")).await;
    }

    async fn cancel(&self, pid: i32) {
        self.client.query_one(&format!("SELECT pg_cancel_backend({pid})"), &[]).await.expect("asked");
    }

    /// This worker's backends; another test on the same server has workers of the same names.
    fn own(&self) -> String {
        format!("datname = current_database() AND application_name = '{}'", self.application)
    }

    /// No backend of this worker's runs anything or is in a transaction.
    async fn until_quiet(&self) -> bool {
        let busy =
            format!("NOT EXISTS (SELECT FROM pg_stat_activity WHERE {} AND state <> 'idle')", self.own());
        self.until(&busy).await
    }

    /// So many connections of this worker's are left.
    async fn until_at_most(&self, connections: i32) -> bool {
        let alone = format!("count(*) <= {connections} FROM pg_stat_activity WHERE {}", self.own());
        self.until(&alone).await
    }

    async fn stored(&self, key: i64) -> Vec<i32> {
        let sql = "SELECT part FROM stored WHERE key = $1 ORDER BY part";
        let rows = self.client.query(sql, &[&key]).await.expect("rows");
        rows.iter().map(|row| row.get(0)).collect()
    }
}

struct Worker {
    middle: Middle,
    sessions: SessionManager,
    judge: Judge,
    keys: Arc<AtomicI64>,
    /// On which connection which operation was done before.
    warm: Option<(i32, Operation)>,
}

impl Worker {
    async fn new(db: &Database, number: usize, keys: &Arc<AtomicI64>) -> Self {
        let middle = Middle::start().await;
        let application = format!("faults_{number}");
        let config = middle.config(db);
        let config = config
            .max_size(1)
            .application_name(application.clone())
            .acquire_timeout(Duration::from_secs(5))
            .connect_timeout(Duration::from_secs(2))
            .commit_timeout(SHORT)
            .cleanup_timeout(SHORT);
        let sessions = SessionManager::new(config).expect("a configuration");
        let client = connect(db.database.url()).await;
        let judge = Judge { client, application };
        Self { middle, sessions, judge, keys: Arc::clone(keys), warm: None }
    }

    fn key(&self) -> i64 {
        self.keys.fetch_add(1, SeqCst)
    }

    /// Does the operation without faults, until this connection has done it before.
    async fn warm(&mut self, operation: Operation) -> Result<(), String> {
        self.middle.disarm();
        for _ in 0..4 {
            let pid = match timeout(BOUND, self.sessions.acquire()).await {
                Ok(Ok(session)) => session.process_id(),
                Ok(Err(e)) => return Err(format!("no session: {e:?}")),
                Err(_) => return Err("no session, and no error".into()),
            };
            if self.warm == Some((pid, operation)) {
                return Ok(());
            }
            // Twice, for what is kept from the second time on.
            for key in [self.key(), self.key()] {
                let work = operation.perform(&self.sessions, key, &self.judge);
                match timeout(BOUND, work).await {
                    Ok(Ok(())) => {}
                    Ok(Err(e)) => return Err(format!("without a fault: {e:?}")),
                    Err(_) => return Err("without a fault: it hangs".into()),
                }
            }
            self.warm = Some((pid, operation));
        }
        Err("its connection never lives long".into())
    }

    /// How many messages, and bytes, pass in either direction.
    async fn learn(&mut self, operation: Operation) -> ([usize; 2], [usize; 2]) {
        self.warm(operation).await.expect("warm");
        self.middle.disarm();
        let key = self.key();
        operation.perform(&self.sessions, key, &self.judge).await.expect("no fault");
        drop(self.sessions.acquire().await.expect("returned"));
        (self.middle.messages(), self.middle.bytes())
    }

    /// What is wrong with how this case went, if anything; and whether its place was reached.
    async fn run(&mut self, case: Case) -> (bool, Option<String>) {
        if let Err(e) = self.warm(case.operation).await {
            return (false, Some(e));
        }
        let key = self.key();
        let at = match case.place {
            Place::Before(n) => At::Before(n),
            Place::After(n) => At::After(n),
            Place::Byte(n) => At::Byte(n),
        };
        self.middle.arm(case.direction, at);
        self.middle.withhold_fin(case.action == Action::TerminateWithoutFin);
        let (reached, told) = self.told(case, key).await;
        let mut wrongs = Vec::new();
        if !self.judge.until_quiet().await {
            wrongs.push("something stays open".to_owned());
        }
        let stored = self.judge.stored(key).await;
        let all = stored == (1..=case.operation.rows()).collect::<Vec<_>>();
        let right = match told {
            Told::Hung | Told::Panicked => false,
            _ if case.operation.stores_nothing() => stored.is_empty(),
            Told::Done if case.operation.leaves() => all || stored.is_empty(),
            Told::Done => all,
            Told::Refused(_) => stored.is_empty(),
            Told::Unknown(_) | Told::Left => all || stored.is_empty(),
        };
        if !right {
            wrongs.push(format!("told {told:?}, stored {stored:?}"));
        }
        self.middle.disarm();
        if case.action == Action::Stall {
            // A connection that stays silent for ever is nothing that the next borrower could be spared.
            self.middle.cut_all();
            self.judge.until_at_most(0).await;
        }
        if let Err(e) = self.serves().await {
            wrongs.push(e);
        }
        (reached, (!wrongs.is_empty()).then(|| wrongs.join("; ")))
    }

    /// Does the operation, and the harm where its place is reached; then waits until its session is back.
    async fn told(&mut self, case: Case, key: i64) -> (bool, Told) {
        let stalls = case.action == Action::Stall;
        let end = tokio::time::Instant::now() + if stalls { PATIENCE } else { BOUND };
        let mut reached = false;
        let work = case.operation.perform(&self.sessions, key, &self.judge);
        let mut work = Box::pin(AssertUnwindSafe(work).catch_unwind());
        let told = loop {
            tokio::select! {
                ended = &mut work => break match ended {
                    Ok(Ok(())) => Told::Done,
                    Ok(Err(e)) if e.is_outcome_unknown() || matches!(e, Error::TransactionEnded) => {
                        Told::Unknown(e)
                    }
                    Ok(Err(e)) => Told::Refused(e),
                    Err(_) => Told::Panicked,
                },
                stop = self.middle.stop() => {
                    reached = true;
                    if case.action == Action::DropCaller {
                        drop(work);
                        stop.then(Then::Pass);
                        break Told::Left;
                    }
                    let then = self.judge.act(case.action, stop.pid).await;
                    stop.then(then);
                }
                () = sleep_until(end) => {
                    drop(work);
                    break if stalls { Told::Left } else { Told::Hung };
                }
            }
        };
        let mut back = pin!(timeout(BOUND, self.sessions.acquire()));
        loop {
            tokio::select! {
                _ = &mut back => break,
                stop = self.middle.stop() => {
                    reached = true;
                    let then = self.judge.act(case.action, stop.pid).await;
                    stop.then(then);
                }
            }
        }
        (reached, told)
    }

    /// Whether the same pool serves a clean session, now that nothing goes wrong any more.
    async fn serves(&mut self) -> Result<(), String> {
        let (key, judge) = (self.key(), &self.judge);
        let serve = async {
            let sql = "SELECT pg_backend_pid(), current_setting('lock_timeout')";
            let mut session = self.sessions.acquire().await?;
            let row = match session.query_one(sql, &[]).await {
                // An idle connection may be lost at any moment; the next one is not.
                Err(e) if e.is_connection_lost() => {
                    drop(session);
                    session = self.sessions.acquire().await?;
                    session.query_one(sql, &[]).await?
                }
                row => row?,
            };
            let stored = session.execute("INSERT INTO stored VALUES ($1, 1)", &[&key]).await?;
            Ok::<_, Error>((session, row.get::<_, i32>(0), row.get::<_, String>(1), stored))
        };
        let served = timeout(BOUND, serve).await.map_err(|_| "afterwards: it hangs".to_owned())?;
        let (session, pid, limit, stored) = served.map_err(|e| format!("afterwards: {e:?}"))?;
        let idle = format!("EXISTS (SELECT FROM pg_stat_activity WHERE pid = {pid} AND state = 'idle')");
        if session.process_id() != pid || limit != "0" || stored != 1 || !judge.until(&idle).await {
            return Err(format!("afterwards: not clean: {limit:?}, {stored}"));
        }
        if judge.stored(key).await != [1] {
            return Err("afterwards: told that it is stored, and it is not".into());
        }
        drop(session);
        if !judge.until_at_most(1).await {
            return Err("afterwards: connections are left".into());
        }
        Ok(())
    }
}

impl Judge {
    async fn act(&self, action: Action, pid: i32) -> Then {
        match action {
            Action::Fin => return Then::Fin,
            Action::Rst => return Then::Rst,
            Action::Stall => return Then::Stall,
            Action::Error => return Then::Refuse,
            Action::CancelBackend => self.cancel(pid).await,
            Action::Terminate | Action::TerminateWithoutFin => self.terminate(pid).await,
            Action::DropCaller => {}
        }
        Then::Pass
    }
}

async fn database() -> Database {
    let db = Database::new().await;
    db.run(
        "CREATE TABLE stored (key bigint, part int, pad int);
         CREATE INDEX ON stored (key)",
    )
    .await;
    db
}

type Lengths = BTreeMap<Operation, ([usize; 2], [usize; 2])>;

async fn learn(worker: &mut Worker) -> Lengths {
    let mut lengths = BTreeMap::new();
    for operation in OPERATIONS {
        lengths.insert(operation, worker.learn(operation).await);
    }
    lengths
}

#[derive(Default)]
struct Report {
    /// By operation and action: cases, and how many of them never came to their place.
    counts: BTreeMap<(Operation, Action), (usize, usize)>,
    wrongs: BTreeMap<usize, String>,
}

impl Report {
    fn add(&mut self, number: usize, case: Case, (reached, wrong): (bool, Option<String>)) {
        let (cases, missed) = self.counts.entry((case.operation, case.action)).or_default();
        *cases += 1;
        *missed += usize::from(!reached);
        if let Some(wrong) = wrong {
            let wrong = format!("{case:?}: {wrong}");
            println!("WRONG {wrong}");
            self.wrongs.insert(number, wrong);
        }
    }

    fn print(&self) {
        let (mut all, mut missed) = (0, 0);
        for operation in OPERATIONS {
            let of = |action: &Action| self.counts.get(&(operation, *action)).copied().unwrap_or_default();
            let line: Vec<_> = ACTIONS.iter().map(|action| format!("{action:?} {}", of(action).0)).collect();
            let cases: usize = ACTIONS.iter().map(|action| of(action).0).sum();
            let passed_by: usize = ACTIONS.iter().map(|action| of(action).1).sum();
            println!("{operation:?}: {cases} cases ({}), {passed_by} not reached", line.join(", "));
            all += cases;
            missed += passed_by;
        }
        println!("{all} cases in all, {missed} never came to their place, {} wrong", self.wrongs.len());
    }

    fn assert_right(&self) {
        self.print();
        let wrongs: Vec<&str> = self.wrongs.values().map(String::as_str).collect();
        assert!(wrongs.is_empty(), "{} wrong:\n{}", wrongs.len(), wrongs.join("\n"));
    }
}

/// Every place of every operation, with every action.
fn every_case(lengths: &Lengths) -> Vec<Case> {
    let mut cases = Vec::new();
    for (&operation, (messages, _)) in lengths {
        for direction in [Direction::ToServer, Direction::ToClient] {
            let count = messages[direction as usize];
            let before = (0..count).map(Place::Before);
            for place in before.chain([Place::After(count - 1)]) {
                for action in ACTIONS {
                    // Only a request can be refused.
                    if action != Action::Error
                        || direction == Direction::ToServer && place != Place::After(count - 1)
                    {
                        cases.push(Case { operation, direction, place, action });
                    }
                }
            }
        }
    }
    cases
}

/// Has the workers do what `next` gives them, until it gives nothing.
async fn work(
    db: &Arc<Database>,
    next: impl Fn() -> Option<(usize, Case)> + Send + Sync + 'static,
) -> Report {
    let report = Arc::new(Mutex::new(Report::default()));
    let keys = Arc::new(AtomicI64::new(1_000_000));
    let next = Arc::new(next);
    let tasks: Vec<_> = (0..WORKERS)
        .map(|number| {
            let (db, keys) = (Arc::clone(db), Arc::clone(&keys));
            let (next, report) = (Arc::clone(&next), Arc::clone(&report));
            tokio::spawn(async move {
                let mut worker = Worker::new(&db, number, &keys).await;
                while let Some((number, case)) = next() {
                    let result = worker.run(case).await;
                    if result.1.is_some() {
                        // One that went wrong must not tell on the next.
                        worker = Worker::new(&db, number_of(&worker), &keys).await;
                    }
                    report.lock().unwrap().add(number, case, result);
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.expect("a worker");
    }
    Arc::into_inner(report).expect("all workers are done").into_inner().unwrap()
}

/// The same worker's number, with a mark: what its connections leave open is not the next one's.
fn number_of(worker: &Worker) -> usize {
    let digits: String = worker.judge.application.chars().filter(char::is_ascii_digit).collect();
    digits.parse::<usize>().expect("a number") + WORKERS
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_goes_wrong_at_any_message_the_caller_is_told_what_is_so() {
    let started = Instant::now();
    let db = Arc::new(database().await);
    let lengths = learn(&mut Worker::new(&db, WORKERS * 1000, &Arc::new(AtomicI64::new(0))).await).await;
    println!(
        "messages to the server and to the client: {:?}",
        lengths.iter().map(|(o, l)| (o, l.0)).collect::<Vec<_>>()
    );
    let cases = every_case(&lengths);
    let done = AtomicUsize::new(0);
    let report = work(&db, move || {
        let number = done.fetch_add(1, SeqCst);
        cases.get(number).map(|case| (number, *case))
    })
    .await;
    println!("{:?}", started.elapsed());
    report.assert_right();
}

/// How many random cases the suite does; `scripts/faults` sets FAULTS_MINUTES instead, and FAULTS_SEED.
const RANDOM_CASES: usize = 400;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_goes_wrong_at_any_byte_the_caller_is_told_what_is_so() {
    let number = |name: &str| env::var(name).ok().map(|value| value.parse::<f64>().expect("a number"));
    let minutes = number("FAULTS_MINUTES");
    let seed = number("FAULTS_SEED").map_or(1, |seed| seed as u64);
    println!("seed {seed}");
    let db = Arc::new(database().await);
    let lengths = learn(&mut Worker::new(&db, WORKERS * 1000, &Arc::new(AtomicI64::new(0))).await).await;
    let end = minutes.map(|minutes| Instant::now() + Duration::from_secs_f64(minutes * 60.0));
    let random = Mutex::new((0, fastrand::Rng::with_seed(seed)));
    let report = work(&db, move || {
        let (done, rng) = &mut *random.lock().unwrap();
        if end.map_or(*done == RANDOM_CASES, |end| Instant::now() > end) {
            return None;
        }
        *done += 1;
        let operation = OPERATIONS[rng.usize(..OPERATIONS.len())];
        let direction = [Direction::ToServer, Direction::ToClient][rng.usize(..2)];
        let (messages, bytes) = lengths[&operation];
        let action = ACTIONS[rng.usize(..ACTIONS.len())];
        // The long ones are mostly one long message.
        let (place, direction) = match action {
            Action::Error => (Place::Before(rng.usize(..messages[0])), Direction::ToServer),
            _ if rng.bool() => (Place::Before(rng.usize(..messages[direction as usize])), direction),
            _ => (Place::Byte(rng.usize(..bytes[direction as usize])), direction),
        };
        Some((*done, Case { operation, direction, place, action }))
    })
    .await;
    println!("seed {seed}");
    report.assert_right();
}
