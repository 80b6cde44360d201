//! Text of QEMU's monitor for people on memory and processors, read.

use crate::error::QemuError;
use crate::qmp::shortened;
use serde::{Deserialize, Serialize};
use sonicshot::x86_64::ControlRegisters;
use sonicshot::{Gpa, GpaRange, Processor};
use std::collections::HashSet;

/// The most RAM blocks, ranges of memory and processors that are taken.
const MOST: usize = 16_384;

/// A RAM block of QEMU's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RamBlock {
    /// As migration streams have it.
    pub name: String,
    /// The pages that it is made of, in bytes.
    pub page_size: u64,
    /// Its length, in bytes.
    pub used: u64,
    /// The length that it can grow to, in bytes.
    pub total: u64,
    /// Its address in QEMU's memory, if QEMU says so (8.0 and later).
    #[serde(skip)]
    pub address: Option<u64>,
}

impl RamBlock {
    /// The last part of its name: what the memory's map calls it.
    pub(crate) fn short_name(&self) -> &str {
        self.name.rsplit('/').next().unwrap_or(&self.name)
    }
}

fn unknown(what: &'static str, line: &str, expected: &'static str) -> QemuError {
    QemuError::Unknown {
        what,
        found: format!("`{}`", shortened(line)),
        expected,
    }
}

fn hex(word: &str) -> Option<u64> {
    u64::from_str_radix(word.strip_prefix("0x").unwrap_or(word), 16).ok()
}

/// `info ramblock`, but for blocks without a name, which QEMU does not migrate.
pub(crate) fn ram_blocks(text: &str) -> Result<Vec<RamBlock>, QemuError> {
    const EXPECTED: &str = "NAME SIZE UNIT OFFSET USED TOTAL [ADDRESS ro|rw]";
    let mut found: Vec<RamBlock> = Vec::new();
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        if line.trim_start().starts_with("Block Name") {
            continue;
        }
        let wrong = || unknown("info ramblock", line, EXPECTED);
        // A block without a name begins with its page size.
        if line.split_whitespace().nth(1).is_some_and(is_unit) {
            continue;
        }
        found.push(ram_block(line).ok_or_else(wrong)?);
        if found.len() > MOST {
            return Err(wrong());
        }
    }
    let mut names = HashSet::new();
    match found.iter().find(|block| !names.insert(&block.name)) {
        Some(twice) => Err(unknown("info ramblock", &twice.name, "each name once")),
        None => Ok(found),
    }
}

fn is_unit(word: &str) -> bool {
    unit(word).is_some()
}

fn unit(word: &str) -> Option<u32> {
    Some(match word {
        "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        _ => return None,
    })
}

fn ram_block(line: &str) -> Option<RamBlock> {
    let mut words = line.split_whitespace();
    let name = words.next()?.to_owned();
    let size: u64 = words.next()?.parse().ok()?;
    let page_size = size.checked_mul(1 << unit(words.next()?)?)?;
    let _offset = hex(words.next()?)?;
    let (used, total) = (hex(words.next()?)?, hex(words.next()?)?);
    let address = words.next().and_then(hex);
    let sound = page_size.is_power_of_two() && used <= total && (1..256).contains(&name.len());
    sound.then_some(RamBlock {
        name,
        page_size,
        used,
        total,
        address,
    })
}

/// A range of the guest's memory that is RAM or ROM, by the flat view of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Placed {
    /// The region: the last part of a block's name.
    pub region: String,
    /// Its offset in the region, in bytes.
    pub offset: u64,
    /// Its range in the guest.
    pub range: GpaRange,
}

/// `info mtree -f`: what the address space `memory` has.
pub(crate) fn placed(text: &str) -> Result<Vec<Placed>, QemuError> {
    const EXPECTED: &str = "FIRST-LAST (prio N, ram): NAME [@OFFSET]";
    let mut found = Vec::new();
    let (mut inside, mut done) = (false, false);
    for line in text.lines() {
        if line.starts_with("FlatView") {
            done |= inside;
            inside = false;
        } else if let Some(space) = line.trim_start().strip_prefix("AS ") {
            inside |= !done && space.starts_with("\"memory\"");
        } else if inside && line.contains("(prio ") {
            let wrong = || unknown("info mtree -f", line, EXPECTED);
            if let Some(one) = placed_line(line).ok_or_else(wrong)? {
                found.push(one);
            }
            if found.len() > MOST {
                return Err(wrong());
            }
        }
    }
    if found.is_empty() {
        return Err(unknown(
            "info mtree -f",
            text,
            "RAM in the address space `memory`",
        ));
    }
    Ok(found)
}

