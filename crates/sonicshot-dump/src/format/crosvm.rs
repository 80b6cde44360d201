//! crosvm's snapshots: guest RAM in one file, and what it is in another beside it.
//!
//! `crosvm snapshot take` writes a folder of fragments, a file each. Of the memory these are `mem`,
//! the bytes of all regions that are not known to be zero, end to end; and `mem_metadata`, which
//! says for each region where it lies in the guest, how long it is, and which stretches of it are
//! in `mem` (`vm_memory/src/guest_memory.rs`, `snapshot`). Without stretches all of it is. The
//! metadata is JSON, and CBOR in later versions (`snapshot/src/lib.rs`, `write_fragment`).
//!
//! A restore reads `mem` from front to back into memory, so a hole in it reads as zero. What
//! `--compress-memory` (LZ4) or encryption (`enc_metadata`) makes of it is not read.

use crate::DumpError;
use crate::backing::plain::{Extent, PlainDump};
use crate::format::ability::{ByCopy, Copying, InPlace, Punching};
use crate::format::kind::{Format, Kind, Source, boxed};
use crate::format::raw;
use crate::prune::stats::PruneStats;
use crate::snapshot::{Named, SnapshotFiles, Vmm};
use serde::Deserialize;
use serde_json::{Map, Value};
use sonicshot::{FileOffset, Gpa, GpaRange, GuestMemory, PrunePlan};
use std::fs::File;
use std::io::Read;
use std::path::Path;

const MEMORY: &str = "mem";
const METADATA: &str = "mem_metadata";
const ENCRYPTED: &str = "enc_metadata";
/// Metadata that take more than this, and for each page in `mem` as much as a stretch of one page
/// does, are refused: what they are made into in memory takes many times their length.
const SMALL_METADATA: u64 = 1 << 20;
const METADATA_A_PAGE: u64 = 64;
const MAX_METADATA: u64 = 64 << 20;
/// No guest has more regions, nor stretches.
const MAX_STRETCHES: usize = 1 << 22;
/// As deep as the metadata nest, and a bit.
const MAX_DEPTH: u32 = 8;
/// A short file must not claim a lot of memory: not more than this for each byte, and 64 MiB.
const MAX_SPARSENESS: u64 = 256;
const SMALL: u64 = 64 << 20;
/// Regions and stretches are whole pages.
const PAGE: u64 = 4096;

impl Vmm {
    /// crosvm.
    pub const CROSVM: Self = Self::named("crosvm");
}

pub(crate) const KIND: Kind = Kind {
    is_one: |source| is_memory(source.path),
    open: |source| open(source).map(boxed),
    ..Kind::by_name(snapshot)
};

/// Whether `path` is a snapshot's memory by its name and what lies beside it.
fn is_memory(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name == MEMORY) && path.with_file_name(METADATA).is_file()
}

/// A folder with both files, or the memory with the other beside it.
fn snapshot(named: &Named<'_>) -> Result<Option<SnapshotFiles>, DumpError> {
    let memory = match named.folder() {
        Some(folder) => folder.join(MEMORY),
        None => named.path().to_owned(),
    };
    if !is_memory(&memory) || !memory.is_file() {
        return Ok(None);
    }
    Ok(Some(named.found(
        &memory,
        &[Path::new(METADATA)],
        Vmm::CROSVM,
    )))
}

/// What `mem_metadata` says.
#[derive(Deserialize)]
struct Metadata {
    regions: Vec<Region>,
    /// Whether `mem` is an LZ4 frame.
    #[serde(default)]
    compressed: bool,
}

/// A region of guest RAM.
#[derive(Deserialize)]
#[serde(untagged)]
enum Region {
    /// Its address and length; all of it is in `mem`.
    Whole(u64, u64),
    /// The same with the stretches that are.
    Parts {
        guest_base: u64,
        size: u64,
        data_ranges: Vec<Stretch>,
    },
}

/// A stretch of a region, in bytes from its beginning.
#[derive(Deserialize, Clone, Copy)]
struct Stretch {
    start: u64,
    end: u64,
}

/// A snapshot's memory, mapped.
#[derive(Debug)]
struct CrosvmDump(PlainDump);

fn open(source: Source<'_>) -> Result<CrosvmDump, DumpError> {
    let unsupported = |kind| DumpError::Unsupported {
        path: source.path.to_owned(),
        kind,
    };
    if source.path.with_file_name(ENCRYPTED).exists() {
        return Err(unsupported("the memory of an encrypted crosvm snapshot"));
    }
    let beside = source.path.with_file_name(METADATA);
    let bytes = read_metadata(&beside, source.len())?;
    let metadata = parse(&bytes).map_err(|source| DumpError::Json {
        path: beside.clone(),
        source,
    })?;
    if metadata.compressed {
        return Err(unsupported("the compressed memory of a crosvm snapshot"));
    }
    let extents = extents(&beside, &metadata, source.len(), bytes.len() as u64)?;
    source.mapped(extents).map(CrosvmDump)
}

