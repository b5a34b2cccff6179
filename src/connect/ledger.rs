//! What the server owes: every frame that goes out and comes in, told apart by whose it is. No I/O.
//!
//! Each Sync or simple query that goes out is owed a ReadyForQuery, and the server answers in order. So the ledger knows
//! at every moment which request is being answered. Most requests are the driver's own affair, and are only counted. For
//! the others it does what the driver cannot: it puts the steps of a [`Flight`] under the Sync of the request that they
//! belong to, takes out the Syncs between requests that go together, keeps the answers to what is ours from the driver,
//! and gives it the ReadyForQuery it waits for. (PostgreSQL manual, chapter 54.2 "Message Flow".)

use std::collections::VecDeque;
use std::io;
use std::ops::Range;

use bytes::{BufMut, BytesMut};

use super::flight::{Flight, Kind, Step};
use super::frames::{Frames, whole};
use super::wire::{Wire, happened};

/// Error bodies can quote whole queries; more than this of one is not needed.
const BODY_LIMIT: usize = 64 * 1024;

const SYNC: &[u8] = b"S\0\0\0\x04";
const FLUSH: &[u8] = b"H\0\0\0\x04";

/// What the driver waits for at the end of each of its requests. It does not look at the status.
const READY: &[u8] = b"Z\0\0\0\x05T";

/// Ends a COPY that nobody sends data for.
const COPY_FAIL: &[u8] = b"COPY FROM STDIN is possible by copy_in and copy_rows_in only\0";

/// The driver's answer to a COPY whose data nobody reads.
const COPY_REFUSED: &[u8] =
    b"SERROR\0VERROR\0C0A000\0MCOPY TO STDOUT is possible by copy_out and copy_rows_out only\0\0";

/// The request that is being written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Writing {
    /// The next frame begins a request.
    #[default]
    Nothing,
    /// Only Close so far: the driver lets go of statements whenever their last user does.
    Closing,
    /// The data of a COPY whose Sync the server reads over.
    CopyData,
    Request,
}

/// A request that is not the driver's own affair alone.
#[derive(Debug)]
struct Special {
    /// How many ReadyForQuery come before its own.
    at: u64,
    kind: Answering,
}

#[derive(Debug)]
enum Answering {
    /// A Close, which is not counted.
    Closing,
    /// Not even the driver waits for it any more.
    Nobody,
    Flight(Exchange),
}

/// How far the server has come with a flight.
#[derive(Debug, Default)]
struct Exchange {
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
    fn new(flight: &Flight) -> Self {
        let steps = u32::try_from(flight.lead.len()).unwrap_or(u32::MAX);
        let place = |wanted: fn(&Step) -> bool| {
            flight.lead.iter().position(wanted).map_or(0, |index| steps - index as u32)
        };
        Self {
            kind: flight.kind,
            lead: steps,
            begin: place(|step| matches!(step, Step::Begin(_))),
            roll_back: place(|step| matches!(step, Step::RollBack)),
            rows: flight.row_count,
            requests: flight.requests.max(1),
            commit: flight.commit,
            ..Self::default()
        }
    }

    /// Whether the next answer is that to COMMIT.
    fn at_commit(&self) -> bool {
        self.commit && if self.kind == Kind::Text { self.lead == 1 } else { self.requests_done }
    }
}

/// What is to be written of one group of requests.
#[derive(Debug, Default)]
struct Group {
    kind: Kind,
    /// How many requests are not written yet.
    left: u32,
    /// What goes in front of the last Sync.
    end: BytesMut,
    commit: bool,
}

#[derive(Debug)]
pub(super) struct Ledger {
    outgoing: Frames,
    writing: Writing,
    /// So much of the header under way was written as it is.
    written_of_header: usize,
    group: Option<Group>,
    /// Closes that must not come between the requests of the group, and how many they are.
    held: BytesMut,
    held_back: u32,
    /// How many bytes of what was rewritten are sent, and with which of them the COMMIT is.
    appended: u64,
    commit_at: Option<u64>,
    /// How many ReadyForQuery were asked for, and how many came.
    asked: u64,
    came: u64,
    special: VecDeque<Special>,
    /// Up to this ReadyForQuery the answers are the driver's own affair.
    plain: u64,

    incoming: Frames,
    /// So much of the header under way was given to the driver.
    read_of_header: usize,
    /// The frame under way is the driver's.
    passing: bool,
    /// What is kept of the frame under way, to look into.
    body: Vec<u8>,
    /// The request that is being answered was bound: it is one of the extended protocol.
    bound: bool,
    /// ROLLBACK of SQL's own was answered since the last ReadyForQuery.
    rolled_back: bool,
    /// The rest of this answer is nobody's, up to its ReadyForQuery.
    discarding: bool,
    /// What the driver is to get, where that is not what came.
    ready: BytesMut,
    /// What the server is to get from us.
    reply: BytesMut,
}

