//! The files that VMMs and dump tools write of a guest's memory: read as guest memory, most of
//! them without copying, and pruned.
//!
//! [`Dump::open`] tells a file's format by its content. A `Dump` is a
//! [`GuestMemory`], which `sonicshot-vmi` looks into; a [`PrunePlan`] made
//! of what it finds goes to [`Dump::prune_to`], [`Dump::prune_in_place`] or
//! [`Dump::prune_to_writer`].
//!
//! | format | module | in place | by copy | into a pipe |
//! |---|---|---|---|---|
//! | raw guest RAM, Firecracker, Cloud Hypervisor | `raw`, `overlay`, `snapshot` | yes | yes | |
//! | ELF core | `elf_core` | | yes | |
//! | QEMU mapped-ram, libvirt `sparse` | `mapped_ram`, `libvirt` | yes | yes | |
//! | QEMU migration stream, libvirt `raw`, `gzip`, `zstd` | `stream`, `libvirt` | | yes | yes |
//! | kdump-compressed | `kdump` | | yes | |
//! | Xen `xl save` image, libxl and libxc streams | `xen` | | yes | yes |
//! | Xen `xl dump-core` core | `xen` | | | |
//! | LiME, AVML | `lime`, `avml` | | | |
//!
//! # Processors
//! Beside the memory most formats hold the state of the guest's processors, which
//! [`processors`](GuestMemory::processors) tells: by it a kernel that runs is told from one that
//! is gone.
//!
//! | format | where | not told there |
//! |---|---|---|
//! | ELF core, kdump-compressed, of QEMU | notes `CORE` and `QEMU` | `EFER`, halted, SMM, nested guest |
//! | the same of `/proc/vmcore` | VMCOREINFO's `CRASHTIME` | all: [`Processors::Crashed`] |
//! | QEMU mapped-ram and streams, libvirt | sections `cpu` and `cpu_common` | |
//! | Cloud Hypervisor 39 and later | `state.json` | SMM |
//! | Firecracker | the state file, by shape | SMM, nested guest |
//! | Xen save image, HVM or PVH | `HVM_CONTEXT` | halted, nested guest |
//! | Xen save image, PV | `X86_PV_VCPU_BASIC` | |
//! | Xen core | `.xen_prstatus` | `EFER`, halted |
//! | raw, LiME, AVML | | all: [`Processors::Unknown`] |
//!
//! What is damaged or contradicts itself there is [`Processors::NotTold`]; that is no error, for the
//! memory may be whole. A processor whose registers are exactly those of a reset or an INIT and
//! that is not the boot processor counts as never started, one that firmware parked as parked; all
//! others are started, whatever they run. Of a PV guest of Xen `CR3` is the guest's own address of
//! the root, also where the tables themselves hold the machine's numbers
//! ([`p2m`](GuestMemory::p2m)). The state of a snapshot folder is not in the file that is opened:
//! [`SnapshotFiles::processors`] tells it, and [`Dump::with_processors`] puts it to the memory.
//!
//! Files are not trusted: every offset and length is checked against the file before it is used,
//! and what is allocated is bounded by the length of the file. Output appears whole or not at all;
//! a prune in place leaves a valid dump whenever it is interrupted.
#![cfg_attr(not(test), warn(clippy::arithmetic_side_effects))]
#![deny(unsafe_code)]

mod backing;
mod error;
mod format;
mod in_use;
mod layout;
mod output;
mod processors;
mod prune;
mod snapshot;

use backing::mapped::{self, MappedDump};
use backing::overlay::Overlay;
pub use backing::spool::Spool;
pub use error::DumpError;
use format::avml::AvmlFile;
use format::elf_core::{self, ElfCore};
#[doc(hidden)]
pub use format::kdump::read::KdumpFile;
#[doc(hidden)]
pub use format::kdump::write::{
    KdumpCompression, KdumpOptions, KdumpWriteError, KdumpWriteStats, write_kdump,
};
use format::qemu::mapped_ram::{self, MappedRam};
use format::qemu::stream::Stream;
use format::qemu::{self, device_state, migration};
pub use format::qemu::{BlockKind, RamBlock};
pub use format::xen::join::XlSkeleton;
use format::{core_notes, firecracker, libvirt, lime, raw, xen};
pub use in_use::{WritingProcess, check_not_in_use};
pub use layout::{BlockPlace, LayoutSpec, LayoutSpecError};
pub use output::Overwrite;
pub use output::dump_file::{CoreNotes, DumpFile, NewFile};
pub use output::folder::NewFolder;
pub use prune::PruneStats;
pub use prune::holes::PruneOptions;
pub use snapshot::{SnapshotFiles, Vmm};
pub(crate) use sonicshot::Progress;
use sonicshot::{
    Architecture, Fill, Gpa, GpaRange, GuestMemory, Mapped, MemoryError, P2m, Processors,
    PrunePlan, RamLayout,
};
use sonicshot_xen::{CoreDump, XlImage};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

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
    path: PathBuf,
    store: Store,
    format: Format,
    /// What the format is wrapped in.
    image: Option<libvirt::Image>,
    /// Where the content is, if not in the file itself.
    spool: Option<Spool>,
    /// What is known of the processors from elsewhere.
    told: Option<Processors>,
}

