"""GPUs by name, with figures from the vendors' data sheets, and the device that a run's log names."""

from __future__ import annotations

import re
from typing import NamedTuple


class GPU(NamedTuple):
    """One GPU.

    Attributes:
        memory: bytes, 10^9 for each GB of the data sheet.
        flops: dense 16-bit tensor-core FLOP/s, without sparsity, accumulated in float32.
        bandwidth: memory bandwidth, bytes per second.
    """

    memory: float
    flops: float
    bandwidth: float


# Source: the vendors' data sheets, SXM boards where there are several. Rates stated only with sparsity are halved.
GPUS = {
    "V100": GPU(16e9, 125e12, 900e9),
    "T4": GPU(16e9, 65e12, 320e9),
    "L4": GPU(24e9, 121e12, 300e9),
    "A10": GPU(24e9, 125e12, 600e9),
    "A10G": GPU(24e9, 70e12, 600e9),
    "A5000": GPU(24e9, 111e12, 768e9),
    "A6000": GPU(48e9, 155e12, 768e9),
    "A40": GPU(48e9, 150e12, 696e9),
    "3090": GPU(24e9, 71e12, 936e9),
    "4090": GPU(24e9, 165e12, 1008e9),
    "5090": GPU(32e9, 210e12, 1792e9),
    "A100-40GB": GPU(40e9, 312e12, 1555e9),
    "A100-80GB": GPU(80e9, 312e12, 2039e9),
    "L40S": GPU(48e9, 362e12, 864e9),
    "H100": GPU(80e9, 989e12, 3.35e12),
    "H100-PCIe": GPU(80e9, 756e12, 2e12),
    "GH200": GPU(96e9, 989e12, 4e12),
    "H200": GPU(141e9, 989e12, 4.8e12),
    "B200": GPU(180e9, 2250e12, 8e12),
}


_LESS = {"MIG", "Laptop", "Max"}  # of the names of a part of a GPU (Multi-Instance GPU), and of slower ones (Max-Q)


def find_gpu(device_name: str) -> str | None:
    """Return the key of ``GPUS`` for what ``torch.cuda.get_device_name`` returns; None for a GPU that is not known.

    All words of the key are in the device's name ("A100-80GB": "NVIDIA A100-SXM4-80GB"); the key with the most counts.
    """
    words = set(re.split(r"[\s-]+", device_name))
    if words & _LESS:
        return None
    known = [key for key in GPUS if words.issuperset(key.split("-"))]
    return max(known, key=lambda key: key.count("-"), default=None)


def describe_device(kind: str, name: str, threads: int, world_size: int) -> str:
    """Return the line of a run's log on what it runs on."""
    return f"device: {kind} ({name}) threads={threads} world_size={world_size}"


def find_device(log: str) -> str | None:
    """Return the device's name in the last line of :func:`describe_device` in a run's log; None if there is none."""
    found = re.findall(r"\] device: \w+ \((.*)\) threads=\d+ world_size=\d+$", log, re.MULTILINE)
    return found[-1] if found else None
