//! A kernel of which nothing is told: found by the shape of its records of free pages.

use super::heads::{Heads, Look};
use super::nodes::{self, ZONE_HEAD};
use super::records::{self, STRIDE};
use super::roots::{self, Root};
use super::zones::{self, Exits};
use super::{counter, cover, frames_of, percpu};
use crate::arch::{self, Arch, KernelShape};
use crate::deadline::Deadline;
use crate::discover::image_range;
use crate::error::VmiError;
use crate::kernel::{Build, Kernel};
use crate::knowledge::Knowledge;
use crate::mm::mem_map::MemMap;
use crate::mm::page::PageLayout;
use crate::mm::zone::{AreaLayout, Zone, Zones};
use crate::owner::processors::Owners;
use crate::{AddressSpace, KernelVa, symbols};
use sonicshot::{Gpa, GuestMemory, Progress, Tally, to_u64};
use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};

/// `MIGRATE_TYPES`.
const MIGRATE_TYPES: core::ops::RangeInclusive<u64> = 4..=8;
/// Kernels that stand, of which one is too many already.
const MAX_KERNELS: usize = 4;

/// A kernel that was found by shape.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shaped {
    root: Root,
    /// The word that says the buddy's type.
    buddy: u32,
    /// `NR_PAGE_ORDERS`.
    orders: u64,
}

/// The finding, and the zones, which show that it is a kernel.
struct Candidate<'m> {
    shaped: Shaped,
    kernel: Kernel<'m>,
    image: (KernelVa, KernelVa),
    searched: (PageLayout, Zones),
}

/// The kernel that was found, its image, and what was found of its zones.
pub(crate) type Found<'m> = (
    Shaped,
    Kernel<'m>,
    (KernelVa, KernelVa),
    (PageLayout, Zones),
);

/// The deadline of a search, and the listener to its progress.
pub(crate) type Watch<'a> = (&'a Deadline, &'a dyn Progress);

/// The kernel of which records of free blocks are in `memory`, with page tables that lead to them:
/// those that a processor runs on, or if none is told, any. Also its image.
///
/// # Errors
/// [`VmiError::NoKernel`] if there is none, [`VmiError::NoTables`] if no page tables lead to its
/// records, [`VmiError::Undecided`] if there are several,
/// [`VmiError::OutOfTime`] and [`VmiError::TooMany`] if there is too much that may be one.
pub(crate) fn find<'m>(
    memory: &'m dyn GuestMemory,
    owners: &Owners,
    progress: &dyn Progress,
) -> Result<Found<'m>, VmiError> {
    if memory.p2m().is_some() {
        return Err(unsupported(
            "a paravirtualised guest of Xen without VMCOREINFO: only with it is one read",
        ));
    }
    let (arch, shape) = arch::shaped().ok_or_else(|| nothing("no architecture is known"))?;
    let told = owners.roots(memory);
    let pass = records::find(memory, arch, shape.page_size, told.is_empty(), progress)?;
    let places = if told.is_empty() {
        let levels = |at: Gpa| shape.levels.iter().map(move |levels| (at, *levels));
        let tops = distinct(memory, &pass.tops);
        tops.iter().flat_map(|at| levels(*at)).collect()
    } else {
        told.clone()
    };
    let mut search = Search {
        memory,
        progress,
        arch,
        shape,
        deadline: Deadline::new(),
        told: !told.is_empty(),
        standing: Vec::new(),
        failed: HashSet::new(),
        places: to_u64(places.len()),
        why: None,
        broken: Vec::new(),
        tried: 0,
        all: Tally::new(to_u64(places.len()))
            .times(to_u64(pass.records.len()))
            .get(),
    };
    for records in &pass.records {
        for (at, levels) in &places {
            search.root(*at, *levels, records)?;
        }
    }
    let found = pass.records.iter().map(|records| records.found);
    search.outcome(found.sum::<Tally>().get())
}

/// Of `tops` the first of each kernel half: every process has its own top table, and in all of them that
/// half is the same, so that what one leads to all do.
fn distinct(memory: &dyn GuestMemory, tops: &[Gpa]) -> Vec<Gpa> {
    const HALF: usize = 2048;
    let half = |at: Gpa| {
        let mut bytes = [0; HALF];
        let read = memory.read(at.checked_add(to_u64(HALF))?, &mut bytes);
        read.is_ok().then_some(bytes)
    };
    // What looks the same is looked at: two halves may have one hash.
    let mut seen: HashMap<u64, Vec<Gpa>> = HashMap::new();
    let mut is_new = |at: &Gpa| {
        let Some(own) = half(*at) else {
            return true;
        };
        let mut hasher = DefaultHasher::new();
        own.hash(&mut hasher);
        let same = seen.entry(hasher.finish()).or_default();
        let is_new = !same.iter().any(|other| half(*other) == Some(own));
        if is_new {
            same.push(*at);
        }
        is_new
    };
    tops.iter().copied().filter(|at| is_new(at)).collect()
}

