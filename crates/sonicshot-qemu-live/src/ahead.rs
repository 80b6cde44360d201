//! Pages that are read before their turn: several threads read and decompress, one sends.

use crate::pages::{self, Found};
use crate::stream::PAGE;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fd::{AsFd, OwnedFd};
use sonicshot::GpaRange;
use sonicshot::work::{Pending, Pool};
use sonicshot_serve::{Content, PageSource, Piece, ServeError};
use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// The most chunks that are read before their turn, those that are being read included.
pub(crate) const MAX_AHEAD: usize = 32;
/// The amount at which no further range of a chunk is added to what is read at once, in bytes.
const AT_ONCE: u64 = 1 << 20;

/// Bytes that were read.
#[derive(Debug)]
pub(crate) enum Held {
    /// A part of a chunk that others may have too.
    Shared(Arc<[u8]>, Range<usize>),
    Own(Vec<u8>),
    /// A page, which all of the range is like.
    Repeated(Vec<u8>),
}

impl Held {
    /// The page at `inside` of the range.
    pub(crate) fn page(&self, inside: usize) -> Option<&[u8]> {
        let bytes = match self {
            Self::Shared(chunk, part) => chunk.get(part.clone())?,
            Self::Own(bytes) => bytes,
            Self::Repeated(page) => return Some(page),
        };
        bytes.get(inside..inside.checked_add(PAGE)?)
    }
}

/// The ranges of one chunk, and what they hold.
pub(crate) type Part = Vec<(GpaRange, Held)>;

/// Reads a range.
pub(crate) fn hold(source: &dyn PageSource, found: &Found) -> Result<Held, ServeError> {
    let (range, content) = found;
    match content {
        Content::Bytes => {
            let mut buffer = Vec::new();
            Ok(match source.read(*range, &mut buffer)? {
                Piece::Shared { block, part } => Held::Shared(block, part),
                piece => Held::Own(piece.bytes().to_vec()),
            })
        }
        Content::Fill(word) => {
            let page = word.to_le_bytes().into_iter().cycle().take(PAGE);
            Ok(Held::Repeated(page.collect()))
        }
        // Of a kind that is not known here nothing is sent.
        _ => Err(ServeError::NotInSnapshot { at: range.start() }),
    }
}

/// All that is not zero, in the order of the addresses, cut so that no two threads want the same
/// chunk.
pub(crate) fn parts(
    source: &dyn PageSource,
) -> impl Iterator<Item = Result<Vec<Found>, ServeError>> + '_ {
    let regions = source.layout().regions().iter();
    let runs = regions.flat_map(|region| pages::runs(source, *region));
    let runs = runs.filter(|found| !matches!(found, Ok((_, Content::Fill(0)))));
    let mut runs = runs.peekable();
    let chunk_of = |found: &Found| match found.1 {
        Content::Bytes => source.block_at(found.0.start()),
        _ => None,
    };
    std::iter::from_fn(move || {
        let first = match runs.next()? {
            Ok(first) => first,
            Err(error) => return Some(Err(error)),
        };
        let mut room = AT_ONCE.checked_sub(first.0.len());
        let chunk = chunk_of(&first);
        let same = |next: &Result<Found, ServeError>| {
            chunk.is_some() && matches!(next, Ok(found) if chunk_of(found) == chunk)
        };
        let mut part = vec![first];
        while let Some(left) = room
            && let Some(Ok(next)) = runs.next_if(same)
        {
            room = left.checked_sub(next.0.len());
            part.push(next);
        }
        Some(Ok(part))
    })
}

/// A bell that wakes who waits for what is said to it as well.
#[derive(Debug)]
pub(crate) struct Bell(OwnedFd);

impl Bell {
    pub(crate) fn new() -> io::Result<Self> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self(fd))
    }

    fn ring(&self) {
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }

    /// Waits until it rings, or there is something to read in `other`.
    pub(crate) fn wait(&self, other: Option<&impl AsFd>) {
        let mut fds = vec![PollFd::new(&self.0, PollFlags::IN)];
        fds.extend(other.map(|other| PollFd::new(other, PollFlags::IN)));
        // Whatever comes of it, who waits looks again.
        let _ = poll(&mut fds, None);
        let _ = rustix::io::read(&self.0, &mut [0_u8; 8]);
    }
}

/// Waits until there is something to read, for so long at most.
pub(crate) fn wait_for(fd: &impl AsFd, limit: Duration) {
    let mut fds = [PollFd::new(fd, PollFlags::IN)];
    let _ = poll(&mut fds, Timespec::try_from(limit).ok().as_ref());
}

/// The next part.
pub(crate) enum Next {
    Ready(Part),
    /// It is still being read: the bell rings.
    Waiting,
    End,
}

type Reading = Pending<Result<Part, ServeError>>;

/// What is read before its turn, in order.
pub(crate) struct Ahead<'p, 'env> {
    pool: &'p Pool<'env, ()>,
    source: &'env dyn PageSource,
    bell: &'env Bell,
    parts: Box<dyn Iterator<Item = Result<Vec<Found>, ServeError>> + 'env>,
    reading: VecDeque<Reading>,
    /// The most that is read ahead.
    depth: usize,
}

impl<'p, 'env> Ahead<'p, 'env> {
    pub(crate) fn new(
        pool: &'p Pool<'env, ()>,
        source: &'env dyn PageSource,
        bell: &'env Bell,
    ) -> Self {
        Self {
            pool,
            source,
            bell,
            parts: Box::new(parts(source)),
            reading: VecDeque::new(),
            // Who sends reads as well, if nobody else does: one at a time.
            depth: if pool.threads() == 0 { 1 } else { MAX_AHEAD },
        }
    }

    /// Has as much read as may be.
    pub(crate) fn fill(&mut self) {
        while self.reading.len() < self.depth
            && let Some(part) = self.parts.next()
        {
            let (source, bell) = (self.source, self.bell);
            let read = move |(): &mut ()| {
                let part = part?.into_iter();
                let held = part.map(|found| Ok((found.0, hold(source, &found)?)));
                held.collect()
            };
            let reading = self.pool.submit_told(read, move || bell.ring());
            self.reading.push_back(reading);
        }
    }

    pub(crate) fn next(&mut self) -> Result<Next, ServeError> {
        self.fill();
        match self.reading.pop_front().map(Pending::try_wait) {
            None => Ok(Next::End),
            Some(Ok(part)) => part.map(Next::Ready),
            Some(Err(reading)) => {
                self.reading.push_front(reading);
                Ok(Next::Waiting)
            }
        }
    }
}
