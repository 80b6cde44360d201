//! The kernel's `userfaultfd`: page faults served by a process (`linux/userfaultfd.h`).

use crate::checkpoint::error::CheckpointError;
use core::fmt;
use core::mem::size_of;
use core::ptr::NonNull;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use rustix::mm::{UserfaultfdFlags, userfaultfd};

/// An address in a process: this one's, or the VMM's whose faults are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostAddress(usize);

impl HostAddress {
    /// The address `raw`.
    #[must_use]
    pub const fn new(raw: usize) -> Self {
        Self(raw)
    }

    /// The address as a number.
    #[must_use]
    pub const fn raw(self) -> usize {
        self.0
    }
}

impl fmt::LowerHex for HostAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::LowerHex::fmt(&self.0, f)
    }
}

const UFFDIO: u8 = 0xaa;
const UFFD_API: u64 = 0xaa;
const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
const REGISTER_MODE_MISSING: u64 = 1;

#[repr(C)]
#[derive(Default)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Default)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
#[derive(Default)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Default)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
#[derive(Default)]
struct ZeroPage {
    range: Range,
    mode: u64,
    zeroed: i64,
}

#[repr(C)]
#[derive(Default)]
struct Poison {
    range: Range,
    mode: u64,
    updated: i64,
}

const API: Opcode = opcode::read_write::<Api>(UFFDIO, 0x3f);
const REGISTER: Opcode = opcode::read_write::<Register>(UFFDIO, 0);
const UNREGISTER: Opcode = opcode::read::<Range>(UFFDIO, 1);
const WAKE: Opcode = opcode::read::<Range>(UFFDIO, 2);
const COPY: Opcode = opcode::read_write::<Copy>(UFFDIO, 3);
const ZEROPAGE: Opcode = opcode::read_write::<ZeroPage>(UFFDIO, 4);
const POISON: Opcode = opcode::read_write::<Poison>(UFFDIO, 8);

/// What the kernel tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// A thread waits for the page at this address.
    Fault(u64),
    /// The pages from here to there were given back (`MADV_DONTNEED`, a balloon), and are zero
    /// from now on.
    Remove(u64, u64),
    /// Something that is not ours to handle.
    Other,
}

/// What came of putting pages in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Placed {
    /// They are there.
    Done,
    /// Another thread was faster.
    There,
    /// An event has to be read first; so many bytes are in place.
    Again(u64),
    /// Pages of it were given back meanwhile: what was to be put there is not right any more.
    Stale,
    /// The range is no longer registered.
    Gone,
    /// The process whose memory it was has ended.
    Exited,
}

/// A `userfaultfd`.
///
/// A VMM makes one for its own memory; a page-fault handler in a process of its own gets the
/// VMM's through a socket (`From<OwnedFd>`).
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
}

