//! Finds out where in the guest the bytes of a dump lie, where the dump itself does not say:
//! raw files, and QEMU's files with several blocks of memory. The guest's own memory maps decide.

use crate::error::CliError;
use crate::inputs::Input;
use crate::report::size;
use sonicshot::{Gpa, GpaRange, GuestMemory, MemoryError, PageClass, PageMap, RamLayout};
use sonicshot_dump::{BlockKind, BlockPlace, Dump, DumpError, LayoutSpec, RamBlock};
use sonicshot_vmi::{GuestOptions, KernelVa, LinuxGuest, VmiError};
use std::collections::HashMap;

/// Firmware keeps less than this of the RAM at the top of the low part for itself.
const FIRMWARE: u64 = 128 << 20;
/// A device's own memory of this length is worth a word.
const NOTABLE: u64 = 128 << 20;
/// So many ways to lay out a dump are tried.
const MAX_ATTEMPTS: usize = 64;
const FROM_FILE: &str = "from the file";
const BY_GUEST: &str = "found out by the guest's own memory map";

/// A dump whose layout is known, and what was made of its guest.
pub(crate) struct Placed<T> {
    pub dump: Dump,
    /// How the layout was found, for people.
    pub origin: &'static str,
    /// Ranges of the same length that hold blocks of which it is not known which is which.
    pub shared: Vec<Vec<GpaRange>>,
    pub notes: Vec<String>,
    pub value: T,
}

/// One way to lay out a dump.
struct Candidate {
    /// `None`: as the file says.
    layout: Option<LayoutSpec>,
    /// The RAM that the guest boots with; `None` if the dump says where it lies.
    boot: Option<RamLayout>,
    /// Where other blocks are put to begin with, so that the kernel can be read if it is in them.
    guess: Vec<BlockPlace>,
    /// Whether blocks were put in an order that nothing in the file tells.
    guessed: bool,
    origin: &'static str,
}

/// What came of trying one.
enum Attempt<T> {
    Done(Box<Placed<T>>),
    /// The guest's map of the RAM that it boots with says otherwise.
    Refuted(Vec<GpaRange>),
    /// The guest's map could not be read.
    Unconfirmed,
}

