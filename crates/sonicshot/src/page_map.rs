//! The class of every frame of a guest, and which frames hold only zeroes.

use crate::to_u64;
use crate::work::map_in_order;
use crate::{ClassCounts, ClassSet, PageClass, PageSize, PageState, Pfn, PfnRange, RamLayout};
use core::convert::Infallible;
use core::fmt;
use core::iter::Peekable;
use core::num::NonZeroUsize;
use core::sync::atomic::{AtomicU64, Ordering};
use std::collections::{BTreeMap, btree_map};

/// Frames that are held together, and that an edit is given at a time, at most: 32 MiB of 4 KiB
/// pages. Few enough to share out a small guest among the threads. A power of two.
const CHUNK: u64 = 1 << 13;

/// The most that a run costs, in bytes, with its share of the tree: three times what it costs mostly.
/// It decides when a chunk's frames are bytes, and is what the map's bound is counted by.
const RUN_COST: u64 = 128;

/// The class of every frame of a guest's RAM, and whether it was found to hold only zeroes.
///
/// It costs what its runs cost, some 50 bytes each, counted as 128. Where the runs that begin in a
/// chunk (8,192 frames, aligned, as far as they are in one region) would by that count take more
/// than a byte a frame, its frames are bytes instead, behind one entry as large as a run's. A chunk
/// in which no more than one run begins is never bytes, however few its frames are. So all of it
/// takes at most a byte a frame, 128 bytes for each chunk of each region, and 16 for each region,
/// beside the tree's first node of some 300: a region of one frame costs as much as a run. A guest
/// of 12 TiB that is one run is a few hundred bytes.
///
/// ```
/// use sonicshot::{Gpa, GpaRange, PageClass, PageMap, PageSize, Pfn, PfnRange, RamLayout};
/// let layout = RamLayout::new(vec![GpaRange::new(Gpa::ZERO, Gpa::new(8 * 4096))])?;
/// let mut map = PageMap::new(&layout, PageSize::SIZE_4K);
/// map.set(PfnRange::new(Pfn::new(2), Pfn::new(6)), PageClass::FreeBuddy);
/// let runs: Vec<_> = map.runs().map(|(r, c)| (r.start().raw(), r.len(), c)).collect();
/// assert_eq!(runs, [
///     (0, 2, PageClass::Unknown),
///     (2, 4, PageClass::FreeBuddy),
///     (6, 2, PageClass::Unknown),
/// ]);
/// # Ok::<(), sonicshot::LayoutError>(())
/// ```
#[derive(Clone)]
pub struct PageMap {
    page_size: PageSize,
    /// The frames that there are: sorted and disjoint.
    regions: Vec<PfnRange>,
    /// By its first frame, what each frame of the regions is. A segment reaches to the next one or
    /// to the end of its region, and one begins where a region does.
    segments: BTreeMap<Pfn, Segment>,
}

#[derive(Clone)]
enum Segment {
    /// All frames up to the next segment. Neighbours in a region have different classes, except
    /// where dense ones are between them.
    Uniform(PageState),
    /// As many frames: a chunk, as far as it is in the region.
    Dense(Box<[PageState]>),
}

/// The distance of `pfn` behind `start`, as an index.
fn index(start: Pfn, pfn: Pfn) -> Option<usize> {
    usize::try_from(pfn.offset_from(start)?).ok()
}

/// The part of `region` that is in the same chunk as `pfn`, which is in the region.
fn chunk_of(region: PfnRange, pfn: Pfn) -> PfnRange {
    const IN_CHUNK: u64 = CHUNK - 1;
    let first = Pfn::new(pfn.raw() & !IN_CHUNK);
    // A chunk at the very end of all numbers ends with them.
    let end = first.checked_add(CHUNK).unwrap_or(region.end());
    PfnRange::new(first, end).intersection(&region)
}

/// Whether `len` frames cost less as bytes than as `runs` runs.
fn is_dense(len: u64, runs: usize) -> bool {
    runs > 1 && to_u64(runs) > len / RUN_COST
}

impl PageMap {
    /// A map of all whole frames of `layout`, every one [`PageClass::Unknown`].
    #[must_use]
    pub fn new(layout: &RamLayout, page_size: PageSize) -> Self {
        let regions: Vec<PfnRange> = layout.frames(page_size).collect();
        let unknown = |region: &PfnRange| {
            (
                region.start(),
                Segment::Uniform(PageState::new(PageClass::Unknown)),
            )
        };
        Self {
            page_size,
            segments: regions.iter().map(unknown).collect(),
            regions,
        }
    }

    /// The page size of the guest.
    #[must_use]
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// The frames that the map covers, lowest first: what is wholly RAM.
    #[must_use]
    pub fn ram(&self) -> &[PfnRange] {
        &self.regions
    }

