"""How long guests of QEMU are paused by `sonicshot qemu save` and by QEMU's own ways to save them, how
soon they run again, and how large the files are: over the guest's memory and over what of it is in
use, the measurements of the paper's Figures 3 and 4. And its FlashReboot: a reboot of a guest beside
a restore of its state after boot."""

import json
import os
import shutil
import statistics
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import charts
import kernels
from command import command
from debian import install_tools
from errors import GuestFailed
from host import LAB, allocated
from live_guest import BEAT, HOME, Beats, Live, child_rss, restore_spec
from machine import Machine, copy_disks, read_records
from spec import GuestSpec
from tool import find_tool, tool_argument

SERIES = "6.1"
# In use in every guest of the first figure, MiB.
LITTLE = 200
# What RAM is made of, as `machine.BACKINGS` has it.
KINDS = {"private": "plain", "memfd": "memfd"}
# QEMU's own ways: what is set for a migration to a file.
OWN: dict[str, tuple[str, ...]] = {
    "QEMU file:": (),
    "QEMU mapped-ram": ("mapped-ram",),
    "QEMU mapped-ram, multifd": ("mapped-ram", "multifd"),
}
OURS = "sonicshot"
# Ours, by what `qemu restore` is told; the first is the one of the plots.
RUN_ON: dict[str, tuple[str, ...]] = {
    "sonicshot": (), "sonicshot --eager": ("--eager",), "sonicshot --map": ("--map",)}
# Of its pause, in their order.
PARTS = ("stop", "pin", "devices", "reread", "classify", "copy", "resume")
# The reboot's row in `results`.
REBOOT = "flash"

Rounds = list[dict[str, float]]


class Point(TypedDict):
    """A guest that was measured, as its file has it; seconds and bytes."""

    memory: int
    used: int
    kind: str
    kernel: str
    qemu: str
    # MiB, by the guest's own word.
    guest_used: int
    # Of the machine, before and after.
    load: list[float]
    processors: int
    # By the way, of each round: pause, total, gap, bytes.
    save: dict[str, Rounds]
    # By the way, of each round: beat, rss (MiB).
    restore: dict[str, Rounds]
    # The making of the raw file for `--map`.
    raw: float


class Wanted(NamedTuple):
    """A point that is to be measured."""

    memory: int
    used: int
    kind: str

    @property
    def file(self) -> str:
        return f"{self.kind}-{self.memory}-{self.used}.json"


def own(live: Live, capabilities: Sequence[str], file: Path) -> dict[str, float]:
    """A save by QEMU itself of a guest that is stopped for it."""
    qmp = live.machine.qmp
    qmp.no_capabilities("mapped-ram", "multifd")
    qmp.capabilities("events", *capabilities)
    # It saves 128 MiB a second if nothing is said.
    qmp.call("migrate-set-parameters", max_bandwidth=1 << 36)
    if "multifd" in capabilities:
        qmp.call("migrate-set-parameters", multifd_channels=2)
    file.unlink(missing_ok=True)
    began = time.monotonic()
    qmp.call("stop")
    # The last one may not be cleaned up yet.
    patiently(lambda: qmp.call("migrate", uri=f"file:{file}"))
    qmp.migrated()
    patiently(lambda: qmp.call("cont"))
    paused = time.monotonic() - began
    return {"pause": paused, "total": paused, "bytes": allocated(file)}


def patiently(work: Callable[[], Any]) -> None:
    for left in reversed(range(200)):
        try:
            work()
            return
        except GuestFailed:
            if not left:
                raise
            time.sleep(0.01)


def saved(live: Live, tool: Path, way: str, file: Path) -> dict[str, float]:
    """One save of a guest that runs, and the longest gap of its heartbeat."""
    beats = Beats(live.machine)
    time.sleep(0.3)
    if way == OURS:
        report = live.save(tool)
        found = {"pause": report["pause_seconds"], "total": report["seconds"],
                 "bytes": report["file_bytes"]}
        found |= {f"pause_{name}": value for name, value in report["pause_parts"].items()}
    else:
        found = own(live, OWN[way], file)
    time.sleep(0.3)
    beats.end()
    if beats.failed:
        raise beats.failed
    return found | {"gap": beats.longest_gap()}


