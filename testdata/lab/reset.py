"""A kernel that is gone: reset, kexec and crash kernel, stopped at random instants.

RAM outlives a reset, and the records of the kernel that is gone stay consistent in it until its
successor writes over them. Every free frame of a guest is given a signature of its own; then the
guest is reset, or its kernel replaced, and stopped again and again. A frame that has lost its
signature belongs to the new owner, and must not be dropped."""

import json
import mmap
import os
import re
import shutil
import time
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import captures
import firmware
import kernels
import sandbox
from captures import Meta
from command import command
from debian import install_tools
from errors import AlreadyTold, CheckFailed
from frames import FREE, Run, frames_of, ram_frames, read_tsv
from host import LAB, Json, attempt, run
from machine import Machine, Monitor, prepare
from spec import PAGE, GuestSpec, Layout
from tool import find_tool, knowledge_argument, limited, report_of, tool_argument

# MiB of patterns that a kernel's successor fills, a good deal less than it.
ANON_AFTER = 4
# Where more frames than these are in use by one and not by the other, records are not those of the
# kernel that was ready: its successor never fills as much.
OTHERS = 4096
# What is in use, and for what.
USED = ("kernel", "slab", "page_table", "anonymous", "page_cache_clean", "page_cache_dirty", "shmem")
# Where RAM files are while guests run in them.
FAST = Path("/dev/shm") if Path("/dev/shm").is_dir() else LAB

# Kind -> what ends the kernel: a QMP command on the stopped guest, or a word on its console.
KINDS: dict[str, str | None] = {
    "reset": None,          # QMP system_reset
    "reboot": "reboot",     # reboot(RB_AUTOBOOT)
    "sysrq": "sysrq-b",     # at once, the kernel takes no note of it
    "triple": "sysrq-b",    # the same by a triple fault (reboot=t)
    "panic": "sysrq-c",     # a panic that reboots (panic=-1)
    "kexec": "kexec",
    "crash": "sysrq-c",
}


class Case(NamedTuple):
    """A guest, and what ends its kernel (of `KINDS`) or what it does (of `RUNNING`)."""

    series: str
    smp: int
    kaslr: bool
    kind: str
    # MiB; what fits the kind if it is not told.
    mem: int | None = None

    @property
    def randomised(self) -> str:
        return "kaslr" if self.kaslr else "nokaslr"


def spec_of(series: str, smp: int, kaslr: bool, kind: str, mem: int | None = None,
            more: Mapping[str, Any] | None = None) -> GuestSpec:
    """`more`: the fields of the spec that are to be others."""
    # Under load an emulated timer looks broken to a kernel that tests it.
    append = "no_timer_check" + ("" if kaslr else " nokaslr")
    spec = sandbox.guest(series, mem=mem or 256, smp=smp, forms=("raw",))
    if kind == "kexec":
        append += " lab.kexec=1"
        spec = replace(spec, mem=mem or 512, next="console=ttyS0 quiet panic=-1 no_timer_check "
                       f"lab.anon={ANON_AFTER} " + ("" if kaslr else "nokaslr"))
    elif kind == "crash":
        append += " lab.kexec=2 crashkernel=160M"
        spec = replace(spec, mem=mem or 640, next="console=ttyS0 quiet panic=-1 no_timer_check "
                       f"nr_cpus=1 lab.anon={ANON_AFTER} " + ("" if kaslr else "nokaslr"))
    elif kind == "triple":
        append += " reboot=t"
    return replace(spec, append=append, **(more or {}))


def machine_of(name: str, machine: str, no_sleep: bool) -> Json:
    """The fields of a spec for another firmware than SeaBIOS, or another machine than `pc`."""
    if machine == "microvm":
        # Of raw memory nothing is told where a kernel has no VMCOREINFO.
        return {"machine": machine, "forms": ("raw", "elf")}
    more: Json = {"machine": machine, "more": firmware.sleep(machine, not no_sleep)}
    if name != "seabios":
        # What is free is told by a dump that has the processors' registers: of raw memory some
        # is kept.
        more |= {"firmware": name, "forms": ("raw", "elf")}
    return more


