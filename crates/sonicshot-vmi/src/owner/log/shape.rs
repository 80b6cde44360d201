//! The log of a kernel without VMCOREINFO, found by its shape.
//!
//! `struct printk_ringbuffer` is in the kernel's image, and `prb` there points to the one in use
//! (`kernel/printk/printk.c`). It has the same members in every kernel since 5.10: two rings whose
//! sizes are powers of two, that of the text `PRB_AVGBITS` larger, and positions that are no further
//! apart than the rings are long. What its lines say of themselves shows whether it is one: each has
//! its descriptor's identifier before its text, and their numbers have no gap.

use super::{ID, MAX_LINES, Places, Ring, ids_between};
use crate::arch;
use crate::deadline::Deadline;
use crate::error::VmiError;
use crate::kernel::Kernel;
use crate::{KernelVa, VirtualMemory, shape};
use sonicshot::Tally;

/// `PRB_AVGBITS`: there is a descriptor for so much text.
const TEXT_BITS: u32 = 5;
/// Less than 4 KiB of text has no kernel (`CONFIG_LOG_BUF_SHIFT`).
const MIN_BITS: u64 = 12 - TEXT_BITS as u64;
/// The ring of the text, behind that of the descriptors: since 5.18, with one more position, and
/// before.
const TEXT_AT: [usize; 2] = [48, 40];
/// As much of it is read.
const LEN: usize = 80;
/// So much of the image is read at a time: a large page.
const PIECE: u64 = 2 << 20;
/// So many things that look so may be in an image; of more it cannot be told which is the log.
const MAX_FOUND: usize = 16;

/// `struct prb_desc`, `struct printk_info` since 5.10.
const PLACES: Places = Places {
    desc_size: 24,
    state: 0,
    begin: 8,
    next: 16,
    info_size: 88,
    text_len: 16,
    device: 24,
    seq: 0,
    time: 8,
};

/// The ring in use.
///
/// # Errors
/// [`VmiError::Missing`] if nothing in the image is one, or several things are.
pub(super) fn ring<'k, 'm>(kernel: &'k Kernel<'m>) -> Result<Ring<'k, 'm>, VmiError> {
    let missing = |what: &str| VmiError::Missing {
        what: what.into(),
        sources: "the kernel's image".into(),
    };
    let image = shape::image_of(kernel)?.ok_or_else(|| missing("an image of the kernel"))?;
    let deadline = Deadline::new();
    // Found before, and still one.
    let known = kernel.log_ring.get();
    if let Some(ring) = known.and_then(|at| ring_at(kernel, *at, deadline)) {
        return Ok(ring);
    }
    let mut found: Vec<(KernelVa, Ring<'k, 'm>)> = Vec::new();
    each_word(kernel, image, &deadline, &mut |at, word, next| {
        let may_be = (MIN_BITS..64).contains(&word) && next.is_none_or(|next| next >> 63 == 1);
        if may_be
            && is_few(found.len())
            && let Some(ring) = ring_at(kernel, at, deadline)
        {
            found.push((at, ring));
        }
    })?;
    // The one in use may be behind them.
    if !is_few(found.len()) {
        return Err(missing("one log alone"));
    }
    let mut used = vec![false; found.len()];
    each_word(kernel, image, &deadline, &mut |_, word, _| {
        for ((at, _), used) in found.iter().zip(&mut used) {
            *used |= at.raw() == word;
        }
    })?;
    let mut used = used.into_iter();
    found.retain(|_| used.next() == Some(true));
    match (found.pop(), found.pop()) {
        (Some((at, ring)), None) => {
            // Another thread found the same.
            let _ = kernel.log_ring.set(at);
            Ok(ring)
        }
        (None, _) => Err(missing("a log")),
        (Some(_), Some(_)) => Err(missing("one log alone")),
    }
}

