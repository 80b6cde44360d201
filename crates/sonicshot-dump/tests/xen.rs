//! Xen save images, by the library alone.
#![allow(
    missing_docs,
    dead_code,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "tests say so by panicking"
)]

mod common;

use common::*;
use sonicshot::{Fill, GuestMemory, PageClass};
use sonicshot_dump::{Dump, Overwrite};
use std::fs;

/// A record of pages as they are filled, from frame 0 on.
fn image(fills: &[u8]) -> Vec<u8> {
    let record = |out: &mut Vec<u8>, kind: u32, body: &[u8]| {
        out.extend(kind.to_le_bytes());
        out.extend(u32::try_from(body.len()).unwrap().to_le_bytes());
        out.extend(body);
    };
    let mut out = b"Xen saved domain, xl format\n \0 \r".to_vec();
    out.extend([4, 3, 2, 1, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    out.extend(b"LibxlFmt\0\0\0\x02\0\0\0\0");
    record(&mut out, 1, &[]);
    out.extend([0xff; 8]);
    out.extend(b"XENF\0\0\0\x03\0\0\0\0\0\0\0\0");
    out.extend([1, 0, 0, 0, 12, 0, 0, 0, 4, 0, 0, 0, 17, 0, 0, 0]);
    let mut body = (fills.len() as u64).to_le_bytes().to_vec();
    for pfn in 0..fills.len() as u64 {
        body.extend(pfn.to_le_bytes());
    }
    for fill in fills {
        body.extend([*fill; 4096]);
    }
    record(&mut out, 1, &body);
    record(&mut out, 0, &[]);
    record(&mut out, 0, &[]);
    out
}

#[test]
fn no_plan_takes_from_the_guest_what_it_relies_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    fs::write(&path, image(&[0, 0, 0xaa, 0xaa])).unwrap();
    let dump = Dump::open(&path, None).unwrap();
    // Of which class and fill the pages 0, 1 and 2 are said to be; whether they go.
    for (class, fill, goes) in [
        (PageClass::FreeBuddy, Fill::Any, true),
        (PageClass::FreeBuddy, Fill::Zero, false),
        (PageClass::FreeBuddy, Fill::Byte(0xaa), false),
        (PageClass::Zero, Fill::Any, false),
        (PageClass::Offline, Fill::Zero, true),
    ] {
        let plan = plan_with(dump.layout(), &[(0, 3)], class, fill);
        let (out, mut piped) = (folder.path().join("out"), Vec::new());
        let quiet = &mut |_, _| {};
        let stats = dump
            .prune_to(&plan, &out, Overwrite::Replace, quiet)
            .unwrap();
        let of_pipe = dump.prune_to_writer(&plan, &mut piped, quiet).unwrap();
        assert!(fs::read(&out).unwrap() == piped);
        for stats in [stats, of_pipe] {
            let bytes = (stats.dropped_bytes, stats.kept_for_fill);
            let expected = if goes { (3 * PAGE, 0) } else { (0, 3 * PAGE) };
            assert_eq!(bytes, expected, "{class} {fill:?}");
        }
        let gone = fs::metadata(&path).unwrap().len() - piped.len() as u64;
        assert_eq!(gone, stats.dropped_bytes, "{class} {fill:?}");
    }
}
