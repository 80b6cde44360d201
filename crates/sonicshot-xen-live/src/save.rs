//! The work of `xl save`, without the domain's free pages.

use crate::checkpoint;
use crate::copied::{Begin, Copied, PIECE};
use crate::mappings::Mappings;
use crate::watcher::Watcher;
use crate::xl::Xl;
use crate::{Choice, DomainId, FrameRuns, LiveDomain, LiveError, SaveFilter, Xen, path_of};
use rustix::pipe::fcntl_setpipe_size;
use sonicshot::checkpoint::DiskHash;
use sonicshot::{
    DropClasses, Gpa, GuestMemory, PageSize, Progress, ProgressRelay, Stop, Stoppable, Tally,
    WorkPhase,
};
use sonicshot_dump::{DumpOptions, NewFile, Overwrite, available_memory};
use sonicshot_offline::packed::{self, ImageCompression};
use sonicshot_vmi::{AnalysisOptions, GuestOptions, Note, analyze, find_vmcoreinfo};
use std::fs::File;
use std::io::{self, PipeReader, Read};
use std::os::unix::process::CommandExt;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const PAGE: PageSize = PageSize::SIZE_4K;
/// The interval at which the image's length is looked at.
const EVERY: Duration = Duration::from_millis(100);
/// The time for which a domain that runs is looked at: where there is no VMCOREINFO all memory would be
/// searched.
const LOOKING: Duration = Duration::from_secs(10);
/// So much of the image of a domain that does not go on waits to be packed, in bytes.
const PACKED_BESIDE: u64 = 16 << 20;

/// The state of a domain after its save.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum AfterSave {
    /// It is destroyed, once its image is on the disk and has its name.
    #[default]
    Destroy,
    /// It stays paused.
    Pause,
    /// It goes on as soon as its memory is written.
    GoOn,
}

/// The compression of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Compress {
    /// By LZ4, if that is measured to cost no time on the image's disk; else not at all.
    #[default]
    IfFree,
    /// Not at all: `xl restore` takes it as it is.
    No,
    /// So; [`restore`](crate::restore) takes it as it is.
    By(ImageCompression),
}

/// Options for saving a domain.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct SaveOptions {
    /// The state that it is left in.
    pub after: AfterSave,
    /// The compression of the image.
    pub compress: Compress,
    /// The most bytes of the image that are held in memory if the domain goes on: so far it need not
    /// wait for packing and disk. Half of the memory that this machine has to give, if nothing is said.
    pub copy_limit: Option<u64>,
    /// Whether a file that exists is replaced.
    pub overwrite: Overwrite,
    /// Files with symbols and types of the guest's kernel, which need not be given.
    pub symbols: Vec<PathBuf>,
    /// The domain's disks: a checkpoint's name for each, and its image. If there are any, a checkpoint is
    /// written, which refers to them.
    pub disks: Vec<(String, PathBuf)>,
    /// The hash that a checkpoint keeps of pages on disks.
    pub disk_hash: DiskHash,
    /// Whoever is told how far it is: of the looks at the domain, then in bytes of the image.
    pub progress: Option<Arc<dyn Progress>>,
}

impl Default for SaveOptions {
    fn default() -> Self {
        Self {
            after: AfterSave::default(),
            compress: Compress::default(),
            copy_limit: None,
            overwrite: Overwrite::Refuse,
            symbols: Vec::new(),
            disks: Vec::new(),
            disk_hash: DiskHash::default(),
            progress: None,
        }
    }
}

impl SaveOptions {
    /// The defaults.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Says in which state the domain is left.
    #[must_use]
    pub fn after(mut self, after: AfterSave) -> Self {
        self.after = after;
        self
    }

    /// Says how the image is compressed.
    #[must_use]
    pub fn compress(mut self, compress: Compress) -> Self {
        self.compress = compress;
        self
    }

