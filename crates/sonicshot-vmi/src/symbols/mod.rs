//! The sources of the kernel's symbols and types.
//!
//! | source | symbols | types | where |
//! |---|---|---|---|
//! | [`SystemMap`] | yes | | a file |
//! | [`Vmlinux`] | yes | BTF or DWARF | a file |
//! | [`Btf`] | | yes | a file, or the kernel's image in guest memory |
//! | [`Vmcoreinfo`] | some | some | guest memory, or a dump's note |
//! | [`Kallsyms`] | yes | | guest memory |
//! | [`SymbolFile`] | those that are needed | those that are needed | a file of some kilobytes, made of the others |

mod btf;
mod bytes;
mod dwarf;
mod elf;
mod file;
mod given;
mod kallsyms;
mod names;
mod own;
mod system_map;
mod vmcoreinfo;

pub use btf::{Btf, find_btf};
pub use elf::Vmlinux;
pub(crate) use elf::{MAX_NOTES, build_id_of_notes};
pub use file::SymbolFile;
pub(crate) use file::{MAX_BUILD_ID, hex};
pub(crate) use given::Given;
pub use kallsyms::Kallsyms;
pub use system_map::SystemMap;
pub use vmcoreinfo::Vmcoreinfo;
pub(crate) use vmcoreinfo::VmcoreinfoLines;

use crate::{KernelVa, VirtualMemory, VirtualReadError};
use core::fmt;
use own::OwnFile;
use sonicshot::{
    Gpa, GpaRange, GuestMemory, PhaseProgress, Progress, Tally, WorkPhase, next_present, to_u64,
    to_usize,
};
use std::io;
use std::path::{Path, PathBuf};

/// A member of a kernel structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Member {
    /// Offset from the start of the structure that was asked for, in bytes.
    pub offset: u64,
    /// Size in bytes, if the source knows it.
    pub size: Option<u64>,
    /// The number of elements if the member is an array (of its outermost dimension).
    pub len: Option<u64>,
}

/// Whether a source's addresses are the ones of the running kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SymbolBase {
    /// As linked: the KASLR displacement must be added.
    Linked,
    /// As running: read from the guest's own memory.
    Running,
}

/// Symbols and types of one kernel build.
///
/// `None` means that this source does not have it, never that the kernel does not; `Err` means
/// that the source is damaged.
pub trait SymbolSource: Send + Sync + fmt::Debug {
    /// The source's name, for messages: a path, or such as `kallsyms in guest memory`.
    fn origin(&self) -> &str;

    /// Whether [`symbol`](Self::symbol) gives linked or running addresses.
    fn base(&self) -> SymbolBase {
        SymbolBase::Linked
    }

    /// Whether this is VMCOREINFO, which gives the value instead of the address of some
    /// variables (`mem_section`, `vmemmap`).
    fn is_vmcoreinfo(&self) -> bool {
        false
    }

    /// Whether a symbol that a table with `init_task` does not have is none of the kernel's: not so
    /// if the source may fail to tell one that there is.
    fn tells_all(&self) -> bool {
        true
    }

    /// The address of symbol `name`.
    ///
    /// # Errors
    /// [`SymbolError`] if the source is damaged.
    fn symbol(&self, name: &str) -> Result<Option<KernelVa>, SymbolError> {
        let _ = name;
        Ok(None)
    }

    /// The size of `struct` or `union` `name` in bytes.
    ///
    /// # Errors
    /// [`SymbolError`] if the source is damaged.
    fn type_size(&self, name: &str) -> Result<Option<u64>, SymbolError> {
        let _ = name;
        Ok(None)
    }

    /// The member `path` of `struct name`; `path` may be dotted (`a.b`), and members of
    /// anonymous structures and unions count as members of the one around them.
    ///
    /// # Errors
    /// [`SymbolError`] if the source is damaged.
    fn member(&self, name: &str, path: &str) -> Result<Option<Member>, SymbolError> {
        let _ = (name, path);
        Ok(None)
    }

    /// The value of the enumerator `name`, of whatever enum.
    ///
    /// # Errors
    /// [`SymbolError`] if the source is damaged.
    fn constant(&self, name: &str) -> Result<Option<i64>, SymbolError> {
        let _ = name;
        Ok(None)
    }

    /// The kernel's build-id, if the source carries it.
    fn build_id(&self) -> Option<&[u8]> {
        None
    }

