//! `sonicshot save`, `restore`, `verify`, and what `inspect` says of a checkpoint.

use crate::analyze::classify;
use crate::args::{DumpKind, InputArgs, InspectArgs, RestoreArgs, SaveArgs, VerifyArgs};
use crate::error::CliError;
use crate::inputs::{Input, without_p2m};
use crate::place;
use crate::report::{count, percent, progress_bar, say, size};
use serde_json::{Map, Value, json};
use sonicshot::checkpoint::{
    CheckpointError, CheckpointInfo, CheckpointReader, CheckpointWriter, PageContent, SaveOptions,
    SaveStats,
};
use sonicshot::{
    Architecture, ClassCounts, ClassSet, DropClasses, Fill, GuestMemory, PageMap, PageSize, Pfn,
    PrunePlan,
};
use sonicshot_dump::{
    CoreNotes, Dump, DumpError, DumpFile, LayoutSpec, NewFile, Overwrite, XlSkeleton,
};
use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// The blobs that `save` makes of what a dump carries beside its memory.
pub(crate) const VMCOREINFO: &str = "vmcoreinfo";
pub(crate) const CORE_NOTES: &str = "elf-notes";
/// The same of a Xen save image: all but the content of its pages.
pub(crate) const XEN_IMAGE: &str = "xen-image";

pub(crate) fn overwrite(force: bool) -> Overwrite {
    if force {
        Overwrite::Replace
    } else {
        Overwrite::Refuse
    }
}

fn io(action: &'static str, path: &Path) -> impl Fn(io::Error) -> CliError {
    move |source| CliError::Io {
        action,
        path: path.into(),
        source,
    }
}

pub(crate) fn checkpoint(path: &Path) -> impl Fn(CheckpointError) -> CliError {
    move |source| CliError::Checkpoint {
        path: path.into(),
        source,
    }
}

/// `NAME=FILE` of each `--blob`.
fn blobs(args: &[String]) -> Result<Vec<(&str, PathBuf)>, CliError> {
    args.iter()
        .map(|arg| match arg.split_once('=') {
            Some((name, file)) if !name.is_empty() && !file.is_empty() => Ok((name, file.into())),
            _ => Err(CliError::Usage {
                what: format!("`{arg}` is no NAME=FILE"),
            }),
        })
        .collect()
}

/// Whether the file at `path` begins as a checkpoint.
pub(crate) fn is_checkpoint(path: &Path) -> bool {
    let mut start = [0; 8];
    // To open a pipe that nobody writes would take for ever.
    let is_file = std::fs::metadata(path).is_ok_and(|metadata| metadata.is_file());
    is_file
        && File::open(path).is_ok_and(|mut file| {
            file.read_exact(&mut start).is_ok() && CheckpointReader::<File>::is_checkpoint(&start)
        })
}

/// What is known of a dump before it is saved.
struct Source {
    dump: Dump,
    info: CheckpointInfo,
    map: PageMap,
    fill: Fill,
    vmcoreinfo: Option<Vec<u8>>,
    notes: Vec<String>,
}

fn source(args: &SaveArgs) -> Result<Source, CliError> {
    let input = Input::find(&args.file, &args.input)?;
    if args.keep_all {
        let dump = input.open(input.files.layout())?;
        let map = PageMap::new(dump.layout(), PageSize::SIZE_4K);
        let vmcoreinfo = dump.vmcoreinfo().map(<[u8]>::to_vec);
        let info = CheckpointInfo::new(dump.layout().clone(), PageSize::SIZE_4K);
        return Ok(Source {
            info: with_architecture(info, &dump, None),
            dump,
            map,
            fill: Fill::Zero,
            vmcoreinfo,
            notes: input.in_use().into_iter().collect(),
        });
    }
    let analysis = classify(&input)?;
    let page_size = analysis.pages.map.page_size();
    let mut info = CheckpointInfo::new(analysis.dump.layout().clone(), page_size);
    info.kernel_release = Some(analysis.release);
    info.build_id = analysis.build_id;
    Ok(Source {
        // Only x86-64 kernels are found so far.
        info: with_architecture(info, &analysis.dump, Some(Architecture::X86_64)),
        dump: analysis.dump,
        map: analysis.pages.map,
        fill: analysis.pages.free_fill,
        vmcoreinfo: analysis.vmcoreinfo.map(String::into_bytes),
        notes: analysis.notes,
    })
}