    /// Says how much of the image of a domain that goes on is held in memory, in bytes.
    #[must_use]
    pub fn copy_limit(mut self, bytes: u64) -> Self {
        self.copy_limit = Some(bytes);
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

    /// Has a checkpoint be written, which refers to pages that are the same on the domain's disk `name`, of
    /// which `path` is an image. A domain that does not go on may have it open, for it is compared once the
    /// domain is suspended. One that goes on must not: it would write over what is referred to.
    #[must_use]
    pub fn disk(mut self, name: impl Into<String>, path: impl AsRef<Path>) -> Self {
        self.disks.push((name.into(), path.as_ref().to_owned()));
        self
    }

    /// Says which hash a checkpoint keeps of pages on disks.
    #[must_use]
    pub fn disk_hash(mut self, hash: DiskHash) -> Self {
        self.disk_hash = hash;
        self
    }

    /// Says who is told how far it is.
    #[must_use]
    pub fn progress(mut self, progress: Arc<dyn Progress>) -> Self {
        self.progress = Some(progress);
        self
    }
}

/// The result of a look at a domain.
#[derive(Debug)]
#[non_exhaustive]
pub struct Look {
    /// Its kernel's release.
    pub release: String,
    /// The number of its pages.
    pub total_pages: u64,
    /// The frames that were left out.
    pub frames: FrameRuns,
    /// Notes on its guest.
    pub notes: Vec<Note>,
}

impl Look {
    fn kept_bytes(&self) -> u64 {
        let kept = Tally::new(self.total_pages).without(self.frames.len());
        kept.times(PAGE.bytes()).get()
    }
}

/// The look at a domain while it still runs: where its list of frames and its kernel are, so that they are
/// mapped, and not searched for, once it is suspended. Nothing of it is believed then.
#[derive(Debug)]
#[non_exhaustive]
pub struct FirstLook {
    /// The time that it took.
    pub took: Duration,
    /// The reason why it came to nothing; that is no harm.
    pub error: Option<LiveError>,
}

/// The look at a domain.
#[derive(Debug)]
#[non_exhaustive]
pub struct Looked {
    /// The look itself, or why there is none: then nothing was left out.
    pub result: Result<Look, LiveError>,
    /// The time when the domain was suspended.
    pub suspended: Instant,
    /// The time that the look took.
    pub took: Duration,
}

/// The result of a save.
#[derive(Debug)]
#[non_exhaustive]
pub struct Saved {
    /// The domain.
    pub domain: DomainId,
    /// The look at it while it ran.
    pub first_look: FirstLook,
    /// The look at it; `None` if Xen's save helper never asked for the types of frames.
    pub looked: Option<Looked>,
    /// The compression of the image.
    pub compression: Option<ImageCompression>,
    /// The measurements that it was chosen by, if nothing was asked for.
    pub choice: Option<Choice>,
    /// The length of the image, in bytes.
    pub file_bytes: u64,
    /// The time from the first call until the image was complete.
    pub took: Duration,
    /// The time that the domain was suspended: until it went on, or until then.
    pub suspended: Option<Duration>,
    /// What became of the checkpoint, if it is one.
    pub checkpoint: Option<sonicshot_offline::Saved>,
}

/// Has `xl` save the domain `name` (or of that number) to the file `path`, without the pages that
/// its guest does not use. The image appears whole or not at all. A domain that is not left running
/// is paused until the image is on the disk, and goes on if that fails, or if this process is killed
/// before: a shell that waits beside it unpauses the domain as soon as `xl` has ended.
///
/// If the options name disks, the image has no name, and a checkpoint is made of it while the domain is
/// paused, one that is to go on as well.
///
/// # Errors
/// [`LiveError`]: Xen or `xl` refuse, there is a file of this name, an image of a disk cannot be read, or
/// writing fails. A guest that cannot be looked at is none: it is saved in full.
pub fn save(name: &str, path: &Path, options: &SaveOptions) -> Result<Saved, LiveError> {
    let started = Instant::now();
    let xen = Xen::open()?;
    let domain = DomainId::find(name)?;
    let out = NewFile::create_new(path, options.overwrite)?;
    checkpoint::check_disks(options)?;
    let (compression, choice) = packing(&out, path, options)?;
    let work = Work {
        xen: &xen,
        domain,
        options,
        compression,
        path,
        relay: Arc::default(),
        expected: AtomicU64::new(0),
    };
    let tell = || {
        // Before the relay, which is told first that the image begins.
        let total = work.expected.load(Ordering::Acquire);
        work.relay.pass_on(&options.progress);
        if let (1.., Ok(file)) = (total, out.file().metadata()) {
            options.progress.tell(file.len(), total);
        }
    };
    let written = watched(&tell, || work.write(&out));
    let Written {
        first_look,
        looked,
        packed,
        watcher,
        ended,
    } = written?;
    if let total @ 1.. = work.expected.load(Ordering::Relaxed) {
        options.progress.tell(total, total);
    }
    // The domain stays paused until the image is on the disk and has its name.
    let finished = packed.and_then(|()| work.finish(out));
    let finished = match finished {
        Ok(finished) => finished,
        Err(error) => {
            drop(watcher);
            if work.is_paused() {
                // What it says is not what went wrong first.
                let _ = work.xl("unpause");
            }
            return Err(error);
        }
    };
    let complete = Instant::now();
    let went_on = match options.after {
        AfterSave::GoOn if work.is_paused() => {
            work.xl("unpause")?;
            Instant::now()
        }
        AfterSave::GoOn => ended,
        AfterSave::Destroy | AfterSave::Pause => complete,
    };
    drop(watcher);
    if options.after == AfterSave::Destroy {
        work.xl("destroy")?;
    }
    let suspended = looked.as_ref();
    Ok(Saved {
        domain,
        first_look,
        compression,
        choice,
        file_bytes: finished.file_bytes,
        took: complete.duration_since(started),
        suspended: suspended.map(|looked| went_on.duration_since(looked.suspended)),
        looked,
        checkpoint: finished.checkpoint,
    })
}

/// The compression of the image in `out`, which is to be at `path`, and what it was chosen by. One that
/// becomes a checkpoint is not compressed.
fn packing(
    out: &NewFile,
    path: &Path,
    options: &SaveOptions,
) -> Result<(Option<ImageCompression>, Option<Choice>), LiveError> {
    if !options.disks.is_empty() {
        return Ok((None, None));
    }
    Ok(match options.compress {
        Compress::No => (None, None),
        Compress::By(how) => (Some(how), None),
        Compress::IfFree => {
            let choice = Choice::make(out.file()).map_err(|source| LiveError::Io {
                action: "writing",
                path: path.to_owned(),
                source,
            })?;
            (choice.compression, Some(choice))
        }
    })
}

/// The file of a save.
struct Finished {
    file_bytes: u64,
    checkpoint: Option<sonicshot_offline::Saved>,
}

/// Half of what this machine has to give; nothing where it does not say.
pub(crate) fn half_of_memory() -> u64 {
    available_memory().map_or(0, |bytes| bytes >> 1)
}

/// Calls `tell` now and then while another thread does `work`, and once more behind it.
pub(crate) fn watched<T: Send>(
    tell: &dyn Fn(),
    work: impl FnOnce() -> Result<T, LiveError> + Send,
) -> Result<T, LiveError> {
    let watching = thread::current();
    let done = thread::scope(|scope| {
        let working = thread::Builder::new().spawn_scoped(scope, move || {
            let done = work();
            watching.unpark();
            done
        });
        let working = working.map_err(no_thread)?;
        while !working.is_finished() {
            tell();
            thread::park_timeout(EVERY);
        }
        tell();
        Ok::<_, LiveError>(working.join())
    });
    done?.unwrap_or_else(|panic| resume_unwind(panic))
}

fn no_thread(source: io::Error) -> LiveError {
    LiveError::Filter {
        action: "starting a thread for",
        source,
    }
}

/// The result of `xl`'s part of a save.
struct Written {
    first_look: FirstLook,
    looked: Option<Looked>,
    /// Whether packing failed.
    packed: Result<(), LiveError>,
    /// The process that watches over the domain until all is done.
    watcher: Option<Watcher>,
    /// The time when `xl` had ended: a domain that is to go on does.
    ended: Instant,
}

/// The outcome of a call of `xl`.
struct Ran {
    first_look: FirstLook,
    looked: Option<Looked>,
    ended: Instant,
}

/// The knowledge of a domain before it is suspended.
struct Before<'x> {
    mappings: Arc<Mappings<'x>>,
    options: GuestOptions,
    look: FirstLook,
}

