//! The promises of every guest memory, whoever has it.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "what a test calls says so by panicking"
)]

use sonicshot::{Gpa, GpaRange, GuestMemory, MAX_MAP, MemoryError, RamLayout};
use std::sync::Arc;

/// The lengths of reads that are tried at each place.
const LENGTHS: [usize; 9] = [1, 2, 7, 8, 4095, 4096, 4097, 12_288, 70_000];
/// The number of pages of a range of RAM that are looked at, beside those at its ends.
const PAGES: u64 = 23;
/// Of the bytes that are not there, what a test expects is not asked.
const PAGE: u64 = 4096;

/// Holds `memory` against what a [`GuestMemory`] promises. `bytes_at` fills a buffer with what the
/// guest has there, and is asked for one range of RAM at a time, of nothing that is absent.
///
/// ```
/// use sonicshot::{Gpa, GuestBytes, MappedRegions};
/// let ram: Vec<u8> = (0..=255).cycle().take(64 << 10).collect();
/// let memory = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(&ram))])?;
/// sonicshot_testkit::check_memory(&memory, &|at, buf| {
///     let start = usize::try_from(at.raw()).unwrap();
///     buf.copy_from_slice(&ram[start..start + buf.len()]);
/// });
/// # Ok::<(), sonicshot::LayoutError>(())
/// ```
///
/// # Panics
/// If it does not keep a promise.
pub fn check_memory(memory: &dyn GuestMemory, bytes_at: &(dyn Fn(Gpa, &mut [u8]) + Sync)) {
    let check = Check { memory, bytes_at };
    check.layout();
    for region in memory.layout().regions() {
        for at in places(region) {
            for len in LENGTHS {
                check.place(*region, at, len);
            }
        }
        check.data(*region);
        check.absent(*region);
    }
    check.outside();
    check.threads();
    // What is said of it does not change.
    assert_eq!(memory.processors(), memory.processors());
    assert_eq!(memory.prefers_read(), memory.prefers_read());
    assert_eq!(memory.p2m().is_some(), memory.p2m().is_some());
}

/// Holds what hands a memory on against that memory: it must hand on what has a default, too.
///
/// # Panics
/// If it says something else.
pub fn check_same(memory: &dyn GuestMemory, other: &dyn GuestMemory) {
    assert_eq!(memory.layout(), other.layout());
    assert_eq!(memory.processors(), other.processors());
    assert_eq!(memory.prefers_read(), other.prefers_read());
    assert_eq!(memory.p2m().is_some(), other.p2m().is_some());
    for region in memory.layout().regions() {
        for at in places(region) {
            assert_eq!(memory.next_data(at), other.next_data(at), "{at}");
            let once = [memory, other].map(|memory| memory.read_once(at, &mut [0]).unwrap());
            assert_eq!(once[0], once[1], "{at}");
            let absent = [memory, other].map(|memory| memory.next_absent(at).unwrap());
            assert_eq!(absent[0], absent[1], "{at}");
            let maps = [memory, other].map(|memory| memory.map(at, 1).unwrap().is_some());
            assert_eq!(maps[0], maps[1], "{at}");
        }
    }
}

/// Places in a range of RAM: at its ends, at pages' ends, and all over it.
fn places(region: &GpaRange) -> Vec<Gpa> {
    let (start, end) = (region.start().raw(), region.end().raw());
    let step = ((end - start) / PAGES / PAGE).max(1) * PAGE;
    let mut places: Vec<u64> = (0..PAGES).map(|n| start + n * step).collect();
    places.extend(places.clone().iter().map(|at| at + 4093));
    places.extend([end - 1, end.saturating_sub(8), end.saturating_sub(4097)]);
    places.retain(|at| (start..end).contains(at));
    places.sort_unstable();
    places.dedup();
    places.into_iter().map(Gpa::new).collect()
}

struct Check<'a> {
    memory: &'a dyn GuestMemory,
    bytes_at: &'a (dyn Fn(Gpa, &mut [u8]) + Sync),
}

