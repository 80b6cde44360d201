//! QEMU's files, made by hand.
#![allow(
    clippy::cast_possible_truncation,
    reason = "small numbers, made by the tests"
)]

use sonicshot::GuestMemory;
use sonicshot_dump::Dump;
use std::fs;
use std::path::{Path, PathBuf};

pub const PAGE: usize = 4096;

/// A block: name, pages, whether each is in the file.
pub struct Block(pub &'static str, pub Vec<Option<u8>>);

pub struct File {
    pub machine: &'static str,
    pub capabilities: Vec<&'static str>,
    pub blocks: Vec<Block>,
    /// The distance of pages from the file system's blocks, in bytes.
    pub skew: usize,
    /// Changes the header of the first block: version, page size, bitmap, pages.
    pub edit: fn(&mut [u64; 4]),
    /// The bytes between the memory and the rest.
    pub between: Vec<u8>,
}

/// The state of a virtio-mem device: its name, where its memory is, the length, the pieces.
pub fn virtio_mem(device: &str, at: u64, len: u64, piece: u64) -> Vec<u8> {
    let mut out = vec![4, 0, 0, 0, 9];
    name(&mut out, &format!("{device}/virtio-mem-device-early"));
    out.extend([0, 0, 0, 0, 0, 0, 0, 1]);
    for word in [at, len, piece] {
        out.extend(word.to_be_bytes());
    }
    out.extend([0; 12]);
    let pieces = len.checked_div(piece).unwrap_or(0);
    out.extend(vec![0xff; pieces.div_ceil(64) as usize * 8]);
    out.extend([0x7e, 0, 0, 0, 9]);
    out
}

pub fn name(out: &mut Vec<u8>, name: &str) {
    out.push(name.len() as u8);
    out.extend(name.as_bytes());
}

impl File {
    pub fn new(blocks: Vec<Block>) -> Self {
        Self {
            machine: "pc-i440fx-10.0",
            capabilities: vec!["mapped-ram"],
            blocks,
            skew: 0,
            edit: |_| {},
            between: Vec::new(),
        }
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.bytes_behind(&[])
    }

    /// The file behind something else; its offsets count from there.
    pub fn bytes_behind(&self, start: &[u8]) -> Vec<u8> {
        let mut out = start.to_vec();
        out.extend(b"QEVM\0\0\0\x03\x07");
        out.extend((self.machine.len() as u32).to_be_bytes());
        out.extend(self.machine.as_bytes());
        out.push(5);
        name(&mut out, "configuration/capabilities");
        out.extend(1_u32.to_be_bytes());
        out.extend((self.capabilities.len() as u32).to_be_bytes());
        for capability in &self.capabilities {
            name(&mut out, capability);
        }
        out.extend([1, 0, 0, 0, 1]);
        name(&mut out, "ram");
        out.extend([0, 0, 0, 0, 0, 0, 0, 4]);
        let total: usize = self.blocks.iter().map(|block| block.1.len() * PAGE).sum();
        out.extend((total as u64 | 4).to_be_bytes());
        for (number, Block(block, pages)) in self.blocks.iter().enumerate() {
            name(&mut out, block);
            out.extend(((pages.len() * PAGE) as u64).to_be_bytes());
            let bitmap = out.len() + 28;
            let at = (bitmap + pages.len().div_ceil(8)).next_multiple_of(PAGE) + self.skew;
            let mut fields = [1, PAGE as u64, bitmap as u64, at as u64];
            if number == 0 {
                (self.edit)(&mut fields);
            }
            out.extend((fields[0] as u32).to_be_bytes());
            for field in &fields[1..] {
                out.extend(field.to_be_bytes());
            }
            for bits in pages.chunks(8) {
                let byte = bits.iter().enumerate().fold(0, |byte, (bit, page)| {
                    byte | u8::from(page.is_some()) << bit
                });
                out.push(byte);
            }
            out.resize(at, 0);
            for page in pages {
                out.extend([page.unwrap_or(0); PAGE]);
            }
        }
        out.extend(0x10_u64.to_be_bytes());
        out.extend(b"\x7e\0\0\0\x01");
        out.extend(&self.between);
        // The section's end, without pages.
        out.extend(b"\x03\0\0\0\x01\0\0\0\0\0\0\0\x10\x7e\0\0\0\x01");
        out.extend(b"the devices' state");
        out
    }

    pub fn write(&self, folder: &Path) -> PathBuf {
        let path = folder.join("mapped.ram");
        fs::write(&path, self.bytes()).unwrap();
        path
    }
}

/// A classic stream of 8 pages of RAM and a ROM of 2; page 1 comes twice.
pub fn stream() -> Vec<u8> {
    let page = |out: &mut Vec<u8>, word: u64, block: Option<&str>, byte: u8| {
        out.extend((word | if block.is_none() { 0x20 } else { 0 }).to_be_bytes());
        if let Some(block) = block {
            name(out, block);
        }
        if word & 2 != 0 {
            out.push(0);
        } else {
            out.extend([byte; PAGE]);
        }
    };
    let mut out = b"QEVM\0\0\0\x03\x07\0\0\0\x0epc-i440fx-10.0\x01\0\0\0\x02\x03ram".to_vec();
    out.extend([0, 0, 0, 0, 0, 0, 0, 4]);
    out.extend(((10 * PAGE as u64) | 4).to_be_bytes());
    for (block, pages) in [("pc.ram", 8), ("pc.rom", 2_u64)] {
        name(&mut out, block);
        out.extend((pages * PAGE as u64).to_be_bytes());
    }
    let end = b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02";
    out.extend(end);
    out.extend(b"\x02\0\0\0\x02");
    page(&mut out, 8, Some("pc.ram"), 1);
    for number in 1..8_u64 {
        let kind = if number % 3 == 0 { 2 } else { 8 };
        page(&mut out, (number << 12) | kind, None, number as u8 + 1);
    }
    out.extend(end);
    out.extend(b"\x08\0\x0b\0\0");
    out.extend(b"\x03\0\0\0\x02");
    page(&mut out, 8, Some("pc.rom"), 0x55);
    page(&mut out, 4096 | 2, None, 0);
    page(&mut out, 4096 | 8, Some("pc.ram"), 0x77);
    out.extend(end);
    out.extend(b"\x04 the devices' state");
    out
}

/// The first byte of each page of RAM.
pub fn first_bytes(dump: &Dump) -> Vec<u8> {
    let mut out = Vec::new();
    for region in dump.layout().regions() {
        let mut page = vec![0; PAGE];
        let mut at = region.start();
        while at < region.end() {
            dump.read(at, &mut page).unwrap();
            assert!(page.iter().all(|byte| *byte == page[0]));
            out.push(page[0]);
            at = at.checked_add(PAGE as u64).unwrap();
        }
    }
    out
}