def run_on(live: Live, spec: GuestSpec, load: Callable[[Machine], None] | None) -> dict[str, float]:
    """From the start of QEMU to the first beat, and what is resident then."""
    folder = live.folder / "restored"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    copy_disks(live.folder, folder)
    machine = Machine(spec, None, folder, incoming=load is not None)
    try:
        if load:
            load(machine)
        machine.wait("BEAT [0-9]", 600)
        beat = time.monotonic() - machine.started
        return {"beat": beat, "rss": child_rss(machine.process.pid) or machine.rss_mib()}
    finally:
        machine.quit()
        shutil.rmtree(folder, ignore_errors=True)


def loader(file: Path, capabilities: Sequence[str]) -> Callable[[Machine], None]:
    """Has a QEMU that waits load its own file."""

    def load(machine: Machine) -> None:
        machine.qmp.capabilities("events", *capabilities)
        if "multifd" in capabilities:
            machine.qmp.call("migrate-set-parameters", multifd_channels=2)
        machine.qmp.call("migrate-incoming", uri=f"file:{file}")
        machine.qmp.migrated()
        machine.qmp.call("cont")

    return load


def spec_of(live: Live, tool: Path, way: str) -> GuestSpec:
    """The guest as `qemu restore` starts it."""
    words = list(RUN_ON[way])
    if "--map" in words:
        words.append(str(live.folder / "ram.raw"))
    spec = restore_spec(live.spec, "map" if "--map" in words else "eager")
    return replace(spec, qemu=(str(tool), "qemu", "restore", str(live.folder / "x.sonic"), *words,
                               "--", "qemu-system-x86_64"))


