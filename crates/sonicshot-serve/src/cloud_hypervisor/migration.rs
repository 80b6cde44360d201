//! The message to Cloud Hypervisor beside the guest's memory: its configuration and its state.
//!
//! Both are what it said itself to the peer of a `send-migration` with `local=on`, whole: the first
//! is `{"vm_config", "common_cpuid", "memory_manager_data"}` (`VmMigrationConfig` in
//! `vmm/src/lib.rs`; `common_cpuid` on x86-64 only), the second the tree of its components. Its own
//! `offload_daemon snapshot` writes them as `migration_config.json` and `state.json`, beside the
//! slots of memory, `memory-0` and so on. A snapshot of `vm.snapshot` (`file://`) has no
//! `common_cpuid`, which cannot be made up.

use crate::error::ServeError;
use serde::Deserialize;
use serde::de::IgnoredAny;
use sonicshot::{Gpa, GpaRange, RamLayout, to_u64};
use sonicshot_offline::CheckpointFile;
use std::collections::BTreeSet;
use std::io::Read;
use std::path::Path;

/// The names that the files have, and the blobs of a checkpoint.
pub(crate) const CONFIG_FILE: &str = "migration_config.json";
const STATE_FILE: &str = "state.json";
/// That of a snapshot that `vm.snapshot` wrote.
const PLAIN_CONFIG: &str = "config.json";
const CONFIG_BLOB: &str = "cloud-hypervisor-config";
const STATE_BLOB: &str = "cloud-hypervisor-state";

/// The longest configuration or state that is read: a hundred times one of today's.
const MAX_JSON: u64 = 64 << 20;
/// Slots that KVM has room for are more; a virtual machine with as many regions as a checkpoint
/// may have is served.
const MAX_SLOTS: usize = 4096;
const PAGE: u64 = 4096;
/// Huge pages whose size is not said (x86-64's, and arm64's with 4 KiB pages).
const DEFAULT_HUGE: u64 = 2 << 20;

/// A range of guest memory that Cloud Hypervisor maps from a file of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Slot {
    pub number: u32,
    pub guest: GpaRange,
    /// Its offset in the file.
    pub offset: u64,
    /// The size of its pages, if they are huge.
    pub huge: Option<u64>,
    /// Memory that comes and goes while the guest runs. None of it does when this begins.
    pub hotplug: bool,
}

/// Cloud Hypervisor's configuration and state, as its migration protocol carries them.
#[derive(Debug, Clone)]
pub struct Migration {
    pub(crate) config: Vec<u8>,
    pub(crate) state: Vec<u8>,
    pub(crate) slots: Vec<Slot>,
}

#[derive(Deserialize)]
struct Config {
    vm_config: VmConfig,
    common_cpuid: Option<IgnoredAny>,
    memory_manager_data: Manager,
}

#[derive(Deserialize)]
struct VmConfig {
    memory: Memory,
    #[serde(default)]
    disks: Option<Vec<Device>>,
    #[serde(default)]
    net: Option<Vec<Device>>,
    #[serde(default)]
    fs: Option<Vec<IgnoredAny>>,
    #[serde(default)]
    user_devices: Option<Vec<IgnoredAny>>,
    #[serde(default)]
    generic_vhost_user: Option<Vec<IgnoredAny>>,
}

#[derive(Deserialize)]
struct Device {
    #[serde(default)]
    vhost_user: bool,
}

/// All memory, where there are no zones, or one of them.
#[derive(Deserialize)]
struct Memory {
    #[serde(default)]
    id: String,
    #[serde(default)]
    prefault: bool,
    #[serde(default)]
    hugepages: bool,
    #[serde(default)]
    hugepage_size: Option<u64>,
    #[serde(default)]
    zones: Option<Vec<Memory>>,
}

#[derive(Deserialize)]
struct Manager {
    guest_ram_mappings: Vec<Mapping>,
}

#[derive(Deserialize)]
struct Mapping {
    slot: u32,
    gpa: u64,
    size: u64,
    zone_id: String,
    #[serde(default)]
    virtio_mem: bool,
    file_offset: u64,
}

