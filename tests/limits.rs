//! Nothing hangs, and nothing is lost, at the edges: streams beside one another, a full cache, statements that the
//! driver refuses itself, the last place of a pool, and statements of another connection.
#![cfg(feature = "testing")]

mod common;

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::{Database, polls, within};
use pg_session::{Connection, Error, RowStream, SessionManager};

async fn database() -> Database {
    let db = Database::new().await;
    db.run("CREATE TABLE t (id bigint PRIMARY KEY)").await;
    db
}

/// Well below the limit of a test, well above what any of these takes.
async fn soon<F: Future>(future: F, what: &str) -> F::Output {
    let ended = tokio::time::timeout(Duration::from_secs(10), future).await;
    ended.unwrap_or_else(|_| panic!("it hangs: {what}"))
}

/// Reads all of a stream; or says that something else is under way.
async fn read(db: &Connection, sql: &str) -> Result<usize, Error> {
    let mut rows = db.query_stream(sql, &[]).await?;
    let mut read = 0;
    while let Some(row) = rows.next().await {
        row?;
        read += 1;
    }
    Ok(read)
}

fn whole_or_busy(told: Result<usize, Error>, what: &str) {
    match told {
        Ok(20_000) | Err(Error::StreamOpen | Error::Busy) => {}
        other => panic!("{what}: {other:?}"),
    }
}

#[tokio::test]
async fn streams_and_queries_beside_one_another_work_or_say_that_the_session_is_busy() {
    let db = database().await;
    let sessions = db.single();
    for (cached, inside) in [(false, false), (true, false), (false, true), (true, true)] {
        let texts = [1, 2].map(|n| {
            format!("SELECT {n}, '{cached} {inside}', repeat('x', 100) FROM generate_series(1, 20000)")
        });
        let what = format!("cached {cached}, in a transaction {inside}");
        let mut session = within(sessions.acquire()).await.unwrap();
        let beside = async |db: &Connection| {
            if cached {
                for text in &texts {
                    db.prepare(text).await?;
                }
            }
            let both = async { tokio::join!(read(db, &texts[0]), read(db, &texts[1])) };
            let (one, other) = soon(both, &what).await;
            assert!(one.is_ok() || other.is_ok(), "{what}");
            whole_or_busy(one, &what);
            whole_or_busy(other, &what);
            let query = async { db.query(&texts[1], &[]).await.map(|rows| rows.len()) };
            let both = async { tokio::join!(read(db, &texts[0]), query) };
            let (one, other) = soon(both, &what).await;
            whole_or_busy(one, &what);
            whole_or_busy(other, &what);
            let query = async { db.query(&texts[1], &[]).await.map(|rows| rows.len()) };
            let both = async { tokio::join!(query, read(db, &texts[0])) };
            let (one, other) = soon(both, &what).await;
            whole_or_busy(one, &what);
            whole_or_busy(other, &what);
            Ok::<_, Error>(())
        };
        if inside {
            // Busy is not an error of the server's, so the transaction is not aborted by it.
            session.transaction(async |tx| beside(tx).await).await.unwrap();
        } else {
            beside(&session).await.unwrap();
        }
        assert_eq!(within(session.query_one("SELECT 7", &[])).await.unwrap().get::<_, i32>(0), 7);
    }
}

/// Reads what was opened, if it was.
async fn rest(stream: Result<RowStream<'_>, Error>) -> Result<usize, Error> {
    let mut rows = stream?;
    let mut read = 0;
    while let Some(row) = rows.next().await {
        row?;
        read += 1;
    }
    Ok(read)
}

#[tokio::test]
async fn streams_opened_together_before_either_is_read_do_not_hang() {
    let db = database().await;
    let sessions = db.single();
    for (cached, inside) in [(false, false), (true, false), (false, true), (true, true)] {
        let texts = [1, 2].map(|n| {
            format!("SELECT {n}, '{cached} {inside}', repeat('y', 100) FROM generate_series(1, 20000)")
        });
        let what = format!("cached {cached}, in a transaction {inside}");
        let mut session = within(sessions.acquire()).await.unwrap();
        let together = async |db: &Connection| {
            if cached {
                for text in &texts {
                    db.prepare(text).await?;
                }
            }
            let both =
                async { tokio::join!(db.query_stream(&texts[0], &[]), db.query_stream(&texts[1], &[])) };
            let (one, other) = soon(both, &format!("two streams, {what}")).await;
            assert!(one.is_ok() || other.is_ok(), "{what}");
            let both = async { tokio::join!(rest(one), rest(other)) };
            let (one, other) = soon(both, &what).await;
            whole_or_busy(one, &what);
            whole_or_busy(other, &what);
            let query = async { db.query(&texts[1], &[]).await.map(|rows| rows.len()) };
            let both = async { tokio::join!(db.query_stream(&texts[0], &[]), query) };
            let (stream, query) = soon(both, &format!("a stream and a query, {what}")).await;
            whole_or_busy(query, &what);
            whole_or_busy(soon(rest(stream), &what).await, &what);
            Ok::<_, Error>(())
        };
        if inside {
            session.transaction(async |tx| together(tx).await).await.unwrap();
        } else {
            together(&session).await.unwrap();
        }
        assert_eq!(within(session.query_one("SELECT 7", &[])).await.unwrap().get::<_, i32>(0), 7);
    }
}

