//! Nodes, zones, the buddy allocator's free lists, the per-CPU lists, and the counters.
//!
//! Sources: `include/linux/mmzone.h`, `mm/page_alloc.c`, `mm/vmstat.c`.

use super::mem_map::MemMap;
use crate::error::VmiError;
use crate::kernel::{Kernel, element};
use crate::shape::Knowledge;
use crate::{KernelVa, VirtualMemory};
use sonicshot::{PageSize, Pfn, PfnRange};

/// `CONFIG_NODES_SHIFT` is 10 at most.
const MAX_NODES: u64 = 1 << 10;
/// `enum zone_type` has six values at most.
const MAX_ZONES: u64 = 8;
/// `NR_PAGE_ORDERS`: x86-64 has 11, arm64 with 64 KiB pages 14, and a config may go higher.
pub(crate) const MAX_ORDERS: u64 = 24;
/// `MIGRATE_TYPES` is six or seven.
const MAX_MIGRATE_TYPES: u64 = 16;
/// `NR_CPUS` is 8192 at most.
const MAX_CPUS: u64 = 8192;
/// `NR_PCP_LISTS` is 3 to 14.
const MAX_PCP_LISTS: u64 = 64;

/// Where the members of the allocator's structures are.
#[derive(Debug)]
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
    /// Where the per-CPU pages are, as the zone's `__percpu` pointer.
    pub pageset: KernelVa,
}

/// The array `zone.free_area`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AreaLayout {
    /// From the zone to the array.
    pub free_area: u64,
    /// How many elements it has.
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
#[derive(Debug)]
pub(crate) struct Zones {
    layout: ZoneLayout,
    pub zones: Vec<Zone>,
    /// `struct pglist_data` of each node.
    pub nodes: Vec<KernelVa>,
    pub deferred: Vec<Deferred>,
    /// The displacement of each possible processor's per-CPU area.
    pub cpu_offsets: Vec<u64>,
    /// Why the per-CPU lists cannot be read, if they can't.
    pub no_pcp: Option<String>,
    /// Where the per-CPU lists are, if no type tells.
    pcp: Option<PcpLayout>,
    /// Whether the counters are without the per-CPU deltas.
    pub without_deltas: bool,
    /// What they were found by. Where it is the shape alone, a block that says it is free and is
    /// on no list is kept and counted, and no more: before a kernel has set up its struct pages,
    /// those of the boot before may show.
    pub knowledge: Knowledge,
}

/// One free block that a list names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ListedBlock {
    pub head: Pfn,
    pub order: u32,
    /// Whether the block may be moved out of `NR_FREE_PAGES` by page isolation.
    pub isolated: bool,
}

impl ListedBlock {
    /// How many pages the block has.
    pub(crate) fn pages(&self) -> Option<u64> {
        1_u64.checked_shl(self.order)
    }
}