    /// The same frames in pieces, to share out work on them: a piece is what is RAM of an aligned
    /// block of `2^order` frames.
    pub fn pieces(&self, order: u32) -> impl Iterator<Item = PfnRange> + Send + '_ {
        // Of a block that is not less than all frames there are one region's.
        let mask = !u64::MAX.unbounded_shl(order);
        let region = move |region: &PfnRange| {
            let region = *region;
            let mut at = region.start();
            core::iter::from_fn(move || {
                let last = Pfn::new(at.raw() | mask);
                let end = last.checked_add(1).unwrap_or(region.end());
                let piece = PfnRange::new(at, end.min(region.end()));
                at = piece.end();
                Some(piece).filter(|piece| !piece.is_empty())
            })
        };
        self.regions.iter().flat_map(region)
    }

    /// The number of frames that the map covers.
    #[must_use]
    pub fn total(&self) -> u64 {
        PfnRange::total_of(&self.regions)
    }

    /// The class of `pfn`, if it is RAM.
    #[must_use]
    pub fn class(&self, pfn: Pfn) -> Option<PageClass> {
        self.state(pfn).map(PageState::class)
    }

    /// The class of `pfn` and whether it was found to hold only zeroes, if it is RAM.
    #[must_use]
    pub fn state(&self, pfn: Pfn) -> Option<PageState> {
        self.region_of(pfn)?;
        match self.segments.range(..=pfn).next_back()? {
            (_, Segment::Uniform(state)) => Some(*state),
            (start, Segment::Dense(states)) => states.get(index(*start, pfn)?).copied(),
        }
    }

    /// Says of every RAM frame in `range` that it is `page`: a class, or a class and its content.
    /// Frames that are not RAM are passed over.
    pub fn set(&mut self, range: PfnRange, page: impl Into<PageState>) {
        let page = page.into();
        for (region, part) in self.parts(range) {
            self.set_part(region, part, page);
        }
    }

    /// Gives the frames from `first` the classes in `classes`, one after the other; frames that are
    /// not RAM are passed over.
    pub fn set_each(&mut self, first: Pfn, classes: &[PageClass]) {
        let mut states = Vec::new();
        // Frames beyond all numbers are not RAM.
        let all = PfnRange::with_len(first, to_u64(classes.len()))
            .unwrap_or(PfnRange::new(first, Pfn::new(u64::MAX)));
        for (region, part) in self.parts(all) {
            let mut at = part.start();
            while part.contains(at) {
                let piece = PfnRange::new(at, chunk_of(region, at).end()).intersection(&part);
                let bounds = index(first, piece.start()).zip(index(first, piece.end()));
                if let Some(classes) = bounds.and_then(|(from, to)| classes.get(from..to)) {
                    states.clear();
                    states.extend(classes.iter().copied().map(PageState::new));
                    self.put(region, piece, &states);
                }
                at = piece.end();
            }
        }
    }

    /// Lets `edit` change the classes of each RAM range of `range`, in pieces of 8,192 frames at
    /// most, lowest first; it is given the piece's first frame.
    pub fn with_slices(&mut self, range: PfnRange, mut edit: impl FnMut(Pfn, &mut [PageState])) {
        let mut scratch = Vec::new();
        for (region, part) in self.parts(range) {
            let mut at = part.start();
            while part.contains(at) {
                let piece = PfnRange::new(at, chunk_of(region, at).end()).intersection(&part);
                if let Some(classes) = self.dense(piece) {
                    edit(at, classes);
                } else {
                    self.expand(piece, &mut scratch);
                    edit(at, &mut scratch);
                    self.put(region, piece, &scratch);
                }
                at = piece.end();
            }
        }
    }

    /// Lets `edit` change the classes of all RAM on `threads` threads, in the pieces of
    /// [`with_slices`](Self::with_slices), in no order. Pieces without a page of a class in `of`
    /// are passed over.
    ///
    /// # Errors
    /// The error of the lowest piece that has one. Some of the classes may be changed then.
    pub fn edit<E: Send>(
        &mut self,
        threads: NonZeroUsize,
        of: ClassSet,
        edit: impl Fn(Pfn, &mut [PageState]) -> Result<(), E> + Sync,
    ) -> Result<(), E> {
        self.edit_told(threads, of, |_| {}, edit)
    }

    /// The same; `done` is told, on the caller's thread, of how many frames are done with each
    /// piece, those that were passed over too.
    ///
    /// # Errors
    /// As [`edit`](Self::edit).
    pub fn edit_told<E: Send>(
        &mut self,
        threads: NonZeroUsize,
        of: ClassSet,
        mut done: impl FnMut(u64),
        edit: impl Fn(Pfn, &mut [PageState]) -> Result<(), E> + Sync,
    ) -> Result<(), E> {
        let taken = Taken {
            regions: self.regions.clone().into_iter(),
            region: PfnRange::new(Pfn::new(0), Pfn::new(0)),
            at: Pfn::new(0),
            segments: core::mem::take(&mut self.segments).into_iter().peekable(),
            last: PageState::new(PageClass::Unknown),
            of,
        };
        // Only what comes behind an error is left out: so the lowest one is always found.
        let lowest = AtomicU64::new(u64::MAX);
        let each = |(): &mut (), mut piece: Piece| {
            let start = piece.frames.start().raw();
            let mut result = Ok(());
            if piece.is_wanted && start <= lowest.load(Ordering::Relaxed) {
                result = piece.edit(&edit);
                if result.is_err() {
                    lowest.fetch_min(start, Ordering::Relaxed);
                }
            }
            (piece, result)
        };
        let mut all = Ok(());
        let Ok(()) = map_in_order(
            threads,
            taken,
            || (),
            each,
            |(piece, result)| {
                done(piece.frames.len());
                self.append(piece);
                if all.is_ok() {
                    all = result;
                }
                Ok::<_, Infallible>(())
            },
        );
        all
    }

    /// Runs of frames of the same class, lowest first, covering every RAM frame once.
    pub fn runs(&self) -> impl Iterator<Item = (PfnRange, PageClass)> + Send + '_ {
        let class = |state: PageState| PageState::new(state.class());
        self.regions
            .iter()
            .flat_map(move |region| Runs::new(self, *region, class))
            .map(|(frames, state)| (frames, state.class()))
    }

    /// The same of the RAM frames in `range`.
    pub fn runs_in(&self, range: PfnRange) -> impl Iterator<Item = (PfnRange, PageClass)> + '_ {
        let class = |state: PageState| PageState::new(state.class());
        self.parts_in(range)
            .flat_map(move |part| Runs::new(self, part, class))
            .map(|(frames, state)| (frames, state.class()))
    }

    /// Runs of frames of the same class and content, lowest first, covering every RAM frame once.
    pub fn states(&self) -> impl Iterator<Item = (PfnRange, PageState)> + Send + '_ {
        self.regions
            .iter()
            .flat_map(|region| Runs::new(self, *region, |state| state))
    }

    /// The same of the RAM frames in `range`.
    pub(crate) fn states_in(
        &self,
        range: PfnRange,
    ) -> impl Iterator<Item = (PfnRange, PageState)> + '_ {
        self.parts_in(range)
            .flat_map(|part| Runs::new(self, part, |state| state))
    }

    /// The number of frames of each class.
    #[must_use]
    pub fn counts(&self) -> ClassCounts {
        let mut counts = ClassCounts::default();
        for (range, state) in self.states() {
            counts.add(state, range.len());
        }
        counts
    }

    /// The parts of `range` that are RAM.
    fn parts_in(&self, range: PfnRange) -> impl Iterator<Item = PfnRange> + '_ {
        self.overlaps(range).map(|(_, part)| part)
    }

    /// The same, each with the region that it is in.
    fn overlaps(&self, range: PfnRange) -> impl Iterator<Item = (PfnRange, PfnRange)> + '_ {
        let first = self
            .regions
            .partition_point(|region| region.end() <= range.start());
        self.regions
            .iter()
            .skip(first)
            .map(move |region| (*region, region.intersection(&range)))
            .take_while(|(_, part)| !part.is_empty())
    }

    /// The region that `pfn` is in.
    fn region_of(&self, pfn: Pfn) -> Option<PfnRange> {
        let above = self.regions.partition_point(|region| region.start() <= pfn);
        let region = self.regions.get(above.checked_sub(1)?)?;
        region.contains(pfn).then_some(*region)
    }

    /// The parts of `range` that are RAM, each with the region that it is in.
    fn parts(&self, range: PfnRange) -> Vec<(PfnRange, PfnRange)> {
        self.overlaps(range).collect()
    }

    /// The classes of `piece`, if they are bytes.
    fn dense(&mut self, piece: PfnRange) -> Option<&mut [PageState]> {
        let (start, segment) = self.segments.range_mut(..=piece.start()).next_back()?;
        let Segment::Dense(classes) = segment else {
            return None;
        };
        classes.get_mut(index(*start, piece.start())?..index(*start, piece.end())?)
    }

    /// Gives a part of `region` one class.
    fn set_part(&mut self, region: PfnRange, part: PfnRange, class: PageState) {
        let mut part = part;
        // Chunks of bytes at both ends stay what they are.
        let fill = |map: &mut Self, inside: Pfn| {
            let chunk = chunk_of(region, inside).intersection(&part);
            let whole = chunk == chunk_of(region, inside);
            if !part.is_empty()
                && !whole
                && let Some(classes) = map.dense(chunk)
            {
                classes.fill(class);
                return Some(chunk);
            }
            None
        };
        let Some(high) = part.end().raw().checked_sub(1).map(Pfn::new) else {
            return;
        };
        let low = part.start();
        let first = fill(self, low);
        let last = if chunk_of(region, low) == chunk_of(region, high) {
            None
        } else {
            fill(self, high)
        };
        let start = first.map_or(part.start(), |chunk| chunk.end());
        part = PfnRange::new(start, last.map_or(part.end(), |chunk| chunk.start()));
        if part.is_empty() {
            return;
        }
        self.replace(region, part, vec![(part.start(), Segment::Uniform(class))]);
        self.limit_cost(region, part.start());
        if let Some(last) = part.end().raw().checked_sub(1) {
            self.limit_cost(region, Pfn::new(last));
        }
    }

    /// Puts `segments` in the place of all that is in `part`, which begins and ends at no frame
    /// inside of a dense segment.
    fn replace(&mut self, region: PfnRange, part: PfnRange, segments: Vec<(Pfn, Segment)>) {
        self.cut(region, part.start());
        self.cut(region, part.end());
        // `extract_if` of a range is newer than the Rust that this is held to.
        while let Some((&at, _)) = self.segments.range(part.start()..part.end()).next() {
            self.segments.remove(&at);
        }
        self.segments.extend(segments);
        // Neighbours that are now alike. Inside of the part they differ.
        self.join(region, part.start());
        self.join(region, part.end());
    }

    /// Lets a segment begin at `at`, unless it is inside of a dense one.
    fn cut(&mut self, region: PfnRange, at: Pfn) {
        if region.contains(at)
            && let Some((start, Segment::Uniform(class))) = self.segments.range(..=at).next_back()
            && *start != at
        {
            self.segments.insert(at, Segment::Uniform(*class));
        }
    }

    /// Lets no segment begin at `at` if the one before it has the same class.
    fn join(&mut self, region: PfnRange, at: Pfn) {
        if at <= region.start() || !region.contains(at) {
            return;
        }
        let before = self.segments.range(..at).next_back();
        if let (Some((_, Segment::Uniform(before))), Some(Segment::Uniform(class))) =
            (before, self.segments.get(&at))
            && before == class
        {
            self.segments.remove(&at);
        }
    }

    /// Makes bytes of the chunk that holds `inside`, if its runs cost more.
    fn limit_cost(&mut self, region: PfnRange, inside: Pfn) {
        let chunk = chunk_of(region, inside);
        // The run that the chunk begins with counts wherever it begins: an edit of the chunk
        // before this one may cut it here.
        let first = usize::from(!self.segments.contains_key(&chunk.start()));
        let begun = self.segments.range(chunk.start()..chunk.end()).count();
        if begun
            .checked_add(first)
            .is_some_and(|runs| is_dense(chunk.len(), runs))
        {
            self.make_dense(region, chunk);
        }
    }

    fn make_dense(&mut self, region: PfnRange, chunk: PfnRange) {
        if self.dense(chunk).is_none() {
            let mut classes = Vec::new();
            self.expand(chunk, &mut classes);
            let dense = Segment::Dense(classes.into_boxed_slice());
            self.replace(region, chunk, vec![(chunk.start(), dense)]);
        }
    }

    /// Writes down the class of each frame of `piece`, which is in one chunk.
    fn expand(&self, piece: PfnRange, classes: &mut Vec<PageState>) {
        classes.clear();
        for (run, class) in self.states_in(piece) {
            classes.extend(run.iter().map(|_| class));
        }
    }

    /// Gives the frames of `piece`, which is in one chunk of `region`, these classes.
    fn put(&mut self, region: PfnRange, piece: PfnRange, classes: &[PageState]) {
        let chunk = chunk_of(region, piece.start());
        if piece == chunk {
            self.replace(region, piece, segments(piece.start(), classes));
            return;
        }
        if is_dense(chunk.len(), runs(classes)) {
            self.make_dense(region, chunk);
        }
        if let Some(there) = self.dense(piece) {
            there.copy_from_slice(classes);
        } else {
            self.replace(region, piece, uniform(piece.start(), classes).collect());
            self.limit_cost(region, piece.start());
        }
    }

    /// Adds what a piece holds behind all that there is.
    fn append(&mut self, piece: Piece) {
        for (start, segment) in piece.segments {
            if let (Some((_, Segment::Uniform(last))), Segment::Uniform(class)) =
                (self.segments.last_key_value(), &segment)
                && last == class
                && !piece.begins_region
            {
                continue;
            }
            self.segments.insert(start, segment);
        }
    }
}

