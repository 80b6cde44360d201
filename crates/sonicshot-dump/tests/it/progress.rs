//! Formats that tell only in passing where their pages lie: whoever opens one is told how far it is.

use crate::bounds::{avml_chunks, kdump_pieces, kdump_regions, lime_records};
use crate::common::xen::image;
use sonicshot::WorkPhase;
use sonicshot_dump::DumpOptions;
use sonicshot_testkit::Told;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

fn xen_image(folder: &Path, pages: u64) -> PathBuf {
    let path = folder.join("image");
    fs::write(&path, image(&vec![7; pages as usize])).unwrap();
    path
}

/// Chunks of a byte, in a stream that says how long it is.
fn avml(folder: &Path, chunks: u64) -> PathBuf {
    let path = avml_chunks(folder, chunks);
    let mut bytes = fs::read(&path).unwrap();
    let end = bytes.len() - 8;
    let stream = end as u64 - 32;
    bytes[end..].copy_from_slice(&stream.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn the_walk_through_a_file_is_told_of_to_its_end() {
    /// The bytes that are gone through, by the length of the file.
    type Total = fn(u64) -> u64;
    /// A name, what makes the file of how much, and the bytes.
    type Made = (&'static str, fn(&Path, u64) -> PathBuf, u64, Total);
    let whole: Total = |file| file;
    let files: [Made; 5] = [
        ("LiME", lime_records, 4096, whole),
        ("AVML", avml, 4096, whole),
        ("Xen", xen_image, 64, whole),
        // A bit for each frame, twice.
        ("kdump", kdump_regions, 1 << 19, |_| 1 << 18),
        // It is no kdump inside, which is seen when the pieces are known.
        ("flattened kdump", kdump_pieces, 4096, whole),
    ];
    for (name, make, amount, total) in files {
        let folder = tempfile::tempdir().unwrap();
        let path = make(folder.path(), amount);
        let told = Arc::new(Told::default());
        let opened = DumpOptions::new().progress(told.clone()).open(&path);
        assert_eq!(
            opened.is_ok(),
            name != "flattened kdump",
            "{name}: {opened:?}"
        );
        let told = told.phases();
        let [(WorkPhase::Opening, bytes)] = told.as_slice() else {
            panic!("{name}: {told:?}");
        };
        let total = total(fs::metadata(&path).unwrap().len());
        assert!(bytes.len() > 2, "{name}: {bytes:?}");
        assert!(bytes.is_sorted(), "{name}: {bytes:?}");
        assert_eq!(bytes.first(), Some(&(0, total)), "{name}");
        assert_eq!(bytes.last(), Some(&(total, total)), "{name}");
        // Not too often, however many records there are.
        assert!(bytes.len() <= 1027, "{name}: {}", bytes.len());
    }
}
