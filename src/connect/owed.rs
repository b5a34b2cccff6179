//! Who is owed what: the requests that the server has still to answer, in order, and what the driver is to get.
//!
//! Each Sync or simple query that goes out is owed a ReadyForQuery. Most requests are the driver's own affair, and are only
//! counted; the others stand here until theirs has come.

use std::collections::VecDeque;

use bytes::BytesMut;

use super::exchange::Exchange;

/// Whose the answer to a request is that is not the driver's own affair alone.
#[derive(Debug)]
pub(super) enum Answering {
    /// A Close, which is not counted.
    Closing,
    /// Not even the driver waits for it any more.
    Nobody,
    Flight(Exchange),
}

#[derive(Debug)]
struct Special {
    /// How many ReadyForQuery come before its own.
    at: u64,
    kind: Answering,
}

#[derive(Debug)]
pub(super) struct Owed {
    /// How many ReadyForQuery were asked for, and how many came.
    asked: u64,
    came: u64,
    special: VecDeque<Special>,
    /// Up to this ReadyForQuery the answers are the driver's own affair.
    plain: u64,
    /// What the driver is to get, where that is not what came.
    pub(super) ready: BytesMut,
}

impl Owed {
    pub(super) fn new() -> Self {
        Self {
            // Start-up ends in one as well, and is no request.
            asked: 1,
            came: 0,
            special: VecDeque::from([Special { at: 0, kind: Answering::Closing }]),
            plain: 0,
            ready: BytesMut::new(),
        }
    }

    /// The number of the ReadyForQuery that is asked for next.
    pub(super) fn next(&self) -> u64 {
        self.asked
    }

    /// So many more are asked for.
    #[inline]
    pub(super) fn ask(&mut self, more: u64) {
        self.asked += more;
        self.look_ahead();
    }

    /// The next that is asked for belongs to this.
    pub(super) fn expect(&mut self, kind: Answering) {
        self.special.push_back(Special { at: self.asked, kind });
    }

    /// Whose the answers are has changed.
    fn look_ahead(&mut self) {
        let special = self.special.front().map_or(u64::MAX, |special| special.at);
        self.plain = special.min(self.asked);
    }

    /// Whether every frame is the driver's own affair, up to the next ReadyForQuery at least.
    #[inline]
    pub(super) fn is_plain(&self) -> bool {
        self.came < self.plain
    }

    /// Whether nothing is owed: a ReadyForQuery that comes is nobody's.
    pub(super) fn is_nothing(&self) -> bool {
        self.came >= self.asked
    }

    /// What is being answered, if it is not the driver's own affair.
    pub(super) fn front(&mut self) -> Option<&mut Answering> {
        let came = self.came;
        self.special.front_mut().filter(|special| special.at == came).map(|special| &mut special.kind)
    }

    /// The flight that is being answered, and what the driver is to get.
    pub(super) fn flight(&mut self) -> Option<(&mut Exchange, &mut BytesMut)> {
        let came = self.came;
        match self.special.front_mut() {
            Some(Special { at, kind: Answering::Flight(exchange) }) if *at == came => {
                Some((exchange, &mut self.ready))
            }
            _ => None,
        }
    }

    /// The flight that was written last, and what the driver is to get.
    pub(super) fn last_flight(&mut self) -> Option<(&mut Exchange, &mut BytesMut)> {
        let exchange = self.special.iter_mut().rev().find_map(|special| match &mut special.kind {
            Answering::Flight(exchange) => Some(exchange),
            Answering::Closing | Answering::Nobody => None,
        })?;
        Some((exchange, &mut self.ready))
    }

    /// The ReadyForQuery of the driver's own affair has come.
    #[inline]
    pub(super) fn came_plain(&mut self) {
        self.came += 1;
    }

    /// A ReadyForQuery has come: its number, and what it belongs to if it is not the driver's own affair.
    pub(super) fn came(&mut self) -> (u64, Option<Answering>) {
        let number = self.came;
        self.came += 1;
        if self.special.front().is_none_or(|special| special.at != number) {
            return (number, None);
        }
        let special = self.special.pop_front();
        self.look_ahead();
        (number, special.map(|special| special.kind))
    }
}
