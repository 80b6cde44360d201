//! The owner of an output, and who may do what with it.

use crate::common::qemu::{Block, stream};
use crate::common::replacing;
use crate::common::*;
use rustix::fs::{MemfdFlags, XattrFlags, fsetxattr, memfd_create};
use rustix::process::geteuid;
use sonicshot::Architecture;
use sonicshot::checkpoint::{
    CheckpointInfo, CheckpointReader, CheckpointWriter, RestoreOptions, SaveOptions,
};
use sonicshot::{GuestMemory, PageMap, PageSize};
use sonicshot_dump::{
    CoreNotes, Dump, DumpError, DumpFile, KdumpCompression, KdumpOptions, NewFile, NewFolder,
    Overwrite, PruneOptions, SnapshotFiles, Spool, WriteOptions, XlSkeleton, write_kdump_without,
};
use std::fs::{self, File, Permissions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Once};
use tempfile::TempDir;

/// Somebody else, and their group.
const THEY: (u32, u32) = (54_321, 54_322);
/// A third one.
const OTHER: (u32, u32) = (54_331, 54_332);

/// Modes of an input, and what is left of each.
const MODES: [(u32, u32); 9] = [
    (0o4777, 0o777),
    (0o2770, 0o770),
    (0o1777, 0o777),
    (0o6755, 0o755),
    (0o7000, 0o000),
    (0o644, 0o644),
    (0o640, 0o640),
    (0o600, 0o600),
    (0o400, 0o400),
];

fn is_root() -> bool {
    sonicshot_testkit::has("root, who gives files away", geteuid().is_root())
}

fn set(path: &Path, owner: (u32, u32), mode: u32) {
    if geteuid().is_root() {
        chown(path, Some(owner.0), Some(owner.1)).unwrap();
    }
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    assert_eq!(fs::metadata(path).unwrap().mode() & 0o7777, mode);
}

/// Owner, group and mode.
fn rights(path: &Path) -> (u32, u32, u32) {
    let metadata = fs::symlink_metadata(path).unwrap();
    (metadata.uid(), metadata.gid(), metadata.mode() & 0o7777)
}

/// The owner and the mode that a file of `owner` with `mode` has.
fn of(owner: (u32, u32), mode: u32) -> (u32, u32, u32) {
    if geteuid().is_root() {
        (owner.0, owner.1, mode)
    } else {
        let folder = TempDir::new().unwrap();
        let (uid, gid, _) = rights(folder.path());
        (uid, gid, mode)
    }
}

/// The modes of the files without a name that this process writes in `folder`.
fn unfinished(folder: &Path) -> Vec<u32> {
    let mut modes = Vec::new();
    for entry in fs::read_dir("/proc/self/fd").unwrap() {
        let path = entry.unwrap().path();
        let Ok(to) = fs::read_link(&path) else {
            continue;
        };
        if to.starts_with(folder) && to.as_os_str().to_string_lossy().ends_with("(deleted)") {
            modes.push(fs::metadata(&path).unwrap().mode() & 0o7777);
        }
    }
    modes
}

type Write = fn(&Path, &Path, &WriteOptions) -> Result<(), DumpError>;

/// Writes what a dump becomes when it is pruned; its progress is told while that is not done.
fn prune(input: &Path, out: &Path, options: &WriteOptions) -> Result<(), DumpError> {
    let dump = Dump::open(input, None)?;
    let plan = plan(dump.layout(), &[(1, 1)]);
    let mut how = PruneOptions::new().overwrite(options.overwrite);
    how.progress.clone_from(&options.progress);
    dump.checked(&plan).prune_to(out, &how)?;
    Ok(())
}

fn raw(input: &Path, out: &Path, options: &WriteOptions) -> Result<(), DumpError> {
    let dump = Dump::open(input, None)?;
    let file = DumpFile::raw(out, dump.layout(), &dump.files(), options)?;
    file.copy(&dump)?;
    file.finish().map(drop)
}

fn elf(input: &Path, out: &Path, options: &WriteOptions) -> Result<(), DumpError> {
    let dump = Dump::open(input, None)?;
    let notes = CoreNotes::new(Architecture::X86_64);
    let file = DumpFile::elf_core(out, dump.layout(), &notes, &dump.files(), options)?;
    file.copy(&dump)?;
    file.finish().map(drop)
}

