//! From struct pages, free lists and counters to page classes.
//!
//! A frame counts as free only if its flag says so, its block is aligned and inside its zone,
//! the free list has it, linked in both directions, and no `struct page` of the block shows a
//! user. The kernel clears the flag before it hands a page out and sets it after it took the
//! page back (`del_page_from_free_list`, `__free_one_page` in `mm/page_alloc.c`), so a guest
//! stopped at any instruction has at most one block per processor on which these disagree.
//! Such a block is kept; more of them, and nothing is believed.

use super::marks::Marks;
use super::mem_map::{MemMap, Span};
use super::offline::{OfflinePages, OfflineSections};
use super::page::{FreeMark, PageLayout};
use super::zone::{Listed, ListedBlock, Zone, Zones};
use crate::KernelVa;
use crate::error::VmiError;
use crate::kernel::Kernel;
use crate::note::Note;
use core::fmt;
use sonicshot::work::{self, map_in_order};
use sonicshot::{GuestBytes, PageClass, PageMap, Pfn, PfnRange};
use std::collections::BTreeMap;
use std::num::NonZeroUsize;

/// What one zone's three sources of truth say about its free pages.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ZoneReport {
    /// The NUMA node.
    pub node: u64,
    /// The zone's name, such as `Normal`.
    pub name: String,
    /// The frames it spans, holes included.
    pub span: PfnRange,
    /// Pages in blocks that the free lists name.
    pub listed: u64,
    /// Pages in blocks whose head carries the buddy mark.
    pub flagged: u64,
    /// Pages by `nr_free` of every order.
    pub nr_free: u64,
    /// Pages by the counter `NR_FREE_PAGES`, the per-CPU deltas added and unaccepted pages
    /// subtracted; pages in isolated blocks are not in it.
    pub counter: i64,
    /// Listed pages that are in isolated blocks.
    pub isolated: u64,
    /// Pages on per-CPU lists, all processors together.
    pub pcp: u64,
}

/// Where free lists, page flags or counters disagree.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Inconsistency {
    /// Blocks on which flag, list and struct pages disagree; they are kept.
    pub blocks: u64,
    /// The first such blocks, and what is wrong with each.
    pub examples: Vec<String>,
    /// Disagreements of counters: which, and the numbers.
    pub counters: Vec<String>,
    /// How many blocks a stopped guest can explain: one for each processor.
    pub explained: u64,
    /// Every zone's numbers.
    pub zones: Vec<ZoneReport>,
}

impl fmt::Display for Inconsistency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the guest's sources of truth about free pages disagree on {} blocks (a stopped guest explains {})",
            self.blocks, self.explained
        )?;
        for text in self.counters.iter().chain(&self.examples) {
            write!(f, "; {text}")?;
        }
        Ok(())
    }
}

/// The result of looking at every struct page.
#[derive(Debug)]
pub(crate) struct Scan {
    pub map: PageMap,
    pub zones: Vec<ZoneReport>,
    /// Disagreements, if there are any; `fatal` if more than a stopped guest explains.
    pub disagreement: Option<Inconsistency>,
    pub fatal: bool,
    pub notes: Vec<Note>,
}

// What a mark says: which list names the frame as the head of a block, and of which order.
const LISTED: u8 = 0x80;
const TORN: u8 = 0x40;
const PCP: u8 = 0x20;
const ORDER: u8 = 0x1f;

/// Blocks on which the sources disagree.
#[derive(Default)]
struct Disagreements {
    blocks: u64,
    examples: Vec<String>,
    counters: Vec<String>,
    /// Counters off by more than is explained.
    fatal: bool,
}

impl Disagreements {
    /// So many are described.
    const EXAMPLES: usize = 8;

    fn block(&mut self, text: impl FnOnce() -> String) {
        self.blocks = self.blocks.saturating_add(1);
        if self.examples.len() < Self::EXAMPLES {
            self.examples.push(text());
        }
    }

