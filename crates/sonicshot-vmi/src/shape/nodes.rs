//! Whether zones that were found by their lists are this kernel's.
//!
//! An earlier boot's zones may still be there, with lists of struct pages that this boot has not
//! set up. Such a zone is whole by itself; what it lacks is this kernel's word. Two are asked for:
//!
//! - A zone points to its node (`zone_pgdat`, `include/linux/mmzone.h`), which begins with its
//!   zones; and the node lies in the kernel's image (`contig_page_data`), or the image points to it
//!   (`node_data`). What is not so is no zone.
//! - The pages of each zone have its number and its node's in the highest bits of their flags
//!   (`set_page_links`), so those of two zones differ there.

use super::displacements::Displacements;
use super::heads::{Heads, Look};
use super::words::{each_page, is_inside};
use super::zones;
use crate::error::VmiError;
use crate::kernel::element;
use crate::mm::zone::AreaLayout;
use crate::{KernelVa, VirtualMemory};
use sonicshot::to_u64;

/// The size of the members before the lists of free blocks, behind watermarks and reserves.
pub(super) const ZONE_HEAD: u64 = 576;
/// A node begins with its zones: eight of 2 KiB at most.
const MAX_NODE_ZONES: u64 = 64 << 10;

/// The zones that have a node of this kernel.
#[derive(Debug)]
pub(super) struct Owned {
    /// The arrays of free areas, lowest first.
    pub arrays: Vec<KernelVa>,
    /// The node of each.
    pub nodes: Vec<KernelVa>,
    /// From an array back to the zone's pointer to its node.
    pub pointer: u64,
    /// Words of the image that may be a processor's displacement.
    pub displacements: Displacements,
}

/// Of `arrays` those whose zone's node is the kernel's, by its image.
///
/// # Errors
/// [`VmiError::Unsupported`] if there is none, or two of them have the pages of one.
pub(super) fn owned(
    look: &Look<'_, '_>,
    arrays: &[KernelVa],
    area: &AreaLayout,
) -> Result<Owned, VmiError> {
    let (pointer, nodes) =
        nodes(&look.heads, arrays, area).ok_or_else(|| VmiError::Unsupported {
            what: "zones, found by their lists, that do not point to a node before them".into(),
        })?;
    let inside = nodes.iter().map(|node| is_inside(look, *node));
    let mut own = inside.collect::<Result<Vec<bool>, _>>()?;
    let mut displacements = Displacements::default();
    // The image is gone through once, for the nodes and for the processors.
    each_page(look, &mut |_, words| {
        // A node's address is the kernel's, and the difference of two such is negative.
        let words = words.iter().copied().map(u64::from_le_bytes);
        for word in words.filter(|word| word >> 56 == 0xff) {
            for (node, own) in nodes.iter().zip(own.iter_mut()) {
                *own = *own || node.raw() == word;
            }
            displacements.take(look, word)?;
        }
        Ok(())
    })?;
    let own = arrays.iter().zip(nodes).zip(own).filter(|(_, own)| *own);
    let (arrays, nodes): (Vec<KernelVa>, Vec<KernelVa>) =
        own.map(|((array, node), _)| (*array, node)).unzip();
    if arrays.is_empty() {
        return Err(VmiError::Unsupported {
            what:
                "zones, found by their lists, to whose node nothing in the kernel's image points: \
                   they may be an earlier boot's"
                    .into(),
        });
    }
    differ(look, &arrays, area)?;
    Ok(Owned {
        arrays,
        nodes,
        pointer,
        displacements,
    })
}

/// From an array back to the pointer to the zone's node, in the same place in every zone, and
/// the nodes: it leads to a little before the zone.
fn nodes(
    heads: &Heads<'_, '_>,
    arrays: &[KernelVa],
    area: &AreaLayout,
) -> Option<(u64, Vec<KernelVa>)> {
    let node = |array: &KernelVa, back: u64| {
        let at = array.raw().checked_sub(back).map(KernelVa::new)?;
        let node = KernelVa::new(heads.space.read_u64(at).ok()?);
        let before = array.offset_from(node)?;
        is_in_node(before, back).then_some(node)
    };
    let all = |back: u64| {
        let nodes: Option<Vec<KernelVa>> = arrays.iter().map(|array| node(array, back)).collect();
        Some((back, nodes?))
    };
    (8..=area.free_area.min(ZONE_HEAD))
        .rev()
        .step_by(8)
        .find_map(all)
}

/// Whether a zone's array may be so far behind the beginning of its node, and so far behind the
/// zone's pointer to that.
fn is_in_node(before: u64, back: u64) -> bool {
    before > back && before < MAX_NODE_ZONES
}

/// Holds the flags of the zones' pages against each other.
fn differ(look: &Look<'_, '_>, arrays: &[KernelVa], area: &AreaLayout) -> Result<(), VmiError> {
    /// So many blocks of each list are looked at.
    const LOOKED: u64 = 64;
    let mut flags: Vec<(u64, u64)> = Vec::new();
    for array in arrays {
        look.deadline
            .check("zones", to_u64(flags.len()), to_u64(arrays.len()))?;
        // Bits that all have, and bits that any has.
        let mut common = (u64::MAX, 0);
        zones::walk(&look.heads, *array, area, LOOKED, &mut |block| {
            let at = element("struct page", block.page, 0, 0, look.layout.flags_at())?;
            let flags = look.heads.map.u64_at(at)?;
            common = (common.0 & flags, common.1 | flags);
            Ok(())
        })?;
        flags.push(common);
    }
    // Zone and node are above all that is of the page itself.
    let varying = flags.iter().fold(0, |bits, (all, any)| bits | (all ^ any));
    let of_zone = !u64::MAX.unbounded_shr(varying.leading_zeros());
    let mut keys: Vec<u64> = flags.iter().map(|(all, _)| all & of_zone).collect();
    keys.sort_unstable();
    let all = keys.len();
    keys.dedup();
    if keys.len() < all {
        return Err(VmiError::Unsupported {
            what: format!(
                "{all} zones, found by their lists, whose pages are of {} zones: some are an earlier \
                 boot's, or none is one",
                keys.len()
            ),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{MAX_NODE_ZONES, is_in_node};

    #[test]
    fn a_zone_is_no_farther_in_its_node_than_a_bound() {
        for (before, is_in) in [
            (64, false),
            (65, true),
            (MAX_NODE_ZONES - 1, true),
            (MAX_NODE_ZONES, false),
        ] {
            assert_eq!(is_in_node(before, 64), is_in, "{before}");
        }
    }
}