/// Whether one more kernel is looked for where so many stand.
const fn is_room(standing: usize) -> bool {
    standing < MAX_KERNELS
}

/// The search for kernels by page tables.
struct Search<'m, 'p> {
    memory: &'m dyn GuestMemory,
    progress: &'p dyn Progress,
    arch: &'static dyn Arch,
    shape: &'static KernelShape,
    deadline: Deadline,
    /// Whether processors run on all the page tables.
    told: bool,
    standing: Vec<Candidate<'m>>,
    /// The places that do not stand, however many page tables lead there: of the struct pages and of
    /// the kernel's image.
    failed: HashSet<(u32, KernelVa, Gpa, Option<Gpa>)>,
    /// The reason that the first that does not stand does not.
    why: Option<VmiError>,
    /// The places of the struct pages of kernels that have records and do not stand, and the reasons.
    broken: Vec<(Gpa, String)>,
    /// The number of page tables.
    places: u64,
    /// So many page tables were tried with the records of each kind, of so many.
    tried: u64,
    all: u64,
}

impl<'m> Search<'m, '_> {
    /// Tries the page tables at `at`.
    fn root(&mut self, at: Gpa, levels: u32, records: &records::Records) -> Result<(), VmiError> {
        let what = "page tables that may be a kernel's";
        let walk = self.arch.walk(at, levels);
        for root in roots::stand(
            self.memory,
            walk.as_ref(),
            (at, self.told),
            records,
            &self.deadline,
        )? {
            self.deadline.check(what, self.tried, self.all)?;
            // Every process has its own top table; all lead to the same struct pages.
            let is_same = |found: &Candidate<'_>| {
                (found.shaped.root.vmemmap, found.shaped.root.there) == (root.vmemmap, root.there)
            };
            let space = AddressSpace::new(self.memory, self.arch.walk(root.at, root.levels));
            let image = cover::first_mapped(&space, self.arch, self.shape);
            let image_at = image.and_then(|image| space.translate(image).ok());
            let image_at = image_at.map(|there| there.at);
            let tried = (records.buddy, root.vmemmap, root.there, image_at);
            if !is_room(self.standing.len())
                || self.standing.iter().any(is_same)
                || self.failed.contains(&tried)
            {
                continue;
            }
            let shaped = Shaped {
                root,
                buddy: records.buddy,
                orders: self.shape.orders,
            };
            match self.candidate(shaped, space, image) {
                Ok(found) => self.standing.push(found),
                Err(error @ VmiError::OutOfTime { .. }) => return Err(error),
                // A stale top table may still lead there, but to no zone.
                Err(error) => {
                    self.failed.insert(tried);
                    // The likeliest comes first.
                    if root.has_records {
                        let is_new = self.broken.iter().all(|(there, _)| *there != root.there);
                        if is_new && is_room(self.broken.len()) && image.is_some() {
                            self.broken.push((root.there, error.to_string()));
                        }
                        self.why.get_or_insert(error);
                    }
                }
            }
        }
        self.deadline.check(what, self.tried, self.all)?;
        VmiError::count("page tables", &mut self.tried, 1)
    }

    fn candidate(
        &self,
        shaped: Shaped,
        space: AddressSpace<'m>,
        image: Option<KernelVa>,
    ) -> Result<Candidate<'m>, VmiError> {
        let start = image.ok_or_else(|| {
            nothing("the page tables that lead to records of free pages have no kernel image")
        })?;
        let image = image_range(self.arch, &space, start);
        let build = Build {
            architecture: self.shape.architecture,
            page_size: self.shape.page_size,
            release: release(&space, image),
            kaslr: 0,
        };
        let kernel = Kernel::new(space, build);
        let map = shaped.mem_map(&kernel, &self.deadline)?;
        let searched = shaped.search(&kernel, &map, image, (&self.deadline, self.progress))?;
        Ok(Candidate {
            shaped,
            kernel,
            image,
            searched,
        })
    }

    /// The one that stands; `records` is how many records there are.
    fn outcome(mut self, records: u64) -> Result<Found<'m>, VmiError> {
        let name = |found: &Candidate<'_>| {
            format!(
                "{} (by shape, its struct pages at {})",
                found.kernel.build.release, found.shaped.root.there
            )
        };
        if let [first, second, ..] = self.standing.as_slice() {
            return Err(VmiError::Undecided {
                first: name(first),
                second: name(second),
            });
        }
        if let [first] = self.standing.as_slice()
            && let Some(second) = rival(first.shaped.root.there, &self.broken, self.told)
        {
            return Err(VmiError::Undecided {
                first: name(first),
                second,
            });
        }
        match (self.standing.pop(), self.why) {
            (Some(found), _) => Ok((found.shaped, found.kernel, found.image, found.searched)),
            (None, Some(why)) => Err(why),
            (None, None) if records == 0 => Err(nothing(
                "nothing looks like a free page's record: it is encrypted, or no Linux",
            )),
            (None, None) => Err(VmiError::NoTables {
                records,
                tables: self.places,
                tried: "by their shape".into(),
            }),
        }
    }
}

