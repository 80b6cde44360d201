//! The command line.

use crate::error::CliError;
use crate::output::named_images;
use crate::progress::{ProgressMode, Talk};
use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use sonicshot::checkpoint::{Compression, DiskHash, MovedOn};
use sonicshot::{ClassSet, Pfn};
#[cfg(feature = "libvmi")]
use sonicshot_libvmi::Domain;
use sonicshot_offline::{
    AnalyzeOptions, DumpFormat, KdumpCompression, LayoutSpec, OpenOptions, RestoreDisks, RestoreTo,
    ShareOptions,
};
use sonicshot_vmi::x86_64::Cr3;
use sonicshot_vmi::{Knowledge, OnInconsistency};
use sonicshot_xen_live::{Compress, ImageCompression};
use std::num::{NonZeroU64, NonZeroUsize};
use std::path::{Path, PathBuf};

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  reading or writing failed
  2  the command line is wrong
  3  the file is no dump that can be read, or is damaged
  4  no kernel was found in it, or its symbols are missing or of another kernel
  5  the guest's own records of free pages contradict each other, or its kernel does not own
     the memory: nothing was pruned
  6  another process has the file open for writing: it was not changed in place, or the disk's
     image is not pinned";

/// Leaves a guest's free memory out of its snapshots, from outside, with no agent.
#[derive(Debug, Parser)]
#[command(name = "sonicshot", version, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub talk: TalkArgs,
    #[command(subcommand)]
    pub command: Command,
}

/// Options for what is told while a command works.
#[derive(Debug, Args)]
#[command(next_help_heading = "Progress and messages")]
pub(crate) struct TalkArgs {
    /// Show the progress of the work on standard error
    #[arg(
        long,
        value_name = "WHEN",
        value_enum,
        default_value = "auto",
        global = true,
        hide_possible_values = true
    )]
    pub progress: ProgressMode,
    /// Print neither progress nor notes
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Print each phase with its time; of `serve`, each virtual machine
    #[arg(short, long, global = true)]
    pub verbose: bool,
}

impl TalkArgs {
    pub(crate) fn talk(&self) -> Talk {
        Talk {
            mode: self.progress,
            quiet: self.quiet,
            verbose: self.verbose,
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show what a dump holds: its kernel, its zones, its pages by class
    #[command(after_help = EXIT_CODES)]
    Inspect(InspectArgs),
    /// Take the free pages out of a dump; it stays a dump of the same format
    #[command(after_help = EXIT_CODES)]
    Prune(PruneArgs),
    /// Share disk blocks between a memory file and an image of its guest's disk where both hold the
    /// same (xfs, btrfs): for VMMs that read plain memory files only
    #[command(after_help = EXIT_CODES)]
    Share(ShareArgs),
    /// Save a dump as a checkpoint: only the pages that the guest needs, compressed and checked
    #[command(after_help = EXIT_CODES)]
    Save(SaveArgs),
    /// Restore a dump from a checkpoint
    #[command(after_help = EXIT_CODES)]
    Restore(RestoreArgs),
    /// Check every byte of a checkpoint, and with --against its pages against the dump it came from
    #[command(after_help = EXIT_CODES)]
    Verify(VerifyArgs),
    /// Add files, such as a working set, to a checkpoint; a new one is written
    #[command(after_help = EXIT_CODES)]
    Attach(AttachArgs),
    /// Convert a dump to another format, with all of its pages
    #[command(after_help = EXIT_CODES)]
    Convert(ConvertArgs),
    /// Make small symbol files of kernels, for guests in whose memory no types are found
    #[command(subcommand)]
    Symbols(SymbolsCommand),
    /// Save and restore Xen domains, from dom0
    #[command(subcommand)]
    Xen(XenCommand),
    /// Save and restore running guests of QEMU
    #[command(subcommand)]
    Qemu(QemuCommand),
    /// Lets a guest run on whose saver died
    #[command(hide = true)]
    QemuWatchdog,
    /// Ends a guest whose restorer died before it had all pages
    #[command(hide = true)]
    QemuGuard,
    /// Lets a guest run on that LibVMI paused for a process that died
    #[cfg(feature = "libvmi")]
    #[command(hide = true)]
    LibvmiWatchdog(LibvmiWatchdogArgs),
    /// Serve memory to virtual machines page by page, as they touch it, from a checkpoint or a
    /// pruned snapshot
    #[command(after_help = EXIT_CODES)]
    Serve(ServeArgs),
    /// Ends the virtual machines of a server that died
    #[command(hide = true)]
    ServeWatcher,
    /// Inspect and prune a small real guest that is in this program, and show what happened
    Demo(DemoArgs),
    /// Write a shell's completion script, or manual pages
    #[command(subcommand)]
    Generate(GenerateCommand),
}

/// Options for understanding a dump.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct InputArgs {
    /// A System.map, vmlinux or BTF file of the guest's kernel, or what `symbols make` makes of
    /// them; or a folder of such, of which the one of the guest's build is taken; may be repeated.
    /// Without it everything is found in the guest's own memory
    #[arg(long, value_name = "FILE|DIR")]
    pub symbols: Vec<PathBuf>,
    /// Where the RAM in a raw file lies in the guest: pc, q35, firecracker, firecracker-old, flat
    /// or START-END,... Of a QEMU file with several blocks of memory, where each lies:
    /// BLOCK=START-END,...;BLOCK=... If not given, it is found by the guest's own memory map
    #[arg(long, value_name = "LAYOUT")]
    pub layout: Option<LayoutSpec>,
    /// The file's format, whatever it begins with: raw (also firecracker, cloud-hypervisor, vmware:
    /// their memory files), crosvm, elf, qemu (also mapped-ram, stream), qcow2, libvirt, kdump,
    /// lime, avml, xen (also xl), xen-core, or sonic, a checkpoint. If not given, it is told by the
    /// file's beginning
    #[arg(long, value_name = "NAME")]
    pub format: Option<DumpFormat>,
    /// The memory that the dump is a diff to: a Firecracker diff snapshot is read over it
    #[arg(long, value_name = "FILE")]
    pub base: Option<PathBuf>,
    /// The most that is taken in from standard input: bytes, or with K, M, G. By default, of a
    /// migration stream as much as the guest has RAM and a tenth or 16 MiB more, of others half of
    /// what is free where it is put (TMPDIR)
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub max_size: Option<u64>,
    /// The CR3 register of a processor that ran the guest's kernel (of one in a nested guest, its
    /// host's): the kernel with these page tables owns the memory, whatever the file has of the
    /// processors. Decimal, or hexadecimal with 0x
    #[arg(long, value_name = "N")]
    pub cr3: Option<Cr3>,
    /// Take no more than this of the guest: the lab holds what less knowledge finds against what
    /// more does
    #[arg(long, value_name = "KNOWLEDGE", hide = true, value_parser = knowledge)]
    pub at_most: Option<Knowledge>,
    /// Go on although the guest's records of free pages contradict each other: every page in
    /// question is kept, the others are believed
    #[arg(long)]
    pub allow_inconsistent: bool,
}

impl InputArgs {
    /// The facts that are known of the dump beforehand.
    pub(crate) fn open(&self) -> OpenOptions {
        let mut options = OpenOptions::new();
        options.symbols.clone_from(&self.symbols);
        options.layout.clone_from(&self.layout);
        options.format = self.format;
        options.base.clone_from(&self.base);
        options.cr3 = self.cr3;
        options.at_most = self.at_most;
        options.max_size = self.max_size;
        options
    }

