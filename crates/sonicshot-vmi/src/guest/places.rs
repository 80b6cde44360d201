//! The places on their file systems that the pages of files may have, by the kernel's own records:
//! guesses, for a caller that compares them with the disk.
//!
//! - A buffer (`struct buffer_head`) has the number of its block, and its device.
//! - An inode of ext4 has up to four extents in itself (`i_data`), or the first blocks of a tree of them
//!   (`fs/ext4/ext4_extents.h`), which may be in the page cache of its device; and a tree in memory of
//!   those that were used lately (`i_es_tree`, `fs/ext4/extents_status.h`). ext4 is a module, whose types are not in the
//!   kernel's own: where these two are beside the `struct inode` is found by what is there in most of
//!   the inodes. A tree's node is three words of the tree's, then first block, number, and place with
//!   the kind in its upper five bits.
//!
//! What is asked for here is in no table of needs: a kernel that does not tell it has no guesses.

use crate::error::VmiError;
use crate::kernel::{Kernel, element};
use crate::mm::mem_map::MemMap;
use crate::mm::page::PageLayout;
use crate::mm::page::file::{BLOCK_DEVICES, EXT4};
use crate::{AddressSpace, KernelVa, VirtualMemory};
use core::fmt;
use sonicshot::{
    Bytes, ClassSet, GuestBytes, GuestMemory, PageClass, PageMap, PageSize, Pfn, Tally, spread,
    to_u64, to_usize,
};
use std::collections::{BTreeMap, HashMap};

/// The most bytes by which ext4's own inode begins before a `struct inode`, and goes on behind it.
const BEFORE: usize = 1024;
const BEHIND: usize = 1536;
/// Inodes that are looked at for where ext4 has what.
const SAMPLE: usize = 256;
/// Of those that tell of a place, so many must tell of the same.
const AGREE: u64 = 4;
/// A block of extents: its magic, its header's and a record's length, how many records there are in an
/// inode, and how deep a tree of them is at most (`EXT4_MAX_EXTENT_DEPTH`).
const EXTENT_MAGIC: u16 = 0xf30a;
const HEADER: u64 = 12;
const RECORD: u64 = 12;
const IN_INODE: u16 = 4;
const MAX_DEPTH: u16 = 5;
/// Longer ones are not written yet.
const WRITTEN_UP_TO: u16 = 1 << 15;
/// The kind of an extent in a tree: the lowest of five bits is written.
const KIND_SHIFT: u32 = 59;
/// Nodes of trees and blocks of extents that are looked at: so many, and for each page of a file more.
const MIN_NODES: u64 = 1 << 16;
const NODES_A_PAGE: u64 = 4;
/// Nodes on the way down: a tree of so many is twice as deep as a balanced one at most.
const MAX_WAY: usize = 64;

/// The name that a file system was given when it was made (`s_uuid`).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileSystemId(pub [u8; 16]);

impl fmt::Debug for FileSystemId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A page that may be what a file system has at a place: a guess.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct FilePlace {
    /// The page.
    pub frame: Pfn,
    /// The file system, by its number in [`FilePlaces::file_systems`].
    pub file_system: u32,
    /// Its place, in bytes from the beginning of the file system.
    pub at: u64,
}

/// Places that pages of files may have.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct FilePlaces {
    /// The file systems.
    pub file_systems: Vec<FileSystemId>,
    /// The pages.
    pub places: Vec<FilePlace>,
}

impl FilePlaces {
    /// The file system that a page may be on.
    #[must_use]
    pub fn file_system(&self, place: &FilePlace) -> Option<FileSystemId> {
        let number = usize::try_from(place.file_system).ok()?;
        self.file_systems.get(number).copied()
    }
}

/// The offsets of the members that tell a page's place.
#[derive(Debug, Clone, Copy)]
struct Offsets {
    host: u64,
    superblock: u64,
    magic: u64,
    uuid: u64,
    block_bits: u64,
    device: u64,
    buffer_block: u64,
    buffer_device: u64,
    buffer_size: u64,
}

