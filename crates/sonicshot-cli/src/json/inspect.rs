//! The JSON that `inspect` prints.

use super::work::Stored;
use super::{FreeFill, OfCheckpoint, OfInspect, PagesByName, Range, Version};
use serde::Serialize;

/// The share of the file that a prune leaves.
#[derive(Debug, Clone, Copy, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct Savings {
    /// The bytes that the file takes on disk now, and about how many after a prune; `null` where
    /// there is no file.
    pub disk_before: Option<u64>,
    pub disk_after: Option<u64>,
    pub droppable_pages: u64,
    pub droppable_bytes: u64,
}

/// The pages of each class, and how many of them hold only zeroes.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct Classes {
    pub classes: PagesByName,
    pub classes_zero: PagesByName,
}

/// `inspect` of memory.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct InspectReport {
    pub version: Version,
    pub kind: OfInspect,
    pub path: String,
    /// The VMM whose snapshot's folder it is.
    pub vmm: Option<String>,
    /// The format, as a word and by name.
    pub format: String,
    pub format_name: String,
    pub file_bytes: Option<u64>,
    /// The library, of a guest that LibVMI reads.
    pub libvmi: Option<LibVmiVersion>,
    pub kernel_release: String,
    pub kernel_banner: Option<String>,
    pub symbol_sources: Vec<String>,
    /// The knowledge of the kernel: `types`, `vmcoreinfo`, `shape`.
    pub knowledge: String,
    /// The value of `--layout`; `null` where the file says it.
    pub layout: Option<String>,
    pub layout_origin: Option<String>,
    pub ram: Vec<Range>,
    pub processors: Option<ProcessorsJson>,
    pub page_size: u64,
    pub total_pages: u64,
    #[serde(flatten)]
    pub classes: Classes,
    pub zero_in_use_pages: u64,
    /// Memory that the file does not have.
    pub missing_bytes: u64,
    pub missing_mib: f64,
    /// The pages of it that the guest uses; `null` where that is not told.
    pub missing_in_use_pages: Option<u64>,
    /// Why the file is not whole.
    pub incomplete: Option<String>,
    #[serde(flatten)]
    pub savings: Savings,
    /// All pages that hold only zeroes, free ones too.
    pub zero_pages: u64,
    pub free_fill: FreeFill,
    pub free_fill_byte: Option<u8>,
    pub zones: Vec<ZoneJson>,
    pub inconsistent_blocks: u64,
    /// The time that a guest that LibVMI reads was paused; else `null`.
    pub paused_seconds: Option<f64>,
    pub notes: Vec<String>,
    /// The frame that `--explain` names.
    pub page: Option<Box<PageJson>>,
    /// The lists of free blocks, with `--free-lists`.
    pub free_lists: Option<Vec<ZoneFreeJson>>,
}

/// `inspect` of a checkpoint.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct CheckpointReport {
    pub version: Version,
    pub kind: OfCheckpoint,
    pub path: String,
    pub vmm: Option<String>,
    /// `checkpoint`, and its name.
    pub format: String,
    pub format_name: String,
    pub kernel_release: Option<String>,
    pub build_id: Option<String>,
    pub architecture: String,
    pub compression: String,
    pub chunk_size: u32,
    pub ram: Vec<Range>,
    pub total_pages: u64,
    #[serde(flatten)]
    pub classes: Classes,
    pub for_analysis: bool,
    pub missing_bytes: u64,
    pub missing_mib: f64,
    pub notes: Vec<String>,
    pub blobs: Vec<NamedBlob>,
    pub disks: Vec<Disk>,
    pub disk_runs: u64,
    pub on_disk_bytes: u64,
    #[serde(flatten)]
    pub stored: Stored,
    /// Why a frame is kept or was left out, if that was asked for.
    pub page: Option<Box<PageJson>>,
    /// The kernel's lists of free blocks, if they were asked for.
    pub free_lists: Option<Vec<ZoneFreeJson>>,
}

/// A file that a checkpoint has besides the memory.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
pub(crate) struct NamedBlob {
    pub name: String,
    pub bytes: u64,
}

/// A disk that pages of a checkpoint are on.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
pub(crate) struct Disk {
    pub name: String,
    pub bytes: u64,
    pub hash: String,
    pub marks: Vec<String>,
}

/// The LibVMI that was loaded.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
pub(crate) struct LibVmiVersion {
    pub file: Option<String>,
    pub version: Option<String>,
    pub events_version: Option<u32>,
    pub maps_pages: bool,
}

