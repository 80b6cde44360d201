//! What one `struct page` says (`include/linux/mm_types.h`, `include/linux/page-flags.h`).

use super::mem_map::MemMap;
use crate::KernelVa;
use crate::error::VmiError;
use crate::kernel::Kernel;
use sonicshot::{GuestBytes, PageClass};

/// Where the members of `struct page` are, and how this kernel encodes what they say.
#[derive(Debug, Clone)]
pub(crate) struct PageLayout {
    flags: usize,
    refcount: usize,
    mapcount: usize,
    mapping: usize,
    private: usize,
    compound: usize,
    /// Where the list node of a free page is.
    pub(crate) lru: u64,
    bits: FlagBits,
    types: PageTypes,
    hugetlb: HugetlbMark,
    /// Whether only free pages, offline ones and broken ones can be told: all others are unknown.
    only_free: bool,
}

/// Masks of `page.flags`. A flag that this kernel does not have is 0.
#[derive(Debug, Clone, Copy)]
struct FlagBits {
    /// Every bit below `__NR_PAGEFLAGS`.
    all: u64,
    lru: u64,
    dirty: u64,
    writeback: u64,
    uptodate: u64,
    locked: u64,
    private: u64,
    private_2: u64,
    swapbacked: u64,
    reserved: u64,
    head: u64,
    slab: u64,
    hwpoison: u64,
}

/// How `_mapcount`/`page_type` tells a page's type.
#[derive(Debug, Clone, Copy)]
struct PageTypes {
    encoding: Encoding,
    buddy: u32,
    offline: Option<u32>,
    table: Option<u32>,
    slab: Option<u32>,
    hugetlb: Option<u32>,
    unaccepted: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encoding {
    /// 4.18 to 6.11: the types are bits that are *clear* in a number whose top bits are set.
    ClearedBits,
    /// Since 6.12 (4ffca5a96678): one type in the top byte, the rest is the owner's.
    TopByte,
}

/// How this kernel marks the head of a hugetlb page.
#[derive(Debug, Clone, Copy)]
enum HugetlbMark {
    /// `page[1].compound_dtor` (to 6.5): where in the second struct page, size, value.
    Destructor { offset: u64, size: u64, value: u64 },
    /// A flag in `folio._flags_1` (6.6 to 6.8): its offset from the head, and the mask.
    FolioFlag { offset: u64, mask: u64 },
    /// A page type (since 6.9).
    Type,
    /// No hugetlbfs in this kernel.
    None,
}

/// What a free page's `struct page` says of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FreeMark {
    /// The head of a block in the buddy allocator, of this order.
    Buddy { order: u64 },
    /// Not in the buddy allocator.
    None,
}

impl PageLayout {
    pub(crate) fn new(kernel: &Kernel<'_>, stride: u64) -> Result<Self, VmiError> {
        let at = |names: &[&str], size: u64| place(kernel, stride, names, size);
        let lru = u64::try_from(at(&["lru"], 16)?).unwrap_or(0);
        for alias in ["buddy_list", "pcp_list"] {
            if let Some(member) = kernel.member("page", alias)?
                && member.offset != lru
            {
                return Err(VmiError::Unsupported {
                    what: format!("page.{alias} apart from page.lru"),
                });
            }
        }
        Ok(Self {
            flags: at(&["flags"], 8)?,
            refcount: at(&["_refcount"], 4)?,
            // 6.11 renamed nothing: `page_type` shares its place with `_mapcount`.
            mapcount: at(&["_mapcount", "page_type"], 4)?,
            mapping: at(&["mapping"], 8)?,
            private: at(&["private"], 8)?,
            // 7.1 (d50569612c29) renamed it, for it may hold a mask.
            compound: at(&["compound_head", "compound_info"], 8)?,
            lru,
            bits: FlagBits::new(kernel)?,
            types: PageTypes::new(kernel)?,
            hugetlb: HugetlbMark::new(kernel, stride)?,
            only_free: false,
        })
    }

