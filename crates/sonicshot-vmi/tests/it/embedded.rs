//! An analysis that is ended is an error, wherever it was; and a guest that has its own memory.

use crate::owner::original as ram;
use sonicshot::{
    Gpa, GuestBytes, GuestMemory, Mapped, MappedRegions, MemoryError, RamLayout, Stop, Stopped,
};
use sonicshot_vmi::{AnalysisOptions, GuestOptions, OwnedGuest, VmiError, analyze};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
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
