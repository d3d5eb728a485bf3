"""Time and memory of the step on a CUDA GPU beside upstream with xformers. **Not run by us yet: no GPU was at hand.**

``python -m benchmarks.gpu --write`` writes results/gpu.md: images/s, peak memory and MFU of ViT-S, B and L, one
after the other on one card, without a loader: the batch lies in pinned memory, and each step moves it. Upstream is its
unmodified step under bf16 autocast with xformers' kernels and TF32 allowed, without FSDP, which on one GPU shards
nothing. Needs CUDA and ``pip install xformers``. Read :func:`main` first.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import statistics
import time
import warnings
from functools import partial

import torch

from benchmarks.machine import add_write_option, describe, finish, table
from benchmarks.step import COMMON, FIRST, Step, batch_for, our_step
from dinov2_custom.configs.load import load_run_config
from dinov2_custom.train.flops import flops_per_image, peak_flops
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from tests.oracle import OracleTrainer, ensure_oracle, load_oracle
from tests.oracle import trainer as oracle_trainer

MODELS = {"vit_small": (64, 128), "vit_base": (64, 128), "vit_large": (32, 64, 128)}


def upstream_step(overrides: list[str], batch: dict) -> Step:
    """Return upstream's whole step with the real xformers in place of the tests' stand-in."""
    import xformers.ops as ops
    from xformers.ops import fmha

    oracle = load_oracle(ensure_oracle())
    attention = oracle.vits.MemEffAttention.forward.__globals__
    attention.update(memory_efficient_attention=ops.memory_efficient_attention, unbind=ops.unbind)
    block = oracle.vits.Block.forward.__globals__
    block.update(fmha=fmha, index_select_cat=ops.index_select_cat, scaled_index_add=ops.scaled_index_add)
    oracle_trainer._Stays = lambda tensor: tensor  # here ``cuda()`` does move
    trainer = OracleTrainer(oracle, overrides)
    trainer.model.cuda()
    trainer.optimizer = oracle.train.build_optimizer(trainer.cfg, trainer.model.get_params_groups())
    schedules = oracle.train.build_schedulers(trainer.cfg)

    def step(index: int) -> dict[str, torch.Tensor]:
        with torch.autocast("cuda", torch.bfloat16):
            return trainer.train_step(batch, FIRST + index, schedules, seed=index)

    return step


def measure(step: Step, repetitions: int) -> tuple[float, float]:
    """Return the median seconds of a step and the peak GB of allocated memory."""
    for index in range(3):
        step(index)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for index in range(repetitions):
        start = time.perf_counter()
        step(index)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), torch.cuda.max_memory_allocated() / 1e9


def row(arch: str, batch_size: int, repetitions: int) -> list[list[object]]:
    overrides = [*COMMON.split(), f"student.arch={arch}", f"train.batch_size_per_gpu={batch_size}"]
    cfg = load_run_config("", overrides, "unused", require_dataset=False, warn=lambda note: None)
    with torch.device("meta"):
        backbone = SSLMetaArch(cfg).student["backbone"]
    operations = batch_size * flops_per_image(cfg, backbone.embed_dim, backbone.n_blocks)
    peak = peak_flops(torch.cuda.get_device_name())
    batch = {k: v.pin_memory() if torch.is_tensor(v) else v for k, v in batch_for(overrides, batch_size).items()}
    rows = []
    for name, build in (("upstream + xformers", upstream_step), ("ours", partial(our_step, device="cuda"))):
        try:
            seconds, memory = measure(build(overrides, batch), repetitions)
        except torch.cuda.OutOfMemoryError:
            rows.append([arch, batch_size, name, "out of memory", "-", "-"])
        else:
            mfu = f"{operations / seconds / peak:.0%}" if peak else "unknown GPU"
            rows.append([arch, batch_size, name, f"{batch_size / seconds:.0f}", f"{memory:.1f}", mfu])
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only architectures whose name contains this")
    parser.add_argument("--repetitions", type=int, default=10)
    add_write_option(parser)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected a CUDA GPU, got none; benchmarks.step is for CPUs")
    warnings.simplefilter("ignore")  # upstream's
    torch.backends.cuda.matmul.allow_tf32 = True  # as upstream does; ours has no float32 product that counts
    cases = [(arch, size) for arch, sizes in MODELS.items() if args.only in arch for size in sizes]
    rows = [line for arch, batch_size in cases for line in row(arch, batch_size, args.repetitions)]
    header = ["model", "batch", "engine", "images/s", "peak GB", "MFU"]
    device = torch.cuda.get_device_name()
    versions = f"xformers={importlib.metadata.version('xformers')}", f"cuda={torch.version.cuda}"
    page = f"# The step on {device}\n\n{describe('benchmarks.gpu', *versions)}\n{table(header, rows)}"
    finish(page, "gpu", args.write)


if __name__ == "__main__":
    main()
