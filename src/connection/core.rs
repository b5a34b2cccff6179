//! The rules of one connection: who may send, what a drop means, when to cancel, and what becomes of it in the end.
//!
//! Pure: no I/O, no clock, no waiting. The [shell](super::shell) asks, and performs what it is told. What the server has
//! answered is read off the wire and given as a number. The life of a connection, with what moves it on:
//!
//! ```text
//!              ask                      ask                    ask for itself
//!   ┌──────┐ ───────► ┌───────────┐ ───────► ┌───────────┐   ┌──────┐ ──────► ┌───────────┐
//!   │ Free │          │ Shared(1) │          │ Shared(n) │   │ Free │         │ Exclusive │
//!   └──────┘ ◄─────── └───────────┘ ◄─────── └───────────┘   └──────┘ ◄────── └───────────┘
//!       ▲     finish        │        finish        │                  finish        │
//!       │                   └──────────┬───────────┘        share: a group is sent, │
//!       │ drained                      │                    and becomes Shared(1)   │
//!       │                              │ abandon, give up, disown, claim            │
//!       │                        ┌─────▼────┐                                       │
//!       └─────────────────────── │ Draining │ ◄─────────────────────────────────────┘
//!                                └─────┬────┘
//!                 lose (from anywhere) │
//!                                ┌─────▼────┐
//!                                │   Lost   │   for good
//!                                └──────────┘
//!
//!   block:  None ──begin──► Planned ──first request──► Open ──COMMIT, ROLLBACK sent──► Ending ──end──► None
//!                              └────────────────────── give up, claim, end ─────────────────────────────┘
//! ```
//!
//! While it drains nobody is granted anything: a cancel request names the server's backend, not a statement, and would hit
//! whatever runs there.

use crate::connect::{Begin, TransactionStatus};

/// Who may send.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Lane {
    Free,
    /// So many requests are under way, or wait for their statement to be prepared.
    Shared(u32),
    /// One request has the connection for itself.
    Exclusive(Use),
    /// What nobody waits for any more is brought to its end; so many requests are still waited for.
    Draining(u32),
    /// It must not be used again.
    Lost(&'static str),
}

/// What a request needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Use {
    /// Others may be under way as well: the driver answers them in order.
    Shared,
    /// A row stream or COPY: the driver answers nothing else until it is read.
    Stream,
    /// Requests of our own making, which must not be mixed with others.
    Group,
}

/// The transaction, as far as it is ours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) enum Block {
    #[default]
    None,
    /// Its BEGIN goes with the first request.
    Planned,
    Open,
    /// COMMIT or ROLLBACK is under way, or was when its caller left: it must not be cancelled.
    Ending,
}

/// What is said to somebody who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Granted,
    /// Ask again when something has changed.
    Wait,
    Refused(Refusal),
}

/// Whether a request may be given to the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Enqueued {
    /// Now, under this number.
    Now(u64),
    /// When something has changed.
    Later,
    /// When the request with this number is answered, with which BEGIN travels.
    AfterBegin(u64),
    /// When the request with this number is sent: a step belongs between the two.
    AfterSent(u64),
    /// When the steps that wait have been put before it.
    WithSteps,
    /// Its transaction is none.
    Never,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    Lost(&'static str),
    StreamOpen,
    Busy,
}

/// What becomes of a connection when its session ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Back to the pool as it is.
    Clean,
    /// It must be brought to rest first.
    Repair,
    Close(&'static str),
}

/// What the one who drains has to do when everything that was sent is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Drained {
    /// Roll back what is open.
    RollBack,
    /// It is at rest. Faults since this mark are forgiven.
    Done(Option<usize>),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Core {
    lane: Lane,
    block: Block,
    /// So many statements are being prepared: the driver sends requests of its own for their types, so nobody else may
    /// send until they are done.
    preparing: u32,
    /// The number of the request that was given to the driver last; as the wire counts them.
    enqueued: u64,
    /// The numbers of those that nobody waits for any more.
    abandoned: Vec<u64>,
    /// Roll back once drained.
    roll_back: bool,
    /// Forgive the faults since this mark once drained.
    forgive: Option<usize>,
    /// The raw client was handed out: what it has under way is unknown.
    raw: bool,
    /// Steps wait that belong behind requests which the driver has not sent yet.
    later: bool,
}

