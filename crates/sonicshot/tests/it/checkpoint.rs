//! Checkpoints through the public API: what is written comes back, whatever the memory looks
//! like; damage is always found; nothing of a hostile file is believed.

use proptest::prelude::*;
use sonicshot::checkpoint::*;
use sonicshot::*;
use std::num::NonZeroUsize;

const PAGE: usize = 4096;

/// A guest whose pages hold what a test says.
struct Guest {
    layout: RamLayout,
    regions: Vec<(Gpa, Vec<u8>)>,
    classes: Vec<PageState>,
    /// Frames that the source has no bytes for.
    absent: Vec<Pfn>,
}

impl GuestMemory for Guest {
    fn layout(&self) -> &RamLayout {
        &self.layout
    }

    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        let range = GpaRange::with_len(at, buf.len() as u64).unwrap();
        for pfn in &self.absent {
            let frame = PfnRange::with_len(*pfn, 1).unwrap();
            let frame = frame.gpa_range(PageSize::SIZE_4K).unwrap();
            if !frame.intersection(&range).is_empty() {
                return Err(MemoryError::Absent { range });
            }
        }
        for (start, bytes) in &self.regions {
            let Some(offset) = at.offset_from(*start) else {
                continue;
            };
            if let Some(part) = bytes.get(offset as usize..offset as usize + buf.len()) {
                buf.copy_from_slice(part);
                return Ok(());
            }
        }
        Err(MemoryError::NotRam { range })
    }
}

/// A page's content by a small number.
fn page(kind: u8, seed: u64) -> Vec<u8> {
    match kind {
        0 => vec![0; PAGE],
        1 => vec![0xaa; PAGE],
        2 => seed.to_le_bytes().repeat(PAGE / 8),
        // Few different ones, so that some are the same.
        3 => noise(seed % 3),
        4 => noise(seed),
        _ => {
            let mut page = vec![0; PAGE];
            page[usize::try_from(seed).unwrap_or(7) % PAGE] = 1;
            page
        }
    }
}

fn noise(seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..PAGE / 8)
        .flat_map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        })
        .collect()
}

/// Two regions: the lower with a ragged end if `ragged`.
fn guest(pages: &[(u8, u64, u8)], ragged: bool) -> Guest {
    let split = pages.len() / 2;
    let (low, high) = pages.split_at(split);
    let bytes = |pages: &[(u8, u64, u8)]| -> Vec<u8> {
        pages
            .iter()
            .flat_map(|(kind, seed, _)| page(*kind, *seed))
            .collect()
    };
    let mut regions = vec![(Gpa::ZERO, bytes(low)), (Gpa::new(1 << 32), bytes(high))];
    if ragged && !low.is_empty() {
        let len = regions[0].1.len();
        regions[0].1.truncate(len - 1000);
    }
    regions.retain(|(_, bytes)| !bytes.is_empty());
    let layout = RamLayout::new(
        regions
            .iter()
            .map(|(at, bytes)| GpaRange::with_len(*at, bytes.len() as u64).unwrap())
            .collect(),
    )
    .unwrap();
    let class = |n: &u8| {
        [
            PageClass::Kernel,
            PageClass::FreeBuddy,
            PageClass::Anonymous,
            PageClass::Slab,
        ][usize::from(n % 4)]
    };
    Guest {
        layout,
        regions,
        classes: pages
            .iter()
            .map(|(kind, _, c)| match PageState::new(class(c)) {
                page if *kind == 0 && page.class() == PageClass::Slab => page.with_zero(),
                page => page,
            })
            .collect(),
        absent: Vec::new(),
    }
}

fn map_of(guest: &Guest) -> PageMap {
    let mut map = PageMap::new(&guest.layout, PageSize::SIZE_4K);
    let frames: Vec<Pfn> = guest
        .layout
        .frames(PageSize::SIZE_4K)
        .flat_map(|f| f.iter().collect::<Vec<_>>())
        .collect();
    let low = guest.regions[0].1.len().div_ceil(PAGE);
    for pfn in frames {
        let number = usize::try_from(pfn.raw()).unwrap();
        let number = if number >= 1 << 20 {
            number - (1 << 20) + if guest.regions.len() > 1 { low } else { 0 }
        } else {
            number
        };
        map.set(PfnRange::with_len(pfn, 1).unwrap(), guest.classes[number]);
    }
    map
}