impl Offsets {
    fn new(kernel: &Kernel<'_>) -> Result<Option<Self>, VmiError> {
        let at = |ty, name| -> Result<Option<u64>, VmiError> {
            Ok(kernel.any_member(ty, name)?.map(|member| member.offset))
        };
        let all = (|| -> Result<_, VmiError> {
            let Some(host) = at("address_space", "host")? else {
                return Ok(None);
            };
            let found = [
                at("inode", "i_sb")?,
                at("super_block", "s_magic")?,
                at("super_block", "s_uuid")?,
                at("super_block", "s_blocksize_bits")?,
                at("super_block", "s_bdev")?,
                at("buffer_head", "b_blocknr")?,
                at("buffer_head", "b_bdev")?,
                at("buffer_head", "b_size")?,
            ];
            Ok(Some((host, found)))
        })()?;
        let Some((
            host,
            [
                Some(superblock),
                Some(magic),
                Some(uuid),
                Some(block_bits),
                Some(device),
                Some(buffer_block),
                Some(buffer_device),
                Some(buffer_size),
            ],
        )) = all
        else {
            return Ok(None);
        };
        Ok(Some(Self {
            host,
            superblock,
            magic,
            uuid,
            block_bits,
            device,
            buffer_block,
            buffer_device,
            buffer_size,
        }))
    }
}

/// A mounted file system.
#[derive(Debug, Clone, Copy)]
struct Mounted {
    magic: u64,
    /// By its number.
    id: u32,
    /// A block has two to this power bytes.
    block_bits: u32,
    device: Option<KernelVa>,
}

/// A page of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct InCache {
    mapping: KernelVa,
    index: u64,
    frame: Pfn,
    /// Its first buffer; of one without, 0.
    buffer: KernelVa,
}

impl InCache {
    fn buffer(&self) -> Option<KernelVa> {
        (self.buffer.raw() != 0).then_some(self.buffer)
    }
}

/// Blocks of a file that follow each other on the disk, in blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Extent {
    first: u64,
    len: u64,
    at: u64,
}

/// The pages of block devices, by the device and where on it they begin.
type OnDevices = HashMap<(KernelVa, u64), Pfn>;

/// The blocks of a file system that are in the page cache of its device.
struct CachedBlocks<'a> {
    memory: &'a dyn GuestMemory,
    pages: &'a OnDevices,
    page_size: PageSize,
    device: Option<KernelVa>,
    /// A block has two to this power bytes.
    bits: u32,
}

impl CachedBlocks<'_> {
    /// A block that is no longer than a page.
    fn read(&self, block: u64) -> Option<Vec<u8>> {
        let len = 1_u64
            .checked_shl(self.bits)
            .filter(|len| *len <= self.page_size.bytes())?;
        let at = block.checked_mul(len)?;
        let inside = at & self.page_size.offset_mask();
        let page = at.checked_sub(inside)?;
        let frame = self.pages.get(&(self.device?, page))?;
        let gpa = frame.gpa(self.page_size)?.checked_add(inside)?;
        let mut bytes = vec![0; to_usize(len)];
        self.memory.read(gpa, &mut bytes).ok()?;
        Some(bytes)
    }
}

/// Looks for the places of all pages of files in `pages`.
pub(crate) fn file_places(
    kernel: &Kernel<'_>,
    map: &MemMap<'_>,
    layout: &PageLayout,
    pages: &PageMap,
) -> Result<FilePlaces, VmiError> {
    let _tables = kernel.space.remember_tables();
    let Some(offsets) = Offsets::new(kernel)? else {
        return Ok(FilePlaces::default());
    };
    let mut cached = in_cache(map, layout, pages)?;
    cached.sort_unstable();
    let mut finder = Finder {
        space: &kernel.space,
        offsets,
        page_shift: pages.page_size().shift(),
        mounted: HashMap::new(),
        nodes_left: Tally::new(to_u64(cached.len()))
            .times(NODES_A_PAGE)
            .and(MIN_NODES)
            .get(),
        found: FilePlaces {
            file_systems: Vec::new(),
            places: Vec::with_capacity(cached.len()),
        },
    };
    let mut files: Vec<(KernelVa, Mounted, &[InCache])> = Vec::new();
    for of_file in cached.chunk_by(|a, b| a.mapping == b.mapping) {
        let Some(first) = of_file.first() else {
            continue;
        };
        if let Some((inode, mounted)) = finder.file(first.mapping) {
            files.push((inode, mounted, of_file));
        }
    }
    let ext4: Vec<KernelVa> = files
        .iter()
        .filter(|(_, mounted, _)| mounted.magic == EXT4)
        .map(|(inode, ..)| *inode)
        .collect();
    let ext4 = Ext4::by_inodes(&kernel.space, &ext4);
    let by_device: HashMap<KernelVa, u32> = files
        .iter()
        .filter(|(_, mounted, _)| mounted.magic != BLOCK_DEVICES)
        .filter_map(|(_, mounted, _)| Some((mounted.device?, mounted.id)))
        .collect();
    let devices = files
        .iter()
        .filter(|(_, mounted, _)| mounted.magic == BLOCK_DEVICES)
        .flat_map(|(.., of_device)| of_device.iter());
    let on_devices: OnDevices = devices
        .filter_map(|page| Some((finder.buffer(page.buffer()?)?, page.frame)))
        .collect();
    for (inode, mounted, of_file) in files {
        match mounted.magic {
            EXT4 => {
                let blocks = CachedBlocks {
                    memory: kernel.space.memory(),
                    pages: &on_devices,
                    page_size: pages.page_size(),
                    device: mounted.device,
                    bits: mounted.block_bits,
                };
                finder.of_ext4(&ext4, &blocks, inode, &mounted, of_file);
            }
            BLOCK_DEVICES => finder.of_device(&by_device, of_file),
            _ => {}
        }
    }
    Ok(finder.found)
}