    /// The options for looking at its guest.
    pub(crate) fn analyze(&self) -> AnalyzeOptions {
        AnalyzeOptions::new().on_inconsistency(self.on_inconsistency())
    }

    pub(crate) fn on_inconsistency(&self) -> OnInconsistency {
        if self.allow_inconsistent {
            OnInconsistency::KeepInQuestion
        } else {
            OnInconsistency::Refuse
        }
    }
}

/// A guest that runs, instead of a file.
#[cfg(feature = "libvmi")]
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct LibvmiArgs {
    /// Instead of a file, a guest that LibVMI reads: `xen:NAME`, `kvm:NAME` or `file:PATH`. It is
    /// paused for as long as it is read. With --layout START-END,... where RAM lies is not tried
    /// page by page
    #[arg(long, value_name = "GUEST", conflicts_with_all = ["format", "base", "max_size"])]
    pub libvmi: Option<Domain>,
    /// The LibVMI to load; by default what `SONICSHOT_LIBVMI` names, or the system's libvmi.so.0
    #[arg(long, value_name = "FILE", requires = "libvmi")]
    pub libvmi_library: Option<PathBuf>,
    /// The socket at which the guest's QEMU offers introspection (KVMI)
    #[arg(long, value_name = "PATH", requires = "libvmi")]
    pub kvmi_socket: Option<PathBuf>,
    /// A JSON profile of the guest's kernel for LibVMI, which tells symbols if the kernel's own
    /// memory does not; by default what /etc/libvmi.conf has of the guest
    #[arg(long, value_name = "FILE", requires = "libvmi")]
    pub libvmi_profile: Option<PathBuf>,
}

/// The arguments of the second process.
#[cfg(feature = "libvmi")]
#[derive(Debug, Args)]
pub(crate) struct LibvmiWatchdogArgs {
    pub domain: Domain,
    #[arg(long)]
    pub libvmi_library: Option<PathBuf>,
    #[arg(long)]
    pub kvmi_socket: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// Dumps: raw guest RAM, an ELF core, a QEMU migration file or stream, a libvirt save image, a
    /// Xen save image, migration stream or core, kdump-compressed, LiME, AVML, VMware's vmem with
    /// its state beside it, a qcow2 image with an internal snapshot; any of them compressed, or on
    /// a block device; a snapshot folder of Cloud Hypervisor or crosvm, or one with a Firecracker
    /// state and memory file; a checkpoint; `-` is standard input
    #[arg(value_name = "FILE|DIR")]
    #[cfg_attr(
        feature = "libvmi",
        arg(required_unless_present = "libvmi", conflicts_with = "libvmi")
    )]
    #[cfg_attr(not(feature = "libvmi"), arg(required = true))]
    pub files: Vec<PathBuf>,
    #[command(flatten)]
    pub input: InputArgs,
    #[cfg(feature = "libvmi")]
    #[command(flatten)]
    pub libvmi: LibvmiArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Write every run of frames with its class: first, last (inclusive), class, and `zero` where
    /// pages in use hold only zeroes. `-` is standard output; the rest is then said on standard
    /// error
    #[arg(long, value_name = "OUT.tsv")]
    pub pfns: Option<PathBuf>,
    /// Draw RAM by class, before a prune and after it, or of a checkpoint, and its free blocks by
    /// size: on the terminal, or as a picture to FILE.svg (give the dump before it)
    #[arg(long, value_name = "FILE.svg", num_args = 0..=1, default_missing_value = "-")]
    pub map: Option<PathBuf>,
    /// Say why the frame PFN (0x123 or 291) is kept or dropped: its class, what the kernel's records
    /// have of it, which of them agree, and what a prune does with it
    #[arg(long, value_name = "PFN", value_parser = pfn)]
    pub explain: Option<Pfn>,
    /// Show the lists of free blocks of each zone, by order and migrate type, with the first N blocks of
    /// each, held against the counters
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "4", require_equals = true)]
    pub free_lists: Option<usize>,
    /// Write over an existing OUT.tsv or FILE.svg
    #[arg(long)]
    pub force: bool,
}

