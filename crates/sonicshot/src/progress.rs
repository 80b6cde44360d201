//! Progress of work while it goes on, and how the work is done.

use crate::Tally;
use crate::work::threads;
use core::num::NonZeroUsize;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A listener that is told how far the work is: a bar, a log, a program above. Every options struct of
/// work that takes long has one as `progress`, and none by default.
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
    /// `total` is 0 as long as nobody knows it.
    fn tell(&self, done: u64, total: u64);

    /// Told that a part of the work begins whose bytes are counted from 0 anew. A part may come
    /// again. Whoever only shows bytes need not know.
    fn begin(&self, phase: WorkPhase) {
        let _ = phase;
    }
}

/// A part of work that has several, one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WorkPhase {
    /// Content is taken in that comes through a pipe or is compressed. The bytes are those of
    /// the compressed file.
    TakingIn,
    /// A file is gone through that tells only in passing where its pages lie. The bytes are those of
    /// the file.
    Opening,
    /// Memory is searched for the kernel.
    FindingKernel,
    /// Struct pages are searched for lists of free pages, of a kernel whose types are not known.
    FindingLists,
    /// Lists of free pages are walked. The bytes are those of the pages that the kernel counts on them.
    WalkingLists,
    /// Each page gets its class. The bytes are those of the pages.
    Classifying,
    /// Pages in use are looked at for zeroes. The bytes are those of all pages, read or not.
    FindingZeroPages,
    /// The memory that is kept of a running guest is copied. It begins before the guest is paused, and
    /// until the copy is there nothing else is told of but its bytes.
    Copying,
    /// Disks are searched for pages of the guest's. First the bytes are those of the pages, then those
    /// of the disks.
    SearchingDisks,
    /// A checkpoint or an image is written. The bytes are those of the guest's memory or of the file,
    /// as the options say.
    Saving,
    /// A guest's memory is put in place. The bytes are those that are decompressed, copied or sent.
    Restoring,
    /// A checkpoint is checked against itself. Each byte of it counts twice: once for the digest of
    /// the file, once for its own checksum.
    Checking,
    /// Pages that a checkpoint has on disks are checked. The bytes are those of the pages.
    CheckingDisks,
    /// A checkpoint's pages are compared with a dump's.
    Comparing,
    /// A file is made to share blocks with disks.
    Sharing,
    /// A file that is written is made durable. The bytes are those of the file.
    Syncing,
}

impl WorkPhase {
    /// The name for people, such as `finding the kernel`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::TakingIn => "taking in",
            Self::Opening => "opening",
            Self::FindingKernel => "finding the kernel",
            Self::FindingLists => "finding free lists",
            Self::WalkingLists => "walking free lists",
            Self::Classifying => "classifying pages",
            Self::FindingZeroPages => "finding zero pages",
            Self::Copying => "copying memory",
            Self::SearchingDisks => "searching disks",
            Self::Saving => "saving",
            Self::Restoring => "restoring",
            Self::Checking => "checking",
            Self::CheckingDisks => "checking disks",
            Self::Comparing => "comparing",
            Self::Sharing => "sharing",
            Self::Syncing => "syncing to disk",
        }
    }
}

/// A [phase](WorkPhase) that is told of as its bytes go by: at most some thousand times, however
/// many calls there are.
#[derive(Debug)]
pub struct PhaseProgress<'a> {
    progress: &'a dyn Progress,
    done: u64,
    total: u64,
    /// The bytes done at which it is told of again.
    next: u64,
}

impl<'a> PhaseProgress<'a> {
    /// It is told of so often, as a binary logarithm.
    const STEPS: u32 = 10;

    /// Tells `progress` that `phase` begins, of `total` bytes.
    pub fn begin(progress: &'a dyn Progress, phase: WorkPhase, total: u64) -> Self {
        progress.begin(phase);
        progress.tell(0, total);
        Self {
            progress,
            done: 0,
            total,
            next: 0,
        }
    }

    /// So many bytes more are done.
    pub fn add(&mut self, bytes: u64) {
        self.reach(Tally::new(self.done).and(bytes).get());
    }

    /// So many bytes are done. It goes back for none, and no further than the total.
    pub fn reach(&mut self, done: u64) {
        if done <= self.done {
            return;
        }
        self.done = match self.total {
            0 => done,
            total => done.min(total),
        };
        if self.done >= self.next {
            self.progress.tell(self.done, self.total);
            let step = match self.total {
                // Of what has no end that is known, each MiB.
                0 => 1 << 20,
                total => total >> Self::STEPS,
            };
            self.next = Tally::new(self.done).and(step).get();
        }
    }

    /// All is done, or need not be.
    pub fn end(self) {
        let total = match self.total {
            0 => self.done,
            total => total,
        };
        self.progress.tell(total, total);
    }
}

