//! A checkpoint, of which many read: what was decompressed is kept for the next.

use super::{Check, Content, Look, PageSource, Piece, Run, checked, length};
use crate::error::ServeError;
use crate::metrics::Metrics;
use core::num::{NonZeroU64, NonZeroUsize};
use core::sync::atomic::{AtomicU64, Ordering};
use quick_cache::sync::{Cache, DefaultLifecycle};
use quick_cache::{DefaultHashBuilder, OptionsBuilder, Weighter};
use sonicshot::checkpoint::{
    CheckpointError, CheckpointReader, Chunk, ChunkDecoder, PageContent, RangeSource,
};
use sonicshot::{Gpa, GpaRange, PageClass, PfnRange, RamLayout, Tally, to_u64, to_usize};
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Cost of a cached chunk beside its bytes: key, place, counters.
const ENTRY: u64 = 128;

#[derive(Clone)]
struct ByLength;

impl Weighter<u64, Arc<[u8]>> for ByLength {
    fn weight(&self, _: &u64, chunk: &Arc<[u8]>) -> u64 {
        Tally::new(to_u64(chunk.len())).and(ENTRY).get()
    }
}

/// A checkpoint's pages, with a bounded cache of decompressed chunks that all readers share.
///
/// A chunk that is stored as it is, is checked once, when it is first read, and kept as the others.
/// When it is kept no more, nothing is read of it but what is asked for: the kernel has it too.
pub struct CheckpointSource<S> {
    reader: CheckpointReader<S>,
    cache: Cache<u64, Arc<[u8]>, ByLength>,
    /// Contexts of the codec that no thread uses at the moment, at most one for each core.
    decoders: Mutex<Vec<ChunkDecoder>>,
    cores: usize,
    /// A bit for each chunk that is stored as it is: its checksum was found right.
    checked: Vec<AtomicU64>,
    check: Option<Check<S>>,
    by_need: OnceLock<Arc<[GpaRange]>>,
    metrics: Arc<Metrics>,
    /// Pages on disks may be read.
    disks_hold: bool,
}

impl<S: RangeSource> CheckpointSource<S> {
    /// Serves `reader`'s pages, with at most `cache` bytes of decompressed chunks in memory.
    #[must_use]
    pub fn new(reader: CheckpointReader<S>, cache: u64, metrics: Arc<Metrics>) -> Self {
        let chunk = NonZeroU64::new(reader.chunk_size().into()).unwrap_or(NonZeroU64::MIN);
        let items = to_usize(cache / chunk).clamp(1, 1 << 20);
        // A shard admits nothing that is larger than itself.
        let shards = (items / 8).clamp(1, 16);
        let options = OptionsBuilder::new()
            .estimated_items_capacity(items)
            .weight_capacity(cache)
            .shards(shards)
            .build();
        let cache = match options {
            Ok(options) => Cache::with_options(
                options,
                ByLength,
                DefaultHashBuilder::default(),
                DefaultLifecycle::default(),
            ),
            Err(_) => Cache::with_weighter(1, cache, ByLength),
        };
        let mut checked = Vec::new();
        let words = reader.chunk_count().div_ceil(64);
        checked.resize_with(to_usize(words), AtomicU64::default);
        Self {
            disks_hold: reader.disks_are_immutable(),
            reader,
            cache,
            decoders: Mutex::new(Vec::new()),
            cores: std::thread::available_parallelism().map_or(1, NonZeroUsize::get),
            checked,
            check: None,
            by_need: OnceLock::new(),
            metrics,
        }
    }

    /// Has `check` asked behind each read: if it fails, what was read is not served.
    #[must_use]
    pub fn checked_by(
        mut self,
        check: impl Fn(&S) -> Result<(), ServeError> + Send + Sync + 'static,
    ) -> Self {
        self.check = Some(Box::new(check));
        self
    }

    /// All of it is read before a guest runs: pages on disks are read although nobody declared the
    /// disks immutable.
    #[must_use]
    pub fn all_before_it_runs(mut self) -> Self {
        self.disks_hold = true;
        self
    }

