"""The figures of QEMU's guests, of numbers that are made up."""

import json
import tempfile
import unittest
from pathlib import Path

import live_figures
from live_figures import OURS, OWN, RUN_ON, Point, Wanted


def point(memory: int, used: int, kind: str) -> Point:
    save = {way: [{"pause": (1 + number) * memory / 1e3, "total": 2.0, "gap": 0.5,
                   "bytes": 1e6 * (number + 1)} for _ in range(2)]
            for number, way in enumerate((OURS, *OWN))}
    restore = {way: [{"beat": 1.0 + number, "rss": 100.0}]
               for number, way in enumerate((*OWN, *RUN_ON))}
    return {"memory": memory, "used": used, "kind": kind, "kernel": "6.1.0", "qemu": "10.0.2",
            "guest_used": used + 7, "load": [1.0, 2.0], "processors": 2, "save": save,
            "restore": restore, "raw": 0.5}


class Figures(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.into = Path(folder.name)

    def test_nothing_is_no_page(self) -> None:
        live_figures.publish(self.into)
        self.assertEqual(list(self.into.iterdir()), [])

    def test_all_that_is_there_is_shown(self) -> None:
        for memory, used in ((1024, 200), (2048, 200), (2048, 1000)):
            wanted = Wanted(memory, used, "private")
            live_figures.keep(self.into / wanted.file, point(memory, used, "private"))
        live_figures.publish(self.into)
        found = {file.name for file in self.into.iterdir()}
        self.assertEqual({name for name in found if not name.endswith(".json")},
                         {"README.md", "private-memory.svg", "private-used.svg"})
        text = (self.into / "README.md").read_text()
        # One point has no line of its own in a plot; without a reboot there is none to tell of.
        self.assertNotIn("FlashReboot: a guest", text)
        self.assertIn("| 1 GiB | 207 MiB | private | 1024 ms | -66.7 %, -75.0 % |", text)
        self.assertEqual(text.count("### "), 3)
        svg = (self.into / "private-memory.svg").read_text()
        self.assertEqual(svg.count("<polyline"), 3 * 4)

    def test_a_reboot(self) -> None:
        live_figures.keep(self.into / "flash.json", {"reboot": [2.0, 4.0, 3.0],
                                                     "restore": {OURS: [0.3]}})
        live_figures.keep(self.into / Wanted(1024, 200, "memfd").file, point(1024, 200, "memfd"))
        live_figures.publish(self.into)
        text = (self.into / "README.md").read_text()
        self.assertIn("| a reboot | 3.00 s |", text)
        self.assertIn("| sonicshot | 0.30 s (-90.0 %) |", text)

    def test_what_is_kept_is_whole(self) -> None:
        file = self.into / "x.json"
        live_figures.keep(file, {"a": 1})
        self.assertEqual(json.loads(file.read_text()), {"a": 1})
        self.assertEqual([found.name for found in self.into.iterdir()], ["x.json"])


if __name__ == "__main__":
    unittest.main()
