//! Work that is ended from outside: by whoever wants no more of it, or at a time.

use crate::{Gpa, GpaRange, GuestMemory, Mapped, MemoryError, P2m, Processors, RamLayout};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// The end of work on a guest before it is done: when it is [cancelled](Self::cancel), or at a time.
/// Once it is over it stays so. Clones are of the same work.
///
/// It is asked each time whether memory may still be read. So work ends within what is done with 16 MiB
/// of the guest ([`MAX_MAP`](crate::MAX_MAP)): some milliseconds.
///
/// ```
/// use sonicshot::{Stop, Stopped};
/// use std::time::{Duration, Instant};
/// let stop = Stop::at(Instant::now() + Duration::from_secs(5));
/// let for_another_thread = stop.clone();
/// assert!(stop.check().is_ok());
/// for_another_thread.cancel();
/// assert_eq!(stop.check(), Err(Stopped::Cancelled));
/// ```
#[derive(Debug, Clone, Default)]
pub struct Stop {
    cancelled: Arc<AtomicBool>,
    deadline: Option<Instant>,
}

/// The reason why work was ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Stopped {
    /// Somebody cancelled it.
    #[error("it was cancelled")]
    Cancelled,
    /// Its time was over.
    #[error("the time limit was reached")]
    OutOfTime,
}

impl Stop {
    /// Work that ends when it is cancelled.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Work that ends when it is cancelled, or at `deadline`.
    #[must_use]
    pub fn at(deadline: Instant) -> Self {
        Self {
            cancelled: Arc::default(),
            deadline: Some(deadline),
        }
    }

    /// Ends it, from any thread.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
    }

    /// Whether it may go on.
    ///
    /// # Errors
    /// [`Stopped`] if not.
    pub fn check(&self) -> Result<(), Stopped> {
        if self.cancelled.load(Ordering::Acquire) {
            return Err(Stopped::Cancelled);
        }
        match self.deadline {
            Some(deadline) if Instant::now() >= deadline => Err(Stopped::OutOfTime),
            _ => Ok(()),
        }
    }
}

/// A guest's memory that is read no more once work on it is to [end](Stop).
///
/// [`AnalysisOptions`](https://docs.rs/sonicshot-vmi) and
/// [`SaveOptions`](crate::checkpoint::SaveOptions) take a [`Stop`] themselves; this is for other work.
/// Who is told of an error should ask [`Stop::check`] first, and who is told of none, too: a reader may
/// pass over what it cannot read.
///
/// ```
/// use sonicshot::{Gpa, GuestBytes, GuestMemory, MappedRegions, MemoryError, Stop, Stoppable};
/// let ram = vec![1; 4096];
/// let memory = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(&ram))])?;
/// let stop = Stop::new();
/// let memory = Stoppable::new(&memory, stop.clone());
/// assert!(memory.read_u32(Gpa::ZERO).is_ok());
/// stop.cancel();
/// assert!(matches!(memory.read_u32(Gpa::ZERO), Err(MemoryError::Stopped { .. })));
/// # Ok::<(), sonicshot::LayoutError>(())
/// ```
#[derive(Debug, Clone)]
pub struct Stoppable<M> {
    memory: M,
    stop: Stop,
}

impl<M: GuestMemory> Stoppable<M> {
    /// The memory, until `stop` says that it is over.
    #[must_use]
    pub fn new(memory: M, stop: Stop) -> Self {
        Self { memory, stop }
    }

    fn check(&self, range: GpaRange) -> Result<(), MemoryError> {
        let checked = self.stop.check();
        checked.map_err(|source| MemoryError::Stopped { range, source })
    }
}

impl<M: GuestMemory> GuestMemory for Stoppable<M> {
    fn layout(&self) -> &RamLayout {
        self.memory.layout()
    }

    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.check(GpaRange::of_request(at, buf.len()))?;
        self.memory.read(at, buf)
    }

    fn map(&self, at: Gpa, len: usize) -> Result<Option<Mapped<'_>>, MemoryError> {
        self.check(GpaRange::of_request(at, len))?;
        self.memory.map(at, len)
    }

    fn next_data(&self, at: Gpa) -> Option<GpaRange> {
        self.memory.next_data(at)
    }

    fn next_absent(&self, at: Gpa) -> Result<Option<GpaRange>, MemoryError> {
        self.check(GpaRange::new(at, at))?;
        self.memory.next_absent(at)
    }

    fn read_once(&self, at: Gpa, buf: &mut [u8]) -> Result<bool, MemoryError> {
        self.check(GpaRange::of_request(at, buf.len()))?;
        self.memory.read_once(at, buf)
    }

    fn release(&self, range: GpaRange) {
        self.memory.release(range);
    }

    fn prefers_read(&self) -> bool {
        self.memory.prefers_read()
    }

    fn p2m(&self) -> Option<&P2m> {
        self.memory.p2m()
    }

    fn processors(&self) -> Processors {
        self.memory.processors()
    }
}

#[cfg(test)]
mod tests {
    use super::{Stop, Stopped};
    use std::time::{Duration, Instant};

    #[test]
    fn work_ends_at_its_time_or_when_it_is_cancelled() {
        let now = Instant::now();
        let later = Stop::at(now + Duration::from_secs(3600));
        assert!(later.check().is_ok());
        assert_eq!(Stop::at(now).check(), Err(Stopped::OutOfTime));
        let other = later.clone();
        other.cancel();
        assert_eq!(later.check(), Err(Stopped::Cancelled));
        // Another work goes on.
        assert!(Stop::new().check().is_ok());
    }
}
