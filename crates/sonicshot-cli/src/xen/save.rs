//! `sonicshot xen save`.

use super::xl::{self, Xl};
use crate::args::XenSaveArgs;
use crate::error::CliError;
use crate::output::overwrite;
use crate::report::{complain, percent, progress_bar, say, size};
use indicatif::ProgressBar;
use serde_json::json;
use sonicshot::{DropClasses, GuestMemory, PageSize};
use sonicshot_dump::{Dump, NewFile};
use sonicshot_offline::packed;
use sonicshot_vmi::{AnalysisOptions, GuestOptions, analyze};
use sonicshot_xen_live::{DomainId, FrameRuns, LiveDomain, SaveFilter, Xen, path_of};
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const PAGE: PageSize = PageSize::SIZE_4K;

/// What was found in the domain.
struct Look {
    release: String,
    total_pages: u64,
    frames: FrameRuns,
    notes: Vec<String>,
}

/// The look, or why there is none; when the domain was suspended, and how long the look took.
struct Looked {
    result: Result<Look, CliError>,
    suspended: Instant,
    took: Duration,
}

impl Look {
    fn kept_bytes(&self) -> u64 {
        let kept = self.total_pages.saturating_sub(self.frames.len());
        kept.saturating_mul(PAGE.bytes())
    }
}

/// A bar that grows as an image does, on a terminal.
struct Progress {
    bar: ProgressBar,
    done: AtomicBool,
}

impl Progress {
    const EVERY: Duration = Duration::from_millis(100);

    fn new(quiet: bool) -> Self {
        Self {
            bar: progress_bar("saving", quiet),
            done: AtomicBool::new(false),
        }
    }

    fn expect(&self, bytes: u64) {
        self.bar.set_length(bytes);
    }

    /// Shows how long `file` is while `work` writes it.
    fn of<T>(&self, file: &File, work: impl FnOnce() -> T) -> T {
        if self.bar.is_hidden() {
            return work();
        }
        thread::scope(|scope| {
            let watching = scope.spawn(|| {
                while !self.done.load(Ordering::Relaxed) {
                    self.bar
                        .set_position(file.metadata().map_or(0, |file| file.len()));
                    thread::park_timeout(Self::EVERY);
                }
                self.bar.finish_and_clear();
            });
            let done = work();
            self.done.store(true, Ordering::Relaxed);
            watching.thread().unpark();
            done
        })
    }
}

/// What a save came to.
struct Saved {
    domain: DomainId,
    looked: Option<Looked>,
    file_bytes: u64,
    started: Instant,
    complete: Instant,
}

pub(crate) fn save(args: &XenSaveArgs) -> Result<(), CliError> {
    let started = Instant::now();
    let xen = Xen::open()?;
    let domain = xl::domain_of(&args.domain)?;
    let out = NewFile::create_new(&args.file, overwrite(args.force))?;
    let (looked, packed) = write(&xen, domain, args, &out)?;
    let file_bytes = out.file().metadata().map_or(0, |file| file.len());
    // The domain stays paused until the image is on the disk and has its name.
    let finished = packed
        .and_then(|()| check(args, &out))
        .and_then(|()| Ok(out.finish()?));
    let id = domain.to_string();
    let gone = !args.checkpoint && !args.pause;
    if let Err(error) = finished {
        if gone {
            // What it says is not what went wrong first.
            let _ = Xl::new(&["unpause", &id]).and_then(Xl::run);
        }
        return Err(error);
    }
    let complete = Instant::now();
    if gone {
        Xl::new(&["destroy", &id])?.run()?;
    }
    let saved = Saved {
        domain,
        looked,
        file_bytes,
        started,
        complete,
    };
    if args.json {
        print_json(args, &saved);
    } else {
        print_summary(args, &saved);
    }
    Ok(())
}

/// Has `xl` write the image to `out`. Once it has, the domain is paused, also if packing failed.
fn write(
    xen: &Xen,
    domain: DomainId,
    args: &XenSaveArgs,
    out: &NewFile,
) -> Result<(Option<Looked>, Result<(), CliError>), CliError> {
    let writing = |source| CliError::Io {
        action: "writing",
        path: args.file.clone(),
        source,
    };
    let progress = Progress::new(args.json);
    let Some(how) = args.compress else {
        let looked = progress.of(out.file(), || {
            run(xen, domain, args, &path_of(out.file()), &progress)
        });
        return Ok((looked?, Ok(())));
    };
    let (mut from, to) = io::pipe().map_err(writing)?;
    thread::scope(|scope| {
        let packing = scope.spawn(move || {
            let packed = packed::compress(how.into(), &mut from, out.file());
            if packed.is_err() {
                // A broken pipe would end xl before it can resume the domain.
                let _ = io::copy(&mut from, &mut io::sink());
            }
            packed
        });
        let looked = run(xen, domain, args, &path_of(&to), &progress);
        // Nobody writes any more: the reader comes to the end.
        drop(to);
        let packed = packing
            .join()
            .unwrap_or_else(|_| Err(io::ErrorKind::Other.into()));
        Ok((looked?, packed.map_err(writing)))
    })
}

