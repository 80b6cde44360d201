import json
import unittest
from dataclasses import replace

from errors import LabError
from kernels import Kernel
from spec import GuestSpec, Part, VirtioMem, layout
from tests import KERNEL

PLAIN = GuestSpec(KERNEL)
# Each has another field that is not as it always is.
SPECS = [
    PLAIN,
    GuestSpec(KERNEL, mem=4096, cpu="max", smp=4, machine="q35", garbage="compressible"),
    GuestSpec(KERNEL, forms=("raw", "elf"), append="nokaslr lab.beat=100", hugetlb=32),
    GuestSpec(KERNEL, balloon=128, dimm=(128, 128), offline=128),
    GuestSpec(KERNEL, numa=(192, 320), smp=2, virtio_mem=VirtioMem(512, 200)),
    GuestSpec(KERNEL, pmem="128M!256M", file_system="xfs", next="quiet",
              capabilities=("xbzrle",), live=True),
    GuestSpec(KERNEL, qemu=("unshare", "qemu"), more=("-global", "PIIX4_PM.disable_s3=0")),
    GuestSpec(KERNEL, machine="q35", firmware="ovmf", nested="ram.raw", split=192),
    GuestSpec(KERNEL, stress=3, anon=16, seed=7, cold_dimm=(256,), backing="memfd",
              disk_format="qcow2"),
    GuestSpec(KERNEL, apps=True, aged=3, storm=True, squeezed=900),
]


class Records(unittest.TestCase):
    def test_what_is_written_is_read(self) -> None:
        for spec in SPECS:
            with self.subTest(spec=spec):
                read = GuestSpec.from_json(json.loads(json.dumps(spec.to_json())))
                # A guest that was booted keeps its command line, whatever is made of it later.
                self.assertEqual(read, replace(spec, booted=spec.cmdline))
                self.assertEqual(read.to_json(), spec.to_json())

    def test_what_a_reader_needs_is_always_there(self) -> None:
        self.assertEqual(list(PLAIN.to_json()), ["kernel", "mem", "cpu", "smp", "machine",
                                                 "garbage", "forms", "cmdline"])

    def test_all_fields_are_in_the_specs(self) -> None:
        for field in PLAIN.__dataclass_fields__:
            if field not in ("kernel", "booted"):
                self.assertTrue(any(getattr(spec, field) != getattr(PLAIN, field)
                                    for spec in SPECS), field)

    def test_one_of_an_earlier_lab(self) -> None:
        record = {
            "kernel": {"series": "6.1", "release": "6.1.0-50-cloud-amd64", "packages": {},
                       "wanted": ["ext4"], "vmlinuz": "kernels/6.1/vmlinuz", "modules": ["ext4"]},
            "mem": 512, "cpu": "qemu64", "smp": 2, "machine": "pc", "garbage": "random",
            "forms": ["mapped", "stream"], "numa": [192, 320], "virtio_mem": [512, 200],
            "layout": "ram0=0-512M", "append": "",
            "cmdline": "console=ttyS0 quiet panic=-1 lab.anon=24  lab.plug=200"}
        spec = GuestSpec.from_json(record)
        self.assertEqual(spec.numa, (192, 320))
        self.assertEqual(spec.virtio_mem, VirtioMem(size=512, plugged=200))
        self.assertEqual((spec.room, spec.plugged), (512, 200))
        self.assertEqual(spec.kernel.modules, ("ext4",))
        self.assertEqual(spec.cmdline, record["cmdline"])
        self.assertTrue(spec.several_blocks)

    def test_what_is_not_known_is_refused(self) -> None:
        record = PLAIN.to_json()
        with self.assertRaisesRegex(LabError, "colour"):
            GuestSpec.from_json(record | {"colour": "red"})
        with self.assertRaisesRegex(LabError, "colour"):
            Kernel.from_json(record["kernel"] | {"colour": "red"})

    def test_a_kernel(self) -> None:
        self.assertEqual(Kernel.from_json(json.loads(json.dumps(KERNEL.to_json()))), KERNEL)
        self.assertNotIn("vmlinux", KERNEL.to_json())
        with self.assertRaisesRegex(LabError, "--debug-symbols"):
            print(KERNEL.debug_image)


