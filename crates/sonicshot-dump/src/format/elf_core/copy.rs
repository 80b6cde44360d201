//! An ELF core again, without the dropped pages.

use crate::DumpError;
use crate::backing::plain::{PlainDump, joined};
use crate::format::ability::Copying;
use crate::format::elf_core::mark::{self, Sums};
use crate::format::elf_core::memory::{common, without};
use crate::format::elf_core::wire::{self, ElfCore, PT_LOAD, PT_NOTE, Segment};
use crate::prune::copy::Copier;
use sonicshot::{FileOffset, FileRange, Gpa, GpaRange, PrunePlan, Tally, to_u64};
use std::os::unix::fs::FileExt;

/// A core has at most this many segments, so that every reader can count them in 16 bits.
const MAX_SEGMENTS: usize = 0xfffe;

/// One segment of the output, and where its data is in the input.
#[derive(Clone)]
struct Piece {
    /// The number of the input's segment that it is a part of.
    source: usize,
    segment: Segment,
    from: FileOffset,
    /// Its data is not in the input.
    is_new: bool,
}

impl Piece {
    /// Notes of a core that had none.
    fn of_notes() -> Self {
        Self {
            source: usize::MAX,
            segment: Segment {
                kind: PT_NOTE,
                flags: 0,
                offset: FileOffset::ZERO,
                vaddr: 0,
                paddr: 0,
                file_len: 0,
                mem_len: 0,
                align: 4,
            },
            from: FileOffset::ZERO,
            is_new: true,
        }
    }
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
            is_new: false,
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
            is_new: false,
        });
    }
    Some(())
}

/// Joins the pieces with the smallest gaps between them until at most `limit` are left. What was
/// dropped in such a gap becomes a hole in the file, which reads as zero too. Returns how many
/// gaps that were.
fn join_smallest_gaps(pieces: Vec<Piece>, limit: usize) -> Option<(Vec<Piece>, u64)> {
    let Some(excess) = pieces.len().checked_sub(limit) else {
        return Some((pieces, 0));
    };
    let neighbours = pieces.iter().zip(pieces.iter().skip(1));
    let mut gaps: Vec<u64> = neighbours.filter_map(|(a, b)| gap(a, b)).collect();
    gaps.sort_unstable();
    let last = excess.min(gaps.len()).checked_sub(1);
    let Some(widest) = last.and_then(|last| gaps.get(last)).copied() else {
        return Some((pieces, 0));
    };
    // All narrower gaps go, and of those exactly as wide as many as it still takes.
    let narrower = gaps.partition_point(|gap| *gap < widest);
    let mut as_wide = excess.checked_sub(narrower)?;
    let mut joined: Vec<Piece> = Vec::with_capacity(limit);
    let mut count = 0_u64;
    for piece in pieces {
        // A piece that has taken others in still ends with the gap of its last.
        let gap = joined.last().and_then(|last| gap(last, &piece));
        let goes = gap.is_some_and(|gap| gap < widest || gap == widest && as_wide > 0);
        match joined.last_mut().filter(|_| goes) {
            Some(last) => {
                if gap == Some(widest) {
                    as_wide = as_wide.checked_sub(1)?;
                }
                let (a, b) = (&mut last.segment, &piece.segment);
                a.file_len = a.mem_len.checked_add(b.file_len)?;
                a.mem_len = a.mem_len.checked_add(b.mem_len)?;
                count = count.checked_add(1)?;
            }
            None => joined.push(piece),
        }
    }
    Some((joined, count))
}

/// The number of bytes dropped between two pieces, if they are of the same segment.
fn gap(a: &Piece, b: &Piece) -> Option<u64> {
    let left_out = a.segment.mem_len.checked_sub(a.segment.file_len);
    left_out.filter(|_| a.source == b.source)
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
    let absent = absent_of(dump, work.given_up);
    let made;
    (made, stats.joined) = Made::smallest(dump, core, pieces, &absent).ok_or_else(too_many)?;
    let segments: Vec<Segment> = made.pieces.iter().map(|piece| piece.segment).collect();
    let head = wire::headers(core.machine, &segments).ok_or_else(too_many)?;
    let writing = || DumpError::io("writing", output.path());
    output.file().set_len(made.end.raw()).map_err(writing())?;
    output.file().write_all_at(&head, 0).map_err(writing())?;
    let notes = made.notes.iter();
    for (notes, piece) in notes.zip(made.pieces.iter().filter(|piece| piece.is_new)) {
        let at = piece.segment.offset.raw();
        output.file().write_all_at(notes, at).map_err(writing())?;
    }
    let mut parts = Vec::new();
    for piece in made.pieces.iter().filter(|piece| !piece.is_new) {
        kept_parts(piece, goes, &mut parts).ok_or_else(contradict)?;
        if parts.len() > MAX_PIECES {
            parts = without_overlaps(parts);
        }
    }
    let parts = without_overlaps(parts);
    let kept = FileRange::total_of(parts.iter().map(|part| &part.from));
    let mut copier = Copier::new(dump, output, kept, work.progress);
    for part in &parts {
        copier.copy(part.from, part.to)?;
    }
    stats.cloned_bytes = copier.cloned();
    Ok(())
}