#[tokio::test]
async fn many_rows_beside_a_full_cache_name_the_wrong_row_and_leave_no_statements() {
    let db = database().await;
    let sessions = SessionManager::new(db.config().max_size(1).statement_cache_capacity(1)).unwrap();
    let mut session = within(sessions.acquire()).await.unwrap();
    for n in 0..100i64 {
        within(session.query_one("SELECT 1", &[])).await.unwrap(); // fills the cache
        let text = format!("INSERT INTO t /* {n} */ VALUES ($1)");
        let rows = [10, 11, 12, 10, 13].map(|id: i64| (id,));
        let error = within(session.execute_many(&text, rows)).await.unwrap_err();
        let Error::Batch(refused) = &error else { panic!("{error:?}") };
        assert_eq!(refused.position(), 4, "{error:?}");
        assert!(error.is_unique_violation(), "{error:?}");
    }
    assert_eq!(db.number("SELECT count(*) FROM t").await, 0);
    let left: i64 =
        within(session.query_one("SELECT count(*) FROM pg_prepared_statements", &[])).await.unwrap().get(0);
    assert!(left <= 10, "{left} statements are left on the server");
    // What the driver refuses comes before anything is sent, and leaves nothing either.
    for n in 0..100i64 {
        within(session.query_one("SELECT 1", &[])).await.unwrap();
        let text = format!("INSERT INTO t /* refused {n} */ VALUES ($1)");
        within(session.execute_many(&text, [("text",)])).await.unwrap_err();
    }
    let left: i64 =
        within(session.query_one("SELECT count(*) FROM pg_prepared_statements", &[])).await.unwrap().get(0);
    assert!(left <= 10, "{left} statements are left on the server");
}

