//! Firecracker's message (its `docs/snapshotting/handling-page-faults-on-snapshot-resume.md`),
//! which others send too: e2b, hypeman, `StratoVirt` with names and a wrapping of its own.
//!
//! One JSON array with one descriptor, on a connection that is closed right after it up to 1.11,
//! and stays open from 1.12 on. Nothing else is ever said.

use super::{Handshake, Mapping, Place};
use crate::address::HostAddress;
use crate::error::ServeError;
use serde::Deserialize;
use serde::de::IgnoredAny;

/// `GuestRegionUffdMapping`. Versions differ in what they send beyond the first three fields.
#[derive(Deserialize)]
struct Region {
    #[serde(alias = "base-host-virt-addr")]
    base_host_virt_addr: u64,
    size: u64,
    /// Its offset in the memory file, which has the regions end to end.
    offset: u64,
    #[serde(alias = "page-size")]
    page_size: Option<u64>,
    /// The older name of `page_size` (1.7 on): bytes too, whatever it says.
    page_size_kib: Option<u64>,
    /// Of the form with a `guest_memfd`.
    gpa_start: Option<IgnoredAny>,
    is_guest_memfd: Option<IgnoredAny>,
}

/// `StratoVirt`'s wrapping.
#[derive(Deserialize)]
struct Wrapped {
    mappings: Vec<Region>,
}

/// Versions that name no page size had small pages only.
const UNTOLD_PAGE: u64 = 4096;

/// Understands a message that came with so many descriptors.
pub(super) fn parse(message: &[u8], descriptors: usize) -> Result<Handshake, ServeError> {
    let wrapped = message.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'{');
    let (form, regions) = if wrapped {
        let wrapped: Wrapped = serde_json::from_slice(message)?;
        ("StratoVirt's", wrapped.mappings)
    } else {
        ("Firecracker's", serde_json::from_slice(message)?)
    };
    let mut secret = regions
        .iter()
        .map(|region| region.gpa_start.is_some() || region.is_guest_memfd.is_some());
    if descriptors == 3 || secret.any(|secret| secret) {
        return Err(ServeError::Form {
            form: "that of Firecracker's branch feature/secret-hiding, with userfaultfd, \
                   guest_memfd and bitmap",
            why: "such memory is filled in another way, and that branch is not released",
        });
    }
    // Up to 1.11, which had no `page_size`, Firecracker asks for these events only if it has a
    // balloon. Nothing else there gives pages back.
    let needs_remove = wrapped || regions.iter().any(|region| region.page_size.is_some());
    let mappings = regions.iter().map(Region::mapping);
    Ok(Handshake {
        form,
        mappings: mappings.collect::<Result<_, _>>()?,
        has_pidfd: false,
        answers: false,
        needs_remove,
    })
}

impl Region {
    fn mapping(&self) -> Result<Mapping, ServeError> {
        let host = HostAddress::new(self.base_host_virt_addr);
        let page = match (self.page_size, self.page_size_kib) {
            (Some(page_size), Some(older)) if page_size != older => {
                return Err(ServeError::PageSizes {
                    at: host,
                    page_size,
                    older,
                });
            }
            (Some(page), _) | (None, Some(page)) => page,
            (None, None) => UNTOLD_PAGE,
        };
        Ok(Mapping {
            host,
            len: self.size,
            place: Place::Offset(self.offset),
            page,
        })
    }
}
