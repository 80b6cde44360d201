//! The guest's disks: what of its memory is on them when it is saved, and where it is to be had when
//! it is restored.

use crate::checkpoint_file::CheckpointFile;
use crate::disk_options::{RestoreDisks, pinned};
use crate::error::OfflineError;
use crate::save::CheckpointOptions;
use sonicshot::checkpoint::{
    DiskFinder, DiskGuesses, DiskInfo, DiskOffset, DiskSource, SaveOptions,
};
use sonicshot::{
    GuestMemory, PageClass, PageMap, PageSize, Pfn, PrunePlan, Tally, WorkOptions, spread, to_u64,
};
use sonicshot_dump::{DiskImage, Dump};
use sonicshot_vmi::FilePlaces;
use std::collections::HashMap;

/// Guesses that are looked at before they are relied on.
const SAMPLE: usize = 2048;

/// The search for a guest's pages on its disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct DiskSearch {
    /// Pages of the page cache that are kept.
    pub page_cache: u64,
    /// Pages of which the guest's own records say where on a disk they are.
    pub told: u64,
    /// Of these, so many were looked at before.
    pub looked_at: u64,
    /// Of those, so many were there.
    pub right: u64,
    /// The length in bytes of the disks that were looked through from end to end; `None` if the guest's
    /// records were enough.
    pub streamed: Option<u64>,
}

impl DiskSearch {
    /// The number of pages of the page cache that the guest's records explain.
    #[must_use]
    pub fn explained(&self) -> u64 {
        let share = u128::from(self.told)
            .checked_mul(self.right.into())
            .and_then(|found| found.checked_div(self.looked_at.into()));
        share
            .and_then(|share| u64::try_from(share).ok())
            .unwrap_or_default()
    }

    /// Whether they leave more than a tenth of them unexplained, or nothing tells what is page cache.
    fn is_too_little(&self) -> bool {
        let unexplained = self.page_cache.checked_sub(self.explained());
        self.page_cache == 0 || unexplained.is_some_and(|pages| pages > self.page_cache / 10)
    }
}

/// The pages that are looked for.
pub(crate) struct Searched<'a> {
    pub dump: &'a Dump,
    pub map: &'a PageMap,
    pub plan: &'a PrunePlan,
    pub places: Option<&'a FilePlaces>,
}

/// The disks of a guest that is saved.
pub(crate) struct SaveDisks<'a> {
    pub infos: Vec<DiskInfo>,
    pub sources: Vec<&'a dyn DiskSource>,
    pub guesses: DiskGuesses,
    pub search: Option<DiskSearch>,
}

impl<'a> SaveDisks<'a> {
    /// Looks for what is kept on the disks that the options name: first where the guest's own records
    /// say that it is, then, if that explains too little, through all of them.
    pub(crate) fn find(
        what: &Searched<'_>,
        options: &'a CheckpointOptions,
    ) -> Result<Self, OfflineError> {
        let mut found = Self {
            infos: Vec::new(),
            sources: Vec::new(),
            guesses: DiskGuesses::default(),
            search: None,
        };
        let mut images = Vec::new();
        for (name, disk) in options.disks() {
            if !options.disks_are_open {
                pinned(disk)?;
            }
            found.infos.push(disk.info(name, options.disk_hash)?);
            found.sources.push(disk);
            images.push(disk);
        }
        if found.infos.is_empty() {
            return Ok(found);
        }
        let page_size = what.map.page_size();
        let told = told(what, &images, &found.infos)?;
        let (looked_at, right) = sample(what.dump, page_size, &told, &images);
        let mut search = DiskSearch {
            page_cache: kept_page_cache(what),
            told: to_u64(told.len()),
            looked_at,
            right,
            streamed: None,
        };
        found.guesses = if options.scan_disks || search.is_too_little() {
            let bytes = found.infos.iter().map(|disk| disk.bytes);
            search.streamed = Some(bytes.sum::<Tally>().get());
            found.stream(what, told, &options.writing)?
        } else {
            DiskGuesses::of_frames(told, page_size)
        };
        found.search = Some(search);
        Ok(found)
    }

    /// Looks through all of the disks. What is found so counts, and of the rest what the guest told:
    /// that finds nothing which does not begin as blocks do.
    fn stream(
        &self,
        what: &Searched<'_>,
        told: Vec<Place>,
        options: &SaveOptions,
    ) -> Result<DiskGuesses, OfflineError> {
        let failed = OfflineError::disks();
        let likely = DiskFinder::LIKELY;
        let mut work = WorkOptions::new();
        work.threads = options.threads;
        work.progress.clone_from(&options.progress);
        let finder = DiskFinder::new(what.dump, what.map, what.plan, likely, &work);
        let finder = finder.map_err(&failed)?;
        let guesses = finder.stream(&self.infos, &self.sources, &work);
        let guesses = guesses.map_err(&failed)?;
        if told.is_empty() {
            return Ok(guesses);
        }
        let page_size = what.map.page_size();
        let mut frames: Vec<Place> = guesses.each_frame(page_size).collect();
        frames.extend(told);
        Ok(DiskGuesses::of_frames(frames, page_size))
    }
}

