//! The memory of the guest in a running QEMU, found.

use crate::error::QemuError;
use crate::process::{Backing, Mapping, Process};
use crate::qmp::{Qmp, shortened};
use crate::sealed::Sealed;
use crate::tables::{self, Placed, RamBlock};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sonicshot::{Gpa, GpaRange};
use std::collections::HashSet;
use std::sync::Arc;

/// The most that all blocks beside the guest's RAM may have: firmware, tables, video memory.
pub(crate) const MAX_SMALL: u64 = 1 << 30;

/// A range of the guest's RAM, in one block.
#[derive(Debug, Clone)]
pub(crate) struct Segment {
    /// Its range in the guest.
    pub range: GpaRange,
    /// Its offset in its block, in bytes.
    pub offset: u64,
    /// The place where its block is read.
    pub backing: Backing,
}

/// The place of a part of a block in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Piece {
    /// In the block, in bytes.
    pub offset: u64,
    /// In the guest.
    pub gpa: u64,
    /// In bytes.
    pub len: u64,
}

/// A RAM block, and what it is.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub block: RamBlock,
    pub backing: Backing,
    /// Of the guest's RAM: where it is, all of it. `None` of a small block.
    pub pieces: Option<Vec<Piece>>,
}

/// The blocks of a QEMU, by its own word alone: of one that is to be restored into, too.
#[derive(Debug, Clone)]
pub(crate) struct Blocks {
    pub all: Vec<RamBlock>,
    placed: Vec<Placed>,
    /// The blocks that are the guest's RAM.
    ram: HashSet<String>,
}

impl Blocks {
    /// Asks QEMU.
    pub(crate) fn ask(qmp: &mut Qmp) -> Result<Self, QemuError> {
        let all = tables::ram_blocks(&qmp.human("info ramblock")?)?;
        let placed = tables::placed(&qmp.human("info mtree -f")?)?;
        let mut ram = HashSet::new();
        if let Value::Array(backends) = qmp.run("query-memdev", Value::Null)? {
            for backend in backends {
                let Some(id) = backend.get("id").and_then(Value::as_str) else {
                    continue;
                };
                ram.insert(id.to_owned());
            }
        }
        let new = Self { all, placed, ram };
        let pieces = new
            .all
            .iter()
            .filter_map(|block| new.pieces(block).transpose());
        if pieces.collect::<Result<Vec<_>, _>>()?.is_empty() {
            return Err(QemuError::Unknown {
                what: "query-memdev and info mtree -f",
                found: format!("none of the backends {:?} is RAM of the guest", new.ram),
                expected: "at least one",
            });
        }
        Ok(new)
    }

    /// The pieces of a block in the guest, if it is the guest's RAM: all of it.
    pub(crate) fn pieces(&self, block: &RamBlock) -> Result<Option<Vec<Piece>>, QemuError> {
        let name = block.short_name();
        if !self.ram.contains(name) {
            return Ok(None);
        }
        let placed = self.placed.iter().filter(|one| one.region == name);
        let pieces: Vec<_> = placed
            .map(|one| Piece {
                offset: one.offset,
                gpa: one.range.start().raw(),
                len: one.range.len(),
            })
            .collect();
        if pieces.is_empty() {
            return Ok(None);
        }
        whole(block, pieces).map(Some)
    }
}

