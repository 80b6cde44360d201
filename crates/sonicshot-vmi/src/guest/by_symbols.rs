//! A kernel without VMCOREINFO, found by symbol files of its build.
//!
//! A build ID lies in the kernel's image, as does its banner; where, as linked, the symbols tell.
//! Found in memory, either says where the image is, since the image is in one piece there: so also
//! where its top-level page table is, which must map the image to where it was found.

use super::{GuestOptions, LinuxGuest};
use crate::arch::{self, Arch, KernelShape, Tables};
use crate::discover;
use crate::error::VmiError;
use crate::kernel::{Build, Kernel};
use crate::knowledge::Knowledge;
use crate::owner::processors::Owners;
use crate::symbols::{self, Given, MAX_BUILD_ID, MAX_NOTES, SymbolBase, SymbolSource, search};
use crate::{AddressSpace, KernelVa};
use sonicshot::{Gpa, GuestMemory};
use std::collections::HashSet;
use std::sync::{Arc, OnceLock};

/// So many build IDs are there at most: each program and library has one.
const MAX_IDS: usize = 1 << 16;
/// So many places are tried as the kernel's.
const MAX_PLACES: usize = 1 << 12;
/// What a note with a build ID has before it: its type, and whose it is.
const GNU: &[u8] = b"\x03\0\0\0GNU\0";
/// The lengths of name and content before that.
const NOTE_HEAD: u64 = 8;

impl<'m> LinuxGuest<'m> {
    /// The kernels of which there are symbol files that tell types.
    pub(super) fn of_files(
        memory: &'m dyn GuestMemory,
        options: &GuestOptions,
        given: &Given,
    ) -> Result<Vec<(Self, Tables)>, VmiError> {
        let Some((arch, shape)) = arch::shaped() else {
            return Ok(Vec::new());
        };
        if given.is_empty() || memory.p2m().is_some() {
            return Ok(Vec::new());
        }
        let ids = if given.has_folders() {
            build_ids(memory)
        } else {
            HashSet::new()
        };
        let mut found = Vec::new();
        for set in given.sets(&|id| ids.contains(id))? {
            let Some(anchor) = Anchor::new(&set)? else {
                continue;
            };
            for image in anchor.images(memory, arch, shape) {
                if let Some(guest) = Self::of_image(image, &set, (arch, shape), options, given)? {
                    found.push(guest);
                }
            }
        }
        Ok(found)
    }

    /// The kernel whose image is there, if the files and its memory tell types of it.
    fn of_image(
        image: Image<'m>,
        set: &[Arc<dyn SymbolSource>],
        (arch, shape): (&dyn Arch, &KernelShape),
        options: &GuestOptions,
        given: &Given,
    ) -> Result<Option<(Self, Tables)>, VmiError> {
        let range = discover::image_range(arch, &image.space, image.start);
        let banner = image.space.read_str(image.banner, 512).ok();
        let release = banner.as_deref().and_then(|banner| {
            let rest = banner.strip_prefix("Linux version ")?;
            rest.split(' ').next()
        });
        let build = Build {
            architecture: shape.architecture,
            page_size: shape.page_size,
            release: release.unwrap_or("unknown").to_owned(),
            kaslr: image.kaslr,
        };
        let mut kernel = Kernel::new(image.space, build);
        for source in set {
            kernel.share(source);
        }
        let mut guest = Self {
            kernel,
            origin: format!("{} in its image at {}", image.by, image.at),
            banner: banner.map(|banner| banner.trim_end().to_owned()),
            owners: Owners::new(image.memory, options.cr3),
            traces: None,
            knowledge: Knowledge::Types,
            image: range,
            shaped: None,
            searched: OnceLock::new(),
            threads: options.threads,
            unused_files: given.unused(set),
        };
        let bounds = guest.btf_bounds()?;
        if bounds.is_some()
            && let Some(btf) = symbols::find_btf(&guest.kernel.space, bounds, range)?
        {
            guest.kernel.add(Box::new(btf));
        }
        Ok(guest.has_types()?.then_some((guest, image.tables)))
    }
}

