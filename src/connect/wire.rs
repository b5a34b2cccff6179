//! The frames that pass on a connection: what the driver does not tell, read off the stream without a round trip.
//!
//! tokio-postgres keeps the transaction status of ReadyForQuery, the tag of CommandComplete and every error nobody
//! waits for to itself. [`Observed`] passes bytes through untouched and reads the frames' tags and lengths on the way;
//! only four kinds of frame are looked into. What is learnt is stored before the driver sees the bytes, so it is there
//! when the driver's answer is. It also sends [ahead](super::ahead) what the driver cannot. (PostgreSQL manual,
//! chapter 54.7 "Message Formats".)

use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{
    AtomicBool, AtomicI32, AtomicU8, AtomicU32, AtomicU64,
    Ordering::{Relaxed, SeqCst},
};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio_postgres::error::SqlState;

use super::ahead::{Ahead, Answered, Exchange};
use crate::error::ServerError;

/// Where the server says the session is, as of the last ReadyForQuery or BEGIN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TransactionStatus {
    /// Not in a transaction block.
    Idle,
    /// In one.
    Open,
    /// In one that failed: everything but ROLLBACK is refused.
    Failed,
}

/// What was read off one connection so far. Written by the task that drives the connection, read by everyone.
#[derive(Debug, Default)]
pub(crate) struct Wire {
    status: AtomicU8,
    begins: AtomicU32,
    commits: AtomicU32,
    /// The last COMMIT found a transaction to commit.
    committed_block: AtomicBool,
    discards: AtomicU32,
    written: AtomicU64,
    process_id: AtomicI32,
    secret_key: AtomicI32,
    /// An error was read, and the ReadyForQuery that follows it was not.
    erring: AtomicBool,
    closed: AtomicBool,
    recovered: Notify,
    journal: Mutex<Journal>,
    /// Whether something waits in `ahead`, which is looked at for every write.
    has_ahead: AtomicBool,
    ahead: Mutex<Option<Ahead>>,
    answered: Mutex<Answered>,
}

/// The errors of the transaction under way, and the one that ended the connection.
#[derive(Debug, Default)]
struct Journal {
    recording: bool,
    errors: Vec<Arc<ServerError>>,
    cured: Vec<Arc<ServerError>>,
    fatal: Option<Arc<ServerError>>,
}

/// Enough errors to name a cause; a transaction can fail in a loop of savepoints for as long as it likes.
const JOURNAL_LIMIT: usize = 16;

