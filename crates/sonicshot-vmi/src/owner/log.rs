//! The kernel's log (`kernel/printk/printk_ringbuffer.h`, since 5.10), which VMCOREINFO tells all of:
//! what a kernel without types says of its start and its end. Where there is no VMCOREINFO the log is
//! found by its shape, which is the same in all of them.

use sonicshot::{to_u64, to_usize};
mod shape;

use crate::deadline::Deadline;
use crate::error::VmiError;
use crate::kernel::{Kernel, element};
use crate::{AddressSpace, KernelVa, VirtualMemory};

/// A line of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Line {
    /// Its number since the kernel's start.
    pub seq: u64,
    /// The time at which it was written, in nanoseconds since the kernel's start.
    pub time: u64,
    /// Whether it is of a device: no process can write one.
    pub of_device: bool,
    pub text: String,
}

/// `CONFIG_LOG_BUF_SHIFT` is 25 at most, and a descriptor is for at least 32 bytes.
const MAX_LINES: u64 = 1 << 20;
/// As much of a line is read.
const MAX_TEXT: u64 = 512;

/// Whether a log may have so many descriptors, and so much room for text.
fn may_be(lines: Option<u64>, size_bits: u32) -> bool {
    lines.is_some_and(|lines| lines <= MAX_LINES) && size_bits < 32
}

/// The bytes that are read of a text of this length, which has 16 bits.
fn read_of_text(len: u32) -> u64 {
    u64::from(len & 0xffff).min(MAX_TEXT)
}

/// The ring's parts, by VMCOREINFO.
struct Ring<'k, 'm> {
    kernel: &'k Kernel<'m>,
    descs: KernelVa,
    infos: KernelVa,
    data: KernelVa,
    count_bits: u32,
    size_bits: u32,
    /// The identifiers of the newest line and of the oldest.
    head: u64,
    tail: u64,
    places: Places,
    /// The guest says how many lines there are.
    deadline: Deadline,
}

/// The offsets of the words of a line.
struct Places {
    desc_size: u64,
    state: u64,
    begin: u64,
    next: u64,
    info_size: u64,
    text_len: u64,
    device: u64,
    seq: u64,
    time: u64,
}

impl Places {
    fn of(kernel: &Kernel<'_>) -> Result<Self, VmiError> {
        const DESC: &str = "prb_desc";
        const INFO: &str = "printk_info";
        let block = offset(kernel, DESC, "text_blk_lpos")?;
        let in_block = |name| {
            let inside = offset(kernel, "prb_data_blk_lpos", name)?;
            block.checked_add(inside).ok_or_else(|| VmiError::Missing {
                what: format!("prb_data_blk_lpos.{name}"),
                sources: "VMCOREINFO".into(),
            })
        };
        Ok(Self {
            desc_size: size(kernel, DESC)?,
            state: offset(kernel, DESC, "state_var")?,
            begin: in_block("begin")?,
            next: in_block("next")?,
            info_size: size(kernel, INFO)?,
            text_len: offset(kernel, INFO, "text_len")?,
            // `dev_printk_info.subsystem` is its first member.
            device: offset(kernel, INFO, "dev_info")?,
            seq: offset(kernel, INFO, "seq")?,
            time: offset(kernel, INFO, "ts_nsec")?,
        })
    }
}

/// Calls `each` with every line that the log still has, the oldest first, until it returns `false`.
/// They are not held: the guest says how many there are.
///
/// # Errors
/// [`VmiError::Missing`] if VMCOREINFO does not tell of it, [`VmiError::Corrupt`] if it is none,
/// and what reading gives.
pub(crate) fn lines(
    kernel: &Kernel<'_>,
    each: &mut dyn FnMut(Line) -> bool,
) -> Result<(), VmiError> {
    let ring = match kernel.vmcoreinfo {
        Some(_) => Ring::told(kernel)?,
        None => shape::ring(kernel)?,
    };
    ring.lines(each)
}

/// Of `prb_desc.state_var` what is the identifier; above is the state.
const ID: u64 = u64::MAX >> 2;

/// The identifier behind `id`: they count modulo 2^62.
const fn id_after(id: u64) -> u64 {
    id.wrapping_add(1) & ID
}

/// The number of identifiers from one up to another.
const fn ids_between(from: u64, to: u64) -> u64 {
    to.wrapping_sub(from) & ID
}

/// `desc_committed` and `desc_finalized`: the line is whole.
const WHOLE: core::ops::RangeInclusive<u64> = 1..=2;

