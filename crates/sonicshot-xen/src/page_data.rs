//! The records with pages.

use crate::cursor::Cursor;
use crate::{FrameType, Record, XenError};
use sonicshot::{Bytes, FileBytes, FileOffset, to_u64};

pub(crate) const PAGE: u64 = 4096;
/// The count, and a word that is reserved.
const HEAD: u64 = 8;
const ENTRY_LEN: usize = 8;
const ENTRY: u64 = to_u64(ENTRY_LEN);
const TYPE_SHIFT: u32 = 60;
/// Bits that must be zero lie between the number and the type.
const NUMBER_BITS: u32 = 52;
/// No x86 has more physical addresses.
pub(crate) const MAX_FRAME: u64 = 1 << (52 - 12);

/// A record of type `PAGE_DATA`: its length is what its entries say. They are read once, at one go,
/// for there is one of every page of the guest.
pub(crate) struct PageData {
    words: Vec<u64>,
    count: u32,
    /// The count and the reserved word, as they are.
    head: u64,
    /// The place of the body in the file.
    at: FileOffset,
}

/// One page of such a record.
#[derive(Clone, Copy)]
pub(crate) struct Entry {
    pub pfn: u64,
    pub kind: FrameType,
    /// The place of its entry in the file.
    pub at: FileOffset,
    /// The place of its bytes in the file, if it has any.
    pub data: Option<FileOffset>,
}

/// The offset of the data of so many pages in a record's body.
#[expect(
    clippy::arithmetic_side_effects,
    reason = "entries that 32 bits count end far below 2^64"
)]
pub(crate) fn table_of(count: u32) -> u64 {
    u64::from(count) * ENTRY + HEAD
}

impl PageData {
    pub(crate) fn parse(
        cursor: &Cursor<'_>,
        record: &Record,
        body: FileBytes<'_>,
    ) -> Result<Self, XenError> {
        let len = u64::from(record.len);
        let wrong = |value| cursor.malformed("invalid number of pages", record.body.start(), value);
        let head = body.le_at(0).ok_or_else(|| wrong(0))?;
        let count = body.le_at(0).ok_or_else(|| wrong(0))?;
        let table = table_of(count);
        if count == 0 || table > len {
            return Err(wrong(count.into()));
        }
        let entries = table.checked_sub(HEAD);
        let entries = entries.and_then(|len| body.part(HEAD, len)?.copied());
        let entries = entries.ok_or_else(|| cursor.cut_short(record.body.start(), table))?;
        let (words, _) = entries.as_chunks::<ENTRY_LEN>();
        let this = Self {
            words: words.iter().map(|word| u64::from_le_bytes(*word)).collect(),
            count,
            head,
            at: record.body.start(),
        };
        let mut end = Some(table);
        for entry in this.words() {
            let (at, word) = entry;
            let bits = word >> TYPE_SHIFT;
            let kind = FrameType::from_bits(bits)
                .ok_or_else(|| cursor.malformed("invalid type of a page", at, word))?;
            if word >> NUMBER_BITS != bits << UNUSED_BITS || number(word) >= MAX_FRAME {
                return Err(cursor.malformed("invalid number of a page", at, word));
            }
            if kind.has_data() {
                end = end.and_then(|end| end.checked_add(PAGE));
            }
        }
        if end != Some(len) {
            return Err(cursor.malformed(
                "a record of pages of another length",
                record.offset,
                len,
            ));
        }
        Ok(this)
    }

    /// The entries as they are, each with its place in the file.
    fn words(&self) -> impl Iterator<Item = (FileOffset, u64)> + '_ {
        (0..self.count)
            .zip(&self.words)
            .filter_map(|(index, word)| Some((self.at.checked_add(table_of(index))?, *word)))
    }

    pub(crate) fn entries(&self) -> impl Iterator<Item = Entry> + '_ {
        let mut next = self.at.checked_add(table_of(self.count));
        self.words().filter_map(move |(at, word)| {
            let kind = FrameType::from_bits(word >> TYPE_SHIFT)?;
            let data = if kind.has_data() { Some(next?) } else { None };
            if let Some(at) = data {
                next = at.checked_add(PAGE);
            }
            Some(Entry {
                pfn: number(word),
                kind,
                at,
                data,
            })
        })
    }

    /// The count and the reserved word, as they are.
    pub(crate) fn head(&self) -> u64 {
        self.head
    }

    /// The number of entries.
    pub(crate) fn count(&self) -> u32 {
        self.count
    }
}

impl Entry {
    /// The entry as the file has it.
    pub(crate) fn word(&self) -> u64 {
        self.pfn | self.kind.bits() << TYPE_SHIFT
    }

    /// The same page, to be given to the guest without content.
    pub(crate) fn without_data(self) -> Self {
        Self {
            kind: FrameType::XAlloc,
            data: None,
            ..self
        }
    }
}

/// Between the number and the type.
const UNUSED_BITS: u32 = TYPE_SHIFT - NUMBER_BITS;

fn number(word: u64) -> u64 {
    word & !(u64::MAX << NUMBER_BITS)
}