/// Puts together what lies in a row, and what devices lie over: RAM all the same.
fn whole(block: &RamBlock, mut pieces: Vec<Piece>) -> Result<Vec<Piece>, QemuError> {
    let wrong = |what: &str| QemuError::Unknown {
        what: "info mtree -f",
        found: format!("block `{}`: {what}", block.name),
        expected: "each byte of the guest's RAM at one place",
    };
    pieces.sort_by_key(|piece| piece.offset);
    let mut out: Vec<Piece> = Vec::new();
    for piece in pieces {
        let end = piece.offset.checked_add(piece.len);
        let end = end.filter(|end| *end <= block.used);
        let end = end.ok_or_else(|| wrong("it is longer there than it is"))?;
        let Some(last) = out.last_mut() else {
            // What lies before the first piece is where it would be in a row.
            let gpa = piece.gpa.checked_sub(piece.offset);
            out.push(Piece {
                offset: 0,
                gpa: gpa.ok_or_else(|| wrong("its beginning has no place"))?,
                len: end,
            });
            continue;
        };
        let reached = last.offset.checked_add(last.len);
        let gap = reached.and_then(|reached| piece.offset.checked_sub(reached));
        let gap = gap.ok_or_else(|| wrong("a part of it is there twice"))?;
        let in_row = last
            .gpa
            .checked_add(piece.offset)
            .and_then(|at| at.checked_sub(last.offset));
        // What is between them belongs to the first.
        let longer = last.len.checked_add(gap);
        last.len = longer.ok_or_else(|| wrong("it is too long"))?;
        if in_row == Some(piece.gpa) {
            let longer = last.len.checked_add(piece.len);
            last.len = longer.ok_or_else(|| wrong("it is too long"))?;
        } else {
            out.push(piece);
        }
    }
    if let Some(last) = out.last_mut() {
        let rest = block.used.checked_sub(last.offset);
        last.len = rest.ok_or_else(|| wrong("it is longer there than it is"))?;
    }
    let aligned = |piece: &Piece| (piece.offset | piece.gpa | piece.len).is_multiple_of(4096);
    if !out.iter().all(aligned) {
        return Err(wrong("a part of it does not begin or end at a page"));
    }
    Ok(out)
}

/// All blocks, with where they are read.
pub(crate) fn find(
    qmp: &mut Qmp,
    blocks: &Blocks,
    process: &Arc<Process>,
) -> Result<Vec<Found>, QemuError> {
    let mappings = process.mappings()?;
    let mut pieces = Vec::new();
    for block in &blocks.all {
        pieces.push(blocks.pieces(block)?);
    }
    let small = blocks
        .all
        .iter()
        .zip(&pieces)
        .filter(|(_, pieces)| pieces.is_none());
    check_small(small.map(|(block, _)| block.used))?;
    let addresses = addresses(qmp, blocks, &pieces, &mappings)?;
    let mut found = Vec::new();
    for ((block, pieces), address) in blocks.all.iter().zip(pieces).zip(addresses) {
        let backing = backing(block, address, &mappings, process)?;
        found.push(Found {
            block: block.clone(),
            backing,
            pieces,
        });
    }
    Ok(found)
}

/// Refuses more beside the guest's RAM than is copied.
fn check_small(mut bytes: impl Iterator<Item = u64>) -> Result<(), QemuError> {
    let all = bytes.try_fold(0_u64, u64::checked_add);
    if all.is_some_and(|bytes| bytes <= MAX_SMALL) {
        return Ok(());
    }
    Err(QemuError::not_this(format!(
        "the blocks of memory beside the guest's RAM have more than {MAX_SMALL} bytes"
    )))
}

/// The address of each block in QEMU: by its word, by that of a place in the guest, or by the only
/// mapping that is as long.
fn addresses(
    qmp: &mut Qmp,
    blocks: &Blocks,
    pieces: &[Option<Vec<Piece>>],
    mappings: &[Mapping],
) -> Result<Vec<u64>, QemuError> {
    let mut found: Vec<Option<u64>> = Vec::new();
    for (block, pieces) in blocks.all.iter().zip(pieces) {
        let by_place = match pieces.as_ref().and_then(|pieces| pieces.first()) {
            Some(first) => Some(by_place(qmp, first, &blocks.placed, block)?),
            // What has several of its name need not be the one at that place.
            None if block.address.is_none() => small_by_place(qmp, block, blocks)?,
            None => None,
        };
        match (block.address, by_place) {
            (Some(one), Some(other)) if one != other => {
                return Err(QemuError::Unknown {
                    what: "gpa2hva",
                    found: format!("block `{}` at {other:#x}", block.name),
                    expected: "where info ramblock has it",
                });
            }
            (one, other) => found.push(one.or(other)),
        }
    }
    // Where QEMU has no word (7.2), each block is a mapping of its own.
    for _ in 0..blocks.all.len() {
        let taken: HashSet<u64> = found.iter().flatten().copied().collect();
        let mut new = false;
        for (block, address) in blocks.all.iter().zip(&mut found) {
            if address.is_some() {
                continue;
            }
            if let Some(only) = only_fitting(block, mappings, &taken) {
                *address = Some(only);
                new = true;
            }
        }
        let known: Vec<u64> = found.iter().flatten().copied().collect();
        if known.iter().collect::<HashSet<_>>().len() != known.len() {
            return Err(QemuError::not_this(
                "two blocks of memory seem to be at one place",
            ));
        }
        if !new {
            break;
        }
    }
    let all = blocks.all.iter().zip(found);
    all.map(|(block, address)| {
        address.ok_or_else(|| {
            QemuError::not_this(format!(
                "QEMU does not say where block `{}` ({:#x} bytes) is, and no or several of its \
                 mappings are as long",
                block.name, block.total
            ))
        })
    })
    .collect()
}

