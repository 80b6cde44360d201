//! The system calls that docs/embedding.md lists for a VMM's filter: each operation is run in a process
//! of its own, under a filter of just those; and for each call that it always makes, once without it,
//! which must end the process.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "tests may stop anywhere"
)]

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};
use sonicshot::checkpoint::{
    Before, CheckpointInfo, CheckpointReader, CheckpointWriter, Compression, RestoreOptions,
    RestoreRegions, SaveOptions,
};
use sonicshot::{DropClasses, Gpa, GuestMemory, PageSize, RamLayout, Stop, VmMemory};
use sonicshot_serve::{
    CheckpointSource, Look, Metrics, PageSource, Piece, Prefetch, Run, ServeError, Uffd, Vm,
    VmOptions,
};
use sonicshot_vmi::{Analysis, AnalysisOptions, analyze};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const PAGE: usize = 4096;
/// The operation of the child, and the call that is taken off the lists.
const OPERATION: &str = "SONICSHOT_SECCOMP_OPERATION";
const WITHOUT: &str = "SONICSHOT_SECCOMP_WITHOUT";
/// The folder with the guest.
const FOLDER: &str = "SONICSHOT_SECCOMP_FOLDER";
/// `SIGSYS`
const BAD_CALL: i32 = 31;

/// The rows of the table in docs/embedding.md, by their first column.
const START: &str = "lazy restore, the thread that starts it";
const HANDLER: &str = "lazy restore, its handler `sonicshot-fault`";
const PROCESSOR: &str = "lazy restore, a virtual processor";
const EAGER: &str = "eager restore";
const SAVE: &str = "save";
const CLASSIFY: &str = "classify";

macro_rules! numbers {
    ($($name:ident)*) => { [$((stringify!($name), libc::$name)),*] };
}

/// The number of a call by its name.
fn number(name: &str) -> i64 {
    let known = numbers! {
        SYS_brk SYS_clone3 SYS_close SYS_eventfd2 SYS_exit SYS_exit_group SYS_fallocate SYS_fcntl
        SYS_fdatasync SYS_fstat SYS_fsync SYS_ftruncate SYS_futex SYS_getpid SYS_getrandom SYS_gettid SYS_ioctl SYS_lseek
        SYS_madvise SYS_mmap SYS_mprotect SYS_mremap SYS_munmap SYS_newfstatat SYS_openat SYS_poll
        SYS_ppoll SYS_prctl SYS_pread64 SYS_preadv2 SYS_pwrite64 SYS_read SYS_readlink SYS_rseq
        SYS_restart_syscall SYS_rt_sigaction SYS_rt_sigprocmask SYS_rt_sigreturn SYS_sched_getaffinity SYS_sched_yield SYS_seccomp SYS_set_robust_list SYS_sigaltstack
        SYS_statx SYS_userfaultfd SYS_write
    };
    let full = format!("SYS_{name}");
    let found = known.iter().find(|(known, _)| *known == full);
    found
        .unwrap_or_else(|| panic!("{name}: a call that this test does not know"))
        .1
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The calls of one operation on one thread.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Calls {
    always: BTreeSet<String>,
    /// As the allocator, the threads and the host have it.
    at_times: BTreeSet<String>,
}

impl Calls {
    fn all(&self) -> impl Iterator<Item = &str> {
        self.always.union(&self.at_times).map(String::as_str)
    }
}

/// The table of the docs.
fn listed() -> BTreeMap<String, Calls> {
    let docs = fs::read_to_string(repository().join("docs/embedding.md")).unwrap();
    let (_, table) = docs
        .split_once("| operation, thread | always | at times |\n|---|---|---|\n")
        .unwrap();
    let words = |cell: &str| -> BTreeSet<String> {
        let words = cell.split_whitespace().filter(|word| *word != "none");
        words
            .map(|word| word.trim_matches('`').to_owned())
            .collect()
    };
    let rows = table.lines().take_while(|line| line.starts_with('|'));
    rows.map(|row| {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let [name, always, at_times] = cells[..] else {
            panic!("{row}");
        };
        let (always, at_times) = (words(always), words(at_times));
        assert!(always.is_disjoint(&at_times), "{row}");
        (name.to_owned(), Calls { always, at_times })
    })
    .collect()
}

/// A filter of these calls; of all others the first ends the process.
fn filter(calls: &BTreeSet<&str>) -> BpfProgram {
    let without = std::env::var(WITHOUT).unwrap_or_default();
    let calls = calls.iter().filter(|call| **call != without);
    let rules = calls.map(|call| (number(call), Vec::new())).collect();
    let (others, these) = (SeccompAction::KillProcess, SeccompAction::Allow);
    let arch = std::env::consts::ARCH.try_into().unwrap();
    SeccompFilter::new(rules, others, these, arch)
        .unwrap()
        .try_into()
        .unwrap()
}

/// A filter of what these rows have. What is the test's own: `exit_group` ends the process, `seccomp`
/// makes the next filter.
fn filter_of(rows: &[&str]) -> BpfProgram {
    let listed = listed();
    let mut calls: BTreeSet<&str> = rows.iter().flat_map(|row| listed[*row].all()).collect();
    calls.extend(["exit_group", "seccomp"]);
    filter(&calls)
}

/// The guest's memory, as a VMM has it: in two regions.
fn regions(bytes: u64) -> [(GuestAddress, usize); 2] {
    let half = usize::try_from(bytes / 2).unwrap();
    [(GuestAddress(0), half), (GuestAddress(half as u64), half)]
}

fn unpack(folder: &Path) {
    let from = File::open(repository().join("testdata/guest-6.1-128m/ram.raw.zst")).unwrap();
    let mut reader = zstd::stream::read::Decoder::new(from).unwrap();
    reader.window_log_max(31).unwrap();
    io::copy(&mut reader, &mut File::create(folder.join("ram")).unwrap()).unwrap();
}

/// The VMM's memory with the guest in it.
fn guest(folder: &Path) -> GuestMemoryMmap {
    let ram = fs::read(folder.join("ram")).unwrap();
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&regions(ram.len() as u64)).unwrap();
    memory.write_slice(&ram, GuestAddress(0)).unwrap();
    memory
}

