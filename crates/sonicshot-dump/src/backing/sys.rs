//! System calls that no crate in use offers.
#![expect(unsafe_code, reason = "the FFI edge")]

use rustix::ioctl::{NoArg, Opcode, Updater, ioctl, opcode};
use sonicshot::{FileOffset, FileRange, Tally};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Linux's `F_SETSIG`, on every processor.
const F_SETSIG: libc::c_int = 10;

/// Takes a read lease on `file`, which must be open for reading only, and gives it back at once.
/// The kernel grants it only while nobody has the file open for writing, nor mapped so.
pub(crate) fn try_read_lease(file: &File) -> io::Result<()> {
    let fcntl = |command, value: libc::c_int| {
        // SAFETY: the descriptor is open while `file` is borrowed, and these commands take an
        // integer and touch no memory of ours.
        while unsafe { libc::fcntl(file.as_raw_fd(), command, value) } == -1 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
        Ok(())
    };
    // Who opens the file for writing right now makes the kernel tell us: by a signal that is
    // ignored by default, for the usual one ends the process.
    fcntl(F_SETSIG, libc::SIGURG)?;
    fcntl(libc::F_SETLEASE, libc::F_RDLCK)?;
    fcntl(libc::F_SETLEASE, libc::F_UNLCK)
}

/// Lets `to` share the bytes `range` of `from` from `at` on, all on whole blocks of the file system.
pub(crate) fn clone_range(
    from: &File,
    range: FileRange,
    to: &File,
    at: FileOffset,
) -> io::Result<()> {
    let range = libc::file_clone_range {
        src_fd: from.as_raw_fd().into(),
        src_offset: range.start().raw(),
        src_length: range.len(),
        dest_offset: at.raw(),
    };
    // SAFETY: both descriptors are open while the files are borrowed, and the kernel only reads
    // the one structure that it is given, which lives until the call returns.
    match unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONERANGE, &raw const range) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Begins to write the bytes `range` of `file` to its disk, and if `wait` waits until they are there.
/// That makes nothing durable: the file system's own records are not written.
pub(crate) fn write_back(file: &File, range: FileRange, wait: bool) -> io::Result<()> {
    let beyond = |_| io::Error::from(io::ErrorKind::FileTooLarge);
    let at = range.start().raw().try_into().map_err(beyond)?;
    let len = range.len().try_into().map_err(beyond)?;
    let flags = match wait {
        true => {
            libc::SYNC_FILE_RANGE_WAIT_BEFORE
                | libc::SYNC_FILE_RANGE_WRITE
                | libc::SYNC_FILE_RANGE_WAIT_AFTER
        }
        false => libc::SYNC_FILE_RANGE_WRITE,
    };
    // SAFETY: the descriptor is open while the file is borrowed, and the call takes integers and
    // touches no memory of ours.
    while unsafe { libc::sync_file_range(file.as_raw_fd(), at, len, flags) } == -1 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    Ok(())
}

/// Has what is read of a block device come from the device, and not from what the system has of it in its
/// page cache: who writes past that, as Xen's backends do, leaves what is there as it was. Only root may.
pub(crate) fn forget_cached(device: &File) -> io::Result<()> {
    /// Linux's `BLKFLSBUF`, on every processor.
    const BLKFLSBUF: Opcode = opcode::none(0x12, 97);
    // SAFETY: this operation takes no argument, and touches no memory of ours.
    let flush = unsafe { NoArg::<BLKFLSBUF>::new() };
    // SAFETY: as above; the descriptor is open while the file is borrowed.
    unsafe { ioctl(device, flush) }?;
    Ok(())
}

/// The argument of `FIDEDUPERANGE` (`struct file_dedupe_range` in include/uapi/linux/fs.h), with one
/// destination.
#[repr(C)]
struct Dedupe {
    head: DedupeHead,
    to: DedupeTo,
}

#[repr(C)]
struct DedupeHead {
    from_offset: u64,
    len: u64,
    destinations: u16,
    reserved: [u16; 3],
}

#[repr(C)]
struct DedupeTo {
    descriptor: i64,
    offset: u64,
    done: u64,
    status: i32,
    reserved: u32,
}

/// The number of the call counts the head alone.
const FIDEDUPERANGE: Opcode = opcode::read_write::<DedupeHead>(0x94, 54);
/// The bytes differ.
const DIFFERS: i32 = 1;

