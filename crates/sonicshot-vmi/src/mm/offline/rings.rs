//! Pages that say that they are offline: the rings of balloons.

use crate::error::VmiError;
use crate::kernel::Kernel;
use crate::mm::mem_map::MemMap;
use crate::mm::page::PageLayout;
use crate::note::Note;
use crate::{KernelVa, VirtualMemory};
use sonicshot::{PageClass, PageMap, Pfn, PfnRange, Tally, to_u64};

/// The result of following a ring of offline pages.
enum Ring {
    /// All its pages, and that a driver has them.
    Whole(Vec<Pfn>),
    /// The pages that were met, and why they are not believed.
    Broken(Vec<Pfn>, String),
}

/// Pages that say that they are offline, and whether their driver says so too.
#[derive(Debug)]
pub(crate) struct OfflinePages {
    /// Sorted.
    frames: Vec<Pfn>,
    seen: Vec<bool>,
}

impl OfflinePages {
    /// These frames, in rising order.
    pub(crate) fn new(frames: Vec<Pfn>) -> Self {
        Self {
            seen: vec![false; frames.len()],
            frames,
        }
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
        const MAX_RINGS: u64 = 256;
        /// Of so many rings it is told why they are not believed.
        const MAX_REASONS: usize = 3;
        let records = Records {
            kernel,
            mem_map,
            layout,
        };
        let (mut kept, mut rings) = (Tally::ZERO, 0_u64);
        let (mut reasons, mut more): (Vec<String>, Tally) = (Vec::new(), Tally::ZERO);
        for at in 0..self.frames.len() {
            let Some(first) = self.frames.get(at).copied() else {
                break;
            };
            if self.seen.get(at).copied().unwrap_or(true) {
                continue;
            }
            VmiError::count("rings of pages", &mut rings, 1)?;
            let ring = if rings > MAX_RINGS {
                Ring::Broken(
                    vec![first],
                    format!("there are more than {MAX_RINGS} such rings"),
                )
            } else {
                self.walk(&records, first)?
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
                    kept.add(to_u64(frames.len()));
                    if reasons.len() < MAX_REASONS {
                        reasons.push(reason);
                    } else {
                        more.add(1);
                    }
                }
            }
        }
        if kept > Tally::ZERO {
            notes.push(Note::OfflinePagesKept {
                pages: kept.get(),
                reasons,
                more: more.get(),
            });
        }
        Ok(())
    }

    /// Follows the list that `first` is in, once around.
    fn walk(&mut self, records: &Records<'_, '_>, first: Pfn) -> Result<Ring, VmiError> {
        let mut met = vec![first];
        self.mark(first);
        match self.follow(records, first, &mut met) {
            Ok(()) => Ok(Ring::Whole(met)),
            Err(Stop::Broken(why)) => Ok(Ring::Broken(met, why)),
            Err(Stop::Error(error)) => Err(error),
        }
    }

    fn follow(
        &mut self,
        records: &Records<'_, '_>,
        first: Pfn,
        met: &mut Vec<Pfn>,
    ) -> Result<(), Stop> {
        let start = records
            .mem_map
            .page_va(first)
            .and_then(|at| at.checked_add(records.layout.lru));
        let broken = |why: String| Err(Stop::Broken(format!("frame {first}{why}")));
        let Some(start) = start else {
            return broken(" has no struct page".into());
        };
        let mut head: Option<KernelVa> = None;
        let mut owner: Option<u64> = None;
        let mut node = start;
        loop {
            let next = records.next(node, first, &mut owner)?;
            if records.links_back(next, node) != Some(true) {
                return broken(format!(
                    ": its list is not linked in both directions at {node}"
                ));
            }
            if next == start {
                break;
            }
            match records.page_at(next) {
                Some(pfn) if self.is_new(pfn) => met.push(pfn),
                Some(pfn) => {
                    return broken(format!(
                        ": its list goes on at frame {pfn}, which is not of it"
                    ));
                }
                // The list's head: one, outside the struct pages.
                None if head.is_none() && !records.mem_map.holds(next) => head = Some(next),
                None => {
                    return broken(format!(": its list goes through {next}, which is no page"));
                }
            }
            node = next;
        }
        let Some(head) = head else {
            return broken(format!(": its list of {} has no head", met.len()));
        };
        // A balloon's pages point to `struct balloon_dev_info`, which has the list.
        if let Some(owner) = owner.filter(|owner| *owner != 0)
            && head.raw().checked_sub(owner).is_none_or(|gap| gap >= 256)
        {
            return broken(format!(": its owner at {owner:#x} has no list at {head}"));
        }
        if !is_counted(records.kernel, head, to_u64(met.len())) {
            return broken(format!(
                ": beside the list of {} at {head} no count says so",
                met.len()
            ));
        }
        Ok(())
    }

    /// Whether the frame is one that says that it is offline, and was not met before.
    fn is_new(&mut self, pfn: Pfn) -> bool {
        let seen = self.index(pfn).and_then(|index| self.seen.get_mut(index));
        seen.is_some_and(|seen| !core::mem::replace(seen, true))
    }

    fn mark(&mut self, pfn: Pfn) {
        if let Some(seen) = self.index(pfn).and_then(|index| self.seen.get_mut(index)) {
            *seen = true;
        }
    }
}

/// The sources by which a ring is read.
struct Records<'a, 'm> {
    kernel: &'a Kernel<'m>,
    mem_map: &'a MemMap<'m>,
    layout: &'a PageLayout,
}