impl Ledger {
    pub(super) fn new() -> Self {
        Self {
            outgoing: Frames::startup(),
            writing: Writing::Nothing,
            written_of_header: 0,
            group: None,
            held: BytesMut::new(),
            held_back: 0,
            appended: 0,
            commit_at: None,
            // Start-up ends in one as well, and is no request.
            asked: 1,
            came: 0,
            special: VecDeque::from([Special { at: 0, kind: Answering::Closing }]),
            plain: 0,
            incoming: Frames::default(),
            read_of_header: 0,
            passing: true,
            body: Vec::new(),
            bound: false,
            rolled_back: false,
            discarding: false,
            ready: BytesMut::new(),
            reply: BytesMut::new(),
        }
    }

    /// What the driver is to get before anything else.
    pub(super) fn ready(&mut self) -> &mut BytesMut {
        &mut self.ready
    }

    /// What is to be sent to the server before anything else.
    pub(super) fn reply(&mut self) -> &mut BytesMut {
        &mut self.reply
    }

    /// Whether what the driver writes must be [rewritten](Self::rewrite).
    #[inline]
    pub(super) fn rewrites(&self, wire: &Wire) -> bool {
        wire.has_next() || self.group.is_some()
    }
}

/// What goes out.
impl Ledger {
    /// Counts what was written as it is.
    #[inline]
    pub(super) fn wrote(&mut self, bytes: &[u8], wire: &Wire) {
        let mut rest = bytes;
        let mut sent = 0;
        if self.outgoing.at_boundary() {
            let (mut writing, mut asked) = (self.writing, self.asked);
            while let Some((tag, _)) = whole(&mut rest) {
                match (tag, writing) {
                    (b'S', Writing::Request) => {
                        writing = Writing::Nothing;
                        (asked, sent) = (asked + 1, sent + 1);
                    }
                    (b'B' | b'P' | b'E' | b'D', Writing::Nothing | Writing::Request) => {
                        writing = Writing::Request;
                    }
                    _ => {
                        (self.writing, self.asked) = (writing, asked);
                        sent += u64::from(self.count(tag));
                        (writing, asked) = (self.writing, self.asked);
                    }
                }
            }
            (self.writing, self.asked) = (writing, asked);
        }
        if !rest.is_empty() {
            sent += self.wrote_in_parts(rest);
        }
        if sent > 0 {
            self.look_ahead();
            wire.on_sent(sent);
        }
    }

    #[cold]
    fn wrote_in_parts(&mut self, mut bytes: &[u8]) -> u64 {
        let mut sent = 0;
        while let Some(piece) = self.outgoing.take(&mut bytes) {
            if piece.ends {
                sent += u64::from(self.count(piece.tag));
            } else if self.writing == Writing::Nothing {
                // It has begun, so nothing may go ahead of it.
                self.writing = begun_by(piece.tag);
            }
        }
        self.written_of_header = self.outgoing.partial();
        sent
    }

    /// Counts a frame; whether it ends a request.
    #[inline]
    fn count(&mut self, tag: u8) -> bool {
        match (tag, self.writing) {
            (b'S', Writing::Closing) => {
                self.special.push_back(Special { at: self.asked, kind: Answering::Closing });
                self.asked += 1;
                self.look_ahead();
                self.writing = Writing::Nothing;
                false
            }
            // The Sync before the data was read over, and this one is answered in its place.
            (b'S', Writing::CopyData) => {
                self.writing = Writing::Nothing;
                false
            }
            (b'S' | b'Q' | b'F', _) => {
                self.asked += 1;
                self.writing = Writing::Nothing;
                true
            }
            // Start-up and passwords are no requests.
            (0 | b'p', Writing::Nothing) => false,
            (tag, Writing::Nothing) => {
                self.writing = begun_by(tag);
                false
            }
            (b'C', Writing::Closing) => false,
            (_, Writing::Closing) => {
                self.writing = Writing::Request;
                false
            }
            _ => false,
        }
    }

    /// Turns what the driver writes into what the server is to get. All of `bytes` is taken.
    pub(super) fn rewrite(&mut self, mut bytes: &[u8], out: &mut BytesMut, wire: &Wire) -> io::Result<()> {
        while let Some(piece) = self.outgoing.take(&mut bytes) {
            let tag = piece.tag;
            if let Some(header) = piece.header {
                let given = std::mem::take(&mut self.written_of_header);
                if given == 0 {
                    self.begin_request(tag, out, wire)?;
                    if self.in_group(tag) {
                        self.end_request(out, wire);
                        continue;
                    }
                }
                if self.holds_back() {
                    self.held.put_slice(&header[given..]);
                } else {
                    out.put_slice(&header[given..]);
                }
            }
            if self.holds_back() {
                self.held.put_slice(piece.body);
            } else {
                out.put_slice(piece.body);
            }
            if piece.ends {
                self.end_frame(tag, out, wire);
            }
        }
        Ok(())
    }

