//! A guest together with its memory: what can be kept in a structure, and sent to another thread.
#![expect(
    unsafe_code,
    reason = "the guest borrows from what is beside it, which no lifetime says"
)]

use crate::{AnalysisOptions, GuestOptions, LinuxGuest, VmiError, analyze};
use core::fmt;
use sonicshot::GuestMemory;
use std::sync::Arc;

/// A [`LinuxGuest`] that has its memory itself, shared with whoever has it, too.
///
/// ```
/// use sonicshot::GuestMemory;
/// use sonicshot_vmi::{GuestOptions, OwnedGuest, VmiError};
/// use std::sync::Arc;
///
/// /// What a VMM keeps of a machine.
/// struct Machine {
///     memory: Arc<dyn GuestMemory>,
///     guest: OwnedGuest,
/// }
///
/// impl Machine {
///     fn new(memory: Arc<dyn GuestMemory>) -> Result<Self, VmiError> {
///         let guest = OwnedGuest::open(Arc::clone(&memory), &GuestOptions::new())?;
///         Ok(Self { memory, guest })
///     }
///     fn release(&self) -> String {
///         self.guest.with(|guest| guest.release().to_owned())
///     }
/// }
/// fn to_another_thread<T: Send + Sync + 'static>() {}
/// to_another_thread::<Machine>();
/// ```
pub struct OwnedGuest {
    /// Borrows from `memory`; before it, so that it is dropped first.
    guest: LinuxGuest<'static>,
    memory: Arc<dyn GuestMemory>,
    options: GuestOptions,
}

impl OwnedGuest {
    /// As [`LinuxGuest::open`].
    ///
    /// # Errors
    /// As [`LinuxGuest::open`].
    pub fn open(memory: Arc<dyn GuestMemory>, options: &GuestOptions) -> Result<Self, VmiError> {
        let borrowed: *const dyn GuestMemory = Arc::as_ptr(&memory);
        // SAFETY: what an `Arc` points to stays where it is, and is not changed but by its own shared
        // methods, for as long as there is one. There is one beside the guest, which is dropped first;
        // and the guest is only lent, with a lifetime that whoever has it cannot name (`with`), so
        // that nothing that borrows from the memory gets out.
        let borrowed: &'static dyn GuestMemory = unsafe { &*borrowed };
        Ok(Self {
            guest: LinuxGuest::open(borrowed, options)?,
            memory,
            options: options.clone(),
        })
    }

    /// Lends the guest, as it was when it was opened: its symbols, types and page tables are of the
    /// kernel that ran then.
    pub fn with<T>(&self, look: impl for<'m> FnOnce(&LinuxGuest<'m>) -> T) -> T {
        look(&self.guest)
    }

    /// Gives every frame of RAM its class, by what is in memory now: the kernel is found anew, and
    /// whether it still owns the memory, for the guest may have run, and started another one, since it
    /// was opened. Of `options` those for the guest are not asked: they are what it was opened with.
    ///
    /// # Errors
    /// As [`analyze`].
    pub fn analyze(&self, options: &AnalysisOptions) -> Result<crate::Analysis, VmiError> {
        let options = options.clone().guest(self.options.clone());
        analyze(&self.memory, &options)
    }

    /// Its memory.
    #[must_use]
    pub fn memory(&self) -> &Arc<dyn GuestMemory> {
        &self.memory
    }
}

impl fmt::Debug for OwnedGuest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.guest.fmt(f)
    }
}