/// Calls `visit` with each aligned word of the image, and the word behind it on the same page.
fn each_word(
    kernel: &Kernel<'_>,
    image: (KernelVa, KernelVa),
    deadline: &Deadline,
    visit: &mut dyn FnMut(KernelVa, u64, Option<u64>),
) -> Result<(), VmiError> {
    let page = kernel.page_buffer()?.len();
    let size = kernel.build.page_size.bytes();
    let mut buffer = Vec::new();
    let (mut at, end) = image;
    let begin = at;
    while let Some(left) = end.offset_from(at).filter(|left| *left > 0) {
        if let Some(done) = at.offset_from(begin) {
            let all = Tally::new(done).and(left).get();
            deadline.check("bytes of the kernel's image", done, all)?;
        }
        // What one entry of the page tables maps follows itself in memory.
        let there = kernel.space.translate(at).ok();
        let mapped = there.map_or(size, |there| there.len.min(left).min(PIECE));
        let count = (mapped >> kernel.build.page_size.shift()).max(1);
        let len = usize::try_from(count)
            .ok()
            .and_then(|n| n.checked_mul(page));
        buffer.resize(len.unwrap_or(page), 0);
        let is_there = there.is_some() && kernel.space.read(at, &mut buffer).is_ok();
        let step = if is_there {
            visit_words(at, &buffer, page, visit);
            count.checked_mul(size)
        } else {
            // Not all of it is in the dump: a page at a time.
            buffer.resize(page, 0);
            if there.is_some() && kernel.space.read(at, &mut buffer).is_ok() {
                visit_words(at, &buffer, page, visit);
            }
            Some(size)
        };
        match step.and_then(|step| at.checked_add(step)) {
            Some(next) => at = next,
            None => break,
        }
    }
    Ok(())
}

/// Calls `visit` with each word of whole pages that begin at `at`.
fn visit_words(
    at: KernelVa,
    pages: &[u8],
    page: usize,
    visit: &mut dyn FnMut(KernelVa, u64, Option<u64>),
) {
    let mut here = at;
    for page in pages.chunks_exact(page) {
        let (words, _) = page.as_chunks::<8>();
        let mut words = words
            .iter()
            .map(|word| u64::from_le_bytes(*word))
            .peekable();
        while let Some(word) = words.next() {
            visit(here, word, words.peek().copied());
            here = here.moved_by(8);
        }
    }
}

/// The ring at `at`, if there is one.
fn ring_at<'k, 'm>(
    kernel: &'k Kernel<'m>,
    at: KernelVa,
    deadline: Deadline,
) -> Option<Ring<'k, 'm>> {
    let mut bytes = [0; LEN];
    kernel.space.read(at, &mut bytes).ok()?;
    let word = |at: usize| {
        let bytes = bytes.get(at..)?.first_chunk::<8>()?;
        Some(u64::from_le_bytes(*bytes))
    };
    let arch = arch::of(kernel).ok()?;
    let pointer = |at: usize| {
        let to = word(at).filter(|to| arch.is_pointer(*to) && to.is_multiple_of(8))?;
        kernel.space.translate(KernelVa::new(to)).ok()?;
        Some(KernelVa::new(to))
    };
    // Padding is zero here.
    let count_bits = u32::try_from(word(0)?).ok()?;
    let count = 1_u64.checked_shl(count_bits).filter(|n| *n <= MAX_LINES)?;
    let (descs, infos) = (pointer(8)?, pointer(16)?);
    let (head, tail) = (word(24)?, word(32)?);
    if head > ID || tail > ID || ids_between(tail, head) >= count {
        return None;
    }
    let size_bits = count_bits.checked_add(TEXT_BITS)?;
    let text = |start: usize| {
        let data = pointer(start.checked_add(8)?)?;
        let newest = word(start.checked_add(16)?)?;
        let oldest = word(start.checked_add(24)?)?;
        let fits = word(start) == Some(size_bits.into())
            && KernelVa::new(newest).moved_back_by(oldest).raw() <= 1_u64.checked_shl(size_bits)?;
        fits.then_some(data)
    };
    let ring = Ring {
        kernel,
        descs,
        infos,
        data: TEXT_AT.into_iter().find_map(text)?,
        count_bits,
        size_bits,
        head,
        tail,
        places: PLACES,
        deadline,
    };
    are_lines(&ring).then_some(ring)
}

/// Whether there are lines, numbered as their descriptors are.
fn are_lines(ring: &Ring<'_, '_>) -> bool {
    let mut first = None;
    let mut in_order = true;
    let read = ring.lines_by_id(&mut |id, line| {
        // Below zero where the oldest descriptors have had no line yet.
        let behind = i128::from(ids_between(ring.tail, id));
        let start = i128::from(line.seq).checked_sub(behind);
        in_order = *first.get_or_insert(start) == start;
        in_order
    });
    read.is_ok() && in_order && first.is_some()
}

/// Whether of so many things that look so it may be told which is the log.
const fn is_few(found: usize) -> bool {
    found <= MAX_FOUND
}

#[cfg(test)]
mod tests {
    use super::{MAX_FOUND, is_few};

    #[test]
    fn of_logs_without_end_none_is_the_one() {
        assert!((0..=MAX_FOUND).all(is_few));
        assert!(!is_few(MAX_FOUND + 1));
    }
}
