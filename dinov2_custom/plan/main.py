"""Print memory, time and price of a run before it starts: the command ``run/train/plan.py``."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dinov2_custom import cli, distributed
from dinov2_custom.configs.load import load_run_config
from dinov2_custom.configs.paths import check_output_dir
from dinov2_custom.errors import ConfigError, optional
from dinov2_custom.files import atomic_write
from dinov2_custom.parallel import bytes_elsewhere, strategies_on
from dinov2_custom.plan import roofline
from dinov2_custom.plan.memory import LARGEST_BATCH, Counts, copy_of, print_memory
from dinov2_custom.plan.prices import Price, find_by_user_name, load_prices
from dinov2_custom.plan.timing import STEPS, Timing, time_apart
from dinov2_custom.train.course import RunLength, run_length
from dinov2_custom.train.gpus import GPU, GPUS, find_gpu
from dinov2_custom.train.memory import MODES, SHARE_OF_TENSORS, largest_batch, room_on
from dinov2_custom.train.optimization import build_schedulers
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch

ARCHITECTURES = {"s": "vit_small", "b": "vit_base", "l": "vit_large", "g": "vit_giant2"}
PRECISIONS = [
    f"compute_precision.{model}.{part}.mixed_precision.param_dtype"
    for model in ("student", "teacher")
    for part in ("backbone", "dino_head", "ibot_head")
]
AXES = {"arch": ["student.arch"], "batch": ["train.batch_size_per_gpu"], "precision": PRECISIONS}
HEADER = ["arch", "batch", "accumulated", "GPUs", "GPU", "recomputed", "GB", "fits", "s/iteration", "images/s"]
HEADER += ["hours", "GPU-hours", "spot, $", "on-demand, $", "checkpoint GB", "largest batch"]
SCHEDULES = ("learning rate", "weight decay", "teacher momentum", "teacher temperature", "last layer's learning rate")
NONE = "-"
# what is asked for instead of the table -> the flags that have an effect on it
EFFECTS = {
    "schedule": ("images", "gpus", "output_dir"),
    "fits": ("memory", "gpus"),
    "memory": ("gpus",),
    "ablate": ("gpu", "time"),
}
TABLE_EFFECTS = ("arch", "batch", "gpus", "gpu", "images", "price", "prices", "time")
DEFAULT_GPUS = ("L4", "4090", "A100-80GB", "H100")


class Choice(NamedTuple):
    """What training would do on GPUs of one kind.

    Attributes:
        cfg: with the batch and the accumulated batches that it would choose.
        mode: the activation checkpointing that it would choose.
        needed: bytes of one GPU.
        peak: bytes of a step, counted with whole weights.
        limit: that fits on the GPU.
    """

    cfg: object
    mode: str
    needed: float
    peak: int
    limit: float

    @property
    def fits(self) -> bool:
        return self.peak <= self.limit


def main(args) -> int:
    """Print what ``args`` asks for, of ``cli.plan_parser``; return 0."""
    check_flags(args)
    load = loader(args)
    names = [find_by_user_name(name) for name in args.gpu or ([] if args.time else DEFAULT_GPUS)]
    if args.schedule:
        cfg, folder = load(args.gpus[0]), Path(args.output_dir).expanduser()
        check_output_dir(folder, "--output-dir")
        print_schedule(cfg, length_of(cfg, args.images, args.gpus[0]), folder)
    elif args.memory or args.fits:
        for num_gpus in args.gpus:
            print_memory(load(num_gpus), num_gpus, args.fits or 0.0)
    elif args.ablate:
        axes = dict(args.ablate)
        check_axes(load, axes)
        print_ablation(load, axes, None if args.time else names[0])
    else:
        print_plan(load, args, names, load_prices(args.prices, args.price))
    return 0


def check_flags(args) -> None:
    """Check that every flag has an effect on what is printed.

    Raises:
        ConfigError: names the flags or values that would be ignored.
    """
    given = cli.given_flags(cli.plan_parser(), args)
    asked = next((dest for dest in EFFECTS if dest in given), "")
    effects = {*EFFECTS.get(asked, TABLE_EFFECTS), asked, "config_file", "allow_unknown_keys"}
    ignored = [flag for dest, flag in given.items() if dest not in effects]
    prints = f"with {given[asked]}" if asked else "on the table"
    if ignored:
        raise ConfigError(
            f"{', '.join(ignored)}: no effect {prints}; leave {'it' if len(ignored) == 1 else 'them'} out"
        )
    axes = [axis for axis, _ in args.ablate]
    mistakes = [
        (len(set(axes)) < len(axes), f"--ablate: expected each key once, as KEY=A,B, got {', '.join(axes)}"),
        (asked == "ablate" and args.time and args.gpu, "--ablate --time: measured on this machine, leave out --gpu"),
        (asked == "ablate" and len(args.gpu) > 1, f"--ablate: expected one --gpu, got {','.join(args.gpu)}"),
        (asked == "schedule" and len(args.gpus) > 1, f"--schedule: expected one number of --gpus, got {args.gpus}"),
        (
            not asked and args.time and 1 not in args.gpus,
            f"--time: a step is measured on this machine's one device; expected 1 among --gpus, got {args.gpus}",
        ),
    ]
    if found := [text for is_wrong, text in mistakes if is_wrong]:
        raise ConfigError("; ".join(found))


def check_axes(load: Callable, axes: dict[str, list[str]]) -> None:
    """Check the values of axes that stand for other keys.

    Raises:
        ConfigError: names the first bad value as the user wrote it, once, whatever the number of keys.
    """
    for axis, key in ((axis, AXES[axis][0]) for axis in axes if axis in AXES):
        for value in axes[axis]:
            try:
                load(1, f"{key}={value}")
            except ConfigError as e:
                _, named, expected = str(e).partition(f"{key} (override): ")
                if not named:
                    raise
                raise ConfigError(f"--ablate {axis}={value}: {expected.partition(' -> ')[0]}") from e


def loader(args) -> Callable:
    """Return a function from (number of GPUs, further overrides) to the configuration; it prints each note once."""
    said: set[str] = set()

    def note(text: str) -> None:
        if text not in said:
            print(f"note: {text}")
        said.add(text)

    def load(num_gpus: int, *overrides: str):
        cfg = load_run_config(
            args.config_file,
            [*args.opts, *overrides],
            output_dir="unused",
            allow_unknown_keys=args.allow_unknown_keys,
            require_dataset=False,
            world_size=num_gpus,
            warn=note,
        )
        return copy_of(cfg)

    return load


def length_of(cfg, num_images: int | None, num_gpus: int) -> RunLength:
    """Return the length of the run.

    Raises:
        ConfigError: an epoch is a pass over the images, and their number is not given.
    """
    if cfg.train.OFFICIAL_EPOCH_LENGTH == "auto" and not num_images:
        raise ConfigError("train.OFFICIAL_EPOCH_LENGTH=auto: expected the number of images, got none; add --images N")
    return run_length(cfg, num_images or 1, num_gpus)


def choose(cfg, gpu: GPU, num_gpus: int, counts: Counts) -> Choice:
    """Return what training would do on ``num_gpus`` GPUs; does not change ``cfg``."""
    cfg = copy_of(cfg)
    with torch.device("meta"):
        student = SSLMetaArch(cfg).student
    strategies = strategies_on(cfg, student, gpu.memory, num_gpus)
    room = room_on(gpu.memory, student, strategies, num_gpus)
    elsewhere = bytes_elsewhere(student, strategies, num_gpus)
    limit = room * SHARE_OF_TENSORS
    if cfg.optim.global_batch:
        batch = largest_batch(cfg, limit, counts.memory)
        cfg.optim.accumulation_steps *= cfg.train.batch_size_per_gpu // batch
        cfg.train.batch_size_per_gpu = batch
    for mode in modes_of(cfg):
        peak = counts.step(cfg, mode).memory.peak
        if peak <= limit:
            break
    besides = gpu.memory + elsewhere / SHARE_OF_TENSORS - room  # buckets, NCCL
    return Choice(cfg, mode, peak - elsewhere + besides, peak, limit)


def modes_of(cfg) -> Sequence[str]:
    """Return the activation checkpointings that training would try, in order."""
    wanted = cfg.train.activation_checkpointing
    return MODES if wanted == "auto" else (wanted,)


def print_plan(load: Callable, args, names: Sequence[str], prices: dict[str, Price]) -> None:
    """Print the table: a row for each architecture, batch, number of GPUs and kind of GPU."""
    archs = [f"student.arch={ARCHITECTURES.get(arch, arch)}" for arch in args.arch]
    batches = [f"train.batch_size_per_gpu={batch}" for batch in args.batch]
    cases = [combined(archs, batches, [n]) for n in args.gpus]
    rows, counts, lengths, without_length = [], Counts(), [], False
    for *overrides, num_gpus in itertools.chain.from_iterable(cases):
        cfg = load(num_gpus, *overrides)
        length = None
        if cfg.train.OFFICIAL_EPOCH_LENGTH != "auto" or args.images:
            length = length_of(cfg, args.images, num_gpus)
            lengths.append(describe_length(length))
        without_length |= length is None
        for name in names:
            choice = choose(cfg, GPUS[name], num_gpus, counts)
            step = counts.step(choice.cfg, choice.mode)
            seconds = step_seconds(choice, step, GPUS[name]) if choice.fits else None
            largest = counts.largest(choice.cfg, modes_of(choice.cfg)[0], choice.limit)
            tail = [f"{checkpoint_bytes(step) / 1e9:.2f}", f"{largest}+" if largest == LARGEST_BATCH else str(largest)]
            shown = "yes" if choice.fits else "no"
            head = [choice.mode, f"{choice.needed / 1e9:.2f}", shown]
            rows.append(row(choice.cfg, num_gpus, name, head, seconds, length, prices.get(name)) + tail)
        if args.time and num_gpus == 1:
            rows.append(timed_row(cfg, length, prices, counts))
    for text in dict.fromkeys(lengths):
        print(text)
    print(aligned(HEADER, rows))
    for text in footnotes(bool(names), args, without_length):
        print(text)


def combined(*choices: Sequence) -> list[tuple]:
    """Return all combinations; an empty choice is left out."""
    return list(itertools.product(*(choice for choice in choices if choice)))


def row(cfg, num_gpus: int, name: str, memory: list[str], seconds: float | None, length, price: Price | None):
    """Return the cells up to the price; a dash stands for values that are unknown or do not fit."""
    arch, batch, accumulated = cfg.student.arch, cfg.train.batch_size_per_gpu, cfg.optim.accumulation_steps
    cells = [arch, str(batch), str(accumulated), str(num_gpus), name, *memory]
    if seconds is None:
        return cells + [NONE] * 6
    cells += [f"{seconds:.3g}", f"{batch * accumulated * num_gpus / seconds:,.0f}"]
    if length is None:
        return cells + [NONE] * 4
    hours = length.max_hours or length.total * seconds / 3600
    dollars = [_number(hours * num_gpus * each) for each in price] if price else [NONE] * 2
    return cells + [_number(hours), _number(hours * num_gpus), *dollars]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def timed_row(cfg, length, prices: dict[str, Price], counts: Counts) -> list[str]:
    """Time the step here and return its row; the checkpoint is counted."""
    device = distributed.get_device()
    here = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    single = copy_of(cfg)
    single.optim.accumulation_steps = 1
    timing, accumulated = time_apart(single), cfg.optim.accumulation_steps
    memory = [timing.recomputed if timing else NONE, f"{timing.peak / 1e9:.2f}" if timing else NONE]
    price = prices.get(find_gpu(here) or "")
    cells = row(
        cfg, 1, f"{here}, measured", [*memory, "yes" if timing else "no"], timing and timing.seconds * accumulated,
        length, price,
    )  # fmt: skip
    return [*cells, f"{checkpoint_bytes(counts.step(cfg, 'none')) / 1e9:.2f}", NONE]


def step_seconds(choice: Choice, step: roofline.Roofline, gpu: GPU) -> float:
    """Return the predicted seconds of an iteration."""
    return choice.cfg.optim.accumulation_steps * step.seconds(gpu).total() + step.update_seconds(gpu)


def checkpoint_bytes(step: roofline.Roofline) -> int:
    """Return the size of a checkpoint: student, teacher and AdamW's two moments."""
    return step.memory.categories["parameters"] + step.memory.categories["optimizer"]