fn save(guest: &Guest, options: SaveOptions, fill: Fill) -> (Vec<u8>, SaveStats) {
    let map = map_of(guest);
    let plan = PrunePlan::new(&map, &DropClasses::default(), fill);
    let mut info = CheckpointInfo::new(guest.layout.clone(), PageSize::SIZE_4K);
    info.architecture = Some(Architecture::X86_64);
    info.kernel_release = Some("6.1.0-test".into());
    info.build_id = Some(vec![1, 2, 3]);
    info.vmm = Some("test".into());
    let mut writer = CheckpointWriter::new(Vec::new(), info, options).unwrap();
    writer.blob("before", &b"state"[..]).unwrap();
    writer.memory(guest, &map, &plan).unwrap();
    writer.blob("after", &[9; 5000][..]).unwrap();
    writer.blob("empty", &[][..]).unwrap();
    writer.finish().unwrap()
}

/// The value that each byte of the guest must read as.
fn expected(guest: &Guest, fill: u8) -> Vec<(Gpa, Vec<u8>)> {
    let map = map_of(guest);
    let mut regions = guest.regions.clone();
    for (at, bytes) in &mut regions {
        for (number, page) in bytes.chunks_mut(PAGE).enumerate() {
            let pfn = Pfn::new((at.raw() >> 12) + number as u64);
            if page.len() == PAGE && map.class(pfn) == Some(PageClass::FreeBuddy) {
                page.fill(fill);
            }
        }
    }
    regions
}

fn options(codec: u8, chunk: u32, threads: usize, deduplicate: bool) -> SaveOptions {
    let mut options = SaveOptions::new(match codec {
        #[cfg(feature = "lz4")]
        1 => Compression::Lz4,
        #[cfg(feature = "zstd")]
        2 => Compression::ZSTD,
        _ => Compression::None,
    });
    options.chunk_size = chunk;
    options.threads = threads.try_into().ok();
    options.deduplicate = deduplicate;
    options
}

