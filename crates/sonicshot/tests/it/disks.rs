//! Pages that are on the guest's disks: they come back as they were, or not at all.

use proptest::prelude::*;
use sonicshot::checkpoint::*;
use sonicshot::*;

const PAGE: usize = 4096;
const PAGES: usize = 96;

/// A page that only the same number gives; some are zero, some one word.
fn page(number: u8) -> Vec<u8> {
    match number {
        0 => vec![0; PAGE],
        1 => vec![0xcc; PAGE],
        _ => {
            let word = u64::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let words = (0..PAGE as u64 / 8).map(|at| word ^ at.wrapping_mul(word >> 7));
            words.flat_map(u64::to_le_bytes).collect()
        }
    }
}

struct Case {
    ram: Vec<u8>,
    disks: Vec<Vec<u8>>,
}

impl Case {
    fn new(ram: &[u8], disks: &[Vec<u8>]) -> Self {
        let bytes = |pages: &[u8]| pages.iter().flat_map(|number| page(*number)).collect();
        Self {
            ram: bytes(ram),
            disks: disks.iter().map(|pages| bytes(pages)).collect(),
        }
    }

    /// Up on the first disk, down on the second, and some on none.
    fn plain() -> Self {
        let up: Vec<u8> = (10..60).collect();
        let down: Vec<u8> = (60..90).rev().collect();
        let ram: Vec<u8> = (0..u8::try_from(PAGES).unwrap()).collect();
        Self::new(&ram, &[[vec![0; 3], up].concat(), down])
    }

    fn infos(&self, hash: DiskHash) -> Vec<DiskInfo> {
        let disks = self.disks.iter().zip(["root", "data", "more"]);
        let marks = [(DiskOffset::ZERO, 512, MarkKind::ExtSuperblock)];
        disks
            .map(|(disk, name)| DiskInfo::of(name, disk, hash, &marks).unwrap())
            .collect()
    }

    fn given(&self) -> Vec<GivenDisk> {
        let disks = self.disks.iter().zip(["root", "data", "more"]);
        disks
            .map(|(disk, name)| GivenDisk::new(name, disk.clone()))
            .collect()
    }

    fn save_as(
        &self,
        hash: DiskHash,
        options: SaveOptions,
        guesses: Option<DiskGuesses>,
    ) -> Result<(Vec<u8>, SaveStats), CheckpointError> {
        let guest = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(&self.ram))]);
        let guest = guest.unwrap();
        let mut map = PageMap::new(guest.layout(), PageSize::SIZE_4K);
        let all = guest.layout().frames(PageSize::SIZE_4K).next().unwrap();
        map.set(all, PageClass::PageCacheDirty);
        map.set(
            PfnRange::new(Pfn::new(20), Pfn::new(22)),
            PageClass::FreeBuddy,
        );
        let plan = PrunePlan::new(&map, &DropClasses::default(), Fill::Zero);
        let mut info = CheckpointInfo::new(guest.layout().clone(), PageSize::SIZE_4K);
        info.disks = self.infos(hash);
        let disks: Vec<_> = self
            .disks
            .iter()
            .map(|disk| disk as &dyn DiskSource)
            .collect();
        let guesses = guesses.unwrap_or_else(|| {
            let finder =
                DiskFinder::new(&guest, &map, &plan, DiskFinder::LIKELY, &WorkOptions::new())
                    .unwrap();
            finder
                .stream(&info.disks, &disks, &WorkOptions::new())
                .unwrap()
        });
        let on_disks = OnDisks {
            disks: &disks,
            guesses: &guesses,
        };
        let mut writer = CheckpointWriter::new(Vec::new(), info, options)?;
        writer.memory_on_disks(&guest, &map, &plan, &on_disks)?;
        writer.blob("after", &b"state"[..])?;
        writer.finish()
    }

    fn save(&self) -> Vec<u8> {
        self.save_as(DiskHash::Xxh3, SaveOptions::default(), None)
            .unwrap()
            .0
    }

    fn open(&self, file: &[u8]) -> Result<CheckpointReader<Vec<u8>>, CheckpointError> {
        let reader = CheckpointReader::new(file.to_vec()).unwrap();
        reader.with_disks(self.given(), MovedOn::Refuse)
    }

    /// As it must come back.
    fn expected(&self) -> Vec<u8> {
        let mut ram = self.ram.clone();
        ram[20 * PAGE..22 * PAGE].fill(0);
        ram
    }

    fn restored<S: RangeSource>(
        &self,
        reader: &CheckpointReader<S>,
    ) -> Result<Vec<u8>, CheckpointError> {
        let mut out = vec![0x55; self.ram.len()];
        let target = RestoreRegions::new(vec![(Gpa::ZERO, &mut out)], Before::Anything).unwrap();
        reader.restore(&target, &RestoreOptions::new())?;
        drop(target);
        Ok(out)
    }

    /// Every way to read it gives what it must.
    fn check(&self, file: &[u8]) {
        let reader = self.open(file).unwrap();
        reader.verify(&WorkOptions::new()).unwrap();
        assert_eq!(
            reader.verify_disks(&WorkOptions::new()).unwrap(),
            reader.stats().on_disk
        );
        let expected = self.expected();
        assert!(self.restored(&reader).unwrap() == expected);
        let mut all = vec![0; expected.len()];
        reader.read(Gpa::ZERO, &mut all).unwrap();
        assert!(all == expected);
        for at in [3, 4095, 40 * PAGE + 7]
            .into_iter()
            .filter(|at| *at < expected.len())
        {
            let mut odd = vec![0; (expected.len() - at).min(3 * PAGE)];
            reader.read(Gpa::new(at as u64), &mut odd).unwrap();
            assert!(odd == expected[at..at + odd.len()], "{at}");
        }
        // What `next_data` passes over is zero.
        let data = reader
            .next_data(Gpa::ZERO)
            .map_or(0, |data| data.start().raw());
        assert!(
            expected[..usize::try_from(data).unwrap()]
                .iter()
                .all(|byte| *byte == 0)
        );
        let guest = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(&self.ram))]);
        reader
            .verify_against(&guest.unwrap(), &WorkOptions::new())
            .unwrap();
        for run in reader.runs_in(PfnRange::new(Pfn::new(33), Pfn::new(37))) {
            let PageContent::Disk { record, page } = run.content else {
                continue;
            };
            let mut pages = Vec::new();
            reader.read_disk_run(record, &mut pages).unwrap();
            let first = usize::try_from(page).unwrap() * PAGE;
            let frame = usize::try_from(run.frames.start().raw()).unwrap() * PAGE;
            assert!(pages[first..first + PAGE] == expected[frame..frame + PAGE]);
        }
        #[cfg(feature = "mmap")]
        assert!(mapped(&reader) == expected);
    }
}

