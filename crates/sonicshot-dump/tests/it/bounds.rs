//! The bounds on what a file may claim of itself: as much as one is taken, more is refused with
//! the words that name it. `BOUNDS.md` has all bounds of the workspace.

use crate::common::qemu::{self, Block, virtio_mem};
use sonicshot_dump::{Dump, SnapshotFiles};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// The sign of a bound.
enum Shows {
    /// More is refused in these words.
    Says(&'static str),
    /// Anything longer is passed over: there are no VMCOREINFO, no notes.
    NoVmcoreinfo,
    NoNotes,
}
use Shows::{NoNotes, NoVmcoreinfo, Says};

/// A bound: its name, how much is taken (less of what takes its time), how much is not, a file that
/// claims so much, and what is said.
type Bound = (&'static str, u64, u64, fn(&Path, u64) -> PathBuf, Shows);

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;

#[rustfmt::skip]
const BOUNDS: &[Bound] = &[
    ("avml.rs MAX_CHUNK", 1 << 16, (1 << 16) + 1, avml_chunk, Says("invalid Snappy chunk")),
    ("avml.rs MAX_RATIO", 32, 33, avml_ratio, Says("invalid Snappy chunk")),
    // And one more for each 256 bytes: a chunk takes 9.
    ("avml.rs SMALL_CHUNKS", 1 << 10, (1 << 20) + (1 << 17), avml_chunks, Says("too many small chunks")),
    ("cloud_hypervisor.rs MAX_RANGES", 1 << 16, (1 << 16) + 1, ch_ranges, Says("number of memory ranges")),
    ("cloud_hypervisor.rs MAX_STATE", 64 * MIB, 64 * MIB + 1, ch_state, Says("state longer than allowed")),
    ("crosvm.rs SMALL_METADATA", MIB + 64, MIB + 65, |at, len| crosvm_spaces(at, len, 1), Says("metadata longer than allowed")),
    ("crosvm.rs METADATA_A_PAGE", 64, 65, |at, each| crosvm_spaces(at, MIB + each * 1024, 1024), Says("metadata longer than allowed")),
    ("crosvm.rs MAX_METADATA", 64 * MIB, 64 * MIB + 1, |at, len| crosvm_spaces(at, len, 2 * MIB), Says("metadata longer than allowed")),
    ("crosvm.rs MAX_RANGES", 1 << 21, (1 << 21) + 3, crosvm_regions, Says("invalid length")),
    ("crosvm.rs MAX_SPARSENESS", 256, 257, |at, each| crosvm_claims(at, each * 2 * PAGE + 64 * MIB), Says("more memory than the file")),
    ("crosvm.rs SMALL", 64 * MIB, 65 * MIB, |at, small| crosvm_claims(at, 512 * PAGE + small), Says("more memory than the file")),
    ("wire.rs MAX_SEGMENTS", 1 << 20, (1 << 20) + 1, elf_counts, Says("invalid number of segments")),
    ("wire.rs MAX_OVERLAPPING", 1 << 12, (1 << 12) + 1, elf_overlaps, Says("too many overlapping segments")),
    ("wire.rs MAX_SPARSENESS", 256, 257, |at, each| elf_claims(at, each * MIB + 64 * MIB), Says("claim more memory")),
    ("wire.rs SMALL", 64 * MIB, 65 * MIB, |at, small| elf_claims(at, 256 * MIB + small), Says("claim more memory")),
    ("wire.rs MAX_NOTES", 1 << 16, (1 << 16) + 1, elf_notes, NoVmcoreinfo),
    ("wire.rs MAX_VMCOREINFO", 1 << 16, (1 << 16) + 1, elf_vmcoreinfo, NoVmcoreinfo),
    ("wire.rs MAX_KEPT_NOTES", 16 * MIB, 16 * MIB + 4, elf_notes_of, NoNotes),
    ("read.rs MAX_FRAMES", 1 << 24, (1 << 32) + 1, kdump_frames, Says("invalid number of frames")),
    ("read.rs MAX_REGIONS", 1 << 20, (1 << 20) + 1, kdump_regions, Says("too many ranges")),
    ("read.rs SMALL_PIECES", 1 << 10, (1 << 20) + (1 << 17), kdump_pieces, Says("too many small pieces")),
    ("read.rs MAX_VMCOREINFO", 1 << 16, (1 << 16) + 1, |at, len| kdump_part(at, 32, len), Says("VMCOREINFO")),
    ("read.rs MAX_NOTES", 16 * MIB, 16 * MIB + 1, |at, len| kdump_part(at, 48, len), Says("notes")),
    ("libvirt.rs MAX_DATA", 1 << 28, (1 << 28) + 1, libvirt_data, Says("invalid length of the domain's description")),
    ("lime.rs MAX_RECORDS", 1 << 10, (1 << 20) + 1, lime_records, Says("too many records")),
    ("start.rs MAX_NAME", 4096, 4097, qemu_name, Says("invalid length of a name")),
    ("start.rs MAX_CAPABILITIES", 256, 257, qemu_capabilities, Says("invalid number of capabilities")),
    ("start.rs MAX_PLUGGED", 256, 257, qemu_plugged, Says("invalid number of virtio-mem devices")),
    ("start.rs MAX_BLOCKS", 4096, 4097, qemu_blocks, Says("invalid number of memory blocks")),
    ("mapped_ram.rs SMALL", 1 << 10, 1 << 20, mapped_ranges, Says("more ranges of pages")),
    ("stream.rs SMALL", 1 << 24, (1 << 24) + (1 << 17), |at, small| stream_claims(at, small, 0), Says("invalid size of all memory")),
    ("stream.rs MAX_RATIO", 32, 33, |at, each| stream_claims(at, (1 << 24) + (each << 20), 9 * MIB), Says("invalid size of all memory")),
    ("qcow2.rs MAX_SNAPSHOTS_LEN", 1023, 1024, |at, count| qcow2_names(at, count, 0), Says("table that is too long")),
    ("snapshot.rs MAX_FILES", 1024, 1025, folder_of, Says("not a snapshot")),
];

/// The note on a file, and what was found in it.
fn look(path: &Path) -> (String, bool, bool) {
    let found = SnapshotFiles::find(path, None, None);
    let dump = found.and_then(|files| Dump::open(files.memory(), files.layout()));
    match dump {
        Ok(dump) => (
            String::new(),
            dump.vmcoreinfo().is_some(),
            dump.core_notes().is_some(),
        ),
        Err(error) => {
            let mut said = error.to_string();
            let mut next = std::error::Error::source(&error);
            while let Some(cause) = next {
                said = format!("{said}: {cause}");
                next = cause.source();
            }
            (said, false, false)
        }
    }
}

#[test]
fn no_file_claims_more_than_a_bound() {
    for (name, most, more, make, shows) in BOUNDS {
        for (amount, refused) in [(most, false), (more, true)] {
            let folder = tempfile::tempdir().unwrap();
            let path = make(folder.path(), *amount);
            let (said, vmcoreinfo, notes) = look(&path);
            let is_refused = match shows {
                Says(words) => said.contains(words),
                NoVmcoreinfo => !vmcoreinfo,
                NoNotes => !notes,
            };
            assert_eq!(is_refused, refused, "{name}, {amount}: {said}");
        }
    }
}

/// A file of these parts, with holes between.
fn sparse(folder: &Path, name: &str, len: u64, parts: &[(u64, &[u8])]) -> PathBuf {
    let path = folder.join(name);
    let file = File::create(&path).unwrap();
    file.set_len(len).unwrap();
    for (at, bytes) in parts {
        file.write_all_at(bytes, *at).unwrap();
    }
    path
}

fn whole(folder: &Path, bytes: &[u8]) -> PathBuf {
    let path = folder.join("dump");
    fs::write(&path, bytes).unwrap();
    path
}

fn put(out: &mut [u8], at: usize, bytes: &[u8]) {
    out[at..at + bytes.len()].copy_from_slice(bytes);
}

/// An AVML record of `len` bytes of RAM, and the beginning of its stream.
fn avml(len: u64) -> Vec<u8> {
    let mut out = b"AVML\x02\0\0\0".to_vec();
    out.extend([0, len - 1, 0].map(u64::to_le_bytes).concat());
    out.extend(b"\xff\x06\0\0sNaPpY");
    out
}

/// A chunk of a kind with so many bytes behind its sum.
fn snappy(out: &mut Vec<u8>, kind: u8, data: &[u8]) {
    out.extend(&(u32::from(kind) | (data.len() as u32 + 4) << 8).to_le_bytes());
    out.extend([0; 4]);
    out.extend(data);
}

fn avml_chunk(folder: &Path, len: u64) -> PathBuf {
    let mut out = avml(len);
    snappy(&mut out, 1, &vec![7; len as usize]);
    out.extend([0; 8]);
    whole(folder, &out)
}

/// 100 bytes that say that they are of so many times as many.
fn avml_ratio(folder: &Path, times: u64) -> PathBuf {
    let len = 100 * times;
    let mut data = vec![len as u8 | 0x80, (len >> 7) as u8];
    data.resize(100, 0);
    let mut out = avml(len);
    snappy(&mut out, 0, &data);
    out.extend([0; 8]);
    whole(folder, &out)
}

pub(crate) fn avml_chunks(folder: &Path, count: u64) -> PathBuf {
    let mut out = avml(count);
    for _ in 0..count {
        snappy(&mut out, 1, &[7]);
    }
    out.extend([0; 8]);
    whole(folder, &out)
}

fn ch(folder: &Path, state: &str, len: u64) -> PathBuf {
    fs::write(folder.join("state.json"), state).unwrap();
    fs::write(folder.join("config.json"), r#"{"memory":{"zones":null}}"#).unwrap();
    sparse(folder, "memory-ranges", len, &[]);
    folder.to_owned()
}

fn ch_ranges(folder: &Path, count: u64) -> PathBuf {
    let range = |number: u64| format!(r#"{{"gpa":{},"length":4096}}"#, 2 * number * PAGE);
    let ranges = (0..count).map(range).collect::<Vec<_>>().join(",");
    let state = format!(
        r#"{{"snapshots":{{"memory-manager":{{"snapshot_data":
        {{"memory_ranges":{{"data":[{ranges}]}}}}}}}}}}"#
    );
    ch(folder, &state, count * PAGE)
}

