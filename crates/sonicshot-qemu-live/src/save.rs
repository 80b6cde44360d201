//! A running guest, saved.

use crate::disks::{Disks, OnPinned, PinnedDisk};
use crate::error::QemuError;
use crate::find::{self, Blocks, Found};
use crate::memory::{AsItIs, LiveMemory, bytes_of};
use crate::process::Process;
use crate::qmp::{PATIENCE, QemuVersion, Qmp, Until};
use crate::record::{self, Block, Record};
use crate::refuse::{self, Running};
use crate::tables;
use crate::watchdog::Watchdog;
use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::fs::{MemfdFlags, Mode, OFlags, memfd_create, open};
use serde_json::{Value, json};
use sonicshot::checkpoint::{
    CheckpointInfo, CheckpointWriter, DiskHash, OnDisks, SaveOptions, SaveStats,
};
use sonicshot::work::threads;
use sonicshot::{
    DropClasses, GpaRange, GuestMemory, PageSize, Progress, PrunePlan, Stop, WorkPhase,
};
use sonicshot_dump::{DiskImage, NewFile, Overwrite, available_memory};
use sonicshot_vmi::{Analysis, AnalysisOptions, GuestOptions, Note, VmiError, analyze};
use std::fs::File;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Builder;
use std::time::{Duration, Instant};

/// The number of times that a running guest is looked at, until it is understood once.
const LOOKS: u32 = 4;
/// The longest that all of that may take: a guest that changes meanwhile may have all memory searched.
const LOOKING: Duration = Duration::from_secs(4);
/// Memory that a copy leaves to the machine, and to the writing of the checkpoint, in bytes.
const SPARE: u64 = 256 << 20;
/// The blob that other readers of checkpoints look for.
const VMCOREINFO: &str = "vmcoreinfo";

/// The state of a guest after its save.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum AfterSave {
    /// It runs on as soon as its memory is copied, unless it was found paused.
    #[default]
    Resume,
    /// It stays paused.
    Stop,
    /// Its QEMU ends, once the checkpoint is on the disk and has its name.
    Quit,
}

/// Options for saving a running guest.
#[derive(Debug)]
#[non_exhaustive]
pub struct LiveSaveOptions {
    /// The state that it is left in.
    pub after: AfterSave,
    /// Options for writing the checkpoint, and who is told how far it is: from the first look on. While
    /// the guest is paused by the save, they are told of nothing but bytes that are copied, and should
    /// return at once.
    pub writing: SaveOptions,
    /// Whether a file that exists is replaced.
    pub overwrite: Overwrite,
    /// Files with symbols and types of the guest's kernel, which need not be given.
    pub symbols: Vec<PathBuf>,
    /// The longest that the guest is paused. If that is not enough it runs on, and nothing is saved. Of
    /// a guest that does not run on, until its memory is copied.
    pub max_pause: Duration,
    /// QEMU's process, if it is not the one that opened the monitor's socket.
    pub pid: Option<i32>,
    /// A command that calls [`watch`](crate::watch) with its standard input and output, and does
    /// nothing else: it lets the guest run on if this process dies while the guest is paused.
    pub watchdog: Option<Command>,
    /// The memory that the copy of the guest's may take at most, in bytes, if that is less than the
    /// machine, or a cgroup's limit, has left. A guest that is found paused is not copied.
    pub copy_limit: Option<u64>,
    /// Disks that are pinned in the pause, by what QEMU calls them, each with the file that becomes its
    /// overlay, and must not be there: pages that are the same on the disk below are not stored.
    pub disks: Vec<(String, PathBuf)>,
    /// The hash that is kept of pages on disks.
    pub disk_hash: DiskHash,
}

impl Default for LiveSaveOptions {
    fn default() -> Self {
        Self {
            after: AfterSave::default(),
            writing: SaveOptions::default(),
            overwrite: Overwrite::Refuse,
            symbols: Vec::new(),
            max_pause: Duration::from_secs(5),
            pid: None,
            watchdog: None,
            copy_limit: None,
            disks: Vec::new(),
            disk_hash: DiskHash::default(),
        }
    }
}

impl LiveSaveOptions {
    /// The defaults.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Says in which state the guest is left.
    #[must_use]
    pub fn after(mut self, after: AfterSave) -> Self {
        self.after = after;
        self
    }

