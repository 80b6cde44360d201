//! The checkpoint format `.sonic`: small, checked, written as a stream, restored lazily.
//!
//! `FORMAT.md` beside this crate's `Cargo.toml` specifies every byte. A [`CheckpointWriter`]
//! takes any [`GuestMemory`](crate::GuestMemory), a [`PageMap`](crate::PageMap) and a
//! [`PrunePlan`](crate::PrunePlan); a [`CheckpointReader`] is guest memory again, restores
//! into a [`RestoreTarget`], or maps an uncompressed checkpoint (feature `mmap`). On demand, page by
//! page as it is touched, `sonicshot-serve` restores it.
//!
//! | feature | what for | dependency |
//! |---|---|---|
//! | `lz4` | LZ4 page data | `lz4_flex` (Rust) |
//! | `zstd` | Zstandard page data | `zstd` (C) |
//! | `mmap` | restore by mapping the file | `rustix` |
//!
//! A checkpoint may come from anywhere: every length, offset and reference in it is checked when
//! it is opened, nothing is allocated that its length does not justify, and page data is checked
//! when it is read. The checksums are against accidents, not against an adversary.

mod error;
mod read;
mod restore;
mod save;
mod wire;

pub use error::CheckpointError;
pub use read::chunk::{Chunk, ChunkDecoder};
pub use read::reader::CheckpointReader;
pub use read::source::{RangeSource, SeekSource};
#[cfg(feature = "mmap")]
pub use restore::private_map::{MapOptions, PrivateMemory};
pub use restore::whole::{Before, FillWith, RestoreRegions, RestoreTarget};
pub use save::options::SaveOptions;
pub use save::writer::CheckpointWriter;
pub use wire::info::{
    CheckpointInfo, Compression, PageContent, PageRun, SaveStats, UnknownCompression,
};
