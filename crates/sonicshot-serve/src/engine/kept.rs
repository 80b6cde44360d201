//! The record that must outlive the server for another one to go on: which pages the source must not be asked
//! for any more, and what the kernel has told last.
//!
//! It is in a file without a name, which the watcher has too. The bits of the regions are in it
//! from the start. What the kernel tells is read right into it: a message that a server has read
//! and not understood before it was killed is still there, and to be told once more that a page was
//! given back does no harm.
//!
//! | offset | |
//! |---:|---|
//! | 0 | `SONICKPT`, then three `u64`: version, number of regions, length of the source's identity |
//! | 32 | the identity, at most 512 bytes |
//! | 2048 | the messages that were read last |
//! | 4096 | of each region four `u64`: guest-physical address, length, host address, page size |
//! | then, at a multiple of 4096 | the bits, region by region, a `u64` for each 64 pages |

use super::kept_map::Map;
use super::region::{Region, VmRegion};
use crate::address::HostAddress;
use crate::error::ServeError;
use crate::uffd::Uffd;
use core::ffi::c_void;
use core::slice;
use rustix::fd::OwnedFd;
use rustix::fs::{MemfdFlags, fstat, ftruncate, memfd_create};
use rustix::io::{Errno, pread, pwrite};
use rustix::mm::mlock;
use sonicshot::{Cursor, Gpa, GpaRange, to_u64, to_usize};
use std::sync::Arc;

const MAGIC: u64 = u64::from_le_bytes(*b"SONICKPT");
const VERSION: u64 = 1;
const IDENTITY: usize = 32;
const MAX_IDENTITY: usize = 512;
const MESSAGES: usize = 2048;
const REGIONS: usize = 4096;
const RECORD: usize = 32;
const MAX_KEPT_REGIONS: usize = 4096;

/// One virtual machine's, of which there is one owner.
#[derive(Debug)]
pub(crate) struct Kept {
    map: Arc<Map>,
    pub file: Arc<OwnedFd>,
}

impl Kept {
    /// Has the bits of `regions` in a file from now on.
    pub fn new(regions: &mut [Region], identity: &str) -> Result<Self, ServeError> {
        if identity.len() > MAX_IDENTITY {
            return Err(wrong("the snapshot's identity is too long"));
        }
        let bits = bits_at(regions.len())?;
        let words = regions.iter().map(Region::words).sum::<usize>();
        let len = words.checked_mul(8).and_then(|len| len.checked_add(bits));
        let len = len.ok_or_else(|| wrong("it has too many pages"))?;
        let file = memfd_create("sonicshot-kept", MemfdFlags::CLOEXEC);
        let file = file.map_err(ServeError::system("memfd_create"))?;
        ftruncate(&file, to_u64(len)).map_err(ServeError::system("ftruncate"))?;
        let mut head = Vec::new();
        for word in [
            MAGIC,
            VERSION,
            to_u64(regions.len()),
            to_u64(identity.len()),
        ] {
            head.extend(word.to_le_bytes());
        }
        head.extend(identity.as_bytes());
        write_at(&file, &head, 0)?;
        let mut records = Vec::new();
        for region in regions.iter() {
            let guest = region.guest;
            for word in [guest.start().raw(), guest.len(), region.start, region.page] {
                records.extend(word.to_le_bytes());
            }
        }
        write_at(&file, &records, to_u64(REGIONS))?;
        let kept = Self {
            map: Arc::new(Map::new(&file, len, bits)?),
            file: Arc::new(file),
        };
        kept.pin();
        kept.put_into(regions);
        Ok(kept)
    }