/// A frame's number, as it is written.
fn pfn(text: &str) -> Result<Pfn, String> {
    let number = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    number
        .map(Pfn::new)
        .map_err(|_| "want a frame's number, such as 0x1234 or 4660".into())
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("where").required(true).multiple(true).args(["output", "in_place", "dry_run"]))]
pub(crate) struct PruneArgs {
    /// Dumps: raw guest RAM, an ELF core, a QEMU migration file or stream, a libvirt save image, a
    /// Xen save image or migration stream, kdump-compressed; any of them compressed as a whole; a
    /// snapshot folder of Cloud Hypervisor or crosvm, or one with a Firecracker state and memory
    /// file; `-` is standard input
    #[arg(value_name = "FILE|DIR")]
    #[cfg_attr(
        feature = "libvmi",
        arg(required_unless_present = "libvmi", conflicts_with = "libvmi")
    )]
    #[cfg_attr(not(feature = "libvmi"), arg(required = true))]
    pub files: Vec<PathBuf>,
    #[command(flatten)]
    pub input: InputArgs,
    #[cfg(feature = "libvmi")]
    #[command(flatten)]
    pub libvmi: LibvmiArgs,
    /// Where to write the pruned dump, of a folder a folder; of several inputs, the folder that
    /// the copies go to; `-` is standard output, for a migration stream
    #[arg(short, long, value_name = "OUT")]
    pub output: Option<PathBuf>,
    /// Punch the pages out of the file itself (raw and mapped-ram files): nothing is copied, and
    /// whatever interrupts it leaves a valid dump
    #[arg(long, conflicts_with = "output")]
    pub in_place: bool,
    /// In place, punch no hole that is shorter than this: each costs time and an extent of the
    /// file. Bytes, or with K, M, G; 0 punches every page. By default 32K, or less in a guest whose
    /// free memory is in pieces, so that 97 % of it goes
    #[arg(long, value_name = "SIZE", value_parser = size, requires = "in_place", conflicts_with = "output")]
    pub min_hole: Option<u64>,
    /// In place, prune a file that another process has open for writing: a VMM whose guest is
    /// stopped from before this command starts until it is done
    #[arg(long, requires = "in_place", conflicts_with = "output")]
    pub live_ok: bool,
    /// The classes to drop, by name; `zero` is pages in use that hold only zeroes, whatever their
    /// class. What the guest uses (`page_cache_clean`, `anonymous`, ...) is dropped only with
    /// --for-analysis: no guest can run from such a dump, it is for looking at
    #[arg(
        long,
        value_name = "CLASS,...",
        value_delimiter = ',',
        default_value = "free_buddy,free_pcp,offline,zero"
    )]
    pub drop: Vec<ClassSet>,
    /// Drop classes that the guest uses too (those of processes, the page cache): it cannot run
    /// from the result, which is to be looked at
    #[arg(long)]
    pub for_analysis: bool,
    /// In place, drop them for good: the file is then no snapshot of a guest that can run
    #[arg(long, requires = "for_analysis")]
    pub yes: bool,
    /// Find out what would be dropped, and change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Write over an existing OUT
    #[arg(long)]
    pub force: bool,
}

impl PruneArgs {
    /// Whether the pruned dump goes to standard output.
    pub(crate) fn to_stdout(&self) -> bool {
        self.output
            .as_deref()
            .is_some_and(|out| out == Path::new("-"))
    }
}

/// By its name in reports.
fn knowledge(name: &str) -> Result<Knowledge, String> {
    let all = [Knowledge::Types, Knowledge::Vmcoreinfo, Knowledge::Shape];
    let found = all.into_iter().find(|level| level.name() == name);
    found.ok_or_else(|| "not types, vmcoreinfo or shape".into())
}

/// A number that is not 0.
fn at_least_one(text: &str) -> Result<NonZeroUsize, String> {
    text.parse().map_err(|_| "not a number from 1 on".into())
}

