//! Page tables that were read a moment ago.
//!
//! Each translation reads an entry of every level, and most of the next one's are in the same tables.
//! Of a file each entry would be a system call. Tables are remembered only while one look at the
//! guest goes on ([`Tables::remember`]): between two looks a guest that runs may change them.

use sonicshot::{Gpa, GuestMemory, MemoryError, P2m, RamLayout, to_u64};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// So many tables are remembered; of those that would be in one place, the last.
const KEPT_TABLES: usize = 64;
const TABLE: usize = 4096;
const INSIDE: u64 = 0xfff;

/// The tables in `memory` that are remembered.
pub(super) struct Tables<'m> {
    memory: &'m dyn GuestMemory,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    /// One for each look that goes on.
    looks: Vec<()>,
    tables: Vec<Option<(Gpa, Box<[u8; TABLE]>)>>,
}

/// While it is there, tables are remembered.
pub(crate) struct Remembered<'a, 'm>(&'a Tables<'m>);

impl Drop for Remembered<'_, '_> {
    fn drop(&mut self) {
        let mut kept = self.0.kept();
        kept.looks.pop();
        if kept.looks.is_empty() {
            kept.tables = Vec::new();
        }
    }
}

impl<'m> Tables<'m> {
    pub(super) const fn new(memory: &'m dyn GuestMemory) -> Self {
        Self {
            memory,
            kept: Mutex::new(Kept {
                looks: Vec::new(),
                tables: Vec::new(),
            }),
        }
    }

    pub(super) const fn memory(&self) -> &'m dyn GuestMemory {
        self.memory
    }

    /// Remembers tables until what is returned goes.
    pub(super) fn remember(&self) -> Remembered<'_, 'm> {
        let mut kept = self.kept();
        kept.looks.push(());
        Remembered(self)
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The entry at `at`, if its table is remembered or can be.
    fn entry(&self, at: Gpa) -> Option<[u8; 8]> {
        // What is in this process's memory is as near.
        if !self.memory.prefers_read() {
            return None;
        }
        let offset = usize::try_from(at.raw() & INSIDE).ok()?;
        let table = Gpa::new(at.raw().checked_sub(to_u64(offset))?);
        let place = usize::try_from(table.raw() >> 12).ok()? % KEPT_TABLES;
        let mut kept = self.kept();
        if kept.looks.is_empty() {
            return None;
        }
        if kept.tables.is_empty() {
            kept.tables.resize_with(KEPT_TABLES, || None);
        }
        let slot = kept.tables.get_mut(place)?;
        if slot.as_ref().is_none_or(|(at, _)| *at != table) {
            let mut bytes = Box::new([0; TABLE]);
            self.memory.read(table, bytes.as_mut_slice()).ok()?;
            *slot = Some((table, bytes));
        }
        let (_, bytes) = slot.as_ref()?;
        bytes.get(offset..)?.first_chunk().copied()
    }
}

impl GuestMemory for Tables<'_> {
    fn layout(&self) -> &RamLayout {
        self.memory.layout()
    }

    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        if let Ok(out) = <&mut [u8; 8]>::try_from(&mut *buf)
            && let Some(entry) = self.entry(at)
        {
            *out = entry;
            return Ok(());
        }
        self.memory.read(at, buf)
    }

    fn p2m(&self) -> Option<&P2m> {
        self.memory.p2m()
    }
}

#[cfg(test)]
mod tests {
    use super::Tables;
    use sonicshot::{Gpa, GpaRange, GuestMemory, MemoryError, RamLayout};
    use std::sync::atomic::{AtomicU64, Ordering};

    /// Memory as a file has it, whose words are all the same.
    struct Changing {
        layout: RamLayout,
        word: AtomicU64,
        reads: AtomicU64,
    }

    impl GuestMemory for Changing {
        fn layout(&self) -> &RamLayout {
            &self.layout
        }

        fn read(&self, _: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
            self.reads.fetch_add(1, Ordering::Relaxed);
            let word = self.word.load(Ordering::Relaxed).to_le_bytes();
            for (to, from) in buf.iter_mut().zip(word.iter().cycle()) {
                *to = *from;
            }
            Ok(())
        }

        fn prefers_read(&self) -> bool {
            true
        }
    }

    #[test]
    fn tables_are_remembered_for_one_look() {
        let ram = GpaRange::with_len(Gpa::ZERO, 1 << 20).unwrap();
        let memory = Changing {
            layout: RamLayout::new(vec![ram]).unwrap(),
            word: AtomicU64::new(1),
            reads: AtomicU64::new(0),
        };
        let tables = Tables::new(&memory);
        let word = |at| tables.read_u64(Gpa::new(at)).unwrap();
        let now = |word| memory.word.store(word, Ordering::Relaxed);
        let look = tables.remember();
        assert_eq!((word(0x1000), word(0x1ff8), word(0x2000)), (1, 1, 1));
        assert_eq!(memory.reads.load(Ordering::Relaxed), 2);
        now(2);
        assert_eq!((word(0x1000), word(0x3000)), (1, 2));
        // Another look within the first ends nothing.
        drop(tables.remember());
        assert_eq!(word(0x1000), 1);
        // In the place of another.
        assert_eq!(word(0x4_1000), 2);
        drop(look);
        now(3);
        assert_eq!((word(0x1000), word(0x2000), word(0x4_1000)), (3, 3, 3));
        let _look = tables.remember();
        assert_eq!(word(0x1000), 3);
    }
}