    /// The state that another server has kept, and its regions; refused if that was of another
    /// snapshot.
    pub fn open(file: Arc<OwnedFd>, identity: &str) -> Result<(Self, Vec<VmRegion>), ServeError> {
        let mut head = [0; REGIONS];
        read_at(&file, &mut head, 0)?;
        let mut words = Cursor::new(&head[..]);
        let mut word = || {
            words
                .le::<u64>()
                .map_err(|_| wrong("its beginning is cut short"))
        };
        if word()? != MAGIC || word()? != VERSION {
            return Err(wrong("it is of another version of this program"));
        }
        let count = usize::try_from(word()?).ok();
        let count = count.filter(|count| *count <= MAX_KEPT_REGIONS);
        let count = count.ok_or_else(|| wrong("it has too many regions"))?;
        let len = usize::try_from(word()?).ok();
        let end = len.and_then(|len| len.checked_add(IDENTITY));
        let found = end.and_then(|end| head.get(IDENTITY..end));
        if found != Some(identity.as_bytes()) {
            let found = String::from_utf8_lossy(found.unwrap_or(&[])).into_owned();
            return Err(ServeError::OtherSource { found });
        }
        let records = count.checked_mul(RECORD);
        let mut records = vec![0; records.ok_or_else(|| wrong("it has too many regions"))?];
        read_at(&file, &mut records, to_u64(REGIONS))?;
        let mut words = Cursor::new(&records[..]);
        let mut regions = Vec::with_capacity(count);
        let mut bits = 0_usize;
        for _ in 0..count {
            let mut word = || {
                words
                    .le::<u64>()
                    .map_err(|_| wrong("its regions are cut short"))
            };
            let (gpa, len, host, page) = (word()?, word()?, word()?, word()?);
            let guest = GpaRange::with_len(Gpa::new(gpa), len);
            let guest = guest.ok_or_else(|| wrong("a region ends behind the last address"))?;
            let pages = len.checked_div(page);
            let pages = pages.ok_or_else(|| wrong("a region has pages of no bytes"))?;
            let all = bits.checked_add(to_usize(pages.div_ceil(64)));
            bits = all.ok_or_else(|| wrong("it has too many pages"))?;
            let host = HostAddress::new(host);
            regions.push(VmRegion { guest, host, page });
        }
        let at = bits_at(count)?;
        let len = bits.checked_mul(8).and_then(|bits| bits.checked_add(at));
        let len = len.ok_or_else(|| wrong("it has too many pages"))?;
        let found = fstat(&*file).map_err(ServeError::system("fstat"))?.st_size;
        if u64::try_from(found).ok() != Some(to_u64(len)) {
            return Err(wrong("its length is not that of its regions"));
        }
        let map = Arc::new(Map::new(&file, len, at)?);
        let kept = Self { map, file };
        kept.pin();
        Ok((kept, regions))
    }

    /// Has `regions`, which are in the order of the file, use its bits.
    pub fn put_into(&self, regions: &mut [Region]) {
        let mut at = 0;
        for region in regions {
            let words = region.words();
            region.keep(Arc::clone(&self.map), at);
            // The sum was looked at when the file was.
            let Some(next) = at.checked_add(words) else {
                break;
            };
            at = next;
        }
    }

    /// The buffer that the kernel's messages are read into.
    pub fn messages(&mut self) -> &mut [u8] {
        // SAFETY: inside the mapping, in front of its bits; whoever has this has it alone, and the
        // other process that has the file does not map it.
        unsafe {
            let first = self.map.start.as_ptr().add(MESSAGES);
            slice::from_raw_parts_mut(first, Uffd::BATCH_BYTES)
        }
    }

    /// The kernel must find the page in place when it writes messages there.
    fn pin(&self) {
        let start: *mut c_void = self.map.start.as_ptr().cast();
        // SAFETY: the first page of the mapping.
        if let Err(errno) = unsafe { mlock(start, REGIONS) } {
            tracing::debug!("mlock: {errno}");
        }
    }
}

const _: () =
    assert!(MESSAGES + Uffd::BATCH_BYTES <= REGIONS && IDENTITY + MAX_IDENTITY <= MESSAGES);

fn bits_at(regions: usize) -> Result<usize, ServeError> {
    let end = regions.checked_mul(RECORD);
    let end = end.and_then(|len| len.checked_add(REGIONS));
    let at = end.and_then(|end| end.checked_next_multiple_of(4096));
    at.ok_or_else(|| wrong("it has too many regions"))
}

fn wrong(why: &'static str) -> ServeError {
    ServeError::Kept { why }
}

fn write_at(file: &OwnedFd, mut bytes: &[u8], mut at: u64) -> Result<(), ServeError> {
    while !bytes.is_empty() {
        match pwrite(file, bytes, at) {
            Err(Errno::INTR) => {}
            Ok(0) => return Err(wrong("it cannot be written")),
            Ok(done) => {
                bytes = bytes.get(done..).unwrap_or(&[]);
                at = at
                    .checked_add(to_u64(done))
                    .ok_or_else(|| wrong("it is too long"))?;
            }
            Err(errno) => return Err(ServeError::system("writing what is kept")(errno)),
        }
    }
    Ok(())
}

