//! The state of a VM that came out of a disk image: a migration stream in a temporary file.

use crate::backing::Stored;
use crate::backing::spool::Spool;
use crate::format::ability::Migration;
use crate::format::kind::Format;
use crate::format::qemu::start::RamBlock;
use sonicshot::Processors;
use std::fs::File;

/// An internal snapshot of QEMU's.
#[derive(Debug)]
pub(crate) struct Internal {
    pub inner: Box<dyn Format>,
    pub spool: Spool,
    /// The image.
    pub image: File,
}

impl Format for Internal {
    fn name(&self) -> &'static str {
        "QEMU internal snapshot (qcow2)"
    }

    fn stored(&self) -> &dyn Stored {
        self.inner.stored()
    }

    fn file(&self) -> &File {
        &self.image
    }

    fn unpacked(&self) -> Option<&Spool> {
        Some(&self.spool)
    }

    fn machine_type(&self) -> Option<&str> {
        self.inner.machine_type()
    }

    fn ram_blocks(&self) -> &[RamBlock] {
        self.inner.ram_blocks()
    }

    fn holds_device_state(&self) -> bool {
        true
    }

    fn processors(&self) -> Processors {
        self.inner.processors()
    }

    fn instead(&self) -> &'static str {
        "a disk image is only read here: `convert --to stream` or `--to mapped-ram` takes the \
         guest out of it, which can be pruned then"
    }

    fn as_migration(&self) -> Option<&dyn Migration> {
        self.inner.as_migration()
    }
}
