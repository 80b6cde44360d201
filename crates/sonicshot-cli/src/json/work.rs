//! The JSON of commands that work on files.

use super::{
    Disk, OfAttach, OfConvert, OfError, OfProgress, OfPrune, OfRestore, OfSave, OfShare, OfSymbols,
    OfVerify, PagesByName, Version,
};
use serde::Serialize;

/// An error, on standard error.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
pub(crate) struct ErrorReport {
    pub version: Version,
    pub kind: OfError,
    /// The input that it is about; `null` if it is about the command line, or all of it.
    pub path: Option<String>,
    /// The error.
    pub error: String,
    /// Why, the nearest cause first.
    pub causes: Vec<String>,
    /// Advice on what to do.
    pub hint: Option<String>,
    /// The exit code that it stands for.
    pub exit_code: u8,
}

/// The progress of the work, on standard error, with `--progress json`.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
pub(crate) struct ProgressReport {
    pub version: Version,
    pub kind: OfProgress,
    pub phase: String,
    /// Bytes that are done, and of how many, if that is known.
    pub done: Option<u64>,
    pub total: Option<u64>,
    pub seconds: f64,
    pub finished: bool,
}

/// `prune`, done or with `--dry-run`.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct PruneReport {
    pub version: Version,
    pub kind: OfPrune,
    pub path: String,
    pub kernel_release: String,
    /// The format, as a word and by name.
    pub format: String,
    pub format_name: String,
    pub page_size: u64,
    pub total_pages: u64,
    pub droppable_pages: u64,
    pub droppable_bytes: u64,
    /// Pages that go, by class; `zero` are pages in use that hold only zeroes.
    pub dropped: PagesByName,
    pub for_analysis: bool,
    /// Memory that the file does not have, whatever is pruned.
    pub missing_bytes: u64,
    pub missing_mib: f64,
    /// The bytes of the file that the dropped pages take; `null` where there is no file.
    pub stored_bytes: Option<u64>,
    pub disk_before: Option<u64>,
    pub disk_after: Option<u64>,
    pub dry_run: bool,
    /// The time that a guest that LibVMI reads was paused; else `null`.
    pub paused_seconds: Option<f64>,
    pub seconds: f64,
    pub notes: Vec<String>,
    pub warnings: Vec<String>,
    /// The work that was done; not there with `--dry-run`.
    #[serde(flatten)]
    pub pruned: Option<Pruned>,
}

/// The result of a prune.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct Pruned {
    pub dropped_bytes: u64,
    /// Kept, for a dropped page would not read as the guest expects.
    pub kept_for_fill_bytes: u64,
    /// Kept, for a diff's base has other bytes there.
    pub kept_for_base_bytes: u64,
    pub runs: u64,
    pub punched: u64,
    pub freed_bytes: u64,
    pub joined: u64,
    pub left_bytes: u64,
    pub left_runs: u64,
    pub cloned_bytes: u64,
    pub extents_before: Option<u64>,
    pub extents_after: Option<u64>,
}

/// The content of a checkpoint.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct Stored {
    pub page_size: u64,
    pub data_pages: u64,
    pub duplicate_pages: u64,
    pub zero_pages: u64,
    pub fill_pages: u64,
    pub left_out_pages: u64,
    pub free_pages: u64,
    pub absent_pages: u64,
    /// Pages that are on the guest's disks.
    pub disk_pages: u64,
    pub stored_bytes: u64,
    pub file_bytes: u64,
    pub runs: u64,
    /// The checkpoint's digest, in hexadecimal.
    pub digest: String,
}

/// The search for pages on the guest's disks.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
pub(crate) struct DiskSearchJson {
    pub page_cache_pages: u64,
    /// Pages whose place on the disk the guest's records tell.
    pub told_pages: u64,
    pub looked_at_pages: u64,
    pub right_pages: u64,
    pub explained_pages: u64,
    /// The bytes of the disks that were searched; `null` if they were not.
    pub streamed_bytes: Option<u64>,
}