/// The metadata beside a `mem` of `len` bytes.
fn read_metadata(path: &Path, len: u64) -> Result<Vec<u8>, DumpError> {
    let reading = || DumpError::io("reading", path);
    let file = File::open(path).map_err(reading())?;
    let of_pages = (len / PAGE).saturating_mul(METADATA_A_PAGE);
    let most = SMALL_METADATA.saturating_add(of_pages).min(MAX_METADATA);
    let mut bytes = Vec::new();
    let mut limited = file.take(most.saturating_add(1));
    let read = limited.read_to_end(&mut bytes).map_err(reading())? as u64;
    if read > most {
        let what = "metadata of this length";
        return Err(DumpError::malformed(path, what, 0, read));
    }
    Ok(bytes)
}

fn parse(bytes: &[u8]) -> Result<Metadata, Box<dyn std::error::Error + Send + Sync>> {
    if bytes.first() == Some(&b'{') {
        return Ok(serde_json::from_slice(bytes)?);
    }
    let value = Cbor(bytes)
        .item(MAX_DEPTH)
        .ok_or("it is neither JSON nor CBOR")?;
    Ok(serde_json::from_value(value)?)
}

/// Where each stretch of the regions is in a `mem` of `len` bytes.
fn extents(
    path: &Path,
    metadata: &Metadata,
    len: u64,
    metadata_len: u64,
) -> Result<Vec<Extent>, DumpError> {
    let mut extents: Vec<Extent> = Vec::new();
    let mut at = FileOffset::ZERO;
    let mut claimed = 0_u64;
    for (number, region) in (0_u64..).zip(&metadata.regions) {
        let bad = |what, value| DumpError::malformed(path, what, number, value);
        let (base, size, stretches) = match region {
            Region::Whole(base, size) => (*base, *size, None),
            Region::Parts {
                guest_base,
                size,
                data_ranges,
            } => (*guest_base, *size, Some(data_ranges.as_slice())),
        };
        let whole = [Stretch {
            start: 0,
            end: size,
        }];
        let guest = GpaRange::with_len(Gpa::new(base), size);
        let guest = guest.filter(|_| base.is_multiple_of(PAGE) && size.is_multiple_of(PAGE));
        let guest = guest.ok_or_else(|| bad("the place of a region (by number)", base))?;
        claimed = claimed.saturating_add(size);
        let mut end = 0_u64;
        for stretch in stretches.unwrap_or(&whole) {
            let wrong = || bad("a stretch of a region (by number)", stretch.start);
            let in_order = end <= stretch.start && stretch.start < stretch.end;
            if !in_order
                || stretch.end > size
                || !(stretch.start | stretch.end).is_multiple_of(PAGE)
            {
                return Err(wrong());
            }
            let data = inside(&guest, stretch.start, stretch.end).ok_or_else(wrong)?;
            extents.extend(zeroes(&guest, end, stretch.start).ok_or_else(wrong)?);
            extents.push(Extent {
                guest: data,
                offset: Some(at),
            });
            at = at.checked_add(data.len()).ok_or_else(wrong)?;
            end = stretch.end;
            if extents.len() > MAX_STRETCHES {
                return Err(bad(
                    "too many stretches in a region (by number)",
                    stretch.start,
                ));
            }
        }
        let cut = || bad("the length of a region (by number)", size);
        extents.extend(zeroes(&guest, end, size).ok_or_else(cut)?);
    }
    let stored = len.saturating_add(metadata_len);
    if claimed > stored.saturating_mul(MAX_SPARSENESS).saturating_add(SMALL) {
        let what = "regions of more memory than the file can be of";
        return Err(DumpError::malformed(path, what, 0, claimed));
    }
    if at.raw() != len {
        return Err(DumpError::LayoutLength {
            path: path.with_file_name(MEMORY),
            layout: format!("in {METADATA}"),
            described: at.raw(),
            actual: len,
        });
    }
    Ok(extents)
}

fn inside(guest: &GpaRange, from: u64, to: u64) -> Option<GpaRange> {
    let at = |inside| guest.start().checked_add(inside);
    Some(GpaRange::new(at(from)?, at(to)?))
}