/// The pages of files, by the struct pages.
fn in_cache(
    map: &MemMap<'_>,
    layout: &PageLayout,
    pages: &PageMap,
) -> Result<Vec<InCache>, VmiError> {
    const CACHE: ClassSet = ClassSet::EMPTY
        .with(PageClass::PageCacheClean)
        .with(PageClass::PageCacheDirty);
    let counts = pages.counts();
    // No more than there are frames, of each of which the map has a byte.
    let most = CACHE.iter().map(|class| counts.get(class)).sum::<Tally>();
    let mut found = Vec::with_capacity(to_usize(most.get()));
    let mut copy = [0_u8; 256];
    let stride = map.stride_len()?;
    let Some(copy) = copy.get_mut(..stride) else {
        return Ok(found);
    };
    let cached = pages.runs().filter(|(_, class)| CACHE.contains(*class));
    for frame in cached.flat_map(|(frames, _)| frames.iter()) {
        let Some(at) = map.page_va(frame) else {
            continue;
        };
        map.copy_pages(at, copy)?;
        let mut inside = 0;
        if let Some(head) = layout.head_of(&GuestBytes::from_slice(copy), at) {
            let head_frame = map.frame_of(head);
            let Some(behind) = head_frame.and_then(|head| frame.offset_from(head)) else {
                continue;
            };
            inside = behind;
            map.copy_pages(head, copy)?;
        }
        let Some(page) = layout.in_file(&GuestBytes::from_slice(copy)) else {
            continue;
        };
        if let Some(index) = page.index.checked_add(inside) {
            found.push(InCache {
                mapping: page.mapping,
                index,
                frame,
                // Those of the first page of a folio say where the others are, too.
                buffer: page
                    .private
                    .filter(|_| inside == 0)
                    .unwrap_or(KernelVa::new(0)),
            });
        }
    }
    Ok(found)
}

struct Finder<'a, 'm> {
    space: &'a AddressSpace<'m>,
    offsets: Offsets,
    page_shift: u32,
    mounted: HashMap<KernelVa, Option<Mounted>>,
    nodes_left: u64,
    found: FilePlaces,
}

impl Finder<'_, '_> {
    fn word(&self, from: KernelVa, offset: u64) -> Option<u64> {
        let at = element("a file's place", from, 0, 0, offset).ok()?;
        self.space.read_u64(at).ok()
    }

    fn pointer(&self, from: KernelVa, offset: u64) -> Option<KernelVa> {
        let to = self.word(from, offset)?;
        self.space.is_pointer(to).then_some(KernelVa::new(to))
    }

    /// The inode of `mapping`, and its file system.
    fn file(&mut self, mapping: KernelVa) -> Option<(KernelVa, Mounted)> {
        let inode = self.pointer(mapping, self.offsets.host)?;
        let superblock = self.pointer(inode, self.offsets.superblock)?;
        if let Some(known) = self.mounted.get(&superblock) {
            return known.map(|mounted| (inode, mounted));
        }
        let mounted = self.read_mounted(superblock);
        self.mounted.insert(superblock, mounted);
        mounted.map(|mounted| (inode, mounted))
    }

