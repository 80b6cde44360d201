//! Restores a checkpoint on demand: a page comes in when the guest first touches it.

use super::error::CheckpointError;
use super::index::clip;
use super::info::{PageContent, PageRun};
use super::layout::{len64, u64_at};
use super::reader::{CheckpointReader, ChunkDecoder, fill_words, ram_of};
use super::source::RangeSource;
use super::uffd::{Event, HostAddress, Placed, Uffd};
use crate::{Gpa, GpaRange, Pfn, PfnRange};
use core::num::NonZeroUsize;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fd::OwnedFd;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;

/// A stretch of guest memory in the address space whose faults are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LazyRegion {
    /// The guest memory that is there.
    pub guest: GpaRange,
    /// Where it begins.
    pub host: HostAddress,
    /// The size of the pages behind it, in bytes: 4096, or that of huge pages.
    pub page: u64,
}

/// What is fetched before it is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Prefetch {
    /// Nothing.
    Nothing,
    /// The working set alone.
    WorkingSet,
    /// The working set, then all that is left. When all of it is in place the kernel need not
    /// ask any more.
    #[default]
    Everything,
}

/// How a checkpoint is restored on demand.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct LazyOptions {
    /// Threads that serve faults.
    pub threads: NonZeroUsize,
    /// What is fetched in the background.
    pub prefetch: Prefetch,
    /// What comes first in the background.
    pub working_set: WorkingSet,
    /// How much stored data around a page comes in with it, in bytes.
    pub around: u64,
    /// Frames that are remembered as touched, at most.
    pub record: usize,
}

impl Default for LazyOptions {
    fn default() -> Self {
        Self {
            threads: NonZeroUsize::MIN,
            prefetch: Prefetch::default(),
            working_set: WorkingSet::default(),
            around: 16 << 10,
            record: 1 << 20,
        }
    }
}

/// Frames that a guest needs soon after it is restored: what it touched the last time.
///
/// A VMM may keep it as a blob of the checkpoint, or beside it.
///
/// ```
/// use sonicshot::checkpoint::WorkingSet;
/// use sonicshot::Pfn;
/// let set: WorkingSet = [Pfn::new(7), Pfn::new(5), Pfn::new(6)].into_iter().collect();
/// assert_eq!(set.frames(), 3);
/// assert_eq!(WorkingSet::from_bytes(&set.to_bytes()), Some(set));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WorkingSet(Vec<PfnRange>);

impl WorkingSet {
    /// The frames: sorted, disjoint.
    #[must_use]
    pub fn ranges(&self) -> &[PfnRange] {
        &self.0
    }

    /// How many frames there are.
    #[must_use]
    pub fn frames(&self) -> u64 {
        self.0
            .iter()
            .fold(0, |sum, range| sum.saturating_add(range.len()))
    }

    /// The set as bytes: first frame and number of frames of each range, little-endian.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let words = self
            .0
            .iter()
            .flat_map(|range| [range.start().raw(), range.len()]);
        words.flat_map(u64::to_le_bytes).collect()
    }

    /// What [`to_bytes`](Self::to_bytes) made; `None` if it is something else.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        if !bytes.len().is_multiple_of(16) {
            return None;
        }
        let mut out: Vec<PfnRange> = Vec::new();
        for record in bytes.chunks_exact(16) {
            let start = Pfn::new(u64_at(record, 0)?);
            let range = PfnRange::with_len(start, u64_at(record, 8)?)?;
            if range.is_empty() || out.last().is_some_and(|last| last.end() >= range.start()) {
                return None;
            }
            out.push(range);
        }
        Some(Self(out))
    }
}

impl FromIterator<Pfn> for WorkingSet {
    fn from_iter<I: IntoIterator<Item = Pfn>>(frames: I) -> Self {
        let mut frames: Vec<Pfn> = frames.into_iter().collect();
        frames.sort_unstable();
        let mut out: Vec<PfnRange> = Vec::new();
        for pfn in frames {
            let Some(one) = PfnRange::with_len(pfn, 1) else {
                continue;
            };
            match out.last_mut() {
                Some(last) if pfn < last.end() => {}
                Some(last) if pfn == last.end() => *last = PfnRange::new(last.start(), one.end()),
                _ => out.push(one),
            }
        }
        Self(out)
    }
}

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

/// What the threads do, whatever the source of the checkpoint is.
trait Service: Send + Sync {
    fn state(&self) -> &State;
    fn serve(&self);
    fn prefetch(&self, everything: bool);
}

