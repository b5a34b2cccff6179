//! One client's conversation with the relay, from its start-up to its last answer.
//!
//! In a sandbox, what the client takes for its transaction is a savepoint of the shared one ([`Block`]); before a proxy,
//! the client has a connection of its own, and everything passes as it is. Either way requests are taken one batch at a
//! time: a simple query, or messages of the extended protocol up to Sync (PostgreSQL manual, chapter 54.2).

use std::{collections::HashMap, convert::Infallible, sync::Arc, time::Duration};

use postgres_protocol::escape::escape_literal;
use tokio::{
    net::TcpStream,
    sync::{Mutex as AsyncMutex, OwnedMutexGuard, mpsc, oneshot},
    time::{sleep, timeout},
};
use tokio_postgres::error::SqlState;

use super::{
    backend::{Address, Backend, Outcome, lock},
    faults::AtCommit,
    frames::{Frame, Peer, Report, put, split_zero},
    relay::{Common, Entry, Shared},
    sql::{self, Kind, Modes, SqlStatement},
};

/// How long a client that is told goodbye may take to read it.
const FAREWELL_LIMIT: Duration = Duration::from_secs(1);

/// How long a cancel request waits for its session to take notice; one that is committing does not.
const CANCEL_LIMIT: Duration = Duration::from_secs(10);

/// The codes that stand for a version in a start-up message (manual, chapter 54.7).
const CANCEL_REQUEST: i32 = 80_877_102;
const SSL_REQUEST: i32 = 80_877_103;
const GSS_REQUEST: i32 = 80_877_104;

/// What the outer transaction's savepoint is called.
const SAVEPOINT: &str = "pg_session_sandbox";

/// What COMMIT would do beside making it last: deferred constraints are checked, and are as they were declared again;
/// cursors are closed.
///
/// First all are deferred, then those that are not by default are named: so it is tables made in the same transaction
/// that are right, which deferring is mostly used with.
const CONCLUDE: &str = "\
SET CONSTRAINTS ALL IMMEDIATE;SET CONSTRAINTS ALL DEFERRED;\
DO $$DECLARE immediate text; cursors text[]; name text; BEGIN \
SELECT string_agg(DISTINCT format('%I.%I', n.nspname, c.conname), ', ') INTO immediate \
FROM pg_catalog.pg_constraint c JOIN pg_catalog.pg_namespace n ON n.oid = c.connamespace \
WHERE c.condeferrable AND NOT c.condeferred; \
IF immediate IS NOT NULL THEN EXECUTE 'SET CONSTRAINTS ' || immediate || ' IMMEDIATE'; END IF; \
SELECT array_agg(c.name) INTO cursors FROM pg_catalog.pg_cursors c WHERE c.name <> '' AND NOT c.is_holdable; \
FOREACH name IN ARRAY coalesce(cursors, '{}') LOOP EXECUTE format('CLOSE %I', name); END LOOP; \
END$$;";

/// What `pg-session` sends when a connection is made, answered by the relay: it concerns the real connection.
const SET_UP: &str = "SET client_connection_check_interval = '1s'";

/// How its reset of a returned session begins.
const RESET: &str = "SET SESSION AUTHORIZATION DEFAULT; RESET ALL; CLOSE ALL; UNLISTEN *;";

/// How the queries begin by which the driver looks up types.
const TYPE_LOOKUPS: [&str; 3] = [
    "SELECT t.typname, t.typtype, t.typelem,",
    "SELECT enumlabel\nFROM pg_catalog.pg_enum",
    "SELECT attname, atttypid\nFROM pg_catalog.pg_attribute",
];

/// Where a session of a sandbox stands.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Block {
    /// Outside of a transaction.
    Idle,
    /// BEGIN was answered, and nothing done since: the backend is taken for the first statement. So BEGIN never fails
    /// for want of it, and nothing that was sent along with BEGIN can run outside of its transaction.
    Begun { read_only: Option<bool> },
    /// A savepoint holds one batch, which commits by itself.
    Implicit,
    /// A savepoint holds the client's transaction.
    Explicit,
    /// The client's transaction failed before it had a savepoint.
    Aborted,
}

