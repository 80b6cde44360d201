//! The walk of the free lists, buddy and per-CPU.

use super::{PcpLayout, Zone, Zones};
use crate::KernelVa;
use crate::error::VmiError;
use crate::kernel::{Kernel, element};
use crate::mm::mem_map::MemMap;
use sonicshot::{Pfn, PfnRange};

/// One free block that a list names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ListedBlock {
    pub head: Pfn,
    pub order: u32,
    /// The number of the list: of the migrate type, or of the processor's list.
    pub list: u64,
    /// The processor whose list it is, by its place among the possible ones.
    pub cpu: Option<usize>,
    /// Whether the block may be moved out of `NR_FREE_PAGES` by page isolation.
    pub isolated: bool,
}

impl ListedBlock {
    /// The number of pages in the block.
    pub(crate) fn pages(&self) -> Option<u64> {
        1_u64.checked_shl(self.order)
    }
}

/// The finding of one step along a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Listed {
    /// A block that the list links in both directions.
    Block(ListedBlock),
    /// A block whose successor does not link back: the list was being changed.
    Torn(ListedBlock),
}

impl Zones {
    /// Walks every free list of `zone`.
    pub(crate) fn walk_free_lists(
        &self,
        lists: &mut FreeLists<'_, '_>,
        zone: &Zone,
        visit: &mut dyn FnMut(Listed) -> Result<(), VmiError>,
    ) -> Result<(), VmiError> {
        let layout = &self.layout;
        for order in 0..layout.orders {
            let area = element(
                "zone.free_area",
                zone.at,
                order,
                layout.free_area_size,
                layout.free_area,
            )?;
            for migrate_type in 0..layout.migrate_types {
                let head = element("free_area.free_list", area, migrate_type, 16, 0)?;
                let block = ListedBlock {
                    head: Pfn::new(0),
                    order: narrow("zone.free_area", zone.at, order)?,
                    list: migrate_type,
                    cpu: None,
                    isolated: layout.migrate_isolate == Some(migrate_type),
                };
                lists.walk(head, block, visit)?;
            }
        }
        Ok(())
    }

    /// Walks the per-CPU lists of `zone`, of all processors. Returns what the counters say: a
    /// pair of pages counted and pages listed for each processor.
    pub(crate) fn walk_pcp_lists(
        &self,
        lists: &mut FreeLists<'_, '_>,
        zone: &Zone,
        visit: &mut dyn FnMut(Listed) -> Result<(), VmiError>,
    ) -> Result<Vec<(u64, u64)>, VmiError> {
        let kernel = lists.kernel;
        let layout = match self.pcp {
            Some(layout) => layout,
            None => PcpLayout::new(kernel)?,
        };
        let mut counts = Vec::new();
        for (cpu, offset) in self.cpu_offsets.iter().enumerate() {
            let pcp = zone.pageset.moved_by(*offset).moved_by(layout.pcp);
            let count = kernel.read_u32(
                "per_cpu_pages.count",
                element("per_cpu_pages", pcp, 0, 0, layout.count)?,
            )?;
            let mut listed = 0_u64;
            for index in 0..layout.lists {
                let head = element("per_cpu_pages.lists", pcp, index, 16, layout.lists_at)?;
                let block = ListedBlock {
                    head: Pfn::new(0),
                    order: layout.order(index)?,
                    list: index,
                    cpu: Some(cpu),
                    isolated: false,
                };
                lists.walk(head, block, &mut |found| {
                    listed = block
                        .pages()
                        .and_then(|pages| listed.checked_add(pages))
                        .ok_or(VmiError::Corrupt {
                            what: "the per-CPU lists",
                            at: head,
                            value: listed,
                        })?;
                    visit(found)
                })?;
            }
            counts.push((u64::from(count), listed));
        }
        Ok(counts)
    }
}

/// The sources by which free lists are walked.
pub(crate) struct FreeLists<'a, 'm> {
    map: &'a MemMap<'m>,
    kernel: &'a Kernel<'m>,
    /// The offset of the list node in `struct page`.
    lru: u64,
    /// Bounds all walks together: no honest guest lists more blocks than it has frames.
    frames_left: u64,
}

impl<'a, 'm> FreeLists<'a, 'm> {
    pub(crate) fn new(map: &'a MemMap<'m>, kernel: &'a Kernel<'m>, lru: u64) -> Self {
        // Also frames outside the dump's RAM may be listed.
        let frames = map.spans().iter().map(|span| &span.frames);
        Self {
            map,
            kernel,
            lru,
            frames_left: PfnRange::total_of(frames),
        }
    }

    /// Walks one list of free pages from its `head`. `block` is what every entry is, but for its
    /// frame.
    fn walk(
        &mut self,
        head: KernelVa,
        block: ListedBlock,
        visit: &mut dyn FnMut(Listed) -> Result<(), VmiError>,
    ) -> Result<(), VmiError> {
        let (map, kernel) = (self.map, self.kernel);
        let mut node = kernel.read_ptr("a free list's head", head)?;
        // What a block's own pointer back may be: the one before it, or while that is being taken out
        // of the list, the one before that.
        let mut before = [head, head];
        let mut own_back = None;
        while node != head {
            let page = node.checked_sub(self.lru);
            let Some(pfn) = page.and_then(|page| map.frame_of(page)) else {
                return Err(VmiError::Corrupt {
                    what: "a free list",
                    at: head,
                    value: node.raw(),
                });
            };
            self.frames_left = self.frames_left.checked_sub(1).ok_or(VmiError::Corrupt {
                what: "a free list longer than memory",
                at: head,
                value: node.raw(),
            })?;
            let back_at = |node: KernelVa, next: KernelVa| {
                next.checked_add(8).ok_or(VmiError::Corrupt {
                    what: "a free list",
                    at: node,
                    value: next.raw(),
                })
            };
            let own = match own_back {
                Some(back) => back,
                None => map.u64_at(back_at(node, node)?)?,
            };
            let next = KernelVa::new(map.u64_at(node)?);
            let back_at = back_at(node, next)?;
            let back = if next == head {
                kernel.read_u64("a free list's head", back_at)?
            } else {
                map.u64_at(back_at)?
            };
            let block = ListedBlock { head: pfn, ..block };
            let is_whole = back == node.raw() && before.contains(&KernelVa::new(own));
            visit(if is_whole {
                Listed::Block(block)
            } else {
                Listed::Torn(block)
            })?;
            (before, own_back) = ([node, before[0]], Some(back));
            node = next;
        }
        Ok(())
    }
}

/// A small number of the kernel's, such as an order.
fn narrow(what: &'static str, at: KernelVa, value: u64) -> Result<u32, VmiError> {
    u32::try_from(value).map_err(|_| VmiError::Corrupt { what, at, value })
}
