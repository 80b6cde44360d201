//! `sonicshot demo`: the whole thing on a real dump, checked against the guest's own kernel.

use crate::args::DemoArgs;
use crate::error::CliError;
use crate::inspect::print_report;
use crate::report::{count, say, size};
use sonicshot::{ClassSet, PageClass, PageMap, Pfn};
use sonicshot_offline::{AnalyzeOptions, OpenOptions, PruneOptions, Snapshot};
use sonicshot_vmi::count_zero_pages;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

const NAME: &str = "guest-6.1-128m";
/// Bits of `/proc/kpageflags` (include/uapi/linux/kernel-page-flags.h) that say "in use".
const LRU: u64 = 1 << 5;
const SLAB: u64 = 1 << 7;
const BUDDY: u64 = 1 << 10;
const MMAP: u64 = 1 << 11;
const ANON: u64 = 1 << 12;
const RESERVED: u64 = 1 << 32;

pub(crate) fn run(args: &DemoArgs) -> Result<(), CliError> {
    let folder = match &args.dump {
        Some(folder) => folder.clone(),
        None => find()?,
    };
    let scratch = tempfile::tempdir().map_err(|source| CliError::Io {
        action: "creating a folder in",
        path: std::env::temp_dir(),
        source,
    })?;
    let dump = scratch.path().join("guest.raw");
    say!("$ unpack {}", folder.join("ram.raw.zst").display());
    unpack(&folder.join("ram.raw.zst"), &dump)?;
    say!("\n$ sonicshot inspect guest.raw");
    let snapshot = Snapshot::open(&dump, &OpenOptions::new())?;
    let analyzed = snapshot.analyze(&AnalyzeOptions::new())?;
    let zero_pages = count_zero_pages(analyzed.dump(), analyzed.pages())?;
    print_report(
        &analyzed,
        zero_pages,
        analyzed.savings(ClassSet::DEFAULT_DROP)?,
    );

    say!("\n$ compare with /proc/kpageflags, written by the guest itself before it stopped");
    let flags = read_flags(&folder.join("kpageflags.bin.zst"))?;
    check(analyzed.pages(), &flags)?;

    say!("\n$ sonicshot prune guest.raw --in-place");
    let plan = analyzed.plan(ClassSet::DEFAULT_DROP)?;
    let stats = plan.prune_in_place(&PruneOptions::new(), &mut |_, _| {})?;
    say!(
        "dropped {} in {} runs; on disk: {} -> {}",
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

/// Looks for the dump from the current folder upwards.
fn find() -> Result<PathBuf, CliError> {
    let here = std::env::current_dir().unwrap_or_default();
    here.ancestors()
        .map(|folder| folder.join("testdata").join(NAME))
        .find(|folder| folder.join("ram.raw.zst").exists())
        .ok_or(CliError::NoDemo { name: NAME })
}

/// Unpacks a file with holes where it is zero.
fn unpack(from: &Path, to: &Path) -> Result<(), CliError> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| CliError::Io {
            action: "unpacking",
            path,
            source,
        }
    };
    let work = || -> io::Result<u64> {
        let mut reader = zstd::stream::read::Decoder::new(File::open(from)?)?;
        reader.window_log_max(31)?;
        let mut out = File::create(to)?;
        let mut piece = vec![0; 1 << 16];
        let mut len = 0_u64;
        loop {
            let mut got = 0;
            while got < piece.len() {
                match reader.read(piece.get_mut(got..).unwrap_or_default())? {
                    0 => break,
                    more => got += more,
                }
            }
            let data = piece.get(..got).unwrap_or_default();
            if data.is_empty() {
                out.set_len(len)?;
                return Ok(out.metadata()?.blocks() * 512);
            }
            if data.iter().any(|byte| *byte != 0) {
                out.seek(SeekFrom::Start(len))?;
                out.write_all(data)?;
            }
            len += data.len() as u64;
        }
    };
    let on_disk = work().map_err(io(from))?;
    say!("{} on disk", size(on_disk));
    Ok(())
}

fn read_flags(path: &Path) -> Result<Vec<u64>, CliError> {
    let work = || -> io::Result<Vec<u64>> {
        let mut bytes = Vec::new();
        let mut reader = zstd::stream::read::Decoder::new(File::open(path)?)?;
        reader.window_log_max(31)?;
        reader.read_to_end(&mut bytes)?;
        let (words, _) = bytes.as_chunks::<8>();
        Ok(words.iter().map(|word| u64::from_le_bytes(*word)).collect())
    };
    work().map_err(|source| CliError::Io {
        action: "unpacking",
        path: path.to_owned(),
        source,
    })
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
