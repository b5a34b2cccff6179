//! What was read off one connection: the facts that the driver does not tell, for everybody to look at.
//!
//! tokio-postgres keeps the transaction status of ReadyForQuery, the tag of CommandComplete and every error nobody waits
//! for to itself. The [ledger](super::ledger) reads them off the stream, with no round trip, and writes them here before
//! the driver sees the bytes; so they are here when the driver's answer is. The other way, a [`Flight`] waits here for
//! the driver's next request.

use std::pin::pin;
use std::sync::atomic::{
    AtomicBool, AtomicI32, AtomicU8, AtomicU32, AtomicU64,
    Ordering::{Relaxed, SeqCst},
};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Notify;

use super::faults::{Fault, Faults, parse_error};
use super::flight::{self, Flight, Kind, Rows, Step};
use crate::error::ServerError;
use crate::lock::lock;

/// Where the server says the session is, as of the last ReadyForQuery.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum TransactionStatus {
    /// Not in a transaction block.
    Idle,
    /// In one.
    Open,
    /// In one that failed: everything but ROLLBACK is refused.
    Failed,
}

/// A set of things that have happened to the transaction under way, or to the connection.
pub(super) mod happened {
    /// A transaction of ours is recorded.
    pub(in super::super) const RECORDING: u32 = 1;
    /// The server has confirmed its BEGIN.
    pub(in super::super) const BEGUN: u32 = 1 << 1;
    /// The server has confirmed its COMMIT as a commit.
    pub(in super::super) const COMMITTED: u32 = 1 << 2;
    /// The server has answered its COMMIT with ROLLBACK.
    pub(in super::super) const COMMIT_ROLLED_BACK: u32 = 1 << 3;
    /// The server has answered its COMMIT with an error.
    pub(in super::super) const COMMIT_REFUSED: u32 = 1 << 4;
    /// All of its COMMIT was handed to the socket.
    pub(in super::super) const COMMIT_SENT: u32 = 1 << 5;
    /// The server said good-bye before it came to the COMMIT.
    pub(in super::super) const ENDED_BEFORE_COMMIT: u32 = 1 << 6;
    /// SQL that is not ours has ended it, or begun another.
    pub(in super::super) const ENDED_BY_SQL: u32 = 1 << 7;
    /// Errors of the server are on record.
    pub(in super::super) const ERRORS: u32 = 1 << 8;
    /// SQL that rolls back *and chains* was prepared or run, whose tag is that of ROLLBACK TO.
    pub(in super::super) const CHAINS: u32 = 1 << 9;
    /// The server has sent a FATAL error, and ends the connection.
    pub(in super::super) const FATAL: u32 = 1 << 10;
    /// The connection is closed.
    pub(in super::super) const CLOSED: u32 = 1 << 11;
    /// The raw client is lent: what its COPY does is its own affair.
    pub(in super::super) const RAW: u32 = 1 << 12;

    /// All that stands before the COMMIT in its flight is answered.
    pub(in super::super) const COMMIT_NEXT: u32 = 1 << 13;
    /// A step of ours that went ahead of a statement was refused, and the statement was not run.
    pub(in super::super) const LEAD_REFUSED: u32 = 1 << 14;
    /// That was its BEGIN, or what stands before it.
    pub(in super::super) const BEGIN_REFUSED: u32 = 1 << 15;
    /// Faults of our own are on record.
    pub(in super::super) const NOTED: u32 = 1 << 16;
    /// A step was refused that was sent together with BEGIN, or BEGIN itself: nothing of it is there to go back to.
    pub(in super::super) const START_REFUSED: u32 = 1 << 17;

    /// What belongs to one transaction.
    pub(in super::super) const TRANSACTION: u32 = RECORDING
        | BEGUN
        | COMMITTED
        | COMMIT_ROLLED_BACK
        | COMMIT_REFUSED
        | COMMIT_SENT
        | ENDED_BEFORE_COMMIT
        | ENDED_BY_SQL
        | ERRORS
        | COMMIT_NEXT
        | LEAD_REFUSED
        | BEGIN_REFUSED
        | START_REFUSED
        | NOTED;
}
use happened::*;

/// How far the BEGIN of the transaction under way has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Begin {
    /// It waits for a request to travel with.
    Waiting,
    /// It is on its way, or the server has not answered it.
    UnderWay,
    Confirmed,
    /// It was refused, or the transaction has ended since: what is sent now would run on its own.
    Over,
}

