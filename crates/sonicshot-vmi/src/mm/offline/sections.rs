//! Sections that are not online.

use super::blocks::MemoryBlocks;
use crate::KernelVa;
use crate::arch;
use crate::error::VmiError;
use crate::kernel::{Kernel, element};
use crate::mm::mem_map::{MemMap, Section, Span};
use crate::mm::zone::Zones;
use crate::note::Note;
use sonicshot::{GpaRange, PageClass, PageMap, Pfn, PfnRange, Tally};

/// A section that may be offline: everything but what points into it has been asked.
#[derive(Debug)]
struct Suspect {
    frames: PfnRange,
    /// The end of its struct pages.
    structs_end: KernelVa,
    /// The record that points into it.
    used: Option<String>,
}

/// The sections that may be offline, and what was found to speak against each.
#[derive(Debug, Default)]
pub(crate) struct OfflineSections {
    /// By frame, disjoint.
    suspects: Vec<Suspect>,
    /// The beginning of each one's struct pages, sorted, and its index.
    by_structs: Vec<(KernelVa, usize)>,
    /// Frames of sections that are not online and not proved to be offline.
    kept: Tally,
    reasons: Vec<String>,
}

impl OfflineSections {
    /// Asks the sections' words, their memory blocks and the counters. `is_listed` tells whether a
    /// free list has anything in a range of frames.
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
        self.kept.add(frames.len());
        if self.reasons.len() < 4 && !self.reasons.contains(&reason) {
            self.reasons.push(reason);
        }
    }

    /// Whether there is anything to watch for.
    pub(crate) fn is_empty(&self) -> bool {
        self.suspects.is_empty()
    }

    fn note_user(&mut self, frames: PfnRange, text: &dyn Fn() -> String) {
        let first = self
            .suspects
            .partition_point(|suspect| suspect.frames.end() <= frames.start());
        for suspect in self.suspects.iter_mut().skip(first) {
            if suspect.frames.intersection(&frames).is_empty() {
                break;
            }
            suspect.used.get_or_insert_with(text);
        }
    }

    /// The suspect whose struct pages hold `node`.
    #[inline]
    pub(crate) fn suspect_of(&self, node: KernelVa) -> Option<usize> {
        let above = self.by_structs.partition_point(|(start, _)| *start <= node);
        let (_, index) = self.by_structs.get(above.checked_sub(1)?)?;
        (node < self.suspects.get(*index)?.structs_end).then_some(*index)
    }

    /// Notes that an LRU list goes from the frame `by` into the suspect `index`.
    pub(crate) fn see(&mut self, index: usize, by: Pfn) {
        if let Some(suspect) = self.suspects.get_mut(index)
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
        if self.is_empty() {
            return Ok(());
        }
        let arch = arch::of(kernel)?;
        let page_size = map.page_size();
        let mut table = kernel.page_buffer()?;
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
                if let Some(mapped) = arch.user_mapping(u64::from_le_bytes(*entry), page_size) {
                    self.note_user(mapped, &|| {
                        format!("the page table in frame {pfn} maps frames of it")
                    });
                }
            }
        }
        Ok(())
    }

    /// Gives the frames of sections that nothing speaks against their class, and says what is kept.
    pub(crate) fn settle(mut self, mem_map: &MemMap<'_>, map: &mut PageMap, notes: &mut Vec<Note>) {
        let offline = |span: &&Span| !span.online;
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
        if self.kept > Tally::ZERO {
            notes.push(Note::SectionsKept {
                frames: self.kept.get(),
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
    let Some(ram) = arch::of(kernel)?.counted_ram(kernel)? else {
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
