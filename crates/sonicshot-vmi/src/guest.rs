//! A Linux guest: its kernel found, its symbols gathered, its pages classified.

mod access;
mod by_symbols;
mod classify;
mod declared;
mod explain;
mod features;
mod gather;
mod lists;
mod options;
mod places;

use crate::analysis::{Analysis, AnalysisOptions, GuestFacts, Parts};
use crate::arch::{self, Owner, Trace};
use crate::deadline::Deadline;
use crate::discover::{self, Found, Tried};
use crate::error::VmiError;
use crate::kernel::Kernel;
use crate::knowledge::Knowledge;
use crate::mm::iomem;
use crate::mm::mem_map::MemMap;
use crate::mm::page::PageLayout;
use crate::mm::zone::Zones;
use crate::note::Note;
use crate::os::GuestOs;
use crate::owner;
use crate::owner::alive;
use crate::owner::processors::{Owners, Verdict};
use crate::place::{self, PlaceEvidence};
use crate::shape::{self, Shaped};
use crate::symbols::{self, Given, SymbolFile, SymbolSource};
use crate::{KernelVa, mark_absent_pages, mark_zero_pages};
pub use access::{Task, Tasks};
pub use classify::Classification;
pub use declared::{GivenUp, KeptPages};
pub use explain::{ListedIn, PageFacts, PageOwner, PageRecord, Witness};
pub use lists::{FreeBlocks, FreeList, PerCpuCount, ZoneFree};
pub use options::{GuestOptions, OnInconsistency};
pub use places::{FilePlace, FilePlaces, FileSystemId};
use sonicshot::{GpaRange, GuestMemory, PageMap, PageSize, Pfn, Progress, Stoppable, WorkOptions};
use std::num::NonZeroUsize;
use std::sync::{Arc, OnceLock};

/// A Linux guest whose kernel was found in its memory.
///
/// ```no_run
/// use sonicshot::{GuestMemory, PageClass};
/// use sonicshot_vmi::{GuestOptions, LinuxGuest, OnInconsistency};
///
/// fn free_pages(memory: &dyn GuestMemory) -> Result<u64, sonicshot_vmi::VmiError> {
///     let guest = LinuxGuest::open(memory, &GuestOptions::new())?;
///     let pages = guest.classify(OnInconsistency::Refuse)?;
///     Ok(pages.map.counts().get(PageClass::FreeBuddy))
/// }
/// ```
#[derive(Debug)]
pub struct LinuxGuest<'m> {
    pub(crate) kernel: Kernel<'m>,
    origin: String,
    banner: Option<String>,
    owners: Owners,
    /// The traces of a later owner in the memory, where nothing is told of processors.
    traces: Option<Owner>,
    knowledge: Knowledge,
    /// The kernel's image, from its start as far as it is mapped.
    image: (KernelVa, KernelVa),
    /// The places that were found by shape.
    shaped: Option<Shaped>,
    /// The layout of struct pages, and the zones, where they were found by their lists: that takes
    /// a look at every struct page.
    searched: OnceLock<(PageLayout, Zones)>,
    /// The number of threads that look at struct pages.
    threads: Option<NonZeroUsize>,
    /// Whoever is told how far the work is.
    progress: Option<Arc<dyn Progress>>,
    /// The report on the symbol files that were given.
    notes_of_files: Vec<Note>,
}