#[tokio::test]
async fn statements_that_the_driver_refuses_itself_disturb_nothing() {
    #[derive(Clone, Copy, Debug)]
    enum Next {
        Many,
        Execute,
        Batch,
        Text,
        Stream,
        Nothing,
    }
    let db = database().await;
    let sessions = db.single();
    const INSERT: &str = "INSERT INTO t VALUES ($1)";
    let mut wrong = Vec::new();
    let nexts = [Next::Many, Next::Execute, Next::Batch, Next::Text, Next::Stream, Next::Nothing];
    // So often the driver's task has its turn in between.
    for (next, yields) in nexts.into_iter().flat_map(|next| (0..8).map(move |yields| (next, yields))) {
        for (warm, first, swallow) in [
            (false, true, false),
            (true, true, false),
            (true, true, true),
            (true, false, false),
            (true, false, true),
        ] {
            db.run("TRUNCATE t").await;
            let mut session = within(sessions.acquire()).await.unwrap();
            let pid = session.process_id();
            if warm {
                let warmed = session.transaction(async |tx| tx.execute(INSERT, &[&9i64]).await);
                within(warmed).await.unwrap();
                db.run("TRUNCATE t").await;
            }
            let told = within(session.transaction(async |tx| {
                if first {
                    tx.execute(INSERT, &[&"text"]).await.map(drop).or_else(refused_by_the_driver)?;
                }
                let inner: Result<(), Error> = tx
                    .savepoint(async |sp| {
                        let refused = sp.execute(INSERT, &[&"text"]).await.map(drop);
                        if swallow { refused.or_else(refused_by_the_driver) } else { refused }
                    })
                    .await;
                assert_eq!(inner.is_ok(), swallow, "{inner:?}");
                for _ in 0..yields {
                    tokio::task::yield_now().await;
                }
                match next {
                    Next::Many => tx.execute_many(INSERT, [(1i64,)]).await.map(drop),
                    Next::Execute => tx.execute(INSERT, &[&1i64]).await.map(drop),
                    Next::Batch => tx.batch().push(INSERT, (1i64,)).run().await.map(drop),
                    Next::Text => tx.batch_execute("INSERT INTO t VALUES (1)").await,
                    Next::Stream => read(tx, "INSERT INTO t VALUES (1) RETURNING id").await.map(drop),
                    Next::Nothing => Ok(()),
                }
            }))
            .await;
            let stored = db.number("SELECT count(*) FROM t").await;
            let expected = i64::from(!matches!(next, Next::Nothing));
            if told.is_err() || stored != expected {
                wrong.push(format!(
                    "warm {warm}, first {first}, swallow {swallow}, {yields} yields, {next:?}: {told:?}, {stored} stored"
                ));
                continue;
            }
            // The same outside.
            for _ in 0..2 {
                within(session.execute(INSERT, &[&"text"])).await.unwrap_err();
            }
            within(session.execute_many(INSERT, [(3i64,)])).await.unwrap();
            within(session.execute(INSERT, &[&4i64])).await.unwrap();
            assert_eq!(session.process_id(), pid);
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

fn refused_by_the_driver(error: Error) -> Result<(), Error> {
    assert!(error.code().is_none() && matches!(error, Error::Database(_)), "{error:?}");
    Ok(())
}

#[tokio::test]
async fn what_follows_a_commit_may_have_the_only_session() {
    let db = database().await;
    let config = db.config().max_size(1).acquire_timeout(Duration::from_secs(3));
    let sessions = SessionManager::new(config).unwrap();
    let followed = Arc::new(AtomicUsize::new(0));
    let (hook_sessions, hook_followed) = (sessions.clone(), Arc::clone(&followed));
    within(sessions.transaction(async move |tx| {
        tx.execute("INSERT INTO t VALUES (1)", &[]).await?;
        let (sessions, followed) = (hook_sessions.clone(), Arc::clone(&hook_followed));
        tx.on_commit(move || async move {
            let session =
                sessions.acquire().await.expect("a session, though the transaction had the only one");
            session.execute("INSERT INTO t VALUES (2)", &[]).await.expect("stored");
            followed.fetch_add(1, SeqCst);
        });
        Ok::<_, Error>(())
    }))
    .await
    .unwrap();
    assert_eq!(followed.load(SeqCst), 1);
    assert_eq!(db.number("SELECT count(*) FROM t").await, 2);
}

#[tokio::test]
async fn an_answer_that_nobody_reads_holds_up_the_next_statement_for_the_cleanup_at_most() {
    let db = database().await;
    let config = db.config().max_size(1).cleanup_timeout(Duration::from_millis(500));
    let sessions = SessionManager::new(config).unwrap();
    let session = within(sessions.acquire()).await.unwrap();
    let pid = session.process_id();
    for sql in ["SELECT 1", "SELECT 2, pg_sleep(7)"] {
        within(session.prepare(sql)).await.unwrap();
    }
    // Sent, answered, and held without being polled.
    let mut kept = pin!(session.query("SELECT 1", &[]));
    assert!(polls(&mut kept, 1).await.is_none());
    {
        let mut dropped = pin!(session.query("SELECT 2, pg_sleep(7)", &[]));
        tokio::select! {
            biased;
            _ = &mut dropped => panic!("slept"),
            () = db.until_sleeping(pid) => {}
        }
    }
    let started = Instant::now();
    let told = within(session.query("SELECT 3", &[])).await;
    let took = started.elapsed();
    assert!(took < Duration::from_secs(4), "{took:?}: {told:?}");
}

#[tokio::test]
async fn a_statement_of_another_connection_is_refused_at_once_and_once() {
    let db = database().await;
    let sessions = SessionManager::new(db.config().max_size(2)).unwrap();
    let (one, mut other) = (sessions.acquire().await.unwrap(), sessions.acquire().await.unwrap());
    let statement = within(one.prepare("SELECT $1::int8 AS foreign_one")).await.unwrap();
    let runs = AtomicUsize::new(0);
    let told: Result<(), Error> = within(other.transaction(async |tx| {
        runs.fetch_add(1, SeqCst);
        tx.query(&statement, &[&1i64]).await.map(drop)
    }))
    .await;
    let error = told.unwrap_err();
    assert_eq!(runs.load(SeqCst), 1, "{error:?}");
    let error = within(other.query(&statement, &[&1i64])).await.unwrap_err();
    let text = format!("{error} {error:?}").to_lowercase();
    assert!(text.contains("another connection") || text.contains("other connection"), "{text}");
    within(one.query(&statement, &[&1i64])).await.unwrap();
    within(other.query_one("SELECT 1", &[])).await.unwrap();
}

#[tokio::test]
async fn a_value_of_the_wrong_type_is_named_by_its_placeholder() {
    let db = database().await;
    let session = within(db.single().acquire()).await.unwrap();
    let params: [&(dyn postgres_types::ToSql + Sync); 2] = [&1i64, &"text"];
    let error = within(session.query("SELECT $1::int8, $2::int4", &params)).await.unwrap_err();
    let text = chain(&error);
    assert!(text.contains("$2") || text.contains("int4"), "{text}");
    assert!(!text.contains("parameter 1"), "counted from zero: {text}");
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(next) = source {
        text = format!("{text}: {next}");
        source = next.source();
    }
    text
}

#[tokio::test]
async fn copy_in_after_all_statements_were_deallocated_works_or_says_what_is_wrong() {
    let db = database().await;
    let session = within(db.single().acquire()).await.unwrap();
    let pid = session.process_id();
    let copy = async |id: &'static str| {
        let mut copy = session.copy_in("COPY t FROM STDIN").await?;
        copy.send(Bytes::from_static(id.as_bytes())).await?;
        copy.finish().await
    };
    assert_eq!(within(copy("1\n")).await.unwrap(), 1);
    within(session.batch_execute("DEALLOCATE ALL")).await.unwrap();
    let told = within(copy("2\n")).await;
    if let Err(e) = &told {
        assert_eq!(e.code().map(|code| code.code()), Some("26000"), "{e:?}");
    }
    assert_eq!(within(copy("3\n")).await.unwrap(), 1, "after {told:?}");
    assert_eq!(session.process_id(), pid, "after {told:?}");
}
