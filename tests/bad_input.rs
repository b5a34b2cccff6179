//! Bad input: a clear error, and a session that still works.
#![cfg(feature = "testing")]

mod common;

use common::{Database, within};
use pg_session::{Error, Session};

async fn assert_works(session: &Session) {
    assert_eq!(within(session.query_one("SELECT 1", &[])).await.unwrap().get::<_, i32>(0), 1);
}

#[tokio::test]
async fn sql_that_cannot_be_run_is_refused_and_the_session_goes_on() {
    let db = Database::new().await;
    let session = db.sessions().acquire().await.unwrap();
    let pid = session.process_id();
    for (sql, code, says) in [
        ("SELEKT 1", "42601", "syntax error"),
        ("SELECT * FROM nowhere", "42P01", "nowhere"),
        ("SELECT 1; SELECT 2", "42601", "multiple commands"),
        ("SELECT 1/0", "22012", "division by zero"),
        ("SELECT 'x'::int", "22P02", "integer"),
        ("COMMIT PREPARED 'no'", "42704", "no"),
    ] {
        let error = session.query(sql, &[]).await.unwrap_err();
        assert!(matches!(error, Error::Database(_)), "{sql}: {error:?}");
        assert_eq!(error.code().unwrap().code(), code, "{sql}");
        let message = error.to_string();
        assert!(message.contains(says) && message.contains(code), "{sql}: {message}");
        assert_works(&session).await;
    }
    assert_eq!(session.process_id(), pid);
}

#[tokio::test]
async fn empty_sql_does_nothing() {
    let db = Database::new().await;
    let session = db.sessions().acquire().await.unwrap();
    for sql in ["", "  ", "-- nothing", ";"] {
        assert_eq!(session.execute(sql, &[]).await.unwrap(), 0, "{sql:?}");
        assert!(session.query(sql, &[]).await.unwrap().is_empty(), "{sql:?}");
        session.batch_execute(sql).await.unwrap();
        assert!(session.query_opt(sql, &[]).await.unwrap().is_none());
        session.query_one(sql, &[]).await.unwrap_err();
    }
    assert_works(&session).await;
}

#[tokio::test]
async fn wrong_parameters_are_refused_before_they_are_sent() {
    let db = Database::new().await;
    let mut session = db.sessions().acquire().await.unwrap();
    let few = session.query("SELECT $1::int + $2::int", &[&1]).await.unwrap_err();
    assert_eq!(few.to_string(), "expected 2 parameters but got 1");
    let many = session.query("SELECT 1", &[&1]).await.unwrap_err();
    assert_eq!(many.to_string(), "expected 0 parameters but got 1");
    let wrong = session.query("SELECT $1::int", &[&"text"]).await.unwrap_err();
    assert!(wrong.to_string().contains("parameter $1"), "{wrong}");
    assert!(std::error::Error::source(&wrong).unwrap().to_string().contains("int4"));
    // Inside a transaction they have not reached the server either, so it is not aborted.
    session
        .transaction(async |tx| {
            tx.query("SELECT $1::int", &[&"text"]).await.unwrap_err();
            tx.query("SELECT $1::int", &[&1]).await
        })
        .await
        .unwrap();
    assert_works(&session).await;
}

#[tokio::test]
async fn nul_characters_are_refused() {
    let db = Database::new().await;
    let session = db.sessions().acquire().await.unwrap();
    let error = session.query("SELECT $1::text", &[&"a\0b"]).await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "22021");
    assert_works(&session).await;
    session.query("SELECT 'a\0b'", &[]).await.unwrap_err();
    session.batch_execute("SELECT 'a\0b'").await.unwrap_err();
    session.prepare("SELECT 'a\0b'").await.unwrap_err();
    assert_works(&session).await;
}

#[tokio::test]
async fn the_wrong_number_of_rows_is_an_error() {
    let db = Database::new().await;
    let session = db.sessions().acquire().await.unwrap();
    let none = session.query_one("SELECT 1 WHERE false", &[]).await;
    assert!(matches!(none, Err(Error::NoRow)), "{none:?}");
    assert_works(&session).await;
    let more = session.query_one("SELECT generate_series(1, 2)", &[]).await;
    assert!(matches!(more, Err(Error::TooManyRows)), "{more:?}");
    assert_works(&session).await;
    let more = session.query_opt("SELECT generate_series(1, 2)", &[]).await;
    assert!(matches!(more, Err(Error::TooManyRows)), "{more:?}");
    assert_works(&session).await;
}

