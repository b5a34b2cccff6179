//! What users rely on without calling it: auto traits and sizes.

use std::mem::size_of;

use pg_session::{
    Batch, BatchResult, Connection, CopyIn, CopyOut, Error, RetryPolicy, RowStream, Session, SessionConfig,
    SessionManager, Status, Transaction, TransactionOptions,
};

fn send_and_sync<T: Send + Sync>() {}
fn unpin<T: Unpin>() {}
fn send<T: Send>(_: T) {}

#[test]
fn public_types_go_between_threads() {
    send_and_sync::<Connection>();
    send_and_sync::<Error>();
    send_and_sync::<RetryPolicy>();
    send_and_sync::<Session>();
    send_and_sync::<Batch<'static>>();
    send_and_sync::<BatchResult>();
    send_and_sync::<SessionConfig>();
    send_and_sync::<SessionManager>();
    send_and_sync::<Status>();
    send_and_sync::<Transaction<'static>>();
    send_and_sync::<TransactionOptions>();
    unpin::<Session>();
    unpin::<SessionManager>();
    unpin::<Transaction<'static>>();
    unpin::<RowStream<'static>>();
    unpin::<CopyIn<'static>>();
    unpin::<CopyOut<'static>>();
}

#[test]
fn futures_go_between_threads() {
    async fn all(sessions: SessionManager) -> Result<(), Error> {
        let mut session = sessions.acquire().await?;
        session.query("SELECT 1", &[]).await?;
        let mut rows = session.query_stream("SELECT 1", &[]).await?;
        rows.next().await;
        drop(rows);
        session.execute_many("SELECT $1::int", (0..3).map(|n| (n,))).await?;
        session.batch().push("SELECT 1", ()).run().await?;
        sessions.batch().push("SELECT $1", (String::new(),)).run().await?;
        session.copy_rows_in("t", &[]).send([(1, 2)]).await?;
        let tx = session.begin().await?;
        tx.execute_many("SELECT $1::int", vec![(1,)]).await?;
        tx.batch().push("SELECT 1", ()).run().await?;
        tx.commit().await?;
        session.client().await?;
        sessions.ping().await?;
        sessions.close().await;
        Ok(())
    }
    let sessions = SessionManager::new(SessionConfig::new()).unwrap();
    send(all(sessions));
}

#[test]
fn values_that_travel_a_lot_are_small() {
    assert!(size_of::<Error>() <= 24, "{}", size_of::<Error>());
    assert!(size_of::<Result<(), Error>>() <= 24);
    assert_eq!(size_of::<SessionManager>(), size_of::<usize>());
}

#[test]
fn managers_are_made_without_a_runtime() {
    let sessions = SessionManager::builder(SessionConfig::new().max_size(3)).build().unwrap();
    assert_eq!(sessions.status().max_size, 3);
    assert!(SessionManager::new(SessionConfig::new().max_size(0)).is_err());
    assert!(SessionManager::new(SessionConfig::new().statement_cache_capacity(0)).is_err());
    let require = "postgres://h/d?sslmode=require".parse().unwrap();
    assert!(SessionManager::new(require).unwrap_err().to_string().contains("TLS"));
}

#[test]
fn the_environment_is_read_like_libpqs() {
    // Its own process, since a process has but one environment.
    let run = |vars: &[(&str, &str)]| {
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "print_the_configuration_for_the_test_above", "--nocapture"]);
        for (name, _) in std::env::vars().filter(|(n, _)| n.starts_with("PG") || n == "DATABASE_URL") {
            command.env_remove(name);
        }
        command.env("PRINT_CONFIGURATION", "1").envs(vars.iter().copied());
        String::from_utf8(command.output().unwrap().stdout).unwrap()
    };
    let url = run(&[("DATABASE_URL", "postgres://app:hunter2@db:6432/shop"), ("PGHOST", "elsewhere")]);
    assert!(url.contains("db:6432") && url.contains("shop") && !url.contains("elsewhere"), "{url}");
    let parts = run(&[
        ("PGHOST", "db"),
        ("PGPORT", "6432"),
        ("PGUSER", "app"),
        ("PGPASSWORD", "hunter2"),
        ("PGDATABASE", "shop"),
    ]);
    assert!(parts.contains("db:6432") && parts.contains("app") && parts.contains("shop"), "{parts}");
    let nothing = run(&[("PGHOST", "")]);
    assert!(nothing.contains("localhost:5432"), "{nothing}");
    let bad = run(&[("DATABASE_URL", "postgres://app:hunter2@db/shop?colour=red")]);
    assert!(bad.contains("DATABASE_URL: unknown option `colour`"), "{bad}");
    let bad = run(&[("PGPORT", "many")]);
    assert!(bad.contains("port"), "{bad}");
    for text in [url, parts, nothing, bad] {
        assert!(!text.contains("hunter2"), "{text}");
    }
}

#[test]
fn print_the_configuration_for_the_test_above() {
    if std::env::var_os("PRINT_CONFIGURATION").is_some() {
        match SessionManager::from_env() {
            Ok(sessions) => println!("{sessions:?}"),
            Err(e) => println!("{e}"),
        }
    }
}
