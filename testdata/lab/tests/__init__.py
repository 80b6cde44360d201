"""Tests of what in the lab needs no guest."""

from kernels import Kernel

KERNEL = Kernel("6.1", "6.1.0-50-cloud-amd64", "kernels/6.1/vmlinuz", ("virtio", "ext4"),
                {"linux-image-6.1.0-50-cloud-amd64": "6.1.176-1"}, ("virtio", "ext4"),
                "kernels/6.1/config")