/// The memory that the output does not have, whatever else it leaves out: that which the input did
/// not have, and that which is given up.
fn absent_of(dump: &PlainDump, given_up: &PrunePlan) -> Vec<GpaRange> {
    let size = given_up.page_size();
    let runs = given_up.runs().iter();
    let given_up = runs.filter_map(|run| run.frames.gpa_range(size));
    joined(dump.absent().iter().copied().chain(given_up).collect())
}

/// The segments of the output, each with its place.
struct Made {
    pieces: Vec<Piece>,
    /// The notes, if they are not those of the input.
    notes: Option<Vec<u8>>,
    end: FileOffset,
}

impl Made {
    /// No larger than the input: where what is left out is less than what says so, it is not.
    /// Also returns how many gaps were joined.
    fn smallest(
        dump: &PlainDump,
        core: &ElfCore,
        pieces: Vec<Piece>,
        absent: &[GpaRange],
    ) -> Option<(Self, u64)> {
        let fits = |made: &Self| made.end.raw() <= dump.file_len();
        // Two may have to be added: notes, and memory without bytes at the front.
        let has_notes = core.segments.iter().any(|s| s.kind == PT_NOTE);
        let most = MAX_SEGMENTS
            .checked_sub(usize::from(!has_notes))?
            .checked_sub(usize::from(!begins_without_bytes(&pieces)))?;
        let (pieces, count) = join_smallest_gaps(pieces, most)?;
        let mut front = pieces.clone();
        put_front(&mut front)?;
        for (pieces, align) in [(&front, ALIGN), (&front, 1), (&pieces, 1)] {
            let made = Self::new(dump, core, pieces.clone(), absent, align)?;
            if fits(&made) {
                return Some((made, count));
            }
        }
        let (pieces, more) = join_smallest_gaps(pieces, core.segments.len())?;
        let made = Self::new(dump, core, pieces, absent, 1)?;
        Some((made, count.checked_add(more)?))
    }

    fn new(
        dump: &PlainDump,
        core: &ElfCore,
        mut pieces: Vec<Piece>,
        absent: &[GpaRange],
        align: u64,
    ) -> Option<Self> {
        let notes = match is_told_by_segments(&pieces, absent) {
            true => None,
            false => marked_notes(dump, core, &pieces, absent),
        };
        if let Some(notes) = &notes {
            let segment = notes_piece(&mut pieces)?;
            segment.file_len = to_u64(notes.len());
            // Some write that notes take no memory, others as much as in the file.
            if segment.mem_len > 0 {
                segment.mem_len = segment.file_len;
            }
        }
        let end = lay_out(&mut pieces, align)?;
        Some(Self { pieces, notes, end })
    }
}

/// Whether the first memory has no bytes.
fn begins_without_bytes(pieces: &[Piece]) -> bool {
    let first = pieces.iter().find(|piece| piece.segment.kind == PT_LOAD);
    first.is_some_and(|piece| piece.segment.file_len == 0)
}

/// Puts a piece without bytes before all other memory, if some memory has none.
///
/// makedumpfile (1.7) maps a core's bytes by the memory that segments have, not by the bytes:
/// behind a segment's last byte it takes those of the next segment for memory, and unmaps what it
/// still uses. It maps none, and reads all as it should, if it finds no byte of the first segment's
/// first page.
fn put_front(pieces: &mut Vec<Piece>) -> Option<()> {
    let is_memory = |piece: &Piece| piece.segment.kind == PT_LOAD;
    let is_short = |piece: &Piece| piece.segment.file_len < piece.segment.mem_len;
    let Some(first) = pieces.iter().position(is_memory) else {
        return Some(());
    };
    let is_ram = |piece: &Piece| piece.segment.guest().is_some();
    let Some(short) = pieces
        .iter()
        .position(|piece| is_ram(piece) && is_short(piece))
    else {
        return Some(());
    };
    let whole = pieces.get_mut(short)?;
    let len = whole.segment.file_len;
    if len == 0 {
        let empty = pieces.remove(short);
        pieces.insert(first, empty);
        return Some(());
    }
    let mut empty = whole.clone();
    empty.segment = Segment {
        vaddr: whole.segment.vaddr.checked_add(len)?,
        paddr: whole.segment.paddr.checked_add(len)?,
        file_len: 0,
        mem_len: whole.segment.mem_len.checked_sub(len)?,
        ..whole.segment
    };
    whole.segment.mem_len = len;
    pieces.insert(first, empty);
    Some(())
}

