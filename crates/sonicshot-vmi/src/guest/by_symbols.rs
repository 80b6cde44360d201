//! A kernel without VMCOREINFO, found by symbol files of its build.
//!
//! A build ID lies in the kernel's image, as does its banner; where, as linked, the symbols tell.
//! Found in memory, either says where the image is, since the image is in one piece there: so also
//! where its top-level page table is, which must map the image to where it was found.

use super::{GuestOptions, LinuxGuest};
use crate::arch::{self, Arch, KernelShape, Tables};
use crate::deadline::Deadline;
use crate::discover;
use crate::error::VmiError;
use crate::kernel::{Build, Kernel};
use crate::knowledge::Knowledge;
use crate::owner::processors::Owners;
use crate::symbols::{self, Given, MAX_BUILD_ID, MAX_NOTES, SymbolBase, SymbolSource, search};
use crate::{AddressSpace, KernelVa};
use sonicshot::{Gpa, GuestMemory, Progress, to_u64};
use std::collections::HashSet;
use std::sync::{Arc, OnceLock};

/// So many build IDs are there at most: each program and library has one.
const MAX_IDS: usize = 1 << 16;
/// So many places that may be a build ID's are looked at: memory may be full of them.
const MAX_NOTES_SEEN: u32 = 1 << 20;
/// So many places are tried as the kernel's.
const MAX_PLACES: usize = 1 << 12;
/// So many kernels are held against each other; what several reboots leave is less.
const MAX_IMAGES: usize = 16;
/// The fields before the content of a note with a build ID: its type, and its owner's name.
const GNU: &[u8] = b"\x03\0\0\0GNU\0";
/// The lengths of name and content before that.
const NOTE_HEAD: u64 = 8;

/// The kernels that symbol files tell of.
#[derive(Default)]
pub(super) struct Files<'m> {
    pub kernels: Vec<(LinuxGuest<'m>, Tables)>,
    /// The first kernel's that is there and cannot be read: why.
    pub broken: Option<VmiError>,
}

