//! Pages that lie in a file one by one, each behind a record of its own, in whatever order: where
//! each is, in little memory.
//!
//! Most come in order, a page or a note that it is zero after the other. A range of 512 pages in
//! which that is so costs 80 bytes; any other one the bytes of an offset for each page, as many as
//! the length of the file takes: 1.25 MiB for each GiB in a file of less than a TiB.

use sonicshot::{FileOffset, Gpa, GpaRange};

const PAGE: u64 = 4096;
/// Pages that are held together.
const CHUNK: u64 = 512;
const WORDS: usize = 8;
/// The length of the header before a page that follows another one.
const HEADER: u64 = 8;
/// A page that is only noted to be zero takes this much of the file.
const NOTE: u64 = 9;

/// The places of the pages of a block; `None` for one that is zero.
#[derive(Debug)]
pub(crate) struct PagePlaces {
    pages: u64,
    /// The bytes of an offset.
    width: usize,
    chunks: Vec<Chunk>,
}

#[derive(Debug)]
enum Chunk {
    Zero,
    InOrder(Box<InOrder>),
    /// The offset of each page, low byte first; 0 is no page's.
    Each(Box<[u8]>),
}

/// Pages one after the other, with the notes of those that are zero between them.
#[derive(Debug)]
struct InOrder {
    /// The offset of the first page that is not zero.
    base: u64,
    first: u64,
    last: u64,
    /// A bit for each page that is not zero.
    bits: [u64; WORDS],
}

impl InOrder {
    fn new(first: u64, base: u64) -> Self {
        let mut chunk = Self {
            base,
            first,
            last: first,
            bits: [0; WORDS],
        };
        chunk.mark(first);
        chunk
    }

    fn has(&self, page: u64) -> bool {
        let word = usize::try_from(page / 64).ok();
        let word = word.and_then(|word| self.bits.get(word));
        word.is_some_and(|word| word >> (page % 64) & 1 == 1)
    }

    fn mark(&mut self, page: u64) {
        let word = usize::try_from(page / 64).ok();
        if let Some(word) = word.and_then(|word| self.bits.get_mut(word)) {
            *word |= 1 << (page % 64);
        }
    }

    /// The number of pages before `page` that are there.
    fn before(&self, page: u64) -> u64 {
        let words = self.bits.iter().zip((0_u64..).step_by(64));
        let below = words.map(|(word, start)| {
            let before = page.checked_sub(start).map(u32::try_from);
            let below = match before {
                None => 0,
                Some(Ok(before)) => word & !u64::MAX.unbounded_shl(before),
                Some(Err(_)) => *word,
            };
            u64::from(below.count_ones())
        });
        below.sum()
    }

    fn get(&self, page: u64) -> Option<u64> {
        if !self.has(page) {
            return None;
        }
        let pages = self.before(page);
        let notes = page.checked_sub(self.first)?.checked_sub(pages)?;
        let behind = pages.checked_mul(PAGE + HEADER)?;
        self.base
            .checked_add(behind)?
            .checked_add(notes.checked_mul(NOTE)?)
    }

    /// Takes up a page at `place` if it is the next one in order.
    fn push(&mut self, page: u64, place: u64) -> Option<()> {
        let notes = page.checked_sub(self.last)?.checked_sub(1)?;
        let next = self.get(self.last)?.checked_add(PAGE + HEADER)?;
        let next = next.checked_add(notes.checked_mul(NOTE)?)?;
        (next == place).then(|| {
            self.mark(page);
            self.last = page;
        })
    }
}

impl Chunk {
    fn get(&self, page: u64, width: usize) -> Option<u64> {
        match self {
            Self::Zero => None,
            Self::InOrder(chunk) => chunk.get(page),
            Self::Each(places) => {
                let at = usize::try_from(page).ok()?.checked_mul(width)?;
                let bytes = places.get(at..at.checked_add(width)?)?;
                let place = bytes.iter().rev();
                let place = place.fold(0_u64, |place, byte| place << 8 | u64::from(*byte));
                (place != 0).then_some(place)
            }
        }
    }

