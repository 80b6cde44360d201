//! A VMM's own `vm-memory` regions, registered to be served.
#![expect(unsafe_code, reason = "who registers memory promises what it is")]

use crate::{ServeError, Uffd, VmRegion};
use sonicshot::{Gpa, GpaRange};
use std::ptr::NonNull;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

impl Uffd {
    /// Registers every region of a VMM's guest memory, in their order: what a [`Vm`](crate::Vm) is
    /// given. `page` is the size of the pages behind it, in bytes: that of huge pages, or any if they
    /// are not huge.
    ///
    /// ```no_run
    /// # #![allow(unsafe_code)]
    /// # fn f(source: std::sync::Arc<sonicshot_serve::CheckpointSource<std::fs::File>>) -> Result<(), Box<dyn std::error::Error>> {
    /// use sonicshot_serve::{Uffd, Vm, VmOptions};
    /// use vm_memory::{GuestAddress, GuestMemoryMmap};
    /// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 30)])?;
    /// let uffd = Uffd::new()?;
    /// // SAFETY: it has just been mapped, nobody has touched it, and it outlives `vm`.
    /// let regions = unsafe { uffd.register_vm_memory(&memory, 4096)? };
    /// let vm = Vm::start(source, uffd, &regions, VmOptions::default())?;
    /// // The guest runs.
    /// # drop(vm); Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`ServeError::NoHost`] if a region has no address in this process, [`ServeError::Uffd`] if the
    /// kernel refuses.
    ///
    /// # Safety
    /// As [`register`](Self::register): the memory stays mapped for as long as a [`Vm`](crate::Vm) is
    /// given it; nobody has touched it, or relies on what is in it; and whoever touches it can wait.
    pub unsafe fn register_vm_memory<M: GuestMemoryBackend>(
        &self,
        memory: &M,
        page: u64,
    ) -> Result<Vec<VmRegion>, ServeError> {
        let mut regions = Vec::new();
        for region in memory.iter() {
            let at = Gpa::new(region.start_addr().0);
            let none = || ServeError::NoHost {
                at,
                len: region.len(),
            };
            let host = region.get_host_address(MemoryRegionAddress(0));
            let host = host.ok().and_then(NonNull::new).ok_or_else(none)?;
            let len = usize::try_from(region.len()).map_err(|_| none())?;
            let guest = GpaRange::with_len(at, region.len()).ok_or_else(none)?;
            // SAFETY: the caller's promise, for each region.
            let registered = unsafe { self.register(host, len)? };
            regions.push(VmRegion::new(&registered, 0, guest, page)?);
        }
        Ok(regions)
    }
}
