//! From a file's name to the class of every page in it.

use crate::error::CliError;
use crate::inputs::{Input, add_notes};
use crate::place::{self, keep_unconfirmed, keep_what_is_not_free_in_all};
use sonicshot::{
    ClassCounts, ClassSet, DropClasses, Fill, GpaRange, GuestMemory, PageClass, PageSize, PrunePlan,
};
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
    /// What the user should know.
    pub notes: Vec<String>,
    pub counts: ClassCounts,
}

impl Analysis {
    /// Whether pages of `class` can go in this dump.
    pub(crate) fn can_go(&self, class: PageClass) -> bool {
        self.dump.restores(Fill::of(class, self.pages.free_fill))
    }

    /// What is to be dropped when `wanted` is to go.
    pub(crate) fn plan(&self, wanted: ClassSet) -> PrunePlan {
        PrunePlan::new(&self.pages.map, &DropClasses(wanted), self.pages.free_fill)
    }
}

/// Opens the dump, finds its kernel, and classifies every page.
pub(crate) fn analyze(input: &Input<'_>) -> Result<Analysis, CliError> {
    let mut analysis = classify(input)?;
    mark_zero_pages(&analysis.dump, &mut analysis.pages.map)?;
    analysis.counts = analysis.pages.map.counts();
    if !analysis.can_go(PageClass::Zero) {
        analysis.notes.push(
            if analysis.can_go(PageClass::FreeBuddy) {
                "pages in use that are zero are kept: Xen does not promise zeroes after a restore"
            } else {
                "free pages are kept: the guest relies on what they read as, and Xen gives it \
                 others after a restore"
            }
            .into(),
        );
    }
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
            struct_pages: guest.struct_page_memory()?,
            release: guest.release().to_owned(),
            banner: guest.banner().map(str::to_owned),
            vmcoreinfo: guest.vmcoreinfo().map(str::to_owned),
            build_id: guest.build_id().map(<[u8]>::to_vec),
            symbol_sources: guest.symbol_sources(),
        })
    })?;
    let Seen {
        mut pages,
        struct_pages,
        release,
        banner,
        vmcoreinfo,
        build_id,
        symbol_sources,
    } = placed.value;
    if !input.how.allow_inconsistent && placed.dump.layout_spec().is_some() {
        check_whole(input, &placed.dump, &struct_pages)?;
    }
    keep_what_is_not_free_in_all(&mut pages.map, &placed.shared);
    let mut notes: Vec<String> = pages.notes.iter().map(ToString::to_string).collect();
    keep_unconfirmed(&mut pages.map, &placed.unconfirmed, &mut notes);
    placed.dump.keep_what_must_stay(&mut pages.map);
    notes.extend(placed.notes);
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
        notes,
        counts,
    };
    add_notes(&mut analysis, input);
    Ok(analysis)
}

/// Refuses a raw file that has a hole where the guest has a page full of its `struct page`s. Each
/// of those says which frame of which zone it is and how it is used, and no page of them was ever
/// seen to be zero; but in a diff snapshot that is taken for a whole one, what did not change is
/// missing.
fn check_whole(input: &Input<'_>, dump: &Dump, struct_pages: &[GpaRange]) -> Result<(), CliError> {
    for range in struct_pages {
        for page in range.whole_frames(PageSize::SIZE_4K).iter() {
            let (Some(at), Some(end)) = (
                page.gpa(PageSize::SIZE_4K),
                page.checked_add(1)
                    .and_then(|next| next.gpa(PageSize::SIZE_4K)),
            ) else {
                continue;
            };
            if dump.next_data(at).is_none_or(|data| data.start() >= end) {
                return Err(CliError::NotWhole {
                    path: input.memory().into(),
                    at,
                });
            }
        }
    }
    Ok(())
}

/// What is taken of a guest.
struct Seen {
    pages: Classification,
    struct_pages: Vec<GpaRange>,
    release: String,
    banner: Option<String>,
    vmcoreinfo: Option<String>,
    build_id: Option<Vec<u8>>,
    symbol_sources: Vec<String>,
}
