//! What the relay knows of a client's prepared statements and portals.

use std::sync::Arc;

use super::{
    frames::{Frame, Report, split_zero},
    sql::{self, Kind, SqlStatement},
};

/// How the queries begin by which the driver looks up types.
const TYPE_LOOKUPS: [&str; 3] = [
    "SELECT t.typname, t.typtype, t.typelem,",
    "SELECT enumlabel\nFROM pg_catalog.pg_enum",
    "SELECT attname, atttypid\nFROM pg_catalog.pg_attribute",
];

/// What is known of a prepared statement.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) text: String,
    pub(super) kind: Kind,
    /// A statement by the measure of [`Faults`](super::Faults).
    pub(super) counts: bool,
    /// The settings it sets for the transaction, and which of its parameters name others.
    settings: Vec<String>,
    setting_parameters: Vec<usize>,
    /// The Parse that made it.
    pub(super) parse: Frame,
}

/// A statement that was bound.
#[derive(Clone, Debug)]
pub(super) struct Portal {
    pub(super) prepared: Arc<Prepared>,
    /// By no name.
    pub(super) unnamed: bool,
}

impl Prepared {
    /// From the text of a Parse.
    pub(super) fn new(text: &str, parse: &Frame) -> Self {
        let parts = sql::split(text);
        // Several are an error, which the server makes.
        let kind = if let [part] = &parts[..] { part.kind() } else { Kind::Other };
        let own = TYPE_LOOKUPS.iter().any(|lookup| text.starts_with(lookup));
        let sets_only = parts.iter().any(SqlStatement::is_local_setting);
        Self {
            text: text.to_owned(),
            kind,
            counts: kind == Kind::Other && !own && !sets_only,
            settings: parts.iter().flat_map(SqlStatement::local_settings).collect(),
            setting_parameters: parts.iter().flat_map(SqlStatement::local_setting_parameters).collect(),
            parse: parse.clone(),
        }
    }

    /// Whether it begins or ends a transaction.
    pub(super) fn is_control(&self) -> bool {
        matches!(self.kind, Kind::Begin { .. } | Kind::Commit | Kind::Rollback)
    }

    /// The settings that it sets for the transaction with the parameters of this Bind, from their formats on.
    pub(super) fn local_settings(&self, parameters: &[u8]) -> Vec<String> {
        let mut names = self.settings.clone();
        if !self.setting_parameters.is_empty() {
            let values = values(parameters).unwrap_or_default();
            let named = self.setting_parameters.iter().filter_map(|i| *values.get(*i)?);
            names.extend(named.map(|name| String::from_utf8_lossy(name).into_owned()));
        }
        names
    }
}

/// The values in a Bind, from the formats on; those of text are the same in both formats.
fn values(bytes: &[u8]) -> Option<Vec<Option<&[u8]>>> {
    let number = |bytes: &[u8]| Some(usize::from(u16::from_be_bytes(*bytes.first_chunk()?)));
    let bytes = bytes.get(2 + 2 * number(bytes)?..)?;
    let mut rest = bytes.get(2..)?;
    let mut values = Vec::new();
    for _ in 0..number(bytes)? {
        let (length, after) = rest.split_first_chunk::<4>()?;
        // -1 stands for NULL.
        let length = usize::try_from(i32::from_be_bytes(*length)).ok();
        let (value, after) = after.split_at_checked(length.unwrap_or(0))?;
        values.push(length.map(|_| value));
        rest = after;
    }
    Some(values)
}

/// Why a text cannot be prepared in a sandbox, if it must not reach the server.
pub(super) fn refusal(text: &str) -> Option<Report> {
    let parts = sql::split(text);
    let alone = parts.len() == 1;
    let what = parts.iter().find_map(|part| match part.kind() {
        Kind::Refused(what) => Some(what),
        Kind::SetTransaction(modes) if modes.level.is_some() => Some("SET TRANSACTION with a level"),
        Kind::Begin { .. } | Kind::Commit | Kind::Rollback if !alone => {
            Some("transaction control among other statements")
        }
        _ => None,
    })?;
    Some(Report::new(
        "0A000",
        format!("{what} cannot be prepared in a sandbox"),
        "Send it as a simple query, or give BEGIN its level: a transaction of pg-session or tokio-postgres does.",
    ))
}

/// The two names at the beginning of a Bind, portal and statement, and what follows.
pub(super) fn bound(body: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let (portal, rest) = split_zero(body)?;
    let (statement, rest) = split_zero(rest)?;
    Some((portal, statement, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_read_with_their_nulls() {
        let bind = [
            &[0, 1, 0, 1, 0, 3][..],
            &2i32.to_be_bytes(),
            b"ab",
            &(-1i32).to_be_bytes(),
            &0i32.to_be_bytes(),
            &[0, 0],
        ];
        let bind = bind.concat();
        assert_eq!(values(&bind), Some(vec![Some(&b"ab"[..]), None, Some(b"")]));
        for cut in 0..bind.len() - 2 {
            assert_eq!(values(&bind[..cut]), None, "{cut} bytes");
        }
    }

    #[test]
    fn what_must_not_reach_the_server_is_refused() {
        for sql in [
            "COMMIT AND CHAIN",
            "PREPARE TRANSACTION 'x'",
            "SELECT 1; COMMIT",
            "DEALLOCATE ALL",
            "END nonsense",
        ] {
            assert!(refusal(sql).is_some(), "{sql}");
        }
        for sql in ["BEGIN", "COMMIT", "ABORT", "SAVEPOINT a", "SET TRANSACTION READ ONLY", "SELECT 1", ""] {
            assert!(refusal(sql).is_none(), "{sql}");
        }
    }
}
