//! What the crate's own table and the peers' share: the work, who does it, the load, the rounds and the report.
#![allow(dead_code, reason = "the table and the peers each use a part of it")]
#![allow(missing_docs, unreachable_pub, reason = "it is part of programs, not of the crate")]

pub mod arguments;
pub mod contender;
pub mod load;
pub mod plot;
pub mod proxy;
pub mod report;
pub mod rounds;
pub mod section;
pub mod server;
pub mod work;

use std::error::Error;

pub type Failure = Box<dyn Error + Send + Sync>;

/// An error with its causes: the drivers' errors alone say little more than "db error".
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}
