//! `sonicshot prune`.

use crate::analyze::{Analysis, analyze};
use crate::args::PruneArgs;
use crate::error::CliError;
use crate::report::{count, percent, progress_bar, say, size};
use serde_json::json;
use sonicshot::{ClassSet, DropClasses, PageClass, PrunePlan};
use sonicshot_dump::{DumpError, Overwrite, PruneStats};
use std::time::Instant;

pub(crate) fn run(args: &PruneArgs) -> Result<(), CliError> {
    let started = Instant::now();
    let drop: ClassSet = args.drop.iter().copied().collect();
    if let Some(class) = drop.iter().find(|class| !class.may_be_dropped()) {
        return Err(CliError::Undroppable { class });
    }
    // Before the work, not after it.
    if let Some(out) = &args.output
        && !args.force
        && out.exists()
    {
        return Err(DumpError::Exists { path: out.clone() }.into());
    }
    let analysis = analyze(&args.input)?;
    let plan = PrunePlan::new(
        &analysis.pages.map,
        &DropClasses(drop),
        analysis.pages.free_fill,
    );
    let beyond: Vec<_> = drop
        .iter()
        .filter(|class| !ClassSet::DEFAULT_DROP.contains(*class))
        .map(PageClass::name)
        .collect();
    let warnings: Vec<String> = match beyond.as_slice() {
        [] => Vec::new(),
        classes => vec![format!(
            "{} hold data that the guest uses: it cannot run from the result",
            classes.join(", ")
        )],
    };
    if !args.json {
        for warning in &warnings {
            eprintln!("warning: {warning}");
        }
    }
    let stats = if args.dry_run {
        None
    } else {
        Some(write(args, &analysis, &plan)?)
    };
    let seconds = started.elapsed().as_secs_f64();
    if args.json {
        print_json(args, &analysis, &plan, stats.as_ref(), seconds, &warnings);
    } else {
        print_summary(args, &analysis, &plan, stats.as_ref(), seconds);
    }
    Ok(())
}

fn write(args: &PruneArgs, analysis: &Analysis, plan: &PrunePlan) -> Result<PruneStats, CliError> {
    let bar = progress_bar("pruning", args.json);
    let mut progress = |done: u64, total: u64| {
        bar.set_length(total);
        bar.set_position(done);
    };
    let stats = match &args.output {
        Some(out) => {
            let overwrite = if args.force {
                Overwrite::Replace
            } else {
                Overwrite::Refuse
            };
            analysis
                .dump
                .prune_to(plan, out, overwrite, &mut progress)?
        }
        None => analysis.dump.prune_in_place(plan, &mut progress)?,
    };
    bar.finish_and_clear();
    Ok(stats)
}

fn print_json(
    args: &PruneArgs,
    analysis: &Analysis,
    plan: &PrunePlan,
    stats: Option<&PruneStats>,
    seconds: f64,
    warnings: &[String],
) {
    let mut report = json!({
        "kernel_release": analysis.release,
        "format": analysis.dump.format(),
        "page_size": plan.page_size().bytes(),
        "total_pages": analysis.counts.total(),
        "droppable_pages": plan.dropped_pages(),
        "droppable_bytes": plan.dropped_bytes(),
        "dry_run": args.dry_run,
        "seconds": seconds,
        "notes": analysis.pages.notes,
        "warnings": warnings,
    });
    if let (Some(stats), Some(report)) = (stats, report.as_object_mut()) {
        report.insert("dropped_bytes".into(), stats.dropped_bytes.into());
        report.insert("kept_for_fill_bytes".into(), stats.kept_for_fill.into());
        report.insert("runs".into(), stats.runs.into());
        report.insert("punched".into(), stats.punched.into());
        report.insert("joined".into(), stats.joined.into());
        report.insert("disk_before".into(), stats.disk_before.into());
        report.insert("disk_after".into(), stats.disk_after.into());
    }
    say!("{report}");
}

fn print_summary(
    args: &PruneArgs,
    analysis: &Analysis,
    plan: &PrunePlan,
    stats: Option<&PruneStats>,
    seconds: f64,
) {
    for note in &analysis.pages.notes {
        eprintln!("note: {note}");
    }
    let total = analysis.counts.total();
    let Some(stats) = stats else {
        say!(
            "would drop {} pages ({}, {} of RAM) in {} runs; nothing was changed",
            count(plan.dropped_pages()),
            size(plan.dropped_bytes()),
            percent(plan.dropped_pages(), total),
            count(plan.runs().len() as u64),
        );
        return;
    };
    let total_bytes = total.saturating_mul(plan.page_size().bytes());
    say!(
        "dropped {} of {} ({}) in {} runs, {seconds:.2} s",
        size(stats.dropped_bytes),
        size(total_bytes),
        percent(stats.dropped_bytes, total_bytes),
        count(stats.runs),
    );
    if stats.kept_for_fill > 0 {
        say!(
            "kept {} of free pages that must not read as zero in this guest",
            size(stats.kept_for_fill)
        );
    }
    if stats.joined > 0 {
        say!(
            "{} of the runs are holes in the file: a core has no room for more segments",
            count(stats.joined)
        );
    }
    if args.in_place && stats.punched == 0 {
        say!("nothing to do: what can be dropped is not in the file already");
    }
    say!(
        "on disk: {} -> {}",
        size(stats.disk_before),
        size(stats.disk_after)
    );
}
