//! Each processor's lists of free pages, by their shape.
//!
//! A zone has, behind the pointer to its node (`zone_pgdat`), the `__percpu` pointers
//! `per_cpu_pageset` and, since 5.14, `per_cpu_zonestats` (`include/linux/mmzone.h`). What is added
//! to them for each processor stands in an array of the kernel's image, `__per_cpu_offset`: whole
//! pages. Added up they lead, for every zone and every processor, to a `struct per_cpu_pages`: some
//! numbers, then a row of list heads, three migrate types an order up to order 3 and then one or
//! two lists of huge pages (before 5.14, three lists). A word of the image that does so for every
//! zone is a processor's.
//!
//! Which of the numbers is `count` is told by the lists: it is the one, in the same place for all
//! zones and processors, that says how many pages they hold; of two lists at least, for each would
//! vouch for itself.

use super::displacements::{Displacements, MAX_WORDS};
use super::frames_of;
use super::heads::{Head, Heads, Look};
use super::nodes::Owned;
use crate::error::VmiError;
use crate::kernel::element;
use crate::mm::zone::{PcpLayout, Zone};
use crate::{KernelVa, VirtualMemory};
use sonicshot::{Tally, to_u64};

/// `NR_CPUS` is 8192 at most.
const MAX_CPUS: usize = 8192;
/// `MIGRATE_PCPTYPES`, the same since 3.18.
const TYPES: u64 = 3;
/// Lists of order 0 to `PAGE_ALLOC_COSTLY_ORDER`, since 5.14.
const LISTS: u64 = 12;
/// The numbers before the lists take no more, with a lock of any kind.
const MAX_LISTS_AT: u64 = 128;
/// From the row of lists back to `count`: 16 bytes in 5.10 and 5.15, 20 from 6.0, 28 from 6.7.
const COUNT_BEFORE: core::ops::RangeInclusive<u64> = 16..=28;
/// The per-CPU lists of all zones.
#[derive(Debug)]
pub(crate) struct PerCpu {
    /// The displacement that is added to a `__percpu` pointer, for each possible processor.
    pub offsets: Vec<u64>,
    /// The layout of the lists behind `per_cpu_pageset`; or the reason that it is not told.
    pub lists: Result<PcpLayout, String>,
    /// Whether the zones' counters were corrected by the per-CPU deltas, or there are none.
    pub with_deltas: bool,
}

/// Numbers and row of lists, as found for one processor and zone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Row {
    lists_at: u64,
    lists: u64,
}

/// Finds the per-CPU lists of `zones`, fills in their `pageset`, node and counter's deltas. `owned`
/// tells of the zones' nodes; `nr_free_pages` is the index of that counter.
pub(crate) fn find(
    look: &Look<'_, '_>,
    zones: &mut [Zone],
    owned: &Owned,
    nr_free_pages: u64,
) -> Result<PerCpu, VmiError> {
    let heads = &look.heads;
    let nothing = |why: &str| PerCpu {
        offsets: Vec::new(),
        lists: Err(why.into()),
        with_deltas: false,
    };
    let mut nodes: Vec<KernelVa> = Vec::new();
    let mut stats = Vec::new();
    for ((zone, array), node) in zones.iter_mut().zip(&owned.arrays).zip(&owned.nodes) {
        let word = |behind: u64| {
            let at = array.raw().checked_sub(owned.pointer).map(KernelVa::new);
            let at = element("zone", at.unwrap_or(*array), 0, 0, behind)?;
            heads.space.read_u64(at).map_err(VmiError::read("zone"))
        };
        zone.pageset = KernelVa::new(word(8)?);
        stats.push(KernelVa::new(word(16)?));
        let number = nodes.iter().position(|at| at == node);
        zone.node = to_u64(number.unwrap_or(nodes.len()));
        if number.is_none() {
            nodes.push(*node);
        }
    }
    let Some((offsets, row)) = processors(look, zones, &owned.displacements)? else {
        return Ok(nothing(
            "no processor's lists are found where the zones point",
        ));
    };
    let lists = count_of(look, zones, &offsets, row)?;
    let one_processor = offsets == [0];
    let with_deltas = one_processor || row.lists >= LISTS;
    if with_deltas && !one_processor {
        for (zone, base) in zones.iter_mut().zip(stats) {
            for offset in &offsets {
                let at = base.moved_by(*offset).moved_by(nr_free_pages);
                let mut byte = [0];
                let read = heads.space.read(at, &mut byte);
                read.map_err(VmiError::read("vm_stat_diff"))?;
                let delta = i64::from(i8::from_le_bytes(byte));
                zone.counter = zone.counter.checked_add(delta).ok_or(VmiError::Corrupt {
                    what: "zone.vm_stat",
                    at: zone.at,
                    value: zone.counter.cast_unsigned(),
                })?;
            }
        }
    }
    Ok(PerCpu {
        offsets,
        lists,
        with_deltas,
    })
}

/// The displacement for each processor, lowest place in the image first, and the layout of its lists.
fn processors(
    look: &Look<'_, '_>,
    zones: &[Zone],
    displacements: &Displacements,
) -> Result<Option<(Vec<u64>, Row)>, VmiError> {
    let heads = &look.heads;
    let row_of = |offset: u64| {
        let mut rows = zones
            .iter()
            .map(|zone| row(heads, zone.pageset.moved_by(offset)));
        let first = rows.next()??;
        rows.all(|row| row == Some(first)).then_some(first)
    };
    // Without SMP the pointer is the address itself.
    if let Some(row) = row_of(0) {
        return Ok(Some((vec![0], row)));
    }
    let mut found: Vec<u64> = Vec::new();
    let mut shape: Option<Row> = None;
    for (number, word) in (0_u64..).zip(displacements.words()) {
        look.deadline
            .check("words of the kernel's image", number, MAX_WORDS)?;
        if let Some(row) = row_of(*word)
            && *shape.get_or_insert(row) == row
        {
            take(&mut found, *word);
        }
    }
    Ok(shape.map(|row| (found, row)))
}