/// Nothing panics while one of these is held; a poisoned one is as good as any.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Wire {
    pub(crate) fn status(&self) -> TransactionStatus {
        match self.status.load(Relaxed) {
            b'T' => TransactionStatus::Open,
            b'E' => TransactionStatus::Failed,
            _ => TransactionStatus::Idle,
        }
    }

    /// How many BEGIN or START TRANSACTION the server has confirmed. `PREPARE TRANSACTION` and the like end one.
    pub(crate) fn begins(&self) -> u32 {
        self.begins.load(Relaxed)
    }

    /// How many COMMITs the server has confirmed *as commits*.
    pub(crate) fn commits(&self) -> u32 {
        self.commits.load(Relaxed)
    }

    /// Whether the last of them was answered inside a transaction block. Outside of one it does nothing and says the
    /// same, with a warning.
    pub(crate) fn committed_block(&self) -> bool {
        self.committed_block.load(Relaxed)
    }

    /// How many times all prepared statements were dropped (`DISCARD ALL`, `DEALLOCATE ALL`).
    pub(crate) fn discards(&self) -> u32 {
        self.discards.load(Relaxed)
    }

    /// How many bytes were handed to the socket.
    pub(crate) fn written(&self) -> u64 {
        self.written.load(Relaxed)
    }

    pub(crate) fn process_id(&self) -> i32 {
        self.process_id.load(Relaxed)
    }

    pub(crate) fn secret_key(&self) -> i32 {
        self.secret_key.load(Relaxed)
    }

    /// Whether the server has reported an error, and reads over what it is sent until it is told that this is the end.
    pub(crate) fn is_erring(&self) -> bool {
        self.erring.load(SeqCst)
    }

    /// Waits until the status is that after the last error. The driver answers a request with its error before it has
    /// read the ReadyForQuery behind it, which says how the session stands; that is on its way already.
    pub(crate) async fn recovered(&self) {
        while self.erring.load(SeqCst) && !self.closed.load(SeqCst) {
            let mut recovered = pin!(self.recovered.notified());
            recovered.as_mut().enable();
            if self.erring.load(SeqCst) && !self.closed.load(SeqCst) {
                recovered.await;
            }
        }
    }

    /// Only the task that drives the connection writes, so no other addition can be lost.
    #[inline]
    fn on_written(&self, bytes: usize) {
        self.written.store(self.written.load(Relaxed) + bytes as u64, Relaxed);
    }

    fn on_closed(&self) {
        self.closed.store(true, SeqCst);
        self.recovered.notify_waiters();
    }

    fn journal(&self) -> MutexGuard<'_, Journal> {
        lock(&self.journal)
    }

    /// Starts a new transaction's record.
    pub(crate) fn record(&self) {
        let mut journal = self.journal();
        journal.recording = true;
        journal.errors.clear();
        journal.cured.clear();
    }

    /// Ends the record.
    pub(crate) fn stop_recording(&self) {
        self.journal().recording = false;
    }

    /// Adds an error of ours to the record: the transaction must not be committed.
    pub(crate) fn note(&self, error: ServerError) {
        let mut journal = self.journal();
        if journal.recording && journal.errors.len() < JOURNAL_LIMIT {
            journal.errors.push(Arc::new(error));
        }
    }

    /// How many errors the transaction has seen and not yet rolled back to before.
    pub(crate) fn mark(&self) -> usize {
        self.journal().errors.len()
    }

    /// Forgets the errors since `mark`: ROLLBACK TO SAVEPOINT undid what they broke. Serialization failures and
    /// deadlocks stay on a list of their own, since they come back after it (40001) or may be what the closure fails
    /// with in the end.
    pub(crate) fn cure(&self, mark: usize) {
        let mut journal = self.journal();
        let from = mark.min(journal.errors.len());
        let cured = journal.errors.split_off(from);
        for e in cured.into_iter().filter(|e| e.code.code().starts_with("40")) {
            if journal.cured.len() < JOURNAL_LIMIT {
                journal.cured.push(e);
            }
        }
    }

    /// The error that broke the transaction since `mark`: the first, and never 25P02, which is only its symptom.
    pub(crate) fn first_error(&self, mark: usize) -> Option<Arc<ServerError>> {
        self.journal().errors.get(mark).cloned()
    }

    /// A serialization failure or deadlock that a savepoint was rolled back for.
    pub(crate) fn cured_error(&self) -> Option<Arc<ServerError>> {
        self.journal().cured.first().cloned()
    }

    /// The FATAL error with which the server closed the connection.
    pub(crate) fn fatal(&self) -> Option<Arc<ServerError>> {
        self.journal().fatal.clone()
    }

    /// Sends this ahead of the driver's next request. Nothing may be under way, and nothing else wait for that.
    pub(crate) fn send_ahead(&self, ahead: Ahead) {
        *lock(&self.answered) = Answered::default();
        *lock(&self.ahead) = Some(ahead);
        self.has_ahead.store(true, SeqCst);
    }

    /// Whether something waits for the driver's next request.
    pub(crate) fn has_ahead(&self) -> bool {
        self.has_ahead.load(SeqCst)
    }

    fn take_ahead(&self) -> Option<Ahead> {
        self.has_ahead.swap(false, SeqCst).then(|| lock(&self.ahead).take())?
    }

    /// How far the server has come with what was sent ahead.
    pub(crate) fn answered(&self) -> Answered {
        *lock(&self.answered)
    }

    /// Whether there is one. No ReadyForQuery follows it, so the record need seldom be looked into.
    pub(crate) fn is_ended(&self) -> bool {
        self.is_erring() && self.fatal().is_some()
    }

    #[inline]
    fn on_status(&self, body: &[u8]) {
        self.status.store(body.first().copied().unwrap_or(b'I'), Relaxed);
        if self.erring.load(Relaxed) {
            self.erring.store(false, SeqCst);
            self.recovered.notify_waiters();
        }
    }

    /// Whether a command's tag, with its closing zero, may be one that is counted; told by its length, since most are
    /// not.
    #[inline]
    fn counts(tag: &[u8]) -> bool {
        matches!(tag.len(), 6 | 7 | 12 | 15 | 18 | 20)
    }

    fn on_frame(&self, tag: u8, body: &[u8]) {
        match tag {
            b'Z' => self.on_status(body),
            b'C' => {
                let counter = match body.split_last().map_or(body, |(_, tag)| tag) {
                    b"BEGIN" | b"START TRANSACTION" => {
                        // COMMIT may follow before the next ReadyForQuery does.
                        self.status.store(b'T', Relaxed);
                        &self.begins
                    }
                    b"COMMIT" | b"PREPARE TRANSACTION" => {
                        self.committed_block.store(self.status() != TransactionStatus::Idle, Relaxed);
                        &self.commits
                    }
                    b"DISCARD ALL" | b"DEALLOCATE ALL" => &self.discards,
                    _ => return,
                };
                counter.fetch_add(1, Relaxed);
            }
            b'K' => {
                if let Some((pid, rest)) = body.split_first_chunk() {
                    self.process_id.store(i32::from_be_bytes(*pid), Relaxed);
                    if let Some((key, _)) = rest.split_first_chunk() {
                        self.secret_key.store(i32::from_be_bytes(*key), Relaxed);
                    }
                }
            }
            b'E' => self.on_error(body),
            _ => {}
        }
    }

    fn on_error(&self, body: &[u8]) {
        let error = Arc::new(parse_error(body));
        self.erring.store(true, SeqCst);
        let mut journal = self.journal();
        if error.fatal {
            journal.fatal.get_or_insert_with(|| Arc::clone(&error));
        }
        if journal.recording
            && error.code != SqlState::IN_FAILED_SQL_TRANSACTION
            && journal.errors.len() < JOURNAL_LIMIT
        {
            journal.errors.push(error);
        }
    }
}

