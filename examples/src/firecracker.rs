//! Firecracker's protocol for page-fault handlers
//! (`docs/snapshotting/handling-page-faults-on-snapshot-resume.md` in its repository).
//!
//! Firecracker maps empty memory, registers it with a `userfaultfd`, connects to the handler's
//! socket, and sends one message: where its memory is, as JSON, and the `userfaultfd`. Nothing
//! else is ever said; the connection stays open for as long as the microVM lives.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use serde::Deserialize;
use sonicshot::checkpoint::{
    CheckpointError, CheckpointInfo, CheckpointReader, HostAddress, LazyOptions, LazyRegion,
    LazyRestore, LazyStats, RangeSource, Uffd,
};
use sonicshot::{GpaRange, RamLayout};
use std::io::{self, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The longest message that is taken, in bytes. Firecracker's have some hundred: one mapping for
/// each region.
pub const MAX_MESSAGE: usize = 64 << 10;
/// How long the whole message may take to come, if the stream has no read timeout of its own.
/// Firecracker sends it at once.
pub const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);
/// Descriptors that a message has, which is told from more of them.
const DESCRIPTORS: usize = 1;

/// Why Firecracker's message could not be used.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// The operating system refused.
    #[error("receiving the mappings")]
    Receive(#[from] Errno),
    /// The connection ended before the message did.
    #[error("the connection was closed after {len} bytes of the mappings")]
    Closed {
        /// How much had come.
        len: usize,
    },
    /// The message did not come whole in time.
    #[error("{len} bytes of the mappings came in {limit:?}, and not the rest")]
    Slow {
        /// How much had come.
        len: usize,
        /// How long the whole message may take.
        limit: Duration,
    },
    /// The message does not end.
    #[error("the mappings have more than {MAX_MESSAGE} bytes")]
    TooLong,
    /// The message is not an array of mappings.
    #[error("the mappings cannot be read")]
    Json(#[from] serde_json::Error),
    /// Not one descriptor came with the message.
    #[error("{count} file descriptors came with the mappings, not one")]
    Descriptors {
        /// How many there were.
        count: usize,
    },
    /// There were more descriptors than could be taken in.
    #[error("more file descriptors came with the mappings than can be taken in, not one")]
    TooManyDescriptors,
    /// There is no memory to serve.
    #[error("there are no mappings")]
    NoMappings,
    /// Pages of this size cannot be filled from the checkpoint.
    #[error("the mapping's pages have {found} bytes: not a power of two, or less than {min}")]
    PageSize {
        /// What the mapping says.
        found: u64,
        /// The checkpoint's own page size.
        min: u64,
    },
    /// A mapping is not whole pages.
    #[error("the mapping of {size:#x} bytes at {host:#x} is not whole pages of {page:#x}")]
    Unaligned {
        /// Where the mapping begins in Firecracker.
        host: u64,
        /// Its length in bytes.
        size: u64,
        /// Its pages' size in bytes.
        page: u64,
    },
    /// A mapping ends behind the end of all addresses.
    #[error("the mapping of {size:#x} bytes at {host:#x} ends behind the last address")]
    Wraps {
        /// Where the mapping begins in Firecracker.
        host: u64,
        /// Its length in bytes.
        size: u64,
    },
    /// Two mappings are at the same place, in Firecracker or in the guest.
    #[error("two mappings overlap {} at {at:#x}", if *.in_guest { "in the guest" } else { "in Firecracker" })]
    Overlap {
        /// Whether it is the guest's memory that is mapped twice.
        in_guest: bool,
        /// The first address that both have.
        at: u64,
    },
    /// A mapping is not part of one region of the checkpoint.
    #[error("the mapping of {size:#x} bytes at offset {offset:#x} is not in a region of the guest")]
    NotInLayout {
        /// Where the mapping begins in the memory file.
        offset: u64,
        /// Its length in bytes.
        size: u64,
    },
}

/// Why a microVM could not be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Its message could not be used.
    #[error("Firecracker's message")]
    Message(#[from] MessageError),
    /// The restore could not begin.
    #[error("starting the restore")]
    Start(#[from] CheckpointError),
    /// A page could not be brought in.
    #[error("a page could not be served")]
    Page(#[source] Arc<CheckpointError>),
    /// The connection broke.
    #[error("waiting for Firecracker to end")]
    Wait(#[from] io::Error),
}

/// `GuestRegionUffdMapping` of Firecracker. Versions differ in what they send beyond the first
/// three fields.
#[derive(Debug, Deserialize)]
struct Mapping {
    base_host_virt_addr: u64,
    size: u64,
    /// Where the mapping begins in the memory file, which has no holes.
    offset: u64,
    page_size: Option<u64>,
    /// The older name of `page_size`: bytes too, whatever it says.
    page_size_kib: Option<u64>,
}

impl Mapping {
    fn region(&self, info: &CheckpointInfo) -> Result<LazyRegion, MessageError> {
        let min = info.page_size.bytes();
        // Versions that name no page size had small pages only.
        let page = self.page_size.or(self.page_size_kib).unwrap_or(4096);
        if !page.is_power_of_two() || page < min {
            return Err(MessageError::PageSize { found: page, min });
        }
        let unaligned = MessageError::Unaligned {
            host: self.base_host_virt_addr,
            size: self.size,
            page,
        };
        let Ok(host) = usize::try_from(self.base_host_virt_addr) else {
            return Err(unaligned);
        };
        let whole = [self.base_host_virt_addr, self.size]
            .iter()
            .all(|value| value.is_multiple_of(page));
        if !whole || !self.offset.is_multiple_of(min) {
            return Err(unaligned);
        }
        let guest =
            guest_range(&info.layout, self.offset, self.size).ok_or(MessageError::NotInLayout {
                offset: self.offset,
                size: self.size,
            })?;
        if self.base_host_virt_addr.checked_add(self.size).is_none() {
            return Err(MessageError::Wraps {
                host: self.base_host_virt_addr,
                size: self.size,
            });
        }
        Ok(LazyRegion {
            guest,
            host: HostAddress::new(host),
            page,
        })
    }
}

/// The guest memory that is at `offset` in a file that has the regions one after the other.
fn guest_range(layout: &RamLayout, offset: u64, size: u64) -> Option<GpaRange> {
    let mut inside = offset;
    for region in layout.regions() {
        if let Some(behind) = inside.checked_sub(region.len()) {
            inside = behind;
            continue;
        }
        let range = GpaRange::with_len(region.start().checked_add(inside)?, size)?;
        return (!range.is_empty() && range.end() <= region.end()).then_some(range);
    }
    None
}

/// Refuses mappings of which two have an address in common. A page of the guest that is in two
/// places could be given back in one and brought in again in the other.
fn check_disjoint(regions: &[LazyRegion]) -> Result<(), MessageError> {
    let host = |region: &LazyRegion| (region.host.raw() as u64, region.guest.len());
    let guest = |region: &LazyRegion| (region.guest.start().raw(), region.guest.len());
    for (in_guest, mut ranges) in [
        (false, regions.iter().map(host).collect::<Vec<_>>()),
        (true, regions.iter().map(guest).collect()),
    ] {
        ranges.sort_unstable();
        for pair in ranges.windows(2) {
            if let [(start, len), (next, _)] = pair
                && next.checked_sub(*start).is_some_and(|gap| gap < *len)
            {
                return Err(MessageError::Overlap {
                    in_guest,
                    at: *next,
                });
            }
        }
    }
    Ok(())
}

/// Receives what Firecracker says of its memory, and the `userfaultfd` that reports its faults.
///
/// The whole message must have come within the stream's read timeout, or [`MESSAGE_TIMEOUT`] if
/// it has none.
///
/// # Errors
/// [`MessageError`] if the message is something else, or not about the guest that `info`
/// describes.
pub fn receive(
    stream: &UnixStream,
    info: &CheckpointInfo,
) -> Result<(Vec<LazyRegion>, OwnedFd), MessageError> {
    let mut message = Vec::new();
    let mut descriptors = Vec::new();
    let limit = stream.read_timeout().ok().flatten();
    let limit = limit.unwrap_or(MESSAGE_TIMEOUT);
    let start = Instant::now();
    let mappings = loop {
        wait(stream, start, limit, message.len())?;
        let got = receive_part(stream, &mut message, &mut descriptors)?;
        if descriptors.len() > DESCRIPTORS {
            let count = descriptors.len();
            return Err(MessageError::Descriptors { count });
        }
        // A stream keeps no messages apart: this one is complete when it can be read.
        match serde_json::from_slice::<Vec<Mapping>>(&message) {
            Ok(mappings) => break mappings,
            Err(error) if !error.is_eof() => return Err(error.into()),
            Err(_) if got == 0 => return Err(MessageError::Closed { len: message.len() }),
            Err(_) if message.len() > MAX_MESSAGE => return Err(MessageError::TooLong),
            Err(_) => {}
        }
    };
    let count = descriptors.len();
    let Some(uffd) = descriptors.pop().filter(|_| count == 1) else {
        return Err(MessageError::Descriptors { count });
    };
    if mappings.is_empty() {
        return Err(MessageError::NoMappings);
    }
    let regions: Result<Vec<_>, _> = mappings.iter().map(|m| m.region(info)).collect();
    let regions = regions?;
    check_disjoint(&regions)?;
    Ok((regions, uffd))
}

/// Waits until there is more to read, at most until `limit` has passed since `start`.
fn wait(
    stream: &UnixStream,
    start: Instant,
    limit: Duration,
    len: usize,
) -> Result<(), MessageError> {
    loop {
        let left = limit.saturating_sub(start.elapsed());
        let timeout = Timespec::try_from(left).map_err(|_| Errno::INVAL)?;
        let mut ready = [PollFd::new(stream, PollFlags::IN)];
        match poll(&mut ready, Some(&timeout)) {
            Err(Errno::INTR) => {}
            Ok(0) if len == 0 => return Err(Errno::AGAIN.into()),
            Ok(0) => return Err(MessageError::Slow { len, limit }),
            other => return Ok(other.map(drop)?),
        }
    }
}

fn receive_part(
    stream: &UnixStream,
    message: &mut Vec<u8>,
    descriptors: &mut Vec<OwnedFd>,
) -> Result<usize, MessageError> {
    let mut part = [0; 4096];
    // The kernel closes what there is no room for.
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut part)];
    let received = loop {
        match recvmsg(stream, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            other => break other?,
        }
    };
    let got = received.bytes;
    for received in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = received {
            descriptors.extend(rights);
        }
    }
    // Some were lost: it is not known how many there were.
    if received.flags.contains(ReturnFlags::CTRUNC) && descriptors.len() <= DESCRIPTORS {
        return Err(MessageError::TooManyDescriptors);
    }
    message.extend_from_slice(part.get(..got).unwrap_or_default());
    Ok(got)
}

/// Serves one microVM's page faults from `checkpoint`, until Firecracker closes `stream`.
///
/// # Errors
/// [`ServeError`] if the microVM cannot be served. It waits for its memory from then on:
/// whoever started it should end it.
pub fn serve<S: RangeSource + 'static>(
    mut stream: &UnixStream,
    checkpoint: Arc<CheckpointReader<S>>,
    options: LazyOptions,
) -> Result<LazyStats, ServeError> {
    let (regions, uffd) = receive(stream, checkpoint.info())?;
    let restore = LazyRestore::start(checkpoint, Uffd::from(uffd), regions, options)?;
    // Firecracker says no more. A read timeout makes room to look for errors.
    let mut more = [0; 64];
    loop {
        match stream.read(&mut more) {
            Ok(0) => break,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => break,
            Err(error) if is_temporary(&error) => {}
            Err(error) => return Err(error.into()),
        }
        if let Some(error) = restore.error() {
            return Err(ServeError::Page(error));
        }
    }
    Ok(restore.stats())
}

fn is_temporary(error: &io::Error) -> bool {
    use io::ErrorKind::{Interrupted, TimedOut, WouldBlock};
    matches!(error.kind(), Interrupted | TimedOut | WouldBlock)
}
