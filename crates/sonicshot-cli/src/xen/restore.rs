//! `sonicshot xen restore`.

use crate::args::XenRestoreArgs;
use crate::error::CliError;
use crate::json::{OfXenRestore, Version, XenRestoreReport, line, path};
use crate::report::say;
use std::time::Instant;

pub(crate) fn restore(args: &XenRestoreArgs) -> Result<(), CliError> {
    let started = Instant::now();
    sonicshot_xen_live::restore(&args.file, args.pause, &args.xl)?;
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