    /// Adds what was found behind all that is there.
    fn add(&mut self, more: Self) {
        self.blocks = self.blocks.saturating_add(more.blocks);
        self.fatal |= more.fatal;
        self.counters.extend(more.counters);
        let room = Self::EXAMPLES.saturating_sub(self.examples.len());
        self.examples.extend(more.examples.into_iter().take(room));
    }
}

struct Walked {
    marks: Marks,
    zones: Vec<ZoneReport>,
    wrong: Disagreements,
}

/// Walks every free list, buddy and per-CPU, and holds them against the counters.
fn walk_lists(
    kernel: &Kernel<'_>,
    mem_map: &MemMap<'_>,
    zones: &Zones,
    lru: u64,
    map: &PageMap,
    notes: &mut Vec<Note>,
) -> Result<Walked, VmiError> {
    let mut marks = Marks::new(map);
    let mut wrong = Disagreements::default();
    let mut reports = Vec::new();
    // Also frames outside the dump's RAM may be listed.
    let mut frames_left = mem_map
        .spans()
        .iter()
        .fold(0_u64, |sum, span| sum.saturating_add(span.frames.len()));
    for zone in &zones.zones {
        let mut blocks = vec![0_u64; zone.nr_free.len()];
        let mut report = ZoneReport {
            node: zone.node,
            name: zone.name.clone(),
            span: zone.span,
            listed: 0,
            flagged: 0,
            nr_free: 0,
            counter: zone.counter.saturating_sub(zone.unaccepted),
            isolated: 0,
            pcp: 0,
        };
        zones.walk_free_lists(mem_map, kernel, zone, lru, &mut frames_left, &mut |found| {
            let block = note_listed(found, 0, zone, &mut marks, &mut wrong)?;
            let pages = 1_u64.checked_shl(block.order).unwrap_or(0);
            report.listed = report.listed.saturating_add(pages);
            if block.isolated {
                report.isolated = report.isolated.saturating_add(pages);
            }
            if let Some(count) = usize::try_from(block.order)
                .ok()
                .and_then(|order| blocks.get_mut(order))
            {
                *count = count.saturating_add(1);
            }
            Ok(())
        })?;
        check_counters(zone, zones, &blocks, &mut report, &mut wrong);
        if zones.no_pcp.is_none() {
            walk_pcp(
                kernel,
                mem_map,
                zones,
                zone,
                lru,
                &mut frames_left,
                &mut marks,
                &mut report,
                &mut wrong,
            )?;
        }
        reports.push(report);
    }
    if let Some(why) = &zones.no_pcp {
        notes.push(Note::PerCpuListsKept { why: why.clone() });
    }
    Ok(Walked {
        marks,
        zones: reports,
        wrong,
    })
}

/// Marks a listed block, if it can be one.
fn note_listed(
    found: Listed,
    kind: u8,
    zone: &Zone,
    marks: &mut Marks,
    wrong: &mut Disagreements,
) -> Result<ListedBlock, VmiError> {
    let (block, torn) = match found {
        Listed::Block(block) => (block, 0),
        Listed::Torn(block) => (block, TORN),
    };
    let ListedBlock { head, order, .. } = block;
    let frames = 1_u64
        .checked_shl(order)
        .and_then(|len| PfnRange::with_len(head, len))
        .ok_or(VmiError::Corrupt {
            what: "a free block",
            at: zone.at,
            value: head.raw(),
        })?;
    let in_zone = zone.span.intersection(&frames) == frames;
    if in_zone && head.is_aligned(order) && marks.is_elsewhere(&frames) {
        return Ok(block);
    }
    let inside = in_zone && marks.covers(&frames);
    if !head.is_aligned(order) || !inside {
        wrong.block(|| {
            format!(
                "block {frames} of order {order} is listed in zone {} of {}, not aligned or not inside its RAM",
                zone.name, zone.span
            )
        });
        return Ok(block);
    }
    let slot = marks.slot(head).filter(|slot| **slot == 0);
    let Some(slot) = slot else {
        return Err(VmiError::Corrupt {
            what: "a free list that names a frame twice",
            at: zone.at,
            value: head.raw(),
        });
    };
    *slot = LISTED | kind | torn | (u8::try_from(order).unwrap_or(ORDER) & ORDER);
    Ok(block)
}

