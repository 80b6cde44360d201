//! Every struct page, one after the other.

use super::marks::{LISTED, ORDER, PCP, TORN, list_of};
use super::{BlockDisagreement, Disagreements};
use crate::error::VmiError;
use crate::mm::mem_map::{MemMap, Span};
use crate::mm::offline::OfflineSections;
use crate::mm::page::file::Files;
use crate::mm::page::{FreeMark, PageLayout};
use crate::{AddressSpace, KernelVa};
use sonicshot::{GuestBytes, PageClass, Pfn, PfnRange, to_u64};
use std::collections::BTreeMap;

/// A block that began and whose remaining frames must be looked at.
struct OpenBlock {
    frames: PfnRange,
    class: PageClass,
    /// The frame that has to be looked at next: there may be frames without a struct page.
    next: Pfn,
    spoiled: Option<Pfn>,
}

/// The part of a block behind its first frame that was looked at.
struct Tails {
    /// The number of frames.
    frames: usize,
    /// The block, if it ended there and is none.
    spoiled: Option<OpenBlock>,
}

/// The sources that all pieces of RAM share, which several threads look at.
#[derive(Clone, Copy)]
pub(super) struct Sources<'a, 'm> {
    pub(super) mem_map: &'a MemMap<'m>,
    /// The kernel's half, for what struct pages point to.
    pub(super) space: &'a AddressSpace<'m>,
    pub(super) layout: &'a PageLayout,
    pub(super) max_order: u64,
    /// The ranges that the zones span.
    pub(super) zones: &'a [PfnRange],
    /// Sections that may be offline: what points into them is looked for.
    pub(super) offline: &'a OfflineSections,
    /// Whether a block on no list is only counted.
    pub(super) keeps_unlisted: bool,
}

/// The findings in the struct pages of one piece, or of all together.
#[derive(Default)]
pub(super) struct Seen {
    /// Pages in blocks with the buddy mark, by zone.
    pub(super) flagged: Vec<u64>,
    pub(super) wrong: Disagreements,
    /// The first frame of an LRU list that goes into each of the sections that may be offline.
    pub(super) lru: BTreeMap<usize, Pfn>,
    /// Frames whose own struct page says that they are offline.
    pub(super) offline_pages: Vec<Pfn>,
    /// Blocks with the buddy mark that are on no list, where they are only counted.
    pub(super) unlisted: u64,
}

impl Seen {
    /// Nothing yet, of so many zones.
    pub(super) fn of_zones(count: usize) -> Self {
        Self {
            flagged: vec![0; count],
            ..Self::default()
        }
    }

    /// Adds what the next piece says.
    pub(super) fn add(&mut self, piece: Self) -> Result<(), VmiError> {
        for (flagged, more) in self.flagged.iter_mut().zip(piece.flagged) {
            VmiError::count("pages of free blocks", flagged, more)?;
        }
        self.wrong.add(piece.wrong);
        for (section, by) in piece.lru {
            self.lru.entry(section).or_insert(by);
        }
        self.offline_pages.extend(piece.offline_pages);
        VmiError::count("free blocks in no list", &mut self.unlisted, piece.unlisted)
    }
}

/// The look at the struct pages of one piece, a part of a range of RAM.
struct Scanner<'a, 'm> {
    mem_map: &'a MemMap<'m>,
    space: &'a AddressSpace<'m>,
    layout: &'a PageLayout,
    max_order: u64,
    zones: &'a [PfnRange],
    offline: &'a OfflineSections,
    keeps_unlisted: bool,
    seen: Seen,
    open: Option<OpenBlock>,
    /// The head that was last looked up for a tail page, and its class.
    last_head: Option<(KernelVa, PageClass)>,
    files: Files,
}

/// The place of `pfn` in what is kept of each frame of `region`.
fn index_in(region: PfnRange, pfn: Pfn) -> Result<usize, VmiError> {
    pfn.offset_from(region.start())
        .and_then(|offset| usize::try_from(offset).ok())
        .ok_or_else(|| out_of_region(pfn))
}

fn out_of_region(pfn: Pfn) -> VmiError {
    VmiError::Unsupported {
        what: format!("a struct page of frame {pfn}, outside the range of RAM that is looked at"),
    }
}

