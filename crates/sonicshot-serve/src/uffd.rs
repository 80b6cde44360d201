//! The kernel's `userfaultfd` (`linux/userfaultfd.h`): page faults served by a process.

use crate::address::HostAddress;
use crate::error::ServeError;
use core::mem::size_of;
use core::ptr::NonNull;
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::io::{Errno, ReadWriteFlags, preadv2, read};
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use rustix::mm::{UserfaultfdFlags, userfaultfd};
use sonicshot::to_u64;
use std::io::IoSliceMut;
use std::sync::Arc;

/// Memory of this process whose page faults are served, by [`Uffd::register`].
#[derive(Debug)]
pub struct Registered {
    start: u64,
    len: u64,
}

impl Registered {
    /// The address `offset` bytes behind its start, if it has `len` bytes from there.
    pub(crate) fn at(&self, offset: u64, len: u64) -> Option<HostAddress> {
        let end = offset.checked_add(len)?;
        let at = self.start.checked_add(offset)?;
        (end <= self.len).then_some(HostAddress::new(at))
    }

    /// Its length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bytes; the kernel registers none such.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

const UFFDIO: u8 = 0xaa;
const UFFD_API: u64 = 0xaa;
const FEATURE_EVENT_FORK: u64 = 1 << 1;
const FEATURE_EVENT_REMAP: u64 = 1 << 2;
const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
/// The kernel's own mark that the features are agreed on.
const FEATURE_INITIALIZED: u64 = 1 << 31;
/// `UFFD_PAGEFAULT_FLAG_WP` and `UFFD_PAGEFAULT_FLAG_MINOR`.
const FAULT_OTHER: u64 = 6;
const REGISTER_MODE_MISSING: u64 = 1;
/// The bit of `UFFDIO_ZEROPAGE` in what a registration says can be done.
const CAN_ZEROPAGE: u64 = 1 << 4;
/// As well of `UFFDIO_COPY_MODE_DONTWAKE` as of `UFFDIO_ZEROPAGE_MODE_DONTWAKE`.
const DONTWAKE: u64 = 1;

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

/// An event that the kernel tells of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// A thread waits for the page at this address.
    Fault(u64),
    /// The pages from here to there were given back (`MADV_DONTNEED`, a balloon) or unmapped,
    /// and are zero from now on.
    Remove(u64, u64),
    /// A thread waits at this address for something else than that the page is put in place.
    Other(u64),
}

/// The outcome of putting pages in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Placed {
    /// They are there.
    Done,
    /// So many bytes are there now; the page behind them was there before, or cannot be put.
    Part(u64),
    /// The first page was there before.
    There,
    /// Pages of this process are being given back: nothing was done, for none of its pages.
    Removing,
    /// The range is not registered, or of more than one mapping.
    Gone,
    /// The process whose memory it was has ended.
    Ended,
}

/// Whether threads that wait for a page are woken when it is put in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wake {
    Yes,
    /// For pages that nobody is known to wait for: cheaper.
    No,
}

impl Wake {
    const fn mode(self) -> u64 {
        match self {
            Self::Yes => 0,
            Self::No => DONTWAKE,
        }
    }
}

/// The kind of memory that a `userfaultfd` was found registered for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Anonymous or shared memory of the system's own pages.
    Small,
    /// Memory of `hugetlbfs`, or of another that has no page of zeroes to share.
    Huge,
}

/// A `userfaultfd`.
///
/// A VMM makes one for its own memory ([`new`](Self::new)); a page server gets the VMM's through
/// a socket ([`of_peer`](Self::of_peer)).
#[derive(Debug)]
pub struct Uffd {
    /// Whoever must not let go of it has it too.
    fd: Arc<OwnedFd>,
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn failed(operation: &'static str, at: u64, len: u64) -> impl FnOnce(Errno) -> ServeError {
    move |errno| ServeError::Uffd {
        operation,
        at: HostAddress::new(at),
        len,
        source: errno.into(),
    }
}

impl Uffd {
    /// Messages that are read at once.
    pub(crate) const BATCH: usize = 64;
    /// The bytes that they are.
    pub(crate) const BATCH_BYTES: usize = MESSAGE * Self::BATCH;