/// A number of bytes, with K, M or G in units of 1024.
fn size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'K' | 'k')) => (text.get(..at), 10),
        Some((at, 'M' | 'm')) => (text.get(..at), 20),
        Some((at, 'G' | 'g')) => (text.get(..at), 30),
        _ => (Some(text), 0),
    };
    digits
        .and_then(|digits| digits.parse::<u64>().ok())
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| "not a size, such as 4096, 64K or 2M".into())
}

#[derive(Debug, Args)]
pub(crate) struct ShareArgs {
    /// Raw guest RAM, a mapped-ram file, or the folder of a VMM's snapshot. Without -o it is
    /// changed itself: not a byte of it, but where they are, for the kernel compares them first
    #[arg(value_name = "FILE|DIR")]
    pub file: PathBuf,
    /// The image of a disk of the guest's, raw, on the same file system; may be repeated. What is
    /// shared stays as it is, whoever writes to the image later
    #[arg(long, value_name = "IMAGE", required = true)]
    pub disk: Vec<PathBuf>,
    /// Write a copy instead, of a folder a folder: what it shares is not written at all. On btrfs a
    /// file that was written whole gives back the room of an extent only when it shares all of it
    #[arg(short, long, value_name = "OUT")]
    pub output: Option<PathBuf>,
    /// The shortest run of pages of 4 KiB that is shared: each is two more extents
    #[arg(long, value_name = "PAGES", default_value_t = ShareOptions::MIN_RUN)]
    pub min_run: NonZeroU64,
    /// Number of threads that look for pages; by default one for each core
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub threads: Option<NonZeroUsize>,
    /// Where each block of memory of a QEMU file with several lies:
    /// BLOCK=START-END,...;BLOCK=...
    #[arg(long, value_name = "LAYOUT")]
    pub layout: Option<LayoutSpec>,
    /// The file's format, whatever it begins with: raw, mapped-ram and so on
    #[arg(long, value_name = "NAME")]
    pub format: Option<DumpFormat>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Write over an existing OUT
    #[arg(long, requires = "output")]
    pub force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct SaveArgs {
    /// The dump, or the folder of a VMM's snapshot
    #[arg(value_name = "FILE|DIR")]
    #[cfg_attr(
        feature = "libvmi",
        arg(required_unless_present = "libvmi", conflicts_with = "libvmi")
    )]
    #[cfg_attr(not(feature = "libvmi"), arg(required = true))]
    pub file: Option<PathBuf>,
    #[command(flatten)]
    pub input: InputArgs,
    #[cfg(feature = "libvmi")]
    #[command(flatten)]
    pub libvmi: LibvmiArgs,
    /// Where to write the checkpoint; `-` is standard output
    #[arg(short, long, value_name = "X.sonic")]
    pub output: PathBuf,
    /// Compression of page data: zstd, zstd:LEVEL, lz4 or none (which can be mapped)
    #[arg(long, value_name = "HOW", default_value = "zstd")]
    pub compress: Compression,
    /// Page data in a chunk, in KiB: what a restore decompresses for one page
    #[arg(long, value_name = "KIB", default_value_t = 64, value_parser = clap::value_parser!(u32).range(4..=16384))]
    pub chunk: u32,
    /// Number of threads; by default one for each core
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub threads: Option<NonZeroUsize>,
    /// The classes to leave out, by name
    #[arg(
        long,
        value_name = "CLASS,...",
        value_delimiter = ',',
        default_value = "free_buddy,free_pcp,offline,zero"
    )]
    pub drop: Vec<ClassSet>,
    /// Leave out classes that the guest uses too: it cannot run from the checkpoint, which says so
    #[arg(long)]
    pub for_analysis: bool,
    /// Do not look for a kernel: keep every page that is not zero
    #[arg(long, conflicts_with_all = ["drop", "symbols"])]
    pub keep_all: bool,
    /// Put a file into the checkpoint, such as the VMM's device state; may be repeated
    #[arg(long, value_name = "NAME=FILE")]
    pub blob: Vec<String>,
    /// A disk of the guest's, and its image (raw, qcow2 with all below it, or a block device): pages that are the same on it,
    /// such as the page cache, are not stored, and `restore --disk` takes them from there. May be
    /// repeated. In this order: stop the guest; pin the disk, so that nobody writes to IMAGE any more
    /// (QEMU's `blockdev-snapshot-sync`, `cp --reflink`); then save its memory
    #[arg(long, value_name = "NAME=IMAGE")]
    pub disk: Vec<String>,
    /// The hash that is kept of pages on disks: xxh3, or sha256 where others than you can write to
    /// the image
    #[arg(long, value_name = "HASH", default_value = "xxh3", requires = "disk")]
    pub hash: DiskHash,
    /// Look through all of the images, also where the guest's own records (ext4's extents) explain nine
    /// tenths of its page cache
    #[arg(long, requires = "disk")]
    pub scan: bool,
    /// Name of the VMM that ran the guest, to be stored in the checkpoint
    #[arg(long, value_name = "NAME")]
    pub vmm: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Write over an existing X.sonic
    #[arg(long)]
    pub force: bool,
}

