//! A copy of guest memory that is filled as it is asked for: as large as the guest's RAM, of which
//! only what was read takes memory.
//!
//! Of each page there is one bit: whether it is filled. A page whose bit is set is never written
//! again until [`Shadow::clear`], which nobody can call who has lent bytes out. Who fills pages
//! holds the lock of their block, so that no two threads write to one.

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use sonicshot::GuestBytes;
use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// The pages of which one is filled or not, in bytes.
pub(crate) const PAGE: usize = 4096;
/// The amount that is filled under one lock, in bytes.
pub(crate) const BLOCK: usize = 2 << 20;
const PAGES: usize = BLOCK / PAGE;

/// Bytes that are to be filled.
pub(crate) struct Hole<'a> {
    /// Their offset, in bytes from the beginning.
    pub at: usize,
    /// All of them.
    pub bytes: &'a mut [u8],
}

/// See the [module](self).
pub(crate) struct Shadow {
    start: NonNull<u8>,
    len: usize,
    /// Bit `n` of all: page `n`.
    filled: Vec<AtomicU64>,
    /// The same, of pages that have memory: once they were filled or made ready.
    resident: Vec<AtomicU64>,
    locks: Vec<Mutex<()>>,
}

// SAFETY: the mapping is owned, and its pages are written under a lock before their bit is set, and
// read only after that.
unsafe impl Send for Shadow {}
// SAFETY: as for `Send`.
unsafe impl Sync for Shadow {}

impl Shadow {
    /// Room for `len` bytes, a multiple of [`BLOCK`].
    pub(crate) fn new(len: usize) -> io::Result<Self> {
        if len == 0 || !len.is_multiple_of(BLOCK) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: a new mapping, at a place that the kernel chooses, touches nothing there is.
        let start = unsafe {
            mmap_anonymous(
                core::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }?;
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        let (mut filled, mut resident, mut locks) = (Vec::new(), Vec::new(), Vec::new());
        let words = (len / PAGE).div_ceil(64);
        filled.resize_with(words, AtomicU64::default);
        resident.resize_with(words, AtomicU64::default);
        locks.resize_with(len / BLOCK, Mutex::default);
        Ok(Self {
            start,
            len,
            filled,
            resident,
            locks,
        })
    }

    fn is_filled(&self, page: usize) -> bool {
        has_bit(&self.filled, page)
    }

    /// Whether all of these bytes are filled.
    pub(crate) fn has(&self, bytes: &Range<usize>) -> bool {
        bytes.end <= self.len
            && (bytes.start / PAGE..bytes.end.div_ceil(PAGE)).all(|page| self.is_filled(page))
    }

    /// The bytes, if all of them are filled.
    pub(crate) fn get(&self, bytes: &Range<usize>) -> Option<GuestBytes<'_>> {
        let len = bytes.end.checked_sub(bytes.start)?;
        if !self.has(bytes) {
            return None;
        }
        // SAFETY: inside the mapping, as `has` has tested.
        let start = unsafe { self.start.add(bytes.start) };
        // SAFETY: the bytes stay mapped while this is borrowed, and nobody writes to pages that
        // are filled.
        Some(unsafe { GuestBytes::from_raw_parts(start, len) })
    }

