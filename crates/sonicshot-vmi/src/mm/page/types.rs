//! The type of a page, in the word that it shares with the count of mappings.

use crate::error::VmiError;
use crate::kernel::Kernel;

/// The encoding of a page's type in `_mapcount`/`page_type`.
#[derive(Debug, Clone, Copy)]
pub(super) struct PageTypes {
    encoding: Encoding,
    pub(super) buddy: u32,
    pub(super) offline: Option<u32>,
    pub(super) table: Option<u32>,
    pub(super) slab: Option<u32>,
    pub(super) hugetlb: Option<u32>,
    pub(super) unaccepted: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encoding {
    /// 4.18 to 6.11: the types are bits that are *clear* in a number whose top bits are set.
    ClearedBits,
    /// Since 6.12 (4ffca5a96678): one type in the top byte, the rest is the owner's.
    TopByte,
}

impl PageTypes {
    pub(super) fn has_slab_type(kernel: &Kernel<'_>) -> Result<bool, VmiError> {
        Ok(kernel.constant("PGTY_slab")?.is_some()
            || kernel.constant("PAGE_SLAB_MAPCOUNT_VALUE")?.is_some())
    }

    /// Nothing but the buddy's, whose word is `buddy`.
    pub(super) fn by_shape(buddy: u32) -> Self {
        Self {
            encoding: if buddy >> 24 == 0xf0 {
                Encoding::TopByte
            } else {
                Encoding::ClearedBits
            },
            buddy,
            offline: None,
            table: None,
            slab: None,
            hugetlb: None,
            unaccepted: None,
        }
    }

    pub(super) fn new(kernel: &Kernel<'_>) -> Result<Self, VmiError> {
        let by_enum = kernel.constant("PGTY_buddy")?.is_some();
        let types = if by_enum || word(kernel, "BUDDY")?.is_some_and(|word| word >> 24 == 0xf0) {
            Self::by_top_byte(kernel, by_enum)?
        } else {
            Self::by_cleared_bits(kernel)?
        };
        types.distinct()
    }

    fn by_top_byte(kernel: &Kernel<'_>, by_enum: bool) -> Result<Self, VmiError> {
        let need_buddy = || kernel.need_constant("PAGE_BUDDY_MAPCOUNT_VALUE").map(|_| 0);
        let ty = |own: &str, info: &str| top_byte(kernel, own, info);
        Ok(Self {
            encoding: Encoding::TopByte,
            buddy: ty("buddy", "BUDDY")?.map_or_else(need_buddy, Ok)?,
            offline: ty("offline", "OFFLINE")?,
            table: if by_enum {
                ty("table", "TABLE")?
            } else {
                Some(0xf200_0000)
            },
            slab: ty("slab", "SLAB")?,
            hugetlb: ty("hugetlb", "HUGETLB")?,
            unaccepted: ty("unaccepted", "UNACCEPTED")?,
        })
    }

    fn by_cleared_bits(kernel: &Kernel<'_>) -> Result<Self, VmiError> {
        let buddy = match word(kernel, "BUDDY")? {
            Some(word) => word,
            None if kernel.vmcoreinfo.is_none() => buddy_of_macro(kernel),
            None => kernel
                .need_constant("PAGE_BUDDY_MAPCOUNT_VALUE")
                .map(|_| 0)?,
        };
        let cleared_bit = !buddy;
        if !cleared_bit.is_power_of_two() {
            return Err(VmiError::Unsupported {
                what: format!("PAGE_BUDDY_MAPCOUNT_VALUE of {buddy:#x}"),
            });
        }
        // No source tells the bit of page tables: a macro until 6.10. 5.11 dropped PG_kmemcg,
        // which stood between (include/linux/page-flags.h). It names a class that is never
        // dropped, so a wrong guess costs a label, not a page.
        let table = match cleared_bit {
            0x80 if kernel.is_older_than(5, 11) => Some(!0x400),
            0x80 => Some(!0x200),
            0x4000_0000 => Some(!0x1000_0000),
            _ => None,
        };
        // One type is one cleared bit of the ones that are types; each but the top bits.
        let one_bit = |name: &str| -> Result<Option<u32>, VmiError> {
            match word(kernel, name)? {
                Some(word) if !(!word).is_power_of_two() => Err(VmiError::Unsupported {
                    what: format!("PAGE_{name}_MAPCOUNT_VALUE of {word:#x}"),
                }),
                word => Ok(word),
            }
        };
        Ok(Self {
            encoding: Encoding::ClearedBits,
            buddy,
            offline: one_bit("OFFLINE")?,
            table,
            slab: one_bit("SLAB")?,
            hugetlb: one_bit("HUGETLB")?,
            unaccepted: one_bit("UNACCEPTED")?,
        })
    }

