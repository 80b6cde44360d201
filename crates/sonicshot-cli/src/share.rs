//! `sonicshot share`.

use crate::args::ShareArgs;
use crate::error::CliError;
use crate::json::{OfShare, ShareReport, Version, line, path};
use crate::output::overwrite;
use crate::progress::Phases;
use crate::report::{bytes_of, count, note, percent, say, size};
use sonicshot::Tally;
use sonicshot_dump::{DumpError, ShareStats};
use sonicshot_offline::{OpenOptions, ShareOptions, Snapshot};
use std::path::Path;
use std::time::Instant;

pub(crate) fn run(args: &ShareArgs) -> Result<(), CliError> {
    let started = Instant::now();
    let stdin_or_out = [Some(args.file.as_path()), args.output.as_deref()];
    if stdin_or_out.contains(&Some(Path::new("-"))) {
        let what = "files share blocks: neither standard input nor output does";
        return Err(CliError::Usage { what: what.into() });
    }
    let mut known = OpenOptions::new();
    known.layout.clone_from(&args.layout);
    known.format = args.format;
    let phases = Phases::new(args.json);
    let opening = phases.run("opening");
    known.progress = Some(phases.shown());
    let snapshot = Snapshot::open(&args.file, &known)?;
    let mut options = ShareOptions::new()
        .overwrite(overwrite(args.force))
        .min_run(args.min_run)
        .progress(phases.shown());
    options.threads = args.threads;
    let stats = match &args.output {
        Some(out) if !args.force && out.exists() => {
            return Err(DumpError::Exists { path: out.clone() }.into());
        }
        Some(out) => snapshot.share_to(out, &args.disk, &options),
        None => snapshot.share_in_place(&args.disk, &options),
    }?;
    drop(opening);
    tell(args, &stats, started.elapsed().as_secs_f64());
    Ok(())
}

fn tell(args: &ShareArgs, stats: &ShareStats, seconds: f64) {
    let gained = Tally::new(stats.shared_after)
        .without(stats.shared_before)
        .get();
    if args.json {
        let report = ShareReport {
            version: Version::default(),
            kind: OfShare::default(),
            path: path(args.output.as_ref().unwrap_or(&args.file)),
            in_place: args.output.is_none(),
            pages: stats.pages,
            found_bytes: stats.found_bytes,
            runs: stats.runs,
            run_bytes: stats.run_bytes,
            short_bytes: stats.short_bytes,
            differing_bytes: stats.differing_bytes,
            shared_bytes_before: stats.shared_before,
            shared_bytes: stats.shared_after,
            gained_bytes: gained,
            extents_before: stats.extents_before,
            extents: stats.extents_after,
            seconds,
        };
        say!("{}", line(&report));
        return;
    }
    if stats.differing_bytes > 0 {
        note!(
            "{} seemed to be on a disk and differ: left as they were",
            size(stats.differing_bytes)
        );
    }
    say!(
        "of {} pages {} are on the disk; {} in {} runs are shared, {} in shorter ones are not",
        count(stats.pages),
        size(stats.found_bytes),
        size(stats.run_bytes),
        count(stats.runs),
        size(stats.short_bytes),
    );
    say!(
        "by the file system {} ({} of what was looked for) share blocks now, {} did before; {} extents, \
         in {seconds:.2} s",
        size(stats.shared_after),
        percent(stats.shared_after, bytes_of(stats.pages, 4096)),
        size(stats.shared_before),
        count(stats.extents_after),
    );
}
