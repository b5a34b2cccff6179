//! psql's `\copy`, timed by psql itself; and how PostgreSQL's own programs are found and started.

use std::env;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use tokio::process::Command;

use crate::kit::Failure;
use crate::kit::contender::{Contender, Running, Turn, Way};
use crate::kit::load::Sample;
use crate::kit::server::Target;
use crate::kit::work::{Work, entries};

/// How many copies are made: the first is not measured.
const COPIES: usize = 6;

pub struct Psql {
    program: PathBuf,
}

impl Psql {
    pub fn find() -> Option<Self> {
        Some(Self { program: program("psql")? })
    }
}

impl Contender for Psql {
    fn name(&self) -> &'static str {
        "psql"
    }

    fn ways(&self, work: Work) -> Vec<Way> {
        if work == Work::Insert { vec![Way::yardstick("\\copy")] } else { Vec::new() }
    }

    fn run<'a>(&'a self, turn: &'a Turn) -> Running<'a> {
        Box::pin(self.measure(turn))
    }
}

impl Psql {
    async fn measure(&self, turn: &Turn) -> Result<Sample, Failure> {
        let mut rows = tempfile::NamedTempFile::new()?;
        for entry in entries(turn.rows) {
            writeln!(rows, "{}\t{}\t{}", entry.id, entry.name, entry.cents)?;
        }
        rows.flush()?;
        let mut script = tempfile::NamedTempFile::new()?;
        writeln!(script, "\\timing on")?;
        for _ in 0..COPIES {
            writeln!(script, "\\copy entries (id, name, cents) FROM '{}'", rows.path().display())?;
        }
        let mut command = Command::new(&self.program);
        command
            .args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", &turn.target.dbname, "-f"])
            .arg(script.path());
        connect(&mut command, &turn.target);
        let output = output(&mut command).await?;
        let times =
            output.lines().filter_map(|line| line.strip_prefix("Time: ")?.split(' ').next()?.parse().ok());
        let times: Vec<f64> = times.collect();
        if times.len() != COPIES {
            return Err(format!("psql timed {} copies of {COPIES}: {output}", times.len()).into());
        }
        let measured = &times[1..];
        let seconds = measured.iter().sum::<f64>() / 1e3;
        let mut sample = Sample::outer(COPIES as u64, measured.len() as f64 / seconds);
        sample.latencies = measured.iter().map(|milliseconds| milliseconds / 1e3).collect();
        sample.latencies.sort_by(f64::total_cmp);
        Ok(sample)
    }
}

/// Beside the server's programs, or else in `PATH`.
pub fn program(name: &str) -> Option<PathBuf> {
    let beside = env::var_os("PG_SESSION_PG_BIN").map(|directory| Path::new(&directory).join(name));
    let path = env::var_os("PATH").unwrap_or_default();
    let in_path = env::split_paths(&path).map(|directory| directory.join(name)).collect::<Vec<_>>();
    beside.into_iter().chain(in_path).find(|program| program.is_file())
}

/// Says where the server is, as libpq's programs take it. The database is named by the caller: each has a way of its own.
pub fn connect(command: &mut Command, target: &Target) {
    command.args(["-h", &target.address.ip().to_string(), "-p", &target.address.port().to_string()]);
    command.args(["-U", &target.user]).env("PGSSLMODE", "disable").env("LC_ALL", "C");
    if let Some(password) = &target.password {
        command.env("PGPASSWORD", password);
    }
}

/// What the program prints, or what it complained of.
pub async fn output(command: &mut Command) -> Result<String, Failure> {
    let output = command.kill_on_drop(true).output().await?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(text);
    }
    Err(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim()).into())
}
