//! `sonicshot convert`.

use crate::args::{ConvertArgs, ConvertTo};
use crate::checkpoint::{
    CORE_NOTES, VMCOREINFO, XEN_IMAGE, checkpoint, open_checkpoint, overwrite,
};
use crate::error::CliError;
use crate::inputs::{Input, without_p2m};
use crate::report::{progress_bar, say, size};
use crate::{checkpoint, place};
use serde_json::json;
use sonicshot::checkpoint::{
    CheckpointError, CheckpointInfo, CheckpointReader, CheckpointWriter, Compression, SaveOptions,
};
use sonicshot::{
    Architecture, Disposition, Fill, GuestMemory, PageMap, PageSize, Progress, PrunePlan,
};
use sonicshot_dump::{
    CoreNotes, Dump, DumpError, DumpFile, KdumpCompression, KdumpOptions, LayoutSpec, NewFile,
    XlSkeleton, write_kdump,
};
use std::fs::File;
use std::path::Path;
use std::time::Instant;

/// What is converted.
enum Source {
    Dump(Box<Dump>),
    Checkpoint(Box<CheckpointReader<File>>),
}

/// What a dump carries beside the memory.
struct Beside {
    machine: Option<Architecture>,
    notes: Option<Vec<u8>>,
    vmcoreinfo: Option<Vec<u8>>,
}

impl Source {
    fn memory(&self) -> &dyn GuestMemory {
        match self {
            Self::Dump(dump) => &**dump,
            Self::Checkpoint(reader) => &**reader,
        }
    }

    /// The files that it comes from.
    fn files(&self) -> Vec<&File> {
        match self {
            Self::Dump(dump) => dump.files(),
            Self::Checkpoint(reader) => vec![reader.source()],
        }
    }

    /// Whether it is a Xen image, of which a checkpoint holds all.
    fn is_xl(&self) -> bool {
        matches!(self, Self::Dump(dump) if dump.is_xl())
    }

    fn format(&self) -> &'static str {
        match self {
            Self::Dump(dump) => dump.format(),
            Self::Checkpoint(_) => "checkpoint",
        }
    }

    fn beside(&self, path: &Path) -> Result<Beside, CliError> {
        match self {
            Self::Dump(dump) => Ok(Beside {
                machine: dump.machine(),
                notes: dump.core_notes(),
                vmcoreinfo: dump.vmcoreinfo().map(<[u8]>::to_vec),
            }),
            Self::Checkpoint(reader) => {
                let blob = |name: &str| match reader.read_blob(name) {
                    Ok(bytes) => Ok(Some(bytes)),
                    Err(CheckpointError::NoBlob { .. }) => Ok(None),
                    Err(error) => Err(checkpoint(path)(error)),
                };
                Ok(Beside {
                    machine: match reader.info().architecture {
                        Some(Architecture::Other(_)) => None,
                        known => known,
                    },
                    notes: blob(CORE_NOTES)?,
                    vmcoreinfo: blob(VMCOREINFO)?,
                })
            }
        }
    }
}