fn check(guest: &Guest, file: Vec<u8>, fill: u8) {
    let checkpoint = CheckpointReader::new(file).unwrap();
    checkpoint.verify(&WorkOptions::new()).unwrap();
    checkpoint
        .verify_against(guest, &WorkOptions::new())
        .unwrap();
    assert_eq!(checkpoint.read_blob("before").unwrap(), b"state");
    assert_eq!(checkpoint.read_blob("after").unwrap(), [9; 5000]);
    assert_eq!(checkpoint.read_blob("empty").unwrap(), []);
    let expected = expected(guest, fill);
    // Read as guest memory, at odd places too.
    for (at, bytes) in &expected {
        let mut found = vec![0; bytes.len()];
        checkpoint.read(*at, &mut found).unwrap();
        assert!(&found == bytes);
        let mut odd = vec![0; bytes.len().min(5001) - 3];
        checkpoint
            .read(at.checked_add(3).unwrap(), &mut odd)
            .unwrap();
        assert!(odd == bytes[3..3 + odd.len()]);
        // What `next_data` passes over is zero.
        let mut next = *at;
        let end = at.checked_add(bytes.len() as u64).unwrap();
        while next < end {
            let data = checkpoint
                .next_data(next)
                .unwrap_or(GpaRange::new(end, end));
            let skipped = next.offset_from(*at).unwrap() as usize
                ..data.start().offset_from(*at).unwrap() as usize;
            assert!(bytes[skipped].iter().all(|byte| *byte == 0));
            next = data.end();
        }
    }
    // Restored into memory that was zero, and into memory that was not.
    for (before, byte) in [(Before::Zeroes, 0), (Before::Anything, 0x55)] {
        let mut memory: Vec<Vec<u8>> = expected.iter().map(|(_, b)| vec![byte; b.len()]).collect();
        let regions = expected
            .iter()
            .map(|(at, _)| *at)
            .zip(memory.iter_mut().map(Vec::as_mut_slice))
            .collect();
        let target = RestoreRegions::new(regions, before).unwrap();
        checkpoint.restore(&target, &RestoreOptions::new()).unwrap();
        drop(target);
        for ((_, bytes), found) in expected.iter().zip(&memory) {
            assert!(bytes == found);
        }
    }
    let (map, was) = (checkpoint.page_map(), map_of(guest));
    assert!(map.runs().eq(was.runs()));
    // That it is zero is said of more pages: those that were looked at as they were written.
    for (frames, page) in was.states().filter(|(_, page)| page.is_zero()) {
        assert!(frames.iter().all(|pfn| map.state(pfn) == Some(page)));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn what_is_saved_comes_back(
        pages in proptest::collection::vec((0_u8..6, 0_u64..40, any::<u8>()), 1..70),
        ragged in any::<bool>(),
        codec in 0_u8..3,
        chunk in 0_u32..5,
        threads in 1_usize..4,
        deduplicate in any::<bool>(),
        poison in any::<bool>(),
    ) {
        let guest = guest(&pages, ragged);
        let options = options(codec, (PAGE as u32) << chunk, threads, deduplicate);
        let fill = if poison { Fill::Byte(0xaa) } else { Fill::Zero };
        let (file, stats) = save(&guest, options, fill);
        prop_assert_eq!(stats.file_len, file.len() as u64);
        let read = CheckpointReader::new(file.as_slice()).unwrap().stats();
        prop_assert_eq!(stats, read);
        check(&guest, file, if poison { 0xaa } else { 0 });
    }
}

/// A guest that has a bit of everything.
fn mixed() -> Guest {
    let pages: Vec<_> = (0..40_u8)
        .map(|n| (n % 6, u64::from(n) / 3, n / 5))
        .collect();
    guest(&pages, true)
}

#[test]
fn the_same_memory_gives_the_same_bytes_on_any_number_of_threads() {
    for codec in 0..3 {
        let one = save(&mixed(), options(codec, 8192, 1, true), Fill::Zero).0;
        for threads in [2, 5] {
            let more = save(&mixed(), options(codec, 8192, threads, true), Fill::Zero).0;
            assert!(one == more);
        }
    }
}

#[test]
fn same_pages_are_stored_once() {
    let pages: Vec<_> = (0..64).map(|n| (4, n % 4, 0)).collect();
    let (file, stats) = save(
        &guest(&pages, false),
        options(0, 65536, 2, true),
        Fill::Zero,
    );
    assert_eq!((stats.data, stats.duplicate), (4, 60));
    assert!(file.len() < 40_000);
    let (_, stats) = save(
        &guest(&pages, false),
        options(0, 65536, 2, false),
        Fill::Zero,
    );
    assert_eq!((stats.data, stats.duplicate), (64, 0));
}

#[test]
fn uncompressed_pages_are_aligned_in_the_file() {
    let pages: Vec<_> = (0..20).map(|n| (4, n, 0)).collect();
    let guest = guest(&pages, false);
    let (file, _) = save(&guest, options(0, 16384, 2, true), Fill::Zero);
    for (_, bytes) in &guest.regions {
        for page in bytes.chunks(PAGE) {
            assert!(file.chunks(PAGE).any(|part| part == page));
        }
    }
}

#[test]
fn absent_pages_stay_absent() {
    let mut guest = guest(&[(4, 1, 0), (4, 2, 0), (4, 3, 0), (4, 4, 0)], false);
    guest.absent.push(Pfn::new(1));
    let (file, stats) = save(&guest, options(0, 8192, 2, true), Fill::Zero);
    assert_eq!(stats.absent, 1);
    let checkpoint = CheckpointReader::new(file).unwrap();
    let run = checkpoint.run_of(Pfn::new(1)).unwrap();
    assert_eq!(run.content, PageContent::Absent);
    assert!(matches!(
        checkpoint.read_u64(Gpa::new(4096)),
        Err(MemoryError::Absent { .. })
    ));
    assert!(checkpoint.read_u64(Gpa::new(8192)).is_err() || guest.regions[0].1.len() > 8192);
    checkpoint
        .verify_against(&guest, &WorkOptions::new())
        .unwrap();
}

#[test]
fn a_page_that_differs_from_the_source_is_found() {
    let mut guest = mixed();
    let (file, _) = save(&guest, options(0, 8192, 2, true), Fill::Zero);
    let checkpoint = CheckpointReader::new(file).unwrap();
    let map = map_of(&guest);
    for (region, page) in [(0, 3), (1, 7)] {
        let pfn = Pfn::new((guest.regions[region].0.raw() >> 12) + page);
        let byte = usize::try_from(page).unwrap() * PAGE + 77;
        guest.regions[region].1[byte] ^= 4;
        let result = checkpoint.verify_against(&guest, &WorkOptions::new());
        if map.class(pfn) == Some(PageClass::FreeBuddy) {
            result.unwrap();
        } else {
            assert!(
                matches!(result, Err(CheckpointError::Differs { pfn: at, byte: 77, .. }) if at == pfn),
                "{result:?}"
            );
        }
        guest.regions[region].1[byte] ^= 4;
    }
}

/// Opens and reads everything that can be read.
fn read_all(file: &[u8]) -> Result<(), CheckpointError> {
    let checkpoint = CheckpointReader::new(file)?;
    checkpoint.verify(&WorkOptions::new())
}

#[test]
fn a_file_cut_short_anywhere_is_refused() {
    for codec in 0..3 {
        let (file, _) = save(&mixed(), options(codec, 8192, 2, true), Fill::Zero);
        read_all(&file).unwrap();
        for len in 0..file.len() {
            let error = CheckpointReader::new(&file[..len]).map(|_| ()).unwrap_err();
            assert!(!error.to_string().is_empty());
        }
        let longer = [file.as_slice(), &[1]].concat();
        CheckpointReader::new(longer).map(|_| ()).unwrap_err();
    }
}

#[test]
fn every_flipped_bit_is_found() {
    let pages: Vec<_> = (0..8_u8).map(|n| (n % 6, u64::from(n), n / 5)).collect();
    for codec in 0..3 {
        let (mut file, _) = save(
            &guest(&pages, true),
            options(codec, 8192, 1, true),
            Fill::Zero,
        );
        for at in 0..file.len() {
            // Every bit of the records, one bit of each byte of the bulk.
            let bits = if at < 128 || at + 1024 > file.len() {
                0..8
            } else {
                at % 8..at % 8 + 1
            };
            for bit in bits {
                file[at] ^= 1 << bit;
                assert!(read_all(&file).is_err(), "byte {at} bit {bit}");
                file[at] ^= 1 << bit;
            }
        }
        read_all(&file).unwrap();
    }
}

#[test]
fn what_a_newer_writer_needs_is_refused_and_what_it_offers_is_ignored() {
    let (file, _) = save(&mixed(), options(0, 8192, 1, true), Fill::Zero);
    let with = |at: usize, byte: u8| {
        let mut file = file.clone();
        file[at] = byte;
        // The header's checksum over the changed header.
        let sum = twox_hash::XxHash3_64::oneshot(&file[..4088]);
        file[4088..4096].copy_from_slice(&sum.to_le_bytes());
        CheckpointReader::new(file).map(|_| ())
    };
    with(24, 0).unwrap();
    with(31, 0x80).unwrap(); // an unknown compatible feature
    assert!(matches!(
        with(16, 3),
        Err(CheckpointError::Incompatible { flags: 2 })
    ));
    // Pages on disks, of which it has no record.
    assert!(matches!(
        with(16, 1),
        Err(CheckpointError::Corrupt { value: 1, .. })
    ));
    assert!(matches!(
        with(8, 2),
        Err(CheckpointError::Version { found: 2, .. })
    ));
    assert!(matches!(
        with(38, 9),
        Err(CheckpointError::Corrupt { value: 9, .. })
    ));
    assert!(matches!(
        with(32, 1),
        Err(CheckpointError::Corrupt { offset, .. }) if offset.raw() == 32
    ));
}

#[test]
fn the_numbers_of_the_classes_are_part_of_the_format() {
    let name = |number| PageClass::from_u8(number).map(PageClass::name);
    let names: Vec<Option<&str>> = (0..20).map(name).collect();
    let names: Vec<&str> = names.iter().map(|name| name.unwrap_or("-")).collect();
    assert_eq!(
        names,
        [
            "unknown",
            "hole",
            "free_buddy",
            "free_pcp",
            "offline",
            "-", // "zero" of earlier versions: a class of its own then
            "kernel",
            "slab",
            "page_table",
            "anonymous",
            "page_cache_clean",
            "page_cache_dirty",
            "shmem",
            "hugetlb",
            "hugetlb_free",
            "reserved",
            "unaccepted",
            "hwpoison",
            "absent",
            "-",
        ]
    );
}

#[test]
fn misuse_is_an_error() {
    let guest = mixed();
    let map = map_of(&guest);
    let plan = PrunePlan::new(&map, &DropClasses::default(), Fill::Zero);
    let new = || {
        let info = CheckpointInfo::new(guest.layout.clone(), PageSize::SIZE_4K);
        CheckpointWriter::new(Vec::new(), info, SaveOptions::default()).unwrap()
    };
    assert!(matches!(
        new().finish(),
        Err(CheckpointError::MemoryTimes { times: 0 })
    ));
    let mut writer = new();
    writer.memory(&guest, &map, &plan).unwrap();
    assert!(matches!(
        writer.memory(&guest, &map, &plan),
        Err(CheckpointError::MemoryTimes { times: 2 })
    ));
    let mut writer = new();
    writer.blob("a", &[][..]).unwrap();
    assert!(matches!(
        writer.blob("a", &[][..]),
        Err(CheckpointError::BlobExists { .. })
    ));
    for (name, is_taken) in [(0, false), (255, true), (256, false)] {
        let taken = writer.blob(&"n".repeat(name), &[][..]);
        assert_eq!(taken.is_ok(), is_taken, "{name}: {taken:?}");
    }
    let other = self::guest(&[(4, 0, 0), (4, 1, 0)], false);
    assert!(matches!(
        writer.memory(&other, &map, &plan),
        Err(CheckpointError::Layout { .. })
    ));
    let info = CheckpointInfo::new(guest.layout.clone(), PageSize::SIZE_4K);
    for (chunk, is_taken) in [(5000, false), (16 << 20, true), (32 << 20, false)] {
        let writer = CheckpointWriter::new(Vec::new(), info.clone(), options(0, chunk, 1, true));
        assert_eq!(writer.is_ok(), is_taken, "{chunk}");
    }
    let (file, _) = save(&guest, SaveOptions::default(), Fill::Zero);
    let checkpoint = CheckpointReader::new(file).unwrap();
    assert!(matches!(
        checkpoint.read_blob("none"),
        Err(CheckpointError::NoBlob { .. })
    ));
}

/// A file of holes must not ask for memory: an index that is long is one of which there is data.
#[test]
fn an_index_of_holes_is_not_read() {
    use std::os::unix::fs::FileExt;
    use twox_hash::XxHash3_64;
    const SMALL: u64 = 16 << 20;
    let (bytes, _) = save(&mixed(), SaveOptions::default(), Fill::Zero);
    let header = &bytes[..4096];
    for (index_len, is_read) in [(SMALL, true), (SMALL + 8, false)] {
        let mut footer = [4096, index_len, 0, 4096 + index_len + 64, 0, 0]
            .map(u64::to_le_bytes)
            .concat();
        footer.extend(XxHash3_64::oneshot(&footer).to_le_bytes());
        footer.extend(b"SONICEND");
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(header, 0).unwrap();
        file.write_all_at(&footer, 4096 + index_len).unwrap();
        let error = CheckpointReader::new(file).unwrap_err().to_string();
        assert_eq!(!error.contains("holds no data"), is_read, "{error}");
    }
}

/// A device, or a transport in whole blocks, fills a file up.
#[test]
fn zeroes_behind_a_checkpoint_are_no_part_of_it() {
    let (bytes, _) = save(&mixed(), SaveOptions::default(), Fill::Zero);
    for more in [1, 8, 63, 4096, (1 << 20) - 8, (3 << 20) + 5] {
        let mut filled = bytes.clone();
        filled.resize(bytes.len() + more, 0);
        let reader = CheckpointReader::new(filled.as_slice()).unwrap();
        assert_eq!(reader.file_len(), bytes.len() as u64, "{more}");
        reader.verify(&WorkOptions::new()).unwrap();
        // Anything else is not passed over, and what is cut off has no end.
        *filled.last_mut().unwrap() = 1;
        assert!(CheckpointReader::new(filled.as_slice()).is_err(), "{more}");
        filled[bytes.len() - 1..].fill(0);
        assert!(CheckpointReader::new(filled.as_slice()).is_err(), "{more}");
    }
    // Zeroes for ever, none of which are held.
    let file = tempfile::tempfile().unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &bytes, 0).unwrap();
    file.set_len(bytes.len() as u64 + (1 << 30)).unwrap();
    assert_eq!(
        CheckpointReader::new(file).unwrap().file_len(),
        bytes.len() as u64
    );
}

