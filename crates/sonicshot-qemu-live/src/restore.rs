//! A guest that was saved, run on in a QEMU that is started for it.

use crate::error::QemuError;
use crate::find::{self, Blocks, Piece};
use crate::guard;
use crate::launch::{Launched, Words};
use crate::map;
use crate::pages::{self, Places};
use crate::postcopy::Server;
use crate::qmp::{QemuVersion, Qmp, shortened};
use crate::record::{Kept, Small, offsets};
use crate::refuse;
use crate::stream::{PAGE, Stream};
use crate::tables::RamBlock;
use rustix::fd::AsFd;
use serde_json::{Value, json};
use sonicshot::checkpoint::{CheckpointReader, GivenDisk, MovedOn};
use sonicshot::work::threads;
use sonicshot::{Progress, ProgressRelay};
use sonicshot_serve::{CheckpointSource, Metrics};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::num::NonZeroUsize;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::Arc;
use std::thread::Builder;
use std::time::{Duration, Instant};

/// The most that is kept decompressed, in bytes.
const CACHE: u64 = 64 << 20;
/// The amount that is sent at once, in bytes.
const BUFFER: usize = 1 << 20;
/// The interval at which QEMU is asked how far it is.
const EVERY: Duration = Duration::from_millis(4);

/// The way in which the guest's memory gets into QEMU.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum RestoreHow {
    /// As it is touched, and all of it in the end, where QEMU can do that with this memory and the
    /// system lets it; else as [`Eager`](Self::Eager), with why.
    #[default]
    Postcopy,
    /// All of it before the guest runs.
    Eager,
    /// It is a private mapping of this file of raw RAM, which is made of the checkpoint if it is
    /// not there. Several guests may have one, and it must stay as it is while one runs.
    Map(PathBuf),
}

/// Options for restoring a guest.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct LiveRestoreOptions {
    /// The way in which its memory gets into QEMU.
    pub how: RestoreHow,
    /// A command that calls [`guard`](crate::guard()) with its standard input and output, and does
    /// nothing else: it ends QEMU if this process dies before the guest has all that comes from it.
    pub guard: Option<Command>,
    /// The disks that the checkpoint has pages on. Unless all were declared immutable, all memory
    /// is put in place before the guest runs.
    pub disks: Vec<GivenDisk>,
    /// The treatment of a disk that was written to since the guest was saved.
    pub moved_on: MovedOn,
    /// The threads that read and decompress pages, beside the one that sends them; by default as many
    /// as there are cores. Where the system gives fewer, those do it, at worst the one that sends.
    pub threads: Option<NonZeroUsize>,
    /// Whoever is told how far it is, also while a guest runs whose memory comes by postcopy.
    pub progress: Option<Arc<dyn Progress>>,
}

impl LiveRestoreOptions {
    /// The defaults.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Says how its memory gets into QEMU.
    #[must_use]
    pub fn how(mut self, how: RestoreHow) -> Self {
        self.how = how;
        self
    }

    /// Gives the command that ends QEMU if this process dies too early.
    #[must_use]
    pub fn guard(mut self, command: Command) -> Self {
        self.guard = Some(command);
        self
    }

    /// Gives a disk that the checkpoint has pages on.
    #[must_use]
    pub fn disk(mut self, disk: GivenDisk) -> Self {
        self.disks.push(disk);
        self
    }

    /// Says what becomes of a disk that was written to since.
    #[must_use]
    pub fn moved_on(mut self, treatment: MovedOn) -> Self {
        self.moved_on = treatment;
        self
    }

    /// Says how many threads read and decompress pages.
    #[must_use]
    pub fn threads(mut self, threads: NonZeroUsize) -> Self {
        self.threads = Some(threads);
        self
    }

    /// Says who is told how far it is.
    #[must_use]
    pub fn progress(mut self, progress: Arc<dyn Progress>) -> Self {
        self.progress = Some(progress);
        self
    }
}

