//! A kernel's records of one frame.

use super::LinuxGuest;
use super::lists::{FreeList, MigrateTypes};
use crate::error::VmiError;
use crate::kernel::Kernel;
use crate::mm::mem_map::MemMap;
use crate::mm::page::{FreeMark, PageLayout};
use crate::mm::zone::{FreeLists, Listed, Zones};
use crate::{KernelVa, VirtualMemory};
use sonicshot::{GuestBytes, Pfn, PfnRange};

/// The flags of a page by name (`include/linux/page-flags.h`), without those that are another's
/// bit.
const FLAGS: [&str; 27] = [
    "locked",
    "error",
    "referenced",
    "uptodate",
    "dirty",
    "lru",
    "head",
    "waiters",
    "active",
    "workingset",
    "slab",
    "owner_priv_1",
    "owner_2",
    "arch_1",
    "reserved",
    "private",
    "private_2",
    "writeback",
    "mappedtodisk",
    "reclaim",
    "swapbacked",
    "unevictable",
    "dropbehind",
    "mlocked",
    "hwpoison",
    "young",
    "idle",
];
/// `CACHE_NAME` and the like are shorter.
const MAX_NAME: usize = 64;

/// Whom a page in use belongs to, by its `mapping` or its type.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PageOwner {
    /// The kind of owner: `anonymous`, `ksm`, `file`, `slab`, `movable`, or `none`.
    pub kind: &'static str,
    /// The owner's structure in the kernel, if the page leads to one.
    pub at: Option<KernelVa>,
    /// Its name: a slab cache's, or of a file the file system's and the inode's number; if it can
    /// be read.
    pub name: Option<String>,
}

/// The fields of a `struct page`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PageRecord {
    /// The frame whose record it is.
    pub pfn: Pfn,
    /// Its address in the kernel.
    pub at: KernelVa,
    /// The flags, without the zone and node that share their word.
    pub flags: u64,
    /// The flags' names; `bit N` of one that has none here.
    pub flag_names: Vec<String>,
    /// The number of users.
    pub refcount: u32,
    /// The word of its mappings, or of its type.
    pub mapcount: u32,
    /// Its type, if it has one that is known.
    pub page_type: Option<&'static str>,
    /// Its word `mapping`.
    pub mapping: u64,
    /// Its word `private`.
    pub private: u64,
    /// The order of the free block that it says to head.
    pub buddy_order: Option<u64>,
}

/// A free block that a list names, and that has the frame in it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ListedIn {
    /// The list.
    pub list: FreeList,
    /// The zone whose list it is: node and name.
    pub zone: (u64, String),
    /// The block.
    pub block: PfnRange,
    /// Its order.
    pub order: u32,
    /// Whether its neighbours on the list link to it.
    pub is_whole: bool,
}

/// One record's statement on whether a frame is free.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Witness {
    /// The record: `mark`, `list`, `struct page`, `block`, `zone` or `counters`.
    pub record: &'static str,
    /// Whether it says that the frame is free; `None` if it says nothing of that.
    pub says_free: Option<bool>,
    /// The record's content, for people.
    pub what: String,
}

/// A kernel's records of one frame.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PageFacts {
    /// The frame.
    pub pfn: Pfn,
    /// The zones whose span has it: node and name.
    pub zones: Vec<(u64, String)>,
    /// Its `struct page`; `None` if it has none.
    pub page: Option<PageRecord>,
    /// Of a frame that is in a larger folio, the record of the folio's first page.
    pub folio: Option<PageRecord>,
    /// Whom it belongs to, if it is in use.
    pub owner: Option<PageOwner>,
    /// Blocks on lists that have it; more than one contradict each other.
    pub listed: Vec<ListedIn>,
    /// The statement of each record on whether it is free. It counts as free if all that say
    /// something say so.
    pub witnesses: Vec<Witness>,
}

