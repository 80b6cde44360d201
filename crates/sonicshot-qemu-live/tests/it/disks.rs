//! Disks that are pinned while the guest is paused.

use crate::fake::{Answer, Change, Fake, ram};
use serde_json::{Value, json};
use sonicshot::WorkOptions;
use sonicshot::checkpoint::{CheckpointReader, Compression, GivenDisk, MovedOn, SaveOptions};
use sonicshot_dump::DiskImage;
use sonicshot_qemu_live::{LiveSaveOptions, LiveSaved, QemuError, save};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A disk that holds all that the guest has in memory.
struct Disk {
    folder: tempfile::TempDir,
    base: PathBuf,
    overlay: PathBuf,
}

impl Disk {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let base = folder.path().join("base.img");
        fs::write(&base, ram()).unwrap();
        let overlay = folder.path().join("overlay.qcow2");
        Self {
            folder,
            base,
            overlay,
        }
    }

    fn list(&self, image: &Value) -> Value {
        let inserted = json!({"node-name": "#block1", "ro": false, "drv": "raw", "image": image});
        json!([{"device": "cd0"}, {"device": "virtio0", "inserted": inserted}])
    }

    fn before(&self) -> Change {
        let list = self.list(&json!({"filename": self.base}));
        ("query-block", 1, Answer::Return(list))
    }

    /// QEMU's answer when it writes to `top`.
    fn after(&self, top: &Path) -> Change {
        let below = json!({"filename": self.base});
        let list = self.list(&json!({"filename": top, "backing-image": below}));
        ("query-block", 2, Answer::Return(list))
    }

    fn options(&self, name: &str) -> LiveSaveOptions {
        let mut options = LiveSaveOptions::default();
        options.writing = SaveOptions::new(Compression::Lz4);
        options.max_pause = Duration::from_secs(60);
        options.disks = vec![(name.into(), self.overlay.clone())];
        options
    }

    fn save(&self, fake: &Fake) -> Result<LiveSaved, QemuError> {
        save(&fake.socket(), &fake.out(), self.options("virtio0"))
    }
}

fn position(heard: &[String], name: &str) -> Option<usize> {
    heard.iter().position(|heard| heard == name)
}

#[test]
fn a_disk_is_pinned_between_the_stop_and_the_copy() {
    let disk = Disk::new();
    let fake = Fake::start(vec![disk.before(), disk.after(&disk.overlay)]);
    let saved = disk.save(&fake).unwrap();
    assert!(saved.stats.on_disk > 500, "{:?}", saved.stats);
    let [pinned] = saved.disks.as_slice() else {
        panic!("{:?}", saved.disks);
    };
    assert_eq!((&pinned.base, &pinned.overlay), (&disk.base, &disk.overlay));
    let reader = CheckpointReader::open(fake.out()).unwrap();
    assert_eq!(reader.info().disks[0].name, "virtio0");
    let image = DiskImage::open(&disk.base).unwrap();
    let given = vec![GivenDisk::new("virtio0", image)];
    let reader = reader.with_disks(given, MovedOn::Refuse).unwrap();
    let checked = reader.verify_disks(&WorkOptions::new()).unwrap();
    assert_eq!(checked, saved.stats.on_disk);
    let heard = fake.heard();
    let order = [
        "query-block",
        "stop",
        "transaction",
        "xen-save-devices-state",
        "cont",
    ];
    let places: Vec<_> = order
        .iter()
        .map(|name| position(&heard, name).unwrap())
        .collect();
    assert!(places.is_sorted(), "{heard:?}");
    assert_eq!(places[1] + 1, places[2], "{heard:?}");
}

#[test]
fn a_disk_that_cannot_be_pinned_is_refused_before_the_pause() {
    let disk = Disk::new();
    let qcow2 = disk.list(&json!({"filename": disk.base}));
    let qcow2 = json!(qcow2.to_string().replace("\"raw\"", "\"qcow2\""));
    let qcow2: Value = serde_json::from_str(qcow2.as_str().unwrap()).unwrap();
    for (name, list, words) in [
        (
            "vda",
            disk.list(&json!({"filename": disk.base})),
            "no disk `vda`",
        ),
        ("cd0", disk.list(&json!({})), "no medium"),
        (
            "virtio0",
            disk.list(&json!({"filename": "nbd://x/y"})),
            "in no file",
        ),
        (
            "virtio0",
            disk.list(&json!({"filename": "/nowhere/x"})),
            "/nowhere/x",
        ),
        ("virtio0", qcow2, "another format"),
        ("virtio0", json!(1), "query-block"),
    ] {
        let fake = Fake::start(vec![("query-block", 1, Answer::Return(list))]);
        let saved = save(&fake.socket(), &fake.out(), disk.options(name));
        let error = saved.unwrap_err();
        assert!(error.to_string().contains(words), "{words}: {error}");
        assert!(!fake.out().exists());
        assert_eq!(position(&fake.heard(), "stop"), None, "{words}");
    }
    fs::write(&disk.overlay, "mine").unwrap();
    let fake = Fake::start(vec![disk.before()]);
    let error = disk.save(&fake).unwrap_err();
    assert!(error.to_string().contains("exists"), "{error}");
    assert_eq!(position(&fake.heard(), "stop"), None);
    assert_eq!(fs::read(&disk.overlay).unwrap(), b"mine");
}

#[test]
fn whatever_fails_the_guest_runs_on_and_it_is_told_what_its_disks_are() {
    const DEVICES: &str = "xen-save-devices-state";
    let disk = Disk::new();
    let other = disk.folder.path().join("other.qcow2");
    let right = disk.after(&disk.overlay);
    for (change, also, words, is_pinned) in [
        (
            ("transaction", 1, Answer::Error("no room")),
            None,
            "no room",
            false,
        ),
        ((DEVICES, 1, Answer::Error("full")), None, "full", true),
        (
            ("info registers -a", 2, Answer::Return(json!("x"))),
            None,
            "info registers",
            true,
        ),
        // Somebody else has put another overlay there.
        (disk.after(&other), None, "expected was the overlay", true),
        (
            ("cont", 1, Answer::Error("busy")),
            Some(right.clone()),
            "busy",
            true,
        ),
    ] {
        let what = format!("{change:?}");
        let changes = [disk.before(), change].into_iter().chain(also);
        let fake = Fake::start(changes.collect());
        let error = disk.save(&fake).unwrap_err();
        let mut told = error.to_string();
        if let QemuError::Disks { source, .. } = &error {
            told = format!("{told}: {source}");
        }
        assert!(told.contains(words), "{what}: {told}");
        assert_eq!(
            matches!(error, QemuError::Disks { .. }),
            is_pinned,
            "{what}: {told}"
        );
        let names = [&disk.overlay, &disk.base].map(|path| path.display().to_string());
        let both = names.iter().all(|name| told.contains(name)) && told.contains("block-commit");
        assert_eq!(both, is_pinned, "{what}: {told}");
        assert!(!fake.out().exists(), "{what}");
        let heard = fake.heard();
        assert!(
            position(&heard, "stop") < position(&heard, "cont"),
            "{what}: {heard:?}"
        );
    }
    // QEMU does not answer: it is not known.
    let fake = Fake::start(vec![disk.before(), ("transaction", 1, Answer::Close)]);
    let error = disk.save(&fake).unwrap_err();
    assert!(error.to_string().contains("not known whether"), "{error}");
}
