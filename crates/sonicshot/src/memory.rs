//! Guest-physical memory, whoever owns it.

use crate::to_u64;
use crate::{Gpa, GpaRange, GuestBytes, P2m, PageSize, Pfn, PfnRange, Processors, Stopped};
use std::error::Error;
use std::fmt;
use std::io;

/// Longest range that a caller may ask [`GuestMemory::map`] for: 16 MiB.
///
/// Owners that must set up a mapping (Xen) need a bound on what is mapped at a time.
pub const MAX_MAP: usize = 16 << 20;

/// An error of reading guest memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// Part of the range is not RAM in the guest's layout.
    #[error("no guest RAM at {range}")]
    NotRam {
        /// The range that was asked for.
        range: GpaRange,
    },
    /// The range is RAM, but the dump holds no data for it.
    #[error("the dump holds no data for guest RAM at {range}")]
    Absent {
        /// The range that was asked for.
        range: GpaRange,
    },
    /// The operating system refused to read.
    #[error("reading guest RAM at {range}")]
    Io {
        /// The range that was asked for.
        range: GpaRange,
        /// The operating system's error.
        #[source]
        source: io::Error,
    },
    /// The work that reads it is to end.
    #[error("reading guest RAM at {range} was ended")]
    Stopped {
        /// The range that was asked for.
        range: GpaRange,
        /// By what.
        #[source]
        source: Stopped,
    },
    /// The owner of the memory failed in its own way.
    #[error("reading guest RAM at {range}")]
    Backend {
        /// The range that was asked for.
        range: GpaRange,
        /// The owner's own error.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
}

/// The reason that a RAM layout is invalid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// Two RAM ranges cover the same address.
    #[error("RAM ranges {first} and {second} overlap")]
    Overlap {
        /// The lower one.
        first: GpaRange,
        /// The upper one.
        second: GpaRange,
    },
    /// A RAM range goes beyond 64 bits.
    #[error("RAM of {len} bytes from {start} goes beyond 64 bits")]
    Wraps {
        /// Its start.
        start: Gpa,
        /// Its length in bytes.
        len: u64,
    },
    /// There is no RAM at all.
    #[error("the layout has no RAM")]
    Empty,
}

/// The guest-physical addresses that are RAM: sorted, disjoint ranges with holes between.
///
/// ```
/// use sonicshot::{Gpa, GpaRange, RamLayout};
/// let gib = |n: u64| Gpa::new(n << 30);
/// // A 4 GiB `pc` guest: the PCI hole splits RAM at 3 GiB.
/// let layout = RamLayout::new(vec![
///     GpaRange::new(gib(4), gib(5)),
///     GpaRange::new(gib(0), gib(3)),
/// ])?;
/// assert_eq!(layout.bytes(), 4 << 30);
/// assert!(layout.region_of(gib(3)).is_none());
/// # Ok::<(), sonicshot::LayoutError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamLayout {
    regions: Vec<GpaRange>,
}

impl RamLayout {
    /// Makes a layout of `regions`, in any order; neighbours that touch are joined.
    ///
    /// # Errors
    /// [`LayoutError`] if ranges overlap or nothing is left.
    pub fn new(mut regions: Vec<GpaRange>) -> Result<Self, LayoutError> {
        regions.retain(|r| !r.is_empty());
        regions.sort_unstable();
        let mut joined: Vec<GpaRange> = Vec::with_capacity(regions.len());
        for next in regions {
            match joined.last_mut() {
                Some(last) if next.start() < last.end() => {
                    return Err(LayoutError::Overlap {
                        first: *last,
                        second: next,
                    });
                }
                Some(last) if next.start() == last.end() => {
                    *last = GpaRange::new(last.start(), next.end());
                }
                _ => joined.push(next),
            }
        }
        if joined.is_empty() {
            return Err(LayoutError::Empty);
        }
        Ok(Self { regions: joined })
    }

    /// The RAM ranges, lowest first.
    #[must_use]
    pub fn regions(&self) -> &[GpaRange] {
        &self.regions
    }