    /// A frame begins. If it begins a request, what waits for one goes ahead of it.
    fn begin_request(&mut self, tag: u8, out: &mut BytesMut, wire: &Wire) -> io::Result<()> {
        if self.writing != Writing::Nothing {
            return Ok(());
        }
        self.writing = begun_by(tag);
        if self.writing != Writing::Request || self.group.is_some() || !wire.has_next() {
            return Ok(());
        }
        let kind = wire.next_kind();
        let text = matches!(kind, Kind::Text | Kind::AheadOfText);
        if text && tag != b'Q' {
            // A statement must never run without what was meant to go ahead of it.
            return Err(io::Error::other("a request of another kind came where a flight was waiting"));
        }
        if !text && tag == b'Q' {
            // A fence, or what else we send to bring a connection to rest: it is not for those.
            return Ok(());
        }
        if kind == Kind::AheadOfText {
            let exchange = wire.take_next(|next| {
                next.write_lead(out)?;
                Ok::<_, io::Error>(Exchange { requests: 0, ..Exchange::new(next) })
            })?;
            out.put_slice(SYNC);
            self.special.push_back(Special { at: self.asked, kind: Answering::Flight(exchange) });
            self.asked += 1;
            self.look_ahead();
            return Ok(());
        }
        let (group, exchange) = wire.take_next(|next| {
            next.write_lead(out)?;
            let mut group = Group { kind: next.kind, left: next.requests.max(1), ..Group::default() };
            next.write_end(&mut group.end)?;
            group.commit = next.commit;
            Ok::<_, io::Error>((group, Exchange::new(next)))
        })?;
        self.group = Some(group);
        self.special.push_back(Special { at: self.asked, kind: Answering::Flight(exchange) });
        Ok(())
    }

    /// Whether this frame is the Sync of a request in a group.
    fn in_group(&self, tag: u8) -> bool {
        tag == b'S' && self.group.is_some() && self.writing == Writing::Request
    }

    /// The driver let go of a statement between two requests of a group. Its Sync would end the flight too early, so it
    /// comes behind.
    fn holds_back(&self) -> bool {
        self.group.is_some() && self.writing == Writing::Closing
    }

    /// The Sync of a request in a group: only the last one's stays.
    fn end_request(&mut self, out: &mut BytesMut, wire: &Wire) {
        let Some(group) = &mut self.group else { return };
        if group.kind == Kind::CopyIn {
            // Where COPY begins, the server reads over this Sync; where it is refused, it would answer it, and the one
            // behind the data as well, which the driver does not expect. So there is but that one.
            out.put_slice(FLUSH);
            self.group = None;
            return;
        }
        group.left -= 1;
        self.writing = Writing::Nothing;
        wire.on_sent(1);
        if group.left == 0 {
            out.put_slice(&group.end);
            if group.commit {
                self.commit_at = Some(self.appended + out.len() as u64);
            }
            out.put_slice(SYNC);
            self.end_group(out);
        }
    }

    fn end_group(&mut self, out: &mut BytesMut) {
        self.asked += 1;
        self.group = None;
        out.put_slice(&self.held.split());
        for _ in 0..std::mem::take(&mut self.held_back) {
            // The driver has its answer already.
            self.special.push_back(Special { at: self.asked, kind: Answering::Nobody });
            self.asked += 1;
        }
        self.look_ahead();
    }

    /// A frame has been written as it is.
    fn end_frame(&mut self, tag: u8, out: &mut BytesMut, wire: &Wire) {
        if self.holds_back() {
            if tag == b'S' {
                self.hold_close();
            }
            return;
        }
        if tag == b'Q' {
            if let Some(group) = &self.group {
                if group.commit {
                    self.commit_at = Some(self.appended + out.len() as u64);
                }
                self.writing = Writing::Nothing;
                wire.on_sent(1);
                self.end_group(out);
                return;
            }
        }
        if self.count(tag) {
            self.look_ahead();
            wire.on_sent(1);
        }
    }

    /// A Close that is held back: the driver is told that it is done as soon as the requests before it are.
    fn hold_close(&mut self) {
        self.writing = Writing::Nothing;
        self.held_back += 1;
        let Some(left) = self.group.as_ref().map(|group| group.left) else { return };
        let flight = self.special.iter_mut().rev().find_map(|special| match &mut special.kind {
            Answering::Flight(exchange) => Some(exchange),
            _ => None,
        });
        if let Some(exchange) = flight {
            // Those that are answered are no longer counted in either.
            if exchange.requests <= left && !exchange.failed {
                self.ready.put_slice(READY);
            } else {
                exchange.closes.push_back(left);
            }
        }
    }

