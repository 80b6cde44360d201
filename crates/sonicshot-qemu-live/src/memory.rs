//! The memory of a guest whose QEMU runs: read as it is asked for, and kept as it was read.

use crate::error::QemuError;
use crate::find::Segment;
use crate::shadow::{BLOCK, Hole, PAGE, Shadow};
use sonicshot::work::for_each_told;
use sonicshot::{
    Gpa, GpaRange, GuestMemory, Mapped, MemoryError, Processor, Processors, Progress, RamLayout,
    Tally, to_u64,
};
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The amount that is read around bytes that are asked for, in pages: 64 KiB. A kernel's records lie
/// close
/// together, and a call to the system costs as much as copying that.
const AROUND: usize = 16;

/// The guest's RAM. What is read of it is read once, so that two who look at one page see the same,
/// until [`clear`](Self::clear).
pub(crate) struct LiveMemory {
    layout: RamLayout,
    /// By their place in the guest.
    segments: Vec<Shadowed>,
    shadow: Shadow,
    processors: Processors,
    /// Nothing is read any more: the guest has run on.
    closed: AtomicBool,
}

/// A segment, and where the shadow has it.
struct Shadowed {
    segment: Segment,
    /// In bytes; a multiple of a block.
    at: usize,
    len: usize,
}

fn backend(range: GpaRange, what: &'static str) -> MemoryError {
    MemoryError::Backend {
        range,
        source: what.into(),
    }
}

impl LiveMemory {
    /// The guest whose RAM is `segments`.
    pub(crate) fn new(segments: Vec<Segment>) -> Result<Self, QemuError> {
        let layout = RamLayout::new(segments.iter().map(|one| one.range).collect())?;
        let mut all = Vec::new();
        let mut at = 0_usize;
        let too_large = || QemuError::not_this("the guest has more RAM than fits this process");
        for segment in segments {
            let len = usize::try_from(segment.range.len()).map_err(|_| too_large())?;
            all.push(Shadowed { segment, at, len });
            let end = at.checked_add(len).ok_or_else(too_large)?;
            at = end.checked_next_multiple_of(BLOCK).ok_or_else(too_large)?;
        }
        all.sort_by_key(|one| one.segment.range.start());
        let shadow =
            Shadow::new(at).map_err(QemuError::system("making room for a copy of the guest"))?;
        Ok(Self {
            layout,
            segments: all,
            shadow,
            processors: Processors::Unknown,
            closed: AtomicBool::new(false),
        })
    }

    /// Forgets what was read, and takes these as the guest's processors.
    pub(crate) fn clear(&mut self, processors: Vec<Processor>) {
        self.shadow.clear();
        self.processors = Processors::Known(processors);
    }

    /// From now on nothing is read that was not read before.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    /// The pages of the shadow that were read.
    pub(crate) fn touched(&self) -> Vec<Range<usize>> {
        self.shadow.filled()
    }

    /// These ranges of the guest, as pages of the shadow.
    pub(crate) fn pages(&self, ranges: impl IntoIterator<Item = GpaRange>) -> Vec<Range<usize>> {
        let mut out = Vec::new();
        for range in ranges {
            for one in &self.segments {
                let part = one.segment.range.intersection(&range);
                if let Some(place) = one.place(&part) {
                    out.push(place.start / PAGE..place.end.div_ceil(PAGE));
                }
            }
        }
        out
    }

    /// Has these pages, which are in their order, ready to be read, and room for them.
    pub(crate) fn prepare(&self, pages: &[Range<usize>]) {
        let bytes = |pages: &Range<usize>| {
            let ends = pages
                .start
                .checked_mul(PAGE)
                .zip(pages.end.checked_mul(PAGE));
            ends.map(|(start, end)| start..end)
        };
        // Beyond all memory there is nothing to prepare.
        let all: Vec<Range<usize>> = pages.iter().filter_map(bytes).collect();
        all.iter().for_each(|bytes| self.shadow.prepare(bytes));
        for one in &self.segments {
            let of_block = all.iter().filter_map(|bytes| one.of_block(bytes));
            one.segment.backing.prepare(of_block);
        }
    }

    /// Reads these pages, on all cores, as long as `go_on` says so; whether all were read.
    pub(crate) fn load(
        &self,
        pages: &[Range<usize>],
        threads: NonZeroUsize,
        go_on: &(dyn Fn() -> bool + Sync),
    ) -> Result<bool, MemoryError> {
        self.load_told(pages, threads, go_on, &None)
    }

