//! Whether another process writes a file: a running VMM its guest's RAM.
//!
//! The kernel knows: it grants a read lease only on a file that nobody has open for writing, or
//! mapped so. Where it grants no leases at all (NFS, a file of another user), every process is
//! looked into by `/proc`. A block device may be a disk of one of Xen's domains, which no process has open.

use crate::backing::plain::is_block_device;
use crate::backing::sys;
use crate::error::{DumpError, WritingProcess};
use rustix::fs::{major, minor};
use sonicshot::FileId;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::thread;
use std::time::Duration;

/// The number of times that the lease is asked for: a child that was just forked has what its
/// parent has open until it becomes another program.
const TRIES: u32 = 4;
const BETWEEN_TRIES: Duration = Duration::from_millis(10);

/// Refuses a file that a process, this one included, has open for writing.
///
/// It says nothing of the next instant, nor of other hosts that share the file.
///
/// # Errors
/// [`DumpError::InUse`] if one has, [`DumpError::MayBeInUse`] if that cannot be told,
/// [`DumpError::NotInPlace`] if it is a block device, [`DumpError::Io`] if the file cannot be opened.
pub fn check_not_in_use(path: &Path) -> Result<(), DumpError> {
    let file = File::open(path).map_err(DumpError::io("opening", path))?;
    if is_block_device(&file).map_err(DumpError::io("reading", path))? {
        return Err(DumpError::NotInPlace {
            path: path.to_owned(),
            format: "on a block device",
        });
    }
    check(&file, path)
}

/// The same of a file, or a block device, that is only to be read: what comes of one that is written
/// meanwhile is torn.
///
/// Who writes a device by another that lies over or under it is not seen.
///
/// # Errors
/// As [`check_not_in_use`], but for a block device.
pub fn check_not_written(path: &Path) -> Result<(), DumpError> {
    let file = File::open(path).map_err(DumpError::io("opening", path))?;
    if !is_block_device(&file).map_err(DumpError::io("reading", path))? {
        return check(&file, path);
    }
    let reading = DumpError::io("reading", path);
    let number = file.metadata().map_err(reading)?.rdev();
    if is_written_by_a_domain(Path::new(XEN_DISKS), number) {
        let path = path.to_owned();
        return Err(DumpError::InUse { path, writer: None });
    }
    // There are no leases on devices.
    let source = io::ErrorKind::Unsupported.into();
    judge(scan(Path::new("/proc"), &file), path, source)
}

/// The disks that dom0's kernel gives to domains of Xen, with what each is and how it may be used
/// (`drivers/block/xen-blkback/xenbus.c`).
const XEN_DISKS: &str = "/sys/bus/xen-backend/devices";

/// Whether the block device of this number is a disk that a domain may write to. Where there is no Xen it is
/// none; one that is not said to be read only may be written.
fn is_written_by_a_domain(disks: &Path, number: u64) -> bool {
    let wanted = format!("{:x}:{:x}", major(number), minor(number));
    let Ok(disks) = fs::read_dir(disks) else {
        return false;
    };
    disks.flatten().any(|disk| {
        let told = |name| fs::read_to_string(disk.path().join(name)).unwrap_or_default();
        told("physical_device").trim() == wanted && !told("mode").starts_with('r')
    })
}

/// The same of a file that is open for reading.
pub(crate) fn check(file: &File, path: &Path) -> Result<(), DumpError> {
    for _ in 0..TRIES {
        match sys::try_read_lease(file) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return judge(scan(Path::new("/proc"), file), path, error),
        }
        thread::sleep(BETWEEN_TRIES);
    }
    Err(DumpError::InUse {
        path: path.to_owned(),
        writer: scan(Path::new("/proc"), file)
            .ok()
            .and_then(|scan| scan.writer),
    })
}

/// Judges by `/proc`, where there are no leases because of `error`.
fn judge(scan: io::Result<Scan>, path: &Path, error: io::Error) -> Result<(), DumpError> {
    let path = path.to_owned();
    match scan {
        Ok(Scan {
            writer: Some(writer),
            ..
        }) => Err(DumpError::InUse {
            path,
            writer: Some(writer),
        }),
        Ok(Scan { hidden: false, .. }) => Ok(()),
        Ok(Scan { hidden: true, .. }) | Err(_) => Err(DumpError::MayBeInUse {
            path,
            source: error,
        }),
    }
}

/// The finding among the processes.
#[derive(Debug, Default)]
struct Scan {
    writer: Option<WritingProcess>,
    /// Some process may not be looked into.
    hidden: bool,
}

/// The thing that is looked for: a file, or a block device, which may have several names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    File(FileId),
    Device(u64),
}

