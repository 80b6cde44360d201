//! Replays every target's seeds, and many seeded mutations of them, on stable Rust: no target
//! may panic or hang.
#![allow(missing_docs)]

use sonicshot_fuzz::TARGETS;
use std::fs;
use std::path::Path;

/// Mutations of each seed; more by `SONICSHOT_FUZZ_ROUNDS`.
const ROUNDS: u64 = 400;

fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// Changes a few bytes, words or lengths of `seed`.
fn mutate(seed: &[u8], state: &mut u64) -> Vec<u8> {
    const WORDS: [u64; 8] = [
        0,
        1,
        0xff,
        0xffff,
        0x7fff_ffff,
        0xffff_ffff,
        1 << 63,
        u64::MAX,
    ];
    let mut data = seed.to_vec();
    for _ in 0..=next(state) % 4 {
        if data.is_empty() {
            break;
        }
        let at = usize::try_from(next(state) % data.len() as u64).unwrap();
        match next(state) % 5 {
            0 => data[at] ^= 1 << (next(state) % 8),
            1 => data[at] = next(state).to_le_bytes()[0],
            2 => data.truncate(at),
            3 => {
                let word = WORDS[usize::try_from(next(state) % 8).unwrap()].to_le_bytes();
                let len = word.len().min(data.len() - at);
                data[at..at + len].copy_from_slice(&word[..len]);
            }
            _ => {
                let from = usize::try_from(next(state) % data.len() as u64).unwrap();
                let len = 8.min(data.len() - at.max(from));
                data.copy_within(from..from + len, at);
            }
        }
    }
    data
}

#[test]
fn no_target_panics() {
    let rounds = std::env::var("SONICSHOT_FUZZ_ROUNDS")
        .ok()
        .and_then(|rounds| rounds.parse().ok())
        .unwrap_or(ROUNDS);
    let only = std::env::var("SONICSHOT_FUZZ_ONLY").ok();
    for (name, target) in TARGETS {
        if only.as_deref().is_some_and(|only| only != *name) {
            continue;
        }
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("corpus")
            .join(name);
        let mut seeds: Vec<_> = fs::read_dir(&folder)
            .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
            .map(|entry| entry.unwrap().path())
            .collect();
        seeds.sort();
        assert!(!seeds.is_empty(), "{name} has no seed");
        // Each of these looks at a whole guest; `mutations.rs` and the command try more.
        let rounds = if *name == "mutate" {
            rounds.div_ceil(50)
        } else {
            rounds
        };
        for seed in seeds {
            let data = fs::read(&seed).unwrap();
            target(&data);
            let mut state = 0x9e37_79b9_7f4a_7c15;
            for _ in 0..rounds {
                target(&mutate(&data, &mut state));
            }
        }
    }
}

/// Writes the seeds of the checkpoint target again, after a change of the format.
#[test]
#[ignore = "writes into the corpus"]
fn write_checkpoint_seeds() {
    use sonicshot::checkpoint::{CheckpointInfo, CheckpointWriter, Compression, SaveOptions};
    use sonicshot::{
        DropClasses, Fill, Gpa, GuestBytes, GuestMemory, MappedRegions, PageClass, PageMap,
        PageSize, Pfn, PfnRange, PrunePlan,
    };
    let mut ram = vec![0; 12 * 4096];
    for (number, page) in ram.chunks_mut(4096).enumerate() {
        match number % 4 {
            0 => page.fill(number.to_le_bytes()[0]),
            1 => page[100] = 1,
            2 => {
                for (at, byte) in page.iter_mut().enumerate() {
                    *byte = (at * at / 97 + number).to_le_bytes()[0];
                }
            }
            _ => {}
        }
    }
    let (low, high) = ram.split_at(7 * 4096 - 600);
    let regions = vec![
        (Gpa::ZERO, GuestBytes::from_slice(low)),
        (Gpa::new(1 << 32), GuestBytes::from_slice(&high[..4 * 4096])),
    ];
    let guest = MappedRegions::new(regions).unwrap();
    let mut map = PageMap::new(guest.layout(), PageSize::SIZE_4K);
    map.set(
        PfnRange::new(Pfn::new(2), Pfn::new(4)),
        PageClass::FreeBuddy,
    );
    let plan = PrunePlan::new(&map, &DropClasses::default(), Fill::Byte(0xaa));
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus/checkpoint");
    fs::create_dir_all(&folder).unwrap();
    for compression in [Compression::None, Compression::Lz4, Compression::ZSTD] {
        let mut options = SaveOptions::new(compression);
        options.chunk_size = 8192;
        let mut info = CheckpointInfo::new(guest.layout().clone(), PageSize::SIZE_4K);
        info.kernel_release = Some("6.1".into());
        info.build_id = Some(vec![1, 2]);
        let mut writer = CheckpointWriter::new(Vec::new(), info, options).unwrap();
        writer.blob("state", &[1, 2, 3][..]).unwrap();
        writer.memory(&guest, &map, &plan).unwrap();
        writer.blob("more", &[][..]).unwrap();
        let file = writer.finish().unwrap().0;
        fs::write(folder.join(compression.name()), file).unwrap();
    }
}

/// Writes the seeds of the kdump target again.
#[test]
#[ignore = "writes into the corpus"]
fn write_kdump_seeds() {
    use sonicshot::{
        DropClasses, Fill, Gpa, GuestBytes, GuestMemory, MappedRegions, PageClass, PageMap,
        PageSize, Pfn, PfnRange, PrunePlan,
    };
    use sonicshot_dump::{KdumpCompression, KdumpOptions, write_kdump_without};
    let ram: Vec<u8> = (0..8 * 4096_u32)
        .map(|i| ((i >> 12) * (i >> 4)).to_le_bytes()[0])
        .collect();
    let regions = vec![(Gpa::ZERO, GuestBytes::from_slice(&ram))];
    let guest = MappedRegions::new(regions).unwrap();
    let mut map = PageMap::new(guest.layout(), PageSize::SIZE_4K);
    map.set(
        PfnRange::new(Pfn::new(2), Pfn::new(4)),
        PageClass::FreeBuddy,
    );
    let plan = PrunePlan::new(&map, &DropClasses::default(), Fill::Zero);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus/kdump");
    for (name, compression) in [
        ("none", KdumpCompression::None),
        ("zlib", KdumpCompression::Zlib),
        ("snappy", KdumpCompression::Snappy),
        ("zstd", KdumpCompression::Zstd),
    ] {
        let options = KdumpOptions::new(compression)
            .machine(sonicshot::Architecture::X86_64)
            .vmcoreinfo(b"OSRELEASE=6.1\n");
        let file = fs::File::create(folder.join(name)).unwrap();
        write_kdump_without(&guest, &plan, &file, &options).unwrap();
    }
}
