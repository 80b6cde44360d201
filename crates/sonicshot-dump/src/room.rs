//! The memory that this machine has left for a copy of a guest.
//!
//! A copy for which there is no room has the system kill somebody, who may well be the guest's QEMU.

use std::fs;
use std::path::{Path, PathBuf};

/// The bytes of memory that this process can take before the system (`MemAvailable`), or the limit of a
/// cgroup (version 2) that it is in, has to take them from somebody: the least of what each of them
/// says, `None` if none does.
#[must_use]
pub fn available_memory() -> Option<u64> {
    let system = fs::read_to_string("/proc/meminfo").ok();
    let system = system.and_then(|text| of_system(&text));
    let own = fs::read_to_string("/proc/self/cgroup").ok();
    let own = own.and_then(|text| of_cgroups(Path::new("/sys/fs/cgroup"), &text));
    system.into_iter().chain(own).min()
}

/// `MemAvailable` of `/proc/meminfo`, which is in KiB.
fn of_system(text: &str) -> Option<u64> {
    let rest = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = rest.trim().strip_suffix("kB")?.trim_end().parse().ok()?;
    kib.checked_mul(1024)
}

/// The least room below the limits of the process's cgroup and of all that it is in. `text` is
/// `/proc/self/cgroup`, `root` where the tree is.
fn of_cgroups(root: &Path, text: &str) -> Option<u64> {
    let own = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    // In a namespace of its own a process may be told a place above its root.
    let own: PathBuf = Path::new(own)
        .components()
        .filter(|part| matches!(part, std::path::Component::Normal(_)))
        .collect();
    own.ancestors()
        .filter_map(|part| of_cgroup(&root.join(part)))
        .min()
}

/// The rest of the limit of one cgroup, if it has one: memory that it uses can be given back as far as
/// it is page cache that nobody has used for long.
fn of_cgroup(folder: &Path) -> Option<u64> {
    let number = |name: &str| -> Option<u64> {
        let text = fs::read_to_string(folder.join(name)).ok()?;
        text.trim().parse().ok()
    };
    let (limit, used) = (number("memory.max")?, number("memory.current")?);
    let stat = fs::read_to_string(folder.join("memory.stat")).ok()?;
    let old = stat
        .lines()
        .find_map(|line| line.strip_prefix("inactive_file "));
    let old: u64 = old?.trim().parse().ok()?;
    // They are read one after the other, and old cache may have come in between.
    let used = used.max(old).checked_sub(old)?;
    // One that is above its limit has no room.
    limit.max(used).checked_sub(used)
}

#[cfg(test)]
mod tests {
    use super::{available_memory, of_cgroups, of_system};
    use std::fs;

    #[test]
    fn the_system_is_asked() {
        let text = "MemTotal:  100 kB\nMemAvailable:    2048 kB\nBuffers: 1 kB\n";
        assert_eq!(of_system(text), Some(2 << 20));
        for wrong in ["", "MemAvailable: 12\n", "MemAvailable: x kB\n"] {
            assert_eq!(of_system(wrong), None, "{wrong}");
        }
        assert_eq!(of_system(&format!("MemAvailable: {} kB\n", u64::MAX)), None);
        // This machine has some.
        assert!(available_memory().unwrap() > 1 << 20);
    }

    #[test]
    fn the_least_limit_of_all_cgroups_counts() {
        let root = tempfile::tempdir().unwrap();
        let group = |path: &str, max: &str, current: u64, inactive: u64| {
            let folder = root.path().join(path);
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("memory.max"), format!("{max}\n")).unwrap();
            fs::write(folder.join("memory.current"), format!("{current}\n")).unwrap();
            let stat = format!("anon 5\nfile 7\ninactive_file {inactive}\nactive_file 3\n");
            fs::write(folder.join("memory.stat"), stat).unwrap();
        };
        group("a", "1000", 400, 100);
        group("a/b", "max", 300, 0);
        let room = |text| of_cgroups(root.path(), text);
        assert_eq!(room("0::/a/b\n"), Some(700));
        assert_eq!(room("1:memory:/x\n0::/../a\n"), Some(700));
        group("a/b", "350", 300, 10);
        assert_eq!(room("0::/a/b\n"), Some(60));
        // Above its limit.
        group("a/b", "200", 300, 10);
        assert_eq!(room("0::/a/b\n"), Some(0));
        // None has a limit, or there is no such tree.
        assert_eq!(room("0::/\n"), None);
        assert_eq!(room("1:memory:/a\n"), None);
        assert_eq!(room("0::/c\n"), None);
    }
}
