//! COPY: typed rows in and out, what fails and how it is told, what is left behind; text and CSV as they are.
#![cfg(feature = "testing")]

mod common;

use std::collections::HashMap;
use std::error::Error as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, SystemTime};

use bytes::{Bytes, BytesMut};
use common::{Database, polls, until_returned, within};
use futures_util::{StreamExt, stream};
use pg_session::tokio_postgres::types::{IsNull, ToSql, Type, to_sql_checked};
use pg_session::{
    Connection, CopyProgress, Error, FieldWriter, IsolationLevel, Record, Session, SessionManager,
    TransactionOptions,
};

async fn session_with(schema: &str) -> (Database, SessionManager, Session) {
    let db = Database::new().await;
    db.run(schema).await;
    let sessions = db.single();
    let session = within(sessions.acquire()).await.unwrap();
    (db, sessions, session)
}

const ITEMS: &str = "CREATE TABLE items (id bigint PRIMARY KEY, name text NOT NULL)";

async fn count(db: &Connection) -> i64 {
    within(db.query_one("SELECT count(*) FROM items", &[])).await.unwrap().get(0)
}

fn copy_error(error: &Error) -> (u64, Option<&str>) {
    match error {
        Error::Copy(e) => (e.row(), e.column()),
        other => panic!("not of a row: {other:?}"),
    }
}

