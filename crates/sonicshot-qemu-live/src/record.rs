//! The parts of a QEMU guest's checkpoint beside its memory: three kinds of blobs.
//!
//! | blob | content |
//! |---|---|
//! | `qemu-live` | the [`Record`], JSON |
//! | `qemu-devices` | what `xen-save-devices-state` wrote |
//! | `qemu-block-N` | of block `N`, beside the guest's RAM, the pages that are not zero, in their order |

use crate::error::QemuError;
use crate::find::{MAX_SMALL, Piece};
use crate::tables::RamBlock;
use serde::{Deserialize, Serialize};
use sonicshot::checkpoint::CheckpointReader;
use sonicshot::{Tally, to_u64};
use std::fs::File;
use std::path::Path;

pub(crate) const RECORD: &str = "qemu-live";
pub(crate) const DEVICES: &str = "qemu-devices";
pub(crate) const VERSION: u32 = 1;
/// The longest record, and the longest state of devices, in bytes.
const MAX_RECORD: u64 = 16 << 20;
pub(crate) const MAX_DEVICES: u64 = 256 << 20;
/// The marks at which device state begins and ends.
pub(crate) const DEVICES_START: [u8; 8] = *b"QEVM\0\0\0\x03";
const DEVICES_END: u8 = 0;
pub(crate) const PAGE: usize = 4096;

/// The guest, as its QEMU had it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub version: u32,
    /// QEMU's version.
    pub qemu: String,
    /// The machine, as streams have it.
    pub machine: String,
    /// Whether it was found paused.
    pub paused: bool,
    pub blocks: Vec<Block>,
}

/// A RAM block.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Block {
    #[serde(flatten)]
    pub block: RamBlock,
    /// Of the guest's RAM: where it is.
    pub pieces: Option<Vec<Piece>>,
    /// Of other blocks the pages that are not zero: the first of each run, and how many.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub runs: Vec<(u64, u64)>,
}

/// The blob of a block's pages.
pub(crate) fn blob_of(number: usize) -> String {
    format!("qemu-block-{number}")
}

/// The pages of a block that are not zero: their runs, and their bytes.
pub(crate) fn pack(bytes: &[u8]) -> (Vec<(u64, u64)>, Vec<u8>) {
    let (mut runs, mut kept) = (Vec::<(u64, u64)>::new(), Vec::new());
    for (number, page) in (0_u64..).zip(bytes.chunks(PAGE)) {
        if page.iter().all(|byte| *byte == 0) {
            continue;
        }
        kept.extend_from_slice(page);
        match runs.last_mut() {
            Some((first, count)) if first.checked_add(*count) == Some(number) => {
                // There are no more than pages of `bytes`.
                *count = Tally::new(*count).and(1).get();
            }
            _ => runs.push((number, 1)),
        }
    }
    (runs, kept)
}

/// The offset of each page of these runs in its block, in bytes.
pub(crate) fn offsets(runs: &[(u64, u64)]) -> impl Iterator<Item = u64> + '_ {
    let numbers = runs
        .iter()
        .flat_map(|(first, count)| (0..*count).map_while(|number| first.checked_add(number)));
    numbers.map_while(|page| page.checked_mul(to_u64(PAGE)))
}

/// Whether `bytes` can be what QEMU writes of devices.
pub(crate) fn is_device_state(bytes: &[u8]) -> bool {
    bytes.starts_with(&DEVICES_START)
        && bytes
            .len()
            .checked_sub(DEVICES_START.len())
            .is_some_and(|more| more > 1)
        && bytes.last() == Some(&DEVICES_END)
}

/// A small block, as it was.
#[derive(Debug)]
pub(crate) struct Small {
    pub block: RamBlock,
    pub runs: Vec<(u64, u64)>,
    /// The pages of all runs.
    pub bytes: Vec<u8>,
}

/// All that a checkpoint has of a QEMU guest, but for its RAM.
#[derive(Debug)]
pub(crate) struct Kept {
    pub record: Record,
    /// As QEMU wrote it.
    pub devices: Vec<u8>,
    pub small: Vec<Small>,
}