/// A stretch of a region that is not in the file, unless it is empty.
fn zeroes(guest: &GpaRange, from: u64, to: u64) -> Option<Option<Extent>> {
    let guest = inside(guest, from, to)?;
    let offset = None;
    Some((!guest.is_empty()).then_some(Extent { guest, offset }))
}

impl Format for CrosvmDump {
    fn name(&self) -> &'static str {
        "crosvm snapshot memory"
    }

    fn memory(&self) -> &dyn GuestMemory {
        &self.0
    }

    fn file(&self) -> &File {
        self.0.file()
    }

    fn check_unchanged(&self) -> Result<(), DumpError> {
        self.0.check_unchanged()
    }

    fn by_copy(&self) -> Option<&dyn ByCopy> {
        Some(self)
    }

    fn in_place(&self) -> Option<&dyn InPlace> {
        Some(self)
    }
}

impl ByCopy for CrosvmDump {
    fn copy(&self, work: Copying<'_>) -> Result<(), DumpError> {
        raw::copy_kept(&self.0, work)
    }
}

impl InPlace for CrosvmDump {
    fn source(&self) -> &PlainDump {
        &self.0
    }

    fn punching(&self, goes: &PrunePlan, stats: &mut PruneStats) -> Result<Punching, DumpError> {
        raw::punch_dropped(&self.0, goes, stats)
    }
}

/// As much of CBOR (RFC 8949) as the metadata need: numbers, texts, lists and tables of stated
/// length.
struct Cbor<'a>(&'a [u8]);

impl Cbor<'_> {
    fn bytes(&mut self, len: usize) -> Option<&[u8]> {
        let (now, later) = self.0.split_at_checked(len)?;
        self.0 = later;
        Some(now)
    }

    /// An item's kind, and its number or length.
    fn head(&mut self) -> Option<(u8, u64)> {
        let first = *self.bytes(1)?.first()?;
        let number = match first & 0x1f {
            small @ 0..=23 => small.into(),
            size @ 24..=27 => {
                let len = 1_usize << (size & 3);
                let bytes = self.bytes(len)?.iter();
                bytes.fold(0_u64, |number, byte| number << 8 | u64::from(*byte))
            }
            _ => return None,
        };
        Some((first >> 5, number))
    }

    /// The next item, which holds others `depth` deep at most.
    fn item(&mut self, depth: u32) -> Option<Value> {
        let inner = depth.checked_sub(1)?;
        let (kind, number) = self.head()?;
        Some(match kind {
            0 => number.into(),
            3 => self.text(number)?.into(),
            4 => {
                // Each item takes a byte, so that this ends with the bytes.
                let items = (0..number).map(|_| self.item(inner));
                Value::Array(items.collect::<Option<_>>()?)
            }
            5 => {
                let mut table = Map::new();
                for _ in 0..number {
                    let (kind, len) = self.head()?;
                    let key = self.text(len).filter(|_| kind == 3)?;
                    table.insert(key, self.item(inner)?);
                }
                Value::Object(table)
            }
            7 => match number {
                20 => false.into(),
                21 => true.into(),
                22 => Value::Null,
                _ => return None,
            },
            _ => return None,
        })
    }

    fn text(&mut self, len: u64) -> Option<String> {
        let bytes = self.bytes(usize::try_from(len).ok()?)?;
        std::str::from_utf8(bytes).ok().map(str::to_owned)
    }
}

#[cfg(test)]
mod tests {
    use super::{Cbor, KIND, MAX_DEPTH, METADATA, parse};
    use crate::{Dump, DumpError, SnapshotFiles, Vmm};
    use proptest::prelude::*;
    use serde_json::{Value, json};
    use sonicshot::{
        DropClasses, Fill, Gpa, GuestMemory, PageClass, PageMap, PageSize, Pfn, PfnRange, PrunePlan,
    };
    use std::fs;
    use std::path::PathBuf;
    use tempfile::TempDir;

    /// Two regions: the first with a page of zeroes between two of data, the second whole.
    const MEM: [u8; 4] = [1, 2, 3, 4];

    fn metadata() -> Value {
        json!({"compressed": false, "regions": [
            {"guest_base": 0, "size": 0x4000, "data_ranges": [
                {"start": 0, "end": 0x1000}, {"start": 0x2000, "end": 0x3000},
            ]},
            {"guest_base": 0x10_0000, "size": 0x2000, "data_ranges": [
                {"start": 0, "end": 0x2000},
            ]},
        ]})
    }

