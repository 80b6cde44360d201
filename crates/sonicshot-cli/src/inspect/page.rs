//! `inspect --explain` and `inspect --free-lists`.

use crate::error::CliError;
use crate::json::{
    FreeBlocksJson, OwnerJson, PageJson, PerCpuJson, Prunes, RecordJson, StructPageJson,
    ZoneFreeJson, ZoneName, word,
};
use crate::report::{count, one_line, say};
use sonicshot::checkpoint::{PageContent, PageRun};
use sonicshot::{
    ClassSet, PageClass, PageMap, PageSize, PageState, Pfn, PfnRange, PrunePlan, to_u64,
};
use sonicshot_vmi::{FreeBlocks, FreeList, PageFacts, PageOwner, PageRecord, ZoneFree};

/// The reason why a frame is kept or dropped.
pub(crate) struct Explained {
    facts: PageFacts,
    gpa: u64,
    state: PageState,
    /// The content that a checkpoint has of it.
    content: Option<PageContent>,
    drops: bool,
    why: String,
}

fn not_ram(pfn: Pfn) -> CliError {
    CliError::Usage {
        what: format!("frame {pfn} is no RAM of this guest"),
    }
}

/// Explains a frame of the guest whose pages are `pages`, and of which a prune has the `plan`, by the
/// kernel's own `facts`.
pub(crate) fn explain(
    pages: &PageMap,
    plan: &PrunePlan,
    pfn: Pfn,
    facts: impl FnOnce(Pfn) -> Result<PageFacts, CliError>,
) -> Result<Explained, CliError> {
    let of_frame = pages.state(pfn).zip(pfn.gpa(pages.page_size()));
    let (state, gpa) = of_frame.ok_or_else(|| not_ram(pfn))?;
    let (drops, why) = decision(plan, pages.page_size(), pfn, state);
    Ok(Explained {
        facts: facts(pfn)?,
        gpa: gpa.raw(),
        state,
        content: None,
        drops,
        why,
    })
}

/// Explains a frame of a checkpoint, which has `run` of it.
pub(super) fn explain_stored(
    run: Option<PageRun>,
    page_size: PageSize,
    pfn: Pfn,
    facts: impl FnOnce(Pfn) -> Result<PageFacts, CliError>,
) -> Result<Explained, CliError> {
    let (run, gpa) = run.zip(pfn.gpa(page_size)).ok_or_else(|| not_ram(pfn))?;
    let class = run.class;
    let state = match run.content {
        PageContent::Zero => PageState::new(class).with_zero(),
        _ => PageState::new(class),
    };
    let (drops, why) = match run.content {
        PageContent::Free { word: 0 } => {
            (true, format!("it was {class}, and is restored as zeroes"))
        }
        PageContent::Free { word } => (
            true,
            format!("it was {class}, and is restored as {word:#x} over and over"),
        ),
        PageContent::Absent => (
            true,
            "the dump or guest that was saved had no bytes of it".to_owned(),
        ),
        PageContent::Zero => (false, "it was in use, and holds only zeroes".to_owned()),
        PageContent::Disk { .. } => (false, "its bytes are on a disk of the guest's".to_owned()),
        _ => (false, "its bytes are in the checkpoint".to_owned()),
    };
    Ok(Explained {
        facts: facts(pfn)?,
        gpa: gpa.raw(),
        state,
        content: Some(run.content),
        drops,
        why,
    })
}

