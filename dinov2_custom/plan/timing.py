"""Time a few real training steps on this machine, with random images."""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import repeat
from typing import NamedTuple

import torch
from omegaconf import OmegaConf
from torch import Tensor

from dinov2_custom import distributed
from dinov2_custom.parallel import parallelize
from dinov2_custom.train.memory import batch_shapes
from dinov2_custom.train.optimization import (
    accumulate_gradients,
    apply_optim_scheduler,
    build_optimizer,
    clip_gradients,
    step_unless,
)
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from dinov2_custom.utils.allocator import keep_freed_memory
from dinov2_custom.utils.rng import generator_for

STEPS = 3  # timed steps, after one warm-up step


class Timing(NamedTuple):
    """Median seconds of a step; bytes: CUDA's peak, or the largest resident set of the process; what is recomputed."""

    seconds: float
    peak: int
    recomputed: str = "none"


def time_apart(cfg) -> Timing | None:
    """Run :func:`time_steps` in a separate process, so that the peak memory is that of this configuration alone.

    Returns None if the step does not fit into the device's memory.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_time_here, OmegaConf.to_container(cfg)).result()
        except (torch.OutOfMemoryError, BrokenProcessPool):  # on a CPU, the system kills the process
            return None


def _time_here(cfg: dict) -> Timing:
    if distributed.get_device().type == "cpu":
        keep_freed_memory()  # as training does
    return time_steps(OmegaConf.create(cfg))


def time_steps(cfg, num_steps: int = STEPS) -> Timing:
    """Run one warm-up step and ``num_steps`` timed steps as in the training loop, without data loading."""
    device = distributed.get_device()
    model = SSLMetaArch(cfg).to(device)
    model.prepare_for_distributed_training(load_weights=False)
    reducer, optimizer = parallelize(cfg, model), build_optimizer(cfg, model.get_params_groups())
    model.train()
    batch = random_batch(cfg, generator_for(cfg.train.seed, "plan"))
    batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    seconds = []
    for iteration in range(num_steps + 1):
        start = time.perf_counter()
        apply_optim_scheduler(optimizer, cfg.optim.lr, cfg.optim.weight_decay, cfg.optim.lr)
        optimizer.zero_grad(set_to_none=True)
        draws = generator_for(cfg.train.seed, "drop_path", iteration, 0)
        losses = accumulate_gradients(cfg, model, reducer, batch, repeat(batch), cfg.teacher.teacher_temp, draws)
        clip_gradients(cfg, model, optimizer)
        skip = 1.0 - sum(losses.values()).isfinite().float()
        step_unless(skip, model, optimizer, cfg.teacher.momentum_teacher)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return Timing(statistics.median(seconds[1:]), _peak_bytes(device), model.recompute)


def random_batch(cfg, generator: torch.Generator) -> dict[str, Tensor | int]:
    """Return a batch as the collate function makes it, with normal pixels and the mean number of masked patches."""
    shapes = batch_shapes(cfg)
    images = {
        name: torch.randn(shape, generator=generator) for name, (shape, _) in shapes.items() if name.endswith("crops")
    }
    masks = torch.zeros(shapes["collated_masks"][0], dtype=torch.bool)
    masked = shapes["masks_weight"][0][0]
    masks.view(-1)[torch.randperm(masks.numel(), generator=generator)[:masked]] = True
    per_crop = (1 / masks.sum(dim=1).clamp_min(1)).unsqueeze(1).expand_as(masks)
    return images | {
        "collated_masks": masks,
        "mask_indices_list": masks.flatten().nonzero().flatten(),
        "masks_weight": per_crop[masks],
        "upperbound": masked,
        "n_masked_patches": torch.full((1,), masked, dtype=torch.long),
    }


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