/// Opens the dump in the layout that its guest confirms and lets `work` look at the guest.
pub(crate) fn with_guest<T>(
    input: &Input<'_>,
    work: &dyn Fn(&LinuxGuest<'_>) -> Result<T, VmiError>,
) -> Result<Placed<T>, CliError> {
    let guest_error = |source| CliError::Guest {
        path: input.memory().into(),
        source,
    };
    if let Some(layout) = input.files.layout() {
        let dump = input.open(Some(layout))?;
        let own = dump.layout_spec().is_none() && dump.ram_blocks().is_empty();
        let value = look(input, &dump, work).map_err(guest_error)?;
        return Ok(Placed {
            origin: if input.how.layout.is_none() {
                "from the snapshot's state.json"
            } else if own {
                "from the file; --layout is for raw and QEMU's files"
            } else {
                "given"
            },
            dump,
            shared: Vec::new(),
            notes: Vec::new(),
            value,
        });
    }
    let mut search = Search::new(input)?;
    let mut first_error: Option<CliError> = None;
    let mut unconfirmed = None;
    for _ in 0..MAX_ATTEMPTS {
        let Some(candidate) = search.next() else {
            break;
        };
        match search.attempt(&candidate, true, work) {
            Ok(Attempt::Done(placed)) => return Ok(*placed),
            Ok(Attempt::Refuted(e820)) => search.learn(e820),
            Ok(Attempt::Unconfirmed) => {
                unconfirmed.get_or_insert(candidate);
            }
            Err(error) if search.certain || is_about_symbols(&error) => return Err(error),
            Err(error) => {
                // What is wrong with a kernel says more than that there is none.
                if first_error.as_ref().is_none_or(is_no_kernel) {
                    first_error = Some(error);
                }
            }
        }
    }
    if let Some(candidate) = unconfirmed
        && let Attempt::Done(placed) = search.attempt(&candidate, false, work)?
    {
        return Ok(Placed {
            origin: "guessed: the guest's e820 map could not be read",
            ..*placed
        });
    }
    Err(first_error.unwrap_or_else(|| CliError::NoLayout {
        path: input.memory().into(),
    }))
}

/// Opens the dump alone, in the layout that its guest confirms if the dump does not say.
pub(crate) fn open(input: &Input<'_>) -> Result<Dump, CliError> {
    if input.files.layout().is_some() || Search::new(input)?.certain {
        return Ok(input.open(input.files.layout())?);
    }
    Ok(with_guest(input, &|_| Ok(()))?.dump)
}

fn options(input: &Input<'_>, dump: &Dump) -> GuestOptions {
    let mut options = GuestOptions::new();
    for path in &input.how.symbols {
        options = options.symbols(path);
    }
    match dump.vmcoreinfo() {
        Some(text) => options.vmcoreinfo(text),
        None => options,
    }
}

fn look<T>(
    input: &Input<'_>,
    dump: &Dump,
    work: &dyn Fn(&LinuxGuest<'_>) -> Result<T, VmiError>,
) -> Result<T, VmiError> {
    work(&LinuxGuest::open(dump, &options(input, dump))?)
}

fn is_no_kernel(error: &CliError) -> bool {
    let CliError::Guest { source, .. } = error else {
        return false;
    };
    matches!(source, VmiError::NoKernel { .. })
}

/// A wrong symbol file is wrong in every layout.
fn is_about_symbols(error: &CliError) -> bool {
    let CliError::Guest { source, .. } = error else {
        return false;
    };
    matches!(source, VmiError::WrongKernel { .. } | VmiError::Symbols(_))
}

/// The candidates, likeliest first.
struct Search<'a> {
    input: &'a Input<'a>,
    /// The blocks of a QEMU file; none of other formats.
    blocks: Vec<RamBlock>,
    /// Where a machine may have its RAM.
    specs: Vec<LayoutSpec>,
    todo: std::vec::IntoIter<Candidate>,
    /// Whether nothing has to be found out.
    certain: bool,
    /// What the guest boots with, once a kernel was found.
    e820: Option<Vec<GpaRange>>,
    len: u64,
}

impl<'a> Search<'a> {
    fn new(input: &'a Input<'a>) -> Result<Self, CliError> {
        let mut specs = LayoutSpec::KNOWN.to_vec();
        let first = match input.open(None) {
            // A machine of QEMU's that is not known: one of the layouts may be its own.
            Err(error @ DumpError::NoLayout { .. }) => specs
                .iter()
                .find_map(|spec| input.open(Some(spec)).ok())
                .ok_or(error)?,
            dump => {
                let dump = dump?;
                specs.retain(|spec| dump.machine_layout().is_none_or(|own| own == *spec));
                dump
            }
        };
        let blocks = first.ram_blocks().to_vec();
        let mut search = Self {
            input,
            specs,
            todo: Vec::new().into_iter(),
            certain: false,
            e820: None,
            len: first.layout().bytes(),
            blocks,
        };
        let own = Candidate {
            layout: None,
            boot: None,
            guess: Vec::new(),
            guessed: false,
            origin: FROM_FILE,
        };
        let candidates = if search.blocks.is_empty() {
            match first.layout_spec() {
                None => {
                    search.certain = true;
                    vec![own]
                }
                Some(_) => search.of_raw(),
            }
        } else {
            search.of_blocks()
        };
        search.certain |= matches!(candidates.as_slice(), [only] if only.boot.is_none());
        search.todo = candidates.into_iter();
        Ok(search)
    }

    fn next(&mut self) -> Option<Candidate> {
        let e820 = &self.e820;
        self.todo.find(|candidate| match (&candidate.boot, e820) {
            (Some(boot), Some(e820)) => fits(boot, e820),
            _ => true,
        })
    }

    fn of_raw(&self) -> Vec<Candidate> {
        let mut candidates: Vec<Candidate> = Vec::new();
        for spec in &self.specs {
            let Ok(boot) = RamLayout::new(spec.ranges(self.len)) else {
                continue;
            };
            if candidates.iter().all(|c| c.boot.as_ref() != Some(&boot)) {
                candidates.push(Candidate {
                    layout: Some(spec.clone()),
                    boot: Some(boot),
                    guess: Vec::new(),
                    guessed: false,
                    origin: BY_GUEST,
                });
            }
        }
        if let [only] = candidates.as_mut_slice() {
            only.boot = None;
            only.origin = "the same in every VMM for this size";
        }
        candidates
    }

    /// The blocks that may be RAM that the guest boots with, in the order of the file.
    fn ram(&self) -> Vec<&RamBlock> {
        let ram = |block: &&RamBlock| block.kind == BlockKind::Ram;
        self.blocks.iter().filter(ram).collect()
    }

    /// The blocks that may be RAM and are not among `names`.
    fn others(&self, names: &[&str]) -> Vec<&RamBlock> {
        let mut others = self.ram();
        others.retain(|block| !names.contains(&block.name.as_str()));
        others
    }

    fn of_blocks(&self) -> Vec<Candidate> {
        let mut by_length = self.ram();
        by_length.sort_by_key(|block| std::cmp::Reverse(block.len));
        let mut orders: Vec<Vec<&RamBlock>> = by_length.iter().map(|block| vec![*block]).collect();
        // NUMA nodes: usually in the order in which they were made, or that of their names.
        let mut by_name = self.ram();
        by_name.sort_by(|a, b| a.name.cmp(&b.name));
        for order in [self.ram(), by_name] {
            if !orders.contains(&order) {
                orders.push(order);
            }
        }
        let likely = orders.len();
        add_orders(&self.ram(), &mut Vec::new(), &mut orders);
        let mut candidates = Vec::new();
        let mut with_dimms = Vec::new();
        for (number, order) in orders.into_iter().enumerate() {
            let total = order.iter().fold(0, |sum, b| b.len.saturating_add(sum));
            let mut known: Vec<Vec<GpaRange>> = Vec::new();
            for spec in &self.specs {
                let ranges = spec.ranges(total);
                if known.contains(&ranges) {
                    continue;
                }
                if number == likely {
                    candidates.append(&mut with_dimms);
                }
                if let Some(candidate) = self.candidate(&order, &ranges, FROM_FILE) {
                    with_dimms.extend(self.with_dimms(&candidate, &order));
                    candidates.push(candidate);
                }
                known.push(ranges);
            }
        }
        candidates.append(&mut with_dimms);
        candidates
    }

    /// The same with all other blocks where QEMU has DIMMs: one behind the other from the first
    /// whole GiB on that is above 4 GiB and all RAM (`hw/i386/pc.c`). A guest that boots with them
    /// may have what its kernel needs in there.
    fn with_dimms(&self, candidate: &Candidate, order: &[&RamBlock]) -> Vec<Candidate> {
        const GIB: u64 = 1 << 30;
        let names: Vec<&str> = order.iter().map(|block| block.name.as_str()).collect();
        let in_file = self.others(&names);
        let mut by_name = in_file.clone();
        by_name.sort_by(|a, b| a.name.cmp(&b.name));
        let mut guesses: Vec<Vec<BlockPlace>> = Vec::new();
        for dimms in [by_name, in_file] {
            let end = candidate.boot.as_ref().map_or(Gpa::ZERO, RamLayout::end);
            let mut at = end.raw().checked_next_multiple_of(GIB);
            at = at.map(|at| at.max(4 * GIB));
            let places = dimms.iter().map(|block| {
                let range = GpaRange::with_len(Gpa::new(at?), block.len)?;
                at = Some(range.end().raw());
                Some(BlockPlace::new(&block.name, vec![range]))
            });
            let places: Option<Vec<BlockPlace>> = places.collect();
            guesses.extend(places.filter(|p| !p.is_empty() && !guesses.contains(p)));
        }
        let with = |guess| Candidate {
            layout: candidate.layout.clone(),
            boot: candidate.boot.clone(),
            guess,
            ..*candidate
        };
        guesses.into_iter().map(with).collect()
    }

    /// The blocks `order` at `ranges`, beside those whose place is known.
    fn candidate(
        &self,
        order: &[&RamBlock],
        ranges: &[GpaRange],
        origin: &'static str,
    ) -> Option<Candidate> {
        let mut places = Vec::new();
        let mut ranges = ranges.to_vec();
        for block in order {
            let place = take(&mut ranges, block.len)?;
            places.push(BlockPlace::new(&block.name, place));
        }
        let boot = places.iter().flat_map(|place| place.ranges.clone());
        let boot = RamLayout::new(boot.collect()).ok()?;
        for block in &self.blocks {
            if block.kind == BlockKind::VirtioMem {
                places.push(BlockPlace::new(&block.name, block.ranges.clone()));
            }
        }
        let guessed = self.ram().len() > 1;
        Some(Candidate {
            layout: Some(LayoutSpec::Blocks(places)),
            boot: Some(boot),
            guess: Vec::new(),
            guessed,
            origin: if guessed { BY_GUEST } else { origin },
        })
    }

    /// Takes what a guest's own map says, and a layout made by it as one more candidate.
    fn learn(&mut self, e820: Vec<GpaRange>) {
        if self.e820.is_some() {
            return;
        }
        let mut more = Vec::new();
        if self.blocks.is_empty() {
            let layout = by_e820(&e820, self.len);
            more.extend(layout.and_then(|ranges| {
                Some(Candidate {
                    boot: Some(RamLayout::new(ranges.clone()).ok()?),
                    layout: Some(LayoutSpec::Ranges(ranges)),
                    guess: Vec::new(),
                    guessed: false,
                    origin: BY_GUEST,
                })
            }));
        } else {
            for block in self.ram() {
                let ranges = by_e820(&e820, block.len);
                more.extend(ranges.and_then(|r| self.candidate(&[block], &r, BY_GUEST)));
            }
        }
        let todo = std::mem::take(&mut self.todo);
        self.todo = todo.chain(more).collect::<Vec<_>>().into_iter();
        self.e820 = Some(e820);
    }

    fn attempt<T>(
        &self,
        candidate: &Candidate,
        confirm: bool,
        work: &dyn Fn(&LinuxGuest<'_>) -> Result<T, VmiError>,
    ) -> Result<Attempt<T>, CliError> {
        let guest_error = |source| CliError::Guest {
            path: self.input.memory().into(),
            source,
        };
        let dump = match &candidate.layout {
            Some(LayoutSpec::Blocks(places)) => {
                let all = [places.as_slice(), &candidate.guess].concat();
                self.input.open(Some(&LayoutSpec::Blocks(all)))?
            }
            layout => self.input.open(layout.as_ref())?,
        };
        let guest = LinuxGuest::open(&dump, &options(self.input, &dump)).map_err(guest_error)?;
        if let Some(boot) = &candidate.boot
            && confirm
        {
            match guest.e820() {
                Ok(Some(e820)) if !fits(boot, &e820) => return Ok(Attempt::Refuted(e820)),
                Ok(Some(_)) => {}
                // A file with one block has the layout of its machine.
                _ if !self.blocks.is_empty() && !candidate.guessed => {}
                _ => return Ok(Attempt::Unconfirmed),
            }
        }
        let mut plugged = Plugged::default();
        if let (None, Some(_)) = (&candidate.boot, dump.layout_spec())
            && let Ok(Some(e820)) = guest.e820()
            && !fits(dump.layout(), &e820)
        {
            let top = e820.iter().map(GpaRange::end).max().unwrap_or(Gpa::ZERO);
            plugged.notes.push(format!(
                "the guest booted with RAM up to {top:#x}, the file's layout ends at {:#x}: is the \
                 layout right? What the guest's kernel does not know is kept",
                dump.layout().end()
            ));
        }
        if let Some(LayoutSpec::Blocks(places)) = &candidate.layout
            && candidate.guessed
        {
            let structs = guest.struct_page_memory().map_err(guest_error)?;
            if !self.in_place(places, &structs) {
                return Ok(Attempt::Unconfirmed);
            }
            let names: Vec<&str> = places.iter().map(|place| place.name.as_str()).collect();
            let ram = guest.system_ram().map_err(guest_error)?;
            let taken: Vec<GpaRange> = places.iter().flat_map(|p| p.ranges.clone()).collect();
            plugged = Plugged::find(&self.others(&names), &ram.unwrap_or_default(), &taken);
            // A guess was only for reading the kernel: what counts is what that says.
            if !plugged.places.is_empty() || !candidate.guess.is_empty() {
                let direct_map = guest.direct_map().map_err(guest_error)?;
                drop(guest);
                let open = |plugged: &Plugged| {
                    let all = [places.as_slice(), &plugged.places].concat();
                    self.input.open(Some(&LayoutSpec::Blocks(all)))
                };
                let mut dump = open(&plugged)?;
                if plugged.tell_apart(&dump, direct_map)? {
                    dump = open(&plugged)?;
                }
                let value = look(self.input, &dump, work).map_err(guest_error)?;
                let placed = plugged.placed(dump, candidate.origin, value);
                return Ok(Attempt::Done(Box::new(placed)));
            }
        }
        let value = work(&guest).map_err(guest_error)?;
        drop(guest);
        let placed = plugged.placed(dump, candidate.origin, value);
        Ok(Attempt::Done(Box::new(placed)))
    }

    /// Whether the guest itself shows that the blocks it boots with are where `places` has them:
    /// what its kernel keeps in a block is found there. One of them is told by the others.
    fn in_place(&self, places: &[BlockPlace], structs: &[GpaRange]) -> bool {
        let ram = self.ram();
        let boot = |place: &&BlockPlace| ram.iter().any(|block| block.name == place.name);
        let boot: Vec<&BlockPlace> = places.iter().filter(boot).collect();
        let found = |place: &&&BlockPlace| {
            let mut ranges = place.ranges.iter();
            ranges.any(|range| structs.iter().any(|s| !s.intersection(range).is_empty()))
        };
        boot.iter().filter(found).count().saturating_add(1) >= boot.len()
    }
}

/// Memory that was plugged in as DIMMs: the file does not say where, the guest's kernel does.
#[derive(Default)]
struct Plugged {
    places: Vec<BlockPlace>,
    /// Places of the same length, in which the blocks are in any order.
    shared: Vec<Vec<GpaRange>>,
    notes: Vec<String>,
}

impl Plugged {
    /// Gives each block the stretch of RAM that has its length. `taken` is where others are.
    fn find(blocks: &[&RamBlock], ram: &[GpaRange], taken: &[GpaRange]) -> Self {
        let mut plugged = Self::default();
        let mut lengths: Vec<u64> = blocks.iter().map(|block| block.len).collect();
        lengths.sort_unstable();
        lengths.dedup();
        for len in lengths {
            let these = blocks.iter().filter(|block| block.len == len);
            let free = |range: &&GpaRange| {
                range.len() == len && taken.iter().all(|t| t.intersection(range).is_empty())
            };
            let ranges: Vec<GpaRange> = ram.iter().filter(free).copied().collect();
            if these.clone().count() != ranges.len() {
                plugged.notes.extend(these.map(|block| kept(block)));
                continue;
            }
            let places = these.zip(&ranges);
            plugged
                .places
                .extend(places.map(|(block, range)| BlockPlace::new(&block.name, vec![*range])));
            if ranges.len() > 1 {
                plugged.shared.push(ranges);
            }
        }
        plugged
    }

    /// Finds out which of the blocks of one length lies where, by what the kernel has in them:
    /// an empty list points to itself, so it tells its own address. Returns whether blocks have
    /// to change places.
    fn tell_apart(&mut self, dump: &Dump, direct_map: Option<KernelVa>) -> Result<bool, CliError> {
        let mut changed = false;
        for ranges in std::mem::take(&mut self.shared) {
            let order = match direct_map {
                Some(direct_map) => order_by_lists(dump, &ranges, direct_map)?,
                None => None,
            };
            let Some(order) = order else {
                self.notes.push(format!(
                    "{} memory blocks of {} cannot be told from each other: what is not free in \
                     all of them is kept",
                    ranges.len(),
                    ranges
                        .first()
                        .map_or_else(String::new, |range| size(range.len()))
                ));
                self.shared.push(ranges);
                continue;
            };
            let moves: HashMap<GpaRange, GpaRange> = ranges.into_iter().zip(order).collect();
            for place in &mut self.places {
                for range in &mut place.ranges {
                    if let Some(to) = moves.get(range) {
                        changed |= to != range;
                        *range = *to;
                    }
                }
            }
        }
        Ok(changed)
    }

    fn placed<T>(self, dump: Dump, origin: &'static str, value: T) -> Placed<T> {
        let mut notes = self.notes;
        // A virtio-mem device of QEMU 5 to 7 does not say where its memory lies.
        notes.extend(dump.ram_blocks().iter().filter_map(|block| {
            let large = block.kind == BlockKind::Device && block.len >= NOTABLE;
            (large && block.ranges.is_empty()).then(|| kept(block))
        }));
        Placed {
            dump,
            origin,
            shared: self.shared,
            notes,
            value,
        }
    }
}

/// So many lists of a block must point to one place to be believed,
const MIN_LISTS: u64 = 64;
/// and so many times more than to any other.
const CLEARLY: u64 = 8;
/// How much of a block is looked through.
const MAX_LOOK: u64 = 4 << 30;
const PIECE: usize = 1 << 20;

/// Where each of the blocks that are now at `ranges` belongs, of these ranges, if that is clear.
fn order_by_lists(
    dump: &Dump,
    ranges: &[GpaRange],
    direct_map: KernelVa,
) -> Result<Option<Vec<GpaRange>>, CliError> {
    let mut order = Vec::new();
    for range in ranges {
        let votes = lists_by_place(dump, *range, ranges, direct_map)?;
        let best = clear_winner(&votes);
        order.push(best.and_then(|best| ranges.get(best).copied()));
    }
    let mut left: Vec<GpaRange> = ranges.to_vec();
    left.retain(|range| !order.contains(&Some(*range)));
    let missing = order.iter().filter(|place| place.is_none()).count();
    Ok(match left.as_slice() {
        // Each place taken once; of one that nothing is known of, the others tell.
        [] if missing == 0 => order.into_iter().collect(),
        [last] if missing == 1 => Some(order.iter().map(|p| p.unwrap_or(*last)).collect()),
        _ => None,
    })
}

fn clear_winner(votes: &[u64]) -> Option<usize> {
    let (best, count) = votes.iter().enumerate().max_by_key(|(_, count)| **count)?;
    let mut others = votes
        .iter()
        .enumerate()
        .filter(|(number, _)| *number != best);
    let clear = others.all(|(_, other)| other.saturating_mul(CLEARLY) <= *count);
    (*count >= MIN_LISTS && clear).then_some(best)
}

/// How many empty lists in the block at `range` would point to themselves at each of `places`.
fn lists_by_place(
    dump: &Dump,
    range: GpaRange,
    places: &[GpaRange],
    direct_map: KernelVa,
) -> Result<Vec<u64>, MemoryError> {
    let mut votes = vec![0_u64; places.len()];
    let mut buffer = vec![0; PIECE];
    let mut at = range.start();
    while let Some(data) = dump.next_data(at).filter(|data| data.start() < range.end()) {
        let inside = data.start().offset_from(range.start()).unwrap_or(0);
        let end = data.end().min(range.end());
        let left = end.offset_from(data.start()).unwrap_or(0);
        let len = usize::try_from(left).unwrap_or(PIECE).min(PIECE);
        let piece = buffer.get_mut(..len).unwrap_or_default();
        dump.read(data.start(), piece)?;
        let (words, _) = piece.as_chunks::<8>();
        for (offset, [next, previous]) in (inside..).step_by(8).zip(words.array_windows()) {
            if next == previous {
                let list = u64::from_le_bytes(*next);
                let start = list.wrapping_sub(direct_map.raw()).wrapping_sub(offset);
                for (place, votes) in places.iter().zip(&mut votes) {
                    *votes = votes.saturating_add(u64::from(place.start().raw() == start));
                }
            }
        }
        let Some(next) = data.start().checked_add(len as u64) else {
            break;
        };
        at = next;
        let enough = votes
            .iter()
            .any(|votes| *votes >= MIN_LISTS.saturating_mul(CLEARLY));
        if at >= range.end() || inside >= MAX_LOOK || enough && clear_winner(&votes).is_some() {
            break;
        }
    }
    Ok(votes)
}

/// What to say of a block whose place is not known.
fn kept(block: &RamBlock) -> String {
    format!(
        "memory block {} ({}) is kept as it is: where it lies in the guest is not known (--layout \
         can tell)",
        block.name,
        size(block.len)
    )
}

/// Where blocks of one length may lie in each other's place, keeps what is not free in all of the
/// places: so nothing is dropped that is in use, whichever block is where.
pub(crate) fn keep_what_is_not_free_in_all(map: &mut PageMap, shared: &[Vec<GpaRange>]) {
    let page_size = map.page_size();
    for ranges in shared {
        let mut free: Vec<bool> = Vec::new();
        let frames = || ranges.iter().map(|range| range.whole_frames(page_size));
        for (number, frames) in frames().enumerate() {
            free.resize(usize::try_from(frames.len()).unwrap_or(0), number == 0);
            let mut seen = free.iter_mut();
            map.with_slices(frames, |_, classes| {
                for (class, free) in classes.iter().zip(&mut seen) {
                    *free &= DROPPED.contains(class);
                }
            });
            seen.for_each(|free| *free = false);
        }
        for frames in frames() {
            let mut free = free.iter();
            map.with_slices(frames, |_, classes| {
                for (class, free) in classes.iter_mut().zip(&mut free) {
                    if !free && class.may_be_dropped() {
                        *class = PageClass::Unknown;
                    }
                }
            });
        }
    }
}

/// What says of a page that the guest does not use it, whatever it holds.
const DROPPED: [PageClass; 3] = [PageClass::FreeBuddy, PageClass::FreePcp, PageClass::Offline];

/// Takes `len` bytes off the front of `ranges`.
fn take(ranges: &mut Vec<GpaRange>, len: u64) -> Option<Vec<GpaRange>> {
    let mut taken = Vec::new();
    let mut left = len;
    while left > 0 {
        let first = ranges.first_mut()?;
        let part = GpaRange::with_len(first.start(), first.len().min(left))?;
        *first = GpaRange::new(part.end(), first.end());
        left = left.saturating_sub(part.len());
        if first.is_empty() {
            ranges.remove(0);
        }
        taken.push(part);
    }
    Some(taken)
}

/// Whether the usable RAM of the guest's map lies in `boot`, and reaches the top of it.
fn fits(boot: &RamLayout, ram: &[GpaRange]) -> bool {
    let inside = ram
        .iter()
        .all(|range| boot.contains(range.start(), range.len()));
    let top = ram.iter().map(GpaRange::end).max();
    let reaches = match (boot.regions(), top) {
        // Firmware keeps memory at the top of the low part for itself, never of the high part.
        ([_], Some(top)) => boot.end().offset_from(top).is_some_and(|n| n < FIRMWARE),
        (_, Some(top)) => top == boot.end(),
        (_, None) => false,
    };
    inside && reaches
}

/// Where `len` bytes of RAM lie by the guest's map: some below 4 GiB, the rest from there on.
fn by_e820(e820: &[GpaRange], len: u64) -> Option<Vec<GpaRange>> {
    let gib_4 = Gpa::new(1 << 32);
    let end = e820.iter().map(GpaRange::end).max()?;
    let high = GpaRange::new(gib_4, end.max(gib_4));
    let low = GpaRange::with_len(Gpa::ZERO, len.checked_sub(high.len())?)?;
    if low.is_empty() || low.end() > gib_4 {
        return None;
    }
    let mut ranges = vec![low, high];
    ranges.retain(|range| !range.is_empty());
    Some(ranges)
}

/// Adds every order of two and more of `blocks`, up to a limit.
fn add_orders<'b>(
    blocks: &[&'b RamBlock],
    begun: &mut Vec<&'b RamBlock>,
    orders: &mut Vec<Vec<&'b RamBlock>>,
) {
    for block in blocks {
        if begun.contains(block) {
            continue;
        }
        if orders.len() >= MAX_ATTEMPTS {
            return;
        }
        begun.push(block);
        if begun.len() > 1 && !orders.contains(begun) {
            orders.push(begun.clone());
        }
        add_orders(blocks, begun, orders);
        begun.pop();
    }
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::indexing_slicing,
        reason = "tests may stop anywhere"
    )]

    use super::{by_e820, fits, keep_what_is_not_free_in_all, order_by_lists, take};
    use sonicshot::{Gpa, GpaRange, PageClass, PageMap, PageSize, Pfn, PfnRange, RamLayout};
    use sonicshot_dump::{Dump, LayoutSpec};
    use sonicshot_vmi::KernelVa;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    fn range(start: u64, end: u64) -> GpaRange {
        GpaRange::new(Gpa::new(start), Gpa::new(end))
    }

    #[test]
    fn a_layout_fits_the_map_that_the_firmware_made_of_it() {
        let two = RamLayout::new(vec![range(0, 3 * GIB), range(4 * GIB, 5 * GIB)]).unwrap();
        let low = [range(0x1000, 0x9_f000), range(MIB, 3 * GIB - 0x2_6000)];
        let with = |end| [&low[..], &[range(4 * GIB, end)]].concat();
        assert!(fits(&two, &with(5 * GIB)));
        // The high part is used to its end; nothing lies outside.
        assert!(!fits(&two, &with(5 * GIB - 4096)));
        assert!(!fits(&two, &with(6 * GIB)));
        assert!(!fits(&two, &[]));
        let one = RamLayout::new(vec![range(0, 512 * MIB)]).unwrap();
        let reaching = |end| [range(0x1000, 0x9_f000), range(MIB, end)];
        assert!(fits(&one, &reaching(512 * MIB - 0x2_6000)));
        assert!(!fits(&one, &reaching(384 * MIB)), "of a smaller guest");
        assert!(!fits(&one, &reaching(513 * MIB)), "of a larger one");
    }

    #[test]
    fn the_map_tells_where_ram_is_split() {
        let map = [range(MIB, 2 * GIB - 0x2_6000), range(4 * GIB, 6 * GIB)];
        let layout = by_e820(&map, 4 * GIB).unwrap();
        assert_eq!(layout, [range(0, 2 * GIB), range(4 * GIB, 6 * GIB)]);
        let low = by_e820(&[range(MIB, GIB)], GIB).unwrap();
        assert_eq!(low, [range(0, GIB)]);
        assert_eq!(by_e820(&map, GIB), None);
        assert_eq!(by_e820(&map, 9 * GIB), None);
        assert_eq!(by_e820(&[], GIB), None);
    }

    #[test]
    fn blocks_take_their_parts_in_order() {
        let mut ranges = vec![range(0, 0x3000), range(0x10000, 0x14000)];
        let first = take(&mut ranges, 0x4000).unwrap();
        assert_eq!(first, [range(0, 0x3000), range(0x10000, 0x11000)]);
        let second = take(&mut ranges, 0x3000).unwrap();
        assert_eq!(second, [range(0x11000, 0x14000)]);
        assert_eq!(take(&mut ranges, 1), None);
    }

    /// Two blocks of 64 KiB with empty lists of a kernel: `lists` says how many there are in each,
    /// and which of the places they point to.
    fn order(lists: &[(usize, usize)]) -> Option<Vec<usize>> {
        const LEN: u64 = 0x1_0000;
        let places: Vec<GpaRange> = (0..lists.len() as u64)
            .map(|n| range(4 * GIB + n * LEN, 4 * GIB + (n + 1) * LEN))
            .collect();
        let direct_map = 0xffff_9a80_0000_0000_u64;
        let mut content = vec![0; lists.len() * usize::try_from(LEN).unwrap()];
        for (block, (count, place)) in content.chunks_mut(0x1_0000).zip(lists) {
            for list in 0..*count {
                let offset = list * 24 + 8;
                let address = direct_map + places[*place].start().raw() + offset as u64;
                block[offset..offset + 8].copy_from_slice(&address.to_le_bytes());
                block[offset + 8..offset + 16].copy_from_slice(&address.to_le_bytes());
            }
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &content).unwrap();
        let layout = LayoutSpec::Ranges(places.clone());
        let dump = Dump::open(file.path(), Some(&layout)).unwrap();
        let order = order_by_lists(&dump, &places, KernelVa::new(direct_map)).unwrap()?;
        let number = |range| places.iter().position(|place| place == range).unwrap();
        Some(order.iter().map(number).collect())
    }

    #[test]
    fn empty_lists_tell_where_their_block_is() {
        assert_eq!(order(&[(200, 0), (200, 1)]), Some(vec![0, 1]));
        assert_eq!(order(&[(200, 1), (200, 0)]), Some(vec![1, 0]));
        // One is told by the other; with neither nothing is known.
        assert_eq!(order(&[(0, 0), (200, 0)]), Some(vec![1, 0]));
        assert_eq!(order(&[(10, 0), (10, 1)]), None);
        assert_eq!(order(&[(200, 0), (200, 0)]), None);
        assert_eq!(order(&[(100, 2), (0, 0), (100, 1)]), Some(vec![2, 0, 1]));
        assert_eq!(order(&[(100, 2), (0, 0), (0, 0)]), None);
    }

    #[test]
    fn of_blocks_in_any_order_only_what_is_free_in_all_is_dropped() {
        use PageClass::{Anonymous, FreeBuddy, FreePcp, Kernel, Offline, Unknown};
        let first = [FreeBuddy, FreeBuddy, Kernel, Anonymous, FreePcp, Offline];
        let second = [FreeBuddy, Kernel, FreePcp, Anonymous, FreeBuddy, FreeBuddy];
        let layout = RamLayout::new(vec![range(0, 0x6000), range(0x10_0000, 0x10_6000)]).unwrap();
        let mut map = PageMap::new(&layout, PageSize::SIZE_4K);
        for (start, classes) in [(0, first), (0x100, second)] {
            for (pfn, class) in (start..).zip(classes) {
                map.set(PfnRange::with_len(Pfn::new(pfn), 1).unwrap(), class);
            }
        }
        keep_what_is_not_free_in_all(&mut map, &[layout.regions().to_vec()]);
        let classes = |start| (start..start + 6).map(|pfn| map.class(Pfn::new(pfn)).unwrap());
        let kept = [FreeBuddy, Unknown, Kernel, Unknown, FreePcp, Offline];
        assert!(classes(0).eq(kept));
        let kept = [FreeBuddy, Kernel, Unknown, Unknown, FreeBuddy, FreeBuddy];
        assert!(classes(0x100).eq(kept));
    }
}