/// Reads the fields that are kept (manual, chapter 54.8).
fn parse_error(mut body: &[u8]) -> ServerError {
    let mut error = ServerError {
        fatal: false,
        code: SqlState::INTERNAL_ERROR,
        message: "".into(),
        constraint: None,
        routine: None,
    };
    while let [kind, rest @ ..] = body {
        if *kind == 0 {
            break;
        }
        let end = rest.iter().position(|b| *b == 0).unwrap_or(rest.len());
        let value = String::from_utf8_lossy(&rest[..end]);
        match kind {
            b'V' => error.fatal = matches!(&*value, "FATAL" | "PANIC"),
            b'C' => error.code = SqlState::from_code(&value),
            b'M' => error.message = value.into(),
            b'n' => error.constraint = Some(value.into()),
            b'R' => error.routine = Some(value.into()),
            _ => {}
        }
        body = rest.get(end + 1..).unwrap_or_default();
    }
    error
}

/// Splits what the server sends into frames: a tag, a length that counts itself, and a body.
#[derive(Debug, Default)]
struct Frames {
    header: [u8; 5],
    filled: usize,
    /// Bytes of the current body still to come.
    left: usize,
    body: Vec<u8>,
}

/// Error bodies can quote whole queries; more than this of one is not needed.
const BODY_LIMIT: usize = 64 * 1024;

