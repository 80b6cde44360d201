//! The guest's disks, pinned in the pause: from then on QEMU writes to new overlays, and what was below
//! stays as the memory knows it.

use crate::error::QemuError;
use crate::qmp::{Qmp, Until, shortened};
use serde_json::{Map, Value, json};
use sonicshot::WorkOptions;
use sonicshot::checkpoint::{DiskFinder, DiskGuesses, DiskHash, DiskInfo, DiskSource, SaveOptions};
use sonicshot::{GuestMemory, PageMap, PrunePlan};
use sonicshot_dump::{DiskImage, DumpError};
use std::path::{Path, PathBuf};

const QUERY: &str = "query-block";

/// A disk of a guest that was saved.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PinnedDisk {
    /// Its name in QEMU, and in the checkpoint.
    pub name: String,
    /// The image that the guest had until then, and that the checkpoint refers to. Nobody may write to
    /// it.
    pub base: PathBuf,
    /// The file that QEMU writes to since.
    pub overlay: PathBuf,
}

/// Its progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Untouched,
    /// QEMU was told, and did not answer.
    NotKnown,
    Pinned,
}

/// The disks that are asked for.
#[derive(Debug)]
pub(crate) struct Disks {
    disks: Vec<PinnedDisk>,
    /// Whether each one's image is raw.
    raw: Vec<bool>,
    /// By what QEMU is told which it is: a member of `blockdev-snapshot-sync`, and its value.
    told_by: Vec<(&'static str, String)>,
    state: State,
}

impl Disks {
    /// Finds the disks of these names, whose overlays will be these files, while the guest runs.
    pub(crate) fn find(
        qmp: &mut Qmp,
        pid: i32,
        asked: &[(String, PathBuf)],
    ) -> Result<Self, QemuError> {
        let mut found = Self {
            disks: Vec::new(),
            raw: Vec::new(),
            told_by: Vec::new(),
            state: State::Untouched,
        };
        if asked.is_empty() {
            return Ok(found);
        }
        let all = qmp.run(QUERY, Value::Null)?;
        for (name, overlay) in asked {
            let twice = found.disks.iter().any(|disk| disk.name == *name);
            if twice {
                return Err(refused(name, "was given twice"));
            }
            found.add(&all, pid, name, overlay)?;
        }
        Ok(found)
    }

    fn add(&mut self, all: &Value, pid: i32, name: &str, overlay: &Path) -> Result<(), QemuError> {
        let device = device(all, name)?;
        let base = image_of(device, name)?;
        let base = match base.is_absolute() {
            true => base,
            // Where QEMU is.
            false => {
                let folder = std::fs::read_link(format!("/proc/{pid}/cwd"));
                folder.map_err(io("opening", &base))?.join(base)
            }
        };
        let overlay = std::path::absolute(overlay).map_err(io("naming", overlay))?;
        if overlay.symlink_metadata().is_ok() {
            return Err(DumpError::Exists { path: overlay }.into());
        }
        let path = overlay.to_str().ok_or_else(|| {
            refused(
                name,
                "would have an overlay whose name is no UTF-8, which QMP needs",
            )
        })?;
        if path.contains([',', ':']) {
            return Err(refused(
                name,
                "would have an overlay with a comma or a colon in its name, which QEMU may misread",
            ));
        }
        let inserted = device.get("inserted");
        let raw = inserted.and_then(|inserted| inserted.get("drv")?.as_str()) == Some("raw");
        open(&base, raw, name)?;
        let text = |from: Option<&Value>, key: &str| {
            let text = from?.get(key)?.as_str()?;
            (!text.is_empty()).then(|| text.to_owned())
        };
        let told_by = match (text(Some(device), "device"), text(inserted, "node-name")) {
            (Some(device), _) => ("device", device),
            (None, Some(node)) => ("node-name", node),
            (None, None) => return Err(refused(name, "has no name by which QEMU is told of it")),
        };
        self.told_by.push(told_by);
        self.raw.push(raw);
        self.disks.push(PinnedDisk {
            name: name.to_owned(),
            base,
            overlay,
        });
        Ok(())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.disks.is_empty()
    }

    pub(crate) fn all(&self) -> &[PinnedDisk] {
        &self.disks
    }