    fn read_mounted(&mut self, superblock: KernelVa) -> Option<Mounted> {
        let at = element("super_block.s_uuid", superblock, 0, 0, self.offsets.uuid).ok()?;
        let mut id = [0; 16];
        self.space.read(at, &mut id).ok()?;
        let at = element("super_block", superblock, 0, 0, self.offsets.block_bits).ok()?;
        let mut bits = [0; 1];
        self.space.read(at, &mut bits).ok()?;
        let mounted = Mounted {
            magic: self.word(superblock, self.offsets.magic)?,
            id: u32::try_from(self.found.file_systems.len()).ok()?,
            block_bits: u32::from(bits[0]),
            device: self.pointer(superblock, self.offsets.device),
        };
        self.found.file_systems.push(FileSystemId(id));
        Some(mounted)
    }

    fn push(&mut self, frame: Pfn, file_system: u32, at: u64) {
        self.found.places.push(FilePlace {
            frame,
            file_system,
            at,
        });
    }

    /// The device of a buffer, and the buffer's place on it.
    fn buffer(&self, at: KernelVa) -> Option<(KernelVa, u64)> {
        let block = self.word(at, self.offsets.buffer_block)?;
        let size = self.word(at, self.offsets.buffer_size)?;
        let device = self.pointer(at, self.offsets.buffer_device)?;
        let is_size = size.is_power_of_two() && (512..=1 << 16).contains(&size);
        Some((device, block.checked_mul(size).filter(|_| is_size)?))
    }

    fn of_device(&mut self, known: &HashMap<KernelVa, u32>, pages: &[InCache]) {
        for page in pages {
            let place = page.buffer().and_then(|buffer| self.buffer(buffer));
            let place = place.and_then(|(device, at)| Some((*known.get(&device)?, at)));
            if let Some((file_system, at)) = place {
                self.push(page.frame, file_system, at);
            }
        }
    }

    fn of_ext4(
        &mut self,
        ext4: &Ext4,
        blocks: &CachedBlocks<'_>,
        inode: KernelVa,
        mounted: &Mounted,
        pages: &[InCache],
    ) {
        let extents = ext4.extents(self.space, blocks, inode, &mut self.nodes_left);
        for page in pages {
            let by_extent = || {
                let byte = page.index.checked_shl(self.page_shift)?;
                let block = byte.checked_shr(mounted.block_bits)?;
                let inside = byte.checked_sub(block.checked_shl(mounted.block_bits)?)?;
                let (_, extent) = extents.range(..=block).next_back()?;
                let behind = block.checked_sub(extent.first)?;
                let block = extent
                    .at
                    .checked_add(behind)
                    .filter(|_| behind < extent.len)?;
                block
                    .checked_mul(1_u64.checked_shl(mounted.block_bits)?)?
                    .checked_add(inside)
            };
            let place = by_extent().or_else(|| {
                let (device, at) = self.buffer(page.buffer()?)?;
                (Some(device) == mounted.device).then_some(at)
            });
            if let Some(at) = place {
                self.push(page.frame, mounted.id, at);
            }
        }
    }
}

/// The offsets of ext4's own members from a `struct inode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Ext4 {
    /// `i_data`, so far before it.
    data: Option<usize>,
    /// `i_es_tree`, so far behind it.
    tree: Option<usize>,
}

fn count(votes: &mut BTreeMap<usize, Tally>, place: usize) {
    votes.entry(place).or_default().add(1);
}

/// The place that most votes name, if enough do.
fn most(votes: &BTreeMap<usize, Tally>) -> Option<usize> {
    let (place, count) = votes.iter().max_by_key(|(_, count)| **count)?;
    (count.get() >= AGREE).then_some(*place)
}

impl Ext4 {
    fn by_inodes(space: &AddressSpace<'_>, inodes: &[KernelVa]) -> Self {
        let (mut data, mut tree) = (BTreeMap::new(), BTreeMap::new());
        for inode in spread(inodes, SAMPLE) {
            for before in (8..=BEFORE).step_by(8) {
                if in_inode(space, *inode, before).is_some_and(|block| !block.records.is_empty()) {
                    count(&mut data, before);
                }
            }
            for behind in (0..BEHIND).step_by(8) {
                if root(space, *inode, behind).is_some_and(|node| node.is_root()) {
                    count(&mut tree, behind);
                }
            }
        }
        Self {
            data: most(&data),
            tree: most(&tree),
        }
    }

