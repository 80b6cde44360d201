//! The real LibVMI, where `SONICSHOT_LIBVMI` names it. What is found there is in `docs/libvmi.md`.

use crate::fake::real_ram;
use sonicshot::{Gpa, GuestBytes, GuestMemory, MappedRegions, MemoryError};
use sonicshot_libvmi::{Domain, LibVmi, LibVmiError, LibVmiGuest};
use sonicshot_testkit::check_memory;
use sonicshot_vmi::{AnalysisOptions, analyze};
use std::io::Write;

fn real() -> Option<LibVmi> {
    let Some(path) = std::env::var_os("SONICSHOT_LIBVMI") else {
        eprintln!("skipped: SONICSHOT_LIBVMI names no LibVMI");
        return None;
    };
    Some(LibVmi::open(path).unwrap())
}

#[test]
fn the_real_library_reads_a_guest_in_a_file_as_it_is() {
    let Some(library) = real() else {
        return;
    };
    println!("LibVMI {}", library.version());
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(real_ram()).unwrap();
    let domain = Domain::File(file.path().to_owned());
    let guest = LibVmiGuest::open(&library, &domain, None).unwrap();
    assert_eq!(guest.layout().bytes(), real_ram().len() as u64);
    let paused = guest.pause(None).unwrap();
    check_memory(&paused, &|at, buf| {
        let from = usize::try_from(at.raw()).unwrap();
        buf.copy_from_slice(&real_ram()[from..from + buf.len()]);
    });
    let plain = vec![(Gpa::ZERO, GuestBytes::from_slice(real_ram()))];
    let plain = MappedRegions::new(plain).unwrap();
    let found = analyze(&paused, &AnalysisOptions::new()).unwrap();
    let expected = analyze(&plain, &AnalysisOptions::new()).unwrap();
    assert_eq!(found.counts(), expected.counts());
    assert!(found.pages().runs().eq(expected.pages().runs()));
    let end = paused.layout().end();
    let beyond = paused.read(end, &mut [0]);
    assert!(matches!(beyond, Err(MemoryError::NotRam { .. })));
    paused.resume().unwrap();
}

#[test]
fn the_real_library_refuses_what_is_not_there() {
    let Some(library) = real() else {
        return;
    };
    let missing = Domain::File("/nowhere".into());
    let error = LibVmiGuest::open(&library, &missing, None).unwrap_err();
    assert!(matches!(error, LibVmiError::File { .. }), "{error}");
    let empty = tempfile::NamedTempFile::new().unwrap();
    let empty = Domain::File(empty.path().to_owned());
    let error = LibVmiGuest::open(&library, &empty, None).unwrap_err();
    println!("an empty file: {error}");
    for domain in ["xen:no-such-guest", "kvm:no-such-guest"] {
        let error = LibVmiGuest::open(&library, &domain.parse().unwrap(), None).unwrap_err();
        assert!(matches!(error, LibVmiError::Open { .. }), "{error}");
        println!("{error}");
    }
}

#[test]
fn the_real_library_reads_nothing_beyond_its_end() {
    let Some(library) = real() else {
        return;
    };
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&[7; 5 << 12]).unwrap();
    let domain = Domain::File(file.path().to_owned());
    // A layout that claims more than there is.
    let more = sonicshot::GpaRange::new(Gpa::ZERO, Gpa::new(8 << 12));
    let layout = sonicshot::RamLayout::new(vec![more]).unwrap();
    let guest = LibVmiGuest::open(&library, &domain, Some(layout)).unwrap();
    let paused = guest.pause(None).unwrap();
    let mut buf = vec![0; 3 << 12];
    paused.read(Gpa::new(2 << 12), &mut buf).unwrap();
    let error = paused.read(Gpa::new(3 << 12), &mut buf).unwrap_err();
    assert!(matches!(error, MemoryError::Backend { .. }), "{error}");
    // And again: what was not there is not remembered as something.
    assert!(paused.read(Gpa::new(5 << 12), &mut [0]).is_err());
    assert!(paused.read(Gpa::new(5 << 12), &mut [0]).is_err());
    assert_eq!(paused.read_u32(Gpa::ZERO).unwrap(), 0x0707_0707);
}
