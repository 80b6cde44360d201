//! The owner and the rights of the files that each command writes.

use crate::common::*;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tempfile::TempDir;

/// Somebody else, and their group.
const THEY: (u32, u32) = (54_321, 54_322);

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Owner, group and mode.
fn rights(path: &Path) -> (u32, u32, u32) {
    let metadata = fs::symlink_metadata(path).unwrap();
    (metadata.uid(), metadata.gid(), metadata.mode() & 0o7777)
}

fn is_root(folder: &Path) -> bool {
    sonicshot_testkit::has("root, who gives files away", rights(folder).0 == 0)
}

/// Gives a file to them, where we may; returns what it has then.
fn set(path: &Path, mode: u32) -> (u32, u32) {
    if rights(path.parent().unwrap()).0 == 0 {
        chown(path, Some(THEY.0), Some(THEY.1)).unwrap();
    }
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    let (uid, gid, now) = rights(path);
    assert_eq!(now, mode);
    (uid, gid)
}

fn firecracker(folder: &Path) -> PathBuf {
    fs::create_dir(folder).unwrap();
    let mut state = 0x0710_1984_8664_0000_u64.to_le_bytes().to_vec();
    state.extend([3; 1000]);
    fs::write(folder.join("vm.state"), state).unwrap();
    fs::write(folder.join("vm.mem"), ram()).unwrap();
    folder.into()
}

