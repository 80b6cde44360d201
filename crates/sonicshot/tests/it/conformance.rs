//! Conformance of every guest memory that the core has. And work that is ended.

use sonicshot::checkpoint::*;
use sonicshot::*;
use sonicshot_testkit::{check_handed_on, check_memory, check_same};
use std::error::Error;
use std::sync::atomic::{AtomicU64, Ordering};

const PAGE: u64 = 4096;
/// The start of each part and its length, in pages. Two touch in the guest.
const PARTS: [(u64, u64); 4] = [(0, 40), (40, 23), (64, 1), (1 << 20, 57)];

/// Bytes of which few pages are like another, some are zero, and some one word again and again.
fn bytes(part: u64, len: u64) -> Vec<u8> {
    let page = |number: u64| -> Vec<u8> {
        let seed = (number + part * 7919).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let word = |n: u64| match number % 4 {
            0 => 0,
            1 => 0xaaaa_aaaa_5555_5555,
            _ => (seed ^ n).wrapping_mul(0x94d0_49bb_1331_11eb),
        };
        (0..PAGE / 8).flat_map(|n| word(n).to_le_bytes()).collect()
    };
    (0..len).flat_map(page).collect()
}

fn parts() -> Vec<(Gpa, Vec<u8>)> {
    let part = |(number, (start, len))| (Gpa::new(start * PAGE), bytes(number, len));
    (0..).zip(PARTS).map(part).collect()
}

fn mapped(parts: &[(Gpa, Vec<u8>)]) -> MappedRegions<'_> {
    let regions = parts.iter();
    let regions = regions.map(|(at, bytes)| (*at, GuestBytes::from_slice(bytes)));
    MappedRegions::new(regions.collect()).unwrap()
}

/// The bytes at an address, by the parts alone.
fn expected(parts: &[(Gpa, Vec<u8>)], at: Gpa, buf: &mut [u8]) {
    for (index, byte) in (0..).zip(buf) {
        let at = at.raw() + index;
        let part = parts.iter().find_map(|(start, bytes)| {
            let offset = at.checked_sub(start.raw())?;
            bytes.get(usize::try_from(offset).ok()?)
        });
        *byte = *part.unwrap();
    }
}

#[test]
fn regions_of_a_vmms_and_what_hands_them_on() {
    let parts = parts();
    let memory = mapped(&parts);
    check_memory(&memory, &|at, buf| expected(&parts, at, buf));
    let memory = check_handed_on(memory);
    let stoppable = Stoppable::new(&memory, Stop::new());
    check_memory(&stoppable, &|at, buf| expected(&parts, at, buf));
    check_same(&memory, &stoppable);
}

#[cfg(feature = "vm-memory")]
#[test]
fn a_vmms_vm_memory_borrowed_and_shared() {
    use std::sync::Arc;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
    let parts = parts();
    let ranges = parts.iter();
    let ranges = ranges.map(|(at, bytes)| (GuestAddress(at.raw()), bytes.len()));
    let memory: GuestMemoryMmap =
        GuestMemoryMmap::from_ranges(&ranges.collect::<Vec<_>>()).unwrap();
    for (at, bytes) in &parts {
        memory.write_slice(bytes, GuestAddress(at.raw())).unwrap();
    }
    let borrowed = VmMemory::new(&memory).unwrap();
    check_memory(&borrowed, &|at, buf| expected(&parts, at, buf));
    let shared: Arc<dyn GuestMemory> = Arc::new(SharedVmMemory::new(Arc::new(memory)).unwrap());
    check_memory(&shared, &|at, buf| expected(&parts, at, buf));
}

fn save(memory: &dyn GuestMemory, options: SaveOptions) -> Result<Vec<u8>, CheckpointError> {
    let map = PageMap::new(memory.layout(), PageSize::SIZE_4K);
    let plan = PrunePlan::new(&map, &DropClasses::default(), Fill::Any);
    let info = CheckpointInfo::new(memory.layout().clone(), PageSize::SIZE_4K);
    let mut writer = CheckpointWriter::new(Vec::new(), info, options)?;
    writer.memory(memory, &map, &plan)?;
    Ok(writer.finish()?.0)
}

#[test]
fn a_checkpoint_is_a_guests_memory() {
    let parts = parts();
    let memory = mapped(&parts);
    let saved = save(&memory, SaveOptions::default()).unwrap();
    let reader = CheckpointReader::new(saved).unwrap();
    check_memory(&reader, &|at, buf| expected(&parts, at, buf));
    check_handed_on(reader);
}

/// A memory by which its work is ended at one of its reads.
struct EndsAt<'a> {
    memory: MappedRegions<'a>,
    stop: Stop,
    left: AtomicU64,
}

impl GuestMemory for EndsAt<'_> {
    fn layout(&self) -> &RamLayout {
        self.memory.layout()
    }
    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        if self.left.fetch_sub(1, Ordering::Relaxed) == 0 {
            self.stop.cancel();
        }
        self.memory.read(at, buf)
    }
}

/// Whether that is the cause at the bottom of it.
fn is_stopped(error: &(dyn Error + 'static)) -> bool {
    error.is::<Stopped>() || error.source().is_some_and(is_stopped)
}

#[test]
fn a_save_that_is_ended_fails_and_says_so() {
    let parts = parts();
    let ended = |left| {
        let stop = Stop::new();
        let memory = EndsAt {
            memory: mapped(&parts),
            stop: stop.clone(),
            left: AtomicU64::new(left),
        };
        let mut options = SaveOptions::default();
        options.stop = Some(stop);
        options.threads = std::num::NonZeroUsize::new(1);
        save(&memory, options)
    };
    // Before the first read, at the first, and never.
    let stop = Stop::at(std::time::Instant::now());
    let mut options = SaveOptions::default();
    options.stop = Some(stop);
    for failed in [save(&mapped(&parts), options), ended(0)] {
        let error = failed.unwrap_err();
        assert!(is_stopped(&error), "{error:?}");
    }
    assert!(ended(u64::MAX - 1).is_ok());
}
