//! Stands in for libxenctrl: one HVM domain, number 5, with the pages of the file in STANDIN_RAM.

use std::ffi::c_void;

fn pages() -> u64 {
    let path = std::env::var("STANDIN_RAM").unwrap();
    std::fs::metadata(path).unwrap().len() >> 12
}

#[unsafe(no_mangle)]
pub extern "C" fn xc_interface_open(_: *mut c_void, _: *mut c_void, _: u32) -> *mut c_void {
    std::ptr::dangling_mut::<u8>().cast()
}

#[unsafe(no_mangle)]
pub extern "C" fn xc_interface_close(_: *mut c_void) -> i32 {
    0
}

/// As Xen: from that number on.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xc_domain_getinfolist(
    _: *mut c_void,
    first: u32,
    _: u32,
    info: *mut u64,
) -> i32 {
    if first > 5 {
        return 0;
    }
    // HVM, shut down, for the reason that it was suspended.
    let flags: u64 = match std::env::var("STANDIN_RUNS") {
        Ok(_) => 1 << 1 | 1 << 5,
        Err(_) => 1 << 1 | 1 << 2 | 2 << 16,
    };
    unsafe {
        info.write(5 | flags << 32);
        info.add(1).write(pages());
    }
    1
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn xc_domain_maximum_gpfn(_: *mut c_void, _: u32, last: *mut u64) -> i32 {
    unsafe { last.write(pages() + 100) };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn xc_get_pfn_type_batch(
    _: *mut c_void,
    domain: u32,
    count: u32,
    frames: *mut u64,
) -> i32 {
    assert_eq!(domain, 5);
    let pages = pages();
    for frame in unsafe { std::slice::from_raw_parts_mut(frames, count as usize) } {
        *frame = if *frame < pages { 0 } else { 0xf << 28 };
    }
    0
}