fn read_at(file: &OwnedFd, mut out: &mut [u8], mut at: u64) -> Result<(), ServeError> {
    while !out.is_empty() {
        match pread(file, &mut *out, at) {
            Err(Errno::INTR) => {}
            Ok(0) => return Err(wrong("it is cut short")),
            Ok(done) => {
                let rest = core::mem::take(&mut out);
                out = rest.get_mut(done..).unwrap_or(&mut []);
                at = at
                    .checked_add(to_u64(done))
                    .ok_or_else(|| wrong("it is too long"))?;
            }
            Err(errno) => return Err(ServeError::system("reading what is kept")(errno)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::ptr::NonNull;
    use rustix::mm::{MapFlags, ProtFlags};
    use sonicshot::RamLayout;

    fn regions(uffd: &Uffd) -> (Vec<Region>, Vec<VmRegion>, RamLayout) {
        const LEN: usize = 100 << 12;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let none = core::ptr::null_mut();
        // SAFETY: a new mapping; it stays for as long as the process does.
        let start = unsafe { rustix::mm::mmap_anonymous(none, LEN, access, MapFlags::PRIVATE) };
        let start = NonNull::new(start.unwrap().cast()).unwrap();
        // SAFETY: nobody touches it.
        let registered = unsafe { uffd.register(start, LEN) }.unwrap();
        let range = |first: u64, pages: u64| {
            GpaRange::with_len(Gpa::new(first << 12), pages << 12).unwrap()
        };
        let layout = RamLayout::new(vec![range(0, 70), range(1000, 30)]).unwrap();
        let at = [
            VmRegion::new(&registered, 0, range(0, 70), 4096).unwrap(),
            VmRegion::new(&registered, 70 << 12, range(1000, 30), 4096).unwrap(),
        ];
        let all = Region::all(&at, &layout, uffd).unwrap();
        (all, at.to_vec(), layout)
    }

    #[test]
    fn what_was_kept_is_read_back_and_nothing_else() {
        let uffd = Uffd::new().unwrap();
        let (mut mine, at, layout) = regions(&uffd);
        let mut kept = Kept::new(&mut mine, "snapshot 1").unwrap();
        let [low, high] = [mine[0].start, mine[1].start];
        mine[0].touch(low + (64 << 12), low + (66 << 12));
        mine[1].touch(high, high + (1 << 12));
        kept.messages()[5] = 7;
        let file = Arc::clone(&kept.file);
        drop((mine, kept));
        let (mut kept, found) = Kept::open(Arc::clone(&file), "snapshot 1").unwrap();
        assert_eq!(found, at);
        let mut theirs = Region::all(&found, &layout, &uffd).unwrap();
        kept.put_into(&mut theirs);
        assert_eq!(kept.messages()[5], 7);
        for (region, touched) in theirs.iter().zip([64..66, 0..1]) {
            for page in 0..region.guest.len() >> 12 {
                let is = region.is_touched(region.start + (page << 12));
                assert_eq!(is, touched.contains(&page), "{page}");
            }
        }
        let refused = |change: &dyn Fn(), words: &str| {
            change();
            let error = Kept::open(Arc::clone(&file), "snapshot 1")
                .unwrap_err()
                .to_string();
            assert!(error.contains(words), "{error}");
        };
        let error = Kept::open(Arc::clone(&file), "snapshot 2").unwrap_err();
        assert!(
            error.to_string().contains("another snapshot (snapshot 1)"),
            "{error}"
        );
        let poke = |at: u64, value: u64| write_at(&file, &value.to_le_bytes(), at).unwrap();
        refused(&|| ftruncate(&*file, 4096).unwrap(), "cut short");
        refused(&|| ftruncate(&*file, 1 << 20).unwrap(), "pages of no bytes");
        refused(&|| poke(4104, 4096), "pages of no bytes");
        refused(&|| poke(4096, u64::MAX - 1), "last address");
        refused(&|| poke(24, 5000), "another snapshot");
        refused(&|| poke(16, 4097), "too many regions");
        refused(&|| poke(8, 9), "another version");
        refused(&|| ftruncate(&*file, 100).unwrap(), "cut short");
        let (mut mine, ..) = regions(&uffd);
        assert!(Kept::new(&mut mine, &"x".repeat(513)).is_err());
    }
}
