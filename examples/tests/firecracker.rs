//! A client that speaks Firecracker's side of the page-fault protocol.
#![expect(unsafe_code, reason = "guest memory is a mapping here")]
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "tests may stop anywhere"
)]

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};
use sonicshot::checkpoint::{
    CheckpointInfo, CheckpointReader, CheckpointWriter, Compression, LazyOptions, RangeSource,
    SaveOptions, Uffd,
};
use sonicshot::{
    DropClasses, Fill, Gpa, GpaRange, GuestBytes, GuestMemory, MappedRegions, PageClass, PageMap,
    PageSize, Pfn, PfnRange, PrunePlan, RamLayout,
};
use sonicshot_examples::firecracker::{MAX_MESSAGE, MessageError, ServeError, receive, serve};
use std::fs::File;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tempfile::{NamedTempFile, TempDir};

const PAGE: usize = 4096;
/// Two regions with a hole between: where they begin, and how many pages they have.
const REGIONS: [(u64, usize); 2] = [(0, 3072), (4 << 30, 5120)];
const PAGES: usize = REGIONS[0].1 + REGIONS[1].1;

/// Most pages are kept; every fifth stretch is free, every seventh zero.
fn expected(page: usize) -> [u8; PAGE] {
    let mut bytes = [0; PAGE];
    if !is_free(page) && !is_zero(page) {
        for (number, word) in bytes.chunks_exact_mut(8).enumerate() {
            let value = (page as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number as u64;
            word.copy_from_slice(&value.to_le_bytes());
        }
    }
    bytes
}

fn is_free(page: usize) -> bool {
    page / 11 % 5 == 3
}

fn is_zero(page: usize) -> bool {
    !is_free(page) && page / 13 % 7 == 2
}

fn layout() -> RamLayout {
    let range = |(start, pages): (u64, usize)| {
        GpaRange::with_len(Gpa::new(start), (pages * PAGE) as u64).unwrap()
    };
    RamLayout::new(REGIONS.map(range).to_vec()).unwrap()
}

fn info() -> CheckpointInfo {
    CheckpointInfo::new(layout(), PageSize::SIZE_4K)
}

/// Saves the guest; its free pages hold garbage.
fn save(compression: Compression) -> NamedTempFile {
    let mut ram = vec![0xaa; PAGES * PAGE];
    for (page, bytes) in ram.chunks_exact_mut(PAGE).enumerate() {
        if !is_free(page) {
            bytes.copy_from_slice(&expected(page));
        }
    }
    let (low, high) = ram.split_at(REGIONS[0].1 * PAGE);
    let guest = MappedRegions::new(vec![
        (Gpa::new(REGIONS[0].0), GuestBytes::from_slice(low)),
        (Gpa::new(REGIONS[1].0), GuestBytes::from_slice(high)),
    ])
    .unwrap();
    let mut map = PageMap::new(guest.layout(), PageSize::SIZE_4K);
    let frames = guest.layout().frames(PageSize::SIZE_4K).collect::<Vec<_>>();
    let frames = frames.iter().flat_map(PfnRange::iter);
    for (page, pfn) in frames.enumerate() {
        if is_free(page) {
            let next = Pfn::new(pfn.raw() + 1);
            map.set(PfnRange::new(pfn, next), PageClass::FreeBuddy);
        }
    }
    let plan = PrunePlan::new(&map, &DropClasses::default(), Fill::Zero);
    let file = NamedTempFile::new().unwrap();
    let mut writer = CheckpointWriter::new(
        file.reopen().unwrap(),
        info(),
        SaveOptions::new(compression),
    )
    .unwrap();
    writer.memory(&guest, &map, &plan, &mut |_, _| {}).unwrap();
    writer.finish().unwrap();
    file
}

/// Firecracker's empty memory. The regions lie in the wrong order, with a gap that is not theirs.
struct Client {
    start: NonNull<u8>,
    uffd: Uffd,
}

// SAFETY: the memory is only touched through volatile reads and writes of whole pages; no page
// is written by two threads.
unsafe impl Sync for Client {}

impl Client {
    const GAP: usize = 16 * PAGE;
    const LEN: usize = PAGES * PAGE + Self::GAP;

    fn new() -> Self {
        // SAFETY: a new mapping, wherever the kernel likes.
        let start = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                Self::LEN,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        };
        let client = Self {
            start: NonNull::new(start.unwrap().cast()).unwrap(),
            uffd: Uffd::new().unwrap(),
        };
        for (region, (_, pages)) in REGIONS.iter().enumerate() {
            // SAFETY: just mapped, and nobody has touched it.
            unsafe { client.uffd.register(client.region(region), pages * PAGE) }.unwrap();
        }
        client
    }

    fn region(&self, region: usize) -> NonNull<u8> {
        let offset = [REGIONS[1].1 * PAGE + Self::GAP, 0][region];
        // SAFETY: inside the mapping.
        unsafe { self.start.add(offset) }
    }

    /// Where a page is, by its number in the memory file.
    fn page(&self, page: usize) -> NonNull<u8> {
        assert!(page < PAGES);
        let low = REGIONS[0].1;
        // SAFETY: inside the region.
        unsafe {
            match page.checked_sub(low) {
                Some(page) => self.region(1).add(page * PAGE),
                None => self.region(0).add(page * PAGE),
            }
        }
    }

    fn read(&self, page: usize) -> [u8; PAGE] {
        // SAFETY: mapped for as long as `self`; not written meanwhile, see `Sync` above.
        unsafe { self.page(page).cast::<[u8; PAGE]>().read_volatile() }
    }

    fn write(&self, page: usize, byte: u8) {
        // SAFETY: as in `read`.
        unsafe {
            self.page(page)
                .cast::<[u8; PAGE]>()
                .write_volatile([byte; PAGE]);
        }
    }

    /// Gives a page back, as Firecracker's balloon does.
    fn balloon(&self, page: usize) {
        // SAFETY: a page of the mapping, to which there are no references.
        unsafe { madvise(self.page(page).as_ptr().cast(), PAGE, Advice::LinuxDontNeed) }.unwrap();
    }

    /// What Firecracker sends, with the names that a version has for the page size.
    fn mappings(&self, page_size: &[&str]) -> Value {
        let mut offset = 0;
        let regions = REGIONS.iter().enumerate().map(|(region, (_, pages))| {
            let mut mapping = json!({
                "base_host_virt_addr": self.region(region).as_ptr() as u64,
                "size": pages * PAGE,
                "offset": offset,
            });
            for name in page_size {
                mapping[*name] = PAGE.into();
            }
            offset += pages * PAGE;
            mapping
        });
        Value::Array(regions.collect())
    }

    /// Touches `pages` in random order from several threads, and checks them.
    fn check(&self, pages: &[usize]) {
        std::thread::scope(|scope| {
            for thread in 1..=4 {
                scope.spawn(move || {
                    for page in shuffled(pages, thread) {
                        assert!(self.read(page) == expected(page), "page {page}");
                    }
                });
            }
        });
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and nobody has a reference.
        unsafe { munmap(self.start.as_ptr().cast(), Self::LEN) }.unwrap();
    }
}

