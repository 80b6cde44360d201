//! The content of a range of guest memory that tells where it lies: evidence for a layout that
//! somebody has given.
//!
//! - An empty list of the kernel's (`struct list_head`) points to itself through the direct map,
//!   so it tells its own guest-physical address; kernel objects are full of them, tens of thousands
//!   in a small guest. In memory that was put where other memory belongs, they point there.
//! - A `struct page` that is on no list has such a list too (`lru`, `__init_single_page` in
//!   `mm/mm_init.c`), which points to itself in the array of struct pages: it tells which frame's
//!   it is, and by the page tables where it has to lie.
//! - The page tables map the direct map one to one. Tables that were put where other memory belongs
//!   do not.

use crate::KernelVa;
use crate::arch;
use crate::error::VmiError;
use crate::kernel::Kernel;
use crate::mm::mem_map::MemMap;
use sonicshot::{GpaRange, GuestMemory, to_u64, to_usize};

/// So many lists must point to one place for it to be believed. In memory in its right place a few
/// lists of one element look as if they pointed elsewhere, at most two to any one place.
const MIN_LISTS: u64 = 16;
/// And so many times more than to any other.
const CLEARLY: u64 = 8;
/// So many are enough.
const ENOUGH: u64 = 512;
/// The number of bytes that are read at a time.
const PIECE: usize = 1 << 20;

/// Evidence of where a range of memory lies, by its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct PlaceEvidence {
    /// The range at which it is taken to lie.
    pub range: GpaRange,
    /// The number of lists in it that point to themselves there.
    pub here: u64,
    /// The number of struct pages in it that are there by their own account.
    pub struct_pages: u64,
    /// The range of the others to which most lists point, and how many do.
    pub elsewhere: Option<(GpaRange, u64)>,
}

impl PlaceEvidence {
    /// The other range at which it must lie, if it clearly does not lie where it is taken to.
    #[must_use]
    pub fn belongs_to(&self) -> Option<GpaRange> {
        let (range, lists) = self.elsewhere?;
        is_clear(lists, self.here).then_some(range)
    }

    /// Whether it clearly lies where it is taken to.
    #[must_use]
    pub fn is_confirmed(&self) -> bool {
        let by_structs = self.struct_pages >= MIN_LISTS && self.belongs_to().is_none();
        is_clear(self.here, self.most_elsewhere()) || by_structs
    }

    /// The most lists that point to one other range.
    fn most_elsewhere(&self) -> u64 {
        self.elsewhere.map_or(0, |(_, lists)| lists)
    }
}

fn is_clear(these: u64, others: u64) -> bool {
    // A product that wraps is larger than any count of lists in memory.
    let times = others.checked_mul(CLEARLY);
    these >= MIN_LISTS && times.is_some_and(|times| times <= these)
}

/// Evidence for each of `ranges`, which are disjoint.
pub(crate) fn evidence(
    kernel: &Kernel<'_>,
    direct_map: Option<KernelVa>,
    ranges: &[GpaRange],
) -> Result<Vec<PlaceEvidence>, VmiError> {
    let direct_map = match direct_map {
        Some(at) => Some(at),
        None => arch::of(kernel)?.fixed_direct_map(kernel, ranges),
    };
    let mut found: Vec<PlaceEvidence> = Vec::new();
    for range in ranges {
        let mut evidence = PlaceEvidence {
            range: *range,
            here: 0,
            struct_pages: 0,
            elsewhere: None,
        };
        if let Some(direct_map) = direct_map {
            check_tables(kernel, *range, direct_map)?;
            count_lists(kernel.space.memory(), &mut evidence, ranges, direct_map)?;
        }
        found.push(evidence);
    }
    // A kernel whose struct pages cannot be found has none that could tell anything.
    if let Ok(mem_map) = MemMap::new(kernel)
        && let Ok(Some(lru)) = kernel.member("page", "lru")
    {
        count_struct_pages(kernel, &mem_map, lru.offset, &mut found)?;
    }
    Ok(found)
}

/// Checks that the page tables map `range` in the direct map to where it is, or not at all.
fn check_tables(
    kernel: &Kernel<'_>,
    range: GpaRange,
    direct_map: KernelVa,
) -> Result<(), VmiError> {
    /// The kernel maps RAM in pages of this size or larger, but for a few.
    const STEP: u64 = 2 << 20;
    let mut at = range.start();
    while at < range.end() {
        let Some(va) = direct_map.checked_add(at.raw()) else {
            return Ok(());
        };
        let mut step = STEP;
        if let Ok(there) = kernel.space.translate(va) {
            if there.at != at {
                return Err(VmiError::Corrupt {
                    what: "the page tables of the direct map",
                    at: va,
                    value: there.at.raw(),
                });
            }
            step = step.max(there.len);
        }
        let Some(next) = at.checked_add(step) else {
            return Ok(());
        };
        at = next;
    }
    Ok(())
}

