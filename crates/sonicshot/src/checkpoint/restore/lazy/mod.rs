//! Restores a checkpoint on demand: a page comes in when the guest first touches it.

mod fetch;
mod options;
mod region;
mod service;
#[expect(unsafe_code, reason = "the edge to userfaultfd")]
pub(crate) mod uffd;
mod working_set;

pub use self::options::{LazyOptions, LazyRegion, Prefetch};
use self::region::{Region, zeroed};
use self::service::{Lazy, Service, State};
use self::uffd::Uffd;
pub use self::working_set::WorkingSet;
use crate::checkpoint::CheckpointError;
use crate::checkpoint::read::reader::CheckpointReader;
use crate::checkpoint::read::source::RangeSource;
use core::sync::atomic::Ordering;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::OwnedFd;
use std::fmt;
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;

/// What a lazy restore has done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct LazyStats {
    /// Faults that were served.
    pub faults: u64,
    /// Bytes put in place because of faults, zeroes not counted.
    pub faulted_bytes: u64,
    /// Bytes put in place in the background.
    pub prefetched_bytes: u64,
    /// Bytes that the VMM gave back, to be zero from then on.
    pub removed_bytes: u64,
}

/// A restore on demand, under way: threads that serve page faults from a checkpoint.
///
/// Free and zero pages take no memory until the guest writes to them.
///
/// If a page cannot be read (the file is damaged or gone), whoever waits for it is ended by a
/// signal (Linux 6.6 and later) or waits for ever: a guest never gets to see bytes that are not
/// its own. [`error`](Self::error) tells. Dropping this before all pages are in place keeps the
/// `userfaultfd` open for the same reason; [`finish`](Self::finish) brings in the rest first.
///
/// ```
/// use sonicshot::checkpoint::*;
/// use sonicshot::*;
/// use std::sync::Arc;
///
/// // A checkpoint of 64 pages.
/// let ram: Vec<u8> = (0..64 * 4096_u32).map(|i| (i >> 12) as u8 ^ i as u8).collect();
/// let guest = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(&ram))])?;
/// let map = PageMap::new(guest.layout(), PageSize::SIZE_4K);
/// let plan = PrunePlan::new(&map, &DropClasses::default(), Fill::Zero);
/// let info = CheckpointInfo::new(guest.layout().clone(), PageSize::SIZE_4K);
/// let mut writer = CheckpointWriter::new(Vec::new(), info, SaveOptions::default())?;
/// writer.memory(&guest, &map, &plan, &mut |_, _| {})?;
/// let checkpoint = Arc::new(CheckpointReader::new(writer.finish()?.0)?);
///
/// // Fresh memory for the guest.
/// # use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
/// # let len = ram.len();
/// # let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
/// # let fresh = unsafe { mmap_anonymous(std::ptr::null_mut(), len, access, flags)? };
/// # let start = std::ptr::NonNull::new(fresh.cast::<u8>()).unwrap();
/// let uffd = Uffd::new()?;
/// // SAFETY: freshly mapped, and only this thread will touch it.
/// unsafe { uffd.register(start, len)? };
/// let region = LazyRegion {
///     guest: GpaRange::with_len(Gpa::ZERO, len as u64).unwrap(),
///     host: HostAddress::new(start.as_ptr() as usize),
///     page: 4096,
/// };
/// let restore = LazyRestore::start(checkpoint, uffd, vec![region], LazyOptions::default())?;
/// // SAFETY: inside the mapping; the page comes in now.
/// let byte = unsafe { start.add(5 * 4096 + 3).read_volatile() };
/// assert_eq!(byte, 5 ^ 3);
/// restore.finish()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct LazyRestore {
    shared: Arc<dyn Service>,
    threads: Vec<JoinHandle<()>>,
    stop: Arc<OwnedFd>,
}

