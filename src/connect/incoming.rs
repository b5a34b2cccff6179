//! What comes in: every frame that the server sends, told apart by whose it is.

use std::ops::Range;

use bytes::{BufMut, BytesMut};
use tokio_postgres::error::SqlState;

use super::flight::Kind;
use super::frames::{Frames, whole};
use super::named::Named;
use super::outgoing::SYNC;
use super::owed::{Answering, Owed};
use super::wire::{Wire, happened};

/// Error bodies can quote whole queries; more than this of one is not needed.
const BODY_LIMIT: usize = 64 * 1024;

/// Ends a COPY that nobody sends data for.
const COPY_FAIL: &[u8] = b"COPY FROM STDIN is possible by copy_in and copy_rows_in only\0";

/// The driver's answer to a COPY whose data nobody reads.
const COPY_REFUSED: &[u8] =
    b"SERROR\0VERROR\0C0A000\0MCOPY TO STDOUT is possible by copy_out and copy_rows_out only\0\0";

#[derive(Debug)]
pub(super) struct Incoming {
    frames: Frames,
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
    /// What the server is to get from us.
    pub(super) reply: BytesMut,
}

impl Incoming {
    pub(super) fn new() -> Self {
        Self {
            frames: Frames::default(),
            read_of_header: 0,
            passing: true,
            body: Vec::new(),
            bound: false,
            rolled_back: false,
            discarding: false,
            reply: BytesMut::new(),
        }
    }

    /// Whether every frame is the driver's own affair, up to the next ReadyForQuery at least.
    #[inline]
    fn is_plain(&self, owed: &Owed) -> bool {
        owed.is_plain() && !self.discarding
    }

    /// Reads what came, and moves what is the driver's to the front, where there is so much of it then. What else is the
    /// driver's is `ready` in `owed`, and comes behind.
    #[inline]
    pub(super) fn read(
        &mut self,
        bytes: &mut [u8],
        owed: &mut Owed,
        named: &mut Named,
        wire: &Wire,
    ) -> usize {
        let mut at = 0;
        if owed.ready.is_empty() && self.frames.at_boundary() && self.is_plain(owed) {
            at = self.read_plain(bytes, owed, named, wire);
            if at == bytes.len() {
                return at;
            }
        }
        self.read_on(bytes, at, owed, named, wire)
    }

