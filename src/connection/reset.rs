//! What is undone before a used connection goes to its next borrower.

use postgres_protocol::escape::escape_identifier;
use tokio_postgres::{Client, SimpleQueryMessage};

/// Everything `DISCARD ALL` does, except dropping prepared statements, which would empty the cache (manual, DISCARD).
/// `RESET ALL` leaves the role as it is; setting the session authorization resets it.
const RESET: &str = "SET SESSION AUTHORIZATION DEFAULT; RESET ALL; CLOSE ALL; UNLISTEN *; \
    SELECT pg_catalog.pg_advisory_unlock_all(); DISCARD TEMP; DISCARD SEQUENCES; \
    SELECT name AS pg_session_prepared FROM pg_catalog.pg_prepared_statements WHERE from_sql";

/// A backend that runs a statement looks every so often whether its client is still there (14 and later; not on every
/// platform). Otherwise it notices only when it has something to say.
const WATCH_CLIENT: &str = "SET client_connection_check_interval = '1s'";

/// Sets up a new connection; returns whether the server can watch its client.
pub(super) async fn set_up(client: &Client) -> Result<bool, tokio_postgres::Error> {
    match client.batch_execute(WATCH_CLIENT).await {
        Ok(()) => Ok(true),
        Err(e) if e.as_db_error().is_some() => Ok(false),
        Err(e) => Err(e),
    }
}

/// Undoes what a session left behind.
pub(super) async fn reset(client: &Client, watches_client: bool) -> Result<(), tokio_postgres::Error> {
    let messages = if watches_client {
        client.simple_query(&format!("{RESET}; {WATCH_CLIENT}")).await?
    } else {
        client.simple_query(RESET).await?
    };
    let prepared: String = messages
        .iter()
        .filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => row.try_get("pg_session_prepared").ok().flatten(),
            _ => None,
        })
        .map(|name| format!("DEALLOCATE {};", escape_identifier(name)))
        .collect();
    if prepared.is_empty() { Ok(()) } else { client.batch_execute(&prepared).await }
}
