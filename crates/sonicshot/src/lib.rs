//! Leave a guest's free memory out of its snapshots, from outside, with no agent.
//!
//! A snapshot of a virtual machine holds all of the guest's RAM, though most of it is free or
//! can be thrown away. This crate is the part that a VMM embeds: guest memory, page classes,
//! the policy that decides what to drop, and the [`checkpoint`] format. By default it depends on
//! nothing but `thiserror` and `twox-hash` (checksums).
//!
//! ```text
//!   bytes ─▶ format parser ─▶ guest-physical memory ─▶ symbols, types ─▶ kernel objects
//!            sonicshot-dump    GuestMemory              sonicshot-vmi     sonicshot-vmi
//!            your VMM          (this crate)                                    │
//!                                                                              ▼
//!            sonicshot-dump ◀────── PrunePlan ◀────── PrunePolicy ◀─────── PageMap
//!            your VMM               (this crate)      (this crate)        (this crate)
//! ```
//!
//! A VMM serves its memory as [`GuestMemory`] (an mmaped region without copying by
//! [`MappedRegions`]; `vm-memory` by [`VmMemory`](https://docs.rs/sonicshot), feature
//! `vm-memory`), gets a [`PageMap`] from `sonicshot-vmi`, and asks a [`PrunePlan`] which
//! ranges to write:
//!
//! ```
//! use sonicshot::*;
//!
//! let ram = vec![1_u8; 8 * 4096];
//! let guest = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(&ram))])?;
//! // What sonicshot_vmi::LinuxGuest::classify gives:
//! let mut map = PageMap::new(guest.layout(), PageSize::SIZE_4K);
//! map.set(PfnRange::new(Pfn::new(2), Pfn::new(7)), PageClass::FreeBuddy);
//!
//! let plan = PrunePlan::new(&map, &DropClasses::default(), Fill::Zero);
//! let mut written = 0;
//! for region in guest.layout().regions() {
//!     for kept in plan.kept_in(*region) {
//!         let bytes = guest.map(kept.start(), kept.len() as usize)?.unwrap();
//!         written += bytes.bytes().len(); // pwritev(bytes.as_ptr(), …)
//!     }
//! }
//! assert_eq!(written, 3 * 4096);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Limits: guests are little-endian; addresses and sizes are 64-bit, and so must the host be.
//! Nothing here looks into a guest: crafted memory can at worst make a reader return an error.
#![cfg_attr(not(test), warn(clippy::arithmetic_side_effects))]

// A guest's memory, and a checkpoint, is longer than 32 bits can tell.
#[cfg(not(target_pointer_width = "64"))]
compile_error!("sonicshot is for hosts of 64 bits");

mod address;
mod architecture;
#[expect(
    unsafe_code,
    reason = "guest bytes are behind a pointer, which somebody else may write to"
)]
mod bytes;
pub mod checkpoint;
mod class;
mod cursor;
pub mod file;
mod file_bytes;
mod memory;
mod p2m;
mod page_map;
mod policy;
mod processor;
mod progress;
mod stop;
mod tally;
mod to_usize;
#[cfg(feature = "vm-memory")]
#[expect(
    unsafe_code,
    reason = "the guard of a mapping is kept beside its pointer"
)]
mod vm_memory;
pub mod work;
pub mod x86_64;

#[cfg(feature = "vm-memory")]
pub use crate::vm_memory::{SharedVmMemory, VmMemory};
pub use address::{Gpa, GpaRange, Mfn, PageSize, Pfn, PfnRange};
pub use architecture::Architecture;
pub use bytes::GuestBytes;
pub use class::{ClassCounts, ClassSet, PageClass, PageState, UnknownClass};
pub use cursor::{Bytes, Cursor, CutShort, Number};
pub use file::{FileId, FileOffset, FileRange, FileStamp, open_file};
pub use file_bytes::{Failure, FileBytes, FileContent};
pub use memory::{
    GuestMemory, Hold, LayoutError, MAX_MAP, Mapped, MappedRegions, MemoryError, RamLayout,
    next_present,
};
pub use p2m::{P2m, P2mBuilder, P2mError};
pub use page_map::PageMap;
pub use policy::{Disposition, DropClasses, DropRun, Fill, PrunePlan, PrunePolicy};
pub use processor::{Processor, Processors};
pub use progress::{PhaseProgress, Progress, ProgressRelay, WorkOptions, WorkPhase};
pub use stop::{Stop, Stoppable, Stopped};
pub use tally::Tally;
pub use to_usize::{spread, to_u64, to_usize};
