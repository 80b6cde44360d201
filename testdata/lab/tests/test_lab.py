import contextlib
import io
import unittest
from argparse import ArgumentParser, Namespace
from unittest import mock

import lab
from command import command
from errors import AlreadyTold, CheckFailed, CommandFailed, Differs, GuestFailed, LabError, Refused
from host import run
from options import guest_arguments, guest_of
from spec import VirtioMem
from tests import KERNEL


class Commands(unittest.TestCase):
    def call(self, error: Exception | None) -> tuple[int, str]:
        """The exit code and what is on stderr of a command that ends so."""
        def arguments(parser: ArgumentParser) -> None:
            parser.add_argument("--rounds", type=int, default=50)

        @command("try", "an attempt", arguments)
        def do_try(args: Namespace) -> None:
            self.assertEqual(args.rounds, 3)
            if error:
                raise error

        said = io.StringIO()
        with mock.patch.object(lab, "COMMANDS", (do_try,)), contextlib.redirect_stderr(said):
            return lab.main(["try", "--rounds", "3"]), said.getvalue()

    def test_errors_are_messages_and_exit_code_1(self) -> None:
        self.assertEqual(self.call(None), (0, ""))
        for kind in (LabError, CommandFailed, GuestFailed, Refused, CheckFailed, Differs):
            self.assertEqual(self.call(kind("it is broken")), (1, "it is broken\n"))
        self.assertEqual(self.call(AlreadyTold()), (1, ""))
        with self.assertRaises(ZeroDivisionError):
            self.call(ZeroDivisionError())

    def test_each_has_a_name_of_its_own(self) -> None:
        names = [one.name for one in lab.COMMANDS]
        self.assertEqual(len(names), len(set(names)))
        for name in names:
            said = io.StringIO()
            with self.subTest(name=name), contextlib.redirect_stdout(said), \
                    self.assertRaises(SystemExit) as ended:
                lab.main([name, "--help"])
            self.assertEqual(ended.exception.code, 0)
            self.assertIn(f" {name} [-h]", said.getvalue())

    def test_a_command_of_the_host_that_fails(self) -> None:
        self.assertEqual(run("echo", "it works"), "it works\n")
        with self.assertRaisesRegex(CommandFailed, "(?s)cat /nowhere.*No such file"):
            run("cat", "/nowhere/at/all")


class Guests(unittest.TestCase):
    def parse(self, *words: str) -> Namespace:
        parser = ArgumentParser(exit_on_error=False)
        guest_arguments(parser)
        return parser.parse_args(words)

    def test_nodes_are_counted_or_listed(self) -> None:
        two = guest_of(self.parse("--numa", "2"), KERNEL, 512, "qemu64")
        self.assertEqual((two.numa, two.mem, two.smp), ((256, 256), 512, 2))
        listed = guest_of(self.parse("--numa", "192,320,64", "--smp", "4"), KERNEL, 512, "qemu64")
        self.assertEqual((listed.numa, listed.mem, listed.smp), ((192, 320, 64), 576, 4))

    def test_options_are_fields(self) -> None:
        spec = guest_of(self.parse("--dimm", "128,128", "--virtio-mem", "512,200", "--offline",
                                   "64", "--append", "nokaslr", "--machine", "q35"),
                        KERNEL, 256, "max", "compressible", ["elf"])
        self.assertEqual((spec.dimm, spec.virtio_mem, spec.offline),
                         ((128, 128), VirtioMem(512, 200), 64))
        self.assertEqual((spec.append, spec.machine, spec.mem, spec.cpu, spec.garbage, spec.forms),
                         ("nokaslr", "q35", 256, "max", "compressible", ("elf",)))

    def test_one_size_is_no_virtio_mem_device(self) -> None:
        with contextlib.redirect_stderr(io.StringIO()), self.assertRaises(Exception) as raised:
            self.parse("--virtio-mem", "512")
        self.assertIn("two sizes", str(raised.exception))


if __name__ == "__main__":
    unittest.main()
