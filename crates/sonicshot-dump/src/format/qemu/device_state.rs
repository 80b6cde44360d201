//! The processors in the devices' state of QEMU's migration files.
//!
//! Behind the memory comes a section for each device, and then the end of the stream
//! (`migration/savevm.c`). The sections do not tell their lengths. What follows them does: a
//! description in JSON, since QEMU 2.3, which names each section, each of its fields and the
//! field's size, in the order of the file. By it the sections are gone through from the first to
//! the last: each must begin as it is described and end where the next begins, and the last where
//! the description does. If they do not, nothing of them is believed.
//!
//! A processor's registers are in `cpu` (`target/i386/machine.c`), and whether it is halted is in
//! `cpu_common`; the number of both is that of the processor, and 0 is the boot processor. What
//! the first holds twice must agree: protected mode and long mode are also in `hflags`.
//!
//! Where a processor runs a nested guest, its registers are that guest's. Its host's are, under
//! KVM, in a subsection (`cpu/nested_state`: Intel's in the `struct vmcs12`, AMD's in the save
//! area of the control block, where KVM puts them), and under QEMU's own emulation, which has
//! AMD's extension alone, in guest memory, in the host's save area (`vm_hsave`).

use crate::DumpError;
use crate::format::qemu::wire::{Cursor, SECTION_FOOTER, SECTION_FULL, SUBSECTION};
use crate::processors::{Registers, host_in_memory, host_in_vmcb, host_in_vmcs12};
use serde::Deserialize;
use serde::de::{self, Deserializer, SeqAccess, Visitor};
use sonicshot::x86_64::ControlRegisters;
use sonicshot::{Bytes, FileBytes, FileOffset, GuestMemory, Processor, to_u64};
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

/// The mark that ends the sections, and that of the description behind it (`QEMU_VM_EOF`,
/// `QEMU_VM_VMDESCRIPTION`).
const EOF: u8 = 0;
const DESCRIPTION: u8 = 6;
/// The devices' state and its description: tens of KiB for each processor.
const MAX_STATE: u64 = 64 << 20;
/// Places that may be the description's beginning and are tried: of it no other has the length.
const MAX_TRIES: usize = 16;
/// Sections that are described, but stand before the memory: of virtio-mem devices.
const MAX_EARLY: usize = 256;

/// The names of the fields that are looked at, in the description.
const FIELDS: &[&str] = &[
    "halted",
    "env.regs",
    "env.eip",
    "env.eflags",
    "env.hflags",
    "env.segs",
    "env.cr[0]",
    "env.cr[3]",
    "env.cr[4]",
    "env.efer",
    "env.vm_hsave",
    "env.mp_state",
    "env.nested_state",
    "flags",
    "data.vmx[0].vmcs12",
    "data.svm[0].vmcb12",
];
/// `cpu` as it is since QEMU 0.13 up to `env.mp_state`: fields and where they are, in bytes. The
/// description must say the same.
const VERSIONS: [u32; 2] = [11, 12];
const PLACES: &[(&str, u64)] = &[
    ("env.regs", 0),
    ("env.eip", 128),
    ("env.eflags", 136),
    ("env.hflags", 144),
    ("env.segs", 236),
    ("env.cr[0]", 456),
    ("env.cr[3]", 472),
    ("env.cr[4]", 480),
    ("env.efer", 816),
    ("env.vm_hsave", 880),
    ("env.mp_state", 1153),
];
/// `CS` is the second of the segments, each selector, base, limit and flags.
const CS: u64 = 20;
/// In `hflags`: protected mode, long mode, system management mode, a nested guest.
const HF_PE: u32 = 1 << 7;
const HF_LMA: u32 = 1 << 14;
const HF_SMM: u32 = 1 << 19;
const HF_GUEST: u32 = 1 << 21;
const CR0_PE: u64 = 1;
const EFER_LMA: u64 = 1 << 10;
/// The description, as far as it is of use.
#[derive(Deserialize)]
struct Description {
    devices: Vec<Device>,
}

#[derive(Deserialize)]
#[serde(from = "RawDevice")]
struct Device {
    name: String,
    instance_id: u32,
    /// Not of sections in the old style.
    version: Option<u32>,
    part: Part,
}

#[derive(Deserialize)]
struct RawDevice {
    name: String,
    instance_id: u32,
    version: Option<u32>,
    #[serde(default)]
    fields: Fields,
    #[serde(default)]
    subsections: Subsections,
}