    /// Says how the checkpoint is written, and who is told how far it is.
    #[must_use]
    pub fn writing(mut self, writing: SaveOptions) -> Self {
        self.writing = writing;
        self
    }

    /// Says whether a file that exists is replaced.
    #[must_use]
    pub fn overwrite(mut self, overwrite: Overwrite) -> Self {
        self.overwrite = overwrite;
        self
    }

    /// Adds a file with symbols and types of the guest's kernel.
    #[must_use]
    pub fn symbols(mut self, path: impl AsRef<Path>) -> Self {
        self.symbols.push(path.as_ref().to_owned());
        self
    }

    /// Says how long the guest is paused at most.
    #[must_use]
    pub fn max_pause(mut self, max_pause: Duration) -> Self {
        self.max_pause = max_pause;
        self
    }

    /// Says how many bytes of memory the copy of the guest's may take at most.
    #[must_use]
    pub fn copy_limit(mut self, copy_limit: u64) -> Self {
        self.copy_limit = Some(copy_limit);
        self
    }

    /// Says which process is QEMU.
    #[must_use]
    pub fn pid(mut self, pid: i32) -> Self {
        self.pid = Some(pid);
        self
    }

    /// Gives the command that lets the guest run on if this process dies.
    #[must_use]
    pub fn watchdog(mut self, command: Command) -> Self {
        self.watchdog = Some(command);
        self
    }

    /// Adds a disk that is pinned in the pause, by what QEMU calls it, with the file that becomes its
    /// overlay.
    #[must_use]
    pub fn disk(mut self, name: impl Into<String>, overlay: impl AsRef<Path>) -> Self {
        self.disks.push((name.into(), overlay.as_ref().to_owned()));
        self
    }

    /// Says which hash is kept of pages on disks.
    #[must_use]
    pub fn disk_hash(mut self, hash: DiskHash) -> Self {
        self.disk_hash = hash;
        self
    }
}

/// The times that the parts of a pause took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PauseTimes {
    /// Until QEMU had stopped the guest.
    pub stop: Duration,
    /// Until QEMU had made overlays over the disks.
    pub pin: Duration,
    /// Until QEMU had written the state of its devices, and told the processors' registers.
    pub devices: Duration,
    /// Until what the first look had read was read again.
    pub reread: Duration,
    /// Until each page had its class. What the first look had found to be kept is copied meanwhile.
    pub classify: Duration,
    /// Until all that is kept was copied.
    pub copy: Duration,
    /// Until it was sure that the guest was paused all the time, and QEMU let it run on.
    pub resume: Duration,
}

