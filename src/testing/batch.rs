//! Batches, as a client sends them and as they are passed on: a simple query, or messages of the extended protocol up to
//! Sync (PostgreSQL manual, chapter 54.2).

use tokio_postgres::error::SqlState;

use super::{
    block::{Block, raise_sql, refused},
    client::{Conversation, End, Prepared, prefixed},
    faults::AtCommit,
    frames::{Frame, Report, put, split_zero},
    sql::{self, Kind, SqlStatement},
};

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

impl Conversation {
    /// A simple query, one statement at a time.
    pub(super) async fn simple(&mut self, frame: &Frame) -> Result<(), End> {
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
            Kind::SetTransaction(modes) => self.set_transaction(statement, modes).await,
            Kind::Refused(what) => {
                self.fail(&refused(what)).await?;
                Ok(false)
            }
            Kind::Other => self.pass_on(statement, counted && !statement.is_local_setting()).await,
        }
    }

    /// Has the server run a statement, if there is a savepoint to run it in and it is not to fail.
    pub(super) async fn pass_on(&mut self, statement: &SqlStatement<'_>, counted: bool) -> Result<bool, End> {
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
    pub(super) async fn exchange(&mut self, hold: bool) -> Result<bool, End> {
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
    pub(super) async fn extended(&mut self, first: Frame) -> Result<(), End> {
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

    /// A function call, which large objects are reached by.
    pub(super) async fn function_call(&mut self, frame: &Frame) -> Result<(), End> {
        if self.key.is_some() {
            return self.fail(&refused("a function call of the protocol")).await;
        }
        let backend = self.backend()?;
        backend.busy = true;
        backend.peer.push(frame.bytes());
        self.exchange(false).await.map(drop)
    }

    /// A simple query on a connection of the client's own: passed on whole, with what is to fail put in.
    pub(super) async fn simple_by_proxy(&mut self, frame: &Frame) -> Result<(), End> {
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

    /// The settings that the first message of a batch is about to set for the transaction.
    fn local_settings_of(&self, first: &Frame) -> Vec<String> {
        let parts = split_zero(first.body()).and_then(|(_, rest)| split_zero(rest));
        match (first.tag(), parts) {
            (b'P', Some((text, _))) => sql::split(&String::from_utf8_lossy(text))
                .iter()
                .flat_map(SqlStatement::local_settings)
                .collect(),
            // Asking would take the unnamed one away.
            (b'B', Some((statement @ [_, ..], _))) => self
                .statements
                .get(statement)
                .map(|prepared| prepared.local_settings.clone())
                .unwrap_or_default(),
            _ => Vec::new(),
        }
    }
}

fn injected(state: &SqlState) -> Report {
    Report::new(state.code(), "injected by a test", "")
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