fn ch_state(folder: &Path, len: u64) -> PathBuf {
    ch(folder, &" ".repeat(len as usize), PAGE)
}

/// Metadata that are only spaces for the most part, of a memory of so many pages.
fn crosvm_spaces(folder: &Path, len: u64, pages: u64) -> PathBuf {
    let mut metadata = b"{".to_vec();
    metadata.resize(len as usize, b' ');
    fs::write(folder.join("mem_metadata"), metadata).unwrap();
    sparse(folder, "mem", pages * PAGE, &[])
}

/// Regions of no ranges, each of which counts for three.
fn crosvm_regions(folder: &Path, count: u64) -> PathBuf {
    let regions = vec!["[0,0]"; (count / 3) as usize].join(",");
    let metadata = format!("{{\"regions\":[{regions}]}}");
    fs::write(folder.join("mem_metadata"), metadata).unwrap();
    sparse(folder, "mem", MIB * PAGE, &[])
}

/// A memory of a page, whose metadata, of a page too, claim so many bytes of zeroes beside it.
fn crosvm_claims(folder: &Path, claimed: u64) -> PathBuf {
    let mut metadata = format!(
        r#"{{"regions":[{{"guest_base":0,"size":{claimed},"data_ranges":[{{"start":0,"end":4096}}]}}]}}"#
    );
    metadata.extend(std::iter::repeat_n(' ', PAGE as usize - metadata.len()));
    fs::write(folder.join("mem_metadata"), metadata).unwrap();
    sparse(folder, "mem", PAGE, &[])
}

