//! The nodes, and the frames of each that have no initialised `struct page` yet.

use super::Deferred;
use crate::KernelVa;
use crate::error::VmiError;
use crate::kernel::{Kernel, element};
use sonicshot::{Pfn, PfnRange};

/// `CONFIG_NODES_SHIFT` is 10 at most.
pub(super) const MAX_NODES: u64 = 1 << 10;

/// The nodes and their `struct pglist_data`.
pub(super) fn nodes(kernel: &Kernel<'_>) -> Result<Vec<(u64, KernelVa)>, VmiError> {
    // Without NUMA there is one node, `contig_page_data`.
    if let Some(at) = kernel.symbol("contig_page_data")? {
        return Ok(vec![(0, at)]);
    }
    let array = kernel.need_symbol("node_data")?;
    let len = kernel
        .vmcoreinfo
        .as_ref()
        .and_then(|info| info.length("node_data"))
        .map_or_else(|| online_nodes(kernel), Ok)?;
    if len > MAX_NODES {
        return Err(VmiError::Corrupt {
            what: "the number of nodes",
            at: array,
            value: len,
        });
    }
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

/// The number of entries of `node_data` that may be read when VMCOREINFO does not tell.
fn online_nodes(kernel: &Kernel<'_>) -> Result<u64, VmiError> {
    let at = kernel.need_symbol("nr_node_ids")?;
    Ok(u64::from(kernel.read_u32("nr_node_ids", at)?))
}

/// `pgdat.first_deferred_pfn` (`CONFIG_DEFERRED_STRUCT_PAGE_INIT`): all ones when done.
pub(super) fn read_deferred(
    kernel: &Kernel<'_>,
    pgdat: KernelVa,
) -> Result<Option<Deferred>, VmiError> {
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