pub(crate) fn run(args: &ConvertArgs) -> Result<(), CliError> {
    let started = Instant::now();
    if args.output == Path::new("-") {
        let what = "what is converted goes to a file, not to standard output: -o OUT";
        return Err(CliError::Usage { what: what.into() });
    }
    if !args.force && args.output.exists() {
        let path = args.output.clone();
        return Err(DumpError::Exists { path }.into());
    }
    let mut found = None;
    let mut notes = Vec::new();
    let template = template(args)?;
    let source = if checkpoint::is_checkpoint(&args.file) {
        Source::Checkpoint(Box::new(open_checkpoint(&args.file)?))
    } else {
        let input = Input::find(&args.file, &args.input)?;
        let dump = match args.to {
            // All blocks are taken as they are: where they lie does not matter.
            ConvertTo::MappedRam | ConvertTo::Stream => input.open(input.files.layout())?,
            ConvertTo::Xl => input.open(input.files.layout().or(ranges_of(&template).as_ref()))?,
            _ => {
                // A reader of cores wants VMCOREINFO, which the guest itself has.
                let vmcoreinfo = |guest: &sonicshot_vmi::LinuxGuest<'_>| {
                    Ok(guest.vmcoreinfo().map(|text| text.as_bytes().to_vec()))
                };
                match place::with_guest(&input, &vmcoreinfo) {
                    Ok(placed) => {
                        found = placed.value;
                        // What is left out, or may lie elsewhere.
                        notes = placed.notes;
                        placed.dump
                    }
                    Err(CliError::Guest { .. }) => place::open(&input)?,
                    Err(error) => return Err(error),
                }
            }
        };
        Source::Dump(Box::new(dump))
    };
    let bar = progress_bar("converting", args.json);
    let mut progress = |done: u64, total: u64| {
        bar.set_length(total);
        bar.set_position(done);
    };
    let mut beside = source.beside(&args.file)?;
    beside.vmcoreinfo = beside.vmcoreinfo.or(found);
    let on_disk = write(args, &source, template.as_ref(), &beside, &mut progress)?;
    bar.finish_and_clear();
    let seconds = started.elapsed().as_secs_f64();
    let of_migration = matches!(&source, Source::Dump(dump) if dump.holds_device_state());
    let keeps_state = match args.to {
        ConvertTo::MappedRam | ConvertTo::Stream | ConvertTo::Xl => true,
        ConvertTo::Sonic => source.is_xl(),
        ConvertTo::Raw | ConvertTo::Elf | ConvertTo::Kdump => false,
    };
    if of_migration && !keeps_state {
        let state = "the devices' state is not in the output: a guest cannot be restored from it";
        notes.insert(0, state.to_owned());
    }
    notes.extend(without_p2m(source.memory()));
    let ram = source.memory().layout();
    if args.json {
        let report = json!({
            "path": args.file.display().to_string(),
            "format": source.format(),
            "ram_bytes": ram.bytes(),
            "disk_bytes": on_disk,
            "seconds": seconds,
            "notes": notes,
        });
        say!("{report}");
        return Ok(());
    }
    for note in &notes {
        eprintln!("note: {note}");
    }
    say!(
        "converted {} of RAM from {}, {} on disk, in {seconds:.2} s",
        size(ram.bytes()),
        source.format(),
        size(on_disk)
    );
    if args.to == ConvertTo::Raw && ram.regions().len() > 1 {
        say!("layout: {}", LayoutSpec::Ranges(ram.regions().to_vec()));
    }
    Ok(())
}

fn write(
    args: &ConvertArgs,
    source: &Source,
    template: Option<&Dump>,
    beside: &Beside,
    progress: Progress<'_>,
) -> Result<u64, CliError> {
    let memory = source.memory();
    let (out, force) = (&args.output, overwrite(args.force));
    let everything = || {
        let map = PageMap::new(memory.layout(), PageSize::SIZE_4K);
        let plan = PrunePlan::new(&map, &|_| Disposition::Keep, Fill::Zero);
        (map, plan)
    };
    match args.to {
        ConvertTo::Raw => {
            let file = DumpFile::raw(out, memory.layout(), force, &source.files())?;
            file.copy(memory, progress)?;
            Ok(file.finish()?)
        }
        ConvertTo::Elf => {
            let mut notes = CoreNotes::default();
            notes.machine = beside.machine;
            notes.notes.clone_from(&beside.notes);
            notes.vmcoreinfo.clone_from(&beside.vmcoreinfo);
            let file = DumpFile::elf_core(out, memory.layout(), &notes, force, &source.files())?;
            file.copy(memory, progress)?;
            Ok(file.finish()?)
        }
        ConvertTo::Kdump => {
            let file = NewFile::create(out, force, &source.files())?;
            let (_, plan) = everything();
            let options = KdumpOptions {
                compression: KdumpCompression::Zlib,
                machine: beside.machine.or(Some(Architecture::X86_64)),
                vmcoreinfo: beside.vmcoreinfo.as_deref(),
                notes: beside.notes.as_deref(),
                threads: None,
            };
            write_kdump(memory, &plan, file.file(), &options, progress).map_err(|source| {
                DumpError::Kdump {
                    path: out.clone(),
                    source,
                }
            })?;
            Ok(file.finish()?)
        }
        ConvertTo::Sonic => {
            let file = NewFile::create(out, force, &source.files())?;
            let (map, plan) = everything();
            let mut info = CheckpointInfo::new(memory.layout().clone(), PageSize::SIZE_4K);
            info.architecture = beside.machine;
            let options = SaveOptions::new(Compression::ZSTD);
            let failed = checkpoint(out);
            let mut writer = CheckpointWriter::new(file.file(), info, options).map_err(&failed)?;
            for (name, bytes) in blobs(args, source, beside, &plan)? {
                writer.blob(&name, bytes.as_slice()).map_err(&failed)?;
            }
            writer
                .memory(memory, &map, &plan, progress)
                .map_err(&failed)?;
            writer.finish().map_err(&failed)?;
            Ok(file.finish()?)
        }
        ConvertTo::Xl => write_xl(args, source, template, progress),
        ConvertTo::MappedRam | ConvertTo::Stream => {
            let Source::Dump(dump) = source else {
                let what = "a checkpoint holds no migration file to convert: restore it instead";
                return Err(CliError::Usage { what: what.into() });
            };
            Ok(match args.to {
                ConvertTo::Stream => dump.to_stream(out, force, progress)?,
                _ => dump.to_mapped_ram(out, force, progress)?,
            })
        }
    }
}

