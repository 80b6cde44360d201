//! The work of `xl restore`, of a compressed image too, and in less time.

use crate::LiveError;
use crate::copied::PIECE;
use crate::filter::attach_large_pages;
use crate::save::{half_of_memory, watched};
use crate::xl::Xl;
use core::num::NonZeroU64;
use core::sync::atomic::{AtomicBool, Ordering};
use rustix::fs::{Advice, fadvise};
use rustix::pipe::fcntl_setpipe_size;
use sonicshot::{Progress, WorkPhase};
use sonicshot_dump::DumpError;
use sonicshot_offline::packed::{self, ImageCompression};
use sonicshot_offline::{CheckpointFile, Note, OfflineError};
use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::Path;
use std::process::{ChildStdin, Stdio};
use std::sync::Arc;
use std::thread;

/// The name by which `xl` opens its own standard input.
const STDIN: &str = "/proc/self/fd/0";

/// Options for restoring a domain.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct RestoreOptions {
    /// Whether it stays paused.
    pub paused: bool,
    /// More words for `xl restore`, before its file.
    pub xl: Vec<String>,
    /// Whoever is told how far it is, in bytes of a compressed image: how much `xl` has taken of
    /// another one it does not say.
    pub progress: Option<Arc<dyn Progress>>,
}

impl RestoreOptions {
    /// The defaults.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Says whether the domain stays paused.
    #[must_use]
    pub fn paused(mut self, paused: bool) -> Self {
        self.paused = paused;
        self
    }

    /// Adds words for `xl restore`.
    #[must_use]
    pub fn xl(mut self, words: impl IntoIterator<Item = String>) -> Self {
        self.xl.extend(words);
        self
    }

    /// Says who is told how far it is.
    #[must_use]
    pub fn progress(mut self, progress: Arc<dyn Progress>) -> Self {
        self.progress = Some(progress);
        self
    }
}

/// Has `xl` restore the image at `path`, which [`save`](crate::save) may have compressed.
///
/// # Errors
/// [`LiveError`] if the image cannot be read or decompressed, or what `xl` says.
pub fn restore(path: &Path, options: &RestoreOptions) -> Result<(), LiveError> {
    let reading = |source| LiveError::Io {
        action: "reading",
        path: path.to_owned(),
        source,
    };
    let mut file = sonicshot::open_file(path).map_err(reading)?;
    let mut start = [0; 4];
    file.read_exact(&mut start).map_err(reading)?;
    file.rewind().map_err(reading)?;
    let mut xl = restoring(options)?;
    let _library = attach_large_pages(&mut xl.command)?;
    let ended = AtomicBool::new(false);
    thread::scope(|scope| {
        // Without a thread the image is read as `xl` takes it.
        let _ = thread::Builder::new().spawn_scoped(scope, || read_ahead(&file, &ended));
        let restored = match packed::compression_of(start) {
            None => file.try_clone().map_err(reading).and_then(|file| {
                xl.command.stdin(file);
                xl.run().map(drop)
            }),
            Some(how) => {
                let len = file.metadata().map_or(0, |file| file.len());
                options.progress.begin(WorkPhase::Restoring);
                // Where it is read is where it has come to.
                let tell = || {
                    let at = (&file).stream_position().map_or(0, |at| at.min(len));
                    options.progress.tell(at, len);
                };
                watched(&tell, || unpack(xl, how, &file, reading))
            }
        };
        ended.store(true, Ordering::Relaxed);
        restored
    })
}

/// Has `xl` restore the image that `checkpoint` was made of, with what it has on the disks that were given
/// to it. Returns notes for people.
///
/// # Errors
/// [`LiveError`] if the checkpoint is damaged, was made of no image, or a disk is not what it was: then
/// `xl` lacks the image's end, and there is no domain; or what `xl` says.
pub fn restore_checkpoint(
    checkpoint: &CheckpointFile,
    options: &RestoreOptions,
) -> Result<Vec<Note>, LiveError> {
    // What is not there shows before there is a domain.
    checkpoint.check_xl()?;
    let mut xl = restoring(options)?;
    let _library = attach_large_pages(&mut xl.command)?;
    let (notes, ran) = piped(xl, |to| {
        checkpoint.restore_xl_to_writer(to, "a pipe to `xl restore`", &options.progress)
    })?;
    match notes {
        // It had enough: what it says counts.
        Err(OfflineError::Dump(DumpError::Io { source, .. }) | OfflineError::Io { source, .. })
            if source.kind() == io::ErrorKind::BrokenPipe =>
        {
            ran?;
            Err(LiveError::Filter {
                action: "giving the image to",
                source,
            })
        }
        Err(error) => Err(error.into()),
        Ok(notes) => ran.map(|_| notes),
    }
}

/// `xl restore` of its standard input.
fn restoring(options: &RestoreOptions) -> Result<Xl, LiveError> {
    let mut words = vec!["restore"];
    if options.paused {
        words.push("-p");
    }
    words.extend(options.xl.iter().map(String::as_str));
    words.push(STDIN);
    Xl::new(&words)
}

/// Runs `xl` with what `write` gives it, by a pipe. What came of that, and of `xl`.
fn piped<T>(
    mut xl: Xl,
    write: impl FnOnce(&mut ChildStdin) -> T,
) -> Result<(T, Result<String, LiveError>), LiveError> {
    xl.command.stdin(Stdio::piped());
    let child = xl.command.spawn();
    let mut child = child.map_err(|source| xl.cannot_run(source))?;
    let written = match child.stdin.take() {
        // Closed at the end of it, so that xl does not wait for more.
        Some(mut to) => {
            // Else it holds less, and whoever reads and who writes are woken more often.
            let _ = fcntl_setpipe_size(&to, PIECE);
            write(&mut to)
        }
        None => return Err(xl.cannot_run(io::ErrorKind::BrokenPipe.into())),
    };
    let status = child.wait();
    let status = status.map_err(|source| xl.cannot_run(source))?;
    Ok((written, xl.ended(status)))
}

/// Has the disk read `file` while `xl` makes the domain and gives it memory: as much of it as half of
/// this machine's memory takes, until `ended`.
fn read_ahead(file: &File, ended: &AtomicBool) {
    /// So much is asked for at a time.
    const STEP: u64 = 8 << 20;
    let len = file.metadata().map_or(0, |file| file.len());
    let mut at = 0_u64;
    while at < len.min(half_of_memory()) && !ended.load(Ordering::Relaxed) {
        // What is not read ahead is read when it is wanted.
        if fadvise(file, at, NonZeroU64::new(STEP), Advice::WillNeed).is_err() {
            return;
        }
        at = match at.checked_add(STEP) {
            Some(next) => next,
            None => return,
        };
    }
}

/// Gives `xl` the image decompressed, by a pipe.
fn unpack(
    xl: Xl,
    how: ImageCompression,
    file: &File,
    reading: impl Fn(io::Error) -> LiveError,
) -> Result<(), LiveError> {
    let (unpacked, ran) = piped(xl, |to| packed::decompress(how, file, to))?;
    match unpacked {
        // It had enough: what it says counts.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(reading(error)),
        _ => ran.map(drop),
    }
}
