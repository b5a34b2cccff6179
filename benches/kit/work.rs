//! The work: schema, statements, data, and the check that what was reported as done is done.

use tokio_postgres::Client;

use super::Failure;
use super::load::Sample;

/// The connections everybody has.
pub const CONNECTIONS: usize = 8;

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// To get a connection from the pool and give it back.
    Acquire,
    /// One row by its primary key.
    Read,
    /// BEGIN, one update by primary key, COMMIT.
    Update,
    /// BEGIN, the five statements of pgbench's "TPC-B (sort of)", COMMIT.
    TpcB,
    /// Many rows in one transaction.
    Insert,
    /// A counter read and written in a SERIALIZABLE transaction, tried until it is committed.
    Counter,
}

pub const ITEMS: i32 = 100_000;

pub const READ: &str = "SELECT n FROM items WHERE id = $1";
pub const UPDATE: &str = "UPDATE items SET n = n + $1 WHERE id = $2";
pub const INSERT: &str = "INSERT INTO entries (id, name, cents) VALUES ($1, $2, $3)";
pub const COUNTER_READ: &str = "SELECT n FROM counter WHERE id = 1";
pub const COUNTER_WRITE: &str = "UPDATE counter SET n = $1 WHERE id = 1";

/// As in pgbench, whose tables they use (manual, pgbench, "What Is the “Transaction” Actually Performed in pgbench?").
pub const TPC_B: [&str; 5] = [
    "UPDATE pgbench_accounts SET abalance = abalance + $1 WHERE aid = $2",
    "SELECT abalance FROM pgbench_accounts WHERE aid = $1",
    "UPDATE pgbench_tellers SET tbalance = tbalance + $1 WHERE tid = $2",
    "UPDATE pgbench_branches SET bbalance = bbalance + $1 WHERE bid = $2",
    "INSERT INTO pgbench_history (tid, bid, aid, delta, mtime) VALUES ($1, $2, $3, $4, CURRENT_TIMESTAMP)",
];

pub const TELLERS: i32 = 10;
pub const ACCOUNTS: i32 = 100_000;

/// The parameters of one TPC-B transaction.
#[derive(Clone, Copy, Debug)]
pub struct Transfer {
    pub aid: i32,
    pub tid: i32,
    pub bid: i32,
    pub delta: i32,
}

impl Transfer {
    pub fn random(scale: i32) -> Self {
        Self {
            aid: fastrand::i32(1..=ACCOUNTS * scale),
            tid: fastrand::i32(1..=TELLERS * scale),
            bid: fastrand::i32(1..=scale),
            delta: fastrand::i32(-5000..=5000),
        }
    }
}

pub fn random_item() -> i32 {
    fastrand::i32(1..=ITEMS)
}

/// A row of `entries`.
#[derive(Clone, Debug)]
pub struct Entry {
    pub id: i64,
    pub name: String,
    pub cents: i64,
}

pub fn entries(rows: usize) -> impl ExactSizeIterator<Item = Entry> {
    (0..rows).map(|i| Entry { id: i as i64, name: format!("entry {i}"), cents: i as i64 * 7 % 10_000 })
}