/// Everything that was read off the wire about one transaction.
#[derive(Clone, Debug)]
pub(crate) struct BlockFacts {
    pub(crate) begun: bool,
    pub(crate) commit_sent: bool,
    pub(crate) committed: bool,
    pub(crate) commit_rolled_back: bool,
    pub(crate) commit_refused: bool,
    pub(crate) ended_by_sql: bool,
    pub(crate) ended_before_commit: bool,
    /// The server has ended the connection, or it is closed.
    pub(crate) over: bool,
    pub(crate) status: TransactionStatus,
    pub(crate) fault: Option<Fault>,
    pub(crate) fatal: Option<Arc<ServerError>>,
}

/// What was read off one connection so far. Written by the task that drives the connection, read by everyone.
#[derive(Debug, Default)]
pub(crate) struct Wire {
    status: AtomicU8,
    happened: AtomicU32,
    /// How many requests of the driver's were handed to the socket, and how many of them the server has answered; both
    /// without those that only close statements, which nobody waits for.
    sent: AtomicU64,
    answered: AtomicU64,
    discards: AtomicU32,
    errors: AtomicU32,
    process_id: AtomicI32,
    secret_key: AtomicI32,
    /// Somebody waits for an answer to be complete.
    watched: AtomicU32,
    progress: Notify,
    faults: Mutex<Faults>,
    /// Whether something waits in `next`, which is looked at for every write.
    has_next: AtomicBool,
    next: Mutex<Flight>,
    rows: Mutex<Rowed>,
}

/// What has come back so far of the rows that went ahead last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Rowed {
    /// How many were run.
    pub(crate) count: u32,
    /// How many rows of the database they touched.
    pub(crate) affected: u64,
}

impl Wire {
    #[inline]
    pub(crate) fn status(&self) -> TransactionStatus {
        match self.status.load(Relaxed) {
            b'T' => TransactionStatus::Open,
            b'E' => TransactionStatus::Failed,
            _ => TransactionStatus::Idle,
        }
    }

    #[inline]
    pub(super) fn has(&self, what: u32) -> bool {
        self.happened.load(Relaxed) & what != 0
    }

    pub(super) fn happen(&self, what: u32) {
        self.happened.fetch_or(what, SeqCst);
    }

    pub(super) fn undo(&self, what: u32) {
        self.happened.fetch_and(!what, SeqCst);
    }

    /// How many requests were handed to the socket.
    #[inline]
    pub(crate) fn sent(&self) -> u64 {
        self.sent.load(SeqCst)
    }

    /// How many of them were answered: their ReadyForQuery was read.
    #[inline]
    pub(crate) fn answered(&self) -> u64 {
        self.answered.load(SeqCst)
    }

    /// How many times all prepared statements were dropped (`DISCARD ALL`, `DEALLOCATE ALL`).
    pub(crate) fn discards(&self) -> u32 {
        self.discards.load(Relaxed)
    }

    pub(crate) fn process_id(&self) -> i32 {
        self.process_id.load(Relaxed)
    }

    pub(crate) fn secret_key(&self) -> i32 {
        self.secret_key.load(Relaxed)
    }

    /// The FATAL error with which the server ended the connection.
    pub(crate) fn fatal(&self) -> Option<Arc<ServerError>> {
        if self.has(FATAL) { lock(&self.faults).fatal.clone() } else { None }
    }

    /// How many errors the server has sent.
    pub(crate) fn errors(&self) -> u32 {
        self.errors.load(Relaxed)
    }

    /// The last error, if there was one since there were so many.
    pub(crate) fn error_since(&self, errors: u32) -> Option<Arc<ServerError>> {
        if self.errors() == errors { None } else { lock(&self.faults).last.clone() }
    }

    /// Whether the connection is over: the server said so, or it is closed.
    #[inline]
    pub(crate) fn is_over(&self) -> bool {
        self.has(FATAL | CLOSED)
    }

    /// Whether the stream is closed, and with it the socket.
    pub(crate) fn is_closed(&self) -> bool {
        self.has(CLOSED)
    }

    /// Whether SQL that is not ours has ended the transaction under way, or begun another.
    #[inline]
    pub(crate) fn is_ended_by_sql(&self) -> bool {
        self.has(ENDED_BY_SQL)
    }

