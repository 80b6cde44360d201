"""Snapshots as Firecracker and Cloud Hypervisor leave them, made of a real guest's RAM: neither
runs without KVM, but their files are guest RAM and no more. QEMU's `pc` splits RAM at 3 GiB as
both do, so the guest runs on from them in QEMU."""

import json
import os
import re
import shutil
import struct
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import captures
import sandbox
from captures import Meta
from command import command
from debian import install_tools
from errors import CheckFailed
from frames import DROPPED, FREE, Run, frames_of, offset_of, ram_frames, same_but_dropped
from host import LAB, Word, allocated, attempt, run
from levels import processor
from machine import DISKS, Machine, prepare
from proof import inspect
from spec import PAGE, GuestSpec, Layout
from tool import Refusal, call, find_tool, report_of, tool_argument

# Every hole, so that the file is what a copy is.
IN_PLACE = ("--in-place", "--min-hole", "0", "--json")
# The number that a Firecracker state file begins with, since 1.15 behind a byte.
FIRECRACKER_STATE = b"\0" + struct.pack("<Q", 0x0710_1984_8664_0000) + b"\x0610.0.0" + bytes(999)


def firecracker_state(registers: str) -> bytes:
    """A state file with the processors of QEMU's `info registers -a`: what Firecracker has of KVM's
    `struct kvm_sregs` and of each local APIC, as those are in C."""
    state = FIRECRACKER_STATE
    for number, part in enumerate(re.split(r"CPU#\d+", registers)[1:]):
        value = {name: int(text, 16)
                 for name, text in re.findall(r"\b(CR[0-4]|EFER|CPL)=([0-9a-f]+)", part)}
        segment = struct.pack("<QIH10B", 0, 0xFFFFFFFF, 0x33 if value["CPL"] else 0x10,
                              11, 1, value["CPL"], 0, 1, 1, 1, 0, 0, 0)
        unusable = struct.pack("<QIH10B", 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0)
        state += segment + 7 * unusable + bytes(2 * 16)
        state += struct.pack("<7Q", value["CR0"], value["CR2"], value["CR3"], value["CR4"], 0,
                             value["EFER"], 0xFEE00800 | (not number) << 8) + bytes(32)
        apic = bytearray(1024)
        struct.pack_into("<I12xI", apic, 0x20, number << 24, 0x50014)
        state += apic
    return state


def capture(spec: GuestSpec, name: str) -> Path:
    """Boots a guest whose processes take and give back memory without rest, and stops it twice:
    its RAM at the first stop (a base), at the second, and QEMU's device state and the disks
    then."""
    folder = captures.HOME / name
    if (folder / "meta.json").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    prepare(spec, folder)
    ram = folder / "live.raw"
    guest = Machine(spec, ram, folder)
    try:
        guest.wait("READY", 900)
        qmp = guest.qmp
        qmp.call("stop")
        run("cp", "--sparse=auto", ram, folder / "base.raw")
        (folder / "base.registers").write_text(qmp.human("info registers -a"))
        qmp.call("cont")
        time.sleep(5)
        qmp.call("stop")
        (folder / "registers").write_text(qmp.human("info registers -a"))
        qmp.capabilities("events", "x-ignore-shared")
        qmp.call("migrate", uri=f"file:{folder / 'device.state'}")
        qmp.migrated()
        run("cp", "--sparse=auto", ram, folder / "ram.raw")
        captures.put_by_disks(folder)
    finally:
        guest.quit()
    ram.unlink()
    for disk in DISKS:
        (folder / f"{disk}.stop").rename(folder / disk)
    Meta(name, spec, spec.layout).write(folder)
    return folder


def write_diff(base: Path, ram: Path, diff: Path) -> int:
    """The pages of `ram` that are not those of `base`, in a sparse file: what Firecracker's diff
    is when it tracks dirty pages. Returns how many."""
    changed = 0
    with open(base, "rb") as a, open(ram, "rb") as b, open(diff, "wb") as out:
        out.truncate(ram.stat().st_size)
        while True:
            at = b.tell()
            old, new = a.read(1 << 20), b.read(1 << 20)
            if not new:
                return changed
            if old == new:
                continue
            for page in range(0, len(new), PAGE):
                if old[page:page + PAGE] != new[page:page + PAGE]:
                    out.seek(at + page)
                    out.write(new[page:page + PAGE])
                    changed += 1