impl LazyRestore {
    /// Begins to serve the page faults of `regions`, which are registered with `uffd`, from
    /// `checkpoint`. Returns at once; the guest may run.
    ///
    /// # Errors
    /// [`CheckpointError`] if a region is not RAM of the checkpoint, or nothing can be started.
    pub fn start<S: RangeSource + 'static>(
        checkpoint: Arc<CheckpointReader<S>>,
        uffd: Uffd,
        regions: Vec<LazyRegion>,
        options: LazyOptions,
    ) -> Result<Self, CheckpointError> {
        let failed = |operation| {
            move |errno: rustix::io::Errno| CheckpointError::Host {
                operation,
                at: 0,
                len: 0,
                source: errno.into(),
            }
        };
        // A handler must not sleep in a read while it is told to stop.
        rustix::io::ioctl_fionbio(&uffd, true).map_err(failed("FIONBIO"))?;
        let regions = Region::all(regions, checkpoint.info())?;
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let stop = Arc::new(stop.map_err(failed("eventfd"))?);
        let prefetch = options.prefetch;
        let threads = options.threads.get();
        let state = State::new(uffd, regions, options, Arc::clone(&stop));
        let verified = zeroed(checkpoint.index().chunk_count());
        let shared: Arc<dyn Service> = Arc::new(Lazy {
            reader: checkpoint,
            state,
            verified,
        });
        let mut restore = Self {
            shared,
            threads: Vec::new(),
            stop,
        };
        for number in 0..threads {
            restore.spawn(&format!("sonicshot-fault-{number}"), |s| s.serve())?;
        }
        match prefetch {
            Prefetch::Nothing => {}
            Prefetch::WorkingSet => restore.spawn("sonicshot-fetch", |s| s.prefetch(false))?,
            Prefetch::Everything => restore.spawn("sonicshot-fetch", |s| s.prefetch(true))?,
        }
        Ok(restore)
    }

    fn spawn(
        &mut self,
        name: &str,
        work: impl FnOnce(&dyn Service) + Send + 'static,
    ) -> Result<(), CheckpointError> {
        let shared = Arc::clone(&self.shared);
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || work(&*shared))
            .map_err(|source| CheckpointError::Host {
                operation: "starting a thread",
                at: 0,
                len: 0,
                source,
            })?;
        self.threads.push(thread);
        Ok(())
    }

    /// What has been done so far.
    #[must_use]
    pub fn stats(&self) -> LazyStats {
        let state = self.shared.state();
        LazyStats {
            faults: state.faults.load(Ordering::Relaxed),
            faulted_bytes: state.faulted.load(Ordering::Relaxed),
            prefetched_bytes: state.background.load(Ordering::Relaxed),
            removed_bytes: state.removed.load(Ordering::Relaxed),
        }
    }

    /// The frames that a guest had to wait for so far: the working set for the next restore of
    /// the same checkpoint. What was brought in before it was touched is not among them, so
    /// record it with [`Prefetch::Nothing`] and `around` 0.
    #[must_use]
    pub fn touched(&self) -> WorkingSet {
        let touched = self.shared.state().touched.lock();
        let touched = touched.unwrap_or_else(PoisonError::into_inner);
        touched.iter().copied().collect()
    }

    /// Why a page could not be brought in, if that happened.
    #[must_use]
    pub fn error(&self) -> Option<Arc<CheckpointError>> {
        let error = self.shared.state().error.lock();
        error.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether all pages are in place.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        let done = self.shared.state().prefetched.lock();
        *done.unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until all pages are in place, bringing in what is left.
    ///
    /// # Errors
    /// Why a page could not be brought in.
    pub fn finish(mut self) -> Result<LazyStats, Arc<CheckpointError>> {
        if self.shared.state().options.prefetch != Prefetch::Everything
            && let Err(error) = self.spawn("sonicshot-fetch", |s| s.prefetch(true))
        {
            return Err(Arc::new(error));
        }
        let state = self.shared.state();
        let mut done = state
            .prefetched
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        while !*done {
            if let Some(error) = self.error() {
                return Err(error);
            }
            done = state
                .done
                .wait(done)
                .unwrap_or_else(PoisonError::into_inner);
        }
        drop(done);
        Ok(self.stats())
    }
}

impl Drop for LazyRestore {
    fn drop(&mut self) {
        let state = self.shared.state();
        state.stopping.store(true, Ordering::Release);
        let _ = rustix::io::write(&*self.stop, &1_u64.to_ne_bytes());
        let complete = self.is_complete();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        if !complete {
            // Closing it would let the guest read zeroes where its own bytes belong.
            core::mem::forget(Arc::clone(&self.shared));
        }
    }
}

impl fmt::Debug for LazyRestore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LazyRestore")
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}