/// A guest that was restored. Its QEMU is this process's child.
#[derive(Debug)]
pub struct LiveRestored {
    launched: Launched,
    /// QEMU's version.
    pub qemu: QemuVersion,
    /// The way in which its memory got there, as a word: `postcopy`, `eager`, `map`.
    pub how: &'static str,
    /// The reason why it was not by postcopy, if that was wanted.
    pub why: Option<String>,
    /// Whether it is paused: it was saved so, or `-S` says so.
    pub paused: bool,
    /// From the start of QEMU until the guest ran, or could.
    pub ready: Duration,
    /// From the start of QEMU until all its memory was there.
    pub took: Duration,
    /// The raw file's making, if it was made.
    pub made: Option<Duration>,
}

impl LiveRestored {
    /// QEMU's process.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.launched.pid()
    }

    /// Waits until QEMU ends.
    ///
    /// # Errors
    /// [`QemuError::System`] if it cannot be waited for.
    pub fn wait(self) -> Result<ExitStatus, QemuError> {
        self.launched.wait()
    }
}

/// Starts `program` with `words`, the command line that the guest at `path` was started with, and
/// what is needed beside it, and runs that guest on in it. The names of its blocks of RAM, and what
/// they are made of, may be others. Its disks must be as they were when it was saved.
///
/// # Errors
/// [`QemuError`]: the checkpoint is none of a QEMU guest, the command line is of another guest, or
/// QEMU ends or says no; it is ended then, and the checkpoint is as it was.
pub fn restore(
    path: &Path,
    program: &OsStr,
    words: &[OsString],
    options: LiveRestoreOptions,
) -> Result<LiveRestored, QemuError> {
    let failed = QemuError::checkpoint(path);
    let reader = CheckpointReader::open(path).map_err(&failed)?;
    if reader.info().for_analysis {
        return Err(QemuError::NoGuest {
            path: path.to_owned(),
            what: "it is for analysis: pages that the guest uses were left out".into(),
        });
    }
    Words(words).check()?;
    let kept = Kept::read(&reader, path)?;
    let reader = reader
        .with_disks(options.disks, options.moved_on)
        .map_err(&failed)?;
    let is_lazy = options.how == RestoreHow::Postcopy && reader.disks_are_immutable();
    let mut source = CheckpointSource::new(reader, CACHE, Arc::new(Metrics::default()));
    if !is_lazy {
        source = source.all_before_it_runs();
    }
    let guest = Guest {
        kept,
        source,
        path,
        threads: threads(options.threads),
        progress: options.progress,
        relay: ProgressRelay::default(),
    };
    match &options.how {
        RestoreHow::Postcopy if !is_lazy => {
            let restored = guest.eager(program, words, options.guard)?;
            let why = Some("a disk that it has pages on was not declared immutable".into());
            Ok(LiveRestored { why, ..restored })
        }
        RestoreHow::Postcopy => guest.by_postcopy(program, words, options.guard),
        RestoreHow::Eager => guest.eager(program, words, options.guard),
        RestoreHow::Map(file) => guest.mapped(program, words, file, options.guard),
    }
}

/// A guest that is to be run on.
struct Guest<'a> {
    kept: Kept,
    source: CheckpointSource<File>,
    path: &'a Path,
    threads: NonZeroUsize,
    progress: Option<Arc<dyn Progress>>,
    /// Told by the thread that sends the guest.
    relay: ProgressRelay,
}

/// The blocks that are sent beside the guest's RAM, under the names that QEMU has now.
struct Matched<'k> {
    places: Places,
    small: Vec<&'k Small>,
    /// The guest's blocks of RAM, as QEMU has them.
    ram: Vec<RamBlock>,
    /// The small blocks, as long as they were, and of the pages that QEMU has for them.
    small_now: Vec<RamBlock>,
    /// The sizes of all pages of QEMU's, added.
    page_sizes: u64,
}