impl LinuxGuest<'_> {
    /// The kernel's records of the frame `pfn`: its `struct page`, the free lists, the zones
    /// and their counters, and which of them say that it is free.
    ///
    /// # Errors
    /// [`VmiError`] if a list is none, or symbols or members that lead to the records are not
    /// known.
    pub fn page_facts(&self, pfn: Pfn) -> Result<PageFacts, VmiError> {
        let _tables = self.kernel.space.remember_tables();
        let (mem_map, layout, zones) = self.structures()?;
        let look = Look {
            kernel: &self.kernel,
            mem_map: &mem_map,
            layout: &layout,
        };
        let page = look.record(pfn)?;
        let head = page.as_ref().map(|page| look.head_of(page)).transpose()?;
        let head = head.flatten().filter(|head| *head != pfn);
        let folio = head.map(|head| look.record(head)).transpose()?.flatten();
        let listed = look.listed(&zones, pfn)?;
        let block = match listed.as_slice() {
            [one] => Some(one.block),
            _ => None,
        };
        let owned = folio.as_ref().or(page.as_ref());
        let is_free = page.as_ref().is_some_and(|page| page.refcount == 0) && folio.is_none();
        let owner = owned
            .filter(|_| !is_free && !layout.tells_only_free())
            .map(|record| look.owner(record));
        let mut witnesses = look.witnesses(pfn, page.as_ref(), &listed, block)?;
        let has_it = |span: &PfnRange| span.contains(pfn);
        let those = zones.zones.iter().filter(|zone| has_it(&zone.span));
        let those: Vec<(u64, String)> = those.map(|zone| (zone.node, zone.name.clone())).collect();
        witnesses.push(in_zone(&those, &listed));
        witnesses.extend(self.counters(&those)?);
        Ok(PageFacts {
            pfn,
            zones: those,
            page,
            folio,
            owner,
            listed,
            witnesses,
        })
    }

    /// The statements of these zones' counters on their lists.
    fn counters(&self, zones: &[(u64, String)]) -> Result<Vec<Witness>, VmiError> {
        let mut out = Vec::new();
        for zone in self.free_lists(0)? {
            if !zones.contains(&(zone.node, zone.name.clone())) {
                continue;
            }
            let wrong = zone.disagreements();
            out.push(Witness {
                record: "counters",
                says_free: None,
                what: match wrong.is_empty() {
                    true => format!(
                        "nr_free, NR_FREE_PAGES and the processors' counters of zone {} are what its \
                         lists have",
                        zone.name
                    ),
                    false => wrong.join("; "),
                },
            });
        }
        Ok(out)
    }
}

/// Whether the frame's zone is that of its list.
fn in_zone(zones: &[(u64, String)], listed: &[ListedIn]) -> Witness {
    let names: Vec<String> = zones
        .iter()
        .map(|(node, name)| format!("{node}/{name}"))
        .collect();
    let names = names.join(", ");
    let (says_free, what) = match (zones, listed) {
        ([], _) => (Some(false), "no zone spans it".to_owned()),
        (_, []) => (None, format!("zone {names}")),
        (_, listed) if listed.iter().all(|one| zones.contains(&one.zone)) => {
            (Some(true), format!("zone {names}, whose list has it"))
        }
        (_, listed) => {
            let lists: Vec<&str> = listed.iter().map(|one| one.zone.1.as_str()).collect();
            let lists = lists.join(", ");
            let what = format!("zone {names}, but a list of {lists} has it");
            (Some(false), what)
        }
    };
    Witness {
        record: "zone",
        says_free,
        what,
    }
}

/// The sources in which a frame is looked up.
struct Look<'a, 'm> {
    kernel: &'a Kernel<'m>,
    mem_map: &'a MemMap<'m>,
    layout: &'a PageLayout,
}

impl Look<'_, '_> {
    /// The bytes of the `struct page` of `pfn`, and where they are; `None` if it has none.
    fn bytes(&self, pfn: Pfn) -> Result<Option<(KernelVa, Vec<u8>)>, VmiError> {
        let spans = self.mem_map.spans().iter();
        let is_online = spans
            .filter(|span| span.online)
            .any(|span| span.frames.contains(pfn));
        let Some(at) = self.mem_map.page_va(pfn).filter(|_| is_online) else {
            return Ok(None);
        };
        // No longer than the largest `struct page` that a map of them is made of.
        let mut bytes = vec![0; self.mem_map.stride_len()?];
        self.mem_map.copy_pages(at, &mut bytes)?;
        Ok(Some((at, bytes)))
    }