/// A save that is under way.
struct Work<'a> {
    xen: &'a Xen,
    domain: DomainId,
    options: &'a SaveOptions,
    compression: Option<ImageCompression>,
    /// The image's name in messages.
    path: &'a Path,
    /// Told by the thread that looks at the domain, which waits for nobody.
    relay: Arc<ProgressRelay>,
    /// The longest that the image will be; 0 while that is not known.
    expected: AtomicU64,
}

impl<'a> Work<'a> {
    /// Has `xl` write the image to `out`. Once it has, the domain is paused, also if packing
    /// failed, and watched over.
    fn write(&self, out: &NewFile) -> Result<Written, LiveError> {
        let writing = |source| LiveError::Io {
            action: "writing",
            path: self.path.to_owned(),
            source,
        };
        let goes_on = !self.is_paused();
        if self.compression.is_none() && !goes_on {
            let watcher = self.watcher(None)?;
            let Ran {
                first_look,
                looked,
                ended,
            } = self.run(&path_of(out.file()))?;
            return Ok(Written {
                first_look,
                looked,
                packed: Ok(()),
                watcher,
                ended,
            });
        }
        let (mut from, to) = io::pipe().map_err(writing)?;
        // Else it holds less, and whoever reads and who writes are woken more often.
        let _ = fcntl_setpipe_size(&from, PIECE);
        let watcher = self.watcher(Some(&from))?;
        let copied = if goes_on {
            let limit = self.options.copy_limit.unwrap_or_else(half_of_memory);
            Copied::new(limit, Begin::Behind)
        } else {
            Copied::new(PACKED_BESIDE, Begin::AtOnce)
        };
        thread::scope(|scope| {
            let copied = &copied;
            let taking = thread::Builder::new().spawn_scoped(scope, move || copied.take(&mut from));
            taking.map_err(no_thread)?;
            let pack = move || self.pack(copied.given(), out.file());
            let packing = match thread::Builder::new().spawn_scoped(scope, pack) {
                Ok(packing) => packing,
                Err(error) => {
                    // Else the other would wait for what is written.
                    drop(to);
                    return Err(no_thread(error));
                }
            };
            let ran = self.run(&path_of(&to));
            // Nobody writes any more: the reader comes to the end.
            drop(to);
            let packed = packing
                .join()
                .unwrap_or_else(|_| Err(io::ErrorKind::Other.into()));
            let Ran {
                first_look,
                looked,
                ended,
            } = ran?;
            Ok(Written {
                first_look,
                looked,
                packed: packed.map_err(writing),
                watcher,
                ended,
            })
        })
    }

