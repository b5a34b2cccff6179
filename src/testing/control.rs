//! BEGIN, COMMIT and ROLLBACK of clients, in either protocol: who carries them out, and what is to go wrong with them.
//!
//! A sandbox answers every message that concerns one by itself, since none may reach the outer transaction. A proxy passes
//! them on.

use std::sync::Arc;

use tokio_postgres::error::SqlState;

use super::{
    batch::Batch,
    block::{Block, aborted, raise_sql},
    client::{Conversation, End},
    faults::AtCommit,
    frames::{Report, put},
    prepared::{Portal, Prepared},
    sql::Kind,
};

impl Conversation {
    /// Begins or ends the transaction of a sandbox's client; whether the next statement may be run.
    pub(super) async fn control(&mut self, kind: Kind) -> Result<bool, End> {
        match kind {
            Kind::Begin { start, modes } => {
                self.shared.faults.on_begin();
                self.begin(if start { "START TRANSACTION" } else { "BEGIN" }, modes).await
            }
            Kind::Commit => match self.shared.faults.on_commit() {
                Some(AtCommit::CutBefore) => Err(End::Cut),
                Some(AtCommit::Fail(state)) => {
                    self.roll_back().await?;
                    self.held = None;
                    self.report(&injected(&state));
                    Ok(false)
                }
                Some(AtCommit::LoseAnswer) => {
                    self.muted = true;
                    self.commit().await
                }
                None => self.commit().await,
            },
            _ => {
                if self.block == Block::Idle {
                    self.notice("25P01", "there is no transaction in progress");
                }
                self.roll_back().await?;
                self.complete("ROLLBACK");
                Ok(true)
            }
        }
    }

    /// Whether a message for transaction control may be answered: nothing before it has failed, and an aborted
    /// transaction takes none but its end.
    async fn may_control(&mut self, prepared: &Prepared, batch: &mut Batch) -> Result<bool, End> {
        self.settle(batch).await?;
        let aborted = (self.has_failed() || self.block == Block::Aborted).then(aborted);
        match aborted {
            Some(report) if matches!(prepared.kind, Kind::Begin { .. }) => {
                self.refuse(&report, batch).await?
            }
            _ => {}
        }
        Ok(!batch.failed)
    }

    fn answer(&mut self, tag: u8, body: &[u8]) {
        if !self.muted {
            put(self.client.outbox(), tag, &[body]);
        }
    }

    pub(super) async fn parse_control(
        &mut self,
        name: &[u8],
        prepared: Arc<Prepared>,
        batch: &mut Batch,
    ) -> Result<(), End> {
        if self.may_control(&prepared, batch).await? {
            self.statements.insert(name.to_vec(), prepared);
            self.answer(b'1', &[]);
        }
        Ok(())
    }

    pub(super) async fn bind_control(
        &mut self,
        name: &[u8],
        portal: Portal,
        batch: &mut Batch,
    ) -> Result<(), End> {
        if self.may_control(&portal.prepared, batch).await? {
            self.portals.insert(name.to_vec(), portal);
            self.answer(b'2', &[]);
        }
        Ok(())
    }

    /// It has no rows, and a statement, unlike a portal, is asked for its parameters too: there are none.
    pub(super) async fn describe_control(&mut self, statement: bool, batch: &mut Batch) -> Result<(), End> {
        self.settle(batch).await?;
        if !batch.failed {
            if statement {
                self.answer(b't', &[0, 0]);
            }
            self.answer(b'n', &[]);
        }
        Ok(())
    }

    pub(super) async fn close_control(&mut self, batch: &mut Batch) -> Result<(), End> {
        self.settle(batch).await?;
        if !batch.failed {
            self.answer(b'3', &[]);
        }
        Ok(())
    }

    /// Carries it out in a sandbox.
    pub(super) async fn execute_control(
        &mut self,
        name: &[u8],
        kind: Kind,
        batch: &mut Batch,
    ) -> Result<(), End> {
        // It runs once.
        self.portals.remove(name);
        batch.failed |= !self.control(kind).await?;
        if !matches!(kind, Kind::Begin { .. }) {
            self.portals.clear();
        }
        // The protocol tells each statement's end at once.
        self.tell_held();
        Ok(())
    }

    /// Counts it on a connection of the client's own; whether it is to be passed on.
    pub(super) async fn count_control(&mut self, kind: Kind, batch: &mut Batch) -> Result<bool, End> {
        match kind {
            Kind::Begin { .. } => self.shared.faults.on_begin(),
            Kind::Commit => match self.shared.faults.on_commit() {
                Some(AtCommit::CutBefore) => return Err(End::Cut),
                Some(AtCommit::Fail(state)) => {
                    self.break_off(&["ROLLBACK", &raise_sql(&injected(&state))], batch).await?;
                    return Ok(false);
                }
                Some(AtCommit::LoseAnswer) => self.muted = true,
                None => {}
            },
            _ => {}
        }
        Ok(true)
    }
}

pub(super) fn injected(state: &SqlState) -> Report {
    Report::new(state.code(), "injected by a test", "")
}