/// The content of a private mapping of it.
#[cfg(feature = "mmap")]
#[expect(unsafe_code, reason = "what is mapped is looked at")]
fn mapped(reader: &CheckpointReader<Vec<u8>>) -> Vec<u8> {
    let memory = reader.map_private(MapOptions::default()).unwrap();
    let (_, start, len) = memory.regions().next().unwrap();
    // SAFETY: the region is mapped, that long, and nobody writes it.
    unsafe { std::slice::from_raw_parts(start.as_ptr(), len) }.to_vec()
}

#[test]
fn pages_on_disks_are_not_stored_and_come_back() {
    let case = Case::plain();
    let (file, stats) = case
        .save_as(DiskHash::Xxh3, SaveOptions::default(), None)
        .unwrap();
    // Two are free, and what is on no disk is stored.
    assert_eq!((stats.on_disk, stats.free, stats.data), (78, 2, 14));
    assert_eq!((stats.zero, stats.fill), (1, 1));
    let reader = case.open(&file).unwrap();
    assert_eq!(reader.stats(), stats);
    assert_eq!(reader.info().disks, case.infos(DiskHash::Xxh3));
    let runs = (0..reader.disk_run_count()).map(|record| reader.disk_run(record).unwrap());
    let runs: Vec<_> = runs.collect();
    assert!(runs.iter().any(|run| run.descending && run.disk == 1));
    assert!(
        runs.iter()
            .any(|run| !run.descending && run.disk == 0 && run.pages > 8)
    );
    case.check(&file);
}

#[cfg(feature = "sha256")]
#[test]
fn the_hash_may_be_one_that_nobody_forges() {
    let case = Case::plain();
    let (file, _) = case
        .save_as(DiskHash::Sha256, SaveOptions::default(), None)
        .unwrap();
    let reader = CheckpointReader::new(file.as_slice()).unwrap();
    assert!(
        reader
            .info()
            .disks
            .iter()
            .all(|disk| disk.hash == DiskHash::Sha256)
    );
    case.check(&file);
}

