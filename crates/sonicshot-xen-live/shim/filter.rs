//! Preloaded into Xen's own `libxl-save-helper`: frames that are to be dropped are told to libxc
//! as `XALLOC` (populate, no data), so that it neither maps nor writes them.
//!
//! libxc asks `xc_get_pfn_type_batch` for the type of every frame before it maps it. The answer is
//! changed only for frames that Xen calls ordinary (`NOTAB`) and that are in a table which the
//! program that started the save makes when it is first asked, with the domain suspended by then.
//! Without that table, whatever the reason, nothing is changed, and the save is a full one.
//!
//! Of a restore, runs of frames that libxc wants memory for, one by one, are asked for by 2 MiB, as
//! Xen's own builder of domains does, and one by one only where there are no such.
//!
//! It also spares libxc what it does for nobody: `xl` is not told of every 4 MiB how far the save is,
//! which wakes it each time, and types are asked for so few at a time that libxencall keeps the
//! memory for the answer, in place of mapping it anew.
//!
//! No standard library: the helper has its own C library, and nothing here may panic.
#![no_std]

use core::ffi::{c_char, c_int, c_long, c_uint, c_ulong, c_void};
use core::mem::size_of;
use core::ptr;
use core::slice;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicUsize, Ordering};

// What these are called in `filter.rs` of the crate.
const REQUEST: &core::ffi::CStr = c"SONICSHOT_XEN_REQUEST";
const ANSWER: &core::ffi::CStr = c"SONICSHOT_XEN_ANSWER";
const TABLE: &core::ffi::CStr = c"SONICSHOT_XEN_TABLE";

/// `XEN_DOMCTL_PFINFO_*` (`xen/include/public/domctl.h`).
const NOTAB: u64 = 0;
const XALLOC: u64 = 0xe << 28;

const RTLD_NEXT: *mut c_void = -1_isize as *mut c_void;
const O_RDONLY: c_int = 0;
const O_WRONLY: c_int = 1;
const O_CLOEXEC: c_int = 0o2000000;
const PROT_READ: c_int = 1;
const MAP_SHARED: c_int = 1;

unsafe extern "C" {
    fn dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void;
    fn getenv(name: *const c_char) -> *const c_char;
    fn open(path: *const c_char, flags: c_int, ...) -> c_int;
    fn read(fd: c_int, buf: *mut c_void, len: usize) -> isize;
    fn write(fd: c_int, buf: *const c_void, len: usize) -> isize;
    fn close(fd: c_int) -> c_int;
    fn mmap(
        at: *mut c_void,
        len: usize,
        prot: c_int,
        flags: c_int,
        fd: c_int,
        offset: c_long,
    ) -> *mut c_void;
}

type GetTypes = unsafe extern "C" fn(*mut c_void, u32, u32, *mut u64) -> c_int;

/// Frames to drop: the first, and the first after the last.
#[repr(C)]
struct Run {
    start: u64,
    end: u64,
}

static REAL: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());
static ASKED: AtomicBool = AtomicBool::new(false);
static DOMAIN: AtomicU32 = AtomicU32::new(0);
static RUNS: AtomicPtr<Run> = AtomicPtr::new(ptr::null_mut());
static COUNT: AtomicUsize = AtomicUsize::new(0);

/// As libxc's own function of that name (`tools/libs/ctrl/xc_private.c`): `frames` holds the
/// numbers of `count` frames, and then their types.
///
/// # Safety
/// As libxc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xc_get_pfn_type_batch(
    xch: *mut c_void,
    domain: u32,
    count: u32,
    frames: *mut u64,
) -> c_int {
    /// With libxencall's 16 bytes before them, their numbers are no more than the one page that it
    /// keeps for the next call (`tools/libs/call/buffer.c`, 4.14 to 4.20).
    const BATCH: usize = 510;
    // SAFETY: finds the function that this one stands before.
    let Some(real) = (unsafe { real() }) else {
        return -1;
    };
    // SAFETY: asks once, and keeps what it gets for ever.
    let runs = unsafe { runs(domain) };
    // SAFETY: the caller gives `count` frames to be written.
    let frames = unsafe { slice::from_raw_parts_mut(frames, count as usize) };
    let mut numbers = [0; BATCH];
    for batch in frames.chunks_mut(BATCH) {
        for (number, frame) in numbers.iter_mut().zip(&*batch) {
            *number = *frame;
        }
        // SAFETY: a part of the caller's frames, at most `BATCH` long.
        let result = unsafe { real(xch, domain, batch.len() as u32, batch.as_mut_ptr()) };
        if result != 0 {
            return result;
        }
        for (number, kind) in numbers.iter().zip(batch) {
            if *kind == NOTAB && is_in(runs, *number) {
                *kind = XALLOC;
            }
        }
    }
    0
}