    /// The size of RAM, in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        GpaRange::total_of(&self.regions)
    }

    /// The first address above all RAM.
    #[must_use]
    pub fn end(&self) -> Gpa {
        self.regions.last().map_or(Gpa::ZERO, GpaRange::end)
    }

    /// The RAM range that `at` lies in.
    #[must_use]
    pub fn region_of(&self, at: Gpa) -> Option<&GpaRange> {
        let above = self.regions.partition_point(|r| r.start() <= at);
        self.regions
            .get(above.checked_sub(1)?)
            .filter(|r| r.contains(at))
    }

    /// Whether the `len` bytes from `at` all lie in one RAM range.
    #[must_use]
    pub fn contains(&self, at: Gpa, len: u64) -> bool {
        match (self.region_of(at), at.checked_add(len)) {
            (Some(region), Some(end)) => end <= region.end(),
            _ => false,
        }
    }

    /// The whole frames of each RAM range, lowest first.
    pub fn frames(&self, page_size: PageSize) -> impl Iterator<Item = PfnRange> + '_ {
        self.regions
            .iter()
            .map(move |r| r.whole_frames(page_size))
            .filter(|frames| !frames.is_empty())
    }

    /// Whether `pfn` is wholly RAM.
    #[must_use]
    pub fn has_frame(&self, pfn: Pfn, page_size: PageSize) -> bool {
        pfn.gpa(page_size)
            .is_some_and(|at| self.contains(at, page_size.bytes()))
    }
}

/// Something that keeps mapped guest bytes mapped; dropping it may unmap them.
pub trait Hold: Send + Sync {}
impl<T: Send + Sync> Hold for T {}

/// Guest bytes in this process's address space, with whatever keeps them there.
pub struct Mapped<'a> {
    bytes: GuestBytes<'a>,
    _hold: Option<Box<dyn Hold + 'a>>,
}

impl<'a> Mapped<'a> {
    /// Bytes that stay where they are for as long as the guest memory is borrowed.
    #[must_use]
    pub const fn borrowed(bytes: GuestBytes<'a>) -> Self {
        Self { bytes, _hold: None }
    }

    /// Bytes that stay mapped while `hold` lives.
    ///
    /// # Safety
    /// `bytes` must stay readable until `hold` is dropped.
    #[must_use]
    #[expect(unsafe_code, reason = "who makes it promises that the bytes stay")]
    pub unsafe fn held(bytes: GuestBytes<'a>, hold: Box<dyn Hold + 'a>) -> Self {
        Self {
            bytes,
            _hold: Some(hold),
        }
    }

    /// The bytes, for as long as this mapping is borrowed.
    #[must_use]
    pub fn bytes(&self) -> GuestBytes<'_> {
        self.bytes
    }
}

impl fmt::Debug for Mapped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Mapped").field(&self.bytes).finish()
    }
}

