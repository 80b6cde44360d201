//! The kernel that owns a guest's memory: among pages that pass for its VMCOREINFO, beside another
//! kernel that stands, and by the page tables that the processors run on.

use sonicshot::x86_64::ControlRegisters;
use sonicshot::{
    Gpa, GuestBytes, GuestMemory, MappedRegions, MemoryError, PageClass, Processor, Processors,
    RamLayout,
};
use sonicshot_vmi::x86_64::Cr3;
use sonicshot_vmi::{
    Classification, Foreign, ForeignProcessor, GuestOptions, LinuxGuest, OnInconsistency, VmiError,
};
use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
const START_KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// Paging and protection; PAE; long mode.
const CR0: u64 = 0x8005_0033;
const CR4: u64 = 0x6f0;
const EFER: u64 = 0xd01;

pub fn original() -> &'static [u8] {
    static RAM: OnceLock<Vec<u8>> = OnceLock::new();
    RAM.get_or_init(|| {
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/guest-6.1-128m/ram.raw.zst");
        let mut reader = zstd::stream::read::Decoder::new(File::open(path).unwrap()).unwrap();
        reader.window_log_max(31).unwrap();
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).unwrap();
        bytes
    })
}

/// Memory whose owner tells its processors.
struct Machine<'a> {
    memory: MappedRegions<'a>,
    processors: Processors,
}

impl GuestMemory for Machine<'_> {
    fn layout(&self) -> &RamLayout {
        self.memory.layout()
    }
    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.memory.read(at, buf)
    }
    fn map(&self, at: Gpa, len: usize) -> Result<Option<sonicshot::Mapped<'_>>, MemoryError> {
        self.memory.map(at, len)
    }
    fn processors(&self) -> Processors {
        self.processors.clone()
    }
}

fn memory<'a>(parts: &[(u64, &'a [u8])]) -> MappedRegions<'a> {
    let parts = parts
        .iter()
        .map(|(at, bytes)| (Gpa::new(*at), GuestBytes::from_slice(bytes)));
    MappedRegions::new(parts.collect()).unwrap()
}

fn started(cr3: u64) -> Processor {
    Processor::Started(ControlRegisters::new(CR0, cr3, CR4, Some(EFER)))
}

fn classify(
    ram: &[u8],
    processors: Processors,
    options: &GuestOptions,
    on: OnInconsistency,
) -> Result<Classification, VmiError> {
    let machine = Machine {
        memory: memory(&[(0, ram)]),
        processors,
    };
    LinuxGuest::open(&machine, options)?.classify(on)
}

/// Refused for one processor, or classified.
fn owner(ram: &[u8], processors: &[Processor]) -> Result<(), ForeignProcessor> {
    let known = Processors::Known(processors.to_vec());
    match classify(ram, known, &GuestOptions::new(), OnInconsistency::Refuse) {
        Ok(_) => Ok(()),
        Err(VmiError::NotOwner { processor, .. }) => Err(*processor),
        Err(error) => panic!("{error}"),
    }
}

/// Facts of the test guest.
struct Facts {
    /// VMCOREINFO.
    text: String,
    /// The page that holds it.
    own: usize,
    root: usize,
    /// Frames that are free.
    free: Vec<usize>,
}

