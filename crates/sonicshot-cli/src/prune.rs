//! `sonicshot prune`.

mod report;

use crate::args::{PruneArgs, classes};
use crate::error::CliError;
use crate::inputs::{Input, Inputs};
use crate::output::overwrite;
use crate::progress::Phase;
use crate::report::{complain, percent, say_to_stderr, size};
use report::{Expected, Report};
use sonicshot::{ClassSet, Tally};
use sonicshot_dump::DumpError;
use sonicshot_offline::{Plan, PruneOptions, PruneStats, check_droppable, check_unused};
use std::cell::Cell;
use std::collections::HashMap;
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::time::Instant;

pub(crate) fn run(args: &PruneArgs) -> Result<(), CliError> {
    #[cfg(feature = "libvmi")]
    if let Some(domain) = args.libvmi.domain() {
        return crate::libvmi::prune(args, domain);
    }
    let drop = classes(&args.drop);
    check_droppable(drop)?;
    check_meant(args, drop)?;
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
    let warnings = warnings(drop);
    if !args.json {
        for warning in &warnings {
            complain!("warning: {warning}");
        }
    }
    let sum = Cell::new(Sum::default());
    inputs.each(
        args.json,
        |input| {
            let out = outputs.get(&input.path).map(PathBuf::as_path);
            let job = Job {
                args,
                drop,
                out,
                warnings: &warnings,
            };
            sum.set(sum.get().add(job.run(input)?));
            Ok(())
        },
        || sum.get().text(args.dry_run),
    )
}

/// The trouble with dropping `classes`.
fn warnings(classes: ClassSet) -> Vec<String> {
    match classes.used_by_guest() {
        used if used.is_empty() => Vec::new(),
        used => vec![format!(
            "{used} hold data that the guest uses: it cannot run from the result"
        )],
    }
}

/// Refuses to drop what the guest uses, unless that is meant.
fn check_meant(args: &PruneArgs, drop: ClassSet) -> Result<(), CliError> {
    let used = drop.used_by_guest();
    if used.is_empty() {
        return Ok(());
    }
    if !args.for_analysis {
        check_unused(drop)?;
    }
    if args.in_place && !args.yes {
        let what = format!(
            "{used}: the guest uses that, and in place it would be gone for good: --yes says that \
             it is meant"
        );
        return Err(CliError::Usage { what });
    }
    Ok(())
}

/// The path of each input's copy.
fn outputs(args: &PruneArgs, inputs: &Inputs) -> Result<HashMap<PathBuf, PathBuf>, CliError> {
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
        // Else the next input is what was written for the one before.
        let same = |other: &Input| other.path != input.path && other.is_file_at(&to);
        if let Some(other) = inputs.iter().find(|other| same(other)) {
            return Err(usage(format!(
                "{} would be written over by what is made of {}",
                other.path.display(),
                input.path.display()
            )));
        }
        if let Some(other) = taken.insert(to.clone(), &input.path) {
            return Err(usage(format!(
                "{} and {} would both be written to {}",
                other.display(),
                input.path.display(),
                to.display()
            )));
        }
        // One of several does not stop the others.
        if !inputs.several() {
            check_free(args, input, &to)?;
        }
        outputs.insert(input.path.clone(), to);
    }
    Ok(outputs)
}

/// Refuses an output that exists, unless it may be replaced.
fn check_free(args: &PruneArgs, input: &Input, out: &Path) -> Result<(), CliError> {
    if !args.to_stdout() && input.is_file_at(out) {
        return Err(DumpError::SameFile { path: out.into() }.into());
    }
    if args.force || args.to_stdout() || !out.exists() {
        return Ok(());
    }
    Err(DumpError::Exists { path: out.into() }.into())
}

/// The outcome of one or more inputs, in bytes.
#[derive(Debug, Clone, Copy, Default)]
struct Sum {
    dropped: u64,
    total: u64,
    disk_before: u64,
    disk_after: u64,
}