/// The result of a save.
#[derive(Debug)]
#[non_exhaustive]
pub struct LiveSaved {
    /// QEMU's version.
    pub qemu: QemuVersion,
    /// Its process.
    pub pid: i32,
    /// The guest's machine.
    pub machine: String,
    /// The blocks of the guest's RAM: each with its name, its length in bytes, and its kind in
    /// words.
    pub ram: Vec<(String, u64, &'static str)>,
    /// The guest's kernel.
    pub release: String,
    /// The counts of the checkpoint's content.
    pub stats: SaveStats,
    /// The guest's RAM, in bytes.
    pub ram_bytes: u64,
    /// The bytes of it that were left out.
    pub dropped_bytes: u64,
    /// Whether the guest was paused already.
    pub found_paused: bool,
    /// From the first word to the monitor until the guest was to be paused.
    pub before_pause: Duration,
    /// From QEMU's event STOP to RESUME, if the guest was paused and runs on.
    pub paused: Option<Duration>,
    /// The parts of the pause.
    pub times: PauseTimes,
    /// From the first word to the monitor until the file had its name.
    pub took: Duration,
    /// The reason why the first look failed, while the guest ran; that is no harm.
    pub first_look: Option<VmiError>,
    /// The disks that were pinned, and that QEMU writes to by overlays since.
    pub disks: Vec<PinnedDisk>,
    /// Facts of its guest that are worth knowing.
    pub notes: Vec<Note>,
}

/// Saves the guest of the QEMU whose monitor is at `monitor` as a checkpoint at `path`, without the
/// pages that it does not use. The file appears whole or not at all; whatever fails, the guest is
/// as it was.
///
/// The checkpoint has none of the guest's disks: they must be copied, or a snapshot be made of
/// them, as they are in the pause. [`disks`](LiveSaveOptions::disks) does that: between the stop and the
/// copy of the memory QEMU is given overlays, and what is below them is as the memory knows it. It stays
/// so also if the save fails then, which the error says ([`QemuError::Disks`]).
///
/// # Errors
/// [`QemuError`]: QEMU cannot be reached or understood, the guest is not one that is saved or was
/// not understood, it would have been paused for too long, or writing fails.
pub fn save(monitor: &Path, path: &Path, options: LiveSaveOptions) -> Result<LiveSaved, QemuError> {
    let began = Instant::now();
    let out = NewFile::create_new(path, options.overwrite)?;
    let mut session = Session::open(monitor, options)?;
    session.tell_of_copy();
    let before_pause = began.elapsed();
    let paused = session.pause()?;
    let frozen = session.frozen(paused);
    let written = frozen.and_then(|frozen| {
        let stats = frozen.write(&mut session, out.file(), path)?;
        if session.running == Running::Paused {
            // It was read until now.
            session.still_paused()?;
        }
        out.finish_told(&session.options.writing.progress)?;
        Ok((frozen, stats))
    });
    let (frozen, stats) = match written {
        Ok(written) => written,
        Err(error) => {
            session.let_go();
            return Err(session.disks.told(error));
        }
    };
    session.end(&frozen, stats, (began, before_pause))
}

/// A save under way.
struct Session {
    options: LiveSaveOptions,
    qmp: Qmp,
    process: Arc<Process>,
    machine: String,
    found: Vec<Found>,
    memory: LiveMemory,
    watchdog: Option<Watchdog>,
    running: Running,
    devices: DeviceFile,
    disks: Disks,
    threads: NonZeroUsize,
    /// Options for looking at the guest, with the symbol files that were given read already.
    looking: AnalysisOptions,
    /// The pages of the memory's copy that the first look read.
    touched: Vec<Range<usize>>,
    /// The pages that would have been kept by it.
    expected: Vec<Range<usize>>,
    first_look: Option<VmiError>,
    /// The small blocks' bytes, by the number of the block.
    small: Vec<(usize, Vec<u8>)>,
    /// The guest is paused by this.
    paused: bool,
    times: PauseTimes,
}

/// The guest as it was in the pause.
struct Frozen {
    analysis: Analysis,
    plan: PrunePlan,
    devices: Vec<u8>,
    pause: Option<Duration>,
}

/// The file that QEMU writes the state of its devices to.
struct DeviceFile {
    file: File,
    /// In QEMU's set of descriptors of this number.
    set: u64,
}

impl DeviceFile {
    fn new(qmp: &mut Qmp) -> Result<Self, QemuError> {
        let failed = QemuError::system("making a file in memory");
        let file = memfd_create("sonicshot-devices", MemfdFlags::CLOEXEC);
        let file = File::from(file.map_err(|error| failed(error.into()))?);
        // QEMU takes a descriptor only if it is opened as it would open the file.
        let own = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let writing: OwnedFd =
            open(own, flags, Mode::empty()).map_err(|error| failed(error.into()))?;
        let set = qmp.add_fd(&writing)?;
        Ok(Self { file, set })
    }

