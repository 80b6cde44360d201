"""Guests of QEMU that are saved while they run, by `sonicshot qemu save`, and run on by `sonicshot
qemu restore`.

Each guest has writers that check themselves, and a heartbeat of 10 ms. It is saved once as it runs,
and goes on; then it is saved and stays stopped, its disks are copied, its QEMU ends, and it is run
on in each way and stress-tested."""

import os
import shutil
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random

import kernels
import live_checks
import live_disks
import live_kill
from command import command
from debian import Root, install_tools
from errors import AlreadyTold, CheckFailed, GuestFailed, LabError
from host import LAB
from kernels import Kernel
from live_guest import BEAT, HOME, WAYS, Beats, Live, huge_pages, restore_spec
from machine import Machine, copy_disks
from spec import GuestSpec
from tool import find_tool, tool_argument

# Other QEMUs than the host's, each unpacked into a folder.
SUITES = {"7.2": "bookworm", "11.1": "sid"}
# Those that cannot be kept from opening a mapped file for writing.
OPENS_FOR_WRITING = ("7.2",)

ROWS: dict[str, Callable[[Kernel], GuestSpec]] = {
    "-m alone": partial(GuestSpec, backing="plain"),
    "memory-backend-ram": GuestSpec,
    "memfd, shared": partial(GuestSpec, backing="memfd"),
    "file, shared": partial(GuestSpec, backing="file"),
    "file, private": partial(GuestSpec, backing="private-file"),
    "huge pages (memfd)": partial(GuestSpec, backing="huge"),
    "NUMA, 192 + 320 MiB, 2 processors": partial(GuestSpec, numa=(192, 320), smp=2),
    "q35, 2 processors": partial(GuestSpec, backing="plain", machine="q35", smp=2),
    "q35, OVMF, 4 processors": partial(GuestSpec, backing="plain", machine="q35", smp=4,
                                       firmware="ovmf"),
    "4 GiB (PCI hole), 2 processors": partial(GuestSpec, backing="plain", mem=4096, smp=2),
}


@dataclass
class Row:
    """Of the table."""

    qemu: str
    series: str
    guest: str
    # Of the save while it ran, in milliseconds.
    pause: float = 0
    gap: float = 0
    kept: int = 0
    size: int = 0
    # By the way in which it was restored: seconds to the first beat.
    beats: dict[str, float] = field(default_factory=dict)
    failed: str = ""

    def line(self) -> str:
        ways = ", ".join(f"{way} {beat:.2f} s" for way, beat in self.beats.items())
        said = f"**FAILED**: {self.failed}" if self.failed else f"{ways}; stress test OK each time"
        return (f"| {self.qemu} | {self.series} | {self.guest} | {self.pause:.0f} | {self.gap:.0f} | "
                f"{self.kept >> 20} | {self.size >> 20} | {said} |")


HEAD = ("| QEMU | kernel | guest | pause, ms | longest gap of the heartbeat, ms | kept, MiB | "
        "file, MiB | restored, to the first beat |\n|---|---|---|---:|---:|---:|---:|---|")


def ways_of(spec: GuestSpec, wanted: Sequence[str]) -> list[str]:
    """The ways in which a guest can be restored."""
    return [way for way in wanted if not (way == "map" and spec.numa)]


def restore(tool: Path, live: Live, way: str) -> float:
    """Runs the guest on, stress-tests it; seconds to its first beat."""
    folder = live.folder / way
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    copy_disks(live.folder, folder)
    if (live.folder / "vars.fd").exists():
        shutil.copy(live.folder / "vars.fd", folder)
    words = list(WAYS[way])
    if way == "map":
        words.append(str(folder / "ram.raw"))
    spec = restore_spec(live.spec, way)
    qemu = (str(tool), "qemu", "restore", str(live.folder / "x.sonic"), *words, "--",
            *(live.spec.qemu or ("qemu-system-x86_64",)))
    began = time.monotonic()
    machine = Machine(replace(spec, qemu=qemu), None, folder)
    try:
        machine.wait("BEAT [0-9]", 120)
        beat = time.monotonic() - began
        # The guest may be heard before it is said that it is there.
        for _ in range(100):
            said = (folder / "qemu.log").read_text()
            if "restored " in said:
                break
            time.sleep(0.1)
        # QEMU takes pages one by one only into memory that can say which it lacks.
        refused = way == "postcopy" and spec.backing in ("file", "private-file")
        if refused and "not by postcopy" not in said:
            raise CheckFailed(f"it is not said that QEMU refuses postcopy: {said[-400:]}")
        if f"({'eager' if refused else way})" not in said:
            raise CheckFailed(f"it was not restored by {way}: {said[-400:]}")
        machine.ask("torture")
        return beat
    except LabError as error:
        log = (folder / "qemu.log").read_text()[-400:]
        raise GuestFailed(f"{way}: {error} {log}") from error
    finally:
        machine.quit()
        shutil.rmtree(folder, ignore_errors=True)