/// The images of the disks that a checkpoint refers to.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct DiskArgs {
    /// A disk that the checkpoint has pages on, and its image, as it was when the guest was saved;
    /// may be repeated. Run the guest on a new overlay over it, never on the image itself
    #[arg(long, value_name = "NAME=IMAGE")]
    pub disk: Vec<String>,
    /// Go on although a disk was written to since the guest was saved: the guest's memory may
    /// contradict it. The pages that the checkpoint has on it must still be there
    #[arg(long, requires = "disk")]
    pub disk_moved_on: bool,
}

impl DiskArgs {
    /// The images.
    pub(crate) fn disks(&self) -> Result<RestoreDisks, CliError> {
        let mut disks = RestoreDisks::new();
        for (name, path) in named_images(&self.disk)? {
            disks = disks.image(name, path);
        }
        if self.disk_moved_on {
            disks.moved_on = MovedOn::GoOn;
        }
        Ok(disks)
    }
}

/// The same where pages are read as they are touched.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct LazyDiskArgs {
    #[command(flatten)]
    pub given: DiskArgs,
    /// Nobody writes to the images of --disk, neither the guest nor the host, for as long as the
    /// guest runs: pages may be read from them when they are touched. A nearly idle guest writes
    /// over some within minutes, so run it on an overlay
    #[arg(long, requires = "disk")]
    pub disk_immutable: bool,
}

impl LazyDiskArgs {
    /// The images.
    pub(crate) fn disks(&self) -> Result<RestoreDisks, CliError> {
        let mut disks = self.given.disks()?;
        disks.immutable = self.disk_immutable;
        Ok(disks)
    }
}

#[derive(Debug, Args)]
pub(crate) struct AttachArgs {
    /// The checkpoint
    #[arg(value_name = "X.sonic")]
    pub checkpoint: PathBuf,
    /// Where to write the new one
    #[arg(short, long, value_name = "OUT.sonic")]
    pub output: PathBuf,
    /// A file to add, by its name in the checkpoint: `working-set=FILE` is what `serve --record`
    /// has written; may be repeated
    #[arg(long, value_name = "NAME=FILE", required = true)]
    pub blob: Vec<String>,
    /// Replace files of the same names in the checkpoint
    #[arg(long)]
    pub replace: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Write over an existing OUT.sonic
    #[arg(long)]
    pub force: bool,
}

/// The pages that a page server brings in before they are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PrefetchKind {
    /// The working set (--set)
    Set,
    /// The working set, then all that was kept. Clones then share nothing
    All,
    /// Nothing
    None,
}

#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// A checkpoint, a whole or pruned raw file, a mapped-ram file, or the folder of a VMM's
    /// snapshot
    #[arg(value_name = "SNAPSHOT")]
    pub file: PathBuf,
    /// The socket that VMMs connect to: Firecracker (`backend_path` of the memory backend `Uffd`),
    /// and every other that sends its userfaultfd as docs/serve.md says. Whoever can connect gets
    /// all of the guest's memory
    #[arg(
        long,
        value_name = "PATH",
        required_unless_present = "cloud_hypervisor",
        conflicts_with = "cloud_hypervisor"
    )]
    pub socket: Option<PathBuf>,
    /// Where a Cloud Hypervisor (53 or later) listens that was told to `receive-migration` with
    /// `memory_mode=postcopy`: it is restored, and served until it has all of its memory. May be
    /// repeated. SNAPSHOT has its configuration and state too (docs/serve.md). Whoever listens
    /// there gets all of the guest's memory
    #[arg(long, value_name = "PATH", conflicts_with_all = ["owner", "record", "around", "max_vms", "vms"])]
    pub cloud_hypervisor: Vec<PathBuf>,
    /// Leave the guests of --cloud-hypervisor paused
    #[arg(long, requires = "cloud_hypervisor")]
    pub paused: bool,
    /// The user, and group, that the socket belongs to, by number: a jailed VMM's
    #[arg(long, value_name = "UID[:GID]", value_parser = owner)]
    pub owner: Option<(u32, Option<u32>)>,
    /// A user that may connect (or listen, with --cloud-hypervisor) beside the socket's owner and
    /// root; may be repeated
    #[arg(long, value_name = "UID")]
    pub allow_uid: Vec<u32>,
    /// The most memory for decompressed pages, for all virtual machines together: bytes, or with
    /// K, M, G
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "256M")]
    pub cache: u64,
    /// The pages that are brought in before they are asked for. Without this it is `set`, and of
    /// --cloud-hypervisor, which asks for all of it anyway, `all`
    #[arg(long, value_enum, value_name = "WHAT")]
    pub prefetch: Option<PrefetchKind>,
    /// The working set: what --record has written
    #[arg(long, value_name = "FILE")]
    pub set: Option<PathBuf>,
    /// Note which pages virtual machines ask for, and write them to FILE as each ends: a working
    /// set for the next time. Nothing is brought in beforehand then
    #[arg(long, value_name = "FILE", conflicts_with_all = ["set", "around"])]
    pub record: Option<PathBuf>,
    /// Time after the first page fault in which pages are noted
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 30,
        requires = "record"
    )]
    pub record_for: u64,
    /// Largest size of a working set; of a larger one the longest ranges stay
    #[arg(long, value_name = "SIZE", value_parser = size, requires = "record")]
    pub record_max: Option<u64>,
    /// Bytes around a page that come in with it: fewer faults, and more memory for each clone
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "0")]
    pub around: u64,
    /// Number of virtual machines that are served at once; more wait. Without it as many as
    /// the limit of open files has room for, and 1024 at most
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub max_vms: Option<NonZeroUsize>,
    /// Serve so many virtual machines, and end when all of them have ended; connections that were
    /// refused do not count
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub vms: Option<NonZeroUsize>,
    /// Let the next server that is started with the same PATH go on with the virtual machines if
    /// this one dies, and take those of the one before; if that lives still it is ended. A socket,
    /// for this user alone
    #[arg(long, value_name = "PATH", conflicts_with = "cloud_hypervisor")]
    pub keep_fds: Option<PathBuf>,
    /// Time to wait for the next server before the virtual machines are ended
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 10,
        requires = "keep_fds"
    )]
    pub keep_for: u64,
    /// Counters for Prometheus: a port of the loopback (127.0.0.1:9100), or a socket's name with a
    /// slash
    #[arg(long, value_name = "ADDRESS")]
    pub metrics: Option<String>,
    /// Where a raw file's bytes lie; found out by the guest's own memory map without it
    #[arg(long, value_name = "LAYOUT")]
    pub layout: Option<LayoutSpec>,
    /// The file's format, whatever it begins with: raw, elf, qemu, kdump and so on
    #[arg(long, value_name = "NAME")]
    pub format: Option<DumpFormat>,
    /// The memory that the snapshot is a diff to
    #[arg(long, value_name = "FILE")]
    pub base: Option<PathBuf>,
    #[command(flatten)]
    pub disks: LazyDiskArgs,
}

