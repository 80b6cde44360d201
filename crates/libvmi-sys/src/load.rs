//! The library, found and opened.

use crate::{Functions, Version};
use core::fmt;
use libloading::Library as Loaded;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

/// The name that the system's loader is asked for.
pub const NAME: &str = "libvmi.so.0";

/// The sources of LibVMI, for a user who lacks it.
const GET_IT: &str = "install LibVMI, 0.14 or later (Debian and Ubuntu: libvmi0), or build it from \
                      https://github.com/libvmi/libvmi and say where its libvmi.so.0 is";

/// The reason that LibVMI cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// There is none, or it cannot be loaded.
    #[error("LibVMI cannot be loaded from {}: {GET_IT}", file.display())]
    Missing {
        /// The request.
        file: PathBuf,
        /// The loader's error.
        #[source]
        source: libloading::Error,
    },
    /// The file that was loaded is something else.
    #[error("{} is not LibVMI: it has no {function}", file.display())]
    NotLibVmi {
        /// The file that was loaded.
        file: PathBuf,
        /// The function that it lacks.
        function: &'static str,
        /// The loader's error.
        #[source]
        source: libloading::Error,
    },
    /// It is LibVMI of before 0.14, whose functions take other parameters.
    #[error(
        "{} is LibVMI of before 0.14, which takes other parameters: it has no {function}. {GET_IT}",
        file.display()
    )]
    TooOld {
        /// The file that was loaded.
        file: PathBuf,
        /// The function that it lacks.
        function: &'static str,
        /// The loader's error.
        #[source]
        source: libloading::Error,
    },
}

/// LibVMI, loaded for as long as this lives.
///
/// Functions that are copied out of it must not be called later: keep it beside them.
pub struct Library {
    functions: Functions,
    version: Version,
    _loaded: Loaded,
}

impl Library {
    /// Loads [`NAME`] from where the system has its libraries.
    ///
    /// # Errors
    /// [`LoadError`] if there is none, or one that is too old.
    pub fn load() -> Result<Self, LoadError> {
        Self::open(NAME)
    }

    /// Loads the library at `path`, or of that name.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn open(path: impl AsRef<OsStr>) -> Result<Self, LoadError> {
        let path = Path::new(path.as_ref());
        // SAFETY: LibVMI does nothing when it is loaded or unloaded, nor do GLib, json-c and the
        // hypervisors' libraries that it is linked to but set up what is their own.
        let loaded = unsafe { Loaded::new(path.as_os_str()) };
        let loaded = loaded.map_err(|source| LoadError::Missing {
            file: path.to_owned(),
            source,
        })?;
        let functions = Finder {
            loaded: &loaded,
            file: path,
        }
        .functions()?;
        Ok(Self {
            version: Version::of(&functions),
            functions,
            _loaded: loaded,
        })
    }

    /// Its functions.
    #[must_use]
    pub fn functions(&self) -> &Functions {
        &self.functions
    }

    /// The version of this LibVMI.
    #[must_use]
    pub fn version(&self) -> &Version {
        &self.version
    }
}

impl fmt::Debug for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Library")
            .field("version", &self.version)
            .finish_non_exhaustive()
    }
}

/// Finds functions in what was loaded.
struct Finder<'a> {
    loaded: &'a Loaded,
    file: &'a Path,
}

impl Finder<'_> {
    fn functions(&self) -> Result<Functions, LoadError> {
        // SAFETY: each has the type that it has in `libvmi/libvmi.h` (`vmi_events_version` in
        // `libvmi/events.h`) of 0.14 and later, which `vmi_pagecache_flush` shows that this is.
        unsafe {
            let vmi_init = self.need("vmi_init")?;
            let vmi_pagecache_flush = self.mark("vmi_pagecache_flush")?;
            Ok(Functions {
                vmi_init,
                vmi_destroy: self.need("vmi_destroy")?,
                vmi_read_pa: self.need("vmi_read_pa")?,
                vmi_get_memsize: self.need("vmi_get_memsize")?,
                vmi_get_max_physical_address: self.need("vmi_get_max_physical_address")?,
                vmi_get_num_vcpus: self.need("vmi_get_num_vcpus")?,
                vmi_get_vcpureg: self.need("vmi_get_vcpureg")?,
                vmi_pause_vm: self.need("vmi_pause_vm")?,
                vmi_resume_vm: self.need("vmi_resume_vm")?,
                vmi_pagecache_flush,
                vmi_init_os: self.find("vmi_init_os").ok(),
                vmi_translate_ksym2v: self.find("vmi_translate_ksym2v").ok(),
                vmi_mmap_guest_pa: self.find("vmi_mmap_guest_pa").ok(),
                vmi_events_version: self.find("vmi_events_version").ok(),
            })
        }
    }

    /// One that every LibVMI has.
    ///
    /// # Safety
    /// As [`find`](Self::find).
    unsafe fn need<F: Copy>(&self, function: &'static str) -> Result<F, LoadError> {
        // SAFETY: the caller's promise.
        unsafe { self.find(function) }.map_err(|source| LoadError::NotLibVmi {
            file: self.file.to_owned(),
            function,
            source,
        })
    }

    /// One that those have whose functions are as here.
    ///
    /// # Safety
    /// As [`find`](Self::find).
    unsafe fn mark<F: Copy>(&self, function: &'static str) -> Result<F, LoadError> {
        // SAFETY: the caller's promise.
        unsafe { self.find(function) }.map_err(|source| LoadError::TooOld {
            file: self.file.to_owned(),
            function,
            source,
        })
    }

    /// The function of this name.
    ///
    /// # Safety
    /// `F` must be its type, and it must not be called once the library is dropped.
    unsafe fn find<F: Copy>(&self, function: &str) -> Result<F, libloading::Error> {
        // SAFETY: the caller's promise.
        unsafe { self.loaded.get::<F>(function) }.map(|found| *found)
    }
}

#[cfg(test)]
mod tests {
    use super::{Library, LoadError};
    use std::error::Error;

    #[test]
    fn a_library_that_is_missing_is_an_error_that_says_how_to_get_it() {
        let error = Library::open("libvmi-that-is-nowhere.so.0").unwrap_err();
        assert!(matches!(error, LoadError::Missing { .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.contains("libvmi-that-is-nowhere.so.0"), "{text}");
        assert!(text.contains("github.com/libvmi/libvmi"), "{text}");
        assert!(error.source().is_some());
    }

    #[test]
    fn another_library_is_told_from_it() {
        let error = Library::open("libc.so.6").unwrap_err();
        assert!(
            matches!(
                error,
                LoadError::NotLibVmi {
                    function: "vmi_init",
                    ..
                }
            ),
            "{error:?}"
        );
    }
}
