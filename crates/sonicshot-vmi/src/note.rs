//! Notes for a user on an analysis.

use crate::{ForeignProcessor, Inconsistency, Trace, VmiError};
use core::fmt;
use sonicshot::{GpaRange, PfnRange};
use std::path::PathBuf;

/// Something of the guest that a user should know: a feature that bears on free pages, pages that
/// are kept and why, what stands behind the choice of the kernel. Its text is for people.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Note {
    /// The per-CPU free lists cannot be read.
    PerCpuListsKept {
        /// The reason.
        why: String,
    },
    /// Struct pages that the kernel has not initialised yet (`DEFERRED_STRUCT_PAGE_INIT`).
    DeferredKept {
        /// Their frames.
        frames: PfnRange,
    },
    /// Sections that are not online, and not proved to be offline memory.
    SectionsKept {
        /// The number of frames in them.
        frames: u64,
        /// The reasons against them; the first few.
        reasons: Vec<String>,
    },
    /// Pages that say that they are offline, and that no driver is known to have.
    OfflinePagesKept {
        /// Their number.
        pages: u64,
        /// The reasons that they are not believed, of the first rings that they are in.
        reasons: Vec<String>,
        /// Of how many more rings that would have to be told.
        more: u64,
    },
    /// Blocks that say they are free and are on no list of any zone.
    UnlistedKept {
        /// Their number.
        blocks: u64,
    },
    /// Nothing tells the processors' registers, and the memory bears no trace of a later owner.
    NoTraceOfLaterOwner(TracesSought),
    /// The file tells of processors, and is not believed.
    ProcessorsNotBelieved {
        /// The reason.
        why: &'static str,
        /// The finding instead.
        instead: Box<Note>,
    },
    /// Symbol files were given, or folders of them, and nothing shows that they are of the kernel's
    /// build.
    SymbolFilesNotUsed {
        /// The files and folders.
        files: Vec<PathBuf>,
    },
    /// A folder of symbol files was given that has none of the kernel's build.
    SymbolFolderNotUsed {
        /// The folder.
        folder: PathBuf,
        /// The number of files in it that tell of which build they are.
        files: usize,
        /// The build ID of the kernel, if it tells that.
        build_id: Option<String>,
    },
    /// A file of a folder of symbols is of the kernel's build, and cannot be read: another was, if
    /// there is one.
    SymbolFileDamaged {
        /// The file.
        file: PathBuf,
        /// The fault.
        why: String,
    },
    /// The kernel was dead when its memory was written down.
    CrashDump,
    /// A processor runs on page tables of something else, and the guest was classified all the
    /// same.
    NotOwner {
        /// The release of the kernel that was found.
        kernel: String,
        /// The processor.
        processor: Box<ForeignProcessor>,
    },
    /// The memory bears traces of a later owner, and the guest was classified all the same.
    LaterOwner(Vec<Trace>),
    /// Nothing in the memory would show whether the machine was reset, and the guest was
    /// classified all the same.
    OwnerUntold {
        /// The release of the kernel that was found.
        kernel: String,
        /// The reason.
        why: String,
    },
    /// Free pages where an EFI firmware that starts again writes before it leaves a trace, and
    /// nothing tells the processors' registers.
    FirmwareMemoryKept {
        /// Their number.
        pages: u64,
        /// The ranges that it writes to.
        places: Vec<GpaRange>,
    },
    /// Sources of truth about free pages disagree; the blocks in question are kept.
    Disagreement(Box<Inconsistency>),
    /// The guest checks its free pages for a pattern (`page_poison`).
    PagePoison {
        /// The pattern's byte.
        byte: u8,
    },
    /// The guest trusts its free pages to be zero (`init_on_free`).
    InitOnFree,
    /// The guest does not map its free pages (`debug_pagealloc`).
    DebugPagealloc,
    /// The guest tags its memory (KASAN with hardware tags).
    HardwareTags,
}

/// The traces of a later owner that were looked for, where none was found.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct TracesSought {
    /// The tests that were made.
    pub made: Vec<&'static str>,
    /// The tests that could not be made, and why.
    pub not_made: Vec<(&'static str, String)>,
}