impl From<OwnedFd> for Uffd {
    /// A `userfaultfd` that another process has made, agreed on its features, and registered.
    fn from(fd: OwnedFd) -> Self {
        Self { fd }
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn failed(operation: &'static str, at: u64, len: u64) -> impl FnOnce(Errno) -> CheckpointError {
    move |errno| CheckpointError::Host {
        operation,
        at: usize::try_from(at).unwrap_or(usize::MAX),
        len: usize::try_from(len).unwrap_or(usize::MAX),
        source: errno.into(),
    }
}

impl Uffd {
    /// A new one for this process. Without privileges (`CAP_SYS_PTRACE` or
    /// `vm.unprivileged_userfaultfd=1`) only faults of user code are served, not those that the
    /// kernel takes for it: KVM's among them.
    ///
    /// # Errors
    /// [`CheckpointError::Host`] if the kernel has none, or does not allow it.
    pub fn new() -> Result<Self, CheckpointError> {
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        // SAFETY: a new descriptor; it does nothing until memory is registered with it.
        let fd = match unsafe { userfaultfd(flags) } {
            Err(Errno::PERM) => {
                const USER_MODE_ONLY: u32 = 1;
                let flags = flags | UserfaultfdFlags::from_bits_retain(USER_MODE_ONLY);
                // SAFETY: as above.
                unsafe { userfaultfd(flags) }
            }
            other => other,
        }
        .map_err(failed("userfaultfd", 0, 0))?;
        let uffd = Self { fd };
        let mut api = Api {
            api: UFFD_API,
            features: FEATURE_EVENT_REMOVE,
            ..Api::default()
        };
        uffd.call::<API, _>(&mut api)
            .map_err(failed("UFFDIO_API", 0, 0))?;
        Ok(uffd)
    }

    /// Serves page faults in `len` bytes from `start`, which are fresh anonymous or shared
    /// memory, aligned to pages.
    ///
    /// # Errors
    /// [`CheckpointError::Host`] if the kernel refuses.
    ///
    /// # Safety
    /// The memory is mapped, and whoever touches it can wait until the page is there.
    pub unsafe fn register(&self, start: NonNull<u8>, len: usize) -> Result<(), CheckpointError> {
        let (start, len) = (start.as_ptr() as u64, len as u64);
        let mut register = Register {
            range: Range { start, len },
            mode: REGISTER_MODE_MISSING,
            ioctls: 0,
        };
        self.call::<REGISTER, _>(&mut register)
            .map_err(failed("UFFDIO_REGISTER", start, len))
    }

    fn call<const OPCODE: Opcode, T>(&self, argument: &mut T) -> Result<(), Errno> {
        // SAFETY: each opcode above is made of the size of the structure that it is called
        // with, which is `repr(C)` and laid out as `linux/userfaultfd.h` has it.
        unsafe { ioctl(&self.fd, Updater::<OPCODE, T>::new(argument)) }
    }

    pub(crate) fn unregister(&self, start: u64, len: u64) -> Result<(), CheckpointError> {
        self.call::<UNREGISTER, _>(&mut Range { start, len })
            .map_err(failed("UFFDIO_UNREGISTER", start, len))
    }

    pub(crate) fn wake(&self, start: u64, len: u64) {
        let _ = self.call::<WAKE, _>(&mut Range { start, len });
    }

    /// Puts `bytes` at `dst`.
    pub(crate) fn copy(&self, dst: u64, bytes: &[u8]) -> Result<Placed, CheckpointError> {
        let len = bytes.len() as u64;
        let mut copy = Copy {
            dst,
            src: bytes.as_ptr() as u64,
            len,
            ..Copy::default()
        };
        let result = self.call::<COPY, _>(&mut copy);
        placed(result, copy.copied).map_err(failed("UFFDIO_COPY", dst, len))
    }

    pub(crate) fn zero(&self, start: u64, len: u64) -> Result<Placed, CheckpointError> {
        let mut zero = ZeroPage {
            range: Range { start, len },
            ..ZeroPage::default()
        };
        let result = self.call::<ZEROPAGE, _>(&mut zero);
        placed(result, zero.zeroed).map_err(failed("UFFDIO_ZEROPAGE", start, len))
    }

    /// Makes the pages end whoever touches them, rather than wait for ever or read what is not
    /// theirs (Linux 6.6).
    pub(crate) fn poison(&self, start: u64, len: u64) {
        let mut poison = Poison {
            range: Range { start, len },
            ..Poison::default()
        };
        let _ = self.call::<POISON, _>(&mut poison);
    }

    /// The next event, if there is one.
    pub(crate) fn event(&self) -> Result<Option<Event>, CheckpointError> {
        let mut message = [0_u8; MESSAGE];
        let got = match rustix::io::read(&self.fd, &mut message) {
            Ok(got) => got,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
            Err(errno) => return Err(failed("read of a page fault", 0, 0)(errno)),
        };
        if got == 0 {
            return Ok(None);
        }
        let word = |at: usize| {
            let bytes = message.get(at..at.saturating_add(8));
            bytes
                .and_then(|bytes| bytes.try_into().ok())
                .map_or(0, u64::from_ne_bytes)
        };
        Ok(Some(match message[0] {
            0x12 => Event::Fault(word(16)),
            0x15 => Event::Remove(word(8), word(16)),
            _ => Event::Other,
        }))
    }
}

/// `struct uffd_msg`.
const MESSAGE: usize = 32;
const _: () = assert!(size_of::<Copy>() == 40 && size_of::<Register>() == 32);

fn placed(result: Result<(), Errno>, done: i64) -> Result<Placed, Errno> {
    match result {
        Ok(()) => Ok(Placed::Done),
        Err(Errno::EXIST) => Ok(Placed::There),
        Err(Errno::AGAIN) => Ok(Placed::Again(u64::try_from(done).unwrap_or(0))),
        Err(Errno::NOENT) => Ok(Placed::Gone),
        Err(Errno::SRCH) => Ok(Placed::Exited),
        Err(other) => Err(other),
    }
}
