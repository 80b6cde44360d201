//! Guests of every page size: what is saved comes back by every way there is.

use sonicshot::checkpoint::*;
use sonicshot::*;

const SIZES: [PageSize; 3] = [PageSize::SIZE_4K, PageSize::SIZE_16K, PageSize::SIZE_64K];
const POISON: u8 = 0xaa;

/// A guest whose RAM begins and ends inside of pages, with a class for each frame.
struct Guest {
    page_size: PageSize,
    regions: Vec<(Gpa, Vec<u8>)>,
    map: PageMap,
    plan: PrunePlan,
}

/// Fills in the content of a page of a class: free pages hold garbage.
fn content(pfn: u64, state: PageState, page: &mut [u8]) {
    match state.is_zero() {
        true => page.fill(0),
        // Every fourth is the same as the one before.
        false => {
            for (word, at) in page.chunks_mut(8).zip(0_u64..) {
                let value = ((pfn & !3) | 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (at / 3);
                word.copy_from_slice(&value.to_le_bytes()[..word.len()]);
            }
        }
    }
}

fn state_of(pfn: u64) -> PageState {
    match pfn % 11 {
        2..=4 => PageClass::FreeBuddy.into(),
        6 => PageState::new(PageClass::Slab).with_zero(),
        8 => PageClass::Slab.into(),
        _ => PageClass::Anonymous.into(),
    }
}

impl Guest {
    fn new(page_size: PageSize) -> Self {
        let page = page_size.bytes();
        // The first region begins and the second ends inside of a page.
        let ranges = [
            (3 * page - 0x803, 40 * page),
            (64 * page, 93 * page + 0x1000 / 2),
        ];
        let mut regions = Vec::new();
        for (start, end) in ranges {
            let mut bytes = Vec::new();
            let mut at = start;
            while at < end {
                let next = ((at / page + 1) * page).min(end);
                let mut whole = vec![0; page as usize];
                content(at / page, state_of(at / page), &mut whole);
                let from = (at % page) as usize;
                bytes.extend(&whole[from..from + (next - at) as usize]);
                at = next;
            }
            regions.push((Gpa::new(start), bytes));
        }
        let layout = RamLayout::new(
            ranges
                .iter()
                .map(|(start, end)| GpaRange::new(Gpa::new(*start), Gpa::new(*end)))
                .collect(),
        );
        let mut map = PageMap::new(&layout.unwrap(), page_size);
        for frames in map.ram().to_vec() {
            for pfn in frames.iter() {
                let one = PfnRange::with_len(pfn, 1).unwrap();
                map.set(one, state_of(pfn.raw()));
            }
        }
        let plan = PrunePlan::new(&map, &DropClasses::default(), Fill::Byte(POISON));
        Self {
            page_size,
            regions,
            map,
            plan,
        }
    }

    fn memory(&self) -> MappedRegions<'_> {
        let regions = self.regions.iter();
        let regions = regions.map(|(at, bytes)| (*at, GuestBytes::from_slice(bytes)));
        MappedRegions::new(regions.collect()).unwrap()
    }

    fn save(&self, compression: Compression) -> Vec<u8> {
        let memory = self.memory();
        let info = CheckpointInfo::new(memory.layout().clone(), self.page_size);
        let options = SaveOptions::new(compression);
        let mut writer = CheckpointWriter::new(Vec::new(), info, options).unwrap();
        writer.memory(&memory, &self.map, &self.plan).unwrap();
        writer.finish().unwrap().0
    }

    /// The regions as they are restored.
    fn expected(&self) -> Vec<(Gpa, Vec<u8>)> {
        let mut regions = self.regions.clone();
        for (at, bytes) in &mut regions {
            let whole = GpaRange::with_len(*at, bytes.len() as u64).unwrap();
            for dropped in self.plan.dropped_in(whole) {
                let frames = dropped.whole_frames(self.page_size);
                let zero = self.map.state(frames.start()).unwrap().is_zero();
                let start = dropped.start().offset_from(*at).unwrap() as usize;
                bytes[start..start + dropped.len() as usize].fill(if zero { 0 } else { POISON });
            }
        }
        regions
    }
}

fn codecs() -> impl Iterator<Item = Compression> {
    [Compression::None, Compression::Lz4, Compression::ZSTD]
        .into_iter()
        .filter(|codec| codec.is_available())
}

#[test]
fn a_guest_of_any_page_size_comes_back() {
    for page_size in SIZES {
        let guest = Guest::new(page_size);
        assert!(guest.plan.dropped_pages() > 10);
        for codec in codecs() {
            let checkpoint = CheckpointReader::new(guest.save(codec)).unwrap();
            checkpoint.verify(&WorkOptions::new()).unwrap();
            checkpoint
                .verify_against(&guest.memory(), &WorkOptions::new())
                .unwrap();
            assert_eq!(checkpoint.page_map(), guest.map);
            for before in [Before::Zeroes, Before::Anything] {
                let fill = u8::from(before == Before::Anything);
                let mut back: Vec<(Gpa, Vec<u8>)> = guest
                    .regions
                    .iter()
                    .map(|(at, bytes)| (*at, vec![fill; bytes.len()]))
                    .collect();
                let target = back.iter_mut().map(|(at, bytes)| (*at, &mut bytes[..]));
                let target = RestoreRegions::new(target.collect(), before).unwrap();
                checkpoint.restore(&target, &RestoreOptions::new()).unwrap();
                drop(target);
                assert!(back == guest.expected(), "{page_size:?} {codec} {before:?}");
            }
            for (at, bytes) in guest.expected() {
                let mut read = vec![1; bytes.len()];
                checkpoint.read(at, &mut read).unwrap();
                assert!(read == bytes, "{page_size:?} {codec}");
            }
        }
    }
}

#[cfg(feature = "mmap")]
#[test]
#[expect(unsafe_code, reason = "what is mapped is looked at")]
fn a_guest_of_any_page_size_is_mapped() {
    for page_size in SIZES {
        let guest = Guest::new(page_size);
        for codec in codecs() {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            std::io::Write::write_all(&mut file, &guest.save(codec)).unwrap();
            let checkpoint = CheckpointReader::open(file.path()).unwrap();
            let memory = checkpoint.map_private(MapOptions::default()).unwrap();
            for (at, expected) in guest.expected() {
                let start = memory.address(at).unwrap();
                // SAFETY: the region is mapped and nobody writes it.
                let found = unsafe { std::slice::from_raw_parts(start.as_ptr(), expected.len()) };
                assert!(found == expected, "{page_size:?} {codec}");
            }
        }
    }
}
