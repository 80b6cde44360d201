//! Options for writing a checkpoint.

use crate::checkpoint::wire::info::Compression;
use crate::{Progress, Stop};
use core::num::NonZeroUsize;
use std::sync::Arc;

/// Options for writing a checkpoint.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct SaveOptions {
    /// The compression of page data.
    pub compression: Compression,
    /// Page data in a chunk, in bytes: what a restore decompresses for one page. A multiple of
    /// the page size, at most 16 MiB.
    pub chunk_size: u32,
    /// The number of threads that read and compress; by default as many as there are cores.
    pub threads: Option<NonZeroUsize>,
    /// Whether pages with the same content are stored once.
    pub deduplicate: bool,
    /// The stop that may end the work before it is done: then it fails, and there is no checkpoint.
    pub stop: Option<Stop>,
    /// Whoever is told how far it is, in bytes of the guest's RAM.
    pub progress: Option<Arc<dyn Progress>>,
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
            progress: None,
        }
    }

    /// Says how much page data is in a chunk, in bytes.
    #[must_use]
    pub fn chunk_size(mut self, bytes: u32) -> Self {
        self.chunk_size = bytes;
        self
    }

    /// Says how many threads read and compress.
    #[must_use]
    pub fn threads(mut self, threads: NonZeroUsize) -> Self {
        self.threads = Some(threads);
        self
    }

    /// Says whether pages with the same content are stored once.
    #[must_use]
    pub fn deduplicate(mut self, once: bool) -> Self {
        self.deduplicate = once;
        self
    }

    /// Says when the work is to end before it is done.
    #[must_use]
    pub fn stop(mut self, stop: Stop) -> Self {
        self.stop = Some(stop);
        self
    }

    /// Says who is told how far it is.
    #[must_use]
    pub fn progress(mut self, progress: Arc<dyn Progress>) -> Self {
        self.progress = Some(progress);
        self
    }
}

impl Default for SaveOptions {
    fn default() -> Self {
        Self::new(Compression::None)
    }
}
