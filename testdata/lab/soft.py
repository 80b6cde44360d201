"""Guests whose page cache is left out of their checkpoint, for it is on their disk: run on from what
was restored with the disk, with the cache as warm as it was."""

import shutil
import tempfile
import time
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import kernels
from cache import clean_frames
from captures import Meta, capture
from command import command
from errors import CheckFailed, GuestFailed
from host import LAB, attempt, run
from machine import Machine, copy_disks
from spec import PAGE, GuestSpec
from tool import find_tool, report_of, tool_argument

MIB = 1 << 20


@dataclass(frozen=True)
class Row:
    """What came of one guest."""

    kernel: str
    file_system: str
    cache: int
    on_disk: int
    all_bytes: int
    all_seconds: float
    bytes: int
    seconds: float
    restore_seconds: float
    reads: int
    control: str
    # Pages of page cache that the guest's own records explain, and whether the disk was read whole.
    explained: int
    streamed: bool
    # Of the raw file on an xfs, in MiB, by the file system's word.
    shared: float

    def line(self) -> str:
        how = "read whole" if self.streamed else "not read whole"
        return (f"| {self.kernel} | {self.file_system} | {self.cache:,} | {self.explained:,}, {how} | "
                f"{self.on_disk:,} | "
                f"{self.all_bytes / MIB:.1f} MiB, {self.all_seconds:.1f} s | "
                f"{self.bytes / MIB:.1f} MiB, {self.seconds:.1f} s | {self.restore_seconds:.1f} s | "
                f"{self.reads} | torture OK | refused | {self.control} | {self.shared:.1f} MiB, torture OK |")


HEAD = ("| kernel | file system | page cache, frames | explained by the guest's records; the disk was "
        "| on the disk | checkpoint of all | with references "
        "| restore | reads of the disk for all files | then | ten blocks changed | clean frames zeroed "
        "| raw file on xfs that shares the disk's blocks |\n"
        "|---|---|---:|---|---:|---:|---:|---:|---:|---|---|---|---|")


def reads_of(machine: Machine) -> int:
    """How often the guest has read its first disk."""
    for device in machine.qmp.call("query-blockstats"):
        if device.get("device") == "d0":
            return int(device["stats"]["rd_operations"])
    raise CheckFailed("QEMU tells nothing of the guest's first disk")


class Ran(NamedTuple):
    """A guest that ran on: the seconds from the start of QEMU to its first beat, how long it then
    looked at all that it has, and how often it read its disk for that."""

    beat: float
    look: float
    reads: int


def run_on(folder: Path, ram: Path, torture: bool) -> Ran:
    """Runs the captured guest on in `ram`: it looks at all that it has, the files from its page
    cache. Then it is stress-tested, and reads all files again."""
    meta = Meta.read(folder)
    home = LAB / "restore" / f"soft-{meta.name}"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    copy_disks(folder, home)
    machine = Machine(meta.spec, ram, home, incoming=True)
    try:
        machine.qmp.capabilities("events", "x-ignore-shared")
        machine.qmp.call("migrate-incoming", uri=f"file:{folder / 'device.state'}")
        machine.qmp.migrated()
        machine.qmp.call("cont")
        machine.wait("BEAT [0-9]", 120)
        beat = time.monotonic() - machine.started
        before = reads_of(machine)
        began = time.monotonic()
        machine.ask("look")
        ran = Ran(beat, time.monotonic() - began, reads_of(machine) - before)
        if torture:
            machine.ask("torture")
            if reads_of(machine) == before:
                raise CheckFailed("the guest read its files again without reading its disk")
        return ran
    finally:
        machine.quit()
        shutil.rmtree(home, ignore_errors=True)


def zero_clean(tool: Path, ram: Path, into: Path) -> int:
    """A copy of the memory whose clean page cache is zeroes."""
    frames, _ = clean_frames(tool, ram)
    run("cp", "--sparse=always", ram, into)
    with open(into, "r+b") as file:
        for frame in frames:
            file.seek(frame * PAGE)
            file.write(bytes(PAGE))
    return len(frames)


def control(tool: Path, folder: Path, ram: Path) -> str:
    """That it shows if the cache is not what it was."""
    zeroed = folder / "zeroed.raw"
    zero_clean(tool, folder / "ram.raw", zeroed)
    try:
        run_on(folder, zeroed, False)
    except GuestFailed as error:
        return f"the guest fails: {str(error).splitlines()[0][:60]}"
    finally:
        zeroed.unlink()
    raise CheckFailed(f"{ram}: a guest with zeroes for its page cache found nothing wrong")


