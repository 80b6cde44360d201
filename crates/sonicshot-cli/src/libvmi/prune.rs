//! `sonicshot prune --dry-run --libvmi`.

use super::{Look, check, dropped_by_name, format, notes};
use crate::args::{PruneArgs, classes};
use crate::error::CliError;
use crate::report::{by_name, by_name_json, count, note, percent, say, size};
use serde_json::json;
use sonicshot::DropClasses;
use sonicshot_libvmi::Domain;

pub(crate) fn prune(args: &PruneArgs, domain: Domain) -> Result<(), CliError> {
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
    let look = Look::at(&args.libvmi, domain, &args.input, drop.contains_zero())?;
    let paused = Look::resume(look.guest, look.since)?;
    let (analysis, domain) = (look.analysis, look.domain);
    let plan = analysis.plan(&DropClasses(drop));
    let dropped = dropped_by_name(&plan, &analysis, drop);
    let total = analysis.counts().total();
    if args.json {
        say!(
            "{}",
            json!({
                "path": domain.to_string(),
                "kernel_release": analysis.facts().release,
                "format": format(&domain),
                "page_size": plan.page_size().bytes(),
                "total_pages": total,
                "droppable_pages": plan.dropped_pages(),
                "droppable_bytes": plan.dropped_bytes(),
                "dropped": by_name_json(&dropped),
                "dry_run": true,
                "paused_seconds": paused.as_secs_f64(),
                "notes": notes(&analysis),
            })
        );
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
        count(plan.runs().len() as u64),
        paused.as_secs_f64() * 1000.0,
    );
    if !dropped.is_empty() {
        say!("pages     {}", by_name(&dropped));
    }
    Ok(())
}