    /// The same; `progress` is told of the bytes.
    pub(crate) fn load_told(
        &self,
        pages: &[Range<usize>],
        threads: NonZeroUsize,
        go_on: &(dyn Fn() -> bool + Sync),
        progress: &dyn Progress,
    ) -> Result<bool, MemoryError> {
        let stopped = AtomicBool::new(false);
        let (loaded, total) = (AtomicU64::new(0), bytes_of(pages));
        for_each_told(
            threads,
            by_block(pages),
            |_| progress.tell(loaded.load(Ordering::Relaxed), total),
            || (),
            |(), (block, pages)| {
                if stopped.load(Ordering::Relaxed) || !go_on() {
                    stopped.store(true, Ordering::Relaxed);
                    return Ok(());
                }
                self.fill(block, &pages)?;
                loaded.fetch_add(bytes_of(&pages), Ordering::Relaxed);
                Ok(())
            },
        )?;
        let all = !stopped.into_inner();
        if all {
            progress.tell(total, total);
        }
        Ok(all)
    }

    /// The bytes of memory that a copy of these pages takes beside what is taken already.
    pub(crate) fn missing(&self, pages: &[Range<usize>]) -> u64 {
        let missing = pages.iter().map(|pages| self.shadow.missing(pages));
        missing.sum::<Tally>().times(to_u64(PAGE)).get()
    }

    /// The bytes of memory that the copy has taken so far.
    pub(crate) fn taken(&self) -> u64 {
        Tally::new(self.shadow.resident()).times(to_u64(PAGE)).get()
    }

    /// Reads pages of one block of the shadow.
    fn fill(&self, block: usize, pages: &[Range<usize>]) -> Result<(), MemoryError> {
        let at = block.checked_mul(BLOCK);
        let owner = at.and_then(|at| self.segments.iter().find(|one| one.holds(at)));
        let Some((owner, end)) = owner.and_then(|owner| Some((owner, owner.end()?))) else {
            return Ok(());
        };
        let range = owner.segment.range;
        // Behind its end there is nothing to read.
        let end = end.div_ceil(PAGE);
        let clipped: Vec<_> = pages
            .iter()
            .map(|pages| pages.start..pages.end.min(end))
            .filter(|pages| !pages.is_empty())
            .collect();
        self.shadow.fill(block, &clipped, |holes| {
            if self.closed.load(Ordering::Acquire) {
                return Err(backend(range, "it was not read before the guest ran on"));
            }
            let segment = &owner.segment;
            let read = segment.backing.fill(segment.offset, owner.at, holes);
            read.map_err(|source| MemoryError::Io { range, source })
        })
    }

    /// The range of the shadow that has `len` bytes from `at`, of one segment.
    fn find(&self, range: &GpaRange) -> Option<(&Shadowed, Range<usize>)> {
        let above = self
            .segments
            .partition_point(|one| one.segment.range.start() <= range.start());
        let one = self.segments.get(above.checked_sub(1)?)?;
        if one.segment.range.intersection(range) != *range {
            return None;
        }
        Some((one, one.place(range)?))
    }

    /// Reads the pages of these bytes, and some around them.
    fn need(&self, one: &Shadowed, bytes: &Range<usize>) -> Result<(), MemoryError> {
        if self.shadow.has(bytes) {
            return Ok(());
        }
        let exact = bytes.start / PAGE..bytes.end.div_ceil(PAGE);
        let around = if self.closed.load(Ordering::Acquire) {
            exact
        } else {
            let first = one.at / PAGE;
            let last = one.end().map(|end| end.div_ceil(PAGE));
            let start = (exact.start & !(AROUND - 1)).max(first);
            let end = exact.end.next_multiple_of(AROUND);
            start..last.map_or(exact.end, |last| end.min(last))
        };
        by_block(&[around]).try_for_each(|(block, pages)| self.fill(block, &pages))
    }

    fn whole(&self, at: Gpa, len: usize) -> Result<GpaRange, MemoryError> {
        let none = GpaRange::new(at, at);
        let len = u64::try_from(len).map_err(|_| MemoryError::NotRam { range: none })?;
        let range = GpaRange::with_len(at, len).ok_or(MemoryError::NotRam { range: none })?;
        if !self.layout.contains(at, len) {
            return Err(MemoryError::NotRam { range });
        }
        Ok(range)
    }
}

