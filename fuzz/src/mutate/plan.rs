//! The mutations.

use super::Subject;
use super::anatomy::{Kind, Record};
use super::capture::{Capture, Change};
use sonicshot::{Gpa, PageClass, Pfn};
use std::collections::BTreeMap;

/// Numbers that choose: an input's as long as there are any, then ones that are as good as random
/// and the same everywhere (xorshift).
#[derive(Debug, Clone)]
pub struct Rng {
    state: u64,
    input: Vec<u8>,
}

impl Rng {
    pub fn new(seed: u64, number: u64) -> Self {
        let mut rng = Self {
            state: (seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15)) | 1,
            input: Vec::new(),
        };
        for _ in 0..4 {
            rng.number();
        }
        rng
    }

    /// Choices by the bytes of a fuzzer's input, four for each.
    pub fn of_input(input: &[u8]) -> Self {
        Self {
            state: 1,
            input: input.to_vec(),
        }
    }

    pub fn number(&mut self) -> u64 {
        if let Some((word, rest)) = self.input.split_first_chunk() {
            let word = u32::from_le_bytes(*word);
            self.input = rest.to_vec();
            return word.into();
        }
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    pub fn below(&mut self, len: usize) -> usize {
        usize::try_from(self.number() % (len.max(1) as u64)).unwrap_or(0)
    }

    fn of<'a, T>(&mut self, items: &'a [T]) -> Option<&'a T> {
        let index = self.below(items.len());
        items.get(index)
    }
}

/// Changes of a guest's memory that are one lie.
#[derive(Debug, Clone)]
pub struct Mutation {
    pub kind: Kind,
    pub name: String,
    pub changes: Vec<Change>,
    /// The number of records that lie, and agree.
    pub places: u64,
    /// The mutation's place among the records, beside its name.
    pub which: String,
}

impl Mutation {
    /// A text of the change, with the bytes that stood there and those that stand there now.
    pub fn describe(&self, capture: &Capture) -> String {
        let mut text = format!("{} {}", self.name, self.which);
        for change in &self.changes {
            let old = capture.bytes(change.at, change.bytes.len()).unwrap_or(&[]);
            text += &format!("; {}: {} -> {}", change.at, hex(old), hex(&change.bytes));
        }
        text
    }
}

/// As the number that it is in memory, lowest byte last.
fn hex(bytes: &[u8]) -> String {
    let digits = bytes
        .iter()
        .rev()
        .take(16)
        .map(|byte| format!("{byte:02x}"));
    let more = if bytes.len() > 16 { "..." } else { "" };
    digits.collect::<String>() + more
}

/// The weight of each kind in the choice.
const WEIGHTS: [(Kind, usize); 10] = [
    (Kind::StructPage, 30),
    (Kind::FreeList, 6),
    (Kind::PerCpuList, 8),
    (Kind::Zone, 8),
    (Kind::MemSection, 8),
    (Kind::PageTable, 10),
    (Kind::Btf, 14),
    (Kind::Vmcoreinfo, 6),
    (Kind::Kallsyms, 6),
    (Kind::Other, 4),
];

pub struct Plan<'s, 'c> {
    subject: &'s Subject<'c>,
    kinds: Vec<Kind>,
    /// Every record that is wanted.
    chosen: Vec<(Kind, Record)>,
    /// Of which class each struct page's frame is in truth: indexes of the anatomy's pages.
    by_class: BTreeMap<PageClass, Vec<usize>>,
    by_frame: BTreeMap<u64, usize>,
    /// The records of each kind that say the same of different things.
    by_name: BTreeMap<Kind, Vec<Vec<Record>>>,
}

impl<'s, 'c> Plan<'s, 'c> {
    pub fn new(subject: &'s Subject<'c>, kinds: &[Kind], named: &str) -> Self {
        let mut by_class: BTreeMap<PageClass, Vec<usize>> = BTreeMap::new();
        let mut by_frame = BTreeMap::new();
        for (index, (pfn, _)) in subject.anatomy.pages.iter().enumerate() {
            let class = subject
                .truth
                .class(Pfn::new(*pfn))
                .unwrap_or(PageClass::Hole);
            by_class.entry(class).or_default().push(index);
            by_frame.insert(*pfn, index);
        }
        let wanted = |kind: Kind| kinds.is_empty() || kinds.contains(&kind);
        let chosen = WEIGHTS
            .iter()
            .filter(|(kind, _)| wanted(*kind))
            .flat_map(|(kind, weight)| std::iter::repeat_n(*kind, *weight));
        let records = subject.anatomy.records.iter();
        let records = records
            .filter(|(kind, _)| wanted(**kind))
            .flat_map(|(kind, records)| records.iter().map(|record| (*kind, *record)))
            .filter(|(_, record)| subject.anatomy.names[record.name].contains(named));
        Self {
            subject,
            chosen: records.collect(),
            kinds: chosen.collect(),
            by_class,
            by_frame,
            by_name: grouped(&subject.anatomy.records),
        }
    }

