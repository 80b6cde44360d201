//! Pages whose every byte is zero.

use sonicshot::{
    GpaRange, GuestBytes, GuestMemory, MemoryError, PageClass, PageMap, PageSize, Pfn,
};
use std::num::NonZeroUsize;
use std::sync::Mutex;
use std::thread;

/// How many frames a thread takes at a time.
const PIECE: usize = 4096;
/// How much is mapped at a time.
const WINDOW: u64 = 2 << 20;

/// Gives the class [`PageClass::Zero`] to every page that is in use, of whatever class, and
/// holds only zeroes. Free and offline pages keep their class, and are not read.
///
/// Uses all processors. Memory that the source knows to be zero ([`GuestMemory::next_data`])
/// is not touched.
///
/// # Errors
/// [`MemoryError`] if a page cannot be read.
pub fn mark_zero_pages(memory: &dyn GuestMemory, map: &mut PageMap) -> Result<(), MemoryError> {
    let page_size = map.page_size();
    let mut pieces = Vec::new();
    for (frames, classes) in map.regions_mut() {
        let starts = (frames.start().raw()..).step_by(PIECE);
        pieces.extend(starts.zip(classes.chunks_mut(PIECE)));
    }
    in_parallel(pieces, |(start, classes)| {
        let wanted: Vec<bool> = classes.iter().map(|class| is_read(*class)).collect();
        zero_frames(memory, page_size, Pfn::new(start), &wanted, &mut |index| {
            if let Some(class) = classes.get_mut(index) {
                *class = PageClass::Zero;
            }
        })
    })
}

/// How many pages of all RAM hold only zeroes, whatever they are used for: what leaving out
/// zero pages alone would save.
///
/// # Errors
/// [`MemoryError`] if a page cannot be read.
pub fn count_zero_pages(memory: &dyn GuestMemory, map: &PageMap) -> Result<u64, MemoryError> {
    let mut pieces = Vec::new();
    for (frames, classes) in map.regions() {
        let starts = (frames.start().raw()..).step_by(PIECE);
        pieces.extend(starts.zip(classes.chunks(PIECE)));
    }
    let total = Mutex::new(0_u64);
    in_parallel(pieces, |(start, classes)| {
        let wanted: Vec<bool> = classes
            .iter()
            .map(|class| *class != PageClass::HwPoison)
            .collect();
        let mut zero = 0_u64;
        zero_frames(
            memory,
            map.page_size(),
            Pfn::new(start),
            &wanted,
            &mut |_| {
                zero = zero.saturating_add(1);
            },
        )?;
        if let Ok(mut total) = total.lock() {
            *total = total.saturating_add(zero);
        }
        Ok(())
    })?;
    Ok(total.into_inner().unwrap_or(0))
}

/// Whether a page of this class may become [`PageClass::Zero`].
fn is_read(class: PageClass) -> bool {
    !matches!(
        class,
        PageClass::FreeBuddy
            | PageClass::FreePcp
            | PageClass::Offline
            | PageClass::HwPoison
            | PageClass::Unaccepted
    )
}

/// Runs `work` on every item, on all processors; the first error ends it.
fn in_parallel<T: Send, E: Send>(
    items: Vec<T>,
    work: impl Fn(T) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let threads = thread::available_parallelism()
        .map_or(1, NonZeroUsize::get)
        .min(items.len())
        .min(16);
    let items = Mutex::new(items.into_iter());
    let take = || items.lock().ok().and_then(|mut items| items.next());
    let run = || -> Result<(), E> {
        while let Some(item) = take() {
            work(item)?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(run)).collect();
        let mut result = run();
        for other in others {
            // A thread that panicked has a bug; its panic goes on here.
            let theirs = other
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            result = result.and(theirs);
        }
        result
    })
}

/// Calls `found` with the index of each wanted frame from `start` that holds only zeroes.
fn zero_frames(
    memory: &dyn GuestMemory,
    page_size: PageSize,
    start: Pfn,
    wanted: &[bool],
    found: &mut dyn FnMut(usize),
) -> Result<(), MemoryError> {
    let page = usize::try_from(page_size.bytes()).unwrap_or(usize::MAX);
    let per_window = usize::try_from(WINDOW >> page_size.shift()).unwrap_or(1);
    let mut buffer = Vec::new();
    for (number, window) in wanted.chunks(per_window).enumerate() {
        let first = number.saturating_mul(per_window);
        let Some(last) = window.iter().rposition(|wanted| *wanted) else {
            continue;
        };
        let Some(lead) = window.iter().position(|wanted| *wanted) else {
            continue;
        };
        let range = start
            .checked_add((first as u64).saturating_add(lead as u64))
            .zip(start.checked_add((first as u64).saturating_add(last as u64).saturating_add(1)))
            .and_then(|(a, b)| Some(GpaRange::new(a.gpa(page_size)?, b.gpa(page_size)?)));
        let Some(range) = range else { continue };
        // Frames known to be zero without reading.
        let data = memory
            .next_data(range.start())
            .map(|data| data.start())
            .filter(|data| *data < range.end());
        let Some(data) = data else {
            for (index, _) in window.iter().enumerate().filter(|(_, wanted)| **wanted) {
                found(first.saturating_add(index));
            }
            continue;
        };
        let len = usize::try_from(range.len()).unwrap_or(0);
        let mapped = memory.map(range.start(), len)?;
        let bytes = if let Some(mapped) = &mapped {
            mapped.bytes()
        } else {
            buffer.resize(len, 0);
            memory.read(range.start(), &mut buffer)?;
            GuestBytes::from_slice(&buffer)
        };
        let hole = usize::try_from(data.offset_from(range.start()).unwrap_or(0)).unwrap_or(0);
        let wanted = window.iter().enumerate().skip(lead);
        for ((index, wanted), offset) in wanted.zip((0..len).step_by(page)) {
            if !wanted {
                continue;
            }
            let in_hole = offset.saturating_add(page) <= hole;
            if in_hole || bytes.get(offset, page).is_some_and(|page| page.is_zero()) {
                found(first.saturating_add(index));
            }
        }
        drop(mapped);
        memory.release(range);
    }
    Ok(())
}
