//! libvirt's save images, and what comes through a pipe; any QEMU file, read and pruned.

use crate::common::qemu::{Block, File, PAGE, first_bytes, name, stream};
use crate::common::{Prunes, every_page, plan, replacing};
use proptest::prelude::*;
use sonicshot::GuestMemory;
use sonicshot_dump::{Dump, DumpError, DumpOptions, LayoutSpec, Overwrite, Spool, WriteOptions};
use std::fs;
use std::io::Write;
use std::path::Path;

const XML: &[u8] = b"<domain type='qemu'/>\0<cookie/>\0";

/// The header and the domain's description.
fn header(format: u32) -> Vec<u8> {
    let mut out = b"LibvirtQemudSave".to_vec();
    for word in [2, XML.len() as u32, 1, format, 22] {
        out.extend(word.to_le_bytes());
    }
    out.resize(92, 0);
    out.extend(XML);
    out
}

fn packed(format: u32, content: &[u8]) -> Vec<u8> {
    match format {
        1 => {
            let mut packer = flate2::write::GzEncoder::new(Vec::new(), Default::default());
            packer.write_all(content).unwrap();
            packer.finish().unwrap()
        }
        2 => {
            let mut packer = bzip2::write::BzEncoder::new(Vec::new(), Default::default());
            packer.write_all(content).unwrap();
            packer.finish().unwrap()
        }
        3 => {
            let options = lzma_rust2::XzOptions::with_preset(0);
            let mut packer = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
            packer.write_all(content).unwrap();
            packer.finish().unwrap()
        }
        4 => lzop(content),
        5 => zstd::encode_all(content, 3).unwrap(),
        _ => content.to_vec(),
    }
}

/// A file of lzop without a checksum of its blocks, which are as they are.
fn lzop(content: &[u8]) -> Vec<u8> {
    let mut header = vec![0x10, 0x30, 0x20, 0xa0, 0x09, 0x40, 1, 5];
    header.extend([0; 4]);
    header.extend([0, 0, 0x81, 0x80]);
    header.extend([0; 8]);
    header.extend(b"\x03ram");
    let (low, high) = header.iter().fold((1_u32, 0_u32), |(low, high), byte| {
        let low = (low + u32::from(*byte)) % 65521;
        (low, (high + low) % 65521)
    });
    let mut out = b"\x89LZO\0\r\n\x1a\n".to_vec();
    out.extend(header);
    out.extend((high << 16 | low).to_be_bytes());
    for block in content.chunks(10_000) {
        let len = (block.len() as u32).to_be_bytes();
        out.extend([len, len].as_flattened());
        out.extend(block);
    }
    out.extend([0; 4]);
    out
}

fn unpacked(format: u32, bytes: &[u8]) -> Option<Vec<u8>> {
    let mut content = Vec::new();
    let read = |reader: &mut dyn std::io::Read, content: &mut Vec<u8>| {
        reader.read_to_end(content).unwrap();
    };
    match format {
        1 => read(&mut flate2::read::GzDecoder::new(bytes), &mut content),
        2 => read(&mut bzip2::read::BzDecoder::new(bytes), &mut content),
        3 => read(&mut lzma_rust2::XzReader::new(bytes, false), &mut content),
        // Nothing else here knows it.
        4 => return None,
        5 => content = zstd::decode_all(bytes).unwrap(),
        _ => content = bytes.to_vec(),
    }
    Some(content)
}

fn image(format: u32, content: &[u8]) -> Vec<u8> {
    [header(format), packed(format, content)].concat()
}

fn open(path: &Path, bytes: &[u8]) -> Result<Dump, DumpError> {
    fs::write(path, bytes).unwrap();
    Dump::open(path, None)
}

fn prune_to(dump: &Dump, runs: &[(u64, u64)], out: &Path) {
    let plan = plan(dump.layout(), runs);
    dump.prune_to(&plan, out, Overwrite::Replace).unwrap();
}

