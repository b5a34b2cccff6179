//! The sections of the table: which work, by how many tasks, how far from the server.

use super::arguments::Plan;
use super::proxy::DELAY;
use super::work::{CONNECTIONS, Work};

/// Names for `--only`.
pub const NAMES: [&str; 8] = ["acquire", "read", "update", "tpcb", "insert", "counter", "tasks", "fairness"];

#[derive(Clone, Debug)]
pub struct Section {
    /// Of `NAMES`.
    pub name: &'static str,
    pub work: Work,
    pub tasks: usize,
    pub delayed: bool,
    /// How many rows an insert stores.
    pub rows: usize,
}

impl Section {
    pub fn all(plan: &Plan) -> Vec<Self> {
        let section = |name, work, tasks| Self { name, work, tasks, delayed: false, rows: plan.rows };
        let tasks = |own| plan.tasks.unwrap_or(own);
        let near = [
            section("acquire", Work::Acquire, tasks(1)),
            section("read", Work::Read, tasks(64)),
            section("update", Work::Update, tasks(64)),
            section("tpcb", Work::TpcB, tasks(64)),
            section("insert", Work::Insert, tasks(1)),
            section("counter", Work::Counter, tasks(32)),
        ];
        let sweep = plan.sweep.iter().map(|tasks| section("tasks", Work::Read, *tasks));
        let fairness = section("fairness", Work::Read, 1000);
        let both = near.into_iter().chain(sweep).chain([fairness]).flat_map(|near| {
            let far = Self { delayed: true, rows: plan.delayed_rows, ..near.clone() };
            [near, far]
        });
        both.filter(|section| plan.wants(section.name)).collect()
    }

    pub fn title(&self) -> String {
        let work = match (self.name, self.work) {
            ("fairness", _) => "fairness: point read".to_owned(),
            (_, Work::Acquire) => "acquire and release".to_owned(),
            (_, Work::Read) => "point read".to_owned(),
            (_, Work::Update) => "transaction of one update".to_owned(),
            (_, Work::TpcB) => "TPC-B-like transaction".to_owned(),
            (_, Work::Insert) => format!("insert of {} rows", self.rows),
            (_, Work::Counter) => "contended SERIALIZABLE counter".to_owned(),
        };
        let tasks = if self.tasks == 1 { "1 task".to_owned() } else { format!("{} tasks", self.tasks) };
        format!("{work}, {tasks} on {CONNECTIONS} connections{}", self.distance())
    }

    /// Behind a title: how far away the server is.
    pub fn distance(&self) -> String {
        if self.delayed { format!(", {} ms each way", DELAY.as_secs_f64() * 1e3) } else { String::new() }
    }

    /// What a rate counts.
    pub fn unit(&self) -> &'static str {
        match self.work {
            Work::Acquire => "acquires/s",
            Work::Read => "reads/s",
            Work::Update | Work::TpcB => "transactions/s",
            Work::Insert => "rows/s",
            Work::Counter => "increments/s",
        }
    }

    /// How many of its units one operation is.
    pub fn units(&self) -> f64 {
        if self.work == Work::Insert { self.rows as f64 } else { 1.0 }
    }

    /// A name for a file.
    pub fn slug(&self) -> String {
        let far = if self.delayed { "-delayed" } else { "" };
        let tasks = if self.name == "tasks" { format!("-{}", self.tasks) } else { String::new() };
        format!("{}{tasks}{far}", self.name)
    }
}
