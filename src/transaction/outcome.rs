//! What became of a transaction: one pure function of what was read off the wire. Nothing else decides.

use crate::connect::{BlockFacts, Fault, TransactionStatus};

/// How waiting for the answer to COMMIT ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// The server answered, or the connection ended; the facts tell.
    Came,
    /// It was not answered in time.
    TimedOut,
    /// The server itself said that it cannot tell: 40003 or 08007, from those that are not PostgreSQL.
    CannotTell,
}

/// What is to be done at the end of the closure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Nothing of it reached the server.
    Nothing,
    Commit,
    /// There is nothing left to commit.
    Over(Outcome),
}

/// How a transaction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Committed,
    RolledBack(Cause),
    /// SQL has ended it, or begun another: whatever that has done.
    EndedBySql,
    /// Committed or rolled back: nobody can say.
    Unknown(&'static str),
}

/// Why it was rolled back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// The fault on record; or the server has one that is not.
    Fault,
    /// COMMIT was answered with an error.
    Refused,
    /// The connection ended before COMMIT could take effect.
    Lost(&'static str),
}

const ENDED: &str = "the server ended the session before COMMIT was sent";
const CLOSED: &str = "the connection was closed before COMMIT was sent";

/// Whether COMMIT may be sent. `begun` if BEGIN was given to the driver.
pub(super) fn before_commit(facts: &BlockFacts, begun: bool) -> Next {
    let over = |outcome| Next::Over(outcome);
    if facts.ended_by_sql {
        over(Outcome::EndedBySql)
    } else if facts.fault.is_some() {
        // The server would answer COMMIT with ROLLBACK; or it knows of nothing, and would commit.
        over(Outcome::RolledBack(Cause::Fault))
    } else if !begun {
        Next::Nothing
    } else if facts.over {
        over(Outcome::RolledBack(lost(facts)))
    } else if !facts.begun {
        over(Outcome::RolledBack(Cause::Lost("the server never confirmed BEGIN")))
    } else {
        // Failed, without a fault: a savepoint is to be rolled back to, in the same message.
        Next::Commit
    }
}

/// What became of it, once COMMIT was sent, or should have been.
pub(super) fn after_commit(facts: &BlockFacts, answer: Answer) -> Outcome {
    if facts.committed {
        return Outcome::Committed;
    }
    if facts.ended_by_sql {
        return Outcome::EndedBySql;
    }
    if facts.commit_rolled_back {
        return Outcome::RolledBack(Cause::Fault);
    }
    if facts.commit_refused {
        return match answer {
            Answer::CannotTell => Outcome::Unknown("the server cannot tell what became of COMMIT"),
            _ => Outcome::RolledBack(Cause::Refused),
        };
    }
    // The server works in order: one that said good-bye before it had answered what stands before COMMIT never came to it.
    if facts.ended_before_commit {
        return Outcome::RolledBack(lost(facts));
    }
    match &facts.fault {
        // An error in front of COMMIT made the server read over it.
        Some(Fault::Server(error)) if !error.is_fatal() => return Outcome::RolledBack(Cause::Fault),
        Some(_) if !facts.commit_sent => return Outcome::RolledBack(Cause::Fault),
        _ => {}
    }
    if !facts.commit_sent {
        return Outcome::RolledBack(lost(facts));
    }
    Outcome::Unknown(match answer {
        Answer::TimedOut => "COMMIT was not answered within the commit timeout",
        _ if facts.fatal.is_some() => "the server ended the session over COMMIT",
        _ if facts.over => "the connection was closed before COMMIT was answered",
        _ => "the answer to COMMIT was not understood",
    })
}

fn lost(facts: &BlockFacts) -> Cause {
    Cause::Lost(if facts.fatal.is_some() { ENDED } else { CLOSED })
}