/// Counts the empty lists in a range that point to themselves, there or in another of `ranges`.
fn count_lists(
    memory: &dyn GuestMemory,
    evidence: &mut PlaceEvidence,
    ranges: &[GpaRange],
    direct_map: KernelVa,
) -> Result<(), VmiError> {
    let range = evidence.range;
    // Each range by where it begins: there may be many, and words without end.
    let mut starts: Vec<(u64, usize)> = ranges.iter().map(|r| r.start().raw()).zip(0..).collect();
    starts.sort_unstable();
    let mut votes = vec![0_u64; ranges.len()];
    let mut buffer = vec![0; PIECE];
    let mut at = range.start();
    while let Some(data) = memory
        .next_data(at)
        .filter(|data| data.start() < range.end())
    {
        let from = data.start();
        let left = data.end().min(range.end()).offset_from(from);
        let inside = from.offset_from(range.start());
        let (Some(left), Some(inside)) = (left, inside) else {
            break;
        };
        let len = to_usize(left).min(buffer.len());
        let Some(piece) = buffer.get_mut(..len) else {
            break;
        };
        match memory.read(from, piece) {
            Ok(()) => {}
            // What is not in the dump says nothing.
            Err(sonicshot::MemoryError::Absent { .. }) => piece.fill(0),
            Err(error) => return Err(error.into()),
        }
        let (words, _) = piece.as_chunks::<8>();
        let pairs = words.iter().zip(words.iter().skip(1));
        for (offset, (next, previous)) in (inside..).step_by(8).zip(pairs) {
            if next != previous {
                continue;
            }
            let list = u64::from_le_bytes(*next);
            let there = list.checked_sub(direct_map.raw());
            let Some(start) = there.and_then(|there| there.checked_sub(offset)) else {
                continue;
            };
            let found = starts.binary_search_by_key(&start, |(start, _)| *start);
            let number = found.ok().and_then(|found| starts.get(found));
            let Some((number, other)) =
                number.and_then(|(_, number)| ranges.get(*number).map(|range| (*number, range)))
            else {
                continue;
            };
            // A range that is too short for it is none where this can belong.
            if offset < other.len()
                && let Some(count) = votes.get_mut(number)
            {
                VmiError::count("lists that point to themselves", count, 1)?;
            }
        }
        memory.release(GpaRange::with_len(from, to_u64(len)).unwrap_or(data));
        let Some(next) = from.checked_add(to_u64(len)) else {
            break;
        };
        at = next;
        tally(evidence, ranges, &votes);
        let elsewhere = evidence.most_elsewhere();
        let clear = is_clear(evidence.here, elsewhere) || is_clear(elsewhere, evidence.here);
        if clear && evidence.here.max(elsewhere) >= ENOUGH || at >= range.end() {
            break;
        }
    }
    tally(evidence, ranges, &votes);
    Ok(())
}

fn tally(evidence: &mut PlaceEvidence, ranges: &[GpaRange], votes: &[u64]) {
    evidence.elsewhere = None;
    for (range, lists) in ranges.iter().zip(votes) {
        if *range == evidence.range {
            evidence.here = *lists;
        } else if *lists > evidence.most_elsewhere() {
            evidence.elsewhere = Some((*range, *lists));
        }
    }
}