    /// Fills `buffer` with `range`, which is in one run of pages on a disk.
    fn read_disk(&self, range: GpaRange, buffer: &mut Vec<u8>) -> Result<(), ServeError> {
        let at = range.start();
        let missing = || ServeError::NotInSnapshot { at };
        let page_size = self.reader.info().page_size;
        let page = PfnRange::with_len(at.pfn(page_size), 1).ok_or_else(missing)?;
        let page = self.reader.runs_in(page).next().map(|run| run.content);
        let Some(PageContent::Disk { record, page }) = page else {
            return Err(missing());
        };
        if !self.disks_hold {
            return Err(ServeError::DiskMayChange { at });
        }
        self.reader.read_disk_run(record, buffer)?;
        let inside = at.raw() & page_size.offset_mask();
        let start = page.checked_mul(page_size.bytes());
        let start = start.and_then(|start| start.checked_add(inside));
        let start = start.and_then(|start| usize::try_from(start).ok());
        let end = start.and_then(|start| start.checked_add(length(range).ok()?));
        let end = end.filter(|end| *end <= buffer.len()).ok_or_else(missing)?;
        buffer.truncate(end);
        buffer.drain(..start.ok_or_else(missing)?);
        Ok(())
    }

    /// The content that was read, if the file has not changed.
    fn unchanged<T>(&self, read: Result<T, CheckpointError>) -> Result<T, ServeError> {
        checked(self.reader.source(), self.check.as_ref(), read)
    }

    /// The checkpoint.
    #[must_use]
    pub fn reader(&self) -> &CheckpointReader<S> {
        &self.reader
    }

    /// The content at `at`: the chunk that has the stored page, and the guest's memory that is in it
    /// beside that page; or a run of which none is stored.
    fn find(&self, at: Gpa) -> Result<Found, ServeError> {
        let page = self.reader.info().page_size;
        let missing = || ServeError::NotInSnapshot { at };
        let run = self.reader.run_of(at.pfn(page)).ok_or_else(missing)?;
        let slot = match (run.content, run.content.word()) {
            (PageContent::Data { slot }, _) => slot,
            (_, Some(word)) => {
                return filled(run.frames.gpa_range(page), word).ok_or_else(missing);
            }
            // What is no word, and not stored, is on a disk.
            (_, None) => {
                let range = run.frames.gpa_range(page).ok_or_else(missing)?;
                let content = Content::Bytes;
                return Ok(Found::OnDisk(Run { range, content }));
            }
        };
        let wanted = at.pfn(page).offset_from(run.frames.start());
        let wanted = wanted.and_then(|skipped| slot.checked_add(skipped));
        let chunk = self.reader.chunk_of(wanted.ok_or_else(missing)?)?;
        let stored = || {
            let first = chunk.first_slot.max(slot);
            let end = slot.checked_add(run.frames.len())?;
            let end = end.min(chunk.first_slot.checked_add(chunk.pages)?);
            let frame = |wanted: u64| {
                let frame = run.frames.start().checked_add(wanted.checked_sub(slot)?)?;
                frame.gpa(page)
            };
            let inside = first.checked_sub(chunk.first_slot)?;
            Some(Stored {
                chunk,
                range: GpaRange::new(frame(first)?, frame(end)?),
                inside: inside.checked_mul(page.bytes())?,
            })
        };
        stored().map(Found::Bytes).ok_or_else(missing)
    }