impl Sources<'_, '_> {
    /// Gives the frames of a piece their classes, by `marks` and their struct pages.
    pub(super) fn piece(
        self,
        frames: PfnRange,
        marks: &[u8],
    ) -> Result<(Vec<PageClass>, Seen), VmiError> {
        let mut scanner = Scanner {
            mem_map: self.mem_map,
            space: self.space,
            layout: self.layout,
            max_order: self.max_order,
            zones: self.zones,
            offline: self.offline,
            keeps_unlisted: self.keeps_unlisted,
            seen: Seen::of_zones(self.zones.len()),
            open: None,
            last_head: None,
            files: Files::of_frames(frames.len()),
        };
        let mut classes = vec![PageClass::Hole; marks.len()];
        scanner.region(frames, &mut classes, marks)?;
        Ok((classes, scanner.seen))
    }
}

impl Scanner<'_, '_> {
    fn region(
        &mut self,
        frames: PfnRange,
        classes: &mut [PageClass],
        marks: &[u8],
    ) -> Result<(), VmiError> {
        let index = |pfn: Pfn| index_in(frames, pfn);
        let spans = self.mem_map.spans();
        let first = spans.partition_point(|span| span.frames.end() <= frames.start());
        for span in spans.iter().skip(first) {
            let part = span.frames.intersection(&frames);
            if part.is_empty() {
                break;
            }
            if !span.online {
                // Until it is proved to be offline.
                let bounds = index(part.start())?..index(part.end())?;
                let part = classes
                    .get_mut(bounds)
                    .ok_or_else(|| out_of_region(part.start()))?;
                part.fill(PageClass::Unknown);
                continue;
            }
            let at = self
                .mem_map
                .page_va(part.start())
                .ok_or(VmiError::Corrupt {
                    what: "mem_map",
                    at: span.at,
                    value: part.start().raw(),
                })?;
            let span = Span {
                frames: part,
                at,
                ..*span
            };
            let mem_map = self.mem_map;
            mem_map.visit_span(&span, &mut |first, pages| {
                let begin = index(first)?;
                self.span(first, pages, frames, (&mut *classes, marks), begin)
            })?;
        }
        // A block that begins in this piece and does not end in it is no block: of those that a
        // list names none is longer than a piece, or goes on where there is no RAM.
        if let Some(open) = self.open.take() {
            self.spoil(&open, classes, frames)?;
        }
        Ok(())
    }

    /// Classifies the frames from `first` whose struct pages are `pages`; `begin` is the index
    /// of `first` in the classes and marks of `region`.
    fn span(
        &mut self,
        first: Pfn,
        pages: GuestBytes<'_>,
        region: PfnRange,
        (classes, marks): (&mut [PageClass], &[u8]),
        begin: usize,
    ) -> Result<(), VmiError> {
        // A block in which a struct page is missing is no block.
        if let Some(open) = self.open.take_if(|open| open.next != first) {
            self.spoil(&open, classes, region)?;
        }
        let stride = self.mem_map.stride_len()?;
        let mut number = 0_usize;
        while let Some(page) = number
            .checked_mul(stride)
            .and_then(|at| pages.get(at, stride))
        {
            let pfn = first.checked_add(to_u64(number));
            let pfn = pfn.ok_or_else(|| out_of_region(first))?;
            let index = begin
                .checked_add(number)
                .ok_or_else(|| out_of_region(pfn))?;
            if let Some(open) = self.open.take() {
                let inside = self.tails(open, (pages, number), (&mut *classes, marks), index)?;
                if let Some(open) = inside.spoiled {
                    self.spoil(&open, classes, region)?;
                }
                let next = number.checked_add(inside.frames);
                number = next.ok_or_else(|| out_of_region(pfn))?;
                continue;
            }
            let mark = marks.get(index).ok_or_else(|| out_of_region(pfn))?;
            let class = self.head(pfn, &page, *mark)?;
            if let Some(slot) = classes.get_mut(index) {
                *slot = class;
            }
            number = number.checked_add(1).ok_or_else(|| out_of_region(pfn))?;
        }
        Ok(())
    }

