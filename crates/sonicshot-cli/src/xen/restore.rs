//! `sonicshot xen restore`.

use crate::args::XenRestoreArgs;
use crate::error::CliError;
use crate::json::{OfXenRestore, Version, XenRestoreReport, line, path};
use crate::progress::Phase;
use crate::report::say;
use sonicshot_xen_live::RestoreOptions;
use std::time::Instant;

pub(crate) fn restore(args: &XenRestoreArgs) -> Result<(), CliError> {
    let started = Instant::now();
    let phase = Phase::begin("restoring", args.json);
    let options = RestoreOptions::new()
        .paused(args.pause)
        .xl(args.xl.iter().cloned())
        .progress(phase.shown());
    sonicshot_xen_live::restore(&args.file, &options)?;
    drop(phase);
    let seconds = started.elapsed().as_secs_f64();
    if args.json {
        let report = XenRestoreReport {
            version: Version::default(),
            kind: OfXenRestore::default(),
            path: path(&args.file),
            seconds,
        };
        say!("{}", line(&report));
    } else {
        say!("restored {} in {seconds:.2} s", args.file.display());
    }
    Ok(())
}
