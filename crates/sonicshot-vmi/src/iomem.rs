//! The kernel's tree of physical resources, `iomem_resource` (`kernel/resource.c`).

use crate::KernelVa;
use crate::error::VmiError;
use crate::kernel::{Kernel, element};
use sonicshot::{Gpa, GpaRange};

/// No machine lists more resources.
const MAX_RESOURCES: u32 = 1 << 16;
/// Resources that contain RAM are at most this deep: virtio-mem puts one around its own.
const MAX_DEPTH: u32 = 4;
/// What RAM is called, whoever added it: `System RAM (virtio_mem)`.
const NAME: &str = "System RAM";

struct Resource {
    start: u64,
    end: u64,
    name: u64,
    child: u64,
    sibling: u64,
}

/// Every stretch of RAM in the tree, lowest first as the tree has them.
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
    let layout = Resource {
        start,
        end,
        name,
        child,
        sibling,
    };
    let first = kernel.read_ptr("iomem_resource", element("resource", root, 0, 0, child)?)?;
    let mut found = Vec::new();
    let mut left = MAX_RESOURCES;
    walk(kernel, &layout, first, MAX_DEPTH, &mut left, &mut found)?;
    Ok(Some(found))
}

/// Goes through `first` and its siblings, and through the children of what is no RAM.
fn walk(
    kernel: &Kernel<'_>,
    layout: &Resource,
    first: KernelVa,
    depth: u32,
    left: &mut u32,
    found: &mut Vec<GpaRange>,
) -> Result<(), VmiError> {
    let mut at = first;
    while at.raw() != 0 {
        *left = left.checked_sub(1).ok_or(VmiError::Corrupt {
            what: "a tree of resources without end",
            at: first,
            value: u64::from(MAX_RESOURCES),
        })?;
        let field = |offset| element("resource", at, 0, 0, offset);
        let name = kernel.read_ptr("resource.name", field(layout.name)?)?;
        let name = kernel.space.read_str(name, NAME.len());
        if name.is_ok_and(|name| name.starts_with(NAME)) {
            let start = kernel.read_u64("resource.start", field(layout.start)?)?;
            // Inclusive.
            let end = kernel.read_u64("resource.end", field(layout.end)?)?;
            let len = end
                .checked_sub(start)
                .and_then(|len| len.checked_add(1))
                .ok_or(VmiError::Corrupt {
                    what: "resource.end",
                    at,
                    value: end,
                })?;
            found.extend(GpaRange::with_len(Gpa::new(start), len));
        } else if depth > 0 {
            let child = kernel.read_ptr("resource.child", field(layout.child)?)?;
            walk(kernel, layout, child, depth.saturating_sub(1), left, found)?;
        }
        at = kernel.read_ptr("resource.sibling", field(layout.sibling)?)?;
    }
    Ok(())
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
        let mut ram = Ram::new(8 * MIB);
        name(&mut ram, 0x2000, b"System RAM\0");
        name(&mut ram, 0x2020, b"virtio0\0");
        name(&mut ram, 0x2040, b"System RAM (virtio_mem)\0");
        name(&mut ram, 0x2080, b"Kernel code\0");
        put(&mut ram, 0x1000, [0, u64::MAX, 0x2020, 0, 0x1100]);
        put(&mut ram, 0x1100, [0x1000, 0x9_fbff, 0x2000, 0x1200, 0x1400]);
        put(
            &mut ram,
            0x1200,
            [1 << 32, (1 << 32) + 0xffff_ffff, 0x2020, 0, 0x1300],
        );
        put(
            &mut ram,
            0x1300,
            [1 << 32, (1 << 32) + 0x7ff_ffff, 0x2040, 0, 0],
        );
        put(&mut ram, 0x1400, [0x2000, 0x2fff, 0x2080, 0, 0]);
        ram
    }

    #[test]
    fn ram_is_found_at_the_top_and_inside_devices() {
        let want = [(0x1000, 0x9_fc00), (1 << 32, (1 << 32) + 0x800_0000)];
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
