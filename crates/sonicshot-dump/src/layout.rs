//! The layout of the bytes of a raw RAM file in the guest.

use core::fmt;
use core::str::FromStr;
use sonicshot::{Gpa, GpaRange, RamLayout};

const GIB_4: u64 = 1 << 32;
/// Firmware keeps less than this of the RAM at the top of the low part for itself.
const FIRMWARE: u64 = 128 << 20;

/// The way a VMM spreads a guest's RAM over guest-physical memory. The file holds the parts end to
/// end, lowest first; ranges that are given, in the order given.
///
/// ```
/// use sonicshot_dump::LayoutSpec;
/// let pc: LayoutSpec = "pc".parse()?;
/// // 4 GiB: 3 GiB below the PCI hole, 1 GiB from 4 GiB on.
/// assert_eq!(pc.ranges(4 << 30).len(), 2);
/// let own: LayoutSpec = "0-0x80000000,4G-6G".parse()?;
/// assert_eq!(own.ranges(4 << 30)[1].start().raw(), 4 << 30);
/// # Ok::<(), sonicshot_dump::LayoutSpecError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum LayoutSpec {
    /// QEMU's `pc` (i440fx): RAM to 3.5 GiB, or split at 3 GiB (`hw/i386/pc_piix.c`).
    Pc,
    /// QEMU's `q35`: RAM to 2.75 GiB, or split at 2 GiB (`hw/i386/pc_q35.c`).
    Q35,
    /// Firecracker, Cloud Hypervisor and QEMU's `microvm`: split at 3 GiB; Firecracker again at 256
    /// and 512 GiB.
    Firecracker,
    /// Firecracker before its hole grew, and libkrun: split at 3,328 MiB.
    FirecrackerOld,
    /// One piece from 0.
    Flat,
    /// The ranges given, in the order of the file.
    Ranges(Vec<GpaRange>),
    /// For QEMU's migration files, which hold several blocks of memory: where the blocks named
    /// lie. Others are kept as they are and not looked into.
    Blocks(Vec<BlockPlace>),
}

/// The place in the guest of one of QEMU's blocks of memory.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct BlockPlace {
    /// The block's name in the file, such as `pc.ram` or `ram-node0`.
    pub name: String,
    /// Its ranges; the block holds them end to end, in this order.
    pub ranges: Vec<GpaRange>,
}

impl BlockPlace {
    /// The block `name` at `ranges`.
    #[must_use]
    pub fn new(name: impl Into<String>, ranges: Vec<GpaRange>) -> Self {
        Self {
            name: name.into(),
            ranges,
        }
    }
}

/// A text that is no layout.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutSpecError {
    /// It names no layout, and is no list of ranges.
    #[error(
        "`{text}` is not a layout: want pc, q35, firecracker, firecracker-old, flat, START-END,... or BLOCK=START-END,...;BLOCK=..."
    )]
    Unknown {
        /// The text given.
        text: String,
    },
    /// Two of its ranges have memory in common.
    #[error("the ranges {first} and {second} overlap: memory lies in one place of the file alone")]
    Overlap {
        /// The one that begins first.
        first: GpaRange,
        /// The other.
        second: GpaRange,
    },
    /// The ranges of a block are not in the order in which the block holds them.
    #[error("the range {second} is given behind {first}: a block holds its ranges lowest first")]
    Order {
        /// The one given first.
        first: GpaRange,
        /// The one behind it.
        second: GpaRange,
    },
}

impl LayoutSpec {
    /// The layouts that a raw file may have, likeliest first.
    pub const KNOWN: [Self; 5] = [
        Self::Pc,
        Self::Q35,
        Self::Firecracker,
        Self::FirecrackerOld,
        Self::Flat,
    ];