impl Wanted {
    fn of(metadata: &Metadata) -> Self {
        if metadata.file_type().is_block_device() {
            return Self::Device(metadata.rdev());
        }
        Self::File(FileId::from(metadata))
    }

    /// Whether this is what has the name `path`.
    fn is_at(self, path: &Path) -> io::Result<bool> {
        Ok(Self::of(&fs::metadata(path)?) == self)
    }
}

/// Looks for a process that has `file` open for writing.
fn scan(proc: &Path, file: &File) -> io::Result<Scan> {
    scan_for(proc, Wanted::of(&file.metadata()?))
}

fn scan_for(proc: &Path, wanted: Wanted) -> io::Result<Scan> {
    let mut found = Scan::default();
    for entry in fs::read_dir(proc)? {
        let entry = entry?;
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let process = entry.path();
        let writes = [has_open(&process, wanted), has_mapped(&process, wanted)];
        if writes.iter().any(|writes| matches!(writes, Ok(true))) {
            let command = fs::read_to_string(process.join("comm")).unwrap_or_default();
            found.writer = Some(WritingProcess {
                pid,
                command: command.trim_end().to_owned(),
            });
            return Ok(found);
        }
        let denied = |result: &io::Result<bool>| {
            let error = result.as_ref().err();
            error.is_some_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
        };
        found.hidden |= writes.iter().any(denied);
    }
    Ok(found)
}

