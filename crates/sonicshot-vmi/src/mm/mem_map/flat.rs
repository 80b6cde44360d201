//! `FLATMEM`: one array `mem_map` from frame 0 (`include/asm-generic/memory_model.h`).

use super::section::Span;
use crate::error::VmiError;
use crate::kernel::{Kernel, element};
use sonicshot::{Pfn, PfnRange};

/// The one run of frames.
pub(super) fn find(kernel: &Kernel<'_>, stride: u64) -> Result<Vec<Span>, VmiError> {
    let mem_map = kernel.read_ptr("mem_map", kernel.need_symbol("mem_map")?)?;
    let max = kernel.read_u64("max_mapnr", kernel.need_symbol("max_mapnr")?)?;
    // The one node points to the struct page of its first frame (`alloc_node_mem_map`).
    if let Some(node) = kernel.symbol("contig_page_data")?
        && let Some(array) = kernel.member("pglist_data", "node_mem_map")?
    {
        let start = kernel.need_member("pglist_data", "node_start_pfn")?.offset;
        let field = |offset| element("contig_page_data", node, 0, 0, offset);
        let array = kernel.read_ptr("node_mem_map", field(array.offset)?)?;
        let start = kernel.read_u64("node_start_pfn", field(start)?)?;
        let first = element("mem_map", mem_map, start, stride, 0)?;
        if array != first {
            return Err(VmiError::Disagree {
                what: "where the struct pages are".into(),
                first: "mem_map".into(),
                first_value: first.raw(),
                second: "the node's node_mem_map".into(),
                second_value: array.raw(),
            });
        }
    }
    let end = kernel.space.memory().layout().end();
    let end = end.pfn(kernel.build.page_size).raw();
    if max == 0 || mem_map.raw() == 0 {
        return Err(VmiError::Corrupt {
            what: "mem_map",
            at: mem_map,
            value: max,
        });
    }
    Ok(vec![Span {
        frames: PfnRange::new(Pfn::new(0), Pfn::new(max.min(end))),
        at: mem_map,
        online: true,
        early: true,
    }])
}
