//! What the guest's kernel uses a page for.

use core::fmt;
use core::str::FromStr;

macro_rules! classes {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $droppable:literal;)*) => {
        /// What the guest's kernel uses a page for.
        ///
        /// The name of each class is the one that the command line and JSON use.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        #[non_exhaustive]
        pub enum PageClass {
            $($(#[$doc])* $variant,)*
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

            /// Whether a policy may drop pages of this class at all.
            ///
            /// What the kernel itself needs to run is never droppable, whatever a policy says.
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
    Unknown = "unknown", false;
    /// RAM that the kernel has no `struct page` for.
    Hole = "hole", false;
    /// In the buddy allocator: flag, list and counters agree.
    FreeBuddy = "free_buddy", true;
    /// On a per-CPU free list.
    FreePcp = "free_pcp", true;
    /// Offline: in a balloon, or in a section that is not online; by more than its own word.
    Offline = "offline", true;
    /// In use, and every byte is zero.
    Zero = "zero", true;
    /// Allocated by the kernel, with no more precise class.
    Kernel = "kernel", false;
    /// In a slab.
    Slab = "slab", false;
    /// A page table.
    PageTable = "page_table", false;
    /// Anonymous memory of a process.
    Anonymous = "anonymous", true;
    /// Page cache whose content is also on disk.
    PageCacheClean = "page_cache_clean", true;
    /// Page cache that is dirty, being written, locked, or not provably clean.
    PageCacheDirty = "page_cache_dirty", true;
    /// Shared memory and tmpfs.
    Shmem = "shmem", true;
    /// A huge page in use.
    Hugetlb = "hugetlb", true;
    /// A huge page that waits in the pool.
    HugetlbFree = "hugetlb_free", true;
    /// Reserved: firmware, the kernel's image, boot-time allocations, device memory.
    Reserved = "reserved", false;
    /// Memory of a confidential guest that it has not accepted yet.
    Unaccepted = "unaccepted", false;
    /// Poisoned by a hardware memory error: never read.
    HwPoison = "hwpoison", false;
}

impl PageClass {
    /// The class that [`PageClass`] numbers `raw`, if there is one.
    #[must_use]
    pub fn from_u8(raw: u8) -> Option<Self> {
        Self::ALL.get(usize::from(raw)).copied()
    }
}

impl fmt::Display for PageClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that is no page class.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{name}` is no page class")]
pub struct UnknownClass {
    /// The name given.
    pub name: String,
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

/// A set of page classes.
///
/// ```
/// use sonicshot::{ClassSet, PageClass};
/// let set: ClassSet = [PageClass::FreeBuddy, PageClass::Zero].into_iter().collect();
/// assert!(set.contains(PageClass::Zero));
/// assert!(!set.contains(PageClass::Slab));
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct ClassSet(u32);

impl ClassSet {
    /// No class.
    pub const EMPTY: Self = Self(0);
    /// What the kernel itself does not care about: the default of every prune.
    pub const DEFAULT_DROP: Self = Self::EMPTY
        .with(PageClass::FreeBuddy)
        .with(PageClass::FreePcp)
        .with(PageClass::Offline)
        .with(PageClass::Zero);

    /// This set and `class`.
    #[must_use]
    pub const fn with(self, class: PageClass) -> Self {
        Self(self.0 | 1 << class as u8)
    }

    /// Whether `class` is in the set.
    #[must_use]
    pub const fn contains(self, class: PageClass) -> bool {
        self.0 & (1 << class as u8) != 0
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

impl fmt::Debug for ClassSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

/// How many pages of each class there are.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct ClassCounts([u64; PageClass::ALL.len()]);

impl ClassCounts {
    /// The pages of `class`.
    #[must_use]
    pub fn get(&self, class: PageClass) -> u64 {
        self.0.get(class as usize).copied().unwrap_or(0)
    }

    /// Counts `pages` more of `class`.
    pub fn add(&mut self, class: PageClass, pages: u64) {
        if let Some(count) = self.0.get_mut(class as usize) {
            *count = count.saturating_add(pages);
        }
    }

    /// All pages.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.iter().fold(0, |sum, n| sum.saturating_add(*n))
    }

    /// The pages of every class in `set`.
    #[must_use]
    pub fn total_of(&self, set: ClassSet) -> u64 {
        set.iter()
            .fold(0, |sum, class| sum.saturating_add(self.get(class)))
    }

    /// Each class that has pages, with its count.
    pub fn iter(&self) -> impl Iterator<Item = (PageClass, u64)> + '_ {
        PageClass::ALL
            .iter()
            .map(|class| (*class, self.get(*class)))
            .filter(|(_, count)| *count > 0)
    }
}

impl fmt::Debug for ClassCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::{ClassSet, PageClass};

    #[test]
    fn names_and_numbers_round_trip() {
        for class in PageClass::ALL {
            assert_eq!(class.name().parse(), Ok(*class));
            assert_eq!(PageClass::from_u8(*class as u8), Some(*class));
        }
        assert!("free".parse::<PageClass>().is_err());
        assert_eq!(PageClass::from_u8(200), None);
    }

    #[test]
    fn the_default_drops_only_what_may_be_dropped() {
        assert!(ClassSet::DEFAULT_DROP.iter().all(PageClass::may_be_dropped));
        assert_eq!(ClassSet::DEFAULT_DROP.iter().count(), 4);
    }
}