    /// The common case: frames that are here as a whole, and all of them the driver's. Returns where they end.
    #[inline]
    fn read_plain(&mut self, bytes: &[u8], owed: &mut Owed, named: &mut Named, wire: &Wire) -> usize {
        let mut rest = bytes;
        loop {
            let before = rest;
            let Some((tag, body)) = whole(&mut rest) else { break };
            match tag {
                b'Z' => {
                    self.on_status(body, wire);
                    owed.came_plain();
                    wire.on_answered(1);
                    if !owed.is_plain() {
                        break;
                    }
                }
                b'C' if is_command(body) => self.on_command(without_zero(body), named, wire),
                b'2' => self.bound = true,
                b'E' => _ = on_error(body, named, wire),
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
    fn read_on(
        &mut self,
        bytes: &mut [u8],
        mut at: usize,
        owed: &mut Owed,
        named: &mut Named,
        wire: &Wire,
    ) -> usize {
        // The end of what is the driver's, as long as nothing had to be put in between.
        let mut kept = at;
        while at < bytes.len() {
            if self.frames.at_boundary() {
                if owed.ready.is_empty() && kept == at && self.is_plain(owed) {
                    at += self.read_plain(&bytes[at..], owed, named, wire);
                    kept = at;
                    if at == bytes.len() {
                        break;
                    }
                }
                let mut rest = &bytes[at..];
                if let Some((tag, body)) = whole(&mut rest) {
                    let length = body.len() + 5;
                    let mut from = at;
                    if self.passes(tag, owed, wire) {
                        from = keep(bytes, at..at + length, &mut kept, &mut owed.ready);
                    }
                    at += length;
                    self.end_frame(tag, &bytes[from + 5..from + length], owed, named, wire);
                    continue;
                }
            }
            at = self.read_part(bytes, at, &mut kept, owed, named, wire);
        }
        kept
    }

    /// Reads what is here of one frame that is not here as a whole. Returns where it ends.
    #[cold]
    fn read_part(
        &mut self,
        bytes: &mut [u8],
        at: usize,
        kept: &mut usize,
        owed: &mut Owed,
        named: &mut Named,
        wire: &Wire,
    ) -> usize {
        let plain = self.frames.at_boundary() && self.is_plain(owed);
        let mut rest = &bytes[at..];
        let piece = self.frames.take(&mut rest);
        let end = bytes.len() - rest.len();
        let Some(piece) = piece else {
            // Half a header. Where nothing is ours it is the driver's; else that is told when it is complete.
            let ours = matches!(bytes[at], b'G' | b'H') && !wire.has(happened::RAW);
            if plain && !ours || self.read_of_header > 0 {
                self.read_of_header = self.frames.partial();
                keep(bytes, at..end, kept, &mut owed.ready);
            }
            return end;
        };
        let (tag, ends) = (piece.tag, piece.ends);
        let body = end - piece.body.len()..end;
        if let Some(header) = piece.header {
            let given = std::mem::take(&mut self.read_of_header);
            self.passing = self.passes(tag, owed, wire) || given > 0;
            self.body.clear();
            if self.passing {
                let here = body.start - at;
                if 5 - given == here {
                    keep(bytes, at..body.start, kept, &mut owed.ready);
                } else {
                    // The rest of it came before, and was held back.
                    owed.ready.put_slice(&header[given..]);
                }
            }
        }
        if matches!(tag, b'Z' | b'C' | b'E' | b'K') {
            let room = BODY_LIMIT.saturating_sub(self.body.len());
            self.body.put_slice(&bytes[body.start..body.end.min(body.start + room)]);
        }
        if self.passing {
            keep(bytes, body, kept, &mut owed.ready);
        }
        if ends {
            let body = std::mem::take(&mut self.body);
            self.end_frame(tag, &body, owed, named, wire);
            self.body = body;
        }
        end
    }

    /// Whether a frame that begins is the driver's.
    fn passes(&mut self, tag: u8, owed: &mut Owed, wire: &Wire) -> bool {
        if matches!(tag, b'N' | b'A' | b'S') {
            return true; // these come when they like
        }
        if tag == b'Z' && owed.is_nothing() {
            return false;
        }
        let kind = match owed.front() {
            Some(Answering::Nobody) => return false,
            Some(Answering::Closing) => return tag == b'Z' || !self.discarding,
            Some(Answering::Flight(flight)) => {
                if flight.is_all_ours() {
                    return false;
                }
                if tag == b'Z' {
                    return !flight.is_told();
                }
                if tag != b'E' && flight.is_ours() {
                    return false;
                }
                flight.kind()
            }
            None if tag == b'Z' => return true,
            None => Kind::Statement,
        };
        match tag {
            _ if wire.has(happened::RAW) => true,
            b'G' if kind != Kind::CopyIn => {
                // The server waits for data that the driver does not know of.
                put_frame(b'f', COPY_FAIL, &mut self.reply);
                if self.bound {
                    // It has read over the Sync that was sent.
                    self.reply.put_slice(SYNC);
                }
                false
            }
            b'H' if !self.discarding && matches!(kind, Kind::Statement | Kind::Text) => {
                put_frame(b'E', COPY_REFUSED, &mut owed.ready);
                self.discarding = true;
                false
            }
            _ => !self.discarding,
        }
    }

    /// A command that is not ours was answered.
    fn on_command(&mut self, tag: &[u8], named: &mut Named, wire: &Wire) {
        match tag {
            b"ROLLBACK" => self.rolled_back = true,
            // DO can do it unseen, and so can whatever else was run by a session that is reset.
            b"DEALLOCATE" | b"DEALLOCATE ALL" | b"DISCARD ALL" | b"DISCARD TEMP" | b"DO" => named.forget(),
            _ => {}
        }
        wire.on_command(tag);
    }

    /// A frame has come whole.
    fn end_frame(&mut self, tag: u8, body: &[u8], owed: &mut Owed, named: &mut Named, wire: &Wire) {
        match tag {
            b'2' => self.bound = true,
            b'K' => wire.on_key(body),
            b'E' => {
                let fatal = on_error(body, named, wire);
                if let Some((flight, _)) = owed.flight() {
                    flight.on_error(fatal, wire);
                }
            }
            b'C' | b'I' | b's' => {
                let theirs = owed
                    .flight()
                    .is_none_or(|(flight, ready)| flight.on_completion(without_zero(body), ready, wire));
                if theirs && is_command(body) {
                    self.on_command(without_zero(body), named, wire);
                }
            }
            b'Z' if owed.is_nothing() => {}
            b'Z' => {
                self.on_status(body, wire);
                self.discarding = false;
                match owed.came() {
                    (number, Some(Answering::Flight(flight))) => {
                        named.settle(number, flight.has_failed());
                        flight.end(&mut owed.ready, wire);
                    }
                    (_, Some(Answering::Closing | Answering::Nobody)) => {}
                    (_, None) => wire.on_answered(1),
                }
            }
            _ => {}
        }
    }

    /// What a ReadyForQuery says.
    #[inline]
    fn on_status(&mut self, body: &[u8], wire: &Wire) {
        let status = body.first().copied().unwrap_or(b'I');
        wire.on_status(status, std::mem::take(&mut self.rolled_back));
        self.bound = false;
    }
}

/// Gives the driver a part of what came, and tells where it is now.
#[inline]
fn keep(bytes: &mut [u8], part: Range<usize>, kept: &mut usize, ready: &mut BytesMut) -> usize {
    if !ready.is_empty() {
        ready.put_slice(&bytes[part.clone()]);
        return part.start;
    }
    let start = *kept;
    if start != part.start {
        bytes.copy_within(part.clone(), start);
    }
    *kept += part.len();
    start
}

fn put_frame(tag: u8, body: &[u8], out: &mut BytesMut) {
    out.put_u8(tag);
    out.put_u32(body.len() as u32 + 4);
    out.put_slice(body);
}

/// An error; whether it ends the connection.
fn on_error(body: &[u8], named: &mut Named, wire: &Wire) -> bool {
    let error = wire.on_error(body);
    if error.code == SqlState::INVALID_SQL_STATEMENT_NAME {
        named.forget();
    }
    error.fatal
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
            | (3 | 11 | 12 | 13 | 15, Some(b'D'))
            | (18, Some(b'S'))
            | (20, Some(b'P'))
    )
}

fn without_zero(body: &[u8]) -> &[u8] {
    body.strip_suffix(b"\0").unwrap_or(body)
}
