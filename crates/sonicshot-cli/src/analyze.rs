//! From a file's name to the class of every page in it.

use crate::error::CliError;
use crate::inputs::{Input, add_notes};
use crate::place::{self, keep_what_is_not_free_in_all};
use sonicshot::ClassCounts;
use sonicshot_dump::Dump;
use sonicshot_vmi::{Classification, OnInconsistency, mark_zero_pages};

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
    let on = if input.how.allow_inconsistent {
        OnInconsistency::KeepInQuestion
    } else {
        OnInconsistency::Refuse
    };
    let placed = place::with_guest(input, &|guest| {
        Ok(Seen {
            pages: guest.classify(on)?,
            release: guest.release().to_owned(),
            banner: guest.banner().map(str::to_owned),
            vmcoreinfo: guest.vmcoreinfo().map(str::to_owned),
            build_id: guest.build_id().map(<[u8]>::to_vec),
            symbol_sources: guest.symbol_sources(),
        })
    })?;
    let Seen {
        mut pages,
        release,
        banner,
        vmcoreinfo,
        build_id,
        symbol_sources,
    } = placed.value;
    keep_what_is_not_free_in_all(&mut pages.map, &placed.shared);
    pages.notes.extend(placed.notes);
    let counts = pages.map.counts();
    let mut analysis = Analysis {
        dump: placed.dump,
        layout_origin: placed.origin,
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

/// What is taken of a guest.
struct Seen {
    pages: Classification,
    release: String,
    banner: Option<String>,
    vmcoreinfo: Option<String>,
    build_id: Option<Vec<u8>>,
    symbol_sources: Vec<String>,
}
