//! Messages of the protocol as tests see and make them: bytes go in as they come, whole messages come out.
//!
//! On purpose not the crate's own: a mistake in that one is to be seen here.

use bytes::{Bytes, BytesMut};

/// Nothing that speaks the protocol sends a longer one.
const LONGEST: usize = 1 << 30;

/// What has come of one direction of a connection and was not taken.
#[derive(Debug, Default)]
pub struct Frames {
    buffer: BytesMut,
    untagged: bool,
}

/// A message: a tag, a length, and a body. A client's first has no tag.
#[derive(Clone, Debug)]
pub struct Frame {
    bytes: Bytes,
    header: usize,
}

impl Frames {
    /// Those of a client, from its first message on.
    pub fn of_client() -> Self {
        Self { untagged: true, ..Self::default() }
    }

    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Takes the next message, if all of it is here.
    pub fn take(&mut self) -> Option<Frame> {
        let header = if self.untagged { 4 } else { 5 };
        let length = self.buffer.get(header - 4..)?.first_chunk()?;
        let end = header - 4 + u32::from_be_bytes(*length) as usize;
        assert!((header..=LONGEST).contains(&end), "a message of an impossible length");
        if self.buffer.len() < end {
            return None;
        }
        self.untagged = false;
        Some(Frame { bytes: self.buffer.split_to(end).freeze(), header })
    }

    /// Takes everything, whole or not.
    pub fn take_rest(&mut self) -> BytesMut {
        self.buffer.split()
    }
}

impl Frame {
    pub fn has_tag(&self) -> bool {
        self.header == 5
    }

    /// 0 if it has none.
    pub fn tag(&self) -> u8 {
        if self.has_tag() { self.bytes[0] } else { 0 }
    }

    pub fn body(&self) -> &[u8] {
        &self.bytes[self.header..]
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

pub fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    [&[tag][..], &untagged(body)].concat()
}

/// A message without a tag, as a client's first is.
pub fn untagged(body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 4).expect("short");
    [&length.to_be_bytes(), body].concat()
}
