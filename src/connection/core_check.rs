//! Every order of events that two requests, a stream and a transaction on one session can see: each is tried, and the
//! promises are looked at in every state.
//!
//! The model drives the real [`Core`] as the shell does. Around it stand the driver's queue, the server with its
//! transaction block and a signal that may come late, callers that are dropped or leaked at any moment, and the one who
//! drains. As a control, each of a number of faulty rules is switched on, and must be found.

use std::collections::{HashSet, VecDeque};

use super::{Answer, Block, Core, Drained, Enqueued, Refusal, Use, Verdict};
use crate::connect::{Begin, TransactionStatus};

/// A rule that somebody might find good enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// BEGIN has a Sync of its own: what follows does not depend on it.
    BeginAlone,
    /// What waits to travel is taken back though the driver has a request that it was meant for.
    TakeBackAnyway,
    /// A request is over when the driver's future is, not when its answer has come to its end; and nobody counts answers.
    OverWithTheFuture,
    /// What is given back is looked at for its transaction only.
    LooksAtStatusOnly,
    /// A statement is cancelled though somebody waits for another.
    CancelsRegardless,
    /// A COMMIT that was left behind is cancelled like anything else.
    CancelsCommit,
    /// After a cancel request nothing waits for the signal.
    NoFenceAfterCancel,
    /// A statement left behind in a transaction is given a moment, and then forgotten.
    ForgetsTheAbandoned,
    /// A stream asks for the connection when its statement is prepared.
    StreamAsksLate,
    /// Other statements of a transaction are sent before its BEGIN is confirmed.
    SendsBesideBegin,
}

const FAULTS: [Fault; 10] = [
    Fault::BeginAlone,
    Fault::TakeBackAnyway,
    Fault::OverWithTheFuture,
    Fault::LooksAtStatusOnly,
    Fault::CancelsRegardless,
    Fault::CancelsCommit,
    Fault::NoFenceAfterCancel,
    Fault::ForgetsTheAbandoned,
    Fault::StreamAsksLate,
    Fault::SendsBesideBegin,
];

/// Who made a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Owner {
    /// One of the callers.
    Caller(usize),
    /// The preparation for one of them.
    Preparation(usize),
    Commit,
    RollBack,
    Drain,
}

