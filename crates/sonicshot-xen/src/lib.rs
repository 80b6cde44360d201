//! Xen's files of a guest: where each page is in an `xl save` image, and the same image without the
//! pages that are dropped; where each page is in a core of `xl dump-core`.
//!
//! # Images
//! An image is a header of `xl`, a libxl stream (version 2), and inside it, of no stated length, a
//! libxc migration stream (version 2 or 3). Of the libxc stream's records only those of type
//! `PAGE_DATA` are understood and rewritten; everything else stays byte for byte. A file may also begin
//! with one of the streams itself.
//!
//! The guest's physical memory is addressed by its own frame numbers (PFN). The page tables of a PV
//! guest hold those in the stream, not the machine's, so that addresses can be translated by the
//! image alone.
//!
//! ## An image in two
//! [`XlImage::skeleton`] gives everything of an image but the content of its pages, and
//! [`Skeleton::joined`] the image again, with content from elsewhere: for formats that hold a
//! guest's memory alone.
//!
//! ## What a dropped page is
//! Its number stays in the record, with the type `XALLOC`: the restoring Xen gives the guest a page
//! there, of unspecified content. A Xen built for release has scrubbed that page to zero *if* its
//! last owner is gone; what a living domain gave back comes as that domain left it, and a debug
//! build scrubs with another byte. So **only pages whose content the guest does not care about are
//! dropped**: those to which the plan gives [`Fill::Any`](sonicshot::Fill::Any), which are free
//! pages of a guest that does not rely on them being zero. A page in use that happens to be zero
//! is kept.
//!
//! Pages that are, or were in an earlier pass of a live save, page tables are never dropped; nor
//! are those that Xen calls broken.
//!
//! # Cores
//! A core ([`CoreDump`]) is an ELF file with the pages as one section and their numbers as another.
//! It is only read. The page tables of a PV guest are there as Xen uses them, with the machine's
//! numbers, and a [`P2m`](sonicshot::P2m) to translate those by. A number that comes twice, of the
//! guest or the machine, is refused: which page is meant would be a guess.
#![cfg_attr(not(test), warn(clippy::arithmetic_side_effects))]
#![forbid(unsafe_code)]

mod core_dump;
mod cursor;
mod error;
mod frame_type;
mod frames;
#[cfg(feature = "__guarded")]
mod guarded;
mod image;
mod options;
mod page_data;
mod prune;
mod record;
mod skeleton;
mod vcpu;

pub use core_dump::{CoreDump, CoreRun};
pub use error::{Place, Within, XenError};
pub use frame_type::FrameType;
pub use frames::Frame;
pub use image::{DomainKind, Layer, MAGIC, XlImage};
pub use options::ParseOptions;
pub use prune::{Dropped, Part};
pub use record::Record;
pub use skeleton::{Joined, Skeleton};
pub use vcpu::{Vcpu, Vcpus};
