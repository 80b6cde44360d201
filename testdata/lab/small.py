#!/usr/bin/env python3
"""Kernels that tell little of themselves: those of sandboxes, without types, some without symbols.

The libkrunfw packages of PyPI and Debian hold a kernel's image in a shared library. Written out as
an ELF file with the kernel's own PVH note it boots in QEMU's microvm, from a root disk that holds
the lab's guest program."""

import argparse
import ctypes
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import kernels  # noqa: E402
import machine  # noqa: E402
import proof  # noqa: E402
from errors import CheckFailed, LabError  # noqa: E402
from kernels import LAB, run  # noqa: E402

# Name -> package, version, and the file in it that is the library or contains it.
WHEELS = {
    "microsandbox": ("microsandbox", "0.7.11", "microsandbox/_bundled/lib/libkrunfw.so.5*"),
    "boxlite": ("boxlite", "0.10.8", "boxlite/boxlite.*.so"),
    "smolmachines": ("smolmachines", "1.32.2", "smol/libkrunfw.so.5"),
}
DEBIAN = {"libkrunfw": ("sid", "libkrunfw5", "libkrunfw.so*")}
NAMES = [*WHEELS, *DEBIAN]
XEN_ELFNOTE_PHYS32_ENTRY = 18


def fetch(name):
    """Takes a kernel out of its package; returns its record."""
    home = LAB / "kernels" / f"small-{name}"
    record = home / "meta.json"
    if record.exists():
        return json.loads(record.read_text())
    work = home / "unpack"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    if name in WHEELS:
        package, version, pattern = WHEELS[name]
        run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
            "-d", work, f"{package}=={version}")
        with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
            wheel.extractall(work / "root")
    else:
        suite, package, pattern = DEBIAN[name]
        apt = kernels.Apt(suite, LAB)
        apt.update()
        version = apt.show(package, "Version")
        apt.download(package, work)
        run("dpkg", "-x", next(work.glob("*.deb")), work / "root")
        pattern = f"**/{pattern}"
    library = max((p for p in (work / "root").glob(pattern) if p.is_file()),
                  key=lambda p: p.stat().st_size)
    load, image = bundle(library, work)
    release = re.search(rb"Linux version (\S+)", image).group(1).decode()
    (home / "vmlinuz").write_bytes(pvh_elf(load, image))
    meta = {"series": f"small-{name}", "release": release, "packages": {package: version},
            "vmlinuz": str((home / "vmlinuz").relative_to(LAB)), "modules": []}
    shutil.rmtree(work)
    record.write_text(json.dumps(meta, indent=1))
    return meta


def bundle(library, work):
    """The address at which a libkrunfw wants its kernel, and the kernel's image. The library may
    be inside another."""
    data = library.read_bytes()
    if data.count(b"KERNEL_BUNDLE") == 0:
        raise LabError(f"no kernel in {library.name}")
    inner = work / "inner.so"
    # The last ELF header in front of the name is the library's own.
    start = data.rfind(b"\x7fELF\x02\x01\x01", 0, data.find(b"KERNEL_BUNDLE"))
    sections, = struct.unpack_from("<Q", data, start + 0x28)
    each, count = struct.unpack_from("<HH", data, start + 0x3a)
    inner.write_bytes(data[start:start + sections + each * count])
    library = ctypes.CDLL(str(inner))
    load, entry, size = (ctypes.c_size_t() for _ in range(3))
    library.krunfw_get_kernel.restype = ctypes.c_void_p
    at = library.krunfw_get_kernel(ctypes.byref(load), ctypes.byref(entry), ctypes.byref(size))
    return load.value, ctypes.string_at(at, size.value)


def pvh_elf(load, image):
    """An ELF file with one segment and the PVH entry that the kernel's own note names."""
    found = re.search(rb"\x04\0\0\0(\x04|\x08)\0\0\0\x12\0\0\0Xen\0", image)
    if not found:
        raise LabError("the kernel has no PVH note")
    length = found[1][0]
    entry = int.from_bytes(image[found.end():found.end() + length], "little")
    note = struct.pack("<III4sI", 4, 4, XEN_ELFNOTE_PHYS32_ENTRY, b"Xen\0", entry)
    header, entries = 64, 2 * 56
    first = 4096
    elf = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 62, 1, entry, header, 0, 0,
                      64, 56, 2, 0, 0, 0)
    elf += struct.pack("<IIQQQQQQ", 1, 7, first, load, load, len(image), len(image), 4096)
    elf += struct.pack("<IIQQQQQQ", 4, 4, header + entries, 0, 0, len(note), len(note), 4)
    return (elf + note).ljust(first, b"\0") + image


