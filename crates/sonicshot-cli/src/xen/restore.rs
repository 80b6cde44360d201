//! `sonicshot xen restore`.

use crate::args::XenRestoreArgs;
use crate::error::CliError;
use crate::json::{OfXenRestore, Version, XenRestoreReport, line, path};
use crate::progress::Phase;
use crate::report::{lines, say, tell_notes};
use crate::restore::with_disks;
use sonicshot_offline::CheckpointFile;
use sonicshot_xen_live::RestoreOptions;
use std::time::Instant;

pub(crate) fn restore(args: &XenRestoreArgs) -> Result<(), CliError> {
    let started = Instant::now();
    let phase = Phase::begin("restoring", args.json);
    let options = RestoreOptions::new()
        .paused(args.pause)
        .xl(args.xl.iter().cloned())
        .progress(phase.shown());
    let notes = if CheckpointFile::is_at(&args.file)? {
        let checkpoint = CheckpointFile::open(&args.file)?;
        let checkpoint = with_disks(checkpoint, &args.disks)?;
        sonicshot_xen_live::restore_checkpoint(&checkpoint, &options)?
    } else if args.disks.disk.is_empty() {
        sonicshot_xen_live::restore(&args.file, &options)?;
        Vec::new()
    } else {
        let what = format!(
            "{} is no checkpoint: --disk is for one",
            args.file.display()
        );
        return Err(CliError::Usage { what });
    };
    drop(phase);
    let seconds = started.elapsed().as_secs_f64();
    if args.json {
        let report = XenRestoreReport {
            version: Version::default(),
            kind: OfXenRestore::default(),
            path: path(&args.file),
            seconds,
            notes: lines(&notes),
        };
        say!("{}", line(&report));
    } else {
        tell_notes(&notes);
        say!("restored {} in {seconds:.2} s", args.file.display());
    }
    Ok(())
}
