//! The memory that an EFI firmware keeps for the kernel that it started, and where it writes after a reset.
//!
//! At boot the kernel gives the firmware's runtime services addresses of its own
//! (`SetVirtualAddressMap`; `arch/x86/platform/efi/efi.c`): from then on the pointers in the system
//! table and in the runtime services table (UEFI 2.10, sections 4.3 and 4.5) are the kernel's, and
//! their checksums are made anew. A firmware that starts again builds both tables anew, with
//! physical addresses, before it hands out any other memory (`DxeMain`, EDK II). Until then it
//! writes to memory of fixed places alone ([`early_memory`]): free pages there are kept. Where the
//! runtime services are off (`efi=noruntime`, kernels for real-time work), and where it is not known
//! where the firmware writes, nothing would tell of a reset, and the guest is refused.

use super::super::e820;
use crate::arch::{Trace, Verdict};
use crate::error::VmiError;
use crate::kernel::{Kernel, element};
use crate::{KernelVa, VirtualReadError};
use sonicshot::{Gpa, GpaRange, MemoryError, to_usize};

/// Whether an EFI firmware, or its loader, started the kernel.
pub(crate) fn is_started_by(kernel: &Kernel<'_>) -> Result<bool, VmiError> {
    let member = "efi_info.efi_loader_signature";
    Ok(kernel.read_u32("boot_params", boot_params(kernel, member)?)? != 0)
}

/// The address of a member of the `struct boot_params` that a kernel keeps which a loader has started.
pub(crate) fn boot_params(kernel: &Kernel<'_>, member: &str) -> Result<KernelVa, VmiError> {
    let offset = kernel.need_member("boot_params", member)?.offset;
    let at = kernel.need_symbol("boot_params")?;
    element("boot_params", at, 0, 0, offset)
}

/// Memory of the firmware that the kernel has given addresses of its own.
#[derive(Debug, Clone, Copy)]
struct Region {
    at: Gpa,
    mapped: u64,
    len: u64,
}

impl Region {
    fn physical(&self, at: u64) -> Option<Gpa> {
        let offset = at.checked_sub(self.mapped)?;
        (offset < self.len)
            .then(|| self.at.checked_add(offset))
            .flatten()
    }
}

/// The findings in the firmware's tables.
#[derive(Debug)]
pub(crate) enum Tables {
    /// They are as the firmware left them for the kernel. Before it would change them after a
    /// reset, it writes only here.
    Kept(Vec<GpaRange>),
    /// They are of a later start of the firmware.
    Gone(Vec<Trace>),
    /// They tell nothing, for this reason.
    Untold(String),
}

/// Looks at the tables of a kernel that an EFI firmware started.
///
/// # Errors
/// What reading the memory gives.
pub(crate) fn tables(kernel: &Kernel<'_>) -> Result<Tables, VmiError> {
    match look(kernel) {
        Err(
            error @ (VmiError::Missing { .. }
            | VmiError::Disagree { .. }
            | VmiError::Unsupported { .. }
            | VmiError::Corrupt { .. }
            | VmiError::Symbols(_)
            | VmiError::Memory(MemoryError::NotRam { .. } | MemoryError::Absent { .. })
            | VmiError::Read {
                source:
                    VirtualReadError::Memory {
                        source: MemoryError::NotRam { .. } | MemoryError::Absent { .. },
                        ..
                    },
                ..
            }),
        ) => Ok(Tables::Untold(error.to_string())),
        other => other,
    }
}

