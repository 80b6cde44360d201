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
//! # The processors
//!
//! From version 39 on `cpu-manager` has a snapshot of each, by its number, with KVM's structures:
//! `regs`, `sregs`, `mp_state` and (52 and later) `nested_state`, each as the bytes that it is in
//! C. Earlier ones pack them by a format of their own, and on Hyper-V (`Mshv`) they are others:
//! both are not told.
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
use crate::format::kind::Kind;
use crate::layout::LayoutSpec;
use crate::processors::{SREGS_LEN, Sregs, nested, rip_and_flags, told};
use crate::snapshot::{FilesNote, Named, SnapshotFiles, Vmm};
use serde::Deserialize;
use serde::de::{self, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use sonicshot::{
    Bytes, Cursor, CutShort, FileOffset, Gpa, GpaRange, Processor, Processors, to_u64,
};
use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

/// The names that Cloud Hypervisor gives its files.
const MEMORY: &str = "memory-ranges";
const STATE: &str = "state.json";
const CONFIG: &str = "config.json";

impl Vmm {
    /// Cloud Hypervisor.
    pub const CLOUD_HYPERVISOR: Self = Self::named("Cloud Hypervisor");
}

/// The memory is raw RAM; the files beside it say where it lies.
pub(crate) const KIND: Kind = Kind {
    no_holes,
    ..Kind::by_name(snapshot)
};

/// A folder with all three files, or the memory with the state beside it.
fn snapshot(named: &Named<'_>) -> Result<Option<SnapshotFiles>, DumpError> {
    let memory = match named.folder() {
        Some(folder) if folder.join(STATE).is_file() && folder.join(CONFIG).is_file() => {
            folder.join(MEMORY)
        }
        None if is_memory(named.path()) => named.path().to_owned(),
        _ => return Ok(None),
    };
    if !memory.is_file() {
        return Err(DumpError::NotADump {
            path: named.path().to_owned(),
            why: "it is a Cloud Hypervisor snapshot without `memory-ranges`: all of its memory is \
                  in files elsewhere",
        });
    }
    let beside = [CONFIG, STATE].map(Path::new);
    let mut files = named.found(&memory, &beside, Vmm::CLOUD_HYPERVISOR);
    let len = fs::metadata(&memory)
        .map_err(DumpError::io("reading", &memory))?
        .len();
    let state = memory.with_file_name(STATE);
    // Read now, so that what is wrong with it is said before the work.
    no_holes(&memory)?;
    files.processors = processors(&state);
    let given = named.layout();
    match (layout(&state, len), given) {
        (Ok(layout), None) => files.layout = Some(layout),
        (Ok(layout), Some(given)) => {
            if given.ranges(len) != layout.ranges(len) {
                let state = STATE;
                files.notes.push(FilesNote::OtherLayout { state, layout });
            }
        }
        (Err(error), Some(_)) => {
            files.notes.push(FilesNote::NotUnderstood {
                state: STATE,
                why: error.to_string(),
            });
        }
        (Err(error), None) => return Err(error),
    }
    Ok(Some(files))
}

/// Whether `path` is a snapshot's memory by its name and what lies beside it.
fn is_memory(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name == MEMORY) && path.with_file_name(STATE).is_file()
}

/// Memory of which some is a private mapping of a file must not get holes.
fn no_holes(memory: &Path) -> Result<Option<&'static str>, DumpError> {
    let config = memory.with_file_name(CONFIG);
    if !is_memory(memory) || !config.is_file() || !has_private_file(&config)? {
        return Ok(None);
    }
    Ok(Some(
        "by its config.json some of the guest's memory is a private mapping of a file, and Cloud \
         Hypervisor leaves what that file holds where the snapshot has a hole",
    ))
}

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

/// The state of a component, however it is packed.
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
    let short = |_: CutShort| de::Error::custom("the packed list of memory ranges is cut short");
    let mut words = Cursor::new(bytes);
    let count = words.le::<u64>().map_err(short)?;
    let mut ranges = Vec::new();
    // Each takes bytes, so that this ends with them.
    for _ in 0..count {
        ranges.push(Range {
            gpa: words.le().map_err(short)?,
            length: words.le().map_err(short)?,
        });
    }
    Ok(ranges)
}