    /// The extents of an inode, by their first blocks.
    fn extents(
        self,
        space: &AddressSpace<'_>,
        blocks: &CachedBlocks<'_>,
        inode: KernelVa,
        nodes_left: &mut u64,
    ) -> BTreeMap<u64, Extent> {
        let mut found = BTreeMap::new();
        let by_tree = self
            .tree
            .map(|tree| in_tree(space, inode, tree, nodes_left));
        let by_data = self
            .data
            .and_then(|data| in_inode(space, inode, data))
            .map(|block| in_blocks(block, blocks, nodes_left));
        // What was used lately is newer, if they differ.
        for extent in by_data.into_iter().chain(by_tree).flatten() {
            found.insert(extent.first, extent);
        }
        found
    }
}

/// A block of extents, or of blocks with more of them.
struct ExtentBlock {
    /// The number of levels below it.
    depth: u16,
    records: Vec<Record>,
}

/// An extent, or, in a block with others below it, the place of one of those.
struct Record {
    first: u32,
    words: [u16; 4],
}

impl ExtentBlock {
    /// The block in `bytes`, of which there is room for `room` records; nothing if there is none.
    fn parse(bytes: &[u8], room: u16) -> Option<Self> {
        let number = |at| bytes.le_at::<u16>(at);
        let (magic, entries, most, depth) = (number(0)?, number(2)?, number(4)?, number(6)?);
        if magic != EXTENT_MAGIC || most != room || entries > most || depth > MAX_DEPTH {
            return None;
        }
        let records = (0..u64::from(entries)).map(|entry| {
            let at = HEADER.checked_add(entry.checked_mul(RECORD)?)?;
            let record = bytes.part(at, RECORD)?;
            let word = |at| record.le_at::<u16>(at);
            Some(Record {
                first: record.le_at(0)?,
                words: [word(4)?, word(6)?, word(8)?, word(10)?],
            })
        });
        let records = records.collect::<Option<_>>()?;
        Some(Self { depth, records })
    }
}

impl Record {
    /// The extent, if it was written.
    fn extent(&self) -> Option<Extent> {
        let [len, high, low, middle] = self.words;
        (len > 0 && len <= WRITTEN_UP_TO).then(|| Extent {
            first: self.first.into(),
            len: len.into(),
            at: place(high, middle, low),
        })
    }

    /// The block that it leads to.
    fn below(&self) -> u64 {
        let [low, middle, high, _] = self.words;
        place(high, middle, low)
    }
}

/// The number of a block, which has 48 bits.
fn place(high: u16, middle: u16, low: u16) -> u64 {
    (u64::from(high) << 32) | (u64::from(middle) << 16) | u64::from(low)
}

/// The block of extents that an inode has in itself, `before` its `struct inode`.
fn in_inode(space: &AddressSpace<'_>, inode: KernelVa, before: usize) -> Option<ExtentBlock> {
    let mut bytes = [0_u8; 60];
    let at = inode.raw().checked_sub(to_u64(before)).map(KernelVa::new)?;
    space.read(at, &mut bytes).ok()?;
    ExtentBlock::parse(&bytes, IN_INODE)
}

/// The extents in a block, and in those below it that are in memory. No more than `left` blocks are
/// looked at.
fn in_blocks(root: ExtentBlock, blocks: &CachedBlocks<'_>, left: &mut u64) -> Vec<Extent> {
    let mut found = Vec::new();
    let mut way = vec![root];
    while let Some(block) = way.pop() {
        let Some(below) = block.depth.checked_sub(1) else {
            found.extend(block.records.iter().filter_map(Record::extent));
            continue;
        };
        for record in &block.records {
            let Some(less) = left.checked_sub(1) else {
                return found;
            };
            *left = less;
            let Some(bytes) = blocks.read(record.below()) else {
                continue;
            };
            let room = to_u64(bytes.len())
                .checked_sub(HEADER)
                .map(|len| len / RECORD);
            let block = room
                .and_then(|room| ExtentBlock::parse(&bytes, u16::try_from(room).ok()?))
                // One that leads up again would be without end.
                .filter(|block| block.depth == below);
            way.extend(block);
        }
    }
    found
}

