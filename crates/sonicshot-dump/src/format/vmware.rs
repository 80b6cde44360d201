//! VMware's suspended guests and snapshots with memory: the guest's RAM in a file `NAME.vmem`, and
//! the rest of its state in `NAME.vmss` or `NAME.vmsn` beside it (Volatility's `vmware.py`).
//!
//! The state is a list of groups, each a list of tags with values. Those of the group `memory` tell
//! where the RAM is in the guest: a region's first page there, its first page in the file, and its
//! length. Of a guest without regions the state tells nothing: its own memory map decides, as of raw
//! memory.
//!
//! The effect of a hole in the memory on VMware was not tried: it is only read.

use crate::DumpError;
use crate::backing::plain::{check_content, open_content};
use crate::format::kind::Kind;
use crate::layout::LayoutSpec;
use crate::snapshot::{FilesNote, Named, SnapshotFiles, Vmm};
use sonicshot::{Bytes, Cursor, CutShort, FileBytes, FileOffset, Gpa, GpaRange, to_u64};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

impl Vmm {
    /// VMware.
    pub const VMWARE: Self = Self::named("VMware");
}

/// The memory is raw RAM; the file beside it says where it lies.
pub(crate) const KIND: Kind = Kind {
    no_holes: |memory| {
        let why = "what VMware makes of holes in its memory was not tried: save it as a checkpoint";
        Ok(state_of(memory).map(|_| why))
    },
    ..Kind::by_name(snapshot)
};

const MEMORY: &str = "vmem";
/// The name of the state, of a suspended guest and of a snapshot.
const STATES: [&str; 2] = ["vmss", "vmsn"];
const MAGICS: [[u8; 4]; 4] = [STATE_0, STATE_1, STATE_2, STATE_3];
/// The first bytes of a state, by its version.
pub(crate) const STATE_0: [u8; 4] = *b"\xd0\xbe\xd2\xbe";
pub(crate) const STATE_1: [u8; 4] = *b"\xd1\xba\xd1\xba";
pub(crate) const STATE_2: [u8; 4] = *b"\xd2\xbe\xd2\xbe";
pub(crate) const STATE_3: [u8; 4] = *b"\xd3\xbe\xd3\xbe";
const HEADER: u64 = 12;
const NAME: usize = 64;
const PAGE: u64 = 4096;
/// No state is known to have more: one has some dozens of groups, and some hundreds of tags in one.
const MAX_GROUPS: u32 = 4096;
const MAX_TAGS: usize = 1 << 20;
const MAX_REGIONS: u64 = 4096;
/// The tag with the number of regions; those of a region itself have its number.
const COUNT: &str = "regionsCount";

/// The memory with its state beside it, or the state with its memory.
fn snapshot(named: &Named<'_>) -> Result<Option<SnapshotFiles>, DumpError> {
    let path = named.path();
    if named.folder().is_some() {
        return Ok(None);
    }
    let (memory, state) = match (state_of(path), is_state(path)) {
        (Some(state), _) => (path.to_owned(), state),
        (None, true) => (path.with_extension(MEMORY), path.to_owned()),
        (None, false) => return Ok(None),
    };
    if !memory.is_file() {
        // The state alone is refused as any file of another tool is.
        return Ok(None);
    }
    let mut files = named.found(&memory, &[&state], Vmm::VMWARE);
    let reading = DumpError::io("reading", &memory);
    let len = fs::metadata(&memory).map_err(reading)?.len();
    match (layout(&state, len), named.layout()) {
        (Ok(None), _) => {}
        (Ok(Some(layout)), None) => files.layout = Some(layout),
        (Ok(Some(layout)), Some(given)) => {
            if given.ranges(len) != layout.ranges(len) {
                let state = "the VMware state";
                files.notes.push(FilesNote::OtherLayout { state, layout });
            }
        }
        (Err(error), Some(_)) => files.notes.push(FilesNote::NotUnderstood {
            state: "the VMware state",
            why: error.to_string(),
        }),
        (Err(error), None) => return Err(error),
    }
    Ok(Some(files))
}

/// The state beside the memory at `memory`; one that is none by its beginning is damaged, not absent.
fn state_of(memory: &Path) -> Option<PathBuf> {
    memory.extension().filter(|is| *is == MEMORY)?;
    let states = STATES.map(|state| memory.with_extension(state));
    let by_name = || states.iter().find(|state| state.is_file());
    let state = states
        .iter()
        .find(|state| is_state(state))
        .or_else(by_name)?;
    Some(state.clone())
}

