//! The abilities of formats beside being read.

use crate::DumpError;
use crate::backing::plain::PlainDump;
use crate::backing::spool::Packed;
use crate::format::qemu::content::Content;
use crate::output::Output;
use crate::prune::stats::PruneStats;
use sonicshot::Progress;
use sonicshot::{FileOffset, FileRange, PrunePlan};

/// A file of the same format that is to be written without some pages.
pub(crate) struct Copying<'a> {
    /// The pages that go: none that the format cannot drop.
    pub goes: &'a PrunePlan,
    /// The pages of it that the guest uses: their content is given up.
    pub given_up: &'a PrunePlan,
    pub output: &'a Output,
    pub stats: &'a mut PruneStats,
    pub progress: &'a dyn Progress,
}

/// Can be written again without the dropped pages.
pub(crate) trait ByCopy {
    /// Writes all of the output, and fills in what is special of `stats`.
    fn copy(&self, work: Copying<'_>) -> Result<(), DumpError>;
}

/// The changes to make to a file in place.
#[derive(Debug, Default)]
pub(crate) struct Punching {
    /// Bytes that say of pages that they are not there, each with its offset: written first.
    pub marks: Vec<(FileOffset, Vec<u8>)>,
    /// The ranges that then stand for nothing.
    pub runs: Vec<FileRange>,
}

/// Can have its pages punched out.
pub(crate) trait InPlace {
    /// The file that is changed.
    fn source(&self) -> &PlainDump;

    /// Refuses other files that the result depends on if they are no longer what was opened.
    fn check_others(&self) -> Result<(), DumpError> {
        Ok(())
    }

    /// The changes that make `goes` go.
    fn punching(&self, goes: &PrunePlan, stats: &mut PruneStats) -> Result<Punching, DumpError>;
}

/// A part of a pruned stream.
pub(crate) enum Part<'a> {
    /// A range of the input.
    Copy(FileRange),
    /// Other bytes.
    Bytes(&'a [u8]),
}

/// Takes the parts of a pruned stream, one after the other.
pub(crate) type EachPart<'a> = &'a mut dyn FnMut(Part<'_>) -> Result<(), DumpError>;

/// Can be written from front to back.
pub(crate) trait AsStream {
    /// The file that parts are copied from.
    fn source(&self) -> &PlainDump;

    /// The image that the stream is compressed in, if it is.
    fn packed_in(&self) -> Option<Packed<'_>> {
        None
    }

    /// Hands out the stream without `goes`, part by part.
    fn pruned(&self, goes: &PrunePlan, each: EachPart<'_>) -> Result<(), DumpError>;

    /// Fills in what is special of `stats`.
    fn count(&self, _goes: &PrunePlan, _stats: &mut PruneStats) {}
}

/// Holds what QEMU's migration files hold.
pub(crate) trait Migration {
    /// The file that it is in.
    fn source(&self) -> &PlainDump;

    /// The content of the file, and its places.
    fn content(&self) -> Result<Content<'_>, DumpError>;
}

/// Is the guest's memory and something else, which can be put together again.
pub(crate) trait Skeletal {
    /// All but the memory, without the pages that `plan` drops.
    fn skeleton(&self, plan: &PrunePlan) -> Result<Vec<u8>, DumpError>;
}
