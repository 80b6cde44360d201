"""Every kind of guest on every kernel: its snapshots are pruned and restored by an unchanged QEMU."""

import fcntl
import hashlib
import json
import os
import re
import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Self

import captures
import kernels
import mapped
import proof
from captures import Restored
from command import command
from debian import install_tools
from errors import CheckFailed, LabError
from frames import read_tsv
from host import LAB, Json, Word, allocated, relative, run
from kernels import Kernel
from proof import Agreement
from spec import GuestSpec, VirtioMem
from tool import Refusal, call, find_tool, tool_argument

# What makes a guest differ from the plain one (512 MiB, pc, one processor).
ROWS: dict[str, Callable[[Kernel], GuestSpec]] = {
    "plain": GuestSpec,
    "4 GiB (PCI hole)": partial(GuestSpec, mem=4096),
    "q35": partial(GuestSpec, machine="q35"),
    "q35, 4 GiB": partial(GuestSpec, machine="q35", mem=4096),
    "2 processors": partial(GuestSpec, smp=2),
    "-cpu max (5-level)": partial(GuestSpec, cpu="max"),
    "page_poison=1": partial(GuestSpec, append="page_poison=1"),
    "init_on_free=1": partial(GuestSpec, append="init_on_free=1"),
    "hugetlb, half of it in use": partial(GuestSpec, hugetlb=32),
    "hugetlb without vmemmap": partial(GuestSpec, hugetlb=32, append="hugetlb_free_vmemmap=on"),
    "balloon, 128 MiB taken": partial(GuestSpec, balloon=128),
    "pc-dimm, 256 MiB": partial(GuestSpec, dimm=(256,)),
    "pc-dimm, 2 x 128 MiB": partial(GuestSpec, dimm=(128, 128)),
    "pc-dimm, memmap on it": partial(GuestSpec, dimm=(256,),
                                     append="memory_hotplug.memmap_on_memory=1"),
    "pc-dimm, 128 of 256 MiB offline": partial(GuestSpec, dimm=(256,), offline=128),
    "pmem, 128 MiB": partial(GuestSpec, pmem="128M!256M"),
    "pmem in half a section": partial(GuestSpec, pmem="64M!256M"),
    "virtio-mem, 256 of 512 MiB": partial(GuestSpec, virtio_mem=VirtioMem(512, 256)),
    "virtio-mem, 200 of 512 MiB": partial(GuestSpec, virtio_mem=VirtioMem(512, 200)),
    "NUMA, 256 + 256 MiB": partial(GuestSpec, numa=(256, 256), smp=2),
    "NUMA, 192 + 320 MiB": partial(GuestSpec, numa=(192, 320), smp=2),
}
# Features that not every kernel has, by series.
NOT_IN = {"hugetlb without vmemmap": ["5.10"], "pc-dimm, memmap on it": ["5.10"]}
FORMS = ("mapped.ram", "stream.mig")


@dataclass
class Form:
    """What became of one form of a snapshot: bytes on the disk, what sonicshot said, and how it
    was restored."""

    before: int
    refused: str | None = None
    # Pages, by RAM block.
    left_out: dict[str, int] | None = None
    after_in_place: int | None = None
    after: int | None = None
    report: Json | None = None
    restored: Restored | None = None

    @classmethod
    def from_json(cls, record: Json) -> Self:
        values = dict(record)
        if "restored" in values:
            values["restored"] = Restored(*values["restored"])
        return cls(**values)


