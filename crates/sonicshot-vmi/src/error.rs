//! The errors when a guest's kernel is read.

use crate::symbols::SymbolError;
use crate::{ForeignProcessor, Inconsistency, KernelVa, Knowledge, Trace, VirtualReadError};
use sonicshot::{Gpa, MemoryError, Stopped};

/// The reason that a guest's kernel could not be understood.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmiError {
    /// Nothing of a Linux kernel was found in the guest's memory.
    #[error("no Linux kernel found in guest memory: {tried}")]
    NoKernel {
        /// The things that were looked for.
        tried: String,
    },
    /// There are records of free pages, but no page tables that lead to them: of a kernel whose
    /// page tables are elsewhere, or are not where the memory is taken to lie.
    #[error(
        "{records} records of free pages look like a Linux kernel's, but none of {tables} candidate \
         page tables maps them ({tried})"
    )]
    NoTables {
        /// The number of records.
        records: u64,
        /// The number of page tables that were tried.
        tables: u64,
        /// The other things that were looked for.
        tried: String,
    },
    /// There is the banner of a Linux kernel in memory, and nothing else of one that can be read.
    #[error(
        "there is a kernel's banner in memory, `{banner}`, but no kernel that can be read: {tried}"
    )]
    BannerAlone {
        /// The banner.
        banner: String,
        /// The things that were looked for.
        tried: String,
    },
    /// A source of symbols is damaged or cannot be read.
    #[error("the kernel's symbols cannot be read")]
    Symbols(#[from] SymbolError),
    /// A symbol file belongs to another kernel build than the one that runs in the guest.
    #[error("{origin} is of another kernel: it is of {file}, the guest runs {guest}")]
    WrongKernel {
        /// The symbol file.
        origin: String,
        /// The kernel that the file is of.
        file: String,
        /// The kernel in the guest.
        guest: String,
    },
    /// No source knows a symbol or type that is needed.
    #[error("no source of symbols knows {what} (asked: {sources})")]
    Missing {
        /// The symbol, member or enumerator.
        what: String,
        /// The sources that were asked.
        sources: String,
    },
    /// Two sources of the same kernel disagree.
    #[error("{first} and {second} disagree on {what}: {first_value:#x} and {second_value:#x}")]
    Disagree {
        /// The symbol or member.
        what: String,
        /// One source.
        first: String,
        /// Its text.
        first_value: u64,
        /// The other source.
        second: String,
        /// The value that that says.
        second_value: u64,
    },
    /// A kernel object could not be read.
    #[error("reading {what}")]
    Read {
        /// The object.
        what: &'static str,
        /// The reason.
        #[source]
        source: VirtualReadError,
    },
    /// Guest memory could not be read.
    #[error("reading guest memory")]
    Memory(#[from] MemoryError),
    /// A kernel object holds what the kernel would never put there.
    #[error("{what} at {at} holds {value:#x}")]
    Corrupt {
        /// The object.
        what: &'static str,
        /// Its address.
        at: KernelVa,
        /// The value found.
        value: u64,
    },
    /// The guest is of a kind that cannot be read from outside, or not yet.
    #[error("{what}")]
    Unsupported {
        /// The property of the guest.
        what: String,
    },
    /// A Linux kernel was found, of a machine of a kind that cannot be read from outside, or not
    /// yet.
    #[error("{what}")]
    OtherMachine {
        /// The guest's kind.
        what: &'static str,
    },
    /// The rest of a kernel that is gone, or one that is not whole.
    #[error("the kernel that was found is stale: {what}")]
    Stale {
        /// The evidence.
        what: String,
    },
    /// More than one kernel stands, and nothing tells which of them owns the memory.
    #[error("two kernels may own the memory: {first}, and {second}")]
    Undecided {
        /// One of them.
        first: String,
        /// The other.
        second: String,
    },
    /// A processor runs on page tables of something other than the kernel that was found: a
    /// later kernel, a boot loader or firmware owns the memory, or some of it.
    #[error("kernel {kernel} does not own the guest's memory: {processor}")]
    NotOwner {
        /// The release of the kernel that was found.
        kernel: String,
        /// The processor.
        processor: Box<ForeignProcessor>,
    },
    /// The memory bears traces of a later owner: a BIOS, a loader or a kernel that ran after the
    /// kernel found.
    #[error(
        "the kernel found does not own this memory any more: {}",
        .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
    )]
    LaterOwner(Vec<Trace>),
    /// A page that the kernel runs on counts as free: what was taken for the allocator's records is
    /// something else, or of another kernel.
    #[error("{what} at {at} counts as free: the records of free pages are not this kernel's")]
    Covered {
        /// The page's use.
        what: &'static str,
        /// Its address.
        at: Gpa,
    },
    /// Nothing in the memory would show whether the machine was reset since.
    #[error("it cannot be told whether kernel {kernel} still owns the memory: {why}")]
    OwnerUntold {
        /// The release of the kernel that was found.
        kernel: String,
        /// The reason.
        why: String,
    },
    /// A search of the guest's records was ended: there was more to look at than there was time.
    #[error("{what}: gave up after {seconds} s, with {done} of {all} looked at")]
    OutOfTime {
        /// The thing that was looked at.
        what: &'static str,
        /// So many of them were.
        done: u64,
        /// So many there are.
        all: u64,
        /// The longest time that it may take.
        seconds: u64,
    },
    /// The guest has more of something than any that is whole.
    #[error("found {found} {what}, more than the limit of {most}")]
    TooMany {
        /// The things of which there are too many.
        what: &'static str,
        /// So many were found, before the search was ended.
        found: u64,
        /// So many may be.
        most: u64,
    },
    /// The work was [ended](crate::AnalysisOptions::stop) before it was done.
    #[error("the guest was not looked at to the end: {0}")]
    Stopped(Stopped),
    /// The lists of free pages cannot be followed: what they lead to is none of their blocks.
    #[error(
        "{}the free lists contradict the other records of the guest",
        if *without_types { "types are missing, and " } else { "" }
    )]
    BrokenLists {
        /// Whether no types tell what the records look like, so that what was taken for them may be
        /// something else.
        without_types: bool,
        /// The error in the records.
        #[source]
        source: Box<Self>,
    },
    /// The sources of truth about free pages disagree by more than a stopped processor explains.
    #[error("{0}")]
    Inconsistent(Box<Inconsistency>),
}

impl VmiError {
    /// The same of an error of walking the free lists, by what is known of the kernel.
    pub(crate) fn of_lists(self, knowledge: Knowledge) -> Self {
        match self {
            Self::Corrupt { .. } | Self::Read { .. } => Self::BrokenLists {
                without_types: knowledge != Knowledge::Types,
                source: Box::new(self),
            },
            other => other,
        }
    }

    /// Counts `more` of `what`, which is no more than 64 bits hold.
    pub(crate) fn count(what: &'static str, count: &mut u64, more: u64) -> Result<(), Self> {
        *count = count.checked_add(more).ok_or(Self::TooMany {
            what,
            found: *count,
            most: u64::MAX,
        })?;
        Ok(())
    }

    pub(crate) fn read(what: &'static str) -> impl FnOnce(VirtualReadError) -> Self {
        move |source| Self::Read { what, source }
    }
}
