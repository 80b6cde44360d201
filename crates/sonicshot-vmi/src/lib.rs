//! Read a Linux guest's page allocator from outside: from a dump, or a paused guest's memory.
//!
//! [`analyze`] finds the kernel in any [`GuestMemory`](sonicshot::GuestMemory), with no
//! file given: VMCOREINFO gives the page tables and what KASLR did, kallsyms the symbols, BTF the
//! types, all out of the guest's own memory. System.map, vmlinux (ELF symbols, BTF or DWARF) and
//! raw BTF can be given instead, and are refused if they are of another build. Every frame gets
//! its class:
//!
//! ```no_run
//! use sonicshot::{DropClasses, GuestMemory, PrunePlan};
//! use sonicshot_vmi::{AnalysisOptions, VmiError, analyze};
//!
//! fn plan(memory: &dyn GuestMemory) -> Result<PrunePlan, VmiError> {
//!     let analysis = analyze(memory, &AnalysisOptions::new())?;
//!     Ok(analysis.plan(&DropClasses::default()))
//! }
//! ```
//!
//! [`open_guest`] gives the guest itself ([`GuestOs`]), which tells more: where its RAM lies, and
//! what its memory says about a layout. [`LinuxGuest`] is the one there is.
//!
//! # Whose memory it is
//!
//! A kernel's records stay in memory when the kernel is gone: QEMU keeps RAM over a reset, and
//! kexec does everywhere. Memory may also hold any number of copies of VMCOREINFO, and pages that a
//! process made to look like it. So every page that may be a kernel's VMCOREINFO is a candidate:
//!
//! | evidence | what it must show |
//! |---|---|
//! | the processors ([`GuestMemory::processors`](sonicshot::GuestMemory::processors), or [`GuestOptions::cr3`]) | every one that was started, but for those in SMM, runs on page tables that lead where the kernel's own do: image, sections, struct pages, zones, per-CPU areas, direct map |
//! | the kernel's own variable `vmcoreinfo_data` | points to the VMCOREINFO by which it was found |
//! | per-CPU areas | say where they are and whose |
//! | each online processor's current task | is of that processor, and running |
//!
//! The first is the best: a kernel that all processors run on is the one, and if one runs on
//! others, [`LinuxGuest::classify`] refuses with [`VmiError::NotOwner`]. Where nothing is told of
//! processors, traces decide ([`Trace`]): a kernel that bears none is the one, if a reset would
//! have left one. Else all memory is searched, and if two kernels stand (and can be classified),
//! the guest is refused with [`VmiError::Undecided`]. Kernels are tried for 10 seconds, all
//! together; how many candidates there are does not matter: all but a few end within microseconds.
//!
//! Where nothing is told of processors, and one kernel stands, the memory itself is searched for
//! traces of a later owner: a BIOS, a boot menu, a loader, the next kernel's decompressor, a crash
//! kernel. One [`Trace`] refuses the guest with [`VmiError::LaterOwner`]; without any it is
//! classified, with a note that says which tests were made and which could not be.
//!
//! | trace | of |
//! |---|---|
//! | `system_state`, `kexec_in_progress`, `panic_cpu`, `crashing_cpu` | a kernel that has given the machine away, or is not up |
//! | the BIOS's clock (ticks at 0x46c) against the time at which the kernel booted | a reset: all else that a BIOS leaves is what it left before |
//! | the EFI system table and runtime services table | an EFI firmware that has built them anew, without the addresses that the kernel had given it |
//! | the ACPI root pointer, root table, and tables | a BIOS that has written its ROM over its segment and has not built its tables yet |
//! | the real-mode trampoline, per-CPU areas, the list of tasks and the ends of their stacks | whoever writes over the kernel's own |
//!
//! What a reset leaves no trace in: a kernel that was started by kexec or without firmware, as long
//! as the new owner writes only to pages that are free; and one that a BIOS started and that was up
//! for less than three seconds, or that booted so many whole days before the reset, less up to two
//! minutes. There only the processors' registers tell.
//!
//! An EFI firmware writes to places of its own before it builds its tables. Where nothing is told
//! of processors, free pages there are kept, and counted in a note: below 1 MiB, from 8 to 32 MiB,
//! and the uppermost 80 MiB below 4 GiB that the kernel may use, with what is above them. That is
//! so of EDK II's OVMF; of a kernel that another EFI firmware started, or that does not use the
//! firmware's runtime services (`efi=noruntime`), nothing would tell of a reset, and the guest is
//! refused with [`VmiError::OwnerUntold`].
//!
//! # When a frame is free
//!
//! Only if four records agree: its block's head carries the buddy mark with an order; a free
//! list has the head, of that order, linked in both directions; the block is aligned to its
//! order and inside its zone and the guest's RAM; and no `struct page` of the block shows a
//! reference or a flag. Frames on per-CPU lists carry no mark: there the list must hold as many
//! pages as its counter says, and the pages must look as the kernel leaves them.
//!
//! A guest may be stopped in the middle of the allocator. The kernel clears the mark before it
//! hands a page out, and changes a zone's lists only under that zone's lock, so each processor
//! accounts for one block on which the records disagree. Such a block is kept. More than one a
//! processor, or counters that are off by more than the bounds below, and the guest is refused
//! with [`VmiError::Inconsistent`], which shows the numbers.
//!
//! | record | may be off by | because |
//! |---|---|---|
//! | mark, list and struct pages of a block | 1 block a processor | one operation a processor is under way |
//! | `nr_free` against the list of each order | 1 block a processor | changed right beside the list, under the lock |
//! | `NR_FREE_PAGES` (with its per-CPU deltas) against the lists | the pages of one block of the largest order, and 127 a processor | changed once an operation, by at most a largest block; a delta is a signed byte, and may be between its two places |
//! | a per-CPU list against its count | nothing: such a list is kept, and counts as a block | the count is changed after a whole batch |
//!
//! A symbol or member that no source knows never means "not set": it is
//! [`VmiError::Missing`], or its pages are kept and a note says so.
//!
//! # When little is known
//!
//! | [`Knowledge`] | from | tells |
//! |---|---|---|
//! | `types` | BTF or DWARF, with symbols | every class |
//! | `vmcoreinfo` | VMCOREINFO alone | free pages, offline ones in a driver's list; all others are unknown |
//! | `shape` | nothing | free pages; all others are unknown |
//!
//! Where the guest tells no types, symbol files do: a vmlinux, or a [small
//! file](symbols::SymbolFile) of one, whose build ID or banner is found in the kernel's image also
//! where there is no VMCOREINFO.
//!
//! The most that is there is taken. Without types zones are found by their own lists, which leave
//! the struct pages at a head inside the zone, and the per-CPU lists by the zones' pointers and
//! the array of the processors' displacements; then the same four records decide, within the same
//! bounds. VMCOREINFO must be one that a variable of the kernel's image points to; of a crash dump
//! its note. A zone must have a node that lies in the image or that the image points to, and the
//! pages of each must have another zone in their flags: what an earlier boot has left has neither.
//! Where types do not tell which number counts the pages of a zone or of a per-CPU list, one that
//! is chosen because it agrees is no record: that of a zone must be the only one in its place in
//! all zones, that of the lists must fit two of them.
//!
//! Without VMCOREINFO (where no page that begins so is of a kernel of this memory) the struct pages
//! of free blocks are searched in all of RAM by their shape, and page tables under which they lead
//! to each other: those that the processors run on, each range of which may be the array of struct
//! pages. Where nothing is told of processors, any page that may be a top-level table is tried. If
//! the kernel's code shows that it makes a VMCOREINFO, that is gone, and what wrote over it may be
//! a later owner: the guest is refused with [`VmiError::OwnerUntold`]. One that makes none cannot
//! start another by kexec either; its log is found by its shape. A block counts only in a list of a
//! zone that stands; others may be an earlier boot's, and are kept and counted. If more than one
//! kernel stands the guest is refused with [`VmiError::Undecided`]. On both levels a classification
//! in which the kernel's page tables, code, zones or struct pages count as free is refused with
//! [`VmiError::Covered`].
//!
//! Symbols or types that cannot be read are not none: a kernel whose VMCOREINFO, release or
//! symbols say that it has them is refused with [`VmiError::Symbols`]. Where there are none, and
//! nothing is told of processors, the kernel's log (`printk_ringbuffer`, which VMCOREINFO tells all
//! of, and whose shape is the same in all kernels) is asked for a later owner: whether it says that
//! the kernel goes; when the kernel set its clock from the chip that the BIOS's is set from; where
//! the firmware's tables were. Without a BIOS there is none to start again. Where it does not tell
//! (its lines are lost, an EFI firmware started the kernel, there is no such chip) the guest is
//! refused with [`VmiError::OwnerUntold`].
//!
//! A search by shape ends after 10 s with [`VmiError::OutOfTime`], and one of more than there can
//! be with [`VmiError::TooMany`].
//!
//! # When memory is offline
//!
//! | what | records that must agree |
//! |---|---|
//! | a section that is not online | its word in `mem_section`; its memory block's state (pmem, device DAX and device memory have sections, but no memory blocks); `present_pages` of all zones, and of all nodes, which must be just the frames of the online sections, holes by the guest's e820 map left out; no list of free pages, no LRU list, and no page table of a process may lead into it |
//! | a page with the type `PageOffline` | its type; a ring of such pages alone that is closed and linked both ways, with its head outside the struct pages; in each of them at most one reference, no flag, and the same owner; and, beside the head, the driver's count of just as many |
//!
//! What a section's own struct pages say is not asked: where it was never online, they were never
//! written. Offline memory that is not proved is kept, counted in a note, and never a reason to
//! refuse. virtio-mem's pages are in no ring: they go as what they are on the host, zeroes.
//!
//! Constants and offsets have a second witness too: what several sources tell (BTF, VMCOREINFO,
//! DWARF, also under another name, as `PGTY_offline` and `PAGE_OFFLINE_MAPCOUNT_VALUE`) must be
//! the same, page types and flags must be in their range and each of its own, and the counters
//! above hold for all struct pages. Where the struct pages lie is told by `vmemmap_base`, or by
//! the section's number in `page.flags`, beside `mem_section`.
//!
//! # What free pages must read as
//!
//! | guest runs with | dropped free pages |
//! |---|---|
//! | nothing special | may read as anything ([`Fill::Any`](sonicshot::Fill)): content is undefined for the guest |
//! | `init_on_alloc=1` | the same: the guest makes them zero itself |
//! | `init_on_free=1` | must read as zero: kept in formats that do not promise that |
//! | `page_poison=1` | must read as 0xaa ([`Fill::Byte`](sonicshot::Fill)): kept in formats where a dropped page is zero. Told by the guest's flag, or, if no symbol table tells, by the pages' content |
//! | `debug_pagealloc=1` | may read as anything: not mapped, not looked at |
//! | KASAN (generic), KFENCE | may read as anything; shadow and pool are not free pages, so they are kept |
//! | MTE (arm64) | no arm64 guest is read yet; tags would be lost, a note says so |
//! | SME, SEV, TDX | refused: memory is encrypted |
//!
//! # Limits
//!
//! Linux 4.18 and later on x86-64, four- and five-level paging. Proved on real guests: Debian's
//! 5.10, 6.1, 6.12 and 7.2 (all `SPARSEMEM_VMEMMAP`). Classic `SPARSEMEM`, `FLATMEM`, deferred
//! struct pages, unaccepted memory and hot-added subsections are written from the kernel's
//! sources and have not met a real guest. Memory blocks are read as Linux 5.8 and later have them;
//! before, offline sections are kept. Kernels without VMCOREINFO are read on x86-64 alone, with
//! struct pages of 64 bytes in a vmemmap. A new architecture is one more folder in `arch`, another
//! system one more [`GuestOs`]. The guest is untrusted: every walk is bounded by the guest's own
//! number of frames, every length and pointer is checked, and crafted memory gives an error.
#![cfg_attr(not(test), warn(clippy::arithmetic_side_effects))]

