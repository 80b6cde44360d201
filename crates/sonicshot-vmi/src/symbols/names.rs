//! A hash index over names that somebody else stores.

use std::hash::{BuildHasher, RandomState};

/// Finds the number of a name. The names stay where they are; the hash is keyed, so crafted
/// names cannot be made to collide.
#[derive(Debug)]
pub(crate) struct NameIndex {
    /// Number + 1, or 0 for an empty slot; the length is a power of two.
    slots: Vec<u32>,
    hasher: RandomState,
}

impl NameIndex {
    /// Indexes the names 0 to `count`. Of equal names the first is found.
    pub(crate) fn new<'a>(count: usize, name: impl Fn(u32) -> Option<&'a [u8]>) -> Self {
        let mut index = Self {
            slots: vec![0; count.max(8).next_power_of_two() << 1],
            hasher: RandomState::new(),
        };
        for number in (0..u32::MAX).take(count) {
            let Some(this) = name(number) else { continue };
            for slot in index.probe(this) {
                let Some(found) = index.slots.get_mut(slot) else {
                    break;
                };
                match *found {
                    0 => {
                        *found = !number;
                        break;
                    }
                    other if name(!other) == Some(this) => break,
                    _ => {}
                }
            }
        }
        index
    }

    /// The number of the first name equal to `wanted`.
    pub(crate) fn find<'a>(
        &self,
        wanted: &[u8],
        name: impl Fn(u32) -> Option<&'a [u8]>,
    ) -> Option<u32> {
        for slot in self.probe(wanted) {
            let number = *self.slots.get(slot)?;
            if number == 0 {
                return None;
            }
            if name(!number) == Some(wanted) {
                return Some(!number);
            }
        }
        None
    }

    /// Every slot once, from the one where `name` belongs.
    #[allow(
        clippy::cast_possible_truncation,
        clippy::arithmetic_side_effects,
        reason = "a hash may be cut; the length is a power of two and not 0"
    )]
    fn probe(&self, name: &[u8]) -> impl Iterator<Item = usize> + use<> {
        let mask = self.slots.len() - 1;
        let first = self.hasher.hash_one(name) as usize & mask;
        (first..=mask).chain(0..first)
    }
}

#[cfg(test)]
mod tests {
    use super::NameIndex;
    use proptest::prelude::*;
    use std::collections::HashMap;

    proptest! {
        #[test]
        fn finds_what_a_map_finds(names in proptest::collection::vec("[a-c]{0,3}", 0..60), other in "[a-d]{0,3}") {
            let get = |i: u32| names.get(i as usize).map(|n: &String| n.as_bytes());
            let index = NameIndex::new(names.len(), get);
            let mut model = HashMap::new();
            for (number, name) in (0_u32..).zip(&names) {
                model.entry(name.as_str()).or_insert(number);
            }
            for name in names.iter().chain([&other]) {
                prop_assert_eq!(index.find(name.as_bytes(), get), model.get(name.as_str()).copied());
            }
        }
    }
}
