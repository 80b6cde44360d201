//! Memory dump files as guest memory, read without copying and pruned.
#![cfg_attr(not(test), warn(clippy::arithmetic_side_effects))]
#![deny(unsafe_code)]

mod avml;
mod elf_core;
mod error;
mod kdump;
mod kdump_write;
mod layout;
mod lime;
mod mapped;
mod output;
mod paged;
mod prune;
mod raw;
mod restore;

use elf_core::ElfCore;
pub use error::DumpError;
#[doc(hidden)]
pub use kdump::KdumpFile;
#[doc(hidden)]
pub use kdump_write::{
    KdumpCompression, KdumpOptions, KdumpWriteError, KdumpWriteStats, write_kdump,
};
pub use layout::{LayoutSpec, LayoutSpecError};
use mapped::MappedDump;
pub use output::Overwrite;
pub use prune::{Progress, PruneStats};
pub use restore::{CoreNotes, DumpFile, NewFile};
use sonicshot::{Gpa, GpaRange, GuestMemory, Mapped, MemoryError, RamLayout};
use std::path::Path;

/// A dump file: the guest's memory, and how the file holds it.
///
/// ```no_run
/// use sonicshot::GuestMemory;
/// use sonicshot_dump::{Dump, LayoutSpec};
/// let dump = Dump::open("guest.raw", Some(&LayoutSpec::Pc))?;
/// println!("{}: {} bytes of RAM", dump.format(), dump.layout().bytes());
/// # Ok::<(), sonicshot_dump::DumpError>(())
/// ```
#[derive(Debug)]
pub struct Dump {
    mapped: MappedDump,
    format: Format,
}

/// What is known of the file beside where RAM lies in it. A new format is one module that makes
/// extents, one variant here, and one line in [`FORMATS`].
#[derive(Debug)]
pub(crate) enum Format {
    Raw { layout: LayoutSpec },
    ElfCore(ElfCore),
}

/// A guest's processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Machine {
    /// x86-64.
    X86_64,
    /// arm64.
    Aarch64,
}

/// What opens a file that begins with some magic bytes.
enum Opener {
    ElfCore,
    /// Known, but not supported: what it is.
    NotYet(&'static str),
}

/// How each format begins: offset, bytes.
const FORMATS: &[(usize, &[u8], Opener)] = &[
    (
        0,
        b"\x89SONIC\r\n",
        Opener::NotYet("a checkpoint, to be restored or inspected"),
    ),
    (0, b"\x7fELF", Opener::ElfCore),
    (
        0,
        b"QEVM",
        Opener::NotYet("a QEMU migration stream or mapped-ram file"),
    ),
    (
        0,
        b"LibvirtQemudSave",
        Opener::NotYet("a libvirt save image"),
    ),
    (
        0,
        b"LibvirtQemudPart",
        Opener::NotYet("an unfinished libvirt save image"),
    ),
    (0, b"KDUMP   ", Opener::NotYet("a kdump-compressed dump")),
    (
        0,
        b"makedumpfile",
        Opener::NotYet("a flattened kdump-compressed dump"),
    ),
    (0, &[0x45, 0x4d, 0x69, 0x4c], Opener::NotYet("a LiME dump")),
    (0, &[0x41, 0x56, 0x4d, 0x4c], Opener::NotYet("an AVML dump")),
    (0, b"Xen saved domain", Opener::NotYet("an xl save image")),
    (8, b"XENF", Opener::NotYet("a libxc migration stream")),
    (
        0,
        &[0x28, 0xb5, 0x2f, 0xfd],
        Opener::NotYet("compressed with zstd"),
    ),
    (0, &[0x1f, 0x8b], Opener::NotYet("compressed with gzip")),
    (
        0,
        &[0xfd, b'7', b'z', b'X', b'Z', 0],
        Opener::NotYet("compressed with xz"),
    ),
];

impl Dump {
    /// Opens the dump at `path`, its kind told by its content. What has no known beginning is
    /// raw RAM, laid out by `layout`, by default [`LayoutSpec::Pc`].
    ///
    /// # Errors
    /// [`DumpError`] if the file cannot be read, is no dump, or contradicts itself.
    pub fn open(path: impl AsRef<Path>, layout: Option<&LayoutSpec>) -> Result<Self, DumpError> {
        let path = path.as_ref();
        let not_a_dump = |why| DumpError::NotADump {
            path: path.to_owned(),
            why,
        };
        let metadata = std::fs::metadata(path).map_err(DumpError::io("opening", path))?;
        if !metadata.is_file() {
            return Err(not_a_dump("it is not a regular file"));
        }
        if metadata.len() == 0 {
            return Err(not_a_dump("it is empty"));
        }
        let (file, map) = mapped::map_file(path)?;
        let opener = FORMATS.iter().find(|(offset, magic, _)| {
            let there = mapped::whole(&map).get(*offset, magic.len());
            let mut copy = [0; 16];
            there
                .zip(copy.get_mut(..magic.len()))
                .is_some_and(|(there, copy)| there.copy_to(copy) && copy == *magic)
        });
        let (extents, format) = match opener {
            Some((_, _, Opener::NotYet(kind))) => {
                return Err(DumpError::Unsupported {
                    path: path.to_owned(),
                    kind,
                });
            }
            Some((_, _, Opener::ElfCore)) => {
                let core = ElfCore::parse(path, mapped::whole(&map))?;
                (core.extents(path, map.len() as u64)?, Format::ElfCore(core))
            }
            None => {
                if !metadata.len().is_multiple_of(4096) {
                    return Err(not_a_dump(
                        "it begins as no known format, and its length is no multiple of 4 KiB",
                    ));
                }
                let layout = layout.cloned().unwrap_or(LayoutSpec::Pc);
                let extents = raw::extents(path, map.len() as u64, &layout)?;
                (extents, Format::Raw { layout })
            }
        };
        Ok(Self {
            mapped: MappedDump::new(path, file, map, extents)?,
            format,
        })
    }

