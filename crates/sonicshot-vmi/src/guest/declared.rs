//! Memory that an application can do without, such as its cache: an embedder declares ranges of a
//! process, and the pages that are there alone read as zero after a restore.
//!
//! Two records must agree of each page: the process's own page tables, which map it where it was
//! declared, and its `struct page`, which says that it is anonymous memory (no KSM), of one page, at
//! this place (`index`), mapped once, and that nobody else holds a reference: no child of a fork, no
//! swap cache, no pin. All others are kept: such as are swapped out, huge, shared, or of a file.

use crate::arch;
use crate::error::VmiError;
use crate::kernel::{Kernel, element};
use crate::mm::mem_map::MemMap;
use crate::mm::page::PageLayout;
use crate::{AddressSpace, KernelVa};
use core::ops::Range;
use sonicshot::{GuestBytes, PageClass, PageMap, Pfn, PfnRange, Tally};

/// Of pages that are declared, so many for each frame of RAM are looked for.
const PAGES_A_FRAME: u64 = 8;

/// Pages of a process that it can do without, for [`Analysis::give_up`](crate::Analysis::give_up).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GivenUp {
    /// Sorted, apart.
    frames: Vec<PfnRange>,
    kept: KeptPages,
}

/// Declared pages that are kept, by why.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct KeptPages {
    /// Nothing is there, or it is swapped out: there is nothing to drop.
    pub not_there: u64,
    /// Parts of huge pages.
    pub huge: u64,
    /// Of a file, in use by somebody else too, or somewhere else than their `struct page` says.
    pub other: u64,
}

impl GivenUp {
    /// The frames.
    #[must_use]
    pub fn frames(&self) -> &[PfnRange] {
        &self.frames
    }

    /// The number of pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        PfnRange::total_of(&self.frames)
    }

    /// The pages that were declared, and are kept.
    #[must_use]
    pub const fn kept(&self) -> KeptPages {
        self.kept
    }
}

/// Looks for the pages of `ranges` of the process whose `struct mm_struct` is at `process`.
pub(crate) fn give_up(
    kernel: &Kernel<'_>,
    map: &MemMap<'_>,
    layout: &PageLayout,
    pages: &PageMap,
    process: KernelVa,
    ranges: &[Range<u64>],
) -> Result<GivenUp, VmiError> {
    let pgd = kernel.any_member("mm_struct", "pgd")?;
    let pgd = pgd.ok_or_else(|| kernel.missing("member mm_struct.pgd".into()))?;
    let pgd = element("mm_struct.pgd", process, 0, 0, pgd.offset)?;
    let root = kernel.read_ptr("mm_struct.pgd", pgd)?;
    let root = kernel
        .space
        .translate(root)
        .map_err(VmiError::read("mm_struct.pgd"))?;
    let walk = arch::of(kernel)?.walk(root.at, kernel.space.levels());
    let space = AddressSpace::new(kernel.space.memory(), walk);
    let _tables = space.remember_tables();
    let shift = pages.page_size().shift();
    let mut looked = Looked {
        space: &space,
        map,
        layout,
        pages,
        found: Vec::new(),
        kept: KeptPages::default(),
    };
    let most = Tally::new(pages.total()).times(PAGES_A_FRAME).get();
    let mut left = most;
    for range in ranges {
        // Whole pages alone.
        let first = range.start.div_ceil(1 << shift);
        let end = range.end >> shift;
        let Some(count) = end.checked_sub(first) else {
            continue;
        };
        left = left.checked_sub(count).ok_or(VmiError::TooMany {
            what: "pages that are declared",
            found: count,
            most,
        })?;
        for number in first..end {
            looked.look_at(number, shift)?;
        }
    }
    let (mut found, kept) = (looked.found, looked.kept);
    found.sort_unstable();
    found.dedup();
    let mut frames = Vec::new();
    for one in found
        .into_iter()
        .filter_map(|pfn| PfnRange::with_len(pfn, 1))
    {
        one.append_to(&mut frames);
    }
    Ok(GivenUp { frames, kept })
}

/// Counts a page for the report.
fn one_more(count: &mut u64) {
    *count = Tally::new(*count).and(1).get();
}

struct Looked<'a, 'm> {
    space: &'a AddressSpace<'m>,
    map: &'a MemMap<'m>,
    layout: &'a PageLayout,
    pages: &'a PageMap,
    found: Vec<Pfn>,
    kept: KeptPages,
}

impl Looked<'_, '_> {
    /// Looks at the page `number` of the process's memory.
    fn look_at(&mut self, number: u64, shift: u32) -> Result<(), VmiError> {
        let at = number.checked_shl(shift).map(KernelVa::new);
        // The other half is the kernel's.
        let at = at.filter(|at| !self.space.is_pointer(at.raw()));
        let there = at.and_then(|at| self.space.translate(at).ok());
        let Some(there) = there else {
            one_more(&mut self.kept.not_there);
            return Ok(());
        };
        let page_size = self.pages.page_size();
        if there.len > page_size.bytes() {
            one_more(&mut self.kept.huge);
            return Ok(());
        }
        let frame = there.at.pfn(page_size);
        if self.pages.class(frame) == Some(PageClass::Anonymous) && self.is_alone(frame, number)? {
            self.found.push(frame);
        } else {
            one_more(&mut self.kept.other);
        }
        Ok(())
    }

    /// Whether the frame's `struct page` says that it is this page of this process's, and of nobody
    /// else.
    fn is_alone(&self, frame: Pfn, number: u64) -> Result<bool, VmiError> {
        let mut copy = [0_u8; 256];
        let Some(copy) = copy.get_mut(..self.map.stride_len()?) else {
            return Ok(false);
        };
        let Some(at) = self.map.page_va(frame) else {
            return Ok(false);
        };
        self.map.copy_pages(at, copy)?;
        let page = GuestBytes::from_slice(copy);
        Ok(
            self.layout.head_of(&page, at).is_none()
                && self.layout.is_sole_anonymous(&page, number),
        )
    }
}
