//! Checks a checkpoint: against its own checksums, and against the memory that it was made of.

use super::chunk::ChunkDecoder;
use super::reader::CheckpointReader;
use super::source::RangeSource;
use crate::checkpoint::CheckpointError;
use crate::checkpoint::wire::footer::{Footer, footer_at};
use crate::checkpoint::wire::frames::{read_frames, same_layout};
use crate::checkpoint::wire::info::{PageContent, PageRun};
use crate::checkpoint::wire::layout::{behind, size, too_large};
use crate::to_u64;
use crate::work::for_each_told;
use crate::{FileOffset, GuestMemory, PfnRange, Progress, Tally, WorkOptions, WorkPhase};
use core::sync::atomic::{AtomicU64, Ordering};
use twox_hash::XxHash3_128;

/// Runs that a thread takes at once: most are short.
const RUNS: usize = 64;
/// Frames that are compared at once.
const FRAMES: u64 = 64;

impl<S: RangeSource> CheckpointReader<S> {
    /// Checks everything: the digest of the whole file, and that every chunk and blob is what
    /// its checksum says and decompresses.
    ///
    /// # Errors
    /// [`CheckpointError`] of the first damage in the file.
    pub fn verify(&self, options: &WorkOptions) -> Result<(), CheckpointError>
    where
        S: Sync,
    {
        let progress = &options.progress;
        progress.begin(WorkPhase::Checking);
        let mut digest = XxHash3_128::new();
        let footer_at = footer_at(self.footer.file_len)?;
        let covered = behind(footer_at, Footer::digested_len())?.raw();
        let mut done = Tally::ZERO;
        // Every byte is read once for the digest and once for its own checksum.
        let total = Tally::new(covered).times(2).get();
        self.each_part(FileOffset::ZERO, covered, &mut |bytes| {
            digest.write(bytes);
            done.add(to_u64(bytes.len()));
            progress.tell(done.get(), total);
            Ok(())
        })?;
        for blob in &self.index.blobs {
            self.check_blob(blob, &mut |_| Ok(()))?;
        }
        let count = self.index.chunk_count();
        for_each_told(
            options.thread_count(),
            0..count,
            |done| {
                let chunk = u64::from(self.chunk_size());
                let all = done == count;
                let done = Tally::new(done).times(chunk).up_to(covered);
                let done = if all { covered } else { done };
                progress.tell(Tally::new(covered).and(done).get(), total);
            },
            || self.decoder(),
            |decoder, number| {
                let chunk = self.index.chunk(number)?;
                decoder.load(&self.source, &chunk).map(drop)
            },
        )?;
        progress.tell(total, total);
        // Last, so that damage is told by its place where it has one.
        let computed = digest.finish_128();
        if computed == self.footer.digest {
            return Ok(());
        }
        Err(CheckpointError::Checksum {
            what: "the whole file",
            offset: FileOffset::ZERO,
            stored: self.footer.digest,
            computed,
        })
    }

    /// Compares every page that is not left out with the memory it came from. Returns how many
    /// pages were compared.
    ///
    /// # Errors
    /// [`CheckpointError::Differs`] at the first frame that differs, or why one of both cannot
    /// be read.
    pub fn verify_against(
        &self,
        memory: &dyn GuestMemory,
        options: &WorkOptions,
    ) -> Result<u64, CheckpointError>
    where
        S: Sync,
    {
        same_layout(&self.header.info.layout, memory.layout())?;
        let compared = AtomicU64::new(0);
        let count = self.index.run_count();
        let page = self.header.info.page_size.bytes();
        let (seen, total) = (AtomicU64::new(0), self.header.info.layout.bytes());
        options.progress.begin(WorkPhase::Comparing);
        // A page at an end of RAM may be part of it.
        let tell = |pages| {
            let done = Tally::new(pages).times(page).up_to(total);
            options.progress.tell(done, total);
        };
        for_each_told(
            options.thread_count(),
            (0..count).step_by(RUNS),
            |_| tell(seen.load(Ordering::Relaxed)),
            || (self.decoder(), [Vec::new(), Vec::new()]),
            |(decoder, buffers), first| {
                for number in (first..count).take(RUNS) {
                    let run = self.index.run(number)?;
                    seen.fetch_add(run.frames.len(), Ordering::Relaxed);
                    let left_out =
                        matches!(run.content, PageContent::Free { .. } | PageContent::Absent);
                    if !left_out {
                        self.compare(decoder, buffers, memory, &run)?;
                        compared.fetch_add(run.frames.len(), Ordering::Relaxed);
                    }
                }
                Ok::<_, CheckpointError>(())
            },
        )?;
        options.progress.tell(total, total);
        Ok(compared.into_inner())
    }

    fn compare(
        &self,
        decoder: &mut ChunkDecoder,
        buffers: &mut [Vec<u8>; 2],
        memory: &dyn GuestMemory,
        run: &PageRun,
    ) -> Result<(), CheckpointError> {
        let mut rest = run.frames;
        while !rest.is_empty() {
            if run.content.word() == Some(0) {
                rest = self.behind_known_zeroes(memory, rest);
            }
            let end = rest.start().checked_add(FRAMES).unwrap_or(rest.end());
            let frames = PfnRange::new(rest.start(), end.min(rest.end()));
            self.compare_frames(decoder, buffers, memory, frames)?;
            rest = PfnRange::new(frames.end(), rest.end());
        }
        Ok(())
    }

    /// The zero frames in `rest` without those that the source knows to be zero: they need not be read.
    fn behind_known_zeroes(&self, memory: &dyn GuestMemory, rest: PfnRange) -> PfnRange {
        let info = &self.header.info;
        let page_size = info.page_size;
        let start = rest.start();
        let whole = start
            .gpa(page_size)
            .filter(|at| info.layout.contains(*at, page_size.bytes()));
        let known = whole.and_then(|at| match memory.next_data(at) {
            Some(data) => Some(data.start().pfn(page_size)),
            None => {
                let region = info.layout.region_of(at)?;
                Some(region.whole_frames(page_size).end())
            }
        });
        PfnRange::new(known.map_or(start, |known| known.max(start)), rest.end())
    }

    fn compare_frames(
        &self,
        decoder: &mut ChunkDecoder,
        [ours, theirs]: &mut [Vec<u8>; 2],
        memory: &dyn GuestMemory,
        frames: PfnRange,
    ) -> Result<(), CheckpointError> {
        let page_size = self.header.info.page_size;
        let page = size(page_size.bytes());
        // At most `FRAMES` of them.
        let bytes = frames.len().checked_mul(page_size.bytes());
        let most = too_large("a frame", frames.end().raw(), u64::MAX);
        let len = size(bytes.ok_or(most)?);
        theirs.resize(len, 0);
        ours.resize(len, 0);
        read_frames(memory, &self.header.info, frames, theirs)?;
        for (pfn, out) in frames.iter().zip(ours.chunks_exact_mut(page)) {
            self.page_into(decoder, pfn, out)?;
        }
        let pages = ours.chunks_exact(page).zip(theirs.chunks_exact(page));
        for (pfn, (ours, theirs)) in frames.iter().zip(pages) {
            if ours == theirs {
                continue;
            }
            for (byte, (found, expected)) in (0..).zip(ours.iter().zip(theirs)) {
                if found != expected {
                    return Err(CheckpointError::Differs {
                        pfn,
                        byte,
                        found: *found,
                        expected: *expected,
                    });
                }
            }
        }
        Ok(())
    }
}