impl From<RawDevice> for Device {
    fn from(raw: RawDevice) -> Self {
        Self {
            name: raw.name,
            instance_id: raw.instance_id,
            version: raw.version,
            part: Part {
                vmsd_name: String::new(),
                fields: raw.fields,
                subsections: raw.subsections,
            },
        }
    }
}

/// The fields of a section, of a subsection, or of a structure in one; and its subsections.
#[derive(Deserialize)]
struct Part {
    #[serde(default)]
    vmsd_name: String,
    #[serde(default)]
    fields: Fields,
    #[serde(default)]
    subsections: Subsections,
}

#[derive(Deserialize)]
struct Field {
    name: String,
    #[serde(default = "one")]
    array_len: u64,
    size: u64,
    r#struct: Option<Box<Part>>,
}

fn one() -> u64 {
    1
}

/// All fields' length, and where those of [`FIELDS`] are. Nothing is kept of the others: a
/// description is a hundred times as long as what it keeps.
#[derive(Default)]
struct Fields {
    len: u64,
    kept: Vec<Kept>,
}

struct Kept {
    name: &'static str,
    /// From the beginning of the fields, in bytes.
    at: u64,
    len: u64,
    inner: Option<Box<Part>>,
}

/// All subsections' length, and those of which something is kept.
#[derive(Default)]
struct Subsections {
    len: u64,
    /// From the end of the fields, in bytes.
    kept: Vec<(u64, Part)>,
}

/// A subsection begins with a byte, its name behind a byte with the length, and its version.
const SUBSECTION_HEADER: u64 = 6;
const TOO_LONG: &str = "a section of more than 64 bits";

impl Part {
    fn len(&self) -> Option<u64> {
        self.fields.len.checked_add(self.subsections.len)
    }

    fn is_of_use(&self) -> bool {
        !self.fields.kept.is_empty() || !self.subsections.kept.is_empty()
    }

    fn field(&self, name: &str) -> Option<&Kept> {
        let mut found = self.fields.kept.iter().filter(|kept| kept.name == name);
        found.next().filter(|_| found.next().is_none())
    }

    /// A subsection, and where its fields begin, from the beginning of this.
    fn subsection(&self, name: &str) -> Option<(u64, &Self)> {
        let named = |(_, part): &&(u64, Self)| part.vmsd_name == name;
        let (at, part) = self.subsections.kept.iter().find(named)?;
        let header = SUBSECTION_HEADER.checked_add(to_u64(name.len()))?;
        let at = self.fields.len.checked_add(*at)?.checked_add(header)?;
        Some((at, part))
    }
}

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(FieldsVisitor)
    }
}

struct FieldsVisitor;

impl<'de> Visitor<'de> for FieldsVisitor {
    type Value = Fields;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the fields of a section")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Fields, A::Error> {
        let mut fields = Fields::default();
        while let Some(field) = seq.next_element::<Field>()? {
            let len = field.size.checked_mul(field.array_len);
            let len = len.ok_or_else(|| de::Error::custom(TOO_LONG))?;
            if let Some(name) = FIELDS.iter().find(|name| **name == field.name) {
                fields.kept.push(Kept {
                    name,
                    at: fields.len,
                    len,
                    inner: field.r#struct.filter(|part| part.is_of_use()),
                });
            }
            let all = fields.len.checked_add(len);
            fields.len = all.ok_or_else(|| de::Error::custom(TOO_LONG))?;
        }
        Ok(fields)
    }
}

impl<'de> Deserialize<'de> for Subsections {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(SubsectionsVisitor)
    }
}

struct SubsectionsVisitor;

impl<'de> Visitor<'de> for SubsectionsVisitor {
    type Value = Subsections;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the subsections of a section")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Subsections, A::Error> {
        let mut subsections = Subsections::default();
        while let Some(part) = seq.next_element::<Part>()? {
            let at = subsections.len;
            let header = SUBSECTION_HEADER.checked_add(to_u64(part.vmsd_name.len()));
            let end = header.and_then(|len| at.checked_add(len)?.checked_add(part.len()?));
            subsections.len = end.ok_or_else(|| de::Error::custom(TOO_LONG))?;
            if part.is_of_use() {
                subsections.kept.push((at, part));
            }
        }
        Ok(subsections)
    }
}

