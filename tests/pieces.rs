//! Answers that come in small pieces, and a ReadyForQuery that comes late.
#![cfg(feature = "testing")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use common::{Database, within};
use pg_session::testing::PgServer;
use pg_session::{Error, SessionConfig, SessionManager};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Forwards to the client in pieces of `piece` bytes (0: as it comes), each `Z` after a pause.
struct Slow {
    port: u16,
    piece: Arc<AtomicUsize>,
    pause: Arc<AtomicU64>,
    tear: Arc<AtomicBool>,
}

impl Slow {
    async fn start() -> Self {
        let server = PgServer::shared().unwrap().port();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (piece, pause) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicU64::new(0)));
        let tear = Arc::new(AtomicBool::new(false));
        let this = Self { port, piece: piece.clone(), pause: pause.clone(), tear: tear.clone() };
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let Ok(upstream) = TcpStream::connect(("127.0.0.1", server)).await else { return };
                client.set_nodelay(true).unwrap();
                upstream.set_nodelay(true).unwrap();
                let (mut cr, mut cw) = client.into_split();
                let (mut sr, mut sw) = upstream.into_split();
                tokio::spawn(async move {
                    let _ = tokio::io::copy(&mut cr, &mut sw).await;
                    let _ = sw.shutdown().await;
                });
                let (piece, pause, tear) = (piece.clone(), pause.clone(), tear.clone());
                tokio::spawn(async move {
                    loop {
                        let mut header = [0; 5];
                        if sr.read_exact(&mut header).await.is_err() {
                            return;
                        }
                        let length = u32::from_be_bytes(header[1..].try_into().unwrap()) as usize - 4;
                        let mut frame = header.to_vec();
                        frame.resize(5 + length, 0);
                        if sr.read_exact(&mut frame[5..]).await.is_err() {
                            return;
                        }
                        let millis = pause.load(SeqCst);
                        if frame[0] == b'Z' && millis > 0 {
                            tokio::time::sleep(Duration::from_millis(millis)).await;
                        }
                        let n = match piece.load(SeqCst) {
                            0 => frame.len(),
                            n => n,
                        };
                        for chunk in frame.chunks(n) {
                            if cw.write_all(chunk).await.is_err() {
                                return;
                            }
                            tokio::task::yield_now().await;
                            if tear.load(SeqCst) {
                                tokio::time::sleep(Duration::from_millis(3)).await;
                            }
                        }
                    }
                });
            }
        });
        this
    }

    async fn sessions(&self, db: &Database, with: impl Fn(SessionConfig) -> SessionConfig) -> SessionManager {
        let name: String = db.watcher.query_one("SELECT current_database()", &[]).await.unwrap().get(0);
        let config: SessionConfig =
            format!("postgres://postgres@127.0.0.1:{}/{name}", self.port).parse().unwrap();
        SessionManager::new(with(config.max_size(1))).unwrap()
    }
}

/// InTransaction: "The session is inside a transaction that raw SQL began".
#[tokio::test]
async fn a_transaction_can_begin_as_soon_as_the_one_before_is_told_to_be_committed() {
    within(async {
        let db = Database::new().await;
        db.run("CREATE TABLE t (id int)").await;
        let slow = Slow::start().await;
        let sessions = slow.sessions(&db, |c| c).await;
        let mut session = sessions.acquire().await.unwrap();
        slow.pause.store(100, SeqCst);
        // The text is new to the connection, so BEGIN goes with its Parse.
        session.batch().push("INSERT INTO t VALUES (1)", ()).run().await.unwrap();
        let next = session.transaction(async |tx| tx.execute("INSERT INTO t VALUES (2)", &[]).await).await;
        println!("{next:?}");
        let many = session.execute_many("INSERT INTO t VALUES ($1)", (0..40_000i32).map(|n| (n,))).await;
        println!("{many:?}");
        let last = session.begin().await.map(drop);
        assert!(next.is_ok() && many.is_ok() && last.is_ok(), "{next:?} {many:?} {last:?}");
    })
    .await;
}

