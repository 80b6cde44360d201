//! An ELF core again, without the dropped pages.

use crate::DumpError;
use crate::backing::plain::PlainDump;
use crate::format::ability::Copying;
use crate::format::elf_core::wire::{self, ElfCore, PT_LOAD, Segment};
use crate::prune::copy::Copier;
use sonicshot::{FileOffset, FileRange, Gpa, GpaRange, PrunePlan};
use std::os::unix::fs::FileExt;

/// A core has at most this many segments, so that every reader can count them in 16 bits.
const MAX_SEGMENTS: usize = 0xfffe;

/// One segment of the output, and where its data is in the input.
struct Piece {
    /// The number of the input's segment that it is a part of.
    source: usize,
    segment: Segment,
    from: FileOffset,
}

/// Splits a segment at the dropped pages: each piece is data that is kept, followed by memory
/// that has no data and reads as zero (`p_filesz` less than `p_memsz`). `None` if its numbers
/// contradict each other.
fn split(
    source: usize,
    segment: &Segment,
    plan: &PrunePlan,
    pieces: &mut Vec<Piece>,
) -> Option<()> {
    let Some((guest, filled)) = segment.guest().zip(segment.filled()) else {
        pieces.push(Piece {
            source,
            segment: *segment,
            from: segment.offset,
        });
        return Some(());
    };
    let mut kept = plan.kept_in(filled).peekable();
    // What is dropped at the very start belongs to a piece without data.
    let mut next = match kept.peek() {
        Some(first) if first.start() == guest.start() => kept.next(),
        _ => Some(GpaRange::new(guest.start(), guest.start())),
    };
    while let Some(data) = next {
        next = kept.next();
        let start = data.start();
        let end = next.map_or(guest.end(), |next| next.start());
        let inside = start.offset_from(guest.start())?;
        pieces.push(Piece {
            source,
            segment: Segment {
                vaddr: segment.vaddr.wrapping_add(inside),
                paddr: start.raw(),
                file_len: data.len(),
                mem_len: end.offset_from(start)?,
                ..*segment
            },
            from: segment.offset.checked_add(inside)?,
        });
    }
    Some(())
}

/// Joins the pieces with the smallest gaps between them until at most `limit` are left. What was
/// dropped in such a gap becomes a hole in the file, which reads as zero too. Returns how many
/// gaps that were.
fn join_smallest_gaps(pieces: Vec<Piece>, limit: usize) -> (Vec<Piece>, u64) {
    let excess = pieces.len().saturating_sub(limit);
    let mut gaps: Vec<u64> = pieces
        .array_windows()
        .filter_map(|[a, b]| gap(a, b))
        .collect();
    gaps.sort_unstable();
    let last = excess.min(gaps.len()).checked_sub(1);
    let Some(widest) = last.and_then(|last| gaps.get(last)).copied() else {
        return (pieces, 0);
    };
    // All narrower gaps go, and of those exactly as wide as many as it still takes.
    let mut as_wide = excess.saturating_sub(gaps.partition_point(|gap| *gap < widest));
    let mut joined: Vec<Piece> = Vec::with_capacity(limit);
    let mut count = 0_u64;
    for piece in pieces {
        // A piece that has taken others in still ends with the gap of its last.
        let gap = joined.last().and_then(|last| gap(last, &piece));
        let goes = gap.is_some_and(|gap| gap < widest || gap == widest && as_wide > 0);
        match joined.last_mut().filter(|_| goes) {
            Some(last) => {
                if gap == Some(widest) {
                    as_wide = as_wide.saturating_sub(1);
                }
                let (a, b) = (&mut last.segment, &piece.segment);
                a.file_len = a.mem_len.saturating_add(b.file_len);
                a.mem_len = a.mem_len.saturating_add(b.mem_len);
                count = count.saturating_add(1);
            }
            None => joined.push(piece),
        }
    }
    (joined, count)
}

/// How much was dropped between two pieces, if they are of the same segment.
fn gap(a: &Piece, b: &Piece) -> Option<u64> {
    (a.source == b.source).then(|| a.segment.mem_len.saturating_sub(a.segment.file_len))
}

/// A piece never has more parts than this: a crafted file could have every page in every segment.
const MAX_PIECES: usize = 1 << 22;

