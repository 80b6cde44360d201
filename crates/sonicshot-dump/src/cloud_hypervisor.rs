//! Cloud Hypervisor's snapshot folder: `config.json`, `state.json`, and guest RAM in
//! `memory-ranges` (`docs/snapshot_restore.md`; `vmm/src/memory_manager.rs`, from version 19 on).
//!
//! `memory-ranges` is the bytes of the ranges that the memory manager's state lists, end to end
//! in the order of the list. The list is made zone by zone out of a hash map, and what virtio-mem
//! has plugged comes first, so the ranges are in no order in the guest. A zone in a file of its
//! own that is shared is not in the list: its bytes are in that file, not in the snapshot.
//!
//! The state is a tree of components in JSON, and what each component has to say is packed once
//! more:
//!
//! | version | `snapshots` / `memory-manager` / `snapshot_data` |
//! |---|---|
//! | 39 and later | `{"state": "JSON as a string"}` |
//! | 29 to 38 | an array of bytes, which are no JSON: integers, little-endian, lists behind their length |
//! | 19 to 28 | the same array in `{"memory-manager-section": {"snapshot": [...]}}` |
//!
//! `memory_ranges` is the first member in each of them.
//!
//! # What a hole reads as
//!
//! Up to version 51 the file is read to its end into the guest's memory, so a hole is zero. From
//! 52 on only what `SEEK_DATA` finds is read into memory that is fresh, or a page at a time when
//! the guest touches it (`memory_restore_mode=ondemand`): zero again, with huge pages
//! (a fresh `memfd`) and `shared=on` too. One case is not fresh: a zone with `file=` that is not
//! shared is a private mapping of that file, and where `memory-ranges` has a hole the guest then
//! has what the file has. Such a snapshot is not pruned.

use crate::DumpError;
use crate::layout::LayoutSpec;
use serde::Deserialize;
use serde::de::{self, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use sonicshot::{Gpa, GpaRange};
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// The names that Cloud Hypervisor gives its files.
pub(crate) const MEMORY: &str = "memory-ranges";
pub(crate) const STATE: &str = "state.json";
pub(crate) const CONFIG: &str = "config.json";

/// Longest state that is read: a hundred times one of today's, for versions that write each byte
/// as a number.
const MAX_STATE: u64 = 64 << 20;
/// A VM that plugged memory in and out without end has fewer ranges.
const MAX_RANGES: usize = 1 << 16;
const PAGE: u64 = 4096;

/// The state, as far as it is of use here. What else is in it is passed over, not kept.
#[derive(Deserialize)]
struct Root {
    snapshots: Components,
}

#[derive(Deserialize)]
struct Components {
    #[serde(rename = "memory-manager")]
    memory_manager: Component,
}

#[derive(Deserialize)]
struct Component {
    snapshot_data: Data,
}

#[derive(Deserialize)]
struct Table {
    data: Vec<Range>,
}

#[derive(Deserialize, Clone, Copy)]
struct Range {
    gpa: u64,
    length: u64,
}

/// What a component has to say, however it is packed.
enum Data {
    Ranges(Vec<Range>),
    Text(String),
    Bytes(Vec<u8>),
}

impl<'de> Deserialize<'de> for Data {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // How deep it nests is bounded by serde_json.
        deserializer.deserialize_any(DataVisitor)
    }
}

struct DataVisitor;