/// Segments of one class each, for frames from `start` with these classes.
fn uniform(start: Pfn, classes: &[PageState]) -> impl Iterator<Item = (Pfn, Segment)> + '_ {
    let mut at = start.raw();
    classes.chunk_by(|a, b| a == b).map_while(move |run| {
        let start = Pfn::new(at);
        at = at.checked_add(to_u64(run.len()))?;
        Some((start, Segment::Uniform(*run.first()?)))
    })
}

/// The same at the least cost; `classes` are of a whole chunk.
fn segments(start: Pfn, classes: &[PageState]) -> Vec<(Pfn, Segment)> {
    if is_dense(to_u64(classes.len()), runs(classes)) {
        return vec![(start, Segment::Dense(classes.into()))];
    }
    uniform(start, classes).collect()
}

fn runs(classes: &[PageState]) -> usize {
    classes.chunk_by(|a, b| a == b).count()
}

/// Runs of what `key` makes the same, in a part of a region.
struct Runs<'a> {
    segments: Peekable<btree_map::Range<'a, Pfn, Segment>>,
    /// The frames that are not yet visited.
    range: PfnRange,
    /// The rest of the last segment, if that is bytes.
    dense: &'a [PageState],
    /// The lines found so far, though it may go on.
    found: Option<(PfnRange, PageState)>,
    key: fn(PageState) -> PageState,
}

