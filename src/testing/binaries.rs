//! Where the server programs of this machine are, and which version they have.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use super::{PgServerError, process};

const OLDEST: u32 = 14;

/// How long `postgres --version` and `pg_config --bindir` may take: they only print a line.
const ASK_LIMIT: Duration = Duration::from_secs(10);

/// Where packages put the programs: a directory, how its entries begin, and what of them holds the programs.
const USUAL: [(&str, &str, &str); 5] = [
    ("/usr/lib/postgresql", "", "bin"),
    ("/usr", "pgsql-", "bin"),
    ("/opt/homebrew/opt", "postgresql@", "bin"),
    ("/usr/local/opt", "postgresql@", "bin"),
    ("/Applications/Postgres.app/Contents/Versions", "", "bin"),
];

/// A directory that holds `initdb` and `postgres` of a supported version.
#[derive(Debug)]
pub(super) struct Binaries {
    dir: PathBuf,
    pub(super) version: u32,
}

impl Binaries {
    pub(super) fn initdb(&self) -> PathBuf {
        self.dir.join("initdb")
    }

    pub(super) fn postgres(&self) -> PathBuf {
        self.dir.join("postgres")
    }

    /// Finds the programs: in `explicit`, else in `PG_SESSION_PG_BIN`, else wherever this machine has them.
    pub(super) fn find(explicit: Option<&Path>) -> Result<Self, PgServerError> {
        // An empty variable counts as unset, so that a script's empty answer can be passed on as it is.
        let from_env = || env::var_os("PG_SESSION_PG_BIN").filter(|dir| !dir.is_empty()).map(PathBuf::from);
        if let Some(dir) = explicit.map(Path::to_owned).or_else(from_env) {
            let not_found = || PgServerError::NotFound { places: vec![dir.display().to_string()] };
            return Self::examine(&dir)?.ok_or_else(not_found);
        }

        let mut search = Search::default();
        let path = env::var_os("PATH").unwrap_or_default();
        let found = env::split_paths(&path)
            .find_map(|dir| search.visit(&dir, dir.display().to_string()))
            .or_else(|| search.visit(&pg_config_bindir()?, "pg_config --bindir".to_owned()))
            .or_else(|| USUAL.into_iter().find_map(|place| search.visit_usual(place)));
        found.ok_or_else(|| search.into_error())
    }

    /// What `dir` holds: `None` if it lacks a program, an error if its programs do not do.
    fn examine(dir: &Path) -> Result<Option<Self>, PgServerError> {
        let Ok(postgres) = dir.join("postgres").canonicalize() else { return Ok(None) };
        // The programs find their libraries and each other from the directory they really are in.
        let real = postgres.parent().filter(|real| real.join("initdb").is_file());
        let dir = match real {
            Some(real) => real.to_owned(),
            None if dir.join("initdb").is_file() => dir.to_owned(),
            None => return Ok(None),
        };

        let doing = || format!("run {} --version", postgres.display());
        let output = process::output(Command::new(&postgres).arg("--version"), ASK_LIMIT)
            .map_err(PgServerError::io(doing()))?;
        let found = output.split_once("(PostgreSQL) ").and_then(|(_, rest)| rest.split_whitespace().next());
        let major = found.and_then(leading_number);
        match (found, major) {
            (_, Some(version)) if version >= OLDEST => Ok(Some(Self { dir, version })),
            (Some(found), Some(_)) => Err(PgServerError::TooOld { found: found.to_owned(), path: dir }),
            _ => Err(PgServerError::io(doing())(std::io::Error::other(format!(
                "it is not PostgreSQL's: it printed {:?}",
                output.trim()
            )))),
        }
    }
}

/// A search that remembers where it has been, and the first programs that would not do.
#[derive(Default)]
struct Search {
    places: Vec<String>,
    unfit: Option<PgServerError>,
}

impl Search {
    fn visit(&mut self, dir: &Path, place: String) -> Option<Binaries> {
        self.places.push(place);
        Binaries::examine(dir).unwrap_or_else(|error| {
            self.unfit.get_or_insert(error);
            None
        })
    }

    fn visit_usual(&mut self, (parent, prefix, suffix): (&str, &str, &str)) -> Option<Binaries> {
        let pattern = format!("{parent}/{prefix}*/{suffix}");
        let mut versions: Vec<_> = fs::read_dir(parent)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| {
                Some((leading_number(entry.file_name().to_str()?.strip_prefix(prefix)?)?, entry))
            })
            .collect();
        versions.sort_by_key(|(version, _)| std::cmp::Reverse(*version));
        let found =
            versions.iter().find_map(|(_, entry)| self.visit(&entry.path().join(suffix), pattern.clone()));
        if versions.is_empty() {
            self.places.push(pattern);
        }
        found
    }

    fn into_error(mut self) -> PgServerError {
        self.places.dedup();
        self.unfit.unwrap_or(PgServerError::NotFound { places: self.places })
    }
}

fn pg_config_bindir() -> Option<PathBuf> {
    let output = process::output(Command::new("pg_config").arg("--bindir"), ASK_LIMIT).ok()?;
    Some(PathBuf::from(output.trim_end()))
}

fn leading_number(text: &str) -> Option<u32> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    text[..end].parse().ok()
}