@dataclass
class Outcome:
    """What became of a guest; bytes."""

    forms: dict[str, Form] = field(default_factory=dict)
    # Why `inspect` refused it.
    inspect: str | None = None
    zero: int | None = None
    total: int | None = None
    dropped: int | None = None
    kernel: Agreement | None = None
    failed: str | None = None

    def to_json(self) -> Json:
        """What is not known is not in it."""
        found = known(self)
        found["forms"] = {name: known(form) for name, form in self.forms.items()}
        if self.kernel:
            found["kernel"] = self.kernel.to_json()
        return found

    @classmethod
    def from_json(cls, record: Json) -> Self:
        values = dict(record)
        values["forms"] = {name: Form.from_json(form)
                           for name, form in record.get("forms", {}).items()}
        if "kernel" in values:
            values["kernel"] = Agreement.from_json(values["kernel"])
        return cls(**values)

    @classmethod
    def of_error(cls, error: LabError) -> Self:
        """As a cell of a table can have it."""
        return cls(failed=str(error)[:600].replace("\n", " ").replace("|", "/"))

    @property
    def words(self) -> str:
        """In a few of them."""
        if self.failed:
            return f"**FAILED**: {self.failed}"
        said = []
        for name, form in self.forms.items():
            if form.refused:
                said.append(f"{name} refused: {form.refused}")
            elif form.report:
                if form.report.get("kept_for_fill_bytes"):
                    said.append(f"{mib(form.report['kept_for_fill_bytes'])} MiB of free pages "
                                "kept: the guest checks their pattern")
                said += form.report.get("notes", []) + form.report.get("warnings", [])
        said = list(dict.fromkeys(said))
        if all(form.refused for form in self.forms.values()):
            return "; ".join(said)
        return "; ".join(["pruned, restored, stress test OK", *said])

    def sizes(self, name: str) -> str:
        """Of a form on the disk, before and after."""
        form = self.forms.get(name)
        return f"{mib(form.before)} -> {mib(form.after)}" if form and form.after is not None \
            else "-"


def known(record: Form | Outcome) -> Json:
    values = {one.name: getattr(record, one.name) for one in fields(record)}
    return {name: value for name, value in values.items() if value is not None}


@dataclass
class Row:
    """Of the table: a kernel, a guest of `ROWS`, the build of sonicshot, and what became of it."""

    series: str
    guest: str
    tool: str
    outcome: Outcome = field(default_factory=Outcome)

    @property
    def key(self) -> tuple[str, str]:
        return self.series, self.guest

    @property
    def place(self) -> tuple[int, list[int]]:
        """In the table."""
        numbers = self.series.split("-")[0].split(".")
        return list(ROWS).index(self.guest), [int(number) for number in numbers]

    def to_json(self) -> Json:
        return {"series": self.series, "row": self.guest, "tool": self.tool,
                **self.outcome.to_json()}

    @classmethod
    def from_json(cls, record: Json) -> Self:
        values = dict(record)
        return cls(values.pop("series"), values.pop("row"), values.pop("tool"),
                   Outcome.from_json(values))


def mib(count: int | None) -> str:
    return "-" if count is None else f"{count / (1 << 20):.0f}"


def prune_and_restore(tool: Path, folder: Path, name: str, work: Path, *options: Word) -> Form:
    """One form of a snapshot: pruned, checked, restored, stress-tested."""
    original = folder / name
    form = Form(allocated(original))
    out = work / name
    report = call(tool, "prune", original, "-o", out, *options)
    if isinstance(report, Refusal):
        if out.exists():
            raise CheckFailed(f"{name} refused, and yet there is {out}")
        form.refused = str(report)
    if name == "mapped.ram":
        placed = work / "placed.ram"
        run("cp", "--sparse=auto", original, placed)
        in_place = call(tool, "prune", placed, "--in-place")
        if isinstance(in_place, Refusal) != isinstance(report, Refusal):
            raise CheckFailed(f"in place: {in_place}, by copy: {report}")
        if isinstance(in_place, Refusal):
            run("cmp", original, placed)
        else:
            form.left_out = mapped.check_pruned(original, placed)
            mapped.check_pruned(placed, out, alike=True)
            form.after_in_place = allocated(placed)
            report = in_place
            out.unlink()
            out = placed
    if isinstance(report, Refusal):
        return form
    form.after = allocated(out)
    form.report = report
    form.restored = captures.restore(folder, None, migration=out)
    out.unlink()
    return form


def one(tool: Path, folder: Path, work: Path) -> Outcome:
    """What becomes of one captured guest."""
    outcome = Outcome()
    report = call(tool, "inspect", folder / "mapped.ram", "--pfns", work / "pfns.tsv", "--force")
    if isinstance(report, Refusal):
        outcome.inspect = str(report)
    else:
        outcome.zero = report["zero_pages"] * report["page_size"]
        outcome.total = report["total_pages"] * report["page_size"]
        outcome.dropped = report["droppable_bytes"]
        outcome.kernel = proof.against_kernel(folder, read_tsv(work / "pfns.tsv"), None)
    for name in FORMS:
        outcome.forms[name] = prune_and_restore(tool, folder, name, work)
    return outcome