def root_disk():
    """An ext4 file system with the guest's program as its init."""
    image = LAB / f"root-{machine.guest_program()}.img"
    if image.exists():
        return image
    LAB.mkdir(parents=True, exist_ok=True)
    tree = Path(tempfile.mkdtemp(dir=LAB))
    for name in ("dev", "proc", "sys", "files", "shm", "modules"):
        (tree / name).mkdir()
    run("gcc", "-O2", "-static", "-Wall", "-Wextra", "-o", tree / "init", machine.GUEST_SOURCE)
    run("strip", tree / "init")
    part = image.with_suffix(".part")
    run("mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-d", tree, part, "8M")
    part.rename(image)
    shutil.rmtree(tree)
    return image


class Microvm(machine.Machine):
    """One QEMU process with a microvm; `ram` names the file that is its memory."""

    def __init__(self, spec, ram, folder, incoming=False):
        self.folder = folder
        self.lines = []
        self.arrived = threading.Condition()
        self.sockets = Path(tempfile.mkdtemp(prefix="sonicshot-"))
        console, monitor = self.sockets / "console", self.sockets / "qmp"
        command = [
            "qemu-system-x86_64", "-accel", "tcg", "-nodefaults", "-no-user-config",
            "-display", "none", "-cpu", spec["cpu"], "-smp", str(spec["smp"]),
            "-machine", "microvm,acpi=off,isa-serial=off,"
                        "memory-backend=ram0",
            "-m", f"{spec['mem']}M",
            "-object", f"memory-backend-file,id=ram0,size={spec['mem']}M,mem-path={ram},share=on",
            "-kernel", LAB / spec["kernel"]["vmlinuz"], "-append", spec["cmdline"],
            "-chardev", f"socket,id=c0,path={console},server=on,wait=off",
            "-device", "virtio-serial-device", "-device", "virtconsole,chardev=c0",
            "-qmp", f"unix:{monitor},server=on,wait=off",
        ]
        for name in ("files", "records", "root"):
            command += ["-drive", f"if=none,id={name},format=raw,file={folder / (name + '.img')}",
                        "-device", f"virtio-blk-device,drive={name}"]
        if incoming:
            command += ["-incoming", "defer"]
        self.started = time.monotonic()
        self.process = subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL,
                                        stderr=open(folder / "qemu.log", "w"))
        self.qmp = machine.Monitor(monitor, self.process)
        self.console = socket.socket(socket.AF_UNIX)
        self.console.connect(str(console))
        threading.Thread(target=self._listen, daemon=True).start()


DISKS = ("files.img", "records.img", "root.img")


def prepare(spec, folder, more=""):
    machine.prepare(spec, folder, f"{spec.get('append', '')} {more}")
    shutil.copy(root_disk(), folder / "root.img")
    spec["cmdline"] = spec["cmdline"].replace("console=ttyS0", "console=hvc0")
    spec["cmdline"] += " root=/dev/vdc ro rootfstype=ext4 init=/init reboot=t"


def layout(mem):
    """Where QEMU's microvm has its RAM (`x86_memory`): 3 GiB below the hole."""
    size, low = mem << 20, min(mem << 20, 3 << 30)
    parts = [{"gpa": 0, "len": low, "file_offset": 0}]
    if size > low:
        parts.append({"gpa": 1 << 32, "len": size - low, "file_offset": low})
    return parts


def capture(spec, name):
    """Boots a guest, lets it fill its memory, stops it, and takes its RAM, as a raw file and as a
    mapped-ram file, and its disks."""
    folder = LAB / "captures" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    prepare(spec, folder)
    guest = Microvm(spec, folder / "live.raw", folder)
    try:
        guest.wait("READY", 900)
        guest.qmp.call("stop")
        for disk in DISKS:
            run("cp", "--sparse=always", folder / disk, folder / f"{disk}.stop")
        guest.qmp.capabilities("events", "x-ignore-shared")
        guest.qmp.call("migrate", uri=f"file:{folder / 'device.state'}")
        guest.qmp.migrated()
        run("cp", "--sparse=auto", folder / "live.raw", folder / "ram.raw")
        guest.qmp.call("cont")
        time.sleep(0.2)
        guest.qmp.call("stop")
        guest.qmp.no_capabilities("x-ignore-shared")
        guest.qmp.capabilities("mapped-ram")
        guest.qmp.call("migrate", uri=f"file:{folder / 'mapped.ram'}")
        guest.qmp.migrated()
    finally:
        guest.quit()
    machine.read_records(folder / "records.img.stop", folder)
    (folder / "live.raw").unlink()
    for disk in DISKS:
        (folder / f"{disk}.stop").rename(folder / disk)
    meta = {"name": name, "spec": spec, "release": spec["kernel"]["release"],
            "layout": layout(spec["mem"])}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    return folder


