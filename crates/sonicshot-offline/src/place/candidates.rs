//! The ways to lay out a dump, likeliest first.

use sonicshot::{Gpa, GpaRange, RamLayout};
use sonicshot_dump::{BlockKind, BlockPlace, LayoutSpec, RamBlock, is_boot_ram};

/// So many ways to lay out a dump are tried.
const MAX_ATTEMPTS: usize = 64;
/// Of more blocks the ways to lay them out are not searched: QEMU has at most 256 slots for memory.
const MAX_SEARCHED: usize = 256;
const FROM_FILE: &str = "from the file";
const BY_GUEST: &str = "found out by the guest's own memory map";

/// One way to lay out a dump.
#[derive(Debug)]
pub(super) struct Candidate {
    /// `None`: as the file says.
    layout: Option<LayoutSpec>,
    /// The RAM that the guest boots with; `None` if the dump says where it lies.
    pub boot: Option<RamLayout>,
    /// The places of other blocks to begin with, so that the kernel can be read if it is in them.
    pub guess: Vec<BlockPlace>,
    /// Whether blocks were put in an order that nothing in the file tells.
    pub guessed: bool,
    /// Whether there is no other way known: a guest whose map cannot be read, or fits no layout,
    /// is taken to lie so.
    pub sole: bool,
    pub origin: &'static str,
}

impl Candidate {
    /// The layout with which the dump is opened to be looked at.
    pub(super) fn layout_with_guess(&self) -> Option<LayoutSpec> {
        match &self.layout {
            Some(LayoutSpec::Blocks(places)) => Some(LayoutSpec::Blocks(
                [places.as_slice(), &self.guess].concat(),
            )),
            layout => layout.clone(),
        }
    }

    /// The places of blocks in an order that nothing in the file tells; `None` if none was put so.
    pub(super) fn guessed_places(&self) -> Option<&[BlockPlace]> {
        match &self.layout {
            Some(LayoutSpec::Blocks(places)) if self.guessed => Some(places),
            _ => None,
        }
    }
}

/// The candidates, likeliest first.
#[derive(Debug)]
pub(super) struct Candidates {
    /// The blocks of a QEMU file; none of other formats.
    blocks: Vec<RamBlock>,
    /// The layouts of RAM that a machine may have.
    specs: Vec<LayoutSpec>,
    todo: std::vec::IntoIter<Candidate>,
    /// Whether nothing has to be found out.
    pub certain: bool,
    /// Whether every VMM that is known lays it out alike: the guest may know better.
    pub sole: bool,
    /// The RAM that the guest boots with, once a kernel was found.
    e820: Option<Vec<GpaRange>>,
    /// So many were taken.
    tried: usize,
    /// The bytes of RAM in the file.
    len: u64,
}

impl Candidates {
    /// The ways to lay out `len` bytes of RAM: of a QEMU file its `blocks`; of a `raw` file as one
    /// of `specs`; any other format knows its own.
    ///
    /// # Errors
    /// The number of blocks, if they are too many.
    pub(super) fn new(
        blocks: Vec<RamBlock>,
        specs: Vec<LayoutSpec>,
        len: u64,
        raw: bool,
    ) -> Result<Self, usize> {
        let mut these = Self {
            blocks,
            specs,
            todo: Vec::new().into_iter(),
            certain: false,
            sole: false,
            e820: None,
            tried: 0,
            len,
        };
        let count = these.ram().len();
        if count > MAX_SEARCHED {
            return Err(count);
        }
        let candidates = if these.are_of_blocks() {
            these.of_blocks()
        } else if raw {
            these.of_raw()
        } else {
            these.certain = true;
            vec![Candidate {
                layout: None,
                boot: None,
                guess: Vec::new(),
                guessed: false,
                sole: false,
                origin: FROM_FILE,
            }]
        };
        these.sole = matches!(candidates.as_slice(), [only] if only.sole);
        these.todo = candidates.into_iter();
        Ok(these)
    }

    /// Whether they are of the blocks of a QEMU file.
    pub(super) fn are_of_blocks(&self) -> bool {
        !self.blocks.is_empty()
    }

    /// The next one to be tried; `None` too once enough were.
    pub(super) fn next(&mut self) -> Option<Candidate> {
        if self.tried >= MAX_ATTEMPTS {
            return None;
        }
        let e820 = &self.e820;
        let found = self.todo.find(|candidate| match (&candidate.boot, e820) {
            (Some(boot), Some(e820)) => is_boot_ram(boot, e820),
            _ => true,
        })?;
        self.tried = self.tried.checked_add(1)?;
        Some(found)
    }

