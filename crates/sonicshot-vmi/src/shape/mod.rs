//! The allocator's structures found by their shape, where no type tells what they look like.
//!
//! Kernels of sandboxes have no BTF, and often no symbols of data. VMCOREINFO alone tells what a
//! struct page of a free block looks like, and how a zone's array of free areas is laid out, but
//! not where a zone is, nor anything of the per-CPU lists. Both are found by the lists themselves:
//! a list of free pages leaves the struct pages at its head, and the head is in what is looked
//! for. What is found so is held against the same records as what types tell of.

mod heads;
pub(crate) mod percpu;
pub(crate) mod zones;

pub(crate) use heads::Heads;
