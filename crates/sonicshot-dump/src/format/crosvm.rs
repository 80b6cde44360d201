//! crosvm's snapshots: guest RAM in one file, and what it is in another beside it.
//!
//! `crosvm snapshot take` writes a folder of fragments, a file each, in folders by what they are of
//! (`vcpu`, `bus0` and so on), which are copied as they are. Of the memory these are `mem`,
//! the bytes of all regions that are not known to be zero, end to end; and `mem_metadata`, which
//! says for each region where it lies in the guest, how long it is, and which ranges of it are
//! in `mem` (`vm_memory/src/guest_memory.rs`, `snapshot`). Without ranges all of it is. The
//! metadata is JSON, and CBOR in later versions (`snapshot/src/lib.rs`, `write_fragment`).
//!
//! A restore reads `mem` from front to back into memory, so a hole in it reads as zero. What
//! `--compress-memory` (LZ4) or encryption (`enc_metadata`) makes of it is not read.

use crate::DumpError;
use crate::backing::Stored;
use crate::backing::plain::{Extent, PlainDump};
use crate::format::ability::{ByCopy, Copying, InPlace, Punching};
use crate::format::kind::{Format, Kind, Source, boxed};
use crate::format::raw;
use crate::prune::stats::PruneStats;
use crate::snapshot::{Named, SnapshotFiles, Vmm};
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use sonicshot::{FileOffset, Gpa, GpaRange, PrunePlan, to_u64};
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

const MEMORY: &str = "mem";
const METADATA: &str = "mem_metadata";
const ENCRYPTED: &str = "enc_metadata";
/// Metadata that take more than this, and for each page in `mem` as much as a range of one page
/// does, are refused: what they are made into in memory takes many times their length.
const SMALL_METADATA: u64 = 1 << 20;
const METADATA_A_PAGE: u64 = 64;
const MAX_METADATA: u64 = 64 << 20;
/// No guest's memory is in more ranges; a region counts for as many as it takes in memory.
const MAX_RANGES: usize = 1 << 21;
const REGION_COUNTS: usize = 3;
/// A short file must not claim a lot of memory: not more than this for each byte, and 64 MiB.
const MAX_SPARSENESS: u64 = 256;
const SMALL: u64 = 64 << 20;
/// Regions and ranges are whole pages.
const PAGE: u64 = 4096;

impl Vmm {
    /// crosvm.
    pub const CROSVM: Self = Self::named("crosvm");
}

pub(crate) const KIND: Kind = Kind {
    name: Some("crosvm"),
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
    let mut files = named.found(&memory, &[Path::new(METADATA)], Vmm::CROSVM);
    files.folders = true;
    Ok(Some(files))
}

/// The content of `mem_metadata`. It is read straight into this, which takes less memory than its text.
#[derive(Deserialize)]
struct Metadata {
    #[serde(deserialize_with = "regions")]
    regions: Vec<Region>,
    /// Whether `mem` is an LZ4 frame.
    #[serde(default)]
    compressed: bool,
}

/// A region of guest RAM.
struct Region {
    base: u64,
    size: u64,
    /// The parts of it that are in `mem`; without them all of it is.
    parts_with_data: Option<Vec<DataRange>>,
}

/// A region as later versions write it.
#[derive(Deserialize)]
struct Parts {
    guest_base: u64,
    size: u64,
    #[serde(deserialize_with = "ranges")]
    data_ranges: Vec<DataRange>,
}

/// A range of a region, in bytes from its beginning.
#[derive(Deserialize, Clone, Copy)]
struct DataRange {
    start: u64,
    end: u64,
}

/// Reads a list, of which `most` items are taken: `count` says for how many each one counts.
struct List<T> {
    most: usize,
    count: fn(&T) -> usize,
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for List<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of {} items at most", self.most)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
        let mut items = Vec::new();
        let mut counted = 0_usize;
        while let Some(item) = seq.next_element()? {
            let all = counted.checked_add((self.count)(&item));
            let all = all.filter(|all| *all <= self.most);
            counted = all.ok_or_else(|| de::Error::invalid_length(counted, &self))?;
            items.push(item);
        }
        Ok(items)
    }
}

