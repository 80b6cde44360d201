//! `sonicshot prune`.

use crate::analyze::{Analysis, analyze};
use crate::args::PruneArgs;
use crate::error::CliError;
use crate::report::{count, percent, progress_bar, size};
use serde_json::json;
use sonicshot::{ClassSet, DropClasses, PrunePlan};
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
        .map(sonicshot::PageClass::name)
        .collect();
    if !beyond.is_empty() && !args.json {
        eprintln!(
            "warning: {} hold data that the guest uses: it cannot run from the result",
            beyond.join(", ")
        );
    }
    let stats = if args.dry_run {
        None
    } else {
        Some(write(args, &analysis, &plan)?)
    };
    let seconds = started.elapsed().as_secs_f64();
    if args.json {
        print_json(args, &analysis, &plan, stats.as_ref(), seconds);
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
    });
    if let (Some(stats), Some(report)) = (stats, report.as_object_mut()) {
        report.insert("dropped_bytes".into(), stats.dropped_bytes.into());
        report.insert("kept_for_fill_bytes".into(), stats.kept_for_fill.into());
        report.insert("runs".into(), stats.runs.into());
        report.insert("punched".into(), stats.punched.into());
        report.insert("disk_before".into(), stats.disk_before.into());
        report.insert("disk_after".into(), stats.disk_after.into());
    }
    println!("{report}");
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
        println!(
            "would drop {} pages ({}, {} of RAM) in {} runs; nothing was changed",
            count(plan.dropped_pages()),
            size(plan.dropped_bytes()),
            percent(plan.dropped_pages(), total),
            count(plan.runs().len() as u64),
        );
        return;
    };
    let total_bytes = total.saturating_mul(plan.page_size().bytes());
    println!(
        "dropped {} of {} ({}) in {} runs, {seconds:.2} s",
        size(stats.dropped_bytes),
        size(total_bytes),
        percent(stats.dropped_bytes, total_bytes),
        count(stats.runs),
    );
    if stats.kept_for_fill > 0 {
        println!(
            "kept {} of free pages that must not read as zero in this guest",
            size(stats.kept_for_fill)
        );
    }
    if args.in_place && stats.punched == 0 {
        println!("nothing to do: what can be dropped is not in the file already");
    }
    println!(
        "on disk: {} -> {}",
        size(stats.disk_before),
        size(stats.disk_after)
    );
}