    fn old(&self, at: Gpa, len: usize) -> Option<Vec<u8>> {
        self.subject.capture.bytes(at, len).map(<[u8]>::to_vec)
    }

    fn word(&self, at: Gpa) -> u64 {
        let bytes = self.subject.capture.bytes(at, 8);
        bytes.map_or(0, |bytes| {
            u64::from_le_bytes(bytes.try_into().unwrap_or_default())
        })
    }

    /// A mutation inside one record.
    pub fn single(&self, rng: &mut Rng) -> Option<Mutation> {
        let kind = *rng.of(&self.kinds)?;
        if kind == Kind::StructPage {
            return self.struct_page(rng);
        }
        if kind == Kind::Kallsyms && rng.below(2) == 0 {
            return self.range(rng);
        }
        // What is rare is as likely as what there is much of.
        let same = rng.of(self.by_name.get(&kind)?)?;
        let record = *rng.of(same)?;
        let old = self.old(record.at, record.len)?;
        let new = match rng.below(8) {
            0..4 => flip(old.clone(), rng),
            4 if kind != Kind::Vmcoreinfo => {
                // Another that says the same of something else.
                let from = rng.of(same)?;
                self.old(from.at, record.len)?
            }
            4 => vec![*rng.of(b"0123456789abcdef-=\n()")?],
            _ => self.any(old.clone(), rng),
        };
        self.made(kind, record, old, new)
    }

    fn made(&self, kind: Kind, record: Record, old: Vec<u8>, new: Vec<u8>) -> Option<Mutation> {
        if new == old {
            return None;
        }
        Some(Mutation {
            kind,
            name: self.subject.anatomy.names.get(record.name)?.clone(),
            changes: vec![Change {
                at: record.at,
                bytes: new,
            }],
            places: 1,
            which: String::new(),
        })
    }

    /// A byte of a long range that opening reads: names and offsets of symbols, mostly.
    fn range(&self, rng: &mut Rng) -> Option<Mutation> {
        let (start, len) = *rng.of(&self.subject.anatomy.ranges)?;
        let at = Gpa::new(start + rng.number() % len);
        let old = self.old(at, 1)?;
        let new = flip(old.clone(), rng);
        Some(Mutation {
            kind: Kind::Kallsyms,
            name: "a byte of a long table".into(),
            changes: vec![Change { at, bytes: new }],
            places: 1,
            which: String::new(),
        })
    }

    fn any(&self, mut bytes: Vec<u8>, rng: &mut Rng) -> Vec<u8> {
        let value = bytes
            .iter()
            .rev()
            .fold(0_u128, |value, byte| value << 8 | u128::from(*byte));
        let put = |bytes: &mut Vec<u8>, value: u128| {
            for (byte, new) in bytes.iter_mut().zip(value.to_le_bytes()) {
                *byte = new;
            }
        };
        let small = rng.number() & 0xfff;
        match rng.below(8) {
            0 => bytes.fill(0),
            1 => bytes.fill(0xff),
            2 => put(&mut bytes, value.wrapping_add(1)),
            3 => put(&mut bytes, value.wrapping_sub(1)),
            4 => put(&mut bytes, value.wrapping_add(u128::from(small))),
            5 => put(&mut bytes, value.wrapping_sub(u128::from(small))),
            6 => {
                let index = rng.below(bytes.len());
                if let Some(byte) = bytes.get_mut(index) {
                    *byte = rng.number().to_le_bytes()[0];
                }
            }
            _ => put(&mut bytes, u128::from(small & 63)),
        }
        bytes
    }

    fn page_of_some_class(&self, rng: &mut Rng) -> Option<usize> {
        if rng.below(2) == 0 {
            return Some(rng.below(self.subject.anatomy.pages.len()));
        }
        let classes: Vec<&Vec<usize>> = self.by_class.values().collect();
        let class = rng.of(&classes)?;
        rng.of(class).copied()
    }

