//! The report on a guest: as JSON, and for people.

use crate::inputs::Input;
use crate::json::{
    self, Classes, InspectReport, OfInspect, PagesByName, ProcessorJson, ProcessorState,
    ProcessorsJson, Version, ZoneJson, free_fill, path, ram, word,
};
use crate::progress::talk;
use crate::report::{bytes_of, count, lines, mib, one_line, percent, say, size};
use sonicshot::{
    ClassCounts, ClassSet, Fill, GuestMemory, PageClass, PageSize, Processor, Processors, Tally,
};
use sonicshot_offline::{Analyzed, Savings};
use sonicshot_vmi::{Knowledge, ZoneReport};

pub(crate) fn zone_json(zone: &ZoneReport) -> ZoneJson {
    ZoneJson {
        node: zone.node,
        name: zone.name.clone(),
        first_pfn: zone.span.start().raw(),
        end_pfn: zone.span.end().raw(),
        free_listed: zone.listed,
        free_flagged: zone.flagged,
        nr_free: zone.nr_free,
        nr_free_pages: zone.counter,
        isolated: zone.isolated,
        pcp: zone.pcp,
    }
}

/// The state of a processor, for people.
fn state_of(processor: &Processor) -> &'static str {
    match state(processor) {
        ProcessorState::NotStarted => "not started",
        ProcessorState::Parked => "parked",
        ProcessorState::InSmm => "in SMM",
        ProcessorState::InNestedGuest => "in a nested guest",
        ProcessorState::Started => "started",
        ProcessorState::Unknown => "unknown",
    }
}

fn state(processor: &Processor) -> ProcessorState {
    match processor {
        Processor::NotStarted => ProcessorState::NotStarted,
        Processor::Parked => ProcessorState::Parked,
        Processor::InSmm => ProcessorState::InSmm,
        Processor::InNestedGuest { .. } => ProcessorState::InNestedGuest,
        Processor::Started(_) => ProcessorState::Started,
        _ => ProcessorState::Unknown,
    }
}

/// Each processor's state and the root of its page tables, or why they are not told.
pub(crate) fn processors_json(processors: &Processors) -> Option<ProcessorsJson> {
    let one = |processor: &Processor| {
        let registers = match processor {
            Processor::Started(registers) => Some(registers),
            Processor::InNestedGuest { host } => host.as_ref(),
            _ => None,
        };
        ProcessorJson {
            state: state(processor),
            cr3: registers.map(|registers| registers.cr3),
        }
    };
    let not_told = |why: &dyn ToString| ProcessorsJson::NotTold {
        not_told: why.to_string(),
    };
    match processors {
        Processors::Known(all) => Some(ProcessorsJson::Known(all.iter().map(one).collect())),
        Processors::NotTold(why) => Some(not_told(why)),
        Processors::Crashed => Some(not_told(&"it is of a crashed kernel")),
        _ => None,
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
    let mut counts: Vec<(&str, Tally)> = Vec::new();
    for state in all.iter().map(state_of) {
        match counts.iter_mut().find(|(name, _)| *name == state) {
            Some((_, count)) => count.add(1),
            None => counts.push((state, Tally::new(1))),
        }
    }
    let parts: Vec<_> = counts
        .iter()
        .map(|(name, n)| format!("{n} {name}"))
        .collect();
    Some(parts.join(", "))
}

/// The pages of each class, and those of them that hold only zeroes.
pub(crate) fn classes_json(counts: &ClassCounts) -> Classes {
    let of = |count: &dyn Fn(PageClass) -> u64| -> PagesByName {
        let classes = PageClass::ALL.iter();
        classes
            .map(|class| (class.name().to_owned(), count(*class)))
            .collect()
    };
    Classes {
        classes: of(&|class| counts.get(class)),
        classes_zero: of(&|class| counts.zero(class)),
    }
}

pub(super) fn json_report(
    input: &Input,
    analyzed: &Analyzed,
    zero_pages: u64,
    savings: Savings,
) -> InspectReport {
    let (dump, facts) = (analyzed.dump(), analyzed.facts());
    let counts = analyzed.counts();
    let plan = analyzed.droppable(ClassSet::DEFAULT_DROP);
    let page_size = analyzed.pages().page_size().bytes();
    let absent = bytes_of(counts.get(PageClass::Absent), page_size);
    let (free_fill, free_fill_byte) = free_fill(analyzed.free_fill());
    InspectReport {
        version: Version::default(),
        kind: OfInspect::default(),
        path: path(&input.path),
        vmm: input.snapshot.vmm().map(|vmm| vmm.name().to_string()),
        format: word(dump.format()),
        format_name: dump.format().to_owned(),
        file_bytes: dump.file_len().ok(),
        libvmi: None,
        kernel_release: facts.release.clone(),
        kernel_banner: facts.banner.clone(),
        symbol_sources: facts.symbol_sources.clone(),
        knowledge: facts.knowledge.name().to_owned(),
        layout: dump.layout_spec().map(ToString::to_string),
        layout_origin: Some(analyzed.layout_origin().to_owned()),
        ram: ram(dump.layout()),
        processors: processors_json(&dump.processors()),
        page_size,
        total_pages: counts.total(),
        classes: classes_json(counts),
        zero_in_use_pages: counts.total_zero(),
        missing_bytes: absent,
        missing_mib: mib(absent),
        missing_in_use_pages: Some(analyzed.absent_in_use()),
        incomplete: dump.incomplete().map(|why| why.to_string()),
        savings: json::Savings {
            disk_before: Some(savings.disk_before),
            disk_after: Some(savings.disk_after()),
            droppable_pages: plan.dropped_pages(),
            droppable_bytes: plan.dropped_bytes(),
        },
        zero_pages,
        free_fill,
        free_fill_byte,
        zones: analyzed.zones().iter().map(zone_json).collect(),
        inconsistent_blocks: analyzed.disagreement().map_or(0, |found| found.blocks),
        paused_seconds: None,
        notes: lines(analyzed.notes()),
        page: None,
        free_lists: None,
    }
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
    for note in analyzed.notes().iter().filter(|_| !talk().quiet) {
        say!("note: {note}");
    }
}

/// The file, its kernel and its layout.
fn print_guest(analyzed: &Analyzed) {
    let (dump, facts) = (analyzed.dump(), analyzed.facts());
    let len = dump.file_len();
    let len = len.map_or_else(|error| error.to_string(), |len| size(len).to_string());
    say!("file      {}, {len}", dump.format());
    say!("kernel    {}", one_line(&facts.release));
    if let Some(banner) = &facts.banner {
        say!("          {}", one_line(banner.trim_end()));
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
            format!("{}/{}", zone.node, one_line(&zone.name)),
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
    let bytes = |pages: u64| size(bytes_of(pages, page_size.bytes()));
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

/// The bytes that a prune saves, and those that are saved without looking for a guest.
fn print_savings(analyzed: &Analyzed, zero_pages: u64, savings: Savings) {
    let page_size = analyzed.pages().page_size().bytes();
    let total = analyzed.counts().total();
    let bytes = |pages: u64| size(bytes_of(pages, page_size));
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