def base_of(series: str, smp: int, kaslr: bool, kind: str, mem: int | None = None,
            more: Mapping[str, Any] | None = None, tag: str = "") -> Path:
    """A guest at its READY, its free frames signed: a folder, made once."""
    spec = spec_of(series, smp, kaslr, kind, mem, more)
    same = {"kexec": "kexec", "crash": "crash", "triple": "triple"}.get(kind, "reset")
    name = (f"reset-{series}-{spec.mem}-smp{smp}-{'kaslr' if kaslr else 'nokaslr'}-{same}"
            f"{tag}")
    if spec.firmware or spec.machine != "pc":
        name += f"-{spec.firmware or 'seabios'}-{spec.machine}"
    return captures.capture(spec, name)


def signature(pfn: int) -> bytes:
    """The content of a signed frame: no page of another, and nothing that a guest writes."""
    word = (0x51674E0000000000 | pfn) ^ 0x5A5A5A5A
    return word.to_bytes(8, "little") * (PAGE // 8)


def used(runs: Iterable[Run]) -> set[int]:
    """What is in use by a kernel's records, and for what it is known."""
    return frames_of(runs, *USED)


class Frames:
    """Frame numbers and places in the RAM file."""

    def __init__(self, layout: Layout) -> None:
        self.parts = ram_frames(layout)

    def offset(self, pfn: int) -> int:
        for first, end, at in self.parts:
            if first <= pfn < end:
                return at + (pfn - first) * PAGE
        raise CheckFailed(f"frame {pfn} is not RAM")


def sign(tool: Path, folder: Path) -> tuple[list[int], Frames]:
    """Signs every free frame of the capture once; returns the frames."""
    frames = Frames(Meta.read(folder).layout)
    listed, signed = folder / "signed.tsv", folder / "signed.raw"
    if not signed.exists():
        part = folder / "signed.part"
        run("cp", "--sparse=auto", folder / "ram.raw", part)
        told = folder / "dump.elf"
        run(tool, "inspect", told if told.exists() else folder / "ram.raw", "--pfns", listed)
        with open(part, "r+b") as file:
            for pfn in frames_of(read_tsv(listed), *FREE):
                file.seek(frames.offset(pfn))
                file.write(signature(pfn))
        part.rename(signed)
    return sorted(frames_of(read_tsv(listed), *FREE)), frames


def written(ram: Path, pfns: Iterable[int], frames: Frames) -> tuple[set[int], set[int]]:
    """Of the signed frames, those that have another content now; and of them those not zero."""
    zero = bytes(PAGE)
    gone: set[int] = set()
    full: set[int] = set()
    with open(ram, "rb") as file, \
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        for pfn in pfns:
            at = frames.offset(pfn)
            page = memory[at:at + PAGE]
            if page != signature(pfn):
                gone.add(pfn)
                if page != zero:
                    full.add(pfn)
    return gone, full


def ranges(pfns: Iterable[int]) -> list[list[int]]:
    """Frames as ranges: the first, and the one behind the last."""
    out: list[list[int]] = []
    for pfn in sorted(pfns):
        if out and out[-1][1] == pfn:
            out[-1][1] += 1
        else:
            out.append([pfn, pfn + 1])
    return out


def text(found: Sequence[Sequence[int]]) -> str:
    return " ".join(f"{a:#x}-{b:#x}" if b - a > 1 else f"{a:#x}" for a, b in found)


def registers(qmp: Monitor) -> list[Json]:
    """Of each processor, as the log has them."""
    cpus = []
    for part in re.split(r"CPU#\d+", qmp.human("info registers -a"))[1:]:
        def find(name: str, part: str = part) -> int:
            got = re.search(rf"\b{name} ?=([0-9a-f]+)", part)
            return int(got[1], 16) if got else 0
        cpus.append({"rip": find("RIP") or find("EIP"), "cr0": find("CR0"), "cr3": find("CR3"),
                     "efer": find("EFER"), "hlt": bool(re.search(r"HLT=1", part)),
                     "cs": find("CS"), "smm": bool(re.search(r"SMM=1", part))})
    return cpus


def stage(cpus: Sequence[Json]) -> str:
    """What the first processor is doing, by its registers."""
    cpu = cpus[0]
    if not cpu["cr0"] & 1:
        return "real mode"
    if not cpu["cr0"] >> 31:
        return "protected mode"
    if not cpu["efer"] & 0x400:
        return "paging"
    if cpu["rip"] < 1 << 32:
        return "long mode, low"
    return "kernel" if cpu["rip"] >> 63 else "user"


class Round:
    """One guest that is taken from its READY through the end of its kernel."""

    def __init__(self, tool: Path, most: str | None, folder: Path, kind: str, work: Path) -> None:
        """What is free at first is told by all that is known, later by no more than `most`."""
        self.tool, self.kind, self.work = limited(tool, most), kind, work
        pfns, self.frames = sign(tool, folder)
        self.pfns = set(pfns)
        meta = Meta.read(folder)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        for disk in ("files.img", "records.img", "next.img"):
            if (folder / disk).exists():
                run("cp", "--sparse=always", folder / disk, work / disk)
        self.ram = work / "ram.raw"
        run("cp", "--sparse=auto", folder / "signed.raw", self.ram)
        # The next boot reads a command line of its own: it fills less memory.
        after = replace(meta.spec, anon=ANON_AFTER)
        self.machine = Machine(after, self.ram, work, incoming=True)
        self.qmp = self.machine.qmp
        self.qmp.capabilities("events", "x-ignore-shared")
        self.qmp.call("migrate-incoming", uri=f"file:{folder / 'device.state'}")
        self.qmp.migrated()
        self.qmp.no_capabilities("x-ignore-shared")
        self.used = used(read_tsv(folder / "signed.tsv"))
        self.ran, self.taken = 0.0, False

    def trigger(self) -> None:
        """Ends the guest's kernel."""
        word = KINDS[self.kind]
        if word is None:
            self.qmp.call("system_reset")
            time.sleep(0.05)
        else:
            self.machine.send(word)

    def run_for(self, seconds: float) -> None:
        self.qmp.call("cont")
        time.sleep(seconds)
        self.qmp.call("stop")
        self.ran += seconds

    def judge(self, path: Path, nonzero: set[int]) -> Json:
        """What the tool says of the stopped guest's memory in `path`."""
        pfns = self.work / "pfns.tsv"
        pfns.unlink(missing_ok=True)
        started = time.monotonic()
        done = attempt(self.tool, "inspect", path, "--json", "--pfns", pfns, "--force")
        took = time.monotonic() - started
        if done.returncode:
            return {"rc": done.returncode, "said": done.stderr.strip(), "took": took}
        runs = read_tsv(pfns)
        dropped = frames_of(runs, *FREE)
        report = report_of(done.stdout)
        got: Json = {"rc": 0, "notes": report.get("notes"), "dropped": len(dropped), "took": took}
        # The old kernel stands still since it was ready, or nearly: what was in use then is, by
        # its records. Another kernel uses other frames. What is in its free frames is nobody's;
        # that it is, is shown by taking them away and letting it run on. Where little is known,
        # what is in use is not told, and what is free tells whose records these are.
        told = used(runs)
        got["differ"] = len(self.used ^ told if told else self.pfns ^ dropped)
        got["owner"] = "new" if got["differ"] >= OTHERS else "old"
        lost = dropped & nonzero if got["owner"] == "old" else set()
        got.update(lost=len(lost), which=ranges(lost))
        if got["owner"] == "new" and path == self.ram:
            self.take(dropped)
        return got

    def take(self, pfns: Iterable[int]) -> None:
        """Zeroes frames of the stopped guest, as a prune under it would."""
        with open(self.ram, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
            for pfn in pfns:
                at = self.frames.offset(pfn)
                memory[at:at + PAGE] = bytes(PAGE)
        self.taken = True

    def run_on(self) -> None:
        """Lets the new kernel come up, with what was taken from it gone."""
        # The old kernel's last words are not the new one's.
        with self.machine.arrived:
            self.machine.lines = [line for line in self.machine.lines if "panic" not in line]
        self.qmp.call("cont")
        self.machine.wait("READY|BEAT", 300)

    def look(self, mapped: bool) -> Json:
        """What the stopped guest is at, what it has written, and what the tool says of it."""
        cpus = registers(self.qmp)
        gone, full = written(self.ram, self.pfns, self.frames)
        found: Json = {"at": round(self.ran, 3), "stage": stage(cpus), "cpus": cpus,
                 "written": len(gone), "where": ranges(gone),
                 "raw": self.judge(self.ram, full)}
        if mapped:
            file = migrate(self.qmp, self.work / "mapped.ram")
            found["mapped"] = self.judge(file, full)
        return found

    def quit(self) -> None:
        self.machine.quit()
        shutil.rmtree(self.work, ignore_errors=True)


# What a guest that runs normally does, or has done: orders, and the answer that is waited for.
RUNNING: dict[str, list[tuple[str | None, str]]] = {
    "idle": [],
    "user space": [("spin", "SPINNING")],
    "user space with PTI": [("spin", "SPINNING")],
    "loaded": [],
    "rebooted": [("reboot", "READY")],
    "reset": [("QMP system_reset", "READY")],
    "after kexec": [("kexec", "READY")],
    "slept": [("sleep", "QMP system_wakeup"), (None, "AWAKE")],
    "a processor never started": [],
}


def running(tool: Path, todo: Sequence[Case], stops: int, seed: int, mapped: bool, log: Path,
            each: int = 10, more: Mapping[str, Any] | None = None) -> Counter[str]:
    """Stops guests that run normally; nothing of them may be refused. `more`: as of `spec_of`."""
    random = Random(seed)
    sums = Counter({"stops": 0, "refused": 0})
    number = 0
    with open(log, "a") as out:
        while sums["stops"] < stops:
            case = todo[number % len(todo)]
            series, smp, kaslr, what, _ = case
            number += 1
            spec = spec_of(series, smp, kaslr, "kexec" if what == "after kexec" else "reset",
                           None, more)
            if what == "a processor never started":
                spec = replace(spec, smp=max(smp, 2), append=f"{spec.append} maxcpus=1")
            if what == "user space with PTI":
                spec = replace(spec, append=f"{spec.append} pti=on")
            if what == "loaded":
                spec = replace(spec, stress=3)
            work = FAST / f"sonicshot-running-{os.getpid()}"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            prepare(spec, work)
            ram = work / "live.raw"
            guest = Machine(spec, ram, work)
            try:
                guest.wait("READY", 300)
                for order, answer in RUNNING[what]:
                    if order and order.startswith("QMP"):
                        guest.qmp.call(order.split()[1])
                    elif order:
                        guest.send(order)
                    if answer.startswith("QMP"):
                        for _ in range(300):
                            if guest.qmp.call("query-status")["status"] == "suspended":
                                break
                            time.sleep(0.1)
                        guest.qmp.call(answer.split()[1])
                    else:
                        guest.wait(answer, 300)
                for _ in range(each):
                    time.sleep(random.uniform(0, 1))
                    guest.qmp.call("stop")
                    found: Json = {"kernel": series, "smp": smp, "kaslr": kaslr, "what": what,
                                   "firmware": spec.firmware,
                                   "stage": stage(registers(guest.qmp))}
                    files = [ram]
                    if mapped:
                        files.append(migrate(guest.qmp, work / "mapped.ram"))
                    for file in files:
                        done = attempt(tool, "inspect", file, "--json", "--force")
                        found[file.name] = {"rc": done.returncode, "said": done.stderr.strip()}
                        if done.returncode:
                            print(f"{series} smp{smp} {what} {file.name}: refused: "
                                  f"{done.stderr[:600]}", flush=True)
                            sums["refused"] += 1
                        elif file == ram:
                            found["notes"] = report_of(done.stdout).get("notes")
                    guest.qmp.call("cont")
                    sums["stops"] += 1
                    sums[what] += 1
                    out.write(json.dumps(found) + "\n")
                    out.flush()
                print(f"{series} smp{smp} {case.randomised} {what}: {each} stops; "
                      f"{found.get('notes')}", flush=True)
            finally:
                guest.quit()
                shutil.rmtree(work, ignore_errors=True)
    return sums


def migrate(qmp: Monitor, file: Path) -> Path:
    """Saves a stopped guest as a mapped-ram file."""
    file.unlink(missing_ok=True)
    qmp.capabilities("events", "mapped-ram")
    qmp.call("migrate", uri=f"file:{file}")
    qmp.migrated()
    qmp.no_capabilities("mapped-ram")
    return file


def line(found: Json, form: str = "raw") -> str:
    """A stop, in words."""
    got = found[form]
    if got["rc"]:
        said = f"refused ({got['rc']}): {got['said'][:int(os.environ.get('LAB_WIDTH', 150))]}"
    else:
        said = f"pruned by the {got['owner']} kernel, {got['lost']} lost {text(got['which'])[:300]}"
    return f"{found['at']:.2f} s {found['stage']:14} {found['written']:6} written; {said}"


class Keep(NamedTuple):
    """A folder for the RAM of stops: of those that lost something, or of all."""

    folder: Path
    all: bool


def resets(tool: Path, todo: Sequence[Case], stops: int, seconds: float, seed: int, mapped: bool,
           keep: Keep | None, log: Path, each: int = 8, more: Mapping[str, Any] | None = None,
           tag: str = "", most: str | None = None) -> Counter[str]:
    """Takes `stops` stops in all, dealt round. `more`: as of `spec_of`; `tag` names it. No more than
    `most` is known of the guests."""
    random = Random(seed)
    sums = Counter({"stops": 0})
    number = 0
    with open(log, "a") as out:
        while sums["stops"] < stops:
            series, smp, kaslr, kind, mem = todo[number % len(todo)]
            number += 1
            folder = base_of(series, smp, kaslr, kind, mem, more, tag)
            instants = sorted(random.uniform(0, seconds) for _ in range(each))
            round_ = Round(tool, most, folder, kind, FAST / f"sonicshot-reset-{os.getpid()}")
            try:
                round_.trigger()
                before = 0.0
                for instant in instants:
                    round_.run_for(instant - before)
                    before = instant
                    found = round_.look(mapped)
                    found.update(guest=folder.name, kind=kind)
                    for form in ("raw", "mapped") if mapped else ("raw",):
                        got = found[form]
                        key = f"{form} " + (f"exit {got['rc']}" if got["rc"] else
                                            f"pruned by the {got['owner']} kernel")
                        sums[key] += 1
                        sums[f"{form} frames lost"] += got.get("lost", 0)
                        if got.get("lost"):
                            sums[f"{form} stops with loss"] += 1
                    sums["stops"] += 1
                    print(f"{folder.name} {kind} {line(found)}", flush=True)
                    if mapped:
                        print(f"    mapped-ram: {line(found, 'mapped')}", flush=True)
                    if keep and (found["raw"].get("lost") or keep.all):
                        name = f"{folder.name}-{kind}-{number}-{found['at']:.2f}.raw"
                        found["kept"] = name
                        run("cp", "--sparse=always", round_.ram, keep.folder / name)
                    out.write(json.dumps(found) + "\n")
                    out.flush()
                if round_.taken:
                    round_.run_on()
                    sums["ran on"] += 1
            finally:
                round_.quit()
    return sums


def reset_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--kernels", default=kernels.ALL)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--running", nargs="?", const=",".join(RUNNING),
                        help="guests that run normally instead: nothing may be refused")
    parser.add_argument("--smp", default="1,2,4")
    parser.add_argument("--kaslr", default="kaslr,nokaslr")
    parser.add_argument("--mem", type=int, help="MiB; 256, and 512 with a crash kernel")
    parser.add_argument("--stops", type=int, default=200)
    parser.add_argument("--each", type=int, default=8, help="stops of one guest")
    parser.add_argument("--seconds", type=float, default=3.5, help="the last stop at most so late")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mapped-ram", action="store_true", dest="mapped")
    parser.add_argument("--keep", help="a folder for the RAM of stops that lost something")
    parser.add_argument("--keep-all", action="store_true")
    parser.add_argument("--firmware", choices=["seabios", *firmware.KNOWN], default="seabios")
    parser.add_argument("--machine", choices=["pc", "q35", "microvm"], default="pc")
    parser.add_argument("--no-sleep", action="store_true", help="a machine that cannot sleep")
    parser.add_argument("--name", default="reset")
    tool_argument(parser)
    knowledge_argument(parser)


@command("reset", "stop guests after reset, kexec and crash", reset_arguments)
def do_reset(args: Namespace) -> None:
    """Ends kernels by reset, kexec and crash, and stops what comes after them."""
    install_tools()
    kinds = args.running or args.kinds
    todo = [Case(series, int(smp), kaslr == "kaslr", kind, args.mem)
            for kaslr in args.kaslr.split(",") for smp in args.smp.split(",")
            for kind in kinds.split(",") for series in args.kernels.split(",")]
    Random(args.seed).shuffle(todo)
    log = LAB / f"{args.name}.jsonl"
    tool = find_tool(args.sonicshot)
    more = machine_of(args.firmware, args.machine, args.no_sleep)
    if args.running:
        sums = running(limited(tool, args.at_most), todo, args.stops, args.seed, args.mapped, log, args.each, more)
        wrong = sums["refused"] > 0
    else:
        keep = Keep(Path(args.keep), args.keep_all) if args.keep else None
        sums = resets(tool, todo, args.stops, args.seconds, args.seed, args.mapped, keep, log,
                      args.each, more, "-no-sleep" if args.no_sleep else "", args.at_most)
        wrong = any("lost" in key and value for key, value in sums.items())
    print(", ".join(f"{key}: {value}" for key, value in sums.items()))
    if wrong:
        raise AlreadyTold