    fn set(&mut self, page: u64, place: Option<u64>, width: usize) -> Option<()> {
        let is_done = match (&mut *self, place) {
            (Self::Zero, None) => true,
            (Self::Zero, Some(base)) => {
                *self = Self::InOrder(Box::new(InOrder::new(page, base)));
                true
            }
            (Self::InOrder(chunk), None) => !chunk.has(page),
            (Self::InOrder(chunk), Some(place)) => chunk.push(page, place).is_some(),
            (Self::Each(_), _) => false,
        };
        if is_done {
            return Some(());
        }
        if let Self::InOrder(_) = self {
            self.spell_out(width)?;
        }
        if let Self::Each(places) = self {
            put(places, page, place.unwrap_or(0), width)?;
        }
        Some(())
    }

    /// Writes down the place of each page.
    fn spell_out(&mut self, width: usize) -> Option<()> {
        let len = usize::try_from(CHUNK).ok()?.checked_mul(width)?;
        let mut places = vec![0; len].into_boxed_slice();
        for page in 0..CHUNK {
            if let Some(place) = self.get(page, width) {
                put(&mut places, page, place, width)?;
            }
        }
        *self = Self::Each(places);
        Some(())
    }
}

fn put(places: &mut [u8], page: u64, place: u64, width: usize) -> Option<()> {
    let at = usize::try_from(page).ok()?.checked_mul(width)?;
    let there = places.get_mut(at..at.checked_add(width)?)?;
    there.copy_from_slice(place.to_le_bytes().get(..width)?);
    Some(())
}

impl PagePlaces {
    /// `pages` pages, all zero, of a file of `file_len` bytes.
    pub(crate) fn new(pages: u64, file_len: u64) -> Self {
        let used = u64::BITS.abs_diff(file_len.leading_zeros());
        let chunks = pages.div_ceil(CHUNK);
        Self {
            pages,
            width: used.div_ceil(8).max(1) as usize,
            chunks: (0..chunks).map(|_| Chunk::Zero).collect(),
        }
    }

    fn chunk_of(page: u64) -> Option<(usize, u64)> {
        Some((usize::try_from(page / CHUNK).ok()?, page % CHUNK))
    }

    /// The offset of `page`, or `None` if it is zero.
    pub(crate) fn get(&self, page: u64) -> Option<FileOffset> {
        let (chunk, inside) = Self::chunk_of(page)?;
        let place = self.chunks.get(chunk)?.get(inside, self.width)?;
        Some(FileOffset::new(place))
    }

    /// Has `page` be at `place`, or zero. `None` if there is no such page.
    pub(crate) fn set(&mut self, page: u64, place: Option<FileOffset>) -> Option<()> {
        if page >= self.pages {
            return None;
        }
        let (chunk, inside) = Self::chunk_of(page)?;
        let place = place.map(FileOffset::raw);
        self.chunks.get_mut(chunk)?.set(inside, place, self.width)
    }

    /// The offset of each page; `None` for one that is zero.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Option<FileOffset>> + '_ {
        (0..self.pages).map(|page| self.get(page))
    }

    /// The first page from `page` on that is not zero.
    fn next(&self, page: u64) -> Option<u64> {
        let mut page = page;
        while page < self.pages {
            let (chunk, _) = Self::chunk_of(page)?;
            if let Some(Chunk::Zero) = self.chunks.get(chunk) {
                page = (page / CHUNK).checked_add(1)?.checked_mul(CHUNK)?;
            } else if self.get(page).is_some() {
                return Some(page);
            } else {
                page = page.checked_add(1)?;
            }
        }
        None
    }
}

/// A range of guest RAM that is a range of a block.
#[derive(Debug, Clone, Copy)]
struct Piece {
    guest: GpaRange,
    /// The number of the block, and where in it the range begins, in bytes.
    block: usize,
    start: u64,
}

