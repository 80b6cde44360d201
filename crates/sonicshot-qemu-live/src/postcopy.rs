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

use crate::error::QemuError;
use crate::pages::{self, Places};
use crate::record::{Small, offsets};
use crate::stream::{PAGE, Stream, device_sections};
use crate::tables::RamBlock;
use sonicshot::work::map_in_order;
use sonicshot::{GpaRange, to_usize};
use sonicshot_serve::{Content, PageSource, ServeError};
use std::collections::{HashMap, VecDeque};
use std::io::{self, BufWriter, Read, Write};
use std::num::NonZeroUsize;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread::Builder;
use std::time::Duration;

/// The most that is on its way, in bytes: a page that is asked for waits behind it.
const SEND_BUFFER: usize = 128 << 10;
/// Ranges that are read ahead.
const AHEAD: usize = 16;
/// The most requests that wait for an answer.
const MAX_REQUESTS: usize = 1 << 16;
/// The longest request, in bytes: a huge page of 1 GiB.
const MAX_REQUEST: u64 = 1 << 30;

const SHUT: u16 = 1;
const PONG: u16 = 2;
const REQUEST_NAMED: u16 = 3;
const REQUEST: u16 = 4;

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
    /// The number of threads that decompress.
    pub threads: NonZeroUsize,
}

/// The pages that QEMU asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Request {
    block: String,
    offset: u64,
    len: u64,
}

