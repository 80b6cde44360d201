//! `inspect` of a checkpoint; a kernel is looked for only if its records are asked for.

use super::guest::classes_json;
use super::map::{self, Drawing};
use super::{check_replaceable, page, print_records, write_to};
use crate::args::InspectArgs;
use crate::error::CliError;
use crate::inputs::PIPE;
use crate::json::{self, CheckpointReport, NamedBlob, OfCheckpoint, Version, line, ram};
use crate::progress::talk;
use crate::report::{bytes_of, count, lines, mib, one_line, percent, say, size};
use crate::save::{FREE, disks_json, stats_json};
use sonicshot::checkpoint::{CheckpointInfo, CheckpointReader, PageContent, SaveStats};
use sonicshot::{ClassCounts, PageState, Tally};
use sonicshot_offline::CheckpointFile;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

pub(super) fn inspect(
    path: &Path,
    checkpoint: &CheckpointFile,
    args: &InspectArgs,
) -> Result<(), CliError> {
    let reader = checkpoint.reader();
    // Not by a map of every frame: a small file may describe a huge guest.
    let mut counts = ClassCounts::default();
    for run in reader.runs() {
        let page = PageState::new(run.class);
        let is_zero = matches!(run.content, PageContent::Zero);
        let page = if is_zero { page.with_zero() } else { page };
        counts.add(page, run.frames.len());
    }
    // The kernel's records are in the checkpoint, as all that it uses.
    let known = args.input.open();
    let explain = |pfn| {
        page::explain_stored(reader.run_of(pfn), reader.info().page_size, pfn, |pfn| {
            Ok(checkpoint.page_facts(&known, pfn)?)
        })
    };
    let facts = args.explain.map(explain).transpose()?;
    let lists = args
        .free_lists
        .map(|most| checkpoint.free_lists(&known, most));
    let lists = lists.transpose()?;
    let picture = args.map.as_deref();
    let to_file = picture.filter(|path| *path != Path::new(PIPE));
    for file in [args.pfns.as_deref(), to_file].into_iter().flatten() {
        if file != Path::new(PIPE) {
            check_replaceable(file, path, args.force)?;
        }
    }
    if let Some(file) = to_file {
        let title = path.display().to_string();
        drawn(reader, &counts, &|drawing| {
            write_to(file, args.force, &[reader.source()], &|out| {
                map::write_svg(drawing, &title, out)
            })
        })?;
    }
    if let Some(path) = &args.pfns {
        write_to(path, args.force, &[reader.source()], &|out| {
            write_runs(reader, out)
        })?;
    }
    if args.json {
        let mut report = json_report(path, checkpoint, &counts);
        report.page = facts.map(|facts| Box::new(facts.to_json()));
        report.free_lists = lists.map(|zones| zones.iter().map(page::zone_json).collect());
        say!("{}", line(&report));
        return Ok(());
    }
    if facts.is_some() || lists.is_some() {
        print_records(facts.as_ref(), lists.as_deref());
        return Ok(());
    }
    let (info, stats) = (reader.info(), reader.stats());
    let page_size = info.page_size.bytes();
    print_file(reader, info);
    for note in checkpoint.notes().iter().filter(|_| !talk().quiet) {
        say!("note: {note}");
    }
    say!("");
    print_contents(&stats, page_size, counts.total());
    say!("");
    print_classes(&counts, page_size);
    let data = bytes_of(stats.data, page_size);
    say!("");
    say!(
        "{} of page data in {} ({})",
        size(data),
        size(stats.stored_bytes),
        percent(stats.stored_bytes, data)
    );
    if picture == Some(Path::new(PIPE)) {
        drawn(reader, &counts, &|drawing| {
            map::print(drawing);
            Ok(())
        })?;
    }
    Ok(())
}