/// As libxc's own function of that name (`tools/libs/ctrl/xc_private.c`), which tells how many of how
/// many frames are written: nobody reads it.
#[unsafe(no_mangle)]
pub extern "C" fn xc_report_progress_step(_: *mut c_void, _: c_ulong, _: c_ulong) {}

type Populate = unsafe extern "C" fn(*mut c_void, u32, c_ulong, c_uint, c_uint, *mut u64) -> c_int;

static POPULATE: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());
static POPULATE_EXACT: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());

/// As libxc's own function of that name (`tools/libs/ctrl/xc_domain.c`): gives the domain memory for
/// the `count` frames of the guest in `frames`, each of 2^`order` pages, all or it fails; of a
/// paravirtualised domain `frames` has the machine's afterwards.
///
/// # Safety
/// As libxc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xc_domain_populate_physmap_exact(
    xch: *mut c_void,
    domain: u32,
    count: c_ulong,
    order: c_uint,
    flags: c_uint,
    frames: *mut u64,
) -> c_int {
    // SAFETY: finds the functions that these stand before, which have this type.
    let found = unsafe {
        let exact = next(&POPULATE_EXACT, c"xc_domain_populate_physmap_exact");
        exact.zip(next(&POPULATE, c"xc_domain_populate_physmap"))
    };
    let Some((exact, some)) = found else {
        return -1;
    };
    // SAFETY: libxenctrl's functions of these names have this type.
    let (exact, some) = unsafe {
        (
            core::mem::transmute::<*mut c_void, Populate>(exact),
            core::mem::transmute::<*mut c_void, Populate>(some),
        )
    };
    if order != 0 || frames.is_null() {
        // SAFETY: the caller's arguments, as they are.
        return unsafe { exact(xch, domain, count, order, flags, frames) };
    }
    // SAFETY: the caller gives `count` frames to be written.
    let mut rest = unsafe { slice::from_raw_parts_mut(frames, count as usize) };
    while !rest.is_empty() {
        let (now, later) = rest.split_at_mut(single(rest));
        if !now.is_empty() {
            // SAFETY: a part of the caller's frames.
            let result =
                unsafe { exact(xch, domain, now.len() as c_ulong, 0, flags, now.as_mut_ptr()) };
            if result != 0 {
                return result;
            }
        }
        let Some((whole, later)) = later.split_at_mut_checked(LARGE) else {
            break;
        };
        let mut frame = whole.first().copied().unwrap_or(0);
        // SAFETY: one frame, of 2 MiB.
        let given = unsafe { some(xch, domain, 1, LARGE_ORDER, flags, &raw mut frame) };
        let result = if given == 1 {
            for (page, inside) in whole.iter_mut().zip(0..) {
                *page = frame + inside;
            }
            0
        } else {
            // SAFETY: a part of the caller's frames.
            unsafe { exact(xch, domain, LARGE as c_ulong, 0, flags, whole.as_mut_ptr()) }
        };
        if result != 0 {
            return result;
        }
        rest = later;
    }
    0
}

/// Pages of 2 MiB, and what Xen calls that.
const LARGE: usize = 512;
const LARGE_ORDER: c_uint = 9;

