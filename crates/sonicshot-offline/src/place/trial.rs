//! The trying of one layout.

use super::candidates::{Candidate, Candidates};
use super::given::MEMORY_BLOCK;
use super::placed::{Look, Placed, open_guest};
use super::plugged::{Plugged, unplaced_devices};
use crate::error::OfflineError;
use crate::note::Note;
use crate::snapshot::Snapshot;
use sonicshot::{Gpa, GpaRange, GuestMemory, RamLayout};
use sonicshot_dump::{BlockPlace, Doubts, Dump, LayoutSpec, is_boot_ram};
use sonicshot_vmi::GuestOs;
use std::collections::BTreeSet;

/// The outcome of trying a layout.
pub(super) enum Outcome<T> {
    Done(Box<Placed<T>>),
    /// The guest's map of the RAM that it boots with says otherwise.
    Refuted(Vec<GpaRange>),
    /// The guest's map could not be read.
    Unconfirmed,
    /// The guest has no map that can be read, and its kernel does not know some of the memory.
    Wrong,
}

/// Opens the dump as `candidate` has it, and lets `look` see the guest if that agrees. Without
/// `confirm` a guest agrees that says nothing.
pub(super) fn attempt<T>(
    snapshot: &Snapshot,
    candidates: &Candidates,
    candidate: &Candidate,
    confirm: bool,
    look: Look<'_, T>,
) -> Result<Outcome<T>, OfflineError> {
    let failed = OfflineError::guest(snapshot.memory_file());
    let dump = snapshot.dump(candidate.layout_with_guess().as_ref())?;
    let guest = open_guest(snapshot, &dump)?;
    if confirm {
        match agreement(candidates, candidate, &*guest) {
            Agreement::Full => {}
            Agreement::None(e820) => return Ok(Outcome::Refuted(e820)),
            Agreement::Unknown => return Ok(Outcome::Unconfirmed),
            Agreement::Never => return Ok(Outcome::Wrong),
        }
    }
    let mut notes: Vec<Note> = ends_elsewhere(candidate, &dump, &*guest)
        .into_iter()
        .collect();
    let mut shared = Vec::new();
    if let Some(places) = candidate.guessed_places() {
        let structs = guest.page_records().map_err(&failed)?;
        if !candidates.shows_in_place(places, &structs) {
            return Ok(Outcome::Unconfirmed);
        }
        let ram = guest.system_ram().map_err(&failed)?.unwrap_or_default();
        let mut plugged = plugged(candidates, places, &ram);
        // A guess was only for reading the kernel: what counts is what that says.
        if !plugged.places.is_empty() || !candidate.guess.is_empty() {
            let direct_map = guest.direct_map().map_err(&failed)?;
            drop(guest);
            let open = |plugged: &Plugged| {
                let all = [places, &plugged.places].concat();
                snapshot.dump(Some(&LayoutSpec::Blocks(all)))
            };
            let mut dump = open(&plugged)?;
            if plugged.tell_apart(&dump, direct_map)? {
                dump = open(&plugged)?;
            }
            let value = look(&*open_guest(snapshot, &dump)?).map_err(&failed)?;
            return Ok(done(candidate, dump, plugged.notes, plugged.shared, value));
        }
        notes = plugged.notes;
        shared = plugged.shared;
    }
    let value = look(&*guest).map_err(&failed)?;
    drop(guest);
    Ok(done(candidate, dump, notes, shared, value))
}

fn done<T>(
    candidate: &Candidate,
    dump: Dump,
    mut notes: Vec<Note>,
    shared: Vec<Vec<GpaRange>>,
    value: T,
) -> Outcome<T> {
    notes.extend(unplaced_devices(&dump));
    Outcome::Done(Box::new(Placed {
        dump,
        origin: candidate.origin,
        doubts: Doubts::of_checked_layout().shared(shared),
        notes,
        value,
    }))
}

/// The agreement of a layout with the guest's own map.
enum Agreement {
    Full,
    /// This is what the guest boots with instead.
    None(Vec<GpaRange>),
    Unknown,
    /// There is memory in the layout of which the kernel knows nothing.
    Never,
}

fn agreement(candidates: &Candidates, candidate: &Candidate, guest: &dyn GuestOs) -> Agreement {
    let Some(boot) = &candidate.boot else {
        return Agreement::Full;
    };
    match guest.boot_ram() {
        Ok(Some(e820)) if is_boot_ram(boot, &e820) => Agreement::Full,
        // A part of a guest's memory, or with more in it than RAM: it is noted.
        Ok(Some(e820)) if candidate.sole && !candidates.fits_another(boot, &e820) => {
            Agreement::Full
        }
        Ok(Some(e820)) => Agreement::None(e820),
        _ if candidate.sole => Agreement::Full,
        // A file with one block has the layout of its machine.
        _ if candidates.are_of_blocks() && !candidate.guessed => Agreement::Full,
        _ if candidates.are_of_blocks() => Agreement::Unknown,
        _ => by_sections(boot, guest),
    }
}

/// The agreement of a layout with the kernel's sections of memory, where nothing tells the map that it
/// booted with: without types there is no such map.
fn by_sections(boot: &RamLayout, guest: &dyn GuestOs) -> Agreement {
    let Ok(known) = guest.known_memory() else {
        return Agreement::Unknown;
    };
    let ram = blocks_of(boot.regions());
    let known = blocks_of(&known);
    if !ram.is_subset(&known) {
        return Agreement::Never;
    }
    match ram == known {
        true => Agreement::Full,
        // Memory that was plugged in may be in another file.
        false => Agreement::Unknown,
    }
}

/// The numbers of the blocks in which memory has struct pages.
fn blocks_of(ranges: &[GpaRange]) -> BTreeSet<u64> {
    let numbers = ranges
        .iter()
        .filter(|range| !range.is_empty())
        .filter_map(|range| Some((range.start().raw(), range.end().raw().checked_sub(1)?)))
        .flat_map(|(first, last)| first / MEMORY_BLOCK..=last / MEMORY_BLOCK);
    numbers.collect()
}

/// Of a raw file for which only one layout is known: whether its guest booted with other RAM.
fn ends_elsewhere(candidate: &Candidate, dump: &Dump, guest: &dyn GuestOs) -> Option<Note> {
    if !candidate.sole {
        return None;
    }
    let e820 = guest.boot_ram().ok().flatten()?;
    (!is_boot_ram(dump.layout(), &e820)).then(|| Note::RamEndsElsewhere {
        guest: e820.iter().map(GpaRange::end).max().unwrap_or(Gpa::ZERO),
        file: dump.layout().end(),
    })
}

/// The places of the blocks that are not in `places`, by what the guest's kernel has of RAM.
fn plugged(candidates: &Candidates, places: &[BlockPlace], ram: &[GpaRange]) -> Plugged {
    let names: Vec<&str> = places.iter().map(|place| place.name.as_str()).collect();
    let taken: Vec<GpaRange> = places.iter().flat_map(|p| p.ranges.clone()).collect();
    Plugged::find(&candidates.others(&names), ram, &taken)
}
