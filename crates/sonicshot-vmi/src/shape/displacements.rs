//! Words of the kernel's image that may be what is added for a processor to a `__percpu` pointer.

use super::heads::Look;
use crate::error::VmiError;
use sonicshot::to_u64;
use std::collections::HashSet;

/// So many different words of an image are tried; one that is whole has some thousands.
pub(super) const MAX_WORDS: u64 = 1 << 18;

/// The words of the kernel's image that may be a processor's displacement, each once, lowest place
/// first.
#[derive(Debug, Default)]
pub(super) struct Displacements {
    words: Vec<u64>,
    seen: HashSet<u64>,
}

impl Displacements {
    /// All of them.
    pub(super) fn words(&self) -> &[u64] {
        &self.words
    }

    /// Takes `word` if it is whole pages: the difference of two kernel addresses.
    pub(super) fn take(&mut self, look: &Look<'_, '_>, word: u64) -> Result<(), VmiError> {
        let inside = look.heads.map.page_size.offset_mask();
        if word & inside != 0 || word >> 56 != 0xff {
            return Ok(());
        }
        self.add(word)
    }

    fn add(&mut self, word: u64) -> Result<(), VmiError> {
        if !self.seen.insert(word) {
            return Ok(());
        }
        self.words.push(word);
        let number = to_u64(self.words.len());
        if number > MAX_WORDS {
            return Err(VmiError::TooMany {
                what: "words of the kernel's image that may be a processor's displacement",
                found: number,
                most: MAX_WORDS,
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{Displacements, MAX_WORDS};

    #[test]
    fn words_of_an_image_are_no_more_than_a_bound() {
        let mut words = Displacements::default();
        for word in 0..MAX_WORDS {
            words.add(word).unwrap();
        }
        // One that was there is no other.
        words.add(0).unwrap();
        assert!(words.add(MAX_WORDS).is_err());
    }
}
