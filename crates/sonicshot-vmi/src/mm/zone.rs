//! Nodes, zones, the buddy allocator's free lists, the per-CPU lists, and the counters.
//!
//! Sources: `include/linux/mmzone.h`, `mm/page_alloc.c`, `mm/vmstat.c`.

mod counters;
mod lists;
mod nodes;
mod pcp;

use super::cpus::possible_cpus;
use crate::KernelVa;
use crate::error::VmiError;
use crate::kernel::{Kernel, element};
use crate::knowledge::Knowledge;
pub(crate) use counters::counter_bound;
use counters::{Deltas, StatDiffs, read_counter, read_nr_free};
pub(crate) use lists::{FreeLists, Listed, ListedBlock};
use nodes::{nodes, read_deferred};
pub(crate) use pcp::PcpLayout;
use sonicshot::{Pfn, PfnRange, to_u64};

/// `enum zone_type` has six values at most.
const MAX_ZONES: u64 = 8;
/// `NR_PAGE_ORDERS`: x86-64 has 11, arm64 with 64 KiB pages 14, and a config may go higher.
pub(crate) const MAX_ORDERS: u64 = 24;
/// `MIGRATE_TYPES` is six or seven.
const MAX_MIGRATE_TYPES: u64 = 16;

/// The offsets of the members of the allocator's structures.
#[derive(Debug, Clone)]
struct ZoneLayout {
    zone_size: u64,
    free_area: u64,
    orders: u64,
    free_area_size: u64,
    migrate_types: u64,
    nr_free: u64,
    zone_start_pfn: u64,
    spanned_pages: u64,
    /// Not in kernels whose types do not tell; then no section is proved to be offline.
    present_pages: Option<u64>,
    name: u64,
    vm_stat: u64,
    nr_free_pages: u64,
    nr_unaccepted: Option<u64>,
    migrate_isolate: Option<u64>,
}

/// One zone, as its own counters and lists tell.
#[derive(Debug, Clone)]
pub(crate) struct Zone {
    pub at: KernelVa,
    pub node: u64,
    pub name: String,
    pub span: PfnRange,
    /// `present_pages`: the frames of the zone that are RAM and in use by the kernel.
    pub present: Option<u64>,
    /// `nr_free` of each order.
    pub nr_free: Vec<u64>,
    /// `vm_stat[NR_FREE_PAGES]` and the per-CPU deltas not yet folded into it.
    pub counter: i64,
    /// Pages that the counter has and the lists have not: unaccepted memory.
    pub unaccepted: i64,
    /// The place of the per-CPU pages, as the zone's `__percpu` pointer.
    pub pageset: KernelVa,
}

/// The array `zone.free_area`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AreaLayout {
    /// From the zone to the array.
    pub free_area: u64,
    /// The number of its elements.
    pub orders: u64,
    /// The size of an element, `struct free_area`.
    pub size: u64,
    /// The heads of lists in an element, one for each migrate type.
    pub migrate_types: u64,
    /// From an element to its `nr_free`.
    pub nr_free: u64,
}

/// A node's frames from here on have no initialised `struct page` yet.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deferred {
    pub frames: PfnRange,
}

/// All zones, and what is needed to walk their lists.
#[derive(Debug, Clone)]
pub(crate) struct Zones {
    layout: ZoneLayout,
    pub zones: Vec<Zone>,
    /// `struct pglist_data` of each node.
    pub nodes: Vec<KernelVa>,
    pub deferred: Vec<Deferred>,
    /// The displacement of each possible processor's per-CPU area.
    pub cpu_offsets: Vec<u64>,
    /// The reason that the per-CPU lists cannot be read, if so.
    pub no_pcp: Option<String>,
    /// The layout of the per-CPU lists, if no type tells.
    pcp: Option<PcpLayout>,
    /// Whether the counters are without the per-CPU deltas.
    pub without_deltas: bool,
    /// The knowledge that they were found by. Where it is the shape alone, a block that says it is
    /// free and is on no list is kept and counted, and no more: before a kernel has set up its
    /// struct pages, those of the boot before may show.
    pub knowledge: Knowledge,
}

