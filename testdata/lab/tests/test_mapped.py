import struct
import tempfile
import unittest
from pathlib import Path
from random import Random

import mapped
from errors import Differs
from mapped import Block
from spec import PAGE

# Pages of each block, and those of them that the file has.
BLOCKS = {"ram0": (40, {0, 1, 2, 7, 8, 39}), "pc.bios": (3, {1})}
DEVICES = b"what devices remember"


def page(name: str, number: int) -> bytes:
    return f"{name} {number} ".encode().ljust(PAGE, b"x")


def build(path: Path, left_out: dict[str, set[int]] | None = None) -> None:
    """A mapped-ram file as QEMU writes it, without some of its pages."""
    total = sum(count for count, _ in BLOCKS.values()) * PAGE
    out = bytearray(b"QEVM\0\0\0\3 capabilities: mapped-ram ")
    out += b"\1\0\0\0\2\3ram" + struct.pack(">II", 0, 4) + struct.pack(">Q", total | 4)
    for name, (count, present) in BLOCKS.items():
        present = present - (left_out or {}).get(name, set())
        head = bytes([len(name)]) + name.encode()
        bitmap = len(out) + len(head) + 36
        pages = -(-(bitmap + 8) // PAGE) * PAGE
        out += head + struct.pack(">QIQQQ", count * PAGE, 1, PAGE, bitmap, pages)
        out += sum(1 << number for number in present).to_bytes(8, "little")
        out = out.ljust(pages, b"\0")
        for number in range(count):
            out += page(name, number) if number in present else bytes(PAGE)
    path.write_bytes(bytes(out) + DEVICES)


class Files(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.original, self.pruned = (Path(folder.name) / name for name in ("a", "b"))
        build(self.original)
        build(self.pruned, {"ram0": {1, 8}})

    def change(self, at: int) -> None:
        """Changes a byte of the pruned file."""
        data = bytearray(self.pruned.read_bytes())
        data[at] ^= 1
        self.pruned.write_bytes(data)

    def block(self, name: str) -> Block:
        return next(block for block in mapped.blocks(self.pruned)[0] if block.name == name)

    def test_blocks(self) -> None:
        found, end = mapped.blocks(self.original)
        self.assertEqual([(block.name, block.length) for block in found],
                         [(name, count * PAGE) for name, (count, _) in BLOCKS.items()])
        data = self.original.read_bytes()
        self.assertEqual(data[end:], DEVICES)
        with open(self.original, "rb") as file:
            for block in found:
                count, present = BLOCKS[block.name]
                self.assertEqual(mapped.bits(file, block), sum(1 << n for n in present))
                self.assertEqual(data[block.pages:block.pages + count * PAGE], b"".join(
                    page(block.name, n) if n in present else bytes(PAGE) for n in range(count)))

    def test_a_prune(self) -> None:
        self.assertEqual(mapped.check_pruned(self.original, self.pruned), {"ram0": 2, "pc.bios": 0})
        self.assertEqual(mapped.check_pruned(self.original, self.original, alike=True),
                         {"ram0": 0, "pc.bios": 0})
        with self.assertRaisesRegex(Differs, "bitmap of ram0"):
            mapped.check_pruned(self.original, self.pruned, alike=True)

    def test_what_is_left_out_may_be_anything(self) -> None:
        self.change(self.block("ram0").pages + 8 * PAGE + 5)
        self.assertEqual(mapped.check_pruned(self.original, self.pruned)["ram0"], 2)

    def test_what_must_not_change(self) -> None:
        ram, bios = self.block("ram0"), self.block("pc.bios")
        cases = {"before memory": 3, "ram0": ram.pages + 7 * PAGE,
                 "pc.bios": bios.pages + 2 * PAGE - 1,
                 "state of devices": self.pruned.stat().st_size - 1}
        for what, at in cases.items():
            with self.subTest(what=what):
                self.change(at)
                with self.assertRaisesRegex(Differs, what):
                    mapped.check_pruned(self.original, self.pruned)
                self.change(at)
        # A page that was not there.
        self.change(ram.bitmap + 3)
        with self.assertRaisesRegex(Differs, "bitmap of ram0"):
            mapped.check_pruned(self.original, self.pruned)
        self.change(ram.bitmap + 3)
        self.assertEqual(mapped.check_pruned(self.original, self.pruned)["ram0"], 2)
        self.pruned.write_bytes(self.pruned.read_bytes() + b"more")
        with self.assertRaisesRegex(Differs, "other blocks"):
            mapped.check_pruned(self.original, self.pruned)


class Runs(unittest.TestCase):
    def test_against_one_bit_after_the_other(self) -> None:
        random = Random(1)
        numbers = [0, 1, 2, 3, 1 << 63, (1 << 64) - 1, 0b1011001]
        numbers += [random.getrandbits(200) & random.getrandbits(200) for _ in range(200)]
        numbers += [random.getrandbits(200) | random.getrandbits(200) for _ in range(200)]
        for number in numbers:
            runs = list(mapped.runs(number))
            bits = [at for first, count in runs for at in range(first, first + count)]
            self.assertEqual(bits, [at for at in range(number.bit_length()) if number >> at & 1])
            # As long as they can be.
            for (first, count), (following, _) in zip(runs, runs[1:]):
                self.assertLess(first + count, following)


if __name__ == "__main__":
    unittest.main()
