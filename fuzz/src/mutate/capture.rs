//! A real guest's memory in this process, changes on top of it, and what was read of it.

use sonicshot::{Gpa, GpaRange, GuestBytes, GuestMemory, Mapped, MemoryError, Pfn, RamLayout};
use sonicshot_dump::{Dump, LayoutSpec};
use std::collections::BTreeMap;
use std::error::Error;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::sync::{Mutex, PoisonError, RwLock};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const PAGE: usize = 4096;
const PAGE_BYTES: u64 = 4096;

/// Bits of `/proc/kpageflags` (`include/uapi/linux/kernel-page-flags.h`).
pub const KPF_BUDDY: u64 = 1 << 10;
pub const KPF_OFFLINE: u64 = 1 << 23;
/// Bits that a page in use has: LRU, SLAB, MMAP, ANON, COMPOUND_HEAD, COMPOUND_TAIL, HUGE, THP,
/// PGTABLE, RESERVED.
pub const KPF_IN_USE: u64 =
    1 << 5 | 1 << 7 | 1 << 11 | 1 << 12 | 1 << 15 | 1 << 16 | 1 << 17 | 1 << 22 | 1 << 26 | 1 << 32;

/// The memory of a guest that was stopped, and what its own kernel said of each frame just before.
pub struct Capture {
    pub name: String,
    layout: RamLayout,
    regions: Vec<(Gpa, Vec<u8>)>,
    /// `/proc/kpageflags` by frame; empty if the capture has none.
    pub kpageflags: Vec<u64>,
}

impl Capture {
    /// Loads a folder of the lab, or one of `testdata`: `ram.raw`, `ram.raw.zst` or `dump.elf`,
    /// and `kpageflags.bin`, also compressed.
    pub fn load(folder: &Path) -> Result<Self> {
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        let flags = read_file(folder, "kpageflags.bin")?.unwrap_or_default();
        let kpageflags = flags
            .chunks_exact(8)
            .map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default()))
            .collect();
        let regions = match read_file(folder, "ram.raw")? {
            Some(ram) => vec![(Gpa::ZERO, ram)],
            None => of_dump(&folder.join("dump.elf"))?,
        };
        let ranges = regions.iter().map(|(at, bytes)| range(*at, bytes.len()));
        Ok(Self {
            name: name.into_owned(),
            layout: RamLayout::new(ranges.collect())?,
            regions,
            kpageflags,
        })
    }

    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// The bytes from `at`, if all of them are RAM.
    pub fn bytes(&self, at: Gpa, len: usize) -> Option<&[u8]> {
        let above = self.regions.partition_point(|(start, _)| *start <= at);
        let (start, bytes) = self.regions.get(above.checked_sub(1)?)?;
        let offset = usize::try_from(at.offset_from(*start)?).ok()?;
        bytes.get(offset..offset.checked_add(len)?)
    }

    /// The kernel's flags of a frame; 0 if it has none.
    pub fn flags(&self, pfn: Pfn) -> u64 {
        let index = usize::try_from(pfn.raw()).unwrap_or(usize::MAX);
        self.kpageflags.get(index).copied().unwrap_or(0)
    }

    /// The first place, page by page, at which `text` stands.
    pub fn find_page(&self, text: &[u8]) -> Option<Gpa> {
        self.regions.iter().find_map(|(start, bytes)| {
            let page = bytes
                .chunks(PAGE)
                .position(|page| page.starts_with(&text[..text.len().min(PAGE)]))?;
            start.checked_add(page as u64 * PAGE_BYTES)
        })
    }
}

fn range(at: Gpa, len: usize) -> GpaRange {
    GpaRange::with_len(at, len as u64).unwrap_or(GpaRange::new(at, at))
}

fn read_file(folder: &Path, name: &str) -> Result<Option<Vec<u8>>> {
    let plain = folder.join(name);
    if plain.exists() {
        return Ok(Some(fs::read(plain)?));
    }
    let packed = folder.join(format!("{name}.zst"));
    if !packed.exists() {
        return Ok(None);
    }
    let mut reader = zstd::stream::read::Decoder::new(File::open(packed)?)?;
    reader.window_log_max(31)?;
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes)?;
    Ok(Some(bytes))
}

fn of_dump(path: &Path) -> Result<Vec<(Gpa, Vec<u8>)>> {
    let dump = Dump::open(path, None::<&LayoutSpec>)?;
    let mut regions = Vec::new();
    for region in dump.layout().regions() {
        let mut bytes = vec![0; usize::try_from(region.len())?];
        dump.read(region.start(), &mut bytes)?;
        regions.push((region.start(), bytes));
    }
    Ok(regions)
}

