"""Time and memory of the step on a CUDA GPU beside upstream with xformers. **Not run by us yet: no GPU was at hand.**

``python -m benchmarks.gpu --write`` writes results/gpu.md: images/s, peak memory and MFU of ViT-S, B and L, one
after the other on one card; ours with its data loader too. Upstream is its unmodified step under bf16 autocast with
xformers' kernels and TF32 allowed, without FSDP, which on one GPU shards nothing; where xformers does not run, with
torch's fused attention. Needs CUDA; ``pip install xformers scikit-image scikit-learn`` first. Read :func:`main` first.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.machine import add_write_option, describe, finish, table
from benchmarks.memory import step_operations
from benchmarks.photographs import encoded
from benchmarks.step import COMMON, Step, _fused_attention, batch_for, our_step, steps_of
from dinov2_custom.configs.load import load_run_config
from dinov2_custom.data.loaders import make_train_loader
from dinov2_custom.train.flops import peak_flops
from tests.oracle import OracleTrainer, ensure_oracle, load_oracle, stand_ins
from tests.oracle import trainer as oracle_trainer

MODELS = {"vit_small": (64, 128), "vit_base": (64, 128), "vit_large": (64, 128, 32)}
COMPILED = "train.compile=on"
FILES = 400  # photographs of 500 x 375 that the loader reads
WARM_UP, BLOCKS = 3, 3
HEADER = ["model", "batch", "engine", "images/s", "peak GB", "reserved GB", "MFU", "host ms a step"]
NOTES = """
2 x 224 + 8 x 98 px, patch 14, 65,536 prototypes, bf16. The batch lies in pinned memory and each step moves it, or, with
the loader, is made from {files} JPEG files of 500 x 375 in this machine's page cache by {workers} processes. images/s:
the median of {blocks} blocks of {steps} steps, waiting for the GPU at the end of a block alone. peak: allocated, and
reserved by torch's allocator. host ms: until a step is submitted; near the step's time, the GPU waits for Python.
"""


class Measured(NamedTuple):
    """Median seconds of a step, median seconds in which the host submits it, peak bytes allocated and reserved."""

    seconds: float
    host: float
    allocated: int
    reserved: int


def has_xformers() -> bool:
    """Return whether xformers computes attention here: it may be absent, or built for another torch."""
    try:
        import xformers.ops as ops

        q = torch.zeros(1, 8, 2, 64, device="cuda", dtype=torch.bfloat16)
        ops.memory_efficient_attention(q, q, q)
    except (ImportError, NotImplementedError):
        return False
    return True


def upstream_step(with_xformers: bool, overrides: list[str], batch: dict) -> Step:
    """Return upstream's whole step with the real xformers in place of the tests' stand-in, or torch's attention."""
    oracle = load_oracle(ensure_oracle())
    if with_xformers:
        import xformers.ops as ops
        from xformers.ops import fmha

        attention = oracle.vits.MemEffAttention.forward.__globals__
        attention.update(memory_efficient_attention=ops.memory_efficient_attention, unbind=ops.unbind)
        block = oracle.vits.Block.forward.__globals__
        block.update(fmha=fmha, index_select_cat=ops.index_select_cat, scaled_index_add=ops.scaled_index_add)
    stand_ins._attention = _fused_attention
    oracle_trainer._Stays = lambda tensor: tensor  # here ``cuda()`` does move
    trainer = OracleTrainer(oracle, overrides)
    trainer.model.cuda()
    trainer.optimizer = oracle.train.build_optimizer(trainer.cfg, trainer.model.get_params_groups())
    return steps_of(trainer, oracle, batch, "cuda")


def measure(step: Step, repetitions: int) -> Measured:
    """Time blocks of ``repetitions`` steps."""
    for index in range(WARM_UP):
        step(index)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    seconds, host = [], []
    for _ in range(BLOCKS):
        start = time.perf_counter()
        for index in range(repetitions):
            submitted = time.perf_counter()
            step(index)
            host.append(time.perf_counter() - submitted)
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / repetitions)
    peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return Measured(statistics.median(seconds), statistics.median(host), *peaks)


def measure_with_loader(overrides: list[str], images: Path, workers: int, repetitions: int) -> Measured:
    """Time our steps on batches of the training loader."""
    options = [*overrides, f"train.dataset_path=ImageFolder:root={images}", f"train.num_workers={workers}"]
    cfg = load_run_config("", options, "unused", warn=lambda note: None)
    loader = make_train_loader(cfg, rank=0, world_size=1)
    with closing(loader.batches(device="cuda")) as batches:
        return measure(our_step(options, batches, device="cuda"), repetitions)


