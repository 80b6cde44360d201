use crate::fake::{Answer, Change, DEVICES, Fake, bios, blocks, memory, ram, registers};
use serde_json::{Value, json};
use sonicshot::checkpoint::{CheckpointReader, Compression, PageContent, SaveOptions};
use sonicshot::{Gpa, GuestMemory, PageSize, WorkOptions, WorkPhase};
use sonicshot_qemu_live::{AfterSave, LiveSaveOptions, LiveSaved, QemuError, save};
use sonicshot_testkit::Told;
use std::sync::Arc;
use std::time::{Duration, Instant};

fn options() -> LiveSaveOptions {
    let mut options = LiveSaveOptions::default();
    options.writing = SaveOptions::new(Compression::Lz4);
    // The process that opened the monitor is this one.
    options.max_pause = Duration::from_secs(60);
    options
}

fn run(fake: &Fake, options: LiveSaveOptions) -> Result<LiveSaved, QemuError> {
    save(&fake.socket(), &fake.out(), options)
}

fn position(heard: &[String], name: &str) -> Option<usize> {
    heard.iter().position(|heard| heard == name)
}

#[test]
fn a_guest_is_saved_and_runs_on() {
    let fake = Fake::start(Vec::new());
    let saved = run(&fake, options()).unwrap();
    assert_eq!(saved.paused, Some(Duration::from_secs(1)));
    assert!(!saved.found_paused);
    assert_eq!(saved.ram_bytes, ram().len() as u64);
    assert!(
        saved.dropped_bytes > saved.ram_bytes / 4,
        "{}",
        saved.dropped_bytes
    );
    let reader = CheckpointReader::open(fake.out()).unwrap();
    assert_eq!(reader.read_blob("qemu-devices").unwrap(), DEVICES);
    let record: Value = serde_json::from_slice(&reader.read_blob("qemu-live").unwrap()).unwrap();
    assert_eq!(record["machine"], "pc-i440fx-10.0");
    assert_eq!(record["blocks"][1]["runs"], json!([[2, 1]]));
    assert_eq!(
        reader.read_blob("qemu-block-1").unwrap(),
        bios()[2 * 4096..3 * 4096]
    );
    // What is kept is the guest's.
    let (size, memory) = (PageSize::SIZE_4K, memory());
    let mut kept = 0;
    for run in reader.runs() {
        if matches!(run.content, PageContent::Free { .. }) {
            continue;
        }
        for pfn in run.frames.iter() {
            let at: Gpa = pfn.gpa(size).unwrap();
            let (mut ours, mut theirs) = ([0; 4096], [0; 4096]);
            reader.read(at, &mut ours).unwrap();
            memory.read(at, &mut theirs).unwrap();
            assert_eq!(ours, theirs, "{at}");
            kept += 1;
        }
    }
    assert_eq!(kept * 4096, saved.ram_bytes - saved.dropped_bytes);
    let heard = fake.heard();
    let order = ["add-fd", "stop", "xen-save-devices-state", "cont"];
    let places: Vec<_> = order
        .iter()
        .map(|name| position(&heard, name).unwrap())
        .collect();
    assert!(places.is_sorted(), "{heard:?}");
    // Nothing is asked for that takes long between the stop and the state of devices.
    assert_eq!(places[1] + 1, places[2]);
}

#[test]
fn the_look_the_copy_and_the_writing_are_told_of() {
    use WorkPhase::{Classifying, Copying, FindingKernel, Saving, Syncing, WalkingLists};
    let looks = [FindingKernel, WalkingLists, Classifying];
    let always = |time| ("query-status", time, said(json!({"status": "paused"})));
    for (changes, expected) in [
        // In the pause only bytes are told of: what is read for a look there is not.
        (
            Vec::new(),
            [&looks[..], &[Copying, Saving, Syncing]].concat(),
        ),
        // A guest that is paused anyway waits for nobody.
        (
            (1..5).map(always).collect(),
            [&looks[..], &[Saving, Syncing]].concat(),
        ),
    ] {
        let fake = Fake::start(changes);
        let told = Arc::new(Told::default());
        let mut options = options();
        options.writing.progress = Some(told.clone());
        let saved = run(&fake, options).unwrap();
        let told = told.phases();
        let phases: Vec<_> = told.iter().map(|(phase, _)| *phase).collect();
        assert_eq!(phases, expected);
        for (phase, bytes) in &told {
            assert!(
                bytes.is_sorted_by_key(|(done, _)| *done),
                "{phase:?}: {bytes:?}"
            );
            let (done, total) = bytes.last().unwrap();
            assert!(done == total && *total > 0, "{phase:?}: {bytes:?}");
            if *phase == Copying {
                assert_eq!(*total, saved.ram_bytes - saved.dropped_bytes);
            }
        }
        fake.heard();
    }
}