impl ZoneLayout {
    fn new(kernel: &Kernel<'_>) -> Result<Self, VmiError> {
        let offset = |ty: &str, name: &str| kernel.need_member(ty, name).map(|m| m.offset);
        let index = |name: &str| -> Result<u64, VmiError> {
            let value = kernel.need_constant(name)?;
            u64::try_from(value)
                .ok()
                .filter(|value| *value < 256)
                .ok_or_else(|| VmiError::Unsupported {
                    what: format!("{name} of {value}"),
                })
        };
        let len = |ty: &str, name: &str, max: u64| -> Result<u64, VmiError> {
            let member = kernel.need_member(ty, name)?;
            match member.len {
                Some(len) if (1..=max).contains(&len) => Ok(len),
                len => Err(VmiError::Unsupported {
                    what: format!("{ty}.{name} of {len:?} elements"),
                }),
            }
        };
        let maybe = |name: &str| -> Result<Option<u64>, VmiError> {
            kernel.constant(name)?.map(|_| index(name)).transpose()
        };
        Ok(Self {
            zone_size: kernel.need_type_size("zone")?,
            free_area: offset("zone", "free_area")?,
            orders: len("zone", "free_area", MAX_ORDERS)?,
            free_area_size: kernel.need_type_size("free_area")?,
            migrate_types: len("free_area", "free_list", MAX_MIGRATE_TYPES)?,
            nr_free: offset("free_area", "nr_free")?,
            zone_start_pfn: offset("zone", "zone_start_pfn")?,
            spanned_pages: offset("zone", "spanned_pages")?,
            present_pages: kernel
                .member("zone", "present_pages")?
                .map(|member| member.offset),
            name: offset("zone", "name")?,
            vm_stat: offset("zone", "vm_stat")?,
            nr_free_pages: index("NR_FREE_PAGES")?,
            nr_unaccepted: maybe("NR_UNACCEPTED")?,
            migrate_isolate: maybe("MIGRATE_ISOLATE")?,
        })
    }
}

impl Zones {
    pub(crate) fn new(kernel: &Kernel<'_>) -> Result<Self, VmiError> {
        let layout = ZoneLayout::new(kernel)?;
        let (cpu_offsets, mut no_pcp) = match possible_cpus(kernel) {
            Ok(cpus) => (cpus.into_iter().map(|(_, offset)| offset).collect(), None),
            Err(error) => (Vec::new(), Some(error.to_string())),
        };
        if cpu_offsets.is_empty() && no_pcp.is_none() {
            no_pcp = Some("no processor is possible".into());
        }
        let deltas = Deltas {
            diffs: StatDiffs::new(kernel)?,
            cpu_offsets: &cpu_offsets,
        };
        let mut zones = Vec::new();
        let mut deferred = Vec::new();
        let mut pgdats = Vec::new();
        for (node, pgdat) in nodes(kernel)? {
            pgdats.push(pgdat);
            let node_zones = kernel.need_member("pglist_data", "node_zones")?;
            let count = node_zones
                .size
                .and_then(|size| size.checked_div(layout.zone_size))
                .or(node_zones.len)
                .filter(|count| (1..=MAX_ZONES).contains(count))
                .ok_or(VmiError::Unsupported {
                    what: format!("pglist_data.node_zones of {node_zones:?}"),
                })?;
            for index in 0..count {
                let at = element(
                    "pglist_data.node_zones",
                    pgdat,
                    index,
                    layout.zone_size,
                    node_zones.offset,
                )?;
                if let Some(zone) = read_zone(kernel, &layout, at, node, &deltas)? {
                    zones.push(zone);
                }
            }
            deferred.extend(read_deferred(kernel, pgdat)?);
        }
        Ok(Self {
            layout,
            zones,
            nodes: pgdats,
            deferred,
            cpu_offsets,
            no_pcp,
            pcp: None,
            without_deltas: false,
            knowledge: Knowledge::Types,
        })
    }