/// A change of a few bytes of guest memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    pub at: Gpa,
    pub bytes: Vec<u8>,
}

/// The parts of guest memory that were read: ranges and single words.
#[derive(Debug, Default, Clone)]
pub struct Reads {
    /// By start: the longest read from there.
    pub reads: BTreeMap<u64, usize>,
}

/// A capture with changes on top: pages that differ are copies, all others are the capture's own.
pub struct Overlay<'c> {
    capture: &'c Capture,
    changed: RwLock<BTreeMap<u64, Box<[u8; PAGE]>>>,
    /// A record of the reads; with it nothing is mapped, for the reads of a mapping are not known.
    trace: Option<Mutex<Reads>>,
}

impl<'c> Overlay<'c> {
    pub fn new(capture: &'c Capture) -> Self {
        Self {
            capture,
            changed: RwLock::default(),
            trace: None,
        }
    }

    pub fn traced(capture: &'c Capture) -> Self {
        Self {
            trace: Some(Mutex::default()),
            ..Self::new(capture)
        }
    }

    /// The reads since this was last asked.
    pub fn take_reads(&self) -> Reads {
        let Some(trace) = &self.trace else {
            return Reads::default();
        };
        std::mem::take(&mut *trace.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Puts `changes` in the place of those that were there.
    pub fn set(&self, changes: &[Change]) {
        let mut changed = self.changed.write().unwrap_or_else(PoisonError::into_inner);
        changed.clear();
        for change in changes {
            for (offset, byte) in (0_u64..).zip(&change.bytes) {
                let at = change.at.raw() + offset;
                let page = at & !(PAGE_BYTES - 1);
                let Some(old) = self.capture.bytes(Gpa::new(page), PAGE) else {
                    continue;
                };
                let copy = changed.entry(page).or_insert_with(|| {
                    let mut copy = Box::new([0; PAGE]);
                    copy.copy_from_slice(old);
                    copy
                });
                copy[usize::try_from(at - page).unwrap_or(0)] = *byte;
            }
        }
    }

    fn first_changed(&self, at: Gpa, len: usize) -> bool {
        let changed = self.changed.read().unwrap_or_else(PoisonError::into_inner);
        let first = at.raw() & !(PAGE_BYTES - 1);
        changed
            .range(first..at.raw().saturating_add(len as u64))
            .next()
            .is_some()
    }

    fn not_ram(at: Gpa, len: usize) -> MemoryError {
        MemoryError::NotRam {
            range: range(at, len),
        }
    }
}

impl GuestMemory for Overlay<'_> {
    fn layout(&self) -> &RamLayout {
        &self.capture.layout
    }

    fn read(&self, at: Gpa, buf: &mut [u8]) -> std::result::Result<(), MemoryError> {
        let bytes = self.capture.bytes(at, buf.len());
        buf.copy_from_slice(bytes.ok_or_else(|| Self::not_ram(at, buf.len()))?);
        if let Some(trace) = &self.trace {
            let mut trace = trace.lock().unwrap_or_else(PoisonError::into_inner);
            let longest = trace.reads.entry(at.raw()).or_default();
            *longest = buf.len().max(*longest);
        }
        let changed = self.changed.read().unwrap_or_else(PoisonError::into_inner);
        if changed.is_empty() {
            return Ok(());
        }
        let end = at.raw() + buf.len() as u64;
        for (page, bytes) in changed.range(at.raw() & !(PAGE_BYTES - 1)..end) {
            let from = at.raw().max(*page);
            let to = end.min(page + PAGE_BYTES);
            let place = |start: u64| {
                let offset = |at: u64| usize::try_from(at - start).unwrap_or(usize::MAX);
                offset(from)..offset(to)
            };
            buf[place(at.raw())].copy_from_slice(&bytes[place(*page)]);
        }
        Ok(())
    }

    fn map(&self, at: Gpa, len: usize) -> std::result::Result<Option<Mapped<'_>>, MemoryError> {
        let bytes = self.capture.bytes(at, len);
        let bytes = bytes.ok_or_else(|| Self::not_ram(at, len))?;
        if self.trace.is_some() || self.first_changed(at, len) {
            return Ok(None);
        }
        Ok(Some(Mapped::borrowed(GuestBytes::from_slice(bytes))))
    }
}
