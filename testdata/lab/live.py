"""Guests of QEMU that are saved while they run, by `sonicshot qemu save`, and run on by `sonicshot
qemu restore`.

Each guest has writers that check themselves, and a heartbeat of 10 ms. It is saved once as it runs,
and goes on; then it is saved and stays stopped, its disks are copied, its QEMU ends, and it is run
on in each way and tortured."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random

import kernels
from command import command
from debian import Root, install_tools
from errors import AlreadyTold, CheckFailed, GuestFailed, LabError
from host import LAB, Json, attempt
from kernels import Kernel
from machine import Machine, copy_disks, prepare
from spec import GuestSpec
from tool import find_tool, report_of, tool_argument

HOME = LAB / "live"
# What the guest's console says every so many milliseconds.
BEAT = 10
# A guest that was killed under must beat again within so many seconds.
BACK = 2.0
SUITES = {"7.2": "bookworm"}
WAYS = {"eager": ["--eager"], "map": ["--map"], "postcopy": []}

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
        return cls(spec, folder, machine, socket)

    def save(self, tool: Path, *words: str) -> Json:
        done = attempt(tool, "qemu", "save", "--qmp", self.socket, "-o", self.folder / "x.sonic",
                       "--force", "--json", *words)
        if done.returncode:
            raise CheckFailed(f"qemu save: {done.stderr.strip()[-800:]}")
        return report_of(done.stdout)

    def end(self) -> None:
        self.machine.quit()
        shutil.rmtree(self.socket.parent, ignore_errors=True)


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
        said = f"**FAILED**: {self.failed}" if self.failed else f"{ways}; torture OK each time"
        return (f"| {self.qemu} | {self.series} | {self.guest} | {self.pause:.0f} | {self.gap:.0f} | "
                f"{self.kept >> 20} | {self.size >> 20} | {said} |")


HEAD = ("| QEMU | kernel | guest | pause, ms | longest gap of the heartbeat, ms | kept, MiB | "
        "file, MiB | restored, to the first beat |\n|---|---|---|---:|---:|---:|---:|---|")


def ways_of(spec: GuestSpec, wanted: Sequence[str]) -> list[str]:
    """The ways in which a guest can be restored."""
    return [way for way in wanted if not (way == "map" and spec.numa)]


def restore_spec(spec: GuestSpec, way: str) -> GuestSpec:
    """The guest that is started to be restored: what its RAM is made of is another thing, and so
    are its blocks' names."""
    if way == "map":
        return replace(spec, backing="plain")
    if spec.numa or spec.backing == "huge":
        return spec
    return replace(spec, backing={"plain": "", "": "plain"}.get(spec.backing, spec.backing))


def restore(tool: Path, live: Live, way: str) -> float:
    """Runs the guest on, tortures it; seconds to its first beat."""
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
    command: tuple[str, ...] = ()
    version = "10.0"
    if qemu:
        root = Root(f"qemu-{qemu}", SUITES[qemu], ["qemu-system-x86"])
        root.install()
        command, version = tuple(root.shared("qemu-system-x86_64")), qemu
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


