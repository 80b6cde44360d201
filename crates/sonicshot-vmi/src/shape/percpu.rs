//! Each processor's lists of free pages, by their shape.
//!
//! A zone has, behind the pointer to its node (`zone_pgdat`, which leads to just before the zone
//! itself), the `__percpu` pointers `per_cpu_pageset` and, since 5.14, `per_cpu_zonestats`
//! (`include/linux/mmzone.h`). What is added to them for each processor stands in an array of the
//! kernel's image, `__per_cpu_offset`: whole pages. Added up they lead, for every zone and every
//! processor, to a `struct per_cpu_pages`: some numbers, then a row of list heads, three migrate
//! types an order up to order 3 and then one or two lists of huge pages (before 5.14, three lists).
//! A word of the image that does so for every zone is a processor's.
//!
//! Which of the numbers is `count` is told by the lists: it is the one, in the same place for all
//! zones and processors, that says how many pages they hold.

use super::heads::{Head, Heads};
use crate::deadline::Deadline;
use crate::error::VmiError;
use crate::kernel::element;
use crate::mm::zone::{PcpLayout, Zone};
use crate::{AddressSpace, KernelVa, VirtualMemory};
use std::collections::HashSet;

/// `NR_CPUS` is 8192 at most.
const MAX_CPUS: usize = 8192;
/// So many different words of an image are tried; one that is whole has some thousands.
const MAX_WORDS: u64 = 1 << 18;
/// `MIGRATE_PCPTYPES`, the same since 3.18.
const TYPES: u64 = 3;
/// Lists of order 0 to `PAGE_ALLOC_COSTLY_ORDER`, since 5.14.
const LISTS: u64 = 12;
/// The numbers before the lists take no more, with a lock of any kind.
const MAX_LISTS_AT: u64 = 128;
/// From the row of lists back to `count`: 16 bytes in 5.10 and 5.15, 20 from 6.0, 28 from 6.7.
const COUNT_BEFORE: core::ops::RangeInclusive<u64> = 16..=28;
/// The pointers stand before the lists of free blocks, behind watermarks and reserves.
const ZONE_HEAD: u64 = 576;
/// A node begins with its zones: eight of 2 KiB at most.
const MAX_NODE_ZONES: u64 = 64 << 10;

