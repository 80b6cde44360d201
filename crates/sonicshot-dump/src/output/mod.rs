//! Output that appears whole or not at all, for no more eyes than its input.
//!
//! An output holds a guest's memory, and is often written by root from a file that somebody
//! else owns, into a folder of theirs. So every output goes through here, and these rules hold
//! for all:
//!
//! - It is written without a name, or, where the file system knows no such files, under a new
//!   random one that no link can stand in for (`O_EXCL`); with mode 0600 and the process's owner,
//!   and without access lists that the folder would hand down.
//! - Its folder is opened once, and everything is done in that folder, whatever becomes of the
//!   path that led there.
//! - When the content is complete it gets its owner and group, then its mode ([`settle`]), then
//!   its name. It is never wider than in the end.
//! - Its mode is that of the input, without setuid, setgid and sticky; of several inputs, and of
//!   a file that is replaced, what all of them allow. The umask has no part in it: who may read
//!   the input may read the output. An input whose mode does not tell who can reach it (no
//!   regular file; one without a name, such as a memfd, whose mode is 0777 always; one with an
//!   access list) allows its owner alone. Without an input it is 0600.
//! - Its owner is that of the file that it replaces, or else of the input, where the process may
//!   give it away; an owner of one input who may not read another gets nothing. Nobody gains by
//!   that an owner or group could not be set: the group and others then get what both had.
//! - A file in a folder where everyone may write, sticky, and that is not ours or the folder
//!   owner's, may have been put there to be replaced: its owner does not get the output. This is
//!   the kernel's rule for such files (`fs.protected_regular`, `fs/namei.c`).

pub(crate) mod dump_file;
pub(crate) mod folder;
pub(crate) mod sync;

use crate::DumpError;
use crate::prune::stats::bytes_of_blocks;
use rustix::fs::{
    AtFlags, CWD, Gid, Mode, OFlags, RenameFlags, Stat, Uid, fchmod, fchown, fgetxattr,
    fremovexattr, linkat, openat, renameat, renameat_with, statat,
};
use rustix::io::{Errno, retry_on_intr};
use rustix::process::geteuid;
use sonicshot::{FileId, FileStamp, Progress};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::{Builder, NamedTempFile};

/// Whether an existing output may be replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Overwrite {
    /// It is an error.
    #[default]
    Refuse,
    /// It is replaced, at the very end.
    Replace,
}

/// Options for a new file; by default one that exists is an error, and nobody is told how far it is.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct WriteOptions {
    /// Whether a file that exists is replaced.
    pub overwrite: Overwrite,
    /// Whoever is told how far it is, in bytes.
    pub progress: Option<Arc<dyn Progress>>,
}

impl WriteOptions {
    /// The defaults.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            overwrite: Overwrite::Refuse,
            progress: None,
        }
    }

    /// Says whether a file that exists is replaced.
    #[must_use]
    pub fn overwrite(mut self, overwrite: Overwrite) -> Self {
        self.overwrite = overwrite;
        self
    }

    /// Says who is told how far it is.
    #[must_use]
    pub fn progress(mut self, progress: Arc<dyn Progress>) -> Self {
        self.progress = Some(progress);
        self
    }
}

/// The target of an output.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Target<'a> {
    pub path: &'a Path,
    pub overwrite: Overwrite,
    /// The folder, if it is open already: of `path` only the last part counts then.
    pub folder: Option<&'a File>,
}

impl<'a> Target<'a> {
    pub(crate) fn new(path: &'a Path, overwrite: Overwrite) -> Self {
        Self {
            path,
            overwrite,
            folder: None,
        }
    }
}

/// A file that gets its name only when it is complete and on disk.
#[derive(Debug)]
pub(crate) struct Output {
    file: Unfinished,
    folder: File,
    name: OsString,
    path: PathBuf,
    overwrite: Overwrite,
    inputs: Vec<Rights>,
    sources: Vec<Unchanged>,
}

/// A file that must not change while an output is made of it.
#[derive(Debug)]
struct Unchanged {
    file: File,
    stamp: FileStamp,
}

impl Unchanged {
    fn new(file: &File) -> io::Result<Self> {
        Ok(Self {
            stamp: FileStamp::of(file)?,
            file: file.try_clone()?,
        })
    }