impl<'k, 'm> Ring<'k, 'm> {
    /// By VMCOREINFO.
    fn told(kernel: &'k Kernel<'m>) -> Result<Self, VmiError> {
        const RING: &str = "printk_ringbuffer";
        let variable = told(kernel, "symbol prb", |info| info.symbol("prb"))?;
        let ring = kernel.read_ptr("prb", variable)?;
        let part = |name: &str| element(RING, ring, 0, 0, offset(kernel, RING, name)?);
        let (descs, data) = (part("desc_ring")?, part("text_data_ring")?);
        let of_descs = |name| element(RING, descs, 0, 0, offset(kernel, "prb_desc_ring", name)?);
        let of_data = |name| element(RING, data, 0, 0, offset(kernel, "prb_data_ring", name)?);
        let count_bits = kernel.read_u32("prb_desc_ring.count_bits", of_descs("count_bits")?)?;
        let size_bits = kernel.read_u32("prb_data_ring.size_bits", of_data("size_bits")?)?;
        let too_many = VmiError::Corrupt {
            what: "prb_desc_ring.count_bits",
            at: descs,
            value: count_bits.into(),
        };
        let lines = 1_u64.checked_shl(count_bits);
        if !may_be(lines, size_bits) {
            return Err(too_many);
        }
        let head = kernel.read_u64("prb_desc_ring.head_id", of_descs("head_id")?)?;
        let tail = kernel.read_u64("prb_desc_ring.tail_id", of_descs("tail_id")?)?;
        Ok(Self {
            kernel,
            descs: kernel.read_ptr("prb_desc_ring.descs", of_descs("descs")?)?,
            infos: kernel.read_ptr("prb_desc_ring.infos", of_descs("infos")?)?,
            data: kernel.read_ptr("prb_data_ring.data", of_data("data")?)?,
            count_bits,
            size_bits,
            head,
            tail,
            places: Places::of(kernel)?,
            deadline: Deadline::new(),
        })
    }

    /// Every line, oldest first, until `each` returns `false`.
    fn lines(&self, each: &mut dyn FnMut(Line) -> bool) -> Result<(), VmiError> {
        self.lines_by_id(&mut |_, line| each(line))
    }

    /// The same, with each line's identifier.
    fn lines_by_id(&self, each: &mut dyn FnMut(u64, Line) -> bool) -> Result<(), VmiError> {
        /// So many are looked at between two looks at the clock.
        const STEP: u64 = 1 << 10;
        let mut windows = Windows::new(self.kernel);
        let mut id = self.tail;
        let count = 1_u64.unbounded_shl(self.count_bits);
        for number in 0..count {
            if number.is_multiple_of(STEP) {
                self.deadline
                    .check("lines of the kernel's log", number, count)?;
            }
            let line = self.line(&mut windows, id)?;
            let goes_on = line.is_none_or(|line| each(id, line));
            if id == self.head || !goes_on {
                break;
            }
            id = id_after(id);
        }
        Ok(())
    }

    /// The line that the descriptor with this identifier is of, if it is whole.
    fn line(&self, from: &mut Windows<'_, '_>, id: u64) -> Result<Option<Line>, VmiError> {
        let Windows { descs, infos, data } = from;
        let places = &self.places;
        let mask = |bits: u32| !u64::MAX.unbounded_shl(bits);
        let index = id & mask(self.count_bits);
        let mut desc = |what, offset| {
            descs.u64(
                what,
                element(what, self.descs, index, places.desc_size, offset)?,
            )
        };
        let info = |what, offset| element(what, self.infos, index, places.info_size, offset);
        let state = desc("prb_desc.state_var", places.state)?;
        let begin = desc("prb_desc.text_blk_lpos.begin", places.begin)?;
        let next = desc("prb_desc.text_blk_lpos.next", places.next)?;
        // A line without text has an odd place.
        if state & ID != id || !WHOLE.contains(&(state >> 62)) || begin & 1 != 0 {
            return Ok(None);
        }
        // A block that does not fit behind the last begins the ring anew.
        let is_at_begin = begin >> self.size_bits != next >> self.size_bits;
        let at = if is_at_begin {
            0
        } else {
            begin & mask(self.size_bits)
        };
        let what = "printk_info.text_len";
        let len = infos.array(what, info(what, places.text_len)?)?;
        let len = read_of_text(u32::from_le_bytes(len));
        // Before the text stands the descriptor's identifier.
        let block = element("the log's text", self.data, 0, 0, at)?;
        if data.u64("the log's text", block)? != id {
            return Ok(None);
        }
        let at = element("the log's text", block, 0, 0, 8)?;
        let text = data.part("the log's text", at, to_usize(len))?;
        let text = String::from_utf8_lossy(text).into_owned();
        let what = "printk_info.dev_info";
        let device: [u8; 1] = infos.array(what, info(what, places.device)?)?;
        let (seq, time) = ("printk_info.seq", "printk_info.ts_nsec");
        Ok(Some(Line {
            seq: infos.u64(seq, info(seq, places.seq)?)?,
            time: infos.u64(time, info(time, places.time)?)?,
            of_device: device != [0],
            text,
        }))
    }
}

