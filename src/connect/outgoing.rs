//! What goes out: every frame that the driver writes, counted, or turned into what the server is to get.

use std::io;

use bytes::{BufMut, BytesMut};

use super::exchange::Exchange;
use super::flight::Kind;
use super::frames::{Frames, whole};
use super::named::Named;
use super::owed::{Answering, Owed};
use super::wire::{Wire, happened};

pub(super) const SYNC: &[u8] = b"S\0\0\0\x04";
pub(super) const FLUSH: &[u8] = b"H\0\0\0\x04";

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
pub(super) struct Outgoing {
    frames: Frames,
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
}

impl Outgoing {
    pub(super) fn new() -> Self {
        Self {
            frames: Frames::startup(),
            writing: Writing::Nothing,
            written_of_header: 0,
            group: None,
            held: BytesMut::new(),
            held_back: 0,
            appended: 0,
            commit_at: None,
        }
    }

    /// Whether requests that go together are being written.
    #[inline]
    pub(super) fn is_in_group(&self) -> bool {
        self.group.is_some()
    }

    /// Counts what was written as it is.
    #[inline]
    pub(super) fn wrote(&mut self, bytes: &[u8], owed: &mut Owed, wire: &Wire) {
        let mut rest = bytes;
        let mut sent = 0;
        if self.frames.at_boundary() {
            // Most are the driver's own requests; what is seldom is left to `count`.
            let (mut writing, mut plain) = (self.writing, 0);
            while let Some((tag, _)) = whole(&mut rest) {
                match (tag, writing) {
                    (b'S', Writing::Request) => {
                        writing = Writing::Nothing;
                        plain += 1;
                    }
                    (b'B' | b'P' | b'E' | b'D', Writing::Nothing | Writing::Request) => {
                        writing = Writing::Request;
                    }
                    _ => {
                        owed.ask(plain);
                        sent += std::mem::take(&mut plain);
                        self.writing = writing;
                        sent += u64::from(self.count(tag, owed));
                        writing = self.writing;
                    }
                }
            }
            self.writing = writing;
            owed.ask(plain);
            sent += plain;
        }
        if !rest.is_empty() {
            sent += self.wrote_in_parts(rest, owed);
        }
        if sent > 0 {
            wire.on_sent(sent);
        }
    }

    #[cold]
    fn wrote_in_parts(&mut self, mut bytes: &[u8], owed: &mut Owed) -> u64 {
        let mut sent = 0;
        while let Some(piece) = self.frames.take(&mut bytes) {
            if piece.ends {
                sent += u64::from(self.count(piece.tag, owed));
            } else if self.writing == Writing::Nothing {
                // It has begun, so nothing may go ahead of it.
                self.writing = begun_by(piece.tag);
            }
        }
        self.written_of_header = self.frames.partial();
        sent
    }

