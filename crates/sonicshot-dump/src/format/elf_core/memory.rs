//! The places of the guest's RAM in an ELF core, and the RAM that is nowhere in it.

use crate::DumpError;
use crate::backing::plain::{Extent, joined, may_claim, sum_of_lens};
use crate::format::elf_core::mark;
use crate::format::elf_core::wire::{ElfCore, SEGMENT_COUNT};
use sonicshot::{Bytes, FileBytes, FileOffset, Gpa, GpaRange, to_u64};
use std::path::Path;

/// `/proc/kcore` has a handful of segments that overlap.
const MAX_OVERLAPPING: usize = 1 << 12;
/// Bytes that are compared at a time.
const COMPARED: u64 = 64 << 10;

/// The guest's RAM in a core.
#[derive(Debug)]
pub(super) struct CoreMemory {
    /// Sorted, disjoint.
    pub extents: Vec<Extent>,
    /// Ranges that have no bytes in the file, and are not known to be zero.
    pub absent: Vec<GpaRange>,
    /// Whether segments claim memory without bytes, and nothing says what that was.
    pub leaves_out: bool,
}

/// A segment of memory.
struct Load {
    /// Its number in the file.
    number: usize,
    guest: GpaRange,
    /// The part of that which the file has bytes for, and their offset.
    filled: GpaRange,
    offset: FileOffset,
}

impl CoreMemory {
    /// Where segments overlap, bytes of the file count before memory of which a segment says only
    /// that it is there. Two that have bytes for the same memory must have the same; a segment of
    /// which another has all is made to share that one's.
    pub(super) fn new(
        path: &Path,
        data: FileBytes<'_>,
        core: &mut ElfCore,
    ) -> Result<Self, DumpError> {
        let mut loads = loads_of(path, core)?;
        // Segments that overlap are rare, and each may cut every other into pieces.
        let mut order: Vec<_> = loads.iter().map(|load| load.guest).collect();
        order.sort_unstable();
        let extents = if order.is_sorted_by(|a, b| a.end() <= b.start()) {
            loads.sort_unstable_by_key(|load| load.guest.start());
            disjoint(&loads)
        } else {
            let overlaps = Overlaps {
                path,
                data,
                compared: 0,
            };
            overlaps.resolve(core, &loads)?
        };
        check_claims(path, core, &extents, to_u64(data.len()))?;
        let empty = extents.iter().filter(|extent| extent.offset.is_none());
        let empty: Vec<GpaRange> = empty.map(|extent| extent.guest).collect();
        let cut = common(&joined(core.lost.clone()), &empty);
        let said = core.sums.zip(core.notes(data));
        let said = said.and_then(|(sums, notes)| mark::absent_in(&notes, sums));
        let (absent, leaves_out) = match said {
            Some(said) => {
                let all: Vec<GpaRange> = extents.iter().map(|extent| extent.guest).collect();
                (joined([common(&joined(said), &all), cut].concat()), false)
            }
            None => {
                let leaves_out = GpaRange::total_of(&empty) > GpaRange::total_of(&cut);
                (empty, leaves_out)
            }
        };
        Ok(Self {
            extents,
            absent,
            leaves_out,
        })
    }
}

fn loads_of(path: &Path, core: &ElfCore) -> Result<Vec<Load>, DumpError> {
    let mut loads = Vec::new();
    for (number, segment) in core.segments.iter().enumerate() {
        if segment.guest_len() == 0 {
            continue;
        }
        let ranges = segment.guest().zip(segment.filled());
        let (guest, filled) = ranges.ok_or_else(|| DumpError::MalformedItem {
            path: path.to_owned(),
            what: "the address (beyond 64 bits) of segment",
            number: to_u64(number),
            value: segment.paddr,
        })?;
        loads.push(Load {
            number,
            guest,
            filled: filled.intersection(&guest),
            offset: segment.offset,
        });
    }
    Ok(loads)
}