/// Blocks of guest RAM whose pages lie in a file one by one.
#[derive(Debug)]
pub(crate) struct Scattered {
    /// Sorted and disjoint.
    pieces: Vec<Piece>,
    blocks: Vec<PagePlaces>,
}

impl Scattered {
    /// Each block with the ranges of guest RAM that it is, one after the other.
    pub(crate) fn new<'a>(blocks: impl Iterator<Item = (&'a [GpaRange], PagePlaces)>) -> Self {
        let (mut pieces, mut places) = (Vec::new(), Vec::new());
        for (block, (ranges, of_block)) in blocks.enumerate() {
            let mut start = 0_u64;
            for guest in ranges.iter().copied() {
                pieces.push(Piece {
                    guest,
                    block,
                    start,
                });
                // What is beyond 64 bits is beyond the block, too.
                let Some(end) = start.checked_add(guest.len()) else {
                    break;
                };
                start = end;
            }
            places.push(of_block);
        }
        pieces.sort_unstable_by_key(|piece| piece.guest);
        let blocks = places;
        Self { pieces, blocks }
    }

    pub(crate) fn ranges(&self) -> impl Iterator<Item = GpaRange> + '_ {
        self.pieces.iter().map(|piece| piece.guest)
    }

    /// The places of the pages of a block, by its number.
    pub(crate) fn block(&self, number: usize) -> Option<&PagePlaces> {
        self.blocks.get(number)
    }

    fn behind(&self, at: Gpa) -> usize {
        self.pieces.partition_point(|piece| piece.guest.end() <= at)
    }

    /// The part of `at..at+len` that is in one page: where it is in the file, unless it is zeroes,
    /// and its length.
    pub(crate) fn part(&self, at: Gpa, len: u64) -> Option<(Option<FileOffset>, u64)> {
        let piece = self.pieces.get(self.behind(at))?;
        let inside = at.offset_from(piece.guest.start())?;
        let in_block = piece.start.checked_add(inside)?;
        let in_page = in_block % PAGE;
        let left = piece.guest.len().checked_sub(inside)?;
        let len = len.min(left).min(PAGE.checked_sub(in_page)?);
        match self.blocks.get(piece.block)?.get(in_block / PAGE) {
            Some(place) => Some((Some(place.checked_add(in_page)?), len)),
            None => Some((None, len)),
        }
    }

    /// The first range of pages from `at` on that are not zero, before `end`.
    pub(crate) fn next_data(&self, at: Gpa, end: Gpa) -> Option<GpaRange> {
        for piece in self.pieces.get(self.behind(at)..)? {
            let from = piece.guest.start().max(at);
            if from >= end {
                break;
            }
            let places = self.blocks.get(piece.block)?;
            let inside = from.offset_from(piece.guest.start())?;
            let Some(first) = places.next(piece.start.checked_add(inside)? / PAGE) else {
                continue;
            };
            // Not all of a long run, which may be asked for again and again.
            let most = first.checked_add(CHUNK)?;
            let mut behind = first.checked_add(1)?;
            while behind < most && places.get(behind).is_some() {
                behind = behind.checked_add(1)?;
            }
            let guest = |page: u64| {
                let in_block = page.checked_mul(PAGE)?.max(piece.start);
                let inside = in_block.checked_sub(piece.start)?;
                piece.guest.start().checked_add(inside)
            };
            let data = GpaRange::new(guest(first)?.max(from), guest(behind)?);
            let data = data.intersection(&piece.guest);
            if !data.is_empty() {
                return Some(data);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::{CHUNK, Chunk, PAGE, PagePlaces, Scattered};
    use proptest::prelude::*;
    use sonicshot::{FileOffset, Gpa, GpaRange};

    /// The records of a stream: (page, whether it has data), with how much stands before each.
    fn walk(records: &[(u64, bool, u64)], mut each: impl FnMut(u64, Option<FileOffset>)) {
        let mut at = 100;
        for (page, has_data, before) in records {
            at += before;
            let place = at + 8;
            each(*page, has_data.then_some(FileOffset::new(place)));
            at = place + if *has_data { PAGE } else { 1 };
        }
    }

    #[test]
    fn pages_in_order_cost_little() {
        let records: Vec<_> = (0..100 * CHUNK)
            .map(|page| (page, page % 3 > 0, 0))
            .collect();
        let mut places = PagePlaces::new(100 * CHUNK, 1 << 40);
        walk(&records, |page, place| places.set(page, place).unwrap());
        let in_order = |chunk: &Chunk| matches!(chunk, Chunk::InOrder(_));
        assert!(places.chunks.iter().all(in_order));
        walk(&records, |page, place| assert_eq!(places.get(page), place));
        assert_eq!(places.width, 6);
        assert_eq!(PagePlaces::new(1, (1 << 40) - 1).width, 5);
        assert_eq!(places.set(100 * CHUNK, None), None);
    }

    #[test]
    fn pages_in_no_order_cost_five_bytes_each() {
        let pages = 20 * CHUNK;
        let records: Vec<_> = (0..pages).rev().map(|page| (page, true, 0)).collect();
        let mut places = PagePlaces::new(pages, (1 << 40) - 1);
        walk(&records, |page, place| places.set(page, place).unwrap());
        let cost = |chunk: &Chunk| match chunk {
            Chunk::Each(places) => places.len() as u64,
            _ => u64::MAX,
        };
        assert_eq!(places.chunks.iter().map(cost).sum::<u64>(), 5 * pages);
        walk(&records, |page, place| assert_eq!(places.get(page), place));
    }

    proptest! {
        #[test]
        fn the_last_record_of_a_page_counts(
            records in proptest::collection::vec(
                (0..3 * CHUNK, 1_u64..700, any::<bool>(), prop_oneof![8 => Just(0_u64), 1 => 1..99_u64]),
                1..12,
            ),
            cut in 0..2 * CHUNK,
            bits in any::<u64>(),
        ) {
            // Runs of pages in order, over each other.
            let pages = 3 * CHUNK;
            let records: Vec<_> = records.iter().flat_map(|(first, len, all, gap)| {
                (*first..pages.min(first + len)).map(move |page| {
                    let has_data = *all || bits >> (page % 64) & 1 == 1;
                    (page, has_data, if page == *first { *gap } else { 0 })
                })
            }).collect();
            let mut model = vec![None; usize::try_from(pages).unwrap()];
            let mut places = PagePlaces::new(pages, 1 << 30);
            walk(&records, |page, place| {
                places.set(page, place).unwrap();
                model[usize::try_from(page).unwrap()] = place;
            });
            prop_assert_eq!(places.iter().collect::<Vec<_>>(), model.clone());
            // In two ranges of the guest, the second half first.
            let first = GpaRange::with_len(Gpa::new(1 << 40), cut * PAGE).unwrap();
            let second = GpaRange::with_len(Gpa::new(1 << 30), (pages - cut) * PAGE).unwrap();
            let ranges = [first, second];
            let scattered = Scattered::new([(&ranges[..], places)].into_iter());
            for (page, place) in (0..).zip(&model) {
                let (range, inside) = if page < cut { (first, page) } else { (second, page - cut) };
                let at = range.start().checked_add(inside * PAGE + 5).unwrap();
                let (found, len) = scattered.part(at, 1 << 20).unwrap();
                let want = place.map(|place| place.checked_add(5).unwrap());
                prop_assert_eq!((found, len), (want, PAGE - 5));
            }
            for (range, from, to) in [(first, 0, cut), (second, cut, pages)] {
                let mut at = range.start();
                let mut there = Vec::new();
                while let Some(data) = scattered.next_data(at, range.end()) {
                    let page = |at: Gpa| at.offset_from(range.start()).unwrap() / PAGE + from;
                    there.extend(page(data.start())..page(data.end()));
                    at = data.end();
                }
                let want: Vec<u64> = (from..to)
                    .filter(|page| model[usize::try_from(*page).unwrap()].is_some())
                    .collect();
                prop_assert_eq!(there, want);
            }
        }
    }
}
