//! The RAM map of the firmware or the VMM, as the boot loader handed it to the kernel: found in memory
//! whose layout is not known, before any kernel is.
//!
//! Linux keeps what it was handed, `struct boot_params` with the table of the e820 map
//! (`arch/x86/include/uapi/asm/bootparam.h`), wherever it was loaded. What is found here, which
//! may be of a kernel that is gone, is only worth a try: the kernel's own map decides.

use sonicshot::{Gpa, GpaRange, GuestMemory, to_u64, to_usize};

/// `HdrS`, in the header of every kernel since 2.00 of the boot protocol.
const MARK: &[u8] = b"HdrS";
/// The offset of the mark in `struct boot_params`, and what stands before it: the end of a boot sector.
const MARK_AT: usize = 0x202;
const SECTOR_END: (usize, [u8; 2]) = (0x1fe, [0x55, 0xaa]);
/// The number of entries of the table, and the table.
const COUNT_AT: usize = 0x1e8;
const TABLE_AT: usize = 0x2d0;
const MAX_ENTRIES: usize = 128;
const ENTRY: usize = 20;
const LEN: usize = 0x1000;
const RAM: u32 = 1;

/// Memory is looked through in pieces of this size.
const PIECE: u64 = 1 << 20;
/// So many maps are worth a try.
const MAX_MAPS: usize = 8;

/// The maps that are in `memory`, each once: the ranges of RAM.
pub(super) fn maps(memory: &dyn GuestMemory) -> Vec<Vec<GpaRange>> {
    let mut maps: Vec<Vec<GpaRange>> = Vec::new();
    let mut buffer = Vec::new();
    let finder = memchr::memmem::Finder::new(MARK);
    for region in memory.layout().regions() {
        let mut at = region.start();
        // Each turn goes on by a piece.
        while let Some(data) = memory
            .next_data(at)
            .filter(|data| data.start() < region.end())
        {
            let start = data.start().max(at);
            // What begins in this piece may reach into the next.
            const LONGEST: u64 = PIECE + to_u64(LEN);
            let looked_at = GpaRange::new(start, region.end()).up_to(LONGEST);
            buffer.resize(to_usize(looked_at.len()), 0);
            if memory.read(start, &mut buffer).is_ok() {
                for mark in finder.find_iter(&buffer) {
                    let map = map_at(&buffer, mark).filter(|map| !maps.contains(map));
                    maps.extend(map);
                    if maps.len() >= MAX_MAPS {
                        return maps;
                    }
                }
            }
            let Some(next) = start.checked_add(PIECE) else {
                break;
            };
            memory.release(GpaRange::new(start, next.min(region.end())));
            at = next;
        }
    }
    maps
}

/// The map in the structure whose mark is at `mark`, if it is one.
fn map_at(bytes: &[u8], mark: usize) -> Option<Vec<GpaRange>> {
    let params = bytes.get(mark.checked_sub(MARK_AT)?..)?;
    let (end_at, end) = SECTOR_END;
    if params.get(end_at..)?.first_chunk() != Some(&end) {
        return None;
    }
    let count = usize::from(*params.get(COUNT_AT)?);
    if count == 0 || count > MAX_ENTRIES {
        return None;
    }
    let table = params.get(TABLE_AT..)?;
    let mut ram = Vec::new();
    for entry in table.chunks_exact(ENTRY).take(count) {
        let (start, rest) = entry.split_first_chunk()?;
        let (len, kind) = rest.split_first_chunk()?;
        let range = GpaRange::with_len(
            Gpa::new(u64::from_le_bytes(*start)),
            u64::from_le_bytes(*len),
        )?;
        if u32::from_le_bytes(*kind.first_chunk()?) == RAM {
            ram.push(range);
        }
    }
    ram.sort_unstable();
    (!ram.is_empty()).then_some(ram)
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::indexing_slicing,
        reason = "tests may stop anywhere"
    )]

    use super::maps;
    use sonicshot::{Gpa, GpaRange, GuestBytes, MappedRegions};

    fn put(memory: &mut [u8], at: usize, entries: &[(u64, u64, u32)]) {
        let params = &mut memory[at..];
        params[0x1e8] = u8::try_from(entries.len()).unwrap();
        params[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        params[0x202..0x206].copy_from_slice(b"HdrS");
        for (number, (start, len, kind)) in entries.iter().enumerate() {
            let entry = &mut params[0x2d0 + number * 20..];
            entry[..8].copy_from_slice(&start.to_le_bytes());
            entry[8..16].copy_from_slice(&len.to_le_bytes());
            entry[16..20].copy_from_slice(&kind.to_le_bytes());
        }
    }

    #[test]
    fn maps_are_found_wherever_they_lie() {
        const MIB: u64 = 1 << 20;
        let split = [
            (0, 0x9_fc00, 1),
            (0x9_fc00, 0x400, 2),
            (MIB, 127 * MIB, 1),
            (1 << 32, 64 * MIB, 1),
        ];
        let flat = [(0, MIB, 1)];
        let mut memory = vec![0; 3 << 20];
        // Across the end of a piece; again; one without entries; one that is cut off by the end.
        put(&mut memory, (1 << 20) - 0x204, &split);
        put(&mut memory, 0x1_5678, &flat);
        put(&mut memory, 0x21_0000, &flat);
        put(&mut memory, 0x22_0000, &[]);
        let end = memory.len() - 0x206;
        memory[end + 0x1e8] = 5;
        memory[end + 0x202..].copy_from_slice(b"HdrS");
        memory[0x23_0000..0x23_0004].copy_from_slice(b"HdrS");
        let regions = vec![(Gpa::ZERO, GuestBytes::from_slice(&memory))];
        let found = maps(&MappedRegions::new(regions).unwrap());
        let ranges = |map: &[(u64, u64, u32)]| -> Vec<GpaRange> {
            let ram = map.iter().filter(|entry| entry.2 == 1);
            ram.map(|(start, len, _)| GpaRange::with_len(Gpa::new(*start), *len).unwrap())
                .collect()
        };
        assert_eq!(found, [ranges(&flat), ranges(&split)]);

        // More entries than a table has, and more tables than are worth a try.
        let mut memory = vec![0; 1 << 20];
        put(&mut memory, 0, &[(0, MIB, 1); 129]);
        for number in 1..10 {
            put(&mut memory, number * 0x2000, &[(0, number as u64 * MIB, 1)]);
        }
        let regions = vec![(Gpa::ZERO, GuestBytes::from_slice(&memory))];
        let found = maps(&MappedRegions::new(regions).unwrap());
        assert_eq!(found.len(), 8);
        assert_eq!(found[0], ranges(&[(0, MIB, 1)]));
    }
}
