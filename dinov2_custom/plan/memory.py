"""Print the memory of a training step by category, and the largest batch that fits.

The count itself is in ``train/memory.py``, which training also uses. It takes seconds for a large network, so
:class:`Counts` keeps each one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from omegaconf import OmegaConf

from dinov2_custom.errors import ConfigError
from dinov2_custom.plan import roofline
from dinov2_custom.train.memory import (
    CATEGORIES,
    MODES,
    SHARE_OF_TENSORS,
    StepMemory,
    largest_batch,
    measure_step,
    step_limit,
)
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch

LARGEST_BATCH = 1024  # upper limit of the search for the largest batch that fits


class Counts:
    """Steps counted so far, each once: by configuration, without what a step's memory and time do not depend on."""

    def __init__(self) -> None:
        # by configuration and activation checkpointing, then by batch
        self._steps: dict[tuple[str, str], dict[int, roofline.Roofline]] = {}
        self._memory: dict[tuple[str, str], dict[int, StepMemory]] = {}

    def step(self, cfg, mode: str) -> roofline.Roofline:
        """Return kernels and memory of the step of ``cfg`` with the activation checkpointing ``mode``."""
        key, batch = (_key(cfg), mode), cfg.train.batch_size_per_gpu
        known = self._steps.setdefault(key, {})
        if batch not in known:
            known[batch] = roofline.predict(cfg, mode)
            self._memory.setdefault(key, {})[batch] = known[batch].memory
        return known[batch]

    def memory(self, cfg, mode: str) -> StepMemory:
        """Return the memory of that step."""
        key, batch = (_key(cfg), mode), cfg.train.batch_size_per_gpu
        known = self._memory.setdefault(key, {})
        if batch not in known:
            known[batch] = measure_step(SSLMetaArch, cfg, mode)
        return known[batch]

    def largest(self, cfg, mode: str, limit: float) -> int:
        """Return the largest batch whose step takes at most ``limit`` bytes, within an eighth of it; 0 if none does."""
        cfg, memory = copy_of(cfg), self.memory(cfg, mode)

        def peak(batch: int) -> int:
            cfg.train.batch_size_per_gpu = batch
            return self.memory(cfg, mode).peak

        peaks = {batch: counted.peak for batch, counted in self._memory[_key(cfg), mode].items()}
        return largest_below(peak, limit, {0: memory.state, **peaks})


def copy_of(cfg):
    """Return a configuration that can be changed."""
    return OmegaConf.create(OmegaConf.to_container(cfg))


def _key(cfg) -> str:
    sections = OmegaConf.to_container(cfg)
    del sections["train"]["batch_size_per_gpu"]
    return str({name: value for name, value in sections.items() if name not in ("optim", "teacher")})


def print_memory(cfg, num_gpus: int, gigabytes: float = 0.0) -> None:
    """Print the table of :func:`report` and, with ``gigabytes``, the largest batches for such a GPU.

    Raises:
        ConfigError: not even a step of one image fits.
    """
    counts = Counts()
    for line in report(cfg, counts, num_gpus):
        print(line, flush=True)
    if not gigabytes:
        return
    print()
    room, found = f"{gigabytes:g} GB, {1 - SHARE_OF_TENSORS:.1%} of it left free", 0
    for mode in MODES:
        largest = counts.largest(cfg, mode, gigabytes * 1e9 * SHARE_OF_TENSORS)
        most = " or more" if largest == LARGEST_BATCH else ""
        batch = f"train.batch_size_per_gpu={largest}{most} fits" if largest else "not even one image fits"
        print(f"{mode}: {batch} into {room}", flush=True)
        found = max(found, largest)
    if not found:
        raise ConfigError(
            f"--fits {gigabytes:g}: expected a step of one image to fit, got none; use a smaller student.arch, "
            "fewer prototypes (dino.head_n_prototypes), smaller crops, or a larger GPU"
        )
    if cfg.optim.global_batch:
        print(split_on(cfg, gigabytes, num_gpus, counts))


def report(cfg, counts: Counts, num_gpus: int = 1) -> Iterable[str]:
    """Yield the lines of the table: each activation checkpointing, in total and by category, in GB (10^9 bytes)."""
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
        memory = counts.memory(cfg, mode)
        sizes = [memory.peak, *memory.categories.values(), *([sharded(memory, num_gpus)] if num_gpus > 1 else [])]
        cells = [mode, *(f"{size / 1e9:.2f}" for size in sizes)]
        yield "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
    yield "Counted on tensors in bf16 where the precision is auto. A CUDA context (about 0.5 GB) and gaps come on top."


def sharded(memory: StepMemory, gpus: int) -> int:
    """Estimate the peak with weights, gradients and optimizer state sharded; gathered blocks are not included."""
    return memory.peak - memory.state * (gpus - 1) // gpus


def split_on(cfg, gigabytes: float, num_gpus: int, counts: Counts) -> str:
    """Return the line that says how ``optim.global_batch`` is divided on GPUs of ``gigabytes``."""
    share = cfg.train.batch_size_per_gpu
    batch = largest_batch(cfg, step_limit(SSLMetaArch, cfg, gigabytes * 1e9, num_gpus), counts.memory)
    return (
        f"optim.global_batch={cfg.optim.global_batch}: {batch} per process x {num_gpus} processes x "
        f"{cfg.optim.accumulation_steps * share // batch} accumulated"
    )


def largest_below(size: Callable[[int], int], limit: float, sizes: dict[int, float]) -> int:
    """Return an n up to ``LARGEST_BATCH`` with size(n) <= limit, within an eighth of the largest; 0 if 1 does not fit.

    ``size`` must be non-decreasing. It is slow and nearly linear, so one or two interpolated guesses usually suffice.

    Args:
        sizes: n -> size(n), at least two, to start the interpolation; those that were asked for are added.
    """
    while True:
        fitting = max((n for n, known in sizes.items() if known <= limit), default=0)
        too_large = min((n for n, known in sizes.items() if known > limit), default=LARGEST_BATCH + 1)
        (first, at_first), (second, at_second) = sorted(sizes.items(), key=lambda item: abs(item[1] - limit))[:2]
        slope = max((at_second - at_first) / (second - first), 1e-9)
        tolerance = max(1, fitting // 8)
        if too_large - fitting <= tolerance or (fitting and limit - sizes[fitting] < slope * tolerance / 2):
            return min(fitting, LARGEST_BATCH)
        guess = first + 0.99 * (limit - at_first) / slope  # rather below than above, which would need another guess
        guess = min(max(int(guess), fitting + 1), too_large - 1)
        sizes[guess] = size(guess)
