"""Guests that are captured, and run on from what was captured."""

import json
import os
import shutil
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self

import kernels
from command import command
from debian import install_tools
from errors import LabError
from host import LAB, Json, relative, run
from machine import (DISKS, Machine, Monitor, copy_disks, deflate, guest_program, inflate, memory_of,
                     prepare, read_records)
from options import guest_arguments, guest_of
from spec import GuestSpec, Layout, Part

HOME = LAB / "captures"
# What a capture has of each form, in the order in which they are taken.
FORMS = {"raw": "device.state", "mapped": "mapped.ram", "stream": "stream.mig",
         "background": "background.mig", "bitmaps": "bitmaps.mig", "behind": "behind.ram"}
# The capabilities of all but the stream, which a guest may have more of.
CAPABILITIES = {"raw": "x-ignore-shared", "mapped": "mapped-ram", "background": "background-snapshot",
                "bitmaps": "dirty-bitmaps", "behind": "mapped-ram"}
# Where a mapped-ram file begins that is behind something else.
BEHIND = 1 << 20


@dataclass(frozen=True)
class Meta:
    """What is known of a capture: its `meta.json`."""

    name: str
    spec: GuestSpec
    layout: Layout
    # The version of the guest's program, where it is told.
    guest: str = ""
    # Seconds from the start, by what was reached then.
    times: Mapping[str, float] = field(default_factory=dict)
    # QEMU's word on the guest's memory, as `machine.Memory` has it.
    memory: Json = field(default_factory=dict)

    @property
    def release(self) -> str:
        return self.spec.kernel.release

    def write(self, folder: Path) -> None:
        record = {"name": self.name, "guest": self.guest, "spec": self.spec.to_json(),
                  "release": self.release, "layout": [part._asdict() for part in self.layout],
                  "times": dict(self.times), **self.memory}
        (folder / "meta.json").write_text(json.dumps(record, indent=1))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Of the capture in `folder`, also one of an earlier lab."""
        file = folder / "meta.json"
        if not file.exists():
            raise LabError(f"there is no capture in {folder}: it has no meta.json")
        record = json.loads(file.read_text())
        memory = {key: record[key] for key in ("blocks", "memory_devices", "ramblock", "mtree")
                  if key in record}
        return cls(record.get("name", folder.name), GuestSpec.from_json(record["spec"]),
                   tuple(Part(**part) for part in record.get("layout", [])),
                   record.get("guest", ""), record.get("times", {}), memory)


def is_there(folder: Path) -> bool:
    """Whether a folder has a capture of this lab's guest program: one of an older program would be
    stress-tested by that. Nothing else of its record is looked at."""
    file = folder / "meta.json"
    return file.exists() and json.loads(file.read_text()).get("guest") == guest_program()


def capture(spec: GuestSpec, name: str) -> Path:
    """Boots a guest, lets it fill its memory, stops it, and takes everything at that instant. A
    guest that is `live` is not stopped: it is busy while QEMU saves it, in one form alone. The
    folder; what is there already is not made again."""
    folder = HOME / name
    if is_there(folder):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    prepare(spec, folder)
    # Raw RAM is one file, and QEMU writes the rest of its state beside it.
    ram = folder / "live.raw" if "raw" in spec.forms else None
    machine = Machine(spec, ram, folder)
    try:
        qmp = machine.qmp
        if spec.dimm:
            machine.wait("PLUG", 300)
            plug(spec, qmp)
        machine.wait("READY", 900)
        times = {"ready": round(time.monotonic() - machine.started, 1)}
        if spec.balloon:
            inflate(qmp, (spec.mem - spec.balloon) << 20)
        if spec.squeezed:
            inflate(qmp, spec.squeezed << 20)
            deflate(qmp, spec.mem << 20)
        if spec.live:
            # Slow enough that the guest changes pages which have been saved.
            qmp.call("migrate-set-parameters", max_bandwidth=48 << 20, downtime_limit=100)
        else:
            qmp.call("stop")
            put_by_disks(folder)
            (folder / "registers").write_text(qmp.human("info registers -a"))
        memory = memory_of(qmp)
        if "elf" in spec.forms:
            qmp.call("dump-guest-memory", paging=False, protocol=f"file:{folder / 'dump.elf'}")
        take_forms(spec, qmp, ram, folder)
        if spec.live:
            put_by_disks(folder)
    finally:
        machine.quit()
    read_records(folder / "records.img.stop", folder)
    (folder / "live.raw").unlink(missing_ok=True)
    for disk in DISKS:
        (folder / f"{disk}.stop").rename(folder / disk)
    Meta(name, spec, spec.layout, guest_program(), times, memory.to_json()).write(folder)
    return folder


def plug(spec: GuestSpec, qmp: Monitor) -> None:
    """Plugs in the guest's DIMMs."""
    for number, mib in enumerate(spec.dimm):
        qmp.call("object-add", qom_type="memory-backend-ram", id=f"mem-dimm{number}",
                 size=mib << 20)
        qmp.call("device_add", driver="pc-dimm", id=f"dimm{number}", memdev=f"mem-dimm{number}")


