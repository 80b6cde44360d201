//! The search of all RAM for pages that begin with a text.

use crate::arch::{MIN_PAGE, MIN_PAGE_MASK};
use sonicshot::{
    Gpa, GpaRange, GuestBytes, GuestMemory, MemoryError, PageSize, PhaseProgress, Progress,
    WorkPhase, to_u64,
};

/// The most bytes that are mapped at a time while searching.
const WINDOW: u64 = 2 << 20;
const _: () = assert!(WINDOW.is_power_of_two());

/// The windows of all RAM, in the order in which the kernel's early allocations are likely to
/// be met: first the top of memory (of a paravirtualised guest the bottom, behind its image, and
/// then the top), then from both ends of every region inwards.
fn windows(memory: &dyn GuestMemory) -> impl Iterator<Item = GpaRange> + '_ {
    /// So many from the top, and from the bottom: 128 MiB.
    const FIRST: u64 = 64;
    let regions = memory.layout().regions();
    let paravirtualised = memory.p2m().is_some();
    // The numbers of the windows of a region: the bottom that is first, what is left, and the top.
    let parts = move |region: &GpaRange| {
        let first = region.start().raw() / WINDOW;
        let behind = region.end().raw().div_ceil(WINDOW);
        let is_last = regions.last() == Some(region);
        let top = behind.checked_sub(FIRST).filter(|top| *top > first);
        let above = if is_last {
            top.unwrap_or(first)
        } else {
            behind
        };
        let is_bottom = regions.first() == Some(region) && paravirtualised;
        let bottom = first.checked_add(FIRST).filter(|bottom| *bottom < above);
        let below = if is_bottom {
            bottom.unwrap_or(above)
        } else {
            first
        };
        [first..below, below..above, above..behind]
    };
    let window = |region: &GpaRange, number: u64| {
        let start = Gpa::new(number.checked_mul(WINDOW)?);
        // The last of all numbers ends with them.
        let whole = GpaRange::with_len(start, WINDOW);
        Some(whole.map_or(GpaRange::new(start, region.end()), |whole| {
            whole.intersection(region)
        }))
    };
    let bottom = regions.first().into_iter().flat_map(move |region| {
        let [bottom, ..] = parts(region);
        bottom.filter_map(move |number| window(region, number))
    });
    let top = regions.last().into_iter().flat_map(move |region| {
        let [.., top] = parts(region);
        top.rev().filter_map(move |number| window(region, number))
    });
    // From both ends of each, in turn.
    let mut inner: Vec<_> = regions
        .iter()
        .map(|region| {
            let [_, inner, _] = parts(region);
            (region, inner)
        })
        .collect();
    let inwards = core::iter::from_fn(move || {
        let mut ends = Vec::new();
        for (region, left) in &mut inner {
            let both = [left.next_back(), left.next()];
            let numbers = both.into_iter().flatten();
            ends.extend(numbers.filter_map(|number| window(region, number)));
        }
        (!ends.is_empty()).then_some(ends)
    });
    bottom.chain(top).chain(inwards.flatten())
}

/// Calls `visit` with each page that begins with `magic`, until it returns `false`; `progress` is
/// told how far it is.
pub(super) fn search(
    memory: &dyn GuestMemory,
    progress: &dyn Progress,
    magic: &[u8; 10],
    visit: &mut dyn FnMut(Gpa) -> bool,
) -> Result<(), MemoryError> {
    let [a, b, c, d, e, f, g, h, tail @ ..] = *magic;
    let first = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
    let second = u16::from_le_bytes(tail);
    let mut buffer = Vec::new();
    let total = memory.layout().bytes();
    let mut phase = PhaseProgress::begin(progress, WorkPhase::FindingKernel, total);
    for window in windows(memory) {
        phase.add(window.len());
        let start = window.start();
        let is_data = memory
            .next_data(start)
            .is_some_and(|data| data.start() < window.end());
        if !is_data {
            continue;
        }
        let Ok(len) = usize::try_from(window.len()) else {
            continue;
        };
        // Of each page a few bytes are looked at: even of a file that is quicker read than mapped
        // they are quicker seen than copied with all the rest.
        buffer.resize(len, 0);
        let is_read = memory.read_once(start, &mut buffer)?;
        let mapped = if is_read {
            None
        } else {
            memory.map(start, len)?
        };
        let bytes = if let Some(mapped) = &mapped {
            mapped.bytes()
        } else {
            if !is_read && memory.read(start, &mut buffer).is_err() {
                // A dump may lack pages; VMCOREINFO is then in another one or nowhere.
                continue;
            }
            GuestBytes::from_slice(&buffer)
        };
        // Page-aligned in the guest; a region may begin anywhere.
        let skew = PageSize::SIZE_4K.left_in_page(start.raw()) & MIN_PAGE_MASK;
        let Ok(skew) = usize::try_from(skew) else {
            continue;
        };
        for offset in (skew..len).step_by(MIN_PAGE) {
            if bytes.u64_at(offset) == Some(first)
                && offset.checked_add(8).and_then(|at| bytes.u16_at(at)) == Some(second)
            {
                let at = start.checked_add(to_u64(offset));
                if !at.is_none_or(&mut *visit) {
                    phase.end();
                    return Ok(());
                }
            }
        }
        drop(mapped);
        memory.release(window);
    }
    phase.end();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{WINDOW, windows};
    use proptest::prelude::*;
    use sonicshot::{Gpa, GpaRange, GuestMemory, MemoryError, P2m, RamLayout};

    struct Nothing(RamLayout, Option<P2m>);

    impl GuestMemory for Nothing {
        fn layout(&self) -> &RamLayout {
            &self.0
        }
        fn read(&self, _: Gpa, _: &mut [u8]) -> Result<(), MemoryError> {
            Ok(())
        }
        fn p2m(&self) -> Option<&P2m> {
            self.1.as_ref()
        }
    }

    proptest! {
        #[test]
        fn windows_cover_all_ram_once(
            regions in proptest::collection::vec((1_u64..9, 1_u64..0x2000_0000), 1..4),
            paravirtualised: bool,
        ) {
            let mut at = 0;
            let ranges = regions.into_iter().map(|(gap, len)| {
                let range = GpaRange::with_len(Gpa::new(at + gap * 0x3_1000), len).unwrap();
                at = range.end().raw();
                range
            }).collect();
            let p2m = paravirtualised.then(|| P2m::new([]).unwrap());
            let memory = Nothing(RamLayout::new(ranges).unwrap(), p2m);
            let mut all: Vec<_> = windows(&memory).collect();
            prop_assert!(all.iter().all(|window| !window.is_empty() && window.len() <= WINDOW));
            all.sort();
            let joined = RamLayout::new(all).unwrap();
            prop_assert_eq!(joined.regions(), memory.0.regions());
        }
    }
}