impl<'a> Runs<'a> {
    fn new(map: &'a PageMap, range: PfnRange, key: fn(PageState) -> PageState) -> Self {
        // The segment that the range begins in: it is in the same region.
        let first = map.segments.range(..=range.start()).next_back();
        let first = first.map_or(range.start(), |(first, _)| *first);
        Self {
            segments: map.segments.range(first..).peekable(),
            range,
            dense: &[],
            found: None,
            key,
        }
    }

    /// The next run in one segment.
    fn part(&mut self) -> Option<(PfnRange, PageState)> {
        if self.range.is_empty() {
            return None;
        }
        let at = self.range.start();
        let (end, class) = loop {
            if let Some(class) = self.dense.first() {
                let len = self.dense.iter().take_while(|next| *next == class).count();
                (_, self.dense) = self.dense.split_at_checked(len)?;
                break (at.checked_add(to_u64(len))?, *class);
            }
            match self.segments.next()? {
                (_, Segment::Uniform(class)) => {
                    let next = self.segments.peek().map(|(next, _)| **next);
                    break (next.unwrap_or(self.range.end()), *class);
                }
                (start, Segment::Dense(classes)) => {
                    self.dense = classes.get(index(*start, at)?..)?;
                }
            }
        };
        let end = end.min(self.range.end());
        self.range = PfnRange::new(end, self.range.end());
        Some((PfnRange::new(at, end), (self.key)(class)))
    }
}

