//! A folder that appears whole or not at all.

use crate::guard::CheckedPlan;
use crate::output::{
    self, Output, PREFIX, Replaced, Rights, Target, check_stamp, folder_of, settle, sync_folder,
};
use crate::snapshot::check_is_file;
use crate::{
    DiskImage, Dump, DumpError, Overwrite, PruneOptions, PruneStats, ShareOptions, ShareStats,
    SnapshotFiles,
};
use rustix::fs::{
    Mode, OFlags, RenameFlags, SeekFrom, copy_file_range, mkdirat, openat, renameat_with, seek,
};
use rustix::io::{Errno, retry_on_intr};
use rustix::process::geteuid;
use sonicshot::{FileOffset, FileRange, FileStamp, to_u64, to_usize};
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Longest range that is copied at once.
const COPY: u64 = 1 << 20;

/// No VMM's snapshot has more files and folders, nor folders further inside each other.
const MAX_ENTRIES: usize = 4096;
const MAX_DEPTH: u32 = 8;

/// The entries of a folder, by their names.
type Tree = BTreeMap<OsString, Entry>;

#[derive(Debug)]
enum Entry {
    File,
    Folder {
        inside: Tree,
        /// Those of the folder that it is a copy of, once it is one.
        rights: Option<Rights>,
    },
}

/// A snapshot folder that is being written: a copy of all that is in another but the memory.
///
/// It is written under another name beside its own, for its owner alone, and gets its own name
/// when everything is on disk; if it is dropped before, it is removed. The owner and mode of each
/// file in it, and its own, are those of what it is a copy of, as for every output.
#[derive(Debug)]
pub struct NewFolder {
    temporary: TempDir,
    /// The same folder, wherever its path may lead.
    folder: File,
    /// The folder that it is in, and its name there.
    parent: File,
    name: OsString,
    memory: OsString,
    /// All that is in it, the memory too.
    tree: Tree,
    rights: Rights,
    path: PathBuf,
    overwrite: Overwrite,
}

impl NewFolder {
    /// Begins to write the folder `path`, for a snapshot like `files`, which must have been
    /// given as a folder. A base in it is left out: what is written needs none.
    ///
    /// A folder that [`Overwrite::Replace`] replaces must be a snapshot folder too, with no file
    /// that is neither one of the VMM's nor in the new folder.
    ///
    /// # Errors
    /// [`DumpError::Exists`], [`DumpError::SameFile`], [`DumpError::Foreign`], or what copying
    /// gives; nothing is left then.
    pub fn create(
        path: &Path,
        overwrite: Overwrite,
        files: &SnapshotFiles,
    ) -> Result<Self, DumpError> {
        let refuse = |path: &Path, why| DumpError::Folder {
            path: path.to_owned(),
            why,
        };
        let (Some(input), Some(memory)) = (files.folder(), files.memory().file_name()) else {
            return Err(refuse(files.memory(), "it was not given as a folder"));
        };
        let parent = folder_of(path);
        let name = path.file_name();
        let name = name.ok_or_else(|| refuse(path, "it has no name of its own"))?;
        let real = |path: &Path| fs::canonicalize(path).map_err(DumpError::io("opening", path));
        let real_input = real(input)?;
        if real(parent)?.starts_with(&real_input) {
            return Err(refuse(path, "it would lie in the folder that is copied"));
        }
        // Not followed, for it is the link itself that would be replaced.
        if let Ok(there) = fs::symlink_metadata(path) {
            if real(path).is_ok_and(|real| real == real_input) {
                return Err(DumpError::SameFile { path: path.into() });
            }
            if overwrite == Overwrite::Refuse {
                return Err(DumpError::Exists { path: path.into() });
            }
            if !there.is_dir() || SnapshotFiles::find(path, None, None).is_err() {
                return Err(refuse(path, "only a snapshot's folder is replaced by one"));
            }
        }
        let source = output::open_folder(input).map_err(DumpError::io("opening", input))?;
        let rights = Rights::of(&source).map_err(DumpError::io("reading", input))?;
        let mut tree = tree_of(input, files.folders)?;
        let base = files.base().and_then(Path::file_name);
        tree.retain(|name, _| Some(name.as_os_str()) != base);
        if overwrite == Overwrite::Replace {
            only_ours(path, &tree)?;
        }

        let creating = || DumpError::io("creating a folder in", parent);
        let held = output::open_folder(parent).map_err(creating())?;
        let temporary = tempfile::Builder::new()
            .prefix(PREFIX)
            .permissions(Permissions::from_mode(0o700))
            .tempdir_in(parent)
            .map_err(creating())?;
        let folder = open_ours(&held, temporary.path()).map_err(creating())?;
        output::forget_access_lists(&folder);
        let copying = Copying {
            source: &source,
            folder: &folder,
            but: Some(memory),
            stamps: &files.stamps,
        };
        copying.all(&mut tree, input, path)?;
        Ok(Self {
            memory: memory.to_owned(),
            temporary,
            folder,
            parent: held,
            name: name.to_owned(),
            tree,
            rights,
            path: path.into(),
            overwrite,
        })
    }

