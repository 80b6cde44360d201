//! The same memory in another format; nothing is looked for that may be left out.

use crate::blobs::{self, Beside};
use crate::checkpoint_file::{CheckpointFile, blamed_on};
use crate::error::OfflineError;
use crate::lacking::Lacking;
use crate::note::Note;
use crate::place;
use crate::save::Contents;
use crate::snapshot::Snapshot;
use crate::untold::{UNTOLD_PAGE, assumed, named_machine};
use crate::whole::{absent_bytes, filled, keep_everything, without_p2m};
use sonicshot::checkpoint::{CheckpointInfo, Compression, OnDisks, SaveOptions};
use sonicshot::{Architecture, GuestMemory, PageSize, RamLayout};
use sonicshot_dump::{
    CoreNotes, Dump, DumpError, DumpFile, KdumpCompression, KdumpOptions, LayoutSpec, NewFile,
    WriteOptions, XlSkeleton, write_kdump,
};
use std::fs::File;
use std::path::{Path, PathBuf};

/// The form that a dump or a checkpoint is converted to.
#[derive(Debug)]
#[non_exhaustive]
pub enum Target {
    /// Raw guest RAM.
    Raw,
    /// An ELF core.
    Elf,
    /// A kdump-compressed file, its pages compressed so.
    Kdump(KdumpCompression),
    /// A checkpoint (zstd).
    Checkpoint,
    /// A QEMU mapped-ram file, of another file of QEMU's or libvirt's.
    MappedRam,
    /// A QEMU migration stream, of another file of QEMU's or libvirt's.
    Stream,
    /// A Xen save image. What is in it beside the memory comes from the template, or else from
    /// the checkpoint or the image that is converted.
    Xl(Option<Template>),
}

/// A Xen save image whose memory is replaced by that of another dump of the same guest, of the same
/// moment.
#[derive(Debug)]
pub struct Template {
    path: PathBuf,
    image: Box<Dump>,
}

impl Template {
    /// Opens the image.
    ///
    /// # Errors
    /// [`OfflineError::Dump`] if it cannot be read.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, OfflineError> {
        let path = path.as_ref();
        Ok(Self {
            image: Box::new(Dump::open(path, None)?),
            path: path.to_owned(),
        })
    }
}

/// The result of a conversion.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Converted {
    /// The format that it was.
    pub format: &'static str,
    /// The guest's RAM. A raw file has it from front to back.
    pub layout: RamLayout,
    /// The space that the new file takes on disk, in bytes.
    pub disk_bytes: u64,
    /// The amount of RAM that the source did not have, in bytes. It reads as zero, or in a kdump is not
    /// there either.
    pub missing_bytes: u64,
    /// Whether pages that the guest uses are missing, or may be: the source was a checkpoint that
    /// says so, or a dump that lacks pages of which nobody knows what they were.
    pub for_analysis: bool,
    /// Notes for people.
    pub notes: Vec<Note>,
}

/// The file that is written.
#[derive(Clone, Copy)]
struct Output<'a> {
    path: &'a Path,
    options: &'a WriteOptions,
}

impl Snapshot {
    /// Writes the same memory as `target`. The output appears whole or not at all.
    ///
    /// # Errors
    /// [`OfflineError::Dump`]: the output exists, the format cannot become the other, or reading or
    /// writing fails; [`OfflineError::NoTemplate`]: there is nothing to make a Xen image of; and
    /// what [`analyze`](Self::analyze) gives for a layout that is not found.
    pub fn convert(
        &self,
        target: &Target,
        out: impl AsRef<Path>,
        options: &WriteOptions,
    ) -> Result<Converted, OfflineError> {
        let converted = self.convert_as_it_is(target, out.as_ref(), options);
        converted.map_err(|error| self.blame(error))
    }

