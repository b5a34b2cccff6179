//! Faults that are injected: what becomes of statements, commits and acquires, before a sandbox and before a proxy.
#![cfg(feature = "testing")]

mod common;

use std::time::Duration;

use common::raw::{Raw, run};
use common::{Database, connect, until_returned, within};
use pg_session::testing::{FaultProxy, Faults, Sandbox};
use pg_session::tokio_postgres::error::SqlState;
use pg_session::{Error, RetryPolicy, SessionManager, TransactionOptions};

/// What faults are tried on: a sandbox, and a proxy before a database of its own.
struct Case {
    database: Database,
    sandbox: Option<Sandbox>,
    proxy: Option<FaultProxy>,
    sessions: SessionManager,
    faults: Faults,
    url: String,
}

impl Case {
    async fn both() -> [Self; 2] {
        let mut cases = Vec::new();
        for in_sandbox in [true, false] {
            let database = Database::new().await;
            database.run("CREATE TABLE t (id bigint PRIMARY KEY)").await;
            let url = database.database.url();
            let case = if in_sandbox {
                let sandbox = Sandbox::start(url).await.expect("a sandbox");
                let (sessions, faults, url) = (sandbox.sessions(), sandbox.faults(), sandbox.url());
                Self { database, sandbox: Some(sandbox), proxy: None, sessions, faults, url }
            } else {
                let proxy = FaultProxy::start(url).await.expect("a proxy");
                let (sessions, faults, url) = (proxy.sessions(), proxy.faults(), proxy.url());
                Self { database, sandbox: None, proxy: Some(proxy), sessions, faults, url }
            };
            cases.push(case);
        }
        cases.try_into().unwrap_or_else(|_| unreachable!())
    }

    /// What is in the table, as the case's own sessions see it.
    async fn ids(&self) -> Vec<i64> {
        let session = self.sessions.acquire().await.expect("a session");
        let rows = session.query("SELECT id FROM t ORDER BY id", &[]).await.expect("rows");
        rows.iter().map(|row| row.get(0)).collect()
    }

    async fn insert(&self, id: i64) -> Result<(), Error> {
        within(self.sessions.transaction(async |tx| {
            tx.execute("INSERT INTO t VALUES ($1)", &[&id]).await?;
            Ok(())
        }))
        .await
    }

    /// Nothing is left open anywhere.
    async fn done(self) {
        until_returned(&self.sessions).await;
        if let Some(sandbox) = self.sandbox {
            within(sandbox.finish()).await.expect("in order");
        }
        self.database.until_quiet().await;
        drop(self.proxy);
    }
}

const SERIALIZATION: SqlState = SqlState::T_R_SERIALIZATION_FAILURE;
const UNIQUE: SqlState = SqlState::UNIQUE_VIOLATION;

#[tokio::test]
async fn a_statement_that_fails_with_40001_is_retried_and_committed_once() {
    for case in Case::both().await {
        case.faults.fail_statement(1, SERIALIZATION);
        case.faults.fail_statement(2, SqlState::T_R_DEADLOCK_DETECTED);
        case.insert(1).await.unwrap();
        assert_eq!((case.faults.begins(), case.faults.statements(), case.faults.commits()), (3, 3, 1));
        assert_eq!(case.ids().await, [1]);
        case.done().await;
    }
}

#[tokio::test]
async fn a_commit_that_fails_with_40001_is_retried_and_committed_once() {
    for case in Case::both().await {
        case.faults.fail_commit(1, SERIALIZATION);
        case.faults.fail_commit(2, SERIALIZATION);
        case.insert(1).await.unwrap();
        assert_eq!((case.faults.begins(), case.faults.commits()), (3, 3));
        assert_eq!(case.ids().await, [1]);
        case.done().await;
    }
}

#[tokio::test]
async fn what_fails_with_23505_is_not_retried() {
    for case in Case::both().await {
        case.faults.fail_statement(1, UNIQUE);
        let error = case.insert(1).await.unwrap_err();
        assert!(error.is_unique_violation(), "{error}");
        case.faults.fail_commit(1, UNIQUE);
        let error = case.insert(1).await.unwrap_err();
        assert!(error.is_unique_violation(), "{error}");
        assert!(error.to_string().contains("injected by a test"), "{error}");
        assert_eq!(case.faults.begins(), 2);
        assert_eq!(case.ids().await, [0; 0]);
        case.done().await;
    }
}