/// A mix of everything, in pieces of 1 to 7 bytes, with reports and notices in between.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_are_the_same_in_pieces_of_any_size() {
    tokio::time::timeout(Duration::from_secs(150), async {
        let db = Database::new().await;
        db.run(
            "CREATE TABLE t (id int PRIMARY KEY, s text);
             CREATE FUNCTION noisy(n int) RETURNS int LANGUAGE plpgsql AS $$ BEGIN
                RAISE NOTICE 'notice % %', n, repeat('x', n);
                PERFORM set_config('TimeZone', CASE WHEN n % 2 = 0 THEN 'UTC' ELSE 'Europe/Vienna' END, false);
                PERFORM pg_notify('c', repeat('y', n));
                RETURN n; END $$;",
        )
        .await;
        let slow = Slow::start().await;
        let sessions = slow.sessions(&db, |c| c.statement_cache_capacity(1)).await;
        for piece in [1, 2, 3, 4, 5, 6, 7, 0] {
            slow.piece.store(piece, SeqCst);
            db.run("TRUNCATE t").await;
            let mut session = sessions.acquire().await.unwrap();
            session.batch_execute("LISTEN c").await.unwrap();
            for round in 0..3i32 {
                let base = round * 1000;
                // alone
                let results = session
                    .batch()
                    .push("SELECT noisy($1)", (5,))
                    .push("INSERT INTO t VALUES ($1, $2)", (base, "a"))
                    .push("SELECT noisy($1) + 1", (6,))
                    .push("INSERT INTO t SELECT $1 + n, 'b' FROM generate_series(1, 3) n", (base,))
                    .push("SELECT noisy($1) + 1", (7,))
                    .run()
                    .await
                    .unwrap();
                let got: Vec<_> = results.iter().map(pg_session::BatchResult::rows_affected).collect();
                assert_eq!(got, [1, 1, 1, 3, 1], "piece {piece}");
                assert_eq!(results[4].rows()[0].get::<_, i32>(0), 8);
                session.query("SELECT 1", &[]).await.unwrap(); // see the test above
                // one that fails
                let failed = session
                    .batch()
                    .push("SELECT noisy($1)", (5,))
                    .push("INSERT INTO t VALUES ($1, $2)", (base, "a"))
                    .push("SELECT noisy($1) + 1", (6,))
                    .run()
                    .await
                    .unwrap_err();
                assert!(failed.is_unique_violation(), "{failed:?}");
                let Error::Batch(e) = &failed else { panic!("{failed:?}") };
                assert_eq!(e.position(), 2);
                let many = session
                    .execute_many(
                        "INSERT INTO t SELECT noisy($1) + $2, 'm'",
                        (0..60).map(|n| (n % 9, base + 100 + 10 * n)),
                    )
                    .await
                    .unwrap();
                assert_eq!(many, 60);
                session.query("SELECT 1", &[]).await.unwrap();
                let many = session
                    .execute_many("INSERT INTO t VALUES (noisy($1), 'm')", (0..30).map(|n| (base + n,)))
                    .await
                    .unwrap_err();
                let Error::Batch(e) = &many else { panic!("{many:?}") };
                assert_eq!(e.position(), 1);
                println!("piece {piece} round {round}");
                session
                    .transaction(async |tx| {
                        let undone = tx
                            .savepoint(async |sp| {
                                let (a, b, c) = tokio::join!(
                                    sp.query_one("SELECT noisy(10)", &[]),
                                    sp.query_one("SELECT 1 / $1::int", &[&0i32]),
                                    sp.query_one("SELECT noisy(11)", &[]),
                                );
                                assert_eq!(a?.get::<_, i32>(0), 10);
                                drop(c); // it may run before the one that fails: see test_threads
                                b
                            })
                            .await;
                        let nine: [&(dyn tokio_postgres::types::ToSql + Sync); 1] = [&(base + 900)];
                        assert_eq!(undone.unwrap_err().code().unwrap().code(), "22012");
                        let (a, b, c) = tokio::join!(
                            tx.query_one("SELECT noisy(12)", &[]),
                            tx.query("SELECT n FROM generate_series(1, 50) n", &[]),
                            tx.execute("INSERT INTO t VALUES ($1, 'z')", &nine),
                        );
                        assert_eq!((a?.get::<_, i32>(0), b?.len(), c?), (12, 50, 1));
                        let stored = tx
                            .copy_rows_in("t", &["id", "s"])
                            .send((0..50).map(|n| (base + 910 + n, "copied")))
                            .await?;
                        assert_eq!(stored, 50);
                        let mut out = tx.copy_rows_out("t", &["id"]).await?;
                        let mut n = 0;
                        while let Some(row) = out.next().await {
                            let _: i32 = row?.get(0);
                            n += 1;
                        }
                        assert!(n > 50);
                        Ok::<_, Error>(())
                    })
                    .await
                    .unwrap();
            }
            drop(session);
            common::until_returned(&sessions).await;
            assert_eq!(db.number("SELECT count(*) FROM t").await, 3 * (4 + 60 + 1 + 50), "piece {piece}");
        }
    })
    .await
    .expect("done in time");
}

/// COPY_REFUSED: "COPY TO STDOUT is possible by copy_out and copy_rows_out only", and "the session is still usable".
async fn refused(sql: &str, simple: bool, expected: &str) {
    within(async {
        let db = Database::new().await;
        db.run("CREATE TABLE t (id int); INSERT INTO t SELECT generate_series(1, 20)").await;
        let slow = Slow::start().await;
        let sessions = slow.sessions(&db, |c| c).await;
        let session = sessions.acquire().await.unwrap();
        if !simple {
            session.prepare(sql).await.unwrap();
        }
        slow.piece.store(2, SeqCst);
        slow.tear.store(true, SeqCst);
        let attempt = async {
            if simple { session.batch_execute(sql).await } else { session.query(sql, &[]).await.map(drop) }
        };
        let told = tokio::time::timeout(Duration::from_secs(5), attempt).await;
        println!("{told:?}");
        let next = tokio::time::timeout(Duration::from_secs(5), session.query_one("SELECT 7", &[])).await;
        println!("{:?}", next.as_ref().map(|r| r.as_ref().map(|r| r.get::<_, i32>(0))));
        let told = told.expect("in time").unwrap_err();
        assert_eq!(told.code().map(|c| c.code().to_owned()).as_deref(), Some(expected), "{told:?}");
        assert_eq!(next.expect("in time").unwrap().get::<_, i32>(0), 7);
    })
    .await;
}

#[tokio::test]
async fn a_copy_out_by_query_is_refused_when_its_answer_comes_in_pieces() {
    refused("COPY t TO STDOUT", false, "0A000").await;
}

#[tokio::test]
async fn a_copy_out_by_batch_execute_is_refused_when_its_answer_comes_in_pieces() {
    refused("COPY t TO STDOUT", true, "0A000").await;
}

#[tokio::test]
async fn a_copy_in_by_query_is_refused_when_its_answer_comes_in_pieces() {
    refused("COPY t FROM STDIN", false, "57014").await;
}

#[tokio::test]
async fn a_copy_in_by_batch_execute_is_refused_when_its_answer_comes_in_pieces() {
    refused("COPY t FROM STDIN", true, "57014").await;
}
