//! One client's conversation with the relay, from its start-up to its last answer.
//!
//! In a sandbox, what the client takes for its transaction is a savepoint of the shared one ([`Block`]); before a proxy,
//! the client has a connection of its own, and everything passes as it is. Either way requests are taken one batch at a
//! time: a simple query, or messages of the extended protocol up to Sync (PostgreSQL manual, chapter 54.2).

use std::{collections::HashMap, convert::Infallible, sync::Arc, time::Duration};

use tokio::{
    net::TcpStream,
    sync::{Mutex as AsyncMutex, OwnedMutexGuard, mpsc, oneshot},
    time::{sleep, timeout},
};

use super::{
    backend::{Address, Backend, Outcome},
    block::Block,
    frames::{Frame, Peer, Report, put, split_zero},
    prepared::{Portal, Prepared},
    relay::{Entry, Shared},
};
use crate::lock::lock;

/// How long a client that is told goodbye may take to read it.
const FAREWELL_LIMIT: Duration = Duration::from_secs(1);

/// How long a cancel request waits for its session to take notice; one that is committing does not.
const CANCEL_LIMIT: Duration = Duration::from_secs(10);

/// The codes that stand for a version in a start-up message (manual, chapter 54.7).
const CANCEL_REQUEST: i32 = 80_877_102;
const SSL_REQUEST: i32 = 80_877_103;
const GSS_REQUEST: i32 = 80_877_104;

/// Why a conversation is over.
#[derive(Debug)]
pub(super) enum End {
    /// The client has gone.
    Client,
    /// A fault: both ends are cut.
    Cut,
    /// The server's connection cannot be used any more: the reason.
    Backend(String),
}

/// Serves a client until it goes.
pub(super) async fn serve(stream: TcpStream, shared: Arc<Shared>) {
    let _ = stream.set_nodelay(true);
    let mut client = Peer::new(Box::new(stream));
    loop {
        match client.pop_startup() {
            Ok(Some(message)) => {
                let number = |at: usize| {
                    message.get(at..).and_then(|n| n.first_chunk()).map_or(0, |n| i32::from_be_bytes(*n))
                };
                match number(4) {
                    SSL_REQUEST | GSS_REQUEST => client.push(b"N"),
                    CANCEL_REQUEST => return cancel(&shared, number(8), number(12), &message).await,
                    _ => return converse(client, &message, shared).await,
                }
            }
            Ok(None) if client.has_ended() => return,
            Ok(None) => {
                if client.step(true).await.is_err() {
                    return;
                }
            }
            Err(_) => return,
        }
    }
}

/// Deals with a cancel request; the client's socket is closed after that, as the server does.
async fn cancel(shared: &Shared, process_id: i32, key: i32, request: &[u8]) {
    let Some(common) = &shared.sandbox else {
        if let Ok((address, _)) = Address::reach(&shared.target).await {
            let _ = address.cancel(request).await;
        }
        return;
    };
    if process_id.to_be_bytes() != common.process_id {
        return;
    }
    let (done, dealt_with) = oneshot::channel();
    let sent = lock(&common.sessions).get(&key).is_some_and(|entry| entry.cancels.send(done).is_ok());
    if sent {
        let _ = timeout(CANCEL_LIMIT, dealt_with).await;
    }
}

async fn converse(client: Peer, message: &[u8], shared: Arc<Shared>) {
    let (sender, cancels) = mpsc::unbounded_channel();
    let key = shared.sandbox.as_ref().map(|common| {
        let mut sessions = lock(&common.sessions);
        let key = std::iter::repeat_with(|| fastrand::i32(..)).find(|key| !sessions.contains_key(key));
        let key = key.unwrap_or_default();
        sessions.insert(key, Entry { cancels: sender, in_transaction: false });
        key
    });
    let mut conversation = Conversation {
        prefix: key.map(|key| format!("pgs{key:08x}_")).unwrap_or_default(),
        key,
        shared,
        client,
        lease: None,
        cancels,
        block: Block::Idle,
        statements: HashMap::new(),
        portals: HashMap::new(),
        unnamed_gone: false,
        locals: Vec::new(),
        held: None,
        muted: false,
        stray: false,
    };
    let end = match conversation.start(message).await {
        Ok(()) => conversation.go_on().await.map_or_else(|end| end, |never| match never {}),
        Err(end) => end,
    };
    conversation.leave(end).await;
}

