//! The guest's options, and what they mean for its free pages.

use super::LinuxGuest;
use crate::VirtualMemory;
use crate::error::VmiError;
use crate::note::Note;
use sonicshot::{Fill, MemoryError, PageClass, PageMap, Pfn};

impl LinuxGuest<'_> {
    /// Whether the flag behind `names` is set: a static key or a bool, by its first byte.
    fn flag(&self, names: &[&str]) -> Result<Option<bool>, VmiError> {
        for name in names {
            if let Some(at) = self.kernel.symbol(name)? {
                let mut byte = [0];
                self.kernel
                    .space
                    .read(at, &mut byte)
                    .map_err(VmiError::read("a kernel flag"))?;
                return Ok(Some(byte != [0]));
            }
        }
        // A name that a whole symbol table does not have belongs to a feature not built in.
        Ok(self.kernel.knows_all_symbols()?.then_some(false))
    }

    /// The content that free pages must have: `mm/page_poison.c` checks for its pattern on
    /// allocation, and `init_on_free` hands out pages as zero without looking.
    pub(super) fn free_fill(&self, map: &PageMap, notes: &mut Vec<Note>) -> Result<Fill, VmiError> {
        const PAGE_POISON: u8 = 0xaa;
        // `_page_poisoning_enabled` since 5.11, `want_page_poisoning` before.
        let poisoned = self.flag(&["_page_poisoning_enabled", "want_page_poisoning"])?;
        let zeroed = self.flag(&["init_on_free"])?;
        let unless_poisoned = |zeroed| if zeroed { Fill::Zero } else { Fill::Any };
        if poisoned == Some(false)
            && let Some(zeroed) = zeroed
        {
            return Ok(unless_poisoned(zeroed));
        }
        // On, or unknown: with poisoning every free page holds the pattern, so one that does
        // not proves it off. The same of zeroes.
        let memory = self.kernel.space.memory();
        let (mut looked, mut with_pattern, mut zero) = (0, 0, 0);
        let mut page = self.kernel.page_buffer()?;
        for frame in looked_at(map) {
            let Some(at) = frame.gpa(self.kernel.build.page_size) else {
                continue;
            };
            match memory.read(at, &mut page) {
                // What is not in the source tells nothing.
                Err(MemoryError::Absent { .. }) => continue,
                read => read?,
            }
            let is_all = |with: u8| u64::from(page.iter().all(|byte| *byte == with));
            let what = "free pages";
            VmiError::count(what, &mut looked, 1)?;
            VmiError::count(what, &mut with_pattern, is_all(PAGE_POISON))?;
            VmiError::count(what, &mut zero, is_all(0))?;
        }
        // Where no flag tells, a few pages that were just freed or being given away decide nothing.
        let few = looked.checked_sub(looked.div_ceil(20));
        let most = |count: u64| few.is_some_and(|few| count > few);
        if poisoned == Some(false) || poisoned.is_none() && !most(with_pattern) {
            return Ok(unless_poisoned(zeroed.unwrap_or(most(zero))));
        }
        if looked > 0 && zero == looked {
            // CONFIG_PAGE_POISONING_ZERO (to 5.10): the pattern is zero.
            return Ok(Fill::Zero);
        }
        notes.push(Note::PagePoison { byte: PAGE_POISON });
        Ok(Fill::Byte(PAGE_POISON))
    }

    /// Features of the guest that bear on free pages.
    pub(super) fn note_features(&self, notes: &mut Vec<Note>) -> Result<(), VmiError> {
        for (name, note) in [
            ("init_on_free", Note::InitOnFree),
            ("_debug_pagealloc_enabled", Note::DebugPagealloc),
            ("kasan_flag_enabled", Note::HardwareTags),
        ] {
            if self.flag(&[name])? == Some(true) {
                notes.push(note);
            }
        }
        Ok(())
    }
}

/// Of so many runs of free pages the first is looked at.
const MAX_LOOKED: usize = 4096;

/// The free pages that are looked at.
fn looked_at(map: &PageMap) -> impl Iterator<Item = Pfn> {
    map.runs()
        .filter(|(_, class)| *class == PageClass::FreeBuddy)
        .take(MAX_LOOKED)
        .map(|(frames, _)| frames.start())
}

#[cfg(test)]
mod tests {
    use super::{MAX_LOOKED, looked_at};
    use sonicshot::{Gpa, GpaRange, PageClass, PageMap, PageSize, Pfn, PfnRange, RamLayout};

    #[test]
    fn of_free_blocks_without_end_so_many_are_looked_into() {
        for (blocks, looked) in [
            (3, 3),
            (MAX_LOOKED, MAX_LOOKED),
            (MAX_LOOKED + 9, MAX_LOOKED),
        ] {
            let frames = 2 * blocks as u64;
            let range = GpaRange::with_len(Gpa::ZERO, frames << 12).unwrap();
            let layout = RamLayout::new(vec![range]).unwrap();
            let mut map = PageMap::new(&layout, PageSize::SIZE_4K);
            for pfn in (0..frames).step_by(2) {
                let frame = PfnRange::with_len(Pfn::new(pfn), 1).unwrap();
                map.set(frame, PageClass::FreeBuddy);
            }
            assert_eq!(looked_at(&map).count(), looked, "{blocks}");
        }
    }
}
