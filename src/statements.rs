//! The prepared statements one connection keeps, and what may be passed where SQL is expected.

use std::num::NonZeroUsize;

use lru::LruCache;
use tokio_postgres::Statement;

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

/// A cached statement, and whether running it leaves state behind in the session.
#[derive(Clone, Debug)]
pub(crate) struct Cached {
    pub(crate) statement: Statement,
    pub(crate) leaves_state: bool,
}

/// The least recently used go first. The driver closes a statement on the server when its last clone is dropped, so an
/// evicted one goes as soon as no row of its result is left.
#[derive(Debug)]
pub(crate) struct Statements {
    cache: LruCache<Box<str>, Cached>,
}

impl Statements {
    pub(crate) fn new(capacity: usize) -> Self {
        Self { cache: LruCache::new(NonZeroUsize::new(capacity).unwrap_or(NonZeroUsize::MIN)) }
    }

    pub(crate) fn get(&mut self, sql: &str) -> Option<Cached> {
        // The same text again and again, as in a loop: neither hashed nor moved to the front, where it is.
        match self.cache.peek_mru() {
            Some((text, cached)) if **text == *sql => Some(cached.clone()),
            _ => self.cache.get(sql).cloned(),
        }
    }

    pub(crate) fn insert(&mut self, sql: &str, statement: Statement) -> Cached {
        let cached = Cached { statement, leaves_state: leaves_state(sql) };
        self.cache.put(sql.into(), cached.clone());
        cached
    }

    pub(crate) fn remove(&mut self, sql: &str) {
        self.cache.pop(sql);
    }

    pub(crate) fn clear(&mut self) {
        self.cache.clear();
    }

    pub(crate) fn len(&self) -> usize {
        self.cache.len()
    }
}

/// Whether a statement can leave something in the session that outlives its transaction.
///
/// Looked at once, when the text is first prepared. Errs on the side of "yes": what it costs is one reset in the
/// background. What it cannot see is a function that does such a thing inside.
fn leaves_state(sql: &str) -> bool {
    let sql = sql.to_ascii_lowercase();
    let mut words = sql.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).filter(|w| !w.is_empty());
    let rest = skip_comments(&sql);
    let first = rest.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).find(|w| !w.is_empty());
    let harmless = match first {
        Some(
            "select" | "with" | "insert" | "update" | "delete" | "merge" | "values" | "table" | "explain"
            | "copy" | "show" | "fetch" | "move" | "close" | "notify" | "lock" | "truncate" | "analyze"
            | "begin" | "start" | "commit" | "end" | "rollback" | "abort" | "savepoint" | "release",
        )
        | None => true,
        Some("set") => {
            let second = rest.split_whitespace().nth(1);
            matches!(second, Some("local" | "transaction" | "constraints"))
        }
        Some(_) => false,
    };
    !harmless
        || words.any(|word| {
            matches!(
                word,
                "set_config"
                    | "setseed"
                    | "pg_temp"
                    | "temp"
                    | "temporary"
                    | "nextval"
                    | "setval"
                    | "declare"
            ) || word.contains("advisory_lock")
                || word.contains("dblink")
        })
}

/// Whether the text begins with COPY.
pub(crate) fn is_copy(sql: &str) -> bool {
    skip_comments(sql).get(..4).is_some_and(|word| word.eq_ignore_ascii_case("copy"))
}

fn skip_comments(mut sql: &str) -> &str {
    loop {
        sql = sql.trim_start_matches(|c: char| c.is_whitespace() || c == '(' || c == ';');
        if let Some(comment) = sql.strip_prefix("--") {
            sql = comment.split_once('\n').map_or("", |(_, rest)| rest);
        } else if let Some(comment) = sql.strip_prefix("/*") {
            sql = comment.split_once("*/").map_or("", |(_, rest)| rest);
        } else {
            return sql;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::leaves_state;

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
        ] {
            assert!(leaves_state(sql), "{sql}");
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
            assert!(!leaves_state(sql), "{sql}");
        }
    }
}