def ours_left(tool: Path) -> list[int]:
    """Processes of this sonicshot."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(folder / "exe") == str(tool):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def wait_for_none(tool: Path) -> None:
    for _ in range(100):
        if not ours_left(tool):
            return
        time.sleep(0.05)
    raise CheckFailed(f"processes of sonicshot are left: {ours_left(tool)}")


def start_save(tool: Path, live: Live) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([str(tool), "qemu", "save", "--qmp", str(live.socket), "-o",
                             str(live.folder / "x.sonic"), "--json"],
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


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


def kill_ours(tool: Path, kernel: Kernel, rounds: int, random: Random) -> str:
    """Kills saves at moments drawn over the whole of one: the guest goes on."""
    spec = GuestSpec(kernel, backing="plain", stress=2, append=f"lab.beat={BEAT}")
    live = Live.boot(spec, HOME / f"kill-{os.getpid()}")
    try:
        whole = 0.0
        for _ in range(2):
            began = time.monotonic()
            live.save(tool)
            whole = time.monotonic() - began
            (live.folder / "x.sonic").unlink()
        beats = Beats(live.machine)
        complete, longest, resumed = 0, 0.0, 0.0
        for number in range(rounds):
            process = start_save(tool, live)
            # One in each of as many equal parts of its time, in the end a little beyond it.
            time.sleep(whole * 1.05 * (number + random.random()) / rounds)
            process.send_signal(signal.SIGKILL)
            killed = time.monotonic()
            # Whether it was the guest that waited, or all of the host that was busy.
            while live.machine.qmp.call("query-status")["status"] != "running":
                if time.monotonic() - killed > 10:
                    break
                time.sleep(0.005)
            running = time.monotonic() - killed
            resumed = max(resumed, running)
            process.wait()
            while beats.heard_since(killed) < 3:
                if time.monotonic() - killed > 10 or beats.failed:
                    raise CheckFailed(f"round {number}: no heartbeat after the kill; the guest is "
                                      f"{live.machine.qmp.call('query-status')}")
                time.sleep(0.005)
            # The first two may have been on their way.
            back = [at for at in beats.times if at > killed][2] - killed
            longest = max(longest, back)
            if back > BACK:
                raise CheckFailed(f"round {number}: the heartbeat came back after {back:.1f} s; QEMU "
                                  f"had the guest run after {running:.3f} s")
            wait_for_none(tool)
            complete += check_file(tool, live)
        beats.end()
        live.machine.ask("torture")
        return (f"{rounds} saves of {whole:.2f} s killed ({complete} were complete): QEMU had the "
                f"guest run after {resumed:.2f} s at most, its heartbeat was back after "
                f"{longest:.2f} s, no half file, no process left, torture OK")
    finally:
        live.end()
        shutil.rmtree(live.folder, ignore_errors=True)


def kill_qemu(tool: Path, kernel: Kernel, rounds: int, random: Random) -> str:
    """Kills QEMU at moments drawn over a save: an error that says so, and nothing is left."""
    said: dict[int, int] = {}
    whole = 0.6
    for number in range(rounds):
        spec = GuestSpec(kernel, backing="plain", mem=256, append=f"lab.beat={BEAT}")
        live = Live.boot(spec, HOME / f"kill-{os.getpid()}")
        try:
            if number == 0:
                began = time.monotonic()
                live.save(tool)
                whole = time.monotonic() - began
                (live.folder / "x.sonic").unlink()
            process = start_save(tool, live)
            time.sleep(whole * 1.05 * (number + random.random()) / rounds)
            live.machine.process.kill()
            try:
                _, stderr = process.communicate(timeout=30)
            except subprocess.TimeoutExpired as error:
                process.kill()
                raise CheckFailed(f"round {number}: the save does not end") from error
            whole_file = check_file(tool, live)
            if (process.returncode == 0) != whole_file:
                raise CheckFailed(f"round {number}: exit code {process.returncode}, and the file is "
                                  f"{'there' if whole_file else 'not there'}")
            if process.returncode not in (0, 1):
                raise CheckFailed(f"round {number}: exit code {process.returncode}: "
                                  f"{stderr.decode()[-400:]}")
            if process.returncode == 1:
                json.loads(stderr.decode().splitlines()[-1])
            said[process.returncode] = said.get(process.returncode, 0) + 1
            wait_for_none(tool)
        finally:
            live.end()
            shutil.rmtree(live.folder, ignore_errors=True)
    return (f"QEMU killed at {rounds} moments of a save: {said.get(1, 0)} ended with an error that "
            f"says so, {said.get(0, 0)} had all they needed; no half file, no process left")


def qemus_of(folder: Path) -> list[int]:
    """Processes of QEMU with a disk in this folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if "qemu-system" in os.readlink(process / "exe") and \
                    str(folder).encode() in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue
    return found


