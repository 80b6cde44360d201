//! From struct pages, free lists and counters to page classes.
//!
//! A frame counts as free only if its flag says so, its block is aligned and inside its zone,
//! the free list has it, linked in both directions, and no `struct page` of the block shows a
//! user. The kernel clears the flag before it hands a page out and sets it after it took the
//! page back (`del_page_from_free_list`, `__free_one_page` in `mm/page_alloc.c`), so a guest
//! stopped at any instruction has at most one block per processor on which these disagree.
//! Such a block is kept; more of them, and nothing is believed.

use super::mem_map::{MemMap, Span};
use super::offline::{OfflinePages, OfflineSections};
use super::page::{FreeMark, PageLayout};
use super::zone::{Listed, ListedBlock, Zone, Zones};
use crate::KernelVa;
use crate::error::VmiError;
use crate::kernel::Kernel;
use crate::note::Note;
use crate::shape::Knowledge;
use core::fmt;
use sonicshot::{GuestBytes, PageClass, PageMap, Pfn, PfnRange};

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
    /// What was known of the kernel: with types missing, what was taken for its records may be
    /// something else.
    pub knowledge: Knowledge,
}

impl fmt::Display for Inconsistency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.knowledge != Knowledge::Types {
            f.write_str("types are missing, and ")?;
        }
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

/// One byte for every frame of the map: which list names the frame as the head of a block.
struct Marks(Vec<(PfnRange, Vec<u8>)>);

const LISTED: u8 = 0x80;
const TORN: u8 = 0x40;
const PCP: u8 = 0x20;
const ORDER: u8 = 0x1f;

impl Marks {
    fn new(map: &PageMap) -> Self {
        Self(
            map.ram()
                .iter()
                .filter_map(|frames| Some((*frames, vec![0; usize::try_from(frames.len()).ok()?])))
                .collect(),
        )
    }

    fn slot(&mut self, pfn: Pfn) -> Option<&mut u8> {
        let above = self.0.partition_point(|(frames, _)| frames.start() <= pfn);
        let (frames, marks) = self.0.get_mut(above.checked_sub(1)?)?;
        marks.get_mut(usize::try_from(pfn.offset_from(frames.start())?).ok()?)
    }

    /// Whether all of `block` is in one stretch of RAM.
    fn covers(&self, block: &PfnRange) -> bool {
        let above = self
            .0
            .partition_point(|(frames, _)| frames.start() <= block.start());
        above
            .checked_sub(1)
            .and_then(|index| self.0.get(index))
            .is_some_and(|(frames, _)| block.end() <= frames.end())
    }

    /// Whether a list names anything in `frames`.
    fn any_in(&self, frames: PfnRange) -> bool {
        self.0.iter().any(|(region, marks)| {
            let part = region.intersection(&frames);
            let bounds = part
                .start()
                .offset_from(region.start())
                .zip(part.end().offset_from(region.start()))
                .and_then(|(a, b)| Some(usize::try_from(a).ok()?..usize::try_from(b).ok()?));
            !part.is_empty()
                && bounds
                    .and_then(|bounds| marks.get(bounds))
                    .is_none_or(|marks| marks.iter().any(|mark| *mark != 0))
        })
    }

