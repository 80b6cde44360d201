//! Frames of a domain, mapped once and kept so.

use crate::ffi::{Foreign, Xen};
use crate::{DomainId, LiveError};
use sonicshot::P2m;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// A number that Xen cannot map: of a frame that the guest does not have.
pub(crate) const NOWHERE: u64 = u64::MAX >> P2m::PAGE.shift();
/// So many frames are kept mapped: 1 GiB, the records of 64 GiB. More are mapped when they are asked for.
const MAX_KEPT: usize = 1 << 18;

/// Frames of a domain that are mapped until this is dropped, by the numbers that they were mapped by.
///
/// A mapping shows what is in the frame at any time. So of a paravirtualised domain, whose frames have
/// the machine's numbers, a mapping that was made while it ran serves once it is suspended: as long as
/// a frame is mapped, Xen gives its number to no other. Of other domains a number is the guest's, which
/// may have another frame behind it by then.
pub(crate) struct Mappings<'x> {
    pub xen: &'x Xen,
    pub domain: DomainId,
    kept: Mutex<Kept<Arc<Foreign<'x>>>>,
}

impl<'x> Mappings<'x> {
    pub(crate) fn new(xen: &'x Xen, domain: DomainId) -> Self {
        Self {
            xen,
            domain,
            kept: Mutex::default(),
        }
    }

    /// These frames side by side, to be read.
    pub(crate) fn of(&self, frames: &[u64]) -> Result<Arc<Foreign<'x>>, LiveError> {
        let kept = || self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mapped) = kept().by_frames.get(frames) {
            return Ok(Arc::clone(mapped));
        }
        let mapped = Arc::new(self.xen.map(self.domain, frames)?);
        // What could not be had may be there when it is asked for again.
        if mapped.lacks_only(frames, NOWHERE) {
            kept().keep(frames, Arc::clone(&mapped));
        }
        Ok(mapped)
    }
}

/// The mappings that are kept, and the number of their frames.
struct Kept<T> {
    by_frames: HashMap<Box<[u64]>, T>,
    frames: usize,
}

impl<T> Default for Kept<T> {
    fn default() -> Self {
        Self {
            by_frames: HashMap::new(),
            frames: 0,
        }
    }
}

impl<T> Kept<T> {
    fn keep(&mut self, frames: &[u64], mapped: T) {
        let all = self.frames.checked_add(frames.len());
        let Some(all) = all.filter(|all| *all <= MAX_KEPT) else {
            return;
        };
        if self.by_frames.insert(frames.into(), mapped).is_none() {
            self.frames = all;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Kept, MAX_KEPT};

    #[test]
    fn what_is_kept_mapped_is_bounded() {
        let mut kept = Kept::default();
        for first in 0..MAX_KEPT as u64 / 512 {
            let frames: Vec<u64> = (first * 512..first * 512 + 512).collect();
            kept.keep(&frames, first);
            // Two who map the same at once keep one.
            kept.keep(&frames, first);
        }
        let all = kept.frames;
        assert!((MAX_KEPT - 512..=MAX_KEPT).contains(&all), "{all}");
        kept.keep(&[1; 1024], 0);
        assert_eq!(kept.frames, all);
        assert_eq!(kept.by_frames.get([1; 1024].as_slice()), None);
    }
}