/// The processors, as the devices' state from `at` on tells of them.
pub(crate) fn processors(
    path: &Path,
    data: FileBytes<'_>,
    at: FileOffset,
    memory: &dyn GuestMemory,
) -> Result<Vec<Processor>, &'static str> {
    let state = state(data, at)?;
    let mut is_described = false;
    for (end, description) in descriptions(&state).take(MAX_TRIES) {
        is_described = true;
        let Ok(description) = serde_json::from_slice::<Description>(description) else {
            continue;
        };
        if let Ok(sections) = walk(path, &state, end, &description) {
            return of_sections(&sections, memory);
        }
    }
    Err(if is_described {
        "its devices' state is not as its description has it"
    } else {
        "its devices' state has no description"
    })
}

/// The devices' state from `at` on, and all behind it.
fn state(data: FileBytes<'_>, at: FileOffset) -> Result<Vec<u8>, &'static str> {
    let cut = "its devices' state is cut short";
    let end = FileOffset::new(to_u64(data.len()));
    let len = end.offset_from(at).ok_or(cut)?;
    if len > MAX_STATE {
        return Err("its devices' state is too long");
    }
    let state = data.part(at.raw(), len).and_then(Bytes::copied);
    state.ok_or(cut)
}

/// Whether the sections of devices begin at `at`, and follow each other to the end of the file as
/// they are described there: nothing else is between.
pub(crate) fn is_described(path: &Path, data: FileBytes<'_>, at: FileOffset) -> bool {
    let Ok(state) = state(data, at) else {
        return false;
    };
    descriptions(&state).take(MAX_TRIES).any(|(end, text)| {
        let description = serde_json::from_slice::<Description>(text);
        description.is_ok_and(|description| walk(path, &state, end, &description).is_ok())
    })
}

/// The places that may be the description: the end of the sections before it, and its text.
fn descriptions(state: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    let begins = |at: usize| {
        let head: &[u8; 7] = state.get(at..)?.first_chunk()?;
        let [EOF, DESCRIPTION, len @ .., b'{'] = head else {
            return None;
        };
        let len = usize::try_from(u32::from_be_bytes(*len)).ok()?;
        let text = state.get(at.checked_add(6)?..)?.get(..len)?;
        text.ends_with(b"}").then_some((to_u64(at), text))
    };
    (0..state.len()).filter_map(begins)
}

/// A section, as it is described and as it is.
struct Section<'a> {
    device: &'a Device,
    bytes: &'a [u8],
}

impl Section<'_> {
    /// The bytes of `part`, which begins at `at`, from its field `name` on.
    fn bytes_of(&self, at: u64, part: &Part, name: &str) -> Option<&[u8]> {
        let field = part.field(name)?;
        let start = usize::try_from(at.checked_add(field.at)?).ok()?;
        self.bytes
            .get(start..)?
            .get(..usize::try_from(field.len).ok()?)
    }

    /// The field `name` of the section itself.
    fn bytes(&self, name: &str) -> Option<&[u8]> {
        self.bytes_of(0, &self.device.part, name)
    }

    fn u32(&self, name: &str) -> Option<u32> {
        Some(u32::from_be_bytes(self.bytes(name)?.try_into().ok()?))
    }

    fn u64(&self, name: &str) -> Option<u64> {
        Some(u64::from_be_bytes(self.bytes(name)?.try_into().ok()?))
    }

    /// Whether the subsection whose fields begin at `at` begins there as it must.
    fn begins(&self, at: u64, name: &str) -> bool {
        let begins = || {
            let header = SUBSECTION_HEADER.checked_add(to_u64(name.len()))?;
            let start = usize::try_from(at.checked_sub(header)?).ok()?;
            let header = self
                .bytes
                .get(start..)?
                .get(..usize::try_from(header).ok()?)?;
            let (kind, rest) = header.split_first()?;
            let (len, rest) = rest.split_first()?;
            Some(
                *kind == SUBSECTION
                    && usize::from(*len) == name.len()
                    && rest.starts_with(name.as_bytes()),
            )
        };
        begins() == Some(true)
    }
}

