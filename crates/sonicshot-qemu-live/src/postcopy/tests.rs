use super::{Sent, Server};
use crate::ahead::{MAX_AHEAD, parts};
use crate::error::QemuError;
use crate::find::Piece;
use crate::hearing::tests::{request, said};
use crate::pages::Places;
use crate::restore::at_once;
use crate::tables::RamBlock;
use sonicshot::checkpoint::{CheckpointInfo, CheckpointReader, CheckpointWriter};
use sonicshot::checkpoint::{Compression, SaveOptions};
use sonicshot::work::{Pool, with_pool};
use sonicshot::{DropClasses, Fill, Gpa, GpaRange, GuestBytes, GuestMemory, MappedRegions};
use sonicshot::{PageMap, PageSize, PrunePlan, RamLayout};
use sonicshot_serve::{CheckpointSource, PageSource, Piece as Bytes, Run, ServeError};
use std::fs;
use std::io::{Read, Write};
use std::num::NonZeroUsize;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::thread::{Builder, current};
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
const CODECS: [Compression; 3] = [Compression::None, Compression::Lz4, Compression::ZSTD];

type Source = CheckpointSource<Vec<u8>>;

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
    assert!(!sent.is_sent("x", 0));
    assert!(sent.mark("x", 0));
    assert!(sent.is_sent("x", 4096) && !sent.is_sent("x", 2 << 20));
    assert!(!sent.mark("x", 4096), "of the same huge page");
    assert!(sent.mark("x", 2 << 20));
    assert!(!sent.mark("y", 0));
    assert!(sent.has_room("x", 2 << 20, 2 << 20));
    assert!(!sent.has_room("x", 4 << 20, 1));
    assert!(!sent.has_room("x", u64::MAX, 2));
}

/// Pages that no other is like.
fn ram(pages: usize) -> Vec<u8> {
    let mut seed = 7_u64;
    let words = (0..pages * PAGE / 8).map(|at| {
        seed = seed.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        // Half of it compresses.
        if at % 2 == 0 { seed } else { 1 }
    });
    words.flat_map(u64::to_le_bytes).collect()
}

/// Every other page is zero, and some are one word over and over.
fn sparse(pages: usize) -> Vec<u8> {
    let mut ram = ram(pages);
    for (number, page) in ram.chunks_mut(PAGE).enumerate() {
        match number {
            100..200 => page.fill(0xaa),
            _ if number % 2 == 1 => page.fill(0),
            _ => {}
        }
    }
    ram
}

fn saved(ram: &[u8], compression: Compression, chunk: u32) -> Vec<u8> {
    let memory = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(ram))]).unwrap();
    let map = PageMap::new(memory.layout(), PageSize::SIZE_4K);
    let plan = PrunePlan::new(&map, &DropClasses::default(), Fill::Zero);
    let info = CheckpointInfo::new(memory.layout().clone(), PageSize::SIZE_4K);
    let options = SaveOptions::new(compression).chunk_size(chunk);
    let mut writer = CheckpointWriter::new(Vec::new(), info, options).unwrap();
    writer.memory(&memory, &map, &plan).unwrap();
    writer.finish().unwrap().0
}

fn source(checkpoint: Vec<u8>, cache: u64) -> Source {
    let reader = CheckpointReader::new(checkpoint).unwrap();
    CheckpointSource::new(reader, cache, Arc::default())
}

fn threads(count: usize) -> NonZeroUsize {
    NonZeroUsize::new(count).unwrap()
}

/// Serves a guest to the QEMU at the other end, with pages of `page_size`.
fn serve_on(
    ours: &UnixStream,
    source: &dyn PageSource,
    page_size: u64,
    count: usize,
) -> Result<(), QemuError> {
    let len = source.layout().regions().iter().map(GpaRange::len).sum();
    let block = RamBlock {
        name: "ram0".into(),
        page_size,
        used: len,
        total: len,
        address: None,
    };
    let mut places = Places::default();
    let piece = Piece {
        offset: 0,
        gpa: 0,
        len,
    };
    places.add("ram0", &[piece]).unwrap();
    let server = Server {
        source,
        places: &places,
        blocks: vec![&block],
        small: &[],
        devices: b"QEVM\0\0\0\x03\x04DEVICES\0",
        machine: "pc",
        page_sizes: page_size,
        threads: threads(count),
        progress: &None,
    };
    server.serve(ours)
}

