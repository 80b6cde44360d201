//! Memory that was plugged in as DIMMs: where each block of it lies.

use crate::error::OfflineError;
use crate::note::Note;
use sonicshot::{GpaRange, GuestMemory, MemoryError, Tally, to_u64, to_usize};
use sonicshot_dump::{BlockKind, BlockPlace, Dump, RamBlock};
use sonicshot_vmi::KernelVa;
use std::collections::HashMap;

/// A device's own memory of this length is worth a word.
const NOTABLE: u64 = 128 << 20;

/// Memory that was plugged in as DIMMs: the file does not say where, the guest's kernel does.
#[derive(Debug, Default)]
pub(super) struct Plugged {
    pub places: Vec<BlockPlace>,
    /// Places of the same length, in which the blocks are in any order.
    pub shared: Vec<Vec<GpaRange>>,
    pub notes: Vec<Note>,
}

impl Plugged {
    /// Gives each block the range of RAM that has its length. `taken` is where others are.
    pub(super) fn find(blocks: &[&RamBlock], ram: &[GpaRange], taken: &[GpaRange]) -> Self {
        let mut plugged = Self::default();
        let mut lengths: Vec<u64> = blocks.iter().map(|block| block.len).collect();
        lengths.sort_unstable();
        lengths.dedup();
        for len in lengths {
            let these = blocks.iter().filter(|block| block.len == len);
            let free = |range: &&GpaRange| {
                range.len() == len && taken.iter().all(|t| t.intersection(range).is_empty())
            };
            let ranges: Vec<GpaRange> = ram.iter().filter(free).copied().collect();
            if these.clone().count() != ranges.len() {
                plugged.notes.extend(these.map(|block| kept(block)));
                continue;
            }
            let places = these.zip(&ranges);
            plugged
                .places
                .extend(places.map(|(block, range)| BlockPlace::new(&block.name, vec![*range])));
            if ranges.len() > 1 {
                plugged.shared.push(ranges);
            }
        }
        plugged
    }

    /// Finds out which of the blocks of one length lies where, by what the kernel has in them:
    /// an empty list points to itself, so it tells its own address. Returns whether blocks have
    /// to change places.
    pub(super) fn tell_apart(
        &mut self,
        dump: &Dump,
        direct_map: Option<KernelVa>,
    ) -> Result<bool, OfflineError> {
        let mut changed = false;
        for ranges in std::mem::take(&mut self.shared) {
            let order = match direct_map {
                Some(direct_map) => order_by_lists(dump, &ranges, direct_map)?,
                None => None,
            };
            let Some(order) = order else {
                if let Some(first) = ranges.first() {
                    self.notes.push(Note::BlocksAlike {
                        count: ranges.len(),
                        len: first.len(),
                    });
                }
                self.shared.push(ranges);
                continue;
            };
            let moves: HashMap<GpaRange, GpaRange> = ranges.into_iter().zip(order).collect();
            for place in &mut self.places {
                for range in &mut place.ranges {
                    if let Some(to) = moves.get(range) {
                        changed |= to != range;
                        *range = *to;
                    }
                }
            }
        }
        Ok(changed)
    }
}

/// The devices' memory of which a file does not say where it lies: so with virtio-mem of QEMU 5 to
/// 7.
pub(super) fn unplaced_devices(dump: &Dump) -> impl Iterator<Item = Note> + '_ {
    dump.ram_blocks().iter().filter_map(|block| {
        let large = block.kind == BlockKind::Device && block.len >= NOTABLE;
        (large && block.ranges.is_empty()).then(|| kept(block))
    })
}

/// So many lists of a block must point to one place to be believed,
const MIN_LISTS: u64 = 64;
/// and so many times more than to any other.
const CLEARLY: u64 = 8;
/// With so many nothing more need be looked at.
const ENOUGH: u64 = MIN_LISTS * CLEARLY;
/// The most bytes of a block that are looked through: a kernel that has anything in it has lists there.
const MAX_LOOK: u64 = 256 << 20;
const PIECE: usize = 1 << 20;