/// Progress that is told on one thread and passed on by another: whoever asked for the work is told of
/// it on their own thread, and nobody who works waits for them.
///
/// ```
/// use sonicshot::{PhaseProgress, Progress, ProgressRelay, WorkPhase};
/// use std::sync::Arc;
/// use std::sync::atomic::{AtomicU64, Ordering};
///
/// let done = Arc::new(AtomicU64::new(0));
/// let seen = Arc::clone(&done);
/// let bar = move |done: u64, _: u64| seen.store(done, Ordering::Relaxed);
/// let relay = ProgressRelay::default();
/// std::thread::scope(|scope| {
///     scope.spawn(|| PhaseProgress::begin(&relay, WorkPhase::Saving, 4096).end());
/// });
/// relay.pass_on(&bar);
/// assert_eq!(done.load(Ordering::Relaxed), 4096);
/// ```
#[derive(Debug, Default)]
pub struct ProgressRelay(Mutex<Vec<Told>>);

/// What was told and not passed on yet: a phase that began, if one did, and its last bytes.
#[derive(Debug, Default)]
struct Told {
    begun: Option<WorkPhase>,
    bytes: Option<(u64, u64)>,
}

impl ProgressRelay {
    fn told(&self) -> MutexGuard<'_, Vec<Told>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells `progress` what was told since the last call: each phase, and of its bytes the last.
    pub fn pass_on(&self, progress: &dyn Progress) {
        // The lock is not held while it is told.
        let told = core::mem::take(&mut *self.told());
        for Told { begun, bytes } in told {
            if let Some(phase) = begun {
                progress.begin(phase);
            }
            if let Some((done, total)) = bytes {
                progress.tell(done, total);
            }
        }
    }
}

impl Progress for ProgressRelay {
    fn tell(&self, done: u64, total: u64) {
        let mut told = self.told();
        if told.is_empty() {
            told.push(Told::default());
        }
        if let Some(last) = told.last_mut() {
            last.bytes = Some((done, total));
        }
    }

    fn begin(&self, phase: WorkPhase) {
        let begun = Some(phase);
        self.told().push(Told { begun, bytes: None });
    }
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

    fn begin(&self, phase: WorkPhase) {
        if let Some(progress) = self {
            progress.begin(phase);
        }
    }
}

impl fmt::Debug for dyn Progress + '_ {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Progress")
    }
}

/// Options for work of which there is nothing else to choose; by default all cores work, and
/// nobody is told.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct WorkOptions {
    /// The number of threads; by default as many as there are cores.
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
    use super::{PhaseProgress, Progress, ProgressRelay, WorkOptions, WorkPhase};
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

    /// All that is told, in its order.
    #[derive(Debug, Default)]
    struct Told {
        phases: Mutex<Vec<WorkPhase>>,
        bytes: Mutex<Vec<(u64, u64)>>,
    }

    impl Progress for Told {
        fn tell(&self, done: u64, total: u64) {
            self.bytes.lock().unwrap().push((done, total));
        }
        fn begin(&self, phase: WorkPhase) {
            self.phases.lock().unwrap().push(phase);
        }
    }

    #[test]
    fn what_is_passed_on_is_each_phase_and_its_last_bytes() {
        let (relay, told) = (ProgressRelay::default(), Told::default());
        relay.pass_on(&told);
        assert!(told.bytes.lock().unwrap().is_empty());
        relay.tell(1, 9);
        relay.tell(2, 9);
        PhaseProgress::begin(&relay, WorkPhase::Opening, 7).end();
        relay.begin(WorkPhase::Saving);
        relay.pass_on(&told);
        relay.tell(3, 8);
        relay.pass_on(&told);
        relay.pass_on(&told);
        let phases = [WorkPhase::Opening, WorkPhase::Saving];
        assert_eq!(*told.phases.lock().unwrap(), phases);
        assert_eq!(*told.bytes.lock().unwrap(), [(2, 9), (7, 7), (3, 8)]);
    }

    #[test]
    fn a_phase_is_told_of_from_nothing_to_all_and_not_too_often() {
        // The total, the bytes of each step, the number of steps, and the last that is told.
        for (total, bytes, steps, last) in [
            (1 << 40, 1 << 21, 1 << 19, (1 << 40, 1 << 40)),
            (1 << 40, 1 << 21, 3, (1 << 40, 1 << 40)),
            (4096, 1 << 21, 3, (4096, 4096)),
            (4096, 1, 7, (4096, 4096)),
            (0, 1 << 12, 1 << 10, (1 << 22, 1 << 22)),
        ] {
            let told = Arc::new(Told::default());
            let progress: Option<Arc<dyn Progress>> = Some(told.clone());
            let mut phase = PhaseProgress::begin(&progress, WorkPhase::Classifying, total);
            for _ in 0..steps {
                phase.add(bytes);
            }
            phase.reach(0);
            phase.end();
            assert_eq!(*told.phases.lock().unwrap(), [WorkPhase::Classifying]);
            let told = told.bytes.lock().unwrap();
            assert!(told.len() <= 1027, "{}", told.len());
            assert!(told.is_sorted_by_key(|(done, _)| *done));
            assert_eq!(told.first(), Some(&(0, total)));
            assert_eq!(told.last(), Some(&last));
        }
    }
}
