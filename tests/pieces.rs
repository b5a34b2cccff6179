//! Answers that come in small pieces, and a ReadyForQuery that comes late.
#![cfg(feature = "testing")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use common::frames::Frames;
use common::table::Table;
use common::{Database, ms, within};
use pg_session::testing::PgServer;
use pg_session::{BatchResult, Error, Session, SessionConfig, SessionManager};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Between the crate and the server: passes everything on, answers as it is told to.
struct Slow {
    port: u16,
    manner: Arc<Manner>,
}

#[derive(Default)]
struct Manner {
    /// Answers come in pieces of so many bytes; 0: each message as it is.
    piece: AtomicUsize,
    /// Each piece comes alone.
    tear: AtomicBool,
    /// Each ReadyForQuery comes so many milliseconds late.
    late: AtomicU64,
}

impl Slow {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let manner = Arc::<Manner>::default();
        tokio::spawn({
            let manner = Arc::clone(&manner);
            async move {
                while let Ok((client, _)) = listener.accept().await {
                    tokio::spawn(Self::serve(client, Arc::clone(&manner)));
                }
            }
        });
        Self { port, manner }
    }

    async fn serve(client: TcpStream, manner: Arc<Manner>) {
        let server = PgServer::shared().unwrap().port();
        let Ok(server) = TcpStream::connect(("127.0.0.1", server)).await else { return };
        client.set_nodelay(true).unwrap();
        server.set_nodelay(true).unwrap();
        let (mut from_client, mut to_client) = client.into_split();
        let (mut from_server, mut to_server) = server.into_split();
        tokio::spawn(async move {
            let _ = tokio::io::copy(&mut from_client, &mut to_server).await;
            let _ = to_server.shutdown().await;
        });
        let mut frames = Frames::default();
        let mut chunk = vec![0; 65536];
        while let Ok(n @ 1..) = from_server.read(&mut chunk).await {
            frames.feed(&chunk[..n]);
            while let Some(frame) = frames.take() {
                let late = manner.late.load(SeqCst);
                if frame.tag() == b'Z' && late > 0 {
                    tokio::time::sleep(ms(late)).await;
                }
                let length = Some(manner.piece.load(SeqCst)).filter(|n| *n > 0).unwrap_or(usize::MAX);
                for piece in frame.bytes().chunks(length) {
                    if to_client.write_all(piece).await.is_err() {
                        return;
                    }
                    tokio::task::yield_now().await;
                    if manner.tear.load(SeqCst) {
                        tokio::time::sleep(ms(3)).await;
                    }
                }
            }
        }
    }

    /// A manager with one connection, by way of it.
    fn sessions(&self, db: &Database, with: impl Fn(SessionConfig) -> SessionConfig) -> SessionManager {
        let url = format!("postgres://postgres@127.0.0.1:{}/{}", self.port, db.database.name());
        SessionManager::new(with(url.parse::<SessionConfig>().unwrap().max_size(1))).unwrap()
    }
}

/// InTransaction: "The session is inside a transaction that raw SQL began". Here nobody did.
#[tokio::test]
async fn a_transaction_can_begin_as_soon_as_the_one_before_is_told_to_be_committed() {
    within(async {
        let table = Table::of("id int").await;
        let slow = Slow::start().await;
        let sessions = slow.sessions(&table.db, |c| c);
        let mut session = sessions.acquire().await.unwrap();
        slow.manner.late.store(100, SeqCst);
        // The text is new to the connection, so BEGIN goes with its Parse.
        session.batch().push("INSERT INTO t VALUES (1)", ()).run().await.unwrap();
        let next = session.transaction(async |tx| tx.execute("INSERT INTO t VALUES (2)", &[]).await).await;
        let many = session.execute_many("INSERT INTO t VALUES ($1)", (0..40_000i32).map(|n| (n,))).await;
        let last = session.begin().await.map(drop);
        assert!(next.is_ok() && many.is_ok() && last.is_ok(), "{next:?} {many:?} {last:?}");
    })
    .await;
}

/// Reports and notices between the answers.
const NOISY: &str = "CREATE FUNCTION noisy(n int) RETURNS int LANGUAGE plpgsql AS $$ BEGIN
    RAISE NOTICE 'notice % %', n, repeat('x', n);
    PERFORM set_config('TimeZone', CASE WHEN n % 2 = 0 THEN 'UTC' ELSE 'Europe/Vienna' END, false);
    PERFORM pg_notify('c', repeat('y', n));
    RETURN n;
END $$";

/// A batch that is stored: 4 rows.
async fn batch(session: &mut Session, base: i32) {
    let mut batch = session.batch();
    batch
        .push("SELECT noisy($1)", (5,))
        .push("INSERT INTO t VALUES ($1, $2)", (base, "a"))
        .push("SELECT noisy($1) + 1", (6,))
        .push("INSERT INTO t SELECT $1 + n, 'b' FROM generate_series(1, 3) n", (base,))
        .push("SELECT noisy($1) + 1", (7,));
    let results = batch.run().await.unwrap();
    let affected: Vec<_> = results.iter().map(BatchResult::rows_affected).collect();
    assert_eq!(affected, [1, 1, 1, 3, 1]);
    assert_eq!(results[4].rows()[0].get::<_, i32>(0), 8);
}

/// A batch whose second statement fails.
async fn failing_batch(session: &mut Session, base: i32) {
    let mut batch = session.batch();
    batch
        .push("SELECT noisy($1)", (5,))
        .push("INSERT INTO t VALUES ($1, $2)", (base, "a"))
        .push("SELECT noisy($1) + 1", (6,));
    let failed = batch.run().await.unwrap_err();
    assert!(failed.is_unique_violation(), "{failed:?}");
    assert_eq!(position(&failed), 2);
}

