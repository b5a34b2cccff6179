//! pgbench with prepared statements: the same scripts in C.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;

use tokio::process::Command;

use super::psql::program;
use crate::kit::Failure;
use crate::kit::contender::{Contender, Running, Turn, Way};
use crate::kit::load::Sample;
use crate::kit::work::{ACCOUNTS, CONNECTIONS, ITEMS, READ, TELLERS, TPC_B, UPDATE, Work};

pub struct Pgbench {
    program: PathBuf,
}

impl Pgbench {
    pub fn find() -> Option<Self> {
        Some(Self { program: program("pgbench")? })
    }
}

impl Contender for Pgbench {
    fn name(&self) -> &'static str {
        "pgbench"
    }

    fn ways(&self, work: Work) -> Vec<Way> {
        match work {
            Work::Read | Work::Update | Work::TpcB => vec![Way::yardstick("-M prepared")],
            Work::Acquire | Work::Insert | Work::Counter => Vec::new(),
        }
    }

    fn run<'a>(&'a self, turn: &'a Turn) -> Running<'a> {
        Box::pin(self.measure(turn))
    }
}

impl Pgbench {
    async fn measure(&self, turn: &Turn) -> Result<Sample, Failure> {
        let mut file = tempfile::NamedTempFile::new()?;
        file.write_all(script(turn)?.as_bytes())?;
        // It counts whole seconds, and knows no queue for its connections.
        let seconds = turn.load.time.as_secs_f64().round().max(1.0);
        let clients = turn.load.tasks.min(CONNECTIONS);
        let mut command = Command::new(&self.program);
        command.args(["-n", "-M", "prepared", "-c", &clients.to_string(), "-j", &clients.min(2).to_string()]);
        command.args(["-T", &seconds.to_string(), "-f"]).arg(file.path());
        super::psql::connect(&mut command, &turn.target);
        let output = super::psql::output(command.arg(&turn.target.dbname)).await?;
        let done = number(&output, "number of transactions actually processed:")?;
        let rate = number(&output, "tps =")?;
        Ok(Sample::outer(done as u64, rate))
    }
}

/// The statements with pgbench's variables for parameters.
fn script(turn: &Turn) -> Result<String, Failure> {
    let fill = |sql: &str, names: &[&str]| {
        let filled = names
            .iter()
            .enumerate()
            .fold(sql.to_owned(), |sql, (i, name)| sql.replace(&format!("${}", i + 1), &format!(":{name}")));
        filled + ";\n"
    };
    let scale = turn.scale;
    let mut script = String::new();
    match turn.work {
        Work::Read => {
            writeln!(script, "\\set id random(1, {ITEMS})")?;
            script += &fill(READ, &["id"]);
        }
        Work::Update => {
            writeln!(script, "\\set id random(1, {ITEMS})\n\\set n 1\nBEGIN;")?;
            script += &fill(UPDATE, &["n", "id"]);
            script += "COMMIT;\n";
        }
        Work::TpcB => {
            writeln!(script, "\\set aid random(1, {})", ACCOUNTS * scale)?;
            writeln!(script, "\\set tid random(1, {})", TELLERS * scale)?;
            writeln!(script, "\\set bid random(1, {scale})\n\\set delta random(-5000, 5000)\nBEGIN;")?;
            script += &fill(TPC_B[0], &["delta", "aid"]);
            script += &fill(TPC_B[1], &["aid"]);
            script += &fill(TPC_B[2], &["delta", "tid"]);
            script += &fill(TPC_B[3], &["delta", "bid"]);
            script += &fill(TPC_B[4], &["tid", "bid", "aid", "delta"]);
            script += "COMMIT;\n";
        }
        Work::Acquire | Work::Insert | Work::Counter => return Err(turn.unknown()),
    }
    Ok(script)
}

/// The number that follows a label in pgbench's report.
fn number(output: &str, label: &str) -> Result<f64, Failure> {
    let rest = output.split(label).nth(1).ok_or_else(|| format!("no {label:?} in: {output}"))?;
    let digits: String = rest.trim_start().chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect();
    Ok(digits.parse()?)
}
