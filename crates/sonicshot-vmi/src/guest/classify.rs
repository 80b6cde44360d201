//! The classes of a guest's pages, and whether its kernel owns the memory.

use super::{LinuxGuest, OnInconsistency};
use crate::error::VmiError;
use crate::knowledge::Knowledge;
use crate::mm::classify::{Inconsistency, ZoneReport, scan};
use crate::mm::mem_map::MemMap;
use crate::mm::zone::Zones;
use crate::note::{Note, TracesSought};
use crate::owner;
use crate::owner::processors::Verdict;
use crate::shape;
use sonicshot::{Fill, GpaRange, PageClass, PageMap, Progress, Tally};

/// The class of every frame of a guest, and what stands behind it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Classification {
    /// The class of every RAM frame.
    pub map: PageMap,
    /// The content that the guest expects of free pages; [`Fill::Any`] of most: they write to a
    /// page before they trust it.
    pub free_fill: Fill,
    /// Every zone's numbers.
    pub zones: Vec<ZoneReport>,
    /// Blocks on which the sources disagree (kept), if there are any.
    pub disagreement: Option<Inconsistency>,
    /// Notes for the user: features of the guest, pages kept and why.
    pub notes: Vec<Note>,
}

/// The report on a kernel that owns the memory.
#[derive(Default)]
struct Owned {
    note: Option<Note>,
    /// Memory that may have another owner all the same.
    in_question: Vec<GpaRange>,
}

impl Owned {
    fn noted(note: Note) -> Self {
        Self {
            note: Some(note),
            in_question: Vec::new(),
        }
    }
}

impl LinuxGuest<'_> {
    /// Gives every RAM frame its class.
    ///
    /// Content is not looked at: [`mark_zero_pages`](crate::mark_zero_pages) does that.
    ///
    /// # Errors
    /// [`VmiError::NotOwner`] if a processor runs on page tables of something else,
    /// [`VmiError::LaterOwner`] if the memory bears traces of a later owner,
    /// [`VmiError::OwnerUntold`] if it would bear none of a reset,
    /// [`VmiError::Inconsistent`] if the sources of truth disagree, [`VmiError::Missing`] if a
    /// symbol or member that decides about a page is known to no source, and what reading gives.
    pub fn classify(&self, on: OnInconsistency) -> Result<Classification, VmiError> {
        self.classify_told(on, &self.progress)
    }

    /// The same; `progress` is told how far it is.
    pub(super) fn classify_told(
        &self,
        on: OnInconsistency,
        progress: &dyn Progress,
    ) -> Result<Classification, VmiError> {
        let _tables = self.kernel.space.remember_tables();
        // Records of a kernel that is gone may be gone as well, which is no answer.
        if let Some(owner) = &self.traces
            && !owner.traces.is_empty()
            && on == OnInconsistency::Refuse
        {
            return Err(VmiError::LaterOwner(owner.traces.clone()));
        }
        let (mem_map, layout, zones) = self.structures()?;
        let owner = self.owner(&mem_map, &zones, on)?;
        let mut scan = scan(
            &self.kernel,
            &mem_map,
            &layout,
            &zones,
            (self.threads, progress),
        )?;
        if scan.fatal
            && on == OnInconsistency::Refuse
            && let Some(inconsistency) = scan.disagreement
        {
            return Err(VmiError::Inconsistent(Box::new(inconsistency)));
        }
        if self.knowledge != Knowledge::Types {
            shape::check_cover(&self.kernel, &zones, self.image, &scan.map)?;
        }
        let mut notes = scan.notes;
        notes.extend(owner.note);
        notes.extend(self.notes_of_files.iter().cloned());
        notes.extend(self.keep(&mut scan.map, &owner.in_question));
        if let Some(inconsistency) = &scan.disagreement {
            notes.push(Note::Disagreement(Box::new(inconsistency.clone())));
        }
        let free_fill = self.free_fill(&scan.map, &mut notes)?;
        self.note_features(&mut notes)?;
        Ok(Classification {
            map: scan.map,
            free_fill,
            zones: scan.zones,
            disagreement: scan.disagreement,
            notes,
        })
    }

    /// Refuses a kernel that does not own the memory, or says what there is to say of it.
    fn owner(
        &self,
        map: &MemMap<'_>,
        zones: &Zones,
        on: OnInconsistency,
    ) -> Result<Owned, VmiError> {
        match self.owners.check(&self.kernel, map, zones) {
            Ok(Verdict::Owner) => Ok(Owned::default()),
            Ok(Verdict::Unknown) => self.look_for_later_owner(on),
            Ok(Verdict::NotTold(why)) => {
                let owned = self.look_for_later_owner(on)?;
                let instead = owned.note.map(Box::new);
                Ok(Owned {
                    note: instead.map(|instead| Note::ProcessorsNotBelieved { why, instead }),
                    ..owned
                })
            }
            // The note that says so is the kernel's VMCOREINFO: one that was found without it may
            // be any.
            Ok(Verdict::Crashed) if self.kernel.vmcoreinfo.is_none() => {
                self.look_for_later_owner(on)
            }
            Ok(Verdict::Crashed) => Ok(Owned::noted(Note::CrashDump)),
            Err(VmiError::NotOwner { kernel, processor })
                if on == OnInconsistency::KeepInQuestion =>
            {
                Ok(Owned::noted(Note::NotOwner { kernel, processor }))
            }
            Err(error) => Err(error),
        }
    }

    /// Keeps the free frames of memory that may have another owner, and says how many.
    fn keep(&self, map: &mut PageMap, ranges: &[GpaRange]) -> Option<Note> {
        let mut kept = Tally::ZERO;
        for range in ranges {
            map.with_slices(
                range.whole_frames(self.kernel.build.page_size),
                |_, pages| {
                    for page in pages {
                        if matches!(
                            page.class(),
                            PageClass::FreeBuddy | PageClass::FreePcp | PageClass::Offline
                        ) {
                            *page = PageClass::Unknown.into();
                            kept.add(1);
                        }
                    }
                },
            );
        }
        (kept > Tally::ZERO).then(|| Note::FirmwareMemoryKept {
            pages: kept.get(),
            places: ranges.to_vec(),
        })
    }

    /// Looks for traces of a later owner, where nothing tells the processors' registers.
    fn look_for_later_owner(&self, on: OnInconsistency) -> Result<Owned, VmiError> {
        let looked;
        let owner = if let Some(owner) = &self.traces {
            owner
        } else {
            looked = owner::look(&self.kernel, self.knowledge == Knowledge::Types)?;
            &looked
        };
        let refuse = on == OnInconsistency::Refuse;
        match &owner.untold {
            _ if !owner.traces.is_empty() => {
                let traces = owner.traces.clone();
                if refuse {
                    return Err(VmiError::LaterOwner(traces));
                }
                Ok(Owned::noted(Note::LaterOwner(traces)))
            }
            Some(why) => {
                let (kernel, why) = (self.kernel.build.release.clone(), why.clone());
                if refuse {
                    return Err(VmiError::OwnerUntold { kernel, why });
                }
                Ok(Owned::noted(Note::OwnerUntold { kernel, why }))
            }
            None => Ok(Owned {
                note: Some(Note::NoTraceOfLaterOwner(TracesSought {
                    made: owner.clean.clone(),
                    not_made: owner.not_made.clone(),
                })),
                in_question: owner.in_question.clone(),
            }),
        }
    }
}
