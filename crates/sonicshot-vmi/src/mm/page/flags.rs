//! The flags of a page (`include/linux/page-flags.h`).

use super::types::PageTypes;
use crate::error::VmiError;
use crate::kernel::Kernel;

/// Masks of `page.flags`. A flag that this kernel does not have is 0.
#[derive(Debug, Clone, Copy)]
pub(super) struct FlagBits {
    /// Every bit below `__NR_PAGEFLAGS`.
    pub(super) all: u64,
    pub(super) lru: u64,
    pub(super) dirty: u64,
    pub(super) writeback: u64,
    pub(super) uptodate: u64,
    pub(super) locked: u64,
    pub(super) private: u64,
    pub(super) private_2: u64,
    pub(super) swapbacked: u64,
    pub(super) reserved: u64,
    pub(super) head: u64,
    pub(super) slab: u64,
    pub(super) hwpoison: u64,
}

impl FlagBits {
    pub(super) fn new(kernel: &Kernel<'_>) -> Result<Self, VmiError> {
        /// The flags share their word with the zone and the node of the page; no config has
        /// fewer than these.
        const COUNT: core::ops::RangeInclusive<i64> = 18..=40;
        let count = kernel.need_constant("__NR_PAGEFLAGS")?;
        if !COUNT.contains(&count) {
            return Err(VmiError::Unsupported {
                what: format!("__NR_PAGEFLAGS of {count}"),
            });
        }
        let mut taken: Vec<(i64, &str)> = Vec::new();
        let mut mask = |name: &'static str, bit: i64| -> Result<u64, VmiError> {
            // Each has a bit of its own: none of these is another's second name.
            if let Some((_, other)) = taken.iter().find(|(other, _)| *other == bit) {
                return Err(VmiError::Unsupported {
                    what: format!("{name} and {other} of {bit}, the same"),
                });
            }
            taken.push((bit, name));
            u32::try_from(bit)
                .ok()
                .filter(|_| bit < count)
                .and_then(|bit| 1_u64.checked_shl(bit))
                .ok_or(VmiError::Unsupported {
                    what: format!("{name} of {bit}, with __NR_PAGEFLAGS of {count}"),
                })
        };
        let mut need = |name| mask(name, kernel.need_constant(name)?);
        let bits = Self {
            all: u32::try_from(count)
                .ok()
                .and_then(|count| 1_u64.checked_shl(count))
                .unwrap_or(0)
                .wrapping_sub(1),
            lru: need("PG_lru")?,
            dirty: need("PG_dirty")?,
            writeback: need("PG_writeback")?,
            uptodate: need("PG_uptodate")?,
            locked: need("PG_locked")?,
            private: need("PG_private")?,
            swapbacked: need("PG_swapbacked")?,
            reserved: need("PG_reserved")?,
            head: need("PG_head")?,
            // `PG_slab` became a page type in 6.10 (46df8e73a4a3). The enumerator is searched by
            // name, so its absence counts only where the type's is there.
            slab: if PageTypes::has_slab_type(kernel)? {
                0
            } else {
                need("PG_slab")?
            },
            private_2: 0,
            hwpoison: 0,
        };
        let mut maybe = |name: &'static str| -> Result<u64, VmiError> {
            kernel.constant(name)?.map_or(Ok(0), |bit| mask(name, bit))
        };
        let bits = Self {
            private_2: maybe("PG_private_2")?,
            // Only with CONFIG_MEMORY_FAILURE.
            hwpoison: maybe("PG_hwpoison")?,
            ..bits
        };
        // The same under another name, in VMCOREINFO.
        if let Some(mask) = kernel.constant("PG_head_mask")?
            && mask.cast_unsigned() != bits.head
        {
            return Err(VmiError::Disagree {
                what: "the flag of a folio's head".into(),
                first: "PG_head".into(),
                first_value: bits.head,
                second: "PG_head_mask".into(),
                second_value: mask.cast_unsigned(),
            });
        }
        Ok(bits)
    }
}
