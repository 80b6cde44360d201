//! What must hold of a guest and a file before anything is dropped, and what is kept because it
//! may not.

use crate::error::OfflineError;
use crate::place::Doubts;
use sonicshot::{GpaRange, GuestMemory, PageClass, PageMap, PageSize, PfnRange};
use sonicshot_dump::Dump;
use sonicshot_vmi::Analysis;
use std::ops::Range;
use std::path::Path;

/// Refuses a raw file that has a hole where the guest has a page full of its `struct page`s. Each
/// of those says which frame of which zone it is and how it is used, and no page of them was ever
/// seen to be zero; but in a diff snapshot that is taken for a whole one, what did not change is
/// missing.
pub(crate) fn check_whole(
    path: &Path,
    dump: &Dump,
    struct_pages: &[GpaRange],
) -> Result<(), OfflineError> {
    for range in struct_pages {
        for page in range.whole_frames(PageSize::SIZE_4K).iter() {
            let (Some(at), Some(end)) = (
                page.gpa(PageSize::SIZE_4K),
                page.checked_add(1)
                    .and_then(|next| next.gpa(PageSize::SIZE_4K)),
            ) else {
                continue;
            };
            if dump.next_data(at).is_none_or(|data| data.start() >= end) {
                let path = path.into();
                return Err(OfflineError::NotWhole { path, at });
            }
        }
    }
    Ok(())
}

/// Keeps what the doubts about its place forbid to drop, and what the format cannot be without.
pub(crate) fn keep_what_is_in_doubt(analysis: &mut Analysis, dump: &Dump, doubts: &Doubts) {
    keep_what_is_not_free_in_all(analysis, &doubts.shared);
    let page_size = analysis.pages().page_size();
    for range in &doubts.unconfirmed {
        analysis.keep(range.whole_frames(page_size));
    }
    keep_what_must_stay(analysis, dump);
}

/// Keeps what the format cannot be without.
fn keep_what_must_stay(analysis: &mut Analysis, dump: &Dump) {
    if !dump.is_xl() {
        return;
    }
    let mut map = analysis.pages().clone();
    dump.keep_what_must_stay(&mut map);
    for (frames, class) in map.runs() {
        if class == PageClass::Unknown {
            analysis.keep(frames);
        }
    }
}

/// Where blocks of one length may lie in each other's place, keeps what is not free in all of the
/// places: so nothing is dropped that is in use, whichever block is where.
fn keep_what_is_not_free_in_all(analysis: &mut Analysis, shared: &[Vec<GpaRange>]) {
    let page_size = analysis.pages().page_size();
    for ranges in shared {
        let places: Vec<PfnRange> = ranges.iter().map(|r| r.whole_frames(page_size)).collect();
        for number in not_free_in_all(analysis.pages(), &places) {
            for place in &places {
                let first = place.start().checked_add(number.start);
                let end = place.start().checked_add(number.end);
                if let (Some(first), Some(end)) = (first, end) {
                    analysis.keep(PfnRange::new(first, end));
                }
            }
        }
    }
}

/// Of `places`, which are all of one length, the frames by their number in each that are not free
/// in all of them.
fn not_free_in_all(map: &PageMap, places: &[PfnRange]) -> Vec<Range<u64>> {
    let len = places.iter().map(PfnRange::len).max().unwrap_or(0);
    let mut kept: Vec<Range<u64>> = Vec::new();
    for number in 0..len {
        let is_free = |place: &PfnRange| {
            let pfn = place.start().checked_add(number);
            let pfn = pfn.filter(|pfn| place.contains(*pfn));
            pfn.and_then(|pfn| map.class(pfn))
                .is_some_and(|class| FREE.contains(&class))
        };
        if places.iter().all(is_free) {
            continue;
        }
        let next = number.saturating_add(1);
        match kept.last_mut() {
            Some(last) if last.end == number => last.end = next,
            _ => kept.push(number..next),
        }
    }
    kept
}

/// What says of a page that the guest does not use it, whatever it holds.
const FREE: [PageClass; 3] = [PageClass::FreeBuddy, PageClass::FreePcp, PageClass::Offline];

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::indexing_slicing,
        reason = "tests may stop anywhere"
    )]

    use super::not_free_in_all;
    use sonicshot::{Gpa, GpaRange, PageClass, PageMap, PageSize, Pfn, PfnRange, RamLayout};

    fn range(start: u64, end: u64) -> GpaRange {
        GpaRange::new(Gpa::new(start), Gpa::new(end))
    }

    #[test]
    fn of_blocks_in_any_order_only_what_is_free_in_all_is_dropped() {
        use PageClass::{Anonymous, FreeBuddy, FreePcp, Kernel, Offline, Unknown};
        let first = [FreeBuddy, FreeBuddy, Kernel, Anonymous, FreePcp, Offline];
        let second = [FreeBuddy, Kernel, FreePcp, Anonymous, FreeBuddy, FreeBuddy];
        let layout = RamLayout::new(vec![range(0, 0x6000), range(0x10_0000, 0x10_6000)]).unwrap();
        let mut map = PageMap::new(&layout, PageSize::SIZE_4K);
        for (start, classes) in [(0, first), (0x100, second)] {
            for (pfn, class) in (start..).zip(classes) {
                map.set(PfnRange::with_len(Pfn::new(pfn), 1).unwrap(), class);
            }
        }
        let places: Vec<PfnRange> = [0, 0x100]
            .map(|start| PfnRange::with_len(Pfn::new(start), 6).unwrap())
            .into();
        // As `Analysis::keep` does.
        for number in not_free_in_all(&map, &places) {
            for place in &places {
                for pfn in number
                    .clone()
                    .map(|n| place.start().checked_add(n).unwrap())
                {
                    if map.class(pfn).unwrap().may_be_dropped() {
                        map.set(PfnRange::with_len(pfn, 1).unwrap(), Unknown);
                    }
                }
            }
        }
        let classes = |start| (start..start + 6).map(|pfn| map.class(Pfn::new(pfn)).unwrap());
        let kept = [FreeBuddy, Unknown, Kernel, Unknown, FreePcp, Offline];
        assert!(classes(0).eq(kept));
        let kept = [FreeBuddy, Kernel, Unknown, Unknown, FreeBuddy, FreeBuddy];
        assert!(classes(0x100).eq(kept));
    }
}
