//! Zones by their own free lists.
//!
//! The first and the last block of a free list name its head, which lies in the zone at
//! `free_area`, by order and migrate type. So each block that is the end of a list tells where its
//! zone may be, up to the migrate type; the zone is where all of them agree and every other head of
//! the array is one, too. Then the zone's other words are read, and all is held against the lists
//! as anywhere: `nr_free` of each order, `NR_FREE_PAGES`, the span.

use super::heads::Heads;
use crate::deadline::Deadline;
use crate::error::VmiError;
use crate::kernel::{Kernel, element};
use crate::mm::mem_map::MemMap;
use crate::mm::page::{FreeMark, PageLayout};
use crate::mm::zone::{AreaLayout, MAX_ORDERS, Zone};
use crate::{AddressSpace, KernelVa, VirtualMemory};
use sonicshot::{
    GuestBytes, Pfn, PfnRange, PhaseProgress, Progress, Tally, WorkPhase, to_u64, to_usize,
};
use std::collections::{HashMap, HashSet};

/// 64 nodes of five zones of 14 orders of 8 migrate types have 35,840 lists.
const MAX_HEADS: usize = 1 << 16;
/// More zones than 64 nodes have.
const MAX_ZONES: usize = 512;
/// `MIGRATE_TYPES` is four to seven.
const MAX_MIGRATE_TYPES: u64 = 16;

/// The ends of lists of free blocks outside the struct pages: the heads, and the order of each.
#[derive(Debug, Default)]
pub(crate) struct Exits {
    /// The head's address, and the order of the block that names it.
    heads: HashMap<KernelVa, u64>,
}

impl Exits {
    /// Looks at every struct page.
    pub(crate) fn find(
        map: &MemMap<'_>,
        layout: &PageLayout,
        progress: &dyn Progress,
    ) -> Result<Self, VmiError> {
        let mut exits = Self::default();
        let stride = to_usize(map.stride);
        let Some(lru) = usize::try_from(layout.lru).ok() else {
            return Ok(exits);
        };
        let online = || map.spans().iter().filter(|span| span.online);
        let frames: Tally = online().map(|span| span.frames.len()).sum();
        // The struct pages themselves are read.
        let total = frames.times(map.stride).get();
        let mut phase = PhaseProgress::begin(progress, WorkPhase::FindingLists, total);
        for span in online() {
            map.visit_span(span, &mut |_, pages| {
                phase.add(to_u64(pages.len()));
                exits.see(map, layout, &pages, stride, lru)
            })?;
        }
        phase.end();
        Ok(exits)
    }

    fn see(
        &mut self,
        map: &MemMap<'_>,
        layout: &PageLayout,
        pages: &GuestBytes<'_>,
        stride: usize,
        lru: usize,
    ) -> Result<(), VmiError> {
        let Some(count) = pages.len().checked_div(stride) else {
            return Ok(());
        };
        for at in (0..pages.len()).step_by(stride).take(count) {
            let Some(page) = pages.get(at, stride) else {
                break;
            };
            let Some(FreeMark::Buddy { order }) = layout.free_mark(&page) else {
                continue;
            };
            let nodes = [Some(lru), lru.checked_add(8)].into_iter().flatten();
            for node in nodes {
                let Some(node) = page.u64_at(node).map(KernelVa::new) else {
                    continue;
                };
                if !map.holds(node) && order < MAX_ORDERS {
                    self.heads.insert(node, order);
                }
            }
            if self.heads.len() > MAX_HEADS {
                return Err(VmiError::TooMany {
                    what: "heads of lists of free pages",
                    found: to_u64(self.heads.len()),
                    most: to_u64(MAX_HEADS),
                });
            }
        }
        Ok(())
    }

    /// The arrays `free_area` that the heads are in, each with all its heads, lowest first.
    pub(crate) fn arrays(
        &self,
        heads: &Heads<'_, '_>,
        area: &AreaLayout,
        deadline: &Deadline,
    ) -> Result<Vec<KernelVa>, VmiError> {
        if area.migrate_types == 0 || area.migrate_types > MAX_MIGRATE_TYPES {
            return Err(VmiError::Unsupported {
                what: format!("free_area.free_list of {} elements", area.migrate_types),
            });
        }
        let mut votes: HashMap<KernelVa, u64> = HashMap::new();
        for (head, order) in &self.heads {
            for array in starts(*head, *order, area) {
                let votes = votes.entry(array).or_default();
                VmiError::count("heads of free lists", votes, 1)?;
            }
        }
        // The best first; a head that is in one array is in no other.
        let mut order: Vec<(u64, KernelVa)> = votes.into_iter().map(|(at, n)| (n, at)).collect();
        order.sort_unstable_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)));
        let mut taken: HashSet<KernelVa> = HashSet::new();
        let mut found: Vec<KernelVa> = Vec::new();
        let places = to_u64(order.len());
        for (number, (_, array)) in (0_u64..).zip(order) {
            deadline.check("places where a zone may be", number, places)?;
            let own: Vec<KernelVa> = list_heads(array, area).collect();
            let has_vote =
                |head: &&KernelVa| self.heads.contains_key(head) && !taken.contains(head);
            if !own.iter().any(|head| has_vote(&head))
                || Some(to_u64(own.len())) != area.orders.checked_mul(area.migrate_types)
                || !own.iter().all(|head| heads.at(*head).is_some())
            {
                continue;
            }
            taken.extend(own);
            found.push(array);
            few_zones(found.len())?;
        }
        found.sort_unstable();
        Ok(found)
    }
}

