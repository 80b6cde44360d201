//! The facts of one `struct page` (`include/linux/mm_types.h`, `include/linux/page-flags.h`).

pub(crate) mod file;
mod flags;
mod hugetlb;
mod types;

use super::mem_map::MemMap;
use crate::arch::{self, Arch};
use crate::error::VmiError;
use crate::kernel::Kernel;
use crate::{AddressSpace, KernelVa};
use file::{FileLayout, Files, InFile};
use flags::FlagBits;
use hugetlb::HugetlbMark;
use sonicshot::{GuestBytes, PageClass, to_u64};
use types::PageTypes;

/// The offsets of the members of `struct page`, and the encoding of their values in this kernel.
#[derive(Debug, Clone)]
pub(crate) struct PageLayout {
    flags: usize,
    refcount: usize,
    mapcount: usize,
    mapping: usize,
    private: usize,
    compound: usize,
    /// The offset of the list node of a free page.
    pub(crate) lru: u64,
    bits: FlagBits,
    types: PageTypes,
    hugetlb: HugetlbMark,
    /// Whether only free pages, offline ones and broken ones can be told: all others are unknown.
    only_free: bool,
    /// The members that tell a page's file; `None` if nothing tells.
    files: Option<FileLayout>,
    arch: &'static dyn Arch,
}

/// The mark in a free page's `struct page`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FreeMark {
    /// The head of a block in the buddy allocator, of this order.
    Buddy { order: u64 },
    /// Not in the buddy allocator.
    None,
}

/// The words of a `struct page`, as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PageWords {
    pub flags: u64,
    /// The bits of the flags word that are flags.
    pub mask: u64,
    pub refcount: u32,
    /// `_mapcount`, or the type.
    pub mapcount: u32,
    pub mapping: u64,
    pub private: u64,
}

impl PageLayout {
    /// The words of a `struct page`; `None` if it is too short.
    pub(crate) fn words(&self, page: &GuestBytes<'_>) -> Option<PageWords> {
        Some(PageWords {
            flags: self.flags(page)?,
            mask: self.bits.all,
            refcount: page.u32_at(self.refcount)?,
            mapcount: page.u32_at(self.mapcount)?,
            mapping: page.u64_at(self.mapping)?,
            private: page.u64_at(self.private)?,
        })
    }