fn kdump(input: &Path, out: &Path, options: &WriteOptions) -> Result<(), DumpError> {
    let dump = Dump::open(input, None)?;
    let file = NewFile::create(out, options.overwrite, &dump.files())?;
    let nothing = plan(dump.layout(), &[]);
    let mut how = KdumpOptions::new(KdumpCompression::Zlib);
    how.progress.clone_from(&options.progress);
    let written = write_kdump_without(&dump, &nothing, file.file(), &how);
    written.unwrap();
    file.finish().map(drop)
}

fn sonic(input: &Path, out: &Path, options: &WriteOptions) -> Result<(), DumpError> {
    let dump = Dump::open(input, None)?;
    let file = NewFile::create(out, options.overwrite, &dump.files())?;
    let info = CheckpointInfo::new(dump.layout().clone(), PageSize::SIZE_4K);
    let mut how = SaveOptions::default();
    how.progress.clone_from(&options.progress);
    let mut writer = CheckpointWriter::new(file.file(), info, how).unwrap();
    let map = PageMap::new(dump.layout(), PageSize::SIZE_4K);
    let nothing = plan(dump.layout(), &[]);
    writer.memory(&dump, &map, &nothing).unwrap();
    writer.finish().unwrap();
    file.finish().map(drop)
}

fn restore(input: &Path, out: &Path, options: &WriteOptions) -> Result<(), DumpError> {
    let reader = CheckpointReader::open(input).unwrap();
    let layout = &reader.info().layout;
    let file = DumpFile::raw(out, layout, &[reader.source()], options)?;
    let mut how = RestoreOptions::new();
    how.progress.clone_from(&options.progress);
    reader.restore(&file, &how).unwrap();
    file.finish().map(drop)
}

fn to_mapped_ram(input: &Path, out: &Path, options: &WriteOptions) -> Result<(), DumpError> {
    let dump = Dump::open(input, None)?;
    dump.to_mapped_ram(out, options).map(drop)
}

fn to_stream(input: &Path, out: &Path, options: &WriteOptions) -> Result<(), DumpError> {
    let dump = Dump::open(input, None)?;
    dump.to_stream(out, options).map(drop)
}

fn to_xl(input: &Path, out: &Path, options: &WriteOptions) -> Result<(), DumpError> {
    let dump = Dump::open(input, None)?;
    let skeleton = dump.xl_skeleton()?.unwrap();
    let skeleton = XlSkeleton::parse(input, skeleton)?;
    let (none, inputs) = (|_| false, dump.files());
    skeleton
        .write(&dump, &none, out, &inputs, options)
        .map(drop)
}

/// Inputs of every format that is written, and what writes it.
fn writers(folder: &Path) -> Vec<(&'static str, PathBuf, Write)> {
    let file = |name: &str, bytes: &[u8]| {
        let path = folder.join(name);
        fs::write(&path, bytes).unwrap();
        path
    };
    let memory = file("in.raw", &pattern(1, 8 * PAGE));
    let stream_file = file("in.stream", &stream());
    let mapped = qemu::File::new(vec![Block("pc.ram", vec![Some(7); 8])]);
    let mapped = file("in.mapped", &mapped.bytes());
    let xl = file("in.xl", &xen::image(&[1, 2, 3, 4]));
    // Libvirt's image, compressed by gzip.
    let mut libvirt = b"LibvirtQemudSave".to_vec();
    for word in [2_u32, 4, 1, 1, 4] {
        libvirt.extend(word.to_le_bytes());
    }
    libvirt.resize(92, 0);
    libvirt.extend(b"<x/>");
    let mut packer = flate2::write::GzEncoder::new(libvirt, flate2::Compression::fast());
    std::io::Write::write_all(&mut packer, &stream()).unwrap();
    let libvirt = file("in.libvirt", &packer.finish().unwrap());
    let made = |name: &str, write: Write| {
        let path = folder.join(name);
        write(&memory, &path, &WriteOptions::new()).unwrap();
        path
    };
    vec![
        ("prune raw", memory.clone(), prune),
        ("prune elf", made("in.elf", elf), prune),
        ("prune kdump", made("in.kdump", kdump), prune),
        ("prune stream", stream_file.clone(), prune),
        ("prune mapped-ram", mapped.clone(), prune),
        ("prune libvirt", libvirt, prune),
        ("prune xl", xl.clone(), prune),
        ("restore", made("in.sonic", sonic), restore),
        ("to raw", memory.clone(), raw),
        ("to elf", memory.clone(), elf),
        ("to kdump", memory.clone(), kdump),
        ("save", memory, sonic),
        ("to mapped-ram", stream_file, to_mapped_ram),
        ("to stream", mapped, to_stream),
        ("to xl", xl, to_xl),
    ]
}