impl Kept {
    /// Reads it, and checks that it can be.
    pub(crate) fn read(reader: &CheckpointReader<File>, path: &Path) -> Result<Self, QemuError> {
        let wrong = |what: String| QemuError::NoGuest {
            path: path.to_owned(),
            what,
        };
        let blob = |name: &str, most: u64| {
            let len = reader
                .blobs()
                .find(|(found, _)| *found == name)
                .map(|(_, len)| len);
            match len {
                Some(len) if len <= most => {}
                Some(len) => return Err(wrong(format!("its blob {name} has {len} bytes"))),
                None => return Err(wrong(format!("there is no blob {name}"))),
            }
            reader.read_blob(name).map_err(QemuError::checkpoint(path))
        };
        let record: Record = serde_json::from_slice(&blob(RECORD, MAX_RECORD)?)
            .map_err(|error| wrong(format!("its blob {RECORD}: {error}")))?;
        if record.version != VERSION {
            return Err(wrong(format!(
                "its record is of version {}; version {VERSION} is known",
                record.version
            )));
        }
        record.check().map_err(&wrong)?;
        let devices = blob(DEVICES, MAX_DEVICES)?;
        if !is_device_state(&devices) {
            return Err(wrong(format!(
                "its blob {DEVICES} is not the state of devices"
            )));
        }
        let mut small = Vec::new();
        let mut all = 0_u64;
        for (number, block) in record.blocks.iter().enumerate() {
            if block.pieces.is_some() {
                continue;
            }
            let pages = block.page_count();
            let pages = pages.ok_or_else(|| {
                let name = &block.block.name;
                wrong(format!("block `{name}` has more pages than 64 bits count"))
            })?;
            let bytes = match pages {
                0 => Vec::new(),
                _ => blob(&blob_of(number), MAX_SMALL)?,
            };
            let len = u64::try_from(bytes.len()).map_err(|_| wrong("its length".into()))?;
            all = all
                .checked_add(len)
                .filter(|all| *all <= MAX_SMALL)
                .ok_or_else(|| {
                    wrong(format!("its small blocks have more than {MAX_SMALL} bytes"))
                })?;
            if pages.checked_mul(4096) != Some(len) {
                return Err(wrong(format!(
                    "block `{}` has {pages} pages by the record, and {len} bytes",
                    block.block.name,
                )));
            }
            small.push(Small {
                block: block.block.clone(),
                runs: block.runs.clone(),
                bytes,
            });
        }
        Ok(Self {
            record,
            devices,
            small,
        })
    }
}

impl Block {
    /// `None` if there are more than 64 bits count: no blob has such a length.
    fn page_count(&self) -> Option<u64> {
        let mut counts = self.runs.iter().map(|(_, count)| *count);
        counts.try_fold(0, u64::checked_add)
    }
}

impl Record {
    pub(crate) fn check(&self) -> Result<(), String> {
        if !(1..256).contains(&self.machine.len()) {
            return Err("the name of its machine".into());
        }
        for block in &self.blocks {
            let RamBlock {
                name, used, total, ..
            } = &block.block;
            let wrong = |what: &str| Err(format!("block `{name}`: {what}"));
            if !(1..256).contains(&name.len()) || !used.is_multiple_of(4096) || used > total {
                return wrong("its name or length");
            }
            let mut end = 0;
            for (first, count) in &block.runs {
                let next = first.checked_add(*count);
                let inside =
                    next.filter(|next| next.checked_mul(4096).is_some_and(|at| at <= *used));
                match inside {
                    Some(next) if *first >= end && *count > 0 => end = next,
                    _ => return wrong("its pages"),
                }
            }
            let mut end = 0;
            for piece in block.pieces.iter().flatten() {
                let next = piece.offset.checked_add(piece.len);
                let sound = piece.offset == end
                    && piece.gpa.checked_add(piece.len).is_some()
                    && (piece.gpa | piece.len).is_multiple_of(4096);
                match next {
                    Some(next) if sound && next <= *used => end = next,
                    _ => return wrong("where it is in the guest"),
                }
            }
            if block.pieces.is_some() && end != *used {
                return wrong("where all of it is in the guest");
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{Block, DEVICES, Kept, Piece, RECORD, Record, VERSION, is_device_state, pack};
    use crate::error::QemuError;
    use crate::tables::RamBlock;
    use sonicshot::checkpoint::{
        CheckpointInfo, CheckpointReader, CheckpointWriter, Compression, SaveOptions,
    };
    use sonicshot::{DropClasses, Fill, Gpa, GuestBytes, GuestMemory, MappedRegions};
    use sonicshot::{PageMap, PageSize, PrunePlan};

    #[test]
    fn zero_pages_are_left_out() {
        let mut bytes = vec![0; 5 * 4096];
        bytes[4096] = 1;
        bytes[3 * 4096 - 1] = 2;
        bytes[5 * 4096 - 1] = 3;
        let (runs, kept) = pack(&bytes);
        assert_eq!(runs, [(1, 2), (4, 1)]);
        assert_eq!(kept, [&bytes[4096..3 * 4096], &bytes[4 * 4096..]].concat());
    }

    #[test]
    fn a_record_is_what_was_written_or_refused() {
        let record = |runs: &[(u64, u64)], pieces: Option<&[(u64, u64, u64)]>| {
            let piece = |&(offset, gpa, len): &(u64, u64, u64)| Piece { offset, gpa, len };
            Record {
                version: VERSION,
                qemu: "10.0.2".into(),
                machine: "pc".into(),
                paused: false,
                blocks: vec![Block {
                    block: RamBlock {
                        name: "x".into(),
                        page_size: 4096,
                        used: 8 * 4096,
                        total: 8 * 4096,
                        address: None,
                    },
                    pieces: pieces.map(|all| all.iter().map(piece).collect()),
                    runs: runs.to_vec(),
                }],
            }
        };
        let good = record(&[(0, 1), (3, 5)], None);
        let text = serde_json::to_string(&good).unwrap();
        assert_eq!(serde_json::from_str::<Record>(&text).unwrap(), good);
        const P: u64 = 4096;
        for (good, record) in [
            (true, good),
            (
                true,
                record(&[], Some(&[(0, P, 3 * P), (3 * P, 9 * P, 5 * P)])),
            ),
            (false, record(&[(0, 9)], None)),
            (false, record(&[(3, 1), (2, 1)], None)),
            (false, record(&[(3, 0)], None)),
            (false, record(&[(u64::MAX, 2)], None)),
            (false, record(&[(1 << 60, 2)], None)),
            (false, record(&[], Some(&[(0, 0, 7 * P)]))),
            (false, record(&[], Some(&[]))),
            (false, record(&[], Some(&[(0, 0, 9 * P)]))),
            (false, record(&[], Some(&[(0, 1, 8 * P)]))),
            (false, record(&[], Some(&[(0, u64::MAX - 4095, 8 * P)]))),
        ] {
            assert_eq!(record.check().is_ok(), good, "{record:?}");
        }
    }

    /// A checkpoint with these blobs, read again.
    fn read(blobs: &[(&str, &[u8])]) -> Result<Kept, QemuError> {
        let ram = vec![1; 4096];
        let guest = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(&ram))]).unwrap();
        let map = PageMap::new(guest.layout(), PageSize::SIZE_4K);
        let plan = PrunePlan::new(&map, &DropClasses::default(), Fill::Zero);
        let info = CheckpointInfo::new(guest.layout().clone(), PageSize::SIZE_4K);
        let file = tempfile::NamedTempFile::new().unwrap();
        let options = SaveOptions::new(Compression::None);
        let mut writer = CheckpointWriter::new(file.reopen().unwrap(), info, options).unwrap();
        for (name, content) in blobs {
            writer.blob(name, *content).unwrap();
        }
        writer.memory(&guest, &map, &plan).unwrap();
        writer.finish().unwrap();
        Kept::read(&CheckpointReader::open(file.path()).unwrap(), file.path())
    }