/// A guest's processors, or why they are not told.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(untagged)]
pub(crate) enum ProcessorsJson {
    Known(Vec<ProcessorJson>),
    NotTold { not_told: String },
}

/// A processor.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
pub(crate) struct ProcessorJson {
    pub state: ProcessorState,
    /// The root of its page tables.
    pub cr3: Option<u64>,
}

/// The state of a processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub(crate) enum ProcessorState {
    NotStarted,
    Parked,
    InSmm,
    InNestedGuest,
    Started,
    Unknown,
}

/// A zone's numbers of free pages.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
pub(crate) struct ZoneJson {
    pub node: u64,
    pub name: String,
    pub first_pfn: u64,
    pub end_pfn: u64,
    /// Pages in blocks that the lists name, and in blocks with the mark of a free one.
    pub free_listed: u64,
    pub free_flagged: u64,
    /// Pages by the counters `nr_free`, and by `NR_FREE_PAGES`.
    pub nr_free: u64,
    pub nr_free_pages: i64,
    /// Listed pages in isolated blocks.
    pub isolated: u64,
    /// Pages on the processors' lists.
    pub pcp: u64,
}

/// Which zone of which node.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
pub(crate) struct ZoneName {
    pub node: u64,
    pub name: String,
}

/// Why a frame is kept or dropped.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
pub(crate) struct PageJson {
    pub pfn: u64,
    /// Its guest-physical address.
    pub gpa: u64,
    pub class: String,
    /// Whether it holds only zeroes; always false of pages that are not in use.
    pub zero: bool,
    /// The content that a checkpoint has of it; `null` of other files.
    pub content: Option<String>,
    /// The decision of a prune of what goes by default; of a checkpoint, whether it was left out.
    pub prune: Prunes,
    pub zones: Vec<ZoneName>,
    pub struct_page: Option<StructPageJson>,
    /// The record of the first page, if it is in a larger folio.
    pub folio: Option<StructPageJson>,
    pub owner: Option<OwnerJson>,
    pub records: Vec<RecordJson>,
}

/// The decision of a prune on a frame.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
pub(crate) struct Prunes {
    pub drops: bool,
    pub why: String,
}

/// A `struct page`.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
pub(crate) struct StructPageJson {
    pub pfn: u64,
    pub at: u64,
    pub flags: u64,
    pub flag_names: Vec<String>,
    pub refcount: u32,
    pub mapcount: u32,
    pub page_type: Option<String>,
    pub mapping: u64,
    pub private: u64,
}

/// Whom a page belongs to.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
pub(crate) struct OwnerJson {
    /// `anonymous`, `ksm`, `file`, `slab`, `movable`, `none`.
    pub kind: String,
    pub at: Option<u64>,
    pub name: Option<String>,
}

/// The statement of one record on whether a frame is free.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
pub(crate) struct RecordJson {
    /// `mark`, `list`, `struct_page`, `block`, `zone`, `counters`.
    pub record: String,
    pub says_free: Option<bool>,
    pub what: String,
}

/// The free blocks of a zone.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
pub(crate) struct ZoneFreeJson {
    pub node: u64,
    pub name: String,
    pub first_pfn: u64,
    pub end_pfn: u64,
    pub lists: Vec<FreeBlocksJson>,
    /// Blocks of each order that are listed, and that the counters have.
    pub listed: Vec<u64>,
    pub nr_free: Vec<u64>,
    /// Pages that are listed, and that `NR_FREE_PAGES` has, which isolated ones are not in.
    pub listed_pages: Option<u64>,
    pub isolated_pages: u64,
    pub nr_free_pages: i64,
    pub per_cpu: Vec<PerCpuJson>,
    /// The contradictions of the counters.
    pub disagreements: Vec<String>,
}

/// The blocks of one order on one list.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
pub(crate) struct FreeBlocksJson {
    pub order: u32,
    /// The migrate type of a list of the buddy allocator.
    pub migrate_type: Option<String>,
    /// The processor whose list it is.
    pub cpu: Option<u64>,
    pub blocks: u64,
    pub pages: Option<u64>,
    pub torn: u64,
    /// The first frames of the first blocks.
    pub first_pfns: Vec<u64>,
}

/// A processor's free pages.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
pub(crate) struct PerCpuJson {
    pub cpu: u64,
    pub counted: u64,
    pub listed: u64,
}
