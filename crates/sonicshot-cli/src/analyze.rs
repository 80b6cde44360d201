//! From a file's name to the class of every page in it.

use crate::error::CliError;
use crate::inputs::{Input, add_notes};
use sonicshot::{ClassCounts, GpaRange, GuestMemory, RamLayout};
use sonicshot_dump::{Dump, LayoutSpec};
use sonicshot_vmi::{
    Classification, GuestOptions, LinuxGuest, OnInconsistency, VmiError, mark_zero_pages,
};

/// Everything that is known of a dump.
#[derive(Debug)]
pub(crate) struct Analysis {
    pub dump: Dump,
    /// How the layout of a raw file was found, for people.
    pub layout_origin: &'static str,
    pub release: String,
    pub banner: Option<String>,
    pub vmcoreinfo: Option<String>,
    pub build_id: Option<Vec<u8>>,
    pub symbol_sources: Vec<String>,
    pub pages: Classification,
    pub counts: ClassCounts,
}

/// Opens the dump, finds its kernel, and classifies every page.
pub(crate) fn analyze(input: &Input<'_>) -> Result<Analysis, CliError> {
    let mut analysis = classify(input)?;
    mark_zero_pages(&analysis.dump, &mut analysis.pages.map)?;
    analysis.counts = analysis.pages.map.counts();
    Ok(analysis)
}

/// The same, but pages in use are not looked into.
pub(crate) fn classify(input: &Input<'_>) -> Result<Analysis, CliError> {
    let (dump, layout_origin) = open(input)?;
    let guest_error = |source| CliError::Guest {
        path: input.memory().into(),
        source,
    };
    let on = if input.how.allow_inconsistent {
        OnInconsistency::KeepInQuestion
    } else {
        OnInconsistency::Refuse
    };
    let guest = LinuxGuest::open(&dump, &options(input, &dump)).map_err(guest_error)?;
    let pages = guest.classify(on).map_err(guest_error)?;
    let (release, banner) = (
        guest.release().to_owned(),
        guest.banner().map(str::to_owned),
    );
    let vmcoreinfo = guest.vmcoreinfo().map(str::to_owned);
    let build_id = guest.build_id().map(<[u8]>::to_vec);
    let symbol_sources = guest.symbol_sources();
    drop(guest);
    let counts = pages.map.counts();
    let mut analysis = Analysis {
        dump,
        layout_origin,
        release,
        banner,
        vmcoreinfo,
        build_id,
        symbol_sources,
        pages,
        counts,
    };
    add_notes(&mut analysis, input);
    Ok(analysis)
}

fn options(input: &Input<'_>, dump: &Dump) -> GuestOptions {
    let mut options = GuestOptions::new();
    for path in &input.how.symbols {
        options = options.symbols(path);
    }
    match dump.vmcoreinfo() {
        Some(text) => options.vmcoreinfo(text),
        None => options,
    }
}

/// Opens the dump; a raw file without `--layout` in the layout that its guest confirms.
pub(crate) fn open(input: &Input<'_>) -> Result<(Dump, &'static str), CliError> {
    if let Some(layout) = input.files.layout() {
        let dump = input.open(Some(layout))?;
        return Ok(match dump.layout_spec() {
            Some(_) if input.how.layout.is_none() => (dump, "from the snapshot's state.json"),
            Some(_) => (dump, "given"),
            None => (dump, "from the file; --layout is for raw files"),
        });
    }
    let first = input.open(None)?;
    if first.layout_spec().is_none() {
        return Ok((first, "from the file"));
    }
    let len = first.file_len();
    let mut candidates: Vec<(&LayoutSpec, Vec<GpaRange>)> = Vec::new();
    for spec in &LayoutSpec::KNOWN {
        let ranges = spec.ranges(len);
        if candidates.iter().all(|(_, known)| *known != ranges) {
            candidates.push((spec, ranges));
        }
    }
    if candidates.len() == 1 {
        return Ok((first, "the same in every VMM for this size"));
    }
    drop(first);
    let mut last_error = None;
    let mut unconfirmed = None;
    for (spec, _) in candidates {
        let dump = input.open(Some(spec))?;
        let confirmed = {
            let guest = match LinuxGuest::open(&dump, &options(input, &dump)) {
                Ok(guest) => guest,
                // A wrong symbol file is wrong in every layout.
                Err(source @ (VmiError::WrongKernel { .. } | VmiError::Symbols(_))) => {
                    return Err(CliError::Guest {
                        path: input.memory().into(),
                        source,
                    });
                }
                Err(source) => {
                    last_error.get_or_insert(source);
                    continue;
                }
            };
            match guest.e820() {
                Ok(Some(ram)) => agrees(dump.layout(), &ram),
                _ => {
                    unconfirmed.get_or_insert(spec);
                    false
                }
            }
        };
        if confirmed {
            return Ok((dump, "found out by the guest's own e820 map"));
        }
    }
    match (unconfirmed, last_error) {
        (Some(spec), _) => Ok((
            input.open(Some(spec))?,
            "guessed: the guest's e820 map could not be read",
        )),
        (None, Some(source)) => Err(CliError::Guest {
            path: input.memory().into(),
            source,
        }),
        (None, None) => Err(CliError::NoLayout {
            path: input.memory().into(),
        }),
    }
}

/// Whether the usable RAM of the guest's map lies in the layout, and reaches the top of it.
fn agrees(layout: &RamLayout, ram: &[GpaRange]) -> bool {
    // Firmware keeps some memory at the top of the low part for itself, never of the high part.
    let inside = ram
        .iter()
        .all(|range| layout.contains(range.start(), range.len()));
    let top = ram.iter().map(GpaRange::end).max();
    let reaches = match (layout.regions(), top) {
        ([_], _) => true,
        (_, Some(top)) => top == layout.end(),
        (_, None) => false,
    };
    inside && reaches
}
