//! Disagreements of a guest's records of free pages, as data.

use core::fmt;
use sonicshot::{Pfn, PfnRange};

/// The list that a frame is on, by the lists themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum WhichList {
    /// None.
    None,
    /// A free list of a zone.
    Zone {
        /// The order of its blocks.
        order: u8,
    },
    /// A processor's free list.
    PerCpu {
        /// The order of its blocks.
        order: u8,
    },
    /// A free list that was being changed.
    Changing {
        /// The order of its blocks.
        order: u8,
    },
}

impl fmt::Display for WhichList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("on no free list"),
            Self::Zone { order } => write!(f, "on a free list of order {order}"),
            Self::PerCpu { order } => write!(f, "on a per-CPU free list of order {order}"),
            Self::Changing { order } => {
                write!(f, "on a free list of order {order} that was being changed")
            }
        }
    }
}

/// A block on which flag, list and struct pages disagree; as text, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum BlockDisagreement {
    /// A processor's lists hold another number of pages than its counter says.
    PerCpuCount {
        /// The zone.
        zone: String,
        /// The processor.
        cpu: usize,
        /// The pages that the lists hold.
        listed: u64,
        /// The pages that the counter says.
        counted: u64,
    },
    /// A listed block is not aligned, or not inside its zone's RAM.
    Misplaced {
        /// The block.
        frames: PfnRange,
        /// Its order.
        order: u32,
        /// The zone that lists it.
        zone: String,
        /// The frames of that zone.
        span: PfnRange,
    },
    /// A block is free by flag and list, but one of its struct pages shows a user.
    InUse {
        /// The block.
        frames: PfnRange,
        /// The frame with that struct page.
        pfn: Pfn,
    },
    /// A block is free by flag and list, but leaves its RAM or has frames without a struct page.
    Incomplete {
        /// The block.
        frames: PfnRange,
    },
    /// A frame is marked as a free block, and the lists say otherwise.
    OtherwiseListed {
        /// The frame.
        pfn: Pfn,
        /// The order by its mark.
        order: u64,
        /// The list that it is on.
        list: WhichList,
    },
    /// A frame is on a processor's free list, but its struct page shows a user.
    PerCpuInUse {
        /// The frame.
        pfn: Pfn,
    },
    /// A frame is listed, but has no mark of a free block.
    Unmarked {
        /// The frame.
        pfn: Pfn,
        /// The list that it is on.
        list: WhichList,
    },
    /// A frame holds struct pages, and counts as free.
    HoldsStructPages {
        /// The frame.
        pfn: Pfn,
    },
}

impl fmt::Display for BlockDisagreement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PerCpuCount {
                zone,
                cpu,
                listed,
                counted,
            } => write!(
                f,
                "per-CPU lists of processor {cpu} in zone {zone} hold {listed} pages, its counter \
                 says {counted}"
            ),
            Self::Misplaced {
                frames,
                order,
                zone,
                span,
            } => write!(
                f,
                "block {frames} of order {order} is listed in zone {zone} of {span}, not aligned or \
                 not inside its RAM"
            ),
            Self::InUse { frames, pfn } => write!(
                f,
                "block {frames} is free by flag and list, but the struct page of frame {pfn} shows \
                 a user"
            ),
            Self::Incomplete { frames } => write!(
                f,
                "block {frames} is free by flag and list, but leaves its RAM or has frames without \
                 a struct page"
            ),
            Self::OtherwiseListed { pfn, order, list } => write!(
                f,
                "frame {pfn} is marked as a free block of order {order}, {list}"
            ),
            Self::PerCpuInUse { pfn } => write!(
                f,
                "frame {pfn} is on a per-CPU free list, but its struct page shows a user"
            ),
            Self::Unmarked { pfn, list } => {
                write!(f, "frame {pfn} is {list}, but has no mark of a free block")
            }
            Self::HoldsStructPages { pfn } => {
                write!(f, "frame {pfn} holds struct pages and counts as free")
            }
        }
    }
}

/// A counter of a zone that disagrees with its lists; as text, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum CounterDisagreement {
    /// `nr_free` of one order.
    Blocks {
        /// The zone.
        zone: String,
        /// The order of the blocks.
        order: u32,
        /// The blocks that are listed.
        listed: u64,
        /// The blocks that the counter says.
        counted: u64,
    },
    /// `NR_FREE_PAGES`.
    Pages {
        /// The zone.
        zone: String,
        /// The pages that are listed.
        listed: i64,
        /// The pages that the counter says.
        counted: i64,
        /// The most by which the two may differ in a stopped guest.
        bound: u64,
    },
}

impl fmt::Display for CounterDisagreement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blocks {
                zone,
                order,
                listed,
                counted,
            } => write!(
                f,
                "zone {zone} lists {listed} free blocks of order {order}, nr_free says {counted}"
            ),
            Self::Pages {
                zone,
                listed,
                counted,
                bound,
            } => write!(
                f,
                "zone {zone} lists {listed} free pages, NR_FREE_PAGES says {counted} (at most \
                 {bound} apart in a stopped guest)"
            ),
        }
    }
}
