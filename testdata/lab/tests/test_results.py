import json
import tempfile
import unittest
from pathlib import Path

import captures
import frames
import matrix
import proof
from captures import Meta, Restored
from errors import CheckFailed, LabError
from frames import Run
from machine import guest_program
from matrix import Form, Outcome, Row
from proof import BITS, Agreement
from spec import GuestSpec, Part
from tests import KERNEL

AGREEMENT = Agreement(kpf_buddy=1000, found=995, pcp=3, changed=2, unexplained=1, missed=0)
OUTCOME = Outcome(
    {"mapped.ram": Form(5 << 20, left_out={"ram0": 9}, after_in_place=1 << 20, after=1 << 20,
                        report={"notes": ["it is odd"], "warnings": []},
                        restored=Restored(0.25, 1.5, 300)),
     "stream.mig": Form(6 << 20, refused="it is busy (exit code 5)")},
    zero=1 << 20, total=8 << 20, dropped=4 << 20, kernel=AGREEMENT)


class Rows(unittest.TestCase):
    def test_what_is_written_is_read(self) -> None:
        for outcome in (OUTCOME, Outcome(inspect="no"), Outcome.of_error(LabError("a|b\nc"))):
            row = Row("6.1", "plain", "0123456789ab", outcome)
            self.assertEqual(Row.from_json(json.loads(json.dumps(row.to_json()))), row)

    def test_one_of_an_earlier_lab(self) -> None:
        row = Row.from_json({"series": "6.1-amd64", "row": "plain", "tool": "ab",
                             "failed": "no `READY`"})
        self.assertEqual(row.outcome.words, "**FAILED**: no `READY`")
        self.assertEqual(row.place, (0, [6, 1]))

    def test_words(self) -> None:
        self.assertEqual(OUTCOME.words, "pruned, restored, stress test OK; it is odd; "
                                        "stream.mig refused: it is busy (exit code 5)")
        refused = Outcome({name: Form(1, refused="no") for name in matrix.FORMS})
        self.assertEqual(refused.words, "mapped.ram refused: no; stream.mig refused: no")
        self.assertEqual(Outcome.of_error(LabError("a|b\nc")).words, "**FAILED**: a/b c")

    def test_table(self) -> None:
        line = matrix.table([Row("6.1", "plain", "ab", OUTCOME)]).splitlines()[-1]
        self.assertTrue(line.startswith("| 6.1 | plain | 8 | 7 | 4 | 5 -> 1 | - | 99.50 % | "),
                        line)
        line = matrix.table([Row("6.1", "q35", "ab", Outcome(failed="no"))]).splitlines()[-1]
        self.assertEqual(line, "| 6.1 | q35 | - | - | - | - | - | - | **FAILED**: no |")


class Captures(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def test_what_is_written_is_read(self) -> None:
        spec = GuestSpec(KERNEL, mem=4096)
        meta = Meta("a name", spec, spec.layout, "0123", {"ready": 12.5},
                    {"blocks": [{"block": "ram0", "offset": 0, "gpa": 0, "len": 1}],
                     "memory_devices": [], "ramblock": "", "mtree": ""})
        meta.write(self.folder)
        read = Meta.read(self.folder)
        self.assertEqual((read.name, read.layout, read.guest, read.times, read.memory),
                         (meta.name, meta.layout, meta.guest, meta.times, meta.memory))
        self.assertEqual(read.spec.to_json(), spec.to_json())
        read.write(self.folder)
        self.assertEqual(Meta.read(self.folder), read)

    def test_one_of_an_earlier_lab(self) -> None:
        record = {"guest": "0123", "spec": GuestSpec(KERNEL).to_json(),
                  "layout": [{"gpa": 0, "len": 4096, "file_offset": 0}]}
        (self.folder / "meta.json").write_text(json.dumps(record))
        read = Meta.read(self.folder)
        self.assertEqual((read.name, read.layout, read.release),
                         (self.folder.name, (Part(0, 4096, 0),), KERNEL.release))

    def test_one_of_another_guest_program_is_made_again(self) -> None:
        self.assertFalse(captures.is_there(self.folder))
        for guest, there in (("0123", False), (guest_program(), True)):
            # Of a spec that this lab cannot read.
            record = {"guest": guest, "spec": {"colour": "red"}}
            (self.folder / "meta.json").write_text(json.dumps(record))
            self.assertEqual(captures.is_there(self.folder), there)

    def test_none(self) -> None:
        with self.assertRaisesRegex(LabError, "no capture"):
            Meta.read(self.folder / "nowhere")

    def test_against_the_kernels_word(self) -> None:
        buddy, lru, offline = (1 << BITS[name] for name in ("BUDDY", "LRU", "OFFLINE"))
        # Frame 2 has gone to a per-CPU list; 3 and 6 are in use, and dropped; 4 is in use and
        # offline; 5 is free, and not found.
        flags = [buddy, buddy, buddy, lru, lru | offline, buddy, 0]
        counts = [0, 0, 0, 0, 0, 0, 1]
        for name, words in (("kpageflags", flags), ("kpagecount", counts)):
            (self.folder / f"{name}.bin").write_bytes(
                b"".join(word.to_bytes(8, "little") for word in words))
        runs = [Run(0, 1, "free_buddy"), Run(2, 3, "free_pcp"), Run(4, 4, "offline"),
                Run(5, 5, "kernel"), Run(6, 6, "free_buddy")]
        self.assertEqual(proof.against_kernel(self.folder, runs, None),
                         Agreement(kpf_buddy=4, found=2, pcp=2, changed=2, unexplained=2, missed=0))
        for free_at_stop, unexplained, missed in (({0, 1, 2, 3, 5, 6}, 0, 1), ({6}, 1, 0),
                                                  ({5}, 2, 1), (set(), 2, 0)):
            self.assertEqual(proof.against_kernel(self.folder, runs, free_at_stop),
                             Agreement(4, 2, 2, 2, unexplained, missed))

    def test_zero(self) -> None:
        layout = (Part(0, 3 * 4096, 0),)
        (self.folder / "ram.raw").write_bytes(b"x" * 4096 + bytes(2 * 4096))
        proof.check_zero(self.folder, [Run(0, 0, "kernel"), Run(1, 2, "zero")], layout)
        with self.assertRaises(CheckFailed):
            proof.check_zero(self.folder, [Run(0, 2, "zero")], layout)
        self.assertEqual(frames.offset_of(2, layout), 2 * 4096)


if __name__ == "__main__":
    unittest.main()