/// Whether a prune of what goes by default drops a frame, and why.
fn decision(plan: &PrunePlan, page_size: PageSize, pfn: Pfn, state: PageState) -> (bool, String) {
    let class = state.class();
    let range = PfnRange::with_len(pfn, 1).and_then(|frame| frame.gpa_range(page_size));
    let drops = range.is_some_and(|range| plan.dropped_in(range).next().is_some());
    let by_class = ClassSet::DEFAULT_DROP.contains(class);
    let why = match (drops, class) {
        (true, _) if by_class => format!("{class} pages are not needed by the guest"),
        (true, _) => "it is in use and holds only zeroes".to_owned(),
        (false, _) if by_class || state.is_zero() => {
            "it could go, but of this file a page that is left out would not read as the guest expects"
                .to_owned()
        }
        (false, PageClass::Unknown) => {
            "what it is used for is not understood, or the records disagree".to_owned()
        }
        (false, _) if class.may_be_dropped() => {
            format!("the guest uses it; --drop {class} leaves it out, for analysis")
        }
        (false, PageClass::Hole) => "it has no struct page, so the kernel tells nothing of it".into(),
        (false, _) => format!("{class} pages are never dropped"),
    };
    (drops, why)
}

/// A class of one of the records' words.
fn says(free: Option<bool>) -> &'static str {
    match free {
        Some(true) => "free",
        Some(false) => "in use",
        None => "",
    }
}

impl Explained {
    pub(crate) fn print(&self) {
        let facts = &self.facts;
        say!(
            "frame     {:#x} (guest-physical {:#x})",
            facts.pfn.raw(),
            self.gpa
        );
        let zero = if self.state.is_zero() {
            ", all zeroes"
        } else {
            ""
        };
        say!("class     {}{zero}", self.state.class());
        match (self.content, self.drops) {
            (None, true) => say!("a prune   drops it: {}", self.why),
            (None, false) => say!("a prune   keeps it: {}", self.why),
            (Some(_), true) => say!("stored    left out: {}", self.why),
            (Some(_), false) => say!("stored    kept: {}", self.why),
        }
        for (node, zone) in &facts.zones {
            say!("zone      {node}/{zone}");
        }
        match &facts.page {
            Some(page) => print_record("page", page),
            None => say!("page      it has no struct page"),
        }
        if let Some(folio) = &facts.folio {
            print_record("folio", folio);
        }
        if let Some(owner) = &facts.owner {
            let at = owner.at.map_or_else(String::new, |at| format!(" at {at}"));
            let name = owner
                .name
                .as_deref()
                .map_or_else(String::new, |name| format!(", {}", one_line(name)));
            say!("owner     {}{at}{name}", owner.kind);
        }
        say!("");
        say!("{:<12} {:<7} what it has", "record", "says");
        for one in &facts.witnesses {
            say!("{:<12} {:<7} {}", one.record, says(one.says_free), one.what);
        }
    }

    pub(crate) fn to_json(&self) -> PageJson {
        let facts = &self.facts;
        let zones = facts.zones.iter();
        let records = facts.witnesses.iter();
        PageJson {
            pfn: facts.pfn.raw(),
            gpa: self.gpa,
            class: self.state.class().name().to_owned(),
            zero: self.state.is_zero(),
            content: self.content.map(|content| content.name().to_owned()),
            prune: Prunes {
                drops: self.drops,
                why: self.why.clone(),
            },
            zones: zones
                .map(|(node, name)| ZoneName {
                    node: *node,
                    name: name.clone(),
                })
                .collect(),
            struct_page: facts.page.as_ref().map(record_json),
            folio: facts.folio.as_ref().map(record_json),
            owner: facts.owner.as_ref().map(owner_json),
            records: records
                .map(|one| RecordJson {
                    record: word(one.record),
                    says_free: one.says_free,
                    what: one.what.clone(),
                })
                .collect(),
        }
    }
}

fn print_record(what: &str, page: &PageRecord) {
    let flags = match page.flag_names.is_empty() {
        true => "none".to_owned(),
        false => page.flag_names.join(", "),
    };
    say!(
        "{what:<9} struct page of frame {:#x} at {}: flags {flags}; {} references",
        page.pfn.raw(),
        page.at,
        page.refcount
    );
    let ty = page
        .page_type
        .map_or_else(String::new, |ty| format!(" (type {ty})"));
    say!(
        "          mappings or type {:#x}{ty}, mapping {:#x}, private {:#x}",
        page.mapcount,
        page.mapping,
        page.private
    );
}