    fn pack(&self, mut given: impl Read, mut out: &File) -> io::Result<()> {
        match self.compression {
            Some(how) => packed::compress(how, given, out),
            None => io::copy(&mut given, &mut out).map(drop),
        }
    }

    /// Whether the domain is paused once `xl` has saved it.
    fn is_paused(&self) -> bool {
        self.options.after != AfterSave::GoOn || !self.options.disks.is_empty()
    }

    fn xl(&self, word: &str) -> Result<String, LiveError> {
        Xl::new(&[word, &self.domain.to_string()])?.run()
    }

    /// The watcher that has the domain go on if this process is killed. `xl save -c` does so by itself,
    /// as long as somebody reads what it writes.
    fn watcher(&self, pipe: Option<&PipeReader>) -> Result<Option<Watcher>, LiveError> {
        let goes_on = self.options.after == AfterSave::GoOn;
        match (self.is_paused(), pipe) {
            (false, None) => Ok(None),
            _ => Watcher::start(self.domain, self.path, pipe, self.after(), goes_on).map(Some),
        }
    }

    /// The option of `xl` that says what becomes of the domain.
    fn after(&self) -> &'static str {
        if self.is_paused() { "-p" } else { "-c" }
    }

    /// Gives the image its name, or makes a checkpoint of it.
    fn finish(&self, out: NewFile) -> Result<Finished, LiveError> {
        if !self.options.disks.is_empty() {
            let saved = checkpoint::write(out, self.path, self.options)?;
            return Ok(Finished {
                file_bytes: saved.stats.file_len,
                checkpoint: Some(saved),
            });
        }
        let file_bytes = out.file().metadata().map_or(0, |file| file.len());
        self.check(&out)?;
        out.finish_told(&self.options.progress)?;
        Ok(Finished {
            file_bytes,
            checkpoint: None,
        })
    }

    fn run(&self, target: &str) -> Result<Ran, LiveError> {
        let before = self.look_first();
        let mut xl = Xl::new(&["save", self.after(), &self.domain.to_string(), target])?;
        let filter = SaveFilter::new()?;
        filter.attach(&mut xl.command);
        // Ended by the terminal, xl would leave the domain suspended.
        xl.command.process_group(0);
        let mut child = xl.command.spawn().map_err(|source| xl.cannot_run(source))?;
        let mut looked = None;
        let status = filter.serve(&mut child, |domain| {
            let suspended = Instant::now();
            let result = self.look(domain, &before);
            let frames = match &result {
                Ok(look) => {
                    self.relay.begin(WorkPhase::Saving);
                    self.expected.store(look.kept_bytes(), Ordering::Release);
                    look.frames.clone()
                }
                Err(_) => FrameRuns::default(),
            };
            looked = Some(Looked {
                result,
                suspended,
                took: suspended.elapsed(),
            });
            frames
        })?;
        let ended = Instant::now();
        xl.ended(status)?;
        Ok(Ran {
            first_look: before.look,
            looked,
            ended,
        })
    }

    /// Looks at the domain while it runs.
    fn look_first(&self) -> Before<'a> {
        let began = Instant::now();
        let mappings = Arc::new(Mappings::new(self.xen, self.domain));
        let mut options = GuestOptions::new();
        for path in &self.options.symbols {
            options = options.symbols(path);
        }
        // What is wrong with a file is told when the domain is suspended.
        let options = options.clone().read_symbols().unwrap_or(options);
        let found = self.find(Arc::clone(&mappings));
        let (vmcoreinfo_at, error) = match found {
            Ok(at) => (at, None),
            Err(error) => (None, Some(error)),
        };
        Before {
            mappings,
            options: match vmcoreinfo_at {
                Some(at) => options.vmcoreinfo_at(at),
                None => options,
            },
            look: FirstLook {
                took: began.elapsed(),
                error,
            },
        }
    }

    /// Reads the domain's list of frames while it runs, and finds the page with its kernel's VMCOREINFO.
    fn find(&self, mappings: Arc<Mappings<'_>>) -> Result<Option<Gpa>, LiveError> {
        let domain = LiveDomain::running(mappings)?;
        let stop = Instant::now().checked_add(LOOKING);
        let stop = stop.map_or_else(Stop::new, Stop::at);
        let memory = Stoppable::new(&domain, stop);
        find_vmcoreinfo(&memory, &*self.relay).map_err(|source| LiveError::Memory {
            domain: self.domain,
            source,
        })
    }

    /// Looks for the free pages of a domain that is suspended.
    fn look(&self, id: DomainId, before: &Before<'a>) -> Result<Look, LiveError> {
        let failed = |source| LiveError::Guest { domain: id, source };
        let domain = if id == self.domain {
            LiveDomain::suspended(Arc::clone(&before.mappings))?
        } else {
            LiveDomain::open(self.xen, id)?
        };
        let options = before.options.clone();
        let options = AnalysisOptions::new().guest(options).zero_pages(false);
        let options = options.progress(Arc::clone(&self.relay) as Arc<dyn Progress>);
        let guest = analyze(&domain, &options).map_err(failed)?;
        let frames = domain.dropped(&guest.plan(&DropClasses::default()));
        Ok(Look {
            release: guest.facts().release.clone(),
            total_pages: domain.layout().bytes() >> PAGE.shift(),
            frames,
            notes: guest.notes().to_vec(),
        })
    }

    /// Whether the image is one that can be read, from its first record to its last. The disk has it
    /// meanwhile.
    fn check(&self, out: &NewFile) -> Result<(), LiveError> {
        if self.compression.is_some() {
            return Ok(());
        }
        thread::scope(|scope| {
            // What is wrong with that is told when it is done in the end; without a thread it is done
            // then.
            let _ = thread::Builder::new().spawn_scoped(scope, || out.file().sync_data());
            let mut options = DumpOptions::new();
            options.progress.clone_from(&self.options.progress);
            options.open(path_of(out.file()))
        })?;
        Ok(())
    }
}