fn shuffled(pages: &[usize], seed: u64) -> Vec<usize> {
    let mut pages = pages.to_vec();
    let mut state = seed.wrapping_mul(0x2545_f491_4f6c_dd1d);
    for last in (1..pages.len()).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        pages.swap(last, (state % (last as u64 + 1)) as usize);
    }
    pages
}

fn send(stream: &UnixStream, message: &[u8], descriptors: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
    }
    let parts = [IoSlice::new(message)];
    let sent = sendmsg(stream, &parts, &mut control, SendFlags::empty()).unwrap();
    assert_eq!(sent, message.len());
}

/// The built example: `cargo test -p sonicshot-examples` builds it.
fn handler() -> PathBuf {
    let tests = std::env::current_exe().unwrap();
    let handler = tests.ancestors().nth(2).unwrap();
    handler.join("examples").join("firecracker_uffd")
}

fn connect(socket: &Path) -> UnixStream {
    let start = Instant::now();
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return stream,
            Err(error) if start.elapsed() > Duration::from_secs(20) => panic!("{error}"),
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// The handler in a process of its own, as with Firecracker.
fn restores_in_another_process(compression: Compression, page_size: &[&str]) {
    let checkpoint = save(compression);
    let directory = TempDir::new().unwrap();
    let socket = directory.path().join("uffd");
    let process = Command::new(handler())
        .arg(&socket)
        .arg(checkpoint.path())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the example is built with the tests");
    let client = Client::new();
    let stream = connect(&socket);
    let message = client.mappings(page_size).to_string();
    send(&stream, message.as_bytes(), &[client.uffd.as_fd()]);

    let pages: Vec<usize> = (0..PAGES).collect();
    client.check(&pages);
    // The microVM ends, and with it the handler.
    drop(stream);
    let output = process.wait_with_output().unwrap();
    assert!(output.status.success());
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.starts_with("served "), "{said}");
    assert!(!socket.exists());
}

