//! Files of the formats that the command reads and does not write, made of a memory.

use super::common::ram;
use super::inputs::{is_zero, libvirt, name, stream};
use std::fs::{self, File};
use std::io::{Cursor, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

const PAGE: usize = 4096;

fn le(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn gzip(content: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    out.write_all(content).unwrap();
    out.finish().unwrap()
}

fn bzip2(content: &[u8]) -> Vec<u8> {
    let mut out = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
    out.write_all(content).unwrap();
    out.finish().unwrap()
}

fn xz(content: &[u8]) -> Vec<u8> {
    let options = lzma_rust2::XzOptions::with_preset(0);
    let mut out = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
    out.write_all(content).unwrap();
    out.finish().unwrap()
}

fn adler32(bytes: &[u8]) -> [u8; 4] {
    let (mut a, mut b) = (1_u32, 0_u32);
    for byte in bytes {
        a = (a + u32::from(*byte)) % 65521;
        b = (b + a) % 65521;
    }
    (b << 16 | a).to_be_bytes()
}

/// A file as `lzop` writes it of bytes that do not compress: blocks that are stored.
fn lzop(content: &[u8]) -> Vec<u8> {
    let mut header = [0x1040_u16, 0x20a0, 0x0940].map(u16::to_be_bytes).concat();
    header.extend([1, 5]);
    header.extend([1_u32, 0o100_600, 0, 0].map(u32::to_be_bytes).concat());
    header.push(0);
    let mut out = b"\x89LZO\0\r\n\x1a\n".to_vec();
    out.extend(&header);
    out.extend(adler32(&header));
    for block in content.chunks(256 << 10) {
        let len = u32::try_from(block.len()).unwrap().to_be_bytes();
        out.extend([len, len, adler32(block)].concat());
        out.extend(block);
    }
    out.extend([0; 4]);
    out
}

/// An archive of one file.
fn zip(content: &[u8]) -> Vec<u8> {
    let mut out = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let options = zip::write::SimpleFileOptions::default();
    out.start_file("dump", options).unwrap();
    out.write_all(content).unwrap();
    out.finish().unwrap().into_inner()
}

/// A file as `makedumpfile -F` writes it: pieces with their places.
fn flattened(kdump: &[u8]) -> Vec<u8> {
    let mut out = b"makedumpfile\0\0\0\0".to_vec();
    out.extend([1_i64, 1].map(i64::to_be_bytes).concat());
    out.resize(PAGE, 0);
    for (number, piece) in (0_u64..).zip(kdump.chunks(64 << 10)) {
        let len = piece.len() as u64;
        out.extend([number * (64 << 10), len].map(u64::to_be_bytes).concat());
        out.extend(piece);
    }
    out.extend([0xff; 16]);
    out
}

/// An image with one internal snapshot, in clusters of 64 KiB.
fn qcow2(state: &[u8]) -> Vec<u8> {
    const CLUSTER: usize = 64 << 10;
    const ENTRIES: usize = CLUSTER / 8;
    let disk = (CLUSTER * ENTRIES) as u64;
    let mut out = b"QFI\xfb\0\0\0\x03".to_vec();
    out.extend([0; 12]);
    out.extend(16_u32.to_be_bytes());
    out.extend(disk.to_be_bytes());
    out.extend([0; 28]);
    out.extend(1_u32.to_be_bytes());
    out.extend((CLUSTER as u64).to_be_bytes());
    out.extend([0; 24]);
    out.extend([0, 0, 0, 4, 0, 0, 0, 112]);
    out.resize(2 * CLUSTER, 0);
    // Behind the disk's table come those of the state.
    let mut l1 = vec![0_u64];
    let clusters: Vec<_> = state.chunks(CLUSTER).collect();
    for clusters in clusters.chunks(ENTRIES) {
        let mut l2 = Vec::new();
        for cluster in clusters {
            l2.push(1 << 63 | out.len() as u64);
            out.extend(*cluster);
            out.resize(out.len().next_multiple_of(CLUSTER), 0);
        }
        l2.resize(ENTRIES, 0);
        l1.push(1 << 63 | out.len() as u64);
        out.extend(l2.iter().flat_map(|entry| entry.to_be_bytes()));
    }
    let at = out.len() as u64;
    out.extend(l1.iter().flat_map(|entry| entry.to_be_bytes()));
    out.resize(out.len().next_multiple_of(CLUSTER), 0);
    let mut snapshot = at.to_be_bytes().to_vec();
    snapshot.extend(u32::try_from(l1.len()).unwrap().to_be_bytes());
    snapshot.extend([0, 1, 0, 3]);
    snapshot.extend([0; 16]);
    snapshot.extend([0, 0, 0, 0, 0, 0, 0, 24]);
    snapshot.extend((state.len() as u64).to_be_bytes());
    snapshot.extend(disk.to_be_bytes());
    snapshot.extend([0xff; 8]);
    snapshot.extend(b"1tag");
    out[CLUSTER..][..snapshot.len()].copy_from_slice(&snapshot);
    out
}

/// The state beside VMware's memory: two regions, the upper one first in the file.
fn vmss(pages: u32) -> Vec<u8> {
    let half = pages / 2;
    let mut out = b"\xd2\xbe\xd2\xbe\x08\0\0\0\x01\0\0\0memory".to_vec();
    out.resize(12 + 64, 0);
    out.extend(le(&[92, 0]));
    let mut tag = |of: &str, index: Option<u32>, value: u32| {
        out.push(if index.is_some() { 0x44 } else { 4 });
        name(&mut out, of);
        out.extend(index.into_iter().flat_map(u32::to_le_bytes));
        out.extend(value.to_le_bytes());
    };
    tag("regionsCount", None, 2);
    for (number, guest, file) in [(0, 0, half), (1, half, 0)] {
        tag("regionPPN", Some(number), guest);
        tag("regionPageNum", Some(number), file);
        tag("regionSize", Some(number), half);
    }
    out.extend([0; 2]);
    out
}

/// A core as `xl dump-core` writes it of an HVM guest.
fn xen_core(ram: &[u8]) -> Vec<u8> {
    let pages = (ram.len() / PAGE) as u64;
    let note = |kind: u32, desc: &[u64]| {
        let len = u32::try_from(desc.len() * 8).unwrap();
        let head = [4, len, kind].map(u32::to_le_bytes).concat();
        [head, b"Xen\0".to_vec(), le(desc)].concat()
    };
    let notes = [
        note(0x200_0000, &[]),
        note(0x200_0001, &[0xf00f_ebee, 1, pages, 4096]),
        note(0x200_0002, &[4, 17]),
        note(0x200_0003, &[1]),
    ]
    .concat();
    let names = "\0.shstrtab\0.note.Xen\0.xen_pages\0.xen_pfn\0";
    let table = le(&(0..pages).collect::<Vec<_>>());
    let sections: [(&str, u64, &[u8]); 4] = [
        (".note.Xen", 7, &notes),
        (".xen_pages", 1, ram),
        (".xen_pfn", 1, &table),
        (".shstrtab", 3, names.as_bytes()),
    ];
    let mut out = b"\x7fELF\x02\x01\x01\0\x01\0\0\0\0\0\0\0\x04\0\x3e\0\x01\0\0\0".to_vec();
    out.extend(le(&[0, 0, 64]));
    out.extend([0, 0, 0, 0, 64, 0, 56, 0, 0, 0, 64, 0, 5, 0, 4, 0]);
    out.extend([0; 64]);
    let mut at = 64 + 5 * 64;
    for (name, kind, content) in sections {
        let name = names.find(name).unwrap() as u64;
        let len = content.len() as u64;
        out.extend(le(&[name | kind << 32, 0, 0, at, len, 0, 0, 0]));
        at += len;
    }
    out.extend(sections.map(|section| section.2).concat());
    out
}

/// An ELF file with a build ID and nothing else.
fn vmlinux() -> Vec<u8> {
    let note = [
        &[4, 0, 0, 0, 20, 0, 0, 0, 3, 0, 0, 0][..],
        b"GNU\0",
        &[7; 20],
    ]
    .concat();
    let len = note.len() as u64;
    let mut out = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    out.resize(40, 0);
    out.extend(le(&[64 + len]));
    out.resize(58, 0);
    // Of a section header the size, how many there are, and which has the names.
    out.extend([64, 0, 2, 0, 0, 0]);
    out.extend(&note);
    out.resize(out.len() + 64, 0);
    out.extend(le(&[7 << 32, 0, 0, 64, len, 0, 0, 0]));
    out
}

/// The types of the real guest's kernel, which its memory has in one piece.
fn btf() -> &'static [u8] {
    const LEAST: usize = 1 << 20;
    let whole = |at: usize| {
        let field = |at: usize| {
            let bytes = ram().get(at..at + 4)?.try_into().ok()?;
            usize::try_from(u32::from_le_bytes(bytes)).ok()
        };
        let len = field(at + 16)?
            .checked_add(field(at + 20)?)?
            .checked_add(24)?;
        let found = ram().get(at..at.checked_add(len)?)?;
        (len > LEAST && found.ends_with(b"\0")).then_some(found)
    };
    let starts = ram().windows(8).enumerate();
    let mut starts = starts.filter(|(_, start)| *start == b"\x9f\xeb\x01\0\x18\0\0\0");
    starts.find_map(|(at, _)| whole(at)).unwrap()
}

const MAP: &str = "ffffffff81000000 T _stext\nffffffff82001000 R linux_banner\n\
    ffffffff82800000 D init_task\nffffffff82a10000 D init_top_pgt\n";

/// The inputs of `symbols make`.
pub fn symbols(folder: &Path) {
    fs::write(folder.join("vmlinux"), vmlinux()).unwrap();
    fs::write(folder.join("map"), MAP).unwrap();
    fs::write(folder.join("btf"), btf()).unwrap();
}

/// A mapped-ram file whose places count from the beginning of libvirt's image.
fn libvirt_sparse(path: &Path, ram: &[u8]) {
    const PAGES_AT: usize = 1 << 20;
    let mut out = libvirt(6, b"QEVM\0\0\0\x03\x07\0\0\0\x0epc-i440fx-10.0\x05");
    name(&mut out, "configuration/capabilities");
    out.extend([0, 0, 0, 1, 0, 0, 0, 1]);
    name(&mut out, "mapped-ram");
    out.extend([1, 0, 0, 0, 1]);
    name(&mut out, "ram");
    out.extend([0, 0, 0, 0, 0, 0, 0, 4]);
    out.extend((ram.len() as u64 | 4).to_be_bytes());
    name(&mut out, "pc.ram");
    out.extend((ram.len() as u64).to_be_bytes());
    out.extend(1_u32.to_be_bytes());
    let bitmap_at = (out.len() + 24) as u64;
    let places = [PAGE as u64, bitmap_at, PAGES_AT as u64];
    out.extend(places.map(u64::to_be_bytes).concat());
    for pages in ram.chunks(8 * PAGE) {
        let marks = (0..).zip(pages.chunks(PAGE));
        out.push(marks.fold(0, |byte, (bit, page)| {
            byte | u8::from(!is_zero(page)) << bit
        }));
    }
    let file = File::create(path).unwrap();
    file.write_all_at(&out, 0).unwrap();
    for (number, page) in ram.chunks(PAGE).enumerate() {
        if !is_zero(page) {
            let at = PAGES_AT + number * PAGE;
            file.write_all_at(page, at as u64).unwrap();
        }
    }
    let end = b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x01the devices' state";
    let at = PAGES_AT + ram.len();
    file.write_all_at(end, at as u64).unwrap();
}

/// The memory in those formats; `kdump` is it as a kdump.
pub fn all(folder: &Path, ram: &[u8], kdump: &[u8]) {
    let content = stream(ram);
    for (name, bytes) in [
        ("raw-gzip", gzip(ram)),
        ("kdump-zstd", zstd::encode_all(kdump, 1).unwrap()),
        ("raw-zip", zip(ram)),
        ("libvirt-gzip", libvirt(1, &gzip(&content))),
        ("libvirt-bzip2", libvirt(2, &bzip2(&content))),
        ("libvirt-xz", libvirt(3, &xz(&content))),
        ("libvirt-lzop", libvirt(4, &lzop(&content))),
        ("flat", flattened(kdump)),
        ("qcow2", qcow2(&content)),
        ("core", xen_core(ram)),
    ] {
        fs::write(folder.join(name), bytes).unwrap();
    }
    libvirt_sparse(&folder.join("libvirt-sparse"), ram);
    let beside = folder.join("vmware");
    fs::create_dir(&beside).unwrap();
    let (low, high) = ram.split_at(ram.len() / 2);
    fs::write(beside.join("vm.vmem"), [high, low].concat()).unwrap();
    let pages = u32::try_from(ram.len() / PAGE).unwrap();
    fs::write(beside.join("vm.vmss"), vmss(pages)).unwrap();
}
