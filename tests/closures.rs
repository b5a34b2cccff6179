//! Which closures a transaction takes, and which it refuses: told by the compiler, with no server.

#[test]
fn closures_of_every_useful_shape_compile() {
    trybuild::TestCases::new().pass("tests/closures/pass/*.rs");
}

#[test]
fn closures_that_would_break_a_promise_do_not_compile() {
    trybuild::TestCases::new().compile_fail("tests/closures/fail/*.rs");
}