    /// A struct page as a free or an offline page leaves it, but with a type.
    fn left_with_a_type(&self, mut page: Vec<u8>, rng: &mut Rng) -> Option<Vec<u8>> {
        let anatomy = &self.subject.anatomy;
        let ty = *rng.of(&anatomy.types)?;
        for field in &anatomy.fields {
            let from = usize::try_from(field.offset).ok()?;
            let word = page.get_mut(from..from + field.len)?;
            match field.name {
                "_mapcount" => word.copy_from_slice(&ty.to_le_bytes()),
                "_refcount" => word.copy_from_slice(&(rng.below(2) as u32).to_le_bytes()),
                "private" => word.copy_from_slice(&(rng.below(11) as u64).to_le_bytes()),
                "mapping" | "index" => word.fill(0),
                _ => {}
            }
        }
        Some(page)
    }

    fn struct_page(&self, rng: &mut Rng) -> Option<Mutation> {
        let anatomy = &self.subject.anatomy;
        let number = self.page_of_some_class(rng)?;
        let (pfn, at) = *anatomy.pages.get(number)?;
        let size = usize::try_from(anatomy.struct_page_size).ok()?;
        let field = *rng.of(&anatomy.fields)?;
        let class = self.subject.truth.class(Pfn::new(pfn));
        let which = format!(
            "of frame {pfn:#x} ({})",
            class.map_or("none", PageClass::name)
        );
        let place = Gpa::new(at.raw() + field.offset);
        let (name, place, old, new) = match rng.below(10) {
            0..3 => {
                let old = self.old(place, field.len)?;
                (
                    format!("page.{}", field.name),
                    place,
                    old.clone(),
                    flip(old, rng),
                )
            }
            3 => {
                let field = anatomy.fields.iter().find(|f| f.name == "_mapcount")?;
                let place = Gpa::new(at.raw() + field.offset);
                let new = rng.of(&anatomy.types)?.to_le_bytes().to_vec();
                (
                    "page._mapcount as a type".into(),
                    place,
                    self.old(place, 4)?,
                    new,
                )
            }
            4 => {
                let from = self.page_of_some_class(rng)?;
                let (_, from) = *anatomy.pages.get(from)?;
                let new = self.old(Gpa::new(from.raw() + field.offset), field.len)?;
                let name = format!("page.{} of another page", field.name);
                (name, place, self.old(place, field.len)?, new)
            }
            5 => {
                let from = self.page_of_some_class(rng)?;
                let (_, from) = *anatomy.pages.get(from)?;
                let name = "all of another page's".into();
                (name, at, self.old(at, size)?, self.old(from, size)?)
            }
            6 => {
                let old = self.old(at, size)?;
                let new = self.left_with_a_type(old.clone(), rng)?;
                ("all of it as a type's".into(), at, old, new)
            }
            7 => {
                let place = Gpa::new(at.raw() + rng.number() % size as u64);
                let old = self.old(place, 1)?;
                let new = self.any(old.clone(), rng);
                ("a byte of it".into(), place, old, new)
            }
            _ => {
                let old = self.old(place, field.len)?;
                let new = self.any(old.clone(), rng);
                (format!("page.{}", field.name), place, old, new)
            }
        };
        (new != old).then(|| Mutation {
            kind: Kind::StructPage,
            name,
            changes: vec![Change {
                at: place,
                bytes: new,
            }],
            places: 1,
            which,
        })
    }

    /// The number of mutations of every bit of every record, struct pages left out.
    pub fn all_len(&self) -> u64 {
        self.chosen
            .iter()
            .map(|(_, record)| record.len as u64 * 10)
            .sum()
    }

    /// Of every record each bit, and each byte as 0 and as 0xff.
    pub fn nth(&self, number: u64) -> Option<Mutation> {
        let mut left = number;
        let (kind, record) = *self.chosen.iter().find(|(_, record)| {
            let len = record.len as u64 * 10;
            if left < len {
                return true;
            }
            left -= len;
            false
        })?;
        let old = self.old(record.at, record.len)?;
        let mut new = old.clone();
        let byte = new.get_mut(usize::try_from(left / 10).ok()?)?;
        match left % 10 {
            bit @ 0..8 => *byte ^= 1 << bit,
            8 => *byte = 0,
            _ => *byte = 0xff,
        }
        self.made(kind, record, old, new)
    }

