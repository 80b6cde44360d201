//! `sonicshot inspect`.

use crate::analyze::{Analysis, analyze};
use crate::args::InspectArgs;
use crate::checkpoint::overwrite;
use crate::error::CliError;
use crate::inputs::{Input, Inputs};
use crate::report::{count, percent, say, size};
use serde_json::{Map, Value, json};
use sonicshot::{ClassSet, GuestMemory, PageClass, Processor, Processors, PrunePlan};
use sonicshot_dump::{NewFile, Vmm};
use sonicshot_vmi::{ZoneReport, count_zero_pages};
use std::cell::Cell;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

pub(crate) fn run(args: &InspectArgs) -> Result<(), CliError> {
    let inputs = Inputs::find(&args.files, &args.input, args.json);
    if inputs.several() && args.pfns.is_some() {
        return Err(CliError::Usage {
            what: "--pfns writes of one input".into(),
        });
    }
    let saved = Cell::new((0_u64, 0_u64));
    inputs.each(
        args.json,
        |input| {
            let (dropped, total) = one(args, input)?;
            let (all, of) = saved.get();
            saved.set((all.saturating_add(dropped), of.saturating_add(total)));
            Ok(())
        },
        || {
            let (dropped, total) = saved.get();
            let share = percent(dropped, total);
            format!(
                "a prune saves {} of {} ({share})",
                size(dropped),
                size(total)
            )
        },
    )
}

/// Shows one input; returns how many bytes a prune saves, and of how many.
fn one(args: &InspectArgs, input: &Input<'_>) -> Result<(u64, u64), CliError> {
    if crate::checkpoint::is_checkpoint(input.memory()) {
        crate::checkpoint::inspect(input.memory(), args)?;
        return Ok((0, 0));
    }
    if let Some(path) = &args.pfns
        && let Ok(there) = fs::metadata(path)
    {
        if !args.force {
            return Err(CliError::Exists { path: path.clone() });
        }
        let dump = fs::metadata(input.memory()).map(|dump| (dump.dev(), dump.ino()));
        if dump.is_ok_and(|dump| dump == (there.dev(), there.ino())) {
            return Err(CliError::OverDump { path: path.clone() });
        }
        if !there.is_file() {
            let source = io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file");
            let (action, path) = ("replacing", path.clone());
            return Err(CliError::Io {
                action,
                path,
                source,
            });
        }
    }
    let analysis = analyze(input)?;
    let zero_pages = count_zero_pages(&analysis.dump, &analysis.pages.map)?;
    if let Some(path) = &args.pfns {
        write_pfns(&analysis, path, args.force)?;
    }
    if args.json {
        let mut report = json_report(&analysis, zero_pages);
        if let Some(report) = report.as_object_mut() {
            report.insert("path".into(), input.path.display().to_string().into());
            report.insert("vmm".into(), input.files.vmm().map(Vmm::name).into());
        }
        say!("{report}");
    } else {
        if let Some(vmm) = input.files.vmm() {
            say!(
                "snapshot  {}, memory in {}",
                vmm.name(),
                input.memory().display()
            );
        }
        print_report(&analysis, zero_pages);
    }
    let page_size = analysis.pages.map.page_size().bytes();
    let total = analysis.counts.total().saturating_mul(page_size);
    Ok((default_plan(&analysis).dropped_bytes(), total))
}

/// What the default policy drops of this dump.
fn default_plan(analysis: &Analysis) -> PrunePlan {
    let plan = analysis.plan(ClassSet::DEFAULT_DROP);
    analysis.dump.restorable(&plan)
}

/// Writes a line for each run of frames of one class; the file appears whole or not at all.
fn write_pfns(analysis: &Analysis, path: &Path, force: bool) -> Result<(), CliError> {
    let file = NewFile::create(path, overwrite(force), &analysis.dump.files())?;
    write_runs(analysis, BufWriter::new(file.file())).map_err(|source| CliError::Io {
        action: "writing",
        path: path.into(),
        source,
    })?;
    file.finish()?;
    Ok(())
}

fn write_runs(analysis: &Analysis, mut out: BufWriter<&File>) -> io::Result<()> {
    for (frames, class) in analysis.pages.map.runs() {
        let last = frames.end().raw().saturating_sub(1);
        writeln!(out, "{}\t{last}\t{class}", frames.start().raw())?;
    }
    out.flush()
}

fn zone_json(zone: &ZoneReport) -> Value {
    json!({
        "node": zone.node,
        "name": zone.name,
        "first_pfn": zone.span.start().raw(),
        "end_pfn": zone.span.end().raw(),
        "free_listed": zone.listed,
        "free_flagged": zone.flagged,
        "nr_free": zone.nr_free,
        "nr_free_pages": zone.counter,
        "isolated": zone.isolated,
        "pcp": zone.pcp,
    })
}

/// One word for what a processor does.
fn state_of(processor: &Processor) -> &'static str {
    match processor {
        Processor::NotStarted => "not started",
        Processor::Parked => "parked",
        Processor::InSmm => "in SMM",
        Processor::InNestedGuest { .. } => "in a nested guest",
        Processor::Started(_) => "started",
        _ => "unknown",
    }
}

