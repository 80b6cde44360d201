//! The other end of a postcopy migration: QEMU runs the guest, and asks for pages as they are
//! touched.
//!
//! ```text
//!  to QEMU     head │ open the way back, ADVISE │ blocks │ small blocks │ DISCARD │
//!              PACKAGED: LISTEN, devices, RUN │ pages, those that are asked for first │ end
//!  from QEMU   what it asks for; at last whether all was well
//! ```
//!
//! QEMU must be told to discard something, or it takes what comes for the pages of an ordinary
//! migration and waits for ever. It asks for pages before it has loaded its devices, and hangs
//! until it gets them. What was never sent reads as zero once the end is there, so a page that was
//! left out costs nothing, unless it is asked for.
//!
//! One thread hears what QEMU asks for and sends, the others read ahead of it ([`ahead`]). What is
//! asked for goes before all that was read ahead: it is looked for before each write, and the thread
//! that sends reads it itself, while those that are free read what was asked for after it.
//!
//! [`ahead`]: crate::ahead

use crate::ahead::{self, Ahead, Bell, Held, MAX_AHEAD, Next};
use crate::error::QemuError;
use crate::hearing::{Hearing, Request};
use crate::pages::{self, Places};
use crate::record::{Small, offsets};
use crate::stream::{PAGE, Stream, device_sections};
use crate::tables::RamBlock;
use sonicshot::work::{Pool, with_pool};
use sonicshot::{Gpa, GpaRange, PhaseProgress, Progress, RamLayout, Tally, WorkPhase, to_usize};
use sonicshot_serve::{Content, PageSource, ServeError};
use std::collections::HashMap;
use std::io::{self, BufWriter};
use std::num::NonZeroUsize;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// The most that is on its way, in bytes: a page that is asked for waits behind it.
const SEND_BUFFER: usize = 128 << 10;
/// Pages that are sent with one write.
const PAGES_A_WRITE: usize = 16;
/// The most that these take, in bytes: of each its place, the name of its block, itself.
const A_WRITE: usize = PAGES_A_WRITE * (8 + 256 + PAGE);

const OPEN_RETURN_PATH: u16 = 1;
const ADVISE: u16 = 3;
const LISTEN: u16 = 4;
const RUN: u16 = 5;
const DISCARD: u16 = 6;
const PACKAGED: u16 = 7;

/// The source of the pages that are served.
pub(crate) struct Server<'a> {
    pub source: &'a dyn PageSource,
    pub places: &'a Places,
    /// All of QEMU's blocks: those of the guest's RAM, then the small ones.
    pub blocks: Vec<&'a RamBlock>,
    pub small: &'a [&'a Small],
    pub devices: &'a [u8],
    pub machine: &'a str,
    /// All page sizes of QEMU's blocks, added.
    pub page_sizes: u64,
    /// The number of threads that decompress, beside the one that sends.
    pub threads: NonZeroUsize,
    /// Whoever is told how far it is, on the thread that sends.
    pub progress: &'a dyn Progress,
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn to_send(error: io::Error) -> QemuError {
    QemuError::system("sending pages to QEMU")(error)
}

fn nowhere() -> QemuError {
    to_send(invalid("guest memory that is in none of QEMU's blocks"))
}

fn to_hear(error: io::Error) -> QemuError {
    QemuError::system("hearing what QEMU asks for")(error)
}

/// The bytes of RAM below `end`.
fn below(layout: &RamLayout, end: Gpa) -> u64 {
    let all = GpaRange::new(Gpa::ZERO, end);
    let parts = layout.regions().iter();
    let lens = parts.map(|region| region.intersection(&all).len());
    lens.sum::<Tally>().get()
}

