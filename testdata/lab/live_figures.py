"""How long guests are paused by `sonicshot qemu save` and by QEMU's own ways to save them, and how
soon they run again; all of a table in one run."""

import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import kernels
from errors import CheckFailed, GuestFailed
from host import LAB, allocated
from live import BEAT, HOME, Beats, Live, restore_spec
from machine import Machine, copy_disks
from spec import GuestSpec

# QEMU's own: what is set, with which parameters.
OWN: dict[str, tuple[str, ...]] = {
    "QEMU `file:`": (),
    "QEMU mapped-ram": ("mapped-ram",),
    "QEMU mapped-ram, multifd": ("mapped-ram", "multifd"),
}
OURS = "sonicshot"


@dataclass
class Times:
    """Of one way to save a guest; seconds and bytes."""

    pause: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    gap: list[float] = field(default_factory=list)
    size: int = 0

    def cells(self) -> list[str]:
        return [f"{statistics.median(self.pause) * 1000:,.0f} ms ({min(self.pause) * 1000:,.0f})",
                f"{statistics.median(self.total):.2f} s",
                f"{statistics.median(self.gap) * 1000:,.0f} ms", f"{self.size / 1e6:,.0f} MB"]


def own(live: Live, capabilities: Sequence[str], file: Path) -> tuple[float, float, int]:
    """A save by QEMU itself of a guest that is stopped for it: the pause, the whole, the size."""
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
    for _ in range(200):
        try:
            qmp.call("migrate", uri=f"file:{file}")
            break
        except GuestFailed:
            # The last one is not cleaned up yet.
            time.sleep(0.01)
    qmp.migrated()
    for _ in range(200):
        try:
            qmp.call("cont")
            break
        except GuestFailed:
            time.sleep(0.01)
    paused = time.monotonic() - began
    return paused, paused, allocated(file)


def ours(live: Live, tool: Path) -> tuple[float, float, int]:
    report = live.save(tool)
    return report["pause_seconds"], report["seconds"], report["file_bytes"]


def child_rss(parent: int) -> int:
    """MiB of the QEMU that a process has started, or of itself."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            if int(words[1]) != parent:
                continue
            if "qemu-system" not in os.readlink(folder / "exe"):
                continue
            for line in (folder / "status").read_text().splitlines():
                if line.startswith("VmRSS"):
                    return int(line.split()[1]) >> 10
        except (OSError, IndexError):
            continue
    return 0


def restored(spec: GuestSpec, live: Live, prepare: Callable[[Machine], None], incoming: bool
             ) -> tuple[float, int]:
    """Seconds from the start of QEMU to the first beat, and the MiB that are resident then."""
    folder = live.folder / "restored"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    copy_disks(live.folder, folder)
    machine = Machine(spec, None, folder, incoming=incoming)
    try:
        prepare(machine)
        machine.wait("BEAT [0-9]", 300)
        beat = time.monotonic() - machine.started
        rss = child_rss(machine.process.pid) or machine.rss_mib()
        return beat, rss
    finally:
        machine.quit()
        shutil.rmtree(folder, ignore_errors=True)


def restores(tool: Path, live: Live, mapped: Path, rounds: int) -> list[str]:
    """Rows: the ways to run the guest on."""

    def load(machine: Machine) -> None:
        machine.qmp.capabilities("events", "mapped-ram")
        machine.qmp.call("migrate-incoming", uri=f"file:{mapped}")
        machine.qmp.migrated()
        machine.qmp.call("cont")

    raw = live.folder / "ram.raw"
    words = {"postcopy": [], "eager": ["--eager"], "map, the raw file is there": ["--map", str(raw)]}
    rows = []
    for name in ("QEMU mapped-ram", *words):
        beats, rss = [], 0
        for _ in range(rounds + (name.startswith("map"))):
            if name in words:
                qemu = (str(tool), "qemu", "restore", str(live.folder / "x.sonic"), *words[name],
                        "--", "qemu-system-x86_64")
                spec = restore_spec(live.spec, "map" if name.startswith("map") else "eager")
                beat, rss = restored(replace(spec, qemu=qemu), live, lambda _: None, False)
            else:
                beat, rss = restored(live.spec, live, load, True)
            beats.append(beat)
        if name.startswith("map"):
            # The first one has made the raw file.
            rows.append(f"| map, with the making of the raw file | {beats.pop(0):.2f} s | |")
        rows.append(f"| {name} | {statistics.median(beats):.2f} s ({min(beats):.2f}) | {rss} MiB |")
    return rows


def guest(tool: Path, spec: GuestSpec, name: str, rounds: int) -> str:
    """The tables of one guest."""
    live = Live.boot(replace(spec, append=f"lab.beat={BEAT}"), HOME / f"figures-{os.getpid()}")
    times = {way: Times() for way in (OURS, *OWN)}
    before = os.getloadavg()[0]
    file = live.folder / "own.mig"
    try:
        for _ in range(rounds):
            for way, all_times in times.items():
                beats = Beats(live.machine)
                time.sleep(0.3)
                if way == OURS:
                    pause, total, size = ours(live, tool)
                else:
                    pause, total, size = own(live, OWN[way], file)
                time.sleep(0.3)
                beats.end()
                if beats.failed:
                    raise beats.failed
                all_times.pause.append(pause)
                all_times.total.append(total)
                all_times.gap.append(beats.longest_gap())
                all_times.size = size
        # For the restores: of one moment.
        live.save(tool, "--then", "stop")
        own(live, ("mapped-ram",), file)
        rows = ["| " + " | ".join([way, *all_times.cells()]) + " |"
                for way, all_times in times.items()]
        live.machine.quit()
        after = os.getloadavg()[0]
        text = [f"### {name}", "",
                f"Medians of {rounds} (best), one run; load of the machine {before:.0f}-{after:.0f} on "
                f"{os.cpu_count()} processors.", "",
                "| saved by | pause | in all | longest gap of the heartbeat | file |",
                "|---|---:|---:|---:|---:|", *rows, "",
                "| run on by | from the start of QEMU to the first heartbeat | resident |",
                "|---|---:|---:|", *restores(tool, live, file, rounds), ""]
        return "\n".join(text)
    finally:
        live.end()
        shutil.rmtree(live.folder, ignore_errors=True)


GUESTS = ("1 GiB, private", "2 GiB, private", "4 GiB, private", "4 GiB, memfd")


def figures(tool: Path, series: str, names: Sequence[str], rounds: int) -> None:
    """Prints the tables, and leaves them in a file."""
    kernel = kernels.fetch(series)
    texts = []
    for name in names:
        gib, _, kind = name.partition(" GiB, ")
        spec = GuestSpec(kernel, mem=int(gib) << 10, anon=96,
                         backing="memfd" if kind == "memfd" else "plain")
        texts.append(guest(tool, spec, f"Linux {series}, {name}", rounds))
        print(texts[-1], flush=True)
        (LAB / "live-figures.md").write_text("\n".join(texts))
    if not texts:
        raise CheckFailed(f"no such guest: {', '.join(GUESTS)}")
