//! A shared file that is mapped too: guest memory that can be read without a call to the system.
//!
//! Only a file that is sealed against getting shorter is mapped, as QEMU's memfds are unless it is
//! told otherwise: whoever cuts off another one ends the process that has it mapped. And only pages
//! that were there are read so, for to read a hole of a file in memory fills it.

use crate::shadow::PAGE;
use rustix::fs::{SealFlags, SeekFrom, fcntl_get_seals, seek};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};
use sonicshot::GuestBytes;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Sealed {
    start: NonNull<u8>,
    len: usize,
    /// Bit `n` of all: page `n` is mapped.
    there: Vec<AtomicU64>,
    /// The file, and its one place of reading.
    file: Mutex<File>,
}

// SAFETY: the mapping is owned, and only read.
unsafe impl Send for Sealed {}
// SAFETY: as for `Send`.
unsafe impl Sync for Sealed {}

impl Sealed {
    /// `None` of a file that cannot be mapped, or should not: also of huge pages, of which there may
    /// be none left for a hole.
    pub(crate) fn new(file: &File) -> Option<Self> {
        let found = file.metadata().ok()?;
        let seals = fcntl_get_seals(file).ok()?;
        let small = usize::try_from(found.blksize()).ok()? <= PAGE;
        if !small || !seals.contains(SealFlags::SHRINK) {
            return None;
        }
        let len = usize::try_from(found.len()).ok()?;
        let file = file.try_clone().ok()?;
        // SAFETY: a new mapping, at a place that the kernel chooses, touches nothing there is.
        let start = unsafe {
            let (rights, flags) = (ProtFlags::READ, MapFlags::SHARED);
            mmap(core::ptr::null_mut(), len, rights, flags, &file, 0)
        };
        let start = NonNull::new(start.ok()?.cast())?;
        let mut there = Vec::new();
        there.resize_with((len / PAGE).div_ceil(64), AtomicU64::default);
        Some(Self {
            start,
            len,
            there,
            file: Mutex::new(file),
        })
    }

    /// Has the pages of these ranges of bytes, which are in their order, mapped that are there.
    pub(crate) fn prepare(&self, ranges: impl Iterator<Item = Range<u64>>) {
        let file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        // To look for its end takes as long as it is long: once is enough.
        let mut data = 0..0;
        for range in ranges {
            let mut at = range.start;
            while at < range.end {
                if !data.contains(&at) {
                    // Behind the last data there is an error.
                    let Ok(start) = seek(&*file, SeekFrom::Data(at)) else {
                        return;
                    };
                    let Ok(end) = seek(&*file, SeekFrom::Hole(start)) else {
                        return;
                    };
                    data = start..end;
                }
                self.populate(at.max(data.start), range.end.min(data.end));
                at = data.end;
            }
        }
    }

    fn populate(&self, from: u64, to: u64) {
        let place = |at: u64| usize::try_from(at).ok().filter(|at| *at <= self.len);
        let (Some(from), Some(to)) = (place(from), place(to)) else {
            return;
        };
        let (first, last) = (from / PAGE, to / PAGE);
        let pages = last.checked_sub(first);
        let len = pages.and_then(|pages| pages.checked_mul(PAGE));
        let (Some(len @ 1..), Some(skip)) = (len, first.checked_mul(PAGE)) else {
            return;
        };
        // SAFETY: inside the mapping.
        let at = unsafe { self.start.add(skip) };
        // SAFETY: the pages are this mapping's own, and to bring them in changes none of them.
        if unsafe { madvise(at.as_ptr().cast(), len, Advice::LinuxPopulateRead) }.is_err() {
            return;
        }
        for page in first..last {
            if let Some(word) = self.there.get(page / 64) {
                word.fetch_or(1 << (page % 64), Ordering::Relaxed);
            }
        }
    }

    /// The bytes, if all their pages are mapped. They may change at any time.
    pub(crate) fn get(&self, at: u64, len: usize) -> Option<GuestBytes<'_>> {
        let at = usize::try_from(at).ok()?;
        let end = at.checked_add(len).filter(|end| *end <= self.len)?;
        let is_there = |page: usize| {
            let word = self.there.get(page / 64);
            word.is_some_and(|word| word.load(Ordering::Relaxed) & (1 << (page % 64)) != 0)
        };
        if !(at / PAGE..end.div_ceil(PAGE)).all(is_there) {
            return None;
        }
        // SAFETY: inside the mapping, as was tested.
        let start = unsafe { self.start.add(at) };
        // SAFETY: the bytes stay mapped while this is borrowed, and the file cannot get shorter.
        Some(unsafe { GuestBytes::from_raw_parts(start, len) })
    }
}

impl Drop for Sealed {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and whoever had borrowed of it is gone.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::Sealed;
    use crate::shadow::PAGE;
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
    use std::fs::File;
    use std::os::unix::fs::{FileExt, MetadataExt};

    #[test]
    fn what_can_be_cut_off_is_not_mapped() {
        for (seals, mapped) in [
            (SealFlags::empty(), false),
            (SealFlags::GROW, false),
            (SealFlags::SHRINK, true),
        ] {
            let flags = MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC;
            let file = File::from(memfd_create("guest", flags).unwrap());
            file.set_len(8 << 20).unwrap();
            fcntl_add_seals(&file, seals).unwrap();
            assert_eq!(Sealed::new(&file).is_some(), mapped, "{seals:?}");
        }
        assert!(Sealed::new(&tempfile::tempfile().unwrap()).is_none());
    }

    #[test]
    fn holes_stay_holes() {
        let flags = MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC;
        let file = File::from(memfd_create("guest", flags).unwrap());
        let len = 64 * PAGE as u64;
        file.set_len(len).unwrap();
        fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
        let page = |number: u64| number * PAGE as u64;
        for number in [3, 4, 9] {
            file.write_all_at(&[u8::try_from(number).unwrap(); PAGE], page(number))
                .unwrap();
        }
        let sealed = Sealed::new(&file).unwrap();
        assert!(sealed.get(page(3), PAGE).is_none(), "not prepared");
        let ranges = [(2, 4), (4, 4), (4, 9), (9, 64), (64, 70)];
        sealed.prepare(ranges.into_iter().map(|(from, to)| page(from)..page(to)));
        for number in 0..66 {
            let there = [3, 4, 9].contains(&number);
            assert_eq!(sealed.get(page(number), PAGE).is_some(), there, "{number}");
        }
        let both = sealed.get(page(5) - 8 - page(1), 16).unwrap();
        assert_eq!((both.u8_at(7), both.u8_at(8)), (Some(3), Some(4)));
        assert!(sealed.get(page(4), 2 * PAGE).is_none());
        assert!(sealed.get(u64::MAX, 2).is_none());
        // What is written is seen, and nothing was filled.
        file.write_all_at(&[7], page(3)).unwrap();
        assert_eq!(sealed.get(page(3), 1).unwrap().u8_at(0), Some(7));
        assert_eq!(file.metadata().unwrap().blocks() * 512, 3 * PAGE as u64);
    }
}
