//! A sandbox: clients that vanish, cancel or speak the protocol by themselves are answered as by a server, and leave nothing.
#![cfg(feature = "testing")]

mod common;

use std::pin::pin;
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::raw::{Raw, run, run_named, set_config, tags};
use common::sandbox::{code, count, database, insert, outside, sandbox, simple, text};
use common::{connect, polls, within};
use futures_util::{SinkExt, StreamExt};
use pg_session::testing::{Sandbox, SandboxError};
use pg_session::tokio_postgres::{SimpleQueryMessage, error::SqlState};
use pg_session::{Error, IsolationLevel, SessionManager};

// ---- what is given up

#[tokio::test]
async fn a_task_dropped_anywhere_leaves_nothing() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let sessions = SessionManager::new(sandbox.config().max_size(1)).unwrap();
    let mut completed = false;
    for left in 0..200 {
        let work = sessions.transaction(async |tx| {
            tx.execute("INSERT INTO t (id) VALUES (1)", &[]).await?;
            tx.savepoint(async |sp| {
                sp.execute("INSERT INTO t (id) VALUES (2)", &[]).await?;
                Ok::<_, Error>(())
            })
            .await?;
            tx.query("SELECT * FROM t", &[]).await?;
            Err::<(), _>(Error::StreamOpen)
        });
        completed = within(polls(work, left)).await.is_some();
        assert_eq!(within(count(&sessions)).await, 0, "after {left} polls");
        if completed {
            break;
        }
    }
    assert!(completed);
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn a_client_that_vanishes_in_a_transaction_is_rolled_back_and_what_it_ran_is_cancelled() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let other = connect(&sandbox.url()).await;
    let (client, connection) = tokio_postgres::connect(&sandbox.url(), tokio_postgres::NoTls).await.unwrap();
    let driver = tokio::spawn(connection);
    client.batch_execute("BEGIN; INSERT INTO t (id) VALUES (1)").await.unwrap();
    let pid: i32 = client.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    let sleep = tokio::spawn(async move { client.batch_execute("SELECT pg_sleep(100)").await });
    database.until_sleeping(pid).await;
    driver.abort();
    let begin = Instant::now();
    assert_eq!(within(simple(&other, "SELECT id FROM t")).await, ["(0)"]);
    assert!(begin.elapsed() < Duration::from_secs(5));
    assert!(within(sleep).await.unwrap().is_err());
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn a_client_that_vanishes_in_a_copy_leaves_nothing() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let other = connect(&sandbox.url()).await;
    for statement in ["COPY t FROM STDIN", "COPY t (id, n) FROM STDIN"] {
        let (client, connection) =
            tokio_postgres::connect(&sandbox.url(), tokio_postgres::NoTls).await.unwrap();
        let driver = tokio::spawn(connection);
        let sink = client.copy_in::<_, Bytes>(statement).await.unwrap();
        let mut sink = Box::pin(sink);
        sink.send(Bytes::from_static(b"1\t1\n")).await.unwrap();
        driver.abort();
        assert_eq!(within(simple(&other, "SELECT id FROM t")).await, ["(0)"]);
    }
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn cancelling_hits_nobody_else() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let sessions = SessionManager::new(sandbox.config().max_size(4)).unwrap();
    let sleepers = async {
        for i in 0..60u64 {
            let session = sessions.acquire().await.unwrap();
            let sleep = session.query("SELECT pg_sleep(100)", &[]);
            // Now while it waits for its turn, now while it runs, now just as it begins.
            let _ = tokio::time::timeout(Duration::from_micros(i * 150), sleep).await;
            drop(session);
        }
    };
    let workers = futures_util::future::join_all((0..3).map(|_| async {
        let client = connect(&sandbox.url()).await;
        for i in 0..100i32 {
            let row = client.query_one("SELECT $1 + 1", &[&i]).await.expect("not cancelled");
            assert_eq!(row.get::<_, i32>(0), i + 1);
        }
    }));
    within(async { tokio::join!(sleepers, workers) }).await;
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn a_cancel_request_for_one_that_waits_takes_it_out_of_the_queue() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let holder = connect(&sandbox.url()).await;
    holder.batch_execute("BEGIN; INSERT INTO t (id) VALUES (1)").await.unwrap();
    let other = connect(&sandbox.url()).await;
    let token = other.cancel_token();
    let mut waiting = pin!(other.batch_execute("SELECT 1"));
    // Cancels that come too early concern nothing.
    let error = within(async {
        loop {
            tokio::select! {
                result = &mut waiting => return result.unwrap_err(),
                () = async { token.cancel_query(tokio_postgres::NoTls).await.unwrap() } => {}
            }
        }
    })
    .await;
    assert_eq!(code(&error), "57014");
    holder.batch_execute("COMMIT").await.unwrap();
    assert_eq!(simple(&other, "SELECT id FROM t").await, ["1", "(1)"]);
    // And for one that does nothing, it does nothing.
    token.cancel_query(tokio_postgres::NoTls).await.unwrap();
    other.batch_execute("SELECT 1").await.unwrap();
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn a_row_stream_dropped_early_leaves_the_session_usable() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let session = sandbox.sessions().acquire().await.unwrap();
    for _ in 0..3 {
        let rows =
            session.query_stream("SELECT n, repeat('x', 1000) FROM generate_series(1, 1000000) n", &[]);
        let mut rows = pin!(rows.await.unwrap());
        let first: i32 = rows.next().await.unwrap().unwrap().get(0);
        assert_eq!(first, 1);
    }
    assert_eq!(within(text(&session, "SELECT 'well'")).await, "well");
    drop(session);
    within(sandbox.finish()).await.unwrap();
}