def prove(tool: Path, row: Row, spec: GuestSpec, ways: Sequence[str], random: Random) -> None:
    """Fills in a row."""
    folder = HOME / f"{os.getpid()}"
    spec = replace(spec, stress=2 * spec.smp, append=f"lab.beat={BEAT}")
    with huge_pages(spec):
        live = Live.boot(spec, folder)
        try:
            beats = Beats(live.machine)
            time.sleep(0.5 + random.random())
            report = live.save(tool)
            time.sleep(0.5)
            beats.end()
            if beats.failed:
                raise beats.failed
            if report["pause_seconds"] is None:
                raise CheckFailed("the guest was not paused by QEMU's own word")
            row.pause = report["pause_seconds"] * 1000
            row.gap = beats.longest_gap() * 1000
            row.kept = report["ram_bytes"] - report["dropped_bytes"]
            row.size = report["file_bytes"]
            time.sleep(random.random())
            live.save(tool, "--then", "stop")
            status = live.machine.qmp.call("query-status")["status"]
            if status != "paused":
                raise CheckFailed(f"saved with --then stop, the guest is {status}")
            put = folder / "stopped"
            put.mkdir()
            copy_disks(folder, put)
        finally:
            live.end()
        for disk in put.iterdir():
            disk.rename(folder / disk.name)
        for way in ways_of(spec, ways):
            row.beats[way] = restore(tool, live, way)
    shutil.rmtree(folder, ignore_errors=True)


def proofs(tool: Path, series: Sequence[str], names: Sequence[str], ways: Sequence[str], qemu: str,
           seed: int) -> list[Row]:
    command, version = qemu_of(qemu)
    random = Random(seed)
    rows = []
    for name in names:
        for number in series:
            row = Row(version, number, name)
            rows.append(row)
            try:
                spec = replace(ROWS[name](kernels.fetch(number)), qemu=command)
                prove(tool, row, spec, ways, random)
            except LabError as error:
                row.failed = str(error)[:600].replace("\n", " ").replace("|", "/")
            print(row.line(), flush=True)
    return rows


def qemu_of(name: str) -> tuple[tuple[str, ...], str]:
    """The command that runs a QEMU, and its version; the host's if none is named."""
    if not name:
        return (), "10.0"
    root = Root(f"qemu-{name}", SUITES[name], ["qemu-system-x86"])
    root.install()
    return tuple(root.shared("qemu-system-x86_64")), name


def live_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--kernels", default=kernels.ALL)
    parser.add_argument("--rows", default="", help="parts of their names, `;` between them")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--qemu", default="", choices=["", *SUITES],
                        help="another one, unpacked into a folder")
    parser.add_argument("--kill", type=int, default=0,
                        help="kill so many saves, as many QEMUs, and a quarter as many restores; no "
                        "rows")
    parser.add_argument("--clones", action="store_true",
                        help="two guests of one file, of which one gives memory back; no rows")
    parser.add_argument("--promises", action="store_true",
                        help="the end of a pause, guests that are paused, memory that is a device; no "
                        "rows")
    parser.add_argument("--disks", action="store_true",
                        help="disks that are pinned in the pause, raw and qcow2; no rows")
    parser.add_argument("--quick", action="store_true", help="one guest, in two minutes")
    parser.add_argument("--seed", type=int, default=1)
    tool_argument(parser)


@command("live", "save guests while they run, and run them on", live_arguments)
def do_live(args: Namespace) -> None:
    """Guests saved while they run."""
    install_tools()
    tool = find_tool(args.sonicshot)
    HOME.mkdir(parents=True, exist_ok=True)
    # What is killed, and looked for, is of this run alone.
    binary = HOME / f"sonicshot-{os.getpid()}"
    shutil.copy(tool, binary)
    try:
        if args.kill or args.clones or args.promises or args.disks:
            for line in checks(args, binary):
                print(line, flush=True)
        else:
            rows(args, binary)
    finally:
        binary.unlink()


def checks(args: Namespace, tool: Path) -> Iterator[str]:
    """What came of each."""
    random = Random(args.seed)
    kernel = kernels.fetch(args.kernels.split(",")[0])
    if args.kill:
        yield live_kill.kill_ours(tool, kernel, args.kill, random)
        yield live_kill.kill_qemu(tool, kernel, args.kill, random)
        yield live_kill.kill_restores(tool, kernel, max(args.kill // 4, 1), random)
    if args.clones and args.qemu in OPENS_FOR_WRITING:
        yield live_checks.old_map(tool, kernel, qemu_of(args.qemu)[0])
    elif args.clones:
        yield live_checks.clones(tool, kernel, qemu_of(args.qemu)[0])
    if args.disks:
        for series in args.kernels.split(","):
            for form in ("raw", "qcow2"):
                yield live_disks.pinned(tool, kernels.fetch(series), form)
    if args.promises:
        yield live_checks.too_long(tool, kernel)
        yield live_checks.paused_stays(tool, kernel)
        yield live_checks.devices(tool, kernel)


def rows(args: Namespace, tool: Path) -> None:
    """Saves guests and runs them on; leaves the table."""
    ways = args.ways.split(",")
    if args.quick:
        kernel = kernels.fetch("6.1")
        made = proofs(tool, ["6.1"], ["-m alone"], ways, "", args.seed)
        print(live_kill.kill_ours(tool, kernel, 6, Random(args.seed)), flush=True)
    else:
        names = [name for name in ROWS
                 if not args.rows or any(part.strip() in name for part in args.rows.split(";"))]
        made = proofs(tool, args.kernels.split(","), names, ways, args.qemu, args.seed)
    text = "\n".join([HEAD, *(row.line() for row in made)])
    (LAB / "live.md").write_text(text + "\n")
    print(text)
    if any(row.failed for row in made):
        raise AlreadyTold
