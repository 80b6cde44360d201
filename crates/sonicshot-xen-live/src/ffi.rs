//! Xen's libraries, loaded at run time: the only unsafe code of this crate.
//!
//! `libxenforeignmemory.so.1` has a stable interface. `libxenctrl` has a name of its own in every
//! release; of its structures only the beginning of `xc_domaininfo_t` is read, which has been the
//! same since Xen 4.14 and still is in 4.20 (`xen/include/public/domctl.h`).

use crate::{DomainId, LiveError};
use core::ffi::{c_int, c_uint, c_void};
use core::fmt;
use core::ptr::{self, NonNull};
use libloading::Library;
use sonicshot::{GuestBytes, Mapped, Mfn, P2m, Pfn};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

/// The oldest release that is looked for, and one that is not there yet.
const MINORS: core::ops::Range<u32> = 14..40;
const PAGE: usize = P2m::PAGE.size();
const PROT_READ: c_int = 1;

type Handle = *mut c_void;

/// The way to the hypervisor.
pub struct Xen {
    handles: Mutex<Handles>,
    calls: Calls,
    /// Loaded for as long as their functions are held.
    _libraries: [Library; 2],
}

struct Handles {
    control: NonNull<c_void>,
    memory: NonNull<c_void>,
}

// SAFETY: the handles are pointers to the libraries' own state, bound to no thread, and are used by
// one thread at a time, for they are behind a mutex.
unsafe impl Send for Handles {}

/// The functions that are called, by the names that they have in C.
struct Calls {
    xc_interface_close: unsafe extern "C" fn(Handle) -> c_int,
    xc_domain_getinfolist: unsafe extern "C" fn(Handle, u32, c_uint, *mut c_void) -> c_int,
    xc_domain_maximum_gpfn: unsafe extern "C" fn(Handle, u32, *mut u64) -> c_int,
    xc_get_pfn_type_batch: unsafe extern "C" fn(Handle, u32, c_uint, *mut u64) -> c_int,
    xenforeignmemory_close: unsafe extern "C" fn(Handle) -> c_int,
    xenforeignmemory_map:
        unsafe extern "C" fn(Handle, u32, c_int, usize, *const u64, *mut c_int) -> *mut c_void,
    xenforeignmemory_unmap: unsafe extern "C" fn(Handle, *mut c_void, usize) -> c_int,
}

/// Xen's facts of a domain.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DomainInfo {
    pub flags: u32,
    pub pages: u64,
    pub shared_info: Mfn,
}

impl fmt::Debug for Xen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Xen").finish_non_exhaustive()
    }
}

impl Xen {
    /// Loads Xen's libraries and opens the way to the hypervisor.
    ///
    /// # Errors
    /// [`LiveError::Library`] if there are none, [`LiveError::Open`] if this is not dom0.
    pub fn open() -> Result<Self, LiveError> {
        let control = load_control()?;
        let memory = load("libxenforeignmemory.so.1")?;
        // SAFETY: each function has the type that it has in Xen's headers (`xenctrl.h`,
        // `xenforeignmemory.h`), and `_libraries` keeps it loaded.
        let (calls, xc_interface_open, xenforeignmemory_open) = unsafe {
            let calls = Calls {
                xc_interface_close: function(&control, "xc_interface_close")?,
                xc_domain_getinfolist: function(&control, "xc_domain_getinfolist")?,
                xc_domain_maximum_gpfn: function(&control, "xc_domain_maximum_gpfn")?,
                xc_get_pfn_type_batch: function(&control, "xc_get_pfn_type_batch")?,
                xenforeignmemory_close: function(&memory, "xenforeignmemory_close")?,
                xenforeignmemory_map: function(&memory, "xenforeignmemory_map")?,
                xenforeignmemory_unmap: function(&memory, "xenforeignmemory_unmap")?,
            };
            let open_control: unsafe extern "C" fn(Handle, Handle, c_uint) -> Handle =
                function(&control, "xc_interface_open")?;
            let open_memory: unsafe extern "C" fn(Handle, c_uint) -> Handle =
                function(&memory, "xenforeignmemory_open")?;
            (calls, open_control, open_memory)
        };
        let null = ptr::null_mut();
        // SAFETY: without loggers, it logs to standard error.
        let opened = NonNull::new(unsafe { xc_interface_open(null, null, 0) });
        let control_handle = opened.ok_or_else(|| LiveError::Open {
            what: "Xen's control interface",
            source: io::Error::last_os_error(),
        })?;
        // SAFETY: as above.
        let opened = NonNull::new(unsafe { xenforeignmemory_open(null, 0) });
        let Some(memory_handle) = opened else {
            let source = io::Error::last_os_error();
            // SAFETY: opened above, used by nobody else.
            unsafe { (calls.xc_interface_close)(control_handle.as_ptr()) };
            let what = "Xen's foreign memory interface";
            return Err(LiveError::Open { what, source });
        };
        Ok(Self {
            handles: Mutex::new(Handles {
                control: control_handle,
                memory: memory_handle,
            }),
            calls,
            _libraries: [control, memory],
        })
    }

