//! Pages of files: which of them are as they are on the disk.
//!
//! A page that is not dirty, not written back and not locked is as its file system left it
//! (`PG_dirty`, `PG_writeback`, `PG_locked`, `include/linux/page-flags.h`). What `PG_private` adds
//! depends on the file system, which the page's `struct address_space` leads to:
//!
//! - XFS's is iomap's `struct iomap_folio_state`, which any folio of more than one block has
//!   (`fs/iomap/buffered-io.c`); btrfs's is on all data (`set_page_extent_mapped`,
//!   `fs/btrfs/extent_io.c`). Neither says that the page is dirty.
//! - ext2, ext3, ext4 and block devices have a ring of `struct buffer_head`
//!   (`include/linux/buffer_head.h`), each with a state of its own, that a journal may have taken.
//! - Of all others it is not known, and their pages count as dirty.
//!
//! A page behind the end of its file is nowhere on the disk. ext4 keeps its buddy bitmaps in such
//! pages (`s_buddy_cache`, `fs/ext4/mballoc.c`): its inode is empty.

use crate::error::VmiError;
use crate::kernel::{Kernel, element};
use crate::{AddressSpace, KernelVa, VirtualMemory};
use sonicshot::{PageSize, Tally, to_u64};
use std::collections::HashMap;

/// `include/uapi/linux/magic.h`; ext2 and ext3 have the same.
pub(crate) const EXT4: u64 = 0xef53;
const XFS: u64 = 0x5846_5342;
const BTRFS: u64 = 0x9123_683e;
pub(crate) const BLOCK_DEVICES: u64 = 0x6264_6576;
/// A folio is 2 MiB at most, and a block at least 512 bytes.
const MAX_BUFFERS: usize = 4096;
/// So many blocks of 512 bytes are in 4 KiB; in 64 KiB there are more, and of no file system's.
const MAX_BUFFERS_A_FRAME: u64 = 8;
/// So many files are remembered by one thread.
const KEPT_FILES: usize = 1 << 12;

/// The offsets of the members that tell a page's file.
#[derive(Debug, Clone)]
pub(crate) struct FileLayout {
    /// In `struct page`.
    pub(super) index: usize,
    host: u64,
    superblock: u64,
    size: u64,
    magic: u64,
    buffers: Option<BufferLayout>,
    page_size: PageSize,
}

/// The offset of a buffer's state, and the values that it may have while the buffer is as on the disk.
#[derive(Debug, Clone, Copy)]
struct BufferLayout {
    state: u64,
    next: u64,
    clean: u64,
}

/// The place in a file that a page tells of itself.
#[derive(Debug, Clone, Copy)]
pub(crate) struct InFile {
    pub mapping: KernelVa,
    /// In pages.
    pub index: u64,
    /// The pointer `page.private`, if `PG_private` says that it is the file system's.
    pub private: Option<KernelVa>,
}

/// A file, or a block device.
#[derive(Debug, Clone, Copy)]
struct File {
    magic: u64,
    /// In bytes.
    size: u64,
}

impl FileLayout {
    /// `None` if no source knows all of it.
    pub(super) fn new(kernel: &Kernel<'_>, stride: u64) -> Result<Option<Self>, VmiError> {
        let at = |ty: &str, name: &str| -> Result<Option<u64>, VmiError> {
            Ok(kernel.member(ty, name)?.map(|member| member.offset))
        };
        let index = kernel.first_member("page", &["index", "__folio_index"])?;
        let index = index.filter(|member| {
            let end = member.offset.checked_add(8);
            end.is_some_and(|end| end <= stride)
        });
        let index = index.and_then(|member| usize::try_from(member.offset).ok());
        let (Some(index), Some(host), Some(superblock), Some(size), Some(magic)) = (
            index,
            at("address_space", "host")?,
            at("inode", "i_sb")?,
            at("inode", "i_size")?,
            at("super_block", "s_magic")?,
        ) else {
            return Ok(None);
        };
        Ok(Some(Self {
            index,
            host,
            superblock,
            size,
            magic,
            buffers: BufferLayout::new(kernel)?,
            page_size: kernel.build.page_size,
        }))
    }

    /// The file of `mapping`, if that leads to one.
    fn file(&self, space: &AddressSpace<'_>, mapping: KernelVa) -> Option<File> {
        let word = |what, from: KernelVa, offset| {
            let at = element(what, from, 0, 0, offset).ok()?;
            space.read_u64(at).ok()
        };
        let pointer = |what, from, offset| {
            let to = word(what, from, offset).filter(|to| space.is_pointer(*to));
            to.map(KernelVa::new)
        };
        let inode = pointer("address_space.host", mapping, self.host)?;
        let superblock = pointer("inode.i_sb", inode, self.superblock)?;
        Some(File {
            magic: word("super_block.s_magic", superblock, self.magic)?,
            size: word("inode.i_size", inode, self.size)?,
        })
    }