fn with_architecture(
    mut info: CheckpointInfo,
    dump: &Dump,
    otherwise: Option<Architecture>,
) -> CheckpointInfo {
    info.architecture = dump.machine().or(otherwise);
    info
}

pub(crate) fn save(args: &SaveArgs) -> Result<(), CliError> {
    let started = Instant::now();
    let drop: ClassSet = args.drop.iter().copied().collect();
    if let Some(class) = drop.iter().find(|class| !class.may_be_dropped()) {
        return Err(CliError::Undroppable { class });
    }
    let blobs = blobs(&args.blob)?;
    let to_stdout = args.output.as_os_str() == "-";
    if to_stdout && io::stdout().is_terminal() {
        return Err(CliError::Usage {
            what: "a checkpoint is not written to a terminal".into(),
        });
    }
    if !to_stdout && !args.force && args.output.exists() {
        return Err(CliError::Exists {
            path: args.output.clone(),
        });
    }
    let mut files = Vec::new();
    for (name, path) in blobs {
        files.push((name, File::open(&path).map_err(io("opening", &path))?));
    }
    let blobs = files;
    let mut source = source(args)?;
    source.notes.extend(without_p2m(&source.dump));
    source.info.vmm.clone_from(&args.vmm);
    let classes = if args.keep_all {
        ClassSet::default()
    } else {
        drop
    };
    let plan = PrunePlan::new(&source.map, &DropClasses(classes), source.fill);
    let (stats, on_disk) = if to_stdout {
        let stats = write(args, &source, &plan, &blobs, io::stdout().lock())?;
        (stats, None)
    } else {
        // What is put in beside the memory may be for fewer eyes.
        let mut inputs = source.dump.files();
        inputs.extend(blobs.iter().map(|(_, file)| file));
        let out = NewFile::create(&args.output, overwrite(args.force), &inputs)?;
        let stats = write(args, &source, &plan, &blobs, out.file())?;
        (stats, Some(out.finish()?))
    };
    let seconds = started.elapsed().as_secs_f64();
    let page_size = plan.page_size().bytes();
    if args.json {
        let mut report = stats_json(&stats, page_size);
        report.insert("kernel_release".into(), json!(source.info.kernel_release));
        report.insert("compression".into(), json!(args.compress.to_string()));
        report.insert("disk_bytes".into(), json!(on_disk));
        report.insert("seconds".into(), json!(seconds));
        report.insert("notes".into(), json!(source.notes));
        let line = Value::Object(report);
        if to_stdout {
            eprintln!("{line}");
        } else {
            say!("{line}");
        }
        return Ok(());
    }
    for note in &source.notes {
        eprintln!("note: {note}");
    }
    let total = source.info.layout.bytes();
    let summary = format!(
        "saved {} of RAM as {} ({}) in {seconds:.2} s\n\
         stored {} pages; left out {} free, {} zero, {} filled with one word, {} twice there",
        size(total),
        size(stats.file_len),
        percent(stats.file_len, total),
        count(stats.data),
        count(stats.free),
        count(stats.zero),
        count(stats.fill),
        count(stats.duplicate),
    );
    if to_stdout {
        eprintln!("{summary}");
    } else {
        say!("{summary}");
    }
    Ok(())
}