#[test]
fn a_sink_that_fails_ends_the_save() {
    struct Full(usize);
    impl std::io::Write for Full {
        fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
            if self.0 < buf.len() {
                return Err(std::io::ErrorKind::StorageFull.into());
            }
            self.0 -= buf.len();
            Ok(buf.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let guest = mixed();
    let map = map_of(&guest);
    let plan = PrunePlan::new(&map, &DropClasses::default(), Fill::Zero);
    let (file, _) = save(&guest, SaveOptions::default(), Fill::Zero);
    for room in (4096..file.len() - 16384).step_by(PAGE) {
        let info = CheckpointInfo::new(guest.layout.clone(), PageSize::SIZE_4K);
        let mut writer = CheckpointWriter::new(Full(room), info, SaveOptions::default()).unwrap();
        let result = writer
            .memory(&guest, &map, &plan)
            .and_then(|()| writer.finish().map(drop));
        assert!(matches!(result, Err(CheckpointError::Io { .. })), "{room}");
    }
}

/// A target that gives another length than it is asked for, or nothing at all.
struct Wrong {
    layout: RamLayout,
    zeroed: bool,
    more: Option<isize>,
}

impl RestoreTarget for Wrong {
    fn layout(&self) -> &RamLayout {
        &self.layout
    }

    fn reads_as_zero(&self) -> bool {
        self.zeroed
    }

    fn fill(&self, range: GpaRange, fill: FillWith<'_>) -> Result<(), CheckpointError> {
        match self.more {
            Some(more) => {
                let len = usize::try_from(range.len()).unwrap();
                fill(&mut vec![0; len.saturating_add_signed(more)])
            }
            None => Ok(()),
        }
    }
}

#[test]
fn a_target_of_another_length_is_an_error() {
    // Pages with data alone, and zeroes alone, which are only written where it may hold anything.
    let data: Vec<_> = (0..8_u8).map(|n| (4, u64::from(n), 0)).collect();
    let zeroes = [(0, 0, 4); 8];
    for (pages, zeroed) in [(&data[..], true), (&zeroes[..], false)] {
        let guest = guest(pages, false);
        for codec in 0..3 {
            let (file, _) = save(&guest, options(codec, 8192, 1, true), Fill::Zero);
            let checkpoint = CheckpointReader::new(file).unwrap();
            let restore = |more| {
                let target = Wrong {
                    layout: guest.layout.clone(),
                    zeroed,
                    more,
                };
                checkpoint.restore(&target, &RestoreOptions::new())
            };
            restore(Some(0)).unwrap();
            for more in [Some(-1), Some(1), Some(-4096), None] {
                let error = restore(more).unwrap_err();
                assert!(
                    matches!(error, CheckpointError::Length { expected, found, .. }
                        if found != expected),
                    "{error}"
                );
            }
        }
    }
}

/// A target that has the work stopped once it has taken some ranges.
struct StopsAfter<'a> {
    inner: RestoreRegions<'a>,
    stop: Stop,
    left: std::sync::atomic::AtomicUsize,
    taken: std::sync::atomic::AtomicUsize,
}

impl RestoreTarget for StopsAfter<'_> {
    fn layout(&self) -> &RamLayout {
        self.inner.layout()
    }

    fn reads_as_zero(&self) -> bool {
        self.inner.reads_as_zero()
    }

    fn fill(&self, range: GpaRange, fill: FillWith<'_>) -> Result<(), CheckpointError> {
        use std::sync::atomic::Ordering::Relaxed;
        self.taken.fetch_add(1, Relaxed);
        if self.left.fetch_sub(1, Relaxed) == 1 {
            self.stop.cancel();
        }
        self.inner.fill(range, fill)
    }
}