impl Check<'_> {
    fn layout(&self) {
        let layout = self.memory.layout();
        assert_eq!(layout, self.memory.layout(), "it is the same on every call");
        let again = RamLayout::new(layout.regions().to_vec()).unwrap();
        assert_eq!(
            &again, layout,
            "sorted, disjoint, and what touches is joined"
        );
        assert!(layout.bytes() > 0);
    }

    /// The first of `range` that is not there.
    fn absent_in(&self, range: GpaRange) -> Option<GpaRange> {
        let absent = self.memory.next_absent(range.start()).unwrap()?;
        (absent.start() < range.end()).then_some(absent)
    }

    fn place(&self, region: GpaRange, at: Gpa, len: usize) {
        let range = GpaRange::with_len(at, len as u64).unwrap();
        let mut found = vec![0xa5; len];
        let read = self.memory.read(at, &mut found);
        let mapped = self.memory.map(at, len);
        if range.end() > region.end() {
            assert!(
                matches!(read, Err(MemoryError::NotRam { .. })),
                "{range} ends beyond its RAM: {read:?}"
            );
            // What maps nothing says no more.
            assert!(
                !matches!(mapped, Ok(Some(_))),
                "{range} ends beyond its RAM, and is mapped"
            );
            return;
        }
        if self.absent_in(range).is_some() {
            assert!(
                matches!(read, Err(MemoryError::Absent { .. })),
                "{range} is not there: {read:?}"
            );
            assert!(
                !matches!(mapped, Ok(Some(_))),
                "{range} is not there, and mapped"
            );
            return;
        }
        read.unwrap();
        let mut expected = vec![0; len];
        (self.bytes_at)(at, &mut expected);
        assert!(found == expected, "{range} reads as something else");
        assert!(len <= MAX_MAP);
        if let Some(mapped) = mapped.unwrap() {
            assert_eq!(mapped.bytes().len(), len);
            let mut found = vec![0xa5; len];
            assert!(mapped.bytes().copy_to(&mut found));
            assert!(found == expected, "{range} maps as something else");
        }
        if len == 8 {
            let value = u64::from_le_bytes(expected.try_into().unwrap());
            assert_eq!(self.memory.read_u64(at).unwrap(), value);
            assert_eq!(
                u64::from(self.memory.read_u32(at).unwrap()),
                value & 0xffff_ffff
            );
        }
        self.memory.release(range);
        assert!(
            self.memory.read(at, &mut found).is_ok(),
            "{range}: after its release"
        );
    }

    /// A range that is said to have no data reads as zero.
    fn data(&self, region: GpaRange) {
        let mut at = region.start();
        for _ in 0..1000 {
            let data = self.memory.next_data(at);
            let end = data.map_or(region.end(), |data| data.start().max(at));
            let mut zero = at;
            while zero < end {
                let len = (end.raw() - zero.raw()).min(PAGE);
                let range = GpaRange::with_len(zero, len).unwrap();
                if self.absent_in(range).is_none() {
                    let mut found = vec![0xa5; usize::try_from(len).unwrap()];
                    self.memory.read(zero, &mut found).unwrap();
                    assert!(found.iter().all(|byte| *byte == 0), "{zero} has no data");
                }
                zero = range.end();
            }
            match data {
                Some(data) if data.end() < region.end() => {
                    assert!(data.end() > at, "what is next never ends: {data}");
                    at = data.end();
                }
                _ => return,
            }
        }
    }

    /// An absent range lies in the range asked for, goes on, and is not read.
    fn absent(&self, region: GpaRange) {
        let mut at = region.start();
        for _ in 0..1000 {
            let Some(absent) = self.memory.next_absent(at).unwrap() else {
                return;
            };
            assert!(
                absent.end() <= region.end() && absent.end() > at,
                "{absent}"
            );
            let first = absent.start().max(at);
            let read = self.memory.read(first, &mut [0]);
            assert!(
                matches!(read, Err(MemoryError::Absent { .. })),
                "{absent}: {read:?}"
            );
            at = absent.end();
            if at >= region.end() {
                return;
            }
        }
    }

    /// Nothing is read that is no RAM.
    fn outside(&self) {
        let layout = self.memory.layout();
        let ends = layout.regions().iter().map(GpaRange::end);
        let far = [
            layout.end().raw().saturating_add(1 << 30),
            u64::MAX - 7,
            u64::MAX,
        ];
        for at in ends.chain(far.map(Gpa::new)) {
            if layout.region_of(at).is_some() {
                continue;
            }
            for len in [1, 8, 4096] {
                let read = self.memory.read(at, &mut vec![0; len]);
                assert!(
                    matches!(read, Err(MemoryError::NotRam { .. })),
                    "{at}: {read:?}"
                );
                let mapped = self.memory.map(at, len);
                assert!(!matches!(mapped, Ok(Some(_))), "{at}: mapped");
            }
        }
    }

    /// Many may read at a time.
    fn threads(&self) {
        std::thread::scope(|scope| {
            for number in 0..4 {
                scope.spawn(move || {
                    for region in self.memory.layout().regions() {
                        for at in places(region).into_iter().skip(number) {
                            let range = GpaRange::with_len(at, 8).unwrap();
                            if range.end() > region.end() || self.absent_in(range).is_some() {
                                continue;
                            }
                            let mut expected = [0; 8];
                            (self.bytes_at)(at, &mut expected);
                            let value = self.memory.read_u64(at).unwrap();
                            assert_eq!(value, u64::from_le_bytes(expected), "{at}");
                        }
                    }
                });
            }
        });
    }
}

/// The same by each of the ways in which the core hands a memory on.
///
/// # Panics
/// If one of them does not hand on all of it.
pub fn check_handed_on<M: GuestMemory>(memory: M) -> M {
    check_same(&memory, &&memory);
    let memory = Box::new(memory);
    check_same(&*memory, &memory);
    let memory = Arc::new(*memory);
    check_same(&*memory, &memory);
    Arc::try_unwrap(memory).ok().unwrap()
}
