//! Symbols that LibVMI tells.

use crate::LibVmiGuest;
use crate::guest::Inner;
use core::fmt;
use sonicshot_vmi::KernelVa;
use sonicshot_vmi::symbols::{SymbolBase, SymbolError, SymbolSource};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

/// The addresses of the symbols of a guest's kernel, as LibVMI tells it (`vmi_translate_ksym2v`): by
/// a profile of the kernel, or what its own configuration (`/etc/libvmi.conf`) has of the guest.
///
/// It is for kernels that have no table of symbols in memory
/// ([`GuestOptions::fallback`](sonicshot_vmi::GuestOptions::fallback)), and is asked only then. What it
/// says must agree with the kernel's own VMCOREINFO.
///
/// ```no_run
/// # fn f(guest: &sonicshot_libvmi::LibVmiGuest) {
/// use sonicshot_libvmi::LibVmiSymbols;
/// use sonicshot_vmi::{AnalysisOptions, GuestOptions};
/// let symbols = LibVmiSymbols::new(guest, None);
/// let guest = GuestOptions::new().fallback(std::sync::Arc::new(symbols));
/// let options = AnalysisOptions::new().guest(guest);
/// # let _ = options;
/// # }
/// ```
pub struct LibVmiSymbols {
    inner: Arc<Inner>,
    profile: Option<PathBuf>,
    /// Whether LibVMI knows the guest's system, once it was asked.
    known: OnceLock<bool>,
}

impl fmt::Debug for LibVmiSymbols {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LibVmiSymbols")
            .field("profile", &self.profile)
            .field("known", &self.known.get())
            .finish_non_exhaustive()
    }
}

impl LibVmiSymbols {
    /// Those of `guest`, by a JSON profile of its kernel or else LibVMI's own configuration.
    #[must_use]
    pub fn new(guest: &LibVmiGuest, profile: Option<PathBuf>) -> Self {
        Self {
            inner: Arc::clone(guest.inner()),
            profile,
            known: OnceLock::new(),
        }
    }

    fn is_known(&self) -> bool {
        *self.known.get_or_init(|| {
            let known = self.inner.instance.know_system(self.profile.as_deref());
            known.is_ok()
        })
    }
}

impl SymbolSource for LibVmiSymbols {
    fn origin(&self) -> &'static str {
        "LibVMI"
    }

    fn base(&self) -> SymbolBase {
        SymbolBase::Running
    }

    /// LibVMI may fail in its own ways.
    fn tells_all(&self) -> bool {
        false
    }

    /// None if LibVMI does not know the guest's system, as mostly without a profile.
    fn symbol(&self, name: &str) -> Result<Option<KernelVa>, SymbolError> {
        if !self.is_known() {
            return Ok(None);
        }
        Ok(self.inner.instance.symbol(name).map(KernelVa::new))
    }
}
