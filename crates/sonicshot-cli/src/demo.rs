//! `sonicshot demo`: the whole thing on a real dump, checked against the guest's own kernel.

use crate::args::DemoArgs;
use crate::error::CliError;
use crate::inspect::print_report;
use crate::output::io;
use crate::report::{count, say, size};
use sonicshot::{ClassSet, PageClass, PageMap, Pfn, Tally, WorkOptions};
use sonicshot_offline::{AnalyzeOptions, OpenOptions, PruneOptions, Snapshot};
use sonicshot_vmi::count_zero_pages;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Bits of `/proc/kpageflags` (include/uapi/linux/kernel-page-flags.h) that say "in use".
const LRU: u64 = 1 << 5;
const SLAB: u64 = 1 << 7;
const BUDDY: u64 = 1 << 10;
const MMAP: u64 = 1 << 11;
const ANON: u64 = 1 << 12;
const RESERVED: u64 = 1 << 32;

pub(crate) fn run(args: &DemoArgs) -> Result<(), CliError> {
    let guest = match &args.dump {
        Some(folder) => Guest::of_folder(folder)?,
        None => Guest::within()?,
    };
    let scratch = tempfile::tempdir().map_err(|source| CliError::Io {
        action: "creating a folder in",
        path: std::env::temp_dir(),
        source,
    })?;
    let dump = scratch.path().join("guest.raw");
    say!("$ unpack {}", guest.name);
    let on_disk = unpack(&mut guest.ram.as_slice(), &dump).map_err(guest.failed())?;
    say!("{} on disk", size(on_disk));
    say!("\n$ sonicshot inspect guest.raw");
    let snapshot = Snapshot::open(&dump, &OpenOptions::new())?;
    let analyzed = snapshot.analyze(&AnalyzeOptions::new())?;
    let zero_pages = count_zero_pages(analyzed.dump(), analyzed.pages(), &WorkOptions::new())?;
    print_report(
        &analyzed,
        zero_pages,
        analyzed.savings(ClassSet::DEFAULT_DROP)?,
    );

    say!("\n$ compare with /proc/kpageflags, written by the guest itself before it stopped");
    let flags = read_flags(&mut guest.kpageflags.as_slice()).map_err(guest.failed())?;
    check(analyzed.pages(), &flags)?;

    say!("\n$ sonicshot prune guest.raw --in-place");
    let plan = analyzed.plan(ClassSet::DEFAULT_DROP)?;
    let stats = plan.prune_in_place(&PruneOptions::new())?;
    say!(
        "dropped {} in {} holes; on disk: {} -> {}",
        size(stats.dropped_bytes),
        count(stats.runs),
        size(stats.disk_before),
        size(stats.disk_after)
    );
    let again = snapshot.analyze(&AnalyzeOptions::new())?;
    let same = again.counts() == analyzed.counts();
    say!("\n$ sonicshot inspect guest.raw");
    say!(
        "the pruned dump tells the same of every page: {}",
        if same { "yes" } else { "no" }
    );
    if !same {
        return Err(CliError::Demo {
            what: "the pruned dump reads differently".into(),
        });
    }
    Ok(())
}

/// A guest's memory and its kernel's own word of every frame, both packed by zstd.
struct Guest {
    name: String,
    ram: Vec<u8>,
    kpageflags: Vec<u8>,
}

impl Guest {
    /// The one in this program: its pages in use that nothing here looks at hold a text instead of
    /// what they held, which makes it small. `lab.py demo` makes it.
    fn within() -> Result<Self, CliError> {
        Ok(Self {
            name: "the guest in this program: 128 MiB, Debian's Linux 6.1".into(),
            ram: include_bytes!("../demo/ram.raw.zst").into(),
            kpageflags: include_bytes!("../demo/kpageflags.bin.zst").into(),
        })
    }

    /// A guest of the repository's testdata.
    fn of_folder(folder: &Path) -> Result<Self, CliError> {
        let read = |name: &str| {
            let path = folder.join(name);
            fs::read(&path).map_err(io("reading", &path))
        };
        Ok(Self {
            name: folder.join("ram.raw.zst").display().to_string(),
            ram: read("ram.raw.zst")?,
            kpageflags: read("kpageflags.bin.zst")?,
        })
    }

    fn failed(&self) -> impl Fn(io::Error) -> CliError {
        io("unpacking", Path::new(&self.name))
    }
}

/// Unpacks a file, dense as most VMMs write it. Gives what it takes on disk, in bytes.
fn unpack(from: &mut dyn Read, to: &Path) -> io::Result<u64> {
    let mut reader = zstd::stream::read::Decoder::new(from)?;
    reader.window_log_max(31)?;
    let mut out = File::create(to)?;
    io::copy(&mut reader, &mut out)?;
    // What it takes is known once it is there.
    out.sync_all()?;
    Ok(Tally::new(out.metadata()?.blocks()).times(512).get())
}

fn read_flags(from: &mut dyn Read) -> io::Result<Vec<u64>> {
    let mut bytes = Vec::new();
    let mut reader = zstd::stream::read::Decoder::new(from)?;
    reader.window_log_max(31)?;
    reader.read_to_end(&mut bytes)?;
    let (words, _) = bytes.as_chunks::<8>();
    Ok(words.iter().map(|word| u64::from_le_bytes(*word)).collect())
}

/// Holds every frame against the kernel's own word.
fn check(map: &PageMap, flags: &[u64]) -> Result<(), CliError> {
    let mut both = 0_u64;
    let mut kernel_only = 0_u64;
    let mut in_use = Vec::new();
    for (pfn, flags) in (0_u64..).zip(flags) {
        let class = map.class(Pfn::new(pfn));
        let free = matches!(
            class,
            Some(PageClass::FreeBuddy | PageClass::FreePcp | PageClass::Offline)
        );
        let says_free = flags & BUDDY != 0;
        match (class, says_free) {
            (Some(PageClass::FreeBuddy), true) => both += 1,
            (Some(_), true) => kernel_only += 1,
            _ if free && flags & (LRU | SLAB | MMAP | ANON | RESERVED) != 0 => in_use.push(pfn),
            _ => {}
        }
    }
    say!("free by both: {} pages", count(both));
    say!(
        "free by the kernel alone (used between its record and the stop): {}",
        count(kernel_only)
    );
    say!("dropped although the kernel says in use: {}", in_use.len());
    if in_use.is_empty() {
        Ok(())
    } else {
        Err(CliError::Demo {
            what: format!("frames {in_use:?} are in use by the kernel's record"),
        })
    }
}
