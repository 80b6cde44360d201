//! What the pages of a dump are got from: a file that has them as they are, a diff over its base,
//! what came through a pipe, blocks decompressed on demand.

mod archive;
pub(crate) mod lz4;
pub(crate) mod lzop;
pub(crate) mod overlay;
pub(crate) mod paged;
pub(crate) mod plain;
pub(crate) mod scattered;
pub(crate) mod spool;
pub(crate) mod sys;
pub(crate) mod unpack;

use crate::DumpError;
use sonicshot::GuestMemory;
use std::fs::File;

/// Guest memory that comes out of a file.
pub(crate) trait Stored: GuestMemory {
    /// The file.
    fn file(&self) -> &File;

    /// Refuses files that are no longer what was opened.
    fn check_unchanged(&self) -> Result<(), DumpError>;
}
