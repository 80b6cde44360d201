//! LibVMI's C interface, as far as a guest's memory is read, loaded at run time.
//!
//! [`Library::load`] opens `libvmi.so.0` and finds its functions; those of [`Functions`] that are
//! an `Option` are not in every build. Nothing of LibVMI is needed to build this, and no `links`
//! key claims it. `sonicshot-libvmi` is the safe side of it.
//!
//! ```no_run
//! use libvmi_sys::Library;
//! let library = Library::load()?;
//! println!("LibVMI {}", library.version());
//! assert!(library.functions().vmi_translate_ksym2v.is_some());
//! # Ok::<(), libvmi_sys::LoadError>(())
//! ```
//!
//! # Which versions
//! The library's name has been `libvmi.so.0` since 2013, whatever its functions take: between 0.12
//! and 0.13 `vmi_init` and `vmi_read_pa` got other parameters. So what is loaded must have
//! [`vmi_pagecache_flush`](Functions::vmi_pagecache_flush), which came after all of these (December
//! 2019, released with 0.14); of a library without it nothing is called. Names, parameters and
//! numbers here are those of `libvmi/libvmi.h` at 0.14.0 and 0.15.0, where they are the same.
//!
//! # What is not here
//! `VMI_INIT_DATA_MEMMAP`: LibVMI 0.15 copies no more of a memory map than its count, and then
//! reads behind the copy (`vmi_init` in `libvmi/core.c`). Events, writing, and all that takes a
//! process.
#![expect(
    unsafe_code,
    reason = "the edge to a C library: it is loaded, and its functions have no other types"
)]

mod load;
mod version;

use core::ffi::{c_char, c_int, c_uint, c_ulong, c_void};

pub use load::{Library, LoadError, NAME};
pub use version::Version;

/// `struct vmi_instance`: an open guest, of which nothing is known here.
#[repr(C)]
#[derive(Debug)]
pub struct Instance {
    _private: [u8; 0],
}

/// `vmi_instance_t`.
pub type InstancePtr = *mut Instance;

/// `status_t`: [`SUCCESS`] or not.
pub type Status = c_uint;
/// `VMI_SUCCESS`.
pub const SUCCESS: Status = 0;
/// `VMI_FAILURE`.
pub const FAILURE: Status = 1;

/// `vmi_mode_t`: what a guest is read through.
pub type Mode = c_uint;
/// `VMI_XEN`.
pub const XEN: Mode = 0;
/// `VMI_KVM`.
pub const KVM: Mode = 1;
/// `VMI_FILE`.
pub const FILE: Mode = 2;

/// `VMI_INIT_DOMAINNAME`: the domain is a name.
pub const INIT_DOMAINNAME: u64 = 1 << 0;
/// `VMI_INIT_DOMAINID`: the domain is a pointer to a number of 64 bits.
pub const INIT_DOMAINID: u64 = 1 << 1;

/// `vmi_init_error_t`: why a guest was not opened.
pub type InitError = c_uint;
/// `VMI_INIT_ERROR_NONE`: it is not said.
pub const INIT_ERROR_NONE: InitError = 0;
/// `VMI_INIT_ERROR_DRIVER_NOT_DETECTED`.
pub const INIT_ERROR_DRIVER_NOT_DETECTED: InitError = 1;
/// `VMI_INIT_ERROR_DRIVER`.
pub const INIT_ERROR_DRIVER: InitError = 2;
/// `VMI_INIT_ERROR_VM_NOT_FOUND`.
pub const INIT_ERROR_VM_NOT_FOUND: InitError = 3;
/// `VMI_INIT_ERROR_PAGING`.
pub const INIT_ERROR_PAGING: InitError = 4;
/// `VMI_INIT_ERROR_OS`.
pub const INIT_ERROR_OS: InitError = 5;
/// `VMI_INIT_ERROR_EVENTS`.
pub const INIT_ERROR_EVENTS: InitError = 6;
/// `VMI_INIT_ERROR_NO_CONFIG`.
pub const INIT_ERROR_NO_CONFIG: InitError = 7;
/// `VMI_INIT_ERROR_NO_CONFIG_ENTRY`.
pub const INIT_ERROR_NO_CONFIG_ENTRY: InitError = 8;

/// `VMI_INIT_DATA_KVMI_SOCKET`: the data is a path, by which KVM's introspection is reached.
pub const INIT_DATA_KVMI_SOCKET: u64 = 2;

/// `vmi_init_data_entry_t`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct InitDataEntry {
    /// The kind of `data`, such as [`INIT_DATA_KVMI_SOCKET`].
    pub kind: u64,
    /// It.
    pub data: *mut c_void,
}

/// `vmi_init_data_t` with one entry.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct InitData {
    /// The number of entries: 1.
    pub count: u64,
    /// It.
    pub entry: InitDataEntry,
}