#[tokio::test]
async fn attempts_end_where_the_policy_says() {
    for case in Case::both().await {
        for n in 1..=3 {
            case.faults.fail_commit(n, SERIALIZATION);
        }
        let retry = RetryPolicy::default().max_attempts(3);
        let result = case.sessions.transaction_with(TransactionOptions::new().retry(retry), async |tx| {
            tx.execute("INSERT INTO t VALUES (1)", &[]).await?;
            Ok::<_, Error>(())
        });
        let error = within(result).await.unwrap_err();
        assert!(matches!(error, Error::RetriesExhausted { attempts: 3, .. }), "{error}");
        assert_eq!(case.faults.begins(), 3);
        assert_eq!(case.ids().await, [0; 0]);
        case.done().await;
    }
}

#[tokio::test]
async fn a_failed_statement_really_aborts_its_transaction() {
    for case in Case::both().await {
        let client = connect(&case.url).await;
        case.faults.reset();
        case.faults.fail_statement(2, UNIQUE);
        client.batch_execute("BEGIN; INSERT INTO t VALUES (1)").await.unwrap();
        let error = client.execute("INSERT INTO t VALUES (2)", &[]).await.unwrap_err();
        assert_eq!(error.code(), Some(&UNIQUE));
        let error = client.execute("INSERT INTO t VALUES (3)", &[]).await.unwrap_err();
        assert_eq!(error.code(), Some(&SqlState::IN_FAILED_SQL_TRANSACTION));
        client.batch_execute("COMMIT").await.unwrap();
        assert_eq!(case.ids().await, [0; 0]);
        drop(client);
        case.done().await;
    }
}

#[tokio::test]
async fn a_failed_statement_in_a_savepoint_is_undone_with_it() {
    for case in Case::both().await {
        case.faults.fail_statement(2, UNIQUE);
        let result = case.sessions.transaction(async |tx| {
            tx.execute("INSERT INTO t VALUES (1)", &[]).await?;
            let inner = tx.savepoint(async |sp| {
                sp.execute("INSERT INTO t VALUES (2)", &[]).await?;
                Ok::<_, Error>(())
            });
            assert!(inner.await.unwrap_err().is_unique_violation());
            tx.execute("INSERT INTO t VALUES (3)", &[]).await?;
            Ok::<_, Error>(())
        });
        within(result).await.unwrap();
        assert_eq!(case.ids().await, [1, 3]);
        case.done().await;
    }
}

#[tokio::test]
async fn a_statement_of_a_simple_query_fails_where_it_stands() {
    for case in Case::both().await {
        let client = connect(&case.url).await;
        case.faults.fail_statement(2, UNIQUE);
        let sql = "INSERT INTO t VALUES (1); INSERT INTO t VALUES (2); INSERT INTO t VALUES (3)";
        let error = client.batch_execute(sql).await.unwrap_err();
        assert_eq!(error.code(), Some(&UNIQUE));
        assert_eq!(case.ids().await, [0; 0]);
        case.faults.reset();
        case.faults.fail_commit(1, UNIQUE);
        let error =
            client.batch_execute("BEGIN; INSERT INTO t VALUES (1); COMMIT; SELECT 1").await.unwrap_err();
        assert_eq!(error.code(), Some(&UNIQUE));
        assert_eq!(case.ids().await, [0; 0]);
        client.batch_execute(sql).await.unwrap();
        drop(client);
        case.done().await;
    }
}

#[tokio::test]
async fn a_lost_answer_to_commit_is_an_unknown_outcome_and_the_row_is_there() {
    for case in Case::both().await {
        case.faults.lose_commit_answer(1);
        let error = case.insert(1).await.unwrap_err();
        assert!(error.is_commit_unknown(), "{error}");
        assert_eq!(case.faults.begins(), 1, "never retried");
        assert_eq!(case.ids().await, [1]);
        case.done().await;
    }
}

#[tokio::test]
async fn a_connection_cut_before_commit_is_an_error_and_the_row_is_not_there() {
    for case in Case::both().await {
        case.faults.cut_before_commit(1);
        let error = case.insert(1).await.unwrap_err();
        assert!(error.is_commit_unknown(), "{error}");
        assert_eq!(case.faults.commits(), 1);
        assert_eq!(case.ids().await, [0; 0]);
        case.insert(1).await.unwrap();
        assert_eq!(case.ids().await, [1]);
        case.done().await;
    }
}

