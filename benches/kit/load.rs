//! A number of tasks that each do one operation after the other, and what they measured.

use std::future::Future;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use super::Failure;

/// How many tasks, for how long.
#[derive(Clone, Debug)]
pub struct Load {
    pub tasks: usize,
    pub warm_up: Duration,
    pub time: Duration,
}

/// What came of one contender's turn.
#[derive(Clone, Debug)]
pub struct Sample {
    /// All operations, those of the warm-up too: so many the database must show.
    pub done: u64,
    /// Operations per second. One that began before the measured time or ended after it counts for the part of it that
    /// lies within: whole operations would make those that take long, or the last of a task, count too much or too little.
    pub rate: f64,
    /// Of the operations that lie within the measured time, wholly or in part, in seconds, sorted; none if another
    /// program measured.
    pub latencies: Vec<f64>,
    /// How many such operations each task did, sorted.
    pub shares: Vec<u64>,
    /// How often an operation was tried, where that is counted.
    pub attempts: Option<f64>,
}

impl Sample {
    /// Of another program, which tells no more than this.
    pub fn outer(done: u64, rate: f64) -> Self {
        Self { done, rate, latencies: Vec::new(), shares: Vec::new(), attempts: None }
    }

    /// Where an operation was tried this often in all.
    #[must_use]
    pub fn tried(mut self, attempts: u64) -> Self {
        self.attempts = Some(attempts as f64 / self.done as f64);
        self
    }

    /// Where each operation of the load was this many.
    #[must_use]
    pub fn times(mut self, n: u32) -> Self {
        self.done *= u64::from(n);
        self.rate *= f64::from(n);
        for latency in &mut self.latencies {
            *latency /= f64::from(n);
        }
        self
    }

    /// What this part of the operations did not exceed, in seconds.
    pub fn latency(&self, part: f64) -> Option<f64> {
        let last = self.latencies.len().checked_sub(1)?;
        Some(self.latencies[(last as f64 * part).round() as usize])
    }
}

/// What one task measured.
#[derive(Default)]
struct Task {
    done: u64,
    within: f64,
    latencies: Vec<f64>,
}

impl Load {
    /// Lets each task do the operation on a clone of `state` until the time is over. What has begun is finished; the first
    /// error ends it all.
    pub async fn run<S, F, T>(&self, state: S, operation: F) -> Result<Sample, Failure>
    where
        S: Clone + Send + 'static,
        F: Fn(S) -> T + Clone + Send + 'static,
        T: Future<Output = Result<(), Failure>> + Send,
    {
        let from = Instant::now() + self.warm_up;
        let to = from + self.time;
        let mut tasks = JoinSet::new();
        for _ in 0..self.tasks {
            let (state, operation) = (state.clone(), operation.clone());
            tasks.spawn(async move {
                let mut task = Task::default();
                let mut begun = Instant::now();
                while begun < to {
                    operation(state.clone()).await?;
                    let ended = Instant::now();
                    task.done += 1;
                    if ended > from {
                        let took = (ended - begun).as_secs_f64();
                        task.within += (ended.min(to) - begun.max(from)).as_secs_f64() / took;
                        task.latencies.push(took);
                    }
                    begun = ended;
                }
                Ok::<_, Failure>(task)
            });
        }
        let (mut done, mut within, mut latencies, mut shares) = (0, 0.0, Vec::new(), Vec::new());
        while let Some(task) = tasks.join_next().await {
            let task = task??;
            done += task.done;
            within += task.within;
            shares.push(task.latencies.len() as u64);
            latencies.extend(task.latencies);
        }
        latencies.sort_by(f64::total_cmp);
        shares.sort_unstable();
        Ok(Sample { done, rate: within / self.time.as_secs_f64(), latencies, shares, attempts: None })
    }
}
