"""What `sonicshot qemu` promises beside saving and restoring: clones of one file do not see each other,
a pause has an end, who was paused stays so, and what cannot be saved is refused in words."""

import hashlib
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from errors import CheckFailed, LabError
from host import allocated, attempt
from kernels import Kernel
from live_guest import BEAT, HOME, WAYS, Beats, Live, check_file
from machine import Machine, copy_disks, inflate
from spec import GuestSpec, VirtioMem
from tool import Refusal, call

# What a balloon leaves its guest, MiB.
LEFT = 224
# With both ways in which a guest gives memory back.
BALLOON = ("-device", "virtio-balloon-pci,free-page-reporting=on")
# Memory that is a device: what QEMU is told, and what it calls it.
DEVICES = {
    "dimm": ("-object", "memory-backend-ram,id=extra,size=128M",
             "-device", "pc-dimm,id=dimm0,memdev=extra"),
    "nvdimm": ("-machine", "nvdimm=on", "-object", "memory-backend-ram,id=extra,size=128M",
               "-device", "nvdimm,id=dimm0,memdev=extra"),
    "virtio-mem": (),
}


def state(file: Path) -> tuple[str, int, int]:
    """What a file has in it, its length, and how much of it is on the disk."""
    with open(file, "rb") as source:
        digest = hashlib.file_digest(source, "sha256").hexdigest()
    return digest, file.stat().st_size, allocated(file)


def start(tool: Path, live: Live, spec: GuestSpec, name: str, *words: str) -> Machine:
    """Runs the saved guest on, with disks of its own."""
    folder = live.folder / name
    folder.mkdir()
    copy_disks(live.folder, folder)
    qemu = (str(tool), "qemu", "restore", str(live.folder / "x.sonic"), *words, "--",
            *(live.spec.qemu or ("qemu-system-x86_64",)))
    return Machine(replace(spec, qemu=qemu), None, folder)


def memory_of(machine: Machine, spec: GuestSpec, file: Path) -> str:
    """All of a guest's RAM, by QEMU's own word."""
    machine.qmp.call("pmemsave", val=0, size=spec.mem << 20, filename=str(file))
    with open(file, "rb") as source:
        digest = hashlib.file_digest(source, "sha256").hexdigest()
    file.unlink()
    return digest


def clones(tool: Path, kernel: Kernel, qemu: Sequence[str]) -> str:
    """Two guests of one file, of which one gives its memory back: the file and the other guest are
    as they were."""
    spec = GuestSpec(kernel, backing="plain", append=f"lab.beat={BEAT}", more=BALLOON,
                     qemu=tuple(qemu))
    live = Live.boot(spec, HOME / f"clones-{os.getpid()}")
    raw = live.folder / "ram.raw"
    running: list[Machine] = []
    try:
        live.save(tool, "--then", "stop")
        live.machine.quit()
        for name in ("one", "other"):
            machine = start(tool, live, spec, name, "--map", str(raw))
            running.append(machine)
            machine.wait("BEAT [0-9]", 120)
            if name == "one":
                before = state(raw)
        one, other = running
        other.qmp.call("stop")
        of_other = memory_of(other, spec, live.folder / "memory")
        inflate(one.qmp, LEFT << 20)
        if state(raw) != before:
            raise CheckFailed(f"a balloon has changed the file: {before}, {state(raw)}")
        one.wait("BEAT [0-9]", 120)
        one.qmp.call("balloon", value=spec.mem << 20)
        if state(raw) != before:
            raise CheckFailed(f"the file has changed under its clones: {before}, {state(raw)}")
        if memory_of(other, spec, live.folder / "memory") != of_other:
            raise CheckFailed("a clone's memory has changed with another one's balloon")
        one.ask("torture")
        other.qmp.call("cont")
        other.wait("BEAT [0-9]", 120)
        other.ask("torture")
        if state(raw) != before:
            raise CheckFailed("the file has changed under the stress-tested guests")
        return (f"two clones by --map, QEMU {live.version}: the balloon of one took "
                f"{spec.mem - LEFT} MiB (free page reporting on), the file ({before[2] >> 20} MiB) and "
                "all of the other's memory were as before, byte for byte; stress test OK in both, the "
                "file as before")
    finally:
        for machine in running:
            machine.quit()
        live.end()
        shutil.rmtree(live.folder, ignore_errors=True)


def refused_map(tool: Path, live: Live, spec: GuestSpec) -> str:
    """What is said where a guest may not have a mapped file."""
    try:
        start(tool, live, spec, "refused", "--map", str(live.folder / "ram.raw")).quit()
    except (LabError, OSError):
        pass
    log = live.folder / "refused" / "qemu.log"
    for _ in range(100):
        if "punch holes" in log.read_text():
            return log.read_text()
        time.sleep(0.1)
    raise CheckFailed(f"--map is not refused: {log.read_text()[-600:]}")