def refuse_changed(tool: Path, checkpoint: Path, disk: Path, frames: list[int], ram: Path,
                   name: str = "files", *more: str) -> None:
    """Ten blocks of the disk that the memory has too, changed: nothing is restored."""
    changed, out = disk.with_suffix(".changed"), disk.with_suffix(".out")
    run("cp", "--sparse=always", disk, changed)
    with open(ram, "rb") as memory:
        pages = set()
        for frame in frames[:: max(1, len(frames) // 400)]:
            memory.seek(frame * PAGE)
            page = memory.read(PAGE)
            if page.strip(page[:1]):
                pages.add(page)
    done = 0
    with open(changed, "r+b") as file:
        at = 0
        while done < 10 and (block := file.read(PAGE)):
            if block in pages:
                file.seek(at + 100)
                file.write(bytes([block[100] ^ 1]))
                file.seek(at + PAGE)
                done += 1
            at += PAGE
    if done < 10:
        raise CheckFailed(f"{disk}: only {done} blocks are in the memory")
    answer = attempt(tool, "restore", checkpoint, "-o", out, "--disk", f"{name}={changed}",
                     "--disk-moved-on", *more)
    if answer.returncode != 3 or "holds other bytes" not in answer.stderr or out.exists():
        raise CheckFailed(f"ten blocks were changed, and restore says {answer.returncode}: "
                          f"{answer.stderr}")
    changed.unlink()


def share(tool: Path, folder: Path, ram: Path) -> float:
    """Lets a copy of the memory share the blocks of a copy of the disk on an xfs, and runs the guest on from
    it; how much is shared, in MiB."""
    image = folder / "sharing.xfs"
    with open(image, "wb") as file:
        file.truncate(3 << 30)
    run("mkfs.xfs", "-q", image)
    at = Path(tempfile.mkdtemp(dir=LAB))
    run("mount", "-o", "loop", image, at)
    try:
        memory, disk = at / "ram.raw", at / "files.img"
        run("cp", "--sparse=always", ram, memory)
        run("cp", "--sparse=always", folder / "files.img", disk)
        report = report_of(run(tool, "share", memory, "--disk", disk, "--json"))
        if attempt("cmp", ram, memory).returncode:
            raise CheckFailed(f"{memory}: sharing has changed it")
        if reads := run_on(folder, memory, True).reads:
            raise CheckFailed(f"{memory}: the guest read its disk {reads} times")
        return int(report["gained_bytes"]) / MIB
    finally:
        run("umount", at)
        at.rmdir()
        image.unlink()


def prove(tool: Path, spec: GuestSpec, folder: Path) -> Row:
    ram, disk = folder / "ram.raw", folder / "files.img"
    whole, small, back = folder / "all.sonic", folder / "small.sonic", folder / "back.raw"
    given = ("--disk", f"files={disk}")
    kept = report_of(run(tool, "save", ram, "-o", whole, "--json", "--force"))
    saved = report_of(run(tool, "save", ram, "-o", small, *given, "--json", "--force"))
    run(tool, "verify", small, *given, "--against", ram)
    started = time.monotonic()
    run(tool, "restore", small, "-o", back, *given, "--force")
    restored = time.monotonic() - started
    without = folder / "without.raw"
    run(tool, "restore", whole, "-o", without, "--force")
    if attempt("cmp", without, back).returncode:
        raise CheckFailed(f"{folder}: with the disk another memory is restored than without")
    shared = share(tool, folder, without)
    without.unlink()
    clean, dirty = clean_frames(tool, ram)
    refuse_changed(tool, small, disk, clean, ram)
    reads = run_on(folder, back, True).reads
    if reads:
        raise CheckFailed(f"{folder}: the guest read its disk {reads} times for files that were in "
                          "its page cache")
    return Row(spec.kernel.series, spec.file_system, len(clean) + dirty, saved["disk_pages"],
               kept["file_bytes"], kept["seconds"], saved["file_bytes"], saved["seconds"], restored,
               reads, control(tool, folder, back), saved["disk_search"]["explained_pages"],
               saved["disk_search"]["streamed_bytes"] is not None, shared)


def soft_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--kernels", default="6.1,6.12")
    parser.add_argument("--file-systems", default=",".join(("ext4", *kernels.FILE_SYSTEMS)))
    parser.add_argument("--mem", type=int, default=512, help="MiB")
    parser.add_argument("--keep", action="store_true", help="keep the captures")
    tool_argument(parser)


@command("soft", "page cache left out of checkpoints, and warm again from the disk", soft_arguments)
def do_soft(args: Namespace) -> None:
    tool = find_tool(args.sonicshot)
    rows = []
    for series in args.kernels.split(","):
        for file_system in args.file_systems.split(","):
            spec = GuestSpec(kernels.fetch(series), mem=args.mem, forms=("raw",),
                             file_system=file_system)
            folder = capture(spec, f"soft-{series}-{file_system}")
            row = prove(tool, spec, folder)
            rows.append(row.line())
            print(row.line(), flush=True)
            if not args.keep:
                shutil.rmtree(folder)
    table = LAB / "soft.md"
    table.write_text("\n".join([HEAD, *rows]) + "\n")
    print(table.read_text())
