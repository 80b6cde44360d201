//! Ranges of a virtual machine's memory, and which of their pages are no longer the source's.

use super::kept_map::Map;
use crate::address::HostAddress;
use crate::error::ServeError;
use crate::uffd::{Kind, Registered, Uffd};
use core::sync::atomic::{AtomicU64, Ordering};
use sonicshot::{Gpa, GpaRange, RamLayout, to_u64, to_usize};
use std::sync::Arc;

/// A range of guest memory in the address space whose faults are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmRegion {
    pub(crate) guest: GpaRange,
    pub(crate) host: HostAddress,
    pub(crate) page: u64,
}

impl VmRegion {
    /// The guest memory `guest`, which is in `memory` from `offset` bytes on. `page` is the size of
    /// the pages behind it, in bytes: that of huge pages, or any if they are not huge.
    ///
    /// # Errors
    /// [`ServeError::NotRegistered`] if it is not all in `memory`.
    pub fn new(
        memory: &Registered,
        offset: u64,
        guest: GpaRange,
        page: u64,
    ) -> Result<Self, ServeError> {
        let host = memory.at(offset, guest.len());
        let host = host.ok_or(ServeError::NotRegistered {
            offset,
            len: guest.len(),
            registered: memory.len(),
        })?;
        Ok(Self { guest, host, page })
    }

    /// The guest memory that is there.
    #[must_use]
    pub const fn guest(&self) -> GpaRange {
        self.guest
    }

    /// Its start in the host.
    #[must_use]
    pub const fn host(&self) -> HostAddress {
        self.host
    }

    /// The size of the pages behind it, in bytes, as it was said.
    #[must_use]
    pub const fn page(&self) -> u64 {
        self.page
    }
}

/// The smallest and the largest page that is served.
pub(crate) const MIN_PAGE: u64 = 4096;
pub(crate) const MAX_PAGE: u64 = 32 << 20;

/// A bit for each page, in words of 64. One thread uses it.
#[derive(Debug)]
enum Bits {
    Own(Vec<AtomicU64>),
    /// So many words from one on, in what another server may go on with.
    Kept(Arc<Map>, usize, usize),
}

impl Bits {
    fn words(&self) -> &[AtomicU64] {
        match self {
            Self::Own(words) => words,
            Self::Kept(map, from, len) => {
                let end = from.checked_add(*len);
                let words = end.and_then(|end| map.words().get(*from..end));
                words.unwrap_or(&[])
            }
        }
    }
}

#[derive(Debug)]
pub(crate) struct Region {
    pub guest: GpaRange,
    pub start: u64,
    pub end: u64,
    pub page: u64,
    pub kind: Kind,
    shift: u32,
    /// A bit for each page that the source must not be asked for any more: it was put in place,
    /// or it was given back. If it is missing, it is zero.
    touched: Bits,
    /// The first page that was there before it was put in place.
    pub occupied: Option<u64>,
}

impl Region {
    /// A range that `uffd` serves, after a look at whether it can be.
    pub fn new(at: VmRegion, layout: &RamLayout, uffd: &Uffd) -> Result<Self, ServeError> {
        let (start, len) = (at.host.raw(), at.guest.len());
        let said = at.page;
        if !said.is_power_of_two() || !(MIN_PAGE..=MAX_PAGE).contains(&said) {
            return Err(ServeError::PageSize {
                at: at.host,
                found: said,
                min: MIN_PAGE,
                max: MAX_PAGE,
            });
        }
        if !layout.contains(at.guest.start(), len) || len == 0 {
            return Err(ServeError::NotInLayout {
                what: "address",
                at: at.guest.start().raw(),
                len,
            });
        }
        let unaligned = |page| ServeError::Unaligned {
            at: at.host,
            len,
            page,
        };
        let end = start.checked_add(len).ok_or_else(|| unaligned(said))?;
        let whole = |page: u64| {
            start.is_multiple_of(page)
                && len.is_multiple_of(page)
                && at.guest.start().raw().is_multiple_of(MIN_PAGE)
        };
        if !whole(said) {
            return Err(unaligned(said));
        }
        let kind = uffd.prove(start, len)?;
        let system = to_u64(rustix::param::page_size());
        // Of memory whose pages are not huge, each can be given back by itself, whatever was said.
        let page = match kind {
            Kind::Small => system,
            Kind::Huge if said > system && uffd.is_whole(start, said) => said,
            Kind::Huge => {
                return Err(ServeError::PageKind { at: at.host, said });
            }
        };
        if !whole(page) {
            return Err(unaligned(page));
        }
        let shift = page.trailing_zeros();
        let words = (len >> shift).div_ceil(64);
        let words = usize::try_from(words).map_err(|_| unaligned(page))?;
        let mut touched = Vec::new();
        touched.resize_with(words, AtomicU64::default);
        Ok(Self {
            guest: at.guest,
            start,
            end,
            page,
            kind,
            shift,
            touched: Bits::Own(touched),
            occupied: None,
        })
    }