#[tokio::test]
async fn slow_acquires_run_into_the_acquire_timeout() {
    for case in Case::both().await {
        let config = case.sessions.config().clone().acquire_timeout(Duration::from_millis(100));
        let sessions = SessionManager::new(config).unwrap();
        for warm in [false, true] {
            if warm {
                // The slow connect goes on, and is waited for until it has taken too long.
                drop(common::opened(&sessions).await);
            }
            case.faults.slow_acquire(1, Duration::from_secs(60));
            let error = within(sessions.acquire()).await.unwrap_err();
            assert!(matches!(error, Error::Acquire(_)), "{error}");
            assert!(error.is_timeout());
        }
        case.faults.slow_acquire(1, Duration::from_millis(1));
        drop(within(sessions.acquire()).await.unwrap());
        case.done().await;
    }
}

#[tokio::test]
async fn every_acquire_is_counted_and_the_crates_own_statements_are_not() {
    for case in Case::both().await {
        let faults = &case.faults;
        let counts = || (faults.acquires(), faults.begins(), faults.statements(), faults.commits());
        drop(case.sessions.acquire().await.unwrap());
        assert_eq!(counts(), (1, 0, 0, 0));
        let session = case.sessions.acquire().await.unwrap();
        assert_eq!(counts(), (2, 0, 0, 0));
        session.query("SELECT 1", &[]).await.unwrap();
        session.query("SELECT 1", &[]).await.unwrap();
        session.batch_execute("SELECT 1; SELECT 2").await.unwrap();
        assert_eq!(counts(), (2, 0, 4, 0));
        // Dirty: it is reset.
        drop(session);
        until_returned(&case.sessions).await;
        assert_eq!(counts(), (2, 0, 4, 0));
        let options = TransactionOptions::serializable().local_setting("app.tenant", "x");
        let result = case.sessions.transaction_with(options, async |tx| {
            tx.savepoint(async |sp| sp.execute("INSERT INTO t VALUES (1)", &[]).await).await?;
            Err::<(), _>(Error::StreamOpen)
        });
        within(result).await.unwrap_err();
        assert_eq!(counts(), (3, 1, 5, 0));
        faults.reset();
        assert_eq!(counts(), (0, 0, 0, 0));
        case.done().await;
    }
}

#[tokio::test]
async fn looking_up_types_is_not_counted() {
    for case in Case::both().await {
        let session = case.sessions.acquire().await.unwrap();
        session.batch_execute("CREATE TYPE mood AS ENUM ('sad', 'happy')").await.unwrap();
        case.faults.reset();
        case.faults.fail_statement(2, UNIQUE);
        session.query("SELECT 'sad'::mood", &[]).await.unwrap();
        assert_eq!(case.faults.statements(), 1);
        drop(session);
        case.done().await;
    }
}

#[tokio::test]
async fn resetting_forgets_what_was_planned() {
    for case in Case::both().await {
        case.faults.fail_statement(1, UNIQUE);
        case.faults.cut_before_commit(1);
        case.faults.slow_acquire(5, Duration::from_secs(60));
        case.faults.reset();
        case.insert(1).await.unwrap();
        case.done().await;
    }
}

#[tokio::test]
async fn a_copy_is_a_statement_that_can_fail() {
    for case in Case::both().await {
        case.faults.fail_statement(1, UNIQUE);
        let session = case.sessions.acquire().await.unwrap();
        let error = session.copy_in("COPY t FROM STDIN").await.expect_err("failed");
        assert!(error.is_unique_violation(), "{error}");
        drop(session);
        let session = case.sessions.acquire().await.unwrap();
        let copied = session.copy_in("COPY t FROM STDIN").await.unwrap();
        drop(copied);
        drop(session);
        assert_eq!(case.ids().await, [0; 0]);
        case.done().await;
    }
}

