//! LibVMI, called: the only unsafe code of this crate.

use crate::error::{InitFailure, LibVmiError};
use crate::{Domain, LoadError, Version};
use core::ffi::c_void;
use core::fmt;
use core::ptr::{self, NonNull};
use libvmi_sys::{self as sys, Functions, Library};
use sonicshot::{Gpa, GuestBytes, Mapped, PageSize};
use std::ffi::{CString, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// LibVMI's page size, for every guest on x86-64.
pub(crate) const PAGE: PageSize = PageSize::SIZE_4K;
const PAGE_LEN: usize = PAGE.size();
/// LibVMI cuts longer names of files off (`file_set_name` in `driver/file/file.c`), and would open
/// another.
const MAX_NAME: usize = 500;

/// LibVMI, loaded.
///
/// ```no_run
/// let library = sonicshot_libvmi::LibVmi::load()?;
/// println!("{}", library.version());
/// # Ok::<(), sonicshot_libvmi::LoadError>(())
/// ```
#[derive(Debug, Clone)]
pub struct LibVmi(Arc<Library>);

impl LibVmi {
    /// Loads it from where the system has its libraries.
    ///
    /// # Errors
    /// [`LoadError`] if there is none, or one that is too old.
    pub fn load() -> Result<Self, LoadError> {
        Library::load().map(|library| Self(Arc::new(library)))
    }

    /// Loads the library at `path`.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn open(path: impl AsRef<OsStr>) -> Result<Self, LoadError> {
        Library::open(path).map(|library| Self(Arc::new(library)))
    }

    /// The version of this LibVMI.
    #[must_use]
    pub fn version(&self) -> &Version {
        self.0.version()
    }
}

/// A guest that LibVMI has opened.
pub(crate) struct Instance {
    library: LibVmi,
    handle: Mutex<Handle>,
}

/// LibVMI's pointer, used by one thread at a time.
struct Handle(NonNull<sys::Instance>);

// SAFETY: LibVMI keeps nothing of the thread that opened a guest; it has no locks, and is used
// behind a mutex.
unsafe impl Send for Handle {}

impl fmt::Debug for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Instance").finish_non_exhaustive()
    }
}

/// The arguments of `vmi_init`.
struct Opening {
    mode: sys::Mode,
    name: CString,
    /// Instead of the name.
    number: Option<u64>,
    socket: Option<CString>,
}

impl Opening {
    fn of(domain: &Domain) -> Result<Self, LibVmiError> {
        let name = |bytes: &[u8]| {
            let wrong = |what| LibVmiError::Name {
                domain: domain.clone(),
                what,
            };
            if bytes.len() > MAX_NAME {
                return Err(wrong("of more than 500 bytes"));
            }
            CString::new(bytes).map_err(|_| wrong("with a NUL in it"))
        };
        let path = |path: &Path| name(path.as_os_str().as_bytes());
        Ok(match domain {
            Domain::Xen(text) => Self {
                mode: sys::XEN,
                name: name(text.as_bytes())?,
                number: text.parse().ok(),
                socket: None,
            },
            Domain::Kvm { name: text, socket } => Self {
                mode: sys::KVM,
                name: name(text.as_bytes())?,
                number: None,
                socket: socket.as_deref().map(path).transpose()?,
            },
            Domain::File(file) => Self {
                mode: sys::FILE,
                name: path(file)?,
                number: None,
                socket: None,
            },
        })
    }
}

