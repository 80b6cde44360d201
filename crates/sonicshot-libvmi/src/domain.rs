//! The guest to open.

use crate::LibVmiError;
use core::fmt;
use core::str::FromStr;
use std::path::{Path, PathBuf};

/// A guest, and through what LibVMI reads it.
///
/// ```
/// use sonicshot_libvmi::Domain;
/// let domain: Domain = "xen:debian12".parse()?;
/// assert_eq!(domain, Domain::Xen("debian12".into()));
/// assert_eq!(domain.to_string(), "xen:debian12");
/// assert!("debian12".parse::<Domain>().is_err());
/// # Ok::<(), sonicshot_libvmi::LibVmiError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Domain {
    /// A domain of Xen, by its name, or its number if it has digits alone.
    Xen(String),
    /// A guest of KVM.
    Kvm {
        /// Its name, as libvirt or KVMI has it.
        name: String,
        /// The socket at which QEMU offers introspection (KVMI); `None` of the driver that asks
        /// QEMU's monitor.
        socket: Option<PathBuf>,
    },
    /// A file with a guest's memory from address 0 on, with its holes.
    File(PathBuf),
}

impl Domain {
    /// The same guest of KVM, reached at this socket; of others it changes nothing.
    #[must_use]
    pub fn at_socket(self, path: impl AsRef<Path>) -> Self {
        match self {
            Self::Kvm { name, .. } => Self::Kvm {
                name,
                socket: Some(path.as_ref().to_owned()),
            },
            other => other,
        }
    }

    /// The driver that reads it, for people.
    #[must_use]
    pub const fn driver(&self) -> &'static str {
        match self {
            Self::Xen(_) => "Xen",
            Self::Kvm { .. } => "KVM",
            Self::File(_) => "file",
        }
    }
}

impl FromStr for Domain {
    type Err = LibVmiError;

    fn from_str(text: &str) -> Result<Self, LibVmiError> {
        match text.split_once(':') {
            Some((_, "")) | None => Err(LibVmiError::Domain { text: text.into() }),
            Some(("xen", name)) => Ok(Self::Xen(name.into())),
            Some(("kvm", name)) => Ok(Self::Kvm {
                name: name.into(),
                socket: None,
            }),
            Some(("file", path)) => Ok(Self::File(path.into())),
            Some(_) => Err(LibVmiError::Domain { text: text.into() }),
        }
    }
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Xen(name) => write!(f, "xen:{name}"),
            Self::Kvm { name, .. } => write!(f, "kvm:{name}"),
            Self::File(path) => write!(f, "file:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Domain;

    #[test]
    fn a_guest_is_named_with_what_reads_it() {
        for text in ["xen:a", "xen:7", "kvm:a:b", "file:/a:b"] {
            assert_eq!(text.parse::<Domain>().unwrap().to_string(), text);
        }
        for text in ["", "a", "xen", "xen:", "qemu:a", ":a"] {
            let error = text.parse::<Domain>().unwrap_err().to_string();
            assert!(error.contains("xen:NAME"), "{error}");
        }
        let kvm: Domain = "kvm:a".parse().unwrap();
        let at = kvm.at_socket("/run/kvmi");
        assert!(matches!(
            at,
            Domain::Kvm {
                socket: Some(_),
                ..
            }
        ));
    }
}
