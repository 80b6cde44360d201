"""A guest's processes as the library reads them in its memory, held against its own /proc."""

import re
import shutil
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import NamedTuple

import kernels
from captures import HOME, capture
from command import command
from debian import install_tools
from errors import AlreadyTold, CheckFailed, LabError
from host import ROOT, run
from spec import GuestSpec


class Task(NamedTuple):
    """A process: its number, its parent's, its address space in KiB, or 0, and its name."""

    pid: int
    parent: int
    kib: int
    name: str


def of_guest(folder: Path) -> list[Task]:
    """By the guest's /proc, just before it was stopped."""
    tasks = []
    for line in (folder / "tasks").read_text().splitlines():
        pid, parent, kib, name = line.split(" ", 3)
        tasks.append(Task(int(pid), int(parent), int(kib), name))
    return tasks


def of_memory(program: Path, ram: Path) -> list[Task]:
    """By the example, of the guest's memory."""
    tasks = []
    for line in run(program, ram).splitlines():
        found = re.fullmatch(r" *(\d+) +(\d+) +(?:(\d+) KiB|-)  (.*)", line)
        if not found:
            raise CheckFailed(f"{program.name} says {line!r}")
        pid, parent, kib, name = found.groups()
        tasks.append(Task(int(pid), int(parent), int(kib or 0), name))
    return tasks


def is_worker(task: Task) -> bool:
    """A thread of a work queue: /proc adds to its name what it does, and it comes and goes."""
    return task.name.startswith("kworker")


def lasting(tasks: list[Task]) -> list[Task]:
    """Those that are the same until the guest is stopped. The first process is the one that writes
    the record: it goes on, and takes more memory. Of a kernel thread /proc has more of its name than
    the kernel has in its task (`TASK_COMM_LEN`)."""
    return sorted(task._replace(kib=min(task.kib, 1) if task.pid == 1 else task.kib,
                                name=task.name if task.kib else task.name[:15])
                  for task in tasks if not is_worker(task))


def check(folder: Path, program: Path) -> str:
    """What was seen."""
    said, found = of_guest(folder), of_memory(program, folder / "ram.raw")
    wanted, there = lasting(said), lasting(found)
    if there != wanted:
        odd = sorted(set(wanted) ^ set(there))
        raise CheckFailed(f"memory and /proc differ in {odd[:10]}")
    workers = {task.pid for task in said if is_worker(task)}
    same = workers & {task.pid for task in found if is_worker(task)}
    if len(same) < len(workers) // 2:
        raise CheckFailed(f"of {len(workers)} workers {len(same)} were found")
    with_memory = sum(1 for task in there if task.kib)
    return (f"{len(there)} processes as in /proc, {with_memory} of them with an address space of "
            f"the same size; {len(same)} of {len(workers)} workers")


def find_program(given: Path | None) -> Path:
    """The example, made if it is not given."""
    if given:
        return given.resolve()
    run("cargo", "build", "--locked", "-p", "sonicshot-vmi", "--example", "processes", cwd=ROOT)
    return ROOT / "target" / "debug" / "examples" / "processes"


def tasks_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--kernels", default="6.1,7.2")
    parser.add_argument("--mem", type=int, default=512, help="MiB")
    parser.add_argument("--smp", type=int, default=2)
    parser.add_argument("--spin", type=int, default=7, help="processes beside the guest's own")
    parser.add_argument("--program", type=Path, help="the example; made, if it is not given")
    parser.add_argument("--keep", action="store_true", help="keep the captures")


@command("tasks", "hold a guest's processes, read in its memory, against its /proc",
         tasks_arguments)
def do_tasks(args: Namespace) -> None:
    install_tools()
    program = find_program(args.program)
    failed = 0
    for name in args.kernels.split(","):
        spec = GuestSpec(kernels.fetch(name), mem=args.mem, cpu="qemu64", smp=args.smp,
                         forms=("raw",), append=f"lab.spin={args.spin}")
        folder = HOME / f"tasks-{name}"
        try:
            said = check(capture(spec, folder.name), program)
            print(f"ok   {name}, Linux {spec.kernel.release}: {said}", flush=True)
        except LabError as error:
            failed += 1
            print(f"FAIL {name}: {error}", flush=True)
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    if failed:
        raise AlreadyTold