/// A user, and a group behind a colon, by number.
fn owner(text: &str) -> Result<(u32, Option<u32>), String> {
    let number = |text: &str| text.parse::<u32>().map_err(|error| error.to_string());
    Ok(match text.split_once(':') {
        Some((uid, gid)) => (number(uid)?, Some(number(gid)?)),
        None => (number(text)?, None),
    })
}

/// The formats that a checkpoint can be restored to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DumpKind {
    /// Raw guest RAM
    Raw,
    /// An ELF core
    Elf,
    /// A Xen save image, of a checkpoint of one
    Xl,
}

impl From<DumpKind> for RestoreTo {
    fn from(kind: DumpKind) -> Self {
        match kind {
            DumpKind::Raw => Self::Raw,
            DumpKind::Elf => Self::Elf,
            DumpKind::Xl => Self::Xl,
        }
    }
}

/// The formats that a dump can be converted to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ConvertTo {
    /// Raw guest RAM
    Raw,
    /// An ELF core
    Elf,
    /// A kdump-compressed file (its pages compressed as --compress says)
    Kdump,
    /// A checkpoint (zstd)
    Sonic,
    /// A QEMU mapped-ram file; from a migration stream, a libvirt image too
    MappedRam,
    /// A QEMU migration stream; from a mapped-ram file, a libvirt image too
    Stream,
    /// A Xen save image; of a checkpoint of one, or with --template
    Xl,
}

/// All that was given to a `--drop`.
pub(crate) fn classes(drop: &[ClassSet]) -> ClassSet {
    drop.iter().copied().fold(ClassSet::EMPTY, ClassSet::union)
}

/// The compression of the pages of a kdump, each by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum KdumpPacking {
    /// Not at all
    None,
    /// zlib, which every reader knows: the default
    Zlib,
    /// Snappy
    Snappy,
    /// Zstandard
    Zstd,
}