    /// Whether the server has confirmed the COMMIT of the transaction under way.
    pub(crate) fn is_committed(&self) -> bool {
        self.has(COMMITTED)
    }

    /// Whether it has refused a step of ours that went ahead of a statement.
    pub(crate) fn is_lead_refused(&self) -> bool {
        self.has(LEAD_REFUSED)
    }

    /// Whether that was sent together with BEGIN, so that there is nothing to go back to.
    pub(crate) fn is_start_refused(&self) -> bool {
        self.has(START_REFUSED)
    }

    /// Whether it has answered that with an error.
    pub(crate) fn is_commit_refused(&self) -> bool {
        self.has(COMMIT_REFUSED)
    }

    /// Waits until the request with this number is answered, or the connection is over. The driver hands out an error
    /// before it has read the ReadyForQuery behind it, which says how the session stands.
    pub(crate) async fn until_answered(&self, request: u64) {
        self.until(|| self.answered() >= request || self.is_over()).await;
    }

    /// Waits for the answer to the BEGIN that travels with the request of this number; whether it was confirmed.
    pub(crate) async fn until_begun(&self, request: u64) -> bool {
        let known = || matches!(self.begin(), Begin::Confirmed | Begin::Over);
        self.until(|| known() || self.answered() >= request || self.is_over()).await;
        self.begin() == Begin::Confirmed
    }

    /// Waits until the request with this number was handed to the socket.
    pub(crate) async fn until_sent(&self, request: u64) {
        self.until(|| self.sent() >= request || self.is_over()).await;
    }

    /// Waits for `done`, which becomes true by what is sent or answered.
    async fn until(&self, done: impl Fn() -> bool) {
        if done() {
            return;
        }
        self.watched.fetch_add(1, SeqCst);
        let _watching = Watching(self);
        loop {
            let mut progress = pin!(self.progress.notified());
            progress.as_mut().enable();
            if done() {
                return;
            }
            progress.await;
        }
    }

    /// Waits until everything ahead of a COMMIT that travels with it is answered, and then for as long as COMMIT may take.
    pub(crate) async fn until_commit_is_next(&self, limit: Duration) {
        self.until(|| self.has(COMMIT_NEXT)).await;
        tokio::time::sleep(limit).await;
    }

    /// Something was sent or answered.
    #[inline]
    fn progressed(&self) {
        if self.watched.load(SeqCst) > 0 {
            self.progress.notify_waiters();
        }
    }

    /// COMMIT is what the server answers next.
    pub(super) fn on_commit_next(&self) {
        self.happen(COMMIT_NEXT);
        self.progressed();
    }
}

/// Somebody waits, until this is dropped.
struct Watching<'a>(&'a Wire);

impl Drop for Watching<'_> {
    fn drop(&mut self) {
        self.0.watched.fetch_sub(1, SeqCst);
    }
}

/// What waits for the driver's next request.
impl Wire {
    fn add(&self, add: impl FnOnce(&mut Flight)) {
        let mut next = lock(&self.next);
        add(&mut next);
        self.has_next.store(!next.is_empty(), SeqCst);
    }

    /// Has a step of ours travel with the next request.
    pub(crate) fn lead(&self, step: Step) {
        self.add(|next| next.lead.push(step));
    }

    /// Takes back the step that was given last, if it is this one and has not been sent.
    pub(crate) fn retract(&self, step: &Step) -> bool {
        let mut retracted = false;
        self.add(|next| {
            retracted = next.lead.last() == Some(step);
            if retracted {
                next.lead.pop();
            }
        });
        retracted
    }

    /// Takes back everything that has not been sent. Whether BEGIN was among it.
    pub(crate) fn take_back(&self) -> bool {
        if !self.has_next() {
            return false;
        }
        let mut begins = false;
        self.add(|next| {
            begins = next.begins();
            next.clear();
        });
        begins
    }

    /// How far BEGIN of the transaction under way has come.
    #[inline]
    pub(crate) fn begin(&self) -> Begin {
        let happened = self.happened.load(SeqCst);
        if happened & (BEGIN_REFUSED | ENDED_BY_SQL) != 0 {
            Begin::Over
        } else if happened & BEGUN != 0 {
            Begin::Confirmed
        } else if self.holds_begin() {
            Begin::Waiting
        } else {
            Begin::UnderWay
        }
    }

