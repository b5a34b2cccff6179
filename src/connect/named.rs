//! Statements of ours that the server keeps: parsed once on each connection, and bound by name from then on.
//!
//! Parsing takes the server longer than running BEGIN does. A name is relied on only when the flight that brought it was
//! answered without an error; until then, and wherever it may be gone, it is made afresh. Should it be missing all the
//! same, the flight fails there (SQLSTATE 26000, for which closures and batches are retried by default). A name says what it stands for, so that where a pooler
//! mixes up the statements of several clients, it never stands for another.

use std::io;

use bytes::{BufMut, BytesMut};
use postgres_protocol::IsNull;
use postgres_protocol::message::frontend;
use postgres_types::Type;

/// More than there are kinds of BEGIN that anybody uses.
const LIMIT: usize = 16;

/// The server looks at so many bytes of a name (`NAMEDATALEN`).
const NAME_LIMIT: usize = 63;

const PREFIX: &str = "pgs:";

#[derive(Debug, Default)]
pub(super) struct Named {
    statements: Vec<Statement>,
    /// Some were asked for, and the answer is not here.
    unsettled: bool,
}

#[derive(Debug)]
struct Statement {
    /// The prefix and the SQL.
    name: String,
    /// The messages that run it, which are always the same.
    messages: BytesMut,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Not there, or nobody knows.
    Unknown,
    /// The flight with this number brings it.
    Asked(u64),
    Kept,
}

impl Named {
    /// Writes the messages that run `sql` in the flight with this number.
    pub(super) fn run(&mut self, sql: &str, flight: u64, out: &mut BytesMut) -> io::Result<()> {
        let Some(statement) = self.statement(sql) else { return run(sql, &[], out) };
        match statement.state {
            // Should the flight fail that brings it, there is no such name for this one.
            State::Asked(earlier) if earlier != flight => return run(sql, &[], out),
            State::Asked(_) | State::Kept => {
                out.put_slice(&statement.messages);
                return Ok(());
            }
            State::Unknown => {}
        }
        // To close what is not there is no error; to parse it twice is.
        frontend::close(b'S', &statement.name, out)?;
        parse(&statement.name, sql, &[], out)?;
        let begin = out.len();
        execute(&statement.name, &[], out)?;
        statement.messages = out[begin..].into();
        statement.state = State::Asked(flight);
        self.unsettled = true;
        Ok(())
    }

    fn statement(&mut self, sql: &str) -> Option<&mut Statement> {
        let known = self.statements.iter().position(|statement| statement.name[PREFIX.len()..] == *sql);
        let index = known.unwrap_or(self.statements.len());
        if known.is_none() {
            if index == LIMIT || PREFIX.len() + sql.len() > NAME_LIMIT {
                return None;
            }
            self.statements.push(Statement {
                name: format!("{PREFIX}{sql}"),
                messages: BytesMut::new(),
                state: State::Unknown,
            });
        }
        self.statements.get_mut(index)
    }

    /// The flight with this number was answered.
    #[inline]
    pub(super) fn settle(&mut self, flight: u64, failed: bool) {
        if self.unsettled {
            self.settle_now(flight, failed);
        }
    }

    #[cold]
    fn settle_now(&mut self, flight: u64, failed: bool) {
        let settled = if failed { State::Unknown } else { State::Kept };
        for statement in &mut self.statements {
            if statement.state == State::Asked(flight) {
                statement.state = settled;
            }
        }
        self.unsettled = self.statements.iter().any(|statement| matches!(statement.state, State::Asked(_)));
    }

    /// The server may have dropped them.
    #[cold]
    pub(super) fn forget(&mut self) {
        for statement in &mut self.statements {
            statement.state = State::Unknown;
        }
        self.unsettled = false;
    }
}

/// The messages that run `sql` with `values`, by no name.
pub(super) fn run(sql: &str, values: &[&str], out: &mut BytesMut) -> io::Result<()> {
    parse("", sql, values, out)?;
    execute("", values, out)
}

fn parse(name: &str, sql: &str, values: &[&str], out: &mut BytesMut) -> io::Result<()> {
    frontend::parse(name, sql, values.iter().map(|_| Type::TEXT.oid()), out)
}

/// Bind and Execute, by way of the unnamed portal.
fn execute(name: &str, values: &[&str], out: &mut BytesMut) -> io::Result<()> {
    let write = |value: &&str, out: &mut BytesMut| {
        out.put_slice(value.as_bytes());
        Ok(IsNull::No)
    };
    frontend::bind("", name, [], values, write, [], out).map_err(|e| match e {
        frontend::BindError::Conversion(e) => io::Error::other(e),
        frontend::BindError::Serialization(e) => e,
    })?;
    frontend::execute("", 0, out)
}

#[cfg(test)]
mod tests {
    use super::super::frames::tests::tags;
    use super::*;

    /// What is written to begin in the flight with this number.
    fn begin(named: &mut Named, flight: u64) -> Vec<u8> {
        let mut out = BytesMut::new();
        named.run("BEGIN", flight, &mut out).expect("messages");
        tags(&out)
    }

    #[test]
    fn a_statement_is_parsed_once() {
        let mut named = Named::default();
        assert_eq!(begin(&mut named, 1), b"CPBE");
        assert_eq!(begin(&mut named, 1), b"BE", "in the same flight it is there");
        named.settle(1, false);
        assert_eq!(begin(&mut named, 2), b"BE");
    }

    #[test]
    fn a_name_is_relied_on_only_when_it_was_answered_for() {
        let mut named = Named::default();
        begin(&mut named, 1);
        assert_eq!(begin(&mut named, 2), b"PBE", "by no name");
        named.settle(1, true);
        assert_eq!(begin(&mut named, 3), b"CPBE");
        named.settle(2, false);
        assert_eq!(begin(&mut named, 4), b"PBE", "another flight's answer does not count");
        named.settle(3, false);
        assert_eq!(begin(&mut named, 5), b"BE");
    }

    #[test]
    fn what_was_forgotten_is_made_afresh() {
        let mut named = Named::default();
        begin(&mut named, 1);
        named.forget();
        named.settle(1, false);
        assert_eq!(begin(&mut named, 2), b"CPBE");
    }

    #[test]
    fn there_are_never_too_many() {
        let mut named = Named::default();
        for i in 0..2 * LIMIT {
            let mut out = BytesMut::new();
            named.run(&format!("BEGIN {i}"), 1, &mut out).expect("messages");
            assert_eq!(tags(&out), if i < LIMIT { &b"CPBE"[..] } else { b"PBE" });
        }
    }

    #[test]
    fn a_name_that_the_server_would_cut_is_none() {
        for (length, written) in [(NAME_LIMIT, &b"CPBE"[..]), (NAME_LIMIT + 1, b"PBE")] {
            let mut out = BytesMut::new();
            Named::default().run(&"x".repeat(length - PREFIX.len()), 1, &mut out).expect("messages");
            assert_eq!(tags(&out), written);
        }
    }
}
