//! A snapshot saved as a checkpoint.

use crate::blobs::{Beside, Blob, open_blob};
use crate::checkpoint_file::blamed_on;
use crate::disks::{DiskSearch, SaveDisks, Searched};
use crate::error::OfflineError;
use crate::note::Note;
use crate::plan::Plan;
use crate::snapshot::Snapshot;
use crate::untold::UNTOLD_PAGE;
use crate::whole::{absent_bytes, filled, keep_everything, without_p2m};
use sonicshot::checkpoint::{
    CheckpointInfo, CheckpointWriter, DiskHash, OnDisks, SaveOptions, SaveStats,
};
use sonicshot::{GuestMemory, PageMap, PrunePlan};
use sonicshot_dump::{DiskImage, Dump, NewFile, Overwrite};
use sonicshot_vmi::{FilePlaces, Knowledge};
use std::fs::File;
use std::io::Write;
use std::path::Path;

/// Options for writing a checkpoint, and the content that goes into it beside the guest.
#[derive(Debug)]
#[non_exhaustive]
pub struct CheckpointOptions {
    /// The compression of page data, and whoever is told how far it is.
    pub writing: SaveOptions,
    /// Whether a file that exists is replaced.
    pub overwrite: Overwrite,
    /// The VMM that ran the guest.
    pub vmm: Option<String>,
    /// The hash that is kept of pages on disks.
    pub disk_hash: DiskHash,
    /// Whether the disks are looked through from end to end, however much of the page cache the guest's
    /// records explain.
    pub scan_disks: bool,
    /// Whether the images may be open for writing.
    pub disks_are_open: bool,
    blobs: Vec<(String, File)>,
    disks: Vec<(String, DiskImage)>,
}

impl CheckpointOptions {
    /// Page data is stored so, and nothing goes into it but what the snapshot has.
    #[must_use]
    pub fn new(writing: SaveOptions) -> Self {
        Self {
            writing,
            overwrite: Overwrite::Refuse,
            vmm: None,
            disk_hash: DiskHash::default(),
            scan_disks: false,
            disks_are_open: false,
            blobs: Vec::new(),
            disks: Vec::new(),
        }
    }

    /// Refers to pages that are the same on the guest's disk, of which `path` is an image, instead
    /// of storing them; the checkpoint calls the disk `name`. The guest was stopped, then the image
    /// pinned (nobody writes to it any more), then the memory was read: in another order the image
    /// may lack what the memory had.
    ///
    /// # Errors
    /// [`OfflineError::Dump`] if it cannot be opened or is of a format that is not read.
    pub fn disk(
        mut self,
        name: impl Into<String>,
        path: impl AsRef<Path>,
    ) -> Result<Self, OfflineError> {
        self.disks.push((name.into(), DiskImage::open(path)?));
        Ok(self)
    }

    /// Says whether a file that exists is replaced.
    #[must_use]
    pub fn overwrite(mut self, overwrite: Overwrite) -> Self {
        self.overwrite = overwrite;
        self
    }

    /// Says which hash is kept of pages on disks.
    #[must_use]
    pub fn disk_hash(mut self, hash: DiskHash) -> Self {
        self.disk_hash = hash;
        self
    }

    /// Says whether the disks are looked through from end to end.
    #[must_use]
    pub fn scan_disks(mut self, all: bool) -> Self {
        self.scan_disks = all;
        self
    }

    /// Says whether processes may have the images open for writing: of a guest that the caller keeps from
    /// running until the checkpoint is written, and then does not let run on.
    #[must_use]
    pub fn disks_are_open(mut self, they_may: bool) -> Self {
        self.disks_are_open = they_may;
        self
    }

    /// Notes the VMM that ran the guest.
    #[must_use]
    pub fn vmm(mut self, name: impl Into<String>) -> Self {
        self.vmm = Some(name.into());
        self
    }

    /// Puts the file at `path` into the checkpoint as `name`, such as the VMM's device state. What
    /// is written is then for no more eyes than it.
    ///
    /// # Errors
    /// [`OfflineError::Io`] if it cannot be opened, or is a folder.
    pub fn blob(
        mut self,
        name: impl Into<String>,
        path: impl AsRef<Path>,
    ) -> Result<Self, OfflineError> {
        let path = path.as_ref();
        self.blobs.push((name.into(), open_blob(path)?));
        Ok(self)
    }
}

impl CheckpointOptions {
    /// The disks, and what the checkpoint calls them.
    pub(crate) fn disks(&self) -> impl Iterator<Item = (&str, &DiskImage)> {
        self.disks.iter().map(|(name, disk)| (name.as_str(), disk))
    }