fn look(kernel: &Kernel<'_>) -> Result<Tables, VmiError> {
    /// `EFI_SYSTEM_TABLE`: where it holds the vendor's name, and the runtime services table.
    const VENDOR: usize = 24;
    const RUNTIME: usize = 88;
    /// In the runtime services table: `GetTime`, `SetTime`, `GetWakeupTime`, `SetWakeupTime`; and
    /// behind `SetVirtualAddressMap` and `ConvertPointer`, which are of no use any more,
    /// `GetVariable` and the others up to `ResetSystem`.
    const SERVICES: [usize; 9] = [24, 32, 40, 48, 72, 80, 88, 96, 104];
    let word = |name| {
        kernel
            .need_member("efi", name)
            .and_then(|member| element("efi", kernel.need_symbol("efi")?, 0, 0, member.offset))
    };
    let runtime = kernel.read_u64("efi.runtime", word("runtime")?)?;
    let regions = regions(kernel, &word)?;
    let physical = |at| regions.iter().find_map(|region| region.physical(at));
    let Some(services_at) = physical(runtime) else {
        return Ok(Tables::Untold(
            "its EFI runtime services are off, so that a firmware which starts again leaves no \
             trace in them"
                .into(),
        ));
    };
    let half = |member| {
        boot_params(kernel, member)
            .and_then(|at| kernel.read_u32("boot_params", at))
            .map(u64::from)
    };
    let system_at = half("efi_info.efi_systab")? | half("efi_info.efi_systab_hi")? << 32;
    let system_at = Gpa::new(system_at);
    let wrong = |what: &str, at, found| {
        Ok(Tables::Gone(vec![Trace::Firmware {
            what: what.into(),
            at,
            found,
        }]))
    };
    let what = "the EFI system table";
    let system = match table(kernel, system_at, *b"IBI SYST")? {
        Ok(system) => system,
        Err(found) => return wrong(what, system_at, found),
    };
    let points_to = number(&system, RUNTIME);
    if points_to != Some(runtime) {
        let points_to = points_to.map_or_else(|| "no place".into(), |at| format!("{at:#x}"));
        let found = format!("points to runtime services at {points_to}, not {runtime:#x}");
        return wrong(what, system_at, found);
    }
    let what = "the EFI runtime services table";
    let services = match table(kernel, services_at, *b"RUNTSERV")? {
        Ok(services) => services,
        Err(found) => return wrong(what, services_at, found),
    };
    for at in SERVICES {
        let service = number(&services, at);
        if service.and_then(physical).is_none() {
            let service = service.map_or_else(|| "no place".into(), |at| format!("{at:#x}"));
            let found =
                format!("has a service at {service}, which is none of the kernel's addresses");
            return wrong(what, services_at, found);
        }
    }
    let Some(vendor) = number(&system, VENDOR) else {
        return wrong("the EFI system table", system_at, "names no vendor".into());
    };
    let vendor = physical(vendor).unwrap_or(Gpa::new(vendor));
    let vendor = utf16(kernel, vendor)?;
    if !vendor.contains("EDK II") {
        return Ok(Tables::Untold(format!(
            "its EFI firmware ({vendor:?}) is none of which it is known where it writes after a \
             reset before it leaves a trace"
        )));
    }
    Ok(Tables::Kept(early_memory(kernel)?))
}

/// The ranges that EDK II's OVMF writes to between the reset and its new system table: memory below
/// 1 MiB (start-up code of the other processors); the memory that it is unpacked into, from 8 MiB on
/// (`PcdOvmfSecPageTablesBase` to `PcdOvmfDecompressionScratchEnd`: to 23 MiB in 2022, to 26 MiB in
/// 2026); and its first heap, the uppermost 64 MiB of low memory with page tables for the processor's
/// whole address space (`PeiMemoryCap`, `MemDetect.c`), below what SMM has there and the kernel not.
fn early_memory(kernel: &Kernel<'_>) -> Result<Vec<GpaRange>, VmiError> {
    const MIB: u64 = 1 << 20;
    const FOUR_GIB: u64 = 1 << 32;
    /// The page tables are of at most 4,096 pages for 4 TiB in pages of 2 MiB, and of 514 for
    /// any processor with pages of 1 GiB.
    const HEAP: u64 = (64 + 16) * MIB;
    let low = |ranges: &[GpaRange]| {
        let ends = ranges.iter().map(|range| range.end().raw());
        ends.filter(|end| *end <= FOUR_GIB).max()
    };
    let end = low(kernel.space.memory().layout().regions()).unwrap_or(FOUR_GIB);
    let usable = e820::usable_ram(kernel, e820::FIRMWARE)?.and_then(|map| low(&map));
    let start = usable.unwrap_or(end).min(end).checked_sub(HEAP);
    Ok([
        (0, MIB),
        (8 * MIB, 32 * MIB),
        (start.unwrap_or_default(), end),
    ]
    .into_iter()
    .map(|(start, end)| GpaRange::new(Gpa::new(start), Gpa::new(end)))
    .collect())
}