/// A request, in the driver's queue or on the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Request {
    owner: Owner,
    /// It was made for the transaction.
    inside: bool,
    /// BEGIN travels with it.
    begin: bool,
    /// Its rows must be read.
    rows: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Caller {
    Idle,
    /// Asked, and told to wait.
    Waiting,
    Granted,
    Preparing,
    Sent(u64),
    /// The driver's future has ended, early or with the answer.
    Told(u64),
    Done,
    Gone,
    Leaked,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Transaction {
    Not,
    /// To be begun once the connection is settled.
    Beginning,
    Active,
    /// The closure has returned: settles, and then ends.
    Returned,
    Ending(u64, bool),
    Over,
    Leaked,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Drain {
    Not,
    Started,
    Fence(u64),
    SecondFence(u64),
    RollBack(u64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Session {
    Held,
    Repairing,
    /// Back in the pool, or closed.
    Back,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Model {
    core: Core,
    queue: VecDeque<Request>,
    server: VecDeque<Request>,
    sent: u64,
    answered: u64,
    /// BEGIN waits for a request to travel with.
    slot: bool,
    status: TransactionStatus,
    /// Two that run a statement each, the first of which must be prepared; and a stream, which must be as well.
    callers: [Caller; 3],
    prepared: [bool; 3],
    transaction: Transaction,
    /// A statement of it was left behind; and that is on record.
    left: bool,
    doomed: bool,
    /// How far its BEGIN has come.
    begun: bool,
    refused: bool,
    drain: Drain,
    /// A cancel request was sent; the signal may not have come yet.
    signal: bool,
    session: Session,
    /// How often something was leaked, failed for no reason, or the server ended.
    mishaps: u8,
}

const STREAM: usize = 2;
const MISHAPS: u8 = 2;

type Step = Result<Model, String>;

impl Model {
    fn new() -> Self {
        Self {
            core: Core::new(),
            queue: VecDeque::new(),
            server: VecDeque::new(),
            sent: 0,
            answered: 0,
            slot: false,
            status: TransactionStatus::Idle,
            callers: [Caller::Idle; 3],
            prepared: [false, true, false],
            transaction: Transaction::Not,
            left: false,
            doomed: false,
            begun: false,
            refused: false,
            drain: Drain::Not,
            signal: false,
            session: Session::Held,
            mishaps: 0,
        }
    }

    /// Everything that can happen next.
    fn steps(&self, fault: Option<Fault>) -> Vec<Step> {
        let mut steps = Vec::new();
        for caller in 0..self.callers.len() {
            self.caller_steps(caller, fault, &mut steps);
        }
        self.transaction_steps(fault, &mut steps);
        self.session_steps(fault, &mut steps);
        self.drain_steps(fault, &mut steps);
        self.server_steps(fault, &mut steps);
        steps
    }

    /// A state that differs from this one.
    fn then(&self, change: impl FnOnce(&mut Self)) -> Step {
        let mut next = self.clone();
        change(&mut next);
        Ok(next)
    }

    fn start_draining(&mut self, start: bool) {
        if start {
            assert_eq!(self.drain, Drain::Not, "two would drain");
            self.drain = Drain::Started;
        }
    }

    fn take_back(&mut self, fault: Option<Fault>) -> bool {
        let safe = !self.core.has_unsent(self.sent) || fault == Some(Fault::TakeBackAnyway);
        safe && std::mem::take(&mut self.slot)
    }

    fn caller_steps(&self, who: usize, fault: Option<Fault>, steps: &mut Vec<Step>) {
        let late = who == STREAM && fault == Some(Fault::StreamAsksLate);
        let what = if who == STREAM && !late { Use::Stream } else { Use::Shared };
        let inside = self.transaction == Transaction::Active;
        match self.callers[who] {
            Caller::Idle | Caller::Waiting if self.session == Session::Held && self.may_run() => {
                let waits = self.callers[who] == Caller::Waiting;
                if !waits || self.core.is_settled() {
                    steps.push(self.then(|next| {
                        next.callers[who] = match next.core.ask(what, next.sent) {
                            Answer::Granted => Caller::Granted,
                            Answer::Wait => Caller::Waiting,
                            Answer::Refused(Refusal::Lost(_) | Refusal::Busy | Refusal::StreamOpen) => {
                                Caller::Done
                            }
                        };
                    }));
                }
                if waits {
                    steps.push(self.then(|next| next.callers[who] = Caller::Gone));
                }
            }
            Caller::Granted => {
                if self.core.lost().is_some() {
                    steps.push(self.then(|next| next.callers[who] = Caller::Done));
                } else if !self.prepared[who] {
                    let mut next = self.clone();
                    if next.core.prepare() {
                        next.callers[who] = Caller::Preparing;
                        let request =
                            Request { owner: Owner::Preparation(who), inside, begin: false, rows: false };
                        next.queue.push_back(request);
                        steps.push(Ok(next));
                    }
                } else {
                    self.send(who, inside, fault, steps);
                }
            }
            _ => {}
        }
        if let Caller::Told(number) = self.callers[who] {
            let complete = self.answered >= number || self.core.lost().is_some();
            if complete || fault == Some(Fault::OverWithTheFuture) {
                steps.push(self.then(|next| {
                    next.core.finish();
                    next.callers[who] = Caller::Done;
                }));
            }
        }
        if matches!(
            self.callers[who],
            Caller::Granted | Caller::Preparing | Caller::Sent(_) | Caller::Told(_)
        ) {
            let number = match self.callers[who] {
                Caller::Sent(number) | Caller::Told(number) => Some(number),
                _ => None,
            };
            steps.push(self.then(|next| {
                next.callers[who] = Caller::Gone;
                if next.core.block() != Block::None {
                    next.left = true;
                    next.doomed |= fault != Some(Fault::ForgetsTheAbandoned);
                }
                let start = next.core.abandon(number);
                next.start_draining(start);
            }));
            if self.mishaps < MISHAPS {
                steps.push(self.then(|next| {
                    next.mishaps += 1;
                    next.callers[who] = Caller::Leaked;
                }));
            }
        }
    }

    fn send(&self, who: usize, inside: bool, fault: Option<Fault>, steps: &mut Vec<Step>) {
        let mut next = self.clone();
        let begin = match (next.refused, next.begun, next.slot) {
            _ if fault == Some(Fault::SendsBesideBegin) => Begin::Confirmed,
            (true, ..) => Begin::Over,
            (_, true, _) => Begin::Confirmed,
            (_, _, true) => Begin::Waiting,
            _ => Begin::UnderWay,
        };
        match next.core.enqueue(|| begin, next.sent) {
            Enqueued::Now(number) => {
                next.callers[who] = Caller::Sent(number);
                let rows = who == STREAM;
                next.queue.push_back(Request { owner: Owner::Caller(who), inside, begin: false, rows });
                steps.push(Ok(next));
            }
            Enqueued::Never => {
                next.core.finish();
                next.callers[who] = Caller::Done;
                steps.push(Ok(next));
            }
            Enqueued::AfterBegin(number) if self.answered >= number && self.core.lost().is_none() => {
                steps.push(Err("a request waits for a BEGIN that was answered".to_owned()));
            }
            Enqueued::AfterBegin(_) | Enqueued::AfterSent(_) | Enqueued::WithSteps | Enqueued::Later => {}
        }
    }

    /// Whether the session lends itself to callers: not while its transaction is being begun or ended.
    fn may_run(&self) -> bool {
        matches!(
            self.transaction,
            Transaction::Not | Transaction::Active | Transaction::Over | Transaction::Leaked
        )
    }

    /// Nobody borrows the session, or the transaction, but what was leaked.
    fn unborrowed(&self) -> bool {
        self.callers
            .iter()
            .all(|caller| matches!(caller, Caller::Idle | Caller::Done | Caller::Gone | Caller::Leaked))
    }
}

/// Transactions and sessions.
impl Model {
    fn transaction_steps(&self, fault: Option<Fault>, steps: &mut Vec<Step>) {
        let settled = self.core.is_settled();
        match self.transaction {
            Transaction::Not if self.session == Session::Held && self.unborrowed() => {
                steps.push(self.then(|next| {
                    next.claim(fault);
                    next.transaction = Transaction::Beginning;
                }));
            }
            Transaction::Beginning if settled => steps.push(self.then(|next| {
                if next.core.lost().is_some() || next.status != TransactionStatus::Idle {
                    next.transaction = Transaction::Over;
                    return;
                }
                next.slot = true;
                (next.left, next.doomed, next.begun, next.refused) = (false, false, false, false);
                next.core.begin();
                next.transaction = Transaction::Active;
            })),
            Transaction::Active if self.unborrowed() => {
                steps.push(self.then(|next| {
                    next.transaction = Transaction::Returned;
                    next.left |= next.core.is_live();
                    next.doomed |= next.core.is_live();
                    let start = next.core.disown();
                    next.start_draining(start);
                }));
                steps.push(self.then(|next| next.drop_transaction(fault)));
                if self.mishaps < MISHAPS {
                    steps.push(self.then(|next| {
                        next.mishaps += 1;
                        next.transaction = Transaction::Leaked;
                    }));
                }
            }
            Transaction::Returned => {
                if settled {
                    steps.push(self.end_transaction());
                }
                steps.push(self.then(|next| next.drop_transaction(fault)));
            }
            Transaction::Ending(number, commit) => {
                if self.answered >= number || self.core.lost().is_some() {
                    steps.push(self.then(|next| {
                        next.core.finish();
                        next.core.end();
                        next.transaction = Transaction::Over;
                    }));
                }
                steps.push(self.then(|next| {
                    let start = next.core.abandon(Some(number));
                    next.start_draining(start);
                    if commit && fault == Some(Fault::CancelsCommit) {
                        // As if it were a statement like any other.
                        next.core.end();
                    }
                    next.drop_transaction(fault);
                }));
            }
            _ => {}
        }
    }

    /// As [`Connection::claim`](super::super::Connection) does.
    fn claim(&mut self, fault: Option<Fault>) {
        if !matches!(self.core.block(), Block::None | Block::Ending) {
            self.take_back(fault);
        }
        let start = self.core.claim();
        self.start_draining(start);
    }

    fn drop_transaction(&mut self, fault: Option<Fault>) {
        let nothing_sent = self.take_back(fault);
        let start = self.core.give_up(nothing_sent);
        self.start_draining(start);
        self.transaction = Transaction::Over;
    }

    /// Commits, or rolls back what must not be committed.
    fn end_transaction(&self) -> Step {
        let mut next = self.clone();
        let begun = !matches!(next.core.block(), Block::None | Block::Planned) && !next.slot;
        if next.core.lost().is_some() || !begun {
            next.slot = false;
            next.core.end();
            next.transaction = Transaction::Over;
            return Ok(next);
        }
        let commit = !next.doomed && next.status == TransactionStatus::Open;
        next.slot = false;
        if next.core.ask(Use::Group, next.sent) != Answer::Granted {
            return Err("a transaction cannot be ended".to_owned());
        }
        next.core.ending();
        let Enqueued::Now(number) = next.core.enqueue(|| Begin::Confirmed, next.sent) else {
            return Err("its end cannot be sent".to_owned());
        };
        let owner = if commit { Owner::Commit } else { Owner::RollBack };
        next.queue.push_back(Request { owner, inside: true, begin: false, rows: false });
        next.transaction = Transaction::Ending(number, commit);
        Ok(next)
    }

    fn session_steps(&self, fault: Option<Fault>, steps: &mut Vec<Step>) {
        let ended = matches!(self.transaction, Transaction::Not | Transaction::Over | Transaction::Leaked);
        if self.session == Session::Held && ended && self.unborrowed() {
            let idle = self.status == TransactionStatus::Idle;
            let answered = self.answered >= self.sent || fault == Some(Fault::OverWithTheFuture);
            let at_rest = idle && answered;
            let verdict = match fault {
                Some(Fault::LooksAtStatusOnly) if idle => Verdict::Clean,
                _ => self.core.verdict(at_rest, false),
            };
            steps.push(match verdict {
                Verdict::Clean => self.lend_again(),
                Verdict::Close(_) => self.then(|next| next.session = Session::Back),
                Verdict::Repair => self.then(|next| {
                    next.take_back(fault);
                    let start = next.core.reclaim(at_rest);
                    next.start_draining(start);
                    next.session = Session::Repairing;
                }),
            });
        }
        if self.session == Session::Repairing && self.core.is_settled() {
            steps.push(match self.core.lost() {
                Some(_) => self.then(|next| next.session = Session::Back),
                None => self.lend_again(),
            });
        }
    }

    /// The next borrower has it: it must be as new.
    fn lend_again(&self) -> Step {
        let as_new = self.queue.is_empty()
            && self.server.is_empty()
            && self.status == TransactionStatus::Idle
            && !self.slot
            && self.drain == Drain::Not;
        if !as_new {
            return Err("a connection was handed on that is not as new".to_owned());
        }
        if self.signal {
            return Err("a connection was handed on that a cancel request is on its way to".to_owned());
        }
        self.then(|next| next.session = Session::Back)
    }
}

/// The one who drains.
impl Model {
    fn drain_steps(&self, fault: Option<Fault>, steps: &mut Vec<Step>) {
        if self.drain == Drain::Not {
            return;
        }
        if self.core.lost().is_some() {
            steps.push(self.then(|next| next.drain = Drain::Not));
            return;
        }
        match self.drain {
            Drain::Started if !self.core.is_preparing() => steps.push(self.then(|next| {
                let number = next.core.enqueue_fence();
                next.push_own(Owner::Drain);
                next.drain = Drain::Fence(number);
            })),
            Drain::Fence(number) if self.answered >= number => steps.push(self.then(|next| {
                if next.signal && fault != Some(Fault::NoFenceAfterCancel) {
                    let number = next.core.enqueue_fence();
                    next.push_own(Owner::Drain);
                    next.drain = Drain::SecondFence(number);
                } else {
                    next.drained();
                }
            })),
            Drain::SecondFence(number) if self.answered >= number => steps.push(self.then(|next| {
                // It was sent when the signal had been: that has come by now.
                next.signal = false;
                next.drained();
            })),
            Drain::RollBack(number) if self.answered >= number => steps.push(self.then(|next| {
                if next.status == TransactionStatus::Idle {
                    next.drain = Drain::Started;
                } else {
                    next.end("ROLLBACK failed");
                }
            })),
            _ => {}
        }
        let fence = match self.drain {
            Drain::Started if self.core.is_preparing() => Some(u64::MAX),
            Drain::Fence(number) => Some(number),
            _ => None,
        };
        let may = match fault {
            Some(Fault::CancelsRegardless) => !matches!(self.core.block(), Block::Ending),
            _ => self.core.may_cancel(self.answered),
        };
        if fence.is_some_and(|fence| self.answered + 1 < fence) && may && !self.signal {
            steps.push(self.then(|next| next.signal = true));
        }
        // What never ends is given up, if nobody waits for it.
        if self.is_stuck() && !self.core.is_awaited(self.answered) {
            steps.push(self.then(|next| next.end("it could not be brought to rest in time")));
        }
    }

    fn push_own(&mut self, owner: Owner) {
        self.queue.push_back(Request { owner, inside: false, begin: false, rows: false });
    }

    fn drained(&mut self) {
        match self.core.drained(self.sent, self.status) {
            Drained::RollBack => {
                let number = self.core.enqueue_fence();
                self.push_own(Owner::RollBack);
                self.drain = Drain::RollBack(number);
            }
            Drained::Done(_) => {
                if self.core.block() == Block::None {
                    self.slot = false;
                }
                self.drain = Drain::Not;
            }
        }
    }

    /// Whether the server waits for a stream that nobody will ever read.
    fn is_stuck(&self) -> bool {
        self.server.front().is_some_and(|front| front.rows && self.callers[STREAM] == Caller::Leaked)
    }

    /// The connection is over.
    fn end(&mut self, reason: &'static str) {
        self.core.lose(reason);
        self.queue.clear();
        self.server.clear();
        self.slot = false;
        self.signal = false;
        self.status = TransactionStatus::Idle;
        self.drain = Drain::Not;
        for caller in &mut self.callers {
            if let Caller::Sent(number) = *caller {
                *caller = Caller::Told(number);
            }
            if let Caller::Preparing | Caller::Granted | Caller::Waiting = *caller {
                *caller = Caller::Done;
            }
        }
    }
}

/// The driver and the server.
impl Model {
    fn server_steps(&self, fault: Option<Fault>, steps: &mut Vec<Step>) {
        if let Some(request) = self.queue.front() {
            steps.push(self.then(|next| {
                let mut request = *request;
                next.queue.pop_front();
                // A simple query of ours takes nothing along that waits for a statement.
                let own = matches!(request.owner, Owner::Commit | Owner::RollBack | Owner::Drain);
                request.begin = !own && std::mem::take(&mut next.slot);
                next.sent += 1;
                next.server.push_back(request);
            }));
        }
        let Some(&front) = self.server.front() else { return };
        // Rows must be read by somebody, or by the driver for somebody who has left.
        if front.rows && self.callers[STREAM] == Caller::Leaked {
            return;
        }
        if let Owner::Caller(who) = front.owner {
            if let Caller::Sent(number) = self.callers[who] {
                // The driver is done before the answer is: with an error, or at the end of COPY's data.
                steps.push(self.then(|next| next.callers[who] = Caller::Told(number)));
            }
        }
        steps.push(self.answer(front, false, false, fault));
        if self.mishaps < MISHAPS {
            for begin_fails in [false, true] {
                if front.begin || !begin_fails {
                    steps.push(self.answer(front, true, begin_fails, fault).map(|mut next| {
                        next.mishaps += 1;
                        next
                    }));
                }
            }
            steps.push(self.then(|next| {
                next.mishaps += 1;
                next.end("the server ended the session");
            }));
        }
        if self.signal {
            steps.push(self.hit(front, fault));
        }
    }

    /// The signal of a cancel request comes.
    fn hit(&self, front: Request, fault: Option<Fault>) -> Step {
        match front.owner {
            Owner::Caller(who) if !matches!(self.callers[who], Caller::Gone | Caller::Leaked) => {
                return Err("a statement was cancelled that somebody waits for".to_owned());
            }
            Owner::Preparation(who) if self.callers[who] == Caller::Preparing => {
                return Err("a preparation was cancelled that somebody waits for".to_owned());
            }
            Owner::Commit => return Err("a COMMIT was cancelled".to_owned()),
            _ => {}
        }
        // A fence that is hit is still answered.
        self.answer(front, true, false, fault)
    }

    /// The server answers the first request.
    fn answer(&self, front: Request, fails: bool, begin_fails: bool, fault: Option<Fault>) -> Step {
        use TransactionStatus::{Failed, Idle, Open};
        let mut next = self.clone();
        next.server.pop_front();
        next.answered += 1;
        let mut skipped = false;
        if front.begin {
            if begin_fails {
                // The server reads over what stands under the same Sync.
                skipped = fault != Some(Fault::BeginAlone);
                next.refused = true;
            } else if next.status == Idle {
                next.status = Open;
                next.begun = true;
            }
        }
        match front.owner {
            Owner::Caller(_) | Owner::Preparation(_) if skipped => {}
            Owner::Caller(_) | Owner::Preparation(_) => {
                let runs = matches!(front.owner, Owner::Caller(_));
                if front.inside && runs && next.status == Idle {
                    return Err("a statement of a transaction ran outside of it".to_owned());
                }
                if fails && next.status == Open {
                    next.status = Failed;
                }
            }
            Owner::Commit => {
                if next.left {
                    return Err("a transaction was committed that a statement was left behind in".to_owned());
                }
                next.status = Idle;
            }
            Owner::RollBack => {
                if !fails {
                    next.status = Idle;
                }
            }
            Owner::Drain => {}
        }
        match front.owner {
            Owner::Caller(who) => {
                if let Caller::Sent(number) = next.callers[who] {
                    next.callers[who] = Caller::Told(number);
                }
            }
            Owner::Preparation(who) => {
                next.core.prepared(next.sent);
                next.prepared[who] = true;
                if next.callers[who] == Caller::Preparing {
                    next.callers[who] = Caller::Granted;
                }
            }
            _ => {}
        }
        Ok(next)
    }
}

/// Goes through every state that can be reached, breadth first: how many there are, or the shortest way to one in which
/// a promise is broken.
fn explore(fault: Option<Fault>) -> Result<usize, String> {
    let mut seen = HashSet::from([Model::new()]);
    let mut states = VecDeque::from([Model::new()]);
    while let Some(state) = states.pop_front() {
        let steps = state.steps(fault);
        if steps.is_empty() {
            state.check_end()?;
        }
        for step in steps {
            let next = step.and_then(|next| next.check().map(|()| next));
            let next = next.map_err(|broken| format!("{broken}, after {state:?}"))?;
            if seen.insert(next.clone()) {
                states.push_back(next);
            }
        }
    }
    Ok(seen.len())
}

impl Model {
    /// What must be so in every state.
    fn check(&self) -> Result<(), String> {
        let others = self.callers[..STREAM].iter().any(|caller| matches!(caller, Caller::Sent(_)));
        if others && matches!(self.callers[STREAM], Caller::Sent(_)) {
            return Err("a request waits behind a stream that may never be read".to_owned());
        }
        Ok(())
    }

    /// Nothing can happen any more: then nobody waits, and the session is over.
    fn check_end(&self) -> Result<(), String> {
        let waits =
            |caller: &Caller| !matches!(caller, Caller::Idle | Caller::Done | Caller::Gone | Caller::Leaked);
        if self.callers.iter().any(waits) || self.session != Session::Back || self.drain != Drain::Not {
            return Err(format!("somebody waits for ever: {self:?}"));
        }
        Ok(())
    }
}

#[test]
fn no_order_of_events_breaks_a_promise() {
    let states = explore(None).unwrap_or_else(|broken| panic!("{broken}"));
    println!("{states} states, and every promise is kept in each of them");
    assert!(states > 10_000, "{states} states are too few to have been all");
}

#[test]
fn every_rule_that_is_not_good_enough_is_found_out() {
    for fault in FAULTS {
        let broken = explore(Some(fault)).expect_err(&format!("{fault:?} was not noticed"));
        println!("{fault:?}: {}", broken.split(", after").next().unwrap_or_default());
    }
}