/// # Errors
/// [`VmiError::TooMany`] if so many are more than a guest has.
fn few_zones(found: usize) -> Result<(), VmiError> {
    if found <= MAX_ZONES {
        return Ok(());
    }
    Err(VmiError::TooMany {
        what: "zones",
        found: to_u64(found),
        most: to_u64(MAX_ZONES),
    })
}

/// The addresses at which the array may begin that has `head` as one of its heads of `order`.
fn starts(head: KernelVa, order: u64, area: &AreaLayout) -> impl Iterator<Item = KernelVa> {
    let below = (order < area.orders)
        .then(|| order.checked_mul(area.size))
        .flatten()
        .and_then(|bytes| head.raw().checked_sub(bytes));
    (0..area.migrate_types).filter_map(move |migrate_type| {
        let offset = migrate_type.checked_mul(16)?;
        below?.checked_sub(offset).map(KernelVa::new)
    })
}

/// All heads of the array at `array`.
fn list_heads(array: KernelVa, area: &AreaLayout) -> impl Iterator<Item = KernelVa> {
    let area = *area;
    (0..area.orders).flat_map(move |order| {
        (0..area.migrate_types).filter_map(move |migrate_type| {
            let offset = order
                .checked_mul(area.size)?
                .checked_add(migrate_type.checked_mul(16)?)?;
            array.checked_add(offset)
        })
    })
}

/// The offsets of the members of `struct zone` that are read beside the lists.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ZoneWords {
    /// `spanned_pages`. Since 3.10 `zone_start_pfn` and `managed_pages` stand before it, and
    /// `present_pages` behind (`include/linux/mmzone.h`).
    pub spanned_pages: u64,
    /// `vm_stat[NR_FREE_PAGES]`, if it is told.
    pub free_pages: Option<u64>,
    /// `NR_FREE_PAGES`.
    pub index: u64,
}

impl ZoneWords {
    /// By VMCOREINFO.
    pub(crate) fn told(kernel: &Kernel<'_>) -> Result<Self, VmiError> {
        let index = kernel.need_constant("NR_FREE_PAGES")?;
        let index = u64::try_from(index).ok().filter(|index| *index < 256);
        let index = index.ok_or_else(|| VmiError::Unsupported {
            what: "NR_FREE_PAGES that is no index".into(),
        })?;
        let vm_stat = kernel.need_member("zone", "vm_stat")?.offset;
        Ok(Self {
            index,
            spanned_pages: kernel.need_member("zone", "spanned_pages")?.offset,
            free_pages: Some(
                index
                    .checked_mul(8)
                    .and_then(|bytes| vm_stat.checked_add(bytes))
                    .ok_or_else(|| VmiError::Unsupported {
                        what: format!("zone.vm_stat at {vm_stat:#x}"),
                    })?,
            ),
        })
    }
}

/// The array of free areas by VMCOREINFO.
pub(crate) fn told_area(kernel: &Kernel<'_>) -> Result<AreaLayout, VmiError> {
    let len = |ty: &str, name: &str, max: u64| -> Result<u64, VmiError> {
        match kernel.need_member(ty, name)?.len {
            Some(len) if (1..=max).contains(&len) => Ok(len),
            len => Err(VmiError::Unsupported {
                what: format!("{ty}.{name} of {len:?} elements"),
            }),
        }
    };
    let migrate_types = len("free_area", "free_list", MAX_MIGRATE_TYPES)?;
    let free_list = kernel.need_member("free_area", "free_list")?.offset;
    let size = kernel.need_type_size("free_area")?;
    // `nr_free` is all that is behind the lists.
    let nr_free = migrate_types.checked_mul(16);
    match nr_free {
        Some(nr_free) if free_list == 0 && nr_free.checked_add(8) == Some(size) => Ok(AreaLayout {
            free_area: kernel.need_member("zone", "free_area")?.offset,
            orders: len("zone", "free_area", MAX_ORDERS)?,
            size,
            migrate_types,
            nr_free,
        }),
        _ => Err(VmiError::Unsupported {
            what: format!(
                "struct free_area of {size} bytes with {migrate_types} lists at {free_list}"
            ),
        }),
    }
}