#[test]
fn a_stream_in_an_image_is_pruned_and_libvirts_part_stays() {
    let folder = tempfile::tempdir().unwrap();
    let (path, out) = (folder.path().join("image"), folder.path().join("out"));
    let bare = folder.path().join("stream");
    let plain = open(&bare, &stream()).unwrap();
    prune_to(&plain, &[(0, 2), (3, 2)], &out);
    let pruned_stream = fs::read(&out).unwrap();
    for (format, named) in [
        (0, "libvirt save image"),
        (1, "libvirt save image (gzip)"),
        (2, "libvirt save image (bzip2)"),
        (3, "libvirt save image (xz)"),
        (4, "libvirt save image (lzop)"),
        (5, "libvirt save image (zstd)"),
    ] {
        let dump = open(&path, &image(format, &stream())).unwrap();
        assert_eq!(dump.format(), named);
        assert_eq!(dump.machine_type(), Some("pc-i440fx-10.0"));
        assert_eq!(first_bytes(&dump), [1, 0x77, 3, 0, 5, 6, 0, 8]);
        let error = dump
            .prune_in_place(&plan(dump.layout(), &[(0, 1)]))
            .unwrap_err();
        assert!(matches!(error, DumpError::NotInPlace { .. }), "{error}");
        prune_to(&dump, &[(0, 2), (3, 2)], &out);
        let written = fs::read(&out).unwrap();
        let head = header(format);
        assert_eq!(written[..head.len()], head);
        let content = unpacked(format, &written[head.len()..]);
        assert!(
            content.is_none_or(|content| content == pruned_stream),
            "{named}"
        );
        let pruned = Dump::open(&out, None).unwrap();
        assert_eq!(first_bytes(&pruned), [0, 0, 3, 0, 0, 6, 0, 8]);
        // The image itself is not its own output.
        let same = dump.prune_to(&plan(dump.layout(), &[]), &path, Overwrite::Replace);
        assert!(matches!(same, Err(DumpError::SameFile { .. })));
    }
}

#[test]
fn a_sparse_image_is_pruned_in_place() {
    let folder = tempfile::tempdir().unwrap();
    let (path, out) = (folder.path().join("image"), folder.path().join("out"));
    // The offsets count from the beginning of the image.
    let pages: Vec<_> = (0..40).map(|n| (n != 7).then_some(n + 1)).collect();
    let file = File::new(vec![
        Block("pc.ram", pages),
        Block("pc.rom", vec![Some(9); 3]),
    ]);
    let bytes = file.bytes_behind(&header(6));
    let dump = open(&path, &bytes).unwrap();
    assert_eq!(dump.format(), "libvirt save image (sparse)");
    let mut expected: Vec<u8> = (1..=40).collect();
    expected[7] = 0;
    assert_eq!(first_bytes(&dump), expected);
    let runs = [(0, 6), (20, 10)];
    prune_to(&dump, &runs, &out);
    let stats = dump
        .prune_in_place_with(&plan(dump.layout(), &runs), &every_page())
        .unwrap();
    assert_eq!(stats.dropped_bytes, 16 * PAGE as u64);
    let after = fs::read(&path).unwrap();
    assert!(after == fs::read(&out).unwrap());
    let head = header(6);
    assert_eq!(after[..head.len()], head);
    expected[..6].fill(0);
    expected[20..30].fill(0);
    assert_eq!(first_bytes(&Dump::open(&path, None).unwrap()), expected);
}

