//! What both services do before they listen, and after.

use std::env;
use std::error::Error;
use std::time::Duration;

use pg_session::testing::PgServer;
use pg_session::{SessionConfig, SessionManager};

refinery::embed_migrations!("examples/items/migrations");

/// Where to listen.
pub fn address() -> String {
    env::var("LISTEN").unwrap_or_else(|_| "127.0.0.1:8080".into())
}

pub fn log() {
    let filter = tracing_subscriber::filter::Targets::new()
        .with_default(tracing::Level::INFO)
        // The driver's own log shows parameters below this level.
        .with_target("tokio_postgres", tracing::Level::WARN)
        .with_target("refinery_core", tracing::Level::WARN);
    use tracing_subscriber::layer::SubscriberExt;
    use tracing_subscriber::util::SubscriberInitExt;
    tracing_subscriber::registry().with(tracing_subscriber::fmt::layer().compact()).with(filter).init();
}

/// The database of `DATABASE_URL`, else one on a throw-away server, which ends with its handle; migrated.
pub async fn database() -> Result<(SessionManager, Option<PgServer>), Box<dyn Error + Send + Sync>> {
    let (config, server) = match env::var_os("DATABASE_URL") {
        Some(_) => (SessionConfig::from_env()?, None),
        None => {
            let server = PgServer::start()?;
            tracing::info!("no DATABASE_URL: on a server of my own, {}", server.url());
            (server.url().parse::<SessionConfig>()?, Some(server))
        }
    };
    // Behind HTTP, better an answer soon than a session late.
    let sessions = SessionManager::new(config.acquire_timeout(Duration::from_secs(3)))?;
    migrate(&sessions).await?;
    Ok((sessions, server))
}

/// Several instances may start at once: one migrates, the others wait and find it done.
pub async fn migrate(sessions: &SessionManager) -> Result<(), Box<dyn Error + Send + Sync>> {
    let mut session = sessions.acquire().await?;
    session.execute("SELECT pg_advisory_lock(7470)", &[]).await?;
    let report = migrations::runner().run_async(session.client().await?).await?;
    for migration in report.applied_migrations() {
        tracing::info!("applied {migration}");
    }
    Ok(()) // the lock goes as the session is returned
}

/// Waits for Ctrl-C, or to be told to stop.
pub async fn stop_signal() {
    let interrupted = tokio::signal::ctrl_c();
    #[cfg(unix)]
    {
        let mut terminated = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())
            .expect("a handler for SIGTERM");
        tokio::select! {
            _ = interrupted => {}
            _ = terminated.recv() => {}
        }
    }
    #[cfg(not(unix))]
    let _ = interrupted.await;
    tracing::info!("stopping");
}
