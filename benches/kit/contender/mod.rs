//! Who takes part, and in which ways each does some work.

pub mod bare;
pub mod deadpool;
pub mod ours;

use std::future::Future;
use std::pin::Pin;

use super::Failure;
use super::load::{Load, Sample};
use super::server::Target;
use super::work::Work;

/// What a way of doing the work counts as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Ours,
    /// What people use instead, as its documentation says.
    Peer,
    /// Something to compare with that is no alternative, or not the same work.
    Yardstick,
}

#[derive(Clone, Copy, Debug)]
pub struct Way {
    pub name: &'static str,
    pub role: Role,
}

impl Way {
    pub const fn ours(name: &'static str) -> Self {
        Self { name, role: Role::Ours }
    }

    pub const fn peer(name: &'static str) -> Self {
        Self { name, role: Role::Peer }
    }

    pub const fn yardstick(name: &'static str) -> Self {
        Self { name, role: Role::Yardstick }
    }
}

/// One contender's turn in one round.
#[derive(Clone, Debug)]
pub struct Turn {
    pub work: Work,
    pub way: &'static str,
    pub target: Target,
    pub load: Load,
    /// How many rows an insert stores.
    pub rows: usize,
    pub scale: i32,
}

impl Turn {
    pub fn unknown(&self) -> Failure {
        format!("no such way: {}", self.way).into()
    }
}

pub type Running<'a> = Pin<Box<dyn Future<Output = Result<Sample, Failure>> + 'a>>;

pub trait Contender {
    fn name(&self) -> &'static str;

    /// None for work that it has nothing for.
    fn ways(&self, work: Work) -> Vec<Way>;

    /// Connects, does the work under the load, and leaves.
    fn run<'a>(&'a self, turn: &'a Turn) -> Running<'a>;
}

/// How many times a pool is asked in one measured operation: once takes less time than to look at the clock.
pub const ACQUIRES: u32 = 100;
