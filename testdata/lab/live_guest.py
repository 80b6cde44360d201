"""A guest of QEMU that runs and has a heartbeat, to be saved by `sonicshot qemu save`."""

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from errors import CheckFailed, LabError
from host import LAB, Json, attempt
from machine import Machine, prepare
from spec import GuestSpec
from tool import report_of

HOME = LAB / "live"
# What the guest's console says every so many milliseconds.
BEAT = 10
# The ways in which a guest is restored, by what `qemu restore` is told.
WAYS: dict[str, list[str]] = {"eager": ["--eager"], "map": ["--map"], "postcopy": []}


class Beats:
    """When the guest's heartbeat was heard."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.times: list[float] = []
        self.failed: LabError | None = None
        self.ended = False
        self.thread = threading.Thread(target=self._listen, daemon=True)
        self.thread.start()

    def _listen(self) -> None:
        while not self.ended:
            try:
                self.machine.wait("BEAT [0-9]", 60)
            except LabError as error:
                self.failed = error
                return
            self.times.append(time.monotonic())

    def end(self) -> None:
        self.ended = True
        self.thread.join(70)

    def longest_gap(self) -> float:
        gaps = [after - before for before, after in zip(self.times, self.times[1:])]
        return max(gaps, default=0.0)

    def heard_since(self, moment: float) -> int:
        return sum(at > moment for at in self.times)


@contextmanager
def huge_pages(spec: GuestSpec) -> Iterator[None]:
    """So many as the guest needs, while it lives."""
    if spec.backing != "huge":
        yield
        return
    file = Path("/proc/sys/vm/nr_hugepages")
    before = file.read_text()
    file.write_text(str(spec.mem // 2 + 8))
    try:
        yield
    finally:
        file.write_text(before)


@dataclass
class Live:
    """A guest that runs, with a monitor for sonicshot."""

    spec: GuestSpec
    folder: Path
    machine: Machine
    socket: Path
    # QEMU's.
    version: str

    @classmethod
    def boot(cls, spec: GuestSpec, folder: Path) -> "Live":
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        prepare(spec, folder)
        # The names of sockets must be short.
        socket = Path(tempfile.mkdtemp(prefix="sonicshot-")) / "live"
        more = (*spec.more, "-qmp", f"unix:{socket},server=on,wait=off")
        machine = Machine(replace(spec, more=more), None, folder)
        try:
            machine.wait("READY", 900)
        except LabError:
            machine.quit()
            raise
        number = machine.qmp.call("query-version")["qemu"]
        version = ".".join(str(number[part]) for part in ("major", "minor", "micro"))
        return cls(spec, folder, machine, socket, version)

    def save(self, tool: Path, *words: str) -> Json:
        done = attempt(tool, "qemu", "save", "--qmp", self.socket, "-o", self.folder / "x.sonic",
                       "--force", "--json", *words)
        if done.returncode:
            raise CheckFailed(f"qemu save: {done.stderr.strip()[-800:]}")
        return report_of(done.stdout)

    def end(self) -> None:
        self.machine.quit()
        shutil.rmtree(self.socket.parent, ignore_errors=True)


def restore_spec(spec: GuestSpec, way: str) -> GuestSpec:
    """The guest that is started to be restored: what its RAM is made of is another thing, and so
    are its blocks' names."""
    if way == "map":
        return replace(spec, backing="plain")
    if spec.numa or spec.backing == "huge":
        return spec
    return replace(spec, backing={"plain": "", "": "plain"}.get(spec.backing, spec.backing))


def check_file(tool: Path, live: Live) -> bool:
    """What has the final name is whole; whether there is something."""
    file = live.folder / "x.sonic"
    if not file.exists():
        return False
    done = attempt(tool, "verify", file, "--json")
    if done.returncode:
        raise CheckFailed(f"a file that is not whole: {done.stderr.strip()[-400:]}")
    file.unlink()
    return True


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