/// Whether a descriptor of the process is of the file, and for writing.
fn has_open(process: &Path, wanted: Wanted) -> io::Result<bool> {
    for entry in fs::read_dir(process.join("fd"))? {
        let entry = entry?;
        // It may be closed by now.
        if !wanted.is_at(&entry.path()).unwrap_or(false) {
            continue;
        }
        let info = process.join("fdinfo").join(entry.file_name());
        let info = fs::read_to_string(info);
        if info.is_ok_and(|info| info.lines().any(opens_for_writing)) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A line of `fdinfo`: the flags of `open`, octal.
fn opens_for_writing(line: &str) -> bool {
    /// `O_ACCMODE`, of which 0 is reading only.
    const ACCESS: u32 = 3;
    let flags = line.strip_prefix("flags:");
    let flags = flags.and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok());
    flags.is_some_and(|flags| flags & ACCESS != 0)
}

/// Whether the process has the file mapped so that what it writes goes into it.
fn has_mapped(process: &Path, wanted: Wanted) -> io::Result<bool> {
    let maps = fs::read_to_string(process.join("maps"))?;
    Ok(maps.lines().any(|line| {
        let Some((range, inode)) = writable_shared(line) else {
            return false;
        };
        let is_inode = match wanted {
            Wanted::File(file) => file.inode() == inode,
            Wanted::Device(_) => true,
        };
        if !is_inode {
            return false;
        }
        // `maps` names the file system's own device, which on btrfs and overlays is not the one
        // of `stat`. Only root may see more: to others the number alone is enough to be careful.
        let target = process.join("map_files").join(range);
        // The inode of a device says nothing.
        let by_number = matches!(wanted, Wanted::File(_));
        wanted.is_at(&target).unwrap_or(by_number)
    }))
}

/// The range and the inode of a line of `maps`, if what is written there reaches the file.
fn writable_shared(line: &str) -> Option<(&str, u64)> {
    let mut fields = line.split_ascii_whitespace();
    let (range, permissions) = (fields.next()?, fields.next()?.as_bytes());
    if permissions.get(1) != Some(&b'w') || permissions.get(3) != Some(&b's') {
        return None;
    }
    let inode = fields.nth(2)?.parse().ok()?;
    Some((range, inode))
}

#[cfg(test)]
mod tests {
    use super::{
        Wanted, check, is_written_by_a_domain, judge, opens_for_writing, scan, scan_for,
        writable_shared,
    };
    use crate::DumpError;
    use memmap2::MmapMut;
    use std::fs::{self, File, OpenOptions};
    use std::io;
    use std::os::unix::fs::symlink;
    use std::path::Path;

    #[test]
    fn lines_of_proc() {
        for (line, writes) in [
            ("flags:\t0100000", false),
            ("flags:\t0100001", true),
            ("flags:\t02100002", true),
            ("pos:\t2", false),
            ("flags:\tx", false),
        ] {
            assert_eq!(opens_for_writing(line), writes, "{line}");
        }
        let line = "7f00-7f10 rw-s 00000000 fe:00 42   /a b (deleted)";
        assert_eq!(writable_shared(line), Some(("7f00-7f10", 42)));
        for line in [
            "7f00-7f10 rw-p 00000000 fe:00 42 /a",
            "7f00-7f10 r--s 00000000 fe:00 42 /a",
            "7f00-7f10 rw-s 00000000 fe:00",
            "",
        ] {
            assert_eq!(writable_shared(line), None, "{line}");
        }
    }

    /// Both ways of asking, of a file that is open for reading, for writing, mapped.
    #[test]
    fn leases_and_proc_agree() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ram");
        fs::write(&path, [1; 8192]).unwrap();
        let file = File::open(&path).unwrap();
        let proc = || scan(Path::new("/proc"), &file).unwrap();
        assert!(check(&file, &path).is_ok());
        assert_eq!(proc().writer, None);

        let writer = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        let by_lease = check(&file, &path).unwrap_err();
        let DumpError::InUse { writer: found, .. } = &by_lease else {
            panic!("{by_lease}");
        };
        assert_eq!(found.as_ref().unwrap().pid, std::process::id());
        assert_eq!(proc().writer, *found);
        assert!(by_lease.to_string().contains("pid"), "{by_lease}");

        // Mapped, then closed.
        #[expect(unsafe_code, reason = "a mapping that outlives its descriptor")]
        // SAFETY: nobody else writes the file or changes its length.
        let map = unsafe { MmapMut::map_mut(&writer) }.unwrap();
        drop(writer);
        assert!(matches!(
            check(&file, &path),
            Err(DumpError::InUse {
                writer: Some(_),
                ..
            })
        ));
        assert_eq!(proc().writer, *found);
        drop(map);
        assert!(check(&file, &path).is_ok());
        assert_eq!(proc().writer, None);
    }

    /// A device is the same by whatever name it was opened.
    #[test]
    fn a_block_device_is_told_by_its_number() {
        let folder = tempfile::tempdir().unwrap();
        let [one, same, other] = ["one", "same", "other"].map(|name| folder.path().join(name));
        for (node, minor) in [(&one, 240), (&same, 240), (&other, 241)] {
            let kind = rustix::fs::FileType::BlockDevice;
            let (mode, device) = (0o600.into(), rustix::fs::makedev(7, minor));
            let made = rustix::fs::mknodat(rustix::fs::CWD, node, kind, mode, device);
            if !sonicshot_testkit::has("root, who makes devices", made.is_ok()) {
                return;
            }
        }
        // What a process has open, as `/proc` tells it.
        let process = folder.path().join("proc/77");
        for folder in ["fd", "fdinfo"] {
            fs::create_dir_all(process.join(folder)).unwrap();
        }
        fs::write(process.join("maps"), "").unwrap();
        fs::write(process.join("comm"), "vmm\n").unwrap();
        symlink(&same, process.join("fd/5")).unwrap();
        let found = |node: &Path, flags: &str| {
            fs::write(process.join("fdinfo/5"), flags).unwrap();
            let wanted = Wanted::of(&fs::metadata(node).unwrap());
            let scan = scan_for(&folder.path().join("proc"), wanted).unwrap();
            scan.writer.map(|writer| writer.pid)
        };
        assert_eq!(found(&one, "flags:\t0100002\n"), Some(77));
        assert_eq!(found(&one, "flags:\t0100000\n"), None);
        assert_eq!(found(&other, "flags:\t0100002\n"), None);
    }

    #[test]
    fn a_disk_of_a_domain_is_told_by_its_number() {
        let folder = tempfile::tempdir().unwrap();
        let number = rustix::fs::makedev(0xfd, 0x12);
        let given = |number| is_written_by_a_domain(folder.path(), number);
        // A network card, a disk that is only read, the same one that is written.
        for (disk, parts) in [
            ("vif-1-0", &[][..]),
            (
                "vbd-1-51712",
                &[("physical_device", "fd:12\n"), ("mode", "r\n")][..],
            ),
            (
                "vbd-2-51712",
                &[("physical_device", "fd:13\n"), ("mode", "w\n")][..],
            ),
            ("vbd-3-51712", &[("physical_device", "fd:14\n")][..]),
        ] {
            let disk = folder.path().join(disk);
            fs::create_dir(&disk).unwrap();
            for (name, value) in parts {
                fs::write(disk.join(name), value).unwrap();
            }
            assert!(!given(number), "{disk:?}");
        }
        assert!(given(rustix::fs::makedev(0xfd, 0x13)));
        assert!(given(rustix::fs::makedev(0xfd, 0x14)));
        assert!(!is_written_by_a_domain(&folder.path().join("none"), number));
    }

    #[test]
    fn without_leases_doubt_is_refused() {
        let none = || io::Error::from(io::ErrorKind::InvalidInput);
        let path = Path::new("ram");
        let scan = |hidden| super::Scan {
            writer: None,
            hidden,
        };
        assert!(judge(Ok(scan(false)), path, none()).is_ok());
        for doubt in [Ok(scan(true)), Err(none())] {
            assert!(matches!(
                judge(doubt, path, none()),
                Err(DumpError::MayBeInUse { .. })
            ));
        }
    }
}
