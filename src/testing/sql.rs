//! What kind a statement is, as far as the relay must understand it.

use tokio_postgres::IsolationLevel;

use crate::sql::Token;
pub(super) use crate::sql::{SqlStatement, split};

/// An isolation level as PostgreSQL has them, weakest first: READ UNCOMMITTED is READ COMMITTED (manual, chapter 13.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Level {
    ReadCommitted,
    RepeatableRead,
    Serializable,
}

impl Level {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::ReadCommitted => "READ COMMITTED",
            Self::RepeatableRead => "REPEATABLE READ",
            Self::Serializable => "SERIALIZABLE",
        }
    }
}

impl From<IsolationLevel> for Level {
    fn from(level: IsolationLevel) -> Self {
        match level {
            IsolationLevel::Serializable => Self::Serializable,
            IsolationLevel::RepeatableRead => Self::RepeatableRead,
            _ => Self::ReadCommitted,
        }
    }
}

/// What a statement is to the relay.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Kind {
    /// BEGIN, or START TRANSACTION, which has a tag of its own.
    Begin {
        start: bool,
        modes: Modes,
    },
    /// COMMIT or END.
    Commit,
    /// ROLLBACK or ABORT.
    Rollback,
    /// SAVEPOINT, RELEASE or ROLLBACK TO, by the name it has in errors.
    Savepoint(&'static str),
    /// SET TRANSACTION.
    SetTransaction(Modes),
    /// What cannot be had in a part of a transaction: the reason.
    Refused(&'static str),
    Other,
}

/// The modes of a transaction; DEFERRABLE is understood and has no effect here.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Modes {
    pub(super) level: Option<Level>,
    pub(super) read_only: Option<bool>,
}

const CHAIN: &str = "AND CHAIN";
const TWO_PHASE: &str = "two-phase commit";
const ODD: &str = "this form of ending a transaction";