impl<'m> LinuxGuest<'m> {
    /// Finds the kernel that owns `memory` and gathers its symbols.
    ///
    /// Every page that may be a kernel's VMCOREINFO is tried to the end: its symbols are read, and
    /// its own records of itself must be whole. If all processors of which something is told run
    /// on its page tables, it is the one. If nothing is told, one that bears no trace of a later
    /// owner is, if a reset would have left one; else all memory is searched, and no other may
    /// stand.
    ///
    /// # Errors
    /// [`VmiError::NoKernel`], [`VmiError::NoTables`] or [`VmiError::BannerAlone`] if there is none
    /// that can be read, [`VmiError::OtherMachine`] if it is another machine's, [`VmiError::Stale`]
    /// if there is only what is left of one, [`VmiError::Undecided`] if there are several and
    /// nothing tells which runs, [`VmiError::WrongKernel`] if a symbol file is of another build,
    /// [`VmiError::Symbols`] if one cannot be read.
    pub fn open(memory: &'m dyn GuestMemory, options: &GuestOptions) -> Result<Self, VmiError> {
        let owners = || Owners::new(memory, options.cr3);
        let given = options.given()?;
        let told = owners();
        let mut attempt = |found: Found<'m>| {
            let is_note = found.at.is_none();
            let (tables, info) = (found.tables, found.vmcoreinfo.clone());
            let guest = Self::gather(found, options, &given, owners())?;
            // Where symbols tell which VMCOREINFO is the kernel's own, that is seen below. A kernel
            // that crashed points to the copy beside the crash kernel, which no dump has.
            let of_crash = is_note && told.are_crashed();
            if guest.knowledge == Knowledge::Vmcoreinfo
                && !of_crash
                && !discover::is_own(memory, &tables, &info)
            {
                return Err(VmiError::Stale {
                    what: "types are missing, and nothing in the kernel's image points to this \
                           VMCOREINFO"
                        .into(),
                });
            }
            guest.tried(&told, is_note)
        };
        if options.at_most == Some(Knowledge::Shape) {
            return Self::by_shape(memory, owners(), options, &given);
        }
        let standing = discover::find(
            (memory, &options.progress),
            options.vmcoreinfo.as_deref(),
            options.vmcoreinfo_at,
            told.are_crashed(),
            // Where nothing is told, any may be the one: each is tried where it is met.
            &|tables| told.is_unknown() || told.may_run_on(memory, tables),
            &mut attempt,
        );
        match standing? {
            discover::Search::Standing(standing) => Self::decide(standing),
            discover::Search::NoText(no_text) => {
                if let Some(guest) = Self::by_symbols(memory, &told, options, &given)? {
                    return Ok(guest);
                }
                let mut guest = Self::by_shape(memory, owners(), options, &given)
                    .map_err(|why| discover::say_more(memory, no_text.and(why)))?;
                if !told.are_known() {
                    guest.look_at_memory_alone()?;
                }
                Ok(guest)
            }
        }
    }

    /// Tries a kernel to the end: its records of itself must be whole.
    fn tried(mut self, told: &Owners, is_note: bool) -> Result<Tried<Self>, VmiError> {
        alive::check(&self.kernel, is_note)?;
        let proven = if told.are_known() {
            self.is_run_by_all()
        } else if told.are_crashed() {
            is_note
        } else {
            let types = self.knowledge == Knowledge::Types;
            let owner = owner::look(&self.kernel, types)?;
            let settled = arch::of(&self.kernel)?.is_settled(&owner);
            self.traces = Some(owner);
            settled
        };
        Ok(Tried {
            value: self,
            proven,
        })
    }

    /// The kernel that alone stands of those without VMCOREINFO that symbol files tell of; `None`
    /// if they tell of none.
    fn by_symbols(
        memory: &'m dyn GuestMemory,
        told: &Owners,
        options: &GuestOptions,
        given: &Given,
    ) -> Result<Option<Self>, VmiError> {
        if options.at_most.is_some_and(|most| most > Knowledge::Types) {
            return Ok(None);
        }
        let by_symbols::Files {
            mut kernels,
            broken: mut why_not,
        } = Self::of_files(memory, options, given)?;
        // Those that a processor runs on first.
        kernels.sort_by_key(|(_, tables)| !told.may_run_on(memory, tables));
        let mut standing = Vec::new();
        for (guest, tables) in kernels {
            match guest.tried(told, false) {
                Ok(tried) if told.are_known() && tried.proven => return Ok(Some(tried.value)),
                tried if told.are_known() => {
                    // Of one on which no processor runs it does not matter what it says.
                    if told.may_run_on(memory, &tables) {
                        standing.push(tried?.value);
                    }
                }
                Ok(Tried {
                    value: mut guest, ..
                }) => {
                    if guest.traces.is_none() {
                        guest.traces = Some(owner::look(&guest.kernel, true)?);
                    }
                    guest.doubt_without_vmcoreinfo();
                    standing.push(guest);
                }
                Err(error) => {
                    why_not.get_or_insert(error);
                }
            }
        }
        if told.are_known() {
            // If no processor runs on one of them, what is told by shape may be another's.
            let standing = Some(standing).filter(|standing| !standing.is_empty());
            return standing.map(Self::decide).transpose();
        }
        Self::alone(standing, why_not)
    }

    /// Of kernels of one build, of which nothing tells the processors, the one beside which all
    /// others say themselves that they are gone. One that cannot be followed may be one that
    /// starts.
    fn alone(standing: Vec<Self>, why_not: Option<VmiError>) -> Result<Option<Self>, VmiError> {
        let (gone, mut left): (Vec<_>, Vec<_>) =
            standing.into_iter().partition(Self::says_it_is_gone);
        let unread = why_not.iter();
        let unread = unread.map(|error| format!("one that cannot be read ({error})"));
        let mut names = left.iter().map(Self::name).chain(unread);
        if let (Some(first), Some(second)) = (names.next(), names.next()) {
            return Err(VmiError::Undecided { first, second });
        }
        drop(names);
        match (left.pop(), why_not) {
            (Some(one), _) => Ok(Some(one)),
            (None, Some(error)) => Err(error),
            // Its traces say what became of it.
            (None, None) => Ok(gone.into_iter().next()),
        }
    }

    /// Whether its own records say that it is gone: it restarts, has died, or has started another.
    fn says_it_is_gone(&self) -> bool {
        let traces = self.traces.as_ref();
        traces.is_some_and(|owner| owner.traces.iter().any(Trace::is_of_an_end))
    }

    /// The kernel that alone stands by the shape of its records.
    fn by_shape(
        memory: &'m dyn GuestMemory,
        owners: Owners,
        options: &GuestOptions,
        given: &Given,
    ) -> Result<Self, VmiError> {
        let (shaped, kernel, image, searched) = shape::find(memory, &owners, &options.progress)?;
        Ok(Self {
            kernel,
            origin: shaped.origin(),
            banner: None,
            owners,
            traces: None,
            knowledge: Knowledge::Shape,
            image,
            shaped: Some(shaped),
            searched: OnceLock::from(searched),
            threads: options.threads,
            progress: options.progress.clone(),
            notes_of_files: given.notes(&[], None),
        })
    }

    /// Looks for a later owner where nothing tells of the processors and there is no VMCOREINFO. A
    /// firmware or the next kernel may have written over that of a kernel which is gone, and of its
    /// other records nothing: so the kernel must be one that writes none, and can start no other.
    fn look_at_memory_alone(&mut self) -> Result<(), VmiError> {
        self.traces = Some(owner::look(&self.kernel, false)?);
        self.doubt_without_vmcoreinfo();
        Ok(())
    }

    /// Of a kernel that makes a VMCOREINFO, and of which none was found, nothing tells that it is
    /// not gone. Returns whether it is such.
    fn doubt_without_vmcoreinfo(&mut self) -> bool {
        let is_gone = symbols::may_write_vmcoreinfo(&self.kernel.space, self.image);
        if is_gone && let Some(owner) = &mut self.traces {
            let why = "its VMCOREINFO is gone, so the kernel may be gone, too";
            owner.untold.get_or_insert_with(|| why.into());
        }
        is_gone
    }

    /// Of several kernels that stand, the one that alone can be classified.
    fn decide(mut standing: Vec<Self>) -> Result<Self, VmiError> {
        if standing.len() > 1 {
            let names: Vec<String> = standing.iter().map(Self::name).collect();
            standing.retain(|guest| guest.classify(OnInconsistency::Refuse).is_ok());
            let mut names = names.into_iter();
            if standing.len() != 1
                && let (Some(first), Some(second)) = (names.next(), names.next())
            {
                return Err(VmiError::Undecided { first, second });
            }
        }
        standing.pop().ok_or_else(|| VmiError::NoKernel {
            tried: "none stands".into(),
        })
    }

    /// A name of this kernel, to tell it from others.
    fn name(&self) -> String {
        let symbol = |name| self.kernel.symbol(name).ok().flatten();
        let root = symbol("swapper_pg_dir").or_else(|| symbol("init_top_pgt"));
        let root = root.and_then(|at| self.kernel.space.translate(at).ok());
        let at = root.map_or_else(String::new, |root| {
            format!(", its page tables at {}", root.at)
        });
        format!("{} ({}{at})", self.kernel.build.release, self.origin)
    }

    /// Whether all processors that count run on this kernel.
    fn is_run_by_all(&self) -> bool {
        let check = || {
            let (map, _, zones) = self.structures()?;
            self.owners.check(&self.kernel, &map, &zones)
        };
        matches!(check(), Ok(Verdict::Owner))
    }

    /// The knowledge of the kernel.
    #[must_use]
    pub fn knowledge(&self) -> Knowledge {
        self.knowledge
    }

    fn mem_map(&self) -> Result<MemMap<'m>, VmiError> {
        match &self.shaped {
            Some(shaped) => shaped.mem_map(&self.kernel, &Deadline::new()),
            None => MemMap::new(&self.kernel),
        }
    }

    /// The struct pages, what each says, and the zones, by whatever is known of them.
    fn structures(&self) -> Result<(MemMap<'m>, PageLayout, Zones), VmiError> {
        let _tables = self.kernel.space.remember_tables();
        let map = self.mem_map()?;
        if self.knowledge == Knowledge::Types {
            let layout = PageLayout::new(&self.kernel, map.stride)?;
            let zones = Zones::new(&self.kernel)?;
            return Ok((map, layout, zones));
        }
        let (layout, zones) = match self.searched.get() {
            Some(searched) => searched.clone(),
            None => {
                let searched = self.search(&map)?;
                self.searched.get_or_init(|| searched).clone()
            }
        };
        Ok((map, layout, zones))
    }

    /// Looks for the zones by their lists.
    fn search(&self, map: &MemMap<'m>) -> Result<(PageLayout, Zones), VmiError> {
        if let Some(shaped) = &self.shaped {
            let deadline = Deadline::new();
            let watch = (&deadline, &self.progress as &dyn Progress);
            return shaped.search(&self.kernel, map, self.image, watch);
        }
        let layout = PageLayout::of_free_pages(&self.kernel, map.stride)?;
        let zones = shape::told_zones(&self.kernel, map, &layout, self.image, &self.progress)?;
        Ok((layout, zones))
    }

    /// The kernel's release, such as `6.1.0-37-cloud-amd64`.
    #[must_use]
    pub fn release(&self) -> &str {
        &self.kernel.build.release
    }

    /// The kernel's banner (`Linux version …`), if it could be read.
    #[must_use]
    pub fn banner(&self) -> Option<&str> {
        self.banner.as_deref()
    }

    /// The kernel's VMCOREINFO: what a dump of this guest carries as a note.
    #[must_use]
    pub fn vmcoreinfo(&self) -> Option<&str> {
        self.kernel
            .vmcoreinfo
            .as_ref()
            .map(symbols::Vmcoreinfo::text)
    }

    /// The kernel's build ID, if it tells one (Linux 5.9 and later).
    #[must_use]
    pub fn build_id(&self) -> Option<&[u8]> {
        match &self.kernel.vmcoreinfo {
            Some(info) => info.build_id(),
            // By what it was found.
            None => self.kernel.sources().iter().find_map(|s| s.build_id()),
        }
    }

    /// The symbols and types that were read of the kernel and are needed of it, as a file of
    /// symbols has them.
    ///
    /// # Errors
    /// [`SymbolError`](crate::symbols::SymbolError) if there are no types, or a source is damaged.
    #[doc(hidden)]
    pub fn symbol_file(&self) -> Result<SymbolFile, VmiError> {
        let sources: Vec<&dyn SymbolSource> =
            self.kernel.sources().iter().map(AsRef::as_ref).collect();
        let kaslr = self.kernel.build.kaslr;
        let file = SymbolFile::of_running("the guest".into(), &sources, kaslr)?;
        Ok(file.of_build(self.build_id(), self.banner()))
    }

    /// The guest's page size.
    #[must_use]
    pub fn page_size(&self) -> PageSize {
        self.kernel.build.page_size
    }

    /// The origin of VMCOREINFO, then every source of symbols and types in use.
    #[must_use]
    pub fn symbol_sources(&self) -> Vec<String> {
        let mut sources: Vec<String> = self
            .kernel
            .sources()
            .iter()
            .filter(|source| !source.is_vmcoreinfo())
            .map(|source| source.origin().to_owned())
            .collect();
        sources.insert(0, self.origin.clone());
        sources
    }

    /// The guest-physical ranges of the kernel's struct pages: the memory that a classification reads.
    ///
    /// # Errors
    /// [`VmiError`] if the kernel's memory map cannot be read.
    pub fn struct_page_memory(&self) -> Result<Vec<GpaRange>, VmiError> {
        Ok(self.mem_map()?.own_memory().collect())
    }

    /// Usable RAM by the map that the firmware gave to the guest, if the symbols tell where it is:
    /// `e820_table_firmware`, which `mem=` and the like do not change, or where there is none
    /// `e820_table`.
    ///
    /// # Errors
    /// [`VmiError`] if the map cannot be read or is not one.
    pub fn e820(&self) -> Result<Option<Vec<GpaRange>>, VmiError> {
        arch::of(&self.kernel)?.boot_ram(&self.kernel)
    }

    /// The address at which the kernel maps all of memory, from guest-physical 0 on, if its symbols
    /// tell (`page_offset_base`, with `CONFIG_RANDOMIZE_MEMORY`).
    ///
    /// # Errors
    /// [`VmiError`] if it cannot be read.
    pub fn direct_map(&self) -> Result<Option<KernelVa>, VmiError> {
        arch::of(&self.kernel)?.direct_map(&self.kernel)
    }

    /// Evidence, by its content, of whether each of `ranges` of memory lies there: for a
    /// layout that somebody has given. The ranges must be disjoint.
    ///
    /// # Errors
    /// [`VmiError`] if the kernel's page tables have memory elsewhere, or reading fails.
    pub fn evidence_of_places(&self, ranges: &[GpaRange]) -> Result<Vec<PlaceEvidence>, VmiError> {
        place::evidence(&self.kernel, self.direct_map()?, ranges)
    }

    /// The memory that has struct pages: all that the kernel has ever taken for memory, of whatever
    /// device, in whole sections (of 128 MiB on x86-64).
    ///
    /// # Errors
    /// [`VmiError`] if the kernel's memory map cannot be read.
    pub fn known_memory(&self) -> Result<Vec<GpaRange>, VmiError> {
        let mem_map = self.mem_map()?;
        let frames = mem_map.spans().iter().map(|span| span.frames);
        Ok(frames
            .filter_map(|f| f.gpa_range(self.kernel.build.page_size))
            .collect())
    }

    /// The places on their file systems that the pages of files in `pages` may have, by the kernel's
    /// records: ext4's extents, and buffers. These are guesses, for a caller that compares the pages
    /// with a disk; a page of which nothing tells has none.
    ///
    /// # Errors
    /// [`VmiError`] if the kernel's memory map cannot be read.
    pub fn file_places(&self, pages: &PageMap) -> Result<FilePlaces, VmiError> {
        if self.knowledge != Knowledge::Types {
            return Ok(FilePlaces::default());
        }
        let (map, layout, _) = self.structures()?;
        places::file_places(&self.kernel, &map, &layout, pages)
    }

    /// Of `ranges` of a process's own addresses, which its owner declares that it can do without, the
    /// pages that are this process's alone: after [`Analysis::give_up`](crate::Analysis::give_up) they
    /// count as zero, and read so after a restore. `process` is its `struct mm_struct`
    /// ([`Task::memory`]), `pages` what the classification has found. All else is kept: pages that are
    /// swapped out, huge, shared, pinned, merged or of a file, and parts of pages.
    ///
    /// The process must bear that its memory is zero there from one instruction to the next, such as a
    /// cache whose entries are checked, or that is told by its owner to forget them first. Nothing
    /// here finds out by itself what may go.
    ///
    /// ```no_run
    /// # fn f(guest: &sonicshot_vmi::LinuxGuest<'_>, analysis: &mut sonicshot_vmi::Analysis)
    /// # -> Result<(), Box<dyn std::error::Error>> {
    /// let all = guest.tasks()?.collect::<Result<Vec<_>, _>>()?;
    /// let cache = all.iter().find(|task| task.name == "cache-server").ok_or("no cache")?;
    /// let memory = cache.memory.ok_or("it has ended")?;
    /// let arena = 0x7f00_0000_0000..0x7f00_4000_0000; // by the server's own word
    /// let given_up = guest.give_up(memory, &[arena], analysis.pages())?;
    /// analysis.give_up(&given_up);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`VmiError::Missing`] if no source knows where a process has its page tables,
    /// [`VmiError::TooMany`] if more is declared than any guest has, and what reading gives.
    pub fn give_up(
        &self,
        process: KernelVa,
        ranges: &[core::ops::Range<u64>],
        pages: &PageMap,
    ) -> Result<GivenUp, VmiError> {
        if self.knowledge != Knowledge::Types {
            return Err(self.kernel.missing("the types of its kernel".into()));
        }
        let (map, layout, _) = self.structures()?;
        declared::give_up(&self.kernel, &map, &layout, pages, process, ranges)
    }

    /// RAM by the kernel's own tree of resources (`System RAM` in `/proc/iomem`), memory that was
    /// plugged in included, each range as it was added; but not what belongs to a device, such
    /// as virtio-mem. `None` if the symbols or types do not tell where the tree is.
    ///
    /// # Errors
    /// [`VmiError`] if the tree cannot be read or is none.
    pub fn system_ram(&self) -> Result<Option<Vec<GpaRange>>, VmiError> {
        iomem::system_ram(&self.kernel)
    }
}