#[test]
fn images_that_lie_or_are_damaged_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let good = image(5, &stream());
    let refused = |bytes: &[u8]| open(&path, bytes).unwrap_err();
    for len in (0..good.len()).step_by(13) {
        refused(&good[..len]);
    }
    let mut long = good.clone();
    long[20..24].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(matches!(refused(&long), DumpError::Malformed { .. }));
    long[20..24].copy_from_slice(&(good.len() as u32).to_le_bytes());
    assert!(matches!(refused(&long), DumpError::Malformed { .. }));
    let mut other = good.clone();
    for (format, supported) in [(7, "format"), (99, "format")] {
        other[28] = format;
        let error = refused(&other).to_string();
        assert!(error.contains(supported), "{error}");
    }
    let mut version = good.clone();
    version[16] = 3;
    assert!(matches!(refused(&version), DumpError::Malformed { .. }));
    // Cut inside the compressed content, and changed there.
    let error = refused(&good[..good.len() - 9]);
    assert!(matches!(error, DumpError::Compressed { .. }), "{error}");
    for format in 1..=5 {
        let mut bytes = image(format, &stream());
        let at = header(format).len() + 40;
        bytes[at..at + 20].fill(0xff);
        let error = refused(&bytes);
        assert!(!error.to_string().is_empty());
    }
    // An image in an image, a raw file in one, nothing in one.
    for content in [image(1, &stream()), vec![0; 1 << 20], Vec::new()] {
        for format in 1..=5 {
            let error = refused(&image(format, &content));
            assert!(matches!(error, DumpError::NotADump { .. }), "{error}");
        }
    }
    let mut unfinished = good.clone();
    unfinished[..16].copy_from_slice(b"LibvirtQemudPart");
    assert!(matches!(refused(&unfinished), DumpError::NotRead { .. }));
}

/// Its content was taken in at once: that the file is another by now is told all the same.
#[test]
fn a_compressed_file_that_changed_since_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let (path, out) = (folder.path().join("file"), folder.path().join("out"));
    let whole = |format| packed(format, &stream());
    let images = (1..=5).map(|format| image(format, &stream()));
    for bytes in images.chain([whole(1), whole(5), packed(5, &image(5, &stream()))]) {
        fs::write(&path, &bytes).unwrap();
        let known = DumpOptions::new();
        let dump = match known.unpack(&path).unwrap() {
            Some(spool) => known.open_spooled(&spool).unwrap(),
            None => known.open(&path).unwrap(),
        };
        dump.check_files_unchanged().unwrap();
        let before = first_bytes(&dump);
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.set_len(bytes.len() as u64 - 1).unwrap();
        let changed = dump.check_files_unchanged();
        assert!(
            matches!(changed, Err(DumpError::Changed { .. })),
            "{changed:?}"
        );
        let plan = plan(dump.layout(), &[(0, 2)]);
        let pruned = dump.prune_to(&plan, &out, Overwrite::Refuse);
        assert!(
            matches!(pruned, Err(DumpError::Changed { .. })),
            "{pruned:?}"
        );
        assert!(!out.exists());
        // Its memory is what it was.
        dump.check_unchanged().unwrap();
        assert_eq!(first_bytes(&dump), before);
    }
}

#[test]
fn a_host_of_the_other_byte_order_wrote_it() {
    let folder = tempfile::tempdir().unwrap();
    let mut bytes = image(0, &stream());
    for word in bytes[16..92].chunks_mut(4) {
        word.reverse();
    }
    let dump = open(&folder.path().join("image"), &bytes).unwrap();
    assert_eq!(first_bytes(&dump), [1, 0x77, 3, 0, 5, 6, 0, 8]);
}

#[test]
fn what_comes_through_a_pipe_goes_out_through_one() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let runs = [(0, 2), (3, 2)];
    for bytes in [stream(), image(0, &stream()), image(5, &stream())] {
        let spool = Spool::from_reader("a pipe", bytes.as_slice()).unwrap();
        let dump = Dump::open_spooled(&spool, None).unwrap();
        let mut piped = Vec::new();
        let stats = dump
            .prune_to_writer(&plan(dump.layout(), &runs), &mut piped)
            .unwrap();
        assert_eq!(stats.disk_after, piped.len() as u64);
        let file = open(&folder.path().join("in"), &bytes).unwrap();
        prune_to(&file, &runs, &out);
        assert!(piped == fs::read(&out).unwrap());
        // The same content in another layout, without the pipe.
        let again = Dump::open_spooled(dump.spool().unwrap(), Some(&LayoutSpec::Flat)).unwrap();
        assert_eq!(first_bytes(&again), first_bytes(&dump));
    }
    let file = File::new(vec![Block("ram0", vec![Some(1); 4])]);
    let spool = Spool::from_reader("a pipe", file.bytes().as_slice()).unwrap();
    let dump = Dump::open_spooled(&spool, None).unwrap();
    assert_eq!(first_bytes(&dump), [1; 4]);
    let error = dump
        .prune_to_writer(&plan(dump.layout(), &[]), Vec::new())
        .unwrap_err();
    assert!(matches!(error, DumpError::NotAStream { .. }));
    let empty = Spool::from_reader("a pipe", std::io::empty()).unwrap();
    assert!(Dump::open_spooled(&empty, None).is_err());
}