/// Writes a core with the kept pages. What several segments share of the file is in it once.
pub(super) fn copy(dump: &PlainDump, core: &ElfCore, work: Copying<'_>) -> Result<(), DumpError> {
    let refuse = |why| DumpError::CannotPrune {
        path: dump.path().into(),
        why,
    };
    let contradict = || refuse("its segments contradict themselves");
    let too_many = || refuse("it has more segments than a core can");
    let (goes, output, stats) = (work.goes, work.output, work.stats);
    (stats.dropped_bytes, stats.runs) = dropped(core, goes);
    let mut pieces = Vec::new();
    for (source, segment) in core.segments.iter().enumerate() {
        split(source, segment, goes, &mut pieces).ok_or_else(contradict)?;
        if pieces.len() > MAX_PIECES {
            return Err(refuse("its segments share the same data many times over"));
        }
    }
    let (mut pieces, joined) = join_smallest_gaps(pieces, MAX_SEGMENTS);
    stats.joined = joined;
    let mut end = lay_out(&mut pieces, ALIGN).ok_or_else(too_many)?;
    if end.raw() > dump.file_len() {
        end = lay_out(&mut pieces, 1).ok_or_else(too_many)?;
    }
    let segments: Vec<Segment> = pieces.iter().map(|piece| piece.segment).collect();
    let head = wire::headers(core.machine, &segments).ok_or_else(too_many)?;
    let writing = || DumpError::io("writing", output.path());
    output.file().set_len(end.raw()).map_err(writing())?;
    output.file().write_all_at(&head, 0).map_err(writing())?;
    let mut parts = Vec::new();
    for piece in &pieces {
        kept_parts(piece, goes, &mut parts).ok_or_else(contradict)?;
        if parts.len() > MAX_PIECES {
            parts = without_overlaps(parts);
        }
    }
    let parts = without_overlaps(parts);
    // Of no more than the file.
    let kept = parts
        .iter()
        .fold(0, |sum: u64, part| sum.saturating_add(part.from.len()));
    let mut copier = Copier::new(dump, output, kept, work.progress);
    for part in &parts {
        copier.copy(part.from, part.to)?;
    }
    stats.cloned_bytes = copier.cloned();
    Ok(())
}

/// What goes of the memory that segments have data for, whichever of them: bytes, and stretches.
fn dropped(core: &ElfCore, goes: &PrunePlan) -> (u64, u64) {
    let mut filled: Vec<GpaRange> = core.segments.iter().filter_map(Segment::filled).collect();
    filled.sort_unstable_by_key(|range| (range.start(), range.end()));
    let (mut bytes, mut runs) = (0_u64, 0_u64);
    let mut done = Gpa::ZERO;
    for range in filled {
        let rest = GpaRange::new(range.start().max(done), range.end().max(done));
        for run in goes.dropped_in(rest) {
            bytes = bytes.saturating_add(run.len());
            runs = runs.saturating_add(1);
        }
        done = rest.end();
    }
    (bytes, runs)
}

/// A page of a mapped file can then be a page of memory.
const ALIGN: u64 = 4096;

/// A stretch of the input, and where it is in the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Moved {
    from: FileRange,
    to: FileOffset,
}

/// Gives each piece its place in the file, and returns where that ends. What pieces share of the
/// input they share of the output.
fn lay_out(pieces: &mut [Piece], align: u64) -> Option<FileOffset> {
    let mut sources: Vec<(FileRange, bool)> = Vec::with_capacity(pieces.len());
    for piece in pieces.iter() {
        let from = FileRange::with_len(piece.from, piece.segment.file_len)?;
        sources.push((from, piece.segment.kind == PT_LOAD));
    }
    sources.retain(|(from, _)| !from.is_empty());
    sources.sort_unstable_by_key(|(from, _)| (from.start(), from.end()));
    let mut at = wire::headers_end(pieces.len())?;
    let mut moved: Vec<Moved> = Vec::new();
    for (from, is_memory) in sources {
        match moved.last_mut() {
            Some(last) if from.start() < last.from.end() => {
                let end = last.from.end().max(from.end());
                last.from = FileRange::new(last.from.start(), end);
                at = last.to.checked_add(last.from.len())?;
            }
            _ => {
                if is_memory {
                    at = at.checked_align_up(align)?;
                }
                moved.push(Moved { from, to: at });
                at = at.checked_add(from.len())?;
            }
        }
    }
    for piece in pieces {
        let from = piece.from;
        let behind = moved.partition_point(|moved| moved.from.start() <= from);
        let place = behind.checked_sub(1).and_then(|index| moved.get(index));
        // What has no data has no place.
        piece.segment.offset = match place.filter(|place| from < place.from.end()) {
            Some(place) => {
                let inside = from.offset_from(place.from.start())?;
                place.to.checked_add(inside)?
            }
            None => FileOffset::ZERO,
        };
    }
    Some(at)
}

/// Adds what is to be copied of a piece. `None` if its numbers contradict each other.
fn kept_parts(piece: &Piece, goes: &PrunePlan, parts: &mut Vec<Moved>) -> Option<()> {
    let Piece { segment, from, .. } = piece;
    let to = segment.offset;
    let Some(filled) = segment.filled() else {
        let from = FileRange::with_len(*from, segment.file_len)?;
        parts.push(Moved { from, to });
        return Some(());
    };
    // Where pieces were joined, dropped pages lie inside: they are passed over.
    for kept in goes.kept_in(filled) {
        let inside = kept.start().offset_from(filled.start())?;
        let from = from.checked_add(inside)?;
        parts.push(Moved {
            from: FileRange::with_len(from, kept.len())?,
            to: to.checked_add(inside)?,
        });
    }
    Some(())
}

/// The same parts, each byte of the input once.
fn without_overlaps(mut parts: Vec<Moved>) -> Vec<Moved> {
    parts.retain(|part| !part.from.is_empty());
    parts.sort_unstable_by_key(|part| (part.from.start(), part.from.end()));
    let mut out: Vec<Moved> = Vec::with_capacity(parts.len());
    for part in parts {
        match out.last_mut() {
            // Both are in one stretch of the output, too.
            Some(last) if part.from.start() < last.from.end() => {
                let end = last.from.end().max(part.from.end());
                last.from = FileRange::new(last.from.start(), end);
            }
            _ => out.push(part),
        }
    }
    out
}
