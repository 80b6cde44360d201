//! The values that `--json` prints: one a line, each with `version`, `kind` and, where it is of a file,
//! `path`. docs/json.md says how they are told apart; docs/json.schema.json is made from these types.
//!
//! Keys and words are never taken away or given another meaning within a version; new ones may come.

mod inspect;
mod live;
mod work;

#[cfg(feature = "libvmi")]
pub(crate) use inspect::LibVmiVersion;
pub(crate) use inspect::{
    CheckpointReport, Classes, Disk, FreeBlocksJson, InspectReport, NamedBlob, OwnerJson, PageJson,
    PerCpuJson, ProcessorJson, ProcessorState, ProcessorsJson, Prunes, RecordJson, Savings,
    StructPageJson, ZoneFreeJson, ZoneJson, ZoneName,
};
pub(crate) use live::{
    Block, PauseParts, PinnedJson, QemuRestoreReport, QemuSaveReport, XenRestoreReport,
    XenSaveReport,
};
use serde::Serialize;
use sonicshot::{Fill, RamLayout};
use std::collections::BTreeMap;
use std::path::Path;
pub(crate) use work::{
    AttachReport, ConvertReport, DiskSearchJson, ErrorReport, ProgressReport, PruneReport, Pruned,
    RestoreReport, SaveReport, ShareReport, Stored, SymbolsReport, VerifyReport,
};

/// The version of what is printed.
const VERSION: u32 = 1;

/// Pages by what they are.
pub(crate) type PagesByName = BTreeMap<String, u64>;

/// The number of the version, the same in each line.
#[derive(Debug, Clone, Copy, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct Version(#[cfg_attr(test, schemars(range(min = 1, max = 1)))] u32);

impl Default for Version {
    fn default() -> Self {
        Self(VERSION)
    }
}

/// A word that says of which kind a line is.
macro_rules! kinds {
    ($($name:ident = $word:literal),* $(,)?) => { $(
        /// The kind of a line.
        #[derive(Debug, Clone, Copy, Default, Serialize)]
        #[cfg_attr(test, derive(schemars::JsonSchema))]
        pub(crate) enum $name {
            /// The one.
            #[default]
            #[serde(rename = $word)]
            It,
        }
    )* };
}
kinds! {
    OfAttach = "attach",
    OfCheckpoint = "checkpoint",
    OfConvert = "convert",
    OfError = "error",
    OfInspect = "inspect",
    OfProgress = "progress",
    OfPrune = "prune",
    OfQemuRestore = "qemu_restore",
    OfQemuSave = "qemu_save",
    OfRestore = "restore",
    OfSave = "save",
    OfShare = "share",
    OfSymbols = "symbols",
    OfVerify = "verify",
    OfXenRestore = "xen_restore",
    OfXenSave = "xen_save",
}

/// A range of numbers: the first, and the one behind the last.
#[derive(Debug, Clone, Copy, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct Range(pub u64, pub u64);

/// The ranges of RAM, in guest-physical addresses.
pub(crate) fn ram(layout: &RamLayout) -> Vec<Range> {
    let regions = layout.regions().iter();
    regions
        .map(|region| Range(region.start().raw(), region.end().raw()))
        .collect()
}

/// A name as a machine word: `ELF core` is `elf_core`.
pub(crate) fn word(name: &str) -> String {
    let parts = name.split(|c: char| !c.is_ascii_alphanumeric());
    let parts: Vec<String> = parts
        .filter(|part| !part.is_empty())
        .map(str::to_ascii_lowercase)
        .collect();
    parts.join("_")
}

/// A path as it was given.
pub(crate) fn path(path: &Path) -> String {
    path.display().to_string()
}

/// Pages by what put them there.
pub(crate) fn by_name(pages: &[(&'static str, u64)]) -> PagesByName {
    let entries = pages.iter();
    entries
        .map(|(name, pages)| ((*name).to_owned(), *pages))
        .collect()
}

/// The content that a guest expects of free pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub(crate) enum FreeFill {
    /// Anything.
    Any,
    /// Zeroes.
    Zero,
    /// A byte, over and over: `free_fill_byte` says which.
    Byte,
    /// Something that has no word here.
    Unknown,
}

/// The word, and the byte.
pub(crate) fn free_fill(fill: Fill) -> (FreeFill, Option<u8>) {
    match fill {
        Fill::Zero => (FreeFill::Zero, None),
        Fill::Byte(byte) => (FreeFill::Byte, Some(byte)),
        Fill::Any => (FreeFill::Any, None),
        _ => (FreeFill::Unknown, None),
    }
}

/// A line as it is printed.
pub(crate) fn line(report: &impl Serialize) -> String {
    // Nothing in the types has keys that are no texts, and nothing in them fails.
    serde_json::to_string(report).unwrap_or_else(|error| {
        format!("{{\"version\":{VERSION},\"kind\":\"error\",\"error\":\"{error}\"}}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    /// Any line that is printed.
    #[derive(schemars::JsonSchema)]
    #[serde(untagged)]
    #[expect(dead_code, reason = "its schema alone is wanted")]
    enum Line {
        Attach(AttachReport),
        Checkpoint(CheckpointReport),
        Convert(ConvertReport),
        Error(ErrorReport),
        Inspect(InspectReport),
        Progress(ProgressReport),
        Prune(PruneReport),
        QemuRestore(QemuRestoreReport),
        QemuSave(QemuSaveReport),
        Restore(RestoreReport),
        Save(SaveReport),
        Share(ShareReport),
        Symbols(SymbolsReport),
        Verify(VerifyReport),
        XenRestore(XenRestoreReport),
        XenSave(XenSaveReport),
    }

    /// `SONICSHOT_WRITE_SCHEMA=1` writes it anew.
    #[test]
    fn the_schema_in_docs_is_that_of_these_types() {
        let settings = schemars::generate::SchemaSettings::draft2020_12().for_serialize();
        let schema = settings.into_generator().into_root_schema_for::<Line>();
        let made = serde_json::to_string_pretty(&schema).unwrap() + "\n";
        let file = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs/json.schema.json");
        if std::env::var_os("SONICSHOT_WRITE_SCHEMA").is_some() {
            std::fs::write(&file, &made).unwrap();
        }
        let committed = std::fs::read_to_string(&file).unwrap();
        assert!(
            committed == made,
            "docs/json.schema.json is not what the types make: SONICSHOT_WRITE_SCHEMA=1"
        );
    }

    #[test]
    fn names_are_words() {
        assert_eq!(word("ELF core"), "elf_core");
        assert_eq!(
            word("Xen save image (HVM or PVH)"),
            "xen_save_image_hvm_or_pvh"
        );
        assert_eq!(free_fill(Fill::Byte(0xaa)), (FreeFill::Byte, Some(0xaa)));
    }
}