    /// The kernel's banner (`Linux version …`), if the source carries it.
    fn banner(&self) -> Option<&str> {
        None
    }
}

/// The reason that a source of symbols cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SymbolError {
    /// The file cannot be read.
    #[error("reading {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's error.
        #[source]
        source: io::Error,
    },
    /// The file is no kind that is known.
    #[error("{} is neither a System.map, nor an ELF vmlinux, nor BTF, nor a SonicShot symbol file", path.display())]
    UnknownKind {
        /// The file.
        path: PathBuf,
    },
    /// A folder has more files than are looked at.
    #[error("{} has more than {most} files, and no folder of symbol files does", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// The most files that it may have.
        most: usize,
    },
    /// The sources do not tell what is needed of a kernel.
    #[error("{origin} does not have {what}")]
    Lacks {
        /// The sources.
        origin: String,
        /// The missing part.
        what: &'static str,
    },
    /// A symbol file was made by a version that asked less.
    #[error(
        "{origin} does not say whether the kernel has {what}: it was made by another version, and has to be made again"
    )]
    Outdated {
        /// The file.
        origin: String,
        /// The first row that is missing.
        what: String,
    },
    /// Two sources that were to be of one build are not.
    #[error("{first} and {second} are not of the same build: they disagree on {what}")]
    Differ {
        /// One source.
        first: String,
        /// The other.
        second: String,
        /// On what.
        what: String,
    },
    /// The source is damaged, as was found when it was first used.
    #[error("{origin}: {text}")]
    Damaged {
        /// The source.
        origin: String,
        /// The fault.
        text: String,
    },
    /// The source contradicts its own format.
    #[error("{origin}: {what} at offset {offset:#x} (value {value:#x})")]
    Malformed {
        /// The source.
        origin: String,
        /// The fault.
        what: &'static str,
        /// The place, in bytes from the start of the source.
        offset: u64,
        /// The value found there.
        value: u64,
    },
}

/// Opens a file of symbols or types; its kind is told by its content.
///
/// # Errors
/// [`SymbolError`] if it cannot be read, is of no known kind, or is damaged.
pub fn open_symbol_file(path: &Path) -> Result<Box<dyn SymbolSource>, SymbolError> {
    let own = OwnFile::open(path)?;
    let origin = path.display().to_string();
    match own.bytes() {
        [0x7f, b'E', b'L', b'F', ..] => Ok(Box::new(Vmlinux::new(origin, own)?)),
        start if start.starts_with(file::MAGIC) => Ok(Box::new(SymbolFile::parse(origin, start)?)),
        [0x9f, 0xeb, ..] => Ok(Box::new(Btf::new(origin, own)?)),
        [first, ..] if first.is_ascii_hexdigit() => Ok(Box::new(SystemMap::open(path)?)),
        _ => Err(SymbolError::UnknownKind {
            path: path.to_owned(),
        }),
    }
}

/// Whether the kernel whose image is in `range` makes a VMCOREINFO: it has what each line of that
/// is made with (`VMCOREINFO_SYMBOL`, `include/linux/vmcore_info.h`, the same since 2.6.24). Also
/// true if some of the image cannot be read: what is not seen may be there.
pub(crate) fn may_write_vmcoreinfo(
    memory: &dyn VirtualMemory,
    range: (KernelVa, KernelVa),
) -> bool {
    /// No architecture has smaller pages.
    const PAGE: u64 = 4096;
    let (mut at, end) = range;
    while at < end {
        match memory.read(at, &mut [0]) {
            Ok(()) | Err(VirtualReadError::NotMapped { .. }) => {}
            Err(_) => return true,
        }
        let Some(next) = at.checked_add(PAGE) else {
            break;
        };
        at = next;
    }
    let mut found = false;
    scan(memory, range, b"SYMBOL(%s)=%lx\n", &mut |_| {
        found = true;
        false
    });
    found
}