def describe_length(length: RunLength) -> str:
    if length.max_hours:
        return f"{length.max_hours:g} hours"
    drawn = length.total * length.global_batch / 1e6
    return (
        f"{length.total / length.epoch_length:g} epochs = {length.total:,} steps x {length.global_batch:,} images = "
        f"{drawn:.2f} million images"
    )


def footnotes(predicted: bool, args, without_length: bool) -> Iterator[str]:
    """Yield the footnotes that explain the table's figures."""
    if without_length:
        yield "hours: an epoch is one pass over the images (train.OFFICIAL_EPOCH_LENGTH=auto); add --images N"
    if predicted:
        yield f"s/iteration: {roofline.assumptions()}; without data loading and gradient reduction between GPUs."
        yield (
            f"GB: counted, of 10^9 bytes on one GPU; it fits if {1 - SHARE_OF_TENSORS:.1%} of the memory stays free. "
            "largest batch: per GPU, with nothing recomputed if train.activation_checkpointing is auto."
        )
    if args.time:
        yield f"measured: median of {STEPS} steps on random images, one process, without data loading; its peak memory."
    yield (
        "prices: those of --price or --prices, else of the package's prices.yaml (2026-05); -: none is known, set it: "
        "--price T4=0.5"
    )


def print_ablation(load: Callable, axes: dict[str, list[str]], name: str | None) -> None:
    """Print seconds and MiB of each combination: predicted for ``GPUS[name]``, or, with None, measured here."""
    rows, counts = [], Counts()
    for values in itertools.product(*axes.values()):
        chosen = zip(axes, values, strict=True)
        cfg = load(1, *(f"{key}={value}" for axis, value in chosen for key in AXES.get(axis, [axis])))
        if name:
            choice = choose(cfg, GPUS[name], 1, counts)
            timing = Timing(step_seconds(choice, counts.step(choice.cfg, choice.mode), GPUS[name]), choice.peak)
        else:
            timing = time_apart(cfg)
        images = cfg.train.batch_size_per_gpu * cfg.optim.accumulation_steps
        cells = [NONE] * 3
        if timing:
            cells = [f"{timing.seconds:.3g}", f"{images / timing.seconds:,.1f}", f"{timing.peak / 2**20:,.0f}"]
        rows.append([*values, *cells])
    print(aligned([*axes, "s/iteration", "images/s", "MiB"], rows))
    if name:
        print(f"{name}. {roofline.assumptions()}; memory is counted. --time measures on this machine.")
    else:
        print(f"Measured: median of {STEPS} steps on random images; MiB: CUDA's peak, or the process's resident set.")


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with right-aligned columns, to read it in a terminal too."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = ["| " + " | ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|")
    return "\n".join(text)


