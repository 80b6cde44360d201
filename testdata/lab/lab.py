#!/usr/bin/env python3
"""The lab: boots real Debian kernels under QEMU, captures their memory, restores and proves.

Everything it downloads or makes is under target/lab (or SONICSHOT_LAB_DIR)."""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bench  # noqa: E402
import decoys  # noqa: E402
from errors import AlreadyTold, CheckFailed, CommandFailed, LabError  # noqa: E402
import killed  # noqa: E402
import kernels  # noqa: E402
import libvirt  # noqa: E402
import machine  # noqa: E402
import matrix  # noqa: E402
import mutated  # noqa: E402
import oldqemu  # noqa: E402
import peers  # noqa: E402
import proof  # noqa: E402
import reset  # noqa: E402
import vmms  # noqa: E402
import xen_figures  # noqa: E402
import xen_proof  # noqa: E402


def spec_of(args, series):
    meta = kernels.fetch(series, args.debug_symbols)
    spec = {"kernel": meta, "mem": args.mem, "cpu": args.cpu, "smp": args.smp,
            "machine": args.machine, "garbage": args.garbage}
    add_options(spec, args)
    spec["forms"] = ["raw", "elf"]
    if several_blocks(spec):
        # Raw RAM is one file.
        spec["forms"] = ["elf"]
    spec["forms"] += [form for form in ("mapped", "stream") if getattr(args, form)]
    return spec


OPTIONS = ("append", "hugetlb", "balloon", "numa", "dimm", "virtio_mem", "offline", "pmem")