    /// Whether none of `block` is RAM here: it is in memory that the dump does not have.
    fn is_elsewhere(&self, block: &PfnRange) -> bool {
        let above = self
            .0
            .partition_point(|(frames, _)| frames.end() <= block.start());
        self.0
            .get(above)
            .is_none_or(|(frames, _)| block.end() <= frames.start())
    }
}

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
    fn block(&mut self, text: impl FnOnce() -> String) {
        self.blocks = self.blocks.saturating_add(1);
        if self.examples.len() < 8 {
            self.examples.push(text());
        }
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
    // Where the deltas cannot be read, each processor's may be as large again.
    let deltas = if zones.without_deltas { 254 } else { 127 };
    let bound = zones.cpus().saturating_mul(deltas).saturating_add(
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

struct Scanner<'a, 'm> {
    mem_map: &'a MemMap<'m>,
    layout: &'a PageLayout,
    max_order: u64,
    zones: Vec<ZoneReport>,
    wrong: Disagreements,
    open: Option<OpenBlock>,
    /// Sections that may be offline: what points into them is looked for.
    offline: OfflineSections,
    /// Frames whose own struct page says that they are offline.
    offline_pages: OfflinePages,
    /// Whether a block on no list is only counted, here.
    keeps_unlisted: bool,
    unlisted: u64,
    /// The head that was last looked up for a tail page, and its class.
    last_head: Option<(KernelVa, PageClass)>,
}

/// Looks at every struct page, and gives every RAM frame its class.
pub(crate) fn scan(
    kernel: &Kernel<'_>,
    mem_map: &MemMap<'_>,
    layout: &PageLayout,
    zones: &Zones,
) -> Result<Scan, VmiError> {
    let mut notes = Vec::new();
    let mut map = PageMap::new(kernel.space.memory().layout(), mem_map.page_size);
    let walked = walk_lists(kernel, mem_map, zones, layout.lru, &map, &mut notes)?;
    let offline = OfflineSections::find(kernel, mem_map, zones, &|frames| {
        walked.marks.any_in(frames)
    })?;
    let mut scanner = Scanner {
        mem_map,
        layout,
        max_order: zones.max_order(),
        zones: walked.zones,
        wrong: walked.wrong,
        open: None,
        offline,
        offline_pages: OfflinePages::default(),
        keeps_unlisted: zones.knowledge == Knowledge::Shape,
        unlisted: 0,
        last_head: None,
    };
    for (frames, marks) in &walked.marks.0 {
        let mut classes = vec![PageClass::Hole; marks.len()];
        scanner.region(*frames, &mut classes, marks)?;
        map.set_each(frames.start(), &classes);
    }
    for deferred in &zones.deferred {
        let frames = deferred.frames;
        notes.push(Note::DeferredKept { frames });
        map.set(deferred.frames, PageClass::Unknown);
    }
    scanner.offline.see_page_tables(kernel, &map)?;
    scanner.offline.settle(mem_map, &mut map, &mut notes);
    scanner
        .offline_pages
        .settle(kernel, mem_map, layout, &mut map, &mut notes)?;
    keep_mem_map(mem_map, &mut map, &mut scanner.wrong);
    if scanner.unlisted > 0 {
        notes.push(Note::UnlistedKept {
            blocks: scanner.unlisted,
        });
    }
    let Disagreements {
        blocks,
        examples,
        counters,
        fatal,
    } = scanner.wrong;
    let explained = zones.cpus();
    let disagreement = (blocks > 0 || !counters.is_empty()).then(|| Inconsistency {
        blocks,
        examples,
        counters,
        explained,
        zones: scanner.zones.clone(),
        knowledge: zones.knowledge,
    });
    Ok(Scan {
        map,
        zones: scanner.zones,
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

impl Scanner<'_, '_> {
    /// Classifies one stretch of RAM.
    fn region(
        &mut self,
        frames: PfnRange,
        classes: &mut [PageClass],
        marks: &[u8],
    ) -> Result<(), VmiError> {
        classes.fill(PageClass::Hole);
        let index = |pfn: Pfn| {
            pfn.offset_from(frames.start())
                .and_then(|n| usize::try_from(n).ok())
                .unwrap_or(usize::MAX)
        };
        for span in self.mem_map.spans() {
            let part = span.frames.intersection(&frames);
            if part.is_empty() {
                continue;
            }
            if !span.online {
                // Until it is proved to be offline.
                if let Some(classes) = classes.get_mut(index(part.start())..index(part.end())) {
                    classes.fill(PageClass::Unknown);
                }
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
                let begin = index(first);
                self.stretch(first, pages, classes, marks, begin)
            })?;
        }
        // A block that begins in this stretch and does not end in it is no block.
        if let Some(open) = self.open.take() {
            self.spoil(&open, classes, frames.start());
        }
        Ok(())
    }

    /// Classifies the frames from `first` whose struct pages are `pages`; `begin` is the index
    /// of `first` in `classes` and `marks`.
    fn stretch(
        &mut self,
        first: Pfn,
        pages: GuestBytes<'_>,
        classes: &mut [PageClass],
        marks: &[u8],
        begin: usize,
    ) -> Result<(), VmiError> {
        let stride = usize::try_from(self.mem_map.stride).unwrap_or(usize::MAX);
        let count = pages.len().checked_div(stride).unwrap_or(0);
        let region_start = Pfn::new(first.raw().saturating_sub(begin as u64));
        for (number, at) in (0..count).zip((0_usize..).step_by(stride)) {
            let pfn = Pfn::new(first.raw().saturating_add(number as u64));
            let index = begin.saturating_add(number);
            let (Some(page), Some(mark)) = (pages.get(at, stride), marks.get(index)) else {
                break;
            };
            if let Some(open) = &mut self.open {
                let is_free_tail = *mark == 0
                    && self.layout.is_unused(&page)
                    && self.layout.free_mark(&page) == Some(FreeMark::None);
                if !is_free_tail && open.spoiled.is_none() {
                    open.spoiled = Some(pfn);
                }
                if let Some(class) = classes.get_mut(index) {
                    *class = open.class;
                }
                if pfn.checked_add(1) == Some(open.frames.end())
                    && let Some(open) = self.open.take()
                    && open.spoiled.is_some()
                {
                    self.spoil(&open, classes, region_start);
                }
                continue;
            }
            let class = self.head(pfn, &page, *mark)?;
            if let Some(slot) = classes.get_mut(index) {
                *slot = class;
            }
        }
        Ok(())
    }

    /// Takes back what was said of a block, and counts it as a disagreement.
    fn spoil(&mut self, open: &OpenBlock, classes: &mut [PageClass], region_start: Pfn) {
        let bounds = open
            .frames
            .start()
            .offset_from(region_start)
            .zip(open.frames.end().offset_from(region_start))
            .and_then(|(a, b)| usize::try_from(a).ok().zip(usize::try_from(b).ok()));
        if let Some((start, end)) = bounds {
            let end = end.min(classes.len());
            if let Some(classes) = classes.get_mut(start..end) {
                classes.fill(PageClass::Unknown);
            }
        }
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
        match self.layout.free_mark(page) {
            Some(FreeMark::Buddy { order }) => {
                self.count_flagged(pfn, order);
                let agreed = mark & (LISTED | PCP | TORN) == LISTED
                    && order <= self.max_order
                    && order == listed_order
                    && self.layout.is_unused(page);
                if mark == 0 && self.keeps_unlisted {
                    self.unlisted = self.unlisted.saturating_add(1);
                    return Ok(PageClass::Unknown);
                }
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
                if self.layout.is_unused_and_untyped(page) {
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
        if self.layout.is_hwpoison(page) {
            return Ok(PageClass::HwPoison);
        }
        if !self.offline.is_empty() && self.layout.is_on_lru(page) {
            for at in [self.layout.lru, self.layout.lru.saturating_add(8)] {
                let node = usize::try_from(at).ok().and_then(|at| page.u64_at(at));
                self.offline.see_lru(pfn, KernelVa::new(node.unwrap_or(0)));
            }
        }
        let class = self.used(pfn, page)?;
        if class != PageClass::Offline {
            return Ok(class);
        }
        // Its own word alone: its driver is asked in the end. Of a folio only the head has a word.
        let own = self.mem_map.page_va(pfn);
        if own.is_some_and(|at| self.layout.head_of(page, at).is_none()) {
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
        if let Some(zone) = self.zones.iter_mut().find(|zone| zone.span.contains(pfn)) {
            let pages = u32::try_from(order)
                .ok()
                .filter(|order| u64::from(*order) <= self.max_order)
                .and_then(|order| 1_u64.checked_shl(order))
                .unwrap_or(1);
            zone.flagged = zone.flagged.saturating_add(pages);
        }
    }

    /// The class of a frame in use: that of the folio it belongs to.
    fn used(&mut self, pfn: Pfn, page: &GuestBytes<'_>) -> Result<PageClass, VmiError> {
        let Some(at) = self.mem_map.page_va(pfn) else {
            return Ok(PageClass::Unknown);
        };
        let head = match self.layout.head_of(page, at) {
            Some(head) => head,
            // hugetlb pages with an optimised vmemmap (5.18 to 7.0) show their head's struct page
            // again at the start of each page of struct pages; the next one tells the true head.
            None if self.layout.is_head(page) && at.raw().is_multiple_of(4096) => {
                match self.fake_head(at) {
                    Some(head) => head,
                    None => at,
                }
            }
            None => at,
        };
        if head == at {
            let stride = self.mem_map.stride;
            return Ok(self.layout.class(page, &|offset| {
                if offset.saturating_add(8) <= stride {
                    page.u64_at(usize::try_from(offset).ok()?)
                } else {
                    self.mem_map.u64_at(at.checked_add(offset)?).ok()
                }
            }));
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
        let stride = usize::try_from(self.mem_map.stride).unwrap_or(0);
        let Some(copy) = copy.get_mut(..stride) else {
            return Ok(PageClass::Unknown);
        };
        self.mem_map.copy_page(head, copy)?;
        let class = self.layout.class(&GuestBytes::from_slice(copy), &|offset| {
            self.mem_map.u64_at(head.checked_add(offset)?).ok()
        });
        // A head that is itself unused says nothing of its tails.
        self.last_head = Some((head, class));
        Ok(class)
    }

    fn fake_head(&self, at: KernelVa) -> Option<KernelVa> {
        let mut copy = [0_u8; 256];
        let copy = copy.get_mut(..usize::try_from(self.mem_map.stride).ok()?)?;
        let next = at.checked_add(self.mem_map.stride)?;
        self.mem_map.copy_page(next, copy).ok()?;
        self.layout.head_of(&GuestBytes::from_slice(copy), next)
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