/// Many rows: 60 that are stored, and 30 of which the first fails.
async fn many(session: &mut Session, base: i32) {
    let rows = (0..60).map(|n| (n % 9, base + 100 + 10 * n));
    let stored = session.execute_many("INSERT INTO t SELECT noisy($1) + $2, 'm'", rows).await.unwrap();
    assert_eq!(stored, 60);
    session.query("SELECT 1", &[]).await.unwrap();
    let rows = (0..30).map(|n| (base + n,));
    let failed = session.execute_many("INSERT INTO t VALUES (noisy($1), 'm')", rows).await.unwrap_err();
    assert_eq!(position(&failed), 1);
}

fn position(failed: &Error) -> u64 {
    match failed {
        Error::Batch(e) => e.position(),
        other => panic!("{other:?}"),
    }
}

/// A transaction with statements at once, a savepoint that is undone, and COPY both ways: 51 rows.
async fn transaction(session: &mut Session, base: i32) -> Result<(), Error> {
    let work = session.transaction(async |tx| {
        let undone = tx
            .savepoint(async |sp| {
                let (ten, failed, _) = tokio::join!(
                    sp.query_one("SELECT noisy(10)", &[]),
                    sp.query_one("SELECT 1 / $1::int", &[&0i32]),
                    // May run before the one that fails.
                    sp.query_one("SELECT noisy(11)", &[]),
                );
                assert_eq!(ten?.get::<_, i32>(0), 10);
                failed
            })
            .await;
        assert_eq!(undone.unwrap_err().code().unwrap().code(), "22012");
        let id: [&(dyn tokio_postgres::types::ToSql + Sync); 1] = [&(base + 900)];
        let (twelve, fifty, one) = tokio::join!(
            tx.query_one("SELECT noisy(12)", &[]),
            tx.query("SELECT n FROM generate_series(1, 50) n", &[]),
            tx.execute("INSERT INTO t VALUES ($1, 'z')", &id),
        );
        assert_eq!((twelve?.get::<_, i32>(0), fifty?.len(), one?), (12, 50, 1));
        let rows = (0..50).map(|n| (base + 910 + n, "copied"));
        assert_eq!(tx.copy_rows_in("t", &["id", "s"]).send(rows).await?, 50);
        let mut out = tx.copy_rows_out("t", &["id"]).await?;
        let mut n = 0;
        while let Some(row) = out.next().await {
            let _: i32 = row?.get(0);
            n += 1;
        }
        assert!(n > 50);
        Ok(())
    });
    work.await
}

/// A mix of everything, in pieces of 1 to 7 bytes, with reports and notices in between.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_are_the_same_in_pieces_of_any_size() {
    let work = async {
        let table = Table::of("id int PRIMARY KEY, s text").await;
        table.db.run(NOISY).await;
        let slow = Slow::start().await;
        let sessions = slow.sessions(&table.db, |c| c.statement_cache_capacity(1));
        for piece in [1, 2, 3, 4, 5, 6, 7, 0] {
            println!("pieces of {piece}");
            slow.manner.piece.store(piece, SeqCst);
            table.empty().await;
            let mut session = sessions.acquire().await.unwrap();
            session.batch_execute("LISTEN c").await.unwrap();
            for base in [0, 1000, 2000] {
                batch(&mut session, base).await;
                session.query("SELECT 1", &[]).await.unwrap();
                failing_batch(&mut session, base).await;
                many(&mut session, base).await;
                transaction(&mut session, base).await.unwrap();
            }
            drop(session);
            common::until_returned(&sessions).await;
            assert_eq!(table.rows().await, 3 * (4 + 60 + 51), "pieces of {piece}");
        }
    };
    // Thousands of packets of some bytes each: more than the other tests may take.
    tokio::time::timeout(Duration::from_secs(150), work).await.expect("done in time");
}

/// A COPY that the client does not see in the text: with `standard_conforming_strings` off, the server reads another one than
/// it does. What it then gets is refused on the wire.
async fn assert_refused(copy: &str, expected: &str) {
    within(async {
        let table = Table::of("id int").await;
        table.db.run("INSERT INTO t SELECT generate_series(1, 20)").await;
        let slow = Slow::start().await;
        let sessions = slow.sessions(&table.db, |c| c);
        let session = sessions.acquire().await.unwrap();
        session.batch_execute("SET standard_conforming_strings = off").await.unwrap();
        slow.manner.piece.store(2, SeqCst);
        slow.manner.tear.store(true, SeqCst);
        let told = session.batch_execute(&format!(r"SELECT 'x\''; {copy}; SELECT ''")).await.unwrap_err();
        assert_eq!(told.code().map(|code| code.code()), Some(expected), "{told:?}");
        assert_eq!(session.query_one("SELECT 7", &[]).await.unwrap().get::<_, i32>(0), 7);
    })
    .await;
}

#[tokio::test]
async fn a_copy_out_that_was_not_seen_is_refused_when_its_answer_comes_in_pieces() {
    assert_refused("COPY t TO STDOUT", "0A000").await;
}

#[tokio::test]
async fn a_copy_in_that_was_not_seen_is_refused_when_its_answer_comes_in_pieces() {
    assert_refused("COPY t FROM STDIN", "57014").await;
}

#[tokio::test]
async fn a_copy_in_behind_a_copy_out_that_were_not_seen_are_both_refused() {
    assert_refused("COPY t TO STDOUT; COPY t FROM STDIN", "0A000").await;
}