    fn head(kind: u8, number: u64, out: &mut Vec<u8>) {
        let kind = kind << 5;
        match number {
            0..=23 => out.push(kind | u8::try_from(number).unwrap()),
            24..=0xff => out.extend([kind | 24, u8::try_from(number).unwrap()]),
            0x100..=0xffff => {
                out.push(kind | 25);
                out.extend(u16::try_from(number).unwrap().to_be_bytes());
            }
            0x1_0000..=0xffff_ffff => {
                out.push(kind | 26);
                out.extend(u32::try_from(number).unwrap().to_be_bytes());
            }
            _ => {
                out.push(kind | 27);
                out.extend(number.to_be_bytes());
            }
        }
    }

    fn cbor(value: &Value, out: &mut Vec<u8>) {
        match value {
            Value::Number(number) => head(0, number.as_u64().unwrap(), out),
            Value::String(text) => {
                head(3, text.len() as u64, out);
                out.extend(text.as_bytes());
            }
            Value::Array(items) => {
                head(4, items.len() as u64, out);
                items.iter().for_each(|item| cbor(item, out));
            }
            Value::Object(table) => {
                head(5, table.len() as u64, out);
                for (key, value) in table {
                    cbor(&Value::from(key.as_str()), out);
                    cbor(value, out);
                }
            }
            Value::Bool(flag) => head(7, 20 + u64::from(*flag), out),
            other => panic!("{other}"),
        }
    }

    fn folder(metadata: &[u8]) -> (TempDir, PathBuf) {
        let folder = TempDir::new().unwrap();
        let mem: Vec<u8> = MEM.iter().flat_map(|byte| [*byte; 4096]).collect();
        let path = folder.path().join("mem");
        fs::write(&path, mem).unwrap();
        fs::write(path.with_file_name(METADATA), metadata).unwrap();
        (folder, path)
    }

    fn first_bytes(dump: &Dump) -> Vec<(u64, u8)> {
        let frames = dump.layout().frames(PageSize::SIZE_4K);
        let frames = frames.flat_map(|run| run.iter());
        frames
            .map(|pfn| {
                let mut byte = [0xee];
                dump.read(pfn.gpa(PageSize::SIZE_4K).unwrap(), &mut byte)
                    .unwrap();
                (pfn.raw(), byte[0])
            })
            .collect()
    }

    #[test]
    fn memory_is_where_the_metadata_say() {
        let mut packed = Vec::new();
        cbor(&metadata(), &mut packed);
        for metadata in [metadata().to_string().into_bytes(), packed] {
            let (folder, path) = folder(&metadata);
            for named in [folder.path(), &path] {
                let files = SnapshotFiles::find(named, None, None).unwrap();
                assert_eq!(files.vmm(), Some(Vmm::CROSVM));
                assert_eq!(files.memory(), path);
            }
            let dump = Dump::open(&path, None).unwrap();
            assert_eq!(dump.format(), "crosvm snapshot memory");
            let want = [(0, 1), (1, 0), (2, 2), (3, 0), (0x100, 3), (0x101, 4)];
            assert_eq!(first_bytes(&dump), want);
            assert!(dump.next_data(Gpa::new(0x1000)).unwrap().start() >= Gpa::new(0x2000));
        }
        // As the first versions had it.
        let old = json!({"regions": [[0, 0x1000], [0x10_0000, 0x3000]]});
        let (_folder, path) = folder(old.to_string().as_bytes());
        let want = [(0, 1), (0x100, 2), (0x101, 3), (0x102, 4)];
        assert_eq!(first_bytes(&Dump::open(&path, None).unwrap()), want);
    }

    #[test]
    fn what_is_dropped_reads_as_zero_and_the_rest_stays() {
        let (_folder, path) = folder(metadata().to_string().as_bytes());
        let dump = Dump::open(&path, None).unwrap();
        let mut map = PageMap::new(dump.layout(), PageSize::SIZE_4K);
        for pfn in [1, 2, 0x100] {
            let one = PfnRange::with_len(Pfn::new(pfn), 1).unwrap();
            map.set(one, PageClass::FreeBuddy);
        }
        let plan = PrunePlan::new(&map, &DropClasses::default(), Fill::Any);
        let plan = crate::CheckedPlan::of(&dump, plan);
        let other = TempDir::new().unwrap();
        let out = other.path().join("mem");
        let options = crate::PruneOptions::new().min_hole(0);
        plan.prune_to(&out, crate::Overwrite::Refuse, &mut |_, _| {})
            .unwrap();
        fs::copy(path.with_file_name(METADATA), out.with_file_name(METADATA)).unwrap();
        plan.prune_in_place_with(&options, &mut |_, _| {}).unwrap();
        for path in [path, out] {
            assert_eq!(fs::metadata(&path).unwrap().len(), 0x4000);
            let want = [(0, 1), (1, 0), (2, 0), (3, 0), (0x100, 0), (0x101, 4)];
            assert_eq!(first_bytes(&Dump::open(&path, None).unwrap()), want);
        }
    }

