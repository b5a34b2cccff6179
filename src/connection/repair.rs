//! What becomes of a connection that was returned: lent again as it is, repaired, or closed.

use std::sync::atomic::Ordering::Relaxed;

use tokio::time::timeout;

use super::connection::Connection;
use super::core::{Core, Verdict};
use super::reset;
use super::shell::{CLOSED, PANICKED, STALLED};
use crate::config::Reset;
use crate::connect::TransactionStatus;

impl Connection {
    /// What to do with the connection now that its session ends.
    pub(crate) fn verdict(&self) -> Verdict {
        if std::thread::panicking() && !self.shell.core().is_ending() {
            return Verdict::Close(PANICKED);
        }
        let wire = self.wire();
        if self.client.is_closed() || wire.is_over() {
            return Verdict::Close(CLOSED);
        }
        if wire.discards() > 0 || self.shell.is_retired() {
            // The driver keeps statements of its own for looking up types, and cannot be told that they are gone.
            return Verdict::Close("its prepared statements were discarded");
        }
        self.shell.core().verdict(self.is_at_rest(), self.wants_reset())
    }

    /// Whether the server owes nothing, and is in no transaction.
    fn is_at_rest(&self) -> bool {
        let wire = self.wire();
        wire.status() == TransactionStatus::Idle && wire.answered() >= wire.sent()
    }

    fn wants_reset(&self) -> bool {
        match self.shell.config.reset {
            Reset::WhenDirty => self.shell.dirty.load(Relaxed),
            Reset::Always => true,
            Reset::Never => false,
        }
    }

    /// Brings a returned connection back to the state it had when it was made, within the clean-up timeout.
    pub(crate) async fn repair(&self) -> Result<(), &'static str> {
        let shell = &self.shell;
        let start = {
            let mut core = shell.core();
            shell.take_back(&mut core);
            if !core.is_ending() {
                shell.wire.stop_recording();
            }
            core.reclaim(self.is_at_rest())
        };
        self.drain_if(start);
        shell.until(Core::is_settled).await;
        if let Some(reason) = shell.core().lost() {
            return Err(reason);
        }
        if self.wants_reset() {
            match timeout(shell.config.cleanup_timeout, reset::reset(&self.client, self.watches_client)).await
            {
                Ok(done) => done.map_err(|_| "it could not be reset")?,
                Err(_) => return Err(STALLED),
            }
        }
        if shell.wire.status() != TransactionStatus::Idle {
            return Err("it stayed in a transaction after ROLLBACK");
        }
        shell.dirty.store(false, Relaxed);
        shell.wire.forget_chains();
        Ok(())
    }
}