/// What a checkpoint holds beside the memory; of another checkpoint, what that does.
fn blobs(
    args: &ConvertArgs,
    source: &Source,
    beside: &Beside,
    plan: &PrunePlan,
) -> Result<Vec<(String, Vec<u8>)>, CliError> {
    match source {
        Source::Checkpoint(reader) => reader
            .blobs()
            .map(|(name, _)| Ok((name.to_owned(), reader.read_blob(name)?)))
            .collect::<Result<_, CheckpointError>>()
            .map_err(checkpoint(&args.file)),
        Source::Dump(dump) => {
            let all = [
                (VMCOREINFO, beside.vmcoreinfo.clone()),
                (CORE_NOTES, beside.notes.clone()),
                (XEN_IMAGE, dump.xl_skeleton(plan)?),
            ];
            let there = all.into_iter();
            let there = there.filter_map(|(name, bytes)| Some((name.to_owned(), bytes?)));
            Ok(there.collect())
        }
    }
}

/// The Xen image that `--template` names.
fn template(args: &ConvertArgs) -> Result<Option<Dump>, CliError> {
    let Some(path) = &args.template else {
        return Ok(None);
    };
    if args.to != ConvertTo::Xl {
        let what = "--template is for --to xl";
        return Err(CliError::Usage { what: what.into() });
    }
    Ok(Some(Dump::open(path, None)?))
}

/// Where the bytes of a raw file lie that was made of the template.
fn ranges_of(template: &Option<Dump>) -> Option<LayoutSpec> {
    let template = template.as_ref()?;
    Some(LayoutSpec::Ranges(template.layout().regions().to_vec()))
}

/// Writes a Xen image: what is in it beside the memory comes from the template, the checkpoint or
/// the image itself.
fn write_xl(
    args: &ConvertArgs,
    source: &Source,
    template: Option<&Dump>,
    progress: Progress<'_>,
) -> Result<u64, CliError> {
    let memory = source.memory();
    let skeleton_of = |dump: &Dump, path: &Path| -> Result<XlSkeleton, CliError> {
        let map = PageMap::new(dump.layout(), PageSize::SIZE_4K);
        let nothing = PrunePlan::new(&map, &|_| Disposition::Keep, Fill::Zero);
        let bytes = dump.xl_skeleton(&nothing)?.ok_or_else(|| {
            let what =
                "a Xen image is made of a checkpoint of one, or of memory and --template IMAGE";
            CliError::Usage { what: what.into() }
        })?;
        Ok(XlSkeleton::parse(path, bytes)?)
    };
    let skeleton = match (template, &args.template, source) {
        (Some(dump), Some(path), _) => {
            let skeleton = skeleton_of(dump, path)?;
            skeleton.check_holds_all(memory)?;
            skeleton
        }
        (_, _, Source::Dump(dump)) => skeleton_of(dump, &args.file)?,
        (_, _, Source::Checkpoint(reader)) => checkpoint::xl_skeleton(reader, &args.file)?,
    };
    let left_out = |pfn| match source {
        Source::Dump(_) => false,
        Source::Checkpoint(reader) => checkpoint::left_out(reader, pfn),
    };
    let (out, force) = (&args.output, overwrite(args.force));
    let mut files = source.files();
    files.extend(template.map(Dump::files).unwrap_or_default());
    Ok(skeleton.write(memory, &left_out, out, force, &files, progress)?)
}
