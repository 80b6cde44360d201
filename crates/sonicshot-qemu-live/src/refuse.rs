//! Guests that are not saved, in words.

use crate::error::QemuError;
use crate::qmp::{QemuVersion, Qmp, shortened};
use serde_json::{Value, json};

/// Whether the guest runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Running {
    Yes,
    /// Somebody has paused it.
    Paused,
}

/// The guest's state; one that starts, ends or failed is refused.
pub(crate) fn running(qmp: &mut Qmp) -> Result<Running, QemuError> {
    let answer = qmp.run("query-status", Value::Null)?;
    match answer.get("status").and_then(Value::as_str) {
        Some("running") => Ok(Running::Yes),
        Some("paused") => Ok(Running::Paused),
        Some(other) => Err(QemuError::not_this(format!(
            "the guest is `{}`: only one that runs or is paused is saved",
            shortened(other)
        ))),
        None => Err(QemuError::Unknown {
            what: "query-status",
            found: shortened(&answer.to_string()),
            expected: "status",
        }),
    }
}

/// Refuses a guest whose state is not all in its memory and what QEMU writes of its devices.
pub(crate) fn check(qmp: &mut Qmp) -> Result<(), QemuError> {
    migration(qmp)?;
    encryption(qmp)?;
    plugged(qmp)?;
    // What a device of a host's card has in it nobody here can save.
    match device(qmp, &["vfio-", "vfio,"])? {
        Some(device) => Err(QemuError::not_this(format!(
            "the guest has a device of the host (`{}`), whose state is not in what QEMU writes here",
            shortened(&device)
        ))),
        None => Ok(()),
    }
}

/// A device of which `info qtree` has the kind beginning so, and its name there.
fn device(qmp: &mut Qmp, kinds: &[&str]) -> Result<Option<String>, QemuError> {
    let tree = qmp.human("info qtree")?;
    let mut all = tree
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix("dev: "));
    let found = all.find(|device| kinds.iter().any(|kind| device.starts_with(kind)));
    Ok(found.map(str::to_owned))
}

/// Refuses a guest that could punch holes into a file that QEMU has open for writing, by whatever
/// way its devices came there. It has not run yet.
pub(crate) fn punching(qmp: &mut Qmp) -> Result<(), QemuError> {
    match device(qmp, PUNCHING)? {
        None => Ok(()),
        Some(device) => Err(would_punch(qmp.version(), &device)),
    }
}

/// Devices whose discards are punched out of the file that a guest's RAM is, under all who have it.
const PUNCHING: &[&str] = &["virtio-balloon", "virtio-mem"];

/// The refusal of a device that would.
pub(crate) fn would_punch(version: QemuVersion, device: &str) -> QemuError {
    QemuError::not_this(format!(
        "QEMU {version} opens a mapped file for writing, and a guest with `{}` would punch holes into \
         it: give each guest a file of its own, leave the device out, restore with --eager, or take \
         QEMU 8.2 or later",
        shortened(device)
    ))
}

fn migration(qmp: &mut Qmp) -> Result<(), QemuError> {
    let answer = qmp.run("query-migrate", Value::Null)?;
    if let Some(Value::Array(reasons)) = answer.get("blocked-reasons")
        && !reasons.is_empty()
    {
        let reasons: Vec<_> = reasons.iter().filter_map(Value::as_str).collect();
        return Err(QemuError::not_this(format!(
            "QEMU says that this guest cannot be migrated, and so not be saved: {}",
            shortened(&reasons.join("; "))
        )));
    }
    match answer.get("status").and_then(Value::as_str) {
        None | Some("none" | "completed" | "failed" | "cancelled") => Ok(()),
        Some(other) => Err(QemuError::not_this(format!(
            "a migration of the guest is under way (`{}`)",
            shortened(other)
        ))),
    }
}

fn encryption(qmp: &mut Qmp) -> Result<(), QemuError> {
    let property = json!({"path": "/machine", "property": "confidential-guest-support"});
    match qmp.run("qom-get", property) {
        // A QEMU or a machine that has no such thing.
        Err(QemuError::Refused { .. }) => Ok(()),
        Err(error) => Err(error),
        Ok(Value::String(none)) if none.is_empty() => Ok(()),
        Ok(found) => Err(QemuError::not_this(format!(
            "the guest's memory is encrypted or not the host's to read (`{}`)",
            shortened(&found.to_string())
        ))),
    }
}

fn plugged(qmp: &mut Qmp) -> Result<(), QemuError> {
    let answer = qmp.run("query-memory-devices", Value::Null)?;
    match answer {
        Value::Array(devices) if devices.is_empty() => Ok(()),
        Value::Array(devices) => {
            let kinds = devices.iter().filter_map(|one| one.get("type")?.as_str());
            let kinds: Vec<_> = kinds.collect();
            Err(QemuError::not_this(format!(
                "the guest has memory that is a device ({}), which is not saved while it runs: take it \
                 out, or have QEMU itself save the guest (`migrate` to a file, mapped-ram or not), and \
                 prune that file",
                shortened(&kinds.join(", "))
            )))
        }
        other => Err(QemuError::Unknown {
            what: "query-memory-devices",
            found: shortened(&other.to_string()),
            expected: "a list",
        }),
    }
}
