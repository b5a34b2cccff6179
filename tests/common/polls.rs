//! Futures that are polled so often and no more: then they are dropped, or leaked.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

/// A future that is dropped after a number of polls.
pub struct Polls<F> {
    future: Option<Pin<Box<F>>>,
    left: usize,
    leaks: bool,
}

pub fn polls<F: Future>(future: F, left: usize) -> Polls<F> {
    Polls { future: Some(Box::pin(future)), left, leaks: false }
}

/// The same, but it is never dropped if it was not done: what it borrowed is free again, and it knows nothing of that.
pub fn leaked<F: Future>(future: F, left: usize) -> Polls<F> {
    Polls { future: Some(Box::pin(future)), left, leaks: true }
}

impl<F: Future> Future for Polls<F> {
    /// `None` if it was not done after so many polls.
    type Output = Option<F::Output>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        if this.left == 0 {
            return Poll::Ready(None);
        }
        this.left -= 1;
        match this.future.as_mut().expect("not done").as_mut().poll(cx) {
            Poll::Ready(output) => {
                this.left = 0;
                this.leaks = false;
                Poll::Ready(Some(output))
            }
            Poll::Pending if this.left == 0 => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<F> Drop for Polls<F> {
    #[allow(clippy::mem_forget, reason = "what is leaked is what is tested")]
    fn drop(&mut self) {
        if self.leaks {
            std::mem::forget(self.future.take());
        }
    }
}