    /// A lie in several places that agree.
    pub fn lie(&self, rng: &mut Rng) -> Option<Mutation> {
        match rng.below(6) {
            0 => self.section_and_counters(rng),
            1 => self.listed_free(rng),
            2 => self.link_over(rng),
            3 => self.on_per_cpu_list(rng),
            _ => {
                // Two that know nothing of each other.
                let mut first = self.single(rng)?;
                let second = self.single(rng)?;
                first.name = format!("{} and {}: {}", first.name, second.kind, second.name);
                first.which = format!("{} {}", first.which, second.which);
                first.changes.extend(second.changes);
                first.places = 2;
                Some(first)
            }
        }
    }

    fn records_named(&self, kind: Kind, name: &str) -> Vec<Record> {
        let anatomy = &self.subject.anatomy;
        let number = anatomy.names.iter().position(|known| known == name);
        let all = anatomy.records.get(&kind).into_iter().flatten();
        all.filter(|record| Some(record.name) == number)
            .copied()
            .collect()
    }

    /// A section's online bit, and the present pages of zone and node as if it were so.
    fn section_and_counters(&self, rng: &mut Rng) -> Option<Mutation> {
        let sections = self.records_named(Kind::MemSection, "section_mem_map");
        let section = *rng.of(&sections)?;
        let mut changes = vec![Change {
            at: section.at,
            bytes: (self.word(section.at) & !4).to_le_bytes().to_vec(),
        }];
        for (name, kind) in [
            ("zone.present_pages", Kind::Zone),
            ("pglist_data.node_present_pages", Kind::Zone),
        ] {
            let largest = self
                .records_named(kind, name)
                .into_iter()
                .max_by_key(|record| self.word(record.at))?;
            let left = self.word(largest.at).saturating_sub(1 << 15);
            changes.push(Change {
                at: largest.at,
                bytes: left.to_le_bytes().to_vec(),
            });
        }
        Some(Mutation {
            kind: Kind::MemSection,
            name: "a section offline, and present pages of zone and node".into(),
            changes,
            places: 3,
            which: String::new(),
        })
    }

    fn field(&self, name: &str) -> Option<u64> {
        let fields = &self.subject.anatomy.fields;
        fields.iter().find(|f| f.name == name).map(|f| f.offset)
    }

    /// A page in use takes the place of a free block's head in its list, mark and all.
    fn listed_free(&self, rng: &mut Rng) -> Option<Mutation> {
        let anatomy = &self.subject.anatomy;
        let free = self.by_class.get(&PageClass::FreeBuddy)?;
        let lru = self.field("lru.next")?;
        let mapcount = self.field("_mapcount")?;
        let start = rng.below(free.len());
        let buddy = *anatomy.types.first()?;
        let head = free.iter().cycle().skip(start).take(4096).find(|index| {
            let place = anatomy
                .pages
                .get(**index)
                .map(|(_, at)| at.raw() + mapcount);
            let word = place.and_then(|place| self.old(Gpa::new(place), 4));
            let bytes = buddy.to_le_bytes();
            word.is_some_and(|word| {
                if buddy >> 28 == 0xf && buddy & 0xff == 0 {
                    word.get(3) == bytes.get(3)
                } else {
                    word == bytes
                }
            })
        })?;
        let (pfn, at) = *anatomy.pages.get(*head)?;
        let used = self.page_of_some_class(rng)?;
        let (victim, victim_at) = *anatomy.pages.get(used)?;
        let size = usize::try_from(anatomy.struct_page_size).ok()?;
        let node = self.va_of(victim)? + lru;
        // The neighbours of the head in the list point to the other instead.
        let (next, prev) = (
            self.word(Gpa::new(at.raw() + lru)),
            self.word(Gpa::new(at.raw() + lru + 8)),
        );
        let mut changes = vec![Change {
            at: victim_at,
            bytes: self.old(at, size)?,
        }];
        for (neighbour, offset) in [(next, 8), (prev, 0)] {
            let place = self.gpa_of_node(neighbour)?;
            changes.push(Change {
                at: Gpa::new(place.raw() + offset),
                bytes: node.to_le_bytes().to_vec(),
            });
        }
        let class = self.subject.truth.class(Pfn::new(victim));
        Some(Mutation {
            kind: Kind::FreeList,
            name: "another page in the place of a free block, marked and linked".into(),
            changes,
            places: 3,
            which: format!(
                "{victim:#x} ({}) for {pfn:#x}",
                class.map_or("none", PageClass::name)
            ),
        })
    }

