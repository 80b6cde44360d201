"""The `sonicshot` that is tried."""

import json
from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path

from errors import CheckFailed
from host import LAB, ROOT, Json, Word, attempt, run


def tool_argument(parser: ArgumentParser) -> None:
    parser.add_argument("--sonicshot", help="the binary; built if not given")


def knowledge_argument(parser: ArgumentParser) -> None:
    parser.add_argument("--at-most", choices=["types", "vmcoreinfo", "shape"],
                        help="take no more than this of the guest's kernel")


def limited(tool: Path, most: str | None) -> Path:
    """The binary that takes no more than this of a guest's kernel."""
    if not most:
        return tool
    script = LAB / f"sonicshot-{most}"
    script.write_text(f'#!/bin/sh\nexec "{tool}" "$@" --at-most {most}\n')
    script.chmod(0o755)
    return script


def find_tool(given: str | None) -> Path:
    """The binary that `--sonicshot` names, or a release build."""
    if given:
        return Path(given).resolve()
    run("cargo", "build", "--release", "--quiet", "-p", "sonicshot-cli", cwd=ROOT)
    return ROOT / "target" / "release" / "sonicshot"


@dataclass(frozen=True)
class Refusal:
    """That sonicshot leaves a file alone, and why."""

    code: int
    reason: str

    def __str__(self) -> str:
        return f"{self.reason} (exit code {self.code})"


def call(tool: Path, *arguments: Word) -> Json | Refusal:
    """Runs sonicshot with --json; its report, or its refusal."""
    done = attempt(tool, *arguments, "--json")
    if done.returncode in (3, 4, 5):
        error = json.loads(done.stderr.splitlines()[-1])
        return Refusal(done.returncode, (error["causes"] or [error["error"]])[-1])
    if done.returncode:
        raise CheckFailed(f"{' '.join(map(str, arguments))}: {done.stderr.strip()[-600:]}")
    return report_of(done.stdout)


def report_of(text: str) -> Json:
    """What a sonicshot with --json printed."""
    report: Json = json.loads(text)
    return report