/// A node of a tree of extents.
#[derive(Debug, Clone, Copy)]
struct Node {
    parent: u64,
    right: u64,
    left: u64,
    first: u32,
    len: u32,
    place: u64,
}

impl Node {
    fn read(space: &AddressSpace<'_>, at: u64) -> Option<Self> {
        if !space.is_pointer(at) || !at.is_multiple_of(8) {
            return None;
        }
        let mut bytes = [0_u8; 40];
        space.read(KernelVa::new(at), &mut bytes).ok()?;
        let bytes = bytes.as_slice();
        Some(Self {
            parent: bytes.le_at(0)?,
            right: bytes.le_at(8)?,
            left: bytes.le_at(16)?,
            first: bytes.le_at(24)?,
            len: bytes.le_at(28)?,
            place: bytes.le_at(32)?,
        })
    }

    /// Whether it looks like the node that a tree begins with: it has no parent and is black, and its
    /// extent has one kind.
    fn is_root(&self) -> bool {
        let kind = (self.place >> KIND_SHIFT) & 0xf;
        self.parent == 1
            && self.len > 0
            && kind.is_power_of_two()
            && self.first.checked_add(self.len).is_some()
    }

    fn extent(&self) -> Option<Extent> {
        let is_written = (self.place >> KIND_SHIFT) & 1 == 1;
        is_written.then_some(Extent {
            first: self.first.into(),
            len: self.len.into(),
            at: self.place & ((1 << KIND_SHIFT) - 1),
        })
    }
}

fn root(space: &AddressSpace<'_>, inode: KernelVa, behind: usize) -> Option<Node> {
    let at = inode.checked_add(to_u64(behind))?;
    Node::read(space, space.read_u64(at).ok()?)
}

