//! Which closures a transaction takes, and which it refuses: told by the compiler, with no server.
//!
//! Those it takes are modules of this test, which so does not compile if one of them does not.
#![allow(dead_code, reason = "compiled, and never run")]

#[path = "closures/pass/captures.rs"]
mod captures;
#[path = "closures/pass/errors.rs"]
mod errors;
#[path = "closures/pass/executors.rs"]
mod executors;
#[path = "closures/pass/functions.rs"]
mod functions;
#[path = "closures/pass/nesting.rs"]
mod nesting;
#[path = "closures/pass/send.rs"]
mod send;

#[test]
fn closures_that_would_break_a_promise_do_not_compile() {
    trybuild::TestCases::new().compile_fail("tests/closures/fail/*.rs");
}