    fn check(&self) -> Result<(), DumpError> {
        check_stamp(&self.file, &name_of(&self.file), self.stamp)
    }
}

/// Refuses a file that was cut off, made longer or written to since it had this stamp.
pub(crate) fn check_stamp(file: &File, path: &Path, before: FileStamp) -> Result<(), DumpError> {
    let now = FileStamp::of(file).map_err(DumpError::io("reading", path))?;
    DumpError::check_same(path, before, now)
}

/// The name of an open file, for messages.
fn name_of(file: &File) -> PathBuf {
    let link = proc_name(file);
    std::fs::read_link(&link).unwrap_or_else(|_| "an input".into())
}

/// Makes the name of `path`, which lies in `folder`, durable.
pub(crate) fn sync_folder(folder: &File, path: &Path) -> Result<(), DumpError> {
    folder.sync_all().map_err(|source| DumpError::Unsettled {
        path: path.into(),
        what: format!(
            "{} could not be written to disk: if the machine stops now, the name may be lost",
            folder_of(path).display()
        ),
        source,
    })
}

#[derive(Debug)]
enum Unfinished {
    /// Without a name: whatever ends this process takes the file away.
    Nameless(File),
    /// With a name, where the file system knows no files without one.
    Named(NamedTempFile<File>),
}

/// Whether a name stands for one of the files that a process has open, such as `/dev/stdout` and
/// `/proc/self/fd/1`, by as many links as there are on the way.
fn is_system_link(path: &Path) -> bool {
    /// As the kernel follows (`MAXSYMLINKS`).
    const LINKS: usize = 40;
    let mut path = path.to_path_buf();
    for _ in 0..LINKS {
        if let Ok(folder) = folder_of(&path).canonicalize()
            && (folder.starts_with("/proc") || folder.starts_with("/dev/fd"))
        {
            return true;
        }
        match std::fs::read_link(&path) {
            Ok(to) => path = folder_of(&path).join(to),
            Err(_) => return false,
        }
    }
    false
}

impl Output {
    /// Begins to write `target`, which must be none of `inputs`: all files whose content goes
    /// into it, the one whose owner it gets first. None: of something that is no file.
    pub(crate) fn create(target: Target<'_>, inputs: &[&File]) -> Result<Self, DumpError> {
        Self::begin(target, inputs, nameless)
    }

    fn begin(
        target: Target<'_>,
        inputs: &[&File],
        nameless: fn(&File) -> io::Result<File>,
    ) -> Result<Self, DumpError> {
        let path = target.path;
        let invalid = |why| {
            let source = io::Error::new(io::ErrorKind::InvalidInput, why);
            DumpError::io("replacing", path)(source)
        };
        let parent = folder_of(path);
        let folder = match target.folder {
            Some(folder) => folder.try_clone(),
            None => open_folder(parent),
        };
        let folder = folder.map_err(DumpError::io("creating a file in", parent))?;
        let name = path.file_name().filter(|_| !ends_as_folder(path));
        let name = name.ok_or_else(|| invalid("it is not a regular file"))?;

        let there = statat(&folder, name, AtFlags::empty()).ok();
        let (mut rights, mut sources) = (Vec::new(), Vec::new());
        for input in inputs {
            let metadata = input.metadata().map_err(DumpError::io("reading", path))?;
            if there.is_some_and(|there| {
                FileId::new(there.st_dev, there.st_ino) == FileId::from(&metadata)
            }) {
                return Err(DumpError::SameFile { path: path.into() });
            }
            rights.push(Rights::of(input).map_err(DumpError::io("reading", path))?);
            sources.push(Unchanged::new(input).map_err(DumpError::io("reading", path))?);
        }
        // A device such as /dev/full, which root could replace, and nobody should be told to force.
        if let Some(why) = there.and_then(|there| no_place(kind_of(&there)))
            && !is_system_link(path)
        {
            return Err(invalid(why));
        }
        // Not followed, for it is the link itself that would be replaced.
        if target.overwrite == Overwrite::Refuse
            && statat(&folder, name, AtFlags::SYMLINK_NOFOLLOW).is_ok()
        {
            return Err(DumpError::Exists { path: path.into() });
        }
        if is_system_link(path) {
            return Err(invalid(match there {
                Some(_) => {
                    "it is a link of the system to an open file, which a file would take the place of"
                }
                None => {
                    "it would be among the system's own files, where none is made: give another folder"
                }
            }));
        }
        // A folder, or what an open file is.
        if there.is_some_and(|there| kind_of(&there) != libc::S_IFREG) {
            return Err(invalid("it is not a regular file"));
        }
        let file = match nameless(&folder) {
            Ok(file) => Unfinished::Nameless(file),
            Err(_) => Unfinished::Named(
                temporary(&folder, parent).map_err(DumpError::io("creating a file in", parent))?,
            ),
        };
        let output = Self {
            file,
            folder,
            name: name.to_owned(),
            path: path.into(),
            overwrite: target.overwrite,
            inputs: rights,
            sources,
        };
        forget_access_lists(output.file());
        Ok(output)
    }