fn write(
    args: &SaveArgs,
    source: &Source,
    plan: &PrunePlan,
    blobs: &[(&str, File)],
    out: impl Write,
) -> Result<SaveStats, CliError> {
    let failed = checkpoint(&args.output);
    let mut options = SaveOptions::new(args.compress);
    options.chunk_size = args.chunk.saturating_mul(1024);
    options.threads = args.threads;
    let mut writer = CheckpointWriter::new(out, source.info.clone(), options).map_err(&failed)?;
    if let Some(text) = &source.vmcoreinfo {
        writer.blob(VMCOREINFO, text.as_slice()).map_err(&failed)?;
    }
    if let Some(notes) = source.dump.core_notes() {
        writer.blob(CORE_NOTES, notes.as_slice()).map_err(&failed)?;
    }
    if let Some(skeleton) = source.dump.xl_skeleton(plan)? {
        writer.blob(XEN_IMAGE, &*skeleton).map_err(&failed)?;
    }
    for (name, file) in blobs {
        writer.blob(name, file).map_err(&failed)?;
    }
    let bar = progress_bar("saving", args.json);
    writer
        .memory(&source.dump, &source.map, plan, &mut |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        })
        .map_err(&failed)?;
    let (_, stats) = writer.finish().map_err(&failed)?;
    bar.finish_and_clear();
    Ok(stats)
}

fn stats_json(stats: &SaveStats, page_size: u64) -> Map<String, Value> {
    let value = json!({
        "page_size": page_size,
        "data_pages": stats.data,
        "duplicate_pages": stats.duplicate,
        "zero_pages": stats.zero,
        "fill_pages": stats.fill,
        "free_pages": stats.free,
        "absent_pages": stats.absent,
        "stored_bytes": stats.stored_bytes,
        "file_bytes": stats.file_len,
        "runs": stats.runs,
        "digest": format!("{:032x}", stats.digest),
    });
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

pub(crate) fn open_checkpoint(path: &Path) -> Result<CheckpointReader<File>, CliError> {
    CheckpointReader::open(path).map_err(checkpoint(path))
}

/// What makes a Xen image of a checkpoint again.
pub(crate) fn xl_skeleton(
    reader: &CheckpointReader<File>,
    path: &Path,
) -> Result<XlSkeleton, CliError> {
    match reader.read_blob(XEN_IMAGE) {
        Ok(bytes) => Ok(XlSkeleton::parse(path, bytes)?),
        Err(CheckpointError::NoBlob { .. }) => Err(CliError::NoImage { path: path.into() }),
        Err(error) => Err(checkpoint(path)(error)),
    }
}

/// Whether the checkpoint has no content of `pfn`, of its own accord or the source's.
pub(crate) fn left_out(reader: &CheckpointReader<File>, pfn: Pfn) -> bool {
    reader
        .run_of(pfn)
        .is_none_or(|run| matches!(run.content, PageContent::Absent | PageContent::Free { .. }))
}

/// The raw file or core that the memory of a checkpoint goes to.
fn dump_file(args: &RestoreArgs, reader: &CheckpointReader<File>) -> Result<DumpFile, CliError> {
    let (layout, force) = (&reader.info().layout, overwrite(args.force));
    if args.to != DumpKind::Elf {
        return Ok(DumpFile::raw(
            &args.output,
            layout,
            force,
            &[reader.source()],
        )?);
    }
    let blob = |name: &str| match reader.read_blob(name) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(CheckpointError::NoBlob { .. }) => Ok(None),
        Err(error) => Err(checkpoint(&args.file)(error)),
    };
    let mut notes = CoreNotes::default();
    notes.machine = match reader.info().architecture {
        Some(Architecture::Aarch64) => Some(Architecture::Aarch64),
        _ => Some(Architecture::X86_64),
    };
    notes.notes = blob(CORE_NOTES)?;
    notes.vmcoreinfo = blob(VMCOREINFO)?;
    let source = [reader.source()];
    Ok(DumpFile::elf_core(
        &args.output,
        layout,
        &notes,
        force,
        &source,
    )?)
}