#[test]
fn only_what_is_in_a_migration_file_is_converted_to_one() {
    let folder = tempfile::tempdir().unwrap();
    let (path, out) = (folder.path().join("in"), folder.path().join("out"));
    // Out of a libvirt image comes what is in it, in either kind.
    let image_path = folder.path().join("image");
    let bare = open(&path, &stream()).unwrap();
    bare.to_stream(&out, &WriteOptions::new()).unwrap();
    let normal = fs::read(&out).unwrap();
    for format in [0, 5] {
        let dump = open(&image_path, &image(format, &stream())).unwrap();
        dump.to_stream(&out, &replacing()).unwrap();
        assert!(fs::read(&out).unwrap() == normal);
    }
    let file = File::new(vec![Block("ram0", vec![Some(1), None, Some(3)])]);
    open(&path, &file.bytes())
        .unwrap()
        .to_mapped_ram(&out, &replacing())
        .unwrap();
    let normal = fs::read(&out).unwrap();
    let sparse = open(&image_path, &file.bytes_behind(&header(6))).unwrap();
    sparse.to_mapped_ram(&out, &replacing()).unwrap();
    assert!(fs::read(&out).unwrap() == normal);
    assert_eq!(first_bytes(&Dump::open(&out, None).unwrap()), [1, 0, 3]);
    fs::remove_file(&out).unwrap();
    let raw = open(&path, &[7; 8192]).unwrap();
    for error in [
        raw.to_stream(&out, &WriteOptions::new()),
        raw.to_mapped_ram(&out, &WriteOptions::new()),
    ] {
        assert!(matches!(error, Err(DumpError::CannotConvert { .. })));
    }
    // A mapped-ram file without the end of its section: no output.
    let file = File::new(vec![Block("ram0", vec![Some(1); 4])]).bytes();
    let cut = open(&path, &file[..file.len() - 30]).unwrap();
    let error = cut.to_stream(&out, &WriteOptions::new());
    assert!(matches!(error, Err(DumpError::Malformed { .. })));
    assert!(!out.exists());
    // A capability that others have stays, that of mapped-ram comes and goes.
    let mut file = File::new(vec![Block("ram0", vec![Some(1); 4])]);
    file.capabilities = vec!["events", "mapped-ram"];
    let dump = open(&path, &file.bytes()).unwrap();
    dump.to_stream(&out, &WriteOptions::new()).unwrap();
    let written = fs::read(&out).unwrap();
    let has = |name: &[u8]| written.windows(name.len()).any(|part| part == name);
    assert!(has(b"\x06events") && !has(b"mapped-ram"));
}

