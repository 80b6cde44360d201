//! The facts that a checkpoint has of itself and of its guest.

use super::disk::DiskInfo;
use crate::{Architecture, PageClass, PageSize, PfnRange, RamLayout, Tally};
use core::fmt;
use core::str::FromStr;

/// A checkpoint's facts about its guest. Only the layout and the page size are needed.
///
/// ```
/// use sonicshot::checkpoint::CheckpointInfo;
/// use sonicshot::{Architecture, Gpa, GpaRange, PageSize, RamLayout};
/// let layout = RamLayout::new(vec![GpaRange::new(Gpa::ZERO, Gpa::new(1 << 20))])?;
/// let mut info = CheckpointInfo::new(layout, PageSize::SIZE_4K);
/// info.architecture = Some(Architecture::X86_64);
/// info.vmm = Some("my-vmm 1.0".into());
/// # Ok::<(), sonicshot::LayoutError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct CheckpointInfo {
    /// The guest's RAM.
    pub layout: RamLayout,
    /// The size of a page, of the guest and of the checkpoint.
    pub page_size: PageSize,
    /// The architecture of the guest's processors, if it is said.
    pub architecture: Option<Architecture>,
    /// The guest kernel's release, as `uname -r` gives it.
    pub kernel_release: Option<String>,
    /// The guest kernel's build ID.
    pub build_id: Option<Vec<u8>>,
    /// The VMM that ran the guest.
    pub vmm: Option<String>,
    /// Pages that the guest uses are missing: they were left out, or the source did not have them.
    /// What is restored can be looked at, and not run.
    pub for_analysis: bool,
    /// The disks that pages are on: their content is not in the checkpoint.
    pub disks: Vec<DiskInfo>,
}

impl CheckpointInfo {
    /// Says nothing but where RAM is.
    #[must_use]
    pub const fn new(layout: RamLayout, page_size: PageSize) -> Self {
        Self {
            layout,
            page_size,
            architecture: None,
            kernel_release: None,
            build_id: None,
            vmm: None,
            for_analysis: false,
            disks: Vec::new(),
        }
    }
}

/// The compression of page data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Compression {
    /// As it is, aligned to pages in the file: can be mapped, read in place and punched.
    #[default]
    None,
    /// LZ4 blocks (feature `lz4`).
    Lz4,
    /// Zstandard frames (feature `zstd`).
    Zstd {
        /// Zstandard's level; 1 is its fastest regular one.
        level: i32,
    },
}

impl Compression {
    /// Zstandard at the level that pays for memory: 1. Higher ones take much longer for pages,
    /// and gain little.
    pub const ZSTD: Self = Self::Zstd { level: 1 };

    /// The codec's name: `none`, `lz4` or `zstd`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Lz4 => "lz4",
            Self::Zstd { .. } => "zstd",
        }
    }

    /// Whether this build can write and read it.
    #[must_use]
    pub const fn is_available(self) -> bool {
        match self {
            Self::None => true,
            Self::Lz4 => cfg!(feature = "lz4"),
            Self::Zstd { .. } => cfg!(feature = "zstd"),
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zstd { level } => write!(f, "zstd:{level}"),
            other => f.pad(other.name()),
        }
    }
}

/// A name that is no compression.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{name}` is no compression: zstd, zstd:LEVEL (-7 to 22), lz4 or none")]
pub struct UnknownCompression {
    /// The name given.
    pub name: String,
}

impl FromStr for Compression {
    type Err = UnknownCompression;

    fn from_str(name: &str) -> Result<Self, UnknownCompression> {
        let unknown = || UnknownCompression { name: name.into() };
        match name {
            "none" => Ok(Self::None),
            "lz4" => Ok(Self::Lz4),
            "zstd" => Ok(Self::ZSTD),
            _ => name
                .strip_prefix("zstd:")
                .and_then(|level| level.parse().ok())
                .filter(|level| (-7..=22).contains(level))
                .map(|level| Self::Zstd { level })
                .ok_or_else(unknown),
        }
    }
}

