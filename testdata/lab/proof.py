"""Holds what sonicshot says of a captured guest against the guest's own kernel, against other
readers, and against the guest itself: restored from a pruned memory, it must pass its stress test."""

import array
import json
import re
import shutil
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self

import captures
import kernels
from captures import Meta
from command import command
from debian import install_tools
from errors import AlreadyTold, CheckFailed, LabError
from frames import (DROPPED, Run, frames_of, offset_of, only_ram, ram_frames, read_tsv,
                    same_but_dropped)
from host import LAB, Json, Word, allocated, attempt, run
from options import guest_arguments, guest_of
from spec import PAGE, Layout
from tool import find_tool, report_of, tool_argument

# Bits of /proc/kpageflags (include/uapi/linux/kernel-page-flags.h).
BITS = {"LRU": 5, "SLAB": 7, "BUDDY": 10, "MMAP": 11, "ANON": 12, "COMPOUND_HEAD": 15,
        "COMPOUND_TAIL": 16, "HUGE": 17, "THP": 22, "OFFLINE": 23, "PGTABLE": 26, "RESERVED": 32}
IN_USE = sum(1 << BITS[b] for b in ("LRU", "SLAB", "MMAP", "ANON", "COMPOUND_HEAD",
                                    "COMPOUND_TAIL", "HUGE", "THP", "PGTABLE", "RESERVED"))


def words(path: Path) -> "array.array[int]":
    data = array.array("Q")
    data.frombytes(path.read_bytes())
    return data


def inspect(tool: Path, dump: Path, symbols: Sequence[Path], out: Path, *more: Word
            ) -> tuple[Json, list[Run]]:
    """What sonicshot says of a dump, and its frames."""
    line: list[Word] = [tool, "inspect", dump, "--json", "--pfns", out, "--force", *more]
    for file in symbols:
        line += ["--symbols", file]
    done = attempt(*line)
    if done.returncode:
        raise CheckFailed(f"inspect {dump.name}: {done.stderr.strip()}")
    return report_of(done.stdout), read_tsv(out)


class Agreement(NamedTuple):
    """What sonicshot calls free beside the kernel's own word, in frames."""

    # In the buddy allocator by the kernel, and of them those that we found.
    kpf_buddy: int
    found: int
    pcp: int
    # Dropped, and in use a moment before; and those of them that no second reader finds free.
    changed: int
    unexplained: int
    # Free by the kernel and by a second reader, and not dropped.
    missed: int

    @property
    def share(self) -> float:
        """Percent of the kernel's that were found."""
        return 100 * self.found / max(1, self.kpf_buddy)

    def to_json(self) -> Json:
        return self._asdict() | {"share": self.share}

    @classmethod
    def from_json(cls, record: Json) -> Self:
        return cls(**{key: record[key] for key in cls._fields})


def against_kernel(folder: Path, runs: Sequence[Run], free_at_stop: Collection[int] | None
                   ) -> Agreement:
    """Against /proc/kpageflags, written milliseconds before the stop."""
    flags = words(folder / "kpageflags.bin")
    counts = words(folder / "kpagecount.bin")
    buddy = {pfn for pfn, f in enumerate(flags) if f >> BITS["BUDDY"] & 1}
    ours = frames_of(runs, "free_buddy")
    pcp = frames_of(runs, "free_pcp")
    wrong = []
    for pfn in ours | pcp | frames_of(runs, "offline"):
        used = flags[pfn] & IN_USE or (pfn < len(counts) and counts[pfn])
        offline = flags[pfn] >> BITS["OFFLINE"] & 1
        if used and not offline and not flags[pfn] >> BITS["BUDDY"] & 1:
            wrong.append(pfn)
    # A frame that was in use when the flags were written and free at the stop is explained when
    # a second reader finds it free in the same dump.
    unexplained = [pfn for pfn in wrong if free_at_stop is None or pfn not in free_at_stop]
    # Free when the flags were written, allocated before the stop: explained likewise.
    lost = buddy - ours - pcp
    missed = [pfn for pfn in lost if free_at_stop is not None and pfn in free_at_stop]
    return Agreement(len(buddy), len(buddy & ours), len(pcp), len(wrong), len(unexplained),
                     len(missed))


