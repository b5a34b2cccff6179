//! What of ours travels with the driver's next request, under its Sync: BEGIN and settings, savepoints, rows, COMMIT.
//!
//! The driver ends each of its requests with a Sync, which is where the server answers, and where it stops skipping after
//! an error. So what must not run on its own has to stand before the same Sync as the statement it belongs to: then a
//! BEGIN that fails takes the statement with it. (PostgreSQL manual, chapters 54.2.3 "Extended Query" and 54.2.4
//! "Pipelining".)

use std::borrow::Cow;
use std::io;

use bytes::{BufMut, BytesMut};
use postgres_protocol::escape::escape_literal;
use postgres_protocol::message::frontend;
use postgres_types::Type;

use super::named::{self, Named};

/// A statement of ours. Each is answered by one CommandComplete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Ends the attempt before.
    RollBack,
    /// BEGIN with its modes.
    Begin(Cow<'static, str>),
    /// A parameter for this transaction only.
    Setting(Cow<'static, str>, Cow<'static, str>),
    Savepoint(u32),
    Release(u32),
    RollBackTo(u32),
    Commit,
}

/// A function, since SET has no way to pass a list such as `search_path` as one value.
const SET_CONFIG: &str = "SELECT pg_catalog.set_config($1,$2,true)";

impl Step {
    pub(super) fn begins(&self) -> bool {
        matches!(self, Self::Begin(_))
    }

    /// Its text; with the values spelled out, where it has any.
    fn sql(&self) -> Cow<'_, str> {
        match self {
            Self::RollBack => "ROLLBACK".into(),
            Self::Begin(sql) => sql.as_ref().into(),
            Self::Commit => "COMMIT".into(),
            // Names are made, never taken from users; quoted all the same.
            Self::Savepoint(number) => format!("SAVEPOINT \"pgs_{number}\"").into(),
            Self::Release(number) => format!("RELEASE \"pgs_{number}\"").into(),
            Self::RollBackTo(number) => format!("ROLLBACK TO \"pgs_{number}\"").into(),
            Self::Setting(name, value) => {
                let (name, value) = (escape_literal(name), escape_literal(value));
                format!("SELECT pg_catalog.set_config({name},{value},true)").into()
            }
        }
    }

    /// As messages of the extended protocol, with values as parameters.
    fn write(&self, named: &mut Named, flight: u64, out: &mut BytesMut) -> io::Result<()> {
        match self {
            Self::Begin(sql) => named.run(sql, flight, out),
            // Nothing in the answer would tell whether the name stood for something else.
            Self::Setting(name, value) => named::run(SET_CONFIG, &[name, value], out),
            // Work that is done must not be undone for want of a name; savepoints have another each time.
            Self::Commit | Self::RollBack | Self::Savepoint(_) | Self::Release(_) | Self::RollBackTo(_) => {
                named::run(&self.sql(), &[], out)
            }
        }
    }
}

/// How the driver's request is to be understood.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A statement of the extended protocol.
    #[default]
    Statement,
    /// A simple query that begins with steps of ours, which are in its text.
    Text,
    /// A simple query. The steps go ahead of it, under a Sync of their own.
    AheadOfText,
    /// A simple query that says nothing: the steps are sent in its place. The last of them ends the transaction.
    End,
    /// COPY into the server, for which the driver sends data.
    CopyIn,
    /// COPY out of the server.
    CopyOut,
}

/// What is to travel with the next request, or requests.
#[derive(Debug, Default)]
pub(crate) struct Flight {
    pub(super) lead: Vec<Step>,
    pub(super) kind: Kind,
    /// Rows of `execute_many`, as messages, and how many they are.
    pub(super) rows: BytesMut,
    pub(super) row_count: u32,
    /// So many requests of the driver's follow under one Sync; none is as good as one.
    pub(super) requests: u32,
    /// COMMIT comes behind the last of them, under the same Sync; or is the last step.
    pub(super) commit: bool,
}

impl Flight {
    pub(super) fn is_empty(&self) -> bool {
        self.lead.is_empty()
            && self.kind == Kind::Statement
            && self.rows.is_empty()
            && self.requests == 0
            && !self.commit
    }

    /// Whether BEGIN is among the steps.
    pub(super) fn begins(&self) -> bool {
        self.lead.iter().any(Step::begins)
    }

    pub(super) fn clear(&mut self) {
        self.lead.clear();
        self.clear_request();
    }

    /// The steps are for another request.
    pub(super) fn clear_request(&mut self) {
        self.kind = Kind::Statement;
        self.rows.clear();
        (self.row_count, self.requests, self.commit) = (0, 0, false);
    }

    /// What goes before the driver's first request. `number` is that of the ReadyForQuery which ends the flight.
    pub(super) fn write_lead(&self, named: &mut Named, number: u64, out: &mut BytesMut) -> io::Result<()> {
        if self.kind != Kind::Text {
            for step in &self.lead {
                step.write(named, number, out)?;
            }
        }
        out.put_slice(&self.rows);
        Ok(())
    }

    /// What goes behind its last one.
    pub(super) fn write_end(&self, out: &mut BytesMut) -> io::Result<()> {
        if self.commit && self.kind != Kind::End { named::run(&Step::Commit.sql(), &[], out) } else { Ok(()) }
    }
}

/// The steps as the beginning of a simple query.
pub(super) fn text(steps: &[Step]) -> String {
    steps.iter().flat_map(|step| [step.sql(), ";".into()]).collect()
}

/// Rows for one statement, to go ahead of the driver's own request for the last one.
#[derive(Debug, Default)]
pub(crate) struct Rows {
    pub(super) bytes: BytesMut,
    pub(super) count: u32,
}

impl Rows {
    /// Makes `sql` the unnamed statement, which the rows are for: the driver keeps the names of its own to itself.
    pub(crate) fn parse(&mut self, sql: &str, types: &[Type]) -> io::Result<()> {
        frontend::parse("", sql, types.iter().map(Type::oid), &mut self.bytes)
    }

    /// Runs it with `parameters`: their number, and the length and bytes of each.
    pub(crate) fn run(&mut self, parameters: &[u8]) -> io::Result<()> {
        self.bytes.put_u8(b'B');
        // The length, itself included; the empty names of portal and statement; one format for all, which is binary.
        let length = i32::try_from(4 + 2 + 4 + parameters.len() + 4).map_err(io::Error::other)?;
        self.bytes.put_i32(length);
        self.bytes.put_slice(b"\0\0\0\x01\0\x01");
        self.bytes.put_slice(parameters);
        self.bytes.put_slice(b"\0\x01\0\x01");
        self.count += 1;
        frontend::execute("", 0, &mut self.bytes)
    }

    pub(crate) fn count(&self) -> u32 {
        self.count
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_settings_are_parameters_in_messages_and_quoted_in_text() {
        let setting = Step::Setting("app.tenant".into(), r"O'Neil\".into());
        let mut messages = BytesMut::new();
        setting.write(&mut Named::default(), 1, &mut messages).expect("messages");
        let has = |part: &[u8]| messages.windows(part.len()).any(|window| window == part);
        assert!(has(SET_CONFIG.as_bytes()) && has(br"O'Neil\"));
        assert_eq!(
            text(&[Step::Begin("BEGIN".into()), setting]),
            r"BEGIN;SELECT pg_catalog.set_config('app.tenant', E'O''Neil\\',true);"
        );
    }
}
