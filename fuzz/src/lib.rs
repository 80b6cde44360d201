//! The body of each fuzz target, as a function of bytes: run by libFuzzer through `fuzz_targets/`,
//! and on stable by `tests/replay.rs`.
#![allow(missing_docs)]

pub mod mutate;

use sonicshot::checkpoint::{
    Before, CheckpointReader, DiskOffset, DiskSource, GivenDisk, MovedOn, RestoreOptions,
    RestoreRegions,
};
use sonicshot::{
    DropClasses, FileBytes, Fill, Gpa, GpaRange, GuestBytes, GuestMemory, MappedRegions, PageClass,
    PageMap, PageSize, Pfn, PfnRange, PrunePlan, RamLayout, WorkOptions,
};
use sonicshot_dump::{
    CheckedPlan, DiskImage, Dump, DumpError, LayoutSpec, PruneOptions, SnapshotFiles, WriteOptions,
    XlSkeleton,
};
use sonicshot_serve::{FaultRequest, Handshake, Migration};
use sonicshot_vmi::symbols::{Btf, SymbolFile, SymbolSource, Vmcoreinfo, open_symbol_file};
use sonicshot_vmi::{GuestOptions, LinuxGuest, OnInconsistency};
use sonicshot_xen::{Joined, Skeleton, XlImage};
use std::fs::{self, File};
use std::hash::Hasher;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use twox_hash::XxHash3_64;

