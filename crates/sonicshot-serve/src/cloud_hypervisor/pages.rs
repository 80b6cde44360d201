//! The memory that Cloud Hypervisor and the server share: a file without a name for each slot.
//!
//! Pages are put in place by a `userfaultfd` of the server's own, for its own mapping of the file,
//! which nobody ever touches. So each appears whole or not at all, the kernel puts none where one is
//! (whatever the guest has written there meanwhile stays), and none brings zeroes for its
//! neighbours along, as a write to a file with transparent huge pages may.

use super::migration::{Migration, Slot};
use crate::engine::VmRegion;
use crate::error::ServeError;
use crate::uffd::Uffd;
use core::ffi::c_void;
use core::ptr::NonNull;
use rustix::fd::OwnedFd;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use sonicshot::{GpaRange, RamLayout};

/// Of small ones any size may be said.
const PAGE: u64 = 4096;
/// The bit from which `memfd_create` takes the logarithm of a page size.
const SIZE_SHIFT: u32 = 26;

/// A file that is mapped here.
#[derive(Debug)]
pub(super) struct Mapped {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping is memory of the whole process, and nothing here reads or writes it.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl Drop for Mapped {
    fn drop(&mut self) {
        let start: *mut c_void = self.start.as_ptr().cast();
        // SAFETY: the mapping of `new`, to which there are no references.
        let _ = unsafe { munmap(start, self.len) };
    }
}

/// All memory of a virtual machine that is to be.
#[derive(Debug)]
pub(super) struct Shared {
    /// The file of each slot.
    pub files: Vec<(Slot, OwnedFd)>,
    pub uffd: Uffd,
    pub regions: Vec<VmRegion>,
    /// For as long as pages are put in place.
    pub mapped: Vec<Mapped>,
}

impl Shared {
    /// Empty memory for a snapshot of that layout.
    pub fn new(migration: &Migration, layout: &RamLayout) -> Result<Self, ServeError> {
        let parts = migration.parts(layout)?;
        let uffd = Uffd::new()?;
        let (mut files, mut regions, mut mapped) = (Vec::new(), Vec::new(), Vec::new());
        for slot in &migration.slots {
            let file = slot.file()?;
            let own: Vec<GpaRange> = parts
                .iter()
                .filter_map(|(of, part)| (of == slot).then_some(*part))
                .collect();
            if !own.is_empty() {
                let memory = slot.map(&file)?;
                // SAFETY: a new mapping of a new file, which stays for as long as this does, and
                // which nothing of this process touches.
                let registered = unsafe { uffd.register(memory.start, memory.len) }?;
                for part in own {
                    let inside = part.start().offset_from(slot.guest.start());
                    let inside = inside.ok_or(ServeError::NotInSlot { at: part.start() })?;
                    let page = slot.huge.unwrap_or(PAGE);
                    regions.push(VmRegion::new(&registered, inside, part, page)?);
                }
                mapped.push(memory);
            }
            files.push((*slot, file));
        }
        Ok(Self {
            files,
            uffd,
            regions,
            mapped,
        })
    }
}

impl Slot {
    /// A new file with holes alone.
    fn file(&self) -> Result<OwnedFd, ServeError> {
        let mut flags = MemfdFlags::CLOEXEC;
        if let Some(page) = self.huge {
            let size = page.trailing_zeros() << SIZE_SHIFT;
            flags |= MemfdFlags::HUGETLB | MemfdFlags::from_bits_retain(size);
        }
        let file = memfd_create(format!("sonicshot-slot-{}", self.number), flags);
        let file = file.map_err(ServeError::system("memfd_create"))?;
        let len = self.offset.checked_add(self.guest.len());
        let len = len.ok_or_else(|| self.wrong())?;
        ftruncate(&file, len).map_err(ServeError::system("ftruncate"))?;
        Ok(file)
    }

    fn map(&self, file: &OwnedFd) -> Result<Mapped, ServeError> {
        let len = usize::try_from(self.guest.len()).map_err(|_| self.wrong())?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        let none = core::ptr::null_mut();
        // SAFETY: a new mapping touches nobody's memory.
        let start = unsafe { mmap(none, len, access, flags, file, self.offset) };
        let start = start.map_err(ServeError::system("mapping the guest's memory"))?;
        Ok(Mapped {
            start: NonNull::new(start.cast()).ok_or_else(|| self.wrong())?,
            len,
        })
    }

    fn wrong(&self) -> ServeError {
        ServeError::MigrationSlot {
            what: "the length of slot",
            slot: self.number,
            value: self.guest.len(),
        }
    }
}