/// A list with each processor's state and the root of its page tables, or why there is none.
fn processors_json(processors: &Processors) -> Value {
    let one = |processor: &Processor| {
        let registers = match processor {
            Processor::Started(registers) => Some(registers),
            Processor::InNestedGuest { host } => host.as_ref(),
            _ => None,
        };
        json!({"state": state_of(processor), "cr3": registers.map(|registers| registers.cr3)})
    };
    match processors {
        Processors::Known(all) => all.iter().map(one).collect(),
        Processors::NotTold(why) => json!({"not_told": why}),
        Processors::Crashed => json!({"not_told": "it is of a crashed kernel"}),
        _ => Value::Null,
    }
}

/// The same as a line, if there is something to say.
fn processors_line(processors: &Processors) -> Option<String> {
    let all = match processors {
        Processors::Known(all) => all,
        Processors::NotTold(why) => return Some(format!("not told: {why}")),
        Processors::Crashed => return Some("those of a crashed kernel, without registers".into()),
        _ => return None,
    };
    let mut counts: Vec<(&str, usize)> = Vec::new();
    for state in all.iter().map(state_of) {
        match counts.iter_mut().find(|(name, _)| *name == state) {
            Some((_, count)) => *count = count.saturating_add(1),
            None => counts.push((state, 1)),
        }
    }
    let parts: Vec<_> = counts
        .iter()
        .map(|(name, n)| format!("{n} {name}"))
        .collect();
    Some(parts.join(", "))
}

pub(crate) fn json_report(analysis: &Analysis, zero_pages: u64) -> Value {
    let page_size = analysis.pages.map.page_size().bytes();
    let mut classes = Map::new();
    for class in PageClass::ALL {
        classes.insert(class.name().into(), analysis.counts.get(*class).into());
    }
    let plan = default_plan(analysis);
    let regions: Vec<_> = analysis
        .dump
        .layout()
        .regions()
        .iter()
        .map(|r| json!([r.start().raw(), r.end().raw()]))
        .collect();
    json!({
        "format": analysis.dump.format(),
        "file_bytes": analysis.dump.file_len(),
        "kernel_release": analysis.release,
        "kernel_banner": analysis.banner,
        "symbol_sources": analysis.symbol_sources,
        "layout": analysis.dump.layout_spec().map(ToString::to_string),
        "layout_origin": analysis.layout_origin,
        "ram": regions,
        "processors": processors_json(&analysis.dump.processors()),
        "page_size": page_size,
        "total_pages": analysis.counts.total(),
        "classes": classes,
        "droppable_pages": plan.dropped_pages(),
        "droppable_bytes": plan.dropped_bytes(),
        "zero_pages": zero_pages,
        "free_fill": format!("{:?}", analysis.pages.free_fill),
        "zones": analysis.pages.zones.iter().map(zone_json).collect::<Vec<_>>(),
        "inconsistent_blocks": analysis.pages.disagreement.as_ref().map_or(0, |d| d.blocks),
        "notes": analysis.notes,
    })
}

pub(crate) fn print_report(analysis: &Analysis, zero_pages: u64) {
    let page_size = analysis.pages.map.page_size().bytes();
    let total = analysis.counts.total();
    let bytes = |pages: u64| size(pages.saturating_mul(page_size));
    say!(
        "file      {}, {}",
        analysis.dump.format(),
        size(analysis.dump.file_len())
    );
    say!("kernel    {}", analysis.release);
    if let Some(banner) = &analysis.banner {
        say!("          {banner}");
    }
    say!("symbols   {}", analysis.symbol_sources.join(", "));
    match analysis.dump.layout_spec() {
        Some(layout) => say!("layout    {layout} ({})", analysis.layout_origin),
        None => say!("layout    {}", analysis.layout_origin),
    }
    for region in analysis.dump.layout().regions() {
        say!("          {region} ({})", size(region.len()));
    }
    if let Some(line) = processors_line(&analysis.dump.processors()) {
        say!("cpus      {line}");
    }
    say!("");
    say!(
        "{:<10} {:>23} {:>12} {:>10} {:>10}",
        "zone",
        "frames",
        "free pages",
        "counter",
        "per-CPU"
    );
    for zone in &analysis.pages.zones {
        say!(
            "{:<10} {:>23} {:>12} {:>10} {:>10}",
            format!("{}/{}", zone.node, zone.name),
            zone.span.to_string(),
            count(zone.listed),
            zone.counter,
            count(zone.pcp),
        );
    }
    say!("");
    say!(
        "{:<18} {:>12} {:>12} {:>8}",
        "class",
        "pages",
        "size",
        "share"
    );
    for (class, pages) in analysis.counts.iter() {
        let goes = ClassSet::DEFAULT_DROP.contains(class) && analysis.can_go(class);
        let mark = if goes { "*" } else { "" };
        say!(
            "{:<18} {:>12} {:>12} {:>8}",
            format!("{class}{mark}"),
            count(pages),
            bytes(pages),
            percent(pages, total)
        );
    }
    say!(
        "{:<18} {:>12} {:>12} {:>8}",
        "total",
        count(total),
        bytes(total),
        ""
    );
    let plan = default_plan(analysis);
    let dropped = plan.dropped_pages();
    say!("");
    say!(
        "a prune saves                {:>12} {:>8}  (the classes marked *)",
        bytes(dropped),
        percent(dropped, total)
    );
    say!(
        "leaving out zero pages alone {:>12} {:>8}",
        bytes(zero_pages),
        percent(zero_pages, total)
    );
    for note in &analysis.notes {
        say!("note: {note}");
    }
}