    /// Writes the memory, without the pages that go. Whether the folder replaces another was said
    /// before.
    ///
    /// # Errors
    /// As [`CheckedPlan::prune_to`].
    pub fn write_memory(
        &self,
        plan: &CheckedPlan<'_>,
        options: &PruneOptions,
    ) -> Result<PruneStats, DumpError> {
        let target = Target {
            path: &self.path.join(&self.memory),
            overwrite: Overwrite::Refuse,
            folder: Some(&self.folder),
        };
        plan.prune_at(target, &options.progress)
    }

    /// Writes the memory, which shares blocks with the images of the guest's disks: as
    /// [`Dump::share_to`].
    ///
    /// # Errors
    /// As [`Dump::share_to`].
    pub fn share_memory(
        &self,
        dump: &Dump,
        disks: &[DiskImage],
        options: &ShareOptions,
    ) -> Result<ShareStats, DumpError> {
        let target = Target {
            path: &self.path.join(&self.memory),
            overwrite: Overwrite::Refuse,
            folder: Some(&self.folder),
        };
        dump.share_at(target, disks, options)
    }

    /// Makes the folder durable and gives it its name.
    ///
    /// # Errors
    /// The operating system's error; the folder then has not appeared, and one that was to be
    /// replaced is there as it was.
    pub fn finish(self) -> Result<(), DumpError> {
        let failed = |action| {
            let path = self.path.clone();
            move |source| DumpError::NotFinished {
                action,
                path,
                source,
            }
        };
        let settled = self.settle();
        settled.map_err(failed("setting the permissions of"))?;
        self.folder.sync_all().map_err(failed("writing"))?;
        let temporary = self.temporary.path();
        let temporary = temporary.file_name().unwrap_or(temporary.as_os_str());
        let (parent, name) = (&self.parent, self.name.as_os_str());
        let rename = |flags| renameat_with(parent, temporary, parent, name, flags);
        if self.overwrite == Overwrite::Replace {
            // Memory takes its time to be written, and somebody may have put a file there.
            only_ours(&self.path, &self.tree)?;
        }
        let naming = failed("giving its name to");
        let exchanged = match self.overwrite {
            Overwrite::Replace => match rename(RenameFlags::EXCHANGE) {
                Ok(()) => true,
                Err(Errno::NOENT) => false,
                Err(error) => return Err(naming(error.into())),
            },
            Overwrite::Refuse => false,
        };
        if !exchanged {
            rename(RenameFlags::NOREPLACE).map_err(|error| match error {
                Errno::EXIST | Errno::NOTEMPTY => DumpError::Exists {
                    path: self.path.clone(),
                },
                error => naming(error.into()),
            })?;
        }
        let old = self.temporary.path().to_owned();
        // First the new one is on disk: what it replaces may go only then.
        let synced = sync_folder(&self.parent, &self.path);
        // The old one has the temporary name now, and goes with it; else nothing has.
        let removed = if exchanged {
            self.temporary.close()
        } else {
            let _gone = self.temporary.keep();
            Ok(())
        };
        synced?;
        removed.map_err(|source| DumpError::Unsettled {
            path: self.path.clone(),
            what: format!("what it replaces is still there, as {}", old.display()),
            source,
        })
    }

    /// Gives the folder its owner and mode. Of what it replaces, the folder and each file keep
    /// their owners, and what was not allowed there is not allowed here.
    fn settle(&self) -> io::Result<()> {
        let replaced = match self.overwrite {
            Overwrite::Refuse => None,
            Overwrite::Replace => Replaced::find(&self.parent, &self.name),
        };
        let old = replaced.map(|replaced| {
            let old = open_inside(&self.parent, &self.name)?;
            Ok::<_, io::Error>((old, replaced))
        });
        let old: Option<(File, Replaced)> = old.transpose()?;
        settle_inside(&self.folder, &self.tree, old.as_ref())?;
        settle(&self.folder, &[self.rights], replaced)
    }
}