pub(super) struct Conversation {
    pub(super) shared: Arc<Shared>,
    pub(super) client: Peer,
    /// The server's connection, while it is this client's.
    pub(super) lease: Option<OwnedMutexGuard<Backend>>,
    pub(super) cancels: mpsc::UnboundedReceiver<oneshot::Sender<()>>,
    /// In a sandbox, the secret key of the session.
    pub(super) key: Option<i32>,
    pub(super) block: Block,
    /// Before the names of statements and portals, which clients of a sandbox choose without knowing of each other.
    pub(super) prefix: String,
    pub(super) statements: HashMap<Vec<u8>, Arc<Prepared>>,
    /// Those of the transaction under way, or of the batch.
    pub(super) portals: HashMap<Vec<u8>, Portal>,
    /// The unnamed statement was lost to something that the relay asked of the server.
    pub(super) unnamed_gone: bool,
    /// The settings that the transaction under way has set for itself, and what they were before.
    pub(super) locals: Vec<(String, String)>,
    /// The last statement's CommandComplete, which is not told before it is certain.
    pub(super) held: Option<Vec<u8>>,
    /// The client is not told anything any more.
    pub(super) muted: bool,
    /// Messages came that belong to a COPY which is over: the Sync behind them asks for no sign of life.
    pub(super) stray: bool,
}

impl Drop for Conversation {
    fn drop(&mut self) {
        if let (Some(common), Some(key)) = (&self.shared.sandbox, self.key) {
            let names = self
                .statements
                .keys()
                .filter(|name| !name.is_empty())
                .map(|name| prefixed(&self.prefix, name));
            lock(&common.orphans).extend(names);
            lock(&common.sessions).remove(&key);
            common.changed.notify_waiters();
        }
    }
}

pub(super) fn prefixed(prefix: &str, name: &[u8]) -> Vec<u8> {
    if name.is_empty() { Vec::new() } else { [prefix.as_bytes(), name].concat() }
}

impl Conversation {
    async fn start(&mut self, message: &[u8]) -> Result<(), End> {
        if let Some(delay) = self.shared.faults.on_acquire() {
            self.pause(delay).await?;
        }
        if self.key.is_some() { self.greet(message) } else { self.log_in(message).await }
    }

    /// Passes start-up and authentication on.
    async fn log_in(&mut self, message: &[u8]) -> Result<(), End> {
        let reached = Address::reach(&self.shared.target).await;
        let (address, stream) = reached.map_err(|error| End::Backend(format!("no server: {error}")))?;
        let backend = Arc::new(AsyncMutex::new(Backend::new(stream, address)));
        let mut backend = backend.lock_owned().await;
        backend.busy = true;
        backend.peer.push(message);
        self.lease = Some(backend);
        loop {
            while let Some(frame) = self.client_frame()? {
                self.backend()?.peer.push(frame.bytes());
            }
            while let Some(frame) = self.backend_frame()? {
                self.tell(frame.bytes());
                if frame.tag() == b'Z' {
                    return Ok(());
                }
            }
            self.step().await?;
        }
    }

    /// Answers a start-up message as the server would whose session all share.
    fn greet(&mut self, message: &[u8]) -> Result<(), End> {
        self.check_broken()?;
        let shared = Arc::clone(&self.shared);
        let Some(common) = &shared.sandbox else { return Ok(()) };
        let refuse = |message: String| {
            Err(Report::new(
                "28000",
                message,
                "A sandbox has the role and the database of the URL it was started with.",
            ))
        };
        let mut user = None;
        let mut database = None;
        let mut rest = message.get(8..).unwrap_or_default();
        while let Some((name @ [_, ..], after)) = split_zero(rest) {
            let Some((value, after)) = split_zero(after) else { break };
            match name {
                b"user" => user = Some(String::from_utf8_lossy(value)),
                b"database" => database = Some(String::from_utf8_lossy(value)),
                _ => {}
            }
            rest = after;
        }
        let user = user.unwrap_or_default();
        let checked = if user != common.login.user {
            refuse(format!(
                "the sessions of this sandbox are those of role {:?}, not {user:?}",
                common.login.user
            ))
        } else {
            match database.unwrap_or(user) {
                name if name == common.login.database => Ok(()),
                name => {
                    let own = &common.login.database;
                    refuse(format!("the sessions of this sandbox are in database {own:?}, not {name:?}"))
                }
            }
        };
        if let Err(report) = checked {
            report.put(self.client.outbox(), b'E', "FATAL");
            return Err(End::Client);
        }
        let parameters: Vec<u8> = lock(&common.parameters).values().flatten().copied().collect();
        let out = self.client.outbox();
        put(out, b'R', &[&0i32.to_be_bytes()]);
        out.extend_from_slice(&parameters);
        put(out, b'K', &[&common.process_id, &self.key.unwrap_or_default().to_be_bytes()]);
        put(out, b'Z', &[b"I"]);
        Ok(())
    }

