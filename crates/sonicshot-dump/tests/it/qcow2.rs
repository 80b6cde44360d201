//! QEMU's internal snapshots, in images made by hand.

use crate::common::qemu::{first_bytes, stream};
use crate::common::{Prunes, plan, replacing};
use proptest::prelude::*;
use sonicshot::GuestMemory;
use sonicshot_dump::{Dump, DumpError, Overwrite};
use std::fs;
use std::io::Write;
use std::path::Path;

const CLUSTER: usize = 512;
/// Behind a disk of this length begins the third table.
const DISK: u64 = 40 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    Plain,
    Deflate,
    Zstd,
    Extended,
}

/// An image of clusters of 512 bytes with a snapshot for each of `states`.
fn image(states: &[&[u8]], how: How) -> Vec<u8> {
    let mut out = b"QFI\xfb\0\0\0\x03".to_vec();
    out.extend([0; 12]);
    out.extend(9_u32.to_be_bytes());
    out.extend((DISK / 2).to_be_bytes());
    out.extend([0; 28]);
    out.extend((states.len() as u32).to_be_bytes());
    out.extend((CLUSTER as u64).to_be_bytes());
    let features: u64 = match how {
        How::Zstd => 8,
        How::Extended => 16,
        _ => 0,
    };
    out.extend(features.to_be_bytes());
    out.extend([0; 16]);
    out.extend([0, 0, 0, 4, 0, 0, 0, 112]);
    out.extend([u8::from(how == How::Zstd), 0, 0, 0, 0, 0, 0, 0]);
    // Room for the snapshots.
    out.resize(4 * CLUSTER, 0);
    let mut snapshots = Vec::new();
    for (number, state) in states.iter().enumerate() {
        let l1 = tables(&mut out, state, how);
        let at = out.len();
        for entry in &l1 {
            out.extend(entry.to_be_bytes());
        }
        out.resize(out.len().next_multiple_of(CLUSTER), 0);
        let tag = format!("tag{number}");
        snapshots.extend((at as u64).to_be_bytes());
        snapshots.extend((l1.len() as u32).to_be_bytes());
        snapshots.extend([0, 1, 0, tag.len() as u8]);
        snapshots.extend([0; 16]);
        snapshots.extend([0, 0, 0, 0, 0, 0, 0, 24]);
        snapshots.extend((state.len() as u64).to_be_bytes());
        snapshots.extend(DISK.to_be_bytes());
        snapshots.extend([0xff; 8]);
        snapshots.extend(b"1");
        snapshots.extend(tag.as_bytes());
        snapshots.resize(snapshots.len().next_multiple_of(8), 0);
    }
    out[CLUSTER..][..snapshots.len()].copy_from_slice(&snapshots);
    out
}

/// Writes the clusters of a state and the tables of them; returns the table of the tables.
fn tables(out: &mut Vec<u8>, state: &[u8], how: How) -> Vec<u64> {
    let per_table = if how == How::Extended { 32 } else { 64 };
    let first = DISK.div_ceil((per_table * CLUSTER) as u64) as usize;
    let mut l1 = vec![0; first];
    let clusters: Vec<&[u8]> = state.chunks(CLUSTER).collect();
    for clusters in clusters.chunks(per_table) {
        let mut l2: Vec<u64> = Vec::new();
        for cluster in clusters {
            let mut whole = cluster.to_vec();
            whole.resize(CLUSTER, 0);
            let packed = match how {
                How::Deflate => {
                    let level = flate2::Compression::default();
                    let mut packer = flate2::write::DeflateEncoder::new(Vec::new(), level);
                    packer.write_all(&whole).unwrap();
                    packer.finish().unwrap()
                }
                How::Zstd => zstd::encode_all(&whole[..], 1).unwrap(),
                _ => whole.clone(),
            };
            out.resize(out.len().next_multiple_of(CLUSTER), 0);
            let at = out.len() as u64;
            if how == How::Extended {
                // Of 16 bytes each; one part is marked as zero, and is.
                l2.push(at);
                let zero = |part: &[u8]| part.iter().all(|byte| *byte == 0);
                let parts = whole.chunks(16).enumerate();
                let zeroes = parts.fold(0_u64, |bits, (number, part)| {
                    bits | u64::from(zero(part)) << number
                });
                l2.push(zeroes << 32 | !zeroes & 0xffff_ffff);
                out.extend(&whole);
            } else if packed.len() < CLUSTER {
                // In the middle of a sector, and into the next.
                let at = at + 300;
                let sectors = (300 + packed.len() as u64).div_ceil(512) - 1;
                out.resize(out.len() + 300, 0xee);
                out.extend(&packed);
                l2.push(1 << 62 | sectors << 61 | at);
            } else {
                l2.push(1 << 63 | at);
                out.extend(&whole);
            }
        }
        l2.resize(CLUSTER / 8, 0);
        out.resize(out.len().next_multiple_of(CLUSTER), 0);
        l1.push(1 << 63 | out.len() as u64);
        for entry in l2 {
            out.extend(entry.to_be_bytes());
        }
    }
    l1
}

