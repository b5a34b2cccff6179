//! A session that is acquired when it is first needed.

use crate::error::Error;
use crate::manager::SessionManager;
use crate::session::Session;

/// A session for a request that may not need one, or not at once: acquired at the first call of
/// [`acquire`](Self::acquire), and the same from then on. Goes back when this is dropped.
///
/// The extractor for handlers that read the request's body, or ask a cache, before they go to the database: a
/// [`Session`] taken as an argument is held from the start.
///
/// ```
/// use pg_session::{LazySession, Problem};
///
/// async fn name(mut session: LazySession, cached: Option<String>) -> Result<String, Problem> {
///     if let Some(name) = cached {
///         return Ok(name);
///     }
///     let session = session.acquire().await?;
///     Ok(session.query_one("SELECT name FROM users WHERE id = $1", &[&1i64]).await?.get(0))
/// }
/// ```
#[derive(Debug)]
pub struct LazySession {
    sessions: SessionManager,
    session: Option<Session>,
}

impl LazySession {
    pub(crate) fn new(sessions: SessionManager) -> Self {
        Self { sessions, session: None }
    }

    /// The session, acquired now if it was not.
    ///
    /// # Errors
    ///
    /// As [`SessionManager::acquire`].
    ///
    /// # Cancel safety
    ///
    /// As [`SessionManager::acquire`].
    pub async fn acquire(&mut self) -> Result<&mut Session, Error> {
        let session = match self.session.take() {
            Some(session) => session,
            None => self.sessions.acquire().await?,
        };
        Ok(self.session.insert(session))
    }

    /// Gives the session back early, if there is one.
    pub fn release(&mut self) {
        self.session = None;
    }
}
