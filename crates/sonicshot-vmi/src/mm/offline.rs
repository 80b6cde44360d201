//! Which memory is offline, and by what proof.
//!
//! Two things are called offline: a section that the kernel does not use (hotplug), and a page
//! that says so of itself (`PageOffline`: a balloon's, or a part of a virtio-mem device that is
//! not plugged in). One word says either, and one wrong bit in it would cost up to 128 MiB in
//! use. So each needs a second record:
//!
//! - A *section* is offline if its word says so, the memory block that it belongs to says so
//!   (`drivers/base/memory.c`; persistent, device and private memory has sections but no memory
//!   blocks), and the zones' and the nodes' `present_pages` are just the frames of the others.
//!   Then nothing outside may point into it: no free or per-CPU list, no LRU list, no user's page
//!   table. What its own struct pages say is not asked: of a section that was never online they
//!   were never written.
//! - A *page* is offline if its type says so and its driver has it: the ring that its `lru` is in
//!   is closed, linked both ways, consists of such pages alone, and its head lies in the driver's
//!   structure, beside a count that is just as long (`include/linux/balloon_compaction.h`).
//!
//! What is not proved is kept, and counted in a note. It is no reason to refuse a prune: what a
//! balloon or virtio-mem gave back to the host reads as zero there, and needs no class to go.

use super::mem_map::{MemMap, Section};
use super::page::PageLayout;
use super::zone::Zones;
use crate::arch::x86_64::e820;
use crate::error::VmiError;
use crate::kernel::{Kernel, element};
use crate::note::Note;
use crate::{KernelVa, VirtualMemory};
use sonicshot::{GpaRange, PageClass, PageMap, Pfn, PfnRange};

/// A section that may be offline: everything but what points into it has been asked.
#[derive(Debug)]
struct Suspect {
    frames: PfnRange,
    /// Where its struct pages end.
    structs_end: KernelVa,
    /// What points into it.
    used: Option<String>,
}

/// The sections that may be offline, and what was found to speak against each.
#[derive(Debug, Default)]
pub(crate) struct OfflineSections {
    /// By frame, disjoint.
    suspects: Vec<Suspect>,
    /// Where the struct pages of each begin, sorted, and its index.
    by_structs: Vec<(KernelVa, usize)>,
    /// Frames of sections that are not online and not proved to be offline.
    kept: u64,
    reasons: Vec<String>,
}

impl OfflineSections {
    /// Asks the sections' words, their memory blocks and the counters. `is_listed` tells whether a
    /// free list has anything in a stretch of frames.
    pub(crate) fn find(
        kernel: &Kernel<'_>,
        mem_map: &MemMap<'_>,
        zones: &Zones,
        is_listed: &dyn Fn(PfnRange) -> bool,
    ) -> Result<Self, VmiError> {
        let mut found = Self::default();
        let sections: Vec<Section> = mem_map
            .sections()
            .iter()
            .filter(|section| !section.online)
            .copied()
            .collect();
        if sections.is_empty() {
            return Ok(found);
        }
        let blocks = MemoryBlocks::new(kernel)?;
        let counted = count_present(kernel, mem_map, zones)?;
        for section in sections {
            let frames = section.frames;
            let doubt = match (&blocks, &counted) {
                (None, _) => Some("no source knows the kernel's memory blocks".to_owned()),
                (_, Err(why)) => Some(why.clone()),
                (Some(blocks), Ok(())) => blocks.doubt(kernel, section.number)?,
            };
            let doubt = doubt.or_else(|| {
                is_listed(frames).then(|| format!("a free list has pages of frames {frames}"))
            });
            match (doubt, mem_map.page_va(frames.start())) {
                (None, Some(start)) => {
                    let len = frames.len().checked_mul(mem_map.stride);
                    let end = len.and_then(|len| start.checked_add(len));
                    let end = end.ok_or(VmiError::Corrupt {
                        what: "the struct pages of a section",
                        at: start,
                        value: frames.len(),
                    })?;
                    found.by_structs.push((start, found.suspects.len()));
                    found.suspects.push(Suspect {
                        frames,
                        structs_end: end,
                        used: None,
                    });
                }
                (doubt, _) => found.keep(
                    frames,
                    doubt.unwrap_or_else(|| format!("frame {} has no struct page", frames.start())),
                ),
            }
        }
        found.by_structs.sort_unstable();
        Ok(found)
    }

    fn keep(&mut self, frames: PfnRange, reason: String) {
        self.kept = self.kept.saturating_add(frames.len());
        if self.reasons.len() < 4 && !self.reasons.contains(&reason) {
            self.reasons.push(reason);
        }
    }

    /// Whether there is anything to watch for.
    pub(crate) fn is_empty(&self) -> bool {
        self.suspects.is_empty()
    }