/// How the file's pages are got at.
#[derive(Debug)]
enum Store {
    /// As they are, mapped.
    Mapped(MappedDump),
    /// In two files, mapped.
    Overlay(Box<Overlay>),
    /// Decompressed one by one.
    Kdump(File, Box<KdumpFile>),
    /// Decompressed in blocks.
    Avml(File, Box<AvmlFile>),
}

/// What is known of the file beside where RAM lies in it. A new format is one module that makes
/// extents, one variant here, and one line in [`FORMATS`].
#[derive(Debug)]
pub(crate) enum Format {
    Raw { layout: LayoutSpec },
    ElfCore(ElfCore),
    MappedRam(MappedRam),
    Stream(Stream),
    Xen(Box<XlImage>),
    XenCore(Box<CoreDump>),
    Lime,
    Kdump,
    Avml,
}

/// What opens a file that begins with some magic bytes.
enum Opener {
    ElfCore,
    Qemu,
    Kdump,
    Lime,
    Avml,
    Libvirt,
    Xen,
    /// Known, but not supported: what it is.
    NotYet(&'static str),
}

/// How each format begins: offset, bytes.
const FORMATS: &[(usize, &[u8], Opener)] = &[
    (0, b"\x7fELF", Opener::ElfCore),
    (0, b"QEVM", Opener::Qemu),
    (0, b"KDUMP   ", Opener::Kdump),
    (0, b"makedumpfile", Opener::Kdump),
    (0, &[0x45, 0x4d, 0x69, 0x4c], Opener::Lime),
    (0, &[0x41, 0x56, 0x4d, 0x4c], Opener::Avml),
    (
        0,
        b"\x89SONIC\r\n",
        Opener::NotYet("a checkpoint, to be restored or inspected"),
    ),
    (0, libvirt::MAGIC, Opener::Libvirt),
    (
        0,
        b"LibvirtQemudPart",
        Opener::NotYet("an unfinished libvirt save image"),
    ),
    (0, b"Xen saved domain", Opener::Xen),
    (0, b"LibxlFmt", Opener::Xen),
    (0, b"\xff\xff\xff\xff\xff\xff\xff\xffXENF", Opener::Xen),
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

/// Whether a file that begins with `start` is of a known format.
pub(crate) fn begins_as_known(start: &[u8]) -> bool {
    FORMATS
        .iter()
        .any(|(offset, magic, _)| start.get(*offset..).is_some_and(|s| s.starts_with(magic)))
}

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
        Self::of(path, file, map, layout)
    }

