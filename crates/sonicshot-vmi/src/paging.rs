//! The kernel's own address space: virtual to guest-physical.

mod tables;

pub(crate) use self::tables::Remembered;

use self::tables::Tables;
use crate::deadline::Deadline;
use crate::error::VmiError;
use crate::{KernelVa, VirtualMemory, VirtualReadError};
use sonicshot::{Gpa, GuestMemory, MemoryError, to_usize};
use std::sync::Arc;

/// The walk of an architecture's page tables.
pub(crate) trait Paging: Send + Sync + core::fmt::Debug {
    /// The number of levels of tables.
    fn levels(&self) -> u32;

    /// Whether `value` may be an address of the kernel's half of the address space.
    fn is_pointer(&self, value: u64) -> bool;

    /// The guest-physical address of `at`, and the number of bytes from there on that are mapped by
    /// the same entry; `None` if nothing maps it.
    fn translate(
        &self,
        memory: &dyn GuestMemory,
        at: KernelVa,
    ) -> Result<Option<Translation>, MemoryError>;

    /// Calls `visit` with each page table of the kernel half, once, until it returns `false`.
    fn visit_tables(
        &self,
        memory: &dyn GuestMemory,
        visit: &mut dyn FnMut(Gpa) -> bool,
    ) -> Result<(), MemoryError>;

    /// The beginnings of ranges of mappings in the kernel half at which the array of struct pages may
    /// begin (on x86-64 a multiple of 1 GiB), lowest first; at most `most` and one.
    fn mapped_ranges(
        &self,
        memory: &dyn GuestMemory,
        most: usize,
        deadline: &Deadline,
    ) -> Result<Vec<KernelVa>, VmiError>;
}

/// The place of a virtual address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Translation {
    /// Its guest-physical address.
    pub at: Gpa,
    /// The number of bytes from there on that the same page-table entry maps.
    pub len: u64,
}

/// The kernel half of a guest's address space.
pub(crate) struct AddressSpace<'m> {
    tables: Tables<'m>,
    paging: Arc<dyn Paging>,
}

impl core::fmt::Debug for AddressSpace<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("AddressSpace")
            .field("layout", self.memory().layout())
            .field("paging", &self.paging)
            .finish()
    }
}

impl<'m> AddressSpace<'m> {
    pub(crate) fn new(memory: &'m dyn GuestMemory, paging: Box<dyn Paging>) -> Self {
        Self {
            tables: Tables::new(memory),
            paging: paging.into(),
        }
    }

    /// The same address space, read from `memory`, which is the same guest's.
    pub(crate) fn over<'n>(&self, memory: &'n dyn GuestMemory) -> AddressSpace<'n> {
        AddressSpace {
            tables: Tables::new(memory),
            paging: Arc::clone(&self.paging),
        }
    }

    pub(crate) fn memory(&self) -> &'m dyn GuestMemory {
        self.tables.memory()
    }

    /// Remembers page tables until what is returned goes: while one look at the guest goes on.
    pub(crate) fn remember_tables(&self) -> Remembered<'_, 'm> {
        self.tables.remember()
    }

    /// The number of levels of page tables.
    pub(crate) fn levels(&self) -> u32 {
        self.paging.levels()
    }

    /// Whether `value` may be an address of the kernel's half.
    pub(crate) fn is_pointer(&self, value: u64) -> bool {
        self.paging.is_pointer(value)
    }

    /// The place of `at`.
    pub(crate) fn translate(&self, at: KernelVa) -> Result<Translation, VirtualReadError> {
        match self.paging.translate(&self.tables, at) {
            Ok(Some(translation)) => Ok(translation),
            Ok(None) => Err(VirtualReadError::NotMapped { at }),
            Err(source) => Err(VirtualReadError::Memory { at, source }),
        }
    }

    /// Calls `visit` with each page table of the kernel half, once, until it returns `false`.
    pub(crate) fn visit_tables(
        &self,
        visit: &mut dyn FnMut(Gpa) -> bool,
    ) -> Result<(), MemoryError> {
        self.paging.visit_tables(self.memory(), visit)
    }

    /// The NUL-terminated string at `at`, at most `max` bytes, as far as it is mapped.
    pub(crate) fn read_str(&self, at: KernelVa, max: usize) -> Result<String, VirtualReadError> {
        let mut text = Vec::new();
        while text.len() < max {
            let here = u64::try_from(text.len())
                .ok()
                .and_then(|offset| at.checked_add(offset))
                .ok_or(VirtualReadError::NotMapped { at })?;
            let mut byte = [0];
            self.read(here, &mut byte)?;
            match byte {
                [0] => break,
                [byte] => text.push(byte),
            }
        }
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

impl VirtualMemory for AddressSpace<'_> {
    fn read(&self, at: KernelVa, buf: &mut [u8]) -> Result<(), VirtualReadError> {
        let mut at = at;
        let mut rest = buf;
        while !rest.is_empty() {
            let Translation { at: gpa, len } = self.translate(at)?;
            // A mapping longer than the address space is longer than the buffer too.
            let len = to_usize(len).min(rest.len());
            let (now, later) = rest.split_at_mut(len);
            self.memory()
                .read(gpa, now)
                .map_err(|source| VirtualReadError::Memory { at, source })?;
            rest = later;
            if !rest.is_empty() {
                at = u64::try_from(len)
                    .ok()
                    .and_then(|len| at.checked_add(len))
                    .ok_or(VirtualReadError::NotMapped { at })?;
            }
        }
        Ok(())
    }
}