impl Work {
    /// Its statements, in the order in which they are executed.
    pub fn statements(self) -> &'static [&'static str] {
        match self {
            Self::Acquire => &[],
            Self::Read => &[READ],
            Self::Update => &[UPDATE],
            Self::TpcB => &TPC_B,
            Self::Insert => &[INSERT],
            Self::Counter => &[COUNTER_READ, COUNTER_WRITE],
        }
    }

    /// Makes the tables that are needed.
    pub async fn create_tables(client: &Client, scale: i32, tpc_b: bool) -> Result<(), Failure> {
        // Room for an update in each page, as one gives it to a table that is updated a lot.
        let mut sql = format!(
            "CREATE TABLE items (id int PRIMARY KEY, n bigint NOT NULL) WITH (fillfactor = 50);
            INSERT INTO items SELECT id, 0 FROM generate_series(1, {ITEMS}) AS id;
            CREATE TABLE entries (id bigint NOT NULL, name text NOT NULL, cents bigint NOT NULL);
            CREATE TABLE counter (id int PRIMARY KEY, n bigint NOT NULL);
            INSERT INTO counter VALUES (1, 0);"
        );
        if tpc_b {
            // What `pgbench -i` makes.
            sql += &format!(
                "CREATE TABLE pgbench_branches (bid int NOT NULL, bbalance int, filler char(88));
                CREATE TABLE pgbench_tellers (tid int NOT NULL, bid int, tbalance int, filler char(84));
                CREATE TABLE pgbench_accounts (aid int NOT NULL, bid int, abalance int, filler char(84));
                CREATE TABLE pgbench_history
                    (tid int, bid int, aid int, delta int, mtime timestamp, filler char(22));
                INSERT INTO pgbench_branches SELECT i, 0 FROM generate_series(1, {scale}) AS i;
                INSERT INTO pgbench_tellers
                    SELECT i, (i - 1) / {TELLERS} + 1, 0 FROM generate_series(1, {TELLERS} * {scale}) AS i;
                INSERT INTO pgbench_accounts
                    SELECT i, (i - 1) / {ACCOUNTS} + 1, 0, '' FROM generate_series(1, {ACCOUNTS} * {scale}) AS i;
                ALTER TABLE pgbench_branches ADD PRIMARY KEY (bid);
                ALTER TABLE pgbench_tellers ADD PRIMARY KEY (tid);
                ALTER TABLE pgbench_accounts ADD PRIMARY KEY (aid);"
            );
        }
        client.batch_execute(&sql).await?;
        client.batch_execute("VACUUM ANALYZE").await?;
        Ok(())
    }

    /// Brings the tables into the state everybody finds, and notes the numbers by which the work is checked.
    pub async fn prepare(self, client: &Client) -> Result<Numbers, Failure> {
        let sql: &[&str] = match self {
            Self::Acquire | Self::Read | Self::Update => &[],
            Self::TpcB => {
                // As pgbench does it before each run.
                &["VACUUM pgbench_branches", "VACUUM pgbench_tellers", "TRUNCATE pgbench_history"]
            }
            Self::Insert => &["TRUNCATE entries"],
            // Every update leaves a dead row in the way of the next.
            Self::Counter => &["VACUUM counter"],
        };
        for sql in sql {
            client.batch_execute(sql).await?;
        }
        self.numbers(client).await
    }

    async fn numbers(self, client: &Client) -> Result<Numbers, Failure> {
        let sql = match self {
            Self::Acquire | Self::Read => return Ok(Vec::new()),
            Self::Update => "SELECT sum(n)::bigint FROM items",
            Self::TpcB => {
                "SELECT count(*), coalesce(sum(delta), 0), (SELECT sum(bbalance) FROM pgbench_branches), \
                 (SELECT sum(tbalance) FROM pgbench_tellers), (SELECT sum(abalance) FROM pgbench_accounts) \
                 FROM pgbench_history"
            }
            Self::Insert => {
                "SELECT count(*), coalesce(sum(id), 0)::bigint, coalesce(sum(cents), 0)::bigint, \
                 coalesce(sum(length(name)), 0)::bigint FROM entries"
            }
            Self::Counter => "SELECT n FROM counter",
        };
        let row = client.query_one(sql, &[]).await?;
        (0..row.len()).map(|i| Ok(row.try_get(i)?)).collect()
    }

    /// Fails unless the database holds what the sample says was done, no more and no less.
    pub async fn check(
        self,
        client: &Client,
        before: &Numbers,
        sample: &Sample,
        rows: usize,
    ) -> Result<(), Failure> {
        let after = self.numbers(client).await?;
        let grown: Numbers = after.iter().zip(before).map(|(after, before)| after - before).collect();
        let done = i64::try_from(sample.done)?;
        let expected: Numbers = match self {
            Self::Acquire | Self::Read => Vec::new(),
            Self::Update | Self::Counter => vec![done],
            // All four sums have grown by what the history says.
            Self::TpcB => [&[done][..], &[grown[1]; 4]].concat(),
            Self::Insert => {
                let once = entries(rows).fold([0; 4], |sum, entry| {
                    [
                        sum[0] + 1,
                        sum[1] + entry.id,
                        sum[2] + entry.cents,
                        sum[3] + entry.name.chars().count() as i64,
                    ]
                });
                once.iter().map(|n| n * done).collect()
            }
        };
        if grown == expected {
            return Ok(());
        }
        Err(format!("the database does not hold what was reported: grown by {grown:?}, not {expected:?}")
            .into())
    }
}

/// Counts and sums over the tables of some work.
pub type Numbers = Vec<i64>;
