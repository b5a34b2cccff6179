//! Frames of the protocol: read from a peer, queued for it, and made (PostgreSQL manual, chapter 54.7).

use std::io;

use bytes::{BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};

use crate::connect::extent;

/// How much is kept for a peer that does not read, or read ahead from one that is not listened to.
const ROOM: usize = 256 * 1024;

/// How much is read at once.
const READ: usize = 16 * 1024;

/// No frame of PostgreSQL's is larger.
const FRAME_MAX: usize = 1 << 30;

pub(super) trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

pub(super) type Stream = Box<dyn Io>;

/// A frame: a tag, a length, and a body. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Frame(Bytes);

impl Frame {
    pub(super) fn tag(&self) -> u8 {
        self.0[0]
    }

    pub(super) fn body(&self) -> &[u8] {
        &self.0[5..]
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// One end of a conversation: what came from it and what is to go to it.
pub(super) struct Peer {
    read: ReadHalf<Stream>,
    write: WriteHalf<Stream>,
    inbox: BytesMut,
    outbox: BytesMut,
    ended: bool,
}

impl Peer {
    pub(super) fn new(stream: Stream) -> Self {
        let (read, write) = tokio::io::split(stream);
        Self { read, write, inbox: BytesMut::new(), outbox: BytesMut::new(), ended: false }
    }

    /// The length of the first frame, if all of it is here; a client's first has no tag.
    fn complete(&self, untagged: bool) -> io::Result<Option<usize>> {
        let Some(extent) = extent(&self.inbox, untagged) else { return Ok(None) };
        let header = if untagged { 4 } else { 5 };
        if !(header..=FRAME_MAX).contains(&extent) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a frame of an impossible length"));
        }
        Ok((self.inbox.len() >= extent).then_some(extent))
    }

    /// Takes the next frame that has come whole.
    pub(super) fn pop(&mut self) -> io::Result<Option<Frame>> {
        let length = self.complete(false)?;
        Ok(length.map(|length| Frame(self.inbox.split_to(length).freeze())))
    }

    /// Takes the first message of a client, which has no tag, with its length.
    pub(super) fn pop_startup(&mut self) -> io::Result<Option<Bytes>> {
        let length = self.complete(true)?;
        Ok(length.map(|length| self.inbox.split_to(length).freeze()))
    }

    /// Takes bytes as if they had come from it.
    pub(super) fn receive(&mut self, bytes: &mut BytesMut) {
        self.inbox.unsplit(bytes.split());
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.outbox.extend_from_slice(bytes);
    }

    /// The buffer of what is to go to it, for making frames in place.
    pub(super) fn outbox(&mut self) -> &mut BytesMut {
        &mut self.outbox
    }

    /// Drops what is to go to it.
    pub(super) fn forget_outbox(&mut self) {
        self.outbox.clear();
    }

    /// Whether it may be given more.
    pub(super) fn has_room(&self) -> bool {
        self.outbox.len() < ROOM
    }

    /// Whether the last thing it sent was a farewell.
    pub(super) fn said_farewell(&self) -> bool {
        self.inbox.ends_with(b"X\0\0\0\x04")
    }

    /// Whether it has closed its end.
    pub(super) fn has_ended(&self) -> bool {
        self.ended
    }

    /// Reads or writes some bytes, whichever can be done first; without `read`, writes only. Waits for ever if there is
    /// nothing to do. Cancel safe.
    ///
    /// Reads no more than there is room for, except to complete a frame.
    pub(super) async fn step(&mut self, read: bool) -> io::Result<()> {
        let read = read && !self.ended && (self.inbox.len() < ROOM || self.complete(false)?.is_none());
        if read {
            self.inbox.reserve(READ);
        }
        tokio::select! {
            n = self.read.read_buf(&mut self.inbox), if read => self.ended = n? == 0,
            n = self.write.write_buf(&mut self.outbox), if !self.outbox.is_empty() => {
                if n? == 0 {
                    return Err(io::ErrorKind::WriteZero.into());
                }
            }
            else => std::future::pending::<()>().await,
        }
        Ok(())
    }

    /// Writes everything that is to go to it.
    pub(super) async fn flush(&mut self) -> io::Result<()> {
        while !self.outbox.is_empty() {
            self.step(false).await?;
        }
        self.write.flush().await
    }

    /// Writes everything and closes this end.
    pub(super) async fn close(&mut self) -> io::Result<()> {
        self.flush().await?;
        self.write.shutdown().await
    }

    /// Reads until the other end closes, and forgets what comes.
    pub(super) async fn read_to_end(&mut self) -> io::Result<()> {
        while !self.ended {
            self.inbox.clear();
            self.step(true).await?;
        }
        Ok(())
    }
}

/// Appends a frame.
pub(super) fn put(out: &mut BytesMut, tag: u8, parts: &[&[u8]]) {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    out.put_u8(tag);
    // Invariant: parts come from frames, or are short; no frame is longer than FRAME_MAX.
    out.put_u32(u32::try_from(length + 4).expect("a frame has a length of 32 bits"));
    for part in parts {
        out.put_slice(part);
    }
}

/// What the relay says of itself, as a server would.
#[derive(Clone, Debug)]
pub(super) struct Report {
    pub(super) code: String,
    pub(super) message: String,
    pub(super) hint: &'static str,
}

impl Report {
    pub(super) fn new(code: &str, message: impl Into<String>, hint: &'static str) -> Self {
        Self { code: code.to_owned(), message: message.into(), hint }
    }

