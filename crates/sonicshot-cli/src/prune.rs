//! `sonicshot prune`.

use crate::analyze::{Analysis, analyze};
use crate::args::PruneArgs;
use crate::error::CliError;
use crate::inputs::{Input, Inputs};
use crate::report::{count, percent, progress_bar, say, say_to_stderr, size};
use serde_json::json;
use sonicshot::{ClassSet, PageClass, PrunePlan};
use sonicshot_dump::{DumpError, NewFolder, Overwrite, PruneOptions, PruneStats, check_not_in_use};
use std::cell::Cell;
use std::collections::HashMap;
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::time::Instant;

pub(crate) fn run(args: &PruneArgs) -> Result<(), CliError> {
    let drop: ClassSet = args.drop.iter().copied().collect();
    if let Some(class) = drop.iter().find(|class| !class.may_be_dropped()) {
        return Err(CliError::Undroppable { class });
    }
    if args.to_stdout() {
        if io::stdout().is_terminal() {
            let what = "a dump is not written to a terminal: give a file, or pipe it";
            return Err(CliError::Usage { what: what.into() });
        }
        say_to_stderr();
    }
    let inputs = Inputs::find(&args.files, &args.input, args.json);
    // Before the work, not after it.
    let outputs = outputs(args, &inputs)?;
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
    let sum = Cell::new(Sum::default());
    inputs.each(
        args.json,
        |input| {
            let out = outputs.get(&input.path).map(PathBuf::as_path);
            let one = one(args, drop, input, out, &warnings)?;
            sum.set(sum.get().add(one));
            Ok(())
        },
        || sum.get().text(args.dry_run),
    )
}

/// Where each input's copy goes.
fn outputs(args: &PruneArgs, inputs: &Inputs<'_>) -> Result<HashMap<PathBuf, PathBuf>, CliError> {
    let mut outputs = HashMap::new();
    let Some(out) = &args.output else {
        return Ok(outputs);
    };
    let usage = |what| CliError::Usage { what };
    if args.to_stdout() {
        if inputs.several() {
            return Err(usage("only one input can go to standard output".into()));
        }
        outputs.extend(inputs.iter().map(|input| (input.path.clone(), out.clone())));
        return Ok(outputs);
    }
    if inputs.several() && !out.is_dir() {
        let what = format!(
            "of several inputs, {} must be a folder that exists",
            out.display()
        );
        return Err(usage(what));
    }
    let mut taken: HashMap<PathBuf, &Path> = HashMap::new();
    for input in inputs.iter() {
        let to = if inputs.several() {
            let name = input.name();
            let name =
                name.ok_or_else(|| usage(format!("{} has no name", input.path.display())))?;
            out.join(name)
        } else {
            out.clone()
        };
        if let Some(other) = taken.insert(to.clone(), &input.path) {
            return Err(usage(format!(
                "{} and {} would both be written to {}",
                other.display(),
                input.path.display(),
                to.display()
            )));
        }
        if !args.force && to.exists() {
            return Err(DumpError::Exists { path: to }.into());
        }
        outputs.insert(input.path.clone(), to);
    }
    Ok(outputs)
}

/// What came of one or more inputs, in bytes.
#[derive(Debug, Clone, Copy, Default)]
struct Sum {
    dropped: u64,
    total: u64,
    disk_before: u64,
    disk_after: u64,
}

impl Sum {
    fn add(self, other: Self) -> Self {
        Self {
            dropped: self.dropped.saturating_add(other.dropped),
            total: self.total.saturating_add(other.total),
            disk_before: self.disk_before.saturating_add(other.disk_before),
            disk_after: self.disk_after.saturating_add(other.disk_after),
        }
    }

    fn text(self, dry_run: bool) -> String {
        let share = percent(self.dropped, self.total);
        let (dropped, total) = (size(self.dropped), size(self.total));
        if dry_run {
            return format!("would drop {dropped} of {total} ({share}); nothing was changed");
        }
        let (before, after) = (size(self.disk_before), size(self.disk_after));
        format!("dropped {dropped} of {total} ({share}), on disk: {before} -> {after}")
    }
}

fn one(
    args: &PruneArgs,
    drop: ClassSet,
    input: &Input<'_>,
    out: Option<&Path>,
    warnings: &[String],
) -> Result<Sum, CliError> {
    let started = Instant::now();
    input.files.check_prunable()?;
    if args.in_place && input.is_pipe() {
        let what = "standard input cannot be pruned in place: -o OUT";
        return Err(CliError::Usage { what: what.into() });
    }
    if args.in_place && !args.dry_run && !args.live_ok {
        // Long before the last moment, when it is looked at again.
        check_not_in_use(input.memory())?;
    }
    let analysis = analyze(input)?;
    let plan = analysis.plan(drop);
    let stats = if args.dry_run {
        None
    } else {
        Some(write(args, input, out, &analysis, &plan)?)
    };
    let seconds = started.elapsed().as_secs_f64();
    let plan = analysis.dump.restorable(&plan);
    if args.json {
        print_json(
            args,
            input,
            &analysis,
            &plan,
            stats.as_ref(),
            seconds,
            warnings,
        );
    } else {
        print_summary(args, &analysis, &plan, stats.as_ref(), seconds);
    }
    let stats_of = stats.unwrap_or_default();
    Ok(Sum {
        dropped: stats.map_or(plan.dropped_bytes(), |stats| stats.dropped_bytes),
        total: analysis
            .counts
            .total()
            .saturating_mul(plan.page_size().bytes()),
        disk_before: stats_of.disk_before,
        disk_after: stats_of.disk_after,
    })
}