/// An image of `xl save`, of an HVM guest that was stopped.
fn xl(path: &Path) {
    let record = |out: &mut Vec<u8>, kind: u32, body: &[&[u8]]| {
        let len: usize = body.iter().map(|part| part.len()).sum();
        out.extend(kind.to_le_bytes());
        out.extend(u32::try_from(len).unwrap().to_le_bytes());
        body.iter().for_each(|part| out.extend(*part));
    };
    let mut out = b"Xen saved domain, xl format\n \0 \r".to_vec();
    out.extend([4, 3, 2, 1, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    out.extend(b"LibxlFmt\0\0\0\x02\0\0\0\0");
    record(&mut out, 1, &[]);
    out.extend([0xff; 8]);
    out.extend(b"XENF\0\0\0\x03\0\0\0\0\0\0\0\0");
    out.extend([2, 0, 0, 0, 12, 0, 0, 0, 4, 0, 0, 0, 17, 0, 0, 0]);
    for (number, pages) in (0_u64..).zip(ram().chunks(1024 * 4096)) {
        let mut head = 1024_u64.to_le_bytes().to_vec();
        head.extend((0..1024).flat_map(|index| (number * 1024 + index).to_le_bytes()));
        record(&mut out, 1, &[&head, pages]);
    }
    record(&mut out, 0, &[]);
    record(&mut out, 0, &[]);
    fs::write(path, out).unwrap();
}

/// Runs a command that must do it.
fn run(args: &[&str]) {
    let run = sonicshot(args);
    assert!(run.status.success(), "{args:?}: {}", stderr(&run));
}

/// A file of each format of the same guest, and what goes beside one.
fn inputs_in(folder: &TempDir) {
    let at = |name: &str| folder.path().join(name);
    raw_dump(folder.path(), |_| {});
    xl(&at("guest.xl"));
    firecracker(&at("vm"));
    let diff = File::create(at("guest.diff")).unwrap();
    diff.set_len(ram().len() as u64).unwrap();
    diff.write_all_at(&ram()[..4096], 0).unwrap();
    let convert = |from: &str, to: &str, out: &str| {
        let (from, out) = (at(from), at(out));
        run(&["convert", text(&from), "-o", text(&out), "--to", to]);
    };
    convert("guest.raw", "elf", "guest.elf");
    convert("guest.raw", "kdump", "guest.kdump");
    fs::write(at("guest.stream"), stream()).unwrap();
    convert("guest.stream", "mapped-ram", "guest.mapped");
    convert("guest.raw", "sonic", "guest.sonic");
    convert("guest.xl", "sonic", "xl.sonic");
    fs::write(at("secret"), b"a secret").unwrap();
    let secret = format!("secret={}", text(&at("secret")));
    run(&[
        "save",
        text(&at("guest.raw")),
        "-o",
        text(&at("blob.sonic")),
        "--blob",
        &secret,
    ]);
}

#[test]
fn no_command_writes_a_file_for_more_eyes_than_its_input() {
    let folder = TempDir::new().unwrap();
    inputs_in(&folder);
    check_outputs(&folder);
    check_frames(&folder);
    check_folder(&folder);
    check_in_place(&folder);
}

fn check_outputs(folder: &TempDir) {
    let at = |name: &str| folder.path().join(name);
    let secret = format!("secret={}", text(&at("secret")));
    let (base, template) = (at("guest.raw"), at("guest.xl"));
    let got = format!("secret={}", text(&at("got")));
    // Its input's name and mode, the command without input and output, the mode of the output.
    let rows: &[(&str, u32, &[&str], u32)] = &[
        ("guest.raw", 0o4777, &["prune"], 0o777),
        ("guest.raw", 0o1640, &["prune"], 0o640),
        ("guest.mapped", 0o2770, &["prune"], 0o770),
        ("guest.stream", 0o6755, &["prune"], 0o755),
        ("guest.elf", 0o4777, &["prune"], 0o777),
        ("guest.kdump", 0o4640, &["prune"], 0o640),
        ("guest.xl", 0o4777, &["prune"], 0o777),
        (
            "guest.diff",
            0o4666,
            &["prune", "--base", text(&base)],
            0o644,
        ),
        ("guest.raw", 0o4777, &["convert", "--to", "raw"], 0o777),
        ("guest.raw", 0o2770, &["convert", "--to", "elf"], 0o770),
        ("guest.raw", 0o1777, &["convert", "--to", "kdump"], 0o777),
        ("guest.raw", 0o4600, &["convert", "--to", "sonic"], 0o600),
        (
            "guest.stream",
            0o4777,
            &["convert", "--to", "mapped-ram"],
            0o777,
        ),
        (
            "guest.mapped",
            0o4777,
            &["convert", "--to", "stream"],
            0o777,
        ),
        ("xl.sonic", 0o4777, &["convert", "--to", "xl"], 0o777),
        (
            "guest.raw",
            0o4666,
            &["convert", "--to", "xl", "--template", text(&template)],
            0o644,
        ),
        ("guest.raw", 0o4777, &["save"], 0o777),
        ("guest.raw", 0o640, &["save", "--keep-all"], 0o640),
        ("guest.raw", 0o4777, &["save", "--blob", &secret], 0o600),
        ("guest.sonic", 0o4777, &["restore", "--to", "raw"], 0o777),
        ("guest.sonic", 0o2640, &["restore", "--to", "elf"], 0o640),
        ("xl.sonic", 0o4700, &["restore", "--to", "xl"], 0o700),
        (
            "blob.sonic",
            0o4750,
            &["restore", "--to", "raw", "--blob", &got],
            0o750,
        ),
    ];
    for (input, mode, command, left) in rows {
        let (input, out) = (at(input), at("out"));
        // Whatever is an input beside it.
        set(&at("guest.raw"), 0o644);
        set(&at("guest.xl"), 0o644);
        set(&at("secret"), 0o600);
        let (uid, gid) = set(&input, *mode);
        let mut args = vec![command[0], text(&input), "-o", text(&out)];
        args.extend(&command[1..]);
        run(&args);
        assert_eq!(rights(&out), (uid, gid, *left), "{args:?} of {mode:o}");
        if args.contains(&got.as_str()) {
            assert_eq!(rights(&at("got")), (uid, gid, *left), "{args:?}");
        }
        assert_eq!(rights(&input).2, *mode, "{args:?}");
        fs::remove_file(out).unwrap();
    }
}

/// The list of frames too.
fn check_frames(folder: &TempDir) {
    let at = |name: &str| folder.path().join(name);
    for input in ["guest.raw", "guest.sonic"] {
        let (input, out) = (at(input), at("frames"));
        let (uid, gid) = set(&input, 0o4640);
        run(&["inspect", text(&input), "--pfns", text(&out)]);
        assert_eq!(rights(&out), (uid, gid, 0o640), "{input:?}");
        fs::remove_file(out).unwrap();
    }
}

/// A folder, and each file in it.
fn check_folder(folder: &TempDir) {
    let at = |name: &str| folder.path().join(name);
    let vm = at("vm");
    let (out, state, memory) = (at("new"), vm.join("vm.state"), vm.join("vm.mem"));
    let (uid, gid) = set(&state, 0o4640);
    set(&memory, 0o4660);
    set(&vm, 0o7755);
    run(&["prune", text(&vm), "-o", text(&out)]);
    assert_eq!(rights(&out), (uid, gid, 0o755));
    assert_eq!(rights(&out.join("vm.state")), (uid, gid, 0o640));
    assert_eq!(rights(&out.join("vm.mem")), (uid, gid, 0o660));
}

/// In place nothing of it changes; for who is not root, the kernel takes setuid away.
fn check_in_place(folder: &TempDir) {
    let at = |name: &str| folder.path().join(name);
    let (uid, gid, _) = rights(&at("guest.raw"));
    let mode = if uid == THEY.0 { 0o4775 } else { 0o775 };
    for input in ["guest.raw", "guest.mapped"] {
        set(&at(input), mode);
        run(&["prune", text(&at(input)), "--in-place"]);
        assert_eq!(rights(&at(input)), (uid, gid, mode));
    }
}

#[test]
fn what_comes_through_a_pipe_is_for_its_owner_alone() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    let dump = raw_dump(folder.path(), |_| {});
    set(&dump, 0o4777);
    let (uid, gid, _) = rights(folder.path());
    for command in ["prune", "save"] {
        let out = at(command);
        let run = Command::new(env!("CARGO_BIN_EXE_sonicshot"))
            .args([command, "-", "-o", text(&out)])
            .stdin(File::open(&dump).unwrap())
            .stderr(Stdio::piped())
            .output()
            .unwrap();
        assert!(run.status.success(), "{}", stderr(&run));
        assert_eq!(rights(&out), (uid, gid, 0o600));
    }
}

/// A file that is compressed as a whole is the input, not the temporary one with its content.
#[test]
fn a_compressed_input_is_one_as_any_other() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    // A disk image, and libvirt's own compression, inside it.
    let mut image = b"LibvirtQemudSave\x02\0\0\0\0\0\0\0\x01\0\0\0\x05".to_vec();
    image.resize(92, 0);
    image.extend(zstd::encode_all(&stream()[..], 1).unwrap());
    for (name, content) in [("raw", ram()), ("stream", &stream()), ("libvirt", &image)] {
        let packed = at(name);
        fs::write(&packed, zstd::encode_all(content, 1).unwrap()).unwrap();
        let (uid, gid) = set(&packed, 0o640);
        let link = at("link");
        fs::hard_link(&packed, &link).unwrap();
        let before = fs::read(&packed).unwrap();
        for command in [
            &["prune"][..],
            &["convert", "--to", "elf"],
            &["convert", "--to", "sonic"],
            &["save"],
        ] {
            let (first, more) = command.split_first().unwrap();
            let to = |out: &Path| {
                let mut args = vec![*first, text(&packed), "-o", text(out), "--force"];
                args.extend(more);
                sonicshot(&args)
            };
            for out in [&packed, &link] {
                let run = to(out);
                assert_eq!(run.status.code(), Some(1), "{command:?}: {}", stderr(&run));
                assert!(fs::read(out).unwrap() == before, "{name} {command:?}");
            }
            let out = at("out");
            let run = to(&out);
            assert!(run.status.success(), "{command:?}: {}", stderr(&run));
            assert_eq!(rights(&out), (uid, gid, 0o640), "{name} {command:?}");
            fs::remove_file(&out).unwrap();
        }
        fs::remove_file(&link).unwrap();
    }
}