    #[test]
    fn metadata_that_do_not_fit_are_refused() {
        let region = |base: u64, size: u64, ranges: &[(u64, u64)]| {
            let ranges: Vec<Value> = ranges
                .iter()
                .map(|(start, end)| json!({"start": start, "end": end}))
                .collect();
            json!({"guest_base": base, "size": size, "data_ranges": ranges})
        };
        let whole = region(0, 0x4000, &[(0, 0x4000)]);
        for (regions, is_read) in [
            (vec![whole.clone()], true),
            (vec![region(0, 0x3000, &[(0, 0x3000)])], false),
            (vec![region(0, 0x5000, &[(0, 0x5000)])], false),
            (vec![region(0, 0x3000, &[(0, 0x4000)])], false),
            (
                vec![region(0, 0x8000, &[(0, 0x2000), (0x1000, 0x3000)])],
                false,
            ),
            (
                vec![region(0, 0x8000, &[(0x4000, 0x6000), (0, 0x2000)])],
                false,
            ),
            (
                vec![region(0, 0x8000, &[(0x1000, 0x1000), (0, 0x4000)])],
                false,
            ),
            (vec![region(0, 0x8000, &[(0x800, 0x4800)])], false),
            (vec![region(0x800, 0x4000, &[(0, 0x4000)])], false),
            (
                vec![region(u64::MAX - 0xfff, 0x4000, &[(0, 0x4000)])],
                false,
            ),
            (vec![whole.clone(), region(0x3000, 0x1000, &[])], false),
            (vec![whole, region(1 << 40, 1 << 40, &[])], false),
            (vec![], false),
        ] {
            let metadata = json!({ "regions": regions });
            let (_folder, path) = folder(metadata.to_string().as_bytes());
            assert_eq!(Dump::open(&path, None).is_ok(), is_read, "{metadata}");
        }
        for metadata in [
            &b""[..],
            b"{",
            b"\xa1\x67regions\xff",
            b"{\"regions\": 3}",
            b"\xff",
        ] {
            let (_folder, path) = folder(metadata);
            let opened = Dump::open(&path, None);
            assert!(matches!(opened, Err(DumpError::Json { .. })), "{opened:?}");
        }
    }

    #[test]
    fn packed_or_encrypted_memory_is_not_read() {
        let (_folder, path) = folder(metadata().to_string().as_bytes());
        fs::write(path.with_file_name("enc_metadata"), "").unwrap();
        let refused = Dump::open(&path, None);
        assert!(
            matches!(refused, Err(DumpError::Unsupported { .. })),
            "{refused:?}"
        );
        let mut packed = metadata();
        packed["compressed"] = true.into();
        let (_folder, path) = folder(packed.to_string().as_bytes());
        fs::write(&path, b"\x04\x22\x4d\x18\x64\x40\xa7").unwrap();
        let refused = Dump::open(&path, None);
        assert!(
            matches!(refused, Err(DumpError::Unsupported { .. })),
            "{refused:?}"
        );
        // By itself it is raw RAM as any.
        let (_folder, path) = folder(b"{}");
        fs::remove_file(path.with_file_name(METADATA)).unwrap();
        assert_eq!(Dump::open(&path, None).unwrap().format(), "raw RAM");
        assert!(KIND.magics.is_empty());
    }

    proptest! {
        #[test]
        fn cbor_is_read_as_it_is_written(
            regions in proptest::collection::vec(
                (any::<u64>(), 0_u64..70_000, proptest::collection::vec((0_u64..300, any::<u32>()), 0..4)),
                0..5,
            ),
        ) {
            let regions: Vec<Value> = regions.iter().map(|(base, size, ranges)| {
                let ranges: Vec<Value> = ranges
                    .iter()
                    .map(|(start, end)| json!({"start": start, "end": end}))
                    .collect();
                json!({"guest_base": base, "size": size, "data_ranges": ranges})
            }).collect();
            let value = json!({ "regions": regions });
            let mut packed = Vec::new();
            cbor(&value, &mut packed);
            prop_assert_eq!(Cbor(&packed).item(MAX_DEPTH), Some(value));
            for len in 0..packed.len() {
                prop_assert!(Cbor(&packed[..len]).item(MAX_DEPTH).is_none());
            }
        }

        #[test]
        fn hostile_metadata_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
        }
    }
}