/// The place of each of the blocks that are now at `ranges`, among these ranges, if that is clear.
fn order_by_lists(
    dump: &Dump,
    ranges: &[GpaRange],
    direct_map: KernelVa,
) -> Result<Option<Vec<GpaRange>>, OfflineError> {
    let mut order = Vec::new();
    for range in ranges {
        let votes = lists_by_place(dump, *range, ranges, direct_map)?;
        let best = clear_winner(&votes);
        order.push(best.and_then(|best| ranges.get(best).copied()));
    }
    let mut left: Vec<GpaRange> = ranges.to_vec();
    left.retain(|range| !order.contains(&Some(*range)));
    let missing = order.iter().filter(|place| place.is_none()).count();
    Ok(match left.as_slice() {
        // Each place taken once; of one that nothing is known of, the others tell.
        [] if missing == 0 => order.into_iter().collect(),
        [last] if missing == 1 => Some(order.iter().map(|p| p.unwrap_or(*last)).collect()),
        _ => None,
    })
}

fn clear_winner(votes: &[u64]) -> Option<usize> {
    let (best, count) = votes.iter().enumerate().max_by_key(|(_, count)| **count)?;
    let mut others = votes
        .iter()
        .enumerate()
        .filter(|(number, _)| *number != best);
    let clear = others.all(|(_, other)| *other <= count / CLEARLY);
    (*count >= MIN_LISTS && clear).then_some(best)
}

/// The number of empty lists in the block at `range` that would point to themselves at each of
/// `places`.
fn lists_by_place(
    dump: &Dump,
    range: GpaRange,
    places: &[GpaRange],
    direct_map: KernelVa,
) -> Result<Vec<u64>, MemoryError> {
    let mut votes = vec![0_u64; places.len()];
    // Of each place where it begins and its number: there may be many, and words without end.
    let mut starts: Vec<(u64, usize)> = places.iter().map(|p| p.start().raw()).zip(0..).collect();
    starts.sort_unstable();
    let mut buffer = vec![0; PIECE];
    let mut at = range.start();
    while let Some(data) = dump.next_data(at).filter(|data| data.start() < range.end()) {
        let inside = data.start().offset_from(range.start());
        let end = data.end().min(range.end());
        let left = end.offset_from(data.start());
        let (Some(inside), Some(left)) = (inside, left) else {
            break;
        };
        let len = to_usize(left).min(buffer.len());
        let (piece, _) = buffer.split_at_mut(len);
        dump.read(data.start(), piece)?;
        let (words, _) = piece.as_chunks::<8>();
        let pairs = words.iter().zip(words.iter().skip(1));
        for (offset, (next, previous)) in (inside..).step_by(8).zip(pairs) {
            if next == previous {
                let list = u64::from_le_bytes(*next);
                let there = list.checked_sub(direct_map.raw());
                let Some(start) = there.and_then(|there| there.checked_sub(offset)) else {
                    continue;
                };
                let found = starts.binary_search_by_key(&start, |(start, _)| *start);
                let number = found.ok().and_then(|found| starts.get(found));
                if let Some(votes) = number.and_then(|(_, number)| votes.get_mut(*number)) {
                    // No more than there are words.
                    *votes = Tally::new(*votes).and(1).get();
                }
            }
        }
        let Some(next) = data.start().checked_add(to_u64(len)) else {
            break;
        };
        at = next;
        let enough = votes.iter().any(|votes| *votes >= ENOUGH);
        if at >= range.end() || inside >= MAX_LOOK || enough && clear_winner(&votes).is_some() {
            break;
        }
    }
    Ok(votes)
}