def add_options(spec, args):
    for key in OPTIONS:
        if getattr(args, key):
            spec[key] = getattr(args, key)
    if spec.get("numa"):
        if len(spec["numa"]) == 1:
            spec["numa"] = [spec["mem"] // spec["numa"][0]] * spec["numa"][0]
        spec["mem"] = sum(spec["numa"])
        spec["smp"] = max(spec["smp"], len(spec["numa"]))


def several_blocks(spec):
    return any(spec.get(key) for key in ("numa", "dimm", "virtio_mem"))


def sizes(text):
    return [int(size) for size in text.split(",")]


def guest_options(parser):
    """What makes one guest different from the next."""
    parser.add_argument("--smp", type=int, default=1)
    parser.add_argument("--machine", default="pc", choices=["pc", "q35"])
    parser.add_argument("--append", default="", help="kernel command line")
    parser.add_argument("--hugetlb", type=int, default=0,
                        help="pool size in 2 MiB pages; half of it used")
    parser.add_argument("--balloon", type=int, default=0, help="MiB to take from the guest")
    parser.add_argument("--numa", type=sizes,
                        help="nodes, a RAM block each: how many, or the MiB of each (192,320)")
    parser.add_argument("--dimm", type=sizes, help="MiB of memory plugged in after boot: 128,128")
    parser.add_argument("--offline", type=int, default=0,
                        help="MiB of what was plugged in to be taken offline again")
    parser.add_argument("--pmem", default="",
                        help="RAM to be persistent memory, as memmap= has it: 128M!256M")
    parser.add_argument("--virtio-mem", type=sizes,
                        help="MiB of a virtio-mem device, and how much of it is plugged: 512,200")


def name_of(spec):
    parts = [spec["kernel"]["series"], str(spec["mem"]), spec["cpu"]]
    if spec["machine"] != "pc":
        parts.append(spec["machine"])
    if spec["smp"] != 1:
        parts.append(f"smp{spec['smp']}")
    for key in OPTIONS:
        if spec.get(key):
            parts.append(key + re.sub("[^a-z0-9_.]+", "_", str(spec[key])).strip("_"))
    return "-".join(parts)


def do_setup(args):
    kernels.install_tools()
    for series in args.kernels.split(","):
        meta = kernels.fetch(series, args.debug_symbols)
        print(series, meta["release"])


def do_capture(args):
    kernels.install_tools()
    spec = spec_of(args, args.kernel)
    folder = machine.capture(spec, args.name or name_of(spec))
    print(machine.relative(folder))


def do_testdata(args):
    """Makes the small capture that `cargo test` uses."""
    kernels.install_tools()
    spec = {"kernel": kernels.fetch("6.1", False), "mem": 128, "cpu": "qemu64", "smp": 1,
            "machine": "pc", "garbage": "compressible", "forms": ["raw"]}
    folder = machine.capture(spec, "testdata")
    into = kernels.ROOT / "testdata" / "guest-6.1-128m"
    into.mkdir(exist_ok=True)
    for name in ("ram.raw", "kpageflags.bin", "kpagecount.bin"):
        kernels.run("zstd", "-q", "-f", "-19", "--long=27", "-T0", folder / name,
                    "-o", into / f"{name}.zst")
    for name in ("zoneinfo", "buddyinfo", "iomem", "version", "cmdline"):
        (into / name).write_text((folder / name).read_text())
    print(machine.relative(into))


def find_tool(given):
    if given:
        return Path(given).resolve()
    kernels.run("cargo", "build", "--release", "--quiet", "-p", "sonicshot-cli", cwd=kernels.ROOT)
    return kernels.ROOT / "target" / "release" / "sonicshot"


def do_prove(args):
    """Captures what is missing, then proves every combination."""
    kernels.install_tools()
    tool = find_tool(args.sonicshot)
    rows, failed = [], 0
    variants = args.symbols.split(",")
    if args.quick:
        # What a gate can afford: two kernels, both kinds of page tables, nothing given.
        todo = [("6.1", 512, "qemu64"), ("7.2", 512, "max")]
        variants = ["none"]
    else:
        todo = [(k, int(m), c) for m in args.mem.split(",") for c in args.cpu.split(",")
                for k in args.kernels.split(",")]
    symbols = args.debug_symbols or variants != ["none"] or args.oracle
    for series, mem, cpu in todo:
        meta = kernels.fetch(series, symbols)
        spec = {"kernel": meta, "mem": mem, "cpu": cpu, "smp": args.smp, "machine": args.machine,
                "garbage": "random",
                "forms": ["raw", "elf", "mapped", "stream"]}
        add_options(spec, args)
        name = name_of(spec)
        try:
            folder = machine.capture(spec, name)
            oracles = [o for o in args.oracle.split(",") if o]
            if series != "6.1":
                # Debian 12's crash does not know newer kernels.
                oracles = [o for o in oracles if o != "crash"]
            row = proof.prove(tool, folder, variants, not args.no_torture, oracles)
            rows.append(row)
            print(f"ok   {name}: {row['found']}/{row['kpf_buddy']} buddy frames "
                  f"({row['share']:.3f} %), {row['pcp']} per-CPU, {row['unexplained']} dropped "
                  f"in use, {row['disk']}, torture {row['torture']}", flush=True)
        except LabError as error:
            failed += 1
            print(f"FAIL {name}: {error}", flush=True)
        if args.rm:
            kernels.shutil.rmtree(kernels.LAB / "captures" / name, ignore_errors=True)
    (kernels.LAB / "proof.md").write_text(proof.table(rows) + "\n")
    print(f"{len(rows)} passed, {failed} failed")
    if failed:
        raise AlreadyTold


def do_matrix(args):
    """Every kind of guest on every kernel; rows that are there already are not made again."""
    kernels.install_tools()
    names = [name for name in matrix.ROWS
             if not args.rows or any(part.strip() in name for part in args.rows.split(";"))]
    failed = matrix.matrix(find_tool(args.sonicshot), args.kernels.split(","), names, args.keep,
                           args.fresh)
    print(machine.relative(kernels.LAB / "matrix.md"))
    if failed:
        raise CheckFailed(f"{failed} rows failed")


def do_kill(args):
    """Kills prunes in place at random moments, and lets a guest run from what is left."""
    kernels.install_tools()
    tool = find_tool(args.sonicshot)
    spec = {"kernel": kernels.fetch(args.kernel, False), "mem": 512, "cpu": "qemu64", "smp": 1,
            "machine": "pc", "garbage": "random", "forms": ["raw", "mapped"]}
    folder = machine.capture(spec, f"kill-{args.kernel}")
    for form in ("mapped.ram", "ram.raw"):
        print(killed.kill(tool, folder, form, args.rounds, args.seed), flush=True)


def do_bench(args):
    """Time of a prune in place beside makedumpfile, and what the smaller file brings QEMU."""
    kernels.install_tools()
    # Without KASLR: makedumpfile is given a core with the addresses that /proc/vmcore has.
    spec = {"kernel": kernels.fetch(args.kernel, False), "mem": args.mem, "cpu": "qemu64",
            "smp": 1, "machine": "pc", "garbage": "random", "append": "nokaslr lab.beat=100",
            "forms": ["raw", "mapped"]}
    folder = machine.capture(spec, f"bench-{args.kernel}-{args.mem}-nokaslr")
    bench.bench(folder, find_tool(args.sonicshot), args.rounds)


def do_stress(args):
    """Stops a busy guest at any instant, prunes the RAM under it, and lets it run on."""
    kernels.install_tools()
    tool = find_tool(args.sonicshot)
    spec = spec_of(args, args.kernel)
    seen = {"pruned": 0, "refused": 0, "blocks": 0, "pages": 0, "left": 0,
            "drgn": 0}

    def at_stop(number, ram, qmp, folder):
        done = kernels.subprocess.run([tool, "inspect", ram, "--json", "--pfns",
                                       folder / "pfns.tsv", "--force"],
                                      capture_output=True, text=True)
        if done.returncode == 5:
            seen["refused"] += 1
            print(f"stop {number}: refused: {done.stderr.strip()[:600]}", flush=True)
            return
        if done.returncode:
            raise CommandFailed(f"stop {number}: {done.stderr}")
        report = kernels.json.loads(done.stdout)
        seen["blocks"] += report["inconsistent_blocks"]
        if args.oracle == "drgn" and number % 5 == 0:
            qmp.call("dump-guest-memory", paging=False, protocol=f"file:{folder / 'dump.elf'}")
            runs = proof.read_tsv(folder / "pfns.tsv")
            try:
                buddy, pcp = proof.drgn(folder, kernels.LAB / spec["kernel"]["vmlinux"])
            except CheckFailed as error:
                print(f"stop {number}: drgn cannot read it: {str(error)[-200:]}", flush=True)
            else:
                ours = proof.frames_of(runs, "free_buddy", "free_pcp")
                if ours - (buddy | pcp):
                    raise CheckFailed(f"stop {number}: not free by drgn: {sorted(ours - buddy - pcp)[:8]}")
                seen["drgn"] += 1
            (folder / "dump.elf").unlink()
        pruned = kernels.json.loads(kernels.run(tool, "prune", ram, "--in-place", "--live-ok",
                                                "--json"))
        seen["pruned"] += 1
        seen["pages"] += pruned["dropped_bytes"] // 4096
        seen["left"] += pruned["left_bytes"] // 4096

    machine.stress(spec, name_of(spec), args.stops, at_stop)
    print(f"{spec['kernel']['release']}, {args.smp} processors: pruned under the running guest "
          f"{seen['pruned']} times ({seen['pages']} pages, {seen['left']} of them in stretches "
          f"too short for a hole), refused {seen['refused']} times, "
          f"{seen['blocks']} blocks kept as in question, {seen['drgn']} stops agreed with drgn; "
          "torture OK")


def do_reset(args):
    """Ends kernels by reset, kexec and crash, and stops what comes after them."""
    kernels.install_tools()
    todo = [(series, int(smp), kaslr == "kaslr", kind, args.mem)
            for kaslr in args.kaslr.split(",") for smp in args.smp.split(",")
            for kind in args.kinds.split(",") for series in args.kernels.split(",")]
    reset.Random(args.seed).shuffle(todo)
    log = kernels.LAB / f"{args.name}.jsonl"
    if args.running:
        todo = [(series, int(smp), kaslr == "kaslr", what)
                for kaslr in args.kaslr.split(",") for smp in args.smp.split(",")
                for what in args.running.split(",") for series in args.kernels.split(",")]
        reset.Random(args.seed).shuffle(todo)
        sums = reset.running(find_tool(args.sonicshot), todo, args.stops, args.seed, log, args.each)
        print(", ".join(f"{key}: {value}" for key, value in sums.items()))
        if sums["refused"]:
            raise AlreadyTold
        return
    keep = args.keep and (args.keep, "all" if args.keep_all else "lost")
    more = reset.firmware_of(args.firmware, args.machine, not args.no_s3)
    sums = reset.resets(find_tool(args.sonicshot), todo, args.stops, args.seconds, args.seed,
                        args.mapped, keep, log, args.each, more, "-no-s3" if args.no_s3 else "")
    print(", ".join(f"{key}: {value}" for key, value in sums.items()))
    if any("lost" in key and value for key, value in sums.items()):
        raise AlreadyTold


def do_compare(args):
    """Sizes and times of checkpoints beside makedumpfile's, of the same guest in one run."""
    kernels.install_tools()
    meta = kernels.fetch(args.kernel, False)
    spec = {"kernel": meta, "mem": args.mem, "cpu": "qemu64", "smp": 1, "machine": "pc",
            "garbage": "random", "append": "nokaslr", "forms": ["raw"]}
    folder = machine.capture(spec, f"compare-{args.kernel}-{args.mem}")
    peers.compare(folder, find_tool(args.sonicshot))


def do_vmms(args):
    """Firecracker's and Cloud Hypervisor's files, made of real guests' RAM."""
    kernels.install_tools()
    tool = find_tool(args.sonicshot)
    meta = kernels.fetch(args.kernel, False)
    for mem in (int(m) for m in args.mem.split(",")):
        spec = {"kernel": meta, "mem": mem, "cpu": "qemu64", "smp": 1, "machine": "pc",
                "garbage": "random"}
        folder = vmms.capture(spec, f"vmms-{args.kernel}-{mem}")
        print(f"ok   {mem} MiB: {vmms.prove(tool, folder)}", flush=True)


def do_restore(args):
    folder = kernels.LAB / "captures" / args.capture
    ram, migration = (f and Path(f).resolve() for f in (args.ram, args.migration))
    done = machine.restore(folder, ram, args.torture and "torture", migration=migration)
    print(f"loaded in {done.load:.2f} s, first beat {done.beat:.2f} s later, "
          f"QEMU resident {done.rss} MiB"
          + (", TORTURE-OK" if args.torture else ""))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)

    setup = commands.add_parser("setup", help="install tools, download kernels")
    setup.add_argument("--kernels", default=",".join(kernels.SUITES))
    setup.add_argument("--debug-symbols", action="store_true")
    setup.set_defaults(run=do_setup)

    capture = commands.add_parser("capture", help="boot a guest and take its memory")
    capture.add_argument("--kernel", default="6.1",
                         help="5.10, 6.1, 6.12 or 7.2, with -amd64 for the general flavour")
    capture.add_argument("--mem", type=int, default=512, help="MiB")
    capture.add_argument("--cpu", default="qemu64")
    guest_options(capture)
    capture.add_argument("--garbage", default="random", choices=["random", "compressible"])
    capture.add_argument("--name")
    capture.add_argument("--mapped-ram", action="store_true", dest="mapped")
    capture.add_argument("--stream", action="store_true")
    capture.add_argument("--debug-symbols", action="store_true")
    capture.set_defaults(run=do_capture)

    rows = commands.add_parser("matrix", help="every kind of guest on every kernel, as a table")
    rows.add_argument("--kernels", default=",".join(kernels.SUITES))
    rows.add_argument("--rows", default="", help="parts of their names, `;` between them")
    rows.add_argument("--fresh", action="store_true", help="the rows of other builds again")
    rows.add_argument("--keep", action="store_true", help="keep the captures")
    rows.add_argument("--sonicshot", help="the binary; built if not given")
    rows.set_defaults(run=do_matrix)

    kill = commands.add_parser("kill", help="kill prunes in place, run on from what is left")
    kill.add_argument("--kernel", default="6.1")
    kill.add_argument("--rounds", type=int, default=50)
    kill.add_argument("--seed", type=int, default=1)
    kill.add_argument("--sonicshot", help="the binary; built if not given")
    kill.set_defaults(run=do_kill)

    speed = commands.add_parser("bench", help="prune beside makedumpfile; QEMU's restore")
    speed.add_argument("--kernel", default="6.1")
    speed.add_argument("--mem", type=int, default=4096, help="MiB")
    speed.add_argument("--rounds", type=int, default=7)
    speed.add_argument("--sonicshot", help="the binary; built if not given")
    speed.set_defaults(run=do_bench)

    stress = commands.add_parser("stress", help="prune the RAM of a busy guest, again and again")
    stress.add_argument("--kernel", default="6.1")
    stress.add_argument("--mem", type=int, default=512, help="MiB")
    stress.add_argument("--cpu", default="qemu64")
    guest_options(stress)
    stress.add_argument("--stops", type=int, default=30)
    stress.add_argument("--oracle", default="", help="drgn")
    stress.add_argument("--sonicshot", help="the binary; built if not given")
    stress.add_argument("--debug-symbols", action="store_true")
    stress.set_defaults(run=do_stress, garbage="random", mapped=False, stream=False)

    gone = commands.add_parser("reset", help="stop guests after reset, kexec and crash")
    gone.add_argument("--kernels", default=",".join(kernels.SUITES))
    gone.add_argument("--kinds", default=",".join(reset.KINDS))
    gone.add_argument("--running", nargs="?", const=",".join(reset.RUNNING),
                      help="guests that run normally instead: nothing may be refused")
    gone.add_argument("--smp", default="1,2,4")
    gone.add_argument("--kaslr", default="kaslr,nokaslr")
    gone.add_argument("--mem", type=int, help="MiB; 256, and 512 with a crash kernel")
    gone.add_argument("--stops", type=int, default=200)
    gone.add_argument("--each", type=int, default=8, help="stops of one guest")
    gone.add_argument("--seconds", type=float, default=3.5, help="the last stop at most so late")
    gone.add_argument("--seed", type=int, default=1)
    gone.add_argument("--mapped-ram", action="store_true", dest="mapped")
    gone.add_argument("--keep", help="a folder for the RAM of stops that lost something")
    gone.add_argument("--keep-all", action="store_true")
    gone.add_argument("--firmware", choices=["seabios", *kernels.FIRMWARE], default="seabios")
    gone.add_argument("--machine", default="pc")
    gone.add_argument("--no-s3", action="store_true", help="EFI: the machine cannot sleep")
    gone.add_argument("--name", default="reset")
    gone.add_argument("--sonicshot", help="the binary; built if not given")
    gone.set_defaults(run=do_reset)

    testdata = commands.add_parser("testdata", help="make the capture that the tests use")
    testdata.set_defaults(run=do_testdata)

    prove = commands.add_parser("prove", help="capture, check, prune, restore, torture")
    prove.add_argument("--kernels", default=",".join(kernels.SUITES))
    prove.add_argument("--mem", default="512,4096", help="MiB, several")
    prove.add_argument("--cpu", default="qemu64,max")
    guest_options(prove)
    prove.add_argument("--symbols", default="none,map+vmlinux,vmlinux")
    prove.add_argument("--oracle", default="", help="drgn, crash")
    prove.add_argument("--sonicshot", help="the binary; built if not given")
    prove.add_argument("--debug-symbols", action="store_true")
    prove.add_argument("--no-torture", action="store_true")
    prove.add_argument("--quick", action="store_true", help="two kernels, no symbol files")
    prove.add_argument("--rm", action="store_true", help="delete each capture afterwards")
    prove.set_defaults(run=do_prove)

    compare = commands.add_parser("compare", help="checkpoints against makedumpfile")
    compare.add_argument("--kernel", default="6.1")
    compare.add_argument("--mem", type=int, default=4096, help="MiB")
    compare.add_argument("--sonicshot", help="the binary; built if not given")
    compare.set_defaults(run=do_compare)

    snapshots = commands.add_parser("vmms", help="Firecracker's and Cloud Hypervisor's files")
    snapshots.add_argument("--kernel", default="6.1")
    snapshots.add_argument("--mem", default="512,4096", help="MiB, several")
    snapshots.add_argument("--sonicshot", help="the binary; built if not given")
    snapshots.set_defaults(run=do_vmms)

    restore = commands.add_parser("restore", help="run a captured guest on")
    restore.add_argument("--capture", required=True)
    which = restore.add_mutually_exclusive_group(required=True)
    which.add_argument("--ram", help="a raw RAM file: the guest runs in it")
    which.add_argument("--migration", help="a mapped-ram file or a stream, into fresh memory")
    restore.add_argument("--torture", action="store_true")
    restore.set_defaults(run=do_restore)

    decoys.add_commands(commands, find_tool)
    libvirt.add_command(commands, find_tool)
    mutated.add_command(commands)
    oldqemu.add_command(commands, find_tool)
    xen_proof.add_command(commands, find_tool)
    xen_figures.add_command(commands, find_tool)

    args = parser.parse_args()
    try:
        args.run(args)
    except LabError as error:
        if str(error):
            print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