#[allow(clippy::too_many_arguments, reason = "one call, split for length")]
fn walk_pcp(
    kernel: &Kernel<'_>,
    mem_map: &MemMap<'_>,
    zones: &Zones,
    zone: &Zone,
    lru: u64,
    frames_left: &mut u64,
    marks: &mut Marks,
    report: &mut ZoneReport,
    wrong: &mut Disagreements,
) -> Result<(), VmiError> {
    let mut found = Vec::new();
    let counts = zones.walk_pcp_lists(mem_map, kernel, zone, lru, frames_left, &mut |listed| {
        found.push(listed);
        Ok(())
    })?;
    let mut found = found.into_iter();
    for (cpu, (count, listed)) in counts.into_iter().enumerate() {
        // The blocks of this processor: as many as add up to what it listed.
        let mut left = listed;
        let mut blocks = Vec::new();
        while left > 0 {
            let Some(next) = found.next() else { break };
            let (Listed::Block(block) | Listed::Torn(block)) = next;
            left = left.saturating_sub(1_u64.checked_shl(block.order).unwrap_or(0));
            blocks.push(next);
        }
        if count != listed {
            // Stopped between filling the list and counting it: all of this list is kept.
            wrong.block(|| {
                format!(
                    "per-CPU lists of processor {cpu} in zone {} hold {listed} pages, its counter says {count}",
                    zone.name
                )
            });
            continue;
        }
        for block in blocks {
            note_listed(block, PCP, zone, marks, wrong)?;
        }
        report.pcp = report.pcp.saturating_add(listed);
    }
    Ok(())
}

/// Holds the free lists of a zone against `nr_free` of each order and `NR_FREE_PAGES`.
fn check_counters(
    zone: &Zone,
    zones: &Zones,
    blocks: &[u64],
    report: &mut ZoneReport,
    wrong: &mut Disagreements,
) {
    let mut off = 0_u64;
    for (order, (listed, counted)) in (0_u32..).zip(blocks.iter().zip(&zone.nr_free)) {
        report.nr_free = report
            .nr_free
            .saturating_add(counted.checked_shl(order).unwrap_or(u64::MAX));
        if listed != counted {
            off = off.saturating_add(listed.abs_diff(*counted));
            wrong.counters.push(format!(
                "zone {} lists {listed} free blocks of order {order}, nr_free says {counted}",
                zone.name
            ));
        }
    }
    // `nr_free` changes beside the list, under the zone's lock: one block for the one holder,
    // and every processor may hold one zone's lock.
    if off > zones.cpus() {
        wrong.fatal = true;
    }
    // NR_FREE_PAGES changes once for an operation under the zone's lock, which moves at most one
    // block of the largest order (or one batch for a per-CPU list, which is smaller). Beside
    // that, a processor that folds its delta into the zone (`refresh_cpu_vm_stats`) has it in a
    // register: at most 127, the range of the delta's type.
    let bound = zones.cpus().saturating_mul(127).saturating_add(
        1_u64
            .checked_shl(u32::try_from(zones.max_order()).unwrap_or(0))
            .unwrap_or(0),
    );
    let listed = i64::try_from(report.listed.saturating_sub(report.isolated)).unwrap_or(i64::MAX);
    if listed.abs_diff(report.counter) > bound {
        wrong.fatal = true;
        wrong.counters.push(format!(
            "zone {} lists {listed} free pages, NR_FREE_PAGES says {} (at most {bound} apart in a stopped guest)",
            zone.name, report.counter
        ));
    }
}

/// A block that began and whose remaining frames must be looked at.
struct OpenBlock {
    frames: PfnRange,
    class: PageClass,
    spoiled: Option<Pfn>,
}

/// Frames that are looked at together, as a binary logarithm: their struct pages, mostly 512 KiB,
/// fit a processor's cache, and a small guest has a piece for each thread. A piece is never shorter
/// than the longest block of the buddy allocator.
const PIECE: u32 = 13;

