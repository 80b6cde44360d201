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
//! | `sha256` | SHA-256 of what is on disks | `sha2` (Rust) |
//!
//! Most of a guest's page cache is on its disks, byte for byte: a [`DiskFinder`] tells where, and
//! [`CheckpointWriter::memory_on_disks`] refers to it there instead of storing it. Who reads such a
//! checkpoint gives it the disks ([`CheckpointReader::with_disks`]).
//!
//! A checkpoint may come from anywhere: every length, offset and reference in it is checked when
//! it is opened, nothing is allocated that its length does not justify, and page data is checked
//! when it is read. The checksums are against accidents, not against an adversary.

mod disk;
mod error;
mod read;
mod restore;
mod save;
mod wire;

pub use disk::find::DiskFinder;
pub use disk::given::{GivenDisk, MovedOn};
pub use disk::guess::{DiskGuess, DiskGuesses, OnDisks};
pub use disk::hash::{DiskDigest, DiskHash, UnknownHash};
pub use disk::source::{DiskOffset, DiskRange, DiskSource};
pub use error::CheckpointError;
pub use read::chunk::{Chunk, ChunkDecoder};
pub use read::reader::CheckpointReader;
pub use read::source::{RangeSource, SeekSource};
#[cfg(feature = "mmap")]
pub use restore::private_map::{MapOptions, PrivateMemory};
pub use restore::whole::{Before, FillWith, RestoreOptions, RestoreRegions, RestoreTarget};
pub use save::options::SaveOptions;
pub use save::writer::CheckpointWriter;
pub use wire::disk::{DiskInfo, DiskMark, DiskRun, MarkKind};
pub use wire::info::{
    CheckpointInfo, Compression, PageContent, PageRun, SaveStats, UnknownCompression,
};