/// The firmware's memory with addresses of the kernel (`efi.memmap`).
fn regions(
    kernel: &Kernel<'_>,
    word: &dyn Fn(&'static str) -> Result<KernelVa, VmiError>,
) -> Result<Vec<Region>, VmiError> {
    /// A firmware's map has some hundred.
    const MAX_REGIONS: u32 = 1 << 16;
    /// `efi_memory_desc_t`, which a firmware may make longer.
    const MIN_SIZE: u64 = 40;
    const MAX_SIZE: u64 = 4096;
    const PHYS_ADDR: u64 = 8;
    const VIRT_ADDR: u64 = 16;
    const NUM_PAGES: u64 = 24;
    const PAGE: u64 = 4096;
    let map = kernel.read_ptr("efi.memmap.map", word("memmap.map")?)?;
    let count = kernel.read_u32("efi.memmap.nr_map", word("memmap.nr_map")?)?;
    let size = kernel.read_u64("efi.memmap.desc_size", word("memmap.desc_size")?)?;
    if map.raw() == 0 || count == 0 {
        return Ok(Vec::new());
    }
    let corrupt = |what, value| VmiError::Corrupt {
        what,
        at: map,
        value,
    };
    if count > MAX_REGIONS {
        return Err(corrupt("efi.memmap.nr_map", u64::from(count)));
    }
    if !(MIN_SIZE..=MAX_SIZE).contains(&size) {
        return Err(corrupt("efi.memmap.desc_size", size));
    }
    let mut found = Vec::new();
    for index in 0..u64::from(count) {
        let field = |offset| {
            element("efi.memmap", map, index, size, offset)
                .and_then(|at| kernel.read_u64("efi_memory_desc_t", at))
        };
        let mapped = field(VIRT_ADDR)?;
        let pages = field(NUM_PAGES)?;
        let len = pages
            .checked_mul(PAGE)
            .ok_or_else(|| corrupt("efi_memory_desc_t.num_pages", pages))?;
        if mapped != 0 {
            found.push(Region {
                at: Gpa::new(field(PHYS_ADDR)?),
                mapped,
                len,
            });
        }
    }
    Ok(found)
}

/// A table of the firmware, or what is there instead: signature, length, and CRC-32 (UEFI 2.10,
/// section 4.2).
fn table(
    kernel: &Kernel<'_>,
    at: Gpa,
    signature: [u8; 8],
) -> Result<Result<Vec<u8>, String>, VmiError> {
    const MAX_LEN: usize = 4096;
    const LEN: usize = 12;
    const CHECKSUM: core::ops::Range<usize> = 16..20;
    let mut header = [0; 24];
    kernel.space.memory().read(at, &mut header)?;
    if !header.starts_with(&signature) {
        let (found, _) = header.split_at(signature.len());
        return Ok(Err(format!("is not there ({})", found.escape_ascii())));
    }
    let len = number(&header, LEN).map(|word| to_usize(word & 0xffff_ffff));
    let Some(len) = len else {
        return Ok(Err("is not whole (it has no length)".into()));
    };
    if !(header.len()..=MAX_LEN).contains(&len) {
        return Ok(Err(format!("is not whole (its length is {len})")));
    }
    let mut bytes = vec![0; len];
    kernel.space.memory().read(at, &mut bytes)?;
    let mut checksum = [0; 4];
    if let Some(there) = bytes.get_mut(CHECKSUM) {
        checksum.copy_from_slice(there);
        there.fill(0);
    }
    let checksum = u32::from_le_bytes(checksum);
    let is = crc32(&bytes);
    if is != checksum {
        return Ok(Err(format!(
            "is not whole (its checksum is {checksum:#x}, and it says {is:#x})"
        )));
    }
    Ok(Ok(bytes))
}

fn number(bytes: &[u8], at: usize) -> Option<u64> {
    let word = bytes.get(at..at.checked_add(8)?)?;
    word.try_into().ok().map(u64::from_le_bytes)
}

/// The CRC-32 of IEEE 802.3.
fn crc32(bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0xedb8_8320;
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ if crc & 1 == 1 { POLYNOMIAL } else { 0 };
        }
    }
    !crc
}