    /// Has QEMU write it; what it wrote.
    fn take(&self, qmp: &mut Qmp, until: &Until) -> Result<Vec<u8>, QemuError> {
        const COMMAND: &str = "xen-save-devices-state";
        let name = format!("/dev/fdset/{}", self.set);
        let arguments = json!({"filename": name, "live": false});
        qmp.run_until(COMMAND, arguments, &[], until)?;
        let failed = QemuError::system("reading the state of QEMU's devices");
        let len = self.file.metadata().map_err(&failed)?.len();
        let unknown = |found: String| QemuError::Unknown {
            what: COMMAND,
            found,
            expected: "QEVM, version 3, sections of devices, 00",
        };
        let sound = usize::try_from(len)
            .ok()
            .filter(|_| len <= record::MAX_DEVICES);
        let mut bytes = vec![0; sound.ok_or_else(|| unknown(format!("{len} bytes")))?];
        self.file.read_exact_at(&mut bytes, 0).map_err(&failed)?;
        if !record::is_device_state(&bytes) {
            return Err(unknown(format!("{len} bytes that are something else")));
        }
        Ok(bytes)
    }
}

impl Session {
    /// All that can be done while the guest runs.
    fn open(monitor: &Path, mut options: LiveSaveOptions) -> Result<Self, QemuError> {
        let mut qmp = Qmp::connect(monitor, PATIENCE)?;
        let running = refuse::running(&mut qmp)?;
        refuse::check(&mut qmp)?;
        let pid = match options.pid {
            Some(pid) => pid,
            None => rustix::net::sockopt::socket_peercred(qmp.socket())
                .map_err(|error| QemuError::system("asking who opened the monitor")(error.into()))?
                .pid
                .as_raw_nonzero()
                .get(),
        };
        let process = Arc::new(Process::open(pid)?);
        let machine = find::machine(&mut qmp)?;
        let blocks = Blocks::ask(&mut qmp)?;
        let found = find::find(&mut qmp, &blocks, &process)?;
        let memory = LiveMemory::new(find::segments(&found)?)?;
        let devices = DeviceFile::new(&mut qmp)?;
        let disks = Disks::find(&mut qmp, pid, &options.disks)?;
        let watchdog = options.watchdog.take();
        let watchdog = watchdog.map(|command| Watchdog::start(command, qmp.socket()));
        let mut guest = GuestOptions::new();
        for path in &options.symbols {
            guest = guest.symbols(path);
        }
        let guest = guest.read_symbols().map_err(QemuError::Guest)?;
        let small = found
            .iter()
            .enumerate()
            .filter(|(_, one)| one.pieces.is_none());
        let small = small.map(|(number, one)| Ok((number, vec![0; size(one.block.used)?])));
        let small = small.collect::<Result<Vec<_>, QemuError>>()?;
        let mut new = Self {
            threads: threads(options.writing.threads),
            looking: AnalysisOptions::new().guest(guest).zero_pages(false),
            options,
            machine,
            small,
            memory,
            watchdog: watchdog.transpose()?,
            running,
            devices,
            disks,
            process,
            found,
            qmp,
            touched: Vec::new(),
            expected: Vec::new(),
            first_look: None,
            paused: false,
            times: PauseTimes::default(),
        };
        if running == Running::Yes {
            new.look_first()?;
        }
        Ok(new)
    }

    fn looking_until(&self, until: &Until) -> AnalysisOptions {
        let mut looking = self.looking.clone();
        // Whoever is told must not hold up a guest that waits.
        if let (Some(progress), false) = (&self.options.writing.progress, self.paused) {
            looking = looking.progress(Arc::clone(progress));
        }
        match until.end() {
            Some(end) => looking.stop(Stop::at(end)),
            None => looking,
        }
    }

    /// Tells that a guest that runs is copied next, and how much that is likely to be.
    fn tell_of_copy(&self) {
        let progress = &self.options.writing.progress;
        if self.running == Running::Yes {
            progress.begin(WorkPhase::Copying);
            progress.tell(0, bytes_of(&self.expected));
        }
    }

    fn processors(&mut self) -> Result<Vec<sonicshot::Processor>, QemuError> {
        tables::processors(&self.qmp.human("info registers -a")?)
    }

    /// Looks at the guest while it runs, so that in the pause it is known what will be read. What
    /// comes of it is good for nothing else.
    fn look_first(&mut self) -> Result<(), QemuError> {
        let until = Until::new(LOOKING);
        for _ in 0..LOOKS {
            let processors = self.processors()?;
            self.memory.clear(processors);
            let looked = analyze(&self.memory, &self.looking_until(&until));
            self.touched = self.memory.touched();
            match looked {
                Ok(analysis) => {
                    let plan = analysis.plan(&DropClasses::default());
                    let kept = self.kept(&plan);
                    self.check_room(&kept)?;
                    self.memory.prepare(&self.touched);
                    self.memory.prepare(&kept);
                    self.expected = kept;
                    self.first_look = None;
                    return Ok(());
                }
                // What changes under the eyes contradicts itself.
                Err(error) => self.first_look = Some(error),
            }
        }
        Ok(())
    }

    /// The pages of the memory's copy that a plan keeps.
    fn kept(&self, plan: &PrunePlan) -> Vec<Range<usize>> {
        let regions = self.memory.layout().regions().iter();
        self.memory
            .pages(regions.flat_map(|region: &GpaRange| plan.kept_in(*region)))
    }