/// Whether the file at `path` is a state by its name and its beginning.
fn is_state(path: &Path) -> bool {
    let named = path
        .extension()
        .is_some_and(|is| STATES.iter().any(|state| is == *state));
    named
        && path.is_file()
        && open_content(path).is_ok_and(|content| {
            let start: Option<[u8; 4]> = content.bytes().array_at(0);
            start.is_some_and(|start| MAGICS.contains(&start))
        })
}

/// The layout of the `len` bytes of RAM beside the state at `path`, if the state tells it.
fn layout(path: &Path, len: u64) -> Result<Option<LayoutSpec>, DumpError> {
    let content = open_content(path)?;
    let layout = layout_of(path, content.bytes(), len);
    // What cannot be read looks like what is not there.
    check_content(&content, path)?;
    layout
}

fn layout_of(path: &Path, data: FileBytes<'_>, len: u64) -> Result<Option<LayoutSpec>, DumpError> {
    let bad =
        |what, offset, value| DumpError::malformed(path, what, FileOffset::new(offset), value);
    let tags = memory_tags(path, data)?;
    let count = tags.get(&(COUNT, 0)).copied();
    let Some(count) = count.filter(|count| *count > 0) else {
        return match tags.keys().find(|(name, _)| *name != COUNT) {
            None => Ok(None),
            Some((_, number)) => Err(bad(
                "memory regions without the tag `regionsCount`",
                0,
                *number,
            )),
        };
    };
    if count > MAX_REGIONS {
        return Err(bad("too many regions of memory", 0, count));
    }
    let mut regions = Vec::new();
    for number in 0..count {
        let tag = |name| {
            let value = tags.get(&(name, number)).copied();
            let bytes = value.and_then(|pages: u64| pages.checked_mul(PAGE));
            bytes.ok_or_else(|| {
                bad(
                    "memory region without its address or length, number",
                    0,
                    number,
                )
            })
        };
        let (guest, file, size) = (tag("regionPPN")?, tag("regionPageNum")?, tag("regionSize")?);
        let range = GpaRange::with_len(Gpa::new(guest), size).filter(|range| !range.is_empty());
        let range = range.ok_or_else(|| bad("an invalid length of a region", 0, size))?;
        regions.push((file, range));
    }
    regions.sort_unstable();
    // A raw file has them one behind the other.
    let mut at = 0_u64;
    for (file, range) in &regions {
        if *file != at {
            return Err(bad(
                "a region that is not behind the one before it",
                at,
                *file,
            ));
        }
        at = at
            .checked_add(range.len())
            .filter(|at| *at <= len)
            .ok_or_else(|| {
                bad(
                    "a region beyond the end of the memory's file",
                    *file,
                    range.len(),
                )
            })?;
    }
    let ranges = regions.into_iter().map(|(_, range)| range).collect();
    Ok(Some(LayoutSpec::Ranges(ranges)))
}