def check_zero(folder: Path, runs: Sequence[Run], layout: Layout) -> None:
    """Every frame that is called zero is zero."""
    with open(folder / "ram.raw", "rb") as ram:
        zero = bytes(PAGE)
        for pfn in frames_of(runs, "zero"):
            ram.seek(offset_of(pfn, layout))
            if ram.read(PAGE) != zero:
                raise CheckFailed(f"frame {pfn} is called zero and is not")


DRGN = r"""
import sys, json
from drgn import Program
from drgn.helpers.linux.list import list_for_each_entry
from drgn.helpers.linux.mm import page_to_pfn
from drgn.helpers.linux.mmzone import for_each_online_pgdat
from drgn.helpers.linux.percpu import per_cpu_ptr
from drgn.helpers.linux.cpumask import for_each_possible_cpu
prog = Program()
prog.set_core_dump(sys.argv[1])
prog.load_debug_info([sys.argv[2]])
buddy, pcp = [], []
for pgdat in for_each_online_pgdat(prog):
    for zone in pgdat.node_zones:
        if not zone.spanned_pages.value_():
            continue
        for order in range(len(zone.free_area)):
            for head in zone.free_area[order].free_list:
                for page in list_for_each_entry("struct page", head.address_of_(), "lru"):
                    buddy.append((page_to_pfn(page).value_(), order))
        try:
            pageset, at = zone.per_cpu_pageset, lambda p: p
        except AttributeError:
            pageset, at = zone.pageset, lambda p: p.pcp.address_of_()
        for cpu in for_each_possible_cpu(prog):
            pages = at(per_cpu_ptr(pageset, cpu))
            n = len(pages.lists)
            for index in range(n):
                order = 0 if n <= 3 else index // 3 if index < 12 else 9
                for page in list_for_each_entry("struct page", pages.lists[index].address_of_(), "lru"):
                    pcp.append((page_to_pfn(page).value_(), order))
json.dump({"buddy": buddy, "pcp": pcp}, sys.stdout)
"""


class Free(NamedTuple):
    """Free frames: in the buddy allocator, and on per-CPU lists."""

    buddy: set[int]
    pcp: set[int]


def drgn(folder: Path, vmlinux: Path) -> Free:
    """The free frames by drgn."""
    venv = LAB / "drgn"
    if not (venv / "bin" / "python").exists():
        run(sys.executable, "-m", "venv", venv)
        run(venv / "bin" / "pip", "install", "-q", "drgn")
    done = attempt(venv / "bin" / "python", "-c", DRGN, folder / "dump.elf", vmlinux)
    if done.returncode:
        raise CheckFailed(f"drgn: {done.stderr[-2000:]}")
    found = json.loads(done.stdout)
    return Free(*({pfn + i for pfn, order in found[kind] for i in range(1 << order)}
                  for kind in ("buddy", "pcp")))


def crash(folder: Path, vmlinux: Path, pruned: Path) -> int:
    """Free pages by Debian's crash, on the dump and on the pruned one."""
    if not shutil.which("crash"):
        run("apt-get", "install", "-y", "--no-install-recommends", "crash")
    totals = []
    for dump in (folder / "dump.elf", pruned):
        done = attempt("crash", "-s", vmlinux, dump, text="kmem -f\nquit\n")
        found = re.findall(r"^nr_free_pages: (\d+)\s+\(verified\)", done.stdout, re.M)
        if not found:
            raise CheckFailed(f"crash on {dump.name}: {done.stdout[-800:]}{done.stderr[-800:]}")
        totals.append(sum(map(int, found)))
    if totals[0] != totals[1]:
        raise CheckFailed(f"crash counts {totals[0]} free pages, after the prune {totals[1]}")
    return totals[0]


