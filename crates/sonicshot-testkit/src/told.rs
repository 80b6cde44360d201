//! A listener for tests.

use sonicshot::{Progress, WorkPhase};
use std::sync::{Mutex, PoisonError};

/// A phase, and all that was told of it: the bytes that are done, and their total.
pub type PhaseTold = (WorkPhase, Vec<(u64, u64)>);

/// A listener that keeps all it is told, phase by phase. Bytes before the first phase are a mistake of
/// whoever tells them.
#[derive(Debug, Default)]
pub struct Told(Mutex<Vec<PhaseTold>>);

impl Told {
    /// The phases so far, in their order.
    #[must_use]
    pub fn phases(&self) -> Vec<PhaseTold> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl Progress for Told {
    #[expect(clippy::unwrap_used, reason = "a test says so by panicking")]
    fn tell(&self, done: u64, total: u64) {
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        told.last_mut().unwrap().1.push((done, total));
    }

    fn begin(&self, phase: WorkPhase) {
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        told.push((phase, Vec::new()));
    }
}
