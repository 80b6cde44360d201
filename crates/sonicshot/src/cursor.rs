//! Numbers and fields out of bytes that may be anything.

use crate::GuestBytes;
use crate::to_u64;
use core::fmt;

pub(crate) mod sealed {
    pub trait Sealed {}
    impl Sealed for &[u8] {}
    impl Sealed for crate::GuestBytes<'_> {}
}

/// A number that lies in a file or in memory as bytes: `u8` to `u128`, `i8` to `i128`.
pub trait Number: Sized + sealed::Sealed {
    /// The number's length in bytes.
    const LEN: usize;

    /// The number whose bytes stand at `offset`, the lowest first.
    fn le_at<B: Bytes>(bytes: B, offset: u64) -> Option<Self>;

    /// The number whose bytes stand at `offset`, the highest first.
    fn be_at<B: Bytes>(bytes: B, offset: u64) -> Option<Self>;
}

macro_rules! numbers {
    ($($ty:ty),*) => {$(
        impl sealed::Sealed for $ty {}
        impl Number for $ty {
            const LEN: usize = size_of::<Self>();

            fn le_at<B: Bytes>(bytes: B, offset: u64) -> Option<Self> {
                bytes.array_at(offset).map(Self::from_le_bytes)
            }

            fn be_at<B: Bytes>(bytes: B, offset: u64) -> Option<Self> {
                bytes.array_at(offset).map(Self::from_be_bytes)
            }
        }
    )*};
}

numbers!(u8, u16, u32, u64, u128, i8, i16, i32, i64, i128);

/// Bytes that may be anything, to be read with checks: a slice, or [`GuestBytes`].
///
/// Offsets count from the first of them; nothing wraps and nothing panics.
///
/// ```
/// use sonicshot::{Bytes, GuestBytes};
/// let data = [1, 0, 0, 2];
/// assert_eq!(data.as_slice().le_at::<u16>(0), Some(1));
/// assert_eq!(GuestBytes::from_slice(&data).be_at::<u16>(2), Some(2));
/// assert_eq!(data.as_slice().le_at::<u64>(u64::MAX), None);
/// ```
pub trait Bytes: Copy + sealed::Sealed {
    /// The number of bytes.
    fn byte_len(self) -> u64;

    /// The `len` bytes from `offset`, if they lie inside.
    fn part(self, offset: u64, len: u64) -> Option<Self>;

    /// A copy of the `N` bytes from `offset`, if they lie inside.
    fn array_at<const N: usize>(self, offset: u64) -> Option<[u8; N]>;

    /// The little-endian number at `offset`, if it lies inside.
    fn le_at<T: Number>(self, offset: u64) -> Option<T> {
        T::le_at(self, offset)
    }

    /// The big-endian number at `offset`, if it lies inside.
    fn be_at<T: Number>(self, offset: u64) -> Option<T> {
        T::be_at(self, offset)
    }

    /// A copy of all of them, of which the caller has bounded how many; `None` if they cannot be
    /// read.
    fn copied(self) -> Option<Vec<u8>>;
}

impl Bytes for &[u8] {
    fn byte_len(self) -> u64 {
        to_u64(self.len())
    }

    fn part(self, offset: u64, len: u64) -> Option<Self> {
        let start = usize::try_from(offset).ok()?;
        let end = start.checked_add(usize::try_from(len).ok()?)?;
        self.get(start..end)
    }

    fn array_at<const N: usize>(self, offset: u64) -> Option<[u8; N]> {
        self.part(offset, to_u64(N))?.try_into().ok()
    }

    fn copied(self) -> Option<Vec<u8>> {
        Some(self.to_vec())
    }
}

impl Bytes for GuestBytes<'_> {
    fn byte_len(self) -> u64 {
        to_u64(self.len())
    }

    fn part(self, offset: u64, len: u64) -> Option<Self> {
        self.get(usize::try_from(offset).ok()?, usize::try_from(len).ok()?)
    }

    fn array_at<const N: usize>(self, offset: u64) -> Option<[u8; N]> {
        let mut out = [0; N];
        let bytes = self.part(offset, to_u64(N))?;
        bytes.copy_to(&mut out).then_some(out)
    }

    fn copied(self) -> Option<Vec<u8>> {
        let mut out = vec![0; self.len()];
        self.copy_to(&mut out).then_some(out)
    }
}

