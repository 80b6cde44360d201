//! What there is to say of a prune: as JSON, and for people.

use crate::report::{by_name, by_name_json, complain, count, lines, mib, percent, say, size};
use serde_json::json;
use sonicshot::PageClass;
use sonicshot_offline::{Analyzed, Plan, PruneStats, Savings};
use std::path::Path;

/// What came of one input.
pub(super) struct Report<'a> {
    pub path: &'a Path,
    pub analyzed: &'a Analyzed,
    pub plan: &'a Plan<'a>,
    /// What was to be expected of the file's size.
    pub savings: Savings,
    /// What was written; `None` of a dry run.
    pub stats: Option<&'a PruneStats>,
    pub seconds: f64,
    pub warnings: &'a [String],
}

impl Report<'_> {
    /// The guest's memory.
    pub(super) fn total_bytes(&self) -> u64 {
        let total = self.analyzed.counts().total();
        total.saturating_mul(self.plan.page_size().bytes())
    }

    pub(super) fn print_json(&self) {
        let (analyzed, plan) = (self.analyzed, self.plan);
        let mut report = json!({
            "path": self.path.display().to_string(),
            "kernel_release": analyzed.facts().release,
            "format": analyzed.dump().format(),
            "page_size": plan.page_size().bytes(),
            "total_pages": analyzed.counts().total(),
            "droppable_pages": plan.dropped_pages(),
            "droppable_bytes": plan.dropped_bytes(),
            "dropped": by_name_json(&plan.dropped_by_name()),
            "for_analysis": plan.is_for_analysis(),
            "missing_bytes": self.missing_bytes(),
            "missing_mib": mib(self.missing_bytes()),
            "stored_bytes": self.savings.stored_bytes,
            "disk_before": self.savings.disk_before,
            "disk_after": self.savings.disk_after(),
            "dry_run": self.stats.is_none(),
            "seconds": self.seconds,
            "notes": lines(analyzed.notes()),
            "warnings": self.warnings,
        });
        if let (Some(stats), Some(report)) = (self.stats, report.as_object_mut()) {
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

    pub(super) fn print_summary(&self, in_place: bool) {
        for note in self.analyzed.notes() {
            complain!("note: {note}");
        }
        match self.stats {
            Some(stats) => self.print_stats(stats, in_place),
            None => self.print_expected(),
        }
    }

    /// What a prune would do.
    fn print_expected(&self) {
        let (before, after) = (self.savings.disk_before, self.savings.disk_after());
        if self.savings.stored_bytes == 0 {
            say!(
                "nothing to do: what can be dropped is not in the file already ({} on disk)",
                size(before)
            );
            return;
        }
        say!(
            "would drop {} pages ({}, {} of RAM) in {} runs, on disk: {} -> about {}; nothing was \
             changed",
            count(self.plan.dropped_pages()),
            size(self.plan.dropped_bytes()),
            percent(self.plan.dropped_pages(), self.analyzed.counts().total()),
            count(self.plan.runs() as u64),
            size(before),
            size(after),
        );
        self.print_classes();
    }

    /// What goes, by its class.
    fn print_classes(&self) {
        let dropped = self.plan.dropped_by_name();
        if !dropped.is_empty() {
            say!("pages     {}", by_name(&dropped));
        }
    }

    /// How much of RAM the source does not have.
    fn missing_bytes(&self) -> u64 {
        let absent = self.analyzed.counts().get(PageClass::Absent);
        absent.saturating_mul(self.plan.page_size().bytes())
    }

    fn print_stats(&self, stats: &PruneStats, in_place: bool) {
        let total_bytes = self.total_bytes();
        say!(
            "dropped {} of {} ({}) in {} runs, {:.2} s",
            size(stats.dropped_bytes),
            size(total_bytes),
            percent(stats.dropped_bytes, total_bytes),
            count(stats.runs),
            self.seconds,
        );
        self.print_classes();
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
        if in_place && stats.punched == 0 && stats.left_bytes == 0 {
            say!("nothing to do: what can be dropped is not in the file already");
        } else if in_place {
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
