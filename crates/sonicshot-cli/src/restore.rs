//! `sonicshot restore` and `sonicshot verify`.

use crate::args::{DiskArgs, DumpKind, RestoreArgs, VerifyArgs};
use crate::error::CliError;
use crate::inputs::checkpoint;
use crate::json::{OfRestore, OfVerify, RestoreReport, VerifyReport, Version, line, path};
use crate::output::{named_files, overwrite};
use crate::progress::Phases;
use crate::report::{count, layout_arg, lines, mib, say, size, tell_notes};
use sonicshot::WorkOptions;
use sonicshot_offline::{CheckpointFile, OpenOptions, RestoreOptions};
use std::path::Path;
use std::time::Instant;

pub(crate) fn run(args: &RestoreArgs) -> Result<(), CliError> {
    let started = Instant::now();
    if args.output == Path::new("-") {
        let what = "a dump is restored to a file, not to standard output: -o OUT";
        return Err(CliError::Usage { what: what.into() });
    }
    let mut options = RestoreOptions::new(args.to.into());
    options.overwrite = overwrite(args.force);
    options.threads = args.threads;
    let blobs = named_files(&args.blob)?.into_iter();
    options.blobs = blobs.map(|(name, path)| (name.to_owned(), path)).collect();
    let phases = Phases::new(args.json);
    let checkpoint = checkpoint(&args.file, args.max_size, &phases)?;
    let checkpoint = with_disks(checkpoint, &args.disks)?;
    let phase = phases.run("restoring");
    options.progress = Some(phase.shown());
    let restored = checkpoint.restore(&args.output, &options)?;
    drop(phase);
    let seconds = started.elapsed().as_secs_f64();
    let layout = &checkpoint.reader().info().layout;
    if args.json {
        let report = RestoreReport {
            version: Version::default(),
            kind: OfRestore::default(),
            path: path(&args.file),
            output: path(&args.output),
            ram_bytes: layout.bytes(),
            disk_bytes: restored.disk_bytes,
            layout: (args.to == DumpKind::Raw).then(|| layout_arg(layout)),
            for_analysis: checkpoint.reader().info().for_analysis,
            missing_bytes: checkpoint.missing_bytes(),
            missing_mib: mib(checkpoint.missing_bytes()),
            seconds,
            notes: lines(&restored.notes),
        };
        say!("{}", line(&report));
        return Ok(());
    }
    tell_notes(&restored.notes);
    say!(
        "restored {} of RAM, {} on disk, in {seconds:.2} s",
        size(layout.bytes()),
        size(restored.disk_bytes)
    );
    if let ([_, ..], DumpKind::Raw) = (layout.regions(), args.to) {
        say!("layout: {}", layout_arg(layout));
    }
    Ok(())
}

/// The checkpoint with the disks that were given; without any, it is opened all the same.
pub(crate) fn with_disks(
    checkpoint: CheckpointFile,
    args: &DiskArgs,
) -> Result<CheckpointFile, CliError> {
    if args.disk.is_empty() {
        return Ok(checkpoint);
    }
    Ok(checkpoint.with_disks(&args.disks()?)?)
}

pub(crate) fn verify(args: &VerifyArgs) -> Result<(), CliError> {
    let started = Instant::now();
    let phases = Phases::new(args.json);
    let checkpoint = checkpoint(&args.file, args.max_size, &phases)?;
    let checkpoint = with_disks(checkpoint, &args.disks)?;
    let phase = phases.run("checking");
    let work = WorkOptions::new().progress(phase.shown());
    checkpoint.verify(&work)?;
    let on_disks = match args.disks.disk.is_empty() {
        true => None,
        false => Some(checkpoint.verify_disks(&work)?),
    };
    let mut compared = None;
    if let Some(path) = &args.against {
        let mut known = OpenOptions::new();
        known.layout.clone_from(&args.layout);
        known.format = args.format;
        known.progress = Some(phase.shown());
        compared = Some(checkpoint.verify_against(path, &known, &work)?);
    }
    drop(phase);
    let seconds = started.elapsed().as_secs_f64();
    let reader = checkpoint.reader();
    if args.json {
        let report = VerifyReport {
            version: Version::default(),
            kind: OfVerify::default(),
            path: path(&args.file),
            file_bytes: reader.file_len(),
            digest: format!("{:032x}", reader.digest()),
            compared_pages: compared,
            disk_pages: checkpoint.reader().stats().on_disk,
            checked_disk_pages: on_disks,
            for_analysis: reader.info().for_analysis,
            missing_bytes: checkpoint.missing_bytes(),
            missing_mib: mib(checkpoint.missing_bytes()),
            seconds,
            notes: lines(&checkpoint.notes()),
        };
        say!("{}", line(&report));
        return Ok(());
    }
    tell_notes(&checkpoint.notes());
    say!(
        "{} is sound: {} checked, digest {:032x}, {seconds:.2} s",
        args.file.display(),
        size(reader.file_len()),
        reader.digest()
    );
    match (on_disks, reader.stats().on_disk) {
        (None, 0) => {}
        (None, pages) => say!("{} pages on disks were not checked: --disk", count(pages)),
        (Some(pages), _) => say!("{} pages are on the disks", count(pages)),
    }
    if let (Some(pages), Some(path)) = (compared, &args.against) {
        say!(
            "{} kept pages are those of {}",
            count(pages),
            path.display()
        );
    }
    Ok(())
}
