//! Simple queries, each of one or more statements (PostgreSQL manual, chapter 54.2.2), and function calls.

use super::{
    block::{Block, raise_sql, refused},
    client::{Conversation, End},
    control::injected,
    faults::AtCommit,
    frames::{Frame, Report, put},
    sql::{self, Kind, SqlStatement},
};

/// What `pg-session` sends when a connection is made, answered by the relay: it concerns the real connection.
const SET_UP: &str = "SET client_connection_check_interval = '1s'";

/// How its reset of a returned session begins.
const RESET: &str = "SET SESSION AUTHORIZATION DEFAULT; RESET ALL; CLOSE ALL; UNLISTEN *;";

/// What is done with the CommandCompletes of a simple query.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Completions {
    Tell,
    /// The last is not told before it is certain.
    Hold,
    /// One is of the relay's own: that behind so many others.
    TellAllBut(usize),
}

impl Conversation {
    /// A simple query, one statement at a time.
    pub(super) async fn simple(&mut self, frame: &Frame) -> Result<(), End> {
        self.statements.remove(&b""[..]); // as on a server
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
            kind @ (Kind::Begin { .. } | Kind::Commit | Kind::Rollback) => self.control(kind).await,
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
        self.exchange(Completions::Hold).await
    }

    /// Passes the server's answer to a simple query on, up to ReadyForQuery, and CopyData the other way; whether all
    /// went well.
    pub(super) async fn exchange(&mut self, mut completions: Completions) -> Result<bool, End> {
        let mut well = true;
        loop {
            while let Some(frame) = self.backend_frame()? {
                match frame.tag() {
                    b'Z' => {
                        self.at_rest().await?;
                        return Ok(well);
                    }
                    b'C' | b'I' if completions == Completions::Hold => self.hold(frame.bytes()),
                    b'C' if completions == Completions::TellAllBut(0) => completions = Completions::Tell,
                    tag => {
                        if let (b'C', Completions::TellAllBut(before)) = (tag, &mut completions) {
                            *before -= 1;
                        }
                        well &= tag != b'E';
                        self.tell(frame.bytes());
                    }
                }
            }
            self.feed_copy()?;
            self.step().await?;
        }
    }

    /// A function call, which large objects are reached by.
    pub(super) async fn function_call(&mut self, frame: &Frame) -> Result<(), End> {
        if self.key.is_some() {
            return self.fail(&refused("a function call of the protocol")).await;
        }
        let backend = self.backend()?;
        backend.busy = true;
        backend.peer.push(frame.bytes());
        self.exchange(Completions::Tell).await.map(drop)
    }

    /// A simple query on a connection of the client's own: passed on whole, with what is to fail put in.
    pub(super) async fn simple_by_proxy(&mut self, frame: &Frame) -> Result<(), End> {
        let sql = frame.body().strip_suffix(b"\0").unwrap_or(frame.body());
        let mut to_send = sql.to_vec();
        let mut completions = Completions::Tell;
        self.statements.remove(&b""[..]); // as on a server
        if let Ok(sql) = std::str::from_utf8(sql) {
            let counted = sql != SET_UP && !sql.starts_with(RESET);
            for (i, statement) in sql::split(sql).into_iter().enumerate() {
                let failure = match statement.kind() {
                    Kind::Begin { .. } => {
                        self.shared.faults.on_begin();
                        None
                    }
                    Kind::Commit => match self.shared.faults.on_commit() {
                        Some(AtCommit::CutBefore) => return Err(End::Cut),
                        Some(AtCommit::Fail(state)) => {
                            completions = Completions::TellAllBut(i);
                            Some(("ROLLBACK;", state))
                        }
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
        self.exchange(completions).await.map(drop)
    }
}
