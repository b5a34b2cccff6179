//! Longer reading: chapters with code that is compiled and run as the crate's own tests are.

#[doc = include_str!("guide/from_fastapi.md")]
pub mod from_fastapi {}
