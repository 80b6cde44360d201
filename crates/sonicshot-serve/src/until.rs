//! Until when something has to be done.

use std::time::{Duration, Instant};

/// A time that began when this was made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Until {
    start: Instant,
    limit: Duration,
}

impl Until {
    /// As long as `limit` from now on.
    pub(crate) fn new(limit: Duration) -> Self {
        Self {
            start: Instant::now(),
            limit,
        }
    }

    /// The whole time, from its start.
    pub(crate) fn limit(&self) -> Duration {
        self.limit
    }

    /// The time that is left: nothing once it is over.
    pub(crate) fn left(&self) -> Duration {
        self.limit.saturating_sub(self.start.elapsed())
    }
}

#[cfg(test)]
mod tests {
    use super::Until;
    use std::time::Duration;

    #[test]
    fn what_is_over_has_nothing_left() {
        let hour = Duration::from_secs(3600);
        let until = Until::new(hour);
        assert!(until.left() > Duration::ZERO && until.left() <= hour);
        assert_eq!(until.limit(), hour);
        assert_eq!(Until::new(Duration::ZERO).left(), Duration::ZERO);
    }
}