    /// Whether there is memory for a copy of these pages. If not, somebody would be killed for it, who
    /// may well be the guest.
    fn check_room(&self, pages: &[Range<usize>]) -> Result<(), QemuError> {
        let left = available_memory().and_then(|left| left.max(SPARE).checked_sub(SPARE));
        let taken = self.memory.taken();
        let allowed = self.options.copy_limit;
        let allowed = allowed.and_then(|limit| limit.max(taken).checked_sub(taken));
        let room = left.into_iter().chain(allowed).min();
        let needed = self.memory.missing(pages);
        match room {
            Some(room) if needed > room => Err(QemuError::NoRoom { needed, room }),
            _ => Ok(()),
        }
    }

    /// The memory that is written: the copy of it, or of a guest that was found paused, and so has no
    /// need of one, itself.
    fn source(&self) -> Box<dyn GuestMemory + '_> {
        match self.running {
            Running::Yes => Box::new(&self.memory),
            Running::Paused => Box::new(AsItIs(&self.memory)),
        }
    }

    /// The longest that the guest may be paused.
    fn allowed(&self) -> Duration {
        match self.running {
            Running::Yes => self.options.max_pause,
            // It was before.
            Running::Paused => Duration::from_secs(3600),
        }
    }

    /// Pauses the guest, if it runs.
    fn pause(&mut self) -> Result<Until, QemuError> {
        let until = Until::new(self.allowed());
        if self.running == Running::Paused {
            return Ok(until);
        }
        if let Some(watchdog) = &self.watchdog {
            watchdog.arm(Some(self.options.max_pause))?;
        }
        self.paused = true;
        let until = Until::new(self.allowed());
        let began = Instant::now();
        let stopped = self.qmp.run_until("stop", Value::Null, &[], &until);
        self.times.stop = began.elapsed();
        match stopped {
            Ok(_) => Ok(until),
            Err(error) => {
                self.let_go();
                Err(error)
            }
        }
    }

    /// Copies what is kept of a guest that is paused, and lets it run on if it shall.
    fn frozen(&mut self, until: Until) -> Result<Frozen, QemuError> {
        // The disks first: what the memory knows of them is then below the overlays, whatever comes.
        let began = Instant::now();
        self.disks.pin(&mut self.qmp, &until)?;
        self.times.pin = began.elapsed();
        let devices = self.in_pause("writing the state of devices", &until, |session| {
            session.devices.take(&mut session.qmp, &until)
        })?;
        let (analysis, plan) = self.copied(&until)?;
        let began = Instant::now();
        let in_time = match &self.watchdog {
            Some(watchdog) if self.paused => watchdog.commit()?,
            _ => until.left().is_some(),
        };
        if !in_time {
            return Err(self.too_long("copying its memory"));
        }
        self.still_paused()?;
        if self.running == Running::Yes {
            self.memory.close();
        }
        let pause = match self.options.after {
            AfterSave::Resume if self.paused => {
                self.resume()?;
                self.times.resume = began.elapsed();
                self.qmp.catch_up();
                let (stop, resume) = (self.qmp.last("STOP"), self.qmp.last("RESUME"));
                resume
                    .zip(stop)
                    .and_then(|(resume, stop)| resume.checked_sub(stop))
            }
            _ => None,
        };
        Ok(Frozen {
            analysis,
            plan,
            devices,
            pause,
        })
    }

    /// The guest's classes, once all that is kept by them is copied.
    fn copied(&mut self, until: &Until) -> Result<(Analysis, PrunePlan), QemuError> {
        let processors = self.in_pause("asking for registers", until, |session| {
            session.same_blocks()?;
            session.processors()
        })?;
        self.memory.clear(processors);
        let go_on = || until.left().is_some();
        let mut began = Instant::now();
        let mut lap = || {
            let took = began.elapsed();
            began = Instant::now();
            took
        };
        if !self.memory.load(&self.touched, self.threads, &go_on)? {
            return Err(self.too_long("reading its kernel's records"));
        }
        let reread = lap();
        let analysis = self.analyzed(until).map_err(|error| match error {
            VmiError::Stopped(_) => self.too_long("looking at its kernel"),
            error => QemuError::Guest(error),
        })?;
        let plan = analysis.plan(&DropClasses::default());
        let classify = lap();
        if self.running == Running::Yes {
            let kept = self.kept(&plan);
            self.check_room(&kept)?;
            let progress = &self.options.writing.progress;
            let load = self.memory.load_told(&kept, self.threads, &go_on, progress);
            if !load? {
                return Err(self.too_long("copying its memory"));
            }
        }
        for (number, bytes) in &mut self.small {
            let Some(one) = self.found.get(*number) else {
                continue;
            };
            let read = one.backing.read(0, bytes);
            read.map_err(|source| QemuError::Process {
                action: "reading a block of memory",
                pid: self.process.pid(),
                source,
            })?;
        }
        (self.times.reread, self.times.classify, self.times.copy) = (reread, classify, lap());
        Ok((analysis, plan))
    }

