//! The kernel's image: where it lies, and what it points to.

use crate::arch::{Arch, MIN_PAGE, Tables, by_name};
use crate::{AddressSpace, KernelVa};
use sonicshot::{Gpa, GuestMemory, to_u64, to_usize};
use std::collections::HashSet;

/// The pages that the kernel with these page tables points to from the writable part of its
/// image, which begins with `swapper_pg_dir`: its own VMCOREINFO is one of them
/// (`vmcoreinfo_data`), a page of a process is not.
pub(super) fn pointed_to(memory: &dyn GuestMemory, tables: &Tables) -> HashSet<Gpa> {
    const PIECE: usize = 64 << 10;
    let (Ok(arch), Ok(space)) = (by_name(tables.architecture), tables.space(memory)) else {
        return HashSet::new();
    };
    let (mut at, end) = image_range(arch, &space, tables.page_table);
    let mut pointers = Vec::new();
    let mut buffer = vec![0; PIECE];
    while let Some(left) = end.offset_from(at).filter(|left| *left > 0) {
        let there = space.translate(at).ok();
        let len = there.map_or(to_u64(MIN_PAGE), |there| there.len);
        let len = len.min(to_u64(buffer.len())).min(left);
        if let Some(there) = there
            && let Some(part) = buffer.get_mut(..to_usize(len))
            && memory.read(there.at, part).is_ok()
        {
            let (words, _) = part.as_chunks::<8>();
            pointers.extend(
                words
                    .iter()
                    .map(|word| u64::from_le_bytes(*word))
                    .filter(|word| arch.may_point_to_page(*word)),
            );
        }
        at = match at.checked_add(len) {
            Some(next) if len > 0 => next,
            _ => break,
        };
    }
    pointers.sort_unstable();
    pointers.dedup();
    let there = |pointer| space.translate(KernelVa::new(pointer)).ok();
    pointers
        .into_iter()
        .filter_map(there)
        .map(|there| there.at)
        .collect()
}

/// The virtual addresses of the kernel's image, from its start as far as it is mapped.
pub(crate) fn image_range(
    arch: &dyn Arch,
    space: &AddressSpace<'_>,
    stext: KernelVa,
) -> (KernelVa, KernelVa) {
    /// The image has unmapped gaps between its sections, of up to one large page each.
    const LARGEST_GAP: u64 = 8 << 20;
    let image = arch.image();
    let inside = image.align.checked_sub(1);
    let start = inside.map_or(stext, |inside| KernelVa::new(stext.raw() & !inside));
    let limit = start.checked_add(image.max_len).unwrap_or(start);
    let mut at = start;
    let mut end = start;
    while at < limit && at.offset_from(end).is_none_or(|gap| gap <= LARGEST_GAP) {
        let step = match space.translate(at) {
            Ok(there) => {
                let next = at.checked_add(there.len).unwrap_or(limit);
                end = next.min(limit);
                there.len
            }
            Err(_) => to_u64(MIN_PAGE),
        };
        at = at.checked_add(step).unwrap_or(limit);
    }
    (start, end)
}

#[cfg(test)]
mod tests {
    use super::image_range;
    use crate::KernelVa;
    use crate::arch::x86_64::X86_64;
    use crate::kernel::testing::{Ram, tables};

    /// Behind a gap of at most four large pages an image goes on.
    #[test]
    fn an_image_ends_before_a_gap_that_is_larger_than_any() {
        const LEN: usize = 8 << 20;
        const LARGE: u64 = 2 << 20;
        let text = KernelVa::new(0xffff_ffff_8000_0000);
        for (gap, whole) in [(0, true), (4, true), (5, false)] {
            let mut ram = Ram::new(LEN);
            ram.put(LEN as u64 - 0x3000 + 511 * 8, 0x4000 | 0x63);
            ram.put(0x4000 + 510 * 8, 0x5000 | 0x63);
            ram.put(0x5000, 0xe3);
            ram.put(0x5000 + (1 + gap) * 8, LARGE | 0xe3);
            let memory = ram.memory();
            let space = tables(LEN as u64).space(&memory).unwrap();
            let (start, end) = image_range(&X86_64, &space, text);
            let large_pages = if whole { 2 + gap } else { 1 };
            assert_eq!(
                (start, end),
                (text, text.checked_add(large_pages * LARGE).unwrap())
            );
        }
    }
}
