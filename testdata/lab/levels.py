"""What is found of a guest where less is known of its kernel, held against what more knowledge
finds: the same free frames or fewer, never one more."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from errors import CheckFailed
from frames import FREE, Run, frames_of, read_tsv
from host import Json, Word
from machine import Monitor
from spec import PAGE
from tool import Refusal, call

# From the most to the least.
KNOWLEDGE = ("types", "vmcoreinfo", "shape")
# Percent of the buddy frames that the most finds of an idle guest, and of a busy one.
LEAST_IDLE = {"types": 100.0, "vmcoreinfo": 99.9, "shape": 95.0}
LEAST_BUSY = 90.0


class Seen(NamedTuple):
    """What sonicshot says of a dump."""

    knowledge: str
    report: Json
    runs: list[Run]


def look(tool: Path, dump: Path, most: str, out: Path, *more: Word) -> Seen | Refusal:
    """Reads a dump by no more than the knowledge `most`; `out` is where its frames go."""
    said = call(tool, "inspect", dump, "--pfns", out, "--force", "--at-most", most, *more)
    if isinstance(said, Refusal):
        return said
    return Seen(said["knowledge"], said, read_tsv(out))


def share(most: Seen, few: Seen) -> float:
    """Percent of the buddy frames by the most knowledge that are free by less, too."""
    extra = frames_of(few.runs, *FREE) - frames_of(most.runs, *FREE)
    if extra:
        raise CheckFailed(f"{len(extra)} frames are free by {few.knowledge} and not by "
                          f"{most.knowledge}: {sorted(extra)[:8]}")
    buddy = frames_of(most.runs, "free_buddy")
    return 100 * len(buddy & frames_of(few.runs, *FREE)) / max(1, len(buddy))


def below(most: str) -> Sequence[str]:
    """What can be pruned by where the most is `most`: types are proved elsewhere."""
    return [level for level in KNOWLEDGE[1:] if KNOWLEDGE.index(level) >= KNOWLEDGE.index(most)]


def processor(registers: str) -> list[Word]:
    """The option that tells what the first processor runs on, of QEMU's `info registers -a`."""
    found = re.search(r"\bCR3=([0-9a-f]+)", registers)
    if not found:
        raise CheckFailed(f"QEMU tells of no CR3:\n{registers[:800]}")
    return ["--cr3", hex(int(found[1], 16))]


@dataclass
class LevelPruner:
    """At each stop of a busy guest reads its RAM by all knowledge and by less, and prunes it by
    one after the other of those."""

    tool: Path
    stops: int = 0
    pruned: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    pages: int = 0
    blocks: int = 0
    least: dict[str, float] = field(default_factory=dict)

    def at_stop(self, number: int, ram: Path, qmp: Monitor, folder: Path) -> None:
        self.stops += 1
        runs_on = processor(qmp.human("info registers -a"))
        most = look(self.tool, ram, KNOWLEDGE[0], folder / "pfns.tsv", *runs_on)
        if isinstance(most, Refusal):
            self.refused["all"] += 1
            print(f"stop {number}: refused: {most}", flush=True)
            return
        self.blocks += most.report["inconsistent_blocks"]
        levels = below(most.knowledge)
        for level in levels:
            few = look(self.tool, ram, level, folder / "few.tsv", *runs_on)
            if isinstance(few, Refusal):
                self.refused[level] += 1
                print(f"stop {number}: by {level} refused: {few}", flush=True)
                continue
            if few.knowledge != level:
                raise CheckFailed(f"by {few.knowledge}, not by {level}")
            self.least[level] = min(self.least.get(level, 100.0), share(most, few))
        level = levels[number % len(levels)]
        done = call(self.tool, "prune", ram, "--in-place", "--live-ok", "--at-most", level, *runs_on)
        if not isinstance(done, Refusal):
            self.pruned[level] += 1
            self.pages += done["dropped_bytes"] // PAGE

    def check(self) -> str:
        """What was seen, in a line."""
        for level, least in self.least.items():
            if least < LEAST_BUSY:
                raise CheckFailed(f"by {level} only {least:.2f} % at a stop")
        if not self.pages or not self.pruned:
            raise CheckFailed("nothing was pruned at any stop")
        told = [f"by {level} pruned {self.pruned[level]} times, refused {self.refused[level]}, at "
                f"least {least:.2f} %" for level, least in self.least.items()]
        return (f"{self.stops} stops, {self.refused['all']} refused altogether, {self.pages} pages, "
                f"{self.blocks} blocks kept as in question; " + "; ".join(told))