#[test]
fn a_restore_ends_when_it_is_stopped() {
    // Many ranges of each kind: stored, stored again, and zeroes that have to be written.
    let pages: Vec<_> = (0..200_u8)
        .map(|n| (4 * (n & 1), u64::from(n), 0))
        .collect();
    let guest = guest(&pages, false);
    for (codec, threads) in [(0, 1), (1, 1), (2, 3)] {
        let (file, _) = save(&guest, options(codec, 8192, 1, true), Fill::Zero);
        let checkpoint = CheckpointReader::new(file).unwrap();
        let restored = |stop: &Stop, left: usize| {
            let mut memory: Vec<_> = guest
                .regions
                .iter()
                .map(|(at, bytes)| (*at, vec![0x55; bytes.len()]))
                .collect();
            let regions = memory
                .iter_mut()
                .map(|(at, bytes)| (*at, bytes.as_mut_slice()));
            let target = StopsAfter {
                inner: RestoreRegions::new(regions.collect(), Before::Anything).unwrap(),
                stop: stop.clone(),
                left: left.into(),
                taken: 0.into(),
            };
            let how = RestoreOptions::new()
                .threads(NonZeroUsize::new(threads).unwrap())
                .stop(stop.clone());
            let result = checkpoint.restore(&target, &how);
            (result, target.taken.into_inner())
        };
        // Never, before anything, and wherever it is.
        let (result, all) = restored(&Stop::new(), usize::MAX);
        result.unwrap();
        let stop = Stop::at(std::time::Instant::now());
        let (result, taken) = restored(&stop, usize::MAX);
        assert!(matches!(
            result,
            Err(CheckpointError::Memory(MemoryError::Stopped {
                source: Stopped::OutOfTime,
                ..
            }))
        ));
        assert_eq!(taken, 0);
        assert!(all > 40, "{all}");
        for left in 1..all {
            let (result, taken) = restored(&Stop::new(), left);
            let error = result.unwrap_err();
            assert!(
                matches!(
                    error,
                    CheckpointError::Memory(MemoryError::Stopped {
                        source: Stopped::Cancelled,
                        ..
                    })
                ),
                "{error}"
            );
            // What other threads had begun may be taken too.
            assert!((left..left + threads).contains(&taken), "{taken} of {left}");
        }
    }
}