def rows(arch: str, batch_size: int, args, images: Path) -> list[list[object]]:
    """Measure all engines on one model and batch."""
    overrides = [*COMMON.split(), f"student.arch={arch}", f"train.batch_size_per_gpu={batch_size}"]
    cfg = load_run_config("", overrides, "unused", require_dataset=False, warn=lambda note: None)
    operations = step_operations(cfg)
    batch = {k: v.pin_memory() if torch.is_tensor(v) else v for k, v in batch_for(overrides, batch_size).items()}
    engines: dict[str, Callable[[], Measured]] = {}
    if not args.ours:
        kernels = "xformers" if args.xformers else "torch's attention"
        upstream = partial(upstream_step, args.xformers, overrides, batch)
        engines[f"upstream + {kernels}"] = lambda: measure(upstream(), args.repetitions)
    for variant in ["", COMPILED, *args.variant]:
        options = [*overrides, *variant.split()]
        engines[f"ours {variant}".strip()] = lambda options=options: measure(
            our_step(options, batch, device="cuda"), args.repetitions
        )
    engines["ours, loader included"] = lambda: measure_with_loader(overrides, images, args.workers, args.repetitions)
    found = []
    for name, run in engines.items():
        found.append([arch, batch_size, name, *_cells(run, batch_size, operations)])
        print(" | ".join(map(str, found[-1])), flush=True)  # a run that is cut off has said this much
        gc.collect()
        torch.cuda.empty_cache()
    return found


def _cells(run: Callable[[], Measured], batch_size: int, operations: float) -> list[str]:
    try:
        seconds, host, allocated, reserved = run()
    except torch.cuda.OutOfMemoryError:
        return ["out of memory", *["-"] * (len(HEADER) - 4)]
    peak = peak_flops(torch.cuda.get_device_name())
    mfu = f"{operations / seconds / peak:.0%}" if peak else "unknown GPU"
    return [f"{batch_size / seconds:.0f}", f"{allocated / 1e9:.1f}", f"{reserved / 1e9:.1f}", mfu, f"{host * 1e3:.0f}"]


def write_photographs(folder: Path) -> None:
    """Write ``FILES`` JPEG files."""
    for index, data in enumerate(encoded(500, 375, "JPEG", FILES)):
        (folder / f"{index:04}.jpg").write_bytes(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only architectures whose name contains this")
    parser.add_argument("--repetitions", type=int, default=10, help="steps a block")
    parser.add_argument("--minutes", type=float, default=8.5, help="begin no further model and batch after this")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="of the loader")
    parser.add_argument("--ours", action="store_true", help="without upstream")
    parser.add_argument(
        "--variant", action="append", default=[], help="overrides for a further row of ours; may be repeated"
    )
    add_write_option(parser)
    args = parser.parse_args()
    start = time.monotonic()
    if not torch.cuda.is_available():
        parser.error("expected a CUDA GPU, got none; benchmarks.step is for CPUs")
    warnings.simplefilter("ignore")  # upstream's
    torch.backends.cuda.matmul.allow_tf32 = True  # as upstream does; ours has no float32 product that counts
    args.xformers = not args.ours and has_xformers()
    cases = [(arch, size) for arch, sizes in MODELS.items() if args.only in arch for size in sizes]
    lines: list[list[object]] = []
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder))
        for arch, batch_size in cases:
            if time.monotonic() - start < args.minutes * 60:
                lines += rows(arch, batch_size, args, Path(folder))
    finish(_page(args, lines), "gpu", args.write)


def _page(args, lines: list[list[object]]) -> str:
    try:
        versions = [f"xformers={importlib.metadata.version('xformers')}"]
    except importlib.metadata.PackageNotFoundError:
        versions = ["xformers=absent"]
    notes = NOTES.format(files=FILES, workers=args.workers, blocks=BLOCKS, steps=args.repetitions)
    about = describe("benchmarks.gpu", *versions, f"cuda={torch.version.cuda}")
    return f"# The step on {torch.cuda.get_device_name()}\n\n{about}{notes}\n{table(HEADER, lines)}"


if __name__ == "__main__":
    main()
