//! Raw guest RAM: the bytes of a memory backend file, a Firecracker memory file, a Cloud
//! Hypervisor `memory-ranges` file.

use crate::backing::mapped::Extent;
use crate::{DumpError, LayoutSpec};
use std::path::Path;

/// Where the bytes of a raw file of `len` bytes lie, by `spec`.
pub(crate) fn extents(path: &Path, len: u64, spec: &LayoutSpec) -> Result<Vec<Extent>, DumpError> {
    let mut offset = 0_u64;
    let mut extents = Vec::new();
    for guest in spec.ranges(len) {
        extents.push(Extent {
            guest,
            offset: Some(offset),
        });
        offset = offset.saturating_add(guest.len());
    }
    if offset != len {
        return Err(DumpError::LayoutLength {
            path: path.to_owned(),
            layout: spec.to_string(),
            described: offset,
            actual: len,
        });
    }
    Ok(extents)
}
