//! From struct pages, free lists and counters to page classes.
//!
//! A frame counts as free only if its flag says so, its block is aligned and inside its zone,
//! the free list has it, linked in both directions, and no `struct page` of the block shows a
//! user. The kernel clears the flag before it hands a page out and sets it after it took the
//! page back (`del_page_from_free_list`, `__free_one_page` in `mm/page_alloc.c`), so a guest
//! stopped at any instruction has at most one block per processor on which these disagree.
//! Such a block is kept; more of them, and nothing is believed.

mod disagreement;
mod lists;
mod marks;
mod scanner;

use super::mem_map::MemMap;
use super::offline::{OfflinePages, OfflineSections};
use super::page::PageLayout;
use super::zone::Zones;
use crate::error::VmiError;
use crate::kernel::Kernel;
use crate::knowledge::Knowledge;
use crate::note::Note;
use core::fmt;
pub use disagreement::{BlockDisagreement, CounterDisagreement, WhichList};
use scanner::{Seen, Sources};
use sonicshot::work::{self, map_in_order};
use sonicshot::{PageClass, PageMap, Pfn, PfnRange, PhaseProgress, Progress, Tally, WorkPhase};
use std::num::NonZeroUsize;

/// The counts of one zone's free pages by its three sources of truth.
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

/// A disagreement between free lists, page flags or counters.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Inconsistency {
    /// Blocks on which flag, list and struct pages disagree; they are kept.
    pub blocks: u64,
    /// The first such blocks, and what is wrong with each.
    pub examples: Vec<BlockDisagreement>,
    /// Disagreements of counters: which, and the numbers.
    pub counters: Vec<CounterDisagreement>,
    /// The number of blocks that a stopped guest can explain: one for each processor.
    pub explained: u64,
    /// Every zone's numbers.
    pub zones: Vec<ZoneReport>,
    /// The knowledge of the kernel: with types missing, what was taken for its records may be
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
        for counter in &self.counters {
            write!(f, "; {counter}")?;
        }
        for example in &self.examples {
            write!(f, "; {example}")?;
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

/// Blocks on which the sources disagree.
#[derive(Default)]
pub(super) struct Disagreements {
    pub(super) blocks: u64,
    pub(super) examples: Vec<BlockDisagreement>,
    pub(super) counters: Vec<CounterDisagreement>,
    /// Counters off by more than is explained.
    pub(super) fatal: bool,
}

impl Disagreements {
    /// So many are described.
    const EXAMPLES: usize = 8;

    pub(super) fn block(&mut self, what: impl FnOnce() -> BlockDisagreement) {
        self.blocks = self.blocks.saturating_add(1);
        if self.examples.len() < Self::EXAMPLES {
            self.examples.push(what());
        }
    }

    /// Adds what was found behind all that is there.
    pub(super) fn add(&mut self, more: Self) {
        self.blocks = self.blocks.saturating_add(more.blocks);
        self.fatal |= more.fatal;
        self.counters.extend(more.counters);
        self.examples.extend(more.examples);
        self.examples.truncate(Self::EXAMPLES);
    }

    /// The report on them, if there are any.
    fn of(self, zones: &Zones, reports: &[ZoneReport]) -> Option<Inconsistency> {
        (self.blocks > 0 || !self.counters.is_empty()).then(|| Inconsistency {
            blocks: self.blocks,
            examples: self.examples,
            counters: self.counters,
            explained: zones.cpus(),
            zones: reports.to_vec(),
            knowledge: zones.knowledge,
        })
    }
}

/// Frames that are looked at together, as a binary logarithm: their struct pages, mostly 512 KiB,
/// fit a processor's cache, and a small guest has a piece for each thread. A piece is never shorter
/// than the longest block of the buddy allocator.
const PIECE: u32 = 13;

/// Looks at every struct page, and gives every RAM frame its class.
pub(crate) fn scan(
    kernel: &Kernel<'_>,
    mem_map: &MemMap<'_>,
    layout: &PageLayout,
    zones: &Zones,
    (threads, progress): (Option<NonZeroUsize>, &dyn Progress),
) -> Result<Scan, VmiError> {
    let mut notes = Vec::new();
    let layout_of_ram = kernel.space.memory().layout();
    let mut map = PageMap::new(layout_of_ram, mem_map.page_size);
    let total = layout_of_ram.bytes();
    let lists::Walked {
        marks,
        zones: mut reports,
        mut wrong,
    } = lists::walk(
        kernel,
        mem_map,
        zones,
        layout.lru,
        &map,
        (&mut notes, progress),
    )
    .map_err(|error| error.of_lists(zones.knowledge))?;
    let mut phase = PhaseProgress::begin(progress, WorkPhase::Classifying, total);
    let mut offline =
        OfflineSections::find(kernel, mem_map, zones, &|frames| marks.any_in(frames))?;
    let spans: Vec<PfnRange> = reports.iter().map(|zone| zone.span).collect();
    let sources = Sources {
        mem_map,
        space: &kernel.space,
        layout,
        max_order: zones.max_order(),
        zones: &spans,
        offline: &offline,
        keeps_unlisted: zones.knowledge == Knowledge::Shape,
    };
    let seen = look_at_struct_pages(&sources, &marks, (threads, &mut phase), &mut map)?;
    wrong.add(seen.wrong);
    for (report, flagged) in reports.iter_mut().zip(seen.flagged) {
        report.flagged = flagged;
    }
    for (section, by) in seen.lru {
        offline.see(section, by);
    }
    keep_deferred(zones, &mut map, &mut notes);
    offline.see_page_tables(kernel, &map)?;
    offline.settle(mem_map, &mut map, &mut notes);
    OfflinePages::new(seen.offline_pages).settle(kernel, mem_map, layout, &mut map, &mut notes)?;
    keep_mem_map(mem_map, &mut map, &mut wrong);
    if seen.unlisted > 0 {
        let blocks = seen.unlisted;
        notes.push(Note::UnlistedKept { blocks });
    }
    phase.end();
    let fatal = wrong.fatal || wrong.blocks > zones.cpus();
    Ok(Scan {
        map,
        fatal,
        disagreement: wrong.of(zones, &reports),
        zones: reports,
        notes,
    })
}

/// Gives each frame the class that its struct page says, and returns what they all say together.
fn look_at_struct_pages(
    sources: &Sources<'_, '_>,
    marks: &marks::Marks,
    (threads, phase): (Option<NonZeroUsize>, &mut PhaseProgress<'_>),
    map: &mut PageMap,
) -> Result<Seen, VmiError> {
    let order = u32::try_from(sources.max_order).map_or(PIECE, |order| order.max(PIECE));
    let pieces: Vec<PfnRange> = map.pieces(order).collect();
    let page_size = map.page_size().bytes();
    let mut all = Seen::of_zones(sources.zones.len());
    // Pieces are taken in their order, whichever thread had them: what is told is the same.
    map_in_order(
        work::threads(threads),
        pieces,
        || (),
        |(), frames| Ok::<_, VmiError>((frames, sources.piece(frames, &marks.of(frames)?)?)),
        |piece| {
            let (frames, (classes, seen)) = piece?;
            map.set_each(frames.start(), &classes);
            phase.add(Tally::new(frames.len()).times(page_size).get());
            all.add(seen)
        },
    )?;
    Ok(all)
}

/// Keeps the frames whose struct pages nobody has initialised yet.
fn keep_deferred(zones: &Zones, map: &mut PageMap, notes: &mut Vec<Note>) {
    for deferred in &zones.deferred {
        let frames = deferred.frames;
        notes.push(Note::DeferredKept { frames });
        map.set(frames, PageClass::Unknown);
    }
}

/// The struct pages themselves are in use, whatever they say: with `memmap_on_memory` an offline
/// section holds its own.
fn keep_mem_map(mem_map: &MemMap<'_>, map: &mut PageMap, wrong: &mut Disagreements) {
    let page_size = mem_map.page_size;
    for range in mem_map.own_memory() {
        let first = range.start().pfn(page_size);
        let end = range.end().raw().div_ceil(page_size.bytes());
        let frames = PfnRange::new(first, Pfn::new(end));
        map.with_slices(frames, |start, pages| {
            for (page, pfn) in pages.iter_mut().zip(start.raw()..) {
                match page.class() {
                    PageClass::Offline => *page = PageClass::Kernel.into(),
                    PageClass::FreeBuddy | PageClass::FreePcp => {
                        *page = PageClass::Unknown.into();
                        wrong.fatal = true;
                        wrong.block(|| BlockDisagreement::HoldsStructPages { pfn: Pfn::new(pfn) });
                    }
                    _ => {}
                }
            }
        });
    }
}
