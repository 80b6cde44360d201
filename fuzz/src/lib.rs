//! What each fuzz target does, as a function of bytes: run by libFuzzer through
//! `fuzz_targets/`, and on stable by `tests/replay.rs`.
#![allow(missing_docs)]

use sonicshot::{
    DropClasses, Fill, Gpa, GuestBytes, GuestMemory, MappedRegions, PageClass, PageMap, PageSize,
    Pfn, PfnRange, PrunePlan,
};
use sonicshot_dump::{Dump, LayoutSpec, Overwrite};
use sonicshot_vmi::symbols::{Btf, SymbolSource, Vmcoreinfo, open_symbol_file};
use sonicshot_vmi::{GuestOptions, LinuxGuest, OnInconsistency};
use std::io::Write;

/// A target: its name, its body.
pub type Target = (&'static str, fn(&[u8]));

pub const TARGETS: &[Target] = &[
    ("btf", btf),
    ("vmcoreinfo", vmcoreinfo),
    ("symbol_file", symbol_file),
    ("elf_core", elf_core),
    ("raw", raw),
    ("layout", layout),
    ("guest", guest),
];

fn ask(source: &dyn SymbolSource) {
    let _ = (source.symbol("_stext"), source.type_size("page"));
    for path in [
        "flags",
        "lru.prev",
        "lru",
        "_mapcount",
        "free_area",
        "x.y.z",
    ] {
        let _ = (source.member("page", path), source.member("zone", path));
    }
    let _ = (
        source.constant("PG_lru"),
        source.build_id(),
        source.banner(),
    );
}

fn file(data: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(data).expect("writing it");
    file
}

pub fn btf(data: &[u8]) {
    if let Ok(btf) = Btf::new("fuzz", data.to_vec()) {
        ask(&btf);
    }
}

pub fn vmcoreinfo(data: &[u8]) {
    if let Ok(info) = Vmcoreinfo::parse(data) {
        ask(&info);
        let _ = (
            info.kernel_offset(),
            info.page_size(),
            info.number("phys_base"),
        );
    }
}

pub fn symbol_file(data: &[u8]) {
    if let Ok(source) = open_symbol_file(file(data).path()) {
        ask(source.as_ref());
    }
}

/// Opens a dump, reads from it, and prunes every other page of it.
fn dump(data: &[u8], spec: Option<&LayoutSpec>) {
    let file = file(data);
    let Ok(dump) = Dump::open(file.path(), spec) else {
        return;
    };
    let _ = dump.vmcoreinfo();
    let mut buffer = [0; 64];
    for region in dump.layout().regions() {
        let _ = dump.read(region.start(), &mut buffer);
        let _ = dump.map(region.start(), 64);
        let _ = dump.next_data(region.start());
    }
    // A header may claim more memory than a test should hold a map of.
    if dump.layout().bytes() > 1 << 24 {
        return;
    }
    let mut map = PageMap::new(dump.layout(), PageSize::SIZE_4K);
    for pfn in (0..4096).step_by(2) {
        if let Some(frame) = PfnRange::with_len(Pfn::new(pfn), 1) {
            map.set(frame, PageClass::FreeBuddy);
        }
    }
    let plan = PrunePlan::new(&map, &DropClasses::default(), Fill::Zero);
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("out");
    if dump
        .prune_to(&plan, &out, Overwrite::Refuse, &mut |_, _| {})
        .is_ok()
    {
        let pruned = Dump::open(&out, spec).expect("what we write, we read");
        for region in dump.layout().regions() {
            for kept in plan.kept_in(*region) {
                let (mut a, mut b) = (
                    vec![0; 64.min(kept.len() as usize)],
                    vec![0; 64.min(kept.len() as usize)],
                );
                if dump.read(kept.start(), &mut a).is_ok() {
                    pruned.read(kept.start(), &mut b).expect("kept bytes");
                    assert_eq!(a, b);
                }
            }
        }
    }
    let _ = dump.prune_in_place(&plan, &mut |_, _| {});
}

pub fn elf_core(data: &[u8]) {
    dump(data, None);
}

pub fn raw(data: &[u8]) {
    dump(data, Some(&LayoutSpec::Flat));
}

pub fn layout(data: &[u8]) {
    if let Ok(text) = core::str::from_utf8(data)
        && let Ok(spec) = text.parse::<LayoutSpec>()
    {
        let _ = (spec.ranges(1 << 32), spec.to_string());
    }
}

/// Guest memory whose pages are the input's, and then zero.
pub fn guest(data: &[u8]) {
    let mut ram = data.to_vec();
    ram.resize(data.len().next_multiple_of(4096).max(4096), 0);
    let regions = vec![(Gpa::ZERO, GuestBytes::from_slice(&ram))];
    let Ok(memory) = MappedRegions::new(regions) else {
        return;
    };
    if let Ok(guest) = LinuxGuest::open(&memory, &GuestOptions::new()) {
        let _ = guest.e820();
        let _ = guest.classify(OnInconsistency::KeepInQuestion);
    }
}