fn facts() -> &'static Facts {
    static FACTS: OnceLock<Facts> = OnceLock::new();
    FACTS.get_or_init(|| {
        let memory = memory(&[(0, original())]);
        let guest = LinuxGuest::open(&memory, &GuestOptions::new()).unwrap();
        let text = guest.vmcoreinfo().unwrap().to_owned();
        let line = |key: &str| {
            let line = text.lines().find(|line| line.starts_with(key)).unwrap();
            line.split_once('=').unwrap().1
        };
        let at = u64::from_str_radix(line("SYMBOL(swapper_pg_dir)"), 16).unwrap();
        let base: i64 = line("NUMBER(phys_base)").parse().unwrap();
        let root = (at - START_KERNEL_MAP).wrapping_add(base.cast_unsigned());
        let origin = &guest.symbol_sources()[0];
        let own = origin.strip_prefix("VMCOREINFO at 0x").unwrap();
        let own = usize::from_str_radix(own, 16).unwrap();
        let pages = guest.classify(OnInconsistency::Refuse).unwrap();
        let free = pages
            .map
            .runs()
            .filter(|(_, class)| *class == PageClass::FreeBuddy)
            .flat_map(|(frames, _)| frames.start().raw()..frames.end().raw());
        Facts {
            own,
            root: usize::try_from(root).unwrap(),
            free: free.map(|frame| usize::try_from(frame).unwrap()).collect(),
            text,
        }
    })
}

/// Two free frames, the first at a multiple of 8 KiB, each beside no other pair.
fn pair() -> usize {
    let free: HashSet<usize> = facts().free.iter().copied().collect();
    let first = |frame: &&usize| frame.is_multiple_of(2) && free.contains(&(**frame + 1));
    *facts().free.iter().find(first).unwrap() * PAGE
}

fn u64_at(ram: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(ram[at..at + 8].try_into().unwrap())
}