/// A target: its name, its body.
pub type Target = (&'static str, fn(&[u8]));

pub const TARGETS: &[Target] = &[
    ("btf", btf),
    ("vmcoreinfo", vmcoreinfo),
    ("symbol_file", symbol_file),
    ("small_symbols", small_symbols),
    ("elf_core", elf_core),
    ("raw", raw),
    ("mapped_ram", mapped_ram),
    ("stream", stream),
    ("processors", processors),
    ("libvirt", libvirt),
    ("qcow2", qcow2),
    ("compressed", compressed),
    ("vmware", vmware),
    ("kdump", kdump),
    ("lime", lime),
    ("avml", avml),
    ("cloud_hypervisor", cloud_hypervisor),
    ("crosvm", crosvm),
    ("firecracker", firecracker),
    ("xen", xen),
    ("xen_core", xen_core),
    ("layout", layout),
    ("guest", guest),
    ("checkpoint", checkpoint),
    ("serve_message", serve_message),
    ("serve_cloud", serve_cloud),
    ("qemu_monitor", qemu_monitor),
    ("mutate", mutate),
];

/// The answers of QEMU's monitor, a checkpoint's record of them, or the requests of a restored QEMU:
/// the first byte chooses.
pub fn qemu_monitor(data: &[u8]) {
    sonicshot_qemu_live::fuzz(data);
}

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

/// A folder in memory, if there is one: what is written is waited for on a disk.
fn folder() -> TempDir {
    let in_memory = tempfile::tempdir_in("/dev/shm");
    in_memory
        .or_else(|_| tempfile::tempdir())
        .expect("a folder")
}

/// A file that nobody has open: one that somebody writes is not pruned in place.
struct Input {
    _folder: TempDir,
    path: PathBuf,
}

impl Input {
    fn path(&self) -> &Path {
        &self.path
    }
}

fn file(data: &[u8]) -> Input {
    let folder = folder();
    let path = folder.path().join("input");
    fs::write(&path, data).expect("writing it");
    Input {
        _folder: folder,
        path,
    }
}

/// The messages of a VMM to a page server: the first byte is the number of descriptors.
pub fn serve_message(data: &[u8]) {
    let Some((descriptors, message)) = data.split_first() else {
        return;
    };
    let range = |start: u64, len: u64| GpaRange::with_len(Gpa::new(start), len);
    let regions = [range(0, 3 << 30), range(4 << 30, 1 << 30)];
    let layout = RamLayout::new(regions.into_iter().flatten().collect());
    let handshake = Handshake::parse(message, usize::from(descriptors & 7));
    let (Ok(layout), Ok(handshake)) = (layout, handshake) else {
        return;
    };
    let Ok(regions) = handshake.regions(&layout) else {
        return;
    };
    for region in regions {
        assert!(layout.contains(region.guest().start(), region.guest().len()));
        assert!(
            region
                .host()
                .raw()
                .checked_add(region.guest().len())
                .is_some()
        );
    }
}

/// The requests of Cloud Hypervisor to a page server, in a stream, and the configuration that it was
/// told.
pub fn serve_cloud(data: &[u8]) {
    let mut rest = data;
    while let Ok(Some((request, len))) = FaultRequest::parse(rest) {
        if let FaultRequest::Pages(range) = request {
            assert!(!range.is_empty());
        }
        rest = &rest[len..];
    }
    let _ = Migration::new(data.to_vec(), b"{}".to_vec(), Path::new("fuzz"));
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

/// A small symbol file: as it is, and with a last line that is of what is before it.
pub fn small_symbols(data: &[u8]) {
    let read = |bytes: &[u8]| {
        if let Ok(file) = SymbolFile::parse("fuzz", bytes) {
            ask(&file);
            let text = file.to_text();
            let again = SymbolFile::parse("fuzz", text.as_bytes());
            assert!(again.is_ok_and(|again| again == file));
        }
    };
    read(data);
    let end = data.windows(5).rposition(|window| window == b"\nend ");
    let end = end.map_or(data.len(), |at| at + 1);
    let mut sealed = data[..end].to_vec();
    let mut hasher = XxHash3_64::new();
    hasher.write(&sealed);
    sealed.extend(format!("end {:016x}\n", hasher.finish()).bytes());
    read(&sealed);
}

/// Opens a dump, reads from it, and prunes every other page of it.
fn dump(data: &[u8], spec: Option<&LayoutSpec>) {
    let file = file(data);
    if let Ok(dump) = Dump::open(file.path(), spec) {
        prune(&dump, spec);
    }
}

/// A plan that drops every other page, unless the guest is too large for a test.
fn every_other_page(dump: &Dump) -> Option<PrunePlan> {
    // A header may claim more memory than a test should hold a map of.
    if dump.layout().bytes() > 1 << 24 {
        return None;
    }
    let mut map = PageMap::new(dump.layout(), PageSize::SIZE_4K);
    for pfn in (0..4096).step_by(2) {
        if let Some(frame) = PfnRange::with_len(Pfn::new(pfn), 1) {
            map.set(frame, PageClass::FreeBuddy);
        }
    }
    Some(PrunePlan::new(&map, &DropClasses::default(), Fill::Any))
}

fn prune(dump: &Dump, spec: Option<&LayoutSpec>) {
    let _ = (dump.vmcoreinfo(), dump.processors());
    let mut buffer = [0; 64];
    for region in dump.layout().regions() {
        let _ = dump.read(region.start(), &mut buffer);
        let _ = dump.map(region.start(), 64);
        let _ = dump.next_data(region.start());
    }
    let Some(plan) = every_other_page(dump) else {
        return;
    };
    let folder = folder();
    let out = folder.path().join("out");
    let unchecked = CheckedPlan::unchecked(dump, &plan);
    if unchecked.prune_to(&out, &PruneOptions::new()).is_ok() {
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
    let in_place = unchecked.prune_in_place(&PruneOptions::new());
    assert!(!matches!(in_place, Err(DumpError::InUse { .. })));
}

/// The devices' state behind the memory of a stream, which is one page of zeroes.
pub fn processors(data: &[u8]) {
    const HEAD: &[u8] = b"QEVM\0\0\0\x03\x07\0\0\0\x0epc-i440fx-10.0\
        \x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\x10\x04\
        \x06pc.ram\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02\
        \x03\0\0\0\x02\0\0\0\0\0\0\0\x02\x06pc.ram\0\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02";
    let file = file(&[HEAD, data].concat());
    let dump = Dump::open(file.path(), None).expect("the memory is whole");
    let _ = dump.processors();
}

/// The state of a Cloud Hypervisor folder, and behind a zero byte the pages of its memory.
pub fn cloud_hypervisor(data: &[u8]) {
    let mut parts = data.splitn(2, |byte| *byte == 0);
    let (state, memory) = (parts.next().unwrap_or(&[]), parts.next().unwrap_or(&[]));
    let folder = folder();
    let write = |name: &str, bytes: &[u8]| {
        fs::write(folder.path().join(name), bytes).expect("writing a file");
    };
    write("state.json", state);
    write("config.json", b"{}");
    let pages = usize::from(memory.first().copied().unwrap_or(4));
    write("memory-ranges", &vec![7; pages * 4096]);
    let Ok(files) = SnapshotFiles::find(folder.path(), None, None) else {
        return;
    };
    if let Ok(dump) = Dump::open(files.memory(), files.layout()) {
        assert_eq!(dump.layout().bytes(), pages as u64 * 4096);
        prune(&dump, files.layout());
    }
}

/// The number of pages of a crosvm snapshot's memory, and the metadata beside it.
pub fn crosvm(data: &[u8]) {
    let (pages, metadata) = data.split_first().unwrap_or((&4, &[]));
    let pages = usize::from(*pages);
    let folder = folder();
    let memory = folder.path().join("mem");
    fs::write(&memory, vec![7; pages * 4096]).expect("writing a file");
    fs::write(folder.path().join("mem_metadata"), metadata).expect("writing a file");
    let Ok(dump) = Dump::open(&memory, None) else {
        return;
    };
    let Some(plan) = every_other_page(&dump) else {
        return;
    };
    let plan = CheckedPlan::unchecked(&dump, &plan);
    let _ = plan.prune_in_place(&PruneOptions::new());
    let again = Dump::open(&memory, None).expect("what we write, we read");
    assert_eq!(again.layout(), dump.layout());
}

/// Writes the page that a byte's two bits name: a hole, zeroes, or one of two patterns.
fn page(file: &File, number: usize, bits: u8) {
    let byte = match bits & 3 {
        0 => return,
        1 => 0,
        other => other,
    };
    file.write_all_at(&[byte; 4096], number as u64 * 4096)
        .expect("writing a page");
}

/// A diff and its base, a byte for a page of both; what they mean stays when they are pruned.
/// The same bytes as a state file beside a memory file.
pub fn firecracker(data: &[u8]) {
    let folder = folder();
    let create = |name: &str, len: u64| {
        let path = folder.path().join(name);
        let file = File::create(&path).expect("a file");
        file.set_len(len).expect("its length");
        (path, file)
    };
    let (_, memory) = create("vm.mem", 1 << 20);
    drop(memory);
    fs::write(folder.path().join("vm.state"), data).expect("writing a file");
    let _ = SnapshotFiles::find(folder.path(), None, None);

    let data = &data[..data.len().min(128)];
    let len = data.len() as u64 * 4096;
    let ((base, base_file), (diff, diff_file)) = (create("base", len), create("diff", len));
    for (number, byte) in data.iter().enumerate() {
        page(&base_file, number, *byte);
        page(&diff_file, number, *byte >> 2);
    }
    drop((base_file, diff_file));
    let open = |base: &Path| Dump::open_over(&diff, base, Some(&LayoutSpec::Flat));
    let Ok(dump) = open(&base) else {
        assert!(data.is_empty());
        return;
    };
    let read = |dump: &Dump| {
        let mut bytes = vec![0; data.len() * 4096];
        dump.read(Gpa::ZERO, &mut bytes).expect("what is RAM");
        bytes
    };
    let before = read(&dump);
    prune(&dump, Some(&LayoutSpec::Flat));
    let after = read(&open(&base).expect("the same files"));
    for (number, (before, after)) in before.chunks(4096).zip(after.chunks(4096)).enumerate() {
        // `prune` drops every other page.
        let gone = number % 2 == 0 && after.iter().all(|byte| *byte == 0);
        assert!(before == after || gone, "page {number}");
    }
}

pub fn elf_core(data: &[u8]) {
    dump(data, None);
}

pub fn mapped_ram(data: &[u8]) {
    migration(data);
}

/// Prunes, and makes the other kind of migration file, which must be read again.
fn migration(data: &[u8]) {
    dump(data, Some(&LayoutSpec::Flat));
    let input = file(data);
    let Ok(dump) = Dump::open(input.path(), Some(&LayoutSpec::Flat)) else {
        return;
    };
    let folder = folder();
    let out = folder.path().join("out");
    let written = dump
        .to_stream(&out, &WriteOptions::new())
        .or_else(|_| dump.to_mapped_ram(&out, &WriteOptions::new()));
    if written.is_ok() {
        let again = Dump::open(&out, Some(&LayoutSpec::Flat)).expect("what we write, we read");
        assert_eq!(dump.layout(), again.layout());
        let (mut a, mut b) = ([0; 64], [0; 64]);
        for region in dump.layout().regions() {
            dump.read(region.start(), &mut a).expect("the beginning");
            again.read(region.start(), &mut b).expect("the beginning");
            assert_eq!(a, b);
        }
    }
    let spool = sonicshot_dump::Spool::from_reader("a pipe", data).expect("a spool");
    assert!(Dump::open_spooled(&spool, Some(&LayoutSpec::Flat)).is_ok());
}

pub fn stream(data: &[u8]) {
    migration(data);
}

pub fn libvirt(data: &[u8]) {
    migration(data);
}

/// As an image, which is pruned, taken apart and put together; and as what is left of one without
/// its pages' content.
pub fn xen(data: &[u8]) {
    dump(data, None);
    let input = file(data);
    if let Ok(dump) = Dump::open(input.path(), None) {
        let file = File::open(input.path()).expect("the input");
        xen_again(&dump, &file);
    }
    let bytes = FileBytes::from_slice(data);
    let Ok(skeleton) = Skeleton::parse(bytes) else {
        return;
    };
    let mut image = Vec::new();
    let put = |part| {
        match part {
            Joined::Skeleton(range) => {
                image.extend(&data[range.start().raw() as usize..range.end().raw() as usize]);
            }
            Joined::Pages { frames, .. } => {
                image.resize(image.len() + frames.len() as usize * 4096, 0);
            }
        }
        Ok(())
    };
    skeleton
        .joined(bytes, |error| error, put)
        .expect("what was parsed");
    assert!(image.len() <= data.len() + skeleton.frames().count() * 4096);
    XlImage::parse(FileBytes::from_slice(&image)).expect("what we join, we read");
}

/// An image made of what a Xen image is besides its memory, and of its memory, holds the same.
fn xen_again(dump: &Dump, input: &File) {
    let Ok(Some(bytes)) = dump.xl_skeleton() else {
        return;
    };
    let folder = folder();
    let out = folder.path().join("out");
    XlSkeleton::parse(Path::new("skeleton"), bytes)
        .expect("what we take apart, we read")
        .write(dump, &|_| false, &out, &[input], &WriteOptions::new())
        .expect("its own memory");
    let again = Dump::open(&out, None).expect("what we write, we read");
    assert_eq!(dump.layout(), again.layout());
    let frames = dump.layout().frames(PageSize::SIZE_4K);
    for pfn in frames.flat_map(|run| run.iter()) {
        let at = pfn.gpa(PageSize::SIZE_4K).expect("what is RAM");
        let (mut a, mut b) = ([0; 4096], [0; 4096]);
        let there = (
            dump.read(at, &mut a).is_ok(),
            again.read(at, &mut b).is_ok(),
        );
        assert!(there.0 == there.1 && a == b, "frame {pfn}");
    }
}

pub fn xen_core(data: &[u8]) {
    let file = file(data);
    let Ok(dump) = Dump::open(file.path(), None) else {
        return;
    };
    prune(&dump, None);
    let Some(p2m) = dump.p2m() else { return };
    for pfn in dump.layout().frames(PageSize::SIZE_4K).map(|f| f.start()) {
        let back = p2m.mfn(pfn).and_then(|mfn| p2m.pfn(mfn));
        assert_eq!(back, Some(pfn));
    }
}

pub fn kdump(data: &[u8]) {
    dump(data, None);
}

pub fn qcow2(data: &[u8]) {
    migration(data);
    let folder = folder();
    let path = folder.path().join("image");
    fs::write(&path, data).expect("writing the image");
    let Ok(disk) = DiskImage::open(&path) else {
        return;
    };
    let mut part = [0; 5000];
    let mut at = DiskOffset::ZERO;
    for _ in 0..64 {
        let Ok(Some(data)) = disk.next_disk_data(at) else {
            break;
        };
        assert!(data.start() >= at && !data.is_empty());
        let _ = disk.read_disk(&mut part, data.start());
        at = data.end();
    }
}

pub fn compressed(data: &[u8]) {
    dump(data, None);
}

/// The state of a guest of VMware's, beside memory of eight pages.
pub fn vmware(data: &[u8]) {
    let folder = folder();
    let memory = folder.path().join("guest.vmem");
    fs::write(&memory, [7; 8 * 4096]).expect("writing the memory");
    fs::write(memory.with_extension("vmss"), data).expect("writing the state");
    if let Ok(files) = SnapshotFiles::find(&memory, None, None)
        && let Ok(dump) = Dump::open(files.memory(), files.layout())
    {
        prune(&dump, files.layout());
    }
}

pub fn lime(data: &[u8]) {
    dump(data, None);
}

pub fn avml(data: &[u8]) {
    dump(data, None);
}

pub fn raw(data: &[u8]) {
    dump(data, Some(&LayoutSpec::Flat));
}

/// A mutation of a real guest, chosen by the bytes: no frame in use may be dropped.
pub fn mutate(data: &[u8]) {
    mutate::by_input(data);
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

fn word(data: &[u8], at: usize) -> Option<usize> {
    let bytes = data.get(at..at.checked_add(8)?)?;
    usize::try_from(u64::from_le_bytes(bytes.try_into().ok()?)).ok()
}

/// Puts the checksum of `from..to` at `at`.
fn seal(data: &mut [u8], from: usize, to: usize, at: usize) -> Option<()> {
    let sum = XxHash3_64::oneshot(data.get(from..to)?);
    let place = data.get_mut(at..at.checked_add(8)?)?;
    place.copy_from_slice(&sum.to_le_bytes());
    Some(())
}

/// Makes the checksums of a damaged checkpoint right again, so that what lies behind them is
/// reached too.
fn reseal(data: &mut [u8]) -> Option<()> {
    let header = word(data, 12)? & 0xffff_ffff;
    seal(data, 0, header.checked_sub(8)?, header.checked_sub(8)?);
    let footer = data.len().checked_sub(64)?;
    let len = (data.len() as u64).to_le_bytes();
    data.get_mut(footer + 24..footer + 32)?
        .copy_from_slice(&len);
    let index = word(data, footer)?;
    // The second section's record: the chunks.
    let at = index.checked_add(32 + 24)?;
    let chunks = index.checked_add(word(data, at.checked_add(8)?)?)?;
    let count = word(data, at.checked_add(16)?)? / 24;
    for number in 0..count.min(1000) {
        let record = chunks.checked_add(number.checked_mul(24)?)?;
        let start = word(data, record)?;
        let len = word(data, record.checked_add(8)?)? & 0xffff_ffff;
        if let Some(end) = start.checked_add(len) {
            seal(data, start, end, record.checked_add(16)?);
        }
    }
    seal(data, index, footer, footer + 16);
    seal(data, footer, footer + 48, footer + 48)
}

/// A disk of any length, each of whose sectors is full of its number.
struct AnyDisk(u64);

impl DiskSource for AnyDisk {
    fn disk_len(&self) -> std::io::Result<u64> {
        Ok(self.0)
    }

    fn read_disk(&self, buf: &mut [u8], at: DiskOffset) -> std::io::Result<()> {
        let end = at.raw().checked_add(buf.len() as u64);
        if end.is_none_or(|end| end > self.0) {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        for (byte, at) in buf.iter_mut().zip(at.raw()..) {
            *byte = (at >> 9) as u8;
        }
        Ok(())
    }
}

/// Opens a checkpoint and reads all kinds of things from it.
pub fn checkpoint(data: &[u8]) {
    let mut sealed = data.to_vec();
    let _ = reseal(&mut sealed);
    for data in [data, &sealed] {
        let Ok(reader) = CheckpointReader::new(data) else {
            continue;
        };
        let disks = reader.info().disks.iter();
        let disks = disks.map(|disk| GivenDisk::new(&disk.name, AnyDisk(disk.bytes)));
        let disks: Vec<_> = disks.collect();
        let Ok(reader) = reader.with_disks(disks, MovedOn::GoOn) else {
            continue;
        };
        let _ = (reader.stats(), reader.verify(&WorkOptions::new()));
        let _ = reader.verify_disks(&WorkOptions::new());
        let names: Vec<String> = reader.blobs().map(|(name, _)| name.to_owned()).collect();
        for name in names {
            let _ = reader.read_blob(&name);
        }
        let mut buffer = vec![0; 20_000];
        let regions = reader.layout().regions().to_vec();
        for region in &regions {
            let last = region
                .end()
                .raw()
                .saturating_sub(5000)
                .max(region.start().raw());
            for at in [region.start(), Gpa::new(last)] {
                let left = region.end().offset_from(at).unwrap_or(0);
                let len = buffer
                    .len()
                    .min(usize::try_from(left).unwrap_or(usize::MAX));
                let _ = reader.read(at, &mut buffer[..len]);
                let _ = (
                    reader.next_data(at),
                    reader.run_of(at.pfn(PageSize::SIZE_4K)),
                );
            }
        }
        if reader.layout().bytes() <= 4 << 20 {
            let mut memory: Vec<Vec<u8>> = regions
                .iter()
                .map(|region| vec![1; usize::try_from(region.len()).unwrap_or(0)])
                .collect();
            let places = regions.iter().map(|region| region.start());
            let slices = memory.iter_mut().map(Vec::as_mut_slice);
            if let Ok(target) = RestoreRegions::new(places.zip(slices).collect(), Before::Anything)
            {
                let _ = reader.restore(&target, &RestoreOptions::new());
            }
        }
    }
}