/// An ELF core with segments: kind, offset, length in the file, in memory.
fn elf(folder: &Path, len: u64, segments: &[[u64; 4]], data: &[(u64, &[u8])]) -> PathBuf {
    let mut out = vec![0; 64 + segments.len() * 56];
    put(&mut out, 0, b"\x7fELF\x02\x01\x01");
    for (at, word) in [
        (16, 4),
        (18, 62),
        (54, 56),
        (56, segments.len() as u16),
        (58, 64),
    ] {
        put(&mut out, at, &u16::to_le_bytes(word));
    }
    put(&mut out, 20, &1_u32.to_le_bytes());
    put(&mut out, 32, &64_u64.to_le_bytes());
    for (number, [kind, offset, file_len, mem_len]) in segments.iter().enumerate() {
        let head = 64 + number * 56;
        put(&mut out, head, &(*kind as u32).to_le_bytes());
        for (at, word) in [(8, offset), (32, file_len), (40, mem_len)] {
            put(&mut out, head + at, &word.to_le_bytes());
        }
    }
    let parts = [&[(0, out.as_slice())], data].concat();
    sparse(folder, "core", len, &parts)
}

fn elf_counts(folder: &Path, count: u64) -> PathBuf {
    let path = elf(folder, 8192, &[[1, 4096, 4096, 4096]], &[]);
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(&[0xff, 0xff], 56).unwrap();
    // The number is in section 0.
    file.write_all_at(&4096_u64.to_le_bytes(), 40).unwrap();
    file.write_all_at(&(count as u32).to_le_bytes(), 4096 + 44)
        .unwrap();
    path
}

fn elf_overlaps(folder: &Path, count: u64) -> PathBuf {
    let segments = vec![[1, 0, 4096, 4096]; count as usize];
    elf(folder, MIB, &segments, &[])
}