    /// A new one for this process. Without privileges (`CAP_SYS_PTRACE` or
    /// `vm.unprivileged_userfaultfd=1`) only faults of user code are served, not those that the
    /// kernel takes for it: KVM's among them.
    ///
    /// # Errors
    /// [`ServeError::Uffd`] if the kernel has none, or does not allow it.
    pub fn new() -> Result<Self, ServeError> {
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
        let uffd = Self { fd: fd.into() };
        let mut api = Api {
            api: UFFD_API,
            features: FEATURE_EVENT_REMOVE,
            ..Api::default()
        };
        uffd.call::<API, _>(&mut api)
            .map_err(failed("UFFDIO_API", 0, 0))?;
        Ok(uffd)
    }

    /// One that another process has made and sent. It is proved to be one, with the features that
    /// it takes to never show a page that was given back with its old bytes: `EVENT_REMOVE`, if
    /// the process gives pages back at all (`needs_remove`).
    ///
    /// # Errors
    /// [`ServeError::NoUffd`] if it is something else, [`ServeError::Features`] if its features
    /// are not those.
    pub fn of_peer(fd: impl Into<Arc<OwnedFd>>, needs_remove: bool) -> Result<Self, ServeError> {
        let fd = fd.into();
        let number = fd.as_raw_fd();
        let link = std::fs::read_link(format!("/proc/self/fd/{number}"));
        let link = link.map_err(ServeError::proc)?;
        if link.as_os_str() != "anon_inode:[userfaultfd]" {
            let found = link.display().to_string();
            return Err(ServeError::NoUffd { found });
        }
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{number}"));
        let info = info.map_err(ServeError::proc)?;
        let features = features(&info).ok_or(ServeError::FeaturesUntold)?;
        let removes = if needs_remove {
            FEATURE_EVENT_REMOVE
        } else {
            0
        };
        let needed = FEATURE_INITIALIZED | removes;
        let refused = FEATURE_EVENT_FORK | FEATURE_EVENT_REMAP;
        if features & needed != needed || features & refused != 0 {
            return Err(ServeError::Features {
                found: features,
                needs_remove,
            });
        }
        Ok(Self { fd })
    }

    /// Serves page faults in `len` bytes from `start`, which are fresh anonymous or shared
    /// memory, aligned to pages. What is returned is what a [`VmRegion`](crate::VmRegion) is made
    /// of: memory that is not registered cannot be served.
    ///
    /// # Errors
    /// [`ServeError::Uffd`] if the kernel refuses.
    ///
    /// # Safety
    /// The memory is mapped, and stays so for as long as a [`Vm`](crate::Vm) is given it; nobody
    /// has touched it, or relies on what is in it; and whoever touches it can wait until the page
    /// is there.
    pub unsafe fn register(
        &self,
        start: NonNull<u8>,
        len: usize,
    ) -> Result<Registered, ServeError> {
        let start = to_u64(start.as_ptr().addr());
        let len = to_u64(len);
        self.prove(start, len)?;
        Ok(Registered { start, len })
    }

    /// That the range can be served, and of which kind it is. Who has sent the descriptor has
    /// registered it; to do so again changes nothing.
    pub(crate) fn prove(&self, start: u64, len: u64) -> Result<Kind, ServeError> {
        let mut register = Register {
            range: Range { start, len },
            mode: REGISTER_MODE_MISSING,
            ioctls: 0,
        };
        self.call::<REGISTER, _>(&mut register)
            .map_err(failed("UFFDIO_REGISTER", start, len))?;
        Ok(if register.ioctls & CAN_ZEROPAGE == 0 {
            Kind::Huge
        } else {
            Kind::Small
        })
    }

    /// Whether the kernel takes no part of a page for one, where the range begins: its pages are
    /// as large as `page` at least. They are huge.
    pub(crate) fn is_whole(&self, start: u64, page: u64) -> bool {
        let mut register = Register {
            range: Range {
                start,
                len: page >> 1,
            },
            mode: REGISTER_MODE_MISSING,
            ioctls: 0,
        };
        self.call::<REGISTER, _>(&mut register) == Err(Errno::INVAL)
    }

    fn call<const OPCODE: Opcode, T>(&self, argument: &mut T) -> Result<(), Errno> {
        // SAFETY: each opcode above is made of the size of the structure that it is called
        // with, which is `repr(C)` and laid out as `linux/userfaultfd.h` has it.
        unsafe { ioctl(&*self.fd, Updater::<OPCODE, T>::new(argument)) }
    }