def print_schedule(cfg, length: RunLength, folder: Path) -> None:
    """Print the table; draw ``schedule.png`` into ``folder`` where matplotlib is installed."""
    schedules = build_schedulers(cfg, length)
    unit, passed = clock(length)
    rows = [[f"{passed(i):.4g}", *(f"{schedule[i]:.4g}" for schedule in schedules)] for i in points(length.total, 11)]
    print(aligned([unit, *SCHEDULES], rows))
    if importlib.util.find_spec("matplotlib") is None:
        print('for a figure: pip install "dinov2_custom[plots]"')
        return
    folder.mkdir(parents=True, exist_ok=True)
    draw_schedule(schedules, length, folder / "schedule.png")
    print(f"figure: {folder / 'schedule.png'}")


def points(total: int, count: int) -> list[int]:
    """Return up to ``count`` different indices from 0 to ``total`` - 1, both included, evenly spaced."""
    return np.unique(np.linspace(0, total - 1, count).round().astype(int)).tolist()


def clock(length: RunLength):
    """Return (the unit of the run's length, a function from points of the schedules to it)."""
    if length.max_hours:
        return "hours", lambda i: i / length.total * length.max_hours
    return "iteration", lambda i: i


def draw_schedule(schedules: Sequence, length: RunLength, path: Path) -> None:
    """Draw a panel for each schedule; the last layer's learning rate is in the panel of the learning rate."""
    figure = optional("matplotlib.figure", "figures").Figure(dpi=120, figsize=(9, 6), layout="constrained")
    unit, passed = clock(length)
    where = points(length.total, 1000)
    x = [passed(i) for i in where]
    lr, wd, momentum, temperature, last_layer = ([schedule[i] for i in where] for schedule in schedules)
    panels = figure.subplots(2, 2, sharex=True).flat
    for axes, name, values in zip(panels, SCHEDULES, (lr, wd, momentum, temperature), strict=False):
        axes.plot(x, values, label=name)
        axes.set_title(name)
        axes.ticklabel_format(useOffset=False, axis="y")
        if values is lr:
            axes.plot(x, last_layer, "--", label="last layer's")
            axes.legend()
    for axes in figure.axes[2:]:
        axes.set_xlabel(unit)
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png")


if __name__ == "__main__":
    cli.main("plan")
