//! Kernel-virtual addresses, and memory that is read through them.

use core::fmt;
use sonicshot::MemoryError;

/// A virtual address of the guest's kernel.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KernelVa(u64);

impl KernelVa {
    /// The address `raw`.
    #[must_use]
    pub const fn new(raw: u64) -> Self {
        Self(raw)
    }

    /// The address as a number.
    #[must_use]
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// The address `bytes` further up, unless that wraps.
    #[must_use]
    pub const fn checked_add(self, bytes: u64) -> Option<Self> {
        match self.0.checked_add(bytes) {
            Some(raw) => Some(Self(raw)),
            None => None,
        }
    }

    /// The distance of `self` above `base`, if it is above.
    #[must_use]
    pub const fn offset_from(self, base: Self) -> Option<u64> {
        self.0.checked_sub(base.0)
    }

    /// The address `bytes` further down, unless that wraps.
    #[must_use]
    pub const fn checked_sub(self, bytes: u64) -> Option<Self> {
        match self.0.checked_sub(bytes) {
            Some(raw) => Some(Self(raw)),
            None => None,
        }
    }

    /// The address moved by a displacement, which counts modulo 2^64, as the offsets of KASLR and of
    /// processors' areas do.
    #[must_use]
    pub const fn moved_by(self, displacement: u64) -> Self {
        Self(self.0.wrapping_add(displacement))
    }

    /// The address that [`moved_by`](Self::moved_by) moves to this one.
    #[must_use]
    pub const fn moved_back_by(self, displacement: u64) -> Self {
        Self(self.0.wrapping_sub(displacement))
    }
}

impl fmt::Debug for KernelVa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KernelVa({:#x})", self.0)
    }
}

impl fmt::Display for KernelVa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// The reason that bytes at a kernel-virtual address could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VirtualReadError {
    /// No page table maps the address.
    #[error("kernel address {at} is not mapped")]
    NotMapped {
        /// The address.
        at: KernelVa,
    },
    /// A page table maps it to something that cannot be read.
    #[error("kernel address {at}")]
    Memory {
        /// The address.
        at: KernelVa,
        /// The reason that guest memory could not be read.
        #[source]
        source: MemoryError,
    },
}

/// Memory that is read through kernel-virtual addresses.
pub trait VirtualMemory {
    /// Fills `buf` with the bytes from `at`; they may lie in many pages.
    ///
    /// # Errors
    /// [`VirtualReadError`] with the first address that is not mapped or not readable.
    fn read(&self, at: KernelVa, buf: &mut [u8]) -> Result<(), VirtualReadError>;

    /// The little-endian `u32` at `at`.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    fn read_u32(&self, at: KernelVa) -> Result<u32, VirtualReadError> {
        let mut buf = [0; 4];
        self.read(at, &mut buf)?;
        Ok(u32::from_le_bytes(buf))
    }

    /// The little-endian `u64` at `at`.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    fn read_u64(&self, at: KernelVa) -> Result<u64, VirtualReadError> {
        let mut buf = [0; 8];
        self.read(at, &mut buf)?;
        Ok(u64::from_le_bytes(buf))
    }
}
