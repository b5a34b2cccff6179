//! Bytes split into frames: a tag, a length that counts itself, and a body (PostgreSQL manual, chapter 54.7).

/// Where a direction of a connection stands: the frame that is under way, if one is.
#[derive(Debug, Default)]
pub(crate) struct Frames {
    header: [u8; 5],
    filled: usize,
    /// Bytes of the body still to come.
    left: usize,
    /// The next frame has no tag, as a client's first has none.
    untagged: bool,
}

/// What is here of one frame. One that comes in parts is made of several: the first has the header, the last the end.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Piece<'b> {
    pub(crate) tag: u8,
    /// If the header ends here: all of it.
    pub(crate) header: Option<[u8; 5]>,
    pub(crate) body: &'b [u8],
    pub(crate) ends: bool,
}

impl Frames {
    /// Begins with a client's first message, which has no tag. Its tag is told as 0.
    pub(crate) fn startup() -> Self {
        Self { untagged: true, filled: 1, ..Self::default() }
    }

    /// Whether the last frame is complete, and nothing of the next is here.
    #[inline]
    pub(crate) fn at_boundary(&self) -> bool {
        self.filled == 0
    }

    /// How many bytes of a header are here that is not complete.
    pub(crate) fn partial(&self) -> usize {
        if self.filled < 5 { self.filled - usize::from(self.untagged) } else { 0 }
    }

    /// Takes what belongs to one frame off the front of `bytes`; nothing if there is nothing but a part of its header.
    pub(crate) fn take<'b>(&mut self, bytes: &mut &'b [u8]) -> Option<Piece<'b>> {
        if bytes.is_empty() {
            return None;
        }
        let mut complete = None;
        if self.filled < 5 {
            let before = self.filled;
            let (header, rest) = bytes.split_at(bytes.len().min(5 - before));
            self.header[before..before + header.len()].copy_from_slice(header);
            self.filled += header.len();
            *bytes = rest;
            if self.filled < 5 {
                return None;
            }
            self.left = body_length(&self.header);
            complete = Some(self.header);
        }
        let (body, rest) = bytes.split_at(bytes.len().min(self.left));
        *bytes = rest;
        self.left -= body.len();
        let ends = self.left == 0;
        if ends {
            self.filled = 0;
            self.untagged = false;
        }
        Some(Piece { tag: self.header[0], header: complete, body, ends })
    }
}

/// Takes a frame off the front of `bytes` if all of it is there.
#[inline]
pub(crate) fn whole<'b>(bytes: &mut &'b [u8]) -> Option<(u8, &'b [u8])> {
    let end = extent(bytes, false)?;
    let body = bytes.get(5..end)?;
    let tag = bytes[0];
    *bytes = &bytes[end..];
    Some((tag, body))
}

/// How long the frame at the front of `bytes` says it is in all, once its header is there; a client's first has no tag.
#[inline]
pub(crate) fn extent(bytes: &[u8], untagged: bool) -> Option<usize> {
    let tag = usize::from(!untagged);
    let length = bytes.get(tag..)?.first_chunk()?;
    Some((u32::from_be_bytes(*length) as usize).saturating_add(tag))
}

#[inline]
fn body_length(&[_, a, b, c, d]: &[u8; 5]) -> usize {
    u32::from_be_bytes([a, b, c, d]).saturating_sub(4) as usize
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A message as the server sends it.
    pub(crate) fn frame(tag: u8, body: &[u8]) -> Vec<u8> {
        let mut frame = vec![tag];
        frame.extend((body.len() as u32 + 4).to_be_bytes());
        frame.extend(body);
        frame
    }

    /// The tags of the messages that these bytes are, and nothing else.
    pub(crate) fn tags(mut bytes: &[u8]) -> Vec<u8> {
        let mut tags = Vec::new();
        while let Some((tag, _)) = whole(&mut bytes) {
            tags.push(tag);
        }
        assert!(bytes.is_empty());
        tags
    }

    #[test]
    fn any_split_of_the_bytes_gives_the_same_frames() {
        let sent = [(b'Q', vec![b'x'; 40]), (b'S', vec![]), (b'X', vec![1])];
        let bytes: Vec<u8> = sent.iter().flat_map(|(tag, body)| frame(*tag, body)).collect();
        for step in 1..=bytes.len() {
            let mut frames = Frames::default();
            let (mut got, mut body) = (Vec::new(), Vec::new());
            for mut chunk in bytes.chunks(step) {
                while let Some(piece) = frames.take(&mut chunk) {
                    body.extend(piece.body);
                    if piece.ends {
                        got.push((piece.tag, std::mem::take(&mut body)));
                    }
                }
            }
            assert_eq!(got, sent, "step {step}");
            assert!(frames.at_boundary());
        }
    }

    #[test]
    fn a_first_message_has_no_tag() {
        let mut frames = Frames::startup();
        let mut bytes: &[u8] = &[0, 0, 0, 6, 1, 2, b'S', 0, 0, 0, 4];
        let first = frames.take(&mut bytes).expect("a frame");
        assert_eq!((first.tag, first.body, first.ends), (0, &[1, 2][..], true));
        assert_eq!(frames.take(&mut bytes).map(|piece| piece.tag), Some(b'S'));
    }

    #[test]
    fn lengths_that_nobody_sends_do_no_harm() {
        let mut bytes: &[u8] = &[b'E', 0, 0, 0, 0, b'Z', 0xff, 0xff, 0xff, 0xff, 1, 2];
        let mut frames = Frames::default();
        assert!(frames.take(&mut bytes).is_some_and(|piece| piece.ends && piece.body.is_empty()));
        assert!(frames.take(&mut bytes).is_some_and(|piece| !piece.ends && piece.body == [1, 2]));
    }

    #[test]
    fn the_extent_of_a_frame_is_known_as_soon_as_its_header_is_there() {
        let sent = frame(b'Q', b"SELECT 1\0");
        assert_eq!(extent(&sent[..4], false), None);
        assert_eq!(extent(&sent[..5], false), Some(sent.len()));
        assert_eq!(extent(&sent[1..4], true), None);
        assert_eq!(extent(&sent[1..5], true), Some(sent.len() - 1));
        let mut rest: &[u8] = &sent[..sent.len() - 1];
        assert_eq!(whole(&mut rest), None);
    }
}