    fn of_raw(&self) -> Vec<Candidate> {
        let mut candidates: Vec<Candidate> = Vec::new();
        for spec in &self.specs {
            let Ok(boot) = RamLayout::new(spec.ranges(self.len)) else {
                continue;
            };
            if candidates.iter().all(|c| c.boot.as_ref() != Some(&boot)) {
                candidates.push(Candidate {
                    layout: Some(spec.clone()),
                    boot: Some(boot),
                    guess: Vec::new(),
                    guessed: false,
                    sole: false,
                    origin: BY_GUEST,
                });
            }
        }
        if let [only] = candidates.as_mut_slice() {
            only.sole = true;
            only.origin = "the same in every VMM for this size";
        }
        candidates
    }

    /// The blocks that may be RAM that the guest boots with, in the order of the file.
    fn ram(&self) -> Vec<&RamBlock> {
        let ram = |block: &&RamBlock| block.kind == BlockKind::Ram;
        self.blocks.iter().filter(ram).collect()
    }

    /// The blocks that may be RAM and are not among `names`.
    pub(super) fn others(&self, names: &[&str]) -> Vec<&RamBlock> {
        let mut others = self.ram();
        others.retain(|block| !names.contains(&block.name.as_str()));
        others
    }

    /// The orders in which the guest may have the blocks that it boots with, likeliest first, and how
    /// many of them are likely.
    fn orders(&self) -> (Vec<Vec<&RamBlock>>, usize) {
        let mut by_length = self.ram();
        by_length.sort_by_key(|block| std::cmp::Reverse(block.len));
        let mut orders: Vec<Vec<&RamBlock>> = by_length.iter().map(|block| vec![*block]).collect();
        // NUMA nodes: usually in the order in which they were made, or that of their names.
        let mut by_name = self.ram();
        by_name.sort_by(|a, b| a.name.cmp(&b.name));
        for order in [self.ram(), by_name] {
            if !orders.contains(&order) {
                orders.push(order);
            }
        }
        let likely = orders.len();
        add_orders(&self.ram(), &mut Vec::new(), &mut orders);
        (orders, likely)
    }

    fn of_blocks(&self) -> Vec<Candidate> {
        let (orders, likely) = self.orders();
        let mut candidates = Vec::new();
        let mut with_dimms = Vec::new();
        for (number, order) in orders.into_iter().enumerate() {
            let mut lens = order.iter().map(|block| block.len);
            let Some(total) = lens.try_fold(0, u64::checked_add) else {
                continue;
            };
            let mut known: Vec<Vec<GpaRange>> = Vec::new();
            for spec in &self.specs {
                let ranges = spec.ranges(total);
                if known.contains(&ranges) {
                    continue;
                }
                if number == likely {
                    candidates.append(&mut with_dimms);
                }
                if let Some(candidate) = self.candidate(&order, &ranges, FROM_FILE) {
                    with_dimms.extend(self.with_dimms(&candidate, &order));
                    candidates.push(candidate);
                }
                known.push(ranges);
            }
        }
        candidates.append(&mut with_dimms);
        candidates
    }

    /// The same with all other blocks where QEMU has DIMMs: one behind the other from the first
    /// whole GiB on that is above 4 GiB and all RAM (`hw/i386/pc.c`). A guest that boots with them
    /// may have what its kernel needs in there.
    fn with_dimms(&self, candidate: &Candidate, order: &[&RamBlock]) -> Vec<Candidate> {
        const GIB: u64 = 1 << 30;
        let names: Vec<&str> = order.iter().map(|block| block.name.as_str()).collect();
        let in_file = self.others(&names);
        let mut by_name = in_file.clone();
        by_name.sort_by(|a, b| a.name.cmp(&b.name));
        let mut guesses: Vec<Vec<BlockPlace>> = Vec::new();
        for dimms in [by_name, in_file] {
            let end = candidate.boot.as_ref().map_or(Gpa::ZERO, RamLayout::end);
            let mut at = end.raw().checked_next_multiple_of(GIB);
            at = at.map(|at| at.max(4 * GIB));
            let places = dimms.iter().map(|block| {
                let range = GpaRange::with_len(Gpa::new(at?), block.len)?;
                at = Some(range.end().raw());
                Some(BlockPlace::new(&block.name, vec![range]))
            });
            let places: Option<Vec<BlockPlace>> = places.collect();
            guesses.extend(places.filter(|p| !p.is_empty() && !guesses.contains(p)));
        }
        let with = |guess| Candidate {
            layout: candidate.layout.clone(),
            boot: candidate.boot.clone(),
            guess,
            ..*candidate
        };
        guesses.into_iter().map(with).collect()
    }

