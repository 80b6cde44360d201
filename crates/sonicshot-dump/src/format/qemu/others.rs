//! The sections of a migration file that come in parts beside those of the memory: the bitmaps of
//! disks (`migration/block-dirty-bitmap.c`), disks themselves (`migration/block.c`, until QEMU
//! 9.0), devices of the host (`hw/vfio/migration.c`).
//!
//! None of them tells its length, so that each is gone through by its own format.

use crate::DumpError;
use crate::format::qemu::wire::{Cursor, SECTION_END, SECTION_PART, SECTION_START};
use sonicshot::FileOffset;

/// No machine has more of them.
const MAX_OTHERS: usize = 1024;

/// Of a record of a bitmap: what is in it.
const BITMAP_END: u32 = 0x01;
const BITMAP_ZEROES: u32 = 0x02;
const BITMAP_NAME: u32 = 0x04;
const BITMAP_DEVICE: u32 = 0x08;
const BITMAP_START: u32 = 0x10;
const BITMAP_COMPLETE: u32 = 0x20;
const BITMAP_BITS: u32 = 0x40;

/// Of a record of a disk: what is in it, beside the sector's address.
const DISK_BLOCK: u64 = 0x01;
const DISK_END: u64 = 0x02;
const DISK_ZERO: u64 = 0x08;
const DISK_BLOCK_LEN: u64 = 1 << 20;

/// The marks in the records of a device of the host.
const HOST_END: u64 = 0xffff_ffff_ef10_0001;
const HOST_SETUP: u64 = 0xffff_ffff_ef10_0003;
const HOST_DATA: u64 = 0xffff_ffff_ef10_0004;
const HOST_FIRST_SENT: u64 = 0xffff_ffff_ef10_0005;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Bitmaps,
    Disks,
    HostDevice,
}

impl Kind {
    fn named(name: &str) -> Option<Self> {
        match name {
            "dirty-bitmap" => Some(Self::Bitmaps),
            "block" => Some(Self::Disks),
            _ if name == "vfio" || name.ends_with("/vfio") => Some(Self::HostDevice),
            _ => None,
        }
    }

    fn pass(self, cursor: &mut Cursor<'_>) -> Result<(), DumpError> {
        match self {
            Self::Bitmaps => pass_bitmaps(cursor),
            Self::Disks => pass_disks(cursor),
            Self::HostDevice => pass_host_device(cursor),
        }
    }
}

/// A section that has begun.
#[derive(Debug, Clone, Copy)]
struct Begun {
    number: u32,
    kind: Kind,
    /// Its offset, for a file is gone through more than once.
    at: FileOffset,
}

/// The sections that have begun: each part tells only the number of its section.
#[derive(Debug, Clone, Default)]
pub(crate) struct Others {
    begun: Vec<Begun>,
    /// The number of the memory's section, once it has begun.
    memory: Option<u32>,
    /// The number of parts that were passed over.
    pub passed: u64,
}

impl Others {
    /// None.
    pub(crate) const fn new() -> Self {
        Self {
            begun: Vec::new(),
            memory: None,
            passed: 0,
        }
    }

    /// The memory's section begins with this number; `false` if that is another's.
    pub(crate) fn begin_memory(&mut self, number: u32) -> bool {
        self.memory = Some(number);
        self.begun(number).is_none()
    }

    /// Passes over the next part, if it is of one of them; `false` if it is not.
    pub(crate) fn pass(&mut self, cursor: &mut Cursor<'_>) -> Result<bool, DumpError> {
        let mut ahead = cursor.clone();
        let part = ahead.be::<u8>()?;
        let number = ahead.be::<u32>()?;
        let kind = match part {
            SECTION_START => {
                let name = ahead.name()?;
                ahead.bytes::<8>()?; // instance, version
                let Some(kind) = Kind::named(&name) else {
                    return Ok(false);
                };
                self.begin(number, kind, &ahead, cursor.at())?;
                kind
            }
            SECTION_PART | SECTION_END => match self.begun(number) {
                Some(begun) => begun.kind,
                None => return Ok(false),
            },
            _ => return Ok(false),
        };
        kind.pass(&mut ahead)?;
        ahead.footer(number)?;
        let passed = self.passed.checked_add(1);
        self.passed =
            passed.ok_or_else(|| cursor.malformed("sections without end", number.into()))?;
        *cursor = ahead;
        Ok(true)
    }