/// Opens a folder that was just made, and that nobody can have put there instead.
fn open_ours(parent: &File, path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let name = path.file_name().unwrap_or(path.as_os_str());
    let folder = File::from(retry_on_intr(|| {
        openat(parent, name, flags, Mode::empty())
    })?);
    let metadata = folder.metadata()?;
    if metadata.uid() != geteuid().as_raw() || metadata.mode() & 0o077 != 0 {
        let why = "another was put in its place";
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
    }
    Ok(folder)
}

/// Opens what must be a regular file.
fn open_file(folder: &File, name: &OsStr) -> io::Result<File> {
    // What is no file may never answer.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(retry_on_intr(|| {
        openat(folder, name, flags, Mode::empty())
    })?);
    if !file.metadata()?.is_file() {
        let why = "it is not a regular file";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    }
    Ok(file)
}

/// Opens a folder in another.
fn open_inside(folder: &File, name: &OsStr) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(retry_on_intr(|| openat(folder, name, flags, Mode::empty()))?.into())
}

/// The entries of a folder: regular files alone, and if `folders`, folders of such.
fn tree_of(path: &Path, folders: bool) -> Result<Tree, DumpError> {
    let mut room = MAX_ENTRIES;
    listed(path, folders.then_some(MAX_DEPTH), &mut room)
}

/// The same, with `depth` folders in each other at most, and `room` for so many entries.
fn listed(path: &Path, depth: Option<u32>, room: &mut usize) -> Result<Tree, DumpError> {
    let reading = || DumpError::io("reading", path);
    let too_large = |what, most| DumpError::FolderTooLarge {
        path: path.to_owned(),
        what,
        most,
    };
    let mut tree = Tree::new();
    for entry in fs::read_dir(path).map_err(reading())? {
        let entry = entry.map_err(reading())?;
        let left = room.checked_sub(1);
        *room = left.ok_or_else(|| too_large("files and folders", to_u64(MAX_ENTRIES)))?;
        let (is, there) = (entry.file_type().map_err(reading())?, entry.path());
        let kind = match depth {
            Some(depth) if is.is_dir() => {
                let inside = depth.checked_sub(1);
                inside.ok_or_else(|| too_large("folders in each other", MAX_DEPTH.into()))?;
                Entry::Folder {
                    inside: listed(&there, inside, room)?,
                    rights: None,
                }
            }
            Some(_) if !is.is_file() => {
                let why =
                    "it is neither a regular file nor a folder, and a snapshot holds only such";
                return Err(DumpError::Folder { path: there, why });
            }
            _ => {
                check_is_file(&there, is)?;
                Entry::File
            }
        };
        tree.insert(entry.file_name(), kind);
    }
    Ok(tree)
}

/// Refuses to replace the folder `path`, if it is there, by one with `new` in it, if something in
/// it is neither one of the VMM's files nor in the new folder too: nobody else may have it.
fn only_ours(path: &Path, new: &Tree) -> Result<(), DumpError> {
    if fs::symlink_metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
        return Ok(());
    }
    let own = SnapshotFiles::find(path, None, None)?;
    let there = tree_of(path, own.folders)?;
    match foreign(&there, new, &|name| own.is_of_vmm(name)) {
        Some(inside) => Err(DumpError::Foreign {
            path: path.join(inside),
        }),
        None => Ok(()),
    }
}

/// The path of an entry of `there` that is neither in `new` nor a file of the VMM's own.
fn foreign(there: &Tree, new: &Tree, is_own: &dyn Fn(&OsStr) -> bool) -> Option<PathBuf> {
    there
        .iter()
        .find_map(|(name, entry)| match (entry, new.get(name)) {
            (Entry::File, Some(Entry::File)) => None,
            (Entry::File, None) if is_own(name) => None,
            (Entry::Folder { inside, .. }, Some(Entry::Folder { inside: new, .. })) => {
                let inside = foreign(inside, new, &|_| false)?;
                Some(Path::new(name).join(inside))
            }
            _ => Some(name.into()),
        })
}

/// Gives what is in a folder its owner and mode, and makes it durable. `old` is what it replaces.
fn settle_inside(folder: &File, tree: &Tree, old: Option<&(File, Replaced)>) -> io::Result<()> {
    for (name, entry) in tree {
        let replaced = old.and_then(|(old, all)| Some(Replaced::find(old, name)?.inside(*all)));
        match entry {
            Entry::File if replaced.is_some() => {
                let file = open_file(folder, name)?;
                settle(&file, &[Rights::of(&file)?], replaced)?;
                file.sync_all()?;
            }
            Entry::File => {}
            Entry::Folder { inside, rights } => {
                let new = open_inside(folder, name)?;
                let old = old.zip(replaced);
                let old = old.and_then(|((old, _), all)| Some((open_inside(old, name).ok()?, all)));
                settle_inside(&new, inside, old.as_ref())?;
                settle(&new, rights.as_slice(), replaced)?;
                new.sync_all()?;
            }
        }
    }
    Ok(())
}