/// The extents of loads that do not overlap, which are sorted: there may be many.
fn disjoint(loads: &[Load]) -> Vec<Extent> {
    let mut extents = Vec::with_capacity(loads.len());
    for load in loads {
        let empty = GpaRange::new(load.filled.end(), load.guest.end());
        for (guest, offset) in [(load.filled, Some(load.offset)), (empty, None)] {
            if !guest.is_empty() {
                extents.push(Extent { guest, offset });
            }
        }
    }
    extents
}

/// Segments that overlap.
struct Overlaps<'a> {
    path: &'a Path,
    data: FileBytes<'a>,
    /// The number of bytes that were compared with others.
    compared: u64,
}

impl Overlaps<'_> {
    fn resolve(mut self, core: &mut ElfCore, loads: &[Load]) -> Result<Vec<Extent>, DumpError> {
        if loads.len() > MAX_OVERLAPPING {
            let what = "too many overlapping segments";
            return Err(self.bad(what, to_u64(loads.len())));
        }
        let mut extents: Vec<Extent> = Vec::new();
        for load in loads {
            if let Some(shared) = self.shared(&extents, load, loads)?
                && let Some(segment) = core.segments.get_mut(load.number)
            {
                segment.offset = shared;
            }
            add_extent(&mut extents, load.filled, Some(load.offset));
        }
        for load in loads {
            add_extent(&mut extents, load.guest, None);
        }
        Ok(extents)
    }

    fn bad(&self, what: &'static str, value: u64) -> DumpError {
        DumpError::malformed(self.path, what, SEGMENT_COUNT, value)
    }

    /// The other offset at which all bytes of `load` are, one behind the other; `None` if there is
    /// none. Refuses it if what others have of its memory is not the same.
    fn shared(
        &mut self,
        extents: &[Extent],
        load: &Load,
        loads: &[Load],
    ) -> Result<Option<FileOffset>, DumpError> {
        let filled = load.filled;
        let first = extents.partition_point(|extent| extent.guest.end() <= filled.start());
        let others = extents.iter().skip(first);
        let others = others.take_while(|extent| extent.guest.start() < filled.end());
        let mut shared: Option<(FileOffset, u64)> = None;
        let mut is_whole = true;
        for other in others {
            let part = other.guest.intersection(&filled);
            let place = |offset: FileOffset, from: Gpa| {
                let inside = part.start().offset_from(from)?;
                offset.checked_add(inside)
            };
            let places = other
                .offset
                .and_then(|offset| place(offset, other.guest.start()));
            let places = places.zip(place(load.offset, filled.start()));
            let Some((theirs, ours)) = places else {
                is_whole = false;
                continue;
            };
            if theirs != ours
                && let Some(at) = self.first_difference(theirs, ours, part)?
            {
                return Err(self.disagree(at, part, load, loads));
            }
            let (start, len) = *shared.get_or_insert((theirs, 0));
            is_whole &= start.checked_add(len) == Some(theirs);
            shared = len.checked_add(part.len()).map(|len| (start, len));
        }
        let whole = shared.filter(|(_, len)| is_whole && *len == filled.len());
        Ok(whole.map(|(start, _)| start))
    }

    /// The first address in `part` of the memory at which its bytes at two places of the file differ.
    fn first_difference(
        &mut self,
        theirs: FileOffset,
        ours: FileOffset,
        part: GpaRange,
    ) -> Result<Option<Gpa>, DumpError> {
        let beyond = || self.bad("overlapping segments beyond the end", part.start().raw());
        let mut done = 0;
        let mut rest = part;
        while !rest.is_empty() {
            let len = rest.up_to(COMPARED).len();
            let piece = |from: FileOffset| {
                let at = from.checked_add(done)?;
                self.data.part(at.raw(), len)?.copied()
            };
            let (theirs, ours) = piece(theirs).zip(piece(ours)).ok_or_else(beyond)?;
            let mut bytes = (done..).zip(theirs.iter().zip(&ours));
            if let Some((at, _)) = bytes.find(|(_, (a, b))| a != b) {
                return Ok(part.start().checked_add(at));
            }
            done = done.checked_add(len).ok_or_else(beyond)?;
            rest = GpaRange::new(rest.up_to(len).end(), part.end());
        }
        // Each byte of a file is some segment's copy once: more of them are a crafted file's.
        self.compared = self.compared.checked_add(done).ok_or_else(beyond)?;
        if self.compared > to_u64(self.data.len()) {
            let what = "segments that hold the same memory many times over";
            return Err(self.bad(what, self.compared));
        }
        Ok(None)
    }

    fn disagree(&self, at: Gpa, part: GpaRange, load: &Load, loads: &[Load]) -> DumpError {
        let mut before = loads.iter().take_while(|other| other.number < load.number);
        let first = before.find(|other| other.filled.contains(at));
        DumpError::SegmentsDisagree {
            path: self.path.to_owned(),
            first: first.map_or(load.number, |first| first.number),
            second: load.number,
            at,
            both: part,
        }
    }
}