/// The notes of the input, and what says which memory the output does not have. `None` if they are
/// too long for that: then all that has no bytes counts as not there.
fn marked_notes(
    dump: &PlainDump,
    core: &ElfCore,
    pieces: &[Piece],
    absent: &[GpaRange],
) -> Option<Vec<u8>> {
    let notes = match core.segments.iter().any(|s| s.kind == PT_NOTE) {
        true => core.notes(dump.bytes())?,
        false => Vec::new(),
    };
    let mut loads = pieces.iter().filter(|piece| piece.segment.kind == PT_LOAD);
    let sums = loads.try_fold(Sums::default(), |sums, piece| {
        sums.with(piece.segment.file_len, piece.segment.mem_len)
    })?;
    let notes = mark::with_absent(&notes, sums, absent)?;
    wire::may_be_notes(notes.len()).then_some(notes)
}

/// The segment of the notes that are written anew: the first of the input, or one more.
fn notes_piece(pieces: &mut Vec<Piece>) -> Option<&mut Segment> {
    let is_notes = |piece: &Piece| piece.segment.kind == PT_NOTE;
    let at = match pieces.iter().position(is_notes) {
        Some(at) => at,
        None => {
            pieces.insert(0, Piece::of_notes());
            0
        }
    };
    let piece = pieces.get_mut(at)?;
    piece.is_new = true;
    Some(&mut piece.segment)
}

/// Whether the memory without bytes is just what is `absent`, so that nothing else has to say so.
fn is_told_by_segments(pieces: &[Piece], absent: &[GpaRange]) -> bool {
    let ranges = |of: fn(&Segment) -> Option<GpaRange>| {
        let ranges = pieces.iter().filter_map(|piece| of(&piece.segment));
        joined(ranges.collect())
    };
    let (all, filled) = (ranges(Segment::guest), ranges(Segment::filled));
    let empty = without(&all, &filled);
    empty == common(absent, &all)
}

/// Counts what goes of the memory that any segment has data for: bytes, and ranges.
fn dropped(core: &ElfCore, goes: &PrunePlan) -> (u64, u64) {
    let mut filled: Vec<GpaRange> = core.segments.iter().filter_map(Segment::filled).collect();
    filled.sort_unstable_by_key(|range| (range.start(), range.end()));
    let (mut bytes, mut runs) = (Tally::ZERO, Tally::ZERO);
    let mut done = Gpa::ZERO;
    for range in filled {
        let rest = GpaRange::new(range.start().max(done), range.end().max(done));
        for run in goes.dropped_in(rest) {
            bytes.add(run.len());
            runs.add(1);
        }
        done = rest.end();
    }
    (bytes.get(), runs.get())
}

/// A page of a mapped file can then be a page of memory.
const ALIGN: u64 = 4096;

/// A range of the input, and where it is in the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Moved {
    from: FileRange,
    to: FileOffset,
}

/// Gives each piece its place in the file, and returns where that ends. What pieces share of the
/// input they share of the output.
fn lay_out(pieces: &mut [Piece], align: u64) -> Option<FileOffset> {
    let headers_end = wire::headers_end(pieces.len())?;
    let mut at = headers_end;
    for new in pieces.iter_mut().filter(|piece| piece.is_new) {
        new.segment.offset = at;
        at = at.checked_add(new.segment.file_len)?;
    }
    let mut sources: Vec<(FileRange, bool)> = Vec::with_capacity(pieces.len());
    for piece in pieces.iter().filter(|piece| !piece.is_new) {
        let from = FileRange::with_len(piece.from, piece.segment.file_len)?;
        sources.push((from, piece.segment.kind == PT_LOAD));
    }
    sources.retain(|(from, _)| !from.is_empty());
    sources.sort_unstable_by_key(|(from, _)| (from.start(), from.end()));
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
    for piece in pieces.iter_mut().filter(|piece| !piece.is_new) {
        let from = piece.from;
        let behind = moved.partition_point(|moved| moved.from.start() <= from);
        let place = behind.checked_sub(1).and_then(|index| moved.get(index));
        // What has no data has no place: one behind the headers, for makedumpfile takes one at the
        // beginning of the file for bytes.
        piece.segment.offset = match place.filter(|place| from < place.from.end()) {
            Some(place) => {
                let inside = from.offset_from(place.from.start())?;
                place.to.checked_add(inside)?
            }
            None => headers_end,
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
            // Both are in one range of the output, too.
            Some(last) if part.from.start() < last.from.end() => {
                let end = last.from.end().max(part.from.end());
                last.from = FileRange::new(last.from.start(), end);
            }
            _ => out.push(part),
        }
    }
    out
}