    /// By what VMCOREINFO tells alone: enough for free, offline and broken pages. All other
    /// pages are [`PageClass::Unknown`].
    pub(crate) fn of_free_pages(kernel: &Kernel<'_>, stride: u64) -> Result<Self, VmiError> {
        let at = |names: &[&str], size: u64| place(kernel, stride, names, size);
        let lru = at(&["lru"], 16)?;
        Ok(Self {
            flags: at(&["flags"], 8)?,
            refcount: at(&["_refcount"], 4)?,
            mapcount: at(&["_mapcount", "page_type"], 4)?,
            mapping: at(&["mapping"], 8)?,
            private: at(&["private"], 8)?,
            // It has always shared the place of `lru.next`.
            compound: match kernel.first_member("page", &["compound_head", "compound_info"])? {
                Some(_) => at(&["compound_head", "compound_info"], 8)?,
                None => lru,
            },
            lru: u64::try_from(lru).unwrap_or(0),
            bits: FlagBits::of_free_pages(kernel)?,
            types: PageTypes::new(kernel)?,
            hugetlb: HugetlbMark::None,
            only_free: true,
        })
    }

    /// Of x86-64 (since 4.18), where nothing is told but by shape; `buddy` is the word that says
    /// the buddy's type.
    pub(crate) fn by_shape(buddy: u32) -> Self {
        /// Up to `swapbacked`, `unevictable` and `mlocked` in all versions.
        const FLAGS: u64 = 0x1f_ffff;
        /// To 6.9 the upper is `dirty`, since then the lower is `referenced`.
        const UPTODATE: u64 = 0xc;
        Self {
            flags: 0,
            refcount: 52,
            mapcount: 48,
            mapping: 24,
            private: 40,
            compound: 8,
            lru: 8,
            bits: FlagBits {
                all: FLAGS,
                lru: 0,
                dirty: 0,
                writeback: 0,
                uptodate: UPTODATE,
                locked: 1,
                private: 0,
                swapbacked: 0,
                reserved: 0,
                head: 0,
                slab: 0,
                private_2: 0,
                hwpoison: 0,
            },
            types: PageTypes {
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
            },
            hugetlb: HugetlbMark::None,
            only_free: true,
        }
    }

    fn flags(&self, page: &GuestBytes<'_>) -> Option<u64> {
        page.u64_at(self.flags)
    }

    /// Whether the page is in the buddy allocator by its own word, and of which order.
    ///
    /// `None` if `page` is shorter than a `struct page`.
    #[inline]
    pub(crate) fn free_mark(&self, page: &GuestBytes<'_>) -> Option<FreeMark> {
        let ty = page.u32_at(self.mapcount)?;
        if !self.types.is(ty, self.types.buddy) {
            return Some(FreeMark::None);
        }
        // On older kernels a slab page uses the same word for something else.
        if self.flags(page)? & self.bits.slab != 0 {
            return Some(FreeMark::None);
        }
        Some(FreeMark::Buddy {
            order: page.u64_at(self.private)?,
        })
    }

    /// Whether nothing in the `struct page` says that somebody uses the page: no reference, and
    /// no flag. (`PG_reported` is the bit of `PG_uptodate`; the head of a reported free block
    /// has it.)
    #[inline]
    pub(crate) fn is_unused(&self, page: &GuestBytes<'_>) -> bool {
        let Some((refcount, flags)) = page.u32_at(self.refcount).zip(self.flags(page)) else {
            return false;
        };
        refcount == 0 && flags & self.bits.all & !self.bits.uptodate == 0
    }

    /// Whether a page on a per-CPU free list looks as the kernel left it when it was freed: no
    /// reference, no flag, no type, nothing mapped.
    pub(crate) fn is_unused_and_untyped(&self, page: &GuestBytes<'_>) -> bool {
        self.is_unused(page)
            && page.u32_at(self.mapcount) == Some(u32::MAX)
            && page.u64_at(self.mapping) == Some(0)
    }

