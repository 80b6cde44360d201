//! Errors have types, and words.

use crate::fake::{Fake, bytes, library, without};
use sonicshot::{Gpa, GuestMemory, MemoryError};
use sonicshot_libvmi::{Domain, InitFailure, LibVmi, LibVmiError, LibVmiGuest, LoadError};
use std::error::Error;

#[test]
fn a_library_without_its_functions_is_refused_by_which_it_lacks() {
    let folder = tempfile::tempdir().unwrap();
    let old = LibVmi::open(without("vmi_pagecache_flush", folder.path())).unwrap_err();
    assert!(matches!(old, LoadError::TooOld { .. }), "{old:?}");
    assert!(old.to_string().contains("before 0.14"), "{old}");
    let other = LibVmi::open(without("vmi_read_pa", folder.path())).unwrap_err();
    assert!(
        matches!(
            other,
            LoadError::NotLibVmi {
                function: "vmi_read_pa",
                ..
            }
        ),
        "{other:?}"
    );
    // Without what not every build has it is there.
    for optional in [
        "vmi_init_os",
        "vmi_translate_ksym2v",
        "vmi_mmap_guest_pa",
        "vmi_events_version",
    ] {
        LibVmi::open(without(optional, folder.path())).unwrap();
    }
    let version = library().version().clone();
    assert_eq!(version.events, Some(9));
    assert!(version.file.unwrap().ends_with("liblibvmi_fake.so"));
}

#[test]
fn a_guest_that_is_not_there_is_told_in_words() {
    let nobody = Domain::Xen("/nowhere".into());
    let error = LibVmiGuest::open(&library(), &nobody, None).unwrap_err();
    assert!(
        matches!(
            &error,
            LibVmiError::Open {
                why: InitFailure::NotFound,
                ..
            }
        ),
        "{error:?}"
    );
    assert_eq!(
        error.to_string(),
        "LibVMI does not open xen:/nowhere: there is no such guest"
    );
    let file = Domain::File("/nowhere".into());
    let error = LibVmiGuest::open(&library(), &file, None).unwrap_err();
    assert!(matches!(error, LibVmiError::File { .. }), "{error:?}");
    for (number, why) in [
        (0, InitFailure::NotSaid),
        (1, InitFailure::NoHypervisor),
        (2, InitFailure::Driver),
        (4, InitFailure::Paging),
        (17, InitFailure::Other(17)),
    ] {
        let fake = Fake::new().say("error", &format!("{number:x}"));
        match fake.open().unwrap_err() {
            LibVmiError::Open { why: found, .. } => assert_eq!(found, why),
            other => panic!("{other:?}"),
        }
        assert!(fake.log().is_empty());
    }
    // By its number: this library has none.
    let error = LibVmiGuest::open(&library(), &Domain::Xen("7".into()), None).unwrap_err();
    assert!(matches!(error, LibVmiError::Open { .. }), "{error:?}");
}

#[test]
fn a_guest_without_memory_is_refused() {
    let none = Fake::with_memory(&[], &[]);
    assert!(matches!(none.open(), Err(LibVmiError::NoMemory { .. })));
    // It says that there is some, and none can be read.
    let nothing = Fake::new().say("size", "100000").say("end", "100000");
    assert!(matches!(nothing.open(), Err(LibVmiError::NoMemory { .. })));
}

#[test]
fn a_guest_that_is_destroyed_while_it_is_read_is_an_error_and_not_left_paused() {
    // The search for RAM takes a page of it to see whether it maps.
    let fake = Fake::with_memory(&bytes(1 << 20), &[(0, 1 << 20)]).say("gone_after", "3");
    let guest = fake.open().unwrap();
    let paused = guest.pause(None).unwrap();
    let mut buf = [0; 4096];
    for page in 0..3 {
        paused.read(Gpa::new(page << 12), &mut buf).unwrap();
    }
    let error = paused.read(Gpa::new(0x4ff8), &mut buf).unwrap_err();
    assert!(matches!(error, MemoryError::Backend { .. }), "{error:?}");
    let source = error
        .source()
        .unwrap()
        .downcast_ref::<LibVmiError>()
        .unwrap();
    match source {
        LibVmiError::Read {
            at, wanted, read, ..
        } => {
            assert_eq!((at.raw(), *wanted, *read), (0x4ff8, 4096, 0));
        }
        other => panic!("{other:?}"),
    }
    assert!(source.to_string().contains("the guest is gone"), "{source}");
    // What is no RAM is not asked for.
    let error = paused.read(Gpa::new(1 << 20), &mut buf).unwrap_err();
    assert!(matches!(error, MemoryError::NotRam { .. }), "{error:?}");
    let error = paused.resume().unwrap_err();
    assert!(matches!(error, LibVmiError::Resume { .. }), "{error:?}");
    drop(guest);
    assert_eq!(fake.log(), ["pause", "flush", "resume", "destroy"]);
}

#[test]
fn a_page_that_went_in_a_long_read_says_how_far_it_came() {
    let fake = Fake::with_memory(&bytes(1 << 20), &[(0, 1 << 20)]).say("gone_after", "2");
    let paused = fake.open().unwrap().pause(None).unwrap();
    let error = paused.read(Gpa::new(8), &mut vec![0; 0x4000]).unwrap_err();
    let source = error
        .source()
        .unwrap()
        .downcast_ref::<LibVmiError>()
        .unwrap();
    assert!(
        matches!(source, LibVmiError::Read { read: 0x1ff8, .. }),
        "{source:?}"
    );
}