#[test]
fn a_seekable_reader_is_a_source() {
    let guest = mixed();
    let (file, _) = save(&guest, SaveOptions::default(), Fill::Zero);
    let source = SeekSource::new(std::io::Cursor::new(file));
    let checkpoint = CheckpointReader::new(source).unwrap();
    checkpoint.verify(&WorkOptions::new()).unwrap();
    checkpoint
        .verify_against(&guest, &WorkOptions::new())
        .unwrap();
}

#[cfg(feature = "mmap")]
#[test]
#[expect(unsafe_code, reason = "what is mapped is looked at")]
fn a_mapped_checkpoint_reads_the_same_and_stays_private() {
    let guest = mixed();
    for codec in 0..3 {
        let (bytes, _) = save(&guest, options(codec, 8192, 1, true), Fill::Byte(0xaa));
        let mut file = tempfile::NamedTempFile::new().unwrap();
        std::io::Write::write_all(&mut file, &bytes).unwrap();
        let checkpoint = CheckpointReader::open(file.path()).unwrap();
        let mut map_options = MapOptions::default();
        map_options.min_mapping = 4096;
        for (max_mappings, unsealed) in [(0, true), (3, true), (1000, true), (1000, false)] {
            map_options.max_mappings = max_mappings;
            map_options.unsealed = unsealed;
            let memory = checkpoint.map_private(map_options).unwrap();
            for (at, expected) in expected(&guest, 0xaa) {
                let start = memory.address(at).unwrap();
                // SAFETY: the region is mapped and nobody writes it.
                let found = unsafe { std::slice::from_raw_parts(start.as_ptr(), expected.len()) };
                assert!(found == expected);
                // SAFETY: as above, and no reference is left.
                unsafe { start.as_ptr().write(0x42) };
            }
        }
        checkpoint.verify(&WorkOptions::new()).unwrap();
    }
}