    /// The ranges of `len` bytes of RAM; for [`LayoutSpec::Ranges`] and [`LayoutSpec::Blocks`] the
    /// ranges given, whatever `len` is.
    #[must_use]
    pub fn ranges(&self, len: u64) -> Vec<GpaRange> {
        // From which size on RAM is split, and where.
        let (whole_below, split) = match self {
            Self::Pc => (0xe000_0000, 0xc000_0000),
            Self::Q35 => (0xb000_0000, 0x8000_0000),
            Self::Firecracker => (0xc000_0001, 0xc000_0000),
            Self::FirecrackerOld => (0xd000_0001, 0xd000_0000),
            Self::Flat => (u64::MAX, u64::MAX),
            Self::Ranges(ranges) => return ranges.clone(),
            Self::Blocks(blocks) => {
                return blocks
                    .iter()
                    .flat_map(|block| block.ranges.iter().copied())
                    .collect();
            }
        };
        if len < whole_below {
            return vec![GpaRange::new(Gpa::ZERO, Gpa::new(len))];
        }
        let mut ranges = vec![GpaRange::new(Gpa::ZERO, Gpa::new(split))];
        let Some(mut rest) = len.checked_sub(split) else {
            return vec![GpaRange::new(Gpa::ZERO, Gpa::new(len))];
        };
        let mut at = GIB_4;
        if *self == Self::Firecracker {
            // arch/x86_64/layout.rs: a second hole of 256 GiB from 256 GiB.
            const ROOM: u64 = (256 << 30) - GIB_4;
            if let Some(above @ 1..) = rest.checked_sub(ROOM) {
                ranges.extend(GpaRange::with_len(Gpa::new(at), ROOM));
                rest = above;
                at = 512 << 30;
            }
        }
        ranges.extend(GpaRange::with_len(Gpa::new(at), rest));
        ranges
    }
}

impl fmt::Display for LayoutSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pc => f.pad("pc"),
            Self::Q35 => f.pad("q35"),
            Self::Firecracker => f.pad("firecracker"),
            Self::FirecrackerOld => f.pad("firecracker-old"),
            Self::Flat => f.pad("flat"),
            Self::Ranges(ranges) => write_ranges(f, ranges),
            Self::Blocks(blocks) => {
                for (index, block) in blocks.iter().enumerate() {
                    let semicolon = if index > 0 { ";" } else { "" };
                    write!(f, "{semicolon}{}=", block.name)?;
                    write_ranges(f, &block.ranges)?;
                }
                Ok(())
            }
        }
    }
}

/// Whether `ram`, what a guest could use as it booted, lies in `layout` and reaches the top of it.
#[must_use]
pub fn is_boot_ram(layout: &RamLayout, ram: &[GpaRange]) -> bool {
    let inside = ram
        .iter()
        .all(|range| layout.contains(range.start(), range.len()));
    let top = ram.iter().map(GpaRange::end).max();
    let reaches = match (layout.regions(), top) {
        // Firmware keeps memory at the top of the low part for itself, never of the high part.
        ([_], Some(top)) => layout.end().offset_from(top).is_some_and(|n| n < FIRMWARE),
        (_, Some(top)) => top == layout.end(),
        (_, None) => false,
    };
    inside && reaches
}

fn write_ranges(f: &mut fmt::Formatter<'_>, ranges: &[GpaRange]) -> fmt::Result {
    for (index, range) in ranges.iter().enumerate() {
        let comma = if index > 0 { "," } else { "" };
        write!(f, "{comma}{:#x}-{:#x}", range.start(), range.end())?;
    }
    Ok(())
}

impl FromStr for LayoutSpec {
    type Err = LayoutSpecError;

