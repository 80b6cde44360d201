//! The allocator's lists of free blocks, as crash's `kmem -f` shows them.

use super::LinuxGuest;
use crate::error::VmiError;
use crate::kernel::Kernel;
use crate::mm::zone::{FreeLists, Listed, ListedBlock, Zone, Zones};
use core::fmt;
use sonicshot::{Pfn, PfnRange};
use std::collections::BTreeMap;

/// Names of `enum migratetype` (`include/linux/mmzone.h`), and what they are shown as.
const MIGRATE_TYPES: [(&str, &str); 6] = [
    ("MIGRATE_UNMOVABLE", "unmovable"),
    ("MIGRATE_MOVABLE", "movable"),
    ("MIGRATE_RECLAIMABLE", "reclaimable"),
    ("MIGRATE_HIGHATOMIC", "highatomic"),
    ("MIGRATE_CMA", "cma"),
    ("MIGRATE_ISOLATE", "isolate"),
];

/// The list that a free block is on.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum FreeList {
    /// The buddy allocator's, of pages that move in one way: by name, or by number where no source
    /// knows the names.
    Buddy {
        /// The migrate type.
        migrate_type: String,
    },
    /// A processor's own.
    PerCpu {
        /// The processor's place among those that are possible.
        cpu: usize,
    },
}

impl fmt::Display for FreeList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Buddy { migrate_type } => f.pad(migrate_type),
            Self::PerCpu { cpu } => f.pad(&format!("processor {cpu}")),
        }
    }
}

/// The blocks of one order on one list.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct FreeBlocks {
    /// The list.
    pub list: FreeList,
    /// The order of its blocks: each has two to the power of it pages.
    pub order: u32,
    /// The number of blocks on it.
    pub blocks: u64,
    /// The number of those that were being put on the list or taken off it.
    pub torn: u64,
    /// The first frames of the first blocks, in the list's order.
    pub first: Vec<Pfn>,
}

impl FreeBlocks {
    /// The pages of all blocks; `None` if no number holds them.
    #[must_use]
    pub fn pages(&self) -> Option<u64> {
        1_u64.checked_shl(self.order)?.checked_mul(self.blocks)
    }
}

/// A processor's free pages: what is on its lists, and what it counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct PerCpuCount {
    /// The processor's place among those that are possible.
    pub cpu: usize,
    /// The pages that it counts.
    pub counted: u64,
    /// The pages on its lists.
    pub listed: u64,
}

/// The free blocks of a zone, held against its counters.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ZoneFree {
    /// The NUMA node.
    pub node: u64,
    /// The zone's name, such as `Normal`.
    pub name: String,
    /// The frames it spans, holes included.
    pub span: PfnRange,
    /// Its lists with blocks, those of the buddy allocator first, by order.
    pub lists: Vec<FreeBlocks>,
    /// The counter `nr_free` of each order, in blocks.
    pub nr_free: Vec<u64>,
    /// The blocks that are listed of each order.
    pub listed: Vec<u64>,
    /// The counter `NR_FREE_PAGES`, the per-CPU deltas added and unaccepted pages subtracted; pages
    /// in isolated blocks are not in it.
    pub counter: i64,
    /// Listed pages in isolated blocks.
    pub isolated: u64,
    /// The counts of each processor's lists of the zone.
    pub per_cpu: Vec<PerCpuCount>,
}

impl ZoneFree {
    /// The pages that are listed; `None` if no number holds them.
    #[must_use]
    pub fn listed_pages(&self) -> Option<u64> {
        let orders = (0_u32..).zip(&self.listed);
        orders.into_iter().try_fold(0_u64, |sum, (order, blocks)| {
            sum.checked_add(1_u64.checked_shl(order)?.checked_mul(*blocks)?)
        })
    }

    /// Contradictions between it and the counters, for people: none of a guest that was stopped
    /// outside its allocator.
    #[must_use]
    pub fn disagreements(&self) -> Vec<String> {
        let mut found = Vec::new();
        for (order, (counted, listed)) in self.nr_free.iter().zip(&self.listed).enumerate() {
            if counted != listed {
                found.push(format!(
                    "order {order}: {listed} blocks listed, nr_free is {counted}"
                ));
            }
        }
        let counted = self
            .listed_pages()
            .and_then(|listed| i64::try_from(listed.checked_sub(self.isolated)?).ok());
        if counted != Some(self.counter) {
            let listed = counted.map_or_else(|| "too many".into(), |pages| pages.to_string());
            found.push(format!(
                "{listed} pages listed, NR_FREE_PAGES is {}",
                self.counter
            ));
        }
        for one in &self.per_cpu {
            if one.counted != one.listed {
                found.push(format!(
                    "processor {}: {} pages listed, its counter is {}",
                    one.cpu, one.listed, one.counted
                ));
            }
        }
        found
    }
}