    /// The guest's classes. Meanwhile what is likely to be kept is copied, as far as that gets.
    fn analyzed(&self, until: &Until) -> Result<Analysis, VmiError> {
        let over = AtomicBool::new(false);
        let go_on = || until.left().is_some() && !over.load(Ordering::Relaxed);
        std::thread::scope(|scope| {
            // What cannot be read is met again if it is kept; and without a thread it is copied later.
            let copy = || {
                let _ = self.memory.load(&self.expected, NonZeroUsize::MIN, &go_on);
            };
            let _ = Builder::new().spawn_scoped(scope, copy);
            let analysis = analyze(&self.memory, &self.looking_until(until));
            over.store(true, Ordering::Relaxed);
            analysis
        })
    }

    /// Does what QEMU must do in time.
    fn in_pause<T>(
        &mut self,
        doing: &'static str,
        until: &Until,
        work: impl FnOnce(&mut Self) -> Result<T, QemuError>,
    ) -> Result<T, QemuError> {
        let began = Instant::now();
        let done = work(self);
        self.times.devices = self.times.devices.saturating_add(began.elapsed());
        match done {
            Err(QemuError::Silent { .. }) if until.left().is_none() => Err(self.too_long(doing)),
            done => done,
        }
    }

    fn too_long(&self, doing: &'static str) -> QemuError {
        QemuError::PausedTooLong {
            allowed: self.allowed(),
            doing,
        }
    }

    /// Whether the guest's memory is made of what it was made of before.
    fn same_blocks(&mut self) -> Result<(), QemuError> {
        let now = tables::ram_blocks(&self.qmp.human("info ramblock")?)?;
        if now.iter().eq(self.found.iter().map(|one| &one.block)) {
            return Ok(());
        }
        Err(QemuError::not_this(
            "the guest's blocks of memory have changed between the first look and the pause: try \
             again",
        ))
    }

    /// Whether nobody else, at another monitor, has let the guest run on, or reset it, since it was
    /// stopped: then what was copied is of several moments.
    fn still_paused(&mut self) -> Result<(), QemuError> {
        let now = refuse::running(&mut self.qmp)?;
        let moved = ["RESUME", "RESET"];
        let moved = moved.into_iter().find(|name| match self.qmp.last("STOP") {
            Some(stop) => self.qmp.last(name).is_some_and(|at| at >= stop),
            None => self.qmp.last(name).is_some(),
        });
        if now == Running::Paused && moved.is_none() {
            return Ok(());
        }
        Err(QemuError::not_this(
            "somebody else has let the guest run on, or reset it, while it was copied: nothing was \
             saved",
        ))
    }

    /// Lets the guest run on.
    fn resume(&mut self) -> Result<(), QemuError> {
        self.qmp.run("cont", Value::Null)?;
        self.paused = false;
        if let Some(watchdog) = &self.watchdog {
            watchdog.done();
        }
        Ok(())
    }

    /// Behind a failure: the guest is as it was. If the monitor does not answer, that is left to
    /// the watchdog, which sees that this process has no more to say.
    fn let_go(&mut self) {
        if self.paused && self.resume().is_err() {
            self.watchdog = None;
        }
    }