/// A stream of these pages in this order: block, page, content.
fn stream_of(blocks: &[(&str, u64)], records: &[(usize, u64, Option<u8>)]) -> Vec<u8> {
    let mut out = b"QEVM\0\0\0\x03\x07\0\0\0\x0epc-i440fx-10.0\x01\0\0\0\x02\x03ram".to_vec();
    out.extend([0, 0, 0, 0, 0, 0, 0, 4]);
    let total: u64 = blocks.iter().map(|(_, pages)| pages * PAGE as u64).sum();
    out.extend((total | 4).to_be_bytes());
    for (block, pages) in blocks {
        name(&mut out, block);
        out.extend((pages * PAGE as u64).to_be_bytes());
    }
    let end = b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02";
    out.extend(end);
    let mut last = None;
    let half = records.len() / 2;
    for (kind, part) in [(2_u8, &records[..half]), (3, &records[half..])] {
        out.extend([kind, 0, 0, 0, 2]);
        for (block, page, content) in part {
            let again = last == Some(*block);
            last = Some(*block);
            let flags = if content.is_some() { 8 } else { 2 } | if again { 0x20 } else { 0 };
            out.extend(((page * PAGE as u64) | flags).to_be_bytes());
            if !again {
                name(&mut out, blocks[*block].0);
            }
            match content {
                Some(byte) => out.extend([*byte; PAGE]),
                None => out.push(0),
            }
        }
        out.extend(end);
    }
    out.extend(b"\x04 the rest");
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Any order of records, pages sent several times, two blocks of RAM and a ROM: read, pruned
    /// and read again, as a stream, in an image, and as a mapped-ram file of the same pages.
    #[test]
    fn what_is_written_is_read(
        records in proptest::collection::vec((0_usize..3, 0_u64..12, proptest::option::of(1_u8..)), 0..60),
        runs in proptest::collection::vec((0_u64..30, 1_u64..6), 0..5),
        format in prop_oneof![Just(0_u32), Just(1), Just(5)],
    ) {
        let blocks = [("ram-node0", 12), ("ram-node1", 12), ("pc.rom", 12)];
        // Node 1 lies around a hole, so that pages 12..17 and 256..263 are its.
        let layout: LayoutSpec =
            "ram-node0=0-0xc000;ram-node1=0xc000-0x11000,0x100000-0x107000".parse().unwrap();
        // Every page comes once at least.
        let all = (0..3).flat_map(|block| (0..12).map(move |page| (block, page, None)));
        let records: Vec<_> = all.chain(records).collect();
        let bytes = stream_of(&blocks, &records);
        let mut model = vec![vec![0_u8; 12]; 3];
        for (block, page, content) in &records {
            model[*block][*page as usize] = content.unwrap_or(0);
        }
        let mut expected = [model[0].clone(), model[1].clone()].concat();
        let folder = tempfile::tempdir().unwrap();
        let (path, out) = (folder.path().join("in"), folder.path().join("out"));
        fs::write(&path, image(format, &bytes)).unwrap();
        let dump = Dump::open(&path, Some(&layout)).unwrap();
        prop_assert_eq!(first_bytes(&dump), expected.clone());

        let mapped = File::new(
            blocks.iter().zip(&model).map(|((name, _), pages)| {
                Block(name, pages.iter().map(|byte| (*byte != 0).then_some(*byte)).collect())
            }).collect(),
        );
        let mapped_path = mapped.write(folder.path());
        let mapped = Dump::open(&mapped_path, Some(&layout)).unwrap();
        prop_assert_eq!(first_bytes(&mapped), expected.clone());

        let plan = plan(dump.layout(), &runs);
        for (first, len) in &runs {
            for pfn in *first..first + len {
                // Frames 17 and up are not RAM here, but for those behind the hole.
                if pfn < 17 {
                    expected[pfn as usize] = 0;
                }
            }
        }
        dump.prune_to(&plan, &out, Overwrite::Refuse).unwrap();
        let pruned = Dump::open(&out, Some(&layout)).unwrap();
        prop_assert_eq!(first_bytes(&pruned), expected.clone());
        // The ROM's pages are where they were, and every record still has one.
        if format == 0 {
            let written = fs::read(&out).unwrap();
            let roms: usize = records.iter().filter(|r| r.0 == 2 && r.2.is_some()).count();
            let dropped = bytes.len() + header(0).len() - written.len();
            prop_assert_eq!(dropped % (PAGE - 1), 0);
            let pages = (written.len() - header(0).len()) / PAGE;
            prop_assert!(pages >= roms);
        }
        mapped.prune_in_place_with(&plan, &every_page()).unwrap();
        let mapped = Dump::open(&mapped_path, Some(&layout)).unwrap();
        prop_assert_eq!(first_bytes(&mapped), expected);
    }
}