def kill_restores(tool: Path, kernel: Kernel, rounds: int, random: Random) -> str:
    """Kills restores by postcopy: a guest that lacks pages is ended, one that has all runs on."""
    spec = GuestSpec(kernel, backing="plain", append=f"lab.beat={BEAT}")
    live = Live.boot(spec, HOME / f"kill-{os.getpid()}")
    ended = went_on = 0
    try:
        live.save(tool, "--then", "stop")
        live.machine.quit()
        folder = live.folder / "restored"
        qemu = (str(tool), "qemu", "restore", str(live.folder / "x.sonic"), "--",
                "qemu-system-x86_64")
        for number in range(rounds):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            copy_disks(live.folder, folder)
            machine = None
            began = time.monotonic()
            wait = 0.4 * (number + random.random()) / rounds

            def kill() -> None:
                # Once QEMU is there: before, nothing is at stake.
                while not qemus_of(folder) and time.monotonic() - began < 10:
                    time.sleep(0.002)
                time.sleep(wait)
                for process in ours_left(tool):
                    if b"restore" in Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0"):
                        os.kill(process, signal.SIGKILL)

            killer = threading.Thread(target=kill)
            killer.start()
            try:
                machine = Machine(replace(spec, qemu=qemu), None, folder)
                killer.join()
                machine.wait("BEAT [0-9]", 5)
            except (LabError, OSError):
                killer.join()
            deadline = time.monotonic() + 20
            try:
                if machine and qemus_of(folder):
                    # What runs on has all its pages, and shows it.
                    machine.send("look")
                    while "LOOK-" not in machine.said():
                        if time.monotonic() > deadline:
                            raise GuestFailed("it does not look at what it has")
                        time.sleep(0.05)
                    if "LOOK-OK" not in machine.said():
                        raise CheckFailed(f"round {number}: {machine.said()[-300:]}")
                    went_on += 1
                    continue
                # Killed before its console was there: it is ended at once, or runs on.
                time.sleep(1)
                if qemus_of(folder):
                    went_on += 1
                else:
                    ended += 1
            except GuestFailed as error:
                while qemus_of(folder) and time.monotonic() < deadline:
                    time.sleep(0.05)
                if qemus_of(folder):
                    raise CheckFailed(f"round {number}: QEMU neither runs nor ends: {error}") \
                        from error
                ended += 1
            finally:
                for process in qemus_of(folder):
                    os.kill(process, signal.SIGKILL)
                wait_for_none(tool)
        return (f"{rounds} restores by postcopy killed: {ended} guests ended, {went_on} ran on with "
                "all they had, none hung")
    finally:
        live.end()
        shutil.rmtree(live.folder, ignore_errors=True)


def too_long(tool: Path, kernel: Kernel) -> str:
    """A pause that is cut short is no save, and the guest goes on."""
    spec = GuestSpec(kernel, backing="plain", stress=2, append=f"lab.beat={BEAT}")
    live = Live.boot(spec, HOME / f"long-{os.getpid()}")
    try:
        beats = Beats(live.machine)
        refused = 0
        for millis in (1, 2, 5, 10, 20, 40, 80):
            done = attempt(tool, "qemu", "save", "--qmp", live.socket, "-o",
                           live.folder / "x.sonic", "--json", "--max-pause", str(millis / 1000))
            now = time.monotonic()
            there = check_file(tool, live)
            if there != (done.returncode == 0) or done.returncode not in (0, 1):
                raise CheckFailed(f"--max-pause {millis} ms: exit code {done.returncode}, and the "
                                  f"file is {'there' if there else 'not there'}: {done.stderr}")
            refused += done.returncode == 1
            time.sleep(0.3)
            if not beats.heard_since(now):
                raise CheckFailed(f"--max-pause {millis} ms: the guest does not go on")
        if not refused:
            raise CheckFailed("no pause was too long")
        beats.end()
        live.machine.ask("torture")
        return f"--max-pause from 1 to 80 ms: {refused} of 7 saves given up, torture OK"
    finally:
        live.end()
        shutil.rmtree(live.folder, ignore_errors=True)