/// The outcome of a range that was to be shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Deduped {
    /// So many bytes of it are shared now.
    Shared(u64),
    /// They are not the same, and nothing was done.
    Differs,
}

/// Lets `to` share the bytes `range` of `from` from `at` on, all on whole blocks, if they are what it
/// holds there: the kernel compares them first, while nobody can write either.
pub(crate) fn dedupe_range(
    from: &File,
    range: FileRange,
    to: &File,
    at: FileOffset,
) -> io::Result<Deduped> {
    let mut request = Dedupe {
        head: DedupeHead {
            from_offset: range.start().raw(),
            len: range.len(),
            destinations: 1,
            reserved: [0; 3],
        },
        to: DedupeTo {
            descriptor: to.as_raw_fd().into(),
            offset: at.raw(),
            done: 0,
            status: 0,
            reserved: 0,
        },
    };
    // SAFETY: both descriptors are open while the files are borrowed; the kernel reads and writes the
    // head and as many destinations as it says, which is one, and is there.
    unsafe { ioctl(from, Updater::<FIDEDUPERANGE, Dedupe>::new(&mut request)) }?;
    match request.to.status {
        0 => Ok(Deduped::Shared(request.to.done)),
        DIFFERS => Ok(Deduped::Differs),
        status => Err(io::Error::from_raw_os_error(
            status.checked_neg().unwrap_or(libc::EIO),
        )),
    }
}

/// The number of extents that are asked for at once.
const EXTENTS: u32 = 128;

/// The argument of `FS_IOC_FIEMAP` (include/uapi/linux/fiemap.h).
#[repr(C)]
struct Fiemap {
    head: FiemapHead,
    extents: [FiemapExtent; EXTENTS as usize],
}

#[repr(C)]
struct FiemapHead {
    start: u64,
    len: u64,
    flags: u32,
    mapped: u32,
    room: u32,
    reserved: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct FiemapExtent {
    offset: u64,
    physical: u64,
    len: u64,
    reserved: [u64; 2],
    flags: u32,
    reserved_too: [u32; 3],
}

const FIEMAP: Opcode = opcode::read_write::<FiemapHead>(b'f', 11);
/// Writes are on disk first.
const SYNC: u32 = 1;
const LAST: u32 = 1;
const SHARED: u32 = 0x2000;

/// The extents that the file system has of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct ExtentCount {
    /// Extents of data.
    pub extents: u64,
    /// Bytes in extents that other files have too, or this one elsewhere.
    pub shared: u64,
}

/// Counts the extents of a file of `len` bytes.
pub(crate) fn count_extents(file: &File, len: u64) -> io::Result<ExtentCount> {
    let none = FiemapExtent {
        offset: 0,
        physical: 0,
        len: 0,
        reserved: [0; 2],
        flags: 0,
        reserved_too: [0; 3],
    };
    let mut count = ExtentCount::default();
    let mut at = 0_u64;
    while let Some(left) = len.checked_sub(at).filter(|left| *left > 0) {
        let mut request = Fiemap {
            head: FiemapHead {
                start: at,
                len: left,
                flags: SYNC,
                mapped: 0,
                room: EXTENTS,
                reserved: 0,
            },
            extents: [none; EXTENTS as usize],
        };
        // SAFETY: the descriptor is open while the file is borrowed; the kernel writes the head and no
        // more extents than there is room for.
        unsafe { ioctl(file, Updater::<FIEMAP, Fiemap>::new(&mut request)) }?;
        let mut next = at;
        let mut is_last = request.head.mapped == 0;
        for extent in request.extents.iter().take(request.head.mapped as usize) {
            let end = extent.offset.checked_add(extent.len);
            let end = end.ok_or(io::ErrorKind::InvalidData)?;
            // The first may begin before what was asked for, the last end behind the file.
            let bytes = Tally::new(end.min(len)).without(extent.offset.max(at));
            count.extents = Tally::new(count.extents).and(1).get();
            if extent.flags & SHARED != 0 {
                count.shared = bytes.and(count.shared).get();
            }
            is_last |= extent.flags & LAST != 0;
            next = end;
        }
        if is_last || next <= at {
            break;
        }
        at = next;
    }
    Ok(count)
}