impl From<KdumpPacking> for KdumpCompression {
    fn from(how: KdumpPacking) -> Self {
        match how {
            KdumpPacking::None => Self::None,
            KdumpPacking::Zlib => Self::Zlib,
            KdumpPacking::Snappy => Self::Snappy,
            KdumpPacking::Zstd => Self::Zstd,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct ConvertArgs {
    /// The dump: anything that `inspect` takes
    pub file: PathBuf,
    #[command(flatten)]
    pub input: InputArgs,
    /// Where to write the new dump
    #[arg(short, long, value_name = "OUT")]
    pub output: PathBuf,
    /// The output's format
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub to: ConvertTo,
    /// Compression of a kdump's pages
    #[arg(long, value_enum, value_name = "HOW")]
    pub compress: Option<KdumpPacking>,
    /// A Xen save image of the same guest, of the same moment: what is in it beside the memory goes
    /// to the output, and the memory comes from the dump
    #[arg(long, value_name = "IMAGE")]
    pub template: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Write over an existing OUT
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    /// The checkpoint; `-` is standard input
    pub file: PathBuf,
    /// The most that is taken in from standard input: bytes, or with K, M, G. By default half of
    /// what is free where it is put (TMPDIR)
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub max_size: Option<u64>,
    /// Where to write the dump
    #[arg(short, long, value_name = "OUT")]
    pub output: PathBuf,
    /// The dump's format
    #[arg(long, value_enum, default_value = "raw")]
    pub to: DumpKind,
    #[command(flatten)]
    pub disks: DiskArgs,
    /// Number of threads; by default one for each core
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub threads: Option<NonZeroUsize>,
    /// Write a blob of the checkpoint to a file too; may be repeated
    #[arg(long, value_name = "NAME=FILE")]
    pub blob: Vec<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Write over existing files
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// The checkpoint; `-` is standard input
    pub file: PathBuf,
    /// The most that is taken in from standard input: bytes, or with K, M, G. By default half of
    /// what is free where it is put (TMPDIR)
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub max_size: Option<u64>,
    /// The dump that it was made of
    #[arg(long, value_name = "FILE")]
    pub against: Option<PathBuf>,
    #[command(flatten)]
    pub disks: DiskArgs,
    /// Where a raw dump's bytes lie; without it, as the checkpoint says
    #[arg(long, value_name = "LAYOUT", requires = "against")]
    pub layout: Option<LayoutSpec>,
    /// The dump's format, whatever it begins with: raw, elf, qemu, kdump and so on
    #[arg(long, value_name = "NAME", requires = "against")]
    pub format: Option<DumpFormat>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum SymbolsCommand {
    /// Extract what is needed from a vmlinux: a file of some kilobytes, which is matched with
    /// guests by their build ID. --symbols takes the file, or a folder of such
    #[command(after_help = EXIT_CODES)]
    Make(SymbolsMakeArgs),
}

#[derive(Debug, Args)]
pub(crate) struct SymbolsMakeArgs {
    /// The vmlinux, with its symbol table and types (DWARF or BTF); or several files of one build
    /// that have them together, such as a stripped vmlinux, its System.map and its BTF
    #[arg(value_name = "VMLINUX", required = true)]
    pub files: Vec<PathBuf>,
    /// Where to write the symbol file
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Write over an existing FILE
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum XenCommand {
    /// Save a domain without its free pages, as `xl save` does: suspended, written, destroyed. With
    /// `--compress none` the image is one that an unchanged `xl restore` takes
    #[command(after_help = EXIT_CODES)]
    Save(XenSaveArgs),
    /// Restore a domain by `xl restore`, from a compressed image or a checkpoint of one too. All its
    /// memory is in place before it runs: it may run on the image of a disk itself, but then this
    /// checkpoint cannot be restored once more
    #[command(after_help = EXIT_CODES)]
    Restore(XenRestoreArgs),
}

/// The compression of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Packing {
    /// Zstandard
    Zstd,
    /// LZ4
    Lz4,
    /// Not at all: plain `xl restore` reads the image
    None,
}

impl From<Packing> for Compress {
    fn from(how: Packing) -> Self {
        match how {
            Packing::Zstd => Self::By(ImageCompression::Zstd),
            Packing::Lz4 => Self::By(ImageCompression::Lz4),
            Packing::None => Self::No,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct XenSaveArgs {
    /// The domain's name or number
    pub domain: String,
    /// Where to write the image
    pub file: PathBuf,
    /// A System.map, vmlinux or BTF file of the guest's kernel, or what `symbols make` makes of
    /// them; or a folder of such, of which the one of the guest's build is taken; may be repeated.
    /// Without it everything is found in the guest's own memory
    #[arg(long, value_name = "FILE|DIR")]
    pub symbols: Vec<PathBuf>,
    /// Compression of the image. If not given, LZ4 where that is measured to cost no time on
    /// FILE's disk, else not at all; which of them is said. `sonicshot xen restore` takes all of them,
    /// `xl restore` what was saved with `none`. Of a checkpoint (--disk), Zstandard if not given
    #[arg(long, value_enum, value_name = "HOW")]
    pub compress: Option<Packing>,
    /// Leave the domain running: it goes on as soon as its memory is copied, before it is on the disk
    #[arg(short, long, conflicts_with = "pause")]
    pub checkpoint: bool,
    /// With `-c`, hold no more than this of the image in memory, and have the domain wait for the disk
    /// beyond it; if not given, half of the memory that is available
    #[arg(long, value_name = "SIZE", value_parser = size, requires = "checkpoint")]
    pub copy_limit: Option<u64>,
    /// Leave the domain paused
    #[arg(short, long)]
    pub pause: bool,
    /// A disk of the guest's, by any name, and its image; may be repeated. FILE is a checkpoint then,
    /// made while the domain is paused: pages that are the same on the image are not stored. A domain that
    /// is destroyed afterwards, or stays paused (`-p`), may have IMAGE as its disk: let nobody write to it
    /// before the restore. With `-c` nobody may: give the domain an overlay or a snapshot over it. Give
    /// IMAGE to `xen restore --disk`. Beside FILE there must be room for the whole image of the domain
    #[arg(long, value_name = "NAME=IMAGE")]
    pub disk: Vec<String>,
    /// The hash that is kept of pages on disks: xxh3, or sha256 where others than you can write to the
    /// images
    #[arg(long, value_name = "HASH", default_value = "xxh3", requires = "disk")]
    pub hash: DiskHash,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Write over an existing FILE
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct XenRestoreArgs {
    /// The image, as `xl save` or `sonicshot xen save` wrote it, or a checkpoint of one
    pub file: PathBuf,
    /// Leave the domain paused
    #[arg(short, long)]
    pub pause: bool,
    #[command(flatten)]
    pub disks: DiskArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Options of `xl restore`, before its file
    #[arg(last = true)]
    pub xl: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// The folder of another guest, with ram.raw.zst and kpageflags.bin.zst
    #[arg(long, value_name = "DIR")]
    pub dump: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum GenerateCommand {
    /// Write the completion script of a shell to standard output
    Completions(CompletionsArgs),
    /// The manual page, to standard output, or a page for each command
    Man(ManArgs),
}

#[derive(Debug, Args)]
pub(crate) struct CompletionsArgs {
    /// The shell
    #[arg(value_name = "SHELL")]
    pub shell: clap_complete::Shell,
}

#[derive(Debug, Args)]
pub(crate) struct ManArgs {
    /// The folder for a page of each command
    #[arg(short, long, value_name = "DIR")]
    pub output: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum QemuCommand {
    /// Save a running guest as a checkpoint: it is paused while the memory that it uses is copied.
    /// The checkpoint has its memory without free pages and the state of its devices, but not its
    /// disks
    #[command(after_help = EXIT_CODES)]
    Save(QemuSaveArgs),
    /// Start a QEMU that continues a saved guest, and wait until it ends
    #[command(after_help = EXIT_CODES)]
    Restore(QemuRestoreArgs),
}

/// The state of a guest after its save.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum AfterSaveKind {
    /// It runs on as soon as its memory is copied
    Resume,
    /// It stays paused
    Stop,
    /// Its QEMU ends, once the checkpoint is on the disk
    Quit,
}

#[derive(Debug, Args)]
pub(crate) struct QemuSaveArgs {
    /// The socket of QEMU's monitor (`-qmp unix:SOCKET,server=on,wait=off`), which nobody else uses
    /// meanwhile
    #[arg(long, value_name = "SOCKET")]
    pub qmp: PathBuf,
    /// Where to write the checkpoint
    #[arg(short, long, value_name = "X.sonic")]
    pub output: PathBuf,
    /// The guest's state afterwards; one that was found paused stays so
    #[arg(long, value_name = "WHAT", default_value = "resume")]
    pub then: AfterSaveKind,
    /// Longest pause of the guest in seconds: if that is not enough it runs on, and nothing is
    /// saved
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = seconds)]
    pub max_pause: std::time::Duration,
    /// Refuse a guest if the copy of its memory takes more than this; more than the machine, or the
    /// limit of a cgroup, has left is never taken. A guest that is found paused is not copied first
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub copy_limit: Option<u64>,
    /// QEMU's process, if another one has opened the monitor's socket (as libvirt does)
    #[arg(long, value_name = "N")]
    pub pid: Option<i32>,
    /// A System.map, vmlinux or BTF file of the guest's kernel, or what `symbols make` makes of
    /// them; may be repeated. Without it everything is found in the guest's own memory
    #[arg(long, value_name = "FILE|DIR")]
    pub symbols: Vec<PathBuf>,
    /// Compression of page data: zstd, zstd:LEVEL, lz4 or none
    #[arg(long, value_name = "HOW", default_value = "zstd")]
    pub compress: Compression,
    /// Number of threads; by default one for each core
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub threads: Option<NonZeroUsize>,
    /// A disk of the guest's by QEMU's name of it (`query-block`), and a file that becomes its overlay;
    /// may be repeated. In this order: the guest is stopped; QEMU writes to OVERLAY from then on
    /// (`blockdev-snapshot-sync`), so that the image below stays as it is; then the memory is copied.
    /// Pages that are the same on the image below are not stored: keep it, and give it to
    /// `qemu restore --disk NAME=IMAGE`, with a new overlay over it for the guest
    #[arg(long, value_name = "NAME=OVERLAY")]
    pub disk: Vec<String>,
    /// The hash that is kept of pages on disks: xxh3, or sha256 where others than you can write to the
    /// images
    #[arg(long, value_name = "HASH", default_value = "xxh3", requires = "disk")]
    pub hash: DiskHash,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Write over an existing X.sonic
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct QemuRestoreArgs {
    /// The checkpoint
    #[arg(value_name = "X.sonic")]
    pub file: PathBuf,
    /// Have all memory in place before the guest runs
    #[arg(long)]
    pub eager: bool,
    /// Make the guest's RAM a private mapping of this raw file, which is made of the checkpoint if
    /// it is not there. Several guests may have one; it must not change while one runs
    #[arg(long, value_name = "RAM", conflicts_with = "eager")]
    pub map: Option<PathBuf>,
    #[command(flatten)]
    pub disks: LazyDiskArgs,
    /// Print JSON, as soon as the guest is there
    #[arg(long)]
    pub json: bool,
    /// QEMU, and the command line that the guest was started with; the options by which it waits
    /// for the saved guest are added. With -S the guest stays paused
    #[arg(last = true, required = true, value_name = "QEMU")]
    pub qemu: Vec<std::ffi::OsString>,
}

/// A number of seconds, with or without a fraction; more than none.
fn seconds(text: &str) -> Result<std::time::Duration, String> {
    let number: Option<f64> = text.parse().ok();
    number
        .and_then(|number| std::time::Duration::try_from_secs_f64(number).ok())
        .filter(|time| !time.is_zero() && time.as_secs() <= 86_400)
        .ok_or_else(|| "not a number of seconds, such as 5 or 0.5".into())
}