fn open(folder: &Path, bytes: &[u8]) -> Result<Dump, DumpError> {
    let path = folder.join("disk.qcow2");
    fs::write(&path, bytes).unwrap();
    Dump::open(&path, None)
}

#[test]
fn the_memory_in_a_snapshot_is_read_and_taken_out() {
    let folder = tempfile::tempdir().unwrap();
    for how in [How::Plain, How::Deflate, How::Zstd, How::Extended] {
        let bytes = image(&[&[], &stream()], how);
        let dump = open(folder.path(), &bytes).unwrap();
        assert_eq!(dump.format(), "QEMU internal snapshot (qcow2)", "{how:?}");
        assert_eq!(dump.machine_type(), Some("pc-i440fx-10.0"));
        assert_eq!(first_bytes(&dump), [1, 0x77, 3, 0, 5, 6, 0, 8], "{how:?}");
        let again = Dump::open_spooled(dump.spool().unwrap(), None).unwrap();
        assert_eq!(again.format(), dump.format());
        let out = folder.path().join("out");
        let plan = plan(dump.layout(), &[(0, 2)]);
        let refused = dump.prune_to(&plan, &out, Overwrite::Refuse);
        assert!(
            matches!(refused, Err(DumpError::CannotPrune { .. })),
            "{refused:?}"
        );
        let refused = dump.prune_in_place(&plan);
        assert!(
            matches!(refused, Err(DumpError::NotInPlace { .. })),
            "{refused:?}"
        );
        assert!(fs::read(folder.path().join("disk.qcow2")).unwrap() == bytes);
        dump.to_stream(&out, &replacing()).unwrap();
        let taken = Dump::open(&out, None).unwrap();
        assert_eq!(first_bytes(&taken), first_bytes(&dump));
        fs::remove_file(&out).unwrap();
    }
}

#[test]
fn images_without_memory_or_with_more_than_one_are_told_so() {
    let folder = tempfile::tempdir().unwrap();
    for states in [&[][..], &[&[][..], &[]]] {
        let refused = open(folder.path(), &image(states, How::Plain)).unwrap_err();
        assert!(matches!(refused, DumpError::NotRead { .. }), "{refused}");
    }
    let two = image(&[&stream(), &stream()], How::Plain);
    match open(folder.path(), &two).unwrap_err() {
        DumpError::SeveralSnapshots { names, .. } => assert_eq!(names, ["tag0", "tag1"]),
        other => panic!("{other}"),
    }
    let no_stream = open(folder.path(), &image(&[&[7; 4096]], How::Plain)).unwrap_err();
    assert!(!no_stream.to_string().is_empty());
    // Encrypted, corrupt, with its data elsewhere, of an unknown version; with more snapshots,
    // longer tables and more of what is not known than there may be.
    for (at, byte) in [
        (35, 1),
        (79, 2),
        (79, 4),
        (7, 4),
        (23, 30),
        (61, 2),
        (CLUSTER + 8, 1),
        (CLUSTER + 38, 8),
    ] {
        let mut bytes = image(&[&stream()], How::Plain);
        bytes[at] = byte;
        assert!(open(folder.path(), &bytes).is_err(), "{at}");
    }
}

#[test]
fn what_is_cut_short_or_leads_nowhere_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let whole = image(&[&stream()], How::Plain);
    for len in (0..whole.len() - 2 * CLUSTER).step_by(811) {
        assert!(open(folder.path(), &whole[..len]).is_err(), "{len}");
    }
    // All of it in one cluster, again and again.
    let mut many = whole.clone();
    let state_len = CLUSTER + 40;
    many[state_len..state_len + 8].copy_from_slice(&(1_u64 << 40).to_be_bytes());
    assert!(open(folder.path(), &many).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_image_is_too_strange(
        how in prop_oneof![Just(How::Plain), Just(How::Deflate), Just(How::Extended)],
        edits in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..6),
        early in any::<bool>(),
    ) {
        let mut bytes = image(&[&stream()], how);
        let len = if early { 2 * CLUSTER } else { bytes.len() };
        for (at, byte) in edits {
            bytes[at.index(len)] = byte;
        }
        let folder = tempfile::tempdir().unwrap();
        let _ = open(folder.path(), &bytes);
    }
}