fn regions<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Region>, D::Error> {
    from.deserialize_seq(List {
        most: MAX_RANGES,
        count: |region: &Region| {
            let parts_with_data = region.parts_with_data.as_ref().map(Vec::len);
            [Some(REGION_COUNTS), parts_with_data]
                .into_iter()
                .flatten()
                .sum()
        },
    })
}

fn ranges<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<DataRange>, D::Error> {
    from.deserialize_seq(List {
        most: MAX_RANGES,
        count: |_| 1,
    })
}

impl<'de> Deserialize<'de> for Region {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(RegionVisitor)
    }
}

struct RegionVisitor;

impl<'de> Visitor<'de> for RegionVisitor {
    type Value = Region;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an address and a length, or those with the ranges of data")
    }

    /// As the first versions have it.
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Region, A::Error> {
        let mut number = |index| {
            let number = seq.next_element::<u64>()?;
            number.ok_or_else(|| de::Error::invalid_length(index, &self))
        };
        let (base, size) = (number(0)?, number(1)?);
        if seq.next_element::<IgnoredAny>()?.is_some() {
            return Err(de::Error::invalid_length(3, &self));
        }
        Ok(Region {
            base,
            size,
            parts_with_data: None,
        })
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Region, A::Error> {
        let parts = Parts::deserialize(MapAccessDeserializer::new(map))?;
        Ok(Region {
            base: parts.guest_base,
            size: parts.size,
            parts_with_data: Some(parts.data_ranges),
        })
    }
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
    let metadata_len = to_u64(bytes.len());
    // It may be long, and so may be what is made of it.
    drop(bytes);
    let extents = extents(&beside, metadata, source.len(), metadata_len)?;
    source.mapped(extents).map(CrosvmDump)
}

/// The metadata beside a `mem` of `len` bytes.
fn read_metadata(path: &Path, len: u64) -> Result<Vec<u8>, DumpError> {
    let reading = || DumpError::io("reading", path);
    let file = File::open(path).map_err(reading())?;
    let of_pages = (len / PAGE).checked_mul(METADATA_A_PAGE);
    let most = of_pages.and_then(|bytes| bytes.checked_add(SMALL_METADATA));
    let most = most
        .filter(|most| *most < MAX_METADATA)
        .unwrap_or(MAX_METADATA);
    let mut bytes = Vec::new();
    let mut limited = file.take(most.checked_add(1).unwrap_or(most));
    let read = to_u64(limited.read_to_end(&mut bytes).map_err(reading())?);
    if read > most {
        let what = "metadata longer than allowed";
        return Err(DumpError::malformed(path, what, FileOffset::ZERO, read));
    }
    Ok(bytes)
}

fn parse(bytes: &[u8]) -> Result<Metadata, Box<dyn std::error::Error + Send + Sync>> {
    if bytes.first() == Some(&b'{') {
        return Ok(serde_json::from_slice(bytes)?);
    }
    Ok(ciborium::from_reader(bytes)?)
}