/// The kernel that may own the memory instead of the one that stands, with its struct pages at
/// `there`, if nothing has `told` on which page tables a processor runs: a kernel whose records
/// contradict each other is one all the same, and a process can make another that does not.
fn rival(there: Gpa, broken: &[(Gpa, String)], told: bool) -> Option<String> {
    let mut others = broken.iter().filter(|(at, _)| !told && *at != there);
    let (at, why) = others.next()?;
    Some(format!(
        "one that cannot be read (its struct pages at {at}: {why})"
    ))
}

fn nothing(tried: &str) -> VmiError {
    VmiError::NoKernel {
        tried: tried.into(),
    }
}

/// The release in the kernel's banner, which is in its image.
fn release(space: &AddressSpace<'_>, image: (KernelVa, KernelVa)) -> String {
    const BANNER: &[u8] = b"Linux version ";
    let mut found = None;
    symbols::scan(space, image, BANNER, &mut |at| {
        let text = at.checked_add(to_u64(BANNER.len()));
        let text = text.and_then(|at| space.read_str(at, 64).ok());
        let word = text.as_deref().and_then(|text| text.split(' ').next());
        // The format string has a `%s` here.
        found = word
            .filter(|word| word.starts_with(|c: char| c.is_ascii_digit()))
            .map(str::to_owned);
        found.is_none()
    });
    found.unwrap_or_else(|| "unknown".into())
}

impl Shaped {
    /// The place at which it was found, for reports.
    pub(crate) fn origin(&self) -> String {
        format!(
            "the shape of free pages' records, page tables at {}",
            self.root.at
        )
    }

    /// The struct pages.
    pub(crate) fn mem_map<'m>(
        &self,
        kernel: &Kernel<'m>,
        deadline: &Deadline,
    ) -> Result<MemMap<'m>, VmiError> {
        MemMap::by_vmemmap(
            &kernel.space,
            kernel.build.page_size,
            STRIDE,
            self.root.vmemmap,
            deadline,
        )
    }

    /// The layout of struct pages, and the zones, by a look at every struct page of `map`.
    ///
    /// # Errors
    /// [`VmiError::Unsupported`] if no zone stands, [`VmiError::BrokenLists`] if its lists cannot be
    /// followed.
    pub(crate) fn search(
        &self,
        kernel: &Kernel<'_>,
        map: &MemMap<'_>,
        image: (KernelVa, KernelVa),
        watch: Watch<'_>,
    ) -> Result<(PageLayout, Zones), VmiError> {
        let layout = PageLayout::by_shape(kernel, self.buddy)?;
        let zones = zones_by_shape(kernel, map, &layout, image, self.orders, watch)
            .map_err(|error| error.of_lists(Knowledge::Shape))?;
        Ok((layout, zones))
    }
}

fn unsupported(what: &str) -> VmiError {
    VmiError::Unsupported { what: what.into() }
}

/// A zone that was found, and what its lists hold.
pub(super) struct Listed {
    /// Its array of free areas.
    pub array: KernelVa,
    pub sums: zones::Sums,
}

fn zones_by_shape(
    kernel: &Kernel<'_>,
    map: &MemMap<'_>,
    layout: &PageLayout,
    image: (KernelVa, KernelVa),
    orders: u64,
    (deadline, progress): Watch<'_>,
) -> Result<Zones, VmiError> {
    let look = Look::new(kernel, map, layout, image, deadline);
    let heads = &look.heads;
    let exits = Exits::find(map, layout, progress)?;
    let mut stands = None;
    for migrate_types in MIGRATE_TYPES {
        let lists = migrate_types << 4;
        let area = AreaLayout {
            free_area: ZONE_HEAD,
            orders,
            size: lists | 8,
            migrate_types,
            nr_free: lists,
        };
        let arrays = exits.arrays(heads, &area, deadline)?;
        if arrays.is_empty() {
            continue;
        }
        if stands.replace((area, arrays)).is_some() {
            return Err(unsupported(
                "free areas that look as if they had two numbers of migrate types",
            ));
        }
    }
    let (area, arrays) =
        stands.ok_or_else(|| unsupported("no list of free pages leads to a zone"))?;
    let owned = nodes::owned(&look, &arrays, &area)?;
    let mut left = frames_of(map)?;
    let mut listed = Vec::new();
    for array in &owned.arrays {
        let (array, sums) = (*array, zones::sums(heads, *array, &area, &mut left)?);
        listed.push(Listed { array, sums });
    }
    let spanned_pages = spanned_pages(heads, &listed, map)?;
    let mut found: Vec<Zone> = Vec::new();
    for zone in &listed {
        let words = zones::ZoneWords {
            spanned_pages,
            free_pages: None,
            index: 0,
        };
        found.push(zones::read(&kernel.space, zone.array, &area, words)?);
    }
    let per_cpu = percpu::find(&look, &mut found, &owned, 0)?;
    counter::add(&look, &area, &listed, &mut found, &per_cpu)?;
    let mut zones = Zones::by_shape(
        area,
        found,
        per_cpu.offsets,
        per_cpu.lists,
        !per_cpu.with_deltas,
    );
    zones.knowledge = Knowledge::Shape;
    Ok(zones)
}