    /// So many bytes of what was [rewritten](Self::rewrite) were handed to the socket.
    pub(super) fn rewritten_sent(&mut self, bytes: usize, wire: &Wire) {
        self.appended += bytes as u64;
        if self.commit_at.is_some_and(|at| self.appended >= at) {
            self.commit_at = None;
            wire.happen(happened::COMMIT_SENT);
        }
    }
}

/// What comes in.
impl Ledger {
    /// Whether every frame is the driver's own affair, up to the next ReadyForQuery at least.
    #[inline]
    fn is_plain(&self) -> bool {
        self.came < self.plain && !self.discarding
    }

    /// Whose the answers are has changed.
    fn look_ahead(&mut self) {
        let special = self.special.front().map_or(u64::MAX, |special| special.at);
        self.plain = special.min(self.asked);
    }

    /// Reads what came, and moves what is the driver's to the front, where there is so much of it then. What else is the
    /// driver's is [ready](Self::ready), and comes behind.
    #[inline]
    pub(super) fn read(&mut self, bytes: &mut [u8], wire: &Wire) -> usize {
        let mut at = 0;
        if self.ready.is_empty() && self.incoming.at_boundary() && self.is_plain() {
            at = self.read_plain(bytes, wire);
            if at == bytes.len() {
                return at;
            }
        }
        self.read_on(bytes, at, wire)
    }

    /// The common case: frames that are here as a whole, and all of them the driver's. Returns where they end.
    #[inline]
    fn read_plain(&mut self, bytes: &[u8], wire: &Wire) -> usize {
        let mut rest = bytes;
        loop {
            let before = rest;
            let Some((tag, body)) = whole(&mut rest) else { break };
            match tag {
                b'Z' => {
                    let status = body.first().copied().unwrap_or(b'I');
                    wire.on_status(status, std::mem::take(&mut self.rolled_back));
                    self.bound = false;
                    self.came += 1;
                    wire.on_answered(1);
                    if !self.is_plain() {
                        break;
                    }
                }
                b'C' if is_command(body) => self.on_command(body, wire),
                b'2' => self.bound = true,
                b'E' => _ = wire.on_error(body),
                b'G' | b'H' => {
                    rest = before;
                    break;
                }
                _ => {}
            }
        }
        bytes.len() - rest.len()
    }

    /// Frames that come in parts, or are not all the driver's, from `at` on.
    fn read_on(&mut self, bytes: &mut [u8], mut at: usize, wire: &Wire) -> usize {
        // The end of what is the driver's, as long as nothing had to be put in between.
        let mut kept = at;
        while at < bytes.len() {
            if self.incoming.at_boundary() {
                if self.ready.is_empty() && kept == at && self.is_plain() {
                    let plain = self.read_plain(&bytes[at..], wire);
                    at += plain;
                    kept = at;
                    if at == bytes.len() {
                        break;
                    }
                }
                let mut rest = &bytes[at..];
                if let Some((tag, body)) = whole(&mut rest) {
                    let length = body.len() + 5;
                    let mut from = at;
                    if self.passes(tag, wire) {
                        from = self.keep(bytes, at..at + length, &mut kept);
                    }
                    at += length;
                    self.end_incoming(tag, &bytes[from + 5..from + length], wire);
                    continue;
                }
            }
            at = self.read_part(bytes, at, &mut kept, wire);
        }
        kept
    }

    /// Gives the driver a part of what came, and tells where it is now.
    #[inline]
    fn keep(&mut self, bytes: &mut [u8], part: Range<usize>, kept: &mut usize) -> usize {
        if !self.ready.is_empty() {
            self.ready.put_slice(&bytes[part.clone()]);
            return part.start;
        }
        let start = *kept;
        if start != part.start {
            bytes.copy_within(part.clone(), start);
        }
        *kept += part.len();
        start
    }