def guest_of(wanted: Wanted) -> GuestSpec:
    # A third as much again is in a file in memory; the kernel and the page cache have the rest.
    anon = max((wanted.used - 100) * 3 // 4, 24)
    return GuestSpec(kernels.fetch(SERIES), mem=wanted.memory, anon=anon,
                     backing=KINDS[wanted.kind], append=f"lab.beat={BEAT}")


def used_by(live: Live) -> int:
    """MiB that the guest had in use, by its own word."""
    folder = live.folder / "records"
    folder.mkdir()
    read_records(live.folder / "records.img", folder)
    words = dict(line.split(":") for line in (folder / "meminfo").read_text().splitlines())
    shutil.rmtree(folder)
    kib = {name: int(words[name].split()[0]) for name in ("MemTotal", "MemFree")}
    return (kib["MemTotal"] - kib["MemFree"]) >> 10


def measure(tool: Path, wanted: Wanted, rounds: int) -> Point:
    """One guest of its own: saved by each way in turn, and run on by each."""
    before = os.getloadavg()[0]
    live = Live.boot(guest_of(wanted), HOME / f"figures-{os.getpid()}")
    file = live.folder / "own.mig"
    try:
        point: Point = {
            "memory": wanted.memory, "used": wanted.used, "kind": wanted.kind,
            "kernel": live.spec.kernel.release, "qemu": live.version, "guest_used": used_by(live),
            "load": [before], "processors": os.cpu_count() or 0,
            "save": {way: [] for way in (OURS, *OWN)}, "restore": {}, "raw": 0}
        for _ in range(rounds):
            for way, of_way in point["save"].items():
                of_way.append(saved(live, tool, way, file))
                file.unlink(missing_ok=True)
        for way in OWN:
            # Of each its own file, for a moment: there is not room for all.
            own(live, OWN[way], file)
            load = loader(file, OWN[way])
            point["restore"][way] = [run_on(live, live.spec, load) for _ in range(rounds)]
            file.unlink()
        live.save(tool, "--then", "stop")
        live.machine.quit()
        for way in RUN_ON:
            spec = spec_of(live, tool, way)
            if "--map" in way:
                # The first has to make the raw file.
                point["raw"] = run_on(live, spec, None)["beat"]
            point["restore"][way] = [run_on(live, spec, None) for _ in range(rounds)]
        point["load"].append(os.getloadavg()[0])
        return point
    finally:
        live.end()
        shutil.rmtree(live.folder, ignore_errors=True)


def flash(tool: Path, rounds: int) -> dict[str, Any]:
    """A reboot of a guest beside a restore of what it was after its boot."""
    spec = replace(guest_of(Wanted(1024, LITTLE, "private")),
                   append=f"lab.beat={BEAT} lab.empty=1")
    live = Live.boot(spec, HOME / f"figures-{os.getpid()}")
    found: dict[str, Any] = {"kernel": spec.kernel.release, "qemu": live.version,
                             "load": [os.getloadavg()[0]], "reboot": [], "restore": {}}
    try:
        live.machine.wait("BEAT [0-9]", 60)
        # As it is after a boot; the disks with it.
        report = live.save(tool, "--then", "stop")
        found["bytes"] = report["file_bytes"]
        fresh = live.folder / "fresh"
        fresh.mkdir()
        copy_disks(live.folder, fresh)
        live.machine.qmp.call("cont")
        for _ in range(rounds):
            began = time.monotonic()
            live.machine.send("reboot")
            live.machine.wait("READY", 900)
            live.machine.wait("BEAT [0-9]", 60)
            found["reboot"].append(time.monotonic() - began)
        live.machine.quit()
        for disk in fresh.iterdir():
            disk.rename(live.folder / disk.name)
        for way in RUN_ON:
            spec = spec_of(live, tool, way)
            if "--map" in way:
                run_on(live, spec, None)
            found["restore"][way] = [run_on(live, spec, None)["beat"] for _ in range(rounds)]
        found["load"].append(os.getloadavg()[0])
        return found
    finally:
        live.end()
        shutil.rmtree(live.folder, ignore_errors=True)


def middle(rounds: Rounds, fact: str) -> float:
    return statistics.median(one[fact] for one in rounds)


def least(rounds: Rounds, fact: str) -> float:
    return min(one[fact] for one in rounds)


def size(mib: int) -> str:
    return f"{mib} MiB" if mib < 1024 else f"{mib / 1024:g} GiB"


def less(ours: float, theirs: float) -> str:
    return f"{100 * (ours / theirs - 1):+.1f} %"


def tables(point: Point) -> list[str]:
    """All of one point."""
    lines = [f"### {size(point['memory'])}, {point['guest_used']} MiB in use, {point['kind']}", "",
             f"Load of the machine {point['load'][0]:.0f} to {point['load'][-1]:.0f} on "
             f"{point['processors']} processors.", "",
             "| saved by | pause | in all | longest gap of the heartbeat | file |",
             "|---|---:|---:|---:|---:|"]
    for way, rounds in point["save"].items():
        lines.append(
            f"| {way} | {middle(rounds, 'pause') * 1000:,.0f} ms "
            f"({least(rounds, 'pause') * 1000:,.0f}) | {middle(rounds, 'total'):.2f} s | "
            f"{middle(rounds, 'gap') * 1000:,.0f} ms | {middle(rounds, 'bytes') / 1e6:,.0f} MB |")
    lines += ["", parts(point["save"][OURS]), "", "| run on by | from the start of QEMU to the first heartbeat | resident |",
              "|---|---:|---:|"]
    for way, rounds in point["restore"].items():
        lines.append(f"| {way} | {middle(rounds, 'beat'):.2f} s ({least(rounds, 'beat'):.2f}) | "
                     f"{middle(rounds, 'rss'):,.0f} MiB |")
    return [*lines, f"| the first `--map`, which makes the raw file | {point['raw']:.2f} s | |", ""]


def parts(rounds: Rounds) -> str:
    """What the pause of ours went into."""
    # Points of an earlier lab lack some.
    names = [name for name in PARTS if f"pause_{name}" in rounds[0]]
    each = (f"{name} {middle(rounds, f'pause_{name}') * 1000:.1f}" for name in names)
    return f"Of the pause of `sonicshot`, in ms: {', '.join(each)}."


def changes(points: Sequence[Point]) -> list[str]:
    """What ours needs beside QEMU's own; below zero where it is less."""
    lines = ["| guest | in use | memory | pause | beside mapped-ram, multifd | to the heartbeat: "
             "postcopy, `--map` | beside mapped-ram | file beside mapped-ram |",
             "|---|---:|---|---:|---:|---:|---:|---:|"]
    for point in points:
        save, restore = point["save"], point["restore"]
        pause = middle(save[OURS], "pause")
        beats = [middle(restore[way], "beat") for way in (OURS, "sonicshot --map")]
        theirs = middle(restore["QEMU mapped-ram"], "beat")
        lines.append(" | ".join([
            f"| {size(point['memory'])}", f"{point['guest_used']} MiB", point["kind"],
            f"{pause * 1000:.0f} ms",
            ", ".join(less(pause, middle(save[way], "pause"))
                      for way in ("QEMU mapped-ram", "QEMU mapped-ram, multifd")),
            ", ".join(f"{beat:.2f} s" for beat in beats),
            ", ".join(less(beat, theirs) for beat in beats),
            less(middle(save[OURS], "bytes"), middle(save["QEMU mapped-ram"], "bytes")) + " |"]))
    return lines


def plot(places: Mapping[int, Point], label: str, ticks: Mapping[int, str], log: bool) -> str:
    """`places`: the points by where they are on the x axis."""
    # In the order of the colours.
    ways = ("QEMU mapped-ram", OURS, "QEMU file:", "QEMU mapped-ram, multifd")
    graphs = []
    for title, part, fact, unit in (("pause, s", "save", "pause", 1.0),
                                    ("start to first heartbeat, s", "restore", "beat", 1.0),
                                    ("file, GB", "save", "bytes", 1e9)):
        lines = [[(at, middle(point[part][way], fact) / unit)  # type: ignore[literal-required]
                  for at, point in places.items()] for way in ways]
        graphs.append((title, lines))
    return charts.svg(ways, label, ticks, graphs, log)


PAGE = """# Figures: QEMU

How long a running guest of QEMU is paused for a save, how soon it runs again, and how large the file
is: the measurements of Figures 3 and 4 of Yoshida and Kono's paper, made by `lab.py live-figures`
with an unchanged QEMU {qemu} and Linux {kernel}. `sonicshot qemu save` and QEMU's own ways save the
same guest in turn, which runs on in between; each then runs it on.

{plots}
## Beside QEMU's own ways

{changes}

{flash}## What was measured

Medians{rounds}, in brackets the best. *In use* is MemTotal - MemFree by the guest's own word; nearly
all of the rest is full of garbage. The guest has a heartbeat of {beat} ms. The pause of `sonicshot` is
from QEMU's event STOP to RESUME; that of QEMU's own ways from before `stop` to behind `cont`, with
`max-bandwidth` raised so that it does not bound them, and two channels for multifd. A checkpoint is
compressed (zstd), QEMU's files are not. Files lie on the machine's disk, and what was just written is
in its page cache when it is read. `sonicshot` alone restores by postcopy; *resident* is of the moment
of the first heartbeat.

**Nothing here runs under KVM**: guests are emulated (TCG), which makes what the guest itself does
slower, and not what is measured here. The machine was a virtual one, and its load is said: compare
within a row.

{tables}"""

FLASH = """## A reboot, and a restore of the state after boot

The paper's FlashReboot: a guest of 1 GiB is saved once, as it is after its boot; instead of rebooting
it, end its QEMU and restore that.

```console
$ sonicshot qemu save --qmp /run/vm.qmp -o booted.sonic --then stop
$ cp --reflink=auto disk.img booted.img   # the disk of the same moment
$ # Instead of a reboot:
$ cp --reflink=auto booted.img disk.img
$ sonicshot qemu restore booted.sonic -- qemu-system-x86_64 ...
```

| | to the first heartbeat |
|---|---:|
{rows}

What the guest had written since is gone, as its memory is: it is for guests that keep nothing, or
keep it elsewhere. Clocks and random numbers are those of the saved moment until the guest sets them
anew.

"""


def flash_text(found: dict[str, Any]) -> str:
    reboot = statistics.median(found["reboot"])
    rows = [f"| a reboot | {reboot:.2f} s |"]
    for way, beats in found["restore"].items():
        beat = statistics.median(beats)
        rows.append(f"| {way} | {beat:.2f} s ({less(beat, reboot)}) |")
    return FLASH.format(rows="\n".join(rows))


def plots(points: Sequence[Point], into: Path) -> str:
    """Draws what there is enough of; the pictures, for the page."""
    text = ""
    for kind in KINDS:
        of_kind = [point for point in points if point["kind"] == kind]
        little = {p["memory"]: p for p in of_kind if p["used"] == LITTLE}
        largest = max(little, default=0)
        used = {p["used"]: p for p in of_kind if p["memory"] == largest}
        ticks = {at: size(at) for at in little}
        more = {at: f"{at / 1000:.2g}" for at in used}
        for name, places, label, marks, log in (
                ("memory", little, "the guest's memory", ticks, True),
                ("used", used, f"in use of {size(largest)}, GB", more, False)):
            if len(places) > 1:
                (into / f"{kind}-{name}.svg").write_text(plot(places, label, marks, log))
                text += f"![{kind} memory: over {label}]({kind}-{name}.svg)\n\n"
    return text


def publish(into: Path) -> None:
    """The tables, the plots and the page, of what is measured so far."""
    points: list[Point] = [json.loads(file.read_text())
                           for file in into.glob("*-*-*.json")]
    points.sort(key=lambda p: (list(KINDS).index(p["kind"]), p["memory"], p["used"]))
    reboot = into / f"{REBOOT}.json"
    if not points:
        return
    counts = {len(point["save"][OURS]) for point in points}
    (into / "README.md").write_text(PAGE.format(
        qemu=points[0]["qemu"], kernel=points[0]["kernel"], plots=plots(points, into),
        changes="\n".join(changes(points)), beat=BEAT,
        flash=flash_text(json.loads(reboot.read_text())) if reboot.exists() else "",
        rounds=f" of {' or '.join(map(str, sorted(counts)))}",
        tables="\n".join(line for point in points for line in tables(point))))


def keep(file: Path, found: Any) -> None:
    """Whole or not at all."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    part.rename(file)


def mebibytes(text: str) -> list[int]:
    return [int(size) for size in text.split(",") if size]


def figures_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--memory", type=mebibytes, default=[8192, 4096, 2048, 1024],
                        help="of the guests with little in use, MiB")
    parser.add_argument("--used", type=mebibytes, default=[1000, 2000, 4000, 7000],
                        help="by a guest of 8 GiB, or what --largest says, MiB")
    parser.add_argument("--largest", type=int, default=8192, help="MiB")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--rounds", type=int, default=5, help="saves and restores by each")
    parser.add_argument("--no-reboot", action="store_true", help="without the reboot's row")
    parser.add_argument("--into", type=Path, help="a folder; points that it has are not made again")
    tool_argument(parser)


@command("live-figures", "QEMU: pauses, starts and sizes, its own ways beside ours",
         figures_arguments)
def do_figures(args: Namespace) -> None:
    """A file for each point: what was measured is kept when this ends early, and not made again."""
    install_tools()
    tool = find_tool(args.sonicshot)
    into: Path = args.into or LAB / "live-figures"
    into.mkdir(parents=True, exist_ok=True)
    HOME.mkdir(parents=True, exist_ok=True)
    reboot = into / f"{REBOOT}.json"
    if not args.no_reboot and not reboot.exists():
        keep(reboot, flash(tool, args.rounds))
    sizes = [(memory, LITTLE) for memory in args.memory]
    sizes += [(args.largest, used) for used in args.used]
    for memory, used in sizes:
        for kind in args.kinds.split(","):
            wanted = Wanted(memory, used, kind)
            if (into / wanted.file).exists():
                continue
            began = time.monotonic()
            keep(into / wanted.file, measure(tool, wanted, args.rounds))
            publish(into)
            print(f"{wanted.file}: {time.monotonic() - began:.0f} s", flush=True)
    publish(into)
    print(into / "README.md")