impl Iterator for Runs<'_> {
    type Item = (PfnRange, PageState);

    fn next(&mut self) -> Option<Self::Item> {
        let (first, class) = match self.found.take() {
            Some(found) => found,
            None => self.part()?,
        };
        let mut end = first.end();
        while let Some((run, other)) = self.part() {
            if other != class {
                self.found = Some((run, other));
                break;
            }
            end = run.end();
        }
        Some((PfnRange::new(first.start(), end), class))
    }
}

/// A chunk that is taken out of a map to be edited, or more that is not.
struct Piece {
    frames: PfnRange,
    segments: Vec<(Pfn, Segment)>,
    is_wanted: bool,
    begins_region: bool,
}

impl Piece {
    fn edit<E>(&mut self, edit: &impl Fn(Pfn, &mut [PageState]) -> Result<(), E>) -> Result<(), E> {
        let start = self.frames.start();
        let classes = if let [(_, Segment::Dense(classes))] = self.segments.as_mut_slice() {
            edit(start, classes)?;
            if is_dense(to_u64(classes.len()), runs(classes)) {
                return Ok(());
            }
            core::mem::take(classes)
        } else {
            let mut classes = Vec::new();
            let ends = self.segments.iter().skip(1).map(|(start, _)| *start);
            for ((_, segment), end) in self.segments.iter().zip(ends.chain([self.frames.end()])) {
                if let (Segment::Uniform(class), Some(len)) = (segment, index(start, end)) {
                    classes.resize(len, *class);
                }
            }
            edit(start, &mut classes)?;
            classes.into_boxed_slice()
        };
        self.segments = segments(start, &classes);
        Ok(())
    }
}

/// All of a map, piece by piece.
struct Taken {
    regions: std::vec::IntoIter<PfnRange>,
    region: PfnRange,
    at: Pfn,
    segments: Peekable<btree_map::IntoIter<Pfn, Segment>>,
    /// The class of what goes on at `at`, if no segment begins there.
    last: PageState,
    of: ClassSet,
}

