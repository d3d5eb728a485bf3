"""Say what memory a configuration's training step needs, and which batch fits on a GPU, before there is any GPU.

Not the counting itself (``memory.py``). Read :func:`main` first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from omegaconf import OmegaConf

from dinov2_custom import entry
from dinov2_custom.configs.load import load_run_config
from dinov2_custom.train.args import get_memory_args_parser
from dinov2_custom.train.memory import CATEGORIES, SHARE_OF_TENSORS, StepMemory, measure_step

MODES = ("none", "selective", "full")
LARGEST_BATCH = 1024


def main(args) -> int:
    """Print the table, and with ``--fits`` the largest batches; return 0.

    Args:
        args: what ``args.get_memory_args_parser`` parses.

    Raises:
        ConfigError: a configuration that training would refuse too.
    """
    notes: list[str] = []
    cfg = load_run_config(
        args.config_file,
        args.opts,
        output_dir="unused",
        allow_unknown_keys=args.allow_unknown_keys,
        require_dataset=False,
        warn=notes.append,
    )
    for line in (*(f"note: {note}" for note in notes), *report(cfg, args.ngpus)):
        print(line)
    if args.fits:
        print()
        for line in fits(cfg, args.fits):
            print(line, flush=True)
    return 0


def report(cfg, ngpus: int = 1) -> Iterable[str]:
    """Yield the lines of the table: each activation checkpointing, in all and by category, in GB (10^9 bytes)."""
    crops, batch_size = cfg.crops, cfg.train.batch_size_per_gpu
    yield (
        f"{cfg.student.arch}/{cfg.student.patch_size}, 2 x {crops.global_crops_size} + {crops.local_crops_number} x "
        f"{crops.local_crops_size} px, {cfg.dino.head_n_prototypes:,} prototypes, "
        f"train.batch_size_per_gpu={batch_size}: GB at the peak of a step"
    )
    header = ("train.activation_checkpointing", "all", *CATEGORIES)
    header += (f"sharded over {ngpus}",) if ngpus > 1 else ()
    widths = [max(len(name), 6) for name in header]
    yield "  ".join(name.rjust(width) for name, width in zip(header, widths, strict=True))
    for mode in MODES:
        memory = measure_step(cfg, mode)
        sizes = [memory.peak, *memory.categories.values(), *([sharded(memory, ngpus)] if ngpus > 1 else [])]
        cells = [mode, *(f"{size / 1e9:.2f}" for size in sizes)]
        yield "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
    yield "Counted on tensors in bf16 where the precision is auto. A CUDA context (about 0.5 GB) and gaps come on top."


def sharded(memory: StepMemory, gpus: int) -> int:
    """Estimate the peak with weights, gradients and optimizer state shared out; no gathered block is in it."""
    state = sum(memory.categories[name] for name in ("parameters", "gradients", "optimizer"))
    return memory.peak - state * (gpus - 1) // gpus


def fits(cfg, gigabytes: float) -> Iterable[str]:
    """Yield, for each activation checkpointing, the largest batch whose step leaves enough of ``gigabytes`` free."""
    cfg = OmegaConf.create(OmegaConf.to_container(cfg))
    room = f"{gigabytes:g} GB, {1 - SHARE_OF_TENSORS:.1%} of it left free"
    for mode in MODES:

        def peak(batch_size: int, mode: str = mode) -> int:
            cfg.train.batch_size_per_gpu = batch_size
            return measure_step(cfg, mode).peak

        largest = largest_below(peak, gigabytes * 1e9 * SHARE_OF_TENSORS)
        if largest:
            most = " or more" if largest == LARGEST_BATCH else ""
            yield f"{mode}: train.batch_size_per_gpu={largest}{most} fits into {room}"
        else:
            yield f"{mode}: not even one image fits into {room}"


def largest_below(size: Callable[[int], int], limit: float) -> int:
    """Return an n up to ``LARGEST_BATCH`` with size(n) <= limit, within an eighth of the largest; 0: not even 1.

    ``size`` must not fall. It is slow, and nearly a straight line, along which the next n is looked for.
    """
    low, high = (1, size(1)), (LARGEST_BATCH + 1, float("inf"))
    if low[1] > limit:
        return 0
    guess = 32
    while high[0] - low[0] > max(1, low[0] // 8):
        guess = min(max(guess, low[0] + 1), high[0] - 1)
        found = (guess, size(guess))
        former = low
        low, high = (found, high) if found[1] <= limit else (low, found)
        slope = (found[1] - former[1]) / (found[0] - former[0]) or 1e-9
        guess = int(found[0] + (limit - found[1]) / slope)
        if found is low:  # a little beyond, to find an upper bound too
            guess += max(1, guess // 16)
    return low[0]


if __name__ == "__main__":
    raise SystemExit(entry.run("dinov2_custom.train.fit", get_memory_args_parser().parse_args()))
