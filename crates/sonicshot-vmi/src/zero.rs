//! Pages whose every byte is zero.

use sonicshot::work::{for_each_told, threads};
use sonicshot::{
    ClassSet, Gpa, GpaRange, GuestBytes, GuestMemory, MemoryError, PageClass, PageMap, PageSize,
    Pfn, PfnRange, PhaseProgress, Progress, Tally, WorkOptions, WorkPhase, to_u64, to_usize,
};
use std::iter;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};

/// The number of bytes that are mapped or read at a time: they fit the processor's cache.
const WINDOW: u64 = 512 << 10;
/// A thread counts the pages of so many frames at a time, as a binary logarithm.
const PIECE: u32 = 13;
/// More threads only wait for memory.
const MAX_THREADS: NonZeroUsize = NonZeroUsize::new(16).unwrap();

/// Notes of every page that is in use, of whatever class, whether it holds only zeroes
/// ([`PageState::is_zero`](sonicshot::PageState::is_zero)). Free and offline pages are not read.
///
/// Memory that the source knows to be zero ([`GuestMemory::next_data`]) is not touched.
///
/// # Errors
/// [`MemoryError`] if a page cannot be read: of the lowest one.
pub fn mark_zero_pages(
    memory: &dyn GuestMemory,
    map: &mut PageMap,
    options: &WorkOptions,
) -> Result<(), MemoryError> {
    let threads = of_these(threads(options.threads));
    let mut phase = begin(map, &options.progress);
    mark_on(threads, memory, map, &mut |bytes| phase.add(bytes))?;
    phase.end();
    Ok(())
}

/// The look at all pages of `map`, which begins.
fn begin<'a>(map: &PageMap, progress: &'a dyn Progress) -> PhaseProgress<'a> {
    let total = Tally::new(map.total()).times(map.page_size().bytes());
    PhaseProgress::begin(progress, WorkPhase::FindingZeroPages, total.get())
}

/// The number of threads that work where there are so many processors.
fn of_these(processors: NonZeroUsize) -> NonZeroUsize {
    processors.min(MAX_THREADS)
}

fn mark_on(
    threads: NonZeroUsize,
    memory: &dyn GuestMemory,
    map: &mut PageMap,
    done: &mut dyn FnMut(u64),
) -> Result<(), MemoryError> {
    let page_size = map.page_size();
    let read: ClassSet = PageClass::ALL.iter().copied().filter(is_read).collect();
    let done = |frames: u64| done(Tally::new(frames).times(page_size.bytes()).get());
    map.edit_told(threads, read, done, |start, pages| {
        let wanted: Vec<bool> = pages
            .iter()
            .map(|page| read.contains(page.class()))
            .collect();
        zero_frames(memory, page_size, start, &wanted, &mut |index| {
            if let Some(page) = pages.get_mut(index) {
                *page = page.with_zero();
            }
        })
    })
}

/// The number of pages in all RAM that hold only zeroes, whatever their use: as many as leaving out
/// zero pages alone would save.
///
/// # Errors
/// [`MemoryError`] if a page cannot be read.
pub fn count_zero_pages(
    memory: &dyn GuestMemory,
    map: &PageMap,
    options: &WorkOptions,
) -> Result<u64, MemoryError> {
    let zero = AtomicU64::new(0);
    let count = |wanted: &mut Vec<bool>, piece: PfnRange| {
        wanted.clear();
        for (run, class) in map.runs_in(piece) {
            let there = !matches!(class, PageClass::HwPoison | PageClass::Absent);
            wanted.extend(iter::repeat_n(there, to_usize(run.len())));
        }
        zero_frames(memory, map.page_size(), piece.start(), wanted, &mut |_| {
            zero.fetch_add(1, Ordering::Relaxed);
        })
    };
    let threads = of_these(threads(options.threads));
    let mut phase = begin(map, &options.progress);
    // Pieces are taken in their order.
    let piece = map.page_size().bytes() << PIECE;
    let done = |pieces: u64| phase.reach(Tally::new(pieces).times(piece).get());
    for_each_told(threads, map.pieces(PIECE), done, Vec::new, count)?;
    phase.end();
    Ok(zero.into_inner())
}

/// Whether a page of this class is looked at.
fn is_read(class: &PageClass) -> bool {
    !matches!(
        class,
        PageClass::FreeBuddy
            | PageClass::FreePcp
            | PageClass::Offline
            | PageClass::HwPoison
            | PageClass::Unaccepted
            | PageClass::Absent
    )
}