/// What the walk of one list came upon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Listed {
    /// A block that the list links in both directions.
    Block(ListedBlock),
    /// A block whose successor does not link back: the list was being changed.
    Torn(ListedBlock),
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

    /// How many processors can have been inside the allocator when the guest stopped.
    pub(crate) fn cpus(&self) -> u64 {
        (self.cpu_offsets.len() as u64).max(1)
    }

    pub(crate) fn max_order(&self) -> u64 {
        self.layout.orders.saturating_sub(1)
    }

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
        for offset in &self.cpu_offsets {
            let pcp = zone.pageset.wrapping_add(*offset).wrapping_add(layout.pcp);
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

/// What free lists are walked by.
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
        let frames = map.spans().iter().map(|span| span.frames.len());
        Self {
            map,
            kernel,
            lru,
            frames_left: frames.fold(0, u64::saturating_add),
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
        while node != head {
            let page = KernelVa::new(node.raw().wrapping_sub(self.lru));
            let Some(pfn) = map.frame_of(page) else {
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
            let next = KernelVa::new(map.u64_at(node)?);
            let back_at = next.checked_add(8).ok_or(VmiError::Corrupt {
                what: "a free list",
                at: node,
                value: next.raw(),
            })?;
            let back = if next == head {
                kernel.read_u64("a free list's head", back_at)?
            } else {
                map.u64_at(back_at)?
            };
            let block = ListedBlock { head: pfn, ..block };
            visit(if back == node.raw() {
                Listed::Block(block)
            } else {
                Listed::Torn(block)
            })?;
            node = next;
        }
        Ok(())
    }
}

/// A small number of the kernel's, such as an order.
fn narrow(what: &'static str, at: KernelVa, value: u64) -> Result<u32, VmiError> {
    u32::try_from(value).map_err(|_| VmiError::Corrupt { what, at, value })
}

/// The nodes and their `struct pglist_data`.
fn nodes(kernel: &Kernel<'_>) -> Result<Vec<(u64, KernelVa)>, VmiError> {
    // Without NUMA there is one node, `contig_page_data`.
    if let Some(at) = kernel.symbol("contig_page_data")? {
        return Ok(vec![(0, at)]);
    }
    let array = kernel.need_symbol("node_data")?;
    let len = kernel
        .vmcoreinfo
        .as_ref()
        .and_then(|info| info.length("node_data"))
        .map_or_else(|| online_nodes(kernel), Ok)?
        .min(MAX_NODES);
    let mut nodes = Vec::new();
    for node in 0..len {
        let at = kernel.read_ptr("node_data", element("node_data", array, node, 8, 0)?)?;
        if at.raw() != 0 {
            nodes.push((node, at));
        }
    }
    if nodes.is_empty() {
        return Err(VmiError::Corrupt {
            what: "node_data",
            at: array,
            value: 0,
        });
    }
    Ok(nodes)
}

/// How many entries of `node_data` may be read when VMCOREINFO does not tell.
fn online_nodes(kernel: &Kernel<'_>) -> Result<u64, VmiError> {
    let at = kernel.need_symbol("nr_node_ids")?;
    Ok(u64::from(kernel.read_u32("nr_node_ids", at)?))
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

/// `nr_free` of each order of the zone at `at`.
fn read_nr_free(
    kernel: &Kernel<'_>,
    layout: &ZoneLayout,
    at: KernelVa,
) -> Result<Vec<u64>, VmiError> {
    let offset = layout
        .free_area
        .checked_add(layout.nr_free)
        .ok_or(VmiError::Corrupt {
            what: "zone.free_area",
            at,
            value: layout.free_area,
        })?;
    let nr_free = |order| {
        let at = element("zone.free_area", at, order, layout.free_area_size, offset)?;
        kernel.read_u64("free_area.nr_free", at)
    };
    (0..layout.orders).map(nr_free).collect()
}

/// Counter number `index` of the zone at `at`, with what the processors have not folded in yet.
fn read_counter(
    kernel: &Kernel<'_>,
    layout: &ZoneLayout,
    at: KernelVa,
    index: u64,
    deltas: &Deltas<'_>,
) -> Result<i64, VmiError> {
    let stat = element("zone.vm_stat", at, index, 8, layout.vm_stat)?;
    let mut counter = kernel.read_u64("zone.vm_stat", stat)?.cast_signed();
    let Some(diffs) = &deltas.diffs else {
        return Ok(counter);
    };
    let pointer = element("zone", at, 0, 0, diffs.pointer)?;
    let base = kernel.read_ptr("zone's per-CPU counters", pointer)?;
    for offset in deltas.cpu_offsets {
        let delta = base
            .wrapping_add(*offset)
            .wrapping_add(diffs.vm_stat_diff)
            .wrapping_add(index);
        let mut byte = [0];
        kernel
            .space
            .read(delta, &mut byte)
            .map_err(VmiError::read("vm_stat_diff"))?;
        let sum = counter.checked_add(i64::from(i8::from_le_bytes(byte)));
        counter = sum.ok_or(VmiError::Corrupt {
            what: "zone.vm_stat",
            at: stat,
            value: counter.cast_unsigned(),
        })?;
    }
    Ok(counter)
}

/// `pgdat.first_deferred_pfn` (`CONFIG_DEFERRED_STRUCT_PAGE_INIT`): all ones when done.
fn read_deferred(kernel: &Kernel<'_>, pgdat: KernelVa) -> Result<Option<Deferred>, VmiError> {
    let Some(member) = kernel.member("pglist_data", "first_deferred_pfn")? else {
        return Ok(None);
    };
    let field = |name: &'static str| -> Result<u64, VmiError> {
        let offset = kernel.need_member("pglist_data", name)?.offset;
        kernel.read_u64(name, element("pglist_data", pgdat, 0, 0, offset)?)
    };
    let first = kernel.read_u64(
        "pglist_data.first_deferred_pfn",
        element("pglist_data", pgdat, 0, 0, member.offset)?,
    )?;
    if first == u64::MAX {
        return Ok(None);
    }
    let (start, spanned) = (field("node_start_pfn")?, field("node_spanned_pages")?);
    let end = start.checked_add(spanned).ok_or(VmiError::Corrupt {
        what: "pglist_data.node_spanned_pages",
        at: pgdat,
        value: spanned,
    })?;
    Ok(Some(Deferred {
        frames: PfnRange::new(Pfn::new(first.max(start)), Pfn::new(end)),
    }))
}

/// Every possible processor's number, and the displacement of its per-CPU area
/// (`__per_cpu_offset`).
pub(crate) fn possible_cpus(kernel: &Kernel<'_>) -> Result<Vec<(u64, u64)>, VmiError> {
    let array = kernel.need_symbol("__per_cpu_offset")?;
    let mask = kernel.need_symbol("__cpu_possible_mask")?;
    let variable = kernel.need_symbol("nr_cpu_ids")?;
    let ids = u64::from(kernel.read_u32("nr_cpu_ids", variable)?);
    if ids == 0 || ids > MAX_CPUS {
        return Err(VmiError::Corrupt {
            what: "nr_cpu_ids",
            at: variable,
            value: ids,
        });
    }
    let mut found = Vec::new();
    for cpu in 0..ids {
        if in_mask(kernel, "__cpu_possible_mask", mask, cpu)? {
            let at = element("__per_cpu_offset", array, cpu, 8, 0)?;
            found.push((cpu, kernel.read_u64("__per_cpu_offset", at)?));
        }
    }
    Ok(found)
}

/// Whether `struct cpumask` at `mask` has processor `cpu`.
pub(crate) fn in_mask(
    kernel: &Kernel<'_>,
    what: &'static str,
    mask: KernelVa,
    cpu: u64,
) -> Result<bool, VmiError> {
    let word = kernel.read_u64(what, element(what, mask, cpu >> 6, 8, 0)?)?;
    Ok(word & (1 << (cpu & 63)) != 0)
}

/// The zone counters that processors have not folded in yet.
struct Deltas<'a> {
    /// `None` without SMP, where there are none.
    diffs: Option<StatDiffs>,
    cpu_offsets: &'a [u64],
}

