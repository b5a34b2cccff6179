//! What is done to idle connections while nobody looks.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use deadpool::managed::{Pool, WeakPool};
use tokio::task::JoinHandle;
use tokio::time::sleep;

use crate::config::SessionConfig;
use crate::connection::{Connection, ConnectionManager};
use crate::lock::lock;

/// Idle connections are looked at no more often and no less often than this.
const INTERVAL: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(30));

/// Closes connections that were idle, or are alive, for too long. Ends with the pool.
#[derive(Debug, Default)]
pub(crate) struct Maintenance {
    task: Mutex<Option<JoinHandle<()>>>,
}

impl Maintenance {
    /// Starts the task, also again if the runtime it lived on is gone.
    pub(crate) fn ensure_running(&self, pool: &Pool<ConnectionManager>, config: &Arc<SessionConfig>) {
        let Some(interval) = [config.idle_timeout, config.max_lifetime].into_iter().flatten().min() else {
            return;
        };
        let mut task = lock(&self.task);
        if task.as_ref().is_none_or(|task| task.is_finished()) {
            let interval = (interval / 2).clamp(INTERVAL.0, INTERVAL.1);
            let work = || run(pool.weak(), interval, config.idle_timeout);
            let mut started = pool.manager().home().spawn(work());
            if started.is_finished() {
                // Home was shut down.
                started = tokio::spawn(work());
            }
            *task = Some(started);
        }
    }

    pub(crate) fn stop(&self) {
        if let Some(task) = lock(&self.task).take() {
            task.abort();
        }
    }
}

impl Drop for Maintenance {
    fn drop(&mut self) {
        self.stop();
    }
}

async fn run(pool: WeakPool<ConnectionManager>, interval: Duration, idle_timeout: Option<Duration>) {
    let keep = |connection: &Connection, now: Instant| {
        let idle = now.saturating_duration_since(connection.idle_since);
        !connection.is_expired(now) && idle_timeout.is_none_or(|limit| idle <= limit)
    };
    loop {
        sleep(interval).await;
        let Some(pool) = pool.upgrade().filter(|pool| !pool.is_closed()) else { return };
        let now = Instant::now();
        drop(pool.retain(|connection, _| keep(connection, now)).removed);
        pool.manager().retain_ready(|connection| keep(connection, now));
    }
}
