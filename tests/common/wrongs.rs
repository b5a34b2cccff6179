//! What went wrong, gathered.

use std::fmt;

/// Collects what is wrong, so that one run shows all of it.
#[derive(Default)]
pub struct Wrongs(Vec<String>);

impl Wrongs {
    pub fn check(&mut self, right: bool, what: impl fmt::Display) {
        if !right {
            self.0.push(what.to_string());
        }
    }
}

impl Drop for Wrongs {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert!(self.0.is_empty(), "{} wrong:\n{}", self.0.len(), self.0.join("\n"));
        }
    }
}