    fn from_str(text: &str) -> Result<Self, LayoutSpecError> {
        if let Some(known) = Self::KNOWN.iter().find(|known| known.to_string() == text) {
            return Ok(known.clone());
        }
        let unknown = || LayoutSpecError::Unknown { text: text.into() };
        if !text.contains('=') {
            let ranges = parse_ranges(text).ok_or_else(unknown)?;
            check_disjoint(&ranges)?;
            return Ok(Self::Ranges(ranges));
        }
        let mut blocks = Vec::new();
        for block in text.split(';') {
            // The last one: a name may hold a `=`, ranges do not.
            let (name, ranges) = block.rsplit_once('=').ok_or_else(unknown)?;
            let ranges = parse_ranges(ranges).ok_or_else(unknown)?;
            if name.is_empty() {
                return Err(unknown());
            }
            check_disjoint(&ranges)?;
            check_order(&ranges)?;
            blocks.push(BlockPlace::new(name, ranges));
        }
        Ok(Self::Blocks(blocks))
    }
}

fn parse_ranges(text: &str) -> Option<Vec<GpaRange>> {
    text.split(',').map(parse_range).collect()
}

/// Refuses ranges of which one lies in another. A raw file holds them in any order.
fn check_disjoint(ranges: &[GpaRange]) -> Result<(), LayoutSpecError> {
    let mut sorted = ranges.to_vec();
    sorted.sort_unstable();
    match first_that_overlap(&sorted) {
        Some((first, second)) => Err(LayoutSpecError::Overlap { first, second }),
        None => Ok(()),
    }
}

/// Refuses ranges that are not in the order in which QEMU's blocks hold theirs.
fn check_order(ranges: &[GpaRange]) -> Result<(), LayoutSpecError> {
    match first_that_overlap(ranges) {
        Some((first, second)) => Err(LayoutSpecError::Order { first, second }),
        None => Ok(()),
    }
}

/// The first range that ends behind the beginning of the one that follows it, and that one.
fn first_that_overlap(ranges: &[GpaRange]) -> Option<(GpaRange, GpaRange)> {
    let mut pairs = ranges.iter().copied().zip(ranges.iter().copied().skip(1));
    pairs.find(|(first, second)| first.end() > second.start())
}

/// `START-END`, END exclusive.
fn parse_range(text: &str) -> Option<GpaRange> {
    let (start, end) = text.split_once('-')?;
    let range = GpaRange::new(Gpa::new(parse_size(start)?), Gpa::new(parse_size(end)?));
    (!range.is_empty()).then_some(range)
}

