//! The questions to an architecture.

use super::processor::{ForeignProcessor, Landmark, Told};
use super::trace::{Owner, Test};
use crate::KernelVa;
use crate::error::VmiError;
use crate::kernel::Kernel;
use crate::paging::Paging;
use crate::symbols::VmcoreinfoLines;
use core::fmt;
use sonicshot::{Architecture, Gpa, GpaRange, GuestBytes, GuestMemory, PageSize, PfnRange};

/// The smallest page of any architecture: what is searched page by page is searched in steps of
/// this, and what begins a page begins one of these.
pub(crate) const MIN_PAGE: usize = 4096;
/// The bits of an address inside such a page.
pub(crate) const MIN_PAGE_MASK: u64 = 0xfff;

/// The page tables that a kernel names as its own: what tells one kernel from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Tables {
    /// The architecture of the page tables.
    pub architecture: Architecture,
    /// `swapper_pg_dir`.
    pub page_table: KernelVa,
    /// The guest-physical address of that.
    pub root: Gpa,
    /// The number of levels.
    pub levels: u32,
}

/// The range in which a kernel's image may lie, and how far it may reach.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ImageShape {
    /// Its start is a multiple of this.
    pub align: u64,
    /// The most bytes that it takes.
    pub max_len: u64,
}

/// The sizes of sections of memory (`SPARSEMEM`), as powers of two.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SectionSize {
    /// `SECTION_SIZE_BITS`.
    pub section_bits: u32,
    /// `MAX_PHYSMEM_BITS`.
    pub memory_bits: u32,
}

/// The shape that every kernel of an architecture has, whatever its config and version: it finds a
/// kernel that tells nothing of itself.
#[derive(Debug)]
pub(crate) struct KernelShape {
    pub architecture: Architecture,
    /// The only size of pages that such a kernel has.
    pub page_size: PageSize,
    /// The lowest address at which the kernel's image begins.
    pub image: KernelVa,
    /// The highest address at which it ends.
    pub image_end: KernelVa,
    /// The numbers of levels that page tables may have.
    pub levels: &'static [u32],
    /// `NR_PAGE_ORDERS`.
    pub orders: u64,
}

/// An architecture, as far as the reading of a kernel's records depends on it.
pub(crate) trait Arch: Sync + fmt::Debug {
    /// Whether a kernel may have pages of this size.
    fn has_page_size(&self, size: PageSize) -> bool;

    /// Whether `value` may be an address of the kernel's half of the address space.
    fn is_pointer(&self, value: u64) -> bool;

    /// Whether `value` may be the address of a page that the kernel has allocated: one that is not
    /// in its image.
    fn may_point_to_page(&self, value: u64) -> bool;

    /// The range in which the kernel's image may lie.
    fn image(&self) -> ImageShape;

    /// The sizes of sections of memory in a kernel whose sources do not tell.
    fn section_size(&self, page_size: PageSize) -> SectionSize;

    /// The page tables that a VMCOREINFO names, if they are in memory. They need not be whole.
    ///
    /// # Errors
    /// [`VmiError`] with what the text lacks, or what makes the guest one that cannot be read.
    fn tables(
        &self,
        memory: &dyn GuestMemory,
        text: VmcoreinfoLines<'_>,
    ) -> Result<Tables, VmiError>;

    /// The walker of `tables`.
    fn paging(&self, tables: &Tables) -> Box<dyn Paging> {
        self.walk(tables.root, tables.levels)
    }

    /// The walker of page tables whose top-level one is at `root`.
    fn walk(&self, root: Gpa, levels: u32) -> Box<dyn Paging>;

    /// The shape of a kernel that tells nothing of itself, if all look alike.
    fn shape(&self) -> Option<&'static KernelShape>;

    /// Whether `page` may be a kernel's top-level page table.
    fn may_be_top_table(&self, page: &GuestBytes<'_>, memory: &dyn GuestMemory) -> bool;

    /// The frames that an entry of a page table maps for a process, if it maps any. Of an entry
    /// that leads to another table it may be that table's frame.
    fn user_mapping(&self, entry: u64, page_size: PageSize) -> Option<PfnRange>;

    /// Usable RAM by the map that firmware or VMM gave to the guest, if the symbols tell where it
    /// is; options of the kernel do not change it.
    fn boot_ram(&self, kernel: &Kernel<'_>) -> Result<Option<Vec<GpaRange>>, VmiError>;

    /// The RAM of the boot that the kernel counts as present (`present_pages`).
    fn counted_ram(&self, kernel: &Kernel<'_>) -> Result<Option<Vec<GpaRange>>, VmiError>;

    /// The address at which the kernel maps all of memory, from guest-physical 0 on, if its symbols tell.
    fn direct_map(&self, kernel: &Kernel<'_>) -> Result<Option<KernelVa>, VmiError>;

    /// The address at which a kernel maps all of memory if it does not choose one at random; `ranges`
    /// is the memory that exists.
    fn fixed_direct_map(&self, kernel: &Kernel<'_>, ranges: &[GpaRange]) -> Option<KernelVa>;

    /// The top-level tables that a processor may have the kernel's from, likeliest first, and how
    /// many levels each may have; none if its registers are another architecture's.
    fn roots(&self, memory: &dyn GuestMemory, told: &Told) -> Vec<(Gpa, u32)>;

    /// Whether a processor's page tables have `tables` at their place: reason enough to try this
    /// kernel first.
    fn may_run_on(&self, memory: &dyn GuestMemory, told: &Told, tables: &Tables) -> bool;

    /// The first processor that runs on tables which do not lead where the kernel's own do.
    ///
    /// # Errors
    /// [`VmiError`] if the kernel's own tables cannot be read.
    fn first_foreign(
        &self,
        kernel: &Kernel<'_>,
        landmarks: &[Landmark],
        told: &[(usize, Told)],
    ) -> Result<Option<ForeignProcessor>, VmiError>;

    /// Tests for traces that a later owner leaves on such a machine, beside those in the kernel's
    /// own records.
    fn traces(&self) -> &'static [(&'static str, Test)];

    /// The same, where no types tell of the kernel's records: tests that take its log for them.
    fn traces_by_log(&self) -> &'static [(&'static str, Test)];

    /// Whether no other kernel need be looked for: there is no trace, and of a reset one of the
    /// tests that were made would tell.
    fn is_settled(&self, owner: &Owner) -> bool;
}

/// `SYMBOL(name)` of a VMCOREINFO.
///
/// # Errors
/// [`VmiError::Missing`] if it has none.
pub(crate) fn need_address(text: VmcoreinfoLines<'_>, name: &str) -> Result<KernelVa, VmiError> {
    text.address(name).ok_or_else(|| VmiError::Missing {
        what: format!("symbol {name}"),
        sources: "VMCOREINFO".into(),
    })
}
