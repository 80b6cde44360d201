//! The names that are read of a kernel: every symbol, structure, member and constant, each in one place, with
//! the names that it has had.
//!
//! The symbols that kallsyms looks up in one pass are those of this table, and the source files
//! whose DWARF is read are the ones that it names. Nothing else is asked for (a build with debug
//! assertions checks that). `testdata/kernels` has what real kernels answer: a row that some
//! kernel's BTF and symbol table contradict fails there, not at a user's; so does one that none of
//! them has, unless the tests name the kernels that do.

/// The kernels that have something. A commit is of Linus Torvalds' tree; distributions backport, so a
/// version decides nothing but what the test expects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kernels {
    /// Every kernel since 4.18.
    All,
    /// Since this release.
    Since(u32, u32),
    /// Before this release.
    Before(u32, u32),
    /// From the first release on, and no more in the second.
    Between((u32, u32), (u32, u32)),
    /// Those that are configured so.
    Config(&'static str),
    /// VMCOREINFO tells it, and nothing else on x86-64.
    Vmcoreinfo,
}

use Kernels::{All, Before, Between, Config, Since, Vmcoreinfo};

/// A variable or function.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Symbol {
    pub name: &'static str,
    pub kernels: Kernels,
}

/// A structure, and what is read of it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Structure {
    pub name: &'static str,
    #[cfg_attr(
        not(test),
        allow(dead_code, reason = "real kernels are held against it")
    )]
    pub kernels: Kernels,
    /// A source file that uses all of it, so that its DWARF has it.
    pub unit: &'static str,
    pub members: &'static [Member],
}

/// A member of a structure; the path may lead through other structures.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Member {
    pub path: &'static str,
    #[cfg_attr(
        not(test),
        allow(dead_code, reason = "real kernels are held against it")
    )]
    pub kernels: Kernels,
}

/// An enumerator; VMCOREINFO has some macros among its numbers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Constant {
    pub name: &'static str,
    #[cfg_attr(
        not(test),
        allow(dead_code, reason = "real kernels are held against it")
    )]
    pub kernels: Kernels,
}

const fn symbol(name: &'static str, kernels: Kernels) -> Symbol {
    Symbol { name, kernels }
}

const fn structure(
    name: &'static str,
    kernels: Kernels,
    unit: &'static str,
    members: &'static [Member],
) -> Structure {
    Structure {
        name,
        kernels,
        unit,
        members,
    }
}

const fn member(path: &'static str, kernels: Kernels) -> Member {
    Member { path, kernels }
}

const fn constant(name: &'static str, kernels: Kernels) -> Constant {
    Constant { name, kernels }
}