    /// Takes up the section that begins at `at`. QEMU gives each a number of its own.
    fn begin(
        &mut self,
        number: u32,
        kind: Kind,
        cursor: &Cursor<'_>,
        at: FileOffset,
    ) -> Result<(), DumpError> {
        let before = self.begun(number);
        if before.is_some_and(|before| before.at == at && before.kind == kind) {
            return Ok(());
        }
        if before.is_some() || self.memory == Some(number) {
            let what = "a section with the number of another";
            return Err(cursor.malformed(what, number.into()));
        }
        if self.begun.len() >= MAX_OTHERS {
            return Err(cursor.malformed("invalid number of sections", 0));
        }
        self.begun.push(Begun { number, kind, at });
        Ok(())
    }

    fn begun(&self, number: u32) -> Option<Begun> {
        let mut known = self.begun.iter();
        known.find(|known| known.number == number).copied()
    }
}

/// Each turn reads a byte at least, so that this ends with the file.
fn pass_bitmaps(cursor: &mut Cursor<'_>) -> Result<(), DumpError> {
    loop {
        // One byte, two, or four: the highest bit of the first and of the second says.
        let mut flags = u32::from(cursor.be::<u8>()?);
        if flags & 0x80 != 0 {
            flags = flags << 8 | u32::from(cursor.be::<u8>()?);
            if flags & 0x80 != 0 {
                flags = flags << 16 | u32::from(cursor.be::<u16>()?);
            }
        }
        for name in [BITMAP_DEVICE, BITMAP_NAME] {
            if flags & name != 0 {
                cursor.name()?;
            }
        }
        if flags & BITMAP_START != 0 {
            cursor.bytes::<5>()?; // granularity, flags
        } else if flags & BITMAP_COMPLETE == 0 && flags & BITMAP_BITS != 0 {
            cursor.bytes::<12>()?; // first sector, sectors
            if flags & BITMAP_ZEROES == 0 {
                let len = cursor.be::<u64>()?;
                cursor.skip(len)?;
            }
        }
        if flags & BITMAP_END != 0 {
            return Ok(());
        }
    }
}

fn pass_disks(cursor: &mut Cursor<'_>) -> Result<(), DumpError> {
    loop {
        let word = cursor.be::<u64>()?;
        if word & DISK_BLOCK != 0 {
            cursor.name()?;
            if word & DISK_ZERO == 0 {
                cursor.skip(DISK_BLOCK_LEN)?;
            }
        }
        if word & DISK_END != 0 {
            return Ok(());
        }
    }
}