#[test]
fn whatever_writes_it_an_output_is_for_no_more_eyes_than_its_input() {
    let temporary = TempDir::new().unwrap();
    let inputs = temporary.path().join("inputs");
    fs::create_dir(&inputs).unwrap();
    let mut watched = 0;
    for (name, input, write) in writers(&inputs) {
        for (mode, left) in MODES {
            // Who is not root cannot read what they gave themselves no right to.
            if !geteuid().is_root() && mode & 0o400 == 0 {
                continue;
            }
            set(&input, THEY, mode);
            let folder = temporary.path().join("outputs");
            fs::create_dir(&folder).unwrap();
            // Whoever makes a file here makes it of this group.
            set(&folder, (geteuid().as_raw(), OTHER.1), 0o2777);
            let (fresh, old) = (folder.join("fresh"), folder.join("old"));
            let seen = Arc::new(Mutex::new(Vec::new()));
            let (there, within, seeing) = (fresh.clone(), folder.clone(), Arc::clone(&seen));
            let options = WriteOptions::new().progress(Arc::new(move |_: u64, _: u64| {
                assert!(!there.exists());
                seeing.lock().unwrap().extend(unfinished(&within));
            }));
            write(&input, &fresh, &options).unwrap();
            let seen = seen.lock().unwrap().clone();
            assert_eq!(rights(&fresh), of(THEY, left), "{name} {mode:o}");
            // Nobody else's until it is whole; then, still without a name, as it will be.
            let written = seen.iter().take_while(|mode| **mode == 0o600).count();
            watched += usize::from(written > 0);
            assert!(
                seen.iter().skip(written).all(|mode| *mode == left),
                "{name}: {seen:?}"
            );

            // What is replaced keeps its owner, and is not opened to more than it was.
            for (was, now) in [(0o6777, left), (0o640, left & 0o640), (0o604, left & 0o604)] {
                fs::write(&old, b"old").unwrap();
                set(&old, THEY, was);
                write(&input, &old, &replacing()).unwrap();
                assert_eq!(rights(&old), of(THEY, now), "{name} {mode:o} over {was:o}");
            }
            fs::remove_dir_all(&folder).unwrap();
        }
        set(&input, THEY, 0o644);
    }
    // Those that write so little tell of no progress.
    assert!(
        watched >= 8 * 7,
        "{watched} were looked at while they were written"
    );
}

#[test]
fn who_has_what_is_replaced_keeps_it() {
    if !is_root() {
        return;
    }
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::write(at("in"), pattern(1, 8 * PAGE)).unwrap();
    // Owner and mode of the input; of the replaced file; of the output.
    for (input, in_mode, old, old_mode, out_mode) in [
        (THEY, 0o600, OTHER, 0o600, 0o600),
        ((0, 0), 0o600, OTHER, 0o660, 0o600),
        // Their group may have been among the others, or theirs among ours.
        (THEY, 0o640, OTHER, 0o666, 0o600),
        (THEY, 0o664, OTHER, 0o666, 0o644),
        (THEY, 0o604, OTHER, 0o666, 0o600),
        (THEY, 0o666, OTHER, 0o640, 0o640),
        ((THEY.0, OTHER.1), 0o660, OTHER, 0o664, 0o660),
    ] {
        set(&at("in"), input, in_mode);
        fs::write(at("out"), b"old").unwrap();
        set(&at("out"), old, old_mode);
        prune(&at("in"), &at("out"), &replacing()).unwrap();
        let want = (old.0, old.1, out_mode);
        assert_eq!(
            rights(&at("out")),
            want,
            "{input:?} {in_mode:o} {old_mode:o}"
        );
    }

    // Where everyone may put a file, only the folder's owner and we are believed.
    let shared = at("shared");
    fs::create_dir(&shared).unwrap();
    set(&at("in"), THEY, 0o666);
    for (folder_of, folder_mode, old, owner) in [
        ((0, 0), 0o1777, OTHER, THEY),
        ((0, 0), 0o1770, OTHER, OTHER),
        ((0, 0), 0o1775, OTHER, THEY),
        ((0, 0), 0o777, OTHER, OTHER),
        (OTHER, 0o1777, OTHER, OTHER),
        ((0, 0), 0o1777, (0, 0), (0, 0)),
    ] {
        set(&shared, folder_of, folder_mode);
        let out = shared.join("out");
        fs::write(&out, b"old").unwrap();
        set(&out, old, 0o666);
        prune(&at("in"), &out, &replacing()).unwrap();
        let want = (owner.0, owner.1, 0o666);
        // A sticky folder that only its group may write counts as one for everyone.
        let want = if folder_mode == 0o1770 {
            (THEY.0, THEY.1, 0o666)
        } else {
            want
        };
        assert_eq!(rights(&out), want, "{folder_of:?} {folder_mode:o} {old:?}");
    }

    // A link is nobody's file, and what it leads to stays as it is.
    fs::write(at("target"), b"precious").unwrap();
    set(&at("target"), OTHER, 0o666);
    symlink("target", at("link")).unwrap();
    prune(&at("in"), &at("link"), &replacing()).unwrap();
    assert_eq!(rights(&at("link")), (THEY.0, THEY.1, 0o666));
    assert_eq!(fs::read(at("target")).unwrap(), b"precious");
}