struct State {
    uffd: Uffd,
    regions: Vec<Region>,
    options: LazyOptions,
    /// Events are read under the write lock, bytes put in place under the read lock: that a page
    /// was given back is known before any thread could bring its old bytes in again.
    events: RwLock<()>,
    stopping: AtomicBool,
    /// The process whose memory it is has ended: nobody waits for anything.
    exited: AtomicBool,
    prefetched: Mutex<bool>,
    done: Condvar,
    error: Mutex<Option<Arc<CheckpointError>>>,
    touched: Mutex<Vec<Pfn>>,
    stop: Arc<OwnedFd>,
    faults: AtomicU64,
    faulted: AtomicU64,
    background: AtomicU64,
    removed: AtomicU64,
}

struct Region {
    at: LazyRegion,
    len: u64,
    shift: u32,
    /// A bit for each page: in place, as far as is known.
    present: Vec<AtomicU64>,
    /// A bit for each page: given back, zero from now on.
    removed: Vec<AtomicU64>,
}

fn bit(bits: &[AtomicU64], number: u64) -> Option<(&AtomicU64, u64)> {
    let word = bits.get(usize::try_from(number >> 6).ok()?)?;
    Some((word, 1 << (number & 63)))
}

fn is_set(bits: &[AtomicU64], number: u64) -> bool {
    bit(bits, number).is_some_and(|(word, mask)| word.load(Ordering::Acquire) & mask != 0)
}

fn set(bits: &[AtomicU64], number: u64) {
    if let Some((word, mask)) = bit(bits, number) {
        word.fetch_or(mask, Ordering::AcqRel);
    }
}

fn clear(bits: &[AtomicU64], number: u64) {
    if let Some((word, mask)) = bit(bits, number) {
        word.fetch_and(!mask, Ordering::AcqRel);
    }
}

impl Region {
    /// Where the host address is in the guest.
    fn gpa(&self, host: u64) -> Option<Gpa> {
        let offset = host.checked_sub(self.start())?;
        self.at.guest.start().checked_add(offset)
    }

    fn start(&self) -> u64 {
        self.at.host.raw() as u64
    }

    fn host(&self, at: Gpa) -> Option<u64> {
        self.start()
            .checked_add(at.offset_from(self.at.guest.start())?)
    }

    fn number(&self, host: u64) -> u64 {
        host.saturating_sub(self.start()) >> self.shift
    }

    /// Whether every page of the stretch is untouched, as far as is known.
    fn untouched(&self, host: u64, len: u64) -> bool {
        let last = self.number(host.saturating_add(len.saturating_sub(1)));
        (self.number(host)..=last)
            .all(|page| !is_set(&self.present, page) && !is_set(&self.removed, page))
    }
}

struct Lazy<S> {
    reader: Arc<CheckpointReader<S>>,
    state: State,
    /// A bit for each chunk that is stored as it is: its checksum was found right.
    verified: Vec<AtomicU64>,
}

