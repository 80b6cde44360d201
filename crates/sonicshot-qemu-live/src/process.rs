//! QEMU's process, as `/proc` shows it: where its memory is, and the files that it is.

use crate::error::QemuError;
use crate::sealed::Sealed;
use crate::shadow::Hole;
use crate::sys::{RemoteRead, read_process};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags, open, openat};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;

/// A process, whatever becomes of its number.
#[derive(Debug)]
pub(crate) struct Process {
    pid: Pid,
    pidfd: OwnedFd,
    folder: OwnedFd,
}

/// A range of a process's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mapping {
    pub start: u64,
    pub end: u64,
    /// Read, write, execute, and whether it is shared: `rw-s`.
    pub rights: String,
    /// Its offset in its file.
    pub offset: u64,
    pub inode: u64,
    pub path: String,
}

impl Mapping {
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.splitn(6, ' ');
        let (start, end) = words.next()?.split_once('-')?;
        let hex = |word| u64::from_str_radix(word, 16).ok();
        let (start, end) = (hex(start)?, hex(end)?);
        let rights = words.next()?.to_owned();
        let offset = hex(words.next()?)?;
        let _device = words.next()?;
        let inode = words.next()?.parse().ok()?;
        let path = words.next().unwrap_or_default().trim().to_owned();
        (start < end).then_some(Self {
            start,
            end,
            rights,
            offset,
            inode,
            path,
        })
    }

    /// Its length in bytes; `None` if it ends before it begins, which no line of the kernel's says.
    pub(crate) fn len(&self) -> Option<u64> {
        self.end.checked_sub(self.start)
    }

    /// Shared with others by a file: what is written goes there.
    pub(crate) fn is_shared(&self) -> bool {
        self.rights.ends_with('s') && self.inode != 0
    }
}

/// The place where a RAM block is read.
#[derive(Debug, Clone)]
pub(crate) enum Backing {
    /// From the file that it is.
    File {
        /// The file.
        file: Arc<File>,
        /// The block's offset in it.
        offset: u64,
        /// The file as it is mapped, if it can be.
        sealed: Option<Arc<Sealed>>,
    },
    /// From QEMU's memory.
    Process {
        /// QEMU's.
        process: Arc<Process>,
        /// The block's address.
        address: u64,
    },
}

impl Backing {
    /// Fills `holes` with what the block has from `from` on, for the hole at `base`.
    pub(crate) fn fill(&self, from: u64, base: usize, holes: &mut [Hole<'_>]) -> io::Result<()> {
        let place = |hole: &Hole<'_>, begin: u64| {
            let inside = hole.at.checked_sub(base)?;
            let inside = u64::try_from(inside).ok()?;
            begin.checked_add(from)?.checked_add(inside)
        };
        let wrong = || io::Error::from(io::ErrorKind::InvalidInput);
        match self {
            Self::File {
                file,
                offset,
                sealed,
            } => holes.iter_mut().try_for_each(|hole| {
                let at = place(hole, *offset).ok_or_else(wrong)?;
                let mapped = sealed
                    .as_ref()
                    .and_then(|all| all.get(at, hole.bytes.len()));
                if mapped.is_some_and(|from| from.copy_to(hole.bytes)) {
                    return Ok(());
                }
                file.read_exact_at(hole.bytes, at)
            }),
            Self::Process { process, address } => {
                let mut reads = Vec::with_capacity(holes.len());
                for hole in holes {
                    reads.push(RemoteRead {
                        from: place(hole, *address).ok_or_else(wrong)?,
                        to: &mut *hole.bytes,
                    });
                }
                process.read(&mut reads)
            }
        }
    }

    /// All of a small block.
    pub(crate) fn read(&self, from: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.fill(from, 0, &mut [Hole { at: 0, bytes }])
    }

    /// Has ready what the block has in these ranges of bytes, which are in their order, as far as
    /// that is any use.
    pub(crate) fn prepare(&self, ranges: impl Iterator<Item = Range<u64>>) {
        let Self::File {
            offset,
            sealed: Some(sealed),
            ..
        } = self
        else {
            return;
        };
        let place = |at: u64| offset.checked_add(at);
        sealed.prepare(ranges.filter_map(|range| Some(place(range.start)?..place(range.end)?)));
    }

    /// In words.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::File { .. } => "a shared file",
            Self::Process { .. } => "private memory",
        }
    }
}

