//! Xen save images, by the library alone.

use crate::common::xen::{image, image_with};
use crate::common::*;
use sonicshot::{Fill, GuestMemory, PageClass, PageState, Pfn};
use sonicshot_dump::{CheckedPlan, Dump, DumpError, Overwrite, WriteOptions, XlSkeleton};
use std::fs;

#[test]
fn no_plan_takes_from_the_guest_what_it_relies_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    fs::write(&path, image(&[0, 0, 0xaa, 0xaa])).unwrap();
    let dump = Dump::open(&path, None).unwrap();
    // Of which class and fill the pages 0, 1 and 2 are said to be; whether they go.
    for (class, fill, goes) in [
        (PageClass::FreeBuddy.into(), Fill::Any, true),
        (PageClass::FreeBuddy.into(), Fill::Zero, false),
        (PageClass::FreeBuddy.into(), Fill::Byte(0xaa), false),
        (
            PageState::new(PageClass::Slab).with_zero(),
            Fill::Any,
            false,
        ),
        (PageClass::Offline.into(), Fill::Zero, true),
    ] {
        let plan = plan_with(dump.layout(), &[(0, 3)], class, fill);
        let (out, mut piped) = (folder.path().join("out"), Vec::new());
        let stats = dump.prune_to(&plan, &out, Overwrite::Replace).unwrap();
        let of_pipe = dump.prune_to_writer(&plan, &mut piped).unwrap();
        assert!(fs::read(&out).unwrap() == piped);
        for stats in [stats, of_pipe] {
            let bytes = (stats.dropped_bytes, stats.kept_for_fill);
            let expected = if goes { (3 * PAGE, 0) } else { (0, 3 * PAGE) };
            assert_eq!(bytes, expected, "{class:?} {fill:?}");
        }
        let gone = fs::metadata(&path).unwrap().len() - piped.len() as u64;
        assert_eq!(gone, stats.dropped_bytes, "{class:?} {fill:?}");
    }
}

#[test]
fn a_page_table_stays_whatever_the_guest_says_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    fs::write(&path, image_with(&[1, 2, 3, 4], &[1])).unwrap();
    let dump = Dump::open(&path, None).unwrap();
    let everything = plan_with(dump.layout(), &[(0, 4)], PageClass::FreeBuddy, Fill::Any);
    let out = folder.path().join("out");
    let stats = dump.prune_to(&everything, &out, Overwrite::Refuse).unwrap();
    assert_eq!(stats.dropped_bytes, 3 * PAGE);
    let pruned = Dump::open(&out, None).unwrap();
    for pfn in 0..4_u64 {
        let at = sonicshot::Gpa::new(pfn * PAGE);
        let stays = pruned.next_data(at).is_some_and(|data| data.start() == at);
        assert_eq!(stays, pfn == 1, "{pfn}");
    }
}

#[test]
fn no_image_is_made_with_a_page_table_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let (path, out) = (folder.path().join("image"), folder.path().join("out"));
    fs::write(&path, image_with(&[1, 2, 0, 4], &[1, 2])).unwrap();
    let dump = Dump::open(&path, None).unwrap();
    let everything = plan_with(dump.layout(), &[(0, 4)], PageClass::FreeBuddy, Fill::Any);
    let skeleton = CheckedPlan::unchecked(&dump, &everything)
        .xl_skeleton()
        .unwrap()
        .unwrap();
    let skeleton = XlSkeleton::parse(&path, skeleton).unwrap();
    let write = |left_out: &[u64]| {
        let left_out = |pfn: Pfn| left_out.contains(&pfn.raw());
        let inputs = dump.files();
        skeleton.write(&dump, &left_out, &out, &inputs, &WriteOptions::new())
    };
    let error = write(&[0, 2, 3]).unwrap_err();
    assert!(
        matches!(&error, DumpError::XenFrame { pfn, .. } if pfn.raw() == 2),
        "{error}"
    );
    assert!(!out.exists());
    // What is no table is not in the image.
    write(&[0, 3]).unwrap();
    let len = |path| fs::metadata(path).unwrap().len();
    assert_eq!(len(&path) - len(&out), 2 * PAGE);
    let again = Dump::open(&out, None).unwrap();
    let mut bytes = [0; 2 * 4096];
    again.read(sonicshot::Gpa::new(4096), &mut bytes).unwrap();
    assert!(bytes[..4096] == [2; 4096] && bytes[4096..] == [0; 4096]);
}
