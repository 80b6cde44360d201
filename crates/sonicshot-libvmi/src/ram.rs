//! The layout of a guest's RAM: LibVMI tells how much there is and where it ends, and no holes.

use crate::instance::{Instance, PAGE};
use crate::{Domain, LibVmiError};
use sonicshot::{Gpa, GpaRange, RamLayout, to_usize};

/// As far as pages are tried: 1 TiB.
const MAX_TRIED: u64 = 1 << 40;
/// So many pages are mapped at a time, to see whether they are there.
const PAGES: usize = 512;

/// The RAM of a guest.
///
/// # Errors
/// [`LibVmiError::NoMemory`], [`LibVmiError::TooLarge`], [`LibVmiError::Layout`].
pub(crate) fn find(instance: &Instance, domain: &Domain) -> Result<RamLayout, LibVmiError> {
    let (bytes, end) = instance.size();
    let end = Gpa::new(end.raw() & !PAGE.offset_mask());
    let none = || LibVmiError::NoMemory {
        domain: domain.clone(),
        bytes,
        end,
    };
    if bytes == 0 || end == Gpa::ZERO {
        return Err(none());
    }
    let ranges = match domain {
        // A file has no holes, and LibVMI reads it by whole pages.
        Domain::File(_) => vec![GpaRange::new(Gpa::ZERO, end)],
        _ if end.raw() > MAX_TRIED => {
            return Err(LibVmiError::TooLarge {
                domain: domain.clone(),
                end,
                most: Gpa::new(MAX_TRIED),
            });
        }
        _ => {
            let mut tried = Tried::new(instance);
            tried.all(end);
            tried.found
        }
    };
    if ranges.is_empty() {
        return Err(none());
    }
    RamLayout::new(ranges).map_err(|source| LibVmiError::Layout {
        domain: domain.clone(),
        source,
    })
}

/// The pages that are there, as they are tried from the lowest on.
struct Tried<'i> {
    instance: &'i Instance,
    found: Vec<GpaRange>,
    /// Whether mapping tells; else each page is read.
    maps: bool,
}

impl<'i> Tried<'i> {
    fn new(instance: &'i Instance) -> Self {
        // The first page of memory is there in every machine.
        let maps = instance.map(Gpa::ZERO, 1).is_some();
        Self {
            instance,
            found: Vec::new(),
            maps,
        }
    }

    fn all(&mut self, end: Gpa) {
        let mut at = Gpa::ZERO;
        while let Some(left) = end.offset_from(at).filter(|left| *left > 0) {
            let pages = to_usize(left >> PAGE.shift()).min(PAGES);
            self.some(at, pages);
            let Some(next) = after(at, pages).filter(|next| *next > at) else {
                return;
            };
            at = next;
        }
    }

    /// `pages` pages: all of them if they can be mapped together, else each half.
    fn some(&mut self, at: Gpa, pages: usize) {
        let there = match (self.maps, pages) {
            (_, 0) => return,
            (true, _) => self.instance.map(at, pages).is_some(),
            (false, 1) => self.instance.read(at, &mut [0]).is_ok(),
            (false, _) => false,
        };
        if there {
            if let Some(end) = after(at, pages) {
                self.found.push(GpaRange::new(at, end));
            }
            return;
        }
        let half = pages / 2;
        if half == 0 {
            return;
        }
        self.some(at, half);
        if let Some((middle, rest)) = after(at, half).zip(pages.checked_sub(half)) {
            self.some(middle, rest);
        }
    }
}

/// The address so many pages further up.
fn after(at: Gpa, pages: usize) -> Option<Gpa> {
    let bytes = u64::try_from(pages).ok()?.checked_mul(PAGE.bytes())?;
    at.checked_add(bytes)
}