class Computed(unittest.TestCase):
    def test_names(self) -> None:
        # Captures that are there are found by them.
        cases = {
            "6.1-512-qemu64": PLAIN,
            "6.1-4096-max-q35-smp2": GuestSpec(KERNEL, 4096, "max", 2, "q35"),
            "6.1-512-qemu64-appendnokaslr_lab.beat_100":
                GuestSpec(KERNEL, append="nokaslr lab.beat=100"),
            "6.1-512-qemu64-smp2-numa192_320": GuestSpec(KERNEL, numa=(192, 320), smp=2),
            "6.1-512-qemu64-dimm128-offline64": GuestSpec(KERNEL, dimm=(128,), offline=64),
            "6.1-512-qemu64-virtio_mem512_200":
                GuestSpec(KERNEL, virtio_mem=VirtioMem(512, 200)),
            "6.1-512-qemu64-hugetlb32-balloon128-pmem128_256":
                GuestSpec(KERNEL, hugetlb=32, balloon=128, pmem="128M!256M"),
        }
        for name, spec in cases.items():
            self.assertEqual(spec.name, name)

    def test_command_lines(self) -> None:
        def words(**options: object) -> list[str]:
            return replace(PLAIN, **options).cmdline.split()  # type: ignore[arg-type]

        self.assertEqual(words(), ["console=ttyS0", "quiet", "panic=-1", "lab.anon=24",
                                   "lab.seed=1", "lab.compressible=0", "lab.huge=0"])
        self.assertIn("lab.anon=8", words(mem=255))
        self.assertIn("lab.anon=96", words(mem=2048))
        self.assertIn("lab.anon=5", words(anon=5))
        self.assertIn("lab.compressible=1", words(garbage="compressible"))
        self.assertIn("lab.stress=3", words(stress=3))
        self.assertIn("lab.stress=4", words(live=True, smp=2))
        self.assertIn("lab.plug=456", words(dimm=(256,), virtio_mem=VirtioMem(512, 200)))
        self.assertEqual(words(pmem="64M!256M")[-2:], ["memmap=64M!256M", "lab.pmem=1"])
        self.assertEqual(words(offline=128)[-2:], ["lab.offline=128",
                                                   "memhp_default_state=offline"])

    def test_memory(self) -> None:
        spec = GuestSpec(KERNEL, dimm=(128, 128), virtio_mem=VirtioMem(512, 200))
        self.assertEqual((spec.plugged, spec.room), (456, 768))
        self.assertTrue(spec.several_blocks)
        self.assertFalse(PLAIN.several_blocks)
        with self.assertRaisesRegex(LabError, "512 MiB"):
            GuestSpec(KERNEL, numa=(192, 192))

    def test_the_disk_of_records_holds_kpageflags_and_kpagecount(self) -> None:
        for spec, frames in ((PLAIN, 512 << 8),
                             # What is plugged in lies behind 4 GiB.
                             (replace(PLAIN, dimm=(256,)), (4096 + 256) << 8),
                             (replace(PLAIN, cold_dimm=(256,)), (4096 + 256) << 8)):
            self.assertGreater(spec.records_bytes, 2 * 8 * frames)

    def test_layout(self) -> None:
        gib = 1 << 30
        cases = [
            ("pc", 512, (Part(0, gib // 2, 0),)),
            ("pc", 3583, (Part(0, 3583 << 20, 0),)),
            ("pc", 3584, (Part(0, 3 * gib, 0), Part(4 * gib, gib // 2, 3 * gib))),
            ("pc", 4096, (Part(0, 3 * gib, 0), Part(4 * gib, gib, 3 * gib))),
            ("q35", 2815, (Part(0, 2815 << 20, 0),)),
            ("q35", 2816, (Part(0, 2 * gib, 0), Part(4 * gib, 768 << 20, 2 * gib))),
            ("q35", 4096, (Part(0, 2 * gib, 0), Part(4 * gib, 2 * gib, 2 * gib))),
        ]
        for machine, mem, parts in cases:
            with self.subTest(machine=machine, mem=mem):
                self.assertEqual(layout(machine, mem), parts)
                self.assertEqual(sum(part.len for part in parts), mem << 20)


if __name__ == "__main__":
    unittest.main()