pub(crate) fn restore(args: &RestoreArgs) -> Result<(), CliError> {
    let started = Instant::now();
    if args.output == Path::new("-") {
        let what = "a dump is restored to a file, not to standard output: -o OUT";
        return Err(CliError::Usage { what: what.into() });
    }
    let failed = checkpoint(&args.file);
    let blobs = blobs(&args.blob)?;
    let reader = open_checkpoint(&args.file)?;
    let layout = &reader.info().layout;
    let force = overwrite(args.force);
    let mut files = Vec::new();
    for (name, path) in blobs {
        let file = NewFile::create(&path, force, &[reader.source()])?;
        reader.copy_blob(name, &mut file.file()).map_err(&failed)?;
        files.push(file);
    }
    let bar = progress_bar("restoring", args.json);
    let mut progress = |done: u64, total: u64| {
        bar.set_length(total);
        bar.set_position(done);
    };
    let on_disk = match args.to {
        DumpKind::Xl => {
            let skeleton = xl_skeleton(&reader, &args.file)?;
            let left_out = |pfn| left_out(&reader, pfn);
            let (out, source) = (&args.output, [reader.source()]);
            skeleton.write(&reader, &left_out, out, force, &source, &mut progress)?
        }
        DumpKind::Raw | DumpKind::Elf => {
            let output = dump_file(args, &reader)?;
            let restored = reader.restore(&output, args.threads, &mut progress);
            restored.map_err(&failed)?;
            output.finish()?
        }
    };
    for file in files {
        file.finish()?;
    }
    bar.finish_and_clear();
    let seconds = started.elapsed().as_secs_f64();
    if args.json {
        let report = json!({
            "ram_bytes": layout.bytes(),
            "disk_bytes": on_disk,
            "seconds": seconds,
        });
        say!("{report}");
    } else {
        say!(
            "restored {} of RAM, {} on disk, in {seconds:.2} s",
            size(layout.bytes()),
            size(on_disk)
        );
        if let ([_, ..], DumpKind::Raw) = (layout.regions(), args.to) {
            let ranges = LayoutSpec::Ranges(layout.regions().to_vec());
            say!("layout: {ranges}");
        }
    }
    Ok(())
}

pub(crate) fn verify(args: &VerifyArgs) -> Result<(), CliError> {
    let started = Instant::now();
    let failed = checkpoint(&args.file);
    let reader = open_checkpoint(&args.file)?;
    let bar = progress_bar("checking", args.json);
    let mut progress = |done: u64, total: u64| {
        bar.set_length(total);
        bar.set_position(done);
    };
    reader.verify(&mut progress).map_err(&failed)?;
    let mut compared = None;
    if let Some(path) = &args.against {
        // A raw dump has no layout of its own: the checkpoint tells.
        let own = LayoutSpec::Ranges(reader.info().layout.regions().to_vec());
        let dump = match Dump::open(path, Some(args.layout.as_ref().unwrap_or(&own))) {
            // Several blocks of memory: the guest has to be asked again which is where.
            Err(DumpError::LayoutLength { .. }) if args.layout.is_none() => {
                let how = InputArgs::default();
                place::open(&Input::find(path, &how)?)?
            }
            dump => dump?,
        };
        compared = Some(
            reader
                .verify_against(&dump, &mut progress)
                .map_err(&failed)?,
        );
    }
    bar.finish_and_clear();
    let seconds = started.elapsed().as_secs_f64();
    if args.json {
        let report = json!({
            "file_bytes": reader.file_len(),
            "digest": format!("{:032x}", reader.digest()),
            "compared_pages": compared,
            "seconds": seconds,
        });
        say!("{report}");
        return Ok(());
    }
    say!(
        "{} is sound: {} checked, digest {:032x}, {seconds:.2} s",
        args.file.display(),
        size(reader.file_len()),
        reader.digest()
    );
    if let (Some(pages), Some(path)) = (compared, &args.against) {
        say!(
            "{} kept pages are those of {}",
            count(pages),
            path.display()
        );
    }
    Ok(())
}