fn pass_host_device(cursor: &mut Cursor<'_>) -> Result<(), DumpError> {
    loop {
        match cursor.be::<u64>()? {
            HOST_SETUP => {}
            HOST_DATA => {
                let len = cursor.be::<u64>()?;
                cursor.skip(len)?;
            }
            HOST_END | HOST_FIRST_SENT => return Ok(()),
            other => return Err(cursor.malformed("invalid state of a device of the host", other)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Others;
    use crate::format::qemu::wire::Cursor;
    use sonicshot::FileOffset;
    use std::path::Path;

    fn section(kind: u8, number: u32, name: Option<&str>, content: &[u8]) -> Vec<u8> {
        let mut out = vec![kind];
        out.extend(number.to_be_bytes());
        if let Some(name) = name {
            out.push(u8::try_from(name.len()).unwrap());
            out.extend(name.as_bytes());
            out.extend([0, 0, 0, 0, 0, 0, 0, 1]);
        }
        out.extend(content);
        out.push(0x7e);
        out.extend(number.to_be_bytes());
        out
    }

    #[test]
    fn sections_in_parts_are_passed_over() {
        let mut bits = vec![0x4c];
        bits.extend(b"\x04disk\x03map");
        bits.extend([0; 8]);
        bits.extend([0, 0, 8, 0]);
        bits.extend([0, 0, 0, 0, 0, 0, 0, 3, 1, 2, 3]);
        // Two bytes of flags, of bits that are zero.
        bits.extend([0x80, 0x42]);
        bits.extend([0; 12]);
        bits.push(1);
        let mut disk = (512_u64 | 9).to_be_bytes().to_vec();
        disk.extend(b"\x03hda");
        disk.extend((1024_u64 | 1).to_be_bytes());
        disk.extend(b"\x03hda");
        disk.extend(vec![7; 1 << 20]);
        disk.extend([0, 0, 0, 0, 0, 0, 0, 6]);
        let mut device = 0xffff_ffff_ef10_0004_u64.to_be_bytes().to_vec();
        device.extend([0, 0, 0, 0, 0, 0, 0, 2, 9, 9]);
        device.extend(0xffff_ffff_ef10_0001_u64.to_be_bytes());
        let setup = [0xffff_ffff_ef10_0003_u64, 0xffff_ffff_ef10_0001].map(u64::to_be_bytes);
        let parts = [
            section(
                1,
                3,
                Some("dirty-bitmap"),
                b"\x1c\x04disk\x03map\0\x01\0\0\x03\x01",
            ),
            section(1, 1, Some("block"), &[0, 0, 0, 0, 0, 0, 0, 2]),
            section(1, 9, Some("0000:00:05.0/vfio"), setup.as_flattened()),
            section(2, 3, None, &bits),
            section(2, 1, None, &disk),
            section(3, 9, None, &device),
            section(3, 3, None, b"\x20\x01"),
        ];
        let all = parts.concat();
        let path = Path::new("stream");
        for len in 0..all.len().min(400) {
            let mut cursor = Cursor::new(path, (&all[..len]).into(), FileOffset::ZERO);
            let mut others = Others::default();
            while others.pass(&mut cursor).is_ok_and(|passed| passed) {}
        }
        let mut cursor = Cursor::new(path, all.as_slice().into(), FileOffset::ZERO);
        let mut others = Others::default();
        for _ in &parts {
            assert!(others.pass(&mut cursor).unwrap());
        }
        assert!(cursor.peek().is_none());
        let mut many = Others::default();
        let passed = (0..1025_u32).map(|number| {
            let one = section(1, number, Some("block"), &[0, 0, 0, 0, 0, 0, 0, 2]);
            many.pass(&mut Cursor::new(
                path,
                one.as_slice().into(),
                FileOffset::ZERO,
            ))
        });
        assert_eq!(
            passed.filter(|passed| matches!(passed, Ok(true))).count(),
            1024
        );
        // A number is one section's alone, and the memory's is not theirs.
        let first = section(1, 7, Some("block"), &[0, 0, 0, 0, 0, 0, 0, 2]);
        let twice = [&first[..], &first].concat();
        let mut others = Others::default();
        let mut cursor = Cursor::new(path, twice.as_slice().into(), FileOffset::ZERO);
        assert!(others.pass(&mut cursor.clone()).unwrap());
        assert!(others.pass(&mut cursor).unwrap());
        assert!(others.pass(&mut cursor).is_err());
        assert!(!others.begin_memory(7));
        let mut others = Others::default();
        assert!(others.begin_memory(7));
        let mut cursor = Cursor::new(path, twice.as_slice().into(), FileOffset::ZERO);
        assert!(others.pass(&mut cursor).is_err());
        // Those of the memory, of a device, and of what never began.
        for other in [
            section(1, 2, Some("ram"), &[]),
            section(2, 2, None, &[]),
            section(4, 2, Some("dirty-bitmap"), &[]),
        ] {
            let mut cursor = Cursor::new(path, other.as_slice().into(), FileOffset::ZERO);
            assert!(!others.pass(&mut cursor).unwrap());
        }
    }
}
