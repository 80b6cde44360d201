//! The image that `xl` writes, taken into memory on its way to the file, so that the domain need not
//! wait for who packs it.

use sonicshot::to_u64;
use std::collections::VecDeque;
use std::io::{self, Read};
use std::mem;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// So much is taken at a time.
pub(crate) const PIECE: usize = 1 << 20;

/// The time when the packing begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Begin {
    /// With the first bytes.
    AtOnce,
    /// With the last, or when no more is taken: until then the processor is the copier's.
    Behind,
}

/// Bytes that came and are not packed yet.
#[derive(Debug)]
pub(crate) struct Copied {
    /// No more than this, and one piece, is held, in bytes.
    limit: u64,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    pieces: VecDeque<Vec<u8>>,
    bytes: u64,
    has_begun: bool,
    /// Nothing comes any more: the end, or what went wrong.
    end: Option<io::Result<()>>,
    /// Nobody takes it any more.
    is_given_up: bool,
}

impl Copied {
    pub(crate) fn new(limit: u64, begin: Begin) -> Self {
        Self {
            limit,
            state: Mutex::new(State {
                pieces: VecDeque::new(),
                bytes: 0,
                has_begun: begin == Begin::AtOnce,
                end: None,
                is_given_up: false,
            }),
            changed: Condvar::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Each change is whole before the lock is given back.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let woken = self.changed.wait(state);
        woken.unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes all that comes from `from`. What nobody packs is taken all the same, for a broken pipe
    /// would end xl before it can resume the domain.
    pub(crate) fn take(&self, from: &mut impl Read) {
        let end = loop {
            let mut piece = vec![0; PIECE];
            let len = match fill(from, &mut piece) {
                Ok(0) => break Ok(()),
                Ok(len) => len,
                Err(error) => break Err(error),
            };
            piece.truncate(len);
            if let Err(error) = self.put(piece) {
                break Err(error);
            }
        };
        let is_broken = end.is_err();
        self.state().end = Some(end);
        self.changed.notify_all();
        if is_broken {
            let _ = io::copy(from, &mut io::sink());
        }
    }

    fn put(&self, piece: Vec<u8>) -> io::Result<()> {
        let mut state = self.state();
        while state.bytes >= self.limit && !state.pieces.is_empty() && !state.is_given_up {
            state.has_begun = true;
            self.changed.notify_all();
            state = self.wait(state);
        }
        if state.is_given_up {
            return Ok(());
        }
        let bytes = state.bytes.checked_add(to_u64(piece.len()));
        state.bytes = bytes.ok_or(io::ErrorKind::FileTooLarge)?;
        state.pieces.push_back(piece);
        self.changed.notify_all();
        Ok(())
    }

    /// All of it, to be read by one. When that is dropped, nothing more is held.
    pub(crate) fn given(&self) -> Given<'_> {
        Given {
            from: self,
            piece: Vec::new(),
            at: 0,
        }
    }

    /// The next piece; `None` at the end.
    fn next(&self) -> io::Result<Option<Vec<u8>>> {
        let mut state = self.state();
        loop {
            if state.has_begun
                && let Some(piece) = state.pieces.pop_front()
            {
                let left = state.bytes.checked_sub(to_u64(piece.len()));
                state.bytes = left.ok_or(io::ErrorKind::InvalidData)?;
                self.changed.notify_all();
                return Ok(Some(piece));
            }
            state.has_begun |= state.end.is_some();
            if state.pieces.is_empty()
                && let Some(end) = &mut state.end
            {
                return mem::replace(end, Ok(())).map(|()| None);
            }
            if !state.has_begun || state.pieces.is_empty() {
                state = self.wait(state);
            }
        }
    }
}

/// Reads until `piece` is full, or to the end.
fn fill(from: &mut impl Read, piece: &mut [u8]) -> io::Result<usize> {
    let mut len = 0;
    while let Some(rest) = piece.get_mut(len..).filter(|rest| !rest.is_empty()) {
        match from.read(rest) {
            Ok(0) => break,
            Ok(more) => len = len.checked_add(more).ok_or(io::ErrorKind::InvalidData)?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(len)
}

/// The bytes for who packs them.
#[derive(Debug)]
pub(crate) struct Given<'a> {
    from: &'a Copied,
    piece: Vec<u8>,
    at: usize,
}

impl Read for Given<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.at == self.piece.len() {
            match self.from.next()? {
                Some(piece) => (self.piece, self.at) = (piece, 0),
                None => return Ok(0),
            }
        }
        let mut rest = self.piece.get(self.at..).unwrap_or(&[]);
        let len = rest.read(out)?;
        self.at = self.at.checked_add(len).ok_or(io::ErrorKind::InvalidData)?;
        Ok(len)
    }
}