/// A guest's physical memory: where its RAM is, and the bytes in it.
///
/// Three kinds of owner fit: one that has the bytes mapped (a file, a VMM's regions: serve
/// [`map`](Self::map) without copying), one that can map on demand (Xen foreign mappings:
/// the [`Mapped`] value unmaps when dropped), and one that must copy (compressed dumps,
/// LibVMI: [`read`](Self::read) alone). Only `layout` and `read` have to be written.
///
/// `vm-memory` has a trait of the same name. Where both are in scope the compiler says that the
/// name is ambiguous, or that `GuestMemoryMmap` does not implement `GuestMemory`: it means this
/// one. Take one of them as another name (`use sonicshot::GuestMemory as SonicMemory`), or neither:
/// to read a VMM's own memory no trait need be in scope but vm-memory's, for `VmMemory` (feature
/// `vm-memory`) makes this one of it.
///
/// A reader that wraps another must forward the defaulted methods too, or the fast path is
/// lost.
///
/// ```
/// use sonicshot::{Gpa, GpaRange, GuestMemory, MemoryError, RamLayout};
///
/// /// A guest whose RAM is one vector.
/// struct Flat(Vec<u8>, RamLayout);
///
/// impl GuestMemory for Flat {
///     fn layout(&self) -> &RamLayout {
///         &self.1
///     }
///     fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
///         let range = GpaRange::with_len(at, buf.len() as u64);
///         let start = at.raw() as usize;
///         match start.checked_add(buf.len()).and_then(|end| self.0.get(start..end)) {
///             Some(bytes) => Ok(buf.copy_from_slice(bytes)),
///             None => Err(MemoryError::NotRam { range: range.unwrap_or(GpaRange::new(at, at)) }),
///         }
///     }
/// }
/// let layout = RamLayout::new(vec![GpaRange::new(Gpa::ZERO, Gpa::new(4096))])?;
/// let guest = Flat(vec![1; 4096], layout);
/// assert_eq!(guest.read_u32(Gpa::new(8))?, 0x0101_0101);
/// assert!(guest.read_u64(Gpa::new(4092)).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait GuestMemory: Send + Sync {
    /// The guest's RAM. The same on every call.
    fn layout(&self) -> &RamLayout;

    /// Fills `buf` with the bytes from `at`.
    ///
    /// # Errors
    /// [`MemoryError`] if the range is not all in one RAM range, or cannot be read;
    /// `buf` is then unspecified.
    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError>;

    /// The `len` bytes (at most [`MAX_MAP`]) from `at` without copying, or `None` if this
    /// range has to be [`read`](Self::read) instead.
    ///
    /// # Errors
    /// [`MemoryError`] if the range is not all in one RAM range, or mapping failed.
    fn map(&self, at: Gpa, len: usize) -> Result<Option<Mapped<'_>>, MemoryError> {
        let _ = (at, len);
        Ok(None)
    }

    /// The first range at or above `at`, in the RAM range that holds `at`, that may hold
    /// something other than zeroes; `None` if the rest of the range is known to be zero.
    ///
    /// A source that knows cheaply (file holes, pages absent from a dump as zero) saves
    /// the reader from touching what is not there. The default knows nothing.
    fn next_data(&self, at: Gpa) -> Option<GpaRange> {
        self.layout()
            .region_of(at)
            .map(|region| GpaRange::new(at, region.end()))
    }

    /// The first range at or above `at`, in the RAM range that holds `at`, that the source does
    /// not have: reading it is [`MemoryError::Absent`]. `None` if the rest of the range is there,
    /// as it is of most sources.
    ///
    /// # Errors
    /// [`MemoryError`] if the source cannot tell.
    fn next_absent(&self, at: Gpa) -> Result<Option<GpaRange>, MemoryError> {
        let _ = at;
        Ok(None)
    }

    /// Fills `buf` with the bytes from `at` for one look at much memory, of an owner who keeps what is
    /// [`read`](Self::read) and would keep all of it; `false`, and `buf` as it was, of one who does
    /// not. What is found is read again.
    ///
    /// # Errors
    /// [`MemoryError`] if the range is not all in one RAM range, or cannot be read;
    /// `buf` is then unspecified.
    fn read_once(&self, at: Gpa, buf: &mut [u8]) -> Result<bool, MemoryError> {
        let _ = (at, buf);
        Ok(false)
    }

    /// A hint that the range will not be read again soon; the owner may let go of caches.
    fn release(&self, range: GpaRange) {
        let _ = range;
    }

    /// Whether a long range that is looked at once is better [`read`](Self::read) than
    /// [`map`](Self::map)ped: of a file, whose every page is first put into page tables.
    fn prefers_read(&self) -> bool {
        false
    }

    /// The meaning of the guest's page tables, if it is a paravirtualised Xen guest whose tables are
    /// there as Xen uses them: each entry holds a frame number of the machine, which this table
    /// translates. `None`, as for all other guests, if entries hold the guest's own numbers.
    fn p2m(&self) -> Option<&P2m> {
        None
    }

    /// The guest's processors as the file or the VMM tells of them: by them a kernel that is gone is
    /// told from one that runs. A VMM that has its guest's registers should give them.
    fn processors(&self) -> Processors {
        Processors::Unknown
    }

    /// The little-endian `u32` at `at`.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    fn read_u32(&self, at: Gpa) -> Result<u32, MemoryError> {
        let mut buf = [0; 4];
        self.read(at, &mut buf)?;
        Ok(u32::from_le_bytes(buf))
    }

    /// The little-endian `u64` at `at`.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    fn read_u64(&self, at: Gpa) -> Result<u64, MemoryError> {
        let mut buf = [0; 8];
        self.read(at, &mut buf)?;
        Ok(u64::from_le_bytes(buf))
    }
}