#[test]
fn what_is_not_on_the_disk_any_more_is_refused_in_every_way() {
    let case = Case::plain();
    let file = case.save();
    // Of a run that goes up, and one that goes down; never the mark.
    for (disk, page) in [(0, 20), (1, 12)] {
        let mut changed = Case::plain();
        changed.disks[disk][page * PAGE + 77] ^= 1;
        let reader = changed.open(&file).unwrap();
        let is_told = |error: CheckpointError| match error {
            CheckpointError::DiskChanged { name, at, .. } => {
                assert_eq!(name, ["root", "data"][disk]);
                let at = usize::try_from(at.raw()).unwrap();
                assert!((page.saturating_sub(16)..=page).contains(&(at / PAGE)));
            }
            other => panic!("{other:?}"),
        };
        is_told(changed.restored(&reader).unwrap_err());
        is_told(reader.verify_disks(&WorkOptions::new()).unwrap_err());
        let mut all = vec![0; changed.ram.len()];
        assert!(matches!(
            reader.read(Gpa::ZERO, &mut all),
            Err(MemoryError::Backend { .. })
        ));
        // The file itself is sound.
        reader.verify(&WorkOptions::new()).unwrap();
        let forced = CheckpointReader::new(file.clone()).unwrap();
        let forced = forced.with_disks(changed.given(), MovedOn::GoOn).unwrap();
        is_told(changed.restored(&forced).unwrap_err());
    }
}