/// The same to a QEMU that is `peer`.
fn serve<R: Send>(
    source: &dyn PageSource,
    page_size: u64,
    count: usize,
    peer: impl FnOnce(UnixStream) -> R + Send,
) -> (R, Result<(), QemuError>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        let peer = scope.spawn(move || peer(theirs));
        let result = serve_on(&ours, source, page_size, count);
        drop(ours);
        (peer.join().unwrap(), result)
    })
}

/// QEMU's end: takes page by page.
struct Peer(UnixStream);

impl Peer {
    /// Takes all that comes before the pages.
    fn new(socket: UnixStream) -> Self {
        let mut peer = Self(socket);
        let mut head = Vec::new();
        while !head.ends_with(b"\x08\0\x05\0\0\x03\x7f\xff\0\0") {
            let [byte] = peer.take::<1>().unwrap();
            head.push(byte);
        }
        peer
    }

    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        self.0.read_exact(&mut bytes).ok()?;
        Some(bytes)
    }

    /// The next page's number, and what it holds if that is not zero; `None` at the end, or if no
    /// more comes.
    fn page(&mut self) -> Option<(usize, Option<Vec<u8>>)> {
        let place = u64::from_be_bytes(self.take()?);
        if place & 0x10 != 0 {
            return None;
        }
        if place & 0x20 == 0 {
            let [len] = self.take::<1>()?;
            self.0.read_exact(&mut vec![0; usize::from(len)]).ok()?;
        }
        let number = usize::try_from(place >> 12).unwrap();
        if place & 0x02 != 0 {
            assert_eq!(self.take(), Some([0]));
            return Some((number, None));
        }
        Some((number, Some(self.take::<PAGE>()?.to_vec())))
    }

    /// All pages that are left; QEMU says that all was well.
    fn rest(&mut self) -> Vec<(usize, Option<Vec<u8>>)> {
        let all = std::iter::from_fn(|| self.page()).collect();
        let _ = self.0.write_all(&said(1, &[0; 4]));
        all
    }

    fn ask(&mut self, pages: &[usize]) {
        let all = pages.iter().map(|page| (*page as u64) << 12);
        let all: Vec<u8> = all.flat_map(|at| request(Some("ram0"), at, 4096)).collect();
        self.0.write_all(&all).unwrap();
    }
}

/// Each page of `ram` that is not zero came once, and none that is.
fn check_pages(ram: &[u8], mut got: Vec<(usize, Option<Vec<u8>>)>) {
    got.sort();
    let all = ram.chunks(PAGE).map(<[u8]>::to_vec).enumerate();
    let all = all.filter(|(_, page)| page.iter().any(|byte| *byte != 0));
    let all: Vec<_> = all.map(|(number, page)| (number, Some(page))).collect();
    assert!(got == all, "{} of {} pages", got.len(), all.len());
}

#[test]
fn the_pages_are_the_same_with_any_number_of_threads() {
    let ram = sparse(1024);
    for codec in CODECS {
        let checkpoint = saved(&ram, codec, 64 << 10);
        for cache in [0, 64 << 20] {
            let source = source(checkpoint.clone(), cache);
            for count in [1, 2, 8] {
                let peer = |socket| Peer::new(socket).rest();
                let (got, result) = serve(&source, 4096, count, peer);
                result.unwrap();
                assert!(got.is_sorted(), "{codec:?}, {count} threads");
                check_pages(&ram, got);
            }
        }
    }
}

#[test]
fn huge_pages_come_whole() {
    let ram = sparse(2048);
    let source = source(saved(&ram, Compression::ZSTD, 64 << 10), 64 << 20);
    for count in [1, 2, 8] {
        let (got, result) = serve(&source, 2 << 20, count, |socket| {
            let mut peer = Peer::new(socket);
            peer.ask(&[512 * 3 + 7]);
            peer.rest()
        });
        result.unwrap();
        for (number, (page, _)) in got.iter().enumerate() {
            // All of one before the next.
            let first = got[number / 512 * 512].0;
            assert_eq!((first % 512, *page), (0, first + number % 512));
        }
        let not_zero = got.into_iter().filter(|(_, page)| page.is_some());
        check_pages(&ram, not_zero.collect());
    }
}