    /// The client goes, or is sent away: whatever it was in the middle of is undone.
    async fn leave(&mut self, end: End) {
        let shared = Arc::clone(&self.shared);
        match (end, &shared.sandbox) {
            (End::Backend(reason), sandbox) => {
                let told = self.lease.take().is_some_and(|backend| backend.told_fatal());
                let message = match sandbox {
                    Some(common) => {
                        let reason = lock(&common.broken).get_or_insert(reason).clone();
                        Some(format!("the sandbox is broken: {reason}"))
                    }
                    None => (!told).then_some(reason),
                };
                if let (Some(message), false) = (message, self.muted) {
                    Report::new("08006", message, "").put(self.client.outbox(), b'E', "FATAL");
                }
                let _ = timeout(FAREWELL_LIMIT, self.client.close()).await;
            }
            (End::Client | End::Cut, _) => {
                let _ = timeout(FAREWELL_LIMIT, self.client.close()).await;
                self.undo().await;
            }
        }
    }

    pub(super) fn tell(&mut self, bytes: &[u8]) {
        if !self.muted {
            self.client.push(bytes);
        }
    }

    pub(super) fn report(&mut self, report: &Report) {
        if !self.muted {
            report.put(self.client.outbox(), b'E', "ERROR");
        }
    }

    pub(super) fn notice(&mut self, code: &'static str, message: &str) {
        if !self.muted {
            Report::new(code, message, "").put(self.client.outbox(), b'N', "WARNING");
        }
    }

    /// A statement is done; told when the next is, or when the batch is.
    pub(super) fn complete(&mut self, tag: &str) {
        let mut frame = bytes::BytesMut::new();
        put(&mut frame, b'C', &[tag.as_bytes(), b"\0"]);
        self.hold(&frame);
    }

    pub(super) fn hold(&mut self, frame: &[u8]) {
        self.tell_held();
        self.held = Some(frame.to_vec());
    }

    pub(super) fn tell_held(&mut self) {
        if let Some(frame) = self.held.take() {
            self.tell(&frame);
        }
    }

    pub(super) fn backend(&mut self) -> Result<&mut Backend, End> {
        self.lease.as_deref_mut().ok_or_else(|| End::Backend("it was not held".to_owned()))
    }

    pub(super) fn client_frame(&mut self) -> Result<Option<Frame>, End> {
        self.client.pop().map_err(|_| End::Client)
    }

    /// What the server has said, if there is room to pass it on.
    pub(super) fn backend_frame(&mut self) -> Result<Option<Frame>, End> {
        if !self.client.has_room() {
            return Ok(None);
        }
        let backend = self.backend()?;
        backend.pop().map_err(|error| End::Backend(backend.why_gone(&error)))
    }

    /// Waits until some bytes have moved, or a cancel request was dealt with.
    pub(super) async fn step(&mut self) -> Result<(), End> {
        let Self { client, lease, cancels, .. } = self;
        let room = client.has_room();
        let peer = lease.as_deref_mut().map(|backend| &mut backend.peer);
        let from_backend = async {
            match peer {
                Some(peer) => peer.step(room).await,
                None => std::future::pending().await,
            }
        };
        let mut from_client = None;
        let mut cancelled = None;
        tokio::select! {
            result = client.step(true) => from_client = Some(result),
            result = from_backend => {
                let Err(error) = result else { return Ok(()) };
                return Err(End::Backend(self.backend()?.why_gone(&error)));
            }
            Some(done) = cancels.recv() => cancelled = Some(done),
        }
        if let Some(result) = from_client {
            self.after_client_moved(result)?;
        }
        if let Some(done) = cancelled {
            if let Some(backend) = self.lease.as_deref_mut().filter(|backend| backend.busy) {
                // Nothing else is sent before it is done, so it can hit nobody else.
                let _ = backend.cancel().await;
            }
            // The canceller may have stopped waiting.
            let _ = done.send(());
        }
        Ok(())
    }