def paused_stays(tool: Path, kernel: Kernel) -> str:
    """A guest that is found paused stays so, and is restored so."""
    spec = GuestSpec(kernel, backing="plain", append=f"lab.beat={BEAT}")
    live = Live.boot(spec, HOME / f"paused-{os.getpid()}")
    try:
        live.machine.qmp.call("stop")
        report = live.save(tool)
        status = live.machine.qmp.call("query-status")["status"]
        if status != "paused" or not report["found_paused"]:
            raise CheckFailed(f"a guest that was found paused is {status}")
        live.machine.qmp.call("quit")
        live.machine.process.wait(20)
        folder = live.folder / "again"
        folder.mkdir()
        copy_disks(live.folder, folder)
        qemu = (str(tool), "qemu", "restore", str(live.folder / "x.sonic"), "--eager", "--",
                "qemu-system-x86_64")
        machine = Machine(replace(spec, qemu=qemu), None, folder)
        try:
            for _ in range(600):
                status = machine.qmp.call("query-status")["status"]
                if status != "inmigrate":
                    break
                time.sleep(0.05)
            if status != "paused":
                raise CheckFailed(f"saved paused, the guest is {status} when it is restored")
            machine.qmp.call("cont")
            machine.wait("BEAT [0-9]", 60)
            machine.ask("torture")
        finally:
            machine.quit()
        return "found paused: left paused, restored paused, torture OK after cont"
    finally:
        live.end()
        shutil.rmtree(live.folder, ignore_errors=True)


def live_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--kernels", default=kernels.ALL)
    parser.add_argument("--rows", default="", help="parts of their names, `;` between them")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--qemu", default="", choices=["", *SUITES],
                        help="an older one, unpacked into a folder")
    parser.add_argument("--kill", type=int, default=0,
                        help="kill so many saves, and a quarter as many QEMUs; no rows")
    parser.add_argument("--figures", action="store_true",
                        help="pauses and starts beside QEMU's own, as tables; --rows names guests")
    parser.add_argument("--rounds", type=int, default=3, help="of the figures")
    parser.add_argument("--quick", action="store_true", help="one guest, in two minutes")
    parser.add_argument("--seed", type=int, default=1)
    tool_argument(parser)


@command("live", "save guests while they run, and run them on", live_arguments)
def do_live(args: Namespace) -> None:
    """Guests saved while they run."""
    install_tools()
    tool = find_tool(args.sonicshot)
    HOME.mkdir(parents=True, exist_ok=True)
    random = Random(args.seed)
    # What is killed, and looked for, is of this run alone.
    binary = HOME / f"sonicshot-{os.getpid()}"
    shutil.copy(tool, binary)
    try:
        run(args, binary, random)
    finally:
        binary.unlink()


def run(args: Namespace, tool: Path, random: Random) -> None:
    """With a binary of its own."""
    if args.kill:
        kernel = kernels.fetch(args.kernels.split(",")[0])
        print(kill_ours(tool, kernel, args.kill, random), flush=True)
        print(kill_qemu(tool, kernel, max(args.kill // 4, 1), random), flush=True)
        print(kill_restores(tool, kernel, max(args.kill // 4, 1), random), flush=True)
        print(too_long(tool, kernel), flush=True)
        print(paused_stays(tool, kernel), flush=True)
        return
    if args.figures:
        # It is made of what is here.
        import live_figures
        names = [name for name in live_figures.GUESTS
                 if not args.rows or any(part.strip() in name for part in args.rows.split(";"))]
        live_figures.figures(tool, args.kernels.split(",")[-1], names, args.rounds)
        return
    ways = args.ways.split(",")
    if args.quick:
        kernel = kernels.fetch("6.1")
        rows = proofs(tool, ["6.1"], ["-m alone"], ways, "", args.seed)
        print(kill_ours(tool, kernel, 6, random), flush=True)
    else:
        names = [name for name in ROWS
                 if not args.rows or any(part.strip() in name for part in args.rows.split(";"))]
        rows = proofs(tool, args.kernels.split(","), names, ways, args.qemu, args.seed)
    text = "\n".join([HEAD, *(row.line() for row in rows)])
    (LAB / "live.md").write_text(text + "\n")
    print(text)
    if any(row.failed for row in rows):
        raise AlreadyTold