    /// Has QEMU write to the overlays from now on: to all of them or none. The guest is paused, and QEMU
    /// has flushed what it wrote.
    pub(crate) fn pin(&mut self, qmp: &mut Qmp, until: &Until) -> Result<(), QemuError> {
        if self.is_empty() {
            return Ok(());
        }
        let actions = self.disks.iter().zip(&self.told_by);
        let actions = actions.map(|(disk, (key, value))| {
            let mut data = Map::new();
            data.insert((*key).into(), value.as_str().into());
            let overlay = disk.overlay.to_string_lossy();
            data.insert("snapshot-file".into(), overlay.into());
            data.insert("format".into(), "qcow2".into());
            if *key == "node-name" {
                let name = format!("sonicshot-{}", short_hash(&disk.overlay));
                data.insert("snapshot-node-name".into(), name.into());
            }
            json!({"type": "blockdev-snapshot-sync", "data": data})
        });
        let actions: Vec<Value> = actions.collect();
        self.state = State::NotKnown;
        match qmp.run_until("transaction", json!({ "actions": actions }), &[], until) {
            Ok(_) => {
                self.state = State::Pinned;
                Ok(())
            }
            Err(error) => {
                if matches!(error, QemuError::Refused { .. }) {
                    self.state = State::Untouched;
                }
                Err(error)
            }
        }
    }

    /// The state that an error leaves behind, where there is one.
    pub(crate) fn told(&self, error: QemuError) -> QemuError {
        let state = match self.state {
            State::Untouched => return error,
            State::NotKnown => "it is not known whether",
            State::Pinned => "the guest runs on,",
        };
        let disks = self.disks.iter().map(|disk| {
            format!(
                "{} writes to {} over {}",
                disk.name,
                disk.overlay.display(),
                disk.base.display()
            )
        });
        let disks: Vec<_> = disks.collect();
        QemuError::Disks {
            state: format!(
                "nothing was saved, and {state} {} (`block-commit` merges it back)",
                disks.join(", ")
            ),
            source: Box::new(error),
        }
    }

    /// Opens the images, of which QEMU must say that they are below the overlays now, and that nobody has
    /// open for writing.
    pub(crate) fn open(&self, qmp: &mut Qmp) -> Result<Vec<DiskImage>, QemuError> {
        if self.is_empty() {
            return Ok(Vec::new());
        }
        let all = qmp.run(QUERY, Value::Null)?;
        let mut images = Vec::new();
        for (disk, raw) in self.disks.iter().zip(&self.raw) {
            let device = device(&all, &disk.name)?;
            let inserted = device.get("inserted").and_then(|one| one.get("image"));
            let named = |image: Option<&Value>| {
                let name = image?.get("filename")?.as_str()?;
                Some(PathBuf::from(name))
            };
            let below = inserted.and_then(|image| image.get("backing-image"));
            let is_over = named(inserted).as_deref() == Some(disk.overlay.as_path())
                && named(below).is_some_and(|base| disk.base.ends_with(base));
            if !is_over {
                return Err(QemuError::Unknown {
                    what: QUERY,
                    found: shortened(&device.to_string()),
                    expected: "the overlay over the image that there was",
                });
            }
            let image = open(&disk.base, *raw, &disk.name)?;
            image.check_pinned()?;
            images.push(image);
        }
        Ok(images)
    }
}

/// The pages of a guest's memory that are on its disks.
pub(crate) struct OnPinned<'a> {
    pub infos: Vec<DiskInfo>,
    pub sources: Vec<&'a dyn DiskSource>,
    pub guesses: DiskGuesses,
}

impl<'a> OnPinned<'a> {
    /// Looks through the images for what `plan` keeps.
    pub(crate) fn find(
        disks: &[PinnedDisk],
        images: &'a [DiskImage],
        hash: DiskHash,
        (memory, map, plan): (&dyn GuestMemory, &PageMap, &PrunePlan),
        writing: &SaveOptions,
        path: &Path,
    ) -> Result<Self, QemuError> {
        let mut found = Self {
            infos: Vec::new(),
            sources: Vec::new(),
            guesses: DiskGuesses::default(),
        };
        for (disk, image) in disks.iter().zip(images) {
            found.infos.push(image.info(&disk.name, hash)?);
            found.sources.push(image);
        }
        if found.infos.is_empty() {
            return Ok(found);
        }
        let failed = QemuError::checkpoint(path);
        let mut work = WorkOptions::new();
        work.threads = writing.threads;
        work.progress.clone_from(&writing.progress);
        let finder = DiskFinder::new(memory, map, plan, DiskFinder::LIKELY, &work);
        let finder = finder.map_err(&failed)?;
        let guesses = finder.stream(&found.infos, &found.sources, &work);
        found.guesses = guesses.map_err(&failed)?;
        Ok(found)
    }
}