    pub(crate) fn file(&self) -> &File {
        match &self.file {
            Unfinished::Nameless(file) => file,
            Unfinished::Named(file) => file.as_file(),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Gives the file its owner and its mode, makes it durable, and gives it its name. Returns
    /// what it takes on disk, in bytes.
    pub(crate) fn finish(self, progress: &dyn Progress) -> Result<u64, DumpError> {
        self.ready(progress)?.place()
    }

    /// All that may fail for what went into it: the file lacks its name alone.
    pub(crate) fn ready(self, progress: &dyn Progress) -> Result<Ready, DumpError> {
        let path = self.path.as_path();
        let file = self.file();
        let replaced = match self.overwrite {
            Overwrite::Refuse => None,
            Overwrite::Replace => Replaced::find(&self.folder, &self.name),
        };
        let failed = |action| not_finished(action, path);
        for source in &self.sources {
            source.check()?;
        }
        settle(file, &self.inputs, replaced).map_err(failed("setting the permissions of"))?;
        sync::sync(file, progress).map_err(failed("writing"))?;
        let metadata = file.metadata().map_err(failed("reading"))?;
        let disk_bytes = bytes_of_blocks(&metadata);
        let output = self;
        Ok(Ready { output, disk_bytes })
    }
}

fn not_finished(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DumpError {
    move |source| DumpError::NotFinished {
        action,
        path: path.into(),
        source,
    }
}

/// A file that is whole and on disk, without its name.
#[derive(Debug)]
pub(crate) struct Ready {
    output: Output,
    disk_bytes: u64,
}

impl Ready {
    /// Gives the file its name. Returns what it takes on disk, in bytes.
    pub(crate) fn place(self) -> Result<u64, DumpError> {
        let Output {
            file,
            folder,
            name,
            path,
            overwrite,
            ..
        } = self.output;
        let named = match (file, overwrite) {
            (Unfinished::Nameless(file), Overwrite::Refuse) => link(&file, &folder, &name),
            (Unfinished::Nameless(file), Overwrite::Replace) => {
                replace(&file, &folder, folder_of(&path), &name)
            }
            (Unfinished::Named(file), Overwrite::Refuse) => persist_new(file, &folder, &name),
            (Unfinished::Named(file), Overwrite::Replace) => persist(file, &folder, &name),
        };
        named.map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => DumpError::Exists { path: path.clone() },
            _ => not_finished("giving its name to", &path)(error),
        })?;
        // The name itself is durable once the folder is.
        sync_folder(&folder, &path)?;
        Ok(self.disk_bytes)
    }
}

/// The reason why something of this kind is no place for an output, but for a folder.
fn no_place(kind: u32) -> Option<&'static str> {
    match kind {
        libc::S_IFCHR | libc::S_IFBLK => Some(
            "it is not a regular file but a device, which is no place for an output: give a file",
        ),
        libc::S_IFIFO => Some(
            "it is not a regular file but a pipe, which is no place for an output: give a file",
        ),
        libc::S_IFSOCK => Some(
            "it is not a regular file but a socket, which is no place for an output: give a file",
        ),
        _ => None,
    }
}

/// The owner of a file, and who may do what with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rights {
    /// The owner of the file, and its group; `None` for what is no file.
    owner: Option<(u32, u32)>,
    /// Of the file's mode, `rwxrwxrwx`.
    mode: u32,
}

/// All of a mode that is ever given to an output.
const MODE: u32 = 0o777;
/// The rights that its owner has to a file.
const OWNER: u32 = 0o700;
const PRIVATE: u32 = 0o600;

