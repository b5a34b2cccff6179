//! The transactions of a sandbox's clients: savepoints of the shared one that look like transactions.

use std::sync::Arc;

use postgres_protocol::escape::escape_literal;
use tokio::time::sleep;

use super::{
    client::{Conversation, End},
    frames::Report,
    relay::Common,
    simple::Completions,
    sql::{Modes, SqlStatement},
};
use crate::lock::lock;

/// What the outer transaction's savepoint is called.
const SAVEPOINT: &str = "pg_session_sandbox";

/// The check that COMMIT makes of deferred constraints.
const CHECK: &str = "SET CONSTRAINTS ALL IMMEDIATE;";

/// What else ends with a transaction: constraints are as they were declared again, and cursors are closed.
///
/// First all are deferred, then those named that are not by default. The other way round, those that are would be
/// immediate in tables that the next transaction makes. Only superusers may name what lies in any schema.
const TIDY: &str = "\
SET CONSTRAINTS ALL DEFERRED;\
DO $$DECLARE immediate text; cursors text[]; name text; BEGIN \
SELECT string_agg(DISTINCT format('%I.%I', n.nspname, c.conname), ', ') INTO immediate \
FROM pg_catalog.pg_constraint c JOIN pg_catalog.pg_namespace n ON n.oid = c.connamespace \
WHERE c.condeferrable AND NOT c.condeferred AND has_schema_privilege(n.oid, 'USAGE'); \
IF immediate IS NOT NULL THEN EXECUTE 'SET CONSTRAINTS ' || immediate || ' IMMEDIATE'; END IF; \
SELECT array_agg(c.name) INTO cursors FROM pg_catalog.pg_cursors c WHERE c.name <> '' AND NOT c.is_holdable; \
FOREACH name IN ARRAY coalesce(cursors, '{}') LOOP EXECUTE format('CLOSE %I', name); END LOOP; \
END$$;";

/// Where a session of a sandbox stands.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Block {
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

impl Conversation {
    /// Brings the sandbox's connection to rest and to where it was before this client took it.
    pub(super) async fn undo(&mut self) {
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

    /// Makes sure of a savepoint to work in, for a transaction or for this batch; or says why there can be none.
    pub(super) async fn enter(&mut self) -> Result<Result<(), Report>, End> {
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
    pub(super) async fn fail(&mut self, report: &Report) -> Result<(), End> {
        match self.block {
            Block::Implicit | Block::Explicit => return self.raise(report).await,
            Block::Begun { .. } => self.block = Block::Aborted,
            Block::Idle | Block::Aborted => {}
        }
        self.report(report);
        Ok(())
    }

    pub(super) async fn raise(&mut self, report: &Report) -> Result<(), End> {
        self.unnamed_gone = true;
        self.backend()?.send_query(raise_sql(report).as_bytes());
        self.exchange(Completions::Tell).await.map(drop)
    }

    /// Whether the server refuses everything but the end of the transaction, or of the batch.
    pub(super) fn has_failed(&self) -> bool {
        self.lease.as_ref().is_some_and(|backend| backend.status == b'E')
    }

    pub(super) async fn begin(&mut self, tag: &str, modes: Modes) -> Result<bool, End> {
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

    pub(super) async fn set_transaction(
        &mut self,
        statement: &SqlStatement<'_>,
        modes: Modes,
    ) -> Result<bool, End> {
        if let Some(report) = self.too_strong(modes) {
            self.fail(&report).await?;
            return Ok(false);
        }
        match self.block {
            Block::Idle | Block::Implicit => {
                self.notice("25P01", "SET TRANSACTION can only be used in transaction blocks");
            }
            Block::Begun { read_only } => {
                self.block = Block::Begun { read_only: modes.read_only.or(read_only) };
            }
            Block::Explicit | Block::Aborted => return self.pass_on(statement, false).await,
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

    pub(super) async fn commit(&mut self) -> Result<bool, End> {
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
        let mut sql = CHECK.to_owned();
        for (name, value) in std::mem::take(&mut self.locals) {
            let (name, value) = (escape_literal(&name), escape_literal(&value));
            sql.push_str(&format!("SELECT pg_catalog.set_config({name},{value},true);"));
        }
        // After them: one of them may be the role.
        sql.push_str(TIDY);
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
    pub(super) async fn roll_back(&mut self) -> Result<(), End> {
        if matches!(self.block, Block::Implicit | Block::Explicit) && self.run(&roll_back_sql()).await?.failed
        {
            return Err(End::Backend("its savepoint is gone".to_owned()));
        }
        self.locals.clear();
        self.block = Block::Idle;
        Ok(())
    }

    /// A batch outside of a transaction commits by itself.
    pub(super) async fn conclude_implicit(&mut self) -> Result<(), End> {
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
    pub(super) async fn remember(&mut self, mut names: Vec<String>) -> Result<(), End> {
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
}

fn roll_back_sql() -> String {
    format!("ROLLBACK TO {SAVEPOINT};RELEASE {SAVEPOINT}")
}

fn access_mode(read_only: bool) -> &'static str {
    if read_only { "SET TRANSACTION READ ONLY" } else { "SET TRANSACTION READ WRITE" }
}

/// An error of the server's own that says what the report says, and aborts what an error aborts.
pub(super) fn raise_sql(report: &Report) -> String {
    let Report { code, message, hint } = report;
    let [code, message, hint] = [code.as_str(), message, hint].map(escape_literal);
    let body = format!("BEGIN RAISE EXCEPTION USING ERRCODE={code},MESSAGE={message},HINT={hint}; END");
    format!("DO {}", escape_literal(&body))
}

pub(super) fn aborted() -> Report {
    let message = "current transaction is aborted, commands ignored until end of transaction block";
    Report::new("25P02", message, "")
}

pub(super) fn refused(what: &str) -> Report {
    let hint = "Its transactions are savepoints of one outer transaction. Use a database of the test's own for this.";
    Report::new("0A000", format!("{what} cannot be used in a sandbox"), hint)
}
