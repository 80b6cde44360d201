//! Borrowed guest bytes that somebody else may still be writing.

use core::fmt;
use core::marker::PhantomData;
use core::ptr::NonNull;

/// A borrowed range of guest memory: pointer and length, never a `&[u8]`.
///
/// A VMM's guest RAM, or a shared file mapping, can change under the reader. A Rust
/// reference to such bytes would be undefined behaviour, so this type hands out copies of
/// small values (read as volatile), a copy of a whole range, or the bare pointer for
/// `writev`. What is read is only as consistent as the owner makes it: pause the guest.
///
/// ```
/// use sonicshot::GuestBytes;
/// let page = [7_u8; 16];
/// let bytes = GuestBytes::from_slice(&page);
/// assert_eq!(bytes.u32_at(4), Some(0x0707_0707));
/// assert_eq!(bytes.u64_at(12), None); // would leave the range
/// ```
#[derive(Clone, Copy)]
pub struct GuestBytes<'a> {
    start: NonNull<u8>,
    len: usize,
    owner: PhantomData<&'a [u8]>,
}

// SAFETY: the type only ever reads through its pointer, with volatile reads that tolerate
// a concurrent writer, and the constructors promise the memory readable for `'a` from
// wherever it is used.
unsafe impl Send for GuestBytes<'_> {}
// SAFETY: as for `Send`: shared use is concurrent reading.
unsafe impl Sync for GuestBytes<'_> {}

macro_rules! read_int {
    ($name:ident, $ty:ty, $n:literal) => {
        #[doc = concat!("The little-endian `", stringify!($ty), "` at byte `offset`, if it lies inside.")]
        #[must_use]
        #[inline]
        pub fn $name(&self, offset: usize) -> Option<$ty> {
            if offset.checked_add($n)? > self.len {
                return None;
            }
            // SAFETY: `offset + size_of::<T>() <= len`, so every byte read is inside the
            // range that the constructor promised readable for `'a`.
            let at = unsafe { self.start.as_ptr().add(offset) }.cast::<$ty>();
            let value = if at.is_aligned() {
                // SAFETY: in bounds (above) and aligned (just tested); volatile because
                // the owner may be writing.
                unsafe { at.read_volatile() }
            } else {
                // SAFETY: in bounds (above); `[u8; N]` has no alignment.
                <$ty>::from_ne_bytes(unsafe { at.cast::<[u8; $n]>().read_volatile() })
            };
            Some(<$ty>::from_le(value))
        }
    };
}

impl<'a> GuestBytes<'a> {
    /// Bytes that nobody changes for `'a`.
    #[must_use]
    pub const fn from_slice(bytes: &'a [u8]) -> Self {
        Self {
            // A slice's pointer is never null.
            start: NonNull::from_ref(bytes).cast(),
            len: bytes.len(),
            owner: PhantomData,
        }
    }

    /// `len` bytes from `start`, which a guest or another process may be writing.
    ///
    /// # Safety
    /// The bytes stay mapped and readable, from every thread, for `'a`.
    #[must_use]
    pub const unsafe fn from_raw_parts(start: NonNull<u8>, len: usize) -> Self {
        Self {
            start,
            len,
            owner: PhantomData,
        }
    }

    /// The number of bytes.
    #[must_use]
    #[inline]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The address of the first byte, for `writev` and the like.
    #[must_use]
    pub const fn as_ptr(&self) -> *const u8 {
        self.start.as_ptr()
    }

    /// The `len` bytes from `offset`, if they lie inside.
    #[must_use]
    #[inline]
    pub fn get(&self, offset: usize, len: usize) -> Option<Self> {
        if offset.checked_add(len)? > self.len {
            return None;
        }
        // SAFETY: `offset <= len`, so the pointer stays inside (or one past) the range.
        let start = unsafe { self.start.add(offset) };
        Some(Self {
            start,
            len,
            ..*self
        })
    }

    read_int!(u16_at, u16, 2);
    read_int!(u32_at, u32, 4);
    read_int!(u64_at, u64, 8);

    /// The byte at `offset`, if it lies inside.
    #[must_use]
    pub fn u8_at(&self, offset: usize) -> Option<u8> {
        (offset < self.len).then(|| {
            // SAFETY: `offset < len`.
            unsafe { self.start.as_ptr().add(offset).read_volatile() }
        })
    }

    /// Copies the bytes into `out`.
    ///
    /// Returns `false`, and copies nothing, unless `out` has exactly the same length.
    #[must_use]
    pub fn copy_to(&self, out: &mut [u8]) -> bool {
        if out.len() != self.len {
            return false;
        }
        // SAFETY: both are `len` bytes long, and a `&mut` buffer of the caller cannot
        // overlap memory that is mapped for somebody else.
        unsafe { core::ptr::copy_nonoverlapping(self.start.as_ptr(), out.as_mut_ptr(), self.len) };
        true
    }

    /// Whether every byte is zero; stops at the first that is not.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        self.is_filled_with(0)
    }

    /// Whether every byte equals `byte`; stops at the first that does not.
    #[must_use]
    pub fn is_filled_with(&self, byte: u8) -> bool {
        const STEP: usize = 64;
        let word = u64::from_ne_bytes([byte; 8]);
        let mut offset = 0_usize;
        while let Some(next) = offset.checked_add(STEP)
            && next <= self.len
        {
            let mut difference = 0;
            for lane in 0..8_usize {
                let Some(found) = self.u64_at(offset | (lane << 3)) else {
                    return false;
                };
                difference |= found ^ word;
            }
            if difference != 0 {
                return false;
            }
            offset = next;
        }
        (offset..self.len).all(|at| self.u8_at(at) == Some(byte))
    }
}

impl<'a> From<&'a [u8]> for GuestBytes<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self::from_slice(bytes)
    }
}

impl fmt::Debug for GuestBytes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GuestBytes({:p}, {} bytes)", self.start, self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::GuestBytes;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn reads_what_a_slice_reads(data in proptest::collection::vec(any::<u8>(), 0..200), at in 0_usize..220) {
            let bytes = GuestBytes::from_slice(&data);
            let expect = data.get(at..at + 8).map(|s| u64::from_le_bytes(s.try_into().unwrap()));
            prop_assert_eq!(bytes.u64_at(at), expect);
            let expect = data.get(at..at + 4).map(|s| u32::from_le_bytes(s.try_into().unwrap()));
            prop_assert_eq!(bytes.u32_at(at), expect);
            prop_assert_eq!(bytes.u8_at(at), data.get(at).copied());
        }

        #[test]
        fn finds_the_one_byte_that_differs(len in 1_usize..300, at in 0_usize..300, fill in any::<u8>()) {
            let mut data = vec![fill; len];
            prop_assert!(GuestBytes::from_slice(&data).is_filled_with(fill));
            if let Some(byte) = data.get_mut(at) {
                *byte ^= 1;
                prop_assert!(!GuestBytes::from_slice(&data).is_filled_with(fill));
            }
        }
    }
}
