//! The prepared statements one connection keeps, and what may be passed where SQL is expected.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use lru::LruCache;
use postgres_types::Type;
use tokio_postgres::Column;

use crate::sql::{self, SqlStatement, Token};

/// What the verbs take: SQL text, which is prepared once per connection and kept in its cache, or a [`Statement`] that
/// was [prepared](crate::Connection::prepare) on this connection.
pub trait ToStatement: Sync {
    /// Which of the two it is.
    fn source(&self) -> Source<'_>;
}

/// What a [`ToStatement`] stands for.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a> {
    /// SQL text, to be prepared and cached.
    Text(&'a str),
    /// A statement that is prepared already.
    Prepared(&'a Statement),
}

impl ToStatement for str {
    fn source(&self) -> Source<'_> {
        Source::Text(self)
    }
}

impl ToStatement for String {
    fn source(&self) -> Source<'_> {
        Source::Text(self)
    }
}

impl ToStatement for Statement {
    fn source(&self) -> Source<'_> {
        Source::Prepared(self)
    }
}

impl<T: ToStatement + ?Sized> ToStatement for &T {
    fn source(&self) -> Source<'_> {
        (**self).source()
    }
}

/// A prepared statement, good on the connection that prepared it. Cheap to clone.
#[derive(Clone)]
pub struct Statement {
    inner: tokio_postgres::Statement,
    /// No other statement of this process has this number.
    number: u64,
    connection: u64,
    traits: Traits,
}

impl Statement {
    pub(crate) fn new(inner: tokio_postgres::Statement, connection: u64, traits: Traits) -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        Self { inner, number: NUMBER.fetch_add(1, Relaxed), connection, traits }
    }

    /// The types of its parameters.
    #[must_use]
    pub fn params(&self) -> &[Type] {
        self.inner.params()
    }

    /// The columns of its rows.
    #[must_use]
    pub fn columns(&self) -> &[Column] {
        self.inner.columns()
    }

    #[inline]
    pub(crate) fn inner(&self) -> &tokio_postgres::Statement {
        &self.inner
    }

    /// The number of the connection that prepared it.
    pub(crate) fn connection(&self) -> u64 {
        self.connection
    }

    #[inline]
    pub(crate) fn traits(&self) -> Traits {
        self.traits
    }
}

impl fmt::Debug for Statement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Statement")
            .field("params", &self.params())
            .field("columns", &self.columns())
            .finish_non_exhaustive()
    }
}

/// The least recently used go first. The driver closes a statement on the server when its last clone is dropped, so an
/// evicted one goes as soon as no row of its result is left.
#[derive(Debug)]
pub(crate) struct Statements {
    cache: LruCache<Box<str>, Statement>,
    capacity: usize,
}

impl Statements {
    /// Room is made as it is needed, whatever the capacity.
    pub(crate) fn new(capacity: usize) -> Self {
        Self { cache: LruCache::unbounded(), capacity: capacity.max(1) }
    }

    #[inline]
    pub(crate) fn get(&mut self, sql: &str) -> Option<&Statement> {
        // The same text again and again, as in a loop: neither hashed nor moved to the front, where it is.
        if self.cache.peek_mru().is_some_and(|(text, _)| **text == *sql) {
            return self.cache.peek_mru().map(|(_, statement)| statement);
        }
        self.cache.get(sql)
    }

    /// Keeps a statement; returns what it takes the place of, which is closed on the server when it is dropped.
    pub(crate) fn insert(&mut self, sql: &str, statement: Statement) -> Option<Statement> {
        let before = self.cache.put(sql.into(), statement);
        if self.cache.len() > self.capacity {
            self.cache.pop_lru().map(|(_, evicted)| evicted)
        } else {
            before
        }
    }

    pub(crate) fn remove(&mut self, sql: &str) {
        self.cache.pop(sql);
    }

    /// Removes a statement, whatever its text.
    pub(crate) fn forget(&mut self, statement: &Statement) {
        let text = self
            .cache
            .iter()
            .find(|(_, other)| other.number == statement.number)
            .map(|(text, _)| text.clone());
        if let Some(text) = text {
            self.cache.pop(&text);
        }
    }

    pub(crate) fn clear(&mut self) {
        self.cache.clear();
    }