impl fmt::Display for TracesSought {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "no file tells the processors' registers: that the kernel found still owns the memory \
             is judged by its traces alone (none of a later owner; tested: {}",
            self.made.join(", ")
        )?;
        for (test, why) in &self.not_made {
            write!(f, "; not tested: {test}, {why}")?;
        }
        f.write_str(")")
    }
}

/// Says that symbol files are not used, and why.
fn not_used(files: &[PathBuf], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let names: Vec<String> = files.iter().map(|f| f.display().to_string()).collect();
    write!(
        f,
        "not used: {}: nothing in the guest's memory shows that they are of its kernel's build. A \
         vmlinux, or what `sonicshot symbols make` makes of it, tells its build itself",
        names.join(", ")
    )
}

/// Names what was looked for in a folder.
fn folder_not_used(
    folder: &dyn fmt::Display,
    files: usize,
    build_id: Option<&str>,
    f: &mut fmt::Formatter<'_>,
) -> fmt::Result {
    write!(f, "not used: {folder}: ")?;
    match build_id {
        Some(id) => write!(
            f,
            "of its {files} files that tell their build none is of the guest's, build ID {id}"
        ),
        None => write!(
            f,
            "the guest tells no build ID, and none of its {files} files that tell their build is \
             found to be of it"
        ),
    }
}

