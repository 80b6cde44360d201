//! The mark that tells that bytes of a disk are still what they were.

use core::fmt;
use core::str::FromStr;
use twox_hash::XxHash3_128;

/// The hash that a checkpoint keeps of what it refers to on a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum DiskHash {
    /// XXH3 with 128 bits: finds accidents.
    #[default]
    Xxh3,
    /// SHA-256 (feature `sha256`): finds what somebody else has written on purpose too.
    Sha256,
}

impl DiskHash {
    /// Its name: `xxh3` or `sha256`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Xxh3 => "xxh3",
            Self::Sha256 => "sha256",
        }
    }

    /// Whether this build can take it.
    #[must_use]
    pub const fn is_available(self) -> bool {
        match self {
            Self::Xxh3 => true,
            Self::Sha256 => cfg!(feature = "sha256"),
        }
    }

    /// The hash of `bytes`, unless this build cannot take it.
    pub(crate) fn of(self, bytes: &[u8]) -> Option<DiskDigest> {
        match self {
            Self::Xxh3 => {
                let mut digest = [0; 32];
                let (low, _) = digest.split_at_mut(16);
                low.copy_from_slice(&XxHash3_128::oneshot(bytes).to_le_bytes());
                Some(DiskDigest(digest))
            }
            #[cfg(feature = "sha256")]
            Self::Sha256 => {
                use sha2::Digest;
                Some(DiskDigest(sha2::Sha256::digest(bytes).into()))
            }
            #[cfg(not(feature = "sha256"))]
            Self::Sha256 => None,
        }
    }
}

impl fmt::Display for DiskHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that is no hash.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{name}` is no hash: xxh3 or sha256")]
pub struct UnknownHash {
    /// The name given.
    pub name: String,
}

impl FromStr for DiskHash {
    type Err = UnknownHash;

    fn from_str(name: &str) -> Result<Self, UnknownHash> {
        let all = [Self::Xxh3, Self::Sha256];
        let found = all.into_iter().find(|hash| hash.name() == name);
        found.ok_or_else(|| UnknownHash { name: name.into() })
    }
}

/// A hash of some bytes, by a [`DiskHash`]: of one with 128 bits the other 16 bytes are zero.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct DiskDigest(pub(crate) [u8; 32]);

impl fmt::Debug for DiskDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for DiskDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::DiskHash;

    #[test]
    fn hashes_are_named_and_known() {
        for (name, expected) in [
            ("xxh3", Some(DiskHash::Xxh3)),
            ("sha256", Some(DiskHash::Sha256)),
            ("md5", None),
            ("", None),
        ] {
            assert_eq!(name.parse().ok(), expected, "{name}");
        }
        // `printf abc | xxh128sum`, `printf abc | sha256sum`.
        let xxh3 = DiskHash::Xxh3.of(b"abc").unwrap().0;
        let low = u128::from_le_bytes(*xxh3.first_chunk().unwrap());
        assert_eq!(low, 0x06b0_5ab6_733a_6185_78af_5f94_892f_3950);
        assert_eq!(xxh3[16..], [0; 16]);
        if DiskHash::Sha256.is_available() {
            assert_eq!(
                DiskHash::Sha256.of(b"abc").unwrap().to_string(),
                "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
            );
        } else {
            assert_eq!(DiskHash::Sha256.of(b"abc"), None);
        }
    }
}