#[tokio::test]
async fn a_proxy_passes_everything_else_as_it_is() {
    let database = Database::new().await;
    let proxy = FaultProxy::start(database.database.url()).await.unwrap();
    let (client, other) = (connect(&proxy.url()).await, connect(&proxy.url()).await);
    let pid = |client: &'static str| format!("SELECT '{client}', pg_backend_pid()");
    let one: i32 = client.query_one(&pid("one"), &[]).await.unwrap().get(1);
    let two: i32 = other.query_one(&pid("two"), &[]).await.unwrap().get(1);
    assert_ne!(one, two, "each has a connection of its own");
    let token = other.cancel_token();
    let sleep = tokio::spawn(async move { other.batch_execute("SELECT pg_sleep(100)").await });
    database.until_sleeping(two).await;
    token.cancel_query(tokio_postgres::NoTls).await.unwrap();
    let error = within(sleep).await.unwrap().unwrap_err();
    assert_eq!(error.code(), Some(&SqlState::QUERY_CANCELED));
    // A client that goes takes its connection along, and the proxy the rest.
    database.until_ended(two).await;
    drop(proxy);
    database.until_ended(one).await;
    assert!(within(client.batch_execute("SELECT 1")).await.is_err());
}

#[tokio::test]
async fn a_proxy_without_a_server_refuses_its_clients() {
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let proxy = FaultProxy::start(&format!("postgres://postgres@{nobody}/x")).await.unwrap();
    let error = within(proxy.sessions().acquire()).await.unwrap_err();
    assert!(matches!(error, Error::Connect(_)), "{error}");
    assert_eq!(error.code().map(SqlState::code), Some("08006"));
}

// ---- BEGIN, statements and COMMIT under one Sync

impl Case {
    /// Three rows: by three statements of a batch, or by one for many rows.
    async fn store(&self, many: bool, first: i64) -> Result<(), Error> {
        let ids = first..first + 3;
        const INSERT: &str = "INSERT INTO t VALUES ($1)";
        if many {
            let mut session = self.sessions.acquire().await?;
            within(session.execute_many(INSERT, ids.map(|id| (id,)))).await?;
        } else {
            let mut batch = self.sessions.batch();
            for id in ids {
                batch.push(INSERT, (id,));
            }
            within(batch.run()).await?;
        }
        Ok(())
    }

    fn counts(&self) -> (u64, u64, u64) {
        (self.faults.begins(), self.faults.statements(), self.faults.commits())
    }
}

#[tokio::test]
async fn a_batch_counts_its_statements_and_many_rows_are_one() {
    for case in Case::both().await {
        case.store(false, 1).await.unwrap();
        assert_eq!(case.counts(), (1, 3, 1));
        case.faults.reset();
        case.store(true, 4).await.unwrap();
        assert_eq!(case.counts(), (1, 1, 1));
        case.faults.reset();
        // In a transaction with others, and by some in two windows.
        let options = TransactionOptions::serializable().local_setting("app.tenant", "x");
        within(case.sessions.transaction_with(options, async |tx| {
            tx.savepoint(async |sp| sp.execute_many("INSERT INTO t VALUES ($1)", [(7i64,), (8,)]).await)
                .await?;
            let ids = 10..10_000i64;
            tx.execute_many("INSERT INTO t VALUES ($1)", ids.map(|id| (id,))).await?;
            tx.batch().push("SELECT 1", ()).push("SELECT 1", ()).run().await?;
            tx.execute("DELETE FROM t WHERE id > 8", &[]).await
        }))
        .await
        .unwrap();
        let (begins, statements, commits) = case.counts();
        let windows = statements - 4;
        assert_eq!((begins, commits), (1, 1));
        assert!((2..20).contains(&windows), "{windows}");
        assert_eq!(case.ids().await, [1, 2, 3, 4, 5, 6, 7, 8]);
        case.done().await;
    }
}

#[tokio::test]
async fn a_statement_in_the_middle_of_a_batch_fails_there() {
    for case in Case::both().await {
        for n in 1..=3 {
            case.faults.reset();
            case.faults.fail_statement(n, UNIQUE);
            let error = case.store(false, 1).await.unwrap_err();
            assert!(error.is_unique_violation(), "{error:?}");
            assert!(matches!(&error, Error::Batch(e) if e.position() == u64::from(n)), "{error:?}");
            assert_eq!(case.counts(), (1, n.into(), 0));
        }
        case.faults.reset();
        case.faults.fail_statement(1, UNIQUE);
        assert!(case.store(true, 1).await.unwrap_err().is_unique_violation());
        assert_eq!(case.counts(), (1, 1, 0));
        assert_eq!(case.ids().await, [0; 0]);
        case.faults.reset();
        case.faults.fail_statement(2, SERIALIZATION);
        case.store(false, 1).await.unwrap();
        assert_eq!(case.counts(), (2, 2 + 3, 1));
        // A failure of the server's own counts as well, and what it has skipped does not.
        case.faults.reset();
        assert!(case.store(false, 3).await.unwrap_err().is_unique_violation());
        assert_eq!(case.counts(), (1, 1, 0));
        assert_eq!(case.ids().await, [1, 2, 3]);
        case.done().await;
    }
}

