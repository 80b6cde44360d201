//! How long work is told of while it goes on, and how it is done.

use crate::work::threads;
use core::num::NonZeroUsize;
use std::fmt;
use std::sync::Arc;

/// Whoever is told how far the work is: a bar, a log, a program above. Every options struct of work
/// that takes long has one as `progress`, and none by default.
///
/// It is told on the thread that asked for the work, so it should return soon.
///
/// ```
/// use sonicshot::{Progress, WorkOptions};
/// use std::sync::Arc;
/// use std::sync::atomic::{AtomicU64, Ordering};
///
/// #[derive(Default)]
/// struct Percent(AtomicU64);
///
/// impl Progress for Percent {
///     fn tell(&self, done: u64, total: u64) {
///         let percent = (u128::from(done) * 100).checked_div(total.into());
///         self.0.store(percent.map_or(100, |percent| percent as u64), Ordering::Relaxed);
///     }
/// }
///
/// let percent = Arc::new(Percent::default());
/// let _options = WorkOptions::new().progress(percent.clone());
/// // A closure is one, too.
/// let _options = WorkOptions::new().progress(Arc::new(|done: u64, total: u64| {
///     eprintln!("{done} of {total}");
/// }));
/// ```
pub trait Progress: Send + Sync {
    /// Told that `done` of `total` is done. Both are bytes: of the guest's memory, or of files.
    fn tell(&self, done: u64, total: u64);
}

impl<F: Fn(u64, u64) + Send + Sync> Progress for F {
    fn tell(&self, done: u64, total: u64) {
        self(done, total);
    }
}

/// Nobody is told if it is `None`.
impl Progress for Option<Arc<dyn Progress>> {
    fn tell(&self, done: u64, total: u64) {
        if let Some(progress) = self {
            progress.tell(done, total);
        }
    }
}

impl fmt::Debug for dyn Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Progress")
    }
}

/// Options for work of which there is nothing else to choose; by default all cores work, and
/// nobody is told.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct WorkOptions {
    /// How many threads work; by default as many as there are cores.
    pub threads: Option<NonZeroUsize>,
    /// Whoever is told how far it is.
    pub progress: Option<Arc<dyn Progress>>,
}

impl WorkOptions {
    /// The defaults.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            threads: None,
            progress: None,
        }
    }

    /// Says how many threads work.
    #[must_use]
    pub fn threads(mut self, threads: NonZeroUsize) -> Self {
        self.threads = Some(threads);
        self
    }

    /// Says who is told how far it is.
    #[must_use]
    pub fn progress(mut self, progress: Arc<dyn Progress>) -> Self {
        self.progress = Some(progress);
        self
    }

    pub(crate) fn thread_count(&self) -> NonZeroUsize {
        threads(self.threads)
    }
}

#[cfg(test)]
mod tests {
    use super::{Progress, WorkOptions};
    use std::sync::{Arc, Mutex};

    #[test]
    fn whoever_is_named_is_told_and_none_is_no_fault() {
        WorkOptions::new().progress.tell(1, 2);
        let told = Arc::new(Mutex::new(Vec::new()));
        let telling = Arc::clone(&told);
        let tell = move |done: u64, total: u64| telling.lock().unwrap().push((done, total));
        let options = WorkOptions::new().progress(Arc::new(tell));
        options.clone().progress.tell(1, 2);
        options.progress.tell(2, 2);
        assert_eq!(*told.lock().unwrap(), [(1, 2), (2, 2)]);
        assert!(format!("{options:?}").contains("Some(Progress)"));
    }
}