impl<'m> LinuxGuest<'m> {
    /// The kernels of which there are symbol files that tell types.
    pub(super) fn of_files(
        memory: &'m dyn GuestMemory,
        options: &GuestOptions,
        given: &Given,
    ) -> Result<Files<'m>, VmiError> {
        let Some((arch, shape)) = arch::shaped() else {
            return Ok(Files::default());
        };
        if given.is_empty() || memory.p2m().is_some() {
            return Ok(Files::default());
        }
        let ids = if given.has_folders() {
            build_ids(memory, &options.progress)
        } else {
            HashSet::new()
        };
        let deadline = Deadline::new();
        let (mut found, mut seen) = (Files::default(), Seen::default());
        for set in given.sets(&|id| ids.contains(id))? {
            check_one_build(&set)?;
            let Some(anchor) = Anchor::new(&set, shape)? else {
                continue;
            };
            for place in anchor.places(memory, &options.progress, arch.image().align) {
                deadline.check(
                    "places of a kernel's build ID",
                    to_u64(seen.0.len()),
                    to_u64(MAX_PLACES),
                )?;
                let Some(image) = anchor.image(memory, place, (arch, shape)) else {
                    continue;
                };
                // Its notes may hold the ID more than once.
                if !seen.is_new(image.at, image.tables.root)? {
                    continue;
                }
                match Self::of_image(image, &set, (arch, shape), options, given) {
                    Ok(guest) => found.kernels.extend(guest),
                    // One that is gone, and written over in part, says nothing of the others.
                    Err(error) => {
                        found.broken.get_or_insert(error);
                    }
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
        check_banner(set, banner.as_deref())?;
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
            progress: options.progress.clone(),
            notes_of_files: given.notes(set, None),
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

/// A mark of a build that is searched for in its image.
struct Anchor {
    /// The mark that tells it, for reports.
    by: &'static str,
    needle: Vec<u8>,
    /// Its address as linked: exactly there, or in the notes, behind their beginning.
    at: u64,
    /// The distance behind that.
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
    /// neither, or not where it is in an image.
    fn new(set: &[Arc<dyn SymbolSource>], shape: &KernelShape) -> Result<Option<Self>, VmiError> {
        let in_image = |at: &u64| (shape.image.raw()..shape.image_end.raw()).contains(at);
        let linked = |name: &str| Ok::<_, VmiError>(linked(set, name)?.filter(in_image));
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

    /// The addresses that it may have in its place, and their distance from those of the symbols. The
    /// image is moved by whole steps of `align`.
    fn places(
        &self,
        memory: &dyn GuestMemory,
        progress: &dyn Progress,
        align: u64,
    ) -> Vec<(Gpa, u64)> {
        let mut places = Vec::new();
        search(memory, progress, &self.needle, &mut |at| {
            let distance = i128::from(at.raw()).checked_sub(self.at.into());
            let behind = distance.and_then(|far| far.checked_rem_euclid(align.into()));
            let behind = behind.and_then(|behind| u64::try_from(behind).ok());
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
        let distance = i128::from(self.table).checked_sub(self.at.into())?;
        let root = i128::from(at.raw()).checked_add(distance)?;
        let root = Gpa::new(u64::try_from(root).ok()?);
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
                let at = KernelVa::new(link).moved_by(kaslr);
                space.translate(at).is_ok_and(|found| found.at == there)
            };
            let kaslr = (0..=steps)
                .filter_map(|step| step.checked_mul(arch.image().align))
                .find(|kaslr| is_at(self.at, *kaslr, at) && is_at(self.table, *kaslr, root));
            if let Some(kaslr) = kaslr {
                let running = |link: u64| KernelVa::new(link).moved_by(kaslr);
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

fn wrong(source: &dyn SymbolSource, file: String, guest: String) -> VmiError {
    VmiError::WrongKernel {
        origin: source.origin().to_owned(),
        file,
        guest,
    }
}

/// The images that were looked at, and their top-level page tables.
#[derive(Default)]
struct Seen(HashSet<(Gpa, Gpa)>);

impl Seen {
    /// Whether this one was not; refuses more than there can be.
    fn is_new(&mut self, image: Gpa, root: Gpa) -> Result<bool, VmiError> {
        let is_new = self.0.insert((image, root));
        if self.0.len() > MAX_IMAGES {
            return Err(VmiError::TooMany {
                what: "kernels of the symbol files' builds are in memory",
                found: to_u64(self.0.len()),
                most: to_u64(MAX_IMAGES),
            });
        }
        Ok(is_new)
    }
}

/// Refuses files of which one is of another build than another.
fn check_one_build(set: &[Arc<dyn SymbolSource>]) -> Result<(), VmiError> {
    let mut banner: Option<&str> = None;
    let mut id: Option<&[u8]> = None;
    for source in set {
        match (source.banner().map(str::trim), banner) {
            (Some(file), Some(other)) if file != other => {
                return Err(wrong(source.as_ref(), file.into(), format!("`{other}`")));
            }
            (file, _) => banner = banner.or(file),
        }
        match (source.build_id(), id) {
            (Some(file), Some(other)) if file != other => {
                let named = |id: &[u8]| format!("build ID {}", symbols::hex(id));
                return Err(wrong(source.as_ref(), named(file), named(other)));
            }
            (file, _) => id = id.or(file),
        }
    }
    for name in ["_stext", "init_top_pgt", "init_uts_ns", "linux_banner"] {
        let mut first: Option<KernelVa> = None;
        let linked = |source: &&Arc<dyn SymbolSource>| source.base() == SymbolBase::Linked;
        for source in set.iter().filter(linked) {
            match (source.symbol(name)?, first) {
                (Some(file), Some(other)) if file != other => {
                    let named = |at: KernelVa| format!("a kernel with {name} at {at}");
                    return Err(wrong(source.as_ref(), named(file), named(other)));
                }
                (file, _) => first = first.or(file),
            }
        }
    }
    Ok(())
}

/// Refuses files of another build than the kernel whose banner is in memory.
fn check_banner(set: &[Arc<dyn SymbolSource>], banner: Option<&str>) -> Result<(), VmiError> {
    let banner = banner.map_or("", str::trim);
    for source in set {
        let file = source.banner().map(str::trim);
        if let Some(file) = file.filter(|file| *file != banner) {
            return Err(wrong(source.as_ref(), file.into(), format!("`{banner}`")));
        }
    }
    Ok(())
}

/// The address of `name` as linked, by the first file that knows it.
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
fn build_ids(memory: &dyn GuestMemory, progress: &dyn Progress) -> HashSet<Vec<u8>> {
    let mut ids = HashSet::new();
    let mut others = 1..MAX_NOTES_SEEN;
    search(memory, progress, GNU, &mut |at| {
        ids.extend(build_id_at(memory, at));
        ids.len() < MAX_IDS && others.next().is_some()
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
        .checked_add(to_u64(GNU.len()))?
        .checked_add(Some(len).filter(|len| *len <= to_u64(MAX_BUILD_ID))?)?;
    let mut note = vec![0; usize::try_from(whole).ok()?];
    memory.read(start, &mut note).ok()?;
    symbols::build_id_of_notes(&note)
}

#[cfg(test)]
mod tests {
    use super::{Anchor, GNU, MAX_IDS, MAX_IMAGES, MAX_NOTES_SEEN, MAX_PLACES, Seen, build_ids};
    use crate::VmiError;
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
        let found = build_ids(&memory(&ram), &None);
        assert_eq!(found.len(), 2);
        assert!(found.contains(&vec![7; 20]) && found.contains(&vec![9; MAX_BUILD_ID]));
        let ids = (0..u32::try_from(MAX_IDS).unwrap() + 100).map(u32::to_le_bytes);
        let mut ram: Vec<u8> = ids.flat_map(|id| note(&id)).collect();
        ram.resize(ram.len().next_multiple_of(1 << 12), 0);
        assert_eq!(build_ids(&memory(&ram), &None).len(), MAX_IDS);
    }

    #[test]
    fn so_many_notes_are_looked_at() {
        for (before, is_found) in [
            (10, true),
            (MAX_NOTES_SEEN - 1, true),
            (MAX_NOTES_SEEN, false),
        ] {
            let mut ram = GNU.repeat(usize::try_from(before).unwrap());
            ram.extend(note(&[7; 20]));
            ram.resize(ram.len().next_multiple_of(1 << 12), 0);
            assert_eq!(
                !build_ids(&memory(&ram), &None).is_empty(),
                is_found,
                "{before}"
            );
        }
    }

    #[test]
    fn so_many_kernels_are_held_against_each_other() {
        let mut seen = Seen::default();
        for image in 0..MAX_IMAGES as u64 {
            assert!(seen.is_new(Gpa::new(image), Gpa::ZERO).unwrap());
            assert!(!seen.is_new(Gpa::new(image), Gpa::ZERO).unwrap());
        }
        let error = seen.is_new(Gpa::ZERO, Gpa::new(1)).unwrap_err();
        assert!(matches!(error, VmiError::TooMany { .. }), "{error}");
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
            anchor(1 << 12).places(&memory(&ram), &None, 1 << 12).len(),
            MAX_PLACES
        );
        // Of each page those behind the place.
        let found = anchor(9).places(&memory(&ram), &None, 1 << 12);
        assert_eq!(found.len(), 32);
        assert_eq!(found[..2], [(Gpa::new(16), 0), (Gpa::new(24), 8)]);
    }
}
