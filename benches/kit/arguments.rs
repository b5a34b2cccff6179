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
    /// How many tasks read at once, one after the other.
    pub tasks: Vec<usize>,
    /// Names of work; all if there is none.
    pub only: Vec<String>,
}

impl Plan {
    fn new(rounds: usize, milliseconds: u64, scale: i32, tasks: &[usize]) -> Self {
        let time = Duration::from_millis(milliseconds);
        Self { rounds, time, warm_up: warm_up(time), scale, tasks: tasks.to_vec(), only: Vec::new() }
    }

    fn full() -> Self {
        Self::new(5, 1000, 20, &[1, 2, 4, 8, 16, 32, 64, 128, 256])
    }

    fn short() -> Self {
        Self::new(3, 150, 20, &[1, 16, 256])
    }

    /// Only to see that it works.
    fn test() -> Self {
        Self::new(1, 10, 1, &[1, 256])
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
        if plan.rounds == 0 {
            return Err("--rounds must be 1 or more".into());
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
    (time / 5).max(Duration::from_millis(40))
}

fn usage(names: &[&str]) -> String {
    format!(
        "arguments: --only WORK[,WORK…], --rounds N (5), --seconds S (1, for each contender in each round), \
         --short (3 rounds of 0.15 s), --test (to see that it works)\nwork: {}",
        names.join(", ")
    )
}