    /// Of a page that says that it is offline: the word `private` (a balloon's pages point to
    /// their driver there), if all else is as a driver leaves it: at most the one reference that
    /// the allocator gave, and no flag. (`PG_movable_ops`, since 6.17, is the bit of `PG_uptodate`.)
    pub(crate) fn left_by_driver(
        &self,
        mem_map: &MemMap<'_>,
        at: KernelVa,
    ) -> Result<Option<u64>, VmiError> {
        let mut copy = [0_u8; 256];
        let stride = usize::try_from(mem_map.stride).unwrap_or(usize::MAX);
        let Some(copy) = copy.get_mut(..stride) else {
            return Ok(None);
        };
        mem_map.copy_page(at, copy)?;
        let page = GuestBytes::from_slice(copy);
        let (Some(flags), Some(ty), Some(refcount)) = (
            self.flags(&page),
            page.u32_at(self.mapcount),
            page.u32_at(self.refcount),
        ) else {
            return Ok(None);
        };
        let offline = self.types.offline.is_some_and(|v| self.types.is(ty, v));
        let no_flag = flags & self.bits.all & !self.bits.uptodate == 0;
        let clean = offline && refcount <= 1 && no_flag;
        Ok(page.u64_at(self.private).filter(|_| clean))
    }

    /// Whether the page is on an LRU list.
    #[inline]
    pub(crate) fn is_on_lru(&self, page: &GuestBytes<'_>) -> bool {
        self.flags(page)
            .is_some_and(|flags| flags & self.bits.lru != 0)
    }

    /// If this is a tail page, where its head's `struct page` is; `at` is the page's own.
    pub(crate) fn head_of(&self, page: &GuestBytes<'_>, at: KernelVa) -> Option<KernelVa> {
        let info = page.u64_at(self.compound)?;
        if info & 1 == 0 {
            return None;
        }
        // 7.1 stores a mask where struct page is a power of two. No struct page lies in the top
        // 1 GiB of the address space, and no mask is for a folio whose struct pages take more.
        if info >= 0xffff_ffff_c000_0000 {
            return Some(KernelVa::new(at.raw() & info & !1));
        }
        Some(KernelVa::new(info & !1))
    }

    /// Whether the page carries `PG_head`.
    pub(crate) fn is_head(&self, page: &GuestBytes<'_>) -> bool {
        self.flags(page)
            .is_some_and(|flags| flags & self.bits.head != 0)
    }

    /// Whether the frame itself (not its folio) is poisoned.
    #[inline]
    pub(crate) fn is_hwpoison(&self, page: &GuestBytes<'_>) -> bool {
        self.flags(page)
            .is_some_and(|flags| flags & self.bits.hwpoison != 0)
    }

    /// What a page that is not free is used for. `page` is the head of its folio, and
    /// `read` reads a word at an offset from it (of the struct pages that follow).
    pub(crate) fn class(
        &self,
        page: &GuestBytes<'_>,
        read: &dyn Fn(u64) -> Option<u64>,
    ) -> PageClass {
        self.class_of(page, read).unwrap_or(PageClass::Unknown)
    }

    fn class_of(
        &self,
        page: &GuestBytes<'_>,
        read: &dyn Fn(u64) -> Option<u64>,
    ) -> Option<PageClass> {
        let flags = self.flags(page)?;
        let ty = page.u32_at(self.mapcount)?;
        let refcount = page.u32_at(self.refcount)?;
        let has = |mask: u64| flags & mask != 0;
        let is = |value: Option<u32>| value.is_some_and(|value| self.types.is(ty, value));

        if (has(self.bits.slab) || is(self.types.slab)) && !self.only_free {
            return Some(PageClass::Slab);
        }
        if is(self.types.offline) {
            return Some(PageClass::Offline);
        }
        if is(self.types.unaccepted) {
            return Some(PageClass::Unaccepted);
        }
        if self.only_free {
            return Some(PageClass::Unknown);
        }
        if is(self.types.table) {
            return Some(PageClass::PageTable);
        }
        if has(self.bits.reserved) {
            return Some(PageClass::Reserved);
        }
        if self.is_hugetlb(flags, ty, read) {
            return Some(if refcount == 0 {
                PageClass::HugetlbFree
            } else {
                PageClass::Hugetlb
            });
        }
        if refcount == 0 {
            // Being freed or being allocated, or frozen by an owner that we do not know.
            return Some(PageClass::Unknown);
        }
        let mapping = page.u64_at(self.mapping)?;
        Some(match mapping & 3 {
            // PAGE_MAPPING_ANON, also with the bit that makes it KSM.
            1 | 3 => PageClass::Anonymous,
            // A pointer to `struct address_space`: in the kernel half, aligned.
            0 if mapping >> 63 == 1 => {
                if has(self.bits.swapbacked) {
                    PageClass::Shmem
                } else if has(self.bits.lru)
                    && has(self.bits.uptodate)
                    && !has(self.bits.dirty
                        | self.bits.writeback
                        | self.bits.locked
                        | self.bits.private
                        | self.bits.private_2)
                {
                    PageClass::PageCacheClean
                } else {
                    PageClass::PageCacheDirty
                }
            }
            _ => PageClass::Kernel,
        })
    }