impl LinuxGuest<'_> {
    /// The same guest, read from `memory`, which is the same as its own but for when it ends.
    fn over<'n>(&self, memory: &'n dyn GuestMemory) -> LinuxGuest<'n> {
        LinuxGuest {
            kernel: self.kernel.over(memory),
            origin: self.origin.clone(),
            banner: self.banner.clone(),
            owners: self.owners.clone(),
            traces: self.traces.clone(),
            knowledge: self.knowledge,
            image: self.image,
            shaped: self.shaped,
            searched: self.searched.clone(),
            threads: self.threads,
            progress: self.progress.clone(),
            notes_of_files: self.notes_of_files.clone(),
        }
    }

    fn analyze_to_the_end(&self, options: &AnalysisOptions) -> Result<Analysis, VmiError> {
        let progress = options.who_is_told().or(self.progress.as_ref()).cloned();
        let mut pages = self.classify_told(options.inconsistency(), &progress)?;
        let memory = self.kernel.space.memory();
        let absent = mark_absent_pages(memory, &mut pages.map)?;
        if options.looks_for_zero_pages() {
            let mut work = WorkOptions::new();
            work.threads = self.threads;
            work.progress = progress;
            mark_zero_pages(memory, &mut pages.map, &work)?;
        }
        Ok(Analysis::new(Parts {
            facts: self.facts(),
            pages,
            present: self.struct_page_memory()?,
            // A map that cannot be read confirms nothing.
            boot_ram: self.e820().ok().flatten(),
            absent,
        }))
    }
}