// ---- the protocol

#[tokio::test]
async fn copy_goes_both_ways() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let client = connect(&sandbox.url()).await;
    const ROWS: usize = 200_000;
    for _ in 0..2 {
        let mut sink = pin!(client.copy_in::<_, Bytes>("COPY t (id) FROM STDIN").await.unwrap());
        for chunk in (0..ROWS).collect::<Vec<_>>().chunks(1000) {
            let lines: String = chunk.iter().map(|id| format!("{id}\n")).collect();
            within(sink.send(lines.into())).await.unwrap();
        }
        assert_eq!(within(sink.finish()).await.unwrap(), ROWS as u64);
        let mut out = pin!(client.copy_out("COPY (SELECT id FROM t ORDER BY id) TO STDOUT").await.unwrap());
        let mut bytes = 0;
        while let Some(chunk) = within(out.next()).await {
            bytes += chunk.unwrap().len();
        }
        assert_eq!(bytes, (0..ROWS).map(|id| id.to_string().len() + 1).sum::<usize>());
        client.batch_execute("TRUNCATE t").await.unwrap();
    }
    // One that fails in its middle, one that fails at its start, and one that is given up.
    let mut sink = pin!(client.copy_in::<_, Bytes>("COPY t (id) FROM STDIN").await.unwrap());
    sink.send(Bytes::from_static(b"not a number\n")).await.unwrap();
    assert_eq!(code(&within(sink.finish()).await.unwrap_err()), "22P02");
    // The driver loses step over it, as it does with a server; the crate's own session knows.
    let sessions = sandbox.sessions();
    let session = sessions.acquire().await.unwrap();
    let error = session.copy_in("COPY missing FROM STDIN").await.err().unwrap();
    assert_eq!(error.code(), Some(&SqlState::UNDEFINED_TABLE));
    drop(session);
    assert_eq!(within(count(&sessions)).await, 0);
    let mut given_up = Box::pin(client.copy_in::<_, Bytes>("COPY t (id) FROM STDIN").await.unwrap());
    given_up.send(Bytes::from_static(b"1\n")).await.unwrap();
    drop(given_up);
    assert_eq!(within(simple(&client, "SELECT id FROM t")).await, ["(0)"]);
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let client = connect(&sandbox.url()).await;
    let statement = client.prepare("SELECT $1::int4, repeat('x', 10000)").await.unwrap();
    let answers = (0..500i32).map(|i| {
        let (client, statement) = (&client, &statement);
        async move { client.query_one(statement, &[&i]).await.map(|row| row.get::<_, i32>(0)) }
    });
    let answers = within(futures_util::future::try_join_all(answers)).await.unwrap();
    assert_eq!(answers, (0..500).collect::<Vec<_>>());
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn a_simple_query_of_many_statements_is_what_it_is_on_a_server() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let own = self::database().await;
    let (server, virtual_) = (connect(own.database.url()).await, connect(&sandbox.url()).await);
    for sql in [
        "",
        ";",
        "SELECT 1; SELECT ';'; SELECT $$;$$",
        "INSERT INTO t (id) VALUES (1), (2); SELECT count(*) FROM t",
        "INSERT INTO t (id) VALUES (9); SELECT 1/0; SELECT 1",
        "SELECT count(*) FROM t",
        "BEGIN; INSERT INTO t (id) VALUES (3); COMMIT; SELECT count(*) FROM t",
        "BEGIN; DELETE FROM t; SELECT count(*) FROM t; ROLLBACK; SELECT count(*) FROM t",
        "INSERT INTO t (id) VALUES (4); BEGIN; SELECT count(*) FROM t; ROLLBACK; SELECT count(*) FROM t",
        "START TRANSACTION; SAVEPOINT a; DELETE FROM t; ROLLBACK TO a; RELEASE a; COMMIT AND NO CHAIN",
        "BEGIN; SELECT 1/0; COMMIT",
        "SELECT 1",
        "COMMIT",
        "SELECT count(*) FROM t",
        "BEGIN",
        "SELECT nonsense",
        "BEGIN",
        "ROLLBACK",
        "BEGIN; SELECT 1/0",
        "COMMIT",
        "BEGIN",
        "BEGIN",
        "END",
        "ROLLBACK",
        "INSERT INTO t (id) VALUES (5); COMMIT; SELECT 1/0",
        "INSERT INTO t (id) VALUES (6); ROLLBACK; SELECT count(*) FROM t",
        "SAVEPOINT a",
        "SELECT 1; SAVEPOINT a",
        "BEGIN; SAVEPOINT a; SELECT 1/0",
        "ROLLBACK TO a; SELECT 1",
        "ABORT WORK",
        "BEGIN READ ONLY; DELETE FROM t",
        "END",
        "BEGIN; DECLARE c CURSOR FOR SELECT id FROM t; COMMIT",
        "BEGIN; DECLARE c CURSOR FOR SELECT id FROM t ORDER BY id; FETCH c; COMMIT",
        "FETCH c",
        "DECLARE h CURSOR WITH HOLD FOR SELECT id FROM t ORDER BY id",
        "FETCH h",
        "CLOSE h",
        "SET TRANSACTION READ ONLY; SELECT 1",
        "CREATE FUNCTION f() RETURNS bigint LANGUAGE sql BEGIN ATOMIC SELECT 1; SELECT count(*) FROM t; END; SELECT f()",
        "SELECT 1; nonsense",
        "BEGIN nonsense",
        "/* a; */ SELECT 1 -- b;\n; SELECT E'\\';'",
        "SELECT count(*) FROM t",
    ] {
        let mut answers = Vec::new();
        for client in [&server, &virtual_] {
            let answer = match within(client.simple_query(sql)).await {
                Ok(messages) => messages
                    .iter()
                    .map(|message| match message {
                        SimpleQueryMessage::Row(row) => row.get(0).unwrap_or("NULL").to_owned(),
                        SimpleQueryMessage::CommandComplete(n) => format!("({n})"),
                        _ => "columns".to_owned(),
                    })
                    .collect(),
                Err(error) => vec![format!("{} {}", code(&error), error.as_db_error().unwrap().message())],
            };
            // Whether it is in a transaction shows in whether savepoints can be had.
            let inside = client.simple_query("SAVEPOINT probe; RELEASE probe").await.map(drop);
            answers.push((answer, inside.map_err(|error| code(&error).to_owned())));
        }
        assert_eq!(answers[0], answers[1], "{sql}");
    }
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn statements_of_the_same_name_are_not_mixed_up_and_go_with_their_session() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let mut left = Vec::new();
    for round in 0..3 {
        let clients = [connect(&sandbox.url()).await, connect(&sandbox.url()).await];
        for (i, client) in clients.iter().enumerate() {
            let statement = client.prepare(&format!("SELECT {i}")).await.unwrap();
            let row = client.query_one(&statement, &[]).await.unwrap();
            assert_eq!(row.get::<_, i32>(0) as usize, i);
            left.push(statement); // so that it is never closed
        }
        drop(clients);
        let watcher = connect(&sandbox.url()).await;
        let sql = "SELECT count(*) FROM pg_prepared_statements WHERE NOT from_sql";
        within(async {
            while simple(&watcher, sql).await[0] != "0" {
                tokio::task::yield_now().await;
            }
        })
        .await;
        assert!(round < 3);
    }
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn portals_are_read_in_parts() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let mut client = connect(&sandbox.url()).await;
    let tx = client.transaction().await.unwrap();
    let portal = tx.bind("SELECT * FROM generate_series(1, 5)", &[]).await.unwrap();
    for expected in [&[1, 2][..], &[3, 4], &[5]] {
        let rows = tx.query_portal(&portal, 2).await.unwrap();
        assert_eq!(rows.iter().map(|row| row.get::<_, i32>(0)).collect::<Vec<_>>(), expected);
    }
    tx.commit().await.unwrap();
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn a_role_with_few_rights_and_a_role_for_one_transaction_do() {
    let database = database().await;
    let role = format!("role_of_{}", database.database.name());
    database
        .run(&format!(
            "CREATE ROLE {role} LOGIN; GRANT ALL ON ALL TABLES IN SCHEMA public TO {role};
             CREATE SCHEMA hidden; CREATE TABLE hidden.t (id int UNIQUE DEFERRABLE);"
        ))
        .await;
    // Its sessions are not the superuser's, to whom all is allowed.
    let limited =
        Sandbox::start(&database.database.url().replace("postgres@", &format!("{role}@"))).await.unwrap();
    insert(&limited.sessions(), 1).await.unwrap();
    within(limited.finish()).await.unwrap();

    let sandbox = sandbox(&database).await;
    let client = connect(&sandbox.url()).await;
    client
        .batch_execute(&format!("BEGIN; SET LOCAL ROLE {role}; INSERT INTO t (id) VALUES (1); COMMIT"))
        .await
        .unwrap();
    assert_eq!(simple(&client, "SELECT current_user").await, ["postgres", "(1)"]);
    // Constraints are as they were, also where that role cannot look.
    client.batch_execute("BEGIN; INSERT INTO hidden.t VALUES (1)").await.unwrap();
    let error = client.batch_execute("INSERT INTO hidden.t VALUES (1)").await.unwrap_err();
    assert_eq!(code(&error), "23505");
    client.batch_execute("ROLLBACK").await.unwrap();
    within(sandbox.finish()).await.unwrap();
    database.run(&format!("DROP OWNED BY {role}; DROP ROLE {role}")).await;
}