    fn is_hugetlb(&self, flags: u64, ty: u32, read: &dyn Fn(u64) -> Option<u64>) -> bool {
        let is_head = flags & self.bits.head != 0;
        match self.hugetlb {
            HugetlbMark::Type => self
                .types
                .hugetlb
                .is_some_and(|value| self.types.is(ty, value)),
            HugetlbMark::Destructor {
                offset,
                size,
                value,
            } => {
                let aligned = offset & !7;
                let shift = u32::try_from(offset.saturating_sub(aligned).saturating_mul(8));
                let mask = if size >= 8 {
                    u64::MAX
                } else {
                    (1_u64 << ((size & 7) << 3)).wrapping_sub(1)
                };
                is_head
                    && read(aligned).zip(shift.ok()).is_some_and(|(word, shift)| {
                        word.checked_shr(shift).unwrap_or(0) & mask == value
                    })
            }
            HugetlbMark::FolioFlag { offset, mask } => {
                is_head && read(offset).is_some_and(|word| word & mask != 0)
            }
            HugetlbMark::None => false,
        }
    }
}

/// Where the member of `struct page` is that goes by one of `names`, of so many bytes.
fn place(kernel: &Kernel<'_>, stride: u64, names: &[&str], size: u64) -> Result<usize, VmiError> {
    let Some(member) = kernel.first_member("page", names)? else {
        return kernel
            .need_member("page", names.first().unwrap_or(&""))
            .map(|_| 0);
    };
    member
        .offset
        .checked_add(size)
        .filter(|end| *end <= stride)
        .and_then(|_| usize::try_from(member.offset).ok())
        .ok_or_else(|| VmiError::Unsupported {
            what: format!("page.{names:?} at {:#x} of {stride:#x}", member.offset),
        })
}

impl FlagBits {
    /// The flags that decide about free pages, by the few that VMCOREINFO tells.
    ///
    /// `enum pageflags` (`include/linux/page-flags.h`) has `uptodate`, `dirty`, `lru` in this
    /// order since 4.18, and behind `swapbacked` at least `unevictable` and, with an MMU,
    /// `mlocked`: all bits up to there are flags. The ones behind (hwpoison is told, if it is
    /// there) are never alone on a page in use.
    fn of_free_pages(kernel: &Kernel<'_>) -> Result<Self, VmiError> {
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
        let hwpoison = told("PG_hwpoison")?.unwrap_or(0);
        let up_to_mlocked = (swapbacked << 3).wrapping_sub(1);
        Ok(Self {
            all: up_to_mlocked | hwpoison,
            lru,
            dirty: lru >> 1,
            writeback: 0,
            uptodate: lru >> 2,
            locked: 1,
            private: need("PG_private")?,
            swapbacked,
            reserved: 0,
            head: told_mask(kernel)?,
            slab: told("PG_slab")?.unwrap_or(0),
            private_2: 0,
            hwpoison,
        })
    }