/// Whether nothing of a transaction is open on the server any more.
pub(super) fn is_closed(facts: &BlockFacts) -> bool {
    facts.status == TransactionStatus::Idle
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio_postgres::error::SqlState;

    use super::*;
    use crate::error::ServerError;

    fn error(fatal: bool) -> Arc<ServerError> {
        Arc::new(ServerError {
            fatal,
            code: SqlState::UNIQUE_VIOLATION,
            message: "".into(),
            constraint: None,
            routine: None,
        })
    }

    /// Every combination of facts, possible or not.
    fn all_facts() -> Vec<BlockFacts> {
        let faults = [
            None,
            Some(Fault::Server(error(false))),
            Some(Fault::Server(error(true))),
            Some(Fault::Abandoned),
            Some(Fault::Halfway),
        ];
        let mut all = Vec::new();
        for bits in 0..1u32 << 9 {
            let bit = |n: u32| bits & 1 << n != 0;
            for fault in &faults {
                for status in [TransactionStatus::Idle, TransactionStatus::Open, TransactionStatus::Failed] {
                    all.push(BlockFacts {
                        begun: bit(0),
                        commit_sent: bit(1),
                        committed: bit(2),
                        commit_rolled_back: bit(3),
                        commit_refused: bit(4),
                        ended_by_sql: bit(5),
                        ended_before_commit: bit(6),
                        over: bit(7),
                        fatal: bit(8).then(|| error(true)),
                        status,
                        fault: fault.clone(),
                    });
                }
            }
        }
        all
    }

    #[test]
    fn every_combination_of_facts_keeps_the_promises() {
        let mut seen = 0;
        for facts in all_facts() {
            for answer in [Answer::Came, Answer::TimedOut, Answer::CannotTell] {
                seen += 1;
                let outcome = after_commit(&facts, answer);
                let what = format!("{facts:?} {answer:?}: {outcome:?}");
                // Committed is what the server confirmed, and nothing else.
                assert_eq!(outcome == Outcome::Committed, facts.committed, "{what}");
                // Nobody is told "rolled back" of a COMMIT that is out and was answered by nothing that says so.
                let said = facts.commit_rolled_back
                    || facts.commit_refused && answer != Answer::CannotTell
                    || facts.ended_before_commit
                    || matches!(&facts.fault, Some(Fault::Server(e)) if !e.is_fatal())
                    || !facts.commit_sent;
                if matches!(outcome, Outcome::RolledBack(_)) {
                    assert!(said, "{what}");
                }
                if let Outcome::Unknown(_) = outcome {
                    assert!(facts.commit_sent || facts.commit_refused, "{what}");
                    assert!(!facts.ended_by_sql, "{what}");
                }
                if facts.ended_by_sql && !facts.committed {
                    assert_eq!(outcome, Outcome::EndedBySql, "{what}");
                }
            }
            for begun in [true, false] {
                seen += 1;
                let next = before_commit(&facts, begun);
                let what = format!("{facts:?} {begun}: {next:?}");
                if next == Next::Commit {
                    assert!(
                        facts.fault.is_none() && !facts.ended_by_sql && !facts.over && facts.begun,
                        "{what}"
                    );
                }
                if next == Next::Nothing {
                    assert!(!begun && facts.fault.is_none() && !facts.ended_by_sql, "{what}");
                }
                assert_ne!(next, Next::Over(Outcome::Committed), "{what}");
            }
        }
        println!("{seen} combinations of facts");
    }

    #[test]
    fn the_usual_ends_have_their_usual_names() {
        let open = BlockFacts {
            begun: true,
            commit_sent: true,
            committed: false,
            commit_rolled_back: false,
            commit_refused: false,
            ended_by_sql: false,
            ended_before_commit: false,
            over: false,
            status: TransactionStatus::Open,
            fault: None,
            fatal: None,
        };
        let fatal = Some(error(true));
        let rows: [(&str, BlockFacts, Answer, fn(&Outcome) -> bool); 8] = [
            ("an answer", BlockFacts { committed: true, ..open.clone() }, Answer::Came, |o| {
                *o == Outcome::Committed
            }),
            (
                "an answer, and a FATAL behind it",
                BlockFacts { committed: true, over: true, fatal: fatal.clone(), ..open.clone() },
                Answer::Came,
                |o| *o == Outcome::Committed,
            ),
            (
                "a FATAL instead of an answer",
                BlockFacts { over: true, fatal: fatal.clone(), ..open.clone() },
                Answer::Came,
                |o| matches!(o, Outcome::Unknown(_)),
            ),
            (
                "a FATAL before its turn",
                BlockFacts { over: true, ended_before_commit: true, fatal, ..open.clone() },
                Answer::Came,
                |o| matches!(o, Outcome::RolledBack(Cause::Lost(_))),
            ),
            ("silence", open.clone(), Answer::TimedOut, |o| matches!(o, Outcome::Unknown(_))),
            (
                "closed before it was sent",
                BlockFacts { commit_sent: false, over: true, ..open.clone() },
                Answer::Came,
                |o| matches!(o, Outcome::RolledBack(Cause::Lost(_))),
            ),
            (
                "a deferred constraint",
                BlockFacts { commit_refused: true, ..open.clone() },
                Answer::Came,
                |o| *o == Outcome::RolledBack(Cause::Refused),
            ),
            ("an aborted block", BlockFacts { commit_rolled_back: true, ..open }, Answer::Came, |o| {
                *o == Outcome::RolledBack(Cause::Fault)
            }),
        ];
        for (what, facts, answer, expected) in rows {
            let outcome = after_commit(&facts, answer);
            assert!(expected(&outcome), "{what}: {outcome:?}");
        }
    }
}
