//! The use that the guest's kernel has for a page.

use crate::Tally;
use core::fmt;
use core::str::FromStr;

macro_rules! classes {
    ($($(#[$doc:meta])* $variant:ident = $number:literal, $name:literal, $droppable:literal;)*) => {
        /// The use that the guest's kernel has for a page.
        ///
        /// The name of each class is the one that the command line and JSON use.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        #[non_exhaustive]
        pub enum PageClass {
            $($(#[$doc])* $variant = $number,)*
        }

        impl PageClass {
            /// Every class, in the order of the enum.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The class's name, such as `free_buddy`.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }

            /// The class that [`PageClass`] numbers `raw`, if there is one. The numbers are those
            /// of checkpoints, and stay.
            #[must_use]
            pub const fn from_u8(raw: u8) -> Option<Self> {
                match raw {
                    $($number => Some(Self::$variant),)*
                    _ => None,
                }
            }

            /// Whether a policy may drop pages of this class at all.
            ///
            /// Memory that the kernel itself needs to run is never droppable, whatever a policy says.
            #[must_use]
            pub const fn may_be_dropped(self) -> bool {
                match self {
                    $(Self::$variant => $droppable,)*
                }
            }
        }
    };
}

classes! {
    /// Nothing is known: the frame has a `struct page` that says nothing we understand, or
    /// one that is not initialised yet (deferred initialisation).
    Unknown = 0, "unknown", false;
    /// RAM that the kernel has no `struct page` for.
    Hole = 1, "hole", false;
    /// In the buddy allocator: flag, list and counters agree.
    FreeBuddy = 2, "free_buddy", true;
    /// On a per-CPU free list.
    FreePcp = 3, "free_pcp", true;
    /// Offline: in a balloon, or in a section that is not online; by more than its own word.
    Offline = 4, "offline", true;
    /// Allocated by the kernel, with no more precise class.
    Kernel = 6, "kernel", false;
    /// In a slab.
    Slab = 7, "slab", false;
    /// A page table.
    PageTable = 8, "page_table", false;
    /// Anonymous memory of a process.
    Anonymous = 9, "anonymous", true;
    /// Page cache whose content is also on disk.
    PageCacheClean = 10, "page_cache_clean", true;
    /// Page cache that is dirty, being written, locked, or not provably clean.
    PageCacheDirty = 11, "page_cache_dirty", true;
    /// Shared memory and tmpfs.
    Shmem = 12, "shmem", true;
    /// A huge page in use.
    Hugetlb = 13, "hugetlb", true;
    /// A huge page that waits in the pool.
    HugetlbFree = 14, "hugetlb_free", true;
    /// Reserved: firmware, the kernel's image, boot-time allocations, device memory.
    Reserved = 15, "reserved", false;
    /// Memory of a confidential guest that it has not accepted yet.
    Unaccepted = 16, "unaccepted", false;
    /// Poisoned by a hardware memory error: never read.
    HwPoison = 17, "hwpoison", false;
    /// Not in the source that was looked at, whatever the kernel says of it: there is nothing to
    /// drop.
    Absent = 18, "absent", false;
}

/// A number more than the highest.
const NUMBERS: usize = PageClass::Absent as usize + 1;

/// The state of a frame: its class, and whether it was found to hold only zeroes. Two facts in
/// one byte.
///
/// ```
/// use sonicshot::{PageClass, PageState};
/// let page = PageState::new(PageClass::Slab).with_zero();
/// assert_eq!((page.class(), page.is_zero()), (PageClass::Slab, true));
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct PageState(u8);

impl PageState {
    /// Beside the class's number.
    const ZERO: u8 = 0x80;

    /// A frame of `class` of which no more is known.
    #[must_use]
    pub const fn new(class: PageClass) -> Self {
        Self(class as u8)
    }

    /// The same, found to hold only zeroes.
    #[must_use]
    pub const fn with_zero(self) -> Self {
        Self(self.0 | Self::ZERO)
    }

    /// The same content with another class.
    #[must_use]
    pub const fn with_class(self, class: PageClass) -> Self {
        Self(self.0 & Self::ZERO | class as u8)
    }

    /// The use that the kernel has for the frame.
    #[must_use]
    pub const fn class(self) -> PageClass {
        match PageClass::from_u8(self.0 & !Self::ZERO) {
            Some(class) => class,
            // Only numbers of classes get in here.
            None => PageClass::Unknown,
        }
    }

    /// Whether it was found to hold only zeroes. Free and offline pages are not looked at.
    #[must_use]
    pub const fn is_zero(self) -> bool {
        self.0 & Self::ZERO != 0
    }

    /// Whether a policy may drop it at all: for its class, or because there is nothing in it.
    #[must_use]
    pub const fn may_be_dropped(self) -> bool {
        self.is_zero() || self.class().may_be_dropped()
    }
}

impl From<PageClass> for PageState {
    fn from(class: PageClass) -> Self {
        Self::new(class)
    }
}

impl fmt::Debug for PageState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageState")
            .field("class", &self.class())
            .field("zero", &self.is_zero())
            .finish()
    }
}

impl fmt::Display for PageClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that is no page class.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown page class `{name}`; classes: {}, and `zero`", names())]
pub struct UnknownClass {
    /// The name given.
    pub name: String,
}

/// All classes by name, for who gave none of them.
fn names() -> String {
    let names: Vec<_> = PageClass::ALL.iter().map(|class| class.name()).collect();
    names.join(", ")
}

impl FromStr for PageClass {
    type Err = UnknownClass;

    fn from_str(name: &str) -> Result<Self, UnknownClass> {
        Self::ALL
            .iter()
            .find(|class| class.name() == name)
            .copied()
            .ok_or_else(|| UnknownClass {
                name: name.to_owned(),
            })
    }
}

/// A set of page classes, and whether pages in use that hold only zeroes are in it, whatever their
/// class.
///
/// ```
/// use sonicshot::{ClassSet, PageClass, PageState};
/// let set: ClassSet = "free_buddy,zero".parse()?;
/// let slab = PageState::new(PageClass::Slab);
/// assert!(!set.takes(slab) && set.takes(slab.with_zero()));
/// assert_eq!(set, ClassSet::EMPTY.with(PageClass::FreeBuddy).with_zero());
/// # Ok::<(), sonicshot::UnknownClass>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct ClassSet(u32);

impl ClassSet {
    /// Beside a bit for each class.
    const ZERO: u32 = 1 << 31;
    /// The name of zero pages in use among the classes.
    const ZERO_NAME: &'static str = "zero";

    /// No class.
    pub const EMPTY: Self = Self(0);
    /// The classes that the kernel itself does not care about: the default of every prune.
    pub const DEFAULT_DROP: Self = Self::EMPTY
        .with(PageClass::FreeBuddy)
        .with(PageClass::FreePcp)
        .with(PageClass::Offline)
        .with_zero();

    /// This set and `class`.
    #[must_use]
    pub const fn with(self, class: PageClass) -> Self {
        Self(self.0 | 1 << class as u8)
    }

    /// This set and pages in use that hold only zeroes.
    #[must_use]
    pub const fn with_zero(self) -> Self {
        Self(self.0 | Self::ZERO)
    }

    /// This set and those zero pages alone that a class in it takes.
    #[must_use]
    pub const fn without_zero(self) -> Self {
        Self(self.0 & !Self::ZERO)
    }

    /// This set and all that is in `other`.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether `class` is in the set.
    #[must_use]
    pub const fn contains(self, class: PageClass) -> bool {
        self.0 & (1 << class as u8) != 0
    }

    /// Whether zero pages are in the set, whatever their class.
    #[must_use]
    pub const fn contains_zero(self) -> bool {
        self.0 & Self::ZERO != 0
    }

    /// Whether a page is in the set: by its class, or because it holds only zeroes.
    #[must_use]
    pub const fn takes(self, page: PageState) -> bool {
        self.contains(page.class()) || self.contains_zero() && page.is_zero()
    }

    /// The classes of it that the guest uses: without their pages it cannot run.
    ///
    /// ```
    /// use sonicshot::{ClassSet, PageClass};
    /// let set = ClassSet::DEFAULT_DROP.with(PageClass::Anonymous);
    /// assert_eq!(set.used_by_guest(), ClassSet::EMPTY.with(PageClass::Anonymous));
    /// ```
    #[must_use]
    pub const fn used_by_guest(self) -> Self {
        Self(self.0 & !Self::DEFAULT_DROP.0)
    }

    /// Whether nothing is in it.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The classes of the set.
    pub fn iter(self) -> impl Iterator<Item = PageClass> {
        PageClass::ALL
            .iter()
            .copied()
            .filter(move |class| self.contains(*class))
    }
}

impl FromIterator<PageClass> for ClassSet {
    fn from_iter<I: IntoIterator<Item = PageClass>>(classes: I) -> Self {
        classes.into_iter().fold(Self::EMPTY, Self::with)
    }
}

impl FromStr for ClassSet {
    type Err = UnknownClass;

    /// Names with commas between them; `zero` is pages in use that hold only zeroes.
    fn from_str(names: &str) -> Result<Self, UnknownClass> {
        names.split(',').try_fold(Self::EMPTY, |set, name| {
            if name == Self::ZERO_NAME {
                return Ok(set.with_zero());
            }
            Ok(set.with(name.parse()?))
        })
    }
}

impl fmt::Display for ClassSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let zero = self.contains_zero().then_some(Self::ZERO_NAME);
        let names = self.iter().map(PageClass::name).chain(zero);
        for (index, name) in names.enumerate() {
            let comma = if index > 0 { ", " } else { "" };
            write!(f, "{comma}{name}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for ClassSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{{{self}}}")
    }
}

/// The number of pages of each class, and of those among them that were found to hold only zeroes.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct ClassCounts {
    all: [Tally; NUMBERS],
    zero: [Tally; NUMBERS],
}

