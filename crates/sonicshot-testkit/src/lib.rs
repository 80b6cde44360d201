//! The parts that the tests of SonicShot's crates share.
//!
//! Some tests need what not every machine has: root, mounts, a file system that shares blocks, a
//! tool. There they are skipped, and say so. With the environment variable `SONICSHOT_REQUIRE_ALL`
//! set to `1` they fail instead, so that a gate on a machine that has all of it cannot pass with
//! tests that did not run.
//!
//! [`check_memory`] holds a guest memory, whoever has it, against what the trait promises.

mod memory;
mod mounted;
mod told;

pub use memory::{check_handed_on, check_memory, check_same};
pub use mounted::Mounted;
pub use told::{PhaseTold, Told};

/// The environment variable that lets tests fail that would be skipped.
pub const REQUIRE_ALL: &str = "SONICSHOT_REQUIRE_ALL";

/// Whether a test can run that needs `what`, of which `there` says whether the machine has it. The
/// test ends without a result if not.
///
/// ```
/// fn a_test() {
///     if !sonicshot_testkit::has("the root of all files", std::path::Path::new("/").exists()) {
///         return;
///     }
///     // …
/// }
/// # a_test();
/// ```
///
/// # Panics
/// If the machine has it not, and every test is to run (`SONICSHOT_REQUIRE_ALL=1`).
#[must_use]
#[track_caller]
pub fn has(what: &str, there: bool) -> bool {
    decide(
        what,
        there,
        std::env::var(REQUIRE_ALL).is_ok_and(|value| value == "1"),
    )
}

#[track_caller]
fn decide(what: &str, there: bool, required: bool) -> bool {
    assert!(
        there || !required,
        "this machine has not {what}, and {REQUIRE_ALL}=1 says that no test may be skipped"
    );
    if !there {
        eprintln!("skipped: this machine has not {what}");
    }
    there
}

#[cfg(test)]
mod tests {
    use super::decide;

    #[test]
    fn a_test_is_only_skipped_where_it_may_be() {
        assert!(decide("a", true, true) && decide("a", true, false));
        assert!(!decide("a", false, false));
        let refused = std::panic::catch_unwind(|| decide("a tool", false, true));
        let message = refused.unwrap_err();
        let message = message.downcast_ref::<String>().map_or("", String::as_str);
        assert!(message.contains("a tool"), "{message}");
    }
}