    /// Looks at what of a block that began is in `pages` from the struct page `number` on, whose
    /// frame's class is at `index`: at least one frame.
    fn tails(
        &mut self,
        mut open: OpenBlock,
        (pages, number): (GuestBytes<'_>, usize),
        (classes, marks): (&mut [PageClass], &[u8]),
        index: usize,
    ) -> Result<Tails, VmiError> {
        let next = open.next;
        let wrong = || out_of_region(next);
        let stride = self.mem_map.stride_len()?;
        let there = pages.len().checked_div(stride);
        let there = there.and_then(|there| there.checked_sub(number));
        let left = open.frames.end().offset_from(next);
        let left = left.and_then(|left| usize::try_from(left).ok());
        let frames = there.zip(left).map(|(there, left)| there.min(left));
        let frames = frames.filter(|frames| *frames > 0).ok_or_else(wrong)?;
        let bounds = index..index.checked_add(frames).ok_or_else(wrong)?;
        let marks = marks.get(bounds.clone()).ok_or_else(wrong)?;
        if open.spoiled.is_none() {
            let begin = number.checked_mul(stride).ok_or_else(wrong)?;
            let starts = (begin..).step_by(stride);
            let odd = marks.iter().zip(starts).position(|(mark, at)| {
                let page = pages.get(at, stride);
                *mark != 0 || !page.is_some_and(|page| self.layout.is_free_tail(&page))
            });
            if let Some(odd) = odd {
                open.spoiled = Some(next.checked_add(to_u64(odd)).ok_or_else(wrong)?);
            }
        }
        classes.get_mut(bounds).ok_or_else(wrong)?.fill(open.class);
        open.next = next.checked_add(to_u64(frames)).ok_or_else(wrong)?;
        let mut spoiled = None;
        if open.next != open.frames.end() {
            self.open = Some(open);
        } else if open.spoiled.is_some() {
            spoiled = Some(open);
        }
        Ok(Tails { frames, spoiled })
    }

    /// Takes back what was said of a block, and counts it as a disagreement.
    fn spoil(
        &mut self,
        open: &OpenBlock,
        classes: &mut [PageClass],
        region: PfnRange,
    ) -> Result<(), VmiError> {
        let (first, end) = (open.frames.start(), open.frames.end());
        // A block that does not end in the region ends there.
        let bounds = index_in(region, first)?..index_in(region, end.min(region.end()))?;
        let block = classes
            .get_mut(bounds)
            .ok_or_else(|| out_of_region(first))?;
        block.fill(PageClass::Unknown);
        let frames = open.frames;
        self.seen.wrong.block(|| match open.spoiled {
            Some(pfn) => BlockDisagreement::InUse { frames, pfn },
            None => BlockDisagreement::Incomplete { frames },
        });
        Ok(())
    }

    /// Classifies a frame that is not inside a free block; may begin one.
    fn head(&mut self, pfn: Pfn, page: &GuestBytes<'_>, mark: u8) -> Result<PageClass, VmiError> {
        let listed_order = u64::from(mark & ORDER);
        match self.layout.free_mark(page) {
            Some(FreeMark::Buddy { order }) => {
                self.count_flagged(pfn, order)?;
                let agreed = mark & (LISTED | PCP | TORN) == LISTED
                    && order <= self.max_order
                    && order == listed_order
                    && self.layout.is_unused(page);
                if mark == 0 && self.keeps_unlisted {
                    VmiError::count("free blocks in no list", &mut self.seen.unlisted, 1)?;
                    return Ok(PageClass::Unknown);
                }
                if !agreed {
                    let list = list_of(mark);
                    self.seen
                        .wrong
                        .block(|| BlockDisagreement::OtherwiseListed { pfn, order, list });
                    return Ok(PageClass::Unknown);
                }
                self.begin(pfn, order, PageClass::FreeBuddy);
                return Ok(PageClass::FreeBuddy);
            }
            Some(FreeMark::None) if mark & (LISTED | PCP | TORN) == LISTED | PCP => {
                if self.layout.is_unused_and_untyped(page) {
                    self.begin(pfn, listed_order, PageClass::FreePcp);
                    return Ok(PageClass::FreePcp);
                }
                let wrong = &mut self.seen.wrong;
                wrong.block(|| BlockDisagreement::PerCpuInUse { pfn });
                return Ok(PageClass::Unknown);
            }
            Some(FreeMark::None) if mark & LISTED != 0 => {
                let list = list_of(mark);
                let wrong = &mut self.seen.wrong;
                wrong.block(|| BlockDisagreement::Unmarked { pfn, list });
                return Ok(PageClass::Unknown);
            }
            _ => {}
        }
        if self.layout.is_hwpoison(page) {
            return Ok(PageClass::HwPoison);
        }
        if !self.offline.is_empty() && self.layout.is_on_lru(page) {
            let Some(nodes) = self.layout.lru_nodes(page) else {
                return Ok(PageClass::Unknown);
            };
            for section in nodes
                .into_iter()
                .filter_map(|node| self.offline.suspect_of(node))
            {
                self.seen.lru.entry(section).or_insert(pfn);
            }
        }
        let class = self.used(pfn, page)?;
        if class != PageClass::Offline {
            return Ok(class);
        }
        // Its own word alone: its driver is asked in the end. Of a folio only the head has a word.
        let own = self.mem_map.page_va(pfn);
        if own.is_some_and(|at| self.layout.head_of(page, at).is_none()) {
            self.seen.offline_pages.push(pfn);
        }
        Ok(PageClass::Unknown)
    }

    fn begin(&mut self, pfn: Pfn, order: u64, class: PageClass) {
        let frames = u32::try_from(order)
            .ok()
            .and_then(|order| 1_u64.checked_shl(order))
            .and_then(|len| PfnRange::with_len(pfn, len));
        if let Some(frames) = frames
            && let Some(next) = pfn.checked_add(1)
            && frames.len() > 1
        {
            self.open = Some(OpenBlock {
                frames,
                class,
                next,
                spoiled: None,
            });
        }
    }

    fn count_flagged(&mut self, pfn: Pfn, order: u64) -> Result<(), VmiError> {
        let zone = self.zones.iter().position(|span| span.contains(pfn));
        if let Some(flagged) = zone.and_then(|zone| self.seen.flagged.get_mut(zone)) {
            let pages = u32::try_from(order)
                .ok()
                .filter(|order| u64::from(*order) <= self.max_order)
                .and_then(|order| 1_u64.checked_shl(order))
                .unwrap_or(1);
            VmiError::count("pages of free blocks", flagged, pages)?;
        }
        Ok(())
    }

    /// The class of a frame in use: that of the folio it belongs to.
    fn used(&mut self, pfn: Pfn, page: &GuestBytes<'_>) -> Result<PageClass, VmiError> {
        let Some(at) = self.mem_map.page_va(pfn) else {
            return Ok(PageClass::Unknown);
        };
        let page_bytes = self.mem_map.page_size.bytes();
        let head = match self.layout.head_of(page, at) {
            Some(head) => head,
            // hugetlb pages with an optimised vmemmap (5.18 to 7.0) show their head's struct page
            // again at the start of each page of struct pages; the next one tells the true head.
            None if self.layout.is_head(page) && at.raw().is_multiple_of(page_bytes) => {
                match self.fake_head(at) {
                    Some(head) => head,
                    None => at,
                }
            }
            None => at,
        };
        if head == at {
            let stride = self.mem_map.stride;
            let class = self.layout.class(page, &|offset| {
                if offset.checked_add(8).is_some_and(|end| end <= stride) {
                    page.u64_at(usize::try_from(offset).ok()?)
                } else {
                    self.mem_map.u64_at(at.checked_add(offset)?).ok()
                }
            });
            let (space, files) = (self.space, &mut self.files);
            return Ok(self.layout.class_in_file(page, class, space, files));
        }
        if let Some((last, class)) = self.last_head
            && last == head
        {
            return Ok(class);
        }
        let Some(_) = self.mem_map.frame_of(head) else {
            return Ok(PageClass::Unknown);
        };
        let mut copy = [0_u8; 256];
        let Some(copy) = copy.get_mut(..self.mem_map.stride_len()?) else {
            return Ok(PageClass::Unknown);
        };
        self.mem_map.copy_pages(head, copy)?;
        let copy = GuestBytes::from_slice(copy);
        let class = self.layout.class(&copy, &|offset| {
            self.mem_map.u64_at(head.checked_add(offset)?).ok()
        });
        let (space, files) = (self.space, &mut self.files);
        let class = self.layout.class_in_file(&copy, class, space, files);
        // A head that is itself unused says nothing of its tails.
        self.last_head = Some((head, class));
        Ok(class)
    }

    fn fake_head(&self, at: KernelVa) -> Option<KernelVa> {
        let mut copy = [0_u8; 256];
        let copy = copy.get_mut(..usize::try_from(self.mem_map.stride).ok()?)?;
        let next = at.checked_add(self.mem_map.stride)?;
        self.mem_map.copy_pages(next, copy).ok()?;
        self.layout.head_of(&GuestBytes::from_slice(copy), next)
    }
}

#[cfg(test)]
mod tests {
    use super::{LISTED, Scanner, Seen};
    use crate::kernel::testing::{DIRECT_MAP, Ram, kernel, page_facts};
    use crate::mm::mem_map::MemMap;
    use crate::mm::offline::OfflineSections;
    use crate::mm::page::PageLayout;
    use crate::mm::page::file::Files;
    use sonicshot::{GuestBytes, PageClass, Pfn, PfnRange};