#[test]
fn all_of_a_chunk_is_read_by_one_thread() {
    let mut ram = ram(1024);
    for page in ram.chunks_mut(PAGE).step_by(2) {
        page.fill(0);
    }
    let source = source(saved(&ram, Compression::Lz4, 64 << 10), 0);
    assert_eq!(source.reader().chunk_count(), 32);
    let parts: Vec<_> = parts(&source).map(Result::unwrap).collect();
    assert_eq!(parts.len(), 32);
    assert!(parts.iter().all(|part| part.len() == 16));
}

/// A source that is looked at while it is read.
struct Watched<'s> {
    inner: &'s Source,
    before: &'s (dyn Fn(GpaRange) + Sync),
    after: &'s (dyn Fn(&Bytes<'_>) + Sync),
}

impl PageSource for Watched<'_> {
    fn layout(&self) -> &RamLayout {
        self.inner.layout()
    }

    fn run_at(&self, at: Gpa) -> Result<Run, ServeError> {
        self.inner.run_at(at)
    }

    fn read<'b>(&self, range: GpaRange, buffer: &'b mut Vec<u8>) -> Result<Bytes<'b>, ServeError> {
        (self.before)(range);
        let piece = self.inner.read(range, buffer)?;
        (self.after)(&piece);
        Ok(piece)
    }

    fn block_at(&self, at: Gpa) -> Option<u64> {
        self.inner.block_at(at)
    }

    fn by_need(&self) -> Arc<[GpaRange]> {
        self.inner.by_need()
    }
}

fn wait_until(mut is: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is() {
        assert!(began.elapsed() < Duration::from_secs(20), "it never is");
        std::thread::sleep(Duration::from_micros(100));
    }
}

fn is_page(range: GpaRange, page: usize) -> bool {
    range == GpaRange::with_len(Gpa::new((page as u64) << 12), 4096).unwrap()
}

#[test]
fn what_is_asked_for_goes_before_what_was_read_ahead() {
    /// All that may be on its way: the system's buffer, of twice what it was told, and two writes.
    const ON_ITS_WAY: usize = 2 * super::SEND_BUFFER / PAGE + 2 * super::PAGES_A_WRITE;
    let ram = ram(4096);
    // As much as a chunk may have that is not 16 pages: it is sent as soon.
    let source = source(saved(&ram, Compression::Lz4, 4 << 20), 64 << 20);
    for count in [1, 2, 8] {
        let (got, result) = serve(&source, 4096, count, |socket| {
            let mut peer = Peer::new(socket);
            let mut got: Vec<_> = (0..10).map(|_| peer.page().unwrap()).collect();
            for asked in [4000, 3000, 4095] {
                peer.ask(&[asked]);
                let before = got.len();
                while got.last().unwrap().0 != asked {
                    got.push(peer.page().unwrap());
                }
                let behind = got.len() - before;
                assert!(behind <= ON_ITS_WAY, "{behind} pages, {count} threads");
            }
            got.extend(peer.rest());
            got
        });
        result.unwrap();
        check_pages(&ram, got);
    }
}

#[test]
fn what_is_asked_for_waits_for_nothing_that_is_read_ahead() {
    let ram = ram(1024);
    let inner = source(saved(&ram, Compression::ZSTD, 64 << 10), 64 << 20);
    for count in [1, 2, 8] {
        let open = AtomicBool::new(false);
        let source = Watched {
            inner: &inner,
            before: &|range| {
                // What is read ahead takes for ever.
                if !is_page(range, 900) && !is_page(range, 100) {
                    wait_until(|| open.load(Ordering::SeqCst));
                }
            },
            after: &|_| {},
        };
        let (got, result) = serve(&source, 4096, count, |socket| {
            let mut peer = Peer::new(socket);
            peer.ask(&[900]);
            let mut got = vec![peer.page().unwrap()];
            peer.ask(&[100]);
            got.push(peer.page().unwrap());
            open.store(true, Ordering::SeqCst);
            assert_eq!((got[0].0, got[1].0), (900, 100));
            got.extend(peer.rest());
            got
        });
        result.unwrap();
        check_pages(&ram, got);
    }
}

