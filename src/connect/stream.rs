//! The stream around the socket: passes bytes, has the ledger read them, and does what it says.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::ledger::Ledger;
use super::wire::Wire;

/// A stream whose two directions go through a ledger.
#[derive(Debug)]
pub(crate) struct Observed<S> {
    stream: S,
    ledger: Ledger,
    wire: Arc<Wire>,
    /// What was taken from the driver, or is ours, and is not handed to the socket yet.
    out: BytesMut,
}

impl<S> Observed<S> {
    pub(crate) fn new(stream: S, wire: Arc<Wire>) -> Self {
        Self { stream, ledger: Ledger::new(), wire, out: BytesMut::new() }
    }
}

impl<S: AsyncWrite + Unpin> Observed<S> {
    /// Takes all of what the driver writes, and sends what the ledger makes of it.
    #[cold]
    fn poll_rewrite(&mut self, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.ledger.rewrite(buf, &mut self.out, &self.wire)?;
        match self.poll_out(cx) {
            Poll::Ready(Err(e)) => Poll::Ready(Err(e)),
            // What is left is sent before anything else is, or when the driver flushes, which it does.
            Poll::Ready(Ok(())) | Poll::Pending => Poll::Ready(Ok(buf.len())),
        }
    }

    #[cold]
    fn poll_out(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.out.is_empty() {
            let written = ready!(Pin::new(&mut self.stream).poll_write(cx, &self.out))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.out.advance(written);
            self.ledger.rewritten_sent(written, &self.wire);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S> Drop for Observed<S> {
    fn drop(&mut self) {
        self.wire.on_closed();
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Observed<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            let ready = this.ledger.ready();
            if !ready.is_empty() {
                let take = ready.len().min(buf.remaining());
                buf.put_slice(&ready.split_to(take));
                return Poll::Ready(Ok(()));
            }
            if this.wire.is_over() {
                // The server has said good-bye. Its socket may stay open for as long as a dead host likes.
                return Poll::Ready(Ok(()));
            }
            let before = buf.filled().len();
            ready!(Pin::new(&mut this.stream).poll_read(cx, buf))?;
            let bytes = &mut buf.filled_mut()[before..];
            if bytes.is_empty() {
                return Poll::Ready(Ok(()));
            }
            let kept = this.ledger.read(bytes, &this.wire);
            buf.set_filled(before + kept);
            if !this.ledger.reply().is_empty() {
                let reply = this.ledger.reply().split();
                this.out.extend_from_slice(&reply);
                // What is left is sent when the driver flushes, which it does whenever it has read.
                if let Poll::Ready(Err(e)) = this.poll_out(cx) {
                    return Poll::Ready(Err(e));
                }
            }
            if kept > 0 {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Observed<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if !this.out.is_empty() {
            ready!(this.poll_out(cx))?;
        }
        if this.ledger.rewrites(&this.wire) {
            return this.poll_rewrite(cx, buf);
        }
        let written = ready!(Pin::new(&mut this.stream).poll_write(cx, buf))?;
        this.ledger.wrote(&buf[..written], &this.wire);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.out.is_empty() {
            ready!(this.poll_out(cx))?;
        }
        Pin::new(&mut this.stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}
