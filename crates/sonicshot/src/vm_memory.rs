//! A VMM's own `vm-memory` guest memory, served to the pruner.

use crate::memory::ram;
use crate::to_u64;
use crate::{Gpa, GpaRange, GuestBytes, GuestMemory, LayoutError, Mapped, MemoryError, RamLayout};
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;
use vm_memory::volatile_memory::PtrGuard;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// The guest memory of a VMM built on `vm-memory`, without copying it.
///
/// Pause the guest, and whatever else writes its memory, while this is in use.
///
/// ```
/// use sonicshot::{Gpa, GuestMemory, VmMemory};
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
///
/// let regions = [(GuestAddress(0), 1 << 20), (GuestAddress(1 << 32), 1 << 20)];
/// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&regions)?;
/// memory.write_obj(7_u64, GuestAddress(0x1000))?;
/// let guest = VmMemory::new(&memory)?;
/// assert_eq!(guest.layout().bytes(), 2 << 20);
/// assert_eq!(guest.read_u64(Gpa::new(0x1000))?, 7);
/// assert!(guest.map(Gpa::new(1 << 32), 4096)?.is_some());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct VmMemory<'a, M> {
    memory: &'a M,
    layout: RamLayout,
}

/// Keeps what `vm-memory` mapped for a slice mapped.
struct Guard {
    _guard: PtrGuard,
}

// SAFETY: the guard is only kept and dropped; nothing reads its pointer through this type.
// With plain mappings dropping it does nothing, with Xen's it unmaps, which any thread may do.
unsafe impl Send for Guard {}
// SAFETY: as above: a shared guard gives access to nothing.
unsafe impl Sync for Guard {}

impl<'a, M: GuestMemoryBackend> VmMemory<'a, M> {
    /// Serves `memory`.
    ///
    /// # Errors
    /// [`LayoutError`] if it has no regions, or one that cannot be.
    pub fn new(memory: &'a M) -> Result<Self, LayoutError> {
        let layout = layout(memory)?;
        Ok(Self { memory, layout })
    }
}

fn backend(at: Gpa, len: usize, source: vm_memory::GuestMemoryError) -> MemoryError {
    MemoryError::Backend {
        range: GpaRange::of_request(at, len),
        source: Box::new(source),
    }
}

impl<M: GuestMemoryBackend + Sync> GuestMemory for VmMemory<'_, M> {
    fn layout(&self) -> &RamLayout {
        &self.layout
    }

    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        read(self.memory, &self.layout, at, buf)
    }

    fn map(&self, at: Gpa, len: usize) -> Result<Option<Mapped<'_>>, MemoryError> {
        map(self.memory, &self.layout, at, len)
    }
}

/// The same memory, with a share in it: what can be kept beside whatever else a VMM has of a
/// machine, and handed on as `Arc<dyn GuestMemory>`.
///
/// ```
/// use sonicshot::{Gpa, GuestMemory, SharedVmMemory};
/// use std::sync::Arc;
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
///
/// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
/// let memory = Arc::new(memory);
/// let guest: Arc<dyn GuestMemory> = Arc::new(SharedVmMemory::new(Arc::clone(&memory))?);
/// assert_eq!(guest.layout().bytes(), 1 << 20);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Of a `GuestMemoryAtomic` it is what `memory().into_inner()` gives: the regions that there are
/// now. Memory that is plugged in later is not in it.
pub struct SharedVmMemory<M> {
    memory: Arc<M>,
    layout: RamLayout,
}

impl<M: GuestMemoryBackend> SharedVmMemory<M> {
    /// Serves `memory`.
    ///
    /// # Errors
    /// [`LayoutError`] if it has no regions, or one that cannot be.
    pub fn new(memory: Arc<M>) -> Result<Self, LayoutError> {
        let layout = layout(memory.as_ref())?;
        Ok(Self { memory, layout })
    }
}

impl<M: GuestMemoryBackend + Send + Sync> GuestMemory for SharedVmMemory<M> {
    fn layout(&self) -> &RamLayout {
        &self.layout
    }

    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        read(self.memory.as_ref(), &self.layout, at, buf)
    }

    fn map(&self, at: Gpa, len: usize) -> Result<Option<Mapped<'_>>, MemoryError> {
        map(self.memory.as_ref(), &self.layout, at, len)
    }
}

impl<M> fmt::Debug for SharedVmMemory<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedVmMemory")
            .field("layout", &self.layout)
            .finish_non_exhaustive()
    }
}

fn layout(memory: &impl GuestMemoryBackend) -> Result<RamLayout, LayoutError> {
    let regions = memory
        .iter()
        .map(|region| ram(Gpa::new(region.start_addr().0), region.len()));
    RamLayout::new(regions.collect::<Result<_, _>>()?)
}

fn read(
    memory: &impl GuestMemoryBackend,
    layout: &RamLayout,
    at: Gpa,
    buf: &mut [u8],
) -> Result<(), MemoryError> {
    if !layout.contains(at, to_u64(buf.len())) {
        let range = GpaRange::of_request(at, buf.len());
        return Err(MemoryError::NotRam { range });
    }
    memory
        .read_slice(buf, GuestAddress(at.raw()))
        .map_err(|source| backend(at, buf.len(), source))
}

fn map<'m>(
    memory: &'m impl GuestMemoryBackend,
    layout: &RamLayout,
    at: Gpa,
    len: usize,
) -> Result<Option<Mapped<'m>>, MemoryError> {
    let range = GpaRange::of_request(at, len);
    if !layout.contains(at, to_u64(len)) {
        return Err(MemoryError::NotRam { range });
    }
    let address = GuestAddress(at.raw());
    // A range across two regions that touch in the guest need not touch here.
    let inside = memory.find_region(address).is_some_and(|region| {
        let last = range.end().raw().checked_sub(1);
        last.is_some_and(|last| last <= region.last_addr().0)
    });
    if !inside {
        return Ok(None);
    }
    let slice = memory
        .get_slice(address, len)
        .map_err(|source| backend(at, len, source))?;
    let guard = slice.ptr_guard();
    let Some(start) = NonNull::new(guard.as_ptr().cast_mut()) else {
        return Ok(None);
    };
    // SAFETY: `get_slice` checked that `len` bytes from here are in the region. They stay
    // mapped while `guard` lives, which `Mapped::held` below keeps for as long as the bytes.
    let bytes = unsafe { GuestBytes::from_raw_parts(start, len) };
    // SAFETY: the bytes stay readable until the guard is dropped.
    Ok(Some(unsafe {
        Mapped::held(bytes, Box::new(Guard { _guard: guard }))
    }))
}

impl<M> fmt::Debug for VmMemory<'_, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VmMemory")
            .field("layout", &self.layout)
            .finish_non_exhaustive()
    }
}