    /// Reads what is here of one frame that is not here as a whole. Returns where it ends.
    #[cold]
    fn read_part(&mut self, bytes: &mut [u8], at: usize, kept: &mut usize, wire: &Wire) -> usize {
        let plain = self.incoming.at_boundary() && self.is_plain();
        let mut rest = &bytes[at..];
        let piece = self.incoming.take(&mut rest);
        let end = bytes.len() - rest.len();
        let Some(piece) = piece else {
            // Half a header. Where nothing is ours it is the driver's; else that is told when it is complete.
            let ours = matches!(bytes[at], b'G' | b'H') && !wire.has(happened::RAW);
            if plain && !ours || self.read_of_header > 0 {
                self.read_of_header = self.incoming.partial();
                self.keep(bytes, at..end, kept);
            }
            return end;
        };
        let (tag, ends) = (piece.tag, piece.ends);
        let body = end - piece.body.len()..end;
        if let Some(header) = piece.header {
            let given = std::mem::take(&mut self.read_of_header);
            self.passing = self.passes(tag, wire) || given > 0;
            self.body.clear();
            if self.passing {
                let here = body.start - at;
                if 5 - given == here {
                    self.keep(bytes, at..body.start, kept);
                } else {
                    // The rest of it came before, and was held back.
                    self.ready.put_slice(&header[given..]);
                }
            }
        }
        if matches!(tag, b'Z' | b'C' | b'E' | b'K') {
            let room = BODY_LIMIT.saturating_sub(self.body.len());
            self.body.put_slice(&bytes[body.start..body.end.min(body.start + room)]);
        }
        if self.passing {
            self.keep(bytes, body, kept);
        }
        if ends {
            let body = std::mem::take(&mut self.body);
            self.end_incoming(tag, &body, wire);
            self.body = body;
        }
        end
    }

    fn front(&mut self) -> Option<&mut Answering> {
        let came = self.came;
        self.special.front_mut().filter(|special| special.at == came).map(|special| &mut special.kind)
    }

    /// Whether a frame that begins is the driver's.
    fn passes(&mut self, tag: u8, wire: &Wire) -> bool {
        if matches!(tag, b'N' | b'A' | b'S') {
            return true; // these come when they like
        }
        if matches!(self.front(), Some(Answering::Flight(exchange)) if exchange.requests == 0) {
            return false; // none of the driver's is in it
        }
        if tag == b'Z' {
            let stray = self.came >= self.asked;
            return !stray
                && match self.front() {
                    Some(Answering::Nobody) => false,
                    Some(Answering::Flight(exchange)) => !exchange.told,
                    Some(Answering::Closing) | None => true,
                };
        }
        if self.discarding {
            return false;
        }
        let bound = self.bound;
        let kind = match self.front() {
            Some(Answering::Nobody) => return false,
            Some(Answering::Closing) => return true,
            Some(Answering::Flight(exchange)) => {
                let ours = exchange.lead > 0 || exchange.rows > 0 || exchange.requests_done;
                if ours && exchange.kind != Kind::Text && tag != b'E' && !exchange.failed {
                    return false;
                }
                exchange.kind
            }
            None => Kind::Statement,
        };
        match tag {
            _ if wire.has(happened::RAW) => true,
            b'G' if kind != Kind::CopyIn => {
                // The server waits for data that the driver does not know of.
                self.reply.put_u8(b'f');
                self.reply.put_u32(COPY_FAIL.len() as u32 + 4);
                self.reply.put_slice(COPY_FAIL);
                if bound {
                    // It has read over the Sync that was sent.
                    self.reply.put_slice(SYNC);
                }
                false
            }
            b'H' if matches!(kind, Kind::Statement | Kind::Text) => {
                self.ready.put_u8(b'E');
                self.ready.put_u32(COPY_REFUSED.len() as u32 + 4);
                self.ready.put_slice(COPY_REFUSED);
                self.discarding = true;
                false
            }
            _ => true,
        }
    }

    fn on_command(&mut self, body: &[u8], wire: &Wire) {
        let tag = without_zero(body);
        self.rolled_back |= tag == b"ROLLBACK";
        wire.on_command(tag);
    }

    /// A frame has come whole.
    fn end_incoming(&mut self, tag: u8, body: &[u8], wire: &Wire) {
        match tag {
            b'2' => self.bound = true,
            b'K' => wire.on_key(body),
            b'E' => self.on_error(body, wire),
            b'C' | b'I' | b's' => self.on_completion(body, wire),
            b'Z' if self.came >= self.asked => {}
            b'Z' => self.end_answer(body, wire),
            _ => {}
        }
    }

    fn on_error(&mut self, body: &[u8], wire: &Wire) {
        let fatal = wire.on_error(body);
        let Some(Answering::Flight(exchange)) = self.front() else { return };
        if exchange.failed {
            return;
        }
        exchange.failed = true;
        if exchange.at_commit() {
            if !fatal {
                // Over, and rolled back.
                wire.undo(happened::BEGUN);
                wire.happen(happened::COMMIT_REFUSED);
            }
            return;
        }
        if exchange.lead > 0 {
            wire.happen(happened::LEAD_REFUSED);
        }
        if exchange.begin > 0 && exchange.lead >= exchange.begin {
            wire.happen(happened::BEGIN_REFUSED);
        }
        if fatal && exchange.commit {
            wire.happen(happened::ENDED_BEFORE_COMMIT);
        }
    }