/// What is the same for all pieces.
struct Scanner<'a, 'm> {
    mem_map: &'a MemMap<'m>,
    layout: &'a PageLayout,
    max_order: u64,
    /// What the zones span.
    zones: Vec<PfnRange>,
    /// Sections that may be offline: what points into them is looked for.
    offline: &'a OfflineSections,
}

/// What the struct pages of a piece say.
struct Piece<'a, 'm> {
    scanner: &'a Scanner<'a, 'm>,
    frames: PfnRange,
    /// Which list names each frame as the head of a block.
    marks: Vec<u8>,
    classes: Vec<PageClass>,
    /// Pages in blocks with the buddy mark, by zone.
    flagged: Vec<u64>,
    wrong: Disagreements,
    open: Option<OpenBlock>,
    /// The first frame of an LRU list that goes into each of the sections that may be offline.
    lru: BTreeMap<usize, Pfn>,
    /// Frames whose own struct page says that they are offline.
    offline_pages: Vec<Pfn>,
    /// The head that was last looked up for a tail page, and its class.
    last_head: Option<(KernelVa, PageClass)>,
}

/// Looks at every struct page, and gives every RAM frame its class.
pub(crate) fn scan(
    kernel: &Kernel<'_>,
    mem_map: &MemMap<'_>,
    layout: &PageLayout,
    zones: &Zones,
    threads: Option<NonZeroUsize>,
) -> Result<Scan, VmiError> {
    let mut notes = Vec::new();
    let mut map = PageMap::new(kernel.space.memory().layout(), mem_map.page_size);
    let Walked {
        marks,
        zones: mut reports,
        mut wrong,
    } = walk_lists(kernel, mem_map, zones, layout.lru, &map, &mut notes)?;
    let mut offline =
        OfflineSections::find(kernel, mem_map, zones, &|frames| marks.any_in(frames))?;
    let scanner = Scanner {
        mem_map,
        layout,
        max_order: zones.max_order(),
        zones: reports.iter().map(|zone| zone.span).collect(),
        offline: &offline,
    };
    let order = u32::try_from(scanner.max_order).map_or(PIECE, |order| order.max(PIECE));
    let pieces: Vec<PfnRange> = map.pieces(order).collect();
    let mut offline_pages = OfflinePages::default();
    let mut seen: BTreeMap<usize, Pfn> = BTreeMap::new();
    // Pieces are taken in their order, whichever thread had them: what is told is the same.
    map_in_order(
        work::threads(threads),
        pieces,
        || (),
        |(), frames| scanner.piece(frames, &marks),
        |piece: Result<Piece<'_, '_>, VmiError>| {
            let piece = piece?;
            map.set_each(piece.frames.start(), &piece.classes);
            wrong.add(piece.wrong);
            for (report, flagged) in reports.iter_mut().zip(piece.flagged) {
                report.flagged = report.flagged.saturating_add(flagged);
            }
            for (section, by) in piece.lru {
                seen.entry(section).or_insert(by);
            }
            piece
                .offline_pages
                .into_iter()
                .for_each(|pfn| offline_pages.push(pfn));
            Ok::<_, VmiError>(())
        },
    )?;
    for (section, by) in seen {
        offline.see(section, by);
    }
    for deferred in &zones.deferred {
        let frames = deferred.frames;
        notes.push(Note::DeferredKept { frames });
        map.set(deferred.frames, PageClass::Unknown);
    }
    offline.see_page_tables(kernel, &map)?;
    offline.settle(mem_map, &mut map, &mut notes);
    offline_pages.settle(kernel, mem_map, layout, &mut map, &mut notes)?;
    keep_mem_map(mem_map, &mut map, &mut wrong);
    let Disagreements {
        blocks,
        examples,
        counters,
        fatal,
    } = wrong;
    let explained = zones.cpus();
    let disagreement = (blocks > 0 || !counters.is_empty()).then(|| Inconsistency {
        blocks,
        examples,
        counters,
        explained,
        zones: reports.clone(),
    });
    Ok(Scan {
        map,
        zones: reports,
        fatal: fatal || blocks > explained,
        disagreement,
        notes,
    })
}