    fn record(&self, pfn: Pfn) -> Result<Option<PageRecord>, VmiError> {
        let Some((at, bytes)) = self.bytes(pfn)? else {
            return Ok(None);
        };
        let page = GuestBytes::from_slice(&bytes);
        let Some(words) = self.layout.words(&page) else {
            return Ok(None);
        };
        let flags = words.flags & words.mask;
        Ok(Some(PageRecord {
            pfn,
            at,
            flags,
            flag_names: self.flag_names(flags)?,
            refcount: words.refcount,
            mapcount: words.mapcount,
            page_type: self.layout.type_name(words.mapcount),
            mapping: words.mapping,
            private: words.private,
            buddy_order: match self.layout.free_mark(&page) {
                Some(FreeMark::Buddy { order }) => Some(order),
                _ => None,
            },
        }))
    }

    fn flag_names(&self, flags: u64) -> Result<Vec<String>, VmiError> {
        let mut named: Vec<(u32, String)> = Vec::new();
        for name in FLAGS {
            let bit = self.kernel.any_constant(&format!("PG_{name}"))?;
            let Some(bit) = bit.and_then(|bit| u32::try_from(bit).ok()) else {
                continue;
            };
            if named.iter().all(|(other, _)| *other != bit) {
                named.push((bit, name.to_owned()));
            }
        }
        let set =
            (0..u64::BITS).filter(|bit| flags.checked_shr(*bit).is_some_and(|rest| rest & 1 == 1));
        let name = |bit: u32| {
            let known = named.iter().find(|(known, _)| *known == bit);
            known.map_or_else(|| format!("bit {bit}"), |(_, name)| name.clone())
        };
        Ok(set.map(name).collect())
    }

    /// The first frame of the folio that a frame is in.
    fn head_of(&self, page: &PageRecord) -> Result<Option<Pfn>, VmiError> {
        let Some((at, bytes)) = self.bytes(page.pfn)? else {
            return Ok(None);
        };
        let head = self.layout.head_of(&GuestBytes::from_slice(&bytes), at);
        Ok(head.and_then(|head| self.mem_map.frame_of(head)))
    }

    /// Every free block on a list that has the frame.
    fn listed(&self, zones: &Zones, pfn: Pfn) -> Result<Vec<ListedIn>, VmiError> {
        let names = MigrateTypes::new(self.kernel)?;
        let mut lists = FreeLists::new(self.mem_map, self.kernel, self.layout.lru);
        let mut found = Vec::new();
        for zone in &zones.zones {
            let mut look = |one: Listed| {
                let (block, is_whole) = match one {
                    Listed::Block(block) => (block, true),
                    Listed::Torn(block) => (block, false),
                };
                let frames = block
                    .pages()
                    .and_then(|len| PfnRange::with_len(block.head, len));
                if let Some(frames) = frames.filter(|frames| frames.contains(pfn)) {
                    found.push(ListedIn {
                        list: names.list_of(&block),
                        zone: (zone.node, zone.name.clone()),
                        block: frames,
                        order: block.order,
                        is_whole,
                    });
                }
                Ok(())
            };
            zones.walk_free_lists(&mut lists, zone, &mut look)?;
            if zones.no_pcp.is_none() {
                zones.walk_pcp_lists(&mut lists, zone, &mut look)?;
            }
        }
        Ok(found)
    }

