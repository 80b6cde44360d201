//! The walk of every free list, buddy and per-CPU, held against the counters.

use super::marks::{LISTED, Marks, ORDER, PCP, TORN};
use super::{BlockDisagreement, CounterDisagreement, Disagreements, ZoneReport};
use crate::error::VmiError;
use crate::kernel::Kernel;
use crate::mm::mem_map::MemMap;
use crate::mm::zone::{FreeLists, Listed, ListedBlock, Zone, Zones, counter_bound};
use crate::note::Note;
use sonicshot::{PageMap, PageSize, PfnRange, PhaseProgress, Progress, Tally, WorkPhase};

/// The findings in the lists.
pub(super) struct Walked {
    pub marks: Marks,
    pub zones: Vec<ZoneReport>,
    pub wrong: Disagreements,
}

/// Walks every free list, buddy and per-CPU, and holds them against the counters. `lru` is the
/// offset of the list node in `struct page`.
pub(super) fn walk(
    kernel: &Kernel<'_>,
    mem_map: &MemMap<'_>,
    zones: &Zones,
    lru: u64,
    map: &PageMap,
    (notes, progress): (&mut Vec<Note>, &dyn Progress),
) -> Result<Walked, VmiError> {
    let total = counted(zones, map.page_size());
    let mut walk = Walk {
        zones,
        lists: FreeLists::new(mem_map, kernel, lru),
        marks: Marks::new(map),
        wrong: Disagreements::default(),
        phase: PhaseProgress::begin(progress, WorkPhase::WalkingLists, total),
        page_size: map.page_size(),
    };
    let mut reports = Vec::new();
    for zone in &zones.zones {
        reports.push(walk.zone(zone)?);
    }
    walk.phase.end();
    if let Some(why) = &zones.no_pcp {
        notes.push(Note::PerCpuListsKept { why: why.clone() });
    }
    Ok(Walked {
        marks: walk.marks,
        zones: reports,
        wrong: walk.wrong,
    })
}

struct Walk<'a, 'm> {
    zones: &'a Zones,
    lists: FreeLists<'a, 'm>,
    marks: Marks,
    wrong: Disagreements,
    phase: PhaseProgress<'a>,
    page_size: PageSize,
}

/// The bytes of the pages that the zones count on their lists: by `nr_free`, which is held against the
/// lists later, and only told of here.
fn counted(zones: &Zones, page_size: PageSize) -> u64 {
    let mut pages = Tally::ZERO;
    for zone in &zones.zones {
        for (order, blocks) in (0_u32..).zip(&zone.nr_free) {
            pages.add(Tally::new(*blocks).times(1_u64.unbounded_shl(order)).get());
        }
    }
    pages.times(page_size.bytes()).get()
}

impl Walk<'_, '_> {
    fn zone(&mut self, zone: &Zone) -> Result<ZoneReport, VmiError> {
        let too_many = || VmiError::Corrupt {
            what: "zone.free_area",
            at: zone.at,
            value: zone.span.len(),
        };
        let mut blocks = vec![0_u64; zone.nr_free.len()];
        let mut report = ZoneReport {
            node: zone.node,
            name: zone.name.clone(),
            span: zone.span,
            listed: 0,
            flagged: 0,
            nr_free: 0,
            counter: zone
                .counter
                .checked_sub(zone.unaccepted)
                .ok_or_else(too_many)?,
            isolated: 0,
            pcp: 0,
        };
        let (marks, wrong, phase) = (&mut self.marks, &mut self.wrong, &mut self.phase);
        let page_size = self.page_size.bytes();
        self.zones
            .walk_free_lists(&mut self.lists, zone, &mut |found| {
                let block = note_listed(found, 0, zone, marks, wrong)?;
                let pages = block.pages().ok_or_else(too_many)?;
                phase.add(Tally::new(pages).times(page_size).get());
                report.listed = report.listed.checked_add(pages).ok_or_else(too_many)?;
                if block.isolated {
                    report.isolated = report.isolated.checked_add(pages).ok_or_else(too_many)?;
                }
                let order = usize::try_from(block.order).ok();
                let count = order.and_then(|order| blocks.get_mut(order));
                let count = count.ok_or_else(too_many)?;
                *count = count.checked_add(1).ok_or_else(too_many)?;
                Ok(())
            })?;
        check_counters(zone, self.zones, &blocks, &mut report, &mut self.wrong)?;
        if self.zones.no_pcp.is_none() {
            self.pcp(zone, &mut report)?;
        }
        Ok(report)
    }