impl Guest<'_> {
    fn more(&self) -> Vec<OsString> {
        if self.kept.record.paused {
            return vec!["-S".into()];
        }
        Vec::new()
    }

    fn eager(
        &self,
        program: &OsStr,
        words: &[OsString],
        guard: Option<Command>,
    ) -> Result<LiveRestored, QemuError> {
        let began = Instant::now();
        // Else it reads as zero before anybody writes to it.
        let zeroes = Words(words).have_used_file();
        let (launched, qmp) = Launched::start(program, words, &self.more(), guard)?;
        self.run(
            launched,
            qmp,
            words,
            began,
            "eager",
            |guest, matched, out| guest.write_all(matched, zeroes, out),
        )
    }

    /// Also into memory of which QEMU cannot say that a page is missing: eagerly.
    fn by_postcopy(
        &self,
        program: &OsStr,
        words: &[OsString],
        guard: Option<Command>,
    ) -> Result<LiveRestored, QemuError> {
        let began = Instant::now();
        let zeroes = Words(words).have_used_file();
        let (mut launched, mut qmp) = Launched::start(program, words, &self.more(), guard)?;
        let capabilities = ["postcopy-ram", "return-path"];
        let capabilities = capabilities.map(|name| json!({"capability": name, "state": true}));
        let arguments = json!({"capabilities": capabilities});
        let why = match qmp.run("migrate-set-capabilities", arguments) {
            // What is in a file already would be there before it is asked for.
            Ok(_) if zeroes => Some("the memory is a file that has something in it".into()),
            Ok(_) => match find::on_a_disk(&mut qmp) {
                Ok(file) => file.map(|file| {
                    format!("the memory is a file neither on tmpfs nor on hugetlbfs ({file})")
                }),
                Err(error) => return Err(launched.blame(error)),
            },
            Err(QemuError::Refused { reason, .. }) => Some(reason),
            Err(error) => return Err(launched.blame(error)),
        };
        if why.is_some() {
            // What was refused is not set, but one of them may be.
            let none = ["postcopy-ram", "return-path"];
            let none = none.map(|name| json!({"capability": name, "state": false}));
            let set = qmp.run("migrate-set-capabilities", json!({"capabilities": none}));
            if let Err(error) = set {
                return Err(launched.blame(error));
            }
            let restored = self.run(
                launched,
                qmp,
                words,
                began,
                "eager",
                |guest, matched, out| guest.write_all(matched, zeroes, out),
            )?;
            return Ok(LiveRestored { why, ..restored });
        }
        let qemu = match guard::descriptor(launched.pid()) {
            Ok(qemu) => qemu,
            Err(error) => return Err(launched.blame(error)),
        };
        self.run(
            launched,
            qmp,
            words,
            began,
            "postcopy",
            |guest, matched, out| {
                let served = guest.serve(matched, out);
                if served.is_err() {
                    // It may wait for a page, and hear nothing else.
                    guard::kill(qemu.as_fd());
                }
                served
            },
        )
    }

    fn serve(&self, matched: &Matched<'_>, out: &UnixStream) -> Result<(), QemuError> {
        let small = matched.small_now.iter();
        let server = Server {
            source: &self.source,
            places: &matched.places,
            blocks: matched.ram.iter().chain(small).collect(),
            small: &matched.small,
            devices: &self.kept.devices,
            machine: &self.kept.record.machine,
            page_sizes: matched.page_sizes,
            threads: self.threads,
            progress: &self.relay,
        };
        server.serve(out)
    }

    fn mapped(
        &self,
        program: &OsStr,
        words: &[OsString],
        file: &Path,
        guard: Option<Command>,
    ) -> Result<LiveRestored, QemuError> {
        let blocks = self.kept.record.blocks.iter();
        let mut ram = blocks.filter_map(|block| Some((&block.block, block.pieces.as_ref()?)));
        let (Some((block, pieces)), None) = (ram.next(), ram.next()) else {
            return Err(QemuError::not_this(
                "the guest's RAM is several blocks (NUMA nodes): a mapped file is for one; restore it \
                 with --eager",
            ));
        };
        let version = map::version(program, words)?;
        let mut more = map::options(version, &Words(words), file, block.used)?;
        more.extend(self.more());
        let began = Instant::now();
        let mut made = None;
        let there = file.try_exists().map_err(|source| QemuError::Io {
            action: "looking for",
            path: file.to_owned(),
            source,
        })?;
        let mut places = Places::default();
        places.add(&block.name, pieces)?;
        let digest = self.source.reader().digest();
        if there {
            self.check_file(file, block.used)?;
            map::check(&self.source, digest, &places, file, &self.progress)?;
        } else {
            let progress = &self.progress;
            map::make(&self.source, digest, &places, block.used, file, progress)?;
            made = Some(began.elapsed());
        }
        let began = Instant::now();
        let (mut launched, mut qmp) = Launched::start(program, words, &more, guard)?;
        if version < map::READ_ONLY
            && let Err(error) = refuse::punching(&mut qmp)
        {
            return Err(launched.blame(error));
        }
        let restored = self.run(launched, qmp, words, began, "map", |guest, matched, out| {
            guest.write_beside(matched, out)
        })?;
        Ok(LiveRestored { made, ..restored })
    }

    /// Whether the raw file is as long as this guest's.
    fn check_file(&self, file: &Path, bytes: u64) -> Result<(), QemuError> {
        let found = std::fs::metadata(file).map_err(|source| QemuError::Io {
            action: "looking for",
            path: file.to_owned(),
            source,
        })?;
        if found.is_file() && found.len() == bytes {
            return Ok(());
        }
        Err(QemuError::not_this(format!(
            "{} has {} bytes, and the guest's RAM {bytes}: it is none of {}",
            file.display(),
            found.len(),
            self.path.display()
        )))
    }

    /// Sends all but the guest's RAM.
    fn write_beside(&self, matched: &Matched<'_>, out: &UnixStream) -> Result<(), QemuError> {
        let sending = QemuError::system("sending the guest to QEMU");
        let small = matched.small.iter().map(|small| &small.block);
        let mut stream = self.begin(BufWriter::with_capacity(BUFFER, out), small)?;
        self.write_small(matched, &mut stream).map_err(&sending)?;
        self.write_end(stream).map_err(&sending)
    }

    /// Has QEMU take what `write` sends.
    fn run(
        &self,
        mut launched: Launched,
        mut qmp: Qmp,
        words: &[OsString],
        began: Instant,
        how: &'static str,
        write: impl Fn(&Self, &Matched<'_>, &UnixStream) -> Result<(), QemuError> + Sync,
    ) -> Result<LiveRestored, QemuError> {
        let mut ready = Duration::ZERO;
        let loaded = self.matched(&mut qmp).and_then(|matched| {
            let (ours, theirs) = UnixStream::pair().map_err(QemuError::system("socketpair"))?;
            qmp.get_fd("sonicshot", theirs.as_fd())?;
            drop(theirs);
            qmp.run("migrate-incoming", json!({"uri": "fd:sonicshot"}))?;
            let write = || {
                let written = write(self, &matched, &ours);
                // QEMU hears that nothing more comes.
                let _ = ours.shutdown(std::net::Shutdown::Both);
                written
            };
            let tell = || self.relay.pass_on(&self.progress);
            let load = || loaded(&mut qmp, &tell, || ready = began.elapsed());
            let (written, loaded) = at_once(write, load);
            tell();
            match written {
                // QEMU was ended for it.
                Err(error @ QemuError::Pages(_)) => Err(error),
                // Who says no closes the socket: what it says is why.
                written => loaded.and(written),
            }
        });
        if let Err(error) = loaded {
            return Err(launched.blame(error));
        }
        launched.is_whole();
        Ok(LiveRestored {
            qemu: qmp.version(),
            how,
            why: None,
            ready,
            paused: self.kept.record.paused || Words(words).has("S"),
            took: began.elapsed(),
            made: None,
            launched,
        })
    }

    /// Matches QEMU's blocks with the saved ones.
    fn matched(&self, qmp: &mut Qmp) -> Result<Matched<'_>, QemuError> {
        let record = &self.kept.record;
        let machine = find::machine(qmp)?;
        if machine != record.machine {
            return Err(QemuError::not_this(format!(
                "the guest was saved from the machine `{}`, and QEMU has `{machine}`: start it with \
                 -machine {}",
                record.machine, record.machine
            )));
        }
        let now = Blocks::ask(qmp)?;
        let mut theirs = Vec::new();
        for block in &now.all {
            if let Some(pieces) = now.pieces(block)? {
                theirs.push((block, pieces));
            }
        }
        let mut places = Places::default();
        let mut ram = Vec::new();
        for saved in &record.blocks {
            let Some(pieces) = &saved.pieces else {
                continue;
            };
            // Whatever they are called: the same part of the guest.
            let at = theirs.iter().position(|(_, found)| found == pieces);
            let Some(at) = at else {
                return Err(unlike(&saved.block, pieces, &theirs));
            };
            let (block, _) = theirs.swap_remove(at);
            places.add(&block.name, pieces)?;
            ram.push(block.clone());
        }
        if let Some((block, _)) = theirs.first() {
            return Err(QemuError::not_this(format!(
                "QEMU has more RAM than the guest had: block `{}`",
                block.name
            )));
        }
        let small = self.small(&now.all, &ram)?;
        let page_size = |name: &str| now.all.iter().find(|block| block.name == name);
        let small_now = small.iter().map(|small| RamBlock {
            page_size: page_size(&small.block.name).map_or(4096, |block| block.page_size),
            ..small.block.clone()
        });
        Ok(Matched {
            places,
            small_now: small_now.collect(),
            small,
            ram,
            page_sizes: now.all.iter().fold(0, |sum, block| sum | block.page_size),
        })
    }

    /// The small blocks, all of which must be there: a QEMU that waits for a guest does not load
    /// its firmware.
    fn small(&self, now: &[RamBlock], ram: &[RamBlock]) -> Result<Vec<&Small>, QemuError> {
        let mut left: Vec<_> = now.iter().filter(|block| !ram.contains(block)).collect();
        let mut found = Vec::new();
        for small in &self.kept.small {
            let name = &small.block.name;
            let at = left.iter().position(|block| block.name == *name);
            let fits = at.map(|at| left.swap_remove(at));
            match fits {
                Some(block) if block.total >= small.block.used => found.push(small),
                Some(block) => {
                    return Err(QemuError::not_this(format!(
                        "block `{name}` had {:#x} bytes, and QEMU has {:#x} for it: start it with the \
                         command line that the guest was started with",
                        small.block.used, block.total
                    )));
                }
                None => {
                    return Err(QemuError::not_this(format!(
                        "the guest had a block `{name}` ({:#x} bytes), which QEMU has not: start it \
                         with the devices that the guest was started with",
                        small.block.used
                    )));
                }
            }
        }
        match left.first() {
            None => Ok(found),
            Some(block) => Err(QemuError::not_this(format!(
                "QEMU has a block `{}`, which the guest had not: start it with the devices that the \
                 guest was started with",
                block.name
            ))),
        }
    }

    /// Sends everything.
    fn write_all(
        &self,
        matched: &Matched<'_>,
        zeroes: bool,
        out: &UnixStream,
    ) -> Result<(), QemuError> {
        let sending = QemuError::system("sending the guest to QEMU");
        let small = matched.small.iter().map(|small| &small.block);
        // Where it is put it is called otherwise.
        let blocks = matched.ram.iter().chain(small);
        let out = BufWriter::with_capacity(BUFFER, out);
        let mut stream = self.begin(out, blocks)?;
        self.write_small(matched, &mut stream).map_err(&sending)?;
        pages::send_all(
            &self.source,
            &matched.places,
            &mut stream,
            zeroes,
            self.threads,
            &self.relay,
        )?;
        self.write_end(stream).map_err(&sending)
    }

    fn begin<'b, W: Write>(
        &self,
        out: W,
        blocks: impl Iterator<Item = &'b RamBlock> + Clone,
    ) -> Result<Stream<W>, QemuError> {
        let sending = QemuError::system("sending the guest to QEMU");
        let mut stream = Stream::begin(out, &self.kept.record.machine).map_err(&sending)?;
        stream.blocks(blocks).map_err(&sending)?;
        stream.begin_pages().map_err(&sending)?;
        Ok(stream)
    }

    fn write_small(
        &self,
        matched: &Matched<'_>,
        stream: &mut Stream<impl Write>,
    ) -> io::Result<()> {
        for small in &matched.small {
            for (offset, page) in offsets(&small.runs).zip(small.bytes.chunks(PAGE)) {
                stream.page(&small.block.name, offset, page)?;
            }
        }
        Ok(())
    }

    fn write_end(&self, mut stream: Stream<impl Write>) -> io::Result<()> {
        stream.end_pages()?;
        stream.devices(&self.kept.devices)?;
        stream.end()?;
        Ok(())
    }
}