    /// Whether the page is as it is on the disk, if none of its flags but `PG_private` says that it
    /// is not.
    pub(crate) fn is_clean(
        &self,
        space: &AddressSpace<'_>,
        files: &mut Files,
        page: InFile,
    ) -> bool {
        let Some(file) = files.get(page.mapping, || self.file(space, page.mapping)) else {
            return false;
        };
        let start = page.index.checked_mul(self.page_size.bytes());
        let is_in_file = start.is_some_and(|start| start < file.size);
        is_in_file
            && match (page.private, file.magic) {
                (None, _) | (Some(_), XFS | BTRFS) => true,
                (Some(first), EXT4 | BLOCK_DEVICES) => self.buffers.is_some_and(|buffers| {
                    buffers.are_clean(space, first, &mut files.buffers_left)
                }),
                (Some(_), _) => false,
            }
    }
}

impl BufferLayout {
    /// `None` if no source knows all of it.
    fn new(kernel: &Kernel<'_>) -> Result<Option<Self>, VmiError> {
        let at = |name: &str| -> Result<Option<u64>, VmiError> {
            Ok(kernel
                .member("buffer_head", name)?
                .map(|member| member.offset))
        };
        let mut clean = 0;
        for name in ["BH_Uptodate", "BH_Req", "BH_Mapped"] {
            let bit = kernel.constant(name)?;
            let mask = bit.and_then(|bit| 1_u64.checked_shl(u32::try_from(bit).ok()?));
            let Some(mask) = mask else {
                return Ok(None);
            };
            clean |= mask;
        }
        let (Some(state), Some(next)) = (at("b_state")?, at("b_this_page")?) else {
            return Ok(None);
        };
        Ok(Some(Self { state, next, clean }))
    }

    /// Whether all buffers in the ring of `first` are as on the disk. No more than `left` are
    /// looked at: rings of many pages that lead into each other would be without end.
    fn are_clean(self, space: &AddressSpace<'_>, first: KernelVa, left: &mut u64) -> bool {
        let mut at = first;
        for _ in 0..MAX_BUFFERS {
            let Some(less) = left.checked_sub(1) else {
                return false;
            };
            *left = less;
            let word = |offset| {
                let place = element("buffer_head", at, 0, 0, offset).ok()?;
                space.read_u64(place).ok()
            };
            if word(self.state).is_none_or(|state| state & !self.clean != 0) {
                return false;
            }
            match word(self.next).filter(|next| space.is_pointer(*next)) {
                Some(next) if KernelVa::new(next) == first => return true,
                Some(next) => at = KernelVa::new(next),
                None => return false,
            }
        }
        false
    }
}

/// The files that pages were of lately.
#[derive(Debug)]
pub(crate) struct Files {
    known: HashMap<KernelVa, Option<File>>,
    /// So many buffers are still looked at.
    buffers_left: u64,
}

impl Files {
    /// None yet, of so many frames.
    pub(crate) fn of_frames(frames: u64) -> Self {
        // The folio that a piece begins in has its head in another. It is only a bound on work.
        let of_frames = Tally::new(frames).times(MAX_BUFFERS_A_FRAME);
        Self {
            known: HashMap::new(),
            buffers_left: of_frames.and(to_u64(MAX_BUFFERS)).get(),
        }
    }

    fn get(&mut self, mapping: KernelVa, find: impl FnOnce() -> Option<File>) -> Option<File> {
        if self.known.len() >= KEPT_FILES && !self.known.contains_key(&mapping) {
            self.known.clear();
        }
        *self.known.entry(mapping).or_insert_with(find)
    }
}

#[cfg(test)]
mod tests {
    use super::{
        BLOCK_DEVICES, BTRFS, EXT4, FileLayout, Files, InFile, MAX_BUFFERS, MAX_BUFFERS_A_FRAME,
        XFS,
    };
    use crate::KernelVa;
    use crate::kernel::testing::{DIRECT_MAP, Facts, Ram, kernel};

    const MAPPING: u64 = 0x1000;
    const INODE: u64 = 0x2000;
    const SUPERBLOCK: u64 = 0x3000;
    const BUFFERS: u64 = 0x1_0000;