    const ARRAY: u64 = 0x10_0000;
    const FRAMES: usize = 2048;

    #[test]
    fn a_block_in_which_struct_pages_are_missing_is_none_and_no_more_is_free_for_it() {
        let mut facts = page_facts();
        facts.member("page", "compound_head", 8);
        facts.constants.insert("PAGE_BUDDY_MAPCOUNT_VALUE", -129);
        facts.constants.insert("PAGE_OFFLINE_MAPCOUNT_VALUE", -257);
        facts.symbols.insert("mem_map", DIRECT_MAP + 0x1000);
        facts.symbols.insert("max_mapnr", DIRECT_MAP + 0x1008);
        let mut ram = Ram::new(8 << 20);
        ram.put(0x1000, DIRECT_MAP + ARRAY);
        ram.put(0x1008, FRAMES as u64);
        for pfn in 0..FRAMES as u64 {
            // Nobody maps it. Those behind the block have a user.
            let users = u64::from(pfn >= 1024) << 32;
            ram.put(ARRAY + pfn * 64 + 48, 0xffff_ffff | users);
        }
        // Of order 10, with the buddy mark.
        ram.put(ARRAY + 40, 10);
        ram.put(ARRAY + 48, 0xffff_ff7f);
        let memory = ram.memory();
        let kernel = kernel(&memory, facts);
        let mem_map = MemMap::new(&kernel).unwrap();
        let layout = PageLayout::new(&kernel, 64).unwrap();
        let region = PfnRange::new(Pfn::new(0), Pfn::new(FRAMES as u64));
        let look = |parts: &[(u64, u64)]| {
            let offline = OfflineSections::default();
            let mut scanner = Scanner {
                mem_map: &mem_map,
                space: &kernel.space,
                layout: &layout,
                max_order: 10,
                zones: &[],
                offline: &offline,
                keeps_unlisted: false,
                seen: Seen::default(),
                open: None,
                last_head: None,
                files: Files::of_frames(FRAMES as u64),
            };
            let mut classes = vec![PageClass::Hole; FRAMES];
            let mut marks = vec![0; FRAMES];
            marks[0] = LISTED | 10;
            for (first, end) in parts {
                let mut bytes = vec![0; usize::try_from((end - first) * 64).unwrap()];
                let at = mem_map.page_va(Pfn::new(*first)).unwrap();
                for (number, page) in (0_u64..).zip(bytes.chunks_mut(64)) {
                    mem_map
                        .copy_pages(at.checked_add(number * 64).unwrap(), page)
                        .unwrap();
                }
                let begin = usize::try_from(*first).unwrap();
                let lists = (classes.as_mut_slice(), marks.as_slice());
                let pages = GuestBytes::from_slice(&bytes);
                scanner
                    .span(Pfn::new(*first), pages, region, lists, begin)
                    .unwrap();
            }
            (classes, scanner.seen.wrong.blocks)
        };
        let free = |classes: &[PageClass]| {
            let is_free = |class: &&PageClass| **class == PageClass::FreeBuddy;
            classes.iter().filter(is_free).count()
        };
        let (classes, wrong) = look(&[(0, 256), (256, 2048)]);
        assert_eq!((free(&classes), wrong), (1024, 0));
        // Frames without a struct page: the end of the block is never met.
        for parts in [[(0, 512), (1500, 2048)], [(0, 1023), (1024, 2048)]] {
            let (classes, wrong) = look(&parts);
            assert_eq!((free(&classes), wrong), (0, 1), "{parts:?}");
        }
    }
}
