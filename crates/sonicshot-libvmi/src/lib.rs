//! The memory of guests that LibVMI reads, paused while it is looked at.
//!
//! - [`LibVmi`] is the library, loaded at run time: nothing of it is needed to build this.
//! - [`Domain`] says which guest: `xen:NAME`, `kvm:NAME` or `file:PATH`.
//! - [`LibVmiGuest`] is that guest, found, with where its RAM lies.
//! - [`PausedGuest`] is its memory as a [`GuestMemory`](sonicshot::GuestMemory), with what its
//!   processors' registers tell. It runs on when this is dropped, and with a watchdog ([`watch`]) also
//!   if the process is killed.
//! - [`LibVmiSymbols`] has LibVMI tell where the kernel's symbols are, for a kernel that has no table
//!   of them.
//!
//! ```no_run
//! use sonicshot::DropClasses;
//! use sonicshot_libvmi::{Domain, LibVmi, LibVmiGuest};
//! use sonicshot_vmi::{AnalysisOptions, analyze};
//!
//! let library = LibVmi::load()?;
//! let domain: Domain = "xen:debian12".parse()?;
//! let guest = LibVmiGuest::open(&library, &domain, None)?;
//! let paused = guest.pause(None)?;
//! let analysis = analyze(&paused, &AnalysisOptions::new())?;
//! paused.resume()?;
//! let plan = analysis.plan(&DropClasses::default());
//! println!("{} bytes are free", plan.dropped_bytes());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What LibVMI is asked for
//! Guest-physical memory (`vmi_init`, `vmi_read_pa`, `vmi_mmap_guest_pa`) and registers
//! (`vmi_get_vcpureg`). Where the kernel is, what KASLR did to it and where its symbols are is found in
//! the memory itself: LibVMI's own search needs a profile of the kernel, and often fails with KASLR.
//!
//! # Limits
//! x86-64 guests. Paravirtualised domains of Xen are not read so, for LibVMI takes the machine's
//! addresses there: `sonicshot-xen-live` does. Of KVM the patched kernel with introspection (KVMI)
//! tells registers, the older driver by QEMU's monitor tells none, and such a guest needs its CR3 said.
//! In LibVMI's file mode a file is mapped: who cuts it off meanwhile ends this process. Only the file
//! mode has met a real LibVMI yet; see `docs/libvmi.md` of the repository.
#![cfg_attr(not(test), warn(clippy::arithmetic_side_effects))]

mod domain;
mod error;
mod guest;
#[expect(unsafe_code, reason = "the edge to LibVMI")]
mod instance;
mod processors;
mod ram;
mod symbols;
mod watchdog;

pub use domain::Domain;
pub use error::{InitFailure, LibVmiError};
pub use guest::{LibVmiGuest, PausedGuest};
pub use instance::LibVmi;
pub use libvmi_sys::{LoadError, Version};
pub use symbols::LibVmiSymbols;
pub use watchdog::watch;