impl ClassCounts {
    /// The pages of `class`.
    #[must_use]
    pub fn get(&self, class: PageClass) -> u64 {
        number_of(&self.all, class)
    }

    /// Those of them that were found to hold only zeroes.
    #[must_use]
    pub fn zero(&self, class: PageClass) -> u64 {
        number_of(&self.zero, class)
    }

    /// Counts `pages` more of what `page` is.
    pub fn add(&mut self, page: impl Into<PageState>, pages: u64) {
        let page = page.into();
        let class = page.class() as usize;
        let zero = self.zero.get_mut(class).filter(|_| page.is_zero());
        for count in self.all.get_mut(class).into_iter().chain(zero) {
            count.add(pages);
        }
    }

    /// All pages.
    #[must_use]
    pub fn total(&self) -> u64 {
        sum(&self.all)
    }

    /// All pages that were found to hold only zeroes.
    #[must_use]
    pub fn total_zero(&self) -> u64 {
        sum(&self.zero)
    }

    /// The pages that are in `set` by what put them there: each class of it that has pages, then
    /// `zero`, the zero pages of all other classes, if the set has them.
    pub fn by_name(&self, set: ClassSet) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        let classes = set.iter().map(|class| (class.name(), self.get(class)));
        let others = PageClass::ALL
            .iter()
            .filter(move |class| !set.contains(**class));
        let zero: Tally = others.map(|class| self.zero(*class)).sum();
        let zero = set
            .contains_zero()
            .then_some((ClassSet::ZERO_NAME, zero.get()));
        classes.chain(zero).filter(|(_, pages)| *pages > 0)
    }

    /// The pages that are in `set`.
    #[must_use]
    pub fn total_of(&self, set: ClassSet) -> u64 {
        let of = |class: &PageClass| {
            if set.contains(*class) {
                self.get(*class)
            } else if set.contains_zero() {
                self.zero(*class)
            } else {
                0
            }
        };
        PageClass::ALL.iter().map(of).sum::<Tally>().get()
    }

    /// Each class that has pages, with its count.
    pub fn iter(&self) -> impl Iterator<Item = (PageClass, u64)> + '_ {
        PageClass::ALL
            .iter()
            .map(|class| (*class, self.get(*class)))
            .filter(|(_, count)| *count > 0)
    }
}

