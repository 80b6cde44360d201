//! An analysis that is ended is an error, wherever it was; and a guest that has its own memory.

use crate::owner::original as ram;
use sonicshot::{
    Gpa, GuestBytes, GuestMemory, Mapped, MappedRegions, MemoryError, RamLayout, Stop, Stopped,
};
use sonicshot_vmi::{AnalysisOptions, GuestOptions, GuestOs, OwnedGuest, VmiError, analyze};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, RwLock};
use std::time::Instant;

/// A memory by which its work is ended at one of its reads.
struct EndsAt {
    memory: MappedRegions<'static>,
    stop: Stop,
    left: AtomicI64,
}

impl EndsAt {
    fn new(left: i64) -> Self {
        Self {
            memory: memory(),
            stop: Stop::new(),
            left: AtomicI64::new(left),
        }
    }

    fn count(&self) {
        if self.left.fetch_sub(1, Ordering::Relaxed) == 0 {
            self.stop.cancel();
        }
    }
}

impl GuestMemory for EndsAt {
    fn layout(&self) -> &RamLayout {
        self.memory.layout()
    }
    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.count();
        self.memory.read(at, buf)
    }
    fn map(&self, at: Gpa, len: usize) -> Result<Option<Mapped<'_>>, MemoryError> {
        self.count();
        self.memory.map(at, len)
    }
}

fn memory() -> MappedRegions<'static> {
    MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(ram()))]).unwrap()
}

#[test]
fn an_analysis_that_is_ended_is_an_error_wherever_it_was() {
    let look = |left| {
        let memory = EndsAt::new(left);
        let options = AnalysisOptions::new().stop(memory.stop.clone());
        let found = analyze(&memory, &options);
        (found, i64::MAX.wrapping_sub(memory.left.into_inner()))
    };
    let (whole, reads) = look(i64::MAX);
    whole.unwrap();
    assert!(reads > 1000, "{reads}");
    for part in 0..24 {
        let (found, _) = look(reads * part / 24);
        let ended = matches!(found, Err(VmiError::Stopped(Stopped::Cancelled)));
        assert!(ended, "at {part}/24: {found:?}");
    }
    let options = AnalysisOptions::new().stop(Stop::at(Instant::now()));
    let found = analyze(&memory(), &options);
    assert!(matches!(found, Err(VmiError::Stopped(Stopped::OutOfTime))));
}

#[test]
fn a_look_at_a_guest_that_was_opened_before_ends_as_well_and_the_guest_stays() {
    let opened = || {
        let memory = Arc::new(EndsAt::new(i64::MAX));
        let shared: Arc<dyn GuestMemory> = memory.clone();
        let guest = OwnedGuest::open(shared, &GuestOptions::new()).unwrap();
        (memory, guest)
    };
    let (memory, guest) = opened();
    memory.left.store(i64::MAX, Ordering::Relaxed);
    let whole = guest.analyze(&AnalysisOptions::new().stop(Stop::new()));
    let whole = whole.unwrap();
    let reads = i64::MAX.wrapping_sub(memory.left.load(Ordering::Relaxed));
    assert!(reads > 100, "{reads}");
    for part in 0..8 {
        let (memory, guest) = opened();
        memory.left.store(reads * part / 8, Ordering::Relaxed);
        let options = AnalysisOptions::new().stop(memory.stop.clone());
        let found = guest.analyze(&options);
        let ended = matches!(found, Err(VmiError::Stopped(Stopped::Cancelled)));
        assert!(ended, "at {part}/8: {found:?}");
        let after = memory.left.load(Ordering::Relaxed);
        assert!(after > -64, "{after} reads after it was ended");
    }
    let options = AnalysisOptions::new().stop(Stop::at(Instant::now()));
    let found = guest.analyze(&options);
    assert!(matches!(found, Err(VmiError::Stopped(Stopped::OutOfTime))));
    let found = guest.with(|guest| guest.analyze(&options));
    assert!(matches!(found, Err(VmiError::Stopped(Stopped::OutOfTime))));
    let soon = AnalysisOptions::new().stop(Stop::new());
    let found = guest.with(|guest| guest.analyze(&soon)).unwrap();
    assert_eq!(found.counts(), whole.counts());
    let again = guest.analyze(&AnalysisOptions::new()).unwrap();
    assert_eq!(again.counts(), whole.counts());
}