/// The per-CPU lists of all zones.
#[derive(Debug)]
pub(crate) struct PerCpu {
    /// What is added to a `__percpu` pointer, for each possible processor.
    pub offsets: Vec<u64>,
    /// Where the lists are behind `per_cpu_pageset`; or why they are not told.
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

/// Finds the per-CPU lists of `zones`, fills in their `pageset`, node and counter's deltas. `image`
/// is the kernel's. `free_area` is from a zone's `at` to its lists; `nr_free_pages` the index of
/// that counter.
pub(crate) fn find(
    heads: &Heads<'_, '_>,
    zones: &mut [Zone],
    free_area: u64,
    image: (KernelVa, KernelVa),
    nr_free_pages: u64,
    frames: u64,
    deadline: &Deadline,
) -> Result<PerCpu, VmiError> {
    let nothing = |why: &str| PerCpu {
        offsets: Vec::new(),
        lists: Err(why.into()),
        with_deltas: false,
    };
    let Some(offset) = node_pointer(heads.space, zones, free_area) else {
        return Ok(nothing("no zone points to its node"));
    };
    let mut nodes: Vec<KernelVa> = Vec::new();
    let mut stats = Vec::new();
    for zone in zones.iter_mut() {
        let word = |back: u64| element("zone", zone.at, 0, 0, offset.saturating_add(back));
        let read = |at| heads.space.read_u64(at).map_err(VmiError::read("zone"));
        let node = KernelVa::new(read(word(0)?)?);
        let pageset = KernelVa::new(read(word(8)?)?);
        stats.push(KernelVa::new(read(word(16)?)?));
        let number = nodes.iter().position(|at| *at == node);
        zone.node = number.unwrap_or(nodes.len()) as u64;
        if number.is_none() {
            nodes.push(node);
        }
        zone.pageset = pageset;
    }
    let Some((offsets, row)) = processors(heads, zones, image, deadline)? else {
        return Ok(nothing(
            "no processor's lists are found where the zones point",
        ));
    };
    let lists = count_of(heads, zones, &offsets, row, frames, deadline)?;
    let one_processor = offsets == [0];
    let with_deltas = one_processor || row.lists >= LISTS;
    if with_deltas && !one_processor {
        for (zone, base) in zones.iter_mut().zip(stats) {
            for offset in &offsets {
                let at = base.wrapping_add(*offset).wrapping_add(nr_free_pages);
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

/// From `zone.at` to the pointer to the zone's node, in the same place in every zone: it leads to
/// a little before the zone.
fn node_pointer(space: &AddressSpace<'_>, zones: &[Zone], free_area: u64) -> Option<u64> {
    let first = free_area.saturating_sub(ZONE_HEAD);
    let is_node = |zone: &Zone, offset: u64| {
        let word = zone.at.checked_add(offset);
        let word = word.and_then(|at| space.read_u64(at).ok());
        let lists = zone.at.checked_add(free_area);
        let back = word.and_then(|word| lists?.offset_from(KernelVa::new(word)));
        back.is_some_and(|back| back >= free_area.saturating_sub(offset) && back < MAX_NODE_ZONES)
    };
    (first..free_area)
        .step_by(8)
        .find(|offset| !zones.is_empty() && zones.iter().all(|zone| is_node(zone, *offset)))
}

/// What is added for each processor, lowest place in the image first, and how its lists look.
fn processors(
    heads: &Heads<'_, '_>,
    zones: &[Zone],
    image: (KernelVa, KernelVa),
    deadline: &Deadline,
) -> Result<Option<(Vec<u64>, Row)>, VmiError> {
    let row_of = |offset: u64| {
        let mut rows = zones
            .iter()
            .map(|zone| row(heads, zone.pageset.wrapping_add(offset)));
        let first = rows.next()??;
        rows.all(|row| row == Some(first)).then_some(first)
    };
    // Without SMP the pointer is the address itself.
    if let Some(row) = row_of(0) {
        return Ok(Some((vec![0], row)));
    }
    let inside = heads.map.page_size.offset_mask();
    let mut tried = HashSet::new();
    let mut found: Vec<u64> = Vec::new();
    let mut shape: Option<Row> = None;
    each_word(heads, image, &mut |word| {
        // Whole pages; the difference of two kernel addresses.
        if word & inside != 0 || word >> 56 != 0xff || !tried.insert(word) {
            return Ok(());
        }
        let number = tried.len() as u64;
        if number > MAX_WORDS {
            return Err(VmiError::TooMany {
                what: "words of the kernel's image that may be a processor's displacement",
                found: number,
                most: MAX_WORDS,
            });
        }
        deadline.check("words of the kernel's image", number, MAX_WORDS)?;
        if let Some(row) = row_of(word)
            && *shape.get_or_insert(row) == row
            && found.len() < MAX_CPUS
        {
            found.push(word);
        }
        Ok(())
    })?;
    Ok(shape.map(|row| (found, row)))
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
    let lists_at = (8..=MAX_LISTS_AT)
        .step_by(8)
        .find(|at| is_head(*at).is_some())?;
    let lists = (lists_at..512)
        .step_by(16)
        .take_while(|at| is_head(*at).is_some())
        .count() as u64;
    // Three lists; twelve; one or two of huge pages more.
    let fits = lists == TYPES || (LISTS..=LISTS.saturating_add(2)).contains(&lists);
    fits.then_some(Row { lists_at, lists })
}

/// Which number before the lists says how many pages they hold.
fn count_of(
    heads: &Heads<'_, '_>,
    zones: &[Zone],
    offsets: &[u64],
    row: Row,
    frames: u64,
    deadline: &Deadline,
) -> Result<Result<PcpLayout, String>, VmiError> {
    let layout = |count: u64| PcpLayout {
        pcp: 0,
        count,
        lists_at: row.lists_at,
        lists: row.lists,
        types: TYPES,
        huge_order: PcpLayout::huge_order(heads.map.page_size),
    };
    let mut sums = Vec::new();
    let mut left = frames;
    for zone in zones {
        for offset in offsets {
            let at = zone.pageset.wrapping_add(*offset);
            let all = (zones.len() as u64).saturating_mul(offsets.len() as u64);
            deadline.check("processors' lists", sums.len() as u64, all)?;
            sums.push((at, pages_in(heads, at, &layout(0), &mut left)));
        }
    }
    if !sums.iter().any(|(_, pages)| pages.is_some_and(|n| n > 0)) {
        return Ok(Err("they are all empty, or were being changed".into()));
    }
    let places = (0..row.lists_at)
        .step_by(4)
        .filter(|count| COUNT_BEFORE.contains(&row.lists_at.saturating_sub(*count)));
    let mut best: Option<(usize, u64)> = None;
    for place in places {
        let mut fit = 0_usize;
        for (at, pages) in &sums {
            let count = heads
                .space
                .read_u32(element("per_cpu_pages", *at, 0, 0, place)?);
            let count = count.map_err(VmiError::read("per_cpu_pages.count"))?;
            let pages = pages.filter(|pages| *pages > 0);
            fit = fit.saturating_add(usize::from(pages == Some(count.into())));
        }
        if fit > 0 && best.is_none_or(|(most, _)| fit > most) {
            best = Some((fit, place));
        }
    }
    Ok(match best {
        Some((_, count)) => Ok(layout(count)),
        None => Err("no number before them says how many pages they hold".into()),
    })
}

/// How many pages the lists of a processor hold; `None` if they cannot be followed.
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

/// Calls `visit` with each aligned word of what is mapped in `range`.
fn each_word(
    heads: &Heads<'_, '_>,
    range: (KernelVa, KernelVa),
    visit: &mut dyn FnMut(u64) -> Result<(), VmiError>,
) -> Result<(), VmiError> {
    const PIECE: u64 = 64 << 10;
    let step = heads.map.page_size.bytes();
    let space = heads.space;
    let (mut at, end) = range;
    let mut buffer = vec![0; usize::try_from(PIECE).unwrap_or(0)];
    while let Some(left) = end.offset_from(at).filter(|left| *left > 0) {
        let there = space.translate(at).ok();
        let len = there.map_or(step, |there| there.len.min(PIECE)).min(left);
        let part = usize::try_from(len).ok().and_then(|n| buffer.get_mut(..n));
        if let (Some(there), Some(part)) = (there, part)
            && space.memory().read(there.at, part).is_ok()
        {
            let (words, _) = part.as_chunks::<8>();
            for word in words {
                visit(u64::from_le_bytes(*word))?;
            }
        }
        match at.checked_add(len) {
            Some(next) if len > 0 => at = next,
            _ => break,
        }
    }
    Ok(())
}
