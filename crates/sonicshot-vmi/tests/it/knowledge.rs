//! What is found of a guest of which little is known, against what all knowledge finds.
use sonicshot::{Gpa, GuestBytes, MappedRegions, PageClass, PageMap};
use sonicshot_vmi::{Classification, Cr3, GuestOptions, Knowledge, LinuxGuest, OnInconsistency};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Instant;

fn testdata() -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../testdata/guest-6.1-128m")
        .join("ram.raw.zst");
    let mut reader = zstd::stream::read::Decoder::new(File::open(path).unwrap()).unwrap();
    reader.window_log_max(31).unwrap();
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes).unwrap();
    bytes
}

fn classify(ram: &[u8], knowledge: Knowledge, cr3: Option<Cr3>) -> Result<Classification, String> {
    let memory = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(ram))]).unwrap();
    let mut options = GuestOptions::new().at_most(knowledge);
    if let Some(cr3) = cr3 {
        options = options.cr3(cr3);
    }
    let told = |error: sonicshot_vmi::VmiError| {
        let mut text = error.to_string();
        let mut next = std::error::Error::source(&error);
        while let Some(cause) = next {
            text.push_str(&format!(": {cause}"));
            next = cause.source();
        }
        text
    };
    let guest = LinuxGuest::open(&memory, &options).map_err(told)?;
    guest.classify(OnInconsistency::Refuse).map_err(told)
}

fn classes(map: &PageMap) -> Vec<PageClass> {
    map.regions()
        .flat_map(|(_, classes)| classes.iter().copied())
        .collect()
}

fn is_free(class: PageClass) -> bool {
    matches!(class, PageClass::FreeBuddy | PageClass::FreePcp)
}

/// How many frames are free in both, in `all` alone, and in `few` alone.
fn compare(all: &PageMap, few: &PageMap, class: &dyn Fn(PageClass) -> bool) -> [usize; 3] {
    let mut counts = [0; 3];
    for (a, b) in classes(all).into_iter().zip(classes(few)) {
        match (class(a), class(b)) {
            (true, true) => counts[0] += 1,
            (true, false) => counts[1] += 1,
            (false, true) => counts[2] += 1,
            (false, false) => {}
        }
    }
    counts
}

#[test]
fn vmcoreinfo_alone_finds_the_same_free_pages_as_types() {
    let ram = testdata();
    let all = classify(&ram, Knowledge::Types, None).unwrap();
    let few = classify(&ram, Knowledge::Vmcoreinfo, None).unwrap();
    assert_eq!(few.disagreement, None);
    for class in [PageClass::FreeBuddy, PageClass::FreePcp] {
        let [both, ..] = compare(&all.map, &few.map, &|c| c == class);
        assert!(both > 0, "{class}");
        assert_eq!(
            compare(&all.map, &few.map, &|c| c == class),
            [both, 0, 0],
            "{class}"
        );
    }
    // The same numbers by the same records; deltas of processors are found, too.
    assert_eq!(all.zones.len(), few.zones.len());
    for (all, few) in all.zones.iter().zip(&few.zones) {
        assert_eq!(
            (
                &all.name,
                all.span,
                all.listed,
                all.nr_free,
                all.counter,
                all.pcp
            ),
            (
                &few.name,
                few.span,
                few.listed,
                few.nr_free,
                few.counter,
                few.pcp
            )
        );
    }
    assert_eq!(all.free_fill, few.free_fill);
    // Nothing else is told, so nothing else can be dropped but by its content.
    let told = classes(&few.map)
        .into_iter()
        .find(|class| !is_free(*class) && !matches!(class, PageClass::Unknown | PageClass::Hole));
    assert_eq!(told, None);
}

#[test]
fn shape_alone_finds_no_other_free_pages_than_types() {
    let ram = testdata();
    let all = classify(&ram, Knowledge::Types, None).unwrap();
    let few = classify(&ram, Knowledge::Shape, None).unwrap();
    assert_eq!(few.disagreement, None);
    let [both, more, fewer] = compare(&all.map, &few.map, &is_free);
    assert_eq!(fewer, 0);
    assert!(more * 20 <= both, "{more} of {both} are missing");
    assert_eq!(all.zones.len(), few.zones.len());
    for (all, few) in all.zones.iter().zip(&few.zones) {
        assert_eq!(
            (&all.name, all.span, all.listed, all.nr_free, all.counter),
            (&few.name, few.span, few.listed, few.nr_free, few.counter)
        );
    }
}

/// Captures of the lab (raw RAM without a hole), given by `SONICSHOT_CAPTURES`, `:` between them.
#[test]
#[ignore = "needs captures of the lab"]
fn captures() {
    const BUDDY: u64 = 1 << 10;
    let given = std::env::var("SONICSHOT_CAPTURES").unwrap();
    let mut wrong = 0;
    for path in given.split(':').map(PathBuf::from) {
        let ram = fs::read(&path).unwrap();
        let flags = fs::read(path.with_file_name("kpageflags.bin")).unwrap_or_default();
        let (flags, _) = flags.as_chunks::<8>();
        println!("{}", path.display());
        let mut all: Option<Classification> = None;
        for knowledge in [Knowledge::Types, Knowledge::Vmcoreinfo, Knowledge::Shape] {
            let start = Instant::now();
            let found = classify(&ram, knowledge, None);
            let took = start.elapsed();
            let pages = match found {
                Ok(pages) => pages,
                Err(error) => {
                    println!("  {knowledge}: {error}");
                    wrong += 1;
                    continue;
                }
            };
            let free = classes(&pages.map);
            let counts = pages.map.counts();
            let kernel = flags
                .iter()
                .filter(|w| u64::from_le_bytes(**w) & BUDDY != 0)
                .count();
            let not_buddy = free.iter().zip(flags).filter(|(class, word)| {
                **class == PageClass::FreeBuddy && u64::from_le_bytes(**word) & BUDDY == 0
            });
            println!(
                "  {knowledge}: {took:.2?}, buddy {}, pcp {}, offline {}; kpageflags {kernel}, \
                 not there {}",
                counts.get(PageClass::FreeBuddy),
                counts.get(PageClass::FreePcp),
                counts.get(PageClass::Offline),
                not_buddy.count()
            );
            for zone in &pages.zones {
                println!("    {zone:?}");
            }
            for note in &pages.notes {
                println!("    note: {note}");
            }
            if let Some(all) = &all {
                let buddy = compare(&all.map, &pages.map, &|c| c == PageClass::FreeBuddy);
                let free = compare(&all.map, &pages.map, &is_free);
                println!("    buddy both, more, fewer: {buddy:?}; free {free:?}");
                wrong += usize::from(free[2] > 0);
            } else {
                all = Some(pages);
            }
        }
    }
    assert_eq!(wrong, 0);
}