/// `None` of a line that cannot be read; `Some(None)` of what is no RAM.
#[expect(
    clippy::option_option,
    reason = "of a line there are three things to say"
)]
fn placed_line(line: &str) -> Option<Option<Placed>> {
    let (range, rest) = line.trim_start().split_once(" (prio ")?;
    let (kind, name) = rest.split_once("): ")?;
    let (_, kind) = kind.split_once(", ")?;
    // `ram`, `rom`; devices that are RAM inside are `ramd` and `romd`.
    if !matches!(kind, "ram" | "rom" | "romd") {
        return Some(None);
    }
    let (first, last) = range.split_once('-')?;
    let (first, last) = (hex(first)?, hex(last)?);
    let range = GpaRange::between(Gpa::new(first), Gpa::new(last.checked_add(1)?))?;
    // Behind the offset, and instead of it, there may be ` KVM`.
    let mut words = name.split_whitespace();
    let region = words.next()?.to_owned();
    let offset = words.find_map(|word| word.strip_prefix('@'));
    let offset = match offset {
        Some(offset) => hex(offset)?,
        None => 0,
    };
    Some(Some(Placed {
        region,
        offset,
        range,
    }))
}

/// `info registers -a`: all processors, in their order.
pub(crate) fn processors(text: &str) -> Result<Vec<Processor>, QemuError> {
    const WHAT: &str = "info registers -a";
    let mut found = Vec::new();
    for (number, part) in text.split("CPU#").skip(1).enumerate() {
        let wrong = || {
            unknown(
                WHAT,
                part,
                "CR0, CR3, CR4, EFER, HLT and SMM of each processor",
            )
        };
        let (index, _) = part.split_once('\n').ok_or_else(wrong)?;
        if index.trim().parse() != Ok(number) || number >= MOST {
            return Err(wrong());
        }
        found.push(processor(part, number == 0).ok_or_else(wrong)?);
    }
    if found.is_empty() {
        return Err(unknown(WHAT, text, "processors"));
    }
    Ok(found)
}

/// Paging is on (`CR0.PG`); caches are off, which an INIT leaves as it was.
const CR0_PG: u64 = 1 << 31;
const CR0_ET: u64 = 1 << 4;
const CR0_CACHE: u64 = 3 << 29;
/// Interrupts are on (`RFLAGS.IF`).
const RFLAGS_IF: u64 = 1 << 9;

/// The processor with these registers, as `sonicshot-dump` has it of files.
fn processor(text: &str, boot: bool) -> Option<Processor> {
    let value = |name: &str| register(text, name);
    let control = ControlRegisters::new(
        value("CR0")?,
        value("CR3")?,
        value("CR4")?,
        Some(value("EFER")?),
    );
    let rip = value("RIP").or_else(|| value("EIP"))?;
    let rflags = value("RFL").or_else(|| value("EFL"))?;
    if flag(text, "SMM")? {
        return Some(Processor::InSmm);
    }
    let halted = flag(text, "HLT")?;
    if boot || !halted {
        return Some(Processor::Started(control));
    }
    let of_reset = rip == 0xfff0
        && control.cr0 & !CR0_CACHE == CR0_ET
        && control.cr3 == 0
        && control.cr4 == 0
        && control.efer == Some(0);
    if of_reset {
        return Some(Processor::NotStarted);
    }
    if control.cr0 & CR0_PG == 0 && rflags & RFLAGS_IF == 0 {
        return Some(Processor::Parked);
    }
    Some(Processor::Started(control))
}

/// The hexadecimal number behind `NAME=`.
fn register(text: &str, name: &str) -> Option<u64> {
    hex(behind(text, name)?)
}

fn flag(text: &str, name: &str) -> Option<bool> {
    match behind(text, name)? {
        "0" => Some(false),
        "1" => Some(true),
        _ => None,
    }
}

fn behind<'t>(text: &'t str, name: &str) -> Option<&'t str> {
    let mut words = text.split_whitespace();
    words.find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
}

#[cfg(test)]
mod tests {
    use super::{placed, processors, ram_blocks};
    use proptest::prelude::*;
    use sonicshot::{Gpa, GpaRange, Processor};

    // Of QEMU 10.0.2, but for the block without a name.
    const BLOCKS: &str = "
              Block Name    PSize              Offset               Used              Total                HVA  RO
                  pc.ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000 0x00007f9b17e00000  rw
                             4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000 0x00007f9b17e00000  rw
    /rom@etc/acpi/tables    4 KiB  0x0000000004080000 0x0000000000020000 0x0000000000200000 0x00007f9b68a00000  ro
                    huge    2 MiB  0x0000000004080000 0x0000000000200000 0x0000000000200000 0x00007f9b68a00000  rw
";
    // Of QEMU 7.2.
    const OLD_BLOCKS: &str = "              Block Name    PSize              Offset               Used              Total
                    ram0    4 KiB  0x0000000000000000 0x0000000020000000 0x0000000020000000
";
    const TREE: &str = "FlatView #0
 AS \"I/O\", root: io
 Root memory region: io
  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan

FlatView #1
 AS \"memory\", root: system
 AS \"cpu-memory-0\", root: system
 Root memory region: system
  0000000000000000-00000000000bffff (prio 0, ram): pc.ram KVM
  00000000000c0000-00000000000dffff (prio 1, rom): pc.rom
  00000000000e0000-00000000000fffff (prio 0, rom): pc.bios @0000000000020000
  0000000000100000-0000000003ffffff (prio 0, ram): pc.ram @0000000000100000 KVM
  00000000fec00000-00000000fec00fff (prio 0, i/o): ioapic

FlatView #2
 AS \"cpu-smm-0\", root: memory
  0000000000000000-00000000000bffff (prio 0, ram): other
";