/// `vmi_config_t`: where LibVMI has what it is to know of a guest's system from.
pub type Config = c_uint;
/// `VMI_CONFIG_GLOBAL_FILE_ENTRY`: from its own file (`/etc/libvmi.conf`), by the domain's name.
pub const CONFIG_GLOBAL_FILE_ENTRY: Config = 0;
/// `VMI_CONFIG_JSON_PATH`: from a profile at a path.
pub const CONFIG_JSON_PATH: Config = 3;

/// `os_t`: [`OS_UNKNOWN`] or one that LibVMI knows.
pub type Os = c_uint;
/// `VMI_OS_UNKNOWN`.
pub const OS_UNKNOWN: Os = 0;
/// `VMI_OS_LINUX`.
pub const OS_LINUX: Os = 1;

/// `reg_t`: a register by its number.
pub type Register = u64;
/// `RIP`.
pub const RIP: Register = 8;
/// `CR0`.
pub const CR0: Register = 18;
/// `CR3`.
pub const CR3: Register = 20;
/// `CR4`.
pub const CR4: Register = 21;
/// `MSR_EFER`.
pub const MSR_EFER: Register = 74;

/// `PROT_READ`, of [`Functions::vmi_mmap_guest_pa`].
pub const PROT_READ: c_int = 1;

/// LibVMI's functions, by the names that they have in C.
///
/// An instance is used by one thread at a time: LibVMI has no locks of its own.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Functions {
    /// Opens a guest: `domain` is a name, a path or a number's address, as mode and flags say. The
    /// instance is null if this fails.
    pub vmi_init: unsafe extern "C" fn(
        vmi: *mut InstancePtr,
        mode: Mode,
        domain: *const c_void,
        init_flags: u64,
        init_data: *mut InitData,
        error: *mut InitError,
    ) -> Status,
    /// Closes it. A guest that is paused stays so.
    pub vmi_destroy: unsafe extern "C" fn(vmi: InstancePtr) -> Status,
    /// Reads `count` bytes of guest-physical memory; `bytes_read` are there also if this fails.
    pub vmi_read_pa: unsafe extern "C" fn(
        vmi: InstancePtr,
        paddr: u64,
        count: usize,
        buf: *mut c_void,
        bytes_read: *mut usize,
    ) -> Status,
    /// The size of the guest's RAM, in bytes.
    pub vmi_get_memsize: unsafe extern "C" fn(vmi: InstancePtr) -> u64,
    /// Above which address there is none; there are holes below it.
    pub vmi_get_max_physical_address: unsafe extern "C" fn(vmi: InstancePtr) -> u64,
    /// The number of processors that the guest may have; 0 if the driver does not tell.
    pub vmi_get_num_vcpus: unsafe extern "C" fn(vmi: InstancePtr) -> c_uint,
    /// A register of a processor.
    pub vmi_get_vcpureg: unsafe extern "C" fn(
        vmi: InstancePtr,
        value: *mut u64,
        register: Register,
        vcpu: c_ulong,
    ) -> Status,
    /// Pauses the guest. Xen counts: as many calls of `vmi_resume_vm` are needed.
    pub vmi_pause_vm: unsafe extern "C" fn(vmi: InstancePtr) -> Status,
    /// Lets it run on.
    pub vmi_resume_vm: unsafe extern "C" fn(vmi: InstancePtr) -> Status,
    /// Forgets which pages were read: what is read then is there now. Of 2019 and later, so that
    /// what lacks it is [too old](LoadError::TooOld).
    pub vmi_pagecache_flush: unsafe extern "C" fn(vmi: InstancePtr),
    /// Learns of the guest's system, as `config` says.
    pub vmi_init_os: Option<
        unsafe extern "C" fn(
            vmi: InstancePtr,
            config_mode: Config,
            config: *mut c_void,
            error: *mut InitError,
        ) -> Os,
    >,
    /// The address of a symbol of the guest's kernel, once `vmi_init_os` has succeeded.
    pub vmi_translate_ksym2v: Option<
        unsafe extern "C" fn(vmi: InstancePtr, symbol: *const c_char, vaddr: *mut u64) -> Status,
    >,
    /// Maps pages of guest-physical memory, each with a pointer; of August 2024 and later, and of
    /// Xen's driver alone. They are unmapped by `munmap`.
    pub vmi_mmap_guest_pa: Option<
        unsafe extern "C" fn(
            vmi: InstancePtr,
            paddr: u64,
            num_pages: usize,
            prot: c_int,
            access_ptrs: *mut *mut c_void,
        ) -> Status,
    >,
    /// The version of its events.
    pub vmi_events_version: Option<unsafe extern "C" fn() -> u32>,
}

#[cfg(test)]
mod tests {
    use super::{InitData, InitDataEntry};
    use core::mem::{align_of, offset_of, size_of};

    #[test]
    fn structures_are_as_in_c() {
        assert_eq!((size_of::<InitData>(), align_of::<InitData>()), (8 + 16, 8));
        assert_eq!(offset_of!(InitData, entry), 8);
        assert_eq!(offset_of!(InitDataEntry, data), 8);
    }
}