/// Takes a processor's word, if there may be so many.
fn take(found: &mut Vec<u64>, word: u64) {
    if found.len() < MAX_CPUS {
        found.push(word);
    }
}

/// The offset of the first of the lists.
fn first_list(is_head: &dyn Fn(u64) -> bool) -> Option<u64> {
    (8..=MAX_LISTS_AT).step_by(8).find(|at| is_head(*at))
}

/// The `struct per_cpu_pages` at `at`, if it looks like one.
fn row(heads: &Heads<'_, '_>, at: KernelVa) -> Option<Row> {
    let mut bytes = [0; 512];
    heads.space.read(at, &mut bytes).ok()?;
    let is_head = |offset: u64| {
        let start = usize::try_from(offset).ok()?;
        let bytes = bytes.get(start..)?.first_chunk::<16>()?;
        heads.of(at.checked_add(offset)?, bytes)
    };
    let lists_at = first_list(&|at| is_head(at).is_some())?;
    let lists = to_u64(
        (lists_at..512)
            .step_by(16)
            .take_while(|at| is_head(*at).is_some())
            .count(),
    );
    // Three lists; twelve; one or two of huge pages more.
    const WITH_HUGE: u64 = LISTS + 2;
    let fits = lists == TYPES || (LISTS..=WITH_HUGE).contains(&lists);
    fits.then_some(Row { lists_at, lists })
}

/// The number before the lists that counts the pages in them.
fn count_of(
    look: &Look<'_, '_>,
    zones: &[Zone],
    offsets: &[u64],
    row: Row,
) -> Result<Result<PcpLayout, String>, VmiError> {
    let heads = &look.heads;
    let layout = |count: u64| PcpLayout {
        pcp: 0,
        count,
        lists_at: row.lists_at,
        lists: row.lists,
        types: TYPES,
        huge_order: PcpLayout::huge_order(heads.map.page_size),
    };
    let mut sums = Vec::new();
    let mut left = frames_of(heads.map)?;
    for zone in zones {
        for offset in offsets {
            let at = zone.pageset.moved_by(*offset);
            let all = Tally::new(to_u64(zones.len())).times(to_u64(offsets.len()));
            look.deadline
                .check("processors' lists", to_u64(sums.len()), all.get())?;
            sums.push((at, pages_in(heads, at, &layout(0), &mut left)));
        }
    }
    if !sums.iter().any(|(_, pages)| pages.is_some_and(|n| n > 0)) {
        return Ok(Err("they are all empty, or were being changed".into()));
    }
    let places = (0..row.lists_at).step_by(4).filter(|count| {
        let before = row.lists_at.checked_sub(*count);
        before.is_some_and(|before| COUNT_BEFORE.contains(&before))
    });
    let mut agree: Vec<(u64, u64)> = Vec::new();
    for place in places {
        let (mut fit, mut with_pages) = (0, false);
        for (at, pages) in &sums {
            let count = heads
                .space
                .read_u32(element("per_cpu_pages", *at, 0, 0, place)?);
            let count = count.map_err(VmiError::read("per_cpu_pages.count"))?;
            let fits = *pages == Some(count.into());
            VmiError::count("processors' lists", &mut fit, u64::from(fits))?;
            with_pages |= fits && count > 0;
        }
        if with_pages {
            agree.push((fit, place));
        }
    }
    agree.sort_unstable_by(|a, b| b.cmp(a));
    Ok(match agree.as_slice() {
        [] => Err("no number before them says how many pages they hold".into()),
        // Chosen by one it says nothing of that one.
        [(fit, _), ..] if *fit < 2 => {
            Err("of the numbers before them one fits one list, and none fits two".into())
        }
        [(first, _), (second, _), ..] if first == second => {
            Err("two numbers before them say as well how many pages they hold".into())
        }
        [(_, count), ..] => Ok(layout(*count)),
    })
}

/// The number of pages in the lists of a processor; `None` if they cannot be followed.
fn pages_in(
    heads: &Heads<'_, '_>,
    at: KernelVa,
    layout: &PcpLayout,
    left: &mut u64,
) -> Option<u64> {
    let mut sum = 0_u64;
    for index in 0..layout.lists {
        let order = layout.order(index).ok()?;
        let offset = index.checked_mul(16)?.checked_add(layout.lists_at)?;
        let head = at.checked_add(offset)?;
        let Head::Pages { next, .. } = heads.at(head)? else {
            continue;
        };
        let mut node = next;
        while node != head {
            heads.page_of(node).ok()?;
            *left = left.checked_sub(1)?;
            sum = sum.checked_add(1_u64.checked_shl(order)?)?;
            node = KernelVa::new(heads.map.u64_at(node).ok()?);
        }
    }
    Some(sum)
}

#[cfg(test)]
mod tests {
    use super::{MAX_CPUS, MAX_LISTS_AT, first_list, take};

    #[test]
    fn what_is_tried_for_processors_is_bounded() {
        let mut found = Vec::new();
        for word in 0..MAX_CPUS as u64 + 9 {
            take(&mut found, word);
        }
        assert_eq!(found.len(), MAX_CPUS);
        for (at, is_found) in [(8, true), (MAX_LISTS_AT, true), (MAX_LISTS_AT + 8, false)] {
            assert_eq!(first_list(&|there| there == at).is_some(), is_found, "{at}");
        }
    }
}
