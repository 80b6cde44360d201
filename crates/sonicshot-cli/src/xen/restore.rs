//! `sonicshot xen restore`.

use crate::args::XenRestoreArgs;
use crate::error::CliError;
use crate::report::say;
use serde_json::json;
use std::time::Instant;

pub(crate) fn restore(args: &XenRestoreArgs) -> Result<(), CliError> {
    let started = Instant::now();
    sonicshot_xen_live::restore(&args.file, args.pause, &args.xl)?;
    let seconds = started.elapsed().as_secs_f64();
    if args.json {
        say!(
            "{}",
            json!({"path": args.file.display().to_string(), "seconds": seconds})
        );
    } else {
        say!("restored {} in {seconds:.2} s", args.file.display());
    }
    Ok(())
}