    /// A list of free blocks that passes over a few, in both directions.
    fn link_over(&self, rng: &mut Rng) -> Option<Mutation> {
        let heads = self.records_named(Kind::FreeList, "free_list.next");
        let head = *rng.of(&heads)?;
        let first = self.word(head.at);
        let second = self.word(self.gpa_of_node(first)?);
        let back = Gpa::new(self.gpa_of_node(second)?.raw() + 8);
        let own = self.word(Gpa::new(self.gpa_of_node(first)?.raw() + 8));
        Some(Mutation {
            kind: Kind::FreeList,
            name: "a list passes over its first block".into(),
            changes: vec![
                Change {
                    at: head.at,
                    bytes: second.to_le_bytes().to_vec(),
                },
                Change {
                    at: back,
                    bytes: own.to_le_bytes().to_vec(),
                },
            ],
            places: 2,
            which: String::new(),
        })
    }

    /// A page put first on a per-CPU list, and counted.
    fn on_per_cpu_list(&self, rng: &mut Rng) -> Option<Mutation> {
        let heads = self.records_named(Kind::PerCpuList, "per_cpu_pages.lists.next");
        let head = *rng.of(&heads)?;
        let counts = self.records_named(Kind::PerCpuList, "per_cpu_pages.count");
        let count = counts.iter().rfind(|count| count.at < head.at)?;
        let lru = self.field("lru.next")?;
        let used = self.page_of_some_class(rng)?;
        let (victim, victim_at) = *self.subject.anatomy.pages.get(used)?;
        let node = self.va_of(victim)? + lru;
        let first = self.word(head.at);
        let own = match self.gpa_of_node(first) {
            Some(place) => self.word(Gpa::new(place.raw() + 8)),
            // An empty list: the head points to itself.
            None => first,
        };
        let back = self.gpa_of_node(first).unwrap_or(head.at);
        let old = self.old(count.at, 4)?;
        let number = u32::from_le_bytes(old.try_into().ok()?).wrapping_add(1);
        let at = victim_at.raw() + lru;
        Some(Mutation {
            kind: Kind::PerCpuList,
            name: "a page put on a list, and counted".into(),
            changes: vec![
                Change {
                    at: head.at,
                    bytes: node.to_le_bytes().to_vec(),
                },
                Change {
                    at: Gpa::new(back.raw() + 8),
                    bytes: node.to_le_bytes().to_vec(),
                },
                Change {
                    at: Gpa::new(at),
                    bytes: first.to_le_bytes().to_vec(),
                },
                Change {
                    at: Gpa::new(at + 8),
                    bytes: own.to_le_bytes().to_vec(),
                },
                Change {
                    at: count.at,
                    bytes: number.to_le_bytes().to_vec(),
                },
            ],
            places: 3,
            which: format!(
                "frame {victim:#x} ({})",
                self.subject
                    .truth
                    .class(Pfn::new(victim))
                    .map_or("none", PageClass::name)
            ),
        })
    }

    fn va_of(&self, pfn: u64) -> Option<u64> {
        let anatomy = &self.subject.anatomy;
        let (first, base) = anatomy.sections.iter().rfind(|(first, _)| *first <= pfn)?;
        let _ = first;
        Some(base.wrapping_add(pfn * anatomy.struct_page_size))
    }

    /// The guest-physical address of the list node at a virtual address, if it is one of a struct page.
    fn gpa_of_node(&self, va: u64) -> Option<Gpa> {
        let anatomy = &self.subject.anatomy;
        let lru = self.field("lru.next")?;
        anatomy.sections.iter().find_map(|(first, base)| {
            let pfn = va.wrapping_sub(lru).wrapping_sub(*base) / anatomy.struct_page_size;
            if pfn < *first || pfn >= first + (1 << 15) {
                return None;
            }
            let index = self.by_frame.get(&pfn)?;
            let (_, at) = anatomy.pages.get(*index)?;
            Some(Gpa::new(at.raw() + lru))
        })
    }
}

fn grouped(records: &BTreeMap<Kind, Vec<Record>>) -> BTreeMap<Kind, Vec<Vec<Record>>> {
    let group = |records: &Vec<Record>| {
        let mut groups: BTreeMap<usize, Vec<Record>> = BTreeMap::new();
        for record in records {
            groups.entry(record.name).or_default().push(*record);
        }
        groups.into_values().collect()
    };
    records
        .iter()
        .map(|(kind, records)| (*kind, group(records)))
        .collect()
}

fn flip(mut bytes: Vec<u8>, rng: &mut Rng) -> Vec<u8> {
    let index = rng.below(bytes.len());
    if let Some(byte) = bytes.get_mut(index) {
        *byte ^= 1 << rng.below(8);
    }
    bytes
}