#[test]
fn what_is_asked_for_is_read_by_whoever_is_free() {
    let ram = ram(4096);
    let inner = source(saved(&ram, Compression::ZSTD, 64 << 10), 64 << 20);
    let begun = AtomicBool::new(false);
    let source = Watched {
        inner: &inner,
        before: &|range| {
            // The first of them comes only after another thread has begun with the second.
            if is_page(range, 4000) {
                wait_until(|| begun.load(Ordering::SeqCst));
            }
            begun.fetch_or(is_page(range, 3000), Ordering::SeqCst);
        },
        after: &|_| {},
    };
    let (got, result) = serve(&source, 4096, 2, |socket| {
        let mut peer = Peer::new(socket);
        peer.ask(&[4000, 3000]);
        peer.rest()
    });
    result.unwrap();
    let at = |page| got.iter().position(|(number, _)| *number == page);
    assert!(at(4000) < at(3000));
    check_pages(&ram, got);
}

#[test]
fn no_more_chunks_are_held_than_a_bound() {
    let ram = ram(4096);
    let inner = source(saved(&ram, Compression::Lz4, 64 << 10), 0);
    for count in [1, 2, 8] {
        let held: Mutex<Vec<Weak<[u8]>>> = Mutex::default();
        let alive = || {
            let mut held = held.lock().unwrap();
            held.retain(|chunk| chunk.strong_count() > 0);
            held.len()
        };
        let most = AtomicUsize::new(0);
        let source = Watched {
            inner: &inner,
            before: &|_| {},
            after: &|piece| {
                let Bytes::Shared { block, .. } = piece else {
                    panic!("it is compressed");
                };
                held.lock().unwrap().push(Arc::downgrade(block));
                most.fetch_max(alive(), Ordering::SeqCst);
            },
        };
        let (got, result) = serve(&source, 4096, count, |socket| {
            let mut peer = Peer::new(socket);
            // Nothing is taken, so all is read that may be.
            wait_until(|| alive() >= MAX_AHEAD);
            std::thread::sleep(Duration::from_millis(20));
            peer.rest()
        });
        result.unwrap();
        check_pages(&ram, got);
        let most = most.into_inner();
        // And the one that is being sent.
        assert!(most <= MAX_AHEAD + 1, "{most} chunks, {count} threads");
    }
}

#[test]
fn a_damaged_chunk_ends_it_whoever_finds_it() {
    let ram = ram(1024);
    for codec in CODECS {
        let mut checkpoint = saved(&ram, codec, 64 << 10);
        let middle = checkpoint.len() / 2;
        checkpoint[middle] ^= 1;
        let source = source(checkpoint, 64 << 20);
        let mut errors = Vec::new();
        for count in [1, 2, 8] {
            let (got, result) = serve(&source, 4096, count, |socket| Peer::new(socket).rest());
            let numbers: Vec<_> = got.iter().map(|(number, _)| *number).collect();
            // All before it, and nothing of it.
            assert_eq!(numbers, (0..got.len()).collect::<Vec<_>>());
            assert!(got.len() > 100 && got.len() < 1000 && got.len() % 16 == 0);
            check_pages(&ram[..got.len() * PAGE], got);
            let error = result.unwrap_err();
            assert!(matches!(error, QemuError::Pages(_)), "{error:?}");
            errors.push(format!("{error:?}"));
        }
        assert!(errors[0].contains("Checksum"), "{errors:?}");
        assert!(errors.iter().all(|error| *error == errors[0]), "{errors:?}");
        // The same if it is asked for.
        let (got, result) = serve(&source, 4096, 2, |socket| {
            let mut peer = Peer::new(socket);
            let all: Vec<_> = (300..800).step_by(16).collect();
            peer.ask(&all);
            peer.rest()
        });
        assert!(got.len() < 1000);
        assert_eq!(format!("{:?}", result.unwrap_err()), errors[0]);
    }
}

