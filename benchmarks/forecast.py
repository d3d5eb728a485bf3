"""Count how often the band of a forecast contains the end of the curve, on the good runs of benchmarks/verdict.py.

``python -m benchmarks.forecast --work outputs/verdict --write`` forecasts the end of each finished good run from its
first part, after the warm-up, and compares it with the mean of the last rows. Trains nothing; a few seconds. Writes
results/forecast.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import yaml

from benchmarks.machine import add_write_option, describe, finish, table
from benchmarks.verdict import DONE, RUNS, TOTAL
from dinov2_custom.plots.epochs import warmup_iterations
from dinov2_custom.plots.forecast import make_forecast
from dinov2_custom.plots.metrics_file import Run

PARTS = {"a quarter": 1 / 4, "a half": 1 / 2, "two thirds": 2 / 3}
METRICS = ("total_loss", "rankme")  # the evaluations of these runs are too few
LAST = 5  # rows whose mean is the end
KINDS = ("good", "trained weights, learning rate / 4")


def good_runs(work: Path) -> Iterator[Run]:
    """Yield the good runs in ``work`` that have all their rows."""
    for kind in KINDS:
        for file in sorted(work.glob(f"{list(RUNS).index(kind)}_*/{DONE}")):
            rows = json.loads(file.read_text())["rows"]
            if len(rows) == TOTAL:
                yield Run(file.parent.name, rows, yaml.safe_load((file.parent / "config.yaml").read_text()))


def outcome(run: Run, metric: str, part: float) -> str:
    """Return "inside", "above" or "below" (the band is above or below the end), or "refused"."""
    x, y = np.array([(row["iteration"], row[metric]) for row in run.rows if metric in row]).T
    known = (x >= warmup_iterations(run)) & (x <= part * x[-1])
    made = make_forecast(x[known], y[known], x[-1])
    if isinstance(made, str):
        return "refused"
    end = y[-LAST:].mean()
    return "above" if made.low[-1] > end else "below" if made.high[-1] < end else "inside"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("outputs/verdict"), help="runs of benchmarks.verdict")
    add_write_option(parser)
    args = parser.parse_args()
    runs, cells = list(good_runs(args.work)), []
    for metric in METRICS:
        for words, part in PARTS.items():
            found = [outcome(run, metric, part) for run in runs]
            counts = [found.count(kind) for kind in ("inside", "above", "below", "refused")]
            cells.append([metric, words, f"{counts[0]} of {sum(counts[:3])}", *counts[1:]])
    header = ["metric", "forecast from", "inside the band", "band above the end", "band below it", "refused"]
    page = (
        "# Forecasts of recorded runs\n\n"
        f"{describe('benchmarks.forecast')}\n"
        f"The end of {len(runs)} good runs of {TOTAL} iterations of [verdict.md](verdict.md), forecast from their "
        f"first part without the warm-up. The end is the mean of the last {LAST} rows.\n\n"
        f"{table(header, cells)}"
    )
    finish(page, "forecast", args.write)


if __name__ == "__main__":
    main()
