import struct
import tempfile
import unittest
from dataclasses import replace
from pathlib import Path

import decoys
import machine
from decoys import Processor
from errors import CheckFailed, LabError
from machine import Block
from spec import GuestSpec, VirtioMem
from tests import KERNEL
from xen import Answer

RAMBLOCK = """\
              Block Name    PSize              Offset               Used              Total
               mem-dimm0    4 KiB  0x0000000020000000 0x0000000008000000 0x0000000008000000
                    ram0    4 KiB  0x0000000000000000 0x0000000020000000 0x0000000020000000
      0000:00:02.0/vmem0    4 KiB  0x0000000030000000 0x0000000008000000 0x0000000008000000
"""
MTREE = """\
FlatView #0
 AS "I/O", root: io
 Root memory region: io
  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan
  0000000000001000-0000000000001fff (prio 0, ram): not-memory

FlatView #1
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 Root memory region: system
  0000000000000000-000000000009ffff (prio 0, ram): ram0
  00000000000c0000-00000000000c3fff (prio 1, rom): ram0 @00000000000c0000
  00000000000f0000-000000001fffffff (prio 0, ram): ram0 @00000000000f0000
  00000000fee00000-00000000feefffff (prio 4096, i/o): kvm-apic-msi
  0000000100000000-0000000107ffffff (prio 0, ram): mem-dimm0
  0000000140000000-0000000147ffffff (prio 0, ram): vmem0
"""
REGISTERS = """\
CPU#0
RAX=0000000000000000 RBX=0000000000000000
RIP=ffffffff81000000 RFL=00000246 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=1
CR0=80050033 CR2=00007f0000000000 CR3=0000000004357000 CR4=000006f0
CPU#1
RIP=0000000000401000 RFL=00000246 [---Z-P-] CPL=3 II=0 A20=1 SMM=0 HLT=0
CR0=80050033 CR2=00007f0000000000 CR3=000000000abcd001 CR4=000006f0
"""


class Qemu(unittest.TestCase):
    def test_blocks_are_where_the_system_has_them(self) -> None:
        self.assertEqual(machine.blocks_of(RAMBLOCK, MTREE), [
            Block("ram0", 0, 0, 0xA0000),
            Block("ram0", 0xC0000, 0xC0000, 0x4000),
            Block("ram0", 0xF0000, 0xF0000, 0x20000000 - 0xF0000),
            Block("mem-dimm0", 0, 1 << 32, 128 << 20),
            Block("0000:00:02.0/vmem0", 0, 5 << 30, 128 << 20),
        ])

    def test_memory_is_a_file_or_blocks(self) -> None:
        plain = GuestSpec(KERNEL)
        ram = Path("/ram.raw")
        self.assertIn("memory-backend-file,id=ram0,size=512M,mem-path=/ram.raw,share=on",
                      machine.memory(plain, ram, False))
        self.assertIn("memory-backend-ram,id=ram0,size=512M", machine.memory(plain, None, False))
        numa = machine.memory(replace(plain, numa=(192, 320), smp=3), None, False)
        self.assertIn("memory-backend-ram,id=ram-node1,size=320M", numa)
        self.assertIn("node,nodeid=0,memdev=ram-node0,cpus=0-0", numa)
        self.assertIn("node,nodeid=1,memdev=ram-node1,cpus=1-2", numa)
        dimm = replace(plain, dimm=(128, 128))
        self.assertIn("512M,slots=4,maxmem=768M", machine.memory(dimm, None, False))
        # It is plugged in later, but for a restore, where it is there from the start.
        self.assertNotIn("pc-dimm,id=dimm1,memdev=mem-dimm1", machine.memory(dimm, None, False))
        self.assertIn("pc-dimm,id=dimm1,memdev=mem-dimm1", machine.memory(dimm, None, True))
        virtio = replace(plain, virtio_mem=VirtioMem(512, 200))
        device = "virtio-mem-pci,id=vm0,memdev=vmem0,requested-size=200M"
        self.assertIn(device, machine.memory(virtio, None, False))
        old = replace(virtio, kernel=replace(KERNEL, series="5.10"))
        self.assertIn(f"{device},unplugged-inaccessible=off", machine.memory(old, None, False))
        with self.assertRaisesRegex(LabError, "no raw RAM file"):
            machine.memory(dimm, ram, False)

    def test_records_are_taken_off_the_disk(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            flags = struct.pack("<1000Q", *range(1000))
            disk = b""
            for record, content in (("zoneinfo", b"Node 0"), ("kpageflags", flags)):
                disk += f"{record} {len(content)}\n".encode().ljust(4096, b"\0")
                disk += content.ljust(-(-len(content) // 4096) * 4096, b"\0")
            (folder / "disk").write_bytes(disk + b"end 0\n".ljust(4096, b"\0"))
            machine.read_records(folder / "disk", folder)
            self.assertEqual((folder / "zoneinfo").read_bytes(), b"Node 0")
            self.assertEqual((folder / "kpageflags.bin").read_bytes(), flags)

    def test_processors(self) -> None:
        found = decoys.processors(REGISTERS)
        self.assertEqual(found, [Processor(0x4357000, 0, True), Processor(0xABCD001, 3, False)])
        self.assertEqual([one.where for one in found], ["halted", "user"])
        with self.assertRaisesRegex(CheckFailed, "CR3"):
            decoys.processors("CPU#0\nCPL=0 HLT=0\n")


class Xen(unittest.TestCase):
    def test_what_dom0_says(self) -> None:
        said = Answer(["TIME save 10.5 12.75", "SIZE full 4096", "CODE 1", "CODE 0",
                       '{"pruned": false}', '{"pruned": true}', "DONE"])
        self.assertEqual(said.times, {"save": 2.25})
        self.assertEqual(said.sizes, {"full": 4096})
        self.assertEqual(said.word("CODE"), "0")
        self.assertEqual(said.json(), {"pruned": True})
        with self.assertRaisesRegex(LabError, "no LEFT"):
            said.word("LEFT")


if __name__ == "__main__":
    unittest.main()