#[test]
#[ignore = "a measurement: --release, --nocapture, and a machine that does nothing else"]
fn the_time_of_a_whole_transfer() {
    let ram = ram(1 << 16);
    for codec in CODECS {
        let source = source(saved(&ram, codec, 64 << 10), 64 << 20);
        let mut best = [Duration::MAX; 3];
        for _ in 0..5 {
            for (best, count) in best.iter_mut().zip([1, 2, 4]) {
                let began = Instant::now();
                let (_, result) = serve(&source, 4096, count, |mut socket| {
                    socket.write_all(&said(1, &[0; 4])).unwrap();
                    let mut bytes = vec![0; 1 << 20];
                    while socket.read(&mut bytes).is_ok_and(|got| got > 0) {}
                });
                result.unwrap();
                *best = began.elapsed().min(*best);
            }
        }
        println!("{codec:?}: 256 MiB with 1, 2, 4 threads: {best:.2?}");
    }
}

#[test]
fn who_sends_does_it_alone_where_there_are_no_threads() {
    const ALONE: &str = "SONICSHOT_TEST_ALONE";
    const NAME: &str = "postcopy::tests::who_sends_does_it_alone_where_there_are_no_threads";
    if std::env::var_os(ALONE).is_some() {
        return alone();
    }
    let user = ["--reuid=54322", "--clear-groups"];
    let can = Command::new("setpriv").args(user).arg("true").output();
    let can = can.is_ok_and(|output| output.status.success());
    if !sonicshot_testkit::has("the right to be another user", can) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("program");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    for path in [folder.path(), &program] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let mut command = Command::new("setpriv");
    command.args(user).args(["prlimit", "--nproc=6"]);
    command.arg(&program).args(["--exact", NAME, "--nocapture"]);
    let output = command.current_dir("/").env(ALONE, "1").output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}\n{errors}");
    assert!(said.contains("alone\n"), "{said}\n{errors}");
}

fn alone() {
    let ram = sparse(1024);
    let source = source(saved(&ram, Compression::ZSTD, 64 << 10), 64 << 20);
    let (go, begin) = std::sync::mpsc::channel::<()>();
    let over = AtomicBool::new(false);
    let wait = || wait_until(|| over.load(Ordering::SeqCst));
    std::thread::scope(|scope| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let peer = scope.spawn(move || {
            begin.recv().unwrap();
            let mut peer = Peer::new(theirs);
            peer.ask(&[1000, 1001]);
            peer.rest()
        });
        // All threads that there are.
        while Builder::new().spawn_scoped(scope, wait).is_ok() {}
        assert_eq!(with_pool(threads(8), &|| (), Pool::threads), 0);
        go.send(()).unwrap();
        // As it is restored.
        let here = current().id();
        let write = || (current().id(), serve_on(&ours, &source, 4096, 8));
        let ((writer, result), loader) = at_once(write, || current().id());
        assert_eq!((writer, loader), (here, here));
        drop(ours);
        over.store(true, Ordering::SeqCst);
        result.unwrap();
        let mut got = peer.join().unwrap();
        let zero = got.iter().position(|(number, _)| *number == 1001).unwrap();
        assert_eq!(got.remove(zero).1, None);
        check_pages(&ram, got);
    });
    println!("alone");
}

/// All that comes of a guest of 64 pages, of which every other is zero, to a QEMU that asks for
/// these, and says at the end that all was well or not.
fn served(requests: &[Vec<u8>], end: u8) -> (Vec<u8>, Result<(), String>) {
    let mut ram = vec![0; 64 * PAGE];
    for page in (0..64).step_by(2) {
        ram[page * PAGE..(page + 1) * PAGE].fill(u8::try_from(page + 1).unwrap());
    }
    let source = source(saved(&ram, Compression::Lz4, 64 << 10), 0);
    let mut asked = requests.concat();
    asked.extend(said(1, &[0, 0, 0, end]));
    let (got, result) = serve(&source, 4096, 3, move |mut socket| {
        socket.write_all(&asked).unwrap();
        let mut got = Vec::new();
        let _ = socket.read_to_end(&mut got);
        got
    });
    let result = result.map_err(|error| {
        std::error::Error::source(&error).map_or(String::new(), ToString::to_string)
    });
    (got, result)
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
