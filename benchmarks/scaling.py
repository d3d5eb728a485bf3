"""Scaling cost of a step: measured with gloo on this CPU, and predicted for hundreds of GPUs from a stated model.

The measurement runs the same step with and without gradient reduction, for 1, 2 and 4 processes. ``python -m
benchmarks.scaling --write`` writes results/scaling.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

import torch

from benchmarks.machine import add_write_option, describe, finish, table
from benchmarks.memory import student_of
from dinov2_custom import distributed, entry
from dinov2_custom.configs.load import load_run_config
from dinov2_custom.parallel import GradientReducer
from dinov2_custom.plan import roofline
from dinov2_custom.train.gpus import GPUS
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch

SMALL = (
    "student.arch=vit_tiny student.patch_size=8 crops.global_crops_size=32 crops.local_crops_size=16 "
    "crops.local_crops_number=2 train.batch_size_per_gpu=4 dino.head_n_prototypes=4096"
)
LARGE = "student.arch={arch} student.patch_size=14 crops.local_crops_size=98 train.batch_size_per_gpu={batch}"
# Fraction of a step that can hide the gradient reduction: the last group's backward pass (a quarter of the student's
# tokens, two of the step's three and a bit units of work)
OVERLAP = 0.15


class Link(NamedTuple):
    """Full-duplex bandwidth of one GPU in bytes per second (published), and the fraction reached in practice."""

    name: str
    rate: float
    reached: float


NVLINK = Link("NVLink 4 (450 GB/s each way)", 450e9, 0.8)
NETWORKS = (Link("400 Gb/s a GPU", 50e9, 0.8), Link("100 Gb/s a GPU", 12.5e9, 0.8))


def config(overrides: str):
    return load_run_config("", overrides.split(), "unused", require_dataset=False, warn=lambda note: None)


def bytes_on_wire(gradient_bytes: int, processes: int) -> float:
    """Return the bytes that each process sends in a ring all-reduce: 2 (W - 1) / W of the gradients."""
    return 2 * (processes - 1) / processes * gradient_bytes


def worker(steps: int) -> None:
    """Print, as JSON, the median seconds of a step with and without reduction, and the bytes reduced."""
    from tests.train.batches import random_batch

    distributed.enable()
    cfg = config(SMALL)
    model, batch = SSLMetaArch(cfg).train(), random_batch(cfg)
    reducer = GradientReducer(model.student.named_parameters())
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for index in range(2 * steps + 2):
        reduce = index % 2 == 0
        model.student.zero_grad()
        start = time.perf_counter()
        model.forward_backward(batch, 0.05, torch.Generator(), on_last_backward=reducer.arm if reduce else None)
        if reduce:
            reducer.finish()
        if index > 1:
            seconds[reduce].append(time.perf_counter() - start)
    reduced = sum(p.numel() * p.element_size() for p in model.student.parameters())
    if distributed.is_main_process():
        medians = {"with": statistics.median(seconds[True]), "without": statistics.median(seconds[False])}
        print(json.dumps(medians | {"bytes": reduced}), flush=True)
    distributed.disable()


def measure(processes: int, steps: int) -> dict[str, float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["-m", "benchmarks.scaling", "--worker", f"--steps={steps}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def predict(arch: str, batch: int, gpus: int, network: Link, gradient_bytes: int, step: float) -> list[str]:
    """Return a row: images/s and efficiency when the reduction overlaps with the last group's backward pass."""
    inside = bytes_on_wire(gradient_bytes, min(gpus, 8)) / (NVLINK.rate * NVLINK.reached)
    # between nodes each GPU reduces the eighth of the gradients that it holds after the reduction inside its node
    nodes = gpus // 8
    across = bytes_on_wire(gradient_bytes // 8, nodes) / (network.rate * network.reached) if nodes > 1 else 0.0
    exposed = max(0.0, inside + across - OVERLAP * step)
    efficiency = step / (step + exposed)
    speed = f"{gpus * batch / (step + exposed):,.0f}"
    times = [f"{step * 1e3:.0f}", f"{(inside + across) * 1e3:.1f}"]
    return [arch, batch, gpus, network.name, *times, speed, f"{efficiency:.0%}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--worker", action="store_true", help="one process of the measurement")
    add_write_option(parser)
    args = parser.parse_args()
    if args.worker:
        worker(args.steps)
        entry.leave(0)
    rows = []
    for processes in (1, 2, 4):
        found = measure(processes, args.steps)
        extra = found["with"] - found["without"]
        wire = bytes_on_wire(found["bytes"], processes)
        rate = f"{wire / extra / 1e6:.0f}" if processes > 1 and extra > 0 else "-"
        times = [f"{1e3 * found[name]:.0f}" for name in ("without", "with")]
        rows.append([processes, *times, f"{1e3 * extra:.0f}", f"{wire / 1e6:.1f}", rate])
    predictions = []
    for arch, batch in (("vit_small", 64), ("vit_large", 64), ("vit_giant2", 32)):
        ffn = " student.ffn_layer=swiglufused" if arch == "vit_giant2" else ""
        cfg = config(LARGE.format(arch=arch, batch=batch) + ffn)
        size = sum(4 * p.numel() for p in student_of(cfg).parameters())
        kernels = roofline.predict(cfg)
        step = kernels.seconds(GPUS["H100"]).total() + kernels.update_seconds(GPUS["H100"])
        for gpus in (8, 64, 512):
            networks = NETWORKS if gpus > 8 else NETWORKS[:1]
            predictions += [predict(arch, batch, gpus, network, size, step) for network in networks]
    measured = ["processes", "ms without", "ms with reduction", "difference", "MB sent by each", "MB/s"]
    predicted = ["model", "batch a GPU", "GPUs", "network", "step ms", "reduction ms", "images/s", "efficiency"]
    page = (
        "# More processes\n\n"
        f"{describe('benchmarks.scaling')}\n"
        "## Measured: gloo on this CPU\n\n"
        f"ViT-Ti on 32 px, the same batch in every process, median of {args.steps} steps each, in turn. *Without* "
        "is the step alone while the other processes compute too: more processes than cores share them. MB sent: "
        "2 (W - 1) / W of the float32 gradients.\n\n"
        f"{table(measured, rows)}\n"
        "## Predicted for H100, not measured\n\n"
        f"Step time as in roofline.md; {NVLINK.name} inside a node of 8, links reach "
        f"{NVLINK.reached:.0%} of their rate; {OVERLAP:.0%} of a step hides the reduction; see docs/scaling.md.\n\n"
        f"{table(predicted, predictions)}"
    )
    finish(page, "scaling", args.write)


if __name__ == "__main__":
    main()
