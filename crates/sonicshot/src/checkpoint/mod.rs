//! The checkpoint format `.sonic`: small, checked, written as a stream, restored lazily.
//!
//! `FORMAT.md` beside this crate's `Cargo.toml` specifies every byte. A [`CheckpointWriter`]
//! takes any [`GuestMemory`](crate::GuestMemory), a [`PageMap`](crate::PageMap) and a
//! [`PrunePlan`](crate::PrunePlan); a [`CheckpointReader`] is guest memory again, restores
//! into a [`RestoreTarget`], maps an uncompressed checkpoint (feature `mmap`), or serves page
//! faults from it (feature `userfaultfd`).
//!
//! | feature | what for | dependency |
//! |---|---|---|
//! | `lz4` | LZ4 page data | `lz4_flex` (Rust) |
//! | `zstd` | Zstandard page data | `zstd` (C) |
//! | `mmap` | restore by mapping the file | `rustix` |
//! | `userfaultfd` | restore on demand | `rustix` |
//!
//! A checkpoint may come from anywhere: every length, offset and reference in it is checked when
//! it is opened, nothing is allocated that its length does not justify, and page data is checked
//! when it is read. The checksums are against accidents, not against an adversary.

mod codec;
mod error;
mod index;
mod info;
mod layout;
#[cfg(feature = "userfaultfd")]
mod lazy;
#[cfg(feature = "mmap")]
mod private_map;
mod reader;
mod restore;
mod scan;
mod source;
#[cfg(feature = "userfaultfd")]
mod uffd;
mod writer;

pub use error::CheckpointError;
pub use info::{CheckpointInfo, Compression, PageContent, PageRun, UnknownCompression};
#[cfg(feature = "userfaultfd")]
pub use lazy::{LazyOptions, LazyRegion, LazyRestore, LazyStats, Prefetch, WorkingSet};
#[cfg(feature = "mmap")]
pub use private_map::{MapOptions, PrivateMemory};
pub use reader::CheckpointReader;
pub use restore::{Before, FillWith, RestoreRegions, RestoreTarget};
pub use source::{RangeSource, SeekSource};
#[cfg(feature = "userfaultfd")]
pub use uffd::{HostAddress, Uffd};
pub use writer::{CheckpointWriter, SaveOptions, SaveStats};