/// A field that reaches beyond the end of its bytes.
///
/// A crate for a format turns it into its own error, which names the file and the field.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("truncated at {offset:#x}: {wanted} bytes expected, {left} left")]
pub struct CutShort {
    /// The start of the field, counted as the [`Cursor`]'s [position](Cursor::position).
    pub offset: u64,
    /// The number of bytes asked for.
    pub wanted: u64,
    /// The number of bytes that there are from there.
    pub left: u64,
}

/// A reader of one field after the other, of a slice or of [`GuestBytes`].
///
/// A field that is cut short is an error with its place, and the cursor stays before it. A crate
/// wraps it with what its errors need: the path, the part of the file.
///
/// ```
/// use sonicshot::Cursor;
/// let mut cursor = Cursor::new([0, 0, 0, 3, 7, 1].as_slice());
/// let version: u32 = cursor.be()?;
/// let length: u16 = cursor.le()?;
/// assert_eq!((version, length, cursor.position()), (3, 0x0107, 6));
/// assert_eq!(cursor.le::<u64>().unwrap_err().left, 0);
/// # Ok::<(), sonicshot::CutShort>(())
/// ```
#[derive(Clone, Copy)]
pub struct Cursor<B> {
    bytes: B,
    at: u64,
}

impl<B: Bytes> Cursor<B> {
    /// Reads `bytes` from the first one.
    #[must_use]
    pub const fn new(bytes: B) -> Self {
        Self { bytes, at: 0 }
    }

    /// Reads `bytes` from `offset`, which may be behind all of them.
    #[must_use]
    pub const fn at(bytes: B, offset: u64) -> Self {
        Self { bytes, at: offset }
    }

    /// All bytes, read or not.
    #[must_use]
    pub const fn bytes(&self) -> B {
        self.bytes
    }

    /// The start of the next field, in bytes from the first one.
    #[must_use]
    pub const fn position(&self) -> u64 {
        self.at
    }

    /// Goes to `offset`, which may be behind all bytes.
    pub const fn seek(&mut self, offset: u64) {
        self.at = offset;
    }

    /// The number of bytes from here on.
    #[must_use]
    pub fn left(&self) -> u64 {
        // A place behind the end has none left.
        self.bytes.byte_len().saturating_sub(self.at)
    }

    /// Whether all bytes were read.
    #[must_use]
    pub fn is_at_end(&self) -> bool {
        self.left() == 0
    }

    /// The next `len` bytes.
    ///
    /// # Errors
    /// [`CutShort`] if there are not so many.
    pub fn take(&mut self, len: u64) -> Result<B, CutShort> {
        let cut = self.cut(len);
        let bytes = self.bytes.part(self.at, len).ok_or(cut)?;
        self.at = self.at.checked_add(len).ok_or(cut)?;
        Ok(bytes)
    }

    /// Passes over `len` bytes that are there.
    ///
    /// # Errors
    /// [`CutShort`] if there are not so many.
    pub fn skip(&mut self, len: u64) -> Result<(), CutShort> {
        self.take(len).map(drop)
    }