/// The tags of the group `memory` that tell of regions: by name and number.
fn memory_tags(
    path: &Path,
    data: FileBytes<'_>,
) -> Result<BTreeMap<(&'static str, u64), u64>, DumpError> {
    /// The tags that are kept.
    const KNOWN: [&str; 4] = [COUNT, "regionPPN", "regionPageNum", "regionSize"];
    let bad =
        |what, offset, value| DumpError::malformed(path, what, FileOffset::new(offset), value);
    let cut = |cut: CutShort| {
        bad(
            "truncated: the file ends inside its tags",
            cut.offset,
            cut.left,
        )
    };
    let start: Option<[u8; 4]> = data.array_at(0);
    let version = match start {
        Some([first, ..]) if start.is_some_and(|start| MAGICS.contains(&start)) => first & 0xf,
        _ => return Err(bad("missing magic of a VMware state", 0, 0)),
    };
    let mut cursor = Cursor::at(data, group_named(path, data, b"memory")?);
    let mut tags = BTreeMap::new();
    // Each turn reads two bytes at least, so that this ends with the file.
    for _ in 0..MAX_TAGS {
        let flags: u8 = cursor.le().map_err(cut)?;
        let name_len: u8 = cursor.le().map_err(cut)?;
        if (flags, name_len) == (0, 0) {
            return Ok(tags);
        }
        let name = cursor.take(name_len.into()).map_err(cut)?;
        let name = name.copied().ok_or_else(|| {
            bad(
                "a tag that cannot be read",
                cursor.position(),
                name_len.into(),
            )
        })?;
        let mut indices = Vec::new();
        for _ in 0..flags >> 6 {
            indices.push(cursor.le::<u32>().map_err(cut)?);
        }
        let len = u64::from(flags & 0x3f);
        if matches!(len, 0x3e | 0x3f) {
            // A long one: its length in the file, in memory, and what is left out for its alignment.
            let len = if version == 0 {
                let len = cursor.le::<u32>().map_err(cut)?;
                cursor.skip(4).map_err(cut)?;
                len.into()
            } else {
                let len = cursor.le::<u64>().map_err(cut)?;
                cursor.skip(8).map_err(cut)?;
                len
            };
            let padding = u64::from(cursor.le::<u16>().map_err(cut)?);
            cursor.skip(padding).map_err(cut)?;
            cursor.skip(len).map_err(cut)?;
            continue;
        }
        let at = cursor.position();
        let value = cursor.take(len).map_err(cut)?;
        let known = KNOWN.into_iter().find(|known| known.as_bytes() == name);
        if let Some(known) = known {
            let value = number(value).ok_or_else(|| bad("an invalid length of a tag", at, len))?;
            let number = match indices.first() {
                Some(number) => *number,
                None if known == COUNT => 0,
                None => return Err(bad("memory region without its number", at, value)),
            };
            tags.insert((known, number.into()), value);
        }
    }
    Err(bad("too many tags", cursor.position(), to_u64(MAX_TAGS)))
}

/// A little-endian number of four or eight bytes.
fn number(bytes: FileBytes<'_>) -> Option<u64> {
    match bytes.len() {
        4 => bytes.u32_at(0).map(u64::from),
        8 => bytes.u64_at(0),
        _ => None,
    }
}

/// The offset of the tags of a group.
fn group_named(path: &Path, data: FileBytes<'_>, wanted: &[u8]) -> Result<u64, DumpError> {
    let bad =
        |what, offset, value| DumpError::malformed(path, what, FileOffset::new(offset), value);
    let cut = |cut: CutShort| {
        bad(
            "truncated: the file ends inside its groups",
            cut.offset,
            cut.left,
        )
    };
    let mut header = Cursor::at(data, 8);
    let groups = header.le::<u32>().map_err(cut)?;
    if groups > MAX_GROUPS {
        return Err(bad("too many groups", 8, groups.into()));
    }
    let mut cursor = Cursor::at(data, HEADER);
    for _ in 0..groups {
        let begin = cursor.position();
        let name: [u8; NAME] = cursor.array().map_err(cut)?;
        let tags = cursor.le::<u64>().map_err(cut)?;
        cursor.skip(8).map_err(cut)?; // what is not known
        let name = name.split(|byte| *byte == 0).next().unwrap_or(&name);
        if name == wanted {
            let inside = tags < to_u64(data.len());
            return inside
                .then_some(tags)
                .ok_or_else(|| bad("invalid offset of a group's tags", begin, tags));
        }
    }
    Err(bad("missing group `memory`", HEADER, groups.into()))
}

#[cfg(test)]
mod tests {
    use super::layout_of;
    use proptest::prelude::*;
    use std::path::Path;

    fn tag(out: &mut Vec<u8>, name: &str, indices: &[u32], value: &[u8]) {
        out.push(u8::try_from(indices.len() << 6 | value.len()).unwrap());
        out.push(u8::try_from(name.len()).unwrap());
        out.extend(name.as_bytes());
        for index in indices {
            out.extend(index.to_le_bytes());
        }
        out.extend(value);
    }