    /// Appends it as an ErrorResponse (`E`) or NoticeResponse (`N`); manual, chapter 54.8.
    pub(super) fn put(&self, out: &mut BytesMut, tag: u8, severity: &str) {
        let mut body = BytesMut::new();
        for (field, value) in [
            (b'S', severity),
            (b'V', severity),
            (b'C', self.code.as_str()),
            (b'M', self.message.as_str()),
            (b'H', self.hint),
        ] {
            if !value.is_empty() {
                body.put_u8(field);
                body.put_slice(value.as_bytes());
                body.put_u8(0);
            }
        }
        body.put_u8(0);
        put(out, tag, &[&body]);
    }
}

/// A field of an ErrorResponse.
pub(super) fn error_field(mut body: &[u8], field: u8) -> Option<String> {
    while let [kind, rest @ ..] = body {
        // The list ends with a zero.
        let (value, rest) = split_zero(rest).filter(|_| *kind != 0)?;
        if *kind == field {
            return Some(String::from_utf8_lossy(value).into_owned());
        }
        body = rest;
    }
    None
}

/// The string at the beginning, and what follows its closing zero.
pub(super) fn split_zero(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = bytes.iter().position(|b| *b == 0)?;
    Some((&bytes[..end], &bytes[end + 1..]))
}

/// The columns of a DataRow.
pub(super) fn columns(body: &[u8]) -> Vec<Option<String>> {
    let mut columns = Vec::new();
    let mut rest = body.get(2..).unwrap_or_default();
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        // -1 stands for NULL.
        let length = usize::try_from(i32::from_be_bytes(*length)).ok();
        let (value, after) = after.split_at_checked(length.unwrap_or(0)).unwrap_or((after, &[]));
        columns.push(length.map(|_| String::from_utf8_lossy(value).into_owned()));
        rest = after;
    }
    columns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn frames_come_whole_however_the_bytes_are_cut() {
        let (mut far, near) = tokio::io::duplex(7);
        let mut peer = Peer::new(Box::new(near));
        let mut sent = BytesMut::new();
        put(&mut sent, b'Q', &[b"SELECT 1", b"\0"]);
        put(&mut sent, b'S', &[]);
        let write = async { far.write_all(&sent).await.expect("written") };
        let read = async {
            let mut tags = Vec::new();
            while tags.len() < 2 {
                match peer.pop().expect("frames") {
                    Some(frame) => tags.push((frame.tag(), frame.body().len())),
                    None => peer.step(true).await.expect("read"),
                }
            }
            assert_eq!(tags, [(b'Q', 9), (b'S', 0)]);
        };
        tokio::join!(write, read);
    }

    #[test]
    fn a_frame_of_a_length_that_nobody_sends_is_an_error() {
        let received = |bytes: &[u8]| {
            let mut peer = Peer::new(Box::new(tokio::io::empty()));
            peer.receive(&mut BytesMut::from(bytes));
            peer
        };
        for length in [0, 3, u32::MAX, 1 << 31] {
            let length = length.to_be_bytes();
            let tagged = [b"Q", &length[..]].concat();
            assert!(received(&tagged).pop().is_err(), "{length:?}");
            assert!(received(&length).pop_startup().is_err(), "{length:?}");
        }
        assert!(received(&[b'S', 0, 0, 0, 4]).pop().is_ok_and(|frame| frame.is_some()));
        assert!(received(&[0, 0, 0, 4]).pop_startup().is_ok_and(|message| message.is_some()));
    }

    #[test]
    fn a_report_reads_as_it_was_written() {
        let mut out = BytesMut::new();
        Report::new("55P03", "busy", "").put(&mut out, b'E', "ERROR");
        assert_eq!(error_field(&out[5..], b'C').as_deref(), Some("55P03"));
        assert_eq!(error_field(&out[5..], b'M').as_deref(), Some("busy"));
        assert_eq!(error_field(&out[5..], b'H'), None);
        assert_eq!(error_field(b"", b'M'), None);
    }

    #[test]
    fn columns_of_a_row_are_read_with_their_nulls() {
        let body = [&[0, 2][..], &(-1i32).to_be_bytes(), &2i32.to_be_bytes(), b"ab"].concat();
        assert_eq!(columns(&body), [None, Some("ab".to_owned())]);
        assert_eq!(columns(&[0, 1, 0, 0, 0, 9, b'x']), [Some("x".to_owned())]);
    }
}