    /// The type that a page has in the word of its mappings, if it has one that is known.
    pub(crate) fn type_name(&self, mapcount: u32) -> Option<&'static str> {
        let types = [
            (Some(self.types.buddy), "buddy"),
            (self.types.offline, "offline"),
            (self.types.table, "table"),
            (self.types.slab, "slab"),
            (self.types.hugetlb, "hugetlb"),
            (self.types.unaccepted, "unaccepted"),
        ];
        let has = |value: &Option<u32>| value.is_some_and(|value| self.types.is(mapcount, value));
        types
            .iter()
            .find(|(value, _)| has(value))
            .map(|(_, name)| *name)
    }

    /// Whether only free, offline and broken pages are told.
    pub(crate) fn tells_only_free(&self) -> bool {
        self.only_free
    }

    pub(crate) fn new(kernel: &Kernel<'_>, stride: u64) -> Result<Self, VmiError> {
        let at = |names: &[&str], size: u64| place(kernel, stride, names, size);
        let lru = to_u64(at(&["lru"], 16)?);
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
            files: FileLayout::new(kernel, stride)?,
            // 7.1 (d50569612c29) renamed it, for it may hold a mask.
            compound: at(&["compound_head", "compound_info"], 8)?,
            lru,
            bits: FlagBits::new(kernel)?,
            types: PageTypes::new(kernel)?,
            hugetlb: HugetlbMark::new(kernel, stride)?,
            only_free: false,
            arch: arch::of(kernel)?,
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
            files: None,
            // It has always shared the place of `lru.next`.
            compound: match kernel.first_member("page", &["compound_head", "compound_info"])? {
                Some(_) => at(&["compound_head", "compound_info"], 8)?,
                None => lru,
            },
            lru: to_u64(lru),
            bits: FlagBits::of_free_pages(kernel)?,
            types: PageTypes::new(kernel)?,
            hugetlb: HugetlbMark::None,
            only_free: true,
            arch: arch::of(kernel)?,
        })
    }

    /// Of x86-64 (since 4.18), where nothing is told but by shape; `buddy` is the word that says
    /// the buddy's type.
    pub(crate) fn by_shape(kernel: &Kernel<'_>, buddy: u32) -> Result<Self, VmiError> {
        Ok(Self {
            flags: 0,
            refcount: 52,
            mapcount: 48,
            mapping: 24,
            private: 40,
            files: None,
            compound: 8,
            lru: 8,
            bits: FlagBits::by_shape(),
            types: PageTypes::by_shape(buddy),
            hugetlb: HugetlbMark::None,
            only_free: true,
            arch: arch::of(kernel)?,
        })
    }

    /// The offset of the flags.
    pub(crate) fn flags_at(&self) -> u64 {
        to_u64(self.flags)
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

    /// Whether the page is as one is that a free block has behind its first.
    #[inline]
    pub(crate) fn is_free_tail(&self, page: &GuestBytes<'_>) -> bool {
        self.is_unused(page) && self.free_mark(page) == Some(FreeMark::None)
    }

    /// Whether the kernel has kept the page for itself since its start, as it has its image: what it
    /// gave back is not so any more, whoever has it. Where memory can be removed, those that hold a
    /// node or sections are counted and marked (`get_page_bootmem`, `mm/bootmem_info.c`).
    pub(crate) fn is_kept_since_boot(&self, page: &GuestBytes<'_>) -> bool {
        let Some((refcount, flags)) = page.u32_at(self.refcount).zip(self.flags(page)) else {
            return false;
        };
        let flags = flags & self.bits.all;
        let lowest = 1_u64.checked_shl(flags.trailing_zeros());
        // `private` is the bit above `reserved`.
        let is_marked = lowest.is_some_and(|lowest| {
            flags == lowest | lowest << 1 && lowest & self.bits.reserved != 0
        });
        refcount == 1 && flags != 0 && flags & !self.bits.reserved == 0 || refcount > 1 && is_marked
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
        let Some(copy) = copy.get_mut(..mem_map.stride_len()?) else {
            return Ok(None);
        };
        mem_map.copy_pages(at, copy)?;
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

    /// The next and the previous node of the page's list.
    pub(crate) fn lru_nodes(&self, page: &GuestBytes<'_>) -> Option<[KernelVa; 2]> {
        let next = usize::try_from(self.lru).ok()?;
        let previous = next.checked_add(8)?;
        Some([page.u64_at(next)?, page.u64_at(previous)?].map(KernelVa::new))
    }

    /// Whether the page is on an LRU list.
    #[inline]
    pub(crate) fn is_on_lru(&self, page: &GuestBytes<'_>) -> bool {
        self.flags(page)
            .is_some_and(|flags| flags & self.bits.lru != 0)
    }

    /// If this is a tail page, where its head's `struct page` is; `at` is the page's own.
    pub(crate) fn head_of(&self, page: &GuestBytes<'_>, at: KernelVa) -> Option<KernelVa> {
        /// The top 1 GiB of the address space.
        const NO_STRUCT_PAGE: u64 = 0xffff_ffff_c000_0000;
        let info = page.u64_at(self.compound)?;
        if info & 1 == 0 {
            return None;
        }
        // 7.1 stores a mask where struct page is a power of two. No struct page lies in the top
        // 1 GiB of the address space, and no mask is for a folio whose struct pages take more.
        if info >= NO_STRUCT_PAGE {
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

    /// The use of a page that is not free. `page` is the head of its folio, and `read` reads a word
    /// at an offset from it (of the struct pages that follow).
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
            0 if self.arch.is_pointer(mapping) => {
                if has(self.bits.swapbacked) {
                    PageClass::Shmem
                } else if self.is_as_written(flags) && !has(self.bits.private) {
                    PageClass::PageCacheClean
                } else {
                    PageClass::PageCacheDirty
                }
            }
            _ => PageClass::Kernel,
        })
    }

    /// The class of a page of a file, `page` the head of its folio, by what is known of the file;
    /// `class` is what it has by itself.
    pub(crate) fn class_in_file(
        &self,
        page: &GuestBytes<'_>,
        class: PageClass,
        space: &AddressSpace<'_>,
        files: &mut Files,
    ) -> PageClass {
        let is_settled = class == PageClass::PageCacheClean
            || class == PageClass::PageCacheDirty
                && self
                    .flags(page)
                    .is_some_and(|flags| self.is_as_written(flags));
        let Some(layout) = self.files.as_ref().filter(|_| is_settled) else {
            return class;
        };
        let in_file = self.in_file(page);
        match in_file.is_some_and(|page| layout.is_clean(space, files, page)) {
            true => PageClass::PageCacheClean,
            false => PageClass::PageCacheDirty,
        }
    }

    /// The place in a file that the page, the head of its folio, tells of itself; `None` if nothing
    /// tells where that stands, or it is of no file.
    pub(crate) fn in_file(&self, page: &GuestBytes<'_>) -> Option<InFile> {
        let layout = self.files.as_ref()?;
        let mapping = page.u64_at(self.mapping)?;
        let is_private = self.flags(page)? & self.bits.private != 0;
        let private = page.u64_at(self.private)?;
        Some(InFile {
            mapping: KernelVa::new(mapping),
            index: page.u64_at(layout.index)?,
            private: is_private.then_some(KernelVa::new(private)),
        })
    }

    /// Whether this is a page of its own of anonymous memory, at page `index` of its process, that is
    /// mapped once and that nobody else holds.
    pub(crate) fn is_sole_anonymous(&self, page: &GuestBytes<'_>, index: u64) -> bool {
        /// `PAGE_MAPPING_ANON`, without the bit that makes it KSM.
        const ANON: u64 = 1;
        let found = (|| {
            let layout = self.files.as_ref()?;
            Some((
                self.flags(page)?,
                page.u64_at(self.mapping)?,
                page.u64_at(layout.index)?,
                page.u32_at(self.mapcount)?,
                page.u32_at(self.refcount)?,
            ))
        })();
        let Some((flags, mapping, at, mapcount, refcount)) = found else {
            return false;
        };
        let (bits, has) = (&self.bits, |mask: u64| flags & mask != 0);
        mapping & 3 == ANON
            && self.arch.is_pointer(mapping)
            && at == index
            // One less than there are mappings.
            && (mapcount, refcount) == (0, 1)
            && has(bits.swapbacked)
            && has(bits.uptodate)
            && !has(bits.locked | bits.writeback | bits.head | bits.hwpoison | bits.reserved)
            && !has(bits.private | bits.private_2 | bits.slab)
    }

    /// Whether a page of a file is as its file system left it, but for what `PG_private` stands for.
    fn is_as_written(&self, flags: u64) -> bool {
        let has = |mask: u64| flags & mask != 0;
        let bits = &self.bits;
        has(bits.lru)
            && has(bits.uptodate)
            && !has(bits.dirty | bits.writeback | bits.locked | bits.private_2)
    }

    fn is_hugetlb(&self, flags: u64, ty: u32, read: &dyn Fn(u64) -> Option<u64>) -> bool {
        match self.hugetlb {
            HugetlbMark::Type => self
                .types
                .hugetlb
                .is_some_and(|value| self.types.is(ty, value)),
            mark => flags & self.bits.head != 0 && mark.is_set(read),
        }
    }
}

/// The offset of the member of `struct page` that goes by one of `names`, of so many bytes.
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
