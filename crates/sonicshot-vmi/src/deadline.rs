//! The time that a search may take.

use crate::error::VmiError;
use std::time::{Duration, Instant};

/// A search that ends: what it looks for is not told, and the guest says how much there is to look
/// at.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadline {
    began: Instant,
    most: Duration,
}

impl Deadline {
    /// The longest time of a search of a guest's records, on any guest: a whole one takes less than a
    /// second for each 64 GiB.
    const SEARCH: Duration = Duration::from_secs(10);

    /// A search that begins now.
    pub(crate) fn new() -> Self {
        Self::within(Self::SEARCH)
    }

    pub(crate) fn within(most: Duration) -> Self {
        Self {
            began: Instant::now(),
            most,
        }
    }

    /// Ends a search that takes too long: of `all` of `what` it has looked at `done`.
    ///
    /// # Errors
    /// [`VmiError::OutOfTime`].
    pub(crate) fn check(&self, what: &'static str, done: u64, all: u64) -> Result<(), VmiError> {
        if self.began.elapsed() <= self.most {
            return Ok(());
        }
        Err(VmiError::OutOfTime {
            what,
            done,
            all,
            seconds: self.most.as_secs(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Deadline;
    use crate::VmiError;
    use std::time::Duration;

    #[test]
    fn a_search_that_takes_too_long_says_how_far_it_came() {
        assert!(Deadline::new().check("pages", 1, 2).is_ok());
        let over = Deadline::within(Duration::ZERO);
        std::thread::sleep(Duration::from_millis(1));
        let error = over.check("pages", 1, 2).unwrap_err();
        assert!(matches!(error, VmiError::OutOfTime { .. }));
        let text = "pages: gave up after 0 s, with 1 of 2 looked at";
        assert_eq!(error.to_string(), text);
    }
}