/// The struct pages themselves are in use, whatever they say: with `memmap_on_memory` an offline
/// section holds its own.
fn keep_mem_map(mem_map: &MemMap<'_>, map: &mut PageMap, wrong: &mut Disagreements) {
    let page_size = mem_map.page_size;
    for range in mem_map.own_memory() {
        let first = range.start().pfn(page_size);
        let end = range.end().raw().div_ceil(page_size.bytes());
        let frames = PfnRange::new(first, Pfn::new(end));
        map.with_slices(frames, |start, classes| {
            for (class, pfn) in classes.iter_mut().zip(start.raw()..) {
                match class {
                    PageClass::Offline => *class = PageClass::Kernel,
                    PageClass::FreeBuddy | PageClass::FreePcp => {
                        *class = PageClass::Unknown;
                        wrong.fatal = true;
                        wrong.block(|| {
                            format!("frame {pfn:#x} holds struct pages and counts as free")
                        });
                    }
                    _ => {}
                }
            }
        });
    }
}

impl<'a, 'm> Scanner<'a, 'm> {
    /// Classifies a piece of RAM.
    fn piece<'s>(&'s self, frames: PfnRange, marks: &'s Marks) -> Result<Piece<'s, 'm>, VmiError>
    where
        'a: 's,
    {
        // Without them nothing is said of the frames, and they are kept.
        let marks = marks.of(frames).unwrap_or_default();
        let mut piece = Piece {
            scanner: self,
            frames,
            classes: vec![PageClass::Hole; marks.len()],
            marks,
            flagged: vec![0; self.zones.len()],
            wrong: Disagreements::default(),
            open: None,
            lru: BTreeMap::new(),
            offline_pages: Vec::new(),
            last_head: None,
        };
        let spans = self.mem_map.spans();
        let first = spans.partition_point(|span| span.frames.end() <= frames.start());
        for span in spans.iter().skip(first) {
            let part = span.frames.intersection(&frames);
            if part.is_empty() {
                break;
            }
            piece.span(span, part)?;
        }
        // A block that begins here and does not end here is no block: of those that a list names
        // none is longer than a piece, or goes on where there is no RAM.
        if let Some(open) = piece.open.take() {
            piece.spoil(&open);
        }
        Ok(piece)
    }
}

impl Piece<'_, '_> {
    fn index(&self, pfn: Pfn) -> usize {
        // What is not in the piece is behind all of its classes.
        pfn.offset_from(self.frames.start())
            .and_then(|n| usize::try_from(n).ok())
            .unwrap_or(usize::MAX)
    }

    /// Gives all of `frames` one class.
    fn fill(&mut self, frames: PfnRange, class: PageClass) {
        let part = frames.intersection(&self.frames);
        let bounds = self.index(part.start())..self.index(part.end());
        if let Some(classes) = self.classes.get_mut(bounds) {
            classes.fill(class);
        }
    }

    /// Classifies the part of a span that is in the piece.
    fn span(&mut self, span: &Span, part: PfnRange) -> Result<(), VmiError> {
        if !span.online {
            // Until it is proved to be offline.
            self.fill(part, PageClass::Unknown);
            return Ok(());
        }
        let mem_map = self.scanner.mem_map;
        let at = mem_map.page_va(part.start()).ok_or(VmiError::Corrupt {
            what: "mem_map",
            at: span.at,
            value: part.start().raw(),
        })?;
        let span = Span {
            frames: part,
            at,
            ..*span
        };
        mem_map.visit_span(&span, &mut |first, pages| self.stretch(first, pages))
    }