    /// The statements of the mark, the lists and the struct pages.
    fn witnesses(
        &self,
        pfn: Pfn,
        page: Option<&PageRecord>,
        listed: &[ListedIn],
        block: Option<PfnRange>,
    ) -> Result<Vec<Witness>, VmiError> {
        let Some(page) = page else {
            return Ok(vec![Witness {
                record: "struct page",
                says_free: Some(false),
                what: "it has none, or its section is offline".into(),
            }]);
        };
        let per_cpu = |one: &ListedIn| matches!(one.list, FreeList::PerCpu { .. });
        let is_per_cpu = listed.iter().any(per_cpu);
        let mut out = Vec::new();
        if !is_per_cpu {
            let head = block.map_or(pfn, |block| block.start());
            let order = self.record(head)?.and_then(|head| head.buddy_order);
            let agrees = listed.iter().all(|one| order == Some(u64::from(one.order)));
            out.push(Witness {
                record: "mark",
                says_free: Some(order.is_some() && agrees),
                what: match order {
                    Some(order) => {
                        format!("frame {head} is marked as a free block of order {order}")
                    }
                    None => format!("frame {head} has no mark of a free block"),
                },
            });
        }
        out.push(Witness {
            record: "list",
            says_free: Some(matches!(listed, [one] if one.is_whole)),
            what: match listed {
                [] => "on no free list".into(),
                all => {
                    let text = |one: &ListedIn| {
                        let torn = if one.is_whole {
                            ""
                        } else {
                            ", which was being changed"
                        };
                        let (list, order, block) = (&one.list, one.order, one.block);
                        match one.list {
                            FreeList::PerCpu { .. } => {
                                format!("on the list of {list}, order {order}, block {block}{torn}")
                            }
                            FreeList::Buddy { .. } => {
                                format!("on the list {list} of order {order}, block {block}{torn}")
                            }
                        }
                    };
                    all.iter().map(text).collect::<Vec<_>>().join("; ")
                }
            },
        });
        let flags = page.flag_names.join(", ");
        let flags = if flags.is_empty() {
            "no flag".into()
        } else {
            flags
        };
        out.push(Witness {
            record: "struct page",
            says_free: Some(self.is_unused(pfn, is_per_cpu)?),
            what: format!("{} references, {flags}", page.refcount),
        });
        if let Some(block) = block {
            let mut user = None;
            for frame in block.iter().filter(|frame| *frame != pfn) {
                if !self.is_unused(frame, is_per_cpu)? {
                    user = Some(frame);
                    break;
                }
            }
            out.push(Witness {
                record: "block",
                says_free: Some(user.is_none()),
                what: match user {
                    Some(user) => format!("the struct page of frame {user} shows a user"),
                    None => format!("no struct page of block {block} shows a user"),
                },
            });
        }
        Ok(out)
    }

    fn is_unused(&self, pfn: Pfn, is_per_cpu: bool) -> Result<bool, VmiError> {
        let Some((_, bytes)) = self.bytes(pfn)? else {
            return Ok(false);
        };
        let page = GuestBytes::from_slice(&bytes);
        Ok(match is_per_cpu {
            true => self.layout.is_unused_and_untyped(&page),
            false => self.layout.is_unused(&page),
        })
    }

    /// Whom the folio whose first record this is belongs to.
    fn owner(&self, page: &PageRecord) -> PageOwner {
        let is_slab = page.page_type == Some("slab") || page.flag_names.iter().any(|n| n == "slab");
        let kind = match page.mapping & 3 {
            _ if is_slab => "slab",
            1 => "anonymous",
            2 => "movable",
            3 => "ksm",
            _ if page.mapping != 0 && page.page_type.is_none() => "file",
            _ => "none",
        };
        let mapping = KernelVa::new(page.mapping & !3);
        let (at, name) = match kind {
            "slab" => self.slab_cache(page).unzip(),
            "file" => (Some(mapping), self.file(mapping)),
            "none" => (None, None),
            _ => (Some(mapping), None),
        };
        PageOwner { kind, at, name }
    }

    /// A slab's cache, and its name.
    fn slab_cache(&self, page: &PageRecord) -> Option<(KernelVa, String)> {
        // Since 5.17 `struct slab` lies over `struct page`.
        let member = |ty| self.kernel.any_member(ty, "slab_cache").ok().flatten();
        let member = member("slab").or_else(|| member("page"))?;
        let space = &self.kernel.space;
        let pointer = |at| space.read_u64(at).ok().map(KernelVa::new);
        let cache = pointer(page.at.checked_add(member.offset)?)?;
        let name = self
            .kernel
            .any_member("kmem_cache", "name")
            .ok()
            .flatten()?;
        let name = pointer(cache.checked_add(name.offset)?)?;
        Some((cache, space.read_str(name, MAX_NAME).ok()?))
    }

    /// The file of a mapping: its file system's name and its inode's number.
    fn file(&self, mapping: KernelVa) -> Option<String> {
        let space = &self.kernel.space;
        let pointer = |at| space.read_u64(at).ok().map(KernelVa::new);
        let member = |ty, name| self.kernel.any_member(ty, name).ok().flatten();
        let at = |base: KernelVa, ty, name| base.checked_add(member(ty, name)?.offset);
        let host = pointer(at(mapping, "address_space", "host")?)?;
        let number = space.read_u64(at(host, "inode", "i_ino")?).ok()?;
        let superblock = pointer(at(host, "inode", "i_sb")?)?;
        let disk = space
            .read_str(at(superblock, "super_block", "s_id")?, MAX_NAME)
            .ok()?;
        Some(format!("inode {number} on {disk}"))
    }
}