impl Rights {
    /// Those of an open file or folder.
    pub(crate) fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        if !metadata.is_file() && !metadata.is_dir() {
            // Whoever may read a device need not be allowed to see what it held now.
            return Ok(Self {
                owner: None,
                mode: PRIVATE,
            });
        }
        // A file without a name was reached by way of a process that has it open.
        let all = if metadata.nlink() > 0 && !has_access_list(file) {
            MODE
        } else if metadata.is_dir() {
            OWNER
        } else {
            PRIVATE
        };
        Ok(Self {
            owner: Some((metadata.uid(), metadata.gid())),
            mode: metadata.mode() & all,
        })
    }

    /// The mode with which a file of the group `gid` gives nobody more than these do. In another
    /// group, its members may have been among the others, and the members of this one may be.
    fn for_group(self, gid: u32) -> u32 {
        if self.owner.is_none_or(|(_, own)| own == gid) {
            return self.mode;
        }
        let both = (self.mode >> 3) & self.mode & 0o7;
        (self.mode & OWNER) | (both << 3) | both
    }

    /// Whether everyone may read it, whoever they are.
    fn read_by_all(self) -> bool {
        self.mode & 0o444 == 0o444
    }
}

/// The file or folder that an output replaces.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Replaced {
    rights: Rights,
    /// Whether its owner gets the output.
    keeps: bool,
}

impl Replaced {
    /// Finds the file or folder that has the name; a link or what is no file counts for nothing.
    pub(crate) fn find(folder: &File, name: &OsStr) -> Option<Self> {
        let there = statat(folder, name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
        if ![libc::S_IFREG, libc::S_IFDIR].contains(&kind_of(&there)) {
            return None;
        }
        let folder = folder.metadata().ok()?;
        let for_all = folder.mode() & libc::S_ISVTX != 0 && folder.mode() & 0o022 != 0;
        let trusted = [geteuid().as_raw(), folder.uid()].contains(&there.st_uid);
        Some(Self {
            rights: Rights {
                owner: Some((there.st_uid, there.st_gid)),
                mode: there.st_mode & MODE,
            },
            keeps: trusted || !for_all,
        })
    }

    /// The same, but with an owner who does not get the output if `folder`'s does not.
    pub(crate) fn inside(mut self, folder: Self) -> Self {
        self.keeps = self.keeps && folder.keeps;
        self
    }
}

/// Gives a file or folder, complete and with mode 0600 or 0700, its owner, its group, and then
/// its mode: see the rules [above](self).
pub(crate) fn settle(file: &File, inputs: &[Rights], replaced: Option<Replaced>) -> io::Result<()> {
    let kept = replaced.filter(|replaced| replaced.keeps);
    let owner = match kept {
        Some(replaced) => replaced.rights.owner,
        None => owner_of(inputs),
    };
    if let Some((uid, gid)) = owner {
        // The group first, for to give a file away is to have no say any more. What is not
        // allowed is no failure: the mode takes it into account.
        let _ = fchown(file, None, Some(Gid::from_raw(gid)));
        let _ = fchown(file, Some(Uid::from_raw(uid)), None);
    }
    let gid = file.metadata()?.gid();
    let widest = match inputs {
        [] => PRIVATE,
        // It could not be taken away: it is for its owner alone, whatever the list says.
        _ if has_access_list(file) => OWNER,
        _ => MODE,
    };
    let all = inputs
        .iter()
        .copied()
        .chain(replaced.map(|replaced| replaced.rights));
    let mode = all.fold(widest, |mode, rights| mode & rights.for_group(gid));
    let set = fchmod(file, Mode::from_raw_mode(mode));
    // A file system with modes of its own making, such as FAT, may refuse or ignore it.
    let is = file.metadata()?.mode() & 0o7777;
    if is & !OWNER & !mode == 0 {
        return Ok(());
    }
    set?;
    Err(io::Error::new(
        io::ErrorKind::PermissionDenied,
        format!("its file system lets more be done with it ({is:o}) than the input's ({mode:o})"),
    ))
}

/// The owner of what is made of `inputs`: that of the first, unless another of them may be
/// something that they may not read.
fn owner_of(inputs: &[Rights]) -> Option<(u32, u32)> {
    let (first, others) = inputs.split_first()?;
    let (uid, gid) = first.owner?;
    let may =
        |other: &Rights| other.read_by_all() || other.owner.is_some_and(|(owner, _)| owner == uid);
    others.iter().all(may).then_some((uid, gid))
}

const ACCESS_LIST: &str = "system.posix_acl_access";
const INHERITED_LIST: &str = "system.posix_acl_default";

/// Whether a file has an access list, so that its mode says less than it seems: the group's bits
/// are then the most that anyone on the list may do (acl(5)).
fn has_access_list(file: &File) -> bool {
    let mut nothing: [u8; 0] = [];
    !matches!(
        fgetxattr(file, ACCESS_LIST, &mut nothing[..]),
        Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::NOSYS)
    )
}