    #[test]
    fn a_checkpoint_without_a_guest_is_refused() {
        let devices: &[u8] = b"QEVM\0\0\0\x03\x04abc\0";
        let block = |pages: u64| {
            format!(
                r#"{{"version":1,"qemu":"1","machine":"pc","paused":false,"blocks":[
                {{"name":"rom","page_size":4096,"used":8192,"total":8192,"pieces":null,
                "runs":[[0,{pages}]]}}]}}"#
            )
        };
        let (one, two, nine) = (block(1), block(2), block(9));
        let page = [7; 4096];
        let found = read(&[
            (RECORD, one.as_bytes()),
            (DEVICES, devices),
            ("qemu-block-0", &page),
        ]);
        assert_eq!(found.unwrap().small[0].bytes, page);
        let long_record = vec![b' '; usize::try_from(super::MAX_RECORD).unwrap() + 1];
        let long_devices = vec![0; usize::try_from(super::MAX_DEVICES).unwrap() + 1];
        let other = one.replace("\"version\":1", "\"version\":2");
        for (what, blobs) in [
            ("nothing", vec![]),
            ("no devices", vec![(RECORD, one.as_bytes())]),
            ("no record", vec![(DEVICES, devices)]),
            (
                "no pages",
                vec![(RECORD, one.as_bytes()), (DEVICES, devices)],
            ),
            (
                "fewer pages",
                vec![
                    (RECORD, two.as_bytes()),
                    (DEVICES, devices),
                    ("qemu-block-0", &page),
                ],
            ),
            (
                "pages beyond it",
                vec![
                    (RECORD, nine.as_bytes()),
                    (DEVICES, devices),
                    ("qemu-block-0", &page),
                ],
            ),
            ("no JSON", vec![(RECORD, b"{"), (DEVICES, devices)]),
            (
                "another version",
                vec![
                    (RECORD, other.as_bytes()),
                    (DEVICES, devices),
                    ("qemu-block-0", &page),
                ],
            ),
            (
                "a long record",
                vec![(RECORD, &long_record), (DEVICES, devices)],
            ),
            (
                "much of devices",
                vec![(RECORD, one.as_bytes()), (DEVICES, &long_devices)],
            ),
            (
                "other devices",
                vec![(RECORD, one.as_bytes()), (DEVICES, b"QEVM")],
            ),
        ] {
            let error = read(&blobs).unwrap_err();
            assert!(
                matches!(error, QemuError::NoGuest { .. }),
                "{what}: {error:?}"
            );
        }
    }

    #[test]
    fn device_state_is_told() {
        assert!(is_device_state(b"QEVM\0\0\0\x03\x04abc\0"));
        for wrong in [
            &b""[..],
            b"QEVM\0\0\0\x03",
            b"QEVM\0\0\0\x02\x04abc\0",
            b"QEVM\0\0\0\x03\x04abc",
        ] {
            assert!(!is_device_state(wrong));
        }
    }
}
