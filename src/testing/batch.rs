//! Batches of the extended protocol: its messages up to Sync, as a client sends them and as they are passed on
//! (PostgreSQL manual, chapter 54.2.3).
//!
//! Messages and answers pass as they come. Where the relay has to know how things stand, to count a statement behind
//! another or to do something of its own, it first has everything answered that it has passed on: see
//! [`settle`](Conversation::settle).

use std::{collections::VecDeque, sync::Arc};

use super::{
    block::raise_sql,
    client::{Conversation, End, prefixed},
    control::injected,
    frames::{Frame, Report, put, split_zero},
    prepared::{Portal, Prepared, bound, refusal},
};

/// A batch on its way to the server.
#[derive(Default)]
pub(super) struct Batch {
    /// So many messages that were passed on are still to be answered.
    owed: u32,
    /// An Execute may be among them.
    executed: bool,
    /// An error was answered: nothing more is done up to Sync.
    pub(super) failed: bool,
    /// The server waits for CopyData, and has read over a Sync that came before it.
    reopened: bool,
    /// What the server answers is for the relay, except for errors.
    quiet: bool,
    /// The Parses among what is owed, in order.
    parsing: VecDeque<(Vec<u8>, Arc<Prepared>)>,
    /// What was executed last, if by the unnamed statement: the next may be another row of `execute_many`.
    rows_of: Option<Arc<Prepared>>,
}

impl Conversation {
    /// While the server waits for CopyData, passes it on; Sync and Flush are ignored then.
    pub(super) fn feed_copy(&mut self) -> Result<(), End> {
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
        if first.tag() == b'S' && !self.stray {
            if let Some(delay) = self.shared.faults.on_acquire() {
                self.pause(delay).await?;
            }
        }
        let mut batch = Batch::default();
        let mut next = Some(first);
        loop {
            let frame = match next.take() {
                Some(frame) => frame,
                None => match self.next_of(&mut batch).await? {
                    Some(frame) => frame,
                    None => break,
                },
            };
            if frame.tag() != b'S' {
                if !batch.failed {
                    self.message(&frame, &mut batch).await?;
                }
                continue;
            }
            // In a sandbox it is the relay's to answer; so it is where the relay has ended the batch before.
            let to_send = self.key.is_none() && !batch.failed;
            if to_send || self.is_busy() {
                self.backend()?.send_sync();
                if !self.answered(&mut batch, true).await? {
                    continue;
                }
            }
            break;
        }
        if self.key.is_some() { self.conclude_implicit().await } else { Ok(()) }
    }

    fn is_busy(&self) -> bool {
        self.lease.as_ref().is_some_and(|backend| backend.busy)
    }

    /// The next message of a batch; nothing if the server has answered a Sync that came before CopyData. Meanwhile passes
    /// on what goes either way.
    async fn next_of(&mut self, batch: &mut Batch) -> Result<Option<Frame>, End> {
        loop {
            if self.lease.is_some() {
                if self.pass_answers(batch)? {
                    self.at_rest().await?;
                    return Ok(None);
                }
                self.feed_copy()?;
            }
            let room = self.lease.as_ref().is_none_or(|backend| !backend.copying && backend.peer.has_room());
            if room {
                if let Some(frame) = self.client_frame()? {
                    return Ok(Some(frame));
                }
                if self.client.has_ended() {
                    return Err(End::Client);
                }
            }
            self.step().await?;
        }
    }