impl SqlStatement<'_> {
    pub(super) fn kind(&self) -> Kind {
        let first = |word: &str| self.word(0, word);
        let second = |word: &str| self.word(1, word);
        if first("begin") || first("start") {
            let start = first("start");
            let noise = if start { second("transaction") } else { second("work") || second("transaction") };
            return match self.modes(1 + usize::from(noise)) {
                Some(modes) if noise || !start => Kind::Begin { start, modes },
                _ => Kind::Other,
            };
        }
        if first("prepare") && second("transaction") {
            return Kind::Refused(TWO_PHASE);
        }
        if first("savepoint") {
            return Kind::Savepoint("SAVEPOINT");
        }
        if first("release") {
            return Kind::Savepoint("RELEASE SAVEPOINT");
        }
        if first("deallocate") && (second("all") || second("prepare") && self.word(2, "all")) {
            return Kind::Refused("DEALLOCATE ALL, which would take the statements of other sessions along,");
        }
        if first("set") {
            let at = 1 + usize::from(second("local"));
            if self.word(at, "transaction") {
                return self.modes(at + 1).map_or(Kind::Other, Kind::SetTransaction);
            }
            return Kind::Other;
        }
        let rollback = first("rollback") || first("abort");
        if !rollback && !first("commit") && !first("end") {
            return Kind::Other;
        }
        let at = 1 + usize::from(second("work") || second("transaction"));
        if rollback && self.word(at, "to") {
            return Kind::Savepoint("ROLLBACK TO SAVEPOINT");
        }
        if self.word(at, "prepared") {
            return Kind::Refused(TWO_PHASE);
        }
        let no = self.word(at, "and") && self.word(at + 1, "no") && self.word(at + 2, "chain");
        match self.tokens.len() - at {
            0 => {}
            3 if no => {}
            2 if self.word(at, "and") && self.word(at + 1, "chain") => return Kind::Refused(CHAIN),
            // Never passed on, since it could end the outer transaction.
            _ => return Kind::Refused(ODD),
        }
        if rollback { Kind::Rollback } else { Kind::Commit }
    }

    /// The modes from a token on (manual, SET TRANSACTION); `None` if there is anything else.
    fn modes(&self, mut at: usize) -> Option<Modes> {
        let mut modes = Modes::default();
        while at < self.tokens.len() {
            let at_word = |offset: usize, word: &str| self.word(at + offset, word);
            at += if self.tokens[at] == Token::Symbol(b',') {
                1
            } else if at_word(0, "isolation") && at_word(1, "level") {
                let (level, words) = if at_word(2, "serializable") {
                    (Level::Serializable, 1)
                } else if at_word(2, "repeatable") && at_word(3, "read") {
                    (Level::RepeatableRead, 2)
                } else if at_word(2, "read") && (at_word(3, "committed") || at_word(3, "uncommitted")) {
                    (Level::ReadCommitted, 2)
                } else {
                    return None;
                };
                modes.level = Some(level);
                2 + words
            } else if at_word(0, "read") && (at_word(1, "only") || at_word(1, "write")) {
                modes.read_only = Some(at_word(1, "only"));
                2
            } else if at_word(0, "deferrable") {
                1
            } else if at_word(0, "not") && at_word(1, "deferrable") {
                2
            } else {
                return None;
            };
        }
        Some(modes)
    }

    /// The settings it sets for the transaction only: by SET LOCAL, or by `set_config('name', …, true)`.
    pub(super) fn local_settings(&self) -> Vec<String> {
        let mut names = Vec::new();
        if self.word(0, "set") && self.word(1, "local") {
            names.extend(self.set_local_name());
        }
        names.extend(self.local_set_configs().filter_map(|arguments| match arguments {
            [Token::Text(name), ..] => Some((*name).to_owned()),
            _ => None,
        }));
        names
    }

    /// Which of its parameters, counted from 0, name such settings: by `set_config($1, …, true)`.
    pub(super) fn local_setting_parameters(&self) -> Vec<usize> {
        let number = |arguments: &[Token<'_>]| match arguments {
            [Token::Symbol(b'$'), Token::Word(number), ..] => number.parse::<usize>().ok()?.checked_sub(1),
            _ => None,
        };
        self.local_set_configs().filter_map(number).collect()
    }

    /// The arguments of each `set_config(…, true)`.
    fn local_set_configs(&self) -> impl Iterator<Item = &[Token<'_>]> {
        self.tokens.iter().enumerate().filter_map(|(i, token)| {
            if !token.is("set_config") || self.tokens.get(i + 1) != Some(&Token::Symbol(b'(')) {
                return None;
            }
            let mut depth = 0u32;
            let end = self.tokens[i + 1..].iter().position(|token| {
                match token {
                    Token::Symbol(b'(') => depth += 1,
                    Token::Symbol(b')') => depth -= 1,
                    _ => {}
                }
                depth == 0
            });
            match self.tokens.get(i + 2..i + 1 + end?)? {
                arguments @ [.., Token::Symbol(b','), last] if last.is("true") => Some(arguments),
                _ => None,
            }
        })
    }

    fn set_local_name(&self) -> Option<String> {
        // Those with a syntax of their own (manual, SET).
        let special = [
            ("time", "timezone"),
            ("role", "role"),
            ("session", "session_authorization"),
            ("names", "client_encoding"),
            ("schema", "search_path"),
        ];
        for (word, name) in special {
            if self.word(2, word) {
                return Some(name.to_owned());
            }
        }
        let mut name = String::new();
        for token in &self.tokens[2..] {
            match token {
                Token::Symbol(b'=') => break,
                token if token.is("to") => break,
                Token::Word(part) | Token::Quoted(part) => name.push_str(part),
                Token::Symbol(b'.') => name.push('.'),
                _ => return None,
            }
        }
        (!name.is_empty()).then_some(name)
    }

    /// Whether it is `SELECT pg_catalog.set_config('name','value',true)` and nothing more, as pg-session sends it along
    /// with BEGIN: with both values in its text, or as parameters.
    pub(super) fn is_local_setting(&self) -> bool {
        use Token::{Symbol, Text, Word};
        let values = match &self.tokens[..] {
            [
                Word("SELECT"),
                Word("pg_catalog"),
                Symbol(b'.'),
                Word("set_config"),
                Symbol(b'('),
                values @ ..,
                Symbol(b','),
                Word("true"),
                Symbol(b')'),
            ] => values,
            _ => return false,
        };
        matches!(
            values,
            [Text(_), Symbol(b','), Text(_)]
                | [Symbol(b'$'), Word("1"), Symbol(b','), Symbol(b'$'), Word("2")]
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(sql: &str) -> Vec<&str> {
        split(sql).into_iter().map(|statement| statement.text).collect()
    }

    fn kind(sql: &str) -> Kind {
        let statements = split(sql);
        assert_eq!(statements.len(), 1, "{sql}");
        statements[0].kind()
    }

    #[test]
    fn statements_end_at_semicolons_outside_of_quotes_and_comments() {
        for (sql, expected) in [
            ("", &[][..]),
            (" ; ;-- x;\n/* ; */", &[]),
            ("SELECT 1", &["SELECT 1"]),
            (" SELECT 1 ; SELECT 2;", &["SELECT 1", "SELECT 2"]),
            ("SELECT ';'';', \"a;\"\";\"; b", &["SELECT ';'';', \"a;\"\";\"", "b"]),
            (r"SELECT E'\';', '\'; b", &[r"SELECT E'\';', '\'", "b"]),
            ("SELECT $$;$$, $a$;$b$;$a$; b", &["SELECT $$;$$, $a$;$b$;$a$", "b"]),
            ("SELECT a$b$;SELECT c$b$", &["SELECT a$b$", "SELECT c$b$"]),
            ("SELECT $1;SELECT $2", &["SELECT $1", "SELECT $2"]),
            ("a /* ; /* ; */ ; */ ; b -- ; c\n; d", &["a", "b", "d"]),
            (
                "CREATE RULE r AS ON INSERT TO t DO (a; b); c",
                &["CREATE RULE r AS ON INSERT TO t DO (a; b)", "c"],
            ),
            ("SELECT 'é;$é$;'; $é$;$é$; b", &["SELECT 'é;$é$;'", "$é$;$é$", "b"]),
            ("SELECT 'open; b", &["SELECT 'open; b"]),
            ("SELECT $x$open; $", &["SELECT $x$open; $"]),
            ("SELECT 1 $", &["SELECT 1 $"]),
        ] {
            assert_eq!(texts(sql), expected, "{sql}");
        }
    }

    #[test]
    fn the_body_of_a_sql_function_is_one_statement() {
        let function = "CREATE OR REPLACE FUNCTION f() RETURNS int LANGUAGE sql BEGIN ATOMIC SELECT 1; \
                        SELECT CASE WHEN true THEN 2 END; END";
        assert_eq!(texts(&format!("{function}; SELECT 3")), [function, "SELECT 3"]);
        assert_eq!(texts("BEGIN; SELECT 1; END"), ["BEGIN", "SELECT 1", "END"]);
    }

    #[test]
    fn where_a_statement_begins_is_known() {
        let sql = "  a;/* x */ b";
        assert!(split(sql).iter().all(|statement| sql[statement.start..].starts_with(statement.text)));
    }

    #[test]
    fn transaction_control_is_told_from_everything_else() {
        let modes = |level, read_only| Modes { level, read_only };
        for (sql, expected) in [
            ("BEGIN", Kind::Begin { start: false, modes: Modes::default() }),
            (
                "begin work isolation level repeatable read, read only, not deferrable",
                Kind::Begin { start: false, modes: modes(Some(Level::RepeatableRead), Some(true)) },
            ),
            (
                "/* x */ START TRANSACTION READ WRITE ISOLATION LEVEL SERIALIZABLE DEFERRABLE",
                Kind::Begin { start: true, modes: modes(Some(Level::Serializable), Some(false)) },
            ),
            (
                "SET TRANSACTION ISOLATION LEVEL READ COMMITTED",
                Kind::SetTransaction(modes(Some(Level::ReadCommitted), None)),
            ),
            ("COMMIT", Kind::Commit),
            ("END WORK", Kind::Commit),
            ("COMMIT TRANSACTION AND NO CHAIN", Kind::Commit),
            ("ROLLBACK", Kind::Rollback),
            ("abort transaction", Kind::Rollback),
            ("ROLLBACK AND CHAIN", Kind::Refused(CHAIN)),
            ("commit work and chain", Kind::Refused(CHAIN)),
            ("COMMIT PREPARED 'x'", Kind::Refused(TWO_PHASE)),
            ("PREPARE TRANSACTION 'x'", Kind::Refused(TWO_PHASE)),
            ("ROLLBACK nonsense", Kind::Refused(ODD)),
            ("ROLLBACK TO SAVEPOINT a", Kind::Savepoint("ROLLBACK TO SAVEPOINT")),
            ("ROLLBACK WORK TO a", Kind::Savepoint("ROLLBACK TO SAVEPOINT")),
            ("RELEASE a", Kind::Savepoint("RELEASE SAVEPOINT")),
            ("SAVEPOINT a", Kind::Savepoint("SAVEPOINT")),
            ("BEGIN nonsense", Kind::Other),
            ("START", Kind::Other),
            ("PREPARE transaction_by_id AS SELECT 1", Kind::Other),
            ("SET search_path = a", Kind::Other),
            ("SELECT 'COMMIT'", Kind::Other),
            ("\"commit\"", Kind::Other),
        ] {
            assert_eq!(kind(sql), expected, "{sql}");
        }
        assert!(matches!(kind("DEALLOCATE PREPARE ALL"), Kind::Refused(_)));
    }

    #[test]
    fn settings_of_a_transaction_are_seen() {
        let locals = |sql: &str| split(sql).iter().flat_map(SqlStatement::local_settings).collect::<Vec<_>>();
        for (sql, expected) in [
            ("SET LOCAL app.tenant = 'x'", &["app.tenant"][..]),
            ("set local statement_timeout to 5", &["statement_timeout"]),
            ("SET LOCAL ROLE bob", &["role"]),
            ("SET LOCAL TIME ZONE 'UTC'", &["timezone"]),
            ("SET app.tenant = 'x'", &[]),
            ("SELECT pg_catalog.set_config('app.tenant', 'x',true)", &["app.tenant"]),
            (
                "SELECT set_config('a.b', coalesce($1, f(2)), TRUE), set_config('a.c', 'x', true)",
                &["a.b", "a.c"],
            ),
            ("SELECT set_config('a.b', 'x', false)", &[]),
            ("SELECT set_config($1, $2, true)", &[]),
            ("SELECT 'set_config(''a'', ''b'', true)'", &[]),
            ("SELECT set_config('a', ", &[]),
            ("SELECT set_config()", &[]),
        ] {
            assert_eq!(locals(sql), expected, "{sql}");
        }
        assert!(split(r"SELECT pg_catalog.set_config('a',E'\\',true);")[0].is_local_setting());
        assert!(split("SELECT pg_catalog.set_config($1,$2,true)")[0].is_local_setting());
        assert!(!split("SELECT pg_catalog.set_config('a','b',true), 1")[0].is_local_setting());
        assert!(!split("SELECT pg_catalog.set_config($1,$2,false)")[0].is_local_setting());
        for (sql, expected) in [
            ("SELECT pg_catalog.set_config($1,$2,true)", &[0][..]),
            ("SELECT set_config($2, lower($1), true), set_config($3, $1, true)", &[1, 2]),
            ("SELECT set_config('a.b', $1, true), set_config($1, $2, false), set_config($0, '', true)", &[]),
        ] {
            assert_eq!(split(sql)[0].local_setting_parameters(), expected, "{sql}");
        }
    }
}
