//! What a guest needs first.

use crate::{Cursor, Pfn, PfnRange};

/// Frames that a guest needs soon after it is restored: what it touched the last time.
///
/// A VMM may keep it as a blob of the checkpoint, or beside it.
///
/// ```
/// use sonicshot::checkpoint::WorkingSet;
/// use sonicshot::Pfn;
/// let set: WorkingSet = [Pfn::new(7), Pfn::new(5), Pfn::new(6)].into_iter().collect();
/// assert_eq!(set.frames(), 3);
/// assert_eq!(WorkingSet::from_bytes(&set.to_bytes()), Some(set));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WorkingSet(Vec<PfnRange>);

impl WorkingSet {
    /// The frames: sorted, disjoint.
    #[must_use]
    pub fn ranges(&self) -> &[PfnRange] {
        &self.0
    }

    /// How many frames there are.
    #[must_use]
    pub fn frames(&self) -> u64 {
        self.0
            .iter()
            .fold(0, |sum, range| sum.saturating_add(range.len()))
    }

    /// The set as bytes: first frame and number of frames of each range, little-endian.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let words = self
            .0
            .iter()
            .flat_map(|range| [range.start().raw(), range.len()]);
        words.flat_map(u64::to_le_bytes).collect()
    }

    /// What [`to_bytes`](Self::to_bytes) made; `None` if it is something else.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        if !bytes.len().is_multiple_of(16) {
            return None;
        }
        let mut out: Vec<PfnRange> = Vec::new();
        let mut words = Cursor::new(bytes);
        while !words.is_at_end() {
            let start = Pfn::new(words.le().ok()?);
            let range = PfnRange::with_len(start, words.le().ok()?)?;
            if range.is_empty() || out.last().is_some_and(|last| last.end() >= range.start()) {
                return None;
            }
            out.push(range);
        }
        Some(Self(out))
    }
}

impl FromIterator<Pfn> for WorkingSet {
    fn from_iter<I: IntoIterator<Item = Pfn>>(frames: I) -> Self {
        let mut frames: Vec<Pfn> = frames.into_iter().collect();
        frames.sort_unstable();
        let mut out: Vec<PfnRange> = Vec::new();
        for pfn in frames {
            let Some(one) = PfnRange::with_len(pfn, 1) else {
                continue;
            };
            match out.last_mut() {
                Some(last) if pfn < last.end() => {}
                Some(last) if pfn == last.end() => *last = PfnRange::new(last.start(), one.end()),
                _ => out.push(one),
            }
        }
        Self(out)
    }
}