/// Calls `visit` with every address in `range` at which `needle` stands, lowest first, until it
/// returns `false`. Addresses that are not mapped are passed over.
pub(crate) fn scan(
    memory: &dyn VirtualMemory,
    range: (KernelVa, KernelVa),
    needle: &[u8],
    visit: &mut dyn FnMut(KernelVa) -> bool,
) {
    const PIECE: usize = 1 << 20;
    /// No architecture has smaller pages.
    const PAGE: usize = 4096;
    let Some(overlap) = needle.len().checked_sub(1) else {
        return;
    };
    let mut piece = vec![0; PIECE];
    let mut bytes: Vec<u8> = Vec::new();
    let mut at = range.0;
    while let Some(left) = range.1.offset_from(at).filter(|left| *left > 0) {
        // The end of the piece before stays: a hit may cross.
        let Some(base) = at.checked_sub(to_u64(bytes.len())) else {
            return;
        };
        let len = to_usize(left).min(piece.len());
        let (piece, _) = piece.split_at_mut(len);
        let whole = memory.read(at, piece).is_ok();
        let mut step = piece.len();
        if whole {
            bytes.extend_from_slice(piece);
        } else {
            // Some of it is not mapped: a page at a time, up to the gap, which is passed over.
            for (offset, part) in (0..).step_by(PAGE).zip(piece.chunks_mut(PAGE)) {
                let here = at.checked_add(to_u64(offset));
                if here.is_none_or(|here| memory.read(here, part).is_err()) {
                    step = offset;
                    break;
                }
                bytes.extend_from_slice(part);
            }
        }
        for hit in memchr::memmem::find_iter(&bytes, needle) {
            if let Some(hit) = base.checked_add(to_u64(hit))
                && !visit(hit)
            {
                return;
            }
        }
        let mut next = at.checked_add(to_u64(step));
        if step == piece.len() {
            if let Some(done) = bytes.len().checked_sub(overlap) {
                bytes.drain(..done);
            }
        } else {
            bytes.clear();
            next = next.and_then(|gap| gap.checked_add(to_u64(PAGE)));
        }
        let Some(next) = next else {
            return;
        };
        at = next;
    }
}

/// Guest-physical memory, at the addresses that it has.
struct Physical<'m>(&'m dyn GuestMemory);

impl VirtualMemory for Physical<'_> {
    fn read(&self, at: KernelVa, buf: &mut [u8]) -> Result<(), VirtualReadError> {
        let there = Gpa::new(at.raw());
        self.0
            .read(there, buf)
            .map_err(|source| VirtualReadError::Memory { at, source })
    }
}

/// The ranges of `region` in which something may be found, lowest first; of a source that cannot
/// tell, all. Each is asked for once: it may take a look at all of a dump's descriptors.
pub(crate) fn there<'a>(
    memory: &'a dyn GuestMemory,
    region: &GpaRange,
) -> impl Iterator<Item = GpaRange> + 'a {
    let (mut at, end) = (region.start(), region.end());
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let data = next_present(memory, at).unwrap_or_else(|_| memory.next_data(at))?;
        let (start, behind) = (data.start().max(at), data.end().min(end));
        // What goes back would never end.
        if start >= behind {
            return None;
        }
        at = behind;
        Some(GpaRange::new(start, behind))
    })
}

/// Calls `visit` with each place in RAM at which `needle` stands, until it returns `false`.
pub(crate) fn search(
    memory: &dyn GuestMemory,
    progress: &dyn Progress,
    needle: &[u8],
    visit: &mut dyn FnMut(Gpa) -> bool,
) {
    /// The number of bytes that are searched before the mapping is released.
    const WINDOW: u64 = 64 << 20;
    let overlap = to_u64(needle.len());
    let mut goes_on = true;
    let total = memory.layout().bytes();
    let mut phase = PhaseProgress::begin(progress, WorkPhase::FindingKernel, total);
    let mut before = Tally::ZERO;
    for region in memory.layout().regions() {
        for data in there(memory, region) {
            let mut start = data.start();
            while start < data.end() {
                let cut = |at: Option<Gpa>, last: Gpa| at.map_or(last, |at| at.min(last));
                let end = cut(start.checked_add(WINDOW), data.end());
                // One may go on behind the window.
                let reach = cut(end.checked_add(overlap), region.end());
                let range = (KernelVa::new(start.raw()), KernelVa::new(reach.raw()));
                scan(&Physical(memory), range, needle, &mut |hit| {
                    let hit = Gpa::new(hit.raw());
                    goes_on = hit >= end || visit(hit);
                    goes_on
                });
                memory.release(GpaRange::new(start, end));
                if !goes_on {
                    phase.end();
                    return;
                }
                start = end;
                let here = start.offset_from(region.start());
                phase.reach(here.map_or(before, |here| before.and(here)).get());
            }
        }
        before.add(region.len());
    }
    phase.end();
}