#[test]
fn firecracker_with_page_size() {
    restores_in_another_process(Compression::ZSTD, &["page_size", "page_size_kib"]);
}

#[test]
fn firecracker_with_page_size_kib_alone() {
    restores_in_another_process(Compression::None, &["page_size_kib"]);
}

#[test]
fn firecracker_without_page_size() {
    restores_in_another_process(Compression::Lz4, &[]);
}

/// A file that takes its time, so that the background prefetch is still under way.
struct Slow {
    file: File,
    open: Arc<AtomicBool>,
}

impl RangeSource for Slow {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        if !self.open.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(2));
        }
        self.file.read_at(buf, offset)
    }
}

#[test]
fn what_the_balloon_took_stays_zero() {
    for compression in [Compression::None, Compression::Lz4] {
        let checkpoint = save(compression);
        let open = Arc::new(AtomicBool::new(true));
        let slow = Slow {
            file: checkpoint.reopen().unwrap(),
            open: Arc::clone(&open),
        };
        let reader = Arc::new(CheckpointReader::new(slow).unwrap());
        open.store(false, Ordering::Relaxed);
        let client = Client::new();
        let (stream, peer) = UnixStream::pair().unwrap();
        inflate_balloon(&client, reader, stream, &peer);
    }
}

fn inflate_balloon(
    client: &Client,
    reader: Arc<CheckpointReader<Slow>>,
    stream: UnixStream,
    peer: &UnixStream,
) {
    let kept: Vec<usize> = (0..PAGES)
        .filter(|page| !is_free(*page) && !is_zero(*page))
        .collect();
    // Spread, so that the prefetch meets them in the middle of chunks, early and late.
    let taken: Vec<usize> = kept.iter().copied().step_by(29).collect();
    let written: Vec<usize> = taken.iter().copied().step_by(3).collect();
    let others: Vec<usize> = (0..PAGES).filter(|page| !taken.contains(page)).collect();

    let mut options = LazyOptions::default();
    options.threads = 3.try_into().unwrap();
    std::thread::scope(|scope| {
        let handler = scope.spawn(move || serve(peer, reader, options));
        let message = client.mappings(&["page_size"]).to_string();
        send(&stream, message.as_bytes(), &[client.uffd.as_fd()]);

        // The guest runs while the balloon takes pages, of which it has touched some.
        let busy = scope.spawn(|| client.check(&others));
        for (number, page) in shuffled(&taken, 9).into_iter().enumerate() {
            if number % 2 == 0 {
                assert!(client.read(page) == expected(page), "page {page}");
            }
            client.balloon(page);
            assert!(client.read(page) == [0; PAGE], "page {page}");
            if number % 5 == 0 {
                // Given back a second time, after it was touched.
                client.balloon(page);
            }
            if written.contains(&page) {
                client.write(page, 0x5a);
            }
        }
        let content = |page| if written.contains(&page) { 0x5a } else { 0 };
        // All is touched before the end, and the prefetch passes by: several times over.
        for _ in 0..20 {
            for page in shuffled(&taken, 10) {
                assert!(client.read(page) == [content(page); PAGE], "page {page}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        busy.join().unwrap();
        for page in &taken {
            assert!(client.read(*page) == [content(*page); PAGE], "page {page}");
        }
        drop(stream);
        let stats = handler.join().unwrap().unwrap();
        assert!(
            stats.removed_bytes >= (taken.len() * PAGE) as u64,
            "{stats:?}"
        );
        assert!(stats.faults > 0 && stats.prefetched_bytes > 0, "{stats:?}");
    });
}

/// Why a message is refused, with as many descriptors.
fn refused(message: &[u8], descriptors: usize) -> MessageError {
    let (near, far) = UnixStream::pair().unwrap();
    let file = tempfile::tempfile().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            send(&near, message, &vec![file.as_fd(); descriptors]);
        });
        receive(&far, &info()).unwrap_err()
    })
}

fn mapping(base: u64, size: u64, offset: u64, page: u64) -> Vec<u8> {
    json!([{
        "base_host_virt_addr": base,
        "size": size,
        "offset": offset,
        "page_size": page,
        "page_size_kib": 4096,
    }])
    .to_string()
    .into_bytes()
}