impl GuestOs for LinuxGuest<'_> {
    fn facts(&self) -> GuestFacts {
        GuestFacts {
            os: "Linux",
            release: self.release().to_owned(),
            banner: self.banner().map(str::to_owned),
            vmcoreinfo: self.vmcoreinfo().map(str::to_owned),
            build_id: self.build_id().map(<[u8]>::to_vec),
            symbol_sources: self.symbol_sources(),
            knowledge: self.knowledge,
            architecture: Some(self.kernel.build.architecture),
            page_size: self.kernel.build.page_size,
        }
    }

    fn analyze(&self, options: &AnalysisOptions) -> Result<Analysis, VmiError> {
        let Some(stop) = options.ends_by() else {
            return self.analyze_to_the_end(options);
        };
        let memory = Stoppable::new(self.kernel.space.memory(), stop.clone());
        let analysis = self.over(&memory).analyze_to_the_end(options);
        // What could not be read for it may have been passed over: whatever came of it does not count.
        stop.check().map_err(VmiError::Stopped)?;
        analysis
    }

    fn page_records(&self) -> Result<Vec<GpaRange>, VmiError> {
        self.struct_page_memory()
    }

    fn boot_ram(&self) -> Result<Option<Vec<GpaRange>>, VmiError> {
        self.e820()
    }

    fn system_ram(&self) -> Result<Option<Vec<GpaRange>>, VmiError> {
        LinuxGuest::system_ram(self)
    }

    fn file_places(&self, pages: &PageMap) -> Result<FilePlaces, VmiError> {
        LinuxGuest::file_places(self, pages)
    }

    fn known_memory(&self) -> Result<Vec<GpaRange>, VmiError> {
        LinuxGuest::known_memory(self)
    }

    fn direct_map(&self) -> Result<Option<KernelVa>, VmiError> {
        LinuxGuest::direct_map(self)
    }

    fn evidence_of_places(&self, ranges: &[GpaRange]) -> Result<Vec<PlaceEvidence>, VmiError> {
        LinuxGuest::evidence_of_places(self, ranges)
    }

    fn page_facts(&self, pfn: Pfn) -> Result<PageFacts, VmiError> {
        LinuxGuest::page_facts(self, pfn)
    }

    fn free_lists(&self, most: usize) -> Result<Vec<ZoneFree>, VmiError> {
        LinuxGuest::free_lists(self, most)
    }
}