/// The last window that was read of each part of the log: lines follow each other.
struct Windows<'k, 'm> {
    descs: Window<'k, 'm>,
    infos: Window<'k, 'm>,
    data: Window<'k, 'm>,
}

impl<'k, 'm> Windows<'k, 'm> {
    fn new(kernel: &'k Kernel<'m>) -> Self {
        let window = || Window {
            space: &kernel.space,
            at: KernelVa::new(0),
            bytes: Vec::new(),
        };
        Self {
            descs: window(),
            infos: window(),
            data: window(),
        }
    }
}

/// A piece of kernel memory that is read at once, and given out in parts.
struct Window<'k, 'm> {
    space: &'k AddressSpace<'m>,
    at: KernelVa,
    bytes: Vec<u8>,
}

impl Window<'_, '_> {
    /// So many bytes are read at once, where they are mapped.
    const LEN: usize = 16 << 10;

    /// The `len` bytes at `at`.
    fn part(&mut self, what: &'static str, at: KernelVa, len: usize) -> Result<&[u8], VmiError> {
        if self.place(at, len).is_none() {
            self.at = at;
            self.bytes.resize(len.max(Self::LEN), 0);
            if self.space.read(at, &mut self.bytes).is_err() {
                self.bytes.resize(len, 0);
                let read = self.space.read(at, &mut self.bytes);
                read.inspect_err(|_| self.bytes.clear())
                    .map_err(VmiError::read(what))?;
            }
        }
        let part = self.place(at, len);
        part.and_then(|part| self.bytes.get(part))
            .ok_or(VmiError::Corrupt {
                what,
                at,
                value: to_u64(len),
            })
    }

    /// The range of the window that has the `len` bytes at `at`, if it has all.
    fn place(&self, at: KernelVa, len: usize) -> Option<core::ops::Range<usize>> {
        let start = usize::try_from(at.offset_from(self.at)?).ok()?;
        let end = start.checked_add(len)?;
        (end <= self.bytes.len()).then_some(start..end)
    }

    fn array<const N: usize>(
        &mut self,
        what: &'static str,
        at: KernelVa,
    ) -> Result<[u8; N], VmiError> {
        let bytes = self.part(what, at, N)?.first_chunk::<N>().copied();
        bytes.ok_or(VmiError::Corrupt { what, at, value: 0 })
    }

    fn u64(&mut self, what: &'static str, at: KernelVa) -> Result<u64, VmiError> {
        self.array(what, at).map(u64::from_le_bytes)
    }
}

/// The answer of VMCOREINFO.
fn told<T>(
    kernel: &Kernel<'_>,
    what: &str,
    ask: impl FnOnce(&crate::symbols::Vmcoreinfo) -> Option<T>,
) -> Result<T, VmiError> {
    let found = kernel.vmcoreinfo.as_ref().and_then(ask);
    found.ok_or_else(|| VmiError::Missing {
        what: what.into(),
        sources: "VMCOREINFO".into(),
    })
}

fn offset(kernel: &Kernel<'_>, ty: &str, name: &str) -> Result<u64, VmiError> {
    let path = format!("{ty}.{name}");
    told(kernel, &path, |info| info.offset(&path))
}

fn size(kernel: &Kernel<'_>, ty: &str) -> Result<u64, VmiError> {
    told(kernel, ty, |info| info.size(ty))
}

#[cfg(test)]
mod tests {
    use super::{MAX_LINES, MAX_TEXT, may_be, read_of_text};

    #[test]
    fn a_log_is_no_longer_than_any_nor_is_a_line() {
        for (lines, size_bits, is_one) in [
            (Some(MAX_LINES), 31, true),
            (Some(MAX_LINES + 1), 31, false),
            (Some(16), 32, false),
            (None, 16, false),
        ] {
            assert_eq!(may_be(lines, size_bits), is_one, "{lines:?} {size_bits}");
        }
        for (len, read) in [(0, 0), (512, MAX_TEXT), (513, MAX_TEXT), (0x1_0007, 7)] {
            assert_eq!(read_of_text(len), read, "{len:#x}");
        }
    }
}
