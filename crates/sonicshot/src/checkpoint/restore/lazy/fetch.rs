//! Brings in pages before they are asked for.

use super::region::{Region, set};
use super::service::{Lazy, Worker};
use super::uffd::Placed;
use crate::checkpoint::CheckpointError;
use crate::checkpoint::read::source::RangeSource;
use crate::checkpoint::wire::frames::{covered_frames, ram_of};
use crate::checkpoint::wire::index::clip;
use crate::checkpoint::wire::info::{PageContent, PageRun};
use crate::{GpaRange, MemoryError, Pfn, PfnRange};
use core::sync::atomic::Ordering;
use std::sync::PoisonError;

impl<S: RangeSource> Lazy<S> {
    /// Brings in the working set, or everything, until it is told to stop.
    pub(super) fn fetch_all(&self, everything: bool) {
        let state = &self.state;
        let mut worker = self.worker();
        let working_set = state.options.working_set.ranges();
        let info = self.reader.info();
        let rest = if everything {
            covered_frames(&info.layout, info.page_size)
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

    /// Brings in all that is stored in `frames`, and is not in place.
    fn fetch(&self, worker: &mut Worker, frames: PfnRange) -> Result<(), CheckpointError> {
        let info = self.reader.info();
        for run in self.reader.runs_in(frames) {
            if run.content.word() == Some(0) {
                continue;
            }
            for ram in ram_of(info, run.frames)? {
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
        let ends = region.host(part.start()).zip(region.host(part.end()));
        let (start, end) = ends.ok_or(MemoryError::NotRam { range: part })?;
        let mut host = start & !region.at.page.saturating_sub(1);
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
        // What is in no chunk is told by who reads it.
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
}
