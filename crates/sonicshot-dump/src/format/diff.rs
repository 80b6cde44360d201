//! A raw diff over its base: Firecracker's. See [`crate::backing::overlay`].

use crate::backing::Stored;
use crate::backing::overlay::Overlay;
use crate::backing::plain::PlainDump;
use crate::format::ability::{ByCopy, Copying, InPlace, Punching};
use crate::format::kind::{Format, Source};
use crate::format::{kind_of, raw};
use crate::prune::copy::Copier;
use crate::prune::holes::sum_of;
use crate::prune::runs::file_runs;
use crate::prune::stats::PruneStats;
use crate::{DumpError, DumpOptions, LayoutSpec};
use sonicshot::{FileRange, PrunePlan, Tally, to_u64};
use std::fs::File;
use std::path::Path;

/// A diff and its base as one memory.
#[derive(Debug)]
pub(crate) struct Diff {
    overlay: Overlay,
    layout: LayoutSpec,
}

/// Opens the diff at `path` over `base`.
pub(crate) fn open(path: &Path, base: &Path, known: &DumpOptions) -> Result<Diff, DumpError> {
    let refuse = |why| DumpError::Base {
        path: path.to_owned(),
        base: base.to_owned(),
        why,
    };
    let raw = |path: &Path| {
        let source = Source::open(path, known)?;
        match kind_of(&source)? {
            None => raw::open(source),
            Some(kind) => {
                // What is wrong with the file itself says more.
                (kind.open)(source)?;
                Err(refuse("only raw memory files are diff and base"))
            }
        }
    };
    let (diff, base_file) = (raw(path)?, raw(base)?);
    let overlay = Overlay::new(diff.mapped, base_file.mapped, refuse)?;
    let layout = diff.layout;
    Ok(Diff { overlay, layout })
}

impl Format for Diff {
    fn name(&self) -> &'static str {
        "raw RAM, a diff over its base"
    }

    fn stored(&self) -> &dyn Stored {
        &self.overlay
    }

    fn base(&self) -> Option<&File> {
        Some(self.overlay.base().file())
    }

    fn layout(&self) -> Option<&LayoutSpec> {
        Some(&self.layout)
    }

    fn by_copy(&self) -> Option<&dyn ByCopy> {
        Some(self)
    }

    fn in_place(&self) -> Option<&dyn InPlace> {
        Some(self)
    }
}

impl ByCopy for Diff {
    /// The merged memory, which needs no base any more.
    fn copy(&self, work: Copying<'_>) -> Result<(), DumpError> {
        let (overlay, output, goes) = (&self.overlay, work.output, work.goes);
        let len = overlay.diff().file_len();
        let sized = output.file().set_len(len);
        sized.map_err(DumpError::io("writing", output.path()))?;
        let total = Tally::new(len).without(goes.dropped_bytes()).get();
        let mut before = Tally::ZERO;
        for in_diff in [false, true] {
            let shown = move |here: u64, _: u64| work.progress.tell(before.and(here).get(), total);
            let source = overlay.source(in_diff);
            let mut copier = Copier::new(source, output, total, &shown);
            for extent in source.extents() {
                for piece in overlay.parts(extent.guest).filter(|p| p.in_diff == in_diff) {
                    for kept in goes.kept_in(piece.guest) {
                        if let Some(offset) = source.offset_in(extent, kept.start())? {
                            let from = FileRange::with_len(offset, kept.len());
                            let beyond = || {
                                DumpError::malformed(
                                    source.path(),
                                    "a range beyond 64 bits",
                                    offset,
                                    0,
                                )
                            };
                            copier.copy(from.ok_or_else(beyond)?, offset)?;
                        }
                    }
                }
            }
            before.add(copier.done());
        }
        Ok(())
    }
}

impl InPlace for Diff {
    fn source(&self) -> &PlainDump {
        self.overlay.diff()
    }

    fn check_others(&self) -> Result<(), DumpError> {
        self.overlay.check_base()
    }

    /// Of the diff alone, what would not become what the base has.
    fn punching(&self, goes: &PrunePlan, stats: &mut PruneStats) -> Result<Punching, DumpError> {
        self.overlay.check_base()?;
        let runs = file_runs(self.overlay.diff(), goes)?;
        let (runs, kept) = self.overlay.punchable(&runs);
        stats.kept_for_base = kept;
        stats.dropped_bytes = sum_of(&runs);
        stats.runs = to_u64(runs.len());
        let marks = Vec::new();
        Ok(Punching { marks, runs })
    }
}