/// Goes through all sections up to `end`, each as it is described.
fn walk<'a>(
    path: &Path,
    state: &'a [u8],
    end: u64,
    description: &'a Description,
) -> Result<Vec<Section<'a>>, DumpError> {
    let mut cursor = Cursor::new(path, FileBytes::from_slice(state), FileOffset::ZERO);
    let mut sections = Vec::new();
    let mut early = 0..MAX_EARLY;
    for device in &description.devices {
        let mut ahead = cursor.clone();
        if header(&mut ahead, device).is_err() && sections.is_empty() && early.next().is_some() {
            continue;
        }
        let number = header(&mut cursor, device)?;
        let start = cursor.at().raw();
        let len = device.part.len();
        let len = len.ok_or_else(|| cursor.malformed("invalid length of a section", start))?;
        cursor.skip(len)?;
        let bytes = state
            .part(start, len)
            .ok_or_else(|| cursor.malformed("invalid end of a section", start))?;
        if cursor.peek() == Some(SECTION_FOOTER) {
            cursor.footer(number)?;
        }
        sections.push(Section { device, bytes });
    }
    if cursor.at().raw() != end {
        return Err(cursor.malformed("missing end of the device state", end));
    }
    Ok(sections)
}

/// The header of the section of `device`; returns its number.
fn header(cursor: &mut Cursor<'_>, device: &Device) -> Result<u32, DumpError> {
    let kind = cursor.be::<u8>()?;
    let number = cursor.be::<u32>()?;
    let name = cursor.name()?;
    let instance = cursor.be::<u32>()?;
    let version = cursor.be::<u32>()?;
    let as_described = kind == SECTION_FULL
        && name == device.name
        && instance == device.instance_id
        && device.version.is_none_or(|described| described == version);
    if as_described {
        return Ok(number);
    }
    Err(cursor.malformed("a section that is not described", kind.into()))
}

fn of_sections(
    sections: &[Section<'_>],
    memory: &dyn GuestMemory,
) -> Result<Vec<Processor>, &'static str> {
    let named = |name: &str| {
        let mut found = BTreeMap::new();
        for section in sections
            .iter()
            .filter(|section| section.device.name == name)
        {
            if found.insert(section.device.instance_id, section).is_some() {
                return Err("it has two sections of one processor");
            }
        }
        Ok(found)
    };
    let (cpus, common) = (named("cpu")?, named("cpu_common")?);
    if !cpus.keys().eq(common.keys()) {
        return Err("its sections `cpu` and `cpu_common` are not of the same processors");
    }
    if cpus.keys().next() != Some(&0) {
        return Err("it has no section `cpu` of the first processor");
    }
    let mut processors = Vec::with_capacity(cpus.len());
    for (number, (cpu, common)) in cpus.values().zip(common.values()).enumerate() {
        processors.push(processor(number == 0, cpu, common, memory)?);
    }
    Ok(processors)
}

fn processor(
    boot: bool,
    cpu: &Section<'_>,
    common: &Section<'_>,
    memory: &dyn GuestMemory,
) -> Result<Processor, &'static str> {
    let known = cpu
        .device
        .version
        .is_some_and(|version| VERSIONS.contains(&version));
    let as_known = |(name, at): &(&str, u64)| {
        let field = cpu.device.part.field(name);
        field.is_some_and(|field| field.at == *at)
    };
    if !known || !PLACES.iter().all(as_known) {
        return Err("the section `cpu` of an unknown version");
    }
    let read = || {
        let segments = cpu.bytes("env.segs")?;
        let segment = segments.get(usize::try_from(CS).ok()?..)?;
        let control = ControlRegisters::new(
            cpu.u64("env.cr[0]")?,
            cpu.u64("env.cr[3]")?,
            cpu.u64("env.cr[4]")?,
            Some(cpu.u64("env.efer")?),
        );
        let registers = Registers {
            control,
            rip: cpu.u64("env.eip")?,
            rflags: cpu.u64("env.eflags")?,
            cs_selector: segment.be_at::<u32>(0)?.into(),
            cs_base: segment.be_at(4)?,
        };
        let states = (cpu.u32("env.mp_state")?, common.u32("halted")?);
        Some((registers, cpu.u32("env.hflags")?, states))
    };
    let Some((registers, hflags, (mp_state, halted))) = read() else {
        return Err("the section `cpu` has fields of unknown lengths");
    };
    let control = &registers.control;
    let has = |flag: u32| hflags & flag != 0;
    let long = control.efer.is_some_and(|efer| efer & EFER_LMA != 0);
    if has(HF_PE) != (control.cr0 & CR0_PE != 0) || has(HF_LMA) != long {
        return Err("the registers of a processor contradict each other");
    }
    if has(HF_SMM) {
        return Ok(Processor::InSmm);
    }
    if has(HF_GUEST) {
        let host = host(cpu, memory);
        return Ok(Processor::InNestedGuest { host });
    }
    // Under QEMU's own emulation `mp_state` is always 0; under KVM `halted` is what that says.
    let found = match halted {
        0 | 1 => registers.of_kvm(boot, mp_state, halted == 1),
        _ => None,
    };
    found.ok_or("what a processor does is not known")
}

