//! `sonicshot attach`.

use crate::args::AttachArgs;
use crate::error::CliError;
use crate::json::{AttachReport, OfAttach, Version, line, path};
use crate::output::{blobs, overwrite};
use crate::progress::Phase;
use crate::report::{say, size};
use sonicshot_offline::{AttachOptions, CheckpointFile};
use sonicshot_serve::PageSet;

/// The blob that is a working set: what is none would be refused only when it is served.
const SET: &str = "working-set";

pub(crate) fn run(args: &AttachArgs) -> Result<(), CliError> {
    let files = blobs(&args.blob)?;
    let files = files
        .into_iter()
        .map(|(name, path)| (name.to_owned(), path));
    let files: Vec<_> = files.collect();
    let checkpoint = CheckpointFile::open(&args.checkpoint)?;
    let layout = &checkpoint.reader().info().layout;
    for (_, path) in files.iter().filter(|(name, _)| name == SET) {
        PageSet::read(path, layout)?;
    }
    let phase = Phase::begin("saving", args.json);
    let options = AttachOptions::new()
        .overwrite(overwrite(args.force))
        .replace(args.replace)
        .progress(phase.shown());
    let (stats, disk) = checkpoint.attach(&args.output, &files, &options)?;
    drop(phase);
    let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
    if args.json {
        let report = AttachReport {
            version: Version::default(),
            kind: OfAttach::default(),
            path: path(&args.checkpoint),
            output: path(&args.output),
            blobs: names.iter().map(ToString::to_string).collect(),
            file_bytes: stats.file_len,
            disk_bytes: disk,
            digest: format!("{:032x}", stats.digest),
        };
        say!("{}", line(&report));
    } else {
        say!(
            "attached {}: {} in {}",
            names.join(", "),
            size(stats.file_len),
            args.output.display()
        );
    }
    Ok(())
}