impl Instance {
    pub(crate) fn open(library: &LibVmi, domain: &Domain) -> Result<Self, LibVmiError> {
        let mut opening = Opening::of(domain)?;
        let (mut handle, mut error) = (ptr::null_mut(), sys::INIT_ERROR_NONE);
        let (domain_ptr, flags): (*const c_void, _) = match &mut opening.number {
            Some(number) => (
                ptr::from_mut(number).cast_const().cast(),
                sys::INIT_DOMAINID,
            ),
            None => (opening.name.as_ptr().cast(), sys::INIT_DOMAINNAME),
        };
        let mut data = opening.socket.as_ref().map(|socket| sys::InitData {
            count: 1,
            entry: sys::InitDataEntry {
                kind: sys::INIT_DATA_KVMI_SOCKET,
                data: socket.as_ptr().cast_mut().cast(),
            },
        });
        let data_ptr = data.as_mut().map_or(ptr::null_mut(), ptr::from_mut);
        // SAFETY: a name that ends with NUL or a number, as the flags say, and a list with the one
        // entry that its count says, whose path LibVMI only reads; all live until it returns.
        let status = unsafe {
            (library.0.functions().vmi_init)(
                &raw mut handle,
                opening.mode,
                domain_ptr,
                flags,
                data_ptr,
                &raw mut error,
            )
        };
        match NonNull::new(handle) {
            Some(handle) if status == sys::SUCCESS => Ok(Self {
                library: library.clone(),
                handle: Mutex::new(Handle(handle)),
            }),
            _ => Err(LibVmiError::Open {
                domain: domain.clone(),
                why: InitFailure::of(error),
            }),
        }
    }

    /// Calls LibVMI, which nobody else does meanwhile.
    fn call<T>(&self, work: impl FnOnce(&Functions, sys::InstancePtr) -> T) -> T {
        // What LibVMI has does not depend on what a thread that panicked held.
        let handle = self.handle.lock().unwrap_or_else(PoisonError::into_inner);
        work(self.library.0.functions(), handle.0.as_ptr())
    }

    /// Fills `buf`.
    ///
    /// # Errors
    /// The number of bytes that were read.
    pub(crate) fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), usize> {
        let mut read = 0;
        let status = self.call(|functions, vmi| {
            // SAFETY: `buf` has room for as many bytes as it is long.
            unsafe {
                (functions.vmi_read_pa)(
                    vmi,
                    at.raw(),
                    buf.len(),
                    buf.as_mut_ptr().cast(),
                    &raw mut read,
                )
            }
        });
        match status == sys::SUCCESS && read == buf.len() {
            true => Ok(()),
            false => Err(read),
        }
    }

    /// The amount of RAM by its word, and the end of it.
    pub(crate) fn size(&self) -> (u64, Gpa) {
        // SAFETY: an open guest is all that they take.
        self.call(|functions, vmi| unsafe {
            (
                (functions.vmi_get_memsize)(vmi),
                Gpa::new((functions.vmi_get_max_physical_address)(vmi)),
            )
        })
    }

    /// The number of processors by its word.
    pub(crate) fn processors(&self) -> u32 {
        // SAFETY: an open guest is all that it takes.
        self.call(|functions, vmi| unsafe { (functions.vmi_get_num_vcpus)(vmi) })
    }

    /// A register of a processor.
    pub(crate) fn register(&self, processor: u32, register: sys::Register) -> Option<u64> {
        let mut value = 0;
        let status = self.call(|functions, vmi| {
            // SAFETY: `value` takes the one number that comes.
            unsafe { (functions.vmi_get_vcpureg)(vmi, &raw mut value, register, processor.into()) }
        });
        (status == sys::SUCCESS).then_some(value)
    }

    /// Pauses the guest, and forgets what was read while it ran.
    pub(crate) fn pause(&self) -> bool {
        self.call(|functions, vmi| {
            // SAFETY: an open guest is all that they take.
            unsafe {
                let paused = (functions.vmi_pause_vm)(vmi) == sys::SUCCESS;
                if paused {
                    (functions.vmi_pagecache_flush)(vmi);
                }
                paused
            }
        })
    }

    pub(crate) fn resume(&self) -> bool {
        // SAFETY: an open guest is all that it takes.
        self.call(|functions, vmi| unsafe { (functions.vmi_resume_vm)(vmi) == sys::SUCCESS })
    }

    /// Maps `pages` pages from `at`, a page's beginning, if LibVMI can, and has all of them.
    pub(crate) fn map(&self, at: Gpa, pages: usize) -> Option<Pages> {
        let map = self.library.0.functions().vmi_mmap_guest_pa?;
        let mut places = vec![ptr::null_mut(); pages];
        let status = self.call(|_, vmi| {
            // SAFETY: `places` has room for as many pointers as there are pages.
            unsafe { map(vmi, at.raw(), pages, sys::PROT_READ, places.as_mut_ptr()) }
        });
        if status != sys::SUCCESS {
            return None;
        }
        let first = NonNull::new(places.first()?.cast::<u8>())?;
        let len = pages.checked_mul(PAGE_LEN)?;
        let mut next = first.as_ptr().addr();
        for place in &places {
            // Xen's driver maps all side by side. Elsewhere they are no range of memory: left
            // mapped, for it is not known how.
            if place.addr() != next {
                return None;
            }
            next = next.checked_add(PAGE_LEN)?;
        }
        Some(Pages { start: first, len })
    }

    /// Whether LibVMI has a function to map pages.
    pub(crate) fn may_map(&self) -> bool {
        self.library.version().maps_pages
    }

    /// Has LibVMI learn of the guest's system by its own configuration, or a profile.
    pub(crate) fn know_system(&self, profile: Option<&Path>) -> Result<(), InitFailure> {
        let functions = self.library.0.functions();
        let Some(init_os) = functions.vmi_init_os else {
            return Err(InitFailure::System);
        };
        let path = profile.map(|path| CString::new(path.as_os_str().as_bytes()));
        let path = path.transpose().map_err(|_| InitFailure::NoConfig)?;
        let (mode, config) = match &path {
            Some(path) => (sys::CONFIG_JSON_PATH, path.as_ptr().cast_mut().cast()),
            None => (sys::CONFIG_GLOBAL_FILE_ENTRY, ptr::null_mut()),
        };
        let mut error = sys::INIT_ERROR_NONE;
        // SAFETY: a path that ends with NUL, or nothing, as the mode says; LibVMI only reads it.
        let os = self.call(|_, vmi| unsafe { init_os(vmi, mode, config, &raw mut error) });
        match os == sys::OS_UNKNOWN {
            true => Err(InitFailure::of(error)),
            false => Ok(()),
        }
    }

    /// The address of a symbol of the kernel, as LibVMI tells it.
    pub(crate) fn symbol(&self, name: &str) -> Option<u64> {
        let find = self.library.0.functions().vmi_translate_ksym2v?;
        let name = CString::new(name).ok()?;
        let mut address = 0;
        // SAFETY: a name that ends with NUL; `address` takes the one number that comes.
        let status = self.call(|_, vmi| unsafe { find(vmi, name.as_ptr(), &raw mut address) });
        (status == sys::SUCCESS && address != 0).then_some(address)
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        // SAFETY: opened by `open`, and nobody has it any more.
        self.call(|functions, vmi| unsafe { (functions.vmi_destroy)(vmi) });
    }
}

