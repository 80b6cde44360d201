//! List heads of free pages, as they look from outside the struct pages.

use crate::deadline::Deadline;
use crate::error::VmiError;
use crate::kernel::Kernel;
use crate::mm::mem_map::MemMap;
use crate::mm::page::PageLayout;
use crate::{AddressSpace, KernelVa, VirtualMemory};

/// Tells whether something looks like the head of a list of struct pages.
pub(crate) struct Heads<'a, 'm> {
    pub space: &'a AddressSpace<'m>,
    pub map: &'a MemMap<'m>,
    /// The offset of `lru` in `struct page`.
    pub lru: u64,
}

/// The sources by which zones and per-CPU lists are looked for.
pub(crate) struct Look<'a, 'm> {
    pub heads: Heads<'a, 'm>,
    pub layout: &'a PageLayout,
    /// The kernel's image.
    pub image: (KernelVa, KernelVa),
    pub deadline: &'a Deadline,
}

impl<'a, 'm> Look<'a, 'm> {
    pub(crate) fn new(
        kernel: &'a Kernel<'m>,
        map: &'a MemMap<'m>,
        layout: &'a PageLayout,
        image: (KernelVa, KernelVa),
        deadline: &'a Deadline,
    ) -> Self {
        let heads = Heads {
            space: &kernel.space,
            map,
            lru: layout.lru,
        };
        Self {
            heads,
            layout,
            image,
            deadline,
        }
    }
}

/// A list head by its two pointers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Head {
    /// It points to itself: the list is empty.
    Empty,
    /// It points to these list nodes in struct pages.
    Pages {
        /// The first page's node.
        next: KernelVa,
        /// The last page's node.
        prev: KernelVa,
    },
}

impl Heads<'_, '_> {
    /// The head at `at`, if it can be one: both pointers lead to itself, or both into struct
    /// pages. In a list that was being changed they do so, too.
    pub(crate) fn at(&self, at: KernelVa) -> Option<Head> {
        let mut bytes = [0; 16];
        self.space.read(at, &mut bytes).ok()?;
        self.of(at, &bytes)
    }

    /// The head at `at` that consists of these bytes.
    pub(crate) fn of(&self, at: KernelVa, bytes: &[u8; 16]) -> Option<Head> {
        let (words, _) = bytes.as_chunks::<8>();
        let [next, prev] = words else {
            return None;
        };
        let (next, prev) = (u64::from_le_bytes(*next), u64::from_le_bytes(*prev));
        if next == at.raw() && prev == at.raw() {
            return Some(Head::Empty);
        }
        let (next, prev) = (KernelVa::new(next), KernelVa::new(prev));
        let node = |node: KernelVa| self.is_node(node);
        // One page in the middle of being added or taken: one of the two still names the head.
        let may = |node_: KernelVa| node(node_) || node_ == at;
        (may(next) && may(prev)).then_some(Head::Pages { next, prev })
    }

    /// The word at `base + offset`, if it is there.
    pub(crate) fn word(&self, base: u64, offset: u64) -> Option<u64> {
        let at = KernelVa::new(base).checked_add(offset)?;
        self.space.read_u64(at).ok()
    }

    /// Whether `node` is the list node of some struct page.
    pub(crate) fn is_node(&self, node: KernelVa) -> bool {
        let page = node.raw().checked_sub(self.lru).map(KernelVa::new);
        page.and_then(|page| self.map.frame_of(page)).is_some()
    }

    /// The struct page whose list node is at `node`.
    pub(crate) fn page_of(&self, node: KernelVa) -> Result<KernelVa, VmiError> {
        let page = node.raw().checked_sub(self.lru).map(KernelVa::new);
        page.filter(|page| self.map.frame_of(*page).is_some())
            .ok_or(VmiError::Corrupt {
                what: "a list of struct pages",
                at: node,
                value: node.raw(),
            })
    }
}
