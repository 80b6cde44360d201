//! The layout that the guest confirms, of all that may be.

use super::candidates::{Candidate, Candidates};
use super::firmware;
use super::given;
use super::placed::{Look, Placed, open_guest};
use super::trial::{Outcome, attempt};
use crate::error::OfflineError;
use crate::snapshot::Snapshot;
use sonicshot::GuestMemory;
use sonicshot_dump::{Dump, DumpError, LayoutSpec};
use sonicshot_vmi::VmiError;

/// Tries the layouts, likeliest first, until the guest's own memory map agrees with one.
pub(super) fn with_guest<T>(
    snapshot: &Snapshot,
    look: Look<'_, T>,
) -> Result<Placed<T>, OfflineError> {
    let mut candidates = candidates(snapshot)?;
    let mut why_not = None;
    let mut unconfirmed = None;
    let mut asked = candidates.certain;
    loop {
        let candidate = match candidates.next() {
            Some(candidate) => candidate,
            // No kernel can be read, as where RAM is split in a place of its own.
            None if !asked && unconfirmed.is_none() => {
                asked = true;
                add_by_firmware(snapshot, &mut candidates);
                continue;
            }
            None => break,
        };
        match attempt(snapshot, &candidates, &candidate, true, look) {
            Ok(Outcome::Done(placed)) => return Ok(*placed),
            Ok(Outcome::Refuted(e820)) => candidates.learn(e820),
            Ok(Outcome::Unconfirmed) => {
                unconfirmed.get_or_insert(candidate);
            }
            Err(error) if candidates.certain || is_about_symbols(snapshot, &error) => {
                return Err(error);
            }
            // What is wrong with a kernel says more than that there is none.
            Err(error)
                if why_not
                    .as_ref()
                    .is_none_or(|why| tells(&error) > tells(why)) =>
            {
                why_not = Some(error);
            }
            Ok(Outcome::Wrong) | Err(_) => {}
        }
    }
    match unconfirmed {
        Some(candidate) => guess(snapshot, &candidates, &candidate, look),
        None => Err(why_not.unwrap_or_else(|| no_layout(snapshot))),
    }
}

/// Adds what firmware may have said of the RAM.
fn add_by_firmware(snapshot: &Snapshot, candidates: &mut Candidates) {
    // What cannot be opened so was told of before.
    if let Ok((dump, _)) = first_look(snapshot) {
        for map in firmware::maps(&dump) {
            candidates.add_by(&map);
        }
    }
}

/// Opens the dump alone, in the layout that its guest confirms, or in the only one that is known.
pub(super) fn open(snapshot: &Snapshot) -> Result<Dump, OfflineError> {
    match with_guest(snapshot, &|_| Ok(())) {
        Ok(placed) => Ok(placed.dump),
        Err(_) if candidates(snapshot)?.sole => Ok(snapshot.dump(None)?),
        Err(error) => Err(error),
    }
}

/// Whether there is only one way to lay out the dump.
pub(super) fn is_certain(snapshot: &Snapshot) -> Result<bool, OfflineError> {
    Ok(candidates(snapshot)?.certain)
}

/// All ways to lay out the dump.
fn candidates(snapshot: &Snapshot) -> Result<Candidates, OfflineError> {
    let (dump, specs) = first_look(snapshot)?;
    let blocks = dump.ram_blocks().to_vec();
    let candidates = Candidates::new(
        blocks,
        specs,
        dump.layout().bytes(),
        dump.layout_spec().is_some(),
    );
    candidates.map_err(|count| OfflineError::ManyBlocks {
        path: snapshot.memory_file().into(),
        count,
    })
}

/// Opens the dump in any layout, and tells where its machine may have its RAM.
fn first_look(snapshot: &Snapshot) -> Result<(Dump, Vec<LayoutSpec>), OfflineError> {
    let mut specs = LayoutSpec::KNOWN.to_vec();
    match snapshot.dump(None) {
        // A machine of QEMU's that is not known: one of the layouts may be its own.
        Err(error @ DumpError::NoLayout { .. }) => {
            let mut dumps = specs.iter().map(|spec| snapshot.dump(Some(spec)));
            let dump = dumps.find_map(Result::ok).ok_or(error)?;
            Ok((dump, specs))
        }
        dump => {
            let dump = dump?;
            specs.retain(|spec| dump.machine_layout().is_none_or(|own| own == *spec));
            Ok((dump, specs))
        }
    }
}

/// Takes the first layout in which there is a kernel, though its map could not be read. What else
/// shows where memory lies is held against it, as against a layout that was given: what nothing
/// shows in place is kept.
fn guess<T>(
    snapshot: &Snapshot,
    candidates: &Candidates,
    candidate: &Candidate,
    look: Look<'_, T>,
) -> Result<Placed<T>, OfflineError> {
    match attempt(snapshot, candidates, candidate, false, look)? {
        Outcome::Done(placed) => {
            let guest = open_guest(snapshot, &placed.dump)?;
            let unconfirmed = given::check(snapshot, &placed.dump, &*guest, true)?;
            drop(guest);
            Ok(Placed {
                origin: "guessed: the guest's e820 map could not be read",
                doubts: placed.doubts.unconfirmed(unconfirmed),
                ..*placed
            })
        }
        // A kernel was found: what is wrong in other layouts says nothing.
        _ => Err(no_layout(snapshot)),
    }
}

fn no_layout(snapshot: &Snapshot) -> OfflineError {
    OfflineError::NoLayout {
        path: snapshot.memory_file().into(),
    }
}

/// The rank of an error by what it tells: that there is no kernel, least of all.
fn tells(error: &OfflineError) -> u8 {
    match error {
        OfflineError::Guest {
            source: VmiError::NoKernel { .. },
            ..
        } => 0,
        // In another layout they may lead there, and be whole.
        OfflineError::Guest {
            source:
                VmiError::NoTables { .. } | VmiError::BannerAlone { .. } | VmiError::Stale { .. },
            ..
        } => 1,
        _ => 2,
    }
}

/// A wrong symbol file is wrong in every layout; the guest's own symbols are only where they are
/// in the right one.
fn is_about_symbols(snapshot: &Snapshot, error: &OfflineError) -> bool {
    let OfflineError::Guest { source, .. } = error else {
        return false;
    };
    !snapshot.options().symbols.is_empty()
        && matches!(source, VmiError::WrongKernel { .. } | VmiError::Symbols(_))
}
