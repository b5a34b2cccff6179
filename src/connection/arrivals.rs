//! Connects that go on without who asked for them: where connections arrive, and who waits.

use std::collections::{HashMap, VecDeque};
use std::future::pending;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tokio::time::timeout;

use super::connection::Connection;
use crate::connect::Place;
use crate::error::ConnectError;
use crate::lock::lock;

/// How long a runtime of one thread may be busy, or left alone, before connections are made elsewhere.
pub(super) const HOME_LIMIT: Duration = Duration::from_secs(1);

/// A connect that was started, and may have begun.
pub(super) struct Started {
    /// Ends when it begins.
    pub(super) begun: oneshot::Receiver<()>,
    pub(super) attempt: Arc<Mutex<Option<Attempt>>>,
}

impl Started {
    /// Takes the attempt back if it does not begin in time, as where its runtime is blocked or gone.
    pub(super) async fn stands_still(self) -> Attempt {
        // It also ends where the task is dropped.
        let _ = timeout(HOME_LIMIT, self.begun).await;
        let attempt = lock(&self.attempt).take();
        match attempt {
            Some(attempt) => attempt,
            None => pending().await,
        }
    }
}

/// What came of a connect.
pub(super) type Made = Result<Connection, Arc<ConnectError>>;

/// Where connections arrive, and who waits for them: a connect goes on without its caller, and the next one gets it.
#[derive(Debug, Default)]
pub(super) struct Arrivals {
    hall: Mutex<Hall>,
    last_error: Mutex<Option<Arc<ConnectError>>>,
}

#[derive(Debug, Default)]
struct Hall {
    /// When those began that have not come to their end, by their place.
    under_way: HashMap<u64, Instant>,
    /// Callers, in the order in which they came.
    waiting: VecDeque<oneshot::Sender<Made>>,
    /// Connections that nobody was there for.
    ready: Vec<Connection>,
    closed: bool,
}

impl Arrivals {
    /// How many connections are ready that nobody was there for.
    pub(super) fn ready(&self) -> usize {
        lock(&self.hall).ready.len()
    }

    pub(super) fn take_ready(&self) -> Option<Connection> {
        lock(&self.hall).ready.pop()
    }

    /// Keeps only those of them that are still good.
    pub(super) fn retain_ready(&self, keep: impl Fn(&Connection) -> bool) {
        let mut hall = lock(&self.hall);
        let (kept, removed) = hall.ready.drain(..).partition(|connection| keep(connection));
        hall.ready = kept;
        drop(hall);
        drop::<Vec<_>>(removed);
    }

    /// Nothing is handed over from now on.
    pub(super) fn close(&self) {
        let mut hall = lock(&self.hall);
        hall.closed = true;
        hall.waiting.clear();
        drop(hall);
        self.retain_ready(|_| false);
    }

    pub(super) fn is_closed(&self) -> bool {
        lock(&self.hall).closed
    }

    /// The last failure to connect, unless a connection was made since.
    pub(super) fn last_error(&self) -> Option<Arc<ConnectError>> {
        lock(&self.last_error).clone()
    }

    /// Waits for a connection; also returns whether there are more callers than connects that can be hoped for. One that
    /// has taken long already may have been sent to a host that is silent.
    pub(super) fn expect_one(self: &Arc<Self>) -> (Arrival, bool) {
        let (sender, receiver) = oneshot::channel();
        let mut hall = lock(&self.hall);
        hall.waiting.retain(|caller| !caller.is_closed());
        if !hall.closed {
            hall.waiting.push_back(sender);
        }
        let hopeful = hall.under_way.values().filter(|begun| begun.elapsed() < HOME_LIMIT).count();
        (Arrival { receiver, arrivals: Arc::clone(self) }, hall.waiting.len() > hopeful)
    }

    /// Hands it to who waits first; a connection that nobody waits for is kept.
    fn hand_over(&self, mut made: Made) {
        let mut hall = lock(&self.hall);
        while let Some(caller) = hall.waiting.pop_front() {
            match caller.send(made) {
                Ok(()) => return,
                Err(back) => made = back,
            }
        }
        if let (Ok(connection), false) = (made, hall.closed) {
            hall.ready.push(connection);
        }
    }
}

/// A caller's wait for a connection.
pub(super) struct Arrival {
    receiver: oneshot::Receiver<Made>,
    arrivals: Arc<Arrivals>,
}

impl Arrival {
    /// What was made; nothing if the connect was cut short.
    pub(super) async fn made(&mut self) -> Option<Made> {
        (&mut self.receiver).await.ok()
    }
}

impl Drop for Arrival {
    /// What came too late is for the next.
    fn drop(&mut self) {
        self.receiver.close();
        if let Ok(made) = self.receiver.try_recv() {
            self.arrivals.hand_over(made);
        }
    }
}

/// A connect under way, which has its place.
pub(super) struct Attempt {
    arrivals: Arc<Arrivals>,
    pub(super) place: Arc<Place>,
    ended: bool,
}

impl Attempt {
    pub(super) fn new(arrivals: &Arc<Arrivals>, place: Arc<Place>) -> Self {
        lock(&arrivals.hall).under_way.insert(place.number(), Instant::now());
        Self { arrivals: Arc::clone(arrivals), place, ended: false }
    }

    pub(super) fn end(mut self, made: Made) {
        *lock(&self.arrivals.last_error) = made.as_ref().err().cloned();
        self.ended = true;
        lock(&self.arrivals.hall).under_way.remove(&self.place.number());
        self.arrivals.hand_over(made);
    }
}

impl Drop for Attempt {
    /// Cut short, it leaves a caller who has to look elsewhere.
    fn drop(&mut self) {
        if !self.ended {
            let mut hall = lock(&self.arrivals.hall);
            hall.under_way.remove(&self.place.number());
            hall.waiting.retain(|caller| !caller.is_closed());
            drop(hall.waiting.pop_front());
        }
    }
}