/// Pages of a guest that are mapped, until this is dropped.
#[derive(Debug)]
pub(crate) struct Pages {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping belongs to the process, not to a thread; it is only read.
unsafe impl Send for Pages {}
// SAFETY: as for `Send`.
unsafe impl Sync for Pages {}

impl Pages {
    /// The `len` bytes from `skew` on, with the mapping that keeps them there.
    pub(crate) fn held<'a>(self, skew: usize, len: usize) -> Option<Mapped<'a>> {
        if skew.checked_add(len)? > self.len {
            return None;
        }
        // SAFETY: inside the mapping, as was just seen.
        let start = unsafe { self.start.add(skew) };
        // SAFETY: these bytes are mapped until `self` is dropped, which `held` keeps as long as
        // them.
        unsafe {
            let bytes = GuestBytes::from_raw_parts(start, len);
            Some(Mapped::held(bytes, Box::new(self)))
        }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: LibVMI mapped these pages side by side and has given them up; nothing borrowed
        // from them is left. What the system says of it helps nobody.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::{MAX_NAME, Opening};
    use crate::Domain;

    #[test]
    fn a_name_that_libvmi_would_cut_off_is_refused() {
        let longest = Domain::File("a".repeat(MAX_NAME).into());
        assert!(Opening::of(&longest).is_ok());
        let longer = Domain::File("a".repeat(MAX_NAME + 1).into());
        assert!(Opening::of(&longer).is_err());
        assert!(Opening::of(&Domain::Xen("a\0b".into())).is_err());
        let by_number = Opening::of(&Domain::Xen("17".into())).unwrap();
        assert_eq!(by_number.number, Some(17));
        assert!(
            Opening::of(&Domain::Xen("a17".into()))
                .unwrap()
                .number
                .is_none()
        );
    }
}