impl Server<'_> {
    /// Serves a QEMU that waits for a guest, until it has all.
    pub(crate) fn serve(&self, socket: &UnixStream) -> Result<(), QemuError> {
        let sending = QemuError::system("sending the guest to QEMU");
        rustix::net::sockopt::set_socket_send_buffer_size(socket, SEND_BUFFER)
            .map_err(|error| sending(error.into()))?;
        let bell = Bell::new().map_err(QemuError::system("eventfd"))?;
        let served = with_pool(self.threads, &|| (), |pool| self.send(socket, pool, &bell));
        let _ = socket.shutdown(std::net::Shutdown::Both);
        served
    }

    fn send<'env>(
        &'env self,
        socket: &UnixStream,
        pool: &Pool<'env, ()>,
        bell: &'env Bell,
    ) -> Result<(), QemuError> {
        let sending = QemuError::system("sending the guest to QEMU");
        let mut ahead = Ahead::new(pool, self.source, bell);
        ahead.fill();
        let mut sent = Sent::new(&self.blocks);
        // The small blocks' pages go with the head.
        for small in self.small {
            for offset in offsets(&small.runs) {
                sent.mark(&small.block.name, offset);
            }
        }
        let mut out = Sending {
            server: self,
            socket,
            stream: self.head(socket).map_err(&sending)?,
            sent,
            hearing: Hearing::default(),
            unsent: 0,
            pool,
        };
        let layout = self.source.layout();
        let total = layout.bytes();
        let mut phase = PhaseProgress::begin(self.progress, WorkPhase::Restoring, total);
        loop {
            out.answer()?;
            match ahead.next().map_err(QemuError::Pages)? {
                Next::Ready(part) => {
                    for (range, held) in part {
                        out.range(range, &held)?;
                        // What lies between is zero, and not sent.
                        phase.reach(below(layout, range.end()));
                    }
                }
                Next::Waiting => {
                    out.flush()?;
                    // Once it has said its last there is nothing to be heard.
                    let other = out.hearing.end.is_none().then_some(socket);
                    bell.wait(other);
                }
                Next::End => break,
            }
        }
        out.answer()?;
        out.stream.end_pages().map_err(&sending)?;
        out.stream.end_of_postcopy().map_err(&sending)?;
        phase.end();
        out.wait_for_end()
    }

    /// All that goes before the pages that are asked for.
    fn head<'s>(&self, socket: &'s UnixStream) -> io::Result<Stream<BufWriter<&'s UnixStream>>> {
        let out = BufWriter::with_capacity(A_WRITE, socket);
        let mut stream = Stream::begin(out, self.machine)?;
        stream.command(OPEN_RETURN_PATH, &[])?;
        let sizes = [self.page_sizes.to_be_bytes(), 4096_u64.to_be_bytes()];
        stream.command(ADVISE, sizes.as_flattened())?;
        stream.blocks_for_postcopy(self.blocks.iter().copied())?;
        stream.begin_part()?;
        for small in self.small {
            for (offset, page) in offsets(&small.runs).zip(small.bytes.chunks(PAGE)) {
                stream.page(&small.block.name, offset, page)?;
            }
        }
        stream.end_pages()?;
        let first = self
            .blocks
            .first()
            .ok_or_else(|| invalid("no block of RAM"))?;
        let mut discard = vec![0];
        discard.push(u8::try_from(first.name.len()).map_err(|_| invalid("a long name"))?);
        discard.extend_from_slice(first.name.as_bytes());
        discard.push(0);
        discard.extend_from_slice(&0_u64.to_be_bytes());
        discard.extend_from_slice(&first.page_size.to_be_bytes());
        stream.command(DISCARD, &discard)?;
        let mut package = Stream::bare(Vec::new());
        package.command(LISTEN, &[])?;
        package.bytes(device_sections(self.devices).ok_or_else(|| invalid("no devices"))?)?;
        package.command(RUN, &[])?;
        let package = package.into_inner();
        let len = u32::try_from(package.len()).map_err(|_| invalid("too much of devices"))?;
        stream.command(PACKAGED, &len.to_be_bytes())?;
        stream.bytes(&package)?;
        stream.begin_pages()?;
        stream.flush()?;
        Ok(stream)
    }
}

/// The way to a QEMU that has been told to run the guest.
struct Sending<'s, 'p, 'env> {
    server: &'env Server<'env>,
    socket: &'s UnixStream,
    stream: Stream<BufWriter<&'s UnixStream>>,
    sent: Sent,
    hearing: Hearing,
    /// The number of pages that were not written yet.
    unsent: usize,
    pool: &'p Pool<'env, ()>,
}