    fn convert_as_it_is(
        &self,
        target: &Target,
        path: &Path,
        options: &WriteOptions,
    ) -> Result<Converted, OfflineError> {
        let opened = self.open_for(target)?;
        let dump = &opened.dump;
        let mut beside = Beside::of_dump(dump);
        beside.vmcoreinfo = beside.vmcoreinfo.or(opened.vmcoreinfo);
        let machine = dump.machine().or(opened.machine);
        let source = Source {
            memory: dump,
            of: Of::Dump(dump),
            path: self.path(),
            machine,
            page_size: opened.page_size,
            beside,
        };
        // All that is read of the dump is read before the output has its name.
        let (map, _) = keep_everything(dump, opened.page_size)?;
        let missing_bytes = absent_bytes(&map);
        let filled = filled(dump, &map);
        let written = source.write(target, Output { path, options });
        let disk_bytes = written.map_err(|error| blamed_on(dump, error))?;
        let mut notes = Vec::new();
        notes.extend(match (target, missing_bytes) {
            (Target::Kdump(_), 1..) => Some(Note::AbsentKept {
                bytes: missing_bytes,
                why: dump.incomplete(),
            }),
            _ => filled,
        });
        if dump.holds_device_state() && !target.keeps_device_state(dump) {
            notes.push(Note::WithoutDeviceState);
        }
        let for_analysis = missing_bytes > 0;
        if for_analysis && matches!(target, Target::Checkpoint) {
            notes.push(Note::ForAnalysis);
        }
        notes.extend(target.assumes(machine));
        notes.extend(opened.notes);
        notes.extend(without_p2m(dump));
        Ok(Converted {
            format: dump.format(),
            layout: dump.layout().clone(),
            disk_bytes,
            missing_bytes,
            for_analysis,
            notes,
        })
    }

    /// Opens the memory as far as `target` needs to know where it lies.
    fn open_for(&self, target: &Target) -> Result<Opened, OfflineError> {
        let layout = self.files().layout();
        match target {
            // All blocks are taken as they are: where they lie does not matter.
            Target::MappedRam | Target::Stream | Target::Xl(None) => {
                Ok(Opened::new(self.dump(layout)?))
            }
            Target::Xl(Some(template)) => {
                // A raw file that was made of the template lies as that does.
                let regions = template.image.layout().regions().to_vec();
                let of_template = LayoutSpec::Ranges(regions);
                Ok(Opened::new(
                    self.dump(Some(layout.unwrap_or(&of_template)))?,
                ))
            }
            Target::Raw | Target::Elf | Target::Kdump(_) | Target::Checkpoint => {
                self.open_with_guest()
            }
        }
    }

    /// Opens the memory in its layout, with VMCOREINFO, which a reader of cores wants and the guest
    /// itself has.
    fn open_with_guest(&self) -> Result<Opened, OfflineError> {
        let facts = place::with_guest(self, &|guest| Ok(guest.facts()));
        match facts {
            Ok(placed) => Ok(Opened {
                dump: placed.dump,
                machine: placed.value.architecture,
                page_size: placed.value.page_size,
                vmcoreinfo: placed.value.vmcoreinfo.map(String::into_bytes),
                // What is left out, or may lie elsewhere.
                notes: placed.notes,
            }),
            Err(OfflineError::Guest { .. }) => Ok(Opened::new(place::open(self)?)),
            Err(error) => Err(error),
        }
    }
}

/// A dump that is converted, and what its guest told.
struct Opened {
    dump: Dump,
    machine: Option<Architecture>,
    page_size: PageSize,
    vmcoreinfo: Option<Vec<u8>>,
    notes: Vec<Note>,
}

impl Opened {
    fn new(dump: Dump) -> Self {
        Self {
            dump,
            machine: None,
            page_size: UNTOLD_PAGE,
            vmcoreinfo: None,
            notes: Vec::new(),
        }
    }
}

