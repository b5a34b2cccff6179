//! What quotes data is shown to those who ask for it, and to nobody else: not by `Debug`, and not in the log.
#![cfg(feature = "testing")]

mod common;

use std::error::Error as StdError;
use std::fmt::Debug;

use bytes::BytesMut;
use common::Database;
use pg_session::tokio_postgres::types::{IsNull, ToSql, Type, to_sql_checked};
use pg_session::{Error, RetryPolicy, Session, SessionManager, TransactionOptions};

const SECRET: &str = "hunter2";

/// A value whose conversion fails with words that quote it.
#[derive(Debug)]
struct Leaky;

impl ToSql for Leaky {
    fn to_sql(&self, _: &Type, _: &mut BytesMut) -> Result<IsNull, Box<dyn StdError + Sync + Send>> {
        Err(format!("cannot convert {SECRET}").into())
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    to_sql_checked!();
}

const SCHEMA: &str = "
    CREATE TABLE t (a text CONSTRAINT a_key UNIQUE, b text CONSTRAINT b_check CHECK (b <> 'hunter2'), c int);
    INSERT INTO t VALUES ('hunter2', '', 0);
    CREATE FUNCTION raises() RETURNS void LANGUAGE plpgsql AS $$ BEGIN
        RAISE 'hunter2' USING DETAIL = 'hunter2', HINT = 'hunter2', DATATYPE = 'hunter2', SCHEMA = 'hunter2';
    END $$;
    CREATE FUNCTION inside(what text) RETURNS void LANGUAGE plpgsql AS $$ BEGIN
        EXECUTE format('SELECT %L FROM', what);
    END $$;
    CREATE FUNCTION again() RETURNS void LANGUAGE plpgsql AS $$ BEGIN
        RAISE 'hunter2' USING ERRCODE = '40001', DETAIL = 'hunter2';
    END $$";

/// Errors that hold the secret, each in a place of its own, with what may be shown of them.
async fn leaky_errors(sessions: &SessionManager, session: &mut Session) -> Vec<(Error, Vec<&'static str>)> {
    let mut errors: Vec<(Error, Vec<&'static str>)> = Vec::new();
    let mut add = |error: Error, shows: &[&'static str]| errors.push((error, shows.to_vec()));

    // DETAIL: the key, the row.
    let insert = "INSERT INTO t (a, b) VALUES ($1, $2)";
    let duplicate = session.execute(insert, &[&SECRET, &""]).await.unwrap_err();
    add(duplicate, &["23505", "ERROR", "a_key", "_bt_check_unique"]);
    add(
        session.execute(insert, &[&"", &SECRET]).await.unwrap_err(),
        &["23514", "b_check", "ExecConstraints"],
    );
    // The message.
    let cast = session.query_one("SELECT $1::text::uuid", &[&SECRET]).await.unwrap_err();
    assert!(cast.to_string().contains(SECRET), "for those who ask: {cast}");
    add(cast, &["22P02", "string_to_uuid"]);
    // Message, DETAIL, HINT and the rest.
    add(session.execute("SELECT raises()", &[]).await.unwrap_err(), &["P0001", "exec_stmt_raise"]);
    // The internal query.
    let inside = session.execute("SELECT inside($1)", &[&SECRET]).await.unwrap_err();
    add(inside, &["42601"]);
    // The context of a COPY.
    let mut copy = session.copy_in("COPY t (c) FROM STDIN").await.unwrap();
    let _ = copy.send(SECRET.into()).await;
    add(copy.finish().await.unwrap_err(), &["22P02"]);
    let rows = [(SECRET, 1)];
    let refused = session.copy_rows_in("t", &["a", "c"]).send(rows).await.unwrap_err();
    add(refused, &["Copy", "row", "23505", "a_key"]);
    // The source: what a value's conversion failed with.
    add(session.execute("SELECT $1::text", &[&Leaky]).await.unwrap_err(), &["serializing parameter"]);
    add(session.copy_rows_in("t", &["a"]).send([(Leaky,)]).await.unwrap_err(), &["Copy", "row"]);
    let many = session.execute_many("INSERT INTO t (a) VALUES ($1)", [(Leaky,)]).await.unwrap_err();
    add(many, &["Batch", "Row(1)", "parameter: 1"]);
    // In a batch.
    let mut batch = sessions.batch();
    batch.push("SELECT 1", ()).push("INSERT INTO t (a) VALUES ($1)", (SECRET,));
    add(batch.run().await.unwrap_err(), &["Batch", "Statement(2)", "23505", "a_key"]);
    // Read off the wire.
    let swallowed: Result<(), Error> = session
        .transaction(async |tx| {
            let _ = tx.execute(insert, &[&SECRET, &""]).await;
            Ok(())
        })
        .await;
    add(swallowed.unwrap_err(), &["Aborted", "23505", "a_key", "_bt_check_unique"]);
    let policy = RetryPolicy::default().max_attempts(2).base_delay(std::time::Duration::ZERO);
    let options = TransactionOptions::new().retry(policy);
    let in_vain = sessions
        .transaction_with(options, async |tx| tx.execute("SELECT again()", &[]).await)
        .await
        .unwrap_err();
    add(in_vain, &["RetriesExhausted", "40001"]);
    // In the middle of a stream.
    let mut rows = session.query_stream("SELECT raises() FROM generate_series(1, 2)", &[]).await.unwrap();
    add(rows.next().await.unwrap().unwrap_err(), &["P0001"]);
    drop(rows);
    errors
}

#[tokio::test]
async fn debug_of_an_error_quotes_no_data() {
    let db = Database::new().await;
    db.run(SCHEMA).await;
    let sessions = db.sessions();
    let mut session = sessions.acquire().await.unwrap();
    for (error, shows) in leaky_errors(&sessions, &mut session).await {
        let debug = format!("{error:?} {error:#?}");
        assert!(!debug.contains(SECRET), "{debug}");
        for part in shows {
            assert!(debug.contains(part), "{part}: {debug}");
        }
        // Nor do its parts, as a panic of `unwrap` on them would show.
        let mut source = StdError::source(&error);
        while let Some(e) = source.filter(|e| !is_foreign(*e)) {
            assert!(!format!("{e:?}").contains(SECRET), "{e:?}");
            source = e.source();
        }
    }
}

/// Not of this crate: a value's own error.
fn is_foreign(e: &(dyn StdError + 'static)) -> bool {
    e.to_string().starts_with("cannot convert")
}

/// What can be shown of everything that holds a value, each with what it is.
async fn shown(sessions: &SessionManager, session: &mut Session) -> Vec<String> {
    let mut shown = Vec::new();
    let mut show = |what: &dyn Debug| shown.push(format!("{what:?} {what:#?}"));
    let mut batch = session.batch();
    batch.push("INSERT INTO t (a) VALUES ($1)", (SECRET,));
    show(&batch);
    drop(batch);
    show(&session.batch().push("SELECT a FROM t", ()).run().await.unwrap());
    show(&session.copy_rows_in("t", &["a"]).send([("hunter2\0",)]).await.unwrap_err());
    show(&session.query("SELECT 'hunter2'::uuid", &[]).await.unwrap_err());
    show(&session.execute("SELECT $1::int", &[&SECRET]).await.unwrap_err());
    let rows = [("new",), (SECRET,)];
    show(&session.execute_many("INSERT INTO t (a) VALUES ($1)", rows).await.unwrap_err());
    let mut out = session.copy_rows_out("t", &["a"]).await.unwrap();
    let row = out.next().await.unwrap().unwrap();
    show(&row);
    show(&row.try_get::<i32>(0).unwrap_err());
    show(&out);
    drop(out);
    show(&session.query_stream("SELECT a FROM t", &[]).await.unwrap());
    let options = TransactionOptions::new().local_setting("app.x", SECRET);
    show(&options);
    show(&session.begin_with(options).await.unwrap());
    show(&session.prepare("SELECT 'hunter2', $1::int").await.unwrap());
    show(&session);
    show(&sessions);
    shown
}

#[tokio::test]
async fn debug_shows_no_value() {
    let db = Database::new().await;
    db.run(SCHEMA).await;
    let sessions = db.sessions();
    let mut session = sessions.acquire().await.unwrap();
    for text in shown(&sessions, &mut session).await {
        assert!(!text.contains(SECRET), "{text}");
    }
}

#[cfg(feature = "problem")]
#[tokio::test]
async fn neither_a_problem_nor_the_log_quotes_data() {
    use common::log::Log;
    use pg_session::Problem;

    let (log, _guard) = Log::keep();
    let db = Database::new().await;
    db.run(SCHEMA).await;
    let sessions = db.sessions();
    let mut session = sessions.acquire().await.unwrap();
    for (error, _) in leaky_errors(&sessions, &mut session).await {
        let (sqlstate, constraint) =
            (error.code().map(|c| c.code().to_owned()), error.constraint().map(str::to_owned));
        let problem = Problem::from(error);
        problem.log();
        for text in [format!("{problem:?}"), problem.to_string(), problem.body()] {
            assert!(!text.contains(SECRET), "{text}");
        }
        // The log tells what it was about.
        let line = log.lines().pop().unwrap();
        for part in [sqlstate, constraint].into_iter().flatten() {
            assert!(line.contains(&part), "{part}: {line}");
        }
    }
    drop(session);
    for line in log.lines() {
        assert!(!line.contains(SECRET), "{line}");
    }
    assert!(log.has(&[
        "event pg_session",
        "constraint=\"a_key\"",
        "sqlstate=\"23505\"",
        "routine=\"_bt_check_unique\"",
        "error=the server refused it",
    ]));
}