    /// All of them, in the order of their host addresses; refused if two have memory in common.
    pub fn all(
        regions: &[VmRegion],
        layout: &RamLayout,
        uffd: &Uffd,
    ) -> Result<Vec<Self>, ServeError> {
        check_disjoint(regions)?;
        let all = regions.iter().map(|at| Self::new(*at, layout, uffd));
        let mut all = all.collect::<Result<Vec<_>, _>>()?;
        all.sort_by_key(|region| region.start);
        Ok(all)
    }

    pub fn has(&self, host: u64) -> bool {
        self.start <= host && host < self.end
    }

    /// The start of the page with this address; the address is in the region.
    pub fn page_of(&self, host: u64) -> u64 {
        host >> self.shift << self.shift
    }

    /// The guest address of a host address.
    pub fn gpa(&self, host: u64) -> Option<Gpa> {
        self.guest
            .start()
            .checked_add(host.checked_sub(self.start)?)
    }

    /// The host address of guest memory of this region, its end included.
    pub fn host(&self, at: Gpa) -> Option<u64> {
        self.start
            .checked_add(at.offset_from(self.guest.start())?)
            .filter(|host| *host <= self.end)
    }

    /// The number of the page with this address, which is in the region or its end.
    fn number(&self, host: u64) -> Option<u64> {
        Some(host.checked_sub(self.start)? >> self.shift)
    }

    pub fn is_touched(&self, host: u64) -> bool {
        // What is not known is not asked for.
        let Some(number) = self.number(host) else {
            return true;
        };
        let word = usize::try_from(number >> 6).ok();
        let word = word.and_then(|word| self.touched.words().get(word));
        word.is_none_or(|word| word.load(Ordering::Relaxed) & (1 << (number & 63)) != 0)
    }

    /// The number of words of its bits.
    pub fn words(&self) -> usize {
        self.touched.words().len()
    }

    /// Has the bits in `map`, where those of this region begin at the word `at`, as they are there.
    pub fn keep(&mut self, map: Arc<Map>, at: usize) {
        self.touched = Bits::Kept(map, at, self.words());
    }

    /// Whether the source will not be asked for any page any more.
    pub fn is_all_touched(&self) -> bool {
        let words = self.touched.words().iter();
        let set = words.map(|word| u64::from(word.load(Ordering::Relaxed).count_ones()));
        set.sum::<u64>() == self.guest.len() >> self.shift
    }

    /// Marks what was given back. Returns how many bytes of it are here.
    ///
    /// The kernel gives back whole pages: if these are no such, the size that was said was wrong,
    /// and what was given back cannot be told from what was not.
    pub fn give_back(&mut self, start: u64, end: u64) -> Result<u64, ServeError> {
        let (first, last) = (start.max(self.start), end.min(self.end));
        if first >= last {
            return Ok(0);
        }
        // The region is whole pages, from its start on.
        if !first.is_multiple_of(self.page) || !last.is_multiple_of(self.page) {
            return Err(ServeError::PageKind {
                at: HostAddress::new(self.start),
                said: self.page,
            });
        }
        Ok(self.touch(first, last))
    }