    fn note_user(&mut self, pfn: Pfn, text: impl FnOnce() -> String) {
        let at = self.suspects.partition_point(|s| s.frames.end() <= pfn);
        if let Some(suspect) = self.suspects.get_mut(at)
            && suspect.frames.contains(pfn)
            && suspect.used.is_none()
        {
            suspect.used = Some(text());
        }
    }

    /// Notes that the LRU list of frame `by` goes on at `node`.
    #[inline]
    pub(crate) fn see_lru(&mut self, by: Pfn, node: KernelVa) {
        let above = self.by_structs.partition_point(|(start, _)| *start <= node);
        let below = above.checked_sub(1).and_then(|at| self.by_structs.get(at));
        if let Some((_, index)) = below
            && let Some(suspect) = self.suspects.get_mut(*index)
            && node < suspect.structs_end
            && suspect.used.is_none()
        {
            suspect.used = Some(format!("an LRU list goes from frame {by} into it"));
        }
    }

    /// Looks into the page tables of processes for frames that they map.
    pub(crate) fn see_page_tables(
        &mut self,
        kernel: &Kernel<'_>,
        map: &PageMap,
    ) -> Result<(), VmiError> {
        const PRESENT_AND_USER: u64 = 1 | 1 << 2;
        const LARGE: u64 = 1 << 7;
        const FRAME: u64 = ((1 << 52) - 1) & !0xfff;
        /// A page of 1 GiB.
        const LARGEST: u64 = 1 << 18;
        if self.is_empty() {
            return Ok(());
        }
        let page_size = map.page_size();
        let mut table = vec![0; usize::try_from(page_size.bytes()).unwrap_or(4096)];
        let tables = map
            .runs()
            .filter(|(_, class)| *class == PageClass::PageTable);
        for pfn in tables.flat_map(|(frames, _)| frames.iter()) {
            let Some(at) = pfn.gpa(page_size) else {
                continue;
            };
            kernel.space.memory().read(at, &mut table)?;
            let (entries, _) = table.as_chunks::<8>();
            for entry in entries {
                let entry = u64::from_le_bytes(*entry);
                if entry & PRESENT_AND_USER != PRESENT_AND_USER {
                    continue;
                }
                let first = (entry & FRAME) >> page_size.shift();
                let text = || format!("the page table in frame {pfn} maps frames of it");
                self.note_user(Pfn::new(first), text);
                if entry & LARGE != 0 && first.is_multiple_of(LARGEST) {
                    let large = PfnRange::with_len(Pfn::new(first), LARGEST);
                    for suspect in &mut self.suspects {
                        let mapped = large
                            .is_some_and(|large| !large.intersection(&suspect.frames).is_empty());
                        if mapped && suspect.used.is_none() {
                            suspect.used = Some(text());
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Gives the frames of sections that nothing speaks against their class, and says what is kept.
    pub(crate) fn settle(mut self, mem_map: &MemMap<'_>, map: &mut PageMap, notes: &mut Vec<Note>) {
        let offline = |span: &&super::mem_map::Span| !span.online;
        for suspect in std::mem::take(&mut self.suspects) {
            if let Some(reason) = suspect.used {
                self.keep(
                    suspect.frames,
                    format!("frames {}: {reason}", suspect.frames),
                );
                continue;
            }
            for span in mem_map.spans().iter().filter(offline) {
                let part = span.frames.intersection(&suspect.frames);
                if !part.is_empty() {
                    map.set(part, PageClass::Offline);
                }
            }
        }
        if self.kept > 0 {
            notes.push(Note::SectionsKept {
                frames: self.kept,
                reasons: self.reasons,
            });
        }
    }
}

/// Holds `present_pages` of all zones and nodes against the RAM frames of the online sections.
fn count_present(
    kernel: &Kernel<'_>,
    mem_map: &MemMap<'_>,
    zones: &Zones,
) -> Result<Result<(), String>, VmiError> {
    let Some(ram) = e820::usable_ram(kernel, e820::OWN)? else {
        return Ok(Err("no source knows the guest's own memory map".into()));
    };
    let boot = whole_frames(ram, mem_map);
    let mut expected = 0_u64;
    for span in mem_map.spans().iter().filter(|span| span.online) {
        let too_many = || VmiError::Corrupt {
            what: "the frames of the online sections",
            at: span.at,
            value: span.frames.len(),
        };
        let mut add = |frames: u64| -> Result<(), VmiError> {
            expected = expected.checked_add(frames).ok_or_else(too_many)?;
            Ok(())
        };
        if span.early {
            for ram in &boot {
                add(ram.intersection(&span.frames).len())?;
            }
        } else {
            add(span.frames.len())?;
        }
    }
    let mut by_zones = Some(0_u64);
    for zone in &zones.zones {
        by_zones = by_zones
            .zip(zone.present)
            .and_then(|(sum, present)| sum.checked_add(present));
    }
    let Some(by_zones) = by_zones else {
        return Ok(Err("no source knows zone.present_pages".into()));
    };
    let Some(offset) = kernel.member("pglist_data", "node_present_pages")? else {
        return Ok(Err("no source knows pglist_data.node_present_pages".into()));
    };
    let mut by_nodes = 0_u64;
    for node in &zones.nodes {
        let at = element("pglist_data", *node, 0, 0, offset.offset)?;
        let present = kernel.read_u64("pglist_data.node_present_pages", at)?;
        by_nodes = by_nodes.checked_add(present).ok_or(VmiError::Corrupt {
            what: "pglist_data.node_present_pages",
            at,
            value: present,
        })?;
    }
    Ok(if by_zones == expected && by_nodes == expected {
        Ok(())
    } else {
        Err(format!(
            "the online sections have {expected} frames of RAM, the zones count {by_zones} present \
             pages and the nodes {by_nodes}"
        ))
    })
}

/// The whole frames of `ram`, ranges that touch taken as one, as `memblock` has them.
fn whole_frames(mut ram: Vec<GpaRange>, mem_map: &MemMap<'_>) -> Vec<PfnRange> {
    ram.sort_unstable_by_key(GpaRange::start);
    let mut joined: Vec<GpaRange> = Vec::new();
    for range in ram {
        match joined.last_mut() {
            Some(last) if range.start() <= last.end() => {
                *last = GpaRange::new(last.start(), last.end().max(range.end()));
            }
            _ => joined.push(range),
        }
    }
    let frames = joined
        .iter()
        .map(|range| range.whole_frames(mem_map.page_size));
    frames.collect()
}

/// The kernel's memory blocks (`drivers/base/memory.c`), since 5.8 (4fb6eabf1037) in an `xarray`
/// by their number.
struct MemoryBlocks {
    /// `xarray.xa_head`.
    head: KernelVa,
    shift: u64,
    slots: u64,
    /// Bits of the number that one node of the tree resolves.
    node_bits: u32,
    start_section_nr: u64,
    state: u64,
    state_size: u64,
    offline: u64,
    per_block: u64,
}

impl MemoryBlocks {
    /// `None` where no source knows them.
    fn new(kernel: &Kernel<'_>) -> Result<Option<Self>, VmiError> {
        /// A macro until the states became `enum memory_block_state`.
        const MEM_OFFLINE: i64 = 1 << 2;
        /// 64 sections of 128 MiB are 8 GiB; no machine has larger blocks than 2 GiB.
        const MAX_PER_BLOCK: u32 = 64;
        let (Some(blocks), Some(per_block)) = (
            kernel.symbol("memory_blocks")?,
            kernel.symbol("sections_per_block")?,
        ) else {
            return Ok(None);
        };
        let (Some(head), Some(shift), Some(slots), Some(start), Some(state)) = (
            kernel.member("xarray", "xa_head")?,
            kernel.member("xa_node", "shift")?,
            kernel.member("xa_node", "slots")?,
            kernel.member("memory_block", "start_section_nr")?,
            kernel.member("memory_block", "state")?,
        ) else {
            return Ok(None);
        };
        let per_block = kernel.read_u32("sections_per_block", per_block)?;
        let offline = kernel.constant("MEM_OFFLINE")?.unwrap_or(MEM_OFFLINE);
        let slots_len = slots.len.filter(|len| len.is_power_of_two() && *len <= 64);
        let (Some(slots_len), Ok(offline), Some(state_size), 1..=MAX_PER_BLOCK) = (
            slots_len,
            u64::try_from(offline),
            state.size.filter(|size| matches!(size, 4 | 8)),
            per_block,
        ) else {
            return Ok(None);
        };
        Ok(Some(Self {
            head: element("memory_blocks", blocks, 0, 0, head.offset)?,
            shift: shift.offset,
            slots: slots.offset,
            node_bits: slots_len.trailing_zeros(),
            start_section_nr: start.offset,
            state: state.offset,
            state_size,
            offline,
            per_block: u64::from(per_block),
        }))
    }

    /// Why section `number` is not in an offline memory block; `None` if it is.
    fn doubt(&self, kernel: &Kernel<'_>, number: u64) -> Result<Option<String>, VmiError> {
        let none = || Ok(Some(format!("section {number} has no memory block")));
        let Some(id) = number.checked_div(self.per_block) else {
            return none();
        };
        let Some(block) = self.load(kernel, id)? else {
            return none();
        };
        let field = |offset| element("memory_block", block, 0, 0, offset);
        let start = kernel.read_u64(
            "memory_block.start_section_nr",
            field(self.start_section_nr)?,
        )?;
        if Some(start) != id.checked_mul(self.per_block) {
            return Ok(Some(format!(
                "the memory block of section {number} begins at section {start}"
            )));
        }
        let state = field(self.state)?;
        let state = if self.state_size == 4 {
            u64::from(kernel.read_u32("memory_block.state", state)?)
        } else {
            kernel.read_u64("memory_block.state", state)?
        };
        Ok((state != self.offline).then(|| {
            format!("the memory block of section {number} is in state {state}, not offline")
        }))
    }

    /// The entry at `index` (`xa_load`, `lib/xarray.c`).
    fn load(&self, kernel: &Kernel<'_>, index: u64) -> Result<Option<KernelVa>, VmiError> {
        /// Entries below are no nodes (`xa_is_node`).
        const MIN_NODE: u64 = 4096;
        let mask = (1_u64 << self.node_bits).wrapping_sub(1);
        let mut entry = kernel.read_u64("xarray.xa_head", self.head)?;
        let mut above: Option<u32> = None;
        while entry & 3 == 2 && entry > MIN_NODE {
            let node = KernelVa::new(entry & !3);
            let at = element("xa_node", node, 0, 0, self.shift)?;
            let mut shift = [0];
            kernel
                .space
                .read(at, &mut shift)
                .map_err(VmiError::read("xa_node.shift"))?;
            let shift = u32::from(shift[0]);
            // Each node resolves the bits right below its parent's.
            let expected = above.map_or(Some(shift), |above| above.checked_sub(self.node_bits));
            let slot = index.checked_shr(shift);
            let (Some(slot), true) = (slot, expected == Some(shift)) else {
                return Err(VmiError::Corrupt {
                    what: "xa_node.shift",
                    at,
                    value: u64::from(shift),
                });
            };
            if above.is_none() && slot > mask {
                return Ok(None);
            }
            let slot = element("xa_node.slots", node, slot & mask, 8, self.slots)?;
            entry = kernel.read_u64("xa_node.slots", slot)?;
            if shift == 0 {
                above = Some(0);
                break;
            }
            above = Some(shift);
        }
        let is_leaf = above.map_or(index == 0, |shift| shift == 0);
        let is_pointer = entry & 3 == 0 && entry >> 63 == 1;
        Ok((is_leaf && is_pointer).then_some(KernelVa::new(entry)))
    }
}

/// What a ring of offline pages came to.
enum Ring {
    /// All its pages, and that a driver has them.
    Whole(Vec<Pfn>),
    /// The pages that were met, and why they are not believed.
    Broken(Vec<Pfn>, String),
}

/// Pages that say that they are offline, and whether their driver says so too.
#[derive(Debug, Default)]
pub(crate) struct OfflinePages {
    /// Sorted.
    frames: Vec<Pfn>,
    seen: Vec<bool>,
}

impl OfflinePages {
    /// Notes a frame; they come in rising order.
    pub(crate) fn push(&mut self, pfn: Pfn) {
        self.frames.push(pfn);
    }

    fn index(&self, pfn: Pfn) -> Option<usize> {
        self.frames.binary_search(&pfn).ok()
    }

    /// Gives those their class whose ring stands, and says how many are kept.
    pub(crate) fn settle(
        mut self,
        kernel: &Kernel<'_>,
        mem_map: &MemMap<'_>,
        layout: &PageLayout,
        map: &mut PageMap,
        notes: &mut Vec<Note>,
    ) -> Result<(), VmiError> {
        /// More drivers have no balloon: the others' pages are kept.
        const MAX_RINGS: usize = 256;
        self.seen = vec![false; self.frames.len()];
        let (mut kept, mut rings) = (0_usize, 0_usize);
        let mut why: Option<String> = None;
        let mut at = 0_usize;
        while let Some(first) = self.frames.get(at).copied() {
            let seen = self.seen.get(at).copied().unwrap_or(true);
            at = at.saturating_add(1);
            if seen {
                continue;
            }
            rings = rings.saturating_add(1);
            let ring = if rings > MAX_RINGS {
                Ring::Broken(
                    vec![first],
                    format!("there are more than {MAX_RINGS} such rings"),
                )
            } else {
                self.walk(kernel, mem_map, layout, first)?
            };
            match ring {
                Ring::Whole(frames) => {
                    for pfn in frames {
                        if let Some(page) = PfnRange::with_len(pfn, 1) {
                            map.set(page, PageClass::Offline);
                        }
                    }
                }
                Ring::Broken(frames, reason) => {
                    kept = kept.saturating_add(frames.len());
                    why.get_or_insert(reason);
                }
            }
        }
        if let Some(why) = why {
            notes.push(Note::OfflinePagesKept {
                pages: kept as u64,
                why,
            });
        }
        Ok(())
    }

    /// Follows the list that `first` is in, once around.
    fn walk(
        &mut self,
        kernel: &Kernel<'_>,
        mem_map: &MemMap<'_>,
        layout: &PageLayout,
        first: Pfn,
    ) -> Result<Ring, VmiError> {
        let mut met = vec![first];
        self.mark(first);
        let Some(start) = mem_map
            .page_va(first)
            .and_then(|at| at.checked_add(layout.lru))
        else {
            return Ok(Ring::Broken(
                met,
                format!("frame {first} has no struct page"),
            ));
        };
        let mut head: Option<KernelVa> = None;
        let mut owner: Option<u64> = None;
        let mut node = start;
        loop {
            let pfn = self.page_at(mem_map, layout, node);
            let next = match pfn {
                Some(pfn) => {
                    let page = mem_map.page_va(pfn);
                    let left = page
                        .map(|at| layout.left_by_driver(mem_map, at))
                        .transpose()?;
                    let Some(private) = left.flatten() else {
                        let why = format!("frame {pfn} is not as a balloon leaves its pages");
                        return Ok(Ring::Broken(met, why));
                    };
                    if *owner.get_or_insert(private) != private {
                        let why = format!("frame {pfn} is of another owner than frame {first}");
                        return Ok(Ring::Broken(met, why));
                    }
                    mem_map.u64_at(node)?
                }
                None => kernel.read_u64("a balloon's list", node)?,
            };
            let next = KernelVa::new(next);
            if next == start {
                if self.links_back(kernel, mem_map, next, node) != Some(true) {
                    return Ok(Ring::Broken(met, torn(first, node)));
                }
                break;
            }
            if self.links_back(kernel, mem_map, next, node) != Some(true) {
                return Ok(Ring::Broken(met, torn(first, node)));
            }
            match self.page_at(mem_map, layout, next) {
                Some(pfn) => {
                    let index = self.index(pfn);
                    let fresh = index.and_then(|index| self.seen.get_mut(index));
                    let Some(seen) = fresh.filter(|seen| !**seen) else {
                        let why = format!("its list goes on at frame {pfn}, which is not of it");
                        return Ok(Ring::Broken(met, format!("frame {first}: {why}")));
                    };
                    *seen = true;
                    met.push(pfn);
                }
                // The list's head: one, outside the struct pages.
                None if head.is_none() && !mem_map.holds(next) => head = Some(next),
                None => {
                    let why =
                        format!("frame {first}: its list goes through {next}, which is no page");
                    return Ok(Ring::Broken(met, why));
                }
            }
            node = next;
        }
        let Some(head) = head else {
            let why = format!("frame {first}: its list of {} has no head", met.len());
            return Ok(Ring::Broken(met, why));
        };
        // A balloon's pages point to `struct balloon_dev_info`, which has the list.
        let owner = owner.unwrap_or(0);
        let is_near = head.raw().checked_sub(owner).is_some_and(|gap| gap < 256);
        if owner != 0 && !is_near {
            let why = format!("frame {first}: its owner at {owner:#x} has no list at {head}");
            return Ok(Ring::Broken(met, why));
        }
        if !is_counted(kernel, head, met.len() as u64) {
            let why = format!(
                "frame {first}: beside the list of {} at {head} no count says so",
                met.len()
            );
            return Ok(Ring::Broken(met, why));
        }
        Ok(Ring::Whole(met))
    }

    fn mark(&mut self, pfn: Pfn) {
        if let Some(seen) = self.index(pfn).and_then(|index| self.seen.get_mut(index)) {
            *seen = true;
        }
    }

    /// The frame whose `lru` is at `node`.
    fn page_at(&self, mem_map: &MemMap<'_>, layout: &PageLayout, node: KernelVa) -> Option<Pfn> {
        let page = node.raw().checked_sub(layout.lru)?;
        mem_map.frame_of(KernelVa::new(page))
    }

    /// Whether `next` names `node` as the one before it; `None` if it cannot be read.
    fn links_back(
        &self,
        kernel: &Kernel<'_>,
        mem_map: &MemMap<'_>,
        next: KernelVa,
        node: KernelVa,
    ) -> Option<bool> {
        let at = next.checked_add(8)?;
        let back = if mem_map.holds(next) {
            mem_map.u64_at(at).ok()?
        } else {
            kernel.read_u64("a balloon's list", at).ok()?
        };
        Some(back == node.raw())
    }
}

fn torn(first: Pfn, node: KernelVa) -> String {
    format!("frame {first}: its list is not linked in both directions at {node}")
}

/// Whether a count of `len` stands in the structure around the list head at `head`: a balloon's
/// driver has one beside its list (`virtio_balloon.num_pages`, `drivers/virtio/virtio_balloon.c`).
fn is_counted(kernel: &Kernel<'_>, head: KernelVa, len: u64) -> bool {
    const AROUND: u64 = 256;
    let Ok(len) = u32::try_from(len) else {
        return false;
    };
    let first = head.raw().wrapping_sub(AROUND) & !7;
    let mut bytes = [0; 512 + 16];
    // What is not mapped holds no count.
    for (at, word) in (first..).step_by(8).zip(bytes.chunks_mut(8)) {
        if kernel.space.read(KernelVa::new(at), word).is_err() {
            word.fill(0);
        }
    }
    let (words, _) = bytes.as_chunks::<4>();
    len > 0 && words.iter().any(|word| u32::from_le_bytes(*word) == len)
}

#[cfg(test)]
mod tests {
    use super::{OfflinePages, OfflineSections};
    use crate::KernelVa;
    use crate::kernel::testing::{DIRECT_MAP, Facts, Ram, kernel, page_facts};
    use crate::mm::mem_map::MemMap;
    use crate::mm::page::PageLayout;
    use crate::mm::zone::Zones;
    use crate::note::Note;
    use sonicshot::{GuestMemory, PageClass, PageMap, PageSize, Pfn, PfnRange};

    const MIB: usize = 1 << 20;
    /// Sections of 16 MiB: 4096 frames each, two of them.
    const FRAMES: u64 = 4096;
    const ARRAY: u64 = 0x10_0000;
    const OFFLINE: u64 = 0xffff_feff;

    fn struct_page(pfn: u64) -> u64 {
        ARRAY + pfn * 64
    }

    fn ring_facts() -> Facts {
        let mut facts = page_facts();
        facts.member("page", "compound_head", 8);
        facts.constants.insert("PAGE_BUDDY_MAPCOUNT_VALUE", -129);
        facts.constants.insert("PAGE_OFFLINE_MAPCOUNT_VALUE", -257);
        facts.symbols.insert("mem_map", DIRECT_MAP + 0x1000);
        facts.symbols.insert("max_mapnr", DIRECT_MAP + 0x1008);
        facts
    }

    /// A balloon at 0x4000 with these pages in its list, in this order, and its count.
    fn balloon(pages: &[u64]) -> Ram {
        let mut ram = Ram::new(8 * MIB);
        ram.put(0x1000, DIRECT_MAP + ARRAY);
        ram.put(0x1008, 2048);
        let head = DIRECT_MAP + 0x4010;
        let nodes: Vec<u64> = pages
            .iter()
            .map(|pfn| DIRECT_MAP + struct_page(*pfn) + 8)
            .chain([head])
            .collect();
        for (number, node) in nodes.iter().enumerate() {
            let next = nodes[(number + 1) % nodes.len()];
            ram.put(node - DIRECT_MAP, next);
            ram.put(next + 8 - DIRECT_MAP, *node);
        }
        for pfn in pages {
            ram.put(struct_page(*pfn) + 40, DIRECT_MAP + 0x4000);
            // No mapcount but the type; one reference.
            ram.put(struct_page(*pfn) + 48, OFFLINE | 1 << 32);
        }
        ram.put(0x3ff8, pages.len() as u64);
        ram
    }

    fn settled(ram: &Ram, pages: &[u64]) -> (Vec<u64>, Vec<String>) {
        let memory = ram.memory();
        let kernel = kernel(&memory, ring_facts());
        let mem_map = MemMap::new(&kernel, PageSize::SIZE_4K).unwrap();
        let layout = PageLayout::new(&kernel, 64).unwrap();
        let mut map = PageMap::new(memory.layout(), PageSize::SIZE_4K);
        let mut found = OfflinePages::default();
        let mut sorted = pages.to_vec();
        sorted.sort_unstable();
        for pfn in sorted {
            found.push(Pfn::new(pfn));
        }
        let mut notes = Vec::new();
        found
            .settle(&kernel, &mem_map, &layout, &mut map, &mut notes)
            .unwrap();
        let offline = map.runs().filter(|(_, class)| *class == PageClass::Offline);
        let frames = offline.flat_map(|(frames, _)| frames.iter().map(Pfn::raw));
        let notes = notes.iter().map(Note::to_string).collect();
        (frames.collect(), notes)
    }

    const PAGES: [u64; 4] = [700, 40, 41, 900];

    #[test]
    fn a_balloon_has_its_pages() {
        let (offline, notes) = settled(&balloon(&PAGES), &PAGES);
        assert_eq!(offline, [40, 41, 700, 900]);
        assert_eq!(notes, [""; 0]);
    }

    /// Each change is in one record alone, and none of the pages is believed any more.
    #[test]
    fn a_ring_with_one_thing_wrong_is_kept() {
        let node = |pfn| struct_page(pfn) + 8;
        let others = DIRECT_MAP + node(500);
        let changes: [(&str, u64, u64, &str); 9] = [
            ("next", node(40), others, "not linked in both directions"),
            (
                "next, self",
                node(40),
                DIRECT_MAP + node(40),
                "not linked in both",
            ),
            (
                "previous",
                node(41) + 8,
                others,
                "not linked in both directions",
            ),
            (
                "the head's next",
                0x4010,
                others,
                "not linked in both directions",
            ),
            (
                "owner",
                struct_page(41) + 40,
                DIRECT_MAP + 0x4008,
                "of another owner",
            ),
            ("a flag", struct_page(41), 1 << 5, "not as a balloon leaves"),
            (
                "references",
                struct_page(41) + 48,
                OFFLINE | 2 << 32,
                "not as a balloon",
            ),
            (
                "no type",
                struct_page(41) + 48,
                0xffff_ffff | 1 << 32,
                "not as a balloon",
            ),
            ("the count", 0x3ff8, 5, "no count says so"),
        ];
        for (what, at, value, why) in changes {
            let mut ram = balloon(&PAGES);
            ram.put(at, value);
            let (offline, notes) = settled(&ram, &PAGES);
            assert_eq!(offline, [0; 0], "{what}");
            assert!(notes[0].starts_with("4 pages"), "{what}: {notes:?}");
            assert!(notes[0].contains(why), "{what}: {notes:?}");
        }
    }

    #[test]
    fn a_page_in_use_in_no_ring_is_kept_beside_a_balloon() {
        let mut ram = balloon(&PAGES);
        // One bit in the struct page of a page in use, its list pointing anywhere or to itself.
        for next in [
            0,
            DIRECT_MAP + struct_page(300) + 8,
            DIRECT_MAP + struct_page(40) + 8,
        ] {
            ram.put(struct_page(300) + 8, next);
            ram.put(struct_page(300) + 16, next);
            ram.put(struct_page(300) + 48, OFFLINE | 1 << 32);
            let (offline, notes) = settled(&ram, &[40, 41, 300, 700, 900]);
            assert!(!offline.contains(&300), "{next:#x}");
            assert!(notes[0].contains("frame 0x12c"), "{notes:?}");
        }
    }

    /// Two boot sections and their kernel's records: zones, nodes, e820, memory blocks.
    struct Sections {
        ram: Ram,
        facts: Facts,
    }

    const SECTION: u64 = 0x3000;
    const ZONE: u64 = 0x5000;
    const BLOCK: u64 = 0x6000;

    fn sections() -> Sections {
        let mut facts = page_facts();
        let mut ram = Ram::new(32 * MIB);
        facts.sizes.insert("mem_section", 16);
        facts.member("mem_section", "section_mem_map", 0);
        facts.constants.insert("SECTION_SIZE_BITS", 24);
        facts.constants.insert("MAX_PHYSMEM_BITS", 36);
        facts.symbols.insert("mem_section", DIRECT_MAP + 0x1000);
        ram.put(0x1000, DIRECT_MAP + 0x2000);
        ram.put(0x2000, DIRECT_MAP + SECTION);
        ram.put(SECTION, DIRECT_MAP + ARRAY + 0b111);
        ram.put(SECTION + 16, DIRECT_MAP + ARRAY + 0b011);
        // A node with one zone.
        facts.symbols.insert("contig_page_data", DIRECT_MAP + ZONE);
        facts.member("pglist_data", "node_present_pages", 0x800);
        facts.member("pglist_data", "node_zones", 0);
        facts.sizes.insert("zone", 0x400);
        facts.sizes.insert("free_area", 0x18);
        let array = |facts: &mut Facts, ty, name, offset, len| {
            facts.member(ty, name, offset);
            let member = facts.members.get_mut(&(ty, name)).unwrap();
            (member.size, member.len) = (None, Some(len));
        };
        array(&mut facts, "pglist_data", "node_zones", 0, 1);
        array(&mut facts, "zone", "free_area", 0x100, 2);
        array(&mut facts, "free_area", "free_list", 0, 1);
        for (name, offset) in [
            ("zone_start_pfn", 0),
            ("spanned_pages", 8),
            ("present_pages", 16),
            ("name", 24),
            ("vm_stat", 32),
            ("per_cpu_pageset", 48),
        ] {
            facts.member("zone", name, offset);
        }
        facts.member("free_area", "nr_free", 16);
        facts.constants.insert("NR_FREE_PAGES", 0);
        ram.put(ZONE + 8, 2 * FRAMES);
        ram.put(ZONE + 16, FRAMES);
        ram.put(ZONE + 24, DIRECT_MAP + 0x5c00);
        ram.put(ZONE + 0x800, FRAMES);
        // The firmware's map: all of it.
        facts.symbols.insert("e820_table", DIRECT_MAP + 0x7000);
        facts.sizes.insert("e820_entry", 24);
        for (name, offset) in [("nr_entries", 0), ("entries", 8)] {
            facts.member("e820_table", name, offset);
        }
        for (name, offset) in [("addr", 0), ("size", 8), ("type", 16)] {
            facts.member("e820_entry", name, offset);
        }
        ram.put(0x7000, DIRECT_MAP + 0x7100);
        ram.put(0x7100, 1);
        for (index, value) in (0..).zip([0, 32 * MIB as u64, 1]) {
            ram.put(0x7108 + index * 8, value);
        }
        // Memory blocks of one section each: a node of the tree, slots 0 and 1.
        facts.symbols.insert("memory_blocks", DIRECT_MAP + 0x8000);
        facts
            .symbols
            .insert("sections_per_block", DIRECT_MAP + 0x8100);
        facts.member("xarray", "xa_head", 8);
        facts.member("xa_node", "shift", 0);
        array(&mut facts, "xa_node", "slots", 8, 64);
        facts.member("memory_block", "start_section_nr", 0);
        facts.member("memory_block", "state", 8);
        ram.put(0x8100, 1);
        ram.put(0x8008, DIRECT_MAP + 0x9000 + 2);
        for (number, state) in [(0, 1), (1, 4)] {
            ram.put(0x9008 + number * 8, DIRECT_MAP + BLOCK + number * 64);
            ram.put(BLOCK + number * 64, number);
            ram.put(BLOCK + number * 64 + 8, state);
        }
        Sections { ram, facts }
    }

    impl Sections {
        /// The frames that count as offline, and what is said.
        fn settled(&self, listed: bool, lru: Option<u64>, table: Option<u64>) -> (u64, String) {
            let memory = self.ram.memory();
            let kernel = kernel(&memory, self.facts.clone());
            let mem_map = MemMap::new(&kernel, PageSize::SIZE_4K).unwrap();
            let zones = Zones::new(&kernel).unwrap();
            let mut map = PageMap::new(memory.layout(), PageSize::SIZE_4K);
            let is_listed = |frames: PfnRange| listed && frames.contains(Pfn::new(FRAMES));
            let mut found = OfflineSections::find(&kernel, &mem_map, &zones, &is_listed).unwrap();
            if let Some(pfn) = lru {
                found.see_lru(
                    Pfn::new(1),
                    KernelVa::new(DIRECT_MAP + struct_page(pfn) + 8),
                );
            }
            if let Some(table) = table {
                let table = PfnRange::with_len(Pfn::new(table), 1).unwrap();
                map.set(table, PageClass::PageTable);
            }
            found.see_page_tables(&kernel, &map).unwrap();
            let mut notes = Vec::new();
            found.settle(&mem_map, &mut map, &mut notes);
            let notes: String = notes.iter().map(Note::to_string).collect();
            (map.counts().get(PageClass::Offline), notes)
        }

        fn alone(&self) -> (u64, String) {
            self.settled(false, None, None)
        }
    }

    #[test]
    fn a_section_is_offline_by_its_block_and_the_counters() {
        let mut guest = sections();
        assert_eq!(guest.alone(), (FRAMES, String::new()));
        // One that was booted with and has holes does not count them.
        guest.ram.put(0x7108, 0x3000);
        guest.ram.put(0x7110, 32 * MIB as u64 - 0x3000);
        guest.ram.put(ZONE + 16, FRAMES - 3);
        guest.ram.put(ZONE + 0x800, FRAMES - 3);
        assert_eq!(guest.alone(), (FRAMES, String::new()));
    }

    #[test]
    fn a_section_with_one_record_against_it_is_kept() {
        let changes: [(&str, u64, u64, &str); 7] = [
            (
                "the online one's bit",
                SECTION,
                DIRECT_MAP + ARRAY + 0b011,
                "the zones count 4096",
            ),
            ("zone", ZONE + 16, 2 * FRAMES, "the zones count 8192"),
            ("node", ZONE + 0x800, 2 * FRAMES, "the nodes 8192"),
            ("the block's state", BLOCK + 64 + 8, 1, "is in state 1"),
            ("the block's section", BLOCK + 64, 3, "begins at section 3"),
            ("no block", 0x9010, 0, "section 1 has no memory block"),
            (
                "no blocks at all",
                0x8008,
                0,
                "section 1 has no memory block",
            ),
        ];
        for (what, at, value, why) in changes {
            let mut guest = sections();
            guest.ram.put(at, value);
            let (offline, notes) = guest.alone();
            assert_eq!(offline, 0, "{what}");
            assert!(notes.contains(why), "{what}: {notes}");
        }
        for symbol in ["memory_blocks", "e820_table"] {
            let mut guest = sections();
            guest.facts.symbols.remove(symbol);
            assert_eq!(guest.alone().0, 0, "{symbol}");
        }
    }

    #[test]
    fn a_section_that_something_points_into_is_kept() {
        let mut guest = sections();
        let (offline, notes) = guest.settled(true, None, None);
        assert!(
            offline == 0 && notes.contains("a free list has pages"),
            "{notes}"
        );
        let (offline, notes) = guest.settled(false, Some(FRAMES + 5), None);
        assert!(
            offline == 0 && notes.contains("an LRU list goes"),
            "{notes}"
        );
        assert_eq!(guest.settled(false, Some(FRAMES - 5), None).0, FRAMES);
        // A page table of a process; the kernel's own map everything.
        guest.ram.put(0xa010, (FRAMES + 7) << 12 | 0b111);
        let (offline, notes) = guest.settled(false, None, Some(0xa));
        assert!(
            offline == 0 && notes.contains("the page table in frame"),
            "{notes}"
        );
        guest.ram.put(0xa010, (FRAMES + 7) << 12 | 0b011);
        assert_eq!(guest.settled(false, None, Some(0xa)).0, FRAMES);
        // A page of 1 GiB that reaches into it.
        guest.ram.put(0xa010, 0b1000_0111);
        assert_eq!(guest.settled(false, None, Some(0xa)).0, 0);
    }
}
