import unittest

import lab
import nightly
from nightly import STEPS, Result


class Table(unittest.TestCase):
    def test_what_is_written_is_read(self) -> None:
        kept = {"mutate": Result("OK", "30 min", "2026-01-02", "0123abc", "rustc 1.95.0"),
                "xen": Result("**failed** (1)", "9 min", "2026-01-03", "0123abd", "QEMU 10.0.2")}
        read = nightly.results(nightly.table(kept))
        self.assertEqual({name: read[name] for name in kept}, kept)
        rest = {result.ended for name, result in read.items() if name not in kept}
        self.assertEqual(rest, {nightly.NOT_YET})

    def test_every_step_is_a_command(self) -> None:
        self.assertEqual(len({step.name for step in STEPS}), len(STEPS))
        names = {command.name for command in lab.COMMANDS}
        for step in STEPS:
            if "lab.py" in step.words[1]:
                self.assertIn(step.words[2], names)

    def test_the_table_in_the_tree_has_every_step(self) -> None:
        self.assertEqual(set(nightly.results(nightly.RESULTS.read_text())),
                         {step.name for step in STEPS})