    /// Marks the pages that are whole in the range. Returns how many bytes of it are here.
    pub fn touch(&mut self, start: u64, end: u64) -> u64 {
        let start = start.max(self.start);
        let end = end.min(self.end);
        if start >= end {
            return 0;
        }
        let whole = start.checked_next_multiple_of(self.page);
        let first = whole.and_then(|start| self.number(start));
        let Some((first, last)) = first.zip(self.number(end)) else {
            return 0;
        };
        let Some(count) = last.checked_sub(first) else {
            return 0;
        };
        let words = self.touched.words();
        // Of each word the bits from the first on, and up to the last.
        for index in first >> 6..last.div_ceil(64) {
            let bits = |number: u64, of: u64| match number >> 6 == of {
                true => u64::MAX << (number & 63),
                false if number >> 6 < of => u64::MAX,
                false => 0,
            };
            let mask = bits(first, index) & !bits(last, index);
            if let Some(word) = words.get(to_usize(index)) {
                // Nobody else writes to it.
                word.store(word.load(Ordering::Relaxed) | mask, Ordering::Relaxed);
            }
        }
        count << self.shift
    }

    /// The same of `len` bytes.
    pub fn touch_len(&mut self, start: u64, len: u64) -> u64 {
        match start.checked_add(len) {
            Some(end) => self.touch(start, end),
            None => 0,
        }
    }
}

/// Refuses regions of which two have an address in common. A page of the guest that is in two
/// places could be given back in one and brought in again in the other.
pub(crate) fn check_disjoint(regions: &[VmRegion]) -> Result<(), ServeError> {
    let host = |region: &VmRegion| (region.host.raw(), region.guest.len());
    let guest = |region: &VmRegion| (region.guest.start().raw(), region.guest.len());
    for (in_guest, mut ranges) in [
        (false, regions.iter().map(host).collect::<Vec<_>>()),
        (true, regions.iter().map(guest).collect()),
    ] {
        ranges.sort_unstable();
        for pair in ranges.windows(2) {
            if let [(start, len), (next, _)] = pair
                && next.checked_sub(*start).is_some_and(|gap| gap < *len)
            {
                return Err(ServeError::Overlap {
                    in_guest,
                    at: *next,
                });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(pages: u64, page: u64) -> Region {
        let len = pages * page;
        Region {
            guest: GpaRange::with_len(Gpa::new(1 << 30), len).unwrap(),
            start: 64 << 20,
            end: (64 << 20) + len,
            page,
            kind: Kind::Small,
            shift: page.trailing_zeros(),
            touched: Bits::Own((0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect()),
            occupied: None,
        }
    }

    #[test]
    fn whole_pages_are_marked_and_no_others() {
        for page in [4096, 2 << 20] {
            for (from, to) in [(0, 1), (3, 64), (63, 65), (64, 128), (1, 200), (0, 200)] {
                for (before, after) in [(0, 0), (1, 1), (page - 1, page - 1)] {
                    let mut region = region(200, page);
                    let base = region.start;
                    // Parts of a page on both sides are not whole.
                    let start = (base + from * page).saturating_sub(before);
                    let end = base + to * page + after;
                    let bytes = region.touch(start, end);
                    assert_eq!(bytes, (to - from) * page);
                    for number in 0..200 {
                        let touched = region.is_touched(base + number * page);
                        assert_eq!(touched, (from..to).contains(&number), "{number}");
                    }
                }
            }
        }
        let mut pages = region(8, 2 << 20);
        let base = pages.start;
        assert_eq!(pages.give_back(0, base + (4 << 20)).unwrap(), 4 << 20);
        assert_eq!(pages.give_back(0, base).unwrap(), 0);
        let error = pages.give_back(base + 4096, base + (2 << 20)).unwrap_err();
        assert!(matches!(error, ServeError::PageKind { .. }), "{error:?}");
        assert!(pages.give_back(base, base + (3 << 20)).is_err());
        let mut region = region(4, 4096);
        assert_eq!(region.touch(0, region.start), 0);
        assert_eq!(region.touch(0, u64::MAX), 4 * 4096);
        // What is not there is not asked for.
        assert!(region.is_touched(region.start + (64 << 12)));
    }
}
