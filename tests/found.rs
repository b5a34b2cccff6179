//! What an adversary found: SQL that hides what it does, COPY where none is wanted, names that stand for something else, and
//! what fails inside a savepoint.
#![cfg(feature = "testing")]

mod common;

use common::{Database, ms, until_returned};
use pg_session::{Error, SessionManager, TransactionOptions};

async fn table() -> (Database, SessionManager) {
    let db = Database::new().await;
    db.run("CREATE TABLE t (a int)").await;
    let sessions = db.single();
    (db, sessions)
}

const COUNT: &str = "SELECT count(*) FROM t";

#[tokio::test]
async fn copies_in_one_text_are_refused_and_nothing_hangs() {
    let (_db, m) = table().await;
    let s = m.acquire().await.unwrap();
    let r = tokio::time::timeout(ms(10_000), s.batch_execute("COPY t TO STDOUT; COPY t FROM STDIN")).await;
    assert!(r.is_ok(), "it hangs");
}

#[tokio::test]
async fn what_is_told_as_refused_was_not_done() {
    let (db, m) = table().await;
    let s = m.acquire().await.unwrap();
    let e = s.batch_execute("INSERT INTO t VALUES (1); COPY t TO STDOUT").await.unwrap_err();
    assert!(e.is_outcome_unknown() || db.number(COUNT).await == 0, "{e}, and the row is there");
}

#[tokio::test]
async fn a_copy_by_another_verb_does_nothing() {
    let (db, m) = table().await;
    m.transaction(async |tx| {
        let copy = "COPY (INSERT INTO t VALUES (1) RETURNING a) TO STDOUT";
        assert!(matches!(tx.execute(copy, &[]).await, Err(Error::Config(_))));
        tx.execute("INSERT INTO t VALUES (2)", &[]).await
    })
    .await
    .unwrap();
    assert_eq!(db.number("SELECT sum(a) FROM t").await, 2);
}

#[tokio::test]
async fn a_chain_hidden_behind_a_continued_string_is_seen() {
    let (db, m) = table().await;
    let r = m
        .transaction(async |tx| {
            tx.execute("INSERT INTO t VALUES (1)", &[]).await?;
            tx.batch_execute("SELECT E'a'\n'\\''; ROLLBACK AND CHAIN; SELECT ''").await?;
            tx.execute("INSERT INTO t VALUES (2)", &[]).await
        })
        .await;
    assert!(r.is_err() || db.number(COUNT).await == 2, "{r:?}, and {} row", db.number(COUNT).await);
}

#[tokio::test]
async fn a_setting_hidden_behind_a_continued_string_is_not_handed_on() {
    let (_db, m) = table().await;
    m.acquire()
        .await
        .unwrap()
        .query("SELECT E'a'\n'\\'', set_config('app.tenant', 'acme', false), ''", &[])
        .await
        .unwrap();
    let row = m
        .acquire()
        .await
        .unwrap()
        .query_one("SELECT current_setting('app.tenant', true)", &[])
        .await
        .unwrap();
    assert_ne!(row.get::<_, Option<&str>>(0), Some("acme"));
}

#[tokio::test]
async fn the_next_borrower_can_begin_though_statements_were_dropped_unseen() {
    let (_db, m) = table().await;
    let work = async || {
        let mut s = m.acquire().await?;
        let tx = s.begin().await?;
        tx.query(&format!("SELECT {}", fastrand::u32(..)), &[]).await?;
        tx.commit().await
    };
    work().await.unwrap();
    m.acquire().await.unwrap().execute("DO $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$", &[]).await.unwrap();
    until_returned(&m).await;
    work().await.unwrap();
}

