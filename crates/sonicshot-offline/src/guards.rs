//! What must hold of a guest and a file before anything is dropped, and what is kept because it
//! may not.

use crate::error::OfflineError;
use crate::note::Note;
use crate::place::Doubts;
use sonicshot::{GpaRange, GuestMemory, PageClass, PageMap, PageSize, PfnRange};
use sonicshot_dump::Dump;
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
pub(crate) fn keep_what_is_in_doubt(map: &mut PageMap, dump: &Dump, doubts: &Doubts) -> Vec<Note> {
    keep_what_is_not_free_in_all(map, &doubts.shared);
    let page_size = map.page_size();
    for range in &doubts.unconfirmed {
        keep(map, range.whole_frames(page_size));
    }
    dump.keep_what_must_stay(map);
    let unconfirmed = doubts.unconfirmed.iter();
    unconfirmed
        .map(|range| Note::Unconfirmed { range: *range })
        .collect()
}

/// Keeps all of `frames`.
fn keep(map: &mut PageMap, frames: PfnRange) {
    map.with_slices(frames, |_, classes| {
        for class in classes.iter_mut().filter(|class| class.may_be_dropped()) {
            *class = PageClass::Unknown;
        }
    });
}

/// Where blocks of one length may lie in each other's place, keeps what is not free in all of the
/// places: so nothing is dropped that is in use, whichever block is where.
fn keep_what_is_not_free_in_all(map: &mut PageMap, shared: &[Vec<GpaRange>]) {
    let page_size = map.page_size();
    for ranges in shared {
        let mut free: Vec<bool> = Vec::new();
        let frames = || ranges.iter().map(|range| range.whole_frames(page_size));
        for (number, frames) in frames().enumerate() {
            free.resize(usize::try_from(frames.len()).unwrap_or(0), number == 0);
            let mut seen = free.iter_mut();
            map.with_slices(frames, |_, classes| {
                for (class, free) in classes.iter().zip(&mut seen) {
                    *free &= DROPPED.contains(class);
                }
            });
            seen.for_each(|free| *free = false);
        }
        for frames in frames() {
            let mut free = free.iter();
            map.with_slices(frames, |_, classes| {
                for (class, free) in classes.iter_mut().zip(&mut free) {
                    if !free && class.may_be_dropped() {
                        *class = PageClass::Unknown;
                    }
                }
            });
        }
    }
}

/// What says of a page that the guest does not use it, whatever it holds.
const DROPPED: [PageClass; 3] = [PageClass::FreeBuddy, PageClass::FreePcp, PageClass::Offline];

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::indexing_slicing,
        reason = "tests may stop anywhere"
    )]

    use super::keep_what_is_not_free_in_all;
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
        keep_what_is_not_free_in_all(&mut map, &[layout.regions().to_vec()]);
        let classes = |start| (start..start + 6).map(|pfn| map.class(Pfn::new(pfn)).unwrap());
        let kept = [FreeBuddy, Unknown, Kernel, Unknown, FreePcp, Offline];
        assert!(classes(0).eq(kept));
        let kept = [FreeBuddy, Kernel, Unknown, Unknown, FreeBuddy, FreeBuddy];
        assert!(classes(0x100).eq(kept));
    }
}