    /// Passes on what the server has answered; whether it is at rest.
    fn pass_answers(&mut self, batch: &mut Batch) -> Result<bool, End> {
        while let Some(frame) = self.backend_frame()? {
            match frame.tag() {
                b'Z' => {
                    (batch.owed, batch.executed) = (0, false);
                    return Ok(true);
                }
                b'1' => {
                    batch.owed = batch.owed.saturating_sub(1);
                    if let Some((name, prepared)) = batch.parsing.pop_front() {
                        self.statements.insert(name, prepared);
                    }
                }
                b'2' | b'3' | b'T' | b'n' | b'C' | b'I' | b's' => batch.owed = batch.owed.saturating_sub(1),
                b'G' => batch.reopened = true,
                b'E' => {
                    batch.failed = true;
                    for (name, prepared) in batch.parsing.drain(..) {
                        if self.statements.get(&name).is_some_and(|known| Arc::ptr_eq(known, &prepared)) {
                            self.statements.remove(&name);
                        }
                    }
                }
                _ => {}
            }
            if !batch.quiet || matches!(frame.tag(), b'E' | b'N' | b'S' | b'A') {
                self.tell(frame.bytes());
            }
        }
        Ok(false)
    }

    /// Waits for the server: until it is at rest, or else until it has answered everything or failed. Whether it is at
    /// rest; it may also have begun to wait for CopyData.
    async fn answered(&mut self, batch: &mut Batch, rest: bool) -> Result<bool, End> {
        batch.reopened = false;
        loop {
            if self.pass_answers(batch)? {
                self.at_rest().await?;
                return Ok(true);
            }
            if batch.reopened || !rest && (batch.owed == 0 || batch.failed) {
                return Ok(false);
            }
            self.step().await?;
        }
    }

    /// Has everything answered that was passed on. In a sandbox the server is at rest then, so that it can be asked
    /// other things; on a connection of the client's own, a Sync in the middle could commit.
    pub(super) async fn settle(&mut self, batch: &mut Batch) -> Result<(), End> {
        let sync = self.key.is_some();
        if sync && self.is_busy() {
            self.backend()?.send_sync();
        } else if !sync && batch.owed > 0 {
            self.forward(b'H', &[], batch)?;
        } else {
            return Ok(());
        }
        self.answered(batch, sync).await?;
        batch.executed = false;
        // Anything but its data would be an error in the middle of a COPY.
        if batch.reopened { Err(End::Client) } else { Ok(()) }
    }

    /// Fails the batch, unless it has failed before.
    pub(super) async fn refuse(&mut self, report: &Report, batch: &mut Batch) -> Result<(), End> {
        self.settle(batch).await?;
        if !batch.failed {
            batch.failed = true;
            self.fail(report).await?;
        }
        Ok(())
    }

    /// Fails the batch by statements of which the last is an error, in the place of the client's next one. They come under
    /// the same Sync as what went before, so that this is undone as well.
    pub(super) async fn break_off(&mut self, statements: &[&str], batch: &mut Batch) -> Result<(), End> {
        self.settle(batch).await?;
        if batch.failed {
            return Ok(());
        }
        for sql in statements {
            self.forward(b'P', &[b"\0", sql.as_bytes(), b"\0\0\0"], batch)?;
            self.forward(b'B', &[&[0; 8]], batch)?;
            self.forward(b'E', &[&[0; 5]], batch)?;
        }
        self.unnamed_gone = true;
        self.backend()?.send_sync();
        batch.quiet = true;
        self.answered(batch, true).await?;
        batch.quiet = false;
        batch.failed = true;
        Ok(())
    }

    /// Hands a message to the server.
    fn forward(&mut self, tag: u8, parts: &[&[u8]], batch: &mut Batch) -> Result<(), End> {
        let backend = self.backend()?;
        (backend.busy, backend.unsynced) = (true, true);
        put(backend.peer.outbox(), tag, parts);
        batch.owed += u32::from(tag != b'H');
        batch.executed |= tag == b'E';
        Ok(())
    }