def old_map(tool: Path, kernel: Kernel, qemu: Sequence[str]) -> str:
    """A QEMU that opens a mapped file for writing: refused if the guest could punch holes into it,
    wherever that is said; a guest that could not leaves the file as it is."""
    plain = GuestSpec(kernel, backing="plain", append=f"lab.beat={BEAT}", qemu=tuple(qemu))
    for more in (BALLOON, ()):
        live = Live.boot(replace(plain, more=more), HOME / f"old-{os.getpid()}")
        raw = live.folder / "ram.raw"
        try:
            live.save(tool, "--then", "stop")
            live.machine.quit()
            if more:
                refused_map(tool, live, live.spec)
                shutil.rmtree(live.folder / "refused")
                # Not on the command line.
                config = live.folder / "devices.cfg"
                config.write_text('[device]\n  driver = "virtio-balloon-pci"\n'
                                  '  free-page-reporting = "on"\n')
                refused_map(tool, live, replace(plain, more=("-readconfig", str(config))))
                continue
            machine = start(tool, live, plain, "one", "--map", str(raw))
            try:
                machine.wait("BEAT [0-9]", 120)
                before = state(raw)
                machine.ask("torture")
            finally:
                machine.quit()
            if state(raw) != before:
                raise CheckFailed("the file has changed under a guest of an old QEMU")
        finally:
            live.end()
            shutil.rmtree(live.folder, ignore_errors=True)
    return (f"--map on QEMU {live.version}: a balloon is refused, on the command line and in a file that "
            "it names; without one stress test OK, and the file is as before")


def devices(tool: Path, kernel: Kernel) -> str:
    """Memory that is a device: refused in words, and the guest runs on."""
    said = []
    for kind, more in DEVICES.items():
        # What has such memory at boot has large records.
        spec = GuestSpec(kernel, backing="plain", append=f"lab.beat={BEAT}", cold_dimm=(128,))
        if kind == "virtio-mem":
            spec = replace(spec, virtio_mem=VirtioMem(256, 0))
        else:
            sizes = f"{spec.mem}M,slots=4,maxmem={spec.mem + 512}M"
            spec = replace(spec, more=("-m", sizes, *more))
        live = Live.boot(spec, HOME / f"devices-{os.getpid()}")
        try:
            beats = Beats(live.machine)
            file = live.folder / "x.sonic"
            done = call(tool, "qemu", "save", "--qmp", live.socket, "-o", file)
            if not isinstance(done, Refusal) or kind not in done.reason:
                raise CheckFailed(f"{kind}: not refused by its name: {done}")
            now = time.monotonic()
            time.sleep(0.5)
            if file.exists() or not beats.heard_since(now):
                raise CheckFailed(f"{kind}: refused, and there is a file or no heartbeat")
            beats.end()
            said.append(kind)
        finally:
            live.end()
            shutil.rmtree(live.folder, ignore_errors=True)
    return f"{', '.join(said)}: each refused by its name, no file, the guest runs on"


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
        return f"--max-pause from 1 to 80 ms: {refused} of 7 saves given up, stress test OK"
    finally:
        live.end()
        shutil.rmtree(live.folder, ignore_errors=True)


def paused_stays(tool: Path, kernel: Kernel) -> str:
    """A guest that is found paused stays so, and is restored so in each way; and so is one that ran, if
    `-S` says it."""
    spec = GuestSpec(kernel, backing="plain", append=f"lab.beat={BEAT}")
    for found_paused in (True, False):
        live = Live.boot(spec, HOME / f"paused-{os.getpid()}")
        try:
            if found_paused:
                live.machine.qmp.call("stop")
            report = live.save(tool, *(() if found_paused else ("--then", "stop")))
            status = live.machine.qmp.call("query-status")["status"]
            if status != "paused" or report["found_paused"] != found_paused:
                raise CheckFailed(f"a guest that was saved is {status}: {report}")
            live.machine.qmp.call("quit")
            live.machine.process.wait(20)
            more = () if found_paused else ("-S",)
            for way, words in WAYS.items():
                words = [*words, str(live.folder / "ram.raw")] if way == "map" else words
                machine = start(tool, live, replace(spec, more=more), way, *words)
                try:
                    check_paused(machine, f"{way}, {'saved paused' if found_paused else '-S'}")
                finally:
                    machine.quit()
        finally:
            live.end()
            shutil.rmtree(live.folder, ignore_errors=True)
    return ("found paused: left paused, restored paused in each way; with -S restored paused in each "
            "way; stress test OK after cont each time")


def check_paused(machine: Machine, what: str) -> None:
    """It was restored and waits; when it is told to run, it does."""
    log = machine.folder / "qemu.log"
    for _ in range(600):
        status = machine.qmp.call("query-status")["status"]
        if status != "inmigrate" and "restored " in log.read_text():
            break
        time.sleep(0.05)
    # Had it run, it would be heard.
    time.sleep(0.5)
    status = machine.qmp.call("query-status")["status"]
    if status not in ("paused", "prelaunch") or "BEAT" in machine.said():
        raise CheckFailed(f"{what}: the guest is {status} when it is restored")
    machine.qmp.call("cont")
    machine.wait("BEAT [0-9]", 60)
    machine.ask("torture")
