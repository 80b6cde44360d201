//! From struct pages, free lists and counters to page classes.
//!
//! A frame counts as free only if its flag says so, its block is aligned and inside its zone,
//! the free list has it, linked in both directions, and no `struct page` of the block shows a
//! user. The kernel clears the flag before it hands a page out and sets it after it took the
//! page back (`del_page_from_free_list`, `__free_one_page` in `mm/page_alloc.c`), so a guest
//! stopped at any instruction has at most one block per processor on which these disagree.
//! Such a block is kept; more of them, and nothing is believed.

mod lists;
mod marks;
mod scanner;

use super::mem_map::MemMap;
use super::offline::{OfflinePages, OfflineSections};
use super::page::PageLayout;
use super::zone::Zones;
use crate::error::VmiError;
use crate::kernel::Kernel;
use crate::note::Note;
use crate::shape::Knowledge;
use core::fmt;
use scanner::Scanner;
use sonicshot::{PageClass, PageMap, Pfn, PfnRange};

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

/// Blocks on which the sources disagree.
#[derive(Default)]
pub(super) struct Disagreements {
    pub(super) blocks: u64,
    pub(super) examples: Vec<String>,
    pub(super) counters: Vec<String>,
    /// Counters off by more than is explained.
    pub(super) fatal: bool,
}

impl Disagreements {
    pub(super) fn block(&mut self, text: impl FnOnce() -> String) {
        self.blocks = self.blocks.saturating_add(1);
        if self.examples.len() < 8 {
            self.examples.push(text());
        }
    }
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
    let walked = lists::walk(kernel, mem_map, zones, layout.lru, &map, &mut notes)?;
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
