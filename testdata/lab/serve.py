"""Real guests whose memory is served while they run: an unchanged QEMU, into which a small library is
preloaded (`serve_ram.c`) that registers the guest's RAM with a userfaultfd and sends it to
`sonicshot serve`. The devices' state comes by a stream without RAM."""

import hashlib
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import captures
import sandbox
from command import command
from debian import install_tools
from errors import CheckFailed
from host import LAB, allocated, run
from machine import Machine, copy_disks
from tool import find_tool, report_of, tool_argument

SOURCE = Path(__file__).with_name("serve_ram.c")
# What QEMU has its guest's memory in, as `machine.BACKINGS` has it.
BACKINGS = {"private": "", "memfd": "memfd"}


def build_library() -> Path:
    library = LAB / f"serve_ram-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}.so"
    if not library.exists():
        LAB.mkdir(parents=True, exist_ok=True)
        run("gcc", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-o", library, SOURCE, "-ldl")
    return library


class Server:
    """A `sonicshot serve` for one virtual machine."""

    def __init__(self, tool: Path, snapshot: Path, folder: Path, more: Sequence[str]) -> None:
        self.sockets = Path(tempfile.mkdtemp(prefix="sonicshot-"))
        self.socket, self.counters = self.sockets / "pages", self.sockets / "counters"
        self.log = folder / "serve.log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [str(tool), "serve", str(snapshot), "--socket", str(self.socket), "--vms", "1",
                 "--metrics", str(self.counters), *more],
                stdout=subprocess.PIPE, stderr=log, text=True)
        if not self.process.stdout or not self.process.stdout.readline().startswith("serving"):
            raise CheckFailed(f"sonicshot serve: {self.log.read_text()}")

    def metric(self, name: str) -> int:
        with socket.socket(socket.AF_UNIX) as stream:
            stream.connect(str(self.counters))
            stream.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            text = b"".join(iter(lambda: stream.recv(65536), b"")).decode()
        found = re.search(rf"^sonicshot_serve_{name} (\d+)$", text, re.M)
        if not found:
            raise CheckFailed(f"no counter {name} in {text}")
        return int(found[1])

    def ended(self) -> None:
        """Its virtual machine has ended, by itself: so does it, and has nothing to complain of."""
        code = self.process.wait(60)
        log = self.log.read_text()
        if code or "ERROR" in log or "WARN" in log:
            raise CheckFailed(f"sonicshot serve ended with {code}: {log[-1500:]}")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.sockets, ignore_errors=True)


class Served(NamedTuple):
    """What came of one guest: seconds from QEMU's start to its first beat, pages that it asked for,
    and MiB that were brought in by that and beforehand."""

    beat: float
    faults: int
    demanded: int
    ahead: int


def served(tool: Path, capture: Path, snapshot: Path, backing: str, more: Sequence[str]) -> Served:
    """Runs a captured guest on, in memory that is served, and stress-tests it."""
    meta = captures.Meta.read(capture)
    folder = LAB / "restore" / f"{meta.name}-{backing}-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    copy_disks(capture, folder)
    server = Server(tool, snapshot, folder, more)
    try:
        environment = {"LD_PRELOAD": str(build_library()), "SERVE_SOCKET": str(server.socket),
                       "SERVE_RAM": str(meta.spec.mem << 20),
                       "SERVE_LOW": str(meta.layout[0].len)}
        machine = Machine(replace(meta.spec, backing=BACKINGS[backing]), None, folder,
                          incoming=True, env=environment)
        try:
            machine.qmp.capabilities("events", "x-ignore-shared")
            machine.qmp.call("migrate-incoming", uri=f"file:{capture / 'device.state'}")
            machine.qmp.migrated()
            machine.qmp.call("cont")
            machine.wait("BEAT [0-9]", 120)
            beat = time.monotonic() - machine.started
            machine.ask("torture", 1500)
            done = Served(beat, server.metric("fault_seconds_count"),
                          server.metric("fault_bytes_total") >> 20,
                          server.metric("prefetch_bytes_total") >> 20)
        finally:
            machine.quit()
        server.ended()
    finally:
        server.close()
        shutil.rmtree(folder, ignore_errors=True)
    if not done.faults:
        raise CheckFailed(f"{meta.name}: nothing was asked for: it was not served")
    return done


def serve_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--kernels", default="6.1,6.12,microsandbox",
                        help="Debian's series, or a sandbox's")
    parser.add_argument("--mem", type=int, default=512, help="MiB")
    parser.add_argument("--smp", type=int, default=2)
    parser.add_argument("--backings", default=",".join(BACKINGS))
    parser.add_argument("--rm", action="store_true", help="remove the captures")
    tool_argument(parser)


@command("serve", "run guests on in memory that sonicshot serves", serve_arguments)
def do_serve(args: Namespace) -> None:
    """Captures a guest that is busy, saves its memory as a checkpoint, and runs it on in QEMUs whose
    memory is served from that: by demand alone, and with all of it brought in meanwhile."""
    install_tools()
    tool = find_tool(args.sonicshot)
    table = LAB / "serve.md"
    rows = ["| guest | memory | checkpoint | prefetch | first beat | pages asked for | MiB by demand, "
            "ahead | |", "|---|---|---:|---|---:|---:|---:|---|"]
    for name in args.kernels.split(","):
        spec = sandbox.guest(name, mem=args.mem, smp=args.smp).with_forms("raw")
        # It takes and gives back memory without rest, before and after.
        spec = replace(spec, stress=2 * args.smp)
        capture = captures.capture(spec, f"serve-{spec.name}")
        snapshot = LAB / f"serve-{spec.name}.sonic"
        report_of(run(tool, "save", capture / "ram.raw", "-o", snapshot, "--force", "--json"))
        for number, backing in enumerate(args.backings.split(",")):
            prefetch = ("set", "all")[number % 2]
            done = served(tool, capture, snapshot, backing, ("--prefetch", prefetch))
            row = (f"| {spec.kernel.release}, {spec.mem} MiB, {spec.smp} processors, {spec.machine} "
                   f"| {backing} | {allocated(snapshot) >> 20} MiB "
                   f"| {'nothing' if prefetch == 'set' else prefetch} | {done.beat:.2f} s "
                   f"| {done.faults:,} | {done.demanded}, {done.ahead} | stress test OK |")
            print(row, flush=True)
            rows.append(row)
        snapshot.unlink()
        if args.rm:
            shutil.rmtree(capture)
    table.write_text("\n".join(rows) + "\n")