/// The only mapping that may be this block by its length; of several the only one behind which there
/// is a page that nobody may touch, as QEMU leaves one behind each block. A library's data may be as
/// long by chance.
fn only_fitting(block: &RamBlock, mappings: &[Mapping], taken: &HashSet<u64>) -> Option<u64> {
    let fits = |mapping: &&Mapping| {
        let private = mapping.rights.starts_with("rw") && mapping.rights.ends_with('p');
        private
            && mapping.start.is_multiple_of(2 << 20)
            && mapping.len().is_some()
            && mapping.len() == block.total.checked_next_multiple_of(4096)
            && !taken.contains(&mapping.start)
    };
    let has_guard = |mapping: &&Mapping| {
        let mut behind = mappings.iter().filter(|one| one.start == mapping.end);
        mapping.inode == 0 && behind.any(|one| one.rights.starts_with("---"))
    };
    let fitting = || mappings.iter().filter(fits);
    only(fitting()).or_else(|| only(fitting().filter(has_guard)))
}

fn only<'m>(mut some: impl Iterator<Item = &'m Mapping>) -> Option<u64> {
    match (some.next(), some.next()) {
        (Some(only), None) => Some(only.start),
        _ => None,
    }
}

/// The address of a block by its first byte in the guest that nothing lies over.
fn by_place(
    qmp: &mut Qmp,
    first: &Piece,
    placed: &[Placed],
    block: &RamBlock,
) -> Result<u64, QemuError> {
    let name = block.short_name();
    let shown = placed.iter().find(|one| one.region == name);
    let (gpa, offset) = shown.map_or((first.gpa, first.offset), |one| {
        (one.range.start().raw(), one.offset)
    });
    let text = qmp.human(&format!("gpa2hva {gpa:#x}"))?;
    let unknown = || QemuError::Unknown {
        what: "gpa2hva",
        found: format!("`{}`", shortened(&text)),
        expected: "Host virtual address for ... is 0x...",
    };
    let (_, address) = text.rsplit_once(" is 0x").ok_or_else(unknown)?;
    let address = u64::from_str_radix(address.trim(), 16).map_err(|_| unknown())?;
    address.checked_sub(offset).ok_or_else(unknown)
}