@dataclass
class Row:
    """Of the table: a capture, and what was seen of it."""

    meta: Meta
    symbols: list[str] = field(default_factory=list)
    agreement: Agreement = Agreement(0, 0, 0, 0, 0, 0)
    drgn: str = "-"
    crash: str = "-"
    disk: str = "-"
    elf: str = "-"
    sonic: str = "-"
    torture: str = "-"
    mapped: str = "-"
    stream: str = "-"


class Proof:
    """All checks on one capture."""

    def __init__(self, tool: Path, folder: Path, oracles: Sequence[str]) -> None:
        self.tool, self.folder, self.oracles = tool, folder, oracles
        self.meta = Meta.read(folder)
        self.row = Row(self.meta)
        self.ram = folder / "ram.raw"
        self.work = LAB / "prove" / self.meta.name
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        # A guest with page_poison=1 wants its pattern back, and a hole cannot hold it.
        self.poisoned = "page_poison=1" in self.meta.spec.append

    def prune(self, *arguments: Word) -> Json:
        return report_of(run(self.tool, "prune", *arguments, "--json"))

    def symbols_of(self, variant: str) -> list[Path]:
        """The files that a variant gives sonicshot."""
        kernel = self.meta.spec.kernel
        if variant == "none":
            return []
        if kernel.vmlinux and variant == "vmlinux":
            return [kernel.debug_image]
        if kernel.vmlinux and variant == "map+vmlinux":
            return [kernel.symbol_table, kernel.debug_image]
        raise CheckFailed(f"no debug symbols for `{variant}`: run setup --debug-symbols")

    def read(self, variants: Sequence[str]) -> list[Run]:
        """The frames, which raw RAM and the ELF core tell alike with all symbols."""
        release = self.meta.release
        reference: list[Run] | None = None
        for variant in variants:
            for dump in ("ram.raw", "dump.elf"):
                report, runs = inspect(self.tool, self.folder / dump, self.symbols_of(variant),
                                       self.work / "pfns.tsv")
                if report["kernel_release"] != release:
                    raise CheckFailed(f"kernel {report['kernel_release']}, not {release}")
                runs = only_ram(runs, self.meta.layout)
                covered = sum(run.last - run.first + 1 for run in runs)
                if covered != sum(part.end - part.first for part in ram_frames(self.meta.layout)):
                    raise CheckFailed(f"{dump}: {covered} frames covered")
                if reference is None:
                    reference = runs
                elif runs != reference:
                    raise CheckFailed(f"{dump} with symbols {variant} reads differently")
            self.row.symbols.append(variant)
        if reference is None:
            raise LabError("no variant of symbols to prove with")
        return reference

    def check_frames(self, runs: Sequence[Run]) -> None:
        """What is called free is free by drgn and by the kernel itself, what is called zero is
        zero."""
        free_at_stop = None
        if "drgn" in self.oracles:
            free = drgn(self.folder, self.meta.spec.kernel.debug_image)
            ours, our_pcp = frames_of(runs, "free_buddy"), frames_of(runs, "free_pcp")
            wrong = (ours - free.buddy) | (our_pcp - free.pcp)
            if wrong:
                raise CheckFailed(f"not free by drgn: {sorted(wrong)[:8]}")
            self.row.drgn = (f"{len(ours)}/{len(free.buddy)}, "
                             f"pcp {len(our_pcp)}/{len(free.pcp)}")
            free_at_stop = free.buddy | free.pcp
        found = self.row.agreement = against_kernel(self.folder, runs, free_at_stop)
        if found.unexplained:
            raise CheckFailed(f"{found.unexplained} dropped frames are in use by kpageflags")
        if found.share < 99.9 and not (free_at_stop and found.missed == 0):
            raise CheckFailed(f"only {found.share:.3f} % of kpageflags' buddy frames found")
        check_zero(self.folder, runs, self.meta.layout)

    def check_raw(self, runs: Sequence[Run]) -> Path:
        """Raw RAM pruned in place, which is what a copy is, and stays so; the pruned file."""
        ram = self.work / "ram.raw"
        run("cp", "--sparse=auto", self.ram, ram)
        before = allocated(ram)
        stats = self.prune(ram, "--in-place", "--min-hole", "0")
        after = allocated(ram)
        if self.poisoned != (stats["kept_for_fill_bytes"] > 0):
            raise CheckFailed(f"page_poison: {self.poisoned}, kept for it: "
                              f"{stats['kept_for_fill_bytes']}")
        dropped = ("offline", "zero") if self.poisoned else DROPPED
        same_but_dropped(self.ram, ram, runs, self.meta.layout, dropped)
        again = self.prune(ram, "--in-place", "--min-hole", "0")
        if again["punched"] or allocated(ram) != after:
            raise CheckFailed("a second prune changed the file")
        copy = self.work / "copy.raw"
        run(self.tool, "prune", self.ram, "-o", copy)
        run("cmp", ram, copy)
        copy.unlink()
        self.row.disk = f"{before >> 20} -> {after >> 20} MiB"
        return ram

    def check_elf(self, runs: Sequence[Run]) -> None:
        """The pruned ELF core is a core, and reads as the whole one."""
        dump, pruned = self.folder / "dump.elf", self.work / "pruned.elf"
        run(self.tool, "prune", dump, "-o", pruned)
        headers = run("readelf", "-lW", pruned)
        if "Error" in headers or "Warning" in headers:
            raise CheckFailed(f"readelf: {headers[:400]}")
        _, elf_runs = inspect(self.tool, pruned, [], self.work / "pfns.tsv")
        if only_ram(elf_runs, self.meta.layout) != runs:
            raise CheckFailed("the pruned ELF core reads differently")
        self.row.elf = f"{dump.stat().st_size >> 20} -> {pruned.stat().st_size >> 20} MiB"
        if "crash" in self.oracles:
            total = crash(self.folder, self.meta.spec.kernel.debug_image, pruned)
            ours = len(frames_of(runs, "free_buddy"))
            if total != ours:
                raise CheckFailed(f"crash counts {total} free pages, we {ours}")
            self.row.crash = str(total)

    def check_checkpoints(self, pruned: Path) -> Path:
        """A checkpoint restores what a prune leaves; a restored file."""
        sizes = []
        restored = self.work / "restored.raw"
        for how in ("none", "lz4", "zstd"):
            checkpoint = self.work / "guest.sonic"
            run(self.tool, "save", self.ram, "-o", checkpoint, "--compress", how, "--force")
            run(self.tool, "verify", checkpoint, "--against", self.ram)
            run(self.tool, "restore", checkpoint, "-o", restored, "--force")
            if self.poisoned:
                # Restored free pages hold the pattern, whatever they held before.
                run(self.tool, "verify", checkpoint, "--against", restored)
            else:
                run("cmp", pruned, restored)
            sizes.append(f"{checkpoint.stat().st_size >> 20}")
        self.row.sonic = " / ".join(sizes) + " MiB"
        return restored

    def torture(self, ram: Path) -> None:
        """Runs the guest on in `ram`, and from QEMU's own files pruned."""
        captures.restore(self.folder, ram)
        self.row.torture = "OK"
        ram.unlink()
        mapped = self.folder / "mapped.ram"
        if mapped.exists():
            # QEMU's own snapshot format: an unchanged QEMU loads the pruned file.
            file = self.work / "mapped.ram"
            run("cp", "--sparse=auto", mapped, file)
            before = allocated(file)
            # Every page, as in a copy.
            run(self.tool, "prune", file, "--in-place", "--min-hole", "0")
            copy = self.work / "copy.ram"
            run(self.tool, "prune", mapped, "-o", copy)
            run("cmp", file, copy)
            copy.unlink()
            self.row.mapped = f"{before >> 20} -> {allocated(file) >> 20} MiB"
            captures.restore(self.folder, None, migration=file)
            file.unlink()
        stream = self.folder / "stream.mig"
        if stream.exists():
            file = self.work / "stream.mig"
            run(self.tool, "prune", stream, "-o", file)
            self.row.stream = f"{stream.stat().st_size >> 20} -> {file.stat().st_size >> 20} MiB"
            captures.restore(self.folder, None, migration=file)