fn put(ram: &mut [u8], at: usize, value: u64) {
    ram[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

/// Top-level page tables of processes: they have the kernel's upper half.
fn processes(ram: &[u8]) -> Vec<usize> {
    let upper = |at: usize| &ram[at + PAGE / 2..at + PAGE];
    let kernel = upper(facts().root);
    (0..ram.len())
        .step_by(PAGE)
        .filter(|at| *at != facts().root && upper(*at) == kernel)
        .collect()
}

#[test]
fn processors_in_the_kernel_and_in_processes_are_its_own() {
    let ram = original();
    let root = facts().root as u64;
    owner(ram, &[started(root)]).unwrap();
    // PCIDs, and how pointers are tagged.
    owner(ram, &[started(root | 0x005), started(root | 1 << 61)]).unwrap();
    let processes = processes(ram);
    assert!(processes.len() >= 3, "{processes:x?}");
    for process in processes {
        owner(ram, &[started(process as u64)]).unwrap();
    }
}

#[test]
fn who_counts_and_who_does_not() {
    let ram = original();
    let root = facts().root as u64;
    let nested = |host| Processor::InNestedGuest { host };
    let registers = |cr3| ControlRegisters::new(CR0, cr3, CR4, None);
    for processors in [
        vec![],
        vec![Processor::NotStarted],
        vec![
            started(root),
            Processor::NotStarted,
            Processor::Parked,
            Processor::InSmm,
        ],
        vec![nested(Some(registers(root)))],
    ] {
        owner(ram, &processors).unwrap();
    }
    let refused = owner(ram, &[started(root), nested(None)]).unwrap_err();
    assert_eq!((refused.number, &refused.why), (1, &Foreign::Nested));
    for (cr0, cr4, efer) in [
        // Real mode, 32 bits without PAE, and not yet in long mode.
        (0x10, 0, Some(0)),
        (CR0, 0, Some(0)),
        (CR0, CR4, Some(0x100)),
    ] {
        let processor = Processor::Started(ControlRegisters::new(cr0, root, cr4, efer));
        let refused = owner(ram, &[processor, started(root)]).unwrap_err();
        assert_eq!(refused.number, 0);
        assert!(matches!(refused.why, Foreign::NoPaging { .. }), "{refused}");
    }
    // The same tables, but walked with five levels.
    let five = ControlRegisters::new(CR0, root, CR4 | 1 << 12, Some(EFER));
    owner(ram, &[Processor::Started(five)]).unwrap_err();
}

#[test]
fn tables_that_lead_elsewhere_are_refused() {
    let ram = original();
    let copy = pair();
    let root = facts().root;
    let zeroes = ram
        .chunks(PAGE)
        .position(|page| page.iter().all(|byte| *byte == 0))
        .unwrap();
    for (cr3, what) in [
        (zeroes * PAGE, "zeroes"),
        (facts().own, "text"),
        (root + PAGE, "the page behind"),
        (ram.len() + PAGE, "outside RAM"),
        (copy, "garbage"),
    ] {
        let refused = owner(ram, &[started(cr3 as u64)]).expect_err(what);
        assert_eq!(refused.cr3, Some(Cr3::new(cr3 as u64)));
        assert!(matches!(refused.why, Foreign::Leads { .. }), "{refused}");
    }
    // A whole copy is as good as the original; with one entry gone or another, it is not.
    let mut forged = ram.to_vec();
    forged.copy_within(root..root + PAGE, copy);
    owner(&forged, &[started(copy as u64)]).unwrap();
    let mut needed = 0;
    for index in 256..512 {
        let entry = u64_at(ram, root + index * 8);
        if entry == 0 {
            continue;
        }
        for other in [0, entry ^ 0x1000] {
            put(&mut forged, copy + index * 8, other);
            needed += usize::from(owner(&forged, &[started(copy as u64)]).is_err());
        }
        put(&mut forged, copy + index * 8, entry);
    }
    // The image, the direct map, and the struct pages.
    assert!(needed >= 6, "{needed}");
}

#[test]
fn user_space_under_page_table_isolation_has_twin_tables() {
    let root = facts().root;
    let twins = pair();
    let mut ram = original().to_vec();
    ram.copy_within(root..root + PAGE, twins);
    let user = twins + PAGE;
    ram[user..user + PAGE].fill(0);
    // The entry area, and the image with its entry code.
    for index in [508, 511] {
        put(
            &mut ram,
            user + index * 8,
            u64_at(original(), root + index * 8),
        );
    }
    owner(&ram, &[started(user as u64)]).unwrap();
    owner(&ram, &[started(user as u64 | 0x805), started(root as u64)]).unwrap();
    // Not the twin of a whole table.
    let mut alone = ram.clone();
    alone[twins..twins + PAGE].fill(0);
    owner(&alone, &[started(user as u64)]).unwrap_err();
    // Beside one, but no twin of it.
    for index in [508, 511] {
        let mut other = ram.clone();
        put(&mut other, user + index * 8, 0);
        owner(&other, &[started(user as u64)]).unwrap_err();
    }
    // Without isolation bit 12 is a bit of the address.
    let mut odd = original().to_vec();
    odd.copy_within(root..root + PAGE, user);
    owner(&odd, &[started(user as u64)]).unwrap();
}

#[test]
fn what_the_user_says_counts_and_what_is_said_may_be_a_note() {
    let ram = original();
    let root = facts().root as u64;
    let bad = || Processors::Known(vec![started(0x1000)]);
    let given = |cr3| GuestOptions::new().cr3(Cr3::new(cr3));
    let refuse = OnInconsistency::Refuse;
    classify(ram, bad(), &given(root), refuse).unwrap();
    classify(ram, Processors::Unknown, &given(root), refuse).unwrap();
    let refused = classify(ram, Processors::Unknown, &given(0x1000), refuse).unwrap_err();
    assert!(matches!(refused, VmiError::NotOwner { .. }), "{refused}");
    let keep = OnInconsistency::KeepInQuestion;
    let pages = classify(ram, bad(), &GuestOptions::new(), keep).unwrap();
    assert!(
        pages
            .notes
            .iter()
            .any(|note| note.to_string().contains("does not own"))
    );
    let pages = classify(ram, Processors::Crashed, &GuestOptions::new(), refuse).unwrap();
    assert!(
        pages
            .notes
            .iter()
            .any(|note| note.to_string().contains("crash dump"))
    );
    let not_told = Processors::NotTold("a test");
    let pages = classify(ram, not_told, &GuestOptions::new(), refuse).unwrap();
    assert!(
        pages
            .notes
            .iter()
            .any(|note| note.to_string().contains("not believed: a test"))
    );
}

/// A simple generator: the same decoys every time.
fn next(state: &mut u64) -> usize {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    usize::try_from(*state >> 1).unwrap()
}

/// Pages that pass for VMCOREINFO.
fn decoys(count: usize) -> Vec<u8> {
    let text = facts().text.as_bytes();
    let digits: Vec<usize> = (0..text.len())
        .filter(|at| text[*at].is_ascii_digit())
        .collect();
    let mut state = 0x2545_f491_4f6c_dd1d;
    let mut pages = vec![0; count * PAGE];
    for (nth, page) in pages.chunks_mut(PAGE).enumerate() {
        let random = next(&mut state);
        match nth % 4 {
            0 => page[..12].copy_from_slice(b"OSRELEASE=x\n"),
            1 => page[..text.len()].copy_from_slice(text),
            2 => {
                page[..text.len()].copy_from_slice(text);
                let at = digits[random % digits.len()];
                page[at] = b'0' + (text[at] - b'0' + 1 + u8::try_from(nth % 9).unwrap()) % 10;
            }
            _ => {
                let len = random % text.len();
                page[..len].copy_from_slice(&text[..len]);
            }
        }
    }
    pages
}

/// The longest time that decoys may cost: unoptimised code is slower, and tests run beside each other.
fn bound() -> Duration {
    Duration::from_secs(if cfg!(debug_assertions) { 8 } else { 1 })
}

#[test]
fn ten_thousand_decoys_cost_less_than_a_second() {
    let ram = original();
    let decoys = decoys(10_000);
    let alone = memory(&[(0, ram)]);
    let started_at = Instant::now();
    let guest = LinuxGuest::open(&alone, &GuestOptions::new()).unwrap();
    let without = started_at.elapsed();
    let plain = guest.classify(OnInconsistency::Refuse).unwrap();
    // Above all memory, where the search begins; and below, as the guest's memory ends with them.
    for at in [1 << 30, ram.len() as u64] {
        for processors in [
            Processors::Unknown,
            Processors::Known(vec![started(facts().root as u64)]),
        ] {
            let machine = Machine {
                memory: memory(&[(0, ram), (at, &decoys)]),
                processors,
            };
            let started_at = Instant::now();
            let found = LinuxGuest::open(&machine, &GuestOptions::new()).unwrap();
            let took = started_at.elapsed();
            assert!(took < without + bound(), "{took:?}, {without:?} without");
            assert_eq!(found.vmcoreinfo(), guest.vmcoreinfo());
            let pages = found.classify(OnInconsistency::Refuse).unwrap();
            let counts = |pages: &Classification| pages.map.counts().get(PageClass::FreeBuddy);
            assert_eq!(counts(&pages), counts(&plain));
        }
    }
}

#[test]
fn a_copy_that_differs_is_not_the_kernels_own() {
    let facts = facts();
    let decoys = decoys(64);
    // The kernel's own page is gone, and what is left are decoys.
    let mut ram = original().to_vec();
    ram[facts.own..facts.own + PAGE].fill(0);
    let without_exact: Vec<u8> = decoys
        .chunks(PAGE)
        .filter(|page| !page.starts_with(facts.text.as_bytes()))
        .flatten()
        .copied()
        .collect();
    let machine = memory(&[(0, &ram), (1 << 30, &without_exact)]);
    let error = LinuxGuest::open(&machine, &GuestOptions::new()).unwrap_err();
    assert!(
        matches!(error, VmiError::Stale { .. } | VmiError::Symbols(_)),
        "{error}"
    );
    // Nor by the note of a dump, if it is another's.
    let mut note = facts.text.clone();
    note.push_str("NUMBER(of_another)=1\n");
    let options = GuestOptions::new().vmcoreinfo(note);
    let whole = memory(&[(0, original())]);
    let guest = LinuxGuest::open(&whole, &options).unwrap();
    assert_eq!(guest.vmcoreinfo(), Some(facts.text.as_str()));
    // What is added at a crash makes no difference.
    let crashed = format!("{}CRASHTIME=1764345600\n", facts.text);
    let guest = LinuxGuest::open(&whole, &GuestOptions::new().vmcoreinfo(crashed)).unwrap();
    assert_eq!(guest.symbol_sources()[0], "VMCOREINFO note");
}

/// The guest as it would be 1 GiB further up: its page tables and `phys_base` say so.
fn moved() -> Vec<u8> {
    const UP: u64 = 1 << 30;
    let facts = facts();
    let mut ram = original().to_vec();
    let ram_end = ram.len() as u64;
    let mut seen = HashSet::from([facts.root]);
    let mut todo = vec![(facts.root, 4)];
    while let Some((table, level)) = todo.pop() {
        let first = if level == 4 { 256 } else { 0 };
        for at in (table + first * 8..table + PAGE).step_by(8) {
            let entry = u64_at(original(), at);
            let address = entry & 0x000f_ffff_ffff_f000;
            if entry & 1 == 0 || address >= ram_end {
                continue;
            }
            put(&mut ram, at, entry + UP);
            let is_page = level == 1 || level < 4 && entry & 0x80 != 0;
            let below = usize::try_from(address).unwrap();
            if !is_page && seen.insert(below) {
                todo.push((below, level - 1));
            }
        }
    }
    let line = facts
        .text
        .lines()
        .find(|l| l.starts_with("NUMBER(phys_base)="))
        .unwrap();
    let base: i64 = line.split_once('=').unwrap().1.parse().unwrap();
    let text = facts
        .text
        .replace(line, &format!("NUMBER(phys_base)={}", base + (1 << 30)));
    ram[facts.own..facts.own + PAGE].fill(0);
    ram[facts.own..facts.own + text.len()].copy_from_slice(text.as_bytes());
    ram
}

#[test]
fn of_two_kernels_that_stand_the_processors_choose_and_then_traces() {
    const UP: u64 = 1 << 30;
    let facts = facts();
    let upper = moved();
    let own = facts.own as u64;
    let root = facts.root as u64;
    let open = |upper: &[u8], processors| {
        let machine = Machine {
            memory: memory(&[(0, original()), (UP, upper)]),
            processors,
        };
        LinuxGuest::open(&machine, &GuestOptions::new()).and_then(|guest| {
            guest.classify(OnInconsistency::Refuse)?;
            Ok(guest.symbol_sources()[0].clone())
        })
    };
    let known = |roots: &[u64]| Processors::Known(roots.iter().map(|cr3| started(*cr3)).collect());
    let at = |gpa: u64| format!("VMCOREINFO at {gpa:#x}");
    assert_eq!(open(&upper, known(&[root])).unwrap(), at(own));
    assert_eq!(open(&upper, known(&[UP + root])).unwrap(), at(UP + own));
    // Processors are in both.
    let error = open(&upper, known(&[root, UP + root])).unwrap_err();
    assert!(matches!(error, VmiError::Undecided { .. }), "{error}");
    let told = error.to_string();
    assert!(
        told.contains(&at(own)) && told.contains(&at(UP + own)),
        "{told}"
    );
    // Nothing is told of them: the first MiB is not where the upper kernel left its trampoline.
    assert_eq!(open(&upper, Processors::Unknown).unwrap(), at(own));
    // One of them is not whole: it is not the one, whichever is found first.
    let (page, release) = (facts.own..facts.own + PAGE, facts.own + 10);
    let mut torn = upper.clone();
    torn[release] ^= 1;
    assert_eq!(open(&torn, Processors::Unknown).unwrap(), at(own));
    let mut torn = upper.clone();
    torn.copy_within(page.clone(), pair());
    torn[page].fill(0);
    assert_eq!(open(&torn, Processors::Unknown).unwrap(), at(own));
}
