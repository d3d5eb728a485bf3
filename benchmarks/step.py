"""Time one training step against upstream's on this CPU: same configuration, batch and precision, alternating.

Upstream is its unmodified package as the tests drive it, under bf16 autocast, with torch's fused attention in place of
xformers (the fastest on a CPU). Peak memory is measured in a separate process each. ``python -m benchmarks.step
--write`` writes results/step.md.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from benchmarks.machine import add_write_option, describe, finish, table
from benchmarks.memory import step_operations
from dinov2_custom.configs.load import load_run_config
from dinov2_custom.train.optimization import (
    apply_optim_scheduler,
    build_optimizer,
    build_schedulers,
    clip_gradients,
    step_unless,
)
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from dinov2_custom.train.step_guard import StepGuard
from tests.oracle import OracleTrainer, ensure_oracle, load_oracle, make_batch, stand_ins
from tests.oracle.trainer import oracle_config

COMMON = "student.patch_size=14 crops.local_crops_size=98 dino.head_n_prototypes=65536"
FIRST = 100  # iteration at which the schedules are evaluated
Step = Callable[[int], dict[str, torch.Tensor]]


def upstream_step(overrides: list[str], batch: dict) -> Step:
    """Return upstream's whole step: schedules, losses, clipping, AdamW, EMA."""
    oracle = load_oracle(ensure_oracle())
    stand_ins._attention = _fused_attention
    return steps_of(OracleTrainer(oracle, overrides), oracle, batch, "cpu")


def steps_of(trainer: OracleTrainer, oracle, batch: dict, device: str, autocast: bool = True) -> Step:
    """Return the step of upstream's ``trainer`` on ``batch``, under bf16 autocast."""
    schedules = oracle.train.build_schedulers(trainer.cfg)

    def step(index: int) -> dict[str, torch.Tensor]:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            return trainer.train_step(batch, FIRST + index, schedules, seed=index)

    return step


def _fused_attention(q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def our_step(overrides: list[str], batch: dict | Iterator[dict], device: str = "cpu", made_on: str = "cpu") -> Step:
    """Return our whole step, as in the training loop, on one batch or on the next of several.

    ``made_on``: device on which the weights are drawn. A ViT-L takes half a minute on a CPU; the CUDA stand-in has no
    random numbers, and torch redraws until they are in range.
    """
    cfg = load_run_config("", overrides, "unused", require_dataset=False, warn=lambda note: None)
    with torch.device(made_on):
        model = SSLMetaArch(cfg)
    model = model.to(device).train()
    model.prepare_for_distributed_training()
    optimizer = build_optimizer(cfg, model.get_params_groups())
    schedules = build_schedulers(cfg)
    guard = StepGuard(cfg.train.max_nonfinite_steps, model.fp16_scaler is not None, lambda: "none")

    def step(index: int) -> dict[str, torch.Tensor]:
        lr, wd, momentum, temp, last_layer_lr = (float(schedule[FIRST + index]) for schedule in schedules)
        apply_optim_scheduler(optimizer, lr, wd, last_layer_lr)
        optimizer.zero_grad(set_to_none=True)
        images = batch if isinstance(batch, dict) else next(batch)
        losses = model.forward_backward(images, temp, torch.Generator().manual_seed(index))
        losses, skip = guard.check(index, losses, clip_gradients(cfg, model, optimizer))
        step_unless(skip, model, optimizer, momentum)
        guard.poll()
        return losses

    return step


ENGINES = {"upstream": upstream_step, "ours": our_step}


def batch_for(overrides: list[str], batch_size: int) -> dict:
    oracle = load_oracle(ensure_oracle())
    return make_batch(oracle, oracle_config(oracle, overrides), batch_size, seed=0)


class Seconds(NamedTuple):
    """Wall time and CPU time of one step; the latter depends little on other load."""

    clock: float
    processor: float


def timed(steps: dict[str, Step], repetitions: int) -> dict[str, list[Seconds]]:
    """Run the engines alternately, after one warm-up, and return the time of each step."""
    seconds: dict[str, list[Seconds]] = {name: [] for name in steps}
    for index in range(repetitions + 1):
        for name, step in steps.items():
            start = time.perf_counter(), time.process_time()
            step(index)
            if index:
                seconds[name].append(Seconds(time.perf_counter() - start[0], time.process_time() - start[1]))
    return seconds


def peak_memory(engine: str, arguments: list[str]) -> float:
    """Return the peak resident memory in GB of a process that runs three steps of one engine."""
    command = [sys.executable, "-m", "benchmarks.step", *arguments, "--only", engine]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["peak_gb"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="vit_small")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=tuple(ENGINES), help="print the peak memory of three steps of one engine")
    add_write_option(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")  # upstream's
    overrides = [*COMMON.split(), f"student.arch={args.arch}", f"train.batch_size_per_gpu={args.batch_size}"]
    batch = batch_for(overrides, args.batch_size)
    if args.only:
        timed({args.only: ENGINES[args.only](overrides, batch)}, 2)
        print(json.dumps({"peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}))
        return
    own = [f"--arch={args.arch}", f"--batch-size={args.batch_size}", f"--threads={args.threads}"]
    peaks = {name: peak_memory(name, own) for name in ENGINES}
    seconds = timed({name: build(overrides, batch) for name, build in ENGINES.items()}, args.repetitions)
    finish(_page(args, overrides, seconds, peaks), "step", args.write)


def _page(args, overrides: list[str], seconds: dict[str, list[Seconds]], peaks: dict[str, float]) -> str:
    cfg = load_run_config("", overrides, "unused", require_dataset=False, warn=lambda note: None)
    operations = step_operations(cfg)
    clock = {name: statistics.median(one.clock for one in values) for name, values in seconds.items()}
    processor = {name: statistics.median(one.processor for one in values) for name, values in seconds.items()}
    rows = [
        [
            name,
            f"{clock[name]:.2f}",
            f"{min(one.clock for one in values):.2f} .. {max(one.clock for one in values):.2f}",
            f"{processor[name]:.2f}",
            f"{args.batch_size / clock[name]:.2f}",
            f"{peaks[name]:.2f}",
        ]
        for name, values in seconds.items()
    ]
    header = ["engine", "median s/step", "range", "median processor s/step", "images/s", "peak resident GB"]
    ratios = [f"{times['upstream'] / times['ours']:.2f}" for times in (clock, processor)]
    return (
        "# One training step beside upstream's\n\n"
        f"{describe('benchmarks.step')}\n"
        f"{args.arch}, patch 14, 2 x 224 + 8 x 98 px, batch {args.batch_size}, 65,536 prototypes, bf16, threads: "
        f"{args.threads}; {args.repetitions} repetitions in turn after one that is not counted.\n\n"
        f"{table(header, rows)}\n"
        f"Ratio of the medians: **{ratios[0]}** by the clock, {ratios[1]} in processor time. A step has "
        f"{operations / 1e9:.0f} GFLOP by the closed formula of `dinov2_custom/train/flops.py`.\n"
    )


if __name__ == "__main__":
    main()