#[tokio::test]
async fn no_commit_fails_for_want_of_a_name() {
    let (db, m) = table().await;
    for _ in 0..2 {
        let tx = m.begin().await.unwrap();
        tx.batch_execute("INSERT INTO t VALUES (1)").await.unwrap();
        tx.batch_execute("DO $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$").await.unwrap();
        tx.commit().await.unwrap_or_else(|e| panic!("{e}"));
        until_returned(&m).await;
    }
    assert_eq!(db.number(COUNT).await, 2);
}

#[tokio::test]
async fn a_local_setting_is_made_whatever_is_prepared_by_its_name() {
    let (_db, m) = table().await;
    let mut s = m.acquire().await.unwrap();
    let o = TransactionOptions::new().local_setting("app.tenant", "acme");
    let tenant = async |tx: &mut pg_session::Transaction<'_>| {
        Ok::<Option<String>, Error>(
            tx.query_one("SELECT current_setting('app.tenant', true)", &[]).await?.get(0),
        )
    };
    assert_eq!(s.transaction_with(o.clone(), tenant).await.unwrap().as_deref(), Some("acme"));
    s.execute("PREPARE \"pgs:set_config\"(text, text) AS SELECT $1 || $2", &[]).await.unwrap();
    assert_eq!(s.transaction_with(o, tenant).await.unwrap().as_deref(), Some("acme"));
}

#[tokio::test]
async fn a_stale_statement_in_a_savepoint_is_retried() {
    let (db, m) = table().await;
    let mut s = m.acquire().await.unwrap();
    s.query("SELECT * FROM t", &[]).await.unwrap();
    db.run("ALTER TABLE t ADD COLUMN b int").await;
    s.transaction(async |tx| tx.savepoint(async |sp| sp.query("SELECT * FROM t", &[]).await).await)
        .await
        .unwrap_or_else(|e| panic!("{e}"));
}

#[tokio::test]
async fn a_refused_start_is_the_cause_though_a_savepoint_was_first() {
    let (_db, m) = table().await;
    let r: Result<(), Error> = m
        .transaction_with(TransactionOptions::new().local_setting("work_mem", "bogus"), async |tx| {
            tx.savepoint(async |sp| sp.execute("INSERT INTO t VALUES (1)", &[]).await).await.ok();
            Ok(())
        })
        .await;
    assert_eq!(r.as_ref().unwrap_err().code().map(|c| c.code()), Some("22023"), "{r:?}");
}

#[tokio::test]
async fn a_copy_by_another_verb_harms_no_neighbour() {
    let (_db, m) = table().await;
    let s = m.acquire().await.unwrap();
    for sql in ["COPY t FROM STDIN", "SELECT 1"] {
        s.prepare(sql).await.unwrap();
    }
    let r = tokio::join!(s.execute("COPY t FROM STDIN", &[]), s.query("SELECT 1", &[]));
    s.query("SELECT 1", &[]).await.unwrap_or_else(|e| panic!("{e}; {r:?}"));
}

#[tokio::test]
async fn what_follows_a_begin_that_was_none_is_told_as_ended_by_sql() {
    let (_db, m) = table().await;
    let mut s = m.acquire().await.unwrap();
    let insert = "INSERT INTO t VALUES (1)";
    for _ in 0..2 {
        s.transaction(async |tx| tx.execute(insert, &[]).await).await.unwrap();
    }
    // By a function, where no command's tag tells of it.
    s.execute("CREATE FUNCTION replace_it() RETURNS int LANGUAGE plpgsql AS $f$ BEGIN EXECUTE 'DEALLOCATE \"pgs:BEGIN\"'; \
               EXECUTE 'PREPARE \"pgs:BEGIN\" AS SELECT 1'; RETURN 1; END $f$", &[]).await.unwrap();
    s.transaction(async |tx| tx.execute("SELECT 1", &[]).await).await.unwrap();
    s.query("SELECT replace_it()", &[]).await.unwrap();
    let told = s.transaction(async |tx| tx.execute(insert, &[]).await).await;
    assert!(matches!(told, Err(Error::TransactionEnded)), "{told:?}");
}
