//! `sonicshot inspect --libvmi`.

use super::{Look, format, library_json, notes};
use crate::args::InspectArgs;
use crate::error::CliError;
use crate::inputs::PIPE;
use crate::inspect::{
    check_replaceable, classes_json, explain, free_zone_json, print_classes, print_records,
    print_zones, processors_json, processors_line, write_runs, write_to, zone_json,
};
use crate::json::{
    InspectReport, LibVmiVersion, OfInspect, Savings, Version, free_fill, line, ram, word,
};
use crate::progress::Phase;
use crate::report::{bytes_of, count, mib, percent, say, say_to_stderr, size};
use sonicshot::{ClassSet, DropClasses, GuestMemory, PageClass, PrunePlan, WorkOptions};
use sonicshot_libvmi::Domain;
use sonicshot_vmi::{Knowledge, count_zero_pages};
use std::path::Path;
use std::time::Duration;

pub(crate) fn inspect(args: &InspectArgs, domain: Domain) -> Result<(), CliError> {
    if args.map.is_some() {
        return Err(CliError::Usage {
            what: "--map draws the pages of a file".into(),
        });
    }
    let pfns = args.pfns.as_deref();
    match pfns {
        Some(path) if path == Path::new(PIPE) => say_to_stderr(),
        Some(path) => check_replaceable(path, Path::new(""), args.force)?,
        None => {}
    }
    let look = Look::at(&args.libvmi, domain, &args.input, true, args.json)?;
    let phase = Phase::begin("finding zero pages", args.json);
    let work = WorkOptions::new().progress(phase.shown());
    let zero_pages = count_zero_pages(&look.guest, look.analysis.pages(), &work)?;
    drop(phase);
    let plan = look.analysis.plan(&DropClasses::default());
    let page = args.explain.map(|pfn| {
        explain(look.analysis.pages(), &plan, pfn, |pfn| {
            look.records(|guest| guest.page_facts(pfn))
        })
    });
    let lists = args.free_lists;
    let lists = lists.map(|most| look.records(|guest| guest.free_lists(most)));
    let (page, lists) = (page.transpose()?, lists.transpose()?);
    let seen = Seen {
        processors: look.guest.processors(),
        ram: look.guest.layout().clone(),
        plan,
        zero_pages,
        paused: Look::resume(look.guest, look.since)?,
        domain: look.domain,
        library: library_json(&look.library),
        version: look.library.version().to_string(),
        analysis: look.analysis,
    };
    if let Some(path) = pfns {
        let pages = seen.analysis.pages();
        write_to(path, args.force, &[], &|out| write_runs(pages, out))?;
    }
    if args.json {
        let mut report = seen.json();
        report.page = page.map(|page| Box::new(page.to_json()));
        report.free_lists = lists.map(|zones| zones.iter().map(free_zone_json).collect());
        say!("{}", line(&report));
    } else if page.is_some() || lists.is_some() {
        print_records(page.as_ref(), lists.as_deref());
    } else {
        seen.print();
    }
    Ok(())
}

/// The facts of a guest that runs on again.
struct Seen {
    domain: Domain,
    library: LibVmiVersion,
    version: String,
    analysis: sonicshot_vmi::Analysis,
    processors: sonicshot::Processors,
    ram: sonicshot::RamLayout,
    plan: PrunePlan,
    zero_pages: u64,
    paused: Duration,
}

impl Seen {
    fn json(&self) -> InspectReport {
        let (analysis, facts) = (&self.analysis, self.analysis.facts());
        let counts = analysis.counts();
        let page_size = facts.page_size.bytes();
        let absent = bytes_of(counts.get(PageClass::Absent), page_size);
        let (free_fill, free_fill_byte) = free_fill(analysis.free_fill());
        InspectReport {
            version: Version::default(),
            kind: OfInspect::default(),
            path: self.domain.to_string(),
            vmm: None,
            format: word(&format(&self.domain)),
            format_name: format(&self.domain),
            file_bytes: None,
            libvmi: Some(self.library.clone()),
            kernel_release: facts.release.clone(),
            kernel_banner: facts.banner.clone(),
            symbol_sources: facts.symbol_sources.clone(),
            knowledge: facts.knowledge.name().to_owned(),
            layout: None,
            layout_origin: None,
            ram: ram(&self.ram),
            processors: processors_json(&self.processors),
            page_size,
            total_pages: counts.total(),
            classes: classes_json(&counts),
            zero_in_use_pages: counts.total_zero(),
            missing_bytes: absent,
            missing_mib: mib(absent),
            missing_in_use_pages: None,
            incomplete: None,
            savings: Savings {
                disk_before: None,
                disk_after: None,
                droppable_pages: self.plan.dropped_pages(),
                droppable_bytes: self.plan.dropped_bytes(),
            },
            zero_pages: self.zero_pages,
            free_fill,
            free_fill_byte,
            zones: analysis.zones().iter().map(zone_json).collect(),
            inconsistent_blocks: analysis.disagreement().map_or(0, |found| found.blocks),
            paused_seconds: Some(self.paused.as_secs_f64()),
            notes: notes(analysis),
            page: None,
            free_lists: None,
        }
    }

    fn print(&self) {
        let (analysis, facts) = (&self.analysis, self.analysis.facts());
        let counts = analysis.counts();
        say!("guest     {}, by LibVMI {}", self.domain, self.version);
        say!("kernel    {}", facts.release);
        if let Some(banner) = &facts.banner {
            say!("          {banner}");
        }
        say!("symbols   {}", facts.symbol_sources.join(", "));
        if facts.knowledge != Knowledge::Types {
            let known = facts.knowledge;
            say!("knowledge {known}: free pages and zeroes are told, all others are kept");
        }
        for region in self.ram.regions() {
            say!("ram       {region} ({})", size(region.len()));
        }
        if let Some(line) = processors_line(&self.processors) {
            say!("cpus      {line}");
        }
        say!("paused    {:.0} ms", self.paused.as_secs_f64() * 1000.0);
        say!("");
        print_zones(analysis.zones());
        say!("");
        let goes = |class| ClassSet::DEFAULT_DROP.contains(class);
        print_classes(&counts, facts.page_size, &goes, true);
        say!("");
        let dropped = self.plan.dropped_pages();
        say!(
            "a checkpoint leaves out {} ({} pages, {} of RAM: what is marked *)",
            size(self.plan.dropped_bytes()),
            count(dropped),
            percent(dropped, counts.total())
        );
        for note in analysis.notes() {
            say!("note: {note}");
        }
    }
}