/// `save`.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct SaveReport {
    pub version: Version,
    pub kind: OfSave,
    /// The input.
    pub path: String,
    /// Where it was saved to.
    pub output: String,
    pub kernel_release: Option<String>,
    pub compression: String,
    /// The bytes that the file takes on disk; `null` of a pipe.
    pub disk_bytes: Option<u64>,
    /// Pages that were left out, by class.
    pub left_out: PagesByName,
    pub for_analysis: bool,
    pub disks: Vec<Disk>,
    /// The search for pages on the disks; `null` without one.
    pub disk_search: Option<DiskSearchJson>,
    pub missing_bytes: u64,
    pub missing_mib: f64,
    /// The time that a guest that LibVMI reads was paused; else `null`.
    pub paused_seconds: Option<f64>,
    pub seconds: f64,
    pub notes: Vec<String>,
    /// The state of the guest's devices, in words.
    pub devices: Option<String>,
    #[serde(flatten)]
    pub stored: Stored,
}

/// `convert`.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
pub(crate) struct ConvertReport {
    pub version: Version,
    pub kind: OfConvert,
    pub path: String,
    pub output: String,
    /// The format that it was, as a word and by name.
    pub format: String,
    pub format_name: String,
    pub ram_bytes: u64,
    pub disk_bytes: u64,
    pub missing_bytes: u64,
    pub missing_mib: f64,
    pub for_analysis: bool,
    /// The value of `--layout` for a raw file; `null` of others.
    pub layout: Option<String>,
    pub seconds: f64,
    pub notes: Vec<String>,
}

/// `restore`.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
pub(crate) struct RestoreReport {
    pub version: Version,
    pub kind: OfRestore,
    pub path: String,
    pub output: String,
    pub ram_bytes: u64,
    pub disk_bytes: u64,
    /// The value of `--layout` for a raw file; `null` of others.
    pub layout: Option<String>,
    pub for_analysis: bool,
    pub missing_bytes: u64,
    pub missing_mib: f64,
    pub seconds: f64,
    pub notes: Vec<String>,
}

/// `verify`.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
pub(crate) struct VerifyReport {
    pub version: Version,
    pub kind: OfVerify,
    pub path: String,
    pub file_bytes: u64,
    pub digest: String,
    /// Pages that were compared with the dump; `null` without one.
    pub compared_pages: Option<u64>,
    pub disk_pages: u64,
    /// Pages on disks that were checked; `null` without a disk.
    pub checked_disk_pages: Option<u64>,
    pub for_analysis: bool,
    pub missing_bytes: u64,
    pub missing_mib: f64,
    pub seconds: f64,
    pub notes: Vec<String>,
}

/// `attach`.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
pub(crate) struct AttachReport {
    pub version: Version,
    pub kind: OfAttach,
    pub path: String,
    pub output: String,
    pub blobs: Vec<String>,
    pub file_bytes: u64,
    pub disk_bytes: u64,
    pub digest: String,
}

/// `symbols make`.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
pub(crate) struct SymbolsReport {
    pub version: Version,
    pub kind: OfSymbols,
    /// The file that was made.
    pub path: String,
    pub build_id: Option<String>,
    pub banner: Option<String>,
    pub facts: u64,
    pub bytes: u64,
}

/// `share`.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
pub(crate) struct ShareReport {
    pub version: Version,
    pub kind: OfShare,
    /// The file that shares blocks now.
    pub path: String,
    pub in_place: bool,
    pub pages: u64,
    pub found_bytes: u64,
    pub runs: u64,
    pub run_bytes: u64,
    pub short_bytes: u64,
    pub differing_bytes: u64,
    pub shared_bytes_before: u64,
    pub shared_bytes: u64,
    pub gained_bytes: u64,
    pub extents_before: u64,
    pub extents: u64,
    pub seconds: f64,
}