mod absent;
mod address;
mod analysis;
mod arch;
mod deadline;
mod discover;
mod error;
mod guest;
mod kernel;
mod knowledge;
mod mm;
mod needs;
mod note;
mod os;
mod owned;
mod owner;
mod paging;
mod place;
mod shape;
pub mod symbols;
mod zero;

pub use absent::mark_absent_pages;
pub use address::{KernelVa, VirtualMemory, VirtualReadError};
pub use analysis::{Analysis, AnalysisOptions, GuestFacts, analyze};
pub use arch::{Foreign, ForeignProcessor, Trace};
pub use discover::find_vmcoreinfo;
pub use error::VmiError;
pub use guest::{
    Classification, FilePlace, FilePlaces, FileSystemId, FreeBlocks, FreeList, GivenUp,
    GuestOptions, KeptPages, LinuxGuest, ListedIn, OnInconsistency, PageFacts, PageOwner,
    PageRecord, PerCpuCount, Task, Tasks, Witness, ZoneFree,
};
pub use knowledge::Knowledge;
pub use mm::classify::{
    BlockDisagreement, CounterDisagreement, Inconsistency, WhichList, ZoneReport,
};
pub use note::{Note, TracesSought};
pub use os::{GuestOs, open_guest};
pub use owned::OwnedGuest;
pub(crate) use paging::AddressSpace;
pub use place::PlaceEvidence;
pub use zero::{count_zero_pages, mark_zero_pages};

/// Registers that only x86-64 processors have.
pub mod x86_64 {
    pub use crate::arch::x86_64::{Cr3, ParseCr3Error};
}