    /// Refuses disks that were written to while they were compared.
    fn check_disks_unchanged(&self) -> Result<(), OfflineError> {
        Ok(self
            .disks()
            .try_for_each(|(_, disk)| disk.check_unchanged())?)
    }
}

/// The result of saving a snapshot.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Saved {
    /// The checkpoint's facts about its guest.
    pub info: CheckpointInfo,
    /// Its content.
    pub stats: SaveStats,
    /// The space that it takes on disk, in bytes; `None` of one that went into a pipe.
    pub disk_bytes: Option<u64>,
    /// The pages that were left out, by their class.
    pub left_out: Vec<(&'static str, u64)>,
    /// The amount of RAM that the source did not have, in bytes: it reads as zero.
    pub missing_bytes: u64,
    /// The search for pages on the disks, if there are any.
    pub disk_search: Option<DiskSearch>,
    /// The things worth knowing, for people.
    pub notes: Vec<Note>,
}

/// A snapshot of which no page is left out but zero ones; its guest was not looked for.
#[derive(Debug)]
pub struct Whole {
    dump: Dump,
    map: PageMap,
    plan: PrunePlan,
    notes: Vec<Note>,
}

impl Snapshot {
    /// Opens the memory without looking for a guest: every page is kept. The layout is what the
    /// file or the options say, and what they do not say is `pc`'s.
    ///
    /// # Errors
    /// [`OfflineError::Dump`] if the file is damaged or none that is read.
    pub fn keep_all(&self) -> Result<Whole, OfflineError> {
        let dump = self.dump(self.files().layout());
        let dump = dump.map_err(|error| self.blame(error.into()))?;
        let (map, plan) = keep_everything(&dump, UNTOLD_PAGE)?;
        let mut notes: Vec<Note> = self.in_use().into_iter().collect();
        notes.extend(filled(&dump, &map));
        Ok(Whole {
            dump,
            map,
            plan,
            notes,
        })
    }
}

/// The ways to write a checkpoint: the same of all that has a `source`.
macro_rules! saves {
    () => {
        /// Saves the snapshot as a checkpoint without the pages that go. It appears whole or not at
        /// all.
        ///
        /// # Errors
        /// [`OfflineError::Checkpoint`], [`OfflineError::Dump`]: the output exists, a blob's name
        /// is taken, or reading or writing fails.
        pub fn save(
            &self,
            out: impl AsRef<Path>,
            options: &CheckpointOptions,
        ) -> Result<Saved, OfflineError> {
            self.source()?.save(out.as_ref(), options)
        }

        /// The same into a pipe. What is written is complete only if this returns without an error.
        ///
        /// # Errors
        /// As [`save`](Self::save).
        pub fn save_to_writer(
            &self,
            out: impl Write,
            options: &CheckpointOptions,
        ) -> Result<Saved, OfflineError> {
            self.source()?.save_to_writer(out, options)
        }
    };
}

impl Whole {
    saves!();

    fn source(&self) -> Result<Source<'_>, OfflineError> {
        let mut info = CheckpointInfo::new(self.dump.layout().clone(), UNTOLD_PAGE);
        info.architecture = self.dump.machine();
        // Nobody looked what they were: the guest may use them.
        info.for_analysis = absent_bytes(&self.map) > 0;
        Ok(Source {
            dump: &self.dump,
            info,
            map: &self.map,
            plan: &self.plan,
            vmcoreinfo: self.dump.vmcoreinfo().map(<[u8]>::to_vec),
            notes: self.notes.clone(),
            left_out: Vec::new(),
            places: None,
            xen_image: self.dump.xl_skeleton()?,
        })
    }
}

impl Plan<'_> {
    saves!();

    fn source(&self) -> Result<Source<'_>, OfflineError> {
        let analyzed = self.analyzed();
        let dump = analyzed.dump();
        let mut info = CheckpointInfo::new(dump.layout().clone(), self.page_size());
        let facts = analyzed.facts();
        if facts.knowledge != Knowledge::Nothing {
            info.kernel_release = Some(facts.release.clone());
        }
        info.build_id.clone_from(&facts.build_id);
        info.architecture = dump.machine().or(facts.architecture);
        info.for_analysis = self.is_for_analysis();
        let mut notes = analyzed.notes().to_vec();
        notes.extend(filled(dump, analyzed.pages()));
        Ok(Source {
            dump,
            info,
            map: analyzed.pages(),
            plan: self.wanted(),
            vmcoreinfo: facts.vmcoreinfo.clone().map(String::into_bytes),
            notes,
            left_out: self.wanted_by_name(),
            places: Some(analyzed.file_places()),
            xen_image: match dump.is_xl() {
                true => self.checked()?.xl_skeleton()?,
                false => None,
            },
        })
    }
}