/// The extents of the regions in a `mem` of `len` bytes.
fn extents(
    path: &Path,
    metadata: Metadata,
    len: u64,
    metadata_len: u64,
) -> Result<Vec<Extent>, DumpError> {
    let mut extents: Vec<Extent> = Vec::new();
    let mut at = FileOffset::ZERO;
    let mut claimed = 0_u64;
    for (number, region) in (0_u64..).zip(metadata.regions) {
        let bad = |what, value| DumpError::MalformedItem {
            path: path.to_owned(),
            what,
            number,
            value,
        };
        let Region {
            base,
            size,
            parts_with_data,
        } = region;
        let whole = [DataRange {
            start: 0,
            end: size,
        }];
        let guest = GpaRange::with_len(Gpa::new(base), size);
        let guest = guest.filter(|_| base.is_multiple_of(PAGE) && size.is_multiple_of(PAGE));
        let guest = guest.ok_or_else(|| bad("invalid place of region", base))?;
        let all = claimed.checked_add(size);
        claimed = all.ok_or_else(|| bad("invalid length of region", size))?;
        let mut end = 0_u64;
        for part in parts_with_data.as_deref().unwrap_or(&whole) {
            let wrong = || bad("invalid range of region", part.start);
            let in_order = end <= part.start && part.start < part.end;
            if !in_order || part.end > size || !(part.start | part.end).is_multiple_of(PAGE) {
                return Err(wrong());
            }
            let data = inside(&guest, part.start, part.end).ok_or_else(wrong)?;
            extents.extend(zeroes(&guest, end, part.start).ok_or_else(wrong)?);
            extents.push(Extent {
                guest: data,
                offset: Some(at),
            });
            at = at.checked_add(data.len()).ok_or_else(wrong)?;
            end = part.end;
        }
        let cut = || bad("invalid length of region", size);
        extents.extend(zeroes(&guest, end, size).ok_or_else(cut)?);
    }
    let most = len.checked_add(metadata_len);
    let most = most.and_then(|stored| stored.checked_mul(MAX_SPARSENESS)?.checked_add(SMALL));
    if most.is_some_and(|most| claimed > most) {
        let what = "regions of more memory than the file can be of";
        return Err(DumpError::malformed(path, what, FileOffset::ZERO, claimed));
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

/// A range of a region that is not in the file, unless it is empty.
fn zeroes(guest: &GpaRange, from: u64, to: u64) -> Option<Option<Extent>> {
    let guest = inside(guest, from, to)?;
    let offset = None;
    Some((!guest.is_empty()).then_some(Extent { guest, offset }))
}

impl Format for CrosvmDump {
    fn name(&self) -> &'static str {
        "crosvm snapshot memory"
    }

    fn stored(&self) -> &dyn Stored {
        &self.0
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

#[cfg(test)]
mod tests {
    use super::{KIND, METADATA, parse};
    use crate::{
        CheckedPlan, Dump, DumpError, NewFolder, Overwrite, PruneOptions, PruneStats,
        SnapshotFiles, Vmm,
    };
    use proptest::prelude::*;
    use serde_json::{Value, json};
    use sonicshot::{
        DropClasses, Fill, Gpa, GuestMemory, PageClass, PageMap, PageSize, Pfn, PfnRange, PrunePlan,
    };
    use std::collections::BTreeMap;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::path::{Path, PathBuf};
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

    fn cbor(value: &Value) -> Vec<u8> {
        let mut out = Vec::new();
        ciborium::into_writer(value, &mut out).unwrap();
        out
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
        for metadata in [metadata().to_string().into_bytes(), cbor(&metadata())] {
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
        let plan = CheckedPlan::of(&dump, plan);
        let other = TempDir::new().unwrap();
        let out = other.path().join("mem");
        let options = PruneOptions::new().min_hole(0);
        plan.prune_to(&out, &options).unwrap();
        fs::copy(path.with_file_name(METADATA), out.with_file_name(METADATA)).unwrap();
        plan.prune_in_place(&options).unwrap();
        for path in [path, out] {
            assert_eq!(fs::metadata(&path).unwrap().len(), 0x4000);
            let want = [(0, 1), (1, 0), (2, 0), (3, 0), (0x100, 0), (0x101, 4)];
            assert_eq!(first_bytes(&Dump::open(&path, None).unwrap()), want);
        }
    }

    /// The entries of a folder, by their paths: a file's content; nothing of a folder.
    fn contents(folder: &Path) -> BTreeMap<PathBuf, Option<Vec<u8>>> {
        let mut found = BTreeMap::new();
        let mut open = vec![folder.to_owned()];
        while let Some(next) = open.pop() {
            for entry in fs::read_dir(&next).unwrap() {
                let path = entry.unwrap().path();
                let inside = path.strip_prefix(folder).unwrap().to_owned();
                if path.is_dir() {
                    found.insert(inside, None);
                    open.push(path);
                } else {
                    found.insert(inside, Some(fs::read(&path).unwrap()));
                }
            }
        }
        found
    }

    /// A snapshot's folder as crosvm writes it.
    fn whole_folder() -> (TempDir, PathBuf) {
        let (folder, path) = folder(metadata().to_string().as_bytes());
        let root = folder.path();
        fs::create_dir_all(root.join("bus0/pci")).unwrap();
        fs::create_dir_all(root.join("vcpu")).unwrap();
        fs::write(root.join("vcpu/0"), b"registers").unwrap();
        fs::write(root.join("bus0/pci/1"), b"a device").unwrap();
        fs::write(root.join("snapshot_metadata"), b"{}").unwrap();
        fs::set_permissions(root.join("vcpu"), Permissions::from_mode(0o750)).unwrap();
        (folder, path)
    }

    fn pruned_to(input: &Path, out: &Path, overwrite: Overwrite) -> Result<PruneStats, DumpError> {
        let files = SnapshotFiles::find(input, None, None)?;
        let dump = Dump::open(files.memory(), None)?;
        let mut map = PageMap::new(dump.layout(), PageSize::SIZE_4K);
        map.set(
            PfnRange::with_len(Pfn::new(2), 1).unwrap(),
            PageClass::FreeBuddy,
        );
        let plan = PrunePlan::new(&map, &DropClasses::default(), Fill::Any);
        let folder = NewFolder::create(out, overwrite, &files)?;
        let stats = folder.write_memory(&CheckedPlan::of(&dump, plan), &PruneOptions::new())?;
        folder.finish()?;
        Ok(stats)
    }

    #[test]
    fn a_folder_is_copied_with_all_that_is_in_it() {
        let (folder, _) = whole_folder();
        let other = TempDir::new().unwrap();
        let out = other.path().join("out");
        let stats = pruned_to(folder.path(), &out, Overwrite::Refuse).unwrap();
        assert_eq!(stats.dropped_bytes, 4096);
        let mut want = contents(folder.path());
        want.get_mut(Path::new("mem")).unwrap().as_mut().unwrap()[4096..8192].fill(0);
        assert!(contents(&out) == want);
        let mode = |path: &str| fs::metadata(out.join(path)).unwrap().permissions().mode();
        assert_eq!(mode("vcpu") & 0o777, 0o750);
        assert_eq!(mode("bus0/pci/1"), {
            let path = folder.path().join("bus0/pci/1");
            fs::metadata(path).unwrap().permissions().mode()
        });

        // What it replaces must not hold anything else, however deep.
        pruned_to(folder.path(), &out, Overwrite::Replace).unwrap();
        assert!(contents(&out) == want);
        fs::write(out.join("bus0/pci/notes"), b"somebody's").unwrap();
        let refused = pruned_to(folder.path(), &out, Overwrite::Replace).unwrap_err();
        assert!(
            matches!(&refused, DumpError::Foreign { path } if path.ends_with("out/bus0/pci/notes")),
            "{refused}"
        );
        assert!(out.join("bus0/pci/notes").exists());
        assert_eq!(fs::read_dir(other.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_is_no_file_and_folders_without_end_are_refused() {
        type Case = (fn(&Path), &'static str);
        let cases: [Case; 3] = [
            (
                |root| symlink("/etc", root.join("vcpu/link")).unwrap(),
                "vcpu/link: it is neither a regular file nor a folder",
            ),
            (
                |root| fs::create_dir_all(root.join("a/a/a/a/a/a/a/a/a")).unwrap(),
                "a/a/a/a/a/a/a/a holds more than 8 folders in each other",
            ),
            (
                |root| {
                    for number in 0..4100 {
                        fs::write(root.join("vcpu").join(number.to_string()), b"").unwrap();
                    }
                },
                "holds more than 4096 files and folders",
            ),
        ];
        for (make, said) in cases {
            let (folder, _) = whole_folder();
            make(folder.path());
            let other = TempDir::new().unwrap();
            let out = other.path().join("out");
            let refused = pruned_to(folder.path(), &out, Overwrite::Refuse).unwrap_err();
            assert!(refused.to_string().contains(said), "{refused}");
            assert_eq!(fs::read_dir(other.path()).unwrap().count(), 0);
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
    fn metadata_that_are_cut_short_are_none() {
        for whole in [metadata().to_string().into_bytes(), cbor(&metadata())] {
            assert!(parse(&whole).is_ok());
            for len in 0..whole.len() {
                assert!(parse(&whole[..len]).is_err(), "{len}");
            }
        }
        // Lists in each other without end, which nobody asked for.
        for (first, list) in [(&b"\xa1\x61x"[..], 0x81), (b"{\"x\":", b'[')] {
            let deep = [first, &vec![list; 1 << 20]].concat();
            assert!(parse(&deep).is_err());
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
        fn hostile_metadata_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
        }
    }
}