    fn on_completion(&mut self, body: &[u8], wire: &Wire) {
        let Some(Answering::Flight(exchange)) = self.front() else {
            if is_command(body) {
                self.on_command(body, wire);
            }
            return;
        };
        if exchange.lead > 0 {
            if exchange.at_commit() {
                on_commit(without_zero(body), wire);
            }
            // One that was given up meanwhile is nobody's.
            if exchange.lead == exchange.begin && wire.has(happened::RECORDING) {
                wire.happen(happened::BEGUN);
            }
            if exchange.lead == exchange.roll_back {
                wire.undo(happened::BEGUN);
            }
            exchange.lead -= 1;
        } else if exchange.rows > 0 {
            exchange.rows -= 1;
            wire.on_rows(rows(body));
        } else if exchange.requests_done {
            on_commit(without_zero(body), wire);
            if wire.is_committed() {
                // Whatever happens now changes nothing any more.
                exchange.told = true;
                self.ready.put_slice(READY);
            }
        } else {
            if exchange.kind == Kind::Text {
                // One of several, perhaps.
            } else if exchange.requests > 1 {
                exchange.requests -= 1;
                let mut answered = 1;
                while exchange.closes.front().is_some_and(|left| *left >= exchange.requests) {
                    exchange.closes.pop_front();
                    answered += 1;
                }
                self.ready.put_slice(&READY.repeat(answered));
                wire.on_answered(1);
            } else {
                exchange.requests_done = exchange.commit;
                if exchange.commit {
                    wire.on_commit_next();
                }
            }
            if is_command(body) {
                self.on_command(body, wire);
            }
        }
    }

    /// ReadyForQuery.
    #[inline]
    fn end_answer(&mut self, body: &[u8], wire: &Wire) {
        let status = body.first().copied().unwrap_or(b'I');
        let rolled_back = std::mem::take(&mut self.rolled_back);
        self.bound = false;
        self.discarding = false;
        wire.on_status(status, rolled_back);
        let special = self.special.front().is_some_and(|special| special.at == self.came);
        self.came += 1;
        if special { self.end_special(wire) } else { wire.on_answered(1) }
    }