impl Iterator for Taken {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        let begins_region = self.at >= self.region.end();
        if begins_region {
            self.region = self.regions.next()?;
            self.at = self.region.start();
        }
        let start = self.at;
        let mut end = chunk_of(self.region, start).end();
        let mut segments = Vec::new();
        if self.segments.peek().is_none_or(|(next, _)| *next > start) {
            segments.push((start, Segment::Uniform(self.last)));
        }
        while let Some((at, segment)) = self.segments.next_if(|(next, _)| *next < end) {
            if let Segment::Uniform(class) = segment {
                self.last = class;
            }
            segments.push((at, segment));
        }
        let is_wanted = segments.iter().any(|(_, segment)| match segment {
            Segment::Uniform(class) => self.of.contains(class.class()),
            Segment::Dense(classes) => classes.iter().any(|class| self.of.contains(class.class())),
        });
        if !is_wanted && matches!(segments.as_slice(), [(_, Segment::Uniform(_))]) {
            // All chunks that it fills.
            let next = self.segments.peek().map(|(next, _)| *next);
            let next = next.filter(|next| self.region.contains(*next));
            let whole = next.map_or(self.region.end(), |next| {
                chunk_of(self.region, next).start()
            });
            end = end.max(whole);
        }
        self.at = end;
        Some(Piece {
            frames: PfnRange::new(start, end),
            segments,
            is_wanted,
            begins_region,
        })
    }
}

impl PartialEq for PageMap {
    fn eq(&self, other: &Self) -> bool {
        self.page_size == other.page_size
            && self.regions == other.regions
            && self.states().eq(other.states())
    }
}

impl Eq for PageMap {}