/// Where a processor's unfolded zone counters are.
#[derive(Debug)]
struct StatDiffs {
    /// Offset in `struct zone` of the `__percpu` pointer.
    pointer: u64,
    vm_stat_diff: u64,
}

impl StatDiffs {
    /// `None` without SMP, where counters have no deltas.
    fn new(kernel: &Kernel<'_>) -> Result<Option<Self>, VmiError> {
        // Since 5.14 (28f836b6777b) apart from the page lists.
        for (pointer, ty) in [
            ("per_cpu_zonestats", "per_cpu_zonestat"),
            ("pageset", "per_cpu_pageset"),
        ] {
            if let Some(pointer) = kernel.member("zone", pointer)?
                && let Some(diff) = kernel.member(ty, "vm_stat_diff")?
            {
                return Ok(Some(Self {
                    pointer: pointer.offset,
                    vm_stat_diff: diff.offset,
                }));
            }
        }
        Ok(None)
    }
}

/// Where the lists in a processor's `struct per_cpu_pages` are, and what is in each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PcpLayout {
    /// From the zone's `__percpu` pointer to `struct per_cpu_pages`.
    pub pcp: u64,
    pub count: u64,
    pub lists_at: u64,
    pub lists: u64,
    /// `MIGRATE_PCPTYPES`.
    pub types: u64,
    /// Of the lists behind the ones of order 0 to `PAGE_ALLOC_COSTLY_ORDER`.
    pub huge_order: u32,
}

/// `PAGE_ALLOC_COSTLY_ORDER`, the same since 2.6.
const COSTLY_ORDER: u64 = 3;

impl PcpLayout {
    fn new(kernel: &Kernel<'_>) -> Result<Self, VmiError> {
        // To 5.13 the lists were inside `struct per_cpu_pageset`.
        let pcp = kernel
            .member("per_cpu_pageset", "pcp")?
            .map_or(0, |member| member.offset);
        let lists = kernel.need_member("per_cpu_pages", "lists")?;
        let types = kernel.need_constant("MIGRATE_PCPTYPES")?;
        match (lists.len, u64::try_from(types)) {
            (Some(len), Ok(types))
                if (1..=MAX_PCP_LISTS).contains(&len) && (1..=len).contains(&types) =>
            {
                Ok(Self {
                    pcp,
                    count: kernel.need_member("per_cpu_pages", "count")?.offset,
                    lists_at: lists.offset,
                    lists: len,
                    types,
                    huge_order: Self::huge_order(kernel.build.page_size),
                })
            }
            _ => Err(VmiError::Unsupported {
                what: format!("per_cpu_pages.lists of {:?} for {types} types", lists.len),
            }),
        }
    }

    /// `HPAGE_PMD_ORDER`: a page of page tables has a pointer of 8 bytes for each.
    pub(crate) fn huge_order(page_size: PageSize) -> u32 {
        page_size.shift().saturating_sub(3)
    }

    /// `pindex_to_order` (`mm/page_alloc.c`, since 5.14): the order is in no page.
    pub(crate) fn order(&self, index: u64) -> Result<u32, VmiError> {
        let order = index.checked_div(self.types);
        let order = order.and_then(|order| u32::try_from(order).ok());
        if let Some(order) = order.filter(|order| u64::from(*order) <= COSTLY_ORDER) {
            Ok(order)
        } else if index < self.types.saturating_mul(COSTLY_ORDER.saturating_add(2)) {
            Ok(self.huge_order)
        } else {
            Err(VmiError::Unsupported {
                what: format!("per-CPU list {index}"),
            })
        }
    }
}
