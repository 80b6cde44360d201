//! A Linux guest: its kernel found, its symbols gathered, its pages classified.

use crate::analysis::{Analysis, AnalysisOptions, GuestFacts, Parts};
use crate::arch::{self, Cr3, Owner};
use crate::deadline::Deadline;
use crate::discover::{self, Found, Tried};
use crate::error::VmiError;
use crate::kernel::{Build, Kernel};
use crate::mm::classify::{Inconsistency, ZoneReport, scan};
use crate::mm::iomem;
use crate::mm::mem_map::MemMap;
use crate::mm::page::PageLayout;
use crate::mm::zone::Zones;
use crate::note::{Note, TracesSought};
use crate::os::GuestOs;
use crate::owner;
use crate::owner::alive;
use crate::owner::processors::{Owners, Verdict};
use crate::place::{self, PlaceEvidence};
use crate::shape::{self, Knowledge, Shaped};
use crate::symbols::{self, Kallsyms, SymbolSource};
use crate::{KernelVa, VirtualMemory, mark_zero_pages};
use sonicshot::{Fill, GpaRange, GuestMemory, PageClass, PageMap, PageSize};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What may be known about a guest beforehand; by default nothing.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct GuestOptions {
    symbol_files: Vec<PathBuf>,
    vmcoreinfo: Option<Vec<u8>>,
    cr3: Option<Cr3>,
    at_most: Option<Knowledge>,
    threads: Option<NonZeroUsize>,
}

impl GuestOptions {
    /// Nothing known: everything is found in the guest's memory.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a System.map, a vmlinux, or raw BTF of the guest's kernel. Earlier files take
    /// precedence, and all files take precedence over what is found in memory.
    #[must_use]
    pub fn symbols(mut self, path: impl AsRef<Path>) -> Self {
        self.symbol_files.push(path.as_ref().to_owned());
        self
    }

    /// Gives the VMCOREINFO text that the dump carries.
    #[must_use]
    pub fn vmcoreinfo(mut self, text: impl Into<Vec<u8>>) -> Self {
        self.vmcoreinfo = Some(text.into());
        self
    }

    /// Gives the `CR3` of the guest's processor, of one that runs and is no firmware's: the kernel
    /// that owns the memory is the one whose page tables are there. It counts instead of what the
    /// memory tells of processors.
    #[must_use]
    pub fn cr3(mut self, cr3: Cr3) -> Self {
        self.cr3 = Some(cr3);
        self
    }

    /// Takes no more than this of the guest and of all files: tests hold what less knowledge finds
    /// against what more does.
    #[doc(hidden)]
    #[must_use]
    pub fn at_most(mut self, knowledge: Knowledge) -> Self {
        self.at_most = Some(knowledge);
        self
    }

    /// How many threads look at struct pages; by default one for each core. What is found does not
    /// depend on it.
    #[must_use]
    pub fn threads(mut self, threads: NonZeroUsize) -> Self {
        self.threads = Some(threads);
        self
    }
}

/// Whether a guest whose sources disagree is classified all the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum OnInconsistency {
    /// It is refused with [`VmiError::Inconsistent`].
    #[default]
    Refuse,
    /// Every block in question is kept, the rest is believed. Only for dumps that will never
    /// run again.
    KeepInQuestion,
}

/// The class of every frame of a guest, and what stands behind it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Classification {
    /// The class of every RAM frame.
    pub map: PageMap,
    /// What the guest expects of free pages; [`Fill::Any`] of most: they write to a page before
    /// they trust it.
    pub free_fill: Fill,
    /// Every zone's numbers.
    pub zones: Vec<ZoneReport>,
    /// Blocks on which the sources disagree (kept), if there are any.
    pub disagreement: Option<Inconsistency>,
    /// What the user should know: features of the guest, pages kept and why.
    pub notes: Vec<Note>,
}

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
    /// What the memory shows of a later owner, where nothing is told of processors.
    traces: Option<Owner>,
    knowledge: Knowledge,
    /// The kernel's image, from its start as far as it is mapped.
    image: (KernelVa, KernelVa),
    /// Where it was found by shape.
    shaped: Option<Shaped>,
    /// How many threads look at struct pages.
    threads: Option<NonZeroUsize>,
}

/// What there is to say of a kernel that owns the memory.
#[derive(Default)]
struct Owned {
    note: Option<Note>,
    /// Memory that may have another owner all the same.
    in_question: Vec<GpaRange>,
}

