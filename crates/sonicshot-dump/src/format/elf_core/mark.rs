//! The mark by which a core that was pruned here tells of the memory that it has no bytes for.
//!
//! In a core of any tool that memory (`p_filesz` less than `p_memsz`) may be anything: makedumpfile
//! leaves out zeroes so, and pages in use too, and does not say which. A pruned core says it in a
//! note, name `SONICSHOT`, type [`KIND`], little-endian:
//!
//! | bytes | what |
//! |---|---|
//! | 4 | version, 1 |
//! | 4 | how many `PT_LOAD` segments the core has |
//! | 8 | the sum of their `p_filesz` |
//! | 8 | the sum of their `p_memsz` |
//! | 16 each | ranges of memory, start and length, that the core does not have |
//!
//! All other memory without bytes is zero, or free. Whoever writes such a core again, and leaves
//! more out, may copy the note; then the numbers are no longer the core's, and the note does not
//! count.

use crate::format::notes::{note, notes_in};
use sonicshot::{Cursor, CutShort, Gpa, GpaRange};

/// No other note has it: readers take some types for what they know, whatever the name.
const KIND: u32 = 0x534e_4943;
const NAME: &[u8] = b"SONICSHOT";
const VERSION: u32 = 1;

/// The sums of a core's `PT_LOAD` segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Sums {
    count: u32,
    file_len: u64,
    mem_len: u64,
}

impl Sums {
    /// The same with one more segment; `None` if no core has so much.
    pub(super) fn with(self, file_len: u64, mem_len: u64) -> Option<Self> {
        Some(Self {
            count: self.count.checked_add(1)?,
            file_len: self.file_len.checked_add(file_len)?,
            mem_len: self.mem_len.checked_add(mem_len)?,
        })
    }
}

/// The ranges that the core with these notes says that it does not have; `None` if it does not say.
pub(super) fn absent_in(notes: &[u8], sums: Sums) -> Option<Vec<GpaRange>> {
    let mut ours = notes_in(notes).filter(|note| note.name == NAME && note.kind == KIND);
    let text = ours.next()?.text;
    let (said, absent) = parsed(text).ok()?;
    (said == sums).then_some(absent).flatten()
}

fn parsed(text: &[u8]) -> Result<(Sums, Option<Vec<GpaRange>>), CutShort> {
    let mut text = Cursor::new(text);
    let version: u32 = text.le()?;
    let sums = Sums {
        count: text.le()?,
        file_len: text.le()?,
        mem_len: text.le()?,
    };
    let mut absent = Vec::new();
    while text.left() > 0 {
        let (start, len) = (text.le()?, text.le()?);
        let Some(range) = GpaRange::with_len(Gpa::new(start), len) else {
            return Ok((sums, None));
        };
        absent.push(range);
    }
    Ok((sums, (version == VERSION).then_some(absent)))
}

/// The notes of a pruned core with these sums: those that it had, but for an older note of ours, and
/// that it does not have `absent`. `None` if no note can say so much.
pub(super) fn with_absent(notes: &[u8], sums: Sums, absent: &[GpaRange]) -> Option<Vec<u8>> {
    let mut text = VERSION.to_le_bytes().to_vec();
    text.extend(sums.count.to_le_bytes());
    text.extend(sums.file_len.to_le_bytes());
    text.extend(sums.mem_len.to_le_bytes());
    for range in absent {
        text.extend(range.start().raw().to_le_bytes());
        text.extend(range.len().to_le_bytes());
    }
    let mut out = without_ours(notes)?;
    out.resize(out.len().checked_next_multiple_of(4)?, 0);
    out.extend(note(&[NAME, &[0]].concat(), KIND, &text)?);
    Some(out)
}

/// The notes that are none of ours, byte for byte.
fn without_ours(notes: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(notes.len());
    let mut rest = notes;
    while let Some(first) = notes_in(rest).next() {
        let len = u64::try_from(first.text.len()).ok()?;
        let end = first
            .text_at
            .checked_add(len.checked_next_multiple_of(4)?)?;
        let end = usize::try_from(end).ok()?.min(rest.len());
        let (this, behind) = rest.split_at_checked(end)?;
        if first.name != NAME || first.kind != KIND {
            out.extend(this);
        }
        rest = behind;
    }
    // What is no note any more.
    out.extend(rest);
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::{Sums, absent_in, with_absent};
    use crate::format::notes::note;
    use proptest::prelude::*;
    use sonicshot::{Gpa, GpaRange};

    fn range((start, len): (u64, u64)) -> GpaRange {
        GpaRange::with_len(Gpa::new(start), len).unwrap()
    }

    #[test]
    fn a_note_counts_for_its_own_core_alone() {
        let sums = Sums::default().with(100, 300).unwrap();
        let absent = [range((0x1000, 0x2000)), range((1 << 32, 5))];
        let other = note(b"CORE\0", 1, &[7; 33]).unwrap();
        let notes = with_absent(&other, sums, &absent).unwrap();
        assert!(notes.starts_with(&other));
        assert_eq!(absent_in(&notes, sums).unwrap(), absent);
        for other in [
            Sums::default().with(99, 300).unwrap(),
            Sums::default().with(100, 299).unwrap(),
            sums.with(0, 0).unwrap(),
        ] {
            assert_eq!(absent_in(&notes, other), None);
        }
        // A newer one takes its place.
        let newer = sums.with(1, 1).unwrap();
        let again = with_absent(&notes, newer, &[]).unwrap();
        assert_eq!(absent_in(&again, newer).unwrap(), []);
        assert_eq!(absent_in(&again, sums), None);
        assert_eq!(again.len(), notes.len() - 32);
        // Cut off, of a range beyond 64 bits, of another version.
        assert_eq!(absent_in(&notes[..notes.len() - 4], sums), None);
        let mut bad = notes.clone();
        let end = bad.len();
        bad[end - 16..].fill(0xff);
        assert_eq!(absent_in(&bad, sums), None);
        let mut bad = notes;
        bad[other.len() + 12 + 12] = 2;
        assert_eq!(absent_in(&bad, sums), None);
    }

    proptest! {
        #[test]
        fn any_notes_are_kept(
            text in proptest::collection::vec(any::<u8>(), 0..70),
            rest in proptest::collection::vec(any::<u8>(), 0..70),
            absent in proptest::collection::vec((0_u64..1 << 40, 1_u64..1 << 40), 0..5),
        ) {
            let sums = Sums::default().with(1, 2).unwrap();
            let absent: Vec<GpaRange> = absent.into_iter().map(range).collect();
            let notes = [note(b"QEMU\0", 0, &text).unwrap(), rest.clone()].concat();
            let with = with_absent(&notes, sums, &absent).unwrap();
            prop_assert!(with.starts_with(&notes));
            // Behind what is no note there may be no more.
            if rest.is_empty() {
                prop_assert_eq!(absent_in(&with, sums), Some(absent));
            }
        }
    }
}