/// QEMU's messages so far.
#[derive(Debug, Default)]
struct Said {
    requests: VecDeque<Request>,
    /// Whether all was well, once it says so.
    end: Option<bool>,
    /// The reason why nothing more comes.
    failed: Option<io::Error>,
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl Server<'_> {
    /// Serves a QEMU that waits for a guest, until it has all.
    pub(crate) fn serve(&self, socket: &UnixStream) -> Result<(), QemuError> {
        let sending = QemuError::system("sending the guest to QEMU");
        rustix::net::sockopt::set_socket_send_buffer_size(socket, SEND_BUFFER)
            .map_err(|error| sending(error.into()))?;
        let said = Mutex::new(Said::default());
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let no_thread = QemuError::system("starting a thread");
            let hearing = Builder::new().spawn_scoped(scope, || hear(socket, &said));
            hearing.map_err(&no_thread)?;
            let (ahead, pages) = sync_channel(AHEAD);
            let reading = &over;
            let reading =
                Builder::new().spawn_scoped(scope, move || self.read_ahead(&ahead, reading));
            let served = match reading {
                Ok(_) => self.send(socket, &said, &pages),
                Err(error) => Err(no_thread(error)),
            };
            over.store(true, Ordering::Relaxed);
            // Who reads ahead must come to an end, and who listens.
            drop(pages);
            let _ = socket.shutdown(std::net::Shutdown::Both);
            served
        })
    }

    /// Reads all pages that are not zero, on several threads, and hands them on in their order.
    fn read_ahead(
        &self,
        to: &SyncSender<Result<(GpaRange, Vec<u8>), ServeError>>,
        over: &AtomicBool,
    ) {
        /// That nobody wants more.
        struct Over;
        let regions = self.source.layout().regions().iter();
        let all = regions.flat_map(|region| pages::runs(self.source, *region));
        // Nobody hears of it where it ends.
        let _ = map_in_order(
            self.threads,
            all.filter(|found| !matches!(found, Ok((_, Content::Fill(0))))),
            || (),
            |(), found| {
                let found = found?;
                let bytes = pages::bytes(self.source, &found)?;
                Ok((found.0, bytes))
            },
            |read| {
                let failed = read.is_err();
                match over.load(Ordering::Relaxed) || to.send(read).is_err() || failed {
                    true => Err(Over),
                    false => Ok(()),
                }
            },
        );
    }

    fn send(
        &self,
        socket: &UnixStream,
        said: &Mutex<Said>,
        ahead: &Receiver<Result<(GpaRange, Vec<u8>), ServeError>>,
    ) -> Result<(), QemuError> {
        let sending = QemuError::system("sending the guest to QEMU");
        let mut stream = self.head(socket).map_err(&sending)?;
        let mut sent = Sent::new(&self.blocks);
        // The small blocks' pages went with the head.
        for small in self.small {
            for offset in offsets(&small.runs) {
                sent.mark(&small.block.name, offset);
            }
        }
        loop {
            self.answer(said, &mut stream, &mut sent)?;
            let next = match ahead.try_recv() {
                Err(TryRecvError::Empty) => {
                    stream.flush().map_err(&sending)?;
                    match ahead.recv_timeout(Duration::from_millis(1)) {
                        Err(RecvTimeoutError::Timeout) => continue,
                        Err(RecvTimeoutError::Disconnected) => break,
                        Ok(next) => next,
                    }
                }
                Err(TryRecvError::Disconnected) => break,
                Ok(next) => next,
            };
            let (range, bytes) = next.map_err(QemuError::Pages)?;
            self.send_range(range, &bytes, &mut stream, &mut sent, said)?;
        }
        self.answer(said, &mut stream, &mut sent)?;
        stream.end_pages().map_err(&sending)?;
        stream.end_of_postcopy().map_err(&sending)?;
        wait_for_end(said, &sent)
    }

    /// All that goes before the pages that are asked for.
    fn head<'s>(&self, socket: &'s UnixStream) -> io::Result<Stream<BufWriter<&'s UnixStream>>> {
        let out = BufWriter::with_capacity(SEND_BUFFER / 2, socket);
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

    /// Sends a range that was read ahead, host page by host page, as far as it was not sent.
    fn send_range(
        &self,
        range: GpaRange,
        bytes: &[u8],
        stream: &mut Stream<impl Write>,
        sent: &mut Sent,
        said: &Mutex<Said>,
    ) -> Result<(), QemuError> {
        let sending = QemuError::system("sending pages to QEMU");
        let (mut range, mut rest) = (range, bytes);
        while !range.is_empty() {
            let nowhere = || sending(invalid("guest memory that is in none of QEMU's blocks"));
            let (part, name, offset) = self.places.of(&range).ok_or_else(nowhere)?;
            let len = usize::try_from(part.len()).map_err(|_| nowhere())?;
            let (now, later) = rest.split_at_checked(len).ok_or_else(nowhere)?;
            let whole = sent.page_size(name).ok_or_else(nowhere)?;
            if whole == 4096 {
                for (number, page) in (0_u64..).zip(now.chunks(PAGE)) {
                    let inside = number.checked_mul(4096);
                    let at = inside.and_then(|inside| offset.checked_add(inside));
                    let at = at.ok_or_else(nowhere)?;
                    if sent.mark(name, at) {
                        stream.page(name, at, page).map_err(&sending)?;
                    }
                }
            } else {
                let end = offset.checked_add(part.len()).ok_or_else(nowhere)?;
                let mut at = begin_of(offset, whole).ok_or_else(nowhere)?;
                while at < end {
                    self.send_whole(name, at, whole, stream, sent)?;
                    // One of them is as much as many answers.
                    self.answer(said, stream, sent)?;
                    at = at.checked_add(whole).ok_or_else(nowhere)?;
                }
            }
            range = GpaRange::new(part.end(), range.end());
            rest = later;
        }
        Ok(())
    }

    /// Answers all that was asked for.
    fn answer(
        &self,
        said: &Mutex<Said>,
        stream: &mut Stream<impl Write>,
        sent: &mut Sent,
    ) -> Result<(), QemuError> {
        let listening = QemuError::system("hearing what QEMU asks for");
        let mut any = false;
        loop {
            let request = {
                let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(error) = said.failed.take() {
                    return Err(listening(error));
                }
                if said.end == Some(false) {
                    return Err(listening(invalid(
                        "QEMU says that the migration has failed",
                    )));
                }
                said.requests.pop_front()
            };
            let Some(request) = request else { break };
            let whole = sent.page_size(&request.block);
            let whole = whole.ok_or_else(|| listening(invalid("a page of no block")))?;
            let end = request.offset.checked_add(request.len);
            let end = end.ok_or_else(|| listening(invalid("a page beyond 64 bits")))?;
            let at = begin_of(request.offset, whole);
            let mut at = at.ok_or_else(|| listening(invalid("a page of no bytes")))?;
            while at < end {
                self.send_whole(&request.block, at, whole, stream, sent)?;
                let next = at.checked_add(whole);
                at = next.ok_or_else(|| listening(invalid("a page beyond 64 bits")))?;
            }
            any = true;
        }
        if any {
            stream
                .flush()
                .map_err(QemuError::system("sending pages to QEMU"))?;
        }
        Ok(())
    }

    /// Sends a page of QEMU's, all of it, if it was not sent.
    fn send_whole(
        &self,
        block: &str,
        at: u64,
        whole: u64,
        stream: &mut Stream<impl Write>,
        sent: &mut Sent,
    ) -> Result<(), QemuError> {
        let sending = QemuError::system("sending pages to QEMU");
        if !sent.has_room(block, at, whole) {
            return Err(sending(invalid("QEMU asks for a page beyond its block")));
        }
        if !sent.mark(block, at) {
            return Ok(());
        }
        for small in (0..whole).step_by(PAGE) {
            let offset = at.checked_add(small);
            let offset = offset.ok_or_else(|| sending(invalid("a page beyond 64 bits")))?;
            // What is in no place of the guest is a small block's, and was zero.
            let bytes = match self.places.gpa_of(block, offset, 4096) {
                Some(range) => self.bytes_of(range).map_err(QemuError::Pages)?,
                None => None,
            };
            match bytes {
                Some(bytes) => stream.page(block, offset, &bytes).map_err(&sending)?,
                None => stream.zero_page(block, offset).map_err(&sending)?,
            }
        }
        Ok(())
    }

    /// The bytes of a page; `None` if it is zero.
    fn bytes_of(&self, range: GpaRange) -> Result<Option<Vec<u8>>, ServeError> {
        let run = self.source.run_at(range.start())?;
        match run.content {
            Content::Fill(0) => Ok(None),
            content => pages::bytes(self.source, &(range, content)).map(Some),
        }
    }
}