    /// The format's name.
    #[must_use]
    pub fn format(&self) -> &'static str {
        match self.format {
            Format::Raw { .. } => "raw RAM",
            Format::ElfCore(_) => "ELF core",
        }
    }

    /// The layout of a raw file; `None` if the format itself says where RAM lies.
    #[must_use]
    pub fn layout_spec(&self) -> Option<&LayoutSpec> {
        match &self.format {
            Format::Raw { layout } => Some(layout),
            Format::ElfCore(_) => None,
        }
    }

    /// The VMCOREINFO text that the dump carries beside the memory, if it does.
    #[must_use]
    pub fn vmcoreinfo(&self) -> Option<&[u8]> {
        match &self.format {
            Format::ElfCore(core) => core.vmcoreinfo.as_deref(),
            Format::Raw { .. } => None,
        }
    }

    /// The notes that the dump carries beside the memory, as an ELF core has them.
    #[must_use]
    pub fn core_notes(&self) -> Option<Vec<u8>> {
        match &self.format {
            Format::ElfCore(core) => core.notes(self.mapped.bytes()),
            Format::Raw { .. } => None,
        }
    }

    /// The file.
    #[must_use]
    pub fn file(&self) -> &std::fs::File {
        self.mapped.file()
    }

    /// The processor that the dump says the guest has, if it says.
    #[must_use]
    pub fn machine(&self) -> Option<Machine> {
        match &self.format {
            Format::ElfCore(core) => Some(core.machine),
            Format::Raw { .. } => None,
        }
    }

    /// The length of the file in bytes.
    #[must_use]
    pub fn file_len(&self) -> u64 {
        self.mapped.file().metadata().map_or(0, |m| m.len())
    }

    pub(crate) fn mapped(&self) -> &MappedDump {
        &self.mapped
    }

    pub(crate) fn format_data(&self) -> &Format {
        &self.format
    }
}

impl GuestMemory for Dump {
    fn layout(&self) -> &RamLayout {
        self.mapped.layout()
    }

    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.mapped.read(at, buf)
    }

    fn map(&self, at: Gpa, len: usize) -> Result<Option<Mapped<'_>>, MemoryError> {
        self.mapped.map(at, len)
    }

    fn next_data(&self, at: Gpa) -> Option<GpaRange> {
        self.mapped.next_data(at)
    }

    fn release(&self, range: GpaRange) {
        self.mapped.release(range);
    }
}