/// Takes away the access lists that a new file or folder got from the folder it is in. They would
/// count as soon as its group has any rights.
pub(crate) fn forget_access_lists(file: &File) {
    for name in [ACCESS_LIST, INHERITED_LIST] {
        // Mostly there is none.
        let _ = fremovexattr(file, name);
    }
}

/// The folder that holds `path`.
pub(crate) fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// Opens a folder to work in, wherever its path may lead later.
pub(crate) fn open_folder(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(retry_on_intr(|| openat(CWD, path, flags, Mode::empty()))?.into())
}

fn ends_as_folder(path: &Path) -> bool {
    path.as_os_str().as_bytes().ends_with(b"/")
}

fn kind_of(stat: &Stat) -> u32 {
    stat.st_mode & libc::S_IFMT
}

fn nameless(folder: &File) -> io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR;
    let file = File::from(retry_on_intr(|| openat(folder, ".", flags, mode))?);
    // Naming goes through /proc, which a container may lack.
    std::fs::metadata(proc_name(&file))?;
    Ok(file)
}

fn proc_name(file: &File) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

/// Gives the file a name that must be free.
fn link(file: &File, folder: &File, name: &OsStr) -> io::Result<()> {
    linkat(CWD, proc_name(file), folder, name, AtFlags::SYMLINK_FOLLOW)?;
    Ok(())
}

/// A file that has no name, or one that could not be removed: which, and why.
pub(crate) type Scratch = Result<File, (PathBuf, io::Error)>;

/// A file without a name, for this process alone, that is gone with it.
pub(crate) fn scratch(folder: &Path) -> io::Result<Scratch> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match retry_on_intr(|| openat(CWD, folder, flags, Mode::RUSR | Mode::WUSR)) {
        Ok(file) => Ok(Ok(file.into())),
        // Where there is no such thing, one whose name is removed at once.
        Err(_) => {
            let named = Builder::new().prefix(PREFIX).tempfile_in(folder)?;
            let (file, name) = named.into_parts();
            let path = name.to_path_buf();
            Ok(match name.close() {
                Ok(()) => Ok(file),
                Err(error) => Err((path, error)),
            })
        }
    }
}

pub(crate) const PREFIX: &str = ".sonicshot-";

/// Makes something with a random name in a folder, whose `path` is for cleaning up.
fn with_random_name<T>(
    path: &Path,
    mut make: impl FnMut(&OsStr) -> io::Result<T>,
) -> io::Result<NamedTempFile<T>> {
    Builder::new().prefix(PREFIX).make_in(path, |path| {
        make(path.file_name().ok_or(io::ErrorKind::InvalidInput)?)
    })
}

fn temporary(folder: &File, path: &Path) -> io::Result<NamedTempFile<File>> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::RDWR | OFlags::CLOEXEC;
    with_random_name(path, |name| {
        Ok(retry_on_intr(|| openat(folder, name, flags, Mode::RUSR | Mode::WUSR))?.into())
    })
}

/// Gives the file a name that may be taken: a link cannot replace, so by way of another name.
fn replace(file: &File, folder: &File, path: &Path, name: &OsStr) -> io::Result<()> {
    persist(
        with_random_name(path, |other| link(file, folder, other))?,
        folder,
        name,
    )
}

/// Renames a temporary file, over what has the name.
fn persist<T>(file: NamedTempFile<T>, folder: &File, name: &OsStr) -> io::Result<()> {
    let temporary = file.path().file_name().ok_or(io::ErrorKind::InvalidInput)?;
    renameat(folder, temporary, folder, name)?;
    // The temporary name is gone.
    let _gone = file.into_temp_path().keep();
    Ok(())
}