/// The same of a block that is no RAM of the guest's, if it is the only one of its name and it is
/// in the guest.
fn small_by_place(
    qmp: &mut Qmp,
    block: &RamBlock,
    blocks: &Blocks,
) -> Result<Option<u64>, QemuError> {
    let name = block.short_name();
    let alike = blocks.all.iter().filter(|other| other.short_name() == name);
    let shown = blocks.placed.iter().find(|one| one.region == name);
    let (1, Some(one)) = (alike.count(), shown) else {
        return Ok(None);
    };
    let piece = Piece {
        offset: one.offset,
        gpa: one.range.start().raw(),
        len: one.range.len(),
    };
    // Of a device that answers itself there is none.
    match by_place(qmp, &piece, &blocks.placed, block) {
        Ok(address) => Ok(Some(address)),
        Err(QemuError::Refused { .. } | QemuError::Unknown { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

fn backing(
    block: &RamBlock,
    address: u64,
    mappings: &[Mapping],
    process: &Arc<Process>,
) -> Result<Backing, QemuError> {
    let wrong = |what: &str| {
        QemuError::not_this(format!(
            "block `{}`, which QEMU has at {address:#x}: {what}. Is {} the process whose monitor \
             this is?",
            block.name,
            process.pid()
        ))
    };
    let end = address
        .checked_add(block.used)
        .ok_or_else(|| wrong("it is too long"))?;
    let first = mappings
        .iter()
        .position(|one| one.start <= address && address < one.end);
    let first = first.ok_or_else(|| wrong("that process has nothing there"))?;
    let over: Vec<&Mapping> = mappings
        .iter()
        .skip(first)
        .take_while(|one| one.start < end)
        .collect();
    let in_row = over
        .windows(2)
        .all(|two| matches!(two, [a, b] if a.end == b.start));
    let readable = over.iter().all(|one| one.rights.starts_with('r'));
    if !in_row || !readable || over.last().is_none_or(|last| last.end < end) {
        return Err(wrong("that process has not all of it mapped there"));
    }
    if let [only] = over.as_slice()
        && only.is_shared()
        && let Some(file) = process.file_of(only)
    {
        let inside = address.checked_sub(only.start);
        let offset = inside.and_then(|inside| only.offset.checked_add(inside));
        return Ok(Backing::File {
            sealed: Sealed::new(&file).map(Arc::new),
            file: Arc::new(file),
            offset: offset.ok_or_else(|| wrong("its place in its file is none"))?,
        });
    }
    Ok(Backing::Process {
        process: Arc::clone(process),
        address,
    })
}

/// The guest's RAM, of what was found.
pub(crate) fn segments(found: &[Found]) -> Result<Vec<Segment>, QemuError> {
    let mut out = Vec::new();
    for one in found {
        for piece in one.pieces.iter().flatten() {
            let range = GpaRange::with_len(Gpa::new(piece.gpa), piece.len);
            out.push(Segment {
                range: range.ok_or_else(|| QemuError::Unknown {
                    what: "info mtree -f",
                    found: format!("{:#x} bytes at {:#x}", piece.len, piece.gpa),
                    expected: "RAM within 64 bits",
                })?,
                offset: piece.offset,
                backing: one.backing.clone(),
            });
        }
    }
    Ok(out)
}

/// A file that the guest's RAM is, and of which no page can be waited for: QEMU 7.2 says so too late,
/// when it has begun with a postcopy.
pub(crate) fn on_a_disk(qmp: &mut Qmp) -> Result<Option<String>, QemuError> {
    let Value::Array(backends) = qmp.run("query-memdev", Value::Null)? else {
        return Ok(None);
    };
    for backend in backends {
        let Some(id) = backend.get("id").and_then(Value::as_str) else {
            continue;
        };
        let arguments = json!({"path": format!("/objects/{id}"), "property": "mem-path"});
        let path = match qmp.run("qom-get", arguments) {
            Ok(Value::String(path)) => path,
            // It is no file.
            Ok(_) | Err(QemuError::Refused { .. }) => continue,
            Err(error) => return Err(error),
        };
        let in_memory = |found: &rustix::fs::StatFs| {
            [libc::TMPFS_MAGIC, libc::HUGETLBFS_MAGIC].contains(&found.f_type)
        };
        // Of one that is not seen from here QEMU itself has the last word.
        if rustix::fs::statfs(&path).is_ok_and(|found| !in_memory(&found)) {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// The guest's machine, as migration streams have it.
pub(crate) fn machine(qmp: &mut Qmp) -> Result<String, QemuError> {
    let answer = qmp.run("qom-get", json!({"path": "/machine", "property": "type"}))?;
    let name = answer
        .as_str()
        .and_then(|name| name.strip_suffix("-machine"));
    let name = name.filter(|name| (1..256).contains(&name.len()));
    name.map(str::to_owned).ok_or_else(|| QemuError::Unknown {
        what: "the machine's type",
        found: shortened(&answer.to_string()),
        expected: "NAME-machine",
    })
}

#[cfg(test)]
mod tests {
    use super::{MAX_SMALL, Piece, check_small, only_fitting, whole};
    use crate::process::Mapping;
    use crate::tables::RamBlock;
    use std::collections::HashSet;

    fn block(used: u64) -> RamBlock {
        RamBlock {
            name: "ram0".into(),
            page_size: 4096,
            used,
            total: used,
            address: None,
        }
    }

    #[test]
    fn a_block_is_the_only_mapping_that_fits() {
        let mapping = |start: u64, len: u64, rights: &str, inode| Mapping {
            start: start << 20,
            end: (start << 20) + len,
            rights: rights.into(),
            offset: 0,
            inode,
            path: String::new(),
        };
        let block = block(0x1000);
        let ours = mapping(4, 0x1000, "rw-p", 0);
        let guard = Mapping {
            start: ours.end,
            end: ours.end + 0x1000,
            ..mapping(0, 0, "---p", 0)
        };
        let library = mapping(8, 0x1000, "rw-p", 77);
        let others = [
            mapping(6, 0x2000, "rw-p", 0),
            mapping(11, 0x1000, "rw-p", 0),
            mapping(12, 0x1000, "rw-s", 0),
            mapping(14, 0x1000, "r--p", 0),
        ];
        let found = |some: &[&Mapping], taken: &[u64]| {
            let all: Vec<Mapping> = some.iter().copied().chain(&others).cloned().collect();
            only_fitting(&block, &all, &taken.iter().copied().collect::<HashSet<_>>())
        };
        assert_eq!(found(&[], &[]), None);
        assert_eq!(found(&[&ours], &[]), Some(4 << 20));
        assert_eq!(found(&[&ours], &[4 << 20]), None);
        assert_eq!(found(&[&ours, &guard, &library], &[]), Some(4 << 20));
        // Without the guard nothing tells them apart.
        assert_eq!(found(&[&ours, &library], &[]), None);
    }

    fn pieces(all: &[(u64, u64, u64)]) -> Vec<Piece> {
        let piece = |&(offset, gpa, len): &(u64, u64, u64)| Piece { offset, gpa, len };
        all.iter().map(piece).collect()
    }

    #[test]
    fn what_lies_beside_ram_is_bounded() {
        assert!(check_small([MAX_SMALL - 5, 5].into_iter()).is_ok());
        assert!(check_small([MAX_SMALL - 5, 6].into_iter()).is_err());
        assert!(check_small([u64::MAX, 6].into_iter()).is_err());
    }

    #[test]
    fn what_devices_lie_over_is_ram() {
        const M: u64 = 1 << 20;
        // A `pc` of 4 GiB; one whose low end a device lies over; one with a hole at its beginning.
        for (used, shown, expected) in [
            (
                4096 * M,
                &[
                    (0, 0, 0xa0000),
                    (M, M, 3071 * M),
                    (3072 * M, 4096 * M, 1024 * M),
                ][..],
                &[(0, 0, 3072 * M), (3072 * M, 4096 * M, 1024 * M)][..],
            ),
            (
                4096 * M,
                &[(0, 0, 2040 * M), (2048 * M, 4096 * M, 2047 * M)],
                &[(0, 0, 2048 * M), (2048 * M, 4096 * M, 2048 * M)],
            ),
            (64 * M, &[(M, M, 63 * M)], &[(0, 0, 64 * M)]),
            (64 * M, &[(0, 128 * M, 64 * M)], &[(0, 128 * M, 64 * M)]),
        ] {
            let found = whole(&block(used), pieces(shown)).unwrap();
            assert_eq!(found, pieces(expected));
        }
        for (used, shown) in [
            (M, &[(0, 0, 2 * M)][..]),
            (2 * M, &[(0, 0, M), (0, 8 * M, M)]),
            (2 * M, &[(M, 0, M)]),
            (2 * M, &[(0, 0, M), (M, 7, M)]),
            (2 * M, &[(u64::MAX, 0, M)]),
        ] {
            assert!(whole(&block(used), pieces(shown)).is_err(), "{shown:?}");
        }
    }
}