    /// Zones that were found by their own lists. `area` is their array of free areas, `vm_stat`
    /// and the like have been read; `pcp` tells where the per-CPU lists are, or why nothing does.
    pub(crate) fn by_shape(
        area: AreaLayout,
        zones: Vec<Zone>,
        cpu_offsets: Vec<u64>,
        pcp: Result<PcpLayout, String>,
        without_deltas: bool,
    ) -> Self {
        let (pcp, no_pcp) = match pcp {
            Ok(pcp) => (Some(pcp), None),
            Err(why) => (None, Some(why)),
        };
        Self {
            layout: ZoneLayout {
                zone_size: 0,
                free_area: area.free_area,
                orders: area.orders,
                free_area_size: area.size,
                migrate_types: area.migrate_types,
                nr_free: area.nr_free,
                zone_start_pfn: 0,
                spanned_pages: 0,
                present_pages: None,
                name: 0,
                vm_stat: 0,
                nr_free_pages: 0,
                nr_unaccepted: None,
                migrate_isolate: None,
            },
            zones,
            nodes: Vec::new(),
            deferred: Vec::new(),
            cpu_offsets,
            no_pcp,
            pcp,
            without_deltas,
            knowledge: Knowledge::Vmcoreinfo,
        }
    }

    /// The number of processors that can have been inside the allocator when the guest stopped.
    pub(crate) fn cpus(&self) -> u64 {
        processors(&self.cpu_offsets)
    }

    pub(crate) fn max_order(&self) -> u64 {
        self.layout.orders.saturating_sub(1)
    }
}

/// The number of processors that have areas at these offsets: of one processor there are none.
pub(crate) fn processors(offsets: &[u64]) -> u64 {
    to_u64(offsets.len()).max(1)
}

/// The zone at `at`, unless it spans nothing.
fn read_zone(
    kernel: &Kernel<'_>,
    layout: &ZoneLayout,
    at: KernelVa,
    node: u64,
    deltas: &Deltas<'_>,
) -> Result<Option<Zone>, VmiError> {
    let field = |offset| element("zone", at, 0, 0, offset);
    let spanned = kernel.read_u64("zone.spanned_pages", field(layout.spanned_pages)?)?;
    if spanned == 0 {
        return Ok(None);
    }
    let start = kernel.read_u64("zone.zone_start_pfn", field(layout.zone_start_pfn)?)?;
    let span = PfnRange::with_len(Pfn::new(start), spanned)
        .filter(|span| span.end().raw() < 1 << 52)
        .ok_or(VmiError::Corrupt {
            what: "zone.spanned_pages",
            at,
            value: spanned,
        })?;
    let present = layout
        .present_pages
        .map(|offset| kernel.read_u64("zone.present_pages", field(offset)?))
        .transpose()?;
    let name_at = kernel.read_ptr("zone.name", field(layout.name)?)?;
    let name = kernel
        .space
        .read_str(name_at, 16)
        .map_err(VmiError::read("zone.name"))?;
    let pageset = kernel
        .first_member("zone", &["per_cpu_pageset", "pageset"])?
        .map_or_else(|| kernel.need_member("zone", "per_cpu_pageset"), Ok)?;
    let pageset = kernel.read_ptr("zone.per_cpu_pageset", field(pageset.offset)?)?;
    let counter = |index| read_counter(kernel, layout, at, index, deltas);
    Ok(Some(Zone {
        at,
        node,
        name,
        span,
        present,
        nr_free: read_nr_free(kernel, layout, at)?,
        counter: counter(layout.nr_free_pages)?,
        unaccepted: layout.nr_unaccepted.map_or(Ok(0), counter)?,
        pageset,
    }))
}