/// The extents in the tree of an inode, `behind` its `struct inode`. No more than `left` nodes are looked
/// at: trees that lead into each other would be without end.
fn in_tree(
    space: &AddressSpace<'_>,
    inode: KernelVa,
    behind: usize,
    left: &mut u64,
) -> Vec<Extent> {
    let mut found = Vec::new();
    let Some(root) = root(space, inode, behind).filter(Node::is_root) else {
        return found;
    };
    let mut way = vec![root];
    while let Some(node) = way.pop() {
        let Some(less) = left.checked_sub(1) else {
            break;
        };
        *left = less;
        found.extend(node.extent());
        let below = [node.right, node.left].into_iter();
        let below = below.filter(|at| *at != 0);
        way.extend(below.filter_map(|at| Node::read(space, at)));
        if way.len() > MAX_WAY {
            break;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::{
        BEFORE, CachedBlocks, Ext4, Extent, IN_INODE, KIND_SHIFT, MAX_WAY, Offsets, OnDevices,
    };
    use crate::KernelVa;
    use crate::kernel::testing::{DIRECT_MAP, Facts, Ram, kernel};
    use sonicshot::{GuestMemory, PageSize, Pfn};

    /// The first inode; each of them has 4 KiB.
    const INODE: u64 = 0x10_0000;
    const DATA: u64 = 0x180;
    const TREE: u64 = 0x2a0;
    const NODES: u64 = 0x20_0000;

    fn va(at: u64) -> KernelVa {
        KernelVa::new(DIRECT_MAP + at)
    }

    /// A device with blocks of 1 KiB.
    fn blocks<'a>(memory: &'a dyn GuestMemory, pages: &'a OnDevices) -> CachedBlocks<'a> {
        CachedBlocks {
            memory,
            pages,
            page_size: PageSize::SIZE_4K,
            device: Some(va(0x77)),
            bits: 10,
        }
    }

    /// An inode with these extents in it: first block, number, place.
    fn put_inode(ram: &mut Ram, at: u64, extents: &[(u32, u16, u64)]) {
        let mut bytes = Vec::new();
        bytes.extend(0xf30a_u16.to_le_bytes());
        bytes.extend(u16::try_from(extents.len()).unwrap().to_le_bytes());
        bytes.extend(IN_INODE.to_le_bytes());
        bytes.extend([0; 6]);
        for (first, len, place) in extents {
            bytes.extend(first.to_le_bytes());
            bytes.extend(len.to_le_bytes());
            bytes.extend(u16::try_from(place >> 32).unwrap().to_le_bytes());
            bytes.extend(u32::try_from(place & 0xffff_ffff).unwrap().to_le_bytes());
        }
        let start = usize::try_from(at - DATA).unwrap();
        ram.0[start..start + bytes.len()].copy_from_slice(&bytes);
    }

    /// A node: its children by their numbers, and its extent with its kind.
    fn put_node(
        ram: &mut Ram,
        number: u64,
        parent: u64,
        children: [u64; 2],
        (first, len, place, kind): (u32, u32, u64, u64),
    ) {
        let at = NODES + number * 64;
        let child = |number: u64| match number {
            0 => 0,
            number => DIRECT_MAP + NODES + number * 64,
        };
        ram.put(at, parent);
        ram.put(at + 8, child(children[1]));
        ram.put(at + 16, child(children[0]));
        ram.put(at + 24, u64::from(first) | u64::from(len) << 32);
        ram.put(at + 32, place | kind << KIND_SHIFT);
    }

    fn ram() -> (Ram, Vec<KernelVa>) {
        let mut ram = Ram::new(8 << 20);
        for number in 0..8 {
            let at = INODE + number * 0x1000;
            put_inode(&mut ram, at, &[(0, 4, 1000 + number), (9, 2, 1 << 40)]);
            ram.put(at + TREE, DIRECT_MAP + NODES + 64);
        }
        put_node(&mut ram, 1, 1, [2, 3], (20, 5, 500, 1));
        put_node(
            &mut ram,
            2,
            DIRECT_MAP + NODES + 64,
            [0, 0],
            (9, 2, 77, 1 | 16),
        );
        // Not written yet.
        put_node(
            &mut ram,
            3,
            DIRECT_MAP + NODES + 65,
            [0, 0],
            (40, 9, 900, 2),
        );
        let inodes = (0..8).map(|number| va(INODE + number * 0x1000));
        (ram, inodes.collect())
    }

    #[test]
    fn ext4s_extents_are_found_beside_its_inodes() {
        let (ram, inodes) = ram();
        let memory = ram.memory();
        let kernel = kernel(&memory, Facts::default());
        let ext4 = Ext4::by_inodes(&kernel.space, &inodes);
        let [data, tree] = [DATA, TREE].map(|at| usize::try_from(at).ok());
        assert_eq!(ext4, Ext4 { data, tree });
        let none = OnDevices::new();
        let blocks = blocks(&memory, &none);
        let found = ext4.extents(&kernel.space, &blocks, inodes[3], &mut 100);
        let extent = |first, len, at| (first, Extent { first, len, at });
        // What was used lately counts.
        let want = [extent(0, 4, 1003), extent(9, 2, 77), extent(20, 5, 500)];
        assert!(found.into_iter().eq(want));
        // Of an inode that nothing is beside there is nothing, and none that cannot be read.
        for inode in [va(INODE + 0x9000), va(BEFORE as u64 / 2), va(1 << 40)] {
            let found = ext4.extents(&kernel.space, &blocks, inode, &mut 100);
            assert!(found.is_empty());
        }
        // Three say nothing.
        assert_eq!(
            Ext4::by_inodes(&kernel.space, &inodes[..3]),
            Ext4::default()
        );
    }

    #[test]
    fn trees_that_lead_into_themselves_end() {
        let (mut ram, inodes) = ram();
        put_node(&mut ram, 2, 0, [1, 1], (9, 2, 77, 1));
        let memory = ram.memory();
        let kernel = kernel(&memory, Facts::default());
        let ext4 = Ext4::by_inodes(&kernel.space, &inodes);
        let none = OnDevices::new();
        let blocks = blocks(&memory, &none);
        let mut left = 1000;
        let found = ext4.extents(&kernel.space, &blocks, inodes[0], &mut left);
        assert!(!found.is_empty());
        assert!(left > 1000 - 2 * MAX_WAY as u64);
        // No more nodes than there are.
        let mut few = 1;
        ext4.extents(&kernel.space, &blocks, inodes[0], &mut few);
        assert_eq!(few, 0);
    }

    /// A block of extents in bytes; of one with others below it, their places are the third numbers.
    fn block(room: u16, depth: u16, records: &[(u32, u16, u64)]) -> Vec<u8> {
        let count = u16::try_from(records.len()).unwrap();
        let mut bytes = Vec::new();
        for word in [0xf30a, count, room, depth, 0, 0] {
            bytes.extend(word.to_le_bytes());
        }
        for (first, len, place) in records {
            bytes.extend(first.to_le_bytes());
            let (high, low) = (place >> 32, place & 0xffff_ffff);
            let (high, low) = (u16::try_from(high).unwrap(), u32::try_from(low).unwrap());
            if depth == 0 {
                bytes.extend(len.to_le_bytes());
                bytes.extend(high.to_le_bytes());
                bytes.extend(low.to_le_bytes());
            } else {
                bytes.extend(low.to_le_bytes());
                bytes.extend(high.to_le_bytes());
                bytes.extend([0; 2]);
            }
        }
        bytes
    }

    #[test]
    fn extents_in_blocks_of_the_device_are_found_where_the_page_cache_has_them() {
        const IN_BLOCK: u16 = 84;
        let (mut ram, inodes) = ram();
        let deep = usize::try_from(INODE - DATA).unwrap();
        let root = block(IN_INODE, 2, &[(0, 0, 9), (500, 0, 4)]);
        ram.0[deep..deep + root.len()].copy_from_slice(&root);
        // Block 9 is the second of the third page of the device, which is in frame 0x300; block 4 the
        // first of its second page. The place of one of the extents has more than 32 bits.
        let far = 0x1234_5678_9abc;
        let middle = block(
            IN_BLOCK,
            1,
            &[(0, 0, 10), (90, 0, 11), (95, 0, 9), (99, 0, 1 << 30)],
        );
        let leaf = block(
            IN_BLOCK,
            0,
            &[(0, 7, far), (60, 9, 33), (80, (1 << 15) + 3, 50)],
        );
        for (at, bytes) in [(0x30_0400, middle), (0x30_0800, leaf)] {
            ram.0[at..at + bytes.len()].copy_from_slice(&bytes);
        }
        let memory = ram.memory();
        let kernel = kernel(&memory, Facts::default());
        let ext4 = Ext4::by_inodes(&kernel.space, &inodes);
        let pages = OnDevices::from([
            ((va(0x77), 0x2000), Pfn::new(0x300)),
            // Of another device.
            ((va(0x88), 0x1000), Pfn::new(0x300)),
        ]);
        let blocks = blocks(&memory, &pages);
        let found = ext4.extents(&kernel.space, &blocks, inodes[0], &mut 100);
        let extent = |first, len, at| (first, Extent { first, len, at });
        // With those of the tree in memory; what is not written, is no block of extents, or leads up
        // again has none.
        let want = [
            extent(0, 7, far),
            extent(9, 2, 77),
            extent(20, 5, 500),
            extent(60, 9, 33),
        ];
        assert!(found.into_iter().eq(want));
        // A block that has not room for what it says to have, and no more blocks than are left.
        let mut left = 4;
        ext4.extents(&kernel.space, &blocks, inodes[0], &mut left);
        assert_eq!(left, 0);
        assert!(super::ExtentBlock::parse(&block(3, 0, &[(0, 1, 1); 4]), 3).is_none());
        assert!(super::ExtentBlock::parse(&block(4, 6, &[(0, 1, 1)]), 4).is_none());
        assert!(super::ExtentBlock::parse(&block(4, 0, &[(0, 1, 1)])[..20], 4).is_none());
    }

    #[test]
    fn without_the_members_there_are_no_guesses() {
        let ram = Ram::new(1 << 20);
        let memory = ram.memory();
        let mut facts = Facts::default();
        assert!(Offsets::new(&kernel(&memory, facts)).unwrap().is_none());
        facts = Facts::default();
        for (ty, name) in [
            ("address_space", "host"),
            ("inode", "i_sb"),
            ("super_block", "s_magic"),
            ("super_block", "s_uuid"),
            ("super_block", "s_blocksize_bits"),
            ("super_block", "s_bdev"),
            ("buffer_head", "b_blocknr"),
            ("buffer_head", "b_bdev"),
            ("buffer_head", "b_size"),
        ] {
            facts.member(ty, name, 8);
        }
        assert!(Offsets::new(&kernel(&memory, facts)).unwrap().is_some());
    }
}