/// The number of `frames` that come before 2 MiB of them that are one run and begin at a multiple; all,
/// if there are no such.
fn single(frames: &[u64]) -> usize {
    let begins = |at: &usize| {
        let run = frames.get(*at..).and_then(|rest| rest.get(..LARGE));
        run.is_some_and(|run| {
            run.first().is_some_and(|first| first % LARGE as u64 == 0)
                && run.windows(2).all(|pair| matches!(pair, [a, b] if a.checked_add(1) == Some(*b)))
        })
    };
    (0..frames.len()).find(begins).unwrap_or(frames.len())
}

/// The function `name` behind this library, kept in `place`.
unsafe fn next(place: &AtomicPtr<c_void>, name: &core::ffi::CStr) -> Option<*mut c_void> {
    let mut found = place.load(Ordering::Relaxed);
    if found.is_null() {
        // SAFETY: looks behind this library for a name with its end.
        found = unsafe { dlsym(RTLD_NEXT, name.as_ptr()) };
        place.store(found, Ordering::Relaxed);
    }
    (!found.is_null()).then_some(found)
}

fn is_in(runs: &[Run], number: u64) -> bool {
    let above = runs.partition_point(|run| run.start <= number);
    let run = above.checked_sub(1).and_then(|index| runs.get(index));
    run.is_some_and(|run| number < run.end)
}

unsafe fn real() -> Option<GetTypes> {
    // SAFETY: looks behind this library for the same name.
    let found = unsafe { next(&REAL, c"xc_get_pfn_type_batch") }?;
    // SAFETY: libxenctrl's function of that name has this type.
    Some(unsafe { core::mem::transmute::<*mut c_void, GetTypes>(found) })
}

/// The table for `domain`; empty for another than the first.
unsafe fn runs(domain: u32) -> &'static [Run] {
    if !ASKED.swap(true, Ordering::Relaxed) {
        DOMAIN.store(domain, Ordering::Relaxed);
        // SAFETY: the environment is that of a helper started by a save.
        let (start, count) = unsafe { ask(domain) }.unwrap_or((ptr::null_mut(), 0));
        RUNS.store(start, Ordering::Relaxed);
        COUNT.store(count, Ordering::Relaxed);
    }
    let (start, count) = (RUNS.load(Ordering::Relaxed), COUNT.load(Ordering::Relaxed));
    if start.is_null() || DOMAIN.load(Ordering::Relaxed) != domain {
        return &[];
    }
    // SAFETY: mapped by `ask` with this length, never unmapped, and not written any more.
    unsafe { slice::from_raw_parts(start, count) }
}

/// Asks the program that started the save, and maps its table.
unsafe fn ask(domain: u32) -> Option<(*mut Run, usize)> {
    let question = domain.to_le_bytes();
    let mut answer = [0; 8];
    // SAFETY: `question` and `answer` are as long as said; the names are the environment's.
    unsafe {
        let request = open_named(REQUEST, O_WRONLY)?;
        let sent = write(request, question.as_ptr().cast(), question.len());
        close(request);
        if sent != question.len() as isize {
            return None;
        }
        let reply = open_named(ANSWER, O_RDONLY)?;
        let got = read(reply, answer.as_mut_ptr().cast(), answer.len());
        close(reply);
        if got != answer.len() as isize {
            return None;
        }
    }
    let count = usize::try_from(u64::from_le_bytes(answer)).ok()?;
    let len = count.checked_mul(size_of::<Run>()).filter(|len| *len > 0)?;
    // SAFETY: a new mapping of a file that is as long as the answer says.
    let table = unsafe {
        let file = open_named(TABLE, O_RDONLY)?;
        let table = mmap(ptr::null_mut(), len, PROT_READ, MAP_SHARED, file, 0);
        close(file);
        table
    };
    // `MAP_FAILED` is -1.
    (table as isize != -1).then_some((table.cast(), count))
}

unsafe fn open_named(variable: &core::ffi::CStr, flags: c_int) -> Option<c_int> {
    // SAFETY: a name with its end; what is returned is a string or null.
    let path = unsafe { getenv(variable.as_ptr()) };
    if path.is_null() {
        return None;
    }
    // SAFETY: a string of the environment.
    let fd = unsafe { open(path, flags | O_CLOEXEC) };
    (fd >= 0).then_some(fd)
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