/// The copying of what is in a folder to another.
struct Copying<'a> {
    source: &'a File,
    folder: &'a File,
    /// A file that is left out.
    but: Option<&'a OsStr>,
    /// The stamps of files when they were looked at: the content found in one must be what is copied.
    stamps: &'a BTreeMap<OsString, FileStamp>,
}

impl Copying<'_> {
    /// Copies `tree`; `from` and `to` are for messages.
    fn all(&self, tree: &mut Tree, from: &Path, to: &Path) -> Result<(), DumpError> {
        for (name, entry) in tree {
            let (from, to) = (from.join(name), to.join(name));
            match entry {
                Entry::File if self.but == Some(name.as_os_str()) => {}
                Entry::File => {
                    let seen = self.stamps.get(name).copied();
                    copy(self.source, self.folder, (name, seen), &from, &to)?;
                }
                Entry::Folder { inside, rights } => {
                    let source =
                        open_inside(self.source, name).map_err(DumpError::io("opening", &from))?;
                    let of = Rights::of(&source).map_err(DumpError::io("reading", &from))?;
                    *rights = Some(of);
                    mkdirat(self.folder, name.as_os_str(), Mode::RWXU)
                        .map_err(|error| DumpError::io("creating", &to)(error.into()))?;
                    let folder =
                        open_inside(self.folder, name).map_err(DumpError::io("opening", &to))?;
                    output::forget_access_lists(&folder);
                    let inner = Copying {
                        source: &source,
                        folder: &folder,
                        but: None,
                        stamps: &BTreeMap::new(),
                    };
                    inner.all(inside, &from, &to)?;
                }
            }
        }
        Ok(())
    }
}

/// Copies a file and its holes, if it is what was seen of it and stays so. `from` and `to` are for
/// messages.
fn copy(
    source: &File,
    folder: &File,
    (name, seen): (&OsStr, Option<FileStamp>),
    from: &Path,
    to: &Path,
) -> Result<(), DumpError> {
    let input = open_file(source, name).map_err(DumpError::io("opening", from))?;
    let metadata = input.metadata().map_err(DumpError::io("reading", from))?;
    let target = Target {
        path: to,
        overwrite: Overwrite::Refuse,
        folder: Some(folder),
    };
    let output = Output::create(target, &[&input])?;
    let writing = || DumpError::io("writing", to);
    let file = output.file();
    file.set_len(metadata.size()).map_err(writing())?;
    let copied = copy_data(&input, file, metadata.size());
    // One that is cut off meanwhile cannot be copied: that it was is what is wrong.
    check_stamp(&input, from, seen.unwrap_or(FileStamp::from(&metadata)))?;
    copied.map_err(writing())?;
    output.finish(&None)?;
    Ok(())
}

fn copy_data(input: &File, output: &File, len: u64) -> io::Result<()> {
    let mut at = 0;
    while at < len {
        // Where holes are not told, everything is data.
        let start = match seek(input, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(()),
            Err(_) => at,
        };
        let end = seek(input, SeekFrom::Hole(start)).unwrap_or(len).min(len);
        if end <= start {
            return Ok(());
        }
        let range = FileRange::new(FileOffset::new(start), FileOffset::new(end));
        copy_range(input, output, range)?;
        at = end;
    }
    Ok(())
}

fn copy_range(input: &File, output: &File, range: FileRange) -> io::Result<()> {
    let mut by_kernel = true;
    let mut buffer = Vec::new();
    let mut rest = range;
    while !rest.is_empty() {
        let now = to_usize(rest.up_to(COPY).len());
        let at = rest.start().raw();
        let (mut from, mut to) = (at, at);
        let copied = if by_kernel {
            match copy_file_range(input, Some(&mut from), output, Some(&mut to), now) {
                Ok(copied) if copied > 0 => copied,
                Err(Errno::INTR) => continue,
                // What is really wrong the plain copy finds out too.
                Ok(_) | Err(_) => {
                    by_kernel = false;
                    continue;
                }
            }
        } else {
            buffer.resize(now, 0);
            input.read_exact_at(&mut buffer, at)?;
            output.write_all_at(&buffer, at)?;
            now
        };
        let next = rest.start().checked_add(to_u64(copied));
        let next = next.ok_or(io::ErrorKind::FileTooLarge)?;
        rest = FileRange::new(next, rest.end());
    }
    Ok(())
}