fn look(memory: &GuestMemoryMmap) -> Analysis {
    analyze(&VmMemory::new(memory).unwrap(), &AnalysisOptions::new()).unwrap()
}

fn save(memory: &GuestMemoryMmap, analysis: &Analysis, file: File) {
    let guest = VmMemory::new(memory).unwrap();
    let plan = analysis.plan(&DropClasses::default());
    let info = CheckpointInfo::new(guest.layout().clone(), PageSize::SIZE_4K);
    let mut options = SaveOptions::new(Compression::Lz4);
    options.threads = NonZeroUsize::new(2);
    let mut writer = CheckpointWriter::new(file, info, options).unwrap();
    writer.blob("device-state", &b"registers"[..]).unwrap();
    writer.memory(&guest, analysis.pages(), &plan).unwrap();
    writer.finish().unwrap();
}

/// A source that puts the handler's thread under its own filter as soon as it asks for a page.
struct Filtered {
    source: CheckpointSource<File>,
    handler: BpfProgram,
    applied: OnceLock<()>,
}

impl Filtered {
    fn apply(&self) {
        self.applied
            .get_or_init(|| apply_filter(&self.handler).unwrap());
    }
}

impl PageSource for Filtered {
    fn layout(&self) -> &RamLayout {
        self.source.layout()
    }

    fn run_at(&self, at: Gpa) -> Result<Run, ServeError> {
        self.apply();
        self.source.run_at(at)
    }

    fn read<'b>(
        &self,
        range: sonicshot::GpaRange,
        buffer: &'b mut Vec<u8>,
    ) -> Result<Piece<'b>, ServeError> {
        self.apply();
        self.source.read(range, buffer)
    }

    fn look<'b>(
        &self,
        page: sonicshot::GpaRange,
        buffer: &'b mut Vec<u8>,
    ) -> Result<Look<'b>, ServeError> {
        self.apply();
        self.source.look(page, buffer)
    }

    fn by_need(&self) -> Arc<[sonicshot::GpaRange]> {
        self.source.by_need()
    }
}

static STARTED: AtomicBool = AtomicBool::new(false);
static DONE: AtomicBool = AtomicBool::new(false);

/// A virtual processor: it touches every page, and makes no call of its own.
fn processor(memory: &GuestMemoryMmap, bytes: usize) -> ! {
    apply_filter(&filter(&listed()[PROCESSOR].all().collect())).unwrap();
    while !STARTED.load(Ordering::Acquire) {
        std::hint::spin_loop();
    }
    let mut sum = 0_u64;
    for page in (0..bytes).step_by(PAGE) {
        let word: u64 = memory.read_obj(GuestAddress(page as u64)).unwrap();
        sum = sum.wrapping_add(word);
    }
    std::hint::black_box(sum);
    DONE.store(true, Ordering::Release);
    loop {
        std::hint::spin_loop();
    }
}

