//! Brings a connection to rest: what nobody waits for any more is cancelled, its answers are read, and a transaction that
//! was given up is rolled back.
//!
//! The driver sends a request at the first poll of its future and then forgets nobody: if the future is dropped, the
//! statement runs on and the next one waits behind it. A CancelRequest names a backend and not a statement, so it is sent
//! only while what runs was left behind and nobody waits for anything else; its socket is read to the end, and one round
//! trip follows that takes the signal if it came late.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use deadpool_postgres::ClientWrapper;
use tokio::time::{Instant, timeout};
use tokio_postgres::Client;

use super::core::{Block, Drained};
use super::shell::{CLOSED, STALLED, STOPPED, Shell, is_fatal};
use crate::connect::TransactionStatus;
use crate::observe;

/// A statement nobody waits for any more often has its answer on the way; cancelling costs a connection.
const GRACE: Duration = Duration::from_millis(2);
/// Several statements may have been abandoned, one behind the other: each is cancelled in its turn.
const CANCEL_AGAIN: Duration = Duration::from_millis(20);

/// Starts to drain.
pub(super) fn start(shell: &Arc<Shell>, client: &Arc<ClientWrapper>) {
    let draining = Draining { shell: Arc::clone(shell), done: false };
    let client = Arc::clone(client);
    shell.runtime.spawn(drain(draining, client));
    shell.changed();
}

/// The task's hold on the connection. Dropped before its end (its runtime is shut down), it makes the connection lost
/// rather than leave everyone waiting.
struct Draining {
    shell: Arc<Shell>,
    done: bool,
}

impl Drop for Draining {
    fn drop(&mut self) {
        if !self.done {
            self.shell.lose(STOPPED);
        }
        self.shell.changed();
    }
}

async fn drain(mut draining: Draining, mut client: Arc<ClientWrapper>) {
    let shell = &draining.shell;
    // While others wait for answers of their own, the clock does not run.
    let mut clock = Clock { limit: shell.config.cleanup_timeout, since: None };
    let result = loop {
        if let Err(reason) = quiesce(shell, &client, &mut clock).await {
            break Err(reason);
        }
        client = match at_rest(shell, client) {
            Ok(tell) => break Ok(tell),
            Err(client) => client,
        };
        if let Err(reason) = roll_back(shell, &client, &mut clock).await {
            break Err(reason);
        }
    };
    match result {
        Ok(tell) => tell(),
        Err(reason) => {
            shell.lose(reason);
            shell.driver.abort();
            shell.conclude_aftermath()();
        }
    }
    draining.done = true;
}

/// Everything that was sent is answered. What was left behind is cleared away before the lock is let go of, for that is
/// when the connection is granted again: to somebody who starts a transaction's record anew, or wants the client to
/// itself. Returns whom to tell then, or the client if there is something to roll back first.
fn at_rest(
    shell: &Shell,
    client: Arc<ClientWrapper>,
) -> Result<impl FnOnce() + Send + use<>, Arc<ClientWrapper>> {
    let mut core = shell.core();
    let Drained::Done(forgive) = core.drained(shell.wire.sent(), shell.wire.status()) else {
        return Err(client);
    };
    shell.wire.set_raw(false);
    if core.block() == Block::None {
        // Nobody's: what it was meant for is gone.
        shell.take_back(&mut core);
    }
    if let Some(mark) = forgive {
        shell.wire.forgive(mark);
    }
    drop(client);
    Ok(shell.conclude_aftermath())
}

/// Runs only while nobody waits for the server.
struct Clock {
    limit: Duration,
    since: Option<Instant>,
}

impl Clock {
    /// Looks at it; whether time is up.
    fn is_up(&mut self, awaited: bool) -> bool {
        if awaited {
            self.since = None;
            return false;
        }
        self.since.get_or_insert_with(Instant::now).elapsed() >= self.limit
    }

    /// Waits for what must come within what is left.
    async fn bounded<T>(&mut self, work: impl Future<Output = T>) -> Result<T, &'static str> {
        let end = *self.since.get_or_insert_with(Instant::now) + self.limit;
        tokio::time::timeout_at(end, work).await.map_err(|_| STALLED)
    }
}

/// Waits until everything that was sent is answered, and cancels what nobody waits for if it does not end at once.
async fn quiesce(shell: &Shell, client: &Client, clock: &mut Clock) -> Result<(), &'static str> {
    let mut cancelled = false;
    // What prepares a statement sends requests that nobody has counted. It ends by itself, or by being cancelled.
    let mut pause = GRACE;
    while shell.core().is_preparing() {
        let _ = timeout(pause, shell.until(|core| !core.is_preparing())).await;
        pause = CANCEL_AGAIN;
        look(shell, clock, u64::MAX, &mut cancelled).await?;
    }
    let number = {
        let mut core = shell.core();
        let number = core.enqueue_fence();
        // What the raw client was used for is not counted.
        if core.is_raw() { u64::MAX } else { number }
    };
    let mut fence = pin!(fence(client));
    let mut pause = GRACE;
    loop {
        if let Ok(result) = timeout(pause, &mut fence).await {
            result?;
            break;
        }
        pause = CANCEL_AGAIN;
        look(shell, clock, number, &mut cancelled).await?;
    }
    if cancelled {
        // The signal was sent before the cancel socket closed; this round trip takes it if it came late.
        shell.core().enqueue_fence();
        clock.bounded(self::fence(client)).await??;
    }
    // A fence that was hit by it is told so before its ReadyForQuery.
    clock.bounded(shell.wire.until_answered(shell.wire.sent())).await
}

/// Cancels if that may be done, and if what runs is not the `fence` itself.
async fn look(
    shell: &Shell,
    clock: &mut Clock,
    fence: u64,
    cancelled: &mut bool,
) -> Result<(), &'static str> {
    let (awaited, cancel) = {
        let core = shell.core();
        let answered = shell.wire.answered();
        (core.is_awaited(answered), core.may_cancel(answered) && answered.saturating_add(1) < fence)
    };
    if clock.is_up(awaited) {
        return Err(STALLED);
    }
    if shell.wire.is_over() {
        return Err(CLOSED);
    }
    if cancel {
        *cancelled = true;
        if let Ok(Err(e)) = timeout(clock.limit, shell.cancel()).await {
            observe::cancel_failed(&e);
        }
    }
    Ok(())
}

async fn roll_back(shell: &Shell, client: &Client, clock: &mut Clock) -> Result<(), &'static str> {
    const FAILED: &str = "ROLLBACK failed";
    shell.core().enqueue_fence();
    clock.bounded(client.batch_execute("ROLLBACK")).await?.map_err(|_| FAILED)?;
    if shell.wire.status() == TransactionStatus::Idle { Ok(()) } else { Err(FAILED) }
}

/// Waits until everything sent before is answered, and makes sure that driver and server still agree on which answer
/// belongs to which request: an empty query is answered by more than ReadyForQuery alone, so a stray one, as the raw
/// client's COPY can leave behind, is told apart (manual, chapter 54.2.6).
async fn fence(client: &Client) -> Result<(), &'static str> {
    match client.simple_query("").await {
        Ok(answer) if answer.is_empty() => Err("its answers were out of step"),
        Ok(_) => Ok(()),
        // A cancel request that came late; an answer of its own all the same.
        Err(e) if e.as_db_error().is_some_and(|e| !is_fatal(e)) => Ok(()),
        Err(_) => Err(CLOSED),
    }
}