/// A frame, the number of a disk, and where it may be there.
type Place = (Pfn, u32, DiskOffset);

/// The places of pages on the disks, as the guest's records say.
fn told(
    what: &Searched<'_>,
    images: &[&DiskImage],
    infos: &[DiskInfo],
) -> Result<Vec<Place>, OfflineError> {
    let mut begins = HashMap::new();
    let Some(told) = what.places.filter(|told| !told.places.is_empty()) else {
        return Ok(Vec::new());
    };
    for ((image, info), number) in images.iter().zip(infos).zip(0_u32..) {
        for (name, start) in image.ext4_file_systems()? {
            // Of copies of one file system the first counts.
            begins.entry(name).or_insert((number, start, info.bytes));
        }
    }
    let page = what.map.page_size().bytes();
    let places = told.places.iter().filter_map(|place| {
        let (number, start, len) = begins.get(&told.file_system(place)?.0)?;
        let at = start.checked_add(place.at)?;
        let fits = at.raw().is_multiple_of(512) && at.checked_add(page)?.raw() <= *len;
        fits.then_some((place.frame, *number, at))
    });
    let mut found = Vec::with_capacity(told.places.len());
    found.extend(places);
    Ok(found)
}

/// Of some of the guesses, how many were looked at, and how many are right. All are compared once more,
/// when they are referred to.
fn sample(dump: &Dump, page_size: PageSize, told: &[Place], images: &[&DiskImage]) -> (u64, u64) {
    let Ok(page) = usize::try_from(page_size.bytes()) else {
        return (0, 0);
    };
    let (mut memory, mut there) = (vec![0; page], vec![0; page]);
    let (mut looked_at, mut right) = (Tally::ZERO, Tally::ZERO);
    for (frame, disk, at) in spread(told, SAMPLE) {
        let image = usize::try_from(*disk)
            .ok()
            .and_then(|disk| images.get(disk));
        let (Some(image), Some(gpa)) = (image, frame.gpa(page_size)) else {
            continue;
        };
        looked_at.add(1);
        let read = dump.read(gpa, &mut memory).is_ok() && image.read_disk(&mut there, *at).is_ok();
        right.add(u64::from(read && memory == there));
    }
    (looked_at.get(), right.get())
}

/// The number of kept pages of the page cache.
fn kept_page_cache(what: &Searched<'_>) -> u64 {
    let counts = what.map.counts();
    let cache = [PageClass::PageCacheClean, PageClass::PageCacheDirty];
    let all = cache.map(|class| counts.get(class));
    all.into_iter().sum::<Tally>().get()
}

impl CheckpointFile {
    /// Takes the images of the disks that the checkpoint refers to. It is checked that they are those,
    /// and that they were not written to since; what is read of them later is checked when it is.
    ///
    /// # Errors
    /// [`OfflineError::Dump`] if an image cannot be opened, [`OfflineError::NotPinned`] if a process has
    /// it open for writing, [`OfflineError::Checkpoint`] if one is missing, or is not what it was.
    pub fn with_disks(self, disks: &RestoreDisks) -> Result<Self, OfflineError> {
        let (images, given) = disks.open_images()?;
        self.map_reader(images, |reader| reader.with_disks(given, disks.moved_on))
    }

    /// Checks that every page that is on a disk is still there. Returns how many there are.
    ///
    /// # Errors
    /// [`OfflineError::Checkpoint`] with the first that is not.
    pub fn verify_disks(&self, options: &WorkOptions) -> Result<u64, OfflineError> {
        let checked = self.reader().verify_disks(options);
        self.blamed(checked.map_err(OfflineError::checkpoint(self.path())))
    }
}

#[cfg(test)]
mod tests {
    use super::DiskSearch;

    #[test]
    fn disks_are_looked_through_where_records_explain_too_little() {
        for (page_cache, told, looked_at, right, explained, too_little) in [
            (1000, 900, 90, 90, 900, false),
            (1000, 899, 90, 90, 899, true),
            (1000, 1000, 100, 89, 890, true),
            (1000, 1000, 100, 90, 900, false),
            // No kernel was looked for, or its types are not known.
            (0, 0, 0, 0, 0, true),
            (1000, 0, 0, 0, 0, true),
            (u64::MAX, u64::MAX, 3, 3, u64::MAX, false),
        ] {
            let search = DiskSearch {
                page_cache,
                told,
                looked_at,
                right,
                streamed: None,
            };
            assert_eq!(search.explained(), explained);
            assert_eq!(search.is_too_little(), too_little, "{search:?}");
        }
    }
}
