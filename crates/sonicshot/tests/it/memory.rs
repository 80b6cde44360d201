//! The costs of the core's own records, counted by the allocator.

use sonicshot::*;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    /// Bytes that this thread has, and the most that it had.
    static USED: Cell<(isize, isize)> = const { Cell::new((0, 0)) };
}

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn count(bytes: isize) {
    // A thread that ends has no counters any more.
    let _ = USED.try_with(|used| {
        let now = used.get().0 + bytes;
        used.set((now, used.get().1.max(now)));
    });
}

// SAFETY: all calls go on to the system's allocator as they came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size().cast_signed());
        // SAFETY: as it came.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        count(-layout.size().cast_signed());
        // SAFETY: as it came.
        unsafe { System.dealloc(place, layout) }
    }
}

/// The result of `make`, the bytes that it has, and the most there were while it was made.
fn cost<T>(make: impl FnOnce() -> T) -> (T, isize, isize) {
    let before = USED.get().0;
    USED.set((before, before));
    let made = make();
    let (now, most) = USED.get();
    (made, now - before, most - before)
}

const TIB: u64 = 1 << 40;

/// A guest of 12 TiB, with the hole below 4 GiB.
fn layout() -> RamLayout {
    let gpa = |gib: u64| Gpa::new(gib << 30);
    RamLayout::new(vec![
        GpaRange::new(gpa(0), gpa(3)),
        GpaRange::new(gpa(4), gpa(((12 * TIB) >> 30) + 1)),
    ])
    .unwrap()
}

#[test]
fn a_map_of_12_tib_costs_what_its_runs_cost() {
    let layout = layout();
    for page_size in [PageSize::SIZE_4K, PageSize::SIZE_16K, PageSize::SIZE_64K] {
        let (mut map, bytes, most) = cost(|| PageMap::new(&layout, page_size));
        assert!(most < 4 << 10, "{most} bytes for one run");
        assert_eq!(map.total(), (12 * TIB) >> page_size.shift());

        // 10,000 runs, far from each other, in no order.
        const RUNS: u64 = 10_000;
        let low = 4 << 30 >> page_size.shift();
        let step = (map.total() - low) / RUNS;
        let ((), more, most) = cost(|| {
            for number in 0..RUNS / 2 {
                let at = (number * 2_741 % (RUNS / 2) * 2 + 1) * step;
                let run =
                    PfnRange::with_len(Pfn::new(at + (4 << 30 >> page_size.shift())), step / 3);
                map.set(run.unwrap(), PageClass::FreeBuddy);
            }
        });
        assert!(
            bytes + more < 2 << 20 && bytes + most < 2 << 20,
            "{most} bytes for 10,000 runs"
        );
        assert!((RUNS - 2..RUNS + 3).contains(&(map.runs().count() as u64)));
        let (plan, bytes, most) =
            cost(|| PrunePlan::new(&map, &DropClasses::default(), Fill::Zero));
        assert_eq!(plan.runs().len() as u64, RUNS / 2);
        assert!(bytes <= most && most < 1 << 20, "{most} bytes for the plan");
        let ((), _, most) = cost(|| assert_eq!(map.counts().total(), map.total()));
        assert!(most < 4 << 10);
    }
}

#[test]
fn where_runs_are_short_a_frame_costs_a_byte() {
    let end = Gpa::new(4 << 30);
    let layout = RamLayout::new(vec![GpaRange::new(Gpa::ZERO, end)]).unwrap();
    let frames = 1 << 20;
    let (map, bytes, most) = cost(|| {
        let mut map = PageMap::new(&layout, PageSize::SIZE_4K);
        for pfn in (0..frames).step_by(2) {
            let one = PfnRange::with_len(Pfn::new(pfn), 1).unwrap();
            map.set(one, PageClass::FreeBuddy);
        }
        map
    });
    assert_eq!(map.runs().count(), 1 << 20);
    assert!(
        bytes < frames.cast_signed() as isize + (8 << 10),
        "{bytes} bytes"
    );
    assert!(
        most < frames.cast_signed() as isize + (64 << 10),
        "{most} bytes at most"
    );
}