impl Frames {
    #[inline]
    fn kept(tag: u8) -> bool {
        matches!(tag, b'Z' | b'C' | b'E' | b'K')
    }

    #[inline]
    fn feed(&mut self, mut bytes: &[u8], wire: &Wire) {
        loop {
            if self.filled == 0 {
                bytes = Self::whole(bytes, wire);
            }
            if bytes.is_empty() {
                return;
            }
            bytes = self.part(bytes, wire);
        }
    }

    /// The common case: reads the frames that are here as a whole, and returns what is left.
    #[inline]
    fn whole<'b>(mut bytes: &'b [u8], wire: &Wire) -> &'b [u8] {
        while let Some(&[tag, a, b, c, d]) = bytes.first_chunk() {
            let end = (u32::from_be_bytes([a, b, c, d]) as usize).saturating_add(1);
            let Some(body) = bytes.get(5..end) else { break };
            match tag {
                b'Z' => wire.on_status(body),
                b'C' if !Wire::counts(body) => {}
                _ if Self::kept(tag) => wire.on_frame(tag, body),
                _ => {}
            }
            bytes = &bytes[end..];
        }
        bytes
    }

    /// Reads what is here of one frame, and returns what is behind it.
    fn part<'b>(&mut self, mut bytes: &'b [u8], wire: &Wire) -> &'b [u8] {
        if self.filled < 5 {
            let (header, rest) = bytes.split_at(bytes.len().min(5 - self.filled));
            self.header[self.filled..self.filled + header.len()].copy_from_slice(header);
            self.filled += header.len();
            bytes = rest;
            if self.filled < 5 {
                return bytes;
            }
            self.left = body_length(&self.header);
            self.body.clear();
        }
        let (body, rest) = bytes.split_at(bytes.len().min(self.left));
        let kept = Self::kept(self.header[0]);
        if kept {
            let room = BODY_LIMIT.saturating_sub(self.body.len());
            self.body.extend_from_slice(&body[..body.len().min(room)]);
        }
        self.left -= body.len();
        if self.left == 0 {
            if kept {
                wire.on_frame(self.header[0], &self.body);
            }
            self.filled = 0;
        }
        rest
    }
}

#[inline]
fn body_length(&[_, a, b, c, d]: &[u8; 5]) -> usize {
    u32::from_be_bytes([a, b, c, d]).saturating_sub(4) as usize
}

/// A stream that tells a [`Wire`] what passes, and sends ahead what is given to it.
#[derive(Debug)]
pub(crate) struct Observed<S> {
    stream: S,
    frames: Frames,
    wire: Arc<Wire>,
    /// The driver's last write was taken in part, so its next bytes may begin in the middle of a message.
    partial: bool,
    /// Some of the answers are not the driver's.
    exchanging: bool,
    /// Kept once there was one.
    exchange: Option<Box<Exchange>>,
}

impl<S> Observed<S> {
    pub(crate) fn new(stream: S, wire: Arc<Wire>) -> Self {
        Self { stream, frames: Frames::default(), wire, partial: false, exchanging: false, exchange: None }
    }

    fn begin_exchange(&mut self, ahead: Ahead, behind: &[u8]) -> io::Result<()> {
        if self.partial {
            // Only what nobody waits for (closing a statement) can be under way, and that much a socket always takes.
            return Err(io::Error::other("a message was interrupted"));
        }
        let exchange = self.exchange.get_or_insert_default();
        if !std::mem::replace(&mut self.exchanging, true) {
            exchange.take_over(self.frames.header, self.frames.filled, self.frames.left);
        }
        exchange.send(ahead, behind)
    }
}