#[test]
fn malformed_messages_are_refused() {
    let good = mapping(0x7000_0000, 4096, 0, 4096);
    for bad in [
        &b"{}"[..],
        b"[1]",
        b"no",
        b"[{\"size\": -1}]",
        b"\xff",
        b"[] []",
    ] {
        assert!(matches!(refused(bad, 1), MessageError::Json(_)));
    }
    for len in [1, good.len() / 2, good.len() - 1] {
        let error = refused(&good[..len], 1);
        assert!(
            matches!(error, MessageError::Closed { len: l } if l == len),
            "{error:?}"
        );
    }
    for count in [0, 2, 4] {
        let error = refused(&good, count);
        assert!(
            matches!(error, MessageError::Descriptors { count: c } if c == count),
            "{error:?}"
        );
    }
    assert!(matches!(refused(b"[]", 1), MessageError::NoMappings));
    let endless = vec![b' '; MAX_MESSAGE + 4096];
    assert!(matches!(refused(&endless, 1), MessageError::TooLong));
}

#[test]
fn page_sizes_are_checked() {
    for found in [0, 1, 2048, 4097, 12288, u64::MAX] {
        let error = refused(&mapping(0x7000_0000, 4096, 0, found), 1);
        assert!(
            matches!(error, MessageError::PageSize { found: f, min: 4096 } if f == found),
            "{error:?}"
        );
    }
    for (base, size, offset) in [
        (0x7000_0001, 4096, 0),
        (0x7000_0000, 4095, 0),
        (0x7000_0000, 4096, 17),
    ] {
        let error = refused(&mapping(base, size, offset, 4096), 1);
        assert!(matches!(error, MessageError::Unaligned { .. }), "{error:?}");
    }
    // 2 MiB pages at an address for small ones.
    let error = refused(&mapping(0x7000_1000, 4 << 20, 0, 2 << 20), 1);
    assert!(matches!(error, MessageError::Unaligned { .. }), "{error:?}");
}

#[test]
fn mappings_outside_of_the_guest_are_refused() {
    let low = (REGIONS[0].1 * PAGE) as u64;
    let all = (PAGES * PAGE) as u64;
    let last = !0xfff;
    for (size, offset) in [
        (4096, all),
        (8192, all - 4096),
        // Across two regions, between which the guest has a hole.
        (8192, low - 4096),
        (all, 0),
        (0, 0),
        (last, 0),
        (4096, last),
        (last, last),
    ] {
        let error = refused(&mapping(0x7000_0000, size, offset, 4096), 1);
        assert!(
            matches!(error, MessageError::NotInLayout { size: s, offset: o } if (s, o) == (size, offset)),
            "{error:?}"
        );
    }
}

#[test]
fn regions_are_found_in_the_guest() {
    let (near, far) = UnixStream::pair().unwrap();
    let file = tempfile::tempfile().unwrap();
    let low = (REGIONS[0].1 * PAGE) as u64;
    let message = json!([
        {"base_host_virt_addr": 0x7000_0000, "size": 4096, "offset": low + 8192},
        {"base_host_virt_addr": 0x6000_0000, "size": low, "offset": 0, "more": [1]},
    ])
    .to_string();
    // In two pieces, as a stream may deliver it.
    let (first, second) = message.as_bytes().split_at(50);
    send(&near, first, &[file.as_fd()]);
    send(&near, second, &[]);
    let (regions, _) = receive(&far, &info()).unwrap();
    assert_eq!(regions.len(), 2);
    assert_eq!(regions[0].guest.start(), Gpa::new((4 << 30) + 8192));
    assert_eq!(regions[0].host.raw(), 0x7000_0000);
    assert_eq!(regions[1].guest, GpaRange::new(Gpa::ZERO, Gpa::new(low)));
}

#[test]
fn a_silent_peer_times_out() {
    let (_near, far) = UnixStream::pair().unwrap();
    far.set_read_timeout(Some(Duration::from_millis(20)))
        .unwrap();
    let error = receive(&far, &info()).unwrap_err();
    assert!(
        matches!(error, MessageError::Receive(Errno::AGAIN)),
        "{error:?}"
    );
}

#[test]
fn a_peer_that_drips_bytes_times_out() {
    let (near, far) = UnixStream::pair().unwrap();
    let limit = Duration::from_millis(200);
    far.set_read_timeout(Some(limit)).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Each byte in time, the message never whole.
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                send(&near, b" ", &[]);
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        let start = Instant::now();
        let error = receive(&far, &info()).unwrap_err();
        done.store(true, Ordering::Relaxed);
        assert!(
            matches!(error, MessageError::Slow { len, limit: l } if len > 1 && l == limit),
            "{error:?}"
        );
        let took = start.elapsed();
        assert!(took >= limit && took < 20 * limit, "{took:?}");
    });
}