/// The offset of the span in every zone: four words `zone_start_pfn`, `managed_pages`,
/// `spanned_pages`, `present_pages` that hold all its free blocks. Counted from [`ZONE_HEAD`] before
/// the free areas to the third.
fn spanned_pages(
    heads: &Heads<'_, '_>,
    listed: &[Listed],
    map: &MemMap<'_>,
) -> Result<u64, VmiError> {
    // A section is always whole in struct pages, and no larger than this.
    let last = map.spans().last();
    let last = last.and_then(|span| span.frames.end().checked_add(1 << 15));
    let last = last.ok_or_else(|| unsupported("no struct pages"))?.raw();
    let fits = |zone: &Listed, offset: u64| {
        let word = |number: u64| {
            let offset = number.checked_mul(8)?.checked_add(offset)?;
            heads.word(zone.array.raw().checked_sub(ZONE_HEAD)?, offset)
        };
        let (Some(start), Some(managed), Some(spanned), Some(present)) =
            (word(0), word(1), word(2), word(3))
        else {
            return false;
        };
        let sums = &zone.sums;
        start <= sums.first
            && start
                .checked_add(spanned)
                .is_some_and(|end| end >= sums.end && end <= last)
            && sums.pages <= managed
            && managed <= present
            && present <= spanned
    };
    const LAST_WORD: u64 = ZONE_HEAD - 32;
    let offsets = (0..=LAST_WORD)
        .step_by(8)
        .filter(|offset| listed.iter().all(|zone| fits(zone, *offset)));
    let mut offsets = offsets.filter_map(|offset| offset.checked_add(16));
    match (offsets.next(), offsets.next()) {
        (Some(offset), None) => Ok(offset),
        (None, _) => Err(unsupported("zones that do not say which frames they span")),
        _ => Err(unsupported("zones that say twice which frames they span")),
    }
}

#[cfg(test)]
mod tests {
    use super::{MAX_KERNELS, distinct, is_room, rival};
    use crate::kernel::testing::Ram;
    use sonicshot::Gpa;

    #[test]
    fn of_kernels_without_end_a_few_are_tried_to_the_end() {
        assert!((0..MAX_KERNELS).all(is_room));
        assert!(!is_room(MAX_KERNELS));
    }

    #[test]
    fn one_that_cannot_be_read_may_be_the_owner_unless_a_processor_tells() {
        let [own, other, third] = [1, 2, 3].map(|number| Gpa::new(number << 20));
        let broken = |at: Gpa| (at, "it is torn".to_owned());
        for (broken, told, want) in [
            (vec![], false, None),
            // The same struct pages by other tables.
            (vec![broken(own)], false, None),
            (vec![broken(other)], false, Some(other)),
            (
                vec![broken(own), broken(third), broken(other)],
                false,
                Some(third),
            ),
            (vec![broken(other)], true, None),
        ] {
            let found = rival(own, &broken, told);
            let text = want.map(|at| {
                format!("one that cannot be read (its struct pages at {at}: it is torn)")
            });
            assert_eq!(found, text);
        }
    }

    #[test]
    fn of_page_tables_with_the_same_kernel_half_one_is_tried() {
        let mut ram = Ram::new(8 << 20);
        let tops = [0x10_0000, 0x10_1000, 0x10_2000, 0x10_3000];
        for (top, user, kernel) in [(0, 0, 7), (1, 5, 7), (2, 0, 8), (3, 9, 7)] {
            ram.put(tops[top] + 8, user);
            ram.put(tops[top] + 300 * 8, kernel);
        }
        let memory = ram.memory();
        // One that cannot be read is left to who tries it.
        let all = [tops.as_slice(), &[1 << 40]].concat();
        let all: Vec<Gpa> = all.into_iter().map(Gpa::new).collect();
        let left: Vec<u64> = distinct(&memory, &all).into_iter().map(Gpa::raw).collect();
        assert_eq!(left, [tops[0], tops[2], 1 << 40]);
    }
}