impl CheckpointFile {
    /// Writes the same memory as `target`. What was left out of the checkpoint reads as it says.
    /// The output appears whole or not at all.
    ///
    /// # Errors
    /// [`OfflineError::NotOfCheckpoint`] for files of QEMU's, [`OfflineError::NoImage`] for a Xen
    /// image if it was none, [`OfflineError::Dump`], [`OfflineError::Checkpoint`]: the output
    /// exists, or reading or writing fails.
    pub fn convert(
        &self,
        target: &Target,
        out: impl AsRef<Path>,
        options: &WriteOptions,
    ) -> Result<Converted, OfflineError> {
        let path = out.as_ref();
        let lacking = Lacking::new(self.reader());
        let write = || {
            self.check_disks()?;
            let source = Source {
                memory: match target {
                    Target::Kdump(_) | Target::Checkpoint => &lacking,
                    _ => self.reader(),
                },
                of: Of::Checkpoint(self),
                path: self.path(),
                machine: self.machine(),
                page_size: self.reader().info().page_size,
                beside: Beside::of_checkpoint(self.reader(), self.path())?,
            };
            source.write(target, Output { path, options })
        };
        let disk_bytes = self.blamed(write())?;
        let mut notes = match target {
            Target::Kdump(_) | Target::Xl(_) => self.lacks_still(),
            _ => self.notes(),
        };
        notes.extend(target.assumes(self.machine()));
        notes.extend(without_p2m(self.reader()));
        Ok(Converted {
            format: "checkpoint",
            layout: self.reader().layout().clone(),
            disk_bytes,
            missing_bytes: self.missing_bytes(),
            for_analysis: self.reader().info().for_analysis,
            notes,
        })
    }
}

impl Target {
    /// The note on an output that must name a processor which nobody has told.
    fn assumes(&self, machine: Option<Architecture>) -> Option<Note> {
        let names_it = matches!(self, Self::Elf | Self::Kdump(_));
        assumed(machine).filter(|_| names_it)
    }

    /// Whether it holds the state of the devices that `dump` has.
    fn keeps_device_state(&self, dump: &Dump) -> bool {
        match self {
            Self::MappedRam | Self::Stream | Self::Xl(_) => true,
            // A checkpoint holds all of a Xen image.
            Self::Checkpoint => dump.is_xl(),
            Self::Raw | Self::Elf | Self::Kdump(_) => false,
        }
    }
}

/// The source of a conversion.
struct Source<'a> {
    memory: &'a dyn GuestMemory,
    of: Of<'a>,
    path: &'a Path,
    machine: Option<Architecture>,
    page_size: PageSize,
    beside: Beside,
}

#[derive(Clone, Copy)]
enum Of<'a> {
    Dump(&'a Dump),
    Checkpoint(&'a CheckpointFile),
}

impl Of<'_> {
    /// Refuses files that were changed since they were opened.
    fn check_unchanged(self) -> Result<(), OfflineError> {
        match self {
            Self::Dump(dump) => Ok(dump.check_unchanged()?),
            Self::Checkpoint(checkpoint) => checkpoint.check_unchanged(),
        }
    }
}