def merge(base: Path, diff: Path) -> None:
    """Copies the data of `diff` over `base`, as Firecracker's tool does."""
    with open(base, "r+b") as out, open(diff, "rb") as data:
        size, at = diff.stat().st_size, 0
        while at < size:
            try:
                at = os.lseek(data.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            end = os.lseek(data.fileno(), at, os.SEEK_HOLE)
            while at < end:
                step = min(end - at, 1 << 20)
                os.pwrite(out.fileno(), os.pread(data.fileno(), step, at), at)
                at += step


def firecracker(folder: Path, memory: Path, _: Layout, registers: str) -> Path:
    folder.mkdir()
    (folder / "vm.state").write_bytes(firecracker_state(registers))
    run("cp", "--sparse=auto", memory, folder / "vm.mem")
    return folder


def cloud_hypervisor(folder: Path, memory: Path, layout: Layout, _: str) -> Path:
    folder.mkdir()
    size = sum(part.len for part in layout)
    ranges = [{"gpa": part.gpa, "length": part.len} for part in layout]
    state = {"memory_ranges": {"data": ranges}, "guest_ram_mappings": [], "boot_ram": size}
    (folder / "config.json").write_text(json.dumps(
        {"cpus": {"boot_vcpus": 1}, "memory": {"size": size, "shared": False, "zones": None}}))
    (folder / "state.json").write_text(json.dumps(
        {"snapshots": {"memory-manager": {"snapshots": {},
                                          "snapshot_data": {"state": json.dumps(state)}}},
         "snapshot_data": {"state": "{}"}}))
    run("cp", "--sparse=auto", memory, folder / "memory-ranges")
    return folder


def same(a: Path, b: Path) -> None:
    if attempt("cmp", "-s", a, b).returncode:
        raise CheckFailed(f"{a} and {b} differ")


def on_disk(path: Path) -> str:
    return f"{allocated(path) >> 20} MiB"


# Each VMM's snapshot of some memory, and the name of the memory in it.
SNAPSHOTS: list[tuple[Callable[[Path, Path, Layout, str], Path], str]] = [
    (firecracker, "vm.mem"), (cloud_hypervisor, "memory-ranges")]


@dataclass(frozen=True)
class FreeBefore:
    """The frames that were free in a base."""

    base: Path
    frames: set[int]
    layout: Layout

    def was_free(self, offset: int, content: bytes) -> bool:
        """Whether the base had `content` at an offset of raw RAM, in a free frame."""
        part = max((part for part in ram_frames(self.layout) if part.offset <= offset),
                   key=lambda part: part.offset)
        with open(self.base, "rb") as file:
            file.seek(offset)
            return part.first + (offset - part.offset) // PAGE in self.frames \
                and file.read(PAGE) == content


class Proof:
    """Every kind of snapshot made of one guest, pruned in place and by copy."""

    def __init__(self, tool: Path, folder: Path) -> None:
        self.tool, self.folder = tool, folder
        self.meta = Meta.read(folder)
        self.layout = self.meta.layout
        self.work = LAB / "vmms" / self.meta.name
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        self.ram, self.base = folder / "ram.raw", folder / "base.raw"
        self.registers = (folder / "registers").read_text()
        # What a state file tells, and raw RAM does not, where a kernel tells nothing of itself.
        self.given: dict[Path, list[Word]] = {}
        if isinstance(call(tool, "inspect", self.ram), Refusal):
            before = (folder / "base.registers").read_text()
            self.given = {self.ram: processor(self.registers), self.base: processor(before)}
        # What a plain prune of the second stop gives; every other way must give the same bytes.
        self.runs = self.frames(self.ram)
        self.pruned = self.work / "pruned.raw"
        run(tool, "prune", self.ram, "-o", self.pruned, *self.given.get(self.ram, []))
        same_but_dropped(self.ram, self.pruned, self.runs, self.layout, DROPPED)
        self.said: list[str] = []

    def frames(self, snapshot: Path, *options: str | Path) -> list[Run]:
        given = self.given.get(snapshot, [])
        return inspect(self.tool, snapshot, [], self.work / "pfns.tsv", *options, *given)[1]

    def whole_snapshots(self) -> None:
        copy = self.work / "copy"
        for make, name in SNAPSHOTS:
            if self.given and make is cloud_hypervisor:
                # Its file as it is made here has no processors.
                continue
            snapshot = make(self.work / "snapshot", self.ram, self.layout, self.registers)
            before = on_disk(snapshot / name)
            run(self.tool, "prune", snapshot, "-o", copy, "--json")
            run(self.tool, "prune", snapshot, *IN_PLACE)
            for out in (snapshot, copy):
                same(out / name, self.pruned)
            for other in sorted(set(os.listdir(snapshot)) - {name}):
                same(snapshot / other, copy / other)
            self.said.append(f"{make.__name__} {before} -> {on_disk(snapshot / name)}")
            shutil.rmtree(snapshot)
            shutil.rmtree(copy)

    def write_diff(self) -> tuple[Path, int]:
        """Firecracker's diff of the second stop: read and pruned over its base it is as the whole
        is, without it nothing is said. Its memory, and the pages in it."""
        diff, copy = self.work / "diff", self.work / "copy"
        diff.mkdir()
        (diff / "vm.state").write_bytes(firecracker_state(self.registers))
        changed = write_diff(self.base, self.ram, diff / "vm.mem")
        alone = attempt(self.tool, "inspect", diff, "--json")
        if alone.returncode != 4 or "--base" not in alone.stderr:
            raise CheckFailed(f"a diff without its base: {alone.returncode} {alone.stderr}")
        if self.frames(diff, "--base", self.base) != self.runs:
            raise CheckFailed("diff and base read differently from the whole")
        run(self.tool, "prune", diff, "--base", self.base, "-o", copy)
        same(copy / "vm.mem", self.pruned)
        shutil.rmtree(copy)
        return diff / "vm.mem", changed

    def diff_in_place(self, diff: Path, changed: int, pruned_base: FreeBefore | None) -> Path:
        """The diff pruned in place, over the base as it is or over one that was pruned itself,
        and merged into that; the merged memory."""
        kind = "pruned" if pruned_base else "plain"
        merged = self.work / "merged.raw"
        run("cp", "--sparse=auto", self.base, merged)
        if pruned_base:
            run(self.tool, "prune", merged, *IN_PLACE, *self.given.get(self.base, []))
        file = self.work / "diff.mem"
        # Not by `cp`, which makes holes of zeroes even with --sparse=auto.
        with open(file, "wb") as empty:
            empty.truncate(self.ram.stat().st_size)
        merge(file, diff)
        size = on_disk(file)
        report = report_of(run(self.tool, "prune", file, "--base", merged, *IN_PLACE,
                               *self.given.get(self.ram, [])))
        self.said.append(f"diff of {changed} pages, {kind} base: {size} -> {on_disk(file)}, "
                         f"{report['kept_for_base_bytes'] >> 10} KiB kept for the base")
        merge(merged, file)
        taken = kept_only(self.ram, merged, self.runs, self.layout, pruned_base)
        if taken:
            self.said.append(f"{taken} pages taken but not written to since")
        return merged


def prove(tool: Path, folder: Path) -> str:
    """Prunes every kind of snapshot made of one guest in place and by copy, and runs the guest
    on. Returns a line of what it saw."""
    proof = Proof(tool, folder)
    proof.whole_snapshots()
    free = FreeBefore(proof.base, frames_of(proof.frames(proof.base), *FREE), proof.layout)
    diff, changed = proof.write_diff()
    proof.diff_in_place(diff, changed, None)
    merged = proof.diff_in_place(diff, changed, free)
    # The guest on the pruned memory, and on the merged one.
    for memory in (proof.pruned, merged):
        captures.restore(folder, memory)
    shutil.rmtree(proof.work)
    return "; ".join(proof.said) + "; stress test OK twice"


def kept_only(ram: Path, merged: Path, runs: Sequence[Run], layout: Layout,
              base: FreeBefore | None) -> int:
    """Every page that is not free is as it was, the zero ones too. One that the pruned `base` had
    free, and that was taken but not written to since, may be zero: how many there are."""
    taken = 0
    with open(ram, "rb") as a, open(merged, "rb") as b:
        for run_ in runs:
            if run_.page_class in FREE:
                continue
            start = offset_of(run_.first, layout)
            for offset in range(start, start + (run_.last - run_.first + 1) * PAGE, PAGE):
                a.seek(offset)
                b.seek(offset)
                before, after = a.read(PAGE), b.read(PAGE)
                if before == after:
                    continue
                if not base or any(after) or not base.was_free(offset, before):
                    raise CheckFailed(f"{merged.name} differs in {run_.page_class} at {offset:#x}")
                taken += 1
    return taken


def vmms_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--kernel", default="6.1")
    parser.add_argument("--mem", default="512,4096", help="MiB, several")
    parser.add_argument("--rm", action="store_true", help="delete each capture afterwards")
    tool_argument(parser)


@command("vmms", "Firecracker's and Cloud Hypervisor's files", vmms_arguments)
def do_vmms(args: Namespace) -> None:
    """Firecracker's and Cloud Hypervisor's files, made of real guests' RAM."""
    install_tools()
    tool = find_tool(args.sonicshot)
    for mem in map(int, args.mem.split(",")):
        spec = sandbox.guest(args.kernel, mem=mem, stress=2)
        folder = capture(spec, f"vmms-{args.kernel}-{mem}")
        print(f"ok   {spec.kernel.release}, {mem} MiB: {prove(tool, folder)}", flush=True)
        if args.rm:
            shutil.rmtree(folder)
