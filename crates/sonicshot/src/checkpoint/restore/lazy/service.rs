//! The threads that serve page faults.

use super::options::LazyOptions;
use super::region::{Region, clear, is_set, set};
use super::uffd::{Event, Placed, Uffd};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::read::chunk::ChunkDecoder;
use crate::checkpoint::read::reader::CheckpointReader;
use crate::checkpoint::read::source::RangeSource;
use crate::checkpoint::wire::frames::fill_words;
use crate::checkpoint::wire::index::clip;
use crate::checkpoint::wire::info::{PageContent, PageRun};
use crate::checkpoint::wire::layout::{len64, size};
use crate::{MemoryError, Pfn, PfnRange};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock};

/// What the threads do, whatever the source of the checkpoint is.
pub(super) trait Service: Send + Sync {
    fn state(&self) -> &State;
    fn serve(&self);
    fn prefetch(&self, everything: bool);
}

pub(super) struct State {
    pub uffd: Uffd,
    pub regions: Vec<Region>,
    pub options: LazyOptions,
    /// Events are read under the write lock, bytes put in place under the read lock: that a page
    /// was given back is known before any thread could bring its old bytes in again.
    pub events: RwLock<()>,
    pub stopping: AtomicBool,
    /// The process whose memory it is has ended: nobody waits for anything.
    pub exited: AtomicBool,
    pub prefetched: Mutex<bool>,
    pub done: Condvar,
    pub error: Mutex<Option<Arc<CheckpointError>>>,
    pub touched: Mutex<Vec<Pfn>>,
    pub stop: Arc<OwnedFd>,
    pub faults: AtomicU64,
    pub faulted: AtomicU64,
    pub background: AtomicU64,
    pub removed: AtomicU64,
}

pub(super) struct Lazy<S> {
    pub(super) reader: Arc<CheckpointReader<S>>,
    pub(super) state: State,
    /// A bit for each chunk that is stored as it is: its checksum was found right.
    pub(super) verified: Vec<AtomicU64>,
}

impl State {
    pub(super) fn new(
        uffd: Uffd,
        regions: Vec<Region>,
        options: LazyOptions,
        stop: Arc<OwnedFd>,
    ) -> Self {
        Self {
            uffd,
            regions,
            options,
            events: RwLock::new(()),
            stopping: AtomicBool::new(false),
            exited: AtomicBool::new(false),
            prefetched: Mutex::new(false),
            done: Condvar::new(),
            error: Mutex::new(None),
            touched: Mutex::new(Vec::new()),
            stop,
            faults: AtomicU64::new(0),
            faulted: AtomicU64::new(0),
            background: AtomicU64::new(0),
            removed: AtomicU64::new(0),
        }
    }

    fn region_of(&self, host: u64) -> Option<&Region> {
        self.regions.iter().find(|region| region.has(host))
    }
}

/// One thread's own.
pub(super) struct Worker {
    decoder: ChunkDecoder,
    buffer: Vec<u8>,
}

impl<S: RangeSource> Lazy<S> {
    pub(super) fn worker(&self) -> Worker {
        Worker {
            decoder: self.reader.decoder(),
            buffer: Vec::new(),
        }
    }

    pub(super) fn fail(&self, error: CheckpointError) {
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
                let last = end.min(region.end());
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
        let Some(region) = state.region_of(host) else {
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
            worker.buffer.resize(size(region.at.page), 0);
            self.state.uffd.copy(host, &worker.buffer)
        }?;
        if placed == Placed::Done {
            set(&region.present, region.number(host));
        }
        Ok(placed)
    }

    /// Brings in the page at `host`, and some of what is stored around it.
    pub(super) fn bring(
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
            PageContent::Absent
            | PageContent::Zero
            | PageContent::Fill { word: 0 }
            | PageContent::Free { word: 0 } => self.place_zero(worker, region, host),
            PageContent::Fill { word } | PageContent::Free { word } => {
                worker.buffer.resize(size(page), 0);
                fill_words(&mut worker.buffer, word);
                self.put(region, host, &worker.buffer)
            }
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
        let wanted = pfn.offset_from(run.frames.start());
        let wanted = wanted.and_then(|wanted| slot.checked_add(wanted));
        let Some(chunk) = wanted.and_then(|wanted| self.reader.index().chunk_of(wanted).ok())
        else {
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
    pub(super) fn bring_data(
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
        let page_size = self.reader.info().page_size;
        let chunk = self.reader.index().chunk_of(slot)?;
        if chunk.entry.plain && is_set(&self.verified, chunk.number) {
            let inside = chunk.bytes_of(slot, count, page_size)?;
            // A chunk's pages are inside of the file.
            let offset = chunk.entry.offset.saturating_add(len64(inside.start));
            worker.buffer.resize(inside.len(), 0);
            self.reader
                .source()
                .read_at(&mut worker.buffer, offset)
                .map_err(CheckpointError::read(offset))?;
            return Ok(&worker.buffer);
        }
        let pages = self.reader.pages(&mut worker.decoder, slot, count)?;
        set(&self.verified, chunk.number);
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
        let mut buffer = core::mem::take(&mut worker.buffer);
        buffer.resize(size(region.at.page), 0);
        let first = at.pfn(info.page_size);
        for (number, out) in (0..).zip(buffer.chunks_exact_mut(size(info.page_size.bytes()))) {
            let pfn = first.checked_add(number);
            let pfn = pfn.ok_or(MemoryError::NotRam {
                range: region.at.guest,
            })?;
            self.reader.page_into(&mut worker.decoder, pfn, out)?;
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
                        // Outside of them no fault fails.
                        if let Some(region) = state.region_of(host) {
                            let page = region.at.page;
                            state.uffd.poison(host & !page.saturating_sub(1), page);
                        }
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
        self.fetch_all(everything);
    }
}