    fn new(kernel: &Kernel<'_>) -> Result<Self, VmiError> {
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

impl PageTypes {
    fn has_slab_type(kernel: &Kernel<'_>) -> Result<bool, VmiError> {
        Ok(kernel.constant("PGTY_slab")?.is_some()
            || kernel.constant("PAGE_SLAB_MAPCOUNT_VALUE")?.is_some())
    }

    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "VMCOREINFO prints the 32-bit word as a signed number: the low 32 bits are meant"
    )]
    fn new(kernel: &Kernel<'_>) -> Result<Self, VmiError> {
        let from_info = |name: &str| -> Result<Option<u32>, VmiError> {
            let name = format!("PAGE_{name}_MAPCOUNT_VALUE");
            Ok(kernel.constant(&name)?.map(|value| value as u32))
        };
        // Since 6.12 `enum pagetype` holds the top byte: 0xf0 and up, and 0xff is a page without a
        // type. VMCOREINFO tells the whole word of some; before, there are macros only, and in
        // 6.11 an enumerator `PG_buddy` of 0x40000000.
        let top_byte = |own: &str, info: &str| -> Result<Option<u32>, VmiError> {
            let enumerator = format!("PGTY_{own}");
            let word = match kernel.constant(&enumerator)? {
                Some(byte) if (0xf0..0xff).contains(&byte) => Some((byte as u32) << 24),
                Some(byte) => {
                    return Err(VmiError::Unsupported {
                        what: format!("{enumerator} of {byte:#x}"),
                    });
                }
                None => None,
            };
            match (word, from_info(info)?) {
                (Some(own), Some(told)) if own != told => Err(VmiError::Disagree {
                    what: format!("the type of {own} pages", own = info.to_lowercase()),
                    first: enumerator,
                    first_value: u64::from(own),
                    second: format!("PAGE_{info}_MAPCOUNT_VALUE"),
                    second_value: u64::from(told),
                }),
                (word, told) => Ok(word.or(told)),
            }
        };
        let by_enum = kernel.constant("PGTY_buddy")?.is_some();
        if by_enum || from_info("BUDDY")?.is_some_and(|word| word >> 24 == 0xf0) {
            let need_buddy = || kernel.need_constant("PAGE_BUDDY_MAPCOUNT_VALUE").map(|_| 0);
            let types = Self {
                encoding: Encoding::TopByte,
                buddy: top_byte("buddy", "BUDDY")?.map_or_else(need_buddy, Ok)?,
                offline: top_byte("offline", "OFFLINE")?,
                table: if by_enum {
                    top_byte("table", "TABLE")?
                } else {
                    Some(0xf200_0000)
                },
                slab: top_byte("slab", "SLAB")?,
                hugetlb: top_byte("hugetlb", "HUGETLB")?,
                unaccepted: top_byte("unaccepted", "UNACCEPTED")?,
            };
            return types.distinct();
        }
        let buddy = from_info("BUDDY")?.map_or_else(
            || kernel.need_constant("PAGE_BUDDY_MAPCOUNT_VALUE").map(|_| 0),
            Ok,
        )?;
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
            match from_info(name)? {
                Some(word) if !(!word).is_power_of_two() => Err(VmiError::Unsupported {
                    what: format!("PAGE_{name}_MAPCOUNT_VALUE of {word:#x}"),
                }),
                word => Ok(word),
            }
        };
        let types = Self {
            encoding: Encoding::ClearedBits,
            buddy,
            offline: one_bit("OFFLINE")?,
            table,
            slab: one_bit("SLAB")?,
            hugetlb: one_bit("HUGETLB")?,
            unaccepted: one_bit("UNACCEPTED")?,
        };
        types.distinct()
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
    fn is(&self, ty: u32, value: u32) -> bool {
        match self.encoding {
            Encoding::TopByte => ty >> 24 == value >> 24,
            // A small negative number is a mapcount that underflowed; the type's bit must be
            // the only one that is clear among the type bits, the top bits are set.
            Encoding::ClearedBits => ty == value,
        }
    }
}

impl HugetlbMark {
    fn new(kernel: &Kernel<'_>, stride: u64) -> Result<Self, VmiError> {
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
                .unwrap_or(0);
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
}

#[cfg(test)]
mod tests {
    use super::{FreeMark, PageLayout};
    use crate::KernelVa;
    use crate::kernel::testing::{Facts, Ram, kernel, page_facts as facts};
    use sonicshot::{GuestBytes, PageClass};

    fn layout(facts: Facts) -> PageLayout {
        let ram = Ram::new(1 << 20);
        let memory = ram.memory();
        PageLayout::new(&kernel(&memory, facts), 64).unwrap()
    }