    /// The bytes of `range`, which is in what is stored.
    fn read_of<'b>(
        &self,
        stored: &Stored,
        range: GpaRange,
        buffer: &'b mut Vec<u8>,
    ) -> Result<Piece<'b>, ServeError> {
        let at = range.start();
        let missing = || ServeError::NotInSnapshot { at };
        let len = length(range)?;
        let inside = at.offset_from(stored.range.start());
        let inside = inside.and_then(|skipped| stored.inside.checked_add(skipped));
        let inside = inside.filter(|_| range.end() <= stored.range.end());
        let inside = inside.ok_or_else(missing)?;
        let number = stored.chunk.number;
        let block = if stored.chunk.plain {
            self.check(number)?;
            let kept = self.cache.get(&number);
            self.metrics.cache(kept.is_some());
            let Some(kept) = kept else {
                buffer.resize(len, 0);
                let read = self.reader.read_plain(number, inside, buffer);
                self.unchanged(read)?;
                return Ok(Piece::Own(buffer));
            };
            kept
        } else {
            self.block(number)?
        };
        let start = usize::try_from(inside).map_err(|_| missing())?;
        let end = start.checked_add(len).filter(|end| *end <= block.len());
        Ok(Piece::Shared {
            part: start..end.ok_or_else(missing)?,
            block,
        })
    }

    /// A chunk that is not stored as it is, decompressed.
    fn block(&self, number: u64) -> Result<Arc<[u8]>, ServeError> {
        let mut hit = true;
        let block = self.cache.get_or_insert_with(&number, || {
            hit = false;
            self.with_decoder(|decoder| {
                let chunk = self.unchanged(self.reader.read_chunk(decoder, number))?;
                Ok::<_, ServeError>(Arc::from(chunk))
            })
        })?;
        self.metrics.cache(hit);
        Ok(block)
    }

    fn with_decoder<T>(&self, with: impl FnOnce(&mut ChunkDecoder) -> T) -> T {
        let lock = || self.decoders.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = lock().pop();
        let mut decoder = kept.unwrap_or_else(|| self.reader.decoder());
        let result = with(&mut decoder);
        let mut kept = lock();
        if kept.len() < self.cores {
            kept.push(decoder);
        }
        result
    }

    /// Checks a chunk that is stored as it is, if nobody has: all of it is read for that, and kept
    /// with the others for who asks next.
    fn check(&self, number: u64) -> Result<(), ServeError> {
        let word = usize::try_from(number >> 6).ok();
        let word = word.and_then(|word| self.checked.get(word));
        let bit = 1 << (number & 63);
        if word.is_some_and(|word| word.load(Ordering::Acquire) & bit != 0) {
            return Ok(());
        }
        let chunk = self.with_decoder(|decoder| {
            let chunk = self.unchanged(self.reader.read_chunk(decoder, number))?;
            Ok::<Arc<[u8]>, ServeError>(Arc::from(chunk))
        })?;
        self.cache.insert(number, chunk);
        if let Some(word) = word {
            word.fetch_or(bit, Ordering::AcqRel);
        }
        Ok(())
    }
}

/// Guest memory that is in one chunk.
struct Stored {
    chunk: Chunk,
    range: GpaRange,
    /// Its start in the chunk's data, in bytes.
    inside: u64,
}

impl Stored {
    const fn run(&self) -> Run {
        Run {
            range: self.range,
            content: Content::Bytes,
        }
    }
}

enum Found {
    Bytes(Stored),
    OnDisk(Run),
    Word(Run),
}

fn filled(range: Option<GpaRange>, word: u64) -> Option<Found> {
    let content = Content::Fill(word);
    range.map(|range| Found::Word(Run { range, content }))
}

impl<S: RangeSource> PageSource for CheckpointSource<S> {
    fn is_for_analysis(&self) -> bool {
        self.reader.info().for_analysis
    }

    fn identity(&self) -> Option<String> {
        Some(format!("checkpoint {:032x}", self.reader.digest()))
    }

    fn layout(&self) -> &RamLayout {
        &self.reader.info().layout
    }

    fn run_at(&self, at: Gpa) -> Result<Run, ServeError> {
        Ok(match self.find(at)? {
            Found::Word(run) | Found::OnDisk(run) => run,
            Found::Bytes(stored) => stored.run(),
        })
    }

