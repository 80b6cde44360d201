//! kdump-compressed files: read, and written.

mod content;
pub(crate) mod header;
pub(crate) mod read;
pub(crate) mod write;

use crate::DumpError;
use crate::Incomplete;
use crate::backing::Stored;
use crate::format::ability::{ByCopy, Copying};
use crate::format::core_notes;
use crate::format::kind::{Format, Kind, Source, boxed};
use read::KdumpFile;
use sonicshot::{Architecture, Processors};
use write::{KdumpOptions, write_kdump_again};

pub(crate) const KIND: Kind =
    Kind::by_magic("kdump", &[header::SIGNATURE, b"makedumpfile"], |source| {
        open(source).map(boxed)
    });

/// A kdump-compressed file and its memory.
#[derive(Debug)]
struct KdumpDump {
    memory: KdumpFile,
}

fn open(source: Source<'_>) -> Result<KdumpDump, DumpError> {
    let memory = KdumpFile::parse(source.path, source.content, &source.known.progress)?;
    Ok(KdumpDump { memory })
}

impl Format for KdumpDump {
    fn name(&self) -> &'static str {
        "kdump-compressed"
    }

    fn stored(&self) -> &dyn Stored {
        &self.memory
    }

    fn machine(&self) -> Option<Architecture> {
        self.memory.machine()
    }

    fn vmcoreinfo(&self) -> Option<&[u8]> {
        self.memory.vmcoreinfo()
    }

    fn notes(&self) -> Option<Vec<u8>> {
        self.memory.notes().map(<[u8]>::to_vec)
    }

    fn processors(&self) -> Processors {
        core_notes::processors(self.memory.notes(), self.vmcoreinfo(), &self.memory)
    }

    fn incomplete(&self) -> Option<Incomplete> {
        self.memory.incomplete().cloned()
    }

    fn shares_zeroes(&self) -> bool {
        true
    }

    fn by_copy(&self) -> Option<&dyn ByCopy> {
        Some(self)
    }
}

impl ByCopy for KdumpDump {
    /// A kdump-compressed file again.
    fn copy(&self, work: Copying<'_>) -> Result<(), DumpError> {
        let options = KdumpOptions {
            // Of what is compressed already that stays as it is.
            compression: self.memory.compression(),
            machine: self.machine(),
            vmcoreinfo: self.vmcoreinfo(),
            notes: self.memory.notes(),
            ..KdumpOptions::default()
        };
        let file = work.output.file();
        let written = write_kdump_again(&self.memory, work.goes, file, &options, work.progress);
        written.map_err(|source| DumpError::Kdump {
            path: work.output.path().into(),
            source,
        })?;
        Ok(())
    }
}
