//! A migration stream that is ours: as QEMU writes them, with a checkpoint's pages.
//!
//! QEMU 10.0.2's `migration/savevm.c` and `migration/ram.c` are what it follows; 7.2 and 11.1 read
//! the same.

use crate::record::DEVICES_START;
use crate::tables::RamBlock;
use std::io::{self, Write};

/// The number of the section with RAM. No section of a device has it: QEMU counts from 0.
const RAM_SECTION: u32 = 0x7fff_0000;
const RAM_VERSION: u32 = 4;
const SECTION_START: u8 = 1;
const SECTION_PART: u8 = 2;
const SECTION_END: u8 = 3;
const VM_END: u8 = 0;
const VM_DESCRIPTION: u8 = 6;
const CONFIGURATION: u8 = 7;
const COMMAND: u8 = 8;
const SECTION_FOOTER: u8 = 0x7e;

const FLAG_ZERO: u64 = 0x02;
const FLAG_MEM_SIZE: u64 = 0x04;
const FLAG_PAGE: u64 = 0x08;
const FLAG_EOS: u64 = 0x10;
const FLAG_CONTINUE: u64 = 0x20;

/// Pages in a stream, in bytes.
pub(crate) const PAGE: usize = 4096;
const PAGE_BYTES: u64 = 4096;

/// Writes a stream, part by part.
pub(crate) struct Stream<W> {
    out: W,
    /// The block of the last page.
    last: Option<String>,
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl<W: Write> Stream<W> {
    /// A stream into `out`, of a guest with this machine.
    pub(crate) fn begin(mut out: W, machine: &str) -> io::Result<Self> {
        let len = u32::try_from(machine.len()).map_err(io::Error::other)?;
        out.write_all(&DEVICES_START)?;
        out.write_all(&[CONFIGURATION])?;
        out.write_all(&len.to_be_bytes())?;
        out.write_all(machine.as_bytes())?;
        Ok(Self { out, last: None })
    }

    /// Parts of a stream, without its beginning.
    pub(crate) fn bare(out: W) -> Self {
        Self { out, last: None }
    }

    pub(crate) fn into_inner(self) -> W {
        self.out
    }

    pub(crate) fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)
    }

    /// A command to who reads the stream.
    pub(crate) fn command(&mut self, command: u16, body: &[u8]) -> io::Result<()> {
        let len = u16::try_from(body.len()).map_err(|_| invalid("a command that is too long"))?;
        self.out.write_all(&[COMMAND])?;
        self.out.write_all(&command.to_be_bytes())?;
        self.out.write_all(&len.to_be_bytes())?;
        self.out.write_all(body)
    }

    /// The head of RAM: its blocks, and how long each is.
    pub(crate) fn blocks<'b>(
        &mut self,
        blocks: impl Iterator<Item = &'b RamBlock> + Clone,
    ) -> io::Result<()> {
        self.all_blocks(blocks, false)
    }

    /// The same for a QEMU that was told of postcopy: of huge pages with their size.
    pub(crate) fn blocks_for_postcopy<'b>(
        &mut self,
        blocks: impl Iterator<Item = &'b RamBlock> + Clone,
    ) -> io::Result<()> {
        self.all_blocks(blocks, true)
    }

    fn all_blocks<'b>(
        &mut self,
        blocks: impl Iterator<Item = &'b RamBlock> + Clone,
        with_page_sizes: bool,
    ) -> io::Result<()> {
        self.out.write_all(&[SECTION_START])?;
        self.out.write_all(&RAM_SECTION.to_be_bytes())?;
        self.name("ram")?;
        self.out.write_all(&0_u32.to_be_bytes())?;
        self.out.write_all(&RAM_VERSION.to_be_bytes())?;
        let total = blocks
            .clone()
            .try_fold(0_u64, |sum, one| sum.checked_add(one.used));
        let total = total.filter(|total| total.is_multiple_of(PAGE_BYTES));
        let total = total.ok_or_else(|| invalid("blocks of no whole pages"))?;
        self.number(total | FLAG_MEM_SIZE)?;
        for block in blocks {
            self.name(&block.name)?;
            self.number(block.used)?;
            if with_page_sizes && block.page_size != PAGE_BYTES {
                self.number(block.page_size)?;
            }
        }
        self.number(FLAG_EOS)?;
        self.footer()
    }

    /// From here on come pages, the last ones.
    pub(crate) fn begin_pages(&mut self) -> io::Result<()> {
        self.begin_section(SECTION_END)
    }

    /// From here on come pages, before the last ones.
    pub(crate) fn begin_part(&mut self) -> io::Result<()> {
        self.begin_section(SECTION_PART)
    }

    fn begin_section(&mut self, kind: u8) -> io::Result<()> {
        self.out.write_all(&[kind])?;
        self.out.write_all(&RAM_SECTION.to_be_bytes())?;
        self.last = None;
        Ok(())
    }

    /// A page of a block.
    pub(crate) fn page(&mut self, block: &str, offset: u64, page: &[u8]) -> io::Result<()> {
        if page.len() != PAGE {
            return Err(invalid("a page of another length"));
        }
        self.place(block, offset, FLAG_PAGE)?;
        self.out.write_all(page)
    }

    /// A page of zeroes, where memory may hold something else.
    pub(crate) fn zero_page(&mut self, block: &str, offset: u64) -> io::Result<()> {
        self.place(block, offset, FLAG_ZERO)?;
        self.out.write_all(&[0])
    }

    fn place(&mut self, block: &str, offset: u64, flags: u64) -> io::Result<()> {
        if !offset.is_multiple_of(PAGE_BYTES) {
            return Err(invalid("a page that begins at no page"));
        }
        if self.last.as_deref() == Some(block) {
            return self.number(offset | flags | FLAG_CONTINUE);
        }
        self.number(offset | flags)?;
        self.name(block)?;
        self.last = Some(block.to_owned());
        Ok(())
    }

    /// No more pages.
    pub(crate) fn end_pages(&mut self) -> io::Result<()> {
        self.number(FLAG_EOS)?;
        self.footer()
    }

    /// The state of devices, as QEMU wrote it.
    pub(crate) fn devices(&mut self, state: &[u8]) -> io::Result<()> {
        let inside = device_sections(state).ok_or_else(|| invalid("no state of devices"))?;
        self.out.write_all(inside)
    }

    /// The end of pages that came as they were asked for.
    pub(crate) fn end_of_postcopy(&mut self) -> io::Result<()> {
        self.out.write_all(&[VM_END])?;
        self.out.flush()
    }

    /// The end: QEMU may let the guest run.
    pub(crate) fn end(mut self) -> io::Result<W> {
        self.out.write_all(&[VM_END])?;
        // Without a description QEMU says that there is none, as an error.
        self.out.write_all(&[VM_DESCRIPTION])?;
        self.out.write_all(&2_u32.to_be_bytes())?;
        self.out.write_all(b"{}")?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn footer(&mut self) -> io::Result<()> {
        self.out.write_all(&[SECTION_FOOTER])?;
        self.out.write_all(&RAM_SECTION.to_be_bytes())
    }

    fn name(&mut self, name: &str) -> io::Result<()> {
        let len = u8::try_from(name.len()).map_err(|_| invalid("a name that is too long"))?;
        self.out.write_all(&[len])?;
        self.out.write_all(name.as_bytes())
    }

    fn number(&mut self, number: u64) -> io::Result<()> {
        self.out.write_all(&number.to_be_bytes())
    }
}