impl Shadowed {
    fn holds(&self, at: usize) -> bool {
        let inside = at.checked_sub(self.at);
        inside.is_some_and(|inside| inside < self.len)
    }

    /// Its end in the shadow.
    fn end(&self) -> Option<usize> {
        self.at.checked_add(self.len)
    }

    /// The part of these bytes of the shadow that is this segment's, as bytes of its block.
    fn of_block(&self, bytes: &Range<usize>) -> Option<Range<u64>> {
        let end = self.end()?;
        let (start, end) = (bytes.start.max(self.at), bytes.end.min(end));
        let place = |at: usize| {
            let inside = u64::try_from(at.checked_sub(self.at)?).ok()?;
            self.segment.offset.checked_add(inside)
        };
        (start < end).then_some(place(start)?..place(end)?)
    }

    /// The range of the shadow that has a part of this segment.
    fn place(&self, part: &GpaRange) -> Option<Range<usize>> {
        if part.is_empty() {
            return None;
        }
        let inside = part.start().offset_from(self.segment.range.start())?;
        let start = self.at.checked_add(usize::try_from(inside).ok()?)?;
        let end = start.checked_add(usize::try_from(part.len()).ok()?)?;
        Some(start..end)
    }
}

/// The memory of a guest that stays paused: what was not read yet is read where it is wanted, and not
/// kept.
pub(crate) struct AsItIs<'a>(pub(crate) &'a LiveMemory);

impl GuestMemory for AsItIs<'_> {
    fn layout(&self) -> &RamLayout {
        self.0.layout()
    }

    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        if self.0.read_once(at, buf)? {
            return Ok(());
        }
        self.0.read(at, buf)
    }

    fn map(&self, at: Gpa, len: usize) -> Result<Option<Mapped<'_>>, MemoryError> {
        let range = self.0.whole(at, len)?;
        let found = self.0.find(&range).filter(|_| !range.is_empty());
        Ok(found.and_then(|(_, bytes)| self.0.shadow.get(&bytes).map(Mapped::borrowed)))
    }

    fn processors(&self) -> Processors {
        self.0.processors()
    }
}

/// The bytes of these pages.
pub(crate) fn bytes_of(pages: &[Range<usize>]) -> u64 {
    let pages = pages.iter().map(|pages| to_u64(pages.len()));
    pages.sum::<Tally>().times(to_u64(PAGE)).get()
}

/// Ranges of pages, in their order, as those of each block.
fn by_block(
    pages: &[Range<usize>],
) -> impl Iterator<Item = (usize, Vec<Range<usize>>)> + Send + '_ {
    const PAGES: usize = BLOCK / PAGE;
    let mut parts = pages
        .iter()
        .flat_map(|range| {
            let blocks = range.start / PAGES..range.end.div_ceil(PAGES);
            blocks.map_while(move |block| {
                let first = block.checked_mul(PAGES)?;
                let end = first.checked_add(PAGES)?;
                Some((block, range.start.max(first)..range.end.min(end)))
            })
        })
        .filter(|(_, range)| !range.is_empty())
        .peekable();
    std::iter::from_fn(move || {
        let (block, range) = parts.next()?;
        let mut of_block = vec![range];
        while let Some((_, range)) = parts.next_if(|(next, _)| *next == block) {
            of_block.push(range);
        }
        Some((block, of_block))
    })
}

