//! What a transaction does with its connection: it begins, ends, or is given up.

use super::connection::Connection;
use super::core::{Block, Use};
use super::request::Failure;
use super::shell::PANICKED;
use crate::connect::{BlockFacts, Fault, Step, TransactionStatus};
use crate::error::Error;

impl Connection {
    /// Whoever calls has the connection for itself: nobody can be waiting for what is under way.
    pub(crate) async fn claim(&self) -> Result<(), Error> {
        self.claim_now();
        self.shell.settled().await
    }

    /// As [`claim`](Self::claim), and does not wait for what is drained.
    pub(crate) fn claim_now(&self) {
        let start = {
            let mut core = self.shell.core();
            if !matches!(core.block(), Block::None | Block::Ending) {
                self.shell.take_back(&mut core);
                self.wire().stop_recording();
            }
            core.claim()
        };
        self.drain_if(start);
    }

    /// Nobody can be waiting for what is still under way: its futures were leaked, and with them what they did.
    pub(crate) async fn disown(&self) -> Result<(), Error> {
        let start = {
            let mut core = self.shell.core();
            if core.is_live() {
                self.wire().note(Fault::Abandoned);
            }
            core.disown()
        };
        self.drain_if(start);
        self.shell.settled().await
    }

    /// Starts a transaction: nothing is sent yet. `again` ends the attempt before it in the same flight.
    pub(crate) fn begin(&self, steps: impl IntoIterator<Item = Step>, again: bool) -> Result<(), Error> {
        if !again && self.wire().status() != TransactionStatus::Idle {
            return Err(Error::InTransaction);
        }
        self.wire().take_back();
        if again && self.wire().status() != TransactionStatus::Idle {
            self.wire().lead(Step::RollBack);
        }
        for step in steps {
            self.wire().lead(step);
        }
        self.wire().record();
        self.shell.core().begin();
        Ok(())
    }

    /// Whether anything of the transaction may have reached the server.
    pub(crate) fn has_begun(&self) -> bool {
        let core = self.shell.core();
        // What waits is that of a request which the driver has not sent yet, if there is one.
        let sent = !self.wire().holds_begin() || core.has_unsent(self.wire().sent());
        sent && !matches!(core.block(), Block::None | Block::Planned)
    }

    /// Sends COMMIT or ROLLBACK, with what is still to go ahead of it, and waits for the answer. What became of it is on
    /// record; the driver's error too is returned, if it came to that.
    pub(crate) async fn end_block(&self, end: Step) -> Option<tokio_postgres::Error> {
        let mut request = self.request_now(Use::Group).ok()??;
        {
            let mut core = self.shell.core();
            core.ending();
            self.shell.lead_now(&mut core);
        }
        // Nobody has a request but this one.
        self.wire().end(end);
        let call = std::pin::pin!(self.client.batch_execute(""));
        let result = request.send(call, |_| ()).await;
        if result.is_err() {
            request.answer().await;
        }
        request.finish();
        match result {
            Err(Failure::Driver(e)) => Some(e),
            Ok(()) | Err(Failure::Lost(_) | Failure::NoTransaction) => None,
        }
    }

    /// What is still to travel with the next statement is not needed for what ends the transaction.
    pub(crate) fn drop_steps(&self) {
        self.shell.take_back(&mut self.shell.core());
    }

    /// The transaction has come to its end, whichever.
    pub(crate) fn end_transaction(&self) {
        let mut core = self.shell.core();
        self.shell.take_back(&mut core);
        self.wire().stop_recording();
        core.end();
    }

    /// The transaction was dropped in the middle: roll it back in the background. If its COMMIT is under way, that is seen
    /// to its end, and `aftermath` told of it.
    pub(crate) fn give_up_transaction(&self, aftermath: impl FnOnce(&BlockFacts) + Send + 'static) {
        // A COMMIT that is under way is seen to its end all the same.
        if std::thread::panicking() && !self.shell.core().is_ending() {
            if self.has_begun() {
                self.shell.cut(PANICKED);
            }
            self.shell.take_back(&mut self.shell.core());
            return;
        }
        let start = {
            let mut core = self.shell.core();
            let nothing_sent = self.shell.take_back(&mut core);
            let start = core.give_up(nothing_sent);
            if core.is_ending() && !core.is_settled() {
                self.shell.set_aftermath(Box::new(aftermath));
            } else {
                let facts = self.wire().facts();
                self.wire().stop_recording();
                drop(core);
                aftermath(&facts);
            }
            start
        };
        self.drain_if(start);
    }

    /// Forgets the faults since `mark`, which ROLLBACK TO SAVEPOINT undoes; those still to come too.
    pub(crate) fn forgive(&self, mark: usize) {
        let mut core = self.shell.core();
        core.forgive_later(mark);
        self.wire().forgive(mark);
    }
}
