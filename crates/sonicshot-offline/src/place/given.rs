//! A layout that was given: whether what is in the guest's memory can lie so.

use super::placed::{Look, Placed, open_guest};
use crate::error::OfflineError;
use crate::snapshot::Snapshot;
use sonicshot::{Gpa, GpaRange, GuestMemory};
use sonicshot_dump::{BlockKind, Doubts, Dump, LayoutSpec, Vmm};
use sonicshot_vmi::GuestOs;

/// Memory is plugged in in blocks of this size or a multiple (`memory_block_size_bytes` on x86-64).
pub(super) const MEMORY_BLOCK: u64 = 128 << 20;
/// Of a layout in more ranges, no range is compared with every other.
const MAX_RANGES: usize = 4096;

/// Opens the dump in the layout that was given, or that the VMM's own state tells, and lets `look`
/// see the guest.
pub(super) fn with_guest<T>(
    snapshot: &Snapshot,
    layout: &LayoutSpec,
    look: Look<'_, T>,
) -> Result<Placed<T>, OfflineError> {
    let dump = snapshot.dump(Some(layout))?;
    let guest = open_guest(snapshot, &dump)?;
    let by_user = snapshot.options().layout.is_some();
    // The VMM's own word is believed.
    let unconfirmed = if by_user {
        check(snapshot, &dump, &*guest, false)?
    } else {
        Vec::new()
    };
    let value = look(&*guest).map_err(OfflineError::guest(snapshot.memory_file()))?;
    drop(guest);
    let of_file = dump.layout_spec().is_none() && dump.ram_blocks().is_empty();
    Ok(Placed {
        origin: match (by_user, of_file) {
            (false, _) if snapshot.vmm() == Some(Vmm::VMWARE) => "from the vmss or vmsn beside it",
            (false, _) => "from the snapshot's state.json",
            (true, true) => "from the file; --layout is for raw and QEMU's files",
            (true, false) => "given",
        },
        dump,
        doubts: Doubts::of_checked_layout().unconfirmed(unconfirmed),
        notes: Vec::new(),
        value,
    })
}

/// Looks in each range of the layout, which was given or `guessed`, for what shows that it lies
/// there. Returns the ranges in which nothing shows that.
///
/// # Errors
/// [`OfflineError::Misplaced`] if something in one of them shows that it lies elsewhere.
pub(super) fn check(
    snapshot: &Snapshot,
    dump: &Dump,
    guest: &dyn GuestOs,
    guessed: bool,
) -> Result<Vec<GpaRange>, OfflineError> {
    let failed = OfflineError::guest(snapshot.memory_file());
    let given: Vec<GpaRange> = match dump.layout_spec() {
        Some(layout) => layout.ranges(dump.layout().bytes()),
        // Of QEMU's files the blocks; other formats tell themselves, and have none.
        None => dump
            .ram_blocks()
            .iter()
            .filter(|block| block.kind == BlockKind::Ram)
            .flat_map(|block| block.ranges.iter().copied())
            .collect(),
    };
    let ram = guest_ram(guest);
    let ranges = pieces(&given, &ram);
    // The kernel was found in the only one.
    if ranges.len() <= 1 {
        return Ok(Vec::new());
    }
    if ranges.len() > MAX_RANGES {
        let count = ranges.len();
        let path = snapshot.memory_file().into();
        return Err(OfflineError::ManyRanges { path, count });
    }
    let all = guest.evidence_of_places(&ranges).map_err(&failed)?;
    for evidence in &all {
        if let (Some(place), Some((_, lists))) = (evidence.belongs_to(), evidence.elsewhere) {
            return Err(OfflineError::Misplaced {
                path: snapshot.memory_file().into(),
                range: evidence.range,
                place,
                lists,
                here: evidence.here,
                guessed,
            });
        }
    }
    let confirmed = |range: &GpaRange| all.iter().any(|e| e.range == *range && e.is_confirmed());
    let mut open: Vec<GpaRange> = ranges.iter().filter(|r| !confirmed(r)).copied().collect();
    if let [_] = open.as_slice()
        && holds_all(dump, &guest.known_memory().map_err(&failed)?, &ram)
    {
        // All other memory is in its place, and there is no other place where this could be.
        open.clear();
    }
    Ok(open)
}