    /// Has `fill` write all pages of `pages` that are not filled; those are page numbers of one
    /// block. If it fails none of them counts as filled.
    pub(crate) fn fill<E>(
        &self,
        block: usize,
        pages: &[Range<usize>],
        fill: impl FnOnce(&mut [Hole<'_>]) -> Result<(), E>,
    ) -> Result<(), E> {
        let Some(lock) = self.locks.get(block) else {
            return Ok(());
        };
        // What a thread that panicked had begun has no bits.
        let held = lock.lock().unwrap_or_else(PoisonError::into_inner);
        let first = block.checked_mul(PAGES);
        let Some(all) = first.and_then(|first| Some(first..first.checked_add(PAGES)?)) else {
            return Ok(());
        };
        let mut missing: Vec<Range<usize>> = Vec::new();
        for range in pages {
            for page in range.start.max(all.start)..range.end.min(all.end) {
                if self.is_filled(page) {
                    continue;
                }
                // What comes twice is filled once.
                if missing.last().is_none_or(|last| page >= last.end) {
                    append(&mut missing, page);
                }
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        let holes: Option<Vec<_>> = missing.iter().map(|pages| self.hole(pages)).collect();
        let Some(mut holes) = holes else {
            return Ok(());
        };
        fill(&mut holes)?;
        for page in missing.into_iter().flatten() {
            set_bit(&self.filled, page);
            set_bit(&self.resident, page);
        }
        drop(held);
        Ok(())
    }

    /// Pages that are not filled and of whose block the lock is held.
    fn hole(&self, pages: &Range<usize>) -> Option<Hole<'_>> {
        // Of a block that has a lock: inside the mapping.
        let at = pages.start.checked_mul(PAGE)?;
        let len = pages.len().checked_mul(PAGE)?;
        // SAFETY: inside the mapping, for the block has a lock.
        let start = unsafe { self.start.add(at) };
        // SAFETY: mapped and initialised (by zeroes at first); nobody else has a pointer to pages
        // that are not filled but who holds this block's lock, and the holes are disjoint.
        let bytes = unsafe { core::slice::from_raw_parts_mut(start.as_ptr(), len) };
        Some(Hole { at, bytes })
    }

    /// The number of these pages that have no memory yet.
    pub(crate) fn missing(&self, pages: &Range<usize>) -> u64 {
        pages
            .clone()
            .map(|page| u64::from(!has_bit(&self.resident, page)))
            .sum()
    }

    /// The number of pages that have memory.
    pub(crate) fn resident(&self) -> u64 {
        let words = self.resident.iter();
        words
            .map(|word| u64::from(word.load(Ordering::Relaxed).count_ones()))
            .sum()
    }

    /// The pages that are filled, as ranges of their numbers.
    pub(crate) fn filled(&self) -> Vec<Range<usize>> {
        let mut out: Vec<Range<usize>> = Vec::new();
        for page in 0..self.len / PAGE {
            if !self.is_filled(page) {
                continue;
            }
            append(&mut out, page);
        }
        out
    }

    /// Forgets what is filled; its memory stays.
    pub(crate) fn clear(&mut self) {
        for word in &mut self.filled {
            *word.get_mut() = 0;
        }
    }

    /// Has memory ready for these bytes, so that to fill them takes no fault. A hint.
    pub(crate) fn prepare(&self, bytes: &Range<usize>) {
        let start = bytes.start & !(PAGE - 1);
        let end = bytes.end.min(self.len);
        let Some(len) = end.checked_sub(start).filter(|len| *len > 0) else {
            return;
        };
        // SAFETY: inside the mapping.
        let at = unsafe { self.start.add(start) };
        // SAFETY: the pages are this mapping's own, and to bring them in changes none of them.
        let done = unsafe { madvise(at.as_ptr().cast(), len, Advice::LinuxPopulateWrite) };
        if done.is_ok() {
            for page in start / PAGE..end.div_ceil(PAGE) {
                set_bit(&self.resident, page);
            }
        }
    }
}

fn has_bit(bits: &[AtomicU64], page: usize) -> bool {
    let word = bits.get(page / 64);
    word.is_some_and(|word| word.load(Ordering::Acquire) & (1 << (page % 64)) != 0)
}

fn set_bit(bits: &[AtomicU64], page: usize) {
    if let Some(word) = bits.get(page / 64) {
        word.fetch_or(1 << (page % 64), Ordering::Release);
    }
}

/// Adds `page`, which is behind all in `ranges`.
fn append(ranges: &mut Vec<Range<usize>>, page: usize) {
    let Some(end) = page.checked_add(1) else {
        return;
    };
    match ranges.last_mut() {
        Some(last) if last.end == page => last.end = end,
        _ => ranges.push(page..end),
    }
}

impl Drop for Shadow {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and whoever had borrowed of it is gone.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::{BLOCK, PAGE, Shadow};
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[expect(
        clippy::single_range_in_vec_init,
        reason = "a list of one range is meant"
    )]
    #[test]
    fn each_page_is_filled_once_whoever_asks() {
        let mut shadow = Shadow::new(2 * BLOCK).unwrap();
        assert!(Shadow::new(BLOCK + PAGE).is_err());
        assert!(!shadow.has(&(0..1)));
        let filled = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for first in 0..4 {
                let (shadow, filled) = (&shadow, &filled);
                scope.spawn(move || {
                    let pages = [first..first + 100, first + 300..first + 301];
                    let done = shadow.fill::<()>(0, &pages, |holes| {
                        for hole in holes {
                            filled.fetch_add(hole.bytes.len() / PAGE, Ordering::Relaxed);
                            for (nth, page) in hole.bytes.chunks_mut(PAGE).enumerate() {
                                page.fill(u8::try_from((hole.at / PAGE + nth) % 256).unwrap());
                            }
                        }
                        Ok(())
                    });
                    done.unwrap();
                });
            }
        });
        assert_eq!(filled.into_inner(), 103 + 4);
        assert_eq!(shadow.filled(), [0..103, 300..304]);
        let bytes = shadow.get(&(5 * PAGE - 1..5 * PAGE + 1)).unwrap();
        assert_eq!((bytes.u8_at(0), bytes.u8_at(1)), (Some(4), Some(5)));
        assert!(shadow.get(&(102 * PAGE..104 * PAGE)).is_none());
        // What fails is not there.
        assert!(shadow.fill(1, &[512..513], |_| Err(())).is_err());
        assert!(shadow.get(&(BLOCK..BLOCK + 1)).is_none());
        // Of another block nothing is filled, nor of one that is none.
        shadow
            .fill::<()>(1, &[0..512], |_| panic!("none of it"))
            .unwrap();
        shadow
            .fill::<()>(9, &[0..512], |_| panic!("no block"))
            .unwrap();
        // What was filled or made ready has memory, and keeps it.
        assert_eq!(
            (shadow.missing(&(0..512)), shadow.resident()),
            (512 - 107, 107)
        );
        shadow.prepare(&(0..2 * BLOCK));
        assert_eq!((shadow.missing(&(0..1024)), shadow.resident()), (0, 1024));
        shadow.clear();
        assert!(shadow.filled().is_empty());
        assert_eq!((shadow.missing(&(0..1024)), shadow.resident()), (0, 1024));
    }
}
