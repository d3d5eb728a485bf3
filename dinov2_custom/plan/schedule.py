"""Show the schedules of a run before it starts: a table, and a figure where matplotlib is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dinov2_custom.errors import optional
from dinov2_custom.files import atomic_write
from dinov2_custom.plan.table import aligned
from dinov2_custom.train.course import RunLength
from dinov2_custom.train.optimization import build_schedulers

NAMES = ("learning rate", "weight decay", "teacher momentum", "teacher temperature", "last layer's learning rate")
ROWS, POINTS = 11, 1000
FILE = "schedule.png"


def print_schedule(cfg, length: RunLength, folder: Path) -> None:
    """Print the table; draw ``schedule.png`` into ``folder`` where matplotlib is installed."""
    schedules = build_schedulers(cfg, length)
    unit, passed = clock(length)
    rows = [
        [f"{passed(i):.4g}", *(f"{schedule[i]:.4g}" for schedule in schedules)] for i in points(length.total, ROWS)
    ]
    print(aligned([unit, *NAMES], rows))
    if importlib.util.find_spec("matplotlib") is None:
        print('for a figure: pip install "dinov2_custom[plots]"')
        return
    folder.mkdir(parents=True, exist_ok=True)
    draw(schedules, length, folder / FILE)
    print(f"figure: {folder / FILE}")


def points(total: int, count: int) -> list[int]:
    """Return up to ``count`` different indices from 0 to ``total`` - 1, both included, evenly spaced."""
    return np.unique(np.linspace(0, total - 1, count).round().astype(int)).tolist()


def clock(length: RunLength):
    """Return (the unit of the run's length, a function from points of the schedules to it)."""
    if length.max_hours:
        return "hours", lambda i: i / length.total * length.max_hours
    return "iteration", lambda i: i


def draw(schedules: Sequence, length: RunLength, path: Path) -> None:
    """Draw a panel for each schedule; the last layer's learning rate is in the panel of the learning rate."""
    figure = optional("matplotlib.figure", "figures").Figure(dpi=120, figsize=(9, 6), layout="constrained")
    unit, passed = clock(length)
    where = points(length.total, POINTS)
    x = [passed(i) for i in where]
    lr, wd, momentum, temperature, last_layer = ([schedule[i] for i in where] for schedule in schedules)
    panels = figure.subplots(2, 2, sharex=True).flat
    for axes, name, values in zip(panels, NAMES, (lr, wd, momentum, temperature), strict=False):
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