impl Core {
    pub(super) fn new() -> Self {
        Self {
            lane: Lane::Free,
            block: Block::None,
            preparing: 0,
            enqueued: 0,
            abandoned: Vec::new(),
            roll_back: false,
            forgive: None,
            raw: false,
            later: false,
        }
    }

    #[inline]
    pub(super) fn block(&self) -> Block {
        self.block
    }

    pub(super) fn lost(&self) -> Option<&'static str> {
        match self.lane {
            Lane::Lost(reason) => Some(reason),
            _ => None,
        }
    }

    /// Whether nobody has a request.
    #[inline]
    pub(super) fn is_free(&self) -> bool {
        self.lane == Lane::Free
    }

    /// Whether somebody has a request and may be waiting for it.
    pub(super) fn is_live(&self) -> bool {
        match self.lane {
            Lane::Shared(_) | Lane::Exclusive(_) => true,
            Lane::Draining(live) => live > 0,
            Lane::Free | Lane::Lost(_) => false,
        }
    }

    /// Whether requests are granted, or it is lost: there is nothing to wait for.
    pub(super) fn is_settled(&self) -> bool {
        !matches!(self.lane, Lane::Draining(_))
    }

    /// Somebody wants to make a request. `sent` is how many the wire has seen.
    #[inline]
    pub(super) fn ask(&mut self, what: Use, sent: u64) -> Answer {
        match (self.lane, what) {
            (Lane::Free, _) if self.raw => return Answer::Wait,
            (Lane::Free, Use::Shared) => self.lane = Lane::Shared(1),
            (Lane::Free, alone) => self.lane = Lane::Exclusive(alone),
            (Lane::Shared(n), Use::Shared) => {
                self.lane = Lane::Shared(n + 1);
                return self.granted();
            }
            (Lane::Shared(_), _) => return Answer::Refused(Refusal::Busy),
            (Lane::Exclusive(Use::Stream), _) => return Answer::Refused(Refusal::StreamOpen),
            (Lane::Exclusive(_), _) => return Answer::Refused(Refusal::Busy),
            (Lane::Draining(_), _) => return Answer::Wait,
            (Lane::Lost(reason), _) => return Answer::Refused(Refusal::Lost(reason)),
        }
        // At rest, all that was given to the driver has been sent; what is sent for the pool's own sake is counted in.
        self.enqueued = sent;
        self.granted()
    }

    #[inline]
    fn granted(&mut self) -> Answer {
        if self.block == Block::Planned {
            self.block = Block::Open;
        }
        Answer::Granted
    }

    /// Whether a request that was granted may be given to the driver.
    #[inline]
    pub(super) fn may_enqueue(&self) -> bool {
        self.preparing == 0 && matches!(self.lane, Lane::Shared(_) | Lane::Exclusive(_))
    }

    /// A request that was granted is about to be given to the driver. `begin` tells how far the transaction's BEGIN has come,
    /// and `sent` how many requests the wire has seen.
    ///
    /// Until BEGIN is confirmed there is but the one request that it travels with: what has a Sync of its own would run on
    /// its own, should BEGIN fail.
    #[inline]
    pub(super) fn enqueue(&mut self, begin: impl FnOnce() -> Begin, sent: u64) -> Enqueued {
        if !self.may_enqueue() {
            return Enqueued::Later;
        }
        if self.later {
            return if self.has_unsent(sent) {
                Enqueued::AfterSent(self.enqueued)
            } else {
                Enqueued::WithSteps
            };
        }
        if self.block == Block::Open {
            match begin() {
                Begin::Confirmed => {}
                Begin::Waiting if !self.has_unsent(sent) => {}
                Begin::Waiting | Begin::UnderWay => return Enqueued::AfterBegin(self.enqueued),
                Begin::Over => return Enqueued::Never,
            }
        }
        self.enqueued += 1;
        Enqueued::Now(self.enqueued)
    }

    /// Whether the request that was given to the driver just now is the next that the wire sees, so that what is to travel
    /// along goes with it.
    pub(super) fn is_next(&self, sent: u64) -> bool {
        self.preparing == 0 && self.enqueued == sent + 1
    }

    /// One more goes right behind a request that was given to the driver just now.
    pub(super) fn enqueue_behind(&mut self) {
        self.enqueued += 1;
    }

    /// A step is to travel with the next request. Whether it must wait: it must not go with a request that was given to the
    /// driver before, and is not sent.
    pub(super) fn lead_later(&mut self, sent: u64) -> bool {
        self.later |= self.has_unsent(sent);
        self.later
    }

    pub(super) fn has_later(&self) -> bool {
        self.later
    }

    /// The steps that waited were put before the next request, or are nobody's any more.
    pub(super) fn no_later(&mut self) {
        self.later = false;
    }

    /// Whether the driver may have a request that it has not sent yet: what is to travel with the next one is that one's.
    pub(super) fn has_unsent(&self, sent: u64) -> bool {
        self.preparing > 0 || self.enqueued > sent
    }

    /// The one who drains gives the driver a request of its own.
    pub(super) fn enqueue_fence(&mut self) -> u64 {
        self.enqueued += 1;
        self.abandoned.push(self.enqueued);
        self.enqueued
    }

    /// The number of the request that was given to the driver last.
    pub(super) fn last(&self) -> u64 {
        self.enqueued
    }

    /// The driver did not take the request after all.
    pub(super) fn not_enqueued(&mut self) {
        self.enqueued -= 1;
    }

    /// A request that was granted needs its statement prepared first. Whether that may begin now.
    pub(super) fn prepare(&mut self) -> bool {
        // Steps that wait go with the first of what is sent for it.
        let may = matches!(self.lane, Lane::Shared(_) | Lane::Exclusive(_)) && !self.later;
        self.preparing += u32::from(may);
        may
    }

    /// It is prepared, or could not be; all that was sent for it is answered but for a ReadyForQuery that is on its way.
    pub(super) fn prepared(&mut self, sent: u64) {
        self.preparing -= 1;
        if self.preparing == 0 {
            self.enqueued = self.enqueued.max(sent);
        }
    }

    /// A request of our own making is sent as a whole, and needs the connection for itself no longer.
    pub(super) fn share(&mut self) {
        if self.lane == Lane::Exclusive(Use::Group) {
            self.lane = Lane::Shared(1);
        }
    }

    /// A request has had its answer.
    #[inline]
    pub(super) fn finish(&mut self) {
        match &mut self.lane {
            Lane::Shared(1) | Lane::Exclusive(_) => self.lane = Lane::Free,
            Lane::Shared(n) => *n -= 1,
            Lane::Draining(n) => *n = n.saturating_sub(1),
            Lane::Free | Lane::Lost(_) => {}
        }
    }

    /// A request was dropped before that; with its number, if the driver had got it. Whether draining must be started.
    pub(super) fn abandon(&mut self, number: Option<u64>) -> bool {
        self.abandoned.extend(number);
        self.drain(|live| live - 1)
    }

    /// Draining begins, if it has not: `still` of the requests that are under way are still waited for.
    fn drain(&mut self, still: impl FnOnce(u32) -> u32) -> bool {
        let (live, start) = match self.lane {
            Lane::Free => (0, true),
            Lane::Shared(n) => (n, true),
            Lane::Exclusive(_) => (1, true),
            Lane::Draining(n) => (n, false),
            Lane::Lost(_) => return false,
        };
        self.lane = Lane::Draining(if live == 0 { 0 } else { still(live) });
        start
    }

    /// Whoever calls knows that nobody can be waiting for what is under way: its futures were leaked. Whether draining
    /// must be started.
    pub(super) fn disown(&mut self) -> bool {
        match self.lane {
            Lane::Shared(_) | Lane::Exclusive(_) | Lane::Draining(_) => self.drain(|_| 0),
            Lane::Free | Lane::Lost(_) => false,
        }
    }

    /// Whoever calls has the connection for itself: what is under way, and a transaction that is open, were leaked, and
    /// what the raw client was used for is over. Whether draining must be started.
    pub(super) fn claim(&mut self) -> bool {
        if self.block != Block::None {
            // A COMMIT is seen to its end.
            if self.block != Block::Ending {
                self.block = Block::None;
            }
            self.roll_back = true;
        }
        if self.roll_back || self.raw { self.drain(|_| 0) } else { self.disown() }
    }

    /// The session has ended, so everything is nobody's; `at_rest` if the server owes nothing and is in no transaction.
    /// Whether draining must be started.
    pub(super) fn reclaim(&mut self, at_rest: bool) -> bool {
        self.roll_back |= !at_rest;
        self.claim()
    }

    /// A transaction begins; nothing is sent yet.
    pub(super) fn begin(&mut self) {
        self.block = Block::Planned;
    }

    /// COMMIT or ROLLBACK is about to be sent.
    pub(super) fn ending(&mut self) {
        self.block = Block::Ending;
    }

    /// The transaction is over. A COMMIT on a connection that was lost over it may still run, and is left alone.
    pub(super) fn end(&mut self) {
        if !(self.block == Block::Ending && matches!(self.lane, Lane::Lost(_))) {
            self.block = Block::None;
        }
    }

    /// The transaction was dropped in the middle. Whether draining must be started; `nothing_sent` if its BEGIN never left.
    pub(super) fn give_up(&mut self, nothing_sent: bool) -> bool {
        let ending = self.block == Block::Ending;
        let open = matches!(self.block, Block::Open | Block::Ending) && !nothing_sent;
        if !ending {
            self.block = Block::None;
        }
        if !open {
            return false;
        }
        self.roll_back = true;
        self.drain(|live| live)
    }

    /// A savepoint was dropped in the middle: forgive the faults since `mark`, those still to come too.
    pub(super) fn forgive_later(&mut self, mark: usize) {
        if matches!(self.lane, Lane::Draining(_)) {
            self.forgive = Some(self.forgive.map_or(mark, |earlier| earlier.min(mark)));
        }
    }

    /// The raw client is handed out.
    pub(super) fn lend(&mut self) {
        self.raw = true;
    }

    pub(super) fn is_raw(&self) -> bool {
        self.raw
    }

    /// Somebody asks after the raw client was used: what it has under way must be drained first.
    pub(super) fn take_in(&mut self) -> bool {
        self.raw && self.lane == Lane::Free && self.drain(|_| 0)
    }

    /// Whether the statement that runs on the server may be cancelled, when so many requests are answered: somebody left it
    /// behind, nobody waits for any other, and it is no COMMIT.
    pub(super) fn may_cancel(&self, answered: u64) -> bool {
        matches!(self.lane, Lane::Draining(_)) && self.block != Block::Ending && !self.is_awaited(answered)
    }

    /// Whether anybody is still waiting for an answer of the server's.
    pub(super) fn is_awaited(&self, answered: u64) -> bool {
        let Lane::Draining(live) = self.lane else { return false };
        let owed = self.enqueued.saturating_sub(answered);
        let left = self.abandoned.iter().filter(|number| **number > answered).count() as u64;
        live > 0 && (self.preparing > 0 || owed > left)
    }

    /// Whether a COMMIT or ROLLBACK may be under way.
    pub(super) fn is_ending(&self) -> bool {
        self.block == Block::Ending
    }

    pub(super) fn is_preparing(&self) -> bool {
        self.preparing > 0
    }

    /// Everything that was given to the driver is sent and answered. What is next.
    pub(super) fn drained(&mut self, sent: u64, status: TransactionStatus) -> Drained {
        self.enqueued = sent;
        self.abandoned.clear();
        if std::mem::take(&mut self.roll_back) && status != TransactionStatus::Idle {
            return Drained::RollBack;
        }
        if self.block == Block::Ending {
            self.block = Block::None;
        }
        if let Lane::Draining(live) = self.lane {
            self.lane = if live == 0 { Lane::Free } else { Lane::Shared(live) };
        }
        self.raw = false;
        Drained::Done(self.forgive.take())
    }

    /// It must not be used again. The first reason counts.
    pub(super) fn lose(&mut self, reason: &'static str) {
        if !matches!(self.lane, Lane::Lost(_)) {
            self.lane = Lane::Lost(reason);
        }
    }

    /// What becomes of it now that its session ends, so that nobody is left who could wait for anything; `at_rest` if the
    /// server owes nothing and is in no transaction, `dirty` if it must be reset.
    pub(super) fn verdict(&self, at_rest: bool, dirty: bool) -> Verdict {
        match self.lane {
            Lane::Lost(reason) => Verdict::Close(reason),
            Lane::Free
                if at_rest && !dirty && !self.raw && self.block == Block::None && self.preparing == 0 =>
            {
                Verdict::Clean
            }
            _ => Verdict::Repair,
        }
    }
}

#[cfg(test)]
#[path = "core_check.rs"]
mod check;