    fn with<T>(&self, work: impl FnOnce(&Handles) -> T) -> T {
        // The libraries' state does not depend on what a thread that panicked held.
        work(&self.handles.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn info(&self, domain: DomainId) -> Result<DomainInfo, LiveError> {
        /// Longer than the structure is in any release.
        const ROOM: usize = 512;
        let mut info = [0_u64; ROOM];
        let found = self.with(|handles| {
            // SAFETY: there is room for the one structure that is asked for.
            unsafe {
                (self.calls.xc_domain_getinfolist)(
                    handles.control.as_ptr(),
                    domain.raw(),
                    1,
                    info.as_mut_ptr().cast(),
                )
            }
        });
        if found < 0 {
            return Err(LiveError::Call {
                call: "xc_domain_getinfolist",
                domain,
                source: io::Error::last_os_error(),
            });
        }
        // The number (16 bits), the flags; then in 64 bits each: pages, the most pages,
        // outstanding, shared, paged, and the frame of the shared information.
        let [first, pages, _, _, _, _, shared_info, ..] = info;
        let [_, _, _, _, a, b, c, d] = first.to_le_bytes();
        // It lists from that number on.
        if found == 0 || first & 0xffff != u64::from(domain.raw()) {
            return Err(LiveError::NoDomain { domain });
        }
        Ok(DomainInfo {
            flags: u32::from_le_bytes([a, b, c, d]),
            pages,
            shared_info: Mfn::new(shared_info),
        })
    }

    /// The last frame that the domain may have.
    pub(crate) fn last_frame(&self, domain: DomainId) -> Result<Pfn, LiveError> {
        let mut last = 0;
        let result = self.with(|handles| {
            // SAFETY: `last` takes the one number that comes.
            unsafe {
                (self.calls.xc_domain_maximum_gpfn)(
                    handles.control.as_ptr(),
                    domain.raw(),
                    &raw mut last,
                )
            }
        });
        check(result, "xc_domain_maximum_gpfn", domain)?;
        Ok(Pfn::new(last))
    }

    /// Makes of each number of a frame what type of frame it is (`XEN_DOMCTL_PFINFO_*`).
    pub(crate) fn types(&self, domain: DomainId, frames: &mut [u64]) -> Result<(), LiveError> {
        let count = c_uint::try_from(frames.len()).map_err(|_| LiveError::Call {
            call: "xc_get_pfn_type_batch",
            domain,
            source: io::ErrorKind::InvalidInput.into(),
        })?;
        let result = self.with(|handles| {
            // SAFETY: `frames` has `count` numbers, which are written over.
            unsafe {
                (self.calls.xc_get_pfn_type_batch)(
                    handles.control.as_ptr(),
                    domain.raw(),
                    count,
                    frames.as_mut_ptr(),
                )
            }
        });
        check(result, "xc_get_pfn_type_batch", domain)
    }

    /// Maps frames of a domain side by side, to be read: the machine's of a paravirtualised
    /// domain, the guest's own of another.
    pub(crate) fn map(&self, domain: DomainId, frames: &[u64]) -> Result<Foreign<'_>, LiveError> {
        let mut errors = vec![0; frames.len()];
        let start = self.with(|handles| {
            // SAFETY: `frames` and `errors` are as long as said; the mapping is a new one.
            unsafe {
                (self.calls.xenforeignmemory_map)(
                    handles.memory.as_ptr(),
                    domain.raw(),
                    PROT_READ,
                    frames.len(),
                    frames.as_ptr(),
                    errors.as_mut_ptr(),
                )
            }
        });
        let start = NonNull::new(start.cast()).ok_or_else(|| LiveError::Call {
            call: "xenforeignmemory_map",
            domain,
            source: io::Error::last_os_error(),
        })?;
        Ok(Foreign {
            xen: self,
            start,
            errors,
        })
    }
}

impl Drop for Xen {
    fn drop(&mut self) {
        self.with(|handles| {
            // SAFETY: opened by `open`, and no mapping outlives this.
            unsafe {
                (self.calls.xenforeignmemory_close)(handles.memory.as_ptr());
                (self.calls.xc_interface_close)(handles.control.as_ptr());
            }
        });
    }
}

/// Frames of a domain that are mapped, until this is dropped.
pub(crate) struct Foreign<'x> {
    xen: &'x Xen,
    start: NonNull<u8>,
    /// The error of each frame, 0 if it is mapped.
    errors: Vec<c_int>,
}