    /// Whether BEGIN of the transaction under way still waits for a request to travel with.
    pub(crate) fn holds_begin(&self) -> bool {
        self.has_next() && lock(&self.next).begins()
    }

    #[inline]
    pub(super) fn has_next(&self) -> bool {
        self.has_next.load(SeqCst)
    }

    /// The next request is a simple query: a BEGIN that waits is the beginning of its text, with all that goes with it.
    ///
    /// Savepoints are not: should the text not even parse, nothing of it is run, and nobody would know that they were not.
    /// They go ahead of it, in the same flight; if they fail, so does what follows, since that aborts the transaction.
    pub(crate) fn lead_in_text(&self) -> String {
        let mut sql = String::new();
        if self.has_next() {
            self.add(|next| {
                if next.begins() {
                    next.kind = Kind::Text;
                    sql = flight::text(&next.lead);
                } else {
                    next.kind = Kind::AheadOfText;
                }
            });
        }
        sql
    }

    /// The next request was not made: what is to travel waits for another.
    pub(crate) fn expect_nothing(&self) {
        if self.has_next() {
            self.add(Flight::clear_request);
        }
    }

    /// The next request ends the transaction: `end`, and what waits before it, is sent in its place.
    pub(crate) fn end(&self, end: Step) {
        self.add(|next| {
            next.kind = Kind::End;
            next.commit = end == Step::Commit;
            next.lead.push(end);
        });
    }

    /// The next `requests` of the driver's go under one Sync, with COMMIT behind them if asked for.
    pub(crate) fn group(&self, requests: u32, commit: bool) {
        self.add(|next| (next.requests, next.commit) = (requests, commit));
    }

    /// These rows go ahead of the next request, under its Sync, with COMMIT behind it if asked for.
    pub(crate) fn rows_ahead(&self, rows: Rows, commit: bool) {
        *lock(&self.rows) = Rowed::default();
        self.add(|next| {
            (next.rows, next.row_count, next.requests, next.commit) = (rows.bytes, rows.count, 1, commit);
        });
    }

    /// How far the server has come with the rows that went ahead.
    pub(crate) fn rowed(&self) -> Rowed {
        *lock(&self.rows)
    }

    /// How the next request is to be understood.
    pub(crate) fn expect(&self, kind: Kind) {
        self.add(|next| next.kind = kind);
    }

    pub(super) fn next_kind(&self) -> Kind {
        lock(&self.next).kind
    }

    /// Hands over what waits.
    pub(super) fn take_next<T>(&self, take: impl FnOnce(&mut Flight) -> T) -> T {
        let mut next = lock(&self.next);
        let taken = take(&mut next);
        next.clear();
        self.has_next.store(false, SeqCst);
        taken
    }
}

/// The record of a transaction.
impl Wire {
    /// Starts a new transaction's record.
    pub(crate) fn record(&self) {
        lock(&self.faults).clear();
        let kept = self.happened.load(SeqCst) & !TRANSACTION;
        self.happened.store(kept | RECORDING, SeqCst);
    }

    /// Ends the record.
    pub(crate) fn stop_recording(&self) {
        self.undo(TRANSACTION);
        // What is on record is cleared when the next is begun.
    }

    /// Whether a transaction of ours is under way.
    #[inline]
    pub(crate) fn is_recording(&self) -> bool {
        self.has(RECORDING)
    }

    /// Puts a fault of our own on record: the transaction must not be committed.
    pub(crate) fn note(&self, fault: Fault) {
        if self.has(RECORDING) {
            lock(&self.faults).note(fault);
            self.happen(NOTED);
        }
    }

    /// SQL that rolls back and chains is about to be used.
    pub(crate) fn note_chain(&self) {
        self.happen(CHAINS);
    }

    /// The raw client is lent, or no longer.
    pub(crate) fn set_raw(&self, raw: bool) {
        if raw {
            self.happen(RAW);
        } else {
            self.undo(RAW);
        }
    }

    /// The session that used such SQL is over.
    pub(crate) fn forget_chains(&self) {
        self.undo(CHAINS);
    }

    /// How many faults the transaction has and has not rolled back to before.
    pub(crate) fn mark(&self) -> usize {
        if self.has(RECORDING) { lock(&self.faults).mark() } else { 0 }
    }