#[tokio::test]
async fn a_commit_under_the_same_sync_fails_and_nothing_is_stored() {
    for case in Case::both().await {
        for many in [false, true] {
            case.faults.reset();
            case.faults.fail_commit(1, UNIQUE);
            let error = case.store(many, 1).await.unwrap_err();
            assert!(error.is_unique_violation(), "{error:?}");
            assert!(!matches!(error, Error::Batch(_)), "no statement is to blame: {error:?}");
            assert_eq!((case.faults.begins(), case.faults.commits()), (1, 1));
            assert_eq!(case.ids().await, [0; 0]);
        }
        case.faults.reset();
        case.faults.fail_commit(1, SERIALIZATION);
        case.store(false, 1).await.unwrap();
        assert_eq!(case.counts(), (2, 6, 2));
        assert_eq!(case.ids().await, [1, 2, 3]);
        case.done().await;
    }
}

#[tokio::test]
async fn a_commit_under_the_same_sync_whose_answer_is_lost_is_unknown() {
    for case in Case::both().await {
        case.faults.lose_commit_answer(1);
        assert!(case.store(false, 1).await.unwrap_err().is_commit_unknown());
        case.faults.lose_commit_answer(1);
        assert!(case.store(true, 4).await.unwrap_err().is_commit_unknown());
        assert_eq!(case.ids().await, [1, 2, 3, 4, 5, 6]);
        for many in [false, true] {
            case.faults.cut_before_commit(1);
            let error = case.store(many, 7).await.unwrap_err();
            assert!(error.is_commit_unknown(), "{error:?}");
        }
        assert_eq!((case.faults.begins(), case.faults.commits()), (4, 4));
        assert_eq!(case.ids().await, [1, 2, 3, 4, 5, 6]);
        case.done().await;
    }
}

#[tokio::test]
async fn what_a_client_sends_under_one_sync_fails_as_on_a_server() {
    let insert = |id: i64| run(&format!("INSERT INTO t VALUES ({id})"));
    for case in Case::both().await {
        let mut client = Raw::connect(&case.url, &case.database).await;
        // Outside of a transaction, what came before is undone as well.
        case.faults.fail_statement(2, UNIQUE);
        let answer = client.batch(&[insert(1), insert(2), insert(3)]).await;
        assert_eq!(answer, "12[INSERT 0 1]12<E23505> I");
        case.faults.fail_statement(2, UNIQUE);
        let parts = [run("BEGIN"), insert(1), insert(2), insert(3), run("COMMIT")];
        assert_eq!(client.batch(&parts).await, "12[BEGIN]12[INSERT 0 1]12<E23505> E");
        assert_eq!(client.batch(&[insert(1)]).await, "<E25P02> E");
        case.faults.fail_commit(1, UNIQUE);
        let parts = [run("ROLLBACK"), run("BEGIN"), insert(1), run("COMMIT"), insert(2)];
        assert_eq!(client.batch(&parts).await, "12[ROLLBACK]12[BEGIN]12[INSERT 0 1]12<E23505> I");
        // Neither does it matter how long the unnamed statement has been there.
        let [parse, bind, execute] = <[_; 3]>::try_from(insert(9)).unwrap();
        assert_eq!(client.batch(&[vec![parse]]).await, "1 I");
        case.faults.fail_statement(1, UNIQUE);
        assert_eq!(client.batch(&[vec![bind.clone(), execute.clone()]]).await, "2<E23505> I");
        assert_eq!(client.batch(&[vec![bind, execute]]).await, "2[INSERT 0 1] I");
        let tags = "12[BEGIN]12[INSERT 0 1]";
        case.faults.lose_commit_answer(1);
        let told = client.last_words(&[run("BEGIN"), insert(1), run("COMMIT")]).await;
        assert!(told.starts_with(tags) && !told.contains("COMMIT"), "{told}");
        let mut client = Raw::connect(&case.url, &case.database).await;
        case.faults.cut_before_commit(1);
        let told = client.last_words(&[run("BEGIN"), insert(2), run("COMMIT")]).await;
        assert!(told.starts_with(tags) && !told.contains("COMMIT"), "{told}");
        assert_eq!(case.ids().await, [1, 9]);
        case.done().await;
    }
}