/// Has a checkpoint drawn as its guest was, and without what takes no room in it.
fn drawn(
    reader: &CheckpointReader<File>,
    counts: &ClassCounts,
    draw: &dyn Fn(&Drawing<'_>) -> Result<(), CliError>,
) -> Result<(), CliError> {
    let is_gone = |content| {
        use PageContent::{Absent, Free, Zero};
        matches!(content, Free { .. } | Absent | Zero)
    };
    let gone = |frames| {
        let runs = reader.runs_in(frames).filter(|run| is_gone(run.content));
        runs.map(|run| run.frames.intersection(&frames).len()).sum()
    };
    let stats = reader.stats();
    draw(&Drawing {
        pages: &reader.page_map(),
        counts,
        gone: &gone,
        gone_pages: Tally::new(stats.free)
            .and(stats.absent)
            .and(stats.zero)
            .get(),
        left_by: "in the checkpoint",
    })
}

fn build_id(info: &CheckpointInfo) -> Option<String> {
    let id = info.build_id.as_ref()?;
    Some(id.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn architecture(info: &CheckpointInfo) -> String {
    let known = info.architecture;
    known.map_or_else(|| "unknown".into(), |known| known.to_string())
}

fn json_report(path: &Path, checkpoint: &CheckpointFile, counts: &ClassCounts) -> CheckpointReport {
    let reader = checkpoint.reader();
    let info = reader.info();
    let free = reader
        .runs()
        .filter(|run| matches!(run.content, PageContent::Free { .. }) && FREE.contains(&run.class));
    let free = free.map(|run| run.frames.len()).sum::<Tally>().get();
    let blobs = reader.blobs().map(|(name, bytes)| NamedBlob {
        name: name.to_owned(),
        bytes,
    });
    let stats = reader.stats();
    CheckpointReport {
        version: Version::default(),
        kind: OfCheckpoint::default(),
        path: json::path(path),
        vmm: info.vmm.clone(),
        format: "checkpoint".into(),
        format_name: "checkpoint".into(),
        kernel_release: info.kernel_release.clone(),
        build_id: build_id(info),
        architecture: architecture(info),
        compression: reader.codec().to_owned(),
        chunk_size: reader.chunk_size(),
        ram: ram(&info.layout),
        total_pages: counts.total(),
        classes: classes_json(counts),
        for_analysis: info.for_analysis,
        missing_bytes: checkpoint.missing_bytes(),
        missing_mib: mib(checkpoint.missing_bytes()),
        notes: lines(&checkpoint.notes()),
        blobs: blobs.collect(),
        disks: disks_json(&info.disks),
        disk_runs: reader.disk_run_count(),
        on_disk_bytes: bytes_of(stats.on_disk, info.page_size.bytes()),
        stored: stats_json(&stats, free, info.page_size.bytes()),
        page: None,
        free_lists: None,
    }
}

/// The file, its guest, and what it holds beside the memory.
fn print_file(reader: &CheckpointReader<File>, info: &CheckpointInfo) {
    say!("file      checkpoint, {}", size(reader.file_len()));
    say!(
        "kernel    {} ({})",
        one_line(info.kernel_release.as_deref().unwrap_or("not said")),
        architecture(info)
    );
    if let Some(id) = build_id(info) {
        say!("build id  {id}");
    }
    if let Some(vmm) = &info.vmm {
        say!("vmm       {}", one_line(vmm));
    }
    say!(
        "storage   {}, chunks of {}",
        reader.codec(),
        size(reader.chunk_size().into())
    );
    say!("digest    {:032x}", reader.digest());
    for region in info.layout.regions() {
        say!("ram       {region}  ({})", size(region.len()));
    }
    for (name, len) in reader.blobs() {
        say!("blob      {}, {}", one_line(name), size(len));
    }
    for disk in &info.disks {
        let marks: Vec<_> = disk.marks.iter().map(|mark| mark.kind.name()).collect();
        let marks = if marks.is_empty() {
            "no file system known"
        } else {
            &marks.join(", ")
        };
        say!(
            "disk      {}, {} ({}; {marks})",
            one_line(&disk.name),
            size(disk.bytes),
            disk.hash
        );
    }
    if reader.disk_run_count() > 0 {
        say!("          {} runs on disks", count(reader.disk_run_count()));
    }
}

/// The number of pages of each content, of `total`.
fn print_contents(stats: &SaveStats, page_size: u64, total: u64) {
    say!(
        "{:<18} {:>12} {:>12} {:>8}",
        "content",
        "pages",
        "size",
        "share"
    );
    for (name, pages) in [
        ("data", stats.data),
        ("data again", stats.duplicate),
        ("zero", stats.zero),
        ("one word", stats.fill),
        ("left out", stats.free),
        ("absent", stats.absent),
        ("on a disk", stats.on_disk),
    ] {
        if pages > 0 {
            let size = size(bytes_of(pages, page_size));
            let share = percent(pages, total);
            say!("{name:<18} {:>12} {size:>12} {share:>8}", count(pages));
        }
    }
}

fn print_classes(counts: &ClassCounts, page_size: u64) {
    let total = counts.total();
    let bytes = |pages: u64| size(bytes_of(pages, page_size));
    say!(
        "{:<18} {:>12} {:>12} {:>8}",
        "class",
        "pages",
        "size",
        "share"
    );
    for (class, pages) in counts.iter() {
        let (size, share) = (bytes(pages), percent(pages, total));
        say!(
            "{:<18} {:>12} {size:>12} {share:>8}",
            class.name(),
            count(pages)
        );
    }
    say!("{:<18} {:>12} {:>12}", "total", count(total), bytes(total));
}

/// A line for each run: first frame, last frame, class, content.
fn write_runs(reader: &CheckpointReader<File>, out: &mut dyn Write) -> io::Result<()> {
    for run in reader.runs() {
        let content = match run.content {
            PageContent::Data { .. } => "data",
            other => other.name(),
        };
        let Some(last) = run.frames.last() else {
            continue;
        };
        writeln!(
            out,
            "{}\t{}\t{}\t{content}",
            run.frames.start().raw(),
            last.raw(),
            run.class
        )?;
    }
    Ok(())
}