    /// Forgets the faults since `mark`: ROLLBACK TO SAVEPOINT undid what they broke. Serialization failures and deadlocks
    /// stay on a list of their own, since they come back after it (40001), or may be what the closure fails with in the
    /// end.
    pub(crate) fn forgive(&self, mark: usize) {
        lock(&self.faults).forgive(mark);
    }

    /// What broke the transaction since `mark`: the first, and never 25P02, which is only its symptom.
    pub(crate) fn fault(&self, mark: usize) -> Option<Fault> {
        if self.has(RECORDING) { lock(&self.faults).since(mark) } else { None }
    }

    /// A serialization failure or deadlock that a savepoint was rolled back for.
    pub(crate) fn forgiven(&self) -> Option<Arc<ServerError>> {
        if self.has(RECORDING) { lock(&self.faults).forgiven() } else { None }
    }

    /// All that is known of the transaction under way.
    pub(crate) fn facts(&self) -> BlockFacts {
        let happened = self.happened.load(SeqCst);
        let has = |what: u32| happened & what != 0;
        // Seldom is there anything on record.
        let (fault, fatal) = if has(ERRORS | NOTED | FATAL) {
            let faults = lock(&self.faults);
            (faults.since(0), faults.fatal.clone())
        } else {
            (None, None)
        };
        BlockFacts {
            begun: has(BEGUN),
            commit_sent: has(COMMIT_SENT),
            committed: has(COMMITTED),
            commit_rolled_back: has(COMMIT_ROLLED_BACK),
            commit_refused: has(COMMIT_REFUSED),
            ended_by_sql: has(ENDED_BY_SQL),
            ended_before_commit: has(ENDED_BEFORE_COMMIT),
            over: has(FATAL | CLOSED),
            status: self.status(),
            fault,
            fatal,
        }
    }
}

/// What the ledger writes.
impl Wire {
    /// Only the task that drives the connection counts, so no other addition can be lost.
    #[inline]
    pub(super) fn on_sent(&self, requests: u64) {
        self.sent.store(self.sent.load(Relaxed) + requests, SeqCst);
        self.progressed();
    }

    #[inline]
    pub(super) fn on_answered(&self, requests: u64) {
        self.answered.store(self.answered.load(Relaxed) + requests, SeqCst);
        self.progressed();
    }

    /// A ReadyForQuery, before it is counted as an answer. `rolled_back` if a ROLLBACK of SQL's own was answered in front
    /// of it.
    #[inline]
    pub(super) fn on_status(&self, status: u8, rolled_back: bool) {
        self.status.store(status, Relaxed);
        let happened = self.happened.load(Relaxed);
        if happened & (BEGUN | ERRORS) != 0 {
            self.on_block_status(status, rolled_back, happened);
        }
    }

    fn on_block_status(&self, status: u8, rolled_back: bool, happened: u32) {
        match status {
            // Outside of a block, and it was not our own COMMIT or ROLLBACK.
            b'I' if happened & BEGUN != 0 => self.happen(ENDED_BY_SQL),
            b'T' if rolled_back && happened & (CHAINS | BEGUN) == CHAINS | BEGUN => {
                self.happen(ENDED_BY_SQL);
            }
            // The block is good, so whatever failed in it was rolled back to before.
            b'T' if happened & ERRORS != 0 => {
                self.undo(ERRORS);
                lock(&self.faults).forgive_the_servers();
            }
            _ => {}
        }
    }

    /// The answer to a command that is not ours.
    pub(super) fn on_command(&self, tag: &[u8]) {
        match tag {
            b"BEGIN" | b"START TRANSACTION" | b"COMMIT" | b"PREPARE TRANSACTION" if self.has(BEGUN) => {
                self.happen(ENDED_BY_SQL);
            }
            b"DISCARD ALL" | b"DEALLOCATE ALL" => _ = self.discards.fetch_add(1, Relaxed),
            _ => {}
        }
    }

    pub(super) fn on_rows(&self, affected: u64) {
        let mut rows = lock(&self.rows);
        rows.count += 1;
        rows.affected += affected;
    }

    pub(super) fn on_key(&self, body: &[u8]) {
        if let Some((pid, rest)) = body.split_first_chunk() {
            self.process_id.store(i32::from_be_bytes(*pid), Relaxed);
            if let Some((key, _)) = rest.split_first_chunk() {
                self.secret_key.store(i32::from_be_bytes(*key), Relaxed);
            }
        }
    }