#[tokio::test]
async fn copy_is_refused_where_it_does_not_belong() {
    let db = Database::new().await;
    db.run("CREATE TABLE t (a int)").await;
    let session = db.sessions().acquire().await.unwrap();
    let pid = session.process_id();
    assert!(matches!(session.copy_in("SELECT 1").await, Err(Error::Config(_))));
    assert_works(&session).await;
    session.copy_out("SELECT 1").await.unwrap_err();
    assert_works(&session).await;
    let mut copy = session.copy_in("COPY t FROM STDIN").await.unwrap();
    copy.send("not a number\n".into()).await.unwrap();
    assert_eq!(copy.finish().await.unwrap_err().code().unwrap().code(), "22P02");
    assert_works(&session).await;
    let mut copy = session.copy_in("COPY t FROM STDIN").await.unwrap();
    copy.send("1\n2\n".into()).await.unwrap();
    assert_eq!(copy.finish().await.unwrap(), 2);
    let mut out = session.copy_out("COPY t TO STDOUT").await.unwrap();
    let mut text = Vec::new();
    while let Some(data) = out.next().await {
        text.extend(data.unwrap());
    }
    drop(out);
    assert_eq!(text, b"1\n2\n");
    assert_works(&session).await;
    assert_eq!(session.process_id(), pid);
}

#[tokio::test]
async fn a_copy_that_fails_at_its_start_does_not_mix_up_the_answers() {
    let db = Database::new().await;
    db.run(
        "CREATE TABLE t (a int);
         CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no'; END $$;
         CREATE TABLE guarded (a int);
         CREATE TRIGGER b BEFORE INSERT ON guarded FOR EACH STATEMENT EXECUTE FUNCTION no()",
    )
    .await;
    let sessions = db.single();
    for sql in ["COPY t TO STDOUT", "COPY guarded FROM STDIN", "COPY t FROM STDIN"] {
        for read_only in [false, true] {
            let session = within(sessions.acquire()).await.unwrap();
            let setting = if read_only { "SET default_transaction_read_only = on" } else { "SELECT 1" };
            session.batch_execute(setting).await.unwrap();
            if let Ok(mut copy) = within(session.copy_in(sql)).await {
                let _ = copy.send("1\n".into()).await;
                let _ = within(copy.finish()).await;
            }
            for n in 0..5 {
                // The right answer, or none: the connection may have been given up.
                match within(session.query_one("SELECT $1::int", &[&n])).await {
                    Ok(row) => assert_eq!(row.get::<_, i32>(0), n, "{sql}"),
                    Err(e) => assert!(e.is_connection_lost(), "{sql}: {e:?}"),
                }
            }
            drop(session);
            assert_works(&within(sessions.acquire()).await.unwrap()).await;
        }
    }
}

#[tokio::test]
async fn a_statement_beside_an_open_stream_is_refused_and_does_not_hang() {
    let db = Database::new().await;
    let mut session = db.sessions().acquire().await.unwrap();
    let many = "SELECT repeat('x', 1000) FROM generate_series(1, 10000)";
    let mut rows = session.query_stream(many, &[]).await.unwrap();
    rows.next().await.unwrap().unwrap();
    let refused = within(session.query_one("SELECT 1", &[])).await;
    assert!(matches!(refused, Err(Error::StreamOpen)), "{refused:?}");
    let mut n = 1;
    while let Some(row) = rows.next().await {
        row.unwrap();
        n += 1;
    }
    assert_eq!(n, 10000);
    // Read to its end it is not in the way any more, even while it lives.
    assert_works(&session).await;
    drop(rows);
    let endless = "SELECT repeat('x', 1000), generate_series(1, 1000000000)";
    session
        .transaction(async |tx| {
            let rows = tx.query_stream(endless, &[]).await?;
            assert!(matches!(tx.execute("SELECT 1", &[]).await, Err(Error::StreamOpen)));
            drop(rows);
            Ok::<_, Error>(())
        })
        .await
        .unwrap_err(); // the rest of the rows was cancelled
    assert_works(&session).await;
}

#[tokio::test]
async fn errors_say_it_once_and_quote_no_data() {
    let db = Database::new().await;
    db.run("CREATE TABLE t (secret text PRIMARY KEY); INSERT INTO t VALUES ('hunter2')").await;
    let session = db.sessions().acquire().await.unwrap();
    let error = session.execute("INSERT INTO t VALUES ($1)", &[&"hunter2"]).await.unwrap_err();
    assert!(error.is_unique_violation());
    assert_eq!(error.constraint(), Some("t_pkey"));
    let mut texts = vec![error.to_string()];
    let mut source = std::error::Error::source(&error);
    while let Some(e) = source {
        texts.push(e.to_string());
        source = e.source();
    }
    for (i, text) in texts.iter().enumerate() {
        assert!(!text.contains("hunter2"), "{text}");
        assert!(!text.starts_with(char::is_uppercase), "{text}");
        assert!(!texts[..i].iter().any(|earlier| earlier.contains(text.as_str())), "{texts:?}");
    }
    assert!(error.db_error().unwrap().detail().unwrap().contains("hunter2"), "for those who ask");
}