/// The text at `at`, at most 64 characters.
fn utf16(kernel: &Kernel<'_>, at: Gpa) -> Result<String, VmiError> {
    let mut bytes = [0; 128];
    kernel.space.memory().read(at, &mut bytes)?;
    let (units, _) = bytes.as_chunks::<2>();
    let units = units.iter().map(|unit| u16::from_le_bytes(*unit));
    let text = char::decode_utf16(units.take_while(|unit| *unit != 0));
    Ok(text
        .map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER))
        .collect())
}

/// The test for a trace in them.
pub(super) fn efi_tables(kernel: &Kernel<'_>) -> Result<Verdict, VmiError> {
    if !is_started_by(kernel)? {
        return Ok(Verdict::NotHere);
    }
    Ok(match tables(kernel)? {
        Tables::Kept(ranges) => Verdict::CleanBut(ranges),
        Tables::Gone(traces) => Verdict::Traces(traces),
        Tables::Untold(why) => Verdict::Untold(why),
    })
}

/// A kernel that EFI started, forged in the memory of a real guest that a BIOS started.
#[cfg(test)]
mod tests {
    use super::{crc32, regions, table};
    use crate::KernelVa;
    use crate::arch::x86_64::Cr3;
    use crate::arch::x86_64::traces::tests::{of_a_bios, param};
    use crate::kernel::testing::{DIRECT_MAP, Facts, Ram, kernel};
    use crate::owner::traces::tests::{Patch, forged, owner, ram, there, variable, with};
    use crate::{GuestOptions, LinuxGuest, OnInconsistency, Trace, VmiError};
    use sonicshot::{Gpa, GpaRange, GuestBytes, MappedRegions, PageClass, PageSize, Pfn};

    /// The address at which the kernel has the firmware's memory, as Linux places it.
    const MAPPED: u64 = 0xffff_fffe_fea0_0000;
    const MIB: u64 = 1 << 20;