/// Waits until QEMU says that all was well.
fn wait_for_end(said: &Mutex<Said>, sent: &Sent) -> Result<(), QemuError> {
    const EVERY: Duration = Duration::from_millis(2);
    const PATIENCE: u32 = 30_000;
    let listening = QemuError::system("hearing what QEMU says at the end");
    for _ in 0..PATIENCE {
        {
            let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
            match (said.end, said.failed.take()) {
                // What it asked for last it was sent all the same, if there is such a page.
                (Some(true), _) if said.requests.iter().all(|asked| sent.knows(asked)) => {
                    return Ok(());
                }
                (Some(true), _) => {
                    return Err(listening(invalid("QEMU asks for a page that it has not")));
                }
                (Some(false), _) => {
                    return Err(listening(invalid(
                        "QEMU says that the migration has failed",
                    )));
                }
                (None, Some(error)) => return Err(listening(error)),
                (None, None) => {}
            }
        }
        std::thread::sleep(EVERY);
    }
    Err(listening(io::ErrorKind::TimedOut.into()))
}

/// Hears all that QEMU says.
fn hear(mut socket: &UnixStream, said: &Mutex<Said>) {
    let mut last = None;
    loop {
        let heard = message(&mut socket, &mut last);
        let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
        match heard {
            Ok(Heard::Request(request)) if said.requests.len() < MAX_REQUESTS => {
                said.requests.push_back(request);
            }
            Ok(Heard::Request(_)) => {
                said.failed = Some(invalid("QEMU asks for more pages than it can wait for"));
                return;
            }
            Ok(Heard::End(well)) => {
                said.end = Some(well);
                return;
            }
            Ok(Heard::Nothing) => {}
            Err(error) => {
                said.failed = Some(error);
                return;
            }
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Heard {
    Request(Request),
    End(bool),
    Nothing,
}

/// The next message; `last` is the block of the last request.
fn message(from: &mut impl Read, last: &mut Option<String>) -> io::Result<Heard> {
    let kind = number::<2>(from)?;
    let len = number::<2>(from)?;
    let mut body = vec![0; usize::from(u16::from_be_bytes(len))];
    from.read_exact(&mut body)?;
    let mut body = body.as_slice();
    match u16::from_be_bytes(kind) {
        SHUT => Ok(Heard::End(number::<4>(&mut body)? == [0; 4])),
        PONG => Ok(Heard::Nothing),
        kind @ (REQUEST_NAMED | REQUEST) => {
            let offset = u64::from_be_bytes(number(&mut body)?);
            let len = u64::from(u32::from_be_bytes(number(&mut body)?));
            if kind == REQUEST_NAMED {
                let [name_len] = number::<1>(&mut body)?;
                let name = body.get(..usize::from(name_len));
                let name = name.and_then(|name| str::from_utf8(name).ok());
                *last = Some(
                    name.ok_or_else(|| invalid("a block's name that is none"))?
                        .into(),
                );
            }
            let block = last
                .clone()
                .ok_or_else(|| invalid("a page of a block without a name"))?;
            if len == 0 || len > MAX_REQUEST {
                return Err(invalid("a request of an invalid length"));
            }
            Ok(Heard::Request(Request { block, offset, len }))
        }
        _ => Err(invalid("a message of QEMU's that is not known")),
    }
}

fn number<const N: usize>(from: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Reads all messages that are in `data`.
pub(crate) fn fuzz(mut data: &[u8]) {
    let mut last = None;
    while !data.is_empty() && message(&mut data, &mut last).is_ok() {}
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

    /// Notes that the page at `at` is sent; whether it was not before.
    fn mark(&mut self, block: &str, at: u64) -> bool {
        let Some(block) = self.blocks.get_mut(block) else {
            return false;
        };
        let Some(page) = at.checked_div(block.page_size) else {
            return false;
        };
        let word = usize::try_from(page / 64).ok();
        let Some(word) = word.and_then(|word| block.bits.get_mut(word)) else {
            return false;
        };
        let bit = 1 << (page % 64);
        let new = *word & bit == 0;
        *word |= bit;
        new
    }
}

#[cfg(test)]
mod tests {
    use super::{Heard, MAX_REQUEST, MAX_REQUESTS, Request, Said, Sent, Server, hear, message};
    use crate::find::Piece;
    use crate::pages::Places;
    use crate::tables::RamBlock;
    use sonicshot::checkpoint::{CheckpointInfo, CheckpointReader, CheckpointWriter, SaveOptions};
    use sonicshot::{
        DropClasses, Fill, Gpa, GuestBytes, GuestMemory, MappedRegions, PageMap, PageSize,
        PrunePlan,
    };
    use sonicshot_serve::CheckpointSource;
    use std::io::{Read, Write};
    use std::num::NonZeroUsize;
    use std::os::unix::net::UnixStream;
    use std::sync::{Arc, Mutex};

    fn said(kind: u16, body: &[u8]) -> Vec<u8> {
        let mut out = kind.to_be_bytes().to_vec();
        out.extend(u16::try_from(body.len()).unwrap().to_be_bytes());
        out.extend(body);
        out
    }

    fn request(name: Option<&str>, offset: u64, len: u32) -> Vec<u8> {
        let mut body = offset.to_be_bytes().to_vec();
        body.extend(len.to_be_bytes());
        if let Some(name) = name {
            body.push(u8::try_from(name.len()).unwrap());
            body.extend(name.as_bytes());
        }
        said(if name.is_some() { 3 } else { 4 }, &body)
    }

    #[test]
    fn what_qemu_says_is_read_or_refused() {
        let mut all = request(Some("ram0"), 0x5000, 4096);
        all.extend(request(None, 0x7000, 4096));
        all.extend(said(2, &[0; 4]));
        all.extend(said(1, &[0; 4]));
        let (mut from, mut last) = (all.as_slice(), None);
        let one = |offset| {
            let block = "ram0".into();
            Heard::Request(Request {
                block,
                offset,
                len: 4096,
            })
        };
        for expected in [one(0x5000), one(0x7000), Heard::Nothing, Heard::End(true)] {
            assert_eq!(message(&mut from, &mut last).unwrap(), expected);
        }
        let long = u32::try_from(MAX_REQUEST).unwrap();
        assert!(message(&mut request(Some("x"), 0, long).as_slice(), &mut None).is_ok());
        for wrong in [
            request(None, 0, 4096),
            request(Some("x"), 0, 0),
            request(Some("x"), 0, long + 1),
            said(3, &[0; 12]),
            said(3, &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 9, b'x']),
            said(77, &[]),
            said(1, &[]),
            vec![0, 1, 0],
        ] {
            assert!(
                message(&mut wrong.as_slice(), &mut None).is_err(),
                "{wrong:?}"
            );
        }
    }

    #[test]
    fn who_asks_without_end_is_refused() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let heard = Mutex::new(Said::default());
        std::thread::scope(|scope| {
            let heard = &heard;
            scope.spawn(move || hear(&theirs, heard));
            for number in 0..=MAX_REQUESTS as u64 {
                if ours
                    .write_all(&request(Some("x"), number << 12, 4096))
                    .is_err()
                {
                    break;
                }
            }
        });
        let heard = heard.into_inner().unwrap();
        assert_eq!(heard.requests.len(), MAX_REQUESTS);
        assert!(heard.failed.is_some());
    }

    #[test]
    fn a_page_is_sent_once() {
        let block = RamBlock {
            name: "x".into(),
            page_size: 2 << 20,
            used: 4 << 20,
            total: 4 << 20,
            address: None,
        };
        let mut sent = Sent::new(&[&block]);
        assert!(sent.mark("x", 0));
        assert!(!sent.mark("x", 4096), "of the same huge page");
        assert!(sent.mark("x", 2 << 20));
        assert!(!sent.mark("y", 0));
        assert!(sent.has_room("x", 2 << 20, 2 << 20));
        assert!(!sent.has_room("x", 4 << 20, 1));
        assert!(!sent.has_room("x", u64::MAX, 2));
    }

    /// All that comes of a guest of 64 pages, of which every other is zero, to a QEMU that asks for
    /// these, and says at the end that all was well or not.
    fn served(requests: &[Vec<u8>], end: u8) -> (Vec<u8>, Result<(), String>) {
        let mut ram = vec![0; 64 * 4096];
        for page in (0..64).step_by(2) {
            ram[page * 4096..(page + 1) * 4096].fill(u8::try_from(page + 1).unwrap());
        }
        let memory = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(&ram))]).unwrap();
        let map = PageMap::new(memory.layout(), PageSize::SIZE_4K);
        let plan = PrunePlan::new(&map, &DropClasses::default(), Fill::Zero);
        let info = CheckpointInfo::new(memory.layout().clone(), PageSize::SIZE_4K);
        let file = tempfile::tempfile().unwrap();
        let out = file.try_clone().unwrap();
        let mut writer = CheckpointWriter::new(out, info, SaveOptions::default()).unwrap();
        writer.memory(&memory, &map, &plan).unwrap();
        writer.finish().unwrap();
        let reader = CheckpointReader::new(file).unwrap();
        let source = CheckpointSource::new(reader, 0, Arc::default());
        let block = RamBlock {
            name: "ram0".into(),
            page_size: 4096,
            used: 64 * 4096,
            total: 64 * 4096,
            address: None,
        };
        let mut places = Places::default();
        let piece = Piece {
            offset: 0,
            gpa: 0,
            len: block.used,
        };
        places.add("ram0", &[piece]).unwrap();
        let server = Server {
            source: &source,
            places: &places,
            blocks: vec![&block],
            small: &[],
            devices: b"QEVM\0\0\0\x03\x04DEVICES\0",
            machine: "pc",
            page_sizes: 4096,
            threads: NonZeroUsize::new(3).unwrap(),
        };
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut asking = theirs.try_clone().unwrap();
        std::thread::scope(|scope| {
            let reading = scope.spawn(move || {
                let mut got = Vec::new();
                let _ = (&theirs).read_to_end(&mut got);
                got
            });
            for request in requests {
                asking.write_all(request).unwrap();
            }
            asking.write_all(&said(1, &[0, 0, 0, end])).unwrap();
            let result = server.serve(&ours).map_err(|error| {
                std::error::Error::source(&error).map_or(String::new(), ToString::to_string)
            });
            drop(ours);
            (reading.join().unwrap(), result)
        })
    }

    #[test]
    fn all_pages_come_and_none_twice() {
        // What is zero and asked for is sent, unless all was sent before it was heard of: then it is in
        // place, as all that was never sent.
        assert!((0..50).any(|_| all_pages_came() == 2));
    }

    /// The number of the two zero pages that were sent because they were asked for.
    fn all_pages_came() -> usize {
        let asked = [
            request(Some("ram0"), 7 << 12, 4096),
            request(None, 8 << 12, 8192),
        ];
        let (got, result) = served(&asked, 0);
        result.unwrap();
        let find = |part: &[u8]| {
            got.windows(part.len())
                .filter(|found| *found == part)
                .count()
        };
        // The block's name is in the head, in the discard, and at the first page.
        assert_eq!(find(b"ram0"), 3);
        let mut asked_for = 0;
        // Page 0's place is a number that other parts have too.
        for page in 1..64_u64 {
            let head = |flags: u64| ((page << 12) | flags).to_be_bytes();
            let pages = find(&head(0x08)) + find(&head(0x28));
            let zeroes = find(&head(0x02)) + find(&head(0x22));
            assert_eq!(pages, usize::from(page % 2 == 0), "page {page}");
            if page == 7 || page == 9 {
                assert!(zeroes <= 1, "page {page}");
                asked_for += zeroes;
            } else {
                assert_eq!(zeroes, 0, "page {page}");
            }
        }
        assert!(got.ends_with(b"\0\0\0\0\0\0\0\x10\x7e\x7f\xff\0\0\0"));
        asked_for
    }

    #[test]
    fn what_qemu_must_not_ask_for_ends_it() {
        for (asked, end) in [
            (vec![request(Some("ram0"), 64 << 12, 4096)], 0),
            (vec![request(Some("other"), 0, 4096)], 0),
            (vec![said(9, &[])], 0),
            (vec![], 1),
        ] {
            let (_, result) = served(&asked, end);
            assert!(!result.unwrap_err().is_empty(), "{asked:?}");
        }
    }
}
