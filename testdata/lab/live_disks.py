"""A guest's disk, pinned by `sonicshot qemu save --disk` between the stop and the copy of its memory: the
guest runs on with an overlay, and is restored with the pinned image under another."""

import os
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path

from errors import CheckFailed
from host import attempt, run
from kernels import Kernel
from live_checks import state
from live_guest import BEAT, HOME, Live, restore_spec
from machine import Machine
from soft import reads_of
from spec import GuestSpec

# What the guest is told, and what the checkpoint calls its first disk.
DISK = "d0"
# Saves that are killed.
KILLS = 8
WAYS = {"eager": ("--eager",), "postcopy": ("--disk-immutable",)}


def runs_on(live: Live, told: str) -> None:
    """That the guest runs."""
    status = live.machine.qmp.call("query-status")["status"]
    if status != "running":
        raise CheckFailed(f"{told}: the guest is {status}")
    live.machine.wait("BEAT [0-9]", 60)


def image_of(live: Live) -> str:
    """What QEMU writes to."""
    for device in live.machine.qmp.call("query-block"):
        if device["device"] == DISK:
            return str(device["inserted"]["image"]["filename"])
    raise CheckFailed("QEMU tells nothing of the guest's disk")


def failures(tool: Path, live: Live) -> None:
    """Whatever fails, the guest runs on, and it is told what became of the disk."""
    base = image_of(live)
    output = live.folder / "x.sonic"

    def refuse(words: tuple[str, ...], code: int, told: str) -> str:
        done = attempt(tool, "qemu", "save", "--qmp", live.socket, "-o", output, *words)
        if done.returncode != code or told not in done.stderr or output.exists():
            raise CheckFailed(f"{words}: {done.returncode}, {done.stderr}")
        runs_on(live, f"{words}")
        return done.stderr

    overlay = live.folder / "never.qcow2"
    for name, path, code, told in (
            ("vda", overlay, 3, "no disk `vda`"),
            (DISK, live.folder / "nowhere" / "x.qcow2", 1, "transaction"),
            (DISK, live.folder / "files.img", 1, "exists")):
        refuse(("--disk", f"{name}={path}"), code, told)
        if image_of(live) != base or overlay.exists():
            raise CheckFailed(f"{told}: QEMU writes to {image_of(live)}")
    # A pause that is too short for it, after the disk was pinned or before.
    said = refuse(("--disk", f"{DISK}={overlay}", "--max-pause", "0.02"), 1, "")
    now = image_of(live)
    if now == str(overlay) and ("block-commit" not in said or str(overlay) not in said):
        raise CheckFailed(f"QEMU writes to {overlay}, and it is not said: {said}")
    if now not in (base, str(overlay)):
        raise CheckFailed(f"QEMU writes to {now}")


def killed(tool: Path, live: Live, count: int) -> int:
    """Kills saves at instants spread over one: the guest runs on, with the disk that it had or with the
    overlay. How often it is the overlay."""
    output = live.folder / "x.sonic"
    before = time.monotonic()
    live.save(tool, "--disk", f"{DISK}={live.folder / 'whole.qcow2'}")
    takes = time.monotonic() - before
    output.unlink()
    pinned = 0
    for number in range(count):
        had, overlay = image_of(live), live.folder / f"killed-{number}.qcow2"
        save = subprocess.Popen([tool, "qemu", "save", "--qmp", live.socket, "-o", output,
                                 "--disk", f"{DISK}={overlay}"],
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(takes * (number + 0.5) / count)
        save.kill()
        save.wait()
        # The watchdog is another process.
        time.sleep(2)
        runs_on(live, f"kill {number}")
        now = image_of(live)
        if now not in (had, str(overlay)):
            raise CheckFailed(f"kill {number}: QEMU writes to {now}")
        pinned += now == str(overlay)
        output.unlink(missing_ok=True)
    return pinned


def restored(tool: Path, live: Live, base: Path, form: str, way: str) -> int:
    """Runs the saved guest on, over the pinned image; how often it read its disk for its files."""
    folder = live.folder / way
    folder.mkdir()
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", form, folder / "files.img")
    shutil.copy(live.folder / "records.img", folder)
    qemu = (str(tool), "qemu", "restore", str(live.folder / "x.sonic"),
            "--disk", f"{DISK}={base}", *WAYS[way], "--", "qemu-system-x86_64")
    machine = Machine(replace(restore_spec(live.spec, way), qemu=qemu), None, folder)
    try:
        machine.wait("BEAT [0-9]", 120)
        before = reads_of(machine)
        machine.ask("look")
        reads = reads_of(machine) - before
        machine.ask("torture")
        return reads
    finally:
        machine.quit()
        shutil.rmtree(folder)


def pinned(tool: Path, kernel: Kernel, form: str) -> str:
    """One guest, whose disk is of this format."""
    spec = GuestSpec(kernel, backing="plain", stress=2, append=f"lab.beat={BEAT}", disk_format=form)
    live = Live.boot(spec, HOME / f"disks-{os.getpid()}")
    try:
        failures(tool, live)
        overlays = killed(tool, live, KILLS)
        base = Path(image_of(live))
        # The lowest is as it was made; overlays are qcow2.
        below = "qcow2" if base.suffix == ".qcow2" else form
        without = live.save(tool)
        if without["disk_pages"]:
            raise CheckFailed("pages are on a disk that was not given")
        overlay = live.folder / "since.qcow2"
        report = live.save(tool, "--disk", f"{DISK}={overlay}")
        shutil.copy(live.folder / "records.img", live.folder / "records.pinned")
        if report["disk_pages"] < 1000:
            raise CheckFailed(f"only {report['disk_pages']} pages are on the disk")
        runs_on(live, "after the save")
        pinned_now = state(base)[:2]
        live.machine.ask("torture")
        if state(base)[:2] != pinned_now:
            raise CheckFailed("the pinned image has changed under the guest that ran on")
        live.machine.quit()
        (live.folder / "records.pinned").rename(live.folder / "records.img")
        run(tool, "verify", live.folder / "x.sonic", "--disk", f"{DISK}={base}")
        reads = {way: restored(tool, live, base, below, way) for way in WAYS}
        if any(reads.values()) or state(base)[:2] != pinned_now:
            raise CheckFailed(f"the guests read their disk {reads} times, or changed the pinned image")
        return (f"{kernel.series}, {form}: {report['disk_pages']:,} pages on the pinned disk, checkpoint "
                f"{report['file_bytes'] >> 20} MiB (without {without['file_bytes'] >> 20}), pause "
                f"{report['pause_seconds'] * 1000:.0f} ms (without "
                f"{without['pause_seconds'] * 1000:.0f}), of it the overlay "
                f"{report['pause_parts']['pin'] * 1000:.0f} ms; the guest ran on with the overlay, torture "
                f"OK; restored by {' and '.join(WAYS)} over the pinned image, 0 reads of the disk for all "
                "files, torture OK; the image as it was; failures left the guest running, and told of "
                f"the disk; of {KILLS} saves that were killed {overlays} left it on the overlay, the "
                "others as it was, and each the guest running")
    finally:
        live.end()
        shutil.rmtree(live.folder, ignore_errors=True)