/// Reads the zone whose array of free areas is at `array`.
///
/// # Errors
/// [`VmiError::Corrupt`] if its span is none.
pub(crate) fn read(
    space: &AddressSpace<'_>,
    array: KernelVa,
    area: &AreaLayout,
    words: ZoneWords,
) -> Result<Zone, VmiError> {
    let at = array.raw().checked_sub(area.free_area).map(KernelVa::new);
    let at = at.ok_or(VmiError::Corrupt {
        what: "zone.free_area",
        at: array,
        value: area.free_area,
    })?;
    let word = |what, offset: u64| {
        let at = element(what, at, 0, 0, offset)?;
        space.read_u64(at).map_err(VmiError::read(what))
    };
    let before = |back: u64| {
        words
            .spanned_pages
            .checked_sub(back)
            .ok_or_else(|| VmiError::Unsupported {
                what: format!("zone.spanned_pages at {:#x}", words.spanned_pages),
            })
    };
    let start = word("zone.zone_start_pfn", before(16)?)?;
    let managed = word("zone.managed_pages", before(8)?)?;
    let spanned = word("zone.spanned_pages", words.spanned_pages)?;
    let present = words.spanned_pages.checked_add(8);
    let present = present.map_or(Ok(0), |offset| word("zone.present_pages", offset))?;
    let span = PfnRange::with_len(Pfn::new(start), spanned)
        .filter(|span| span.end().raw() < 1 << 52)
        .filter(|_| spanned > 0 && managed <= present && present <= spanned)
        .ok_or(VmiError::Corrupt {
            what: "the frames of a zone that was found by its lists",
            at,
            value: spanned,
        })?;
    let mut nr_free = Vec::new();
    for order in 0..area.orders {
        let at = element("zone.free_area", array, order, area.size, area.nr_free)?;
        let count = space.read_u64(at);
        nr_free.push(count.map_err(VmiError::read("free_area.nr_free"))?);
    }
    Ok(Zone {
        at,
        // By the word that says so, or not at all.
        node: 0,
        name: name(space, at, words.spanned_pages, area.free_area),
        span,
        present: Some(present),
        nr_free,
        counter: match words.free_pages {
            Some(offset) => word("zone.vm_stat", offset)?.cast_signed(),
            None => 0,
        },
        unaccepted: 0,
        pageset: KernelVa::new(0),
    })
}

/// The content of a zone's lists.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sums {
    /// Pages in all blocks.
    pub pages: u64,
    /// The lowest frame.
    pub first: u64,
    /// The frame behind the last.
    pub end: u64,
}

/// A block in a list.
pub(crate) struct Block {
    /// Its first page's `struct page`.
    pub page: KernelVa,
    /// The frame of that.
    pub frame: u64,
    /// The number of its pages.
    pub pages: u64,
}

fn corrupt(at: KernelVa, value: u64) -> VmiError {
    VmiError::Corrupt {
        what: "a list of free blocks",
        at,
        value,
    }
}

/// Walks the lists of the zone whose free areas are at `array`, `most` blocks of each.
///
/// # Errors
/// [`VmiError::Corrupt`] if a list leads to what is no page, and what `visit` gives.
pub(crate) fn walk(
    heads: &Heads<'_, '_>,
    array: KernelVa,
    area: &AreaLayout,
    most: u64,
    visit: &mut dyn FnMut(Block) -> Result<(), VmiError>,
) -> Result<(), VmiError> {
    let per_order = to_usize(area.migrate_types);
    for (number, head) in list_heads(array, area).enumerate() {
        let order = number.checked_div(per_order);
        let order = order.and_then(|order| u32::try_from(order).ok());
        let pages = order.and_then(|order| 1_u64.checked_shl(order));
        let pages = pages.ok_or_else(|| corrupt(head, to_u64(number)))?;
        let next = heads.space.read_u64(head);
        let mut node = KernelVa::new(next.map_err(VmiError::read("a free list's head"))?);
        let mut seen = 0_u64;
        while node != head && seen < most {
            let page = heads.page_of(node)?;
            let frame = heads.map.frame_of(page);
            let frame = frame.ok_or_else(|| corrupt(head, node.raw()))?.raw();
            visit(Block { page, frame, pages })?;
            VmiError::count("free blocks", &mut seen, 1)?;
            node = KernelVa::new(heads.map.u64_at(node)?);
        }
    }
    Ok(())
}

