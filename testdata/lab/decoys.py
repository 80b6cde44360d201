"""Finding the kernel that owns the memory: among pages that pass for its VMCOREINFO, after reboots
that leave earlier kernels in memory, and by the page tables that its processors run on."""

import json
import re
import shutil
import subprocess
import time
from random import Random

import kernels
import machine
import proof
from errors import CheckFailed
from kernels import LAB


def spec_of(series, mem, cpu, smp, append):
    # On a busy host an emulated timer may be too late for the kernel's test of it.
    append = f"no_timer_check {append}"
    return {"kernel": kernels.fetch(series, False), "mem": mem, "cpu": cpu, "smp": smp,
            "machine": "pc", "garbage": "random", "append": append}


class Guest:
    """A running guest whose RAM is a file."""

    def __init__(self, spec, name):
        self.folder = LAB / "decoys" / name
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        machine.prepare(spec, self.folder)
        self.ram = self.folder / "live.raw"
        self.machine = machine.Machine(spec, self.ram, self.folder)
        self.qmp = self.machine.qmp

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.machine.quit()
        shutil.rmtree(self.folder, ignore_errors=True)

    def ready(self):
        self.machine.wait("READY", 900)

    def stop(self):
        self.qmp.call("stop")

    def go_on(self):
        self.qmp.call("cont")

    def inspect(self, tool, *more):
        """The report and the seconds it took, or the exit code and what was said."""
        started = time.monotonic()
        done = subprocess.run([str(a) for a in (tool, "inspect", self.ram, "--json", "--pfns",
                                                self.folder / "pfns.tsv", "--force", *more)],
                              capture_output=True, text=True)
        took = time.monotonic() - started
        if done.returncode:
            error = json.loads(done.stderr.splitlines()[-1])
            return None, f"exit code {done.returncode}: {'; '.join([error['error'], *error['causes']])}"
        return json.loads(done.stdout), took

    def against_kernel(self):
        """What is dropped, held against the guest's own word of a moment before."""
        machine.read_records(self.folder / "records.img", self.folder)
        found = proof.against_kernel(self.folder, proof.read_tsv(self.folder / "pfns.tsv"), None)
        if found["share"] < 99:
            raise CheckFailed(f"only {found['share']:.2f} % of the free frames were found: {found}")
        return found

    def prune_and_torture(self, tool):
        """Prunes the RAM under the stopped guest, which then must pass its torture."""
        done = subprocess.run([str(a) for a in (tool, "prune", self.ram, "--in-place", "--live-ok",
                                                "--json")], capture_output=True, text=True)
        if done.returncode:
            raise CheckFailed(f"prune: {done.stderr.strip()[-600:]}")
        self.go_on()
        self.machine.wait("BEAT [0-9]", 120)
        self.machine.send("torture")
        line = self.machine.wait("TORTURE-", 1200)
        console = (self.folder / "console.log").read_text(errors="replace")
        if "TORTURE-OK" not in line or "-FAIL" in console:
            raise CheckFailed(line)
        return json.loads(done.stdout)["dropped_bytes"] >> 20

    def processors(self):
        """The control registers of each processor, and in which ring it was."""
        text = self.qmp.call("human-monitor-command", command_line="info registers -a")
        found = []
        for part in re.split(r"CPU#\d+", text)[1:]:
            value = {name: int(hexes, 16) for name, hexes in
                     re.findall(r"\b(CR0|CR3|CR4|EFER)=([0-9a-f]+)", part)}
            value["CPL"] = int(re.search(r"CPL=(\d)", part)[1])
            value["HLT"] = int(re.search(r"HLT=(\d)", part)[1])
            found.append(value)
        return found


def do_decoys(args, find_tool):
    """A process fills memory with decoys; the kernel is found all the same, and fast."""
    kernels.install_tools()
    tool = find_tool(args.sonicshot)
    for series in args.kernels.split(","):
        took = {}
        for count in (0, args.count):
            spec = spec_of(series, args.mem, args.cpu, 1, f"lab.decoys={count}")
            with Guest(spec, f"decoys-{series}-{count}") as guest:
                guest.ready()
                guest.stop()
                runs = []
                for _ in range(5):
                    report, time_or_error = guest.inspect(tool)
                    if not report:
                        raise CheckFailed(f"{series}, {count} decoys: {time_or_error}")
                    runs.append(time_or_error)
                took[count] = min(runs)
                found = guest.against_kernel()
                dropped = guest.prune_and_torture(tool)
        cost = took[args.count] - took[0]
        print(f"ok   {series}: {args.count} decoys cost {cost:.3f} s of {took[args.count]:.3f} s; "
              f"{found['found']}/{found['kpf_buddy']} buddy frames, {found['changed']} dropped in "
              f"use by kpageflags, {dropped} MiB pruned, torture OK", flush=True)
        if cost >= 1:
            raise CheckFailed("too slow")