/// What of a build is found in its image.
struct Anchor {
    /// What tells it, for reports.
    by: &'static str,
    needle: Vec<u8>,
    /// Where it is as linked: exactly there, or in the notes, behind their beginning.
    at: u64,
    /// How far behind.
    within: u64,
    stext: u64,
    table: u64,
    banner: u64,
}

/// A kernel's image, mapped by its own page tables.
struct Image<'m> {
    memory: &'m dyn GuestMemory,
    by: &'static str,
    at: Gpa,
    space: AddressSpace<'m>,
    tables: Tables,
    kaslr: u64,
    /// `_stext`, and the banner.
    start: KernelVa,
    banner: KernelVa,
}

impl Anchor {
    /// By the build ID, or where the files do not tell it, by the banner; `None` if they tell
    /// neither, or not where it is.
    fn new(set: &[Arc<dyn SymbolSource>]) -> Result<Option<Self>, VmiError> {
        let linked = |name: &str| linked(set, name);
        let (Some(stext), Some(table), Some(banner)) = (
            linked("_stext")?,
            linked("init_top_pgt")?,
            linked("linux_banner")?,
        ) else {
            return Ok(None);
        };
        let anchor = |by, needle, at, within| Self {
            by,
            needle,
            at,
            within,
            stext,
            table,
            banner,
        };
        let id = set.iter().find_map(|source| source.build_id());
        let notes = linked("__start_notes")?.zip(linked("__stop_notes")?);
        if let (Some(id), Some((start, stop))) = (id, notes)
            && let Some(len) = stop.checked_sub(start).filter(|len| *len <= MAX_NOTES)
        {
            return Ok(Some(anchor("the build ID", [GNU, id].concat(), start, len)));
        }
        let text = set.iter().find_map(|source| source.banner());
        Ok(text.map(|text| anchor("the banner", text.trim().into(), banner, 1)))
    }

    /// The images in `memory` that have it in its place.
    fn images<'m>(
        &self,
        memory: &'m dyn GuestMemory,
        arch: &dyn Arch,
        shape: &KernelShape,
    ) -> Vec<Image<'m>> {
        let places = self.places(memory, arch.image().align);
        let image = |(at, behind): (Gpa, u64)| self.image(memory, (at, behind), (arch, shape));
        places.into_iter().filter_map(image).collect()
    }

    /// Where it may be in its place, and how far behind where the symbols have it. The image is moved
    /// by whole steps of `align`.
    fn places(&self, memory: &dyn GuestMemory, align: u64) -> Vec<(Gpa, u64)> {
        let mut places = Vec::new();
        search(memory, &self.needle, &mut |at| {
            let behind = at.raw().wrapping_sub(self.at).checked_rem(align);
            places.extend(behind.filter(|b| *b < self.within).map(|b| (at, b)));
            places.len() < MAX_PLACES
        });
        places
    }

    /// The image that has it at `at`, so far behind where the symbols have it.
    fn image<'m>(
        &self,
        memory: &'m dyn GuestMemory,
        (at, behind): (Gpa, u64),
        (arch, shape): (&dyn Arch, &KernelShape),
    ) -> Option<Image<'m>> {
        let at = Gpa::new(at.raw().checked_sub(behind)?);
        let root = Gpa::new(at.raw().wrapping_add(self.table.wrapping_sub(self.at)));
        let page = shape.page_size;
        let is_table = root.raw() & page.offset_mask() == 0;
        if !is_table || !memory.layout().contains(root, page.bytes()) {
            return None;
        }
        let last = shape.image_end.raw().checked_sub(self.at)?;
        let steps = last.checked_div(arch.image().align)?;
        for levels in shape.levels {
            let space = AddressSpace::new(memory, arch.walk(root, *levels));
            let is_at = |link: u64, kaslr: u64, there: Gpa| {
                let at = KernelVa::new(link).wrapping_add(kaslr);
                space.translate(at).is_ok_and(|found| found.at == there)
            };
            let kaslr = (0..=steps)
                .filter_map(|step| step.checked_mul(arch.image().align))
                .find(|kaslr| is_at(self.at, *kaslr, at) && is_at(self.table, *kaslr, root));
            if let Some(kaslr) = kaslr {
                let running = |link: u64| KernelVa::new(link).wrapping_add(kaslr);
                return Some(Image {
                    memory,
                    by: self.by,
                    at,
                    tables: Tables {
                        architecture: shape.architecture,
                        page_table: running(self.table),
                        root,
                        levels: *levels,
                    },
                    kaslr,
                    start: running(self.stext),
                    banner: running(self.banner),
                    space,
                });
            }
        }
        None
    }
}

