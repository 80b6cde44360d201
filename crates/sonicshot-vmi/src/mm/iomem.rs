//! The kernel's tree of physical resources, `iomem_resource` (`kernel/resource.c`).

use crate::error::VmiError;
use crate::kernel::{Kernel, element};
use sonicshot::{Gpa, GpaRange};

/// No machine lists more resources.
const MAX_RESOURCES: u32 = 1 << 16;
const NAME: &str = "System RAM";

/// Every range of RAM at the top of the tree, lowest first as the tree has them. Memory that
/// belongs to a device (virtio-mem, dax) lies below that device.
pub(crate) fn system_ram(kernel: &Kernel<'_>) -> Result<Option<Vec<GpaRange>>, VmiError> {
    let Some(root) = kernel.symbol("iomem_resource")? else {
        return Ok(None);
    };
    let offset = |name: &str| Ok::<_, VmiError>(kernel.member("resource", name)?.map(|m| m.offset));
    let (Some(start), Some(end), Some(name), Some(child), Some(sibling)) = (
        offset("start")?,
        offset("end")?,
        offset("name")?,
        offset("child")?,
        offset("sibling")?,
    ) else {
        return Ok(None);
    };
    let field = |at, offset| element("resource", at, 0, 0, offset);
    let mut at = kernel.read_ptr("iomem_resource", field(root, child)?)?;
    let mut found = Vec::new();
    let mut left = MAX_RESOURCES;
    while at.raw() != 0 {
        left = left.checked_sub(1).ok_or(VmiError::Corrupt {
            what: "a list of resources without end",
            at: root,
            value: u64::from(MAX_RESOURCES),
        })?;
        let text = kernel.read_ptr("resource.name", field(at, name)?)?;
        // A longer name must not look the same.
        const LEN: usize = NAME.len() + 1;
        let text = kernel.space.read_str(text, LEN);
        if text.is_ok_and(|text| text == NAME) {
            let first = kernel.read_u64("resource.start", field(at, start)?)?;
            // Inclusive.
            let last = kernel.read_u64("resource.end", field(at, end)?)?;
            let range = last
                .checked_sub(first)
                .and_then(|len| len.checked_add(1))
                .and_then(|len| GpaRange::with_len(Gpa::new(first), len));
            found.push(range.ok_or(VmiError::Corrupt {
                what: "resource.end",
                at,
                value: last,
            })?);
        }
        at = kernel.read_ptr("resource.sibling", field(at, sibling)?)?;
    }
    Ok(Some(found))
}

#[cfg(test)]
mod tests {
    use super::system_ram;
    use crate::kernel::testing::{DIRECT_MAP, Facts, Ram, kernel};

    const MIB: usize = 1 << 20;

    fn facts() -> Facts {
        let mut facts = Facts::default();
        facts.symbols.insert("iomem_resource", DIRECT_MAP + 0x1000);
        for (name, offset) in [
            ("start", 0),
            ("end", 8),
            ("name", 16),
            ("sibling", 24),
            ("child", 32),
        ] {
            facts.member("resource", name, offset);
        }
        facts
    }

    /// A resource at `at`: start, end, where its name is, sibling, child.
    fn put(ram: &mut Ram, at: u64, fields: [u64; 5]) {
        for (index, value) in (0..).zip(fields) {
            let pointer = index >= 2 && value != 0;
            let value = if pointer { DIRECT_MAP + value } else { value };
            ram.put(at + index * 8, value);
        }
    }

    fn name(ram: &mut Ram, at: usize, name: &[u8]) {
        ram.0[at..at + name.len()].copy_from_slice(name);
    }

    fn found(ram: &Ram) -> Result<Vec<(u64, u64)>, crate::VmiError> {
        let memory = ram.memory();
        let found = system_ram(&kernel(&memory, facts()))?.unwrap();
        Ok(found
            .iter()
            .map(|r| (r.start().raw(), r.end().raw()))
            .collect())
    }

    fn tree() -> Ram {
        const GIB_4: u64 = 1 << 32;
        let mut ram = Ram::new(8 * MIB);
        name(&mut ram, 0x2000, b"System RAM\0");
        name(&mut ram, 0x2020, b"virtio0\0");
        name(&mut ram, 0x2040, b"System RAM (virtio_mem)\0");
        name(&mut ram, 0x2080, b"Kernel code\0");
        put(&mut ram, 0x1000, [0, u64::MAX, 0x2020, 0, 0x1100]);
        put(&mut ram, 0x1100, [0x1000, 0x9_fbff, 0x2000, 0x1200, 0x1400]);
        let device = [GIB_4, 2 * GIB_4 - 1, 0x2020, 0x1500, 0x1300];
        put(&mut ram, 0x1200, device);
        put(&mut ram, 0x1300, [GIB_4, GIB_4 + 0xfff, 0x2000, 0, 0]);
        put(&mut ram, 0x1400, [0x2000, 0x2fff, 0x2080, 0, 0]);
        put(
            &mut ram,
            0x1500,
            [2 * GIB_4, 2 * GIB_4 + 0xfff, 0x2040, 0x1600, 0],
        );
        put(
            &mut ram,
            0x1600,
            [3 * GIB_4, 3 * GIB_4 + 0xfff, 0x2000, 0, 0],
        );
        ram
    }

    #[test]
    fn ram_is_found_but_not_what_belongs_to_a_device() {
        let want = [(0x1000, 0x9_fc00), (3 << 32, (3 << 32) + 0x1000)];
        assert_eq!(found(&tree()).unwrap(), want);
    }

    #[test]
    fn a_tree_that_is_none_is_refused() {
        let mut ram = tree();
        // A circle of siblings.
        put(&mut ram, 0x1200, [0, 0, 0x2020, 0x1100, 0]);
        assert!(found(&ram).unwrap_err().to_string().contains("without end"));
        let mut ram = tree();
        put(&mut ram, 0x1100, [0x2000, 0x1000, 0x2000, 0, 0]);
        assert!(found(&ram).is_err());
        let mut ram = tree();
        ram.put(0x1118, 0xdead_0000_0000_0000);
        assert!(found(&ram).is_err());
    }
}
