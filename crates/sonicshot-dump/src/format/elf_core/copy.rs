//! An ELF core again, without the dropped pages.

use crate::DumpError;
use crate::backing::plain::PlainDump;
use crate::format::ability::Copying;
use crate::format::elf_core::wire::{self, ElfCore, PT_LOAD, Segment};
use crate::prune::copy::Copier;
use sonicshot::{FileOffset, FileRange, GpaRange, PrunePlan};
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

/// Writes a core with the kept pages.
pub(super) fn copy(dump: &PlainDump, core: &ElfCore, work: Copying<'_>) -> Result<(), DumpError> {
    let refuse = |why| DumpError::CannotPrune {
        path: dump.path().into(),
        why,
    };
    let (goes, output, stats) = (work.goes, work.output, work.stats);
    (stats.dropped_bytes, stats.runs) = dropped(core, goes);
    let mut pieces = Vec::new();
    for (source, segment) in core.segments.iter().enumerate() {
        split(source, segment, goes, &mut pieces)
            .ok_or_else(|| refuse("its segments contradict themselves"))?;
    }
    let (mut pieces, joined) = join_smallest_gaps(pieces, MAX_SEGMENTS);
    stats.joined = joined;
    let end = lay_out(&mut pieces).ok_or_else(|| refuse("it has more segments than a core can"))?;
    // Segments may share data, as the kernel's text does in `/proc/vmcore`, which is then copied
    // for each of them. A crafted file must not fill the disk so.
    let data = pieces.iter().map(|piece| piece.segment.file_len);
    let kept_total = data.fold(0_u64, u64::saturating_add);
    if kept_total > dump.file_len().saturating_mul(2) {
        return Err(refuse("its segments share the same data many times over"));
    }
    let segments: Vec<Segment> = pieces.iter().map(|piece| piece.segment).collect();
    let head = wire::headers(core.machine, &segments)
        .ok_or_else(|| refuse("it has more segments than a core can"))?;
    let writing = || DumpError::io("writing", output.path());
    output.file().set_len(end.raw()).map_err(writing())?;
    output.file().write_all_at(&head, 0).map_err(writing())?;
    let mut copier = Copier::new(dump, output, kept_total, work.progress);
    for piece in &pieces {
        copy_piece(piece, goes, &mut copier)?
            .ok_or_else(|| refuse("its segments contradict themselves"))?;
    }
    stats.cloned_bytes = copier.cloned();
    Ok(())
}

/// What goes of the data that segments have: bytes, and stretches.
fn dropped(core: &ElfCore, goes: &PrunePlan) -> (u64, u64) {
    let filled = core.segments.iter().filter_map(Segment::filled);
    let runs = filled.flat_map(|filled| goes.dropped_in(filled));
    runs.fold((0_u64, 0_u64), |(bytes, runs), run| {
        (bytes.saturating_add(run.len()), runs.saturating_add(1))
    })
}

/// Gives each piece its place in the file, and returns where that ends.
fn lay_out(pieces: &mut [Piece]) -> Option<FileOffset> {
    const ALIGN: u64 = 4096;
    let mut at = wire::headers_end(pieces.len())?;
    for piece in pieces {
        // A page of a mapped file can then be a page of memory.
        if piece.segment.kind == PT_LOAD {
            at = at.checked_align_up(ALIGN)?;
        }
        piece.segment.offset = at;
        at = at.checked_add(piece.segment.file_len)?;
    }
    Some(at)
}

/// Copies the data of a piece. `None` if its numbers contradict each other.
fn copy_piece(
    piece: &Piece,
    goes: &PrunePlan,
    copier: &mut Copier<'_>,
) -> Result<Option<()>, DumpError> {
    let Piece { segment, from, .. } = piece;
    let Some(filled) = segment.filled() else {
        let data = FileRange::with_len(*from, segment.file_len);
        let Some(data) = data else { return Ok(None) };
        copier.copy(data, segment.offset)?;
        return Ok(Some(()));
    };
    // Where pieces were joined, dropped pages lie inside: they are passed over.
    for kept in goes.kept_in(filled) {
        let inside = kept.start().offset_from(filled.start());
        let from = inside.and_then(|inside| from.checked_add(inside));
        let from = from.and_then(|from| FileRange::with_len(from, kept.len()));
        let to = inside.and_then(|inside| segment.offset.checked_add(inside));
        let (Some(from), Some(to)) = (from, to) else {
            return Ok(None);
        };
        copier.copy(from, to)?;
    }
    Ok(Some(()))
}