impl Migration {
    /// Understands a configuration and takes a state as it is. `path` is for messages.
    ///
    /// # Errors
    /// [`ServeError::MigrationJson`] if one is not what Cloud Hypervisor writes,
    /// [`ServeError::MigrationSlot`] if its memory cannot be, [`ServeError::NoMigration`] if it
    /// cannot be served so.
    pub fn new(config: Vec<u8>, state: Vec<u8>, path: &Path) -> Result<Self, ServeError> {
        let json = |what| move |source| ServeError::MigrationJson { what, source };
        let parsed: Config = serde_json::from_slice(&config).map_err(json("configuration"))?;
        serde_json::from_slice::<IgnoredAny>(&state).map_err(json("state"))?;
        let slots = parsed.slots()?;
        if let Some(why) = parsed.obstacle() {
            let path = path.to_owned();
            return Err(ServeError::NoMigration { path, why });
        }
        Ok(Self {
            config,
            state,
            slots,
        })
    }

    /// The migration that the snapshot at `path` has: a folder with `migration_config.json` and
    /// `state.json`, or a checkpoint with the blobs `cloud-hypervisor-config` and
    /// `cloud-hypervisor-state`.
    ///
    /// # Errors
    /// [`ServeError::NoMigration`] if it lacks them, and as [`new`](Self::new).
    pub fn open(path: &Path) -> Result<Self, ServeError> {
        let lacks = |why| ServeError::NoMigration {
            path: path.to_owned(),
            why,
        };
        if path.is_dir() {
            if !path.join(CONFIG_FILE).is_file() {
                return Err(lacks(match path.join(PLAIN_CONFIG).is_file() {
                    true => {
                        "it is a snapshot that `vm.snapshot` wrote, which has neither \
                         `common_cpuid` nor a list of its slots; take one by a `send-migration` with \
                         `local=on` (docs/serve.md)"
                    }
                    false => "it has no migration_config.json (docs/serve.md)",
                }));
            }
            let config = read(&path.join(CONFIG_FILE))?;
            return Self::new(config, read(&path.join(STATE_FILE))?, path);
        }
        if !CheckpointFile::is_at(path)? {
            return Err(lacks(
                "it is memory alone: save it as a checkpoint, with what Cloud Hypervisor said by a \
                 `send-migration` as --blob cloud-hypervisor-config=FILE and \
                 cloud-hypervisor-state=FILE",
            ));
        }
        let reader = CheckpointFile::open(path)?.into_reader();
        let blob = |name| {
            let found = reader.blobs().find(|(found, _)| *found == name);
            let (_, len) = found.ok_or_else(|| {
                lacks(
                    "it lacks the blob cloud-hypervisor-config or cloud-hypervisor-state \
                     (`sonicshot save --blob`)",
                )
            })?;
            if len > MAX_JSON {
                return Err(lacks(TOO_LONG));
            }
            Ok(reader.read_blob(name)?)
        };
        Self::new(blob(CONFIG_BLOB)?, blob(STATE_BLOB)?, path)
    }

    /// The guest memory of each slot that is served: all of the snapshot's, and all of the slot.
    pub(crate) fn parts(&self, layout: &RamLayout) -> Result<Vec<(Slot, GpaRange)>, ServeError> {
        let mut out = Vec::new();
        for slot in &self.slots {
            let parts = layout.regions().iter();
            let parts = parts.map(|region| region.intersection(&slot.guest));
            let parts: Vec<_> = parts.filter(|part| !part.is_empty()).collect();
            let covered = GpaRange::total_of(&parts);
            let expected = if slot.hotplug { 0 } else { slot.guest.len() };
            if covered != expected {
                return Err(match slot.hotplug {
                    true => ServeError::MigrationSlot {
                        what: "the memory that the guest has plugged in, of which Cloud Hypervisor \
                               asks for none, of slot",
                        slot: slot.number,
                        value: covered,
                    },
                    false => ServeError::NotInLayout {
                        what: "address",
                        at: slot.guest.start().raw(),
                        len: slot.guest.len(),
                    },
                });
            }
            out.extend(parts.into_iter().map(|part| (*slot, part)));
        }
        for region in layout.regions() {
            let mut at = region.start();
            while at < region.end() {
                let part = out.iter().find(|(_, part)| part.contains(at));
                let (_, part) = part.ok_or(ServeError::NotInSlot { at })?;
                at = part.end();
            }
        }
        Ok(out)
    }
}