    /// The next `N` bytes, copied.
    ///
    /// # Errors
    /// [`CutShort`] if there are not so many.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], CutShort> {
        let len = to_u64(N);
        let array = self.bytes.array_at(self.at).ok_or(self.cut(len))?;
        self.at = self.at.checked_add(len).ok_or(self.cut(len))?;
        Ok(array)
    }

    /// The next number, little-endian.
    ///
    /// # Errors
    /// [`CutShort`] if it is not all there.
    pub fn le<T: Number>(&mut self) -> Result<T, CutShort> {
        self.number(T::le_at(self.bytes, self.at))
    }

    /// The next number, big-endian.
    ///
    /// # Errors
    /// [`CutShort`] if it is not all there.
    pub fn be<T: Number>(&mut self) -> Result<T, CutShort> {
        self.number(T::be_at(self.bytes, self.at))
    }

    /// The next byte, which is not passed over.
    #[must_use]
    pub fn peek(&self) -> Option<u8> {
        self.bytes.le_at(self.at)
    }

    /// Whether `expected` comes next; nothing is passed over.
    #[must_use]
    pub fn is_at(&self, expected: &[u8]) -> bool {
        let there = self.bytes.part(self.at, to_u64(expected.len()));
        there.is_some_and(|there| {
            (0..)
                .zip(expected)
                .all(|(offset, byte)| there.le_at(offset) == Some(*byte))
        })
    }

    fn number<T: Number>(&mut self, read: Option<T>) -> Result<T, CutShort> {
        let len = to_u64(T::LEN);
        let number = read.ok_or(self.cut(len))?;
        self.at = self.at.checked_add(len).ok_or(self.cut(len))?;
        Ok(number)
    }

    fn cut(&self, wanted: u64) -> CutShort {
        CutShort {
            offset: self.at,
            wanted,
            left: self.left(),
        }
    }
}

impl<B: Bytes> fmt::Debug for Cursor<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cursor({:#x} of {:#x})", self.at, self.bytes.byte_len())
    }
}

#[cfg(test)]
mod tests {
    use super::{Bytes, Cursor, CutShort};
    use crate::GuestBytes;
    use proptest::prelude::*;

    /// One field, by its kind, of `cursor`.
    fn field<B: Bytes>(cursor: &mut Cursor<B>, kind: u8) -> Result<Vec<u8>, CutShort> {
        match kind {
            0 => cursor.le::<u8>().map(|n| n.to_le_bytes().into()),
            1 => cursor.le::<u16>().map(|n| n.to_le_bytes().into()),
            2 => cursor.be::<u32>().map(|n| n.to_be_bytes().into()),
            3 => cursor.be::<i64>().map(|n| n.to_be_bytes().into()),
            4 => cursor.le::<u128>().map(|n| n.to_le_bytes().into()),
            5 => cursor.array::<3>().map(Vec::from),
            other => cursor
                .take(other.into())
                .map(|bytes| bytes.copied().unwrap()),
        }
    }

    fn len(kind: u8) -> usize {
        [1, 2, 4, 8, 16, 3]
            .get(usize::from(kind))
            .copied()
            .unwrap_or(kind.into())
    }

    #[test]
    fn a_place_beyond_everything_is_cut_short() {
        let mut cursor = Cursor::at([1, 2].as_slice(), u64::MAX);
        let cut = CutShort {
            offset: u64::MAX,
            wanted: 8,
            left: 0,
        };
        assert_eq!(cursor.le::<u64>(), Err(cut));
        assert_eq!(cursor.take(u64::MAX).unwrap_err().wanted, u64::MAX);
        assert_eq!((cursor.peek(), cursor.is_at(&[1])), (None, false));
        cursor.seek(1);
        assert_eq!(
            (cursor.peek(), cursor.is_at(&[2]), cursor.is_at(&[2, 3])),
            (Some(2), true, false)
        );
    }

    proptest! {
        #[test]
        fn fields_are_the_bytes_in_their_order(
            data in proptest::collection::vec(any::<u8>(), 0..80),
            kinds in proptest::collection::vec(0_u8..20, 0..20),
        ) {
            let mut slice = Cursor::new(data.as_slice());
            let mut guest = Cursor::new(GuestBytes::from_slice(&data));
            let mut at = 0;
            for kind in kinds {
                let expected = data.get(at..at + len(kind)).map(Vec::from);
                let found = field(&mut slice, kind);
                prop_assert_eq!(&found, &field(&mut guest, kind));
                match found {
                    Err(cut) => prop_assert_eq!(
                        (cut.offset, cut.wanted, cut.left),
                        (at as u64, len(kind) as u64, (data.len() - at) as u64)
                    ),
                    Ok(_) => at += len(kind),
                }
                prop_assert_eq!(found.ok(), expected);
                prop_assert_eq!((slice.position(), guest.left()), (at as u64, (data.len() - at) as u64));
            }
        }
    }
}