fn record_json(page: &PageRecord) -> StructPageJson {
    StructPageJson {
        pfn: page.pfn.raw(),
        at: page.at.raw(),
        flags: page.flags,
        flag_names: page.flag_names.clone(),
        refcount: page.refcount,
        mapcount: page.mapcount,
        page_type: page.page_type.map(str::to_owned),
        mapping: page.mapping,
        private: page.private,
    }
}

fn owner_json(owner: &PageOwner) -> OwnerJson {
    OwnerJson {
        kind: owner.kind.to_owned(),
        at: owner.at.map(sonicshot_vmi::KernelVa::raw),
        name: owner.name.clone(),
    }
}

/// Shows a zone's lists as crash's `kmem -f` does.
pub(crate) fn print_zone(zone: &ZoneFree) {
    let pages = zone.listed_pages().map_or_else(|| "too many".into(), count);
    say!(
        "zone {}/{} {}: {pages} pages listed, NR_FREE_PAGES {}",
        zone.node,
        one_line(&zone.name),
        zone.span,
        zone.counter
    );
    say!(
        "  {:>5}  {:<14} {:>9} {:>11}  first frames",
        "order",
        "list",
        "blocks",
        "pages"
    );
    for blocks in &zone.lists {
        say!(
            "  {:>5}  {:<14} {:>9} {:>11}  {}",
            blocks.order,
            blocks.list.to_string(),
            count(blocks.blocks),
            blocks.pages().map_or_else(|| "too many".into(), count),
            first_frames(blocks)
        );
    }
    for wrong in zone.disagreements() {
        say!("  disagrees: {wrong}");
    }
    let agree = zone.disagreements().is_empty();
    if agree {
        say!("  the counters of every order, of the zone and of the processors agree");
    }
}

/// The blocks that are named, and how many are not.
fn first_frames(blocks: &FreeBlocks) -> String {
    let named: Vec<String> = blocks
        .first
        .iter()
        .map(|pfn| format!("{:#x}", pfn.raw()))
        .collect();
    let rest = match blocks.blocks.checked_sub(to_u64(named.len())) {
        None | Some(0) => String::new(),
        Some(rest) if named.is_empty() => format!("({} more)", count(rest)),
        Some(rest) => format!(" ({} more)", count(rest)),
    };
    format!("{}{rest}", named.join(" "))
}

pub(crate) fn zone_json(zone: &ZoneFree) -> ZoneFreeJson {
    let lists = zone.lists.iter().map(|blocks| {
        let (migrate_type, cpu) = match &blocks.list {
            FreeList::Buddy { migrate_type } => (Some(migrate_type.clone()), None),
            FreeList::PerCpu { cpu } => (None, Some(to_u64(*cpu))),
            _ => (None, None),
        };
        FreeBlocksJson {
            order: blocks.order,
            migrate_type,
            cpu,
            blocks: blocks.blocks,
            pages: blocks.pages(),
            torn: blocks.torn,
            first_pfns: blocks.first.iter().map(|pfn| pfn.raw()).collect(),
        }
    });
    let per_cpu = zone.per_cpu.iter().map(|one| PerCpuJson {
        cpu: to_u64(one.cpu),
        counted: one.counted,
        listed: one.listed,
    });
    ZoneFreeJson {
        node: zone.node,
        name: zone.name.clone(),
        first_pfn: zone.span.start().raw(),
        end_pfn: zone.span.end().raw(),
        lists: lists.collect(),
        listed: zone.listed.clone(),
        nr_free: zone.nr_free.clone(),
        listed_pages: zone.listed_pages(),
        isolated_pages: zone.isolated,
        nr_free_pages: zone.counter,
        per_cpu: per_cpu.collect(),
        disagreements: zone.disagreements(),
    }
}