/// Whether the process has mapped a file whose name contains this.
#[cfg(feature = "mmap")]
fn is_mapped(name: &str) -> bool {
    std::fs::read_to_string("/proc/self/maps")
        .unwrap()
        .contains(name)
}

#[cfg(feature = "mmap")]
#[test]
#[expect(unsafe_code, reason = "what is mapped is looked at")]
fn only_what_nobody_can_cut_off_is_mapped() {
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
    use std::fs::File;
    use std::io::Write;
    let guest = mixed();
    let (bytes, _) = save(&guest, options(0, 8192, 1, true), Fill::Byte(0xaa));
    let all = SealFlags::SHRINK | SealFlags::WRITE;
    for (name, seals, unsealed, mapped) in [
        ("sonic-none", SealFlags::empty(), false, false),
        ("sonic-grow", SealFlags::GROW, false, false),
        ("sonic-shrink", SealFlags::SHRINK, false, false),
        ("sonic-write", SealFlags::WRITE, false, false),
        ("sonic-all", all, false, true),
        (
            "sonic-future",
            SealFlags::SHRINK | SealFlags::FUTURE_WRITE,
            false,
            true,
        ),
        ("sonic-vouched", SealFlags::empty(), true, true),
    ] {
        let memory = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        let mut file = File::from(memory);
        file.write_all(&bytes).unwrap();
        fcntl_add_seals(&file, seals).unwrap();
        let other = file.try_clone().unwrap();
        let checkpoint = CheckpointReader::new(file).unwrap();
        let mut map_options = MapOptions::default();
        map_options.min_mapping = 4096;
        map_options.unsealed = unsealed;
        let memory = checkpoint.map_private(map_options).unwrap();
        assert_eq!(is_mapped(name), mapped, "{name}");
        if !mapped {
            // It would end this process by a signal.
            let _ = other.set_len(0);
        }
        for (at, expected) in expected(&guest, 0xaa) {
            let start = memory.address(at).unwrap();
            // SAFETY: the region is mapped and nobody writes it.
            let found = unsafe { std::slice::from_raw_parts(start.as_ptr(), expected.len()) };
            assert!(found == expected, "{name}");
        }
    }
}

