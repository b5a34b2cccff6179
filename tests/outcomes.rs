//! What a caller is told is what happened: when BEGIN fails, when SQL ends the transaction behind our back, when a
//! statement is abandoned, when the server's good-bye is only half of one.
#![cfg(feature = "testing")]

mod common;

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use bytes::Bytes;
use common::gate::Gate;
use common::middle::{At, Direction, Middle, Then};
use common::wrongs::Wrongs;
use common::{Database, polls, until, until_returned, within};
use pg_session::testing::{PgServer, TestDatabase};
use pg_session::{Error, RetryClass, RetryPolicy, Session, SessionManager, TransactionOptions};

/// More than any statement that is answered or dropped here takes.
const MOST_POLLS: usize = 60;

/// The closure's own error.
#[derive(Debug)]
enum Own {
    Mine,
    Database(#[expect(dead_code, reason = "shown by Debug")] Error),
}

impl From<Error> for Own {
    fn from(e: Error) -> Self {
        Self::Database(e)
    }
}

async fn database() -> Database {
    let db = Database::new().await;
    db.run("CREATE TABLE t (id bigint PRIMARY KEY)").await;
    db
}

async fn ids(db: &Database) -> Vec<i64> {
    let rows = db.watcher.query("SELECT id FROM t ORDER BY id", &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

// BEGIN fails.

/// The ways of storing two rows in one transaction.
#[derive(Clone, Copy, Debug)]
enum Shape {
    Closure,
    Swallowing,
    Savepoint,
    Batch,
    BatchInside,
    ByHand,
    RolledBack,
    Many,
    ManyInside,
}

const SHAPES: [Shape; 9] = [
    Shape::Closure,
    Shape::Swallowing,
    Shape::Savepoint,
    Shape::Batch,
    Shape::BatchInside,
    Shape::ByHand,
    Shape::RolledBack,
    Shape::Many,
    Shape::ManyInside,
];

/// Each, on a connection that has seen this kind of BEGIN before and on one that has not.
fn shapes() -> impl Iterator<Item = (Shape, bool)> {
    SHAPES.into_iter().flat_map(|shape| [(shape, true), (shape, false)])
}

/// Also says at which level it ran, and for which tenant.
const STORE: &str = "INSERT INTO seen SELECT $1, current_setting('transaction_isolation'), \
                     length(current_setting('app.tenant', true))";

/// Stores rows 1 and 2; `Ok` if it is told that they are stored.
async fn store(session: &mut Session, shape: Shape) -> Result<(), Error> {
    match shape {
        Shape::Closure => {
            session
                .transaction(async |tx| {
                    tx.execute(STORE, &[&1i64]).await?;
                    tx.execute(STORE, &[&2i64]).await?;
                    Ok(())
                })
                .await
        }
        Shape::Swallowing => {
            session
                .transaction(async |tx| {
                    for n in [1i64, 2] {
                        let _ = tx.execute(STORE, &[&n]).await;
                    }
                    Ok(())
                })
                .await
        }
        Shape::Savepoint => {
            session
                .transaction(async |tx| {
                    let _ = tx.savepoint(async |sp| sp.execute(STORE, &[&1i64]).await).await;
                    let _ = tx.savepoint(async |sp| sp.execute(STORE, &[&2i64]).await).await;
                    Ok(())
                })
                .await
        }
        Shape::Batch => session.batch().push(STORE, (1i64,)).push(STORE, (2i64,)).run().await.map(drop),
        Shape::BatchInside => {
            session
                .transaction(async |tx| {
                    let _ = tx.batch().push(STORE, (1i64,)).push(STORE, (2i64,)).run().await;
                    Ok(())
                })
                .await
        }
        Shape::ByHand => {
            let tx = session.begin().await?;
            for n in [1i64, 2] {
                let _ = tx.execute(STORE, &[&n]).await;
            }
            tx.commit().await
        }
        Shape::RolledBack => {
            let tx = session.begin().await?;
            for n in [1i64, 2] {
                let _ = tx.execute(STORE, &[&n]).await;
            }
            tx.rollback().await;
            Err(Error::NoRow) // any error: it is not stored
        }
        Shape::Many => session.execute_many(STORE, [(1i64,), (2,)]).await.map(drop),
        Shape::ManyInside => {
            session
                .transaction(async |tx| {
                    let _ = tx.execute_many(STORE, [(1i64,), (2,)]).await;
                    Ok(())
                })
                .await
        }
    }
}

fn tenant(length: usize) -> TransactionOptions {
    TransactionOptions::serializable().local_setting("app.tenant", "x".repeat(length))
}

/// A session whose connection knows the statement, and perhaps this kind of BEGIN, and will send a long one by default.
async fn session_of_long_begins(db: &Database, options: TransactionOptions, known: bool) -> Session {
    db.run("DROP TABLE IF EXISTS seen; CREATE TABLE seen (id bigint, level text, tenant int)").await;
    let sessions = SessionManager::new(db.config().max_size(1).transactions(options)).unwrap();
    let mut session = sessions.acquire().await.unwrap();
    for _ in 0..2 {
        let kind = if known { tenant(1) } else { TransactionOptions::read_committed() };
        let warm = session.transaction_with(kind, async |tx| tx.execute(STORE, &[&0i64]).await);
        warm.await.unwrap();
    }
    db.run("TRUNCATE seen").await;
    session
}

async fn judge(
    wrongs: &mut Wrongs,
    db: &Database,
    (shape, known): (Shape, bool),
    told: Result<(), Error>,
    length: usize,
) {
    db.until_quiet().await;
    let wrong = format!("level <> 'serializable' OR tenant IS DISTINCT FROM {length}");
    let all = db.number("SELECT count(*) FROM seen").await;
    let astray = db.number(&format!("SELECT count(*) FROM seen WHERE {wrong}")).await;
    let right = match told {
        // What hits a statement instead of BEGIN is undone with its savepoint.
        Ok(()) if matches!(shape, Shape::Savepoint) => (1..=2).contains(&all),
        Ok(()) => all == 2,
        Err(_) => all == 0,
    } && astray == 0;
    wrongs.check(right, format!("{shape:?}, known {known}: {all} stored, {astray} of them astray: {told:?}"));
}

const LONG: usize = 20 << 20;

#[tokio::test]
async fn a_begin_that_times_out_lets_nothing_be_stored() {
    let db = database().await;
    let mut wrongs = Wrongs::default();
    for (shape, known) in shapes() {
        let mut session = session_of_long_begins(&db, tenant(LONG), known).await;
        session.execute("SET statement_timeout = 10", &[]).await.unwrap();
        let told = within(store(&mut session, shape)).await;
        drop(session);
        judge(&mut wrongs, &db, (shape, known), told, LONG).await;
    }
}

#[tokio::test]
async fn a_begin_that_is_cancelled_lets_nothing_be_stored() {
    let db = database().await;
    let mut wrongs = Wrongs::default();
    for (shape, known) in shapes() {
        let mut session = session_of_long_begins(&db, tenant(LONG), known).await;
        let cancel = format!(
            "SELECT count(pg_cancel_backend(pid)) FROM pg_stat_activity WHERE state = 'active' AND pid = {}",
            session.process_id()
        );
        let told = {
            let mut work = pin!(within(store(&mut session, shape)));
            loop {
                tokio::select! {
                    told = &mut work => break told,
                    hit = db.number(&cancel) => if hit > 0 { break work.await },
                }
            }
        };
        drop(session);
        judge(&mut wrongs, &db, (shape, known), told, LONG).await;
    }
}

#[tokio::test]
async fn a_begin_with_a_setting_that_nobody_knows_lets_nothing_be_stored() {
    let db = database().await;
    let mut wrongs = Wrongs::default();
    for (shape, known) in shapes() {
        let options = tenant(1).local_setting("no_such_setting", "x");
        let mut session = session_of_long_begins(&db, options, known).await;
        let told = within(store(&mut session, shape)).await;
        assert!(told.is_err(), "{shape:?}");
        drop(session);
        judge(&mut wrongs, &db, (shape, known), told, 1).await;
    }
}

// A good-bye without an end.

#[derive(Clone, Copy, Debug)]
enum Verb {
    Query,
    Text,
    Transaction,
    Commit,
    Batch,
    Many,
    Stream,
    CopyOut,
    CopyIn,
}

#[tokio::test]
async fn a_fatal_error_whose_end_never_arrives_ends_every_verb() {
    let db = database().await;
    db.run(
        "CREATE FUNCTION nap() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(600); RETURN NULL; END $$;
         CREATE TABLE slow (id bigint);
         CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON slow DEFERRABLE INITIALLY DEFERRED
             FOR EACH ROW EXECUTE FUNCTION nap()",
    )
    .await;
    let middle = Middle::start().await;
    middle.withhold_fin(true);
    let verbs = [
        Verb::Query,
        Verb::Text,
        Verb::Transaction,
        Verb::Commit,
        Verb::Batch,
        Verb::Many,
        Verb::Stream,
        Verb::CopyOut,
        Verb::CopyIn,
    ];
    let mut stuck = Vec::new();
    for verb in verbs {
        let config = middle.config(&db);
        let sessions = SessionManager::new(config.max_size(1)).unwrap();
        let mut session = sessions.acquire().await.unwrap();
        let pid = session.process_id();
        let work = async {
            match verb {
                Verb::Query => session.query("SELECT pg_sleep(600)", &[]).await.map(drop),
                Verb::Text => session.batch_execute("SELECT pg_sleep(600)").await,
                Verb::Transaction => {
                    session
                        .transaction(async |tx| tx.execute("SELECT pg_sleep(600)", &[]).await.map(drop))
                        .await
                }
                Verb::Commit => {
                    let tx = session.begin().await?;
                    tx.execute("INSERT INTO slow VALUES (1)", &[]).await?;
                    tx.commit().await
                }
                Verb::Batch => session.batch().push("SELECT pg_sleep(600)", ()).run().await.map(drop),
                Verb::Many => session.execute_many("SELECT pg_sleep($1)", [(600f64,)]).await.map(drop),
                Verb::Stream => {
                    let mut rows = session.query_stream("SELECT pg_sleep(600)", &[]).await?;
                    rows.next().await.expect("an error").map(drop)
                }
                Verb::CopyOut => {
                    let mut data = session.copy_out("COPY (SELECT pg_sleep(600)) TO STDOUT").await?;
                    data.next().await.expect("an error").map(drop)
                }
                Verb::CopyIn => {
                    let mut copy = session.copy_in("COPY t FROM STDIN").await?;
                    copy.send(Bytes::from_static(b"1\n")).await?;
                    db.run(&format!("SELECT pg_terminate_backend({pid})")).await;
                    copy.finish().await.map(drop)
                }
            }
        };
        let kill = async {
            if !matches!(verb, Verb::CopyIn) {
                db.until_sleeping(pid).await;
                db.run(&format!("SELECT pg_terminate_backend({pid})")).await;
            }
            db.until_ended(pid).await;
        };
        // The promise is about a second.
        let ended = async { tokio::time::timeout(Duration::from_secs(6), work).await };
        let (ended, ()) = within(async { tokio::join!(ended, kill) }).await;
        match ended {
            Ok(told) => {
                let error = told.expect_err("the server is gone");
                assert!(error.is_connection_lost() || error.is_commit_unknown(), "{verb:?}: {error}");
                // With these COMMIT travels along, and the server may or may not have come to it.
                if !matches!(verb, Verb::Batch | Verb::Many) {
                    assert_eq!(error.is_commit_unknown(), matches!(verb, Verb::Commit), "{verb:?}: {error}");
                }
            }
            Err(_) => stuck.push(verb),
        }
    }
    assert!(stuck.is_empty(), "never ended: {stuck:?}");
    assert_eq!(ids(&db).await, [0; 0]);
}

#[tokio::test]
async fn a_batch_whose_commit_was_answered_is_ok_whatever_stands_behind_the_answer() {
    let db = database().await;
    let mut middle = Middle::start().await;
    for n in 1..=20i64 {
        let config = middle.config(&db);
        let policy = RetryPolicy::default().retry_on(RetryClass::ConnectionLost);
        let config = config.max_size(1).transactions(TransactionOptions::new().retry(policy));
        let sessions = SessionManager::new(config).unwrap();
        const INSERT: &str = "INSERT INTO t SELECT $1 + 1000 * count(*) FROM t WHERE id % 1000 = $1";
        let mut session = sessions.acquire().await.unwrap();
        for _ in 0..2 {
            session.batch().push("SELECT $1::int8", (n,)).run().await.unwrap();
            session.prepare(INSERT).await.unwrap();
        }
        drop(session);
        middle.arm(Direction::ToClient, At::Like(Box::new(|tag, body| tag == b'C' && body == b"COMMIT\0")));
        let terminate = async {
            let stop = middle.stop().await;
            db.run(&format!("SELECT pg_terminate_backend({})", stop.pid)).await;
            db.until_ended(stop.pid).await;
            stop.then(Then::PassTogether);
        };
        let mut batch = sessions.batch();
        batch.push(INSERT, (n,));
        let (told, ()) = within(async { tokio::join!(batch.run(), terminate) }).await;
        told.unwrap_or_else(|e| panic!("COMMIT was answered: {e}"));
        assert_eq!(db.number("SELECT count(*) FROM t").await, n, "stored once");
    }
}

// SQL ends the transaction.

#[derive(Clone, Copy, Debug)]
enum Way {
    Execute,
    Query,
    Text,
    BatchInside,
}

const WAYS: [Way; 4] = [Way::Execute, Way::Query, Way::Text, Way::BatchInside];

const ENDERS: [&str; 14] = [
    "COMMIT",
    "ROLLBACK",
    "ABORT",
    "END",
    "BEGIN",
    "START TRANSACTION",
    "ROLLBACK AND CHAIN",
    "COMMIT AND CHAIN",
    "  commit ;",
    "/* so /* be */ it */ Rollback\n\tAnd  cHaIn",
    "-- the end\nEND TRANSACTION",
    "abort work and chain",
    "start transaction READ WRITE",
    "COMMIT WORK AND NO CHAIN",
];

/// Several statements, which only a text can be.
const ENDING_TEXTS: [&str; 5] = [
    "SELECT 1; COMMIT; SELECT 2",
    "COMMIT; BEGIN",
    "ROLLBACK; BEGIN; INSERT INTO t VALUES (7)",
    "SAVEPOINT a; ROLLBACK AND CHAIN; SELECT ';'",
    "COMMIT;BEGIN;COMMIT;BEGIN",
];

async fn say(tx: &pg_session::Transaction<'_>, way: Way, sql: &str) {
    let told = match way {
        Way::Execute => tx.execute(sql, &[]).await.map(drop),
        Way::Query => tx.query(sql, &[]).await.map(drop),
        Way::Text => tx.batch_execute(sql).await,
        Way::BatchInside => tx.batch().push("SELECT 1", ()).push(sql, ()).run().await.map(drop),
    };
    drop(told);
}

fn cases() -> impl Iterator<Item = (Way, &'static str)> {
    let single = ENDERS.iter().flat_map(|sql| WAYS.iter().map(move |way| (*way, *sql)));
    single.chain(ENDING_TEXTS.iter().map(|sql| (Way::Text, *sql)))
}

/// Whether the backend goes although its session is still held.
async fn goes(db: &Database, pid: i32) -> bool {
    let gone = db.until_ended(pid);
    tokio::time::timeout(Duration::from_secs(1), gone).await.is_ok()
}

#[tokio::test]
async fn sql_that_ends_the_transaction_of_a_closure_is_told_and_never_run_again() {
    let db = database().await;
    let sessions = db.single();
    let mut wrongs = Wrongs::default();
    for (way, sql) in cases() {
        db.run("TRUNCATE t").await;
        let mut session = within(sessions.acquire()).await.unwrap();
        let pid = session.process_id();
        let runs = AtomicUsize::new(0);
        let told: Result<(), Error> = within(session.transaction(async |tx| {
            runs.fetch_add(1, SeqCst);
            tx.execute("INSERT INTO t VALUES (1)", &[]).await?;
            say(tx, way, sql).await;
            let _ = tx.execute("INSERT INTO t VALUES (2)", &[]).await;
            Ok(())
        }))
        .await;
        wrongs.check(matches!(told, Err(Error::TransactionEnded)), format!("{way:?} {sql:?}: {told:?}"));
        wrongs.check(runs.load(SeqCst) == 1, format!("{way:?} {sql:?}: {runs:?} runs"));
        wrongs.check(goes(&db, pid).await, format!("{way:?} {sql:?}: the connection is still there"));
    }
}

#[tokio::test]
async fn sql_that_ends_a_transaction_never_hides_the_closures_own_error() {
    let db = database().await;
    let sessions = db.single();
    let mut wrongs = Wrongs::default();
    for (way, sql) in cases() {
        db.run("TRUNCATE t").await;
        let mut session = within(sessions.acquire()).await.unwrap();
        let pid = session.process_id();
        let runs = AtomicUsize::new(0);
        let told: Result<(), Own> = within(session.transaction(async |tx| {
            runs.fetch_add(1, SeqCst);
            tx.execute("INSERT INTO t VALUES (1)", &[]).await?;
            say(tx, way, sql).await;
            Err(Own::Mine)
        }))
        .await;
        wrongs.check(matches!(told, Err(Own::Mine)), format!("{way:?} {sql:?}: {told:?}"));
        wrongs.check(runs.load(SeqCst) == 1, format!("{way:?} {sql:?}: {runs:?} runs"));
        wrongs.check(goes(&db, pid).await, format!("{way:?} {sql:?}: the connection is still there"));
    }
}

#[tokio::test]
async fn sql_that_ends_a_transaction_by_hand_is_told_at_its_commit() {
    let db = database().await;
    let sessions = db.single();
    let mut wrongs = Wrongs::default();
    for (way, sql) in cases() {
        db.run("TRUNCATE t").await;
        let mut session = within(sessions.acquire()).await.unwrap();
        let pid = session.process_id();
        let tx = session.begin().await.unwrap();
        tx.execute("INSERT INTO t VALUES (1)", &[]).await.unwrap();
        say(&tx, way, sql).await;
        let told = within(tx.commit()).await;
        wrongs.check(matches!(told, Err(Error::TransactionEnded)), format!("{way:?} {sql:?}: {told:?}"));
        wrongs.check(goes(&db, pid).await, format!("{way:?} {sql:?}: the connection is still there"));
    }
}

#[tokio::test]
async fn sql_that_ends_the_transaction_of_a_batch_is_told_and_never_run_again() {
    let db = database().await;
    let sessions = db.single();
    let mut wrongs = Wrongs::default();
    for sql in ENDERS {
        db.run("TRUNCATE t").await;
        let mut session = within(sessions.acquire()).await.unwrap();
        let pid = session.process_id();
        let mut batch = session.batch();
        batch.push("INSERT INTO t SELECT 1 + count(*) FROM t", ());
        batch.push(sql, ());
        batch.push("INSERT INTO t SELECT 1 + count(*) FROM t", ());
        let told = within(batch.run()).await;
        drop(batch);
        wrongs.check(matches!(told, Err(Error::TransactionEnded)), format!("{sql:?}: {told:?}"));
        wrongs.check(ids(&db).await.len() <= 2, format!("{sql:?}: run again"));
        wrongs.check(goes(&db, pid).await, format!("{sql:?}: the connection is still there"));
    }
}

#[tokio::test]
async fn a_prepared_transaction_is_an_ended_one() {
    let server = PgServer::builder().setting("max_prepared_transactions", "5").start().unwrap();
    let database = TestDatabase::create(&server).await.unwrap();
    let watcher = common::connect(database.url()).await;
    watcher.batch_execute("CREATE TABLE t (id bigint)").await.unwrap();
    let db = Database { database, watcher };
    let sessions = db.single();
    let mut wrongs = Wrongs::default();
    for (n, way) in WAYS.into_iter().enumerate() {
        let mut session = within(sessions.acquire()).await.unwrap();
        let pid = session.process_id();
        let told: Result<(), Error> = within(session.transaction(async |tx| {
            tx.execute("INSERT INTO t VALUES (1)", &[]).await?;
            say(tx, way, &format!("PREPARE TRANSACTION 'p{n}'")).await;
            Ok(())
        }))
        .await;
        wrongs.check(matches!(told, Err(Error::TransactionEnded)), format!("{way:?}: {told:?}"));
        wrongs.check(goes(&db, pid).await, format!("{way:?}: the connection is still there"));
        db.run(&format!("ROLLBACK PREPARED 'p{n}'")).await;
    }
    drop((sessions, db));
}

#[tokio::test]
async fn what_sql_committed_is_not_run_again_after_a_serialization_failure() {
    let db = database().await;
    let sessions = db.single();
    for swallow in [false, true] {
        db.run("TRUNCATE t").await;
        let runs = AtomicUsize::new(0);
        let mut session = within(sessions.acquire()).await.unwrap();
        let told: Result<(), Error> = within(session.transaction(async |tx| {
            let run = runs.fetch_add(1, SeqCst) as i64;
            tx.execute("INSERT INTO t VALUES ($1)", &[&run]).await?;
            tx.execute("COMMIT", &[]).await?;
            let failed = tx.execute("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$", &[]).await;
            if swallow { Ok(()) } else { failed.map(drop) }
        }))
        .await;
        assert_eq!((runs.load(SeqCst), ids(&db).await), (1, vec![0]), "{told:?}");
        let error = told.unwrap_err();
        assert!(!swallow || matches!(error, Error::TransactionEnded), "{error:?}");
    }
}

#[tokio::test]
async fn what_sql_committed_is_not_run_again_after_the_connection_was_lost() {
    let db = database().await;
    let sessions = db.single();
    let runs = AtomicUsize::new(0);
    let policy = RetryPolicy::default().retry_on(RetryClass::ConnectionLost);
    let told: Result<(), Error> =
        within(sessions.transaction_with(TransactionOptions::new().retry(policy), async |tx| {
            let run = runs.fetch_add(1, SeqCst) as i64;
            tx.execute("INSERT INTO t VALUES ($1)", &[&run]).await?;
            tx.execute("COMMIT", &[]).await?;
            tx.execute("SELECT pg_terminate_backend(pg_backend_pid())", &[]).await.map(drop)
        }))
        .await;
    assert_eq!((runs.load(SeqCst), ids(&db).await), (1, vec![0]), "{told:?}");
    assert!(told.is_err());
}

#[tokio::test]
async fn savepoints_by_sql_are_allowed_and_do_not_end_it() {
    let db = database().await;
    let sessions = db.single();
    for way in [Way::Execute, Way::Text] {
        db.run("TRUNCATE t").await;
        within(sessions.transaction(async |tx| {
            tx.execute("INSERT INTO t VALUES (1)", &[]).await?;
            say(tx, way, "SAVEPOINT a").await;
            tx.execute("INSERT INTO t VALUES (2)", &[]).await?;
            say(tx, way, "ROLLBACK TO a").await;
            say(tx, way, "RELEASE a").await;
            tx.execute("INSERT INTO t VALUES (3)", &[]).await.map(drop)
        }))
        .await
        .unwrap_or_else(|e| panic!("{way:?}: {e}"));
        assert_eq!(ids(&db).await, [1, 3], "{way:?}");
    }
}

#[tokio::test]
async fn an_error_that_sql_rolled_back_to_a_savepoint_does_not_stop_the_commit() {
    let db = database().await;
    let sessions = db.single();
    for (way, by_hand) in [(Way::Execute, false), (Way::Text, false), (Way::Execute, true), (Way::Text, true)]
    {
        db.run("TRUNCATE t").await;
        let mut session = within(sessions.acquire()).await.unwrap();
        let work = async |tx: &pg_session::Transaction<'_>| {
            tx.execute("INSERT INTO t VALUES (1)", &[]).await?;
            say(tx, way, "SAVEPOINT a").await;
            let refused = tx.execute("INSERT INTO t VALUES (1)", &[]).await;
            assert!(refused.unwrap_err().is_unique_violation());
            say(tx, way, "ROLLBACK TO a").await;
            tx.execute("INSERT INTO t VALUES (3)", &[]).await?;
            tx.query_one("SELECT 1", &[]).await.map(drop)
        };
        let told = if by_hand {
            let tx = session.begin().await.unwrap();
            work(&tx).await.unwrap();
            within(tx.commit()).await
        } else {
            within(session.transaction(async |tx| work(tx).await)).await
        };
        assert!(told.is_ok(), "{way:?}, by hand: {by_hand}: {told:?}");
        assert_eq!(ids(&db).await, [1, 3], "{way:?}");
    }
}

#[tokio::test]
async fn a_procedure_that_commits_and_then_fails_is_called_once() {
    let db = database().await;
    db.run(
        "CREATE TABLE u (a int);
         CREATE PROCEDURE unknown_statement() LANGUAGE plpgsql AS $$ BEGIN
             INSERT INTO t SELECT count(*) FROM t; COMMIT; RAISE SQLSTATE '26000'; END $$;
         CREATE PROCEDURE stale_plan() LANGUAGE plpgsql AS $$ BEGIN
             INSERT INTO t SELECT count(*) FROM t; COMMIT;
             EXECUTE 'PREPARE q AS SELECT * FROM u'; EXECUTE 'EXECUTE q';
             ALTER TABLE u ADD COLUMN b int; EXECUTE 'EXECUTE q'; END $$",
    )
    .await;
    for (procedure, code) in [("unknown_statement", "26000"), ("stale_plan", "0A000")] {
        db.run("TRUNCATE t").await;
        let sessions = db.single();
        let session = within(sessions.acquire()).await.unwrap();
        let error = within(session.execute(&format!("CALL {procedure}()"), &[])).await.unwrap_err();
        assert_eq!(ids(&db).await, [0], "{procedure}: {error}");
        assert_eq!(error.code().unwrap().code(), code, "{procedure}");
    }
}

// A statement is abandoned.

/// What may be abandoned inside a transaction.
#[derive(Clone, Copy, Debug)]
enum Left {
    Cached,
    Uncached,
    Text,
    Batch,
    Many,
}

const LEFT: [Left; 5] = [Left::Cached, Left::Uncached, Left::Text, Left::Batch, Left::Many];

/// Stores row 2, dropped after so many polls; whether it was answered before.
async fn abandon(tx: &pg_session::Transaction<'_>, what: Left, left: usize) -> bool {
    let text = format!("INSERT INTO t /* {left} */ VALUES (2)");
    match what {
        Left::Cached => polls(tx.execute("INSERT INTO t VALUES ($1)", &[&2i64]), left).await.is_some(),
        Left::Uncached => polls(tx.execute(&text, &[]), left).await.is_some(),
        Left::Text => polls(tx.batch_execute(&text), left).await.is_some(),
        Left::Batch => {
            let mut batch = tx.batch();
            batch.push("INSERT INTO t VALUES ($1)", (2i64,));
            polls(batch.run(), left).await.is_some()
        }
        Left::Many => polls(tx.execute_many("INSERT INTO t VALUES ($1)", [(2i64,)]), left).await.is_some(),
    }
}

#[tokio::test]
async fn a_statement_dropped_unfinished_dooms_its_transaction() {
    let db = database().await;
    let sessions = db.single();
    let mut wrongs = Wrongs::default();
    // As the transaction's first statement, BEGIN is still to be sent.
    let shapes = LEFT.into_iter().flat_map(|what| {
        [(false, false), (false, true), (true, false), (true, true)]
            .map(|(first, by_hand)| (what, first, by_hand))
    });
    for (what, first, by_hand) in shapes {
        let mut completed = false;
        for left in 1..MOST_POLLS {
            db.run("TRUNCATE t").await;
            let answered = AtomicBool::new(false);
            let mut session = within(sessions.acquire()).await.unwrap();
            let work = async |tx: &pg_session::Transaction<'_>| {
                if !first {
                    tx.execute("INSERT INTO t VALUES ($1)", &[&1i64]).await?;
                }
                answered.store(abandon(tx, what, left).await, SeqCst);
                Ok(())
            };
            let told = if by_hand {
                let tx = session.begin().await.unwrap();
                within(work(&tx)).await.unwrap_or_else(|e: Error| panic!("{e}"));
                within(tx.commit()).await
            } else {
                within(session.transaction(async |tx| work(tx).await)).await
            };
            drop(session);
            db.until_quiet().await;
            let ids = ids(&db).await;
            completed = answered.load(SeqCst);
            let all = if first { vec![2] } else { vec![1, 2] };
            let right = match &told {
                Ok(()) => completed && ids == all,
                Err(Error::StatementAbandoned) => !completed && ids.is_empty(),
                Err(_) => false,
            };
            wrongs.check(
                right,
                format!(
                    "{what:?}, first {first}, by hand {by_hand}, {left} polls, answered {completed}: {told:?}, {ids:?}"
                ),
            );
            if completed {
                break;
            }
        }
        assert!(completed, "{what:?} never completed");
    }
}

#[tokio::test]
async fn a_statement_that_was_never_polled_is_not_abandoned() {
    let db = database().await;
    let sessions = db.single();
    for what in LEFT {
        db.run("TRUNCATE t").await;
        within(sessions.transaction(async |tx| {
            tx.execute("INSERT INTO t VALUES ($1)", &[&1i64]).await?;
            assert!(!abandon(tx, what, 0).await);
            Ok::<_, Error>(())
        }))
        .await
        .unwrap_or_else(|e| panic!("{what:?}: {e}"));
        assert_eq!(ids(&db).await, [1], "{what:?}");
    }
}

#[tokio::test]
async fn a_statement_dropped_unfinished_in_a_savepoint_dooms_the_savepoint_only() {
    let db = database().await;
    let sessions = db.single();
    let mut wrongs = Wrongs::default();
    for what in LEFT {
        let mut completed = false;
        for left in 1..MOST_POLLS {
            db.run("TRUNCATE t").await;
            let (answered, saved) = (AtomicBool::new(false), std::sync::Mutex::new(String::new()));
            let told: Result<(), Error> = within(sessions.transaction(async |tx| {
                tx.execute("INSERT INTO t VALUES ($1)", &[&1i64]).await?;
                let inner: Result<(), Error> = tx
                    .savepoint(async |sp| {
                        answered.store(abandon(sp, what, left).await, SeqCst);
                        Ok(())
                    })
                    .await;
                *saved.lock().unwrap() = match inner {
                    Ok(()) => "kept".into(),
                    Err(Error::StatementAbandoned) => "abandoned".into(),
                    Err(e) => format!("{e:?}"),
                };
                tx.execute("INSERT INTO t VALUES ($1)", &[&3i64]).await?;
                Ok(())
            }))
            .await;
            db.until_quiet().await;
            completed = answered.load(SeqCst);
            let saved = saved.into_inner().unwrap();
            let ids = ids(&db).await;
            let right = if completed {
                saved == "kept" && ids == [1, 2, 3]
            } else {
                saved == "abandoned" && ids == [1, 3]
            };
            wrongs.check(
                right && told.is_ok(),
                format!("{what:?}, {left} polls, answered {completed}: {saved}, {told:?}, {ids:?}"),
            );
            if completed {
                break;
            }
        }
        assert!(completed, "{what:?} never completed");
    }
}

// COMMIT, and errors that hide others.

#[derive(Clone, Copy, Debug)]
enum Insert {
    Execute,
    Query,
    QueryOne,
    Stream,
    Text,
    CopyIn,
    CopyRowsIn,
    CopyOut,
    Batch,
    Many,
}

#[tokio::test]
async fn a_constraint_that_fails_at_the_implicit_commit_is_told_by_every_verb() {
    let db = database().await;
    db.run("CREATE TABLE child (id bigint REFERENCES t DEFERRABLE INITIALLY DEFERRED)").await;
    let sessions = db.single();
    let mut wrongs = Wrongs::default();
    const INSERT: &str = "INSERT INTO child VALUES ($1) RETURNING id";
    for verb in [
        Insert::Execute,
        Insert::Query,
        Insert::QueryOne,
        Insert::Stream,
        Insert::Text,
        Insert::CopyIn,
        Insert::CopyRowsIn,
        Insert::CopyOut,
        Insert::Batch,
        Insert::Many,
    ] {
        let mut session = within(sessions.acquire()).await.unwrap();
        let work = async {
            match verb {
                Insert::Execute => session.execute(INSERT, &[&5i64]).await.map(drop),
                Insert::Query => session.query(INSERT, &[&5i64]).await.map(drop),
                Insert::QueryOne => session.query_one(INSERT, &[&5i64]).await.map(drop),
                Insert::Stream => {
                    let mut rows = session.query_stream(INSERT, &[&5i64]).await?;
                    while let Some(row) = rows.next().await {
                        row?;
                    }
                    Ok(())
                }
                Insert::Text => session.batch_execute("INSERT INTO child VALUES (5)").await,
                Insert::CopyIn => {
                    let mut copy = session.copy_in("COPY child FROM STDIN").await?;
                    copy.send(Bytes::from_static(b"5\n")).await?;
                    copy.finish().await.map(drop)
                }
                Insert::CopyRowsIn => session.copy_rows_in("child", &["id"]).send([(5i64,)]).await.map(drop),
                Insert::CopyOut => {
                    let sql = "COPY (INSERT INTO child VALUES (5) RETURNING id) TO STDOUT";
                    let mut data = session.copy_out(sql).await?;
                    while let Some(data) = data.next().await {
                        data?;
                    }
                    Ok(())
                }
                Insert::Batch => session.batch().push(INSERT, (5i64,)).run().await.map(drop),
                Insert::Many => session.execute_many(INSERT, [(5i64,)]).await.map(drop),
            }
        };
        let told = within(work).await;
        let refused = told.as_ref().is_err_and(Error::is_foreign_key_violation);
        wrongs.check(refused, format!("{verb:?}: {told:?}"));
        wrongs.check(db.number("SELECT count(*) FROM child").await == 0, format!("{verb:?}: stored"));
        let next = within(session.query_one("SELECT 1", &[])).await;
        wrongs.check(next.is_ok(), format!("{verb:?}: the session: {next:?}"));
    }
}

#[tokio::test]
async fn what_is_to_follow_a_commit_follows_although_its_caller_is_gone() {
    let db = database().await;
    let gate = Gate::at_commits(&db).await;
    let sessions = db.single();
    for by_hand in [false, true] {
        db.run("TRUNCATE t").await;
        let followed = Arc::new(AtomicUsize::new(0));
        let mut session = within(sessions.acquire()).await.unwrap();
        gate.close().await;
        let follow = {
            let followed = Arc::clone(&followed);
            move |tx: &pg_session::Transaction<'_>| {
                tx.on_commit(move || async move {
                    followed.fetch_add(1, SeqCst);
                });
            }
        };
        let work = async {
            if by_hand {
                let tx = session.begin().await?;
                tx.execute("INSERT INTO t VALUES (1)", &[]).await?;
                follow(&tx);
                tx.commit().await
            } else {
                session
                    .transaction(async move |tx| {
                        tx.execute("INSERT INTO t VALUES (1)", &[]).await?;
                        follow(tx);
                        Ok(())
                    })
                    .await
            }
        };
        tokio::select! {
            told = within(work) => panic!("committed before it was dropped: {told:?}"),
            () = gate.until_reached() => {}
        }
        drop(session);
        gate.open().await;
        db.until("EXISTS (SELECT FROM t)").await;
        until_returned(&sessions).await;
        until(|| followed.load(SeqCst) > 0).await;
        assert_eq!(followed.load(SeqCst), 1, "by hand: {by_hand}");
    }
}

#[tokio::test]
async fn a_savepoint_on_a_broken_connection_gives_the_closures_own_error() {
    let db = database().await;
    let sessions = db.single();
    let inner = std::sync::Mutex::new(None);
    let told: Result<(), Own> = within(sessions.transaction(async |tx| {
        tx.execute("INSERT INTO t VALUES (1)", &[]).await?;
        let saved: Result<(), Own> = tx
            .savepoint(async |sp| {
                let _ = sp.execute("SELECT pg_terminate_backend(pg_backend_pid())", &[]).await;
                Err(Own::Mine)
            })
            .await;
        *inner.lock().unwrap() = Some(matches!(saved, Err(Own::Mine)));
        saved
    }))
    .await;
    assert_eq!(inner.into_inner().unwrap(), Some(true), "{told:?}");
    assert!(matches!(told, Err(Own::Mine)), "{told:?}");
    assert_eq!(ids(&db).await, [0; 0]);
}
