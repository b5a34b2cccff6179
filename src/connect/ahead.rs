//! Requests that travel ahead of one of the driver's, under its Sync, and whose answers the driver never sees.
//!
//! The driver ends every request with a Sync, and the server answers each Sync with a packet of its own: for thousands
//! of rows that is half the time. Here the rows but the last are put on the wire right before the driver's own request
//! for the last one, so that one Sync ends them all. Should one fail, the server reads over the rest up to the Sync,
//! and its error is the answer to the driver's request. (PostgreSQL manual, chapter 54.2.3 "Extended Query".)

use std::io;

use bytes::{Buf, BufMut, BytesMut};
use postgres_protocol::message::frontend;
use postgres_types::Type;

/// What goes ahead.
#[derive(Debug, Default)]
pub(crate) struct Ahead {
    bytes: BytesMut,
    /// It begins with a simple query.
    query: bool,
    requests: u32,
}

impl Ahead {
    /// SQL of ours that must be run first.
    pub(crate) fn query(&mut self, sql: &str) -> io::Result<()> {
        self.query = true;
        frontend::query(sql, &mut self.bytes)
    }

    /// Makes `sql` the unnamed statement, which the requests are for: the driver keeps the names of its own to itself.
    pub(crate) fn parse(&mut self, sql: &str, types: &[Type]) -> io::Result<()> {
        frontend::parse("", sql, types.iter().map(Type::oid), &mut self.bytes)
    }

    /// Runs it with `parameters`: their number, and the length and bytes of each.
    pub(crate) fn run(&mut self, parameters: &[u8]) -> io::Result<()> {
        self.bytes.put_u8(b'B');
        // The length, itself included; the empty names of portal and statement; one format for all, which is binary.
        let length = i32::try_from(4 + 2 + 4 + parameters.len() + 4).map_err(io::Error::other)?;
        self.bytes.put_i32(length);
        self.bytes.put_slice(b"\0\0\0\x01\0\x01");
        self.bytes.put_slice(parameters);
        self.bytes.put_slice(b"\0\x01\0\x01");
        self.requests += 1;
        frontend::execute("", 0, &mut self.bytes)
    }

    pub(crate) fn requests(&self) -> u32 {
        self.requests
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }
}

/// What has come back so far of what went ahead last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Answered {
    /// How many requests were run.
    pub(crate) requests: u32,
    /// How many rows they touched.
    pub(crate) rows: u64,
}

/// The exchange while it is under way: what is still to be written, and which answers to keep back.
#[derive(Debug, Default)]
pub(super) struct Exchange {
    out: BytesMut,
    query: Query,
    /// How many requests have not been answered.
    left: u32,
    pub(super) answered: Answered,
    header: [u8; 5],
    filled: usize,
    /// How much of the header the driver has got already.
    given: usize,
    body: usize,
    passing: bool,
    tag: Vec<u8>,
    /// What the driver is to get.
    ready: BytesMut,
}

/// How far the simple query has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Query {
    #[default]
    Done,
    /// Answers to what was sent before may come first, and end as this one does.
    Expected,
    Answering,
}

impl Exchange {
    /// Takes over from a reader that has read `filled` bytes of a header, and of the frame `left` bytes not.
    pub(super) fn take_over(&mut self, header: [u8; 5], filled: usize, left: usize) {
        (self.header, self.filled, self.given, self.body) = (header, filled, filled, left);
        self.passing = filled == 5;
    }

    /// Takes what is to go out, and what the driver has to say behind it, so that both go in one piece. Nothing else may
    /// be under way.
    pub(super) fn send(&mut self, ahead: Ahead, behind: &[u8]) -> io::Result<()> {
        if !self.is_answered() {
            return Err(io::Error::other("requests were sent ahead of others that are not answered"));
        }
        self.out = ahead.bytes;
        self.out.put_slice(behind);
        self.query = if ahead.query { Query::Expected } else { Query::Done };
        self.left = ahead.requests;
        self.answered = Answered::default();
        Ok(())
    }

    /// What is to be written before anything of the driver's.
    pub(super) fn unsent(&self) -> &[u8] {
        &self.out
    }

    pub(super) fn sent(&mut self, bytes: usize) {
        self.out.advance(bytes);
    }

    fn is_answered(&self) -> bool {
        self.out.is_empty() && self.left == 0 && self.query == Query::Done
    }

    /// Whether the driver may read for itself again.
    pub(super) fn is_over(&self) -> bool {
        self.is_answered() && self.ready.is_empty() && (self.filled == 0 || self.filled == 5 && self.passing)
    }

    /// What is to be given to the driver now.
    pub(super) fn ready(&mut self) -> &mut BytesMut {
        &mut self.ready
    }