    #[test]
    fn blocks_are_read() {
        let found = ram_blocks(BLOCKS).unwrap();
        let short: Vec<_> = found
            .iter()
            .map(|block| (block.short_name(), block.page_size, block.used, block.total))
            .collect();
        assert_eq!(
            short,
            [
                ("pc.ram", 4096, 0x400_0000, 0x400_0000),
                ("tables", 4096, 0x2_0000, 0x20_0000),
                ("huge", 2 << 20, 0x20_0000, 0x20_0000),
            ]
        );
        assert_eq!(found[0].address, Some(0x7f9b_17e0_0000));
        assert_eq!(ram_blocks(OLD_BLOCKS).unwrap()[0].address, None);
        for wrong in [
            "x 4 KiB 0x0 0x2 0x1",
            "x 3 KiB 0x0 0x1 0x1",
            "x 4 KiB 0x0 0x1",
            "x 99999999999999999 GiB 0x0 0x1 0x1",
            "x 4 KiB 0x0 0x1 0x1\nx 4 KiB 0x0 0x1 0x1",
        ] {
            assert!(ram_blocks(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_flat_view_is_read() {
        let found = placed(TREE).unwrap();
        let range = |start, end| GpaRange::new(Gpa::new(start), Gpa::new(end));
        let short: Vec<_> = found
            .iter()
            .map(|one| (one.region.as_str(), one.offset, one.range))
            .collect();
        assert_eq!(
            short,
            [
                ("pc.ram", 0, range(0, 0xc_0000)),
                ("pc.rom", 0, range(0xc_0000, 0xe_0000)),
                ("pc.bios", 0x2_0000, range(0xe_0000, 0x10_0000)),
                ("pc.ram", 0x10_0000, range(0x10_0000, 0x400_0000)),
            ]
        );
        assert!(placed("FlatView #0\n").is_err());
        let backwards = " AS \"memory\", root: system\n  5-3 (prio 0, ram): x\n";
        assert!(placed(backwards).is_err());
    }

    fn registers(number: u32, cr0: u64, rip: u64, flags: &str) -> String {
        format!(
            "\nCPU#{number}\nRAX=0 RIP={rip:016x} RFL=00000046 [-] CPL=0 II=0 A20=1 {flags}\n\
             CR0={cr0:08x} CR2=0 CR3=0 CR4=00000000\nEFER=0000000000000000\n"
        )
    }

    #[test]
    fn processors_are_told() {
        let text = [
            registers(0, 0x8005_0033, 7, "SMM=0 HLT=1"),
            registers(1, 0x6000_0010, 0xfff0, "SMM=0 HLT=1"),
            registers(2, 0x10, 5, "SMM=0 HLT=1"),
            registers(3, 0x10, 5, "SMM=0 HLT=0"),
            registers(4, 0x10, 5, "SMM=1 HLT=0"),
        ]
        .concat();
        let found = processors(&text).unwrap();
        assert!(matches!(
            found[..],
            [
                Processor::Started(_),
                Processor::NotStarted,
                Processor::Parked,
                Processor::Started(_),
                Processor::InSmm,
            ]
        ));
        assert!(processors("").is_err());
        assert!(processors(&registers(1, 0, 0, "SMM=0 HLT=0")).is_err());
        assert!(processors(&registers(0, 0, 0, "SMM=0")).is_err());
    }

    #[test]
    fn more_than_there_can_be_is_refused() {
        let many = |line: &dyn Fn(usize) -> String| -> String {
            (0..=super::MOST)
                .map(|number| line(number) + "\n")
                .collect()
        };
        let blocks = many(&|number| format!("b{number} 4 KiB 0x0 0x1000 0x1000"));
        assert!(ram_blocks(&blocks).is_err());
        let tree = many(&|number| format!("  {number:x}000-{number:x}fff (prio 0, ram): x"));
        assert!(placed(&format!(" AS \"memory\", root: x\n{tree}")).is_err());
        let text = many(&|number| registers(u32::try_from(number).unwrap(), 0, 0, "SMM=0 HLT=0"));
        assert!(processors(&text).is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "[ -~\n]{0,200}") {
            let _ = ram_blocks(&text);
            let _ = placed(&format!(" AS \"memory\"\n  {text}(prio 0, ram): {text}"));
            let _ = processors(&format!("CPU#0\n{text}"));
        }
    }
}