    /// The buddy's word, what a kernel calls it, and words that are not the buddy's.
    #[test]
    fn every_encoding_of_page_types_is_read() {
        type Case<'a> = (&'a [(&'static str, i64)], u32, &'a [u32]);
        let cases: [Case<'_>; 4] = [
            // 4.18 to 6.10: a cleared bit, printed as a signed number.
            (
                &[("PAGE_BUDDY_MAPCOUNT_VALUE", -129)],
                0xffff_ff7f,
                &[0xffff_ffff, 0, 0xffff_feff, 0xffff_fe7f],
            ),
            // 6.11
            (
                &[("PAGE_BUDDY_MAPCOUNT_VALUE", -0x4000_0001)],
                0xbfff_ffff,
                &[0xffff_ffff, 0xdfff_ffff],
            ),
            // 6.12 and later, by VMCOREINFO and by the kernel's own enum: the low bits are the owner's.
            (
                &[("PAGE_BUDDY_MAPCOUNT_VALUE", -0x1000_0000)],
                0xf000_0000,
                &[0xffff_ffff, 0xf100_0000, 0],
            ),
            (
                &[("PGTY_buddy", 0xf0), ("PGTY_slab", 0xf5)],
                0xf012_3456,
                &[0xffff_ffff, 0xf512_3456],
            ),
        ];
        for (constants, buddy, others) in cases {
            let mut facts = facts();
            facts.member("page", "compound_head", 8);
            facts.constants.extend(constants.iter().copied());
            let layout = layout(facts);
            let mut page = [0_u8; 64];
            page[40] = 3;
            for (word, is_buddy) in [(buddy, true)]
                .into_iter()
                .chain(others.iter().map(|w| (*w, false)))
            {
                page[48..52].copy_from_slice(&word.to_le_bytes());
                let mark = layout.free_mark(&GuestBytes::from_slice(&page));
                let want = if is_buddy {
                    FreeMark::Buddy { order: 3 }
                } else {
                    FreeMark::None
                };
                assert_eq!(mark, Some(want), "{word:#x}");
            }
        }
    }

    #[test]
    fn a_slab_that_looks_like_a_free_block_is_none() {
        let mut facts = facts();
        facts.member("page", "compound_head", 8);
        facts.constants.insert("PAGE_BUDDY_MAPCOUNT_VALUE", -129);
        let layout = layout(facts);
        let mut page = [0_u8; 64];
        page[48..52].copy_from_slice(&0xffff_ff7f_u32.to_le_bytes());
        page[1] = 0x80; // PG_slab, bit 15
        let page = GuestBytes::from_slice(&page);
        assert_eq!(layout.free_mark(&page), Some(FreeMark::None));
        assert_eq!(layout.class(&page, &|_| None), PageClass::Slab);
    }

    #[test]
    fn tails_point_to_their_head_or_mask_themselves() {
        for (name, info, at, head) in [
            (
                "compound_head",
                0xffff_ea00_0000_1001_u64,
                0xffff_ea00_0000_1040,
                0xffff_ea00_0000_1000,
            ),
            // 7.1: the mask of a folio of 512 pages of 64 bytes each.
            (
                "compound_info",
                0xffff_ffff_ffff_8001,
                0xffff_ea00_0012_34c0,
                0xffff_ea00_0012_0000,
            ),
        ] {
            let mut facts = facts();
            facts.member("page", name, 8);
            facts.constants.insert("PAGE_BUDDY_MAPCOUNT_VALUE", -129);
            let layout = layout(facts);
            let mut page = [0_u8; 64];
            assert_eq!(
                layout.head_of(&GuestBytes::from_slice(&page), KernelVa::new(at)),
                None
            );
            page[8..16].copy_from_slice(&u64::to_le_bytes(info));
            let found = layout.head_of(&GuestBytes::from_slice(&page), KernelVa::new(at));
            assert_eq!(found, Some(KernelVa::new(head)));
        }
    }

    #[test]
    fn a_kernel_without_a_flag_that_decides_is_refused() {
        for missing in ["PG_dirty", "PG_lru", "__NR_PAGEFLAGS", "PG_slab"] {
            let mut facts = facts();
            facts.member("page", "compound_head", 8);
            facts.constants.insert("PAGE_BUDDY_MAPCOUNT_VALUE", -129);
            facts.constants.remove(missing);
            let ram = Ram::new(1 << 20);
            let memory = ram.memory();
            let error = PageLayout::new(&kernel(&memory, facts), 64).unwrap_err();
            assert!(error.to_string().contains(missing), "{error}");
        }
    }
}