    fn read<'b>(&self, range: GpaRange, buffer: &'b mut Vec<u8>) -> Result<Piece<'b>, ServeError> {
        match self.find(range.start())? {
            Found::Bytes(stored) => self.read_of(&stored, range, buffer),
            Found::OnDisk(_) => {
                self.read_disk(range, buffer)?;
                Ok(Piece::Own(buffer))
            }
            Found::Word(_) => Err(ServeError::NotInSnapshot { at: range.start() }),
        }
    }

    fn look<'b>(&self, page: GpaRange, buffer: &'b mut Vec<u8>) -> Result<Look<'b>, ServeError> {
        match self.find(page.start())? {
            Found::Bytes(stored) if page.intersection(&stored.range) == page => {
                self.read_of(&stored, page, buffer).map(Look::Page)
            }
            Found::Bytes(stored) => Ok(Look::Run(stored.run())),
            Found::OnDisk(run) if page.intersection(&run.range) == page => {
                self.read_disk(page, buffer)?;
                Ok(Look::Page(Piece::Own(buffer)))
            }
            Found::OnDisk(run) | Found::Word(run) => Ok(Look::Run(run)),
        }
    }

    fn block_at(&self, at: Gpa) -> Option<u64> {
        match self.find(at) {
            Ok(Found::Bytes(stored)) => Some(stored.chunk.number),
            _ => None,
        }
    }

    fn by_need(&self) -> Arc<[GpaRange]> {
        Arc::clone(self.by_need.get_or_init(|| self.order().into()))
    }
}

impl<S: RangeSource> CheckpointSource<S> {
    /// All that is not zero, by the classes of its pages.
    fn order(&self) -> Vec<GpaRange> {
        let mut out: Vec<(u8, GpaRange)> = Vec::new();
        for run in self.reader.runs() {
            let zero = matches!(
                run.content,
                PageContent::Absent
                    | PageContent::Zero
                    | PageContent::Fill { word: 0 }
                    | PageContent::Free { word: 0 }
            );
            if zero {
                continue;
            }
            let Some(range) = run.frames.gpa_range(self.reader.info().page_size) else {
                continue;
            };
            out.push((need(run.class), range));
        }
        out.sort_by_key(|(need, range)| (*need, range.start()));
        out.into_iter().map(|(_, range)| range).collect()
    }
}

/// The order of classes: pages that a guest which runs on touches sooner have a lower number.
const fn need(class: PageClass) -> u8 {
    match class {
        PageClass::Kernel => 0,
        PageClass::PageTable => 1,
        PageClass::Slab => 2,
        PageClass::Anonymous => 3,
        _ => 4,
    }
}