#[tokio::test]
async fn every_plain_type_goes_in_and_comes_out() {
    let (_db, _sessions, session) = session_with(
        "CREATE TYPE mood AS ENUM ('glad', 'sad'); CREATE DOMAIN cents AS bigint CHECK (VALUE >= 0);
         CREATE TABLE t (n int, a bool, b \"char\", c smallint, d int, e bigint, f oid, g real, h float8, i text, \
             j varchar(9), k bytea, l timestamptz, m int[], o text[], p cents, q mood)",
    )
    .await;
    let at = SystemTime::UNIX_EPOCH + Duration::from_micros(1_700_000_000_123_456);
    let row = (
        1i32,
        true,
        7i8,
        2i16,
        3i32,
        4i64,
        5u32,
        1.5f32,
        2.5f64,
        "text",
        String::from("vär"),
        &b"\0\xff"[..],
        at,
        vec![Some(1i32), None],
        vec!["a", "b"],
    );
    let columns = ["n", "a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "o"];
    assert_eq!(within(session.copy_rows_in("t", &columns).send([&row])).await.unwrap(), 1);
    let glad = Mood("glad");
    let rest: [&(dyn ToSql + Sync); 3] = [&2i32, &9i64, &glad];
    assert_eq!(within(session.copy_rows_in("t", &["n", "p", "q"]).send([rest])).await.unwrap(), 1);

    let mut rows = within(session.copy_query_out("SELECT * FROM t ORDER BY n -- all")).await.unwrap();
    let one = within(rows.next()).await.unwrap().unwrap();
    assert_eq!((one.get::<i32>("n"), one.get::<bool>("a"), one.get::<i8>("b")), (1, true, 7));
    assert_eq!((one.get::<i16>("c"), one.get::<i32>("d"), one.get::<i64>("e")), (2, 3, 4));
    assert_eq!((one.get::<u32>("f"), one.get::<f32>("g"), one.get::<f64>("h")), (5, 1.5, 2.5));
    assert_eq!((one.get::<&str>("i"), one.get::<String>("j")), ("text", "vär".to_owned()));
    assert_eq!((one.get::<&[u8]>("k"), one.get::<SystemTime>("l")), (&b"\0\xff"[..], at));
    assert_eq!(one.get::<Vec<Option<i32>>>("m"), [Some(1), None]);
    assert_eq!(one.get::<Vec<String>>("o"), ["a", "b"]);
    assert_eq!(one.get::<Option<i64>>("p"), None);
    let two = within(rows.next()).await.unwrap().unwrap();
    assert_eq!((two.get::<i32>(0), two.get::<Option<bool>>(1), two.get::<i64>("p")), (2, None, 9));
    assert!(two.columns().iter().any(|c| c.name() == "q" && c.type_().name() == "mood"));
    // What cannot be had says of which row and column.
    assert_eq!(copy_error(&two.try_get::<bool>("a").unwrap_err()), (2, Some("a")));
    assert_eq!(copy_error(&two.try_get::<i64>("n").unwrap_err()), (2, Some("n")));
    assert!(two.try_get::<i64>("none").unwrap_err().to_string().contains("no column \"none\""));
    assert!(two.try_get::<i64>(99).is_err());
    assert!(within(rows.next()).await.is_none());
    assert_eq!(count_of(&session, "SELECT count(*) FROM t WHERE q = 'glad'").await, 1);
}

async fn count_of(db: &Connection, sql: &str) -> i64 {
    within(db.query_one(sql, &[])).await.unwrap().get(0)
}

/// A value of an enum without the driver's derive.
#[derive(Debug)]
struct Mood(&'static str);

impl ToSql for Mood {
    fn to_sql(
        &self,
        ty: &Type,
        out: &mut BytesMut,
    ) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        self.0.to_sql(ty, out)
    }

    fn accepts(ty: &Type) -> bool {
        ty.name() == "mood"
    }

    to_sql_checked!();
}

#[tokio::test]
async fn a_hundred_thousand_rows_come_out_as_they_went_in() {
    let (_db, _sessions, session) =
        session_with("CREATE TABLE t (id bigint, name text, at timestamptz, n int)").await;
    let row = |id: i64| {
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(id as u64);
        (id, format!("name {id}"), at, (id % 3 == 0).then_some(id as i32))
    };
    let mut told = Vec::new();
    let columns = ["id", "name", "at", "n"];
    let copy = session.copy_rows_in("public.t", &columns).progress(|sent| told.push(sent));
    assert_eq!(within(copy.send((0..100_000).map(row))).await.unwrap(), 100_000);
    check_progress(&told, 100_000);
    let mut rows = within(session.copy_rows_out("t", &["n", "at", "name", "id"])).await.unwrap();
    assert!(matches!(session.query("SELECT 1", &[]).await, Err(Error::StreamOpen)));
    let mut next = 0;
    while let Some(got) = within(rows.next()).await {
        let got = got.unwrap();
        assert_eq!((got.get(3), got.get(2), got.get(1), got.get(0)), row(next));
        next += 1;
    }
    assert_eq!(next, 100_000);
    assert_eq!(count_of(&session, "SELECT count(*) FROM t").await, 100_000);
}

/// Told for each chunk and not for each row, never backwards, and at the end of everything.
fn check_progress(told: &[CopyProgress], rows: u64) {
    let last = told.last().unwrap();
    assert_eq!(last.rows, rows);
    assert!(told.len() > 10 && told.len() as u64 <= 2 + last.bytes / (64 * 1024), "{} times", told.len());
    assert!(told.windows(2).all(|two| two[0].rows <= two[1].rows && two[0].bytes < two[1].bytes));
}

struct Item {
    id: i64,
    name: &'static str,
}

impl Record for Item {
    fn write(&self, fields: &mut FieldWriter<'_>) {
        fields.field(&self.id);
        fields.field(&self.name);
    }
}

#[tokio::test]
async fn rows_come_from_types_of_ones_own_boxes_vecs_and_streams() {
    let (_db, _sessions, session) = session_with(ITEMS).await;
    let items = || session.copy_rows_in("items", &["id", "name"]);
    assert_eq!(within(items().send([Item { id: 1, name: "a" }])).await.unwrap(), 1);
    let boxed: Vec<Box<dyn ToSql + Sync + Send>> = vec![Box::new(2i64), Box::new("b")];
    assert_eq!(within(items().send(vec![boxed])).await.unwrap(), 1);
    let slow = stream::iter(3..=4i64).then(|id| async move {
        tokio::task::yield_now().await;
        (id, "c")
    });
    assert_eq!(within(items().send_stream(slow)).await.unwrap(), 2);
    let fine = stream::iter([Ok::<_, Error>((5i64, "d"))]);
    assert_eq!(within(items().try_send_stream(fine)).await.unwrap(), 1);
    let nobody: [(i64, &str); 0] = [];
    assert_eq!(within(items().send(nobody)).await.unwrap(), 0);
    assert_eq!(count(&session).await, 5);
    let empty = within(session.copy_query_out("SELECT * FROM items WHERE id < 0")).await.unwrap();
    assert_eq!(empty.collect::<Vec<_>>().await.len(), 0);
}

#[tokio::test]
async fn a_row_that_does_not_fit_is_named_and_nothing_is_stored() {
    let (_db, _sessions, session) = session_with(ITEMS).await;
    let pid = session.process_id();
    let items = || session.copy_rows_in("items", &["id", "name"]);

    let error = within(items().send((1..9).map(|id| Odd(id, 3)))).await.unwrap_err();
    assert_eq!(copy_error(&error), (3, Some("name")));
    assert_eq!(error.to_string(), "row 3 of the COPY, column \"name\", could not be converted");
    assert!(error.source().unwrap().source().is_none() && error.code().is_none());
    assert_eq!(count(&session).await, 0);

    for wrong in [vec![1i64], vec![1, 2, 3], vec![]] {
        let fields = wrong.len();
        let error = within(session.copy_rows_in("items", &["id"]).send([wrong.clone()])).await;
        match fields {
            1 => assert!(error.unwrap_err().is_not_null_violation()),
            _ => assert_eq!(copy_error(&error.unwrap_err()), (1, None), "{fields} fields"),
        }
    }
    assert_eq!(count(&session).await, 0);
    assert_eq!(session.process_id(), pid, "the same connection");
    assert_eq!(within(items().send([(1i64, "a")])).await.unwrap(), 1);
}

/// A row whose name is no text in one place.
struct Odd(i64, i64);

impl Record for Odd {
    fn write(&self, fields: &mut FieldWriter<'_>) {
        fields.field(&self.0);
        if self.0 == self.1 { fields.field(&true) } else { fields.field(&"name") }
    }
}

#[tokio::test]
async fn what_the_server_refuses_names_the_row() {
    let (db, _sessions, session) = session_with(ITEMS).await;
    db.run(
        "ALTER TABLE items ADD COLUMN \"Odd, one\" int; CREATE DOMAIN even AS int CHECK (VALUE % 2 = 0); \
         ALTER TABLE items ALTER \"Odd, one\" TYPE even",
    )
    .await;
    let items = || session.copy_rows_in("items", &["id", "name"]);
    let error = within(items().send((0..100i64).map(|id| (id % 77, "a")))).await.unwrap_err();
    assert_eq!(copy_error(&error), (78, None));
    assert!(error.is_unique_violation());
    assert_eq!(error.constraint(), Some("items_pkey"));
    assert_eq!(error.db_error().unwrap().table(), Some("items"));
    assert_eq!(error.to_string(), "row 78 of the COPY was refused");
    assert!(error.source().unwrap().to_string().contains("SQLSTATE 23505"));

    let rows = [(1i64, Some("a")), (2, None)];
    let error = within(items().send(rows)).await.unwrap_err();
    assert!(error.is_not_null_violation());
    assert_eq!(copy_error(&error), (2, Some("name")));

    let rows = (1..9i64).map(|id| (id, "a", i32::from(id == 5)));
    let error =
        within(session.copy_rows_in("items", &["id", "name", "Odd, one"]).send(rows)).await.unwrap_err();
    assert!(error.is_check_violation());
    assert_eq!(copy_error(&error), (5, Some("Odd, one")));
    assert_eq!(count(&session).await, 0);
}

#[tokio::test]
async fn a_refused_row_ends_even_an_endless_copy() {
    let (_db, _sessions, session) = session_with(ITEMS).await;
    let error = within(session.copy_rows_in("items", &[]).send((0i64..).map(|id| (id % 9, "a")))).await;
    assert!(error.unwrap_err().is_unique_violation());
    assert_eq!(count(&session).await, 0);
}

#[tokio::test]
async fn an_error_of_the_stream_comes_back_and_nothing_is_stored() {
    #[derive(Debug)]
    enum Mine {
        Own,
        Database,
    }
    impl From<Error> for Mine {
        fn from(_: Error) -> Self {
            Self::Database
        }
    }
    let (_db, _sessions, session) = session_with(ITEMS).await;
    for good in [0i64, 1, 50_000] {
        let rows = stream::iter((0..good).map(|id| Ok((id, "a"))).chain([Err(Mine::Own)]));
        let error = within(session.copy_rows_in("items", &[]).try_send_stream(rows)).await.unwrap_err();
        assert!(matches!(error, Mine::Own));
        assert_eq!(count(&session).await, 0);
    }
    let missing =
        session.copy_rows_in("nowhere", &["a"]).try_send_stream(stream::empty::<Result<(i64,), _>>());
    assert!(matches!(within(missing).await.unwrap_err(), Mine::Database));
}

#[tokio::test]
async fn a_panic_in_a_row_stores_nothing_and_the_connection_is_replaced() {
    struct Bomb;
    impl Record for Bomb {
        fn write(&self, _: &mut FieldWriter<'_>) {
            panic!("as planned")
        }
    }
    let (db, sessions, session) = session_with(ITEMS).await;
    let pid = session.process_id();
    let task = tokio::spawn(async move { session.copy_rows_in("items", &[]).send([Bomb]).await });
    assert!(within(task).await.unwrap_err().is_panic());
    let session = within(sessions.acquire()).await.unwrap();
    assert_ne!(session.process_id(), pid);
    assert_eq!(count(&session).await, 0);
    within(db.until_ended(pid)).await;
}

#[tokio::test]
async fn dropped_at_any_poll_it_stores_nothing_and_leaves_the_connection_clean() {
    let (db, sessions, session) = session_with(ITEMS).await;
    let pid = session.process_id();
    drop(session);
    let mut whole = false;
    for limit in 1..60 {
        until_returned(&sessions).await;
        let session = within(sessions.acquire()).await.unwrap();
        let rows = (0..20_000i64).map(|id| (id, "some text to make it longer"));
        let work = session.copy_rows_in("items", &[]).send(rows);
        let done = within(polls(work, limit)).await;
        let stored = count(&session).await;
        match done {
            Some(result) => {
                assert_eq!((result.unwrap(), stored), (20_000, 20_000));
                whole = true;
            }
            // The end may have been sent by then: all or nothing.
            None => assert!([0, 20_000].contains(&stored), "{stored} rows"),
        }
        within(session.execute("DELETE FROM items", &[])).await.unwrap();
        assert_eq!(session.process_id(), pid, "after {limit} polls");
    }
    assert!(whole, "it never came to its end");
    within(db.until_quiet()).await;
}

#[tokio::test]
async fn rows_dropped_early_leave_the_connection_clean() {
    let (_db, _sessions, session) = session_with(ITEMS).await;
    let pid = session.process_id();
    let mut rows = within(session.copy_query_out("SELECT generate_series(1, 100000000) AS n")).await.unwrap();
    assert_eq!(within(rows.next()).await.unwrap().unwrap().get::<i32>("n"), 1);
    drop(rows);
    assert_eq!(count(&session).await, 0);
    assert_eq!(session.process_id(), pid);
    let rows =
        within(session.copy_query_out("SELECT 1 / (3 - n) AS x FROM generate_series(1, 9) n")).await.unwrap();
    let rows = within(rows.collect::<Vec<_>>()).await;
    assert_eq!(rows.len(), 3);
    assert_eq!(rows[2].as_ref().unwrap_err().code().unwrap().code(), "22012");
    assert_eq!(count(&session).await, 0);
}

#[tokio::test]
async fn it_is_part_of_a_transaction() {
    let (_db, _sessions, mut session) = session_with(ITEMS).await;
    let result = within(session.transaction(async |tx| {
        assert_eq!(tx.copy_rows_in("items", &[]).send([(1i64, "a"), (2, "b")]).await?, 2);
        assert_eq!(count(tx).await, 2);
        Err::<(), _>(Error::InTransaction) // any error
    }))
    .await;
    assert!(matches!(result, Err(Error::InTransaction)));
    assert_eq!(count(&session).await, 0);

    // Inside a savepoint, a refused row undoes the savepoint alone.
    within(session.transaction(async |tx| {
        tx.execute("INSERT INTO items VALUES (1, 'a')", &[]).await?;
        let copied = tx.savepoint(async |tx| tx.copy_rows_in("items", &[]).send([(1i64, "b")]).await).await;
        assert!(copied.unwrap_err().is_unique_violation());
        Ok::<_, Error>(())
    }))
    .await
    .unwrap();
    assert_eq!(count(&session).await, 1);
}

#[tokio::test]
async fn a_serialization_failure_in_a_copy_is_retried() {
    let (db, _sessions, mut session) = session_with(ITEMS).await;
    db.run(
        "CREATE SEQUENCE tries; CREATE FUNCTION unlucky() RETURNS trigger LANGUAGE plpgsql AS \
         $$ BEGIN IF nextval('tries') < 3 THEN RAISE EXCEPTION 'again' USING ERRCODE = '40001'; END IF; \
         RETURN NEW; END $$; \
         CREATE TRIGGER t BEFORE INSERT ON items FOR EACH ROW EXECUTE FUNCTION unlucky()",
    )
    .await;
    let options = TransactionOptions::new().isolation_level(IsolationLevel::RepeatableRead);
    let work =
        session.transaction_with(options, async |tx| tx.copy_rows_in("items", &[]).send([(1i64, "a")]).await);
    assert_eq!(within(work).await.unwrap(), 1);
}

#[tokio::test]
async fn refused_at_its_start_it_leaves_a_session_that_works() {
    let (_db, sessions, mut session) = session_with(ITEMS).await;
    let options = TransactionOptions::new().read_only();
    let result = within(
        session.transaction_with(options, async |tx| tx.copy_rows_in("items", &[]).send([(1i64, "a")]).await),
    )
    .await;
    assert_eq!(result.unwrap_err().code().unwrap().code(), "25006");
    drop(session);
    let session = within(sessions.acquire()).await.unwrap();
    for number in 0..5 {
        let row = within(session.query_one("SELECT $1::int", &[&number])).await.unwrap();
        assert_eq!(row.get::<_, i32>(0), number);
    }
    assert_eq!(count(&session).await, 0);
}

#[tokio::test]
async fn names_are_quoted_and_generated_columns_left_out() {
    let (db, _sessions, session) = session_with(
        "CREATE SCHEMA \"My.Shop\"; CREATE TABLE \"My.Shop\".\"a \"\"b\"\" c\" (\"Id\" bigint GENERATED ALWAYS AS IDENTITY, \
         gone int, \"select\" int, twice int GENERATED ALWAYS AS (\"select\" * 2) STORED); \
         ALTER TABLE \"My.Shop\".\"a \"\"b\"\" c\" DROP COLUMN gone, ADD CHECK (\"select\" < 100)",
    )
    .await;
    let name = ("My.Shop", "a \"b\" c");
    assert_eq!(within(session.copy_rows_in(name, &[]).send([(7i64, 1i32)])).await.unwrap(), 1);
    assert_eq!(within(session.copy_rows_in(name, &["select"]).send([[2i32], [3]])).await.unwrap(), 2);
    let error = within(session.copy_rows_in(name, &["select"]).send([[2i32], [300]])).await.unwrap_err();
    assert_eq!(copy_error(&error), (2, None));
    let rows = within(session.copy_rows_out(name, &["Id", "twice"])).await.unwrap();
    let rows = within(rows.collect::<Vec<_>>()).await;
    let rows: HashMap<i64, i32> =
        rows.into_iter().map(|row| row.unwrap()).map(|row| (row.get(0), row.get(1))).collect();
    assert_eq!(rows, HashMap::from([(7, 2), (1, 4), (2, 6)]));
    let all = within(session.copy_rows_out(name, &[])).await.unwrap();
    assert_eq!(all.columns().len(), 3);
    drop(all);
    let injected = session.copy_rows_in("items; DROP SCHEMA \"My.Shop\" CASCADE --", &[]).send([(1i64,)]);
    assert_eq!(within(injected).await.unwrap_err().code().unwrap().code(), "3F000"); // no such schema
    assert_eq!(db.number("SELECT count(*) FROM \"My.Shop\".\"a \"\"b\"\" c\"").await, 3);
}

#[tokio::test]
async fn a_changed_column_is_never_written_with_its_old_type() {
    let (db, _sessions, session) = session_with("CREATE TABLE items (id bigint)").await;
    within(session.copy_rows_in("items", &["id"]).send([(1i64,)])).await.unwrap();
    db.run("ALTER TABLE items ALTER id TYPE float8").await;
    let error = within(session.copy_rows_in("items", &["id"]).send([(1i64,)])).await.unwrap_err();
    assert_eq!(copy_error(&error), (1, Some("id")));
    within(session.copy_rows_in("items", &["id"]).send([(1f64,)])).await.unwrap();
    assert_eq!(count_of(&session, "SELECT sum(id)::bigint FROM items").await, 2);
}

#[tokio::test]
async fn a_role_that_may_only_insert_may_copy() {
    let (db, _sessions, session) = session_with(ITEMS).await;
    let role = format!("writer_{}", db.database.name());
    db.run(&format!("CREATE ROLE \"{role}\"; GRANT INSERT ON items TO \"{role}\"")).await;
    within(session.batch_execute(&format!("SET ROLE \"{role}\""))).await.unwrap();
    let stored = within(session.copy_rows_in("items", &[]).send([(1i64, "a")])).await;
    within(session.batch_execute("RESET ROLE")).await.unwrap();
    db.run(&format!("DROP OWNED BY \"{role}\"; DROP ROLE \"{role}\"")).await;
    assert_eq!(stored.unwrap(), 1);
}

#[tokio::test]
async fn the_rows_wait_for_a_server_that_does_not_read() {
    let (db, _sessions, session) = session_with(ITEMS).await;
    db.run(
        "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS \
         $$ BEGIN PERFORM pg_advisory_xact_lock(4711); RETURN NEW; END $$; \
         CREATE TRIGGER t BEFORE INSERT ON items FOR EACH ROW EXECUTE FUNCTION wait(); \
         SELECT pg_advisory_lock(4711)",
    )
    .await;
    let pid = session.process_id();
    let asked = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&asked);
    let task = tokio::spawn(async move {
        let kilobyte = "x".repeat(1000);
        let rows = (0..1_000_000i64).map(|id| {
            counter.fetch_add(1, SeqCst);
            (id, kilobyte.as_str())
        });
        session.copy_rows_in("items", &[]).send(rows).await
    });
    within(db.until(&format!("(SELECT wait_event = 'advisory' FROM pg_stat_activity WHERE pid = {pid})")))
        .await;
    // Until it stands still, over many looks.
    let (mut last, mut still) = (0, 0);
    while still < 200 {
        let now = asked.load(SeqCst);
        still = if now == last { still + 1 } else { 0 };
        last = now;
        db.number("SELECT 1::bigint").await;
    }
    assert!(last > 0 && last < 30_000, "{last} rows of a kilobyte");
    task.abort();
    assert!(within(task).await.unwrap_err().is_cancelled());
    db.run("SELECT pg_advisory_unlock(4711)").await;
    within(db.until_quiet()).await;
    assert_eq!(db.number("SELECT count(*) FROM items").await, 0);
}

#[tokio::test]
async fn text_and_csv_go_in_and_out_as_they_are() {
    let (_db, _sessions, session) = session_with(ITEMS).await;
    for (format, data) in
        [("text", "1\ta\n2\tb\\tc\n"), ("csv, HEADER", "id,name\n3,\"a, \"\"b\"\"\"\n4,\"c\nd\"\n")]
    {
        let mut copy =
            within(session.copy_in(&format!("COPY items FROM STDIN (FORMAT {format})"))).await.unwrap();
        for piece in data.as_bytes().chunks(3) {
            within(copy.send(Bytes::copy_from_slice(piece))).await.unwrap();
        }
        assert_eq!(within(copy.finish()).await.unwrap(), 2);
        let sql = format!("COPY (SELECT * FROM items ORDER BY id) TO STDOUT (FORMAT {format})");
        let mut out = within(session.copy_out(&sql)).await.unwrap();
        let mut all = Vec::new();
        while let Some(data) = within(out.next()).await {
            all.extend_from_slice(&data.unwrap());
        }
        assert_eq!(String::from_utf8(all).unwrap(), data);
        within(session.execute("DELETE FROM items", &[])).await.unwrap();
    }
}
