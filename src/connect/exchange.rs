//! How far the server has come with one [`Flight`]: which of its answers are ours, and what they say of the transaction.

use std::collections::VecDeque;

use bytes::{BufMut, BytesMut};

use super::flight::{Flight, Kind, Step};
use super::wire::{Wire, happened};

/// What the driver waits for at the end of each of its requests. It does not look at the status.
pub(super) const READY: &[u8] = b"Z\0\0\0\x05T";

/// How far the server has come with a flight.
#[derive(Debug, Default)]
pub(super) struct Exchange {
    kind: Kind,
    /// How many of our steps are still to be answered.
    lead: u32,
    /// When so many are, the next is BEGIN; and likewise ROLLBACK. 0 if there is none.
    begin: u32,
    roll_back: u32,
    /// How many rows of `execute_many` are.
    rows: u32,
    /// How many of the driver's requests are.
    requests: u32,
    /// COMMIT goes with it: behind the last request, or as the last step.
    commit: bool,
    /// Where the driver let go of a statement: so many of its requests came behind.
    closes: VecDeque<u32>,
    /// All of the driver's requests but for the ReadyForQuery are answered, and COMMIT is next.
    requests_done: bool,
    /// An error was answered: the server reads over the rest.
    failed: bool,
    /// COMMIT was confirmed, and the driver has been given its ReadyForQuery.
    told: bool,
}

impl Exchange {
    pub(super) fn new(flight: &Flight) -> Self {
        let steps = flight.lead.len() as u32;
        let place =
            |wanted: fn(&Step) -> bool| flight.lead.iter().position(wanted).map_or(0, |at| steps - at as u32);
        Self {
            kind: flight.kind,
            lead: steps,
            begin: place(Step::begins),
            roll_back: place(|step| matches!(step, Step::RollBack)),
            rows: flight.row_count,
            requests: if flight.kind == Kind::AheadOfText { 0 } else { flight.requests.max(1) },
            commit: flight.commit,
            ..Self::default()
        }
    }

    /// Whether the next answer is that to COMMIT.
    fn at_commit(&self) -> bool {
        self.commit && if self.kind == Kind::End { self.lead == 1 } else { self.requests_done }
    }

    /// Whether an answer that comes now is to something of ours, and not the driver's.
    pub(super) fn is_ours(&self) -> bool {
        let ours = self.lead > 0 || self.rows > 0 || self.requests_done;
        ours && self.kind != Kind::Text && !self.failed
    }

    /// Whether nothing of the driver's is in it.
    pub(super) fn is_all_ours(&self) -> bool {
        self.requests == 0
    }

    pub(super) fn kind(&self) -> Kind {
        self.kind
    }

    pub(super) fn has_failed(&self) -> bool {
        self.failed
    }

    /// Whether the driver has the ReadyForQuery of its last request already.
    pub(super) fn is_told(&self) -> bool {
        self.told
    }

    /// The driver let go of a statement when so many of its requests were not written, and is told that it is done as soon
    /// as the requests before it are: now, if they are answered.
    pub(super) fn close(&mut self, left: u32, ready: &mut BytesMut) {
        // Those that are answered are no longer counted in either.
        if self.requests <= left && !self.failed {
            ready.put_slice(READY);
        } else {
            self.closes.push_back(left);
        }
    }

    /// An error was answered.
    pub(super) fn on_error(&mut self, fatal: bool, wire: &Wire) {
        if self.failed {
            return;
        }
        self.failed = true;
        if self.at_commit() {
            if !fatal {
                // Over, and rolled back.
                wire.undo(happened::BEGUN);
                wire.happen(happened::COMMIT_REFUSED);
            }
            return;
        }
        if self.lead > 0 {
            wire.happen(happened::LEAD_REFUSED);
            if self.begin > 0 {
                wire.happen(happened::START_REFUSED);
            }
        }
        if self.begin > 0 && self.lead >= self.begin {
            wire.happen(happened::BEGIN_REFUSED);
        }
        if fatal && self.commit {
            wire.happen(happened::ENDED_BEFORE_COMMIT);
        }
    }

    /// A command was answered, with this tag. Whether it was the driver's.
    pub(super) fn on_completion(&mut self, tag: &[u8], ready: &mut BytesMut, wire: &Wire) -> bool {
        if self.lead > 0 {
            self.on_step(tag, wire);
            return false;
        }
        if self.rows > 0 {
            self.rows -= 1;
            wire.on_rows(rows(tag));
            return false;
        }
        if self.requests_done {
            on_commit(tag, wire);
            if wire.is_committed() {
                // Whatever happens now changes nothing any more.
                self.told = true;
                ready.put_slice(READY);
            }
            return false;
        }
        // A text may be answered by several.
        if self.kind != Kind::Text {
            self.on_request(ready, wire);
        }
        true
    }

    fn on_step(&mut self, tag: &[u8], wire: &Wire) {
        if self.at_commit() {
            on_commit(tag, wire);
        }
        // One that was given up meanwhile is nobody's.
        if self.lead == self.begin && wire.has(happened::RECORDING) {
            // Something else may have been prepared by our name: what came behind has run on its own.
            wire.happen(if tag == b"BEGIN" { happened::BEGUN } else { happened::ENDED_BY_SQL });
        }
        if self.lead == self.roll_back {
            wire.undo(happened::BEGUN);
        }
        self.lead -= 1;
    }

    fn on_request(&mut self, ready: &mut BytesMut, wire: &Wire) {
        if self.requests > 1 {
            self.requests -= 1;
            ready.put_slice(READY);
            while self.closes.front().is_some_and(|left| *left >= self.requests) {
                self.closes.pop_front();
                ready.put_slice(READY);
            }
            wire.on_answered(1);
        } else if self.commit {
            self.requests_done = true;
            wire.on_commit_next();
        }
    }

    /// Its ReadyForQuery has come.
    pub(super) fn end(self, ready: &mut BytesMut, wire: &Wire) {
        // Those that the server has read over, and the Closes between them.
        for _ in 1..self.requests as usize + self.closes.len() {
            ready.put_slice(READY);
        }
        if self.requests > 0 {
            wire.on_answered(self.requests.into());
        }
    }
}

/// COMMIT of ours was answered.
fn on_commit(tag: &[u8], wire: &Wire) {
    if !wire.has(happened::BEGUN) || wire.is_ended_by_sql() {
        return; // outside of a block it does nothing, and says the same
    }
    match tag {
        b"COMMIT" => wire.happen(happened::COMMITTED),
        b"ROLLBACK" => wire.happen(happened::COMMIT_ROLLED_BACK),
        _ => return,
    }
    wire.undo(happened::BEGUN);
    // As the ReadyForQuery behind it will say.
    wire.on_status(b'I', false);
}

/// The number at the end of a command's tag, if there is one.
fn rows(tag: &[u8]) -> u64 {
    let digits = tag.iter().rev().take_while(|b| b.is_ascii_digit()).count();
    let number = std::str::from_utf8(&tag[tag.len() - digits..]).ok();
    number.and_then(|number| number.parse().ok()).unwrap_or(0)
}