impl<S> fmt::Debug for CheckpointSource<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CheckpointSource")
            .field("reader", &self.reader)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sonicshot::checkpoint::{CheckpointInfo, CheckpointWriter, Compression, SaveOptions};
    use sonicshot::checkpoint::{
        DiskGuesses, DiskHash, DiskInfo, DiskOffset, DiskSource, GivenDisk, MovedOn, OnDisks,
    };
    use sonicshot::{DropClasses, Fill, GuestBytes, GuestMemory, MappedRegions, PageMap, PageSize};
    use sonicshot::{Pfn, PrunePlan};

    const PAGE: usize = 4096;
    const PAGES: usize = 100;

    /// A page that no other is like; every third range is zero.
    fn saved(page: usize) -> [u8; PAGE] {
        let mut out = [0; PAGE];
        if page / 7 % 3 != 1 {
            for (at, byte) in out.iter_mut().enumerate() {
                *byte = u8::try_from(page + at / 700 + 1).unwrap();
            }
        }
        out
    }

    /// Free pages hold garbage, and are to read as 0xaa.
    fn expected(page: usize) -> [u8; PAGE] {
        if (40..45).contains(&page) {
            [0xaa; PAGE]
        } else {
            saved(page)
        }
    }

    fn source(compression: Compression, cache: u64) -> CheckpointSource<Vec<u8>> {
        let ram: Vec<u8> = (0..PAGES).flat_map(saved).collect();
        let guest = MappedRegions::new(vec![(Gpa::new(1 << 20), GuestBytes::from_slice(&ram))]);
        let guest = guest.unwrap();
        let mut map = PageMap::new(guest.layout(), PageSize::SIZE_4K);
        map.set(
            PfnRange::new(Pfn::new(256 + 40), Pfn::new(256 + 45)),
            PageClass::FreeBuddy,
        );
        map.set(
            PfnRange::new(Pfn::new(256 + 60), Pfn::new(256 + 70)),
            PageClass::Kernel,
        );
        let plan = PrunePlan::new(&map, &DropClasses::default(), Fill::Byte(0xaa));
        let info = CheckpointInfo::new(guest.layout().clone(), PageSize::SIZE_4K);
        let mut options = SaveOptions::new(compression);
        options.chunk_size = 16 << 10;
        let mut writer = CheckpointWriter::new(Vec::new(), info, options).unwrap();
        writer.memory(&guest, &map, &plan).unwrap();
        let reader = CheckpointReader::new(writer.finish().unwrap().0).unwrap();
        CheckpointSource::new(reader, cache, Arc::default())
    }

    /// Every page by itself, and each run whole.
    fn check(source: &CheckpointSource<Vec<u8>>) {
        let mut buffer = Vec::new();
        for page in 0..PAGES {
            let at = Gpa::new((1 << 20) + (page * PAGE) as u64);
            let run = source.run_at(at).unwrap();
            assert!(run.range.contains(at));
            let right = expected(page);
            match run.content {
                Content::Fill(word) => {
                    let words = right.as_chunks::<8>().0;
                    assert!(
                        words.iter().all(|found| *found == word.to_le_bytes()),
                        "{page}"
                    );
                }
                Content::Bytes => {
                    let one = GpaRange::with_len(at, PAGE as u64).unwrap();
                    let piece = source.read(one, &mut buffer).unwrap();
                    assert!(piece.bytes() == right, "page {page}");
                    let piece = source.read(run.range, &mut buffer).unwrap();
                    assert_eq!(piece.bytes().len() as u64, run.range.len());
                    let inside = at.offset_from(run.range.start()).unwrap();
                    let inside = usize::try_from(inside).unwrap();
                    assert!(piece.bytes()[inside..inside + PAGE] == right, "page {page}");
                    let wide = GpaRange::new(at, run.range.end().checked_add(1).unwrap());
                    assert!(source.read(wide, &mut buffer).is_err());
                }
            }
        }
        for outside in [0, (1 << 20) + (PAGES * PAGE) as u64] {
            assert!(source.run_at(Gpa::new(outside)).is_err());
        }
    }

    #[test]
    fn every_page_reads_as_it_was_saved() {
        for compression in [Compression::None, Compression::Lz4, Compression::ZSTD] {
            for cache in [0, 20 << 10, 1 << 30] {
                check(&source(compression, cache));
            }
        }
    }

    /// Pages 3 to 6 are on a disk, downwards.
    fn on_disk(
        disk: Vec<u8>,
        declare: impl Fn(GivenDisk) -> GivenDisk,
    ) -> CheckpointSource<Vec<u8>> {
        let ram: Vec<u8> = (0..PAGES).flat_map(saved).collect();
        let guest = MappedRegions::new(vec![(Gpa::new(1 << 20), GuestBytes::from_slice(&ram))]);
        let guest = guest.unwrap();
        let map = PageMap::new(guest.layout(), PageSize::SIZE_4K);
        let plan = PrunePlan::new(&map, &DropClasses::default(), Fill::Zero);
        let mut info = CheckpointInfo::new(guest.layout().clone(), PageSize::SIZE_4K);
        let image: Vec<u8> = (3..7).rev().flat_map(saved).collect();
        info.disks = vec![DiskInfo::of("root", &image, DiskHash::Xxh3, &[]).unwrap()];
        let frame = |page: u64| (Pfn::new(256 + page), 0, DiskOffset::new((6 - page) * 4096));
        let guesses = DiskGuesses::of_frames((3..7).map(frame).collect(), PageSize::SIZE_4K);
        let disks: [&dyn DiskSource; 1] = [&image];
        let on_disks = OnDisks {
            disks: &disks,
            guesses: &guesses,
        };
        let mut writer = CheckpointWriter::new(Vec::new(), info, SaveOptions::default()).unwrap();
        writer
            .memory_on_disks(&guest, &map, &plan, &on_disks)
            .unwrap();
        let (file, stats) = writer.finish().unwrap();
        assert_eq!(stats.on_disk, 4);
        let given = vec![declare(GivenDisk::new("root", disk))];
        let reader = CheckpointReader::new(file).unwrap();
        let reader = reader.with_disks(given, MovedOn::Refuse).unwrap();
        CheckpointSource::new(reader, 1 << 20, Arc::default())
    }

    #[test]
    fn pages_on_disks_are_served_only_of_disks_that_do_not_change() {
        let image: Vec<u8> = (3..7).rev().flat_map(saved).collect();
        let mut buffer = Vec::new();
        let mut read = |source: &CheckpointSource<Vec<u8>>, page: u64, pages: u64| {
            let at = Gpa::new((256 + page) << 12);
            let run = source.run_at(at).unwrap();
            assert_eq!((run.content, run.range.len()), (Content::Bytes, 4 * 4096));
            let range = GpaRange::with_len(at, pages << 12).unwrap();
            source
                .read(range, &mut buffer)
                .map(|piece| piece.bytes().to_vec())
        };
        let immutable = on_disk(image.clone(), GivenDisk::immutable);
        let eager = on_disk(image.clone(), |disk| disk).all_before_it_runs();
        for source in [immutable, eager] {
            for (page, pages) in [(3, 4), (3, 1), (5, 1), (5, 2), (6, 1)] {
                let expected: Vec<u8> = (page..page + pages)
                    .flat_map(|page| saved(usize::try_from(page).unwrap()))
                    .collect();
                assert!(
                    read(&source, page, pages).unwrap() == expected,
                    "{page}, {pages}"
                );
            }
            // No further than the run.
            assert!(read(&source, 6, 2).is_err());
        }
        let error = read(&on_disk(image.clone(), |disk| disk), 3, 1).unwrap_err();
        assert!(
            matches!(error, ServeError::DiskMayChange { .. }),
            "{error:?}"
        );
        // Another page of the run.
        let mut changed = image;
        changed[PAGE + 9] ^= 1;
        let error = read(&on_disk(changed, GivenDisk::immutable), 3, 1).unwrap_err();
        assert!(error.to_string().contains("holds other bytes"), "{error}");
    }

    #[test]
    fn chunks_are_decompressed_once_while_there_is_room() {
        let roomy = source(Compression::Lz4, 1 << 20);
        check(&roomy);
        let missed = roomy.metrics.cache_misses();
        assert!(missed > 1);
        check(&roomy);
        assert_eq!(roomy.metrics.cache_misses(), missed);
        let none = source(Compression::Lz4, 0);
        check(&none);
        let missed = none.metrics.cache_misses();
        check(&none);
        assert!(none.metrics.cache_misses() > missed && none.cache.weight() == 0);
    }

    #[test]
    fn a_plain_chunk_that_is_damaged_is_told() {
        let source = source(Compression::None, 0);
        let Found::Bytes(stored) = source.find(Gpa::new(1 << 20)).unwrap() else {
            panic!("it is stored");
        };
        let mut bytes = source.reader.source().clone();
        // The first chunk begins behind the header, which is 4096 bytes long.
        bytes[4096 + 5] ^= 1;
        let damaged = CheckpointReader::new(bytes).unwrap();
        let damaged = CheckpointSource::new(damaged, 0, Arc::default());
        let read = |source: &CheckpointSource<Vec<u8>>| {
            source.read(stored.range, &mut Vec::new()).map(drop)
        };
        read(&source).unwrap();
        let error = read(&damaged).unwrap_err();
        assert!(error.to_string().contains("damaged"), "{error}");
        // And again: it is not taken for checked.
        assert!(read(&damaged).is_err());
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let source = source(Compression::Lz4, 0);
        let barrier = std::sync::Barrier::new(3 * source.cores);
        std::thread::scope(|scope| {
            for _ in 0..3 * source.cores {
                scope.spawn(|| source.with_decoder(|_| barrier.wait()));
            }
        });
        let kept = source.decoders.lock().unwrap().len();
        assert_eq!(kept, source.cores);
        // One order is enough for all.
        assert!(Arc::ptr_eq(&source.by_need(), &source.by_need()));
    }

    #[test]
    fn the_kernel_comes_first() {
        let order = source(Compression::Lz4, 0).by_need();
        let first = order.first().unwrap().start();
        assert_eq!(first, Gpa::new((1 << 20) + 60 * PAGE as u64));
        assert!(order.iter().all(|range| !range.is_empty()));
    }
}