#[tokio::test]
async fn clients_may_choose_the_same_names() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let mut clients =
        [Raw::connect(&sandbox.url(), &database).await, Raw::connect(&sandbox.url(), &database).await];
    for (client, sql) in clients.iter_mut().zip(["x\0SELECT 'one'\0\0\0", "x\0SELECT 'two'\0\0\0"]) {
        client.send(&[(b'P', sql.as_bytes()), (b'D', b"Sx\0"), (b'S', b"")]).await;
        assert_eq!(tags(&client.until(b'Z').await), "1tTZ");
    }
    for (client, value) in clients.iter_mut().zip([b"one", b"two"]) {
        for _ in 0..2 {
            client
                .send(&[
                    (b'B', b"p\0x\0\0\0\0\0\0\0"),
                    (b'H', b""),
                    (b'E', b"p\0\0\0\0\0"),
                    (b'C', b"Pp\0"),
                    (b'S', b""),
                ])
                .await;
            let answer = client.until(b'Z').await;
            assert_eq!(tags(&answer), "2DC3Z");
            assert!(answer[1].1.ends_with(value));
        }
    }
    // An error skips what follows, up to Sync; and what is refused here does, too.
    let client = &mut clients[0];
    for sql in [&b"\0nonsense\0\0\0"[..], b"\0COMMIT AND CHAIN\0\0\0"] {
        let bind = &b"\0x\0\0\0\0\0\0\0"[..];
        client.send(&[(b'B', bind), (b'P', sql), (b'B', bind), (b'E', b"\0\0\0\0\0"), (b'S', b"")]).await;
        assert_eq!(tags(&client.until(b'Z').await), "2EZ");
    }
    client.send(&[(b'C', b"Sx\0"), (b'S', b"")]).await;
    assert_eq!(tags(&client.until(b'Z').await), "3Z");
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn a_transaction_under_one_sync_is_committed_for_the_others_and_rolled_back_at_the_end() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let other = connect(&sandbox.url()).await;
    let mut client = Raw::connect(&sandbox.url(), &database).await;
    let insert = run("INSERT INTO t (id) VALUES (1)");
    let answer = client.batch(&[run("BEGIN ISOLATION LEVEL SERIALIZABLE"), insert, run("COMMIT")]).await;
    assert_eq!(answer, "12[BEGIN]12[INSERT 0 1]12[COMMIT] I");
    assert_eq!(within(simple(&other, "SELECT id FROM t")).await, ["1", "(1)"]);
    // In two batches, and with statements that are not part of it before and behind.
    let answer = client
        .batch(&[
            run("INSERT INTO t (id) VALUES (2)"),
            run("COMMIT"),
            run("START TRANSACTION READ WRITE"),
            run("INSERT INTO t (id) VALUES (3)"),
        ])
        .await;
    assert_eq!(answer, "12[INSERT 0 1]12[COMMIT]12[START TRANSACTION]12[INSERT 0 1] T");
    let answer = client.batch(&[run("ABORT"), run("INSERT INTO t (id) VALUES (4)")]).await;
    assert_eq!(answer, "12[ROLLBACK]12[INSERT 0 1] I");
    assert_eq!(within(simple(&other, "SELECT id FROM t ORDER BY id")).await, ["1", "2", "4", "(3)"]);
    // Outside of a transaction, and twice.
    assert_eq!(client.batch(&[run("COMMIT")]).await, "12<N25P01>[COMMIT] I");
    assert_eq!(client.batch(&[run("ROLLBACK")]).await, "12<N25P01>[ROLLBACK] I");
    assert_eq!(client.batch(&[run("BEGIN"), run("BEGIN READ ONLY")]).await, "12[BEGIN]12<N25001>[BEGIN] T");
    assert_eq!(client.batch(&[run("END")]).await, "12[COMMIT] I");
    within(sandbox.finish()).await.unwrap();
    assert_eq!(outside(&database).await, 0);
}