impl Owned {
    fn noted(note: Note) -> Self {
        Self {
            note: Some(note),
            in_question: Vec::new(),
        }
    }
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
    /// [`VmiError::NoKernel`] if there is none, [`VmiError::Stale`] if there is only what is left
    /// of one, [`VmiError::Undecided`] if there are several and nothing tells which runs,
    /// [`VmiError::WrongKernel`] if a symbol file is of another build, [`VmiError::Symbols`] if
    /// one cannot be read.
    pub fn open(memory: &'m dyn GuestMemory, options: &GuestOptions) -> Result<Self, VmiError> {
        let owners = || Owners::new(memory, options.cr3);
        let mut files: Vec<Arc<dyn SymbolSource>> = Vec::new();
        for path in &options.symbol_files {
            files.push(symbols::open_symbol_file(path)?.into());
        }
        let told = owners();
        let mut attempt = |found: Found<'m>| {
            let is_note = found.is_note;
            let (tables, info) = (found.tables, found.vmcoreinfo.clone());
            let mut guest = Self::gather(found, options, &files, owners())?;
            // Where symbols tell which VMCOREINFO is the kernel's own, that is seen below.
            if guest.knowledge == Knowledge::Vmcoreinfo && !discover::is_own(memory, &tables, &info)
            {
                return Err(VmiError::Stale {
                    what: "types are missing, and nothing in the kernel's image points to this \
                           VMCOREINFO"
                        .into(),
                });
            }
            alive::check(&guest.kernel, is_note)?;
            let proven = if told.are_known() {
                guest.is_run_by_all()
            } else if told.are_crashed() {
                is_note
            } else {
                let types = guest.knowledge == Knowledge::Types;
                let owner = owner::look(&guest.kernel, types)?;
                let settled = arch::of(&guest.kernel)?.is_settled(&owner);
                guest.traces = Some(owner);
                settled
            };
            Ok(Tried {
                value: guest,
                proven,
            })
        };
        if options.at_most == Some(Knowledge::Shape) {
            return Self::by_shape(memory, owners(), options.threads);
        }
        let standing = discover::find(
            memory,
            options.vmcoreinfo.as_deref(),
            told.are_crashed(),
            // Where nothing is told, any may be the one: each is tried where it is met.
            &|tables| told.is_unknown() || told.may_run_on(memory, tables),
            &mut attempt,
        );
        match standing? {
            discover::Search::Standing(standing) => Self::decide(standing),
            discover::Search::NoText(no_text) => {
                let guest = Self::by_shape(memory, owners(), options.threads)
                    .map_err(|why| no_text.and(why))?;
                if told.are_known() {
                    return Ok(guest);
                }
                // A firmware or the next kernel may have written over the VMCOREINFO of one that
                // is gone, and of its records nothing else; what would tell needs its symbols.
                Err(VmiError::OwnerUntold {
                    kernel: guest.kernel.build.release,
                    why: "there is no VMCOREINFO, so no trace of a later owner can be looked for"
                        .into(),
                })
            }
        }
    }

    /// The kernel that alone stands by the shape of its records.
    fn by_shape(
        memory: &'m dyn GuestMemory,
        owners: Owners,
        threads: Option<NonZeroUsize>,
    ) -> Result<Self, VmiError> {
        let (shaped, kernel, image) = shape::find(memory, &owners)?;
        Ok(Self {
            kernel,
            origin: shaped.origin(),
            banner: None,
            owners,
            traces: None,
            knowledge: Knowledge::Shape,
            image,
            shaped: Some(shaped),
            threads,
        })
    }

    /// Of several kernels that stand, the one that alone can be classified.
    fn decide(mut standing: Vec<Self>) -> Result<Self, VmiError> {
        if standing.len() > 1 {
            let names: Vec<String> = standing.iter().map(Self::name).collect();
            standing.retain(|guest| guest.classify(OnInconsistency::Refuse).is_ok());
            if standing.len() != 1 {
                let mut names = names.into_iter();
                return Err(VmiError::Undecided {
                    first: names.next().unwrap_or_default(),
                    second: names.next().unwrap_or_default(),
                });
            }
        }
        standing.pop().ok_or_else(|| VmiError::NoKernel {
            tried: "none stands".into(),
        })
    }

    /// Which kernel it is, among several.
    fn name(&self) -> String {
        let root = self.kernel.symbol("swapper_pg_dir").ok().flatten();
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

    /// Gathers the symbols and types of a kernel.
    fn gather(
        found: Found<'m>,
        options: &GuestOptions,
        files: &[Arc<dyn SymbolSource>],
        owners: Owners,
    ) -> Result<Self, VmiError> {
        let hides_types = options.at_most.is_some_and(|most| most > Knowledge::Types);
        let Found {
            architecture,
            space,
            vmcoreinfo,
            kaslr,
            origin,
            ..
        } = found;
        let arch = arch::by_name(architecture)?;
        let bytes = vmcoreinfo.page_size().ok_or_else(|| VmiError::Missing {
            what: "PAGESIZE".into(),
            sources: origin.clone(),
        })?;
        let page_size = PageSize::new(bytes)
            .filter(|size| arch.has_page_size(*size))
            .ok_or_else(|| VmiError::Unsupported {
                what: format!("pages of {bytes} bytes"),
            })?;
        let release = vmcoreinfo.osrelease().unwrap_or_default().to_owned();
        let stext = vmcoreinfo
            .symbol("_stext")
            .or_else(|| vmcoreinfo.symbol("swapper_pg_dir"))
            .ok_or_else(|| VmiError::Missing {
                what: "symbol _stext".into(),
                sources: origin.clone(),
            })?;
        let image = discover::image_range(arch, &space, stext);
        let kallsyms = Kallsyms::find(&space, &vmcoreinfo, image);
        let has_no_kallsyms = vmcoreinfo.tells_of_no_kallsyms();
        let build = Build {
            architecture,
            page_size,
            release,
            kaslr,
        };
        let mut kernel = Kernel::new(space, build);
        for file in files {
            kernel.share(file);
        }
        kernel.add(Box::new(vmcoreinfo.clone()));
        kernel.vmcoreinfo = Some(vmcoreinfo);
        // Without symbols types tell of nothing where it is.
        let has_table = match kallsyms {
            Ok(kallsyms) if !hides_types => {
                kernel.add(Box::new(kallsyms));
                true
            }
            _ if kernel.symbol("linux_banner")?.is_some() => true,
            // A table that is gone is no table that never was: the kernel may be gone with it.
            Err(error) if !hides_types && !has_no_kallsyms => return Err(error.into()),
            _ => false,
        };
        let mut guest = Self {
            kernel,
            origin,
            banner: None,
            owners,
            traces: None,
            knowledge: Knowledge::Types,
            image,
            shaped: None,
            threads: options.threads,
        };
        guest.read_banner()?;
        guest.check_files(options.symbol_files.len())?;
        // Also beside a file's types: where both tell, they must agree.
        if has_table
            && let Some(btf) = symbols::find_btf(&guest.kernel.space, guest.btf_bounds()?, image)?
        {
            guest.kernel.add(Box::new(btf));
        }
        // VMCOREINFO tells neither.
        let has_types = guest.kernel.member("zone", "zone_start_pfn")?.is_some()
            || guest.kernel.constant("__NR_PAGEFLAGS")?.is_some();
        if !has_types {
            guest.knowledge = Knowledge::Vmcoreinfo;
        }
        Ok(guest)
    }

    /// What is known of the kernel.
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
        if let Some(shaped) = &self.shaped {
            return shaped.structures(&self.kernel, self.image, &Deadline::new());
        }
        let map = MemMap::new(&self.kernel)?;
        if self.knowledge == Knowledge::Types {
            let layout = PageLayout::new(&self.kernel, map.stride)?;
            let zones = Zones::new(&self.kernel)?;
            return Ok((map, layout, zones));
        }
        let layout = PageLayout::of_free_pages(&self.kernel, map.stride)?;
        let zones = shape::told_zones(&self.kernel, &map, &layout, self.image)?;
        Ok((map, layout, zones))
    }

    /// `__start_BTF` and `__stop_BTF`, if the symbols are known.
    fn btf_bounds(&self) -> Result<Option<(KernelVa, KernelVa)>, VmiError> {
        Ok(self
            .kernel
            .symbol("__start_BTF")?
            .zip(self.kernel.symbol("__stop_BTF")?))
    }

    /// Reads `linux_banner` at the address that the guest's own tables give, not a file's.
    fn read_banner(&mut self) -> Result<(), VmiError> {
        for source in self.kernel.sources() {
            if source.base() == symbols::SymbolBase::Running
                && let Some(at) = source.symbol("linux_banner")?
                && let Ok(text) = self.kernel.space.read_str(at, 512)
            {
                self.banner = Some(text.trim_end().to_owned());
                return Ok(());
            }
        }
        Ok(())
    }

    /// Refuses symbol files of another build: by build-id, by banner, and by addresses.
    fn check_files(&self, files: usize) -> Result<(), VmiError> {
        let guest_name = || {
            self.banner
                .clone()
                .unwrap_or_else(|| self.kernel.build.release.clone())
        };
        let info = self.kernel.vmcoreinfo.as_ref();
        let hex = |id: &[u8]| {
            id.iter()
                .map(|byte| format!("{byte:02x}"))
                .collect::<String>()
        };
        for source in self.kernel.sources().iter().take(files) {
            let wrong = |file: String, guest: String| VmiError::WrongKernel {
                origin: source.origin().to_owned(),
                file,
                guest,
            };
            if let (Some(file), Some(guest)) = (
                source.build_id(),
                info.and_then(symbols::Vmcoreinfo::build_id),
            ) && file != guest
            {
                let name = source
                    .banner()
                    .map_or_else(String::new, |b| format!("{} ", b.trim()));
                return Err(wrong(
                    format!("{name}(build-id {})", hex(file)),
                    format!("{} (build-id {})", guest_name(), hex(guest)),
                ));
            }
            if let (Some(file), Some(guest)) = (source.banner(), &self.banner)
                && file.trim() != guest.trim()
            {
                return Err(wrong(file.trim().to_owned(), guest.clone()));
            }
            // A System.map carries no version: its addresses must be the guest's.
            for name in [
                "swapper_pg_dir",
                "_stext",
                "init_uts_ns",
                "node_data",
                "linux_banner",
            ] {
                let Some(file) = self.kernel.symbol_by(source.as_ref(), name)? else {
                    continue;
                };
                for other in self.kernel.sources().iter().skip(files) {
                    if let Some(guest) = self.kernel.symbol_by(other.as_ref(), name)?
                        && guest != file
                    {
                        return Err(wrong(
                            format!("a kernel with {name} at {file} ({})", source.origin()),
                            format!("{} with {name} at {guest}", guest_name()),
                        ));
                    }
                }
            }
        }
        Ok(())
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
        self.kernel.vmcoreinfo.as_ref()?.build_id()
    }

    /// The guest's page size.
    #[must_use]
    pub fn page_size(&self) -> PageSize {
        self.kernel.build.page_size
    }

    /// Where VMCOREINFO came from, then every source of symbols and types in use.
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

    /// Where the kernel's struct pages lie in guest-physical memory: what a classification reads.
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

    /// Where the kernel maps all of memory, from guest-physical 0 on, if its symbols tell
    /// (`page_offset_base`, with `CONFIG_RANDOMIZE_MEMORY`).
    ///
    /// # Errors
    /// [`VmiError`] if it cannot be read.
    pub fn direct_map(&self) -> Result<Option<KernelVa>, VmiError> {
        arch::of(&self.kernel)?.direct_map(&self.kernel)
    }

    /// What the content of each of `ranges` of memory says about whether it lies there: for a
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

    /// RAM by the kernel's own tree of resources (`System RAM` in `/proc/iomem`), memory that was
    /// plugged in included, each stretch as it was added; but not what belongs to a device, such
    /// as virtio-mem. `None` if the symbols or types do not tell where the tree is.
    ///
    /// # Errors
    /// [`VmiError`] if the tree cannot be read or is none.
    pub fn system_ram(&self) -> Result<Option<Vec<GpaRange>>, VmiError> {
        iomem::system_ram(&self.kernel)
    }

    /// Gives every RAM frame its class.
    ///
    /// Content is not looked at: [`mark_zero_pages`](crate::mark_zero_pages) does that.
    ///
    /// # Errors
    /// [`VmiError::NotOwner`] if a processor runs on page tables of something else,
    /// [`VmiError::LaterOwner`] if the memory bears traces of a later owner,
    /// [`VmiError::OwnerUntold`] if it would bear none of a reset,
    /// [`VmiError::Inconsistent`] if the sources of truth disagree, [`VmiError::Missing`] if a
    /// symbol or member that decides about a page is known to no source, and what reading gives.
    pub fn classify(&self, on: OnInconsistency) -> Result<Classification, VmiError> {
        // Records of a kernel that is gone may be gone as well, which is no answer.
        if let Some(owner) = &self.traces
            && !owner.traces.is_empty()
            && on == OnInconsistency::Refuse
        {
            return Err(VmiError::LaterOwner(owner.traces.clone()));
        }
        let (mem_map, layout, zones) = self.structures()?;
        let owner = self.owner(&mem_map, &zones, on)?;
        let mut scan = scan(&self.kernel, &mem_map, &layout, &zones, self.threads)?;
        if scan.fatal
            && on == OnInconsistency::Refuse
            && let Some(inconsistency) = scan.disagreement
        {
            return Err(VmiError::Inconsistent(Box::new(inconsistency)));
        }
        if self.knowledge != Knowledge::Types {
            shape::check_cover(&self.kernel, &zones, self.image, &scan.map)?;
        }
        let mut notes = scan.notes;
        notes.extend(owner.note);
        notes.extend(self.keep(&mut scan.map, &owner.in_question));
        if let Some(inconsistency) = &scan.disagreement {
            notes.push(Note::Disagreement(Box::new(inconsistency.clone())));
        }
        let free_fill = self.free_fill(&scan.map, &mut notes)?;
        self.note_features(&mut notes)?;
        Ok(Classification {
            map: scan.map,
            free_fill,
            zones: scan.zones,
            disagreement: scan.disagreement,
            notes,
        })
    }

    /// Refuses a kernel that does not own the memory, or says what there is to say of it.
    fn owner(
        &self,
        map: &MemMap<'_>,
        zones: &Zones,
        on: OnInconsistency,
    ) -> Result<Owned, VmiError> {
        match self.owners.check(&self.kernel, map, zones) {
            Ok(Verdict::Owner) => Ok(Owned::default()),
            Ok(Verdict::Unknown) => self.look_for_later_owner(on),
            Ok(Verdict::NotTold(why)) => {
                let owned = self.look_for_later_owner(on)?;
                let instead = owned.note.map(Box::new);
                Ok(Owned {
                    note: instead.map(|instead| Note::ProcessorsNotBelieved { why, instead }),
                    ..owned
                })
            }
            Ok(Verdict::Crashed) => Ok(Owned::noted(Note::CrashDump)),
            Err(VmiError::NotOwner { kernel, processor })
                if on == OnInconsistency::KeepInQuestion =>
            {
                Ok(Owned::noted(Note::NotOwner { kernel, processor }))
            }
            Err(error) => Err(error),
        }
    }

    /// Keeps the free frames of memory that may have another owner, and says how many.
    fn keep(&self, map: &mut PageMap, ranges: &[GpaRange]) -> Option<Note> {
        let mut kept = 0_u64;
        for range in ranges {
            map.with_slices(
                range.whole_frames(self.kernel.build.page_size),
                |_, classes| {
                    for class in classes {
                        if matches!(
                            class,
                            PageClass::FreeBuddy | PageClass::FreePcp | PageClass::Offline
                        ) {
                            *class = PageClass::Unknown;
                            kept = kept.wrapping_add(1);
                        }
                    }
                },
            );
        }
        (kept > 0).then(|| Note::FirmwareMemoryKept {
            pages: kept,
            places: ranges.to_vec(),
        })
    }

    /// Looks for traces of a later owner, where nothing tells the processors' registers.
    fn look_for_later_owner(&self, on: OnInconsistency) -> Result<Owned, VmiError> {
        let looked;
        let owner = if let Some(owner) = &self.traces {
            owner
        } else {
            looked = owner::look(&self.kernel, self.knowledge == Knowledge::Types)?;
            &looked
        };
        let refuse = on == OnInconsistency::Refuse;
        match &owner.untold {
            _ if !owner.traces.is_empty() => {
                let traces = owner.traces.clone();
                if refuse {
                    return Err(VmiError::LaterOwner(traces));
                }
                Ok(Owned::noted(Note::LaterOwner(traces)))
            }
            Some(why) => {
                let (kernel, why) = (self.kernel.build.release.clone(), why.clone());
                if refuse {
                    return Err(VmiError::OwnerUntold { kernel, why });
                }
                Ok(Owned::noted(Note::OwnerUntold { kernel, why }))
            }
            None => Ok(Owned {
                note: Some(Note::NoTraceOfLaterOwner(TracesSought {
                    made: owner.clean.clone(),
                    not_made: owner.not_made.clone(),
                })),
                in_question: owner.in_question.clone(),
            }),
        }
    }

    /// Whether the flag behind `names` is set: a static key or a bool, by its first byte.
    fn flag(&self, names: &[&str]) -> Result<Option<bool>, VmiError> {
        for name in names {
            if let Some(at) = self.kernel.symbol(name)? {
                let mut byte = [0];
                self.kernel
                    .space
                    .read(at, &mut byte)
                    .map_err(VmiError::read("a kernel flag"))?;
                return Ok(Some(byte != [0]));
            }
        }
        // A name that a whole symbol table does not have belongs to a feature not built in.
        Ok(self.kernel.knows_all_symbols()?.then_some(false))
    }

    /// What free pages must read as: `mm/page_poison.c` checks for its pattern on allocation, and
    /// `init_on_free` hands out pages as zero without looking.
    fn free_fill(&self, map: &PageMap, notes: &mut Vec<Note>) -> Result<Fill, VmiError> {
        const PAGE_POISON: u8 = 0xaa;
        /// Of so many runs of free pages the first is looked at.
        const MAX_LOOKED: usize = 4096;
        // `_page_poisoning_enabled` since 5.11, `want_page_poisoning` before.
        let poisoned = self.flag(&["_page_poisoning_enabled", "want_page_poisoning"])?;
        let zeroed = self.flag(&["init_on_free"])?;
        let unless_poisoned = |zeroed| if zeroed { Fill::Zero } else { Fill::Any };
        if poisoned == Some(false)
            && let Some(zeroed) = zeroed
        {
            return Ok(unless_poisoned(zeroed));
        }
        // On, or unknown: with poisoning every free page holds the pattern, so one that does
        // not proves it off. The same of zeroes.
        let memory = self.kernel.space.memory();
        let (mut looked, mut with_pattern, mut zero) = (0_u32, 0_u32, 0_u32);
        let mut page = self.kernel.page_buffer()?;
        let free = map
            .runs()
            .filter(|(_, class)| *class == PageClass::FreeBuddy);
        for (frames, _) in free.take(MAX_LOOKED) {
            let Some(at) = frames.start().gpa(self.kernel.build.page_size) else {
                continue;
            };
            memory.read(at, &mut page)?;
            looked = looked.saturating_add(1);
            if page.iter().all(|byte| *byte == PAGE_POISON) {
                with_pattern = with_pattern.saturating_add(1);
            } else if page.iter().all(|byte| *byte == 0) {
                zero = zero.saturating_add(1);
            }
        }
        // Where no flag tells, a few pages that were just freed or being given away decide nothing.
        let most = |count: u32| count > looked.saturating_sub(looked.div_ceil(20));
        if poisoned == Some(false) || poisoned.is_none() && !most(with_pattern) {
            return Ok(unless_poisoned(zeroed.unwrap_or(most(zero))));
        }
        if looked > 0 && zero == looked {
            // CONFIG_PAGE_POISONING_ZERO (to 5.10): the pattern is zero.
            return Ok(Fill::Zero);
        }
        notes.push(Note::PagePoison { byte: PAGE_POISON });
        Ok(Fill::Byte(PAGE_POISON))
    }

    /// Features of the guest that bear on free pages.
    fn note_features(&self, notes: &mut Vec<Note>) -> Result<(), VmiError> {
        for (name, note) in [
            ("init_on_free", Note::InitOnFree),
            ("_debug_pagealloc_enabled", Note::DebugPagealloc),
            ("kasan_flag_enabled", Note::HardwareTags),
        ] {
            if self.flag(&[name])? == Some(true) {
                notes.push(note);
            }
        }
        Ok(())
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
        let mut pages = self.classify(options.inconsistency())?;
        if options.looks_for_zero_pages() {
            mark_zero_pages(self.kernel.space.memory(), &mut pages.map)?;
        }
        Ok(Analysis::new(Parts {
            facts: self.facts(),
            pages,
            present: self.struct_page_memory()?,
            // A map that cannot be read confirms nothing.
            boot_ram: self.e820().ok().flatten(),
        }))
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

    fn known_memory(&self) -> Result<Vec<GpaRange>, VmiError> {
        LinuxGuest::known_memory(self)
    }

    fn direct_map(&self) -> Result<Option<KernelVa>, VmiError> {
        LinuxGuest::direct_map(self)
    }

    fn evidence_of_places(&self, ranges: &[GpaRange]) -> Result<Vec<PlaceEvidence>, VmiError> {
        LinuxGuest::evidence_of_places(self, ranges)
    }
}