#[cfg(test)]
mod tests {
    use super::LinuxGuest;
    use crate::owner::processors::Owners;
    use crate::owner::traces::tests::{forged, ram, variable, word};
    use crate::{GuestOptions, VmiError, find_vmcoreinfo};
    use core::sync::atomic::{AtomicU64, Ordering};
    use sonicshot::{Gpa, GuestBytes, GuestMemory, Mapped, MappedRegions, MemoryError, RamLayout};

    /// Counts the windows that are searched.
    struct Counting(MappedRegions<'static>, AtomicU64);

    impl GuestMemory for Counting {
        fn layout(&self) -> &RamLayout {
            self.0.layout()
        }

        fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
            self.0.read(at, buf)
        }

        fn map(&self, at: Gpa, len: usize) -> Result<Option<Mapped<'_>>, MemoryError> {
            // Struct pages of this guest are a range of another length, or lie elsewhere.
            let window = len == 2 << 20 && at.raw().is_multiple_of(2 << 20);
            self.1.fetch_add(u64::from(window), Ordering::Relaxed);
            self.0.map(at, len)
        }
    }

    #[test]
    fn a_kernel_that_was_found_before_is_found_where_it_was_and_believed_no_more_than_any() {
        let found = |ram: &'static [u8], hint: Option<Gpa>| {
            let regions = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(ram))]);
            let memory = Counting(regions.unwrap(), AtomicU64::new(0));
            let options = GuestOptions::new();
            let options = match hint {
                Some(at) => options.vmcoreinfo_at(at),
                None => options,
            };
            let guest = LinuxGuest::open(&memory, &options).unwrap();
            (guest.origin, memory.1.into_inner())
        };
        let regions = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(ram()))]);
        let own = find_vmcoreinfo(&regions.unwrap(), &None).unwrap().unwrap();
        let origin = format!("VMCOREINFO at {own}");
        let (by_search, searched) = found(ram(), None);
        assert!(by_search == origin && searched > 0);
        assert_eq!(found(ram(), Some(own)), (origin.clone(), 0));
        // Where there is none, or no memory, all is searched.
        for wrong in [0, own.raw() + 1, own.raw() + 4096, u64::MAX] {
            let found = found(ram(), Some(Gpa::new(wrong)));
            assert_eq!(found, (origin.clone(), searched), "{wrong:#x}");
        }
        // One that says otherwise than the kernel's own, where that is looked at first.
        let zeroes = |at: &usize| ram()[*at..*at + 4096].iter().all(|byte| *byte == 0);
        let free = (0..ram().len()).step_by(4096).find(zeroes).unwrap();
        let own_at = usize::try_from(own.raw()).unwrap();
        let text = String::from_utf8(ram()[own_at..own_at + 4096].to_vec()).unwrap();
        let other = text.replacen("SIZE(page)=64", "SIZE(page)=56", 1);
        assert_ne!(other, text);
        let other: &'static [u8] = forged(&[(free as u64, other.into_bytes())]).leak();
        let (by_search, _) = found(other, Some(Gpa::new(free as u64)));
        assert_eq!(by_search, origin);
    }

    #[test]
    fn of_several_kernels_of_a_build_one_stands_only_if_all_others_say_that_they_are_gone() {
        let restarts = forged(&[(variable("system_state"), word(5))]);
        let boots = forged(&[(variable("system_state"), word(0))]);
        let memory = |ram| MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(ram))]);
        let [runs, restarts, boots] = [ram(), &restarts, &boots].map(|ram| memory(ram).unwrap());
        let guest = |memory| {
            let guest = LinuxGuest::open(memory, &GuestOptions::new()).unwrap();
            guest
                .tried(&Owners::new(memory, None), false)
                .unwrap()
                .value
        };
        let broken = || VmiError::NoKernel {
            tried: "a test".into(),
        };
        let alone = LinuxGuest::alone(vec![guest(&restarts), guest(&runs), guest(&restarts)], None);
        assert!(!alone.unwrap().unwrap().says_it_is_gone());
        for (standing, why_not) in [
            (vec![guest(&runs), guest(&boots)], None),
            (vec![guest(&runs), guest(&runs)], None),
            (vec![guest(&restarts), guest(&runs)], Some(broken())),
        ] {
            let error = LinuxGuest::alone(standing, why_not).unwrap_err();
            assert!(matches!(error, VmiError::Undecided { .. }), "{error}");
        }
        // Alone, a kernel that is gone says so itself, later.
        let gone = LinuxGuest::alone(vec![guest(&restarts)], None).unwrap();
        assert!(gone.unwrap().says_it_is_gone());
        assert!(LinuxGuest::alone(vec![guest(&restarts)], Some(broken())).is_err());
        assert!(LinuxGuest::alone(vec![], None).unwrap().is_none());
    }
}