    /// Reads bytes of the server, and leaves in [`ready`](Self::ready) what is the driver's.
    pub(super) fn read(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.filled < 5 {
                let take = bytes.len().min(5 - self.filled);
                self.header[self.filled..self.filled + take].copy_from_slice(&bytes[..take]);
                self.filled += take;
                bytes = &bytes[take..];
                if self.filled < 5 {
                    return;
                }
                let [tag, length @ ..] = self.header;
                self.body = u32::from_be_bytes(length).saturating_sub(4) as usize;
                self.passing = self.given > 0 || self.passes(tag);
                if self.passing {
                    self.ready.put_slice(&self.header[self.given..]);
                }
                self.tag.clear();
            }
            let take = bytes.len().min(self.body);
            if self.passing {
                self.ready.put_slice(&bytes[..take]);
            } else if self.header[0] == b'C' {
                self.tag.extend_from_slice(&bytes[..take]);
            }
            self.body -= take;
            bytes = &bytes[take..];
            if self.body == 0 {
                self.end_frame();
            }
        }
        if self.filled == 5 && self.body == 0 {
            self.end_frame();
        }
    }

    fn end_frame(&mut self) {
        if !self.passing && self.query == Query::Done && matches!(self.header[0], b'C' | b'I' | b's') {
            self.left -= 1;
            self.answered.requests += 1;
            self.answered.rows += rows(&self.tag);
        }
        if !self.passing && self.query == Query::Answering && self.header[0] == b'Z' {
            self.query = Query::Done;
        }
        self.filled = 0;
        self.given = 0;
        self.tag.clear();
    }

    /// Whether a frame is the driver's.
    fn passes(&mut self, tag: u8) -> bool {
        match (self.query, tag) {
            // What comes when it likes.
            (_, b'N' | b'A' | b'S') => true,
            // The end of something sent before: a statement that is closed or has just been prepared.
            (Query::Expected, b'3' | b'Z') => true,
            (Query::Expected | Query::Answering, _) => {
                self.query = Query::Answering;
                false
            }
            (Query::Done, _) if self.left == 0 => true,
            (Query::Done, b'1' | b'2' | b'C' | b'D' | b'I' | b'T' | b'n' | b's' | b't') => false,
            (Query::Done, b'3' | b'Z') => true,
            // An error is the answer to all, and so is what nobody expected.
            (Query::Done, _) => {
                self.left = 0;
                true
            }
        }
    }
}

/// The number at the end of a command's tag, if there is one.
fn rows(tag: &[u8]) -> u64 {
    let tag = tag.strip_suffix(b"\0").unwrap_or(tag);
    let digits = tag.iter().rev().take_while(|b| b.is_ascii_digit()).count();
    let number = std::str::from_utf8(&tag[tag.len() - digits..]).ok();
    number.and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::super::wire::frame;
    use super::*;

    fn ahead(query: bool, requests: u32) -> Ahead {
        Ahead { query, requests, bytes: BytesMut::new() }
    }

    /// What the driver gets of these frames, in chunks of every size; the same for all.
    fn passed(ahead: impl Fn() -> Ahead, frames: &[Vec<u8>]) -> (Vec<u8>, Answered) {
        let bytes = frames.concat();
        let mut results = (1..20).chain([bytes.len()]).map(|step| {
            let mut exchange = Exchange::default();
            exchange.send(ahead(), b"").expect("nothing is under way");
            let mut got = Vec::new();
            for chunk in bytes.chunks(step) {
                // As the reader does: it turns away as soon as it may.
                if exchange.is_over() {
                    got.extend(chunk);
                } else {
                    exchange.read(chunk);
                    got.extend(exchange.ready().split());
                }
            }
            assert!(exchange.is_over());
            (got, exchange.answered)
        });
        let first = results.next().expect("one");
        assert!(results.all(|other| other == first));
        first
    }

    fn row(tag: &[u8]) -> Vec<u8> {
        [frame(b'2', b""), frame(b'D', &[b'Z'; 30]), frame(b'C', tag)].concat()
    }

    #[test]
    fn the_driver_gets_the_answers_to_its_own_request_only() {
        let own = [row(b"UPDATE 1\0"), frame(b'Z', b"T")].concat();
        let frames = [
            // A statement that was closed before.
            frame(b'3', b""),
            frame(b'Z', b"I"),
            frame(b'C', b"BEGIN\0"),
            frame(b'Z', b"T"),
            frame(b'1', b""),
            row(b"UPDATE 2\0"),
            frame(b'N', b"notice"),
            row(b"INSERT 0 40\0"),
            own.clone(),
        ];
        let (got, answered) = passed(|| ahead(true, 2), &frames);
        let expected = [frame(b'3', b""), frame(b'Z', b"I"), frame(b'N', b"notice"), own].concat();
        assert_eq!(got, expected);
        assert_eq!(answered, Answered { requests: 2, rows: 42 });
    }

    #[test]
    fn an_error_is_the_answer_to_the_drivers_request() {
        let error = [frame(b'E', b"C23505\0\0"), frame(b'Z', b"E")].concat();
        let frames = [frame(b'1', b""), row(b"INSERT 0 1\0"), frame(b'2', b""), error.clone()];
        let (got, answered) = passed(|| ahead(false, 5), &frames);
        assert_eq!(got, error);
        assert_eq!(answered.requests, 1);
    }

    #[test]
    fn an_error_of_the_query_ahead_is_not() {
        let refused = [frame(b'E', b"C25P02\0\0"), frame(b'Z', b"E")].concat();
        let frames =
            [frame(b'C', b"BEGIN\0"), frame(b'E', b"C42501\0\0"), frame(b'Z', b"E"), refused.clone()];
        assert_eq!(passed(|| ahead(true, 3), &frames).0, refused);
    }

    #[test]
    fn a_frame_that_the_driver_has_half_of_is_passed_on() {
        let half = frame(b'S', b"TimeZone\0UTC\0");
        for cut in 1..half.len() {
            let mut header = [0; 5];
            let filled = cut.min(5);
            header[..filled].copy_from_slice(&half[..filled]);
            let left = if filled == 5 { half.len() - cut } else { 0 };
            let mut exchange = Exchange::default();
            exchange.take_over(header, filled, left);
            exchange.send(ahead(false, 1), b"").expect("nothing is under way");
            exchange.read(&half[cut..]);
            exchange.read(&row(b"SELECT 1\0"));
            assert_eq!(exchange.ready().split(), half[cut..], "cut at {cut}");
            assert!(exchange.is_over());
        }
    }
}