impl Source<'_> {
    fn check_unchanged(&self) -> Result<(), OfflineError> {
        self.of.check_unchanged()
    }

    /// The files that it comes from.
    fn files(&self) -> Vec<&File> {
        match self.of {
            Of::Dump(dump) => dump.files(),
            Of::Checkpoint(checkpoint) => vec![checkpoint.reader().source()],
        }
    }

    /// Returns what the new file takes on disk, in bytes.
    fn write(self, target: &Target, out: Output<'_>) -> Result<u64, OfflineError> {
        match target {
            Target::Raw => self.write_raw(out),
            Target::Elf => self.write_elf(out),
            Target::Kdump(how) => self.write_kdump(*how, out),
            Target::Checkpoint => self.write_checkpoint(out),
            Target::Xl(template) => self.write_xl(template.as_ref(), out),
            Target::MappedRam => Ok(self.migration()?.to_mapped_ram(out.path, out.options)?),
            Target::Stream => Ok(self.migration()?.to_stream(out.path, out.options)?),
        }
    }

    /// A dump, as a migration file has to be.
    fn migration(&self) -> Result<&Dump, OfflineError> {
        match self.of {
            Of::Dump(dump) => Ok(dump),
            Of::Checkpoint(_) => Err(OfflineError::NotOfCheckpoint),
        }
    }

    fn write_raw(&self, out: Output<'_>) -> Result<u64, OfflineError> {
        let layout = self.memory.layout();
        let file = DumpFile::raw(out.path, layout, &self.files(), out.options)?;
        file.copy(self.memory)?;
        self.check_unchanged()?;
        Ok(file.finish()?)
    }

    fn write_elf(&self, out: Output<'_>) -> Result<u64, OfflineError> {
        let mut notes = CoreNotes::new(named_machine(self.machine));
        notes.notes.clone_from(&self.beside.notes);
        notes.vmcoreinfo.clone_from(&self.beside.vmcoreinfo);
        let layout = self.memory.layout();
        let file = DumpFile::elf_core(out.path, layout, &notes, &self.files(), out.options)?;
        file.copy(self.memory)?;
        self.check_unchanged()?;
        Ok(file.finish()?)
    }

    fn write_kdump(
        &self,
        compression: KdumpCompression,
        out: Output<'_>,
    ) -> Result<u64, OfflineError> {
        let file = NewFile::create(out.path, out.options.overwrite, &self.files())?;
        let mut options = KdumpOptions::new(compression).machine(named_machine(self.machine));
        options.vmcoreinfo = self.beside.vmcoreinfo.as_deref();
        options.notes = self.beside.notes.as_deref();
        options.progress.clone_from(&out.options.progress);
        let written = write_kdump(self.memory, self.page_size, file.file(), &options);
        written.map_err(|source| DumpError::Kdump {
            path: out.path.to_owned(),
            source,
        })?;
        self.check_unchanged()?;
        Ok(file.finish_told(&out.options.progress)?)
    }

    fn write_checkpoint(self, out: Output<'_>) -> Result<u64, OfflineError> {
        let file = NewFile::create(out.path, out.options.overwrite, &self.files())?;
        let (map, plan) = keep_everything(self.memory, self.page_size)?;
        let mut info = CheckpointInfo::new(self.memory.layout().clone(), self.page_size);
        // What the kernel in it tells is left out: of a guest that was looked into `save` makes
        // one.
        info.architecture = match self.of {
            Of::Dump(dump) => dump.machine(),
            Of::Checkpoint(checkpoint) => checkpoint.machine(),
        };
        info.for_analysis = match self.of {
            // Nobody looked what they were.
            Of::Dump(_) => absent_bytes(&map) > 0,
            Of::Checkpoint(checkpoint) => checkpoint.reader().info().for_analysis,
        };
        let contents = Contents {
            info: &info,
            blobs: match self.of {
                Of::Dump(dump) => self.beside.into_blobs(dump.xl_skeleton()?),
                Of::Checkpoint(checkpoint) => blobs::all(checkpoint.reader(), self.path)?,
            },
            files: &[],
            memory: self.memory,
            map: &map,
            plan: &plan,
            disks: OnDisks::NONE,
        };
        let mut options = SaveOptions::new(Compression::ZSTD);
        options.progress.clone_from(&out.options.progress);
        let of = self.of;
        contents.write(file.file(), out.path, options)?;
        of.check_unchanged()?;
        Ok(file.finish_told(&out.options.progress)?)
    }

    fn write_xl(&self, template: Option<&Template>, out: Output<'_>) -> Result<u64, OfflineError> {
        let skeleton = match (template, self.of) {
            (Some(template), _) => {
                let skeleton = skeleton_of(&template.image, &template.path)?;
                skeleton.check_holds_all(self.memory)?;
                skeleton
            }
            (None, Of::Dump(dump)) => skeleton_of(dump, self.path)?,
            (None, Of::Checkpoint(checkpoint)) => checkpoint.xl_skeleton()?,
        };
        let left_out = |pfn| match self.of {
            Of::Dump(_) => false,
            Of::Checkpoint(checkpoint) => checkpoint.left_out(pfn),
        };
        let mut files = self.files();
        files.extend(template.iter().flat_map(|template| template.image.files()));
        let written = skeleton.write(self.memory, &left_out, out.path, &files, out.options);
        Ok(written?)
    }
}

/// The parts that make a Xen image of its memory again.
fn skeleton_of(image: &Dump, path: &Path) -> Result<XlSkeleton, OfflineError> {
    let bytes = image.xl_skeleton()?;
    Ok(XlSkeleton::parse(
        path,
        bytes.ok_or(OfflineError::NoTemplate)?,
    )?)
}