/// The facts of a snapshot before it is saved.
struct Source<'a> {
    dump: &'a Dump,
    info: CheckpointInfo,
    map: &'a PageMap,
    plan: &'a PrunePlan,
    vmcoreinfo: Option<Vec<u8>>,
    notes: Vec<Note>,
    left_out: Vec<(&'static str, u64)>,
    /// The places where pages of files may be on their file systems.
    places: Option<&'a FilePlaces>,
    /// The Xen image beside its memory, without the pages that are dropped.
    xen_image: Option<Vec<u8>>,
}

impl Source<'_> {
    fn save(self, path: &Path, options: &CheckpointOptions) -> Result<Saved, OfflineError> {
        // What is put in beside the memory may be for fewer eyes.
        let mut inputs = self.dump.files();
        inputs.extend(options.blobs.iter().map(|(_, file)| file));
        inputs.extend(options.disks.iter().flat_map(|(_, disk)| disk.files()));
        let out = NewFile::create(path, options.overwrite, &inputs)?;
        let dump = self.dump;
        let saved = self.write(out.file(), path, options);
        let mut saved = saved.map_err(|error| blamed_on(dump, error))?;
        dump.check_unchanged()?;
        saved.disk_bytes = Some(out.finish_told(&options.writing.progress)?);
        Ok(saved)
    }

    fn save_to_writer(
        self,
        out: impl Write,
        options: &CheckpointOptions,
    ) -> Result<Saved, OfflineError> {
        let dump = self.dump;
        let saved = self.write(out, Path::new("-"), options);
        let saved = saved.map_err(|error| blamed_on(dump, error))?;
        dump.check_unchanged()?;
        Ok(saved)
    }

    fn write(
        mut self,
        out: impl Write,
        path: &Path,
        options: &CheckpointOptions,
    ) -> Result<Saved, OfflineError> {
        self.info.vmm.clone_from(&options.vmm);
        let beside = Beside {
            vmcoreinfo: self.vmcoreinfo.take(),
            notes: self.dump.core_notes(),
        };
        let searched = Searched {
            dump: self.dump,
            map: self.map,
            plan: self.plan,
            places: self.places,
        };
        let disks = SaveDisks::find(&searched, options)?;
        self.info.disks.clone_from(&disks.infos);
        let contents = Contents {
            info: &self.info,
            blobs: beside.into_blobs(self.xen_image.take()),
            files: &options.blobs,
            memory: self.dump,
            map: self.map,
            plan: self.plan,
            disks: OnDisks {
                disks: &disks.sources,
                guesses: &disks.guesses,
            },
        };
        let stats = contents.write(out, path, options.writing.clone())?;
        options.check_disks_unchanged()?;
        self.notes.extend(without_p2m(self.dump));
        if self.info.for_analysis {
            self.notes.push(Note::ForAnalysis);
        }
        Ok(Saved {
            info: self.info,
            stats,
            disk_bytes: None,
            left_out: self.left_out,
            missing_bytes: absent_bytes(self.map),
            disk_search: disks.search,
            notes: self.notes,
        })
    }
}

/// All that goes into a checkpoint.
pub(crate) struct Contents<'a> {
    pub info: &'a CheckpointInfo,
    pub blobs: Vec<Blob>,
    pub files: &'a [(String, File)],
    pub memory: &'a dyn GuestMemory,
    pub map: &'a PageMap,
    pub plan: &'a PrunePlan,
    pub disks: OnDisks<'a>,
}

impl Contents<'_> {
    /// Writes it to `out`, which messages call `path`.
    pub(crate) fn write(
        &self,
        out: impl Write,
        path: &Path,
        options: SaveOptions,
    ) -> Result<SaveStats, OfflineError> {
        let failed = OfflineError::made_of(path, path);
        let mut writer = CheckpointWriter::new(out, self.info.clone(), options).map_err(&failed)?;
        for (name, bytes) in &self.blobs {
            writer.blob(name, bytes.as_slice()).map_err(&failed)?;
        }
        for (name, file) in self.files {
            writer.blob(name, file).map_err(&failed)?;
        }
        let (map, plan) = (self.map, self.plan);
        let written = writer.memory_on_disks(self.memory, map, plan, &self.disks);
        written.map_err(&failed)?;
        let (_, stats) = writer.finish().map_err(&failed)?;
        Ok(stats)
    }
}