def restore(folder, ram, seconds=1200):
    """Runs the captured guest on with `ram` as its memory, and tortures it."""
    meta = json.loads((folder / "meta.json").read_text())
    here = LAB / "restore" / f"{meta['name']}-{os.getpid()}"
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir(parents=True)
    for disk in DISKS:
        run("cp", "--sparse=always", folder / disk, here / disk)
    guest = Microvm(meta["spec"], ram, here, incoming=True)
    try:
        guest.qmp.capabilities("events", "x-ignore-shared")
        guest.qmp.call("migrate-incoming", uri=f"file:{folder / 'device.state'}")
        guest.qmp.migrated()
        guest.qmp.call("cont")
        guest.wait("BEAT [0-9]", 120)
        guest.send("torture")
        line = guest.wait("TORTURE-", seconds)
        console = (here / "console.log").read_text(errors="replace")
        if "TORTURE-OK" not in line or "-FAIL" in console:
            raise CheckFailed(f"{meta['name']}: {line}")
    finally:
        guest.quit()
        shutil.rmtree(here, ignore_errors=True)


def prove(tool, folder, torture=True, more=()):
    """Holds what the tool says of a capture against the guest's own kernel, prunes its RAM in
    place, and runs the guest on from it."""
    meta = json.loads((folder / "meta.json").read_text())
    report, runs = proof.inspect(tool, folder / "ram.raw", [], folder / "pfns.tsv", more)
    row = proof.against_kernel(folder, runs, None)
    row["knowledge"] = report.get("knowledge")
    if row["unexplained"]:
        raise CheckFailed(f"{meta['name']}: {row['unexplained']} frames in use called free")
    pruned = folder / "pruned.raw"
    run("cp", "--sparse=auto", folder / "ram.raw", pruned)
    before = pruned.stat().st_blocks * 512 >> 20
    run(tool, "prune", pruned, "--in-place", "--live-ok", *more)
    proof.same_but_dropped(folder / "ram.raw", pruned, runs, meta, proof.DROPPED)
    row["disk"] = f"{before} -> {pruned.stat().st_blocks * 512 >> 20} MiB"
    if torture:
        restore(folder, pruned)
        row["torture"] = "OK"
    pruned.unlink()
    return row


def spec_of(args, name):
    return {"kernel": fetch(name), "mem": args.mem, "cpu": args.cpu, "smp": args.smp,
            "machine": "microvm", "garbage": "random", "append": args.append}


def name_of(spec):
    return f"{spec['kernel']['series']}-{spec['mem']}-{spec['cpu']}-smp{spec['smp']}"


def do_capture(args):
    kernels.install_tools()
    spec = spec_of(args, args.kernel)
    print(machine.relative(capture(spec, name_of(spec))))


def do_prove(args):
    kernels.install_tools()
    tool = Path(args.sonicshot).resolve()
    failed = 0
    for name in args.kernels.split(","):
        spec = spec_of(args, name)
        folder = LAB / "captures" / name_of(spec)
        try:
            if not (args.keep and (folder / "meta.json").exists()):
                capture(spec, name_of(spec))
            row = prove(tool, folder, not args.no_torture)
            print(f"ok   {folder.name} ({spec['kernel']['release']}): {json.dumps(row)}", flush=True)
        except LabError as error:
            failed += 1
            print(f"FAIL {folder.name}: {error}", flush=True)
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    if failed:
        raise SystemExit(1)


def add_options(parser):
    parser.add_argument("--mem", type=int, default=512, help="MiB")
    parser.add_argument("--smp", type=int, default=1)
    parser.add_argument("--cpu", default="qemu64")
    parser.add_argument("--append", default="", help="kernel command line")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("capture", help="boot a guest and take its memory")
    one.add_argument("--kernel", default="libkrunfw", choices=NAMES)
    add_options(one)
    one.set_defaults(run=do_capture)
    all_of = commands.add_parser("prove", help="capture, check, prune, restore, torture")
    all_of.add_argument("--kernels", default=",".join(NAMES))
    all_of.add_argument("--sonicshot", default=kernels.ROOT / "target/release/sonicshot")
    all_of.add_argument("--no-torture", action="store_true")
    all_of.add_argument("--keep", action="store_true", help="keep captures, and use kept ones")
    add_options(all_of)
    all_of.set_defaults(run=do_prove)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
