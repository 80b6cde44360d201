//! `sonicshot prune --dry-run --libvmi`.

use super::{Look, check, dropped_by_name, format, notes};
use crate::args::{PruneArgs, classes};
use crate::error::CliError;
use crate::json::{self, OfPrune, PruneReport, Version, line, word};
use crate::report::{by_name, bytes_of, count, mib, note, percent, say, size};
use sonicshot::{DropClasses, PageClass, to_u64};
use sonicshot_libvmi::Domain;
use std::time::Instant;

pub(crate) fn prune(args: &PruneArgs, domain: Domain) -> Result<(), CliError> {
    let started = Instant::now();
    let drop = classes(&args.drop);
    if !args.dry_run || args.output.is_some() || args.in_place {
        return Err(CliError::Usage {
            what:
                "nothing is pruned in a guest that LibVMI reads: --dry-run says what could be, and \
                   `sonicshot save` writes the rest"
                    .into(),
        });
    }
    check(drop, args.for_analysis)?;
    let look = Look::at(
        &args.libvmi,
        domain,
        &args.input,
        drop.contains_zero(),
        args.json,
    )?;
    let paused = Look::resume(look.guest, look.since)?;
    let (analysis, domain) = (look.analysis, look.domain);
    let plan = analysis.plan(&DropClasses(drop));
    let dropped = dropped_by_name(&plan, &analysis, drop);
    let total = analysis.counts().total();
    if args.json {
        let absent = analysis.counts().get(PageClass::Absent);
        let absent = bytes_of(absent, plan.page_size().bytes());
        let report = PruneReport {
            version: Version::default(),
            kind: OfPrune::default(),
            path: domain.to_string(),
            kernel_release: analysis.facts().release.clone(),
            format: word(&format(&domain)),
            format_name: format(&domain),
            page_size: plan.page_size().bytes(),
            total_pages: total,
            droppable_pages: plan.dropped_pages(),
            droppable_bytes: plan.dropped_bytes(),
            dropped: json::by_name(&dropped),
            for_analysis: args.for_analysis,
            missing_bytes: absent,
            missing_mib: mib(absent),
            stored_bytes: None,
            disk_before: None,
            disk_after: None,
            dry_run: true,
            paused_seconds: Some(paused.as_secs_f64()),
            seconds: started.elapsed().as_secs_f64(),
            notes: notes(&analysis),
            warnings: Vec::new(),
            pruned: None,
        };
        say!("{}", line(&report));
        return Ok(());
    }
    for note in analysis.notes() {
        note!("{note}");
    }
    say!(
        "would drop {} pages ({}, {} of RAM) in {} runs; nothing was changed, and {domain} was paused \
         for {:.0} ms",
        count(plan.dropped_pages()),
        size(plan.dropped_bytes()),
        percent(plan.dropped_pages(), total),
        count(to_u64(plan.runs().len())),
        paused.as_secs_f64() * 1000.0,
    );
    if !dropped.is_empty() {
        say!("pages     {}", by_name(&dropped));
    }
    Ok(())
}
