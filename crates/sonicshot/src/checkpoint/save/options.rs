//! How a checkpoint is written.

use crate::Stop;
use crate::checkpoint::wire::info::Compression;
use core::num::NonZeroUsize;

/// How a checkpoint is written.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct SaveOptions {
    /// How page data is stored.
    pub compression: Compression,
    /// Page data in a chunk, in bytes: what a restore decompresses for one page. A multiple of
    /// the page size, at most 16 MiB.
    pub chunk_size: u32,
    /// How many threads read and compress; by default as many as there are cores.
    pub threads: Option<NonZeroUsize>,
    /// Whether pages with the same content are stored once.
    pub deduplicate: bool,
    /// When the work is to end before it is done: then it fails, and there is no checkpoint.
    pub stop: Option<Stop>,
}

impl SaveOptions {
    /// 64 KiB: on real guests 256 KiB are 1.5 % smaller, and take four times as long for a
    /// single page.
    pub const CHUNK_SIZE: u32 = 64 << 10;

    /// The defaults, with this compression.
    #[must_use]
    pub const fn new(compression: Compression) -> Self {
        Self {
            compression,
            chunk_size: Self::CHUNK_SIZE,
            threads: None,
            deduplicate: true,
            stop: None,
        }
    }
}

impl Default for SaveOptions {
    fn default() -> Self {
        Self::new(Compression::None)
    }
}