/// Refuses a core without RAM, of more RAM than the file can be of, and one that is cut off before
/// any of it.
fn check_claims(
    path: &Path,
    core: &ElfCore,
    extents: &[Extent],
    file_len: u64,
) -> Result<(), DumpError> {
    if extents.is_empty() {
        return Err(DumpError::NotADump {
            path: path.to_owned(),
            why: "an ELF core without any RAM",
        });
    }
    if let Some(need) = core.cut_before
        && extents.iter().all(|extent| extent.offset.is_none())
    {
        let what = "segments beyond the end of the file: truncated";
        return Err(DumpError::malformed(path, what, need, file_len));
    }
    let lengths = extents.iter().map(|extent| extent.guest.len());
    let claimed = sum_of_lens(lengths);
    if claimed.is_none_or(|claimed| !may_claim(claimed, file_len)) {
        let what = "segments that claim more memory than the file can be of";
        let claimed = claimed.unwrap_or(file_len);
        return Err(DumpError::malformed(path, what, SEGMENT_COUNT, claimed));
    }
    Ok(())
}

/// Adds what of `guest`, which is at `offset` in the file, is not covered yet; nothing, if it is
/// not there.
fn add_extent(extents: &mut Vec<Extent>, guest: GpaRange, offset: Option<FileOffset>) {
    let mut gaps = Vec::new();
    let mut at = guest.start();
    let first = extents.partition_point(|extent| extent.guest.end() <= guest.start());
    for extent in extents.iter().skip(first) {
        if extent.guest.start() >= guest.end() {
            break;
        }
        gaps.push(GpaRange::new(at, extent.guest.start()));
        at = at.max(extent.guest.end());
    }
    gaps.push(GpaRange::new(at, guest.end()));
    for gap in gaps {
        if gap.is_empty() {
            continue;
        }
        let inside = gap.start().offset_from(guest.start());
        let offset = offset.and_then(|offset| offset.checked_add(inside?));
        let index = extents.partition_point(|e| e.guest.start() < gap.start());
        extents.insert(index, Extent { guest: gap, offset });
    }
}

/// The memory that is in ranges of both lists, which are sorted, none of which touch.
pub(super) fn common(a: &[GpaRange], b: &[GpaRange]) -> Vec<GpaRange> {
    let (mut a, mut b) = (a.iter().peekable(), b.iter().peekable());
    let mut found = Vec::new();
    while let (Some(first), Some(second)) = (a.peek(), b.peek()) {
        let both = first.intersection(second);
        if !both.is_empty() {
            found.push(both);
        }
        if first.end() <= second.end() {
            a.next();
        } else {
            b.next();
        }
    }
    found
}

/// The memory that is in ranges of the first list and in none of the second; both are sorted, and none of a
/// list touch.
pub(super) fn without(a: &[GpaRange], b: &[GpaRange]) -> Vec<GpaRange> {
    let mut found = Vec::new();
    for range in a {
        let first = b.partition_point(|other| other.end() <= range.start());
        let mut at = range.start();
        let others = b.iter().skip(first);
        for other in others.take_while(|other| other.start() < range.end()) {
            found.push(GpaRange::new(at, other.start().max(at)));
            at = other.end();
        }
        found.push(GpaRange::new(at.min(range.end()), range.end()));
    }
    found.retain(|range| !range.is_empty());
    found
}