/// Where `name` is as linked, by the first file that knows it.
fn linked(sources: &[Arc<dyn SymbolSource>], name: &str) -> Result<Option<u64>, VmiError> {
    for source in sources {
        if source.base() == SymbolBase::Linked
            && let Some(at) = source.symbol(name)?
        {
            return Ok(Some(at.raw()));
        }
    }
    Ok(None)
}

/// The build IDs of all that is in memory: of kernels, programs and libraries.
fn build_ids(memory: &dyn GuestMemory) -> HashSet<Vec<u8>> {
    let mut ids = HashSet::new();
    search(memory, GNU, &mut |at| {
        ids.extend(build_id_at(memory, at));
        ids.len() < MAX_IDS
    });
    ids
}

/// The build ID of the note that has its type at `at`.
fn build_id_at(memory: &dyn GuestMemory, at: Gpa) -> Option<Vec<u8>> {
    let start = Gpa::new(at.raw().checked_sub(NOTE_HEAD)?);
    let mut head = [0; 8];
    memory.read(start, &mut head).ok()?;
    let len = u64::from(u32::from_le_bytes(*head.last_chunk()?));
    let whole = NOTE_HEAD
        .checked_add(GNU.len() as u64)?
        .checked_add(Some(len).filter(|len| *len <= MAX_BUILD_ID as u64)?)?;
    let mut note = vec![0; usize::try_from(whole).ok()?];
    memory.read(start, &mut note).ok()?;
    symbols::build_id_of_notes(&note)
}

#[cfg(test)]
mod tests {
    use super::{Anchor, GNU, MAX_IDS, MAX_PLACES, build_ids};
    use crate::symbols::MAX_BUILD_ID;
    use sonicshot::{Gpa, GuestBytes, MappedRegions};

    fn memory(ram: &[u8]) -> MappedRegions<'_> {
        MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(ram))]).unwrap()
    }

    fn note(id: &[u8]) -> Vec<u8> {
        let len = u32::try_from(id.len()).unwrap();
        [&4_u32.to_le_bytes()[..], &len.to_le_bytes(), GNU, id].concat()
    }

    #[test]
    fn so_many_build_ids_are_taken_and_none_that_is_longer() {
        let mut ram = note(&[7; 20]);
        ram.extend(note(&[8; MAX_BUILD_ID + 4]));
        ram.extend(note(&[9; MAX_BUILD_ID]));
        ram.resize(1 << 12, 0);
        let found = build_ids(&memory(&ram));
        assert_eq!(found.len(), 2);
        assert!(found.contains(&vec![7; 20]) && found.contains(&vec![9; MAX_BUILD_ID]));
        let ids = (0..u32::try_from(MAX_IDS).unwrap() + 100).map(u32::to_le_bytes);
        let mut ram: Vec<u8> = ids.flat_map(|id| note(&id)).collect();
        ram.resize(ram.len().next_multiple_of(1 << 12), 0);
        assert_eq!(build_ids(&memory(&ram)).len(), MAX_IDS);
    }

    #[test]
    fn so_many_places_are_tried() {
        let anchor = |within| Anchor {
            by: "a test",
            needle: b"a needle".to_vec(),
            at: 16,
            within,
            stext: 0,
            table: 0,
            banner: 0,
        };
        let ram = b"a needle".repeat(8 << 10);
        assert_eq!(
            anchor(1 << 12).places(&memory(&ram), 1 << 12).len(),
            MAX_PLACES
        );
        // Of each page those behind the place.
        let found = anchor(9).places(&memory(&ram), 1 << 12);
        assert_eq!(found.len(), 32);
        assert_eq!(found[..2], [(Gpa::new(16), 0), (Gpa::new(24), 8)]);
    }
}