fn zeroed(bits: u64) -> Vec<AtomicU64> {
    let words = usize::try_from(bits.div_ceil(64)).unwrap_or(0);
    let mut out = Vec::new();
    out.resize_with(words, AtomicU64::default);
    out
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
        let page_size = checkpoint.info().page_size.bytes();
        let mut known = Vec::new();
        for at in regions {
            let layout = &checkpoint.info().layout;
            let len = at.guest.len();
            let end = (at.host.raw() as u64).checked_add(len);
            let aligned = at.guest.start().raw() & page_size.saturating_sub(1) == 0
                && at.page.is_power_of_two()
                && at.page >= page_size
                && (at.host.raw() as u64) & at.page.saturating_sub(1) == 0
                && len & at.page.saturating_sub(1) == 0;
            if !layout.contains(at.guest.start(), len) || !aligned || end.is_none() {
                return Err(CheckpointError::Layout {
                    at: at.guest.start(),
                });
            }
            let shift = at.page.trailing_zeros();
            known.push(Region {
                at,
                len,
                shift,
                present: zeroed(len >> shift),
                removed: zeroed(len >> shift),
            });
        }
        known.sort_by_key(|region: &Region| region.at.host);
        for pair in known.windows(2) {
            if let [a, b] = pair
                && a.start().saturating_add(a.len) > b.start()
            {
                return Err(CheckpointError::Layout {
                    at: b.at.guest.start(),
                });
            }
        }
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let stop = Arc::new(stop.map_err(failed("eventfd"))?);
        let prefetch = options.prefetch;
        let threads = options.threads.get();
        let state = State {
            uffd,
            regions: known,
            options,
            events: RwLock::new(()),
            stopping: AtomicBool::new(false),
            exited: AtomicBool::new(false),
            prefetched: Mutex::new(false),
            done: Condvar::new(),
            error: Mutex::new(None),
            touched: Mutex::new(Vec::new()),
            stop: Arc::clone(&stop),
            faults: AtomicU64::new(0),
            faulted: AtomicU64::new(0),
            background: AtomicU64::new(0),
            removed: AtomicU64::new(0),
        };
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

/// One thread's own.
struct Worker {
    decoder: ChunkDecoder,
    buffer: Vec<u8>,
}

impl<S: RangeSource> Lazy<S> {
    fn worker(&self) -> Worker {
        Worker {
            decoder: ChunkDecoder::new(self.reader.header_codec()),
            buffer: Vec::new(),
        }
    }

    fn fail(&self, error: CheckpointError) {
        let state = &self.state;
        let mut first = state.error.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert(Arc::new(error));
        drop(first);
        // Under its lock, so that who looks and then waits cannot miss it.
        drop(state.prefetched.lock());
        state.done.notify_all();
    }

    /// Reads one event, and if it gives pages back, notes that before anybody else goes on.
    fn next_event(&self) -> Result<Option<Event>, CheckpointError> {
        let state = &self.state;
        let _alone = state.events.write().unwrap_or_else(PoisonError::into_inner);
        let event = state.uffd.event()?;
        if let Some(Event::Remove(start, end)) = event {
            for region in &state.regions {
                let first = start.max(region.start());
                let last = end.min(region.start().saturating_add(region.len));
                if first >= last {
                    continue;
                }
                let len = last.saturating_sub(first);
                state.removed.fetch_add(len, Ordering::Relaxed);
                let pages =
                    region.number(first)..region.number(last.saturating_sub(1)).saturating_add(1);
                for page in pages {
                    set(&region.removed, page);
                    clear(&region.present, page);
                }
            }
        }
        Ok(event)
    }

    fn fault(&self, worker: &mut Worker, host: u64) -> Result<(), CheckpointError> {
        let state = &self.state;
        state.faults.fetch_add(1, Ordering::Relaxed);
        let Some(region) = state.regions.iter().find(|region| {
            host.checked_sub(region.start())
                .is_some_and(|offset| offset < region.len)
        }) else {
            return Ok(());
        };
        let host = host & !region.at.page.saturating_sub(1);
        let page_size = self.reader.info().page_size;
        if let Some(pfn) = region.gpa(host).map(|at| at.pfn(page_size)) {
            let mut touched = state.touched.lock().unwrap_or_else(PoisonError::into_inner);
            if touched.len() < state.options.record {
                touched.push(pfn);
            }
        }
        loop {
            let placed = if is_set(&region.removed, region.number(host)) {
                self.place_zero(worker, region, host)?
            } else {
                self.bring(worker, region, host)?
            };
            match placed {
                // Somebody was faster, or all is in place and the kernel asks no more while this
                // fault was on its way: who waits may have been woken before it slept.
                Placed::There | Placed::Gone => state.uffd.wake(host, region.at.page),
                Placed::Again(_) => {
                    self.handle_waiting(worker)?;
                    continue;
                }
                Placed::Stale => continue,
                Placed::Done | Placed::Exited => {}
            }
            return Ok(());
        }
    }

    /// Reads events that hold others up; faults among them are served later.
    fn handle_waiting(&self, worker: &mut Worker) -> Result<(), CheckpointError> {
        match self.next_event()? {
            Some(Event::Fault(host)) => self.fault(worker, host),
            Some(_) => Ok(()),
            None => {
                std::thread::yield_now();
                Ok(())
            }
        }
    }

    fn place_zero(
        &self,
        worker: &mut Worker,
        region: &Region,
        host: u64,
    ) -> Result<Placed, CheckpointError> {
        let placed = if region.at.page == self.reader.info().page_size.bytes() {
            self.state.uffd.zero(host, region.at.page)
        } else {
            // Huge pages of hugetlbfs have no zero page to share.
            worker.buffer.clear();
            let len = usize::try_from(region.at.page).unwrap_or(0);
            worker.buffer.resize(len, 0);
            self.state.uffd.copy(host, &worker.buffer)
        }?;
        if placed == Placed::Done {
            set(&region.present, region.number(host));
        }
        Ok(placed)
    }

    /// Brings in the page at `host`, and some of what is stored around it.
    fn bring(
        &self,
        worker: &mut Worker,
        region: &Region,
        host: u64,
    ) -> Result<Placed, CheckpointError> {
        let info = self.reader.info();
        let page = region.at.page;
        let Some(pfn) = region.gpa(host).map(|at| at.pfn(info.page_size)) else {
            return Ok(Placed::Gone);
        };
        if page != info.page_size.bytes() {
            return self.bring_huge(worker, region, host);
        }
        let Some(run) = self.reader.run_of(pfn) else {
            return Ok(Placed::Gone);
        };
        match run.content {
            PageContent::Data { slot } => loop {
                let around = self.around(region, &run, slot, pfn);
                let placed = self.bring_data(worker, region, &around, false)?;
                let first = around.frames.start();
                if placed != Placed::There || first == pfn {
                    return Ok(placed);
                }
                // The first of several was there, and none is brought in then: without it.
                if let Some(host) = first.gpa(info.page_size).and_then(|at| region.host(at)) {
                    set(&region.present, region.number(host));
                }
            },
            other => match other.word().unwrap_or(0) {
                0 => self.place_zero(worker, region, host),
                word => {
                    let len = usize::try_from(page).unwrap_or(0);
                    worker.buffer.resize(len, 0);
                    fill_words(&mut worker.buffer, word);
                    self.put(region, host, &worker.buffer)
                }
            },
        }
    }

    /// The untouched frames around `pfn` that come in with it: of the same run and chunk, inside
    /// an aligned window.
    fn around(&self, region: &Region, run: &PageRun, slot: u64, pfn: Pfn) -> PageRun {
        let info = self.reader.info();
        let shift = info.page_size.shift();
        let window = (self.state.options.around >> shift).max(1);
        let one = PfnRange::with_len(pfn, 1).unwrap_or(run.frames);
        let only = clip(run, one).unwrap_or(*run);
        let wanted = pfn.offset_from(run.frames.start()).unwrap_or(0);
        let Some(chunk) = self.reader.index().chunk_of(slot.saturating_add(wanted)) else {
            return only;
        };
        let start = pfn
            .raw()
            .checked_div(window)
            .unwrap_or(0)
            .saturating_mul(window);
        let aligned = PfnRange::new(Pfn::new(start), Pfn::new(start.saturating_add(window)));
        // The frames of the run whose bytes are in this chunk.
        let first = chunk.first_slot.max(slot).saturating_sub(slot);
        let last = chunk
            .first_slot
            .saturating_add(chunk.pages)
            .saturating_sub(slot);
        let from = run.frames.start().raw();
        let in_chunk = PfnRange::new(
            Pfn::new(from.saturating_add(first)),
            Pfn::new(from.saturating_add(last)),
        );
        let guest = region.at.guest.whole_frames(info.page_size);
        let wide = aligned
            .intersection(&in_chunk)
            .intersection(&run.frames)
            .intersection(&guest);
        let untouched = |pfn: Pfn| {
            pfn.gpa(info.page_size)
                .and_then(|at| region.host(at))
                .is_some_and(|host| region.untouched(host, 1))
        };
        // Outwards from the page, up to the first that is in place.
        let (mut low, mut high) = (one.start(), one.end());
        while low > wide.start()
            && let below = Pfn::new(low.raw().saturating_sub(1))
            && untouched(below)
        {
            low = below;
        }
        while high < wide.end() && untouched(high) {
            high = high.checked_add(1).unwrap_or(wide.end());
        }
        clip(run, PfnRange::new(low, high)).unwrap_or(only)
    }

    /// Puts a run of stored pages, all of one chunk, in place.
    fn bring_data(
        &self,
        worker: &mut Worker,
        region: &Region,
        run: &PageRun,
        background: bool,
    ) -> Result<Placed, CheckpointError> {
        let info = self.reader.info();
        let (PageContent::Data { slot }, Some(at)) =
            (run.content, run.frames.start().gpa(info.page_size))
        else {
            return Ok(Placed::Gone);
        };
        let Some(host) = region.host(at) else {
            return Ok(Placed::Gone);
        };
        let bytes = self.stored(worker, slot, run.frames.len())?;
        let placed = self.put(region, host, bytes)?;
        if placed == Placed::Done {
            let counter = if background {
                &self.state.background
            } else {
                &self.state.faulted
            };
            counter.fetch_add(len64(bytes.len()), Ordering::Relaxed);
        }
        Ok(placed)
    }

    /// Puts bytes in place, unless some of the pages were given back. What takes time, such as
    /// reading and decompressing them, is done before: nobody can be served while this has the
    /// lock.
    fn put(&self, region: &Region, host: u64, bytes: &[u8]) -> Result<Placed, CheckpointError> {
        let state = &self.state;
        let _guard = state.events.read().unwrap_or_else(PoisonError::into_inner);
        let last = host.saturating_add(len64(bytes.len()).saturating_sub(1));
        let pages = region.number(host)..=region.number(last);
        if pages.clone().any(|page| is_set(&region.removed, page)) {
            return Ok(Placed::Stale);
        }
        let placed = state.uffd.copy(host, bytes)?;
        if placed == Placed::Done {
            for page in pages {
                set(&region.present, page);
            }
        }
        Ok(placed)
    }

    /// Stored pages of one chunk. Of a chunk that is stored as it is, and was checked before,
    /// no more than these are read.
    fn stored<'w>(
        &self,
        worker: &'w mut Worker,
        slot: u64,
        count: u64,
    ) -> Result<&'w [u8], CheckpointError> {
        let index = self.reader.index();
        let shift = self.reader.info().page_size.shift();
        if let Some(chunk) = index.chunk_of(slot)
            && chunk.entry.plain
            && is_set(&self.verified, chunk.number)
        {
            let inside = slot.saturating_sub(chunk.first_slot) << shift;
            let offset = chunk.entry.offset.saturating_add(inside);
            let len = usize::try_from(count << shift).unwrap_or(0);
            worker.buffer.resize(len, 0);
            self.reader
                .source()
                .read_at(&mut worker.buffer, offset)
                .map_err(CheckpointError::read(offset))?;
            return Ok(&worker.buffer);
        }
        let pages = worker.decoder.pages(&self.reader, slot, count)?;
        if let Some(chunk) = index.chunk_of(slot) {
            set(&self.verified, chunk.number);
        }
        Ok(pages)
    }

    /// Puts a page in place that is larger than the guest's: all of its frames at once.
    fn bring_huge(
        &self,
        worker: &mut Worker,
        region: &Region,
        host: u64,
    ) -> Result<Placed, CheckpointError> {
        let info = self.reader.info();
        let Some(at) = region.gpa(host) else {
            return Ok(Placed::Gone);
        };
        let frame = usize::try_from(info.page_size.bytes()).unwrap_or(usize::MAX);
        let len = usize::try_from(region.at.page).unwrap_or(0);
        let mut buffer = core::mem::take(&mut worker.buffer);
        buffer.resize(len, 0);
        let mut pfn = at.pfn(info.page_size);
        for out in buffer.chunks_exact_mut(frame) {
            self.reader.page_into(&mut worker.decoder, pfn, out)?;
            pfn = pfn.checked_add(1).unwrap_or(pfn);
        }
        let placed = self.put(region, host, &buffer);
        worker.buffer = buffer;
        let placed = placed?;
        if placed == Placed::Done {
            self.state
                .faulted
                .fetch_add(region.at.page, Ordering::Relaxed);
        }
        Ok(placed)
    }

    /// Brings in all that is stored in `frames`, and is not in place.
    fn fetch(&self, worker: &mut Worker, frames: PfnRange) -> Result<(), CheckpointError> {
        let info = self.reader.info();
        for run in self.reader.runs_in(frames) {
            if run.content.word() == Some(0) {
                continue;
            }
            for ram in ram_of(info, run.frames) {
                let regions = self.state.regions.iter();
                for region in regions.filter(|r| !r.at.guest.intersection(&ram).is_empty()) {
                    let part = region.at.guest.intersection(&ram);
                    self.fetch_in(worker, region, &run, part)?;
                }
            }
        }
        Ok(())
    }

    fn fetch_in(
        &self,
        worker: &mut Worker,
        region: &Region,
        run: &PageRun,
        part: GpaRange,
    ) -> Result<(), CheckpointError> {
        let info = self.reader.info();
        let Some(mut host) = region.host(part.start()) else {
            return Ok(());
        };
        host &= !region.at.page.saturating_sub(1);
        let end = region.host(part.end()).unwrap_or(host);
        while host < end {
            if self.state.stopping.load(Ordering::Acquire)
                || self.state.exited.load(Ordering::Acquire)
            {
                return Ok(());
            }
            let mut next = host.saturating_add(region.at.page);
            let placed = if !region.untouched(host, 1) {
                Placed::There
            } else if let PageContent::Data { slot } = run.content
                && region.at.page == info.page_size.bytes()
                && let Some(pfn) = region.gpa(host).map(|at| at.pfn(info.page_size))
            {
                let wide = self.upwards(region, run, slot, pfn);
                next = host.saturating_add(wide.frames.len() << info.page_size.shift());
                self.bring_data(worker, region, &wide, true)?
            } else {
                self.bring(worker, region, host)?
            };
            match placed {
                Placed::Again(_) => std::thread::yield_now(),
                Placed::Stale => {}
                Placed::Exited => {
                    self.state.exited.store(true, Ordering::Release);
                    return Ok(());
                }
                // One of several was there: page by page then, each tells for itself.
                Placed::There if next > host.saturating_add(region.at.page) => {
                    set(&region.present, region.number(host));
                }
                _ => host = next,
            }
        }
        Ok(())
    }

    /// The untouched frames from `pfn` up, as far as one chunk of the run goes.
    fn upwards(&self, region: &Region, run: &PageRun, slot: u64, pfn: Pfn) -> PageRun {
        let info = self.reader.info();
        let skipped = pfn.offset_from(run.frames.start()).unwrap_or(0);
        let first = slot.saturating_add(skipped);
        let left = self.reader.index().chunk_of(first).map_or(1, |chunk| {
            chunk
                .first_slot
                .saturating_add(chunk.pages)
                .saturating_sub(first)
        });
        let guest = region.at.guest.whole_frames(info.page_size);
        let end = run
            .frames
            .end()
            .min(guest.end())
            .min(pfn.checked_add(left).unwrap_or(pfn));
        let mut high = pfn.checked_add(1).unwrap_or(pfn);
        while high < end
            && high
                .gpa(info.page_size)
                .and_then(|at| region.host(at))
                .is_some_and(|host| region.untouched(host, 1))
        {
            high = high.checked_add(1).unwrap_or(end);
        }
        clip(run, PfnRange::new(pfn, high)).unwrap_or(*run)
    }

    fn all_frames(&self) -> Vec<PfnRange> {
        let page_size = self.reader.info().page_size;
        super::index::covered_frames(&self.reader.info().layout, page_size)
    }
}