    pub(crate) fn len(&self) -> usize {
        self.cache.len()
    }
}

/// What can be told of SQL from its text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Traits {
    /// It can leave something in the session that outlives its transaction.
    ///
    /// Errs on the side of "yes": what it costs is one reset in the background. What it cannot see is a function that
    /// does such a thing inside.
    pub(crate) leaves_state: bool,
    /// It is COPY.
    pub(crate) copy: bool,
    /// It is COPY from the client, or to it.
    pub(crate) copy_in: bool,
    pub(crate) copy_out: bool,
    /// It begins or ends transactions.
    pub(crate) controls: bool,
    /// It rolls back and chains: its tag is that of ROLLBACK TO.
    pub(crate) chains: bool,
}

impl Traits {
    /// Those of all the statements in a text.
    pub(crate) fn of(sql: &str) -> Self {
        let mut traits = Self::default();
        for statement in sql::split(sql) {
            traits.leaves_state |= leaves_state(&statement);
            if first(&statement).is_some_and(|word| word.eq_ignore_ascii_case("copy")) {
                traits.copy = true;
                traits.copy_in |= copies(&statement, "from");
                traits.copy_out |= copies(&statement, "to");
            }
            let roll_back = statement.word(0, "rollback") || statement.word(0, "abort");
            let chain = statement.tokens.windows(2).any(|t| t[0].is("and") && t[1].is("chain"));
            // The connection is to forget that it saw this, too.
            traits.leaves_state |= roll_back && chain;
            traits.chains |= roll_back && chain;
            let to = statement.tokens.iter().any(|token| token.is("to"));
            traits.controls |= roll_back && !to
                || ["begin", "start", "commit", "end"].iter().any(|word| statement.word(0, word))
                || statement.word(0, "prepare") && statement.word(1, "transaction");
        }
        traits
    }
}

/// Whether COPY goes this way between the server and its client; the grammar takes either name for the client's end.
fn copies(statement: &SqlStatement<'_>, way: &str) -> bool {
    let mut depth = 0;
    statement.tokens.windows(2).any(|pair| {
        match pair[0] {
            Token::Symbol(b'(') => depth += 1,
            Token::Symbol(b')') => depth -= 1,
            _ => {}
        }
        depth == 0 && pair[0].is(way) && (pair[1].is("stdin") || pair[1].is("stdout"))
    })
}

/// The first word, parentheses aside.
fn first<'a>(statement: &SqlStatement<'a>) -> Option<&'a str> {
    statement.tokens.iter().find_map(|token| match token {
        Token::Word(word) => Some(*word),
        _ => None,
    })
}

fn leaves_state(statement: &SqlStatement<'_>) -> bool {
    let harmless = match first(statement).map(str::to_ascii_lowercase).as_deref() {
        Some(
            "select" | "with" | "insert" | "update" | "delete" | "merge" | "values" | "table" | "explain"
            | "copy" | "show" | "fetch" | "move" | "close" | "notify" | "lock" | "truncate" | "analyze"
            | "begin" | "start" | "commit" | "end" | "rollback" | "abort" | "savepoint" | "release",
        )
        | None => true,
        Some("set") => ["local", "transaction", "constraints"].iter().any(|word| statement.word(1, word)),
        Some(_) => false,
    };
    // Quoted with escapes, a name can be spelt in any way.
    let escapes = statement
        .tokens
        .windows(3)
        .any(|tokens| matches!(tokens, [u, Token::Symbol(b'&'), Token::Quoted(_)] if u.is("u")));
    !harmless
        || escapes
        || statement.tokens.iter().any(|token| match token {
            Token::Quoted(name) => reveals(name),
            Token::Word(word) => reveals(word),
            Token::Text(_) | Token::Symbol(_) => false,
        })
}