/// A chunk is whole pages, and a size that is none is no other size than it says.
#[test]
fn a_chunk_of_another_size_is_an_error() {
    let layout = RamLayout::new(vec![GpaRange::with_len(Gpa::ZERO, 1 << 20).unwrap()]).unwrap();
    for (page, chunk, fits) in [
        (PageSize::SIZE_4K, 4096, true),
        (PageSize::SIZE_4K, 0, false),
        (PageSize::SIZE_4K, 1, false),
        (PageSize::SIZE_4K, 4095, false),
        (PageSize::SIZE_4K, 6144, false),
        (PageSize::SIZE_4K, 16 << 20, true),
        (PageSize::SIZE_4K, (16 << 20) + 4096, false),
        (PageSize::SIZE_64K, 4096, false),
        (PageSize::SIZE_64K, 65536, true),
    ] {
        let info = CheckpointInfo::new(layout.clone(), page);
        let mut options = SaveOptions::default();
        options.chunk_size = chunk;
        match CheckpointWriter::new(Vec::new(), info, options) {
            Ok(_) => assert!(fits, "{chunk}"),
            Err(CheckpointError::ChunkSize { found, .. }) => {
                assert_eq!((found, fits), (chunk.into(), false));
            }
            Err(error) => panic!("{chunk}: {error}"),
        }
    }
}

/// A guest cannot run without pages that it uses: a checkpoint says so, and is mapped for one only
/// by who says that he knows.
#[test]
fn a_checkpoint_for_analysis_is_not_run_unawares() {
    let ram = vec![7_u8; 16 * PAGE];
    let guest = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(&ram))]).unwrap();
    let mut map = PageMap::new(guest.layout(), PageSize::SIZE_4K);
    map.set(
        PfnRange::new(Pfn::new(4), Pfn::new(5)),
        PageClass::Anonymous,
    );
    let classes = DropClasses(ClassSet::DEFAULT_DROP.with(PageClass::Anonymous));
    let plan = PrunePlan::new(&map, &classes, Fill::Zero);
    let mut info = CheckpointInfo::new(guest.layout().clone(), PageSize::SIZE_4K);
    let begin = |info: &CheckpointInfo| {
        CheckpointWriter::new(Vec::new(), info.clone(), SaveOptions::default()).unwrap()
    };
    let unsaid = begin(&info).memory(&guest, &map, &plan);
    let Err(CheckpointError::ForAnalysis { class, pfn }) = unsaid else {
        panic!("{unsaid:?}");
    };
    assert_eq!((class, pfn), (PageClass::Anonymous, Pfn::new(4)));
    for known in [false, true] {
        info.for_analysis = known;
        let mut writer = begin(&info);
        let plan = if known {
            plan.clone()
        } else {
            PrunePlan::new(&map, &DropClasses::default(), Fill::Zero)
        };
        writer.memory(&guest, &map, &plan).unwrap();
        let checkpoint = CheckpointReader::new(writer.finish().unwrap().0).unwrap();
        assert_eq!(checkpoint.info().for_analysis, known);
        #[cfg(feature = "mmap")]
        {
            let mut options = MapOptions::default();
            assert_eq!(checkpoint.map_private(options).is_err(), known);
            options.for_analysis = true;
            assert!(checkpoint.map_private(options).is_ok());
        }
    }
}