impl GuestMemory for LiveMemory {
    fn layout(&self) -> &RamLayout {
        &self.layout
    }

    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        let range = self.whole(at, buf.len())?;
        let lost = || backend(range, "what was read is gone");
        let (mut at, mut rest) = (at, buf);
        // Of a range over several segments one after the other.
        while !rest.is_empty() {
            let one = self
                .segments
                .iter()
                .find(|one| one.segment.range.contains(at));
            let one = one.ok_or(MemoryError::NotRam { range })?;
            let part = GpaRange::new(at, range.end()).intersection(&one.segment.range);
            let bytes = one.place(&part).ok_or_else(lost)?;
            self.need(one, &bytes)?;
            let (now, later) = rest.split_at_mut_checked(bytes.len()).ok_or_else(lost)?;
            let copied = self
                .shadow
                .get(&bytes)
                .is_some_and(|from| from.copy_to(now));
            if !copied {
                return Err(lost());
            }
            (at, rest) = (part.end(), later);
        }
        Ok(())
    }

    fn map(&self, at: Gpa, len: usize) -> Result<Option<Mapped<'_>>, MemoryError> {
        let range = self.whole(at, len)?;
        if range.is_empty() {
            return Ok(None);
        }
        let Some((one, bytes)) = self.find(&range) else {
            return Ok(None);
        };
        self.need(one, &bytes)?;
        Ok(self.shadow.get(&bytes).map(Mapped::borrowed))
    }

    fn read_once(&self, at: Gpa, buf: &mut [u8]) -> Result<bool, MemoryError> {
        let range = self.whole(at, buf.len())?;
        let Some((one, bytes)) = self.find(&range) else {
            return Ok(false);
        };
        // What was read before is seen as it was.
        if self.closed.load(Ordering::Acquire) || self.shadow.has(&bytes) {
            return Ok(false);
        }
        let (segment, hole) = (&one.segment, bytes.start);
        let read = segment.backing.fill(
            segment.offset,
            one.at,
            &mut [Hole {
                at: hole,
                bytes: buf,
            }],
        );
        read.map_err(|source| MemoryError::Io { range, source })?;
        Ok(true)
    }

    fn processors(&self) -> Processors {
        self.processors.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::{AsItIs, LiveMemory, by_block};
    use crate::find::Segment;
    use crate::process::Backing;
    use crate::sealed::Sealed;
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
    use sonicshot::{Gpa, GpaRange, GuestMemory, PageSize};
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;

    /// Two segments that touch, and one that does not: in one file, in another order.
    fn memory(file: &std::fs::File) -> LiveMemory {
        let segment = |start: u64, end: u64, offset: u32| Segment {
            range: GpaRange::new(Gpa::new(start << 12), Gpa::new(end << 12)),
            offset: u64::from(offset) << 12,
            backing: Backing::File {
                sealed: Sealed::new(file).map(Arc::new),
                file: Arc::new(file.try_clone().unwrap()),
                offset: 0,
            },
        };
        let segments = vec![
            segment(4096, 4106, 0),
            segment(0, 700, 10),
            segment(700, 900, 710),
        ];
        LiveMemory::new(segments).unwrap()
    }

    #[test]
    fn the_guest_reads_as_its_file() {
        reads_as(&tempfile::tempfile().unwrap());
        let flags = MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC;
        let file = std::fs::File::from(memfd_create("guest", flags).unwrap());
        file.set_len(910 << 12).unwrap();
        fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
        assert!(Sealed::new(&file).is_some());
        reads_as(&file);
    }

    fn reads_as(file: &std::fs::File) {
        for page in 0..910_u64 {
            file.write_all_at(&[u8::try_from(page % 251).unwrap(); 4096], page << 12)
                .unwrap();
        }
        let memory = &mut memory(file);
        memory.prepare(&[0..300, 350..1500]);
        let layout = memory.layout().clone();
        assert_eq!(layout.regions().len(), 2);
        let expected = |page: u64| {
            let page = if page >= 4096 { page - 4096 } else { page + 10 };
            u8::try_from(page % 251).unwrap()
        };
        for frames in layout.frames(PageSize::SIZE_4K) {
            for pfn in frames.iter().step_by(13) {
                let byte = expected(pfn.raw());
                let at = pfn.gpa(PageSize::SIZE_4K).unwrap();
                assert_eq!(memory.read_u64(at).unwrap(), u64::from_le_bytes([byte; 8]));
            }
        }
        // Over the seam: read, and not mapped.
        let seam = Gpa::new((700 << 12) - 4);
        let mut bytes = [0; 8];
        memory.read(seam, &mut bytes).unwrap();
        let (before, after) = (expected(699), expected(700));
        assert_eq!(
            bytes,
            [before, before, before, before, after, after, after, after]
        );
        assert!(memory.map(seam, 8).unwrap().is_none());
        assert!(memory.map(Gpa::new(5), 3 << 20).unwrap().is_none());
        assert!(memory.map(Gpa::new(5), 2 << 20).unwrap().is_some());
        // Beyond it.
        assert!(memory.read(Gpa::new((900 << 12) - 1), &mut [0; 2]).is_err());
        assert!(memory.read(Gpa::new(u64::MAX), &mut [0; 2]).is_err());
        sonicshot_testkit::check_memory(memory, &|at, buf| {
            for (index, byte) in (0_u64..).zip(buf) {
                *byte = expected((at.raw() + index) >> 12);
            }
        });
        // What was read stays as it was, until it is forgotten.
        file.write_all_at(&[255; 4096], 20 << 12).unwrap();
        assert_eq!(memory.read_u32(Gpa::new(10 << 12)).unwrap(), 0x1414_1414);
        memory.clear(Vec::new());
        assert_eq!(memory.read_u32(Gpa::new(10 << 12)).unwrap(), u32::MAX);
    }

    #[test]
    fn behind_its_end_nothing_is_read() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![7; 910 << 12], 0).unwrap();
        let memory = &mut memory(&file);
        let kept = GpaRange::new(Gpa::new(3 << 12), Gpa::new(9 << 12));
        let pages = memory.pages([kept]);
        assert_eq!(pages.iter().map(ExactSizeIterator::len).sum::<usize>(), 6);
        let threads = std::num::NonZeroUsize::MIN;
        memory.prepare(&pages);
        assert!(!memory.load(&pages, threads, &|| false).unwrap());
        assert!(memory.load(&pages, threads, &|| true).unwrap());
        assert_eq!(memory.touched(), pages);
        memory.close();
        assert_eq!(memory.read_u32(Gpa::new(3 << 12)).unwrap(), 0x0707_0707);
        let error = memory.read_u32(Gpa::new(9 << 12)).unwrap_err();
        assert!(
            matches!(error, sonicshot::MemoryError::Backend { .. }),
            "{error:?}"
        );
    }

    #[test]
    fn what_is_read_once_is_not_kept() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![7; 910 << 12], 0).unwrap();
        let memory = &mut memory(&file);
        let (at, mut buf) = (Gpa::new(5), vec![0; 2 << 20]);
        assert!(memory.read_once(at, &mut buf).unwrap());
        assert_eq!(buf, vec![7; 2 << 20]);
        assert!(memory.touched().is_empty());
        // Over a seam, beyond it, or once it was read as ever.
        assert!(
            !memory
                .read_once(Gpa::new((700 << 12) - 1), &mut [0; 2])
                .unwrap()
        );
        assert!(
            memory
                .read_once(Gpa::new((900 << 12) - 1), &mut [0; 2])
                .is_err()
        );
        assert_eq!(memory.read_u32(at).unwrap(), 0x0707_0707);
        assert!(!memory.read_once(at, &mut [0; 8]).unwrap());
        assert!(memory.read_once(at, &mut [0; 70_000]).unwrap());
        memory.close();
        assert!(!memory.read_once(at, &mut [0; 70_000]).unwrap());
    }

    #[test]
    fn a_guest_that_stays_paused_is_not_copied() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![7; 910 << 12], 0).unwrap();
        let memory = memory(&file);
        let paused = AsItIs(&memory);
        let all = 0..910;
        let pages = std::slice::from_ref(&all);
        assert_eq!(memory.missing(pages), 910 << 12);
        let mut buf = vec![0; 700 << 12];
        paused.read(Gpa::ZERO, &mut buf).unwrap();
        assert_eq!(buf, vec![7; 700 << 12]);
        assert!(paused.map(Gpa::ZERO, 4096).unwrap().is_none());
        assert_eq!(memory.missing(pages), 910 << 12);
        // What the analysis has read is seen as it was.
        assert_eq!(memory.read_u32(Gpa::ZERO).unwrap(), 0x0707_0707);
        let left = memory.missing(pages);
        assert!(left < 910 << 12 && left > 800 << 12, "{left}");
        file.write_all_at(&[9; 4096], 10 << 12).unwrap();
        assert!(paused.map(Gpa::ZERO, 4096).unwrap().is_some());
        assert_eq!(paused.read_u32(Gpa::ZERO).unwrap(), 0x0707_0707);
        let place = |at, len| memory.find(&GpaRange::with_len(Gpa::new(at), len).unwrap());
        assert!(place(0, 700 << 12).is_some());
        file.write_all_at(&[7; 4096], 10 << 12).unwrap();
        sonicshot_testkit::check_memory(&paused, &|_, buf| buf.fill(7));
    }

    #[test]
    fn pages_are_parted_by_blocks() {
        let found: Vec<_> = by_block(&[3..4, 10..600, 1024..1025]).collect();
        assert_eq!(found[0], (0, vec![3..4, 10..512]));
        let parts: Vec<_> = found
            .iter()
            .map(|(block, pages)| (*block, pages.len()))
            .collect();
        assert_eq!(parts, [(0, 2), (1, 1), (2, 1)]);
    }
}
