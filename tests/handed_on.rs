//! What a session leaves behind stays behind: the next borrower finds nothing running, nothing set, nothing stale and
//! nobody else's errors; and a refused COPY or a query with too many rows costs nobody the session.
#![cfg(feature = "testing")]

mod common;

use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use common::{Database, polls, until_returned, within};
use pg_session::{Connection, Error, Session, SessionConfig, SessionManager, Transaction};

async fn database() -> Database {
    let db = Database::new().await;
    db.run("CREATE TABLE t (id bigint PRIMARY KEY)").await;
    db
}

async fn ids(db: &Database) -> Vec<i64> {
    let rows = db.watcher.query("SELECT id FROM t ORDER BY id", &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

/// The next borrower finds a session at rest, on which everything works and is stored.
async fn assert_next_is_clean(db: &Database, sessions: &SessionManager, after: &str) {
    let mut session = within(sessions.acquire()).await.unwrap_or_else(|e| panic!("after {after}: {e}"));
    db.until_quiet_but_for(after).await;
    let pid: i32 = within(session.query_one("SELECT pg_backend_pid()", &[]))
        .await
        .unwrap_or_else(|e| panic!("after {after}: {e}"))
        .get(0);
    assert_eq!(pid, session.process_id(), "after {after}");
    let number = 1_000_000 + db.number("SELECT count(*) FROM t").await;
    let stored = within(session.execute("INSERT INTO t VALUES ($1)", &[&number])).await;
    assert_eq!(stored.unwrap_or_else(|e| panic!("after {after}: {e}")), 1, "after {after}");
    let there = format!("SELECT count(*) FROM t WHERE id = {number}");
    assert_eq!(db.number(&there).await, 1, "after {after}: told that it is stored, and it is not");
    {
        let mut rows = within(session.query_stream("SELECT 1", &[]))
            .await
            .unwrap_or_else(|e| panic!("after {after}: {e}"));
        while let Some(row) = within(rows.next()).await {
            row.unwrap_or_else(|e| panic!("after {after}: {e}"));
        }
    }
    let told = within(session.transaction(async |tx| tx.execute("SELECT 1", &[]).await)).await;
    told.unwrap_or_else(|e| panic!("after {after}: {e}"));
    db.run(&format!("DELETE FROM t WHERE id = {number}")).await;
    drop(session);
    until_returned(sessions).await;
}

trait Quiet {
    async fn until_quiet_but_for(&self, after: &str);
}

impl Quiet for Database {
    /// A lent session that has done nothing yet runs nothing and is in no transaction: seen at once, not waited for.
    async fn until_quiet_but_for(&self, after: &str) {
        let busy = self.number(&format!("SELECT count(*) FROM ({}) busy", Self::BUSY)).await;
        // What closes meanwhile is no longer lent to anybody.
        if busy > 0 {
            let lent = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
                        AND pid <> pg_backend_pid() AND backend_type = 'client backend'";
            assert!(self.number(lent).await > busy, "after {after}: lent while something runs on it");
        }
    }
}

// Too many rows.

/// More than sockets hold, and slow at its end.
const MANY: &str = "SELECT repeat('x', 5000), pg_sleep(CASE WHEN i = 2000 THEN 1 ELSE 0 END) \
                    FROM generate_series(1, 2000) i";

#[derive(Clone, Copy, Debug)]
enum Few {
    One,
    Opt,
}

async fn few(db: &Connection, few: Few, sql: &str) -> Result<(), Error> {
    match few {
        Few::One => db.query_one(sql, &[]).await.map(drop),
        Few::Opt => db.query_opt(sql, &[]).await.map(drop),
    }
}

#[tokio::test]
async fn too_many_rows_are_told_and_nothing_of_them_is_handed_on() {
    let db = database().await;
    let sessions = db.single();
    for which in [Few::One, Few::Opt] {
        for sql in [MANY, "SELECT generate_series(1, 300000)", "SELECT generate_series(1, 2)"] {
            let session = within(sessions.acquire()).await.unwrap();
            let told = within(few(&session, which, sql)).await;
            assert!(matches!(told, Err(Error::TooManyRows)), "{which:?} {sql}: {told:?}");
            drop(session);
            assert_next_is_clean(&db, &sessions, sql).await;
        }
    }
    let session = within(sessions.acquire()).await.unwrap();
    let told = within(session.query_one("SELECT 1 WHERE false", &[])).await;
    assert!(matches!(told, Err(Error::NoRow)), "{told:?}");
    assert!(within(session.query_opt("SELECT 1 WHERE false", &[])).await.unwrap().is_none());
}

#[tokio::test]
async fn a_session_is_as_before_after_too_many_rows() {
    let db = database().await;
    let sessions = db.single();
    for which in [Few::One, Few::Opt] {
        db.run("TRUNCATE t").await;
        let mut session = within(sessions.acquire()).await.unwrap();
        let pid = session.process_id();
        let told = within(few(&session, which, "SELECT generate_series(1, 300000)")).await;
        assert!(matches!(told, Err(Error::TooManyRows)), "{which:?}: {told:?}");
        let rows = (1..=10i64).map(|n| (n,));
        let many = within(session.execute_many("INSERT INTO t VALUES ($1)", rows)).await;
        assert_eq!(many.unwrap_or_else(|e| panic!("{which:?}: {e:?}")), 10);
        assert_eq!(ids(&db).await.len(), 10);
        assert_eq!(session.process_id(), pid);
        within(session.query_one("SELECT 1", &[])).await.unwrap();
    }
}

#[tokio::test]
async fn too_many_rows_inside_a_transaction_harm_nothing_of_it() {
    let db = database().await;
    let sessions = db.single();
    for which in [Few::One, Few::Opt] {
        db.run("TRUNCATE t").await;
        let told: Result<(), Error> = within(sessions.transaction(async |tx| {
            tx.execute("INSERT INTO t VALUES (0)", &[]).await?;
            let told = few(tx, which, "SELECT generate_series(1, 300000)").await;
            assert!(matches!(told, Err(Error::TooManyRows)), "{which:?}: {told:?}");
            let rows = (1..=10i64).map(|n| (n,));
            assert_eq!(tx.execute_many("INSERT INTO t VALUES ($1)", rows).await?, 10);
            Ok(())
        }))
        .await;
        told.unwrap_or_else(|e| panic!("{which:?}: {e:?}"));
        assert_eq!(ids(&db).await.len(), 11, "{which:?}");
    }
}

#[tokio::test]
async fn a_query_by_copy_out_is_an_error_and_nothing_of_it_is_handed_on() {
    let db = database().await;
    let sessions = db.single();
    for sql in [MANY, "SELECT 1", "SELECT 1, pg_sleep(2)", "INSERT INTO t VALUES (5)"] {
        let session = within(sessions.acquire()).await.unwrap();
        let told = within(session.copy_out(sql)).await.map(drop);
        assert!(told.is_err(), "{sql}");
        drop(session);
        assert_next_is_clean(&db, &sessions, sql).await;
        let session = within(sessions.acquire()).await.unwrap();
        within(session.copy_out(sql)).await.map(drop).unwrap_err();
        within(session.query_one("SELECT 1", &[])).await.unwrap_or_else(|e| panic!("{sql}: {e}"));
        drop(session);
        assert_next_is_clean(&db, &sessions, sql).await;
    }
}

// Errors of others.

#[tokio::test]
async fn nobody_is_told_of_an_earlier_borrowers_error() {
    let db = database().await;
    db.run("INSERT INTO t VALUES (1)").await;
    let sessions = db.single();
    const REFUSED: &str = "INSERT INTO t VALUES (1)";
    let mut wrong = Vec::new();
    for text in [false, true] {
        let begin = async |session: &Session| {
            if text {
                session.batch_execute("BEGIN").await
            } else {
                session.execute("BEGIN", &[]).await.map(drop)
            }
        };
        for by_hand in [false, true] {
            let mut session = within(sessions.acquire()).await.unwrap();
            let pid = session.process_id();
            let refused = within(session.transaction(async |tx| tx.execute(REFUSED, &[]).await)).await;
            assert!(refused.unwrap_err().is_unique_violation());
            within(begin(&session)).await.unwrap();
            let refused = if text {
                within(session.batch_execute(REFUSED)).await
            } else {
                within(session.execute(REFUSED, &[])).await.map(drop)
            };
            assert!(refused.unwrap_err().is_unique_violation());
            drop(session);
            until_returned(&sessions).await;
            let mut session = within(sessions.acquire()).await.unwrap();
            assert_eq!(session.process_id(), pid, "the same connection");
            // In a raw transaction, in one by hand, and in one that is not told of its error until the next statement.
            let error = if by_hand {
                let tx = session.begin().await.unwrap();
                let _ = within(tx.execute("SELECT 'x'::text::int", &[])).await;
                within(tx.commit()).await.unwrap_err()
            } else {
                within(begin(&session)).await.unwrap();
                within(session.execute("SELECT 'x'::text::int", &[])).await.unwrap_err();
                within(session.execute("SELECT 1", &[])).await.unwrap_err()
            };
            let code = error.code().map(|code| code.code().to_owned());
            if code.as_deref() != Some("22P02") && code.as_deref() != Some("25P02")
                || error.constraint().is_some()
            {
                wrong.push(format!("text {text}, by hand {by_hand}: {error:?}"));
            }
            drop(session);
            until_returned(&sessions).await;
            // A transaction whose connection is lost names no error at all but that.
            let session = within(sessions.acquire()).await.unwrap();
            within(begin(&session)).await.unwrap();
            within(session.execute(REFUSED, &[])).await.unwrap_err();
            drop(session);
            let mut session = within(sessions.acquire()).await.unwrap();
            let told: Result<(), Error> = within(session.transaction(async |tx| {
                tx.execute("SELECT 1", &[]).await?;
                let _ = tx.execute("SELECT pg_terminate_backend(pg_backend_pid())", &[]).await;
                Ok(())
            }))
            .await;
            let error = told.unwrap_err();
            let code = error.code().map(|code| code.code().to_owned());
            if error.constraint().is_some() || !matches!(code.as_deref(), None | Some("57P01")) {
                wrong.push(format!("text {text}, lost: {error:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

// COPY where no COPY was asked for.

#[derive(Clone, Copy, Debug)]
enum Way {
    Execute,
    Query,
    QueryOne,
    Text,
    CopyOut,
    Stream,
    Batch,
}

const WAYS: [Way; 7] =
    [Way::Execute, Way::Query, Way::QueryOne, Way::Text, Way::CopyOut, Way::Stream, Way::Batch];

const COPIES: [&str; 4] = [
    "COPY t FROM STDIN",
    "copy t (id) from stdin (FORMAT csv)",
    "/* /* nested */ */ COPY t FROM STDIN",
    "-- a comment\n COPY t FROM STDIN",
];

async fn say(db: &Connection, way: Way, sql: &str) -> Result<(), Error> {
    match way {
        Way::Execute => db.execute(sql, &[]).await.map(drop),
        Way::Query => db.query(sql, &[]).await.map(drop),
        Way::QueryOne => db.query_one(sql, &[]).await.map(drop),
        Way::Text => db.batch_execute(sql).await,
        Way::CopyOut => {
            let mut data = db.copy_out(sql).await?;
            while let Some(piece) = data.next().await {
                piece?;
            }
            Ok(())
        }
        Way::Stream => {
            let mut rows = db.query_stream(sql, &[]).await?;
            while let Some(row) = rows.next().await {
                row?;
            }
            Ok(())
        }
        Way::Batch => unreachable!("it needs more than a connection"),
    }
}

async fn say_outside(session: &mut Session, way: Way, sql: &str) -> Result<(), Error> {
    match way {
        Way::Batch => session.batch().push("SELECT 1", ()).push(sql, ()).run().await.map(drop),
        _ => say(session, way, sql).await,
    }
}

async fn say_inside(tx: &Transaction<'_>, way: Way, sql: &str) -> Result<(), Error> {
    match way {
        Way::Batch => tx.batch().push("SELECT 1", ()).push(sql, ()).run().await.map(drop),
        _ => say(tx, way, sql).await,
    }
}

#[tokio::test]
async fn copy_from_by_another_verb_is_an_error_of_that_call_only() {
    let db = database().await;
    let sessions = db.single();
    let mut wrong = Vec::new();
    for way in WAYS {
        for sql in COPIES {
            let mut session = within(sessions.acquire()).await.unwrap();
            let told = within(say_outside(&mut session, way, sql)).await;
            let next = within(session.query_one("SELECT 7", &[])).await;
            if told.is_ok() || next.is_err() {
                wrong.push(format!("{way:?} {sql:?}: {told:?}, then {:?}", next.map(drop)));
            }
            drop(session);
            assert_next_is_clean(&db, &sessions, sql).await;
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
    assert_eq!(ids(&db).await, [0; 0]);
}

#[tokio::test]
async fn copy_from_by_another_verb_in_a_transaction_is_an_error_and_no_unknown_commit() {
    let db = database().await;
    let sessions = db.single();
    let mut wrong = Vec::new();
    for way in WAYS {
        for sql in COPIES {
            let told: Result<(), Error> = within(sessions.transaction(async |tx| {
                tx.execute("INSERT INTO t VALUES (1)", &[]).await?;
                if say_inside(tx, way, sql).await.is_ok() {
                    wrong_if_ok();
                }
                Ok(())
            }))
            .await;
            // A refusal by the crate itself leaves the transaction as it was; one by the server aborts it.
            let there = !ids(&db).await.is_empty();
            let right = match &told {
                Ok(()) => there,
                Err(e) => !there && !e.is_outcome_unknown() && !e.is_connection_lost(),
            };
            if !right {
                wrong.push(format!("{way:?} {sql:?}: {told:?}, stored: {there}"));
            }
            db.run("TRUNCATE t").await;
            assert_next_is_clean(&db, &sessions, sql).await;
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

fn wrong_if_ok() {
    panic!("COPY FROM STDIN without data was Ok");
}

#[tokio::test]
async fn copy_to_by_another_verb_leaves_the_session_usable() {
    let db = database().await;
    let sessions = db.single();
    let mut wrong = Vec::new();
    for sql in [
        "COPY (SELECT 1) TO STDOUT",
        "COPY (SELECT repeat('x', 1000) FROM generate_series(1, 5000)) TO STDOUT",
    ] {
        for way in WAYS {
            let mut session = within(sessions.acquire()).await.unwrap();
            let told = within(say_outside(&mut session, way, sql)).await;
            let next = within(session.query_one("SELECT 7", &[])).await;
            if next.is_err() {
                wrong.push(format!("{way:?} {sql:?}: {told:?}, then {:?}", next.map(drop)));
            }
            drop(session);
            assert_next_is_clean(&db, &sessions, sql).await;
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

/// COPYs that the server refuses at their start, with their SQLSTATEs.
const REFUSED: [(&str, &str); 4] = [
    ("COPY missing FROM STDIN", "42P01"),
    ("COPY t FROM STDIN (NO_SUCH_OPTION true)", "42601"),
    ("COPY t (nothing) FROM STDIN", "42703"),
    ("COPY forbidden FROM STDIN", "42501"),
];

#[tokio::test]
async fn a_copy_that_is_refused_at_its_start_costs_nobody_the_session() {
    let db = database().await;
    let role = format!("poor_{}", db.database.name());
    db.run(&format!(
        "CREATE TABLE forbidden (id bigint); CREATE ROLE {role} LOGIN; GRANT ALL ON t TO {role}"
    ))
    .await;
    let config: SessionConfig = db.database.url().replace("postgres@", &format!("{role}@")).parse().unwrap();
    let sessions = SessionManager::new(config.max_size(1)).unwrap();
    for (sql, code) in REFUSED {
        db.run("TRUNCATE t").await;
        // On its own.
        let mut session = within(sessions.acquire()).await.unwrap();
        let pid = session.process_id();
        let error = within(session.copy_in(sql)).await.map(drop).unwrap_err();
        assert_eq!(error.code().map(|c| c.code()), Some(code), "{sql}: {error}");
        within(session.query_one("SELECT 1", &[])).await.unwrap_or_else(|e| panic!("{sql}: {e}"));
        // In a savepoint.
        let told: Result<(), Error> = within(session.transaction(async |tx| {
            tx.execute("INSERT INTO t VALUES (1)", &[]).await?;
            let inner: Result<(), Error> = tx.savepoint(async |sp| sp.copy_in(sql).await.map(drop)).await;
            let error = inner.unwrap_err();
            assert_eq!(error.code().map(|c| c.code()), Some(code), "{sql}: {error}");
            tx.execute("INSERT INTO t VALUES (2)", &[]).await.map(drop)
        }))
        .await;
        told.unwrap_or_else(|e| panic!("{sql}: {e}"));
        assert_eq!(ids(&db).await, [1, 2], "{sql}");
        // In a transaction, which it aborts as any error does.
        let told: Result<(), Error> = within(session.transaction(async |tx| {
            tx.execute("INSERT INTO t VALUES (3)", &[]).await?;
            let _ = tx.copy_in(sql).await;
            Ok(())
        }))
        .await;
        let error = told.unwrap_err();
        assert_eq!(error.code().map(|c| c.code()), Some(code), "{sql}: {error:?}");
        within(session.execute("INSERT INTO t VALUES (4)", &[])).await.unwrap();
        let mut copy = within(session.copy_in("COPY t FROM STDIN")).await.unwrap();
        within(copy.send(Bytes::from_static(b"5\n"))).await.unwrap();
        assert_eq!(within(copy.finish()).await.unwrap(), 1);
        assert_eq!(ids(&db).await, [1, 2, 4, 5], "{sql}");
        assert_eq!(session.process_id(), pid, "{sql}");
    }
    drop(sessions);
    db.until(&format!("NOT EXISTS (SELECT FROM pg_stat_activity WHERE usename = '{role}')")).await;
    db.run(&format!("DROP OWNED BY {role}; DROP ROLE {role}")).await;
}

#[tokio::test]
async fn a_copy_is_refused_in_read_only_and_in_aborted_transactions_with_the_right_code() {
    let db = database().await;
    let sessions = db.single();
    let mut session = within(sessions.acquire()).await.unwrap();
    let pid = session.process_id();
    let options = pg_session::TransactionOptions::new().read_only();
    let told: Result<(), Error> = within(session.transaction_with(options, async |tx| {
        tx.execute("SELECT 1", &[]).await?;
        tx.copy_in("COPY t FROM STDIN").await.map(drop)
    }))
    .await;
    assert_eq!(told.unwrap_err().code().unwrap().code(), "25006");
    let told: Result<(), Error> = within(session.transaction(async |tx| {
        let _ = tx.execute("SELECT 1/0", &[]).await;
        let copy = tx.copy_in("COPY t FROM STDIN").await.map(drop);
        let error = copy.unwrap_err();
        assert_eq!(error.code().unwrap().code(), "22012", "the first error: {error:?}");
        Ok(())
    }))
    .await;
    assert_eq!(told.unwrap_err().code().unwrap().code(), "22012");
    within(session.execute("INSERT INTO t VALUES (1)", &[])).await.unwrap();
    assert_eq!(session.process_id(), pid);
}

// State.

#[tokio::test]
async fn a_setting_changed_by_update_is_not_handed_on() {
    let db = database().await;
    let sessions = db.single();
    let session = within(sessions.acquire()).await.unwrap();
    let update = "UPDATE pg_settings SET setting = '5000' WHERE name = 'lock_timeout'";
    within(session.execute(update, &[])).await.unwrap();
    drop(session);
    let mut session = within(sessions.acquire()).await.unwrap();
    let shown: String = within(session.query_one("SHOW lock_timeout", &[])).await.unwrap().get(0);
    assert_eq!(shown, "0");
    within(
        session
            .batch()
            .push("UPDATE pg_catalog.pg_settings SET setting = '6000' WHERE name = 'lock_timeout'", ())
            .run(),
    )
    .await
    .unwrap();
    drop(session);
    let session = within(sessions.acquire()).await.unwrap();
    let shown: String = within(session.query_one("SHOW lock_timeout", &[])).await.unwrap().get(0);
    assert_eq!(shown, "0");
}

#[tokio::test]
async fn what_a_statement_of_an_earlier_session_leaves_is_not_handed_on() {
    let db = database().await;
    let sessions = db.single();
    let session = within(sessions.acquire()).await.unwrap();
    let pid = session.process_id();
    let statement = within(session.prepare("SELECT pg_advisory_lock(77)")).await.unwrap();
    drop(session);
    until_returned(&sessions).await;
    let session = within(sessions.acquire()).await.unwrap();
    assert_eq!(session.process_id(), pid);
    within(session.query(&statement, &[])).await.unwrap();
    drop(session);
    let session = within(sessions.acquire()).await.unwrap();
    let locks = format!("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = {pid}");
    assert_eq!(db.number(&locks).await, 0);
    drop(session);
}

// What was forgotten and not dropped.

#[expect(clippy::mem_forget, reason = "that it harms nobody is what is tested")]
fn forget<T>(value: T) {
    std::mem::forget(value);
}

/// Polls a future so often, and then forgets it.
async fn half<F: Future>(future: F, left: usize) {
    let mut future = Box::pin(future);
    drop(polls(&mut future, left).await);
    forget(future);
}

#[derive(Clone, Copy, Debug)]
enum Forgotten {
    Begun,
    BegunAndUsed,
    Stream,
    StreamRead,
    CopyIn,
    CopyOut,
    RowsOut,
    Query,
    Text,
    HalfAfterDropped,
    HalfBesideDropped,
    Closure,
    Savepoint,
    Batch,
    Many,
    Commit,
    Client,
}

const FORGOTTEN: [Forgotten; 17] = [
    Forgotten::Begun,
    Forgotten::BegunAndUsed,
    Forgotten::Stream,
    Forgotten::StreamRead,
    Forgotten::CopyIn,
    Forgotten::CopyOut,
    Forgotten::RowsOut,
    Forgotten::Query,
    Forgotten::Text,
    Forgotten::HalfAfterDropped,
    Forgotten::HalfBesideDropped,
    Forgotten::Closure,
    Forgotten::Savepoint,
    Forgotten::Batch,
    Forgotten::Many,
    Forgotten::Commit,
    Forgotten::Client,
];

async fn forget_half(session: &mut Session, what: Forgotten) {
    const LONG: &str = "SELECT repeat('x', 1000) FROM generate_series(1, 20000)";
    const SLEEP: &str = "SELECT pg_sleep(20)";
    match what {
        Forgotten::Begun => forget(session.begin().await.unwrap()),
        Forgotten::BegunAndUsed => {
            let tx = session.begin().await.unwrap();
            tx.execute("INSERT INTO t VALUES (1)", &[]).await.unwrap();
            forget(tx);
        }
        Forgotten::Stream => forget(session.query_stream(LONG, &[]).await.unwrap()),
        Forgotten::StreamRead => {
            let mut rows = session.query_stream(LONG, &[]).await.unwrap();
            rows.next().await.unwrap().unwrap();
            forget(rows);
        }
        Forgotten::CopyIn => {
            let mut copy = session.copy_in("COPY t FROM STDIN").await.unwrap();
            copy.send(Bytes::from_static(b"1\n")).await.unwrap();
            forget(copy);
        }
        Forgotten::CopyOut => {
            forget(session.copy_out(&format!("COPY ({LONG}) TO STDOUT")).await.unwrap());
        }
        Forgotten::RowsOut => forget(session.copy_query_out(LONG).await.unwrap()),
        Forgotten::Query => {
            session.prepare(SLEEP).await.unwrap();
            half(session.query(SLEEP, &[]), 1).await;
        }
        Forgotten::Text => half(session.batch_execute(SLEEP), 1).await,
        Forgotten::HalfAfterDropped => {
            session.prepare(SLEEP).await.unwrap();
            session.prepare("SELECT 1").await.unwrap();
            let dropped = polls(session.query(SLEEP, &[]), 1);
            half(
                async {
                    dropped.await;
                    session.query("SELECT 1", &[]).await
                },
                2,
            )
            .await;
        }
        Forgotten::HalfBesideDropped => {
            session.prepare(SLEEP).await.unwrap();
            session.prepare("SELECT 1").await.unwrap();
            half(session.query("SELECT 1", &[]), 1).await;
            drop(polls(session.query(SLEEP, &[]), 1).await);
        }
        Forgotten::Closure => {
            let work = session.transaction(async |tx| {
                tx.execute("INSERT INTO t VALUES (1)", &[]).await?;
                tx.execute(SLEEP, &[]).await
            });
            half(work, 4).await;
        }
        Forgotten::Savepoint => {
            let work = session.transaction(async |tx| {
                tx.savepoint(async |sp| {
                    sp.execute("INSERT INTO t VALUES (1)", &[]).await?;
                    sp.execute(SLEEP, &[]).await
                })
                .await
            });
            half(work, 4).await;
        }
        Forgotten::Batch => {
            session.prepare(SLEEP).await.unwrap();
            let mut batch = session.batch();
            batch.push(SLEEP, ());
            half(batch.run(), 2).await;
        }
        Forgotten::Many => {
            session.prepare("SELECT pg_sleep($1)").await.unwrap();
            half(session.execute_many("SELECT pg_sleep($1)", [(20f64,)]), 2).await;
        }
        Forgotten::Commit => {
            let tx = session.begin().await.unwrap();
            tx.execute("INSERT INTO t VALUES (1)", &[]).await.unwrap();
            half(tx.commit(), 1).await;
        }
        Forgotten::Client => {
            let client = session.client().await.unwrap();
            half(client.query_raw(SLEEP, Vec::<i32>::new()), 2).await;
        }
    }
}

#[tokio::test]
async fn what_is_forgotten_instead_of_dropped_harms_no_later_borrower() {
    let db = database().await;
    let mut tasks = Vec::new();
    for what in FORGOTTEN {
        let db = database().await;
        tasks.push(tokio::spawn(async move {
            let sessions =
                SessionManager::new(db.config().max_size(1).acquire_timeout(Duration::from_secs(15)))
                    .expect("a configuration");
            drop(sessions.acquire().await.expect("a session"));
            let mut session = sessions.acquire().await.expect("a session");
            within(forget_half(&mut session, what)).await;
            drop(session);
            for turn in 1..=2 {
                assert_next_is_clean(&db, &sessions, &format!("{what:?}, borrower {turn}")).await;
            }
            // A COMMIT on its way may arrive.
            assert!(matches!(what, Forgotten::Commit) || ids(&db).await.is_empty(), "{what:?}");
            assert_eq!(sessions.status().size, 1, "{what:?}");
        }));
    }
    let mut harmed = 0;
    for task in tasks {
        harmed += u32::from(task.await.is_err());
    }
    drop(db);
    assert_eq!(harmed, 0, "of {} (see above)", FORGOTTEN.len());
}

// Stale statements.

#[tokio::test]
async fn statements_for_many_rows_and_in_batches_heal_after_a_change_of_the_table() {
    let db = database().await;
    db.run("CREATE TABLE u (a bigint)").await;
    const INSERT: &str = "INSERT INTO u VALUES ($1) RETURNING *";
    let sessions = db.single();
    #[derive(Clone, Copy, Debug)]
    enum By {
        Many,
        ManyInside,
        Batch,
        BatchInside,
    }
    let insert = async |by: By| {
        let mut session = within(sessions.acquire()).await?;
        match by {
            By::Many => within(session.execute_many(INSERT, [(1i64,), (2,)])).await.map(drop),
            By::ManyInside => {
                within(
                    session.transaction(async |tx| tx.execute_many(INSERT, [(1i64,), (2,)]).await.map(drop)),
                )
                .await
            }
            By::Batch => within(session.batch().push(INSERT, (1i64,)).run()).await.map(drop),
            By::BatchInside => {
                within(session.transaction(async |tx| tx.batch().push(INSERT, (1i64,)).run().await.map(drop)))
                    .await
            }
        }
    };
    for (n, by) in [By::Many, By::ManyInside, By::Batch, By::BatchInside].into_iter().enumerate() {
        insert(by).await.unwrap();
        insert(by).await.unwrap();
        db.run(&format!("ALTER TABLE u ADD COLUMN c{n} int")).await;
        let first: Result<(), Error> = insert(by).await; // may fail once
        insert(by).await.unwrap_or_else(|e| panic!("{by:?}: not healed: {e}, after {first:?}"));
        insert(by).await.unwrap();
    }
}

#[tokio::test]
async fn an_enum_that_was_dropped_and_made_anew_works_again() {
    let db = database().await;
    let sessions = db.single();
    const MOOD: &str = "CREATE TYPE mood AS ENUM ('sad', 'happy')";
    db.run(MOOD).await;
    for _ in 0..2 {
        let session = within(sessions.acquire()).await.unwrap();
        within(session.query("SELECT 'sad'::mood", &[])).await.unwrap();
        within(session.query("SELECT $1::mood", &[&Option::<Mood>::None])).await.unwrap();
    }
    for _ in 0..2 {
        db.run(&format!("DROP TYPE mood; {MOOD}")).await;
        let mut told = Vec::new();
        for _ in 0..3 {
            let session = within(sessions.acquire()).await.unwrap();
            let one = within(session.query("SELECT 'sad'::mood", &[])).await.map(drop);
            let other = within(session.query("SELECT $1::mood", &[&Option::<Mood>::None])).await.map(drop);
            told.push((one, other));
        }
        assert!(matches!(told[2], (Ok(()), Ok(()))), "in the third session: {told:?}");
    }
}

/// Accepts any type, to pass NULL as a value of an enum.
#[derive(Debug)]
struct Mood;

impl postgres_types::ToSql for Mood {
    fn to_sql(
        &self,
        _: &postgres_types::Type,
        _: &mut bytes::BytesMut,
    ) -> Result<postgres_types::IsNull, Box<dyn std::error::Error + Sync + Send>> {
        Ok(postgres_types::IsNull::Yes)
    }

    fn accepts(_: &postgres_types::Type) -> bool {
        true
    }

    postgres_types::to_sql_checked!();
}

#[tokio::test]
async fn custom_types_work_after_a_function_deallocated_everything() {
    let db = database().await;
    db.run(
        "CREATE TYPE one AS ENUM ('a'); CREATE TYPE two AS ENUM ('a'); CREATE TYPE three AS (x int, y one);
         CREATE FUNCTION forget() RETURNS int LANGUAGE plpgsql AS $$ BEGIN EXECUTE 'DEALLOCATE ALL'; RETURN 1; END $$",
    )
    .await;
    let sessions = db.single();
    let session = within(sessions.acquire()).await.unwrap();
    within(session.query("SELECT 'a'::one", &[])).await.unwrap();
    within(session.query("SELECT forget()", &[])).await.unwrap();
    drop(session);
    for sql in ["SELECT 'a'::one", "SELECT 'a'::two", "SELECT NULL::three", "SELECT 'a'::two, 1"] {
        let mut told = Vec::new();
        for _ in 0..3 {
            let session = within(sessions.acquire()).await.unwrap();
            told.push(within(session.query(sql, &[])).await.map(drop));
        }
        assert!(told[2].is_ok(), "in the third session, {sql}: {told:?}");
    }
}