impl<S: AsyncWrite + Unpin> Observed<S> {
    /// Takes this from the driver together with what goes ahead of it.
    #[cold]
    fn poll_write_behind(
        &mut self,
        cx: &mut Context<'_>,
        ahead: Ahead,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.begin_exchange(ahead, buf)?;
        match self.poll_unsent(cx) {
            Poll::Ready(Err(e)) => Poll::Ready(Err(e)),
            // What is left is sent before anything else is, or when the driver flushes, which it does.
            Poll::Ready(Ok(())) | Poll::Pending => Poll::Ready(Ok(buf.len())),
        }
    }

    #[cold]
    fn poll_unsent(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some(exchange) = &mut self.exchange else { return Poll::Ready(Ok(())) };
        while !exchange.unsent().is_empty() {
            let written = ready!(Pin::new(&mut self.stream).poll_write(cx, exchange.unsent()))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            exchange.sent(written);
            self.wire.on_written(written);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> Observed<S> {
    /// Reads while some of the answers are not the driver's. Pending or filled, or it is the end.
    #[cold]
    fn poll_exchange(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        while let Some(exchange) = &mut self.exchange {
            let ready = exchange.ready();
            if !ready.is_empty() {
                let take = ready.len().min(buf.remaining());
                buf.put_slice(&ready.split_to(take));
                return Poll::Ready(Ok(()));
            }
            if exchange.is_over() {
                self.exchanging = false;
                break;
            }
            let before = buf.filled().len();
            ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
            let bytes = &buf.filled()[before..];
            if bytes.is_empty() {
                return Poll::Ready(Ok(()));
            }
            exchange.read(bytes);
            self.frames.feed(bytes, &self.wire);
            *lock(&self.wire.answered) = exchange.answered;
            buf.set_filled(before);
        }
        self.poll_direct(cx, buf)
    }

    #[inline]
    fn poll_direct(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        self.frames.feed(&buf.filled()[before..], &self.wire);
        Poll::Ready(Ok(()))
    }
}

impl<S> Drop for Observed<S> {
    fn drop(&mut self) {
        self.wire.on_closed();
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Observed<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.exchanging { this.poll_exchange(cx, buf) } else { this.poll_direct(cx, buf) }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Observed<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.exchanging {
            ready!(this.poll_unsent(cx))?;
        }
        if this.wire.has_ahead.load(Relaxed) {
            if let Some(ahead) = this.wire.take_ahead() {
                return this.poll_write_behind(cx, ahead, buf);
            }
        }
        let written = ready!(Pin::new(&mut this.stream).poll_write(cx, buf))?;
        this.partial = written < buf.len();
        this.wire.on_written(written);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.exchanging {
            ready!(this.poll_unsent(cx))?;
        }
        Pin::new(&mut this.stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

/// A message as the server sends it.
#[cfg(test)]
pub(super) fn frame(tag: u8, body: &[u8]) -> Vec<u8> {
    let mut frame = vec![tag];
    frame.extend((body.len() as u32 + 4).to_be_bytes());
    frame.extend(body);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session() -> Vec<u8> {
        [
            frame(b'K', &[0, 0, 0, 7, 0, 0, 0, 9]),
            frame(b'Z', b"I"),
            frame(b'C', b"BEGIN\0"),
            frame(b'Z', b"T"),
            frame(b'D', &[b'Z'; 300]),
            frame(b'1', b""),
            frame(b'E', b"SFEHLER\0VERROR\0C23505\0Mduplicate\0ncustomers_pkey\0\0"),
            frame(b'E', b"SFEHLER\0VERROR\0C25P02\0Maborted\0\0"),
            frame(b'Z', b"E"),
            frame(b'C', b"ROLLBACK\0"),
            frame(b'Z', b"I"),
            frame(b'C', b"COMMIT\0"),
            frame(b'n', b""),
            frame(b'E', b"SFATAL\0VFATAL\0C57P01\0Mterminating\0\0"),
        ]
        .concat()
    }

    #[test]
    fn any_split_of_the_bytes_is_read_alike() {
        let bytes = session();
        for step in (1..40).chain([bytes.len()]) {
            let wire = Wire::default();
            wire.record();
            let mut frames = Frames::default();
            for chunk in bytes.chunks(step) {
                frames.feed(chunk, &wire);
            }
            assert_eq!(wire.status(), TransactionStatus::Idle, "step {step}");
            assert_eq!((wire.begins(), wire.commits()), (1, 1), "step {step}");
            assert_eq!((wire.process_id(), wire.secret_key()), (7, 9), "step {step}");
            let first = wire.first_error(0).expect("recorded");
            assert_eq!(first.code(), &SqlState::UNIQUE_VIOLATION, "step {step}");
            assert_eq!(first.constraint(), Some("customers_pkey"), "step {step}");
            assert_eq!(wire.fatal().expect("fatal").code().code(), "57P01", "step {step}");
            assert_eq!(wire.mark(), 2, "25P02 is not counted; step {step}");
        }
    }

    #[test]
    fn the_status_follows_the_last_ready_for_query() {
        let wire = Wire::default();
        let mut frames = Frames::default();
        for (byte, status) in [
            (b'T', TransactionStatus::Open),
            (b'E', TransactionStatus::Failed),
            (b'I', TransactionStatus::Idle),
        ] {
            frames.feed(&frame(b'Z', &[byte]), &wire);
            assert_eq!(wire.status(), status);
        }
    }

    #[test]
    fn after_an_error_the_status_is_waited_for() {
        let wire = Arc::new(Wire::default());
        let mut frames = Frames::default();
        let mut waiting = pin!(wire.recovered());
        let mut poll = || waiting.as_mut().poll(&mut Context::from_waker(std::task::Waker::noop()));
        frames.feed(&frame(b'E', b"VERROR\0C22012\0Ma\0\0"), &wire);
        assert!(poll().is_pending());
        frames.feed(&frame(b'C', b"SELECT 1\0"), &wire);
        assert!(poll().is_pending());
        frames.feed(&frame(b'Z', b"E"), &wire);
        assert!(poll().is_ready());
        assert_eq!(wire.status(), TransactionStatus::Failed);
        // Nor for ever, if the server closes the connection instead.
        frames.feed(&frame(b'E', b"VFATAL\0C57P01\0Ma\0\0"), &wire);
        let mut waiting = pin!(wire.recovered());
        let mut poll = || waiting.as_mut().poll(&mut Context::from_waker(std::task::Waker::noop()));
        assert!(poll().is_pending());
        drop(Observed::new((), Arc::clone(&wire)));
        assert!(poll().is_ready());
    }

    #[test]
    fn a_cure_keeps_serialization_failures_in_mind() {
        let wire = Wire::default();
        wire.record();
        wire.on_frame(b'E', b"VERROR\0C23505\0Ma\0\0");
        let mark = wire.mark();
        wire.on_frame(b'E', b"VERROR\0C40001\0Mb\0\0");
        wire.on_frame(b'E', b"VERROR\0C22012\0Mc\0\0");
        wire.cure(mark);
        assert_eq!(wire.mark(), 1);
        assert_eq!(wire.cured_error().expect("kept").code().code(), "40001");
        wire.record();
        assert_eq!(wire.mark(), 0);
        assert!(wire.cured_error().is_none());
    }

    #[test]
    fn lengths_no_server_sends_do_no_harm() {
        let wire = Wire::default();
        let mut frames = Frames::default();
        frames.feed(&[b'E', 0, 0, 0, 0, b'Z', 0, 0, 0, 1, b'Z', 0, 0, 0, 5, b'T'], &wire);
        assert_eq!(wire.status(), TransactionStatus::Open);
        frames.feed(&[b'E', 0xff, 0xff, 0xff, 0xff], &wire);
        frames.feed(&vec![1; 1 << 20], &wire);
        assert!(frames.body.len() <= BODY_LIMIT);
    }
}