impl fmt::Debug for PageMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageMap")
            .field("page_size", &self.page_size)
            .field("counts", &self.counts())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::{CHUNK, PageMap, Segment, chunk_of};
    use crate::{
        ClassSet, Gpa, GpaRange, PageClass, PageSize, PageState, Pfn, PfnRange, RamLayout,
    };
    use core::num::NonZeroUsize;
    use proptest::prelude::*;

    const PAGE: u64 = 4096;

    /// A map, and a class a frame.
    struct Both {
        map: PageMap,
        model: Vec<Option<PageState>>,
    }

    impl Both {
        /// RAM in these ranges of frames.
        fn new(ranges: &[(u64, u64)]) -> Self {
            let gpa = |frame: u64| Gpa::new(frame * PAGE);
            let regions = ranges.iter().map(|(a, b)| GpaRange::new(gpa(*a), gpa(*b)));
            let layout = RamLayout::new(regions.collect()).unwrap();
            let mut model = vec![None; usize::try_from(ranges.last().unwrap().1 + 100).unwrap()];
            for (start, end) in ranges {
                model[usize::try_from(*start).unwrap()..usize::try_from(*end).unwrap()]
                    .fill(Some(PageClass::Unknown.into()));
            }
            Self {
                map: PageMap::new(&layout, PageSize::SIZE_4K),
                model,
            }
        }

        fn slot(&mut self, pfn: u64) -> Option<&mut PageState> {
            self.model.get_mut(usize::try_from(pfn).unwrap())?.as_mut()
        }

        fn edit(&mut self, kind: u8, start: u64, len: u64, class: PageClass) {
            let range = PfnRange::with_len(Pfn::new(start), len).unwrap();
            // Short runs, to make bytes of it.
            let striped = |pfn: u64| {
                if pfn.is_multiple_of(3) {
                    class
                } else {
                    PageClass::Slab
                }
            };
            let edited = |pfn: u64, state: &mut PageState| {
                if pfn % 5 < 2 {
                    *state = if pfn.is_multiple_of(5) {
                        PageState::new(striped(pfn))
                    } else {
                        state.with_class(striped(pfn)).with_zero()
                    };
                }
            };
            match kind {
                0 => {
                    self.map.set(range, class);
                    for pfn in start..start + len {
                        if let Some(slot) = self.slot(pfn) {
                            *slot = class.into();
                        }
                    }
                }
                1 => {
                    let classes: Vec<_> = (start..start + len).map(striped).collect();
                    self.map.set_each(Pfn::new(start), &classes);
                    for pfn in start..start + len {
                        if let Some(slot) = self.slot(pfn) {
                            *slot = striped(pfn).into();
                        }
                    }
                }
                2 => {
                    self.map.with_slices(range, |first, classes| {
                        assert!(classes.len() as u64 <= CHUNK && !classes.is_empty());
                        for (pfn, class) in (first.raw()..).zip(classes) {
                            edited(pfn, class);
                        }
                    });
                    for pfn in start..start + len {
                        if let Some(slot) = self.slot(pfn) {
                            edited(pfn, slot);
                        }
                    }
                }
                // On several threads, all of it: what has this class is found to be zero.
                _ => {
                    let of = ClassSet::EMPTY.with(class);
                    let threads = NonZeroUsize::new(usize::try_from(len % 4 + 1).unwrap()).unwrap();
                    let change = |seen: &mut PageState| {
                        if seen.class() == class {
                            *seen = seen.with_zero();
                        }
                    };
                    self.map
                        .edit(threads, of, |_, classes| {
                            classes.iter_mut().for_each(change);
                            Ok::<_, ()>(())
                        })
                        .unwrap();
                    self.model.iter_mut().flatten().for_each(change);
                }
            }
        }

        fn check(&self) {
            let mut seen = vec![None; self.model.len()];
            let mut last = None;
            for (run, class) in self.map.states() {
                assert!(!run.is_empty());
                assert_ne!(
                    last,
                    Some((run.start(), class)),
                    "neighbours that are alike are one run"
                );
                last = Some((run.end(), class));
                for pfn in run.iter() {
                    let slot = &mut seen[usize::try_from(pfn.raw()).unwrap()];
                    assert_eq!(*slot, None);
                    *slot = Some(class);
                }
            }
            assert!(seen == self.model, "runs are not the model's");
            let frames = self.model.iter().flatten().count() as u64;
            assert_eq!(
                (self.map.total(), self.map.counts().total()),
                (frames, frames)
            );
            let bounds = [0, 1, 2, 3, 20_000, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK];
            for pfn in bounds
                .into_iter()
                .chain((0..self.model.len() as u64).step_by(997))
            {
                let expected = self
                    .model
                    .get(usize::try_from(pfn).unwrap())
                    .copied()
                    .flatten();
                assert_eq!(self.map.state(Pfn::new(pfn)), expected);
                let class = expected.map(PageState::class);
                assert_eq!(self.map.class(Pfn::new(pfn)), class);
            }
            // By class alone neighbours are one run though one of them is zero.
            let mut by_class: Vec<(PfnRange, PageClass)> = Vec::new();
            for (run, state) in self.map.states() {
                match by_class.last_mut() {
                    Some((last, class)) if last.end() == run.start() && *class == state.class() => {
                        *last = PfnRange::new(last.start(), run.end());
                    }
                    _ => by_class.push((run, state.class())),
                }
            }
            assert_eq!(self.map.runs().collect::<Vec<_>>(), by_class);
            let counts = self.map.counts();
            for class in PageClass::ALL {
                let zero = |state: &&PageState| state.class() == *class && state.is_zero();
                let zero = self.model.iter().flatten().filter(zero).count() as u64;
                assert_eq!(counts.zero(*class), zero);
            }
            self.check_cost();
        }

        /// All of it costs at most a byte a frame, and an entry for each chunk of each region; and
        /// no chunk more than that.
        fn check_cost(&self) {
            let each = self.map.segments.values().map(|segment| match segment {
                Segment::Uniform(_) => super::RUN_COST,
                Segment::Dense(classes) => super::RUN_COST + classes.len() as u64,
            });
            let chunks = |region: &PfnRange| {
                (region.end().raw() - 1) / CHUNK - region.start().raw() / CHUNK + 1
            };
            let chunks: u64 = self.map.regions.iter().map(chunks).sum();
            assert!(each.sum::<u64>() <= self.map.total() + chunks * super::RUN_COST);
            assert!(self.map.segments.len() >= self.map.regions.len());
            let mut starts = self.map.segments.keys().copied().peekable();
            while let Some(start) = starts.next() {
                let region = self.map.region_of(start).unwrap();
                let chunk = chunk_of(region, start);
                if let Some(Segment::Dense(classes)) = self.map.segments.get(&start) {
                    assert_eq!((start, classes.len() as u64), (chunk.start(), chunk.len()));
                    continue;
                }
                let mut runs = 1;
                while starts.next_if(|next| *next < chunk.end()).is_some() {
                    runs += 1;
                }
                assert!(runs * super::RUN_COST <= chunk.len().max(super::RUN_COST));
            }
        }
    }

    /// Ranges with edges at chunks and beside them, and long and short.
    fn ranges() -> impl Strategy<Value = (u64, u64)> {
        let near = prop_oneof![Just(0_u64), Just(CHUNK), Just(2 * CHUNK), 0..3 * CHUNK];
        let start = (near, 0_u64..3).prop_map(|(near, more)| near.saturating_sub(1) + more);
        let len = prop_oneof![0_u64..4, 1..400_u64, Just(CHUNK), 1..2 * CHUNK];
        (start, len)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

        #[test]
        fn agrees_with_one_class_a_frame(
            edits in proptest::collection::vec((0_u8..4, ranges(), 0_usize..17), 0..12),
            second in 0_usize..3,
        ) {
            let second = [(CHUNK + 40, 3 * CHUNK + 7), (CHUNK, 2 * CHUNK), (20_000, 20_001)][second];
            let mut both = Both::new(&[(1, 16), (32, 48), (100, CHUNK - 1), second]);
            for (kind, (start, len), class) in edits {
                both.edit(kind, start, len, PageClass::ALL[class]);
            }
            both.check();
        }

        #[test]
        fn parts_are_the_same_as_the_whole((start, len) in ranges(), (from, count) in ranges()) {
            let mut both = Both::new(&[(5, CHUNK + 9), (CHUNK + 40, 3 * CHUNK)]);
            both.edit(2, start, len, PageClass::Reserved);
            let range = PfnRange::with_len(Pfn::new(from), count).unwrap();
            let clipped: Vec<_> = both.map.runs()
                .map(|(run, class)| (run.intersection(&range), class))
                .filter(|(run, _)| !run.is_empty())
                .collect();
            prop_assert_eq!(both.map.runs_in(range).collect::<Vec<_>>(), clipped);
            let frames: Vec<_> = both.map.runs().flat_map(|(run, _)| run.iter()).collect();
            for order in [3, 12, 15, 63, 64, 99] {
                let mut all = Vec::new();
                for piece in both.map.pieces(order) {
                    let block = |pfn: u64| pfn.checked_shr(order).unwrap_or(0);
                    prop_assert_eq!(block(piece.start().raw()), block(piece.end().raw() - 1));
                    all.extend(piece.iter());
                }
                prop_assert_eq!(&all, &frames);
            }
        }
    }

    #[test]
    fn many_short_runs_become_bytes_and_one_becomes_a_run_again() {
        let mut both = Both::new(&[(0, 2 * CHUNK)]);
        for pfn in (0..CHUNK).step_by(2) {
            both.edit(0, pfn, 1, PageClass::FreeBuddy);
        }
        both.check();
        let dense = |both: &Both| {
            let bytes = |segment: &&Segment| matches!(segment, Segment::Dense(_));
            both.map.segments.values().filter(bytes).count()
        };
        assert_eq!(dense(&both), 1);
        both.edit(0, 0, CHUNK + 5, PageClass::FreeBuddy);
        both.check();
        assert_eq!((dense(&both), both.map.segments.len()), (0, 2));
        both.edit(1, 0, CHUNK, PageClass::FreeBuddy);
        assert_eq!(dense(&both), 1);
        for class in [PageClass::FreeBuddy, PageClass::Slab] {
            both.edit(3, 0, 3, class);
        }
        both.check();
        assert_eq!(dense(&both), 1);
        let of = ClassSet::EMPTY
            .with(PageClass::FreeBuddy)
            .with(PageClass::Slab);
        let slab = |page: &mut PageState| {
            if of.contains(page.class()) {
                *page = PageClass::Slab.into();
            }
        };
        let edit = |_: Pfn, pages: &mut [PageState]| {
            pages.iter_mut().for_each(slab);
            Ok::<_, ()>(())
        };
        both.map.edit(NonZeroUsize::MIN, of, edit).unwrap();
        assert_eq!((dense(&both), both.map.runs().count()), (0, 2));
    }

    #[test]
    fn maps_are_equal_by_what_they_say() {
        let [mut one, mut two] = [0, 1].map(|_| Both::new(&[(0, CHUNK)]).map);
        let all = PfnRange::new(Pfn::new(0), Pfn::new(CHUNK));
        let stripes: Vec<_> = (0..CHUNK)
            .map(|pfn| {
                if pfn.is_multiple_of(2) {
                    PageClass::Slab
                } else {
                    PageClass::Reserved
                }
            })
            .collect();
        one.set_each(Pfn::new(0), &stripes);
        assert_ne!(one, two);
        one.with_slices(PfnRange::new(Pfn::new(1), Pfn::new(CHUNK)), |_, part| {
            part.fill(PageClass::Reserved.into());
        });
        two.set(all, PageClass::Reserved);
        assert_ne!(one, two);
        one.with_slices(PfnRange::new(Pfn::new(0), Pfn::new(1)), |_, part| {
            part.fill(PageClass::Reserved.into());
        });
        assert_eq!((one.runs().count(), two.runs().count()), (1, 1));
        assert_eq!(one, two);
    }

    #[test]
    fn the_lowest_error_is_the_one_and_nothing_is_lost() {
        for threads in [1, 2, 5] {
            let mut both = Both::new(&[(0, 9 * CHUNK)]);
            both.edit(1, CHUNK, CHUNK, PageClass::Reserved);
            let threads = NonZeroUsize::new(threads).unwrap();
            let of = PageClass::ALL.iter().copied().collect();
            let result = both.map.edit(threads, of, |first, classes| {
                let chunk = first.raw() / CHUNK;
                if chunk == 3 {
                    std::thread::sleep(std::time::Duration::from_millis(5));
                }
                classes.reverse();
                classes.reverse();
                if chunk >= 3 { Err(chunk) } else { Ok(()) }
            });
            assert_eq!(result, Err(3));
            both.check();
        }
    }
}
