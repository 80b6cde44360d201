//! The guest that is served, as `examples/vm_client.rs` knows it.

use sonicshot::checkpoint::{
    CheckpointInfo, CheckpointReader, CheckpointWriter, Compression, SaveOptions,
};
use sonicshot::{
    DropClasses, Fill, Gpa, GpaRange, GuestBytes, GuestMemory, MappedRegions, PageClass, PageMap,
    PageSize, Pfn, PfnRange, PrunePlan, RamLayout,
};
use std::fs::File;
use tempfile::NamedTempFile;

pub const PAGE: usize = 4096;
/// The start of RAM, and the number of its pages.
pub const REGIONS: [(u64, usize); 2] = [(0, 1024), (4 << 30, 2048)];
pub const PAGES: usize = REGIONS[0].1 + REGIONS[1].1;

/// The content of a page: most are kept, every fifth range is free, every seventh zero.
pub fn expected(page: usize) -> [u8; PAGE] {
    let mut bytes = [0; PAGE];
    if !is_free(page) && page / 13 % 7 != 2 {
        for (number, word) in bytes.chunks_exact_mut(8).enumerate() {
            let value = (page as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number as u64;
            word.copy_from_slice(&value.to_le_bytes());
        }
    }
    bytes
}

fn is_free(page: usize) -> bool {
    page / 11 % 5 == 3
}

pub fn layout() -> RamLayout {
    let range = |(start, pages): (u64, usize)| {
        GpaRange::with_len(Gpa::new(start), (pages * PAGE) as u64).unwrap()
    };
    RamLayout::new(REGIONS.map(range).to_vec()).unwrap()
}

/// The guest as it was saved; its free pages hold garbage.
pub fn save(compression: Compression) -> NamedTempFile {
    let mut ram = vec![0xaa; PAGES * PAGE];
    for (page, bytes) in ram.chunks_exact_mut(PAGE).enumerate() {
        if !is_free(page) {
            bytes.copy_from_slice(&expected(page));
        }
    }
    let (low, high) = ram.split_at(REGIONS[0].1 * PAGE);
    let guest = MappedRegions::new(vec![
        (Gpa::new(REGIONS[0].0), GuestBytes::from_slice(low)),
        (Gpa::new(REGIONS[1].0), GuestBytes::from_slice(high)),
    ])
    .unwrap();
    let mut map = PageMap::new(guest.layout(), PageSize::SIZE_4K);
    let frames: Vec<PfnRange> = guest.layout().frames(PageSize::SIZE_4K).collect();
    for (page, pfn) in frames.iter().flat_map(PfnRange::iter).enumerate() {
        if is_free(page) {
            let next = Pfn::new(pfn.raw() + 1);
            map.set(PfnRange::new(pfn, next), PageClass::FreeBuddy);
        }
    }
    let plan = PrunePlan::new(&map, &DropClasses::default(), Fill::Zero);
    let file = NamedTempFile::new().unwrap();
    let info = CheckpointInfo::new(layout(), PageSize::SIZE_4K);
    let options = SaveOptions::new(compression);
    let mut writer = CheckpointWriter::new(file.reopen().unwrap(), info, options).unwrap();
    writer.memory(&guest, &map, &plan).unwrap();
    writer.finish().unwrap();
    file
}

pub fn open(file: &NamedTempFile) -> CheckpointReader<File> {
    CheckpointReader::open(file.path()).unwrap()
}
