//! The sources of a dump's pages: a file that has them as they are, a diff over its base,
//! what came through a pipe, blocks decompressed on demand.

mod archive;
pub(crate) mod lz4;
pub(crate) mod lzop;
pub(crate) mod overlay;
pub(crate) mod packed;
pub(crate) mod paged;
pub(crate) mod plain;
pub(crate) mod scattered;
pub(crate) mod spool;
mod streams;
pub(crate) mod sys;
pub(crate) mod unpack;

use crate::DumpError;
use sonicshot::{GpaRange, GuestMemory, Tally};
use std::fs::File;

/// Guest memory that comes out of a file.
pub(crate) trait Stored: GuestMemory {
    /// The file.
    fn file(&self) -> &File;

    /// Refuses files that are no longer what was opened.
    fn check_unchanged(&self) -> Result<(), DumpError>;

    /// The number of bytes of the file that the memory in `range` takes, which is in one range of RAM.
    fn stored_bytes(&self, range: GpaRange) -> Result<u64, DumpError> {
        let mut sum = Tally::ZERO;
        let mut at = range.start();
        while at < range.end() {
            let Some(data) = self.next_data(at) else {
                break;
            };
            let data = data.intersection(&range);
            if data.is_empty() {
                break;
            }
            sum.add(data.len());
            at = data.end();
        }
        Ok(sum.get())
    }
}