    /// Walks the per-CPU lists of `zone`.
    fn pcp(&mut self, zone: &Zone, report: &mut ZoneReport) -> Result<(), VmiError> {
        let mut found = Vec::new();
        let counts = self
            .zones
            .walk_pcp_lists(&mut self.lists, zone, &mut |listed| {
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
                let pages = block.pages();
                left =
                    pages
                        .and_then(|pages| left.checked_sub(pages))
                        .ok_or(VmiError::Corrupt {
                            what: "the per-CPU lists",
                            at: zone.at,
                            value: left,
                        })?;
                blocks.push(next);
            }
            if count != listed {
                // Stopped between filling the list and counting it: all of this list is kept.
                self.wrong.block(|| BlockDisagreement::PerCpuCount {
                    zone: zone.name.clone(),
                    cpu,
                    listed,
                    counted: count,
                });
                continue;
            }
            for block in blocks {
                note_listed(block, PCP, zone, &mut self.marks, &mut self.wrong)?;
            }
            VmiError::count("pages of per-CPU lists", &mut report.pcp, listed)?;
        }
        Ok(())
    }
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
    let frames = block
        .pages()
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
        wrong.block(|| BlockDisagreement::Misplaced {
            frames,
            order,
            zone: zone.name.clone(),
            span: zone.span,
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
    let order = u8::try_from(order).ok().filter(|order| *order <= ORDER);
    let order = order.ok_or(VmiError::Corrupt {
        what: "the order of a free block",
        at: zone.at,
        value: head.raw(),
    })?;
    *slot = LISTED | kind | torn | order;
    Ok(block)
}

/// Holds the free lists of a zone against `nr_free` of each order and `NR_FREE_PAGES`.
fn check_counters(
    zone: &Zone,
    zones: &Zones,
    blocks: &[u64],
    report: &mut ZoneReport,
    wrong: &mut Disagreements,
) -> Result<(), VmiError> {
    let corrupt = |value| VmiError::Corrupt {
        what: "the counters of free pages",
        at: zone.at,
        value,
    };
    // More than 64 bits hold is not near.
    let mut off = Some(0_u64);
    let mut nr_free = Tally::new(report.nr_free);
    for (order, (listed, counted)) in (0_u32..).zip(blocks.iter().zip(&zone.nr_free)) {
        nr_free = nr_free.and(Tally::new(*counted).times(1_u64.unbounded_shl(order)).get());
        if listed != counted {
            off = off.and_then(|off| off.checked_add(listed.abs_diff(*counted)));
            wrong.counters.push(CounterDisagreement::Blocks {
                zone: zone.name.clone(),
                order,
                listed: *listed,
                counted: *counted,
            });
        }
    }
    // `nr_free` changes beside the list, under the zone's lock: one block for the one holder,
    // and every processor may hold one zone's lock.
    report.nr_free = nr_free.get();
    if off.is_none_or(|off| off > zones.cpus()) {
        wrong.fatal = true;
    }
    let bound = counter_bound(zones.max_order(), zones.cpus(), zones.without_deltas)
        .ok_or_else(|| corrupt(zones.max_order()))?;
    let listed = report
        .listed
        .checked_sub(report.isolated)
        .and_then(|listed| i64::try_from(listed).ok())
        .ok_or_else(|| corrupt(report.listed))?;
    if listed.abs_diff(report.counter) > bound {
        wrong.fatal = true;
        wrong.counters.push(CounterDisagreement::Pages {
            zone: zone.name.clone(),
            listed,
            counted: report.counter,
            bound,
        });
    }
    Ok(())
}
