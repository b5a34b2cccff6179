//! The pool's numbers.

/// What the pool looks like right now.
///
/// The numbers are read one after the other while others come and go, so they need not add up under load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Status {
    /// The most connections the pool opens; 0 once it is closed.
    pub max_size: usize,
    /// Connections that are open.
    pub size: usize,
    /// Connections that wait in the pool to be lent.
    pub idle: usize,
    /// Connections that are lent, or being repaired or closed after they were.
    pub in_use: usize,
    /// Callers that wait for a connection to be made, or for a place for it.
    pub connecting: usize,
    /// Callers that wait for a session to come back.
    pub waiting: usize,
}