/// The content of all lists of the zone whose free areas are at `array`; `left` bounds all walks
/// together.
///
/// # Errors
/// [`VmiError::Corrupt`] if a list is not closed.
pub(crate) fn sums(
    heads: &Heads<'_, '_>,
    array: KernelVa,
    area: &AreaLayout,
    left: &mut u64,
) -> Result<Sums, VmiError> {
    let mut sums = Sums {
        pages: 0,
        first: u64::MAX,
        end: 0,
    };
    walk(heads, array, area, u64::MAX, &mut |block| {
        let Block { frame, pages, .. } = block;
        let one_less = left.checked_sub(1);
        *left = one_less.ok_or_else(|| corrupt(array, frame))?;
        let (Some(end), Some(sum)) = (frame.checked_add(pages), sums.pages.checked_add(pages))
        else {
            return Err(corrupt(array, frame));
        };
        sums.pages = sum;
        sums.first = sums.first.min(frame);
        sums.end = sums.end.max(end);
        Ok(())
    })?;
    Ok(sums)
}

/// The zone's name: of the words between its span and its lists the one that points to one.
fn name(space: &AddressSpace<'_>, at: KernelVa, spanned_pages: u64, free_area: u64) -> String {
    const NAMES: [&str; 6] = ["DMA", "DMA32", "Normal", "HighMem", "Movable", "Device"];
    let words = (spanned_pages..free_area).step_by(8).take(16);
    let names = words.filter_map(|offset| {
        let pointer = space.read_u64(at.checked_add(offset)?).ok()?;
        let text = space.read_str(KernelVa::new(pointer), 8).ok()?;
        NAMES.contains(&text.as_str()).then_some(text)
    });
    names.into_iter().next().unwrap_or_else(|| "unnamed".into())
}

#[cfg(test)]
mod tests {
    use super::{Exits, MAX_HEADS, MAX_MIGRATE_TYPES, MAX_ZONES, few_zones, told_area};
    use crate::VmiError;
    use crate::kernel::testing::{DIRECT_MAP, Ram, kernel, page_facts};
    use crate::mm::mem_map::MemMap;
    use crate::mm::page::PageLayout;
    use crate::symbols::Member;

    #[test]
    fn heads_without_end_are_refused_with_their_number() {
        const ARRAY: u64 = 0x10_0000;
        let heads = |frames: u64, each: u64| {
            let mut facts = page_facts();
            facts.symbols.insert("mem_map", DIRECT_MAP + 0x1000);
            facts.symbols.insert("max_mapnr", DIRECT_MAP + 0x1008);
            facts.member("page", "compound_head", 8);
            facts.constants.insert("PAGE_BUDDY_MAPCOUNT_VALUE", -129);
            // Struct pages of what is RAM, and no more.
            let mut ram = Ram::new(256 << 20);
            ram.put(0x1000, DIRECT_MAP + ARRAY);
            ram.put(0x1008, frames);
            for pfn in 0..frames {
                let page = ARRAY + pfn * 64;
                ram.put(page + 8, 0xffff_ffff_9000_0000 + pfn * each);
                ram.put(page + 16, 0xffff_ffff_a000_0000 + pfn * each);
                ram.put(page + 48, 0xffff_ff7f);
            }
            let memory = ram.memory();
            let kernel = kernel(&memory, facts);
            let map = MemMap::new(&kernel).unwrap();
            let layout = PageLayout::new(&kernel, 64).unwrap();
            Exits::find(&map, &layout, &None).map(|exits| exits.heads.len())
        };
        let frames = MAX_HEADS as u64 / 2;
        assert_eq!(heads(frames + 1, 0).unwrap(), 2);
        assert_eq!(heads(frames, 16).unwrap(), MAX_HEADS);
        let error = heads(frames + 1, 16).unwrap_err();
        assert!(matches!(error, VmiError::TooMany { .. }), "{error}");
    }

    #[test]
    fn there_are_no_more_lists_of_an_order_than_a_bound() {
        let ram = Ram::new(8 << 20);
        let memory = ram.memory();
        for (lists, is_read) in [
            (0, false),
            (4, true),
            (MAX_MIGRATE_TYPES, true),
            (MAX_MIGRATE_TYPES + 1, false),
        ] {
            let mut facts = page_facts();
            let member = |len| Member {
                offset: 0,
                size: None,
                len: Some(len),
            };
            facts
                .members
                .insert(("free_area", "free_list"), member(lists));
            facts.members.insert(("zone", "free_area"), member(11));
            facts.sizes.insert("free_area", lists * 16 + 8);
            let area = told_area(&kernel(&memory, facts));
            assert_eq!(area.is_ok(), is_read, "{lists}");
        }
    }

    #[test]
    fn there_are_no_more_zones_than_a_bound() {
        assert!(few_zones(MAX_ZONES).is_ok());
        assert!(matches!(
            few_zones(MAX_ZONES + 1),
            Err(VmiError::TooMany { .. })
        ));
    }
}