/// A memory that is written to while it is shared.
struct Written {
    layout: RamLayout,
    bytes: RwLock<Vec<u8>>,
}

impl GuestMemory for Written {
    fn layout(&self) -> &RamLayout {
        &self.layout
    }
    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        let at = usize::try_from(at.raw()).unwrap();
        let bytes = self.bytes.read().unwrap();
        buf.copy_from_slice(&bytes[at..at + buf.len()]);
        Ok(())
    }
}

#[test]
fn a_kernel_that_has_given_the_machine_away_since_it_was_opened_is_refused() {
    let written = Arc::new(Written {
        layout: memory().layout().clone(),
        bytes: RwLock::new(ram().to_vec()),
    });
    let shared: Arc<dyn GuestMemory> = written.clone();
    let guest = OwnedGuest::open(shared, &GuestOptions::new()).unwrap();
    guest.analyze(&AnalysisOptions::new()).unwrap();
    let state = guest.with(|guest| {
        let state = guest.symbol("system_state").unwrap().unwrap();
        guest.translate(state).unwrap()
    });
    // `SYSTEM_RESTART`.
    written.bytes.write().unwrap()[usize::try_from(state.raw()).unwrap()] = 6;
    let found = guest.analyze(&AnalysisOptions::new());
    assert!(matches!(found, Err(VmiError::LaterOwner(_))), "{found:?}");
}

#[test]
fn a_guest_that_has_its_memory_goes_where_it_is_needed() {
    let expected = analyze(&memory(), &AnalysisOptions::new()).unwrap();
    let shared: Arc<dyn GuestMemory> = Arc::new(memory());
    let guest = OwnedGuest::open(Arc::clone(&shared), &GuestOptions::new()).unwrap();
    assert_eq!(Arc::strong_count(&shared), 2);
    let guest = std::thread::spawn(move || {
        let release = guest.with(|guest| guest.release().to_owned());
        assert!(release.starts_with("6.1."), "{release}");
        guest
    });
    let guest = guest.join().unwrap();
    let found = guest.analyze(&AnalysisOptions::new()).unwrap();
    assert_eq!(found.counts(), expected.counts());
    drop(guest);
    assert_eq!(Arc::strong_count(&shared), 1);
}

#[test]
fn processes_symbols_and_types_are_read_by_name() {
    let shared: Arc<dyn GuestMemory> = Arc::new(memory());
    let guest = OwnedGuest::open(shared, &GuestOptions::new()).unwrap();
    guest.with(|guest| {
        let tasks: Result<Vec<_>, _> = guest.tasks().unwrap().collect();
        let tasks = tasks.unwrap();
        assert_eq!((tasks[0].pid, tasks[0].parent), (1, 0));
        assert!(tasks[0].memory.is_some());
        assert_eq!((tasks[1].pid, tasks[1].name.as_str()), (2, "kthreadd"));
        assert!(
            tasks
                .iter()
                .skip(2)
                .any(|task| task.parent == 2 && task.memory.is_none())
        );
        // What no table of this crate's needs knows of.
        let init = guest.symbol("init_task").unwrap().unwrap();
        let comm = guest.member("task_struct", "comm").unwrap().unwrap();
        assert_eq!(comm.size, Some(16));
        let mut name = [0; 9];
        let at = init.checked_add(comm.offset).unwrap();
        guest.read_virtual(at, &mut name).unwrap();
        assert_eq!(&name, b"swapper/0");
        assert!(guest.type_size("task_struct").unwrap().unwrap() > 1000);
        assert_eq!(guest.constant("BPF_PROG_TYPE_KPROBE").unwrap(), Some(2));
        assert!(guest.symbol("no_such_symbol").unwrap().is_none());
        assert!(
            guest
                .member("task_struct", "no_such_member")
                .unwrap()
                .is_none()
        );
        let physical = guest.translate(init).unwrap();
        assert_eq!(physical.raw() & 0xfff, init.raw() & 0xfff);
    });
}