/// Says how many pages that are marked as offline are kept, and why; of `more` rings the reason is
/// not told.
fn offline_kept(
    (pages, more): (u64, u64),
    reasons: &[String],
    f: &mut fmt::Formatter<'_>,
) -> fmt::Result {
    write!(
        f,
        "{pages} pages that are marked as offline are kept unless they are zero, for no driver is \
         known to have them ({}",
        reasons.join("; ")
    )?;
    if more > 0 {
        write!(f, "; and {more} more")?;
    }
    f.write_str(")")
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PerCpuListsKept { why } => {
                write!(f, "pages on per-CPU free lists are kept: {why}")
            }
            Self::DeferredKept { frames } => write!(
                f,
                "frames {frames} have no initialised struct page yet and are kept"
            ),
            Self::SectionsKept { frames, reasons } => write!(
                f,
                "{frames} frames in sections that are not online are kept, for nothing proves that \
                 they are offline memory ({}): persistent and device memory is there, too",
                reasons.join("; ")
            ),
            Self::OfflinePagesKept {
                pages,
                reasons,
                more,
            } => offline_kept((*pages, *more), reasons, f),
            Self::UnlistedKept { blocks } => write!(
                f,
                "{blocks} blocks say that they are free and are on no list of any zone: they are \
                 kept, for they may be records of an earlier boot"
            ),
            Self::NoTraceOfLaterOwner(sought) => sought.fmt(f),
            Self::ProcessorsNotBelieved { why, instead } => write!(
                f,
                "what the file tells of the processors is not believed: {why}; {instead}"
            ),
            Self::SymbolFilesNotUsed { files } => not_used(files, f),
            Self::SymbolFolderNotUsed {
                folder,
                files,
                build_id,
            } => folder_not_used(&folder.display(), *files, build_id.as_deref(), f),
            Self::SymbolFileDamaged { file, why } => write!(
                f,
                "not used: {}: it is of the kernel's build, but damaged: {why}",
                file.display()
            ),
            Self::CrashDump => {
                f.write_str("a crash dump: this kernel was dead when its memory was written down")
            }
            Self::NotOwner { kernel, processor } => VmiError::NotOwner {
                kernel: kernel.clone(),
                processor: processor.clone(),
            }
            .fmt(f),
            Self::LaterOwner(traces) => VmiError::LaterOwner(traces.clone()).fmt(f),
            Self::OwnerUntold { kernel, why } => VmiError::OwnerUntold {
                kernel: kernel.clone(),
                why: why.clone(),
            }
            .fmt(f),
            Self::FirmwareMemoryKept { pages, places } => {
                let places: Vec<String> = places.iter().map(ToString::to_string).collect();
                write!(
                    f,
                    "{pages} free pages are kept: a firmware that starts again writes there before \
                     it leaves a trace ({}). A format with the processors' registers, or --cr3, \
                     lets them go",
                    places.join(", ")
                )
            }
            Self::Disagreement(inconsistency) => inconsistency.fmt(f),
            Self::PagePoison { byte } => write!(
                f,
                "the guest checks free pages for its poison pattern {byte:#x} (page_poison): they \
                 are kept where the format can only restore zeroes"
            ),
            Self::InitOnFree => f.write_str("init_on_free: the guest trusts free pages to be zero"),
            Self::DebugPagealloc => f.write_str(
                "debug_pagealloc: free pages are not mapped in the guest; their content is not \
                 looked at",
            ),
            Self::HardwareTags => {
                f.write_str("KASAN with hardware tags: memory tags are in no dump")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Note, TracesSought};
    use sonicshot::{Gpa, GpaRange, Pfn, PfnRange};

    /// Programs read these lines in JSON: they stay as they are.
    fn check(table: &[(Note, &str)]) {
        for (note, text) in table {
            assert_eq!(note.to_string(), *text);
        }
    }

    #[test]
    fn texts_of_pages_are_what_they_were() {
        let frames = PfnRange::new(Pfn::new(0x10), Pfn::new(0x20));
        check(&[
            (
                Note::PerCpuListsKept { why: "w".into() },
                "pages on per-CPU free lists are kept: w",
            ),
            (
                Note::DeferredKept { frames },
                &format!("frames {frames} have no initialised struct page yet and are kept"),
            ),
            (
                Note::SectionsKept {
                    frames: 7,
                    reasons: vec!["a".into(), "b".into()],
                },
                "7 frames in sections that are not online are kept, for nothing proves that they \
                 are offline memory (a; b): persistent and device memory is there, too",
            ),
            (
                Note::OfflinePagesKept {
                    pages: 4,
                    reasons: vec!["a".into(), "b".into()],
                    more: 0,
                },
                "4 pages that are marked as offline are kept unless they are zero, for no driver is \
                 known to have them (a; b)",
            ),
            (
                Note::OfflinePagesKept {
                    pages: 9,
                    reasons: vec!["a".into()],
                    more: 8,
                },
                "9 pages that are marked as offline are kept unless they are zero, for no driver is \
                 known to have them (a; and 8 more)",
            ),
            (
                Note::FirmwareMemoryKept {
                    pages: 9,
                    places: vec![GpaRange::new(Gpa::ZERO, Gpa::new(0x10_0000))],
                },
                "9 free pages are kept: a firmware that starts again writes there before it leaves \
                 a trace (0x0..0x100000). A format with the processors' registers, or --cr3, lets \
                 them go",
            ),
            (
                Note::PagePoison { byte: 0xaa },
                "the guest checks free pages for its poison pattern 0xaa (page_poison): they are \
                 kept where the format can only restore zeroes",
            ),
            (
                Note::InitOnFree,
                "init_on_free: the guest trusts free pages to be zero",
            ),
            (
                Note::DebugPagealloc,
                "debug_pagealloc: free pages are not mapped in the guest; their content is not \
                 looked at",
            ),
        ]);
    }

    #[test]
    fn texts_of_the_owner_are_what_they_were() {
        let sought = || TracesSought {
            made: vec!["kexec", "panic"],
            not_made: vec![("tasks", "no source knows init_task".into())],
        };
        let by_traces = "no file tells the processors' registers: that the kernel found still owns \
                         the memory is judged by its traces alone (none of a later owner; tested: \
                         kexec, panic; not tested: tasks, no source knows init_task)";
        check(&[
            (Note::NoTraceOfLaterOwner(sought()), by_traces),
            (
                Note::ProcessorsNotBelieved {
                    why: "torn",
                    instead: Box::new(Note::NoTraceOfLaterOwner(sought())),
                },
                &format!(
                    "what the file tells of the processors is not believed: torn; {by_traces}"
                ),
            ),
            (
                Note::CrashDump,
                "a crash dump: this kernel was dead when its memory was written down",
            ),
            (
                Note::OwnerUntold {
                    kernel: "6.1".into(),
                    why: "w".into(),
                },
                "it cannot be told whether kernel 6.1 still owns the memory: w",
            ),
        ]);
    }
}