#[test]
fn what_is_made_of_several_files_is_for_those_who_may_read_each() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    let us = geteuid().as_raw();
    fs::write(at("base"), pattern(1, 8 * PAGE)).unwrap();
    let diff = File::create(at("diff")).unwrap();
    diff.set_len(8 * PAGE).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&diff, &pattern(2, PAGE), 0).unwrap();
    let merge = || {
        let dump = Dump::open_over(at("diff"), at("base"), None).unwrap();
        assert_eq!(dump.files().len(), 2);
        let _ = fs::remove_file(at("out"));
        let plan = plan(dump.layout(), &[(3, 1)]);
        dump.prune_to(&plan, &at("out"), Overwrite::Refuse).unwrap();
        rights(&at("out"))
    };
    for (diff, base, want) in [
        (0o4644, 0o640, 0o640),
        (0o660, 0o644, 0o640),
        (0o600, 0o2644, 0o600),
    ] {
        set(&at("diff"), THEY, diff);
        set(&at("base"), THEY, base);
        assert_eq!(merge(), of(THEY, want), "{diff:o} {base:o}");
    }
    // The base is an input as the diff is.
    let dump = Dump::open_over(at("diff"), at("base"), None).unwrap();
    let plan = plan(dump.layout(), &[]);
    let over = dump.prune_to(&plan, &at("base"), Overwrite::Replace);
    assert!(matches!(over, Err(DumpError::SameFile { .. })), "{over:?}");
    if !is_root() {
        return;
    }
    // Nobody gets what they may not read.
    let (ours, group) = (us, rights(folder.path()).1);
    for (diff, diff_mode, base, base_mode, want) in [
        (THEY, 0o600, OTHER, 0o600, (ours, group, 0o600)),
        (THEY, 0o640, OTHER, 0o640, (ours, group, 0o600)),
        (THEY, 0o644, OTHER, 0o640, (ours, group, 0o600)),
        (THEY, 0o640, OTHER, 0o644, (THEY.0, THEY.1, 0o640)),
        (THEY, 0o640, (OTHER.0, THEY.1), 0o640, (ours, group, 0o600)),
        ((0, 0), 0o600, THEY, 0o600, (0, 0, 0o600)),
    ] {
        set(&at("diff"), diff, diff_mode);
        set(&at("base"), base, base_mode);
        assert_eq!(
            merge(),
            want,
            "{diff:?} {diff_mode:o} {base:?} {base_mode:o}"
        );
    }
}