/// The layout in the guest of a `memory-ranges` file of `len` bytes, by the state at
/// `path`.
fn layout(path: &Path, len: u64) -> Result<LayoutSpec, DumpError> {
    let state = read_json(path)?;
    let ranges = ranges_of(&state).map_err(json_error(path))?;
    let malformed = |what, index: usize, value| DumpError::MalformedItem {
        path: path.to_owned(),
        what,
        number: to_u64(index),
        value,
    };
    if ranges.len() > MAX_RANGES {
        let what = "the number of memory ranges";
        return Err(DumpError::malformed(
            path,
            what,
            FileOffset::ZERO,
            to_u64(ranges.len()),
        ));
    }
    let mut layout = Vec::with_capacity(ranges.len());
    for (index, Range { gpa, length }) in ranges.iter().copied().enumerate() {
        if !gpa.is_multiple_of(PAGE) {
            return Err(malformed("invalid address of memory range", index, gpa));
        }
        let range = GpaRange::with_len(Gpa::new(gpa), length);
        let Some(range) = range.filter(|_| length.is_multiple_of(PAGE) && length > 0) else {
            return Err(malformed("invalid length of memory range", index, length));
        };
        layout.push(range);
    }
    let mut sorted: Vec<(usize, GpaRange)> = layout.iter().copied().enumerate().collect();
    sorted.sort_unstable_by_key(|(_, range)| *range);
    for ((_, below), (index, above)) in sorted.iter().zip(sorted.iter().skip(1)) {
        if above.start() < below.end() {
            let at = above.start().raw();
            return Err(malformed("a memory range in another, number", *index, at));
        }
    }
    let described = GpaRange::total_of(&layout);
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

/// The state once more, as far as it is of the processors.
#[derive(Deserialize)]
struct CpuRoot {
    snapshots: CpuComponents,
}

#[derive(Deserialize)]
struct CpuComponents {
    #[serde(rename = "cpu-manager")]
    cpu_manager: CpuManager,
}

#[derive(Deserialize)]
struct CpuManager {
    snapshots: BTreeMap<String, CpuComponent>,
}

#[derive(Deserialize)]
struct CpuComponent {
    snapshot_data: CpuData,
}

#[derive(Deserialize)]
struct CpuData {
    state: String,
}

/// A processor, as KVM has it; no other hypervisor's is known.
#[derive(Deserialize)]
enum CpuState {
    Kvm(KvmState),
}

#[derive(Deserialize)]
struct KvmState {
    regs: Structure,
    sregs: Structure,
    mp_state: Structure,
    #[serde(default)]
    nested_state: Option<Structure>,
}

/// The bytes of a C structure.
struct Structure(Vec<u8>);

/// The longest, `struct kvm_nested_state`, takes two pages and a header.
const MAX_STRUCTURE: usize = 16 << 10;

impl<'de> Deserialize<'de> for Structure {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(StructureVisitor)
    }
}

struct StructureVisitor;

impl<'de> Visitor<'de> for StructureVisitor {
    type Value = Structure;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the bytes of a structure")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Structure, A::Error> {
        let mut bytes = Vec::new();
        while let Some(byte) = seq.next_element()? {
            if bytes.len() >= MAX_STRUCTURE {
                return Err(de::Error::custom("a structure that is too long"));
            }
            bytes.push(byte);
        }
        Ok(Structure(bytes))
    }
}

/// The processors in the state at `path`.
fn processors(path: &Path) -> Processors {
    match read_json(path) {
        Ok(state) => told(processors_of(&state)),
        Err(_) => Processors::NotTold("its state cannot be read"),
    }
}

fn processors_of(state: &[u8]) -> Result<Vec<Processor>, &'static str> {
    let Ok(root) = serde_json::from_slice::<CpuRoot>(state) else {
        return Err("its state has no processors as version 39 and later write them");
    };
    let mut found = BTreeMap::new();
    for (number, component) in &root.snapshots.cpu_manager.snapshots {
        let Ok(number) = number.parse::<u32>() else {
            return Err("its state has a processor without a number");
        };
        let Ok(CpuState::Kvm(state)) = serde_json::from_str(&component.snapshot_data.state) else {
            return Err("its state has a processor of an unknown kind");
        };
        let (boot, processor) =
            processor_of(&state).ok_or("the state of a processor is not known")?;
        if found.insert(number, (boot, processor)).is_some() {
            return Err("its state has a processor twice");
        }
    }
    if found.values().filter(|(boot, _)| *boot).count() != 1 {
        return Err("its state has none or several boot processors");
    }
    Ok(found
        .into_values()
        .map(|(_, processor)| processor)
        .collect())
}

/// Whether it is the boot processor, and what it does.
fn processor_of(state: &KvmState) -> Option<(bool, Processor)> {
    let sregs = Sregs::new(&state.sregs.0).filter(|_| state.sregs.0.len() == SREGS_LEN)?;
    let boot = sregs.is_boot();
    if let Some(nested) = state
        .nested_state
        .as_ref()
        .and_then(|state| nested(&state.0))
    {
        return Some((boot, nested));
    }
    let (rip, rflags) = rip_and_flags(&state.regs.0)?;
    let mp_state = state.mp_state.0.as_slice().le_at::<u32>(0)?;
    let registers = sregs.registers(rip, rflags)?;
    Some((boot, registers.of_kvm(boot, mp_state, false)?))
}

