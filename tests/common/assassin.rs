//! Somebody who cancels or ends what others run, again and again, at random moments.

use std::time::Duration;

use super::{Database, connect};

/// At work until it is dropped.
pub struct Assassin(tokio::task::JoinHandle<()>);

impl Assassin {
    /// Runs what `next` says on a connection of its own, with pauses of up to so many microseconds in between.
    pub async fn start(
        db: &Database,
        seed: u64,
        pause: u64,
        mut next: impl FnMut(&mut fastrand::Rng) -> String + Send + 'static,
    ) -> Self {
        let client = connect(db.database.url()).await;
        let mut random = fastrand::Rng::with_seed(seed);
        Self(tokio::spawn(async move {
            loop {
                let sql = next(&mut random);
                client.batch_execute(&sql).await.expect("obeyed");
                // Waits for nothing: it is what makes the moments random.
                tokio::time::sleep(Duration::from_micros(random.u64(..pause))).await;
            }
        }))
    }

    /// Cancels whatever this backend runs.
    pub async fn of(db: &Database, pid: i32, seed: u64, pause: u64) -> Self {
        Self::start(db, seed, pause, move |_| format!("SELECT pg_cancel_backend({pid})")).await
    }
}

impl Drop for Assassin {
    fn drop(&mut self) {
        self.0.abort();
    }
}