/// Every symbol.
pub(crate) const SYMBOLS: &[Symbol] = &[
    // The kernel itself.
    symbol("_stext", All),
    symbol("init_uts_ns", All),
    symbol("linux_banner", All),
    symbol("__start_notes", All),
    symbol("__stop_notes", All),
    symbol("vmcoreinfo_data", Config("VMCORE_INFO")),
    symbol("swapper_pg_dir", Vmcoreinfo),
    symbol("__start_BTF", Config("DEBUG_INFO_BTF")),
    symbol("__stop_BTF", Config("DEBUG_INFO_BTF")),
    // Where memory is.
    symbol("page_offset_base", Config("RANDOMIZE_MEMORY")),
    symbol("vmemmap_base", Config("RANDOMIZE_MEMORY")),
    symbol("vmemmap", Vmcoreinfo),
    symbol("e820_table", All),
    symbol("e820_table_firmware", All),
    symbol("iomem_resource", All),
    // Struct pages and sections.
    symbol("mem_section", Config("SPARSEMEM")),
    symbol("__highest_present_section_nr", Config("SPARSEMEM")),
    symbol("mem_map", Config("FLATMEM")),
    symbol("max_mapnr", Config("FLATMEM")),
    symbol("memory_blocks", Since(5, 8)), // 4fb6eabf1037
    symbol("sections_per_block", Config("MEMORY_HOTPLUG")),
    // Nodes and zones.
    symbol("contig_page_data", Config("!NUMA")),
    symbol("node_data", Config("NUMA")),
    symbol("nr_node_ids", Config("NUMA")),
    // Processors.
    symbol("__cpu_online_mask", All),
    symbol("__cpu_possible_mask", All),
    symbol("__per_cpu_offset", Config("SMP")),
    symbol("nr_cpu_ids", Config("SMP")),
    symbol("this_cpu_off", All),
    // Members of `pcpu_hot` from 6.2 to 6.14.
    symbol("cpu_number", Config("SMP, not in pcpu_hot")),
    symbol("current_task", Config("not in pcpu_hot")),
    symbol("pcpu_hot", Between((6, 2), (6, 15))),
    symbol("__entry_text_start", All),
    symbol("entry_SYSCALL_64", All),
    // What free pages read as.
    symbol("_debug_pagealloc_enabled", Config("DEBUG_PAGEALLOC")),
    symbol("_page_poisoning_enabled", Config("PAGE_POISONING")), // since 5.11, 8db26a3d4735
    symbol("want_page_poisoning", Config("PAGE_POISONING")),     // before
    symbol("init_on_free", Since(5, 3)),                         // 6471384af2a6
    symbol("kasan_flag_enabled", Config("KASAN_HW_TAGS")),
    // Whether the kernel has gone.
    symbol("init_task", All),
    symbol("system_state", All),
    symbol("kexec_in_progress", Config("KEXEC_CORE")),
    symbol("panic_cpu", All),
    symbol("crashing_cpu", All),
    symbol("boot_params", All),
    symbol("x86_platform", All),
    symbol("mach_get_cmos_time", All),
    symbol("kvm_get_wallclock", Config("KVM_GUEST")),
    symbol("anon_inode_inode", All),
    symbol("timekeeping_suspend_time", All),
    symbol("tk_core", Before(6, 17)),
    symbol("timekeeper_data", Since(6, 17)),
    symbol("efi", Config("EFI")),
    symbol("acpi_gbl_root_table_list", Config("ACPI")),
    symbol("real_mode_header", All),
    symbol("init_top_pgt", All),
    symbol("trampoline_pgd_entry", Since(4, 18)),
];

