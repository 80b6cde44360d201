//! The file of what another server would need, mapped.

use crate::error::ServeError;
use core::ffi::c_void;
use core::ptr::NonNull;
use core::slice;
use core::sync::atomic::AtomicU64;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// The file, mapped.
#[derive(Debug)]
pub(crate) struct Map {
    pub(super) start: NonNull<u8>,
    len: usize,
    /// The offset of the bits.
    bits: usize,
}

// SAFETY: it is memory of the whole process; its bits are atomic, and the rest is one owner's.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

impl Map {
    pub(super) fn new(file: &OwnedFd, len: usize, bits: usize) -> Result<Self, ServeError> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let none = core::ptr::null_mut();
        // SAFETY: a new mapping touches nobody's memory.
        let start = unsafe { mmap(none, len, access, MapFlags::SHARED, file, 0) };
        let start: *mut c_void = start.map_err(ServeError::system("mapping what is kept"))?;
        let start = NonNull::new(start.cast());
        let start =
            start.ok_or_else(|| ServeError::system("mapping what is kept")(Errno::FAULT))?;
        Ok(Self { start, len, bits })
    }

    pub fn words(&self) -> &[AtomicU64] {
        let Some(len) = self.len.checked_sub(self.bits) else {
            return &[];
        };
        // SAFETY: inside the mapping, which begins at a page and stays for as long as `self`;
        // `bits` is a multiple of 4096. Nobody but this process has it mapped, and here it is used
        // in this way alone.
        unsafe {
            let first = self.start.as_ptr().add(self.bits);
            slice::from_raw_parts(first.cast(), len >> 3)
        }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        let start: *mut c_void = self.start.as_ptr().cast();
        // SAFETY: the mapping of `new`, to which there are no references.
        let _ = unsafe { munmap(start, self.len) };
    }
}