    /// Classifies the frames from `first` whose struct pages are `pages`.
    fn stretch(&mut self, first: Pfn, pages: GuestBytes<'_>) -> Result<(), VmiError> {
        let stride = usize::try_from(self.scanner.mem_map.stride).unwrap_or(usize::MAX);
        let layout = self.scanner.layout;
        let begin = self.index(first);
        let count = pages.len().checked_div(stride).unwrap_or(0);
        for (number, at) in (0..count).zip((0_usize..).step_by(stride)) {
            let pfn = Pfn::new(first.raw().saturating_add(number as u64));
            let index = begin.saturating_add(number);
            let (Some(page), Some(mark)) = (pages.get(at, stride), self.marks.get(index)) else {
                break;
            };
            let mark = *mark;
            let Some(open) = &mut self.open else {
                let class = self.head(pfn, &page, mark)?;
                if let Some(slot) = self.classes.get_mut(index) {
                    *slot = class;
                }
                continue;
            };
            let is_free_tail = mark == 0
                && layout.is_unused(&page)
                && layout.free_mark(&page) == Some(FreeMark::None);
            if !is_free_tail && open.spoiled.is_none() {
                open.spoiled = Some(pfn);
            }
            if let Some(class) = self.classes.get_mut(index) {
                *class = open.class;
            }
            if pfn.checked_add(1) == Some(open.frames.end())
                && let Some(open) = self.open.take()
                && open.spoiled.is_some()
            {
                self.spoil(&open);
            }
        }
        Ok(())
    }

    /// Takes back what was said of a block, and counts it as a disagreement.
    fn spoil(&mut self, open: &OpenBlock) {
        self.fill(open.frames, PageClass::Unknown);
        self.wrong.block(|| match open.spoiled {
            Some(pfn) => format!(
                "block {} is free by flag and list, but the struct page of frame {pfn} shows a user",
                open.frames
            ),
            None => format!("block {} is free by flag and list, but leaves its RAM", open.frames),
        });
    }

    /// Classifies a frame that is not inside a free block; may begin one.
    fn head(&mut self, pfn: Pfn, page: &GuestBytes<'_>, mark: u8) -> Result<PageClass, VmiError> {
        let listed_order = u64::from(mark & ORDER);
        match self.scanner.layout.free_mark(page) {
            Some(FreeMark::Buddy { order }) => {
                self.count_flagged(pfn, order);
                let agreed = mark & (LISTED | PCP | TORN) == LISTED
                    && order <= self.scanner.max_order
                    && order == listed_order
                    && self.scanner.layout.is_unused(page);
                if !agreed {
                    self.wrong.block(|| {
                        format!(
                            "frame {pfn} is marked as a free block of order {order}, {}",
                            describe_mark(mark)
                        )
                    });
                    return Ok(PageClass::Unknown);
                }
                self.begin(pfn, order, PageClass::FreeBuddy);
                return Ok(PageClass::FreeBuddy);
            }
            Some(FreeMark::None) if mark & (LISTED | PCP | TORN) == LISTED | PCP => {
                if self.scanner.layout.is_unused_and_untyped(page) {
                    self.begin(pfn, listed_order, PageClass::FreePcp);
                    return Ok(PageClass::FreePcp);
                }
                self.wrong.block(|| {
                    format!(
                        "frame {pfn} is on a per-CPU free list, but its struct page shows a user"
                    )
                });
                return Ok(PageClass::Unknown);
            }
            Some(FreeMark::None) if mark & LISTED != 0 => {
                self.wrong.block(|| {
                    format!(
                        "frame {pfn} is {}, but has no mark of a free block",
                        describe_mark(mark)
                    )
                });
                return Ok(PageClass::Unknown);
            }
            _ => {}
        }
        if self.scanner.layout.is_hwpoison(page) {
            return Ok(PageClass::HwPoison);
        }
        let offline = self.scanner.offline;
        if !offline.is_empty() && self.scanner.layout.is_on_lru(page) {
            let lru = self.scanner.layout.lru;
            for at in [lru, lru.saturating_add(8)] {
                let node = usize::try_from(at).ok().and_then(|at| page.u64_at(at));
                let section = node.and_then(|node| offline.suspect_of(KernelVa::new(node)));
                if let Some(section) = section {
                    self.lru.entry(section).or_insert(pfn);
                }
            }
        }
        let class = self.used(pfn, page)?;
        if class != PageClass::Offline {
            return Ok(class);
        }
        // Its own word alone: its driver is asked in the end. Of a folio only the head has a word.
        let own = self.scanner.mem_map.page_va(pfn);
        if own.is_some_and(|at| self.scanner.layout.head_of(page, at).is_none()) {
            self.offline_pages.push(pfn);
        }
        Ok(PageClass::Unknown)
    }

