//! Detection of the huge pages of hugetlbfs.

use crate::error::VmiError;
use crate::kernel::Kernel;

/// The mark of the head of a hugetlb page in this kernel.
#[derive(Debug, Clone, Copy)]
pub(super) enum HugetlbMark {
    /// `page[1].compound_dtor` (to 6.5): where in the second struct page, size, value.
    Destructor { offset: u64, size: u64, value: u64 },
    /// A flag in `folio._flags_1` (6.6 to 6.8): its offset from the head, and the mask.
    FolioFlag { offset: u64, mask: u64 },
    /// A page type (since 6.9).
    Type,
    /// No hugetlbfs in this kernel.
    None,
}

impl HugetlbMark {
    pub(super) fn new(kernel: &Kernel<'_>, stride: u64) -> Result<Self, VmiError> {
        if kernel.constant("PGTY_hugetlb")?.is_some()
            || kernel.constant("PAGE_HUGETLB_MAPCOUNT_VALUE")?.is_some()
        {
            return Ok(Self::Type);
        }
        // 6.6 to 6.8: `PG_hugetlb` is a flag of the second struct page.
        if let (Some(bit), Some(member)) = (
            kernel.constant("PG_hugetlb")?,
            kernel.member("folio", "_flags_1")?,
        ) {
            let mask = u32::try_from(bit)
                .ok()
                .and_then(|bit| 1_u64.checked_shl(bit))
                .ok_or_else(|| VmiError::Unsupported {
                    what: format!("PG_hugetlb of {bit}"),
                })?;
            return Ok(Self::FolioFlag {
                offset: member.offset,
                mask,
            });
        }
        let Some(value) = kernel.constant("HUGETLB_PAGE_DTOR")? else {
            return Ok(Self::None);
        };
        // `page.compound_dtor` of the second struct page; 6.3 moved it to `folio._folio_dtor`.
        let offset = if let Some(member) = kernel.member("folio", "_folio_dtor")? {
            Some((member.offset, member.size))
        } else {
            kernel
                .member("page", "compound_dtor")?
                .and_then(|member| Some((stride.checked_add(member.offset)?, member.size)))
        };
        match (offset, u64::try_from(value)) {
            (Some((offset, size)), Ok(value)) => Ok(Self::Destructor {
                offset,
                size: size.unwrap_or(1),
                value,
            }),
            _ => Ok(Self::None),
        }
    }

    /// Whether the head of a folio bears the mark, which is none of its type; `read` reads a word
    /// at an offset from it.
    pub(super) fn is_set(self, read: &dyn Fn(u64) -> Option<u64>) -> bool {
        match self {
            Self::Type | Self::None => false,
            Self::FolioFlag { offset, mask } => read(offset).is_some_and(|word| word & mask != 0),
            Self::Destructor {
                offset,
                size,
                value,
            } => {
                let aligned = offset & !7;
                let shift = u32::try_from((offset & 7) << 3);
                let mask = if size >= 8 {
                    u64::MAX
                } else {
                    !(u64::MAX << ((size & 7) << 3))
                };
                read(aligned).zip(shift.ok()).is_some_and(|(word, shift)| {
                    word.checked_shr(shift)
                        .is_some_and(|word| word & mask == value)
                })
            }
        }
    }
}
