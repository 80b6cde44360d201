//! Stands in for libxenforeignmemory: frames of the file in STANDIN_RAM.

use std::ffi::{c_int, c_void};
use std::fs::File;
use std::os::unix::fs::FileExt;

const PAGE: usize = 4096;

#[unsafe(no_mangle)]
pub extern "C" fn xenforeignmemory_open(_: *mut c_void, _: u32) -> *mut c_void {
    let file = File::open(std::env::var("STANDIN_RAM").unwrap()).unwrap();
    Box::into_raw(Box::new(file)).cast()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn xenforeignmemory_close(handle: *mut c_void) -> c_int {
    drop(unsafe { Box::from_raw(handle.cast::<File>()) });
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn xenforeignmemory_map(
    handle: *mut c_void,
    _: u32,
    _: c_int,
    count: usize,
    frames: *const u64,
    errors: *mut c_int,
) -> *mut c_void {
    let file = unsafe { &*handle.cast::<File>() };
    let frames = unsafe { std::slice::from_raw_parts(frames, count) };
    let errors = unsafe { std::slice::from_raw_parts_mut(errors, count) };
    let mut pages = vec![[0_u8; PAGE]; count].into_boxed_slice();
    for ((frame, error), page) in frames.iter().zip(errors).zip(&mut pages) {
        let read = file.read_exact_at(page, frame.saturating_mul(PAGE as u64));
        *error = if read.is_ok() { 0 } else { -22 };
    }
    Box::into_raw(pages).cast()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn xenforeignmemory_unmap(
    _: *mut c_void,
    at: *mut c_void,
    count: usize,
) -> c_int {
    let pages = std::ptr::slice_from_raw_parts_mut(at.cast::<[u8; PAGE]>(), count);
    drop(unsafe { Box::from_raw(pages) });
    0
}
