//! Finds out where in the guest the bytes of a dump lie, where the dump itself does not say:
//! raw files, and QEMU's files with several blocks of memory. The guest's own memory maps decide.

mod given;
mod plugged;
mod search;

use crate::error::CliError;
use crate::inputs::Input;
pub(crate) use given::keep_unconfirmed;
pub(crate) use plugged::keep_what_is_not_free_in_all;
use search::{Attempt, MAX_ATTEMPTS, Search};
use sonicshot::GpaRange;
use sonicshot_dump::Dump;
use sonicshot_vmi::{GuestOptions, LinuxGuest, VmiError};

/// A dump whose layout is known, and what was made of its guest.
pub(crate) struct Placed<T> {
    pub dump: Dump,
    /// How the layout was found, for people.
    pub origin: &'static str,
    /// Ranges of the same length that hold blocks of which it is not known which is which.
    pub shared: Vec<Vec<GpaRange>>,
    /// Ranges of a layout that was given of which nothing shows that they lie there.
    pub unconfirmed: Vec<GpaRange>,
    pub notes: Vec<String>,
    pub value: T,
}

/// Opens the dump in the layout that its guest confirms and lets `work` look at the guest.
pub(crate) fn with_guest<T>(
    input: &Input<'_>,
    work: &dyn Fn(&LinuxGuest<'_>) -> Result<T, VmiError>,
) -> Result<Placed<T>, CliError> {
    let guest_error = |source| CliError::Guest {
        path: input.memory().into(),
        source,
    };
    if let Some(layout) = input.files.layout() {
        let dump = input.open(Some(layout))?;
        let own = dump.layout_spec().is_none() && dump.ram_blocks().is_empty();
        let guest = LinuxGuest::open(&dump, &options(input, &dump)).map_err(guest_error)?;
        let unconfirmed = match input.how.layout {
            Some(_) => given::check(input, &dump, &guest)?,
            // The VMM's own word.
            None => Vec::new(),
        };
        let value = work(&guest).map_err(guest_error)?;
        drop(guest);
        return Ok(Placed {
            origin: if input.how.layout.is_none() {
                "from the snapshot's state.json"
            } else if own {
                "from the file; --layout is for raw and QEMU's files"
            } else {
                "given"
            },
            dump,
            shared: Vec::new(),
            unconfirmed,
            notes: Vec::new(),
            value,
        });
    }
    let mut search = Search::new(input)?;
    let mut first_error: Option<CliError> = None;
    let mut unconfirmed = None;
    for _ in 0..MAX_ATTEMPTS {
        let Some(candidate) = search.next() else {
            break;
        };
        match search.attempt(&candidate, true, work) {
            Ok(Attempt::Done(placed)) => return Ok(*placed),
            Ok(Attempt::Refuted(e820)) => search.learn(e820),
            Ok(Attempt::Unconfirmed) => {
                unconfirmed.get_or_insert(candidate);
            }
            Err(error) if search.certain || is_about_symbols(input, &error) => return Err(error),
            Err(error) => {
                // What is wrong with a kernel says more than that there is none.
                if first_error.as_ref().is_none_or(is_no_kernel) {
                    first_error = Some(error);
                }
            }
        }
    }
    if let Some(candidate) = unconfirmed {
        let Attempt::Done(placed) = search.attempt(&candidate, false, work)? else {
            // A kernel was found: what is wrong in other layouts says nothing.
            let path = input.memory().into();
            return Err(CliError::NoLayout { path });
        };
        return Ok(Placed {
            origin: "guessed: the guest's e820 map could not be read",
            ..*placed
        });
    }
    Err(first_error.unwrap_or_else(|| CliError::NoLayout {
        path: input.memory().into(),
    }))
}

/// Opens the dump alone, in the layout that its guest confirms if the dump does not say.
pub(crate) fn open(input: &Input<'_>) -> Result<Dump, CliError> {
    if input.files.layout().is_some() || Search::new(input)?.certain {
        return Ok(input.open(input.files.layout())?);
    }
    Ok(with_guest(input, &|_| Ok(()))?.dump)
}

fn options(input: &Input<'_>, dump: &Dump) -> GuestOptions {
    let mut options = GuestOptions::new();
    for path in &input.how.symbols {
        options = options.symbols(path);
    }
    if let Some(cr3) = input.how.cr3 {
        options = options.cr3(cr3);
    }
    match dump.vmcoreinfo() {
        Some(text) => options.vmcoreinfo(text),
        None => options,
    }
}

fn look<T>(
    input: &Input<'_>,
    dump: &Dump,
    work: &dyn Fn(&LinuxGuest<'_>) -> Result<T, VmiError>,
) -> Result<T, VmiError> {
    work(&LinuxGuest::open(dump, &options(input, dump))?)
}

fn is_no_kernel(error: &CliError) -> bool {
    let CliError::Guest { source, .. } = error else {
        return false;
    };
    matches!(source, VmiError::NoKernel { .. })
}

/// A wrong symbol file is wrong in every layout; the guest's own symbols are only where they are
/// in the right one.
fn is_about_symbols(input: &Input<'_>, error: &CliError) -> bool {
    if input.how.symbols.is_empty() {
        return false;
    }
    let CliError::Guest { source, .. } = error else {
        return false;
    };
    matches!(source, VmiError::WrongKernel { .. } | VmiError::Symbols(_))
}
