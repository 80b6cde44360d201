#!/usr/bin/env python3
"""The lab: boots real Debian kernels under QEMU, captures their memory, restores and proves.

Everything it downloads or makes is under target/lab (or SONICSHOT_LAB_DIR)."""

import argparse
import sys
from collections.abc import Sequence

import bench
import built
import cache
import captures
import decoys
import demo
import forms
import kernels
import killed
import libvirt
import live
import live_figures
import matrix
import mutated
import nightly
import oldqemu
import peers
import proof
import readers
import reset
import serve
import small
import soft
import soft_apps
import stress
import tasks
import testdata
import vmms
import xen_figures
import xen_proof
from errors import LabError

# In the order in which `--help` has them.
COMMANDS = (
    kernels.do_setup,
    captures.do_capture,
    matrix.do_matrix,
    killed.do_kill,
    bench.do_bench,
    stress.do_stress,
    reset.do_reset,
    testdata.do_testdata,
    demo.do_demo,
    proof.do_prove,
    peers.do_compare,
    readers.do_readers,
    cache.do_cache,
    soft.do_soft,
    soft_apps.do_soft_apps,
    vmms.do_vmms,
    forms.do_forms,
    small.do_small,
    serve.do_serve,
    built.do_build,
    captures.do_restore,
    decoys.do_decoys,
    decoys.do_nested,
    decoys.do_reboot,
    decoys.do_processors,
    libvirt.do_libvirt,
    live.do_live,
    live_figures.do_figures,
    mutated.do_mutate,
    tasks.do_tasks,
    oldqemu.do_oldqemu,
    xen_proof.do_xen,
    xen_figures.do_figures,
    nightly.do_nightly,
)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    for command in COMMANDS:
        command.add_to(commands)
    args = parser.parse_args(words)
    try:
        args.run(args)
    except LabError as error:
        if str(error):
            print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