/// Calls `found` with the index of each wanted frame from `start` that holds only zeroes.
fn zero_frames(
    memory: &dyn GuestMemory,
    page_size: PageSize,
    start: Pfn,
    wanted: &[bool],
    found: &mut dyn FnMut(usize),
) -> Result<(), MemoryError> {
    let page = page_size.size();
    let by_reading = memory.prefers_read();
    let mut buffer = Vec::new();
    for (first, count) in wanted_runs(wanted, by_reading, WINDOW >> page_size.shift()) {
        let Some(wanted) = wanted.get(first..).and_then(|rest| rest.get(..count)) else {
            continue;
        };
        // The index of each, and where it is in the range.
        let frames = (first..).zip((0_usize..).step_by(page)).zip(wanted);
        let frames = frames.filter(|(_, wanted)| **wanted).map(|(at, _)| at);
        let range = start.checked_add(to_u64(first)).and_then(|pfn| {
            GpaRange::with_len(pfn.gpa(page_size)?, to_u64(count) << page_size.shift())
        });
        let Some(range) = range else { continue };
        // Frames known to be zero without reading.
        let data = memory
            .next_data(range.start())
            .map(|data| data.start())
            .filter(|data| *data < range.end());
        let Some(data) = data else {
            for (index, _) in frames {
                found(index);
            }
            continue;
        };
        let len = to_usize(range.len());
        let mapped = if by_reading {
            None
        } else {
            memory.map(range.start(), len)?
        };
        let bytes = if let Some(mapped) = &mapped {
            mapped.bytes()
        } else {
            buffer.resize(buffer.len().max(len), 0);
            let (buffer, _) = buffer.split_at_mut(len);
            match memory.read(range.start(), buffer) {
                // What is not wanted may not be there.
                Err(MemoryError::Absent { .. }) => {
                    read_each(memory, range.start(), page_size, wanted, buffer)?;
                }
                read => read?,
            }
            GuestBytes::from_slice(buffer)
        };
        let hole = data.offset_from(range.start()).map(to_usize);
        for (index, offset) in frames {
            let end = offset.checked_add(page);
            let in_hole = hole.zip(end).is_some_and(|(hole, end)| end <= hole);
            if in_hole || bytes.get(offset, page).is_some_and(|page| page.is_zero()) {
                found(index);
            }
        }
        if mapped.is_some() {
            drop(mapped);
            memory.release(range);
        }
    }
    Ok(())
}

/// Reads the wanted pages of a range one by one into their places in `buffer`.
fn read_each(
    memory: &dyn GuestMemory,
    start: Gpa,
    page_size: PageSize,
    wanted: &[bool],
    buffer: &mut [u8],
) -> Result<(), MemoryError> {
    let page = page_size.size();
    let places = (0_u64..)
        .step_by(page)
        .map_while(|offset| start.checked_add(offset))
        .zip(buffer.chunks_exact_mut(page));
    for ((at, place), _) in places.zip(wanted).filter(|(_, wanted)| **wanted) {
        memory.read(at, place)?;
    }
    Ok(())
}

/// The ranges to look at, first frame and number of frames, that hold all wanted ones: at
/// most `most` frames each. What is read costs by its length, what is mapped by the call.
fn wanted_runs(
    wanted: &[bool],
    by_reading: bool,
    most: u64,
) -> impl Iterator<Item = (usize, usize)> + '_ {
    /// Copying so many frames takes as long as another call.
    const GAP: usize = 2;
    let most = to_usize(most.max(1));
    let gap = if by_reading { GAP } else { most };
    let mut at = 0_usize;
    iter::from_fn(move || {
        let rest = wanted.get(at..)?;
        let before = rest.iter().position(|wanted| *wanted)?;
        let mut len = 0_usize;
        for (number, wanted) in rest.iter().skip(before).take(most).enumerate() {
            if number.checked_sub(len)? > gap {
                break;
            }
            if *wanted {
                len = number.checked_add(1)?;
            }
        }
        let first = at.checked_add(before)?;
        at = first.checked_add(len)?;
        Some((first, len))
    })
}

#[cfg(test)]
mod tests {
    use super::{count_zero_pages, mark_on, mark_zero_pages, of_these, wanted_runs};
    use proptest::prelude::*;
    use sonicshot::{
        Gpa, GpaRange, GuestMemory, MemoryError, PageClass, PageMap, PageSize, PageState, Pfn,
        PfnRange, RamLayout, WorkOptions,
    };
    use std::num::NonZeroUsize;

    const PAGE: u64 = 4096;

    /// Every third frame is not zero, and those from `bad` on cannot be read.
    struct Guest(RamLayout, u64);

    impl GuestMemory for Guest {
        fn layout(&self) -> &RamLayout {
            &self.0
        }

        fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
            let range = GpaRange::with_len(at, buf.len() as u64).unwrap();
            if range.end().raw() > self.1 * PAGE {
                return Err(MemoryError::Absent { range });
            }
            for (pfn, page) in (at.raw() / PAGE..).zip(buf.chunks_mut(4096)) {
                page.fill(u8::from(pfn.is_multiple_of(3)));
            }
            Ok(())
        }
    }

    #[test]
    fn any_number_of_threads_finds_the_same() {
        // Several pieces, the last one short.
        let frames = 5 * 8192 + 100;
        let layout = RamLayout::new(vec![GpaRange::new(Gpa::ZERO, Gpa::new(frames * PAGE))]);
        let layout = layout.unwrap();
        let mut fresh = PageMap::new(&layout, PageSize::SIZE_4K);
        fresh.set(
            PfnRange::new(Pfn::new(9000), Pfn::new(20_000)),
            PageClass::FreeBuddy,
        );
        let mark = |threads, bad| {
            let guest = Guest(layout.clone(), bad);
            let mut map = fresh.clone();
            let threads = NonZeroUsize::new(threads).unwrap();
            let mut told = 0;
            let done = mark_on(threads, &guest, &mut map, &mut |bytes| told += bytes);
            assert_eq!(told, frames * PAGE, "all frames are told of");
            done.map(|()| map).map_err(|error| error.to_string())
        };
        let one = mark(1, frames).unwrap();
        for threads in [2, 4, 9] {
            assert_eq!(mark(threads, frames).unwrap(), one);
            // The lowest that cannot be read is told of, whoever is first.
            for bad in [20_001, 30_000, frames - 1] {
                assert_eq!(mark(threads, bad).unwrap_err(), mark(1, bad).unwrap_err());
            }
        }
        for pfn in 0..frames {
            let free = (9000..20_000).contains(&pfn);
            let expected = match (free, pfn % 3) {
                (true, _) => PageClass::FreeBuddy.into(),
                (false, 0) => PageClass::Unknown.into(),
                (false, _) => PageState::new(PageClass::Unknown).with_zero(),
            };
            assert_eq!(one.state(Pfn::new(pfn)), Some(expected));
        }
        let options = WorkOptions::new();
        let zero = count_zero_pages(&Guest(layout.clone(), frames), &one, &options).unwrap();
        assert_eq!(zero, (0..frames).filter(|pfn| pfn % 3 != 0).count() as u64);
    }

    /// Pages that are not looked at may not be there.
    #[test]
    fn what_is_absent_between_pages_does_not_hide_them() {
        struct Holes(RamLayout);
        impl GuestMemory for Holes {
            fn layout(&self) -> &RamLayout {
                &self.0
            }
            fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
                let range = GpaRange::with_len(at, buf.len() as u64).unwrap();
                for pfn in range.whole_frames(PageSize::SIZE_4K).iter() {
                    if pfn.raw() % 4 == 3 {
                        return Err(MemoryError::Absent { range });
                    }
                }
                for (pfn, page) in (at.raw() / PAGE..).zip(buf.chunks_mut(4096)) {
                    page.fill(u8::from(pfn.is_multiple_of(2)));
                }
                Ok(())
            }
        }
        let layout = RamLayout::new(vec![GpaRange::new(Gpa::ZERO, Gpa::new(1000 * PAGE))]).unwrap();
        let mut map = PageMap::new(&layout, PageSize::SIZE_4K);
        for pfn in (3..1000).step_by(4) {
            map.set(
                PfnRange::with_len(Pfn::new(pfn), 1).unwrap(),
                PageClass::Absent,
            );
        }
        let guest = Holes(layout);
        let options = WorkOptions::new();
        mark_zero_pages(&guest, &mut map, &options).unwrap();
        for pfn in 0..1000 {
            let zero = map.state(Pfn::new(pfn)).unwrap().is_zero();
            assert_eq!(zero, pfn % 4 == 1, "{pfn}");
        }
        assert_eq!(count_zero_pages(&guest, &map, &options).unwrap(), 250);
    }

    proptest! {
        #[test]
        fn runs_hold_all_that_is_wanted_once(
            wanted in proptest::collection::vec(any::<bool>(), 0..200),
            by_reading in any::<bool>(),
            most in 1_u64..40,
        ) {
            let mut seen = vec![false; wanted.len()];
            let mut last = 0;
            for (first, count) in wanted_runs(&wanted, by_reading, most) {
                prop_assert!(first >= last && count > 0 && count as u64 <= most);
                prop_assert!(wanted[first] && wanted[first + count - 1]);
                seen[first..first + count].fill(true);
                last = first + count;
            }
            prop_assert!(wanted.iter().zip(&seen).all(|(wanted, seen)| !wanted || *seen));
        }
    }

    #[test]
    fn no_more_threads_than_a_bound_look_for_zeroes() {
        let number = |number| NonZeroUsize::new(number).unwrap();
        for (all, used) in [(1, 1), (16, 16), (17, 16), (4096, 16)] {
            assert_eq!(of_these(number(all)), number(used));
        }
    }
}
