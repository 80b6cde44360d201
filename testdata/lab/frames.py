"""Frames of a guest, as `sonicshot inspect --pfns` tells of them, and their places in raw RAM."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from errors import CheckFailed
from spec import PAGE, Layout

# Page classes that are free, and those that a prune drops.
FREE = ("free_buddy", "free_pcp", "offline")
DROPPED = (*FREE, "zero")


class Run(NamedTuple):
    """Frames of one class, the first and the last of them."""

    first: int
    last: int
    page_class: str


class Stretch(NamedTuple):
    """Frames of RAM, up to the one before `end`, and their offset in a file of raw RAM."""

    first: int
    end: int
    offset: int


def read_tsv(path: Path) -> list[Run]:
    """`--pfns`: sorted runs that cover every RAM frame once."""
    runs, before = [], -1
    for line in path.read_text().splitlines():
        first, last, page_class, *zero = line.split("\t")
        # Pages in use that hold only zeroes go for that, whatever their class.
        run = Run(int(first), int(last), *(zero or [page_class]))
        if run.first <= before or run.last < run.first:
            raise CheckFailed(f"{path.name}: run {run.first}-{run.last} after {before}")
        runs.append(run)
        before = run.last
    return runs


def ram_frames(layout: Layout) -> list[Stretch]:
    return [Stretch(part.gpa // PAGE, (part.gpa + part.len) // PAGE, part.file_offset)
            for part in layout]


def only_ram(runs: Iterable[Run], layout: Layout) -> list[Run]:
    """The runs clipped to the guest's RAM: an ELF dump also has firmware ROM."""
    clipped = []
    for run in runs:
        for part in ram_frames(layout):
            first, last = max(run.first, part.first), min(run.last, part.end - 1)
            if first <= last:
                clipped.append(Run(first, last, run.page_class))
    return clipped


def frames_of(runs: Iterable[Run], *page_classes: str) -> set[int]:
    found: set[int] = set()
    for run in runs:
        if run.page_class in page_classes:
            found.update(range(run.first, run.last + 1))
    return found


def offset_of(pfn: int, layout: Layout) -> int:
    """Where raw RAM has a frame."""
    for part in ram_frames(layout):
        if part.first <= pfn < part.end:
            return part.offset + (pfn - part.first) * PAGE
    raise CheckFailed(f"frame {pfn} is not RAM")


def same_but_dropped(before: Path, after: Path, runs: Sequence[Run], layout: Layout,
                     dropped: Sequence[str]) -> None:
    """Every kept page is as it was, every dropped one is zero."""
    with open(before, "rb") as a, open(after, "rb") as b:
        for run in runs:
            offset = offset_of(run.first, layout)
            length = (run.last - run.first + 1) * PAGE
            while length:
                step = min(length, 8 << 20)
                a.seek(offset)
                b.seek(offset)
                want = bytes(step) if run.page_class in dropped else a.read(step)
                if b.read(step) != want:
                    raise CheckFailed(f"{after.name} differs in {run.page_class} at {offset:#x}")
                offset += step
                length -= step