    fn end_special(&mut self, wire: &Wire) {
        let Some(special) = self.special.pop_front() else { return };
        self.look_ahead();
        if let Answering::Flight(exchange) = special.kind {
            // Those that the server has read over, and the Closes between them.
            for _ in 1..exchange.requests as usize + exchange.closes.len() {
                self.ready.put_slice(READY);
            }
            if exchange.requests > 0 {
                wire.on_answered(exchange.requests.into());
            }
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

/// What a request is that begins so.
fn begun_by(tag: u8) -> Writing {
    match tag {
        b'C' => Writing::Closing,
        b'd' | b'c' | b'f' => Writing::CopyData,
        _ => Writing::Request,
    }
}

/// Whether a command's tag, with its closing zero, is one that is looked at; told by its length and first letter, since
/// most are not.
#[inline]
fn is_command(body: &[u8]) -> bool {
    matches!(
        (body.len(), body.first()),
        (6, Some(b'B'))
            | (7, Some(b'C'))
            | (9, Some(b'R'))
            | (12 | 15, Some(b'D'))
            | (18, Some(b'S'))
            | (20, Some(b'P'))
    )
}

fn without_zero(body: &[u8]) -> &[u8] {
    body.strip_suffix(b"\0").unwrap_or(body)
}

/// The number at the end of a command's tag, if there is one.
fn rows(body: &[u8]) -> u64 {
    let tag = without_zero(body);
    let digits = tag.iter().rev().take_while(|b| b.is_ascii_digit()).count();
    let number = std::str::from_utf8(&tag[tag.len() - digits..]).ok();
    number.and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::super::frames::tests::frame;
    use super::super::wire::{Begin, Fault, TransactionStatus};
    use super::*;

    /// A ledger past start-up, and its wire.
    fn started() -> (Ledger, Wire) {
        let (mut ledger, wire) = (Ledger::new(), Wire::default());
        ledger.wrote(&[0, 0, 0, 8, 0, 3, 0, 0], &wire);
        let mut hello =
            [frame(b'R', &[0; 4]), frame(b'K', &[0, 0, 0, 7, 0, 0, 0, 9]), frame(b'Z', b"I")].concat();
        assert_eq!(ledger.read(&mut hello, &wire), hello.len());
        assert_eq!((wire.process_id(), wire.secret_key()), (7, 9));
        (ledger, wire)
    }

    /// What the driver sends for a statement.
    fn request() -> Vec<u8> {
        [frame(b'B', b"\0s1\0\0\0\0\0\0\0"), frame(b'E', b"\0\0\0\0\0"), frame(b'S', b"")].concat()
    }

    fn close() -> Vec<u8> {
        [frame(b'C', b"Ss2\0"), frame(b'S', b"")].concat()
    }

    fn answer(tag: &[u8]) -> Vec<u8> {
        [frame(b'2', b""), frame(b'D', &[b'Z'; 30]), frame(b'C', tag)].concat()
    }

    /// The answer to a statement without rows, as to one of ours.
    fn done(tag: &[u8]) -> Vec<u8> {
        [frame(b'1', b""), frame(b'2', b""), frame(b'C', tag)].concat()
    }

    /// Writes what the driver sends, in pieces; gives what the server gets.
    fn write(ledger: &mut Ledger, wire: &Wire, bytes: &[u8], step: usize) -> Vec<u8> {
        let mut got = Vec::new();
        for chunk in bytes.chunks(step) {
            if ledger.rewrites(wire) {
                let mut out = BytesMut::new();
                ledger.rewrite(chunk, &mut out, wire).expect("of the kind that waits");
                ledger.rewritten_sent(out.len(), wire);
                got.extend(out);
            } else {
                ledger.wrote(chunk, wire);
                got.extend(chunk);
            }
        }
        got
    }

    /// Reads what the server sends, in pieces; gives what the driver gets.
    fn read(ledger: &mut Ledger, wire: &Wire, bytes: &[u8], step: usize) -> Vec<u8> {
        let mut got = Vec::new();
        for chunk in bytes.chunks(step) {
            let mut chunk = chunk.to_vec();
            let kept = ledger.read(&mut chunk, wire);
            got.extend(&chunk[..kept]);
            got.extend(ledger.ready().split());
        }
        got
    }

    /// Every way to cut so many bytes into pieces of one size.
    fn steps(length: usize) -> impl Iterator<Item = usize> {
        (1..40).chain([length.max(1)])
    }

    #[test]
    fn a_transaction_is_read_alike_in_pieces_of_any_size() {
        let served = [
            done(b"BEGIN\0"),
            frame(b'N', b"notice"),
            answer(b"UPDATE 1\0"),
            frame(b'Z', b"T"),
            frame(b'E', b"SFEHLER\0VERROR\0C23505\0Ma\0nkey\0\0"),
            frame(b'Z', b"E"),
            frame(b'S', b"a\0b\0"),
        ]
        .concat();
        let passed = [
            frame(b'N', b"notice"),
            answer(b"UPDATE 1\0"),
            frame(b'Z', b"T"),
            frame(b'E', b"SFEHLER\0VERROR\0C23505\0Ma\0nkey\0\0"),
            frame(b'Z', b"E"),
            frame(b'S', b"a\0b\0"),
        ]
        .concat();
        for out in [1, 3, 7, 1000] {
            for step in steps(served.len()) {
                let (mut ledger, wire) = started();
                wire.record();
                wire.lead(Step::Begin("BEGIN".into()));
                let sent = write(&mut ledger, &wire, &[request(), request()].concat(), out);
                let syncs = sent.windows(5).filter(|window| *window == SYNC).count();
                assert_eq!((syncs, wire.sent()), (2, 2), "pieces of {out}");
                assert_eq!(wire.begin(), Begin::UnderWay);
                assert_eq!(read(&mut ledger, &wire, &served, step), passed, "pieces of {step}");
                assert_eq!((wire.answered(), wire.begin()), (2, Begin::Confirmed), "pieces of {step}");
                assert_eq!(wire.status(), TransactionStatus::Failed);
                let Some(Fault::Server(first)) = wire.fault(0) else { panic!("pieces of {step}") };
                assert_eq!((first.code().code(), first.constraint()), ("23505", Some("key")));
            }
        }
    }

    #[test]
    fn a_begin_that_fails_is_the_answer_to_its_statement() {
        let error = [frame(b'E', b"VERROR\0C57014\0Ma\0\0"), frame(b'Z', b"I")].concat();
        for step in steps(error.len()) {
            let (mut ledger, wire) = started();
            wire.record();
            wire.lead(Step::Begin("BEGIN".into()));
            write(&mut ledger, &wire, &request(), 1000);
            assert_eq!(read(&mut ledger, &wire, &error, step), error);
            assert_eq!((wire.begin(), wire.answered()), (Begin::Over, 1));
            assert!(!wire.is_ended_by_sql());
        }
    }

    /// Two statements and COMMIT under one Sync, with a Close that the driver sends between the two.
    fn group(out: usize) -> (Ledger, Wire) {
        let (mut ledger, wire) = started();
        wire.record();
        wire.lead(Step::Begin("BEGIN".into()));
        wire.group(2, true);
        let sent = write(&mut ledger, &wire, &[request(), close(), request()].concat(), out);
        let tags: Vec<u8> = {
            let (mut rest, mut tags) = (&sent[..], Vec::new());
            while let Some((tag, _)) = whole(&mut rest) {
                tags.push(tag);
            }
            assert!(rest.is_empty());
            tags
        };
        // BEGIN; the two; COMMIT; and only then what nobody waits for.
        assert_eq!(tags, b"PBEBEBEPBESCS", "pieces of {out}");
        assert!(wire.facts().commit_sent);
        (ledger, wire)
    }

    #[test]
    fn a_group_has_one_sync_and_the_driver_its_answers() {
        let served = [
            done(b"BEGIN\0"),
            answer(b"UPDATE 1\0"),
            answer(b"UPDATE 2\0"),
            done(b"COMMIT\0"),
            frame(b'Z', b"I"),
            frame(b'3', b""),
            frame(b'Z', b"I"),
        ]
        .concat();
        // The first, the Close, and the second as soon as the commit is certain.
        let passed =
            [answer(b"UPDATE 1\0"), READY.to_vec(), READY.to_vec(), answer(b"UPDATE 2\0"), READY.to_vec()]
                .concat();
        for out in [1, 4, 1000] {
            for step in steps(served.len()) {
                let (mut ledger, wire) = group(out);
                assert_eq!(read(&mut ledger, &wire, &served, step), passed, "pieces of {step}");
                assert!(
                    wire.is_committed() && wire.answered() == 2 && wire.status() == TransactionStatus::Idle
                );
                // And the next is read as ever.
                write(&mut ledger, &wire, &request(), 1000);
                let next = [answer(b"SELECT 1\0"), frame(b'Z', b"I")].concat();
                assert_eq!(read(&mut ledger, &wire, &next, step), next);
                assert_eq!(wire.answered(), 3);
            }
        }
    }

    #[test]
    fn what_is_read_over_after_an_error_is_answered_all_the_same() {
        let error = frame(b'E', b"VERROR\0C23505\0Ma\0\0");
        let served = [
            done(b"BEGIN\0"),
            frame(b'2', b""),
            error.clone(),
            frame(b'Z', b"E"),
            frame(b'3', b""),
            frame(b'Z', b"E"),
        ]
        .concat();
        for step in steps(served.len()) {
            let (mut ledger, wire) = group(1000);
            let got = read(&mut ledger, &wire, &served, step);
            let (mut rest, mut tags) = (&got[..], Vec::new());
            while let Some((tag, _)) = whole(&mut rest) {
                tags.push(tag);
            }
            assert_eq!(tags, b"2EZZZ", "the first with its error, the Close, the second; pieces of {step}");
            assert!(!wire.is_committed() && wire.answered() == 2);
        }
    }

    #[test]
    fn a_copy_that_nobody_sends_data_for_is_ended() {
        let served = [frame(b'2', b""), frame(b'G', b"\0\0\0")].concat();
        let error = [frame(b'E', b"VERROR\0C57014\0Ma\0\0"), frame(b'Z', b"I")].concat();
        for step in steps(served.len()) {
            let (mut ledger, wire) = started();
            write(&mut ledger, &wire, &request(), 1000);
            assert_eq!(read(&mut ledger, &wire, &served, step), frame(b'2', b""), "pieces of {step}");
            let reply = ledger.reply().split();
            assert!(reply.starts_with(b"f") && reply.ends_with(SYNC));
            assert_eq!(read(&mut ledger, &wire, &error, step), error);
        }
    }

    #[test]
    fn a_copy_out_that_nobody_reads_is_an_error_and_its_data_nobodys() {
        let served = [
            frame(b'2', b""),
            frame(b'H', b"\0\0\0"),
            frame(b'd', &[b'x'; 50]),
            frame(b'c', b""),
            frame(b'C', b"COPY 1\0"),
            frame(b'Z', b"I"),
        ]
        .concat();
        for step in steps(served.len()) {
            let (mut ledger, wire) = started();
            write(&mut ledger, &wire, &request(), 1000);
            let got = read(&mut ledger, &wire, &served, step);
            let (mut rest, mut tags) = (&got[..], Vec::new());
            while let Some((tag, _)) = whole(&mut rest) {
                tags.push(tag);
            }
            assert_eq!(tags, b"2EZ", "pieces of {step}");
        }
    }

    #[test]
    fn a_copy_in_is_answered_once_though_the_driver_asks_twice() {
        let (mut ledger, wire) = started();
        wire.expect(Kind::CopyIn);
        let sent = write(&mut ledger, &wire, &request(), 3);
        assert!(sent.ends_with(FLUSH) && wire.sent() == 0);
        write(&mut ledger, &wire, &[frame(b'f', b"\0"), frame(b'S', b"")].concat(), 4);
        assert_eq!(wire.sent(), 1);
        let refused = [frame(b'E', b"VERROR\0C42P01\0Ma\0\0"), frame(b'Z', b"I")].concat();
        assert_eq!(read(&mut ledger, &wire, &refused, 3), refused);
        assert_eq!(wire.answered(), 1);
    }
}
