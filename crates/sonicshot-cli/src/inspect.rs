//! `sonicshot inspect`.

mod checkpoint;
mod guest;
mod map;
mod page;

use crate::args::InspectArgs;
use crate::error::CliError;
use crate::inputs::{Input, Inputs, PIPE};
use crate::json::line;
use crate::output::{io, overwrite};
use crate::report::{bytes_of, percent, say, say_to_stderr, size};
use guest::json_report;
pub(crate) use guest::print_report;
#[cfg(feature = "libvmi")]
pub(crate) use guest::{
    classes_json, print_classes, print_zones, processors_json, processors_line, zone_json,
};
use map::Drawing;
#[cfg(feature = "libvmi")]
pub(crate) use page::zone_json as free_zone_json;
pub(crate) use page::{Explained, explain};
use sonicshot::{ClassSet, FileId, PageMap, Tally, WorkOptions};
use sonicshot_dump::NewFile;
use sonicshot_offline::Analyzed;
use sonicshot_vmi::{ZoneFree, count_zero_pages};
use std::cell::Cell;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;

pub(crate) fn run(args: &InspectArgs) -> Result<(), CliError> {
    #[cfg(feature = "libvmi")]
    if let Some(domain) = args.libvmi.domain() {
        return crate::libvmi::inspect(args, domain);
    }
    let inputs = Inputs::find(&args.files, &args.input, args.json);
    if inputs.several() && args.pfns.is_some() {
        return Err(CliError::Usage {
            what: "--pfns writes of one input".into(),
        });
    }
    check_map(args, inputs.several())?;
    if args.pfns.as_deref() == Some(Path::new(PIPE)) {
        say_to_stderr();
    }
    let saved = Cell::new((Tally::ZERO, Tally::ZERO));
    inputs.each(
        args.json,
        |input| {
            let (dropped, total) = one(args, input)?;
            let (all, of) = saved.get();
            saved.set((all.and(dropped), of.and(total)));
            Ok(())
        },
        || {
            let (dropped, total) = saved.get();
            let (dropped, total) = (dropped.get(), total.get());
            let share = percent(dropped, total);
            format!(
                "a prune drops {} of {} of RAM ({share})",
                size(dropped),
                size(total)
            )
        },
    )
}

/// Shows one input; returns how many bytes a prune saves, and of how many.
fn one(args: &InspectArgs, input: &Input) -> Result<(u64, u64), CliError> {
    let memory = input.snapshot.memory_file();
    let pfns = args.pfns.as_deref();
    if let Some(checkpoint) = input.snapshot.checkpoint()? {
        checkpoint::inspect(&input.path, &checkpoint, args)?;
        return Ok((0, 0));
    }
    let picture = args.map.as_deref();
    for path in [pfns, picture].into_iter().flatten() {
        if path != Path::new(PIPE) {
            check_replaceable(path, memory, args.force)?;
        }
    }
    let analyzed = input.analyze(&args.input.analyze())?;
    let phase = input.phases.run("finding zero pages");
    let work = WorkOptions::new().progress(phase.shown());
    let zero_pages = count_zero_pages(analyzed.dump(), analyzed.pages(), &work)?;
    drop(phase);
    let savings = analyzed.savings(ClassSet::DEFAULT_DROP)?;
    analyzed.dump().check_files_unchanged()?;
    if let Some(path) = pfns {
        write_to(path, args.force, &analyzed.dump().files(), &|out| {
            write_runs(analyzed.pages(), out)
        })?;
    }
    if let Some(path) = picture.filter(|path| *path != Path::new(PIPE)) {
        let title = format!("{}, {}", input.path.display(), analyzed.facts().release);
        drawn(&analyzed, &|drawing| {
            write_to(path, args.force, &analyzed.dump().files(), &|out| {
                map::write_svg(drawing, &title, out)
            })
        })?;
    }
    let of_frame = |pfn| {
        let plan = analyzed.droppable(ClassSet::DEFAULT_DROP);
        explain(analyzed.pages(), &plan, pfn, |pfn| {
            Ok(input.snapshot.page_facts(&analyzed, pfn)?)
        })
    };
    let facts = args.explain.map(of_frame).transpose()?;
    let lists = match args.free_lists {
        Some(most) => Some(input.snapshot.free_lists(&analyzed, most)?),
        None => None,
    };
    if args.json {
        let mut report = json_report(input, &analyzed, zero_pages, savings);
        report.page = facts.map(|facts| Box::new(facts.to_json()));
        report.free_lists = lists.map(|zones| zones.iter().map(page::zone_json).collect());
        say!("{}", line(&report));
    } else if facts.is_some() || lists.is_some() {
        print_records(facts.as_ref(), lists.as_deref());
    } else {
        if let Some(vmm) = input.snapshot.vmm() {
            say!("snapshot  {}, memory in {}", vmm.name(), memory.display());
        }
        print_report(&analyzed, zero_pages, savings);
        if picture == Some(Path::new(PIPE)) {
            drawn(&analyzed, &|drawing| {
                map::print(drawing);
                Ok(())
            })?;
        }
    }
    let page_size = analyzed.pages().page_size().bytes();
    let total = bytes_of(analyzed.counts().total(), page_size);
    let plan = analyzed.droppable(ClassSet::DEFAULT_DROP);
    Ok((plan.dropped_bytes(), total))
}

