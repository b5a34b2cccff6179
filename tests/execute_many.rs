//! One statement for many rows: bounded memory, all or nothing, and an error that says which row.
#![cfg(feature = "testing")]

mod common;

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use common::proxy::{AtCommit, Proxy};
use common::{Database, polls, until_returned, within};
use pg_session::testing::Sandbox;
use pg_session::{Error, SessionManager, TransactionOptions};
use tokio_postgres::types::private::BytesMut;
use tokio_postgres::types::{Format, IsNull, ToSql, Type, to_sql_checked};

const INSERT: &str = "INSERT INTO t (id, name) VALUES ($1, $2)";
const COUNT: &str = "SELECT count(*) FROM t";

/// Rows enough for several windows.
const MANY: i32 = 20_000;

async fn table() -> (Database, SessionManager) {
    let db = Database::new().await;
    db.run("CREATE TABLE t (id int PRIMARY KEY, name text CONSTRAINT short CHECK (length(name) < 100))")
        .await;
    let sessions = db.single();
    (db, sessions)
}

fn rows(ids: impl IntoIterator<Item = i32>) -> impl Iterator<Item = (i32, String)> {
    ids.into_iter().map(|id| (id, format!("number {id}")))
}

fn row_of(error: &Error) -> u64 {
    match error {
        Error::Batch(e) => e.position(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn every_row_is_run_in_order() {
    let (db, sessions) = table().await;
    let mut session = sessions.acquire().await.unwrap();
    assert_eq!(within(session.execute_many(INSERT, rows(1..=MANY))).await.unwrap(), MANY as u64);
    let sum = i64::from(MANY) * i64::from(MANY + 1) / 2;
    assert_eq!(db.number("SELECT sum(id)::int8 FROM t WHERE name = 'number ' || id").await, sum);
    // In order: each finds what the one before has done.
    db.run("CREATE TABLE log (n serial, id int)").await;
    let chain = "WITH last AS (SELECT coalesce(max(id), 0) AS id FROM log) \
        INSERT INTO log (id) SELECT $1 FROM last WHERE last.id = $1 - 1";
    assert_eq!(within(session.execute_many(chain, (1..=500).map(|id| (id,)))).await.unwrap(), 500);
}

#[tokio::test]
async fn none_one_and_two_rows_are_as_good_as_many() {
    let (db, sessions) = table().await;
    let mut session = sessions.acquire().await.unwrap();
    for (from, to) in [(1, 0), (1, 1), (2, 3), (4, 4)] {
        let touched = within(session.execute_many(INSERT, rows(from..=to))).await.unwrap();
        assert_eq!(touched, (to + 1 - from) as u64);
        assert_eq!(db.number(COUNT).await, i64::from(to));
    }
}

#[tokio::test]
async fn statements_of_any_kind_will_do() {
    let (db, sessions) = table().await;
    let mut session = sessions.acquire().await.unwrap();
    session.execute_many(INSERT, rows(1..=100)).await.unwrap();
    // Several rows each; rows that are returned are read over.
    let update = "UPDATE t SET name = $3 WHERE id BETWEEN $1 AND $2 RETURNING *";
    let ranges = [(1, 10, Some("a")), (11, 30, None), (200, 300, Some("c"))];
    assert_eq!(within(session.execute_many(update, ranges)).await.unwrap(), 30);
    assert_eq!(db.number("SELECT count(*) FROM t WHERE name IS NULL").await, 20);
    assert_eq!(within(session.execute_many("SELECT * FROM t", [(), (), ()])).await.unwrap(), 300);
    assert_eq!(within(session.execute_many("", [(), ()])).await.unwrap(), 0);
    // A notice between the answers is nobody's.
    db.run("CREATE FUNCTION tell() RETURNS void LANGUAGE plpgsql AS $$BEGIN RAISE NOTICE 'told'; END$$")
        .await;
    assert_eq!(within(session.execute_many("SELECT tell()", [(), (), ()])).await.unwrap(), 3);
    let error = within(session.execute_many("COPY t FROM STDIN", [()])).await.unwrap_err();
    assert!(matches!(error, Error::Config(_)), "{error:?}");
}

#[tokio::test]
async fn a_refused_row_is_named_and_nothing_is_stored() {
    let (db, sessions) = table().await;
    let mut session = sessions.acquire().await.unwrap();
    // The first row, one in the middle of a window, and the last row of all.
    for bad in [1, 2, MANY / 2, MANY] {
        let rows = (1..=MANY).map(|id| (id, if id == bad { "x".repeat(200) } else { "y".into() }));
        let error = within(session.execute_many(INSERT, rows)).await.unwrap_err();
        assert_eq!((row_of(&error), error.constraint()), (bad as u64, Some("short")));
        assert!(error.is_check_violation());
        assert_eq!(error.to_string(), format!("row {bad} of execute_many was refused"));
        assert_eq!(db.number(COUNT).await, 0);
        session.query_one("SELECT 1", &[]).await.unwrap();
    }
}

#[tokio::test]
async fn a_row_that_cannot_be_encoded_is_named_and_nothing_is_stored() {
    let (db, sessions) = table().await;
    let mut session = sessions.acquire().await.unwrap();
    let one =
        |id: i32| -> Box<dyn ToSql + Sync> { if id == 15_000 { Box::new("fifteen") } else { Box::new(id) } };
    let rows = (1..=MANY).map(|id| vec![one(id), Box::new("y")]);
    let error = within(session.execute_many(INSERT, rows)).await.unwrap_err();
    assert_eq!(row_of(&error), 15_000);
    assert!(matches!(&error, Error::Batch(e) if e.parameter() == Some(1)));
    assert_eq!(db.number(COUNT).await, 0);
    let error = within(session.execute_many(INSERT, [(1, "x", 3)])).await.unwrap_err();
    assert_eq!(error.to_string(), "row 1 of execute_many has 3 parameters where its SQL has 2");
}

#[tokio::test]
async fn half_of_the_rows_are_never_committed() {
    let (db, sessions) = table().await;
    let mut session = sessions.acquire().await.unwrap();
    // The server has no idea that a row is missing.
    let result = within(session.transaction(async |tx| {
        let rows = (1..=MANY).map(|id| vec![if id == MANY { "x" } else { "1" }; (id / MANY + 1) as usize]);
        let error = tx.execute_many("DELETE FROM t WHERE name = $1", rows).await;
        assert_eq!(row_of(&error.unwrap_err()), MANY as u64);
        Ok::<_, Error>(())
    }));
    let error = result.await.unwrap_err();
    assert!(matches!(error, Error::Aborted(_)), "{error:?}");

    // Dropped half-way.
    let result = within(session.transaction(async |tx| {
        let reached = Cell::new(0);
        let rows = rows(1..=MANY).inspect(|(id, _)| reached.set(*id));
        let mut many = Box::pin(tx.execute_many(INSERT, rows));
        while reached.get() < MANY / 2 {
            assert!(polls(&mut many, 1).await.is_none());
            tokio::task::yield_now().await;
        }
        drop(many);
        tx.query_one("SELECT 1", &[]).await.map(drop).or(Ok(()))
    }));
    let result: Result<(), Error> = result.await;
    assert!(matches!(result, Err(Error::StatementAbandoned)), "{result:?}");
    assert_eq!(db.number(COUNT).await, 0);

    // In a savepoint all of it is undone, and the transaction goes on.
    within(session.transaction(async |tx| {
        tx.execute_many(INSERT, rows(1..=10)).await?;
        let undone = tx
            .savepoint(async |sp| {
                let bad = (11..=MANY).map(|id| (id, if id == MANY { None } else { Some("a") }));
                sp.execute_many(
                    "INSERT INTO t VALUES ($1, $2::text || repeat('x', 100 * ($2 IS NULL)::int))",
                    bad,
                )
                .await?;
                sp.execute_many("INSERT INTO t VALUES (NULL)", [(), ()]).await
            })
            .await;
        assert_eq!(row_of(&undone.unwrap_err()), 1);
        tx.execute_many(INSERT, rows(11..=20)).await
    }))
    .await
    .unwrap();
    assert_eq!(db.number(COUNT).await, 20);
}

#[tokio::test]
async fn rows_are_taken_only_as_fast_as_they_are_answered() {
    let (db, sessions) = table().await;
    // What another session may see of the progress: nobody sees the rows before they are committed, a sequence everybody.
    db.run("CREATE SEQUENCE answered").await;
    let taken = Arc::new(AtomicU64::new(0));
    let mut session = sessions.acquire().await.unwrap();
    let wide = "x".repeat(1000);
    let sql = "INSERT INTO t SELECT nextval('answered'), NULL WHERE $1 <> ''";
    let counter = Arc::clone(&taken);
    let (stop, gate) = (1500, "SELECT pg_advisory_xact_lock(7) WHERE currval('answered') = 1500");
    db.run(&format!(
        "CREATE FUNCTION wait_for_gate() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN PERFORM ({gate}); RETURN NEW; END$$;
        CREATE TRIGGER gate BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION wait_for_gate();
        SELECT pg_advisory_lock(7)"
    ))
    .await;
    let task = tokio::spawn(async move {
        let rows = (0..10_000).map(|_| {
            counter.fetch_add(1, SeqCst);
            (wide.as_str(),)
        });
        session.execute_many(sql, rows).await
    });
    db.until("EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted)").await;
    let ahead = taken.load(SeqCst) - stop;
    // Two windows of 128 KiB, of rows of a kilobyte.
    assert!(ahead < 2 * 132, "{ahead} rows ahead");
    db.run("SELECT pg_advisory_unlock(7)").await;
    assert_eq!(within(task).await.unwrap().unwrap(), 10_000);
}

#[tokio::test]
async fn nothing_else_is_sent_in_between() {
    let (db, sessions) = table().await;
    let mut session = sessions.acquire().await.unwrap();
    within(session.transaction(async |tx| {
        tx.prepare(INSERT).await?;
        let (many, beside) = tokio::join!(
            biased;
            tx.execute_many(INSERT, rows(1..=MANY)),
            tx.query_one("SELECT 1", &[]),
        );
        assert_eq!(many?, MANY as u64);
        assert!(matches!(beside, Err(Error::Busy)), "{beside:?}");
        // Nor does it begin beside one that is under way, even if nobody asks after that any more.
        let mut one = Box::pin(tx.query_one("SELECT 1", &[]));
        assert!(polls(&mut one, 1).await.is_none());
        let beside = tx.execute_many(INSERT, rows(1..=MANY)).await;
        assert!(matches!(beside, Err(Error::Busy)), "{beside:?}");
        one.await
    }))
    .await
    .unwrap();
    assert_eq!(db.number(COUNT).await, i64::from(MANY));
}

#[tokio::test]
async fn what_the_raw_client_has_under_way_is_waited_for() {
    let (db, sessions) = table().await;
    let mut session = sessions.acquire().await.unwrap();
    session.execute_many(INSERT, rows(1..=2)).await.unwrap();
    let client = session.client().await.unwrap();
    db.run("SELECT pg_advisory_lock(7)").await;
    let under_way = "SELECT pg_advisory_xact_lock_shared(7); SELECT 1";
    assert!(polls(client.batch_execute(under_way), 1).await.is_none());
    db.until_blocked().await;
    let many = session.execute_many(INSERT, rows(3..=100));
    let unblock = db.run("SELECT pg_advisory_unlock(7)");
    let (many, ()) = within(async { tokio::join!(biased; many, unblock) }).await;
    assert_eq!(many.unwrap(), 98);
    assert_eq!(db.number(COUNT).await, 100);
}

/// A name as the server would read it.
#[derive(Debug)]
struct Text;

impl ToSql for Text {
    fn to_sql(
        &self,
        _: &Type,
        out: &mut BytesMut,
    ) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        out.extend_from_slice(b"1");
        Ok(IsNull::No)
    }

    fn encode_format(&self, _: &Type) -> Format {
        Format::Text
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    to_sql_checked!();
}

#[tokio::test]
async fn a_value_in_text_format_is_never_taken_for_binary() {
    let (db, sessions) = table().await;
    let mut session = sessions.acquire().await.unwrap();
    let error = within(session.execute_many(INSERT, [(Text, "x")])).await.unwrap_err();
    assert!(matches!(&error, Error::Batch(e) if e.parameter() == Some(1)), "{error:?}");
    let error = within(session.copy_rows_in("t", &["id"]).send([(Text,)])).await.unwrap_err();
    assert!(matches!(&error, Error::Copy(e) if e.column() == Some("id")), "{error:?}");
    assert_eq!(db.number(COUNT).await, 0);
}

#[tokio::test]
async fn dropped_at_any_poll_it_is_stored_whole_or_not_at_all() {
    let (db, sessions) = table().await;
    for step in 0.. {
        let mut session = within(sessions.acquire()).await.unwrap();
        let done = within(polls(session.execute_many(INSERT, rows(1..=MANY / 4)), step)).await;
        drop(session);
        until_returned(&sessions).await;
        let stored = db.number(COUNT).await;
        assert!([0, i64::from(MANY / 4)].contains(&stored), "after {step} polls: {stored}");
        sessions.acquire().await.unwrap().execute("VACUUM pg_language", &[]).await.unwrap();
        db.run("TRUNCATE t").await;
        if let Some(result) = done {
            result.unwrap();
            break;
        }
    }
}

#[tokio::test]
async fn a_panic_in_the_iterator_stores_nothing() {
    let (db, sessions) = table().await;
    let manager = sessions.clone();
    let task = tokio::spawn(async move {
        let rows = rows(1..=MANY).inspect(|(id, _)| assert!(*id < MANY / 2, "boom"));
        manager.acquire().await?.execute_many(INSERT, rows).await
    });
    assert!(within(task).await.unwrap_err().is_panic());
    let mut session = within(sessions.acquire()).await.unwrap();
    assert_eq!(db.number(COUNT).await, 0);
    within(session.execute_many(INSERT, rows(1..=MANY))).await.unwrap();
}

#[tokio::test]
async fn statements_closed_meanwhile_do_not_disturb_it() {
    let (db, _) = table().await;
    let sessions = SessionManager::new(db.config().max_size(1).statement_cache_capacity(1)).unwrap();
    let mut session = sessions.acquire().await.unwrap();
    for round in 0..20 {
        // The statement is kept by its row, out of the cache by then, and closed when the row is dropped: by the
        // iterator, between two windows or in the middle of one.
        let mut kept = Some(session.query_one(&format!("SELECT {round}"), &[]).await.unwrap());
        let at = round * 500;
        let rows = rows(1..=MANY / 2).inspect(|(id, _)| {
            if *id >= at {
                kept = None;
            }
        });
        assert_eq!(within(session.execute_many(INSERT, rows)).await.unwrap(), MANY as u64 / 2);
        db.run("TRUNCATE t").await;
    }
}

#[tokio::test]
async fn options_and_savepoints_travel_with_the_first_rows() {
    let (db, sessions) = table().await;
    let options = TransactionOptions::serializable().local_setting("app.tenant", "acme");
    let insert =
        "INSERT INTO t SELECT $1, current_setting('app.tenant') || current_setting('transaction_isolation')";
    let mut session = sessions.acquire().await.unwrap();
    for round in 0..3 {
        within(session.transaction_with(options.clone(), async |tx| {
            tx.savepoint(async |sp| sp.execute_many(insert, (1..=10).map(|id| (id + round * 10,))).await)
                .await
        }))
        .await
        .unwrap();
    }
    assert_eq!(db.number("SELECT count(*) FROM t WHERE name = 'acmeserializable'").await, 30);
    let bad = TransactionOptions::new().local_setting("work_mem", "lots");
    for _ in 0..2 {
        let result = within(
            session.transaction_with(bad.clone(), async |tx| tx.execute_many(insert, [(1,), (2,)]).await),
        );
        let error = result.await.unwrap_err();
        assert!(!matches!(error, Error::Batch(_)), "no row is to blame: {error:?}");
        assert_eq!(error.code().map(|code| code.code()), Some("22023"));
    }
}

#[tokio::test]
async fn a_lost_answer_to_its_commit_is_unknown() {
    for (what, stored) in [(AtCommit::CutBefore, 0), (AtCommit::CutAfter, i64::from(MANY))] {
        let (db, _) = table().await;
        let proxy = Proxy::start().await;
        let config = proxy.config(&db);
        let sessions = SessionManager::new(config.max_size(1)).unwrap();
        let mut session = sessions.acquire().await.unwrap();
        proxy.at_commit(what);
        let error = within(session.execute_many(INSERT, rows(1..=MANY))).await.unwrap_err();
        assert!(matches!(error, Error::CommitUnknown(_)), "{what:?}: {error:?}");
        assert_eq!(db.number(COUNT).await, stored, "{what:?}");
    }
}

#[tokio::test]
async fn it_works_in_a_sandbox() {
    let (db, _) = table().await;
    let sandbox = Sandbox::start(db.database.url()).await.unwrap();
    let mut session = sandbox.sessions().acquire().await.unwrap();
    within(session.execute_many(INSERT, rows(1..=MANY))).await.unwrap();
    let error =
        within(session.execute_many(INSERT, rows((MANY + 1..=MANY + 9).chain([7])))).await.unwrap_err();
    assert_eq!((row_of(&error), error.is_unique_violation()), (10, true));
    let row = session.query_one(COUNT, &[]).await.unwrap();
    assert_eq!(row.get::<_, i64>(0), i64::from(MANY));
    drop(session);
    sandbox.finish().await.unwrap();
    assert_eq!(db.number(COUNT).await, 0);
}