#[test]
fn a_guest_is_as_it_was_to_be_afterwards() {
    for (after, paused, expected) in [
        (AfterSave::Resume, false, &["stop", "cont"][..]),
        (AfterSave::Stop, false, &["stop"]),
        (AfterSave::Quit, false, &["stop", "quit"]),
        (AfterSave::Resume, true, &[]),
    ] {
        let always = |time| ("query-status", time, said(json!({"status": "paused"})));
        let fake = Fake::start(if paused {
            (1..5).map(always).collect()
        } else {
            Vec::new()
        });
        let mut options = options();
        options.after = after;
        let saved = run(&fake, options).unwrap();
        assert_eq!(saved.found_paused, paused);
        let heard = fake.heard();
        let seen: Vec<_> = heard
            .iter()
            .filter(|name| ["stop", "cont", "quit"].contains(&name.as_str()))
            .collect();
        assert_eq!(seen, expected, "{after:?}");
    }
}

/// A change, and what the error then has.
type Refusal = (Change, &'static str);

fn said(value: Value) -> Answer {
    Answer::Return(value)
}

/// Of guests that are not saved: none of them was paused.
fn before_the_pause() -> Vec<Refusal> {
    let blocked = json!({"blocked-reasons": ["a device cannot be moved"]});
    let nowhere = "pc.ram 4 KiB 0x0 0x1000 0x1000 0x1000 rw\n";
    let dimm = json!([{"type": "dimm"}]);
    let vfio = "  dev: vfio-pci, id \"x\"\n";
    vec![
        (
            ("query-status", 1, said(json!({"status": "inmigrate"}))),
            "`inmigrate`",
        ),
        (("query-status", 1, said(json!([]))), "query-status"),
        (
            ("query-migrate", 1, said(blocked)),
            "a device cannot be moved",
        ),
        (
            ("query-migrate", 1, said(json!({"status": "active"}))),
            "under way",
        ),
        (("qom-get", 1, said(json!("/objects/sev0"))), "encrypted"),
        (("query-memory-devices", 1, said(dimm)), "(dimm)"),
        (
            ("query-memory-devices", 1, said(json!(7))),
            "query-memory-devices",
        ),
        (("info qtree", 1, said(json!(vfio))), "vfio-pci"),
        (("qom-get", 2, said(json!(7))), "machine's type"),
        (
            ("info ramblock", 1, said(json!("nonsense"))),
            "info ramblock",
        ),
        (("info ramblock", 1, said(json!(nowhere))), "info mtree"),
        (("info mtree -f", 1, said(json!("nonsense"))), "info mtree"),
        (("query-memdev", 1, said(json!([]))), "none of the backends"),
        (
            ("gpa2hva 0x0", 1, said(json!("Memory is not RAM"))),
            "gpa2hva",
        ),
        (("add-fd", 1, Answer::Error("no")), "refuses `add-fd`: no"),
    ]
}

/// Of what goes wrong when the guest is paused.
fn in_the_pause() -> Vec<Refusal> {
    const DEVICES: &str = "xen-save-devices-state";
    let more = json!(blocks().replace("pc.bios", "pc.other"));
    let foreign = json!(registers(0x1000));
    vec![
        (("stop", 1, Answer::Error("no")), "refuses `stop`"),
        ((DEVICES, 1, Answer::Error("full")), "full"),
        ((DEVICES, 1, said(json!({}))), DEVICES),
        (("info ramblock", 2, said(more)), "have changed"),
        (
            ("info registers -a", 2, said(json!("nothing"))),
            "info registers",
        ),
        (("info registers -a", 2, said(foreign)), "as it was stopped"),
        (
            ("query-status", 2, said(json!({"status": "running"}))),
            "somebody else",
        ),
        ((DEVICES, 1, Answer::Reset), "somebody else"),
    ]
}

#[test]
fn a_guest_that_is_refused_runs_on_and_there_is_no_file() {
    let before = before_the_pause()
        .into_iter()
        .map(|refusal| (refusal, false));
    let inside = in_the_pause().into_iter().map(|refusal| (refusal, true));
    for ((change, expected), paused) in before.chain(inside) {
        let what = format!("{change:?}");
        let fake = Fake::start(vec![change]);
        let error = run(&fake, options()).expect_err(&what).to_string();
        assert!(error.contains(expected), "{what}: {error}");
        let files = std::fs::read_dir(fake.folder.path()).unwrap().count();
        assert_eq!(files, 1, "{what}: there is more than the socket");
        let heard = fake.heard();
        let (stop, cont) = (position(&heard, "stop"), position(&heard, "cont"));
        assert_eq!(stop.is_some(), paused, "{what}: {heard:?}");
        assert_eq!(stop < cont, paused, "{what}: {heard:?}");
    }
}

#[test]
fn a_pause_that_is_too_long_is_given_up() {
    for command in ["xen-save-devices-state", "stop"] {
        let fake = Fake::start(vec![(command, 1, Answer::Nothing)]);
        let mut options = options();
        options.max_pause = Duration::from_millis(300);
        let began = Instant::now();
        let error = run(&fake, options).unwrap_err();
        let took = began.elapsed();
        match command {
            "stop" => assert!(matches!(error, QemuError::Silent { .. }), "{error:?}"),
            _ => assert!(
                matches!(error, QemuError::PausedTooLong { .. }),
                "{error:?}"
            ),
        }
        assert!(took < Duration::from_secs(30), "{took:?}");
        assert!(!fake.out().exists());
        let heard = fake.heard();
        assert!(
            position(&heard, "stop") < position(&heard, "cont"),
            "{heard:?}"
        );
    }
}

#[test]
fn a_guest_for_whose_copy_there_is_no_room_is_not_paused() {
    let fake = Fake::start(Vec::new());
    let mut options = options();
    options.copy_limit = Some(1 << 20);
    let error = run(&fake, options).unwrap_err();
    assert!(
        matches!(error, QemuError::NoRoom { needed, room } if needed > 8 << 20 && room < 1 << 20),
        "{error:?}"
    );
    assert!(!fake.out().exists());
    assert_eq!(position(&fake.heard(), "stop"), None);
}

#[test]
fn a_guest_that_is_found_paused_needs_no_copy() {
    let always = |time| ("query-status", time, said(json!({"status": "paused"})));
    let plain = Fake::start(Vec::new());
    let copied = run(&plain, options()).unwrap();
    let fake = Fake::start((1..5).map(always).collect());
    let mut without = options();
    without.copy_limit = Some(0);
    let saved = run(&fake, without).unwrap();
    assert_eq!(saved.dropped_bytes, copied.dropped_bytes);
    let (ours, theirs) = (
        CheckpointReader::open(fake.out()).unwrap(),
        CheckpointReader::open(plain.out()).unwrap(),
    );
    assert!(ours.runs().eq(theirs.runs()));
    ours.verify_against(&memory(), &WorkOptions::new()).unwrap();
    // Somebody else lets it run on while it is read for the file.
    let mut answers: Vec<_> = (1..3).map(always).collect();
    answers.push(("query-status", 3, said(json!({"status": "running"}))));
    let fake = Fake::start(answers);
    let error = run(&fake, options()).unwrap_err().to_string();
    assert!(error.contains("somebody else"), "{error}");
    assert!(!fake.out().exists());
}

#[test]
fn a_qemu_that_ends_is_told() {
    let all = Fake::start(Vec::new());
    run(&all, options()).unwrap();
    let heard = all.heard();
    for name in [
        "qmp_capabilities",
        "info mtree -f",
        "stop",
        "xen-save-devices-state",
        "cont",
    ] {
        let known = heard.iter().find(|heard| *heard == name);
        assert!(known.is_some(), "{name}");
        let fake = Fake::start(vec![(name, 1, Answer::Close)]);
        let error = run(&fake, options()).unwrap_err();
        assert!(matches!(error, QemuError::Gone { .. }), "{name}: {error:?}");
        assert!(!fake.out().exists(), "{name}");
    }
}

#[test]
fn a_file_that_is_there_stays() {
    let fake = Fake::start(Vec::new());
    std::fs::write(fake.out(), "mine").unwrap();
    let error = run(&fake, options()).unwrap_err();
    assert!(matches!(error, QemuError::Output(_)), "{error:?}");
    assert_eq!(std::fs::read(fake.out()).unwrap(), b"mine");
    drop(std::os::unix::net::UnixStream::connect(fake.socket()).unwrap());
    assert!(
        fake.heard().is_empty(),
        "QEMU was asked before it was known where to write"
    );
}