def take_forms(spec: GuestSpec, qmp: Monitor, ram: Path | None, folder: Path) -> None:
    """Migrates the guest into each of its forms."""
    before = ""
    for form in (form for form in FORMS if form in spec.forms):
        if before:
            # QEMU does not migrate a guest twice that did not run between.
            qmp.call("cont")
            time.sleep(0.2)
            qmp.call("stop")
            qmp.no_capabilities(*(CAPABILITIES[form] for form in (before,) if form in CAPABILITIES))
        if form == "bitmaps":
            qmp.call("block-dirty-bitmap-add", node="d0", name="lab")
        capabilities = [CAPABILITIES[form]] if form in CAPABILITIES else spec.capabilities
        qmp.capabilities("events", *capabilities)
        file = folder / FORMS[form]
        qmp.call("migrate", uri={"stream": f"exec:cat > {file}",
                                 "behind": f"file:{file},offset={BEHIND}"}.get(form, f"file:{file}"))
        before = form
        if spec.live:
            time.sleep(12)
            qmp.call("migrate-set-parameters", downtime_limit=100_000)
        qmp.migrated()
        if form == "raw" and ram:
            run("cp", "--sparse=auto", ram, folder / "ram.raw")


def put_by_disks(folder: Path) -> None:
    """The disks as they are now."""
    for disk in DISKS:
        run("cp", "--sparse=always", folder / disk, folder / f"{disk}.stop")


def begins_at(migration: Path) -> int:
    """Where in the file QEMU's begins."""
    with open(migration, "rb") as file:
        return 0 if file.read(4) == b"QEVM" else BEHIND


def begins_with_capability(migration: Path, name: bytes) -> bool:
    with open(migration, "rb") as file:
        file.seek(begins_at(migration))
        return name in file.read(4096)


class Restored(NamedTuple):
    """Seconds that QEMU loaded, seconds from then to the guest's first beat, and the MiB that
    QEMU had resident then."""

    load: float
    beat: float
    rss: int


def restore(capture_folder: Path, ram: Path | None, ask: str | None = "torture",
            seconds: float = 1200, migration: Path | None = None) -> Restored:
    """Runs the captured guest on with `ram` as its memory, or, if `ram` is None, with fresh
    memory and the migration file at `migration`, mapped-ram or a stream. Raises if the guest,
    asked to `torture` or only to `look` (or not asked at all), finds anything wrong."""
    meta = Meta.read(capture_folder)
    if ram:
        migration = capture_folder / "device.state"
    if migration is None:
        raise LabError(f"{meta.name}: neither RAM nor a migration file to restore")
    folder = LAB / "restore" / f"{meta.name}-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    copy_disks(capture_folder, folder)
    machine = Machine(meta.spec, ram, folder, incoming=True)
    try:
        qmp = machine.qmp
        if ram:
            qmp.capabilities("events", "x-ignore-shared")
        elif begins_with_capability(migration, b"mapped-ram"):
            qmp.capabilities("events", "mapped-ram")
        elif migration.name == FORMS["bitmaps"]:
            qmp.capabilities("events", "dirty-bitmaps")
        else:
            qmp.capabilities("events")
        started = time.monotonic()
        # Before 8.2 there is no `file:`.
        how = "exec:cat " if meta.spec.qemu else "file:"
        at = begins_at(migration)
        qmp.call("migrate-incoming", uri=f"{how}{migration}" + (f",offset={at}" if at else ""))
        qmp.migrated()
        loaded = time.monotonic()
        qmp.call("cont")
        machine.wait("BEAT [0-9]", 120)
        done = Restored(loaded - started, time.monotonic() - loaded, machine.rss_mib())
        if ask:
            machine.ask(ask, seconds)
        return done
    finally:
        machine.quit()
        shutil.rmtree(folder, ignore_errors=True)


def capture_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--kernel", default="6.1",
                        help="5.10, 6.1, 6.12 or 7.2, with -amd64 for the general flavour")
    parser.add_argument("--mem", type=int, default=512, help="MiB")
    parser.add_argument("--cpu", default="qemu64")
    guest_arguments(parser)
    parser.add_argument("--garbage", default="random", choices=["random", "compressible"])
    parser.add_argument("--name")
    parser.add_argument("--mapped-ram", action="store_true", dest="mapped")
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--debug-symbols", action="store_true")


@command("capture", "boot a guest and take its memory", capture_arguments)
def do_capture(args: Namespace) -> None:
    install_tools()
    kernel = kernels.fetch(args.kernel, args.debug_symbols)
    more = [form for form in ("mapped", "stream") if getattr(args, form)]
    spec = guest_of(args, kernel, args.mem, args.cpu, args.garbage)
    # Raw RAM is one file.
    forms = ["elf"] if spec.several_blocks else ["raw", "elf"]
    folder = capture(spec.with_forms(*forms, *more), args.name or spec.name)
    print(relative(folder))


def restore_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--capture", required=True)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--ram", help="a raw RAM file: the guest runs in it")
    which.add_argument("--migration", help="a mapped-ram file or a stream, into fresh memory")
    parser.add_argument("--torture", action="store_true")


@command("restore", "run a captured guest on", restore_arguments)
def do_restore(args: Namespace) -> None:
    ram, migration = (f and Path(f).resolve() for f in (args.ram, args.migration))
    done = restore(HOME / args.capture, ram, "torture" if args.torture else None,
                   migration=migration)
    print(f"loaded in {done.load:.2f} s, first beat {done.beat:.2f} s later, "
          f"QEMU resident {done.rss} MiB"
          + (", TORTURE-OK" if args.torture else ""))
