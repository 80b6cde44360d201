//! The words of the kernel's image.

use super::heads::Look;
use crate::KernelVa;
use crate::error::VmiError;
use sonicshot::{Gpa, GuestBytes, PageSize, to_usize};

/// The guest-physical address of the page of the kernel's image at `at`, if it still is the kernel's:
/// the kernel has given back what it needs no more once it is up, and that may be anybody's.
fn kept(look: &Look<'_, '_>, at: KernelVa, record: &mut [u8]) -> Option<Gpa> {
    let map = look.heads.map;
    let there = look.heads.space.translate(at).ok()?.at;
    map.copy_pages(map.page_va(there.pfn(map.page_size))?, record)
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

/// So much of the image is read at a time: a large page.
const PIECE: u64 = 2 << 20;

/// The visitor of the words of each page, with their address: there are millions of words.
type Visit<'a> = dyn FnMut(KernelVa, &[[u8; 8]]) -> Result<(), VmiError> + 'a;

/// Calls `visit` with the aligned words of each page of the kernel's image that still is the kernel's.
pub(super) fn each_page(look: &Look<'_, '_>, visit: &mut Visit<'_>) -> Result<(), VmiError> {
    let (space, map) = (look.heads.space, look.heads.map);
    let size = map.page_size.bytes();
    let mut buffers = Buffers::default();
    let (mut at, end) = look.image;
    while let Some(left) = end.offset_from(at).filter(|left| *left > 0) {
        let there = space.translate(at).ok();
        let count = pages_in_piece(there.map(|there| there.len.min(left)), map.page_size);
        if let Some(there) = there
            && !buffers.words(look, (at, there.at), count, visit)?
        {
            // Not all of it is there: a page at a time.
            for number in 0..count {
                let bytes = number.checked_mul(size);
                let page = bytes.and_then(|bytes| {
                    let page = at.checked_add(bytes)?;
                    Some((page, there.at.checked_add(bytes)?))
                });
                if let Some(page) = page {
                    buffers.words(look, page, 1, visit)?;
                }
            }
        }
        let step = count.checked_mul(size);
        match step.and_then(|step| at.checked_add(step)) {
            Some(next) => at = next,
            None => break,
        }
    }
    Ok(())
}

/// The number of pages that are looked at together where so much follows itself in memory.
fn pages_in_piece(len: Option<u64>, page_size: PageSize) -> u64 {
    let len = len.filter(|len| *len < PIECE).or(len.map(|_| PIECE));
    let pages = len.map(|len| len >> page_size.shift());
    // Where nothing is, or less than a page, there is a page to pass over.
    pages.filter(|pages| *pages > 0).unwrap_or(1)
}

/// Room for a piece of the image, and for its struct pages.
#[derive(Default)]
struct Buffers {
    pages: Vec<u8>,
    records: Vec<u8>,
}

impl Buffers {
    /// Visits the words of `count` pages from `at` on, which lie at `there`, of those that still are
    /// the kernel's. Returns whether the pages and their struct pages are there.
    fn words(
        &mut self,
        look: &Look<'_, '_>,
        (at, there): (KernelVa, Gpa),
        count: u64,
        visit: &mut Visit<'_>,
    ) -> Result<bool, VmiError> {
        let map = look.heads.map;
        let stride = map.stride_len()?;
        let size = map.page_size.size();
        let lens = size.checked_mul(to_usize(count));
        let lens = lens.zip(stride.checked_mul(to_usize(count)));
        let (Some((pages, records)), Some(others)) = (lens, count.checked_sub(1)) else {
            return Ok(false);
        };
        let pages = room(&mut self.pages, pages);
        let records = room(&mut self.records, records);
        // Of one section, where they follow each other.
        let first = there.pfn(map.page_size);
        let last = first.checked_add(others);
        let record = map.page_va(first).filter(|record| {
            let end = last.and_then(|last| map.page_va(last)?.offset_from(*record));
            let len = others.checked_mul(map.stride);
            end.is_some() && end == len
        });
        let is_there = record.is_some_and(|at| map.copy_pages(at, records).is_ok())
            && look.heads.space.memory().read(there, pages).is_ok();
        if !is_there {
            return Ok(false);
        }
        let records = records.chunks_exact(stride);
        let pages = (0..).step_by(size).zip(pages.chunks_exact(size));
        for (record, (offset, page)) in records.zip(pages) {
            if look
                .layout
                .is_kept_since_boot(&GuestBytes::from_slice(record))
            {
                let (words, _) = page.as_chunks::<8>();
                if let Some(at) = at.checked_add(offset) {
                    visit(at, words)?;
                }
            }
        }
        Ok(true)
    }
}

/// The first `len` bytes of a buffer, which grows and never shrinks.
fn room(buffer: &mut Vec<u8>, len: usize) -> &mut [u8] {
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    let (start, _) = buffer.split_at_mut(len);
    start
}