/// The names of this kernel's migrate types.
pub(super) struct MigrateTypes(Vec<(u64, &'static str)>);

impl MigrateTypes {
    pub(super) fn new(kernel: &Kernel<'_>) -> Result<Self, VmiError> {
        let mut names = Vec::new();
        for (constant, name) in MIGRATE_TYPES {
            let number = kernel.any_constant(constant)?;
            if let Some(number) = number.and_then(|number| u64::try_from(number).ok()) {
                names.push((number, name));
            }
        }
        Ok(Self(names))
    }

    pub(super) fn list_of(&self, block: &ListedBlock) -> FreeList {
        if let Some(cpu) = block.cpu {
            return FreeList::PerCpu { cpu };
        }
        let known = self.0.iter().find(|(number, _)| *number == block.list);
        let name = known.map(|(_, name)| (*name).to_owned());
        FreeList::Buddy {
            migrate_type: name.unwrap_or_else(|| format!("type {}", block.list)),
        }
    }
}

impl LinuxGuest<'_> {
    /// The lists of free blocks of every zone, with the first `most` blocks of each. Only the lists
    /// are read; that a block is on one does not say that it is free.
    ///
    /// # Errors
    /// [`VmiError`] if a list is none, or symbols or members that lead to the zones are not known.
    pub fn free_lists(&self, most: usize) -> Result<Vec<ZoneFree>, VmiError> {
        let (mem_map, layout, zones) = self.structures()?;
        let names = MigrateTypes::new(&self.kernel)?;
        let mut lists = FreeLists::new(&mem_map, &self.kernel, layout.lru);
        let free = |zone| zone_free(&zones, &mut lists, zone, &names, most);
        zones.zones.iter().map(free).collect()
    }
}

fn zone_free(
    zones: &Zones,
    lists: &mut FreeLists<'_, '_>,
    zone: &Zone,
    names: &MigrateTypes,
    most: usize,
) -> Result<ZoneFree, VmiError> {
    let too_many = || VmiError::Corrupt {
        what: "zone.free_area",
        at: zone.at,
        value: zone.span.len(),
    };
    let mut listed = vec![0_u64; zone.nr_free.len()];
    let mut isolated = 0_u64;
    let mut found: BTreeMap<(bool, u32, u64, Option<usize>), FreeBlocks> = BTreeMap::new();
    let mut add = |one: Listed| {
        let (block, torn) = match one {
            Listed::Block(block) => (block, 0),
            Listed::Torn(block) => (block, 1),
        };
        let key = (block.cpu.is_some(), block.order, block.list, block.cpu);
        let blocks = found.entry(key).or_insert_with(|| FreeBlocks {
            list: names.list_of(&block),
            order: block.order,
            blocks: 0,
            torn: 0,
            first: Vec::new(),
        });
        blocks.blocks = blocks.blocks.checked_add(1).ok_or_else(too_many)?;
        blocks.torn = blocks.torn.checked_add(torn).ok_or_else(too_many)?;
        if blocks.first.len() < most {
            blocks.first.push(block.head);
        }
        Ok::<_, VmiError>(block)
    };
    zones.walk_free_lists(lists, zone, &mut |one| {
        let block = add(one)?;
        let order = usize::try_from(block.order).map_err(|_| too_many())?;
        let count = listed.get_mut(order).ok_or_else(too_many)?;
        *count = count.checked_add(1).ok_or_else(too_many)?;
        if block.isolated {
            let pages = block.pages().and_then(|pages| isolated.checked_add(pages));
            isolated = pages.ok_or_else(too_many)?;
        }
        Ok(())
    })?;
    let mut per_cpu = Vec::new();
    if zones.no_pcp.is_none() {
        let counts = zones.walk_pcp_lists(lists, zone, &mut |one| add(one).map(|_| ()))?;
        let counts = counts.into_iter().enumerate();
        per_cpu.extend(counts.map(|(cpu, (counted, listed))| PerCpuCount {
            cpu,
            counted,
            listed,
        }));
    }
    Ok(ZoneFree {
        node: zone.node,
        name: zone.name.clone(),
        span: zone.span,
        lists: found.into_values().collect(),
        nr_free: zone.nr_free.clone(),
        listed,
        counter: zone
            .counter
            .checked_sub(zone.unaccepted)
            .ok_or_else(too_many)?,
        isolated,
        per_cpu,
    })
}