fn run(
    xen: &Xen,
    domain: DomainId,
    args: &XenSaveArgs,
    target: &str,
    progress: &Progress,
) -> Result<Option<Looked>, CliError> {
    let after = if args.checkpoint { "-c" } else { "-p" };
    let mut xl = Xl::new(&["save", after, &domain.to_string(), target])?;
    let filter = SaveFilter::new()?;
    filter.attach(&mut xl.command);
    let mut child = xl.command.spawn().map_err(|source| xl.cannot_run(source))?;
    let mut looked = None;
    let status = filter.serve(&mut child, |suspended| {
        let began = Instant::now();
        let result = look(xen, suspended, args);
        if let Ok(look) = &result {
            progress.expect(look.kept_bytes());
        }
        let frames = result.as_ref().map(|look| look.frames.clone());
        let frames = frames.unwrap_or_default();
        looked = Some(Looked {
            result,
            suspended: began,
            took: began.elapsed(),
        });
        frames
    })?;
    xl.ended(status)?;
    Ok(looked)
}

/// Looks for the free pages of a domain that is suspended.
fn look(xen: &Xen, id: DomainId, args: &XenSaveArgs) -> Result<Look, CliError> {
    let failed = |source| CliError::Domain { domain: id, source };
    let domain = LiveDomain::open(xen, id)?;
    let mut options = GuestOptions::new();
    for path in &args.symbols {
        options = options.symbols(path);
    }
    let options = AnalysisOptions::new().guest(options).zero_pages(false);
    let guest = analyze(&domain, &options).map_err(failed)?;
    let frames = domain.dropped(&guest.plan(&DropClasses::default()));
    Ok(Look {
        release: guest.facts().release.clone(),
        total_pages: domain.layout().bytes() >> PAGE.shift(),
        frames,
        notes: guest.notes().iter().map(ToString::to_string).collect(),
    })
}

/// Whether the image is one that can be read, from its first record to its last.
fn check(args: &XenSaveArgs, out: &NewFile) -> Result<(), CliError> {
    if args.compress.is_none() {
        Dump::open(path_of(out.file()), None)?;
    }
    Ok(())
}

fn print_json(args: &XenSaveArgs, saved: &Saved) {
    let looked = saved.looked.as_ref();
    let look = looked.and_then(|looked| looked.result.as_ref().ok());
    let dropped = look.map_or(0, |look| look.frames.len());
    let suspended = looked.map(|looked| saved.complete.duration_since(looked.suspended));
    say!(
        "{}",
        json!({
            "domain": saved.domain.raw(),
            "path": args.file.display().to_string(),
            "pruned": look.is_some(),
            "reason": reason(saved),
            "kernel_release": look.map(|look| &look.release),
            "total_pages": look.map(|look| look.total_pages),
            "dropped_pages": dropped,
            "dropped_bytes": dropped.saturating_mul(PAGE.bytes()),
            "file_bytes": saved.file_bytes,
            "seconds": saved.complete.duration_since(saved.started).as_secs_f64(),
            "suspended_seconds": suspended.map(|time| time.as_secs_f64()),
            "look_seconds": looked.map(|looked| looked.took.as_secs_f64()),
            "notes": look.map(|look| &look.notes),
        })
    );
}

/// Why the image is a full one, if it is.
fn reason(saved: &Saved) -> Option<String> {
    match &saved.looked {
        None => Some("Xen's save helper did not ask for the types of frames".into()),
        Some(looked) => looked.result.as_ref().err().map(CliError::with_causes),
    }
}

fn print_summary(args: &XenSaveArgs, saved: &Saved) {
    if let Some(reason) = reason(saved) {
        complain!("warning: nothing was left out, this is a full image: {reason}");
    }
    let seconds = saved.complete.duration_since(saved.started).as_secs_f64();
    let looked = saved.looked.as_ref();
    if let Some(looked) = looked
        && let Ok(look) = &looked.result
    {
        for note in &look.notes {
            complain!("note: {note}");
        }
        let dropped = look.frames.len();
        say!(
            "Linux {}: left out {} of {} ({}), found in {:.2} s",
            look.release,
            size(dropped.saturating_mul(PAGE.bytes())),
            size(look.total_pages.saturating_mul(PAGE.bytes())),
            percent(dropped, look.total_pages),
            looked.took.as_secs_f64()
        );
    }
    say!(
        "saved domain {} to {}: {}, {seconds:.2} s",
        saved.domain,
        args.file.display(),
        size(saved.file_bytes)
    );
}