/// Whether a name is one of what leaves state behind: a function, or a view that sets what it shows.
fn reveals(word: &str) -> bool {
    let word = word.to_ascii_lowercase();
    matches!(
        &*word,
        "set_config"
            | "setseed"
            | "pg_temp"
            | "temp"
            | "temporary"
            | "nextval"
            | "setval"
            | "declare"
            | "pg_settings"
            // These run SQL that is in a string.
            | "ts_stat"
            | "ts_rewrite"
    ) || word.starts_with("query_to_xml")
        || word.contains("advisory_lock")
        || word.contains("dblink")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_outlives_a_transaction_is_seen() {
        for sql in [
            "SET search_path = a",
            "set session characteristics as transaction read only",
            "  -- why\n /* not */ SET role x",
            "RESET ALL",
            "LISTEN jobs",
            "CREATE TEMP TABLE t (a int)",
            "SELECT 1 INTO TEMP t",
            "SELECT set_config('a.b', 'c', false)",
            "SELECT pg_advisory_lock(1)",
            "SELECT pg_try_advisory_lock_shared(1)",
            "select SetSeed(0.5)",
            "PREPARE p AS SELECT 1",
            "DO $$ begin end $$",
            "CALL p()",
            "LOAD 'x'",
            "SELECT nextval('s')",
            "UPDATE pg_settings SET setting = 'a' WHERE name = 'search_path'",
            "SELECT \"set_config\"('a.b', 'c', false)",
            r#"SELECT U&"set\005fconfig"('a.b', 'c', false)"#,
            r#"SELECT u&"set!005fconfig" UESCAPE '!' ('a.b', 'c', false)"#,
            "SELECT query_to_xml('select set_' || 'config(1)', true, true, '')",
            "SELECT 1; SET a.b = 1",
        ] {
            assert!(Traits::of(sql).leaves_state, "{sql}");
        }
    }

    #[test]
    fn everyday_statements_are_clean() {
        for sql in [
            "SELECT name FROM users WHERE id = $1",
            "(SELECT 1) UNION (SELECT 2)",
            "with x as (select 1) update t set a = 1 from x",
            "INSERT INTO t (a) VALUES ($1) RETURNING id",
            "DELETE FROM t",
            "SET LOCAL statement_timeout = 5",
            "SET CONSTRAINTS ALL DEFERRED",
            "SELECT pg_advisory_xact_lock(1)",
            "SELECT temperature FROM readings",
            "BEGIN",
            "NOTIFY jobs",
            "",
        ] {
            assert!(!Traits::of(sql).leaves_state, "{sql}");
        }
    }

    #[test]
    fn what_begins_or_ends_transactions_is_seen() {
        for sql in [
            "COMMIT",
            "/* a /* b */ */ end",
            "SELECT 1; rollback",
            "begin",
            "START TRANSACTION",
            "abort and chain",
        ] {
            assert!(Traits::of(sql).controls, "{sql}");
        }
        for sql in ["ROLLBACK TO a", "SAVEPOINT a", "RELEASE a", "SELECT 'commit'", "-- commit\nSELECT 1"] {
            assert!(!Traits::of(sql).controls, "{sql}");
        }
        assert!(Traits::of("rollback  work AND /**/ chain").chains);
        assert!(
            Traits::of("SELECT E'a'\n'\\''; ROLLBACK AND CHAIN; SELECT ''").chains,
            "a string that goes on"
        );
        assert!(
            Traits::of("CREATE FUNCTION begin() RETURNS int LANGUAGE sql AS 'SELECT 1'; ROLLBACK AND CHAIN")
                .chains
        );
        assert!(!Traits::of("rollback and no chain").chains && !Traits::of("commit and chain").chains);
    }

    #[test]
    fn copy_is_seen_behind_comments() {
        for sql in [
            "copy t from stdin",
            " /* a /* nested */ comment */ COPY t TO STDOUT",
            "-- a\nCOPY (SELECT 1) TO STDOUT",
        ] {
            assert!(Traits::of(sql).copy, "{sql}");
        }
        assert!(!Traits::of("SELECT 'copy'").copy && !Traits::of("").copy);
        assert!(Traits::of("COPY t (a, b) FROM STDIN (FORMAT csv)").copy_in);
        assert!(Traits::of("COPY (SELECT 'from stdin' FROM t) TO stdout").copy_out);
        for sql in
            ["COPY t FROM '/tmp/x'", "COPY t FROM PROGRAM 'x'", "COPY (SELECT 1 FROM stdin) TO '/tmp/x'"]
        {
            let traits = Traits::of(sql);
            assert!(traits.copy && !traits.copy_in && !traits.copy_out, "{sql}");
        }
    }
}
