//! Any guest memory: a raw file, a VMM's snapshot, whatever the other crates can read.

use super::{Check, Content, PageSource, Piece, Run, checked, length};
use crate::error::ServeError;
use sonicshot::{Gpa, GpaRange, GuestMemory, RamLayout};
use std::fmt;
use std::sync::{Arc, OnceLock};

/// Bytes that are had at once.
const WINDOW: u64 = 256 << 10;
/// The unit in which kinds of content may change: the smallest page that a host has.
const PAGE: u64 = 4096;

/// Guest memory of any kind. What it knows to be zero is never read.
pub struct MemorySource<M> {
    memory: M,
    check: Option<Check<M>>,
    identity: Option<String>,
    by_need: OnceLock<Arc<[GpaRange]>>,
}

impl<M: GuestMemory> MemorySource<M> {
    /// Serves the pages of `memory`.
    pub const fn new(memory: M) -> Self {
        Self {
            memory,
            check: None,
            identity: None,
            by_need: OnceLock::new(),
        }
    }

    /// Says what tells this memory from another.
    #[must_use]
    pub fn identified_by(mut self, identity: Option<String>) -> Self {
        self.identity = identity;
        self
    }

    /// Has `check` asked behind each read: if it fails, what was read is not served.
    #[must_use]
    pub fn checked_by(
        mut self,
        check: impl Fn(&M) -> Result<(), ServeError> + Send + Sync + 'static,
    ) -> Self {
        self.check = Some(Box::new(check));
        self
    }
}

fn floor(at: Gpa) -> Gpa {
    Gpa::new(at.raw() & !(PAGE - 1))
}

fn ceil(at: Gpa) -> Option<Gpa> {
    Some(Gpa::new(at.raw().checked_next_multiple_of(PAGE)?))
}

impl<M: GuestMemory> PageSource for MemorySource<M> {
    fn layout(&self) -> &RamLayout {
        self.memory.layout()
    }

    fn identity(&self) -> Option<String> {
        self.identity.clone()
    }

    fn run_at(&self, at: Gpa) -> Result<Run, ServeError> {
        let missing = || ServeError::NotInSnapshot { at };
        let region = *self.layout().region_of(at).ok_or_else(missing)?;
        // A page that has any data is data.
        let page = floor(at).max(region.start());
        let zero_until = |end| Run {
            range: GpaRange::new(page, end),
            content: Content::Fill(0),
        };
        let Some(data) = self.memory.next_data(page) else {
            return Ok(zero_until(region.end()));
        };
        let first = floor(data.start()).max(region.start());
        if first > page {
            return Ok(zero_until(first));
        }
        let end = ceil(data.end()).map_or(region.end(), |end| end.min(region.end()));
        let window = page.checked_add(WINDOW).map(floor).ok_or_else(missing)?;
        Ok(Run {
            range: GpaRange::new(page, end.min(window)),
            content: Content::Bytes,
        })
    }

    fn read<'b>(&self, range: GpaRange, buffer: &'b mut Vec<u8>) -> Result<Piece<'b>, ServeError> {
        buffer.resize(length(range)?, 0);
        let read = self.memory.read(range.start(), buffer);
        checked(&self.memory, self.check.as_ref(), read)?;
        Ok(Piece::Own(buffer))
    }

    fn by_need(&self) -> Arc<[GpaRange]> {
        Arc::clone(self.by_need.get_or_init(|| self.data().into()))
    }
}

impl<M: GuestMemory> MemorySource<M> {
    /// All that may not be zero, by address.
    fn data(&self) -> Vec<GpaRange> {
        let mut out: Vec<GpaRange> = Vec::new();
        for region in self.layout().regions() {
            let mut at = region.start();
            while at < region.end()
                && let Some(data) = self.memory.next_data(at)
                // What goes back would never end.
                && data.end() > at
            {
                let first = floor(data.start()).max(region.start());
                let end = ceil(data.end()).map_or(region.end(), |end| end.min(region.end()));
                match out.last_mut() {
                    Some(last) if last.end() >= first && last.start() >= region.start() => {
                        *last = GpaRange::new(last.start(), end);
                    }
                    _ => out.push(GpaRange::new(first, end)),
                }
                at = end;
            }
        }
        out
    }
}

impl<M> fmt::Debug for MemorySource<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemorySource").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sonicshot::MemoryError;

    /// RAM of 64 pages from 1 MiB, zero but for ranges that need not begin at a page.
    struct Sparse(RamLayout, Vec<GpaRange>);

    impl GuestMemory for Sparse {
        fn layout(&self) -> &RamLayout {
            &self.0
        }

        fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
            for (number, byte) in (0..).zip(buf) {
                let at = at.checked_add(number).unwrap();
                *byte = u8::from(self.1.iter().any(|data| data.contains(at)));
            }
            Ok(())
        }

        fn next_data(&self, at: Gpa) -> Option<GpaRange> {
            let next = self.1.iter().find(|data| data.end() > at)?;
            Some(GpaRange::new(next.start().max(at), next.end()))
        }
    }

    const BASE: u64 = 1 << 20;

    fn sparse(data: &[(u64, u64)]) -> MemorySource<Sparse> {
        let range = |&(start, end): &(u64, u64)| {
            GpaRange::new(Gpa::new(BASE + start), Gpa::new(BASE + end))
        };
        let layout = RamLayout::new(vec![range(&(0, 64 * PAGE))]).unwrap();
        MemorySource::new(Sparse(layout, data.iter().map(range).collect()))
    }

    #[test]
    fn a_page_with_any_data_is_read_and_others_are_not() {
        let source = sparse(&[(5, 6), (3 * PAGE - 1, 3 * PAGE + 1), (50 * PAGE, 64 * PAGE)]);
        let mut buffer = Vec::new();
        for page in 0..64 {
            let at = Gpa::new(BASE + page * PAGE);
            let run = source.run_at(at).unwrap();
            assert!(run.range.contains(at));
            let has_data = matches!(page, 0 | 2 | 3 | 50..);
            assert_eq!(run.content == Content::Bytes, has_data, "page {page}");
            if has_data {
                let piece = source.read(run.range, &mut buffer).unwrap();
                assert!(piece.bytes().contains(&1));
            }
        }
        assert!(source.run_at(Gpa::new(BASE + 64 * PAGE)).is_err());
        let all = source.by_need();
        let pages = |start: u64, end: u64| {
            GpaRange::new(Gpa::new(BASE + start * PAGE), Gpa::new(BASE + end * PAGE))
        };
        assert_eq!(all[..], [pages(0, 1), pages(2, 4), pages(50, 64)]);
    }
}
