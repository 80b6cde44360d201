"""A command of `lab.py`: a function, with its name and its arguments beside it.

    def kill_arguments(parser):
        parser.add_argument("--rounds", type=int, default=50)

    @command("kill", "kill prunes in place, run on from what is left", kill_arguments)
    def do_kill(args):
        ...

A line in `lab.py` adds it to the others. What it raises as `LabError` is printed there."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Command:
    name: str
    help: str
    arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], None]

    def add_to(self, commands: Any) -> None:
        """`commands`: of the parser of `lab.py`."""
        parser = commands.add_parser(self.name, help=self.help)
        self.arguments(parser)
        parser.set_defaults(run=self.run)


def command(name: str, text: str, arguments: Callable[[ArgumentParser], None]
            ) -> Callable[[Callable[[Namespace], None]], Command]:
    """Makes a command of the function that follows; `text` is what `--help` says of it."""
    return lambda run: Command(name, text, arguments, run)
