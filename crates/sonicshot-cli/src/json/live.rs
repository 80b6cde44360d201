//! The JSON of commands on guests that run.

use super::{Disk, DiskSearchJson, OfQemuRestore, OfQemuSave, OfXenRestore, OfXenSave, Version};
use serde::Serialize;
use std::collections::BTreeMap;

/// `xen save`.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
pub(crate) struct XenSaveReport {
    pub version: Version,
    pub kind: OfXenSave,
    pub path: String,
    pub domain: u32,
    pub pruned: bool,
    /// Why nothing was left out.
    pub reason: Option<String>,
    pub kernel_release: Option<String>,
    pub total_pages: Option<u64>,
    pub dropped_pages: u64,
    pub dropped_bytes: u64,
    /// `zstd` or `lz4`.
    pub compression: Option<&'static str>,
    pub file_bytes: u64,
    pub seconds: f64,
    pub suspended_seconds: Option<f64>,
    /// Of the look while the domain ran.
    pub first_look_seconds: f64,
    /// Of the look while it was suspended.
    pub look_seconds: Option<f64>,
    pub notes: Option<Vec<String>>,
    /// Of a checkpoint: the disks that it refers to.
    pub disks: Vec<Disk>,
    /// Pages that are on them.
    pub disk_pages: u64,
    /// Of a checkpoint: the search for them.
    pub disk_search: Option<DiskSearchJson>,
}

/// `xen restore`.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
pub(crate) struct XenRestoreReport {
    pub version: Version,
    pub kind: OfXenRestore,
    pub path: String,
    pub seconds: f64,
    pub notes: Vec<String>,
}

/// A block of a guest's memory.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
pub(crate) struct Block {
    pub block: String,
    pub bytes: u64,
    pub kind: String,
}

/// A disk that was pinned in a pause: the guest writes to the overlay since.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
pub(crate) struct PinnedJson {
    pub name: String,
    pub base: String,
    pub overlay: String,
}

/// The parts of a pause, with the seconds of each.
pub(crate) type PauseParts = BTreeMap<&'static str, f64>;

/// `qemu save`.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
pub(crate) struct QemuSaveReport {
    pub version: Version,
    pub kind: OfQemuSave,
    pub path: String,
    /// QEMU's version.
    pub qemu: String,
    pub pid: i32,
    pub machine: String,
    pub ram: Vec<Block>,
    pub kernel_release: String,
    pub ram_bytes: u64,
    pub dropped_bytes: u64,
    pub file_bytes: u64,
    pub found_paused: bool,
    /// From the first word to QEMU until the guest was to be paused.
    pub before_pause_seconds: f64,
    pub pause_seconds: Option<f64>,
    /// The parts of the pause, one after the other: `stop`, `pin` (the disks), `devices`,
    /// `reread` (what was looked at before), `classify`, `copy`, `resume`.
    pub pause_parts: PauseParts,
    pub seconds: f64,
    /// Why the first look failed, while the guest ran.
    pub first_look: Option<String>,
    pub notes: Vec<String>,
    /// The state of the guest's disks, in words.
    pub disks: String,
    /// Disks that were pinned in the pause.
    pub pinned_disks: Vec<PinnedJson>,
    /// Pages that are on the guest's disks.
    pub disk_pages: u64,
}

/// `qemu restore`.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
pub(crate) struct QemuRestoreReport {
    pub version: Version,
    pub kind: OfQemuRestore,
    pub path: String,
    /// QEMU's version.
    pub qemu: String,
    pub pid: i32,
    /// The way in which its memory came, as a word.
    pub how: String,
    /// Why it was not by postcopy.
    pub why: Option<String>,
    pub paused: bool,
    pub ready_seconds: f64,
    pub seconds: f64,
    pub raw_file_seconds: Option<f64>,
}