    /// Two free frames beside each other, of which the first lies so far up.
    fn free_frames() -> u64 {
        let memory = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(ram()))]).unwrap();
        let guest = LinuxGuest::open(&memory, &GuestOptions::new()).unwrap();
        let map = guest.classify(OnInconsistency::Refuse).unwrap().map;
        let free = |pfn| map.class(Pfn::new(pfn)) == Some(PageClass::FreeBuddy);
        (0x2000..0x8000)
            .find(|pfn| free(*pfn) && free(*pfn + 1))
            .unwrap()
            << 12
    }

    /// The memory of an EFI guest: the firmware's, one page with the tables, in the first of two
    /// frames, and the kernel's map of it in the second.
    struct Efi {
        at: u64,
        loader: Vec<u8>,
        vendor: &'static str,
        runtime: u64,
        system_runtime: u64,
        /// `GetTime` and all others but one, and that one, `ResetSystem`.
        service: u64,
        reset_system: u64,
        mapped: u64,
        map: Option<u64>,
        /// Written over the page with the tables at last.
        over: Vec<(usize, Vec<u8>)>,
    }

    /// The offsets of the tables and of the vendor's name in their page.
    const SYSTEM: usize = 0x100;
    const RUNTIME: usize = 0x200;
    const VENDOR: usize = 0x300;

    impl Efi {
        fn new() -> Self {
            let runtime = MAPPED + RUNTIME as u64;
            Self {
                at: free_frames(),
                loader: b"EL64".to_vec(),
                vendor: "Debian distribution of EDK II",
                runtime,
                system_runtime: runtime,
                service: MAPPED + 0x800,
                reset_system: MAPPED + 0x900,
                mapped: MAPPED,
                map: None,
                over: vec![],
            }
        }

        fn table(
            page: &mut [u8],
            at: usize,
            signature: &[u8; 8],
            words: &[(usize, u64)],
            len: usize,
        ) {
            let table = &mut page[at..at + len];
            table[..8].copy_from_slice(signature);
            table[8..12].copy_from_slice(&0x0002_0046_u32.to_le_bytes());
            table[12..16].copy_from_slice(&u32::try_from(len).unwrap().to_le_bytes());
            for (at, word) in words {
                table[*at..*at + 8].copy_from_slice(&word.to_le_bytes());
            }
            let crc = crc32(table);
            table[16..20].copy_from_slice(&crc.to_le_bytes());
        }

        fn patches(&self) -> Vec<Patch> {
            let mut page = vec![0; 8192];
            let vendor = self.mapped + VENDOR as u64;
            let system = [(24, vendor), (88, self.system_runtime)];
            Self::table(&mut page, SYSTEM, b"IBI SYST", &system, 120);
            let mut services: Vec<(usize, u64)> =
                (24..136).step_by(8).map(|at| (at, self.service)).collect();
            // SetVirtualAddressMap and ConvertPointer keep their physical addresses.
            for (at, service) in &mut services {
                match at {
                    56 | 64 => *service = 0x0fff_1000,
                    104 => *service = self.reset_system,
                    _ => {}
                }
            }
            Self::table(&mut page, RUNTIME, b"RUNTSERV", &services, 136);
            for (unit, at) in self.vendor.encode_utf16().zip((VENDOR..).step_by(2)) {
                page[at..at + 2].copy_from_slice(&unit.to_le_bytes());
            }
            // Memory that the kernel did not map, and the firmware's.
            let descriptors = [[7, 0, 0, 16, 15, 0], [6, self.at, self.mapped, 1, 0xf, 0]];
            for (word, at) in descriptors.concat().iter().zip((4096..).step_by(8)) {
                page[at..at + 8].copy_from_slice(&word.to_le_bytes());
            }
            for (at, bytes) in &self.over {
                page[*at..*at + bytes.len()].copy_from_slice(bytes);
            }
            let (efi, direct) = with(ram(), |kernel| {
                let efi = |member| {
                    let offset = kernel.need_member("efi", member).unwrap().offset;
                    let at = kernel.need_symbol("efi").unwrap();
                    there(kernel, at.checked_add(offset).unwrap())
                };
                let direct = kernel.need_symbol("page_offset_base").unwrap();
                (
                    ["runtime", "memmap.map", "memmap.nr_map", "memmap.desc_size"].map(efi),
                    kernel.read_u64("page_offset_base", direct).unwrap(),
                )
            });
            let long = |word: u64| word.to_le_bytes().to_vec();
            let [runtime, map, count, size] = efi;
            let system_at = u32::try_from(self.at + SYSTEM as u64).unwrap();
            let signature = param("efi_info.efi_loader_signature");
            let mut patches = vec![
                (self.at, page),
                (signature, self.loader.clone()),
                (
                    param("efi_info.efi_systab"),
                    system_at.to_le_bytes().to_vec(),
                ),
                (count, vec![2]),
                (size, long(48)),
            ];
            for (at, word) in [
                (runtime, self.runtime),
                (map, self.map.unwrap_or(direct + self.at + 4096)),
            ] {
                if word != 0 {
                    patches.push((at, long(word)));
                }
            }
            patches
        }
    }

    #[test]
    fn a_kernel_that_efi_started_bears_no_trace_and_the_firmwares_own_memory_is_in_question() {
        let efi = Efi::new();
        let owner = owner(&efi.patches());
        assert_eq!((owner.traces, owner.untold), (vec![], None));
        let mut made = of_a_bios();
        made.retain(|name| *name != super::super::CLOCK);
        let (at, _) = made
            .iter()
            .enumerate()
            .find(|(_, name)| **name == "firmware tables")
            .unwrap();
        made.insert(at, super::super::EFI);
        assert_eq!(owner.clean, made);
        let range = |start, end| GpaRange::new(Gpa::new(start), Gpa::new(end));
        // The last of its RAM by its /proc/iomem.
        let usable = 0x7fd_a000;
        assert_eq!(
            owner.in_question,
            [
                range(0, MIB),
                range(8 * MIB, 32 * MIB),
                range(usable - 80 * MIB, 128 * MIB)
            ]
        );
    }

    #[test]
    fn free_pages_in_question_are_kept_but_where_a_processor_is_known() {
        let classify = |ram: &[u8], options: &GuestOptions| {
            let memory =
                MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(ram))]).unwrap();
            let guest = LinuxGuest::open(&memory, options).unwrap();
            let pages = guest.classify(OnInconsistency::Refuse).unwrap();
            (pages.map, pages.notes)
        };
        let root = with(ram(), |kernel| {
            there(kernel, kernel.need_symbol("init_top_pgt").unwrap())
        });
        let patches = Efi::new().patches();
        let forged = forged(&patches);
        let (all, _) = classify(&forged, &GuestOptions::new().cr3(Cr3::new(root)));
        let (map, notes) = classify(&forged, &GuestOptions::new());
        let in_question = owner(&patches).in_question;
        let is_free = |class| matches!(class, PageClass::FreeBuddy | PageClass::FreePcp);
        let (mut kept, mut dropped) = (0, 0);
        for pfn in (0..0x8000).map(Pfn::new) {
            let at = pfn.gpa(PageSize::SIZE_4K).unwrap();
            let (was, is) = (all.class(pfn).unwrap(), map.class(pfn).unwrap());
            if is_free(was) && in_question.iter().any(|range| range.contains(at)) {
                assert_eq!(is, PageClass::Unknown, "{at}");
                kept += 1;
            } else {
                assert_eq!(is, was, "{at}");
                dropped += u64::from(is_free(was));
            }
        }
        assert!(kept > 1000 && dropped > 1000, "{kept} {dropped}");
        let note = format!("{kept} free pages are kept: a firmware");
        assert!(
            notes.iter().any(|said| said.to_string().contains(&note)),
            "{notes:?}"
        );
    }

    #[test]
    fn tables_of_a_later_start_of_the_firmware_are_a_trace() {
        let physical = Efi::new().at;
        let cases: Vec<(&str, Efi, &str)> = vec![
            (
                "a new table",
                Efi {
                    service: physical + 0x800,
                    reset_system: physical + 0x900,
                    ..Efi::new()
                },
                "a service at",
            ),
            (
                "the last service",
                Efi {
                    reset_system: physical + 0x900,
                    ..Efi::new()
                },
                "a service at",
            ),
            (
                "a new system table",
                Efi {
                    system_runtime: physical + RUNTIME as u64,
                    ..Efi::new()
                },
                "points to runtime services at",
            ),
            (
                "no system table",
                Efi {
                    over: vec![(SYSTEM, vec![0; 8])],
                    ..Efi::new()
                },
                "is not there",
            ),
            (
                "no services",
                Efi {
                    over: vec![(RUNTIME, b"XXXXXXXX".to_vec())],
                    ..Efi::new()
                },
                "is not there",
            ),
            (
                "services that are no whole table",
                Efi {
                    over: vec![(RUNTIME + 56, vec![7])],
                    ..Efi::new()
                },
                "its checksum",
            ),
            (
                "a system table that is none",
                Efi {
                    over: vec![(SYSTEM + 40, vec![7])],
                    ..Efi::new()
                },
                "its checksum",
            ),
            (
                "a table without a length",
                Efi {
                    over: vec![(SYSTEM + 12, vec![0; 4])],
                    ..Efi::new()
                },
                "its length",
            ),
        ];
        for (name, efi, said) in cases {
            let owner = owner(&efi.patches());
            let [trace @ Trace::Firmware { .. }] = &owner.traces[..] else {
                panic!("{name}: {owner:?}");
            };
            assert!(trace.to_string().contains(said), "{name}: {trace}");
        }
    }

    #[test]
    fn a_firmware_that_would_leave_no_trace_refuses_the_kernel() {
        let physical = Efi::new().at;
        let cases: Vec<(&str, Efi, &str)> = vec![
            (
                "no addresses of the kernel's",
                Efi {
                    runtime: physical + RUNTIME as u64,
                    ..Efi::new()
                },
                "runtime services are off",
            ),
            (
                "no services",
                Efi {
                    runtime: 0,
                    ..Efi::new()
                },
                "runtime services are off",
            ),
            (
                "no map",
                Efi {
                    map: Some(0),
                    ..Efi::new()
                },
                "runtime services are off",
            ),
            (
                "another firmware",
                Efi {
                    vendor: "Phoenix",
                    ..Efi::new()
                },
                "Phoenix",
            ),
        ];
        for (name, efi, said) in cases {
            let ram = forged(&efi.patches());
            let memory =
                MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(&ram))]).unwrap();
            let guest = LinuxGuest::open(&memory, &GuestOptions::new()).unwrap();
            let error = guest.classify(OnInconsistency::Refuse).unwrap_err();
            assert!(
                matches!(error, VmiError::OwnerUntold { .. }),
                "{name}: {error}"
            );
            assert!(error.to_string().contains(said), "{name}: {error}");
            let kept = guest.classify(OnInconsistency::KeepInQuestion).unwrap();
            assert!(
                kept.notes
                    .iter()
                    .any(|note| note.to_string().contains(said)),
                "{name}"
            );
            let root = variable("init_top_pgt");
            let options = GuestOptions::new().cr3(Cr3::new(root));
            let guest = LinuxGuest::open(&memory, &options).unwrap();
            guest.classify(OnInconsistency::Refuse).unwrap();
        }
    }

    #[test]
    fn the_checksum_is_that_of_ieee() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
        assert_eq!(crc32(b""), 0);
    }

    #[test]
    fn a_map_has_no_more_regions_and_no_longer_ones_than_any() {
        const MAP: u64 = 0x10_0000;
        for (count, size, what) in [
            (1 << 16, 40, None),
            ((1 << 16) + 1, 40, Some("efi.memmap.nr_map")),
            (2, 4096, None),
            (2, 4097, Some("efi.memmap.desc_size")),
            (2, 39, Some("efi.memmap.desc_size")),
        ] {
            let mut ram = Ram::new(8 << 20);
            ram.put(0x1000, DIRECT_MAP + MAP);
            ram.put(0x1008, count);
            ram.put(0x1010, size);
            let memory = ram.memory();
            let kernel = kernel(&memory, Facts::default());
            let place = |member: &'static str| {
                let places = ["memmap.map", "memmap.nr_map", "memmap.desc_size"];
                let number = places.iter().position(|place| *place == member).unwrap();
                Ok(KernelVa::new(DIRECT_MAP + 0x1000 + number as u64 * 8))
            };
            let found = regions(&kernel, &place);
            let refused = match &found {
                Err(VmiError::Corrupt { what, .. }) => Some(*what),
                _ => None,
            };
            assert_eq!(refused, what, "{count} of {size}");
            assert_eq!(found.is_ok(), what.is_none());
        }
    }

    #[test]
    fn a_table_is_no_longer_than_any() {
        for (len, is_read) in [(24, true), (4096, true), (4097, false)] {
            let mut ram = Ram::new(8 << 20);
            let page = &mut ram.0[0x1000..0x3000];
            Efi::table(page, 0, b"IBI SYST", &[], len);
            let memory = ram.memory();
            let found = table(
                &kernel(&memory, Facts::default()),
                Gpa::new(0x1000),
                *b"IBI SYST",
            );
            let found = found.unwrap();
            assert_eq!(found.is_ok(), is_read, "{len}");
            if let Err(what) = found {
                assert!(what.contains("its length is 4097"), "{what}");
            }
        }
    }
}