impl Records<'_, '_> {
    /// The node behind `node`. A page must be as a driver leaves its pages, and of the same
    /// `owner` as those before.
    fn next(&self, node: KernelVa, first: Pfn, owner: &mut Option<u64>) -> Result<KernelVa, Stop> {
        let Some(pfn) = self.page_at(node) else {
            let next = self.kernel.read_u64("a balloon's list", node)?;
            return Ok(KernelVa::new(next));
        };
        let page = self.mem_map.page_va(pfn);
        let left = page
            .map(|at| self.layout.left_by_driver(self.mem_map, at))
            .transpose()?;
        let Some(private) = left.flatten() else {
            let why = format!("frame {pfn} is not as a balloon leaves its pages");
            return Err(Stop::Broken(why));
        };
        if *owner.get_or_insert(private) != private {
            let why = format!("frame {pfn} is of another owner than frame {first}");
            return Err(Stop::Broken(why));
        }
        Ok(KernelVa::new(self.mem_map.u64_at(node)?))
    }

    /// The frame whose `lru` is at `node`.
    fn page_at(&self, node: KernelVa) -> Option<Pfn> {
        let page = node.raw().checked_sub(self.layout.lru)?;
        self.mem_map.frame_of(KernelVa::new(page))
    }

    /// Whether `next` names `node` as the one before it; `None` if it cannot be read.
    fn links_back(&self, next: KernelVa, node: KernelVa) -> Option<bool> {
        let at = next.checked_add(8)?;
        let back = if self.mem_map.holds(next) {
            self.mem_map.u64_at(at).ok()?
        } else {
            self.kernel.read_u64("a balloon's list", at).ok()?
        };
        Some(back == node.raw())
    }
}

/// The reason that a walk ends early.
enum Stop {
    /// The ring is not to be believed.
    Broken(String),
    Error(VmiError),
}

impl From<VmiError> for Stop {
    fn from(error: VmiError) -> Self {
        Self::Error(error)
    }
}

/// Whether a count of `len` stands in the structure around the list head at `head`: a balloon's
/// driver has one beside its list (`virtio_balloon.num_pages`, `drivers/virtio/virtio_balloon.c`).
fn is_counted(kernel: &Kernel<'_>, head: KernelVa, len: u64) -> bool {
    const AROUND: u64 = 256;
    let Ok(len) = u32::try_from(len) else {
        return false;
    };
    let Some(first) = head.raw().checked_sub(AROUND).map(|first| first & !7) else {
        return false;
    };
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
    use super::OfflinePages;
    use crate::kernel::testing::{DIRECT_MAP, Ram, kernel, page_facts};
    use crate::mm::mem_map::MemMap;
    use crate::mm::page::PageLayout;
    use crate::note::Note;
    use sonicshot::{GuestMemory, PageClass, PageMap, PageSize, Pfn};

    const ARRAY: u64 = 0x10_0000;

    /// So many balloons of a page each, `whole` of them with a count: how many pages are offline,
    /// and the note.
    fn settled(rings: u64, whole: u64) -> (u64, Option<Note>) {
        let mut facts = page_facts();
        facts.symbols.insert("mem_map", DIRECT_MAP + 0x1000);
        facts.symbols.insert("max_mapnr", DIRECT_MAP + 0x1008);
        facts.member("page", "compound_head", 8);
        facts.constants.insert("PAGE_BUDDY_MAPCOUNT_VALUE", -129);
        facts.constants.insert("PAGE_OFFLINE_MAPCOUNT_VALUE", -257);
        let mut ram = Ram::new(8 << 20);
        ram.put(0x1000, DIRECT_MAP + ARRAY);
        ram.put(0x1008, rings);
        for pfn in 0..rings {
            let node = ARRAY + pfn * 64 + 8;
            let head = 0x40_0000 + pfn * 0x1000 + 0x800;
            ram.put(node, DIRECT_MAP + head);
            ram.put(node + 8, DIRECT_MAP + head);
            ram.put(head, DIRECT_MAP + node);
            ram.put(head + 8, DIRECT_MAP + node);
            ram.put(head + 16, u64::from(pfn < whole));
            // Its owner; no mapcount but the type; one reference.
            ram.put(node + 32, DIRECT_MAP + head);
            ram.put(node + 40, 0xffff_feff | 1 << 32);
        }
        let memory = ram.memory();
        let kernel = kernel(&memory, facts);
        let mem_map = MemMap::new(&kernel).unwrap();
        let layout = PageLayout::new(&kernel, 64).unwrap();
        let mut map = PageMap::new(memory.layout(), PageSize::SIZE_4K);
        let mut notes = Vec::new();
        let offline = OfflinePages::new((0..rings).map(Pfn::new).collect());
        let settled = offline.settle(&kernel, &mem_map, &layout, &mut map, &mut notes);
        settled.unwrap();
        (map.counts().get(PageClass::Offline), notes.pop())
    }

    #[test]
    fn of_rings_without_end_so_many_are_believed_and_a_few_told_of() {
        for (rings, believed) in [(3, 3), (256, 256), (257, 256), (300, 256)] {
            let (offline, note) = settled(rings, rings);
            assert_eq!(offline, believed, "{rings}");
            assert_eq!(note.is_some(), rings > believed);
        }
        for (broken, told) in [(1, 1), (3, 3), (9, 3)] {
            let Some(Note::OfflinePagesKept {
                pages,
                reasons,
                more,
            }) = settled(broken, 0).1
            else {
                panic!("no note");
            };
            assert_eq!(
                (pages, reasons.len() as u64, more),
                (broken, told, broken - told)
            );
        }
    }
}
