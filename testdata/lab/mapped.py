"""QEMU's mapped-ram migration files, read on our own: what a prune may change in one."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from errors import Differs
from spec import PAGE


class Block(NamedTuple):
    """A RAM block: its length, and where the file has its header, its bitmap and its pages;
    bytes."""

    name: str
    length: int
    header: int
    bitmap: int
    pages: int


def blocks(path: Path) -> tuple[list[Block], int]:
    """The RAM blocks, and where what comes behind them begins."""
    with open(path, "rb") as file:
        start = file.read(8192)
        # Section `ram`, instance, version, then the total with a flag in its low bits.
        at = start.index(b"\x03ram") + 4 + 8
        total = struct.unpack_from(">Q", start, at)[0] & ~(PAGE - 1)
        at, seen = at + 8, 0
        found: list[Block] = []
        while seen < total:
            file.seek(at)
            name = file.read(file.read(1)[0]).decode()
            length, version, page, bitmap, pages = struct.unpack(">QIQQQ", file.read(36))
            if version != 1 or page != PAGE:
                raise Differs(f"{path}: block {name} has version {version}, page size {page}")
            found.append(Block(name, length, at, bitmap, pages))
            seen += length
            at = pages + length
    return found, at


def bits(file: BinaryIO, block: Block) -> int:
    """The block's bitmap as a number: bit N stands for page N."""
    file.seek(block.bitmap)
    return int.from_bytes(file.read((block.length // PAGE + 7) // 8), "little")


def runs(number: int) -> Iterator[tuple[int, int]]:
    """Runs of set bits: first, count."""
    at = 0
    while number:
        skip = (number & -number).bit_length() - 1
        at, number = at + skip, number >> skip
        count = (~number & (number + 1)).bit_length() - 1
        yield at, count
        at, number = at + count, number >> count


def same(a: BinaryIO, b: BinaryIO, at: int, length: int, what: str) -> None:
    """That two files have the same bytes in one place."""
    while length:
        step = min(length, 8 << 20)
        a.seek(at)
        b.seek(at)
        if a.read(step) != b.read(step):
            raise Differs(f"{what} differs at {at:#x}")
        at, length = at + step, length - step


def check_pruned(original: Path, pruned: Path, alike: bool = False) -> dict[str, int]:
    """That `pruned` is `original` but for the pages left out; with `alike`, that no page more is
    left out either. What lies in the place of a page left out does not matter. Returns the pages
    left out, by block."""
    layout, end = blocks(original)
    size = original.stat().st_size
    if blocks(pruned) != (layout, end) or size != pruned.stat().st_size:
        raise Differs(f"{pruned} has other blocks than {original}")
    left_out = {}
    with open(original, "rb") as a, open(pruned, "rb") as b:
        same(a, b, 0, layout[0].bitmap, "what comes before memory")
        same(a, b, end, size - end, "the state of devices")
        for block in layout:
            before, after = bits(a, block), bits(b, block)
            if after & ~before or (alike and before != after):
                raise Differs(f"the bitmap of {block.name} differs")
            left_out[block.name] = (before ^ after).bit_count()
            for first, count in runs(after):
                same(a, b, block.pages + first * PAGE, count * PAGE, block.name)
    return left_out