/// The sections in what QEMU wrote of its devices.
pub(crate) fn device_sections(state: &[u8]) -> Option<&[u8]> {
    state.strip_prefix(&DEVICES_START)?.strip_suffix(&[VM_END])
}

#[cfg(test)]
mod tests {
    use super::{PAGE, Stream};
    use crate::tables::RamBlock;

    /// The bytes that a stream must have: written down from QEMU's own.
    #[test]
    fn a_stream_is_as_qemu_reads_it() {
        let block = |name: &str, used| RamBlock {
            name: name.into(),
            page_size: 4096,
            used,
            total: used,
            address: None,
        };
        let blocks = [block("pc.ram", 0x2000), block("b", 0x1000)];
        let mut stream = Stream::begin(Vec::new(), "pc-i440fx-10.0").unwrap();
        stream.blocks(blocks.iter()).unwrap();
        stream.begin_pages().unwrap();
        stream.page("pc.ram", 0, &[1; PAGE]).unwrap();
        stream.page("pc.ram", 0x1000, &[2; PAGE]).unwrap();
        stream.zero_page("b", 0).unwrap();
        stream.end_pages().unwrap();
        stream.devices(b"QEVM\0\0\0\x03DEVICES\0").unwrap();
        let found = stream.end().unwrap();
        let mut expected = Vec::new();
        expected.extend(b"QEVM\0\0\0\x03\x07\0\0\0\x0epc-i440fx-10.0");
        expected.extend(b"\x01\x7f\xff\0\0\x03ram\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\x30\x04");
        expected.extend(b"\x06pc.ram\0\0\0\0\0\0\x20\0\x01b\0\0\0\0\0\0\x10\0");
        expected.extend(b"\0\0\0\0\0\0\0\x10\x7e\x7f\xff\0\0");
        expected.extend(b"\x03\x7f\xff\0\0\0\0\0\0\0\0\0\x08\x06pc.ram");
        expected.extend([1; PAGE]);
        expected.extend(b"\0\0\0\0\0\0\x10\x28");
        expected.extend([2; PAGE]);
        expected.extend(b"\0\0\0\0\0\0\0\x02\x01b\0");
        expected.extend(b"\0\0\0\0\0\0\0\x10\x7e\x7f\xff\0\0DEVICES\0\x06\0\0\0\x02{}");
        assert_eq!(found, expected);
    }

    #[test]
    fn what_is_no_page_is_refused() {
        let mut stream = Stream::begin(Vec::new(), "pc").unwrap();
        assert!(stream.page("x", 1, &[0; PAGE]).is_err());
        assert!(stream.page("x", 0, &[0; PAGE - 1]).is_err());
        assert!(stream.page(&"x".repeat(256), 0, &[0; PAGE]).is_err());
        for wrong in [&b""[..], b"QEVM\0\0\0\x02\0", b"QEVM\0\0\0\x03x"] {
            assert!(stream.devices(wrong).is_err());
        }
    }
}