def prove(tool: Path, folder: Path, variants: Sequence[str], torture: bool = True,
          oracles: Sequence[str] = ()) -> Row:
    """All checks on one capture; returns a row of the table."""
    proof = Proof(tool, folder, oracles)
    runs = proof.read(variants)
    proof.check_frames(runs)
    pruned = proof.check_raw(runs)
    proof.check_elf(runs)
    # Where the bytes are the same, one of both files is enough for the stress test.
    ram = proof.check_checkpoints(pruned)
    if torture:
        proof.torture(ram)
    shutil.rmtree(proof.work)
    return proof.row


def table(rows: Sequence[Row]) -> str:
    head = ["capture", "kernel", "symbols", "buddy by kpageflags", "found", "%", "per-CPU",
            "dropped in use", "changed before the stop", "drgn", "crash", "disk", "ELF",
            "checkpoint (none / lz4 / zstd)", "stress test",
            "mapped-ram, stress test too", "stream, stress test too"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        found = row.agreement
        cells = [row.meta.name, row.meta.release, ", ".join(row.symbols), found.kpf_buddy,
                 found.found, f"{found.share:.3f}", found.pcp, found.unexplained, found.changed,
                 row.drgn, row.crash, row.disk, row.elf, row.sonic, row.torture, row.mapped,
                 row.stream]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def prove_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--kernels", default=kernels.ALL)
    parser.add_argument("--mem", default="512,4096", help="MiB, several")
    parser.add_argument("--cpu", default="qemu64,max")
    guest_arguments(parser)
    parser.add_argument("--symbols", default="none,map+vmlinux,vmlinux")
    parser.add_argument("--oracle", default="", help="drgn, crash")
    tool_argument(parser)
    parser.add_argument("--debug-symbols", action="store_true")
    parser.add_argument("--no-torture", action="store_true")
    parser.add_argument("--quick", action="store_true", help="two kernels, no symbol files")
    parser.add_argument("--rm", action="store_true", help="delete each capture afterwards")


@command("prove", "capture, check, prune, restore, stress test", prove_arguments)
def do_prove(args: Namespace) -> None:
    """Captures what is missing, then proves every combination."""
    install_tools()
    tool = find_tool(args.sonicshot)
    rows, failed = [], 0
    variants = args.symbols.split(",")
    if args.quick:
        # What a gate can afford: two kernels, both kinds of page tables, nothing given.
        todo = [("6.1", 512, "qemu64"), ("7.2", 512, "max")]
        variants = ["none"]
    else:
        todo = [(k, int(m), c) for m in args.mem.split(",") for c in args.cpu.split(",")
                for k in args.kernels.split(",")]
    symbols = bool(args.debug_symbols or variants != ["none"] or args.oracle)
    for series, mem, cpu in todo:
        kernel = kernels.fetch(series, symbols)
        spec = guest_of(args, kernel, mem, cpu, forms=("raw", "elf", "mapped", "stream"))
        # Debian 12's crash does not know newer kernels.
        oracles = [o for o in args.oracle.split(",") if o and (o != "crash" or series == "6.1")]
        try:
            folder = captures.capture(spec, spec.name)
            row = prove(tool, folder, variants, not args.no_torture, oracles)
            rows.append(row)
            found = row.agreement
            print(f"ok   {spec.name}: {found.found}/{found.kpf_buddy} buddy frames "
                  f"({found.share:.3f} %), {found.pcp} per-CPU, {found.unexplained} dropped "
                  f"in use, {row.disk}, stress test {row.torture}", flush=True)
        except LabError as error:
            failed += 1
            print(f"FAIL {spec.name}: {error}", flush=True)
        if args.rm:
            shutil.rmtree(captures.HOME / spec.name, ignore_errors=True)
    (LAB / "proof.md").write_text(table(rows) + "\n")
    print(f"{len(rows)} passed, {failed} failed")
    if failed:
        raise AlreadyTold
