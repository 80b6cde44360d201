//! The common part of formats with compressed pages: a bounded cache of decompressed blocks.

use sonicshot::{to_u64, to_usize};
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::{Mutex, PoisonError};

/// Several locks, so that threads that read different blocks seldom wait for each other.
const SHARDS: usize = 16;

/// The blocks read last, by key. A small read of a block that is there costs a look-up and a
/// copy.
///
/// A block that was not read since it was last passed over goes first (second chance): that is
/// close to the least recently used and needs no list to be kept in order.
pub(crate) struct BlockCache<K> {
    shards: Vec<Mutex<Shard<K>>>,
    hasher: RandomState,
    per_shard: usize,
}

struct Shard<K> {
    blocks: HashMap<K, Block>,
    /// Each key in `blocks` once, the next to go first.
    order: VecDeque<K>,
}

struct Block {
    bytes: Vec<u8>,
    read_again: bool,
}

impl<K: Copy + Eq + Hash> BlockCache<K> {
    /// A cache that keeps about `max_bytes` in blocks of `block_len` bytes.
    pub(crate) fn new(max_bytes: usize, block_len: usize) -> Self {
        let blocks = max_bytes.checked_div(block_len).unwrap_or(1);
        Self {
            shards: (0..SHARDS)
                .map(|_| {
                    Mutex::new(Shard {
                        blocks: HashMap::new(),
                        order: VecDeque::new(),
                    })
                })
                .collect(),
            hasher: RandomState::new(),
            per_shard: blocks.div_ceil(SHARDS).max(1),
        }
    }

    /// Fills `out` with the bytes from `inside` of the block `key`, which `load` makes if it is
    /// not there. `None` if the block has no such bytes.
    pub(crate) fn read<E>(
        &self,
        key: K,
        inside: usize,
        out: &mut [u8],
        load: impl FnOnce() -> Result<Vec<u8>, E>,
    ) -> Result<Option<()>, E> {
        if let Some(shard) = self.shard(&key) {
            let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(block) = shard.blocks.get_mut(&key) {
                block.read_again = true;
                return Ok(copy(&block.bytes, inside, out));
            }
        }
        // Without the lock: two threads that miss the same block both load it.
        let bytes = load()?;
        let copied = copy(&bytes, inside, out);
        // Who reads a whole block has no need of it a second time.
        if out.len() < bytes.len() {
            self.insert(key, bytes);
        }
        Ok(copied)
    }

    fn shard(&self, key: &K) -> Option<&Mutex<Shard<K>>> {
        const LAST_SHARD: u64 = to_u64(SHARDS) - 1;
        let hash = self.hasher.hash_one(key);
        self.shards.get(to_usize(hash & LAST_SHARD))
    }

    fn insert(&self, key: K, bytes: Vec<u8>) {
        let Some(shard) = self.shard(&key) else {
            return;
        };
        let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
        let shard = &mut *shard;
        while shard.order.len() >= self.per_shard
            && let Some(oldest) = shard.order.pop_front()
        {
            match shard.blocks.get_mut(&oldest) {
                // Each turn of this loop takes a block or such a mark away, so it ends.
                Some(block) if block.read_again => {
                    block.read_again = false;
                    shard.order.push_back(oldest);
                }
                _ => {
                    shard.blocks.remove(&oldest);
                }
            }
        }
        let block = Block {
            bytes,
            read_again: false,
        };
        if shard.blocks.insert(key, block).is_none() {
            shard.order.push_back(key);
        }
    }
}

fn copy(bytes: &[u8], inside: usize, out: &mut [u8]) -> Option<()> {
    out.copy_from_slice(bytes.get(inside..)?.get(..out.len())?);
    Some(())
}

impl<K> fmt::Debug for BlockCache<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockCache").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::{BlockCache, SHARDS};
    use std::cell::Cell;

    #[test]
    fn keeps_few_blocks_and_loads_what_is_gone() {
        let cache = BlockCache::new(64 * 16, 16);
        let loads = Cell::new(0);
        let read = |key: u8, at: usize| {
            let mut out = [0; 4];
            let got = cache.read(key, at, &mut out, || {
                loads.set(loads.get() + 1);
                Ok::<_, ()>(vec![key; 16])
            });
            assert_eq!(got.unwrap().is_some(), at <= 12);
            out
        };
        for _ in 0..3 {
            assert_eq!(read(7, 12), [7; 4]);
        }
        read(7, 13);
        assert_eq!(loads.get(), 1);
        for _ in 0..3 {
            for key in 0..=255 {
                assert_eq!(read(key, 3), [key; 4]);
            }
        }
        assert!(loads.get() > 256);
        for shard in &cache.shards {
            let shard = shard.lock().unwrap();
            assert!(shard.blocks.len() <= 64 / SHARDS);
            assert_eq!(shard.blocks.len(), shard.order.len());
        }
    }

    #[test]
    fn whole_blocks_pass_by_and_errors_come_through() {
        let cache = BlockCache::new(1024, 16);
        let mut out = [0; 16];
        for _ in 0..2 {
            let mut loaded = false;
            let got = cache.read(1, 0, &mut out, || {
                loaded = true;
                Ok::<_, ()>(vec![1; 16])
            });
            assert!(got.unwrap().is_some() && loaded);
        }
        assert_eq!(cache.read(1, 0, &mut out, || Err("no")), Err("no"));
    }
}