impl Sending<'_, '_, '_> {
    fn flush(&mut self) -> Result<(), QemuError> {
        self.unsent = 0;
        self.stream.flush().map_err(to_send)
    }

    /// Sends a range that was read ahead, host page by host page, as far as it was not sent.
    fn range(&mut self, range: GpaRange, held: &Held) -> Result<(), QemuError> {
        let places = self.server.places;
        let mut rest = range;
        while !rest.is_empty() {
            let (part, name, offset) = places.of(&rest).ok_or_else(nowhere)?;
            let whole = self.sent.page_size(name).ok_or_else(nowhere)?;
            let end = offset.checked_add(part.len()).ok_or_else(nowhere)?;
            let mut at = begin_of(offset, whole).ok_or_else(nowhere)?;
            while at < end {
                if whole == 4096 {
                    let inside = part.start().offset_from(range.start());
                    let inside =
                        inside.and_then(|inside| inside.checked_add(at.checked_sub(offset)?));
                    let inside = inside.and_then(|inside| usize::try_from(inside).ok());
                    let page = inside.and_then(|inside| held.page(inside));
                    self.page(name, at, page.ok_or_else(nowhere)?)?;
                } else {
                    self.whole(name, at, whole)?;
                    // One of them is as much as many answers.
                    self.flush()?;
                    self.answer()?;
                }
                at = at.checked_add(whole).ok_or_else(nowhere)?;
            }
            rest = GpaRange::new(part.end(), rest.end());
        }
        Ok(())
    }

    /// Sends a page of 4 KiB that was read ahead, if it was not sent. What QEMU asks for is heard
    /// before the next write.
    fn page(&mut self, block: &str, at: u64, page: &[u8]) -> Result<(), QemuError> {
        if !self.sent.mark(block, at) {
            return Ok(());
        }
        self.stream.page(block, at, page).map_err(to_send)?;
        self.unsent = self.unsent.checked_add(1).ok_or_else(nowhere)?;
        if self.unsent < PAGES_A_WRITE {
            return Ok(());
        }
        self.flush()?;
        self.answer()
    }

    /// Answers all that was asked for.
    fn answer(&mut self) -> Result<(), QemuError> {
        self.hearing.hear(self.socket).map_err(to_hear)?;
        if self.hearing.end == Some(false) {
            let failed = invalid("QEMU says that the migration has failed");
            return Err(to_hear(failed));
        }
        for later in self
            .hearing
            .requests
            .iter()
            .skip(1)
            .take(self.pool.threads())
        {
            self.urge(later);
        }
        while let Some(request) = self.hearing.requests.pop_front() {
            self.request(&request)?;
            // What was asked for is not kept back for what was asked for later.
            self.flush()?;
            if let Some(later) = self.hearing.requests.get(self.pool.threads()) {
                self.urge(later);
            }
        }
        Ok(())
    }

    fn request(&mut self, request: &Request) -> Result<(), QemuError> {
        let whole = self.sent.page_size(&request.block);
        let whole = whole.ok_or_else(|| to_hear(invalid("a page of no block")))?;
        let beyond = || to_hear(invalid("a page beyond 64 bits"));
        let end = request.offset.checked_add(request.len);
        let end = end.ok_or_else(beyond)?;
        let at = begin_of(request.offset, whole);
        let mut at = at.ok_or_else(|| to_hear(invalid("a page of no bytes")))?;
        while at < end {
            self.whole(&request.block, at, whole)?;
            at = at.checked_add(whole).ok_or_else(beyond)?;
        }
        Ok(())
    }

    /// Sends a page of QEMU's, all of it, if it was not sent.
    fn whole(&mut self, block: &str, at: u64, whole: u64) -> Result<(), QemuError> {
        if !self.sent.has_room(block, at, whole) {
            return Err(to_send(invalid("QEMU asks for a page beyond its block")));
        }
        if !self.sent.mark(block, at) {
            return Ok(());
        }
        if whole > 4096 {
            self.urge_all(block, at, whole);
        }
        let server = self.server;
        for small in (0..whole).step_by(PAGE) {
            let offset = at.checked_add(small);
            let offset = offset.ok_or_else(|| to_send(invalid("a page beyond 64 bits")))?;
            // What is in no place of the guest is a small block's, and was zero.
            let page = match server.places.gpa_of(block, offset, 4096) {
                Some(range) => server.read(range).map_err(QemuError::Pages)?,
                None => None,
            };
            let page = page.as_ref().map(|held| held.page(0).ok_or_else(nowhere));
            match page.transpose()? {
                Some(page) => self.stream.page(block, offset, page),
                None => self.stream.zero_page(block, offset),
            }
            .map_err(to_send)?;
        }
        Ok(())
    }

    /// Has a thread that is free read what is asked for.
    fn urge(&self, asked: &Request) {
        if let Some(whole) = self.sent.page_size(&asked.block)
            && let Some(at) = begin_of(asked.offset, whole)
            && !self.sent.is_sent(&asked.block, at)
        {
            self.urge_at(&asked.block, at);
        }
    }

    /// Has the chunks of a page of QEMU's read on several threads, but for the first.
    fn urge_all(&self, block: &str, at: u64, whole: u64) {
        let server = self.server;
        if self.pool.threads() > 0
            && let Some(range) = server.places.gpa_of(block, at, whole)
        {
            let runs = pages::runs(server.source, range).map_while(Result::ok);
            let runs = runs.filter(|found| found.1 == Content::Bytes);
            let runs: Vec<_> = runs.skip(1).take(MAX_AHEAD).collect();
            // The last that is handed over is the first.
            for (range, _) in runs.into_iter().rev() {
                self.read_first(range);
            }
        }
    }

    fn urge_at(&self, block: &str, at: u64) {
        let server = self.server;
        if let Some(range) = server.places.gpa_of(block, at, 4096)
            && let Ok(run) = server.source.run_at(range.start())
            && run.content == Content::Bytes
        {
            self.read_first(range);
        }
    }

    /// Has a range read for the source to keep it. What is wrong with it is told when it is sent.
    fn read_first(&self, range: GpaRange) {
        let source = self.server.source;
        if self.pool.threads() > 0 {
            drop(self.pool.submit_first(move |()| {
                let _ = source.read(range, &mut Vec::new());
            }));
        }
    }

    /// Waits until QEMU says that all was well.
    fn wait_for_end(&mut self) -> Result<(), QemuError> {
        const PATIENCE: Duration = Duration::from_secs(60);
        let listening = QemuError::system("hearing what QEMU says at the end");
        let began = Instant::now();
        loop {
            self.hearing.hear(self.socket).map_err(&listening)?;
            let mut asked = self.hearing.requests.iter();
            match self.hearing.end {
                // What it asked for last it was sent all the same, if there is such a page.
                Some(true) if asked.all(|asked| self.sent.knows(asked)) => return Ok(()),
                Some(true) => {
                    return Err(listening(invalid("QEMU asks for a page that it has not")));
                }
                Some(false) => {
                    return Err(listening(invalid(
                        "QEMU says that the migration has failed",
                    )));
                }
                None => {}
            }
            let left = PATIENCE.checked_sub(began.elapsed());
            let left = left.ok_or_else(|| listening(io::ErrorKind::TimedOut.into()))?;
            ahead::wait_for(self.socket, left);
        }
    }
}