/// Why a conversation is over.
#[derive(Debug)]
enum End {
    /// The client has gone.
    Client,
    /// A fault: both ends are cut.
    Cut,
    /// The server's connection cannot be used any more: the reason.
    Backend(String),
}

/// What is known of a prepared statement.
#[derive(Debug, Default)]
struct Prepared {
    local_settings: Vec<String>,
    /// The driver's own, for looking up types.
    own: bool,
}

/// A batch of the extended protocol, on its way to the server.
#[derive(Default)]
struct Batch {
    /// More of it is to come from the client.
    open: bool,
    /// The statement bound last is the driver's own.
    own: bool,
    executed: bool,
    /// What it fails with instead of going on.
    inject: Option<Report>,
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

struct Conversation {
    shared: Arc<Shared>,
    client: Peer,
    /// The server's connection, while it is this client's.
    lease: Option<OwnedMutexGuard<Backend>>,
    cancels: mpsc::UnboundedReceiver<oneshot::Sender<()>>,
    /// In a sandbox, the secret key of the session.
    key: Option<i32>,
    block: Block,
    /// Before the names of statements and portals, which clients of a sandbox choose without knowing of each other.
    prefix: String,
    statements: HashMap<Vec<u8>, Prepared>,
    /// The settings that the transaction under way has set for itself, and what they were before.
    locals: Vec<(String, String)>,
    /// The last statement's CommandComplete, which is not told before it is certain.
    held: Option<Vec<u8>>,
    /// The client is not told anything any more.
    muted: bool,
    /// Messages came that belong to a COPY which is over: the Sync behind them asks for no sign of life.
    stray: bool,
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

fn prefixed(prefix: &str, name: &[u8]) -> Vec<u8> {
    if name.is_empty() { Vec::new() } else { [prefix.as_bytes(), name].concat() }
}

impl Conversation {
    // ---- the client's start and end

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

    /// Brings the sandbox's connection to rest and to where it was before this client took it.
    async fn undo(&mut self) {
        let (Some(common), Some(backend)) = (&self.shared.sandbox, self.lease.as_deref_mut()) else { return };
        let undone = async {
            backend.settle().await?;
            if matches!(self.block, Block::Implicit | Block::Explicit) {
                backend.run(&roll_back_sql()).await?;
            }
            Ok::<_, std::io::Error>(())
        };
        if let Err(error) = undone.await {
            let reason = backend.why_gone(&error);
            lock(&common.broken).get_or_insert(reason);
        }
    }

    // ---- bytes in and out

    fn tell(&mut self, bytes: &[u8]) {
        if !self.muted {
            self.client.push(bytes);
        }
    }

    fn report(&mut self, report: &Report) {
        if !self.muted {
            report.put(self.client.outbox(), b'E', "ERROR");
        }
    }

    fn notice(&mut self, code: &'static str, message: &str) {
        if !self.muted {
            Report::new(code, message, "").put(self.client.outbox(), b'N', "WARNING");
        }
    }

    /// A statement is done; told when the next is, or when the batch is.
    fn complete(&mut self, tag: &str) {
        let mut frame = bytes::BytesMut::new();
        put(&mut frame, b'C', &[tag.as_bytes(), b"\0"]);
        self.hold(&frame);
    }

    fn hold(&mut self, frame: &[u8]) {
        self.tell_held();
        self.held = Some(frame.to_vec());
    }

    fn tell_held(&mut self) {
        if let Some(frame) = self.held.take() {
            self.tell(&frame);
        }
    }

    fn backend(&mut self) -> Result<&mut Backend, End> {
        self.lease.as_deref_mut().ok_or_else(|| End::Backend("it was not held".to_owned()))
    }