fn io<'a>(action: &'static str, path: &'a Path) -> impl Fn(std::io::Error) -> QemuError + use<'a> {
    move |source| QemuError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

fn refused(name: &str, why: &str) -> QemuError {
    QemuError::not_this(format!("the disk `{name}` {why}: nothing was done to it"))
}

/// The device of QEMU's list that has this name, by whichever of its names.
fn device<'a>(all: &'a Value, name: &str) -> Result<&'a Value, QemuError> {
    let Value::Array(devices) = all else {
        return Err(QemuError::Unknown {
            what: QUERY,
            found: shortened(&all.to_string()),
            expected: "a list",
        });
    };
    let is = |value: Option<&Value>| value.and_then(Value::as_str) == Some(name);
    let found = devices.iter().find(|device| {
        let node = device.get("inserted").and_then(|one| one.get("node-name"));
        // A qdev is told as a path where it has no name of its own.
        is(device.get("device")) || is(device.get("qdev")) || is(node)
    });
    found.ok_or_else(|| {
        let names = devices
            .iter()
            .filter_map(|device| device.get("device")?.as_str());
        let names: Vec<_> = names.filter(|name| !name.is_empty()).collect();
        QemuError::not_this(format!(
            "QEMU has no disk `{name}`: it has {} (`query-block`)",
            shortened(&names.join(", "))
        ))
    })
}

/// The image of a device that a guest writes to.
fn image_of(device: &Value, name: &str) -> Result<PathBuf, QemuError> {
    let inserted = device.get("inserted");
    let inserted = inserted.ok_or_else(|| refused(name, "has no medium"))?;
    if inserted.get("ro").and_then(Value::as_bool) != Some(false) {
        return Err(refused(name, "is read-only, and needs no overlay"));
    }
    let image = inserted
        .get("image")
        .and_then(|image| image.get("filename"));
    let image = image.and_then(Value::as_str).unwrap_or_default();
    let is_file = !image.is_empty() && !image.split('/').next().unwrap_or_default().contains(':');
    match is_file {
        true => Ok(PathBuf::from(image)),
        false => Err(refused(name, "has its image in no file")),
    }
}

/// Opens an image, which must be of the format that QEMU says.
fn open(path: &Path, raw: bool, name: &str) -> Result<DiskImage, QemuError> {
    let image = DiskImage::open(path)?;
    if image.is_raw() != raw {
        return Err(refused(
            name,
            "begins as an image of another format than QEMU has it",
        ));
    }
    Ok(image)
}

/// Something short that another path has not.
fn short_hash(path: &Path) -> String {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    path.hash(&mut hasher);
    format!("{:012x}", hasher.finish() >> 16)
}

#[cfg(test)]
mod tests {
    use super::{device, image_of};
    use serde_json::{Value, json};
    use std::path::Path;

    fn list() -> Value {
        let image = json!({"filename": "/images/root.img"});
        json!([
            {"device": "virtio0", "qdev": "/machine/peripheral-anon/device[1]/virtio-backend",
             "inserted": {"node-name": "#block123", "ro": false, "image": image, "drv": "raw"}},
            {"device": "", "qdev": "disk1",
             "inserted": {"node-name": "files", "ro": true, "image": image, "drv": "raw"}},
            {"device": "cd0"},
            {"device": "net", "inserted": {"ro": false, "image": {"filename": "nbd://localhost:1/x"}}},
            {"device": "strange", "inserted": {"ro": false}},
            {"device": "odd", "inserted": {"ro": 1, "image": image}},
        ])
    }

    #[test]
    fn a_disk_is_found_by_each_of_its_names() {
        let all = list();
        let found = device(&all, "virtio0").unwrap();
        assert_eq!(
            image_of(found, "virtio0").unwrap(),
            Path::new("/images/root.img")
        );
        for name in ["disk1", "files"] {
            assert_eq!(device(&all, name).unwrap()["qdev"], "disk1");
        }
        let error = device(&all, "vda").unwrap_err().to_string();
        assert!(
            error.contains("`vda`") && error.contains("virtio0, cd0"),
            "{error}"
        );
        assert!(
            device(&json!({}), "vda")
                .unwrap_err()
                .to_string()
                .contains("query-block")
        );
        // An empty name is none.
        for (name, words) in [
            ("disk1", "read-only"),
            ("cd0", "no medium"),
            ("net", "in no file"),
            ("strange", "in no file"),
            ("odd", "read-only"),
        ] {
            let error = image_of(device(&all, name).unwrap(), name).unwrap_err();
            assert!(error.to_string().contains(words), "{name}: {error}");
        }
    }
}