    pub(super) fn after_client_moved(&mut self, result: std::io::Result<()>) -> Result<(), End> {
        let farewell = self.client.said_farewell();
        if result.is_err() && farewell {
            // It does not want to know, but what it asked for is to be done.
            self.muted = true;
            self.client.forget_outbox();
        } else if result.is_err() || self.client.has_ended() && !farewell {
            return Err(End::Client);
        }
        Ok(())
    }

    /// Waits for the client's next message; meanwhile passes on what the server has to say.
    pub(super) async fn next(&mut self) -> Result<Frame, End> {
        loop {
            if let Some(frame) = self.client_frame()? {
                return Ok(frame);
            }
            if self.client.has_ended() {
                return Err(End::Client);
            }
            if self.lease.is_some() {
                while let Some(frame) = self.backend_frame()? {
                    self.tell(frame.bytes());
                }
            }
            self.step().await?;
        }
    }

    /// Waits a while, unless the client goes.
    pub(super) async fn pause(&mut self, delay: Duration) -> Result<(), End> {
        let mut over = std::pin::pin!(sleep(delay));
        loop {
            tokio::select! {
                () = &mut over => return Ok(()),
                stepped = self.step() => stepped?,
            }
        }
    }

    /// Has the server do something of the relay's own.
    pub(super) async fn run(&mut self, sql: &str) -> Result<Outcome, End> {
        self.unnamed_gone = true;
        let backend = self.backend()?;
        let outcome = backend.run(sql).await.map_err(|error| End::Backend(backend.why_gone(&error)))?;
        self.check_status()?;
        self.tell(&outcome.asides);
        Ok(outcome)
    }

    /// After a request that was passed on.
    pub(super) async fn at_rest(&mut self) -> Result<(), End> {
        let backend = self.backend()?;
        if backend.cancelled {
            self.unnamed_gone = true;
            let backend = self.backend()?;
            backend.fence().await.map_err(|error| End::Backend(backend.why_gone(&error)))?;
        }
        self.check_status()
    }

    fn check_status(&mut self) -> Result<(), End> {
        if self.key.is_some() && self.backend()?.status == b'I' {
            return Err(End::Backend("its transaction has ended".to_owned()));
        }
        Ok(())
    }

    pub(super) fn check_broken(&self) -> Result<(), End> {
        let broken = self.shared.sandbox.as_ref().and_then(|common| lock(&common.broken).clone());
        broken.map_or(Ok(()), |reason| Err(End::Backend(reason)))
    }

    async fn go_on(&mut self) -> Result<Infallible, End> {
        loop {
            let frame = self.next().await?;
            self.check_broken()?;
            match frame.tag() {
                b'Q' if self.key.is_some() => self.simple(&frame).await?,
                b'Q' => self.simple_by_proxy(&frame).await?,
                b'P' | b'B' | b'D' | b'E' | b'C' | b'H' | b'S' => self.extended(frame).await?,
                b'F' => self.function_call(&frame).await?,
                // Left over from a COPY that failed (manual, chapter 54.2.6).
                b'd' | b'c' | b'f' => {
                    self.stray = true;
                    continue;
                }
                // A farewell, or nothing that is understood here.
                _ => return Err(End::Client),
            }
            self.ready()?;
        }
    }

    /// The end of a batch: says where the client's session stands, and lets others have the backend if it can.
    fn ready(&mut self) -> Result<(), End> {
        self.tell_held();
        self.stray = false;
        let status = match self.block {
            Block::Idle | Block::Implicit => b'I',
            Block::Begun { .. } => b'T',
            Block::Aborted => b'E',
            Block::Explicit => self.backend()?.status,
        };
        let status = if self.key.is_some() { status } else { self.backend()?.status };
        if status == b'I' {
            self.portals.clear();
        }
        if !self.muted {
            put(self.client.outbox(), b'Z', &[&[status]]);
        }
        if let (Some(common), Some(key)) = (&self.shared.sandbox, self.key) {
            if self.block != Block::Explicit {
                self.lease = None;
            }
            if let Some(entry) = lock(&common.sessions).get_mut(&key) {
                entry.in_transaction = status != b'I';
            }
            common.changed.notify_waiters();
        }
        // A COMMIT whose answer is to be lost has been carried out.
        if self.muted && !self.client.said_farewell() { Err(End::Cut) } else { Ok(()) }
    }
}