/// Whether, by the configuration at `path`, some of the guest's memory is a private mapping of a
/// file: it does not begin as zero then.
fn has_private_file(path: &Path) -> Result<bool, DumpError> {
    let config: Config = serde_json::from_slice(&read_json(path)?).map_err(json_error(path))?;
    let zones = config.memory.and_then(|memory| memory.zones);
    let private = |zone: &Zone| zone.file.is_some() && !zone.shared;
    Ok(zones.is_some_and(|zones| zones.iter().any(private)))
}

fn read_json(path: &Path) -> Result<Vec<u8>, DumpError> {
    let reading = || DumpError::io("reading", path);
    let file = File::open(path).map_err(reading())?;
    let mut bytes = Vec::new();
    const TOO_MUCH: u64 = MAX_STATE + 1;
    let read = file.take(TOO_MUCH).read_to_end(&mut bytes);
    if to_u64(read.map_err(reading())?) > MAX_STATE {
        return Err(DumpError::malformed(
            path,
            "state longer than allowed",
            FileOffset::ZERO,
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
    use sonicshot::x86_64::ControlRegisters;
    use std::fs;

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
        fs::write(&path, state).unwrap();
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
            (&[(1, GIB)], GIB, "invalid address"),
            (&[(0, GIB + 1)], GIB + 1, "invalid length"),
            (&[(0, 0)], 0, "invalid length"),
            (&[(u64::MAX - 4095, 8192)], 8192, "invalid length"),
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
    fn a_structure_has_a_length_that_there_is() {
        for (len, is_read) in [(MAX_STRUCTURE, true), (MAX_STRUCTURE + 1, false)] {
            let text = json!(vec![7_u8; len]).to_string();
            let read = serde_json::from_str::<Structure>(&text);
            assert_eq!(read.is_ok(), is_read, "{len}");
        }
    }

    /// A processor's structures, as C has them and `kvm-bindings` writes them.
    fn cpu(boot: bool, mp_state: u8, cr3: u64) -> Value {
        let mut sregs = vec![0_u8; 312];
        let mut regs = vec![0_u8; 144];
        let put = |out: &mut [u8], at: usize, bytes: &[u8]| {
            out[at..at + bytes.len()].copy_from_slice(bytes);
        };
        let apic = 0xfee0_0800_u64 | u64::from(boot) << 8;
        put(&mut sregs, 272, &apic.to_le_bytes());
        if cr3 == 0 {
            put(&mut sregs, 0, &0xffff_0000_u64.to_le_bytes());
            put(&mut sregs, 12, &0xf000_u16.to_le_bytes());
            put(&mut sregs, 224, &0x6000_0010_u64.to_le_bytes());
            put(&mut regs, 128, &0xfff0_u64.to_le_bytes());
        } else {
            put(&mut sregs, 12, &[0x10, 0, 11, 1, 0, 0, 1, 1, 1]);
            for (at, value) in [
                (224, 0x8005_0033),
                (240, cr3),
                (248, 0x37_0ef0),
                (264, 0xd01),
            ] {
                put(&mut sregs, at, &u64::to_le_bytes(value));
            }
            put(&mut regs, 128, &0xffff_ffff_8100_0000_u64.to_le_bytes());
        }
        json!({
            "cpuid": [{"function": 1}],
            "regs": regs,
            "sregs": sregs,
            "mp_state": [mp_state, 0, 0, 0],
            "nested_state": null,
        })
    }

    /// A state with these processors.
    fn of_cpus(cpus: &[(&str, Value)]) -> Vec<u8> {
        let all: serde_json::Map<_, _> = cpus
            .iter()
            .map(|(number, cpu)| {
                let state = json!({"Kvm": cpu}).to_string();
                let cpu = json!({"snapshots": {}, "snapshot_data": {"state": state}});
                ((*number).to_owned(), cpu)
            })
            .collect();
        let manager = json!({"snapshots": all, "snapshot_data": null});
        json!({"snapshots": {"cpu-manager": manager, "memory-manager": {}}})
            .to_string()
            .into_bytes()
    }

    fn runs(cr3: u64) -> Processor {
        let registers = ControlRegisters::new(0x8005_0033, cr3, 0x37_0ef0, Some(0xd01));
        Processor::Started(registers)
    }

    #[test]
    fn processors_are_told_in_the_order_of_their_numbers() {
        let state = of_cpus(&[
            ("10", cpu(false, 3, 0x3000)),
            ("2", cpu(false, 1, 0)),
            ("0", cpu(true, 0, 0x1000)),
            ("1", cpu(false, 0, 0x2000)),
            ("3", cpu(false, 2, 0)),
        ]);
        let never = Processor::NotStarted;
        let want = vec![runs(0x1000), runs(0x2000), never, never, runs(0x3000)];
        assert_eq!(processors_of(&state), Ok(want));
    }

    #[test]
    fn a_nested_guests_host_is_found() {
        let host = (0x8005_0033_u64, 0xabc_d000_u64, 0x37_2ef0_u64);
        for (format, places, more) in [
            (1_u8, [0x558, 0x550, 0x548], (0x4d0, 0xd01_u64)),
            (0, [584, 592, 600], (768, 1 << 9)),
        ] {
            let mut nested = vec![0_u8; 128 + 4096];
            nested[0] = 1;
            nested[2] = format;
            let values = [host.0, host.1, host.2];
            let fields = places.iter().zip(values).map(|(at, value)| (*at, value));
            for (at, value) in fields.chain([more]) {
                nested[128 + at..128 + at + 8].copy_from_slice(&value.to_le_bytes());
            }
            let mut with = |bytes: &[u8]| {
                let mut cpu = cpu(true, 0, 0x1000);
                nested[128..128 + bytes.len()].copy_from_slice(bytes);
                cpu["nested_state"] = json!(nested);
                processors_of(&of_cpus(&[("0", cpu)]))
            };
            let efer = (format == 1).then_some(0xd01);
            let registers = ControlRegisters::new(host.0, host.1, host.2, efer);
            let revision: &[u8] = if format == 1 {
                &[]
            } else {
                &[0xd0, 0x7e, 0xe5, 0x11]
            };
            let host = Some(registers);
            assert_eq!(with(revision), Ok(vec![Processor::InNestedGuest { host }]));
            if format == 0 {
                let none = Processor::InNestedGuest { host: None };
                assert_eq!(with(&[0xd1]), Ok(vec![none]));
            }
        }
        // Nested guests that it has, but is not in.
        let mut cpu = cpu(true, 0, 0x1000);
        cpu["nested_state"] = json!(vec![0; 128]);
        assert_eq!(
            processors_of(&of_cpus(&[("0", cpu)])),
            Ok(vec![runs(0x1000)])
        );
    }

    #[test]
    fn processors_that_cannot_be_are_not_told() {
        let good = || cpu(true, 0, 0x1000);
        let with = |field: &str, value: Value| {
            let mut cpu = good();
            cpu[field] = value;
            vec![("0", cpu)]
        };
        let flipped = |at: usize, bit: u8| {
            let mut cpu = good();
            let byte = cpu["sregs"][at].as_u64().unwrap() ^ u64::from(bit);
            cpu["sregs"][at] = json!(byte);
            vec![("0", cpu)]
        };
        let table = [
            vec![],
            vec![("0", good()), ("1", good())],
            vec![("1", cpu(false, 0, 0x1000))],
            vec![("0", good()), ("00", cpu(false, 0, 0x1000))],
            vec![("x", good())],
            vec![("0", good()), ("1", cpu(false, 1, 0x1000))],
            vec![("0", good()), ("1", cpu(false, 4, 0x1000))],
            with("regs", json!(vec![0; 143])),
            with("sregs", json!(vec![0; 311])),
            with("sregs", json!(vec![0; 312])),
            with("sregs", json!(vec![0; 313])),
            with("mp_state", json!([])),
            with("mp_state", json!(0)),
            with("regs", json!({"rip": 0})),
            with("sregs", json!(vec![0; 1 << 20])),
            // Long mode without paging; a bit that CR3 has not; a segment's padding; the APIC.
            flipped(227, 0x80),
            flipped(247, 0x80),
            flipped(23, 1),
            flipped(274, 1),
        ];
        for (number, cpus) in table.iter().enumerate() {
            assert!(processors_of(&of_cpus(cpus)).is_err(), "{number}");
        }
        for version in [53, 38, 28, 19] {
            let state = state(version, &[(0, 4096)]).to_string();
            assert!(processors_of(state.as_bytes()).is_err());
        }
        for text in [
            "",
            "{}",
            "[]",
            r#"{"snapshots":{"cpu-manager":{"snapshots":[]}}}"#,
        ] {
            assert!(processors_of(text.as_bytes()).is_err());
        }
        let hyperv = String::from_utf8(of_cpus(&[("0", good())])).unwrap();
        assert!(processors_of(hyperv.replace("Kvm", "Mshv").as_bytes()).is_err());
        assert!(processors_of(hyperv.as_bytes()).is_ok());
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
            fs::write(&path, text).unwrap();
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
