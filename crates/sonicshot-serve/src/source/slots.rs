//! A folder in which each slot of memory is a raw file of its own: what Cloud Hypervisor's
//! `offload_daemon snapshot` writes.

use super::{MemorySource, PageSource, Piece, Run};
use crate::cloud_hypervisor::slots_of;
use crate::error::ServeError;
use sonicshot::{Gpa, GpaRange, RamLayout};
use sonicshot_offline::{LayoutSpec, OfflineError, OpenOptions, Snapshot};
use std::path::Path;
use std::sync::{Arc, OnceLock};

/// One source made of several, none of which has memory of another.
pub(super) struct Slots {
    layout: RamLayout,
    parts: Vec<Box<dyn PageSource>>,
    by_need: OnceLock<Arc<[GpaRange]>>,
}

impl Slots {
    pub fn open(folder: &Path, options: &OpenOptions) -> Result<Self, ServeError> {
        let mut parts: Vec<Box<dyn PageSource>> = Vec::new();
        let mut ranges = Vec::new();
        for slot in slots_of(folder)? {
            // Nothing of it is plugged in, or it is refused when it is to be restored.
            if slot.hotplug {
                continue;
            }
            let mut options = options.clone();
            options.layout = Some(LayoutSpec::Ranges(vec![slot.guest]));
            let path = folder.join(format!("memory-{}", slot.number));
            let memory = Snapshot::open(&path, &options)?.guest_memory()?;
            let source = MemorySource::new(memory)
                .checked_by(|dump| Ok(dump.check_unchanged().map_err(OfflineError::from)?));
            parts.push(Box::new(source));
            ranges.push(slot.guest);
        }
        Ok(Self {
            layout: RamLayout::new(ranges)?,
            parts,
            by_need: OnceLock::new(),
        })
    }

    fn part(&self, at: Gpa) -> Result<&dyn PageSource, ServeError> {
        let mut parts = self.parts.iter();
        let part = parts.find(|part| part.layout().region_of(at).is_some());
        Ok(part.ok_or(ServeError::NotInSnapshot { at })?.as_ref())
    }
}

impl PageSource for Slots {
    fn layout(&self) -> &RamLayout {
        &self.layout
    }

    fn run_at(&self, at: Gpa) -> Result<Run, ServeError> {
        self.part(at)?.run_at(at)
    }

    fn read<'b>(&self, range: GpaRange, buffer: &'b mut Vec<u8>) -> Result<Piece<'b>, ServeError> {
        self.part(range.start())?.read(range, buffer)
    }

    fn by_need(&self) -> Arc<[GpaRange]> {
        let all = || self.parts.iter().flat_map(|part| part.by_need().to_vec());
        Arc::clone(self.by_need.get_or_init(|| all().collect()))
    }
}