#[test]
fn a_disk_that_is_another_is_refused_before_a_byte_is_filled() {
    let case = Case::plain();
    let file = case.save();
    let open = |given, moved_on| {
        let reader = CheckpointReader::new(file.clone()).unwrap();
        reader.with_disks(given, moved_on).map(drop)
    };
    let (refuse, go_on) = (MovedOn::Refuse, MovedOn::GoOn);
    let given = |name: &str, disk: &[u8]| GivenDisk::new(name, disk.to_vec());
    let [root, data] = [&case.disks[0][..], &case.disks[1]];
    let longer = [root, &[0; 512]].concat();
    let mut mounted = root.to_vec();
    mounted[100] ^= 1;
    for (disks, moved_on, expected) in [
        (vec![], refuse, "not given"),
        (
            vec![given("root", root)],
            go_on,
            "`data`, and its image was not given",
        ),
        (
            vec![given("root", root), given("else", data)],
            refuse,
            "no disk `else`",
        ),
        (
            vec![given("root", root), given("root", root)],
            refuse,
            "named twice",
        ),
        (
            vec![given("root", &root[1..]), given("data", data)],
            go_on,
            "bytes, and had",
        ),
        (
            vec![given("root", &longer), given("data", data)],
            refuse,
            "bytes, and had",
        ),
        (
            vec![given("root", &mounted), given("data", data)],
            refuse,
            "superblock",
        ),
        (vec![given("root", &longer), given("data", data)], go_on, ""),
        (
            vec![given("root", &mounted), given("data", data)],
            go_on,
            "",
        ),
        (vec![given("data", data), given("root", root)], refuse, ""),
    ] {
        let found = open(disks, moved_on);
        let text = found
            .as_ref()
            .err()
            .map(ToString::to_string)
            .unwrap_or_default();
        assert_eq!(found.is_ok(), expected.is_empty(), "{text}");
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn without_its_disks_a_checkpoint_gives_what_it_has_and_no_more() {
    let case = Case::plain();
    let file = case.save();
    let reader = CheckpointReader::new(file.clone()).unwrap();
    reader.verify(&WorkOptions::new()).unwrap();
    assert_eq!(reader.read_blob("after").unwrap(), b"state");
    let mut out = vec![0x55; case.ram.len()];
    let target = RestoreRegions::new(vec![(Gpa::ZERO, &mut out)], Before::Anything).unwrap();
    let error = reader.restore(&target, &RestoreOptions::new()).unwrap_err();
    assert!(matches!(error, CheckpointError::NoDisk { .. }), "{error:?}");
    drop(target);
    assert!(out.iter().all(|byte| *byte == 0x55));
    assert!(matches!(
        reader.verify_disks(&WorkOptions::new()),
        Err(CheckpointError::NoDisk { .. })
    ));
    assert!(reader.read_u64(Gpa::new(40 * 4096)).is_err());
    assert!(!reader.disks_are_immutable());
    let immutable = case.given().into_iter().map(GivenDisk::immutable);
    let reader = reader
        .with_disks(immutable.collect(), MovedOn::Refuse)
        .unwrap();
    assert!(reader.disks_are_immutable());
    #[cfg(feature = "mmap")]
    {
        let reader = CheckpointReader::new(file).unwrap();
        let error = reader.map_private(MapOptions::default()).unwrap_err();
        assert!(matches!(error, CheckpointError::NoDisk { .. }), "{error:?}");
    }
}

#[test]
fn a_wrong_guess_costs_nothing_but_room() {
    let case = Case::plain();
    let right = |pfn: u64| (Pfn::new(pfn), 0, DiskOffset::new((pfn - 7) * 4096));
    for (frames, on_disk) in [
        (vec![], 0),
        ((10..20).map(right).collect::<Vec<_>>(), 10),
        // One of them is not there.
        ((9..13).map(right).collect(), 3),
        // Elsewhere, beyond the end, on a disk that there is not, at no sector, at a page of zeroes.
        (vec![(Pfn::new(10), 0, DiskOffset::new(4 * 4096))], 0),
        (vec![(Pfn::new(10), 0, DiskOffset::new(1 << 40))], 0),
        (vec![(Pfn::new(10), 9, DiskOffset::new(3 * 4096))], 0),
        (vec![(Pfn::new(10), 0, DiskOffset::new(3 * 4096 + 1))], 0),
        (vec![(Pfn::new(0), 0, DiskOffset::ZERO)], 0),
        // A free page.
        (vec![right(20), right(21)], 0),
    ] {
        let guesses = DiskGuesses::of_frames(frames, PageSize::SIZE_4K);
        let saved = case.save_as(DiskHash::Xxh3, SaveOptions::default(), Some(guesses));
        let (file, stats) = saved.unwrap();
        assert_eq!(stats.on_disk, on_disk);
        case.check(&file);
    }
}

#[test]
fn what_is_attached_leaves_the_disks_as_they_are() {
    let case = Case::plain();
    let file = case.save();
    let reader = CheckpointReader::new(file).unwrap();
    let (attached, _) = reader
        .attach(vec![("note", &mut &b"mine"[..])], false, Vec::new(), &None)
        .unwrap();
    case.check(&attached);
}

#[test]
fn every_changed_byte_of_the_index_is_an_error_and_no_panic() {
    let case = Case::plain();
    let file = case.save();
    let footer = file.len() - 64;
    let index = u64::from_le_bytes(file[footer..footer + 8].try_into().unwrap());
    let index = usize::try_from(index).unwrap();
    for at in index..footer {
        for bit in [1, 0x80] {
            let mut changed = file.clone();
            changed[at] ^= bit;
            let sum = twox_hash::XxHash3_64::oneshot(&changed[index..footer]);
            changed[footer + 16..footer + 24].copy_from_slice(&sum.to_le_bytes());
            let sum = twox_hash::XxHash3_64::oneshot(&changed[footer..footer + 48]);
            changed[footer + 48..footer + 56].copy_from_slice(&sum.to_le_bytes());
            let Ok(reader) = CheckpointReader::new(changed) else {
                continue;
            };
            let Ok(reader) = reader.with_disks(case.given(), MovedOn::GoOn) else {
                continue;
            };
            let _ = (
                reader.stats(),
                case.restored(&reader),
                reader.verify_disks(&WorkOptions::new()),
            );
        }
    }
}

#[test]
fn what_the_format_has_no_room_for_is_refused_before_anything_is_written() {
    let info = |count: usize, name: &str| {
        let disk = DiskInfo::of(name, &vec![1; 4096], DiskHash::Xxh3, &[]).unwrap();
        let layout = RamLayout::new(vec![GpaRange::new(Gpa::ZERO, Gpa::new(4096))]).unwrap();
        let mut info = CheckpointInfo::new(layout, PageSize::SIZE_4K);
        info.disks = (0..count)
            .map(|number| {
                let mut disk = disk.clone();
                disk.name = if count > 2 {
                    format!("{name}{number}")
                } else {
                    name.to_owned()
                };
                disk
            })
            .collect();
        info
    };
    for (info, is_taken) in [
        (info(1, "root"), true),
        (info(2, "root"), false),
        (info(1, ""), false),
        (info(1, &"d".repeat(255)), true),
        (info(1, &"d".repeat(256)), false),
        (info(256, "d"), true),
        (info(257, "d"), false),
    ] {
        let made = CheckpointWriter::new(Vec::new(), info, SaveOptions::default());
        assert_eq!(made.is_ok(), is_taken);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn what_is_on_disks_comes_back(
        ram in proptest::collection::vec(0_u8..60, 23..PAGES),
        disks in proptest::collection::vec(proptest::collection::vec(0_u8..70, 1..90), 1..4),
        threads in 1_usize..4,
    ) {
        let case = Case::new(&ram, &disks);
        let mut options = SaveOptions::default();
        options.threads = threads.try_into().ok();
        let (file, stats) = case.save_as(DiskHash::Xxh3, options, None).unwrap();
        let again = case.save_as(DiskHash::Xxh3, SaveOptions::default(), None).unwrap();
        prop_assert!(again.0 == file);
        let there = |number: &u8| *number > 1 && disks.iter().any(|disk| disk.contains(number));
        let kept = ram.iter().enumerate().filter(|(at, _)| !(20..22).contains(at));
        let on_disk = kept.filter(|(_, number)| there(number)).count();
        prop_assert_eq!(stats.on_disk, on_disk as u64);
        case.check(&file);
    }
}