#[cfg(test)]
mod tests {
    use super::nodes::{MAX_NODES, nodes};
    use super::pcp::MAX_PCP_LISTS;
    use super::{MAX_MIGRATE_TYPES, MAX_ORDERS, MAX_ZONES, PcpLayout, ZoneLayout, Zones};
    use crate::kernel::testing::{DIRECT_MAP, Facts, Ram, kernel};
    use crate::symbols::Member;

    /// The allocator's structures, with lists of these lengths: `zone.free_area`,
    /// `free_area.free_list`, `per_cpu_pages.lists`.
    fn facts(orders: u64, types: u64, lists: u64) -> Facts {
        let mut facts = Facts::default();
        for (ty, name) in [
            ("zone", "zone_start_pfn"),
            ("zone", "spanned_pages"),
            ("zone", "name"),
            ("zone", "vm_stat"),
            ("free_area", "nr_free"),
            ("per_cpu_pages", "count"),
        ] {
            facts.member(ty, name, 8);
        }
        for (ty, name, len) in [
            ("zone", "free_area", orders),
            ("free_area", "free_list", types),
            ("per_cpu_pages", "lists", lists),
        ] {
            let member = Member {
                offset: 0,
                size: None,
                len: Some(len),
            };
            facts.members.insert((ty, name), member);
        }
        facts.sizes.extend([("zone", 1664), ("free_area", 104)]);
        let constants = [("NR_FREE_PAGES", 0), ("MIGRATE_PCPTYPES", 1)];
        facts.constants.extend(constants);
        facts
    }

    #[test]
    fn lists_are_no_more_than_a_kernel_has() {
        let ram = Ram::new(8 << 20);
        let memory = ram.memory();
        let (orders, types, lists) = (MAX_ORDERS, MAX_MIGRATE_TYPES, MAX_PCP_LISTS);
        for (facts, zone_is_read, pcp_is_read) in [
            (facts(orders, types, lists), true, true),
            (facts(orders + 1, types, lists), false, true),
            (facts(orders, types + 1, lists), false, true),
            (facts(orders, types, lists + 1), true, false),
            (facts(0, types, lists), false, true),
        ] {
            let kernel = kernel(&memory, facts);
            assert_eq!(ZoneLayout::new(&kernel).is_ok(), zone_is_read);
            assert_eq!(PcpLayout::new(&kernel).is_ok(), pcp_is_read);
        }
    }

    #[test]
    fn nodes_are_no_more_than_a_kernel_has() {
        for (count, is_read) in [(MAX_NODES, true), (MAX_NODES + 1, false)] {
            let mut ram = Ram::new(8 << 20);
            ram.put(0x1000, count);
            for node in 0..count {
                ram.put(0x2000 + 8 * node, DIRECT_MAP);
            }
            let mut facts = Facts::default();
            facts.symbols.insert("nr_node_ids", DIRECT_MAP + 0x1000);
            facts.symbols.insert("node_data", DIRECT_MAP + 0x2000);
            let memory = ram.memory();
            let found = nodes(&kernel(&memory, facts));
            assert_eq!(found.is_ok(), is_read, "{count}: {found:?}");
        }
    }

    #[test]
    fn zones_of_a_node_are_no_more_than_a_kernel_has() {
        for (count, is_read) in [
            (1, true),
            (MAX_ZONES, true),
            (MAX_ZONES + 1, false),
            (0, false),
        ] {
            let mut ram = Ram::new(8 << 20);
            ram.put(0x1000, 1);
            ram.put(0x2000, DIRECT_MAP + 0x10_0000);
            let mut facts = facts(MAX_ORDERS, 4, 4);
            facts.symbols.insert("nr_node_ids", DIRECT_MAP + 0x1000);
            facts.symbols.insert("node_data", DIRECT_MAP + 0x2000);
            let member = Member {
                offset: 0,
                size: None,
                len: Some(count),
            };
            facts.members.insert(("pglist_data", "node_zones"), member);
            let memory = ram.memory();
            let found = Zones::new(&kernel(&memory, facts));
            assert_eq!(found.is_ok(), is_read, "{count}: {:?}", found.err());
        }
    }
}