fn sum(counts: &[Tally]) -> u64 {
    counts.iter().map(|count| count.get()).sum::<Tally>().get()
}

/// The pages of `class`, whose number is one of all.
fn number_of(counts: &[Tally; NUMBERS], class: PageClass) -> u64 {
    counts.get(class as usize).map_or(0, |count| count.get())
}

impl fmt::Debug for ClassCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::{ClassCounts, ClassSet, PageClass, PageState};

    #[test]
    fn names_and_numbers_round_trip() {
        for class in PageClass::ALL {
            assert_eq!(class.name().parse(), Ok(*class));
            assert_eq!(PageClass::from_u8(*class as u8), Some(*class));
            for page in [PageState::new(*class), PageState::new(*class).with_zero()] {
                assert_eq!(page.class(), *class);
                let slab = page.with_class(PageClass::Slab);
                assert_eq!(
                    (slab.class(), slab.is_zero()),
                    (PageClass::Slab, page.is_zero())
                );
            }
        }
        assert!("free".parse::<PageClass>().is_err());
        assert_eq!(PageClass::from_u8(200), None);
    }

    #[test]
    fn the_default_drops_only_what_may_be_dropped() {
        assert!(ClassSet::DEFAULT_DROP.iter().all(PageClass::may_be_dropped));
        assert_eq!(ClassSet::DEFAULT_DROP.iter().count(), 3);
        let default = "free_buddy,free_pcp,offline,zero".parse();
        assert_eq!(default, Ok(ClassSet::DEFAULT_DROP));
        assert!(ClassSet::DEFAULT_DROP.used_by_guest().is_empty());
        assert!("free_buddy,".parse::<ClassSet>().is_err());
        let other = "anonymous,zero".parse::<ClassSet>().unwrap();
        assert_eq!(other.used_by_guest().to_string(), "anonymous");
        assert_eq!(other.to_string(), "anonymous, zero");
    }

    #[test]
    fn zeroes_are_counted_beside_their_class() {
        let mut counts = ClassCounts::default();
        counts.add(PageClass::Slab, 3);
        counts.add(PageState::new(PageClass::Slab).with_zero(), 2);
        counts.add(PageClass::FreeBuddy, 7);
        assert_eq!(
            (counts.get(PageClass::Slab), counts.zero(PageClass::Slab)),
            (5, 2)
        );
        assert_eq!((counts.total(), counts.total_zero()), (12, 2));
        assert_eq!(counts.total_of(ClassSet::DEFAULT_DROP), 9);
        let named: Vec<_> = counts.by_name(ClassSet::DEFAULT_DROP).collect();
        assert_eq!(named, [("free_buddy", 7), ("zero", 2)]);
        assert_eq!(
            counts.total_of(ClassSet::EMPTY.with(PageClass::Slab).with_zero()),
            5
        );
    }
}
