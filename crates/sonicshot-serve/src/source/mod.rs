//! Sources of a guest's memory.

mod checkpoint;
mod memory;
#[cfg(feature = "server")]
mod open;
#[cfg(feature = "server")]
mod slots;

pub use self::checkpoint::CheckpointSource;
pub use self::memory::MemorySource;
#[cfg(feature = "server")]
pub use self::open::{OpenedSource, open_source};
use crate::error::ServeError;
use core::ops::Range;
use sonicshot::{Gpa, GpaRange, RamLayout};
use std::sync::Arc;

/// The content of a range of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Content {
    /// Bytes that the source has.
    Bytes,
    /// This word, little-endian, over and over from the start of each page. 0 for pages that were
    /// left out, as a rule.
    Fill(u64),
}

/// A range of guest memory of one kind of content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Its addresses. Of [`Content::Bytes`] no more than is had at once.
    pub range: GpaRange,
    /// The content.
    pub content: Content,
}

/// Bytes that a source has handed out.
#[derive(Debug)]
#[non_exhaustive]
pub enum Piece<'b> {
    /// A part of what many share.
    Shared {
        /// All of it.
        block: Arc<[u8]>,
        /// The part.
        part: Range<usize>,
    },
    /// In the buffer that was given.
    Own(&'b [u8]),
}

impl Piece<'_> {
    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Shared { block, part } => block.get(part.clone()).unwrap_or(&[]),
            Self::Own(bytes) => bytes,
        }
    }
}

/// The result of a look at one page.
#[derive(Debug)]
#[non_exhaustive]
pub enum Look<'b> {
    /// Its bytes.
    Page(Piece<'b>),
    /// It is not all in one run of [`Content::Bytes`]: what is at its beginning.
    Run(Run),
}

/// A guest's memory as it was saved. Many virtual machines are served from one, by a thread each.
pub trait PageSource: Send + Sync {
    /// The guest's RAM. The same on every call.
    fn layout(&self) -> &RamLayout;

    /// The content at `at`, and how far it goes: a range that holds `at`, of whole pages but for the edges
    /// of RAM. Its bytes, if it has such, can be [`read`](Self::read) at once or in part.
    ///
    /// # Errors
    /// [`ServeError::NotInSnapshot`] if that is no RAM.
    fn run_at(&self, at: Gpa) -> Result<Run, ServeError>;

    /// The bytes of `range`, which is in a run of [`Content::Bytes`]; all of them.
    ///
    /// # Errors
    /// Why they cannot be read.
    fn read<'b>(&self, range: GpaRange, buffer: &'b mut Vec<u8>) -> Result<Piece<'b>, ServeError>;

    /// The content of the page `page`. A source may do it sooner than by [`run_at`](Self::run_at) and
    /// [`read`](Self::read).
    ///
    /// # Errors
    /// As of those.
    fn look<'b>(&self, page: GpaRange, buffer: &'b mut Vec<u8>) -> Result<Look<'b>, ServeError> {
        let run = self.run_at(page.start())?;
        if run.content == Content::Bytes && page.intersection(&run.range) == page {
            return self.read(page, buffer).map(Look::Page);
        }
        Ok(Look::Run(run))
    }

    /// The number of the block that the bytes at `at` are in, if they are read, or decompressed, by blocks:
    /// who has several threads read gives all of one block to one of them.
    fn block_at(&self, at: Gpa) -> Option<u64> {
        let _ = at;
        None
    }

    /// All that is not zero, what a guest needs sooner first. All virtual machines share it.
    fn by_need(&self) -> Arc<[GpaRange]>;

    /// The mark that tells this source's bytes from another's, at most 512 bytes, so that another server can
    /// go on with its virtual machines; `None` if nothing does.
    fn identity(&self) -> Option<String> {
        None
    }

    /// Whether pages that the guest uses are missing, so that it cannot run from this: of a
    /// checkpoint [for analysis](sonicshot::checkpoint::CheckpointInfo::for_analysis).
    fn is_for_analysis(&self) -> bool {
        false
    }
}

/// Fails if what a source reads from is not what it was any more.
pub(crate) type Check<S> = Box<dyn Fn(&S) -> Result<(), ServeError> + Send + Sync>;

/// The result of a read, if the source's file has not changed since it was opened. A fault in a file
/// that has changed says less than that it has.
pub(crate) fn checked<S, T, E>(
    source: &S,
    check: Option<&Check<S>>,
    read: Result<T, E>,
) -> Result<T, ServeError>
where
    ServeError: From<E>,
{
    if let Some(check) = check {
        check(source)?;
    }
    Ok(read?)
}

/// As many bytes as `range` has.
pub(crate) fn length(range: GpaRange) -> Result<usize, ServeError> {
    usize::try_from(range.len()).map_err(|_| ServeError::NotInSnapshot { at: range.start() })
}