def table(rows: Sequence[Row]) -> str:
    lines = ["| kernel | guest | RAM, MiB | zero elision alone leaves | dropped | "
             "mapped-ram on disk | stream | buddy pages found | outcome |",
             "|---|---|---:|---:|---:|---:|---:|---:|---|"]
    for row in rows:
        done = row.outcome
        left = None if done.total is None or done.zero is None else done.total - done.zero
        lines.append("| " + " | ".join([
            row.series, row.guest, mib(done.total), mib(left), mib(done.dropped),
            *(done.sizes(name) for name in FORMS),
            f"{done.kernel.share:.2f} %" if done.kernel else "-", done.words]) + " |")
    return "\n".join(lines) + "\n"


def finished() -> list[Row]:
    file = LAB / "matrix.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [Row.from_json(json.loads(line)) for line in lines]


def write(row: Row) -> None:
    """Puts a row among those that are there: two runs may be at work at once."""
    with open(LAB / "matrix" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = [old for old in finished() if old.key != row.key] + [row]
        rows.sort(key=lambda row: row.place)
        lines = "".join(json.dumps(row.to_json()) + "\n" for row in rows)
        for name, text in (("matrix.jsonl", lines), ("matrix.md", table(rows))):
            part = LAB / f"{name}.part"
            part.write_text(text)
            part.rename(LAB / name)


def is_finished(row: Row, fresh: bool) -> bool:
    """Whether it need not be made again; with `fresh`, what another build made must be."""
    old = next((old for old in finished() if old.key == row.key), None)
    if old is None or old.outcome.failed:
        return False
    refused = any(form.refused for form in old.outcome.forms.values())
    return old.tool == row.tool or not fresh and not refused


def matrix(tool: Path, series: Sequence[str], names: Sequence[str], keep: bool, fresh: bool
           ) -> int:
    """Makes the rows that are missing, or, if `fresh`, all that another build of sonicshot made;
    returns how many failed."""
    (LAB / "matrix").mkdir(parents=True, exist_ok=True)
    # A copy: a rebuild in the middle of the run would mix two versions.
    binary = LAB / "matrix" / f"sonicshot-{os.getpid()}"
    shutil.copy(tool, binary)
    version = hashlib.sha256(binary.read_bytes()).hexdigest()[:12]
    failed = 0
    todo = [(s, name) for name in names for s in series if s not in NOT_IN.get(name, [])]
    try:
        for number, name in todo:
            # None of the cloud kernels has page poisoning.
            if name == "page_poison=1" and "-" not in number:
                number = f"{number}-amd64"
            row = Row(number, name, version)
            if is_finished(row, fresh):
                continue
            spec = ROWS[name](kernels.fetch(number)).with_forms("mapped", "stream")
            work = LAB / "matrix" / f"{number}-{os.getpid()}"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            # QEMU's options end at a comma.
            capture = re.sub("[^a-zA-Z0-9.]+", "-", f"matrix-{number}-{name}")
            try:
                row.outcome = one(binary, captures.capture(spec, capture), work)
            except LabError as error:
                row.outcome = Outcome.of_error(error)
            shutil.rmtree(work, ignore_errors=True)
            if not keep and not row.outcome.failed:
                shutil.rmtree(captures.HOME / capture, ignore_errors=True)
            failed += bool(row.outcome.failed)
            write(row)
            print(f"{number}, {name}: {row.outcome.words}", flush=True)
    finally:
        binary.unlink()
    return failed


def matrix_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--kernels", default=kernels.ALL)
    parser.add_argument("--rows", default="", help="parts of their names, `;` between them")
    parser.add_argument("--fresh", action="store_true", help="the rows of other builds again")
    parser.add_argument("--keep", action="store_true", help="keep the captures")
    tool_argument(parser)


@command("matrix", "every kind of guest on every kernel, as a table", matrix_arguments)
def do_matrix(args: Namespace) -> None:
    """Every kind of guest on every kernel; rows that are there already are not made again."""
    install_tools()
    names = [name for name in ROWS
             if not args.rows or any(part.strip() in name for part in args.rows.split(";"))]
    failed = matrix(find_tool(args.sonicshot), args.kernels.split(","), names, args.keep,
                    args.fresh)
    print(relative(LAB / "matrix.md"))
    if failed:
        raise CheckFailed(f"{failed} rows failed")