    /// Refuses two types of one value: one of them is another kernel's, or damaged.
    fn distinct(self) -> Result<Self, VmiError> {
        let all = [
            ("buddy", Some(self.buddy)),
            ("offline", self.offline),
            ("table", self.table),
            ("slab", self.slab),
            ("hugetlb", self.hugetlb),
            ("unaccepted", self.unaccepted),
        ];
        for (number, (name, value)) in all.iter().enumerate() {
            let earlier = all.iter().take(number);
            let mut same = earlier.filter(|(_, other)| value.is_some() && other == value);
            if let (Some((other, _)), Some(value)) = (same.next(), value) {
                return Err(VmiError::Unsupported {
                    what: format!("{name} and {other} pages of one type {value:#x}"),
                });
            }
        }
        Ok(self)
    }

    /// Whether the word `ty` says the type whose word `value` is.
    #[inline]
    pub(super) fn is(&self, ty: u32, value: u32) -> bool {
        match self.encoding {
            Encoding::TopByte => ty >> 24 == value >> 24,
            // A small negative number is a mapcount that underflowed; the type's bit must be
            // the only one that is clear among the type bits, the top bits are set.
            Encoding::ClearedBits => ty == value,
        }
    }
}

/// The whole word of a type that VMCOREINFO tells.
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "VMCOREINFO prints the 32-bit word as a signed number: the low 32 bits are meant"
)]
fn word(kernel: &Kernel<'_>, name: &str) -> Result<Option<u32>, VmiError> {
    let name = format!("PAGE_{name}_MAPCOUNT_VALUE");
    Ok(kernel.constant(&name)?.map(|value| value as u32))
}

/// The word that a free block has where only a macro tells it (`PG_buddy` in
/// `include/linux/page-flags.h`, before 6.12), in a kernel without VMCOREINFO. If it is another,
/// no block of the lists has the mark, and the guest is refused.
fn buddy_of_macro(kernel: &Kernel<'_>) -> u32 {
    match kernel.is_older_than(6, 11) {
        true => !0x80,
        false => !0x4000_0000,
    }
}

/// The word of a type. Since 6.12 `enum pagetype` holds the top byte: 0xf0 and up, and 0xff is a
/// page without a type. VMCOREINFO tells the whole word of some; before, there are macros only, and
/// in 6.11 an enumerator `PG_buddy` of 0x40000000.
fn top_byte(kernel: &Kernel<'_>, own: &str, info: &str) -> Result<Option<u32>, VmiError> {
    let enumerator = format!("PGTY_{own}");
    let by_enum = match kernel.constant(&enumerator)? {
        Some(byte) => {
            let top = u32::try_from(byte)
                .ok()
                .filter(|byte| (0xf0..0xff).contains(byte));
            let top = top.and_then(|byte| byte.checked_shl(24));
            Some(top.ok_or_else(|| VmiError::Unsupported {
                what: format!("{enumerator} of {byte:#x}"),
            })?)
        }
        None => None,
    };
    match (by_enum, word(kernel, info)?) {
        (Some(own), Some(told)) if own != told => Err(VmiError::Disagree {
            what: format!("the type of {own} pages", own = info.to_lowercase()),
            first: enumerator,
            first_value: u64::from(own),
            second: format!("PAGE_{info}_MAPCOUNT_VALUE"),
            second_value: u64::from(told),
        }),
        (by_enum, told) => Ok(by_enum.or(told)),
    }
}