impl<'de> Visitor<'de> for DataVisitor {
    type Value = Data;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the memory manager's state")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Data, E> {
        Ok(Data::Text(text.into()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Data, A::Error> {
        let mut bytes = Vec::new();
        while let Some(byte) = seq.next_element()? {
            bytes.push(byte);
        }
        Ok(Data::Bytes(bytes))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Data, A::Error> {
        let mut found = None;
        while let Some(key) = map.next_key::<String>()? {
            let data = match key.as_str() {
                "state" | "snapshot" | "memory-manager-section" => map.next_value()?,
                "memory_ranges" => Data::Ranges(map.next_value::<Table>()?.data),
                _ => {
                    map.next_value::<IgnoredAny>()?;
                    continue;
                }
            };
            if found.replace(data).is_some() {
                return Err(de::Error::custom("memory ranges are listed twice"));
            }
        }
        found.ok_or_else(|| de::Error::custom("no memory ranges are listed"))
    }
}

/// The list of ranges, in the order of the file.
fn ranges_of(state: &[u8]) -> Result<Vec<Range>, serde_json::Error> {
    let root: Root = serde_json::from_slice(state)?;
    let text: Vec<u8> = match root.snapshots.memory_manager.snapshot_data {
        Data::Ranges(ranges) => return Ok(ranges),
        Data::Text(text) => text.into_bytes(),
        Data::Bytes(bytes) if !bytes.starts_with(b"{\"") => return packed(&bytes),
        Data::Bytes(bytes) => bytes,
    };
    match serde_json::from_slice(&text)? {
        Data::Ranges(ranges) => Ok(ranges),
        _ => Err(de::Error::custom("no memory ranges are listed")),
    }
}

/// The list at the start of a state of versions 19 to 38: how many, then each one's address and
/// length.
fn packed(bytes: &[u8]) -> Result<Vec<Range>, serde_json::Error> {
    let short = || de::Error::custom("the packed list of memory ranges is cut short");
    let (words, _) = bytes.as_chunks::<8>();
    let (count, words) = words.split_first().ok_or_else(short)?;
    let (pairs, _) = words.as_chunks::<2>();
    let count = usize::try_from(u64::from_le_bytes(*count)).unwrap_or(usize::MAX);
    let pairs = pairs.get(..count).ok_or_else(short)?;
    let range = |[gpa, length]: &[[u8; 8]; 2]| Range {
        gpa: u64::from_le_bytes(*gpa),
        length: u64::from_le_bytes(*length),
    };
    Ok(pairs.iter().map(range).collect())
}

/// Where the bytes of a `memory-ranges` file of `len` bytes lie in the guest, by the state at
/// `path`.
pub(crate) fn layout(path: &Path, len: u64) -> Result<LayoutSpec, DumpError> {
    let state = read_json(path)?;
    let ranges = ranges_of(&state).map_err(json_error(path))?;
    let malformed = |what, index: usize, value| DumpError::Malformed {
        path: path.to_owned(),
        what,
        offset: index as u64,
        value,
    };
    if ranges.len() > MAX_RANGES {
        return Err(malformed(
            "the number of memory ranges",
            0,
            ranges.len() as u64,
        ));
    }
    let mut layout = Vec::with_capacity(ranges.len());
    for (index, Range { gpa, length }) in ranges.iter().copied().enumerate() {
        if !gpa.is_multiple_of(PAGE) {
            return Err(malformed(
                "the address of a memory range (by number)",
                index,
                gpa,
            ));
        }
        let range = GpaRange::with_len(Gpa::new(gpa), length);
        let Some(range) = range.filter(|_| length.is_multiple_of(PAGE) && length > 0) else {
            return Err(malformed(
                "the length of a memory range (by number)",
                index,
                length,
            ));
        };
        layout.push(range);
    }
    let mut sorted: Vec<(usize, GpaRange)> = layout.iter().copied().enumerate().collect();
    sorted.sort_unstable_by_key(|(_, range)| *range);
    for [(_, below), (index, above)] in sorted.array_windows() {
        if above.start() < below.end() {
            let at = above.start().raw();
            return Err(malformed(
                "a memory range (by number) in another",
                *index,
                at,
            ));
        }
    }
    let described = layout
        .iter()
        .fold(0_u64, |sum, range| sum.saturating_add(range.len()));
    let layout = LayoutSpec::Ranges(layout);
    if described != len {
        return Err(DumpError::LayoutLength {
            path: path.with_file_name(MEMORY),
            layout: format!("in {STATE}"),
            described,
            actual: len,
        });
    }
    Ok(layout)
}

#[derive(Deserialize)]
struct Config {
    memory: Option<Memory>,
}

#[derive(Deserialize)]
struct Memory {
    zones: Option<Vec<Zone>>,
}

#[derive(Deserialize)]
struct Zone {
    file: Option<String>,
    #[serde(default)]
    shared: bool,
}

/// Whether, by the configuration at `path`, some of the guest's memory is a private mapping of a
/// file: it does not begin as zero then.
pub(crate) fn has_private_file(path: &Path) -> Result<bool, DumpError> {
    let config: Config = serde_json::from_slice(&read_json(path)?).map_err(json_error(path))?;
    let zones = config.memory.and_then(|memory| memory.zones);
    let private = |zone: &Zone| zone.file.is_some() && !zone.shared;
    Ok(zones.is_some_and(|zones| zones.iter().any(private)))
}

fn read_json(path: &Path) -> Result<Vec<u8>, DumpError> {
    let reading = || DumpError::io("reading", path);
    let file = File::open(path).map_err(reading())?;
    let mut bytes = Vec::new();
    let read = file
        .take(MAX_STATE.saturating_add(1))
        .read_to_end(&mut bytes);
    if read.map_err(reading())? as u64 > MAX_STATE {
        return Err(DumpError::malformed(
            path,
            "a state of this length",
            0,
            MAX_STATE,
        ));
    }
    Ok(bytes)
}

fn json_error(path: &Path) -> impl Fn(serde_json::Error) -> DumpError {
    move |source| DumpError::Json {
        path: path.to_owned(),
        source: source.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    /// The state as a version of Cloud Hypervisor packs it.
    fn state(version: u32, ranges: &[(u64, u64)]) -> Value {
        let table: Vec<_> = ranges
            .iter()
            .map(|(gpa, length)| json!({"gpa": gpa, "length": length}))
            .collect();
        let state = json!({"memory_ranges": {"data": table}, "boot_ram": 1, "hotplug_slots": []});
        let mut packed = (ranges.len() as u64).to_le_bytes().to_vec();
        for (gpa, length) in ranges {
            packed.extend(gpa.to_le_bytes());
            packed.extend(length.to_le_bytes());
        }
        packed.extend([7; 24]);
        let data = match version {
            39.. => json!({"state": state.to_string()}),
            29.. => json!(packed),
            19.. => {
                json!({"memory-manager-section": {"id": "memory-manager-section", "snapshot": packed}})
            }
            // Not seen, but no harm.
            1 => json!(state.to_string().into_bytes()),
            _ => json!({"state": state}),
        };
        json!({
            "snapshots": {
                "cpu-manager": {"snapshots": {"0": {"snapshots": {}, "snapshot_data": {"state": "{}"}}}},
                "memory-manager": {"snapshots": {}, "snapshot_data": data},
            },
            "snapshot_data": {"state": "{\"memory_ranges\":3}"},
        })
    }

    fn read(state: &[u8], len: u64) -> Result<Vec<(u64, u64)>, DumpError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(STATE);
        std::fs::write(&path, state).unwrap();
        match layout(&path, len)? {
            LayoutSpec::Ranges(ranges) => Ok(ranges
                .iter()
                .map(|range| (range.start().raw(), range.len()))
                .collect()),
            other => panic!("{other}"),
        }
    }

    const GIB: u64 = 1 << 30;

    #[test]
    fn every_version_packs_the_same_list() {
        let ranges = [(4 * GIB, GIB), (0, 3 * GIB)];
        for version in [53, 39, 38, 29, 28, 19, 1, 0] {
            let state = state(version, &ranges).to_string();
            let read = read(state.as_bytes(), 4 * GIB).unwrap();
            assert_eq!(read, ranges, "{version}");
        }
    }

    #[test]
    fn ranges_that_cannot_be_are_refused() {
        type Case<'a> = (&'a [(u64, u64)], u64, &'a str);
        let table: [Case<'_>; 8] = [
            (&[(0, GIB), (GIB - 4096, GIB)], 2 * GIB, "in another"),
            (&[(0, GIB), (0, GIB)], 2 * GIB, "in another"),
            (&[(1, GIB)], GIB, "the address"),
            (&[(0, GIB + 1)], GIB + 1, "the length"),
            (&[(0, 0)], 0, "the length"),
            (&[(u64::MAX - 4095, 8192)], 8192, "the length"),
            (&[(0, GIB)], GIB + 4096, "describes"),
            (&[(0, 1 << 63), (1 << 63, 1 << 62)], 4096, "describes"),
        ];
        for (ranges, len, word) in table {
            for version in [53, 38] {
                let state = state(version, ranges).to_string();
                let error = read(state.as_bytes(), len).unwrap_err().to_string();
                assert!(error.contains(word), "{ranges:?}: {error}");
            }
        }
    }

    #[test]
    fn what_is_no_state_is_refused() {
        let deep = format!("{}{}", "{\"snapshots\":".repeat(5000), "}".repeat(5000));
        let wrapped = |data: &str| {
            format!(r#"{{"snapshots":{{"memory-manager":{{"snapshot_data":{data}}}}}}}"#)
        };
        let nested = wrapped(&format!(
            "{}{}",
            "{\"state\":".repeat(5000),
            "}".repeat(5000)
        ));
        for text in [
            "",
            "{}",
            "[]",
            "null",
            &deep,
            &nested,
            &wrapped("null"),
            &wrapped("{}"),
            &wrapped("[]"),
            &wrapped("[256]"),
            &wrapped("[255,255,255,255,255,255,255,255]"),
            &wrapped(r#"{"state":"{}"}"#),
            &wrapped(r#"{"state":"\"\""}"#),
            &wrapped(r#"{"memory_ranges":{"data":[]},"state":{"memory_ranges":{"data":[]}}}"#),
            &wrapped(r#"{"memory_ranges":{"data":[{"gpa":-1,"length":4096}]}}"#),
        ] {
            let error = read(text.as_bytes(), 4096).unwrap_err();
            assert!(
                matches!(error, DumpError::Json { .. }),
                "{text:.80}: {error:?}"
            );
        }
    }

    #[test]
    fn only_a_private_file_is_not_fresh() {
        let table = [
            (r#"{"memory":{"size":1,"zones":null}}"#, Some(false)),
            (r#"{"memory":{"zones":[{"id":"a"}]}}"#, Some(false)),
            (
                r#"{"memory":{"zones":[{"file":null,"shared":false}]}}"#,
                Some(false),
            ),
            (
                r#"{"memory":{"zones":[{"file":"/f","shared":true}]}}"#,
                Some(false),
            ),
            (
                r#"{"memory":{"zones":[{},{"file":"/f","shared":false}]}}"#,
                Some(true),
            ),
            (r#"{"memory":{"zones":[{"file":"/f"}]}}"#, Some(true)),
            ("{}", Some(false)),
            ("[", None),
        ];
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(CONFIG);
        for (text, want) in table {
            std::fs::write(&path, text).unwrap();
            assert_eq!(has_private_file(&path).ok(), want, "{text}");
        }
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            ".{0,12}".prop_map(Value::from),
            Just(json!(
                "{\"memory_ranges\":{\"data\":[{\"gpa\":0,\"length\":4096}]}}"
            )),
        ];
        let key = prop_oneof![
            Just("snapshots"),
            Just("memory-manager"),
            Just("snapshot_data"),
            Just("state"),
            Just("snapshot"),
            Just("memory-manager-section"),
            Just("memory_ranges"),
            Just("data"),
            Just("gpa"),
            Just("length"),
            Just("other"),
        ];
        leaf.prop_recursive(8, 64, 6, move |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                proptest::collection::btree_map(key.clone().prop_map(String::from), inner, 0..6)
                    .prop_map(|map| map.into_iter().collect()),
            ]
        })
    }

    proptest! {
        #[test]
        fn any_ranges_read_back_or_are_refused(
            pages in proptest::collection::vec((0_u64..64, 0_u64..16), 0..8), version in 0_u32..60,
        ) {
            let ranges: Vec<_> = pages.iter().map(|(at, len)| (at * 4096, len * 4096)).collect();
            let len: u64 = ranges.iter().map(|(_, len)| len).sum();
            let mut taken = std::collections::HashSet::new();
            let sound = pages.iter().all(|(at, len)| {
                *len > 0 && (*at..at + len).all(|page| taken.insert(page))
            });
            let read = read(state(version, &ranges).to_string().as_bytes(), len);
            if sound {
                prop_assert_eq!(read.unwrap(), ranges);
            } else {
                prop_assert!(read.is_err());
            }
        }

        #[test]
        fn any_json_is_read_or_refused(value in any_json(), data in any_json(), wrap in any::<bool>()) {
            let value = if wrap {
                json!({"snapshots": {"memory-manager": {"snapshot_data": data}}})
            } else {
                value
            };
            if let Ok(ranges) = read(value.to_string().as_bytes(), 4096) {
                prop_assert_eq!(ranges.iter().map(|(_, len)| len).sum::<u64>(), 4096);
            }
        }
    }
}