/// Every structure. Those of one kind stand together.
pub(crate) const STRUCTURES: &[Structure] = &[
    structure(
        "page",
        All,
        "mm/page_alloc.c",
        &[
            member("flags", All),
            member("lru", All),
            member("buddy_list", Since(5, 19)), // bf75f200569d
            member("pcp_list", Since(5, 19)),
            member("mapping", All),
            member("private", All),
            member("index", Before(6, 16)),
            member("__folio_index", Since(6, 16)), // acc53a0b4c15
            member("_mapcount", All),
            member("page_type", All),
            member("_refcount", All),
            member("compound_head", Before(7, 1)),
            member("compound_info", Since(7, 1)), // d50569612c29
            member("compound_dtor", Before(6, 3)),
        ],
    ),
    structure(
        "folio",
        Since(5, 16), // 7b230db3b8d3
        "mm/page_alloc.c",
        &[
            member("_flags_1", Since(5, 18)),
            member("_folio_dtor", Between((6, 0), (6, 6))),
        ],
    ),
    structure("address_space", All, "mm/filemap.c", &[member("host", All)]),
    structure(
        "buffer_head",
        Config("BUFFER_HEAD"),
        "fs/buffer.c",
        &[member("b_state", All), member("b_this_page", All)],
    ),
    structure(
        "mem_section",
        Config("SPARSEMEM"),
        "mm/sparse.c",
        &[
            member("section_mem_map", All),
            member("usage", Since(5, 3)), // 326e1b8f83a4
        ],
    ),
    structure(
        "mem_section_usage",
        Since(5, 3),
        "mm/sparse.c",
        &[member("subsection_map", Config("SPARSEMEM_VMEMMAP"))],
    ),
    structure(
        "pglist_data",
        All,
        "mm/page_alloc.c",
        &[
            member("node_zones", All),
            member("node_start_pfn", All),
            member("node_spanned_pages", All),
            member("node_present_pages", All),
            member("node_mem_map", Config("FLATMEM")),
            member("first_deferred_pfn", Config("DEFERRED_STRUCT_PAGE_INIT")),
        ],
    ),
    structure(
        "zone",
        All,
        "mm/page_alloc.c",
        &[
            member("free_area", All),
            member("zone_start_pfn", All),
            member("spanned_pages", All),
            member("present_pages", All),
            member("name", All),
            member("vm_stat", All),
            member("per_cpu_pageset", Since(5, 14)), // 28f836b6777b
            member("per_cpu_zonestats", Since(5, 14)),
            member("pageset", Before(5, 14)),
        ],
    ),
    structure(
        "free_area",
        All,
        "mm/page_alloc.c",
        &[member("free_list", All), member("nr_free", All)],
    ),
    structure(
        "per_cpu_pages",
        All,
        "mm/page_alloc.c",
        &[member("count", All), member("lists", All)],
    ),
    structure(
        "per_cpu_pageset",
        Before(5, 14),
        "mm/vmstat.c",
        &[
            member("pcp", Before(5, 14)),
            member("vm_stat_diff", Before(5, 14)),
        ],
    ),
    structure(
        "per_cpu_zonestat",
        Since(5, 14),
        "mm/vmstat.c",
        &[member("vm_stat_diff", Since(5, 14))],
    ),
    structure(
        "memory_block",
        Config("MEMORY_HOTPLUG"),
        "drivers/base/memory.c",
        &[member("start_section_nr", All), member("state", All)],
    ),
    structure(
        "xarray",
        Since(4, 20), // f8d5d0cc145c
        "drivers/base/memory.c",
        &[member("xa_head", Since(4, 20))],
    ),
    structure(
        "xa_node",
        Since(4, 20), // 01959dfe771c
        "drivers/base/memory.c",
        &[member("shift", Since(4, 20)), member("slots", Since(4, 20))],
    ),
    structure(
        "e820_table",
        All,
        "arch/x86/kernel/e820.c",
        &[member("nr_entries", All), member("entries", All)],
    ),
    structure(
        "e820_entry",
        All,
        "arch/x86/kernel/e820.c",
        &[
            member("addr", All),
            member("size", All),
            member("type", All),
        ],
    ),
    structure(
        "resource",
        All,
        "arch/x86/kernel/e820.c",
        &[
            member("start", All),
            member("end", All),
            member("name", All),
            member("child", All),
            member("sibling", All),
        ],
    ),
    structure(
        "boot_params",
        All,
        "arch/x86/kernel/e820.c",
        &[
            member("hdr.type_of_loader", All),
            member("efi_info.efi_loader_signature", All),
            member("efi_info.efi_systab", All),
            member("efi_info.efi_systab_hi", All),
            member("acpi_rsdp_addr", Since(5, 0)),
        ],
    ),
    structure(
        "task_struct",
        All,
        "mm/page_alloc.c",
        &[
            member("tasks", All),
            member("stack", All),
            member("on_cpu", Config("SMP")),
            // In `thread_info` since 5.16 (bcf9033e5449).
            member("cpu", Before(5, 16)),
            member("thread_info.cpu", Since(5, 16)),
        ],
    ),
    structure(
        "pcpu_hot",
        Between((6, 2), (6, 15)),
        "mm/page_alloc.c",
        &[
            member("current_task", Between((6, 2), (6, 15))),
            member("cpu_number", Between((6, 2), (6, 15))),
        ],
    ),
    structure(
        "inode",
        All,
        "fs/anon_inodes.c",
        &[
            member("i_sb", All),
            member("i_size", All),
            // Since 6.11 (3aa63a569c64), since 6.6 or 6.7 (13bc24457850, 12cd44023651), and before.
            member("i_atime_sec", Since(6, 11)),
            member("i_mtime_sec", Since(6, 11)),
            member("i_ctime_sec", Since(6, 11)),
            member("__i_atime.tv_sec", Between((6, 7), (6, 11))),
            member("__i_mtime.tv_sec", Between((6, 7), (6, 11))),
            member("__i_ctime.tv_sec", Between((6, 6), (6, 11))),
            member("i_atime.tv_sec", Before(6, 7)),
            member("i_mtime.tv_sec", Before(6, 7)),
            member("i_ctime.tv_sec", Before(6, 6)),
        ],
    ),
    structure(
        "super_block",
        All,
        "fs/anon_inodes.c",
        &[member("s_magic", All)],
    ),
    structure(
        "timekeeper",
        All,
        "kernel/time/timekeeping.c",
        &[member("offs_boot", All)],
    ),
    structure(
        "tk_data",
        Since(6, 13),
        "kernel/time/timekeeping.c",
        &[member("timekeeper", Since(6, 13))],
    ),
    structure(
        "x86_platform_ops",
        All,
        "arch/x86/kernel/x86_init.c",
        &[member("get_wallclock", All)],
    ),
    structure(
        "efi",
        Config("EFI"),
        "arch/x86/platform/efi/efi.c",
        &[
            member("runtime", All),
            member("memmap.map", All),
            member("memmap.nr_map", All),
            member("memmap.desc_size", All),
        ],
    ),
    structure(
        "acpi_table_list",
        Config("ACPI"),
        "drivers/acpi/acpica/tbdata.c",
        &[member("tables", All), member("current_table_count", All)],
    ),
    structure(
        "acpi_table_desc",
        Config("ACPI"),
        "drivers/acpi/acpica/tbdata.c",
        &[
            member("address", All),
            member("signature", All),
            member("length", All),
            member("flags", All),
        ],
    ),
    structure(
        "real_mode_header",
        All,
        "arch/x86/realmode/init.c",
        &[
            member("text_start", All),
            member("ro_end", All),
            member("trampoline_pgd", All),
        ],
    ),
];