fn elf_claims(folder: &Path, claimed: u64) -> PathBuf {
    elf(folder, MIB, &[[1, 4096, 4096, claimed]], &[])
}

fn note(name: &[u8], text: &[u8]) -> Vec<u8> {
    let mut out = [name.len() as u32, text.len() as u32, 0]
        .map(u32::to_le_bytes)
        .concat();
    for part in [name, text] {
        out.extend(part);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    out
}

/// A core with these notes, and a page.
fn elf_of(folder: &Path, notes: &[u8]) -> PathBuf {
    let len = notes.len() as u64;
    let segments = [[4, 4096, len, 0], [1, 0, 4096, 4096]];
    elf(folder, 4096 + len, &segments, &[(4096, notes)])
}

/// VMCOREINFO as the last of so many notes.
fn elf_notes(folder: &Path, count: u64) -> PathBuf {
    let mut notes = note(b"", b"").repeat(count as usize - 1);
    notes.extend(note(b"VMCOREINFO\0", b"OSRELEASE=6.1.0\n"));
    elf_of(folder, &notes)
}

fn elf_vmcoreinfo(folder: &Path, len: u64) -> PathBuf {
    elf_of(folder, &note(b"VMCOREINFO\0", &vec![b'a'; len as usize]))
}

/// Notes that take so many bytes in all.
fn elf_notes_of(folder: &Path, len: u64) -> PathBuf {
    elf_of(folder, &note(b"", &vec![7; len as usize - 12]))
}

/// A kdump file's headers: blocks of both bitmaps, frames.
fn kdump(folder: &Path, blocks: u64, frames: u64, parts: &[(u64, &[u8])]) -> PathBuf {
    let mut out = vec![0; 8192];
    put(&mut out, 0, b"KDUMP   \x06\0\0\0");
    let words = [1, 4096, 1, blocks as u32, frames as u32];
    for (number, word) in words.iter().enumerate() {
        put(&mut out, 424 + 4 * number, &word.to_le_bytes());
    }
    put(&mut out, 4096 + 96, &frames.to_le_bytes());
    let parts = [&[(0, out.as_slice())], parts].concat();
    sparse(folder, "kdump", 8192 + blocks * PAGE + PAGE, &parts)
}

fn kdump_frames(folder: &Path, frames: u64) -> PathBuf {
    kdump(folder, 2 * frames.div_ceil(8).div_ceil(PAGE), frames, &[])
}

/// Every second frame.
pub(crate) fn kdump_regions(folder: &Path, count: u64) -> PathBuf {
    let bitmap = vec![0x55; (2 * count).div_ceil(8) as usize];
    let blocks = 2 * (bitmap.len() as u64).div_ceil(PAGE);
    kdump(folder, blocks, 2 * count, &[(8192, &bitmap)])
}

/// A part of the sub-header with its offset at `field`, and its length behind that.
fn kdump_part(folder: &Path, field: u64, len: u64) -> PathBuf {
    let path = kdump(folder, 2, 64, &[(8192, &[1])]);
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(64 * MIB).unwrap();
    let words = [16384, len].map(u64::to_le_bytes).concat();
    file.write_all_at(&words, PAGE + field).unwrap();
    path
}

/// A flattened file of so many pieces of a byte.
pub(crate) fn kdump_pieces(folder: &Path, count: u64) -> PathBuf {
    let mut out = b"makedumpfile\0\0\0\0".to_vec();
    out.extend([1_u64, 1].map(u64::to_be_bytes).concat());
    out.resize(4096, 0);
    for at in 0..count {
        out.extend([2 * at, 1].map(u64::to_be_bytes).concat());
        out.push(7);
    }
    out.extend([0xff; 16]);
    whole(folder, &out)
}

fn libvirt_data(folder: &Path, len: u64) -> PathBuf {
    let mut out = b"LibvirtQemudSave".to_vec();
    out.extend([2, len as u32, 1, 0, 0].map(u32::to_le_bytes).concat());
    out.resize(4096, 0);
    whole(folder, &out)
}

pub(crate) fn lime_records(folder: &Path, count: u64) -> PathBuf {
    let mut out = Vec::new();
    for at in 0..count {
        out.extend(b"EMiL\x01\0\0\0");
        out.extend([at, at, 0].map(u64::to_le_bytes).concat());
        out.push(7);
    }
    whole(folder, &out)
}

fn qemu_name(folder: &Path, len: u64) -> PathBuf {
    let mut out = b"QEVM\0\0\0\x03\x07".to_vec();
    out.extend((len as u32).to_be_bytes());
    out.extend(vec![b'a'; len as usize]);
    out.extend([0; 64]);
    whole(folder, &out)
}

fn qemu_file() -> qemu::File {
    qemu::File::new(vec![Block("pc.ram", vec![Some(1); 8])])
}

fn qemu_capabilities(folder: &Path, count: u64) -> PathBuf {
    let mut file = qemu_file();
    file.capabilities = vec!["mapped-ram"; count as usize];
    file.write(folder)
}

fn qemu_plugged(folder: &Path, count: u64) -> PathBuf {
    let mut file = qemu_file();
    let device = |number: u64| virtio_mem(&number.to_string(), (number + 4) << 30, MIB, MIB);
    file.between = (0..count).flat_map(device).collect();
    file.write(folder)
}

fn qemu_blocks(folder: &Path, count: u64) -> PathBuf {
    let block = |number: u64| Block(format!("block{number}").leak(), vec![None]);
    qemu::File::new((0..count).map(block).collect()).write(folder)
}

/// A mapped-ram file of so many pages that are marked, and as many between that are not, of which
/// none takes any room.
fn mapped_ranges(folder: &Path, count: u64) -> PathBuf {
    let mut head = qemu::File::new(vec![Block("pc.ram", vec![])]).bytes();
    let name = head.windows(6).rposition(|part| part == b"pc.ram").unwrap();
    head.truncate(name + 6);
    let (len, bitmap_at) = (2 * count * PAGE, MIB);
    let total = name - 1 - 8;
    put(&mut head, total, &(len | 4).to_be_bytes());
    head.extend(len.to_be_bytes());
    head.extend(1_u32.to_be_bytes());
    let pages_at = 64 * MIB;
    head.extend([PAGE, bitmap_at, pages_at].map(u64::to_be_bytes).concat());
    let end = b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x01the devices' state";
    let bitmap = vec![0x55; (2 * count / 8) as usize];
    let parts = [
        (0, head.as_slice()),
        (bitmap_at, &bitmap),
        (pages_at + len, end),
    ];
    sparse(folder, "mapped", pages_at + len + 64, &parts)
}

/// A migration stream of so many pages, which the file is long enough for, but has only so many
/// bytes.
fn stream_claims(folder: &Path, pages: u64, stored: u64) -> PathBuf {
    let mut head = qemu::stream();
    let name = head.windows(6).position(|part| part == b"pc.ram").unwrap();
    head.truncate(name + 6);
    let len = pages * PAGE;
    put(&mut head, name - 1 - 8, &(len | 4).to_be_bytes());
    head.extend(len.to_be_bytes());
    let bytes = vec![0xff; stored as usize];
    sparse(folder, "stream", pages * 16, &[(0, &head), (MIB, &bytes)])
}

/// A disk image with so many snapshots, each with a state of that length and a name as long as any.
fn qcow2_names(folder: &Path, count: u64, state_len: u32) -> PathBuf {
    const NAME: u64 = 65528;
    let mut head = b"QFI\xfb\0\0\0\x02".to_vec();
    head.resize(20, 0);
    head.extend(16_u32.to_be_bytes());
    head.resize(60, 0);
    head.extend((count as u32).to_be_bytes());
    head.extend((1_u64 << 16).to_be_bytes());
    let mut entry = vec![0; 14];
    entry.extend((NAME as u16).to_be_bytes());
    entry.resize(32, 0);
    entry.extend(state_len.to_be_bytes());
    entry.resize(40, 0);
    let mut parts = vec![(0, head.as_slice())];
    parts.extend((0..count).map(|number| ((1 << 16) + number * (40 + NAME), &entry[..])));
    sparse(folder, "qcow2", 128 * MIB, &parts)
}

/// Of many snapshots, and of long names, what is told fits on a screen or two.
#[test]
fn names_of_snapshots_are_told_in_part() {
    let folder = tempfile::tempdir().unwrap();
    for (count, most) in [(2, 3 << 10), (16, 17 << 10), (900, 18 << 10)] {
        let (said, ..) = look(&qcow2_names(folder.path(), count, 1));
        assert!(said.contains("of several snapshots"), "{said}");
        assert!(said.len() < most, "{count}: {}", said.len());
        assert_eq!(said.ends_with("and others"), count > 16);
    }
}

/// A snapshot's folder with so many files in it.
fn folder_of(folder: &Path, count: u64) -> PathBuf {
    let mut state = 0x0710_1984_8664_0000_u64.to_le_bytes().to_vec();
    state.extend([3; 100]);
    fs::write(folder.join("vm.state"), state).unwrap();
    sparse(folder, "vm.mem", MIB, &[]);
    for number in 2..count {
        fs::write(folder.join(format!("{number}.log")), "a word").unwrap();
    }
    folder.to_owned()
}
