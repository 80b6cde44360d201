//! The words of the kernel's image.

use super::heads::Look;
use crate::KernelVa;
use crate::error::VmiError;
use sonicshot::{Gpa, GuestBytes};

/// Where the page of the kernel's image at `at` is, if it still is the kernel's: it has given back what
/// it needs no more once it is up, and that may be anybody's.
fn kept(look: &Look<'_, '_>, at: KernelVa, record: &mut [u8]) -> Option<Gpa> {
    let map = look.heads.map;
    let there = look.heads.space.translate(at).ok()?.at;
    map.copy_page(map.page_va(there.pfn(map.page_size))?, record)
        .ok()?;
    let page = GuestBytes::from_slice(record);
    look.layout.is_kept_since_boot(&page).then_some(there)
}

/// Whether `at` is in the kernel's image, and still the kernel's.
pub(super) fn is_inside(look: &Look<'_, '_>, at: KernelVa) -> Result<bool, VmiError> {
    let mut record = vec![0; look.heads.map.stride_len()?];
    let (start, end) = look.image;
    Ok((start..end).contains(&at) && kept(look, at, &mut record).is_some())
}

/// Calls `visit` with each aligned word of the kernel's image that still is the kernel's.
pub(super) fn each_word(
    look: &Look<'_, '_>,
    visit: &mut dyn FnMut(u64) -> Result<(), VmiError>,
) -> Result<(), VmiError> {
    let size = look.heads.map.page_size.bytes();
    let mut record = vec![0; look.heads.map.stride_len()?];
    let mut page = vec![0; usize::try_from(size).unwrap_or(0)];
    let (mut at, end) = look.image;
    while at < end {
        if let Some(there) = kept(look, at, &mut record)
            && look.heads.space.memory().read(there, &mut page).is_ok()
        {
            let (words, _) = page.as_chunks::<8>();
            for word in words {
                visit(u64::from_le_bytes(*word))?;
            }
        }
        match at.checked_add(size) {
            Some(next) => at = next,
            None => break,
        }
    }
    Ok(())
}