#[test]
fn without_an_input_file_an_output_is_for_its_owner_alone() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    let group = rights(folder.path()).1;
    let us = geteuid().as_raw();

    // A pipe.
    let spool = Spool::from_reader("standard input", &pattern(1, 8 * PAGE)[..]).unwrap();
    let dump = Dump::open_spooled(&spool, None).unwrap();
    let spooled = dump.file().metadata().unwrap();
    assert_eq!((spooled.mode() & 0o7777, spooled.nlink()), (0o600, 0));
    let plan = plan(dump.layout(), &[(1, 1)]);
    dump.prune_to(&plan, &at("piped"), Overwrite::Refuse)
        .unwrap();
    assert_eq!(rights(&at("piped")), (us, group, 0o600));

    // Nothing at all: a guest that runs.
    let file = NewFile::create_new(&at("live"), Overwrite::Refuse).unwrap();
    file.finish().unwrap();
    assert_eq!(rights(&at("live")), (us, group, 0o600));
    if is_root() {
        set(&at("live"), THEY, 0o4644);
        let file = NewFile::create_new(&at("live"), Overwrite::Replace).unwrap();
        file.finish().unwrap();
        assert_eq!(rights(&at("live")), (THEY.0, THEY.1, 0o600));
    }

    // Memory without a name, whose mode is always 0777; and a file whose name is gone.
    let memory = File::from(memfd_create("ram", MemfdFlags::CLOEXEC).unwrap());
    assert_eq!(memory.metadata().unwrap().mode() & 0o777, 0o777);
    let gone = File::create_new(at("gone")).unwrap();
    set(&at("gone"), THEY, 0o666);
    fs::remove_file(at("gone")).unwrap();
    for file in [&memory, &gone] {
        let metadata = file.metadata().unwrap();
        let owner = (metadata.uid(), metadata.gid());
        std::os::unix::fs::FileExt::write_all_at(file, &pattern(1, 8 * PAGE), 0).unwrap();
        let input = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let _ = fs::remove_file(at("out"));
        prune(&input, &at("out"), &WriteOptions::new()).unwrap();
        assert_eq!(rights(&at("out")), (owner.0, owner.1, 0o600));
    }
}

/// An access list (acl(5)) that lets somebody more do anything.
fn access_list() -> Vec<u8> {
    let mut list = 2_u32.to_le_bytes().to_vec();
    for (tag, may, id) in [
        (1_u16, 7_u16, u32::MAX),
        (2, 7, OTHER.0),
        (4, 0, u32::MAX),
        (0x10, 7, u32::MAX),
        (0x20, 0, u32::MAX),
    ] {
        list.extend(tag.to_le_bytes());
        list.extend(may.to_le_bytes());
        list.extend(id.to_le_bytes());
    }
    list
}

#[test]
fn access_lists_open_nothing() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::write(at("in"), pattern(1, 8 * PAGE)).unwrap();
    set(&at("in"), THEY, 0o640);
    let outputs = at("outputs");
    fs::create_dir(&outputs).unwrap();
    let lists = |path: &Path, name: &str| {
        let file = File::open(path).unwrap();
        let set = fsetxattr(&file, name, &access_list(), XattrFlags::empty());
        sonicshot_testkit::has("access lists in its temporary folder", set.is_ok())
    };
    if !lists(&outputs, "system.posix_acl_default") {
        return;
    }
    // What is made here gets the list, which counts as soon as the group has rights.
    fs::write(outputs.join("plain"), b"").unwrap();
    let list_of = |path: &Path| {
        let mut list = [0; 256];
        rustix::fs::getxattr(path, "system.posix_acl_access", &mut list[..])
    };
    assert!(list_of(&outputs.join("plain")).is_ok());
    prune(&at("in"), &outputs.join("out"), &WriteOptions::new()).unwrap();
    assert_eq!(rights(&outputs.join("out")), of(THEY, 0o640));
    assert!(list_of(&outputs.join("out")).is_err());

    // The group's rights of a file with a list are the most that anyone on it has.
    assert!(lists(&at("in"), "system.posix_acl_access"));
    assert_eq!(rights(&at("in")).2, 0o770);
    prune(&at("in"), &at("out"), &WriteOptions::new()).unwrap();
    assert_eq!(rights(&at("out")), of(THEY, 0o600));
}

#[test]
fn a_folder_that_is_moved_away_meanwhile_gets_the_output_all_the_same() {
    let temporary = TempDir::new().unwrap();
    let at = |name: &str| temporary.path().join(name);
    fs::write(at("in"), pattern(1, 4 << 20)).unwrap();
    for overwrite in [Overwrite::Refuse, Overwrite::Replace] {
        for name in ["outputs", "elsewhere"] {
            fs::create_dir(at(name)).unwrap();
        }
        let once = Once::new();
        let (outputs, moved) = (at("outputs"), at("moved"));
        let options = WriteOptions::new().overwrite(overwrite);
        let options = options.progress(Arc::new(move |_: u64, _: u64| {
            once.call_once(|| {
                fs::rename(&outputs, &moved).unwrap();
                symlink("elsewhere", &outputs).unwrap();
            });
        }));
        prune(&at("in"), &at("outputs/out"), &options).unwrap();
        assert_eq!(names(&at("elsewhere")), [""; 0]);
        assert_eq!(names(&at("moved")), ["out"]);
        fs::remove_file(at("outputs")).unwrap();
        for name in ["moved", "elsewhere"] {
            fs::remove_dir_all(at(name)).unwrap();
        }
    }
}

