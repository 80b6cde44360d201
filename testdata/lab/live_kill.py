"""Kills saves, QEMUs and restores at drawn moments: a guest is never left paused, no file is half, and
no process is left."""

import json
import os
import shutil
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from errors import CheckFailed, GuestFailed, LabError
from kernels import Kernel
from live_guest import BEAT, HOME, Beats, Live, check_file
from machine import Machine, copy_disks
from spec import GuestSpec

# A guest that was killed under must beat again within so many seconds.
BACK = 2.0


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


# What a save does one after the other: all but the first and the last in the pause.
PHASES = ("before", "devices", "classes", "copy", "after")


@dataclass(frozen=True)
class Course:
    """How long the phases of a save take, by the reports of some; seconds."""

    # From the start of the process to the stop of the guest.
    before: float
    # Each of the pause, from its beginning (QEMU's event STOP) on.
    pause: Mapping[str, tuple[float, float]]
    # From its end on.
    after: float

    @classmethod
    def of(cls, live: Live, tool: Path, saves: int) -> "Course":
        found = []
        for _ in range(saves):
            began = time.monotonic()
            report = live.save(tool)
            whole = time.monotonic() - began
            (live.folder / "x.sonic").unlink()
            parts = report["pause_parts"]
            lengths = {"devices": parts["pin"] + parts["devices"],
                       "classes": parts["reread"] + parts["classify"],
                       "copy": parts["copy"] + parts["resume"]}
            # The process starts before the first word that its report counts from.
            start = whole - report["seconds"]
            found.append({"before": start + report["before_pause_seconds"],
                          "after": report["seconds"] - report["before_pause_seconds"]
                          - report["pause_seconds"], **lengths})
        middle = {name: statistics.median(one[name] for one in found) for name in found[0]}
        pause, at = {}, 0.0
        for name in PHASES[1:-1]:
            pause[name] = (at, at + middle[name])
            at += middle[name]
        return cls(middle["before"], pause, middle["after"])

    @property
    def paused(self) -> float:
        return max(end for _, end in self.pause.values())

    def wait(self, live: Live, phase: str, since: float, random: Random) -> None:
        """Until a moment of a phase of a save that has just begun."""
        drawn = random.random()
        qmp = live.machine.qmp
        if phase == "before":
            time.sleep(self.before * drawn)
        elif phase == "after":
            # A little beyond the end, too.
            time.sleep(max(qmp.heard("RESUME", since) - time.time(), 0) + self.after * 1.05 * drawn)
        else:
            begin, end = self.pause[phase]
            at = qmp.heard("STOP", since) + begin + (end - begin) * drawn
            # A pause is too short to sleep in it.
            while time.time() < at:
                pass

    def phase_of(self, live: Live, since: float, killed: float) -> str:
        """What a save was at when it, or its QEMU, was killed, by the events of QEMU."""
        qmp = live.machine.qmp
        stop, resume = qmp.last("STOP", since), qmp.last("RESUME", since)
        if stop is None or killed < stop:
            return "before"
        if resume is not None and resume < killed:
            return "after"
        for name, (_, end) in self.pause.items():
            if killed - stop < end:
                return name
        return PHASES[-2]

    def __str__(self) -> str:
        return f"{self.before:.2f} s before the pause, {self.paused * 1000:.0f} ms of it, " \
               f"{self.after:.2f} s after"


def wanted(rounds: int, hits: Mapping[str, int]) -> str:
    """The phase of which most kills are missing."""
    return max(PHASES, key=lambda phase: rounds // len(PHASES) - hits.get(phase, 0))


def counted(hits: Mapping[str, int]) -> str:
    return ", ".join(f"{phase} {hits.get(phase, 0)}" for phase in PHASES)


def kill_ours(tool: Path, kernel: Kernel, rounds: int, random: Random) -> str:
    """Kills saves at moments drawn in each phase of one: the guest goes on."""
    spec = GuestSpec(kernel, backing="plain", stress=2, append=f"lab.beat={BEAT}")
    live = Live.boot(spec, HOME / f"kill-{os.getpid()}")
    try:
        course = Course.of(live, tool, 3)
        beats = Beats(live.machine)
        complete, longest, resumed = 0, 0.0, 0.0
        hits: dict[str, int] = {}
        for number in range(rounds):
            since = time.time()
            process = start_save(tool, live)
            course.wait(live, wanted(rounds, hits), since, random)
            at = time.time()
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
            phase = course.phase_of(live, since, at)
            hits[phase] = hits.get(phase, 0) + 1
            while beats.heard_since(killed) < 3:
                if time.monotonic() - killed > 10 or beats.failed:
                    raise CheckFailed(f"round {number}, {phase}: no heartbeat after the kill; the "
                                      f"guest is {live.machine.qmp.call('query-status')}")
                time.sleep(0.005)
            # The first two may have been on their way.
            back = [at for at in beats.times if at > killed][2] - killed
            longest = max(longest, back)
            if back > BACK:
                raise CheckFailed(f"round {number}, {phase}: the heartbeat came back after {back:.1f} "
                                  f"s; QEMU had the guest run after {running:.3f} s")
            wait_for_none(tool)
            complete += check_file(tool, live)
        beats.end()
        live.machine.ask("torture")
        return (f"{rounds} saves of {course} killed: {counted(hits)} ({complete} were complete): QEMU "
                f"had the guest run after {resumed:.2f} s at most, its heartbeat was back after "
                f"{longest:.2f} s, no half file, no process left, stress test OK")
    finally:
        live.end()
        shutil.rmtree(live.folder, ignore_errors=True)


def kill_qemu(tool: Path, kernel: Kernel, rounds: int, random: Random) -> str:
    """Kills QEMU at moments drawn in each phase of a save: an error that says so, and nothing is
    left."""
    said: dict[int, int] = {}
    hits: dict[str, int] = {}
    course = None
    for number in range(rounds):
        spec = GuestSpec(kernel, backing="plain", mem=256, append=f"lab.beat={BEAT}")
        live = Live.boot(spec, HOME / f"kill-{os.getpid()}")
        try:
            if course is None:
                course = Course.of(live, tool, 3)
            since = time.time()
            process = start_save(tool, live)
            course.wait(live, wanted(rounds, hits), since, random)
            at = time.time()
            live.machine.process.kill()
            live.machine.qmp.rest()
            phase = course.phase_of(live, since, at)
            hits[phase] = hits.get(phase, 0) + 1
            try:
                _, stderr = process.communicate(timeout=30)
            except subprocess.TimeoutExpired as error:
                process.kill()
                raise CheckFailed(f"round {number}, {phase}: the save does not end") from error
            whole_file = check_file(tool, live)
            if (process.returncode == 0) != whole_file:
                raise CheckFailed(f"round {number}, {phase}: exit code {process.returncode}, and the "
                                  f"file is {'there' if whole_file else 'not there'}")
            if process.returncode not in (0, 1):
                raise CheckFailed(f"round {number}, {phase}: exit code {process.returncode}: "
                                  f"{stderr.decode()[-400:]}")
            if process.returncode == 1:
                json.loads(stderr.decode().splitlines()[-1])
            said[process.returncode] = said.get(process.returncode, 0) + 1
            wait_for_none(tool)
        finally:
            live.end()
            shutil.rmtree(live.folder, ignore_errors=True)
    return (f"QEMU killed at {rounds} moments of a save of {course}: {counted(hits)}; "
            f"{said.get(1, 0)} ended with an error that says so, {said.get(0, 0)} had all they needed; "
            "no half file, no process left")


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