    /// Counts a frame; whether it ends a request.
    #[inline]
    fn count(&mut self, tag: u8, owed: &mut Owed) -> bool {
        match (tag, self.writing) {
            (b'S', Writing::Closing) => {
                owed.expect(Answering::Closing);
                owed.ask(1);
                self.writing = Writing::Nothing;
                false
            }
            // The Sync before the data was read over, and this one is answered in its place.
            (b'S', Writing::CopyData) => {
                self.writing = Writing::Nothing;
                false
            }
            (b'S' | b'Q' | b'F', _) => {
                owed.ask(1);
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
    pub(super) fn rewrite(
        &mut self,
        mut bytes: &[u8],
        out: &mut BytesMut,
        owed: &mut Owed,
        named: &mut Named,
        wire: &Wire,
    ) -> io::Result<()> {
        while let Some(piece) = self.frames.take(&mut bytes) {
            let tag = piece.tag;
            if let Some(header) = piece.header {
                let given = std::mem::take(&mut self.written_of_header);
                if given == 0 {
                    self.begin_request(tag, out, owed, named, wire)?;
                    if self.in_group(tag) {
                        self.end_request(out, owed, wire);
                        continue;
                    }
                }
                self.put(&header[given..], out);
            }
            self.put(piece.body, out);
            if piece.ends {
                self.end_frame(tag, out, owed, wire);
            }
        }
        Ok(())
    }

    /// Puts a part of the frame under way where it belongs.
    fn put(&mut self, part: &[u8], out: &mut BytesMut) {
        if self.holds_back() {
            self.held.put_slice(part);
        } else if !self.stands_in() {
            out.put_slice(part);
        }
    }

    /// Whether what is written is not sent, since our steps are in its place.
    fn stands_in(&self) -> bool {
        self.group.as_ref().is_some_and(|group| group.kind == Kind::End)
    }

    /// A frame begins. If it begins a request, what waits for one goes ahead of it.
    fn begin_request(
        &mut self,
        tag: u8,
        out: &mut BytesMut,
        owed: &mut Owed,
        named: &mut Named,
        wire: &Wire,
    ) -> io::Result<()> {
        if self.writing != Writing::Nothing {
            return Ok(());
        }
        self.writing = begun_by(tag);
        if self.writing != Writing::Request || self.group.is_some() || !wire.has_next() {
            return Ok(());
        }
        let kind = wire.next_kind();
        let text = matches!(kind, Kind::Text | Kind::AheadOfText | Kind::End);
        if text && tag != b'Q' {
            // A statement must never run without what was meant to go ahead of it.
            return Err(io::Error::other("a request of another kind came where a flight was waiting"));
        }
        if !text && tag == b'Q' {
            // A fence, or what else we send to bring a connection to rest: it is not for those.
            return Ok(());
        }
        let number = owed.next();
        let (group, exchange) = wire.take_next(|next| {
            next.write_lead(named, number, out)?;
            let mut end = BytesMut::new();
            next.write_end(&mut end)?;
            let group = Group { kind, left: next.requests.max(1), end, commit: next.commit };
            Ok::<_, io::Error>((group, Exchange::new(next)))
        })?;
        owed.expect(Answering::Flight(exchange));
        if kind == Kind::AheadOfText {
            out.put_slice(SYNC);
            owed.ask(1);
        } else {
            self.group = Some(group);
        }
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
    fn end_request(&mut self, out: &mut BytesMut, owed: &mut Owed, wire: &Wire) {
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
            self.note_commit(out);
            out.put_slice(SYNC);
            self.end_group(out, owed);
        }
    }

    /// What was written ends with the COMMIT of this group, if it has one.
    fn note_commit(&mut self, out: &BytesMut) {
        if self.group.as_ref().is_some_and(|group| group.commit) {
            self.commit_at = Some(self.appended + out.len() as u64);
        }
    }

    fn end_group(&mut self, out: &mut BytesMut, owed: &mut Owed) {
        self.group = None;
        owed.ask(1);
        out.put_slice(&self.held.split());
        for _ in 0..std::mem::take(&mut self.held_back) {
            // The driver has its answer already.
            owed.expect(Answering::Nobody);
            owed.ask(1);
        }
    }

    /// A frame has been written as it is.
    fn end_frame(&mut self, tag: u8, out: &mut BytesMut, owed: &mut Owed, wire: &Wire) {
        if self.holds_back() {
            if tag == b'S' {
                self.hold_close(owed);
            }
        } else if tag == b'Q' && self.group.is_some() {
            self.note_commit(out);
            if self.stands_in() {
                out.put_slice(SYNC);
            }
            self.writing = Writing::Nothing;
            wire.on_sent(1);
            self.end_group(out, owed);
        } else if self.count(tag, owed) {
            wire.on_sent(1);
        }
    }

    /// A Close that is held back.
    fn hold_close(&mut self, owed: &mut Owed) {
        self.writing = Writing::Nothing;
        self.held_back += 1;
        let left = self.group.as_ref().map_or(0, |group| group.left);
        if let Some((flight, ready)) = owed.last_flight() {
            flight.close(left, ready);
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

/// What a request is that begins so.
fn begun_by(tag: u8) -> Writing {
    match tag {
        b'C' => Writing::Closing,
        b'd' | b'c' | b'f' => Writing::CopyData,
        _ => Writing::Request,
    }
}