/// Renames a temporary file to a name that must be free.
fn persist_new<T>(file: NamedTempFile<T>, folder: &File, name: &OsStr) -> io::Result<()> {
    let temporary = file.path().file_name().ok_or(io::ErrorKind::InvalidInput)?;
    match renameat_with(folder, temporary, folder, name, RenameFlags::NOREPLACE) {
        Ok(()) => {
            let _gone = file.into_temp_path().keep();
            Ok(())
        }
        // Where a name cannot be taken so: a second one, and the first is removed.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
            linkat(folder, temporary, folder, name, AtFlags::empty())?;
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests say so by panicking")]
mod tests {
    use super::{Output, Overwrite, Rights, Target, owner_of};
    use crate::DumpError;
    use std::fs::{self, File, Permissions};
    use std::io::{self, Write};
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    fn of(uid: u32, gid: u32, mode: u32) -> Rights {
        Rights {
            owner: Some((uid, gid)),
            mode,
        }
    }

    /// Whatever anyone may do in another group than the input's, they may do in the input's.
    #[test]
    fn no_group_gives_more() {
        for mode in 0..=0o777 {
            let rights = of(1, 2, mode);
            assert_eq!(rights.for_group(2), mode);
            let other = rights.for_group(3);
            let class = |mode: u32, shift: u32| mode >> shift & 0o7;
            assert_eq!(class(other, 6), class(mode, 6));
            // A member of 2 is among the others of an output of 3; one of 3 was among the others.
            for now in [class(other, 3), class(other, 0)] {
                for before in [class(mode, 3), class(mode, 0)] {
                    assert_eq!(now & !before, 0, "{mode:o}");
                }
            }
            // And no less than can be.
            let both = class(mode, 3) & class(mode, 0);
            assert_eq!(other & 0o77, both << 3 | both, "{mode:o}");
        }
    }

    #[test]
    fn an_owner_gets_nothing_that_they_may_not_read() {
        let device = Rights {
            owner: None,
            mode: 0o600,
        };
        for (inputs, want) in [
            (&[][..], None),
            (&[of(1, 2, 0o600)], Some((1, 2))),
            (&[device], None),
            (&[of(1, 2, 0o600), of(1, 3, 0o600)], Some((1, 2))),
            (&[of(1, 2, 0o600), of(4, 2, 0o640)], None),
            (&[of(1, 2, 0o600), of(4, 2, 0o604)], None),
            (&[of(1, 2, 0o600), of(4, 2, 0o644)], Some((1, 2))),
            (&[of(1, 2, 0o600), device], None),
        ] {
            assert_eq!(owner_of(inputs), want, "{inputs:?}");
        }
    }

    /// The case of a file system that knows no files without a name.
    #[test]
    fn with_a_name_from_the_start_it_is_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let names = || {
            let entries = fs::read_dir(folder.path()).unwrap();
            let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };
        fs::write(at("in"), b"memory").unwrap();
        fs::set_permissions(at("in"), Permissions::from_mode(0o4640)).unwrap();
        let input = File::open(at("in")).unwrap();
        let begin = |overwrite| {
            let path = at("out");
            let target = Target::new(&path, overwrite);
            Output::begin(
                target,
                &[&input],
                |_| Err(io::ErrorKind::Unsupported.into()),
            )
        };
        for overwrite in [Overwrite::Refuse, Overwrite::Replace] {
            let output = begin(overwrite).unwrap();
            output.file().write_all(b"memory").unwrap();
            assert_eq!(output.file().metadata().unwrap().mode() & 0o7777, 0o600);
            assert_eq!(output.file().metadata().unwrap().nlink(), 1);
            output.finish(&None).unwrap();
            assert_eq!(names(), ["in", "out"]);
            let out = fs::metadata(at("out")).unwrap();
            assert_eq!((out.mode() & 0o7777, out.nlink()), (0o640, 1));
        }
        // Given up, or too late.
        drop(begin(Overwrite::Replace).unwrap());
        fs::remove_file(at("out")).unwrap();
        let late = begin(Overwrite::Refuse).unwrap();
        fs::write(at("out"), b"precious").unwrap();
        assert!(matches!(late.finish(&None), Err(DumpError::Exists { .. })));
        assert_eq!(fs::read(at("out")).unwrap(), b"precious");
        assert_eq!(names(), ["in", "out"]);
    }
}