/// Counts the struct pages whose own list is empty where the page tables have it.
fn count_struct_pages(
    kernel: &Kernel<'_>,
    mem_map: &MemMap<'_>,
    lru: u64,
    found: &mut [PlaceEvidence],
) -> Result<(), VmiError> {
    let stride = mem_map.stride;
    let next = usize::try_from(lru).ok();
    let Some((next, previous)) = next.and_then(|next| Some((next, next.checked_add(8)?))) else {
        return Ok(());
    };
    for span in mem_map.spans() {
        mem_map.visit_span(span, &mut |first, bytes| {
            let Some(start) = mem_map.page_va(first) else {
                return Ok(());
            };
            let Ok(there) = kernel.space.translate(start) else {
                return Ok(());
            };
            let (mut at, mut gpa) = (start, there.at);
            let mut index = 0_usize;
            // Mostly the one of the struct page before.
            let mut number = None;
            let step = to_usize(stride);
            while let Some(page) = bytes.get(index, step) {
                let list = at.checked_add(lru).map(KernelVa::raw);
                if list.is_some() && page.u64_at(next) == list && page.u64_at(previous) == list {
                    let holds = |e: &PlaceEvidence| e.range.contains(gpa);
                    let same = number.filter(|number| found.get(*number).is_some_and(holds));
                    number = same.or_else(|| found.iter().position(holds));
                    if let Some(evidence) = number.and_then(|number| found.get_mut(number)) {
                        VmiError::count("struct pages", &mut evidence.struct_pages, 1)?;
                    }
                }
                let moved = at.checked_add(stride).zip(gpa.checked_add(stride));
                let (Some((va, after)), Some(further)) = (moved, index.checked_add(step)) else {
                    break;
                };
                (at, gpa, index) = (va, after, further);
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[cfg(test)]
#[allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "tests say so by panicking"
)]
mod tests {
    use super::{ENOUGH, PlaceEvidence, check_tables, evidence};
    use crate::KernelVa;
    use crate::kernel::testing::{DIRECT_MAP, Facts, Ram, kernel};
    use sonicshot::{Gpa, GpaRange};

    const MIB: u64 = 1 << 20;

    fn range(start: u64, end: u64) -> GpaRange {
        GpaRange::new(Gpa::new(start * MIB), Gpa::new(end * MIB))
    }

    /// The evidence of three ranges whose lists, so many each, point to the places of these numbers.
    fn seen(lists: &[(u64, usize)]) -> Vec<PlaceEvidence> {
        let ranges = [range(0, 2), range(2, 4), range(4, 6)];
        let mut ram = Ram::new(8 << 20);
        for (range, (count, place)) in ranges.iter().zip(lists) {
            for list in 0..*count {
                let offset = list * 24 + 8;
                let to = DIRECT_MAP + ranges[*place].start().raw() + offset;
                ram.put(range.start().raw() + offset, to);
                ram.put(range.start().raw() + offset + 8, to);
            }
        }
        let memory = ram.memory();
        let kernel = kernel(&memory, Facts::default());
        let base = Some(KernelVa::new(DIRECT_MAP));
        evidence(&kernel, base, &ranges).unwrap()
    }

    #[test]
    fn empty_lists_tell_where_memory_lies() {
        // How many lists in each range, and where they point; whether each is confirmed, and which
        // it belongs to.
        let cases = [
            ([(99, 0), (99, 1), (99, 2)], [Ok(true), Ok(true), Ok(true)]),
            ([(99, 0), (99, 2), (99, 1)], [Ok(true), Err(2), Err(1)]),
            ([(99, 0), (99, 2), (0, 0)], [Ok(true), Err(2), Ok(false)]),
            (
                [(99, 0), (15, 2), (15, 2)],
                [Ok(true), Ok(false), Ok(false)],
            ),
            ([(99, 0), (0, 0), (16, 2)], [Ok(true), Ok(false), Ok(true)]),
            ([(99, 2), (99, 0), (99, 1)], [Err(2), Err(0), Err(1)]),
        ];
        let ranges = [range(0, 2), range(2, 4), range(4, 6)];
        for (lists, want) in cases {
            let got: Vec<Result<bool, usize>> = seen(&lists)
                .iter()
                .map(|e| match e.belongs_to() {
                    Some(to) => Err(ranges.iter().position(|range| *range == to).unwrap()),
                    None => Ok(e.is_confirmed()),
                })
                .collect();
            assert_eq!(got, want, "{lists:?}");
        }
        // No more is looked at than is needed.
        let all = seen(&[(50_000, 0), (0, 0), (0, 0)]);
        assert!((ENOUGH..50_000).contains(&all[0].here), "{all:?}");
    }

    #[test]
    fn evidence_against_evidence_confirms_nothing() {
        let mixed = |here, there, struct_pages| PlaceEvidence {
            range: range(0, 2),
            here,
            struct_pages,
            elsewhere: Some((range(2, 4), there)),
        };
        for (evidence, confirmed, belongs) in [
            (mixed(800, 100, 0), true, false),
            (mixed(800, 101, 0), false, false),
            (mixed(100, 800, 0), false, true),
            (mixed(0, 800, 99), false, true),
            (mixed(0, 15, 16), true, false),
            (mixed(0, 0, 15), false, false),
            (mixed(u64::MAX, u64::MAX, 0), false, false),
        ] {
            assert_eq!(evidence.is_confirmed(), confirmed, "{evidence:?}");
            assert_eq!(evidence.belongs_to().is_some(), belongs, "{evidence:?}");
        }
    }

    #[test]
    fn page_tables_that_map_memory_elsewhere_are_not_believed() {
        let mut ram = Ram::new(8 << 20);
        let base = KernelVa::new(DIRECT_MAP);
        let check = |ram: &Ram| {
            let memory = ram.memory();
            check_tables(&kernel(&memory, Facts::default()), range(0, 8), base)
        };
        check(&ram).unwrap();
        let table = (8 << 20) - 0x1000;
        // Not there.
        ram.put(table + 8, 0);
        check(&ram).unwrap();
        ram.put(table + 16, 0xe3);
        assert!(check(&ram).is_err());
    }
}
