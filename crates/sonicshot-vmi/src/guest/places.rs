//! Where on their file systems the pages of files may be, by the kernel's own records: guesses, for
//! who compares them with the disk.
//!
//! - A buffer (`struct buffer_head`) has the number of its block, and its device.
//! - An inode of ext4 has up to four extents in itself (`i_data`), and a tree of those that were used
//!   lately (`i_es_tree`, `fs/ext4/extents_status.h`). ext4 is a module, whose types are not in the
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
    Bytes, ClassSet, GuestBytes, PageClass, PageMap, Pfn, Tally, spread, to_u64, to_usize,
};
use std::collections::{BTreeMap, HashMap};

/// How far before a `struct inode` ext4's own begins, at most, and how far behind it goes on.
const BEFORE: usize = 1024;
const BEHIND: usize = 1536;
/// Inodes that are looked at for where ext4 has what.
const SAMPLE: usize = 256;
/// Of those that tell of a place, so many must tell of the same.
const AGREE: u64 = 4;
/// An extent's magic, and how many there are in an inode.
const EXTENT_MAGIC: u16 = 0xf30a;
const IN_INODE: u16 = 4;
/// Longer ones are not written yet.
const WRITTEN_UP_TO: u16 = 1 << 15;
/// The kind of an extent in a tree: the lowest of five bits is written.
const KIND_SHIFT: u32 = 59;
/// Nodes of trees that are looked at: so many, and for each page of a file more.
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
    /// Where it would be, in bytes from the beginning of the file system.
    pub at: u64,
}

/// Where pages of files may be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct FilePlaces {
    /// The file systems.
    pub file_systems: Vec<FileSystemId>,
    /// The pages.
    pub places: Vec<FilePlace>,
}

impl FilePlaces {
    /// Which file system a page may be on.
    #[must_use]
    pub fn file_system(&self, place: &FilePlace) -> Option<FileSystemId> {
        let number = usize::try_from(place.file_system).ok()?;
        self.file_systems.get(number).copied()
    }
}

/// Where it stands what a page's place may be.
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
    for (inode, mounted, of_file) in files {
        match mounted.magic {
            EXT4 => finder.of_ext4(&ext4, inode, &mounted, of_file),
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

    /// Where a buffer is on its device, and which that is.
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

    fn of_ext4(&mut self, ext4: &Ext4, inode: KernelVa, mounted: &Mounted, pages: &[InCache]) {
        let extents = ext4.extents(self.space, inode, &mut self.nodes_left);
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

/// Where ext4 has what beside a `struct inode`.
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

/// What most tell of, if enough do.
fn most(votes: &BTreeMap<usize, Tally>) -> Option<usize> {
    let (place, count) = votes.iter().max_by_key(|(_, count)| **count)?;
    (count.get() >= AGREE).then_some(*place)
}

impl Ext4 {
    fn by_inodes(space: &AddressSpace<'_>, inodes: &[KernelVa]) -> Self {
        let (mut data, mut tree) = (BTreeMap::new(), BTreeMap::new());
        for inode in spread(inodes, SAMPLE) {
            for before in (8..=BEFORE).step_by(8) {
                if !in_inode(space, *inode, before).is_empty() {
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
        inode: KernelVa,
        nodes_left: &mut u64,
    ) -> BTreeMap<u64, Extent> {
        let mut found = BTreeMap::new();
        let by_tree = self
            .tree
            .map(|tree| in_tree(space, inode, tree, nodes_left));
        let by_data = self.data.map(|data| in_inode(space, inode, data));
        // What was used lately is newer, if they differ.
        for extent in by_data.into_iter().chain(by_tree).flatten() {
            found.insert(extent.first, extent);
        }
        found
    }
}

/// The extents that an inode has in itself, `before` its `struct inode`; none if they are in a tree on
/// the disk, or nothing of the kind is there.
fn in_inode(space: &AddressSpace<'_>, inode: KernelVa, before: usize) -> Vec<Extent> {
    const HEADER: u64 = 12;
    const RECORD: u64 = 12;
    let mut bytes = [0_u8; 60];
    let at = inode.raw().checked_sub(to_u64(before)).map(KernelVa::new);
    if at.is_none_or(|at| space.read(at, &mut bytes).is_err()) {
        return Vec::new();
    }
    let bytes = bytes.as_slice();
    let number = |at| bytes.le_at::<u16>(at);
    let (Some(EXTENT_MAGIC), Some(entries), Some(IN_INODE), Some(depth)) =
        (number(0), number(2), number(4), number(6))
    else {
        return Vec::new();
    };
    if entries > IN_INODE || depth != 0 {
        return Vec::new();
    }
    let records = (0..u64::from(entries)).filter_map(|entry| {
        let at = HEADER.checked_add(entry.checked_mul(RECORD)?)?;
        let record = bytes.part(at, RECORD)?;
        let len = record.le_at::<u16>(4)?;
        let high = u64::from(record.le_at::<u16>(6)?);
        Some(Extent {
            first: record.le_at::<u32>(0)?.into(),
            len: Some(len)
                .filter(|len| *len > 0 && *len <= WRITTEN_UP_TO)?
                .into(),
            at: (high << 32) | u64::from(record.le_at::<u32>(8)?),
        })
    });
    records.collect()
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
    use super::{BEFORE, Ext4, Extent, IN_INODE, KIND_SHIFT, MAX_WAY, Offsets};
    use crate::KernelVa;
    use crate::kernel::testing::{DIRECT_MAP, Facts, Ram, kernel};

    /// The first inode; each of them has 4 KiB.
    const INODE: u64 = 0x10_0000;
    const DATA: u64 = 0x180;
    const TREE: u64 = 0x2a0;
    const NODES: u64 = 0x20_0000;

    fn va(at: u64) -> KernelVa {
        KernelVa::new(DIRECT_MAP + at)
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
        let found = ext4.extents(&kernel.space, inodes[3], &mut 100);
        let extent = |first, len, at| (first, Extent { first, len, at });
        // What was used lately counts.
        let want = [extent(0, 4, 1003), extent(9, 2, 77), extent(20, 5, 500)];
        assert!(found.into_iter().eq(want));
        // Of an inode that nothing is beside there is nothing, and none that cannot be read.
        for inode in [va(INODE + 0x9000), va(BEFORE as u64 / 2), va(1 << 40)] {
            assert!(ext4.extents(&kernel.space, inode, &mut 100).is_empty());
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
        let mut left = 1000;
        assert!(!ext4.extents(&kernel.space, inodes[0], &mut left).is_empty());
        assert!(left > 1000 - 2 * MAX_WAY as u64);
        // No more nodes than there are.
        let mut few = 1;
        ext4.extents(&kernel.space, inodes[0], &mut few);
        assert_eq!(few, 0);
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
