//! The report on a prune: as JSON, and for people.

use crate::error::CliError;
use crate::json::{self, OfPrune, PruneReport, Pruned, Version, line, path, word};
use crate::report::{by_name, bytes_of, count, lines, mib, note, percent, say, size};
use sonicshot::{PageClass, to_u64};
use sonicshot_offline::{Analyzed, Plan, PruneOptions, PruneStats};
use std::path::Path;

/// The expected result of a prune, in bytes and runs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Expected {
    dropped_pages: u64,
    dropped_bytes: u64,
    runs: u64,
    /// The bytes of the file that the dropped pages take.
    stored_bytes: u64,
    disk_before: u64,
    disk_after: u64,
    /// The pages that can go are not in the file.
    nothing_to_do: bool,
}

impl Expected {
    /// Whether most of what can go takes no room in the file: it was pruned already, or never written.
    fn is_mostly_done(&self) -> bool {
        self.stored_bytes < self.dropped_bytes / 2
    }

    /// Of a copy, or of the file itself as it says `in_place`.
    pub(super) fn of(plan: &Plan<'_>, in_place: Option<PruneOptions>) -> Result<Self, CliError> {
        let savings = plan.savings()?;
        let mut this = Self {
            dropped_pages: plan.dropped_pages(),
            dropped_bytes: plan.dropped_bytes(),
            runs: to_u64(plan.runs()),
            stored_bytes: savings.stored_bytes,
            disk_before: savings.disk_before,
            disk_after: savings.disk_after(),
            nothing_to_do: savings.stored_bytes == 0,
        };
        if let Some(options) = in_place {
            let stats = plan.expect_in_place(&options)?;
            this.stored_bytes = stats.freed_bytes;
            this.disk_before = stats.disk_before;
            this.disk_after = stats.disk_after;
            this.nothing_to_do = !stats.changed;
        }
        Ok(this)
    }
}

/// The outcome of one input.
pub(super) struct Report<'a> {
    pub path: &'a Path,
    pub analyzed: &'a Analyzed,
    pub plan: &'a Plan<'a>,
    /// The expected result.
    pub expected: Expected,
    /// Whether it is the file itself.
    pub in_place: bool,
    /// The result of writing; `None` of a dry run.
    pub stats: Option<&'a PruneStats>,
    pub seconds: f64,
    pub warnings: &'a [String],
}