/// Files written by a user who may not give files away.
#[test]
fn nobody_gains_by_what_the_writer_may_not_do() {
    let folder = TempDir::new().unwrap();
    if !is_root(folder.path()) {
        return;
    }
    let at = |name: &str| folder.path().join(name);
    let (us, ours) = (54_331, 54_332);
    let dump = raw_dump(folder.path(), |_| {});
    let command = at("sonicshot");
    fs::copy(env!("CARGO_BIN_EXE_sonicshot"), &command).unwrap();
    for path in [folder.path(), &command] {
        fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
    }
    let outputs = at("outputs");
    fs::create_dir(&outputs).unwrap();
    chown(&outputs, Some(us), Some(ours)).unwrap();
    // Owner, group and mode of the input; of what is replaced; of the output.
    for (owner, group, mode, old, want) in [
        // Our group is the input's.
        (THEY.0, ours, 0o4640, None, (us, ours, 0o640)),
        (THEY.0, ours, 0o2664, None, (us, ours, 0o664)),
        // Their group could not be set: our group is of the others.
        (THEY.0, THEY.1, 0o4664, None, (us, ours, 0o644)),
        (THEY.0, THEY.1, 0o604, None, (us, ours, 0o600)),
        (us, THEY.1, 0o640, None, (us, ours, 0o600)),
        (us, THEY.1, 0o660, None, (us, ours, 0o600)),
        // What is replaced belongs to somebody who gets no part of it.
        (
            us,
            ours,
            0o660,
            Some((THEY.0, THEY.1, 0o666)),
            (us, ours, 0o660),
        ),
        (
            us,
            ours,
            0o660,
            Some((THEY.0, ours, 0o640)),
            (us, ours, 0o640),
        ),
        (
            us,
            ours,
            0o664,
            Some((THEY.0, THEY.1, 0o662)),
            (us, ours, 0o620),
        ),
    ] {
        chown(&dump, Some(owner), Some(group)).unwrap();
        fs::set_permissions(&dump, Permissions::from_mode(mode)).unwrap();
        let out = outputs.join("out");
        if let Some((uid, gid, mode)) = old {
            fs::write(&out, b"old").unwrap();
            chown(&out, Some(uid), Some(gid)).unwrap();
            fs::set_permissions(&out, Permissions::from_mode(mode)).unwrap();
        }
        let run = Command::new(&command)
            .args(["prune", text(&dump), "-o", text(&out), "--force"])
            .uid(us)
            .gid(ours)
            .output()
            .unwrap();
        assert!(run.status.success(), "{}", stderr(&run));
        assert_eq!(rights(&out), want, "{owner} {group} {mode:o} {old:?}");
        fs::remove_file(&out).unwrap();
    }
}