impl Drop for Given<'_> {
    fn drop(&mut self) {
        let mut state = self.from.state();
        state.is_given_up = true;
        state.pieces.clear();
        self.from.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::{Begin, Copied, PIECE};
    use std::io::{self, Read};
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::thread;

    fn content(len: usize) -> Vec<u8> {
        (0..=250).cycle().take(len).collect()
    }

    #[test]
    fn all_of_it_comes_in_order_whatever_is_held() {
        let all = content(3 * PIECE + 77);
        for limit in [0, 1, PIECE as u64, 2 * PIECE as u64, u64::MAX] {
            for begin in [Begin::AtOnce, Begin::Behind] {
                let copied = Copied::new(limit, begin);
                let got = thread::scope(|scope| {
                    let giving = scope.spawn(|| {
                        let mut got = Vec::new();
                        copied.given().read_to_end(&mut got).map(|_| got)
                    });
                    copied.take(&mut all.as_slice());
                    giving.join().unwrap().unwrap()
                });
                assert!(got == all, "{limit} {begin:?}");
            }
        }
    }

    /// Counts what was taken of it.
    struct Counted<'a>(&'a [u8], &'a AtomicU64);

    impl Read for Counted<'_> {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            let len = self.0.read(out)?;
            self.1.fetch_add(len as u64, Ordering::SeqCst);
            Ok(len)
        }
    }

    #[test]
    fn what_is_behind_waits_for_the_end_or_the_limit() {
        let all = content(8 * PIECE);
        for (limit, at_first) in [(u64::MAX, 8), (2 * PIECE as u64, 3)] {
            let (copied, taken) = (Copied::new(limit, Begin::Behind), AtomicU64::new(0));
            thread::scope(|scope| {
                let giving = scope.spawn(|| {
                    let mut given = copied.given();
                    given.read_exact(&mut [0; 1])?;
                    let then = taken.load(Ordering::SeqCst);
                    let held = io::copy(&mut given, &mut io::sink())?;
                    Ok::<_, io::Error>((then, held))
                });
                copied.take(&mut Counted(&all, &taken));
                let (then, held) = giving.join().unwrap().unwrap();
                assert_eq!(held + 1, all.len() as u64);
                assert!(then >= at_first * PIECE as u64, "{then}");
                // No more than the limit, the piece in hand, and the one that was given.
                if limit != u64::MAX {
                    assert!(then <= limit + 2 * PIECE as u64, "{then}");
                }
            });
        }
    }

    #[test]
    fn what_nobody_packs_is_taken_to_its_end() {
        let all = content(5 * PIECE);
        let (copied, taken) = (Copied::new(PIECE as u64, Begin::AtOnce), AtomicU64::new(0));
        thread::scope(|scope| {
            let giving = scope.spawn(|| copied.given().read_exact(&mut [0; 10]));
            copied.take(&mut Counted(&all, &taken));
            giving.join().unwrap().unwrap();
        });
        assert_eq!(taken.load(Ordering::SeqCst), all.len() as u64);
    }

    /// Fails once, and then has more.
    struct Broken(bool);

    impl Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            if std::mem::replace(&mut self.0, true) {
                return Ok(0);
            }
            Err(io::ErrorKind::TimedOut.into())
        }
    }

    #[test]
    fn what_cannot_be_taken_is_no_end() {
        let copied = Copied::new(u64::MAX, Begin::Behind);
        copied.take(&mut Broken(false));
        let end = io::copy(&mut copied.given(), &mut io::sink());
        assert_eq!(end.unwrap_err().kind(), io::ErrorKind::TimedOut);
    }
}