/// Source files in which constants are, beside those of the structures.
const CONSTANT_UNITS: [&str; 3] = ["mm/mm_init.c", "mm/hugetlb.c", "fs/proc/page.c"];

/// Every constant.
pub(crate) const CONSTANTS: &[Constant] = &[
    constant("SECTION_SIZE_BITS", Vmcoreinfo),
    constant("MAX_PHYSMEM_BITS", Vmcoreinfo),
    constant("SECTION_HAS_MEM_MAP_BIT", Since(6, 0)), // ed7802dd48f7
    constant("SECTION_IS_ONLINE_BIT", Since(6, 0)),
    constant("SECTION_IS_EARLY_BIT", Since(6, 0)),
    constant("NR_FREE_PAGES", All),
    constant("NR_UNACCEPTED", Config("UNACCEPTED_MEMORY")),
    constant("MIGRATE_PCPTYPES", All),
    constant("MIGRATE_ISOLATE", Config("MEMORY_ISOLATION")),
    constant("MEM_OFFLINE", Since(6, 12)), // a macro before, of another value
    // Flags of `page.flags`.
    constant("__NR_PAGEFLAGS", All),
    constant("PG_locked", All),
    constant("PG_writeback", All),
    constant("PG_uptodate", All),
    constant("PG_dirty", All),
    constant("PG_lru", All),
    constant("PG_head", All),
    constant("PG_private", All),
    constant("PG_private_2", All),
    constant("PG_reserved", All),
    constant("PG_swapbacked", All),
    constant("PG_slab", Before(6, 10)), // 46df8e73a4a3
    constant("PG_hwpoison", Config("MEMORY_FAILURE")),
    constant("PG_hugetlb", Between((6, 6), (6, 10))),
    constant("PG_head_mask", Vmcoreinfo),
    // The state of a buffer.
    constant("BH_Uptodate", Config("BUFFER_HEAD")),
    constant("BH_Req", Config("BUFFER_HEAD")),
    constant("BH_Mapped", Config("BUFFER_HEAD")),
    // Page types: since 6.12 (4ffca5a96678) the top byte, and macros before.
    constant("PGTY_buddy", Since(6, 12)),
    constant("PGTY_offline", Since(6, 12)),
    constant("PGTY_table", Since(6, 12)),
    constant("PGTY_slab", Since(6, 12)),
    constant("PGTY_hugetlb", Since(6, 12)),
    constant("PGTY_unaccepted", Since(6, 12)),
    constant("PAGE_BUDDY_MAPCOUNT_VALUE", Vmcoreinfo),
    constant("PAGE_OFFLINE_MAPCOUNT_VALUE", Vmcoreinfo),
    constant("PAGE_TABLE_MAPCOUNT_VALUE", Vmcoreinfo),
    constant("PAGE_SLAB_MAPCOUNT_VALUE", Vmcoreinfo),
    constant("PAGE_HUGETLB_MAPCOUNT_VALUE", Vmcoreinfo),
    constant("PAGE_UNACCEPTED_MAPCOUNT_VALUE", Vmcoreinfo),
    constant("HUGETLB_PAGE_DTOR", Before(6, 6)),
    // `enum system_states`.
    constant("SYSTEM_BOOTING", All),
    constant("SYSTEM_SCHEDULING", All),
    constant("SYSTEM_FREEING_INITMEM", Since(5, 14)),
    constant("SYSTEM_RUNNING", All),
    constant("SYSTEM_HALT", All),
    constant("SYSTEM_POWER_OFF", All),
    constant("SYSTEM_RESTART", All),
    constant("SYSTEM_SUSPEND", All),
];