/// Shows what was asked of the kernel's records.
pub(crate) fn print_records(facts: Option<&Explained>, lists: Option<&[ZoneFree]>) {
    if let Some(facts) = facts {
        facts.print();
    }
    for zone in lists.into_iter().flatten() {
        page::print_zone(zone);
    }
}

/// Has a dump drawn as it is, and as a prune leaves it.
fn drawn(
    analyzed: &Analyzed,
    draw: &dyn Fn(&Drawing<'_>) -> Result<(), CliError>,
) -> Result<(), CliError> {
    let plan = analyzed.droppable(ClassSet::DEFAULT_DROP);
    draw(&Drawing {
        pages: analyzed.pages(),
        counts: analyzed.counts(),
        gone: &|cell| map::dropped_frames(&plan, cell, analyzed.pages()),
        gone_pages: plan.dropped_pages(),
        left_by: "after a prune",
    })
}

/// Before the work: whether `--map` can be done.
fn check_map(args: &InspectArgs, several: bool) -> Result<(), CliError> {
    let usage = |what: &str| Err(CliError::Usage { what: what.into() });
    let Some(path) = args.map.as_deref() else {
        return Ok(());
    };
    let is_picture = path.extension().is_some_and(|end| end == "svg");
    if path == Path::new(PIPE) {
        match args.json {
            true => usage("--map draws for people: with --json, give it a FILE.svg"),
            false => Ok(()),
        }
    } else if !is_picture {
        usage("--map takes the name of an .svg file, or none to draw here: give the dump before it")
    } else if several {
        usage("--map writes a picture of one input")
    } else {
        Ok(())
    }
}

/// Before the work: whether the file of `--pfns` or `--map` may be written over.
pub(crate) fn check_replaceable(path: &Path, memory: &Path, force: bool) -> Result<(), CliError> {
    let Ok(there) = fs::metadata(path) else {
        return Ok(());
    };
    if !force {
        return Err(CliError::Exists { path: path.into() });
    }
    let is_dump = FileId::of_path(memory)
        .is_ok_and(|dump| FileId::of_path(path).is_ok_and(|there| there == dump));
    if is_dump {
        return Err(CliError::OverDump { path: path.into() });
    }
    if !there.is_file() {
        let source = io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file");
        return Err(io("replacing", path)(source));
    }
    Ok(())
}

/// Writes to standard output, or to a file, which appears whole or not at all, for no more eyes than
/// `sources`.
pub(crate) fn write_to(
    path: &Path,
    force: bool,
    sources: &[&File],
    write: &dyn Fn(&mut dyn Write) -> io::Result<()>,
) -> Result<(), CliError> {
    if path == Path::new(PIPE) {
        let mut out = BufWriter::new(io::stdout().lock());
        return match write(&mut out).and_then(|()| out.flush()) {
            // Its reader wants no more (`| head`).
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            written => written.map_err(io("writing", Path::new("standard output"))),
        };
    }
    let file = NewFile::create(path, overwrite(force), sources)?;
    let mut out = BufWriter::new(file.file());
    let written = write(&mut out).and_then(|()| out.flush());
    drop(out);
    written.map_err(io("writing", path))?;
    file.finish()?;
    Ok(())
}

pub(crate) fn write_runs(pages: &PageMap, out: &mut dyn Write) -> io::Result<()> {
    for (frames, page) in pages.states() {
        let Some(last) = frames.last() else { continue };
        let zero = if page.is_zero() { "\tzero" } else { "" };
        writeln!(
            out,
            "{}\t{}\t{}{zero}",
            frames.start().raw(),
            last.raw(),
            page.class()
        )?;
    }
    Ok(())
}
