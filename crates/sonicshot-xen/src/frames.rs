//! The guest's frames, of all records with pages together.

use crate::cursor::Cursor;
use crate::page_data::{Entry, PageData};
use crate::{FrameType, XenError};
use core::fmt;
use sonicshot::{FileOffset, Pfn};

/// A frame that the guest has after a restore.
///
/// There is one for each page of the guest, so it is kept small.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// The number, and below it the flags.
    word: u64,
    /// The place of the content; 0, the place of the file's magic, for none.
    data: u64,
}

impl Frame {
    const FLAGS: u32 = 2;
    /// In no record was it anything but an ordinary page.
    const ORDINARY: u64 = 1;
    /// In some record the guest is given it.
    const POPULATED: u64 = 2;

    fn new(entry: &Entry) -> Self {
        let ordinary = match entry.kind {
            FrameType::NoTab | FrameType::XAlloc => Self::ORDINARY,
            _ => 0,
        };
        let populated = if entry.kind.is_populated() {
            Self::POPULATED
        } else {
            0
        };
        Self {
            word: entry.pfn << Self::FLAGS | ordinary | populated,
            data: entry.data.map_or(0, FileOffset::raw),
        }
    }

    fn number(self) -> u64 {
        self.word >> Self::FLAGS
    }

    /// Takes in what a later record says of the same frame.
    fn then(&mut self, later: Self) {
        self.word &= later.word | !Self::ORDINARY;
        self.word |= later.word & Self::POPULATED;
        // Without data, a restore leaves there what came before.
        if later.data != 0 {
            self.data = later.data;
        }
    }

    /// Its number.
    #[must_use]
    pub fn pfn(&self) -> Pfn {
        Pfn::new(self.number())
    }

    /// The place in the file of the content that counts, the last that comes; `None` if none comes,
    /// and the content that the guest finds is up to Xen.
    #[must_use]
    pub fn data(&self) -> Option<FileOffset> {
        (self.data != 0).then_some(FileOffset::new(self.data))
    }

    /// Whether it may be dropped: in no pass of the save was it anything but an ordinary page.
    #[must_use]
    pub fn may_be_dropped(&self) -> bool {
        self.word & Self::ORDINARY != 0
    }
}

impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Frame")
            .field("pfn", &self.pfn())
            .field("data", &self.data())
            .field("may_be_dropped", &self.may_be_dropped())
            .finish()
    }
}

/// Gathers the frames, each as often as it comes.
#[derive(Debug, Default)]
pub(crate) struct Frames {
    found: Vec<Frame>,
    /// The last frame that a PV guest has.
    last: Option<u64>,
}

impl Frames {
    pub(crate) fn set_last(&mut self, last: u64) {
        self.last = Some(last);
    }

    pub(crate) fn add(&mut self, pages: &PageData, cursor: &Cursor<'_>) -> Result<(), XenError> {
        for entry in pages.entries() {
            if self.last.is_some_and(|last| entry.pfn > last) {
                return Err(cursor.malformed(
                    "a page beyond the guest's last",
                    entry.at,
                    entry.pfn,
                ));
            }
            self.found.push(Frame::new(&entry));
        }
        Ok(())
    }

    /// Each frame once, lowest first, and only those that the guest is given.
    pub(crate) fn settle(self) -> Vec<Frame> {
        let mut frames = self.found;
        // Stable: the copies of a page stay in the order of the file.
        frames.sort_by_key(|frame| frame.number());
        frames.dedup_by(|later, frame| {
            let same = later.number() == frame.number();
            if same {
                frame.then(*later);
            }
            same
        });
        frames.retain(|frame| frame.word & Frame::POPULATED != 0);
        frames
    }
}