impl Report<'_> {
    /// The guest's memory.
    pub(super) fn total_bytes(&self) -> u64 {
        let total = self.analyzed.counts().total();
        bytes_of(total, self.plan.page_size().bytes())
    }

    /// Whether what can go was not in the file. A copy is written all the same.
    pub(super) fn has_nothing_to_do(&self) -> bool {
        match self.stats {
            Some(stats) => self.in_place && !stats.changed,
            None => self.expected.nothing_to_do,
        }
    }

    /// The bytes that went, or would go, and the number of runs: of a file itself what is punched out
    /// of it.
    pub(super) fn dropped(&self) -> (u64, u64) {
        match self.stats {
            Some(stats) if self.in_place => (stats.freed_bytes, stats.punched),
            Some(stats) => (stats.dropped_bytes, stats.runs),
            None => (self.expected.dropped_bytes, self.expected.runs),
        }
    }

    /// The bytes that the file takes on disk before and after.
    pub(super) fn disk(&self) -> (u64, u64) {
        match self.stats {
            Some(stats) => (stats.disk_before, stats.disk_after),
            None => (self.expected.disk_before, self.expected.disk_after),
        }
    }

    /// The pages that go, by what put them there: none where there is nothing to do.
    fn by_name(&self) -> Vec<(&'static str, u64)> {
        if self.has_nothing_to_do() {
            return Vec::new();
        }
        self.plan.dropped_by_name()
    }

    pub(super) fn print_json(&self) {
        let (analyzed, plan, expected) = (self.analyzed, self.plan, &self.expected);
        let (disk_before, disk_after) = self.disk();
        let goes = |number: u64| if self.has_nothing_to_do() { 0 } else { number };
        let pruned = self.stats.map(|stats| Pruned {
            dropped_bytes: goes(stats.dropped_bytes),
            kept_for_fill_bytes: stats.kept_for_fill,
            kept_for_base_bytes: stats.kept_for_base,
            runs: goes(stats.runs),
            punched: stats.punched,
            freed_bytes: stats.freed_bytes,
            joined: stats.joined,
            left_bytes: stats.left_bytes,
            left_runs: stats.left_runs,
            cloned_bytes: stats.cloned_bytes,
            extents_before: stats.extents_before,
            extents_after: stats.extents_after,
        });
        let format = analyzed.dump().format();
        let report = PruneReport {
            version: Version::default(),
            kind: OfPrune::default(),
            path: path(self.path),
            kernel_release: analyzed.facts().release.clone(),
            format: word(format),
            format_name: format.to_owned(),
            page_size: plan.page_size().bytes(),
            total_pages: analyzed.counts().total(),
            droppable_pages: goes(expected.dropped_pages),
            droppable_bytes: goes(expected.dropped_bytes),
            dropped: json::by_name(&self.by_name()),
            for_analysis: plan.is_for_analysis(),
            missing_bytes: self.missing_bytes(),
            missing_mib: mib(self.missing_bytes()),
            stored_bytes: Some(expected.stored_bytes),
            disk_before: Some(disk_before),
            disk_after: Some(disk_after),
            dry_run: self.stats.is_none(),
            paused_seconds: None,
            seconds: self.seconds,
            notes: lines(analyzed.notes()),
            warnings: self.warnings.to_vec(),
            pruned,
        };
        say!("{}", line(&report));
    }

    pub(super) fn print_summary(&self) {
        for note in self.analyzed.notes() {
            note!("{note}");
        }
        match self.stats {
            Some(stats) => self.print_stats(stats),
            None => self.print_expected(),
        }
    }

    /// The result that a prune would have.
    fn print_expected(&self) {
        let expected = &self.expected;
        if expected.nothing_to_do {
            self.print_nothing_to_do();
            return;
        }
        let (pages, bytes) = (count(expected.dropped_pages), size(expected.dropped_bytes));
        let share = percent(expected.dropped_pages, self.analyzed.counts().total());
        let (stored, runs) = (size(expected.stored_bytes), count(expected.runs));
        let (before, after) = (size(expected.disk_before), size(expected.disk_after));
        if expected.is_mostly_done() {
            say!(
                "would take {stored} out of the file, on disk: {before} -> about {after}; nothing was \
                 changed. More of the {pages} pages that can be dropped ({bytes}, {share} of RAM) is not \
                 in it"
            );
        } else {
            say!(
                "would drop {pages} pages ({bytes}, {share} of RAM), which take {stored} of the file, in \
                 {runs} runs, on disk: {before} -> about {after}; nothing was changed"
            );
        }
        self.print_classes();
    }

    fn print_nothing_to_do(&self) {
        say!(
            "nothing to do: what can be dropped is not in the file already ({} on disk)",
            size(self.disk().0)
        );
    }

    /// The dropped pages by class.
    fn print_classes(&self) {
        let dropped = self.plan.dropped_by_name();
        if !dropped.is_empty() {
            say!("pages     {}", by_name(&dropped));
        }
    }

    /// The amount of RAM that the source does not have.
    fn missing_bytes(&self) -> u64 {
        let absent = self.analyzed.counts().get(PageClass::Absent);
        bytes_of(absent, self.plan.page_size().bytes())
    }

    fn print_stats(&self, stats: &PruneStats) {
        if self.has_nothing_to_do() {
            self.print_nothing_to_do();
            print_left(stats);
            return;
        }
        let total_bytes = self.total_bytes();
        let (dropped, runs) = self.dropped();
        say!(
            "dropped {} of {} ({}) in {} runs, {:.2} s",
            size(dropped),
            size(total_bytes),
            percent(dropped, total_bytes),
            count(runs),
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
        if self.in_place {
            say!("punched {}", holes(stats));
        }
        print_left(stats);
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

/// The dropped pages that are in the file all the same.
fn print_left(stats: &PruneStats) {
    if stats.left_bytes > 0 {
        say!(
            "left {} in the file: {} ranges are shorter than the smallest hole (--min-hole)",
            size(stats.left_bytes),
            count(stats.left_runs)
        );
    }
}

fn holes(stats: &PruneStats) -> String {
    let holes = format!("{} holes", count(stats.punched));
    match (stats.extents_before, stats.extents_after) {
        (Some(before), Some(after)) => format!(
            "{holes}; ranges of data in the file: {} -> {}",
            count(before),
            count(after)
        ),
        _ => holes,
    }
}
