//! The version of the LibVMI that was loaded.

use crate::Functions;
use core::ffi::{CStr, c_void};
use core::fmt;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// The version of the LibVMI that was loaded, as far as it tells: it has no function that says so.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Version {
    /// The file that was loaded, links followed; `None` if the loader does not say.
    pub file: Option<PathBuf>,
    /// The version behind `.so.` in that file's name, such as `0.0.15` of LibVMI 0.15.
    pub number: Option<String>,
    /// `VMI_EVENTS_VERSION`: 7 in 0.14.0, 9 in January 2026.
    pub events: Option<u32>,
    /// Whether pages can be mapped (`vmi_mmap_guest_pa`, August 2024).
    pub maps_pages: bool,
}

impl Version {
    pub(crate) fn of(functions: &Functions) -> Self {
        let file = file_of(functions.vmi_init as *const c_void);
        Self {
            number: file.as_deref().and_then(number_of),
            file,
            // SAFETY: it takes nothing and only returns a constant.
            events: functions.vmi_events_version.map(|f| unsafe { f() }),
            maps_pages: functions.vmi_mmap_guest_pa.is_some(),
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.number {
            Some(number) => write!(f, "{number}")?,
            None => write!(f, "of unknown version")?,
        }
        if let Some(events) = self.events {
            write!(f, ", events {events}")?;
        }
        match self.maps_pages {
            true => write!(f, ", maps pages"),
            false => write!(f, ", maps no pages"),
        }
    }
}

/// The file that the code at `function` was loaded from.
fn file_of(function: *const c_void) -> Option<PathBuf> {
    // SAFETY: all of its fields may be zero, and null.
    let mut info: libc::Dl_info = unsafe { core::mem::zeroed() };
    // SAFETY: any address may be asked for; `info` has room for the answer.
    if unsafe { libc::dladdr(function, &raw mut info) } == 0 || info.dli_fname.is_null() {
        return None;
    }
    // SAFETY: the loader's own string, which lives as long as the library: longer than this call.
    let name = unsafe { CStr::from_ptr(info.dli_fname) };
    let path = Path::new(OsStr::from_bytes(name.to_bytes()));
    Some(path.canonicalize().unwrap_or_else(|_| path.to_owned()))
}

/// The text behind `.so.` in the file's name.
fn number_of(file: &Path) -> Option<String> {
    let (_, number) = file.file_name()?.to_str()?.rsplit_once(".so.")?;
    let numeric = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    number.split('.').all(numeric).then(|| number.to_owned())
}

#[cfg(test)]
mod tests {
    use super::{Version, number_of};
    use std::path::Path;

    #[test]
    fn the_version_is_what_the_file_is_called() {
        for (file, number) in [
            ("/usr/lib/libvmi.so.0.0.15", Some("0.0.15")),
            ("/usr/lib/libvmi.so.0", Some("0")),
            ("/usr/lib/libvmi.so", None),
            ("/usr/lib/libvmi.so.0.x", None),
            ("/usr/lib/libvmi.so.", None),
            ("/", None),
        ] {
            assert_eq!(number_of(Path::new(file)).as_deref(), number, "{file}");
        }
        let version = |number: Option<&str>| Version {
            file: None,
            number: number.map(str::to_owned),
            events: number.map(|_| 9),
            maps_pages: number.is_some(),
        };
        assert_eq!(
            version(Some("0.0.15")).to_string(),
            "0.0.15, events 9, maps pages"
        );
        assert_eq!(
            version(None).to_string(),
            "of unknown version, maps no pages"
        );
    }
}