    /// Lets the kernel serve the range alone: what is not in place is zero.
    pub(crate) fn unregister(&self, start: u64, len: u64) -> Result<(), Errno> {
        self.call::<UNREGISTER, _>(&mut Range { start, len })
    }

    /// Wakes who waits for a page of the range.
    pub(crate) fn wake(&self, start: u64, len: u64) {
        // It fails if nobody is left to be woken.
        let _ = self.call::<WAKE, _>(&mut Range { start, len });
    }

    /// Puts `bytes` at `dst`.
    pub(crate) fn copy(&self, dst: u64, bytes: &[u8], wake: Wake) -> Result<Placed, ServeError> {
        let len = to_u64(bytes.len());
        let mut copy = Copy {
            dst,
            src: to_u64(bytes.as_ptr().addr()),
            len,
            mode: wake.mode(),
            ..Copy::default()
        };
        let result = self.call::<COPY, _>(&mut copy);
        placed(result, copy.copied).map_err(failed("UFFDIO_COPY", dst, len))
    }

    /// Puts pages of zeroes in place.
    pub(crate) fn zero(&self, start: u64, len: u64, wake: Wake) -> Result<Placed, ServeError> {
        let mut zero = ZeroPage {
            range: Range { start, len },
            mode: wake.mode(),
            ..ZeroPage::default()
        };
        let result = self.call::<ZEROPAGE, _>(&mut zero);
        placed(result, zero.zeroed).map_err(failed("UFFDIO_ZEROPAGE", start, len))
    }

    /// Makes the pages end whoever touches them, rather than wait for ever (Linux 6.6). Beside
    /// the end of the process, never instead of it.
    pub(crate) fn poison(&self, start: u64, len: u64) {
        let mut poison = Poison {
            range: Range { start, len },
            ..Poison::default()
        };
        let _ = self.call::<POISON, _>(&mut poison);
    }

    /// Reads what has happened into `messages`, as much as comes at once, without sleeping where
    /// the kernel can (else, if somebody has cleared `O_NONBLOCK`, it may sleep until something
    /// happens). Returns how many messages came.
    pub(crate) fn events(
        &self,
        messages: &mut [u8],
        events: &mut Vec<Event>,
    ) -> Result<usize, ServeError> {
        let got = match self.read_now(messages) {
            Ok(got) => got,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(0),
            Err(errno) => return Err(failed("reading page faults", 0, 0)(errno)),
        };
        let (read, _) = messages.split_at(got.min(messages.len()));
        Ok(Self::parse(read, events))
    }

    /// Parses messages, which were read at once, into `events`; returns their number.
    pub(crate) fn parse(read: &[u8], events: &mut Vec<Event>) -> usize {
        let messages = read.as_chunks::<MESSAGE>().0;
        events.extend(messages.iter().filter_map(event));
        messages.len()
    }