def do_reboot(args, find_tool):
    """Guests that reboot again and again in the same memory: the kernel that runs is found."""
    kernels.install_tools()
    tool = find_tool(args.sonicshot)
    failed = 0
    for series in args.kernels.split(","):
        for append in ("", "nokaslr"):
            told, bad = [], []
            # What earlier kernels left is not to be written over.
            spec = spec_of(series, args.mem, args.cpu, args.smp, f"lab.empty=1 {append}")
            with Guest(spec, f"reboot-{series}-{append or 'kaslr'}-{args.mem}") as guest:
                guest.ready()
                for number in range(args.rounds):
                    if number % 2:
                        guest.machine.send("reboot")
                    else:
                        guest.qmp.call("system_reset")
                    guest.ready()
                    guest.stop()
                    report, time_or_error = guest.inspect(tool)
                    if report:
                        found = guest.against_kernel()
                        told.append(found["changed"])
                        if args.keep:
                            shutil.copy(guest.ram, LAB / f"reboot-{series}-{append}-{number}.raw")
                    else:
                        bad.append(f"round {number}: {time_or_error}")
                        if args.keep:
                            shutil.copy(guest.ram, LAB / f"bad-{series}-{append}-{number}.raw")
                    if number + 1 < args.rounds or not report:
                        guest.go_on()
                tortured = "not tortured"
                if report:
                    tortured = f"{guest.prune_and_torture(tool)} MiB pruned at last, torture OK"
            failed += len(bad)
            print(f"{'FAIL' if bad else 'ok  '} {series} {append or 'KASLR'}: {args.rounds} reboots, "
                  f"{len(bad)} refused, {sum(told)} frames dropped in use by kpageflags, {tortured}",
                  *bad, sep="\n     ", flush=True)
    if failed:
        raise CheckFailed(f"{failed} refused")


# What the processors do when they are stopped: command line, processor, processors.
KINDS = {
    "idle": ("", "qemu64", 2),
    "busy": ("lab.stress=4", "qemu64", 2),
    "in user space, PTI": ("lab.spin=4 pti=on", "qemu64", 2),
    "in user space, no PTI": ("lab.spin=4 nopti", "qemu64", 2),
    "busy, PTI": ("lab.stress=4 pti=on", "qemu64", 2),
    "in user space, 5 levels": ("lab.spin=4", "max", 2),
    "in user space, 5 levels, PTI": ("lab.spin=2 lab.stress=2 pti=on", "max", 2),
}


def do_processors(args, find_tool):
    """Whatever a guest's processors do, each is known as the kernel's by its CR3; and not by
    another."""
    kernels.install_tools()
    tool = find_tool(args.sonicshot)
    failed = 0
    for series in args.kernels.split(","):
        for kind, (append, cpu, smp) in KINDS.items():
            if args.kinds and not any(part in kind for part in args.kinds.split(";")):
                continue
            if cpu == "max" and series == "5.10":
                # Not built with five levels.
                continue
            random = Random(args.seed)
            seen = {"user": 0, "halted": 0, "kernel": 0, "twins": 0, "refused": 0, "roots": set()}
            spec = spec_of(series, args.mem, cpu, smp, append)
            with Guest(spec, f"processors-{series}") as guest:
                guest.ready()
                for number in range(args.stops):
                    time.sleep(random.random() / 2)
                    guest.stop()
                    for cpu_number, state in enumerate(guest.processors()):
                        where = "user" if state["CPL"] else "halted" if state["HLT"] else "kernel"
                        seen[where] += 1
                        seen["twins"] += where == "user" and state["CR3"] >> 12 & 1
                        seen["roots"].add(state["CR3"] >> 12)
                        report, error = guest.inspect(tool, "--cr3", hex(state["CR3"]))
                        if not report:
                            seen["refused"] += 1
                            print(f"     stop {number}, processor {cpu_number} ({where}, CR3 "
                                  f"{state['CR3']:#x}): {error}", flush=True)
                    # A page that is no top-level page table.
                    report, error = guest.inspect(tool, "--cr3", hex(0x100000))
                    if report or "exit code 5" not in error:
                        raise CheckFailed(f"CR3 0x100000 was believed: {report or error}")
                    guest.go_on()
            failed += seen["refused"]
            print(f"{'FAIL' if seen['refused'] else 'ok  '} {series}, {kind}: {args.stops} stops; "
                  f"{seen['user']} processors in user space ({seen['twins']} with bit 12), "
                  f"{seen['kernel']} in the kernel, {seen['halted']} halted, "
                  f"{len(seen['roots'])} page tables, {seen['refused']} refused", flush=True)
    if failed:
        raise CheckFailed(f"{failed} refused")


def add_commands(commands, find_tool):
    def command(name, run, text):
        parser = commands.add_parser(name, help=text)
        parser.add_argument("--kernels", default=",".join(kernels.SUITES))
        parser.add_argument("--mem", type=int, default=512, help="MiB")
        parser.add_argument("--cpu", default="qemu64")
        parser.add_argument("--sonicshot", help="the binary; built if not given")
        parser.set_defaults(run=lambda args: run(args, find_tool))
        return parser

    parser = command("decoys", do_decoys, "pages that pass for VMCOREINFO switch nothing off")
    parser.add_argument("--count", type=int, default=10000)
    parser = command("reboot", do_reboot, "guests that reboot in the same memory")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smp", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="keep the memory of each round")
    parser = command("processors", do_processors, "each processor's CR3, whatever it does")
    parser.add_argument("--stops", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", default="", help="parts of their names, `;` between them")