impl<S: RangeSource> Service for Lazy<S> {
    fn state(&self) -> &State {
        &self.state
    }

    fn serve(&self) {
        let state = &self.state;
        let mut worker = self.worker();
        while !state.stopping.load(Ordering::Acquire) {
            let mut fds = [
                PollFd::new(&state.uffd, PollFlags::IN),
                PollFd::new(&*state.stop, PollFlags::IN),
            ];
            if poll(&mut fds, None).is_err() {
                continue;
            }
            let [faults, _] = &fds;
            // The process whose faults these were has gone.
            if faults
                .revents()
                .intersects(PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL)
                && !faults.revents().contains(PollFlags::IN)
            {
                return;
            }
            match self.next_event() {
                Ok(Some(Event::Fault(host))) => {
                    if let Err(error) = self.fault(&mut worker, host) {
                        self.fail(error);
                        let page = state
                            .regions
                            .iter()
                            .find(|r| host.checked_sub(r.start()).is_some_and(|o| o < r.len))
                            .map_or(4096, |region| region.at.page);
                        state.uffd.poison(host & !page.saturating_sub(1), page);
                    }
                }
                Ok(_) => {}
                Err(error) => {
                    self.fail(error);
                    return;
                }
            }
        }
    }

    fn prefetch(&self, everything: bool) {
        let state = &self.state;
        let mut worker = self.worker();
        let working_set = state.options.working_set.ranges();
        let rest = if everything {
            self.all_frames()
        } else {
            Vec::new()
        };
        for frames in working_set.iter().chain(&rest) {
            if let Err(error) = self.fetch(&mut worker, *frames) {
                self.fail(error);
                return;
            }
        }
        if !everything || state.stopping.load(Ordering::Acquire) {
            return;
        }
        // What is not in place now reads as zero, which the kernel can do alone.
        for region in &state.regions {
            let _ = state.uffd.unregister(region.start(), region.len);
        }
        let mut done = state
            .prefetched
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *done = true;
        state.done.notify_all();
    }
}
