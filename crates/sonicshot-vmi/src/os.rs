//! A guest's operating system, whichever it is.

use crate::{
    Analysis, AnalysisOptions, FilePlaces, GuestFacts, GuestOptions, KernelVa, LinuxGuest,
    PageFacts, PlaceEvidence, VmiError, ZoneFree,
};
use core::fmt;
use sonicshot::{GpaRange, GuestMemory, PageMap, Pfn};

/// A guest's operating system, found in its memory.
///
/// Whoever takes a guest's pages apart asks no more than this, so a kernel that is not Linux is one
/// more implementation, which [`open_guest`] tries.
pub trait GuestOs: fmt::Debug {
    /// Facts that identify the guest.
    fn facts(&self) -> GuestFacts;

    /// Gives every RAM frame its class. Of `options` what is known of the guest beforehand is not
    /// asked again: it was opened with that, and it must not have run since: who owns the memory was
    /// asked then.
    ///
    /// # Errors
    /// [`VmiError::NotOwner`] if a processor runs on page tables of something else,
    /// [`VmiError::LaterOwner`] if the memory bears traces of a later owner,
    /// [`VmiError::Inconsistent`] if the sources of truth disagree, [`VmiError::Missing`] if a
    /// symbol or member that decides about a page is known to no source, [`VmiError::Stopped`] if the
    /// work was [ended](AnalysisOptions::stop), and what reading gives.
    fn analyze(&self, options: &AnalysisOptions) -> Result<Analysis, VmiError>;

    /// The guest-physical ranges of the kernel's records of its pages: the memory that an analysis reads.
    ///
    /// # Errors
    /// [`VmiError`] if they cannot be found.
    fn page_records(&self) -> Result<Vec<GpaRange>, VmiError>;

    /// The usable RAM that the guest booted with, by the map that its firmware or VMM gave to it;
    /// `None` if nothing tells.
    ///
    /// # Errors
    /// [`VmiError`] if the map cannot be read or is not one.
    fn boot_ram(&self) -> Result<Option<Vec<GpaRange>>, VmiError>;

    /// RAM by the kernel's own records now, memory that was plugged in included, each range as
    /// it was added; but not what belongs to a device. `None` if nothing tells.
    ///
    /// # Errors
    /// [`VmiError`] if the records cannot be read or are none.
    fn system_ram(&self) -> Result<Option<Vec<GpaRange>>, VmiError>;

    /// All that the kernel has ever taken for memory, of whatever device, in whole sections.
    ///
    /// # Errors
    /// [`VmiError`] if the kernel's records cannot be read.
    fn known_memory(&self) -> Result<Vec<GpaRange>, VmiError>;

    /// The address at which the kernel maps all of memory, from guest-physical 0 on; `None` if
    /// nothing tells.
    ///
    /// # Errors
    /// [`VmiError`] if it cannot be read.
    fn direct_map(&self) -> Result<Option<KernelVa>, VmiError>;

    /// The places on their file systems that the pages of files in `pages` may have: guesses, for a
    /// caller that compares them with a disk. A page of which nothing tells has none.
    ///
    /// # Errors
    /// [`VmiError`] if the kernel's records of its pages cannot be read.
    fn file_places(&self, pages: &PageMap) -> Result<FilePlaces, VmiError>;

    /// The evidence in the content of each of `ranges` of memory of whether it lies there: for a
    /// layout that somebody has given. The ranges must be disjoint.
    ///
    /// # Errors
    /// [`VmiError`] if the kernel's page tables have memory elsewhere, or reading fails.
    fn evidence_of_places(&self, ranges: &[GpaRange]) -> Result<Vec<PlaceEvidence>, VmiError>;

    /// The kernel's records of one frame, and which of them say that it is free.
    ///
    /// # Errors
    /// [`VmiError`] if the records cannot be read.
    fn page_facts(&self, pfn: Pfn) -> Result<PageFacts, VmiError>;

    /// The lists of free blocks of every zone, with the first `most` blocks of each, and the
    /// counters beside them.
    ///
    /// # Errors
    /// [`VmiError`] if a list is none, or what leads to the lists is not known.
    fn free_lists(&self, most: usize) -> Result<Vec<ZoneFree>, VmiError>;
}

/// Finds the operating system that owns `memory`.
///
/// # Errors
/// What [`LinuxGuest::open`] gives: there is no other yet.
pub fn open_guest<'m>(
    memory: &'m dyn GuestMemory,
    options: &GuestOptions,
) -> Result<Box<dyn GuestOs + 'm>, VmiError> {
    Ok(Box::new(LinuxGuest::open(memory, options)?))
}
