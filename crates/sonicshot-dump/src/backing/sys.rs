//! System calls that no crate in use offers.
#![expect(unsafe_code, reason = "the FFI edge")]

use sonicshot::{FileOffset, FileRange};
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
