//! Memory blocks: what the kernel's driver of memory says of it.

use crate::error::VmiError;
use crate::kernel::{Kernel, element};
use crate::{KernelVa, VirtualMemory};

/// The kernel's memory blocks (`drivers/base/memory.c`), since 5.8 (4fb6eabf1037) in an `xarray`
/// by their number.
pub(super) struct MemoryBlocks {
    /// `xarray.xa_head`.
    head: KernelVa,
    shift: u64,
    slots: u64,
    /// Bits of the number that one node of the tree resolves.
    node_bits: u32,
    start_section_nr: u64,
    state: u64,
    state_size: u64,
    offline: u64,
    per_block: u64,
}

impl MemoryBlocks {
    /// `None` where no source knows them.
    pub(super) fn new(kernel: &Kernel<'_>) -> Result<Option<Self>, VmiError> {
        /// A macro until the states became `enum memory_block_state`.
        const MEM_OFFLINE: i64 = 1 << 2;
        /// 64 sections of 128 MiB are 8 GiB; no machine has larger blocks than 2 GiB.
        const MAX_PER_BLOCK: u32 = 64;
        let (Some(blocks), Some(per_block)) = (
            kernel.symbol("memory_blocks")?,
            kernel.symbol("sections_per_block")?,
        ) else {
            return Ok(None);
        };
        let (Some(head), Some(shift), Some(slots), Some(start), Some(state)) = (
            kernel.member("xarray", "xa_head")?,
            kernel.member("xa_node", "shift")?,
            kernel.member("xa_node", "slots")?,
            kernel.member("memory_block", "start_section_nr")?,
            kernel.member("memory_block", "state")?,
        ) else {
            return Ok(None);
        };
        let per_block = kernel.read_u32("sections_per_block", per_block)?;
        let offline = kernel.constant("MEM_OFFLINE")?.unwrap_or(MEM_OFFLINE);
        let slots_len = slots.len.filter(|len| len.is_power_of_two() && *len <= 64);
        let (Some(slots_len), Ok(offline), Some(state_size), 1..=MAX_PER_BLOCK) = (
            slots_len,
            u64::try_from(offline),
            state.size.filter(|size| matches!(size, 4 | 8)),
            per_block,
        ) else {
            return Ok(None);
        };
        Ok(Some(Self {
            head: element("memory_blocks", blocks, 0, 0, head.offset)?,
            shift: shift.offset,
            slots: slots.offset,
            node_bits: slots_len.trailing_zeros(),
            start_section_nr: start.offset,
            state: state.offset,
            state_size,
            offline,
            per_block: u64::from(per_block),
        }))
    }

    /// The reason that section `number` is not in an offline memory block; `None` if it is.
    pub(super) fn doubt(
        &self,
        kernel: &Kernel<'_>,
        number: u64,
    ) -> Result<Option<String>, VmiError> {
        let none = || Ok(Some(format!("section {number} has no memory block")));
        let Some(id) = number.checked_div(self.per_block) else {
            return none();
        };
        let Some(block) = self.load(kernel, id)? else {
            return none();
        };
        let field = |offset| element("memory_block", block, 0, 0, offset);
        let start = kernel.read_u64(
            "memory_block.start_section_nr",
            field(self.start_section_nr)?,
        )?;
        if Some(start) != id.checked_mul(self.per_block) {
            return Ok(Some(format!(
                "the memory block of section {number} begins at section {start}"
            )));
        }
        let state = field(self.state)?;
        let state = if self.state_size == 4 {
            u64::from(kernel.read_u32("memory_block.state", state)?)
        } else {
            kernel.read_u64("memory_block.state", state)?
        };
        Ok((state != self.offline).then(|| {
            format!("the memory block of section {number} is in state {state}, not offline")
        }))
    }

    /// The entry at `index` (`xa_load`, `lib/xarray.c`).
    fn load(&self, kernel: &Kernel<'_>, index: u64) -> Result<Option<KernelVa>, VmiError> {
        /// Entries below are no nodes (`xa_is_node`).
        const MIN_NODE: u64 = 4096;
        let mask = !(u64::MAX << self.node_bits);
        let mut entry = kernel.read_u64("xarray.xa_head", self.head)?;
        let mut above: Option<u32> = None;
        while entry & 3 == 2 && entry > MIN_NODE {
            let node = KernelVa::new(entry & !3);
            let at = element("xa_node", node, 0, 0, self.shift)?;
            let mut shift = [0];
            kernel
                .space
                .read(at, &mut shift)
                .map_err(VmiError::read("xa_node.shift"))?;
            let shift = u32::from(shift[0]);
            // Each node resolves the bits right below its parent's.
            let expected = above.map_or(Some(shift), |above| above.checked_sub(self.node_bits));
            let slot = index.checked_shr(shift);
            let (Some(slot), true) = (slot, expected == Some(shift)) else {
                return Err(VmiError::Corrupt {
                    what: "xa_node.shift",
                    at,
                    value: u64::from(shift),
                });
            };
            if above.is_none() && slot > mask {
                return Ok(None);
            }
            let slot = element("xa_node.slots", node, slot & mask, 8, self.slots)?;
            entry = kernel.read_u64("xa_node.slots", slot)?;
            if shift == 0 {
                above = Some(0);
                break;
            }
            above = Some(shift);
        }
        let is_leaf = above.map_or(index == 0, |shift| shift == 0);
        let is_pointer = entry & 3 == 0 && kernel.space.is_pointer(entry);
        Ok((is_leaf && is_pointer).then_some(KernelVa::new(entry)))
    }
}

#[cfg(test)]
mod tests {
    use super::MemoryBlocks;
    use crate::kernel::testing::{DIRECT_MAP, Facts, Ram, kernel};
    use crate::symbols::Member;

    #[test]
    fn a_block_has_no_more_sections_than_a_kernel_gives_it() {
        for (sections, is_read) in [(0, false), (1, true), (64, true), (65, false)] {
            let mut ram = Ram::new(8 << 20);
            ram.put(0x1000, sections);
            let mut facts = Facts::default();
            facts.symbols.insert("memory_blocks", DIRECT_MAP + 0x2000);
            facts
                .symbols
                .insert("sections_per_block", DIRECT_MAP + 0x1000);
            for (ty, name) in [
                ("xarray", "xa_head"),
                ("xa_node", "shift"),
                ("memory_block", "start_section_nr"),
                ("memory_block", "state"),
            ] {
                facts.member(ty, name, 8);
            }
            let slots = Member {
                offset: 40,
                size: Some(512),
                len: Some(64),
            };
            facts.members.insert(("xa_node", "slots"), slots);
            let memory = ram.memory();
            let found = MemoryBlocks::new(&kernel(&memory, facts)).unwrap();
            assert_eq!(found.is_some(), is_read, "{sections}");
        }
    }
}