    fn client_frame(&mut self) -> Result<Option<Frame>, End> {
        self.client.pop().map_err(|_| End::Client)
    }

    /// What the server has said, if there is room to pass it on.
    fn backend_frame(&mut self) -> Result<Option<Frame>, End> {
        if !self.client.has_room() {
            return Ok(None);
        }
        let backend = self.backend()?;
        backend.pop().map_err(|error| End::Backend(backend.why_gone(&error)))
    }

    /// Waits until some bytes have moved, or a cancel request was dealt with.
    async fn step(&mut self) -> Result<(), End> {
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

    fn after_client_moved(&mut self, result: std::io::Result<()>) -> Result<(), End> {
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
    async fn next(&mut self) -> Result<Frame, End> {
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
    async fn pause(&mut self, delay: Duration) -> Result<(), End> {
        let mut over = std::pin::pin!(sleep(delay));
        loop {
            tokio::select! {
                () = &mut over => return Ok(()),
                stepped = self.step() => stepped?,
            }
        }
    }

    /// Has the server do something of the relay's own.
    async fn run(&mut self, sql: &str) -> Result<Outcome, End> {
        let backend = self.backend()?;
        let outcome = backend.run(sql).await.map_err(|error| End::Backend(backend.why_gone(&error)))?;
        self.check_status()?;
        self.tell(&outcome.asides);
        Ok(outcome)
    }

    /// After a request that was passed on.
    async fn at_rest(&mut self) -> Result<(), End> {
        let backend = self.backend()?;
        if backend.cancelled {
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

    fn check_broken(&self) -> Result<(), End> {
        let broken = self.shared.sandbox.as_ref().and_then(|common| lock(&common.broken).clone());
        broken.map_or(Ok(()), |reason| Err(End::Backend(reason)))
    }

    // ---- batches

    async fn go_on(&mut self) -> Result<Infallible, End> {
        loop {
            let frame = self.next().await?;
            self.check_broken()?;
            match frame.tag() {
                b'Q' if self.key.is_some() => self.simple(&frame).await?,
                b'Q' => self.simple_by_proxy(&frame).await?,
                b'P' | b'B' | b'D' | b'E' | b'C' | b'H' | b'S' => self.extended(frame).await?,
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

    /// A simple query, one statement at a time.
    async fn simple(&mut self, frame: &Frame) -> Result<(), End> {
        let sql = frame.body().strip_suffix(b"\0").unwrap_or(frame.body());
        let Ok(sql) = std::str::from_utf8(sql) else {
            return self.fail(&Report::new("22021", "the sandbox reads SQL as UTF-8 only", "")).await;
        };
        let statements = sql::split(sql);
        if statements.is_empty() {
            if !self.muted {
                put(self.client.outbox(), b'I', &[]);
            }
            return Ok(());
        }
        if sql == SET_UP {
            self.complete("SET");
            return Ok(());
        }
        let counted = !sql.starts_with(RESET);
        for statement in &statements {
            self.tell_held();
            if !self.statement(statement, counted).await? {
                break;
            }
        }
        self.conclude_implicit().await
    }

    /// A statement of a simple query; whether the next may be run.
    async fn statement(&mut self, statement: &SqlStatement<'_>, counted: bool) -> Result<bool, End> {
        match statement.kind() {
            Kind::Begin { start, modes } => {
                self.shared.faults.on_begin();
                self.begin(if start { "START TRANSACTION" } else { "BEGIN" }, modes).await
            }
            Kind::Commit => match self.shared.faults.on_commit() {
                Some(AtCommit::CutBefore) => Err(End::Cut),
                Some(AtCommit::Fail(state)) => {
                    self.roll_back().await?;
                    self.held = None;
                    self.report(&injected(&state));
                    Ok(false)
                }
                Some(AtCommit::LoseAnswer) => {
                    self.muted = true;
                    self.commit().await
                }
                None => self.commit().await,
            },
            Kind::Rollback => {
                if self.block == Block::Idle {
                    self.notice("25P01", "there is no transaction in progress");
                }
                self.roll_back().await?;
                self.complete("ROLLBACK");
                Ok(true)
            }
            Kind::Savepoint(name) if matches!(self.block, Block::Idle | Block::Implicit) => {
                let message = format!("{name} can only be used in transaction blocks");
                self.fail(&Report::new("25P01", message, "")).await?;
                Ok(false)
            }
            Kind::Savepoint(_) => self.pass_on(statement, false).await,
            Kind::SetTransaction(modes) => self.set_transaction(modes).await,
            Kind::Refused(what) => {
                self.fail(&refused(what)).await?;
                Ok(false)
            }
            Kind::Other => self.pass_on(statement, counted && !statement.is_local_setting()).await,
        }
    }

    async fn pass_on(&mut self, statement: &SqlStatement<'_>, counted: bool) -> Result<bool, End> {
        if let Err(report) = self.enter().await? {
            self.fail(&report).await?;
            return Ok(false);
        }
        if let Some(state) = counted.then(|| self.shared.faults.on_statement()).flatten() {
            self.raise(&injected(&state)).await?;
            return Ok(false);
        }
        self.remember(statement.local_settings()).await?;
        self.backend()?.send_query(statement.text.as_bytes());
        self.exchange(true).await
    }

    /// Passes the server's answer to a simple query on, up to ReadyForQuery, and CopyData the other way; whether all
    /// went well.
    async fn exchange(&mut self, hold: bool) -> Result<bool, End> {
        let mut well = true;
        loop {
            while let Some(frame) = self.backend_frame()? {
                match frame.tag() {
                    b'Z' => {
                        self.at_rest().await?;
                        return Ok(well);
                    }
                    b'C' | b'I' if hold => self.hold(frame.bytes()),
                    tag => {
                        well &= tag != b'E';
                        self.tell(frame.bytes());
                    }
                }
            }
            self.feed_copy()?;
            self.step().await?;
        }
    }

    /// While the server waits for CopyData, passes it on; Sync and Flush are ignored then.
    fn feed_copy(&mut self) -> Result<(), End> {
        while self.lease.as_ref().is_some_and(|backend| backend.copying && backend.peer.has_room()) {
            let Some(frame) = self.client_frame()? else { break };
            let backend = self.backend()?;
            match frame.tag() {
                b'd' => backend.peer.push(frame.bytes()),
                b'c' | b'f' => {
                    backend.peer.push(frame.bytes());
                    backend.copying = false;
                }
                b'H' | b'S' => {}
                _ => return Err(End::Client),
            }
        }
        Ok(())
    }

    /// A batch of the extended protocol, up to its Sync.
    async fn extended(&mut self, first: Frame) -> Result<(), End> {
        let alone = first.tag() == b'S';
        if alone && !self.stray {
            if let Some(delay) = self.shared.faults.on_acquire() {
                self.pause(delay).await?;
            }
        }
        if self.key.is_some() {
            if alone {
                return Ok(());
            }
            if let Err(report) = self.enter().await? {
                self.fail(&report).await?;
                return self.skip_to_sync().await;
            }
            let names = self.local_settings_of(&first);
            self.remember(names).await?;
        }
        let mut batch = Batch { open: true, ..Batch::default() };
        let mut next = Some(first);
        let mut failed = false;
        'batch: loop {
            while let Some(frame) = self.backend_frame()? {
                match frame.tag() {
                    b'Z' => break 'batch,
                    tag => {
                        failed |= tag == b'E';
                        // The Sync that came before CopyData was ignored; another follows.
                        batch.open |= tag == b'G';
                        self.tell(frame.bytes());
                    }
                }
            }
            self.feed_copy()?;
            while batch.open && !self.backend()?.copying && self.backend()?.peer.has_room() {
                let frame = match next.take() {
                    Some(frame) => frame,
                    None => match self.client_frame()? {
                        Some(frame) => frame,
                        None => break,
                    },
                };
                self.forward(&frame, &mut batch)?;
                if batch.inject.is_some() {
                    // No more of it is sent; first everything before is answered.
                    batch.open = false;
                    if !self.backend()?.busy {
                        break 'batch;
                    }
                    self.backend()?.send_sync();
                }
            }
            self.step().await?;
        }
        self.at_rest().await?;
        if let Some(report) = batch.inject {
            if !failed {
                self.raise(&report).await?;
            }
            self.skip_to_sync().await?;
        }
        if self.key.is_some() { self.conclude_implicit().await } else { Ok(()) }
    }

    /// Passes a message of a batch on to the server, unless the batch is to fail here.
    fn forward(&mut self, frame: &Frame, batch: &mut Batch) -> Result<(), End> {
        let body = frame.body();
        let string = |bytes| split_zero(bytes).ok_or(End::Client);
        let name = |name: &[u8]| prefixed(&self.prefix, name);
        let renamed: Vec<u8>;
        match frame.tag() {
            b'P' => {
                let (statement, rest) = string(body)?;
                let (text, _) = string(rest)?;
                let text = String::from_utf8_lossy(text);
                let parts = sql::split(&text);
                if let Some(report) = parts.iter().filter(|_| self.key.is_some()).find_map(refuse_prepared) {
                    batch.inject = Some(report);
                    return Ok(());
                }
                let local_settings = parts.iter().flat_map(SqlStatement::local_settings).collect();
                let own = TYPE_LOOKUPS.iter().any(|lookup| text.starts_with(lookup));
                renamed = [&name(statement), &b"\0"[..], rest].concat();
                self.statements.insert(statement.to_vec(), Prepared { local_settings, own });
            }
            b'B' => {
                let (portal, rest) = string(body)?;
                let (statement, rest) = string(rest)?;
                batch.own = self.statements.get(statement).is_some_and(|prepared| prepared.own);
                renamed = [&name(portal), &b"\0"[..], &name(statement), b"\0", rest].concat();
            }
            tag @ (b'C' | b'D') => {
                let (kind, rest) = body.split_first().ok_or(End::Client)?;
                let (named, _) = string(rest)?;
                renamed = [&[*kind][..], &name(named), b"\0"].concat();
                if (tag, *kind) == (b'C', b'S') {
                    self.statements.remove(named);
                }
            }
            b'E' => {
                let (portal, rest) = string(body)?;
                renamed = [&name(portal), &b"\0"[..], rest].concat();
                if !batch.own && !std::mem::replace(&mut batch.executed, true) {
                    if let Some(state) = self.shared.faults.on_statement() {
                        batch.inject = Some(injected(&state));
                        return Ok(());
                    }
                }
            }
            b'S' => {
                batch.open = false;
                self.backend()?.send_sync();
                return Ok(());
            }
            b'H' => renamed = Vec::new(),
            _ => return Err(End::Client),
        }
        let backend = self.backend()?;
        backend.busy = true;
        backend.unsynced = true;
        put(backend.peer.outbox(), frame.tag(), &[&renamed]);
        Ok(())
    }

    /// After an error, the messages up to Sync are skipped.
    async fn skip_to_sync(&mut self) -> Result<(), End> {
        while self.next().await?.tag() != b'S' {}
        Ok(())
    }

    /// A simple query on a connection of the client's own: passed on whole, with what is to fail put in.
    async fn simple_by_proxy(&mut self, frame: &Frame) -> Result<(), End> {
        let sql = frame.body().strip_suffix(b"\0").unwrap_or(frame.body());
        let mut to_send = sql.to_vec();
        if let Ok(sql) = std::str::from_utf8(sql) {
            let counted = sql != SET_UP && !sql.starts_with(RESET);
            for statement in sql::split(sql) {
                let failure = match statement.kind() {
                    Kind::Begin { .. } => {
                        self.shared.faults.on_begin();
                        None
                    }
                    Kind::Commit => match self.shared.faults.on_commit() {
                        Some(AtCommit::CutBefore) => return Err(End::Cut),
                        Some(AtCommit::Fail(state)) => Some(("ROLLBACK;", state)),
                        Some(AtCommit::LoseAnswer) => {
                            self.muted = true;
                            None
                        }
                        None => None,
                    },
                    Kind::Other if counted && !statement.is_local_setting() => {
                        self.shared.faults.on_statement().map(|state| ("", state))
                    }
                    _ => None,
                };
                if let Some((first, state)) = failure {
                    to_send =
                        format!("{}{first}{}", &sql[..statement.start], raise_sql(&injected(&state))).into();
                    break;
                }
            }
        }
        self.backend()?.send_query(&to_send);
        self.exchange(false).await.map(drop)
    }

    // ---- transactions of a sandbox

    /// Makes sure of a savepoint to work in, for a transaction or for this batch; or says why there can be none.
    async fn enter(&mut self) -> Result<Result<(), Report>, End> {
        let (block, read_only) = match self.block {
            Block::Explicit | Block::Implicit => return Ok(Ok(())),
            Block::Aborted => return Ok(Err(aborted())),
            Block::Begun { read_only } => (Block::Explicit, read_only),
            Block::Idle => (Block::Implicit, None),
        };
        let shared = Arc::clone(&self.shared);
        if let (Some(common), None) = (&shared.sandbox, &self.lease) {
            if let Err(report) = self.take_backend(common).await? {
                return Ok(Err(report));
            }
            self.check_broken()?;
            let orphans = std::mem::take(&mut *lock(&common.orphans));
            if !orphans.is_empty() {
                let backend = self.backend()?;
                let closed = backend.close_statements(&orphans).await;
                closed.map_err(|error| End::Backend(backend.why_gone(&error)))?;
            }
        }
        let access = read_only.map_or("", access_mode);
        if self.run(&format!("SAVEPOINT {SAVEPOINT};{access}")).await?.failed {
            return Err(End::Backend("no savepoint could be set".to_owned()));
        }
        self.block = block;
        self.locals.clear();
        Ok(Ok(()))
    }

    /// Waits for its turn, in order and not for ever.
    async fn take_backend(&mut self, common: &Common) -> Result<Result<(), Report>, End> {
        let mut turn = std::pin::pin!(Arc::clone(&common.backend).lock_owned());
        let mut over = std::pin::pin!(sleep(common.wait_limit));
        loop {
            tokio::select! {
                biased;
                backend = &mut turn => {
                    self.lease = Some(backend);
                    return Ok(Ok(()));
                }
                () = &mut over => {
                    let message = format!(
                        "the sandbox was busy for {:?}: another of its sessions is in a transaction, or runs a statement",
                        common.wait_limit
                    );
                    let hint = "The sessions of a sandbox share one connection. End the transaction before calling \
                                code that uses another session, or raise the sandbox's wait_limit.";
                    return Ok(Err(Report::new("55P03", message, hint)));
                }
                Some(done) = self.cancels.recv() => {
                    let _ = done.send(());
                    return Ok(Err(Report::new("57014", "canceling statement due to user request", "")));
                }
                moved = self.client.step(true) => self.after_client_moved(moved)?,
            }
        }
    }

    /// Fails the batch: by an error of the server's own where there is something to abort.
    async fn fail(&mut self, report: &Report) -> Result<(), End> {
        match self.block {
            Block::Implicit | Block::Explicit => return self.raise(report).await,
            Block::Begun { .. } => self.block = Block::Aborted,
            Block::Idle | Block::Aborted => {}
        }
        self.report(report);
        Ok(())
    }

    async fn raise(&mut self, report: &Report) -> Result<(), End> {
        self.backend()?.send_query(raise_sql(report).as_bytes());
        self.exchange(false).await.map(drop)
    }

    /// Whether the server refuses everything but the end of the transaction, or of the batch.
    fn has_failed(&self) -> bool {
        self.lease.as_ref().is_some_and(|backend| backend.status == b'E')
    }

    async fn begin(&mut self, tag: &str, modes: Modes) -> Result<bool, End> {
        if self.has_failed() || self.block == Block::Aborted {
            self.fail(&aborted()).await?;
            return Ok(false);
        }
        if let Some(report) = self.too_strong(modes) {
            self.fail(&report).await?;
            return Ok(false);
        }
        match self.block {
            Block::Idle => self.block = Block::Begun { read_only: modes.read_only },
            Block::Implicit => {
                // The statements before it in the same query become part of the transaction, as on a server.
                self.block = Block::Explicit;
                if let Some(read_only) = modes.read_only {
                    self.run(access_mode(read_only)).await?;
                }
            }
            _ => self.notice("25001", "there is already a transaction in progress"),
        }
        self.complete(tag);
        Ok(true)
    }

    async fn set_transaction(&mut self, modes: Modes) -> Result<bool, End> {
        if let Some(report) = self.too_strong(modes) {
            self.fail(&report).await?;
            return Ok(false);
        }
        match (self.block, modes.read_only) {
            (Block::Idle | Block::Implicit, _) => {
                self.notice("25P01", "SET TRANSACTION can only be used in transaction blocks");
            }
            (Block::Begun { read_only }, mode) => self.block = Block::Begun { read_only: mode.or(read_only) },
            (Block::Aborted, _) => {
                self.fail(&aborted()).await?;
                return Ok(false);
            }
            (Block::Explicit, mode) => {
                let sql = mode.map_or("SET TRANSACTION NOT DEFERRABLE", access_mode);
                self.backend()?.send_query(sql.as_bytes());
                return self.exchange(true).await;
            }
        }
        self.complete("SET");
        Ok(true)
    }

    fn too_strong(&self, modes: Modes) -> Option<Report> {
        let own = self.shared.sandbox.as_ref()?.level;
        let asked = modes.level.filter(|asked| *asked > own)?;
        let message =
            format!("a sandbox that is {} cannot run a transaction that is {}", own.name(), asked.name());
        let hint = "Start it with Sandbox::builder(url).isolation_level(..) of that level; SERIALIZABLE, its default, \
                    grants every one.";
        Some(Report::new("0A000", message, hint))
    }

    async fn commit(&mut self) -> Result<bool, End> {
        let mut tag = "COMMIT";
        let failed = self.has_failed();
        match self.block {
            Block::Idle => self.notice("25P01", "there is no transaction in progress"),
            Block::Begun { .. } => self.block = Block::Idle,
            Block::Aborted => {
                self.block = Block::Idle;
                tag = "ROLLBACK";
            }
            Block::Explicit if failed => {
                self.roll_back().await?;
                tag = "ROLLBACK";
            }
            Block::Explicit | Block::Implicit => {
                if !self.conclude().await? {
                    return Ok(false);
                }
            }
        }
        self.complete(tag);
        Ok(true)
    }

    /// Does what COMMIT would do, and releases the savepoint. On an error, which the client is told, rolls back to it.
    async fn conclude(&mut self) -> Result<bool, End> {
        let mut sql = CONCLUDE.to_owned();
        for (name, value) in std::mem::take(&mut self.locals) {
            let (name, value) = (escape_literal(&name), escape_literal(&value));
            sql.push_str(&format!("SELECT pg_catalog.set_config({name},{value},true);"));
        }
        sql.push_str(&format!("RELEASE {SAVEPOINT}"));
        let outcome = self.run(&sql).await?;
        if outcome.failed {
            self.held = None;
            self.tell(&outcome.error);
            self.roll_back().await?;
            return Ok(false);
        }
        self.block = Block::Idle;
        Ok(true)
    }

    /// Rolls back to before the transaction or batch, if there is one.
    async fn roll_back(&mut self) -> Result<(), End> {
        if matches!(self.block, Block::Implicit | Block::Explicit) && self.run(&roll_back_sql()).await?.failed
        {
            return Err(End::Backend("its savepoint is gone".to_owned()));
        }
        self.locals.clear();
        self.block = Block::Idle;
        Ok(())
    }

    /// A batch outside of a transaction commits by itself.
    async fn conclude_implicit(&mut self) -> Result<(), End> {
        if self.block == Block::Implicit {
            if self.has_failed() {
                self.held = None;
                self.roll_back().await?;
            } else {
                self.conclude().await?;
            }
        }
        Ok(())
    }

    /// Remembers what settings are before the transaction sets them for itself. What is released goes on in the outer
    /// transaction, and they with it.
    async fn remember(&mut self, mut names: Vec<String>) -> Result<(), End> {
        names.retain(|name| self.locals.iter().all(|(known, _)| known != name));
        if names.is_empty() || self.has_failed() {
            return Ok(());
        }
        let settings: Vec<String> = names
            .iter()
            .map(|name| format!("pg_catalog.current_setting({},true)", escape_literal(name)))
            .collect();
        let outcome = self.run(&format!("SELECT {}", settings.join(","))).await?;
        // One that was never set is empty after a transaction that has set it (manual, chapter 20.16).
        let values = outcome.row.into_iter().map(Option::unwrap_or_default);
        self.locals.extend(names.into_iter().zip(values));
        Ok(())
    }

    /// The settings that the first message of a batch is about to set for the transaction.
    fn local_settings_of(&self, first: &Frame) -> Vec<String> {
        let parts = split_zero(first.body()).and_then(|(_, rest)| split_zero(rest));
        match (first.tag(), parts) {
            (b'P', Some((text, _))) => sql::split(&String::from_utf8_lossy(text))
                .iter()
                .flat_map(SqlStatement::local_settings)
                .collect(),
            (b'B', Some((statement, _))) => self
                .statements
                .get(statement)
                .map(|prepared| prepared.local_settings.clone())
                .unwrap_or_default(),
            _ => Vec::new(),
        }
    }
}

fn roll_back_sql() -> String {
    format!("ROLLBACK TO {SAVEPOINT};RELEASE {SAVEPOINT}")
}

fn access_mode(read_only: bool) -> &'static str {
    if read_only { "SET TRANSACTION READ ONLY" } else { "SET TRANSACTION READ WRITE" }
}

/// An error of the server's own that says what the report says, and aborts what an error aborts.
fn raise_sql(report: &Report) -> String {
    let Report { code, message, hint } = report;
    let [code, message, hint] = [code.as_str(), message, hint].map(escape_literal);
    let body = format!("BEGIN RAISE EXCEPTION USING ERRCODE={code},MESSAGE={message},HINT={hint}; END");
    format!("DO {}", escape_literal(&body))
}

fn injected(state: &SqlState) -> Report {
    Report::new(state.code(), "injected by a test", "")
}

fn aborted() -> Report {
    let message = "current transaction is aborted, commands ignored until end of transaction block";
    Report::new("25P02", message, "")
}

fn refused(what: &str) -> Report {
    let hint = "Its transactions are savepoints of one outer transaction. Use a database of the test's own for this.";
    Report::new("0A000", format!("{what} cannot be used in a sandbox"), hint)
}

/// What cannot be prepared, since it must not reach the server.
fn refuse_prepared(statement: &SqlStatement<'_>) -> Option<Report> {
    let what = match statement.kind() {
        Kind::Other | Kind::Savepoint(_) => return None,
        Kind::SetTransaction(modes) if modes.level.is_none() => return None,
        Kind::Refused(what) => what,
        Kind::Begin { .. } | Kind::Commit | Kind::Rollback | Kind::SetTransaction(_) => "transaction control",
    };
    Some(Report::new(
        "0A000",
        format!("{what} cannot be prepared in a sandbox"),
        "Send it as a simple query: batch_execute, or a transaction of pg-session or tokio-postgres.",
    ))
}