    /// Opens a dump that came through a pipe or that was compressed. Messages call it by the
    /// spool's name.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_spooled(spool: &Spool, layout: Option<&LayoutSpec>) -> Result<Self, DumpError> {
        let (file, map) = spool.map()?;
        if map.is_empty() {
            return Err(DumpError::NotADump {
                path: spool.name().to_owned(),
                why: "it is empty",
            });
        }
        let mut dump = Self::of(spool.name(), file, map, layout)?;
        // What came through a pipe may have been compressed on top, and has a spool of its own.
        dump.spool.get_or_insert_with(|| spool.clone());
        dump.image = dump.image.or(spool.image().map(|(_, image)| image));
        Ok(dump)
    }

    fn of(
        path: &Path,
        file: File,
        map: memmap2::Mmap,
        layout: Option<&LayoutSpec>,
    ) -> Result<Self, DumpError> {
        let not_a_dump = |why| DumpError::NotADump {
            path: path.to_owned(),
            why,
        };
        let data = mapped::whole(&map);
        let len = map.len() as u64;
        let opener = FORMATS.iter().find(|(offset, magic, _)| {
            let there = data.get(*offset, magic.len());
            let mut copy = [0; 16];
            there
                .zip(copy.get_mut(..magic.len()))
                .is_some_and(|(there, copy)| there.copy_to(copy) && copy == *magic)
        });
        let mut start = [0; 16];
        if let Some(there) = data.get(0, start.len())
            && there.copy_to(&mut start)
            && firecracker::is_state(&start)
        {
            return Err(not_a_dump(firecracker::NOT_MEMORY));
        }
        let on_disk = || {
            let metadata = file.metadata().map_err(DumpError::io("reading", path))?;
            Ok::<u64, DumpError>(metadata.blocks().saturating_mul(512))
        };
        let mut image = None;
        let (extents, format) = match opener.map(|(_, _, opener)| opener) {
            Some(Opener::NotYet(kind)) => {
                return Err(DumpError::Unsupported {
                    path: path.to_owned(),
                    kind,
                });
            }
            Some(Opener::Kdump) => {
                let dump = Box::new(KdumpFile::parse(path, map)?);
                let store = Store::Kdump(file, dump);
                return Ok(Self::new(path, store, Format::Kdump));
            }
            Some(Opener::Avml) => {
                let dump = Box::new(AvmlFile::parse(path, map)?);
                return Ok(Self::new(path, Store::Avml(file, dump), Format::Avml));
            }
            Some(Opener::Lime) => (lime::extents(path, data)?, Format::Lime),
            Some(Opener::ElfCore) if CoreDump::is_core(data) => {
                let core = xen::parse_core(path, data)?;
                (xen::core_extents(&core), Format::XenCore(Box::new(core)))
            }
            Some(Opener::ElfCore) => {
                let core = ElfCore::parse(path, data)?;
                (core.extents(path, len)?, Format::ElfCore(core))
            }
            Some(Opener::Qemu) => migration_file(path, data, 0, on_disk()?, layout)?,
            Some(Opener::Xen) => {
                let image = xen::parse(path, data)?;
                (xen::extents(&image), Format::Xen(Box::new(image)))
            }
            Some(Opener::Libvirt) => {
                let found = libvirt::parse(path, data)?;
                if found.compression.is_some() {
                    let spool = Spool::decompress(path, &file, found)?;
                    return Self::open_spooled(&spool, layout);
                }
                image = Some(found);
                migration_file(path, data, found.payload_at, on_disk()?, layout)?
            }
            None => {
                if !len.is_multiple_of(4096) {
                    return Err(not_a_dump(
                        "it begins as no known format, and its length is no multiple of 4 KiB",
                    ));
                }
                let layout = layout.cloned().unwrap_or(LayoutSpec::Pc);
                (raw::extents(path, len, &layout)?, Format::Raw { layout })
            }
        };
        let mut mapped = MappedDump::new(path, file, map, extents)?;
        if matches!(format, Format::MappedRam(_) | Format::Xen(_)) {
            mapped.trust_extents();
        }
        let store = Store::Mapped(mapped);
        Ok(Self {
            image,
            ..Self::new(path, store, format)
        })
    }

    fn new(path: &Path, store: Store, format: Format) -> Self {
        Self {
            path: path.to_owned(),
            store,
            format,
            image: None,
            spool: None,
            told: None,
        }
    }

    /// The same with what something beside the file tells of the guest's processors, such as the
    /// VMM's own state: [`SnapshotFiles::processors`].
    #[must_use]
    pub fn with_processors(mut self, processors: Processors) -> Self {
        self.told = Some(processors);
        self
    }

    /// Where the content is that came through a pipe or was compressed: to open it again without
    /// doing that again.
    #[must_use]
    pub fn spool(&self) -> Option<&Spool> {
        self.spool.as_ref()
    }

    /// The format's name.
    #[must_use]
    pub fn format(&self) -> &'static str {
        match self.format {
            Format::MappedRam(_) if self.image.is_some() => "libvirt save image (sparse)",
            _ if let Some(image) = self.image => image.name(),
            Format::Raw { .. } if self.overlay().is_some() => "raw RAM, a diff over its base",
            Format::Raw { .. } => "raw RAM",
            Format::ElfCore(_) => "ELF core",
            Format::MappedRam(_) => "QEMU mapped-ram",
            Format::Stream(_) => "QEMU migration stream",
            Format::Xen(ref image) => xen::name(image),
            Format::XenCore(ref core) => xen::core_name(core),
            Format::Lime => "LiME",
            Format::Kdump => "kdump-compressed",
            Format::Avml => "AVML",
        }
    }

    /// Whether a page that must read as `fill` can be dropped: does it after a restore? Mostly a
    /// dropped page reads as zero; in a Xen image nobody knows.
    #[must_use]
    pub fn restores(&self, fill: Fill) -> bool {
        match fill {
            Fill::Any => true,
            Fill::Zero => !matches!(self.format, Format::Xen(_)),
            _ => false,
        }
    }

    /// The part of `plan` that this format can drop: what it [restores](Self::restores).
    #[must_use]
    pub fn restorable(&self, plan: &PrunePlan) -> PrunePlan {
        if self.restores(Fill::Zero) {
            plan.clone().zero_filled_only()
        } else {
            plan.clone().any_filled_only()
        }
    }

    /// The layout of a raw file; `None` if the format itself says where RAM lies.
    #[must_use]
    pub fn layout_spec(&self) -> Option<&LayoutSpec> {
        match &self.format {
            Format::Raw { layout } => Some(layout),
            _ => None,
        }
    }

    /// The VMCOREINFO text that the dump carries beside the memory, if it does.
    #[must_use]
    pub fn vmcoreinfo(&self) -> Option<&[u8]> {
        match (&self.format, &self.store) {
            (Format::ElfCore(core), _) => core.vmcoreinfo.as_deref(),
            (_, Store::Kdump(_, dump)) => dump.vmcoreinfo(),
            _ => None,
        }
    }

    /// The notes that the dump carries beside the memory, as an ELF core has them.
    #[must_use]
    pub fn core_notes(&self) -> Option<Vec<u8>> {
        match (&self.format, &self.store) {
            (Format::ElfCore(core), Store::Mapped(mapped)) => core.notes(mapped.bytes()),
            (_, Store::Kdump(_, dump)) => dump.notes().map(<[u8]>::to_vec),
            _ => None,
        }
    }

    /// The file. Of a dump that came through a pipe, the temporary file with its content.
    #[must_use]
    pub fn file(&self) -> &File {
        if let Some((image, _)) = self.spool.as_ref().and_then(Spool::image) {
            return image;
        }
        match &self.store {
            Store::Mapped(mapped) => mapped.file(),
            Store::Overlay(overlay) => overlay.diff().file(),
            Store::Kdump(file, _) | Store::Avml(file, _) => file,
        }
    }

    /// All files that the memory comes from: [`file`](Self::file), and the base of a diff. What is
    /// made of it is to be for no more eyes than each of them.
    #[must_use]
    pub fn files(&self) -> Vec<&File> {
        let mut files = vec![self.file()];
        if let Store::Overlay(overlay) = &self.store {
            files.push(overlay.base().file());
        }
        files
    }

    /// The machine that QEMU ran, such as `pc-i440fx-10.0`, if the dump says.
    #[must_use]
    pub fn machine_type(&self) -> Option<&str> {
        match &self.format {
            Format::MappedRam(ram) => ram.machine.as_deref(),
            Format::Stream(stream) => stream.machine(),
            _ => None,
        }
    }

    /// Where a guest of that machine has its RAM, if it is one whose layout is known.
    #[must_use]
    pub fn machine_layout(&self) -> Option<LayoutSpec> {
        qemu::layout_of(self.machine_type()?)
    }

    /// The blocks of memory of QEMU's migration files; other formats have none.
    #[must_use]
    pub fn ram_blocks(&self) -> &[RamBlock] {
        match &self.format {
            Format::MappedRam(ram) => &ram.blocks,
            Format::Stream(stream) => &stream.blocks,
            _ => &[],
        }
    }

    /// Whether the file holds the devices' state too, so that a guest can be restored from it.
    #[must_use]
    pub fn holds_device_state(&self) -> bool {
        matches!(
            self.format,
            Format::MappedRam(_) | Format::Stream(_) | Format::Xen(_)
        )
    }

    /// Whether it is a Xen save image.
    #[must_use]
    pub fn is_xl(&self) -> bool {
        matches!(self.format, Format::Xen(_))
    }

    /// The processor that the dump says the guest has, if it says.
    #[must_use]
    pub fn machine(&self) -> Option<Architecture> {
        match (&self.format, &self.store) {
            (Format::ElfCore(core), _) => Some(core.machine),
            (Format::XenCore(core), _) => elf_core::machine(&self.path, core.machine()).ok(),
            (_, Store::Kdump(_, dump)) => dump.machine(),
            _ => None,
        }
    }

    /// The length of the file in bytes.
    #[must_use]
    pub fn file_len(&self) -> u64 {
        self.file().metadata().map_or(0, |m| m.len())
    }

    /// Where a migration file begins in the mapped bytes.
    pub(crate) fn payload_at(&self) -> u64 {
        match self.image {
            Some(image) if image.compression.is_none() => image.payload_at,
            _ => 0,
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The pages, if they are in the file as they are; of a diff, those that it has.
    pub(crate) fn mapped(&self) -> Option<&MappedDump> {
        match &self.store {
            Store::Mapped(mapped) => Some(mapped),
            Store::Overlay(overlay) => Some(overlay.diff()),
            _ => None,
        }
    }

    /// The diff and its base, if it is opened over one.
    pub(crate) fn overlay(&self) -> Option<&Overlay> {
        match &self.store {
            Store::Overlay(overlay) => Some(overlay),
            _ => None,
        }
    }

    pub(crate) fn format_data(&self) -> &Format {
        &self.format
    }

    /// The processors in the devices' state of a migration file, which begins at `at`.
    fn in_device_state(&self, mapped: &MappedDump, at: u64) -> Processors {
        let found = device_state::processors(&self.path, mapped.bytes(), at, mapped);
        processors::told(found)
    }

    fn memory(&self) -> &dyn GuestMemory {
        match &self.store {
            Store::Mapped(mapped) => mapped,
            Store::Overlay(overlay) => &**overlay,
            Store::Kdump(_, dump) => &**dump,
            Store::Avml(_, dump) => &**dump,
        }
    }
}

/// What QEMU writes when it migrates into a file, from `at` on.
fn migration_file(
    path: &Path,
    data: sonicshot::GuestBytes<'_>,
    at: u64,
    on_disk: u64,
    layout: Option<&LayoutSpec>,
) -> Result<(Vec<mapped::Extent>, Format), DumpError> {
    let mut cursor = qemu::Cursor::new(path, data, at);
    if qemu::start(&mut cursor)?.has(mapped_ram::CAPABILITY) {
        let ram = MappedRam::parse(path, data, at, layout)?;
        return Ok((ram.extents(path, data, on_disk)?, Format::MappedRam(ram)));
    }
    let mut stream = Stream::parse(path, data, at, layout)?;
    Ok((stream.extents(path, data)?, Format::Stream(stream)))
}

impl GuestMemory for Dump {
    fn layout(&self) -> &RamLayout {
        self.memory().layout()
    }

    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.memory().read(at, buf)
    }

    fn map(&self, at: Gpa, len: usize) -> Result<Option<Mapped<'_>>, MemoryError> {
        self.memory().map(at, len)
    }

    fn next_data(&self, at: Gpa) -> Option<GpaRange> {
        self.memory().next_data(at)
    }

    fn release(&self, range: GpaRange) {
        self.memory().release(range);
    }

    fn prefers_read(&self) -> bool {
        self.memory().prefers_read()
    }

    fn p2m(&self) -> Option<&P2m> {
        match &self.format {
            Format::XenCore(core) => core.p2m(),
            _ => self.memory().p2m(),
        }
    }

    fn processors(&self) -> Processors {
        let of_notes = |notes: Option<&[u8]>, text: Option<&[u8]>| match notes {
            Some(notes) => core_notes::processors(notes, text, self.memory()),
            None => Processors::Unknown,
        };
        match (&self.format, &self.store) {
            _ if let Some(told) = &self.told => told.clone(),
            _ if self.machine() == Some(Architecture::Aarch64) => Processors::Unknown,
            (Format::ElfCore(core), Store::Mapped(mapped)) => {
                let notes = core.notes(mapped.bytes());
                of_notes(notes.as_deref(), core.vmcoreinfo.as_deref())
            }
            (_, Store::Kdump(_, dump)) => of_notes(dump.notes(), dump.vmcoreinfo()),
            (Format::Stream(stream), Store::Mapped(mapped)) => {
                self.in_device_state(mapped, stream.records_end)
            }
            (Format::MappedRam(ram), Store::Mapped(mapped)) => {
                match migration::rest_of_ram(&self.path, mapped.bytes(), &ram.start, ram.after) {
                    Ok((_, end)) => self.in_device_state(mapped, end),
                    Err(_) => Processors::NotTold("its devices' state is cut short"),
                }
            }
            (Format::Xen(image), Store::Mapped(mapped)) => {
                xen::processors(image.vcpus(mapped.bytes()), image.kind(), mapped)
            }
            (Format::XenCore(core), Store::Mapped(mapped)) => {
                xen::processors(core.vcpus(mapped.bytes()), core.kind(), mapped)
            }
            _ => Processors::Unknown,
        }
    }
}