impl Sum {
    fn add(self, other: Self) -> Self {
        let sum = |one, other| Tally::new(one).and(other).get();
        Self {
            dropped: sum(self.dropped, other.dropped),
            total: sum(self.total, other.total),
            disk_before: sum(self.disk_before, other.disk_before),
            disk_after: sum(self.disk_after, other.disk_after),
        }
    }

    fn text(self, dry_run: bool) -> String {
        let share = percent(self.dropped, self.total);
        let (dropped, total) = (size(self.dropped), size(self.total));
        let (before, after) = (size(self.disk_before), size(self.disk_after));
        if dry_run {
            return format!(
                "would drop {dropped} of {total} ({share}), on disk: {before} -> {after}; nothing \
                 was changed"
            );
        }
        format!("dropped {dropped} of {total} ({share}), on disk: {before} -> {after}")
    }
}

/// The work for one input.
struct Job<'a> {
    args: &'a PruneArgs,
    drop: ClassSet,
    /// The path of its copy, if there is to be one.
    out: Option<&'a Path>,
    warnings: &'a [String],
}

impl Job<'_> {
    fn run(&self, input: &Input) -> Result<Sum, CliError> {
        let args = self.args;
        let started = Instant::now();
        self.check(input)?;
        let analyzed = match input.analyze(&args.input.analyze()) {
            // Pages of zeroes need no kernel.
            Err(error) if error.is_of_the_kernel() && self.drops_zeroes_alone() => {
                input.snapshot.zero_pages()?
            }
            analyzed => analyzed?,
        };
        let plan = match args.for_analysis {
            true => analyzed.plan_for_analysis(self.drop)?,
            false => analyzed.plan(self.drop)?,
        };
        let options = (args.in_place && args.dry_run).then(|| self.options());
        let expected = Expected::of(&plan, options)?;
        let stats = if args.dry_run {
            None
        } else {
            Some(self.write(input, &plan)?)
        };
        let report = Report {
            path: &input.path,
            analyzed: &analyzed,
            plan: &plan,
            expected,
            in_place: args.in_place,
            stats: stats.as_ref(),
            seconds: started.elapsed().as_secs_f64(),
            warnings: self.warnings,
        };
        if args.json {
            report.print_json();
        } else {
            report.print_summary();
        }
        if report.has_nothing_to_do() {
            return Ok(Sum::default());
        }
        let (disk_before, disk_after) = report.disk();
        Ok(Sum {
            dropped: report.dropped().0,
            total: report.total_bytes(),
            disk_before,
            disk_after,
        })
    }

    fn drops_zeroes_alone(&self) -> bool {
        self.drop == ClassSet::EMPTY.with_zero()
    }

    /// Before the guest is looked at.
    fn check(&self, input: &Input) -> Result<(), CliError> {
        let args = self.args;
        if let Some(out) = self.out {
            check_free(args, input, out)?;
        }
        input.snapshot.check_prunable()?;
        if args.in_place && input.is_pipe() {
            let what = "standard input cannot be pruned in place: -o OUT";
            return Err(CliError::Usage { what: what.into() });
        }
        if args.in_place && !args.dry_run && !args.live_ok {
            // Long before the last moment, when it is looked at again.
            input.snapshot.check_not_in_use()?;
        }
        Ok(())
    }

    fn options(&self) -> PruneOptions {
        let mut options = PruneOptions::new()
            .overwrite(overwrite(self.args.force))
            .live_ok(self.args.live_ok);
        options.min_hole = self.args.min_hole;
        options
    }

    fn write(&self, input: &Input, plan: &Plan<'_>) -> Result<PruneStats, CliError> {
        let args = self.args;
        let phase = Phase::begin("pruning", args.json);
        let options = self.options().progress(phase.shown());
        let stats = match self.out {
            Some(_) if args.to_stdout() => plan.prune_to_writer(io::stdout().lock(), &options)?,
            Some(out) => plan.prune_to(out, &options)?,
            None if args.in_place => plan.prune_in_place(&options)?,
            None => {
                return Err(CliError::Usage {
                    what: format!("{} has no output", input.path.display()),
                });
            }
        };
        drop(phase);
        Ok(stats)
    }
}