// SAFETY: a mapping belongs to the process, not to a thread; it is only read.
unsafe impl Send for Foreign<'_> {}
// SAFETY: as for `Send`.
unsafe impl Sync for Foreign<'_> {}

impl<'x> Foreign<'x> {
    /// The `len` bytes from `skew` on, with the mapping that keeps them there, if every frame is
    /// mapped.
    pub(crate) fn held(this: Arc<Self>, skew: u64, len: usize) -> Option<Mapped<'x>> {
        let skew = usize::try_from(skew).ok()?;
        let bytes = this.frames(0, this.errors.len())?.get(skew, len)?;
        let start = NonNull::new(bytes.as_ptr().cast_mut())?;
        // SAFETY: the bytes are in the mapping, which `held` keeps until its value is dropped.
        unsafe {
            let bytes = GuestBytes::from_raw_parts(start, len);
            Some(Mapped::held(bytes, Box::new(this)))
        }
    }

    /// Whether all is mapped of these, its frames, but for those that are `nowhere`.
    pub(crate) fn lacks_only(&self, frames: &[u64], nowhere: u64) -> bool {
        let mut all = self.errors.iter().zip(frames);
        all.all(|(error, frame)| *error == 0 || *frame == nowhere)
    }

    /// The bytes of `count` frames from the `first` on, if all of them are mapped.
    pub(crate) fn frames(&self, first: usize, count: usize) -> Option<GuestBytes<'_>> {
        let errors = self.errors.get(first..first.checked_add(count)?)?;
        if errors.iter().any(|error| *error != 0) {
            return None;
        }
        let len = count.checked_mul(PAGE)?;
        // SAFETY: the mapping is as many pages long as there are errors, and `first` is inside.
        let start = unsafe { self.start.add(first.checked_mul(PAGE)?) };
        // SAFETY: these pages are mapped until this is dropped, and are borrowed from it.
        Some(unsafe { GuestBytes::from_raw_parts(start, len) })
    }
}

impl Drop for Foreign<'_> {
    fn drop(&mut self) {
        self.xen.with(|handles| {
            // SAFETY: mapped by `map` with this length; nothing borrowed from it is left.
            unsafe {
                (self.xen.calls.xenforeignmemory_unmap)(
                    handles.memory.as_ptr(),
                    self.start.as_ptr().cast(),
                    self.errors.len(),
                )
            };
        });
    }
}

fn check(result: c_int, call: &'static str, domain: DomainId) -> Result<(), LiveError> {
    if result == 0 {
        return Ok(());
    }
    Err(LiveError::Call {
        call,
        domain,
        source: io::Error::last_os_error(),
    })
}

/// The control library of the running Xen, or else the newest that is there.
fn load_control() -> Result<Library, LiveError> {
    let running = |part| std::fs::read_to_string(format!("/sys/hypervisor/version/{part}"));
    let own = match (running("major"), running("minor")) {
        (Ok(major), Ok(minor)) => Some(format!("{}.{}", major.trim(), minor.trim())),
        _ => None,
    };
    let others = MINORS.rev().map(|minor| format!("4.{minor}"));
    let mut first_error = None;
    for version in own.into_iter().chain(others) {
        match load(&format!("libxenctrl.so.{version}")) {
            Ok(library) => return Ok(library),
            Err(error) => {
                first_error.get_or_insert(error);
            }
        }
    }
    Err(first_error.unwrap_or(LiveError::Open {
        what: "libxenctrl",
        source: io::ErrorKind::NotFound.into(),
    }))
}

fn load(name: &str) -> Result<Library, LiveError> {
    // SAFETY: Xen's libraries do nothing when they are loaded or unloaded.
    unsafe { Library::new(name) }.map_err(|source| LiveError::Library {
        name: name.to_owned(),
        source,
    })
}

/// The function `name` of a library.
///
/// # Safety
/// `F` must be its type, and it must not be called once the library is dropped.
unsafe fn function<F: Copy>(library: &Library, name: &str) -> Result<F, LiveError> {
    // SAFETY: the caller's promise.
    unsafe { library.get::<F>(name) }
        .map(|symbol| *symbol)
        .map_err(|source| LiveError::Library {
            name: name.to_owned(),
            source,
        })
}