/// A number, decimal or with `0x`, with an optional suffix K, M, G or T.
fn parse_size(text: &str) -> Option<u64> {
    let (digits, shift) = match text.char_indices().last()? {
        (at, 'K' | 'k') => (text.get(..at)?, 10),
        (at, 'M' | 'm') => (text.get(..at)?, 20),
        (at, 'G' | 'g') => (text.get(..at)?, 30),
        (at, 'T' | 't') => (text.get(..at)?, 40),
        _ => (text, 0),
    };
    let number = match digits.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok()?,
        None => digits.parse().ok()?,
    };
    number.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::{LayoutSpec, LayoutSpecError, is_boot_ram};
    use sonicshot::{Gpa, GpaRange, RamLayout};

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    fn range(start: u64, end: u64) -> GpaRange {
        GpaRange::new(Gpa::new(start), Gpa::new(end))
    }

    #[test]
    fn a_layout_fits_the_map_that_the_firmware_made_of_it() {
        let two = RamLayout::new(vec![range(0, 3 * GIB), range(4 * GIB, 5 * GIB)]).unwrap();
        let low = [range(0x1000, 0x9_f000), range(MIB, 3 * GIB - 0x2_6000)];
        let with = |end| [&low[..], &[range(4 * GIB, end)]].concat();
        assert!(is_boot_ram(&two, &with(5 * GIB)));
        // The high part is used to its end; nothing lies outside.
        assert!(!is_boot_ram(&two, &with(5 * GIB - 4096)));
        assert!(!is_boot_ram(&two, &with(6 * GIB)));
        assert!(!is_boot_ram(&two, &[]));
        let one = RamLayout::new(vec![range(0, 512 * MIB)]).unwrap();
        let reaching = |end| [range(0x1000, 0x9_f000), range(MIB, end)];
        assert!(is_boot_ram(&one, &reaching(512 * MIB - 0x2_6000)));
        assert!(
            !is_boot_ram(&one, &reaching(384 * MIB)),
            "of a smaller guest"
        );
        assert!(!is_boot_ram(&one, &reaching(513 * MIB)), "of a larger one");
    }

    /// File length, layout, and the ranges as `(start, end)`.
    #[test]
    fn every_layout_splits_where_its_vmm_does() {
        let gib = |n: u64| n << 30;
        let mib = |n: u64| n << 20;
        type Case<'a> = (&'a str, u64, &'a [(u64, u64)]);
        let table: [Case<'_>; 10] = [
            ("pc", gib(3), &[(0, gib(3))]),
            ("pc", mib(3583), &[(0, mib(3583))]),
            ("pc", mib(3584), &[(0, gib(3)), (gib(4), mib(4608))]),
            ("pc", gib(4), &[(0, gib(3)), (gib(4), gib(5))]),
            ("q35", mib(2815), &[(0, mib(2815))]),
            ("q35", gib(4), &[(0, gib(2)), (gib(4), gib(6))]),
            ("firecracker", gib(3), &[(0, gib(3))]),
            (
                "firecracker",
                gib(300),
                &[(0, gib(3)), (gib(4), gib(256)), (gib(512), gib(557))],
            ),
            (
                "firecracker-old",
                gib(4),
                &[(0, mib(3328)), (gib(4), mib(4864))],
            ),
            ("0-1G,0x80000000-3G", 0, &[(0, gib(1)), (gib(2), gib(3))]),
        ];
        for (name, len, want) in table {
            let spec: LayoutSpec = name.parse().unwrap();
            let got: Vec<_> = spec
                .ranges(len)
                .iter()
                .map(|r| (r.start().raw(), r.end().raw()))
                .collect();
            assert_eq!(got, want, "{name} {len:#x}");
        }
    }

    #[test]
    fn ranges_that_overlap_are_called_so() {
        for (text, said) in [
            (
                "0-2G,1G-3G",
                "the ranges 0x0..0x80000000 and 0x40000000..0xc0000000 overlap",
            ),
            (
                "1G-3G,0-2G",
                "the ranges 0x0..0x80000000 and 0x40000000..0xc0000000 overlap",
            ),
            (
                "0-1G,0-1G",
                "the ranges 0x0..0x40000000 and 0x0..0x40000000 overlap",
            ),
            (
                "ram0=0-2G,1G-3G",
                "the ranges 0x0..0x80000000 and 0x40000000..0xc0000000 overlap",
            ),
            (
                "ram0=2G-3G,0-1G",
                "the range 0x0..0x40000000 is given behind 0x80000000..0xc0000000",
            ),
            ("0-2G,1G", "`0-2G,1G` is not a layout"),
        ] {
            let error: LayoutSpecError = text.parse::<LayoutSpec>().unwrap_err();
            assert!(error.to_string().starts_with(said), "{text}: {error}");
        }
    }

    #[test]
    fn refuses_what_is_no_layout() {
        for text in [
            "",
            "pcx",
            "1-",
            "2G-1G",
            "0-0",
            "0-2G,1G-3G",
            "=0-1G",
            "ram0=",
            "ram0=0-1G;",
            "ram0=0-1G;1G-2G",
            "ram0=2G-3G,0-1G",
            "1G-3G,0-2G",
            "0-99999999999999T",
            "-",
        ] {
            assert!(text.parse::<LayoutSpec>().is_err(), "{text}");
        }
        for text in [
            "0-64K,1M-2M",
            "4G-5G,0-3G",
            "ram0=0-64K,1M-2M;0000:00:05.0/mem=1=4G-5G",
        ] {
            let spec: LayoutSpec = text.parse().unwrap();
            assert_eq!(spec.to_string().parse(), Ok(spec));
        }
    }
}