macro_rules! forward_guest_memory {
    ($($ty:ty),*) => {$(
        impl<M: GuestMemory + ?Sized> GuestMemory for $ty {
            fn layout(&self) -> &RamLayout {
                (**self).layout()
            }
            fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
                (**self).read(at, buf)
            }
            fn map(&self, at: Gpa, len: usize) -> Result<Option<Mapped<'_>>, MemoryError> {
                (**self).map(at, len)
            }
            fn next_data(&self, at: Gpa) -> Option<GpaRange> {
                (**self).next_data(at)
            }
            fn next_absent(&self, at: Gpa) -> Result<Option<GpaRange>, MemoryError> {
                (**self).next_absent(at)
            }
            fn read_once(&self, at: Gpa, buf: &mut [u8]) -> Result<bool, MemoryError> {
                (**self).read_once(at, buf)
            }
            fn release(&self, range: GpaRange) {
                (**self).release(range);
            }
            fn prefers_read(&self) -> bool {
                (**self).prefers_read()
            }
            fn p2m(&self) -> Option<&P2m> {
                (**self).p2m()
            }
            fn processors(&self) -> Processors {
                (**self).processors()
            }
            fn read_u32(&self, at: Gpa) -> Result<u32, MemoryError> {
                (**self).read_u32(at)
            }
            fn read_u64(&self, at: Gpa) -> Result<u64, MemoryError> {
                (**self).read_u64(at)
            }
        }
    )*};
}
forward_guest_memory!(&M, Box<M>, std::sync::Arc<M>);

/// The first range at or above `at`, in the RAM range that holds `at`, that the source has and that
/// may hold something other than zeroes; `None` if there is no more.
///
/// A search through all of memory need not ask for each page of a dump whether it is there.
///
/// # Errors
/// [`MemoryError`] if the source cannot tell.
pub fn next_present(memory: &dyn GuestMemory, at: Gpa) -> Result<Option<GpaRange>, MemoryError> {
    let mut at = at;
    while let Some(data) = memory.next_data(at) {
        let start = data.start().max(at);
        match memory.next_absent(start)? {
            Some(absent) if absent.start() <= start => {
                let is_last = memory
                    .layout()
                    .region_of(start)
                    .is_none_or(|region| absent.end() >= region.end());
                // What goes back would never end.
                if is_last || absent.end() <= start {
                    return Ok(None);
                }
                at = absent.end();
            }
            Some(absent) => return Ok(Some(GpaRange::new(start, data.end().min(absent.start())))),
            None => return Ok(Some(GpaRange::new(start, data.end()))),
        }
    }
    Ok(None)
}

/// A range of RAM.
pub(crate) fn ram(start: Gpa, len: u64) -> Result<GpaRange, LayoutError> {
    GpaRange::with_len(start, len).ok_or(LayoutError::Wraps { start, len })
}

/// Guest RAM that already lies in this process's address space: a VMM's regions, or parts
/// of a mapped file.
///
/// ```
/// use sonicshot::{Gpa, GuestBytes, GuestMemory, MappedRegions};
/// let low = vec![1_u8; 8192];
/// let high = vec![2_u8; 4096];
/// let guest = MappedRegions::new(vec![
///     (Gpa::new(0), GuestBytes::from_slice(&low)),
///     (Gpa::new(0x1_0000), GuestBytes::from_slice(&high)),
/// ])?;
/// assert_eq!(guest.read_u32(Gpa::new(0x1_0000))?, 0x0202_0202);
/// assert!(guest.map(Gpa::new(4096), 4096)?.is_some());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct MappedRegions<'a> {
    layout: RamLayout,
    regions: Vec<(Gpa, GuestBytes<'a>)>,
}

impl<'a> MappedRegions<'a> {
    /// Guest RAM made of `regions`, each a range of bytes and where the guest sees it.
    ///
    /// # Errors
    /// [`LayoutError`] if they overlap in the guest, or there are none.
    pub fn new(mut regions: Vec<(Gpa, GuestBytes<'a>)>) -> Result<Self, LayoutError> {
        regions.sort_unstable_by_key(|(at, _)| *at);
        let ranges = regions
            .iter()
            .map(|(at, bytes)| ram(*at, to_u64(bytes.len())));
        let layout = RamLayout::new(ranges.collect::<Result<_, _>>()?)?;
        Ok(Self { layout, regions })
    }

    fn find(&self, at: Gpa, len: usize) -> Option<GuestBytes<'a>> {
        let above = self.regions.partition_point(|(start, _)| *start <= at);
        let (start, bytes) = self.regions.get(above.checked_sub(1)?)?;
        let offset = usize::try_from(at.offset_from(*start)?).ok()?;
        bytes.get(offset, len)
    }
}