#[tokio::test]
async fn the_answers_to_control_under_one_sync_are_those_of_a_server() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let own = self::database().await;
    let mut clients =
        [Raw::connect(&sandbox.url(), &database).await, Raw::connect(own.database.url(), &own).await];
    let insert = || run("INSERT INTO t (id) VALUES (1)");
    let late = || run("INSERT INTO child (late) VALUES (9)");
    let batches = [
        vec![run("BEGIN"), run("SELECT 1/0"), run("COMMIT")],
        vec![run("COMMIT"), run("SELECT 1")],
        vec![run("BEGIN"), run("nonsense"), run("ROLLBACK")],
        vec![run("BEGIN")],
        vec![run("ROLLBACK"), run("BEGIN"), insert(), run("COMMIT"), run("nonsense")],
        vec![run("BEGIN"), late(), run("COMMIT"), run("SELECT 1")],
        vec![late(), run("SELECT 1")],
        vec![run("BEGIN"), set_config("app.a", "b"), run("SAVEPOINT a"), run("SELECT 1/0")],
        vec![run("ROLLBACK TO a"), run("RELEASE a"), run("SELECT current_setting('app.a')"), run("COMMIT")],
        vec![run("BEGIN READ ONLY"), insert()],
        vec![insert()],
        vec![run("END"), run("DELETE FROM t")],
    ];
    for (i, batch) in batches.iter().enumerate() {
        let [ours, theirs] = &mut clients;
        assert_eq!(ours.batch(batch).await, theirs.batch(batch).await, "batch {i}");
    }
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn a_begin_that_is_refused_takes_the_statement_behind_it_along() {
    let database = database().await;
    let sandbox = within(
        Sandbox::builder(database.database.url()).isolation_level(IsolationLevel::ReadCommitted).start(),
    )
    .await
    .unwrap();
    let mut client = Raw::connect(&sandbox.url(), &database).await;
    let insert = || run("INSERT INTO t (id) VALUES (1)");
    let begin = run("BEGIN ISOLATION LEVEL SERIALIZABLE");
    assert_eq!(client.batch(&[begin.clone(), insert(), run("COMMIT")]).await, "12<E0A000> I");
    assert_eq!(client.batch(&[insert(), begin, run("COMMIT")]).await, "12[INSERT 0 1]12<E0A000> I");
    let other = connect(&sandbox.url()).await;
    assert_eq!(within(simple(&other, "SELECT id FROM t")).await, ["(0)"]);
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn an_error_under_the_same_sync_aborts_and_commit_is_skipped() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let mut client = Raw::connect(&sandbox.url(), &database).await;
    let insert = || run("INSERT INTO t (id) VALUES (1)");
    let answer = client.batch(&[run("BEGIN"), insert(), insert(), run("COMMIT")]).await;
    assert_eq!(answer, "12[BEGIN]12[INSERT 0 1]12<E23505> E");
    assert_eq!(client.batch(&[run("BEGIN")]).await, "<E25P02> E");
    assert_eq!(client.batch(&[insert()]).await, "<E25P02> E");
    // A retry.
    let answer = client.batch(&[run("ROLLBACK"), run("BEGIN"), insert(), run("COMMIT")]).await;
    assert_eq!(answer, "12[ROLLBACK]12[BEGIN]12[INSERT 0 1]12[COMMIT] I");
    let other = connect(&sandbox.url()).await;
    assert_eq!(within(simple(&other, "SELECT id FROM t")).await, ["1", "(1)"]);
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn a_setting_given_by_parameters_ends_with_its_transaction() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let other = connect(&sandbox.url()).await;
    let setting = "SELECT current_setting('app.tenant', true), current_setting('statement_timeout')";
    let settings = async || {
        let rows = within(other.simple_query(setting)).await.unwrap();
        rows.into_iter()
            .filter_map(|message| match message {
                SimpleQueryMessage::Row(row) => Some([0, 1].map(|i| row.get(i).unwrap_or("").to_owned())),
                _ => None,
            })
            .collect::<Vec<_>>()
    };
    let before = settings().await;
    let mut client = Raw::connect(&sandbox.url(), &database).await;
    for end in ["COMMIT", "ROLLBACK"] {
        let tenant = set_config("app.tenant", "x");
        let parts = [run("BEGIN"), tenant, set_config("statement_timeout", "77s"), run(setting), run(end)];
        let answer = client.batch(&parts).await;
        let expected = format!("12[BEGIN]12D[SELECT 1]12D[SELECT 1]12D[SELECT 1]12[{end}] I");
        assert_eq!(answer, expected);
        assert_eq!(settings().await, before, "{end}");
    }
    // By a statement that is not named and was prepared before: it is there for as long as its session.
    let [parse, bind, execute] = <[_; 3]>::try_from(set_config("app.tenant", "y")).unwrap();
    assert_eq!(client.batch(&[run("BEGIN"), vec![parse]]).await, "12[BEGIN]1 T");
    let rest = [vec![bind, execute], run("SHOW app.tenant")];
    assert_eq!(client.batch(&rest).await, "2D[SELECT 1]12D[SHOW] T");
    assert_eq!(client.batch(&[run("COMMIT")]).await, "12[COMMIT] I");
    assert_eq!(settings().await, before);
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn control_that_was_prepared_is_used_again_in_later_batches() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let other = connect(&sandbox.url()).await;
    let mut client = Raw::connect(&sandbox.url(), &database).await;
    let parse = |name: &str, sql: &str| (b'P', format!("{name}\0{sql}\0\0\0").into_bytes());
    let describe = |name: &str| (b'D', format!("S{name}\0").into_bytes());
    let close = |name: &str| (b'C', format!("{name}\0").into_bytes());
    let prepare = vec![
        parse("b", "BEGIN"),
        describe("b"),
        parse("c", "COMMIT"),
        describe("c"),
        parse("i", "INSERT INTO t (id) SELECT count(*) FROM t"),
        describe("i"),
    ];
    assert_eq!(client.batch(&[prepare]).await, "1tn1tn1tn I");
    let insert = || run_named("i", "");
    let answer = client.batch(&[run_named("b", ""), insert(), run_named("c", "")]).await;
    assert_eq!(answer, "2n[BEGIN]2n[INSERT 0 1]2n[COMMIT] I");
    for (portal, expected) in [("", "2"), ("p", "3")] {
        assert_eq!(client.batch(&[run_named("b", portal), insert()]).await, "2n[BEGIN]2n[INSERT 0 1] T");
        // A portal is there for as long as its transaction.
        let [bind, describe, execute] = <[_; 3]>::try_from(run_named("c", portal)).unwrap();
        assert_eq!(client.batch(&[vec![bind, describe]]).await, "2n T");
        assert_eq!(client.batch(&[vec![execute.clone()]]).await, "[COMMIT] I");
        assert_eq!(client.batch(&[vec![execute]]).await, "<E34000> I");
        assert_eq!(within(simple(&other, "SELECT count(*) FROM t")).await[0], expected);
    }
    // No two of one name, of whichever kind; and after Close, there is none.
    for (name, sql) in [("c", "SELECT 1"), ("i", "COMMIT"), ("c", "COMMIT")] {
        assert_eq!(client.batch(&[vec![parse(name, sql)]]).await, "<E42P05> I", "{name} {sql}");
    }
    let answer = client.batch(&[vec![close("Sc"), parse("c", "SELECT 1")], run_named("c", "")]).await;
    assert_eq!(answer, "312TD[SELECT 1] I");
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn the_drivers_own_prepared_control_does_its_work() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let (client, other) = (connect(&sandbox.url()).await, connect(&sandbox.url()).await);
    let [begin, commit, rollback] =
        futures_util::future::try_join_all(["BEGIN", "COMMIT", "ROLLBACK"].map(|sql| client.prepare(sql)))
            .await
            .unwrap()
            .try_into()
            .unwrap_or_else(|_| unreachable!());
    for (end, expected) in [(&rollback, "0"), (&commit, "1")] {
        within(client.execute(&begin, &[])).await.unwrap();
        within(client.execute("INSERT INTO t (id) VALUES (1)", &[])).await.unwrap();
        within(client.execute(end, &[])).await.unwrap();
        assert_eq!(within(simple(&other, "SELECT count(*) FROM t")).await[0], expected);
    }
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn a_flush_gets_the_answers_to_control_before_the_sync() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let mut client = Raw::connect(&sandbox.url(), &database).await;
    for sql in ["BEGIN", "INSERT INTO t (id) VALUES (1)", "COMMIT"] {
        let messages = run(sql);
        client.send(&messages.iter().map(|(tag, body)| (*tag, &body[..])).collect::<Vec<_>>()).await;
        client.send(&[(b'H', b"")]).await;
        assert_eq!(tags(&client.until(b'C').await), "12C", "{sql}");
    }
    assert_eq!(client.batch(&[]).await, " I");
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn a_sync_before_the_data_of_a_copy_is_ignored_whenever_it_comes() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let mut client = Raw::connect(&sandbox.url(), &database).await;
    let start: &[(u8, &[u8])] =
        &[(b'P', b"\0COPY t (id) FROM STDIN\0\0\0"), (b'B', b"\0\0\0\0\0\0\0\0"), (b'E', b"\0\0\0\0\0")];
    let data: &[(u8, &[u8])] = &[(b'd', b"1\n"), (b'c', b""), (b'S', b"")];
    let sync: &[(u8, &[u8])] = &[(b'S', b""), (b'H', b"")];
    for early in [true, false] {
        client.send(start).await;
        if early {
            client.send(&sync[..1]).await;
        } else {
            client.send(&sync[1..]).await;
        }
        assert_eq!(tags(&client.until(b'G').await), "12G");
        if !early {
            client.send(sync).await;
        }
        client.send(data).await;
        assert_eq!(tags(&client.until(b'Z').await), "CZ");
        client.send(&[(b'Q', b"DELETE FROM t\0")]).await;
        assert_eq!(client.until(b'Z').await[0].1, b"DELETE 1\0");
    }
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn what_would_reach_the_outer_transaction_is_refused() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let client = connect(&sandbox.url()).await;
    client.batch_execute("INSERT INTO t (id) VALUES (1)").await.unwrap();
    for sql in [
        "COMMIT AND CHAIN",
        "PREPARE TRANSACTION 'x'",
        "/**/ ROLLBACK PREPARED 'x'",
        "SELECT 1; COMMIT",
        "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE",
    ] {
        let error = client.prepare(sql).await.unwrap_err();
        assert_eq!(code(&error), "0A000", "{sql}");
    }
    for sql in [
        "BEGIN; COMMIT AND CHAIN",
        "BEGIN; ROLLBACK AND CHAIN",
        "BEGIN; PREPARE TRANSACTION 'x'",
        "COMMIT PREPARED 'x'",
        "DEALLOCATE ALL",
        "COMMIT nonsense",
    ] {
        let error = client.batch_execute(sql).await.unwrap_err();
        assert_eq!(code(&error), "0A000", "{sql}");
        client.batch_execute("ROLLBACK").await.unwrap();
    }
    let error = client.batch_execute("DO 'BEGIN COMMIT; END'").await.unwrap_err();
    assert_eq!(code(&error), "2D000");
    assert_eq!(simple(&client, "SELECT id FROM t").await, ["1", "(1)"]);
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn a_client_of_another_role_or_database_is_not_let_in() {
    let database = database().await;
    let sandbox = sandbox(&database).await;
    let url = sandbox.url();
    for wrong in [url.replace("postgres@", "someone@"), url.replace(database.database.name(), "postgres")] {
        let error = tokio_postgres::connect(&wrong, tokio_postgres::NoTls).await.err().unwrap();
        assert_eq!(code(&error), "28000", "{error}");
    }
    let client = connect(&url).await;
    assert_eq!(simple(&client, "SHOW server_encoding").await, ["UTF8", "(0)"]);
    within(sandbox.finish()).await.unwrap();
}

#[tokio::test]
async fn a_sandbox_that_cannot_be_opened_says_why() {
    let database = database().await;
    let url = database.database.url();
    let error = Sandbox::start("mysql://x").await.unwrap_err();
    assert!(matches!(error, SandboxError::Config(_)), "{error}");
    let error = Sandbox::start(&url.replace(database.database.name(), "missing")).await.unwrap_err();
    assert!(matches!(&error, SandboxError::LogIn(e) if code(e) == "3D000"), "{error}");
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = Sandbox::start(&format!("postgres://postgres@{nobody}/x")).await.unwrap_err();
    assert!(matches!(error, SandboxError::Io { .. }), "{error}");
}

#[tokio::test]
async fn a_server_that_asks_for_a_password_gets_it_and_the_sandbox_asks_for_none() {
    use pg_session::testing::PgServer;
    let server = PgServer::builder().setting("password_encryption", "scram-sha-256").start().unwrap();
    let admin = connect(&server.url()).await;
    admin.batch_execute("ALTER ROLE postgres PASSWORD 'p@ss:word'").await.unwrap();
    std::fs::write(server.data_dir().join("pg_hba.conf"), "host all all 127.0.0.1/32 scram-sha-256\n")
        .unwrap();
    admin.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    let url = server.url();
    within(async {
        // Until the new rules are in force.
        while tokio_postgres::connect(&url, tokio_postgres::NoTls).await.is_ok() {}
    })
    .await;
    let error = Sandbox::start(&url).await.unwrap_err();
    assert!(matches!(error, SandboxError::LogIn(_)), "{error}");
    let url = url.replace("postgres@", "postgres:p%40ss%3Aword@");
    let sandbox = Sandbox::start(&url).await.unwrap();
    assert!(!format!("{sandbox:?} {:?} {}", Sandbox::builder(&url), sandbox.url()).contains("word"));
    let session = sandbox.sessions().acquire().await.unwrap();
    assert_eq!(text(&session, "SELECT 'in'").await, "in");
    drop(session);
    let proxy = pg_session::testing::FaultProxy::start(&url).await.unwrap();
    assert!(!format!("{proxy:?}").contains("word"));
    let client = connect(&proxy.url()).await;
    assert_eq!(simple(&client, "SELECT 'in'").await, ["in", "(1)"]);
    within(sandbox.finish()).await.unwrap();
}