/// The note on a block whose place is not known.
fn kept(block: &RamBlock) -> Note {
    Note::BlockKept {
        name: block.name.clone(),
        len: block.len,
    }
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::indexing_slicing,
        reason = "tests may stop anywhere"
    )]

    use super::{MAX_LOOK, lists_by_place, order_by_lists};
    use sonicshot::{Gpa, GpaRange};
    use sonicshot_dump::{Dump, LayoutSpec};
    use sonicshot_vmi::KernelVa;
    use std::os::unix::fs::FileExt;

    const GIB: u64 = 1 << 30;

    fn range(start: u64, end: u64) -> GpaRange {
        GpaRange::new(Gpa::new(start), Gpa::new(end))
    }

    /// Two blocks of 64 KiB with empty lists of a kernel: `lists` says how many there are in each,
    /// and which of the places they point to.
    fn order(lists: &[(usize, usize)]) -> Option<Vec<usize>> {
        const LEN: u64 = 0x1_0000;
        let places: Vec<GpaRange> = (0..lists.len() as u64)
            .map(|n| range(4 * GIB + n * LEN, 4 * GIB + (n + 1) * LEN))
            .collect();
        let direct_map = 0xffff_9a80_0000_0000_u64;
        let mut content = vec![0; lists.len() * usize::try_from(LEN).unwrap()];
        for (block, (count, place)) in content.chunks_mut(0x1_0000).zip(lists) {
            for list in 0..*count {
                let offset = list * 24 + 8;
                let address = direct_map + places[*place].start().raw() + offset as u64;
                block[offset..offset + 8].copy_from_slice(&address.to_le_bytes());
                block[offset + 8..offset + 16].copy_from_slice(&address.to_le_bytes());
            }
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &content).unwrap();
        let layout = LayoutSpec::Ranges(places.clone());
        let dump = Dump::open(file.path(), Some(&layout)).unwrap();
        let order = order_by_lists(&dump, &places, KernelVa::new(direct_map)).unwrap()?;
        let number = |range| places.iter().position(|place| place == range).unwrap();
        Some(order.iter().map(number).collect())
    }

    #[test]
    fn empty_lists_tell_where_their_block_is() {
        assert_eq!(order(&[(200, 0), (200, 1)]), Some(vec![0, 1]));
        assert_eq!(order(&[(200, 1), (200, 0)]), Some(vec![1, 0]));
        // One is told by the other; with neither nothing is known.
        assert_eq!(order(&[(0, 0), (200, 0)]), Some(vec![1, 0]));
        assert_eq!(order(&[(10, 0), (10, 1)]), None);
        assert_eq!(order(&[(200, 0), (200, 0)]), None);
        assert_eq!(order(&[(100, 2), (0, 0), (100, 1)]), Some(vec![2, 0, 1]));
        assert_eq!(order(&[(100, 2), (0, 0), (0, 0)]), None);
    }

    /// A list is seen behind data that begins before the bound, and not behind data at it.
    #[test]
    fn a_block_is_looked_through_up_to_a_bound() {
        const MIB: u64 = 1 << 20;
        const LEN: u64 = MAX_LOOK + 16 * MIB;
        let direct_map = 0xffff_9a80_0000_0000_u64;
        let place = range(4 * GIB, 4 * GIB + LEN);
        let list_at = MAX_LOOK + 8 * MIB;
        let list = (direct_map + place.start().raw() + list_at).to_le_bytes();
        for (data_at, votes) in [(MAX_LOOK - 4096, 1), (MAX_LOOK, 0)] {
            let file = tempfile::NamedTempFile::new().unwrap();
            file.as_file().set_len(LEN).unwrap();
            file.as_file().write_all_at(b"data", data_at).unwrap();
            let lists = [list, list].concat();
            file.as_file().write_all_at(&lists, list_at).unwrap();
            let layout = LayoutSpec::Ranges(vec![place]);
            let dump = Dump::open(file.path(), Some(&layout)).unwrap();
            let found = lists_by_place(&dump, place, &[place], KernelVa::new(direct_map));
            assert_eq!(found.unwrap(), [votes], "{data_at:#x}");
        }
    }
}
