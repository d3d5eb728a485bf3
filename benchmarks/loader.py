"""Measure images/s delivered to the trainer's process by two data-loading processes: torch's DataLoader with upstream's
pipeline, and ours.

Wall time of alternating windows; the delivered batch is read, not copied. ``python -m benchmarks.loader [--write]``.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import closing

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks import machine, photographs, upstream_pipeline
from benchmarks.data_pipeline import InMemory
from dinov2_custom.data.augmentations import DataAugmentationDINO
from dinov2_custom.data.masking import MaskingGenerator, Masks
from dinov2_custom.data.pool import Ring
from dinov2_custom.data.samples import TrainBatches, TrainSamples

BATCH, WORKERS = 32, 2
WARM_UP_BATCHES = 3
NOTES = f"""
500x375 JPEG, batches of {BATCH}. images/s: median (best) over the rounds, wall time, which needs an idle machine: the
load average was {{load}}. CPU ms: of all processes, trainer included, for one image delivered; x: times upstream's, of
the medians, by wall and by CPU time. memory: proportional set size of all these processes at the end of a round, above
the trainer's before it.
"""


class UpstreamDataset(Dataset):
    """Upstream's augmentation over files in memory."""

    def __init__(self, files: list[bytes], augment):
        self.files = files
        self.augment = augment

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, i: int):
        return self.augment(Image.open(io.BytesIO(self.files[i % len(self.files)])).convert("RGB")), ()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a window")
    machine.add_write_option(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    upstream = upstream_pipeline.load()
    files = photographs.encoded(500, 375, "JPEG", 48)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    contenders = {
        "upstream, DataLoader": lambda: _upstream(files, upstream, WORKERS),
        "ours, all on the CPU": lambda: _ours(files, WORKERS, late=False),
        "ours, colour on the device": lambda: _ours(files, WORKERS, late=True),
        "ours, colour on the device, 1 process": lambda: _ours(files, 1, late=True),
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    memory: dict[str, float] = {}
    for _ in range(args.rounds):
        for name, start in contenders.items():
            before = _memory_mib()
            rate, cpu_ms, after = _measure(start(), args.seconds)
            rates[name].append(rate)
            cpu[name].append(cpu_ms)
            memory[name] = after - before
    base, base_cpu = (statistics.median(found["upstream, DataLoader"]) for found in (rates, cpu))
    rows = []
    for name, found in rates.items():
        middle, cpu_ms = statistics.median(found), statistics.median(cpu[name])
        row = [name, f"{middle:.0f} ({max(found):.0f})", f"{middle / base:.1f}", f"{cpu_ms:.2f}"]
        rows.append([*row, f"{base_cpu / cpu_ms:.1f}", f"{memory[name]:.0f} MiB"])
    page = f"# Delivered by {WORKERS} data-loading processes\n\n" + machine.describe(
        "benchmarks.loader", upstream.versions
    )
    page += (
        NOTES.format(load=load) + "\n" + machine.table(["loader", "images/s", "x", "CPU ms", "x, CPU", "memory"], rows)
    )
    one, two = (statistics.median(rates[f"ours, colour on the device{more}"]) for more in (", 1 process", ""))
    page += f"\nFrom 1 to {WORKERS} processes: {two / one:.2f} times as many; wanted >= 1.75, over upstream >= 12.\n"
    machine.finish(page, "loader", args.write)


def _upstream(files: list[bytes], upstream, workers: int) -> Iterator[int]:
    loader = DataLoader(
        UpstreamDataset(files, upstream.augment), batch_size=BATCH, num_workers=workers, collate_fn=upstream.collate
    )
    batches = iter(loader)
    for batch in batches:
        batch["collated_global_crops"][:, :, ::16].sum(dtype=torch.float32)
        yield BATCH


def _ours(files: list[bytes], workers: int, late: bool) -> Iterator[int]:
    samples = TrainSamples(InMemory(files), DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 8), seed=0)
    masks = Masks((0.1, 0.5), 0.5, 256, MaskingGenerator((16, 16), max_num_patches=128))
    ring = Ring(TrainBatches(samples, masks, batch_size=BATCH, late_colours=late), workers, 0)
    try:
        while True:
            built = ring.next_batch()
            built.arrays["global_crops"][:, :, ::16].sum()
            ring.release(built.slot)
            yield BATCH
    finally:
        ring.close()


def _measure(batches: Iterator[int], seconds: float) -> tuple[float, float, float]:
    """Return images/s and CPU milliseconds per image over ``seconds``, and the final memory in MiB."""
    with closing(batches):
        for _ in itertools.islice(batches, WARM_UP_BATCHES * WORKERS):
            pass
        start, cpu, images = time.perf_counter(), _cpu_s(), 0
        while (now := time.perf_counter()) < start + seconds:
            images += next(batches)
        return images / (now - start), (_cpu_s() - cpu) * 1e3 / images, _memory_mib()


def _processes() -> list[str]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return ["self", *file.read().split()]


def _cpu_s() -> float:
    """Return the CPU time of this process and its children so far (on Linux; otherwise of this process)."""
    total = 0
    try:
        for pid in _processes():
            with open(f"/proc/{pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
    except OSError:
        return time.process_time()
    return total / os.sysconf("SC_CLK_TCK")


def _memory_mib() -> float:
    """Return the proportional set size of this process and its children (on Linux; otherwise 0)."""
    total = 0
    try:
        for pid in _processes():
            with open(f"/proc/{pid}/smaps_rollup") as file:
                total += sum(int(line.split()[1]) for line in file if line.startswith("Pss:"))
    except OSError:
        return 0.0
    return total / 1024


if __name__ == "__main__":
    main()
