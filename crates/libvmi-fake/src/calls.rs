//! LibVMI's functions.
//!
//! Types and numbers are written down again here, not taken from `libvmi-sys`: the test is that both
//! agree.
#![allow(missing_docs, reason = "they are LibVMI's, and documented there")]
#![allow(clippy::missing_safety_doc, reason = "as LibVMI's")]

use crate::guest::{Guest, PAGE};
use core::ffi::{CStr, c_char, c_int, c_uint, c_ulong, c_void};
use rustix::mm::{MapFlags, ProtFlags, mmap};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;

const SUCCESS: c_uint = 0;
const FAILURE: c_uint = 1;

fn status(done: bool) -> c_uint {
    if done { SUCCESS } else { FAILURE }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmi_init(
    vmi: *mut *mut Guest,
    mode: c_uint,
    domain: *const c_void,
    flags: u64,
    _init_data: *mut c_void,
    error: *mut c_uint,
) -> c_uint {
    // Another mode is one that this LibVMI was built without: it does not say so.
    if mode > 2 || (mode == 2 && flags != 1) {
        return FAILURE;
    }
    // No domain here has a number.
    let guest = (flags == 1)
        .then(|| {
            // SAFETY: with this flag it is a name that ends with NUL.
            let name = unsafe { CStr::from_ptr(domain.cast()) };
            let path = Path::new(OsStr::from_bytes(name.to_bytes()));
            match mode {
                2 => Guest::of_file(path),
                _ => Guest::of_text(path),
            }
        })
        .flatten();
    let failed = match &guest {
        None => Some(3),
        Some(guest) => guest.error,
    };
    if let Some(number) = failed {
        // SAFETY: both are the caller's.
        unsafe {
            error.write(number);
            vmi.write(ptr::null_mut());
        }
        return FAILURE;
    }
    let guest = Box::new(guest.unwrap_or_default());
    // SAFETY: the caller's.
    unsafe { vmi.write(Box::into_raw(guest)) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmi_destroy(vmi: *mut Guest) -> c_uint {
    // SAFETY: made by `vmi_init`, and not used again.
    let guest = unsafe { Box::from_raw(vmi) };
    guest.does("destroy");
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmi_read_pa(
    vmi: *mut Guest,
    paddr: u64,
    count: usize,
    buf: *mut c_void,
    bytes_read: *mut usize,
) -> c_uint {
    // SAFETY: made by `vmi_init`, and used by one thread at a time.
    let guest = unsafe { &mut *vmi };
    // SAFETY: the caller has room for as many bytes.
    let buf = unsafe { std::slice::from_raw_parts_mut(buf.cast::<u8>(), count) };
    let read = guest.read(paddr, buf);
    // SAFETY: the caller's.
    unsafe { bytes_read.write(read) };
    status(read == count)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmi_get_memsize(vmi: *mut Guest) -> u64 {
    // SAFETY: made by `vmi_init`.
    unsafe { (*vmi).size }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmi_get_max_physical_address(vmi: *mut Guest) -> u64 {
    // SAFETY: made by `vmi_init`.
    unsafe { (*vmi).end }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmi_get_num_vcpus(vmi: *mut Guest) -> c_uint {
    // SAFETY: made by `vmi_init`.
    let guest = unsafe { &*vmi };
    c_uint::try_from(guest.vcpus.len()).unwrap_or(0)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmi_get_vcpureg(
    vmi: *mut Guest,
    value: *mut u64,
    register: u64,
    vcpu: c_ulong,
) -> c_uint {
    // SAFETY: made by `vmi_init`.
    let guest = unsafe { &*vmi };
    // `RIP`, `CR0`, `CR3`, `CR4`, `MSR_EFER` of `libvmi.h`.
    let place = [8, 18, 20, 21, 74]
        .iter()
        .position(|number| *number == register);
    let registers = usize::try_from(vcpu)
        .ok()
        .and_then(|vcpu| guest.vcpus.get(vcpu)?.as_ref());
    let found = registers
        .zip(place)
        .and_then(|(registers, place)| registers.get(place));
    match found {
        Some(found) => {
            // SAFETY: the caller's.
            unsafe { value.write(*found) };
            SUCCESS
        }
        None => FAILURE,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmi_pause_vm(vmi: *mut Guest) -> c_uint {
    // SAFETY: made by `vmi_init`.
    status(unsafe { &*vmi }.does("pause"))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmi_resume_vm(vmi: *mut Guest) -> c_uint {
    // SAFETY: made by `vmi_init`.
    status(unsafe { &*vmi }.does("resume"))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmi_pagecache_flush(vmi: *mut Guest) {
    // SAFETY: made by `vmi_init`.
    unsafe { &*vmi }.does("flush");
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmi_init_os(
    vmi: *mut Guest,
    _config_mode: c_uint,
    _config: *mut c_void,
    error: *mut c_uint,
) -> c_uint {
    // SAFETY: made by `vmi_init`.
    let guest = unsafe { &*vmi };
    guest.does("init_os");
    if guest.has_symbols() {
        return 1;
    }
    // SAFETY: the caller's.
    unsafe { error.write(7) };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmi_translate_ksym2v(
    vmi: *mut Guest,
    symbol: *const c_char,
    vaddr: *mut u64,
) -> c_uint {
    // SAFETY: made by `vmi_init`.
    let guest = unsafe { &*vmi };
    // SAFETY: it ends with NUL.
    let name = unsafe { CStr::from_ptr(symbol) };
    let Some(found) = name.to_str().ok().and_then(|name| guest.symbol(name)) else {
        return FAILURE;
    };
    // SAFETY: the caller's.
    unsafe { vaddr.write(found) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmi_mmap_guest_pa(
    vmi: *mut Guest,
    paddr: u64,
    num_pages: usize,
    _prot: c_int,
    access_ptrs: *mut *mut c_void,
) -> c_uint {
    // SAFETY: made by `vmi_init`.
    let guest = unsafe { &*vmi };
    let page = usize::try_from(PAGE).unwrap_or(0);
    let len = num_pages * page;
    let Some((file, offset)) = guest.mapped(paddr, len as u64) else {
        return FAILURE;
    };
    // SAFETY: a new mapping.
    let base = unsafe {
        mmap(
            ptr::null_mut(),
            len,
            ProtFlags::READ,
            MapFlags::PRIVATE,
            file,
            offset,
        )
    };
    let Ok(base) = base else {
        return FAILURE;
    };
    for number in 0..num_pages {
        // SAFETY: as many pointers as pages, and as many pages as are mapped.
        unsafe { access_ptrs.add(number).write(base.byte_add(number * page)) };
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn vmi_events_version() -> u32 {
    9
}
