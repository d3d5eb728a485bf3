"""Print the memory of a training step by category, and the largest batch that fits.

The count itself is in ``train/memory.py``, which training also uses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator

from omegaconf import OmegaConf

from dinov2_custom.errors import ConfigError
from dinov2_custom.train.memory import (
    CATEGORIES,
    MODES,
    SHARE_OF_TENSORS,
    StepMemory,
    largest_batch,
    measure_step,
)

LARGEST_BATCH = 1024  # upper limit of the search for the largest batch that fits


def print_memory(cfg, num_gpus: int, gigabytes: float = 0.0) -> None:
    """Print the table of :func:`report` and, with ``gigabytes``, the largest batches for such a GPU.

    Raises:
        ConfigError: not even a step of one image fits.
    """
    count = functools.cache(functools.partial(measure_step, cfg))
    for line in report(cfg, count, num_gpus):
        print(line, flush=True)
    if not gigabytes:
        return
    print()
    room, found = f"{gigabytes:g} GB, {1 - SHARE_OF_TENSORS:.1%} of it left free", 0
    for mode, largest in fits(cfg, gigabytes, count):
        most = " or more" if largest == LARGEST_BATCH else ""
        batch = f"train.batch_size_per_gpu={largest}{most} fits" if largest else "not even one image fits"
        print(f"{mode}: {batch} into {room}", flush=True)
        found = max(found, largest)
    if not found:
        raise ConfigError(
            f"--fits {gigabytes:g}: expected a step of one image to fit, got none; take a smaller student.arch, "
            "fewer prototypes (dino.head_n_prototypes), smaller crops, or a larger GPU"
        )
    if cfg.optim.global_batch:
        print(split_on(cfg, gigabytes, num_gpus))


def report(cfg, count: Callable[[str], StepMemory], num_gpus: int = 1) -> Iterable[str]:
    """Yield the lines of the table: each activation checkpointing, in total and by category, in GB (10^9 bytes).

    ``count``: maps an activation checkpointing to the memory of a step of ``cfg``.
    """
    crops, batch_size = cfg.crops, cfg.train.batch_size_per_gpu
    yield (
        f"{cfg.student.arch}/{cfg.student.patch_size}, 2 x {crops.global_crops_size} + {crops.local_crops_number} x "
        f"{crops.local_crops_size} px, {cfg.dino.head_n_prototypes:,} prototypes, "
        f"train.batch_size_per_gpu={batch_size}: GB at the peak of a step"
    )
    header = ("train.activation_checkpointing", "all", *CATEGORIES)
    header += (f"sharded over {num_gpus}",) if num_gpus > 1 else ()
    widths = [max(len(name), 6) for name in header]
    yield "  ".join(name.rjust(width) for name, width in zip(header, widths, strict=True))
    for mode in MODES:
        memory = count(mode)
        sizes = [memory.peak, *memory.categories.values(), *([sharded(memory, num_gpus)] if num_gpus > 1 else [])]
        cells = [mode, *(f"{size / 1e9:.2f}" for size in sizes)]
        yield "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
    yield "Counted on tensors in bf16 where the precision is auto. A CUDA context (about 0.5 GB) and gaps come on top."


def sharded(memory: StepMemory, gpus: int) -> int:
    """Estimate the peak with weights, gradients and optimizer state sharded; gathered blocks are not included."""
    state = sum(memory.categories[name] for name in ("parameters", "gradients", "optimizer"))
    return memory.peak - state * (gpus - 1) // gpus


def fits(cfg, gigabytes: float, count: Callable[[str], StepMemory] | None = None) -> Iterator[tuple[str, int]]:
    """Yield each activation checkpointing with the largest batch whose step leaves enough of ``gigabytes`` free, or 0.

    ``count``: maps an activation checkpointing to the memory of a step of ``cfg`` at its own batch; default: count it.
    """
    own, count = cfg.train.batch_size_per_gpu, count or functools.partial(measure_step, cfg)
    cfg = OmegaConf.create(OmegaConf.to_container(cfg))
    for mode in MODES:

        def peak(batch_size: int, mode: str = mode) -> int:
            cfg.train.batch_size_per_gpu = batch_size
            return measure_step(cfg, mode).peak

        memory = count(mode)
        state = sum(memory.categories[name] for name in ("parameters", "gradients", "optimizer"))
        yield mode, largest_below(peak, gigabytes * 1e9 * SHARE_OF_TENSORS, (0, state), (own, memory.peak))


def split_on(cfg, gigabytes: float, num_gpus: int) -> str:
    """Return the line that says how ``optim.global_batch`` is divided on GPUs of ``gigabytes``."""
    share = cfg.train.batch_size_per_gpu
    batch = largest_batch(cfg, gigabytes * 1e9, num_gpus)
    return (
        f"optim.global_batch={cfg.optim.global_batch}: {batch} per process x {num_gpus} processes x "
        f"{cfg.optim.accumulation_steps * share // batch} accumulated"
    )


def largest_below(
    size: Callable[[int], int], limit: float, first: tuple[float, float], second: tuple[float, float]
) -> int:
    """Return an n up to ``LARGEST_BATCH`` with size(n) <= limit, within an eighth of the largest; 0 if 1 does not fit.

    ``size`` must be non-decreasing. It is slow and nearly linear, so one or two interpolated guesses usually suffice.

    Args:
        first, second: (n, approximate size(n)) for two n, to start the interpolation.
    """
    fitting, too_large = 0, LARGEST_BATCH + 1
    while too_large - fitting > 1:
        slope = max((second[1] - first[1]) / (second[0] - first[0]), 1e-9)
        guess = min(max(int(second[0] + (limit - second[1]) / slope), fitting + 1), too_large - 1)
        found = (guess, size(guess))
        if found[1] <= limit:
            fitting = guess
            if guess == LARGEST_BATCH or limit - found[1] < slope * max(1, guess / 8) / 2:
                break  # interpolation would stop at half of an eighth
        else:
            too_large = guess
            if fitting and too_large - fitting <= max(1, fitting // 8):
                break
        first, second = (second, found) if second[0] != guess else (first, found)
    return fitting