/// Whether the guest has no memory that is not in the dump: by its own tables, and by its struct
/// pages, which what belongs to a device (virtio-mem) has too. The last block of RAM need not be
/// whole.
fn holds_all(dump: &Dump, known: &[GpaRange], ram: &[GpaRange]) -> bool {
    let in_dump = |range: &GpaRange| dump.layout().contains(range.start(), range.len());
    let touches = |block: &GpaRange| {
        let mut regions = dump.layout().regions().iter();
        regions.any(|region| !region.intersection(block).is_empty())
    };
    let whole = |range: &GpaRange| {
        let mut blocks = pieces(&[*range], &blocks(*range)).into_iter();
        blocks.all(|block| touches(&block))
    };
    !ram.is_empty() && ram.iter().all(in_dump) && known.iter().all(whole)
}

/// The blocks of memory that a range touches.
fn blocks(range: GpaRange) -> Vec<GpaRange> {
    let first = range.start().raw() / MEMORY_BLOCK;
    let last = range.end().raw().div_ceil(MEMORY_BLOCK);
    let block = |n: u64| GpaRange::with_len(Gpa::new(n.checked_mul(MEMORY_BLOCK)?), MEMORY_BLOCK);
    (first..last).filter_map(block).collect()
}

/// RAM by all that the guest's kernel knows of it.
fn guest_ram(guest: &dyn GuestOs) -> Vec<GpaRange> {
    // What cannot be read says nothing.
    let e820 = guest.boot_ram().ok().flatten();
    let tree = guest.system_ram().ok().flatten();
    e820.into_iter().chain(tree).flatten().collect()
}

/// The ranges of a layout, cut where the guest has one block of memory end and another begin. Those
/// that follow each other stay apart: that they do so in the file is what has to be shown.
fn pieces(layout: &[GpaRange], ram: &[GpaRange]) -> Vec<GpaRange> {
    let mut cuts: Vec<Gpa> = ram.iter().flat_map(|r| [r.start(), r.end()]).collect();
    cuts.retain(|cut| cut.raw().is_multiple_of(MEMORY_BLOCK));
    cuts.sort_unstable();
    cuts.dedup();
    let mut pieces = Vec::new();
    for range in layout {
        let mut start = range.start();
        let first = cuts.partition_point(|cut| *cut <= start);
        for cut in cuts.iter().skip(first).take_while(|c| **c < range.end()) {
            pieces.push(GpaRange::new(start, *cut));
            start = *cut;
        }
        pieces.push(GpaRange::new(start, range.end()));
    }
    pieces.retain(|range| !range.is_empty());
    pieces
}

#[cfg(test)]
mod tests {
    use super::pieces;
    use sonicshot::{Gpa, GpaRange};

    fn range(start: u64, end: u64) -> GpaRange {
        GpaRange::new(Gpa::new(start << 20), Gpa::new(end << 20))
    }

    #[test]
    fn a_range_is_cut_where_blocks_of_memory_meet() {
        let ram = [range(1, 3071), range(4096, 5120), range(5120, 6144)];
        let cut = pieces(&[range(4096, 6144), range(0, 3072)], &ram);
        assert_eq!(cut, [range(4096, 5120), range(5120, 6144), range(0, 3072)]);
        let cut = pieces(&[range(0, 4096), range(5000, 5300)], &ram);
        assert_eq!(cut, [range(0, 4096), range(5000, 5120), range(5120, 5300)]);
        assert_eq!(pieces(&[range(0, 512)], &[]), [range(0, 512)]);
    }
}
