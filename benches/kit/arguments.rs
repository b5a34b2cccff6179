//! What the caller asks for: which work, how many rounds, how long.

use std::time::Duration;

use super::Failure;

/// How much is done.
#[derive(Clone, Debug)]
pub struct Plan {
    pub rounds: usize,
    /// How long a contender is measured in a round. What has begun by then is finished and counted.
    pub time: Duration,
    /// How long it works unmeasured before: connections are opened, statements prepared, caches filled.
    pub warm_up: Duration,
    /// TPC-B's number of branches; each has ten tellers and 100,000 accounts.
    pub scale: i32,
    /// How many rows an insert stores, and how many through the delay, where a loop takes a millisecond for each.
    pub rows: usize,
    pub delayed_rows: usize,
    /// How many tasks read at once, one after the other.
    pub sweep: Vec<usize>,
    /// How many tasks do the other work, in place of its own number. Fairness keeps its own.
    pub tasks: Option<usize>,
    /// Names of work; all if there is none.
    pub only: Vec<String>,
}

impl Plan {
    fn full() -> Self {
        let time = Duration::from_secs(1);
        Self {
            rounds: 5,
            time,
            warm_up: warm_up(time),
            scale: 20,
            rows: 10_000,
            delayed_rows: 1000,
            sweep: vec![1, 2, 4, 8, 16, 32, 64, 128, 256],
            tasks: None,
            only: Vec::new(),
        }
    }

    fn short() -> Self {
        let time = Duration::from_millis(50);
        Self {
            rounds: 3,
            time,
            warm_up: warm_up(time),
            rows: 2000,
            delayed_rows: 100,
            sweep: vec![256],
            ..Self::full()
        }
    }

    /// Only to see that it works.
    fn test() -> Self {
        let time = Duration::from_millis(10);
        let few =
            Self { rounds: 1, scale: 1, rows: 100, delayed_rows: 10, sweep: vec![1, 256], ..Self::short() };
        Self { time, warm_up: warm_up(time), ..few }
    }

    /// Reads the arguments of the program, of which `names` are those of work.
    pub fn from_arguments(names: &[&str], arguments: impl Iterator<Item = String>) -> Result<Self, Failure> {
        let arguments: Vec<String> = arguments.collect();
        let has = |name: &str| arguments.iter().any(|argument| argument == name);
        let mut plan = if has("--test") {
            Self::test()
        } else if has("--short") {
            Self::short()
        } else {
            Self::full()
        };
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            let mut value = || rest.next().ok_or(format!("{argument} needs a value"));
            match argument.as_str() {
                // Cargo's own.
                "--bench" | "--test" | "--short" => {}
                "--only" => plan.only.extend(value()?.split(',').map(str::to_owned)),
                "--rounds" => plan.rounds = value()?.parse()?,
                "--tasks" => plan.tasks = Some(value()?.parse()?),
                "--seconds" => {
                    plan.time = Duration::try_from_secs_f64(value()?.parse()?)?;
                    plan.warm_up = warm_up(plan.time);
                }
                _ => return Err(format!("unknown argument {argument}\n{}", usage(names)).into()),
            }
        }
        if let Some(unknown) = plan.only.iter().find(|only| !names.contains(&only.as_str())) {
            return Err(format!("no work has the name {unknown}\n{}", usage(names)).into());
        }
        if plan.rounds == 0 || plan.tasks == Some(0) {
            return Err("--rounds and --tasks must be 1 or more".into());
        }
        Ok(plan)
    }

    pub fn describe(&self) -> String {
        format!(
            "{} rounds of {} s for each; medians over the rounds, ratios within each round, everybody checked; TPC-B's scale is {}.",
            self.rounds,
            self.time.as_secs_f64(),
            self.scale
        )
    }

    pub fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| only == name)
    }
}

fn warm_up(time: Duration) -> Duration {
    (time / 5).max(Duration::from_millis(100))
}

fn usage(names: &[&str]) -> String {
    format!(
        "arguments: --only WORK[,WORK…], --rounds N (5), --seconds S (1, for each contender in each round), \
         --tasks N (in place of each work's own number; tasks and fairness keep theirs), \
         --short (3 rounds of 0.05 s, fewer rows and numbers of tasks), --test (to see that it works)\nwork: {}",
        names.join(", ")
    )
}