/// The names of all symbols that a table of the kernel's own may have.
pub(crate) fn symbol_names() -> impl Iterator<Item = &'static str> {
    SYMBOLS
        .iter()
        .filter(|symbol| symbol.kernels != Vmcoreinfo)
        .map(|symbol| symbol.name)
}

/// The source files whose DWARF has all structures and constants, each once.
pub(crate) fn units() -> Vec<&'static str> {
    let mut units: Vec<&str> = Vec::new();
    let structures = STRUCTURES.iter().map(|structure| structure.unit);
    for unit in structures.chain(CONSTANT_UNITS) {
        if !units.contains(&unit) {
            units.push(unit);
        }
    }
    units
}

/// Whether the table has symbol `name`.
pub(crate) fn has_symbol(name: &str) -> bool {
    SYMBOLS.iter().any(|symbol| symbol.name == name)
}

/// Whether the table has structure `name`.
pub(crate) fn has_structure(name: &str) -> bool {
    STRUCTURES.iter().any(|structure| structure.name == name)
}

/// Whether the table has member `path` of structure `name`.
pub(crate) fn has_member(name: &str, path: &str) -> bool {
    let mut structures = STRUCTURES.iter();
    structures
        .find(|structure| structure.name == name)
        .is_some_and(|structure| structure.members.iter().any(|member| member.path == path))
}

/// Whether the table has constant `name`.
pub(crate) fn has_constant(name: &str) -> bool {
    CONSTANTS.iter().any(|constant| constant.name == name)
}

#[cfg(test)]
mod tests {
    use super::{CONSTANTS, Kernels, STRUCTURES, SYMBOLS};
    use crate::symbols::open_symbol_file;
    use std::collections::{HashMap, HashSet};
    use std::fmt::Write;
    use std::path::{Path, PathBuf};

    /// The note on a row that VMCOREINFO tells.
    const IN_VMCOREINFO: &str = "in VMCOREINFO";

    /// The rows that no kernel in `testdata/kernels` has, and where they are instead.
    const ELSEWHERE: &[(&str, &str)] = &[
        ("symbol vmemmap", "arm64's VMCOREINFO, since 6.12"),
        ("symbol mem_map", "FLATMEM: mm/memory.c"),
        ("symbol max_mapnr", "FLATMEM: mm/memory.c"),
        ("symbol contig_page_data", "without NUMA: mm/memblock.c"),
        (
            "symbol _debug_pagealloc_enabled",
            "DEBUG_PAGEALLOC: mm/page_alloc.c, since 6.5 mm/debug_page_alloc.c",
        ),
        (
            "symbol _page_poisoning_enabled",
            "PAGE_POISONING: mm/page_poison.c, since 5.11",
        ),
        (
            "symbol want_page_poisoning",
            "PAGE_POISONING: mm/page_poison.c, to 5.10",
        ),
        (
            "symbol kasan_flag_enabled",
            "KASAN_HW_TAGS of arm64, since 5.11",
        ),
        (
            "member pglist_data.node_mem_map",
            "FLATMEM: include/linux/mmzone.h",
        ),
        ("member inode.__i_atime.tv_sec", "6.7 to 6.10"),
        ("member inode.__i_mtime.tv_sec", "6.7 to 6.10"),
        ("member inode.__i_ctime.tv_sec", "6.6 to 6.10"),
        ("constant PG_hugetlb", "6.6 to 6.8, until d99e3140a4d3"),
        (
            "constant PAGE_TABLE_MAPCOUNT_VALUE",
            "no VMCOREINFO so far: all types of pages are asked for by such a name",
        ),
    ];