    fn read_now(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        let mut parts = [IoSliceMut::new(buffer)];
        // The place that stands for none.
        match preadv2(&*self.fd, &mut parts, u64::MAX, ReadWriteFlags::NOWAIT) {
            // Before Linux 6.10.
            Err(Errno::OPNOTSUPP) => read(&*self.fd, buffer),
            other => other,
        }
    }
}

/// `struct uffd_msg`.
const MESSAGE: usize = 32;
const _: () = assert!(size_of::<Copy>() == 40 && size_of::<Register>() == 32);

fn event(message: &[u8; MESSAGE]) -> Option<Event> {
    let [kind, _, _, _, _, _, _, _, rest @ ..] = message;
    let (words, _) = rest.as_chunks::<8>();
    let &[first, second, _] = words else {
        return None;
    };
    let (first, second) = (u64::from_ne_bytes(first), u64::from_ne_bytes(second));
    match kind {
        // Flags, then the address. To write to a page that is protected, or to have one mapped that
        // is there, is asked of whoever has registered for it.
        0x12 if first & FAULT_OTHER != 0 => Some(Event::Other(second)),
        0x12 => Some(Event::Fault(second)),
        // Given back, unmapped.
        0x15 | 0x16 => Some(Event::Remove(first, second)),
        _ => None,
    }
}

/// The agreed features, of the line `API: VERSION:FEATURES:IOCTLS` in `fdinfo`.
fn features(info: &str) -> Option<u64> {
    let line = info.lines().find_map(|line| line.strip_prefix("API:"))?;
    let mut fields = line.trim().split(':');
    let api = u64::from_str_radix(fields.next()?, 16).ok()?;
    let features = u64::from_str_radix(fields.next()?, 16).ok()?;
    (api == UFFD_API).then_some(features)
}

fn placed(result: Result<(), Errno>, done: i64) -> Result<Placed, Errno> {
    match result {
        Ok(()) => Ok(Placed::Done),
        Err(Errno::EXIST) => Ok(Placed::There),
        // Two meanings, told apart by the count.
        Err(Errno::AGAIN) => Ok(match u64::try_from(done) {
            Ok(done) if done > 0 => Placed::Part(done),
            _ => Placed::Removing,
        }),
        Err(Errno::NOENT) => Ok(Placed::Gone),
        Err(Errno::SRCH) => Ok(Placed::Ended),
        Err(other) => Err(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_read_of_what_the_kernel_tells() {
        for (info, expected) in [
            (
                "pos:\t0\nflags:\t02004002\npending:\t0\ntotal:\t0\nAPI:\taa:80000008:8000000000000fff\n",
                Some(0x8000_0008),
            ),
            ("API:\tab:80000008:0\n", None),
            ("API:\taa\n", None),
            ("API:\taa:x:0\n", None),
            ("pos:\t0\n", None),
        ] {
            assert_eq!(features(info), expected, "{info}");
        }
    }

    #[test]
    fn what_another_made_is_proved() {
        let null = std::fs::File::open("/dev/null").unwrap();
        let null = OwnedFd::from(null);
        let error = Uffd::of_peer(null, false).unwrap_err();
        assert!(
            matches!(&error, ServeError::NoUffd { found } if found == "/dev/null"),
            "{error:?}"
        );
        let plain = Uffd::new().unwrap();
        Uffd::of_peer(plain.fd, true).unwrap();
        for features in [0, FEATURE_EVENT_REMOVE | FEATURE_EVENT_FORK] {
            let flags = UserfaultfdFlags::CLOEXEC;
            // SAFETY: a new descriptor, registered for nothing.
            let fd = unsafe { userfaultfd(flags) }.unwrap();
            let uffd = Uffd { fd: fd.into() };
            let mut api = Api {
                api: UFFD_API,
                features,
                ..Api::default()
            };
            uffd.call::<API, _>(&mut api).unwrap();
            let proved = |needs| Uffd::of_peer(Arc::clone(&uffd.fd), needs);
            let error = proved(true).unwrap_err();
            assert!(
                matches!(error, ServeError::Features { found, needs_remove: true } if found & 0xffff == features),
                "{error:?}"
            );
            // Who gives nothing back need not tell of it.
            assert_eq!(proved(false).is_ok(), features == 0);
        }
        // Not agreed on: nothing works with it yet.
        // SAFETY: as above.
        let fd = unsafe { userfaultfd(UserfaultfdFlags::CLOEXEC) }.unwrap();
        let error = Uffd::of_peer(fd, false).unwrap_err();
        assert!(
            matches!(error, ServeError::Features { found: 0, .. }),
            "{error:?}"
        );
    }

    #[test]
    fn faults_of_another_kind_are_not_taken_for_missing_pages() {
        for (kind, flags, expected) in [
            (0x12, 0, Some(Event::Fault(0x7000))),
            (0x12, 1, Some(Event::Fault(0x7000))),
            (0x12, 2, Some(Event::Other(0x7000))),
            (0x12, 3, Some(Event::Other(0x7000))),
            (0x12, 4, Some(Event::Other(0x7000))),
            (0x15, 6, Some(Event::Remove(6, 0x7000))),
            (0x16, 0x1000, Some(Event::Remove(0x1000, 0x7000))),
            (0x13, 0, None),
        ] {
            let mut message = [0; MESSAGE];
            message[0] = kind;
            message[8..16].copy_from_slice(&u64::to_ne_bytes(flags));
            message[16..24].copy_from_slice(&u64::to_ne_bytes(0x7000));
            assert_eq!(event(&message), expected, "{kind:#x} {flags}");
        }
    }

    #[test]
    fn the_two_meanings_of_eagain_are_told_apart() {
        let again = || Err(Errno::AGAIN);
        assert_eq!(placed(again(), -11), Ok(Placed::Removing));
        assert_eq!(placed(again(), 0), Ok(Placed::Removing));
        assert_eq!(placed(again(), 4096), Ok(Placed::Part(4096)));
        assert_eq!(placed(Err(Errno::EXIST), -17), Ok(Placed::There));
    }
}