    /// The blocks `order` at `ranges`, beside those whose place is known.
    fn candidate(
        &self,
        order: &[&RamBlock],
        ranges: &[GpaRange],
        origin: &'static str,
    ) -> Option<Candidate> {
        let mut places = Vec::new();
        let mut ranges = ranges.to_vec();
        for block in order {
            let place = take(&mut ranges, block.len)?;
            places.push(BlockPlace::new(&block.name, place));
        }
        let boot = places.iter().flat_map(|place| place.ranges.clone());
        let boot = RamLayout::new(boot.collect()).ok()?;
        for block in &self.blocks {
            if block.kind == BlockKind::VirtioMem {
                places.push(BlockPlace::new(&block.name, block.ranges.clone()));
            }
        }
        let guessed = self.ram().len() > 1;
        Some(Candidate {
            layout: Some(LayoutSpec::Blocks(places)),
            boot: Some(boot),
            guess: Vec::new(),
            guessed,
            sole: false,
            origin: if guessed { BY_GUEST } else { origin },
        })
    }

    /// Takes what a guest's own map says, and a layout made by it as one more candidate.
    pub(super) fn learn(&mut self, e820: Vec<GpaRange>) {
        if self.e820.is_some() {
            return;
        }
        self.add_by(&e820);
        self.e820 = Some(e820);
    }

    /// Takes a layout made by a map that may be the guest's as one more candidate.
    pub(super) fn add_by(&mut self, map: &[GpaRange]) {
        let mut more = Vec::new();
        if self.are_of_blocks() {
            for order in self.orders().0 {
                let total = order
                    .iter()
                    .try_fold(0, |sum: u64, b| sum.checked_add(b.len));
                let ranges = total.and_then(|total| by_e820(map, total));
                more.extend(ranges.and_then(|r| self.candidate(&order, &r, BY_GUEST)));
            }
        } else {
            more.extend(self.raw_by(map));
        }
        let todo = std::mem::take(&mut self.todo);
        self.todo = todo.chain(more).collect::<Vec<_>>().into_iter();
    }

    /// The layout of a raw file by the guest's map.
    fn raw_by(&self, map: &[GpaRange]) -> Option<Candidate> {
        let ranges = by_e820(map, self.len)?;
        Some(Candidate {
            boot: Some(RamLayout::new(ranges.clone()).ok()?),
            layout: Some(LayoutSpec::Ranges(ranges)),
            guess: Vec::new(),
            guessed: false,
            sole: false,
            origin: BY_GUEST,
        })
    }

    /// Whether the guest's map fits another layout of a raw file than `boot`.
    pub(super) fn fits_another(&self, boot: &RamLayout, map: &[GpaRange]) -> bool {
        let other = self.raw_by(map).and_then(|other| other.boot);
        other.is_some_and(|other| other != *boot && is_boot_ram(&other, map))
    }

    /// Whether the guest can show that the blocks it boots with are where `places` has them: its
    /// kernel keeps struct pages in each but one, which would not fit its lists if they were read
    /// from another block. That one is told by the others.
    pub(super) fn shows_in_place(&self, places: &[BlockPlace], structs: &[GpaRange]) -> bool {
        let ram = self.ram();
        let boot = |place: &&BlockPlace| ram.iter().any(|block| block.name == place.name);
        let boot: Vec<&BlockPlace> = places.iter().filter(boot).collect();
        let found = |place: &&&BlockPlace| {
            let mut ranges = place.ranges.iter();
            ranges.any(|range| structs.iter().any(|s| !s.intersection(range).is_empty()))
        };
        // All but one at most.
        let not_found = boot.iter().filter(|place| !found(place)).count();
        not_found <= 1
    }
}

/// Takes `len` bytes off the front of `ranges`.
fn take(ranges: &mut Vec<GpaRange>, len: u64) -> Option<Vec<GpaRange>> {
    let mut taken = Vec::new();
    let mut left = len;
    while left > 0 {
        let first = ranges.first_mut()?;
        let part = GpaRange::with_len(first.start(), first.len().min(left))?;
        *first = GpaRange::new(part.end(), first.end());
        left = left.checked_sub(part.len())?;
        if first.is_empty() {
            ranges.remove(0);
        }
        taken.push(part);
    }
    Some(taken)
}

/// The ranges of `len` bytes of RAM by the guest's map: some below 4 GiB, the rest from there on.
fn by_e820(e820: &[GpaRange], len: u64) -> Option<Vec<GpaRange>> {
    let gib_4 = Gpa::new(1 << 32);
    let end = e820.iter().map(GpaRange::end).max()?;
    let high = GpaRange::new(gib_4, end.max(gib_4));
    let low = GpaRange::with_len(Gpa::ZERO, len.checked_sub(high.len())?)?;
    if low.is_empty() || low.end() > gib_4 {
        return None;
    }
    let mut ranges = vec![low, high];
    ranges.retain(|range| !range.is_empty());
    Some(ranges)
}