/// The content of a run of pages after a restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PageContent {
    /// The source had no bytes for it.
    Absent,
    /// Its bytes are in the checkpoint.
    Data {
        /// The number of the run's first page among the stored pages.
        slot: u64,
    },
    /// Every byte is zero.
    Zero,
    /// This word, over and over.
    Fill {
        /// The word, as the guest (little-endian) reads it.
        word: u64,
    },
    /// Left out: the guest does not care about its content, but expects it to read as this
    /// word, over and over.
    Free {
        /// The word; mostly zero.
        word: u64,
    },
    /// Its bytes are on a disk of the guest's.
    Disk {
        /// The number of the [run](crate::checkpoint::DiskRun) that tells where.
        record: u64,
        /// The number, in the guest's order, of that run's page that the first one is.
        page: u64,
    },
}

impl PageContent {
    /// The name that the command line and JSON use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Absent => "absent",
            Self::Data { .. } => "data",
            Self::Zero => "zero",
            Self::Fill { .. } => "fill",
            Self::Free { .. } => "free",
            Self::Disk { .. } => "disk",
        }
    }

    /// The word that every word of the page is, unless it has bytes, stored or on a disk. Absent
    /// pages read as zero.
    #[must_use]
    pub const fn word(self) -> Option<u64> {
        match self {
            Self::Data { .. } | Self::Disk { .. } => None,
            Self::Absent | Self::Zero => Some(0),
            Self::Fill { word } | Self::Free { word } => Some(word),
        }
    }
}

/// A run of pages of one class and one kind of content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRun {
    /// The frames; at most `u32::MAX` of them.
    pub frames: PfnRange,
    /// The use that the guest had for them.
    pub class: PageClass,
    /// Their content.
    pub content: PageContent,
}

/// The content of a checkpoint, in pages and bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct SaveStats {
    /// Pages whose bytes are stored.
    pub data: u64,
    /// Pages that have the same bytes as a stored one.
    pub duplicate: u64,
    /// Pages in use that are zero.
    pub zero: u64,
    /// Pages in use that are one word, over and over.
    pub fill: u64,
    /// Pages left out.
    pub free: u64,
    /// Pages that the source has no bytes for.
    pub absent: u64,
    /// Pages that are on a disk.
    pub on_disk: u64,
    /// Bytes of page data, as stored.
    pub stored_bytes: u64,
    /// The length of the checkpoint in bytes.
    pub file_len: u64,
    /// Runs of pages in the index.
    pub runs: u64,
    /// The digest of the whole file.
    pub digest: u128,
}

impl SaveStats {
    /// Counts a run. `stores` says that its pages are stored for the first time.
    pub(crate) fn count(&mut self, run: &PageRun, stores: bool) {
        let count = match run.content {
            PageContent::Data { .. } if stores => &mut self.data,
            PageContent::Data { .. } => &mut self.duplicate,
            PageContent::Zero => &mut self.zero,
            PageContent::Fill { .. } => &mut self.fill,
            PageContent::Free { .. } => &mut self.free,
            PageContent::Absent => &mut self.absent,
            PageContent::Disk { .. } => &mut self.on_disk,
        };
        *count = Tally::new(*count).and(run.frames.len()).get();
    }
}

#[cfg(test)]
mod tests {
    use super::Compression;

    #[test]
    fn compressions_are_named() {
        for (name, expected) in [
            ("none", Some(Compression::None)),
            ("lz4", Some(Compression::Lz4)),
            ("zstd", Some(Compression::Zstd { level: 1 })),
            ("zstd:19", Some(Compression::Zstd { level: 19 })),
            ("zstd:-5", Some(Compression::Zstd { level: -5 })),
            ("zstd:23", None),
            ("zstd:", None),
            ("gzip", None),
        ] {
            assert_eq!(name.parse().ok(), expected, "{name}");
        }
    }
}