    /// A row of the table: as it stands in a kernel's file, and which kernels have it.
    fn rows() -> Vec<(String, Kernels)> {
        let mut rows = Vec::new();
        for symbol in SYMBOLS {
            rows.push((format!("symbol {}", symbol.name), symbol.kernels));
        }
        for structure in STRUCTURES {
            rows.push((format!("struct {}", structure.name), structure.kernels));
            for member in structure.members {
                // A member is there only with its structure.
                let kernels = match (structure.kernels, member.kernels) {
                    (structure @ Kernels::Config(_), _) | (structure, Kernels::All) => structure,
                    (_, member) => member,
                };
                let name = format!("member {}.{}", structure.name, member.path);
                rows.push((name, kernels));
            }
        }
        for constant in CONSTANTS {
            rows.push((format!("constant {}", constant.name), constant.kernels));
        }
        rows
    }

    fn folder() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/kernels")
    }

    /// The note on each row; `None` if the kernel does not have it.
    type Answers = HashMap<String, Option<String>>;

    /// The kernels by their file: release, and answers.
    fn kernels() -> Vec<((u32, u32), Answers)> {
        let mut kernels = Vec::new();
        for entry in std::fs::read_dir(folder()).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_none_or(|ext| ext != "txt") {
                continue;
            }
            let name = path.file_stem().unwrap().to_str().unwrap();
            let (major, minor) = name.split_once('.').unwrap();
            let release = (major.parse().unwrap(), minor.parse().unwrap());
            let text = std::fs::read_to_string(&path).unwrap();
            let lines = text.lines().filter(|line| !line.starts_with('#'));
            let rows = lines.map(|line| {
                let (row, said) = line.split_once(": ").unwrap();
                (row.to_owned(), (said != "no").then(|| said.to_owned()))
            });
            kernels.push((release, rows.collect()));
        }
        assert!(kernels.len() >= 4, "the files of the kernels are gone");
        kernels
    }

    #[test]
    fn no_row_stands_twice() {
        let mut seen = HashSet::new();
        for (row, _) in rows() {
            assert!(seen.insert(row.clone()), "{row}");
        }
    }

    #[test]
    fn every_kernel_has_what_the_table_says() {
        for (release, answers) in kernels() {
            for (row, kernels) in rows() {
                let answer = answers.get(&row).unwrap_or_else(|| {
                    panic!(
                        "testdata/kernels knows nothing of `{row}` in {release:?}: see its README"
                    )
                });
                let expected = match kernels {
                    Kernels::All => true,
                    Kernels::Since(major, minor) => release >= (major, minor),
                    Kernels::Before(major, minor) => release < (major, minor),
                    Kernels::Between(from, to) => (from..to).contains(&release),
                    // These are held against all kernels together.
                    Kernels::Config(_) => continue,
                    Kernels::Vmcoreinfo => {
                        let told = answer.as_deref().is_none_or(|said| said == IN_VMCOREINFO);
                        assert!(told, "{row} in {release:?}: {answer:?}");
                        continue;
                    }
                };
                assert_eq!(
                    answer.is_some(),
                    expected,
                    "{row} in {release:?}: {answer:?}"
                );
            }
            assert_eq!(
                answers.len(),
                rows().len(),
                "rows that nobody asks for in {release:?}"
            );
        }
    }

    /// A name that is not spelt as any kernel spells it is found in none.
    #[test]
    fn every_row_is_found_in_some_kernel() {
        let kernels = kernels();
        let elsewhere: HashMap<&str, &str> = ELSEWHERE.iter().copied().collect();
        assert_eq!(elsewhere.len(), ELSEWHERE.len());
        let mut rest: HashSet<&str> = elsewhere.keys().copied().collect();
        for (row, _) in rows() {
            let found = kernels
                .iter()
                .any(|(_, answers)| answers.get(&row).is_some_and(Option::is_some));
            let named = rest.remove(row.as_str());
            assert!(
                found != named,
                "`{row}` is found in testdata/kernels: {found}; in the list of what is elsewhere: \
                 {named}"
            );
        }
        assert!(rest.is_empty(), "no rows of the table: {rest:?}");
    }

    /// The answers of a kernel's own symbol table and BTF to each row; for rows that only VMCOREINFO
    /// tells, the names that the kernel writes there.
    fn ask(folder: &Path) -> String {
        let symbols = open_symbol_file(&folder.join("System.map")).unwrap();
        let types = open_symbol_file(&folder.join("btf")).unwrap();
        let names = std::fs::read_to_string(folder.join("names")).unwrap();
        let names: HashSet<&str> = names.lines().collect();
        let in_vmcoreinfo = |kernels, name: &str| {
            (kernels == Kernels::Vmcoreinfo && names.contains(name)).then(|| IN_VMCOREINFO.into())
        };
        let mut text = String::new();
        let mut line = |row: String, said: Option<String>| {
            writeln!(text, "{row}: {}", said.unwrap_or_else(|| "no".into())).unwrap();
        };
        for symbol in SYMBOLS {
            let there = symbols.symbol(symbol.name).unwrap();
            line(
                format!("symbol {}", symbol.name),
                there
                    .map(|_| "yes".into())
                    .or_else(|| in_vmcoreinfo(symbol.kernels, symbol.name)),
            );
        }
        for structure in STRUCTURES {
            let size = types.type_size(structure.name).unwrap();
            line(
                format!("struct {}", structure.name),
                size.map(|size| format!("{size} bytes")),
            );
            for member in structure.members {
                let there = types.member(structure.name, member.path).unwrap();
                let said = there.map(|there| match there.len {
                    Some(len) => format!("at {}, {len} elements", there.offset),
                    None => format!("at {}", there.offset),
                });
                line(format!("member {}.{}", structure.name, member.path), said);
            }
        }
        for constant in CONSTANTS {
            let value = types.constant(constant.name).unwrap();
            line(
                format!("constant {}", constant.name),
                value
                    .map(|value| value.to_string())
                    .or_else(|| in_vmcoreinfo(constant.kernels, constant.name)),
            );
        }
        text
    }

    /// Whether this machine has the lab's kernels, and the tool that reads their symbols.
    fn can_extract() -> bool {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let mut folders = std::env::split_paths(&path);
        let has_tool = folders.any(|folder| folder.join("kallsyms-finder").exists());
        let lab = std::env::var_os("SONICSHOT_LAB_DIR").map_or_else(
            || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/lab"),
            PathBuf::from,
        );
        let kernels = std::fs::read_dir(lab.join("kernels"));
        let mut kernels = kernels.into_iter().flatten().flatten();
        has_tool && kernels.any(|kernel| kernel.path().join("vmlinuz").exists())
    }

    /// The files are what the kernels say: `SONICSHOT_KERNELS` names a folder with a folder for each
    /// kernel, in it what `testdata/kernels/extract.py` takes out of it. With `SONICSHOT_BLESS=1`
    /// the files are written.
    #[test]
    fn the_files_are_of_the_kernels() {
        let Some(kernels) = std::env::var_os("SONICSHOT_KERNELS") else {
            // Nowhere to be made, or forgotten.
            let what = "a folder in SONICSHOT_KERNELS (testdata/kernels/README.md)";
            if can_extract() {
                let _ = sonicshot_testkit::has(what, false);
            } else {
                eprintln!("skipped: neither {what}, nor what makes one");
            }
            return;
        };
        let mut seen = 0;
        for entry in std::fs::read_dir(kernels).unwrap() {
            let from = entry.unwrap().path();
            if !from.join("btf").exists() {
                continue;
            }
            seen += 1;
            let name = from.file_name().unwrap().to_str().unwrap();
            let path = folder().join(format!("{name}.txt"));
            let said = ask(&from);
            if std::env::var_os("SONICSHOT_BLESS").is_some() {
                std::fs::write(&path, &said).unwrap();
            }
            assert_eq!(std::fs::read_to_string(&path).unwrap(), said, "{name}");
        }
        assert!(seen > 0, "no kernel in SONICSHOT_KERNELS");
    }
}