    /// Makes sure that the server can be asked: in a sandbox, of a savepoint.
    async fn enter_batch(&mut self, batch: &mut Batch) -> Result<bool, End> {
        if self.key.is_some() {
            if let Err(report) = self.enter().await? {
                batch.failed = true;
                self.fail(&report).await?;
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// What the relay asks in between takes the unnamed statement away (manual, chapter 54.2.3): makes it anew.
    async fn restore_unnamed(&mut self, name: &[u8], batch: &mut Batch) -> Result<(), End> {
        if !name.is_empty() || !self.unnamed_gone {
            return Ok(());
        }
        self.settle(batch).await?;
        let Some(prepared) = self.prepared(name, batch).filter(|_| !batch.failed) else { return Ok(()) };
        self.forward(b'P', &[prepared.parse.body()], batch)?;
        self.forward(b'H', &[], batch)?;
        batch.quiet = true;
        self.answered(batch, false).await?;
        batch.quiet = false;
        self.unnamed_gone = batch.failed;
        Ok(())
    }

    /// A statement by the client's name for it, as it will be when all that was passed on is done.
    fn prepared(&self, name: &[u8], batch: &Batch) -> Option<Arc<Prepared>> {
        let parsing = batch.parsing.iter().rev().find(|(parsing, _)| parsing == name);
        parsing.map(|(_, prepared)| prepared).or_else(|| self.statements.get(name)).cloned()
    }

    /// A message of a batch, other than Sync.
    async fn message(&mut self, frame: &Frame, batch: &mut Batch) -> Result<(), End> {
        let body = frame.body();
        match frame.tag() {
            b'P' => self.parse(frame, batch).await,
            b'B' => self.bind(body, batch).await,
            b'E' => self.execute(body, batch).await,
            tag @ (b'D' | b'C') => {
                let (kind, rest) = body.split_first().ok_or(End::Client)?;
                let (name, _) = split_zero(rest).ok_or(End::Client)?;
                self.describe_or_close(tag, *kind, name, batch).await
            }
            // What the relay has to say it says at once.
            b'H' if self.is_busy() || self.key.is_none() => self.forward(b'H', &[], batch),
            b'H' => Ok(()),
            _ => Err(End::Client),
        }
    }

    async fn parse(&mut self, frame: &Frame, batch: &mut Batch) -> Result<(), End> {
        let (name, rest) = split_zero(frame.body()).ok_or(End::Client)?;
        let (text, _) = split_zero(rest).ok_or(End::Client)?;
        let text = String::from_utf8_lossy(text);
        batch.rows_of = None;
        if batch.executed {
            // Whether what comes next is run at all, and counts, is for the server to say.
            self.settle(batch).await?;
            if batch.failed {
                return Ok(());
            }
        }
        let prepared = Arc::new(Prepared::new(&text, frame));
        if self.key.is_some() {
            if let Some(report) = refusal(&text) {
                return self.refuse(&report, batch).await;
            }
            let control = prepared.is_control();
            let known = self.prepared(name, batch).filter(|_| !name.is_empty());
            // The server knows of no more than one of them.
            if known.is_some_and(|known| control || known.is_control()) {
                let message =
                    format!("prepared statement \"{}\" already exists", String::from_utf8_lossy(name));
                return self.refuse(&Report::new("42P05", message, ""), batch).await;
            }
            if control {
                return self.parse_control(name, prepared, batch).await;
            }
        }
        if !self.enter_batch(batch).await? {
            return Ok(());
        }
        // Should the client vanish, it is known what is to be closed.
        self.statements.entry(name.to_vec()).or_insert_with(|| Arc::clone(&prepared));
        batch.parsing.push_back((name.to_vec(), prepared));
        self.unnamed_gone &= !name.is_empty();
        let renamed = prefixed(&self.prefix, name);
        self.forward(b'P', &[&renamed, b"\0", rest], batch)
    }

    async fn bind(&mut self, body: &[u8], batch: &mut Batch) -> Result<(), End> {
        let (portal, name, rest) = bound(body).ok_or(End::Client)?;
        let prepared = self.prepared(name, batch);
        let row = match (&batch.rows_of, &prepared) {
            (Some(before), Some(prepared)) => before.text == prepared.text,
            _ => false,
        };
        if batch.executed && !row {
            self.settle(batch).await?;
            if batch.failed {
                return Ok(());
            }
        }
        let new = prepared.clone().map(|prepared| Portal { prepared, unnamed: name.is_empty() });
        if self.key.is_some() {
            let control = |portal: &Portal| portal.prepared.is_control();
            let known = self.portals.get(portal).filter(|_| !portal.is_empty());
            if known.is_some_and(|known| control(known) || new.as_ref().is_some_and(control)) {
                let message = format!("cursor \"{}\" already exists", String::from_utf8_lossy(portal));
                return self.refuse(&Report::new("42P03", message, ""), batch).await;
            }
            if let Some(new) = new.clone().filter(control) {
                return self.bind_control(portal, new, batch).await;
            }
            if !self.enter_batch(batch).await? {
                return Ok(());
            }
            let settings = prepared.map(|prepared| prepared.local_settings(rest)).unwrap_or_default();
            if settings.iter().any(|name| self.locals.iter().all(|(known, _)| known != name)) {
                self.settle(batch).await?;
                if batch.failed {
                    return Ok(());
                }
                self.remember(settings).await?;
            }
        }
        self.restore_unnamed(name, batch).await?;
        if batch.failed {
            return Ok(());
        }
        match new {
            Some(new) => drop(self.portals.insert(portal.to_vec(), new)),
            None => drop(self.portals.remove(portal)),
        }
        let [portal, name] = [portal, name].map(|name| prefixed(&self.prefix, name));
        self.forward(b'B', &[&portal, b"\0", &name, b"\0", rest], batch)
    }

    async fn execute(&mut self, body: &[u8], batch: &mut Batch) -> Result<(), End> {
        let (name, rest) = split_zero(body).ok_or(End::Client)?;
        let portal = self.portals.get(name).cloned();
        let kind =
            portal.as_ref().filter(|portal| portal.prepared.is_control()).map(|portal| portal.prepared.kind);
        if let Some(kind) = kind {
            self.settle(batch).await?;
            if batch.failed {
                return Ok(());
            }
            if self.key.is_some() {
                return self.execute_control(name, kind, batch).await;
            }
            if !self.count_control(kind, batch).await? {
                return Ok(());
            }
        }
        let before = batch.rows_of.take();
        if kind.is_none() && portal.as_ref().is_none_or(|portal| portal.prepared.counts) {
            let row = before.zip(portal.as_ref());
            let row = row.is_some_and(|(before, portal)| before.text == portal.prepared.text);
            if let Some(state) = (!row).then(|| self.shared.faults.on_statement()).flatten() {
                return self.break_off(&[&raise_sql(&injected(&state))], batch).await;
            }
            batch.rows_of = portal.filter(|portal| portal.unnamed).map(|portal| portal.prepared);
        }
        if !self.enter_batch(batch).await? {
            return Ok(());
        }
        let name = prefixed(&self.prefix, name);
        self.forward(b'E', &[&name, b"\0", rest], batch)
    }

    async fn describe_or_close(
        &mut self,
        tag: u8,
        kind: u8,
        name: &[u8],
        batch: &mut Batch,
    ) -> Result<(), End> {
        let statement = kind == b'S';
        let prepared = if statement {
            self.prepared(name, batch)
        } else {
            self.portals.get(name).map(|portal| Arc::clone(&portal.prepared))
        };
        let control = self.key.is_some() && prepared.is_some_and(|prepared| prepared.is_control());
        if !control {
            if !self.enter_batch(batch).await? {
                return Ok(());
            }
            if statement && tag == b'D' {
                self.restore_unnamed(name, batch).await?;
            }
            if batch.failed {
                return Ok(());
            }
        }
        if tag == b'C' && statement {
            self.statements.remove(name);
        } else if tag == b'C' {
            self.portals.remove(name);
        }
        match (control, tag) {
            (true, b'D') => self.describe_control(statement, batch).await,
            (true, _) => self.close_control(batch).await,
            _ => {
                let name = prefixed(&self.prefix, name);
                self.forward(tag, &[&[kind], &name, b"\0"], batch)
            }
        }
    }
}
