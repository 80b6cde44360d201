//! The guest that the fake library has, as its text describes it.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// The size of a page.
pub(crate) const PAGE: u64 = 4096;

/// A guest, by the lines of its text, each `WORD=VALUE` with numbers in hexadecimal.
///
/// | word | value |
/// |---|---|
/// | `memory` | the file with its memory |
/// | `range` | `START-END@OFFSET`: pages that are there, and where the file has them |
/// | `size`, `end` | what `vmi_get_memsize` and `vmi_get_max_physical_address` say |
/// | `vcpu` | `RIP,CR0,CR3,CR4,EFER` of the next processor; `none` tells none |
/// | `symbol` | `NAME=ADDRESS` |
/// | `gone_after` | after so many reads nothing is read any more, nor resumed |
/// | `error` | the number with which `vmi_init` fails |
/// | `no` | `pause`, `resume` or `maps`: what fails |
/// | `log` | the file that calls are written to |
#[derive(Debug, Default)]
pub struct Guest {
    memory: Option<File>,
    ranges: Vec<(u64, u64, u64)>,
    pub(crate) size: u64,
    pub(crate) end: u64,
    pub(crate) vcpus: Vec<Option<[u64; 5]>>,
    symbols: Vec<(String, u64)>,
    reads_left: Option<u64>,
    /// The number with which opening fails.
    pub(crate) error: Option<u32>,
    no: Vec<String>,
    log: Option<PathBuf>,
}

impl Guest {
    /// The guest whose memory is all of a file.
    pub(crate) fn of_file(path: &Path) -> Option<Self> {
        let file = File::open(path).ok()?;
        let len = file.metadata().ok()?.len();
        Some(Self {
            memory: Some(file),
            ranges: vec![(0, len, 0)],
            size: len,
            end: len,
            ..Self::default()
        })
    }

    /// The guest of a text.
    pub(crate) fn of_text(path: &Path) -> Option<Self> {
        let text = std::fs::read_to_string(path).ok()?;
        let mut guest = Self::default();
        for line in text.lines().filter(|line| !line.is_empty()) {
            let (word, value) = line.split_once('=')?;
            guest.take(word, value)?;
        }
        Some(guest)
    }

    fn take(&mut self, word: &str, value: &str) -> Option<()> {
        match word {
            "memory" => self.memory = Some(File::open(value).ok()?),
            "range" => {
                let (range, offset) = value.split_once('@')?;
                let (start, end) = range.split_once('-')?;
                self.ranges.push((hex(start)?, hex(end)?, hex(offset)?));
            }
            "size" => self.size = hex(value)?,
            "end" => self.end = hex(value)?,
            "vcpu" if value == "none" => self.vcpus.push(None),
            "vcpu" => {
                let values: Option<Vec<u64>> = value.split(',').map(hex).collect();
                self.vcpus.push(Some(values?.try_into().ok()?));
            }
            "symbol" => {
                let (name, address) = value.split_once('=')?;
                self.symbols.push((name.into(), hex(address)?));
            }
            "gone_after" => self.reads_left = Some(hex(value)?),
            "error" => self.error = Some(u32::try_from(hex(value)?).ok()?),
            "no" => self.no.push(value.into()),
            "log" => self.log = Some(value.into()),
            _ => return None,
        }
        Some(())
    }

    /// Writes down what was called; whether it does what it should.
    pub(crate) fn does(&self, what: &str) -> bool {
        if let Some(log) = &self.log {
            let file = OpenOptions::new().append(true).create(true).open(log);
            // A test that looks for it sees that it is not there.
            let _ = file.and_then(|mut file| writeln!(file, "{what}"));
        }
        !self.no.iter().any(|no| no == what) && self.reads_left != Some(0)
    }

    /// The place in the file of the page at `at`, and the number of bytes that follow from there on.
    fn place(&self, at: u64) -> Option<(u64, u64)> {
        let range = self
            .ranges
            .iter()
            .find(|(start, end, _)| (*start..*end).contains(&at));
        range.map(|(start, end, offset)| (offset + (at - start), end - at))
    }

    /// Reads as LibVMI does: page by page, and no part of a page. Returns how many bytes it read.
    pub(crate) fn read(&mut self, at: u64, buf: &mut [u8]) -> usize {
        let mut done = 0;
        while done < buf.len() {
            match &mut self.reads_left {
                Some(0) => return done,
                Some(left) => *left -= 1,
                None => {}
            }
            let Some(here) = at.checked_add(done as u64) else {
                return done;
            };
            let page = here & !(PAGE - 1);
            let (Some((offset, left)), Some(file)) = (self.place(page), &self.memory) else {
                return done;
            };
            let skew = here - page;
            let len = usize::try_from(PAGE - skew)
                .unwrap_or(0)
                .min(buf.len() - done);
            let part = buf.get_mut(done..done + len);
            let read = part.map(|part| file.read_exact_at(part, offset + skew));
            if left < PAGE || !matches!(read, Some(Ok(()))) {
                return done;
            }
            done += len;
        }
        done
    }

    /// The file, and where it has `len` bytes from `at`, if all are there side by side.
    pub(crate) fn mapped(&self, at: u64, len: u64) -> Option<(&File, u64)> {
        let (offset, left) = self.place(at)?;
        (left >= len && self.does("maps")).then_some((self.memory.as_ref()?, offset))
    }

    pub(crate) fn symbol(&self, name: &str) -> Option<u64> {
        let found = self.symbols.iter().find(|(known, _)| known == name);
        found.map(|(_, address)| *address)
    }

    pub(crate) fn has_symbols(&self) -> bool {
        !self.symbols.is_empty()
    }
}

fn hex(text: &str) -> Option<u64> {
    u64::from_str_radix(text.strip_prefix("0x").unwrap_or(text), 16).ok()
}
