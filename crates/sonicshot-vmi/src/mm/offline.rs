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
use crate::e820;
use crate::error::VmiError;
use crate::kernel::{Kernel, element};
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
    pub(crate) fn settle(
        mut self,
        mem_map: &MemMap<'_>,
        map: &mut PageMap,
        notes: &mut Vec<String>,
    ) {
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
            notes.push(format!(
                "{} frames in sections that are not online are kept, for nothing proves that they are \
                 offline memory ({}): persistent and device memory is there, too",
                self.kept,
                self.reasons.join("; ")
            ));
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
        let frames = if span.early {
            boot.iter().fold(0_u64, |sum, ram| {
                sum.saturating_add(ram.intersection(&span.frames).len())
            })
        } else {
            span.frames.len()
        };
        expected = expected.saturating_add(frames);
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
        let id = number.checked_div(self.per_block).unwrap_or(0);
        let Some(block) = self.load(kernel, id)? else {
            return Ok(Some(format!("section {number} has no memory block")));
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
        notes: &mut Vec<String>,
    ) -> Result<(), VmiError> {
        /// More drivers have no balloon: the others' pages are kept.
        const MAX_RINGS: usize = 256;
        self.seen = vec![false; self.frames.len()];
        let (mut kept, mut rings) = (0_usize, 0_usize);
        let mut reasons: Vec<String> = Vec::new();
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
                    if reasons.len() < 3 {
                        reasons.push(reason);
                    }
                }
            }
        }
        if kept > 0 {
            notes.push(format!(
                "{kept} pages that are marked as offline are kept unless they are zero, for no driver \
                 is known to have them ({})",
                reasons.join("; ")
            ));
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