#[test]
fn a_folder_and_each_file_in_it_are_for_no_more_eyes_than_their_counterparts() {
    let temporary = TempDir::new().unwrap();
    let at = |name: &str| temporary.path().join(name);
    let input = at("in");
    fs::create_dir(&input).unwrap();
    let state = [0x0710_1984_8664_0000_u64.to_le_bytes().as_slice(), &[1; 99]].concat();
    fs::write(input.join("vm.state"), state).unwrap();
    fs::write(input.join("vm.mem"), pattern(1, 1 << 20)).unwrap();
    fs::write(input.join("disk"), b"disk").unwrap();
    let find = || SnapshotFiles::find(&input, None, None).unwrap();
    let out = at("out");
    let make = |overwrite| {
        let folder = NewFolder::create(&out, overwrite, &find()).unwrap();
        let during = |what: &str| {
            let all = names(temporary.path());
            let new = all.iter().find(|name| name.starts_with(".sonicshot-"));
            let new = new.unwrap_or_else(|| panic!("{what}: {all:?}"));
            assert_eq!(rights(&at(new)).2 & 0o5777, 0o700, "{what}");
        };
        during("copied");
        let dump = Dump::open(input.join("vm.mem"), None).unwrap();
        let plan = plan(dump.layout(), &[(1, 2)]);
        folder
            .write_memory(&dump.checked(&plan), &PruneOptions::new())
            .unwrap();
        during("written");
        folder.finish().unwrap();
        assert!(
            names(temporary.path())
                .iter()
                .all(|name| !name.starts_with('.'))
        );
    };
    // Whoever makes a folder here makes one like this.
    set(temporary.path(), (geteuid().as_raw(), OTHER.1), 0o2755);
    set(&input.join("vm.state"), THEY, 0o2640);
    set(&input.join("disk"), THEY, 0o1444);
    for (folder, memory) in [(0o7777, 0o4777), (0o2750, 0o2770), (0o700, 0o600)] {
        set(&input, THEY, folder);
        set(&input.join("vm.mem"), THEY, memory);
        make(Overwrite::Refuse);
        assert_eq!(rights(&out), of(THEY, folder & 0o777));
        assert_eq!(rights(&out.join("vm.mem")), of(THEY, memory & 0o777));
        assert_eq!(rights(&out.join("vm.state")), of(THEY, 0o640));
        assert_eq!(rights(&out.join("disk")), of(THEY, 0o444));
        fs::remove_dir_all(&out).unwrap();
    }
    // What is replaced keeps its owners, and opens to no more.
    set(&input, THEY, 0o755);
    set(&input.join("vm.mem"), THEY, 0o666);
    make(Overwrite::Refuse);
    set(&out, OTHER, 0o750);
    set(&out.join("vm.mem"), OTHER, 0o640);
    fs::remove_file(out.join("disk")).unwrap();
    make(Overwrite::Replace);
    assert_eq!(rights(&out), of(OTHER, 0o750));
    assert_eq!(rights(&out.join("vm.mem")), of(OTHER, 0o640));
    assert_eq!(rights(&out.join("vm.state")), of(THEY, 0o640));
    assert_eq!(rights(&out.join("disk")), of(THEY, 0o444));
}

#[test]
fn a_prune_in_place_leaves_mode_and_owner_as_they_are() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("ram");
    for (mode, _) in MODES {
        if !geteuid().is_root() && mode & 0o600 != 0o600 {
            continue;
        }
        fs::write(&path, pattern(1, 64 * PAGE)).unwrap();
        // For who is not root, the kernel itself takes setuid away when a file is written to.
        let mode = if geteuid().is_root() {
            mode
        } else {
            mode & 0o1777
        };
        set(&path, THEY, mode);
        let dump = Dump::open(&path, None).unwrap();
        let plan = plan(dump.layout(), &[(8, 16)]);
        dump.prune_in_place_with(&plan, &every_page()).unwrap();
        assert_eq!(rights(&path), of(THEY, mode), "{mode:o}");
        drop(dump);
        fs::remove_file(&path).unwrap();
    }
}
