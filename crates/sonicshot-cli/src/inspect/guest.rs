//! What there is to say of a guest: as JSON, and for people.

use crate::report::{count, lines, mib, percent, say, size};
use serde_json::{Map, Value, json};
use sonicshot::{
    ClassCounts, ClassSet, Fill, GuestMemory, PageClass, PageSize, Processor, Processors,
};
use sonicshot_offline::{Analyzed, Savings};
use sonicshot_vmi::{Knowledge, ZoneReport};

pub(crate) fn zone_json(zone: &ZoneReport) -> Value {
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
pub(crate) fn processors_json(processors: &Processors) -> Value {
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
pub(crate) fn processors_line(processors: &Processors) -> Option<String> {
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

/// How many pages each class has, and how many of those hold only zeroes.
pub(crate) fn classes_json(counts: &ClassCounts) -> (Map<String, Value>, Map<String, Value>) {
    let (mut classes, mut zero) = (Map::new(), Map::new());
    for class in PageClass::ALL {
        classes.insert(class.name().into(), counts.get(*class).into());
        zero.insert(class.name().into(), counts.zero(*class).into());
    }
    (classes, zero)
}

pub(super) fn json_report(analyzed: &Analyzed, zero_pages: u64, savings: Savings) -> Value {
    let (dump, facts) = (analyzed.dump(), analyzed.facts());
    let counts = analyzed.counts();
    let (classes, zero) = classes_json(counts);
    let plan = analyzed.droppable(ClassSet::DEFAULT_DROP);
    let absent = counts.get(PageClass::Absent);
    let page_size = analyzed.pages().page_size().bytes();
    let regions = dump.layout().regions().iter();
    let regions: Vec<_> = regions
        .map(|r| json!([r.start().raw(), r.end().raw()]))
        .collect();
    json!({
        "format": dump.format(),
        "file_bytes": dump.file_len(),
        "kernel_release": facts.release,
        "kernel_banner": facts.banner,
        "symbol_sources": facts.symbol_sources,
        "knowledge": facts.knowledge.name(),
        "layout": dump.layout_spec().map(ToString::to_string),
        "layout_origin": analyzed.layout_origin(),
        "ram": regions,
        "processors": processors_json(&dump.processors()),
        "page_size": page_size,
        "total_pages": counts.total(),
        "classes": classes,
        "classes_zero": zero,
        "zero_in_use_pages": counts.total_zero(),
        "missing_bytes": absent.saturating_mul(page_size),
        "missing_mib": mib(absent.saturating_mul(page_size)),
        "missing_in_use_pages": analyzed.absent_in_use(),
        "incomplete": dump.incomplete().map(|why| why.to_string()),
        "disk_before": savings.disk_before,
        "disk_after": savings.disk_after(),
        "droppable_pages": plan.dropped_pages(),
        "droppable_bytes": plan.dropped_bytes(),
        "zero_pages": zero_pages,
        "free_fill": format!("{:?}", analyzed.free_fill()),
        "zones": analyzed.zones().iter().map(zone_json).collect::<Vec<_>>(),
        "inconsistent_blocks": analyzed.disagreement().map_or(0, |found| found.blocks),
        "notes": lines(analyzed.notes()),
    })
}

pub(crate) fn print_report(analyzed: &Analyzed, zero_pages: u64, savings: Savings) {
    print_guest(analyzed);
    say!("");
    print_zones(analyzed.zones());
    say!("");
    let goes = |class| ClassSet::DEFAULT_DROP.contains(class) && analyzed.can_go(class);
    // Where zero pages in use stay, they are not marked as what goes.
    let zero_goes = analyzed.leaves_out(ClassSet::DEFAULT_DROP).contains_zero()
        && analyzed.dump().restores(Fill::Zero);
    let page_size = analyzed.pages().page_size();
    print_classes(analyzed.counts(), page_size, &goes, zero_goes);
    say!("");
    print_savings(analyzed, zero_pages, savings);
    for note in analyzed.notes() {
        say!("note: {note}");
    }
}

/// The file, its kernel and its layout.
fn print_guest(analyzed: &Analyzed) {
    let (dump, facts) = (analyzed.dump(), analyzed.facts());
    say!("file      {}, {}", dump.format(), size(dump.file_len()));
    say!("kernel    {}", facts.release);
    if let Some(banner) = &facts.banner {
        say!("          {banner}");
    }
    say!("symbols   {}", facts.symbol_sources.join(", "));
    if facts.knowledge != Knowledge::Types {
        let known = facts.knowledge;
        say!("knowledge {known}: free pages and zeroes are told, all others are kept");
    }
    match dump.layout_spec() {
        Some(layout) => say!("layout    {layout} ({})", analyzed.layout_origin()),
        None => say!("layout    {}", analyzed.layout_origin()),
    }
    for region in dump.layout().regions() {
        say!("          {region} ({})", size(region.len()));
    }
    if let Some(line) = processors_line(&dump.processors()) {
        say!("cpus      {line}");
    }
}

pub(crate) fn print_zones(zones: &[ZoneReport]) {
    say!(
        "{:<10} {:>23} {:>12} {:>10} {:>10}",
        "zone",
        "frames",
        "free pages",
        "counter",
        "per-CPU"
    );
    for zone in zones {
        say!(
            "{:<10} {:>23} {:>12} {:>10} {:>10}",
            format!("{}/{}", zone.node, zone.name),
            zone.span.to_string(),
            count(zone.listed),
            zone.counter,
            count(zone.pcp),
        );
    }
}

/// The classes, those marked that go.
pub(crate) fn print_classes(
    counts: &ClassCounts,
    page_size: PageSize,
    goes: &dyn Fn(PageClass) -> bool,
    zero_goes: bool,
) {
    let total = counts.total();
    let bytes = |pages: u64| size(pages.saturating_mul(page_size.bytes()));
    let zero = if zero_goes { "of zeroes*" } else { "of zeroes" };
    say!(
        "{:<18} {:>12} {:>12} {:>8} {zero:>12}",
        "class",
        "pages",
        "size",
        "share",
    );
    for (class, pages) in counts.iter() {
        let mark = if goes(class) { "*" } else { "" };
        say!(
            "{:<18} {:>12} {:>12} {:>8} {:>12}",
            format!("{class}{mark}"),
            count(pages),
            bytes(pages),
            percent(pages, total),
            match counts.zero(class) {
                0 => String::new(),
                zero => count(zero),
            }
        );
    }
    say!(
        "{:<18} {:>12} {:>12} {:>8} {:>12}",
        "total",
        count(total),
        bytes(total),
        "",
        count(counts.total_zero())
    );
}

/// What a prune saves, and what is saved without looking for a guest.
fn print_savings(analyzed: &Analyzed, zero_pages: u64, savings: Savings) {
    let page_size = analyzed.pages().page_size().bytes();
    let total = analyzed.counts().total();
    let bytes = |pages: u64| size(pages.saturating_mul(page_size));
    let dropped = analyzed.droppable(ClassSet::DEFAULT_DROP).dropped_pages();
    say!(
        "a prune drops                {:>12} {:>8}  of RAM (what is marked *)",
        bytes(dropped),
        percent(dropped, total)
    );
    let (before, after) = (savings.disk_before, savings.disk_after());
    say!(
        "on disk, before and after    {:>12} {:>8}",
        format!("{} ->", size(before)),
        size(after)
    );
    say!(
        "leaving out zero pages alone {:>12} {:>8}",
        bytes(zero_pages),
        percent(zero_pages, total)
    );
}