/// Adds every order of two and more of `blocks`, up to a limit.
fn add_orders<'b>(
    blocks: &[&'b RamBlock],
    begun: &mut Vec<&'b RamBlock>,
    orders: &mut Vec<Vec<&'b RamBlock>>,
) {
    for block in blocks {
        if begun.contains(block) {
            continue;
        }
        if orders.len() >= MAX_ATTEMPTS {
            return;
        }
        begun.push(block);
        if begun.len() > 1 && !orders.contains(begun) {
            orders.push(begun.clone());
        }
        add_orders(blocks, begun, orders);
        begun.pop();
    }
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::indexing_slicing,
        reason = "tests may stop anywhere"
    )]

    use super::{Candidates, MAX_ATTEMPTS, MAX_SEARCHED, by_e820, take};
    use sonicshot::{Gpa, GpaRange};
    use sonicshot_dump::{Dump, LayoutSpec, RamBlock};

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    fn range(start: u64, end: u64) -> GpaRange {
        GpaRange::new(Gpa::new(start), Gpa::new(end))
    }

    #[test]
    fn the_map_tells_where_ram_is_split() {
        let map = [range(MIB, 2 * GIB - 0x2_6000), range(4 * GIB, 6 * GIB)];
        let layout = by_e820(&map, 4 * GIB).unwrap();
        assert_eq!(layout, [range(0, 2 * GIB), range(4 * GIB, 6 * GIB)]);
        let low = by_e820(&[range(MIB, GIB)], GIB).unwrap();
        assert_eq!(low, [range(0, GIB)]);
        assert_eq!(by_e820(&map, GIB), None);
        assert_eq!(by_e820(&map, 9 * GIB), None);
        assert_eq!(by_e820(&[], GIB), None);
    }

    #[test]
    fn blocks_take_their_parts_in_order() {
        let mut ranges = vec![range(0, 0x3000), range(0x10000, 0x14000)];
        let first = take(&mut ranges, 0x4000).unwrap();
        assert_eq!(first, [range(0, 0x3000), range(0x10000, 0x11000)]);
        let second = take(&mut ranges, 0x3000).unwrap();
        assert_eq!(second, [range(0x11000, 0x14000)]);
        assert_eq!(take(&mut ranges, 1), None);
    }

    /// So many blocks of memory, as a migration stream of QEMU's has them.
    fn blocks(count: usize) -> Vec<RamBlock> {
        const LEN: u64 = 4096;
        let mut bytes = b"QEVM\0\0\0\x03\x07\0\0\0\x0epc-i440fx-10.0\x01\0\0\0\x02\x03ram".to_vec();
        bytes.extend([0, 0, 0, 0, 0, 0, 0, 4]);
        bytes.extend(((count as u64 * LEN) | 4).to_be_bytes());
        for number in 0..count {
            let name = format!("node{number}");
            bytes.push(u8::try_from(name.len()).unwrap());
            bytes.extend(name.as_bytes());
            bytes.extend(LEN.to_be_bytes());
        }
        let end = b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02";
        bytes.extend([&end[..], b"\x03\0\0\0\x02", end, b"\x04the devices' state"].concat());
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        let dump = Dump::open(file.path(), None).unwrap();
        assert_eq!(dump.ram_blocks().len(), count);
        dump.ram_blocks().to_vec()
    }

    #[test]
    fn what_is_searched_and_tried_is_bounded() {
        let specs = LayoutSpec::KNOWN.to_vec();
        let of = |count| Candidates::new(blocks(count), specs.clone(), 0, false);
        assert!(of(MAX_SEARCHED).is_ok());
        assert_eq!(of(MAX_SEARCHED + 1).err(), Some(MAX_SEARCHED + 1));
        // Of four blocks all orders of some of them are there, of five there are more.
        assert_eq!(of(4).unwrap().orders().0.len(), 64);
        assert_eq!(of(5).unwrap().orders().0.len(), MAX_ATTEMPTS);
        let mut many = of(5).unwrap();
        assert!(many.todo.len() > MAX_ATTEMPTS);
        assert_eq!(std::iter::from_fn(|| many.next()).count(), MAX_ATTEMPTS);
        let mut few = of(1).unwrap();
        let all = few.todo.len();
        assert_eq!(std::iter::from_fn(|| few.next()).count(), all);
    }
}