    pub(super) fn on_error(&self, body: &[u8]) -> Arc<ServerError> {
        let error = Arc::new(parse_error(body));
        self.errors.fetch_add(1, Relaxed);
        if lock(&self.faults).on_error(&error, self.has(RECORDING)) {
            self.happen(ERRORS);
        }
        if error.fatal {
            // No ReadyForQuery follows it.
            self.happen(FATAL);
            self.progress.notify_waiters();
        }
        error
    }

    pub(super) fn on_closed(&self) {
        self.happen(CLOSED);
        self.progress.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIQUE: &[u8] = b"SFEHLER\0VERROR\0C23505\0Mduplicate\0ncustomers_pkey\0\0";

    #[test]
    fn the_first_error_is_kept_and_its_symptom_is_not() {
        let wire = Wire::default();
        wire.record();
        assert!(!wire.on_error(UNIQUE).fatal);
        wire.on_error(b"SFEHLER\0VERROR\0C25P02\0Maborted\0\0");
        assert_eq!(wire.mark(), 1);
        let Some(Fault::Server(first)) = wire.fault(0) else { panic!("an error") };
        assert_eq!((first.code().code(), first.constraint()), ("23505", Some("customers_pkey")));
        assert!(wire.on_error(b"SFATAL\0VFATAL\0C57P01\0Mterminating\0\0").fatal);
        assert_eq!(wire.fatal().map(|e| e.code().code().to_owned()).as_deref(), Some("57P01"));
        wire.stop_recording();
        assert!(wire.fault(0).is_none() && wire.is_over());
    }

    #[test]
    fn what_a_savepoint_undoes_is_forgiven_and_serialization_failures_are_remembered() {
        let wire = Wire::default();
        wire.record();
        wire.on_error(UNIQUE);
        let mark = wire.mark();
        wire.on_error(b"VERROR\0C40001\0Mb\0\0");
        wire.note(Fault::Abandoned);
        wire.forgive(mark);
        assert_eq!(wire.mark(), 1);
        assert_eq!(wire.forgiven().expect("kept").code().code(), "40001");
        wire.record();
        assert!(wire.mark() == 0 && wire.forgiven().is_none());
    }

    #[test]
    fn a_block_that_is_good_again_was_rolled_back_to_before_its_errors() {
        let wire = Wire::default();
        wire.record();
        wire.happen(BEGUN);
        wire.on_error(UNIQUE);
        wire.note(Fault::Abandoned);
        wire.on_status(b'E', false);
        assert_eq!(wire.mark(), 2);
        wire.on_status(b'T', true);
        assert!(matches!(wire.fault(0), Some(Fault::Abandoned)), "what is not the server's stays");
        assert!(!wire.is_ended_by_sql());
    }

    #[test]
    fn a_block_that_ends_by_itself_is_noticed() {
        for (tag, status, chains, ended) in [
            (&b""[..], b'I', false, true),
            (b"COMMIT", b'T', false, true),
            (b"BEGIN", b'T', false, true),
            (b"START TRANSACTION", b'T', false, true),
            (b"PREPARE TRANSACTION", b'I', false, true),
            (b"SAVEPOINT", b'T', false, false),
            (b"ROLLBACK", b'T', false, false),
            (b"ROLLBACK", b'T', true, true),
            (b"ROLLBACK", b'I', false, true),
        ] {
            let wire = Wire::default();
            wire.record();
            wire.happen(BEGUN);
            if chains {
                wire.note_chain();
            }
            wire.on_command(tag);
            wire.on_status(status, tag == b"ROLLBACK");
            assert_eq!(wire.is_ended_by_sql(), ended, "{tag:?} {status} {chains}");
        }
    }

    #[test]
    fn what_waits_is_taken_back_or_put_into_text() {
        let wire = Wire::default();
        assert!(!wire.take_back());
        wire.lead(Step::Begin("BEGIN".into()));
        wire.lead(Step::Savepoint(1));
        assert!(
            wire.holds_begin() && !wire.retract(&Step::Savepoint(2)) && wire.retract(&Step::Savepoint(1))
        );
        assert_eq!(wire.lead_in_text(), "BEGIN;");
        assert!(wire.take_back() && !wire.holds_begin());
    }
}