/// Does both at once; where the system has no thread for it, `write` first.
pub(crate) fn at_once<W: Send, L>(
    write: impl Fn() -> W + Sync,
    load: impl FnOnce() -> L,
) -> (W, L) {
    std::thread::scope(|scope| {
        let Ok(writing) = Builder::new().spawn_scoped(scope, &write) else {
            return (write(), load());
        };
        let loaded = load();
        let written = writing.join();
        let written = written.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        (written, loaded)
    })
}

fn unlike(saved: &RamBlock, pieces: &[Piece], theirs: &[(&RamBlock, Vec<Piece>)]) -> QemuError {
    let shown = |pieces: &[Piece]| {
        let all = pieces.iter();
        let all = all.map(|piece| format!("{:#x} bytes at {:#x}", piece.len, piece.gpa));
        all.collect::<Vec<_>>().join(", ")
    };
    let theirs: Vec<_> = theirs.iter().map(|(_, pieces)| shown(pieces)).collect();
    QemuError::not_this(format!(
        "the guest's RAM `{}` ({}) is none of what QEMU has now ({}): start it with the memory and \
         the nodes that the guest was started with",
        saved.name,
        shown(pieces),
        theirs.join("; ")
    ))
}

/// Waits until QEMU has taken all of it; `tell` is called meanwhile, `ready` when the guest can run.
fn loaded(qmp: &mut Qmp, tell: &dyn Fn(), ready: impl FnOnce()) -> Result<(), QemuError> {
    let mut ready = Some(ready);
    loop {
        tell();
        let answer = qmp.run("query-migrate", Value::Null)?;
        match answer.get("status").and_then(Value::as_str) {
            Some("completed") => {
                if let Some(ready) = ready.take() {
                    ready();
                }
                return Ok(());
            }
            Some("postcopy-active") if ready.is_some() => {
                let status = qmp.run("query-status", Value::Null)?;
                if status.get("status").and_then(Value::as_str) != Some("inmigrate")
                    && let Some(ready) = ready.take()
                {
                    ready();
                }
                std::thread::sleep(EVERY);
            }
            Some("failed") => {
                let why = answer.get("error-desc").and_then(Value::as_str);
                return Err(QemuError::Refused {
                    command: "migrate-incoming",
                    reason: shortened(why.unwrap_or("it does not say why")),
                });
            }
            _ => std::thread::sleep(EVERY),
        }
    }
}
