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
    /// The flags that decide about free pages, by the few that VMCOREINFO tells.
    ///
    /// `enum pageflags` (`include/linux/page-flags.h`) has `uptodate`, `dirty`, `lru` in this
    /// order since 4.18, and behind `swapbacked` at least `unevictable` and, with an MMU,
    /// `mlocked`: all bits up to there are flags. The ones behind (hwpoison is told, if it is
    /// there) are never alone on a page in use. `reserved` is right before `private`.
    pub(super) fn of_free_pages(kernel: &Kernel<'_>) -> Result<Self, VmiError> {
        const MOST: i64 = 40;
        let told = |name: &str| -> Result<Option<u64>, VmiError> {
            match kernel.constant(name)? {
                Some(bit) if (2..MOST).contains(&bit) => Ok(Some(1 << bit)),
                Some(bit) => Err(VmiError::Unsupported {
                    what: format!("{name} of {bit}"),
                }),
                None => Ok(None),
            }
        };
        let need = |name: &str| -> Result<u64, VmiError> {
            told(name)?.map_or_else(|| kernel.need_constant(name).map(|_| 0), Ok)
        };
        let lru = need("PG_lru")?;
        let swapbacked = need("PG_swapbacked")?;
        let private = need("PG_private")?;
        // A kernel without such a flag has no bit for it.
        let told_or_none = |name| Ok::<_, VmiError>(told(name)?.unwrap_or(0));
        let hwpoison = told_or_none("PG_hwpoison")?;
        // All below the third above it.
        let up_to_mlocked = (swapbacked << 3).checked_sub(1);
        let up_to_mlocked = up_to_mlocked.ok_or_else(|| VmiError::Unsupported {
            what: format!("PG_swapbacked of {swapbacked:#x}"),
        })?;
        Ok(Self {
            all: up_to_mlocked | hwpoison,
            lru,
            dirty: lru >> 1,
            writeback: 0,
            uptodate: lru >> 2,
            locked: 1,
            private,
            swapbacked,
            reserved: private >> 1,
            head: told_mask(kernel)?,
            slab: told_or_none("PG_slab")?,
            private_2: 0,
            hwpoison,
        })
    }

    /// Of x86-64, whatever its version: up to `mlocked` all bits are flags, and one of two is
    /// `uptodate`: to 6.9 the lower, since then the upper.
    pub(super) fn by_shape() -> Self {
        Self {
            all: 0x1f_ffff,
            lru: 0,
            dirty: 0,
            writeback: 0,
            uptodate: 0xc,
            locked: 1,
            private: 0,
            private_2: 0,
            swapbacked: 0,
            // To 6.9 the lower, too.
            reserved: 0x3000,
            head: 0,
            slab: 0,
            hwpoison: 0,
        }
    }

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
        let above = u32::try_from(count).map(|count| u64::MAX.unbounded_shl(count));
        let all = !above.map_err(|_| VmiError::Unsupported {
            what: format!("__NR_PAGEFLAGS of {count}"),
        })?;
        let bits = Self {
            all,
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

/// `PG_head_mask`, or 0.
fn told_mask(kernel: &Kernel<'_>) -> Result<u64, VmiError> {
    match kernel.constant("PG_head_mask")? {
        Some(mask) if mask.cast_unsigned().is_power_of_two() => Ok(mask.cast_unsigned()),
        Some(mask) => Err(VmiError::Unsupported {
            what: format!("PG_head_mask of {mask:#x}"),
        }),
        None => Ok(0),
    }
}

#[cfg(test)]
mod tests {
    use super::FlagBits;
    use crate::kernel::testing::{Facts, Ram, kernel};

    #[test]
    fn a_flag_has_no_higher_number_than_there_are() {
        for (number, is_taken) in [(2, true), (39, true), (40, false), (64, false), (1, false)] {
            let mut facts = Facts::default();
            let known = [("PG_lru", 5), ("PG_private", 13), ("PG_swapbacked", 19)];
            facts.constants.extend(known);
            facts.constants.insert("PG_hwpoison", number);
            facts.constants.insert("PG_head_mask", 1 << 16);
            let ram = Ram::new(8 << 20);
            let memory = ram.memory();
            let found = FlagBits::of_free_pages(&kernel(&memory, facts));
            assert_eq!(found.is_ok(), is_taken, "{number}: {:?}", found.err());
        }
    }
}
