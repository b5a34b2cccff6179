//! What health probes are told: a status and a line of JSON.

use std::time::Duration;

use serde::Serialize;
use tokio::time::timeout;

use crate::manager::SessionManager;
use crate::problem::Problem;

/// How long a probe waits for the database.
const LIMIT: Duration = Duration::from_secs(2);

/// The answer to a probe.
pub(crate) struct Health {
    pub(crate) status: u16,
    pub(crate) body: String,
}

#[derive(Serialize)]
struct Body<'a> {
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pool: Option<Pool>,
}

#[derive(Serialize)]
struct Pool {
    max_size: usize,
    size: usize,
    idle: usize,
    in_use: usize,
    connecting: usize,
    waiting: usize,
}

impl Health {
    /// The process runs and answers.
    pub(crate) fn live() -> Self {
        Self::new(200, Body { status: "live", code: None, pool: None })
    }

    /// Whether the database can be reached through the pool within two seconds.
    pub(crate) async fn ready(sessions: &SessionManager) -> Self {
        let code = match timeout(LIMIT, sessions.ping()).await {
            Ok(Ok(())) => None,
            Ok(Err(e)) => Some(Problem::from(e).code().to_owned()),
            Err(_) if sessions.status().waiting > 0 => Some("pool_exhausted".to_owned()),
            Err(_) => Some("database_unavailable".to_owned()),
        };
        let s = sessions.status();
        let pool = Pool {
            max_size: s.max_size,
            size: s.size,
            idle: s.idle,
            in_use: s.in_use,
            connecting: s.connecting,
            waiting: s.waiting,
        };
        let (http, status) = if code.is_none() { (200, "ready") } else { (503, "unavailable") };
        Self::new(http, Body { status, code: code.as_deref(), pool: Some(pool) })
    }

    fn new(status: u16, body: Body<'_>) -> Self {
        // Cannot fail: names and numbers, written to memory.
        Self { status, body: serde_json::to_string(&body).unwrap_or_default() }
    }
}
