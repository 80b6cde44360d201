import tempfile
import unittest
from pathlib import Path

import frames
from errors import CheckFailed
from frames import Run
from spec import PAGE, Part

# Two ranges of RAM with a hole between.
LAYOUT = (Part(0, 4 * PAGE, 0), Part(16 * PAGE, 2 * PAGE, 4 * PAGE))


class Frames(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def read(self, text: str) -> list[Run]:
        (self.folder / "pfns.tsv").write_text(text)
        return frames.read_tsv(self.folder / "pfns.tsv")

    def test_runs_are_read(self) -> None:
        self.assertEqual(self.read("0\t3\tkernel\n16\t16\tzero\n"),
                         [Run(0, 3, "kernel"), Run(16, 16, "zero")])

    def test_runs_must_be_sorted_and_apart(self) -> None:
        for text in ("0\t3\tzero\n3\t4\tkernel\n", "4\t5\tzero\n0\t1\tzero\n", "5\t4\tzero\n"):
            with self.subTest(text=text), self.assertRaises(CheckFailed):
                self.read(text)

    def test_only_ram(self) -> None:
        self.assertEqual(frames.only_ram([Run(2, 16, "zero"), Run(17, 40, "kernel")], LAYOUT),
                         [Run(2, 3, "zero"), Run(16, 16, "zero"), Run(17, 17, "kernel")])

    def test_frames_of(self) -> None:
        runs = [Run(0, 1, "free_buddy"), Run(2, 2, "kernel"), Run(3, 3, "zero")]
        self.assertEqual(frames.frames_of(runs, "free_buddy", "zero"), {0, 1, 3})

    def test_offsets(self) -> None:
        for pfn, offset in ((0, 0), (3, 3 * PAGE), (16, 4 * PAGE), (17, 5 * PAGE)):
            self.assertEqual(frames.offset_of(pfn, LAYOUT), offset)
        for pfn in (4, 15, 18):
            with self.subTest(pfn=pfn), self.assertRaises(CheckFailed):
                frames.offset_of(pfn, LAYOUT)

    def test_same_but_dropped(self) -> None:
        before, after = self.folder / "before", self.folder / "after"
        pages = [bytes([number + 1]) * PAGE for number in range(6)]
        before.write_bytes(b"".join(pages))
        runs = [Run(0, 1, "kernel"), Run(2, 3, "free_buddy"), Run(16, 17, "anonymous")]
        kept = [*pages[:2], bytes(PAGE), bytes(PAGE), *pages[4:]]
        after.write_bytes(b"".join(kept))
        frames.same_but_dropped(before, after, runs, LAYOUT, frames.DROPPED)
        for number, what in ((1, "kernel"), (3, "free_buddy"), (5, "anonymous")):
            changed = list(kept)
            changed[number] = b"?" * PAGE
            after.write_bytes(b"".join(changed))
            with self.subTest(what=what), self.assertRaisesRegex(CheckFailed, what):
                frames.same_but_dropped(before, after, runs, LAYOUT, frames.DROPPED)


if __name__ == "__main__":
    unittest.main()