    fn begin(&mut self, pfn: Pfn, order: u64, class: PageClass) {
        let frames = u32::try_from(order)
            .ok()
            .and_then(|order| 1_u64.checked_shl(order))
            .and_then(|len| PfnRange::with_len(pfn, len));
        if let Some(frames) = frames
            && frames.len() > 1
        {
            self.open = Some(OpenBlock {
                frames,
                class,
                spoiled: None,
            });
        }
    }

    fn count_flagged(&mut self, pfn: Pfn, order: u64) {
        let zone = self
            .scanner
            .zones
            .iter()
            .position(|span| span.contains(pfn));
        if let Some(flagged) = zone.and_then(|zone| self.flagged.get_mut(zone)) {
            let pages = u32::try_from(order)
                .ok()
                .filter(|order| u64::from(*order) <= self.scanner.max_order)
                .and_then(|order| 1_u64.checked_shl(order))
                .unwrap_or(1);
            *flagged = flagged.saturating_add(pages);
        }
    }

    /// The class of a frame in use: that of the folio it belongs to.
    fn used(&mut self, pfn: Pfn, page: &GuestBytes<'_>) -> Result<PageClass, VmiError> {
        let Some(at) = self.scanner.mem_map.page_va(pfn) else {
            return Ok(PageClass::Unknown);
        };
        let head = match self.scanner.layout.head_of(page, at) {
            Some(head) => head,
            // hugetlb pages with an optimised vmemmap (5.18 to 7.0) show their head's struct page
            // again at the start of each page of struct pages; the next one tells the true head.
            None if self.scanner.layout.is_head(page) && at.raw().is_multiple_of(4096) => {
                match self.fake_head(at) {
                    Some(head) => head,
                    None => at,
                }
            }
            None => at,
        };
        if head == at {
            let stride = self.scanner.mem_map.stride;
            return Ok(self.scanner.layout.class(page, &|offset| {
                if offset.saturating_add(8) <= stride {
                    page.u64_at(usize::try_from(offset).ok()?)
                } else {
                    self.scanner.mem_map.u64_at(at.checked_add(offset)?).ok()
                }
            }));
        }
        if let Some((last, class)) = self.last_head
            && last == head
        {
            return Ok(class);
        }
        let Some(_) = self.scanner.mem_map.frame_of(head) else {
            return Ok(PageClass::Unknown);
        };
        let mut copy = [0_u8; 256];
        let stride = usize::try_from(self.scanner.mem_map.stride).unwrap_or(0);
        let Some(copy) = copy.get_mut(..stride) else {
            return Ok(PageClass::Unknown);
        };
        self.scanner.mem_map.copy_page(head, copy)?;
        let class = self
            .scanner
            .layout
            .class(&GuestBytes::from_slice(copy), &|offset| {
                self.scanner.mem_map.u64_at(head.checked_add(offset)?).ok()
            });
        // A head that is itself unused says nothing of its tails.
        self.last_head = Some((head, class));
        Ok(class)
    }

    fn fake_head(&self, at: KernelVa) -> Option<KernelVa> {
        let mut copy = [0_u8; 256];
        let copy = copy.get_mut(..usize::try_from(self.scanner.mem_map.stride).ok()?)?;
        let next = at.checked_add(self.scanner.mem_map.stride)?;
        self.scanner.mem_map.copy_page(next, copy).ok()?;
        self.scanner
            .layout
            .head_of(&GuestBytes::from_slice(copy), next)
    }
}

fn describe_mark(mark: u8) -> String {
    let order = mark & ORDER;
    match mark & (LISTED | PCP | TORN) {
        0 => "on no free list".into(),
        LISTED => format!("on a free list of order {order}"),
        LISTED_PCP => format!("on a per-CPU free list of order {order}"),
        _ => format!("on a free list of order {order} that was being changed"),
    }
}

const LISTED_PCP: u8 = LISTED | PCP;