    fn facts() -> Facts {
        let mut facts = Facts::default();
        facts.member("page", "index", 32);
        facts.member("address_space", "host", 0);
        facts.member("inode", "i_sb", 40);
        facts.member("inode", "i_size", 80);
        facts.member("super_block", "s_magic", 96);
        facts.member("buffer_head", "b_state", 0);
        facts.member("buffer_head", "b_this_page", 8);
        let bits = [("BH_Uptodate", 0), ("BH_Req", 3), ("BH_Mapped", 4)];
        facts.constants.extend(bits);
        facts
    }

    /// A file of three pages and a bit, and a page with so many buffers.
    fn ram(magic: u64, buffers: u64) -> Ram {
        let mut ram = Ram::new(8 << 20);
        ram.put(MAPPING, DIRECT_MAP + INODE);
        ram.put(INODE + 40, DIRECT_MAP + SUPERBLOCK);
        ram.put(INODE + 80, 0x3001);
        ram.put(SUPERBLOCK + 96, magic);
        for number in 0..buffers {
            let next = (number + 1) % buffers;
            ram.put(BUFFERS + number * 64, 0b1_1001);
            ram.put(BUFFERS + number * 64 + 8, DIRECT_MAP + BUFFERS + next * 64);
        }
        ram
    }

    fn is_clean(ram: &Ram, facts: Facts, index: u64, private: bool) -> bool {
        look(ram, facts, index, private, &mut Files::of_frames(1))
    }

    fn look(ram: &Ram, facts: Facts, index: u64, private: bool, files: &mut Files) -> bool {
        let memory = ram.memory();
        let kernel = kernel(&memory, facts);
        let layout = FileLayout::new(&kernel, 64).unwrap().unwrap();
        let page = InFile {
            mapping: KernelVa::new(DIRECT_MAP + MAPPING),
            index,
            private: private.then_some(KernelVa::new(DIRECT_MAP + BUFFERS)),
        };
        layout.is_clean(&kernel.space, files, page)
    }

    #[test]
    fn what_is_private_is_told_by_the_file_system() {
        for (magic, clean) in [
            (EXT4, true),
            (BLOCK_DEVICES, true),
            (XFS, true),
            (BTRFS, true),
            // NFS
            (0x6969, false),
        ] {
            let ram = ram(magic, 4);
            assert_eq!(is_clean(&ram, facts(), 1, true), clean, "{magic:#x}");
            assert!(is_clean(&ram, facts(), 1, false), "{magic:#x}");
        }
    }

    #[test]
    fn a_page_behind_the_end_of_its_file_is_nowhere_on_the_disk() {
        for (index, clean) in [(0, true), (3, true), (4, false), (u64::MAX, false)] {
            assert_eq!(is_clean(&ram(EXT4, 1), facts(), index, false), clean);
        }
    }

    #[test]
    fn one_buffer_that_is_not_as_on_the_disk_is_enough() {
        for bit in 0..64 {
            let mut ram = ram(EXT4, 4);
            ram.put(BUFFERS + 2 * 64, 1 << bit);
            let clean = [0, 3, 4].contains(&bit);
            assert_eq!(is_clean(&ram, facts(), 1, true), clean, "{bit}");
        }
        // A ring that does not close, or leads nowhere.
        let most = MAX_BUFFERS as u64;
        assert!(is_clean(&ram(EXT4, most), facts(), 1, true));
        assert!(!is_clean(&ram(EXT4, most + 1), facts(), 1, true));
        for next in [0, DIRECT_MAP + (1 << 40)] {
            let mut ram = ram(EXT4, 4);
            ram.put(BUFFERS + 64 + 8, next);
            assert!(!is_clean(&ram, facts(), 1, true), "{next:#x}");
        }
    }

    #[test]
    fn no_more_buffers_are_looked_at_than_frames_have() {
        let ram = ram(EXT4, MAX_BUFFERS as u64);
        let mut files = Files::of_frames(MAX_BUFFERS as u64 / MAX_BUFFERS_A_FRAME);
        let mut look = || look(&ram, facts(), 1, true, &mut files);
        assert_eq!((look(), look(), look(), look()), (true, true, false, false));
    }

    #[test]
    fn what_leads_to_no_file_is_not_clean() {
        for at in [MAPPING, INODE + 40] {
            for to in [0, 0x1234, DIRECT_MAP + (1 << 40)] {
                let mut ram = ram(XFS, 1);
                ram.put(at, to);
                assert!(!is_clean(&ram, facts(), 1, false), "{at:#x} {to:#x}");
            }
        }
        let mut without = facts();
        without.constants.remove("BH_Mapped");
        assert!(!is_clean(&ram(EXT4, 1), without, 1, true));
    }
}