fn write(
    args: &PruneArgs,
    input: &Input<'_>,
    out: Option<&Path>,
    analysis: &Analysis,
    plan: &PrunePlan,
) -> Result<PruneStats, CliError> {
    let bar = progress_bar("pruning", args.json);
    let mut progress = |done: u64, total: u64| {
        bar.set_length(total);
        bar.set_position(done);
    };
    let overwrite = if args.force {
        Overwrite::Replace
    } else {
        Overwrite::Refuse
    };
    let dump = &analysis.dump;
    let stats = match out {
        Some(_) if args.to_stdout() => {
            dump.prune_to_writer(plan, io::stdout().lock(), &mut progress)?
        }
        Some(out) if input.files.folder().is_some() => {
            let folder = NewFolder::create(out, overwrite, &input.files)?;
            let stats = folder.write_memory(dump, plan, &mut progress)?;
            folder.finish()?;
            stats
        }
        Some(out) => dump.prune_to(plan, out, overwrite, &mut progress)?,
        None if args.in_place => {
            let mut options = PruneOptions::new().live_ok(args.live_ok);
            options.min_hole = args.min_hole;
            dump.prune_in_place_with(plan, &options, &mut progress)?
        }
        None => {
            return Err(CliError::Usage {
                what: format!("{} has no output", input.path.display()),
            });
        }
    };
    bar.finish_and_clear();
    Ok(stats)
}

fn print_json(
    args: &PruneArgs,
    input: &Input<'_>,
    analysis: &Analysis,
    plan: &PrunePlan,
    stats: Option<&PruneStats>,
    seconds: f64,
    warnings: &[String],
) {
    let mut report = json!({
        "path": input.path.display().to_string(),
        "kernel_release": analysis.release,
        "format": analysis.dump.format(),
        "page_size": plan.page_size().bytes(),
        "total_pages": analysis.counts.total(),
        "droppable_pages": plan.dropped_pages(),
        "droppable_bytes": plan.dropped_bytes(),
        "dry_run": args.dry_run,
        "seconds": seconds,
        "notes": analysis.notes,
        "warnings": warnings,
    });
    if let (Some(stats), Some(report)) = (stats, report.as_object_mut()) {
        report.insert("dropped_bytes".into(), stats.dropped_bytes.into());
        report.insert("kept_for_fill_bytes".into(), stats.kept_for_fill.into());
        report.insert("kept_for_base_bytes".into(), stats.kept_for_base.into());
        report.insert("runs".into(), stats.runs.into());
        report.insert("punched".into(), stats.punched.into());
        report.insert("joined".into(), stats.joined.into());
        report.insert("left_bytes".into(), stats.left_bytes.into());
        report.insert("left_runs".into(), stats.left_runs.into());
        report.insert("cloned_bytes".into(), stats.cloned_bytes.into());
        report.insert("extents_before".into(), stats.extents_before.into());
        report.insert("extents_after".into(), stats.extents_after.into());
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
    for note in &analysis.notes {
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
            "kept {} that would not read as the guest expects after a restore",
            size(stats.kept_for_fill)
        );
    }
    if stats.kept_for_base > 0 {
        say!(
            "kept {} of the diff: what the base has there is not zero",
            size(stats.kept_for_base)
        );
    }
    if stats.joined > 0 {
        say!(
            "{} of the runs are holes in the file: a core has no room for more segments",
            count(stats.joined)
        );
    }
    if args.in_place && stats.punched == 0 && stats.left_bytes == 0 {
        say!("nothing to do: what can be dropped is not in the file already");
    } else if args.in_place {
        say!("punched {}", holes(stats));
    }
    if stats.left_bytes > 0 {
        say!(
            "left {} in the file: {} stretches are shorter than the smallest hole (--min-hole)",
            size(stats.left_bytes),
            count(stats.left_runs)
        );
    }
    if stats.cloned_bytes > 0 {
        say!("shared {} with the input", size(stats.cloned_bytes));
    }
    say!(
        "on disk: {} -> {}",
        size(stats.disk_before),
        size(stats.disk_after)
    );
}

fn holes(stats: &PruneStats) -> String {
    let holes = format!("{} holes", count(stats.punched));
    match (stats.extents_before, stats.extents_after) {
        (Some(before), Some(after)) => format!(
            "{holes}; stretches of data in the file: {} -> {}",
            count(before),
            count(after)
        ),
        _ => holes,
    }
}