/// The registers that a processor in a nested guest has as its host.
fn host(cpu: &Section<'_>, memory: &dyn GuestMemory) -> Option<ControlRegisters> {
    const OUTER: &str = "cpu/nested_state";
    const VMX: &str = "cpu/kvm_nested_state/vmx";
    const VMCS12: &str = "cpu/kvm_nested_state/vmx/vmcs12";
    const SVM: &str = "cpu/kvm_nested_state/svm";
    let Some((at, outer)) = cpu.device.part.subsection(OUTER) else {
        let area = cpu.u64("env.vm_hsave").filter(|area| *area != 0)?;
        return host_in_memory(memory, area);
    };
    let field = outer.field("env.nested_state")?;
    let nested = field.inner.as_deref()?;
    let nested_at = at.checked_add(field.at)?;
    let found = |at: u64, part: &Part, name: &str, read: fn(&[u8]) -> Option<ControlRegisters>| {
        read(cpu.bytes_of(at, part, name)?)
    };
    if !cpu.begins(at, OUTER) {
        return None;
    }
    if let Some((at, svm)) = nested.subsection(SVM) {
        let at = nested_at.checked_add(at)?;
        let host = found(at, svm, "data.svm[0].vmcb12", host_in_vmcb);
        return host.filter(|_| cpu.begins(at, SVM));
    }
    let (at, vmx) = nested.subsection(VMX)?;
    let (inner, vmcs12) = vmx.subsection(VMCS12)?;
    let at = nested_at.checked_add(at)?.checked_add(inner)?;
    let host = found(at, vmcs12, "data.vmx[0].vmcs12", host_in_vmcs12);
    host.filter(|_| cpu.begins(at, VMCS12))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use sonicshot::{Gpa, MappedRegions};

    /// Two processors, one that runs and one that was never started, as a machine would have them
    /// that has nothing else.
    const SMALL: &[u8] = include_bytes!("../../../tests/data/devices-small");

    fn read(state: &[u8]) -> Result<Vec<Processor>, &'static str> {
        let ram = [0; 4096];
        let ram =
            MappedRegions::new(vec![(Gpa::ZERO, sonicshot::GuestBytes::from_slice(&ram))]).unwrap();
        processors(
            Path::new("test"),
            FileBytes::from_slice(state),
            FileOffset::ZERO,
            &ram,
        )
    }

    fn two() -> Vec<Processor> {
        let registers = ControlRegisters::new(0x8005_0033, 0x1000, 0x37_0ef0, Some(0xd01));
        vec![Processor::Started(registers), Processor::NotStarted]
    }

    /// The bit in which the second's word for it has its value.
    const HALTED: usize = 9944;

    /// The offsets of the fields of both sections `cpu`.
    fn cpus() -> Vec<usize> {
        let header = b"\x03cpu\0\0\0";
        let found = SMALL.windows(header.len()).enumerate();
        let at = found.filter(|(_, window)| window == header);
        at.map(|(at, _)| at + 12).collect()
    }

    #[test]
    fn no_flipped_bit_puts_another_place_for_a_register() {
        assert_eq!(read(SMALL), Ok(two()));
        let cpus = cpus();
        assert_eq!(cpus.len(), 2);
        let (mut same, mut refused) = (0, 0);
        for bit in 0..SMALL.len() * 8 {
            // What is in the fields is believed: here, and that the second is halted.
            let halted = bit == HALTED;
            if halted || cpus.iter().any(|at| (*at..at + 1157).contains(&(bit / 8))) {
                continue;
            }
            let mut state = SMALL.to_vec();
            state[bit / 8] ^= 1 << (bit % 8);
            match read(&state) {
                Ok(found) => {
                    assert_eq!(found, two(), "bit {bit}");
                    same += 1;
                }
                Err(_) => refused += 1,
            }
        }
        // Of numbers of sections without a footer, of types and names that nobody looks at.
        assert!(same > 1000 && refused > 8000, "{same} {refused}");
    }

    /// Bytes behind so many that may be a description, and are none, are not looked at; nor is
    /// a state that is longer than any.
    #[test]
    fn what_is_tried_and_read_is_bounded() {
        let false_one = b"\0\x06\0\0\0\x02{}".as_slice();
        for (count, is_read) in [(MAX_TRIES - 1, true), (MAX_TRIES, false)] {
            let state = [false_one.repeat(count), SMALL.to_vec()].concat();
            // The sections before the description are not where it has them, which is said.
            let found = descriptions(&state).take(MAX_TRIES);
            let whole = found.filter(|(_, text)| text.len() > 2).count();
            assert_eq!(whole == 1, is_read, "{count}");
            assert!(read(&state).is_err());
        }
        let too_long = "its devices' state is too long";
        for (len, refused) in [(MAX_STATE, false), (MAX_STATE + 1, true)] {
            let file = tempfile::tempfile().unwrap();
            file.set_len(len).unwrap();
            let content = sonicshot::FileContent::new(file).unwrap();
            let page = [0; 4096];
            let page = sonicshot::GuestBytes::from_slice(&page);
            let ram = MappedRegions::new(vec![(Gpa::ZERO, page)]).unwrap();
            let found =
                processors(Path::new("test"), content.bytes(), FileOffset::ZERO, &ram).unwrap_err();
            assert_eq!(found == too_long, refused, "{len}: {found}");
        }
    }

    /// Sections that are described and come elsewhere are passed over, but not without end.
    #[test]
    fn no_more_sections_than_a_bound_are_described_and_come_elsewhere() {
        let (end, text) = descriptions(SMALL).next().unwrap();
        let whole: serde_json::Value = serde_json::from_slice(text).unwrap();
        for (count, is_read) in [(0, true), (MAX_EARLY, true), (MAX_EARLY + 1, false)] {
            let mut described = whole.clone();
            let devices = described["devices"].as_array_mut().unwrap();
            let mut elsewhere = devices[0].clone();
            elsewhere["name"] = "elsewhere".into();
            devices.splice(0..0, std::iter::repeat_n(elsewhere, count));
            let described: Description = serde_json::from_value(described).unwrap();
            let sections = walk(Path::new("test"), SMALL, end, &described);
            assert_eq!(sections.is_ok(), is_read, "{count}");
        }
    }

    #[test]
    fn a_flipped_bit_in_what_a_register_goes_with_is_refused() {
        let [first, second] = cpus()[..] else {
            panic!("two sections");
        };
        let with = |at: usize, bit: u8| {
            let mut state = SMALL.to_vec();
            state[at] ^= 1 << bit;
            read(&state)
        };
        // Long mode and protected mode, each in both places; what it does.
        for (at, bit) in [(146, 6), (147, 7), (463, 0), (822, 2), (1155, 0)] {
            assert!(with(first + at, bit).is_err(), "{at}");
        }
        // Only a register that is told so differs.
        let registers = ControlRegisters::new(0x8005_0033, 0x1_1000, 0x37_0ef0, Some(0xd01));
        let changed = vec![Processor::Started(registers), Processor::NotStarted];
        assert_eq!(with(first + 477, 0), Ok(changed));
        // It runs, or was started after all: with its instruction, its code segment, or a register.
        for (at, bit) in [(135, 0), (259, 0), (260, 0), (479, 4), (487, 5)] {
            let found = with(second + at, bit).unwrap();
            assert_ne!(found[1], Processor::NotStarted, "{at}");
        }
        let found = with(HALTED / 8, 0).unwrap();
        assert!(matches!(found[1], Processor::Started(_)), "{found:?}");
    }

    #[test]
    fn a_cut_state_is_refused() {
        for len in 0..SMALL.len() {
            assert!(read(&SMALL[..len]).is_err(), "{len}");
        }
    }

    proptest! {
        #[test]
        fn any_state_is_read_or_refused(
            state in proptest::collection::vec(any::<u8>(), 0..512), at in 0..SMALL.len(),
        ) {
            let _ = read(&state);
            let mut mixed = SMALL.to_vec();
            let len = state.len().min(mixed.len() - at);
            mixed[at..at + len].copy_from_slice(&state[..len]);
            let _ = read(&mixed);
        }
    }
}
