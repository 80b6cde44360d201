//! What a VMM says of a restore on demand.

use super::uffd::HostAddress;
use super::working_set::WorkingSet;
use crate::GpaRange;
use core::num::NonZeroUsize;

/// A stretch of guest memory in the address space whose faults are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LazyRegion {
    /// The guest memory that is there.
    pub guest: GpaRange,
    /// Where it begins.
    pub host: HostAddress,
    /// The size of the pages behind it, in bytes: the guest's, or that of huge pages.
    pub page: u64,
}

/// What is fetched before it is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Prefetch {
    /// Nothing.
    Nothing,
    /// The working set alone.
    WorkingSet,
    /// The working set, then all that is left. When all of it is in place the kernel need not
    /// ask any more.
    #[default]
    Everything,
}

/// How a checkpoint is restored on demand.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct LazyOptions {
    /// Threads that serve faults.
    pub threads: NonZeroUsize,
    /// What is fetched in the background.
    pub prefetch: Prefetch,
    /// What comes first in the background.
    pub working_set: WorkingSet,
    /// How much stored data around a page comes in with it, in bytes.
    pub around: u64,
    /// Frames that are remembered as touched, at most.
    pub record: usize,
}

impl Default for LazyOptions {
    fn default() -> Self {
        Self {
            threads: NonZeroUsize::MIN,
            prefetch: Prefetch::default(),
            working_set: WorkingSet::default(),
            around: 16 << 10,
            record: 1 << 20,
        }
    }
}