    /// The file is there.
    fn end(
        mut self,
        frozen: &Frozen,
        stats: SaveStats,
        (began, before_pause): (Instant, Duration),
    ) -> Result<LiveSaved, QemuError> {
        let took = began.elapsed();
        match self.options.after {
            AfterSave::Resume | AfterSave::Stop => {}
            AfterSave::Quit => match self.qmp.run("quit", Value::Null) {
                Ok(_) | Err(QemuError::Gone { .. }) => {}
                Err(error) => return Err(error),
            },
        }
        if let Some(watchdog) = &self.watchdog {
            watchdog.done();
        }
        let ram = self.found.iter().filter(|one| one.pieces.is_some());
        let ram = ram.map(|one| (one.block.name.clone(), one.block.used, one.backing.kind()));
        Ok(LiveSaved {
            qemu: self.qmp.version(),
            pid: self.process.pid(),
            ram: ram.collect(),
            machine: self.machine,
            release: frozen.analysis.facts().release.clone(),
            ram_bytes: self.memory.layout().bytes(),
            dropped_bytes: frozen.plan.dropped_bytes(),
            stats,
            found_paused: self.running == Running::Paused,
            before_pause,
            paused: frozen.pause,
            times: self.times,
            took,
            first_look: self.first_look,
            disks: self.disks.all().to_vec(),
            notes: frozen.analysis.notes().to_vec(),
        })
    }
}

impl Frozen {
    /// Writes the checkpoint.
    fn write(
        &self,
        session: &mut Session,
        out: &File,
        path: &Path,
    ) -> Result<SaveStats, QemuError> {
        let images = session.disks.open(&mut session.qmp)?;
        let session = &*session;
        let source = session.source();
        let map = self.analysis.pages();
        let on_disks = OnPinned::find(
            session.disks.all(),
            &images,
            session.options.disk_hash,
            (&*source, map, &self.plan),
            &session.options.writing,
            path,
        )?;
        let failed = QemuError::checkpoint(path);
        let facts = self.analysis.facts();
        let layout = session.memory.layout().clone();
        let mut info = CheckpointInfo::new(layout, PageSize::SIZE_4K);
        info.architecture = facts.architecture;
        info.kernel_release = Some(facts.release.clone());
        info.build_id.clone_from(&facts.build_id);
        info.vmm = Some(format!("QEMU {}", session.qmp.version()));
        info.disks.clone_from(&on_disks.infos);
        let writing = session.options.writing.clone();
        let mut writer = CheckpointWriter::new(out, info, writing).map_err(&failed)?;
        if let Some(text) = &facts.vmcoreinfo {
            writer.blob(VMCOREINFO, text.as_bytes()).map_err(&failed)?;
        }
        self.write_blobs(session, &mut writer, path)?;
        let disks = OnDisks {
            disks: &on_disks.sources,
            guesses: &on_disks.guesses,
        };
        let written = writer.memory_on_disks(&*source, map, &self.plan, &disks);
        written.map_err(&failed)?;
        let (_, stats) = writer.finish().map_err(&failed)?;
        images.iter().try_for_each(DiskImage::check_unchanged)?;
        Ok(stats)
    }

    /// The parts of the guest that are not its RAM.
    fn write_blobs(
        &self,
        session: &Session,
        writer: &mut CheckpointWriter<&File>,
        path: &Path,
    ) -> Result<(), QemuError> {
        let failed = QemuError::checkpoint(path);
        let mut blocks = Vec::new();
        for (number, one) in session.found.iter().enumerate() {
            let mut runs = Vec::new();
            let small = session.small.iter().find(|(small, _)| *small == number);
            if let Some((_, bytes)) = small {
                let (pages, kept) = record::pack(bytes);
                if !pages.is_empty() {
                    let name = record::blob_of(number);
                    writer.blob(&name, kept.as_slice()).map_err(&failed)?;
                }
                runs = pages;
            }
            blocks.push(Block {
                block: one.block.clone(),
                pieces: one.pieces.clone(),
                runs,
            });
        }
        let record = Record {
            version: record::VERSION,
            qemu: session.qmp.version().to_string(),
            machine: session.machine.clone(),
            paused: session.running == Running::Paused,
            blocks,
        };
        let text = serde_json::to_vec(&record);
        let text = text.map_err(|error| QemuError::System {
            action: "writing the record of QEMU's blocks",
            source: error.into(),
        })?;
        writer
            .blob(record::RECORD, text.as_slice())
            .map_err(&failed)?;
        writer
            .blob(record::DEVICES, self.devices.as_slice())
            .map_err(&failed)?;
        Ok(())
    }
}

fn size(bytes: u64) -> Result<usize, QemuError> {
    usize::try_from(bytes).map_err(|_| QemuError::not_this("a block is longer than this process"))
}
