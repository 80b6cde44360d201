//! Frames, and the RAM in them: of a guest whose RAM need not begin or end at a page.

use super::info::CheckpointInfo;
use super::layout::{size, too_large};
use crate::checkpoint::CheckpointError;
use crate::to_u64;
use crate::{Gpa, GpaRange, GuestMemory, MemoryError, PageSize, Pfn, PfnRange, RamLayout};

/// The frames that hold RAM, also those that RAM fills only in part: sorted, disjoint, with
/// holes between.
pub(crate) fn covered_frames(layout: &RamLayout, page_size: PageSize) -> Vec<PfnRange> {
    let mut out: Vec<PfnRange> = Vec::new();
    for region in layout.regions() {
        let end = Pfn::new(region.end().raw().div_ceil(page_size.bytes()));
        let frames = PfnRange::new(region.start().pfn(page_size), end);
        match out.last_mut() {
            Some(last) if frames.start() <= last.end() => {
                *last = PfnRange::new(last.start(), end);
            }
            _ => out.push(frames),
        }
    }
    out
}

/// The RAM in `range`, lowest first.
pub(crate) fn ram_in(layout: &RamLayout, range: GpaRange) -> impl Iterator<Item = GpaRange> + '_ {
    let regions = layout.regions();
    let first = regions.partition_point(|region| region.end() <= range.start());
    regions
        .iter()
        .skip(first)
        .map(move |region| region.intersection(&range))
        .take_while(|part| !part.is_empty())
}

/// The range of `frames`.
pub(crate) fn range_of(
    info: &CheckpointInfo,
    frames: PfnRange,
) -> Result<GpaRange, CheckpointError> {
    frames.gpa_range(info.page_size).ok_or_else(|| {
        let max = u64::MAX >> info.page_size.shift();
        too_large("the frame", frames.end().raw(), max)
    })
}

/// The RAM in `frames`, lowest first.
pub(crate) fn ram_of(
    info: &CheckpointInfo,
    frames: PfnRange,
) -> Result<impl Iterator<Item = GpaRange> + '_, CheckpointError> {
    Ok(ram_in(&info.layout, range_of(info, frames)?))
}

/// Refuses memory that is not where the checkpoint says.
pub(crate) fn same_layout(ours: &RamLayout, theirs: &RamLayout) -> Result<(), CheckpointError> {
    if ours == theirs {
        return Ok(());
    }
    let bounds = |layout: &RamLayout| {
        let regions = layout.regions().iter();
        regions
            .flat_map(|region| [region.start(), region.end()])
            .collect::<Vec<_>>()
    };
    let (ours, theirs) = (bounds(ours), bounds(theirs));
    let differ = ours.iter().zip(&theirs).find(|(a, b)| a != b);
    let at = match differ {
        Some((a, b)) => *a.min(b),
        None => *ours
            .get(theirs.len())
            .or_else(|| theirs.get(ours.len()))
            .unwrap_or(&Gpa::ZERO),
    };
    Err(CheckpointError::Layout { at })
}

/// Reads `frames` into `out`, zero where RAM fills a frame only in part. Returns the frames that
/// the source has no bytes for.
pub(crate) fn read_frames(
    memory: &dyn GuestMemory,
    info: &CheckpointInfo,
    frames: PfnRange,
    out: &mut [u8],
) -> Result<Vec<Pfn>, CheckpointError> {
    let is_absent = |error: &MemoryError| matches!(error, MemoryError::Absent { .. });
    match read_range(memory, info, frames, out) {
        Err(CheckpointError::Memory(error)) if is_absent(&error) => {}
        done => return done.map(|()| Vec::new()),
    }
    let mut absent = Vec::new();
    let pages = out.chunks_exact_mut(size(info.page_size.bytes()));
    for (pfn, page) in frames.iter().zip(pages) {
        let one = PfnRange::with_len(pfn, 1).unwrap_or(frames);
        match read_range(memory, info, one, page) {
            Err(CheckpointError::Memory(error)) if is_absent(&error) => {
                page.fill(0);
                absent.push(pfn);
            }
            done => done?,
        }
    }
    Ok(absent)
}

fn read_range(
    memory: &dyn GuestMemory,
    info: &CheckpointInfo,
    frames: PfnRange,
    out: &mut [u8],
) -> Result<(), CheckpointError> {
    let range = range_of(info, frames)?;
    if range.len() != to_u64(out.len()) {
        return Err(wrong_length("a buffer", range, out.len()));
    }
    if info.layout.contains(range.start(), range.len()) {
        memory.read(range.start(), out)?;
        return Ok(());
    }
    out.fill(0);
    for part in ram_in(&info.layout, range) {
        memory.read(part.start(), slice_of(out, range, part)?)?;
    }
    Ok(())
}

/// The bytes of `out` that stand for `part`, when `out` stands for `whole`.
pub(crate) fn slice_of(
    out: &mut [u8],
    whole: GpaRange,
    part: GpaRange,
) -> Result<&mut [u8], CheckpointError> {
    let found = out.len();
    let from = part.start().offset_from(whole.start());
    let to = part.end().offset_from(whole.start());
    from.zip(to)
        .and_then(|(from, to)| out.get_mut(size(from)..size(to)))
        .ok_or_else(|| wrong_length("a buffer", whole, found))
}

/// Copies what belongs to `at` to where it belongs.
pub(crate) fn copy_exact(bytes: &[u8], out: &mut [u8], at: Gpa) -> Result<(), CheckpointError> {
    if bytes.len() != out.len() {
        return Err(CheckpointError::Length {
            what: "page data",
            at,
            found: to_u64(bytes.len()),
            expected: to_u64(out.len()),
        });
    }
    out.copy_from_slice(bytes);
    Ok(())
}

/// The bytes of `from` that begin at `start` into `out`.
pub(crate) fn copy_part(
    from: &[u8],
    start: usize,
    out: &mut [u8],
    at: Gpa,
) -> Result<(), CheckpointError> {
    let rest = from.get(start..).unwrap_or(&[]);
    copy_exact(rest.get(..out.len()).unwrap_or(rest), out, at)
}

fn wrong_length(what: &'static str, range: GpaRange, found: usize) -> CheckpointError {
    CheckpointError::Length {
        what,
        at: range.start(),
        found: to_u64(found),
        expected: range.len(),
    }
}

/// Fills `out` with a word, as a little-endian guest has it in memory.
pub(crate) fn fill_words(out: &mut [u8], word: u64) {
    let bytes = word.to_le_bytes();
    if bytes == [bytes[0]; 8] {
        out.fill(bytes[0]);
        return;
    }
    for chunk in out.chunks_mut(8) {
        for (out, byte) in chunk.iter_mut().zip(bytes) {
            *out = byte;
        }
    }
}