fn lazy(folder: &Path) {
    let bytes = fs::metadata(folder.join("ram")).unwrap().len();
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&regions(bytes)).unwrap();
    let memory = Arc::new(memory);
    let (path, handler) = (folder.join("sonic"), filter_of(&[HANDLER]));
    let len = usize::try_from(bytes).unwrap();
    let shared = Arc::clone(&memory);
    std::thread::spawn(move || processor(&shared, len));
    // The handler has what the thread has that starts it.
    apply_filter(&filter_of(&[START, HANDLER])).unwrap();

    let reader = CheckpointReader::open(&path).unwrap();
    let state = reader.read_blob("device-state").unwrap();
    let source = Filtered {
        source: CheckpointSource::new(reader, 1 << 20, Arc::new(Metrics::default())),
        handler,
        applied: OnceLock::new(),
    };
    let uffd = Uffd::new().unwrap();
    #[expect(unsafe_code, reason = "who registers memory promises what it is")]
    // SAFETY: `memory` was just mapped, nobody has touched it, and it outlives the restore.
    let regions = unsafe { uffd.register_vm_memory(&*memory, PAGE as u64) }.unwrap();
    let mut options = VmOptions::default();
    options.prefetch = Prefetch::Everything;
    let vm = Vm::start(Arc::new(source), uffd, &regions, options).unwrap();
    STARTED.store(true, Ordering::Release);
    while !DONE.load(Ordering::Acquire) {
        std::hint::spin_loop();
    }
    vm.finish().unwrap();
    std::process::exit(if state == b"registers" { 0 } else { 1 });
}

fn eager(folder: &Path) {
    let bytes = fs::metadata(folder.join("ram")).unwrap().len();
    let mut ram = vec![0; usize::try_from(bytes).unwrap()];
    let path = folder.join("sonic");
    apply_filter(&filter_of(&[EAGER])).unwrap();
    let reader = CheckpointReader::open(&path).unwrap();
    let target = RestoreRegions::new(vec![(Gpa::ZERO, &mut ram)], Before::Zeroes).unwrap();
    let options = RestoreOptions::new()
        .threads(NonZeroUsize::new(2).unwrap())
        .stop(Stop::at(Instant::now() + Duration::from_secs(600)));
    reader.restore(&target, &options).unwrap();
    drop(target);
    let some = ram.iter().any(|byte| *byte != 0);
    std::process::exit(if some { 0 } else { 1 });
}

/// Runs the child's operation: it ends the process.
fn run(operation: &str, folder: &Path) {
    match operation {
        START => lazy(folder),
        EAGER => eager(folder),
        SAVE => {
            let memory = guest(folder);
            let analysis = look(&memory);
            let out = tempfile::tempfile_in(folder).unwrap();
            apply_filter(&filter_of(&[SAVE])).unwrap();
            save(&memory, &analysis, out);
            std::process::exit(0);
        }
        CLASSIFY => {
            let memory = guest(folder);
            apply_filter(&filter_of(&[CLASSIFY])).unwrap();
            let free = look(&memory).plan(&DropClasses::default()).dropped_bytes();
            std::process::exit(if free > 0 { 0 } else { 1 });
        }
        other => panic!("{other}"),
    }
}

/// No test: what the tests below start again, in a process of its own.
#[test]
fn child() {
    if let Ok(operation) = std::env::var(OPERATION) {
        run(&operation, Path::new(&std::env::var(FOLDER).unwrap()));
    }
}

fn in_child(operation: &str, folder: &Path, without: &str) -> ExitStatus {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["child", "--exact", "--nocapture", "--test-threads=1"]);
    command
        .env(OPERATION, operation)
        .env(FOLDER, folder)
        .env(WITHOUT, without);
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.signal().is_some() || output.status.success(),
        "{operation}: {said}"
    );
    output.status
}

#[test]
fn what_the_docs_list_is_what_is_called() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    unpack(folder);
    let memory = guest(folder);
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(folder.join("sonic"));
    save(&memory, &look(&memory), file.unwrap());
    drop(memory);
    let listed = listed();
    let names: Vec<&str> = listed.keys().map(String::as_str).collect();
    assert_eq!(
        BTreeSet::from_iter(names),
        BTreeSet::from([START, HANDLER, PROCESSOR, EAGER, SAVE, CLASSIFY])
    );
    for operation in [START, EAGER, SAVE, CLASSIFY] {
        let status = in_child(operation, folder, "");
        assert!(
            status.success(),
            "{operation}: {status}: a call that is not listed; `strace -f` shows which"
        );
        let mut always = listed[operation].always.clone();
        if operation == START {
            always.extend(listed[HANDLER].always.clone());
        }
        for call in always {
            let status = in_child(operation, folder, &call);
            let signal = status.signal();
            assert_eq!(
                signal,
                Some(BAD_CALL),
                "{operation} without {call}: {status}"
            );
        }
    }
}
