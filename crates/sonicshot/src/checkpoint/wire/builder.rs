//! Puts an index together while a checkpoint is written.

use super::disk::{DiskInfo, DiskRun};
use super::index::Index;
use super::info::{PageContent, PageRun};
use super::layout::{
    DISK_RUN_LEN, INDEX_HEAD, INDEX_MAGIC, MAX_RUN, RUN_LEN, SECTION_BLOBS, SECTION_CHUNKS,
    SECTION_DISK_RUNS, SECTION_DISKS, SECTION_LEN, SECTION_NEEDED, SECTION_RUNS, narrow, pad, plus,
};
use super::record::{BlobEntry, ChunkEntry, encode_run};
use crate::checkpoint::CheckpointError;
use crate::to_u64;
use crate::{PfnRange, Tally};

/// Puts an index together while a checkpoint is written.
#[derive(Debug)]
pub(crate) struct IndexBuilder {
    pages_per_chunk: u64,
    runs: Vec<u8>,
    /// Not in `runs` yet: it may grow. And whether it stores pages for the first time.
    last: Option<(PageRun, bool)>,
    chunks: Vec<u8>,
    blobs: Vec<BlobEntry>,
    disks: Vec<u8>,
    disk_runs: Vec<u8>,
    /// Pages stored so far.
    pub slots: u64,
}

impl IndexBuilder {
    pub(crate) fn new(pages_per_chunk: u64) -> Self {
        Self {
            pages_per_chunk,
            runs: Vec::new(),
            last: None,
            chunks: Vec::new(),
            blobs: Vec::new(),
            disks: Vec::new(),
            disk_runs: Vec::new(),
            slots: 0,
        }
    }

    /// Adds the disks that pages are on.
    pub(crate) fn set_disks(&mut self, disks: &[DiskInfo]) -> Result<(), CheckpointError> {
        self.disks.clear();
        disks
            .iter()
            .try_for_each(|disk| disk.encode(&mut self.disks))
    }

    /// Adds a run on a disk. Returns its number.
    pub(crate) fn push_disk_run(&mut self, run: &DiskRun) -> u64 {
        let number = to_u64(self.disk_runs.len() / DISK_RUN_LEN);
        run.encode(&mut self.disk_runs);
        number
    }

    /// One with the runs of another, to which the same chunks are added again.
    pub(crate) fn again(index: &Index) -> Self {
        Self {
            runs: index.run_bytes().to_vec(),
            slots: index.slots,
            disks: index.disk_bytes().to_vec(),
            disk_runs: index.disk_run_bytes().to_vec(),
            // Nothing is joined any more.
            ..Self::new(0)
        }
    }

    /// Adds the run of pages that comes next. `stores` says that its data is stored for the
    /// first time, not referred to again.
    pub(crate) fn push(&mut self, run: PageRun, stores: bool) -> Result<(), CheckpointError> {
        if let Some((last, last_stores)) = &mut self.last
            && *last_stores == stores
            && self.pages_per_chunk > 0
            && let Some(joined) = join(last, &run, stores, self.pages_per_chunk)
        {
            *last = joined;
            return Ok(());
        }
        self.flush()?;
        self.last = Some((run, stores));
        Ok(())
    }

    fn flush(&mut self) -> Result<(), CheckpointError> {
        if let Some((run, _)) = self.last.take() {
            encode_run(&run, &mut self.runs)?;
        }
        Ok(())
    }

    /// The number of runs so far.
    pub(crate) fn run_count(&self) -> u64 {
        let last = u64::from(self.last.is_some());
        // No more than there are bytes of memory for them.
        Tally::new(to_u64(self.runs.len() / RUN_LEN))
            .and(last)
            .get()
    }

    pub(crate) fn push_chunk(&mut self, chunk: &ChunkEntry) {
        chunk.encode(&mut self.chunks);
    }

    pub(crate) fn has_blob(&self, name: &str) -> bool {
        self.blobs.iter().any(|blob| blob.name == name)
    }

    pub(crate) fn push_blob(&mut self, blob: BlobEntry) {
        self.blobs.push(blob);
    }

    /// The index as it stands in the file.
    pub(crate) fn encode(mut self) -> Result<Vec<u8>, CheckpointError> {
        self.flush()?;
        let mut blobs = Vec::new();
        for blob in &self.blobs {
            blob.encode(&mut blobs)?;
        }
        let mut sections = vec![
            (SECTION_RUNS, &self.runs),
            (SECTION_CHUNKS, &self.chunks),
            (SECTION_BLOBS, &blobs),
        ];
        if !self.disks.is_empty() {
            sections.push((SECTION_DISKS, &self.disks));
            sections.push((SECTION_DISK_RUNS, &self.disk_runs));
        }
        let count: u32 = narrow("sections", to_u64(sections.len()), u32::MAX.into())?;
        let mut out = Vec::with_capacity(self.runs.len());
        out.extend(INDEX_MAGIC);
        out.extend(count.to_le_bytes());
        out.extend([0; 4]);
        out.extend(self.slots.to_le_bytes());
        out.extend([0; 8]);
        let mut at = to_u64(INDEX_HEAD);
        for _ in &sections {
            at = plus("bytes of index", at, to_u64(SECTION_LEN))?;
        }
        for (kind, bytes) in &sections {
            out.extend(kind.to_le_bytes());
            out.extend(SECTION_NEEDED.to_le_bytes());
            out.extend(at.to_le_bytes());
            out.extend(to_u64(bytes.len()).to_le_bytes());
            at = plus(
                "bytes of index",
                at,
                to_u64(bytes.len().next_multiple_of(8)),
            )?;
        }
        for (_, bytes) in sections {
            out.extend(bytes);
            pad(&mut out, 8);
        }
        Ok(out)
    }
}

/// Both runs as one, if that says the same.
fn join(last: &PageRun, next: &PageRun, stores: bool, pages_per_chunk: u64) -> Option<PageRun> {
    if last.class != next.class || last.frames.end() != next.frames.start() {
        return None;
    }
    match (last.content, next.content) {
        (PageContent::Data { slot }, PageContent::Data { slot: next_slot }) => {
            if slot.checked_add(last.frames.len()) != Some(next_slot) {
                return None;
            }
            let end = next_slot.checked_add(next.frames.len())?.checked_sub(1)?;
            let chunk = |slot: u64| slot.checked_div(pages_per_chunk);
            // What refers to stored pages again stays inside one chunk, so that a restore
            // finds it by the chunk.
            if !stores && chunk(slot) != chunk(end) {
                return None;
            }
        }
        (a, b) if a == b => {}
        _ => return None,
    }
    let frames = PfnRange::new(last.frames.start(), next.frames.end());
    (frames.len() <= MAX_RUN).then_some(PageRun { frames, ..*last })
}