/// What is in a checkpoint; no kernel is looked for.
pub(crate) fn inspect(path: &Path, args: &InspectArgs) -> Result<(), CliError> {
    let reader = open_checkpoint(path)?;
    let (info, stats) = (reader.info(), reader.stats());
    let page_size = info.page_size.bytes();
    // Not by a map of every frame: a small file may describe a huge guest.
    let mut counts = ClassCounts::default();
    for run in reader.runs() {
        counts.add(run.class, run.frames.len());
    }
    if let Some(path) = &args.pfns {
        write_pfns(&reader, path, args.force)?;
    }
    let architecture = info
        .architecture
        .map_or_else(|| "unknown".into(), |known| known.to_string());
    let build_id = info.build_id.as_ref().map(|id| {
        id.iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>()
    });
    let blobs: Vec<(&str, u64)> = reader.blobs().collect();
    if args.json {
        let mut report = stats_json(&stats, page_size);
        let classes: Map<String, Value> = counts
            .iter()
            .map(|(class, pages)| (class.name().into(), pages.into()))
            .collect();
        let regions: Vec<_> = info
            .layout
            .regions()
            .iter()
            .map(|r| json!([r.start().raw(), r.end().raw()]))
            .collect();
        let more = json!({
            "path": path.display().to_string(),
            "format": "checkpoint",
            "kernel_release": info.kernel_release,
            "build_id": build_id,
            "architecture": architecture,
            "vmm": info.vmm,
            "compression": reader.codec(),
            "chunk_size": reader.chunk_size(),
            "ram": regions,
            "total_pages": counts.total(),
            "classes": classes,
            "blobs": blobs.iter().map(|(name, len)| json!({"name": name, "bytes": len})).collect::<Vec<_>>(),
        });
        if let Value::Object(more) = more {
            report.extend(more);
        }
        say!("{}", Value::Object(report));
        return Ok(());
    }
    let total = counts.total();
    let bytes = |pages: u64| size(pages.saturating_mul(page_size));
    say!("file      checkpoint, {}", size(reader.file_len()));
    say!(
        "kernel    {} ({})",
        info.kernel_release.as_deref().unwrap_or("not said"),
        architecture
    );
    if let Some(id) = build_id {
        say!("build id  {id}");
    }
    if let Some(vmm) = &info.vmm {
        say!("vmm       {vmm}");
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
    for (name, len) in blobs {
        say!("blob      {name}, {}", size(len));
    }
    say!("");
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
    ] {
        if pages > 0 {
            let (size, share) = (bytes(pages), percent(pages, total));
            say!("{name:<18} {:>12} {size:>12} {share:>8}", count(pages));
        }
    }
    say!("");
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
    let data = stats.data.saturating_mul(page_size);
    say!("");
    say!(
        "{} of page data in {} ({})",
        size(data),
        size(stats.stored_bytes),
        percent(stats.stored_bytes, data)
    );
    Ok(())
}

/// A line for each run: first frame, last frame, class, content.
fn write_pfns(reader: &CheckpointReader<File>, path: &Path, force: bool) -> Result<(), CliError> {
    let out = NewFile::create(path, overwrite(force), &[reader.source()])?;
    let mut lines = io::BufWriter::new(out.file());
    let mut write = || -> io::Result<()> {
        for run in reader.runs() {
            let content = match run.content {
                PageContent::Data { .. } => "data",
                other => other.name(),
            };
            let last = run.frames.end().raw().saturating_sub(1);
            writeln!(
                lines,
                "{}\t{last}\t{}\t{content}",
                run.frames.start().raw(),
                run.class
            )?;
        }
        lines.flush()
    };
    write().map_err(io("writing", path))?;
    drop(lines);
    out.finish()
        .map(drop)
        .map_err(|error: DumpError| error.into())
}