impl Process {
    /// The process with the number `pid`.
    pub(crate) fn open(pid: i32) -> Result<Self, QemuError> {
        let failed = |action| {
            move |source: io::Error| QemuError::Process {
                action,
                pid,
                source,
            }
        };
        let number = Some(pid).filter(|pid| *pid > 0).and_then(Pid::from_raw);
        let number =
            number.ok_or_else(|| failed("the number")(io::ErrorKind::InvalidInput.into()))?;
        let pidfd = pidfd_open(number, PidfdFlags::empty());
        let pidfd = pidfd.map_err(|error| failed("opening")(error.into()))?;
        let folder = open(
            format!("/proc/{pid}"),
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(|error| failed("opening the folder in /proc")(error.into()))?;
        let new = Self {
            pid: number,
            pidfd,
            folder,
        };
        // Else the folder may be another's.
        new.check()?;
        Ok(new)
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    fn is_there(&self) -> io::Result<bool> {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let now = Timespec::default();
        Ok(poll(&mut fds, Some(&now))? == 0)
    }

    fn check(&self) -> Result<(), QemuError> {
        match self.is_there() {
            Ok(true) => Ok(()),
            Ok(false) => Err(QemuError::Gone {
                command: "a look into its process",
            }),
            Err(source) => Err(self.failed("watching")(source)),
        }
    }

    fn failed(&self, action: &'static str) -> impl Fn(io::Error) -> QemuError + use<> {
        let pid = self.pid();
        move |source| QemuError::Process {
            action,
            pid,
            source,
        }
    }

    fn read(&self, reads: &mut [RemoteRead<'_>]) -> io::Result<()> {
        read_process(self.pid, reads)?;
        // While it is there nobody else has its number.
        match self.is_there()? {
            true => Ok(()),
            false => Err(io::Error::other("QEMU has ended")),
        }
    }

    /// All of its mappings, by address. The kernel bounds their number (`vm.max_map_count`).
    pub(crate) fn mappings(&self) -> Result<Vec<Mapping>, QemuError> {
        let failed = self.failed("reading the mappings");
        let maps = openat(
            &self.folder,
            "maps",
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        );
        let mut text = String::new();
        let mut maps = File::from(maps.map_err(|error| failed(error.into()))?);
        maps.read_to_string(&mut text).map_err(&failed)?;
        let wrong = |line: &str| QemuError::Unknown {
            what: "its mappings (/proc/PID/maps)",
            found: format!("`{line}`"),
            expected: "START-END RIGHTS OFFSET DEVICE INODE [PATH]",
        };
        let parsed = |line| Mapping::parse(line).ok_or_else(|| wrong(line));
        text.lines().map(parsed).collect()
    }

    /// The file of a shared mapping, if it can be opened.
    pub(crate) fn file_of(&self, mapping: &Mapping) -> Option<File> {
        let range = format!("map_files/{:x}-{:x}", mapping.start, mapping.end);
        let by_range = self
            .open_in(&range)
            .filter(|file| is_inode(file, mapping.inode));
        by_range.or_else(|| self.file_among_open(mapping))
    }

    /// A memfd has no other name than those of its descriptors.
    fn file_among_open(&self, mapping: &Mapping) -> Option<File> {
        let listed = std::fs::read_dir(format!("/proc/{}/fd", self.pid())).ok()?;
        let mut names = listed.flatten();
        let same = |name: &std::ffi::OsStr| {
            let path = format!("fd/{}", name.to_str()?);
            let found =
                rustix::fs::statat(&self.folder, &path, rustix::fs::AtFlags::empty()).ok()?;
            (found.st_ino == mapping.inode).then_some(path)
        };
        let path = names.find_map(|entry| {
            let target = std::fs::read_link(entry.path()).ok()?;
            let named = target.to_str() == Some(mapping.path.as_str());
            named.then(|| same(&entry.file_name())).flatten()
        })?;
        self.open_in(&path)
    }

    fn open_in(&self, path: &str) -> Option<File> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = File::from(openat(&self.folder, path, flags, Mode::empty()).ok()?);
        file.metadata().ok()?.is_file().then_some(file)
    }
}

fn is_inode(file: &File, inode: u64) -> bool {
    file.metadata().is_ok_and(|found| found.ino() == inode)
}

#[cfg(test)]
mod tests {
    use super::{Backing, Mapping, Process};
    use std::sync::Arc;

    #[test]
    fn mappings_are_read() {
        let line = "7f00-7f10 rw-s 00100000 00:01 77  /memfd:memory-backend-memfd (deleted)";
        let found = Mapping::parse(line).unwrap();
        assert_eq!(
            (found.start, found.end, found.offset, found.inode),
            (0x7f00, 0x7f10, 1 << 20, 77)
        );
        assert!(found.is_shared());
        assert!(!Mapping::parse("0-1 rw-p 0 0:0 0 ").unwrap().is_shared());
        for wrong in [
            "",
            "1-1 rw-p 0 0:0 0",
            "2-1 rw-p 0 0:0 0",
            "0-1 rw-p z 0:0 0",
        ] {
            assert!(Mapping::parse(wrong).is_none(), "{wrong}");
        }
    }

    #[test]
    fn this_process_is_read() {
        let own =
            Arc::new(Process::open(rustix::process::getpid().as_raw_nonzero().get()).unwrap());
        assert!(!own.mappings().unwrap().is_empty());
        let bytes = [7_u8; 100];
        let address = bytes.as_ptr().addr() as u64;
        let backing = Backing::Process {
            process: own,
            address,
        };
        let mut out = [0; 50];
        backing.read(50, &mut out).unwrap();
        assert_eq!(out, [7; 50]);
        assert!(Process::open(0).is_err());
        assert!(Process::open(-1).is_err());
    }
}