const TOO_LONG: &str = "its configuration or state has more than 64 MiB";

/// A file of JSON.
fn read(path: &Path) -> Result<Vec<u8>, ServeError> {
    let file = sonicshot::open_file(path).map_err(ServeError::io("opening", path))?;
    let mut out = Vec::new();
    const TOO_MUCH: u64 = MAX_JSON + 1;
    file.take(TOO_MUCH)
        .read_to_end(&mut out)
        .map_err(ServeError::io("reading", path))?;
    if to_u64(out.len()) > MAX_JSON {
        let path = path.to_owned();
        return Err(ServeError::NoMigration {
            path,
            why: TOO_LONG,
        });
    }
    Ok(out)
}

/// The slots of a configuration alone, of a folder at `path`.
pub(crate) fn slots_of(path: &Path) -> Result<Vec<Slot>, ServeError> {
    let json = |source| ServeError::MigrationJson {
        what: "configuration",
        source,
    };
    let config = read(&path.join(CONFIG_FILE))?;
    let config: Config = serde_json::from_slice(&config).map_err(json)?;
    config.slots()
}

impl Config {
    /// The reason why this cannot be restored page by page, if it cannot.
    fn obstacle(&self) -> Option<&'static str> {
        let vm = &self.vm_config;
        let mut zones = vm.memory.zones.iter().flatten();
        let some = |list: &Option<Vec<IgnoredAny>>| list.iter().any(|list| !list.is_empty());
        let device = |list: &Option<Vec<Device>>| list.iter().flatten().any(|d| d.vhost_user);
        let shared = [&vm.fs, &vm.user_devices, &vm.generic_vhost_user];
        if cfg!(target_arch = "x86_64") && self.common_cpuid.is_none() {
            Some("its configuration has no `common_cpuid`, which only a `send-migration` gives")
        } else if vm.memory.prefault || zones.any(|zone| zone.prefault) {
            Some("its memory has `prefault` on: Cloud Hypervisor would touch it before it asks")
        } else if shared.into_iter().any(some) || device(&vm.disks) || device(&vm.net) {
            Some(
                "it has a device in another process (vhost-user, vfio-user, virtio-fs), which would \
                 read memory that has not come yet as zeroes",
            )
        } else {
            None
        }
    }

    fn slots(&self) -> Result<Vec<Slot>, ServeError> {
        let mappings = &self.memory_manager_data.guest_ram_mappings;
        let found = mappings.len();
        if found == 0 || found > MAX_SLOTS {
            let max = MAX_SLOTS;
            return Err(ServeError::Regions { found, max });
        }
        let mut seen = BTreeSet::new();
        let mut slots = Vec::with_capacity(found);
        for mapping in mappings {
            let slot = mapping.slot;
            let wrong = |what, value| ServeError::MigrationSlot { what, slot, value };
            if !seen.insert(slot) {
                return Err(wrong("a slot that is there twice, number", u64::from(slot)));
            }
            slots.push(self.slot(mapping)?);
        }
        let mut ranges: Vec<_> = slots.iter().map(|slot| (slot.guest, slot.number)).collect();
        ranges.sort_unstable();
        for ((below, _), (above, slot)) in ranges.iter().zip(ranges.iter().skip(1)) {
            if above.start() < below.end() {
                return Err(ServeError::MigrationSlot {
                    what: "the address, in another slot, of slot",
                    slot: *slot,
                    value: above.start().raw(),
                });
            }
        }
        Ok(slots)
    }

    fn slot(&self, mapping: &Mapping) -> Result<Slot, ServeError> {
        let number = mapping.slot;
        let wrong = |what, value| ServeError::MigrationSlot {
            what,
            slot: number,
            value,
        };
        let memory = &self.vm_config.memory;
        let mut zones = memory.zones.iter().flatten();
        let zone = zones.find(|zone| zone.id == mapping.zone_id);
        let zone = zone.unwrap_or(memory);
        let huge = zone.hugepage_size.unwrap_or(DEFAULT_HUGE);
        let huge = zone.hugepages.then_some(huge);
        let page = huge.unwrap_or(PAGE);
        if !page.is_power_of_two() || page < PAGE {
            return Err(wrong("the page size of slot", page));
        }
        if !mapping.gpa.is_multiple_of(PAGE) {
            return Err(wrong("the address of slot", mapping.gpa));
        }
        let whole = |value: u64| value.is_multiple_of(page);
        let guest = GpaRange::with_len(Gpa::new(mapping.gpa), mapping.size);
        let guest = guest.filter(|guest| !guest.is_empty() && whole(mapping.size));
        let guest = guest.ok_or_else(|| wrong("the length of slot", mapping.size))?;
        let end = mapping.file_offset.checked_add(mapping.size);
        if !whole(mapping.file_offset) || end.is_none_or(|end| i64::try_from(end).is_err()) {
            return Err(wrong("the offset in its file of slot", mapping.file_offset));
        }
        Ok(Slot {
            number,
            guest,
            offset: mapping.file_offset,
            huge,
            hotplug: mapping.virtio_mem,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::fs::File;

    const GIB: u64 = 1 << 30;

    fn mapping(slot: u32, gpa: u64, size: u64, offset: u64) -> Value {
        json!({"slot": slot, "gpa": gpa, "size": size, "zone_id": "mem0", "virtio_mem": false,
               "file_offset": offset})
    }

    fn config() -> Value {
        json!({
            "vm_config": {"memory": {"size": 4 * GIB, "shared": true}, "disks": [{"path": "/d"}],
                          "net": null, "fs": null},
            "common_cpuid": [],
            "memory_manager_data": {"guest_ram_mappings": [
                mapping(0, 0, 3 * GIB, 0), mapping(1, 4 * GIB, GIB, 3 * GIB)]},
        })
    }

    fn open(config: &Value) -> Result<Migration, ServeError> {
        Migration::new(
            config.to_string().into_bytes(),
            b"{}".to_vec(),
            Path::new("x"),
        )
    }

    fn layout(ranges: &[(u64, u64)]) -> RamLayout {
        let range = |&(start, len)| GpaRange::with_len(Gpa::new(start), len).unwrap();
        RamLayout::new(ranges.iter().map(range).collect()).unwrap()
    }

    #[test]
    fn the_slots_of_a_configuration() {
        let migration = open(&config()).unwrap();
        let range = |start, len| GpaRange::with_len(Gpa::new(start), len).unwrap();
        let slot = |number, guest, offset| Slot {
            number,
            guest,
            offset,
            huge: None,
            hotplug: false,
        };
        let expected = [
            slot(0, range(0, 3 * GIB), 0),
            slot(1, range(4 * GIB, GIB), 3 * GIB),
        ];
        assert_eq!(migration.slots, expected);
        let both = layout(&[(0, 3 * GIB), (4 * GIB, GIB)]);
        let parts = migration.parts(&both).unwrap();
        assert_eq!(parts, expected.map(|slot| (slot, slot.guest)));
        let mut huge = config();
        huge["vm_config"]["memory"] = json!({"zones": [
            {"id": "mem0", "hugepages": true}, {"id": "a", "hugepages": true, "hugepage_size": 1 << 24}]});
        huge["memory_manager_data"]["guest_ram_mappings"][1]["zone_id"] = "a".into();
        let sizes: Vec<_> = open(&huge).unwrap().slots.iter().map(|s| s.huge).collect();
        assert_eq!(sizes, [Some(2 << 20), Some(1 << 24)]);
    }

    #[test]
    fn memory_of_another_guest_is_refused() {
        let migration = open(&config()).unwrap();
        for (ranges, words) in [
            (vec![(0, 3 * GIB)], "0x100000000"),
            (
                vec![(0, 2 * GIB), (4 * GIB, GIB)],
                "not in the snapshot's memory",
            ),
            (vec![(0, 3 * GIB), (4 * GIB, 2 * GIB)], "in no slot"),
            (
                vec![(0, 3 * GIB), (4 * GIB, GIB), (9 * GIB, GIB)],
                "in no slot",
            ),
        ] {
            let error = migration.parts(&layout(&ranges)).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
        // What may be plugged in later has nothing yet.
        let mut plug = config();
        plug["memory_manager_data"]["guest_ram_mappings"][1]["virtio_mem"] = true.into();
        let migration = open(&plug).unwrap();
        assert_eq!(migration.parts(&layout(&[(0, 3 * GIB)])).unwrap().len(), 1);
        let error = migration.parts(&layout(&[(0, 3 * GIB), (4 * GIB, GIB)]));
        let error = error.unwrap_err().to_string();
        assert!(error.contains("plugged in"), "{error}");
    }

    #[test]
    fn what_cannot_be_restored_page_by_page_is_refused() {
        type Change = fn(&mut Value);
        let changes: [(Change, &str); 15] = [
            (
                |c| drop(c.as_object_mut().unwrap().remove("common_cpuid")),
                "common_cpuid",
            ),
            (
                |c| c["vm_config"]["memory"]["prefault"] = true.into(),
                "prefault",
            ),
            (
                |c| c["vm_config"]["memory"]["zones"] = json!([{"id": "z", "prefault": true}]),
                "prefault",
            ),
            (
                |c| c["vm_config"]["disks"][0]["vhost_user"] = true.into(),
                "vhost-user",
            ),
            (
                |c| c["vm_config"]["net"] = json!([{"vhost_user": true}]),
                "vhost-user",
            ),
            (
                |c| c["vm_config"]["fs"] = json!([{"tag": "x"}]),
                "virtio-fs",
            ),
            (
                |c| c["vm_config"]["user_devices"] = json!([{}]),
                "vfio-user",
            ),
            (
                |c| c["vm_config"]["generic_vhost_user"] = json!([{}]),
                "vhost-user",
            ),
            (
                |c| c["memory_manager_data"]["guest_ram_mappings"] = json!([]),
                "0 regions",
            ),
            (|c| c["memory_manager_data"] = json!({}), "cannot be read"),
            (
                |c| c["memory_manager_data"]["guest_ram_mappings"][1]["slot"] = 0.into(),
                "twice",
            ),
            (
                |c| c["memory_manager_data"]["guest_ram_mappings"][1]["gpa"] = 4096.into(),
                "in another slot",
            ),
            (
                |c| c["memory_manager_data"]["guest_ram_mappings"][1]["gpa"] = 5.into(),
                "the address of slot 1 is 0x5",
            ),
            (
                |c| c["memory_manager_data"]["guest_ram_mappings"][0]["size"] = u64::MAX.into(),
                "slot 0 is 0xffff",
            ),
            (
                |c| {
                    c["memory_manager_data"]["guest_ram_mappings"][0]["file_offset"] =
                        0x7fff_ffff_ffff_f000_u64.into();
                },
                "offset in its file",
            ),
        ];
        for (change, words) in changes {
            let mut config = config();
            change(&mut config);
            match open(&config) {
                Ok(_) if words == "common_cpuid" && !cfg!(target_arch = "x86_64") => {}
                Ok(_) => panic!("{words} was not refused"),
                Err(error) => assert!(error.to_string().contains(words), "{words}: {error}"),
            }
        }
        let error = Migration::new(config().to_string().into(), b"{".to_vec(), Path::new("x"));
        assert!(error.unwrap_err().to_string().contains("state"));
    }

    #[test]
    fn a_folder_says_what_it_lacks() {
        let folder = tempfile::tempdir().unwrap();
        let open = || Migration::open(folder.path()).unwrap_err().to_string();
        assert!(open().contains("no migration_config.json"), "{}", open());
        let write =
            |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        write(PLAIN_CONFIG, "{}");
        write(STATE_FILE, "{}");
        assert!(open().contains("`vm.snapshot` wrote"), "{}", open());
        write(CONFIG_FILE, &config().to_string());
        assert_eq!(Migration::open(folder.path()).unwrap().slots.len(), 2);
        let raw = folder.path().join("raw");
        std::fs::write(&raw, [7; 8192]).unwrap();
        let error = Migration::open(&raw).unwrap_err().to_string();
        assert!(error.contains("memory alone"), "{error}");
        let long = File::create(folder.path().join(STATE_FILE)).unwrap();
        long.set_len(MAX_JSON + 1).unwrap();
        assert!(open().contains("more than 64 MiB"), "{}", open());
    }
}
