//! The search of all RAM for pages that begin with a text.

use crate::arch::{MIN_PAGE, MIN_PAGE_MASK};
use sonicshot::{Gpa, GpaRange, GuestBytes, GuestMemory, MemoryError};

/// How much is mapped at a time while searching.
const WINDOW: u64 = 2 << 20;
const _: () = assert!(WINDOW.is_power_of_two());

/// The windows of all RAM, in the order in which the kernel's early allocations are likely to
/// be met: first the top of memory (of a paravirtualised guest the bottom, behind its image, and
/// then the top), then from both ends of every region inwards.
fn windows(memory: &dyn GuestMemory) -> impl Iterator<Item = GpaRange> + '_ {
    /// So many from the top, and from the bottom: 128 MiB.
    const FIRST: u64 = 64;
    let regions = memory.layout().regions();
    let last = regions.len().saturating_sub(1);
    let paravirtualised = memory.p2m().is_some();
    let parts = move |number: usize, region: &GpaRange| {
        let first = region.start().raw() & !(WINDOW - 1);
        let count = region.end().raw().saturating_sub(first).div_ceil(WINDOW);
        let top = if number == last { count.min(FIRST) } else { 0 };
        let above = count.saturating_sub(top);
        let bottom = number == 0 && paravirtualised;
        let below = if bottom { above.min(FIRST) } else { 0 };
        (first, below, above, count)
    };
    let window = |region: &GpaRange, first: u64, index: u64| {
        let start = first.saturating_add(index.saturating_mul(WINDOW));
        let end = start.saturating_add(WINDOW);
        GpaRange::new(Gpa::new(start), Gpa::new(end)).intersection(region)
    };
    let bottom = regions.first().into_iter().flat_map(move |region| {
        let (first, below, ..) = parts(0, region);
        (0..below).map(move |index| window(region, first, index))
    });
    let top = regions.last().into_iter().flat_map(move |region| {
        let (first, _, above, count) = parts(last, region);
        (above..count)
            .rev()
            .map(move |index| window(region, first, index))
    });
    let numbered = || regions.iter().enumerate();
    let length = move |(number, region)| {
        let (_, below, above, _) = parts(number, region);
        above.saturating_sub(below)
    };
    let most = numbered().map(length).max().unwrap_or(0);
    let inwards = (0..most.div_ceil(2)).flat_map(move |step| {
        numbered().flat_map(move |(number, region)| {
            let (first, below, above, _) = parts(number, region);
            let count = above.saturating_sub(below);
            let low = (step < count.div_ceil(2)).then_some(step);
            let high = count
                .checked_sub(step.saturating_add(1))
                .filter(|high| *high >= count.div_ceil(2));
            [high, low]
                .into_iter()
                .flatten()
                .map(move |index| window(region, first, below.saturating_add(index)))
        })
    });
    bottom.chain(top).chain(inwards)
}

/// Calls `visit` with each page that begins with `magic`, until it returns `false`.
pub(super) fn search(
    memory: &dyn GuestMemory,
    magic: &[u8; 10],
    visit: &mut dyn FnMut(Gpa) -> bool,
) -> Result<(), MemoryError> {
    let [a, b, c, d, e, f, g, h, tail @ ..] = *magic;
    let first = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
    let second = u16::from_le_bytes(tail);
    let mut buffer = Vec::new();
    for window in windows(memory) {
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
        let mapped = memory.map(start, len)?;
        let bytes = if let Some(mapped) = &mapped {
            mapped.bytes()
        } else {
            buffer.resize(len, 0);
            if memory.read(start, &mut buffer).is_err() {
                // A dump may lack pages; VMCOREINFO is then in another one or nowhere.
                continue;
            }
            GuestBytes::from_slice(&buffer)
        };
        // Page-aligned in the guest; a region may begin anywhere.
        let skew = start.raw().wrapping_neg() & MIN_PAGE_MASK;
        let Ok(skew) = usize::try_from(skew) else {
            continue;
        };
        for offset in (skew..len).step_by(MIN_PAGE) {
            if bytes.u64_at(offset) == Some(first)
                && bytes.u16_at(offset.saturating_add(8)) == Some(second)
            {
                let at = start.checked_add(offset as u64);
                if !at.is_none_or(&mut *visit) {
                    return Ok(());
                }
            }
        }
        drop(mapped);
        memory.release(window);
    }
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