/// Descriptors that this process has open.
fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn descriptors_that_come_in_any_number_are_refused_and_closed() {
    let good = mapping(0x7000_0000, 4096, 0, 4096);
    let (head, tail) = good.split_at(20);
    let file = tempfile::tempfile().unwrap();
    for (first, second) in [(0, 0), (2, 0), (0, 2), (1, 1), (1, 4), (4, 4)] {
        let (near, far) = UnixStream::pair().unwrap();
        send(&near, head, &vec![file.as_fd(); first]);
        send(&near, tail, &vec![file.as_fd(); second]);
        let error = receive(&far, &info()).unwrap_err();
        assert!(
            matches!(error, MessageError::Descriptors { count } if count != 1),
            "{first} and {second}: {error:?}"
        );
    }
    // One for each byte of a message that does not end: no more than two are ever held.
    let (near, far) = UnixStream::pair().unwrap();
    for _ in 0..200 {
        send(&near, b" ", &[file.as_fd()]);
    }
    let before = open_descriptors();
    let error = receive(&far, &info()).unwrap_err();
    assert!(
        matches!(error, MessageError::Descriptors { count: 2 }),
        "{error:?}"
    );
    assert!(open_descriptors() < before + 50);
    // More at once than can be taken in.
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(40))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let many = vec![file.as_fd(); 40];
    assert!(control.push(SendAncillaryMessage::ScmRights(&many)));
    let (near, far) = UnixStream::pair().unwrap();
    sendmsg(
        &near,
        &[IoSlice::new(&good)],
        &mut control,
        SendFlags::empty(),
    )
    .unwrap();
    let error = receive(&far, &info()).unwrap_err();
    assert!(
        matches!(error, MessageError::Descriptors { count } if count > 1),
        "{error:?}"
    );
}

#[test]
fn mappings_that_wrap_are_refused() {
    let low = (REGIONS[0].1 * PAGE) as u64;
    for base in [!0xfff, (low - 4096).wrapping_neg()] {
        let error = refused(&mapping(base, low, 0, 4096), 1);
        assert!(
            matches!(error, MessageError::Wraps { host, size } if (host, size) == (base, low)),
            "{error:?}"
        );
    }
}

#[test]
fn mappings_that_overlap_are_refused() {
    let part = |base: u64, size: u64, offset: u64| json!({"base_host_virt_addr": base, "size": size, "offset": offset, "page_size": 4096});
    for (mappings, in_guest, at) in [
        // The same twice, the end of one in the other, one in the other.
        (
            json!([part(0x10_0000, 8192, 0), part(0x10_0000, 8192, 8192)]),
            false,
            0x10_0000,
        ),
        (
            json!([part(0x10_1000, 8192, 0), part(0x10_0000, 8192, 8192)]),
            false,
            0x10_1000,
        ),
        (
            json!([part(0x10_0000, 32768, 0), part(0x10_2000, 4096, 32768)]),
            false,
            0x10_2000,
        ),
        // Apart in Firecracker, the same in the guest.
        (
            json!([part(0x10_0000, 8192, 0), part(0x20_0000, 8192, 0)]),
            true,
            0,
        ),
        (
            json!([part(0x10_0000, 8192, 4096), part(0x20_0000, 8192, 0)]),
            true,
            4096,
        ),
    ] {
        let error = refused(mappings.to_string().as_bytes(), 1);
        assert!(
            matches!(error, MessageError::Overlap { in_guest: g, at: a } if (g, a) == (in_guest, at)),
            "{mappings}: {error:?}"
        );
    }
    // Side by side is sound.
    let (near, far) = UnixStream::pair().unwrap();
    let file = tempfile::tempfile().unwrap();
    let message = json!([part(0x10_0000, 8192, 0), part(0x10_2000, 8192, 8192)]).to_string();
    send(&near, message.as_bytes(), &[file.as_fd()]);
    assert_eq!(receive(&far, &info()).unwrap().0.len(), 2);
}

#[test]
fn a_descriptor_that_is_no_userfaultfd_is_refused() {
    let checkpoint = save(Compression::None);
    let reader = Arc::new(CheckpointReader::open(checkpoint.path()).unwrap());
    let (near, far) = UnixStream::pair().unwrap();
    far.set_read_timeout(Some(Duration::from_millis(50)))
        .unwrap();
    let file = tempfile::tempfile().unwrap();
    let message = mapping(0x7000_0000, 4096, 0, 4096);
    send(&near, &message, &[file.as_fd()]);
    let error = serve(&far, reader, LazyOptions::default()).unwrap_err();
    assert!(
        matches!(error, ServeError::Page(_) | ServeError::Start(_)),
        "{error:?}"
    );
}
