//! An image and the images below it, opened from the top.

use super::qcow2::{Below, Qcow2Disk, Qcow2Head};
use super::raw::RawDisk;
use crate::DumpError;
use crate::backing::sys::forget_cached;
use crate::format::qcow2::MAGIC;
use sonicshot::checkpoint::{DiskOffset, DiskSource};
use sonicshot::{FileId, FileStamp};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// More images over each other nobody has: QEMU opens all of them.
const MAX_CHAIN: usize = 64;

/// The first bytes of an image that is neither its guest's disk itself nor read.
const OTHERS: [(&[u8], &str); 5] = [
    (b"QED\0", "a QED image"),
    (b"KDMV", "a VMDK image"),
    (b"vhdxfile", "a VHDX image"),
    (b"conectix", "a VHD image"),
    (b"<<< ", "a VDI image"),
];

/// A file of a chain, and what it was when it was opened.
#[derive(Debug)]
pub(super) struct Layer {
    pub path: PathBuf,
    pub file: File,
    pub stamp: FileStamp,
}

/// An image together with those below it.
pub(super) struct Chain {
    /// The images below the top, from there down.
    pub below: Vec<Layer>,
    pub disk: Box<dyn DiskSource>,
    /// Whether the top is a raw image, or a block device.
    pub is_raw: bool,
}

/// One image as it was opened.
enum Opened {
    Raw(RawDisk),
    Qcow2(Box<Qcow2Head>),
}

impl Chain {
    /// Opens the image at `path` and all below it.
    pub(super) fn open(path: &Path) -> Result<(Layer, Self), DumpError> {
        let (top, mut opened) = open_layer(path, None)?;
        let is_raw = matches!(opened, Opened::Raw(_));
        let mut below: Vec<Layer> = Vec::new();
        let mut heads = Vec::new();
        let bottom: Option<Box<dyn DiskSource>> = loop {
            let mut head = match opened {
                Opened::Raw(raw) => break Some(Box::new(raw)),
                Opened::Qcow2(head) => head,
            };
            let next = head.below.take();
            heads.push(head);
            let Some(Below { path, format }) = next else {
                break None;
            };
            check_new(&top, &below, &path)?;
            let (layer, next) = open_layer(&path, format.as_deref())?;
            below.push(layer);
            opened = next;
        };
        let over = |below, head: Box<Qcow2Head>| -> Option<Box<dyn DiskSource>> {
            Some(Box::new(Qcow2Disk::new(*head, below)))
        };
        let disk = heads.into_iter().rev().fold(bottom, over);
        let disk = disk.ok_or_else(|| DumpError::Unsupported {
            path: path.to_owned(),
            kind: "a disk without an image",
        })?;
        let chain = Self {
            below,
            disk,
            is_raw,
        };
        Ok((top, chain))
    }
}

/// Refuses an image that lies over itself, and one that too many lie over.
fn check_new(top: &Layer, between: &[Layer], path: &Path) -> Result<(), DumpError> {
    let last = between.last().unwrap_or(top);
    let refuse = |why| {
        Err(DumpError::Base {
            path: last.path.clone(),
            base: path.to_owned(),
            why,
        })
    };
    if between.len() >= MAX_CHAIN {
        return refuse("more images lie over each other than are followed");
    }
    let id = FileId::of_path(path).map_err(DumpError::io("opening the image below", path))?;
    if top.stamp.id() == id || between.iter().any(|layer| layer.stamp.id() == id) {
        return refuse("it lies over itself");
    }
    Ok(())
}

fn open_layer(path: &Path, format: Option<&[u8]>) -> Result<(Layer, Opened), DumpError> {
    // An image may name a pipe, which may never answer.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(DumpError::io("opening", path))?;
    let reading = || DumpError::io("reading", path);
    let kind = file.metadata().map_err(reading())?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(DumpError::Unsupported {
            path: path.to_owned(),
            kind: "a disk's image that is neither a regular file nor a block device",
        });
    }
    if kind.is_block_device() {
        // Of others than root it is what they would read without.
        let _ = forget_cached(&file);
    }
    let stamp = FileStamp::of(&file).map_err(reading())?;
    let held = file.try_clone().map_err(reading())?;
    let layer = |file| Layer {
        path: path.to_owned(),
        file,
        stamp,
    };
    let raw = RawDisk::new(file).map_err(reading())?;
    let mut start = [0; 8];
    if stamp.len() >= 8 {
        raw.read_disk(&mut start, DiskOffset::ZERO)
            .map_err(reading())?;
    }
    let is_qcow2 = match format {
        // Whatever it begins with, which its guest may have written.
        Some(b"raw") => false,
        Some(b"qcow2") => true,
        Some(_) => {
            return Err(DumpError::Unsupported {
                path: path.to_owned(),
                kind: "an image of which the one above says that it is neither qcow2 nor raw",
            });
        }
        None => start.starts_with(MAGIC),
    };
    if is_qcow2 {
        if !start.starts_with(MAGIC) {
            let what = "missing qcow2 magic";
            let found = u64::from_be_bytes(start);
            let at = sonicshot::FileOffset::ZERO;
            return Err(DumpError::malformed(path, what, at, found));
        }
        let head = Qcow2Head::read(path, held.try_clone().map_err(reading())?)?;
        return Ok((layer(held), Opened::Qcow2(Box::new(head))));
    }
    let other = OTHERS.iter().find(|(magic, _)| start.starts_with(magic));
    if let Some((_, kind)) = other.filter(|_| format.is_none()) {
        return Err(DumpError::NotRead {
            path: path.to_owned(),
            kind,
            instead: "pages are found on disks as their guests see them: make a raw image of it \
                      (`qemu-img convert -O raw`), or a block device (`qemu-nbd -r -c`)",
        });
    }
    Ok((layer(held), Opened::Raw(raw)))
}