    /// Regions as first page in the guest, in the file, and pages.
    fn state(version: u8, regions: &[(u32, u32, u32)]) -> Vec<u8> {
        let mut out = if version == 0 {
            b"\xd0\xbe\xd2\xbe".to_vec()
        } else {
            b"\xd2\xbe\xd2\xbe".to_vec()
        };
        out.extend([8, 0, 0, 0, 2, 0, 0, 0]);
        let tags_at = 12 + 2 * 80_u64;
        for (name, at) in [("Checkpoint", tags_at + 1), ("memory", tags_at)] {
            let mut group = name.as_bytes().to_vec();
            group.resize(64, 0);
            group.extend(at.to_le_bytes());
            group.extend([0; 8]);
            out.extend(group);
        }
        tag(&mut out, "hotSet", &[], b"\x01");
        // A long one, with what aligns it.
        out.extend(b"\x3f\x06Memory");
        if version == 0 {
            out.extend([5, 0, 0, 0, 9, 0, 0, 0, 3, 0]);
        } else {
            out.extend([5, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 3, 0]);
        }
        out.extend([0xff; 8]);
        let count = u32::try_from(regions.len()).unwrap();
        tag(&mut out, "regionsCount", &[], &count.to_le_bytes());
        for (number, (guest, file, pages)) in (0..).zip(regions) {
            for (name, value) in [
                ("regionPageNum", file),
                ("regionPPN", guest),
                ("regionSize", pages),
            ] {
                tag(&mut out, name, &[number], &value.to_le_bytes());
            }
        }
        out.extend([0; 16]);
        out
    }

    fn read(bytes: &[u8], len: u64) -> Result<String, crate::DumpError> {
        let layout = layout_of(Path::new("vmss"), bytes.into(), len)?;
        Ok(layout.map_or("none".into(), |layout| layout.to_string()))
    }

    #[test]
    fn regions_are_where_the_state_has_them() {
        let split = [(0, 0, 0xc_0000), (0x10_0000, 0xc_0000, 0x4_0000)];
        for version in [0, 2] {
            let said = read(&state(version, &split), 4 << 30).unwrap();
            assert_eq!(said, "0x0-0xc0000000,0x100000000-0x140000000");
            let other_order = [split[1], split[0]];
            assert_eq!(read(&state(version, &other_order), 4 << 30).unwrap(), said);
            assert_eq!(read(&state(version, &[]), 1 << 30).unwrap(), "none");
        }
        for (regions, len) in [
            (&[(0, 1, 4)][..], 1 << 20),
            (&[(0, 0, 4), (16, 5, 1)], 1 << 20),
            (&[(0, 0, 0)], 1 << 20),
            (&[(0, 0, 4)], 0x3000),
            (&[(u32::MAX, 0, u32::MAX)], 1 << 20),
        ] {
            assert!(read(&state(2, regions), len).is_err(), "{regions:?}");
        }
        // Regions without their count, and one without its number.
        let renamed = |from: &str, to: &str| {
            let mut bytes = state(2, &split);
            let at = bytes
                .windows(from.len())
                .position(|name| name == from.as_bytes());
            bytes[at.unwrap()..][..to.len()].copy_from_slice(to.as_bytes());
            bytes
        };
        assert!(read(&renamed("regionsCount", "regionsCounx"), 4 << 30).is_err());
        let mut no_count = state(2, &split);
        let at = no_count
            .windows(12)
            .position(|name| name == b"regionsCount");
        no_count[at.unwrap() + 12..][..4].fill(0);
        assert!(read(&no_count, 4 << 30).is_err());
        let mut no_number = state(2, &[])[..].to_vec();
        no_number.truncate(no_number.len() - 16);
        tag(&mut no_number, "regionPPN", &[], &[0; 4]);
        no_number.extend([0; 16]);
        assert!(read(&no_number, 1 << 30).is_err());
        let mut unnamed = state(2, &[]);
        let at = unnamed.windows(12).position(|name| name == b"regionsCount");
        unnamed[at.unwrap() + 11] = b'x';
        assert_eq!(read(&unnamed, 8 << 30).unwrap(), "none");
        // More groups, regions and tags than there may be.
        let mut groups = state(2, &split);
        groups[9] = 0x20;
        assert!(read(&groups, 4 << 30).is_err());
        assert!(read(&state(2, &vec![(0, 0, 1); 4097]), 1 << 30).is_err());
        let mut tags = state(2, &[])[..12 + 160].to_vec();
        tags.extend(b"\0\x01x".repeat(1 << 20));
        tags.extend([0; 2]);
        assert!(read(&tags, 1 << 30).is_err());
        let whole = state(2, &split);
        // The last tags need not be followed by more than their end.
        for len in 0..whole.len() - 14 {
            assert!(read(&whole[..len], 4 << 30).is_err(), "{len}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn no_bytes_are_too_strange(at in 0_usize..400, byte in any::<u8>(), len in any::<u64>()) {
            let mut bytes = state(2, &[(0, 0, 4), (16, 4, 4)]);
            let at = at % bytes.len();
            bytes[at] = byte;
            let _ = read(&bytes, len);
        }
    }
}
