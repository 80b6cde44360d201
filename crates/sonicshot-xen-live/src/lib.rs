//! The memory of Xen's domains, read from dom0, and saves without the pages that are dropped.
//!
//! - [`Xen`] is the way to the hypervisor, by the system's own libraries, which are loaded when it
//!   is opened: nothing of Xen is needed to build this.
//! - [`LiveDomain`] is the memory of a domain as a [`GuestMemory`](sonicshot::GuestMemory), mapped
//!   as it is looked at. It must not run meanwhile.
//! - [`SaveFilter`] has an unchanged `xl save` leave frames out: they are told to libxc as frames
//!   to be populated without content, so that it neither maps nor writes them.
//! - [`save`] does all of that with a domain, and ends with an image that is whole or not there;
//!   [`restore`] has `xl` take it again, also if it was compressed. Or the save ends with a
//!   checkpoint that refers to the domain's disks, which [`restore_checkpoint`] makes an image of again.
//!
//! # Which domains
//! Paravirtualised ones of 64 bits, and HVM and PVH ones. Of the latter two the code follows Xen's
//! sources; no such guest was tried.
//!
//! # Trust
//! What a guest writes is not trusted: its table of frames is bounded by the pages that Xen says it
//! has, and a frame that is not the guest's cannot be mapped by Xen's own check.
#![cfg_attr(not(test), warn(clippy::arithmetic_side_effects))]

mod checkpoint;
mod choice;
mod copied;
mod domain;
mod error;
#[expect(unsafe_code, reason = "the edge to Xen's libraries")]
mod ffi;
mod filter;
mod mappings;
mod p2m_list;
mod restore;
mod save;
mod watcher;
mod xl;

pub use choice::Choice;
pub use domain::LiveDomain;
pub use error::LiveError;
pub use ffi::Xen;
pub use filter::{FrameRuns, SaveFilter, path_of};
pub use restore::{RestoreOptions, restore, restore_checkpoint};
pub use save::{AfterSave, Compress, FirstLook, Look, Looked, SaveOptions, Saved, save};
pub use sonicshot_offline::packed::ImageCompression;

/// A domain's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DomainId(u32);

impl DomainId {
    /// The domain `raw`.
    #[must_use]
    pub const fn new(raw: u32) -> Self {
        Self(raw)
    }

    /// The number.
    #[must_use]
    pub const fn raw(self) -> u32 {
        self.0
    }
}

impl core::fmt::Display for DomainId {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}", self.0)
    }
}