impl GuestMemory for MappedRegions<'_> {
    fn layout(&self) -> &RamLayout {
        &self.layout
    }

    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        if let Some(bytes) = self.find(at, buf.len()) {
            if bytes.copy_to(buf) {
                return Ok(());
            }
        } else if self.layout.contains(at, to_u64(buf.len())) {
            // The range crosses regions that touch in the guest but not in this process.
            return copy_across(self, at, buf);
        }
        Err(MemoryError::NotRam {
            range: GpaRange::of_request(at, buf.len()),
        })
    }

    fn map(&self, at: Gpa, len: usize) -> Result<Option<Mapped<'_>>, MemoryError> {
        match self.find(at, len) {
            Some(bytes) => Ok(Some(Mapped::borrowed(bytes))),
            None if self.layout.contains(at, to_u64(len)) => Ok(None),
            None => Err(MemoryError::NotRam {
                range: GpaRange::of_request(at, len),
            }),
        }
    }
}

fn copy_across(regions: &MappedRegions<'_>, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
    let range = GpaRange::of_request(at, buf.len());
    for (index, byte) in (0_u64..).zip(buf.iter_mut()) {
        let here = at.checked_add(index);
        *byte = here
            .and_then(|here| regions.find(here, 1)?.u8_at(0))
            .ok_or(MemoryError::NotRam { range })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{GuestMemory, MemoryError, RamLayout, next_present};
    use crate::{Gpa, GpaRange};

    /// Two ranges of RAM: of ten pages each, by their number, some known to be zero, some not
    /// there.
    struct Parts(RamLayout);

    fn page(number: u64) -> char {
        let of_both = "--00a-b0--0cd-ef-0--";
        of_both
            .chars()
            .nth(usize::try_from(number).unwrap())
            .unwrap()
    }

    impl Parts {
        fn next(&self, at: Gpa, wanted: impl Fn(char) -> bool) -> Option<GpaRange> {
            let region = self.0.region_of(at)?;
            let pages = at.raw() >> 12..region.end().raw() >> 12;
            let first = pages.clone().find(|number| wanted(page(*number)))?;
            let end = (first..pages.end).find(|number| !wanted(page(*number)));
            let start = Gpa::new(first << 12).max(at);
            Some(GpaRange::new(
                start,
                Gpa::new(end.unwrap_or(pages.end) << 12),
            ))
        }
    }

    impl GuestMemory for Parts {
        fn layout(&self) -> &RamLayout {
            &self.0
        }
        fn read(&self, _: Gpa, _: &mut [u8]) -> Result<(), MemoryError> {
            Ok(())
        }
        fn next_data(&self, at: Gpa) -> Option<GpaRange> {
            self.next(at, |page| page != '0')
        }
        fn next_absent(&self, at: Gpa) -> Result<Option<GpaRange>, MemoryError> {
            Ok(self.next(at, |page| page == '-'))
        }
    }

    #[test]
    fn what_is_there_is_neither_zero_nor_absent() {
        let range =
            |start: u64, end: u64| GpaRange::new(Gpa::new(start << 12), Gpa::new(end << 12));
        let memory = Parts(RamLayout::new(vec![range(0, 10), range(10, 20)]).unwrap());
        let mut found = Vec::new();
        for region in memory.layout().regions() {
            let mut at = region.start();
            while at < region.end()
                && let Some(there) = next_present(&memory, at).unwrap()
            {
                found.push(there);
                at = there.end();
            }
        }
        assert_eq!(
            found,
            [range(4, 5), range(6, 7), range(11, 13), range(14, 16)]
        );
        let inside = Gpa::new(0xb010);
        let there = next_present(&memory, inside).unwrap().unwrap();
        assert_eq!((there.start(), there.end()), (inside, Gpa::new(0xd000)));
    }
}