impl Server<'_> {
    /// The bytes of a page; `None` if it is zero.
    fn read(&self, range: GpaRange) -> Result<Option<Held>, ServeError> {
        match self.source.run_at(range.start())?.content {
            Content::Fill(0) => Ok(None),
            content => ahead::hold(self.source, &(range, content)).map(Some),
        }
    }
}

/// The start of the page of `len` bytes that holds `at`.
fn begin_of(at: u64, len: u64) -> Option<u64> {
    at.checked_sub(at.checked_rem(len)?)
}

/// The pages of QEMU that were sent: none is sent twice.
struct Sent {
    blocks: HashMap<String, SentBlock>,
}

struct SentBlock {
    page_size: u64,
    used: u64,
    /// A bit for each of its pages.
    bits: Vec<u64>,
}

impl SentBlock {
    /// The word and the bit of the page at `at`.
    fn place(&self, at: u64) -> Option<(usize, u64)> {
        let page = at.checked_div(self.page_size)?;
        Some((usize::try_from(page / 64).ok()?, 1 << (page % 64)))
    }
}

impl Sent {
    fn new(blocks: &[&RamBlock]) -> Self {
        let of = |block: &&RamBlock| {
            let pages = block.used.div_ceil(block.page_size);
            let words = to_usize(pages.div_ceil(64));
            let sent = SentBlock {
                page_size: block.page_size,
                used: block.used,
                bits: vec![0; words],
            };
            (block.name.clone(), sent)
        };
        Self {
            blocks: blocks.iter().map(of).collect(),
        }
    }

    fn page_size(&self, block: &str) -> Option<u64> {
        self.blocks.get(block).map(|block| block.page_size)
    }

    /// Whether there are such pages.
    fn knows(&self, asked: &Request) -> bool {
        self.has_room(&asked.block, asked.offset, asked.len)
    }

    fn has_room(&self, block: &str, at: u64, len: u64) -> bool {
        let end = at.checked_add(len);
        let used = self.blocks.get(block).map(|block| block.used);
        end.zip(used).is_some_and(|(end, used)| end <= used)
    }

    /// Whether the page at `at` was sent.
    fn is_sent(&self, block: &str, at: u64) -> bool {
        let block = self.blocks.get(block);
        let word = block.and_then(|block| {
            let (word, bit) = block.place(at)?;
            Some(block.bits.get(word)? & bit != 0)
        });
        word == Some(true)
    }

    /// Notes that the page at `at` is sent; whether it was not before.
    fn mark(&mut self, block: &str, at: u64) -> bool {
        let Some(block) = self.blocks.get_mut(block) else {
            return false;
        };
        let Some((word, bit)) = block.place(at) else {
            return false;
        };
        let Some(word) = block.bits.get_mut(word) else {
            return false;
        };
        let new = *word & bit == 0;
        *word |= bit;
        new
    }
}

#[cfg(test)]
mod tests;
